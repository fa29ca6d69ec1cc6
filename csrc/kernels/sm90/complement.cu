// The complement of states that another launch has made: in the backward pass dh = (1 - M)^T dH and
// dz, the gradients of a head's query blocks summed by key block. A persistent launch of the linear
// kernel's complement stream alone, whose four warpgroups take turns at the tensor cores.
//
// A step of 64 blocks is 256 x 128 x 64: 1024 cycles of products. Of the 128 bytes that shared
// memory moves in a cycle they take 64 for B (A is in registers), and the copies of 16 KiB of
// states and 2 KiB of mask words 18 more. From L2: 18 KiB a step, 2.4 TB/s at full speed.
#include <algorithm>

#include "launch.h"
#include "linear_bf16_tiles.cuh"

namespace sla2 {
namespace {

// 18 KiB a stage: a tile of 591 query blocks' states, ten steps, is loaded while the one before is
// computed and stored.
constexpr int kTileStages = 12;

template <int kHeadDim_>
struct ComplementBf16 {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kMakesStates = false;
  using TileShape = Bf16TileShape<4, 1, 2>;
  using Smem = Bf16TileSmem<TileShape, kTileStages>;
  static constexpr int kThreads = (TileShape::kGroups + 1) * kWarpgroup;
  static constexpr int kWorkerRegisters = 112, kCopyRegisters = 32;
  static_assert(TileShape::kGroups * kWorkerRegisters + kCopyRegisters <= kRegisterPool,
                "the roles' registers");
};

template <class Variant>
__global__ void __launch_bounds__(Variant::kThreads, 1)
    complement_sm90_kernel(const __grid_constant__ LinearArgs args) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Variant::Smem*>(smem_bytes);
  smem.init();
  fence_barrier_init();
  __syncthreads();
  const int group = uniform(static_cast<int>(threadIdx.x / kWarpgroup));
  if (group < Variant::TileShape::kGroups) {
    grow_registers<Variant::kWorkerRegisters>();
    Bf16ComplementWorker<Variant>(args, smem, group).run();
  } else {
    shrink_registers<Variant::kCopyRegisters>();
    if (threadIdx.x / 32 % 4 == 0 && elect_one()) load_bf16_tiles<Variant>(args, smem);
  }
}

template <class Variant>
cudaError_t launch(const ComplementParams& p) {
  using Smem = typename Variant::Smem;
  static_assert(sizeof(Smem) <= 232448, "227 KiB a CTA");
  LinearArgs args = {};
  args.p.shape = p.shape;
  args.p.bh_count = p.bh_count;
  args.p.mask = p.mask;
  args.p.state = const_cast<uint16_t*>(p.state);
  args.p.state_slots = p.bh_count;
  args.p.h = p.h;
  args.p.z = p.z;
  args.p.counters = p.tickets;
  args.p.stream = p.stream;
  cudaError_t status = encode_bf16_tiles<Variant>(args);
  const auto kernel = complement_sm90_kernel<Variant>;
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(sizeof(Smem)));
  }
  int sms = 0;
  if (status == cudaSuccess) status = count_multiprocessors(sms);
  if (status != cudaSuccess) return status;
  const int64_t tiles = int64_t{1} * p.bh_count * args.head_tiles;
  const int grid = static_cast<int>(std::min<int64_t>(sms, tiles));
  return launch_overlapped(kernel, grid, Variant::kThreads, sizeof(Smem), p.stream, args);
}

}  // namespace

cudaError_t launch_complement_sm90(const ComplementParams& p, int head_dim) {
  return head_dim == 128 ? launch<ComplementBf16<128>>(p) : launch<ComplementBf16<64>>(p);
}

}  // namespace sla2
