// Rotary position embedding of q or k: bound by memory, x read and written once.
//
// In PyTorch it is a dozen operations on float32 copies, some nine times these bytes, and so one
// of the larger parts of a denoising step whose attention is fast.
#include "../common/convert.cuh"
#include "../common/dispatch.h"
#include "../common/params.h"

namespace sla2 {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // loads of a thread in flight: out may be x, so no load passes a store

// What turns eight features: the cosines of the even ones and the sines of the odd ones.
struct Angles {
  float cos[4], sin[4];
  __device__ __forceinline__ void load(const float* c, const float* s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 even = __ldg(reinterpret_cast<const float4*>(c) + i);
      const float4 odd = __ldg(reinterpret_cast<const float4*>(s) + i);
      cos[2 * i] = even.x;
      cos[2 * i + 1] = even.z;
      sin[2 * i] = odd.y;
      sin[2 * i + 1] = odd.w;
    }
  }
};

// Not contracted to fused operations: the bits are those of PyTorch's separate ones.
template <typename Element>
__device__ __forceinline__ uint4 turn(const uint4& packed, const Angles& angles, float sign) {
  float x[8];
  unpack8<Element>(packed, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], c = angles.cos[i], s = sign * angles.sin[i];
    x[2 * i] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
    x[2 * i + 1] = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
  }
  return pack8<Element>(x);
}

// One thread: eight features of a token in all heads, one after another.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const __grid_constant__ RotaryParams p) {
  constexpr int kLanesPerRow = kHeadDim / 8;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kLanesPerRow) + threadIdx.x / kLanesPerRow;
  const int batch = static_cast<int>(row / p.shape.seqlen);
  const int token = static_cast<int>(row % p.shape.seqlen);
  if (batch >= p.shape.num_bh / p.shape.num_heads) return;
  const int column = threadIdx.x % kLanesPerRow * 8;
  const auto offset = [&](const TensorView& view) {
    return batch * view.stride_batch + token * view.stride_token + column;
  };
  const Element* x = static_cast<const Element*>(p.x.data) + offset(p.x);
  Element* out = static_cast<Element*>(const_cast<void*>(p.out.data)) + offset(p.out);
  const float* cos = static_cast<const float*>(p.cos.data) + offset(p.cos);
  const float* sin = static_cast<const float*>(p.sin.data) + offset(p.sin);
  const bool shared = p.cos.stride_head == 0 && p.sin.stride_head == 0;
  const float sign = p.inverse ? -1.f : 1.f;

  Angles angles;
  angles.load(cos, sin);
#pragma unroll 1
  for (int first = 0; first < p.shape.num_heads; first += kHeads) {
    uint4 packed[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (first + i >= p.shape.num_heads) break;
      packed[i] = *reinterpret_cast<const uint4*>(x + (first + i) * p.x.stride_head);
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = first + i;
      if (head >= p.shape.num_heads) break;
      if (!shared && head > 0) {
        angles.load(cos + head * p.cos.stride_head, sin + head * p.sin.stride_head);
      }
      *reinterpret_cast<uint4*>(out + head * p.out.stride_head) =
          turn<Element>(packed[i], angles, sign);
    }
  }
}

}  // namespace

cudaError_t launch_rotary(const RotaryParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    constexpr int kRows = kThreads / (I::kHeadDim / 8);
    const int64_t rows = static_cast<int64_t>(p.shape.num_bh / p.shape.num_heads) * p.shape.seqlen;
    const dim3 grid(static_cast<unsigned>((rows + kRows - 1) / kRows));
    rotary_kernel<typename I::Element, I::kHeadDim><<<grid, kThreads, 0, p.stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace sla2
