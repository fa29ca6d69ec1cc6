// Arguments of every kernel launcher: plain structs filled by core/forward.cpp,
// core/backward.cpp, core/soft_map.cpp and core/rotary.cpp. A launcher enqueues on `stream` and
// returns the launch error.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "sla2/sla2.h"

namespace sla2 {

struct Shape {
  int seqlen, num_heads, num_bh;   // num_bh = batch * heads; "bh" indexes it
  int num_q_blocks, num_k_blocks;  // T_m, T_n
};

// (B, N, H, D) view, strides in elements; `row` gives the first element of a token's head.
struct TensorView {
  const void* data;
  int64_t stride_batch, stride_token, stride_head;
};

// Means and extremes in one read of Q, K (V).
struct PoolParams {
  Shape shape;
  TensorView q, k, v;
  float* q_mean;          // [BH, T_m, D], null: Q is not read
  float* k_sum;           // [BH, T_n, D] block sums or null; K is not read where k_range is too
  void* k_range;          // [BH, T_n, 2, D] elements, largest and smallest K of each block, or null
  float* v_amax_partial;  // [BH, T_m, D] maxima over 128 tokens, null: V is not read
  cudaStream_t stream;
};

struct ReduceParams {
  Shape shape;
  const float* k_sum;           // [BH, T_n, D] or null
  const float* v_amax_partial;  // [BH, T_m, D] or null
  float* k_mean;                // [BH, D]; zeros when smooth is 0
  // [BH, 2, D]: amax / 448 (int8_fp8) or the power of two above amax (int8_fp16), then its inverse
  // (448 / amax as such: bf16 inputs tie often, and one ulp would show).
  float* v_scale;
  int smooth;
  int quant;
  int* counters;  // [num_counters] of later kernels, set to zero here
  int num_counters;
  cudaStream_t stream;
};

struct ProjectInputs {
  Shape shape;
  const float* q_mean;  // [BH, T_m, D]
  const float* k_sum;   // [BH, T_n, D]
  const float* k_mean;  // [BH, D]
  const float* proj_q;  // [D, D] or [H, D, D]
  const float* proj_k;
  int64_t proj_stride_head;
};

struct ProjectParams : ProjectInputs {
  float* q_proj;  // [BH, T_m, D]
  float* k_proj;  // [BH, T_n, D]
  cudaStream_t stream;
};

// Scores and selection for query blocks [row_begin, row_begin + row_count) of heads [bh_begin,
// bh_begin + bh_count).
struct SelectParams {
  Shape shape;
  int bh_begin, bh_count, row_begin, row_count;
  const float* q_proj;
  const float* k_proj;
  float* scores;         // [bh_count, row_count, T_n]
  const int* pinned_kv;  // [num_pinned]
  int num_pinned;
  int num_kv_blocks;  // K
  uint16_t* lut;      // [BH, T_m, K]
  int* counts;        // [BH, T_m]
  cudaStream_t stream;
};

// The caller's lists made ascending and distinct, without entries that name no key block.
struct CompactParams {
  Shape shape;
  const uint16_t* lut_in;  // [BH, T_m, K]
  const int* counts_in;    // [BH, T_m]
  int max_kv_blocks;
  uint16_t* lut;
  int* counts;
  cudaStream_t stream;
};

// SoftTop-k of every row of scores: m = sigmoid(scores / tau + lambda), lambda such that the row
// sums to K; pinned blocks have m = 1 and count toward it. The map may take the place of the
// scores.
struct SoftTopKParams {
  Shape shape;
  const float* scores;   // [BH, T_m, T_n]
  const int* pinned_kv;  // [num_pinned]
  int num_pinned;
  int num_kv_blocks;  // K
  double tau;
  float* map;  // [BH, T_m, T_n]
  cudaStream_t stream;
};

// The gradient of the scores of SoftTop-k from that of log m, whose place it may take.
struct SoftTopKBwdParams {
  Shape shape;
  const float* map;           // [BH, T_m, T_n] m
  const float* grad_log_map;  // [BH, T_m, T_n]
  double tau;
  float* grad_scores;  // [BH, T_m, T_n]
  cudaStream_t stream;
};

// Rotary embedding of the pairs of neighbouring features; inverse: by the opposite angles.
struct RotaryParams {
  Shape shape;
  TensorView x, cos, sin, out;  // cos and sin float32
  int inverse;
  cudaStream_t stream;
};

// A soft map m made into lists of the key blocks with m >= SLA2_SOFT_MAP_MIN, and the linear
// branch's weights 1 - m, which of the other blocks round to 1.
struct SoftListParams {
  Shape shape;
  const float* map;   // [BH, T_m, T_n]
  uint16_t* lut;      // [BH, T_m, T_n]
  int* counts;        // [BH, T_m]
  uint16_t* weights;  // bf16 [BH, T_m, weight_pitch(T_n)], zeros from T_n on
  cudaStream_t stream;
};

// Quantised K/V records and linear-branch states of heads [bh_begin, bh_begin + bh_count), one read
// of K and V.
struct StateParams {
  Shape shape;
  int bh_begin, bh_count;
  TensorView k, v;
  const float* k_mean;   // [BH, D]
  const float* v_scale;  // [BH, 2, D]
  void* records;         // [BH, T_n] KvRecord, null when quant is none
  float* k_scale;        // [BH, T_n]
  uint16_t* state;       // bf16 [bh_count, T_n, state_elements], null: no linear branch
  int quant;
  int phi_raw_k;
  cudaStream_t stream;
};

// H = (1 - M) h and Z = (1 - M) z, heads [bh_begin, bh_begin + bh_count).
struct ComplementParams {
  Shape shape;
  int bh_begin, bh_count;
  const uint16_t* lut;  // [BH, T_m, K]
  const int* counts;    // [BH, T_m]
  int max_kv_blocks;
  uint32_t* mask;         // 1 - M as bits, [bh_count, mask_words(T_n), mask_pitch(T_m)], scratch
  const uint16_t* state;  // bf16 [bh_count, T_n, state_elements]
  uint16_t* h;            // bf16 [BH, T_m, D, D]
  float* z;               // [BH, T_m, 2, D] high and low part
  int* tickets;           // Hopper path, bh_begin 0: a counter, zero
  cudaStream_t stream;
};

#if defined(__CUDACC__)
#define SLA2_HOST_DEVICE __host__ __device__
#else
#define SLA2_HOST_DEVICE
#endif

// The complement's bits: one word for 32 key blocks, words of a tile's 128 query blocks side by
// side.
SLA2_HOST_DEVICE constexpr int mask_words(int num_k_blocks) { return (num_k_blocks + 63) / 64 * 2; }
SLA2_HOST_DEVICE constexpr int mask_pitch(int num_q_blocks) {
  return (num_q_blocks + 127) / 128 * 128;
}

// The weights 1 - m of a soft map are rows of this many key blocks: whole tiles.
SLA2_HOST_DEVICE constexpr int weight_pitch(int num_k_blocks) {
  return (num_k_blocks + 127) / 128 * 128;
}

// The complement's products with the real weights W = 1 - m: H = W h and Z = W z, or, transposed,
// dh = W^T dH and dz.
struct WeightedSumParams {
  Shape shape;
  int bh_count;
  bool transposed;
  const uint16_t* weights;  // bf16 [bh_count, T_m, weight_pitch(T_n)]
  const uint16_t* state;    // bf16 [bh_count, T_n or, transposed, T_m, state_elements]
  uint16_t* h;              // bf16 [bh_count, T_m or T_n, D, D]
  float* z;                 // [bh_count, T_m or T_n, 2, D] high and low part
  cudaStream_t stream;
};

// Sparse + linear + blend for all query blocks.
struct AttnParams {
  Shape shape;
  TensorView q, k, v;
  TensorView out, out_sparse;  // out_sparse.data null: not written
  float* lse;                  // [BH, N] or null
  const uint16_t* lut;         // [BH, T_m, K]
  const int* counts;           // [BH, T_m]
  int max_kv_blocks;
  const void* records;   // quantised modes
  const float* k_scale;  // [BH, T_n]
  const float* v_scale;  // [BH, 2, D]
  const float* k_mean;   // [BH, D], corrects lse where S is of raw K ("none")
  const uint16_t* h;     // bf16 [BH, T_m, D, D]; Hopper path, int8_fp8: see h_row
  const float* z;        // [BH, T_m, 2, D]; Hopper path: z_parts instead of 2
  const float* alpha_logit;
  int64_t alpha_stride_head;
  int alpha_per_token;
  int branch;
  float softmax_scale;
  const float* soft_map;  // [BH, T_m, T_n] m, added to the scores as log m; null: hard map
  cudaStream_t stream;
};

// Hopper path: parts that z and Z are kept in. bf16 holds 16 bits in two; e4m3, in which the states
// of int8_fp8 are, in four, each sixteen times finer than the one before.
SLA2_HOST_DEVICE constexpr int z_parts(int quant) {
  constexpr int kParts[] = {2, 2, 4};  // by quant
  return kParts[quant];
}
// A state is h [D][D] and the parts of z [D], bf16 or e4m3.
SLA2_HOST_DEVICE constexpr int state_bytes(int head_dim, int quant) {
  return (head_dim + z_parts(quant)) * head_dim * (quant == SLA2_QUANT_INT8_FP8 ? 1 : 2);
}

// Hopper path, one launch: the state, record and complement work of heads [bh_begin, bh_begin +
// bh_count) of K and V; arrays hold these heads alone. `state` is a ring of state_slots heads; its
// layout belongs to the kernel.
struct LinearParams {
  Shape shape;
  int bh_begin, bh_count;
  TensorView k, v;
  const float* k_mean;   // [bh_count, D]
  const void* k_range;   // [bh_count, T_n, 2, D] elements, largest and smallest K of each block,
                         // null when quant is none
  const float* v_scale;  // [bh_count, 2, D], null when quant is none
  void* records;         // [bh_count, T_n] KvRecord, null when quant is none
  float* k_scale;        // [bh_count, T_n]
  int quant;             // none or int8_fp8
  int phi_raw_k;
  // Of the backward pass, quant none: nothing runs beside the predecessor, which may still read
  // what lay in the place of the states.
  int backward;
  const uint32_t* mask;  // 1 - M as bits, [bh_count, mask_words(T_n), mask_pitch(T_m)]
  void* state;           // [state_slots, T_n, state_bytes], null: records only
  int state_slots;       // heads
  uint16_t* h;           // bf16 [bh_count, T_m, D, D]; int8_fp8 [.., D / 64, D, 64]: see h_row
  float* z;              // [bh_count, T_m, z_parts, D]: Z is their sum
  int* counters;         // linear_counters(), zero; 8-byte aligned
  cudaStream_t stream;
};

// Hopper path: rows of the router in two fp16 parts each, row = scale (high + low), 22 bits in all.
// router_split.cuh defines their order; rows past the end hold anything.
SLA2_HOST_DEVICE constexpr int split_rows(int rows) { return (rows + 63) / 64 * 64; }
struct SplitRows {
  uint16_t* parts;  // fp16 [BH, split_rows(T), 2, D]
  float* scale;     // [BH, split_rows(T)]
};

struct SplitProjectParams : ProjectInputs {
  SplitRows q, k;  // T = T_m and T_n
  cudaStream_t stream;
};

// Hopper path: scores, selection, lists and complement bits of all rows in one launch.
struct RouteParams {
  Shape shape;
  SplitRows q, k;        // of launch_project_sm90
  float* scores;         // [BH, T_m, T_n] or null
  const int* pinned_kv;  // [num_pinned]
  int num_pinned;
  int num_kv_blocks;  // K
  uint16_t* lut;      // [BH, T_m, K]
  int* counts;        // [BH, T_m]
  uint32_t* mask;     // [BH, mask_words(T_n), mask_pitch(T_m)] or null
  cudaStream_t stream;
};

// ---- Backward pass ----

// Places for the gradient of linear-branch states, of the same layout as the states:
//   dstate_q: dH_i = w^T dO_l and dZ_i of query block i, bf16 [bh_count, T_m, state_elements]
//   dh, dz:   dh_j = sum_i (1 - M_ij) dH_i of key block j, bf16 [bh_count, T_n, D, D], and dz_j,
//             [bh_count, T_n, 2, D], its sum in two parts
//
// The lists by key block ("column"): which query blocks list it, ascending. A long column is cut
// into parts, each an item of its own, that leave their sums in slots.
struct ColumnLists {
  int* counts;      // [BH, T_n] query blocks that list the key block
  int* offsets;     // [BH, T_n] start of its list in the head's part of `rows`
  uint16_t* rows;   // [BH, T_m * K] query blocks, ascending
  int* slots;       // [BH, T_n] first slot of a cut column, -1: not cut
  int* arrived;     // [BH, T_n] parts that have left their sums, zero at first
  uint32_t* items;  // [BH, num_items] column | part << 16, longest first, then kNoItem
  int64_t rows_per_head;
  int split_blocks;  // a part has at most this many query blocks, as long as slots last
  int num_items, num_slots;
};
constexpr uint32_t kNoItem = 0xffffffffu;

struct ColumnListParams {
  Shape shape;
  const uint32_t* mask;       // 1 - M as bits, [BH, mask_words(T_n), mask_pitch(T_m)]
  uint32_t* mask_transposed;  // [BH, mask_words(T_m), mask_pitch(T_n)] or null
  ColumnLists columns;
  cudaStream_t stream;
};

// Gradients for heads [bh_begin, bh_begin + bh_count), first by query block, then by key block.
// Arrays of "[bh_count, ...]" hold these heads alone.
struct AttnBwdParams {
  Shape shape;
  int bh_begin, bh_count;
  TensorView q, k, v, grad_out;
  TensorView out_sparse;     // not read when branch is linear
  TensorView dq, dk, dv;     // outputs
  const float* lse;          // [BH, N], of smoothed K; not read when branch is linear
  const uint16_t* lut;       // [BH, T_m, K]
  const int* counts;         // [BH, T_m]
  int max_kv_blocks;         // K
  const float* k_mean;       // [BH, D]
  const float* alpha_logit;  // read when branch is both
  int64_t alpha_stride_head;
  int alpha_per_token;
  int branch;
  int phi_raw_k;
  float softmax_scale;
  // Row statistics, [bh_count, T_m * 128], rows past the end +inf and 0: alpha P is
  // 2^(log2(e) scale S - row_shift) with S of raw K, dS is alpha P (dO V^T - row_delta).
  float* row_shift;
  float* row_delta;
  float* alpha_partial;  // [BH, T_m or N] d alpha_logit of each head; null: not wanted
  // Linear branch; all null without it
  const uint16_t* h;  // bf16 [bh_count, T_m, D, D]
  const float* z;     // [bh_count, T_m, 2, D]
  uint16_t* dstate_q;
  const uint16_t* dh;
  const float* dz;
  ColumnLists columns;
  float* partials;        // [bh_count, num_slots, 2, 64, D]
  float* dk_sum;          // [BH, T_n, D] sums over the block of what smoothing acts on, or null
  const float* soft_map;  // [BH, T_m, T_n] m, null: hard map
  float* grad_log_map;    // [BH, T_m, T_n] sums of dS over listed blocks; with soft_map alone
  cudaStream_t stream;
};

// d log m: adds the linear branch's share -m (<dH_i, h_j> + <dZ_i, z_j>) to the sums of dS over
// listed blocks; what the others hold is not read.
struct MapGradParams {
  Shape shape;
  int bh_count;
  const uint16_t* dstate_q;  // bf16 [bh_count, T_m, state_elements]
  const uint16_t* state;     // bf16 [bh_count, T_n, state_elements]
  const float* soft_map;     // [bh_count, T_m, T_n]
  float* grad_log_map;       // [bh_count, T_m, T_n]
  cudaStream_t stream;
};

// dK <- dK - mean, the gradient of K's smoothing.
struct CentreParams {
  Shape shape;
  TensorView dk;
  const float* dk_mean;  // [BH, D]
  cudaStream_t stream;
};

// d alpha_logit, summed over the batch and, with stride_head 0, the heads.
struct AlphaGradParams {
  Shape shape;
  const float* partial;  // [BH, width]
  int width;             // T_m or N
  float* grad;           // [H, width] with stride_head, or [width]
  int64_t stride_head;
  cudaStream_t stream;
};

cudaError_t launch_pool(const PoolParams&, int dtype, int head_dim);
cudaError_t launch_reduce(const ReduceParams&, int head_dim);
cudaError_t launch_project(const ProjectParams&, int head_dim);
cudaError_t launch_score(const SelectParams&, int head_dim);
cudaError_t launch_select(const SelectParams&);
cudaError_t launch_compact(const CompactParams&);
cudaError_t launch_soft_top_k(const SoftTopKParams&);
cudaError_t launch_soft_top_k_bwd(const SoftTopKBwdParams&);
cudaError_t launch_soft_lists(const SoftListParams&);
cudaError_t launch_linear_state(const StateParams&, int dtype, int head_dim);
cudaError_t launch_complement_mask(const ComplementParams&);
cudaError_t launch_complement(const ComplementParams&, int head_dim);
cudaError_t launch_weighted_sum(const WeightedSumParams&, int head_dim);
cudaError_t launch_map_grad(const MapGradParams&, int head_dim);
cudaError_t launch_project_sm90(const SplitProjectParams&, int head_dim);
// Whether the scores of 16 rows fit shared memory: up to 3008 key blocks.
bool route_sm90_fits(const Shape&);
cudaError_t launch_route_sm90(const RouteParams&, int head_dim);
int linear_counters(const Shape&, int bh_count);
cudaError_t launch_linear_sm90(const LinearParams&, int dtype, int head_dim);
cudaError_t launch_complement_sm90(const ComplementParams&, int head_dim);
cudaError_t launch_attn_fwd_sm90(const AttnParams&, int dtype, int head_dim, int quant);
cudaError_t launch_attn_fwd_sm80(const AttnParams&, int dtype, int head_dim, int quant);
cudaError_t launch_column_lists(const ColumnListParams&);
cudaError_t launch_bwd_rows_sm80(const AttnBwdParams&, int dtype, int head_dim);
cudaError_t launch_bwd_rows_sm90(const AttnBwdParams&, int dtype, int head_dim);
cudaError_t launch_bwd_columns_sm80(const AttnBwdParams&, int dtype, int head_dim);
cudaError_t launch_bwd_columns_sm90(const AttnBwdParams&, int dtype, int head_dim);
cudaError_t launch_centre_keys(const CentreParams&, int dtype, int head_dim);
cudaError_t launch_alpha_grad(const AlphaGradParams&);
cudaError_t launch_rotary(const RotaryParams&, int dtype, int head_dim);

}  // namespace sla2
