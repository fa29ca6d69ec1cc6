// SLA2 attention: the C interface of libsla2.
//
// One plain struct per operation, a status code from every call, no exceptions across the border
// and no dependency besides the CUDA runtime's header. Set `size` to sizeof(the struct); every
// field that is not listed as optional must be filled. All work is enqueued on `stream`; nothing
// synchronises with the host.
//
// Notation: B batch, N tokens, H heads, D head_dim (64 or 128), T_m = ceil(N / 128) query blocks,
// T_n = ceil(N / 64) key blocks, K the width of a block list.
#ifndef SLA2_SLA2_H_
#define SLA2_SLA2_H_

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SLA2_API
#else
#define SLA2_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SLA2_BLOCK_Q 128
#define SLA2_BLOCK_K 64
#define SLA2_MAX_SEQLEN (1 << 20)
// A soft map's smallest weight that the sparse branch attends to: 2^-16.
#define SLA2_SOFT_MAP_MIN (1.0f / 65536.0f)

typedef enum sla2_status {
  SLA2_OK = 0,
  SLA2_INVALID_ARGUMENT = 1,  // the message names the field, what was given and what is allowed
  SLA2_UNSUPPORTED =
      2,  // no kernel for this device and combination; the message lists every reason
  SLA2_CUDA_ERROR =
      3,  // a launch failed; the message names the kernel, its grid and the CUDA error
} sla2_status;

typedef enum sla2_dtype { SLA2_BFLOAT16 = 0, SLA2_FLOAT16 = 1 } sla2_dtype;

typedef enum sla2_quant {
  SLA2_QUANT_NONE = 0,       // 16-bit products in the sparse branch
  SLA2_QUANT_INT8_FP16 = 1,  // int8 Q K^T, fp16 P V
  SLA2_QUANT_INT8_FP8 = 2,   // int8 Q K^T, e4m3 P V, e4m3 states in the linear branch beside it
} sla2_quant;

typedef enum sla2_branch {
  SLA2_BRANCH_BOTH = 0,    // alpha * sparse + (1 - alpha) * linear
  SLA2_BRANCH_SPARSE = 1,  // softmax over the listed key blocks alone
  SLA2_BRANCH_LINEAR = 2,  // linear attention over the unlisted key blocks alone
} sla2_branch;

typedef enum sla2_path {
  SLA2_PATH_AUTO = 0,      // sm90 where it can serve the call, else portable; Python's default
  SLA2_PATH_PORTABLE = 1,  // mma.sync + cp.async, sm_80 and newer
  SLA2_PATH_SM90 = 2,      // wgmma + bulk copies, sm_90a; int8_fp8 for lists of <= 128 blocks
} sla2_path;

// A (B, N, H, D) tensor: last stride 1, the others free and counted in elements. `data` and the
// three strides must be multiples of 16 bytes.
typedef struct sla2_tensor {
  void* data;
  int64_t stride_batch;
  int64_t stride_token;
  int64_t stride_head;
} sla2_tensor;

// The problem's shape, shared by all operations.
typedef struct sla2_shape {
  int32_t batch;
  int32_t seqlen;  // N <= SLA2_MAX_SEQLEN
  int32_t num_heads;
  int32_t head_dim;  // 64 or 128
  int32_t dtype;     // sla2_dtype of q, k, v and out
} sla2_shape;

// The learned router: P_c = (Q_bar W_q)(K_bar W_k)^T; per query block the num_kv_blocks largest,
// ties to the lowest index, the pinned key blocks always among them (method: equations 11-13, hard
// map).
typedef struct sla2_router {
  const float* proj_q;       // [D, D] or [H, D, D]; null: no routing, the lists are an input
  const float* proj_k;       // [D, D] or [H, D, D]
  int64_t proj_stride_head;  // D * D, or 0 when all heads share one projection
  const int32_t* pinned_kv;  // [num_pinned] distinct key blocks, optional
  int32_t num_pinned;        // <= num_kv_blocks
  int32_t num_kv_blocks;     // K, 1..T_n
} sla2_router;

// Lists of selected key blocks: ascending, distinct. As an input any list is safe: it counts as the
// set of its entries in [0, T_n), whatever their order; the others are never followed.
typedef struct sla2_block_lists {
  uint16_t* lut;          // [B, H, T_m, K]
  int32_t* counts;        // [B, H, T_m], entries used of each list
  int32_t max_kv_blocks;  // K
} sla2_block_lists;

