// From run-time dtype, head_dim and precision to the instance that CMake generated for them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/params.h"

namespace sla2 {

template <typename Element, int kHeadDim, int kQuant>
cudaError_t launch_attn_fwd_sm90(
    const AttnParams& params);  // defined in attn_fwd.cuh, one instance per translation unit

namespace {

template <typename Element, int kHeadDim>
cudaError_t by_quant(const AttnParams& params, int quant) {
  switch (quant) {
    case SLA2_QUANT_NONE:
      return launch_attn_fwd_sm90<Element, kHeadDim, SLA2_QUANT_NONE>(params);
    case SLA2_QUANT_INT8_FP8:
      return launch_attn_fwd_sm90<Element, kHeadDim, SLA2_QUANT_INT8_FP8>(params);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Element>
cudaError_t by_head_dim(const AttnParams& params, int head_dim, int quant) {
  return head_dim == 128 ? by_quant<Element, 128>(params, quant)
                         : by_quant<Element, 64>(params, quant);
}

}  // namespace

cudaError_t launch_attn_fwd_sm90(const AttnParams& params, int dtype, int head_dim, int quant) {
  return dtype == SLA2_BFLOAT16 ? by_head_dim<__nv_bfloat16>(params, head_dim, quant)
                                : by_head_dim<__half>(params, head_dim, quant);
}

}  // namespace sla2
