// SPDX-License-Identifier: Apache-2.0
// Clusters: blocks that read each other's shared memory.
#include "planted.h"

namespace planted::clusters {

constexpr int kThreads = 32, kBlocks = 4;

enum Missing { kNone, kStart, kMiddle, kFinal };

// Each block shows a value; every block adds up all of them.
template <int missing>
__global__ void add_up(const float *in, float *out) {
    const auto cluster = cg::this_cluster();
    float *mine = dyn_smem<float>();
    cluster.sync();
    mine[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
    if (missing != kMiddle) cluster.sync();
    float sum = 0;
    for (unsigned r = 0; r < cluster.num_blocks(); ++r)
        sum += cluster.map_shared_rank(mine, r)[threadIdx.x];
    if (missing != kFinal) cluster.sync();
    out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

Outcome sums(void (*kernel)(const float *, float *)) {
    const int n = 2 * kBlocks * kThreads;
    const std::vector<float> in = numbers(n);
    Device<float> x(in), y(std::vector<float>(n, 0.0f));
    const unsigned shared = kThreads * sizeof(float);
    const cudaError_t error =
        launch({2 * kBlocks, kThreads, shared, kBlocks}, kernel, (const float *)x.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = true;
    for (int i = 0; i < n; ++i) {
        float sum = 0;
        for (int b = 0; b < kBlocks; ++b)
            sum += in[i / (kBlocks * kThreads) * kBlocks * kThreads + b * kThreads + i % kThreads];
        right &= out[i] == sum;
    }
    return outcome(error, right);
}

template <bool broken>
Outcome missing_cluster_sync() {
    return sums(add_up < broken ? kMiddle : kNone >);
}
PLANTED_CASE(missing_cluster_sync, missing_cluster_sync);
template <bool broken>
Outcome missing_final_cluster_sync() {
    return sums(add_up < broken ? kFinal : kNone >);
}
PLANTED_CASE(missing_final_cluster_sync, missing_final_cluster_sync);

// Each block gets the values of the block `by` further on.
Outcome rotated(void (*kernel)(const float *, float *), int by) {
    const int n = kBlocks * kThreads;
    const std::vector<float> in = numbers(n);
    Device<float> x(in), y(std::vector<float>(n, 0.0f));
    const unsigned shared = kThreads * sizeof(float);
    const cudaError_t error =
        launch({kBlocks, kThreads, shared, kBlocks}, kernel, (const float *)x.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = true;
    for (int i = 0; i < n; ++i) right &= out[i] == in[(i + by * kThreads) % n];
    return outcome(error, right);
}

// Writes where the block that should be there may not have started.
template <bool broken>
__global__ void show_next(const float *in, float *out) {
    const auto cluster = cg::this_cluster();
    float *mine = dyn_smem<float>();
    const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
    if (!broken) cluster.sync();
    cluster.map_shared_rank(mine, next)[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
    cluster.sync();
    out[blockIdx.x * kThreads + threadIdx.x] = mine[threadIdx.x];
}

template <bool broken>
Outcome peer_not_started() {
    return rotated(show_next<broken>, kBlocks - 1);
}
PLANTED_CASE(peer_not_started, peer_not_started);

// The address is taken once, before the last barrier; only the memory itself tells.
template <bool broken>
__global__ void read_next(const float *in, float *out) {
    const auto cluster = cg::this_cluster();
    float *mine = dyn_smem<float>();
    const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
    cluster.sync();
    const float *theirs = cluster.map_shared_rank(mine, next);
    mine[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
    cluster.sync();
    out[blockIdx.x * kThreads + threadIdx.x] = theirs[threadIdx.x];
    if (!broken) cluster.sync();
}

template <bool broken>
Outcome read_after_exit() {
    return rotated(read_next<broken>, 1);
}
PLANTED_CASE(read_after_exit, read_after_exit);

// On a GPU each block has its own; here there is one, and the harness says so.
template <bool broken>
__global__ void static_shared(const float *in, float *out) {
    __shared__ float fixed[kThreads];
    float *mine = broken ? fixed : dyn_smem<float>();
    mine[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = mine[threadIdx.x];
}

template <bool broken>
Outcome static_shared_in_cluster() {
    const std::vector<float> in = numbers(kBlocks * kThreads);
    Device<float> x(in), y(in);
    const unsigned shared = kThreads * sizeof(float);
    const cudaError_t error = launch({kBlocks, kThreads, shared, kBlocks}, static_shared<broken>,
                                     (const float *)x.get(), y.get());
    return outcome(error, y.values() == in);
}
PLANTED_CASE(static_shared_in_cluster, static_shared_in_cluster);

}  // namespace planted::clusters
