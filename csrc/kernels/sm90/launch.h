// Launches that may begin before their predecessor in the stream has ended, and the size of
// persistent ones.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include <algorithm>

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

// Makes a persistent kernel ready to launch: room for its shared memory and, in `ctas`, a CTA for
// every SM of the present device, but not more than there are tasks.
template <typename... Params>
cudaError_t prepare_persistent(void (*kernel)(Params...), size_t smem_bytes, int64_t tasks,
                               int& ctas) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(smem_bytes));
  int device = 0, sms = 0;
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  ctas = static_cast<int>(std::min<int64_t>(sms, tasks));
  return status;
}

}  // namespace sla2
