// SPDX-License-Identifier: Apache-2.0
// The lanes of a warp: shared memory without __syncwarp, shuffles that not all reach.
#include <cooperative_groups/reduce.h>

#include "planted.h"

namespace planted::warps {

constexpr unsigned kAll = ~0u;

// A shuffle is no fence, though lanes do wait for each other.
template <bool broken>
__global__ void exchange(const float *in, float *out) {
    __shared__ float row[32];
    const int lane = threadIdx.x;
    row[lane] = in[lane];
    const float sum = __shfl_xor_sync(kAll, in[lane], 1);
    if (!broken) __syncwarp();
    out[lane] = row[lane ^ 3] + sum;
}

template <bool broken>
Outcome missing_syncwarp() {
    const std::vector<float> in = numbers(32);
    Device<float> x(in), y(std::vector<float>(32, 0.0f));
    const cudaError_t error = launch({1, 32}, exchange<broken>, (const float *)x.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = true;
    for (int i = 0; i < 32; ++i) right &= out[i] == in[i ^ 3] + in[i ^ 1];
    return outcome(error, right);
}
PLANTED_CASE(missing_syncwarp, missing_syncwarp);

template <bool broken>
__global__ void sum_some(const float *in, float *out, int n) {
    const int lane = threadIdx.x;
    float sum = 0;
    if (broken && lane >= n) return;
    if (lane < n) sum = in[lane];
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
    if (lane < n) out[lane] = sum;
}

template <bool broken>
Outcome divergent_shuffle() {
    Device<float> x(std::vector<float>(20, 1.0f)), y(std::vector<float>(20, 0.0f));
    const cudaError_t error =
        launch({1, 32}, sum_some<broken>, (const float *)x.get(), y.get(), 20);
    return outcome(error, y.values() == std::vector<float>(20, 20.0f));
}
PLANTED_CASE(divergent_shuffle, divergent_shuffle);

template <bool broken>
__global__ void outside(const float *in, float *out) {
    const int lane = threadIdx.x;
    if (lane < 16) {
        const unsigned mask = 0xffff;
        out[lane] = __shfl_sync(mask, in[lane], broken ? lane + 1 : (lane + 1) % 16);
    }
}

template <bool broken>
Outcome lane_outside_mask() {
    const std::vector<float> in = numbers(32);
    Device<float> x(in), y(std::vector<float>(16, 0.0f));
    const cudaError_t error = launch({1, 32}, outside<broken>, (const float *)x.get(), y.get());
    const std::vector<float> out = y.values();
    bool right = true;
    for (int i = 0; i < 16; ++i) right &= out[i] == in[(i + 1) % 16];
    return outcome(error, right);
}
PLANTED_CASE(lane_outside_mask, lane_outside_mask);

// What a warp can compute together, checked against loops; nothing is broken but a width.
template <bool broken>
__global__ void together(const int *in, int *out) {
    const int lane = threadIdx.x, v = in[lane];
    const int half = lane < 16 ? 0xffff : int(0xffff0000);
    int wrong = 0;
    int sum = 0, least = v, most = v, ballot = 0;
    for (int l = lane / 16 * 16; l < lane / 16 * 16 + 16; ++l) {
        sum += in[l];
        least = min(least, in[l]);
        most = max(most, in[l]);
        ballot |= (in[l] > 0) << l;
    }
    wrong |= (__reduce_add_sync(half, v) != sum) << 0;
    wrong |= (__reduce_min_sync(half, v) != least) << 1;
    wrong |= (__reduce_max_sync(half, v) != most) << 2;
    wrong |= (int(__ballot_sync(half, v > 0)) != ballot) << 3;
    wrong |= (__any_sync(half, v > 0) != (ballot != 0)) << 4;
    wrong |= (__all_sync(half, v > 0) != (ballot == half)) << 5;
    wrong |= (__shfl_down_sync(kAll, v, 3, 8) != (lane % 8 < 5 ? in[lane + 3] : v)) << 6;
    wrong |= (__shfl_up_sync(kAll, v, 3, 8) != (lane % 8 < 3 ? v : in[lane - 3])) << 7;
    wrong |= (__shfl_sync(kAll, v, 9, 8) != in[lane / 8 * 8 + 1]) << 8;
    wrong |= (__shfl_xor_sync(kAll, 0.5 * v, 16) != 0.5 * in[lane ^ 16]) << 9;
    const auto tile = cg::tiled_partition<4>(cg::this_thread_block());
    wrong |= (tile.shfl_xor(v, 1) != in[lane ^ 1]) << 10;
    wrong |= (int(tile.thread_rank()) != lane % 4 || int(tile.meta_group_rank()) != lane / 4) << 11;
    wrong |= (int(tile.ballot(v > 0)) != (ballot >> lane / 4 * 4 & 15)) << 12;
    wrong |= (__syncthreads_count(v > 0) != __popc(__ballot_sync(kAll, v > 0))) << 13;
    wrong |= (__syncthreads_or(lane == 3) != 1 || __syncthreads_and(lane != 3) != 0) << 14;
    int of_tile = 0;
    for (int l = lane / 4 * 4; l < lane / 4 * 4 + 4; ++l) of_tile += in[l];
    wrong |= (cg::reduce(tile, v, cg::plus<int>()) != of_tile) << 15;
    wrong |= (__match_any_sync(kAll, lane / 8) != 0xffu << lane / 8 * 8) << 16;
    wrong |= (__reduce_or_sync(kAll, 1u << lane) != kAll) << 17;
    wrong |= (__reduce_and_sync(kAll, kAll ^ 1u << lane) != 0) << 18;
    wrong |= (__reduce_xor_sync(kAll, 1u << lane / 2) != 0) << 19;
    out[lane] = wrong | (broken && lane == 7);
}

template <bool broken>
Outcome collectives() {
    std::vector<int> in;
    for (float x : numbers(32)) in.push_back(int(x * 100));
    Device<int> x(in), y(std::vector<int>(32, -1));
    const cudaError_t error = launch({1, 32}, together<broken>, (const int *)x.get(), y.get());
    return outcome(error, y.values() == std::vector<int>(32, 0));
}
PLANTED_CASE(collectives, collectives);

// Every atomic, by all lanes at once; results that no order changes.
template <bool broken>
__global__ void many_at_once(unsigned *count, unsigned long long *wide, float *sum, int *free) {
    const unsigned lane = threadIdx.x;
    atomicAdd(count + 0, 2u);
    atomicSub(count + 1, 1u);
    atomicMin(count + 2, lane + 5);
    atomicMax(count + 3, lane + 5);
    atomicAnd(count + 4, ~(1u << lane));
    atomicOr(count + 5, 1u << lane);
    atomicXor(count + 6, 1u << lane);
    atomicInc(count + 7, broken ? 3u : 4u);
    atomicDec(count + 8, 4u);
    atomicExch(count + 9, 7u);
    atomicAdd(wide, 1ull << 40);
    atomicAdd(sum, 0.5f);
    while (atomicCAS(free, 0, 1) != 0) {
    }
    __threadfence();
    count[10] += 1;  // in turn
    __threadfence();
    atomicExch(free, 0);
}

template <bool broken>
Outcome atomics() {
    std::vector<unsigned> before(11, 0);
    before[1] = before[2] = 100;
    before[4] = ~0u;
    Device<unsigned> count(before);
    Device<unsigned long long> wide(std::vector<unsigned long long>(1, 0));
    Device<float> sum(std::vector<float>(1, 0.0f));
    Device<int> free(std::vector<int>(1, 0));
    const cudaError_t error =
        launch({1, 32}, many_at_once<broken>, count.get(), wide.get(), sum.get(), free.get());
    const std::vector<unsigned> c = count.values();
    const unsigned expected[] = {64, 68, 5, 36, 0, ~0u, ~0u, 32 % 5, (5 - 32 % 5) % 5, 7};
    bool right = wide.values()[0] == 32ull << 40 && sum.values()[0] == 16.0f && c[10] == 32;
    for (int i = 0; i < 10; ++i) right &= c[i] == expected[i];
    return outcome(error, right);
}
PLANTED_CASE(atomics, atomics);

}  // namespace planted::warps
