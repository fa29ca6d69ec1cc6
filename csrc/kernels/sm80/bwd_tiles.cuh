// Copies into swizzled 16-bit tiles in shared memory, and products of them on float32 accumulators,
// for the backward kernels. A warp's accumulators are m16n8 tiles: a lane holds rows lane / 4 + {0,
// 8} and columns 2 (lane % 4) + {0, 1} of each.
//
// The sparse branch multiplies in the inputs' type. The linear branch's states are bfloat16
// whatever that is, and so are its products: fp16 operands are rounded on their way.
#pragma once

#include <type_traits>

#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/params.h"
#include "../common/ptx.cuh"

namespace sla2 {

// A thread's share of kRows tokens of one head: eight channels of every kRowsPerPass-th row. One
// address and its increments, as the accumulators leave few registers.
template <class C, int kRows>
class TileLoader {
 public:
  using Element = typename C::Element;

  __device__ __forceinline__ TileLoader(const TensorView& view, int bh, int num_heads)
      : base_(head_base<Element>(view, bh, num_heads) + chunk() * 8) {}

  // Tokens `token` .. into a tile, zeros from `seqlen` on, where nothing is read.
  __device__ __forceinline__ void load(uint32_t tile, int token, int64_t stride_token,
                                       int seqlen) const {
    const uint32_t target = tile + swizzle<C::kWideRowBytes>(row(), chunk());
    token += row();
    const Element* source = base_ + token * stride_token;
#pragma unroll
    for (int i = 0; i < kRows / kRowsPerPass; ++i) {
      cp_async_16(target + i * kRowsPerPass * C::kWideRowBytes, source,
                  token + i * kRowsPerPass < seqlen);
      source += kRowsPerPass * stride_token;
    }
  }

 private:
  static constexpr int kChunks = C::kWideRowBytes / 16;
  static constexpr int kRowsPerPass = C::kThreads / kChunks;
  static_assert(kRowsPerPass % 8 == 0, "the swizzle repeats every eight rows");
  static __device__ __forceinline__ int row() { return threadIdx.x / kChunks; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kChunks; }

  const Element* base_;
};

template <typename From, typename To>
__device__ __forceinline__ void to_operand(uint32_t (&x)[4]) {
  if constexpr (!std::is_same_v<From, To>) {
#pragma unroll
    for (uint32_t& pair : x) {
      const float2 values = Pair<From>::to_float2(pair);
      pair = Pair<To>::from_floats(values.x, values.y);
    }
  }
}

// acc += A B^T over a whole row of kRowBytes: A has the kTilesM * 16 rows from a_row on, B the
// kTilesN * 8 from b_row on.
template <typename Operand, typename ElementA, int kRowBytes, int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_nt(float (&acc)[kTilesM][kTilesN][4], uint32_t a_tile,
                                            int a_row, uint32_t b_tile, int b_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int chunk = 0; chunk < kRowBytes / 16; chunk += 2) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      ldmatrix_x4(a[m], a_tile + swizzle<kRowBytes>(a_row + 16 * m + lane % 16, chunk + lane / 16));
      to_operand<ElementA, Operand>(a[m]);
    }
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, b_tile + swizzle<kRowBytes>(b_row + 8 * n + lane % 8 + lane / 16 * 8,
                                                 chunk + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        mma<Operand>(acc[m][n], a[m], b[0], b[1]);
        mma<Operand>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += A B for one k16 step with A in registers: rows k .. k + 15 of B, columns from b_column on.
template <typename Operand, typename ElementB, int kRowBytesB, int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_step(float (&acc)[kTilesM][kTilesN][4],
                                              const uint32_t (&a)[kTilesM][4], uint32_t b_tile,
                                              int k, int b_column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTilesN; n += 2) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, b_tile + swizzle<kRowBytesB>(k + lane % 16, b_column / 8 + n + lane / 16));
    to_operand<ElementB, Operand>(b);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      mma<Operand>(acc[m][n], a[m], b[0], b[1]);
      mma<Operand>(acc[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

// acc += A B: rows of A from a_row on, whole rows of kRowBytesA; columns of B from b_column on.
template <typename Operand, int kRowBytesA, int kRowBytesB, int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_nn(float (&acc)[kTilesM][kTilesN][4], uint32_t a_tile,
                                            int a_row, uint32_t b_tile, int b_column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int chunk = 0; chunk < kRowBytesA / 16; chunk += 2) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      ldmatrix_x4(a[m],
                  a_tile + swizzle<kRowBytesA>(a_row + 16 * m + lane % 16, chunk + lane / 16));
    }
    multiply_step<Operand, Operand, kRowBytesB>(acc, a, b_tile, 8 * chunk, b_column);
  }
}

// The A operand of one k16 step of A^T: columns a_column .. of rows k .. k + 15 of the tile.
template <int kRowBytes, int kTilesM>
__device__ __forceinline__ void load_transposed(uint32_t (&a)[kTilesM][4], uint32_t a_tile, int k,
                                                int a_column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
    ldmatrix_x4_trans(a[m], a_tile + swizzle<kRowBytes>(k + lane % 8 + lane / 16 * 8,
                                                        a_column / 8 + 2 * m + lane / 8 % 2));
  }
}

// Byte offset of the pair of columns 8 tile + 2 (lane % 4) + {0, 1} in a row of a tile: where a
// lane's accumulators of an n8 tile are as 16-bit values. The lanes of a warp hit 32 banks.
template <int kRowBytes>
__device__ __forceinline__ int pair_offset(int row, int tile) {
  return swizzle<kRowBytes>(row, tile) + threadIdx.x % 4 * 4;
}

}  // namespace sla2
