// The Python module: raw pointers, strides and a stream in, exceptions out. No torch, so one build
// serves all of them.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "sla2/sla2.h"

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using ShapeTuple = std::tuple<int, int, int, int, int>;  // B, N, H, D, dtype
using TensorTuple =
    std::tuple<Pointer, int64_t, int64_t, int64_t>;  // data, strides of batch, token, head
using OptionsTuple = std::tuple<int, int, int, bool, bool,
                                float>;  // quant, branch, path, phi_raw_k, smooth_k, scale
using GradOptionsTuple =
    std::tuple<int, int, bool, bool, float>;            // branch, path, phi_raw_k, smooth_k, scale
using AlphaTuple = std::tuple<Pointer, int64_t, bool>;  // data, stride of head, per token
using RouterTuple = std::tuple<Pointer, Pointer, int64_t, Pointer, int, int>;
using ListsTuple = std::tuple<Pointer, Pointer, int>;  // lut, counts, K
using WorkspaceTuple = std::tuple<Pointer, size_t>;

void check(sla2_status status) {
  if (status == SLA2_OK) return;
  if (status == SLA2_INVALID_ARGUMENT) throw py::value_error(sla2_last_error());
  throw std::runtime_error(sla2_last_error());
}

template <typename T>
T* pointer(Pointer address) {
  return reinterpret_cast<T*>(address);
}

