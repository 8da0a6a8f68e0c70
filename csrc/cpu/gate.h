// SPDX-License-Identifier: Apache-2.0
// (7) What gates and calibration read of the logits, from one pass per row; (10), (11) the gates.
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
    int64_t argmax = row_argmax(row, call.classes, m);
    if (sum_e != sum_e) argmax = first_nan(row, call.classes, argmax);
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

// Gates --------------------------------------------------------------------------------------

// What a gate reads of a row, and what of it a measure needs.
template <class Real>
struct Reading {
    Real top, runner_up, sum, weighted;  // max z; then with x = (z - top) / T: sum e^x, sum x e^x
    int64_t prediction;
};
enum Need { kNothing = 0, kSum = 1, kWeighted = 2, kRunnerUp = 4 };

// The largest and the largest but one of a piece of a row, lane by lane in one sweep.
template <class S, class Real>
INLINE void top_two(const S *row, int64_t classes, Real &top, Real &runner_up) {
    typedef VecOf<Real> V;
    const Real lowest = Real(-__builtin_inf());
    V best = splat(lowest), second = splat(lowest);
    for_vectors(row, classes, lowest, [&](int64_t, V z) __attribute__((always_inline)) {
        second = maximum(z < best ? z : best, second);
        best = maximum(z, best);
    });
    const Real m = largest<Real>(best);
    // In the first lane that holds the maximum, the second counts; in all others, the best.
    const int lane = first_lane((typename Vector<Real>::Int)(best == m));
    if (lane >= 0) best[lane] = second[lane];
    const Real s = largest<Real>(best);
    runner_up = m > top ? (s > top ? s : top) : (m > runner_up ? m : runner_up);
    top = m > top ? m : top;
}

// Sums relative to a shift, lane by lane, and what tells of NaN where there are no sums.
template <class V>
struct Sums {
    V total, weighted, nan;
};

template <int kNeeds, class V, class Real>
INLINE void add_class(Sums<V> &sums, V z, Real shift, Real inverse_t) {
    if (kNeeds & kSum) {
        const V x = (z - shift) * inverse_t, e = exponential(x);
        sums.total += e;
        if (kNeeds & kWeighted) sums.weighted += weigh(e, x);
    } else {
        sums.nan = z == z ? sums.nan : z;
    }
}

// A row of so few classes that searching it for its maximum costs a mispredicted branch more than
// keeping the place in every lane does.
template <int kNeeds, class S, class Real = typename Kind<S>::Real>
INLINE Reading<Real> read_short_row(const S *row, int64_t classes, Real inverse_t) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    const Real lowest = Real(-__builtin_inf());
    Real top = lowest, runner_up = lowest;
    if (kNeeds & kRunnerUp)
        top_two(row, classes, top, runner_up);
    else
        top = row_maximum(row, classes);
    const Real shift = top > lowest ? top : Real(0);
    Sums<V> sums = {};
    V place = splat(Real(classes)), here = lane_numbers<Real>();
    for_vectors(row, classes, lowest, [&](int64_t, V z) __attribute__((always_inline)) {
        const V hit = z == top ? here : place;
        place = hit < place ? hit : place;
        here += Real(W);
        add_class<kNeeds>(sums, z, shift, inverse_t);
    });
    const int64_t at = int64_t(reduce(place, Smallest()));
    return {top, runner_up, sum<Real>(sums.total + sums.nan), sum<Real>(sums.weighted), at};
}

