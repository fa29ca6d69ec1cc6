// SLA2 forward in int8_fp8 for one query block, Hopper schedule (wgmma + asynchronous copies);
// attn_rows.cu has the 16-bit form.
//
// One CTA: 128 query rows of one head, a warpgroup for each half; both share every key block. A
// warpgroup makes P of half of a block's keys, issues O += P V over them and makes P of the other
// half meanwhile; then it issues O += P V over that together with S = Q K^T of the next block. Two
// CTAs, four warpgroups on an SM, fill what waits are left. More in flight does not fit: of the 128
// registers ptxas wants 26 beside the accumulators and A operands of products in flight, here
// 64 + 32 + 4, or it serialises all products. The warps take turns in filling the ring.
#pragma once

#include "../common/attn_output.cuh"
#include "async.cuh"
#include "attn_inputs.cuh"
#include "attn_output.cuh"
#include "attn_softmax.cuh"
#include "launch.h"
#include "row_store.cuh"
#include "tensor_map.h"

namespace sla2 {

// S = Q K^T of the warpgroup's 64 rows: issue only.
template <class C>
__device__ __forceinline__ void issue_scores(typename C::Score (&s)[32], uint32_t q_tile,
                                             uint32_t k_tile) {
  constexpr Swizzle kMode = C::kHeadDim == 128 ? Swizzle::k128 : Swizzle::k64;
  const uint64_t q = wgmma_descriptor(q_tile, 0, 8 * C::kQueryRowBytes, kMode);
  const uint64_t k = wgmma_descriptor(k_tile, 0, 8 * C::kQueryRowBytes, kMode);
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 32; ++step) {
    wgmma_s8(s, advance(q, 32 * step), advance(k, 32 * step), step > 0);
  }
}

