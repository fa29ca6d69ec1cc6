// Backward pass by key block, Hopper schedule (wgmma + tensor copies): dK and dV.
//
// One CTA: one key block of one head and the query blocks that list it, or a part of these, in
// steps of 64 queries:
//   S^T = K Q^T, alpha P^T = 2^(S^T - shift), dP^T = V dO^T - delta, dS^T = alpha P^T dP^T,
//   dK += dS^T Q, dV += alpha P^T dO.
// Keys are the rows of every product, so that P^T and dS^T turn from accumulators into A operands
// in registers. One warpgroup computes, a thread of another fills the ring of Q and dO; two CTAs an
// SM fill each other's waits, prologues and epilogues.
//
// A step takes 1024 cycles of the tensor cores (D = 128). Of shared memory it takes 1090: 64 KiB
// for the products with K and V, whose A is read anew for every 64 queries, 32 for the other two,
// 32 written by the copies, 8 for the statistics, at 128 bytes a cycle. K as a register operand
// would save 16 KiB, but ptxas finds no room for it beside dP^T in flight. The wait for dP^T hides
// behind the exponentials, dS^T behind dV; what is left, S^T and dK, the other CTA covers.
//
// The part of a cut column that is last to finish adds all parts' sums, in the order of the parts,
// and does what follows: the linear branch's share, and the store.
#include "../common/dispatch.h"
#include "bwd_columns_config.cuh"
#include "bwd_columns_linear.cuh"
#include "tensor_map.h"

namespace sla2 {
namespace {

// 64 rows from `token` on, in panels of 64 channels. policy: none, or that of L2.
template <class C, typename... Policy>
__device__ __forceinline__ void load_tile(const char* tile, const CUtensorMap* map, int token,
                                          int head, int batch, uint32_t full, Policy... policy) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tensor_load(smem_address(tile) + panel * C::kPanelBytes, map, panel * 64, token, head, batch,
                full, policy...);
  }
}

// One thread: K and V, then Q, dO and the statistics step by step, then dh, as the ring has room.
template <class C>
__device__ __forceinline__ void copy_inputs(const AttnBwdParams& p, const BwdColumnMaps& maps,
                                            uint32_t item_word, typename C::Smem& smem) {
  constexpr int kRowBytes = C::kHeadDim * 4, kStatisticBytes = C::kStepQueries * 4;
  ColumnItem item;
  item.set_block(p, item_word);
  const int bh = p.bh_begin + item.local_bh, head = item.head, batch = item.batch;
  const uint32_t keys_full = smem_address(&smem.keys_full);
  mbarrier_expect(keys_full, 2 * C::kTileBytes + kRowBytes);
  // Read once: L2 should rather keep Q and dO of the head, 39 MB at 75600 tokens, read for every
  // listing.
  const int token0 = item.column * kBlockK;
  load_tile<C>(smem.key, &maps.k, token0, head, batch, keys_full, evict_first());
  load_tile<C>(smem.value, &maps.v, token0, head, batch, keys_full, evict_first());
  bulk_load(smem_address(smem.k_mean), p.k_mean + static_cast<int64_t>(bh) * C::kHeadDim, kRowBytes,
            keys_full);
  item.set_range(p);
  smem.item = item;
  mbarrier_arrive(keys_full);

  StepCursor<C::kStages> ring;
  // The next tile of the ring, free and expecting `bytes`: its full barrier.
  const auto take = [&](int tile, int bytes) {
    const uint32_t full = smem_address(&smem.full[ring.stage][tile]);
    mbarrier_wait(smem_address(&smem.empty[ring.stage][tile]), ring.parity ^ 1);
    mbarrier_expect(full, bytes);
    return full;
  };
  const uint16_t* list =
      p.columns.rows + bh * p.columns.rows_per_head + p.columns.offsets[item.index];
#pragma unroll 1
  for (int entry = item.begin; entry < item.end; ++entry) {
    const int block = list[entry];  // the ring is full: the next stage takes longer to come free
#pragma unroll 1
    for (int half = 0; half < kBlockQ / C::kStepQueries; ++half) {
      const int row = half * C::kStepQueries, token = block * kBlockQ + row;
      uint32_t full = take(C::kQuery, C::kTileBytes + 2 * kStatisticBytes);
      auto& stage = smem.ring[ring.stage];
      load_tile<C>(stage[C::kQuery], &maps.q, token, head, batch, full);
      // Rows past the end have statistics of their own, with which P and dS are zero.
      tensor_load(smem_address(smem.shift[ring.stage]), &maps.shift, row, block, item.local_bh,
                  full);
      tensor_load(smem_address(smem.delta[ring.stage]), &maps.delta, row, block, item.local_bh,
                  full);
      full = take(C::kGrad, C::kTileBytes);
      load_tile<C>(stage[C::kGrad], &maps.grad_out, token, head, batch, full);
      ring.advance();
    }
  }
  if (p.dh == nullptr) return;
  const int block = static_cast<int>(item.local_index);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    const uint32_t full = take(panel, C::kTileBytes + (panel == 0 ? 2 * kRowBytes : 0));
    tensor_load(smem_address(smem.ring[ring.stage][panel]), &maps.dh, panel * 64, 0, block, full,
                evict_first());
    if (panel == 0) {
      bulk_load(smem_address(smem.dz), p.dz + item.local_index * 2 * C::kHeadDim, 2 * kRowBytes,
                full);
    }
  }
}

