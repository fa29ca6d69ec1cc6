// Backward pass by key block, portable schedule (mma.sync + cp.async): dK and dV.
//
// One CTA: one key block of one head and the query blocks that list it, or a part of these, in
// steps of 64 queries:
//   S^T = K Q^T, alpha P^T = 2^(S^T - shift), dP^T = V dO^T - delta, dS^T = alpha P^T dP^T,
//   dK += dS^T Q, dV += alpha P^T dO.
// With a soft map S^T has log m added.
// The part of a cut column that is last to finish adds all parts' sums, in the order of the parts,
// and does what follows: the linear branch's share, and the store.
#include "../common/dispatch.h"
#include "attn_sparse.cuh"
#include "bwd_columns_linear.cuh"
#include "bwd_config.cuh"
#include "bwd_tiles.cuh"

namespace sla2 {
namespace {

// dP^T before its product: minus delta of the warp's queries.
template <class C>
__device__ __forceinline__ void init_score_gradient(float (&dp)[C::kTilesM][C::kTilesN][4],
                                                    const float* delta) {
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    const float2 x = *reinterpret_cast<const float2*>(delta + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[m][n][i] = i % 2 == 0 ? -x.x : -x.y;
    }
  }
}

// alpha P^T and dS^T of the warp's 32 keys by 32 queries, as 16-bit operands, to shared memory.
// shift: of the warp's queries; log2_weight: log2 m of the two blocks, with kSoft.
template <class C, bool kSoft>
__device__ __forceinline__ void store_scores(const float (&s)[C::kTilesM][C::kTilesN][4],
                                             const float (&dp)[C::kTilesM][C::kTilesN][4],
                                             const float* shift, float scale_log2,
                                             float log2_weight, int row0, int tile0, char* p_tile,
                                             char* ds_tile) {
  using Element = typename C::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float2 x = *reinterpret_cast<const float2*>(shift + 8 * n + lane % 4 * 2);
    if constexpr (kSoft) x = make_float2(x.x - log2_weight, x.y - log2_weight);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float p0 = exp2_approx(fmaf(s[m][n][2 * half], scale_log2, -x.x));
        const float p1 = exp2_approx(fmaf(s[m][n][2 * half + 1], scale_log2, -x.y));
        const int at =
            pair_offset<C::kScoreRowBytes>(row0 + 16 * m + 8 * half + lane / 4, tile0 + n);
        *reinterpret_cast<uint32_t*>(p_tile + at) = Pair<Element>::from_floats(p0, p1);
        *reinterpret_cast<uint32_t*>(ds_tile + at) =
            Pair<Element>::from_floats(p0 * dp[m][n][2 * half], p1 * dp[m][n][2 * half + 1]);
      }
    }
  }
}

// The accumulators of a part, to or from its slot.
template <class C, typename Visit>
__device__ __forceinline__ void for_each_vector(Visit visit) {
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < C::kTilesD; ++n) {
      visit(m, n, (m * C::kTilesD + n) * C::kThreads + static_cast<int>(threadIdx.x));
    }
  }
}

__device__ __forceinline__ float4 as_vector(const float (&x)[4]) {
  return make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void add(float (&x)[4], const float4& y) {
  x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
}

// Leaves a part's sums. The part that is last to arrive gets the sum of all in its accumulators and
// true. No part waits for another.
template <class C>
__device__ __forceinline__ bool merge_parts(ColumnAcc<C>& dk, ColumnAcc<C>& dv, float4* slots,
                                            int part, int parts, int* arrived) {
  __shared__ bool is_last;
  float4* own = slots + static_cast<int64_t>(part) * C::kSlotVectors;
  for_each_vector<C>([&](int m, int n, int index) {
    own[index] = as_vector(dk[m][n]);
    own[C::kSlotVectors / 2 + index] = as_vector(dv[m][n]);
  });
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1) == parts - 1;
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  for_each_vector<C>([&](int m, int n, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dk[m][n][i] = dv[m][n][i] = 0.f;
  });
#pragma unroll 1
  for (int i = 0; i < parts; ++i) {
    const float4* slot = slots + static_cast<int64_t>(i) * C::kSlotVectors;
    for_each_vector<C>([&](int m, int n, int index) {
      add(dk[m][n], __ldcg(slot + index));
      add(dv[m][n], __ldcg(slot + C::kSlotVectors / 2 + index));
    });
  }
  return true;
}

