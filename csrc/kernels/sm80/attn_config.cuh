// Tile sizes, operand types and shared-memory map of the portable attention kernel.
#pragma once

#include "../common/layout.cuh"
#include "../common/params.h"
#include "../common/ptx.cuh"

namespace sla2 {

template <typename Element_, int kHeadDim_, int kQuant>
struct AttnConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kInt8 = kQuant != SLA2_QUANT_NONE;
  static constexpr bool kE4m3 = kQuant == SLA2_QUANT_INT8_FP8;

  // 4 warps of 32 rows: each K or V fragment read from shared memory feeds two m16 tiles. With 16
  // rows a warp the reads double. On an H200: 10.1 against 11.3 ms (int8_fp8, 40 heads, 75600
  // tokens, 35 blocks a row).
  static constexpr int kRowsPerWarp = 32;
  static constexpr int kWarps = kBlockQ / kRowsPerWarp;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTilesM = kRowsPerWarp / 16;
  static constexpr int kTilesN = kBlockK / 8;
  static constexpr int kTilesD = kHeadDim / 8;
  static __device__ __forceinline__ int tile_row(int m) {
    return threadIdx.x / 32 * kRowsPerWarp + 16 * m;
  }

  static constexpr int kQueryRowBytes = kHeadDim * (kInt8 ? 1 : 2);  // also a key's
  static constexpr int kWideRowBytes = kHeadDim * 2;                 // 16-bit rows: phi(Q), H, V
  static constexpr int kQueryBytes = kBlockQ * kQueryRowBytes;
  static constexpr int kKeyBytes = kBlockK * kQueryRowBytes;
  static constexpr int kValueBytes = kBlockK * kHeadDim * (kE4m3 ? 1 : 2);
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  static constexpr int kStages = kInt8 ? 3 : 2;

  // H passes through the ring in parts of 64 rows.
  static constexpr int kRowsH = 64;
  static constexpr int kPartsH = kHeadDim / kRowsH;
  static_assert(kRowsH * kWideRowBytes <= kStageBytes, "a part of H fits a stage");
  static_assert(8 * kWideRowBytes <= kRowsPerWarp * kQueryRowBytes, "Q's bytes stage the output");

  // [Q | ring of K, V stages]
  static constexpr int kSmemBytes = kQueryBytes + kStages * kStageBytes;
  static_assert(kSmemBytes <= 99 * 1024, "one CTA must fit every sm_80+ device");
};

}  // namespace sla2
