// Programmatic dependent launch: a kernel's CTAs may start while its predecessor in the stream
// still drains, and wait where they first need its results. Saves the gap between the short kernels
// of one forward pass.
#pragma once

#include <cuda_runtime.h>

namespace sla2 {

// Everything the predecessor wrote is visible from here on. Each thread calls it before it reads or
// overwrites anything but the operation's inputs.
__device__ __forceinline__ void wait_for_predecessor() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The successor may start once every CTA of this grid has said so or ended.
__device__ __forceinline__ void let_successor_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

template <typename... Parameters>
cudaError_t launch_chained(void (*kernel)(Parameters...), dim3 grid, int threads, size_t smem_bytes,
                           cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace sla2
