// SPDX-License-Identifier: Apache-2.0
// Everything that is PTX, or needs a certain architecture: one header, so that a test can put
// another in its place and run the kernels elsewhere.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace msdkern {

#define MSDKERN_DEVICE __device__ __forceinline__

template <class T>
MSDKERN_DEVICE T *dyn_smem() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return reinterpret_cast<T *>(bytes);
}

// 2^x in one instruction, two roundings off at most; subnormal results are 0.
MSDKERN_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Keeps what depends on x from being computed ahead of a loop, to be kept in registers all along.
MSDKERN_DEVICE void renew(int &x) { asm volatile("" : "+r"(x)); }

// 16 bytes from global to shared memory, past the registers and the first-level cache. The copy
// belongs to the thread: wait_copies() shows it to the thread alone.
MSDKERN_DEVICE void copy_async(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
    *static_cast<uint4 *>(to) = *static_cast<const uint4 *>(from);
#endif
}
MSDKERN_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Thread-block clusters. Before sm_90 every block is a cluster of its own.
MSDKERN_DEVICE unsigned cluster_rank() {
    unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
MSDKERN_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
#endif
}
// The same variable in the shared memory of another block of the cluster.
template <class T>
MSDKERN_DEVICE T *in_block(T *mine, unsigned rank) {
#if __CUDA_ARCH__ >= 900
    std::uint64_t theirs;
    asm("mapa.u64 %0, %1, %2;"
        : "=l"(theirs)
        : "l"(reinterpret_cast<std::uint64_t>(mine)), "r"(rank));
    return reinterpret_cast<T *>(theirs);
#else
    return rank == 0 ? mine : nullptr;
#endif
}

}  // namespace msdkern
