// Pre-pass 1: block means of Q, block sums and ranges of K and per-channel maxima of V in one read
// of each tensor, then the mean of K over all tokens (method step 1) and V's channel scales.
// Memory-bound: 2 bytes per element read.
#include <type_traits>

#include "../common/convert.cuh"
#include "../common/dispatch.h"
#include "../common/layout.cuh"
#include "../common/params.h"

namespace sla2 {
namespace {

// Extremes are taken of two channels at a time on the inputs' own bits.
template <typename Element>
using Element2 = std::conditional_t<std::is_same<Element, __half>::value, __half2, __nv_bfloat162>;
struct MaxNan {
  template <typename T>
  static __device__ __forceinline__ T of(T a, T b) {
    return __hmax2_nan(a, b);
  }
};
struct MinNan {
  template <typename T>
  static __device__ __forceinline__ T of(T a, T b) {
    return __hmin2_nan(a, b);
  }
};
// A NaN in V spoils itself, not the scale of its channel.
struct MaxNumber {
  template <typename T>
  static __device__ __forceinline__ T of(T a, T b) {
    return __hmax2(a, b);
  }
};

template <typename Element, typename Op>
__device__ __forceinline__ uint32_t fold(uint32_t a, uint32_t b) {
  using T = Element2<Element>;
  const T result = Op::of(*reinterpret_cast<const T*>(&a), *reinterpret_cast<const T*>(&b));
  return *reinterpret_cast<const uint32_t*>(&result);
}
template <typename Element, typename Op>
__device__ __forceinline__ uint4 fold(const uint4& a, const uint4& b) {
  return make_uint4(fold<Element, Op>(a.x, b.x), fold<Element, Op>(a.y, b.y),
                    fold<Element, Op>(a.z, b.z), fold<Element, Op>(a.w, b.w));
}

constexpr int kPoolThreads = 256;

// One CTA: 128 tokens (one query block, two key blocks) of one head. A thread has eight channels of
// every kRows-th token.
template <typename Element, int kHeadDim>
struct Pool {
  static constexpr int kLanesPerRow = kHeadDim / 8;
  static constexpr int kRows = kPoolThreads / kLanesPerRow;
  static constexpr int kPasses = kBlockK / kRows;  // over one key block
  static constexpr int kPairs = kHeadDim / 2;
  struct Smem {
    float sums[kRows][kHeadDim];
    uint32_t extremes[2][kRows][kPairs];
  };

  const PoolParams& p;
  Smem& smem;
  const int block, bh;
  const int row, lane;

  __device__ __forceinline__ Pool(const PoolParams& p, Smem& smem)
      : p(p),
        smem(smem),
        block(blockIdx.x % p.shape.num_q_blocks),
        bh(blockIdx.x / p.shape.num_q_blocks),
        row(threadIdx.x / kLanesPerRow),
        lane(threadIdx.x % kLanesPerRow) {}

  __device__ __forceinline__ int token(int half, int pass) const {
    return block * kBlockQ + half * kBlockK + pass * kRows + row;
  }
  __device__ __forceinline__ const Element* base(const TensorView& view) const {
    return head_base<Element>(view, bh, p.shape.num_heads) + 8 * lane;
  }

  // Half a query block. Past the end it is the last token again, which no extreme can tell.
  __device__ __forceinline__ void load(const Element* base, int64_t stride_token, int half,
                                       uint4 (&x)[kPasses]) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int valid = min(token(half, i), p.shape.seqlen - 1);
      x[i] = __ldg(reinterpret_cast<const uint4*>(base + valid * stride_token));
    }
  }

