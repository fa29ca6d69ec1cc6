// The forward pipeline: one function per operation of the public header, each a short list of
// launches.
//
//   portable: pool -> reduce -> project -> score -> select, or compact -> per group of heads
//     [linear_state -> complement_mask -> complement] -> attn
//   sm90:     pool -> reduce -> project -> route, or compact -> complement_mask -> linear -> attn
//   soft map: pool -> reduce -> soft_lists -> per group of heads [linear_state -> weighted_sum]
//     -> attn, all portable
//
// Path auto takes sm90 where the device and the request allow it. Its router is sm90's even where
// the rest is portable.
#include <algorithm>
#include <cstdint>

#include "core/device.h"
#include "core/error.h"
#include "core/nvtx.h"
#include "core/pipeline.h"
#include "core/validate.h"
#include "kernels/common/params.h"
#include "sla2/sla2.h"

namespace sla2 {
namespace {

// Router scores exist for this many bytes of rows at a time.
constexpr int64_t kScoreGroupBytes = 64 << 20;
// Linear-branch states exist for a group of heads at a time: a quarter of the inputs' bytes within
// these limits, so that the workspace stays near the inputs' size. On an H200, 40 heads of 75600
// tokens: 15.7 ms with 48 MiB (the states stay in L2, but each launch ends in a partial wave), 15.2
// with 100, 15.05 with 160, 14.95 with 320, 14.9 with 640.
constexpr int64_t kMinStateGroupBytes = 64 << 20, kMaxStateGroupBytes = 320 << 20;

// Hopper's e4m3 products accumulate in about 14 bits. On Gaussian data the sparse output's relative
// distance from the portable kernel's, which accumulate in float32, is 9e-4 with 3 listed blocks
// and 4.4e-3 with 313; longer lists than this are left to the portable kernels by path auto and
// refused by path sm90.
constexpr int kMaxBlocksSm90Fp8 = 128;

struct RouteBuffers {
  bool fused;  // sm90
  float* q_mean;
  float* q_proj;  // portable
  float* k_proj;
  float* scores;
  int heads_per_group, rows_per_group;
  SplitRows q_split, k_split;  // sm90
};

struct Buffers {
  bool sm90;
  float* k_sum;
  float* k_mean;
  void* k_range;  // sm90
  float* v_amax_partial;
  float* v_scale;
  RouteBuffers route;
  uint16_t* lut;
  int* counts;
  void* records;
  float* k_scale;
  uint32_t* mask;     // of a hard map
  uint16_t* weights;  // of a soft one
  void* state;
  int state_slots;  // sm90
  uint16_t* h;
  float* z;
  int heads_per_group;  // portable
  int* counters;        // sm90
  int num_counters;
};

RouteBuffers plan_route(Arena& arena, const Shape& shape, int head_dim, bool sm90,
                        bool scores_given) {
  RouteBuffers buffers = {};
  buffers.fused = sm90 && route_sm90_fits(shape);
  const int64_t q_rows = static_cast<int64_t>(shape.num_bh) * shape.num_q_blocks;
  const int64_t k_rows = static_cast<int64_t>(shape.num_bh) * shape.num_k_blocks;
  buffers.q_mean = arena.take<float>(q_rows * head_dim);
  if (buffers.fused) {
    const auto take_split = [&](int rows) {
      const int64_t count = static_cast<int64_t>(shape.num_bh) * split_rows(rows);
      uint16_t* parts = arena.take<uint16_t>(count * 2 * head_dim);
      return SplitRows{parts, arena.take<float>(count)};
    };
    buffers.q_split = take_split(shape.num_q_blocks);
    buffers.k_split = take_split(shape.num_k_blocks);
    return buffers;
  }
  buffers.q_proj = arena.take<float>(q_rows * head_dim);
  buffers.k_proj = arena.take<float>(k_rows * head_dim);
  buffers.heads_per_group = shape.num_bh;
  buffers.rows_per_group = shape.num_q_blocks;
  if (!scores_given) {
    const int64_t row_bytes = static_cast<int64_t>(shape.num_k_blocks) * sizeof(float);
    const int64_t head_bytes = row_bytes * shape.num_q_blocks;
    buffers.heads_per_group =
        static_cast<int>(std::clamp<int64_t>(kScoreGroupBytes / head_bytes, 1, shape.num_bh));
    buffers.rows_per_group =
        static_cast<int>(std::clamp<int64_t>(kScoreGroupBytes / row_bytes, 1, shape.num_q_blocks));
    buffers.scores = arena.take<float>(static_cast<int64_t>(buffers.heads_per_group) *
                                       buffers.rows_per_group * shape.num_k_blocks);
  }
  return buffers;
}

bool has_sparse(const sla2_attn_fwd_params& p) { return p.branch != SLA2_BRANCH_LINEAR; }
bool has_linear(const sla2_attn_fwd_params& p) { return p.branch != SLA2_BRANCH_SPARSE; }
int sparse_quant(const sla2_attn_fwd_params& p) {
  return has_sparse(p) ? p.quant : SLA2_QUANT_NONE;
}
bool lists_fit_sm90(const sla2_attn_fwd_params& p) {
  return sparse_quant(p) != SLA2_QUANT_INT8_FP8 || p.lists.max_kv_blocks <= kMaxBlocksSm90Fp8;
}

Buffers plan_attn_fwd(Arena& arena, const Shape& shape, const sla2_attn_fwd_params& p) {
  Buffers buffers = {};
  const int64_t d = p.shape.head_dim;
  const int64_t q_rows = static_cast<int64_t>(shape.num_bh) * shape.num_q_blocks;
  const int64_t k_rows = static_cast<int64_t>(shape.num_bh) * shape.num_k_blocks;
  const bool routed = p.router.proj_q != nullptr;
  const int quant = sparse_quant(p);
  const bool soft = p.soft_map != nullptr;
  buffers.sm90 = !soft && uses_sm90(p.quant, p.path) && lists_fit_sm90(p);
  if (p.smooth_k || routed) buffers.k_sum = arena.take<float>(k_rows * d);
  buffers.k_mean = arena.take<float>(shape.num_bh * d);
  if (routed) {
    // As sla2_route would, whatever the precision: both must list the same blocks.
    buffers.route =
        plan_route(arena, shape, p.shape.head_dim, uses_sm90(SLA2_QUANT_NONE, p.path), false);
  } else {
    buffers.lut = arena.take<uint16_t>(q_rows * list_width(shape, p));
    buffers.counts = arena.take<int>(q_rows);
  }
  if (quant != SLA2_QUANT_NONE) {
    buffers.v_amax_partial = arena.take<float>(q_rows * d);
    buffers.v_scale = arena.take<float>(shape.num_bh * 2 * d);
    const int64_t record = SLA2_BLOCK_K * d * (quant == SLA2_QUANT_INT8_FP8 ? 2 : 3);
    buffers.records = arena.take<char>(k_rows * record);
    buffers.k_scale = arena.take<float>(k_rows);
    if (buffers.sm90) buffers.k_range = arena.take<uint16_t>(k_rows * 2 * d);
  }
  buffers.heads_per_group = shape.num_bh;
  if (buffers.sm90) {
    buffers.num_counters = linear_counters(shape, shape.num_bh);
    buffers.counters = arena.take<int>(buffers.num_counters);
  }
  if (has_linear(p)) {
    if (buffers.sm90) {
      const int64_t head_bytes =
          int64_t{1} * shape.num_k_blocks * state_bytes(p.shape.head_dim, quant);
      buffers.state_slots = state_slots(shape.num_bh, head_bytes);
      buffers.state = arena.take<char>(buffers.state_slots * head_bytes);
    } else {
      const int64_t head_bytes = int64_t{2} * shape.num_k_blocks * (d * d + 2 * d);
      const int64_t input_bytes = 3 * 2 * static_cast<int64_t>(shape.num_bh) * shape.seqlen * d;
      const int64_t group_bytes =
          std::clamp(input_bytes / 4, kMinStateGroupBytes, kMaxStateGroupBytes);
      buffers.heads_per_group =
          static_cast<int>(std::clamp<int64_t>(group_bytes / head_bytes, 1, shape.num_bh));
      buffers.state = arena.take<char>(buffers.heads_per_group * head_bytes);
    }
    if (soft) {
      buffers.weights = arena.take<uint16_t>(q_rows * weight_pitch(shape.num_k_blocks));
    } else {
      buffers.mask =
          arena.take<uint32_t>(static_cast<int64_t>(buffers.heads_per_group) *
                               mask_words(shape.num_k_blocks) * mask_pitch(shape.num_q_blocks));
    }
    buffers.h = arena.take<uint16_t>(q_rows * d * d);
    buffers.z = arena.take<float>(q_rows * (buffers.sm90 ? z_parts(quant) : 2) * d);
  }
  return buffers;
}

// Pooled means to block lists; the fused kernel also writes the complement's bits to `mask` unless
// that is null.
void run_router(const Shape& shape, const sla2_shape& given, const sla2_router& router,
                const RouteBuffers& buffers, const float* k_sum, const float* k_mean,
                const sla2_block_lists& lists, float* all_scores, uint32_t* mask,
                cudaStream_t stream) {
  const NvtxRange range("sla2.route");
  const std::string problem = describe(given);
  const ProjectInputs inputs = {shape,         buffers.q_mean,         k_sum, k_mean, router.proj_q,
                                router.proj_k, router.proj_stride_head};
  if (buffers.fused) {
    const SplitProjectParams project = {inputs, buffers.q_split, buffers.k_split, stream};
    check_launch(launch_project_sm90(project, given.head_dim), "router_project", problem);
    const RouteParams route = {shape,
                               buffers.q_split,
                               buffers.k_split,
                               all_scores,
                               router.pinned_kv,
                               router.num_pinned,
                               router.num_kv_blocks,
                               lists.lut,
                               lists.counts,
                               mask,
                               stream};
    check_launch(launch_route_sm90(route, given.head_dim), "route", problem);
    return;
  }

  const ProjectParams project = {inputs, buffers.q_proj, buffers.k_proj, stream};
  check_launch(launch_project(project, given.head_dim), "router_project", problem);

  SelectParams select = {};
  select.shape = shape;
  select.q_proj = buffers.q_proj;
  select.k_proj = buffers.k_proj;
  select.scores = all_scores != nullptr ? all_scores : buffers.scores;
  select.pinned_kv = router.pinned_kv;
  select.num_pinned = router.num_pinned;
  select.num_kv_blocks = router.num_kv_blocks;
  select.lut = lists.lut;
  select.counts = lists.counts;
  select.stream = stream;
  for (int bh = 0; bh < shape.num_bh; bh += buffers.heads_per_group) {
    for (int row = 0; row < shape.num_q_blocks; row += buffers.rows_per_group) {
      select.bh_begin = bh;
      select.bh_count = std::min(buffers.heads_per_group, shape.num_bh - bh);
      select.row_begin = row;
      select.row_count = std::min(buffers.rows_per_group, shape.num_q_blocks - row);
      check_launch(launch_score(select, given.head_dim), "router_score", problem);
      check_launch(launch_select(select), "router_select", problem);
    }
  }
}

// Records and complement, in portable one group of heads after the other. mask_done: the router
// has written the complement's bits.
void run_linear(const Shape& shape, const sla2_attn_fwd_params& p, const Buffers& buffers,
                const sla2_block_lists& lists, bool mask_done) {
  const NvtxRange range("sla2.linear_pre");
  const std::string problem = describe(p.shape);
  ComplementParams complement = {};
  complement.shape = shape;
  complement.lut = lists.lut;
  complement.counts = lists.counts;
  complement.max_kv_blocks = lists.max_kv_blocks;
  complement.mask = buffers.mask;
  complement.state = static_cast<uint16_t*>(buffers.state);
  complement.h = buffers.h;
  complement.z = buffers.z;
  complement.stream = p.stream;
  if (buffers.sm90) {
    LinearParams linear = {};
    linear.shape = shape;
    linear.bh_count = shape.num_bh;
    linear.k = view(p.k);
    linear.v = view(p.v);
    linear.k_mean = buffers.k_mean;
    linear.k_range = buffers.k_range;
    linear.v_scale = buffers.v_scale;
    linear.records = buffers.records;
    linear.k_scale = buffers.k_scale;
    linear.quant = sparse_quant(p);
    linear.phi_raw_k = p.phi_raw_k;
    linear.mask = buffers.mask;
    linear.state = buffers.state;
    linear.state_slots = buffers.state_slots;
    linear.h = buffers.h;
    linear.z = buffers.z;
    linear.counters = buffers.counters;
    linear.stream = p.stream;
    if (has_linear(p) && !mask_done) {
      complement.bh_count = shape.num_bh;
      check_launch(launch_complement_mask(complement), "complement_mask", problem);
    }
    check_launch(launch_linear_sm90(linear, p.shape.dtype, p.shape.head_dim), "linear", problem);
    return;
  }
  StateParams state = {};
  state.shape = shape;
  state.k = view(p.k);
  state.v = view(p.v);
  state.k_mean = buffers.k_mean;
  state.v_scale = buffers.v_scale;
  state.records = buffers.records;
  state.k_scale = buffers.k_scale;
  state.state = static_cast<uint16_t*>(buffers.state);
  state.quant = sparse_quant(p);
  state.phi_raw_k = p.phi_raw_k;
  state.stream = p.stream;
  for (int bh = 0; bh < shape.num_bh; bh += buffers.heads_per_group) {
    state.bh_begin = complement.bh_begin = bh;
    state.bh_count = complement.bh_count = std::min(buffers.heads_per_group, shape.num_bh - bh);
    check_launch(launch_linear_state(state, p.shape.dtype, p.shape.head_dim), "linear_state",
                 problem);
    if (p.soft_map != nullptr) {
      const int64_t row = static_cast<int64_t>(bh) * shape.num_q_blocks, d = p.shape.head_dim;
      const WeightedSumParams sum = {shape,
                                     state.bh_count,
                                     false,
                                     buffers.weights + row * weight_pitch(shape.num_k_blocks),
                                     state.state,
                                     buffers.h + row * d * d,
                                     buffers.z + row * 2 * d,
                                     p.stream};
      check_launch(launch_weighted_sum(sum, p.shape.head_dim), "weighted_sum", problem);
    } else if (has_linear(p)) {
      check_launch(launch_complement_mask(complement), "complement_mask", problem);
      check_launch(launch_complement(complement, p.shape.head_dim), "complement", problem);
    }
  }
}

void run_attention(const Shape& shape, const sla2_attn_fwd_params& p, const Buffers& buffers,
                   const sla2_block_lists& lists) {
  const NvtxRange range("sla2.attn_fwd");
  AttnParams attn = {};
  attn.shape = shape;
  attn.q = view(p.q);
  attn.k = view(p.k);
  attn.v = view(p.v);
  attn.out = view(p.out);
  attn.out_sparse = view(p.out_sparse);
  attn.lse = p.lse;
  attn.lut = lists.lut;
  attn.counts = lists.counts;
  attn.max_kv_blocks = lists.max_kv_blocks;
  attn.records = buffers.records;
  attn.k_scale = buffers.k_scale;
  attn.v_scale = buffers.v_scale;
  attn.k_mean = buffers.k_mean;
  attn.h = buffers.h;
  attn.z = buffers.z;
  attn.alpha_logit = p.alpha_logit;
  attn.alpha_stride_head = p.alpha_stride_head;
  attn.alpha_per_token = p.alpha_per_token;
  attn.branch = p.branch;
  attn.softmax_scale = p.softmax_scale;
  attn.soft_map = p.soft_map;
  attn.stream = p.stream;
  const auto launch = buffers.sm90 ? launch_attn_fwd_sm90 : launch_attn_fwd_sm80;
  check_launch(launch(attn, p.shape.dtype, p.shape.head_dim, sparse_quant(p)), "attn_fwd",
               describe(p.shape));
}

}  // namespace
}  // namespace sla2

