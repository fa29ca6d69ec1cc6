// The complement of states that another launch has made: in the backward pass dh = (1 - M)^T dH and
// dz, the gradients of a head's query blocks summed by key block. A persistent launch of the linear
// kernel's complement stream alone, whose four warpgroups take turns at the tensor cores.
//
// A step of 64 blocks is 256 x 128 x 64: 1024 cycles of products. Of the 128 bytes that shared
// memory moves in a cycle they take 64 for B (A is in registers), the copies of 16 KiB of states
// and 2 KiB of mask words 18 more, and results on their way out a few. L2 delivers those 18 bytes
// too: 4.2 TB/s for 132 SMs at full speed.

#include "launch.h"
#include "linear_bf16_tiles.cuh"

namespace sla2 {
namespace {

// Of 18 KiB. 591 query blocks' states are ten steps: most of a tile is there when the one before is
// stored.
constexpr int kTileStages = 8;

template <int kHeadDim_>
struct ComplementBf16 {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kMakesStates = false;
  using TileShape = Bf16TileShape<4, 1, 2>;
  struct Output {
    // 16 rows of each warp, on their way to memory.
    alignas(1024) char out[4 * TileShape::kGroups][TileShape::kPanels * 16 * 128];
    __device__ __forceinline__ void init() {}
  };
  using Smem = Bf16TileSmem<TileShape, kTileStages, Output>;
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
  args.p.z = p.z;
  args.p.counters = p.tickets;
  args.p.stream = p.stream;
  cudaError_t status = encode_bf16_tiles<Variant>(args);
  if (status == cudaSuccess) {
    constexpr uint64_t kPanels = Variant::kHeadDim * Variant::kHeadDim / kPanel;
    constexpr uint64_t kBytes = kPanels * kPanel * 2;
    const uint64_t rows = p.shape.num_q_blocks, heads = p.bh_count;
    status = encode_tensor_map<4>(args.h[0], p.h, {kPanel, kPanels, rows, heads},
                                  {kPanel * 2, kBytes, rows * kBytes}, {kPanel, 1, 16, 1});
  }
  const auto kernel = complement_sm90_kernel<Variant>;
  const int64_t tiles = int64_t{1} * p.bh_count * args.head_tiles;
  int ctas = 0;
  if (status == cudaSuccess) status = prepare_persistent(kernel, sizeof(Smem), tiles, ctas);
  if (status != cudaSuccess) return status;
  return launch_overlapped(kernel, ctas, Variant::kThreads, sizeof(Smem), p.stream, args);
}

}  // namespace

cudaError_t launch_complement_sm90(const ComplementParams& p, int head_dim) {
  return head_dim == 128 ? launch<ComplementBf16<128>>(p) : launch<ComplementBf16<64>>(p);
}

}  // namespace sla2
