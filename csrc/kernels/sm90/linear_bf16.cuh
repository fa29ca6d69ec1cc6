// The linear branch with states in bf16 ("none"). The complement is H = (1 - M) h, Z = (1 - M) z as
// it stands: its A operand is made in registers from the bit mask, B are the states as they lie.
#pragma once

#include "../common/convert.cuh"
#include "linear_state.cuh"
#include "tensor_map.h"

namespace sla2 {

// A complement tile: up to 256 query blocks, so that L2 delivers the states of 591 three times
// (tiles of 128 rows: five times, 8 GB for 40 heads), by 64 columns, which is what the accumulators
// leave. A warpgroup has up to two blocks of 64 rows.
constexpr int kRowBlock = 64, kGroupBlocks = 2;
constexpr int kTileBlocks = kComplementGroups * kGroupBlocks;
constexpr int kTileColumns = kPanel;
constexpr int kStepWords = kStepBlocks / 32;  // of the mask

// Columns of a state: h is [channel / 64][h_row][64 channels], then z as a bf16 pair (high [D], low
// [D]). Of each 32, channel 8 n + 2 t + e lies at 8 t + 2 n + e. Lane t of a quad, which holds the
// pairs n in its accumulators, so has 16 contiguous bytes where h is made, and, as the order is its
// own inverse, again where H is.

struct Bf16Tile {
  int bh, column0;
  int first_block, blocks;  // row blocks
};
// Row tiles vary fastest: the CTAs that share columns of the states run together.
__device__ __forceinline__ Bf16Tile bf16_tile(const LinearArgs& args, int head_dim, int ticket) {
  const int columns = state_elements(head_dim) / kTileColumns;
  const int row_tile = ticket % args.row_tiles, column_tile = ticket / args.row_tiles;
  Bf16Tile tile;
  tile.bh = head_at(args, column_tile / columns);
  tile.column0 = column_tile % columns * kTileColumns;
  tile.first_block = row_tile * kTileBlocks;
  tile.blocks = min(kTileBlocks, args.row_blocks - tile.first_block);
  return tile;
}

// One warpgroup of the state stream.
template <class Variant>
struct Bf16StateWorker : StateWorker<Variant> {
  using Base = StateWorker<Variant>;
  using Base::args, Base::smem, Base::group, Base::warp, Base::lane, Base::task, Base::stage_index;
  using Base::Base;
  using Base::kHeadDim, Base::kPanels;
  using typename Base::Smem;
  using typename Base::Stage;

  __device__ __forceinline__ void store_h(const float (&acc)[32], uint16_t* h, int feature0) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = feature0 + 16 * warp + lane / 4 + 8 * half;
#pragma unroll
      for (int i = 0; i < kPanel / 32; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float* pair = acc + 4 * (4 * i + n) + 2 * half;
          words[n] = Pair<__nv_bfloat16>::from_floats(pair[0], pair[1]);
        }
        // __stwb: an assignment came out as four 4-byte stores once, and L2 bound the kernel.
        __stwb(reinterpret_cast<uint4*>(h + h_row(feature) * kPanel + i * 32 + lane % 4 * 8),
               make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }

  // Every column of the product with ones is z: the first lane of a quad stores it.
  __device__ __forceinline__ void store_z(const float (&acc)[4], uint16_t* z, int feature0) const {
    if (lane % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = feature0 + 16 * warp + lane / 4 + 8 * half;
      const float sum = acc[2 * half];
      const __nv_bfloat16 high = __float2bfloat16_rn(sum);
      const __nv_bfloat16 low = __float2bfloat16_rn(sum - __bfloat162float(high));
      z[feature] = __bfloat16_as_ushort(high);
      z[kHeadDim + feature] = __bfloat16_as_ushort(low);
    }
  }

  __device__ __forceinline__ uint16_t* state() const {
    const int64_t index = int64_t{1} * task.slot * args.p.shape.num_k_blocks + task.block;
    return static_cast<uint16_t*>(args.p.state) + index * state_elements(kHeadDim);
  }

  // h = phi^T V and z = phi^T 1, 64 features by 64 channels at a time.
  __device__ __forceinline__ void states(Stage& stage) const {
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel) {
      if constexpr (Smem::kSplitValues) {
        if (panel > 0) this->sync();  // every warp's products with the low part before are over
        this->split_values(stage.value[panel], smem.value_low.panel[group]);
        fence_async_shared();
        this->sync();
      }
#pragma unroll 1
      for (int m = 0; m < kPanels; ++m) {
        const uint32_t phi = uniform(smem_address(stage.key[m]));
        float acc[32], z[4];
        wgmma_fence();
        this->product(acc, phi, uniform(smem_address(stage.value[panel])), 2048, false);
        if constexpr (Smem::kSplitValues) {
          this->product(acc, phi, uniform(smem_address(smem.value_low.panel[group])), 2048, true);
        }
        this->product(z, phi, smem_address(smem.ones), 0, false);
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        pin(z);
        store_h(acc, state() + panel * kPanel * kHeadDim, m * kPanel);
        if (panel == 0) store_z(z, state() + kHeadDim * kHeadDim, m * kPanel);
      }
    }
  }

