// The router's float32 numbers as pairs of fp16, so that its products run on tensor cores and come
// out as exact as float32: x = scale (high + low), and x y is high high + high low + low high.
// A power of two per row (per column of a weight) puts its largest value at 2^14 <= |x| < 2^15,
// where high + low is off by 2^-23 of any value within 2^-16 of the largest, and by 2^-39 of the
// largest for smaller ones. low low, left out, is 2^-22 of its product at most and 2^-25 typically,
// less than the partial sums of 128 float32 products lose.
#pragma once

#include <stdint.h>

#include "../common/convert.cuh"

namespace sla2 {

constexpr int kParts = 2;  // high, low
constexpr int kHigh = 0, kLow = 1;

// `largest_bits` is the largest |value| as float bits; NaN counts as larger than infinity. The
// lower limit keeps factor and scale normal numbers; rows below 2^-112 lose bits to it.
constexpr uint32_t kMinExponent = 15;
__device__ __forceinline__ float split_factor(uint32_t largest_bits) {
  return __uint_as_float((268u - max(largest_bits >> 23, kMinExponent)) << 23);
}
__device__ __forceinline__ float split_scale(uint32_t largest_bits) {  // 1 / split_factor
  return __uint_as_float((max(largest_bits >> 23, kMinExponent) - 14u) << 23);
}
__device__ __forceinline__ uint32_t magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}

// Two values times their factors as fp16 pairs; infinity gives NaN in the low part.
__device__ __forceinline__ void split_pair(float x0, float x1, uint32_t (&parts)[kParts]) {
  parts[kHigh] = Pair<__half>::from_floats(x0, x1);
  const float2 high = Pair<__half>::to_float2(parts[kHigh]);
  parts[kLow] = Pair<__half>::from_floats(x0 - high.x, x1 - high.y);
}

// Order of SplitRows::parts, made for the products that read them.
//   Queries, tiles of 64 rows: [part][16 columns][thread of a warpgroup][4 words], the A operand of
//   wgmma as each thread wants it.
//   Keys, tiles of 32 rows: [part][8 columns][8 rows][128 bytes], core matrices of 8 rows of 16
//   bytes: the B operand of wgmma in shared memory, without swizzle, by one contiguous copy.
constexpr int kQueryTile = 64, kKeyTile = 32;
template <int kHeadDim>
struct SplitLayout {
  static constexpr int kQueryPart = kQueryTile * kHeadDim * 2;  // bytes of one part
  static constexpr int kKeyPart = kKeyTile * kHeadDim * 2;
  static constexpr int kKeyBytes = kParts * kKeyPart;
  static constexpr int kCoreMatrix = 128;
  static constexpr int kColumnStep = kKeyTile / 8 * kCoreMatrix;  // from 8 columns to the next
};

}  // namespace sla2
