// SPDX-License-Identifier: Apache-2.0
// What the planted kernels share: a table of cases, each a launch that is broken or correct.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cmath>
#include <vector>

namespace planted {

namespace cg = cooperative_groups;

#ifdef __CUDACC__
template <class T>
__device__ T *dyn_smem() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return reinterpret_cast<T *>(bytes);
}
#else
template <class T>
T *dyn_smem() {
    return static_cast<T *>(simt::dynamic_shared());
}
#endif

struct Shape {
    unsigned grid, block, shared = 0, cluster = 1;
    bool cooperative = false;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(Shape shape, void (*kernel)(Parameters...), Arguments... arguments) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = shape.cluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = shape.cooperative;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.grid);
    config.blockDim = dim3(shape.block);
    config.dynamicSmemBytes = shape.shared;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Memory of the GPU with the values of a vector.
template <class T>
class Device {
 public:
    explicit Device(const std::vector<T> &values) : size_(values.size()) {
        cudaMalloc(&data_, size_ * sizeof(T));
        cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~Device() { cudaFree(data_); }
    T *get() { return static_cast<T *>(data_); }
    std::vector<T> values() {
        std::vector<T> v(size_);
        cudaMemcpy(v.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost);
        return v;
    }

 private:
    void *data_ = nullptr;
    size_t size_;
};

inline std::vector<float> numbers(int n) {
    std::vector<float> v(n);
    unsigned state = 1;
    for (float &x : v) {
        state = state * 1664525 + 1013904223;
        x = float(int(state >> 20) - 2048) / 512;
    }
    return v;
}

enum Outcome { kRight = 0, kWrong = 1, kRefused = 2 };

inline Outcome outcome(cudaError_t error, bool right) {
    return error != cudaSuccess ? kRefused : right ? kRight : kWrong;
}

struct Case {
    const char *name;
    Outcome (*broken)();
    Outcome (*correct)();
    static std::vector<Case> &table() {
        static std::vector<Case> cases;
        return cases;
    }
    static bool add(const char *name, Outcome (*broken)(), Outcome (*correct)()) {
        table().push_back({name, broken, correct});
        return true;
    }
};

}  // namespace planted

// `run` is a template over "broken".
#define PLANTED_CASE(name, run) \
    static const bool name##_added = planted::Case::add(#name, run<true>, run<false>)
