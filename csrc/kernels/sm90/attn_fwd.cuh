// SLA2 forward in int8_fp8 for one query block, Hopper schedule (wgmma + asynchronous copies);
// attn_rows.cu has the 16-bit form.
//
// One CTA: 128 query rows of one head, a warpgroup for each half; both share every key block. A
// warpgroup takes the softmax of S(j), then O += P V(j), then S(j+1) = Q K^T, one after the other:
// two CTAs, four warpgroups on an SM, fill each other's waits. Holding P or a second S while a
// product runs does not fit 128 registers. The warps take turns in filling the ring.
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

// O += P V: issue only.
template <class C>
__device__ __forceinline__ void issue_values(float (&acc)[C::kTilesD][4],
                                             const uint32_t (&p)[C::kRegistersP][4],
                                             uint32_t v_tile) {
  auto& flat = reinterpret_cast<float (&)[C::kTilesD * 4]>(acc);
  const uint64_t v = wgmma_descriptor(v_tile, 0, 512, Swizzle::k64);
#pragma unroll
  for (int k = 0; k < C::kRegistersP; ++k) wgmma_e4m3(flat, p[k], advance(v, 32 * k), 1);
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
      if (entry < C::kStages) producer.load(maps, smem, entry);
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
  // Slots and parities follow from the entry's number: entry e of the ring is block e of the list,
  // or part e - count of H.
  auto wait_entry = [&](int entry) {
    mbarrier_wait(base + C::kFull + entry % C::kStages * 8, entry / C::kStages & 1);
  };
  auto key_tile = [&](int entry) { return base + C::kKeys + entry % C::kStages * C::kStageBytes; };
  if (count > 0) {
    // The warpgroup's rows of Q; a shuffle tells the compiler that warps agree.
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    const uint32_t q_tile = base + C::kQuery8 + group * 64 * C::kQueryRowBytes;
    Score s[32];
    uint32_t weights[C::kRegistersP][4];
    float (&row_max)[2] = softmax.row_max[0];
    float (&row_sum)[2] = softmax.row_sum[0];
    float block_scale = score_scale;
    auto release = [&](int entry) {
      if (lane == 0) mbarrier_arrive(base + C::kEmpty + entry % C::kStages * 8);
    };
    auto value_tile = [&](int entry) { return key_tile(entry) + C::kKeyBytes; };
    // The scale of a block's scores; the floor keeps -inf * scale from being NaN in all-zero
    // blocks.
    auto read_scale = [&](int entry) {
      const float k_scale = reinterpret_cast<const float*>(smem + C::kScales)[entry % C::kStages];
      block_scale = cut_scale(max_nan(score_scale * k_scale, 1e-37f));
    };
    // Fill again what the block before has left. The warps take turns: refills of one warp alone
    // would hold up its warpgroup in every step.
    auto refill = [&](int entry) {
      // A copy: what only one thread does with the number keeps it out of the uniform registers.
      const int left = detached(entry) - 1;
      if (left >= 0 && static_cast<int>(threadIdx.x) / 32 == left % C::kWarps) {
        if (elect_one()) producer.load(maps, smem, left + C::kStages);
      }
    };
    auto rescale = [&](int half, float factor) {
#pragma unroll
      for (int d = 0; d < C::kTilesD; ++d) {
        acc[0][d][2 * half] *= factor;
        acc[0][d][2 * half + 1] *= factor;
      }
    };
    pin(reinterpret_cast<float (&)[C::kTilesD * 4]>(acc[0]));
    wait_entry(0);
    read_scale(0);
    wgmma_fence();
    issue_scores<C>(s, q_tile, key_tile(0));
    wgmma_commit();
    wgmma_wait<0>();

#pragma unroll 1
    for (int entry = 0; entry + 1 < count; ++entry) {
      if (entry > 0) release(entry - 1);
      update_max<C, false>(s, kBlockK, block_scale, row_max, row_sum, rescale);
      exponentiate<C, false>(s, kBlockK, block_scale, shift, row_max, row_sum, weights);
      // This wait also ends the basic block: ptxas would move exponentials behind the products.
      wait_entry(entry + 1);
      read_scale(entry + 1);
      wgmma_fence();
      issue_values<C>(acc[0], weights, value_tile(entry));
      wgmma_commit();
      refill(entry);  // in the shadow of the product
      wgmma_wait<0>();
      wgmma_fence();
      issue_scores<C>(s, q_tile, key_tile(entry + 1));
      wgmma_commit();
      wgmma_wait<0>();
    }

    // The last block: the only one that may be short, as lists ascend.
    const int valid = p.shape.seqlen - listed_block<C>(smem, count - 1) * kBlockK;
    auto weigh_last = [&](auto masked) {
      constexpr bool kMask = decltype(masked)::value;
      update_max<C, kMask>(s, valid, block_scale, row_max, row_sum, rescale);
      exponentiate<C, kMask>(s, valid, block_scale, shift, row_max, row_sum, weights);
    };
    if (valid < kBlockK) {
      weigh_last(std::true_type{});
    } else {
      weigh_last(std::false_type{});
    }
    wgmma_fence();
    issue_values<C>(acc[0], weights, value_tile(count - 1));
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
    load_alpha<C>(p, bh, block, row0, rows, softmax, alpha);
    query.exponentiate(smem + C::kZ, denominator[0]);
    blend.set(alpha, denominator);
  }
  scale_rows<C>(
      acc, [&](int m, int half) { return inverse_row_sum(m, half) * blend.alpha_over_f[m][half]; });
  if (v_scale != nullptr) scale_channels<C>(acc, v_scale);

  // Linear branch: acc += e H
  if (linear) {
#pragma unroll
    for (int part = 0; part < C::kPartsH; ++part) wait_entry(count + part);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < C::kPartsH; ++part) {
      const uint64_t h =
          wgmma_descriptor(key_tile(count + part), C::kRowsH * 128, 1024, Swizzle::k128);
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
