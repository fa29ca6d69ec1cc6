// The linear branch's product inside the attention kernel: e H on the accumulators of the sparse
// branch (see attn_output.cuh). H arrives in the main loop's ring, 64 rows at a time, in the order
// of the features; e's fragments hold them in another one, and ldmatrix takes any row address.
#pragma once

#include "attn_config.cuh"
#include "attn_query.cuh"

namespace sla2 {

// Feature at position p of k16 step `step` of a group of 32.
__device__ __forceinline__ int feature_at(int step, int p) {
  return 4 * step + p % 8 / 2 * 8 + p / 8 * 2 + p % 2;
}

// Swizzle of H rows: the eight rows of one ldmatrix are features {0, 1, 8, 9, 16, 17, 24, 25} +
// const.
template <class C>
__device__ __forceinline__ int swizzle_h(int row, int chunk) {
  return row * C::kWideRowBytes + ((chunk ^ (row / 8 % 4 * 2 + row % 2)) << 4);
}

// Rows [64 part, 64 part + 64) of H, bf16 [D][D], into a ring tile.
template <class C>
__device__ __forceinline__ void load_h(uint32_t tile, const uint16_t* h, int part) {
  constexpr int kChunks = C::kWideRowBytes / 16;
#pragma unroll 1  // twice a CTA; unrolled, its addresses would sit in registers through the main
                  // loop
  for (int i = 0; i < C::kRowsH * kChunks / C::kThreads; ++i) {
    const int item = i * C::kThreads + threadIdx.x;
    cp_async_16(tile + swizzle_h<C>(item / kChunks, item % kChunks),
                h + (part * C::kRowsH * kChunks + item) * 8);
  }
}

// acc += e H for the features of the next part of H, whose e sits in the first groups; the others
// move up. The caller keeps its loop over the parts rolled, so that the compiler cannot prepare the
// operands of all of them at once and spill.
template <class C>
__device__ __forceinline__ void accumulate_linear(float (&acc)[C::kTilesM][C::kTilesD][4],
                                                  QueryFeatures<C>& features, uint32_t h_tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int group = 0; group < C::kRowsH / 32; ++group) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[C::kTilesM][4];
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) features.operand(a[m], m, group, step);
      const int row = 32 * group + feature_at(step, lane % 16);
#pragma unroll
      for (int d = 0; d < C::kTilesD; d += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, h_tile + swizzle_h<C>(row, d + lane / 16));
#pragma unroll
        for (int m = 0; m < C::kTilesM; ++m) {
          mma<__nv_bfloat16>(acc[m][d], a[m], b[0], b[1]);
          mma<__nv_bfloat16>(acc[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  features.template shift_groups<C::kRowsH / 32>();
}

}  // namespace sla2
