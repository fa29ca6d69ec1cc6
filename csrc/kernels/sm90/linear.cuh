// What both forms of the linear kernel share: roles, tickets, counters.
//
// Two streams of tasks run side by side in every CTA, each with its own tickets:
//   state       one key block of one head: K and V records, h_j and z_j
//   complement  a tile of [H | Z] of one head, a product over all its key blocks
// A complement task waits for its head's states one step at a time, so that it begins while later
// ones are made; a state task waits until the head state_slots after its own, whose slot it takes,
// is consumed. The first missing state thus waits only for tiles of heads whose states are all
// stored, which running CTAs hold or take next: any number of resident CTAs makes progress. No role
// may hold up a task at work for one that is not ready yet.
// Heads are worked on from the last to the first: L2 still has K and V of the last ones, which the
// pooling kernel read at its end, and keeps what the attention kernel wants first.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "../common/layout.cuh"
#include "../common/params.h"
#include "async.cuh"
#include "wgmma.cuh"

namespace sla2 {

constexpr int kWarpgroup = 128;
// Warpgroups by role; one more copies. A CTA starts with 96 registers a thread, which the roles
// divide anew: setmaxnreg.
constexpr int kComplementGroups = 2, kStateGroups = 2;
constexpr int kLinearThreads = (kComplementGroups + kStateGroups + 1) * kWarpgroup;
constexpr int kRegisterPool = 5 * 96;

constexpr int kStepBlocks = 64;                    // key blocks of a step of the complement
constexpr int kPanel = 64;                         // columns of a swizzled tile, 128 bytes a row
constexpr int kPanelBytes = kBlockK * kPanel * 2;  // of 64 tokens or 64 key blocks

struct LinearArgs {
  CUtensorMap k, v;
  CUtensorMap state, mask;
  CUtensorMap h[2];  // e4m3: H of the first 64 query blocks of a tile, of the rest; see send_h
  LinearParams p;
  // Query blocks in complement tiles: of a tile (e4m3), in units of 64 (bf16); tiles of a head.
  int tile_rows, row_blocks, row_tiles;
  int head_tiles, head_reads;  // complement tiles of a head, counts of tiles_done that end it
};

// Stored states of a head are counted by steps, a byte each, eight in a word: one read tells how
// far a tile can go. At 64, bit 6 of the byte, a step is complete.
constexpr int kWordSteps = 8, kWordBlocks = kWordSteps * kStepBlocks;
constexpr uint64_t kStepStored = 0x4040404040404040u;
SLA2_HOST_DEVICE constexpr int ready_words(const Shape& shape) {
  return (shape.num_k_blocks + kWordBlocks - 1) / kWordBlocks;
}

// counters: complement tickets, state tickets, the ready words of all heads, their tiles_done.
__device__ __forceinline__ int take_ticket(int* counter) {
  int ticket;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(ticket)
               : "l"(counter)
               : "memory");
  return ticket;
}
__device__ __forceinline__ int take_tile_ticket(const LinearArgs& args) {
  return take_ticket(args.p.counters);
}
__device__ __forceinline__ int take_state_ticket(const LinearArgs& args) {
  return take_ticket(args.p.counters + 1);
}
__device__ __forceinline__ uint64_t* states_ready(const LinearArgs& args, int bh, int block) {
  return reinterpret_cast<uint64_t*>(args.p.counters + 2) + bh * ready_words(args.p.shape) +
         block / kWordBlocks;
}
__device__ __forceinline__ int* tiles_done(const LinearArgs& args, int bh) {
  return args.p.counters + 2 + 2 * args.p.bh_count * ready_words(args.p.shape) + bh;
}

// Everything this thread did or has seen becomes visible to those who see the increment.
__device__ __forceinline__ void release_increment(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void release_add(uint64_t* counter, uint64_t count) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(counter), "l"(count) : "memory");
}
// Reads without acquire, which would empty L1 at every poll: acquire_counted follows the last one.
__device__ __forceinline__ int read_counter(const int* counter) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t read_counter(const uint64_t* counter) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
  return value;
}
// What was counted may have been written and may be read by the copy engine.
__device__ __forceinline__ void acquire_counted() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  fence_async();
}

