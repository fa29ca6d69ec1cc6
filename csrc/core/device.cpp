#include "core/device.h"

#include <algorithm>
#include <cstdlib>

#include "core/error.h"
#include "sla2/version.h"

namespace sla2 {
namespace {

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: leave nothing behind for the caller's next check
  throw Error(SLA2_UNSUPPORTED,
              concat(what, ": ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ")"));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

int capability_of(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// The build's best code for a capability: machine code of the same major version that is not newer
// ("90a" only on exactly 9.0), else PTX of any older version.
int best_code(int capability) {
  int best = 0;
  std::istringstream list(SLA2_CORE_ARCHS);
  for (std::string entry; std::getline(list, entry, ';');) {
    const int arch = std::atoi(entry.c_str());
    const bool is_ptx = entry.find("-virtual") != std::string::npos;
    const bool exact = entry.find('a') != std::string::npos && !is_ptx;
    const bool runs = is_ptx  ? arch <= capability
                      : exact ? arch == capability
                              : arch / 10 == capability / 10 && arch <= capability;
    if (runs) best = std::max(best, arch);
  }
  return best;
}

// Hopper kernels need the very chip: wgmma exists in sm_90a code alone.
constexpr int kSm90 = 90;
#if SLA2_HAVE_SM90
constexpr bool kHaveSm90 = true;
#else
constexpr bool kHaveSm90 = false;
#endif

}  // namespace

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

DeviceInfo device_info(int device) {
  const int capability = capability_of(device);
  return {device, capability, best_code(capability)};
}

std::string not_supported_reasons(const DeviceInfo& device, int dtype, int head_dim, int quant,
                                  int path) {
  std::ostringstream reasons;
  if (dtype != SLA2_BFLOAT16 && dtype != SLA2_FLOAT16) {
    reasons << "dtype " << dtype << ": kernels take bfloat16 (0) or float16 (1)\n";
  }
  if (head_dim != 64 && head_dim != 128)
    reasons << "head_dim " << head_dim << ": kernels exist for 64 and 128\n";
  if (quant < SLA2_QUANT_NONE || quant > SLA2_QUANT_INT8_FP8) {
    reasons << "quant " << quant << ": allowed are none (0), int8_fp16 (1) and int8_fp8 (2)\n";
  }
  const std::string capability = concat(device.capability / 10, ".", device.capability % 10);
  if (device.capability < 80) {
    reasons << "device " << device.index << " has compute capability " << capability
            << ": 8.0 or newer is needed (cp.async and the tensor-core shapes of Ampere)\n";
  } else if (device.code_arch == 0) {
    reasons << "device " << device.index << " has compute capability " << capability
            << " and this build holds code for " << SLA2_CORE_ARCHS
            << " only: install a wheel for it, or build with SLA2_CUDA_ARCHS=" << device.capability
            << "\n";
  } else if (quant == SLA2_QUANT_INT8_FP8 && device.code_arch < 89) {
    reasons << "quant int8_fp8 needs e4m3 conversions (compute capability 8.9 or newer, and code "
               "built for it); device "
            << device.index << " has " << capability << " and runs this build's sm_"
            << device.code_arch << " code: use quant int8_fp16\n";
  }
  if (path == SLA2_PATH_SM90) {
    if (!kHaveSm90) {
      reasons << "path sm90: this build holds no sm_90a code (it has " << SLA2_CORE_ARCHS
              << "); use auto or portable\n";
    } else if (device.capability != kSm90) {
      reasons << "path sm90 needs compute capability 9.0; device " << device.index << " has "
              << capability << ": use auto or portable\n";
    } else if (quant == SLA2_QUANT_INT8_FP16) {
      reasons << "path sm90 has no int8_fp16 kernels: use quant int8_fp8 or none, or path auto or "
                 "portable\n";
    }
  } else if (path != SLA2_PATH_AUTO && path != SLA2_PATH_PORTABLE) {
    reasons << "path " << path << ": allowed are auto (0), portable (1) and sm90 (2)\n";
  }
  std::string text = reasons.str();
  if (!text.empty()) text.pop_back();
  return text;
}

bool uses_sm90(int quant, int path) {
  int device = 0;
  if (!kHaveSm90 || path == SLA2_PATH_PORTABLE || quant == SLA2_QUANT_INT8_FP16) return false;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return capability_of(device) == kSm90;
}

}  // namespace sla2

sla2_status sla2_supported(int32_t device, int32_t dtype, int32_t head_dim, int32_t quant,
                           int32_t path) {
  return sla2::guard([&] {
    const std::string reasons =
        sla2::not_supported_reasons(sla2::device_info(device), dtype, head_dim, quant, path);
    if (!reasons.empty()) throw sla2::Error(SLA2_UNSUPPORTED, reasons);
  });
}

const char* sla2_version(void) { return SLA2_CORE_VERSION; }
const char* sla2_built_archs(void) { return SLA2_CORE_ARCHS; }
