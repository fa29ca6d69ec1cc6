// Backward pre-pass: the block lists by key block. Three small launches: how many query blocks list
// each key block; where its list goes and in which order the columns are worked on; the lists. No
// atomics: the bits of the complement come in tiles of 32 x 32, and transposing a tile puts a
// column's query blocks into one word in ascending order.
#include <algorithm>

#include "../common/layout.cuh"
#include "../common/params.h"

namespace sla2 {
namespace {

constexpr int kWarps = 4;

// One warp: the 32 key blocks of one mask word. In a tile, lane l has query block row0 + l as it
// reads, and bit position l, key block column(), as it returns.
struct ColumnWarp {
  const ColumnListParams& p;
  const int lane, bh, word;
  const uint32_t* source;

  __device__ __forceinline__ explicit ColumnWarp(const ColumnListParams& params)
      : p(params),
        lane(threadIdx.x % 32),
        bh(warp_index() / num_words()),
        word(warp_index() % num_words()) {
    const int pitch = mask_pitch(p.shape.num_q_blocks);
    source = p.mask + (static_cast<int64_t>(bh) * mask_words(p.shape.num_k_blocks) + word) * pitch;
  }
  __device__ __forceinline__ int num_words() const { return (p.shape.num_k_blocks + 31) / 32; }
  __device__ __forceinline__ int warp_index() const {
    return blockIdx.x * kWarps + threadIdx.x / 32;
  }
  // The inverse of mask_bit.
  __device__ __forceinline__ int column() const { return 32 * word + lane % 16 * 2 + lane / 16; }
  __device__ __forceinline__ bool has_column() const { return column() < p.shape.num_k_blocks; }

