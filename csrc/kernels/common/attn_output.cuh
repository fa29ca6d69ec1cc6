// From the accumulators of the sparse branch to the blended output, shared by every schedule.
//
// A schedule's config C gives Element, kHeadDim, kInt8, kTilesM, kTilesD, kWideRowBytes and
// tile_row(m): the first of the 16 query rows that the warp holds in tile m, as m16n8 accumulators
// (a lane: rows lane / 4 + {0, 8}, columns 8 d + 2 (lane % 4) + {0, 1}).
//
// phi's normaliser cancels between numerator and denominator of the linear branch, so with
// e = exp(q - max) in bf16
//   O = alpha O_s + f (e H),   f = (1 - alpha) / (e Z),
// computed on the accumulators as f (alpha / f O_s + e H): e needs no second rounding.
#pragma once

#include "convert.cuh"
#include "layout.cuh"
#include "params.h"
#include "softmax.cuh"

namespace sla2 {

template <class C, typename Factor>
__device__ __forceinline__ void scale_rows(float (&acc)[C::kTilesM][C::kTilesD][4], Factor factor) {
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = factor(m, half);
#pragma unroll
      for (int d = 0; d < C::kTilesD; ++d) {
        acc[m][d][2 * half] *= x;
        acc[m][d][2 * half + 1] *= x;
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void scale_channels(float (&acc)[C::kTilesM][C::kTilesD][4],
                                               const float* channel_factor) {
#pragma unroll
  for (int d = 0; d < C::kTilesD; ++d) {
    const float2 scale = *reinterpret_cast<const float2*>(channel_factor + 8 * d);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][d][e] *= e % 2 == 0 ? scale.x : scale.y;
    }
  }
}

// 1 / row sum; 0 for a row that has seen no key.
__device__ __forceinline__ float inverse_sum(float sum) {
  return sum == 0.f ? 0.f : reciprocal_approx(sum);
}

// Log-sum-exp of the warp's rows. row0, rows: the query block's tokens; correction: what smoothing
// takes from every logit before the softmax scale. The address is formed at each store: a finished
// pointer is one spilled register more in the portable kernel.
template <class C>
__device__ __forceinline__ void store_lse(const AttnParams& p, int bh, int row0, int rows,
                                          const OnlineSoftmax<C::kTilesM>& softmax, float shift,
                                          const float (&correction)[C::kTilesM][2]) {
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = C::tile_row(m) + 8 * half + threadIdx.x % 32 / 4;
      const float sum = softmax.row_sum[m][half];
      const float value = (softmax.row_max[m][half] - shift + log2f(sum)) * kLn2;
      if (threadIdx.x % 4 == 0 && row < rows) {
        p.lse[static_cast<int64_t>(bh) * p.shape.seqlen + row0 + row] =
            sum == 0.f ? -INFINITY : value - correction[m][half] * p.softmax_scale;
      }
    }
  }
}

// alpha of the warp's rows; 0 with no block listed (row sum 0). row0, rows: the query block's
// tokens.
template <class C>
__device__ __forceinline__ void load_alpha(const AttnParams& p, int head, int block, int row0,
                                           int rows, const OnlineSoftmax<C::kTilesM>& softmax,
                                           float (&alpha)[C::kTilesM][2]) {
  const float* logits = p.alpha_logit + head * p.alpha_stride_head;
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      alpha[m][half] = 0.f;
      if (p.branch == SLA2_BRANCH_BOTH && softmax.row_sum[m][half] != 0.f) {
        const int row =
            row0 +
            min(C::tile_row(m) + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4, rows - 1);
        const float logit = logits[p.alpha_per_token ? row : block];
        alpha[m][half] = reciprocal_approx(1.f + exp2_approx(-kLog2e * logit));
      }
    }
  }
}

// Row factors of the blend: acc becomes O_s alpha / f before the linear branch is added, and f
// times that is the output.
template <class C>
struct BlendFactors {
  float alpha_over_f[C::kTilesM][2], f[C::kTilesM][2];

  __device__ __forceinline__ void set_ones() {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) alpha_over_f[m][half] = f[m][half] = 1.f;
    }
  }
  // alpha: see load_alpha; denominator: e Z.
  __device__ __forceinline__ void set(const float (&alpha_of_row)[C::kTilesM][2],
                                      const float (&denominator)[C::kTilesM][2]) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float alpha = alpha_of_row[m][half];
        // Floors: a saturated alpha leaves f positive (its share of the output is below one float32
        // ulp), and an empty complement has H = 0, where 0 / 0 must give 0.
        const float rest = max_nan(1.f - alpha, 5.9604645e-8f);
        const float total = max_nan(denominator[m][half], kMinDenominator);
        f[m][half] = rest * reciprocal_approx(total);
        alpha_over_f[m][half] = alpha * total * reciprocal_approx(rest);
      }
    }
  }
};

}  // namespace sla2
