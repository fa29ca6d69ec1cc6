// SLA2 forward for one query block, Hopper schedule (wgmma + asynchronous copies).
//
// One CTA: 128 query rows of one head, a warpgroup for each half; both share every key block. A
// warpgroup takes the softmax of S(j), then O += P V(j), then S(j+1) = Q K^T, one after the other:
// two CTAs, four warpgroups on an SM, fill each other's waits. Holding P or a second S while a
// product runs does not fit 128 registers. Thread 0 keeps the ring of key blocks filled.
#pragma once

#include "../common/attn_output.cuh"
#include "async.cuh"
#include "attn_inputs.cuh"
#include "attn_softmax.cuh"
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

  // Prologue: the list, barriers, the first entries of the rings, Q
  auto& producer = *reinterpret_cast<Producer<C>*>(smem + C::kProducer);
  static_assert(sizeof(Producer<C>) == 32, "its place in shared memory");
  float score_scale = p.softmax_scale * kLog2e;
  int count;
  {
    const QueryBlock block(p);
    [[maybe_unused]] QueryTile<C> query;
    if constexpr (C::kInt8) {
      query.load(block.template query<Element>(p), p.q.stride_token, block.rows);
    }
    // All reads at once: entries past the count are read too and not used.
    static_assert(C::kListed <= C::kThreads, "one entry a thread");
    if (threadIdx.x < min(p.max_kv_blocks, C::kListed)) {
      reinterpret_cast<uint16_t*>(smem + C::kList)[threadIdx.x] =
          p.lut[static_cast<int64_t>(blockIdx.x) * p.max_kv_blocks + threadIdx.x];
    }
    if constexpr (C::kEarlyZ) {
      if (p.branch != SLA2_BRANCH_SPARSE) load_z<C>(p, smem);
    }
    const int listed = p.counts[blockIdx.x];
    count = p.branch == SLA2_BRANCH_LINEAR ? 0 : listed;
    // All blocks listed: no complement, alpha is 1.
    const bool linear = p.branch == SLA2_BRANCH_LINEAR ||
                        (p.branch == SLA2_BRANCH_BOTH && listed < p.shape.num_k_blocks);
    if (threadIdx.x == 0) {
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
      producer.init(p, block.bh, count, linear);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if constexpr (!C::kInt8) {
        mbarrier_expect(base + C::kFullQ, C::kQueryBytes);
#pragma unroll
        for (int column = 0; column < kHeadDim / 64; ++column) {
          tensor_load(base + column * kBlockQ * 128, &maps.q, column * 64, block.row0,
                      producer.head, producer.batch, base + C::kFullQ);
        }
      }
#pragma unroll 1
      for (int i = 0; i < C::kStagesK; ++i) producer.load_key(p, maps, smem, i);
#pragma unroll 1
      for (int i = 0; i < C::kStagesV; ++i) producer.load_value(p, maps, smem, i);
    }
    if constexpr (C::kInt8) {
      score_scale *= query.quantize(smem, reinterpret_cast<float*>(smem + C::kScratch));
      fence_async_shared();
      __syncthreads();
    } else {
      mbarrier_wait(base + C::kFullQ, 0);
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
    const uint32_t q_tile = base + group * 64 * (C::kInt8 ? C::kQueryRowBytes : 128);
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
    // Thread 0 fills what the block before `entry` has left.
    auto refill = [&](int entry) {
      // A copy: what only thread 0 does with the number keeps it out of the uniform registers.
      const int before = detached(entry) - 1;
      if (threadIdx.x == 0 && before >= 0) {
        producer.load_key(p, maps, smem, before + C::kStagesK);
        producer.load_value(p, maps, smem, before + C::kStagesV);
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
      float grown[2];
      grow_max<C, false>(s, kBlockK, block_scale, row_max, grown);
      if (entry > 0) release_value(entry - 1);
      rescale<C>(grown, row_max, row_sum, acc[0]);
      exponentiate<C, false>(s, kBlockK, block_scale, shift, row_max, row_sum, weights);
      // 16-bit: two V tiles are all the ring holds, the next one must be on its way as early as can
      // be.
      if constexpr (!C::kJoint) refill(entry);
      // These waits also end the basic block: ptxas would move exponentials behind the products.
      wait_key(entry + 1);
      wait_value(entry);
      read_scale(entry + 1);
      wgmma_fence();
      issue_values<C>(acc[0], weights, value_tile(entry));
      wgmma_commit();
      if constexpr (C::kJoint) refill(entry);  // in the shadow of the product
      wgmma_wait<0>();
      wgmma_fence();
      issue_scores<C>(s, q_tile, key_tile(entry + 1));
      wgmma_commit();
      wgmma_wait<0>();
    }

    // The last block: the only one that may be short, as lists ascend.
    const int valid = min(kBlockK, p.shape.seqlen - listed_block<C>(p, smem, count - 1) * kBlockK);
    float grown[2];
    grow_max<C, true>(s, valid, block_scale, row_max, grown);
    if constexpr (!C::kJoint) release_key(count - 1);
    if (count > 1) release_value(count - 2);
    rescale<C>(grown, row_max, row_sum, acc[0]);
    exponentiate<C, true>(s, valid, block_scale, shift, row_max, row_sum, weights);
    if (threadIdx.x == 0 && count > 1) producer.load_key(p, maps, smem, count - 2 + C::kStagesK);
    wait_value(count - 1);
    wgmma_fence();
    issue_values<C>(acc[0], weights, value_tile(count - 1));
    wgmma_commit();
    wgmma_wait<0>();
  }
  const QueryBlock block(p);
  const int bh = block.bh, row0 = block.row0, rows = block.rows;
  const bool linear = producer.linear(), needs_query = linear || (!C::kInt8 && p.lse != nullptr);
  softmax.finish();

  // O_s is acc / l times the channel scales of a quantised V; in this order values near the end of
  // float32's range do not overflow. It is made only where it is asked for, and on the fly: the
  // output has the same bits either way.
  auto inverse_row_sum = [&](int m, int half) { return inverse_sum(softmax.row_sum[m][half]); };
  const float* v_scale = nullptr;
  if constexpr (C::kInt8) {
    if (count > 0) v_scale = p.v_scale + static_cast<int64_t>(bh) * 2 * kHeadDim + lane % 4 * 2;
  }
  __syncthreads();  // every warp is through with its products
  if constexpr (!C::kEarlyZ) {
    if (linear) load_z<C>(p, smem);
  }
  char* staging = smem + threadIdx.x / 32 * C::kStagingBytes;
  if (p.out_sparse.data != nullptr) {
    store_rows<C>(acc, p.out_sparse, bh, p.shape.num_heads, row0, rows, staging, inverse_row_sum,
                  v_scale);
  }
  QueryFeatures<C> features;
  if (needs_query) features.load(block.template query<Element>(p), p.q.stride_token, rows);
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
    float denominator[C::kTilesM][2];
    if constexpr (!C::kEarlyZ) __syncthreads();
    features.exponentiate(reinterpret_cast<const float*>(smem + C::kZ), denominator);
    blend.set(p, bh, block.block, row0, rows, softmax, denominator);
  }
  scale_rows<C>(
      acc, [&](int m, int half) { return inverse_row_sum(m, half) * blend.alpha_over_f[m][half]; });
  if (v_scale != nullptr) scale_channels<C>(acc, v_scale);

  // Linear branch: acc += e H. Rolled, so that no more than one part's operands are alive.
  if (linear) {
#pragma unroll 1
    for (int part = 0; part < C::kPartsH; ++part) {
      wait_key(producer.count + part);
      const uint64_t h =
          wgmma_descriptor(key_tile(producer.count + part), C::kRowsH * 128, 1024, Swizzle::k128);
      wgmma_fence();
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int step = 0; step < C::kRowsH / 16; ++step) {
          uint32_t a[4];
          features.operand(a, m, step / 2, step % 2);
          Wgmma16<__nv_bfloat16, false, true>::mma(
              reinterpret_cast<float (&)[C::kTilesD * 4]>(acc[m]), a, advance(h, 2048 * step), 1);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      features.template shift_groups<C::kRowsH / 32>();
    }
  }
  store_rows<C>(
      acc, p.out, bh, p.shape.num_heads, row0, rows, staging,
      [&](int m, int half) { return blend.f[m][half]; }, nullptr);
}

template <typename Element, int kHeadDim, int kQuant>
cudaError_t launch_attn_fwd_sm90(const AttnParams& p) {
  using C = AttnConfigSm90<Element, kHeadDim, kQuant>;
  AttnMaps maps = {};
  cudaError_t status = cudaSuccess;
  const auto check = [&](cudaError_t result) {
    if (status == cudaSuccess) status = result;
  };
  if constexpr (!C::kInt8) {
    check(encode_tokens(maps.q, p.q, p.shape, kHeadDim, kBlockQ));
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
  kernel<<<ctas, C::kThreads, C::kSmemBytes, p.stream>>>(p, maps);
  return cudaGetLastError();
}

}  // namespace sla2
