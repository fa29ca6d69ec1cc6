// What the present device is and which kernels this build holds for it.
#pragma once

#include <string>

namespace sla2 {

struct DeviceInfo {
  int index;
  int capability;  // 90 for 9.0
  int code_arch;   // architecture of the code that runs there (80 on an 8.6 device of a build for
                   // 80); 0: none
};

int current_device();
DeviceInfo device_info(int device);

// Every reason why the combination cannot run on `device`, one per line; empty when it can.
std::string not_supported_reasons(const DeviceInfo& device, int dtype, int head_dim, int quant,
                                  int path);

// Whether `path` means the Hopper kernels on the present device: auto does where `quant` has any.
// False without a device.
bool uses_sm90(int quant, int path);

}  // namespace sla2
