// Shared memory and tensor maps of the persistent attention kernel.
#pragma once

#include "../common/params.h"
#include "row_tiles.cuh"

namespace sla2 {

// A computing thread holds O (64 registers), S (32), its fragments of Q (32) and P twice (16 each).
template <typename Element_, int kHeadDim_>
struct AttnRowConfig {
  using Element = Element_;
  using Score = float;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kInt8 = false;
  static constexpr int kWarps = kRowGroups * 4;  // that compute
  static constexpr int kSteps = kHeadDim / 16;   // k16 steps of a product over the channels
  static constexpr int kRegistersP = kBlockK / 16;
  static constexpr int kTilesM = 1;
  static constexpr int kTilesD = kHeadDim / 8;
  static constexpr int kPanels = kHeadDim / kPanel;
  static __device__ __forceinline__ int tile_row(int) { return threadIdx.x / 32 * 16; }

  // Tiles are panels of 64 channels with the 128-byte swizzle.
  static constexpr int kPanelBytes = kBlockQ * 128;  // of Q and O
  static constexpr int kQueryBytes = kPanels * kPanelBytes;
  static constexpr int kKeyBytes = kBlockK * kHeadDim * 2;
  static constexpr int kStateBytes = kHeadDim * kHeadDim * 2;
  static constexpr int kStages = 5;

  struct Smem {
    alignas(1024) char query[kQueryBytes];
    alignas(1024) char state[kStateBytes];  // H
    // An entry of the ring is K and V of a block, or room for O on its way out.
    alignas(1024) char stage[kStages][2 * kKeyBytes];
    alignas(16) float z[2 * kHeadDim];  // Z, high part and low part
    int listed;                         // length of the query block's list
    int key[kStages];                   // first token of the key block
    alignas(8) uint64_t query_full, query_empty, state_full, state_empty;
    uint64_t full[kStages], empty[kStages];
  };
  static_assert(sizeof(Smem) <= 232448, "227 KiB a CTA");
  static_assert(kQueryBytes == 2 * kKeyBytes, "O fits an entry of the ring");
};

struct AttnRowMaps {
  CUtensorMap q, k, v, h;
  CUtensorMap out, out_sparse;  // boxes of a warp's 16 rows
};

// Listed blocks that the sparse branch uses; whether the linear one has any.
__device__ __forceinline__ int sparse_blocks(const AttnParams& p, int listed) {
  return p.branch == SLA2_BRANCH_LINEAR ? 0 : listed;
}
__device__ __forceinline__ bool has_complement(const AttnParams& p, int listed) {
  return p.branch == SLA2_BRANCH_LINEAR ||
         (p.branch == SLA2_BRANCH_BOTH && listed < p.shape.num_k_blocks);
}

}  // namespace sla2
