// SLA2 forward for one query block, portable tensor-core schedule (mma.sync + cp.async).
//
// One CTA: 128 query rows of one head. It walks the block's list of key blocks (S = Q K^T, online
// softmax, O += P V), then adds the linear branch as one more product on the same accumulators
// (attn_linear.cuh), so that the blend costs no extra pass, and stores O once.
#pragma once

#include "../common/attn_output.cuh"
#include "attn_config.cuh"
#include "attn_linear.cuh"
#include "attn_sparse.cuh"
#include "soft_map.cuh"

namespace sla2 {

// With kSoft a soft map m is given, and the lists hold the blocks whose m matters: P is m 2^(S -
// max), and only rows of ones have no linear branch.
template <typename Element, int kHeadDim, int kQuant, bool kSoft>
__global__ void __launch_bounds__(AttnConfig<Element, kHeadDim, kQuant>::kThreads, 2)
    attn_fwd_kernel(const __grid_constant__ AttnParams p) {
  using C = AttnConfig<Element, kHeadDim, kQuant>;
  extern __shared__ __align__(128) char smem[];
  __shared__ float scratch[C::kWarps];
  __shared__ __align__(16) float z[2 * kHeadDim];

  const int block = blockIdx.x % p.shape.num_q_blocks, bh = blockIdx.x / p.shape.num_q_blocks;
  const int lane = threadIdx.x % 32;
  const int row0 = block * kBlockQ, rows = min(kBlockQ, p.shape.seqlen - row0);
  const int num_k_blocks = p.shape.num_k_blocks;
  const int64_t list = static_cast<int64_t>(bh) * p.shape.num_q_blocks + block;
  const uint16_t* lut = p.lut + list * p.max_kv_blocks;
  const int listed = p.counts[list];
  const int count = p.branch == SLA2_BRANCH_LINEAR ? 0 : listed;
  bool complement = listed < num_k_blocks;  // without one alpha is 1
  if constexpr (kSoft) {
    complement = !covers_all<C::kThreads>(p.soft_map + list * num_k_blocks, num_k_blocks);
  }
  const bool linear =
      p.branch == SLA2_BRANCH_LINEAR || (p.branch == SLA2_BRANCH_BOTH && complement);
  const Element* q = head_base<Element>(p.q, bh, p.shape.num_heads) + row0 * p.q.stride_token;
  const uint32_t q_tile = smem_address(smem), ring = q_tile + C::kQueryBytes;

  // The ring takes the listed key blocks, then the parts of H. What the loop needs of a block
  // besides its bytes travels in `pending`, read when its copy is issued: the scale of K or m,
  // negative for a block shorter than 64 tokens.
  int loaded = 0, load_part = linear ? 0 : C::kPartsH, next_j = count > 0 ? lut[0] : 0;
  float pending[C::kStages - 1];
  auto load_next = [&](int stage) {
    const uint32_t tile = ring + stage * C::kStageBytes;
    if (loaded < count) {
      const int j = next_j;
      float scale = 1.f;
      if constexpr (C::kInt8) {
        scale = p.k_scale[static_cast<int64_t>(bh) * num_k_blocks + j];
        const int64_t record = static_cast<int64_t>(bh) * num_k_blocks + j;
        load_image<C::kStageBytes, C::kThreads>(
            tile, static_cast<const char*>(p.records) + record * C::kStageBytes);
      } else {
        if constexpr (kSoft) scale = __ldg(p.soft_map + list * num_k_blocks + j);
        const int64_t token = static_cast<int64_t>(j) * kBlockK;
        const int valid = p.shape.seqlen - j * kBlockK;
        load_wide_rows<C, kBlockK>(
            tile, head_base<Element>(p.k, bh, p.shape.num_heads) + token * p.k.stride_token,
            p.k.stride_token, valid);
        load_wide_rows<C, kBlockK>(
            tile + C::kKeyBytes,
            head_base<Element>(p.v, bh, p.shape.num_heads) + token * p.v.stride_token,
            p.v.stride_token, valid);
      }
      pending[C::kStages - 2] = p.shape.seqlen - j * kBlockK < kBlockK ? -scale : scale;
      if (++loaded < count) next_j = lut[loaded];
    } else if (load_part < C::kPartsH) {
      load_h<C>(tile, p.h + list * kHeadDim * kHeadDim, load_part++);
    }
    cp_async_commit();
  };
  auto load_next_part = [&](int stage) {  // the same once the list is through
    if (load_part < C::kPartsH) {
      load_h<C>(ring + stage * C::kStageBytes, p.h + list * kHeadDim * kHeadDim, load_part++);
    }
    cp_async_commit();
  };

  // Prologue: Q, Z and the first entries of the ring
  if constexpr (!C::kInt8) load_wide_rows<C, kBlockQ>(q_tile, q, p.q.stride_token, rows);
  if (linear && threadIdx.x < 2 * kHeadDim / 4) {
    cp_async_16(smem_address(z) + threadIdx.x * 16, p.z + list * 2 * kHeadDim + threadIdx.x * 4);
  }
#pragma unroll
  for (int stage = 0; stage < C::kStages - 1; ++stage) {
#pragma unroll
    for (int i = 0; i + 1 < C::kStages - 1; ++i) pending[i] = pending[i + 1];
    load_next(stage);
  }
  float score_scale = p.softmax_scale * kLog2e;
  if constexpr (C::kInt8)
    score_scale *= quantize_query<C>(smem, scratch, q, p.q.stride_token, rows);

  // Sparse branch. In e4m3 P carries the factor 2^8 (row sums too, so that it cancels), less the
  // headroom.
  const float shift = C::kE4m3 ? 8.f - kHeadroom : 0.f;
  OnlineSoftmax<C::kTilesM> softmax;
  softmax.init();
  float acc[C::kTilesM][C::kTilesD][4] = {};
  int stage = 0;
  auto wait_for_stage = [&] {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
  };
  auto free_stage = [&] {
    return stage == 0 ? C::kStages - 1 : stage - 1;
  };  // all warps are done with it now
  auto release_stage = [&] { stage = stage == C::kStages - 1 ? 0 : stage + 1; };
  for (int position = 0; position < count; ++position) {
    const float factor = pending[0];
    const bool is_short = __float_as_int(factor) < 0;
    float block_scale = score_scale;
    if constexpr (C::kInt8) {
      // The floor keeps -inf * scale from being NaN in all-zero blocks.
      block_scale = cut_scale(max_nan(block_scale * fabsf(factor), 1e-37f));
    }
#pragma unroll
    for (int i = 0; i + 1 < C::kStages - 1; ++i) pending[i] = pending[i + 1];
    wait_for_stage();
    load_next(free_stage());
    const uint32_t k_tile = ring + stage * C::kStageBytes;
    float s[C::kTilesM][C::kTilesN][4];
    scores<C>(s, q_tile, k_tile);
    if (is_short) mask_columns(s, p.shape.seqlen % kBlockK);
    float bias = 0.f;
    if constexpr (C::kInt8) {
      bias = kScoreBias;
      if (!(block_scale < kFoldableScale)) {
        subtract(s, kScoreBias);
        bias = 0.f;
      }
    }
    softmax.update(s, block_scale, kSoft ? log2_approx(fabsf(factor)) : shift, bias, acc);
    accumulate_values<C>(acc, s, k_tile + C::kKeyBytes);
    release_stage();
  }
  if (count == 0) {  // nothing has waited for Q yet, and its bytes are about to stage the output
    cp_async_wait<0>();
    __syncthreads();
  }

  softmax.finish();

  // O_s is acc / l times the channel scales of a quantised V; in this order values near the end of
  // float32's range do not overflow. It is made only where it is asked for, and on the fly: the
  // output has the same bits either way.
  auto inverse_row_sum = [&](int m, int half) { return inverse_sum(softmax.row_sum[m][half]); };
  const float* v_scale = nullptr;
  if constexpr (C::kInt8) {
    v_scale = p.v_scale + static_cast<int64_t>(bh) * 2 * kHeadDim + lane % 4 * 2;
    if (count == 0) v_scale = nullptr;
  }
  // The warp's own rows of Q: others may still be reading theirs.
  char* staging = smem + C::tile_row(0) * C::kQueryRowBytes;
  if (p.out_sparse.data != nullptr) {
    store_rows<C>(acc, p.out_sparse, bh, p.shape.num_heads, row0, rows, staging, inverse_row_sum,
                  v_scale);
  }
  QueryFeatures<C> features;
  const bool needs_query = linear || (!C::kInt8 && p.lse != nullptr);
  if (needs_query) features.load(q, p.q.stride_token, rows);

  // In "none" S was of raw K: smoothing subtracts q . mean(K) from every logit.
  float correction[C::kTilesM][2] = {};
  if (needs_query)
    features.scan(C::kInt8 ? nullptr : p.k_mean + static_cast<int64_t>(bh) * kHeadDim, correction);
  if (p.lse != nullptr) {
    store_lse<C>(p, bh, row0, rows, softmax, shift, correction);
  }

  BlendFactors<C> blend;
  blend.set_ones();
  if (linear) {
    wait_for_stage();  // Z came with the ring's first entry
    float denominator[C::kTilesM][2];
    features.exponentiate(z, denominator);
    float alpha[C::kTilesM][2];
    load_alpha<C>(p, bh % p.shape.num_heads, block, row0, rows, softmax, alpha);
    blend.set(alpha, denominator);
  }
  scale_rows<C>(
      acc, [&](int m, int half) { return inverse_row_sum(m, half) * blend.alpha_over_f[m][half]; });
  if constexpr (C::kInt8) {
    if (v_scale != nullptr) scale_channels<C>(acc, v_scale);
  }

  // Linear branch
  if (linear) {
#pragma unroll 1
    for (int part = 0; part < C::kPartsH; ++part) {
      if (part > 0) wait_for_stage();
      load_next_part(free_stage());
      accumulate_linear<C>(acc, features, ring + stage * C::kStageBytes);
      release_stage();
    }
  }
  store_rows<C>(
      acc, p.out, bh, p.shape.num_heads, row0, rows, staging,
      [&](int m, int half) { return blend.f[m][half]; }, nullptr);
}

template <typename Element, int kHeadDim, int kQuant>
cudaError_t launch_attn_fwd(const AttnParams& p) {
  using C = AttnConfig<Element, kHeadDim, kQuant>;
  auto kernel = attn_fwd_kernel<Element, kHeadDim, kQuant, false>;
  if constexpr (kQuant == SLA2_QUANT_NONE) {
    if (p.soft_map != nullptr) kernel = attn_fwd_kernel<Element, kHeadDim, kQuant, true>;
  }
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
  if (status != cudaSuccess) return status;
  kernel<<<p.shape.num_bh * p.shape.num_q_blocks, C::kThreads, C::kSmemBytes, p.stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sla2
