// SPDX-License-Identifier: Apache-2.0
// What this binary carries and what GPUs this computer has: the facts of `msdkern doctor`.
#pragma once

#include <string>
#include <vector>

namespace msdkern {

struct Device {
    std::string name;
    int major = 0, minor = 0;  // compute capability
    int processors = 0;        // streaming multiprocessors
    long long memory = 0;      // bytes
    int binary = 0;            // architecture the driver chose from this binary, e.g. 90; 0 = none
    std::string status;        // "ok", or the CUDA runtime's words
};

struct DeviceReport {
    std::vector<int> architectures;  // compiled into this binary, e.g. 75, 80
    int runtime = 0;                 // CUDA runtime linked into this binary, e.g. 13000
    int driver = 0;                  // newest CUDA the driver serves; 0 = no driver
    std::string status;              // "ok", "no driver", "no device", or the CUDA runtime's words
    std::vector<Device> devices;
};

// Never throws for want of a GPU: that is an answer, and stands in `status`.
DeviceReport device_report();

}  // namespace msdkern
