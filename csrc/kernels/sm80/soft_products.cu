// The linear branch's products where the map is soft, W = 1 - m with real entries: H = W h and
// Z = W z; dh = W^T dH and dz; and the gradient of W, dH h^T + dZ z^T. Each is one matrix product
// per head over the key blocks, the query blocks, or the features of a state.
#include "../common/layout.cuh"
#include "../common/params.h"
#include "../common/ptx.cuh"
#include "bwd_tiles.cuh"
#include "complement_store.cuh"

namespace sla2 {
namespace {

// One CTA: a 128 x 128 tile of the result; 2 x 2 warps of 64 x 64. Operands pass through a cp.async
// ring, 64 of the summed index a step, as they lie in memory: as 128 rows of 64, or as 64 rows of
// 128 that ldmatrix transposes.
constexpr int kTileK = 64, kStages = 3;
constexpr int kOperandBytes = kSumTile * kTileK * 2, kStageBytes = 2 * kOperandBytes;
constexpr int kSmemBytes = kStages * kStageBytes;
static_assert(kSumTileBytes <= kSmemBytes, "the ring stages the output");
static_assert(kSmemBytes <= 99 * 1024, "one CTA must fit every sm_80+ device");
constexpr int kLongRow = kSumTile * 2, kShortRow = kTileK * 2;  // bytes

using Accumulators = float[4][8][4];

struct WarpPlace {
  const int row = threadIdx.x / 32 % 2 * 64, column = threadIdx.x / 64 * 64;
};

// Rows of kRowBytes into a swizzled tile, zeros from num_rows on.
template <int kRowBytes>
__device__ __forceinline__ void load_operand(uint32_t tile, const uint16_t* x, int64_t pitch,
                                             int num_rows) {
  constexpr int kChunks = kRowBytes / 16;
#pragma unroll
  for (int i = 0; i < kOperandBytes / 16 / kSumThreads; ++i) {
    const int item = i * kSumThreads + threadIdx.x, row = item / kChunks, chunk = item % kChunks;
    const bool valid = row < num_rows;
    cp_async_16(tile + swizzle<kRowBytes>(row, chunk), x + (valid ? row * pitch : 0) + chunk * 8,
                valid);
  }
}

// load(step, a, b) fills the two tiles of a step, multiply(a, b) adds their product. The ring is
// free on return.
template <typename Load, typename Multiply>
__device__ __forceinline__ void sum_over_steps(uint32_t ring, int steps, Load load,
                                               Multiply multiply) {
  auto load_stage = [&](int step) {
    if (step < steps) {
      const uint32_t a = ring + step % kStages * kStageBytes;
      load(step, a, a + kOperandBytes);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_stage(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load_stage(step + kStages - 1);
    const uint32_t a = ring + step % kStages * kStageBytes;
    multiply(a, a + kOperandBytes);
  }
  cp_async_wait<0>();
  __syncthreads();
}

template <int kHeadDim, bool kTransposed>
__global__ void __launch_bounds__(kSumThreads, 2)
    weighted_sum_kernel(const __grid_constant__ WeightedSumParams p) {
  extern __shared__ __align__(128) char smem[];
  constexpr int kColumns = state_elements(kHeadDim), kColumnTiles = kColumns / kSumTile;
  static_assert(kColumns % kSumTile == 0 && kHeadDim * kHeadDim % kSumTile == 0,
                "tiles do not straddle H and Z");
  const int num_rows = kTransposed ? p.shape.num_k_blocks : p.shape.num_q_blocks;
  const int summed = kTransposed ? p.shape.num_q_blocks : p.shape.num_k_blocks;
  const int row_tiles = (num_rows + kSumTile - 1) / kSumTile;
  // Row tiles vary fastest: the CTAs that share a column tile of the states run together.
  const int row0 = blockIdx.x % row_tiles * kSumTile;
  const int column0 = blockIdx.x / row_tiles % kColumnTiles * kSumTile;
  const int64_t bh = blockIdx.x / (row_tiles * kColumnTiles);
  const int pitch = weight_pitch(p.shape.num_k_blocks);
  const uint16_t* weights = p.weights + bh * p.shape.num_q_blocks * pitch;
  const uint16_t* state = p.state + bh * summed * kColumns + column0;

  const WarpPlace warp;
  Accumulators acc = {};
  sum_over_steps(
      smem_address(smem), (summed + kTileK - 1) / kTileK,
      [&](int step, uint32_t a, uint32_t b) {
        const int first = step * kTileK;
        if constexpr (kTransposed) {
          load_operand<kLongRow>(a, weights + static_cast<int64_t>(first) * pitch + row0, pitch,
                                 summed - first);
        } else {
          load_operand<kShortRow>(a, weights + static_cast<int64_t>(row0) * pitch + first, pitch,
                                  num_rows - row0);
        }
        load_operand<kLongRow>(b, state + static_cast<int64_t>(first) * kColumns, kColumns,
                               summed - first);
      },
      [&](uint32_t a_tile, uint32_t b_tile) {
        if constexpr (kTransposed) {
#pragma unroll
          for (int k = 0; k < kTileK; k += 16) {
            uint32_t a[4][4];
            load_transposed<kLongRow>(a, a_tile, k, warp.row);
            multiply_step<__nv_bfloat16, __nv_bfloat16, kLongRow>(acc, a, b_tile, k, warp.column);
          }
        } else {
          multiply_nn<__nv_bfloat16, kShortRow, kLongRow>(acc, a_tile, warp.row, b_tile,
                                                          warp.column);
        }
      });
  store_sums<kHeadDim>(acc, 1.f, smem, p.h + bh * num_rows * kHeadDim * kHeadDim,
                       p.z + bh * num_rows * 2 * kHeadDim, row0, column0, num_rows);
}

// <dH, h> + <dZ, z> of 128 query blocks by 128 key blocks.
template <int kHeadDim>
__global__ void __launch_bounds__(kSumThreads, 2)
    map_grad_kernel(const __grid_constant__ MapGradParams p) {
  extern __shared__ __align__(128) char smem[];
  constexpr int kColumns = state_elements(kHeadDim), kColumnsH = kHeadDim * kHeadDim;
  const int rows = p.shape.num_q_blocks, columns = p.shape.num_k_blocks;
  const int row_tiles = (rows + kSumTile - 1) / kSumTile;
  const int column_tiles = (columns + kSumTile - 1) / kSumTile;
  const int row0 = blockIdx.x % row_tiles * kSumTile;
  const int column0 = blockIdx.x / row_tiles % column_tiles * kSumTile;
  const int64_t bh = blockIdx.x / (row_tiles * column_tiles);
  const uint16_t* dstate = p.dstate_q + (bh * rows + row0) * kColumns;
  const uint16_t* state = p.state + (bh * columns + column0) * kColumns;

  // dZ and z are pairs of a high and a low part: after dH h^T come high high^T, low high^T and high
  // low^T, as the two terms may cancel.
  constexpr int kStepsH = kColumnsH / kTileK, kStepsZ = kHeadDim / kTileK;
  const WarpPlace warp;
  Accumulators acc = {};
  sum_over_steps(
      smem_address(smem), kStepsH + 3 * kStepsZ,
      [&](int step, uint32_t a, uint32_t b) {
        const int product = step < kStepsH ? 0 : (step - kStepsH) / kStepsZ;
        const int first = (step - product * kStepsZ) * kTileK;
        load_operand<kShortRow>(a, dstate + first + (product == 1 ? kHeadDim : 0), kColumns,
                                rows - row0);
        load_operand<kShortRow>(b, state + first + (product == 2 ? kHeadDim : 0), kColumns,
                                columns - column0);
      },
      [&](uint32_t a_tile, uint32_t b_tile) {
        multiply_nt<__nv_bfloat16, __nv_bfloat16, kShortRow>(acc, a_tile, warp.row, b_tile,
                                                             warp.column);
      });

  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + warp.row + 16 * m + i / 2 * 8 + lane / 4;
        const int column = column0 + warp.column + 8 * n + lane % 4 * 2 + i % 2;
        if (row >= rows || column >= columns) continue;
        const int64_t at = (bh * rows + row) * columns + column;
        const float weight = __ldg(p.soft_map + at);
        const float sparse = is_listed(weight) ? p.grad_log_map[at] : 0.f;
        p.grad_log_map[at] = fmaf(-weight, acc[m][n][i], sparse);
      }
    }
  }
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Params& p, int row_tiles, int column_tiles) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (status != cudaSuccess) return status;
  kernel<<<p.bh_count * row_tiles * column_tiles, kSumThreads, kSmemBytes, p.stream>>>(p);
  return cudaGetLastError();
}

int tiles(int count) { return (count + kSumTile - 1) / kSumTile; }

}  // namespace

cudaError_t launch_weighted_sum(const WeightedSumParams& p, int head_dim) {
  const int rows = tiles(p.transposed ? p.shape.num_k_blocks : p.shape.num_q_blocks);
  const int columns = state_elements(head_dim) / kSumTile;
  if (head_dim == 128) {
    return launch(p.transposed ? weighted_sum_kernel<128, true> : weighted_sum_kernel<128, false>,
                  p, rows, columns);
  }
  return launch(p.transposed ? weighted_sum_kernel<64, true> : weighted_sum_kernel<64, false>, p,
                rows, columns);
}

cudaError_t launch_map_grad(const MapGradParams& p, int head_dim) {
  return launch(head_dim == 128 ? map_grad_kernel<128> : map_grad_kernel<64>, p,
                tiles(p.shape.num_q_blocks), tiles(p.shape.num_k_blocks));
}

}  // namespace sla2
