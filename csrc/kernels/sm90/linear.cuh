// What the parts of the linear kernel share: how the work is cut, shared memory, counters.
//
// Two streams of tasks run side by side in every CTA, each with its own tickets:
//   state       one key block of one head: K and V records, h_j and z_j
//   complement  a tile of [H | Z] of one head, a product over all its key blocks
// A complement task waits until its head's states are complete, a state task until the head
// kStateSlots before its own, whose slot it takes, is consumed. Both wait for earlier tickets only,
// which running CTAs hold: any number of resident CTAs makes progress.
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
// Warpgroups by role; one more issues the copies.
constexpr int kComplementGroups = 2, kStateGroups = 2;
constexpr int kLinearThreads = (kComplementGroups + kStateGroups + 1) * kWarpgroup;
// Five warps of an SM quarter start with 96 registers a thread: 2 x 136 + 2 x 80 + 48 = 5 x 96.
constexpr int kComplementRegisters = 136, kStateRegisters = 80, kCopyRegisters = 48;

constexpr int kPanel = 64;                         // columns of a swizzled tile, 128 bytes a row
constexpr int kPanelBytes = kBlockK * kPanel * 2;  // of 64 tokens or 64 key blocks

// A complement tile: up to 256 query blocks, so that L2 delivers the states of 591 three times
// (tiles of 128 rows: five times, 8 GB for 40 heads), by 64 columns, which is what the accumulators
// leave. A warpgroup has up to two blocks of 64 rows.
constexpr int kRowBlock = 64, kGroupBlocks = 2;
constexpr int kTileBlocks = kComplementGroups * kGroupBlocks;
constexpr int kTileColumns = kPanel;
constexpr int kStepWords = kBlockK / 32;  // mask words of a step of 64 key blocks

struct LinearArgs {
  CUtensorMap k, v;
  CUtensorMap state;
  LinearParams p;
  int row_blocks, row_tiles;  // of 64 query blocks, of up to kTileBlocks row blocks
  int mask_pitch;
  int64_t mask_head;  // words of one head
};

// Columns of a state: h is [channel / 64][h_row][64 channels], then z as a bf16 pair (high [D], low
// [D]). Of each 32, channel 8 n + 2 t + e lies at 8 t + 2 n + e. Lane t of a quad, which holds the
// pairs n in its accumulators, so has 16 contiguous bytes where h is made, and, as the order is its
// own inverse, again where H is.

// counters: state tickets, complement tickets, then a pair for each head.
__device__ __forceinline__ int take_state_ticket(const LinearArgs& args) {
  return atomicAdd(args.p.counters, 1);
}
__device__ __forceinline__ int take_tile_ticket(const LinearArgs& args) {
  return atomicAdd(args.p.counters + 1, 1);
}
__device__ __forceinline__ int* states_ready(const LinearArgs& args, int bh) {
  return args.p.counters + 2 + 2 * bh;
}
__device__ __forceinline__ int* tiles_done(const LinearArgs& args, int bh) {
  return args.p.counters + 3 + 2 * bh;
}

// Everything this thread did or has seen becomes visible to those who see the increment.
__device__ __forceinline__ void release_increment(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
// Polls without acquire, which would empty L1 each time.
__device__ __forceinline__ void wait_counter(const int* counter, int target) {
  int value;
  do {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  } while (value < target);
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// The value of lane 0: the compiler keeps what follows from it, descriptors, in uniform registers.
template <typename T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(0xffffffffu, x, 0);
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
};

struct ComplementTile {
  int bh, column0;
  int first_block, blocks;  // row blocks
};
// Row tiles vary fastest: the CTAs that share columns of the states run together.
__device__ __forceinline__ ComplementTile complement_tile(const LinearArgs& args, int head_dim,
                                                          int ticket) {
  const int columns = state_elements(head_dim) / kTileColumns;
  const int row_tile = ticket % args.row_tiles, column_tile = ticket / args.row_tiles;
  ComplementTile tile;
  tile.bh = column_tile / columns;
  tile.column0 = column_tile % columns * kTileColumns;
  tile.first_block = row_tile * kTileBlocks;
  tile.blocks = min(kTileBlocks, args.row_blocks - tile.first_block);
  return tile;
}

template <typename Element, int kHeadDim>
struct LinearSmem {
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr bool kSplitValues = std::is_same_v<Element, __half>;
  static constexpr int kTileStages = kSplitValues && kHeadDim == 128 ? 6 : 8;
  static constexpr int kStateStages = 4;

  struct TileStage {
    char state[kPanelBytes];
    uint32_t mask[kStepWords][kTileBlocks * kRowBlock];
  };
  struct StateStage {
    char key[kPanels][kPanelBytes];  // phi takes its place
    char value[kPanels][kPanelBytes];
  };
  struct Empty {};
  struct ValueLow {
    char panel[kStateGroups][kPanelBytes];  // what bf16 leaves of fp16 values
  };

  alignas(1024) TileStage tile[kTileStages];
  alignas(1024) StateStage state[kStateStages];
  alignas(1024) std::conditional_t<kSplitValues, ValueLow, Empty> value_low;
  // Bf16 ones: the operand that sums phi. 16 rows of the hardware swizzle, all the same.
  alignas(1024) uint32_t ones[512];

  alignas(128) float k_mean[kStateStages][kHeadDim];
  float v_inverse[kStateStages][kHeadDim];
  float k_amax[kStateStages][kWarpgroup / 32];
  StateTask state_task[kStateStages];
  int tile_ticket[kTileStages];  // negative: no more tiles; at the first step of a tile

  alignas(8) uint64_t tile_full[kTileStages];
  uint64_t tile_empty[kTileStages];
  // Loaded; states stored by the four warps; free again.
  uint64_t state_full[kStateStages], state_stored[kStateStages], state_empty[kStateStages];
};

}  // namespace sla2
