// The copying warp of the backward kernel by query block.
#pragma once

#include "async.cuh"
#include "bwd_rows_config.cuh"

namespace sla2 {

// kRows tokens of a head, panel by panel.
template <class C, int kRows>
__device__ __forceinline__ void load_rows(const char* target, const CUtensorMap* map, int row,
                                          const BwdRowTile& tile, uint32_t full) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tensor_load(smem_address(target) + panel * kRows * 128, map, panel * kPanel, row, tile.head,
                tile.batch, full);
  }
}

// One thread. Q, dO, H and Z of the next query block arrive while the key blocks of this one are
// worked on: their place is free by then, as Q and dO stay in registers. The ring of a query block
// begins with O_s and ends with an entry that is not loaded: dQ leaves through it.
template <class C>
struct BwdRowCopies {
  const AttnBwdParams& p;
  const BwdRowMaps& maps;
  typename C::Smem& smem;
  RingCursor<C::kStages> ring = {};
  int parity = 0;  // of operands_empty

  __device__ __forceinline__ uint32_t full() const { return smem_address(&smem.full[ring.stage]); }
  __device__ __forceinline__ void acquire() const {
    mbarrier_wait(smem_address(&smem.empty[ring.stage]), ring.parity ^ 1);
  }
  __device__ __forceinline__ int64_t list(const BwdRowTile& tile) const {
    return static_cast<int64_t>(tile.bh) * p.shape.num_q_blocks + tile.block;
  }

  // Returns the length of the query block's list.
  __device__ __forceinline__ int load_operands(int index) {
    const BwdRowTile tile(p, index);
    const int listed = __ldg(p.counts + list(tile));
    const bool linear = has_complement(p, listed);
    const uint32_t barrier = smem_address(&smem.operands_full);
    mbarrier_wait(smem_address(&smem.operands_empty), parity ^ 1);
    parity ^= 1;
    smem.listed = listed;
    mbarrier_expect(barrier, 2 * C::kQueryBytes + (linear ? C::kStateBytes + sizeof(smem.z) : 0));
    load_rows<C, kBlockQ>(smem.query, &maps.q, tile.row0, tile, barrier);
    load_rows<C, kBlockQ>(smem.grad, &maps.grad_out, tile.row0, tile, barrier);
    if (linear) {
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tensor_load(smem_address(smem.state) + panel * C::kHeadDim * 128, &maps.h, panel * kPanel,
                    0, tile.local, barrier);
      }
      bulk_load(smem_address(smem.z), p.z + static_cast<int64_t>(tile.local) * 2 * C::kHeadDim,
                sizeof(smem.z), barrier);
    }
    return listed;
  }

  __device__ __forceinline__ void load_key_block(const BwdRowTile& tile, int key) {
    acquire();
    smem.key[ring.stage] = key;
    mbarrier_expect(full(), 2 * C::kKeyBytes);
    const char* stage = smem.stage[ring.stage];
    load_rows<C, kBlockK>(stage, &maps.k, key, tile, full());
    load_rows<C, kBlockK>(stage + C::kKeyBytes, &maps.v, key, tile, full());
    ring.advance();
  }

  __device__ __forceinline__ void run() {
    const int tiles = p.bh_count * p.shape.num_q_blocks;
    int index = blockIdx.x;
    int listed = load_operands(index);
#pragma unroll 1
    while (index < tiles) {
      const BwdRowTile tile(p, index);
      const int count = sparse_blocks(p, listed);
      const uint16_t* lut = p.lut + list(tile) * p.max_kv_blocks;
      index += gridDim.x;
      if (p.branch != SLA2_BRANCH_LINEAR) {
        acquire();
        mbarrier_expect(full(), C::kQueryBytes);
        load_rows<C, kBlockQ>(smem.stage[ring.stage], &maps.out_sparse, tile.row0, tile, full());
        ring.advance();
      }
      // The next operands go out as soon as no wait for their place holds up the ring: when the
      // first key block's stage is free, they are too. Late, they would all be asked for at once,
      // as the CTAs end their query blocks together.
      const int last_before = min(count, C::kStages + 1);
      int next = count > 0 ? __ldg(lut) : 0;
      int i = 0;
      const auto load_until = [&](int end) {
#pragma unroll 1
        for (; i < end; ++i) {
          const int key = next * kBlockK;
          if (i + 1 < count) next = __ldg(lut + i + 1);  // its latency is the wait's
          load_key_block(tile, key);
        }
      };
      load_until(last_before);
      if (count > C::kStages && index < tiles) listed = load_operands(index);
      load_until(count);
      acquire();
      mbarrier_arrive(full());
      ring.advance();
      if (count <= C::kStages && index < tiles) listed = load_operands(index);
    }
  }
};

}  // namespace sla2
