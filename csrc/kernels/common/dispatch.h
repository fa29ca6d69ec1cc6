// From the run-time dtype and head_dim of a call to the template arguments of its kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "sla2/sla2.h"

namespace sla2 {

// What launch(instance) receives: Element and kHeadDim are types and constants of its argument.
template <typename Element_, int kHeadDim_>
struct Instance {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
};

template <typename Launch>
cudaError_t dispatch(int dtype, int head_dim, Launch launch) {
  const bool bf16 = dtype == SLA2_BFLOAT16;
  switch (head_dim) {
    case 64:
      return bf16 ? launch(Instance<__nv_bfloat16, 64>()) : launch(Instance<__half, 64>());
    case 128:
      return bf16 ? launch(Instance<__nv_bfloat16, 128>()) : launch(Instance<__half, 128>());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sla2
