// Second half of the Hopper router: scores, selection, lists and complement bits in one launch.
//
// A cluster of four CTAs owns 64 query blocks of a head. The product wants 64 rows an instruction,
// the selection wants whole rows of T_n scores in shared memory, of which 16 rows fit at two CTAs
// an SM: so each CTA multiplies all 64 rows with a quarter of the keys and hands each warp's 16
// rows to the CTA that selects from them, through distributed shared memory. Keys are read from L2
// once for 64 rows.
#include "../common/layout.cuh"
#include "../common/params.h"
#include "async.cuh"
#include "launch.h"
#include "router_select.cuh"
#include "router_split.cuh"
#include "wgmma.cuh"

namespace sla2 {
namespace {

constexpr int kCluster = 4;
constexpr int kRows = kQueryTile / kCluster;  // that a CTA selects from
static_assert(kRows == 16, "the scores of warp w of a warpgroup go to CTA w");
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32, kWarpgroups = kThreads / 128;

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of another CTA's shared memory.
__device__ __forceinline__ uint32_t map_to_cta(uint32_t address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ void cluster_store(uint32_t address, uint2 x) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y)
               : "memory");
}

constexpr Swizzle kNoSwizzle{0};
// D (64 x 32) = A B (+ D): fp16, A in registers, B K-major core matrices without swizzle.
__device__ __forceinline__ void wgmma_keys(float (&d)[16], const uint32_t (&a)[4], uint64_t b,
                                           int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// Shared memory: [keys of kRows rows | ring of key tiles | complement bits | barriers]. The ring's
// stages belong to the warpgroups in turn; after the product it holds the warps' short lists.
constexpr int kSmemOfTwo = (228 / 2 - 1) * 1024, kSmemOfOne = 227 * 1024;
constexpr int kMaxStages = 4;
struct RouteSmem {
  int ring, bits, barriers, bytes, stages;
};
__host__ __device__ constexpr RouteSmem route_smem(int num_k_blocks, int tile_bytes, int stages) {
  RouteSmem s = {};
  s.stages = stages;
  s.ring = kRows * row_pitch(num_k_blocks) * 4;
  s.bits = s.ring + stages * tile_bytes;
  s.barriers = s.bits + mask_words(num_k_blocks) * kRows * 4;
  s.bytes = s.barriers + kMaxStages * 8;
  return s;
}

template <int kHeadDim>
struct Queries {
  uint32_t parts[kParts][kHeadDim / 16][4];
  float scale[2];  // of rows 16 (warp % 4) + lane / 4 + {0, 8}
};

// One tile's scores, optional.
__device__ __forceinline__ void store_scores(const RouteParams& p, const float (&x)[16],
                                             const float (&q_scale)[2], int bh, int row0,
                                             int column0) {
  const int lane = threadIdx.x % 32, num_rows = p.shape.num_q_blocks;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int row = row0 + lane / 4 + j / 2 % 2 * 8;
    const int column = column0 + j / 4 * 8 + lane % 4 * 2 + j % 2;
    if (row < num_rows && column < p.shape.num_k_blocks) {
      p.scores[(static_cast<int64_t>(bh) * num_rows + row) * p.shape.num_k_blocks + column] =
          x[j] * q_scale[j / 2 % 2];
    }
  }
}

