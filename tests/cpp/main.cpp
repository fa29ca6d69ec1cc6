// Uses libsla2 as another project would: version, validation without a GPU, and, where a GPU is
// present, one attention whose lists hold every key block, against a plain softmax attention.
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "sla2/sla2.h"

extern "C" int check_from_c(void);

namespace {

constexpr int kSeqlen = 200;  // not a multiple of either block
constexpr int kHeads = 2;
constexpr int kHeadDim = 64;
constexpr int kNumQBlocks = (kSeqlen + SLA2_BLOCK_Q - 1) / SLA2_BLOCK_Q;
constexpr int kNumKvBlocks = (kSeqlen + SLA2_BLOCK_K - 1) / SLA2_BLOCK_K;
constexpr size_t kElements = size_t{kSeqlen} * kHeads * kHeadDim;

[[noreturn]] void fail(const char* what, const char* detail) {
  std::fprintf(stderr, "FAILED: %s: %s\n", what, detail);
  std::exit(1);
}

void expect(bool condition, const char* what) {
  if (!condition) fail(what, sla2_last_error());
}

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(what, cudaGetErrorString(status));
}

// Device memory that frees itself.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) { check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  template <typename T>
  void upload(const std::vector<T>& host) {
    check_cuda(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
               "upload");
  }
  template <typename T>
  void download(std::vector<T>* host) const {
    check_cuda(cudaMemcpy(host->data(), data_, host->size() * sizeof(T), cudaMemcpyDeviceToHost),
               "download");
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// A problem of the shape above, with every pointer still null.
sla2_attn_fwd_params make_params() {
  sla2_attn_fwd_params params;
  std::memset(&params, 0, sizeof(params));
  params.size = sizeof(params);
  params.shape = {1, kSeqlen, kHeads, kHeadDim, SLA2_FLOAT16};
  params.quant = SLA2_QUANT_NONE;
  params.branch = SLA2_BRANCH_BOTH;
  params.path = SLA2_PATH_AUTO;
  params.smooth_k = 1;
  params.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  params.router.num_kv_blocks = kNumKvBlocks;
  params.lists.max_kv_blocks = kNumKvBlocks;
  return params;
}

void test_validation() {
  sla2_attn_fwd_params params = make_params();
  params.size = 8;
  expect(sla2_attn_fwd(&params) == SLA2_INVALID_ARGUMENT, "a wrong struct size is refused");
  expect(std::strstr(sla2_last_error(), "size") != nullptr, "the message names the size");

  // The first call of a program, which nothing else has checked.
  size_t bytes = 0;
  expect(sla2_attn_fwd_workspace(&params, &bytes) == SLA2_INVALID_ARGUMENT, "there too");
  params = make_params();
  params.quant = 7;
  expect(sla2_attn_fwd_workspace(&params, &bytes) == SLA2_INVALID_ARGUMENT, "an unknown quant");
  expect(std::strstr(sla2_last_error(), "quant is 7") != nullptr, "the message names it");
  params = make_params();
  params.lists.max_kv_blocks = -1;
  expect(sla2_attn_fwd_workspace(&params, &bytes) == SLA2_INVALID_ARGUMENT, "lists of width -1");
  sla2_attn_bwd_params backward = {};
  expect(sla2_attn_bwd_workspace(&backward, &bytes) == SLA2_INVALID_ARGUMENT, "size 0, backward");
  sla2_route_params route = {};
  expect(sla2_route_workspace(&route, &bytes) == SLA2_INVALID_ARGUMENT, "size 0, router");

  params = make_params();
  params.shape.head_dim = 96;
  expect(sla2_attn_fwd(&params) == SLA2_INVALID_ARGUMENT, "head_dim 96 is refused");
  expect(std::strstr(sla2_last_error(), "96") != nullptr, "the message names what was given");

  params = make_params();
  expect(sla2_attn_fwd(&params) == SLA2_INVALID_ARGUMENT, "null tensors are refused");
  expect(check_from_c() == 0, "the same from C");

  sla2_soft_map_params map = {};
  map.size = sizeof(map);
  map.shape = params.shape;
  expect(sla2_soft_map(&map) == SLA2_INVALID_ARGUMENT, "a temperature of zero is refused");
  expect(std::strstr(sla2_last_error(), "tau") != nullptr, "the message names it");
  map.tau = 0.1;
  map.num_kv_blocks = kNumKvBlocks + 1;
  expect(sla2_soft_map(&map) == SLA2_INVALID_ARGUMENT, "more key blocks than there are");
  map.num_kv_blocks = kNumKvBlocks;
  expect(sla2_soft_map(&map) == SLA2_INVALID_ARGUMENT, "null scores are refused");
  expect(std::strstr(sla2_last_error(), "scores") != nullptr, "the message names the scores");

  sla2_soft_map_bwd_params grad = {};
  grad.size = sizeof(grad);
  grad.shape = params.shape;
  grad.tau = 0.1;
  expect(sla2_soft_map_bwd(&grad) == SLA2_INVALID_ARGUMENT, "a null map is refused");
  grad.shape.seqlen = 0;
  expect(sla2_soft_map_bwd(&grad) == SLA2_OK, "an empty problem needs nothing");

  sla2_rotary_params rotary = {};
  rotary.size = sizeof(rotary);
  rotary.shape = params.shape;
  expect(sla2_rotary(&rotary) == SLA2_INVALID_ARGUMENT, "null queries are refused");
  rotary.x = rotary.cos = rotary.sin = rotary.out = {&rotary, 0, 8, 64};
  rotary.x.data = reinterpret_cast<void*>(uintptr_t{256});
  rotary.cos = {rotary.x.data, 0, 2, 0};
  expect(sla2_rotary(&rotary) == SLA2_INVALID_ARGUMENT, "angles 8 bytes apart are refused");
  expect(std::strstr(sla2_last_error(), "cos.stride_token") != nullptr, "the message names them");
}

std::vector<__half> random_tensor(std::mt19937* generator) {
  std::normal_distribution<float> normal;
  std::vector<__half> tensor(kElements);
  for (__half& value : tensor) value = __float2half(normal(*generator));
  return tensor;
}

// softmax(Q K^T * scale) V in double, [N, H, D].
std::vector<double> dense_attention(const std::vector<__half>& q, const std::vector<__half>& k,
                                    const std::vector<__half>& v, double scale) {
  const auto at = [](const std::vector<__half>& tensor, int token, int head, int channel) {
    return static_cast<double>(
        __half2float(tensor[(size_t{1} * token * kHeads + head) * kHeadDim + channel]));
  };
  std::vector<double> out(kElements);
  std::vector<double> weights(kSeqlen);
  for (int head = 0; head < kHeads; ++head) {
    for (int row = 0; row < kSeqlen; ++row) {
      double row_max = -INFINITY;
      for (int key = 0; key < kSeqlen; ++key) {
        double dot = 0;
        for (int c = 0; c < kHeadDim; ++c) dot += at(q, row, head, c) * at(k, key, head, c);
        weights[key] = dot * scale;
        row_max = std::fmax(row_max, weights[key]);
      }
      double sum = 0;
      for (double& weight : weights) sum += weight = std::exp(weight - row_max);
      for (int c = 0; c < kHeadDim; ++c) {
        double value = 0;
        for (int key = 0; key < kSeqlen; ++key) value += weights[key] * at(v, key, head, c);
        out[(size_t{1} * row * kHeads + head) * kHeadDim + c] = value / sum;
      }
    }
  }
  return out;
}

// Relative L2 error of the kernels against dense attention: with every block listed the linear
// branch is empty, whatever alpha is.
double attention_error() {
  std::mt19937 generator(7);
  const std::vector<__half> q = random_tensor(&generator);
  const std::vector<__half> k = random_tensor(&generator);
  const std::vector<__half> v = random_tensor(&generator);
  std::vector<float> projection(kHeadDim * kHeadDim);
  for (int i = 0; i < kHeadDim; ++i) projection[i * kHeadDim + i] = 1.0f;
  const std::vector<float> alpha_logit(kNumQBlocks, 30.0f);

  const size_t bytes = kElements * sizeof(__half);
  DeviceBuffer q_device(bytes), k_device(bytes), v_device(bytes), out_device(bytes);
  DeviceBuffer projection_device(projection.size() * sizeof(float));
  DeviceBuffer alpha_device(alpha_logit.size() * sizeof(float));
  DeviceBuffer lut(sizeof(uint16_t) * kHeads * kNumQBlocks * kNumKvBlocks);
  DeviceBuffer counts(sizeof(int32_t) * kHeads * kNumQBlocks);
  q_device.upload(q);
  k_device.upload(k);
  v_device.upload(v);
  projection_device.upload(projection);
  alpha_device.upload(alpha_logit);

  sla2_attn_fwd_params params = make_params();
  const auto tensor = [](const DeviceBuffer& buffer) {
    return sla2_tensor{buffer.as<void>(), int64_t{kElements}, int64_t{kHeads} * kHeadDim, kHeadDim};
  };
  params.q = tensor(q_device);
  params.k = tensor(k_device);
  params.v = tensor(v_device);
  params.out = tensor(out_device);
  params.alpha_logit = alpha_device.as<float>();
  params.router.proj_q = params.router.proj_k = projection_device.as<float>();
  params.lists = {lut.as<uint16_t>(), counts.as<int32_t>(), kNumKvBlocks};
  expect(sla2_attn_fwd_workspace(&params, &params.workspace_bytes) == SLA2_OK, "workspace size");
  DeviceBuffer workspace(params.workspace_bytes + 1);
  params.workspace = workspace.as<void>();
  check_cuda(cudaStreamCreate(&params.stream), "cudaStreamCreate");
  expect(sla2_attn_fwd(&params) == SLA2_OK, "sla2_attn_fwd");
  check_cuda(cudaStreamSynchronize(params.stream), "sla2_attn_fwd ran");
  check_cuda(cudaStreamDestroy(params.stream), "cudaStreamDestroy");

  std::vector<__half> out(kElements);
  out_device.download(&out);
  const std::vector<double> reference = dense_attention(q, k, v, params.softmax_scale);
  double difference = 0, norm = 0;
  for (size_t i = 0; i < kElements; ++i) {
    difference += std::pow(__half2float(out[i]) - reference[i], 2);
    norm += std::pow(reference[i], 2);
  }
  return std::sqrt(difference / norm);
}

}  // namespace

int main() {
  std::printf("libsla2 %s, architectures %s\n", sla2_version(), sla2_built_archs());
  expect(std::strlen(sla2_version()) > 0 && std::strlen(sla2_built_archs()) > 0, "version");
  test_validation();

  const sla2_status supported =
      sla2_supported(0, SLA2_FLOAT16, kHeadDim, SLA2_QUANT_NONE, SLA2_PATH_AUTO);
  if (supported != SLA2_OK) {
    expect(std::strlen(sla2_last_error()) > 0, "a refusal has its reason");
    std::printf("consumer: ok, no GPU run: %s\n", sla2_last_error());
    return 0;
  }
  const double error = attention_error();
  std::printf("relative L2 error against dense attention: %.2e\n", error);
  expect(error < 2e-3, "attention equals dense attention to fp16 rounding");  // NaN fails too
  std::printf("consumer: ok, run on the GPU\n");
  return 0;
}
