#include "core/validate.h"

#include <cstdint>

#include "core/error.h"

namespace sla2 {
namespace {

template <typename Params>
void validate_header(const Params* params) {
  require(params != nullptr, "params is null");
  require(params->size == sizeof(Params), "params->size is ", params->size,
          ", this library expects ", sizeof(Params),
          ": set size to sizeof the struct and compile against this library's header");
}

// unit: elements in 16 bytes.
void validate_tensor(const sla2_tensor& tensor, const char* name, const sla2_shape& shape,
                     int unit = 8) {
  require(tensor.data != nullptr, name, ".data is null");
  require(reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0, name,
          ".data is not 16-byte aligned");
  // A stride is used only where its dimension has more than one entry.
  const auto check = [&](int64_t stride, int size, const char* dimension) {
    require(size <= 1 || (stride >= 0 && stride % unit == 0), name, ".stride_", dimension, " is ",
            stride, ": allowed are multiples of ", unit, " elements (16 bytes), not negative");
  };
  check(tensor.stride_batch, shape.batch, "batch");
  check(tensor.stride_token, shape.seqlen, "token");
  check(tensor.stride_head, shape.num_heads, "head");
}

// K and the pinned blocks of a router or of a soft map; prefix: "router." or "".
template <typename Choice>
void validate_kept_blocks(const Choice& choice, const char* prefix, int num_k_blocks) {
  require(choice.num_kv_blocks >= 1 && choice.num_kv_blocks <= num_k_blocks, prefix,
          "num_kv_blocks is ", choice.num_kv_blocks, ": allowed are 1 to T_n = ", num_k_blocks);
  require(choice.num_pinned >= 0 && choice.num_pinned <= choice.num_kv_blocks, prefix,
          "num_pinned is ", choice.num_pinned,
          ": allowed are 0 to num_kv_blocks = ", choice.num_kv_blocks);
  require(choice.num_pinned == 0 || choice.pinned_kv != nullptr, prefix,
          "pinned_kv is null with num_pinned ", choice.num_pinned);
}

void validate_router(const sla2_router& router, int num_k_blocks) {
  require(router.proj_q != nullptr && router.proj_k != nullptr, "router.proj_q or proj_k is null");
  validate_kept_blocks(router, "router.", num_k_blocks);
}

void validate_lists(const sla2_block_lists& lists) {
  require(lists.lut != nullptr && lists.counts != nullptr, "lists.lut or lists.counts is null");
}

void validate_list_width(const sla2_block_lists& lists, const Shape& shape) {
  if (shape.num_bh == 0 || shape.seqlen == 0) return;
  require(lists.max_kv_blocks >= 1 && lists.max_kv_blocks <= shape.num_k_blocks,
          "lists.max_kv_blocks is ", lists.max_kv_blocks,
          ": allowed are 1 to T_n = ", shape.num_k_blocks);
}

template <typename Params>
void validate_given_map(const Params& params) {
  require(params.branch == SLA2_BRANCH_BOTH, "branch is ", params.branch,
          " with a soft_map: it is for both branches");
  require(params.path != SLA2_PATH_SM90,
          "path is SLA2_PATH_SM90 with a soft_map: its kernels are portable");
}

void validate_tau(double tau) { require(tau > 0.0, "tau is ", tau, ": it must be positive"); }

void validate_choice(int value, int last, const char* name) {
  require(value >= 0 && value <= last, name, " is ", value, ": allowed are 0 to ", last);
}

}  // namespace

std::string describe(const sla2_shape& shape) {
  return concat("B=", shape.batch, " N=", shape.seqlen, " H=", shape.num_heads,
                " D=", shape.head_dim, shape.dtype == SLA2_BFLOAT16 ? " bfloat16" : " float16");
}

Shape validate_shape(const sla2_shape& shape) {
  require(shape.batch >= 0, "shape.batch is ", shape.batch, ": it must not be negative");
  require(shape.seqlen >= 0 && shape.seqlen <= SLA2_MAX_SEQLEN, "shape.seqlen is ", shape.seqlen,
          ": allowed are 0 to ", SLA2_MAX_SEQLEN);
  require(shape.num_heads >= 1, "shape.num_heads is ", shape.num_heads, ": at least 1 is needed");
  require(shape.head_dim == 64 || shape.head_dim == 128, "shape.head_dim is ", shape.head_dim,
          ": allowed are 64 and 128");
  validate_choice(shape.dtype, SLA2_FLOAT16, "shape.dtype");
  const int num_k_blocks = (shape.seqlen + SLA2_BLOCK_K - 1) / SLA2_BLOCK_K;
  const int64_t blocks = static_cast<int64_t>(shape.batch) * shape.num_heads * num_k_blocks;
  require(blocks < INT32_MAX, "batch * heads * T_n is ", blocks, ": at most 2^31 - 2 fit a launch");
  return {shape.seqlen, shape.num_heads, shape.batch * shape.num_heads,
          (shape.seqlen + SLA2_BLOCK_Q - 1) / SLA2_BLOCK_Q, num_k_blocks};
}

Shape validate_sizes(const sla2_route_params& params) {
  validate_header(&params);
  const Shape shape = validate_shape(params.shape);
  validate_choice(params.path, SLA2_PATH_SM90, "path");
  validate_list_width(params.lists, shape);
  return shape;
}

Shape validate_sizes(const sla2_attn_fwd_params& params) {
  validate_header(&params);
  const Shape shape = validate_shape(params.shape);
  validate_choice(params.quant, SLA2_QUANT_INT8_FP8, "quant");
  validate_choice(params.branch, SLA2_BRANCH_LINEAR, "branch");
  validate_choice(params.path, SLA2_PATH_SM90, "path");
  if (params.soft_map == nullptr) validate_list_width(params.lists, shape);
  return shape;
}

Shape validate_sizes(const sla2_attn_bwd_params& params) {
  validate_header(&params);
  const Shape shape = validate_shape(params.shape);
  validate_choice(params.branch, SLA2_BRANCH_LINEAR, "branch");
  validate_choice(params.path, SLA2_PATH_SM90, "path");
  if (params.soft_map == nullptr) validate_list_width(params.lists, shape);
  return shape;
}

void validate_route(const sla2_route_params& params) {
  const Shape shape = validate_sizes(params);
  if (shape.num_bh == 0 || shape.seqlen == 0) return;
  validate_tensor(params.q, "q", params.shape);
  validate_tensor(params.k, "k", params.shape);
  validate_router(params.router, shape.num_k_blocks);
  validate_lists(params.lists);
  require(params.lists.max_kv_blocks == params.router.num_kv_blocks, "lists.max_kv_blocks is ",
          params.lists.max_kv_blocks, " and router.num_kv_blocks ", params.router.num_kv_blocks,
          ": they must be equal");
}

void validate_attn_fwd(const sla2_attn_fwd_params& params) {
  const Shape shape = validate_sizes(params);
  require(params.softmax_scale > 0.f, "softmax_scale is ", params.softmax_scale,
          ": it must be positive");
  if (shape.num_bh == 0 || shape.seqlen == 0) return;
  validate_tensor(params.q, "q", params.shape);
  validate_tensor(params.k, "k", params.shape);
  validate_tensor(params.v, "v", params.shape);
  validate_tensor(params.out, "out", params.shape);
  if (params.out_sparse.data != nullptr)
    validate_tensor(params.out_sparse, "out_sparse", params.shape);
  if (params.soft_map != nullptr) {
    validate_given_map(params);
    require(params.quant == SLA2_QUANT_NONE, "quant is ", params.quant,
            " with a soft_map: it must be SLA2_QUANT_NONE");
    require(params.router.proj_q == nullptr, "router.proj_q is not null with a soft_map");
  } else {
    validate_lists(params.lists);
  }
  if (params.router.proj_q != nullptr) {
    validate_router(params.router, shape.num_k_blocks);
    require(params.lists.max_kv_blocks == params.router.num_kv_blocks, "lists.max_kv_blocks is ",
            params.lists.max_kv_blocks, " and router.num_kv_blocks ", params.router.num_kv_blocks,
            ": they must be equal");
  }
  require(params.branch != SLA2_BRANCH_BOTH || params.alpha_logit != nullptr,
          "alpha_logit is null with both branches");
}

void validate_attn_bwd(const sla2_attn_bwd_params& params) {
  const Shape shape = validate_sizes(params);
  require(params.softmax_scale > 0.f, "softmax_scale is ", params.softmax_scale,
          ": it must be positive");
  if (shape.num_bh == 0 || shape.seqlen == 0) return;
  validate_tensor(params.q, "q", params.shape);
  validate_tensor(params.k, "k", params.shape);
  validate_tensor(params.v, "v", params.shape);
  validate_tensor(params.grad_out, "grad_out", params.shape);
  validate_tensor(params.grad_q, "grad_q", params.shape);
  validate_tensor(params.grad_k, "grad_k", params.shape);
  validate_tensor(params.grad_v, "grad_v", params.shape);
  if (params.branch != SLA2_BRANCH_LINEAR) {
    validate_tensor(params.out_sparse, "out_sparse", params.shape);
    require(params.lse != nullptr, "lse is null");
  }
  if (params.soft_map != nullptr) {
    validate_given_map(params);
    require(params.grad_log_map != nullptr, "grad_log_map is null with a soft_map");
  } else {
    validate_lists(params.lists);
  }
  require(params.branch != SLA2_BRANCH_BOTH || params.alpha_logit != nullptr,
          "alpha_logit is null with both branches");
  require(params.branch != SLA2_BRANCH_BOTH || params.grad_alpha_logit != nullptr,
          "grad_alpha_logit is null with both branches");
}

void validate_soft_map(const sla2_soft_map_params& params) {
  validate_header(&params);
  const Shape shape = validate_shape(params.shape);
  validate_tau(params.tau);
  if (shape.num_bh == 0 || shape.seqlen == 0) return;
  validate_kept_blocks(params, "", shape.num_k_blocks);
  require(params.scores != nullptr, "scores is null");
  require(params.soft_map != nullptr, "soft_map is null");
}

void validate_soft_map_bwd(const sla2_soft_map_bwd_params& params) {
  validate_header(&params);
  const Shape shape = validate_shape(params.shape);
  validate_tau(params.tau);
  if (shape.num_bh == 0 || shape.seqlen == 0) return;
  require(params.soft_map != nullptr, "soft_map is null");
  require(params.grad_log_map != nullptr, "grad_log_map is null");
  require(params.grad_scores != nullptr, "grad_scores is null");
}

void validate_rotary(const sla2_rotary_params& params) {
  validate_header(&params);
  const Shape shape = validate_shape(params.shape);
  if (shape.num_bh == 0 || shape.seqlen == 0) return;
  validate_tensor(params.x, "x", params.shape);
  validate_tensor(params.cos, "cos", params.shape, 4);
  validate_tensor(params.sin, "sin", params.shape, 4);
  validate_tensor(params.out, "out", params.shape);
}

}  // namespace sla2