  __device__ __forceinline__ void run() {
    while (this->next_phi()) {
      states(smem.state[stage_index]);
      this->made();
    }
  }
};

// One thread: takes tickets, waits for states, loads one step of them and their mask words a stage.
template <class Variant>
__device__ __forceinline__ void load_bf16_tiles(const LinearArgs& args,
                                                typename Variant::Smem& smem) {
  using Smem = typename Variant::Smem;
  constexpr int kHeadDim = Variant::kHeadDim;
  const Shape& shape = args.p.shape;
  const int tickets = shape.num_bh * args.head_tiles;
  RingCursor<Smem::kTileStages> ring;
  int ready_bh = -1, ready = 0;  // the states of this head before this block are stored
  wait_predecessor();            // it makes the mask
  for (int ticket = take_tile_ticket(args); ticket < tickets;) {
    const int next_ticket = take_tile_ticket(args);  // on its way while this one's steps are loaded
    const Bf16Tile tile = bf16_tile(args, kHeadDim, ticket);
    if (tile.bh != ready_bh) {
      ready_bh = tile.bh;
      ready = 0;
    }
    const int slot = tile.bh % args.p.state_slots, row0 = tile.first_block * kRowBlock;
    for (int block = 0; block < shape.num_k_blocks;) {
      if (block >= ready) ready = wait_states(args, tile.bh, block);
      const int end = min(ready, shape.num_k_blocks);
#pragma unroll 1
      for (; block < end; block += kStepBlocks) {
        auto& stage = smem.tile[ring.stage];
        const uint32_t full = smem_address(&smem.tile_full[ring.stage]);
        mbarrier_wait(smem_address(&smem.tile_empty[ring.stage]), ring.parity ^ 1);
        smem.tile_ticket[ring.stage] = ticket;
        mbarrier_expect(full, sizeof(stage));
        tensor_load(smem_address(stage.state), &args.state, tile.column0, block, slot, full);
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
  static constexpr int kHeadDim = Variant::kHeadDim;
  static constexpr int kAccumulators = kRowBlock * kTileColumns / kWarpgroup;

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

  // acc = 2 (1 - M) [h | z] of kBlocks row blocks from row `row0` of the tile. A set bit becomes
  // 2.0, whose bf16 has a single bit; the store halves. The A operand of each product is made while
  // the one before runs: waiting first left the tensor cores idle for as long as they worked.
  template <int kBlocks>
  __device__ __forceinline__ void multiply(float (&acc)[kBlocks][kAccumulators], int row0) {
    uint32_t bits[kBlocks][2];  // this lane's rows, shifted to its first pair of columns
    const auto load_bits = [&](int word) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + m * kRowBlock + 16 * warp + lane / 4 + 8 * half;
          bits[m][half] = smem.tile[ring.stage].mask[word][row] >> (lane % 4);
        }
      }
    };
    uint32_t a[kStepWords][2][kBlocks][4];  // for each word two k16 steps
    const auto make_operands = [&](uint32_t (&operands)[2][kBlocks][4], int word) {
      load_bits(word);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // columns 16 k + 8 (i / 2) + 2 (lane % 4) + {0, 1} of the word
            operands[k][m][i] = (bits[m][i % 2] << (14 - 8 * k - 4 * (i / 2))) & 0x40004000u;
          }
          pin(operands[k][m]);
        }
      }
    };
    const auto b_tile = [&] { return uniform(smem_address(smem.tile[ring.stage].state)); };
    uint32_t state = b_tile();
    make_operands(a[0], 0);
    for (int next = kStepBlocks;; next += kStepBlocks) {
      const bool more = next < args.p.shape.num_k_blocks;
      const int stage = ring.stage;
#pragma unroll
      for (int word = 0; word < kStepWords; ++word) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint64_t b =
              wgmma_descriptor(state + (2 * word + k) * 2048, kPanelBytes, 1024, Swizzle::k128);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            Wgmma16<__nv_bfloat16, false, true>::mma(acc[m], a[word][k][m], b, 1);
          }
        }
        wgmma_commit();
        if (word == 0) {
          make_operands(a[1], 1);
        } else {
          ring.advance();
          if (more) {
            wait_full();
            state = b_tile();
            make_operands(a[0], 0);
          }
        }
        wgmma_wait<0>();
      }
      release(stage);
      if (!more) break;
    }
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) pin(acc[m]);
  }

  // 64 query blocks: bf16 H or float Z, eight rows of 64 contiguous bytes a store. H is not read
  // here again: it should not push states out of L2.
  __device__ __forceinline__ void store(const float (&acc)[kAccumulators], const Bf16Tile& tile,
                                        int row0) const {
    const Shape& shape = args.p.shape;
    constexpr int kColumnsH = kHeadDim * kHeadDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * warp + lane / 4 + 8 * half;
      if (row >= shape.num_q_blocks) continue;
      const int64_t index = static_cast<int64_t>(tile.bh) * shape.num_q_blocks + row;
      if (tile.column0 < kColumnsH) {
        uint16_t* h = args.p.h + index * kColumnsH + tile.column0 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < kTileColumns / 32; ++i) {
          uint32_t words[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float* pair = acc + 4 * (4 * i + n) + 2 * half;
            words[n] = Pair<__nv_bfloat16>::from_floats(0.5f * pair[0], 0.5f * pair[1]);
          }
          __stcs(reinterpret_cast<uint4*>(h + i * 32),
                 make_uint4(words[0], words[1], words[2], words[3]));
        }
      } else {
        float* z = args.p.z + index * (2 * kHeadDim) + tile.column0 - kColumnsH + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kTileColumns / 8; ++n) {
          const float* pair = acc + 4 * n + 2 * half;
          *reinterpret_cast<float2*>(z + 8 * n) = make_float2(0.5f * pair[0], 0.5f * pair[1]);
        }
      }
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ void compute(int ticket, int row0) {
    float acc[kBlocks][kAccumulators] = {};
    multiply<kBlocks>(acc, row0);
    const Bf16Tile tile = bf16_tile(args, kHeadDim, ticket);
    // This thread has seen every load of the tile arrive: the states are read.
    if (threadIdx.x == 0) release_increment(tiles_done(args, tile.bh));
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      store(acc[m], tile, (tile.first_block + m) * kRowBlock + row0);
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
    static_assert(kGroupBlocks == 2, "the cases below");
    for (;;) {
      wait_full();
      const int ticket = uniform(smem.tile_ticket[ring.stage]);
      if (ticket < 0) return;
      const int tile_blocks = bf16_tile(args, kHeadDim, ticket).blocks;
      const int fewer = tile_blocks / kComplementGroups, longer = tile_blocks % kComplementGroups;
      const int row0 = (group * fewer + min(group, longer)) * kRowBlock;
      switch (fewer + (group < longer ? 1 : 0)) {
        case 2:
          compute<2>(ticket, row0);
          break;
        case 1:
          compute<1>(ticket, row0);
          break;
        default:
          skip();
      }
    }
  }
};

