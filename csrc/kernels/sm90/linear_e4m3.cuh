// The linear branch with states in e4m3 (int8_fp8): both streams together.
// linear_e4m3_tiles.cuh has the complement, linear_e4m3_state.cuh the states.
#pragma once

#include "linear_e4m3_state.cuh"
#include "linear_e4m3_tiles.cuh"

namespace sla2 {

// kLong: sequences whose sums the products may not make in one go, see `keep`.
template <typename Element_, int kHeadDim_, bool kLong_>
struct LinearE4m3 {
  using Element = Element_;
  static constexpr bool kLong = kLong_;
  static constexpr int kHeadDim = kHeadDim_, kQuant = SLA2_QUANT_INT8_FP8;
  static constexpr bool kBackward = false;
  using ComplementWorker = E4m3ComplementWorker<LinearE4m3>;
  using StateWorker = E4m3StateWorker<LinearE4m3>;
  static constexpr int kComplementRegisters = kLong ? 120 : 112, kStateRegisters = 104;
  static constexpr int kCopyRegisters = kLong ? 32 : 48;
  // What fp16 values leave of the room.
  static constexpr int kStages = kHeadDim == 128 ? 3 : 4;

  struct Smem : StateSmem<Element, kHeadDim, kStages> {
    static constexpr int kTileStages = std::is_same_v<Element, __half> && kHeadDim == 128 ? 4 : 8;
    static constexpr int kMaskBuffers = kRoundSteps;
    // Each place has one mask warp, which so waits for every phase of its barriers.
    static_assert(kTileStages % kMaskWarps == 0 && kMaskBuffers % kMaskWarps == 0);
    static constexpr int kTileBytes = kStepBlocks * 128;
    alignas(1024) char mask[kMaskBuffers][kTileQueries * 64];
    alignas(1024) char out[kComplementGroups][64 * 128];
    alignas(1024) char tile[kTileStages][kTileBytes];
    alignas(128) uint32_t words[kTileStages][2 * kTileQueries];  // [2][tile_rows]
    float v_inverse[kStages][kHeadDim];
    Element k_range[kStages][2][kHeadDim];
    float k_amax[kStages][kWarpgroup / 32];
    E4m3Tile tile_of[kTileStages];
    alignas(8) uint64_t tile_full[kTileStages];
    uint64_t tile_empty[kTileStages], mask_full[kMaskBuffers], mask_empty[kMaskBuffers];

    __device__ __forceinline__ void init() {
      StateSmem<Element, kHeadDim, kStages>::init();
      if (threadIdx.x != 0) return;
      constexpr int kWarps = kComplementGroups * kWarpgroup / 32;
      for (int i = 0; i < kTileStages; ++i) {
        mbarrier_init(smem_address(&tile_full[i]), 1);
        mbarrier_init(smem_address(&tile_empty[i]), kWarps + 1);  // and the warp of the masks
      }
      for (int i = 0; i < kMaskBuffers; ++i) {
        mbarrier_init(smem_address(&mask_full[i]), 1);
        mbarrier_init(smem_address(&mask_empty[i]), kWarps);
      }
    }
  };

  static __device__ __forceinline__ void copies(const LinearArgs& args, Smem& smem, int warp) {
    switch (warp) {
      case 0:
        if (elect_one()) load_e4m3_tiles<LinearE4m3>(args, smem);
        return;
      case 1:
        if (elect_one()) StateServer<LinearE4m3>(args, smem).run();
        return;
      default:
        if (args.tile_rows <= 64) return expand_masks<LinearE4m3, 2>(args, smem, warp - 2);
        if (args.tile_rows <= 96) return expand_masks<LinearE4m3, 3>(args, smem, warp - 2);
        return expand_masks<LinearE4m3, 4>(args, smem, warp - 2);
    }
  }
  // From where the workers have staged it.
  static __device__ __forceinline__ void store_state(const LinearArgs& args, Smem& smem, int stage,
                                                     StateTask task) {
    using State = E4m3State<kHeadDim>;
    const int64_t index = int64_t{1} * task.slot * args.p.shape.num_k_blocks + task.block;
    char* state = static_cast<char*>(args.p.state) + index * State::kBytes;
    bulk_store(state, smem_address(smem.state[stage].value), State::kBytesH);
    bulk_store(state + State::kBytesH, smem_address(smem.k_mean[stage]), State::kBytesZ);
    bulk_store_commit();
  }

  static cudaError_t encode(LinearArgs& args) {
    using State = E4m3State<kHeadDim>;
    const LinearParams& p = args.p;
    const int queries = p.shape.num_q_blocks;
    constexpr int kMostRows = kLong ? kLongTileRows : kTileQueries;
    args.row_tiles = (queries + kMostRows - 1) / kMostRows;
    args.tile_rows =
        kLong ? kLongTileRows : tile_rows((queries + args.row_tiles - 1) / args.row_tiles);
    args.head_tiles = args.row_tiles * (State::kSegments / 2);
    args.head_reads = kMaskWarps * args.head_tiles;
    if (p.state == nullptr) return cudaSuccess;
    const uint64_t blocks = p.shape.num_k_blocks, slots = p.state_slots;
    cudaError_t status = encode_tensor_map<3>(args.state, p.state, {State::kBytes, blocks, slots},
                                              {State::kBytes, blocks * State::kBytes},
                                              {State::kLine, kStepBlocks, 1}, 1);
    if (status == cudaSuccess) {
      status = encode_mask(args.mask, p, static_cast<uint32_t>(args.tile_rows));
    }
    constexpr uint64_t kLines = kHeadDim / kPanel * kHeadDim, kBytes = kLines * kPanel * 2;
    for (int part = 0; part < 2 && status == cudaSuccess; ++part) {
      const int rows = part == 0 ? 64 : args.tile_rows - 64;
      if (rows == 0) continue;
      status = encode_tensor_map<4>(
          args.h[part], p.h,
          {kPanel, kLines, static_cast<uint64_t>(queries), static_cast<uint64_t>(p.bh_count)},
          {kPanel * 2, kBytes, queries * kBytes}, {kPanel, 1, static_cast<uint32_t>(rows), 1});
    }
    return status;
  }

 private:
  // The width of the products that holds `rows` query blocks.
  static int tile_rows(int rows) {
    for (const int width : {64, 96, 120}) {
      if (rows <= width) return width;
    }
    return kTileQueries;
  }
};

}  // namespace sla2
