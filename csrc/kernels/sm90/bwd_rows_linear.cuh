// The linear branch's share of the backward pass by query block (sm80/bwd_rows_linear.cuh tells the
// arithmetic): G = dO H^T, d = (e . G) / (e Z), dQ = w (G - d Z^T), dH = w^T dO, dZ = -w^T d.
#pragma once

#include <type_traits>

#include "bwd_rows_state.cuh"
#include "row_store.cuh"

namespace sla2 {

// The barrier of the warps that compute; 0 is __syncthreads'.
constexpr int kBwdRowBarrier = 1;

// acc = G of the warp's rows, dot = <dO, O_l>, weight = rest / (e Z). e (bfloat16) takes the place
// of Q in shared memory, where fp16 dO becomes bfloat16.
template <class C>
__device__ __forceinline__ void linear_dots(float (&acc)[C::kTilesD][4], float (&dot)[2],
                                            float (&weight)[2], const RowStateSm90<C>& state,
                                            const Fragments<C>& grad, typename C::Smem& smem) {
  using Element = typename C::Element;
  using P = Pair<__nv_bfloat16>;
  constexpr bool kConvert = !std::is_same_v<Element, __nv_bfloat16>;
  auto& flat = reinterpret_cast<float (&)[C::kTilesD * 4]>(acc);

  uint32_t operand[C::kSteps][4];
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      operand[step][i] = grad[step][i];
      if constexpr (kConvert) {
        const float2 x = Pair<Element>::to_float2(grad[step][i]);
        operand[step][i] = P::from_floats(x.x, x.y);
      }
    }
    if constexpr (kConvert) {
      stmatrix_x4(fragment_address<C>(smem.grad, step), operand[step]);
    }
  }
  const uint64_t h = wgmma_descriptor(uniform(smem_address(smem.state)), 0, 1024, Swizzle::k128);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    WgmmaNt<__nv_bfloat16>::mma(flat, operand[step],
                                advance(h, step / 4 * C::kHeadDim * 128 + step % 4 * 32), step > 0);
  }
  wgmma_commit();

  // In the shadow of the product. A loop over Q in shared memory: unrolled, over the fragments, it
  // spilled registers.
  float denominator[2] = {};
#pragma unroll 2
  for (int step = 0; step < C::kSteps; ++step) {
    const uint32_t address = fragment_address<C>(smem.query, step);
    uint32_t e[4];
    ldmatrix_x4(e, address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 sum = feature_sums<C>(smem.z, 2 * step + i / 2);
      e[i] = query_features<Element>(e[i], state.offset[i % 2]);
      const float2 x = P::to_float2(e[i]);
      denominator[i % 2] += x.x * sum.x + x.y * sum.y;
    }
    stmatrix_x4(address, e);
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    weight[half] = reciprocal_approx(max_nan(lane_sum<4>(denominator[half]), kMinDenominator));
    dot[half] = 0.f;
  }
  wgmma_wait<0>();
  pin(flat);

#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    uint32_t e[4];
    ldmatrix_x4(e, fragment_address<C>(smem.query, step));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * step + i / 2, half = i % 2;
      const float2 x = P::to_float2(e[i]);
      dot[half] += x.x * acc[n][2 * half] + x.y * acc[n][2 * half + 1];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    dot[half] = lane_sum<4>(dot[half]) * weight[half];
    weight[half] *= state.rest[half];
  }
}

// w = weight e (bfloat16) to H's place.
template <class C>
__device__ __forceinline__ void store_weights(const float (&weight)[2], typename C::Smem& smem) {
  using P = Pair<__nv_bfloat16>;
#pragma unroll 2
  for (int step = 0; step < C::kSteps; ++step) {
    uint32_t w[4];
    ldmatrix_x4(w, fragment_address<C>(smem.query, step));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 e = P::to_float2(w[i]);
      w[i] = P::from_floats(e.x * weight[i % 2], e.y * weight[i % 2]);
    }
    stmatrix_x4(fragment_address<C>(smem.state, step), w);
  }
}