// acc = A B^T: 64 keys by 64 queries. Issue only, like accumulate.
template <class C>
__device__ __forceinline__ void multiply(float (&acc)[32], const char* keys, const char* queries) {
  const uint64_t a = wgmma_descriptor(smem_address(keys), 0, 1024, Swizzle::k128);
  const uint64_t b = wgmma_descriptor(smem_address(queries), 0, 1024, Swizzle::k128);
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    const int offset = step / 4 * C::kPanelBytes + step % 4 * 32;
    Wgmma16<typename C::Element, false, false>::mma(acc, advance(a, offset), advance(b, offset),
                                                    step > 0);
  }
}

// acc += weights X: 64 keys by 64 queries, 64 queries by D.
template <class C>
__device__ __forceinline__ void accumulate(KeyAcc<C>& acc, const uint32_t (&weights)[4][4],
                                           const char* queries) {
  const uint64_t b = wgmma_descriptor(smem_address(queries), C::kPanelBytes, 1024, Swizzle::k128);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    Wgmma16<typename C::Element, false, true>::mma(acc, weights[step], advance(b, 2048 * step), 1);
  }
}

// alpha P^T of a step, in float and as an operand.
template <class C>
__device__ __forceinline__ void weigh(const float (&s)[32], const float* shift, float scale_log2,
                                      float (&weights)[32], uint32_t (&operand)[4][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 x = *reinterpret_cast<const float2*>(shift + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 4 * n + 2 * half;
      weights[i] = exp2_approx(fmaf(s[i], scale_log2, -x.x));
      weights[i + 1] = exp2_approx(fmaf(s[i + 1], scale_log2, -x.y));
      operand[n / 2][n % 2 * 2 + half] =
          Pair<typename C::Element>::from_floats(weights[i], weights[i + 1]);
    }
  }
}

// dS^T of a step as an operand.
template <class C>
__device__ __forceinline__ void score_gradient(const float (&weights)[32], const float (&dp)[32],
                                               const float* delta, uint32_t (&operand)[4][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 x = *reinterpret_cast<const float2*>(delta + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 4 * n + 2 * half;
      operand[n / 2][n % 2 * 2 + half] = Pair<typename C::Element>::from_floats(
          weights[i] * (dp[i] - x.x), weights[i + 1] * (dp[i + 1] - x.y));
    }
  }
}

// The accumulators of a part, to or from its slot: float4 by float4 of all threads.
template <class C>
constexpr int kSlotVectors = 2 * C::kAccumulators / 4 * C::kComputeThreads;

// Leaves a part's sums. The part that is last to arrive gets the sum of all in its accumulators and
// true. No part waits for another.
template <class C>
__device__ __forceinline__ bool merge_parts(KeyAcc<C>& dk, KeyAcc<C>& dv, float4* slots, int part,
                                            int parts, int* arrived, bool& is_last) {
  constexpr int kVectors = C::kAccumulators / 4, kHalf = kSlotVectors<C> / 2;
  float4* own = slots + static_cast<int64_t>(part) * kSlotVectors<C> + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    own[i * C::kComputeThreads] =
        make_float4(dk[4 * i], dk[4 * i + 1], dk[4 * i + 2], dk[4 * i + 3]);
    own[i * C::kComputeThreads + kHalf] =
        make_float4(dv[4 * i], dv[4 * i + 1], dv[4 * i + 2], dv[4 * i + 3]);
  }
  __threadfence();
  named_barrier(C::kComputeBarrier, C::kComputeThreads);
  if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1) == parts - 1;
  named_barrier(C::kComputeBarrier, C::kComputeThreads);
  if (!is_last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < C::kAccumulators; ++i) dk[i] = dv[i] = 0.f;
  const auto add = [](float* x, const float4& y) {
    x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
  };
