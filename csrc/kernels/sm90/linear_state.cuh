// The state stream: everything the attention kernel and the complement need of a key block, in one
// read of K_j and V_j. Same numbers as portable/linear_state.cu.
#pragma once

#include "../common/convert.cuh"
#include "../common/quantize.cuh"
#include "linear.cuh"

namespace sla2 {

// One warp: takes tickets, waits for the slot, loads K_j, V_j and the head's statistics. Its first
// lane does the work; the rest keep the warp's values uniform.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void load_states(const LinearArgs& args,
                                            LinearSmem<Element, kHeadDim>& smem) {
  using Smem = LinearSmem<Element, kHeadDim>;
  const Shape& shape = args.p.shape;
  const int tickets = shape.num_bh * shape.num_k_blocks;
  const int row_bytes = kHeadDim * static_cast<int>(sizeof(float));
  const bool quantised = args.p.v_scale != nullptr;
  const int bytes = 2 * Smem::kPanels * kPanelBytes + (quantised ? 2 : 1) * row_bytes;
  const bool leader = threadIdx.x % 32 == 0;
  RingCursor<Smem::kStateStages> ring;
  int free_bh = -1;  // its slot is known to be free
  for (int ended = 0; ended < kStateGroups;) {
    int ticket = 0;
    if (leader) {
      mbarrier_wait(smem_address(&smem.state_empty[ring.stage]), ring.parity ^ 1);
      ticket = take_state_ticket(args);
    }
    ticket = uniform(ticket);
    const uint32_t full = smem_address(&smem.state_full[ring.stage]);
    if (ticket >= tickets) {  // one end for each warpgroup
      if (leader) {
        smem.state_task[ring.stage].bh = -1;
        mbarrier_arrive(full);
      }
      ++ended;
    } else {
      const int bh = ticket / shape.num_k_blocks, block = ticket % shape.num_k_blocks;
      if (bh != free_bh && bh >= kStateSlots && args.p.state != nullptr) {
        wait_counter(tiles_done(args, bh - kStateSlots),
                     state_elements(kHeadDim) / kTileColumns * args.row_tiles);
      }
      free_bh = bh;
      const int head = bh % shape.num_heads, batch = bh / shape.num_heads;
      const int64_t row = static_cast<int64_t>(bh) * kHeadDim;
      auto& stage = smem.state[ring.stage];
      if (leader) {
        smem.state_task[ring.stage] = {bh, block};
        mbarrier_expect(full, bytes);
#pragma unroll
        for (int panel = 0; panel < Smem::kPanels; ++panel) {
          tensor_load(smem_address(stage.key[panel]), &args.k, panel * kPanel, block * kBlockK,
                      head, batch, full);
          tensor_load(smem_address(stage.value[panel]), &args.v, panel * kPanel, block * kBlockK,
                      head, batch, full);
        }
        bulk_load(smem_address(smem.k_mean[ring.stage]), args.p.k_mean + row, row_bytes, full);
        if (quantised) {
          bulk_load(smem_address(smem.v_inverse[ring.stage]), args.p.v_scale + 2 * row + kHeadDim,
                    row_bytes, full);
        }
      }
    }
    __syncwarp();
    ring.advance();
  }
}

// Two threads, each for every other task: publish finished states, so that the warps that stored
// them need not wait for the stores to land. They wait only for tasks that are loaded already.
constexpr int kPublishers = 2;
template <typename Element, int kHeadDim>
__device__ __forceinline__ void publish_states(const LinearArgs& args,
                                               LinearSmem<Element, kHeadDim>& smem, int publisher) {
  using Smem = LinearSmem<Element, kHeadDim>;
  static_assert(kPublishers <= kStateGroups, "each sees one of the ends");
  if (threadIdx.x % 32 != 0) return;
  RingCursor<Smem::kStateStages> ring;
  ring.advance(publisher);
  for (;;) {
    mbarrier_wait(smem_address(&smem.state_full[ring.stage]), ring.parity);
    const StateTask task = smem.state_task[ring.stage];
    if (task.bh < 0) return;
    mbarrier_wait(smem_address(&smem.state_stored[ring.stage]), ring.parity);
    mbarrier_arrive(smem_address(&smem.state_empty[ring.stage]));
    if (args.p.state != nullptr) {
      fence_async();  // ordinary stores here, tensor copies there
      release_increment(states_ready(args, task.bh));
    }
    ring.advance(kPublishers);
  }
}

