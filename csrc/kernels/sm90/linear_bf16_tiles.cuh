// The complement with states in bf16: H = (1 - M) h, Z = (1 - M) z as it stands. Its A operand is
// made in registers from the bit mask, B are the states as they lie. Variant::kMakesStates: states
// are made beside it, in a ring of heads, by the same launch.
#pragma once

#include "../common/convert.cuh"
#include "linear.cuh"
#include "tensor_map.h"

namespace sla2 {

// A complement tile: up to 256 query blocks, so that L2 delivers the states of 591 three times
// (tiles of 128 rows: five times, 8 GB for 40 heads), by what the accumulators leave: kPanels times
// 64 columns. A warpgroup has up to kGroupBlocks blocks of 64 rows.
constexpr int kRowBlock = 64;
constexpr int kStepWords = kStepBlocks / 32;  // of the mask
template <int kGroups_, int kGroupBlocks_, int kPanels_>
struct Bf16TileShape {
  static constexpr int kGroups = kGroups_, kGroupBlocks = kGroupBlocks_, kPanels = kPanels_;
  static constexpr int kBlocks = kGroups * kGroupBlocks;
  static constexpr int kColumns = kPanels * kPanel;
};

// Columns of a state: h, [D][D], then z as a bf16 pair (high [D], low [D]). Where this launch makes
// the states, of each 32 channels 8 n + 2 t + e lies at 8 t + 2 n + e. Lane t of a quad, which
// holds the pairs n in its accumulators, so has 16 contiguous bytes where h is made, and, as the
// order is its own inverse, again where H is. States from elsewhere have their channels in order,
// and H leaves through shared memory.

struct Bf16Tile {
  int bh, column0;
  int first_block, blocks;  // row blocks
};
// Row tiles vary fastest: the CTAs that share columns of the states run together.
template <class Variant>
__device__ __forceinline__ Bf16Tile bf16_tile(const LinearArgs& args, int ticket) {
  using TileShape = typename Variant::TileShape;
  constexpr int kColumnTiles = state_elements(Variant::kHeadDim) / TileShape::kColumns;
  const int row_tile = ticket % args.row_tiles, column_tile = ticket / args.row_tiles;
  Bf16Tile tile;
  tile.bh = head_at(args, column_tile / kColumnTiles);
  tile.column0 = column_tile % kColumnTiles * TileShape::kColumns;
  tile.first_block = row_tile * TileShape::kBlocks;
  tile.blocks = min(TileShape::kBlocks, args.row_blocks - tile.first_block);
  return tile;
}

// Shared memory: what the variant has besides, then the complement's ring of steps.
template <class TileShape, int kStages, class Base>
struct Bf16TileSmem : Base {
  static constexpr int kTileStages = kStages;
  struct TileStage {
    char state[TileShape::kPanels][kPanelBytes];
    uint32_t mask[kStepWords][TileShape::kBlocks * kRowBlock];
  };
  alignas(1024) TileStage tile[kStages];
  int tile_ticket[kStages];  // negative: no more tiles
  alignas(8) uint64_t tile_full[kStages];
  uint64_t tile_empty[kStages];

  __device__ __forceinline__ void init() {
    Base::init();
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem_address(&tile_full[i]), 1);
      mbarrier_init(smem_address(&tile_empty[i]), TileShape::kGroups * kWarpgroup / 32);
    }
  }
};

template <class Variant>
cudaError_t encode_bf16_tiles(LinearArgs& args) {
  using TileShape = typename Variant::TileShape;
  const LinearParams& p = args.p;
  args.row_blocks = (p.shape.num_q_blocks + kRowBlock - 1) / kRowBlock;
  args.row_tiles = (args.row_blocks + TileShape::kBlocks - 1) / TileShape::kBlocks;
  constexpr uint64_t kColumns = state_elements(Variant::kHeadDim);
  args.head_tiles = args.row_tiles * static_cast<int>(kColumns / TileShape::kColumns);
  args.head_reads = args.head_tiles;
  const uint64_t blocks = p.shape.num_k_blocks, slots = p.state_slots;
  const cudaError_t status =
      encode_tensor_map<3>(args.state, p.state, {kColumns, blocks, slots},
                           {kColumns * 2, blocks * kColumns * 2}, {kPanel, kStepBlocks, 1});
  if (status != cudaSuccess) return status;
  return encode_mask(args.mask, p, TileShape::kBlocks * kRowBlock);
}

