// SLA2 forward in 16 bit, Hopper schedule (wgmma + tensor copies).
//
// A persistent CTA an SM takes query blocks of 128 rows in turn. Two warpgroups have 64 rows each
// and share every key block:
//   S = Q K^T, P = 2^(S scale - max), O += P V,
// then O is blended with the linear branch, e H, on the same accumulators. The products of two key
// blocks are issued together, S of the next one and O += P V of this one: the softmax needs the
// first alone and runs while the second, and the other warpgroup's, do.
//
// What a key block asks of an SM at D = 128, of both warpgroups: 1024 cycles of the tensor cores,
// and of shared memory 64 KiB of B operands (64 bytes a cycle in either product; Q and P are
// registers: Q in shared memory would make Q K^T 128 bytes a cycle, all that it delivers) and
// 32 KiB of copies: 96 of 128 bytes a cycle.
#include <type_traits>

#include "../common/attn_output.cuh"
#include "../common/dispatch.h"
#include "attn_rows_copy.cuh"
#include "attn_softmax.cuh"
#include "launch.h"
#include "row_store.cuh"
#include "tensor_map.h"

namespace sla2 {
namespace {

// S = Q K^T of the warpgroup's rows: issue only.
template <class C>
__device__ __forceinline__ void issue_scores(float (&s)[32], const Fragments<C>& q,
                                             uint32_t stage) {
  const uint64_t k = wgmma_descriptor(stage, 0, 1024, Swizzle::k128);
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    WgmmaNt<typename C::Element>::mma(s, q[step],
                                      advance(k, step / 4 * kPanelBytes + step % 4 * 32), step > 0);
  }
}

// acc += A B, A in registers, B 16 kSteps rows in panels of 64 channels: issue only.
template <typename Element, int kSteps, int kAccumulators>
__device__ __forceinline__ void issue_rows(float (&acc)[kAccumulators],
                                           const uint32_t (&a)[kSteps][4], uint32_t b) {
  const uint64_t rows = wgmma_descriptor(b, kSteps * 16 * 128, 1024, Swizzle::k128);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Wgmma16<Element, false, true>::mma(acc, a[step], advance(rows, 2048 * step), 1);
  }
}

// Q . mean(K) of the lane's rows: what smoothing takes from every logit.
template <class C>
__device__ __forceinline__ void query_dot(float (&result)[2], const Fragments<C>& q,
                                          const float* mean) {
  result[0] = result[1] = 0.f;
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 factor = __ldg(
          reinterpret_cast<const float2*>(mean + 16 * step + i / 2 * 8 + threadIdx.x % 4 * 2));
      const float2 x = Pair<typename C::Element>::to_float2(q[step][i]);
      result[i % 2] = fmaf(x.x, factor.x, fmaf(x.y, factor.y, result[i % 2]));
    }
  }
  result[0] = lane_sum<4>(result[0]);
  result[1] = lane_sum<4>(result[1]);
}

// Q to e = exp(q - row maximum) in bf16, in place; denominator = e Z.
template <class C>
__device__ __forceinline__ void make_features(Fragments<C>& q, float (&denominator)[2],
                                              const float* z) {
  float offset[2];
  feature_offsets<C>(offset, q);
  denominator[0] = denominator[1] = 0.f;
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 sum = feature_sums<C>(z, 2 * step + i / 2);
      q[step][i] = query_features<typename C::Element>(q[step][i], offset[i % 2]);
      const float2 e = Pair<__nv_bfloat16>::to_float2(q[step][i]);
      denominator[i % 2] = fmaf(e.x, sum.x, fmaf(e.y, sum.y, denominator[i % 2]));
    }
  }
  denominator[0] = lane_sum<4>(denominator[0]);
  denominator[1] = lane_sum<4>(denominator[1]);
}

// One warp of the two warpgroups that compute.
template <class C>
__device__ __forceinline__ void compute_row_tiles(const AttnParams& p, const AttnRowMaps& maps,
                                                  typename C::Smem& smem) {
  using Element = typename C::Element;
  const int lane = threadIdx.x % 32;
  const int tiles = p.shape.num_bh * p.shape.num_q_blocks;
  const float scale_log2 = p.softmax_scale * kLog2e;
  const uint32_t ring_tiles = smem_address(smem.stage);
  RingCursor<C::kStages> ring;
  int query_parity = 0, state_parity = 0;
  int staged = -1;  // the entry that the last O leaves through
  const auto wait_entry = [&] { mbarrier_wait(smem_address(&smem.full[ring.stage]), ring.parity); };
  const auto release = [&](uint64_t& empty) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&empty));
  };
  const auto release_staged = [&] {
    bulk_store_wait_read();
    if (staged >= 0) release(smem.empty[staged]);
  };
  const auto key_tile = [&](int stage) { return uniform(ring_tiles + stage * 2 * C::kKeyBytes); };
  const auto value_tile = [&](int stage) { return key_tile(stage) + C::kKeyBytes; };

