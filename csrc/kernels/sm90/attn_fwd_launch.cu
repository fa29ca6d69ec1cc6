// From run-time dtype, head_dim and precision to the instance that CMake generated for them.
#include "../common/dispatch.h"
#include "../common/params.h"

namespace sla2 {

// int8_fp8: defined in attn_fwd.cuh, one instance per translation unit.
template <typename Element, int kHeadDim>
cudaError_t launch_attn_fwd_sm90(const AttnParams& params);
// none: attn_rows.cu.
cudaError_t launch_attn_rows_sm90(const AttnParams& params, int dtype, int head_dim);

cudaError_t launch_attn_fwd_sm90(const AttnParams& params, int dtype, int head_dim, int quant) {
  switch (quant) {
    case SLA2_QUANT_NONE:
      return launch_attn_rows_sm90(params, dtype, head_dim);
    case SLA2_QUANT_INT8_FP8:
      return dispatch(dtype, head_dim, [&](auto instance) {
        using I = decltype(instance);
        return launch_attn_fwd_sm90<typename I::Element, I::kHeadDim>(params);
      });
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sla2
