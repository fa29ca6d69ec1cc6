// The linear branch inside the attention kernel. phi's normaliser cancels between numerator and
// denominator, so with e = exp(q - max) in bf16
//   O = alpha O_s + f (e H),   f = (1 - alpha) / (e Z),
// computed on the accumulators of the sparse branch as f (alpha / f O_s + e H): e needs no second
// rounding. H arrives in the main loop's ring, 64 rows at a time; Q is read again from global
// memory (L2 still holds it) into the registers that the scores no longer need.
//
// Features are dealt to fragments so that a lane's share of a row is contiguous: of each 32
// features a quad's lane t has the eight from 8t, four for each of two k16 steps. The products do
// not care about the order as long as the rows of H follow it, and ldmatrix takes any row address.
#pragma once

#include "../common/convert.cuh"
#include "attn_config.cuh"

namespace sla2 {

// Feature at position p of k16 step `half` of a group of 32.
__device__ __forceinline__ int feature_at(int half, int p) {
  return 4 * half + p % 8 / 2 * 8 + p / 8 * 2 + p % 2;
}

// Swizzle of H rows: the eight rows of one ldmatrix are features {0, 1, 8, 9, 16, 17, 24, 25} +
// const.
template <class C>
__device__ __forceinline__ int swizzle_h(int row, int chunk) {
  return row * C::kWideRowBytes + ((chunk ^ (row / 8 % 4 * 2 + row % 2)) << 4);
}

// Rows [64 part, 64 part + 64) of H, bf16 [D][D], into a ring tile.
template <class C>
__device__ __forceinline__ void load_h(uint32_t tile, const uint16_t* h, int part) {
  constexpr int kChunks = C::kWideRowBytes / 16;
#pragma unroll 1  // twice a CTA; unrolled, its addresses would sit in registers through the main
                  // loop
  for (int i = 0; i < C::kRowsH * kChunks / C::kThreads; ++i) {
    const int item = i * C::kThreads + threadIdx.x;
    cp_async_16(tile + swizzle_h<C>(item / kChunks, item % kChunks),
                h + (part * C::kRowsH * kChunks + item) * 8);
  }
}

template <class C>
class LinearBranch {
 public:
  using Element = typename C::Element;

  // Starts the reads. q: first row of the query block; rows: its valid rows.
  __device__ __forceinline__ void load(const Element* q, int64_t stride_token, int rows) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row =
            threadIdx.x / 32 * C::kRowsPerWarp + 16 * m + 8 * half + threadIdx.x % 32 / 4;
        const Element* source = q + min(row, rows - 1) * stride_token + threadIdx.x % 4 * 8;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          rows_[m][half][group] = __ldg(reinterpret_cast<const uint4*>(source + 32 * group));
        }
      }
    }
  }

  // Row maxima of Q; adds q . x (x float [D]) to dot unless x is null.
  __device__ __forceinline__ void scan(const float* x, float (&dot)[C::kTilesM][2]) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) row_max_[m][0] = row_max_[m][1] = -INFINITY;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          row_max_[m][half] = max_nan(row_max_[m][half], max8<Element>(rows_[m][half][group]));
        }
      }
    }
    if (x != nullptr) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float factor[8];
        load_features(factor, x + 32 * group);
#pragma unroll
        for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float q[8];
            unpack8<Element>(rows_[m][half][group], q);
#pragma unroll
            for (int i = 0; i < 8; ++i) dot[m][half] = fmaf(q[i], factor[i], dot[m][half]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max_[m][half] = lane_max<4>(row_max_[m][half]);
        dot[m][half] = lane_sum<4>(dot[m][half]);
      }
    }
  }

  // Q to e, in place; denominator = e Z with z = float [2][D] in shared memory, high and low part
  // of Z.
  __device__ __forceinline__ void exponentiate(const float* z,
                                               float (&denominator)[C::kTilesM][2]) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) denominator[m][0] = denominator[m][1] = 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float sum[8], low[8];
      load_features(sum, z + 32 * group);
      load_features(low, z + C::kHeadDim + 32 * group);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += low[i];
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float offset = -row_max_[m][half] * kLog2e;
          float e[8];
          unpack8<Element>(rows_[m][half][group], e);
#pragma unroll
          for (int i = 0; i < 8; ++i) e[i] = exp2_approx(fmaf(e[i], kLog2e, offset));
          rows_[m][half][group] = pack8<__nv_bfloat16>(e);
          unpack8<__nv_bfloat16>(rows_[m][half][group], e);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            denominator[m][half] = fmaf(e[i], sum[i], denominator[m][half]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) denominator[m][half] = lane_sum<4>(denominator[m][half]);
    }
  }

  // acc += e H for the features of the next part of H, whose e sits in the first groups; the others
  // move up. The caller keeps its loop over the parts rolled, so that the compiler cannot prepare
  // the operands of all of them at once and spill.
  __device__ __forceinline__ void accumulate(float (&acc)[C::kTilesM][C::kTilesD][4],
                                             uint32_t h_tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int group = 0; group < C::kRowsH / 32; ++group) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t a[C::kTilesM][4];
#pragma unroll
        for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4& packed = rows_[m][half][group];
            a[m][half] = step == 0 ? packed.x : packed.z;
            a[m][half + 2] = step == 0 ? packed.y : packed.w;
          }
        }
        const int row = 32 * group + feature_at(step, lane % 16);
#pragma unroll
        for (int d = 0; d < C::kTilesD; d += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, h_tile + swizzle_h<C>(row, d + lane / 16));
#pragma unroll
          for (int m = 0; m < C::kTilesM; ++m) {
            mma<__nv_bfloat16>(acc[m][d], a[m], b[0], b[1]);
            mma<__nv_bfloat16>(acc[m][d + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int group = 0; group + C::kRowsH / 32 < kGroups; ++group) {
          rows_[m][half][group] = rows_[m][half][group + C::kRowsH / 32];
        }
      }
    }
  }

 private:
  static constexpr int kGroups = C::kHeadDim / 32;

  static __device__ __forceinline__ void load_features(float (&x)[8], const float* group) {
    const float4* source = reinterpret_cast<const float4*>(group + threadIdx.x % 4 * 8);
    const float4 first = source[0], second = source[1];
    x[0] = first.x, x[1] = first.y, x[2] = first.z, x[3] = first.w;
    x[4] = second.x, x[5] = second.y, x[6] = second.z, x[7] = second.w;
  }
  uint4 rows_[C::kTilesM][2]
             [kGroups];  // eight features of each row from each group of 32: Q, then e in bf16
  float row_max_[C::kTilesM][2];
};

}  // namespace sla2
