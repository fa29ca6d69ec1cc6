// Tile sizes, operand types and shared-memory map of the Hopper attention kernel of int8_fp8.
#pragma once

#include "../common/layout.cuh"
#include "../common/params.h"
#include "wgmma.cuh"

namespace sla2 {

template <typename Element_, int kHeadDim_>
struct AttnConfigSm90 {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kInt8 = true;
  using Score = int;

  // Two warpgroups of 64 query rows share every key block; warp w holds rows 16 w + lane / 4 +
  // {0, 8}.
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTilesM = 1;
  static constexpr int kTilesD = kHeadDim / 8;
  static __device__ __forceinline__ int tile_row(int) { return threadIdx.x / 32 * 16; }

  static constexpr int kQueryRowBytes = kHeadDim;     // also a key's
  static constexpr int kWideRowBytes = kHeadDim * 2;  // 16-bit rows: phi(Q), H, V
  static constexpr int kKeyBytes = kBlockK * kQueryRowBytes;
  static constexpr int kValueBytes = kBlockK * kHeadDim;
  static constexpr int kRegistersP = kBlockK / 32;  // A operands of P V, 4 each

  // A ring of whole records.
  static constexpr int kStages = 4;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;

  // H follows the last key block through the ring, kRowsH features at a time: 64-column tiles side
  // by side.
  static constexpr int kRowsH = kStageBytes / kWideRowBytes;
  static constexpr int kPartsH = kHeadDim / kRowsH;
  static_assert(kRowsH % 32 == 0, "whole groups of features");

  // Entries of a list (core/forward.cpp sends longer ones to the portable path).
  static constexpr int kListed = 128;

  // [Q | ring | int8 Q | Z | list | K scales | scratch | producer | barriers]; tiles are 1024-byte
  // aligned for the swizzle. Q stays as it came, panels of 64 channels, for the linear branch; when
  // a warp has taken its 16 rows, they stage its output.
  static constexpr int kPanelBytes = kBlockQ * 128;  // of Q, 64 channels
  static constexpr int kKeys = kBlockQ * kWideRowBytes;
  static constexpr int kQuery8 = kKeys + kStages * kStageBytes;
  static constexpr int kZ = kQuery8 + kBlockQ * kHeadDim;  // bf16 [2][D]
  static constexpr int kList = kZ + 4 * kHeadDim;
  static constexpr int kScales = kList + kListed * 2;     // one float a stage
  static constexpr int kScratch = kScales + kStages * 4;  // one word a warp
  static constexpr int kProducer = kScratch + kWarps * 4;
  static constexpr int kProducerBytes = 40;
  static constexpr int kFull = kProducer + kProducerBytes, kEmpty = kFull + kStages * 8;
  static constexpr int kFullQ = kEmpty + kStages * 8;
  static constexpr int kSmemBytes = kFullQ + 8;
  static_assert(kZ % 1024 == 0 && kScratch % 16 == 0 && kProducer % 8 == 0, "aligned");
  static_assert(kSmemBytes <= 113 * 1024, "two CTAs an SM");
};

}  // namespace sla2