sla2_status sla2_route_workspace(const sla2_route_params* params, size_t* bytes) {
  return sla2::guard([&] {
    sla2::require(params != nullptr && bytes != nullptr, "params or bytes is null");
    const sla2::Shape shape = sla2::validate_sizes(*params);
    sla2::Arena arena(nullptr);
    if (!sla2::is_empty(shape)) {
      arena.take<float>(static_cast<int64_t>(shape.num_bh) * shape.num_k_blocks *
                        params->shape.head_dim);
      arena.take<float>(static_cast<int64_t>(shape.num_bh) * params->shape.head_dim);
      sla2::plan_route(arena, shape, params->shape.head_dim,
                       sla2::uses_sm90(SLA2_QUANT_NONE, params->path), params->scores != nullptr);
    }
    *bytes = arena.used();
  });
}

sla2_status sla2_route(const sla2_route_params* params) {
  return sla2::guard([&] {
    sla2::require(params != nullptr, "params is null");
    const sla2_route_params& p = *params;
    sla2::validate_route(p);
    const sla2::Shape shape = sla2::validate_shape(p.shape);
    if (sla2::is_empty(shape)) return;
    sla2::require_support(p.shape.dtype, p.shape.head_dim, SLA2_QUANT_NONE, p.path);
    sla2::Arena arena(p.workspace);
    float* k_sum = arena.take<float>(static_cast<int64_t>(shape.num_bh) * shape.num_k_blocks *
                                     p.shape.head_dim);
    float* k_mean = arena.take<float>(static_cast<int64_t>(shape.num_bh) * p.shape.head_dim);
    const sla2::RouteBuffers buffers =
        sla2::plan_route(arena, shape, p.shape.head_dim, sla2::uses_sm90(SLA2_QUANT_NONE, p.path),
                         p.scores != nullptr);
    sla2::require_workspace(arena, p.workspace, p.workspace_bytes);

    sla2::PoolParams pool = {};
    pool.q = sla2::view(p.q);
    pool.k = sla2::view(p.k);
    pool.q_mean = buffers.q_mean;
    pool.k_sum = k_sum;
    pool.stream = p.stream;
    sla2::ReduceParams reduce = {};
    reduce.k_sum = k_sum;
    reduce.k_mean = k_mean;
    reduce.smooth = p.smooth_k;
    reduce.stream = p.stream;
    sla2::run_pool(shape, p.shape, pool, reduce);
    sla2::run_router(shape, p.shape, p.router, buffers, k_sum, k_mean, p.lists, p.scores, nullptr,
                     p.stream);
  });
}

