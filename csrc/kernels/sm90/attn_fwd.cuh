// SLA2 forward for one query block, Hopper schedule (wgmma + asynchronous copies).
//
// One CTA: 128 query rows of one head, a warpgroup for each half; both share every key block. A
// warpgroup takes the softmax of S(j), then O += P V(j), then S(j+1) = Q K^T, one after the other:
// two CTAs, four warpgroups on an SM, fill each other's waits. Holding P or a second S while a
// product runs does not fit 128 registers. The warps take turns in filling the rings.
#pragma once

#include "../common/attn_output.cuh"
#include "async.cuh"
#include "attn_inputs.cuh"
#include "attn_output.cuh"
#include "attn_softmax.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace sla2 {

// S = Q K^T of the warpgroup's 64 rows: issue only.
template <class C>
__device__ __forceinline__ void issue_scores(typename C::Score (&s)[32], uint32_t q_tile,
                                             uint32_t k_tile) {
  if constexpr (C::kInt8) {
    constexpr Swizzle kMode = C::kHeadDim == 128 ? Swizzle::k128 : Swizzle::k64;
    const uint64_t q = wgmma_descriptor(q_tile, 0, 8 * C::kQueryRowBytes, kMode);
    const uint64_t k = wgmma_descriptor(k_tile, 0, 8 * C::kQueryRowBytes, kMode);
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 32; ++step) {
      wgmma_s8(s, advance(q, 32 * step), advance(k, 32 * step), step > 0);
    }
  } else {
    const uint64_t q = wgmma_descriptor(q_tile, 0, 1024, Swizzle::k128);
    const uint64_t k = wgmma_descriptor(k_tile, 0, 1024, Swizzle::k128);
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      Wgmma16<typename C::Element, false, false>::mma(
          s, advance(q, step / 4 * kBlockQ * 128 + step % 4 * 32),
          advance(k, step / 4 * kBlockK * 128 + step % 4 * 32), step > 0);
    }
  }
}

// O += P V: issue only.
template <class C>
__device__ __forceinline__ void issue_values(float (&acc)[C::kTilesD][4],
                                             const uint32_t (&p)[C::kRegistersP][4],
                                             uint32_t v_tile) {
  auto& flat = reinterpret_cast<float (&)[C::kTilesD * 4]>(acc);
  if constexpr (C::kInt8) {
    const uint64_t v = wgmma_descriptor(v_tile, 0, 512, Swizzle::k64);
#pragma unroll
    for (int k = 0; k < C::kRegistersP; ++k) wgmma_e4m3(flat, p[k], advance(v, 32 * k), 1);
  } else {
    const uint64_t v = wgmma_descriptor(v_tile, kBlockK * 128, 1024, Swizzle::k128);
#pragma unroll
    for (int k = 0; k < C::kRegistersP; ++k) {
      Wgmma16<typename C::Element, false, true>::mma(flat, p[k], advance(v, 2048 * k), 1);
    }
  }
}

