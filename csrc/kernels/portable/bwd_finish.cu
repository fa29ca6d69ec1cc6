// The last steps of the backward pass, bound by memory and by latency: the gradient of K's
// smoothing, and d alpha_logit summed over what shares it.
#include "../common/convert.cuh"
#include "../common/dispatch.h"
#include "../common/layout.cuh"
#include "../common/params.h"

namespace sla2 {
namespace {

constexpr int kCentreThreads = 256;

// One CTA: 128 tokens of one head, 16 bytes a thread and pass.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kCentreThreads)
    centre_keys_kernel(const __grid_constant__ CentreParams p) {
  constexpr int kLanesPerRow = kHeadDim / 8, kRowsPerPass = kCentreThreads / kLanesPerRow;
  const int block = blockIdx.x % p.shape.num_q_blocks, bh = blockIdx.x / p.shape.num_q_blocks;
  const int column = threadIdx.x % kLanesPerRow * 8;
  float mean[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) mean[c] = p.dk_mean[static_cast<int64_t>(bh) * kHeadDim + column + c];
  Element* dk = const_cast<Element*>(head_base<Element>(p.dk, bh, p.shape.num_heads)) + column;
#pragma unroll
  for (int i = 0; i < kBlockQ / kRowsPerPass; ++i) {
    const int token = block * kBlockQ + i * kRowsPerPass + threadIdx.x / kLanesPerRow;
    if (token >= p.shape.seqlen) return;
    uint4& packed = *reinterpret_cast<uint4*>(dk + token * p.dk.stride_token);
    float x[8];
    unpack8<Element>(packed, x);
#pragma unroll
    for (int c = 0; c < 8; ++c) x[c] -= mean[c];
    packed = pack8<Element>(x);
  }
}

constexpr int kAlphaThreads = 128;

// One thread: one entry, over the batch and, where they share it, the heads, in that order.
__global__ void __launch_bounds__(kAlphaThreads)
    alpha_grad_kernel(const __grid_constant__ AlphaGradParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAlphaThreads + threadIdx.x;
  const int head = static_cast<int>(index / p.width), column = static_cast<int>(index % p.width);
  const bool shared = p.stride_head == 0;
  if (head >= (shared ? 1 : p.shape.num_heads)) return;
  float sum = 0.f;
  for (int bh = head; bh < p.shape.num_bh; bh += shared ? 1 : p.shape.num_heads) {
    sum += p.partial[static_cast<int64_t>(bh) * p.width + column];
  }
  p.grad[head * p.stride_head + column] = sum;
}

}  // namespace

cudaError_t launch_centre_keys(const CentreParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    const dim3 grid(p.shape.num_bh * p.shape.num_q_blocks);
    centre_keys_kernel<typename I::Element, I::kHeadDim><<<grid, kCentreThreads, 0, p.stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t launch_alpha_grad(const AlphaGradParams& p) {
  const int64_t entries =
      static_cast<int64_t>(p.stride_head == 0 ? 1 : p.shape.num_heads) * p.width;
  const dim3 grid(static_cast<unsigned>((entries + kAlphaThreads - 1) / kAlphaThreads));
  alpha_grad_kernel<<<grid, kAlphaThreads, 0, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
