// Pre-pass 2: everything the attention kernel needs of a key block in one read of K_j and V_j: int8
// K and e4m3/fp16 V records (method step 8), and the linear branch's state h_j = phi(K_j)^T V_j,
// z_j = phi(K_j)^T 1 (step 6).
#include <type_traits>

#include "../common/convert.cuh"
#include "../common/feature_map.cuh"
#include "../common/layout.cuh"
#include "../common/params.h"
#include "../common/ptx.cuh"
#include "../common/quantize.cuh"

namespace sla2 {
namespace {

constexpr int kStateThreads = 256;

template <int kHeadDim>
struct StateSmem {
  static constexpr int kTileBytes = kBlockK * kHeadDim * 2;
  static constexpr int kWarps = kStateThreads / 32;
  // phi (bf16) and V (as given), both [64 tokens][D] swizzled; the state h (bf16 [D][D]) takes
  // their place at the end.
  union {
    struct {
      alignas(128) char phi[kTileBytes];
      char value[kTileBytes];
    } tiles;
    alignas(128) char h[kHeadDim * kHeadDim * 2];
  };
  float z[kWarps][kHeadDim];
  float amax[kWarps];
};

// acc += A B with A in bf16 and B as given. fp16 values are split into two bf16 parts, which hold
// them exactly: rounding V to bf16 alone would cost fp16 users three bits of the linear branch.
template <typename Element>
__device__ __forceinline__ void mma_mixed(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    mma<__nv_bfloat16>(acc, a, b0, b1);
  } else {
    const uint32_t b[2] = {b0, b1};
    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 x = Pair<Element>::to_float2(b[i]);
      high[i] = Pair<__nv_bfloat16>::from_floats(x.x, x.y);
      const float2 rounded = Pair<__nv_bfloat16>::to_float2(high[i]);
      low[i] = Pair<__nv_bfloat16>::from_floats(x.x - rounded.x, x.y - rounded.y);
    }
    mma<__nv_bfloat16>(acc, a, high[0], high[1]);
    mma<__nv_bfloat16>(acc, a, low[0], low[1]);
  }
}

// What e4m3 keeps of a state's two features (acc[0..1], acc[2..3]) by two channels. The unit,
// 64 amax / 448, is the channel's for all blocks, so that Hopper's kernels can sum e4m3 values;
// |h| <= 64 amax, as phi <= 1, so that nothing saturates.
__device__ __forceinline__ void round_state(float (&acc)[4], float2 v_scale, float2 v_inverse) {
  constexpr float kTokens = kBlockK, kPerToken = 1.f / kBlockK;
  const float2 inverse = {v_inverse.x * kPerToken, v_inverse.y * kPerToken};
  const float2 unit = {v_scale.x * kTokens, v_scale.y * kTokens};
  uint32_t pairs[2];
  e4m3x4_to_halves(
      pack_e4m3x4(acc[0] * inverse.x, acc[1] * inverse.y, acc[2] * inverse.x, acc[3] * inverse.y),
      pairs[0], pairs[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 code = Pair<__half>::to_float2(pairs[i]);
    acc[2 * i] = code.x * unit.x;
    acc[2 * i + 1] = code.y * unit.y;
  }
}

// CTAs that must fit an SM, 0: as ptxas likes. Without the bound it fetches the scales of
// round_state early and takes up to 148 registers at D = 128, too many for two.
template <int kHeadDim, int kQuant>
constexpr int kMinCtas = kQuant == SLA2_QUANT_INT8_FP8 ? 256 / kHeadDim : 0;

// One CTA: one key block of one head. Thread t holds the eight columns 8 (t % (D/8)) of kPasses
// tokens.
template <typename Element, int kHeadDim, int kQuant>
__global__ void __launch_bounds__(kStateThreads, kMinCtas<kHeadDim, kQuant>)
    linear_state_kernel(const __grid_constant__ StateParams p) {
  constexpr int kLanesPerRow = kHeadDim / 8;
  constexpr int kRowsPerPass = kStateThreads / kLanesPerRow;
  constexpr int kPasses = kBlockK / kRowsPerPass;
  constexpr int kRowBytes = kHeadDim * 2;
  using Smem = StateSmem<kHeadDim>;
  using Record = KvRecord<kHeadDim, kQuant == SLA2_QUANT_INT8_FP8 ? 1 : 2>;
  __shared__ Smem smem;

  const int block = blockIdx.x % p.shape.num_k_blocks;
  const int local_bh = blockIdx.x / p.shape.num_k_blocks, bh = p.bh_begin + local_bh;
  const int row = threadIdx.x / kLanesPerRow, column = threadIdx.x % kLanesPerRow * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tokens = min(kBlockK, p.shape.seqlen - block * kBlockK);

  // Load
  uint4 key_bits[kPasses], value_bits[kPasses];
  {
    const Element* k = head_base<Element>(p.k, bh, p.shape.num_heads) + column;
    const Element* v = head_base<Element>(p.v, bh, p.shape.num_heads) + column;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int r = i * kRowsPerPass + row;
      const int64_t token = block * kBlockK + r;
      const uint4 zero = make_uint4(0, 0, 0, 0);
      key_bits[i] =
          r < tokens ? __ldg(reinterpret_cast<const uint4*>(k + token * p.k.stride_token)) : zero;
      value_bits[i] =
          r < tokens ? __ldg(reinterpret_cast<const uint4*>(v + token * p.v.stride_token)) : zero;
    }
  }
  float mean[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) mean[c] = p.k_mean[static_cast<int64_t>(bh) * kHeadDim + column + c];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int r = i * kRowsPerPass + row;
    *reinterpret_cast<uint4*>(smem.tiles.value + swizzle<kRowBytes>(r, column / 8)) = value_bits[i];
  }

  float key[kPasses][8];  // smoothed; zero past the end
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    unpack8<Element>(key_bits[i], key[i]);
    const bool valid = i * kRowsPerPass + row < tokens;