typedef struct sla2_route_params {
  size_t size;
  sla2_shape shape;
  int32_t path;      // sla2_path
  sla2_tensor q;     // [B, N, H, D]
  sla2_tensor k;     // [B, N, H, D]
  int32_t smooth_k;  // 1: subtract the mean over tokens from K; the order of the scores is the same
                     // either way
  sla2_router router;
  sla2_block_lists lists;  // output
  float* scores;           // [B, H, T_m, T_n] unscaled P_c, optional output
  void* workspace;         // sla2_route_workspace() bytes, 256-byte aligned
  size_t workspace_bytes;
  cudaStream_t stream;
} sla2_route_params;

typedef struct sla2_attn_fwd_params {
  size_t size;
  sla2_shape shape;
  int32_t quant;           // sla2_quant
  int32_t branch;          // sla2_branch
  int32_t path;            // sla2_path
  int32_t phi_raw_k;       // 1: the feature map of the linear branch sees K as given, not smoothed
  int32_t smooth_k;        // 1: subtract the mean over tokens from K (method step 1)
  float softmax_scale;     // usually 1 / sqrt(D)
  sla2_tensor q;           // [B, N, H, D]
  sla2_tensor k;           // [B, N, H, D]
  sla2_tensor v;           // [B, N, H, D]
  sla2_tensor out;         // [B, N, H, D]
  sla2_tensor out_sparse;  // [B, N, H, D], optional: the sparse branch alone, for a backward pass
  float* lse;  // [B, H, N], optional: log-sum-exp of the sparse branch's logits, natural log,
               // of smoothed K; -inf for a row without any listed block
  const float* alpha_logit;   // alpha = sigmoid(.), read at [head * alpha_stride_head + block or
                              // token]; may be null when branch is not BOTH
  int64_t alpha_stride_head;  // T_m or N, or 0 when all heads share it
  int32_t alpha_per_token;    // 0: one value per query block, 1: one per token
  sla2_router router;         // proj_q null: `lists` is an input; otherwise it is an output
  sla2_block_lists lists;
  // [B, H, T_m, T_n], optional: a soft map m in [0, 1] instead of lists, which then are not read. P
  // = softmax(S + log m) over the key blocks with m >= SLA2_SOFT_MAP_MIN; the linear branch weighs
  // each block by 1 - m. Without routing, with quant NONE, branch BOTH, and not on path SM90.
  const float* soft_map;
  void* workspace;  // sla2_attn_fwd_workspace() bytes, 256-byte aligned
  size_t workspace_bytes;
  cudaStream_t stream;
} sla2_attn_fwd_params;

// Gradients of the attention over given lists, of unquantised q, k and v whatever quant was. q, k,
// v, the lists, alpha and the options are those of the forward call, out_sparse and lse what it
// wrote.
typedef struct sla2_attn_bwd_params {
  size_t size;
  sla2_shape shape;
  int32_t branch;     // sla2_branch
  int32_t path;       // sla2_path
  int32_t phi_raw_k;  // as in sla2_attn_fwd_params, like the next two
  int32_t smooth_k;
  float softmax_scale;
  sla2_tensor q;             // [B, N, H, D]
  sla2_tensor k;             // [B, N, H, D]
  sla2_tensor v;             // [B, N, H, D]
  sla2_tensor grad_out;      // [B, N, H, D] gradient of out
  sla2_tensor out_sparse;    // [B, N, H, D]; not read when branch is LINEAR
  const float* lse;          // [B, H, N]; not read when branch is LINEAR
  const float* alpha_logit;  // as in the forward call; read when branch is BOTH
  int64_t alpha_stride_head;
  int32_t alpha_per_token;
  sla2_block_lists lists;   // an input
  sla2_tensor grad_q;       // [B, N, H, D] outputs
  sla2_tensor grad_k;       // [B, N, H, D]
  sla2_tensor grad_v;       // [B, N, H, D]
  float* grad_alpha_logit;  // addressed like alpha_logit, summed over what shares an entry; output
                            // when branch is BOTH
  const float* soft_map;    // as in the forward call; lists are not read then
  float* grad_log_map;      // [B, H, T_m, T_n] gradient of log m; output when there is a soft map
  void* workspace;          // sla2_attn_bwd_workspace() bytes, 256-byte aligned
  size_t workspace_bytes;
  cudaStream_t stream;
} sla2_attn_bwd_params;

