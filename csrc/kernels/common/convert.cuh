// 16-bit elements to and from float, 16 bytes at a time, and lane reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "params.h"

namespace sla2 {

// Unlike fmaxf, NaN wins: a NaN input must reach the block's scale and so the output.
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

template <typename Element>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  // Element-wise maximum of two pairs; NaN wins.
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ float2 to_float2(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t from_floats(float lo, float hi) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ float2 to_float2(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
  static __device__ __forceinline__ uint32_t from_floats(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// Maximum of the eight values in `packed`, and the one of their magnitudes.
template <typename Element>
__device__ __forceinline__ float max8(const uint4& packed) {
  using P = Pair<Element>;
  const float2 pair = P::to_float2(P::max(P::max(packed.x, packed.y), P::max(packed.z, packed.w)));
  return max_nan(pair.x, pair.y);
}
template <typename Element>
__device__ __forceinline__ float amax8(const uint4& packed) {
  constexpr uint32_t kNoSigns = 0x7fff7fffu;  // the sign bit of both 16-bit formats
  return max8<Element>(make_uint4(packed.x & kNoSigns, packed.y & kNoSigns, packed.z & kNoSigns,
                                  packed.w & kNoSigns));
}

template <typename Element>
__device__ __forceinline__ void unpack8(const uint4& packed, float (&x)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Pair<Element>::to_float2(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <typename Element>
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
  return make_uint4(Pair<Element>::from_floats(x[0], x[1]), Pair<Element>::from_floats(x[2], x[3]),
                    Pair<Element>::from_floats(x[4], x[5]), Pair<Element>::from_floats(x[6], x[7]));
}

// First element of (batch, head) `bh`; add token * stride_token.
template <typename Element>
__device__ __forceinline__ const Element* head_base(const TensorView& view, int bh, int num_heads) {
  return static_cast<const Element*>(view.data) + (bh / num_heads) * view.stride_batch +
         (bh % num_heads) * view.stride_head;
}

// Reductions over groups of kLanes neighbouring lanes; every lane gets the result.
template <int kLanes>
__device__ __forceinline__ float lane_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

template <int kLanes>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

}  // namespace sla2