#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const RowTile tile(p.shape, 0, index);
    mbarrier_wait(smem_address(&smem.query_full), query_parity);
    query_parity ^= 1;
    const int listed = smem.listed, count = sparse_blocks(p, listed);
    const bool linear = has_complement(p, listed);
    Fragments<C> q;
    load_fragments<C>(q, smem.query);

    OnlineSoftmax<C::kTilesM> softmax;
    softmax.init();
    float acc[C::kTilesM][C::kTilesD][4] = {};
    auto& flat = reinterpret_cast<float (&)[C::kTilesD * 4]>(acc[0]);
    BlendFactors<C> blend;
    blend.set_ones();
    // What the rows need besides O: in the shadow of the last product.
    const auto finish_rows = [&] {
      softmax.finish();
      if (p.lse != nullptr) {
        float correction[C::kTilesM][2];
        query_dot<C>(correction[0], q, p.k_mean + static_cast<int64_t>(tile.bh) * C::kHeadDim);
        store_lse<C>(p, tile.bh, tile.row0, tile.rows, softmax, 0.f, correction);
      }
      if (!linear) return;
      float alpha[C::kTilesM][2], denominator[C::kTilesM][2];
      load_alpha<C>(p, tile.head, tile.block, tile.row0, tile.rows, softmax, alpha);
      mbarrier_wait(smem_address(&smem.state_full), state_parity);
      state_parity ^= 1;
      make_features<C>(q, denominator[0], smem.z);
      blend.set(alpha, denominator);
    };
    int stage = 0;  // of the last key block, when all have passed
    if (count > 0) {
      float (&row_max)[2] = softmax.row_max[0];
      float (&row_sum)[2] = softmax.row_sum[0];
      float s[32];
      uint32_t weights[C::kRegistersP][4];
      wait_entry();
      wgmma_fence();
      issue_scores<C>(s, q, key_tile(ring.stage));
      wgmma_commit();
      wgmma_wait<0>();
      pin(s);
      pin(flat);
      release(smem.query_empty);  // here, as an arrival does not wait for ldmatrix
      release_staged();           // its stores have long read their source
      // Only the last block can be short, as lists ascend: the first one may be the last.
      stage = ring.stage;
      int valid = p.shape.seqlen - smem.key[stage];
      update_max<C, true>(s, valid, scale_log2, row_max, row_sum, [](int, float) {});
      exponentiate<C, true>(s, valid, scale_log2, 0.f, row_max, row_sum, weights);
      ring.advance();
      if (count > 1) wait_entry();

      // From P of a block to P of the next.
      const auto advance_block = [&](auto last) {
        constexpr bool kLast = decltype(last)::value;
        wgmma_fence();
        issue_scores<C>(s, q, key_tile(ring.stage));
        wgmma_commit();
        issue_rows<Element>(flat, weights, value_tile(stage));
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        const int left = stage;
        stage = ring.stage;
        ring.advance();
        valid = kLast ? p.shape.seqlen - smem.key[stage] : kBlockK;
        bool grew = false;
        float factor[2];
        update_max<C, kLast>(s, valid, scale_log2, row_max, row_sum, [&](int half, float x) {
          grew = true;
          factor[half] = x;
        });
        uint32_t next_weights[C::kRegistersP][4];
        exponentiate<C, kLast>(s, valid, scale_log2, 0.f, row_max, row_sum, next_weights);
        // This wait also ends the basic block: ptxas would move exponentials behind the next one.
        if constexpr (!kLast) wait_entry();
        wgmma_wait<0>();
        pin(flat);
        release(smem.empty[left]);
        if (grew) scale_rows<C>(acc, [&](int, int half) { return factor[half]; });
        copy_operands(weights, next_weights);
      };
#pragma unroll 1
      for (int i = 2; i < count; ++i) advance_block(std::false_type{});
      if (count > 1) advance_block(std::true_type{});
      wgmma_fence();
      issue_rows<Element>(flat, weights, value_tile(stage));
      wgmma_commit();
      finish_rows();
      wgmma_wait<0>();
      pin(flat);
      release(smem.empty[stage]);
    } else {
      release_staged();
      finish_rows();
      release(smem.query_empty);
    }

    // O_s is acc / l. In this order values near the end of float32's range do not overflow.
    const float inverse[2] = {inverse_sum(softmax.row_sum[0][0]),
                              inverse_sum(softmax.row_sum[0][1])};
    wait_entry();
    char* const out = smem.stage[ring.stage];
    if (p.out_sparse.data != nullptr) {
      store_rows<C>(acc[0], out, &maps.out_sparse, tile.row0, tile.head, tile.batch,
                    [&](int half, int, int) { return inverse[half]; });
      bulk_store_wait_read();
    }
    scale_rows<C>(acc,
                  [&](int m, int half) { return inverse[half] * blend.alpha_over_f[m][half]; });
    if (linear) {
      wgmma_fence();
      issue_rows<__nv_bfloat16>(flat, q, uniform(smem_address(smem.state)));
      wgmma_commit();
      wgmma_wait<0>();
      pin(flat);
      release(smem.state_empty);
    }
    store_rows<C>(acc[0], out, &maps.out, tile.row0, tile.head, tile.batch,
                  [&](int half, int, int) { return blend.f[0][half]; });
    staged = ring.stage;
    ring.advance();
  }
  bulk_store_wait_read();
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads, 1)
    attn_fwd_sm90_kernel(const __grid_constant__ AttnParams p,
                         const __grid_constant__ AttnRowMaps maps) {
  using C = AttnRowConfig<Element, kHeadDim>;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(smem_bytes);
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&smem.query_full), 2);  // the copies, the length of the list
    mbarrier_init(smem_address(&smem.query_empty), C::kWarps);
    mbarrier_init(smem_address(&smem.state_full), 1);
    mbarrier_init(smem_address(&smem.state_empty), C::kWarps);
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(smem_address(&smem.full[i]), 1);
      mbarrier_init(smem_address(&smem.empty[i]), C::kWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int group = uniform(static_cast<int>(threadIdx.x / kWarpgroup));
  if (group < kRowGroups) {
    grow_registers<kRowRegisters>();
    wait_predecessor();
    compute_row_tiles<C>(p, maps, smem);
  } else {
    shrink_registers<kRowCopyRegisters>();
    if (threadIdx.x / 32 == C::kWarps) {
      if (elect_one()) AttnRowCopies<C>{p, maps, smem}.run();
    }
  }
}

