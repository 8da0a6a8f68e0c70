// SPDX-License-Identifier: Apache-2.0
// (7) What gates and calibration read of the logits; (10), (11) the gates.
#pragma once

#include "../msdkern.h"
#include "tally.h"
#include "ways.h"

namespace msdkern {

// The numbers of one exit.
template <class Real>
struct Setting {
    Real inverse_t, scale, threshold;  // scale: of reading.cuh
    Real largest_entropy;              // what entropies are divided by
};

// Shared memory.
template <class Real>
struct Desk {
    Setting<Real> setting[MSDKERN_MAX_EXITS];
    Meeting<Real> meeting;
    double scratch[32];
    int warp[32];
    int stays, last;
};

template <class S, class Call>
MSDKERN_DEVICE const S *gate_row(const Call &call, int k, int64_t n) {
    return static_cast<const S *>(call.logits[k]) + n * call.stride[k];
}

// (7)
template <class S>
__global__ void __launch_bounds__(kRowThreads, rows_resident(sizeof(S)))
    statistics_kernel(const __grid_constant__ msdkern_statistics call,
                      const __grid_constant__ Layout layout) {
    typedef RealOf<S> Real;
    const Team team(layout.lanes, layout.blocks);
    if (layout.blocks > 1) cluster_sync();  // nobody writes to a block that has not begun
    Reader<S> reader(team, dyn_smem<Desk<Real>>()->meeting, call.classes, layout.width);
    const auto real = [](void *p) { return static_cast<Real *>(p); };
    const Real scale = Real(1 / kLogBase<Real>);
    const int teams = int(blockDim.x) / layout.lanes;
    const int64_t rows = call.exits * call.rows;
    const int64_t step = int64_t(gridDim.x / layout.blocks) * teams;
    int64_t i = int64_t(blockIdx.x / layout.blocks) * teams + team.index;
    for (; i < rows; i += step) {
        const int k = int(i / call.rows);
        const Reading<Real> r =
            reader.template read<kAll>(gate_row<S>(call, k, i - k * call.rows), scale);
        if (team.member() != 0) continue;
        const Real inverse = 1 / r.sum, log_sum = logarithm(r.sum);
        // Where the largest logit is infinite or NaN, it is the sum.
        real(call.lse)[i] = r.top - r.top == 0 ? r.top + log_sum : r.top;
        real(call.confidence)[i] = inverse;
        real(call.margin)[i] =
            call.classes > 1 ? inverse * (1 - power((r.runner_up - r.top) * scale)) : inverse;
        real(call.entropy)[i] = log_sum - r.weighted * inverse * Real(kLogBase<Real>);
        real(call.sum_squares)[i] = r.squares * (inverse * inverse);
        call.prediction[i] = r.at;
    }
}

// Rows in flight.
MSDKERN_DEVICE int64_t live_rows(const msdkern_gate &call) {
    const int64_t live = call.live_at ? *call.live_at : call.live;
    return live < 0 ? 0 : live > call.rows ? call.rows : live;
}

// The rows of one part of the grid: neighbours, so that the rows that stay need only be counted
// per part to be put in order.
struct Share {
    int64_t first, last;
    MSDKERN_DEVICE Share(int64_t rows, int teams, int part, int parts) {
        const int64_t turns = (rows + teams - 1) / teams;
        const int64_t size = (turns + parts - 1) / parts * teams;
        first = part * size < rows ? part * size : rows;
        last = first + size < rows ? first + size : rows;
    }
};

// By value or from device memory, where nobody could refuse them: a temperature that is not
// positive makes every score NaN.
template <class Real>
MSDKERN_DEVICE Setting<Real> setting_of(const msdkern_gate &call, int k) {
    const Real *const temperature = static_cast<const Real *>(call.temperature_at);
    const Real *const threshold = static_cast<const Real *>(call.threshold_at);
    double t = call.temperature[k];
    if (temperature) t = double(temperature[call.temperature_per_exit ? k : 0]);
    t = t > 0 && t <= 1e300 ? t : double(NAN);
    return {Real(1 / t), Real(1 / (t * kLogBase<Real>)),
            threshold ? threshold[call.threshold_per_exit ? k : 0] : Real(call.threshold[k]),
            call.measure == MSDKERN_NORMALIZED_ENTROPY && call.classes > 1
                ? logarithm(Real(call.classes))
                : Real(1)};
}

// False for NaN.
template <class Real>
MSDKERN_DEVICE bool fires(const msdkern_gate &call, Real score, Real threshold) {
    const bool low = call.measure == MSDKERN_ENTROPY || call.measure == MSDKERN_NORMALIZED_ENTROPY;
    return low ? score <= threshold : score >= threshold;
}

template <class S, int kNeeds>
struct Gate {
    typedef RealOf<S> Real;
    const msdkern_gate &call;
    const Team &team;
    const Setting<Real> *const setting;
    Reader<S> reader;