#pragma unroll
    for (int c = 0; c < 8; ++c) key[i][c] = valid ? key[i][c] - mean[c] : 0.f;
  }

  // Keys: int8 record
  if constexpr (kQuant != SLA2_QUANT_NONE) {
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) amax = max_nan(amax, amax8(key[i]));
    amax = max_nan(block_max<kStateThreads>(amax, smem.amax), kQuantEps);
    const float factor = kInt8Max / amax;
    const int64_t index = static_cast<int64_t>(bh) * p.shape.num_k_blocks + block;
    char* record = static_cast<char*>(p.records) + index * Record::kBytes;
    if (threadIdx.x == 0) p.k_scale[index] = amax / kInt8Max;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int offset = swizzle<kHeadDim>(i * kRowsPerPass + row, column / 16) + column % 16;
      *reinterpret_cast<uint2*>(record + offset) = pack_int8x8(key[i], factor);
    }

    // Values: fp16 rows as they are, or e4m3 columns from the shared tile (the barrier in block_max
    // published it)
    char* value_record = record + Record::kKeyBytes;
    const float* v_inverse = p.v_scale + (static_cast<int64_t>(bh) * 2 + 1) * kHeadDim;
    if constexpr (kQuant == SLA2_QUANT_INT8_FP16) {
      float inverse[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) inverse[c] = v_inverse[column + c];
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        float x[8];
        unpack8<Element>(value_bits[i], x);
#pragma unroll
        for (int c = 0; c < 8; ++c) x[c] *= inverse[c];
        const int r = i * kRowsPerPass + row;
        *reinterpret_cast<uint4*>(value_record + swizzle<kRowBytes>(r, column / 8)) =
            pack8<__half>(x);
      }
    } else {
      // ldmatrix.trans hands lane (g, t) tokens 2t, 2t+1 of channel g, and of tokens 8..15 the next
      // register: with the permutation of KvRecord exactly the four bytes that are its share of the
      // 16-token chunk. One x4 load makes two chunks.
      const uint32_t tile = smem_address(smem.tiles.value);
      constexpr int kItems = kHeadDim / 8 * 2;  // eight channels by 32 tokens
#pragma unroll
      for (int item = warp; item < kItems; item += kStateThreads / 32) {
        const int channel0 = item / 2 * 8, chunk0 = item % 2 * 2, channel = channel0 + lane / 4;
        uint32_t pairs[4];
        ldmatrix_x4_trans(pairs, tile + swizzle<kRowBytes>(chunk0 * 16 + lane, channel0 / 8));
        const float inverse = v_inverse[channel];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 low = Pair<Element>::to_float2(pairs[2 * i]);
          const float2 high = Pair<Element>::to_float2(pairs[2 * i + 1]);
          *reinterpret_cast<uint32_t*>(value_record + swizzle<64>(channel, chunk0 + i) +
                                       lane % 4 * 4) =
              pack_e4m3x4(low.x * inverse, low.y * inverse, high.x * inverse, high.y * inverse);
        }
      }
    }
  }
  if (p.state == nullptr) return;

  // phi(K_j): softmax over the feature dimension, rounded to bf16; z sums the rounded values so
  // that the linear branch stays an exact weighted mean of V
  float z[8] = {};
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int r = i * kRowsPerPass + row;
    float (&x)[8] = key[i];
    if (p.phi_raw_k) unpack8<Element>(key_bits[i], x);
    feature_map<kLanesPerRow>(x, r < tokens);
    const uint4 packed = pack8<__nv_bfloat16>(x);
    *reinterpret_cast<uint4*>(smem.tiles.phi + swizzle<kRowBytes>(r, column / 8)) = packed;
    unpack8<__nv_bfloat16>(packed, x);
