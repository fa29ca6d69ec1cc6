// The state stream: everything the attention kernel and the complement need of a key block, in one
// read of K_j and V_j. Same numbers as portable/linear_state.cu.
#pragma once

#include "../common/convert.cuh"
#include "../common/quantize.cuh"
#include "linear.cuh"

namespace sla2 {

// One thread: takes tickets, loads K_j, V_j and the head's statistics once the slot is free, and
// publishes what the workers have made of them, in turns: a task that cannot be loaded yet must not
// hold up those that others wait for.
template <class Variant>
struct StateServer {
  using Smem = typename Variant::Smem;
  using Element = typename Variant::Element;
  static constexpr int kHeadDim = Variant::kHeadDim;

  const LinearArgs& args;
  Smem& smem;
  RingCursor<Smem::kStateLoads> loading;
  RingCursor<Smem::kStateStages> publishing;
  int taken = 0;                               // stages with tasks
  int bh = -1, head = 0, batch = 0, slot = 0;  // being loaded

  __device__ __forceinline__ StateServer(const LinearArgs& args, Smem& smem)
      : args(args), smem(smem) {}

  // Turns to head `next` once its slot is free.
  __device__ __forceinline__ bool enter(int next) {
    if (next == bh) return true;
    if (args.p.state != nullptr) {
      if (next + args.p.state_slots < args.p.bh_count) {
        const int* reads = tiles_done(args, next + args.p.state_slots);
        if (read_counter(reads) < args.head_reads) return false;
        acquire_counted();
      }
      slot = next % args.p.state_slots;
    }
    bh = next;
    head = (args.p.bh_begin + bh) % args.p.shape.num_heads;
    batch = (args.p.bh_begin + bh) / args.p.shape.num_heads;
    return true;
  }

  __device__ __forceinline__ void load(int block) {
    constexpr int kRowBytes = kHeadDim * 4, kRangeBytes = 2 * kHeadDim * 2;
    constexpr bool kQuantised = Variant::kQuant != SLA2_QUANT_NONE;
    constexpr int kBytes =
        2 * Smem::kPanels * kPanelBytes + kRowBytes + (kQuantised ? kRowBytes + kRangeBytes : 0);
    const int i = loading.stage % Smem::kStateStages;
    const int64_t row = int64_t{1} * bh * kHeadDim;
    const uint32_t full = smem_address(&smem.state_full[loading.stage]);
    auto& stage = smem.state[i];
    smem.state_task[i] = {bh, block, slot};
    mbarrier_expect(full, kBytes);
#pragma unroll
    for (int panel = 0; panel < Smem::kPanels; ++panel) {
      // Nobody reads them here again: they should not push states out of L2.
      tensor_load(smem_address(stage.key[panel]), &args.k, panel * kPanel, block * kBlockK, head,
                  batch, full, evict_first());
      tensor_load(smem_address(stage.value[panel]), &args.v, panel * kPanel, block * kBlockK, head,
                  batch, full, evict_first());
    }
    bulk_load(smem_address(smem.k_mean[i]), args.p.k_mean + row, kRowBytes, full);
    if constexpr (kQuantised) {
      bulk_load(smem_address(smem.v_inverse[i]), args.p.v_scale + 2 * row + kHeadDim, kRowBytes,
                full);
      const int64_t index = int64_t{1} * bh * args.p.shape.num_k_blocks + block;
      bulk_load(smem_address(smem.k_range[i]),
                static_cast<const Element*>(args.p.k_range) + index * 2 * kHeadDim, kRangeBytes,
                full);
    }
    loading.advance();
    ++taken;
  }

  // Sends off the oldest state, if the workers have made it, and takes its stage back as soon as
  // that is read. The task it belongs to; bh is negative if there is no state to publish.
  __device__ __forceinline__ StateTask store() {
    constexpr StateTask kNone = {-1, 0, 0};
    const int i = publishing.stage;
    if (taken == 0 || !mbarrier_test(smem_address(&smem.state_made[i]), publishing.parity)) {
      return kNone;
    }
    const StateTask task = smem.state_task[i];
    if (args.p.state != nullptr) Variant::store_state(args, smem, i, task);
    bulk_store_wait_read();
    publishing.advance();
    --taken;
    return args.p.state != nullptr ? task : kNone;
  }

