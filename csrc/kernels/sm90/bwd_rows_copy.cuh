// The copying warp of the backward kernel by query block.
#pragma once

#include "bwd_rows_config.cuh"

namespace sla2 {

// One thread. Q, dO, H and Z of the next query block arrive while the key blocks of this one are
// worked on: their place is free by then, as Q and dO stay in registers. The ring of a query block
// begins with O_s and ends with an entry that is not loaded: dQ leaves through it.
template <class C>
struct BwdRowCopies {
  const AttnBwdParams& p;
  const BwdRowMaps& maps;
  typename C::Smem& smem;
  KeyBlockCopies<C> blocks{maps.k, maps.v, smem};
  int parity = 0;  // of operands_empty

  __device__ __forceinline__ int64_t list(const RowTile& tile) const {
    return static_cast<int64_t>(tile.bh) * p.shape.num_q_blocks + tile.block;
  }

  // Returns the length of the query block's list.
  __device__ __forceinline__ int load_operands(int index) {
    const RowTile tile(p.shape, p.bh_begin, index);
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
      load_state<C>(smem.state, &maps.h, tile.local, barrier);
      bulk_load(smem_address(smem.z), p.z + static_cast<int64_t>(tile.local) * 2 * C::kHeadDim,
                sizeof(smem.z), barrier);
    }
    return listed;
  }

  __device__ __forceinline__ void run() {
    const int tiles = p.bh_count * p.shape.num_q_blocks;
    int index = blockIdx.x;
    int listed = load_operands(index);
#pragma unroll 1
    while (index < tiles) {
      const RowTile tile(p.shape, p.bh_begin, index);
      const int count = sparse_blocks(p, listed);
      blocks.begin(p.lut + list(tile) * p.max_kv_blocks, count);
      index += gridDim.x;
      if (p.branch != SLA2_BRANCH_LINEAR) {
        auto& ring = blocks.ring;
        blocks.acquire();
        mbarrier_expect(blocks.full(), C::kQueryBytes);
        load_rows<C, kBlockQ>(smem.stage[ring.stage], &maps.out_sparse, tile.row0, tile,
                              blocks.full());
        ring.advance();
      }
      // The next operands go out as soon as no wait for their place holds up the ring: when the
      // first key block's stage is free, they are too. Late, they would all be asked for at once,
      // as the CTAs end their query blocks together.
      blocks.load_until(tile, min(count, C::kStages + 1));
      if (count > C::kStages && index < tiles) listed = load_operands(index);
      blocks.load_until(tile, count);
      blocks.pass_entry();
      if (count <= C::kStages && index < tiles) listed = load_operands(index);
    }
  }
};

}  // namespace sla2
