// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "device.h"

namespace msdkern {
namespace {

// Stands for all our kernels: they are compiled for the same architectures.
__global__ void probe(int *out) { *out = 1; }

std::string words(cudaError_t error) {
    cudaGetLastError();  // the next caller must not find our error
    return error == cudaSuccess ? "ok" : cudaGetErrorString(error);
}

Device describe(int index) {
    Device device;
    cudaDeviceProp properties{};
    cudaError_t error = cudaGetDeviceProperties(&properties, index);
    if (error != cudaSuccess) {
        device.status = words(error);
        return device;
    }
    device.name = properties.name;
    device.major = properties.major;
    device.minor = properties.minor;
    device.processors = properties.multiProcessorCount;
    device.memory = static_cast<long long>(properties.totalGlobalMem);

    // Asking for the attributes loads the code, so it fails exactly where a launch would.
    cudaFuncAttributes attributes{};
    error = cudaSetDevice(index);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
    device.status = words(error);
    device.binary = error == cudaSuccess ? attributes.binaryVersion : 0;
    return device;
}

}  // namespace

DeviceReport device_report() {
    DeviceReport report;
    for (int arch : {__CUDA_ARCH_LIST__}) report.architectures.push_back(arch / 10);
    cudaRuntimeGetVersion(&report.runtime);
    cudaDriverGetVersion(&report.driver);

    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    const bool absent = error == cudaErrorNoDevice || (error == cudaSuccess && count == 0);
    report.status = report.driver == 0 ? "no driver" : absent ? "no device" : words(error);
    cudaGetLastError();
    if (report.status != "ok") return report;

    int current = 0;
    cudaGetDevice(&current);
    for (int index = 0; index < count; ++index) report.devices.push_back(describe(index));
    cudaSetDevice(current);
    return report;
}

}  // namespace msdkern