  // A stage whose state leaves is loaded again first: the copy and the release that publish the
  // state take 2000 cycles, which the load would otherwise wait for.
  __device__ __forceinline__ void run() {
    const int blocks = args.p.shape.num_k_blocks, tickets = args.p.bh_count * blocks;
    int ticket = take_state_ticket(args), next_ticket = take_state_ticket(args);
    while (ticket < tickets || taken > 0) {
      const StateTask stored = store();
      if (ticket < tickets && taken < Smem::kStateStages && enter(head_at(args, ticket / blocks))) {
        load(ticket % blocks);
        ticket = next_ticket;
        next_ticket = take_state_ticket(args);  // 600 cycles, until after the next load
      }
      if (stored.bh >= 0) {
        bulk_store_wait();
        release_state(args, stored.bh, stored.block);
      }
    }
    for (int i = 0; i < kStateGroups; ++i) {  // all stages are free: one end for each warpgroup
      smem.state_task[loading.stage % Smem::kStateStages].bh = -1;
      mbarrier_arrive(smem_address(&smem.state_full[loading.stage]));
      loading.advance();
    }
  }
};

// One warpgroup of the state stream; the variants add what becomes of the states.
template <class Variant>
struct StateWorker {
  using Element = typename Variant::Element;
  using Smem = typename Variant::Smem;
  static constexpr int kHeadDim = Variant::kHeadDim, kQuant = Variant::kQuant;
  using Stage = typename Smem::StateStage;
  using Record = KvRecord<kHeadDim, 1>;
  static constexpr int kPanels = Smem::kPanels;
  // Four lanes a row, each with two neighbouring 16-byte chunks of every panel. A pass is 32 rows.
  static constexpr int kRowsPerPass = kWarpgroup / 4, kPasses = kBlockK / kRowsPerPass;
  static constexpr int kColumns = 16;  // of a lane and panel

  const LinearArgs& args;
  Smem& smem;
  const int group, warp, lane;
  const int row, column0;  // this lane's of the first pass and panel
  RingCursor<Smem::kStateLoads> loads;
  int stage_index = 0;  // of the task
  StateTask task;

  __device__ __forceinline__ StateWorker(const LinearArgs& args, Smem& smem, int group)
      : args(args),
        smem(smem),
        group(group),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        row(threadIdx.x % kWarpgroup / 4),
        column0(threadIdx.x % 4 * kColumns) {
    loads.advance(group);
  }

  __device__ __forceinline__ void sync() const { named_barrier(1 + group, kWarpgroup); }

  __device__ __forceinline__ int64_t block_index() const {
    return static_cast<int64_t>(task.bh) * args.p.shape.num_k_blocks + task.block;
  }

  // Chunk c (0, 1) of this lane's columns of a panel in pass i.
  __device__ __forceinline__ uint4* chunk_of(char* panel, int i, int c) const {
    return reinterpret_cast<uint4*>(panel + swizzle<128>(row, column0 / 8 + c) +
                                    i * kRowsPerPass * 128);
  }

  // 127 / amax of the smoothed keys; writes the block's scale. The subtraction is monotonous: its
  // extremes are those of the keys.
  __device__ __forceinline__ float key_factor() const {
    float amax = 0.f;
    const int channel = 32 * warp + lane;
    if (channel < kHeadDim) {
      const float mean = smem.k_mean[stage_index][channel];
      const float high = static_cast<float>(smem.k_range[stage_index][0][channel]);
      const float low = static_cast<float>(smem.k_range[stage_index][1][channel]);
      amax = max_nan(fabsf(high - mean), fabsf(low - mean));
    }
    amax = lane_max<32>(amax);
    if (lane == 0) smem.k_amax[stage_index][warp] = amax;
    sync();
#pragma unroll
    for (int w = 0; w < kWarpgroup / 32; ++w) amax = max_nan(amax, smem.k_amax[stage_index][w]);
    amax = max_nan(amax, kQuantEps);
    if (warp == 0 && lane == 0) args.p.k_scale[block_index()] = amax / kInt8Max;
    return kInt8Max / amax;
  }