#pragma unroll
    for (int c = 0; c < 8; ++c) z[c] += x[c];
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
#pragma unroll
    for (int step = 16; step >= kLanesPerRow; step /= 2)
      z[c] += __shfl_xor_sync(0xffffffffu, z[c], step);
    if (lane < kLanesPerRow) smem.z[warp][column + c] = z[c];
  }
  __syncthreads();

  // h = phi^T V: 4 x 2 warps, each D/4 features by D/2 channels
  constexpr int kWarpM = kHeadDim / 4, kWarpN = kHeadDim / 2;
  const int feature0 = warp / 2 * kWarpM, channel0 = warp % 2 * kWarpN;
  float acc[kWarpM / 16][kWarpN / 8][4] = {};
  const uint32_t phi = smem_address(smem.tiles.phi), value = smem_address(smem.tiles.value);
#pragma unroll
  for (int k = 0; k < kBlockK; k += 16) {
    uint32_t a[kWarpM / 16][4];
#pragma unroll
    for (int m = 0; m < kWarpM / 16; ++m) {
      // A is phi transposed: matrices (tokens 0-7 | 8-15) x (features 0-7 | 8-15)
      const int r = k + lane % 8 + lane / 16 * 8, feature = feature0 + 16 * m + lane / 8 % 2 * 8;
      ldmatrix_x4_trans(a[m], phi + swizzle<kRowBytes>(r, feature / 8));
    }
#pragma unroll
    for (int n = 0; n < kWarpN / 8; n += 2) {
      uint32_t b[4];
      const int r = k + lane % 16, channel = channel0 + 8 * n + lane / 16 * 8;
      ldmatrix_x4_trans(b, value + swizzle<kRowBytes>(r, channel / 8));
#pragma unroll
      for (int m = 0; m < kWarpM / 16; ++m) {
        mma_mixed<Element>(acc[m][n], a[m], b[0], b[1]);
        mma_mixed<Element>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  if constexpr (kQuant == SLA2_QUANT_INT8_FP8) {
    const float* v_scale = p.v_scale + static_cast<int64_t>(bh) * 2 * kHeadDim;
#pragma unroll
    for (int n = 0; n < kWarpN / 8; ++n) {
      const int channel = channel0 + 8 * n + lane % 4 * 2;
      const float2 scale = *reinterpret_cast<const float2*>(v_scale + channel);
      const float2 inverse = *reinterpret_cast<const float2*>(v_scale + kHeadDim + channel);
#pragma unroll
      for (int m = 0; m < kWarpM / 16; ++m) round_state(acc[m][n], scale, inverse);
    }
  }

  // Store: h through shared memory for 16-byte writes, then z
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kWarpM / 16; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpN / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int feature = feature0 + 16 * m + lane / 4 + 8 * half,
                  channel = channel0 + 8 * n + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(smem.h + swizzle<kRowBytes>(feature, channel / 8) +
                                     channel % 8 * 2) =
            Pair<__nv_bfloat16>::from_floats(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    }
  }
  __syncthreads();
  uint16_t* state = p.state + (static_cast<int64_t>(local_bh) * p.shape.num_k_blocks + block) *
                                  state_elements(kHeadDim);
#pragma unroll
  for (int i = threadIdx.x; i < kHeadDim * kLanesPerRow; i += kStateThreads) {
    const uint4 packed = *reinterpret_cast<const uint4*>(
        smem.h + swizzle<kRowBytes>(i / kLanesPerRow, i % kLanesPerRow));
    *reinterpret_cast<uint4*>(state + i * 8) = packed;
  }
  if (threadIdx.x < kHeadDim) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < Smem::kWarps; ++w) sum += smem.z[w][threadIdx.x];
    const __nv_bfloat16 high = __float2bfloat16_rn(sum);
    const __nv_bfloat16 low = __float2bfloat16_rn(sum - __bfloat162float(high));
    state[kHeadDim * kHeadDim + threadIdx.x] = __bfloat16_as_ushort(high);
    state[kHeadDim * kHeadDim + kHeadDim + threadIdx.x] = __bfloat16_as_ushort(low);
  }
}

template <typename Element, int kHeadDim>
void launch(const StateParams& p) {
  const dim3 grid(p.bh_count * p.shape.num_k_blocks);
  switch (p.quant) {
    case SLA2_QUANT_NONE:
      linear_state_kernel<Element, kHeadDim, SLA2_QUANT_NONE>
          <<<grid, kStateThreads, 0, p.stream>>>(p);
      break;
    case SLA2_QUANT_INT8_FP16:
      linear_state_kernel<Element, kHeadDim, SLA2_QUANT_INT8_FP16>
          <<<grid, kStateThreads, 0, p.stream>>>(p);
      break;
    default:
      linear_state_kernel<Element, kHeadDim, SLA2_QUANT_INT8_FP8>
          <<<grid, kStateThreads, 0, p.stream>>>(p);
  }
}

}  // namespace

cudaError_t launch_linear_state(const StateParams& p, int dtype, int head_dim) {
  if (dtype == SLA2_BFLOAT16) {
    head_dim == 128 ? launch<__nv_bfloat16, 128>(p) : launch<__nv_bfloat16, 64>(p);
  } else {
    head_dim == 128 ? launch<__half, 128>(p) : launch<__half, 64>(p);
  }
  return cudaGetLastError();
}

}  // namespace sla2
