// Backward pass by query block, portable schedule (mma.sync + cp.async): dQ, the gradient of the
// states that made O_l, and what the pass by key block needs to know of the rows.
//
// One CTA: 128 query rows of one head. The linear branch comes first and leaves its share of dQ in
// the accumulators; then the list's key blocks pass in halves of 32 keys:
//   S = Q K^T, alpha P = 2^(S - shift), dP = dO V^T - delta, dS = alpha P dP, dQ += dS K.
// With a soft map S has log m added, and the sum of dS over a block is the gradient of its log m.
#include "../common/attn_output.cuh"
#include "../common/dispatch.h"
#include "attn_query.cuh"
#include "attn_sparse.cuh"
#include "bwd_config.cuh"
#include "bwd_row_state.cuh"
#include "bwd_rows_linear.cuh"
#include "bwd_tiles.cuh"
#include "soft_map.cuh"

namespace sla2 {
namespace {

// Adds the share of 32 keys; `valid` of them exist. row_sums gathers the rows of dS as rounded,
// with kSoft block_sum the lane's part of dS. The rows' statistics stay in shared memory: in
// registers they would push others out.
template <class C, bool kSoft>
__device__ __forceinline__ void accumulate_keys(float (&dq)[C::kTilesM][C::kTilesD][4],
                                                float (&row_sums)[C::kTilesM][4], float& block_sum,
                                                const float* row_shift, const float* row_delta,
                                                uint32_t q_tile, uint32_t grad_tile,
                                                uint32_t k_tile, uint32_t v_tile, float scale_log2,
                                                float log2_weight, int valid) {
  using Element = typename C::Element;
  float s[C::kTilesM][C::kTilesN][4] = {}, dp[C::kTilesM][C::kTilesN][4];
  multiply_nt<Element, Element, C::kWideRowBytes>(s, q_tile, C::tile_row(0), k_tile, 0);
  if (valid < C::kStepKeys) mask_columns(s, valid);
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = RowState<C>::row(m, half);
      const float delta = row_delta[row];
      float shift = row_shift[row];
      if constexpr (kSoft) shift -= log2_weight;
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& p = s[m][n][2 * half + e];
          p = exp2_approx(fmaf(p, scale_log2, -shift));
          dp[m][n][2 * half + e] = -delta;
        }
      }
    }
  }
  multiply_nt<Element, Element, C::kWideRowBytes>(dp, grad_tile, C::tile_row(0), v_tile, 0);
  const uint32_t ones = Pair<Element>::from_floats(1.f, 1.f);
#pragma unroll
  for (int k = 0; k < C::kStepKeys / 16; ++k) {
    uint32_t ds[C::kTilesM][4];
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {  // rows + 8 (r % 2), keys 16 k + 8 (r / 2)
        const int n = 2 * k + r / 2, i = r % 2 * 2;
        const float x = s[m][n][i] * dp[m][n][i], y = s[m][n][i + 1] * dp[m][n][i + 1];
        ds[m][r] = Pair<Element>::from_floats(x, y);
        if constexpr (kSoft) block_sum += x + y;
      }
      mma<Element>(row_sums[m], ds[m], ones, ones);
    }
    multiply_step<Element, Element, C::kWideRowBytes>(dq, ds, k_tile, 16 * k, 0);
  }
}

// d alpha_logit of the rows, per token or summed over the block. dot: <dO, O_l>.
template <class C>
__device__ __forceinline__ void store_alpha_gradient(const AttnBwdParams& p, int bh, int block,
                                                     int rows, const RowState<C>& state,
                                                     const float* row_delta,
                                                     const float (&dot)[C::kTilesM][2],
                                                     float* warp_sums) {
  const int lane = threadIdx.x % 32;
  float sum = 0.f;
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = state.row(m, half);
      if (row >= rows || lane % 4 != 0) continue;
      const float slope = state.rest[m][half] * (1.f - state.rest[m][half]);
      // A branch that is missing has no gradient, whatever its dot product.
      const float grad = slope == 0.f ? 0.f : (row_delta[row] - dot[m][half]) * slope;
      sum += grad;
      if (p.alpha_per_token) {
        p.alpha_partial[static_cast<int64_t>(bh) * p.shape.seqlen + block * kBlockQ + row] = grad;
      }
    }
  }
  if (p.alpha_per_token) return;
  sum = lane_sum<32>(sum);
  if (lane == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < C::kWarps; ++warp) total += warp_sums[warp];
    p.alpha_partial[static_cast<int64_t>(bh) * p.shape.num_q_blocks + block] = total;
  }
}

