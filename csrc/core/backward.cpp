// The backward pipeline:
//
//   pool -> reduce -> compact -> complement_mask -> column_lists -> per group of heads
//     [linear_state -> complement -> bwd_rows -> complement -> bwd_columns]
//     -> reduce -> centre_keys -> alpha_grad
//
// The second complement is the first one transposed: it sums the gradients of the states over the
// query blocks that do not list a key block. On path sm90 both complements, bwd_rows and
// bwd_columns are Hopper kernels, the first complement with linear_state in a single launch,
// `linear`; the others are portable. With a soft map all are portable: soft_lists stands in for
// compact, weighted_sum for complement, and map_grad follows bwd_rows.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/device.h"
#include "core/error.h"
#include "core/nvtx.h"
#include "core/pipeline.h"
#include "core/validate.h"
#include "kernels/common/params.h"
#include "sla2/sla2.h"

namespace sla2 {
namespace {

// States, their gradients and the partial sums of cut columns exist for a group of heads at a time:
// 0.7 times the inputs' bytes within these limits. With O, O_s and the gradients a training step
// then holds less than three times its inputs.
constexpr int64_t kMinGroupBytes = 64 << 20, kMaxGroupBytes = 640 << 20;

// A key block that more query blocks list than this, or than four times the average, is worked on
// in parts. Their partial sums may take half as many bytes as the head's states.
constexpr int64_t kSplitBlocks = 64;

bool has_sparse(const sla2_attn_bwd_params& p) { return p.branch != SLA2_BRANCH_LINEAR; }
bool has_linear(const sla2_attn_bwd_params& p) { return p.branch != SLA2_BRANCH_SPARSE; }

// Of `heads` heads
struct GroupBuffers {
  uint16_t* state;  // sm90: a ring of fewer heads; then dh
  uint16_t* h;
  float* z;
  uint16_t* dstate_q;
  float* dz;
  float* row_shift;
  float* row_delta;
  float* partials;
};

struct BwdBuffers {
  bool sm90;
  float* block_sums;  // of K, then of dK
  float* k_mean;
  float* dk_mean;
  uint16_t* lut;
  int* counts;
  uint32_t* mask;
  uint32_t* mask_transposed;  // of a hard map
  uint16_t* weights;          // of a soft one
  ColumnLists columns;
  float* alpha_partial;
  int* counters;  // sm90
  int num_counters;
  int heads_per_group, group_counters;
  GroupBuffers group;
};

int64_t alpha_width(const Shape& shape, const sla2_attn_bwd_params& p) {
  return p.alpha_per_token ? shape.seqlen : shape.num_q_blocks;
}

ColumnLists plan_columns(Arena& arena, const Shape& shape, const sla2_attn_bwd_params& p) {
  ColumnLists columns = {};
  const int64_t k_rows = static_cast<int64_t>(shape.num_bh) * shape.num_k_blocks;
  columns.rows_per_head = static_cast<int64_t>(shape.num_q_blocks) * list_width(shape, p);
  const int64_t average = (columns.rows_per_head + shape.num_k_blocks - 1) / shape.num_k_blocks;
  const int64_t split = std::max(kSplitBlocks, 4 * average);
  // Cut columns have fewer than 2 length / split parts each and fewer than length / split more
  // items than others.
  const bool may_cut = has_sparse(p) && split < shape.num_q_blocks;
  const int64_t slots =
      may_cut ? std::min<int64_t>(2 * columns.rows_per_head / split, shape.num_k_blocks / 4) : 0;
  columns.split_blocks = static_cast<int>(split);
  columns.num_slots = static_cast<int>(slots);
  columns.num_items =
      shape.num_k_blocks + static_cast<int>(std::min(slots, columns.rows_per_head / split));
  columns.counts = arena.take<int>(k_rows);
  columns.offsets = arena.take<int>(k_rows);
  columns.slots = arena.take<int>(k_rows);
  columns.arrived = arena.take<int>(k_rows);
  columns.rows = arena.take<uint16_t>(shape.num_bh * columns.rows_per_head);
  columns.items = arena.take<uint32_t>(static_cast<int64_t>(shape.num_bh) * columns.num_items);
  return columns;
}

GroupBuffers plan_group(Arena& arena, const Shape& shape, const sla2_attn_bwd_params& p,
                        const ColumnLists& columns, int heads) {
  GroupBuffers group = {};
  const int64_t d = p.shape.head_dim;
  const int64_t q_rows = static_cast<int64_t>(heads) * shape.num_q_blocks;
  const int64_t k_rows = static_cast<int64_t>(heads) * shape.num_k_blocks;
  if (has_linear(p)) {
    const int64_t state = d * d + 2 * d;
    group.state = arena.take<uint16_t>(k_rows * state);
    group.h = arena.take<uint16_t>(q_rows * d * d);
    group.z = arena.take<float>(q_rows * 2 * d);
    group.dstate_q = arena.take<uint16_t>(q_rows * state);
    group.dz = arena.take<float>(k_rows * 2 * d);
  }
  if (has_sparse(p)) {
    group.row_shift = arena.take<float>(q_rows * SLA2_BLOCK_Q);
    group.row_delta = arena.take<float>(q_rows * SLA2_BLOCK_Q);
    group.partials =
        arena.take<float>(static_cast<int64_t>(heads) * columns.num_slots * 2 * SLA2_BLOCK_K * d);
  }
  return group;
}

BwdBuffers plan_attn_bwd(Arena& arena, const Shape& shape, const sla2_attn_bwd_params& p) {
  BwdBuffers buffers = {};
  buffers.sm90 = p.soft_map == nullptr && uses_sm90(SLA2_QUANT_NONE, p.path);
  const int64_t d = p.shape.head_dim;
  const int64_t heads = shape.num_bh;
  const int64_t q_rows = heads * shape.num_q_blocks, k_rows = heads * shape.num_k_blocks;
  if (p.smooth_k) {
    buffers.block_sums = arena.take<float>(k_rows * d);
    buffers.dk_mean = arena.take<float>(heads * d);
  }
  buffers.k_mean = arena.take<float>(heads * d);
  buffers.lut = arena.take<uint16_t>(q_rows * list_width(shape, p));
  buffers.counts = arena.take<int>(q_rows);
  buffers.mask =
      arena.take<uint32_t>(heads * mask_words(shape.num_k_blocks) * mask_pitch(shape.num_q_blocks));
  if (p.soft_map != nullptr) {
    buffers.weights = arena.take<uint16_t>(q_rows * weight_pitch(shape.num_k_blocks));
  } else if (has_linear(p)) {
    buffers.mask_transposed = arena.take<uint32_t>(heads * mask_words(shape.num_q_blocks) *
                                                   mask_pitch(shape.num_k_blocks));
  }
  buffers.columns = plan_columns(arena, shape, p);
  if (p.branch == SLA2_BRANCH_BOTH) {
    buffers.alpha_partial = arena.take<float>(heads * alpha_width(shape, p));
  }

  Arena one_head(nullptr);
  plan_group(one_head, shape, p, buffers.columns, 1);
  const int64_t head_bytes = static_cast<int64_t>(one_head.used());
  const int64_t input_bytes = 3 * 2 * heads * shape.seqlen * d;
  const int64_t group_bytes = std::clamp(input_bytes * 7 / 10, kMinGroupBytes, kMaxGroupBytes);
  const int64_t most = std::clamp<int64_t>(group_bytes / head_bytes, 1, heads);
  const int64_t groups = (heads + most - 1) / most;  // of like size: no small one at the end
  buffers.heads_per_group = static_cast<int>((heads + groups - 1) / groups);
  if (buffers.sm90 && has_linear(p)) {
    // Of `linear`, and the tickets of the transposed complement; an even number for alignment.
    const int counters = linear_counters(shape, buffers.heads_per_group) + 1;
    buffers.group_counters = (counters + 1) / 2 * 2;
    buffers.num_counters = static_cast<int>(groups) * buffers.group_counters;
    buffers.counters = arena.take<int>(buffers.num_counters);
  }
  buffers.group = plan_group(arena, shape, p, buffers.columns, buffers.heads_per_group);
  return buffers;
}

// k_mean, the lists by query block, made safe, and by key block.
void prepare(const Shape& shape, const sla2_attn_bwd_params& p, const BwdBuffers& buffers) {
  const NvtxRange range("sla2.bwd_prepare");
  const std::string problem = describe(p.shape);
  PoolParams pool = {};
  pool.q = view(p.q);
  pool.k = view(p.k);
  pool.v = view(p.v);
  pool.k_sum = buffers.block_sums;
  pool.stream = p.stream;
  ReduceParams reduce = {};
  reduce.k_sum = buffers.block_sums;
  reduce.k_mean = buffers.k_mean;
  reduce.smooth = p.smooth_k;
  reduce.counters = buffers.counters;
  reduce.num_counters = buffers.num_counters;
  reduce.stream = p.stream;
  run_pool(shape, p.shape, pool, reduce);

  run_lists(shape, p, buffers.lut, buffers.counts, buffers.weights);
  ComplementParams complement = {};
  complement.shape = shape;
  complement.bh_count = shape.num_bh;
  complement.lut = buffers.lut;
  complement.counts = buffers.counts;
  complement.max_kv_blocks = list_width(shape, p);
  complement.mask = buffers.mask;
  complement.stream = p.stream;
  check_launch(launch_complement_mask(complement), "complement_mask", problem);
  const ColumnListParams lists = {shape, buffers.mask, buffers.mask_transposed, buffers.columns,
                                  p.stream};
  check_launch(launch_column_lists(lists), "column_lists", problem);
}

AttnBwdParams attn_params(const Shape& shape, const sla2_attn_bwd_params& p,
                          const BwdBuffers& buffers) {
  AttnBwdParams attn = {};
  attn.shape = shape;
  attn.q = view(p.q);
  attn.k = view(p.k);
  attn.v = view(p.v);
  attn.grad_out = view(p.grad_out);
  attn.out_sparse = view(p.out_sparse);
  attn.dq = view(p.grad_q);
  attn.dk = view(p.grad_k);
  attn.dv = view(p.grad_v);
  attn.lse = p.lse;
  attn.lut = buffers.lut;
  attn.counts = buffers.counts;
  attn.max_kv_blocks = list_width(shape, p);
  attn.k_mean = buffers.k_mean;
  attn.alpha_logit = p.alpha_logit;
  attn.alpha_stride_head = p.alpha_stride_head;
  attn.alpha_per_token = p.alpha_per_token;
  attn.branch = p.branch;
  attn.phi_raw_k = p.phi_raw_k;
  attn.softmax_scale = p.softmax_scale;
  attn.row_shift = buffers.group.row_shift;
  attn.row_delta = buffers.group.row_delta;
  attn.alpha_partial = buffers.alpha_partial;
  attn.h = buffers.group.h;
  attn.z = buffers.group.z;
  attn.dstate_q = buffers.group.dstate_q;
  attn.dh = buffers.group.state;
  attn.dz = buffers.group.dz;
  attn.columns = buffers.columns;
  attn.partials = buffers.group.partials;
  attn.dk_sum = buffers.block_sums;
  attn.soft_map = p.soft_map;
  attn.grad_log_map = p.grad_log_map;
  attn.stream = p.stream;
  return attn;
}

// The complement's bits of a head.
int64_t mask_size(const Shape& shape) {
  return static_cast<int64_t>(mask_words(shape.num_k_blocks)) * mask_pitch(shape.num_q_blocks);
}

// Heads [bh_begin, bh_begin + bh_count); counters: the group's, on path sm90.
struct Group {
  int bh_begin, bh_count;
  int* counters;
};

// The sums of the group's states, or of their gradients with the weights transposed, under a soft
// map.
void sum_weighted(const Shape& shape, const sla2_attn_bwd_params& p, const BwdBuffers& buffers,
                  const Group& group, bool transposed) {
  const GroupBuffers& heads = buffers.group;
  const int64_t size = int64_t{1} * shape.num_q_blocks * weight_pitch(shape.num_k_blocks);
  const WeightedSumParams sum = {shape,
                                 group.bh_count,
                                 transposed,
                                 buffers.weights + group.bh_begin * size,
                                 transposed ? heads.dstate_q : heads.state,
                                 transposed ? heads.state : heads.h,
                                 transposed ? heads.dz : heads.z,
                                 p.stream};
  check_launch(launch_weighted_sum(sum, p.shape.head_dim), "weighted_sum", describe(p.shape));
}

// The gradient of log m of the group.
void run_map_grad(const Shape& shape, const sla2_attn_bwd_params& p, const BwdBuffers& buffers,
                  const Group& group) {
  const int64_t first = int64_t{1} * group.bh_begin * shape.num_q_blocks * shape.num_k_blocks;
  const MapGradParams grad = {shape,
                              group.bh_count,
                              buffers.group.dstate_q,
                              buffers.group.state,
                              p.soft_map + first,
                              p.grad_log_map + first,
                              p.stream};
  check_launch(launch_map_grad(grad, p.shape.head_dim), "map_grad", describe(p.shape));
}

// H = (1 - M) h and Z = (1 - M) z of the group.
void run_linear(const Shape& shape, const sla2_attn_bwd_params& p, const BwdBuffers& buffers,
                const Group& group) {
  const std::string problem = describe(p.shape);
  const int dtype = p.shape.dtype, head_dim = p.shape.head_dim;
  uint32_t* mask = buffers.mask + group.bh_begin * mask_size(shape);
  if (buffers.sm90) {
    LinearParams linear = {};
    linear.shape = shape;
    linear.bh_begin = group.bh_begin;
    linear.bh_count = group.bh_count;
    linear.k = view(p.k);
    linear.v = view(p.v);
    linear.k_mean = buffers.k_mean + static_cast<int64_t>(group.bh_begin) * head_dim;
    linear.quant = SLA2_QUANT_NONE;
    linear.phi_raw_k = p.phi_raw_k;
    linear.backward = 1;
    linear.mask = mask;
    linear.state = buffers.group.state;
    linear.state_slots = state_slots(
        group.bh_count, int64_t{1} * shape.num_k_blocks * state_bytes(head_dim, SLA2_QUANT_NONE));
    linear.h = buffers.group.h;
    linear.z = buffers.group.z;
    linear.counters = group.counters;
    linear.stream = p.stream;
    check_launch(launch_linear_sm90(linear, dtype, head_dim), "linear", problem);
    return;
  }
  StateParams state = {};
  state.shape = shape;
  state.bh_begin = group.bh_begin;
  state.bh_count = group.bh_count;
  state.k = view(p.k);
  state.v = view(p.v);
  state.k_mean = buffers.k_mean;
  state.state = buffers.group.state;
  state.quant = SLA2_QUANT_NONE;
  state.phi_raw_k = p.phi_raw_k;
  state.stream = p.stream;
  check_launch(launch_linear_state(state, dtype, head_dim), "linear_state", problem);
  if (p.soft_map != nullptr) {
    sum_weighted(shape, p, buffers, group, false);
    return;
  }
  ComplementParams complement = {};
  complement.shape = shape;
  complement.bh_count = group.bh_count;
  complement.mask = mask;
  complement.state = buffers.group.state;
  complement.h = buffers.group.h;
  complement.z = buffers.group.z;
  complement.stream = p.stream;
  check_launch(launch_complement(complement, head_dim), "complement", problem);
}

// dh = (1 - M)^T dH and dz of the group.
void run_transposed_complement(const Shape& shape, const sla2_attn_bwd_params& p,
                               const BwdBuffers& buffers, const Group& group) {
  if (p.soft_map != nullptr) {
    sum_weighted(shape, p, buffers, group, true);
    return;
  }
  ComplementParams complement = {};
  complement.shape = shape;
  std::swap(complement.shape.num_q_blocks, complement.shape.num_k_blocks);
  complement.bh_count = group.bh_count;
  complement.mask = buffers.mask_transposed + group.bh_begin * mask_size(complement.shape);
  complement.state = buffers.group.dstate_q;
  complement.h = buffers.group.state;
  complement.z = buffers.group.dz;
  if (buffers.sm90) {
    complement.tickets = group.counters + linear_counters(shape, buffers.heads_per_group);
  }
  complement.stream = p.stream;
  const auto launch = buffers.sm90 ? launch_complement_sm90 : launch_complement;
  check_launch(launch(complement, p.shape.head_dim), "transposed complement", describe(p.shape));
}

// dQ, dV and, uncentred, dK.
void run_heads(const Shape& shape, const sla2_attn_bwd_params& p, const BwdBuffers& buffers) {
  const NvtxRange range("sla2.attn_bwd");
  const std::string problem = describe(p.shape);
  const int dtype = p.shape.dtype, head_dim = p.shape.head_dim;
  AttnBwdParams attn = attn_params(shape, p, buffers);
  const auto launch_rows = buffers.sm90 ? launch_bwd_rows_sm90 : launch_bwd_rows_sm80;
  const auto launch_columns = buffers.sm90 ? launch_bwd_columns_sm90 : launch_bwd_columns_sm80;
  Group group = {0, 0, buffers.counters};
  for (; group.bh_begin < shape.num_bh; group.bh_begin += buffers.heads_per_group) {
    group.bh_count = std::min(buffers.heads_per_group, shape.num_bh - group.bh_begin);
    attn.bh_begin = group.bh_begin;
    attn.bh_count = group.bh_count;
    if (has_linear(p)) run_linear(shape, p, buffers, group);
    check_launch(launch_rows(attn, dtype, head_dim), "bwd_rows", problem);
    if (p.soft_map != nullptr) run_map_grad(shape, p, buffers, group);
    if (has_linear(p)) run_transposed_complement(shape, p, buffers, group);
    check_launch(launch_columns(attn, dtype, head_dim), "bwd_columns", problem);
    group.counters += buffers.group_counters;
  }
}

void finish(const Shape& shape, const sla2_attn_bwd_params& p, const BwdBuffers& buffers) {
  const NvtxRange range("sla2.bwd_finish");
  const std::string problem = describe(p.shape);
  if (p.smooth_k) {
    ReduceParams reduce = {};
    reduce.shape = shape;
    reduce.k_sum = buffers.block_sums;
    reduce.k_mean = buffers.dk_mean;
    reduce.smooth = 1;
    reduce.stream = p.stream;
    check_launch(launch_reduce(reduce, p.shape.head_dim), "reduce", problem);
    const CentreParams centre = {shape, view(p.grad_k), buffers.dk_mean, p.stream};
    check_launch(launch_centre_keys(centre, p.shape.dtype, p.shape.head_dim), "centre_keys",
                 problem);
  }
  if (p.branch == SLA2_BRANCH_BOTH) {
    const AlphaGradParams alpha = {shape,
                                   buffers.alpha_partial,
                                   static_cast<int>(alpha_width(shape, p)),
                                   p.grad_alpha_logit,
                                   p.alpha_stride_head,
                                   p.stream};
    check_launch(launch_alpha_grad(alpha), "alpha_grad", problem);
  }
}

}  // namespace
}  // namespace sla2

