// Errors inside the library are exceptions; guard() turns them into a status and the thread's
// message at the C border.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "sla2/sla2.h"

namespace sla2 {

class Error : public std::runtime_error {
 public:
  Error(sla2_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  sla2_status status() const { return status_; }

 private:
  sla2_status status_;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws SLA2_INVALID_ARGUMENT with the parts as message unless `condition` holds.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw Error(SLA2_INVALID_ARGUMENT, concat(parts...));
}

// Throws SLA2_CUDA_ERROR naming the kernel and the problem it was launched for.
void check_launch(cudaError_t status, const char* kernel, const std::string& problem);

void set_last_error(const std::string& message);

template <typename Body>
sla2_status guard(Body&& body) noexcept {
  try {
    set_last_error("");
    body();
    return SLA2_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.status();
  } catch (const std::exception& error) {
    set_last_error(concat("internal error: ", error.what()));
    return SLA2_CUDA_ERROR;
  }
}

}  // namespace sla2