// The state of `block` is stored. A head's last block counts for all that its word has left.
__device__ __forceinline__ void release_state(const LinearArgs& args, int bh, int block) {
  const bool last = block == args.p.shape.num_k_blocks - 1;
  const uint64_t count = last ? kStepStored - block % kStepBlocks : 1;
  const int step = block / kStepBlocks % kWordSteps;
  release_add(states_ready(args, bh, block), count << 8 * step);
}
// Waits for the step that begins with `block`; those before it are stored. Returns the end of the
// steps that now are.
__device__ __forceinline__ int wait_states(const LinearArgs& args, int bh, int block) {
  const uint64_t* counter = states_ready(args, bh, block);
  int ready;
  do {
    const uint64_t missing = ~read_counter(counter) & kStepStored;
    const int steps = __clzll(__brevll(missing)) / 8;  // 8 if nothing is missing
    ready = block / kWordBlocks * kWordBlocks + steps * kStepBlocks;
  } while (ready <= block);
  acquire_counted();
  return ready;
}

// The head that is the `turn`-th to be worked on.
__device__ __forceinline__ int head_at(const LinearArgs& args, int turn) {
  return args.p.bh_count - 1 - turn;
}

// The value of lane 0: the compiler keeps what follows from it, descriptors, in uniform registers.
template <typename T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

// x in shared memory, for `uniform` to hand on: read by lane 0 alone, which later also tells the
// writer that its place is free. The arrival is then behind the read in program order.
template <typename T>
__device__ __forceinline__ T first_lane_load(const T& x) {
  T value = {};
  if (threadIdx.x % 32 == 0) value = x;
  return value;
}

// A position in a ring of kStages buffers. The consumer waits for `parity` of a full barrier, the
// producer for the opposite one of an empty barrier: its first round passes at once.
template <int kStages>
struct RingCursor {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance(int count = 1) {
    stage += count;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

struct StateTask {
  int bh;  // negative: no more tasks
  int block;
  int slot;  // in the ring of heads
};

// Shared memory of the state stream.
template <typename Element, int kHeadDim, int kStages>
struct StateSmem {
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr bool kSplitValues = std::is_same_v<Element, __half>;
  static constexpr int kStateStages = kStages;
  // Barriers of loads: each for the tasks of one warpgroup alone. A stage that the warpgroups have
  // in turn needs one for each: with a single one, who waits for the next load while the other
  // warpgroup's is under way would see the parity of the load before that.
  static constexpr int kStateLoads = kStages % kStateGroups == 0 ? kStages : kStages * kStateGroups;

  struct StateStage {
    char key[kPanels][kPanelBytes];  // phi takes its place
    char value[kPanels][kPanelBytes];
  };
  struct Empty {};
  struct ValueLow {
    char panel[kStateGroups][kPanelBytes];  // what bf16 leaves of fp16 values
  };

  alignas(1024) StateStage state[kStages];
  alignas(1024) std::conditional_t<kSplitValues, ValueLow, Empty> value_low;
  // Bf16 ones: the operand that sums phi. 16 rows of the hardware swizzle, all the same.
  alignas(1024) uint32_t ones[512];
  alignas(128) float k_mean[kStages][kHeadDim];
  StateTask state_task[kStages];
  // Loaded; states stored or staged by the four warps.
  alignas(8) uint64_t state_full[kStateLoads], state_made[kStages];

  __device__ __forceinline__ void init() {
    constexpr uint32_t kOnePair = 0x3f803f80u;
    for (uint32_t i = threadIdx.x; i < sizeof(ones) / 4; i += kLinearThreads) ones[i] = kOnePair;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStateLoads; ++i) mbarrier_init(smem_address(&state_full[i]), 1);
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(smem_address(&state_made[i]), kWarpgroup / 32);
      }
    }
  }
};

}  // namespace sla2
