// SPDX-License-Identifier: Apache-2.0
// Barriers of a block: missing, divergent, left early.
#include <algorithm>

#include "planted.h"

namespace planted::barriers {

constexpr int kThreads = 96;

// Each thread reads its neighbour's value.
template <bool broken>
__global__ void neighbour(const float *in, float *out) {
    __shared__ float row[kThreads];
    const int i = threadIdx.x;
    row[i] = in[i];
    if (!broken) __syncthreads();
    out[i] = row[(i + 1) % kThreads];
}

template <bool broken>
Outcome missing_barrier() {
    const std::vector<float> in = numbers(kThreads);
    Device<float> x(in), y(std::vector<float>(kThreads, 0.0f));
    const cudaError_t error =
        launch({1, kThreads}, neighbour<broken>, (const float *)x.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = true;
    for (int i = 0; i < kThreads; ++i) right &= out[i] == in[(i + 1) % kThreads];
    return outcome(error, right);
}
PLANTED_CASE(missing_barrier, missing_barrier);

// Sums rows one after another through the same buffer.
template <bool broken>
__global__ void reuse(const float *in, float *out, int rows) {
    __shared__ float partial[kThreads];
    for (int r = 0; r < rows; ++r) {
        partial[threadIdx.x] = in[r * kThreads + threadIdx.x];
        __syncthreads();
        float sum = 0;
        for (int i = 0; i < kThreads; ++i) sum += partial[i];
        out[r * kThreads + threadIdx.x] = sum;
        if (!broken) __syncthreads();
    }
}

template <bool broken>
Outcome reused_buffer() {
    constexpr int kRows = 4;
    const std::vector<float> in = numbers(kRows * kThreads);
    Device<float> x(in), y(std::vector<float>(in.size(), 0.0f));
    const cudaError_t error =
        launch({1, kThreads}, reuse<broken>, (const float *)x.get(), y.get(), kRows);
    const std::vector<float> out = y.values();
    bool right = true;
    for (int i = 0; i < int(in.size()); ++i) {
        float sum = 0;
        for (int c = 0; c < kThreads; ++c) sum += in[i / kThreads * kThreads + c];
        right &= out[i] == sum;
    }
    return outcome(error, right);
}
PLANTED_CASE(reused_buffer, reused_buffer);

template <bool broken>
__global__ void branches(float *out) {
    if (broken && threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

template <bool broken>
Outcome divergent_barrier() {
    Device<float> y(std::vector<float>(kThreads, 0.0f));
    const cudaError_t error = launch({1, kThreads}, branches<broken>, y.get());
    return outcome(error, y.values() == std::vector<float>(kThreads, 1.0f));
}
PLANTED_CASE(divergent_barrier, divergent_barrier);

template <bool broken>
__global__ void leaving(float *out, int n) {
    const bool inside = int(threadIdx.x) < n;
    if (broken && !inside) return;
    __syncthreads();
    if (inside) out[threadIdx.x] = 1;
}

template <bool broken>
Outcome early_exit() {
    Device<float> y(std::vector<float>(kThreads, 1.0f));
    const cudaError_t error = launch({1, kThreads}, leaving<broken>, y.get(), kThreads - 3);
    return outcome(error, y.values() == std::vector<float>(kThreads, 1.0f));
}
PLANTED_CASE(early_exit, early_exit);

// An atomic in shared memory is no barrier either.
template <bool broken>
__global__ void find_least(const int *in, int *out) {
    __shared__ int least;
    if (threadIdx.x == 0) least = in[0];
    __syncthreads();
    atomicMin(&least, in[threadIdx.x]);
    if (!broken) __syncthreads();
    out[threadIdx.x] = least;
}

template <bool broken>
Outcome barrier_after_atomics() {
    std::vector<int> in;
    for (float x : numbers(kThreads)) in.push_back(int(x * 1000));
    Device<int> x(in), y(std::vector<int>(kThreads, 0));
    const cudaError_t error =
        launch({1, kThreads}, find_least<broken>, (const int *)x.get(), y.get());
    bool right = true;
    for (int v : y.values()) right &= broken || v == *std::min_element(in.begin(), in.end());
    return outcome(error, right);
}
PLANTED_CASE(barrier_after_atomics, barrier_after_atomics);

}  // namespace planted::barriers