template <typename Element, int kHeadDim, bool kSoft>
__global__ void __launch_bounds__(kBwdThreads, 2)
    bwd_columns_kernel(const __grid_constant__ AttnBwdParams p) {
  using C = BwdColumnConfig<Element, kHeadDim>;
  extern __shared__ __align__(128) char smem[];
  // Statistics of the queries of two steps
  __shared__ __align__(16) float shift[2][C::kStepQueries], delta[2][C::kStepQueries];
  __shared__ float row_dots[2 * kBlockK];
  __shared__ __align__(16) float column_sums[2 * kHeadDim];

  const int local_bh = blockIdx.x / p.columns.num_items, bh = p.bh_begin + local_bh;
  const uint32_t item =
      p.columns.items[static_cast<int64_t>(p.bh_begin) * p.columns.num_items + blockIdx.x];
  if (item == kNoItem) return;
  const int column = item & 0xffffu, part = item >> 16;
  const int64_t index = static_cast<int64_t>(bh) * p.shape.num_k_blocks + column;
  const int count = p.branch == SLA2_BRANCH_LINEAR ? 0 : p.columns.counts[index];
  const int slot = p.columns.slots[index];
  const int parts = slot < 0 ? 1 : (count + p.columns.split_blocks - 1) / p.columns.split_blocks;
  const int begin = count * part / parts, end = count * (part + 1) / parts;
  const uint16_t* list = p.columns.rows + bh * p.columns.rows_per_head + p.columns.offsets[index];
  const int token0 = column * kBlockK, valid = min(kBlockK, p.shape.seqlen - token0);

  const uint32_t k_tile = smem_address(smem), v_tile = k_tile + C::kTileBytes;
  const uint32_t ring = v_tile + C::kTileBytes;
  char* p_bytes = smem + (2 + C::kRingTiles) * C::kTileBytes;
  char* ds_bytes = p_bytes + C::kScoreBytes;
  const uint32_t p_tile = smem_address(p_bytes), ds_tile = p_tile + C::kScoreBytes;

  // The last block alone may be short, and lists ascend: of its two steps one may have no query.
  int steps = 2 * (end - begin);
  if (steps > 0) {
    const int last = list[end - 1];
    if (p.shape.seqlen - last * kBlockQ <= C::kStepQueries) --steps;
  }
  auto first_query = [&](int step) {
    return list[begin + step / 2] * kBlockQ + step % 2 * C::kStepQueries;
  };
  // Q is number 2 step of the tiles that pass through the ring, dO is number 2 step + 1.
  auto ring_tile = [&](int number) { return ring + number % C::kRingTiles * C::kTileBytes; };
  using Loader = TileLoader<C, C::kStepQueries>;
  const Loader q(p.q, bh, p.shape.num_heads), grad_out(p.grad_out, bh, p.shape.num_heads);
  auto load_queries = [&](int step) {
    if (step < steps) {
      const int token = first_query(step);
      q.load(ring_tile(2 * step), token, p.q.stride_token, p.shape.seqlen);
      // Rows past the end have statistics of their own, with which P and dS are zero.
      constexpr int kVectors = C::kStepQueries / 4;
      if (threadIdx.x < 2 * kVectors) {
        const bool is_shift = threadIdx.x < kVectors;
        const int offset = threadIdx.x % kVectors * 4;
        const int64_t row =
            static_cast<int64_t>(local_bh) * p.shape.num_q_blocks * kBlockQ + token + offset;
        cp_async_16(smem_address(is_shift ? shift[step % 2] : delta[step % 2]) + offset * 4,
                    (is_shift ? p.row_shift : p.row_delta) + row);
      }
    }
    cp_async_commit();
  };
  auto load_grads = [&](int step) {
    if (step < steps) {
      grad_out.load(ring_tile(2 * step + 1), first_query(step), p.grad_out.stride_token,
                    p.shape.seqlen);
    }
    cp_async_commit();
  };

  static_assert(kBlockK == C::kStepQueries, "one loader for all");
  Loader(p.k, bh, p.shape.num_heads).load(k_tile, token0, p.k.stride_token, p.shape.seqlen);
  Loader(p.v, bh, p.shape.num_heads).load(v_tile, token0, p.v.stride_token, p.shape.seqlen);
  load_queries(0);
  load_grads(0);

  const ColumnPlace<C> place;
  const int query0 = place.half * (C::kStepQueries / 2);  // S^T, dP^T: 32 keys by half the queries
  const float scale_log2 = p.softmax_scale * kLog2e;
  ColumnAcc<C> dk = {}, dv = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const uint32_t q_tile = ring_tile(2 * step), grad_tile = ring_tile(2 * step + 1);
    float s[C::kTilesM][C::kTilesN][4] = {}, dp[C::kTilesM][C::kTilesN][4];
    float weight = 1.f;
    if constexpr (kSoft) {
      const int64_t row = static_cast<int64_t>(bh) * p.shape.num_q_blocks + list[begin + step / 2];
      weight = __ldg(p.soft_map + row * p.shape.num_k_blocks + column);
    }
    cp_async_wait<1>();  // all but dO
    __syncthreads();
    load_queries(step + 1);  // where the dO before this one was
    multiply_nt<Element, Element, C::kWideRowBytes>(s, k_tile, place.row0, q_tile, query0);
    cp_async_wait<1>();  // all but the next Q
    __syncthreads();
    init_score_gradient<C>(dp, delta[step % 2] + query0);
    multiply_nt<Element, Element, C::kWideRowBytes>(dp, v_tile, place.row0, grad_tile, query0);
    store_scores<C, kSoft>(s, dp, shift[step % 2] + query0, scale_log2, log2_approx(weight),
                           place.row0, query0 / 8, p_bytes, ds_bytes);
    __syncthreads();
    multiply_nn<Element, C::kScoreRowBytes, C::kWideRowBytes>(dk, ds_tile, place.row0, q_tile,
                                                              place.channel0);
    __syncthreads();  // Q may be overwritten
    load_grads(step + 1);
    multiply_nn<Element, C::kScoreRowBytes, C::kWideRowBytes>(dv, p_tile, place.row0, grad_tile,
                                                              place.channel0);
  }
  cp_async_wait<0>();
  if (parts > 1) {
    float4* partials =
        reinterpret_cast<float4*>(p.partials) +
        (static_cast<int64_t>(local_bh) * p.columns.num_slots + slot) * C::kSlotVectors;
    if (!merge_parts<C>(dk, dv, partials, part, parts, p.columns.arrived + index)) return;
  }

  const bool linear = p.dh != nullptr;
  const int64_t local_index = static_cast<int64_t>(local_bh) * p.shape.num_k_blocks + column;
  const uint32_t dh_tile = ring;
  char* staging = smem + 4 * C::kTileBytes;  // the ring's third tile
  __syncthreads();  // every warp is done with the tiles that dh and phi(K) replace
  if (linear) {
    load_wide_rows<C, kHeadDim>(dh_tile, p.dh + local_index * kHeadDim * kHeadDim, kHeadDim,
                                kHeadDim);
    cp_async_commit();
    const float* mean = p.phi_raw_k ? nullptr : p.k_mean + static_cast<int64_t>(bh) * kHeadDim;
    make_features<C>(p_bytes, smem, mean, valid);
    cp_async_wait<0>();
    __syncthreads();
    add_value_gradient<C>(dv, p_tile, dh_tile);
  }
  store_keys<C>(dv, p.dv, bh, p.shape.num_heads, token0, valid, staging);

