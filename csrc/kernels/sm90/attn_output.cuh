// The epilogue's two ways through the query tile in shared memory: a warp takes its 16 rows of Q
// for the linear branch (common/attn_output.cuh tells the arithmetic), then stages its rows of the
// output where they were and sends them off by tensor copies. No warp waits for another.
#pragma once

#include "../common/attn_output.cuh"
#include "async.cuh"
#include "attn_config.cuh"

namespace sla2 {

// A lane's share of rows lane / 4 and lane / 4 + 8 of the warp: of each 32 features the eight from
// 8 (lane % 4), four for each of two k16 steps. H's rows follow this order (see h_row).
template <class C>
class QueryRows {
 public:
  using Element = typename C::Element;
  static constexpr int kGroups = C::kHeadDim / 32;

  __device__ __forceinline__ void load(const char* smem) {
    const int row = C::tile_row(0) + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const char* source = smem + group / 2 * C::kPanelBytes + swizzle<128>(row, group % 2 * 4 + t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words_[half][group] = *reinterpret_cast<const uint4*>(source + half * 8 * 128);
      }
    }
  }

  // Q to e = exp(q - row maximum) in bf16, in place; denominator = e Z, by a product whose even
  // columns are the high part of Z and odd columns the low part: a lane gets one of each.
  __device__ __forceinline__ void exponentiate(const char* z, float (&denominator)[2]) {
    float offset[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t largest = words_[half][0].x;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint4& q = words_[half][group];
        largest = Pair<Element>::max(Pair<Element>::max(largest, q.x), q.y);
        largest = Pair<Element>::max(Pair<Element>::max(largest, q.z), q.w);
      }
      const float2 pair = Pair<Element>::to_float2(largest);
      offset[half] = lane_max<4>(max_nan(pair.x, pair.y)) * -kLog2e;
    }
    const char* z_row = z + threadIdx.x / 4 % 2 * 2 * C::kHeadDim + threadIdx.x % 4 * 16;
    float product[4] = {};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float e[8];
        unpack8<Element>(words_[half][group], e);
#pragma unroll
        for (int i = 0; i < 8; ++i) e[i] = exp2_approx(fmaf(e[i], kLog2e, offset[half]));
        words_[half][group] = pack8<__nv_bfloat16>(e);
      }
      const uint4 b = *reinterpret_cast<const uint4*>(z_row + 64 * group);
      uint32_t a[4];
      operand(a, 2 * group);
      mma<__nv_bfloat16>(product, a, b.x, b.y);
      operand(a, 2 * group + 1);
      mma<__nv_bfloat16>(product, a, b.z, b.w);
    }
    denominator[0] = product[0] + product[1];
    denominator[1] = product[2] + product[3];
  }

  // e as the A operand of k16 step `step`.
  __device__ __forceinline__ void operand(uint32_t (&a)[4], int step) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4& e = words_[half][step / 2];
      a[half] = step % 2 == 0 ? e.x : e.z;
      a[half + 2] = step % 2 == 0 ? e.y : e.w;
    }
  }

 private:
  uint4 words_[2][kGroups];
};

}  // namespace sla2
