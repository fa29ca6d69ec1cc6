// Block sizes, the images of quantised key/value blocks in device memory, and shared-memory
// swizzles.
#pragma once

#include <stdint.h>

#include "sla2/sla2.h"

namespace sla2 {

constexpr int kBlockQ = 128;
constexpr int kBlockK = 64;
// Keeps 127 / amax and 448 / amax finite for all-zero blocks and channels.
constexpr float kQuantEps = 1e-30f;
// Of phi(Q) Z: gradients hold its inverse, which float32 must be able to sum.
constexpr float kMinDenominator = 1e-30f;
constexpr float kInt8Max = 127.f;
constexpr float kE4m3Max = 448.f;
// NaN is listed too, so that it shows in every result.
__device__ __forceinline__ bool is_listed(float m) { return !(m < SLA2_SOFT_MAP_MIN); }

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile with kRowBytes per row. The XOR
// spreads the eight rows that one ldmatrix reads over all 32 banks. It is the hardware's 128-byte
// (64-byte) swizzle for rows of 128 (64) bytes, so the same image serves wgmma descriptors.
template <int kRowBytes>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "rows of 64 bytes or a multiple of 128");
  if constexpr (kRowBytes == 64) {
    return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
  } else {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
}

// One record per (head, key block), written once by the quantiser, loaded by contiguous copies: a K
// image, int8 [64 tokens][D], then a V image, all rows swizzled, tokens past the end zero. V is
//   int8_fp8:  e4m3 [D][64 tokens], tokens permuted within each 16 (bytes 4t..4t+3 hold tokens 2t,
//              2t+1, 8+2t, 8+2t+1): the accumulators of Q K^T are then the A operand of P V
//   int8_fp16: fp16 [64 tokens][D]
template <int kHeadDim, int kValueBytes>
struct KvRecord {
  static constexpr int kKeyBytes = kBlockK * kHeadDim;
  static constexpr int kValueImageBytes = kBlockK * kHeadDim * kValueBytes;
  static constexpr int kBytes = kKeyBytes + kValueImageBytes;
};

// Row of a D x D matrix H at which feature f is kept for the Hopper attention kernel of int8_fp8.
// Its lane t of a quad reads eight neighbouring features of Q, 8 t .. 8 t + 7 of each 32, and they
// must be what the A operand of two k16 products wants of that lane: 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t
// of each 16. f = 32 group + 8 t + 4 half + 2 upper + e is row 32 group + 16 half + 8 upper + 2 t +
// e.
__host__ __device__ constexpr int h_row(int f) {
  return f / 32 * 32 + f / 4 % 2 * 16 + f / 2 % 2 * 8 + f / 8 % 4 * 2 + f % 2;
}

// Bit of key block j in its 32-block word of the complement: even blocks in the low half, odd ones
// in the high half, so that one shift and one AND make a bf16 pair of the two blocks that share an
// A register.
__device__ __forceinline__ int mask_bit(int j) { return j % 32 / 2 + j % 2 * 16; }
// Word `word` of the complement of an empty list: all key blocks, bits past T_n zero.
__device__ __forceinline__ uint32_t mask_all(int word, int num_k_blocks) {
  const int valid = max(0, min(32, num_k_blocks - 32 * word));
  return ((1u << (valid + 1) / 2) - 1u) | ((1u << valid / 2) - 1u) << 16;
}

// Linear-branch state of one key block, bf16: h = phi(K_j)^T V_j row-major [D][D], then z = column
// sums of phi(K_j) as a bf16 pair (high part [D], low part [D]) so that one product gives H and Z
// to about 16 bits.
__host__ __device__ constexpr int state_elements(int head_dim) {
  return head_dim * head_dim + 2 * head_dim;
}

}  // namespace sla2
