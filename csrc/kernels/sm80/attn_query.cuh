// The portable kernel's second read of Q, for the linear branch, and its way of storing rows.
#pragma once

#include "../common/attn_output.cuh"

namespace sla2 {

// The warp's rows of Q, read again from global memory (L2 still holds them) into the registers that
// the scores no longer need, then e. Features are dealt to fragments so that a lane's share of a
// row is contiguous: of each 32 features a quad's lane t has the eight from 8 t, four for each of
// two k16 steps. The products do not care about the order as long as the rows of H follow it.
template <class C>
class QueryFeatures {
 public:
  using Element = typename C::Element;
  static constexpr int kGroups = C::kHeadDim / 32;

  // Starts the reads. q: first row of the query block; rows: its valid rows.
  __device__ __forceinline__ void load(const Element* q, int64_t stride_token, int rows) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = C::tile_row(m) + 8 * half + threadIdx.x % 32 / 4;
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

  // e as the A operand of k16 step `step` (0, 1) of a group of 32 features.
  __device__ __forceinline__ void operand(uint32_t (&a)[4], int m, int group, int step) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4& packed = rows_[m][half][group];
      a[half] = step == 0 ? packed.x : packed.z;
      a[half + 2] = step == 0 ? packed.y : packed.w;
    }
  }

  // Drops the first kCount groups; the others move up, so that a rolled loop finds its operands in
  // the same registers every time.
  template <int kCount>
  __device__ __forceinline__ void shift_groups() {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int group = 0; group + kCount < kGroups; ++group) {
          rows_[m][half][group] = rows_[m][half][group + kCount];
        }
      }
    }
  }

 private:
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

// The warp's rows of accumulators, times a factor per row and one per channel (null: 1), to `view`,
// eight rows at a time through `staging`, the warp's own eight rows of shared memory.
template <class C, typename RowFactor>
__device__ __forceinline__ void store_rows(const float (&acc)[C::kTilesM][C::kTilesD][4],
                                           const TensorView& view, int bh, int num_heads, int row0,
                                           int rows, char* staging, RowFactor row_factor,
                                           const float* channel_factor) {
  using Element = typename C::Element;
  constexpr int kChunks = C::kWideRowBytes / 16;
  const int lane = threadIdx.x % 32;
  Element* base =
      const_cast<Element*>(head_base<Element>(view, bh, num_heads)) + row0 * view.stride_token;
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row = row_factor(m, half);
      __syncwarp();
#pragma unroll
      for (int d = 0; d < C::kTilesD; ++d) {
        float2 channel = make_float2(1.f, 1.f);
        if (channel_factor != nullptr) {
          channel = *reinterpret_cast<const float2*>(channel_factor + 8 * d);
        }
        *reinterpret_cast<uint32_t*>(staging + swizzle<C::kWideRowBytes>(lane / 4, d) +
                                     lane % 4 * 4) =
            Pair<Element>::from_floats(acc[m][d][2 * half] * row * channel.x,
                                       acc[m][d][2 * half + 1] * row * channel.y);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8 * kChunks / 32; ++i) {
        const int item = i * 32 + lane, tile_row = item / kChunks, chunk = item % kChunks;
        const int row = C::tile_row(m) + 8 * half + tile_row;
        if (row < rows) {
          *reinterpret_cast<uint4*>(base + row * view.stride_token + chunk * 8) =
              *reinterpret_cast<const uint4*>(staging + swizzle<C::kWideRowBytes>(tile_row, chunk));
        }
      }
    }
  }
}

}  // namespace sla2