// One thread: takes tickets, waits for states, loads one step of them and their mask words a stage.
template <class Variant>
__device__ __forceinline__ void load_bf16_tiles(const LinearArgs& args,
                                                typename Variant::Smem& smem) {
  using Smem = typename Variant::Smem;
  const Shape& shape = args.p.shape;
  const int tickets = args.p.bh_count * args.head_tiles;
  RingCursor<Smem::kTileStages> ring;
  int ready_bh = -1, ready = 0;  // the states of this head before this block are stored
  wait_predecessor();            // it makes the mask, or the states
  for (int ticket = take_tile_ticket(args); ticket < tickets;) {
    const int next_ticket = take_tile_ticket(args);  // on its way while this one's steps are loaded
    const Bf16Tile tile = bf16_tile<Variant>(args, ticket);
    if (tile.bh != ready_bh) {
      ready_bh = tile.bh;
      ready = 0;
    }
    const int slot = tile.bh % args.p.state_slots, row0 = tile.first_block * kRowBlock;
    for (int block = 0; block < shape.num_k_blocks;) {
      if (block >= ready) {
        ready = Variant::kMakesStates ? wait_states(args, tile.bh, block) : shape.num_k_blocks;
      }
      const int end = min(ready, shape.num_k_blocks);
#pragma unroll 1
      for (; block < end; block += kStepBlocks) {
        auto& stage = smem.tile[ring.stage];
        const uint32_t full = smem_address(&smem.tile_full[ring.stage]);
        mbarrier_wait(smem_address(&smem.tile_empty[ring.stage]), ring.parity ^ 1);
        smem.tile_ticket[ring.stage] = ticket;
        mbarrier_expect(full, sizeof(stage));
#pragma unroll
        for (int panel = 0; panel < Variant::TileShape::kPanels; ++panel) {
          tensor_load(smem_address(stage.state[panel]), &args.state, tile.column0 + panel * kPanel,
                      block, slot, full);
        }
        tensor_load(smem_address(stage.mask), &args.mask, row0, block / 32, tile.bh, full);
        ring.advance();
      }
    }
    ticket = next_ticket;
  }
  mbarrier_wait(smem_address(&smem.tile_empty[ring.stage]), ring.parity ^ 1);
  smem.tile_ticket[ring.stage] = -1;
  mbarrier_arrive(smem_address(&smem.tile_full[ring.stage]));
}

// One warpgroup of the complement stream.
template <class Variant>
struct Bf16ComplementWorker {
  using Smem = typename Variant::Smem;
  using TileShape = typename Variant::TileShape;
  static constexpr int kHeadDim = Variant::kHeadDim, kColumnsH = kHeadDim * kHeadDim;
  static constexpr int kAccumulators = kRowBlock * TileShape::kColumns / kWarpgroup;

  const LinearArgs& args;
  Smem& smem;
  const int group, warp, lane;
  RingCursor<Smem::kTileStages> ring;