sla2_shape to_shape(const ShapeTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

sla2_tensor to_tensor(const TensorTuple& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

sla2_router to_router(const RouterTuple& t) {
  return {pointer<const float>(std::get<0>(t)),
          pointer<const float>(std::get<1>(t)),
          std::get<2>(t),
          pointer<const int32_t>(std::get<3>(t)),
          std::get<4>(t),
          std::get<5>(t)};
}

sla2_block_lists to_lists(const ListsTuple& t) {
  return {pointer<uint16_t>(std::get<0>(t)), pointer<int32_t>(std::get<1>(t)), std::get<2>(t)};
}

void set_options(sla2_attn_fwd_params& params, const OptionsTuple& t) {
  params.quant = std::get<0>(t);
  params.branch = std::get<1>(t);
  params.path = std::get<2>(t);
  params.phi_raw_k = std::get<3>(t);
  params.smooth_k = std::get<4>(t);
  params.softmax_scale = std::get<5>(t);
}

void set_options(sla2_attn_bwd_params& params, const GradOptionsTuple& t) {
  params.branch = std::get<0>(t);
  params.path = std::get<1>(t);
  params.phi_raw_k = std::get<2>(t);
  params.smooth_k = std::get<3>(t);
  params.softmax_scale = std::get<4>(t);
}

template <typename Params>
void set_alpha(Params& params, const std::optional<AlphaTuple>& alpha) {
  if (!alpha) return;
  params.alpha_logit = pointer<const float>(std::get<0>(*alpha));
  params.alpha_stride_head = std::get<1>(*alpha);
  params.alpha_per_token = std::get<2>(*alpha);
}

template <typename Params>
Params make_params(const ShapeTuple& shape) {
  Params params = {};
  params.size = sizeof(params);
  params.shape = to_shape(shape);
  return params;
}

// Runs without the interpreter's lock; params name the stream.
template <typename Params>
void call(sla2_status (*function)(const Params*), const Params& params) {
  py::gil_scoped_release release;
  const sla2_status status = function(&params);
  py::gil_scoped_acquire acquire;
  check(status);
}

template <typename Params>
void enqueue(sla2_status (*function)(const Params*), Params& params,
             const WorkspaceTuple& workspace, Pointer stream) {
  params.workspace = pointer<void>(std::get<0>(workspace));
  params.workspace_bytes = std::get<1>(workspace);
  params.stream = pointer<CUstream_st>(stream);
  call(function, params);
}

// For optional inputs of which only the presence counts.
const float kAnything = 0.f;

size_t attn_fwd_workspace(const ShapeTuple& shape, const OptionsTuple& options, bool routed,
                          bool soft, int max_kv_blocks) {
  auto params = make_params<sla2_attn_fwd_params>(shape);
  set_options(params, options);
  params.router.proj_q = routed ? &kAnything : nullptr;
  params.soft_map = soft ? &kAnything : nullptr;
  params.lists.max_kv_blocks = max_kv_blocks;
  size_t bytes = 0;
  check(sla2_attn_fwd_workspace(&params, &bytes));
  return bytes;
}

void attn_fwd(const ShapeTuple& shape, const OptionsTuple& options, const TensorTuple& q,
              const TensorTuple& k, const TensorTuple& v, const TensorTuple& out,
              const std::optional<TensorTuple>& out_sparse, Pointer lse,
              const std::optional<AlphaTuple>& alpha, const std::optional<RouterTuple>& router,
              const ListsTuple& lists, Pointer soft_map, const WorkspaceTuple& workspace,
              Pointer stream) {
  auto params = make_params<sla2_attn_fwd_params>(shape);
  set_options(params, options);
  params.q = to_tensor(q);
  params.k = to_tensor(k);
  params.v = to_tensor(v);
  params.out = to_tensor(out);
  if (out_sparse) params.out_sparse = to_tensor(*out_sparse);
  params.lse = pointer<float>(lse);
  set_alpha(params, alpha);
  if (router) params.router = to_router(*router);
  params.lists = to_lists(lists);
  params.soft_map = pointer<const float>(soft_map);
  enqueue(sla2_attn_fwd, params, workspace, stream);
}

size_t attn_bwd_workspace(const ShapeTuple& shape, const GradOptionsTuple& options,
                          bool alpha_per_token, bool soft, int max_kv_blocks) {
  auto params = make_params<sla2_attn_bwd_params>(shape);
  set_options(params, options);
  params.alpha_per_token = alpha_per_token;
  params.soft_map = soft ? &kAnything : nullptr;
  params.lists.max_kv_blocks = max_kv_blocks;
  size_t bytes = 0;
  check(sla2_attn_bwd_workspace(&params, &bytes));
  return bytes;
}

void attn_bwd(const ShapeTuple& shape, const GradOptionsTuple& options, const TensorTuple& q,
              const TensorTuple& k, const TensorTuple& v, const TensorTuple& grad_out,
              const std::optional<TensorTuple>& out_sparse, Pointer lse,
              const std::optional<AlphaTuple>& alpha, const ListsTuple& lists,
              const TensorTuple& grad_q, const TensorTuple& grad_k, const TensorTuple& grad_v,
              Pointer grad_alpha_logit, Pointer soft_map, Pointer grad_log_map,
              const WorkspaceTuple& workspace, Pointer stream) {
  auto params = make_params<sla2_attn_bwd_params>(shape);
  set_options(params, options);
  params.q = to_tensor(q);
  params.k = to_tensor(k);
  params.v = to_tensor(v);
  params.grad_out = to_tensor(grad_out);
  if (out_sparse) params.out_sparse = to_tensor(*out_sparse);
  params.lse = pointer<const float>(lse);
  set_alpha(params, alpha);
  params.lists = to_lists(lists);
  params.grad_q = to_tensor(grad_q);
  params.grad_k = to_tensor(grad_k);
  params.grad_v = to_tensor(grad_v);
  params.grad_alpha_logit = pointer<float>(grad_alpha_logit);
  params.soft_map = pointer<const float>(soft_map);
  params.grad_log_map = pointer<float>(grad_log_map);
  enqueue(sla2_attn_bwd, params, workspace, stream);
}

size_t route_workspace(const ShapeTuple& shape, int path, int max_kv_blocks) {
  auto params = make_params<sla2_route_params>(shape);
  params.path = path;
  params.lists.max_kv_blocks = max_kv_blocks;
  size_t bytes = 0;
  check(sla2_route_workspace(&params, &bytes));
  return bytes;
}

void route(const ShapeTuple& shape, int path, bool smooth_k, const TensorTuple& q,
           const TensorTuple& k, const RouterTuple& router, const ListsTuple& lists, Pointer scores,
           const WorkspaceTuple& workspace, Pointer stream) {
  auto params = make_params<sla2_route_params>(shape);
  params.path = path;
  params.smooth_k = smooth_k;
  params.q = to_tensor(q);
  params.k = to_tensor(k);
  params.router = to_router(router);
  params.lists = to_lists(lists);
  params.scores = pointer<float>(scores);
  enqueue(sla2_route, params, workspace, stream);
}

void soft_map(const ShapeTuple& shape, double tau, Pointer scores, Pointer pinned_kv,
              int num_pinned, int num_kv_blocks, Pointer soft_map, Pointer stream) {
  auto params = make_params<sla2_soft_map_params>(shape);
  params.scores = pointer<const float>(scores);
  params.tau = tau;
  params.pinned_kv = pointer<const int32_t>(pinned_kv);
  params.num_pinned = num_pinned;
  params.num_kv_blocks = num_kv_blocks;
  params.soft_map = pointer<float>(soft_map);
  params.stream = pointer<CUstream_st>(stream);
  call(sla2_soft_map, params);
}

void soft_map_bwd(const ShapeTuple& shape, double tau, Pointer soft_map, Pointer grad_log_map,
                  Pointer grad_scores, Pointer stream) {
  auto params = make_params<sla2_soft_map_bwd_params>(shape);
  params.soft_map = pointer<const float>(soft_map);
  params.grad_log_map = pointer<const float>(grad_log_map);
  params.tau = tau;
  params.grad_scores = pointer<float>(grad_scores);
  params.stream = pointer<CUstream_st>(stream);
  call(sla2_soft_map_bwd, params);
}

void rotary(const ShapeTuple& shape, const TensorTuple& x, const TensorTuple& cos,
            const TensorTuple& sin, const TensorTuple& out, bool inverse, Pointer stream) {
  auto params = make_params<sla2_rotary_params>(shape);
  params.x = to_tensor(x);
  params.cos = to_tensor(cos);
  params.sin = to_tensor(sin);
  params.out = to_tensor(out);
  params.inverse = inverse;
  params.stream = pointer<CUstream_st>(stream);
  call(sla2_rotary, params);
}

std::optional<std::string> supported(int device, int dtype, int head_dim, int quant, int path) {
  if (sla2_supported(device, dtype, head_dim, quant, path) == SLA2_OK) return std::nullopt;
  return sla2_last_error();
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() =
      "Raw-pointer interface to libsla2; sla2.ops, ops_bwd, ops_soft and rotary are its only "
      "callers.";
  m.def("attn_fwd", &attn_fwd, py::kw_only(), py::arg("shape"), py::arg("options"), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("out"), py::arg("out_sparse"), py::arg("lse"),
        py::arg("alpha"), py::arg("router"), py::arg("lists"), py::arg("soft_map") = 0,
        py::arg("workspace"), py::arg("stream"));
  m.def("attn_fwd_workspace", &attn_fwd_workspace, py::kw_only(), py::arg("shape"),
        py::arg("options"), py::arg("routed"), py::arg("soft") = false, py::arg("max_kv_blocks"));
  m.def("attn_bwd", &attn_bwd, py::kw_only(), py::arg("shape"), py::arg("options"), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("grad_out"), py::arg("out_sparse"), py::arg("lse"),
        py::arg("alpha"), py::arg("lists"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"),
        py::arg("grad_alpha_logit"), py::arg("soft_map") = 0, py::arg("grad_log_map") = 0,
        py::arg("workspace"), py::arg("stream"));
  m.def("attn_bwd_workspace", &attn_bwd_workspace, py::kw_only(), py::arg("shape"),
        py::arg("options"), py::arg("alpha_per_token"), py::arg("soft") = false,
        py::arg("max_kv_blocks"));
  m.def("route", &route, py::kw_only(), py::arg("shape"), py::arg("path"), py::arg("smooth_k"),
        py::arg("q"), py::arg("k"), py::arg("router"), py::arg("lists"), py::arg("scores"),
        py::arg("workspace"), py::arg("stream"));
  m.def("route_workspace", &route_workspace, py::kw_only(), py::arg("shape"), py::arg("path"),
        py::arg("max_kv_blocks"));
  m.def("soft_map", &soft_map, py::kw_only(), py::arg("shape"), py::arg("tau"), py::arg("scores"),
        py::arg("pinned_kv"), py::arg("num_pinned"), py::arg("num_kv_blocks"), py::arg("soft_map"),
        py::arg("stream"));
  m.def("soft_map_bwd", &soft_map_bwd, py::kw_only(), py::arg("shape"), py::arg("tau"),
        py::arg("soft_map"), py::arg("grad_log_map"), py::arg("grad_scores"), py::arg("stream"));
  m.def("rotary", &rotary, py::kw_only(), py::arg("shape"), py::arg("x"), py::arg("cos"),
        py::arg("sin"), py::arg("out"), py::arg("inverse"), py::arg("stream"));
  m.def("supported", &supported, py::arg("device"), py::arg("dtype"), py::arg("head_dim"),
        py::arg("quant"), py::arg("path"),
        "None, or every reason why the combination cannot run on the device.");
  m.def("built_archs", &sla2_built_archs);
  m.def("version", &sla2_version);
  m.def("runtime_version", &runtime_version);
}
