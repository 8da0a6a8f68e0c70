// SPDX-License-Identifier: Apache-2.0
// (7) What gates and calibration read of the logits, from one pass per row.
#pragma once

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// The largest value but one, counting repetitions: equal to the largest where it occurs twice.
template <class S, class Real>
static Real row_runner_up(const S *row, int64_t classes, int64_t argmax) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    const Real lowest = Real(-__builtin_inf());
    const V none = splat(lowest);
    V best = none;
    for (int64_t c = 0; c < classes; c += W) {
        const int n = int(least<int64_t>(W, classes - c));
        V z = n == W ? load(row + c) : load_partial(row + c, n, lowest);
        if (argmax >= c && argmax < c + W) z[argmax - c] = lowest;
        best = maximum(z, best);
    }
    return largest<Real>(best);
}

template <class S>
static void statistics_row(const msdkern_statistics &call, int k, int64_t n) {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    const S *row = static_cast<const S *>(call.logits[k]) + n * call.stride[k];
    const Real m = row_maximum(row, call.classes);
    const Real lowest = Real(-__builtin_inf());
    V total = V{}, squares = V{}, weighted = V{};
    for_vectors(row, call.classes, lowest, [&](int64_t, V z) __attribute__((always_inline)) {
        const V x = z - m, e = exponential(x);
        total += e;
        squares += e * e;
        weighted += weigh(e, x);
    });
    const Real sum_e = sum<Real>(total), inverse = 1 / sum_e;
    Real log_sum = sum_e;
    logarithms(&log_sum, 1);
    const int64_t argmax = row_argmax(row, call.classes, m, sum_e != sum_e);
    Real margin = inverse;
    if (call.classes > 1) {
        const Real gap = row_runner_up<S, Real>(row, call.classes, argmax) - m;
        margin = inverse * (1 - exponential(splat(gap))[0]);
    }
    const int64_t at = k * call.rows + n;
    // Where the largest logit is infinite or NaN, it is the sum.
    const Real top = load_partial(row + argmax, 1, Real(0))[0];
    static_cast<Real *>(call.lse)[at] = top - top == 0 ? m + log_sum : top;
    static_cast<Real *>(call.confidence)[at] = inverse;
    static_cast<Real *>(call.margin)[at] = margin;
    static_cast<Real *>(call.entropy)[at] = log_sum - sum<Real>(weighted) * inverse;
    static_cast<Real *>(call.sum_squares)[at] = sum<Real>(squares) * (inverse * inverse);
    call.prediction[at] = argmax;
}

template <class S>
static int run_statistics(const msdkern_statistics &call) {
    const Blocks blocks(call.rows * call.exits, call.classes);
    parallel_for(blocks.count, call.place.threads, [&](int64_t b) {
        for (int64_t i = blocks.first(b); i < blocks.last(b); ++i)
            statistics_row<S>(call, int(i / call.rows), i % call.rows);
    });
    return MSDKERN_OK;
}

}  // namespace MSDKERN_NAMESPACE
