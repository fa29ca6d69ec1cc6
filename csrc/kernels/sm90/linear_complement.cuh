// The complement stream: H = (1 - M) h, Z = (1 - M) z. The A operand is made in registers from the
// bit mask, B are the states as they lie.
#pragma once

#include "../common/convert.cuh"
#include "linear.cuh"

namespace sla2 {

// One warp: takes tickets, waits for the head's states, loads 64 key blocks of them and their mask
// words a stage. Its first lane does the work; the rest keep the warp's values uniform.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void load_tiles(const LinearArgs& args,
                                           LinearSmem<Element, kHeadDim>& smem) {
  using Smem = LinearSmem<Element, kHeadDim>;
  const Shape& shape = args.p.shape;
  const int head_tiles = state_elements(kHeadDim) / kTileColumns * args.row_tiles;
  const int tickets = args.p.state == nullptr ? 0 : shape.num_bh * head_tiles;
  const bool leader = threadIdx.x % 32 == 0;
  RingCursor<Smem::kTileStages> ring;
  int ready_bh = -1;
  for (;;) {
    const int ticket = uniform(leader ? take_tile_ticket(args) : 0);
    if (ticket >= tickets) break;
    const ComplementTile tile = complement_tile(args, kHeadDim, ticket);
    if (tile.bh != ready_bh) {
      wait_counter(states_ready(args, tile.bh), shape.num_k_blocks);
      fence_async();  // ordinary stores there, tensor copies here
      ready_bh = tile.bh;
    }
    const uint32_t* mask = args.p.mask + tile.bh * args.mask_head + tile.first_block * kRowBlock;
    const int slot = tile.bh % kStateSlots, mask_bytes = tile.blocks * kRowBlock * 4;
#pragma unroll 1
    for (int block = 0; block < shape.num_k_blocks; block += kBlockK) {
      auto& stage = smem.tile[ring.stage];
      const uint32_t full = smem_address(&smem.tile_full[ring.stage]);
      if (leader) {
        mbarrier_wait(smem_address(&smem.tile_empty[ring.stage]), ring.parity ^ 1);
        if (block == 0) smem.tile_ticket[ring.stage] = ticket;
        mbarrier_expect(full, kPanelBytes + kStepWords * mask_bytes);
        tensor_load(smem_address(stage.state), &args.state, tile.column0, block, slot, full);
        bulk_load(smem_address(stage.mask[0]), mask, mask_bytes, full);
        bulk_load(smem_address(stage.mask[1]), mask + args.mask_pitch, mask_bytes, full);
      }
      __syncwarp();
      mask += kStepWords * args.mask_pitch;
      ring.advance();
    }
  }
  if (leader) {
    mbarrier_wait(smem_address(&smem.tile_empty[ring.stage]), ring.parity ^ 1);
    smem.tile_ticket[ring.stage] = -1;
    mbarrier_arrive(smem_address(&smem.tile_full[ring.stage]));
  }
}

// One warpgroup of the complement stream.
template <typename Element, int kHeadDim>
struct ComplementWorker {
  using Smem = LinearSmem<Element, kHeadDim>;
  static constexpr int kAccumulators = kRowBlock * kTileColumns / kWarpgroup;

  const LinearArgs& args;
  Smem& smem;
  const int group, warp, lane;
  RingCursor<Smem::kTileStages> ring;

  __device__ __forceinline__ ComplementWorker(const LinearArgs& args, Smem& smem, int group)
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
    for (int next = kBlockK;; next += kBlockK) {
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
  __device__ __forceinline__ void store(const float (&acc)[kAccumulators],
                                        const ComplementTile& tile, int row0) const {
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
    const ComplementTile tile = complement_tile(args, kHeadDim, ticket);
    // This thread has seen every load of the tile arrive: the states are read.
    if (threadIdx.x == 0) release_increment(tiles_done(args, tile.bh));
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      store(acc[m], tile, (tile.first_block + m) * kRowBlock + row0);
    }
  }

  __device__ __forceinline__ void skip() {
    for (int block = 0; block < args.p.shape.num_k_blocks; block += kBlockK) {
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
      const int tile_blocks = complement_tile(args, kHeadDim, ticket).blocks;
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

}  // namespace sla2
