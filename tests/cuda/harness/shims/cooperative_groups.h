// SPDX-License-Identifier: Apache-2.0
// Cooperative groups: blocks, tiles of a warp, clusters, grids. No coalesced groups: which lanes
// run together is undefined.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
    void sync(simt::Site site = simt::Site::here()) const {
        simt::block_barrier("thread_block::sync", false, site);
    }
    static unsigned thread_rank() {
        return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    }
    static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
    static unsigned size() { return num_threads(); }
    static dim3 group_index() { return blockIdx; }
    static dim3 thread_index() { return threadIdx; }
};
inline thread_block this_thread_block() { return {}; }

template <unsigned Size, class Parent = void>
class thread_block_tile {
    static_assert(Size && Size <= 32 && !(Size & (Size - 1)), "a power of two up to a warp");

 public:
    static unsigned thread_rank() { return simt::lane() % Size; }
    static constexpr unsigned num_threads() { return Size; }
    static constexpr unsigned size() { return Size; }
    static unsigned meta_group_rank() { return thread_block::thread_rank() / Size; }
    static unsigned meta_group_size() { return (thread_block::size() + Size - 1) / Size; }
    void sync(simt::Site site = simt::Site::here()) const { __syncwarp(mask(), site); }
    template <class T>
    T shfl(T v, int source, simt::Site site = simt::Site::here()) const {
        return __shfl_sync(mask(), v, source, Size, site);
    }
    template <class T>
    T shfl_xor(T v, unsigned bits, simt::Site site = simt::Site::here()) const {
        return __shfl_xor_sync(mask(), v, int(bits), Size, site);
    }
    template <class T>
    T shfl_down(T v, unsigned by, simt::Site site = simt::Site::here()) const {
        return __shfl_down_sync(mask(), v, by, Size, site);
    }
    template <class T>
    T shfl_up(T v, unsigned by, simt::Site site = simt::Site::here()) const {
        return __shfl_up_sync(mask(), v, by, Size, site);
    }
    int any(int yes, simt::Site site = simt::Site::here()) const {
        return __any_sync(mask(), yes, site);
    }
    int all(int yes, simt::Site site = simt::Site::here()) const {
        return __all_sync(mask(), yes, site);
    }
    unsigned ballot(int yes, simt::Site site = simt::Site::here()) const {
        return __ballot_sync(mask(), yes, site) >> shift();
    }

 private:
    static unsigned shift() { return simt::lane() / Size * Size; }
    static unsigned mask() { return (~0u >> (32 - Size)) << shift(); }
};

template <unsigned Size, class Parent>
thread_block_tile<Size, Parent> tiled_partition(const Parent &) {
    return {};
}

struct cluster_group {
    static void sync(simt::Site site = simt::Site::here()) {
        simt::cluster_arrive(site);
        simt::cluster_wait(site);
    }
    static void barrier_arrive(simt::Site site = simt::Site::here()) { simt::cluster_arrive(site); }
    static void barrier_wait(simt::Site site = simt::Site::here()) { simt::cluster_wait(site); }
    static unsigned block_rank() { return simt::cluster_rank(); }
    static unsigned num_blocks() { return simt::cluster_size(); }
    static unsigned thread_rank() {
        return block_rank() * thread_block::size() + thread_block::thread_rank();
    }
    static unsigned num_threads() { return num_blocks() * thread_block::size(); }
    template <class T>
    static T *map_shared_rank(T *mine, int rank, simt::Site site = simt::Site::here()) {
        return static_cast<T *>(simt::peer_shared(mine, unsigned(rank), site));
    }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
    static void sync(simt::Site site = simt::Site::here()) { simt::grid_barrier(site); }
    static unsigned long long thread_rank() {
        const unsigned long long block =
            blockIdx.x + gridDim.x * (blockIdx.y + 1ull * gridDim.y * blockIdx.z);
        return block * thread_block::size() + thread_block::thread_rank();
    }
    static unsigned long long num_threads() {
        return 1ull * gridDim.x * gridDim.y * gridDim.z * thread_block::size();
    }
    static unsigned long long size() { return num_threads(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