// One read of the row from memory, whatever its length: piece by piece, each of which stays in the
// innermost cache while its maximum and its exponentials are taken. Sums made relative to an
// earlier maximum are rescaled when a larger one appears.
template <int kNeeds, class S, class Real = typename Kind<S>::Real>
INLINE Reading<Real> read_long_row(const S *row, int64_t classes, Real inverse_t) {
    typedef VecOf<Real> V;
    const int64_t kPiece = 8192 / int64_t(sizeof(Real));
    const Real lowest = Real(-__builtin_inf());
    Real top = lowest, runner_up = lowest, shift = 0;  // 0 while every class is masked by -inf
    Sums<V> sums = {};
    int64_t where = 0;
    for (int64_t begin = 0; begin < classes; begin += kPiece) {
        const S *piece = row + begin;
        const int64_t size = least(kPiece, classes - begin);
        const Real before = top;
        if (kNeeds & kRunnerUp) {
            top_two(piece, size, top, runner_up);
        } else {
            const Real m = row_maximum(piece, size);
            top = m > top ? m : top;
        }
        if (top > before) {
            where = begin;
            if (before > lowest) {
                const Real gap = (before - top) * inverse_t, factor = exponential(splat(gap))[0];
                // Where `gap` overflows nothing is left.
                sums.weighted = factor == 0 ? V{} : (sums.weighted + sums.total * gap) * factor;
                sums.total = sums.total * factor;
            }
            shift = top;
        }
        // Sums of sums: a lane that added up the whole row would round thousands of times.
        for (int64_t c = 0; c < size; c += 64 * kLanes<Real>) {
            Sums<V> part = {};
            for_vectors(piece + c, least<int64_t>(64 * kLanes<Real>, size - c), lowest,
                        [&](int64_t, V z) __attribute__((always_inline)) {
                            add_class<kNeeds>(part, z, shift, inverse_t);
                        });
            sums.total += part.total;
            sums.weighted += part.weighted;
            sums.nan = part.nan == part.nan ? sums.nan : part.nan;
        }
    }
    const int64_t at = where + row_argmax(row + where, least(kPiece, classes - where), top);
    return {top, runner_up, sum<Real>(sums.total + sums.nan), sum<Real>(sums.weighted), at};
}

template <int kNeeds, class S, class Real = typename Kind<S>::Real>
INLINE Reading<Real> read_row(const S *row, int64_t classes, Real inverse_t) {
    const int64_t kShort = 16 * kLanes<Real>;
    Reading<Real> found = classes <= kShort ? read_short_row<kNeeds>(row, classes, inverse_t)
                                            : read_long_row<kNeeds>(row, classes, inverse_t);
    if (found.sum != found.sum) {
        const int64_t at = first_nan(row, classes, -1);
        if (at >= 0) found.prediction = at, found.top = found.sum;
        return found;
    }
    if (found.top != -__builtin_inf()) return found;
    found.prediction = 0;  // every class is masked: there is no softmax
    if (kNeeds & kSum) found.sum = Real(__builtin_nan(""));
    return found;
}

// The score of one exit for one row, for the measures that follow from its logits.
template <int kMeasure, class S>
INLINE typename Kind<S>::Real measured(const S *row, int64_t classes,
                                       typename Kind<S>::Real inverse_t, int64_t &prediction) {
    typedef typename Kind<S>::Real Real;
    const bool entropy = kMeasure == MSDKERN_ENTROPY || kMeasure == MSDKERN_NORMALIZED_ENTROPY;
    const int needs = kMeasure == MSDKERN_CONFIDENCE ? kSum
                      : kMeasure == MSDKERN_MARGIN   ? kSum | kRunnerUp
                      : entropy                      ? kSum | kWeighted
                                                     : kNothing;
    const Reading<Real> r = read_row<needs>(row, classes, inverse_t);
    prediction = r.prediction;
    if (kMeasure == MSDKERN_MAX_LOGIT) return r.top * inverse_t;
    const Real inverse = 1 / r.sum;
    if (kMeasure == MSDKERN_MARGIN)
        return classes == 1
                   ? inverse
                   : inverse * (1 - exponential(splat((r.runner_up - r.top) * inverse_t))[0]);
    if (!entropy) return inverse;
    Real logs[2] = {r.sum, Real(classes)};
    logarithms(logs, 2);
    const Real nats = logs[0] - r.weighted * inverse;
    if (kMeasure == MSDKERN_ENTROPY) return nats;
    return classes == 1 ? nats : nats / logs[1];
}