  __device__ __forceinline__ Bf16ComplementWorker(const LinearArgs& args, Smem& smem, int group)
      : args(args), smem(smem), group(group), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void wait_full() const {
    mbarrier_wait(smem_address(&smem.tile_full[ring.stage]), ring.parity);
  }
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&smem.tile_empty[stage]));
  }

  // A lane has as many rows of a tile as its warpgroup has blocks of 64, twice: neighbours, so that
  // one load brings their mask words. Accumulators of block m and row half of it are row 2 m +
  // half.
  template <int kBlocks>
  __device__ __forceinline__ int lane_row() const {
    return 2 * kBlocks * (8 * warp + lane / 4);
  }

  // Word `word` of a step of this lane's rows of the mask.
  template <int kBlocks>
  struct alignas(8 * kBlocks) MaskWords {
    uint32_t row[2 * kBlocks];
  };
  template <int kBlocks>
  __device__ __forceinline__ MaskWords<kBlocks> load_mask(int stage, int word, int row) const {
    return *reinterpret_cast<const MaskWords<kBlocks>*>(&smem.tile[stage].mask[word][row]);
  }

  // The A operands of a word's two k16 steps: columns 16 k + 8 q + 2 (lane % 4) + e of (1 - M),
  // whose bits are 16 e + 8 k + 4 q + lane % 4 of the word. A set bit becomes 2.0, whose bf16 has a
  // single bit; the store halves. rotation: 2 - lane % 4.
  template <int kBlocks>
  __device__ __forceinline__ void make_operands(uint32_t (&a)[2][kBlocks][4],
                                                const MaskWords<kBlocks>& words,
                                                int rotation) const {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = words.row[2 * m + half];
        const uint32_t rotated = __funnelshift_l(bits, bits, rotation);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // 2 k + q
          a[i / 2][m][2 * (i % 2) + half] = (rotated << (12 - 4 * i)) & 0x40004000u;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) pin(a[k][m]);
    }
  }

  // acc = 2 (1 - M) [h | z] of kBlocks row blocks from row `row0` of the tile. The operands of a
  // word's products are made while those of the word before run.
  template <int kBlocks>
  __device__ __forceinline__ void multiply(float (&acc)[kBlocks][kAccumulators], int row0) {
    const int row = row0 + lane_row<kBlocks>();
    int rotation = 2 - lane % 4;
    int steps = (args.p.shape.num_k_blocks + kStepBlocks - 1) / kStepBlocks;
    pin(rotation);  // else made anew in every step
    pin(steps);
    MaskWords<kBlocks> words;
    uint32_t a[kStepWords][2][kBlocks][4];
    const auto issue = [&](int word, uint64_t b) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          Wgmma16<__nv_bfloat16, false, true>::mma(acc[m], a[word][k][m],
                                                   advance(b, (2 * word + k) * 2048), 1);
        }
      }
      wgmma_commit();
    };
    make_operands<kBlocks>(a[0], load_mask<kBlocks>(ring.stage, 0, row), rotation);
    int before = -1;  // the stage of the step before
    for (;;) {
      const int stage = ring.stage;
      const bool more = --steps > 0;
      ring.advance();
      // Asked here and read much later: the answer takes its time.
      const bool here = mbarrier_test(smem_address(&smem.tile_full[ring.stage]), ring.parity);
      const uint64_t b = wgmma_descriptor(smem_address(smem.tile[stage].state[0]), kPanelBytes,
                                          1024, Swizzle::k128);
      issue(0, b);
      wgmma_wait<1>();
      // This branch and the next also keep the operands in their place: ptxas would make them
      // between the products.
      if (before >= 0) release(before);
      before = stage;
      // Loaded only now: of a word that is there earlier, ptxas makes most operands ahead of the
      // products.
      make_operands<kBlocks>(a[1], load_mask<kBlocks>(stage, 1, row), rotation);
      if (more) {
        if (!here) wait_full();
        words = load_mask<kBlocks>(ring.stage, 0, row);
      }
      issue(1, b);
      if (!more) break;
      wgmma_wait<1>();
      make_operands<kBlocks>(a[0], words, rotation);
    }
    wgmma_wait<0>();
    release(before);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) pin(acc[m]);
  }

  __device__ __forceinline__ static uint32_t halved_pair(const float (&acc)[kAccumulators], int n,
                                                         int half) {
    const float* pair = acc + 4 * n + 2 * half;
    return Pair<__nv_bfloat16>::from_floats(0.5f * pair[0], 0.5f * pair[1]);
  }

  // 64 query blocks, this lane's from first_row: bf16 H or float Z, eight rows of 64 contiguous
  // bytes a store. H is not read here again: it should not push states out of L2.
  __device__ __forceinline__ void store(const float (&acc)[kAccumulators], const Bf16Tile& tile,
                                        int first_row) const {
    const Shape& shape = args.p.shape;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half;
      if (row >= shape.num_q_blocks) continue;
      const int64_t index = static_cast<int64_t>(tile.bh) * shape.num_q_blocks + row;
      if (tile.column0 < kColumnsH) {
        uint16_t* h = args.p.h + index * kColumnsH + tile.column0 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < TileShape::kColumns / 32; ++i) {
          uint32_t words[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) words[n] = halved_pair(acc, 4 * i + n, half);
          __stcs(reinterpret_cast<uint4*>(h + i * 32),
                 make_uint4(words[0], words[1], words[2], words[3]));
        }
      } else {
        float* z = args.p.z + index * (2 * kHeadDim) + tile.column0 - kColumnsH + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < TileShape::kColumns / 8; ++n) {
          const float* pair = acc + 4 * n + 2 * half;
          *reinterpret_cast<float2*>(z + 8 * n) = make_float2(0.5f * pair[0], 0.5f * pair[1]);
        }
      }
    }
  }

  // H where its channels are in order, through the warp's own shared memory: the copy engine stores
  // 16 rows, those past the end excepted, while the warp goes on.
  __device__ __forceinline__ void send_h(const float (&acc)[kAccumulators], const Bf16Tile& tile,
                                         int row0) const {
    const uint32_t out = smem_address(smem.out[4 * group + warp]);
    constexpr int kOutPanelBytes = 16 * 128;
    if (elect_one()) bulk_store_wait_read();  // of the tile before
    __syncwarp();
#pragma unroll
    for (int n = 0; n < TileShape::kColumns / 8; n += 2) {
      const uint32_t words[4] = {halved_pair(acc, n, 0), halved_pair(acc, n, 1),
                                 halved_pair(acc, n + 1, 0), halved_pair(acc, n + 1, 1)};
      const int row = 2 * (lane % 8) + lane / 8 % 2;
      stmatrix_x4(out + n / 8 * kOutPanelBytes + swizzle<128>(row, n % 8 + lane / 16), words);
    }
    fence_async_shared();
    __syncwarp();
    if (elect_one()) {
#pragma unroll
      for (int panel = 0; panel < TileShape::kPanels; ++panel) {
        tensor_store(&args.h[0], out + panel * kOutPanelBytes, 0, tile.column0 / kPanel + panel,
                     row0 + 16 * warp, tile.bh, evict_first());
      }
      bulk_store_commit();
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ void compute(int ticket, int row0) {
    float acc[kBlocks][kAccumulators] = {};
    multiply<kBlocks>(acc, row0);
    const Bf16Tile tile = bf16_tile<Variant>(args, ticket);
    if constexpr (Variant::kMakesStates) {
      // This thread has seen every load of the tile arrive: the states are read.
      if (threadIdx.x == 0) release_increment(tiles_done(args, tile.bh));
    }
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      const int first_row = tile.first_block * kRowBlock + row0;
      if constexpr (!Variant::kMakesStates) {
        static_assert(TileShape::kGroupBlocks == 1, "a warp has 16 rows");
        if (tile.column0 < kColumnsH) {
          send_h(acc[m], tile, first_row);
          continue;
        }
      }
      store(acc[m], tile, first_row + lane_row<kBlocks>() + 2 * m);
    }
  }

  __device__ __forceinline__ void skip() {
    for (int block = 0; block < args.p.shape.num_k_blocks; block += kStepBlocks) {
      wait_full();
      release(ring.stage);
      ring.advance();
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int kGroups = TileShape::kGroups;
    static_assert(TileShape::kGroupBlocks <= 2, "the cases below");
    for (;;) {
      wait_full();
      const int ticket = uniform(first_lane_load(smem.tile_ticket[ring.stage]));
      if (ticket < 0) break;
      const int tile_blocks = bf16_tile<Variant>(args, ticket).blocks;
      const int fewer = tile_blocks / kGroups, longer = tile_blocks % kGroups;
      const int row0 = (group * fewer + min(group, longer)) * kRowBlock;
      switch (fewer + (group < longer ? 1 : 0)) {
        case 2:
          if constexpr (TileShape::kGroupBlocks == 2) compute<2>(ticket, row0);
          break;
        case 1:
          compute<1>(ticket, row0);
          break;
        default:
          skip();
      }
    }
    if constexpr (!Variant::kMakesStates) {
      if (elect_one()) bulk_store_wait();
    }
  }
};

}  // namespace sla2
