// The end of the Hopper pass by key block: the linear branch's share, and the store of dV and dK.
//   dV += phi(K) dh,   dphi = V dh^T + 1 dz^T,   dK += phi (dphi - rowsum(dphi phi))
// A warp has 16 keys throughout, a lane all it needs of phi, dphi, dV and dK for the same elements,
// so that rows are summed by shuffles and nothing but the block sums of dK changes warps.
#pragma once

#include <type_traits>

#include "../common/convert.cuh"
#include "../common/ptx.cuh"
#include "bwd_columns_config.cuh"
#include "wgmma.cuh"

namespace sla2 {

// A 64 x D matrix of keys by channels as A operands of D / 16 products.
template <class C>
using KeyOperand = uint32_t[C::kHeadDim / 16][4];
template <class C>
using KeyAcc = float[C::kAccumulators];

// This thread's place among keys and channels: index 4 n + 2 half + e of accumulators is key row()
// + 8 half, channel channel(n) + e; word 2 (n % 2) + half of operand n / 2 holds the same pair.
struct KeyPlace {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __device__ __forceinline__ int row() const { return 16 * warp + lane / 4; }
  __device__ __forceinline__ int channel(int n) const { return 8 * n + lane % 4 * 2; }
};

// The warp's rows of a tile of keys, for ldmatrix and stmatrix: chunks 2 step and 2 step + 1.
__device__ __forceinline__ uint32_t matrix_address(uint32_t tile, int step) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  return tile + step / 4 * (64 * 128) + swizzle<128>(row, step % 4 * 2 + lane / 16);
}

template <class C>
__device__ __forceinline__ void load_rows(KeyOperand<C>& x, const char* tile) {
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    ldmatrix_x4(x[step], matrix_address(smem_address(tile), step));
  }
}

// K to phi(K) in bfloat16, rows past the end zero. mean: [D] in shared memory, or null for K as it
// is.
template <class C>
__device__ __forceinline__ void make_features(KeyOperand<C>& x, const float* mean, int valid) {
  constexpr int kPairs = C::kHeadDim / 8;
  const KeyPlace place;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float e[2 * kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const float2 pair = Pair<typename C::Element>::to_float2(x[n / 2][n % 2 * 2 + half]);
      e[2 * n] = pair.x;
      e[2 * n + 1] = pair.y;
    }
    if (mean != nullptr) {
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        const float2 centre = *reinterpret_cast<const float2*>(mean + place.channel(n));
        e[2 * n] -= centre.x;
        e[2 * n + 1] -= centre.y;
      }
    }
    float row_max = e[0];
#pragma unroll
    for (int i = 1; i < 2 * kPairs; ++i) row_max = max_nan(row_max, e[i]);
    const float offset = -kLog2e * lane_max<4>(row_max);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      e[i] = exp2_approx(fmaf(e[i], kLog2e, offset));
      sum += e[i];
    }
    sum = lane_sum<4>(sum);
    const float inverse = place.row() + 8 * half < valid ? reciprocal_approx(sum) : 0.f;
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      x[n / 2][n % 2 * 2 + half] =
          Pair<__nv_bfloat16>::from_floats(e[2 * n] * inverse, e[2 * n + 1] * inverse);
    }
  }
}

// dV += phi dh. tiles: the panels of dh, 64 channels of all features each.
template <class C>
__device__ __forceinline__ void add_value_gradient(KeyAcc<C>& dv, const KeyOperand<C>& phi,
                                                   const uint32_t (&tiles)[C::kPanels]) {
  wgmma_fence();
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    const uint64_t dh = wgmma_descriptor(tiles[panel], C::kPanelBytes, 1024, Swizzle::k128);
    auto& acc = reinterpret_cast<float (&)[32]>(dv[32 * panel]);
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      Wgmma16<__nv_bfloat16, false, true>::mma(acc, phi[step], advance(dh, 2048 * step), 1);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(dv);
}

