// The linear branch before the attention kernel, one persistent launch (method steps 6 and 8): K
// and V records, states, H and Z of all heads. The state work waits for memory and its own latency,
// the complement for its products; as two streams of warps on every SM they overlap.
#include <algorithm>

#include "../common/dispatch.h"
#include "launch.h"
#include "linear_bf16.cuh"
#include "linear_e4m3.cuh"

namespace sla2 {
namespace {

template <class Variant>
__global__ void __launch_bounds__(kLinearThreads, 1)
    linear_kernel(const __grid_constant__ LinearArgs args) {
  static_assert(kComplementGroups * Variant::kComplementRegisters +
                        kStateGroups * Variant::kStateRegisters + Variant::kCopyRegisters <=
                    kRegisterPool,
                "the roles' registers");
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Variant::Smem*>(smem_bytes);
  // The predecessor, the router or the kernel that makes the mask, came after those whose results
  // the state stream reads: it runs beside them. Without tiles nothing else would wait, and the
  // attention kernel counts on lists that are there when this kernel ends.
  trigger_dependents();
  if (args.p.state == nullptr || Variant::kBackward) wait_predecessor();
  smem.init();
  fence_async_shared();
  fence_barrier_init();
  __syncthreads();
  const int group = uniform(static_cast<int>(threadIdx.x / kWarpgroup));
  if (group < kComplementGroups) {
    grow_registers<Variant::kComplementRegisters>();
    typename Variant::ComplementWorker(args, smem, group).run();
  } else if (group < kComplementGroups + kStateGroups) {
    if constexpr (Variant::kStateRegisters > kRegisterPool / 5) {
      grow_registers<Variant::kStateRegisters>();
    } else {
      shrink_registers<Variant::kStateRegisters>();
    }
    typename Variant::StateWorker(args, smem, group - kComplementGroups).run();
  } else {
    shrink_registers<Variant::kCopyRegisters>();
    Variant::copies(args, smem, threadIdx.x / 32 % 4);
  }
}

template <class Variant>
cudaError_t launch(const LinearParams& p) {
  using Smem = typename Variant::Smem;
  static_assert(sizeof(Smem) <= 232448, "227 KiB a CTA");
  LinearArgs args = {};
  args.p = p;
  cudaError_t status = Variant::encode(args);
  if (status == cudaSuccess) {
    status = encode_tokens(args.k, p.k, p.shape, Variant::kHeadDim, kBlockK);
  }
  if (status == cudaSuccess) {
    status = encode_tokens(args.v, p.v, p.shape, Variant::kHeadDim, kBlockK);
  }
  const auto kernel = linear_kernel<Variant>;
  const int64_t tasks = int64_t{1} * p.bh_count *
                        std::max(p.shape.num_k_blocks, p.state == nullptr ? 0 : args.head_tiles);
  int ctas = 0;
  if (status == cudaSuccess) status = prepare_persistent(kernel, sizeof(Smem), tasks, ctas);
  if (status != cudaSuccess) return status;
  return launch_overlapped(kernel, ctas, kLinearThreads, sizeof(Smem), p.stream, args);
}

}  // namespace

int linear_counters(const Shape& shape, int bh_count) {
  return 2 + (2 * ready_words(shape) + 1) * bh_count;
}

cudaError_t launch_linear_sm90(const LinearParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    switch (p.quant) {
      case SLA2_QUANT_NONE:
        return p.backward ? launch<LinearBf16<typename I::Element, I::kHeadDim, true>>(p)
                          : launch<LinearBf16<typename I::Element, I::kHeadDim, false>>(p);
      case SLA2_QUANT_INT8_FP8:
        return p.shape.num_k_blocks > kSumRounds * kRoundSteps * kStepBlocks
                   ? launch<LinearE4m3<typename I::Element, I::kHeadDim, true>>(p)
                   : launch<LinearE4m3<typename I::Element, I::kHeadDim, false>>(p);
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace sla2