// Scores of 64 rows and every kCluster-th key tile from blockIdx.x % kCluster on; the warpgroups
// take turns.
template <int kHeadDim>
__device__ __forceinline__ void score(const RouteParams& p, const RouteSmem& s, char* smem, int bh,
                                      int row0) {
  using L = SplitLayout<kHeadDim>;
  constexpr int kSteps = kHeadDim / 16;
  const int rank = blockIdx.x % kCluster;
  // Known to be uniform: descriptors and barriers then live in uniform registers.
  const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int num_keys = p.shape.num_k_blocks, tiles = (num_keys + kKeyTile - 1) / kKeyTile;
  const int depth = s.stages / kWarpgroups;  // stages of this warpgroup
  const uint32_t ring = smem_address(smem) + s.ring + group * depth * L::kKeyBytes;
  const uint32_t barriers = smem_address(smem) + s.barriers + group * depth * 8;
  const int64_t k_row0 = static_cast<int64_t>(bh) * split_rows(num_keys);
  const char* keys = reinterpret_cast<const char*>(p.k.parts) + k_row0 * kParts * kHeadDim * 2;

  const auto tile_of = [&](int i) { return rank + kCluster * (group + kWarpgroups * i); };
  const auto load = [&](int i, int stage) {  // by one thread of the warpgroup
    if (tile_of(i) >= tiles) return;
    mbarrier_expect(barriers + stage * 8, L::kKeyBytes);
    bulk_load(ring + stage * L::kKeyBytes, keys + static_cast<int64_t>(tile_of(i)) * L::kKeyBytes,
              L::kKeyBytes, barriers + stage * 8);
  };
  if (threadIdx.x % 128 == 0) {
#pragma unroll 1
    for (int i = 0; i < depth; ++i) load(i, i);
  }

  Queries<kHeadDim> q;
  const int64_t q_row0 = static_cast<int64_t>(bh) * split_rows(p.shape.num_q_blocks) + row0;
  const uint4* q_parts = reinterpret_cast<const uint4*>(p.q.parts) +
                         q_row0 * (kParts * kHeadDim * 2 / 16) + threadIdx.x % 128;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 words = q_parts[(part * kSteps + step) * 128];
      q.parts[part][step][0] = words.x;
      q.parts[part][step][1] = words.y;
      q.parts[part][step][2] = words.z;
      q.parts[part][step][3] = words.w;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    q.scale[half] = p.q.scale[q_row0 + 16 * warp + lane / 4 + 8 * half];

  const int pitch = row_pitch(num_keys);
  uint32_t destination[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    destination[half] =
        map_to_cta(smem_address(smem) + ((lane / 4 + 8 * half) * pitch + lane % 4 * 2) * 4, warp);
  }
  cluster_wait();  // the other CTAs run
  const float* k_scale_of_lane = p.k.scale + k_row0 + lane % 4 * 2;
  int stage = 0, parity = 0;
  for (int i = 0; tile_of(i) < tiles; ++i) {
    const int tile = tile_of(i);
    float2 k_scale[4];
#pragma unroll
    for (int n = 0; n < 4; ++n)
      k_scale[n] = *reinterpret_cast<const float2*>(k_scale_of_lane + tile * kKeyTile + 8 * n);

    mbarrier_wait(barriers + stage * 8, parity);
    const uint64_t b =
        wgmma_descriptor(ring + stage * L::kKeyBytes, L::kColumnStep, L::kCoreMatrix, kNoSwizzle);
    float acc[16];
    wgmma_fence();
    // Small terms first: the sum is rounded toward zero at every step, and these steps are free.
#pragma unroll
    for (int term = 0; term < 3; ++term) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma_keys(acc, q.parts[term == 0 ? kLow : kHigh][step],
                   advance(b, (term == 1 ? kLow : kHigh) * L::kKeyPart + step * 2 * L::kColumnStep),
                   term + step > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
    named_barrier(1 + group, 128);
    if (threadIdx.x % 128 == 0) load(i + depth, stage);
    if (++stage == depth) {
      stage = 0;
      parity ^= 1;
    }

    // The row's factor changes no order and waits for the scores. The sum with zero turns -0 into
    // the +0 of a float32 sum.
#pragma unroll
    for (int j = 0; j < 16; ++j)
      acc[j] = fmaf(acc[j], j % 2 == 0 ? k_scale[j / 4].x : k_scale[j / 4].y, 0.f);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      cluster_store(destination[j / 2 % 2] + (tile * kKeyTile + j / 4 * 8) * 4,
                    make_uint2(order_key(acc[j]), order_key(acc[j + 1])));
    }
    if (p.scores != nullptr) store_scores(p, acc, q.scale, bh, row0 + 16 * warp, tile * kKeyTile);
  }
}

