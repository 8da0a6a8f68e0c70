// SPDX-License-Identifier: Apache-2.0
// (7), (10), (11) on CUDA devices: the launches.
#include "gate.cuh"

namespace msdkern {
namespace {

// Rows that one block puts in order while the others' results are fresh; more take a launch.
constexpr int64_t kTogether = 4096;

template <class S, class Call>
RowChoice choose_for(const Call &call, int64_t rows) {
    const Machine &m = machine(call.place.device);
    return choose<S>(m, *way_of<S>(call.classes, m.clusters), rows,
                     joined<S>(call.exits, call.logits, call.stride));
}

template <class S>
cudaError_t run_statistics(const msdkern_statistics &call) {
    const RowChoice c = choose_for<S>(call, call.exits * call.rows);
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
    RowChoice c = choose_for<S>(call, call.rows);
    c.layout.together = call.rows <= kTogether;
    const int64_t shared = sizeof(Desk<Real>);
    const cudaError_t error = launch(call.place.stream, c.grid, c.threads, c.layout.blocks, shared,
                                     gate_for<S>(call.measure), call, c.layout);
    if (error != cudaSuccess || !call.count || c.layout.together) return error;
    return launch(call.place.stream, c.grid / c.layout.blocks, kRowThreads, 1, shared,
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

int64_t most_gate_blocks(int device) { return machine(device).processors * kMostRowBlocks; }

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
