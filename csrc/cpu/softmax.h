// SPDX-License-Identifier: Apache-2.0
// softmax(z / T) or its logarithm for all exits, and its backward.
#pragma once

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// y(c) from x(c), where x are `inputs` rows of storage type S, over one row.
template <int kInputs, class S, class F>
INLINE void map_row(const S *const (&inputs)[kInputs], S *output, int64_t classes, F f) {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    V x[kInputs];
    int64_t c = 0;
    for (; c + W <= classes; c += W) {
        for (int i = 0; i < kInputs; ++i) x[i] = load(inputs[i] + c);
        store(output + c, f(x));
    }
    if (c == classes) return;
    const int n = int(classes - c);
    for (int i = 0; i < kInputs; ++i) x[i] = load_partial(inputs[i] + c, n, Real(0));
    store_partial(output + c, n, f(x));
}

template <class S>
static void softmax_row(const S *row, S *output, int64_t classes, double temperature, bool log) {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    const Rate<Real> rate(temperature);
    const Real inverse_t = Real(1 / temperature);
    const Real m = row_maximum(row, classes);
    V sums = V{};
    for_vectors(row, classes, Real(-__builtin_inf()),
                [&](int64_t, V z)
                    __attribute__((always_inline)) { sums += exponential(z - m, rate); });
    const Real total = sum<Real>(sums);
    const S *const inputs[1] = {row};
    if (log) {
        Real log_total = total;
        logarithms(&log_total, 1);
        map_row(inputs, output, classes, [&](const V *x) __attribute__((always_inline)) {
            return (x[0] - m) * inverse_t - log_total;
        });
    } else {
        const Real inverse = 1 / total;
        map_row(inputs, output, classes, [&](const V *x) __attribute__((always_inline)) {
            return exponential(x[0] - m, rate) * inverse;
        });
    }
}

// softmax: p (g - sum_c g p) / T. log_softmax: (g - p sum_c g) / T.
template <class S>
static void softmax_backward_row(const S *y, const S *g, S *output, int64_t classes,
                                 typename Kind<S>::Real inverse_t, bool log) {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    V sums = V{};
    const int W = kLanes<Real>;
    for (int64_t c = 0; c < classes; c += W) {
        const int n = int(least<int64_t>(W, classes - c));
        const V g_c = n == W ? load(g + c) : load_partial(g + c, n, Real(0));
        const V y_c = n == W ? load(y + c) : load_partial(y + c, n, Real(0));
        sums += log ? g_c : g_c * y_c;
    }
    const Real total = sum<Real>(sums);
    const S *const inputs[2] = {y, g};
    if (log)
        map_row(inputs, output, classes, [&](const V *x) __attribute__((always_inline)) {
            return (x[1] - exponential(x[0]) * total) * inverse_t;
        });
    else
        map_row(inputs, output, classes, [&](const V *x) __attribute__((always_inline)) {
            return x[0] * (x[1] - total) * inverse_t;
        });
}

template <class S>
static int run_softmax(const msdkern_softmax &call, bool backward) {
    typedef typename Kind<S>::Real Real;
    const Blocks blocks(call.rows * call.exits, call.classes);
    const Real inverse_t = Real(1 / call.temperature);
    parallel_for(blocks.count, call.place.threads, [&](int64_t b) {
        for (int64_t i = blocks.first(b); i < blocks.last(b); ++i) {
            const int k = int(i / call.rows);
            const int64_t n = i % call.rows;
            const S *input = static_cast<const S *>(call.input[k]) + n * call.stride[k];
            S *output = static_cast<S *>(call.output[k]) + n * call.classes;
            if (!backward) {
                softmax_row(input, output, call.classes, call.temperature, call.log != 0);
                continue;
            }
            const S *g = static_cast<const S *>(call.upstream[k]) + n * call.upstream_stride[k];
            softmax_backward_row(input, g, output, call.classes, inverse_t, call.log != 0);
        }
    });
    return MSDKERN_OK;
}

template <class S>
static int run_scale(const msdkern_scale &call) {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    if (call.factor == 1) return MSDKERN_OK;
    const Real factor = Real(call.factor);
    for (int t = 0; t < call.tensors; ++t) {
        S *data = static_cast<S *>(call.data[t]);
        const int64_t step = 16384;
        parallel_for((call.size[t] + step - 1) / step, call.place.threads, [&](int64_t b) {
            S *part = data + b * step;
            const S *const inputs[1] = {part};
            map_row(inputs, part, least(step, call.size[t] - b * step),
                    [&](const V *x) __attribute__((always_inline)) { return x[0] * factor; });
        });
    }
    return MSDKERN_OK;
}

}  // namespace MSDKERN_NAMESPACE