sla2_status sla2_attn_bwd_workspace(const sla2_attn_bwd_params* params, size_t* bytes) {
  return sla2::guard([&] {
    sla2::require(params != nullptr && bytes != nullptr, "params or bytes is null");
    const sla2::Shape shape = sla2::validate_sizes(*params);
    sla2::Arena arena(nullptr);
    if (!sla2::is_empty(shape)) sla2::plan_attn_bwd(arena, shape, *params);
    *bytes = arena.used();
  });
}

sla2_status sla2_attn_bwd(const sla2_attn_bwd_params* params) {
  return sla2::guard([&] {
    sla2::require(params != nullptr, "params is null");
    const sla2_attn_bwd_params& p = *params;
    sla2::validate_attn_bwd(p);
    const sla2::Shape shape = sla2::validate_shape(p.shape);
    if (sla2::is_empty(shape)) return;
    sla2::require_support(p.shape.dtype, p.shape.head_dim, SLA2_QUANT_NONE, p.path);
    sla2::Arena arena(p.workspace);
    const sla2::BwdBuffers buffers = sla2::plan_attn_bwd(arena, shape, p);
    sla2::require_workspace(arena, p.workspace, p.workspace_bytes);
    sla2::prepare(shape, p, buffers);
    sla2::run_heads(shape, p, buffers);
    sla2::finish(shape, p, buffers);
  });
}
