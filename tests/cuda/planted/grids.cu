// SPDX-License-Identifier: Apache-2.0
// Between blocks: fences, spinning, and the limits of a launch.
#include "planted.h"

namespace planted::grids {

constexpr int kBlocks = 6, kThreads = 32;

__global__ void nothing() {}

// The last block to arrive adds up what the others left. All threads write, fence and meet; then
// one takes the ticket.
template <bool before, bool after>
__global__ void last_adds(const float *in, float *partial, unsigned *ticket, float *out) {
    __shared__ bool last;
    const int i = blockIdx.x * kThreads + threadIdx.x;
    partial[i] = 2 * in[i];
    if (before) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    if (after) __threadfence();
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b * kThreads + threadIdx.x];
    out[threadIdx.x] = sum;
    if (threadIdx.x == 0) *ticket = 0;
}

Outcome total(void (*kernel)(const float *, float *, unsigned *, float *)) {
    const std::vector<float> in = numbers(kBlocks * kThreads);
    Device<float> x(in), partial(in), y(std::vector<float>(kThreads, 0.0f));
    Device<unsigned> ticket(std::vector<unsigned>(1, 0));
    const cudaError_t error = launch({kBlocks, kThreads}, kernel, (const float *)x.get(),
                                     partial.get(), ticket.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = ticket.values()[0] == 0;
    for (int t = 0; t < kThreads; ++t) {
        float sum = 0;
        for (int b = 0; b < kBlocks; ++b) sum += 2 * in[b * kThreads + t];
        right &= out[t] == sum;
    }
    return outcome(error, right);
}
template <bool broken>
Outcome missing_fence_before() {
    return total(last_adds<!broken, true>);
}
PLANTED_CASE(missing_fence_before, missing_fence_before);
template <bool broken>
Outcome missing_fence_after() {
    return total(last_adds<true, !broken>);
}
PLANTED_CASE(missing_fence_after, missing_fence_after);

template <bool broken>
__global__ void same_place(int *out) {
    if (broken)
        out[threadIdx.x] = threadIdx.x;
    else
        out[blockIdx.x * kThreads + threadIdx.x] = threadIdx.x;
}

template <bool broken>
Outcome race_between_blocks() {
    Device<int> y(std::vector<int>(kBlocks * kThreads, 0));
    const cudaError_t error = launch({kBlocks, kThreads}, same_place<broken>, y.get());
    bool right = true;
    for (int i = 0; i < kThreads; ++i) right &= y.values()[i] == i;
    return outcome(error, right);
}
PLANTED_CASE(race_between_blocks, race_between_blocks);

// All blocks of a cooperative launch meet.
template <bool broken>
__global__ void rotate_blocks(const float *in, float *between, float *out) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    between[i] = in[i];
    if (!broken) cg::this_grid().sync();
    out[i] = between[(i + kThreads) % (gridDim.x * kThreads)];
}

template <bool broken>
Outcome rotated(bool cooperative) {
    const std::vector<float> in = numbers(kBlocks * kThreads);
    Device<float> x(in), between(std::vector<float>(in.size(), 0.0f)), y(in);
    const cudaError_t error = launch({kBlocks, kThreads, 0, 1, cooperative}, rotate_blocks<broken>,
                                     (const float *)x.get(), between.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = true;
    for (size_t i = 0; i < in.size(); ++i) right &= out[i] == in[(i + kThreads) % in.size()];
    return outcome(error, right);
}
template <bool broken>
Outcome missing_grid_sync() {
    return rotated<broken>(true);
}
PLANTED_CASE(missing_grid_sync, missing_grid_sync);
template <bool broken>
Outcome not_cooperative() {
    return rotated<false>(!broken);
}
PLANTED_CASE(not_cooperative, not_cooperative);

// Waits for blocks that only a cooperative launch has running.
__global__ void all_here(int *count) {
    if (threadIdx.x != 0) return;
    atomicAdd(count, 1);
    while (atomicAdd(count, 0) != int(gridDim.x)) {
    }
}

template <bool broken>
Outcome endless_spin() {
    Device<int> count(std::vector<int>(1, 0));
    const cudaError_t error = launch({3, kThreads, 0, 1, !broken}, all_here, count.get());
    return outcome(error, count.values()[0] == 3);
}
PLANTED_CASE(endless_spin, endless_spin);

template <bool broken>
Outcome too_many_threads() {
    return outcome(launch({1, broken ? 1056u : 1024u}, nothing), true);
}
PLANTED_CASE(too_many_threads, too_many_threads);

template <bool asked>
__global__ void large() {}
template <bool broken>
Outcome shared_not_asked_for() {
    constexpr int kBytes = 100 << 10;
    if (!broken)
        cudaFuncSetAttribute(large<!broken>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    return outcome(launch({1, 32, kBytes}, large<!broken>), true);
}
PLANTED_CASE(shared_not_asked_for, shared_not_asked_for);

template <bool asked>
__global__ void wide() {}
template <bool broken>
Outcome cluster_not_asked_for() {
    if (!broken)
        cudaFuncSetAttribute(wide<!broken>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return outcome(launch({16, 32, 0, 16}, wide<!broken>), true);
}
PLANTED_CASE(cluster_not_asked_for, cluster_not_asked_for);

template <bool broken>
Outcome shared_beyond_the_limit() {
    const int bytes = (broken ? 228 : 227) << 10;
    const cudaError_t error =
        cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return outcome(error, true);
}
PLANTED_CASE(shared_beyond_the_limit, shared_beyond_the_limit);

template <bool broken>
Outcome broken_cluster() {
    return outcome(launch({broken ? 6u : 8u, 32, 0, 4}, nothing), true);
}
PLANTED_CASE(broken_cluster, broken_cluster);

template <bool broken>
Outcome empty_grid() {
    return outcome(launch({broken ? 0u : 1u, 32}, nothing), true);
}
PLANTED_CASE(empty_grid, empty_grid);

}  // namespace planted::grids