  // Bit r: query block row0 + r lists the lane's column.
  __device__ __forceinline__ uint32_t rows(int row0) const {
    const int row = row0 + lane;
    const uint32_t all = mask_all(word, p.shape.num_k_blocks);
    const uint32_t listed = row < p.shape.num_q_blocks ? all ^ source[row] : 0u;
    uint32_t result = 0u;
#pragma unroll
    for (int bit = 0; bit < 32; ++bit) {
      const uint32_t rows_of_bit = __ballot_sync(0xffffffffu, (listed >> bit & 1u) != 0u);
      if (lane == bit) result = rows_of_bit;
    }
    return result;
  }
};

__global__ void __launch_bounds__(kWarps * 32)
    column_count_kernel(const __grid_constant__ ColumnListParams p) {
  const ColumnWarp warp(p);
  if (warp.bh >= p.shape.num_bh) return;
  int count = 0;
  for (int row0 = 0; row0 < p.shape.num_q_blocks; row0 += 32) count += __popc(warp.rows(row0));
  if (warp.has_column()) {
    p.columns.counts[static_cast<int64_t>(warp.bh) * p.shape.num_k_blocks + warp.column()] = count;
  }
}

// Even bits to the low half, odd ones to the high half, as mask_bit wants them.
__device__ __forceinline__ uint32_t split_even_odd(uint32_t x) {
  const auto exchange = [&](int distance, uint32_t bits) {
    const uint32_t moved = (x ^ (x >> distance)) & bits;
    x ^= moved ^ (moved << distance);
  };
  exchange(1, 0x22222222u);
  exchange(2, 0x0c0c0c0cu);
  exchange(4, 0x00f000f0u);
  exchange(8, 0x0000ff00u);
  return x;
}

__global__ void __launch_bounds__(kWarps * 32)
    column_fill_kernel(const __grid_constant__ ColumnListParams p) {
  const ColumnWarp warp(p);
  if (warp.bh >= p.shape.num_bh) return;
  const int num_rows = p.shape.num_q_blocks, num_columns = p.shape.num_k_blocks;
  const int column = warp.column(), words = mask_words(num_rows), pitch = mask_pitch(num_columns);
  const bool has_column = warp.has_column();
  uint16_t* list = nullptr;
  if (has_column) {
    list = p.columns.rows + warp.bh * p.columns.rows_per_head +
           p.columns.offsets[static_cast<int64_t>(warp.bh) * num_columns + column];
  }
  uint32_t* complement = nullptr;
  if (p.mask_transposed != nullptr) {
    complement = p.mask_transposed + static_cast<int64_t>(warp.bh) * words * pitch + column;
  }
  for (int word = 0; word < words; ++word) {
    uint32_t rows = warp.rows(32 * word);
    if (!has_column) continue;
    if (complement != nullptr) {
      const int valid = max(0, min(32, num_rows - 32 * word));
      const uint32_t all = valid == 32 ? 0xffffffffu : (1u << valid) - 1u;
      complement[static_cast<int64_t>(word) * pitch] = split_even_odd(all ^ rows);
    }
    for (; rows != 0u; rows &= rows - 1u) {
      *list++ = static_cast<uint16_t>(32 * word + __ffs(rows) - 1);
    }
  }
}

constexpr int kPlanThreads = 1024;

// Sum of `value` over the CTA's lower threads, plus `base`, to which the CTA's sum is added.
__device__ __forceinline__ int exclusive_scan(int value, int& base) {
  __shared__ int warp_sums[kPlanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  __syncthreads();  // the previous scan has been read
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int total = 0, before = 0;
#pragma unroll
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w == warp) before = total;
    total += warp_sums[w];
  }
  const int result = base + before + inclusive - value;
  base += total;
  return result;
}

// One CTA: the columns of one head. Items are sorted by the bit length of their parts' lengths: an
// item that starts late then is at most twice as long as the shortest that is left.
__global__ void __launch_bounds__(kPlanThreads)
    column_plan_kernel(const __grid_constant__ ColumnListParams p) {
  const ColumnLists& columns = p.columns;
  const int num_columns = p.shape.num_k_blocks;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * num_columns;
  uint32_t* items = columns.items + static_cast<int64_t>(blockIdx.x) * columns.num_items;
  const auto parts_wanted = [&](int count) {
    return (count + columns.split_blocks - 1) / columns.split_blocks;
  };

  int offset = 0, slot = 0;
  for (int chunk = 0; chunk < num_columns; chunk += kPlanThreads) {
    const int column = chunk + threadIdx.x;
    const int count = column < num_columns ? columns.counts[first + column] : 0;
    const int column_offset = exclusive_scan(count, offset);
    const int parts = count > columns.split_blocks ? parts_wanted(count) : 0;
    const int column_slot = exclusive_scan(parts, slot);
    if (column < num_columns) {
      columns.offsets[first + column] = column_offset;
      const bool cut = parts > 0 && column_slot + parts <= columns.num_slots;
      columns.slots[first + column] = cut ? column_slot : -1;
      columns.arrived[first + column] = 0;
    }
  }

  int item = 0;
  for (int bits = 32 - __clz(p.shape.num_q_blocks); bits >= 0; --bits) {
    for (int chunk = 0; chunk < num_columns; chunk += kPlanThreads) {
      const int column = chunk + threadIdx.x;
      int parts = 0;
      if (column < num_columns) {
        const int count = columns.counts[first + column];
        const int wanted = columns.slots[first + column] < 0 ? 1 : parts_wanted(count);
        const int length = (count + wanted - 1) / wanted;
        if (32 - __clz(length) == bits) parts = wanted;
      }
      const int begin = exclusive_scan(parts, item);
      for (int part = 0; part < parts; ++part) {
        items[begin + part] = static_cast<uint32_t>(column) | static_cast<uint32_t>(part) << 16;
      }
    }
  }
  for (int i = item + threadIdx.x; i < columns.num_items; i += kPlanThreads) items[i] = kNoItem;
}

}  // namespace

cudaError_t launch_column_lists(const ColumnListParams& p) {
  const int64_t warps = static_cast<int64_t>(p.shape.num_bh) * ((p.shape.num_k_blocks + 31) / 32);
  const dim3 grid(static_cast<unsigned>((warps + kWarps - 1) / kWarps));
  column_count_kernel<<<grid, kWarps * 32, 0, p.stream>>>(p);
  column_plan_kernel<<<p.shape.num_bh, kPlanThreads, 0, p.stream>>>(p);
  column_fill_kernel<<<grid, kWarps * 32, 0, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
