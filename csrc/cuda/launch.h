// SPDX-License-Identifier: Apache-2.0
// The host's side of every call: the device, the launch.
#pragma once

#include <map>
#include <mutex>
#include <string>

#include "../msdkern.h"
#include "ladder.h"
#include "rows.cuh"

namespace msdkern {

// Makes the call's device current, and the caller's again after it.
class DeviceGuard {
 public:
    explicit DeviceGuard(int device) {
        error = cudaGetDevice(&before_);
        if (error == cudaSuccess && device != before_) error = cudaSetDevice(device);
        changed_ = device != before_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    cudaError_t error;

 private:
    int before_ = 0;
    bool changed_ = false;
};

struct Machine {
    int processors, shared;  // shared: bytes that a block may have
    bool clusters;
};
const Machine &machine(int device);    // asked once per device
int64_t most_gate_blocks(int device);  // that count rows for gate_step

// Keeps the runtime's words, and makes a status of them.
int status_of(cudaError_t error);

// Launches of more than the default shared memory, and of clusters of more than 8 blocks, must be
// allowed first.
template <class... Parameters, class... Arguments>
cudaError_t launch(void *stream, int64_t grid, int threads, int cluster, int64_t shared,
                   void (*kernel)(Parameters...), const Arguments &...arguments) {
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024)
        error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error == cudaSuccess && cluster > 8)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(grid));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Classes are counted in 32 bits, with room for the last step of a team.
constexpr int64_t kMostClasses = INT32_MAX - (1 << 20);

inline int most_resident() {
    int most = 0;
    for (const Rung &rung : kLadder) most = rung.resident > most ? rung.resident : most;
    for (const Rung &rung : kTileLadder) most = rung.resident > most ? rung.resident : most;
    return most;
}

// f(a value of the storage type) for a dtype code, or MSDKERN_BAD_SIZE.
template <class F>
int with_dtype(int dtype, F f) {
    switch (dtype) {
        case MSDKERN_F32:
            return f(float());
        case MSDKERN_F16:
            return f(__half());
        case MSDKERN_BF16:
            return f(bfloat());
        case MSDKERN_F64:
            return f(double());
        default:
            return MSDKERN_BAD_SIZE;
    }
}

inline int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// The largest power of two, 16 at most, that all these bytes are multiples of.
inline int common_width(uint64_t bytes) {
    int width = 16;
    while (bytes % unsigned(width)) width /= 2;
    return width;
}

}  // namespace msdkern
