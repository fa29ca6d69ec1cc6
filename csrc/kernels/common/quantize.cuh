// The quantisers of the low-bit forward (method step 8), mirrored exactly by sla2.reference.
#pragma once

#include "convert.cuh"
#include "layout.cuh"
#include "ptx.cuh"

namespace sla2 {

// Eight values to int8 with factor 127 / amax, round to nearest even; |x * factor| <= 127 by construction.
__device__ __forceinline__ uint2 pack_int8x8(const float (&x)[8], float factor) {
  uint32_t bytes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint32_t>(__float2int_rn(x[i] * factor)) & 0xffu;
  return make_uint2(bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24,
                    bytes[4] | bytes[5] << 8 | bytes[6] << 16 | bytes[7] << 24);
}

__device__ __forceinline__ float amax8(const float (&x)[8]) {
  float amax = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) amax = max_nan(amax, fabsf(x[i]));
  return amax;
}

// Maximum over a CTA; every thread gets it. `scratch` holds one float per warp and must be free.
template <int kThreads>
__device__ __forceinline__ float block_max(float x, float* scratch) {
  x = lane_max<32>(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) x = max_nan(x, scratch[warp]);
  return x;
}

}  // namespace sla2
