// SPDX-License-Identifier: Apache-2.0
// (7), (10), (11) on CUDA devices: which threads own a row, and the launches.
#include "gate.cuh"
#include "launch.h"

namespace msdkern {
namespace {

// One way to own a row.
struct Way {
    int lanes, threads;  // of a team and of a block
    int blocks;          // of a cluster
    int pieces;          // of a row that each thread reads at most; 0: any
};

// The first that fits serves, whatever the number of rows: a row's result does not depend on it.
// Few threads per row leave little to merge; more, and clusters, keep the reading of one row short.
// From bytes and shuffles, not measured.
// clang-format off
constexpr Way kWays[] = {
    {  1, 256, 1, 1},
    {  2, 256, 1, 1},
    {  4, 256, 1, 1},
    {  8, 256, 1, 1},
    { 16, 256, 1, 1},
    { 32, 256, 1, 2},
    {128, 128, 1, 2},
    {256, 256, 1, 2},
    {256, 256, 2, 2},
    {256, 256, 4, 2},
    {256, 256, 8, 0},
    {256, 256, 1, 0},
};
// clang-format on

// Rows that one block puts in order while the others' results are fresh; more take a launch.
constexpr int64_t kTogether = 8192;
constexpr int kFewestThreads = 128;  // of a block, as far as a processor's room is concerned

struct Choice {
    Layout layout;
    int threads;
    int64_t grid;
};

template <class S>
const Way &way_of(int64_t classes, bool clusters) {
    const Way *way = kWays;
    for (;; ++way) {
        const int64_t piece = int64_t(kDeep) * kVector<S> * way->lanes * way->blocks;
        const bool fits = !way->pieces || (classes + piece - 1) / piece <= way->pieces;
        if (fits && (way->blocks == 1 || clusters)) return *way;
    }
}

template <class S, class Call>
Choice choose(const Call &call, int64_t rows) {
    const Machine &m = machine(call.place.device);
    const Way &way = way_of<S>(call.classes, m.clusters);
    int threads = way.threads;
    // Few rows: rather more blocks than more teams per block.
    while (threads > 32 && threads > way.lanes &&
           rows * way.lanes < int64_t(threads) * m.processors)
        threads /= 2;
    const int64_t teams = threads / way.lanes, wanted = (rows + teams - 1) / teams;
    const int resident = gates_resident(sizeof(S)) * kGateThreads /
                         (threads < kFewestThreads ? kFewestThreads : threads);
    const int64_t room = int64_t(m.processors) * resident / way.blocks;
    uint64_t bytes = 0;
    for (int k = 0; k < call.exits; ++k)
        bytes |= reinterpret_cast<uintptr_t>(call.logits[k]) | uint64_t(call.stride[k]) * sizeof(S);
    Choice choice = {{way.lanes, way.blocks, common_width(bytes), rows <= kTogether}, threads, 0};
    choice.grid = (wanted < room ? wanted : room < 1 ? 1 : room) * way.blocks;
    if (choice.grid < way.blocks) choice.grid = way.blocks;
    return choice;
}

template <class S>
cudaError_t run_statistics(const msdkern_statistics &call) {
    const Choice c = choose<S>(call, call.exits * call.rows);
    return launch(call.place.stream, c.grid, c.threads, c.layout.blocks, sizeof(Desk<RealOf<S>>),
                  statistics_kernel<S>, call, c.layout);
}

template <class S>
auto gate_for(int measure) -> decltype(&gate_kernel<S, kNothing>) {
    switch (measure) {
        case MSDKERN_CONFIDENCE:
            return gate_kernel<S, kSum>;
        case MSDKERN_MARGIN:
            return gate_kernel<S, kSum | kRunnerUp>;
        case MSDKERN_ENTROPY:
        case MSDKERN_NORMALIZED_ENTROPY:
            return gate_kernel<S, kSum | kWeighted>;
        default:
            return gate_kernel<S, kNothing>;
    }
}

template <class S>
cudaError_t run_gate(const msdkern_gate &call) {
    typedef RealOf<S> Real;
    const Choice c = choose<S>(call, call.rows);
    const int64_t shared = sizeof(Desk<Real>);
    const cudaError_t error = launch(call.place.stream, c.grid, c.threads, c.layout.blocks, shared,
                                     gate_for<S>(call.measure), call, c.layout);
    if (error != cudaSuccess || !call.count || c.layout.together) return error;
    return launch(call.place.stream, c.grid / c.layout.blocks, kGateThreads, 1, shared,
                  order_kernel<Real>, call, c.threads / c.layout.lanes);
}

bool sizes_serve(int exits, int64_t rows, int64_t classes) {
    return exits >= 1 && exits <= MSDKERN_MAX_EXITS && rows >= 0 && classes >= 1 &&
           classes <= kMostClasses;
}

int any_gate(const msdkern_gate &call) {
    if (!sizes_serve(call.exits, call.rows, call.classes)) return MSDKERN_BAD_SIZE;
    if (call.measure < MSDKERN_CONFIDENCE || call.measure > MSDKERN_GIVEN) return MSDKERN_BAD_SIZE;
    if (!call.live_at && (call.live < 0 || call.live > call.rows)) return MSDKERN_BAD_SIZE;
    for (int k = 0; k < call.exits; ++k) {
        const double t = call.temperature[k];
        if (!call.temperature_at && !(t > 0 && t <= 1e300)) return MSDKERN_BAD_TEMPERATURE;
        if (!call.threshold_at && call.threshold[k] != call.threshold[k])
            return MSDKERN_BAD_THRESHOLD;
    }
    if (call.rows == 0 && !call.count) return MSDKERN_OK;
    const DeviceGuard guard(call.place.device);
    if (guard.error != cudaSuccess) return status_of(guard.error);
    return with_dtype(call.dtype, [&](auto s) { return status_of(run_gate<decltype(s)>(call)); });
}

}  // namespace

int64_t most_gate_blocks(int device) {
    return int64_t(machine(device).processors) * gates_resident(4) * kGateThreads / kFewestThreads;
}

}  // namespace msdkern

extern "C" {

int msdkern_cuda_exit_gate(const msdkern_gate *call) { return msdkern::any_gate(*call); }
int msdkern_cuda_gate_step(const msdkern_gate *call) { return msdkern::any_gate(*call); }
int msdkern_cuda_statistics(const msdkern_statistics *call) {
    if (!msdkern::sizes_serve(call->exits, call->rows, call->classes)) return MSDKERN_BAD_SIZE;
    if (call->rows == 0) return MSDKERN_OK;
    const msdkern::DeviceGuard guard(call->place.device);
    if (guard.error != cudaSuccess) return msdkern::status_of(guard.error);
    return msdkern::with_dtype(call->dtype, [&](auto s) {
        return msdkern::status_of(msdkern::run_statistics<decltype(s)>(*call));
    });
}

}  // extern "C"
