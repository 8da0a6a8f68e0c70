// SPDX-License-Identifier: Apache-2.0
// (12) Rows of several tensors at once, gathered by an index or scattered back by it, in one
// launch.
#include "launch.h"
#include "tally.h"

namespace msdkern {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kCopyDepth = 4;  // units that a thread has in flight

// How the rows of each tensor are dealt: `lanes` threads to a row, which move units of `width`
// bytes.
struct Deal {
    int width[MSDKERN_MAX_EXITS], lanes[MSDKERN_MAX_EXITS];
};

// Which units of which row a thread moves.
struct Part {
    const char *source;  // null: zeros
    char *target;
    int64_t first, step, units;
};

// All loads before the first store.
template <class Unit>
MSDKERN_DEVICE void move(const Part &part) {
    const Unit *const source = reinterpret_cast<const Unit *>(part.source);
    Unit *const target = reinterpret_cast<Unit *>(part.target);
    Unit held[kCopyDepth] = {};
#pragma unroll
    for (int i = 0; i < kCopyDepth; ++i) {
        const int64_t u = part.first + i * part.step;
        if (source && u < part.units) held[i] = source[u];
    }
#pragma unroll
    for (int i = 0; i < kCopyDepth; ++i) {
        const int64_t u = part.first + i * part.step;
        if (u < part.units) target[u] = held[i];
    }
}
MSDKERN_DEVICE void move(const Part &part, int width) {
    switch (width) {
        case 16:
            return move<uint4>(part);
        case 8:
            return move<uint2>(part);
        case 4:
            return move<unsigned>(part);
        case 2:
            return move<unsigned short>(part);
        default:
            return move<unsigned char>(part);
    }
}

// Blocks take turns at tensors; a block's tile is several rows, or a piece of one.
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(const __grid_constant__ msdkern_copy call, const __grid_constant__ Deal deal,
                int scatter) {
    const int t = int(blockIdx.x) % call.tensors;
    const int width = deal.width[t], lanes = deal.lanes[t];
    const int64_t given = call.count_at ? *call.count_at : call.count;
    const int64_t count = given < 0 ? 0 : given > call.capacity ? call.capacity : given;
    const int64_t rows = scatter ? count : call.capacity, units = call.bytes[t] / width;
    const int64_t deep = int64_t(lanes) * kCopyDepth, pieces = (units + deep - 1) / deep;
    const int rows_per_tile = kCopyThreads / lanes, local = int(threadIdx.x) % lanes;
    const int64_t tiles = (rows + rows_per_tile - 1) / rows_per_tile * pieces;
    const int64_t step = int64_t(gridDim.x) / call.tensors;
    for (int64_t tile = int64_t(blockIdx.x) / call.tensors; tile < tiles; tile += step) {
        const int64_t i = tile / pieces * rows_per_tile + int(threadIdx.x) / lanes;
        if (i >= rows) continue;
        const int64_t index = i < count ? call.index[i] : -1;
        const bool there = index >= 0 && index < call.limit;
        if (i < count && !there && call.place.workspace)
            atomicOr(&static_cast<Tally *>(call.place.workspace)->bad_index, 1u);
        if (scatter && !there) continue;
        const int64_t from = scatter ? i : index, to = scatter ? index : i;
        const char *source = static_cast<const char *>(call.source[t]);
        char *target = static_cast<char *>(call.target[t]);
        source = there ? source + from * call.source_stride[t] : nullptr;
        target += to * call.target_stride[t];
        move({source, target, tile % pieces * deep + local, lanes, units}, width);
    }
}

int any_copy(const msdkern_copy &call, bool scatter) {
    if (call.tensors < 0 || call.tensors > MSDKERN_MAX_EXITS || call.capacity < 0 ||
        (!call.count_at && (call.count < 0 || call.count > call.capacity)))
        return MSDKERN_BAD_SIZE;
    Deal deal = {};
    int64_t most = 0;  // tiles
    for (int t = 0; t < call.tensors; ++t) {
        const uint64_t numbers[] = {reinterpret_cast<uintptr_t>(call.source[t]),
                                    reinterpret_cast<uintptr_t>(call.target[t]),
                                    uint64_t(call.source_stride[t]),
                                    uint64_t(call.target_stride[t]), uint64_t(call.bytes[t])};
        uint64_t bytes = 0;
        for (const uint64_t number : numbers) bytes |= number;
        deal.width[t] = common_width(bytes);
        const int64_t units = call.bytes[t] / deal.width[t];
        int lanes = 1;
        while (lanes < kCopyThreads && lanes < units) lanes *= 2;
        deal.lanes[t] = lanes;
        const int64_t deep = int64_t(lanes) * kCopyDepth, per_tile = kCopyThreads / lanes;
        const int64_t tiles =
            (call.capacity + per_tile - 1) / per_tile * ((units + deep - 1) / deep);
        most = tiles > most ? tiles : most;
    }
    if (most == 0) return MSDKERN_OK;
    const DeviceGuard guard(call.place.device);
    if (guard.error != cudaSuccess) return status_of(guard.error);
    const int64_t room = int64_t(machine(call.place.device).processors) * 8;
    return status_of(launch(call.place.stream, (most < room ? most : room) * call.tensors,
                            kCopyThreads, 1, 0, copy_kernel, call, deal, int(scatter)));
}

}  // namespace
}  // namespace msdkern

extern "C" {

int msdkern_cuda_gather_rows(msdkern_copy *call) { return msdkern::any_copy(*call, false); }
int msdkern_cuda_scatter_rows(msdkern_copy *call) { return msdkern::any_copy(*call, true); }

}  // extern "C"
