// The router: project the pooled blocks, score every (query block, key block) pair, keep the K best
// of each row. All float32: near-ties must fall as they do in the reference.
#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/params.h"

namespace sla2 {
namespace {

constexpr int kProjectRows = 16;

// One CTA: kProjectRows pooled rows times one [D, D] projection; thread c owns column c. The first
// `q_groups` groups of a head are query rows, the others key rows (mean over the block minus the
// mean over all tokens).
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    project_kernel(const __grid_constant__ ProjectParams p) {
  __shared__ float4 rows[kProjectRows][kHeadDim / 4];
  const int q_groups = (p.shape.num_q_blocks + kProjectRows - 1) / kProjectRows;
  const int k_groups = (p.shape.num_k_blocks + kProjectRows - 1) / kProjectRows;
  const int bh = blockIdx.x / (q_groups + k_groups), group = blockIdx.x % (q_groups + k_groups);
  const bool is_query = group < q_groups;
  const int first = (is_query ? group : group - q_groups) * kProjectRows;
  const int count =
      min(kProjectRows, (is_query ? p.shape.num_q_blocks : p.shape.num_k_blocks) - first);
  const int column = threadIdx.x;
  const int64_t offset =
      (static_cast<int64_t>(bh) * (is_query ? p.shape.num_q_blocks : p.shape.num_k_blocks) +
       first) *
      kHeadDim;

  const float mean = is_query ? 0.f : p.k_mean[static_cast<int64_t>(bh) * kHeadDim + column];
  const float* source = (is_query ? p.q_mean : p.k_sum) + offset;
  for (int r = 0; r < kProjectRows; ++r) {
    float x = r < count ? source[static_cast<int64_t>(r) * kHeadDim + column] : 0.f;
    if (!is_query && r < count) x = x / min(kBlockK, p.shape.seqlen - (first + r) * kBlockK) - mean;
    reinterpret_cast<float*>(rows[r])[column] = x;
  }
  __syncthreads();

  const float* weight =
      (is_query ? p.proj_q : p.proj_k) + (bh % p.shape.num_heads) * p.proj_stride_head + column;
  float acc[kProjectRows] = {};
#pragma unroll 4
  for (int k = 0; k < kHeadDim / 4; ++k) {
    const float w0 = weight[(4 * k) * kHeadDim], w1 = weight[(4 * k + 1) * kHeadDim];
    const float w2 = weight[(4 * k + 2) * kHeadDim], w3 = weight[(4 * k + 3) * kHeadDim];
#pragma unroll
    for (int r = 0; r < kProjectRows; ++r) {
      const float4 x = rows[r][k];
      acc[r] = fmaf(x.x, w0, fmaf(x.y, w1, fmaf(x.z, w2, fmaf(x.w, w3, acc[r]))));
    }
  }
  float* destination = (is_query ? p.q_proj : p.k_proj) + offset;
#pragma unroll
  for (int r = 0; r < kProjectRows; ++r) {
    if (r < count) destination[static_cast<int64_t>(r) * kHeadDim + column] = acc[r];
  }
}

constexpr int kScoreTile = 128;
constexpr int kScoreDepth = 16;
constexpr int kScoreThreads = 256;
constexpr int kScorePitch =
    kScoreTile + 4;  // keeps float4 alignment, spreads the transposed stores over banks

// kScoreTile rows of [D] values: a slice of depth 16 from global memory to registers, and from
// there to shared memory as [depth][row]. Two steps, so that the next slice is on its way while
// this one is used.
template <int kHeadDim>
struct ScoreOperand {
  static constexpr int kRowsPerPass = kScoreThreads / 4;
  float4 slice[kScoreTile / kRowsPerPass];