template <int kMeasure, class S>
static bool gate_fires(const msdkern_gate &call, int k, int64_t n, int64_t previous,
                       typename Kind<S>::Real streak, int64_t &prediction,
                       typename Kind<S>::Real &score) {
    typedef typename Kind<S>::Real Real;
    const S *row = static_cast<const S *>(call.logits[k]) + n * call.stride[k];
    score = measured<kMeasure>(row, call.classes, Real(1 / call.temperature[k]), prediction);
    if (kMeasure == MSDKERN_PATIENCE) score = prediction == previous ? streak + 1 : Real(0);
    if (kMeasure == MSDKERN_GIVEN) score = static_cast<const Real *>(call.given)[k * call.rows + n];
    const Real threshold = Real(call.threshold[k]);
    const bool low = kMeasure == MSDKERN_ENTROPY || kMeasure == MSDKERN_NORMALIZED_ENTROPY;
    return low ? score <= threshold : score >= threshold;  // false for NaN
}

template <int n>
struct Number {
    static constexpr int value = n;
};

// The measure as a constant of the compiler.
template <class F>
static void with_measure(int measure, F f) {
    switch (measure) {
        case MSDKERN_CONFIDENCE:
            return f(Number<MSDKERN_CONFIDENCE>());
        case MSDKERN_MARGIN:
            return f(Number<MSDKERN_MARGIN>());
        case MSDKERN_ENTROPY:
            return f(Number<MSDKERN_ENTROPY>());
        case MSDKERN_NORMALIZED_ENTROPY:
            return f(Number<MSDKERN_NORMALIZED_ENTROPY>());
        case MSDKERN_MAX_LOGIT:
            return f(Number<MSDKERN_MAX_LOGIT>());
        case MSDKERN_PATIENCE:
            return f(Number<MSDKERN_PATIENCE>());
        default:
            return f(Number<MSDKERN_GIVEN>());
    }
}

// (10) The first exit that fires answers a row; later exits of that row are not read.
template <class S>
static int run_exit_gate(const msdkern_gate &call) {
    typedef typename Kind<S>::Real Real;
    const Blocks blocks(call.rows, call.classes * call.exits);
    with_measure(call.measure, [&](auto measure) {
        parallel_for(blocks.count, call.place.threads, [&](int64_t b) {
            for (int64_t n = blocks.first(b); n < blocks.last(b); ++n) {
                int64_t prediction = -1;
                Real score = 0;
                int k = 0;
                while (!gate_fires<decltype(measure)::value, S>(call, k, n, prediction, score,
                                                                prediction, score) &&
                       k < call.exits - 1)
                    ++k;
                call.exit_index[n] = k;
                call.prediction[n] = prediction;
                static_cast<Real *>(call.score)[n] = score;
            }
        });
    });
    return MSDKERN_OK;
}

// (11) The rows that stay, in order, then the others, in order: without branches.
static void partition(const bool *stays, int64_t rows, int64_t *order, int64_t *count) {
    int64_t kept = 0;
    for (int64_t n = 0; n < rows; ++n) kept += stays[n];
    *count = kept;
    int64_t leaving = kept, staying = 0;
    for (int64_t n = 0; n < rows; ++n) {
        order[stays[n] ? staying : leaving] = n;
        staying += stays[n];
        leaving += !stays[n];
    }
}

template <class S>
static int run_gate_step(const msdkern_gate &call) {
    typedef typename Kind<S>::Real Real;
    bool *stays = static_cast<bool *>(arena().take(size_t(call.rows) + 1));
    if (!stays) return MSDKERN_NO_MEMORY;
    const Blocks blocks(call.rows, call.classes);
    const Real *streak = static_cast<const Real *>(call.previous_score);
    const bool patient = call.previous_prediction != nullptr;
    with_measure(call.measure, [&](auto measure) {
        parallel_for(blocks.count, call.place.threads, [&](int64_t b) {
            for (int64_t n = blocks.first(b); n < blocks.last(b); ++n) {
                int64_t prediction = -1;
                Real score = Real(__builtin_nan(""));
                stays[n] =
                    n < call.live && !gate_fires<decltype(measure)::value, S>(
                                         call, 0, n, patient ? call.previous_prediction[n] : -1,
                                         patient ? streak[n] : Real(0), prediction, score);
                call.prediction[n] = prediction;
                static_cast<Real *>(call.score)[n] = score;
            }
        });
    });
    partition(stays, call.rows, call.stay, call.count);
    arena().trim();
    return MSDKERN_OK;
}

}  // namespace MSDKERN_NAMESPACE