template <int kHeadDim>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 2)
    route_kernel(const __grid_constant__ RouteParams p, const __grid_constant__ RouteSmem s) {
  extern __shared__ __align__(128) char smem[];
  // In this order: `linear`, which starts then, does not wait for what project has waited for.
  wait_predecessor();
  trigger_dependents();
  const int num_rows = p.shape.num_q_blocks, num_keys = p.shape.num_k_blocks;
  const int groups = (num_rows + kQueryTile - 1) / kQueryTile, pitch = row_pitch(num_keys);
  const int bh = blockIdx.x / kCluster / groups;
  const int group_row0 = blockIdx.x / kCluster % groups * kQueryTile;
  const int row0 = group_row0 + blockIdx.x % kCluster * kRows;  // this CTA's rows
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t* keys = reinterpret_cast<uint32_t*>(smem);
  uint32_t* bits = reinterpret_cast<uint32_t*>(smem + s.bits);  // [word][kRows]

  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < s.stages; ++i) mbarrier_init(smem_address(smem) + s.barriers + i * 8, 1);
    fence_barrier_init();
  }
  const int num_bits = mask_words(num_keys) * kRows;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_bits; i += kThreads) bits[i] = mask_all(i / kRows, num_keys);
  __syncthreads();
  cluster_arrive();
  score<kHeadDim>(p, s, smem, bh, group_row0);
  cluster_arrive();
  cluster_wait();  // all keys of this CTA's rows are there, and nobody uses its ring

  ShortList& list = reinterpret_cast<ShortList*>(smem + s.ring)[warp];
  const int64_t first_row = static_cast<int64_t>(bh) * num_rows + row0;
  const int own_rows = min(kRows, num_rows - row0);
  for (int row = warp; row < own_rows; row += kWarps) {
    uint32_t* row_keys = keys + row * pitch;
    prepare_row(row_keys, num_keys, p.pinned_kv, p.num_pinned);
    uint16_t* lut = p.lut + (first_row + row) * p.num_kv_blocks;
    select_largest(row_keys, num_keys, p.num_kv_blocks, list, [&](int position, int column) {
      lut[position] = static_cast<uint16_t>(column);
      atomicAnd(&bits[column / 32 * kRows + row], ~(1u << mask_bit(column)));
    });
    if (lane == 0) p.counts[first_row + row] = p.num_kv_blocks;
  }
  if (p.mask == nullptr) return;
  __syncthreads();
  const int mask_row = mask_pitch(num_rows);
  uint32_t* mask = p.mask + static_cast<int64_t>(bh) * mask_words(num_keys) * mask_row + row0;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_bits; i += kThreads) {
    if (i % kRows < own_rows)
      mask[static_cast<int64_t>(i / kRows) * mask_row + i % kRows] = bits[i];
  }
}

// Four stages unless only two let two CTAs share an SM, or fit at all.
RouteSmem plan_smem(int num_k_blocks, int tile_bytes) {
  const RouteSmem two = route_smem(num_k_blocks, tile_bytes, 2);
  const RouteSmem four = route_smem(num_k_blocks, tile_bytes, 4);
  if (four.bytes <= kSmemOfTwo) return four;
  if (two.bytes <= kSmemOfTwo) return two;
  return four.bytes <= kSmemOfOne ? four : two;
}

template <int kHeadDim>
cudaError_t launch(const RouteParams& p) {
  static_assert(
      2 * SplitLayout<kHeadDim>::kKeyBytes >= kWarps * static_cast<int>(sizeof(ShortList)),
      "the ring holds the short lists");
  const RouteSmem s = plan_smem(p.shape.num_k_blocks, SplitLayout<kHeadDim>::kKeyBytes);
  const cudaError_t status = cudaFuncSetAttribute(
      route_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, s.bytes);
  if (status != cudaSuccess) return status;
  const int groups = (p.shape.num_q_blocks + kQueryTile - 1) / kQueryTile;
  const int grid = p.shape.num_bh * groups * kCluster;
  return launch_overlapped(route_kernel<kHeadDim>, grid, kThreads, s.bytes, p.stream, p, s);
}

}  // namespace

bool route_sm90_fits(const Shape& shape) {
  constexpr int kTileBytes = SplitLayout<128>::kKeyBytes;
  return lane_pairs(shape.num_k_blocks) <= kMaxLanePairs &&
         route_smem(shape.num_k_blocks, kTileBytes, 2).bytes <= kSmemOfOne;
}

cudaError_t launch_route_sm90(const RouteParams& p, int head_dim) {
  return head_dim == 128 ? launch<128>(p) : launch<64>(p);
}

}  // namespace sla2
