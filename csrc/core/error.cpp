#include "core/error.h"

namespace sla2 {
namespace {
thread_local std::string last_error;
}

void set_last_error(const std::string& message) { last_error = message; }

void check_launch(cudaError_t status, const char* kernel, const std::string& problem) {
  if (status == cudaSuccess) return;
  throw Error(SLA2_CUDA_ERROR,
              concat("launch of ", kernel, " failed for ", problem, ": ", cudaGetErrorName(status),
                     " (", cudaGetErrorString(status), ")"));
}

}  // namespace sla2

const char* sla2_last_error(void) { return sla2::last_error.c_str(); }
