// First half of the Hopper router: pooled rows times W_q or W_k, the result split for route_kernel.
#include "../common/layout.cuh"
#include "../common/params.h"
#include "async.cuh"
#include "launch.h"
#include "router_split.cuh"
#include "wgmma.cuh"

namespace sla2 {
namespace {

constexpr int kThreads = 128;

// The weight [D][D] as the B operand: per part, tiles of 64 columns, rows of 128 bytes, swizzled.
template <int kHeadDim>
struct ProjectSmem {
  static constexpr int kColumnTile = kHeadDim * 128;
  static constexpr int kPart = kHeadDim / 64 * kColumnTile;
  static constexpr int kLargest = kParts * kPart;  // uint32 [D], largest magnitude of each column
  static constexpr int kBytes = kLargest + kHeadDim * 4;
};

// Splits the weight into shared memory. A thread holds eight columns of every kRowsPerPass-th row.
template <int kHeadDim>
__device__ __forceinline__ void split_weight(const float* weight, char* smem) {
  using S = ProjectSmem<kHeadDim>;
  constexpr int kGroups = kHeadDim / 8, kRowsPerPass = kThreads / kGroups,
                kPasses = kHeadDim / kRowsPerPass;
  const int group = threadIdx.x % kGroups, row0 = threadIdx.x / kGroups;
  uint32_t* largest = reinterpret_cast<uint32_t*>(smem + S::kLargest);
  const float* source = weight + row0 * kHeadDim + group * 8;
  float w[kPasses][8];
  if (reinterpret_cast<uintptr_t>(weight) % 16 == 0) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(&w[pass][i]) =
            *reinterpret_cast<const float4*>(source + pass * kRowsPerPass * kHeadDim + i);
      }
    }
  } else {  // a view into a larger tensor: slow, but the interface asks for no alignment
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int i = 0; i < 8; ++i) w[pass][i] = source[pass * kRowsPerPass * kHeadDim + i];
    }
  }
  if (threadIdx.x < kHeadDim) largest[threadIdx.x] = 0u;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t bits = 0u;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) bits = max(bits, magnitude_bits(w[pass][i]));
    atomicMax(&largest[group * 8 + i], bits);
  }
  __syncthreads();
  float factor[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) factor[i] = split_factor(largest[group * 8 + i]);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t parts[4][kParts];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      split_pair(w[pass][2 * i] * factor[2 * i], w[pass][2 * i + 1] * factor[2 * i + 1], parts[i]);
    }
    char* tile =
        smem + group / 8 * S::kColumnTile + swizzle<128>(row0 + pass * kRowsPerPass, group % 8);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      *reinterpret_cast<uint4*>(tile + part * S::kPart) =
          make_uint4(parts[0][part], parts[1][part], parts[2][part], parts[3][part]);
    }
  }
}

// The A operand, a thread's part of 64 pooled rows: columns 16 s + 8 i + 2 (lane % 4) + {0, 1} of
// its row + 8 half are parts[..][s][2 i + half].
template <int kHeadDim>
struct PooledRows {
  static constexpr int kSteps = kHeadDim / 16;
  uint32_t parts[kParts][kSteps][4];
  float scale[2];

  // `source` points to this thread's first column of row `row`, `mean` to that of the mean over
  // all tokens, null for queries.
  __device__ __forceinline__ void load(const float* source, const float* mean, int row,
                                       int num_rows, int seqlen) {
    float2 x[kSteps][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = row + 8 * half < num_rows;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        x[i / 2][i % 2 * 2 + half] =
            valid ? *reinterpret_cast<const float2*>(source + 8 * half * kHeadDim + 8 * i)
                  : make_float2(0.f, 0.f);
      }
    }
    if (mean != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int length = max(1, min(kBlockK, seqlen - (row + 8 * half) * kBlockK));
        if (length == kBlockK) {
#pragma unroll
          for (int i = 0; i < kHeadDim / 8; ++i) {
            float2& value = x[i / 2][i % 2 * 2 + half];
            value = make_float2(value.x * (1.f / kBlockK), value.y * (1.f / kBlockK));
          }
        } else {  // quotients, not products with 1 / length: equal means must come out equal
#pragma unroll
          for (int i = 0; i < kHeadDim / 8; ++i) {
            float2& value = x[i / 2][i % 2 * 2 + half];
            value = make_float2(value.x / length, value.y / length);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const float2 m = *reinterpret_cast<const float2*>(mean + 8 * i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2& value = x[i / 2][i % 2 * 2 + half];
          value = make_float2(value.x - m.x, value.y - m.y);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t bits = 0u;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const float2 value = x[i / 2][i % 2 * 2 + half];
        bits = max(bits, max(magnitude_bits(value.x), magnitude_bits(value.y)));
      }
      bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, 1));
      bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, 2));
      const float factor = split_factor(bits);
      scale[half] = split_scale(bits);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const float2 value = x[i / 2][i % 2 * 2 + half];
        uint32_t pair[kParts];
        split_pair(value.x * factor, value.y * factor, pair);
        parts[kHigh][i / 2][i % 2 * 2 + half] = pair[kHigh];
        parts[kLow][i / 2][i % 2 * 2 + half] = pair[kLow];
      }
    }
  }
};