  // Softmax over the features of this lane's row, rounded to bf16; zero past the end.
  __device__ __forceinline__ static void softmax(float (&x)[kPanels][kColumns], bool valid) {
    float largest[4];  // chains side by side: one alone would wait for every step
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        largest[c % 4] = panel == 0 && c < 4 ? x[0][c] : max_nan(largest[c % 4], x[panel][c]);
      }
    }
    const float row_max = max_nan(max_nan(largest[0], largest[1]), max_nan(largest[2], largest[3]));
    const float offset = -kLog2e * lane_max<4>(row_max);
    float sum[4] = {};
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        x[panel][c] = exp2_approx(fmaf(x[panel][c], kLog2e, offset));
        sum[c % 4] += x[panel][c];
      }
    }
    const float total = lane_sum<4>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    const float inverse = valid ? reciprocal_approx(total) : 0.f;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[panel][c] *= inverse;
    }
  }

  using Row = float[kColumns];  // a lane's part of a row in one panel
  // Eight of its values, from `first` on.
  __device__ __forceinline__ static float (&eight(Row& x, int first))[8] {
    return reinterpret_cast<float (&)[8]>(x[first]);
  }
  __device__ __forceinline__ void load_keys(Stage& stage, int i, int panel, Row& x) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      unpack8<Element>(*chunk_of(stage.key[panel], i, c), eight(x, 8 * c));
    }
  }

  // Keys: less their mean, zero past the end, to the int8 record, and in place to phi. Tokens past
  // the end have come as zeros and go through all of it: left out as 8 words of the record, and by
  // phi's factor, they cost less than as 32 values.
  __device__ __forceinline__ void keys(Stage& stage) const {
    const int tokens = min(kBlockK, args.p.shape.seqlen - task.block * kBlockK);
    float factor = 0.f;
    if constexpr (kQuant != SLA2_QUANT_NONE) factor = key_factor();
    char* record = static_cast<char*>(args.p.records) + block_index() * Record::kBytes;
#pragma unroll 1
    for (int i = 0; i < kPasses; ++i) {
      const bool valid = i * kRowsPerPass + row < tokens;
      float x[kPanels][kColumns];
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        load_keys(stage, i, panel, x[panel]);
        const float* mean = smem.k_mean[stage_index] + panel * kPanel + column0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) x[panel][c] -= mean[c];
        if constexpr (kQuant != SLA2_QUANT_NONE) {
          const uint2 low = pack_int8x8(eight(x[panel], 0), factor);
          const uint2 high = pack_int8x8(eight(x[panel], 8), factor);
          const uint32_t offset =
              swizzle<kHeadDim>(row, (panel * kPanel + column0) / 16) + i * kRowsPerPass * kHeadDim;
          __stcs(reinterpret_cast<uint4*>(record + offset),
                 valid ? make_uint4(low.x, low.y, high.x, high.y) : make_uint4(0, 0, 0, 0));
        }
      }
      if (args.p.state == nullptr) continue;
      if (args.p.phi_raw_k) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) load_keys(stage, i, panel, x[panel]);
      }
      softmax(x, valid);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          *chunk_of(stage.key[panel], i, c) = pack8<__nv_bfloat16>(eight(x[panel], 8 * c));
        }
      }
    }
  }

  // Values: e4m3 columns. ldmatrix.trans hands lane (g, t) tokens 2t, 2t+1 of channel g, and of
  // tokens 8..15 the next register: with the permutation of KvRecord exactly the four bytes that
  // are its share of the 16-token chunk.
  __device__ __forceinline__ void values(const Stage& stage) const {
    int thread = threadIdx.x;
    pin(thread);  // else addresses made of it are held, and spilled, from block to block
    const int warp = thread / 32 % 4, lane = thread % 32, first = 8 * warp + lane / 4;
    char* record =
        static_cast<char*>(args.p.records) + block_index() * Record::kBytes + Record::kKeyBytes;
    // Of channel `first`: chunks of 16 tokens, and halves of a panel, are bits of an offset.
    // Pinned, or each of the 16 stores would have an address of its own.
    const uint32_t source = swizzle<128>(lane, warp);
    uint64_t chunks[kBlockK / 16];
#pragma unroll
    for (int chunk = 0; chunk < kBlockK / 16; ++chunk) {
      chunks[chunk] = reinterpret_cast<uint64_t>(record + swizzle<64>(first, chunk) + lane % 4 * 4);
      asm("" : "+l"(chunks[chunk]));
    }
#pragma unroll
    for (int channel0 = 0; channel0 < kHeadDim; channel0 += 32) {
      const float inverse = smem.v_inverse[stage_index][channel0 + first];
      const uint32_t panel = smem_address(stage.value[channel0 / kPanel]);
#pragma unroll
      for (int chunk = 0; chunk < kBlockK / 16; chunk += 2) {
        uint32_t pairs[4];
        ldmatrix_x4_trans(pairs, panel + (source ^ channel0 % kPanel * 2) + chunk * 16 * 128);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 low = Pair<Element>::to_float2(pairs[2 * i]);
          const float2 high = Pair<Element>::to_float2(pairs[2 * i + 1]);
          __stcs(reinterpret_cast<uint32_t*>(chunks[chunk + i]) + channel0 * 16,
                 pack_e4m3x4(low.x * inverse, low.y * inverse, high.x * inverse, high.y * inverse));
        }
      }
    }
  }

  // fp16 values as two bf16 parts, which hold them exactly: rounding V to bf16 alone would cost
  // fp16 users three bits of the linear branch. The high part stays in place.
  __device__ __forceinline__ void split_values(char* high, char* low) const {
#pragma unroll
    for (int i = 0; i < 2 * kPasses; ++i) {
      uint4* chunk = chunk_of(high, i / 2, i % 2);
      float x[8], rounded[8];
      unpack8<Element>(*chunk, x);
      const uint4 bits = pack8<__nv_bfloat16>(x);
      unpack8<__nv_bfloat16>(bits, rounded);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] -= rounded[c];
      *chunk = bits;
      *chunk_of(low, i / 2, i % 2) = pack8<__nv_bfloat16>(x);
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

  // The next task of this warpgroup, false at the end; its records and phi are made.
  __device__ __forceinline__ bool next_phi() {
    mbarrier_wait(smem_address(&smem.state_full[loads.stage]), loads.parity);
    stage_index = loads.stage % Smem::kStateStages;
    const StateTask next = first_lane_load(smem.state_task[stage_index]);
    task = {uniform(next.bh), uniform(next.block), uniform(next.slot)};
    if (task.bh < 0) return false;
    keys(smem.state[stage_index]);
    if constexpr (kQuant != SLA2_QUANT_NONE) values(smem.state[stage_index]);
    fence_async_shared();
    sync();
    return true;
  }
  // States are stored or staged.
  __device__ __forceinline__ void made() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&smem.state_made[stage_index]));
    loads.advance(kStateGroups);
  }
};

}  // namespace sla2
