// What the persistent kernels by query block share, forward and backward: the tile that a CTA works
// on at a time, its rows between shared memory and fragments, and the copying thread's end of the
// ring of key blocks.
//
// A kernel's config C gives Element, kHeadDim, kSteps (k16 steps of a product over the channels),
// kTilesD, kPanels (of 64 channels), kPanelBytes (of a query block's panel), kKeyBytes, kStages,
// tile_row(0) (the warp's first row) and Smem.
#pragma once

#include "../common/convert.cuh"
#include "../common/layout.cuh"
#include "../common/ptx.cuh"
#include "async.cuh"
#include "linear.cuh"

namespace sla2 {

// Two warpgroups of 64 query rows share every key block; one warp of a third fills the ring.
constexpr int kRowGroups = 2;
constexpr int kRowThreads = (kRowGroups + 1) * kWarpgroup;
constexpr int kRowRegisters = 240, kRowCopyRegisters = 24;
static_assert((kRowGroups * kRowRegisters + kRowCopyRegisters) * kWarpgroup <= 65536,
              "the SM's registers");

// A query block.
struct RowTile {
  int local;  // among those of the launch, whose heads begin with bh_begin
  int bh, head, batch, block, row0, rows;

  __device__ __forceinline__ RowTile(const Shape& shape, int bh_begin, int tile) {
    local = tile;
    block = tile % shape.num_q_blocks;
    bh = bh_begin + tile / shape.num_q_blocks;
    head = bh % shape.num_heads;
    batch = bh / shape.num_heads;
    row0 = block * kBlockQ;
    rows = min(kBlockQ, shape.seqlen - row0);
  }
};

// kRows tokens of a head, panel by panel. policy: none, or that of the copies.
template <class C, int kRows, typename... Policy>
__device__ __forceinline__ void load_rows(const char* target, const CUtensorMap* map, int row,
                                          const RowTile& tile, uint32_t full, Policy... policy) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tensor_load(smem_address(target) + panel * kRows * 128, map, panel * kPanel, row, tile.head,
                tile.batch, full, policy...);
  }
}

// The matrix H of query block `index`, likewise.
template <class C, typename... Policy>
__device__ __forceinline__ void load_state(const char* target, const CUtensorMap* map, int index,
                                           uint32_t full, Policy... policy) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tensor_load(smem_address(target) + panel * C::kHeadDim * 128, map, panel * kPanel, 0, index,
                full, policy...);
  }
}

// One thread: K and V of the listed blocks of one query block after another.
template <class C>
struct KeyBlockCopies {
  const CUtensorMap& k;
  const CUtensorMap& v;
  typename C::Smem& smem;
  RingCursor<C::kStages> ring = {};
  const uint16_t* list = nullptr;
  int count = 0, done = 0;  // of the list
  int next = 0;             // its entry `done`

  __device__ __forceinline__ uint32_t full() const { return smem_address(&smem.full[ring.stage]); }
  __device__ __forceinline__ void acquire() const {
    mbarrier_wait(smem_address(&smem.empty[ring.stage]), ring.parity ^ 1);
  }

  __device__ __forceinline__ void begin(const uint16_t* entries, int length) {
    list = entries;
    count = length;
    done = 0;
    next = count > 0 ? list[0] : 0;
  }
  __device__ __forceinline__ void load_until(const RowTile& tile, int end) {
#pragma unroll 1
    for (; done < end; ++done) {
      const int key = next * kBlockK;
      if (done + 1 < count) next = list[done + 1];  // its latency is the wait's
      acquire();
      smem.key[ring.stage] = key;
      mbarrier_expect(full(), 2 * C::kKeyBytes);
      const char* stage = smem.stage[ring.stage];
      load_rows<C, kBlockK>(stage, &k, key, tile, full());
      load_rows<C, kBlockK>(stage + C::kKeyBytes, &v, key, tile, full());
      ring.advance();
    }
  }
  // An entry that is not loaded: the query block's result leaves through it.
  __device__ __forceinline__ void pass_entry() {
    acquire();
    mbarrier_arrive(full());
    ring.advance();
  }
};

// The warp's 16 rows as A operands. fragment[s][2 c + half]: row lane / 4 + 8 half, channels 16 s +
// 8 c + 2 (lane % 4) + {0, 1}: what a lane also holds of accumulators, as n8 tile 2 s + c.
template <class C>
using Fragments = uint32_t[C::kSteps][4];

// Where the lane's row of ldmatrix or stmatrix is for k16 step `step`.
template <class C>
__device__ __forceinline__ uint32_t fragment_address(const char* tile, int step) {
  const int lane = threadIdx.x % 32;
  return smem_address(tile) + step / 4 * C::kPanelBytes +
         swizzle<128>(C::tile_row(0) + lane % 16, step % 4 * 2 + lane / 16);
}

template <class C>
__device__ __forceinline__ void load_fragments(Fragments<C>& fragments, const char* tile) {
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    ldmatrix_x4(fragments[step], fragment_address<C>(tile, step));
  }
}

// offset: e = exp(q - max q) = 2^(log2(e) q + offset).
template <class C>
__device__ __forceinline__ void feature_offsets(float (&offset)[2], const Fragments<C>& q) {
  using P = Pair<typename C::Element>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t largest = q[0][half];
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      largest = P::max(largest, P::max(q[step][half], q[step][2 + half]));
    }
    const float2 pair = P::to_float2(largest);
    offset[half] = -kLog2e * lane_max<4>(max_nan(pair.x, pair.y));
  }
}

// e of a pair of features, rounded to bfloat16.
template <typename Element>
__device__ __forceinline__ uint32_t query_features(uint32_t q, float offset) {
  const float2 x = Pair<Element>::to_float2(q);
  return Pair<__nv_bfloat16>::from_floats(exp2_approx(fmaf(x.x, kLog2e, offset)),
                                          exp2_approx(fmaf(x.y, kLog2e, offset)));
}

// Z of the lane's pair of features in n8 tile n.
template <class C>
__device__ __forceinline__ float2 feature_sums(const float* z, int n) {
  const int feature = 8 * n + threadIdx.x % 4 * 2;
  const float2 high = *reinterpret_cast<const float2*>(z + feature);
  const float2 low = *reinterpret_cast<const float2*>(z + C::kHeadDim + feature);
  return make_float2(high.x + low.x, high.y + low.y);
}

}  // namespace sla2
