// What the attention kernel reads: its query block, the list of key blocks, and thread 0's copies
// of K, V and H into the rings.
#pragma once

#include "../common/attn_output.cuh"
#include "../common/quantize.cuh"
#include "async.cuh"
#include "attn_config.cuh"

namespace sla2 {

// Maps of the 16-bit operands ("none") and of H.
struct AttnMaps {
  CUtensorMap q, k, v, h;
};

// The CTA's query block. Made again from the block index after the main loop, where its fields
// would only hold registers: the 128 of a thread are all spoken for.
struct QueryBlock {
  int block, bh, row0, rows;

  __device__ __forceinline__ explicit QueryBlock(const AttnParams& p) {
    int cta;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
    block = cta % p.shape.num_q_blocks;
    bh = cta / p.shape.num_q_blocks;
    row0 = block * kBlockQ;
    rows = min(kBlockQ, p.shape.seqlen - row0);
  }
  template <typename Element>
  __device__ __forceinline__ const Element* query(const AttnParams& p) const {
    return head_base<Element>(p.q, bh, p.shape.num_heads) + row0 * p.q.stride_token;
  }
};

// x in a register that the compiler does not connect with x.
__device__ __forceinline__ int detached(int x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

// Key block of an entry of the CTA's list.
template <class C>
__device__ __forceinline__ int listed_block(const AttnParams& p, const char* smem, int entry) {
  if (entry < C::kListed) return reinterpret_cast<const uint16_t*>(smem + C::kList)[entry];
  return p.lut[static_cast<int64_t>(blockIdx.x) * p.max_kv_blocks + entry];
}

// Z of the query block to its place in shared memory, its parts added up to two.
template <class C>
__device__ __forceinline__ void load_z(const AttnParams& p, char* smem) {
  constexpr int kParts = z_parts(C::kInt8 ? SLA2_QUANT_INT8_FP8 : SLA2_QUANT_NONE);
  constexpr int kReads = 2 * C::kHeadDim / 4;
  if (threadIdx.x < kReads) {
    const float4* parts = reinterpret_cast<const float4*>(p.z + static_cast<int64_t>(blockIdx.x) *
                                                                    kParts * C::kHeadDim);
    float4 sum = parts[threadIdx.x];
#pragma unroll
    for (int i = 1; i < kParts / 2; ++i) {
      const float4 more = parts[i * kReads + threadIdx.x];
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    reinterpret_cast<float4*>(smem + C::kZ)[threadIdx.x] = sum;
  }
}

// Thread 0's part: copies the listed blocks, then H, into the rings. Entry e goes to slot e modulo
// the ring's length once every warp has released entry e - length. Lives in shared memory, where it
// costs the other threads no registers.
template <class C>
struct Producer {
  const char* records;   // of the CTA's head
  const float* k_scale;  // [T_n], likewise
  int head, batch;
  int count;    // listed blocks
  int entries;  // and parts of H

  __device__ __forceinline__ void init(const AttnParams& p, int bh, int listed, bool linear) {
    const int64_t record = static_cast<int64_t>(bh) * p.shape.num_k_blocks;
    records = static_cast<const char*>(p.records) + record * C::kStageBytesK;
    k_scale = p.k_scale + record;
    head = bh % p.shape.num_heads;
    batch = bh / p.shape.num_heads;
    count = listed;
    entries = listed + (linear ? C::kPartsH : 0);
  }

  __device__ __forceinline__ bool linear() const { return entries > count; }

  __device__ __forceinline__ void load_key(const AttnParams& p, const AttnMaps& maps, char* smem,
                                           int entry) const {
    if (entry >= entries) return;
    const int slot = entry % C::kStagesK;
    const uint32_t base = smem_address(smem), full = base + C::kFullK + slot * 8;
    const uint32_t tile = base + C::kKeys + slot * C::kStageBytesK;
    if (entry >= C::kStagesK) {
      mbarrier_wait(base + C::kEmptyK + slot * 8, entry / C::kStagesK + 1 & 1);
    }
    mbarrier_expect(full, C::kStageBytesK);
    if (entry >= count) {
#pragma unroll
      for (int column = 0; column < C::kHeadDim / 64; ++column) {
        tensor_load(tile + column * C::kRowsH * 128, &maps.h, 0,
                    column * C::kHeadDim + (entry - count) * C::kRowsH, blockIdx.x, full);
      }
      if constexpr (C::kJoint) mbarrier_arrive(full);
      return;
    }
    const int j = listed_block<C>(p, smem, entry);
    if constexpr (C::kJoint) {
      bulk_load(tile, records + static_cast<int64_t>(j) * C::kStageBytesK, C::kStageBytesK, full);
      cp_async_4(base + C::kScales + slot * 4, k_scale + j);
      cp_async_arrive(full);
    } else {
      load_tokens(tile, &maps.k, j, full);
    }
  }

  __device__ __forceinline__ void load_value(const AttnParams& p, const AttnMaps& maps, char* smem,
                                             int entry) const {
    if constexpr (!C::kJoint) {
      if (entry >= count) return;
      const int slot = entry % C::kStagesV;
      const uint32_t base = smem_address(smem), full = base + C::kFullV + slot * 8;
      if (entry >= C::kStagesV) {
        mbarrier_wait(base + C::kEmptyV + slot * 8, entry / C::kStagesV + 1 & 1);
      }
      mbarrier_expect(full, C::kValueBytes);
      load_tokens(base + C::kValues + slot * C::kValueBytes, &maps.v,
                  listed_block<C>(p, smem, entry), full);
    }
  }

 private:
  __device__ __forceinline__ void load_tokens(uint32_t tile, const CUtensorMap* map, int j,
                                              uint32_t full) const {
#pragma unroll
    for (int column = 0; column < C::kHeadDim / 64; ++column) {
      tensor_load(tile + column * kBlockK * 128, map, column * 64, j * kBlockK, head, batch, full);
    }
  }
};

// The query block to int8 with one scale, swizzled. Two steps, so that the reads are on their way
// while the CTA prepares its rings.
template <class C>
struct QueryTile {
  using Element = typename C::Element;
  static constexpr int kLanesPerRow = C::kHeadDim / 8;
  static constexpr int kRowsPerPass = C::kThreads / kLanesPerRow;
  static constexpr int kPasses = kBlockQ / kRowsPerPass;
  uint4 packed[kPasses];

  __device__ __forceinline__ void load(const Element* q, int64_t stride_token, int rows) {
    q += threadIdx.x % kLanesPerRow * 8;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = i * kRowsPerPass + threadIdx.x / kLanesPerRow;
      packed[i] = row < rows ? __ldg(reinterpret_cast<const uint4*>(q + row * stride_token))
                             : make_uint4(0, 0, 0, 0);
    }
  }
  // Returns the scale. scratch: one float a warp.
  __device__ __forceinline__ float quantize(char* tile, float* scratch) const {
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) amax = max_nan(amax, amax8<Element>(packed[i]));
    amax = max_nan(block_max<C::kThreads>(amax, scratch), kQuantEps);
    const float factor = __fdiv_rn(kInt8Max, amax);
    const int row0 = threadIdx.x / kLanesPerRow, column = threadIdx.x % kLanesPerRow * 8;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      float x[8];
      unpack8<Element>(packed[i], x);
      const int offset =
          swizzle<C::kQueryRowBytes>(i * kRowsPerPass + row0, column / 16) + column % 16;
      *reinterpret_cast<uint2*>(tile + offset) = pack_int8x8(x, factor);
    }
    return amax / kInt8Max;
  }
};

}  // namespace sla2