#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < C::kTilesD; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[m][n][i] *= p.softmax_scale;
    }
  }
  // Smoothing's gradient centres all of dK, or with phi of raw K the sparse branch's share alone.
  auto store_sums = [&] {
    if (p.dk_sum != nullptr) {
      store_column_sums<C>(dk, valid, column_sums, p.dk_sum + index * kHeadDim);
    }
  };
  if (linear) {
    if (p.phi_raw_k) store_sums();
    key_feature_gradient<C>(dv, p_bytes, v_tile, dh_tile, p.dz + local_index * 2 * kHeadDim,
                            row_dots);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < C::kTilesD; ++n) add(dk[m][n], as_vector(dv[m][n]));
    }
  }
  if (!linear || !p.phi_raw_k) store_sums();
  store_keys<C>(dk, p.dk, bh, p.shape.num_heads, token0, valid, staging);
}

}  // namespace

cudaError_t launch_bwd_columns_sm80(const AttnBwdParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    using C = BwdColumnConfig<typename I::Element, I::kHeadDim>;
    const auto kernel = p.soft_map == nullptr
                            ? bwd_columns_kernel<typename I::Element, I::kHeadDim, false>
                            : bwd_columns_kernel<typename I::Element, I::kHeadDim, true>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
    if (status != cudaSuccess) return status;
    kernel<<<p.bh_count * p.columns.num_items, C::kThreads, C::kSmemBytes, p.stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace sla2