// acc = dQ / scale = w (G - d Z^T) / scale in place of G, with w as it is before rounding.
template <class C>
__device__ __forceinline__ void linear_queries(float (&acc)[C::kTilesD][4], const float (&dot)[2],
                                               const float (&weight)[2],
                                               const typename C::Smem& smem, float inverse_scale) {
  const float factor[2] = {weight[0] * inverse_scale, weight[1] * inverse_scale};
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    uint32_t e[4];
    ldmatrix_x4(e, fragment_address<C>(smem.query, step));
    __syncwarp();  // keeps ptxas from starting so many reads at once that registers spill
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * step + i / 2, half = i % 2;
      const float2 sum = feature_sums<C>(smem.z, n);
      const float2 pair = Pair<__nv_bfloat16>::to_float2(e[i]);
      float& x = acc[n][2 * half];
      float& y = acc[n][2 * half + 1];
      x = pair.x * factor[half] * (x - dot[half] * sum.x);
      y = pair.y * factor[half] * (y - dot[half] * sum.y);
    }
  }
}

// -w^T d of the warp's 16 features to dz, as a high part [D] and a low part [D]. A lane sums every
// fourth pair of rows of two features: the rows that lanes read together differ in their swizzle,
// which keeps the banks apart.
template <class C>
__device__ __forceinline__ void store_z_gradient(uint16_t* dz, const typename C::Smem& smem) {
  const int lane = threadIdx.x % 32, feature = C::tile_row(0) + lane % 8 * 2;
  const char* w_tile = smem.state + feature / kPanel * C::kPanelBytes + feature % 8 * 2;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll 8
  for (int i = 0; i < kBlockQ / 4; ++i) {
    const int row = i / 2 * 8 + lane / 8 * 2 + i % 2;
    const float2 w = Pair<__nv_bfloat16>::to_float2(
        *reinterpret_cast<const uint32_t*>(w_tile + swizzle<128>(row, feature % kPanel / 8)));
    const float d = smem.dots[row];
    sum.x = fmaf(w.x, -d, sum.x);
    sum.y = fmaf(w.y, -d, sum.y);
  }
#pragma unroll
  for (int step = 8; step < 32; step *= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
  }
  if (lane >= 8) return;
  const uint32_t high = Pair<__nv_bfloat16>::from_floats(sum.x, sum.y);
  const float2 rounded = Pair<__nv_bfloat16>::to_float2(high);
  *reinterpret_cast<uint32_t*>(dz + feature) = high;
  *reinterpret_cast<uint32_t*>(dz + C::kHeadDim + feature) =
      Pair<__nv_bfloat16>::from_floats(sum.x - rounded.x, sum.y - rounded.y);
}

// dH, 64 features a warpgroup, and dZ of the same features: issue, then what fits its shadow. The
// first 64 alone exist at D = 64: the second warpgroup makes them too, as products under a
// condition would be serialised, and stores nothing.
template <class C>
__device__ __forceinline__ void state_gradient(float (&acc)[C::kTilesD][4], uint16_t* dz,
                                               const typename C::Smem& smem, int group) {
  const uint64_t w =
      wgmma_descriptor(uniform(smem_address(smem.state)) + group % C::kPanels * C::kPanelBytes,
                       C::kPanelBytes, 1024, Swizzle::k128);
  const uint64_t grad =
      wgmma_descriptor(uniform(smem_address(smem.grad)), C::kPanelBytes, 1024, Swizzle::k128);
  auto& flat = reinterpret_cast<float (&)[C::kTilesD * 4]>(acc);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kBlockQ / 16; ++step) {
    Wgmma16<__nv_bfloat16, true, true>::mma(flat, advance(w, 2048 * step),
                                            advance(grad, 2048 * step), step > 0);
  }
  wgmma_commit();
  if (group < C::kPanels) store_z_gradient<C>(dz, smem);
  wgmma_wait<0>();
  pin(flat);
}

