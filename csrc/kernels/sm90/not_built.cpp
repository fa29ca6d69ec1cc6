// Stands in for the Hopper kernels in builds without sm_90a code. core/device.cpp never chooses
// them there.
#include "../common/params.h"

namespace sla2 {

bool route_sm90_fits(const Shape&) { return false; }
int linear_counters(const Shape&, int) { return 0; }
cudaError_t launch_project_sm90(const SplitProjectParams&, int) {
  return cudaErrorNoKernelImageForDevice;
}
cudaError_t launch_route_sm90(const RouteParams&, int) { return cudaErrorNoKernelImageForDevice; }
cudaError_t launch_linear_sm90(const LinearParams&, int, int) {
  return cudaErrorNoKernelImageForDevice;
}
cudaError_t launch_complement_sm90(const ComplementParams&, int) {
  return cudaErrorNoKernelImageForDevice;
}
cudaError_t launch_attn_fwd_sm90(const AttnParams&, int, int, int) {
  return cudaErrorNoKernelImageForDevice;
}
cudaError_t launch_bwd_columns_sm90(const AttnBwdParams&, int, int) {
  return cudaErrorNoKernelImageForDevice;
}
cudaError_t launch_bwd_rows_sm90(const AttnBwdParams&, int, int) {
  return cudaErrorNoKernelImageForDevice;
}

}  // namespace sla2
