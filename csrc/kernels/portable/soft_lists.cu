// Stage 1's soft map as the kernels want it: lists of the key blocks that the sparse branch attends
// to, and the linear branch's weights as an operand of its products.
#include <cuda_bf16.h>

#include "../common/layout.cuh"
#include "../common/params.h"

namespace sla2 {
namespace {

constexpr int kWarps = 4;

// One warp: one row of the map.
__global__ void __launch_bounds__(kWarps * 32)
    soft_lists_kernel(const __grid_constant__ SoftListParams p) {
  const int lane = threadIdx.x % 32, num_columns = p.shape.num_k_blocks;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(p.shape.num_bh) * p.shape.num_q_blocks) return;
  const int pitch = weight_pitch(num_columns);
  const float* map = p.map + row * num_columns;
  uint16_t* lut = p.lut + row * num_columns;
  uint16_t* weights = p.weights + row * pitch;
  int written = 0;
  for (int j = lane; j < pitch; j += 32) {
    const float m = j < num_columns ? __ldg(map + j) : 1.f;
    weights[j] = __bfloat16_as_ushort(__float2bfloat16_rn(1.f - m));
    const bool listed = j < num_columns && is_listed(m);
    const uint32_t mask = __ballot_sync(0xffffffffu, listed);
    if (listed) lut[written + __popc(mask & ((1u << lane) - 1u))] = static_cast<uint16_t>(j);
    written += __popc(mask);
  }
  if (lane == 0) p.counts[row] = written;
}

}  // namespace

cudaError_t launch_soft_lists(const SoftListParams& p) {
  const int64_t rows = static_cast<int64_t>(p.shape.num_bh) * p.shape.num_q_blocks;
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps));
  soft_lists_kernel<<<grid, kWarps * 32, 0, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
