// The complement with states in e4m3: [h | z]^T (1 - M)^T. 8-bit products want both operands along
// the key blocks, along which the states do not lie; as the A operand they pass through registers,
// where they can be turned, and B is made from the mask.
#pragma once

#include "linear_e4m3_state.cuh"
#include "tensor_map.h"

namespace sla2 {

// A complement tile: the two segments of a line by up to 128 query blocks, which are the N of its
// products: what T_m leaves, in the smallest number of equal tiles.
constexpr int kTileQueries = 128;
constexpr int kMaskWarps = 2;  // they take steps in turns
struct alignas(16) E4m3Tile {
  int bh, line, row0;  // bh negative: no more tiles; row0: first query block
};
// Row tiles vary fastest: the CTAs that share columns of the states run together.
template <int kHeadDim>
__device__ __forceinline__ E4m3Tile e4m3_tile(const LinearArgs& args, int ticket) {
  constexpr int kLines = E4m3State<kHeadDim>::kSegments / 2;
  const int row_tile = ticket % args.row_tiles, line = ticket / args.row_tiles;
  return {head_at(args, line / kLines), line % kLines, row_tile * args.tile_rows};
}
// Steps of a tile come in rounds, one for each mask buffer; what lies beyond T_n is zero.
constexpr int kRoundSteps = 4;
// How many the products may sum on their own, 512 key blocks: see `keep`. Longer sequences have
// tiles of one width, the widest that leaves registers for the sums that are kept.
constexpr int kSumRounds = 2;
constexpr int kLongTileRows = 120;
static_assert(kWordSteps % kRoundSteps == 0, "a head's last state counts for the rest of its word");
__device__ __forceinline__ int e4m3_rounds(const LinearArgs& args) {
  constexpr int kBlocks = kRoundSteps * kStepBlocks;
  return (args.p.shape.num_k_blocks + kBlocks - 1) / kBlocks;
}
// What the steps of a round use: all but the part of the ring of states is known to the compiler.
template <int kTileStages>
struct Round {
  static constexpr int kParts = kTileStages / kRoundSteps;
  static_assert(kTileStages % kRoundSteps == 0, "a stage belongs to one step of a round");
  int index = 0;
  __device__ __forceinline__ int first_stage() const { return index % kParts * kRoundSteps; }
  __device__ __forceinline__ int tile_parity() const { return index / kParts % 2; }
  __device__ __forceinline__ int mask_parity() const { return index % 2; }
};

// One thread: takes tickets, waits for states, loads one step of them and of the mask's words a
// stage. A step of the products takes some 500 cycles, and this one's instructions follow one
// another at five or more: what can be is done outside of the inner loop.
template <class Variant>
__device__ __forceinline__ void load_e4m3_tiles(const LinearArgs& args,
                                                typename Variant::Smem& smem) {
  using Smem = typename Variant::Smem;
  const int tickets = args.p.state == nullptr ? 0 : args.p.bh_count * args.head_tiles;
  const int step_bytes = Smem::kTileBytes + 2 * 4 * args.tile_rows;
  const int blocks = e4m3_rounds(args) * kRoundSteps * kStepBlocks;
  RingCursor<Smem::kTileStages> ring;
  int ready_bh = -1, ready = 0;  // the states of this head before this block are stored
  wait_predecessor();            // it makes the mask
  for (int ticket = take_tile_ticket(args); ticket < tickets;) {
    const int next_ticket = take_tile_ticket(args);  // on its way while this one's steps are loaded
    const E4m3Tile tile = e4m3_tile<Variant::kHeadDim>(args, ticket);
    if (tile.bh != ready_bh) {
      ready_bh = tile.bh;
      ready = 0;
    }
    const int slot = tile.bh % args.p.state_slots;
    for (int block = 0; block < blocks;) {
      if (block >= ready) ready = wait_states(args, tile.bh, block);
      const int end = min(ready, blocks);
#pragma unroll 1
      for (; block < end; block += kStepBlocks) {
        const uint32_t full = smem_address(&smem.tile_full[ring.stage]);
        mbarrier_wait(smem_address(&smem.tile_empty[ring.stage]), ring.parity ^ 1);
        smem.tile_of[ring.stage] = tile;
        mbarrier_expect(full, step_bytes);
        tensor_load(smem_address(smem.tile[ring.stage]), &args.state, tile.line * 128, block, slot,
                    full);
        tensor_load(smem_address(smem.words[ring.stage]), &args.mask, tile.row0, block / 32,
                    tile.bh, full);
        ring.advance();
      }
    }
    ticket = next_ticket;
  }
  // An end for each mask warp; the products' warps read the first.
#pragma unroll 1
  for (int i = 0; i < kMaskWarps; ++i) {
    mbarrier_wait(smem_address(&smem.tile_empty[ring.stage]), ring.parity ^ 1);
    smem.tile_of[ring.stage].bh = -1;
    mbarrier_arrive(smem_address(&smem.tile_full[ring.stage]));
    ring.advance();
  }
}

// One warp, for every kMaskWarps-th step: the mask's words as B operands, 64 bytes a query block. A
// set bit becomes 2.0, a single bit in e4m3; the results are halved. Byte 4 i + b of 32 is bit
// i + 8 b of the word. kChunks of 32 query blocks hold those of a tile.
template <class Variant, int kChunks>
__device__ __forceinline__ void expand_masks(const LinearArgs& args, typename Variant::Smem& smem,
                                             int first) {
  using Smem = typename Variant::Smem;
  const int lane = threadIdx.x % 32;
  int rounds = e4m3_rounds(args), tile_rows = args.tile_rows;
  pin(rounds);  // else read anew in every step
  pin(tile_rows);
  Round<Smem::kTileStages> round;
  for (;;) {
    const int stage = round.first_stage() + first;
    mbarrier_wait(smem_address(&smem.tile_full[stage]), round.tile_parity());
    const int bh = uniform(first_lane_load(smem.tile_of[stage].bh));
    if (bh < 0) return;
#pragma unroll 1
    for (int i = 0; i < rounds; ++i, ++round.index) {
      const int stage0 = round.first_stage() + first;
#pragma unroll
      for (int step = 0; step < kRoundSteps; step += kMaskWarps) {
        const uint32_t* words = smem.words[stage0 + step] + lane;
        char* mask = smem.mask[first + step];
        mbarrier_wait(smem_address(&smem.tile_full[stage0 + step]), round.tile_parity());
        uint32_t bits[kChunks][2];
#pragma unroll
        for (int r = 0; r < kChunks; ++r) {
          bits[r][0] = words[32 * r];
          bits[r][1] = words[tile_rows + 32 * r];
        }
        mbarrier_wait(smem_address(&smem.mask_empty[first + step]), round.mask_parity() ^ 1);
#pragma unroll
        for (int r = 0; r < kChunks; ++r) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t bytes[8];
#pragma unroll
            for (int b = 0; b < 8; ++b) {
              bytes[b] = (b < 7 ? bits[r][i] << (6 - b) : bits[r][i] >> 1) & 0x40404040u;
            }
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              *reinterpret_cast<uint4*>(mask + swizzle<64>(32 * r + lane, 2 * i + c)) =
                  make_uint4(bytes[4 * c], bytes[4 * c + 1], bytes[4 * c + 2], bytes[4 * c + 3]);
            }
          }
        }
        fence_async_shared();
        __syncwarp();
        if (lane == 0) {
          mbarrier_arrive(smem_address(&smem.mask_full[first + step]));
          mbarrier_arrive(smem_address(&smem.tile_empty[stage0 + step]));
        }
      }
    }
    // This warp has seen its loads of the tile arrive: these states are read.
    if (lane == 0) release_increment(tiles_done(args, bh));
  }
}

