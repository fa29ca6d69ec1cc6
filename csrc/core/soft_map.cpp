// Stage 1's map from the router's scores, and its gradient: a launch each.
#include "core/nvtx.h"
#include "core/pipeline.h"
#include "core/validate.h"
#include "kernels/common/params.h"
#include "sla2/sla2.h"

sla2_status sla2_soft_map(const sla2_soft_map_params* params) {
  return sla2::guard([&] {
    sla2::require(params != nullptr, "params is null");
    const sla2_soft_map_params& p = *params;
    sla2::validate_soft_map(p);
    const sla2::Shape shape = sla2::validate_shape(p.shape);
    if (sla2::is_empty(shape)) return;
    sla2::require_support(p.shape.dtype, p.shape.head_dim, SLA2_QUANT_NONE, SLA2_PATH_PORTABLE);
    const sla2::NvtxRange range("sla2.soft_map");
    const sla2::SoftTopKParams top_k = {shape,           p.scores, p.pinned_kv, p.num_pinned,
                                        p.num_kv_blocks, p.tau,    p.soft_map,  p.stream};
    sla2::check_launch(sla2::launch_soft_top_k(top_k), "soft_top_k", sla2::describe(p.shape));
  });
}

sla2_status sla2_soft_map_bwd(const sla2_soft_map_bwd_params* params) {
  return sla2::guard([&] {
    sla2::require(params != nullptr, "params is null");
    const sla2_soft_map_bwd_params& p = *params;
    sla2::validate_soft_map_bwd(p);
    const sla2::Shape shape = sla2::validate_shape(p.shape);
    if (sla2::is_empty(shape)) return;
    sla2::require_support(p.shape.dtype, p.shape.head_dim, SLA2_QUANT_NONE, SLA2_PATH_PORTABLE);
    const sla2::NvtxRange range("sla2.soft_map_bwd");
    const sla2::SoftTopKBwdParams top_k = {shape, p.soft_map,    p.grad_log_map,
                                           p.tau, p.grad_scores, p.stream};
    sla2::check_launch(sla2::launch_soft_top_k_bwd(top_k), "soft_top_k_bwd",
                       sla2::describe(p.shape));
  });
}
