// Online softmax of one 64 x 64 tile of scores (common/softmax.cuh tells the arithmetic), from
// accumulators to the A operands of P V.
#pragma once

#include <climits>

#include "../common/softmax.cuh"
#include "attn_config.cuh"

namespace sla2 {

__device__ __forceinline__ int max3(int a, int b, int c) { return max(max(a, b), c); }
__device__ __forceinline__ float max3(float a, float b, float c) { return fmaxf(fmaxf(a, b), c); }

// A score as the softmax sees it: columns at and beyond `valid` count for nothing. Registers of s
// itself belong to the products, and ptxas serialises those in flight when anything else writes
// one.
template <class C, bool kMask>
__device__ __forceinline__ typename C::Score masked_score(const typename C::Score (&s)[32], int i,
                                                          int valid) {
  using Score = typename C::Score;
  if constexpr (kMask) {
    constexpr Score kMasked =
        C::kInt8 ? static_cast<Score>(INT_MIN) : static_cast<Score>(-INFINITY);
    return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2 >= valid ? kMasked : s[i];
  }
  return s[i];
}

// Takes a tile's scores into the row maxima. Only where one of them exceeds what the headroom
// allows, in any lane of the warp, do lanes exchange their maxima and are sums and, by
// rescale(half, factor), outputs rescaled: most tiles cost a comparison.
template <class C, bool kMask, typename Rescale>
__device__ __forceinline__ void update_max(const typename C::Score (&s)[32], int valid,
                                           float scale_log2, float (&row_max)[2],
                                           float (&row_sum)[2], Rescale rescale) {
  using Score = typename C::Score;
  float block_max[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Score chains[2];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const Score left = masked_score<C, kMask>(s, 4 * n + 2 * half, valid);
      const Score right = masked_score<C, kMask>(s, 4 * n + 2 * half + 1, valid);
      chains[n % 2] = n < 2 ? max(left, right) : max3(chains[n % 2], left, right);
    }
    block_max[half] = static_cast<float>(max(chains[0], chains[1])) * scale_log2;
  }
  const bool grew = block_max[0] > row_max[0] + kHeadroom || block_max[1] > row_max[1] + kHeadroom;
  if (!__any_sync(0xffffffffu, grew)) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    block_max[half] = fmaxf(block_max[half], __shfl_xor_sync(0xffffffffu, block_max[half], 1));
    block_max[half] = fmaxf(block_max[half], __shfl_xor_sync(0xffffffffu, block_max[half], 2));
    const float grown = fmaxf(row_max[half], ceilf(block_max[half]));
    const float factor = exp2_approx(row_max[half] - grown);
    row_max[half] = grown;
    row_sum[half] *= factor;
    rescale(half, factor);
  }
}

// x = 2^(shift + s * scale_log2 - row_max) of the keys that k step `k` of P V takes, summed into
// row_sum.
template <class C, bool kMask>
__device__ __forceinline__ void exponentiate_step(const typename C::Score (&s)[32], int k,
                                                  int valid, float scale_log2, float shift,
                                                  const float (&row_max)[2], float (&row_sum)[2],
                                                  float (&x)[8 / C::kRegistersP][4]) {
  const float offset[2] = {shift - row_max[0], shift - row_max[1]};
  constexpr int kTiles = 8 / C::kRegistersP;  // n8 tiles
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const auto raw = masked_score<C, kMask>(s, 4 * (k * kTiles + n) + e, valid);
      float value = static_cast<float>(raw);
      if constexpr (kMask && C::kInt8) value = raw == INT_MIN ? -INFINITY : value;
      x[n][e] = exp2_approx(fmaf(value, scale_log2, offset[e / 2]));
      row_sum[e / 2] += x[n][e];
    }
  }
}

// x as the A operand of its k step.
template <class C>
__device__ __forceinline__ void pack_step(const float (&x)[8 / C::kRegistersP][4],
                                          uint32_t (&p)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (C::kInt8) {
      const auto &left = x[r / 2 * 2], &right = x[r / 2 * 2 + 1];
      p[r] =
          pack_e4m3x4(left[r % 2 * 2], left[r % 2 * 2 + 1], right[r % 2 * 2], right[r % 2 * 2 + 1]);
    } else {
      p[r] = Pair<typename C::Element>::from_floats(x[r / 2][r % 2 * 2], x[r / 2][r % 2 * 2 + 1]);
    }
  }
}

// A tile's scores to the A operands of P V.
template <class C, bool kMask>
__device__ __forceinline__ void exponentiate(const typename C::Score (&s)[32], int valid,
                                             float scale_log2, float shift,
                                             const float (&row_max)[2], float (&row_sum)[2],
                                             uint32_t (&p)[C::kRegistersP][4]) {
#pragma unroll
  for (int k = 0; k < C::kRegistersP; ++k) {
    float x[8 / C::kRegistersP][4];
    exponentiate_step<C, kMask>(s, k, valid, scale_log2, shift, row_max, row_sum, x);
    pack_step<C>(x, p[k]);
  }
}

}  // namespace sla2
