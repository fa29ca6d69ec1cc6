// Pre-pass 1: block means of Q, block sums of K and per-channel maxima of V in one read of each
// tensor, then the mean of K over all tokens (method step 1) and V's channel scales. Memory-bound:
// 2 bytes per element read.
#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/params.h"

namespace sla2 {
namespace {

constexpr int kPoolThreads = 256;

// Reduces each thread's eight columns over the rows held by the other threads; thread t < D gets
// column t.
template <int kHeadDim, bool kMax>
__device__ __forceinline__ float reduce_columns(const float (&x)[8], float* scratch) {
  constexpr int kLanesPerRow = kHeadDim / 8;
  constexpr int kRows = kPoolThreads / kLanesPerRow;
  const int row = threadIdx.x / kLanesPerRow, column = threadIdx.x % kLanesPerRow * 8;
  __syncthreads();  // the previous reduction has been read
#pragma unroll
  for (int i = 0; i < 8; ++i) scratch[row * kHeadDim + column + i] = x[i];
  __syncthreads();
  float result = 0.f;
  if (threadIdx.x < kHeadDim) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float value = scratch[r * kHeadDim + threadIdx.x];
      result = kMax ? fmaxf(result, value) : result + value;
    }
  }
  return result;
}

// One CTA: 128 tokens (one query block, two key blocks) of one head.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kPoolThreads) pool_kernel(const __grid_constant__ PoolParams p) {
  constexpr int kLanesPerRow = kHeadDim / 8;
  constexpr int kRowsPerPass = kPoolThreads / kLanesPerRow;
  constexpr int kPasses = kBlockK / kRowsPerPass;  // passes over one key block of 64 tokens
  __shared__ float scratch[kRowsPerPass * kHeadDim];

  const int block = blockIdx.x % p.shape.num_q_blocks, bh = blockIdx.x / p.shape.num_q_blocks;
  const int row = threadIdx.x / kLanesPerRow, column = threadIdx.x % kLanesPerRow * 8;
  const int column_out = threadIdx.x;

  // Sums (maxima of |x| for V) over the valid tokens of one half (64 tokens) of the block.
  auto accumulate = [&](const TensorView& view, int half, bool take_max, float (&acc)[8]) {
    const Element* base = head_base<Element>(view, bh, p.shape.num_heads) + column;
    uint4 packed[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int token = block * kBlockQ + half * kBlockK + i * kRowsPerPass + row;
      packed[i] = token < p.shape.seqlen
                      ? __ldg(reinterpret_cast<const uint4*>(base + token * view.stride_token))
                      : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      float x[8];
      unpack8<Element>(packed[i], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) acc[c] = take_max ? fmaxf(acc[c], fabsf(x[c])) : acc[c] + x[c];
    }
  };

  if (p.q_mean != nullptr) {
    float acc[8] = {};
    accumulate(p.q, 0, false, acc);
    accumulate(p.q, 1, false, acc);
    const float sum = reduce_columns<kHeadDim, false>(acc, scratch);
    const int tokens = min(kBlockQ, p.shape.seqlen - block * kBlockQ);
    if (column_out < kHeadDim) {
      p.q_mean[(static_cast<int64_t>(bh) * p.shape.num_q_blocks + block) * kHeadDim + column_out] =
          sum / tokens;
    }
  }
  if (p.k_sum != nullptr) {
    for (int half = 0; half < 2; ++half) {
      const int key_block = 2 * block + half;
      if (key_block >= p.shape.num_k_blocks) break;
      float acc[8] = {};
      accumulate(p.k, half, false, acc);
      const float sum = reduce_columns<kHeadDim, false>(acc, scratch);
      if (column_out < kHeadDim) {
        p.k_sum[(static_cast<int64_t>(bh) * p.shape.num_k_blocks + key_block) * kHeadDim +
                column_out] = sum;
      }
    }
  }
  if (p.v_amax_partial != nullptr) {
    float acc[8] = {};
    accumulate(p.v, 0, true, acc);
    accumulate(p.v, 1, true, acc);
    const float amax = reduce_columns<kHeadDim, true>(acc, scratch);
    if (column_out < kHeadDim) {
      p.v_amax_partial[(static_cast<int64_t>(bh) * p.shape.num_q_blocks + block) * kHeadDim +
                       column_out] = amax;
    }
  }
}

