// SPDX-License-Identifier: Apache-2.0
// (12) Rows of several tensors at once, gathered by an index or scattered back by it.
#pragma once

#include <string.h>

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// Copies of a size known to the compiler are moves; results of one number per row are common.
INLINE void copy_row(char *target, const char *source, int64_t bytes) {
    if (bytes == 8)
        memcpy(target, source, 8);
    else if (bytes == 4)
        memcpy(target, source, 4);
    else
        memcpy(target, source, size_t(bytes));
}

static int run_copy(msdkern_copy &call, bool scatter) {
    for (int64_t i = 0; i < call.count; ++i)
        if (call.index[i] < 0 || call.index[i] >= call.limit) {
            call.bad_index = call.index[i];
            return MSDKERN_BAD_INDEX;
        }
    for (int t = 0; t < call.tensors; ++t) {
        const char *source = static_cast<const char *>(call.source[t]);
        char *target = static_cast<char *>(call.target[t]);
        const int64_t bytes = call.bytes[t], rows = scatter ? call.count : call.capacity;
        if (bytes == 0) continue;
        const Blocks blocks(rows, bytes / 4);
        parallel_for(blocks.count, call.place.threads, [&](int64_t b) {
            for (int64_t i = blocks.first(b); i < blocks.last(b); ++i) {
                if (i >= call.count) {
                    memset(target + i * call.target_stride[t], 0, size_t(bytes));
                    continue;
                }
                const int64_t from = scatter ? i : call.index[i], to = scatter ? call.index[i] : i;
                copy_row(target + to * call.target_stride[t], source + from * call.source_stride[t],
                         bytes);
            }
        });
    }
    return MSDKERN_OK;
}

}  // namespace MSDKERN_NAMESPACE