// O += P V over the keys of k step `k`: issue only.
template <class C>
__device__ __forceinline__ void issue_values(float (&acc)[C::kTilesD][4], const uint32_t (&p)[4],
                                             uint32_t v_tile, int k) {
  auto& flat = reinterpret_cast<float (&)[C::kTilesD * 4]>(acc);
  wgmma_e4m3(flat, p, advance(wgmma_descriptor(v_tile, 0, 512, Swizzle::k64), 32 * k), 1);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(AttnConfigSm90<Element, kHeadDim>::kThreads, 2)
    attn_fwd_sm90_kernel(const __grid_constant__ AttnParams p,
                         const __grid_constant__ AttnMaps maps) {
  using C = AttnConfigSm90<Element, kHeadDim>;
  using Score = typename C::Score;
  extern __shared__ __align__(1024) char smem[];

  const int lane = threadIdx.x % 32;
  const uint32_t base = smem_address(smem);

  // Prologue: barriers, Q on its way, the list, the first entries of the ring
  auto& producer = *reinterpret_cast<Producer<C>*>(smem + C::kProducer);
  static_assert(sizeof(Producer<C>) == C::kProducerBytes, "its place in shared memory");
  float score_scale = p.softmax_scale * kLog2e;
  int count;
  {
    if (threadIdx.x < 32 && elect_one()) {
#pragma unroll
      for (int i = 0; i < C::kStages; ++i) {
        mbarrier_init(base + C::kFull + i * 8, 2);  // the scale's copy is one
        mbarrier_init(base + C::kEmpty + i * 8, C::kWarps);
      }
      mbarrier_init(base + C::kFullQ, 1);
      fence_barrier_init();
      producer.init(p);
      producer.load_query(maps, smem);
    }
    wait_predecessor();  // all below is of kernels of the same call
    // A warp for each: what one does after another, 1000 cycles a read, is not hidden.
    const int listed = p.counts[blockIdx.x];
    // Entries past the count are read too and not used.
    constexpr int kListFirst = 32, kZFirst = kListFirst + C::kListed;
    static_assert(kZFirst + kHeadDim / 4 <= C::kThreads, "a thread for each read");
    const int item = threadIdx.x - kListFirst;
    if (item >= 0 && item < min(p.max_kv_blocks, C::kListed)) {
      reinterpret_cast<uint16_t*>(smem + C::kList)[item] =
          p.lut[static_cast<int64_t>(blockIdx.x) * p.max_kv_blocks + item];
    }
    if (p.branch != SLA2_BRANCH_SPARSE && threadIdx.x >= kZFirst) {
      load_z<C>(p, smem, threadIdx.x - kZFirst);
    }
    count = p.branch == SLA2_BRANCH_LINEAR ? 0 : listed;
    // All blocks listed: no complement, alpha is 1.
    const bool linear = p.branch == SLA2_BRANCH_LINEAR ||
                        (p.branch == SLA2_BRANCH_BOTH && listed < p.shape.num_k_blocks);
    if (threadIdx.x == 0) producer.set_entries(count, linear);
    __syncthreads();
    // One warp an entry: thread 0 alone would hold up the others at the next barrier.
    static_assert(C::kStages <= C::kWarps, "one entry a warp");
    if (elect_one()) {
      const int entry = threadIdx.x / 32;
      if (entry < C::kStages) producer.load(maps, smem, entry, entry, 0);
    }
    __syncwarp();
    mbarrier_wait(base + C::kFullQ, 0);
    score_scale *= quantize_query<C>(smem);
    fence_async_shared();
    __syncthreads();
  }

  // Sparse branch. In e4m3 P carries the factor 2^8 (row sums too, so that it cancels), less the
  // headroom.
  const float shift = 8.f - kHeadroom;
  OnlineSoftmax<C::kTilesM> softmax;
  softmax.init();
  float acc[C::kTilesM][C::kTilesD][4] = {};
  if (count > 0) {
    // Shuffles tell the compiler that warps agree.
    const uint32_t ring = __shfl_sync(0xffffffffu, base, 0);
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const uint32_t q_tile = ring + C::kQuery8 + warp / 4 * 64 * C::kQueryRowBytes;
    Score s[32];
    float (&row_max)[2] = softmax.row_max[0];
    float (&row_sum)[2] = softmax.row_sum[0];
    float block_scale = score_scale;
    const auto key_tile = [&](int slot) { return ring + C::kKeys + slot * C::kStageBytes; };
    const auto value_tile = [&](int slot) { return key_tile(slot) + C::kKeyBytes; };
    // Waits for a slot's record. The floor of its scores' scale keeps -inf * scale from being NaN
    // in all-zero blocks.
    const auto wait_record = [&](int round, int slot) {
      mbarrier_wait(ring + C::kFull + slot * 8, round & 1);
      const float k_scale = reinterpret_cast<const float*>(smem + C::kScales)[slot];
      block_scale = cut_scale(max_nan(score_scale * k_scale, 1e-37f));
    };
    const auto rescale = [&](int half, float factor) {
#pragma unroll
      for (int d = 0; d < C::kTilesD; ++d) {
        acc[0][d][2 * half] *= factor;
        acc[0][d][2 * half + 1] *= factor;
      }
    };
    static_assert(C::kRegistersP == 2, "a step has two halves");
    float x[4][4];

    // From S of a block to S of the next. The block is in slot `slot`, known to the compiler.
    int round = 0;
    const auto step = [&](auto slot) {
      constexpr int kSlot = decltype(slot)::value, kNext = (kSlot + 1) % C::kStages;
      uint32_t weights[4];
      update_max<C, false>(s, kBlockK, block_scale, row_max, row_sum, rescale);
      exponentiate_step<C, false>(s, 0, kBlockK, block_scale, shift, row_max, row_sum, x);
      pack_step<C>(x, weights);
      wgmma_fence();
      issue_values<C>(acc[0], weights, value_tile(kSlot), 0);
      wgmma_commit();
      exponentiate_step<C, false>(s, 1, kBlockK, block_scale, shift, row_max, row_sum, x);
      // This wait also ends the basic block: ptxas would move exponentials behind the next one.
      wait_record(round + (kNext == 0), kNext);
      wgmma_wait<0>();
      pack_step<C>(x, weights);
      wgmma_fence();
      issue_values<C>(acc[0], weights, value_tile(kSlot), 1);
      issue_scores<C>(s, q_tile, key_tile(kNext));
      wgmma_commit();
      // In the shadow of the products the block before gives its slot to the one that is kStages
      // further on. The warps take turns: refills by one alone would hold up its warpgroup in every
      // step.
      constexpr int kLeft = (kSlot + C::kStages - 1) % C::kStages;
      const int refill = round + (kSlot > 0);  // the round of that block
      if (refill > 0 && warp == kLeft + C::kStages * (refill + 1 & 1)) {
        const int entry = detached(round) * C::kStages + kSlot + C::kStages - 1;
        if (elect_one()) producer.load(maps, smem, entry, kLeft, refill);
      }
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(ring + C::kEmpty + kSlot * 8);
    };

    pin(reinterpret_cast<float (&)[C::kTilesD * 4]>(acc[0]));
    wait_record(0, 0);
    wgmma_fence();
    issue_scores<C>(s, q_tile, key_tile(0));
    wgmma_commit();
    wgmma_wait<0>();
    static_assert(C::kStages == 4 && C::kWarps == 2 * C::kStages, "rounds of four steps");
#pragma unroll 1
    for (int left = count - 1;; left -= C::kStages, ++round) {
      if (left <= 0) break;
      step(std::integral_constant<int, 0>());
      if (left <= 1) break;
      step(std::integral_constant<int, 1>());
      if (left <= 2) break;
      step(std::integral_constant<int, 2>());
      if (left <= 3) break;
      step(std::integral_constant<int, 3>());
    }

    // The last block: the only one that may be short, as lists ascend.
    const int valid = p.shape.seqlen - listed_block<C>(smem, count - 1) * kBlockK;
    uint32_t weights[C::kRegistersP][4];
    const auto weigh_last = [&](auto masked) {
      constexpr bool kMask = decltype(masked)::value;
      update_max<C, kMask>(s, valid, block_scale, row_max, row_sum, rescale);
      exponentiate<C, kMask>(s, valid, block_scale, shift, row_max, row_sum, weights);
    };
    if (valid < kBlockK) {
      weigh_last(std::true_type{});
    } else {
      weigh_last(std::false_type{});
    }
    const uint32_t last_values = value_tile((count - 1) % C::kStages);
    wgmma_fence();
    issue_values<C>(acc[0], weights[0], last_values, 0);
    issue_values<C>(acc[0], weights[1], last_values, 1);
    wgmma_commit();
    wgmma_wait<0>();
  }

  // Epilogue: every warp on its own
  const int bh = producer.bh, block = producer.block;
  const int row0 = block * kBlockQ, rows = min(kBlockQ, p.shape.seqlen - row0);
  const bool linear = producer.linear();
  softmax.finish();
  QueryRows<C> query;
  if (linear) query.load(smem);

  // O_s is acc / l times the channel scales of a quantised V; in this order values near the end of
  // float32's range do not overflow. It is made only where it is asked for, and on the fly: the
  // output has the same bits either way.
  auto inverse_row_sum = [&](int m, int half) { return inverse_sum(softmax.row_sum[m][half]); };
  const float* v_scale = nullptr;
  if (count > 0) v_scale = p.v_scale + static_cast<int64_t>(bh) * 2 * kHeadDim + lane % 4 * 2;
  if (p.out_sparse.data != nullptr) {
    const float row_factor[2] = {inverse_row_sum(0, 0), inverse_row_sum(0, 1)};
    store_rows<C>(acc[0], smem, &maps.out_sparse, row0, producer.head, producer.batch,
                  [&](int half, int d, int parity) {
                    const float channel = v_scale != nullptr ? v_scale[8 * d + parity] : 1.f;
                    return row_factor[half] * channel;
                  });
    bulk_store_wait_read();
  }
  if (p.lse != nullptr) {
    const float correction[C::kTilesM][2] = {};  // K was smoothed before it was quantised
    store_lse<C>(p, bh, row0, rows, softmax, shift, correction);
  }
  BlendFactors<C> blend;
  blend.set_ones();
  if (linear) {
    float alpha[C::kTilesM][2], denominator[C::kTilesM][2];
    load_alpha<C>(p, producer.head, block, row0, rows, softmax, alpha);
    query.exponentiate(smem + C::kZ, denominator[0]);
    blend.set(alpha, denominator);
  }
  scale_rows<C>(
      acc, [&](int m, int half) { return inverse_row_sum(m, half) * blend.alpha_over_f[m][half]; });
  if (v_scale != nullptr) scale_channels<C>(acc, v_scale);

  // Linear branch: acc += e H
  if (linear) {
#pragma unroll
    for (int part = 0; part < C::kPartsH; ++part) {
      const int entry = count + part;
      mbarrier_wait(base + C::kFull + entry % C::kStages * 8, entry / C::kStages & 1);
    }
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < C::kPartsH; ++part) {
      const uint32_t tile = base + C::kKeys + (count + part) % C::kStages * C::kStageBytes;
      const uint64_t h = wgmma_descriptor(tile, C::kRowsH * 128, 1024, Swizzle::k128);
#pragma unroll
      for (int step = 0; step < C::kRowsH / 16; ++step) {
        uint32_t a[4];
        query.operand(a, part * (C::kRowsH / 16) + step);
        Wgmma16<__nv_bfloat16, false, true>::mma(
            reinterpret_cast<float (&)[C::kTilesD * 4]>(acc[0]), a, advance(h, 2048 * step), 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
  }
  store_rows<C>(acc[0], smem, &maps.out, row0, producer.head, producer.batch,
                [&](int half, int, int) { return blend.f[0][half]; });
  bulk_store_wait_read();
}

template <typename Element, int kHeadDim>
cudaError_t launch_attn_fwd_sm90(const AttnParams& p) {
  using C = AttnConfigSm90<Element, kHeadDim>;
  constexpr uint32_t kRowsPerWarp = kBlockQ / C::kWarps;
  AttnMaps maps = {};
  cudaError_t status = cudaSuccess;
  const auto check = [&](cudaError_t result) {
    if (status == cudaSuccess) status = result;
  };
  check(encode_tokens(maps.q, p.q, p.shape, kHeadDim, kBlockQ));
  check(encode_tokens(maps.out, p.out, p.shape, kHeadDim, kRowsPerWarp));
  if (p.out_sparse.data != nullptr) {
    check(encode_tokens(maps.out_sparse, p.out_sparse, p.shape, kHeadDim, kRowsPerWarp));
  }
  if (p.branch != SLA2_BRANCH_SPARSE) {
    constexpr uint64_t kRows = kHeadDim / 64 * kHeadDim;  // of 64 elements, a query block
    const uint64_t blocks = static_cast<uint64_t>(p.shape.num_bh) * p.shape.num_q_blocks;
    check(encode_tensor_map<3>(maps.h, p.h, {64, kRows, blocks}, {128, kRows * 128},
                               {64, C::kRowsH, 1}));
  }
  const auto kernel = attn_fwd_sm90_kernel<Element, kHeadDim>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes));
  if (status != cudaSuccess) return status;
  const int ctas = p.shape.num_bh * p.shape.num_q_blocks;
  return launch_overlapped(kernel, ctas, C::kThreads, C::kSmemBytes, p.stream, p, maps);
}

}  // namespace sla2