template <typename Element, int kHeadDim, bool kSoft>
__global__ void __launch_bounds__(kBwdThreads, 2)
    bwd_rows_kernel(const __grid_constant__ AttnBwdParams p) {
  using C = BwdRowConfig<Element, kHeadDim>;
  extern __shared__ __align__(128) char smem[];
  __shared__ __align__(16) float z[2 * kHeadDim];
  __shared__ __align__(16) float dots[kBlockQ];
  __shared__ float row_shift[kBlockQ], row_delta[kBlockQ];
  __shared__ float warp_sums[C::kWarps];

  const int block = blockIdx.x % p.shape.num_q_blocks;
  const int local_bh = blockIdx.x / p.shape.num_q_blocks, bh = p.bh_begin + local_bh;
  const int row0 = block * kBlockQ, rows = min(kBlockQ, p.shape.seqlen - row0);
  const int num_k_blocks = p.shape.num_k_blocks;
  const int64_t list = static_cast<int64_t>(bh) * p.shape.num_q_blocks + block;
  const int64_t local_list = static_cast<int64_t>(blockIdx.x);
  const uint16_t* lut = p.lut + list * p.max_kv_blocks;
  const int listed = p.counts[list];
  const int count = p.branch == SLA2_BRANCH_LINEAR ? 0 : listed;
  bool complement = listed < num_k_blocks;
  if constexpr (kSoft) {
    complement = !covers_all<C::kThreads>(p.soft_map + list * num_k_blocks, num_k_blocks);
  }
  const bool linear = p.h != nullptr && complement;
  const uint32_t q_tile = smem_address(smem), grad_tile = q_tile + C::kQueryBytes;
  const uint32_t ring = grad_tile + C::kQueryBytes;
  char* ring_bytes = smem + 2 * C::kQueryBytes;

  // Prologue: Q, dO, H, Z
  load_wide_rows<C, kBlockQ>(q_tile,
                             head_base<Element>(p.q, bh, p.shape.num_heads) +
                                 static_cast<int64_t>(row0) * p.q.stride_token,
                             p.q.stride_token, rows);
  load_wide_rows<C, kBlockQ>(grad_tile,
                             head_base<Element>(p.grad_out, bh, p.shape.num_heads) +
                                 static_cast<int64_t>(row0) * p.grad_out.stride_token,
                             p.grad_out.stride_token, rows);
  if (linear) {
    load_wide_rows<C, kHeadDim>(ring, p.h + local_list * kHeadDim * kHeadDim, kHeadDim, kHeadDim);
    if (threadIdx.x < 2 * kHeadDim / 4) {
      cp_async_16(smem_address(z) + threadIdx.x * 16,
                  p.z + local_list * 2 * kHeadDim + threadIdx.x * 4);
    }
  }
  cp_async_commit();
  RowState<C> state;
  state.load(p, bh, row0, rows);
  cp_async_wait<0>();
  __syncthreads();
  state.compute(p, bh, block, rows, listed > 0, complement, smem, smem + C::kQueryBytes);
  if (p.branch != SLA2_BRANCH_LINEAR) {
    state.store(row_shift, row_delta);
    state.store(p.row_shift + local_list * kBlockQ, p.row_delta + local_list * kBlockQ);
  }

  // Linear branch
  float dq[C::kTilesM][C::kTilesD][4] = {};
  float dot[C::kTilesM][2] = {};
  uint16_t* dstate = p.dstate_q + local_list * state_elements(kHeadDim);
  if (linear) {
    linear_queries<C>(dq, dot, state, smem, grad_tile, ring_bytes, z, dots, 1.f / p.softmax_scale);
    store_state_gradient<C>(dstate, ring, grad_tile, dots);
  } else if (p.h != nullptr) {  // the product that sums these gradients multiplies this one by zero
    for (int i = threadIdx.x; i < state_elements(kHeadDim) / 8; i += C::kThreads) {
      reinterpret_cast<uint4*>(dstate)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  if (p.alpha_partial != nullptr) {
    store_alpha_gradient<C>(p, bh, block, rows, state, row_delta, dot, warp_sums);
  }
  __syncthreads();  // the ring is free

  // Sparse branch
  const TileLoader<C, C::kStepKeys> k(p.k, bh, p.shape.num_heads), v(p.v, bh, p.shape.num_heads);
  const int steps = 2 * count;
  auto first_key = [&](int step) { return lut[step / 2] * kBlockK + step % 2 * C::kStepKeys; };
  auto load_step = [&](int step) {
    if (step < steps) {
      const uint32_t tile = ring + step % C::kStages * C::kStageBytes;
      const int key = first_key(step);
      k.load(tile, key, p.k.stride_token, p.shape.seqlen);
      v.load(tile + C::kKeyBytes, key, p.v.stride_token, p.shape.seqlen);
    }
    cp_async_commit();
  };
  // By one thread, a barrier after the warps have left their sums and one before they leave others.
  auto store_block_sum = [&](int position) {
    if (threadIdx.x != 0) return;
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < C::kWarps; ++warp) total += warp_sums[warp];
    p.grad_log_map[list * num_k_blocks + lut[position]] = total;
  };
  const float scale_log2 = p.softmax_scale * kLog2e;
  float row_sums[C::kTilesM][4] = {};
  float block_sum = 0.f;
  load_step(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    float weight = 1.f;
    if constexpr (kSoft) weight = __ldg(p.soft_map + list * num_k_blocks + lut[step / 2]);
    cp_async_wait<0>();
    __syncthreads();
    load_step(step + 1);
    if constexpr (kSoft) {
      if (step % 2 == 0 && step > 0) store_block_sum(step / 2 - 1);
    }
    const uint32_t k_tile = ring + step % C::kStages * C::kStageBytes;
    accumulate_keys<C, kSoft>(dq, row_sums, block_sum, row_shift, row_delta, q_tile, grad_tile,
                              k_tile, k_tile + C::kKeyBytes, scale_log2, log2_approx(weight),
                              p.shape.seqlen - first_key(step));
    if constexpr (kSoft) {
      if (step % 2 == 1) {
        block_sum = lane_sum<32>(block_sum);
        if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = block_sum;
        block_sum = 0.f;
      }
    }
  }
  if constexpr (kSoft) {
    __syncthreads();
    if (count > 0) store_block_sum(count - 1);
  }

  // K was raw: dS (K - 1 mean^T) = dS K - rowsum(dS) mean^T.
  const float* mean = p.k_mean + static_cast<int64_t>(bh) * kHeadDim + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < C::kTilesD; ++n) {
    const float2 x = __ldg(reinterpret_cast<const float2*>(mean + 8 * n));
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dq[m][n][i] -= row_sums[m][i / 2 * 2] * (i % 2 == 0 ? x.x : x.y);
      }
    }
  }
  // The warp's own rows of Q, read by no other warp, stage its output.
  char* staging = smem + C::tile_row(0) * C::kWideRowBytes;
  store_rows<C>(
      dq, p.dq, bh, p.shape.num_heads, row0, rows, staging,
      [&](int, int) { return p.softmax_scale; }, nullptr);
}

}  // namespace

cudaError_t launch_bwd_rows_sm80(const AttnBwdParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    using C = BwdRowConfig<typename I::Element, I::kHeadDim>;
    const auto kernel = p.soft_map == nullptr
                            ? bwd_rows_kernel<typename I::Element, I::kHeadDim, false>
                            : bwd_rows_kernel<typename I::Element, I::kHeadDim, true>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
    if (status != cudaSuccess) return status;
    kernel<<<p.bh_count * p.shape.num_q_blocks, C::kThreads, C::kSmemBytes, p.stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace sla2
