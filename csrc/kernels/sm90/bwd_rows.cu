// Backward pass by query block, Hopper schedule (wgmma + tensor copies): dQ, the gradient of the
// states that made O_l, and what the pass by key block needs to know of the rows.
//
// A persistent CTA an SM takes query blocks of 128 rows in turn. Two warpgroups have 64 rows each;
// the linear branch comes first and leaves its share of dQ in the accumulators, then key blocks of
// 64 pass:
//   S = Q K^T, alpha P = 2^(S - shift), dP = dO V^T, dS = alpha P (dP - delta), dQ += dS K.
// While one warpgroup makes dS, the other one's products run.
//
// What a key block asks of an SM at D = 128, of both warpgroups: 1536 cycles of the tensor cores,
// and of shared memory 96 KiB of B operands (A operands are registers: two in shared memory would
// be 64 KiB more and as many bytes as it delivers) and 32 KiB of copies, 85 of 128 bytes a cycle.

#include "../common/dispatch.h"
#include "bwd_rows_copy.cuh"
#include "bwd_rows_linear.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace sla2 {
namespace {

// S = Q K^T and dP = dO V^T of the warpgroup's rows: issue only.
template <class C>
__device__ __forceinline__ void issue_scores(float (&s)[32], float (&dp)[32], const Fragments<C>& q,
                                             const Fragments<C>& grad, uint32_t stage) {
  const uint64_t k = wgmma_descriptor(stage, 0, 1024, Swizzle::k128);
  const uint64_t v = advance(k, C::kKeyBytes);
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    WgmmaNt<typename C::Element>::mma(s, q[step],
                                      advance(k, step / 4 * kPanelBytes + step % 4 * 32), step > 0);
  }
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    WgmmaNt<typename C::Element>::mma(dp, grad[step],
                                      advance(v, step / 4 * kPanelBytes + step % 4 * 32), step > 0);
  }
}

// dQ += dS K: issue only.
template <class C>
__device__ __forceinline__ void issue_queries(float (&dq)[C::kTilesD][4],
                                              const uint32_t (&ds)[kBlockK / 16][4],
                                              uint32_t stage) {
  const uint64_t k = wgmma_descriptor(stage, kPanelBytes, 1024, Swizzle::k128);
#pragma unroll
  for (int step = 0; step < kBlockK / 16; ++step) {
    Wgmma16<typename C::Element, false, true>::mma(reinterpret_cast<float (&)[C::kTilesD * 4]>(dq),
                                                   ds[step], advance(k, 2048 * step), 1);
  }
}

// dS as the A operands of dS K; row_sums gathers its rows as rounded, so that in dS (K - mean) a
// large mean cancels. kMask: only the first `valid` keys exist.
template <class C, bool kMask>
__device__ __forceinline__ void score_gradients(uint32_t (&ds)[kBlockK / 16][4],
                                                float (&row_sums)[2], const float (&s)[32],
                                                const float (&dp)[32], const RowStateSm90<C>& state,
                                                float scale_log2, int valid) {
  using P = Pair<typename C::Element>;
  const int lane_column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int step = 0; step < kBlockK / 16; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {  // rows + 8 (r % 2), keys 16 step + 8 (r / 2)
      const int half = r % 2, n = 2 * step + r / 2;
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float score = s[4 * n + 2 * half + e];
        if constexpr (kMask) score = 8 * n + lane_column + e >= valid ? -INFINITY : score;
        const float weight = exp2_approx(fmaf(score, scale_log2, -state.shift[half]));
        x[e] = weight * (dp[4 * n + 2 * half + e] - state.delta[half]);
      }
      ds[step][r] = P::from_floats(x[0], x[1]);
      const float2 rounded = P::to_float2(ds[step][r]);
      row_sums[half] += rounded.x + rounded.y;
    }
  }
}

