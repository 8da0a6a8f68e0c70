// SPDX-License-Identifier: Apache-2.0
// Accesses that are out of bounds or misaligned, and asynchronous copies.
#include "planted.h"

namespace planted::memory {

constexpr int kThreads = 64;

template <bool broken>
__global__ void copy_rows(const float *in, float *out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (broken ? i <= n : i < n) out[i] = in[i];
}

template <bool broken>
Outcome global_out_of_bounds() {
    const std::vector<float> in = numbers(100);
    Device<float> x(in), y(std::vector<float>(100, 0.0f));
    const cudaError_t error =
        launch({2, kThreads}, copy_rows<broken>, (const float *)x.get(), y.get(), 100);
    return outcome(error, y.values() == in);
}
PLANTED_CASE(global_out_of_bounds, global_out_of_bounds);

template <bool broken>
__global__ void mirror_dynamic(const float *in, float *out) {
    float *row = dyn_smem<float>();
    const int i = threadIdx.x;
    row[i] = in[i];
    __syncthreads();
    out[i] = row[kThreads - (broken ? 0 : 1) - i];
}

template <bool broken>
__global__ void mirror_static(const float *in, float *out) {
    __shared__ float row[kThreads];
    const int i = threadIdx.x;
    row[i] = in[i];
    __syncthreads();
    out[i] = row[kThreads - (broken ? 0 : 1) - i];
}

Outcome mirrored(void (*kernel)(const float *, float *), unsigned shared) {
    const std::vector<float> in = numbers(kThreads);
    Device<float> x(in), y(std::vector<float>(kThreads, 0.0f));
    const cudaError_t error =
        launch({1, kThreads, shared}, kernel, (const float *)x.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = true;
    for (int i = 0; i < kThreads; ++i) right &= out[i] == in[kThreads - 1 - i];
    return outcome(error, right);
}
template <bool broken>
Outcome dynamic_out_of_bounds() {
    return mirrored(mirror_dynamic<broken>, kThreads * sizeof(float));
}
PLANTED_CASE(dynamic_out_of_bounds, dynamic_out_of_bounds);
template <bool broken>
Outcome static_out_of_bounds() {
    return mirrored(mirror_static<broken>, 0);
}
PLANTED_CASE(static_out_of_bounds, static_out_of_bounds);

template <bool broken>
__global__ void vectors(const float *in, float *out) {
    const float4 v = __ldcs(reinterpret_cast<const float4 *>(in + broken) + threadIdx.x);
    __stcs(reinterpret_cast<float4 *>(out) + threadIdx.x, v);
}

template <bool broken>
Outcome misaligned_intrinsic() {
    const std::vector<float> in = numbers(4 * kThreads + 4);
    Device<float> x(in), y(in);
    const cudaError_t error =
        launch({1, kThreads}, vectors<broken>, (const float *)x.get(), y.get());
    return outcome(error, y.values() == in);
}
PLANTED_CASE(misaligned_intrinsic, misaligned_intrinsic);

template <bool broken>
__global__ void vectors_plainly(const float *in, float *out) {
    const float2 v = reinterpret_cast<const float2 *>(in + broken)[threadIdx.x];
    reinterpret_cast<float2 *>(out)[threadIdx.x] = v;
}

template <bool broken>
Outcome misaligned_access() {
    const std::vector<float> in = numbers(2 * kThreads + 2);
    Device<float> x(in), y(in);
    const cudaError_t error =
        launch({1, kThreads}, vectors_plainly<broken>, (const float *)x.get(), y.get());
    return outcome(error, broken || y.values() == in);
}
PLANTED_CASE(misaligned_access, misaligned_access);

// Stages a row in shared memory by asynchronous copies of 16 bytes, then every thread reads all of
// it. `wait`: for one's own copies; `meet`: for the others' too. The maximum hides a missing
// barrier: fmaxf passes over what has not arrived, and the last to look sees everything.
template <bool wait, bool meet>
__global__ void staged(const float *in, float *out) {
    float *row = dyn_smem<float>();
    __pipeline_memcpy_async(row + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
    __pipeline_commit();
    if (wait) __pipeline_wait_prior(0);
    if (meet) __syncthreads();
    float most = -INFINITY;
    for (int i = 0; i < 4 * kThreads; ++i) most = fmaxf(most, row[i]);
    out[threadIdx.x] = most;
}

Outcome staging(void (*kernel)(const float *, float *), bool every) {
    const std::vector<float> in = numbers(4 * kThreads);
    Device<float> x(in), y(std::vector<float>(kThreads, 0.0f));
    const unsigned shared = 4 * kThreads * sizeof(float);
    const cudaError_t error =
        launch({1, kThreads, shared}, kernel, (const float *)x.get(), y.get());
    const std::vector<float> out = y.values();
    float most = -INFINITY;
    for (float v : in) most = fmaxf(most, v);
    bool right = true;
    for (float v : out) right &= !every || v == most;
    return outcome(error, right);
}
template <bool broken>
Outcome missing_wait() {
    return staging(staged<!broken, true>, true);
}
PLANTED_CASE(missing_wait, missing_wait);
template <bool broken>
Outcome barrier_after_staging() {
    return staging(staged<true, !broken>, !broken);
}
PLANTED_CASE(barrier_after_staging, barrier_after_staging);

// Two groups in flight: the older is awaited while the newer is not.
template <bool broken>
__global__ void pipelined(const float *in, float *out, int steps) {
    float *row = dyn_smem<float>() + 4 * threadIdx.x;
    const int stride = 4 * kThreads;
    __pipeline_memcpy_async(row, in + 4 * threadIdx.x, 16);
    __pipeline_commit();
    float sum = 0;
    for (int s = 0; s < steps; ++s) {
        if (s + 1 < steps)
            __pipeline_memcpy_async(row + (s + 1) % 2 * stride,
                                    in + (s + 1) * stride + 4 * threadIdx.x, 16);
        __pipeline_commit();
        __pipeline_wait_prior(broken ? 2 : 1);
        for (int i = 0; i < 4; ++i) sum += row[s % 2 * stride + i];
    }
    __pipeline_wait_prior(0);
    out[threadIdx.x] = sum;
}

template <bool broken>
Outcome wait_for_too_few() {
    constexpr int kSteps = 5, kStride = 4 * kThreads;
    const std::vector<float> in = numbers(kSteps * kStride);
    Device<float> x(in), y(std::vector<float>(kThreads, 0.0f));
    const unsigned shared = 2 * kStride * sizeof(float);
    const cudaError_t error =
        launch({1, kThreads, shared}, pipelined<broken>, (const float *)x.get(), y.get(), kSteps);
    const std::vector<float> out = y.values();
    bool right = true;
    for (int t = 0; t < kThreads; ++t) {
        float sum = 0;
        for (int s = 0; s < kSteps; ++s)
            for (int i = 0; i < 4; ++i) sum += in[s * kStride + 4 * t + i];
        right &= fabsf(out[t] - sum) < 1e-4f;
    }
    return outcome(error, right);
}
PLANTED_CASE(wait_for_too_few, wait_for_too_few);

}  // namespace planted::memory
