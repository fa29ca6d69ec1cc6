// Launches that may begin before their predecessor in the stream has ended, and the size of
// persistent ones.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

namespace sla2 {

// The kernel's CTAs start as soon as all of the predecessor have called
// trigger_dependents (async.cuh) or ended, and there is room. Before it touches anything the
// predecessor writes, or that is written before the predecessor's own wait, the kernel must call
// wait_predecessor. What ran before the predecessor has ended only if that was launched plainly, or
// has waited itself.
template <typename... Params>
cudaError_t launch_overlapped(void (*kernel)(Params...), int ctas, int threads, size_t smem_bytes,
                              cudaStream_t stream, const Params&... params) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

// Of the present device: what a persistent grid covers.
inline cudaError_t count_multiprocessors(int& count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace sla2
