// Tile sizes, operand types and shared-memory map of the Hopper attention kernel.
#pragma once

#include <type_traits>

#include "../common/layout.cuh"
#include "../common/params.h"
#include "wgmma.cuh"

namespace sla2 {

template <typename Element_, int kHeadDim_, int kQuant>
struct AttnConfigSm90 {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kInt8 = kQuant == SLA2_QUANT_INT8_FP8;
  static_assert(kInt8 || kQuant == SLA2_QUANT_NONE, "int8_fp16 runs on the portable path");
  using Score = std::conditional_t<kInt8, int, float>;

  // Two warpgroups of 64 query rows share every key block; warp w holds rows 16 w + lane / 4 +
  // {0, 8}.
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTilesM = 1;
  static constexpr int kTilesD = kHeadDim / 8;
  static __device__ __forceinline__ int tile_row(int) { return threadIdx.x / 32 * 16; }

  static constexpr int kQueryRowBytes = kHeadDim * (kInt8 ? 1 : 2);  // also a key's
  static constexpr int kWideRowBytes = kHeadDim * 2;                 // 16-bit rows: phi(Q), H, V
  static constexpr int kKeyBytes = kBlockK * kQueryRowBytes;
  static constexpr int kValueBytes = kBlockK * kHeadDim * (kInt8 ? 1 : 2);
  static constexpr int kRegistersP = kBlockK / (kInt8 ? 32 : 16);  // A operands of P V, 4 each

  // int8: one ring of whole records. 16-bit: rings of their own, because K of the block after next
  // is wanted while V of this one is in use, and two CTAs an SM leave room for five tiles only.
  static constexpr bool kJoint = kInt8;
  static constexpr int kStagesK = kInt8 ? 4 : 3;
  static constexpr int kStagesV = kInt8 ? 0 : 2;
  // Blocks between the one whose scores are made and the one whose place in K's ring is filled
  // again: a record is free when its V has been used, a 16-bit tile at once.
  static constexpr int kRefillLag = kJoint ? 1 : 0;
  static constexpr int kStageBytesK = kKeyBytes + (kJoint ? kValueBytes : 0);

  // H follows the last key block through K's ring, kRowsH features at a time: 64-column tiles side
  // by side.
  static constexpr int kRowsH = kStageBytesK / kWideRowBytes;
  static constexpr int kPartsH = kHeadDim / kRowsH;
  static_assert(kRowsH % 32 == 0, "whole groups of features");

  // List entries in shared memory: all of an int8_fp8 list (core/forward.cpp sends longer ones to
  // the portable path), the first of a 16-bit one, whose others are read as they come.
  static constexpr int kListed = kInt8 ? 128 : 192;

  // [Q | K ring | V ring | int8 Q | Z | list | K scales | scratch | producer | barriers]; tiles are
  // 1024-byte aligned for the swizzle. Q stays as it came, panels of 64 channels, for the linear
  // branch; when a warp has taken its 16 rows, they stage its output.
  static constexpr int kPanelBytes = kBlockQ * 128;  // of Q, 64 channels
  static constexpr int kKeys = kBlockQ * kWideRowBytes;
  static constexpr int kValues = kKeys + kStagesK * kStageBytesK;
  static constexpr int kQuery8 = kValues + kStagesV * kValueBytes;
  static constexpr int kZ = kQuery8 + (kInt8 ? kBlockQ * kHeadDim : 0);  // bf16 [2][D]
  static constexpr int kList = kZ + 4 * kHeadDim;
  static constexpr int kScales = kList + kListed * 2;                    // one float a stage
  static constexpr int kScratch = kScales + (kInt8 ? kStagesK * 4 : 0);  // one word a warp
  static constexpr int kProducer = kScratch + (kInt8 ? kWarps * 4 : 0);
  static constexpr int kProducerBytes = 40;
  static constexpr int kFullK = kProducer + kProducerBytes, kEmptyK = kFullK + kStagesK * 8;
  static constexpr int kFullV = kEmptyK + kStagesK * 8, kEmptyV = kFullV + kStagesV * 8;
  static constexpr int kFullQ = kEmptyV + kStagesV * 8;
  static constexpr int kSmemBytes = kFullQ + 8;
  static_assert(kZ % 1024 == 0 && kScratch % 16 == 0 && kProducer % 8 == 0, "aligned");
  static_assert(kSmemBytes <= 113 * 1024, "two CTAs an SM");
};

}  // namespace sla2