// One warpgroup of the complement stream: the columns of one segment of each tile. The products of
// a step are issued before those of the step before are waited for: the tensor cores always have
// the next ones.
template <class Variant>
struct E4m3ComplementWorker {
  using Smem = typename Variant::Smem;
  static constexpr int kHeadDim = Variant::kHeadDim;
  using State = E4m3State<kHeadDim>;
  using Fragments = uint32_t[2][4];

  const LinearArgs& args;
  Smem& smem;
  const int group, warp, lane;
  Round<Smem::kTileStages> round;

  __device__ __forceinline__ E4m3ComplementWorker(const LinearArgs& args, Smem& smem, int group)
      : args(args), smem(smem), group(group), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void sync() const {
    named_barrier(1 + kStateGroups + group, kWarpgroup);
  }

  // Where a stage has what this lane reads for the warp's 16 columns.
  __device__ __forceinline__ int fragment_offset(int line) const {
    const int chunk = (4 * group + warp) ^ (line & 7);
    return lane * 128 + ((chunk ^ (lane & 7)) << 4);
  }
  // These columns of 64 key blocks as A operands. Key blocks 8 i .. 8 i + 7 of each 32 are matrix
  // i; a pair of bytes is two columns, which become rows lane / 4 and lane / 4 + 8 of A, the bytes
  // in the order of the mask's bits.
  __device__ __forceinline__ void load_fragments(Fragments& a, uint32_t rows) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t pairs[4];
      ldmatrix_x4_trans(pairs, rows + 32 * k * 128);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[k][2 * i] = __byte_perm(pairs[i], pairs[i + 2], 0x6240);
        a[k][2 * i + 1] = __byte_perm(pairs[i], pairs[i + 2], 0x7351);
      }
      pin(a[k]);  // ready before the products' fence
    }
  }

  __device__ __forceinline__ void release_mask(int buffer) const {
    if (lane == 0) mbarrier_arrive(smem_address(&smem.mask_empty[buffer]));
  }

  // Step kStep of a round. Query blocks 0 .. 63 of the tile into `low`, the rest into `high`: two
  // products, as one of 128 does not fit the registers that a thread of this kernel starts with.
  template <int kStep, int kHigh>
  __device__ __forceinline__ void step(float (&low)[32], float (&high)[kHigh], Fragments& a,
                                       int offset, bool first) {
    const int stage = round.first_stage() + kStep;
    mbarrier_wait(smem_address(&smem.tile_full[stage]), round.tile_parity());
    load_fragments(a, smem_address(smem.tile[stage]) + offset);
    mbarrier_wait(smem_address(&smem.mask_full[kStep]), round.mask_parity());
    const uint64_t b = wgmma_descriptor(smem_address(smem.mask[kStep]), 0, 512, Swizzle::k64);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      wgmma_e4m3(low, a[k], advance(b, 32 * k), !first || k > 0);
      if constexpr (kHigh > 1) {
        wgmma_e4m3(high, a[k], advance(b, 64 * 64 + 32 * k), !first || k > 0);
      }
    }
    wgmma_commit();
    // Only now: ordered before the products, the fragments were still on their way from shared
    // memory at times when the next states came in (seen as results that differed from run to run).
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&smem.tile_empty[stage]));
    wgmma_wait<1>();
    if (kStep > 0 || !first) release_mask((kStep + kRoundSteps - 1) % kRoundSteps);
  }

  // Hopper's e4m3 products accumulate in about 14 bits and cut off the rest: once a sum is 2^10
  // times its terms, their last bits are lost, always downwards. So every kSumRounds rounds the
  // accumulators leave what bf16 can hold of them in `kept` and go on from the rest, which is
  // small. Exact but for float32's rounding.
  __device__ __forceinline__ static void move_to(uint32_t& kept, float& x, float& y) {
    add_kept(kept, x, y);
    kept = Pair<__nv_bfloat16>::from_floats(x, y);
    const float2 moved = Pair<__nv_bfloat16>::to_float2(kept);
    x -= moved.x;
    y -= moved.y;
  }
  __device__ __forceinline__ static void add_kept(uint32_t kept, float& x, float& y) {
    const float2 sum = Pair<__nv_bfloat16>::to_float2(kept);
    x += sum.x;
    y += sum.y;
  }
  // Where this thread keeps pair i of `low`: what H leaves through is free between two tiles' ends.
  __device__ __forceinline__ uint32_t& kept_low(int i) const {
    return reinterpret_cast<uint32_t*>(smem.out[group])[i * kWarpgroup + threadIdx.x % kWarpgroup];
  }
  template <int kHigh>
  __device__ __forceinline__ void keep(float (&low)[32], float (&high)[kHigh],
                                       uint32_t (&kept_high)[kHigh / 2], bool first) const {
    wgmma_wait<0>();
    pin(low);
    pin(high);
    if (first) {
      if (threadIdx.x % kWarpgroup == 0) bulk_store_wait_read();  // of the tile before
      sync();
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      uint32_t kept = first ? 0 : kept_low(i);
      move_to(kept, low[2 * i], low[2 * i + 1]);
      kept_low(i) = kept;
    }
#pragma unroll
    for (int i = 0; i < kHigh / 2; ++i) move_to(kept_high[i], high[2 * i], high[2 * i + 1]);
  }
  template <int kHigh>
  __device__ __forceinline__ void add_all_kept(float (&low)[32], float (&high)[kHigh],
                                               const uint32_t (&kept_high)[kHigh / 2]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) add_kept(kept_low(i), low[2 * i], low[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < kHigh / 2; ++i) add_kept(kept_high[i], high[2 * i], high[2 * i + 1]);
  }

  // Of the two columns of a segment that this lane has.
  __device__ __forceinline__ int first_column() const {
    return 16 * warp + lane / 8 * 2 + lane / 4 % 2 * 8;
  }
  // V's scale for them; for parts of Z any.
  __device__ __forceinline__ float2 load_v_scale(const E4m3Tile& tile) const {
    const int panel = (2 * tile.line + group) / kHeadDim;
    return *reinterpret_cast<const float2*>(args.p.v_scale + int64_t{1} * tile.bh * 2 * kHeadDim +
                                            panel * kPanel + first_column());
  }

  // H of 2 kCount query blocks from row0 on, by way of shared memory: whole lines to memory.
  template <int kCount>
  __device__ __forceinline__ void store_h(const float (&acc)[kCount], const E4m3Tile& tile,
                                          int part, float2 v_scale) const {
    const int segment = 2 * tile.line + group;
    const int panel = segment / kHeadDim, feature = segment % kHeadDim;
    const float scale[2] = {0.5f * State::kUnit * v_scale.x, 0.5f * State::kUnit * v_scale.y};
    const bool leader = threadIdx.x % kWarpgroup == 0;
    if (leader) bulk_store_wait_read();  // of the store before
    sync();
    const uint32_t out = smem_address(smem.out[group]);
    // Row 8 i + 2 t + e, column / 8 as its chunk.
    const int row = lane % 4 * 2, column = first_column();
    uint32_t address = out + row * 128 + ((column / 8 ^ row) << 4) + column % 8 * 2;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      store_shared(address + i * 1024, Pair<__nv_bfloat16>::from_floats(acc[4 * i] * scale[0],
                                                                        acc[4 * i + 2] * scale[1]));
      store_shared(
          (address ^ 16) + 128 + i * 1024,
          Pair<__nv_bfloat16>::from_floats(acc[4 * i + 1] * scale[0], acc[4 * i + 3] * scale[1]));
    }
    fence_async_shared();
    sync();
    if (leader) {
      tensor_store(&args.h[part], out, 0, panel * kHeadDim + h_row(feature), tile.row0 + part * 64,
                   tile.bh, evict_first());
      bulk_store_commit();
    }
  }

  // Parts of Z.
  template <int kCount>
  __device__ __forceinline__ void store_z(const float (&acc)[kCount], const E4m3Tile& tile,
                                          int row0) const {
    const int index = 2 * tile.line + group - State::kFirstPart;
    const int part = index / State::kPanels, panel = index % State::kPanels;
    // z was multiplied by 4, its parts by 16 to the number of the part.
    const float scale = 0.125f / static_cast<float>(1 << (4 * part));
    const int rows = min(tile.row0 + args.tile_rows, args.p.shape.num_q_blocks);
    float* z =
        args.p.z +
        (int64_t{1} * tile.bh * args.p.shape.num_q_blocks * State::kParts + part) * kHeadDim +
        panel * kPanel + first_column();
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = row0 + lane % 4 * 2 + 8 * i + e;
        if (row < rows) {
          *reinterpret_cast<float2*>(z + int64_t{1} * row * State::kParts * kHeadDim) =
              make_float2(acc[4 * i + e] * scale, acc[4 * i + 2 + e] * scale);
        }
      }
    }
  }

  // kHigh: accumulators of the query blocks from 64 on, half as many as there are; 1 for none.
  template <int kHigh>
  __device__ __forceinline__ void run_tiles() {
    int rounds = e4m3_rounds(args);
    pin(rounds);
    for (;;) {
      const int stage = round.first_stage();
      mbarrier_wait(smem_address(&smem.tile_full[stage]), round.tile_parity());
      const E4m3Tile next = first_lane_load(smem.tile_of[stage]);
      const E4m3Tile tile = {uniform(next.bh), uniform(next.line), uniform(next.row0)};
      if (tile.bh < 0) break;
      float low[32], high[kHigh];
      [[maybe_unused]] uint32_t kept_high[kHigh > 1 ? kHigh / 2 : 1] = {};
      Fragments even, odd;
      int offset = fragment_offset(tile.line);
      pin(offset);  // else made anew in every step
      int left = rounds;
      bool first = true;
#pragma unroll 1
      for (;;) {
#pragma unroll 1
        for (int i = min(left, kSumRounds); i > 0; --i, ++round.index) {
          step<0>(low, high, even, offset, first);
          step<1>(low, high, odd, offset, false);
          step<2>(low, high, even, offset, false);
          step<3>(low, high, odd, offset, false);
          first = false;
        }
        left -= kSumRounds;
        if (left <= 0) break;
        if constexpr (Variant::kLong) keep(low, high, kept_high, left == rounds - kSumRounds);
      }
      const float2 v_scale = load_v_scale(tile);  // on its way while the last products run
      wgmma_wait<0>();
      release_mask(kRoundSteps - 1);
      pin(low);
      pin(high);
      if constexpr (Variant::kLong) add_all_kept(low, high, kept_high);
      if (2 * tile.line < State::kFirstPart) {
        store_h(low, tile, 0, v_scale);
        if constexpr (kHigh > 1) store_h(high, tile, 1, v_scale);
      } else {
        store_z(low, tile, tile.row0);
        if constexpr (kHigh > 1) store_z(high, tile, tile.row0 + 64);
      }
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_store_wait();
  }

  __device__ __forceinline__ void run() {
    if constexpr (Variant::kLong) {
      run_tiles<kLongTileRows / 2 - 32>();
    } else {
      switch (args.tile_rows) {
        case 64:
          return run_tiles<1>();
        case 96:
          return run_tiles<16>();
        case 120:
          return run_tiles<28>();
        default:
          return run_tiles<32>();
      }
    }
  }
};

}  // namespace sla2
