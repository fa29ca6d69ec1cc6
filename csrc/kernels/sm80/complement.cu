// The linear branch's complement as one matrix product per head: H = (1 - M) h, Z = (1 - M) z
// (method step 6). 2 T_m T_n (D^2 + 2D) operations whatever the sparsity, exact, no cancellation.
// Heads go through in groups, so that the states need not exist for all of them.
#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/params.h"
#include "../common/ptx.cuh"
#include "complement_store.cuh"

namespace sla2 {
namespace {

constexpr int kMaskThreads = 128;

// One CTA: one row of the complement 1 - M as bits, 1 outside the list; bits past T_n are zero.
__global__ void __launch_bounds__(kMaskThreads)
    complement_mask_kernel(const __grid_constant__ ComplementParams p) {
  extern __shared__ uint32_t words[];
  const int num_words = mask_words(p.shape.num_k_blocks), pitch = mask_pitch(p.shape.num_q_blocks);
  const int64_t local_row = blockIdx.x;
  uint32_t* mask = p.mask + local_row / p.shape.num_q_blocks * num_words * pitch +
                   local_row % p.shape.num_q_blocks;
  const int64_t list = static_cast<int64_t>(p.bh_begin) * p.shape.num_q_blocks + local_row;
  for (int i = threadIdx.x; i < num_words; i += kMaskThreads)
    words[i] = mask_all(i, p.shape.num_k_blocks);
  __syncthreads();
  const int count = p.counts[list];
  for (int i = threadIdx.x; i < count; i += kMaskThreads) {
    const int j = p.lut[list * p.max_kv_blocks + i];
    atomicAnd(&words[j / 32], ~(1u << mask_bit(j)));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_words; i += kMaskThreads)
    mask[static_cast<int64_t>(i) * pitch] = words[i];
}

// One CTA: a 128 x 128 tile of [H | Z]; 4 warps of 64 x 64; key blocks in steps of 64 through a
// cp.async ring. The A operand is made in registers from the bit mask: as bf16 it would be half of
// what the product reads (5.9 instead of 4.0 TB/s of L2 traffic on an H200, at the same time).
// 128 x 256 tiles, one CTA an SM, were slower (3.47 against 2.88 ms, 40 heads of 75600 tokens).
constexpr int kThreads = kSumThreads;
constexpr int kTileM = kSumTile, kTileN = kSumTile, kTileK = 64;
constexpr int kStages = 3;
constexpr int kWordsK = kTileK / 32;
constexpr int kBytesA = kTileM * kWordsK * 4,
              kBytesB = kTileK * kTileN * 2;  // two words a row; 16 KiB
constexpr int kStageBytes = kBytesA + kBytesB;
static_assert(kSumTileBytes <= kStages * kStageBytes, "the ring stages the output");

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2)
    complement_kernel(const __grid_constant__ ComplementParams p) {
  extern __shared__ __align__(128) char smem[];
  constexpr int kColumns = state_elements(kHeadDim), kColumnsH = kHeadDim * kHeadDim;
  static_assert(kColumns % kTileN == 0 && kColumnsH % kTileN == 0, "tiles do not straddle H and Z");
  const int row_tiles = (p.shape.num_q_blocks + kTileM - 1) / kTileM;
  constexpr int kColumnTiles = kColumns / kTileN;
  // Row tiles vary fastest: the CTAs that share a column tile of h run together.
  const int row0 = blockIdx.x % row_tiles * kTileM;
  const int column0 = blockIdx.x / row_tiles % kColumnTiles * kTileN;
  const int local_bh = blockIdx.x / (row_tiles * kColumnTiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int words_k = mask_words(p.shape.num_k_blocks), steps = words_k / kWordsK;
  const int pitch = mask_pitch(p.shape.num_q_blocks);
  const uint32_t* mask = p.mask + static_cast<int64_t>(local_bh) * words_k * pitch + row0;
  const uint16_t* state =
      p.state + static_cast<int64_t>(local_bh) * p.shape.num_k_blocks * kColumns + column0;
  const uint32_t ring = smem_address(smem);

  auto load = [&](int step) {
    const uint32_t a = ring + step % kStages * kStageBytes, b = a + kBytesA;
    if (threadIdx.x < kBytesA / 16) {  // rows past T_m hold anything: their results are not stored
      const int word = threadIdx.x / (kTileM / 4), row = threadIdx.x % (kTileM / 4) * 4;
      cp_async_16(a + threadIdx.x * 16,
                  mask + static_cast<int64_t>(step * kWordsK + word) * pitch + row);
    }
#pragma unroll
    for (int i = 0; i < kBytesB / 16 / kThreads; ++i) {
      const int item = i * kThreads + threadIdx.x, r = item / 16, chunk = item % 16;
      const bool valid = step * kTileK + r < p.shape.num_k_blocks;
      const uint16_t* source =
          state + (valid ? static_cast<int64_t>(step * kTileK + r) * kColumns + chunk * 8 : 0);
      cp_async_16(b + swizzle<kTileN * 2>(r, chunk), source, valid);
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(s);
    cp_async_commit();
  }

  const int warp_row = warp % 2 * 64, warp_column = warp / 2 * 64;
  float acc[4][8][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    const char* stage = smem + step % kStages * kStageBytes;
    const uint32_t b_tile = smem_address(stage) + kBytesA;
#pragma unroll
    for (int word = 0; word < kWordsK; ++word) {
      uint32_t words[4][2];  // this lane's rows, shifted to its first pair of columns
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + 16 * m + 8 * half + lane / 4;
          words[m][half] =
              reinterpret_cast<const uint32_t*>(stage)[word * kTileM + row] >> (lane % 4);
        }
      }
#pragma unroll
      for (int k = 0; k < 32; k += 16) {
        uint32_t a[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Columns k + 8 (i / 2) + 2 (lane % 4) + {0, 1}. A set bit becomes 2.0, whose bf16 has
            // a single bit; the store halves.
            const int pair = (k + i / 2 * 8) / 2;
            a[m][i] = (words[m][i % 2] << (14 - pair)) & 0x40004000u;
          }
        }
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          uint32_t b[4];
          const int row = 32 * word + k + lane % 16;
          ldmatrix_x4_trans(
              b, b_tile + swizzle<kTileN * 2>(row, (warp_column + 8 * n) / 8 + lane / 16));
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            mma<__nv_bfloat16>(acc[m][n], a[m], b[0], b[1]);
            mma<__nv_bfloat16>(acc[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  const int64_t first = static_cast<int64_t>(p.bh_begin + local_bh) * p.shape.num_q_blocks;
  store_sums<kHeadDim>(acc, 0.5f, smem, p.h + first * kColumnsH, p.z + first * 2 * kHeadDim, row0,
                       column0, p.shape.num_q_blocks);
}

template <int kHeadDim>
cudaError_t launch(const ComplementParams& p) {
  constexpr int kBytes = kStages * kStageBytes;
  const cudaError_t status = cudaFuncSetAttribute(
      complement_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const int row_tiles = (p.shape.num_q_blocks + kTileM - 1) / kTileM;
  const dim3 grid(p.bh_count * row_tiles * (state_elements(kHeadDim) / kTileN));
  complement_kernel<kHeadDim><<<grid, kThreads, kBytes, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_complement_mask(const ComplementParams& p) {
  const dim3 grid(p.bh_count * p.shape.num_q_blocks);
  const int bytes = mask_words(p.shape.num_k_blocks) * static_cast<int>(sizeof(uint32_t));
  complement_mask_kernel<<<grid, kMaskThreads, bytes, p.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_complement(const ComplementParams& p, int head_dim) {
  return head_dim == 128 ? launch<128>(p) : launch<64>(p);
}

}  // namespace sla2