sla2_status sla2_attn_fwd_workspace(const sla2_attn_fwd_params* params, size_t* bytes) {
  return sla2::guard([&] {
    sla2::require(params != nullptr && bytes != nullptr, "params or bytes is null");
    const sla2::Shape shape = sla2::validate_sizes(*params);
    sla2::Arena arena(nullptr);
    if (!sla2::is_empty(shape)) sla2::plan_attn_fwd(arena, shape, *params);
    *bytes = arena.used();
  });
}

sla2_status sla2_attn_fwd(const sla2_attn_fwd_params* params) {
  return sla2::guard([&] {
    sla2::require(params != nullptr, "params is null");
    const sla2_attn_fwd_params& p = *params;
    sla2::validate_attn_fwd(p);
    const sla2::Shape shape = sla2::validate_shape(p.shape);
    if (sla2::is_empty(shape)) return;
    sla2::require_support(p.shape.dtype, p.shape.head_dim, p.quant, p.path);
    if (p.path == SLA2_PATH_SM90 && !sla2::lists_fit_sm90(p)) {
      throw sla2::Error(
          SLA2_UNSUPPORTED,
          sla2::concat("path sm90 with quant int8_fp8 takes lists of at most ",
                       sla2::kMaxBlocksSm90Fp8, " key blocks; lists.max_kv_blocks is ",
                       p.lists.max_kv_blocks, ": use path portable or auto, or quant none"));
    }
    sla2::Arena arena(p.workspace);
    const sla2::Buffers buffers = sla2::plan_attn_fwd(arena, shape, p);
    sla2::require_workspace(arena, p.workspace, p.workspace_bytes);

    sla2::PoolParams pool = {};
    pool.q = sla2::view(p.q);
    pool.k = sla2::view(p.k);
    pool.v = sla2::view(p.v);
    pool.q_mean = buffers.route.q_mean;
    pool.k_sum = buffers.k_sum;
    pool.k_range = buffers.k_range;
    pool.v_amax_partial = buffers.v_amax_partial;
    pool.stream = p.stream;
    sla2::ReduceParams reduce = {};
    reduce.k_sum = buffers.k_sum;
    reduce.v_amax_partial = buffers.v_amax_partial;
    reduce.k_mean = buffers.k_mean;
    reduce.v_scale = buffers.v_scale;
    reduce.smooth = p.smooth_k;
    reduce.quant = sla2::sparse_quant(p);
    reduce.counters = buffers.counters;
    reduce.num_counters = buffers.num_counters;
    reduce.stream = p.stream;
    sla2::run_pool(shape, p.shape, pool, reduce);
    sla2_block_lists lists = p.lists;
    const bool routed = p.router.proj_q != nullptr;
    if (routed) {
      sla2::run_router(shape, p.shape, p.router, buffers.route, buffers.k_sum, buffers.k_mean,
                       p.lists, nullptr, buffers.sm90 ? buffers.mask : nullptr, p.stream);
    } else {
      sla2::run_lists(shape, p, buffers.lut, buffers.counts, buffers.weights);
      lists = {buffers.lut, buffers.counts, sla2::list_width(shape, p)};
    }
    if (sla2::has_linear(p) || sla2::sparse_quant(p) != SLA2_QUANT_NONE)
      sla2::run_linear(shape, p, buffers, lists, buffers.route.fused);
    sla2::run_attention(shape, p, buffers, lists);
  });
}
