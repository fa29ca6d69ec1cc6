// Ranges named like the operations for nsys, on when the environment variable SLA2_NVTX is 1 (read
// once).
#pragma once

#include <cstdlib>
#include <cstring>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define SLA2_HAVE_NVTX 1
#else
#define SLA2_HAVE_NVTX 0
#endif

namespace sla2 {

class NvtxRange {
 public:
  explicit NvtxRange(const char* name) {
    if (enabled()) push(name);
  }
  ~NvtxRange() {
    if (enabled()) pop();
  }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;

 private:
  static bool enabled() {
    static const bool value = [] {
      const char* text = std::getenv("SLA2_NVTX");
      return SLA2_HAVE_NVTX && text != nullptr && std::strcmp(text, "1") == 0;
    }();
    return value;
  }
#if SLA2_HAVE_NVTX
  static void push(const char* name) { nvtxRangePushA(name); }
  static void pop() { nvtxRangePop(); }
#else
  static void push(const char*) {}
  static void pop() {}
#endif
};

}  // namespace sla2
