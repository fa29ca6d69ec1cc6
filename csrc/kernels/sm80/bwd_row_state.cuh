// What the backward pass needs to know of a query row besides its operands, one read of Q, dO and
// O_s.
#pragma once

#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/params.h"
#include "../common/ptx.cuh"

namespace sla2 {

// Per lane the rows of its accumulators; the four lanes of a quad hold the same values.
//
// dO_s = alpha dO and dO_l = rest dO never exist: alpha goes into P, as P only ever appears times
// dO_s, and `rest` into the linear branch's weights.
template <class C>
struct RowState {
  using Element = typename C::Element;
  static constexpr int kGroups = C::kHeadDim / 32;

  float shift[C::kTilesM][2];   // alpha P = 2^(scale log2(e) S - shift)
  float delta[C::kTilesM][2];   // <dO, O_s>
  float rest[C::kTilesM][2];    // 1 - alpha; 0 past the end
  float offset[C::kTilesM][2];  // e = 2^(log2(e) q + offset) = exp(q - max q)
  uint4 out_sparse[C::kTilesM][2][kGroups];

  static __device__ __forceinline__ int row(int m, int half) {
    return C::tile_row(m) + 8 * half + threadIdx.x % 32 / 4;
  }

  // Starts the read of O_s, so that it runs beside the copies of Q and dO.
  __device__ __forceinline__ void load(const AttnBwdParams& p, int bh, int row0, int rows) {
    if (p.branch == SLA2_BRANCH_LINEAR) return;
    const Element* base =
        head_base<Element>(p.out_sparse, bh, p.shape.num_heads) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = row0 + min(row(m, half), rows - 1);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          out_sparse[m][half][group] = __ldg(reinterpret_cast<const uint4*>(
              base + token * p.out_sparse.stride_token + 32 * group));
        }
      }
    }
  }

  // listed, complement: whether either branch has key blocks; q_tile, grad_tile: Q and dO, rows
  // past the end zero.
  __device__ __forceinline__ void compute(const AttnBwdParams& p, int bh, int block, int rows,
                                          bool listed, bool complement, const char* q_tile,
                                          const char* grad_tile) {
    set_alpha(p, bh, block, rows, listed, complement);
    const bool sparse = p.branch != SLA2_BRANCH_LINEAR;
    float q_mean[C::kTilesM][2], row_max[C::kTilesM][2];
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        delta[m][half] = q_mean[m][half] = 0.f;
        row_max[m][half] = -INFINITY;
      }
    }
    const float* mean = p.k_mean + static_cast<int64_t>(bh) * C::kHeadDim + threadIdx.x % 4 * 8;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float factor[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) factor[i] = __ldg(mean + 32 * group + i);
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = swizzle<C::kWideRowBytes>(row(m, half), 4 * group + threadIdx.x % 4);
          const uint4 packed = *reinterpret_cast<const uint4*>(q_tile + at);
          row_max[m][half] = max_nan(row_max[m][half], max8<Element>(packed));
          if (!sparse) continue;
          float x[8], y[8];
          unpack8<Element>(packed, x);
#pragma unroll
          for (int i = 0; i < 8; ++i) q_mean[m][half] = fmaf(x[i], factor[i], q_mean[m][half]);
          unpack8<Element>(*reinterpret_cast<const uint4*>(grad_tile + at), x);
          unpack8<Element>(out_sparse[m][half][group], y);
#pragma unroll
          for (int i = 0; i < 8; ++i) delta[m][half] = fmaf(x[i], y[i], delta[m][half]);
        }
      }
    }
    const float scale_log2 = p.softmax_scale * kLog2e;
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        offset[m][half] = -kLog2e * lane_max<4>(row_max[m][half]);
        q_mean[m][half] = lane_sum<4>(q_mean[m][half]);
        delta[m][half] = lane_sum<4>(delta[m][half]);
        // lse is of smoothed K and S of raw K: smoothing takes q . mean(K) from every score.
        const int r = row(m, half);
        if (sparse && r < rows) {
          const int64_t token = static_cast<int64_t>(block) * kBlockQ + r;
          const float lse = __ldg(p.lse + static_cast<int64_t>(bh) * p.shape.seqlen + token);
          shift[m][half] += fmaf(lse, kLog2e, q_mean[m][half] * scale_log2);
        } else {
          shift[m][half] = INFINITY;
          delta[m][half] = 0.f;
        }
      }
    }
  }

  // For the pass by key block: kBlockQ rows of this query block.
  __device__ __forceinline__ void store(float* row_shift, float* row_delta) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_shift[row(m, half)] = shift[m][half];
        row_delta[row(m, half)] = delta[m][half];
      }
    }
  }

 private:
  // Settled where a branch is missing: without a listed block alpha is 0, without an unlisted
  // one 1. shift starts as -log2(alpha).
  __device__ __forceinline__ void set_alpha(const AttnBwdParams& p, int bh, int block, int rows,
                                            bool listed, bool complement) {
    const bool both = p.branch == SLA2_BRANCH_BOTH;
    const bool learned = both && listed && complement;
    const bool sparse_alone = p.branch == SLA2_BRANCH_SPARSE || (both && listed);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row(m, half);
        shift[m][half] = 0.f;
        rest[m][half] = sparse_alone ? 0.f : 1.f;
        if (learned) {
          const int index = p.alpha_per_token ? block * kBlockQ + min(r, rows - 1) : block;
          const float logit =
              kLog2e * __ldg(p.alpha_logit + bh % p.shape.num_heads * p.alpha_stride_head + index);
          shift[m][half] = log2f(1.f + exp2_approx(-logit));
          rest[m][half] = reciprocal_approx(1.f + exp2_approx(logit));
        }
        if (r >= rows) rest[m][half] = 0.f;
      }
    }
  }
};

}  // namespace sla2
