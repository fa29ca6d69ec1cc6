// The linear branch's complement as one matrix product per head: H = W h, Z = W z with W = 1 - M (method step 6).
// 2 T_m T_n (D^2 + 2D) operations whatever the sparsity, exact, no cancellation; real weights work unchanged.
// Heads go through in groups whose states stay in L2 between their production and this product.
#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/params.h"
#include "../common/ptx.cuh"

namespace sla2 {
namespace {

constexpr int kWeightThreads = 128;

// One CTA: one row of W, bf16 1 outside the list and 0 on it; columns past T_n are zero.
__global__ void __launch_bounds__(kWeightThreads) weights_kernel(const __grid_constant__ ComplementParams p) {
  extern __shared__ uint32_t listed[];  // one bit per key block
  const int padded = padded_blocks(p.shape.num_k_blocks);
  const int64_t local_row = blockIdx.x;
  const int64_t list = static_cast<int64_t>(p.bh_begin) * p.shape.num_q_blocks + local_row;
  for (int i = threadIdx.x; i < padded / 32; i += kWeightThreads) listed[i] = 0u;
  __syncthreads();
  const int count = min(p.counts[list], p.max_kv_blocks);
  for (int i = threadIdx.x; i < count; i += kWeightThreads) {
    const int j = p.lut[list * p.max_kv_blocks + i];
    if (j < p.shape.num_k_blocks) atomicOr(&listed[j / 32], 1u << (j % 32));
  }
  __syncthreads();
  constexpr uint32_t kOne = 0x3f80u;  // bf16 1.0
  for (int i = threadIdx.x; i < padded / 8; i += kWeightThreads) {
    const int valid = max(0, min(8, p.shape.num_k_blocks - i * 8));
    const uint32_t keep = ~(listed[i / 4] >> (i % 4 * 8)) & ((1u << valid) - 1u);
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = (keep >> (2 * w) & 1u) * kOne | (keep >> (2 * w + 1) & 1u) * (kOne << 16);
    }
    reinterpret_cast<uint4*>(p.weights + local_row * padded)[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// One CTA: a 128 x 128 tile of [H | Z]; key blocks in steps of 32 through a cp.async ring. 128 x 256 tiles, one CTA an
// SM, move a quarter less through L2 and were slower all the same (H200: 3.47 against 2.88 ms, 40 heads of 75600 tokens).
constexpr int kTileM = 128, kTileN = 128, kTileK = kComplementTileK;
#ifndef WN
#define WN 64
#endif
constexpr int kWarpN = WN;
constexpr int kThreads = kTileM / 64 * (kTileN / kWarpN) * 32;
constexpr int kStages = 4;
constexpr int kBytesA = kTileM * kTileK * 2, kBytesB = kTileK * kTileN * 2;  // 8 KiB each

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) complement_kernel(const __grid_constant__ ComplementParams p) {
  extern __shared__ __align__(128) char smem[];
  constexpr int kColumns = state_elements(kHeadDim), kColumnsH = kHeadDim * kHeadDim;
  static_assert(kColumnsH % kTileN == 0, "tiles do not straddle H and Z");
  const int row_tiles = (p.shape.num_q_blocks + kTileM - 1) / kTileM;
  constexpr int kColumnTiles = (kColumns + kTileN - 1) / kTileN;
  // Row tiles vary fastest: the CTAs that share a column tile of h run together.
  const int row0 = blockIdx.x % row_tiles * kTileM;
  const int column0 = blockIdx.x / row_tiles % kColumnTiles * kTileN;
  const int local_bh = blockIdx.x / (row_tiles * kColumnTiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int padded = padded_blocks(p.shape.num_k_blocks);
  const uint16_t* weights = p.weights + static_cast<int64_t>(local_bh) * p.shape.num_q_blocks * padded;
  const uint16_t* state = p.state + static_cast<int64_t>(local_bh) * p.shape.num_k_blocks * kColumns + column0;
  const uint32_t ring = smem_address(smem);
  constexpr int kChunksB = kTileN / 8;

  auto load = [&](int step) {
    const uint32_t a = ring + step % kStages * (kBytesA + kBytesB), b = a + kBytesA;
#pragma unroll
    for (int i = 0; i < kBytesA / 16 / kThreads; ++i) {
      const int item = i * kThreads + threadIdx.x, r = item / 4, chunk = item % 4;
      const bool valid = row0 + r < p.shape.num_q_blocks;
      const uint16_t* source = weights + static_cast<int64_t>(valid ? row0 + r : 0) * padded + step * kTileK + chunk * 8;
      cp_async_16(a + swizzle<64>(r, chunk), source, valid);
    }
#pragma unroll
    for (int i = 0; i < kBytesB / 16 / kThreads; ++i) {
      const int item = i * kThreads + threadIdx.x, r = item / kChunksB, chunk = item % kChunksB;
      const bool valid = step * kTileK + r < p.shape.num_k_blocks && column0 + chunk * 8 < kColumns;
      const uint16_t* source = state + (valid ? static_cast<int64_t>(step * kTileK + r) * kColumns + chunk * 8 : 0);
      cp_async_16(b + swizzle<kTileN * 2>(r, chunk), source, valid);
    }
  };

  const int steps = padded / kTileK;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(s);
    cp_async_commit();
  }

  const int warp_row = warp % (kTileM / 64) * 64, warp_column = warp / (kTileM / 64) * kWarpN;
  float acc[4][kWarpN / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    const uint32_t a_tile = ring + step % kStages * (kBytesA + kBytesB), b_tile = a_tile + kBytesA;
#pragma unroll
    for (int k = 0; k < kTileK; k += 16) {
      uint32_t a[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        ldmatrix_x4(a[m], a_tile + swizzle<64>(warp_row + 16 * m + lane % 16, k / 8 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kWarpN / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, b_tile + swizzle<kTileN * 2>(k + lane % 16, (warp_column + 8 * n) / 8 + lane / 16));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma<__nv_bfloat16>(acc[m][n], a[m], b[0], b[1]);
          mma<__nv_bfloat16>(acc[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();

  // Store: bf16 H, float Z. Lanes of a quad write 16 (32) consecutive bytes.
  const int64_t first = static_cast<int64_t>(p.bh_begin + local_bh) * p.shape.num_q_blocks;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * half;
      if (row >= p.shape.num_q_blocks) continue;
#pragma unroll
      for (int n = 0; n < kWarpN / 8; ++n) {
        const int column = column0 + warp_column + 8 * n + lane % 4 * 2;
        const float x0 = acc[m][n][2 * half], x1 = acc[m][n][2 * half + 1];
        if (column0 < kColumnsH) {
          *reinterpret_cast<uint32_t*>(p.h + (first + row) * kColumnsH + column) =
              Pair<__nv_bfloat16>::from_floats(x0, x1);
        } else if (column < kColumns) {
          *reinterpret_cast<float2*>(p.z + (first + row) * 2 * kHeadDim + column - kColumnsH) = make_float2(x0, x1);
        }
      }
    }
  }
}

template <int kHeadDim>
cudaError_t launch(const ComplementParams& p) {
  constexpr int kBytes = kStages * (kBytesA + kBytesB);
  const cudaError_t status =
      cudaFuncSetAttribute(complement_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const int row_tiles = (p.shape.num_q_blocks + kTileM - 1) / kTileM;
  const dim3 grid(p.bh_count * row_tiles * ((state_elements(kHeadDim) + kTileN - 1) / kTileN));
  complement_kernel<kHeadDim><<<grid, kThreads, kBytes, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_complement_weights(const ComplementParams& p) {
  const dim3 grid(p.bh_count * p.shape.num_q_blocks);
  const int bytes = padded_blocks(p.shape.num_k_blocks) / 8;
  weights_kernel<<<grid, kWeightThreads, bytes, p.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_complement(const ComplementParams& p, int head_dim) {
  return head_dim == 128 ? launch<128>(p) : launch<64>(p);
}

}  // namespace sla2
