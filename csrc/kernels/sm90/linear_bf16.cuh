// The linear branch with states in bf16 ("none", and the backward pass): the state stream's end,
// and both streams together. linear_bf16_tiles.cuh has the complement.
#pragma once

#include "../common/convert.cuh"
#include "linear_bf16_tiles.cuh"
#include "linear_state.cuh"

namespace sla2 {

// One warpgroup of the state stream.
template <class Variant>
struct Bf16StateWorker : StateWorker<Variant> {
  using Base = StateWorker<Variant>;
  using Base::args, Base::smem, Base::group, Base::warp, Base::lane, Base::task, Base::stage_index;
  using Base::Base;
  using Base::kHeadDim, Base::kPanels;
  using typename Base::Smem;
  using typename Base::Stage;

  // h: of a panel of channels.
  __device__ __forceinline__ void store_h(const float (&acc)[32], uint16_t* h, int feature0) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = feature0 + 16 * warp + lane / 4 + 8 * half;
      uint16_t* row = h + feature * kHeadDim;
#pragma unroll
      for (int i = 0; i < kPanel / 32; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float* pair = acc + 4 * (4 * i + n) + 2 * half;
          words[n] = Pair<__nv_bfloat16>::from_floats(pair[0], pair[1]);
        }
        // __stwb: an assignment came out as four 4-byte stores once, and L2 bound the kernel.
        __stwb(reinterpret_cast<uint4*>(row + i * 32 + lane % 4 * 8),
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
    const int64_t index = int64_t{1} * task.slot * args.p.shape.num_k_blocks + task.block;
    return static_cast<uint16_t*>(args.p.state) + index * state_elements(kHeadDim);
  }

  // h = phi^T V and z = phi^T 1, 64 features by 64 channels at a time.
  __device__ __forceinline__ void states(Stage& stage) const {
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel) {
      if constexpr (Smem::kSplitValues) {
        if (panel > 0) this->sync();  // every warp's products with the low part before are over
        this->split_values(stage.value[panel], smem.value_low.panel[group]);
        fence_async_shared();
        this->sync();
      }
#pragma unroll 1
      for (int m = 0; m < kPanels; ++m) {
        const uint32_t phi = uniform(smem_address(stage.key[m]));
        float acc[32], z[4];
        wgmma_fence();
        this->product(acc, phi, uniform(smem_address(stage.value[panel])), 2048, false);
        if constexpr (Smem::kSplitValues) {
          this->product(acc, phi, uniform(smem_address(smem.value_low.panel[group])), 2048, true);
        }
        this->product(z, phi, smem_address(smem.ones), 0, false);
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        pin(z);
        store_h(acc, state() + panel * kPanel, m * kPanel);
        if (panel == 0) store_z(z, state() + kHeadDim * kHeadDim, m * kPanel);
      }
    }
  }

  __device__ __forceinline__ void run() {
    while (this->next_phi()) {
      states(smem.state[stage_index]);
      this->made();
    }
  }
};

template <typename Element_, int kHeadDim_, bool kBackward_>
struct LinearBf16 {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kQuant = SLA2_QUANT_NONE;
  static constexpr bool kBackward = kBackward_, kMakesStates = true;
  using TileShape = Bf16TileShape<kComplementGroups, 2, 1>;
  using ComplementWorker = Bf16ComplementWorker<LinearBf16>;
  using StateWorker = Bf16StateWorker<LinearBf16>;
  static constexpr int kComplementRegisters = 136, kStateRegisters = 80, kCopyRegisters = 48;

  static constexpr int kTileStages = std::is_same_v<Element, __half> && kHeadDim == 128 ? 6 : 8;
  using Smem = Bf16TileSmem<TileShape, kTileStages, StateSmem<Element, kHeadDim, 4>>;

  static __device__ __forceinline__ void copies(const LinearArgs& args, Smem& smem, int warp) {
    switch (warp) {
      case 0:
        if (elect_one()) load_bf16_tiles<LinearBf16>(args, smem);
        return;
      case 1:
        if (elect_one()) StateServer<LinearBf16>(args, smem).run();
        return;
    }
  }
  // The workers have stored it.
  static __device__ __forceinline__ void store_state(const LinearArgs&, Smem&, int, StateTask) {}

  static cudaError_t encode(LinearArgs& args) { return encode_bf16_tiles<LinearBf16>(args); }
};

}  // namespace sla2
