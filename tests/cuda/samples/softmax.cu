// SPDX-License-Identifier: Apache-2.0
// Nothing is broken here: a softmax of each row by a warp, a block or a cluster, with what such
// kernels use. Called from Python and compared with float64.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../planted/planted.h"

namespace planted::softmax {

constexpr unsigned kAll = ~0u;

__device__ float as_float(float x) { return x; }
__device__ float as_float(__half x) { return __half2float(x); }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void put(float *to, float x) { *to = x; }
__device__ void put(__half *to, float x) { *to = __float2half_rn(x); }
__device__ void put(__nv_bfloat16 *to, float x) { *to = __float2bfloat16_rn(x); }

struct Largest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

template <class F>
__device__ float over_warp(float x, F f) {
    for (int bits = 16; bits; bits /= 2) x = f(x, __shfl_xor_sync(kAll, x, bits));
    return x;
}

// `scratch`: one float per warp.
template <class F>
__device__ float over_block(float x, float *scratch, F f) {
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    x = over_warp(x, f);
    if (lane == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float all = scratch[0];
    for (int w = 1; w < warps; ++w) all = f(all, scratch[w]);
    __syncthreads();
    return all;
}

// `mine`: one float that the other blocks of the cluster read.
template <class F>
__device__ float over_cluster(float x, float *scratch, float *mine, F f) {
    const auto cluster = cg::this_cluster();
    x = over_block(x, scratch, f);
    if (threadIdx.x == 0) *mine = x;
    cluster.sync();
    float all = x;
    for (unsigned r = 0; r < cluster.num_blocks(); ++r)
        if (r != cluster.block_rank()) all = f(all, *cluster.map_shared_rank(mine, r));
    cluster.sync();
    return all;
}

template <class T>
__global__ void by_warp(const T *in, T *out, int rows, int classes) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    in += size_t(row) * classes;
    out += size_t(row) * classes;
    float most = -INFINITY, sum = 0;
    for (int c = lane; c < classes; c += 32) most = fmaxf(most, as_float(in[c]));
    most = over_warp(most, Largest());
    for (int c = lane; c < classes; c += 32) sum += __expf(as_float(in[c]) - most);
    sum = over_warp(sum, Sum());
    for (int c = lane; c < classes; c += 32) put(out + c, __expf(as_float(in[c]) - most) / sum);
}

template <class T>
__global__ void by_block(const T *in, T *out, int, int classes) {
    __shared__ float scratch[32];
    in += size_t(blockIdx.x) * classes;
    out += size_t(blockIdx.x) * classes;
    float most = -INFINITY, sum = 0;
    for (int c = threadIdx.x; c < classes; c += blockDim.x) most = fmaxf(most, as_float(in[c]));
    most = over_block(most, scratch, Largest());
    for (int c = threadIdx.x; c < classes; c += blockDim.x) sum += __expf(as_float(in[c]) - most);
    sum = over_block(sum, scratch, Sum());
    for (int c = threadIdx.x; c < classes; c += blockDim.x)
        put(out + c, __expf(as_float(in[c]) - most) / sum);
}

// The row stays in the cluster's shared memory, brought there by asynchronous copies.
template <class T>
__global__ void by_cluster(const T *in, T *out, int, int classes) {
    const auto cluster = cg::this_cluster();
    const int blocks = cluster.num_blocks(), part = classes / blocks, per_copy = 16 / sizeof(T);
    float *scratch = dyn_smem<float>(), *mine = scratch + 32;
    T *row = reinterpret_cast<T *>(scratch + 36);
    const size_t begin = size_t(blockIdx.x / blocks) * classes + cluster.block_rank() * part;
    for (int c = threadIdx.x * per_copy; c < part; c += blockDim.x * per_copy)
        __pipeline_memcpy_async(row + c, in + begin + c, 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    float most = -INFINITY, sum = 0;
    for (int c = threadIdx.x; c < part; c += blockDim.x) most = fmaxf(most, as_float(row[c]));
    most = over_cluster(most, scratch, mine, Largest());
    for (int c = threadIdx.x; c < part; c += blockDim.x) sum += __expf(as_float(row[c]) - most);
    sum = over_cluster(sum, scratch, mine, Sum());
    for (int c = threadIdx.x; c < part; c += blockDim.x)
        put(out + begin + c, __expf(as_float(row[c]) - most) / sum);
}

template <class T>
int run(int kind, const void *in, void *out, int rows, int classes) {
    constexpr unsigned kCluster = 4;
    const auto *x = static_cast<const T *>(in);
    auto *y = static_cast<T *>(out);
    const unsigned n = rows, shared = 36 * sizeof(float) + classes / kCluster * sizeof(T);
    if (kind == 0) return launch({(n + 3) / 4, 128}, by_warp<T>, x, y, rows, classes);
    if (kind == 1) return launch({n, 128}, by_block<T>, x, y, rows, classes);
    return launch({n * kCluster, 64, shared, kCluster}, by_cluster<T>, x, y, rows, classes);
}

}  // namespace planted::softmax

// kind: warp, block, cluster (classes: a multiple of 32). dtype: float, half, bfloat16.
extern "C" __attribute__((visibility("default"))) int planted_softmax(int kind, int dtype,
                                                                      const void *in, void *out,
                                                                      int rows, int classes) {
    using namespace planted::softmax;
    if (dtype == 0) return run<float>(kind, in, out, rows, classes);
    if (dtype == 1) return run<__half>(kind, in, out, rows, classes);
    return run<__nv_bfloat16>(kind, in, out, rows, classes);
}
