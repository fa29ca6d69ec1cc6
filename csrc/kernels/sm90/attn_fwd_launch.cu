// From run-time dtype, head_dim and precision to the instance that CMake generated for them.
#include "../common/dispatch.h"
#include "../common/params.h"

namespace sla2 {

template <typename Element, int kHeadDim, int kQuant>
cudaError_t launch_attn_fwd_sm90(
    const AttnParams& params);  // defined in attn_fwd.cuh, one instance per translation unit

cudaError_t launch_attn_fwd_sm90(const AttnParams& params, int dtype, int head_dim, int quant) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    switch (quant) {
      case SLA2_QUANT_NONE:
        return launch_attn_fwd_sm90<typename I::Element, I::kHeadDim, SLA2_QUANT_NONE>(params);
      case SLA2_QUANT_INT8_FP8:
        return launch_attn_fwd_sm90<typename I::Element, I::kHeadDim, SLA2_QUANT_INT8_FP8>(params);
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace sla2
