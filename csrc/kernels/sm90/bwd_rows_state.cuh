// What the backward pass needs to know of a query row besides its operands, from fragments in
// registers (sm80/bwd_row_state.cuh is the portable form).
#pragma once

#include "../common/convert.cuh"
#include "../common/ptx.cuh"
#include "bwd_rows_config.cuh"

namespace sla2 {

// Rows lane / 4 + {0, 8} of the warp; the four lanes of a quad hold the same values.
//
// dO_s = alpha dO and dO_l = rest dO never exist: alpha goes into P, as P only ever appears times
// dO_s, and `rest` into the linear branch's weights.
template <class C>
struct RowStateSm90 {
  using Element = typename C::Element;

  float shift[2];   // alpha P = 2^(scale log2(e) S - shift)
  float delta[2];   // <dO, O_s>
  float rest[2];    // 1 - alpha; 0 past the end
  float offset[2];  // e = 2^(log2(e) q + offset) = exp(q - max q)

  static __device__ __forceinline__ int row(int half) {
    return C::tile_row(0) + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
  }

  // Starts the reads of alpha's logit and lse, which no other read waits for: to `rest` and
  // `shift`.
  __device__ __forceinline__ void load(const AttnBwdParams& p, const RowTile& tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = tile.row0 + min(row(half), tile.rows - 1);
      rest[half] = shift[half] = delta[half] = 0.f;
      if (p.branch == SLA2_BRANCH_BOTH) {
        const int index = p.alpha_per_token ? token : tile.block;
        rest[half] = __ldg(p.alpha_logit + tile.head * p.alpha_stride_head + index);
      }
      if (p.branch != SLA2_BRANCH_LINEAR) {
        shift[half] = __ldg(p.lse + static_cast<int64_t>(tile.bh) * p.shape.seqlen + token);
      }
    }
  }

  // From these to 1 - alpha and lse less log alpha, in log2 units. alpha is settled where a branch
  // is missing: 0 without a listed block, 1 without an unlisted one.
  __device__ __forceinline__ void set_alpha(const AttnBwdParams& p, const RowTile& tile,
                                            int listed) {
    const bool both = p.branch == SLA2_BRANCH_BOTH;
    const bool learned = both && listed > 0 && listed < p.shape.num_k_blocks;
    const bool sparse_alone = p.branch == SLA2_BRANCH_SPARSE || (both && listed > 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float logit = kLog2e * rest[half];
      const float log_alpha = learned ? -log2f(1.f + exp2_approx(-logit)) : 0.f;
      rest[half] = learned ? reciprocal_approx(1.f + exp2_approx(logit)) : sparse_alone ? 0.f : 1.f;
      if (row(half) >= tile.rows) rest[half] = 0.f;
      shift[half] = fmaf(shift[half], kLog2e, -log_alpha);
    }
  }

  // The rest of shift, and delta. mean: of K; out_sparse: tile of O_s, which is read when this
  // returns.
  __device__ __forceinline__ void compute(const Fragments<C>& q, const Fragments<C>& grad,
                                          const float* mean, const char* out_sparse,
                                          float scale_log2, int rows) {
    float q_mean[2] = {}, dot[2] = {};
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      uint32_t out[4];
      ldmatrix_x4(out, fragment_address<C>(out_sparse, step));
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float2 factor =
            __ldg(reinterpret_cast<const float2*>(mean + 16 * step + 8 * c + threadIdx.x % 4 * 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 x = Pair<Element>::to_float2(q[step][2 * c + half]);
          const float2 g = Pair<Element>::to_float2(grad[step][2 * c + half]);
          const float2 o = Pair<Element>::to_float2(out[2 * c + half]);
          q_mean[half] = fmaf(x.x, factor.x, fmaf(x.y, factor.y, q_mean[half]));
          dot[half] = fmaf(g.x, o.x, fmaf(g.y, o.y, dot[half]));
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      q_mean[half] = lane_sum<4>(q_mean[half]);
      dot[half] = lane_sum<4>(dot[half]);
      // lse is of smoothed K and S of raw K: smoothing takes q . mean(K) from every score.
      const bool valid = row(half) < rows;
      shift[half] = valid ? fmaf(q_mean[half], scale_log2, shift[half]) : INFINITY;
      delta[half] = valid ? dot[half] : 0.f;
    }
  }

  // For the pass by key block: kBlockQ rows of this query block.
  __device__ __forceinline__ void store(float* row_shift, float* row_delta) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_shift[row(half)] = shift[half];
      row_delta[row(half)] = delta[half];
    }
  }
};

}  // namespace sla2