// The gradient of what phi saw as K, added to dK. dz: [2][D] in shared memory, summed.
template <class C>
__device__ __forceinline__ void add_feature_gradient(KeyAcc<C>& dk, const KeyOperand<C>& phi,
                                                     const char* value,
                                                     const uint32_t (&tiles)[C::kPanels],
                                                     const float (*dz)[C::kHeadDim]) {
  KeyOperand<C> v;
  load_rows<C>(v, value);
  if constexpr (!std::is_same_v<typename C::Element, __nv_bfloat16>) {
#pragma unroll
    for (auto& operand : v) {
#pragma unroll
      for (uint32_t& word : operand) {
        const float2 pair = Pair<typename C::Element>::to_float2(word);
        word = Pair<__nv_bfloat16>::from_floats(pair.x, pair.y);
      }
    }
  }
  KeyAcc<C> dphi;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    const uint64_t dh = wgmma_descriptor(tiles[step / 4], 0, 1024, Swizzle::k128);
    WgmmaNt<__nv_bfloat16>::mma(dphi, v[step], advance(dh, step % 4 * 32), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(dphi);

  const KeyPlace place;
  float dot[2] = {};
  const auto features = [&](int n, int half) {
    return Pair<__nv_bfloat16>::to_float2(phi[n / 2][n % 2 * 2 + half]);
  };
#pragma unroll
  for (int n = 0; n < C::kHeadDim / 8; ++n) {
    const float2 high = *reinterpret_cast<const float2*>(dz[0] + place.channel(n));
    const float2 low = *reinterpret_cast<const float2*>(dz[1] + place.channel(n));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* pair = dphi + 4 * n + 2 * half;
      pair[0] += high.x + low.x;
      pair[1] += high.y + low.y;
      const float2 x = features(n, half);
      dot[half] += x.x * pair[0] + x.y * pair[1];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    dot[half] = lane_sum<4>(dot[half]);
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; ++n) {
      const int i = 4 * n + 2 * half;
      const float2 x = features(n, half);
      dk[i] += x.x * (dphi[i] - dot[half]);
      dk[i + 1] += x.y * (dphi[i + 1] - dot[half]);
    }
  }
}

// Sums over the block's valid keys to `sums` [D]; scratch: [warps][D].
template <class C>
__device__ __forceinline__ void store_key_sums(const KeyAcc<C>& dk, int valid,
                                               float (*scratch)[C::kHeadDim], float* sums) {
  const KeyPlace place;
#pragma unroll
  for (int n = 0; n < C::kHeadDim / 8; ++n) {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (place.row() + 8 * half >= valid) continue;
      sum.x += dk[4 * n + 2 * half];
      sum.y += dk[4 * n + 2 * half + 1];
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
    }
    if (place.lane < 4) {
      *reinterpret_cast<float2*>(scratch[place.warp] + place.channel(n)) = sum;
    }
  }
  named_barrier(C::kComputeBarrier, C::kComputeThreads);
  const int channel = threadIdx.x;
  if (channel < C::kHeadDim) {
    float sum = scratch[0][channel];
#pragma unroll
    for (int warp = 1; warp < C::kComputeThreads / 32; ++warp) sum += scratch[warp][channel];
    sums[channel] = sum;
  }
}

// The warp's 16 keys of a gradient through its rows of `tile` to `map`, which clips those past the
// end. Nobody else may still be reading these rows.
template <class C>
__device__ __forceinline__ void store_keys(const KeyAcc<C>& acc, char* tile, const CUtensorMap* map,
                                           int token0, int head, int batch) {
  const uint32_t address = smem_address(tile);
  __syncwarp();  // all lanes have read the warp's rows
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = acc + 8 * step + 2 * i;
      words[i] = Pair<typename C::Element>::from_floats(pair[0], pair[1]);
    }
    stmatrix_x4(matrix_address(address, step), words);
  }
  fence_async_shared();
  __syncwarp();
  const int row0 = threadIdx.x / 32 * 16;
  if (elect_one()) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      tensor_store(map, address + panel * C::kPanelBytes + row0 * 128, 64 * panel, token0 + row0,
                   head, batch, evict_first());
    }
    bulk_store_commit();
  }
}

}  // namespace sla2
