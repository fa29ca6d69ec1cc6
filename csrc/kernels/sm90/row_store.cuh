// The way of a result out of the accumulators: staged in shared memory, stored by tensor copies.
#pragma once

#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/ptx.cuh"
#include "async.cuh"

namespace sla2 {

// The warp's rows of accumulators, times factor(half, d, parity), through its rows of a tile in
// shared memory to `map`. The caller waits with bulk_store_wait_read before the tile is used again.
template <class C, typename Factor>
__device__ __forceinline__ void store_rows(const float (&acc)[C::kTilesD][4], char* smem,
                                           const CUtensorMap* map, int row0, int head, int batch,
                                           Factor factor) {
  const int lane = threadIdx.x % 32, row = C::tile_row(0) + lane % 16;
  const uint32_t tile = smem_address(smem);
  __syncwarp();  // the tile's last readers
#pragma unroll
  for (int d = 0; d < C::kTilesD; d += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2, column = d + i / 2;
      words[i] = Pair<typename C::Element>::from_floats(
          acc[column][2 * half] * factor(half, column, 0),
          acc[column][2 * half + 1] * factor(half, column, 1));
    }
    stmatrix_x4(tile + d / 8 * C::kPanelBytes + swizzle<128>(row, d % 8 + lane / 16), words);
  }
  fence_async_shared();
  __syncwarp();
  if (elect_one()) {
#pragma unroll
    for (int panel = 0; panel < C::kHeadDim / 64; ++panel) {
      tensor_store(map, tile + panel * C::kPanelBytes + C::tile_row(0) * 128, 64 * panel,
                   row0 + C::tile_row(0), head, batch, evict_first());
    }
    bulk_store_commit();
  }
}

}  // namespace sla2