#pragma unroll 1
  for (int j = 0; j < parts; ++j) {
    const float4* slot = slots + static_cast<int64_t>(j) * kSlotVectors<C> + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      add(dk + 4 * i, __ldcg(slot + i * C::kComputeThreads));
      add(dv + 4 * i, __ldcg(slot + i * C::kComputeThreads + kHalf));
    }
  }
  return true;
}

// The warpgroup that computes.
template <class C>
__device__ __forceinline__ void compute(const AttnBwdParams& p, const BwdColumnMaps& maps,
                                        typename C::Smem& smem) {
  const int lane = threadIdx.x % 32;
  const float scale_log2 = p.softmax_scale * kLog2e;
  StepCursor<C::kStages> ring;
  const auto wait_full = [&](int tile) {
    mbarrier_wait(smem_address(&smem.full[ring.stage][tile]), ring.parity);
  };
  const auto release = [&](int tile) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&smem.empty[ring.stage][tile]));
  };

  KeyAcc<C> dk = {}, dv = {};
  pin(dk);
  pin(dv);
  mbarrier_wait(smem_address(&smem.keys_full), 0);
  const int steps = 2 * (smem.item.end - smem.item.begin);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const auto& tiles = smem.ring[ring.stage];
    float s[32], dp[32], weights[32];
    uint32_t p_operand[4][4], ds_operand[4][4];
    wait_full(C::kQuery);
    wgmma_fence();
    multiply<C>(s, smem.key, tiles[C::kQuery]);
    wgmma_commit();
    wait_full(C::kGrad);
    wgmma_fence();
    multiply<C>(dp, smem.value, tiles[C::kGrad]);
    wgmma_commit();
    wgmma_wait<1>();
    weigh<C>(s, smem.shift[ring.stage], scale_log2, weights, p_operand);
    wgmma_fence();
    accumulate<C>(dv, p_operand, tiles[C::kGrad]);
    wgmma_commit();
    wgmma_wait<1>();
    score_gradient<C>(weights, dp, smem.delta[ring.stage], ds_operand);
    wgmma_fence();
    accumulate<C>(dk, ds_operand, tiles[C::kQuery]);
    wgmma_commit();
    wgmma_wait<1>();
    release(C::kGrad);
    wgmma_wait<0>();
    release(C::kQuery);
    ring.advance();
  }
  pin(dk);
  pin(dv);

  const ColumnItem item = smem.item;
  const bool linear = p.dh != nullptr;
  uint32_t dh[C::kPanels];
  if (linear) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      wait_full(panel);  // also where nothing reads it: copies must not outlive the CTA
      dh[panel] = smem_address(smem.ring[ring.stage][panel]);
    }
  }
  if (item.parts > 1) {
    float4* partials =
        reinterpret_cast<float4*>(p.partials) +
        (static_cast<int64_t>(item.local_bh) * p.columns.num_slots + item.slot) * kSlotVectors<C>;
    if (!merge_parts<C>(dk, dv, partials, item.part, item.parts, p.columns.arrived + item.index,
                        smem.is_last)) {
      return;
    }
  }
  // Other warps' products may still read K and V, whose places the gradients leave from.
  named_barrier(C::kComputeBarrier, C::kComputeThreads);

  const int token0 = item.column * kBlockK, valid = min(kBlockK, p.shape.seqlen - token0);
  KeyOperand<C> phi;
  if (linear) {
    load_rows<C>(phi, smem.key);
    make_features<C>(phi, p.phi_raw_k ? nullptr : smem.k_mean, valid);
    add_value_gradient<C>(dv, phi, dh);
  }
  store_keys<C>(dv, smem.key, &maps.dv, token0, item.head, item.batch);

