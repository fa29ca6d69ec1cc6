// Rotary position embedding: one launch.
#include "core/nvtx.h"
#include "core/pipeline.h"
#include "core/validate.h"
#include "kernels/common/params.h"
#include "sla2/sla2.h"

sla2_status sla2_rotary(const sla2_rotary_params* params) {
  return sla2::guard([&] {
    sla2::require(params != nullptr, "params is null");
    const sla2_rotary_params& p = *params;
    sla2::validate_rotary(p);
    const sla2::Shape shape = sla2::validate_shape(p.shape);
    if (sla2::is_empty(shape)) return;
    sla2::require_support(p.shape.dtype, p.shape.head_dim, SLA2_QUANT_NONE, SLA2_PATH_PORTABLE);
    const sla2::NvtxRange range("sla2.rotary");
    const sla2::RotaryParams rotary = {
        shape,     sla2::view(p.x), sla2::view(p.cos), sla2::view(p.sin), sla2::view(p.out),
        p.inverse, p.stream};
    sla2::check_launch(sla2::launch_rotary(rotary, p.shape.dtype, p.shape.head_dim), "rotary",
                       sla2::describe(p.shape));
  });
}
