// The quantisers of the low-bit forward (method step 8), mirrored exactly by sla2.reference.
#pragma once

#include "convert.cuh"
#include "layout.cuh"
#include "ptx.cuh"

namespace sla2 {

// Eight values to int8 with factor 127 / amax, round to nearest even; |x * factor| <= 127 by
// construction. Adding 1.5 * 2^23 rounds to an integer whose low byte is the int8: no conversion
// instruction, which runs at quarter rate.
__device__ __forceinline__ uint2 pack_int8x8(const float (&x)[8], float factor) {
  constexpr float kBias = 12582912.f;
  uint32_t bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bits[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], factor), kBias));
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = __byte_perm(bits[4 * i], bits[4 * i + 1], 0x0040);
    const uint32_t high = __byte_perm(bits[4 * i + 2], bits[4 * i + 3], 0x0040);
    words[i] = __byte_perm(low, high, 0x5410);
  }
  return make_uint2(words[0], words[1]);
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
