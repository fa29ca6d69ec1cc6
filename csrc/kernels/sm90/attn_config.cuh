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
  static constexpr int kQueryBytes = kBlockQ * kQueryRowBytes;
  static constexpr int kKeyBytes = kBlockK * kQueryRowBytes;
  static constexpr int kValueBytes = kBlockK * kHeadDim * (kInt8 ? 1 : 2);
  static constexpr int kRegistersP = kBlockK / (kInt8 ? 32 : 16);  // A operands of P V, 4 each

  // int8: one ring of whole records. 16-bit: rings of their own, because K of the block after next
  // is wanted while V of this one is in use, and two CTAs an SM leave room for five tiles only.
  static constexpr bool kJoint = kInt8;
  static constexpr int kStagesK = kInt8 ? 4 : 3;
  static constexpr int kStagesV = kInt8 ? 0 : 2;
  static constexpr int kStageBytesK = kKeyBytes + (kJoint ? kValueBytes : 0);

  // H follows the last key block through K's ring, kRowsH features at a time: 64-column tiles side
  // by side.
  static constexpr int kRowsH = kStageBytesK / kWideRowBytes;
  static constexpr int kPartsH = kHeadDim / kRowsH;
  static_assert(kRowsH % 32 == 0, "whole groups of features");

  // The first entries of the list live in shared memory; those of longer lists are read as they
  // come.
  static constexpr int kListed = 256;

  // [Q | K ring | V ring | Z | list | K scales | scratch | producer | barriers]; tiles are
  // 1024-byte aligned for the swizzle. After the last block Q's bytes stage the output (the rings
  // may hold H). 16-bit tiles leave no room for Z: there it comes late, over the rest of Q.
  static constexpr int kKeys = kQueryBytes;
  static constexpr int kValues = kKeys + kStagesK * kStageBytesK;
  static constexpr bool kEarlyZ = kInt8;
  static constexpr int kTilesEnd = kValues + kStagesV * kValueBytes;
  static constexpr int kStagingBytes = 8 * kWideRowBytes;  // of one warp
  static constexpr int kZ = kEarlyZ ? kTilesEnd : kWarps * kStagingBytes;
  static constexpr int kList = kTilesEnd + (kEarlyZ ? 2 * kHeadDim * 4 : 0);
  static constexpr int kScales = kList + kListed * 2;      // one float a stage
  static constexpr int kScratch = kScales + kStagesK * 4;  // one float a warp
  static constexpr int kProducer = (kScratch + kWarps * 4 + 7) / 8 * 8;
  static constexpr int kFullK = kProducer + 32, kEmptyK = kFullK + kStagesK * 8;
  static constexpr int kFullV = kEmptyK + kStagesK * 8, kEmptyV = kFullV + kStagesV * 8;
  static constexpr int kFullQ = kEmptyV + kStagesV * 8;
  static constexpr int kSmemBytes = kFullQ + 8;
  static_assert(kWarps * kStagingBytes + (kEarlyZ ? 0 : 2 * kHeadDim * 4) <= kQueryBytes, "fit Q");
  static_assert(kSmemBytes <= 113 * 1024, "two CTAs an SM");
};

}  // namespace sla2
