// Shared memory, tiles and maps of the Hopper backward kernel by query block.
#pragma once

#include "../common/params.h"
#include "row_tiles.cuh"

namespace sla2 {

// A computing thread holds dQ (64 registers), S and dP (32 each), its fragments of Q and dO (32
// each) and dS (16).
template <typename Element_, int kHeadDim_>
struct BwdRowSm90Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kRowGroups * 4;  // that compute
  static constexpr int kSteps = kHeadDim / 16;   // k16 steps of a product over the channels
  static constexpr int kTilesD = kHeadDim / 8;
  static constexpr int kPanels = kHeadDim / kPanel;
  static __device__ __forceinline__ int tile_row(int) { return threadIdx.x / 32 * 16; }

  // 16-bit tiles are panels of 64 channels with the 128-byte swizzle.
  static constexpr int kPanelBytes = kBlockQ * 128;  // of Q, dO, O_s, dQ
  static constexpr int kQueryBytes = kPanels * kPanelBytes;
  static constexpr int kKeyBytes = kBlockK * kHeadDim * 2;
  static constexpr int kStateBytes = kHeadDim * kHeadDim * 2;
  static constexpr int kStages = 4;

  struct Smem {
    alignas(1024) char query[kQueryBytes];  // Q, then e = exp(q - max), then dH on its way out
    alignas(1024) char grad[kQueryBytes];   // dO
    alignas(1024) char state[kQueryBytes];  // H, then the linear branch's weights w
    // An entry of the ring is K and V of a block, or O_s, or room for dQ on its way out.
    alignas(1024) char stage[kStages][2 * kKeyBytes];
    alignas(16) float z[2 * kHeadDim];  // Z, high part and low part
    float dots[kBlockQ];                // <dO, O_l>
    float warp_sums[kWarps];
    int listed;        // length of the query block's list
    int key[kStages];  // first token of the key block
    alignas(8) uint64_t operands_full, operands_empty, full[kStages], empty[kStages];
  };
  static_assert(sizeof(Smem) <= 232448, "227 KiB a CTA");
  static_assert(kStateBytes <= kQueryBytes, "w takes H's place");
  static_assert(kQueryBytes == 2 * kKeyBytes, "O_s and dQ fit an entry of the ring");
};

// dH as the store of the attention kernel's output sees it.
template <int kHeadDim_>
struct BwdStateStore {
  using Element = __nv_bfloat16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTilesD = kHeadDim / 8;
  static constexpr int kPanelBytes = kBlockQ * 128;
  static __device__ __forceinline__ int tile_row(int) { return threadIdx.x / 32 * 16; }
};

struct BwdRowMaps {
  CUtensorMap q, grad_out, out_sparse, k, v, h;
  CUtensorMap dq, dstate;  // boxes of a warp's 16 rows
};

// Listed blocks that the sparse branch uses; whether the linear one has any.
__device__ __forceinline__ int sparse_blocks(const AttnBwdParams& p, int listed) {
  return p.branch == SLA2_BRANCH_LINEAR ? 0 : listed;
}
__device__ __forceinline__ bool has_complement(const AttnBwdParams& p, int listed) {
  return p.h != nullptr && listed < p.shape.num_k_blocks;
}

}  // namespace sla2
