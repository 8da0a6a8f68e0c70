// SPDX-License-Identifier: Apache-2.0
// In the place of csrc/cuda/ptx.h: the same names, by the scheduler instead of by PTX.
#pragma once

#include <cuda_runtime.h>

namespace msdkern {

#define MSDKERN_DEVICE __device__ __forceinline__

template <class T>
MSDKERN_DEVICE T *dyn_smem() {
    return static_cast<T *>(simt::dynamic_shared());
}

MSDKERN_DEVICE float exp2_approx(float x) {
    const float y = simt::exp2_approximately(x);
    return y < 0x1p-126f ? 0.0f : y;
}

MSDKERN_DEVICE void renew(int &) {}

MSDKERN_DEVICE void copy_async(void *to, const void *from, simt::Site site = simt::Site::here()) {
    simt::copy_async(to, from, 16, 0, site);
}
MSDKERN_DEVICE void wait_copies() {
    simt::commit_copies();
    simt::wait_copies(0);
}

MSDKERN_DEVICE unsigned cluster_rank() { return simt::cluster_rank(); }
MSDKERN_DEVICE void cluster_sync(simt::Site site = simt::Site::here()) {
    simt::cluster_arrive(site);
    simt::cluster_wait(site);
}
template <class T>
MSDKERN_DEVICE T *in_block(T *mine, unsigned rank, simt::Site site = simt::Site::here()) {
    return static_cast<T *>(simt::peer_shared(mine, rank, site));
}

}  // namespace msdkern
