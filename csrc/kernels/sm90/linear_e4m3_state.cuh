// What the e4m3 linear branch makes of a key block: its state, rounded, in the ring's layout.
#pragma once

#include "../common/convert.cuh"
#include "linear_state.cuh"

namespace sla2 {

// A state in units of 64 times V's scale: phi is at most 1 and a block has 64 tokens, so that
// |h| <= 64 max |V| always fits. It is cut into segments of 64 columns, two to a line of 128 bytes:
// h's features by V's panels of 64 channels, the first panel of all features before the second one,
// then four parts of z, each sixteen times finer than the one before. Within a line 16-byte chunk c
// lies at c ^ (line % 8), so that ordinary stores of eight lines meet no bank twice. A chunk holds
// the 16 columns that one warp of the complement wants, column 8 u + 2 t + e at byte 4 t + 2 u + e:
// lane t of a quad, which makes the columns 2 t + {0, 1} of two neighbouring n8 tiles, writes
// words.
template <int kHeadDim>
struct E4m3State {
  static constexpr float kUnit = 64.f;
  static constexpr int kPanels = kHeadDim / kPanel, kParts = z_parts(SLA2_QUANT_INT8_FP8);
  static constexpr int kFirstPart = kHeadDim * kPanels;  // segment
  static constexpr int kSegments = kFirstPart + kParts * kPanels;
  static constexpr int kBytes = state_bytes(kHeadDim, SLA2_QUANT_INT8_FP8);
  static constexpr int kBytesH = kFirstPart * kPanel, kBytesZ = kBytes - kBytesH;
  static constexpr int kLine = 128;

  // Of columns 16 i .. 16 i + 15 of a segment.
  __device__ static __forceinline__ int offset(int segment, int i) {
    const int line = segment / 2;
    return line * kLine + (((segment % 2 * 4 + i) ^ (line & 7)) << 4);
  }
};

// One warpgroup of the state stream.
template <class Variant>
struct E4m3StateWorker : StateWorker<Variant> {
  using Base = StateWorker<Variant>;
  using Base::args, Base::smem, Base::group, Base::warp, Base::lane, Base::task, Base::stage_index;
  using Base::Base;
  using Base::kHeadDim, Base::kPanels;
  using typename Base::Smem;
  using typename Base::Stage;
  using State = E4m3State<kHeadDim>;

  // 64 features by 64 channels of h: for each half of the lane's features and each 16 channels one
  // word.
  static constexpr int kChunks = kPanel / 16;
  using Packed = uint32_t[2][kChunks];

  __device__ __forceinline__ void pack(Packed& words, const float (&acc)[32], int panel) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float* inverse = smem.v_inverse[stage_index] + panel * kPanel + 16 * i + lane % 4 * 2;
      float factor[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 pair = *reinterpret_cast<const float2*>(inverse + 8 * n);
        factor[2 * n] = pair.x * (1.f / State::kUnit);
        factor[2 * n + 1] = pair.y * (1.f / State::kUnit);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* low = acc + 8 * i + 2 * half;  // columns 2 t, 2 t + 1 of tiles 2 i, 2 i + 1
        const float* high = low + 4;
        words[half][i] = pack_e4m3x4(low[0] * factor[0], low[1] * factor[1], high[0] * factor[2],
                                     high[1] * factor[3]);
      }
    }
  }

  // Packed features 64 m .. of a panel to its lines.
  __device__ __forceinline__ void stage_h(char* lines, const Packed& words, int m) const {
    uint32_t address = smem_address(lines) + m * kPanel / 2 * State::kLine +
                       State::offset(16 * warp + lane / 4, 0) + lane % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm("" : "+r"(address));  // keeps the compiler from holding every sum below in a register
#pragma unroll
      for (int i = 0; i < kChunks; ++i) store_shared(address ^ i << 4, words[half][i]);
      address = (address ^ 4 << 4) + 4 * State::kLine;  // eight features on: four lines
    }
  }

  // Parts of z to their lines; lane t of a quad has part t.
  __device__ __forceinline__ void stage_z(const float (&sums)[kPanels][2]) const {
    static_assert(State::kParts == 4, "one a lane");
    char* lines = reinterpret_cast<char*>(smem.k_mean[stage_index]);
    // Of column 16 warp + lane / 4, panel 0. The next panel is the line's other half, column + 8
    // the neighbouring pair of bytes.
    int offset = State::offset(lane % 4 * kPanels, warp) + lane / 8 * 4 + lane / 4 % 2;
#pragma unroll
    for (int m = 0; m < kPanels; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float rest = 4.f * sums[m][half];  // at most 256
        uint32_t byte = 0;
#pragma unroll
        for (int i = 0; i < State::kParts; ++i) {
          const uint32_t rounded = pack_e4m3x2(rest, 0.f);
          byte = i == lane % 4 ? rounded : byte;
          uint32_t value, unused;
          e4m3x4_to_halves(rounded, value, unused);
          rest = 16.f * (rest - Pair<__half>::to_float2(value).x);
        }
        lines[(offset ^ m << 6) + 2 * half] = static_cast<char>(byte);
      }
    }
  }

  // h = phi^T V and z = phi^T 1, all features by one panel of channels at a time. The results take
  // the place of the panel.
  __device__ __forceinline__ void states(Stage& stage) const {
    float sums[kPanels][2];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      if constexpr (Smem::kSplitValues) {
        this->split_values(stage.value[panel], smem.value_low.panel[group]);
        fence_async_shared();
        this->sync();
      }
      const uint32_t value = uniform(smem_address(stage.value[panel]));
      float acc[kPanels][32], z[kPanels][4];
      wgmma_fence();
#pragma unroll
      for (int m = 0; m < kPanels; ++m) {
        const uint32_t phi = uniform(smem_address(stage.key[m]));
        this->product(acc[m], phi, value, 2048, false);
        if constexpr (Smem::kSplitValues) {
          this->product(acc[m], phi, uniform(smem_address(smem.value_low.panel[group])), 2048,
                        true);
        }
        if (panel == 0) this->product(z[m], phi, smem_address(smem.ones), 0, false);
      }
      wgmma_commit();
      wgmma_wait<0>();
      Packed words[kPanels];
#pragma unroll
      for (int m = 0; m < kPanels; ++m) {
        pin(acc[m]);
        if (panel == 0) {
          pin(z[m]);
          sums[m][0] = z[m][0];  // every column is the sum
          sums[m][1] = z[m][2];
        }
        pack(words[m], acc[m], panel);
      }
      this->sync();  // every warp's products with the panel are over
#pragma unroll
      for (int m = 0; m < kPanels; ++m) stage_h(stage.value[panel], words[m], m);
    }
    stage_z(sums);
    fence_async_shared();
  }

  __device__ __forceinline__ void run() {
    while (this->next_phi()) {
      if (args.p.state != nullptr) states(smem.state[stage_index]);
      this->made();
    }
  }
};

}  // namespace sla2