// One warp of the two warpgroups that compute.
template <class C>
__device__ __forceinline__ void compute_row_tiles(const AttnBwdParams& p, const BwdRowMaps& maps,
                                                  typename C::Smem& smem, int group) {
  const int lane = threadIdx.x % 32;
  const int tiles = p.bh_count * p.shape.num_q_blocks;
  const float scale_log2 = p.softmax_scale * kLog2e;
  const uint32_t ring_tiles = smem_address(smem.stage);
  RingCursor<C::kStages> ring;
  int parity = 0;
  int staged = -1;  // the stage that the last dQ leaves through
  const auto wait_stage = [&] { mbarrier_wait(smem_address(&smem.full[ring.stage]), ring.parity); };
  const auto release = [&](uint64_t& empty) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&empty));
  };
  const auto stage_tile = [&](int stage) { return uniform(ring_tiles + stage * 2 * C::kKeyBytes); };

#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const RowTile tile(p.shape, p.bh_begin, index);
    const bool sparse = p.branch != SLA2_BRANCH_LINEAR;
    RowStateSm90<C> state;
    state.load(p, tile);
    const float* mean = p.k_mean + static_cast<int64_t>(tile.bh) * C::kHeadDim;
    mbarrier_wait(smem_address(&smem.operands_full), parity);
    parity ^= 1;
    const int listed = smem.listed, count = sparse_blocks(p, listed);
    Fragments<C> q, grad;
    load_fragments<C>(q, smem.query);
    load_fragments<C>(grad, smem.grad);
    feature_offsets<C>(state.offset, q);
    state.set_alpha(p, tile, listed);
    if (sparse) {
      wait_stage();
      state.compute(q, grad, mean, smem.stage[ring.stage], scale_log2, tile.rows);
      release(smem.empty[ring.stage]);
      ring.advance();
      const int64_t row = static_cast<int64_t>(tile.local) * kBlockQ;
      state.store(p.row_shift + row, p.row_delta + row);
    }

    float dq[C::kTilesD][4];
    linear_branch<C>(p, maps, tile, smem, dq, state, grad, has_complement(p, listed), group);
    // The places of Q, dO, H and Z, once dH has left, and the last dQ's.
    const auto release_operands = [&] {
      bulk_store_wait_read();
      release(smem.operands_empty);
      if (staged >= 0 && lane == 0) mbarrier_arrive(smem_address(&smem.empty[staged]));
    };

    float row_sums[2] = {};
    if (count > 0) {
      float s[32], dp[32];
      uint32_t ds[kBlockK / 16][4];
      wait_stage();
      wgmma_fence();
      issue_scores<C>(s, dp, q, grad, stage_tile(ring.stage));
      wgmma_commit();
      wgmma_wait<0>();
      pin(s);
      pin(dp);
      release_operands();  // the stores have long read their source
#pragma unroll 1
      for (int i = 0; i + 1 < count; ++i) {
        score_gradients<C, false>(ds, row_sums, s, dp, state, scale_log2, kBlockK);
        const int stage = ring.stage;
        const uint32_t this_tile = stage_tile(stage);
        ring.advance();
        const uint32_t next_tile = stage_tile(ring.stage);
        wait_stage();
        wgmma_fence();
        issue_queries<C>(dq, ds, this_tile);
        issue_scores<C>(s, dp, q, grad, next_tile);
        wgmma_commit();
        wgmma_wait<0>();
        pin(s);
        pin(dp);
        release(smem.empty[stage]);
      }
      // The last block: the only one that may be short, as lists ascend.
      score_gradients<C, true>(ds, row_sums, s, dp, state, scale_log2,
                               p.shape.seqlen - smem.key[ring.stage]);
      wgmma_fence();
      issue_queries<C>(dq, ds, stage_tile(ring.stage));
      wgmma_commit();
      wgmma_wait<0>();
      release(smem.empty[ring.stage]);
      ring.advance();
    } else {
      release_operands();
    }
    pin(reinterpret_cast<float (&)[C::kTilesD * 4]>(dq));

    // K was raw: dS (K - 1 mean^T) = dS K - rowsum(dS) mean^T.
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sums[half] = lane_sum<4>(row_sums[half]);
#pragma unroll
    for (int n = 0; n < C::kTilesD; ++n) {
      const float2 x = __ldg(reinterpret_cast<const float2*>(mean + 8 * n + lane % 4 * 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[n][i] -= row_sums[i / 2] * (i % 2 == 0 ? x.x : x.y);
    }
    wait_stage();
    store_rows<C>(dq, smem.stage[ring.stage], &maps.dq, tile.row0, tile.head, tile.batch,
                  [&](int, int, int) { return p.softmax_scale; });
    staged = ring.stage;
    ring.advance();
  }
  bulk_store_wait_read();
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads, 1)
    bwd_rows_sm90_kernel(const __grid_constant__ AttnBwdParams p,
                         const __grid_constant__ BwdRowMaps maps) {
  using C = BwdRowSm90Config<Element, kHeadDim>;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(smem_bytes);
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&smem.operands_full), 1);
    mbarrier_init(smem_address(&smem.operands_empty), C::kWarps);
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
    compute_row_tiles<C>(p, maps, smem, group);
  } else {
    shrink_registers<kRowCopyRegisters>();
    if (threadIdx.x / 32 == C::kWarps) {
      if (elect_one()) BwdRowCopies<C>{p, maps, smem}.run();
    }
  }
}

