// What the forward and the backward pipeline share: the workspace, checks of it and the device, and
// the first launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/device.h"
#include "core/error.h"
#include "core/nvtx.h"
#include "core/validate.h"
#include "kernels/common/params.h"
#include "sla2/sla2.h"

namespace sla2 {

// Hands out 256-byte aligned pieces of the workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Heads in the Hopper path's ring of states: as many as fit this, of which L2 holds what it can,
// but at least two, for one to be made while the one before is used; more than three gain nothing.
inline constexpr int64_t kStateRingBytes = 40 << 20;
inline int state_slots(int heads, int64_t head_bytes) {
  return std::min(heads, static_cast<int>(std::clamp<int64_t>(kStateRingBytes / head_bytes, 2, 3)));
}

inline bool is_empty(const Shape& shape) { return shape.num_bh == 0 || shape.seqlen == 0; }

inline TensorView view(const sla2_tensor& tensor) {
  return {tensor.data, tensor.stride_batch, tensor.stride_token, tensor.stride_head};
}

inline void require_workspace(const Arena& arena, const void* workspace, size_t bytes) {
  require(bytes >= arena.used(), "workspace_bytes is ", bytes, ": ", arena.used(), " are needed");
  require(arena.used() == 0 || workspace != nullptr, "workspace is null");
  require(reinterpret_cast<uintptr_t>(workspace) % 256 == 0, "workspace is not 256-byte aligned");
}

inline void require_support(int dtype, int head_dim, int quant, int path) {
  const std::string reasons =
      not_supported_reasons(device_info(current_device()), dtype, head_dim, quant, path);
  if (!reasons.empty()) throw Error(SLA2_UNSUPPORTED, reasons);
}

inline void run_pool(const Shape& shape, const sla2_shape& given, PoolParams pool,
                     ReduceParams reduce) {
  const NvtxRange range("sla2.pool");
  const std::string problem = describe(given);
  pool.shape = reduce.shape = shape;
  if (pool.q_mean != nullptr || pool.k_sum != nullptr || pool.v_amax_partial != nullptr) {
    check_launch(launch_pool(pool, given.dtype, given.head_dim), "pool", problem);
  }
  check_launch(launch_reduce(reduce, given.head_dim), "reduce", problem);
}

// Width of the lists that the kernels read: a soft map may list every key block.
template <typename Params>
int list_width(const Shape& shape, const Params& p) {
  return p.soft_map != nullptr ? shape.num_k_blocks : p.lists.max_kv_blocks;
}

// The caller's lists made safe, or those of a soft map with the linear branch's weights.
template <typename Params>
void run_lists(const Shape& shape, const Params& p, uint16_t* lut, int* counts, uint16_t* weights) {
  const std::string problem = describe(p.shape);
  if (p.soft_map != nullptr) {
    const SoftListParams soft = {shape, p.soft_map, lut, counts, weights, p.stream};
    check_launch(launch_soft_lists(soft), "soft_lists", problem);
    return;
  }
  const CompactParams compact = {shape, p.lists.lut, p.lists.counts, p.lists.max_kv_blocks,
                                 lut,   counts,      p.stream};
  check_launch(launch_compact(compact), "compact", problem);
}

}  // namespace sla2
