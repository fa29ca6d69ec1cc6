// The copying thread of the persistent attention kernel.
#pragma once

#include "attn_rows_config.cuh"

namespace sla2 {

// H and Z of a query block, and Q of the next, arrive while its key blocks are worked on. The ring
// of a query block ends with an entry that is not loaded: O leaves through it.
template <class C>
struct AttnRowCopies {
  const AttnParams& p;
  const AttnRowMaps& maps;
  typename C::Smem& smem;
  KeyBlockCopies<C> blocks{maps.k, maps.v, smem};
  int query_parity = 0, state_parity = 0;  // of their `empty` barriers

  __device__ __forceinline__ void load_query(int index) {
    const RowTile tile(p.shape, 0, index);
    const uint32_t full = smem_address(&smem.query_full);
    mbarrier_wait(smem_address(&smem.query_empty), query_parity ^ 1);
    query_parity ^= 1;
    mbarrier_expect(full, C::kQueryBytes);
    load_rows<C, kBlockQ>(smem.query, &maps.q, tile.row0, tile, full, evict_first());
  }
  // The other arrival that query_full waits for. After load_query, so that the last length is read.
  __device__ __forceinline__ void publish(int listed) {
    smem.listed = listed;
    mbarrier_arrive(smem_address(&smem.query_full));
  }

  __device__ __forceinline__ void load_sums(int index) {
    const uint32_t full = smem_address(&smem.state_full);
    mbarrier_wait(smem_address(&smem.state_empty), state_parity ^ 1);
    state_parity ^= 1;
    mbarrier_expect(full, C::kStateBytes + sizeof(smem.z));
    load_state<C>(smem.state, &maps.h, index, full, evict_first());
    bulk_load(smem_address(smem.z), p.z + static_cast<int64_t>(index) * 2 * C::kHeadDim,
              sizeof(smem.z), full);
  }

  __device__ __forceinline__ void run() {
    const int tiles = p.shape.num_bh * p.shape.num_q_blocks;
    int index = blockIdx.x;
    load_query(index);
    wait_predecessor();  // all but Q, K and V is of kernels of the same call
    int listed = p.counts[index];
    publish(listed);
#pragma unroll 1
    while (index < tiles) {
      const RowTile tile(p.shape, 0, index);
      const int count = sparse_blocks(p, listed);
      const bool linear = has_complement(p, listed);
      blocks.begin(p.lut + static_cast<int64_t>(index) * p.max_kv_blocks, count);
      index += gridDim.x;
      if (index < tiles) listed = p.counts[index];
      // What else is loaded goes out as soon as no wait for its place holds up the ring: when the
      // first key block's entry is free, so is the place of Q, and that of H before it.
      const bool early = count > C::kStages;
      blocks.load_until(tile, early ? C::kStages + 1 : count);
      if (linear) load_sums(tile.local);
      if (early) {
        load_next(index, tiles, listed);
        blocks.load_until(tile, count);
      }
      blocks.pass_entry();
      if (!early) load_next(index, tiles, listed);
    }
  }

 private:
  __device__ __forceinline__ void load_next(int index, int tiles, int listed) {
    if (index >= tiles) return;
    load_query(index);
    publish(listed);
  }
};

}  // namespace sla2
