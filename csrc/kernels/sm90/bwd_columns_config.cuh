// Shared memory and tensor maps of the Hopper backward kernel by key block.
#pragma once

#include "../common/layout.cuh"
#include "../common/params.h"
#include "async.cuh"

namespace sla2 {

// Maps of the inputs and of dK, dV; shift and delta: the row statistics, unset without the sparse
// branch; dh: the states' gradients, unset without the linear branch.
struct BwdColumnMaps {
  CUtensorMap q, grad_out, k, v, shift, delta, dh, dk, dv;
};

// What one CTA works on: a key block and its list of query blocks, or a part of that.
struct ColumnItem {
  int64_t index;        // of the key block among all heads'
  int64_t local_index;  // among those of the group
  int local_bh, head, batch, column;
  int part, parts, slot;
  int begin, end;  // in the list

  __device__ __forceinline__ void set_block(const AttnBwdParams& p, uint32_t item) {
    local_bh = blockIdx.x / p.columns.num_items;
    const int bh = p.bh_begin + local_bh;
    head = bh % p.shape.num_heads;
    batch = bh / p.shape.num_heads;
    column = item & 0xffffu;
    part = item >> 16;
    index = static_cast<int64_t>(bh) * p.shape.num_k_blocks + column;
    local_index = static_cast<int64_t>(local_bh) * p.shape.num_k_blocks + column;
  }
  __device__ __forceinline__ void set_range(const AttnBwdParams& p) {
    const int count = p.branch == SLA2_BRANCH_LINEAR ? 0 : p.columns.counts[index];
    slot = p.columns.slots[index];
    parts = slot < 0 ? 1 : (count + p.columns.split_blocks - 1) / p.columns.split_blocks;
    begin = count * part / parts;
    end = count * (part + 1) / parts;
  }
};

template <typename Element_, int kHeadDim_>
struct BwdColumnSm90 {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kPanels = kHeadDim / 64;  // of 64 channels, rows of 128 bytes

  // One warpgroup computes, a thread of another copies. dK and dV (128 registers), S^T and dP^T
  // (64) and P^T as an operand (16) want 208 registers of a lane: two CTAs fill an SM.
  static constexpr int kComputeThreads = 128, kThreads = 256;
  static constexpr int kComputeRegisters = 232, kCopyRegisters = 24;
  static_assert(kComputeRegisters + kCopyRegisters == 65536 / 2 / kComputeThreads, "two CTAs");
  static constexpr int kComputeBarrier = 1;  // a named barrier of the computing warps

  static constexpr int kStepQueries = 64;
  static constexpr int kPanelBytes = 64 * 128;
  static constexpr int kTileBytes = kPanels * kPanelBytes;  // 64 rows of K, V, Q or dO
  static constexpr int kAccumulators = kBlockK * kHeadDim / kComputeThreads;
  // Steps in the ring. A tile's place is free a step before its next content is wanted: 2200 cycles
  // with two CTAs at work.
  static constexpr int kStages = 2;

  // dh follows the last step through the ring, a panel a tile.
  static_assert(kHeadDim * 128 == kTileBytes, "a panel of dh fits a tile");
  enum Tile { kQuery, kGrad, kTilesPerStage };

  struct Smem {
    alignas(1024) char key[kTileBytes];  // dV leaves from here
    char value[kTileBytes];              // and dK from here
    char ring[kStages][kTilesPerStage][kTileBytes];
    alignas(128) float shift[kStages][kStepQueries], delta[kStages][kStepQueries];
    alignas(16) float k_mean[kHeadDim], dz[2][kHeadDim];
    float column_sums[kComputeThreads / 32][kHeadDim];
    ColumnItem item;     // here it costs no registers
    uint64_t keys_full;  // K, V and item
    uint64_t full[kStages][kTilesPerStage], empty[kStages][kTilesPerStage];
    bool is_last;  // part to arrive of a cut column
  };
  static_assert(sizeof(Smem) <= 113 * 1024, "two CTAs an SM");
};

// A position in the ring.
template <int kStages>
struct StepCursor {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace sla2
