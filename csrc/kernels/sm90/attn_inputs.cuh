// What the attention kernel of int8_fp8 reads: its query block, the list of key blocks, and the
// copies of records and H into the ring.
#pragma once

#include "../common/attn_output.cuh"
#include "../common/quantize.cuh"
#include "async.cuh"
#include "attn_config.cuh"

namespace sla2 {

struct AttnMaps {
  CUtensorMap q, h, out, out_sparse;
};

// x in a register that the compiler does not connect with x.
__device__ __forceinline__ int detached(int x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

// Key block of an entry of the CTA's list.
template <class C>
__device__ __forceinline__ int listed_block(const char* smem, int entry) {
  return reinterpret_cast<const uint16_t*>(smem + C::kList)[entry];
}

// Z of the query block, the sum of its parts, to shared memory as two rows of bf16, high and low;
// item: which four of its D values.
template <class C>
__device__ __forceinline__ void load_z(const AttnParams& p, char* smem, int item) {
  constexpr int kParts = z_parts(SLA2_QUANT_INT8_FP8);
  constexpr int kReads = C::kHeadDim / 4;
  if (item >= kReads) return;
  const float4* parts = reinterpret_cast<const float4*>(p.z + static_cast<int64_t>(blockIdx.x) *
                                                                  kParts * C::kHeadDim);
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const float4 part = parts[i * kReads + item];
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  }
  using P = Pair<__nv_bfloat16>;
  const uint2 high = make_uint2(P::from_floats(sum.x, sum.y), P::from_floats(sum.z, sum.w));
  const float2 first = P::to_float2(high.x), second = P::to_float2(high.y);
  uint2* rows = reinterpret_cast<uint2*>(smem + C::kZ);
  rows[item] = high;
  rows[kReads + item] = make_uint2(P::from_floats(sum.x - first.x, sum.y - first.y),
                                   P::from_floats(sum.z - second.x, sum.w - second.y));
}

// The CTA's query block, and the copies of its listed blocks, then of H, into the ring. Entry e
// goes to slot e modulo the ring's length once every warp has released entry e - length. Lives in
// shared memory, where it costs no registers but those of the thread at work.
template <class C>
struct Producer {
  const char* records;   // of the CTA's head
  const float* k_scale;  // [T_n], likewise
  int bh, head, batch, block;
  int count;    // listed blocks
  int entries;  // and parts of H

  __device__ __forceinline__ void init(const AttnParams& p) {
    bh = blockIdx.x / p.shape.num_q_blocks;
    block = blockIdx.x % p.shape.num_q_blocks;
    head = bh % p.shape.num_heads;
    batch = bh / p.shape.num_heads;
    const int64_t record = static_cast<int64_t>(bh) * p.shape.num_k_blocks;
    records = static_cast<const char*>(p.records) + record * C::kStageBytes;
    k_scale = p.k_scale + record;
  }
  __device__ __forceinline__ void set_entries(int listed, bool linear) {
    count = listed;
    entries = listed + (linear ? C::kPartsH : 0);
  }

  __device__ __forceinline__ void load_query(const AttnMaps& maps, char* smem) const {
    const uint32_t base = smem_address(smem), full = base + C::kFullQ;
    mbarrier_expect(full, kBlockQ * C::kWideRowBytes);
#pragma unroll
    for (int panel = 0; panel < C::kHeadDim / 64; ++panel) {
      tensor_load(base + panel * C::kPanelBytes, &maps.q, panel * 64, block * kBlockQ, head, batch,
                  full, evict_first());
    }
  }

  __device__ __forceinline__ bool linear() const { return entries > count; }

  // entry = kStages * round + slot. What all warps know of it, the caller has in uniform registers,
  // the slot as a constant.
  __device__ __forceinline__ void load(const AttnMaps& maps, char* smem, int entry, int slot,
                                       int round) const {
    if (entry >= entries) return;
    const uint32_t base = smem_address(smem), full = base + C::kFull + slot * 8;
    const uint32_t tile = base + C::kKeys + slot * C::kStageBytes;
    if (round > 0) mbarrier_wait(base + C::kEmpty + slot * 8, round + 1 & 1);
    mbarrier_expect(full, C::kStageBytes);
    if (entry >= count) {
#pragma unroll
      for (int column = 0; column < C::kHeadDim / 64; ++column) {
        tensor_load(tile + column * C::kRowsH * 128, &maps.h, 0,
                    column * C::kHeadDim + (entry - count) * C::kRowsH, blockIdx.x, full,
                    evict_first());
      }
      mbarrier_arrive(full);
      return;
    }
    const int j = listed_block<C>(smem, entry);
    bulk_load(tile, records + static_cast<int64_t>(j) * C::kStageBytes, C::kStageBytes, full);
    cp_async_4(base + C::kScales + slot * 4, k_scale + j);
    cp_async_arrive(full);
  }
};

// The query block in shared memory to int8 with one scale; returns the scale. Tokens past the end
// have come as zeros.
template <class C>
__device__ __forceinline__ float quantize_query(char* smem) {
  using Element = typename C::Element;
  constexpr int kLanesPerRow = C::kHeadDim / 8;
  constexpr int kRowsPerPass = C::kThreads / kLanesPerRow;  // a multiple of 8: one swizzle for all
  constexpr int kPasses = kBlockQ / kRowsPerPass;
  const int row = threadIdx.x / kLanesPerRow, chunk = threadIdx.x % kLanesPerRow;
  const char* source = smem + chunk / 8 * C::kPanelBytes + swizzle<128>(row, chunk % 8);
  uint4 packed[kPasses];
  // Magnitudes of both formats are ordered like integers, NaN above all.
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    packed[i] = *reinterpret_cast<const uint4*>(source + i * kRowsPerPass * 128);
    constexpr uint32_t kNoSigns = 0x7fff7fffu;
    amax = __vimax3_u16x2(amax, packed[i].x & kNoSigns, packed[i].y & kNoSigns);
    amax = __vimax3_u16x2(amax, packed[i].z & kNoSigns, packed[i].w & kNoSigns);
  }
  amax = __reduce_max_sync(0xffffffffu, max(amax & 0xffffu, amax >> 16));
  uint32_t* scratch = reinterpret_cast<uint32_t*>(smem + C::kScratch);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < C::kWarps; ++warp) amax = max(amax, scratch[warp]);
  const float largest = max_nan(Pair<Element>::to_float2(amax).x, kQuantEps);
  const float factor = __fdiv_rn(kInt8Max, largest);
  char* target = smem + C::kQuery8 + swizzle<C::kQueryRowBytes>(row, chunk / 2) + chunk % 2 * 8;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float x[8];
    unpack8<Element>(packed[i], x);
    *reinterpret_cast<uint2*>(target + i * kRowsPerPass * C::kQueryRowBytes) =
        pack_int8x8(x, factor);
  }
  return largest / kInt8Max;
}

}  // namespace sla2