#pragma unroll
  for (float& x : dk) x *= p.softmax_scale;
  // Smoothing's gradient centres all of dK, or with phi of raw K the sparse branch's share alone.
  const auto store_sums = [&] {
    if (p.dk_sum != nullptr) {
      store_key_sums<C>(dk, valid, smem.column_sums, p.dk_sum + item.index * C::kHeadDim);
    }
  };
  if (linear) {
    if (p.phi_raw_k) store_sums();
    add_feature_gradient<C>(dk, phi, smem.value, dh, smem.dz);
  }
  if (!linear || !p.phi_raw_k) store_sums();
  store_keys<C>(dk, smem.value, &maps.dk, token0, item.head, item.batch);
  bulk_store_wait_read();
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(BwdColumnSm90<Element, kHeadDim>::kThreads, 2)
    bwd_columns_sm90_kernel(const __grid_constant__ AttnBwdParams p,
                            const __grid_constant__ BwdColumnMaps maps) {
  using C = BwdColumnSm90<Element, kHeadDim>;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(smem_bytes);
  const uint32_t item =
      p.columns.items[static_cast<int64_t>(p.bh_begin) * p.columns.num_items + blockIdx.x];
  if (item == kNoItem) return;
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&smem.keys_full), 2);  // the copies, and item
    for (int stage = 0; stage < C::kStages; ++stage) {
      for (int tile = 0; tile < C::kTilesPerStage; ++tile) {
        mbarrier_init(smem_address(&smem.full[stage][tile]), 1);
        mbarrier_init(smem_address(&smem.empty[stage][tile]), C::kComputeThreads / 32);
      }
    }
    fence_barrier_init();
  }
  __syncthreads();
  // A shuffle tells the compiler that warps agree.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < C::kComputeThreads / 32) {
    grow_registers<C::kComputeRegisters>();
    compute<C>(p, maps, smem);
  } else {
    shrink_registers<C::kCopyRegisters>();
    if (warp == C::kComputeThreads / 32) {
      if (elect_one()) copy_inputs<C>(p, maps, item, smem);
    }
  }
}

// Statistics of a step's queries, a box of 256 bytes. Tensor copies, though these rows are
// contiguous: racecheck takes a bulk copy for a store of the thread that asks for it, and does not
// see that the thread's wait for the ring's place orders it behind other threads' reads.
template <class C>
cudaError_t encode_statistics(CUtensorMap& map, const float* rows, const AttnBwdParams& p) {
  const uint64_t blocks = p.shape.num_q_blocks, heads = p.bh_count;
  return encode_tensor_map<3>(map, rows, {kBlockQ, blocks, heads},
                              {kBlockQ * 4, blocks * kBlockQ * 4}, {C::kStepQueries, 1, 1}, 4,
                              CU_TENSOR_MAP_SWIZZLE_NONE);
}

template <typename Element, int kHeadDim>
cudaError_t launch(const AttnBwdParams& p) {
  using C = BwdColumnSm90<Element, kHeadDim>;
  BwdColumnMaps maps = {};
  cudaError_t status = cudaSuccess;
  const auto check = [&](cudaError_t result) {
    if (status == cudaSuccess) status = result;
  };
  check(encode_tokens(maps.q, p.q, p.shape, kHeadDim, C::kStepQueries));
  check(encode_tokens(maps.grad_out, p.grad_out, p.shape, kHeadDim, C::kStepQueries));
  check(encode_tokens(maps.k, p.k, p.shape, kHeadDim, kBlockK));
  check(encode_tokens(maps.v, p.v, p.shape, kHeadDim, kBlockK));
  constexpr uint32_t kRowsPerWarp = kBlockK / (C::kComputeThreads / 32);
  check(encode_tokens(maps.dk, p.dk, p.shape, kHeadDim, kRowsPerWarp));
  check(encode_tokens(maps.dv, p.dv, p.shape, kHeadDim, kRowsPerWarp));
  if (p.row_shift != nullptr) {
    check(encode_statistics<C>(maps.shift, p.row_shift, p));
    check(encode_statistics<C>(maps.delta, p.row_delta, p));
  }
  if (p.dh != nullptr) {
    constexpr uint64_t kRowBytes = kHeadDim * 2;
    const uint64_t blocks = static_cast<uint64_t>(p.bh_count) * p.shape.num_k_blocks;
    check(encode_tensor_map<3>(maps.dh, p.dh, {kHeadDim, kHeadDim, blocks},
                               {kRowBytes, kHeadDim * kRowBytes}, {64, kHeadDim, 1}));
  }
  const auto kernel = bwd_columns_sm90_kernel<Element, kHeadDim>;
  constexpr int kSmemBytes = sizeof(typename C::Smem);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes));
  if (status != cudaSuccess) return status;
  kernel<<<p.bh_count * p.columns.num_items, C::kThreads, kSmemBytes, p.stream>>>(p, maps);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_bwd_columns_sm90(const AttnBwdParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    return launch<typename I::Element, I::kHeadDim>(p);
  });
}

}  // namespace sla2