// One CTA, one warpgroup: 64 pooled rows of a head times W_q or W_k. A head's query rows come
// first.
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 3)
    project_kernel(const __grid_constant__ SplitProjectParams p) {
  using S = ProjectSmem<kHeadDim>;
  using L = SplitLayout<kHeadDim>;
  extern __shared__ __align__(1024) char smem[];
  const int q_tiles = split_rows(p.shape.num_q_blocks) / 64;
  const int k_tiles = split_rows(p.shape.num_k_blocks) / 64;
  const int bh = blockIdx.x / (q_tiles + k_tiles), item = blockIdx.x % (q_tiles + k_tiles);
  const bool is_query = item < q_tiles;
  const int tile = is_query ? item : item - q_tiles, tiles = is_query ? q_tiles : k_tiles;
  const int num_rows = is_query ? p.shape.num_q_blocks : p.shape.num_k_blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = tile * 64 + warp * 16 + lane / 4;

  split_weight<kHeadDim>(
      (is_query ? p.proj_q : p.proj_k) + bh % p.shape.num_heads * p.proj_stride_head, smem);
  wait_predecessor();  // the weights are the caller's, all else is of kernels of the same call
  trigger_dependents();
  PooledRows<kHeadDim> a;
  a.load((is_query ? p.q_mean : p.k_sum) + (static_cast<int64_t>(bh) * num_rows + row) * kHeadDim +
             lane % 4 * 2,
         is_query ? nullptr : p.k_mean + static_cast<int64_t>(bh) * kHeadDim + lane % 4 * 2, row,
         num_rows, p.shape.seqlen);
  fence_async_shared();
  __syncthreads();

  // Small terms first: the sum is rounded toward zero at every step, and these steps are free.
  const uint64_t weight = wgmma_descriptor(smem_address(smem), S::kColumnTile, 1024, Swizzle::k128);
  float acc[kHeadDim / 2];
  wgmma_fence();
#pragma unroll
  for (int term = 0; term < 3; ++term) {
#pragma unroll
    for (int s = 0; s < a.kSteps; ++s) {
      Wgmma16<__half, false, true>::mma(
          acc, a.parts[term == 0 ? kLow : kHigh][s],
          advance(weight, (term == 1 ? kLow : kHigh) * S::kPart + s * 2048), term + s > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(acc);

  const uint32_t* largest = reinterpret_cast<const uint32_t*>(smem + S::kLargest);
  uint32_t bits[2] = {};
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2, half = i / 2 % 2;
    acc[i] *= a.scale[half] * split_scale(largest[column]);
    bits[half] = max(bits[half], magnitude_bits(acc[i]));
  }
  const SplitRows& out = is_query ? p.q : p.k;
  const int64_t first_tile = static_cast<int64_t>(bh) * tiles + tile;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    bits[half] = max(bits[half], __shfl_xor_sync(0xffffffffu, bits[half], 1));
    bits[half] = max(bits[half], __shfl_xor_sync(0xffffffffu, bits[half], 2));
    factor[half] = split_factor(bits[half]);
    if (lane % 4 == 0) {
      out.scale[first_tile * 64 + warp * 16 + lane / 4 + 8 * half] = split_scale(bits[half]);
    }
  }

  char* parts = reinterpret_cast<char*>(out.parts) + first_tile * kParts * L::kQueryPart;
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    uint32_t pair[4][kParts];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      split_pair(acc[8 * s + 2 * i] * factor[i % 2], acc[8 * s + 2 * i + 1] * factor[i % 2],
                 pair[i]);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (is_query) {
        *reinterpret_cast<uint4*>(parts + part * L::kQueryPart +
                                  (s * kThreads + threadIdx.x) * 16) =
            make_uint4(pair[0][part], pair[1][part], pair[2][part], pair[3][part]);
      } else {
        // A warp's 16 rows are two neighbouring groups of eight of the key tile warp / 2.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column_group = 2 * s + i / 2, row_group = warp % 2 * 2 + i % 2;
          *reinterpret_cast<uint32_t*>(parts + warp / 2 * L::kKeyBytes + part * L::kKeyPart +
                                       column_group * L::kColumnStep + row_group * L::kCoreMatrix +
                                       lane * 4) = pair[i][part];
        }
      }
    }
  }
}

template <int kHeadDim>
cudaError_t launch(const SplitProjectParams& p) {
  constexpr int kBytes = ProjectSmem<kHeadDim>::kBytes;
  const cudaError_t status = cudaFuncSetAttribute(
      project_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const int tiles = (split_rows(p.shape.num_q_blocks) + split_rows(p.shape.num_k_blocks)) / 64;
  const int grid = p.shape.num_bh * tiles;
  return launch_overlapped(project_kernel<kHeadDim>, grid, kThreads, kBytes, p.stream, p);
}

}  // namespace

cudaError_t launch_project_sm90(const SplitProjectParams& p, int head_dim) {
  return head_dim == 128 ? launch<128>(p) : launch<64>(p);
}

}  // namespace sla2
