// One layer's attention on tensors that this program's own kernel makes: routed, low bit, captured
// in a CUDA graph and timed.
//   ./attention [--seqlen 32760] [--heads 12] [--topk 0.03] [--quant none|int8_fp16|int8_fp8]
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <sla2/sla2.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int kHeadDim = 128;

void check(sla2_status status) {
  if (status != SLA2_OK) throw std::runtime_error(sla2_last_error());
}
void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Device memory that frees itself.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) {
    check(cudaMalloc(&data_, std::max(count, size_t{1}) * sizeof(T)));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

struct Options {
  int seqlen = 32760, heads = 12;
  double topk = 0.03;
  std::string quant = "int8_fp8";
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(name + " needs a value");
    if (name == "--seqlen") {
      options.seqlen = std::atoi(argv[i + 1]);
    } else if (name == "--heads") {
      options.heads = std::atoi(argv[i + 1]);
    } else if (name == "--topk") {
      options.topk = std::atof(argv[i + 1]);
    } else if (name == "--quant") {
      options.quant = argv[i + 1];
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  if (options.seqlen < 1 || options.heads < 1 || !(options.topk > 0 && options.topk <= 1)) {
    throw std::invalid_argument("--seqlen and --heads must be positive, --topk in (0, 1]");
  }
  return options;
}

sla2_quant quant_of(const std::string& name) {
  if (name == "none") return SLA2_QUANT_NONE;
  if (name == "int8_fp16") return SLA2_QUANT_INT8_FP16;
  if (name == "int8_fp8") return SLA2_QUANT_INT8_FP8;
  throw std::invalid_argument("--quant is " + name + ": must be none, int8_fp16 or int8_fp8");
}

// Roughly normal values from an integer hash: the sum of four uniform bytes.
__global__ void fill_normal(__nv_bfloat16* data, size_t count, unsigned seed) {
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    unsigned bits = static_cast<unsigned>(i) * 2654435761u + seed;
    bits = (bits ^ bits >> 16) * 2246822519u;
    bits = (bits ^ bits >> 13) * 3266489917u;
    bits ^= bits >> 16;
    int sum = 0;
    for (int byte = 0; byte < 4; ++byte) sum += bits >> 8 * byte & 255;
    data[i] = __float2bfloat16(static_cast<float>(sum - 510) / 147.8f);
  }
}

std::vector<float> identity(int size) {
  std::vector<float> matrix(size_t{1} * size * size);
  for (int i = 0; i < size; ++i) matrix[size_t{1} * i * size + i] = 1.f;
  return matrix;
}

void run(const Options& options) {
  const size_t elements = size_t{1} * options.seqlen * options.heads * kHeadDim;
  const int query_blocks = (options.seqlen + SLA2_BLOCK_Q - 1) / SLA2_BLOCK_Q;
  const int key_blocks = (options.seqlen + SLA2_BLOCK_K - 1) / SLA2_BLOCK_K;
  const int kept =
      std::clamp(static_cast<int>(std::lround(options.topk * key_blocks)), 1, key_blocks);
  const size_t rows = size_t{1} * options.heads * query_blocks;
  int device = 0;
  check(cudaGetDevice(&device));
  const sla2_quant quant = quant_of(options.quant);
  check(sla2_supported(device, SLA2_BFLOAT16, kHeadDim, quant, SLA2_PATH_AUTO));

  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const DeviceArray<__nv_bfloat16> q(elements), k(elements), v(elements), out(elements);
  unsigned seed = 1;
  for (const auto* tensor : {&q, &k, &v}) {
    fill_normal<<<1024, 256, 0, stream>>>(tensor->get(), elements, seed++);
    check(cudaGetLastError());
  }
  // An untrained router and alpha = 1/2; a trained one comes from the model's router file.
  const std::vector<float> projection = identity(kHeadDim);
  const DeviceArray<float> proj(projection.size()), alpha_logit(rows);
  check(cudaMemcpyAsync(proj.get(), projection.data(), projection.size() * sizeof(float),
                        cudaMemcpyHostToDevice, stream));
  check(cudaMemsetAsync(alpha_logit.get(), 0, rows * sizeof(float), stream));
  const DeviceArray<uint16_t> lut(rows * kept);
  const DeviceArray<int32_t> counts(rows);

  sla2_attn_fwd_params params = {};
  params.size = sizeof(params);
  params.shape = {1, options.seqlen, options.heads, kHeadDim, SLA2_BFLOAT16};
  params.quant = quant;
  params.branch = SLA2_BRANCH_BOTH;
  params.path = SLA2_PATH_AUTO;
  params.smooth_k = 1;
  params.softmax_scale = 1.f / std::sqrt(static_cast<float>(kHeadDim));
  const int64_t token = int64_t{options.heads} * kHeadDim;  // [1, N, H, D]
  const auto tensor = [&](const DeviceArray<__nv_bfloat16>& array) {
    return sla2_tensor{array.get(), options.seqlen * token, token, kHeadDim};
  };
  params.q = tensor(q);
  params.k = tensor(k);
  params.v = tensor(v);
  params.out = tensor(out);
  params.alpha_logit = alpha_logit.get();
  params.alpha_stride_head = query_blocks;
  params.router.proj_q = params.router.proj_k = proj.get();
  params.router.num_kv_blocks = kept;
  params.lists = {lut.get(), counts.get(), kept};
  params.stream = stream;
  size_t bytes = 0;
  check(sla2_attn_fwd_workspace(&params, &bytes));
  const DeviceArray<char> workspace(bytes);
  params.workspace = workspace.get();
  params.workspace_bytes = bytes;
  check(sla2_attn_fwd(&params));  // loads the kernels, which a capture must not do
  check(cudaStreamSynchronize(stream));

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  check(sla2_attn_fwd(&params));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  constexpr int kCalls = 20;
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaEventRecord(begin, stream));
  for (int i = 0; i < kCalls; ++i) check(cudaGraphLaunch(replay, stream));
  check(cudaEventRecord(end, stream));
  check(cudaEventSynchronize(end));
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end));

  std::vector<__nv_bfloat16> first(kHeadDim);
  check(cudaMemcpy(first.data(), out.get(), kHeadDim * sizeof(first[0]), cudaMemcpyDeviceToHost));
  double square = 0;
  for (const __nv_bfloat16 x : first) square += std::pow(__bfloat162float(x), 2);
  std::printf("B1 N%d H%d D%d bf16 %s, %d of %d key blocks: %.3f ms a call, %.1f MiB workspace\n",
              options.seqlen, options.heads, kHeadDim, options.quant.c_str(), kept, key_blocks,
              milliseconds / kCalls, static_cast<double>(bytes) / (1 << 20));
  std::printf("first row of the output: norm %.4f\n", std::sqrt(square));
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  check(cudaGraphExecDestroy(replay));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention: %s\n", error.what());
    return 1;
  }
}
