// The sparse branch's building blocks: operands into shared memory, S = Q K^T, O += P V.
#pragma once

#include <type_traits>

#include "../common/convert.cuh"
#include "../common/quantize.cuh"
#include "attn_config.cuh"

namespace sla2 {

// kRows rows of 16-bit values as given by the caller into a swizzled tile; rows past `valid_rows`
// are zero.
template <class C, int kRows, typename T>
__device__ __forceinline__ void load_wide_rows(uint32_t tile, const T* x, int64_t stride_token,
                                               int valid_rows) {
  static_assert(sizeof(T) == 2, "16-bit values");
  constexpr int kChunks = C::kWideRowBytes / 16;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / C::kThreads; ++i) {
    const int item = i * C::kThreads + threadIdx.x, row = item / kChunks, chunk = item % kChunks;
    const bool valid = row < valid_rows;
    cp_async_16(tile + swizzle<C::kWideRowBytes>(row, chunk),
                x + (valid ? row : 0) * stride_token + chunk * 8, valid);
  }
}

// Contiguous bytes already in their shared-memory image.
template <int kBytes, int kThreads>
__device__ __forceinline__ void load_image(uint32_t tile, const void* source) {
#pragma unroll
  for (int i = 0; i < kBytes / 16 / kThreads; ++i) {
    const int offset = (i * kThreads + threadIdx.x) * 16;
    cp_async_16(tile + offset, static_cast<const char*>(source) + offset);
  }
}

// Q of the block to int8 in shared memory, one scale for the block; returns the scale.
template <class C>
__device__ __forceinline__ float quantize_query(char* tile, float* scratch,
                                                const typename C::Element* q, int64_t stride_token,
                                                int rows) {
  constexpr int kLanesPerRow = C::kHeadDim / 8;
  constexpr int kRowsPerPass = C::kThreads / kLanesPerRow;
  constexpr int kPasses = kBlockQ / kRowsPerPass;
  const int row0 = threadIdx.x / kLanesPerRow, column = threadIdx.x % kLanesPerRow * 8;
  uint4 packed[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int row = i * kRowsPerPass + row0;
    packed[i] = row < rows ? __ldg(reinterpret_cast<const uint4*>(q + row * stride_token + column))
                           : make_uint4(0, 0, 0, 0);
  }
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) amax = max_nan(amax, amax8<typename C::Element>(packed[i]));
  amax = max_nan(block_max<C::kThreads>(amax, scratch), kQuantEps);
  const float factor = __fdiv_rn(kInt8Max, amax);
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float x[8];
    unpack8<typename C::Element>(packed[i], x);
    const int offset =
        swizzle<C::kQueryRowBytes>(i * kRowsPerPass + row0, column / 16) + column % 16;
    *reinterpret_cast<uint2*>(tile + offset) = pack_int8x8(x, factor);
  }
  return amax / kInt8Max;
}

// int8 sums start at the bits of 1.5 * 2^23: the integer result then reads as a float, exactly, as
// |S| < 2^22 (127 * 127 * 128), without a half-rate conversion.
constexpr int kScoreBiasBits = 0x4b400000;
constexpr float kScoreBias = 12582912.f;
// The bias may stay in the scores and be folded into the exponent's addend, which saves an FADD per
// score. It is exact when bias * scale is: the bias is 3 * 2^22, so a scale cut to 21 bits leaves a
// bit for the row maximum, an integer, as long as the product has fractional bits left.
constexpr float kFoldableScale = 0.25f;

// S = Q K^T for the warp's 32 rows and the 64 keys of a block, as float; int8 scores include
// kScoreBias.
template <class C>
__device__ __forceinline__ void scores(float (&s)[C::kTilesM][C::kTilesN][4], uint32_t q_tile,
                                       uint32_t k_tile) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * C::kRowsPerWarp;
  int acc[C::kTilesM][C::kTilesN][4];
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        acc[m][n][e] = kScoreBiasBits;
        if constexpr (!C::kInt8) s[m][n][e] = 0.f;
      }
    }
  }
#pragma unroll
  for (int chunk = 0; chunk < C::kQueryRowBytes / 16; chunk += 2) {
    uint32_t a[C::kTilesM][4];
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
      ldmatrix_x4(a[m], q_tile + swizzle<C::kQueryRowBytes>(warp_row + 16 * m + lane % 16,
                                                            chunk + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < C::kTilesN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, k_tile + swizzle<C::kQueryRowBytes>(8 * n + lane % 8 + lane / 16 * 8,
                                                         chunk + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
        if constexpr (C::kInt8) {
          mma_int8(acc[m][n], a[m], b[0], b[1]);
          mma_int8(acc[m][n + 1], a[m], b[2], b[3]);
        } else {
          mma<typename C::Element>(s[m][n], a[m], b[0], b[1]);
          mma<typename C::Element>(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  if constexpr (C::kInt8) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = __int_as_float(acc[m][n][e]);
      }
    }
  }
}

// acc += P V for one key block.
template <class C>
__device__ __forceinline__ void accumulate_values(float (&acc)[C::kTilesM][C::kTilesD][4],
                                                  const float (&p)[C::kTilesM][C::kTilesN][4],
                                                  uint32_t v_tile) {
  if constexpr (C::kE4m3) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kBlockK / 32; ++k) {
      uint32_t a[C::kTilesM][4];
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int r = 0; r < 4;
             ++r) {  // register r: rows lane/4 + 8 (r % 2), keys 32k + 16 (r / 2) + ...
          const auto& left = p[m][4 * k + r / 2 * 2];
          const auto& right = p[m][4 * k + r / 2 * 2 + 1];
          a[m][r] = pack_e4m3x4(left[r % 2 * 2], left[r % 2 * 2 + 1], right[r % 2 * 2],
                                right[r % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int d = 0; d < C::kTilesD; d += 2) {
        uint32_t b[4];
        ldmatrix_x4(b,
                    v_tile + swizzle<64>(8 * d + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < C::kTilesM; ++m) {
          mma<E4m3>(acc[m][d], a[m], b[0], b[1]);
          mma<E4m3>(acc[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else {
    using Operand = std::conditional_t<C::kInt8, __half, typename C::Element>;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      uint32_t a[C::kTilesM][4];
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const auto& tile = p[m][2 * k + r / 2];
          a[m][r] = Pair<Operand>::from_floats(tile[r % 2 * 2], tile[r % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int d = 0; d < C::kTilesD; d += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_tile + swizzle<C::kWideRowBytes>(16 * k + lane % 16, d + lane / 16));
#pragma unroll
        for (int m = 0; m < C::kTilesM; ++m) {
          mma<Operand>(acc[m][d], a[m], b[0], b[1]);
          mma<Operand>(acc[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

}  // namespace sla2
