// Every rule about arguments, once, for all callers (Python checks the same earlier, with its own
// words).
#pragma once

#include <string>

#include "kernels/common/params.h"
#include "sla2/sla2.h"

namespace sla2 {

// "B=1 N=32760 H=12 D=128 bfloat16"
std::string describe(const sla2_shape& shape);

// Shape of the kernels' view; throws when a size is out of range. B = 0 or N = 0 is allowed.
Shape validate_shape(const sla2_shape& shape);

// What a workspace depends on: the struct's size, the shape, choices and the lists' width.
Shape validate_sizes(const sla2_route_params& params);
Shape validate_sizes(const sla2_attn_fwd_params& params);
Shape validate_sizes(const sla2_attn_bwd_params& params);

// Everything.
void validate_route(const sla2_route_params& params);
void validate_attn_fwd(const sla2_attn_fwd_params& params);
void validate_attn_bwd(const sla2_attn_bwd_params& params);
void validate_soft_map(const sla2_soft_map_params& params);
void validate_soft_map_bwd(const sla2_soft_map_bwd_params& params);
void validate_rotary(const sla2_rotary_params& params);

}  // namespace sla2