template <typename Element, int kHeadDim, int kQuant>
__global__ void __launch_bounds__(AttnConfigSm90<Element, kHeadDim, kQuant>::kThreads, 2)
    attn_fwd_sm90_kernel(const __grid_constant__ AttnParams p,
                         const __grid_constant__ AttnMaps maps) {
  using C = AttnConfigSm90<Element, kHeadDim, kQuant>;
  using Score = typename C::Score;
  extern __shared__ __align__(1024) char smem[];

  const int lane = threadIdx.x % 32;
  const uint32_t base = smem_address(smem);

  // Prologue: barriers, Q on its way, the list, the first entries of the rings
  auto& producer = *reinterpret_cast<Producer<C>*>(smem + C::kProducer);
  static_assert(sizeof(Producer<C>) == C::kProducerBytes, "its place in shared memory");
  float score_scale = p.softmax_scale * kLog2e;
  int count;
  {
    if (threadIdx.x < 32 && elect_one()) {
#pragma unroll
      for (int i = 0; i < C::kStagesK; ++i) {
        mbarrier_init(base + C::kFullK + i * 8, C::kJoint ? 2 : 1);  // the scale's copy is one
        mbarrier_init(base + C::kEmptyK + i * 8, C::kWarps);
      }
#pragma unroll
      for (int i = 0; i < C::kStagesV; ++i) {
        mbarrier_init(base + C::kFullV + i * 8, 1);
        mbarrier_init(base + C::kEmptyV + i * 8, C::kWarps);
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
    static_assert(C::kStagesK + C::kStagesV <= C::kWarps, "one entry a warp");
    if (elect_one()) {
      const int entry = threadIdx.x / 32;
      if (entry < C::kStagesK) {
        producer.load_key(p, maps, smem, entry);
      } else if (entry < C::kStagesK + C::kStagesV) {
        producer.load_value(p, maps, smem, entry - C::kStagesK);
      }
    }
    __syncwarp();
    mbarrier_wait(base + C::kFullQ, 0);
    if constexpr (C::kInt8) {
      score_scale *= quantize_query<C>(smem);
      fence_async_shared();
      __syncthreads();
    }
  }

  // Sparse branch. In e4m3 P carries the factor 2^8 (row sums too, so that it cancels), less the
  // headroom.
  const float shift = C::kInt8 ? 8.f - kHeadroom : 0.f;
  OnlineSoftmax<C::kTilesM> softmax;
  softmax.init();
  float acc[C::kTilesM][C::kTilesD][4] = {};
  // Slots and parities follow from the entry's number: entry e of K's ring is block e of the list,
  // or part e - count of H.
  auto wait_key = [&](int entry) {
    mbarrier_wait(base + C::kFullK + entry % C::kStagesK * 8, entry / C::kStagesK & 1);
  };
  auto key_tile = [&](int entry) {
    return base + C::kKeys + entry % C::kStagesK * C::kStageBytesK;
  };
  if (count > 0) {
    // The warpgroup's rows of Q; a shuffle tells the compiler that warps agree.
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    const uint32_t q_tile =
        base + (C::kInt8 ? C::kQuery8 + group * 64 * C::kQueryRowBytes : group * 64 * 128);
    Score s[32];
    uint32_t weights[C::kRegistersP][4];
    float (&row_max)[2] = softmax.row_max[0];
    float (&row_sum)[2] = softmax.row_sum[0];
    float block_scale = score_scale;
    auto release_key = [&](int entry) {
      if (lane == 0) mbarrier_arrive(base + C::kEmptyK + entry % C::kStagesK * 8);
    };
    auto release_value = [&](int entry) {
      if constexpr (C::kJoint) {
        release_key(entry);
      } else {
        if (lane == 0) mbarrier_arrive(base + C::kEmptyV + entry % C::kStagesV * 8);
      }
    };
    auto wait_value = [&](int entry) {
      if constexpr (!C::kJoint) {
        mbarrier_wait(base + C::kFullV + entry % C::kStagesV * 8, entry / C::kStagesV & 1);
      }
    };
    auto value_tile = [&](int entry) {
      return C::kJoint ? key_tile(entry) + C::kKeyBytes
                       : base + C::kValues + entry % C::kStagesV * C::kValueBytes;
    };
    // The scale of a block's scores; the floor keeps -inf * scale from being NaN in all-zero
    // blocks.
    auto read_scale = [&](int entry) {
      if constexpr (C::kInt8) {
        const float k_scale =
            reinterpret_cast<const float*>(smem + C::kScales)[entry % C::kStagesK];
        block_scale = cut_scale(max_nan(score_scale * k_scale, 1e-37f));
      }
    };
    // Fill again what an earlier block has left. The warps take turns: refills of one warp alone
    // would hold up its warpgroup in every step.
    auto on_duty = [&](int left) {
      return left >= 0 && static_cast<int>(threadIdx.x) / 32 == left % C::kWarps;
    };
    auto refill_keys = [&](int entry) {
      // A copy: what only one thread does with the number keeps it out of the uniform registers.
      const int left = detached(entry) - C::kRefillLag;
      if (on_duty(left)) {
        if (elect_one()) producer.load_key(p, maps, smem, left + C::kStagesK);
      }
    };
    auto refill_values = [&](int entry) {
      if constexpr (!C::kJoint) {
        const int left = detached(entry) - 1;
        if (on_duty(left)) {
          if (elect_one()) producer.load_value(p, maps, smem, left + C::kStagesV);
        }
      }
    };
    pin(reinterpret_cast<float (&)[C::kTilesD * 4]>(acc[0]));
    wait_key(0);
    read_scale(0);
    wgmma_fence();
    issue_scores<C>(s, q_tile, key_tile(0));
    wgmma_commit();
    wgmma_wait<0>();

#pragma unroll 1
    for (int entry = 0; entry + 1 < count; ++entry) {
      if constexpr (!C::kJoint) release_key(entry);
      if (entry > 0) release_value(entry - 1);
      update_max<C, false>(s, kBlockK, block_scale, row_max, row_sum, acc[0]);
      exponentiate<C, false>(s, kBlockK, block_scale, shift, row_max, row_sum, weights);
      refill_values(entry);  // two V tiles are all the ring holds: as early as can be
      // These waits also end the basic block: ptxas would move exponentials behind the products.
      wait_key(entry + 1);
      wait_value(entry);
      read_scale(entry + 1);
      wgmma_fence();
      issue_values<C>(acc[0], weights, value_tile(entry));
      wgmma_commit();
      refill_keys(entry);  // in the shadow of the product
      wgmma_wait<0>();
      wgmma_fence();
      issue_scores<C>(s, q_tile, key_tile(entry + 1));
      wgmma_commit();
      wgmma_wait<0>();
    }

    // The last block: the only one that may be short, as lists ascend.
    if constexpr (!C::kJoint) release_key(count - 1);
    const int valid = p.shape.seqlen - listed_block<C>(p, smem, count - 1) * kBlockK;
    auto weigh_last = [&](auto masked) {
      constexpr bool kMask = decltype(masked)::value;
      update_max<C, kMask>(s, valid, block_scale, row_max, row_sum, acc[0]);
      exponentiate<C, kMask>(s, valid, block_scale, shift, row_max, row_sum, weights);
    };
    if (count > 1) release_value(count - 2);
    if (valid < kBlockK) {
      weigh_last(std::true_type{});
    } else {
      weigh_last(std::false_type{});
    }
    wait_value(count - 1);
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
  if (linear || (!C::kInt8 && p.lse != nullptr)) query.load(smem);

  // O_s is acc / l times the channel scales of a quantised V; in this order values near the end of
  // float32's range do not overflow. It is made only where it is asked for, and on the fly: the
  // output has the same bits either way.
  auto inverse_row_sum = [&](int m, int half) { return inverse_sum(softmax.row_sum[m][half]); };
  const float* v_scale = nullptr;
  if constexpr (C::kInt8) {
    if (count > 0) v_scale = p.v_scale + static_cast<int64_t>(bh) * 2 * kHeadDim + lane % 4 * 2;
  }
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
    // In "none" S was of raw K: smoothing subtracts q . mean(K) from every logit.
    float correction[C::kTilesM][2] = {};
    if constexpr (!C::kInt8) {
      query.dot(p.k_mean + static_cast<int64_t>(bh) * kHeadDim, correction[0]);
    }
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
    for (int part = 0; part < C::kPartsH; ++part) wait_key(count + part);
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

template <typename Element, int kHeadDim, int kQuant>
cudaError_t launch_attn_fwd_sm90(const AttnParams& p) {
  using C = AttnConfigSm90<Element, kHeadDim, kQuant>;
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
  if constexpr (!C::kInt8) {
    check(encode_tokens(maps.k, p.k, p.shape, kHeadDim, kBlockK));
    check(encode_tokens(maps.v, p.v, p.shape, kHeadDim, kBlockK));
  }
  if (p.branch != SLA2_BRANCH_SPARSE) {
    constexpr uint64_t kRows = kHeadDim / 64 * kHeadDim;  // of 64 elements, a query block
    const uint64_t blocks = static_cast<uint64_t>(p.shape.num_bh) * p.shape.num_q_blocks;
    check(encode_tensor_map<3>(maps.h, p.h, {64, kRows, blocks}, {128, kRows * 128},
                               {64, C::kRowsH, 1}));
  }
  const auto kernel = attn_fwd_sm90_kernel<Element, kHeadDim, kQuant>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes));
  if (status != cudaSuccess) return status;
  const int ctas = p.shape.num_bh * p.shape.num_q_blocks;
  return launch_overlapped(kernel, ctas, C::kThreads, C::kSmemBytes, p.stream, p, maps);
}

}  // namespace sla2