template <typename Element_, int kHeadDim_>
struct LinearBf16 {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kQuant = SLA2_QUANT_NONE;
  using ComplementWorker = Bf16ComplementWorker<LinearBf16>;
  using StateWorker = Bf16StateWorker<LinearBf16>;
  static constexpr int kComplementRegisters = 136, kStateRegisters = 80, kCopyRegisters = 48;

  struct Smem : StateSmem<Element, kHeadDim, 4> {
    static constexpr int kTileStages = std::is_same_v<Element, __half> && kHeadDim == 128 ? 6 : 8;
    struct TileStage {
      char state[kPanelBytes];
      uint32_t mask[kStepWords][kTileBlocks * kRowBlock];
    };
    alignas(1024) TileStage tile[kTileStages];
    int tile_ticket[kTileStages];  // negative: no more tiles
    alignas(8) uint64_t tile_full[kTileStages];
    uint64_t tile_empty[kTileStages];

    __device__ __forceinline__ void init() {
      StateSmem<Element, kHeadDim, 4>::init();
      if (threadIdx.x == 0) {
        for (int i = 0; i < kTileStages; ++i) {
          mbarrier_init(smem_address(&tile_full[i]), 1);
          mbarrier_init(smem_address(&tile_empty[i]), kComplementGroups * kWarpgroup / 32);
        }
      }
    }
  };

  static __device__ __forceinline__ void copies(const LinearArgs& args, Smem& smem, int warp) {
    switch (warp) {
      case 0:
        if (elect_one()) load_bf16_tiles<LinearBf16>(args, smem);
        return;
      case 1:
        if (elect_one()) StateServer<LinearBf16>(args, smem).run();
        return;
    }
  }
  // The workers have stored it.
  static __device__ __forceinline__ void store_state(const LinearArgs&, Smem&, int, StateTask) {}

  static cudaError_t encode(LinearArgs& args) {
    const LinearParams& p = args.p;
    args.row_blocks = (p.shape.num_q_blocks + kRowBlock - 1) / kRowBlock;
    args.row_tiles = (args.row_blocks + kTileBlocks - 1) / kTileBlocks;
    args.head_tiles = args.row_tiles * (state_elements(kHeadDim) / kTileColumns);
    args.head_reads = args.head_tiles;
    constexpr uint64_t kColumns = state_elements(kHeadDim);
    const uint64_t blocks = p.shape.num_k_blocks, slots = p.state_slots;
    const cudaError_t status =
        encode_tensor_map<3>(args.state, p.state, {kColumns, blocks, slots},
                             {kColumns * 2, blocks * kColumns * 2}, {kPanel, kStepBlocks, 1});
    if (status != cudaSuccess) return status;
    return encode_mask(args.mask, p, kTileBlocks * kRowBlock);
  }
};

}  // namespace sla2