// One warpgroup of the state stream.
template <typename Element, int kHeadDim, int kQuant>
struct StateWorker {
  using Smem = LinearSmem<Element, kHeadDim>;
  using Stage = typename Smem::StateStage;
  using Record = KvRecord<kHeadDim, 1>;
  static constexpr int kPanels = Smem::kPanels;
  // Eight lanes a row, each with one 16-byte chunk of every panel. A pass is 16 rows: swizzled
  // offsets differ from pass to pass by 16 rows' bytes.
  static constexpr int kRowsPerPass = kWarpgroup / 8, kPasses = kBlockK / kRowsPerPass;

  const LinearArgs& args;
  Smem& smem;
  const int group, warp, lane;
  const int row, chunk;
  RingCursor<Smem::kStateStages> ring;
  StateTask task;

  __device__ __forceinline__ StateWorker(const LinearArgs& args, Smem& smem, int group)
      : args(args),
        smem(smem),
        group(group),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        row(threadIdx.x % kWarpgroup / 8),
        chunk(threadIdx.x % 8) {}

  __device__ __forceinline__ void sync() const { named_barrier(1 + group, kWarpgroup); }

  __device__ __forceinline__ int64_t block_index() const {
    return static_cast<int64_t>(task.bh) * args.p.shape.num_k_blocks + task.block;
  }

  // This lane's chunk of a panel in pass i.
  __device__ __forceinline__ uint4* chunk_of(char* panel, int i) const {
    return reinterpret_cast<uint4*>(panel + swizzle<128>(row, chunk) + i * kRowsPerPass * 128);
  }

