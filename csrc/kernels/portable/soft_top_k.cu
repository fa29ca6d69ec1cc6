// SoftTop-k, which makes stage 1's map of the router's scores, row by row: m_j = sigmoid(x_j +
// lambda), x = scores / tau, with the lambda that makes the m of a row sum to K; and its gradient.
#include <cfloat>
#include <cmath>

#include "../common/params.h"

namespace sla2 {
namespace {

constexpr int kThreads = 128;  // a CTA works on one row
constexpr int kWarps = kThreads / 32;
// Random scores, T_n 8 to 16384, x spread over 0.01 to 1e6: mostly 2 to 10 steps in float32 and 1
// or 2 in float64, at most 31 and 19. This ends any search.
constexpr int kMaxSteps = 64;

template <typename T>
struct Pair {
  T x, y;
};

// op over the CTA of both members; every thread gets the same bits.
template <typename T, typename Op>
__device__ __forceinline__ Pair<T> cta_reduce(Pair<T> value, Op op) {
  __shared__ Pair<T> partial[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value.x = op(value.x, __shfl_xor_sync(0xffffffffu, value.x, offset));
    value.y = op(value.y, __shfl_xor_sync(0xffffffffu, value.y, offset));
  }
  __syncthreads();  // the previous result has been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    value.x = op(value.x, partial[w].x);
    value.y = op(value.y, partial[w].y);
  }
  return value;
}

template <typename T>
__device__ __forceinline__ Pair<T> cta_sum(Pair<T> value) {
  return cta_reduce(value, [](T a, T b) { return a + b; });
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// The scores of a row, those of pinned blocks -inf: their sigmoid adds nothing to a sum.
struct Row {
  const float* scores;
  int size;
  int candidates, target;  // blocks that are not pinned, and what their m sum to
  float largest, smallest;
  double inv_tau;

  // Relative to the row's largest: float32 then is most precise where the map is not 0.
  template <typename T>
  __device__ __forceinline__ T logit(int j) const {
    return (static_cast<T>(scores[j]) - static_cast<T>(largest)) * static_cast<T>(inv_tau);
  }
  // With every score the largest, this shift gives the sum; with every score the smallest, this
  // shift and `range`. The root lies between.
  template <typename T>
  __device__ __forceinline__ T lowest_shift() const {
    return log(static_cast<T>(target) / static_cast<T>(candidates - target));
  }
  template <typename T>
  __device__ __forceinline__ T range() const {
    return (static_cast<T>(largest) - static_cast<T>(smallest)) * static_cast<T>(inv_tau);
  }
};

// Of sum_j m_j - target the root, by Newton's method within a bracket. The method is applied to the
// logit of the mean m, which is linear in the shift where scores are alike, where all m are small
// and where all are near 1. After a step s its error is below s^2.
//   close_sum: the sum is done when this near the target, relative to it; last_step: |s| that is
//   the last.
template <typename T>
__device__ __forceinline__ T find_shift(const Row& row, T shift, T close_sum, T last_step) {
  T low = row.lowest_shift<T>(), high = low + row.range<T>();
  const T target = static_cast<T>(row.target), candidates = static_cast<T>(row.candidates);
  shift = fmin(fmax(shift, low), high);  // NaN becomes `low`
  T previous = high - low;
  for (int i = 0; i < kMaxSteps; ++i) {
    Pair<T> sums = {0, 0};  // of m and of its derivative
    for (int j = threadIdx.x; j < row.size; j += kThreads) {
      const T m = sigmoid(row.logit<T>(j) + shift);
      sums.x += m;
      sums.y += m * (1 - m);
    }
    sums = cta_sum(sums);
    const T excess = sums.x - target;
    if (fabs(excess) <= close_sum * target) break;
    (excess > 0 ? high : low) = shift;
    const T rest = candidates - sums.x;
    const T distance = log(target * rest / (sums.x * (candidates - target)));
    const T step = distance * sums.x * rest / (candidates * sums.y);
    const T next = shift + step;
    // Halving the bracket instead where Newton leaves it or does not gain.
    if (next > low && next < high && fabs(step) <= previous / 2) {
      shift = next;
      previous = fabs(step);
      if (previous <= last_step) break;
    } else {
      const T middle = low + (high - low) / 2;
      if (!(middle > low && middle < high)) break;
      previous = fabs(middle - shift);
      shift = middle;
    }
  }
  return shift;
}

// One CTA: one row of the map.
__global__ void __launch_bounds__(kThreads)
    soft_top_k_kernel(const __grid_constant__ SoftTopKParams p) {
  extern __shared__ float scores[];
  const int num_columns = p.shape.num_k_blocks;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * num_columns;
  for (int j = threadIdx.x; j < num_columns; j += kThreads) {
    const float score = p.scores[first + j];
    scores[j] = fabsf(score) <= FLT_MAX ? score : NAN;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.num_pinned; i += kThreads) {
    const int pinned = p.pinned_kv[i];
    if (pinned >= 0 && pinned < num_columns) scores[pinned] = -INFINITY;
  }
  __syncthreads();

  Pair<int> counts = {0, 0};                      // of pinned blocks and of NaN among the others
  Pair<float> extremes = {-INFINITY, -INFINITY};  // largest score, and the negative smallest
  for (int j = threadIdx.x; j < num_columns; j += kThreads) {
    const float score = scores[j];
    if (score == -INFINITY) {
      ++counts.x;
    } else {
      counts.y += score != score;
      extremes.x = fmaxf(extremes.x, score);
      extremes.y = fmaxf(extremes.y, -score);
    }
  }
  counts = cta_sum(counts);
  extremes = cta_reduce(extremes, [](float a, float b) { return fmaxf(a, b); });

  Row row = {scores, num_columns};
  row.candidates = num_columns - counts.x;
  row.target = p.num_kv_blocks - counts.x;
  row.largest = extremes.x;
  row.smallest = -extremes.y;
  row.inv_tau = 1.0 / p.tau;
  // No finite lambda reaches a sum of none or of all.
  const bool constant = row.target == 0 || row.target == row.candidates;
  double shift = NAN;
  if (!constant && counts.y == 0) {
    // The search is float32's, whose own error is some 1e-6; a step of that size in float64 leaves
    // 1e-12. A sigmoid is 2 instructions of the special-function units there, some 30 of float64
    // here.
    const float guess = find_shift<float>(row, 0.f, 0x1p-18f, 0x1p-9f);
    shift = find_shift<double>(row, guess, 0x1p-46, 0x1p-16);
  }
  for (int j = threadIdx.x; j < num_columns; j += kThreads) {
    double m = row.target > 0 ? 1.0 : 0.0;
    if (!constant) m = sigmoid(row.logit<double>(j) + shift);
    p.map[first + j] = scores[j] == -INFINITY ? 1.f : static_cast<float>(m);
  }
}

// One CTA: one row. With v = m (1 - m) and g = dL/dm, dL/dscore_j = (v_j / tau) (g_j - sum(g v) /
// sum(v)); given is m g, so that g v = (1 - m) m g needs no division by m, which may underflow. The
// second reading of the row comes from L1.
__global__ void __launch_bounds__(kThreads)
    soft_top_k_bwd_kernel(const __grid_constant__ SoftTopKBwdParams p) {
  const int num_columns = p.shape.num_k_blocks;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * num_columns;
  Pair<double> sums = {0.0, 0.0};  // of v and of g v
  for (int j = threadIdx.x; j < num_columns; j += kThreads) {
    const double m = p.map[first + j], rest = 1.0 - m;
    sums.x += m * rest;
    sums.y += rest * p.grad_log_map[first + j];
  }
  sums = cta_sum(sums);
  // Every m 0 or 1: all v are 0. The product keeps NaN.
  const double mean = sums.x > 0.0 ? sums.y / sums.x : 0.0 * sums.y;
  const double inv_tau = 1.0 / p.tau;
  for (int j = threadIdx.x; j < num_columns; j += kThreads) {
    const double m = p.map[first + j], grad_log = p.grad_log_map[first + j];
    p.grad_scores[first + j] = static_cast<float>((1.0 - m) * (grad_log - m * mean) * inv_tau);
  }
}

unsigned num_rows(const Shape& shape) {
  return static_cast<unsigned>(shape.num_bh) * static_cast<unsigned>(shape.num_q_blocks);
}

}  // namespace

cudaError_t launch_soft_top_k(const SoftTopKParams& p) {
  constexpr int kMaxBytes = SLA2_MAX_SEQLEN / SLA2_BLOCK_K * static_cast<int>(sizeof(float));
  const cudaError_t status = cudaFuncSetAttribute(
      soft_top_k_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxBytes);
  if (status != cudaSuccess) return status;
  const int bytes = p.shape.num_k_blocks * static_cast<int>(sizeof(float));
  soft_top_k_kernel<<<dim3(num_rows(p.shape)), kThreads, bytes, p.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_soft_top_k_bwd(const SoftTopKBwdParams& p) {
  soft_top_k_bwd_kernel<<<dim3(num_rows(p.shape)), kThreads, 0, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
