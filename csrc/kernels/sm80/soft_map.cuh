// What the kernels by query block ask of a row of the soft map.
#pragma once

namespace sla2 {

// Whether every key block has the weight 1, so that nothing is left to the linear branch. For all
// threads of the CTA; ends with a barrier.
template <int kThreads>
__device__ __forceinline__ bool covers_all(const float* map, int num_k_blocks) {
  bool ones = true;
  for (int j = threadIdx.x; j < num_k_blocks; j += kThreads) ones &= __ldg(map + j) == 1.f;
  return __syncthreads_and(ones);
}

}  // namespace sla2
