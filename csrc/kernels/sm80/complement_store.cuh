// The end of the complement's products: a 128 x 128 tile of [H | Z] from 2 x 2 warps of 64 x 64.
#pragma once

#include "../common/convert.cuh"
#include "../common/layout.cuh"

namespace sla2 {

constexpr int kSumThreads = 128;
constexpr int kSumTile = 128;  // rows and columns
constexpr int kSumTileBytes = kSumTile * kSumTile * 2;

// factor * acc to bf16 h [num_rows, D, D] or float z [num_rows, 2, D], from row0 and column0 of [H
// | Z] on; H goes through `staging` for 16-byte writes.
template <int kHeadDim>
__device__ __forceinline__ void store_sums(const float (&acc)[4][8][4], float factor, char* staging,
                                           uint16_t* h, float* z, int row0, int column0,
                                           int num_rows) {
  constexpr int kColumnsH = kHeadDim * kHeadDim, kRowBytes = kSumTile * 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % 2 * 64, warp_column = warp / 2 * 64;
  const int64_t first = row0;
  const bool is_h = column0 < kColumnsH;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + lane / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int column = warp_column + 8 * n + lane % 4 * 2;
        const float x0 = factor * acc[m][n][2 * half], x1 = factor * acc[m][n][2 * half + 1];
        if (is_h) {
          *reinterpret_cast<uint32_t*>(staging + swizzle<kRowBytes>(row, column / 8) +
                                       column % 8 * 2) = Pair<__nv_bfloat16>::from_floats(x0, x1);
        } else if (row0 + row < num_rows) {
          *reinterpret_cast<float2*>(z + (first + row) * 2 * kHeadDim + column0 + column -
                                     kColumnsH) = make_float2(x0, x1);
        }
      }
    }
  }
  __syncthreads();
  if (!is_h) return;
  constexpr int kChunks = kSumTile / 8;
#pragma unroll
  for (int i = 0; i < kSumTile * kChunks / kSumThreads; ++i) {
    const int item = i * kSumThreads + threadIdx.x, row = item / kChunks, chunk = item % kChunks;
    if (row0 + row < num_rows) {
      *reinterpret_cast<uint4*>(h + (first + row) * kColumnsH + column0 + chunk * 8) =
          *reinterpret_cast<const uint4*>(staging + swizzle<kRowBytes>(row, chunk));
    }
  }
}

}  // namespace sla2