constexpr int kReduceRows = 8;

// One CTA: one head. Row r of the CTA folds every kReduceRows-th block; the fixed order makes the
// result reproducible.
template <int kHeadDim>
__global__ void __launch_bounds__(kReduceRows* kHeadDim)
    reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ float scratch[kReduceRows][kHeadDim];
  const int bh = blockIdx.x, column = threadIdx.x % kHeadDim, row = threadIdx.x / kHeadDim;

  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.num_counters;
       i += gridDim.x * blockDim.x) {
    p.counters[i] = 0;
  }

  if (p.k_mean != nullptr) {
    float sum = 0.f;
    if (p.smooth) {
      const float* source =
          p.k_sum + static_cast<int64_t>(bh) * p.shape.num_k_blocks * kHeadDim + column;
#pragma unroll 4
      for (int j = row; j < p.shape.num_k_blocks; j += kReduceRows)
        sum += source[static_cast<int64_t>(j) * kHeadDim];
    }
    scratch[row][column] = sum;
    __syncthreads();
    if (row == 0) {
      sum = 0.f;
      for (int r = 0; r < kReduceRows; ++r) sum += scratch[r][column];
      p.k_mean[static_cast<int64_t>(bh) * kHeadDim + column] = sum / p.shape.seqlen;
    }
    __syncthreads();
  }
  if (p.v_scale != nullptr) {
    float amax = 0.f;
    const float* source =
        p.v_amax_partial + static_cast<int64_t>(bh) * p.shape.num_q_blocks * kHeadDim + column;
#pragma unroll 4
    for (int i = row; i < p.shape.num_q_blocks; i += kReduceRows) {
      amax = fmaxf(amax, source[static_cast<int64_t>(i) * kHeadDim]);
    }
    scratch[row][column] = amax;
    __syncthreads();
    if (row == 0) {
      for (int r = 0; r < kReduceRows; ++r) amax = fmaxf(amax, scratch[r][column]);
      amax = fmaxf(amax, kQuantEps);
      // int8_fp16: the power of two strictly above amax, so that v / scale is exact in fp16 for
      // fp16 input.
      const bool is_e4m3 = p.quant == SLA2_QUANT_INT8_FP8;
      const float power = __uint_as_float((min(__float_as_uint(amax) >> 23, 252u) + 1u) << 23);
      float* scales = p.v_scale + static_cast<int64_t>(bh) * 2 * kHeadDim + column;
      scales[0] = is_e4m3 ? amax / kE4m3Max : power;
      scales[kHeadDim] = is_e4m3 ? kE4m3Max / amax : 1.f / power;
    }
  }
}

}  // namespace

cudaError_t launch_pool(const PoolParams& p, int dtype, int head_dim) {
  const dim3 grid(p.shape.num_bh * p.shape.num_q_blocks);
  if (dtype == SLA2_BFLOAT16) {
    if (head_dim == 128) pool_kernel<__nv_bfloat16, 128><<<grid, kPoolThreads, 0, p.stream>>>(p);
    if (head_dim == 64) pool_kernel<__nv_bfloat16, 64><<<grid, kPoolThreads, 0, p.stream>>>(p);
  } else {
    if (head_dim == 128) pool_kernel<__half, 128><<<grid, kPoolThreads, 0, p.stream>>>(p);
    if (head_dim == 64) pool_kernel<__half, 64><<<grid, kPoolThreads, 0, p.stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t launch_reduce(const ReduceParams& p, int head_dim) {
  if (head_dim == 128) reduce_kernel<128><<<p.shape.num_bh, kReduceRows * 128, 0, p.stream>>>(p);
  if (head_dim == 64) reduce_kernel<64><<<p.shape.num_bh, kReduceRows * 64, 0, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