  // Adds the tokens before the end; the others become zero.
  __device__ __forceinline__ void add(uint4 (&x)[kPasses], int half, float (&sums)[8]) const {
    if (block * kBlockQ + (half + 1) * kBlockK > p.shape.seqlen) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (token(half, i) >= p.shape.seqlen) x[i] = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      float values[8];
      unpack8<Element>(x[i], values);
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[c] += values[c];
    }
  }

  template <typename Op>
  static __device__ __forceinline__ uint4 extreme(const uint4 (&x)[kPasses]) {
    uint4 result = x[0];
#pragma unroll
    for (int i = 1; i < kPasses; ++i) result = fold<Element, Op>(result, x[i]);
    return result;
  }

  // Hands a thread's share to those that fold the rows.
  __device__ __forceinline__ void put(const float (&sums)[8]) const {
    float4* target = reinterpret_cast<float4*>(&smem.sums[row][8 * lane]);
    target[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    target[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }
  __device__ __forceinline__ void put(int which, const uint4& extremes) const {
    *reinterpret_cast<uint4*>(&smem.extremes[which][row][4 * lane]) = extremes;
  }
  __device__ __forceinline__ float row_sum(int channel) const {
    float result = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) result += smem.sums[r][channel];
    return result;
  }
  template <typename Op>
  __device__ __forceinline__ uint32_t row_extreme(int which, int pair) const {
    uint32_t result = smem.extremes[which][0][pair];
#pragma unroll
    for (int r = 1; r < kRows; ++r) {
      result = fold<Element, Op>(result, smem.extremes[which][r][pair]);
    }
    return result;
  }

  __device__ __forceinline__ void queries() const {
    const Element* q = base(p.q);
    float sums[8] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 x[kPasses];
      load(q, p.q.stride_token, half, x);
      add(x, half, sums);
    }
    put(sums);
    __syncthreads();
    const int channel = threadIdx.x;
    if (channel < kHeadDim) {
      const int tokens = min(kBlockQ, p.shape.seqlen - block * kBlockQ);
      const int64_t index = static_cast<int64_t>(bh) * p.shape.num_q_blocks + block;
      const float sum = row_sum(channel);
      p.q_mean[index * kHeadDim + channel] = sum / tokens;
    }
  }

  __device__ __forceinline__ void keys() const {
    const Element* k = base(p.k);
    const int key_blocks = min(2, p.shape.num_k_blocks - 2 * block);
#pragma unroll 1
    for (int half = 0; half < key_blocks; ++half) {
      uint4 x[kPasses];
      load(k, p.k.stride_token, half, x);
      __syncthreads();  // the previous reduction has been read
      if (p.k_range != nullptr) {
        put(0, extreme<MaxNan>(x));
        put(1, extreme<MinNan>(x));
      }
      float sums[8] = {};
      add(x, half, sums);
      put(sums);
      __syncthreads();
      // Some warps fold the sums, others the range.
      const int64_t index = static_cast<int64_t>(bh) * p.shape.num_k_blocks + 2 * block + half;
      const int channel = threadIdx.x, word = channel - kHeadDim;
      if (channel < kHeadDim) {
        if (p.k_sum != nullptr) p.k_sum[index * kHeadDim + channel] = row_sum(channel);
      } else if (word < 2 * kPairs && p.k_range != nullptr) {
        const int pair = word % kPairs;
        static_cast<uint32_t*>(p.k_range)[index * 2 * kPairs + word] =
            word < kPairs ? row_extreme<MaxNan>(0, pair) : row_extreme<MinNan>(1, pair);
      }
    }
  }

  __device__ __forceinline__ void values() const {
    constexpr uint32_t kNoSigns = 0x7fff7fffu;
    const Element* v = base(p.v);
    uint4 largest = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 x[kPasses];
      load(v, p.v.stride_token, half, x);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        largest = fold<Element, MaxNumber>(
            largest,
            make_uint4(x[i].x & kNoSigns, x[i].y & kNoSigns, x[i].z & kNoSigns, x[i].w & kNoSigns));
      }
    }
    __syncthreads();  // the keys' reduction has been read
    put(0, largest);
    __syncthreads();
    const int pair = threadIdx.x;
    if (pair < kPairs) {
      const int64_t index = static_cast<int64_t>(bh) * p.shape.num_q_blocks + block;
      reinterpret_cast<float2*>(p.v_amax_partial)[index * kPairs + pair] =
          Pair<Element>::to_float2(row_extreme<MaxNumber>(0, pair));
    }
  }
};

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kPoolThreads) pool_kernel(const __grid_constant__ PoolParams p) {
  __shared__ __align__(16) typename Pool<Element, kHeadDim>::Smem smem;
  const Pool<Element, kHeadDim> pool(p, smem);
  if (p.q_mean != nullptr) pool.queries();
  if (p.k_sum != nullptr || p.k_range != nullptr) pool.keys();
  if (p.v_amax_partial != nullptr) pool.values();
}