  __device__ __forceinline__ void fetch(const float* x, int rows, int depth) {
#pragma unroll
    for (int i = 0; i < kScoreTile / kRowsPerPass; ++i) {
      const int r = threadIdx.x / 4 + i * kRowsPerPass;
      slice[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (r < rows) {
        slice[i] = *reinterpret_cast<const float4*>(x + static_cast<int64_t>(r) * kHeadDim + depth +
                                                    threadIdx.x % 4 * 4);
      }
    }
  }
  __device__ __forceinline__ void store(float (&tile)[kScoreDepth][kScorePitch]) const {
    const int d = threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < kScoreTile / kRowsPerPass; ++i) {
      const int r = threadIdx.x / 4 + i * kRowsPerPass;
      tile[d][r] = slice[i].x;
      tile[d + 1][r] = slice[i].y;
      tile[d + 2][r] = slice[i].z;
      tile[d + 3][r] = slice[i].w;
    }
  }
};

// One CTA: a 128 x 128 tile of scores; thread (y, x) owns rows 4y + {0..3, 64..67}, columns 4x +
// {0..3, 64..67}.
template <int kHeadDim>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_kernel(const __grid_constant__ SelectParams p) {
  __shared__ __align__(16) float query[kScoreDepth][kScorePitch];
  __shared__ __align__(16) float key[kScoreDepth][kScorePitch];
  const int row_tiles = (p.row_count + kScoreTile - 1) / kScoreTile;
  const int column_tiles = (p.shape.num_k_blocks + kScoreTile - 1) / kScoreTile;
  const int tile = blockIdx.x % (row_tiles * column_tiles),
            bh = blockIdx.x / (row_tiles * column_tiles);
  const int row0 = tile % row_tiles * kScoreTile, column0 = tile / row_tiles * kScoreTile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int64_t head = p.bh_begin + bh;
  const float* q = p.q_proj + (head * p.shape.num_q_blocks + p.row_begin + row0) * kHeadDim;
  const float* k = p.k_proj + (head * p.shape.num_k_blocks + column0) * kHeadDim;

  ScoreOperand<kHeadDim> query_slice, key_slice;
  query_slice.fetch(q, p.row_count - row0, 0);
  key_slice.fetch(k, p.shape.num_k_blocks - column0, 0);
  float acc[8][8] = {};
  for (int depth = 0; depth < kHeadDim; depth += kScoreDepth) {
    __syncthreads();
    query_slice.store(query);
    key_slice.store(key);
    __syncthreads();
    if (depth + kScoreDepth < kHeadDim) {
      query_slice.fetch(q, p.row_count - row0, depth + kScoreDepth);
      key_slice.fetch(k, p.shape.num_k_blocks - column0, depth + kScoreDepth);
    }
#pragma unroll
    for (int d = 0; d < kScoreDepth; ++d) {
      float a[8], b[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float4*>(&a[4 * half]) =
            *reinterpret_cast<const float4*>(&query[d][4 * y + 64 * half]);
        *reinterpret_cast<float4*>(&b[4 * half]) =
            *reinterpret_cast<const float4*>(&key[d][4 * x + 64 * half]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = row0 + 4 * y + i % 4 + i / 4 * 64;
    if (row >= p.row_count) continue;
    float* destination =
        p.scores + (static_cast<int64_t>(bh) * p.row_count + row) * p.shape.num_k_blocks;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = column0 + 4 * x + j % 4 + j / 4 * 64;
      if (column < p.shape.num_k_blocks) destination[column] = acc[i][j];
    }
  }
}

// Floats as unsigned keys of the same order. NaN ranks above +inf, as in torch, so that a row
// always has K entries.
constexpr uint32_t kPinnedKey = 0xffffffffu;
constexpr uint32_t kNanKey = 0xfffffffeu;
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return kNanKey;
  return bits ^ ((bits >> 31) != 0u ? 0xffffffffu : 0x80000000u);
}

constexpr int kSelectWarps = 4;

__host__ __device__ constexpr int padded_keys(int num_keys) { return (num_keys + 3) / 4 * 4; }

// One warp: one row. The K-th largest key is built bit by bit from the top, then one sweep writes
// the list in ascending order; among keys equal to the threshold the lowest indices win.
__global__ void select_kernel(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) uint32_t key_storage[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  const int num_keys = p.shape.num_k_blocks;
  if (row >= static_cast<int64_t>(p.bh_count) * p.row_count) return;
  const int padded = padded_keys(num_keys);
  uint32_t* keys = key_storage + warp * padded;

  const float* scores = p.scores + row * num_keys;
  for (int j = lane; j < padded; j += 32) keys[j] = j < num_keys ? order_key(scores[j]) : 0u;
  __syncwarp();
  for (int i = lane; i < p.num_pinned; i += 32) {
    const int pinned = p.pinned_kv[i];
    if (pinned >= 0 && pinned < num_keys) keys[pinned] = kPinnedKey;
  }
  __syncwarp();

  // Invariant: `above` keys exceed every key that shares the bits of `threshold` fixed so far, and
  // at_least - above keys share them.
  uint32_t threshold = 0u;
  int above = 0, at_least = num_keys, bit = 31;
  for (; bit >= 0 && at_least - above > 32; --bit) {
    const uint32_t candidate = threshold | (1u << bit);
    int count = 0;
    for (int j = 4 * lane; j < padded; j += 128) {  // the padding's zeros never reach a candidate
      const uint4 four = *reinterpret_cast<const uint4*>(keys + j);
      count += (four.x >= candidate) + (four.y >= candidate) + (four.z >= candidate) +
               (four.w >= candidate);
    }
    count = __reduce_add_sync(0xffffffffu, count);
    if (count >= p.num_kv_blocks) {
      threshold = candidate;
      at_least = count;
    } else {
      above = count;
    }
  }
  const uint32_t lanes_below = (1u << lane) - 1u;
  if (bit >= 0) {  // at most 32 keys are left: one a lane
    __shared__ uint32_t left[kSelectWarps][32];
    left[warp][lane] = 0u;
    __syncwarp();
    int found = 0;
    for (int j0 = 0; j0 < num_keys; j0 += 32) {
      const uint32_t key = j0 + lane < num_keys ? keys[j0 + lane] : 0u;
      // The shift by bit + 1 in two steps: it may be 32, when nothing has been fixed.
      const bool shares = j0 + lane < num_keys && ((key ^ threshold) >> bit >> 1) == 0u;
      const uint32_t mask = __ballot_sync(0xffffffffu, shares);
      if (shares) left[warp][found + __popc(mask & lanes_below)] = key;
      found += __popc(mask);
    }
    __syncwarp();
    const uint32_t mine = left[warp][lane];
    const bool valid = lane < found;
    const int above_all = above;  // keys above every one of these
    for (; bit >= 0; --bit) {
      const uint32_t candidate = threshold | (1u << bit);
      const int count = above_all + __popc(__ballot_sync(0xffffffffu, valid && mine >= candidate));
      if (count >= p.num_kv_blocks) {
        threshold = candidate;
      } else {
        above = count;
      }
    }
  }

  const int64_t head = p.bh_begin + row / p.row_count,
                query_block = p.row_begin + row % p.row_count;
  const int64_t list = head * p.shape.num_q_blocks + query_block;
  uint16_t* lut = p.lut + list * p.num_kv_blocks;
  int equal_left = p.num_kv_blocks - above, written = 0;
  for (int j0 = 0; j0 < num_keys; j0 += 32) {
    const int j = j0 + lane;
    const uint32_t key = j < num_keys ? keys[j] : 0u;
    const bool equal = j < num_keys && key == threshold;
    const uint32_t equal_mask = __ballot_sync(0xffffffffu, equal);
    const bool take = (j < num_keys && key > threshold) ||
                      (equal && __popc(equal_mask & lanes_below) < equal_left);
    const uint32_t take_mask = __ballot_sync(0xffffffffu, take);
    if (take) lut[written + __popc(take_mask & lanes_below)] = static_cast<uint16_t>(j);
    written += __popc(take_mask);
    equal_left = max(0, equal_left - __popc(equal_mask));
  }
  if (lane == 0) p.counts[list] = written;
}

constexpr int kCompactWarps = 4;

// One warp: one list. A bit per key block makes any list ascending and distinct, whatever the
// caller put into it.
__global__ void __launch_bounds__(kCompactWarps * 32)
    compact_kernel(const __grid_constant__ CompactParams p) {
  extern __shared__ uint32_t listed_storage[];
  const int lane = threadIdx.x % 32, num_words = (p.shape.num_k_blocks + 31) / 32;
  uint32_t* listed = listed_storage + threadIdx.x / 32 * num_words;
  const int64_t list = static_cast<int64_t>(blockIdx.x) * kCompactWarps + threadIdx.x / 32;
  if (list >= static_cast<int64_t>(p.shape.num_bh) * p.shape.num_q_blocks) return;
  for (int w = lane; w < num_words; w += 32) listed[w] = 0u;
  __syncwarp();
  const int count = min(p.counts_in[list], p.max_kv_blocks);
  for (int i = lane; i < count; i += 32) {
    const int j = p.lut_in[list * p.max_kv_blocks + i];
    if (j < p.shape.num_k_blocks) atomicOr(&listed[j / 32], 1u << (j % 32));
  }
  __syncwarp();

  uint16_t* lut = p.lut + list * p.max_kv_blocks;
  int written = 0;
  for (int w = 0; w < num_words; ++w) {
    const uint32_t word = listed[w];
    if ((word >> lane & 1u) != 0u) {
      lut[written + __popc(word & ((1u << lane) - 1u))] = static_cast<uint16_t>(32 * w + lane);
    }
    written += __popc(word);
  }
  if (lane == 0) p.counts[list] = written;
}

}  // namespace

cudaError_t launch_compact(const CompactParams& p) {
  const int64_t lists = static_cast<int64_t>(p.shape.num_bh) * p.shape.num_q_blocks;
  const dim3 grid(static_cast<unsigned>((lists + kCompactWarps - 1) / kCompactWarps));
  const int bytes =
      kCompactWarps * ((p.shape.num_k_blocks + 31) / 32) * static_cast<int>(sizeof(uint32_t));
  compact_kernel<<<grid, kCompactWarps * 32, bytes, p.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_project(const ProjectParams& p, int head_dim) {
  const int q_groups = (p.shape.num_q_blocks + kProjectRows - 1) / kProjectRows;
  const int k_groups = (p.shape.num_k_blocks + kProjectRows - 1) / kProjectRows;
  const dim3 grid(p.shape.num_bh * (q_groups + k_groups));
  if (head_dim == 128) project_kernel<128><<<grid, 128, 0, p.stream>>>(p);
  if (head_dim == 64) project_kernel<64><<<grid, 64, 0, p.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_score(const SelectParams& p, int head_dim) {
  const int row_tiles = (p.row_count + kScoreTile - 1) / kScoreTile;
  const int column_tiles = (p.shape.num_k_blocks + kScoreTile - 1) / kScoreTile;
  const dim3 grid(p.bh_count * row_tiles * column_tiles);
  if (head_dim == 128) score_kernel<128><<<grid, kScoreThreads, 0, p.stream>>>(p);
  if (head_dim == 64) score_kernel<64><<<grid, kScoreThreads, 0, p.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_select(const SelectParams& p) {
  // Four rows a CTA while their keys fit the 64 KiB that every sm_80+ device grants two CTAs; fewer
  // when T_n is large.
  const int row_bytes = padded_keys(p.shape.num_k_blocks) * static_cast<int>(sizeof(uint32_t));
  int warps = kSelectWarps;
  while (warps > 1 && warps * row_bytes > 64 * 1024) warps /= 2;
  const int64_t rows = static_cast<int64_t>(p.bh_count) * p.row_count;
  const dim3 grid(static_cast<unsigned>((rows + warps - 1) / warps));
  const int bytes = warps * row_bytes;
  const cudaError_t status =
      cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024);
  if (status != cudaSuccess) return status;
  select_kernel<<<grid, warps * 32, bytes, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
