// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/cuda/ptx.h: the same names, with the scheduler's functions instead of PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace msdkern {

template <class T>
T *dyn_smem() {
    return static_cast<T *>(simt::dynamic_shared());
}

inline void cp_async_16(void *to, const void *from, simt::Site site = simt::Site::here()) {
    simt::copy_async(to, from, 16, 0, site);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int newest>
void cp_async_wait() {
    simt::wait_copies(newest);
}

template <class T>
T load_streaming(const T *from, simt::Site site = simt::Site::here()) {
    return __ldcs(from, site);
}
template <class T>
void store_streaming(T *to, T value, simt::Site site = simt::Site::here()) {
    __stcs(to, value, site);
}

inline unsigned cluster_rank() { return simt::cluster_rank(); }
inline unsigned cluster_size() { return simt::cluster_size(); }
inline void cluster_arrive(simt::Site site = simt::Site::here()) { simt::cluster_arrive(site); }
inline void cluster_wait(simt::Site site = simt::Site::here()) { simt::cluster_wait(site); }
template <class T>
T *map_shared(T *mine, unsigned rank, simt::Site site = simt::Site::here()) {
    return static_cast<T *>(simt::peer_shared(mine, rank, site));
}

}  // namespace msdkern
