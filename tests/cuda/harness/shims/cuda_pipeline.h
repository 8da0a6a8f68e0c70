// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies to shared memory by each thread.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void *to, const void *from, std::size_t bytes,
                                    std::size_t zeros = 0, simt::Site site = simt::Site::here()) {
    simt::copy_async(to, from, bytes, zeros, site);
}
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(std::size_t newest) { simt::wait_copies(unsigned(newest)); }