// Stage 1's map of scores (method: SoftTop-k): m = sigmoid(scores / tau + lambda), per query block
// the lambda that makes the m of its row sum to num_kv_blocks. Pinned key blocks have m = 1 and
// count toward the sum. NaN or infinity in a row makes all of it NaN but its pinned blocks.
typedef struct sla2_soft_map_params {
  size_t size;
  sla2_shape shape;          // head_dim and dtype do not matter, but must be allowed ones
  const float* scores;       // [B, H, T_m, T_n], such as sla2_route writes
  double tau;                // temperature in units of the scores: for P_c / sqrt(D) times sqrt(D)
  const int32_t* pinned_kv;  // [num_pinned] key blocks, optional; those out of range do not count
  int32_t num_pinned;        // <= num_kv_blocks
  int32_t num_kv_blocks;     // K, 1..T_n; T_n makes every m 1
  float* soft_map;           // [B, H, T_m, T_n] output, may be scores itself
  cudaStream_t stream;
} sla2_soft_map_params;

// Its gradient: with that of log m, which sla2_attn_bwd writes, that of the scores.
typedef struct sla2_soft_map_bwd_params {
  size_t size;
  sla2_shape shape;           // as above
  const float* soft_map;      // [B, H, T_m, T_n] as sla2_soft_map wrote it
  const float* grad_log_map;  // [B, H, T_m, T_n]
  double tau;
  float* grad_scores;  // [B, H, T_m, T_n] output, may be grad_log_map itself
  cudaStream_t stream;
} sla2_soft_map_bwd_params;

// Rotary position embedding of neighbouring features, as diffusers has it: a pair (a, b) of
// features 2 i and 2 i + 1 becomes (a c - b s, a s + b c), c the cosine given for feature 2 i and s
// the sine for 2 i + 1. Float32, every operation rounded, the result rounded once more to the dtype
// of x.
typedef struct sla2_rotary_params {
  size_t size;
  sla2_shape shape;
  sla2_tensor x;    // [B, N, H, D]
  sla2_tensor cos;  // [B, N, H, D] float32; a stride of 0 shares angles, over heads for example
  sla2_tensor sin;  // [B, N, H, D] float32
  sla2_tensor out;  // [B, N, H, D], may be x itself
  int32_t inverse;  // 1: by the opposite angles, which is also the gradient
  cudaStream_t stream;
} sla2_rotary_params;

// Bytes of device memory an operation needs besides its inputs and outputs; a function of shapes,
// options and the kind of the present device alone.
SLA2_API sla2_status sla2_route_workspace(const sla2_route_params* params, size_t* bytes);
SLA2_API sla2_status sla2_attn_fwd_workspace(const sla2_attn_fwd_params* params, size_t* bytes);
SLA2_API sla2_status sla2_attn_bwd_workspace(const sla2_attn_bwd_params* params, size_t* bytes);

SLA2_API sla2_status sla2_route(const sla2_route_params* params);
SLA2_API sla2_status sla2_attn_fwd(const sla2_attn_fwd_params* params);
SLA2_API sla2_status sla2_attn_bwd(const sla2_attn_bwd_params* params);
// These need no workspace.
SLA2_API sla2_status sla2_soft_map(const sla2_soft_map_params* params);
SLA2_API sla2_status sla2_soft_map_bwd(const sla2_soft_map_bwd_params* params);
SLA2_API sla2_status sla2_rotary(const sla2_rotary_params* params);

// The present device's answer to "would sla2_attn_fwd run?": SLA2_OK, or SLA2_UNSUPPORTED with
// every reason in sla2_last_error().
SLA2_API sla2_status sla2_supported(int32_t device, int32_t dtype, int32_t head_dim, int32_t quant,
                                    int32_t path);

// The calling thread's last message; "" after a call that returned SLA2_OK.
SLA2_API const char* sla2_last_error(void);

// Version as "major.minor.patch", and the architectures this library was built for as "80;90a".
SLA2_API const char* sla2_version(void);
SLA2_API const char* sla2_built_archs(void);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // SLA2_SLA2_H_
