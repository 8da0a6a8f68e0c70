// SPDX-License-Identifier: Apache-2.0
// softmax(z / T) or its logarithm for all exits, and its backward.
#pragma once

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// f(offset, part) over a row: whole vectors, then the first lanes of one.
template <class S, class F>
INLINE void write_row(S *to, int64_t classes, F f) {
    const int W = kLanes<RealOf<S>>;
    int64_t c = 0;
    for (; c + W <= classes; c += W) store(to + c, f(c, Whole()));
    const int rest = int(classes - c);
    if (rest) store_partial(to + c, rest, f(c, First{rest}));
}

// Rows of a block, a few at a time where they are short: what is to be folded is folded for all of
// them together, and no row waits for the one before it.
template <class S>
class Softmax {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    static const int W = kLanes<Real>;
    static const int64_t kGroupBytes = 16 << 10, kKeptBytes = 32 << 10;  // of exponentials

    const msdkern_softmax &call;
    const Rate<Real> rate;
    const Real inverse_t;
    const int64_t classes, stride;

    struct Rows {
        int count;
        const S *in[W], *upstream[W];
        S *out[W];
    };
    Rows rows(int64_t first, int count) const {
        Rows r = {};
        r.count = count;
        for (int i = 0; i < count; ++i) {
            const int64_t k = (first + i) / call.rows, n = (first + i) % call.rows;
            r.in[i] = static_cast<const S *>(call.input[k]) + n * call.stride[k];
            r.out[i] = static_cast<S *>(call.output[k]) + n * classes;
            if (call.upstream[k])
                r.upstream[i] =
                    static_cast<const S *>(call.upstream[k]) + n * call.upstream_stride[k];
        }
        return r;
    }
    int64_t row_bytes() const { return stride * int64_t(sizeof(Real)); }
    bool kept() const { return !call.log && row_bytes() <= kKeptBytes; }

 public:
    explicit Softmax(const msdkern_softmax &c)
        : call(c),
          rate(c.temperature),
          inverse_t(Real(1 / c.temperature)),
          classes(c.classes),
          stride(padded<Real>(c.classes)) {}

    // False where there is no memory to work in.
    bool block(int64_t first, int64_t last, bool backward) const {
        const int64_t group = most<int64_t>(1, least<int64_t>(W, kGroupBytes / row_bytes()));
        Real *const scratch = backward || !kept()
                                  ? nullptr
                                  : static_cast<Real *>(arena().take(size_t(group * row_bytes())));
        if (!scratch && !backward && kept()) return false;
        for (int64_t i = first; i < last; i += group) {
            const Rows r = rows(i, int(least(group, last - i)));
            if (backward)
                call.log ? gradients<true>(r) : gradients<false>(r);
            else
                call.log ? logarithms_of(r) : probabilities(r, scratch);
        }
        return true;
    }

 private:
    // The maximum of every row and the sum of its exponentials, which are kept where there is
    // scratch memory.
    void sums(const Rows &r, Real *maxima, Real *totals, Real *scratch) const {
        V folds[W];
        for (int i = 0; i < r.count; ++i) folds[i] = lane_maxima(r.in[i], classes);
        fold_rows(folds, r.count, Largest(), maxima);
        for (int i = 0; i < r.count; ++i)
            folds[i] = scratch ? row_sums<true>(r.in[i], maxima[i], scratch + i * stride)
                               : row_sums<false>(r.in[i], maxima[i], nullptr);
        fold_rows(folds, r.count, Add(), totals);
    }
    template <bool kStore>
    INLINE_MEMBER V row_sums(const S *row, Real m, Real *e) const {
        return exponentials<Powers::kOne, kStore>(row, classes, m, rate, RowStore<Real>{e, e}).at_t;
    }
    void probabilities(const Rows &r, Real *scratch) const {
        Real maxima[W], totals[W];
        sums(r, maxima, totals, scratch);
        for (int i = 0; i < r.count; ++i) {
            const Real inverse = 1 / totals[i], m = maxima[i];
            if (scratch) {
                const Real *const e = scratch + i * stride;
                write_row(r.out[i], classes, [&](int64_t c, auto) __attribute__((always_inline)) {
                    return load(e + c) * inverse;
                });
            } else {
                write_row(r.out[i], classes,
                          [&](int64_t c, auto part) __attribute__((always_inline)) {
                              return exponential(load_some(r.in[i] + c, part) - m, rate) * inverse;
                          });
            }
        }
    }
    void logarithms_of(const Rows &r) const {
        Real maxima[W], totals[W];
        sums(r, maxima, totals, nullptr);
        logarithms(totals, r.count);
        for (int i = 0; i < r.count; ++i) {
            const Real m = maxima[i], log_total = totals[i];
            write_row(r.out[i], classes, [&](int64_t c, auto part) __attribute__((always_inline)) {
                return (load_some(r.in[i] + c, part) - m) * inverse_t - log_total;
            });
        }
    }
    // softmax: p (g - sum_c g p) / T. log_softmax: (g - p sum_c g) / T.
    template <bool kLog>
    void gradients(const Rows &r) const {
        for (int i = 0; i < r.count; ++i) {
            const S *const y = r.in[i], *const g = r.upstream[i];
            const Real total = sum<Real>(products<kLog>(y, g));
            write_row(r.out[i], classes, [&](int64_t c, auto part) __attribute__((always_inline)) {
                const V upstream = load_some(g + c, part), output = load_some(y + c, part);
                return (kLog ? upstream - exponential(output) * total
                             : output * (upstream - total)) *
                       inverse_t;
            });
        }
    }
    // What the upstream gradients are less by, lane by lane: two sums, so that additions do not
    // wait for each other.
    template <bool kLog>
    INLINE_MEMBER V products(const S *y, const S *g) const {
        V sum0 = V{}, sum1 = V{};
        const auto term = [&](int64_t c, auto part) __attribute__((always_inline)) {
            const V upstream = load_some(g + c, part);
            return kLog ? upstream : upstream * load_some(y + c, part);
        };
        int64_t c = 0;
        for (; c + 2 * W <= classes; c += 2 * W) {
            sum0 += term(c, Whole());
            sum1 += term(c + W, Whole());
        }
        if (c + W <= classes) {
            sum0 += term(c, Whole());
            c += W;
        }
        if (c < classes) sum1 += term(c, First{int(classes - c)});
        return sum0 + sum1;
    }
};

template <class S>
static int run_softmax(const msdkern_softmax &call, bool backward) {
    const Blocks blocks(call.rows * call.exits, call.classes);
    const Softmax<S> softmax(call);
    int failed = 0;
    parallel_for(blocks.count, call.place.threads, [&](int64_t b) {
        if (!softmax.block(blocks.first(b), blocks.last(b), backward))
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    });
    return failed ? MSDKERN_NO_MEMORY : MSDKERN_OK;
}

template <class S>
static int run_scale(const msdkern_scale &call) {
    typedef typename Kind<S>::Real Real;
    if (call.factor == 1) return MSDKERN_OK;
    const Real factor = Real(call.factor);
    for (int t = 0; t < call.tensors; ++t) {
        S *data = static_cast<S *>(call.data[t]);
        const int64_t step = 16384;
        parallel_for((call.size[t] + step - 1) / step, call.place.threads, [&](int64_t b) {
            S *const part = data + b * step;
            write_row(part, least(step, call.size[t] - b * step),
                      [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                          return load_some(part + i, lanes) * factor;
                      });
        });
    }
    return MSDKERN_OK;
}

}  // namespace MSDKERN_NAMESPACE