  // Keys less their mean; zero past the end.
  __device__ __forceinline__ void smooth(const uint4& bits, int panel, bool valid,
                                         float (&x)[8]) const {
    const float4* mean =
        reinterpret_cast<const float4*>(smem.k_mean[ring.stage] + panel * kPanel + chunk * 8);
    const float4 low = mean[0], high = mean[1];
    const float m[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    unpack8<Element>(bits, x);
#pragma unroll
    for (int c = 0; c < 8; ++c) x[c] = valid ? x[c] - m[c] : 0.f;
  }

  // 127 / amax of the smoothed keys; writes the block's scale.
  __device__ __forceinline__ float key_factor(Stage& stage, int tokens) const {
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool valid = i * kRowsPerPass + row < tokens;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        float x[8];
        smooth(*chunk_of(stage.key[panel], i), panel, valid, x);
        amax = max_nan(amax, amax8(x));
      }
    }
    amax = lane_max<32>(amax);
    if (lane == 0) smem.k_amax[ring.stage][warp] = amax;
    sync();
#pragma unroll
    for (int w = 0; w < kWarpgroup / 32; ++w) amax = max_nan(amax, smem.k_amax[ring.stage][w]);
    amax = max_nan(amax, kQuantEps);
    if (warp == 0 && lane == 0) args.p.k_scale[block_index()] = amax / kInt8Max;
    return kInt8Max / amax;
  }

  // Softmax over the features of this lane's row, rounded to bf16, in place; zero past the end.
  __device__ __forceinline__ void write_phi(Stage& stage, int i, bool valid,
                                            float (&x)[kPanels][8]) const {
    float row_max = x[0][0];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int c = 0; c < 8; ++c) row_max = max_nan(row_max, x[panel][c]);
    }
    const float offset = -kLog2e * lane_max<8>(row_max);
    float sum = 0.f;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        x[panel][c] = exp2_approx(fmaf(x[panel][c], kLog2e, offset));
        sum += x[panel][c];
      }
    }
    sum = lane_sum<8>(sum);
    const float inverse = valid ? reciprocal_approx(sum) : 0.f;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int c = 0; c < 8; ++c) x[panel][c] *= inverse;
      *chunk_of(stage.key[panel], i) = pack8<__nv_bfloat16>(x[panel]);
    }
  }

  // Keys: int8 record, then phi.
  __device__ __forceinline__ void keys(Stage& stage) const {
    const int tokens = min(kBlockK, args.p.shape.seqlen - task.block * kBlockK);
    float factor = 0.f;
    if constexpr (kQuant != SLA2_QUANT_NONE) factor = key_factor(stage, tokens);
    char* record = static_cast<char*>(args.p.records) + block_index() * Record::kBytes;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool valid = i * kRowsPerPass + row < tokens;
      float x[kPanels][8];
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const uint4 bits = *chunk_of(stage.key[panel], i);
        smooth(bits, panel, valid, x[panel]);
        if constexpr (kQuant != SLA2_QUANT_NONE) {
          const int column = panel * kPanel + chunk * 8;
          const int offset = swizzle<kHeadDim>(row, column / 16) + column % 16;
          __stcs(reinterpret_cast<uint2*>(record + offset + i * kRowsPerPass * kHeadDim),
                 pack_int8x8(x[panel], factor));
        }
        if (args.p.phi_raw_k) unpack8<Element>(bits, x[panel]);
      }
      if (args.p.state != nullptr) write_phi(stage, i, valid, x);
    }
  }

  // Values: e4m3 columns. ldmatrix.trans hands lane (g, t) tokens 2t, 2t+1 of channel g, and of
  // tokens 8..15 the next register: with the permutation of KvRecord exactly the four bytes that
  // are its share of the 16-token chunk.
  __device__ __forceinline__ void values(const Stage& stage) const {
    char* record =
        static_cast<char*>(args.p.records) + block_index() * Record::kBytes + Record::kKeyBytes;
#pragma unroll 2
    for (int channel0 = warp * 8; channel0 < kHeadDim; channel0 += 32) {
      const int channel = channel0 + lane / 4;
      const float inverse = smem.v_inverse[ring.stage][channel];
      const uint32_t panel = smem_address(stage.value[channel0 / kPanel]);
#pragma unroll
      for (int chunk0 = 0; chunk0 < kBlockK / 16; chunk0 += 2) {
        uint32_t pairs[4];
        ldmatrix_x4_trans(pairs, panel + swizzle<128>(chunk0 * 16 + lane, channel0 % kPanel / 8));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 low = Pair<Element>::to_float2(pairs[2 * i]);
          const float2 high = Pair<Element>::to_float2(pairs[2 * i + 1]);
          __stcs(
              reinterpret_cast<uint32_t*>(record + swizzle<64>(channel, chunk0 + i) + lane % 4 * 4),
              pack_e4m3x4(low.x * inverse, low.y * inverse, high.x * inverse, high.y * inverse));
        }
      }
    }
  }

  // fp16 values as two bf16 parts, which hold them exactly: rounding V to bf16 alone would cost
  // fp16 users three bits of the linear branch. The high part stays in place.
  __device__ __forceinline__ void split_values(char* high, char* low) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      float x[8], rounded[8];
      unpack8<Element>(*chunk_of(high, i), x);
      const uint4 bits = pack8<__nv_bfloat16>(x);
      unpack8<__nv_bfloat16>(bits, rounded);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] -= rounded[c];
      *chunk_of(high, i) = bits;
      *chunk_of(low, i) = pack8<__nv_bfloat16>(x);
    }
  }

  // acc (+)= phi^T B over 64 tokens; B advances by step_bytes with every 16.
  template <int kCount>
  __device__ __forceinline__ static void product(float (&acc)[kCount], uint32_t phi, uint32_t b,
                                                 int step_bytes, bool accumulate) {
    const uint64_t a_tile = wgmma_descriptor(phi, kPanelBytes, 1024, Swizzle::k128);
    const uint64_t b_tile = wgmma_descriptor(b, kPanelBytes, 1024, Swizzle::k128);
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      Wgmma16<__nv_bfloat16, true, true>::mma(acc, advance(a_tile, k * 2048),
                                              advance(b_tile, k * step_bytes), accumulate || k > 0);
    }
  }

  __device__ __forceinline__ void store_h(const float (&acc)[32], uint16_t* h, int feature0) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = feature0 + 16 * warp + lane / 4 + 8 * half;
