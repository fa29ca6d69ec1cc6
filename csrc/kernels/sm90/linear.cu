// The linear branch before the attention kernel, one persistent launch (method steps 6 and 8): K
// and V records, states, H and Z of all heads. The state work is bound by memory and issue slots,
// the complement by the tensor cores; as two streams of warps on every SM they overlap.
#include <algorithm>

#include "../common/dispatch.h"
#include "linear.cuh"
#include "linear_complement.cuh"
#include "linear_state.cuh"
#include "tensor_map.h"

namespace sla2 {
namespace {

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <typename Element, int kHeadDim>
__device__ __forceinline__ void initialise(LinearSmem<Element, kHeadDim>& smem) {
  using Smem = LinearSmem<Element, kHeadDim>;
  constexpr uint32_t kOnePair = 0x3f803f80u;
  for (uint32_t i = threadIdx.x; i < sizeof(smem.ones) / 4; i += kLinearThreads) {
    smem.ones[i] = kOnePair;
  }
  fence_async_shared();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Smem::kTileStages; ++i) {
      mbarrier_init(smem_address(&smem.tile_full[i]), 1);
      mbarrier_init(smem_address(&smem.tile_empty[i]), kComplementGroups * kWarpgroup / 32);
    }
    for (int i = 0; i < Smem::kStateStages; ++i) {
      mbarrier_init(smem_address(&smem.state_full[i]), 1);
      mbarrier_init(smem_address(&smem.state_stored[i]), kWarpgroup / 32);
      mbarrier_init(smem_address(&smem.state_empty[i]), 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
}

template <typename Element, int kHeadDim, int kQuant>
__global__ void __launch_bounds__(kLinearThreads, 1)
    linear_kernel(const __grid_constant__ LinearArgs args) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<LinearSmem<Element, kHeadDim>*>(smem_bytes);
  initialise(smem);
  const int group = uniform(static_cast<int>(threadIdx.x / kWarpgroup));
  if (group < kComplementGroups) {
    grow_registers<kComplementRegisters>();
    ComplementWorker<Element, kHeadDim>(args, smem, group).run();
  } else if (group < kComplementGroups + kStateGroups) {
    shrink_registers<kStateRegisters>();
    StateWorker<Element, kHeadDim, kQuant>(args, smem, group - kComplementGroups).run();
  } else {
    shrink_registers<kCopyRegisters>();
    switch (threadIdx.x / 32 % 4) {
      case 0:
        return load_tiles(args, smem);
      case 1:
        return load_states(args, smem);
      default:
        return publish_states(args, smem, threadIdx.x / 32 % kPublishers);
    }
  }
}

template <typename Element, int kHeadDim, int kQuant>
cudaError_t launch(const LinearParams& p) {
  using Smem = LinearSmem<Element, kHeadDim>;
  static_assert(sizeof(Smem) <= 232448, "227 KiB a CTA");
  LinearArgs args = {};
  args.p = p;
  args.row_blocks = (p.shape.num_q_blocks + kRowBlock - 1) / kRowBlock;
  args.row_tiles = (args.row_blocks + kTileBlocks - 1) / kTileBlocks;
  args.mask_pitch = mask_pitch(p.shape.num_q_blocks);
  args.mask_head = int64_t{1} * mask_words(p.shape.num_k_blocks) * args.mask_pitch;
  cudaError_t status = encode_tokens(args.k, p.k, p.shape, kHeadDim, kBlockK);
  if (status == cudaSuccess) status = encode_tokens(args.v, p.v, p.shape, kHeadDim, kBlockK);
  if (status == cudaSuccess && p.state != nullptr) {
    const uint64_t blocks = p.shape.num_k_blocks, slots = std::min(p.shape.num_bh, kStateSlots);
    constexpr uint64_t kColumns = state_elements(kHeadDim);
    status = encode_tensor_map<3>(args.state, p.state, {kColumns, blocks, slots},
                                  {kColumns * 2, blocks * kColumns * 2}, {kPanel, kBlockK, 1});
  }
  const auto kernel = linear_kernel<Element, kHeadDim, kQuant>;
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(sizeof(Smem)));
  }
  int device = 0, sms = 0;
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  const int64_t state_tasks = int64_t{1} * p.shape.num_bh * p.shape.num_k_blocks;
  const int64_t tiles =
      int64_t{1} * p.shape.num_bh * args.row_tiles * (state_elements(kHeadDim) / kTileColumns);
  const int64_t tasks = p.state == nullptr ? state_tasks : std::max(state_tasks, tiles);
  const int grid = static_cast<int>(std::min<int64_t>(sms, tasks));
  kernel<<<grid, kLinearThreads, sizeof(Smem), p.stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int linear_counters(const Shape& shape) { return 2 + 2 * shape.num_bh; }

cudaError_t launch_linear_sm90(const LinearParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    switch (p.quant) {
      case SLA2_QUANT_NONE:
        return launch<typename I::Element, I::kHeadDim, SLA2_QUANT_NONE>(p);
      case SLA2_QUANT_INT8_FP8:
        return launch<typename I::Element, I::kHeadDim, SLA2_QUANT_INT8_FP8>(p);
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace sla2