struct Sum {
  static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Max {
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};
template <typename Op>
__device__ __forceinline__ float4 fold(const float4& a, const float4& b) {
  return make_float4(Op::of(a.x, b.x), Op::of(a.y, b.y), Op::of(a.z, b.z), Op::of(a.w, b.w));
}

// One CTA folds 16 channels of a head, so that a few heads fill the GPU: a thread has four channels
// of every 64th block, and reads eight of them at a time. Without the bound on CTAs ptxas saves
// registers by reading four, two and two.
constexpr int kReduceThreads = 256;
constexpr int kReduceChannels = 16;
constexpr int kReduceLanes = kReduceChannels / 4;
constexpr int kReduceRows = kReduceThreads / kReduceLanes;
constexpr int kReduceBatch = 8;
constexpr int kReduceCtas = 5;  // on an SM: the 640 of 40 heads are one wave on 132 SMs
constexpr int kReduceWarps = kReduceThreads / 32;

// Thread t < 16 gets channel t of `rows` rows; 0 must not count. A tree of fixed shape: the same
// bits in every run, and rounding errors that grow with its depth.
template <typename Op, int kHeadDim>
__device__ __forceinline__ float fold_rows(const float* source, int rows) {
  __shared__ __align__(16) float scratch[kReduceWarps][kReduceChannels];
  const int lane = threadIdx.x % kReduceLanes;
  float4 result = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int row = threadIdx.x / kReduceLanes; row < rows; row += kReduceRows * kReduceBatch) {
    float4 x[kReduceBatch];
#pragma unroll
    for (int i = 0; i < kReduceBatch; ++i) {
      const int64_t r = row + i * kReduceRows;
      x[i] = r < rows ? __ldg(reinterpret_cast<const float4*>(source + r * kHeadDim + 4 * lane))
                      : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int step = kReduceBatch / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < step; ++i) x[i] = fold<Op>(x[i], x[i + step]);
    }
    result = fold<Op>(result, x[0]);
  }
#pragma unroll
  for (int step = kReduceLanes; step < 32; step *= 2) {
    const float4 other = make_float4(
        __shfl_xor_sync(0xffffffffu, result.x, step), __shfl_xor_sync(0xffffffffu, result.y, step),
        __shfl_xor_sync(0xffffffffu, result.z, step), __shfl_xor_sync(0xffffffffu, result.w, step));
    result = fold<Op>(result, other);
  }
  if (threadIdx.x % 32 < kReduceLanes) {
    *reinterpret_cast<float4*>(&scratch[threadIdx.x / 32][4 * lane]) = result;
  }
  __syncthreads();
  float x[kReduceWarps];
#pragma unroll
  for (int warp = 0; warp < kReduceWarps; ++warp) {
    x[warp] = scratch[warp][threadIdx.x % kReduceChannels];
  }
#pragma unroll
  for (int step = kReduceWarps / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) x[i] = Op::of(x[i], x[i + step]);
  }
  return x[0];
}

// K's means first, they have twice the rows of V's scales.
template <int kHeadDim>
__global__ void __launch_bounds__(kReduceThreads, kReduceCtas)
    reduce_kernel(const __grid_constant__ ReduceParams p) {
  constexpr int kParts = kHeadDim / kReduceChannels;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kReduceThreads;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
       i < p.num_counters; i += threads) {
    p.counters[i] = 0;
  }

  const int key_tasks = p.shape.num_bh * kParts;
  const int cta = blockIdx.x;
  const bool values = cta >= key_tasks;
  const int task = values ? cta - key_tasks : cta;
  const int64_t bh = task / kParts;
  const int channel0 = task % kParts * kReduceChannels;
  const int channel = channel0 + threadIdx.x;
  if (!values) {
    const float* sums = p.k_sum + bh * p.shape.num_k_blocks * kHeadDim + channel0;
    const float sum = fold_rows<Sum, kHeadDim>(sums, p.smooth ? p.shape.num_k_blocks : 0);
    if (threadIdx.x < kReduceChannels) p.k_mean[bh * kHeadDim + channel] = sum / p.shape.seqlen;
    return;
  }
  const float* maxima = p.v_amax_partial + bh * p.shape.num_q_blocks * kHeadDim + channel0;
  float amax = fold_rows<Max, kHeadDim>(maxima, p.shape.num_q_blocks);
  amax = fmaxf(amax, kQuantEps);
  if (threadIdx.x < kReduceChannels) {
    // int8_fp16: the power of two strictly above amax, so that v / scale is exact in fp16 for fp16
    // input.
    const bool is_e4m3 = p.quant == SLA2_QUANT_INT8_FP8;
    const float power = __uint_as_float((min(__float_as_uint(amax) >> 23, 252u) + 1u) << 23);
    float* scales = p.v_scale + bh * 2 * kHeadDim + channel;
    scales[0] = is_e4m3 ? amax / kE4m3Max : power;
    scales[kHeadDim] = is_e4m3 ? kE4m3Max / amax : 1.f / power;
  }
}

}  // namespace

cudaError_t launch_pool(const PoolParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    const dim3 grid(p.shape.num_bh * p.shape.num_q_blocks);
    pool_kernel<typename I::Element, I::kHeadDim><<<grid, kPoolThreads, 0, p.stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t launch_reduce(const ReduceParams& p, int head_dim) {
  const int parts = head_dim / kReduceChannels * (p.v_scale != nullptr ? 2 : 1);
  const dim3 grid(p.shape.num_bh * parts);
  if (head_dim == 128) reduce_kernel<128><<<grid, kReduceThreads, 0, p.stream>>>(p);
  if (head_dim == 64) reduce_kernel<64><<<grid, kReduceThreads, 0, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