template <class C>
cudaError_t encode_maps(AttnRowMaps& maps, const AttnParams& p) {
  constexpr uint64_t kHeadDim = C::kHeadDim;
  constexpr uint32_t kRowsPerWarp = kBlockQ / C::kWarps;
  cudaError_t status = cudaSuccess;
  const auto check = [&](cudaError_t result) {
    if (status == cudaSuccess) status = result;
  };
  check(encode_tokens(maps.q, p.q, p.shape, kHeadDim, kBlockQ));
  check(encode_tokens(maps.k, p.k, p.shape, kHeadDim, kBlockK));
  check(encode_tokens(maps.v, p.v, p.shape, kHeadDim, kBlockK));
  check(encode_tokens(maps.out, p.out, p.shape, kHeadDim, kRowsPerWarp));
  if (p.out_sparse.data != nullptr) {
    check(encode_tokens(maps.out_sparse, p.out_sparse, p.shape, kHeadDim, kRowsPerWarp));
  }
  if (p.branch != SLA2_BRANCH_SPARSE) {
    const uint64_t blocks = static_cast<uint64_t>(p.shape.num_bh) * p.shape.num_q_blocks;
    check(encode_tensor_map<3>(maps.h, p.h, {kHeadDim, kHeadDim, blocks},
                               {kHeadDim * 2, kHeadDim * kHeadDim * 2}, {kPanel, kHeadDim, 1}));
  }
  return status;
}

}  // namespace

cudaError_t launch_attn_rows_sm90(const AttnParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    using C = AttnRowConfig<typename I::Element, I::kHeadDim>;
    const auto kernel = attn_fwd_sm90_kernel<typename I::Element, I::kHeadDim>;
    constexpr int kSmemBytes = sizeof(typename C::Smem);
    AttnRowMaps maps = {};
    cudaError_t status = encode_maps<C>(maps, p);
    const int tiles = p.shape.num_bh * p.shape.num_q_blocks;
    int ctas = 0;
    if (status == cudaSuccess) status = prepare_persistent(kernel, kSmemBytes, tiles, ctas);
    if (status != cudaSuccess) return status;
    return launch_overlapped(kernel, ctas, kRowThreads, kSmemBytes, p.stream, p, maps);
  });
}

}  // namespace sla2
