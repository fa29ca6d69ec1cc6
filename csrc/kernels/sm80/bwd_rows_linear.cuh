// The linear branch's share of the pass by query block. With e = exp(q - max q), b = 1 - alpha and
//   G = dO H^T,  den = e Z,  d = <dO, O_l> = (e . G) / den,  w = b e / den
// the gradients are
//   dQ = w * (G - d Z^T),   dH = w^T dO,   dZ = -w^T d.
// phi's normaliser cancels in O_l, so dQ needs neither it nor the softmax's projection: w is
// perpendicular to G - d Z^T already.
#pragma once

#include "bwd_config.cuh"
#include "bwd_row_state.cuh"
#include "bwd_tiles.cuh"

namespace sla2 {

// e of the lane's pair of features in tile n, rounded to bfloat16 as in the forward pass.
template <class C>
__device__ __forceinline__ float2 query_features(const char* q_tile, int row, int n, float offset) {
  const float2 q = Pair<typename C::Element>::to_float2(
      *reinterpret_cast<const uint32_t*>(q_tile + pair_offset<C::kWideRowBytes>(row, n)));
  return Pair<__nv_bfloat16>::to_float2(Pair<__nv_bfloat16>::from_floats(
      exp2_approx(fmaf(q.x, kLog2e, offset)), exp2_approx(fmaf(q.y, kLog2e, offset))));
}

// The lane's pair of Z; z: high part [D], low part [D].
template <class C>
__device__ __forceinline__ float2 feature_sums(const float* z, int n) {
  const int feature = 8 * n + threadIdx.x % 4 * 2;
  const float2 high = *reinterpret_cast<const float2*>(z + feature);
  const float2 low = *reinterpret_cast<const float2*>(z + C::kHeadDim + feature);
  return make_float2(high.x + low.x, high.y + low.y);
}

// acc = dQ / scale of the warp's rows; w (bfloat16) replaces H in the ring, d goes to dots [128].
// Ends with a barrier.
template <class C>
__device__ __forceinline__ void linear_queries(float (&acc)[C::kTilesM][C::kTilesD][4],
                                               float (&dot)[C::kTilesM][2],
                                               const RowState<C>& state, const char* q_tile,
                                               uint32_t grad_tile, char* ring, const float* z,
                                               float* dots, float inverse_scale) {
  multiply_nt<__nv_bfloat16, typename C::Element, C::kWideRowBytes>(acc, grad_tile, C::tile_row(0),
                                                                    smem_address(ring), 0);

  float denominator[C::kTilesM][2] = {};
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) dot[m][0] = dot[m][1] = 0.f;
#pragma unroll
  for (int n = 0; n < C::kTilesD; ++n) {
    const float2 sum = feature_sums<C>(z, n);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 e = query_features<C>(q_tile, state.row(m, half), n, state.offset[m][half]);
        denominator[m][half] += e.x * sum.x + e.y * sum.y;
        dot[m][half] += e.x * acc[m][n][2 * half] + e.y * acc[m][n][2 * half + 1];
      }
    }
  }
  float weight[C::kTilesM][2];
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = max_nan(lane_sum<4>(denominator[m][half]), kMinDenominator);
      const float inverse = reciprocal_approx(total);
      weight[m][half] = state.rest[m][half] * inverse;
      dot[m][half] = lane_sum<4>(dot[m][half]) * inverse;
      if (threadIdx.x % 4 == 0) dots[state.row(m, half)] = dot[m][half];
    }
  }

  __syncthreads();  // every warp has read H
#pragma unroll
  for (int n = 0; n < C::kTilesD; ++n) {
    const float2 sum = feature_sums<C>(z, n);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = state.row(m, half);
        float2 w = query_features<C>(q_tile, row, n, state.offset[m][half]);
        w.x *= weight[m][half];
        w.y *= weight[m][half];
        *reinterpret_cast<uint32_t*>(ring + pair_offset<C::kWideRowBytes>(row, n)) =
            Pair<__nv_bfloat16>::from_floats(w.x, w.y);
        float& x = acc[m][n][2 * half];
        float& y = acc[m][n][2 * half + 1];
        x = w.x * inverse_scale * (x - dot[m][half] * sum.x);
        y = w.y * inverse_scale * (y - dot[m][half] * sum.y);
      }
    }
  }
  __syncthreads();
}

// dH = w^T dO and dZ = -w^T d to `state`, a quarter of the features each warp. 32 channels at a
// time: dQ sits in the registers meanwhile.
template <class C>
__device__ __forceinline__ void store_state_gradient(uint16_t* state, uint32_t w_tile,
                                                     uint32_t grad_tile, const float* dots) {
  constexpr int kWarpFeatures = C::kHeadDim / C::kWarps, kTilesF = kWarpFeatures / 16;
  constexpr int kColumns = 32;
  const int lane = threadIdx.x % 32, feature0 = threadIdx.x / 32 * kWarpFeatures;
#pragma unroll 1
  for (int column = 0; column < C::kHeadDim; column += kColumns) {
    float acc[kTilesF][kColumns / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kBlockQ; k += 16) {
      uint32_t a[kTilesF][4];
      load_transposed<C::kWideRowBytes>(a, w_tile, k, feature0);
      multiply_step<__nv_bfloat16, typename C::Element, C::kWideRowBytes>(acc, a, grad_tile, k,
                                                                          column);
    }
#pragma unroll
    for (int m = 0; m < kTilesF; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int feature = feature0 + 16 * m + 8 * half + lane / 4;
          *reinterpret_cast<uint32_t*>(state + feature * C::kHeadDim + column + 8 * n +
                                       lane % 4 * 2) =
              Pair<__nv_bfloat16>::from_floats(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
        }
      }
    }
  }

  // One more product, by a matrix with d's high part as its first column and the low part as its
  // second.
  float sums[kTilesF][4] = {};
#pragma unroll
  for (int k = 0; k < kBlockQ; k += 16) {
    uint32_t a[kTilesF][4], b[2];
    load_transposed<C::kWideRowBytes>(a, w_tile, k, feature0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 d = *reinterpret_cast<const float2*>(dots + k + 8 * i + lane % 4 * 2);
      const uint32_t high = Pair<__nv_bfloat16>::from_floats(d.x, d.y);
      const float2 rounded = Pair<__nv_bfloat16>::to_float2(high);
      const uint32_t low = Pair<__nv_bfloat16>::from_floats(d.x - rounded.x, d.y - rounded.y);
      b[i] = lane / 4 == 0 ? high : lane / 4 == 1 ? low : 0u;
    }
#pragma unroll
    for (int m = 0; m < kTilesF; ++m) mma<__nv_bfloat16>(sums[m], a[m], b[0], b[1]);
  }
  if (lane % 4 != 0) return;
  uint16_t* dz = state + C::kHeadDim * C::kHeadDim;
#pragma unroll
  for (int m = 0; m < kTilesF; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = feature0 + 16 * m + 8 * half + lane / 4;
      const float sum = -(sums[m][2 * half] + sums[m][2 * half + 1]);
      const __nv_bfloat16 high = __float2bfloat16_rn(sum);
      const __nv_bfloat16 low = __float2bfloat16_rn(sum - __bfloat162float(high));
      dz[feature] = __bfloat16_as_ushort(high);
      dz[C::kHeadDim + feature] = __bfloat16_as_ushort(low);
    }
  }
}

}  // namespace sla2