    MSDKERN_DEVICE Gate(const msdkern_gate &c, const Layout &layout, const Team &t,
                        Desk<Real> &desk)
        : call(c),
          team(t),
          setting(desk.setting),
          reader(t, desk.meeting, c.classes, layout.width) {}

    // The score of exit k for row n; `prediction` and `score` come as the exit before left them.
    MSDKERN_DEVICE void measure(int k, int64_t n, int &prediction, Real &score) {
        const Real scale = setting[k].scale;
        const Reading<Real> r = reader.template read<kNeeds>(gate_row<S>(call, k, n), scale);
        const Real inverse = 1 / r.sum;
        const bool agrees = prediction == r.at;
        prediction = r.at;
        if (kNeeds == kNothing) {
            if (call.measure == MSDKERN_MAX_LOGIT) score = r.top * setting[k].inverse_t;
            if (call.measure == MSDKERN_PATIENCE) score = agrees ? score + 1 : Real(0);
            if (call.measure == MSDKERN_GIVEN)
                score = static_cast<const Real *>(call.given)[k * call.rows + n];
        } else if (kNeeds & kRunnerUp) {
            const Real gap = (r.runner_up - r.top) * scale;
            score = call.classes > 1 ? inverse * (1 - power(gap)) : inverse;
        } else if (kNeeds & kWeighted) {
            const Real nats = logarithm(r.sum) - r.weighted * inverse * Real(kLogBase<Real>);
            score = nats / setting[k].largest_entropy;
        } else {
            score = inverse;
        }
    }
    // (10) The first exit that fires answers row n, else the last. Whether it fired.
    MSDKERN_DEVICE bool decide(int64_t n) {
        int prediction = -1;
        Real score = 0;
        if (call.previous_prediction) {
            const int64_t previous = call.previous_prediction[n];
            if (previous < call.classes) prediction = previous < 0 ? -1 : int(previous);
            score = static_cast<const Real *>(call.previous_score)[n];
        }
        int k = 0;
        bool fired = false;
        for (;; ++k) {
            measure(k, n, prediction, score);
            fired = fires(call, score, setting[k].threshold);
            if (fired || k == call.exits - 1) break;
        }
        if (team.member() != 0) return fired;
        if (call.exit_index) call.exit_index[n] = k;
        call.prediction[n] = prediction;
        static_cast<Real *>(call.score)[n] = score;
        return fired;
    }
};

// (11) Where the rows of [first, last) go, of which `before` rows that stay and `total` in all:
// whether a row stays follows from its score.
template <class Real>
MSDKERN_DEVICE void put_in_order(const msdkern_gate &call, Desk<Real> &desk, int64_t first,
                                 int64_t last, int64_t before, int64_t total) {
    constexpr int kRows = 8;  // of one thread, so that meetings are few
    const int64_t live = live_rows(call);
    const Real threshold = setting_of<Real>(call, 0).threshold;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    for (int64_t base = first; base < last; base += int64_t(blockDim.x) * kRows) {
        const int64_t mine = base + int64_t(threadIdx.x) * kRows;
        unsigned stays = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int64_t n = mine + i;
            if (n >= last || n >= live) continue;
            const Real score = __ldcg(static_cast<const Real *>(call.score) + n);
            stays |= unsigned(!fires(call, score, threshold)) << i;
        }
        int sum = __popc(stays);  // of the lanes up to this one
        for (int o = 1; o < 32; o *= 2) {
            const int other = __shfl_up_sync(~0u, sum, o);
            if (lane >= o) sum += other;
        }
        if (lane == 31) desk.warp[warp] = sum;
        __syncthreads();
        int64_t staying = before + sum - __popc(stays);
        for (int w = 0; w < warps; ++w) {
            if (w < warp) staying += desk.warp[w];
            before += desk.warp[w];
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int64_t n = mine + i;
            if (n >= last) break;
            const bool stay = stays >> i & 1;
            call.stay[stay ? staying : total + (n - staying)] = n;
            staying += stay;
        }
        __syncthreads();  // the counts are read
    }
}

