// Online softmax on the m16n8 accumulator layout (16 rows per tile; a lane holds rows lane/4 and
// lane/4 + 8, columns 8n + 2 (lane % 4) + {0, 1}), shared by every schedule.
//
// The running maximum is an integer in log2 units, so P differs from exp(S - max) by a power of
// two: its rounding to e4m3 or fp16 does not depend on the order in which key blocks arrive, and
// rescaling is exact. It is also lazy: the maximum may be exceeded by kHeadroom before the
// accumulators are rescaled, which makes that rare after the first block (attention 9.11 -> 8.88 ms
// on an H200, int8_fp8, 40 heads of 75600 tokens).
#pragma once

#include "convert.cuh"
#include "ptx.cuh"

namespace sla2 {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kRowMaxInit = -1e30f;  // finite: exp2(kRowMaxInit - m) is 0, never NaN
constexpr float kHeadroom = 2.f;       // P <= 2^kHeadroom

// The scale of int8 scores, cut to 21 bits so that the portable path can fold its conversion bias
// into the exponent's addend exactly; the Hopper path cuts it for the same bits.
__device__ __forceinline__ float cut_scale(float scale) {
  return __uint_as_float(__float_as_uint(scale) & ~7u);
}

template <int kTilesM>
struct OnlineSoftmax {
  float row_max[kTilesM][2];  // an integer, at least the true maximum - kHeadroom
  float row_sum[kTilesM][2];  // this lane's columns only, until finish()

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = kRowMaxInit;
        row_sum[m][half] = 0.f;
      }
    }
  }

  // s: raw scores of one key block; on return 2^(shift + s * scale_log2 - row_max), summed into
  // row_sum. Rescales `acc` (the output accumulators) when a row's maximum outgrew the headroom in
  // any lane of the warp. `bias` is part of every s and belongs to no score.
  template <int kTilesN, int kTilesD>
  __device__ __forceinline__ void update(float (&s)[kTilesM][kTilesN][4], float scale_log2,
                                         float shift, float bias,
                                         float (&acc)[kTilesM][kTilesD][4]) {
    float grown[kTilesM][2];
    bool any_grew = false;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float block_max = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          block_max = fmaxf(block_max, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        block_max = fmaxf(block_max, __shfl_xor_sync(0xffffffffu, block_max, 1));
        block_max = fmaxf(block_max, __shfl_xor_sync(0xffffffffu, block_max, 2));
        grown[m][half] = fmaxf(row_max[m][half], ceilf((block_max - bias) * scale_log2));
        any_grew |= grown[m][half] > row_max[m][half] + kHeadroom;
      }
    }
    if (__any_sync(0xffffffffu, any_grew)) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float rescale = exp2_approx(row_max[m][half] - grown[m][half]);
          row_max[m][half] = grown[m][half];
          row_sum[m][half] *= rescale;
#pragma unroll
          for (int d = 0; d < kTilesD; ++d) {
            acc[m][d][2 * half] *= rescale;
            acc[m][d][2 * half + 1] *= rescale;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = fmaf(-bias, scale_log2, shift - row_max[m][half]);
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& p = s[m][n][2 * half + e];
            p = exp2_approx(fmaf(p, scale_log2, offset));
            sum += p;
          }
        }
        row_sum[m][half] += sum;
      }
    }
  }

  // Row sums over all columns in every lane of a quad.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) row_sum[m][half] = lane_sum<4>(row_sum[m][half]);
    }
  }
};

// Columns at and beyond `valid` of a 64-key block never win the maximum and weigh nothing.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void mask_columns(float (&s)[kTilesM][kTilesN][4], int valid) {
  const int lane_column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (8 * n + lane_column + e >= valid) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) s[m][n][e] = s[m][n][2 + e] = -INFINITY;
      }
    }
  }
}

template <int kTilesM, int kTilesN>
__device__ __forceinline__ void subtract(float (&s)[kTilesM][kTilesN][4], float x) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] -= x;
    }
  }
}

}  // namespace sla2