// Maps of all operands. H and dH are those of the group's heads alone.
template <class C>
cudaError_t encode_maps(BwdRowMaps& maps, const AttnBwdParams& p) {
  constexpr uint64_t kHeadDim = C::kHeadDim;
  constexpr uint32_t kRowsPerWarp = kBlockQ / C::kWarps;
  cudaError_t status = cudaSuccess;
  const auto check = [&](cudaError_t result) {
    if (status == cudaSuccess) status = result;
  };
  check(encode_tokens(maps.q, p.q, p.shape, kHeadDim, kBlockQ));
  check(encode_tokens(maps.grad_out, p.grad_out, p.shape, kHeadDim, kBlockQ));
  check(encode_tokens(maps.dq, p.dq, p.shape, kHeadDim, kRowsPerWarp));
  if (p.branch != SLA2_BRANCH_LINEAR) {
    check(encode_tokens(maps.out_sparse, p.out_sparse, p.shape, kHeadDim, kBlockQ));
    check(encode_tokens(maps.k, p.k, p.shape, kHeadDim, kBlockK));
    check(encode_tokens(maps.v, p.v, p.shape, kHeadDim, kBlockK));
  }
  if (p.h != nullptr) {
    const uint64_t blocks = static_cast<uint64_t>(p.bh_count) * p.shape.num_q_blocks;
    check(encode_tensor_map<3>(maps.h, p.h, {kHeadDim, kHeadDim, blocks},
                               {kHeadDim * 2, kHeadDim * kHeadDim * 2}, {kPanel, kHeadDim, 1}));
    constexpr uint64_t kStateBytes = state_elements(C::kHeadDim) * 2;
    check(encode_tensor_map<4>(maps.dstate, p.dstate_q, {kHeadDim, kHeadDim, blocks, 1},
                               {kHeadDim * 2, kStateBytes, 16}, {kPanel, kRowsPerWarp, 1, 1}));
  }
  return status;
}

}  // namespace

cudaError_t launch_bwd_rows_sm90(const AttnBwdParams& p, int dtype, int head_dim) {
  return dispatch(dtype, head_dim, [&](auto instance) {
    using I = decltype(instance);
    using C = BwdRowSm90Config<typename I::Element, I::kHeadDim>;
    const auto kernel = bwd_rows_sm90_kernel<typename I::Element, I::kHeadDim>;
    constexpr int kSmemBytes = sizeof(typename C::Smem);
    BwdRowMaps maps = {};
    cudaError_t status = encode_maps<C>(maps, p);
    const int tiles = p.bh_count * p.shape.num_q_blocks;
    int ctas = 0;
    if (status == cudaSuccess) status = prepare_persistent(kernel, kSmemBytes, tiles, ctas);
    if (status != cudaSuccess) return status;
    kernel<<<ctas, kRowThreads, kSmemBytes, p.stream>>>(p, maps);
    return cudaGetLastError();
  });
}

}  // namespace sla2