// Rows that stay in the parts first .. last - 1 of the grid.
MSDKERN_DEVICE int64_t rows_that_stay(const int *counts, int first, int last, double *scratch) {
    double mine = 0;
    for (int p = first + int(threadIdx.x); p < last; p += int(blockDim.x))
        mine += __ldcg(counts + p);
    return int64_t(block_sum(mine, scratch));
}

// After the tally; part by part, written by every call that reads them.
MSDKERN_DEVICE int *counts_of(const msdkern_gate &call) {
    return reinterpret_cast<int *>(static_cast<char *>(call.place.workspace) + kTallyBytes);
}

// One part's share of the order.
template <class Real>
MSDKERN_DEVICE void put_share_in_order(const msdkern_gate &call, Desk<Real> &desk, int teams,
                                       int part, int parts) {
    const int *const counts = counts_of(call);
    const int64_t live = live_rows(call);
    const Share share(live, teams, part, parts);
    const int64_t before = rows_that_stay(counts, 0, part, desk.scratch);
    const int64_t total = before + rows_that_stay(counts, part, parts, desk.scratch);
    put_in_order(call, desk, share.first, share.last, before, total);
    if (part == 0 && threadIdx.x == 0) *call.count = total;
    // The others behind those in flight.
    const Share rest(call.rows - live, teams, part, parts);
    put_in_order(call, desk, live + rest.first, live + rest.last, total, total);
}

template <class Real>
__global__ void __launch_bounds__(kRowThreads)
    order_kernel(const __grid_constant__ msdkern_gate call, int teams) {
    put_share_in_order<Real>(call, *dyn_smem<Desk<Real>>(), teams, blockIdx.x, gridDim.x);
}

// What rows that are not in flight answer.
template <class Real>
MSDKERN_DEVICE void answer_nothing(const msdkern_gate &call, int64_t live) {
    int64_t n = live + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; n < call.rows; n += int64_t(gridDim.x) * blockDim.x) {
        call.prediction[n] = -1;
        static_cast<Real *>(call.score)[n] = Real(NAN);
    }
}

// After the decisions of a step: every part of the grid counts; where rows are few, the block that
// is the last to come here puts them in order.
template <class Real>
MSDKERN_DEVICE void finish_step(const msdkern_gate &call, const Layout &layout, Desk<Real> &desk) {
    const int part = blockIdx.x / layout.blocks, parts = gridDim.x / layout.blocks;
    Tally *const tally = static_cast<Tally *>(call.place.workspace);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        counts_of(call)[part] = desk.stays;
        __threadfence();
        desk.last = layout.together && atomicAdd(&tally->blocks, 1u) == unsigned(parts) - 1;
    }
    __syncthreads();
    if (!desk.last) return;
    __threadfence();
    const int64_t total = rows_that_stay(counts_of(call), 0, parts, desk.scratch);
    put_in_order(call, desk, 0, call.rows, 0, total);
    if (threadIdx.x != 0) return;
    *call.count = total;
    tally->blocks = 0;
}

// (10) for all exits, or (11) for one.
template <class S, int kNeeds>
__global__ void __launch_bounds__(kRowThreads, rows_resident(sizeof(S)))
    gate_kernel(const __grid_constant__ msdkern_gate call, const __grid_constant__ Layout layout) {
    typedef RealOf<S> Real;
    Desk<Real> &desk = *dyn_smem<Desk<Real>>();
    for (int k = threadIdx.x; k < call.exits; k += blockDim.x)
        desk.setting[k] = setting_of<Real>(call, k);
    if (threadIdx.x == 0) desk.stays = 0;
    __syncthreads();
    const Team team(layout.lanes, layout.blocks);
    if (layout.blocks > 1) cluster_sync();  // nobody writes to a block that has not begun
    const int teams = int(blockDim.x) / layout.lanes;
    const Share share(live_rows(call), teams, blockIdx.x / layout.blocks,
                      gridDim.x / layout.blocks);
    Gate<S, kNeeds> gate(call, layout, team, desk);
    const int rows = int(share.last - share.first);
    for (int i = team.index; i < rows; i += teams)
        if (!gate.decide(share.first + i) && team.local == 0) atomicAdd(&desk.stays, 1);
    if (!call.count) return;
    answer_nothing<Real>(call, live_rows(call));
    if (team.block == 0) finish_step(call, layout, desk);
}

}  // namespace msdkern
