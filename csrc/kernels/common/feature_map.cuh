// phi(K): softmax over the features of a row that kLanes neighbouring lanes hold, eight each.
#pragma once

#include "convert.cuh"
#include "ptx.cuh"

namespace sla2 {

// In place; rows past the end (`valid` false) become zero.
template <int kLanes>
__device__ __forceinline__ void feature_map(float (&x)[8], bool valid) {
  float row_max = x[0];
#pragma unroll
  for (int c = 1; c < 8; ++c) row_max = max_nan(row_max, x[c]);
  const float offset = -kLog2e * lane_max<kLanes>(row_max);
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    x[c] = exp2_approx(fmaf(x[c], kLog2e, offset));
    sum += x[c];
  }
  sum = lane_sum<kLanes>(sum);
  const float inverse = valid ? reciprocal_approx(sum) : 0.f;
#pragma unroll
  for (int c = 0; c < 8; ++c) x[c] *= inverse;
}

}  // namespace sla2