#pragma unroll
      for (int i = 0; i < kPanel / 32; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float* pair = acc + 4 * (4 * i + n) + 2 * half;
          words[n] = Pair<__nv_bfloat16>::from_floats(pair[0], pair[1]);
        }
        // __stwb: an assignment came out as four 4-byte stores once, and L2 bound the kernel.
        __stwb(reinterpret_cast<uint4*>(h + h_row(feature) * kPanel + i * 32 + lane % 4 * 8),
               make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }

  // Every column of the product with ones is z: the first lane of a quad stores it.
  __device__ __forceinline__ void store_z(const float (&acc)[4], uint16_t* z, int feature0) const {
    if (lane % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = feature0 + 16 * warp + lane / 4 + 8 * half;
      const float sum = acc[2 * half];
      const __nv_bfloat16 high = __float2bfloat16_rn(sum);
      const __nv_bfloat16 low = __float2bfloat16_rn(sum - __bfloat162float(high));
      z[feature] = __bfloat16_as_ushort(high);
      z[kHeadDim + feature] = __bfloat16_as_ushort(low);
    }
  }

  __device__ __forceinline__ uint16_t* state() const {
    const int64_t slot = task.bh % kStateSlots;
    return args.p.state +
           (slot * args.p.shape.num_k_blocks + task.block) * state_elements(kHeadDim);
  }

  // h = phi^T V and z = phi^T 1, 64 features by 64 channels at a time.
  __device__ __forceinline__ void states(Stage& stage) const {
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel) {
      if constexpr (Smem::kSplitValues) {
        if (panel > 0) sync();  // every warp's products with the low part before are over
        split_values(stage.value[panel], smem.value_low.panel[group]);
        fence_async_shared();
        sync();
      }
#pragma unroll 1
      for (int m = 0; m < kPanels; ++m) {
        const uint32_t phi = uniform(smem_address(stage.key[m]));
        float acc[32], z[4];
        wgmma_fence();
        product(acc, phi, uniform(smem_address(stage.value[panel])), 2048, false);
        if constexpr (Smem::kSplitValues) {
          product(acc, phi, uniform(smem_address(smem.value_low.panel[group])), 2048, true);
        }
        product(z, phi, smem_address(smem.ones), 0, false);
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        pin(z);
        store_h(acc, state() + panel * kPanel * kHeadDim, m * kPanel);
        if (panel == 0) store_z(z, state() + kHeadDim * kHeadDim, m * kPanel);
      }
    }
  }

  __device__ __forceinline__ void run() {
    ring.advance(group);
    for (;;) {
      mbarrier_wait(smem_address(&smem.state_full[ring.stage]), ring.parity);
      const StateTask& next = smem.state_task[ring.stage];
      task = {uniform(next.bh), uniform(next.block)};
      if (task.bh < 0) return;
      Stage& stage = smem.state[ring.stage];
      keys(stage);
      if (kQuant != SLA2_QUANT_NONE) values(stage);
      if (args.p.state != nullptr) {
        fence_async_shared();
        sync();
        states(stage);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(smem_address(&smem.state_stored[ring.stage]));
      ring.advance(kStateGroups);
    }
  }
};

}  // namespace sla2
