// The end of the pass by key block: the linear branch's share, and the store of dV and dK.
//   dV += phi(K) dh,   dphi = V dh^T + 1 dz^T,   dK += phi (dphi - rowsum(dphi phi))
#pragma once

#include "../common/feature_map.cuh"
#include "attn_sparse.cuh"
#include "bwd_config.cuh"
#include "bwd_tiles.cuh"

namespace sla2 {

template <class C>
using ColumnAcc = float[C::kTilesM][C::kTilesD][4];

// Where a warp's accumulators of dK and dV lie: 32 keys by half of the channels.
template <class C>
struct ColumnPlace {
  const int row0 = threadIdx.x / 32 % 2 * 32;
  const int half = threadIdx.x / 64;
  const int channel0 = half * (C::kHeadDim / 2);

  // Row of accumulator index i of tile m; channel of its first column in tile n.
  __device__ __forceinline__ int row(int m, int i) const {
    return row0 + 16 * m + i / 2 * 8 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ int channel(int n) const {
    return channel0 + 8 * n + threadIdx.x % 4 * 2;
  }
};

// phi(K) of the block's 64 rows, bfloat16, rows past the end zero. mean: [D], or null for K as it
// is.
template <class C>
__device__ __forceinline__ void make_features(char* phi, const char* k_tile, const float* mean,
                                              int valid) {
  constexpr int kLanesPerRow = C::kHeadDim / 8, kRowsPerPass = C::kThreads / kLanesPerRow;
  const int chunk = threadIdx.x % kLanesPerRow;
  float centre[8] = {};
  if (mean != nullptr) {
#pragma unroll
    for (int c = 0; c < 8; ++c) centre[c] = __ldg(mean + 8 * chunk + c);
  }
#pragma unroll
  for (int row = threadIdx.x / kLanesPerRow; row < kBlockK; row += kRowsPerPass) {
    const int at = swizzle<C::kWideRowBytes>(row, chunk);
    float x[8];
    unpack8<typename C::Element>(*reinterpret_cast<const uint4*>(k_tile + at), x);
#pragma unroll
    for (int c = 0; c < 8; ++c) x[c] -= centre[c];
    feature_map<kLanesPerRow>(x, row < valid);
    *reinterpret_cast<uint4*>(phi + at) = pack8<__nv_bfloat16>(x);
  }
}

// dV += phi dh.
template <class C>
__device__ __forceinline__ void add_value_gradient(ColumnAcc<C>& dv, uint32_t phi_tile,
                                                   uint32_t dh_tile) {
  const ColumnPlace<C> place;
  multiply_nn<__nv_bfloat16, C::kWideRowBytes, C::kWideRowBytes>(dv, phi_tile, place.row0, dh_tile,
                                                                 place.channel0);
}

// The gradient of what phi saw as K. dz: [2][D], summed; row_dots: scratch [2][64], one for each
// half of the features.
template <class C>
__device__ __forceinline__ void key_feature_gradient(ColumnAcc<C>& dk, const char* phi,
                                                     uint32_t v_tile, uint32_t dh_tile,
                                                     const float* dz, float* row_dots) {
  const ColumnPlace<C> place;
#pragma unroll
  for (int n = 0; n < C::kTilesD; ++n) {
    const float2 high = __ldg(reinterpret_cast<const float2*>(dz + place.channel(n)));
    const float2 low = __ldg(reinterpret_cast<const float2*>(dz + C::kHeadDim + place.channel(n)));
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[m][n][i] = i % 2 == 0 ? high.x + low.x : high.y + low.y;
    }
  }
  multiply_nt<__nv_bfloat16, typename C::Element, C::kWideRowBytes>(dk, v_tile, place.row0, dh_tile,
                                                                    place.channel0);
  auto features = [&](int m, int n, int half) {
    const int row = place.row(m, 2 * half);
    return Pair<__nv_bfloat16>::to_float2(*reinterpret_cast<const uint32_t*>(
        phi + pair_offset<C::kWideRowBytes>(row, place.channel0 / 8 + n)));
  };
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float dot = 0.f;
#pragma unroll
      for (int n = 0; n < C::kTilesD; ++n) {
        const float2 x = features(m, n, half);
        dot += x.x * dk[m][n][2 * half] + x.y * dk[m][n][2 * half + 1];
      }
      dot = lane_sum<4>(dot);
      if (threadIdx.x % 4 == 0) row_dots[place.half * kBlockK + place.row(m, 2 * half)] = dot;
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = place.row(m, 2 * half);
      const float dot = row_dots[row] + row_dots[kBlockK + row];
#pragma unroll
      for (int n = 0; n < C::kTilesD; ++n) {
        const float2 x = features(m, n, half);
        dk[m][n][2 * half] = x.x * (dk[m][n][2 * half] - dot);
        dk[m][n][2 * half + 1] = x.y * (dk[m][n][2 * half + 1] - dot);
      }
    }
  }
}

// Sums over the block's valid rows to `sums` [D]; column_sums: scratch [2][D].
template <class C>
__device__ __forceinline__ void store_column_sums(const ColumnAcc<C>& dk, int valid,
                                                  float* column_sums, float* sums) {
  const ColumnPlace<C> place;
#pragma unroll
  for (int n = 0; n < C::kTilesD; ++n) {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (place.row(m, 2 * half) >= valid) continue;
        sum.x += dk[m][n][2 * half];
        sum.y += dk[m][n][2 * half + 1];
      }
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
    }
    if (threadIdx.x % 32 < 4) {
      *reinterpret_cast<float2*>(column_sums + place.row0 / 32 * C::kHeadDim + place.channel(n)) =
          sum;
    }
  }
  __syncthreads();
  for (int channel = threadIdx.x; channel < C::kHeadDim; channel += C::kThreads) {
    sums[channel] = column_sums[channel] + column_sums[C::kHeadDim + channel];
  }
}

// A 64 x D gradient through `staging` to the block's valid rows. Begins with a barrier: `staging`
// may still be read.
template <class C>
__device__ __forceinline__ void store_keys(const ColumnAcc<C>& acc, const TensorView& view, int bh,
                                           int num_heads, int token0, int valid, char* staging) {
  using Element = typename C::Element;
  const ColumnPlace<C> place;
  __syncthreads();
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < C::kTilesD; ++n) {
        const int row = place.row(m, 2 * half);
        *reinterpret_cast<uint32_t*>(staging +
                                     pair_offset<C::kWideRowBytes>(row, place.channel0 / 8 + n)) =
            Pair<Element>::from_floats(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    }
  }
  __syncthreads();
  constexpr int kChunks = C::kWideRowBytes / 16;
  Element* base =
      const_cast<Element*>(head_base<Element>(view, bh, num_heads)) + token0 * view.stride_token;
#pragma unroll
  for (int i = 0; i < kBlockK * kChunks / C::kThreads; ++i) {
    const int item = i * C::kThreads + threadIdx.x, row = item / kChunks, chunk = item % kChunks;
    if (row < valid) {
      *reinterpret_cast<uint4*>(base + row * view.stride_token + chunk * 8) =
          *reinterpret_cast<const uint4*>(staging + swizzle<C::kWideRowBytes>(row, chunk));
    }
  }
}

}  // namespace sla2
