// Tile sizes and shared-memory maps of the portable backward kernels.
#pragma once

#include "../common/layout.cuh"
#include "../common/params.h"

namespace sla2 {

constexpr int kBwdThreads = 128;
constexpr int kBwdMaxSmem = 99 * 1024;  // one CTA must fit every sm_80+ device

// By query block: 4 warps of 32 rows. Key blocks pass in halves, so that the scores of a step and
// dQ (128 registers a lane at D = 128) fit a lane together, and both stages of the ring a CTA.
template <typename Element_, int kHeadDim_>
struct BwdRowConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = kBwdThreads;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRowsPerWarp = kBlockQ / kWarps;
  static constexpr int kTilesM = kRowsPerWarp / 16;
  static constexpr int kStepKeys = 32;
  static constexpr int kTilesN = kStepKeys / 8;
  static constexpr int kTilesD = kHeadDim / 8;
  static __device__ __forceinline__ int tile_row(int m) {
    return threadIdx.x / 32 * kRowsPerWarp + 16 * m;
  }

  static constexpr int kWideRowBytes = kHeadDim * 2;
  static constexpr int kQueryBytes = kBlockQ * kWideRowBytes;
  static constexpr int kKeyBytes = kStepKeys * kWideRowBytes;
  static constexpr int kStageBytes = 2 * kKeyBytes;
  static constexpr int kStages = 2;
  static constexpr int kRingBytes = kStages * kStageBytes;
  // H, then the weights w, pass through the ring's bytes before the key blocks.
  static_assert(kHeadDim * kWideRowBytes <= kRingBytes && kQueryBytes <= kRingBytes,
                "H and w fit the ring");

  // [Q | dO | ring of K, V halves]
  static constexpr int kSmemBytes = 2 * kQueryBytes + kRingBytes;
  static_assert(kSmemBytes <= kBwdMaxSmem - 3072, "leaves room for the static arrays");
};

// By key block: S^T, dP^T of 64 keys by 64 queries are 2 x 2 warps of 32 x 32; dV and dK are 2 x 2
// warps of 32 keys by half of the channels, so that each fragment read feeds two products or more.
// P^T and dS^T change hands through shared memory between the two.
template <typename Element_, int kHeadDim_>
struct BwdColumnConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = kBwdThreads;
  static constexpr int kStepQueries = 64;
  static constexpr int kTilesM = 2;
  static constexpr int kTilesN = kStepQueries / 2 / 8;  // S^T, dP^T
  static constexpr int kTilesD = kHeadDim / 2 / 8;      // dV, dK

  static constexpr int kWideRowBytes = kHeadDim * 2;
  static constexpr int kTileBytes = kBlockK * kWideRowBytes;  // 64 rows of K, V, Q or dO
  // Q and dO of a step and the next Q; dO of the next step takes the place of Q.
  static constexpr int kRingTiles = 3;
  static constexpr int kScoreRowBytes = kStepQueries * 2;
  static constexpr int kScoreBytes = kBlockK * kScoreRowBytes;
  // At the end dh takes the ring's first two tiles, phi(K) the place of P^T and dS^T, and results
  // leave through the third tile.
  static_assert(kHeadDim * kWideRowBytes <= 2 * kTileBytes, "dh fits two tiles");
  static_assert(kTileBytes <= 2 * kScoreBytes, "phi(K) fits P^T and dS^T");

  // [K | V | ring of Q, dO | P^T | dS^T]
  static constexpr int kSmemBytes = (2 + kRingTiles) * kTileBytes + 2 * kScoreBytes;
  static_assert(kSmemBytes <= kBwdMaxSmem - 3072, "leaves room for the static arrays");

  // Accumulators of one part of a cut column: dK and dV, float4 by float4 of all threads.
  static constexpr int kSlotVectors = 2 * kTilesM * kTilesD * kThreads;
};

}  // namespace sla2
