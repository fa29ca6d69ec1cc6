// The linear branch inside the attention kernel: O += w H with w = (1 - alpha) phi(Q) / (phi(Q) Z). phi's normaliser
// cancels, so w is exp(q - max) times one factor per row. H arrives in the main loop's ring, 64 rows at a time; Q is
// read again from global memory (L2 still holds it) instead of taking 64 registers or 32 KiB through the main loop.
//
// Features are dealt to fragments so that a lane's share of a row is contiguous: of each 32 features a quad's lane t
// has the eight from 8t, four for each of two k16 steps. The products do not care about the order as long as the rows
// of H follow it, and ldmatrix takes any row address.
#pragma once

#include "../common/convert.cuh"
#include "attn_config.cuh"

namespace sla2 {

// Feature at position p of k16 step `half` of a group of 32.
__device__ __forceinline__ int feature_at(int half, int p) { return 4 * half + p % 8 / 2 * 8 + p / 8 * 2 + p % 2; }

// Swizzle of H rows: the eight rows of one ldmatrix are features {0, 1, 8, 9, 16, 17, 24, 25} + const.
template <class C>
__device__ __forceinline__ int swizzle_h(int row, int chunk) {
  return row * C::kWideRowBytes + ((chunk ^ (row / 8 % 4 * 2 + row % 2)) << 4);
}

// Rows [64 part, 64 part + 64) of H, bf16 [D][D], into a ring tile.
template <class C>
__device__ __forceinline__ void load_h(uint32_t tile, const uint16_t* h, int part) {
  constexpr int kChunks = C::kWideRowBytes / 16;
#pragma unroll 1  // twice a CTA; unrolled, its addresses would sit in registers through the main loop
  for (int i = 0; i < C::kRowsH * kChunks / C::kThreads; ++i) {
    const int item = i * C::kThreads + threadIdx.x;
    cp_async_16(tile + swizzle_h<C>(item / kChunks, item % kChunks), h + (part * C::kRowsH * kChunks + item) * 8);
  }
}

template <class C>
class LinearBranch {
 public:
  using Element = typename C::Element;

  // q: first row of the query block; rows: its valid rows.
  __device__ __forceinline__ LinearBranch(const Element* q, int64_t stride_token, int rows)
      : q_(q + threadIdx.x % 4 * 8), stride_token_(stride_token), last_row_(rows - 1) {}

  // Row maxima of Q; adds q . x (x float [D]) to dot unless x is null.
  __device__ __forceinline__ void scan(const float* x, float (&dot)[C::kTilesM][2]) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) row_max_[m][0] = row_max_[m][1] = -INFINITY;
#pragma unroll 1
    for (int group = 0; group < C::kHeadDim / 32; ++group) {
      float factor[8] = {};
      if (x != nullptr) load_features(factor, x + 32 * group);
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float q[8];
          load_query(q, m, half, group);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            row_max_[m][half] = max_nan(row_max_[m][half], q[i]);
            dot[m][half] = fmaf(q[i], factor[i], dot[m][half]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max_[m][half] = lane_max<4>(row_max_[m][half]);
        dot[m][half] = lane_sum<4>(dot[m][half]);
      }
    }
  }

  // Row factors of w. z: float [2][D] in shared memory, high and low part of Z; weight: 1 - alpha.
  __device__ __forceinline__ void normalise(const float* z, const float (&weight)[C::kTilesM][2]) {
    float denominator[C::kTilesM][2] = {};
#pragma unroll 1
    for (int group = 0; group < C::kHeadDim / 32; ++group) {
      float high[8], low[8];
      load_features(high, z + 32 * group);
      load_features(low, z + C::kHeadDim + 32 * group);
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float q[8];
          load_query(q, m, half, group);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            denominator[m][half] = fmaf(exponential(q[i], m, half), high[i] + low[i], denominator[m][half]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        constexpr float kSmallest = 1.17549435e-38f;  // an empty complement has H = 0: 0 / 0 must give 0
        factor_[m][half] =
            weight[m][half] * reciprocal_approx(max_nan(lane_sum<4>(denominator[m][half]), kSmallest));
      }
    }
  }

  // acc += w H for the features of one part of H.
  __device__ __forceinline__ void accumulate(float (&acc)[C::kTilesM][C::kTilesD][4], uint32_t h_tile,
                                             int part) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int group = 0; group < C::kRowsH / 32; ++group) {
      uint32_t w[2][C::kTilesM][4];  // [k16 step]
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float q[8];
          load_query(q, m, half, part * (C::kRowsH / 32) + group);
#pragma unroll
          for (int i = 0; i < 8; i += 2) {
            w[i / 4][m][half + i % 4] =
                Pair<__nv_bfloat16>::from_floats(exponential(q[i], m, half) * factor_[m][half],
                                                 exponential(q[i + 1], m, half) * factor_[m][half]);
          }
        }
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int row = 32 * group + feature_at(step, lane % 16);
#pragma unroll
        for (int d = 0; d < C::kTilesD; d += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, h_tile + swizzle_h<C>(row, d + lane / 16));
#pragma unroll
          for (int m = 0; m < C::kTilesM; ++m) {
            mma<__nv_bfloat16>(acc[m][d], w[step][m], b[0], b[1]);
            mma<__nv_bfloat16>(acc[m][d + 1], w[step][m], b[2], b[3]);
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void load_query(float (&q)[8], int m, int half, int group) const {
    const int row = threadIdx.x / 32 * C::kRowsPerWarp + 16 * m + 8 * half + threadIdx.x % 32 / 4;
    const Element* source = q_ + min(row, last_row_) * stride_token_ + 32 * group;
    unpack8<Element>(__ldg(reinterpret_cast<const uint4*>(source)), q);
  }
  static __device__ __forceinline__ void load_features(float (&x)[8], const float* group) {
    const float4* source = reinterpret_cast<const float4*>(group + threadIdx.x % 4 * 8);
    const float4 first = source[0], second = source[1];
    x[0] = first.x, x[1] = first.y, x[2] = first.z, x[3] = first.w;
    x[4] = second.x, x[5] = second.y, x[6] = second.z, x[7] = second.w;
  }
  __device__ __forceinline__ float exponential(float q, int m, int half) const {
    return exp2_approx((q - row_max_[m][half]) * kLog2e);
  }

  const Element* q_;
  int64_t stride_token_;
  int last_row_;
  float row_max_[C::kTilesM][2];
  float factor_[C::kTilesM][2];
};

}  // namespace sla2