// d alpha_logit of the warp's rows, per token or, summed, to `warp_sum`. dot: <dO, O_l>.
template <class C>
__device__ __forceinline__ void alpha_gradient(const AttnBwdParams& p, const RowTile& tile,
                                               const RowStateSm90<C>& state, const float (&dot)[2],
                                               float* warp_sum) {
  float sum = 0.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = state.row(half);
    if (row >= tile.rows || threadIdx.x % 4 != 0) continue;
    const float slope = state.rest[half] * (1.f - state.rest[half]);
    // A branch that is missing has no gradient, whatever its dot product.
    const float grad = slope == 0.f ? 0.f : (state.delta[half] - dot[half]) * slope;
    sum += grad;
    if (p.alpha_per_token) {
      p.alpha_partial[static_cast<int64_t>(tile.bh) * p.shape.seqlen + tile.row0 + row] = grad;
    }
  }
  sum = lane_sum<32>(sum);
  if (threadIdx.x % 32 == 0) *warp_sum = sum;
}

// The branch as a whole; acc as of linear_queries. Without a complement its gradients are zero: the
// product that sums dH and dZ multiplies theirs by zero.
template <class C>
__device__ __forceinline__ void linear_branch(const AttnBwdParams& p, const BwdRowMaps& maps,
                                              const RowTile& tile, typename C::Smem& smem,
                                              float (&acc)[C::kTilesD][4],
                                              const RowStateSm90<C>& state,
                                              const Fragments<C>& grad, bool linear, int group) {
  const int warp = threadIdx.x / 32;
  constexpr int kElements = state_elements(C::kHeadDim);
  uint16_t* dstate = p.dstate_q + static_cast<int64_t>(tile.local) * kElements;
  float* alpha_sum =
      p.alpha_partial == nullptr || p.alpha_per_token
          ? nullptr
          : p.alpha_partial + static_cast<int64_t>(tile.bh) * p.shape.num_q_blocks + tile.block;
  if (linear) {
    float dot[2], weight[2];
    linear_dots<C>(acc, dot, weight, state, grad, smem);
    if (threadIdx.x % 4 == 0) {
      smem.dots[state.row(0)] = dot[0];
      smem.dots[state.row(1)] = dot[1];
    }
    if (p.alpha_partial != nullptr) {
      alpha_gradient<C>(p, tile, state, dot, &smem.warp_sums[warp]);
    }
    linear_queries<C>(acc, dot, weight, smem, 1.f / p.softmax_scale);
    named_barrier(kBwdRowBarrier, C::kWarps * 32);  // H is read
    store_weights<C>(weight, smem);
    fence_async_shared();  // w, and dO in bfloat16
    named_barrier(kBwdRowBarrier, C::kWarps * 32);
    if (alpha_sum != nullptr && threadIdx.x == 0) {
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < C::kWarps; ++i) total += smem.warp_sums[i];
      *alpha_sum = total;
    }
    float dstate_acc[C::kTilesD][4];
    state_gradient<C>(dstate_acc, dstate + C::kHeadDim * C::kHeadDim, smem, group);
    // The warp's rows of e stage its rows of dH.
    if (group < C::kPanels) {
      store_rows<BwdStateStore<C::kHeadDim>>(dstate_acc, smem.query, &maps.dstate, 0, tile.local, 0,
                                             [](int, int, int) { return 1.f; });
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < C::kTilesD; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;
  }
  if (p.h == nullptr) return;
  for (int i = threadIdx.x; i < kElements / 8; i += C::kWarps * 32) {
    reinterpret_cast<uint4*>(dstate)[i] = make_uint4(0, 0, 0, 0);
  }
  if (p.alpha_partial == nullptr) return;
  if (alpha_sum != nullptr) {
    if (threadIdx.x == 0) *alpha_sum = 0.f;
  } else if (threadIdx.x < tile.rows) {
    p.alpha_partial[static_cast<int64_t>(tile.bh) * p.shape.seqlen + tile.row0 + threadIdx.x] = 0.f;
  }
}

}  // namespace sla2
