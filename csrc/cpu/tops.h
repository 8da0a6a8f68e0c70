// SPDX-License-Identifier: Apache-2.0
// Where a row is largest: its maximum and the lowest class that has it.
#pragma once

#include "storage.h"

namespace MSDKERN_NAMESPACE {

template <class T>
INLINE T least(T a, T b) {
    return a < b ? a : b;
}
template <class T>
INLINE T most(T a, T b) {
    return a > b ? a : b;
}

// What `op` makes of the lanes of each of n vectors; they are overwritten, up to whole vectors of
// vectors.
template <class Real, class Op>
INLINE void fold_rows(VecOf<Real> *rows, int n, Op op, Real *out) {
    const int W = kLanes<Real>;
    for (int i = 0; i < n; i += W) {
        const VecOf<Real> folded = fold(rows + i, op);
        i + W <= n ? store(out + i, folded) : store_partial(out + i, n - i, folded);
    }
}

// f(offset, load) over whole vectors, then over the remainder filled up with `fill`.
template <class S, class F>
INLINE void for_vectors(const S *row, int64_t classes, typename Kind<S>::Real fill, F f) {
    const int W = kLanes<typename Kind<S>::Real>;
    int64_t c = 0;
    for (; c + W <= classes; c += W) f(c, load(row + c));
    if (c < classes) f(c, load_partial(row + c, int(classes - c), fill));
}

// The largest logit of a row, lane by lane; NaN is passed over.
template <class S>
INLINE StoredIn<S> lane_maxima(const S *row, int64_t classes) {
    typedef RealOf<S> Real;
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    const V lowest = splat(Real(-__builtin_inf()));
    V m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
    int64_t c = 0;
    for (; c + 4 * W <= classes; c += 4 * W) {
        m0 = maximum(load(row + c), m0);
        m1 = maximum(load(row + c + W), m1);
        m2 = maximum(load(row + c + 2 * W), m2);
        m3 = maximum(load(row + c + 3 * W), m3);
    }
    for_vectors(row + c, classes - c, Real(-__builtin_inf()),
                [&](int64_t, V z) __attribute__((always_inline)) { m0 = maximum(z, m0); });
    return maximum(maximum(m0, m1), maximum(m2, m3));
}

template <class S>
INLINE RealOf<S> row_maximum(const S *row, int64_t classes) {
    return largest<RealOf<S>>(lane_maxima(row, classes));
}

// The first class for which test(z) holds, or `classes`.
template <class S, class Test>
INLINE int64_t first_class(const S *row, int64_t classes, Test test) {
    typedef typename Kind<S>::Real Real;
    const int W = kLanes<Real>;
    const Real nothing = Real(-__builtin_inf());
    int64_t c = 0;
    // Four vectors at a time: most hold no hit, and asking is what costs.
    for (; c + 4 * W <= classes; c += 4 * W)
        if (any((test(load(row + c)) | test(load(row + c + W))) |
                (test(load(row + c + 2 * W)) | test(load(row + c + 3 * W)))))
            break;
    for (; c < classes; c += W) {
        const int n = int(least<int64_t>(W, classes - c));
        const int lane = first_lane((typename Vector<Real>::Int)test(
            n == W ? load(row + c) : load_partial(row + c, n, nothing)));
        if (lane >= 0) return c + lane;
    }
    return classes;
}

// torch.argmax answers with the first NaN where there is one. A row whose sums are NaN need not
// hold any: an infinite logit makes them so.
template <class S>
static int64_t first_nan(const S *row, int64_t classes, int64_t otherwise) {
    typedef VecOf<typename Kind<S>::Real> V;
    const int64_t c =
        first_class(row, classes, [](V z) __attribute__((always_inline)) { return z != z; });
    return c < classes ? c : otherwise;
}

// The lowest index of the maximum m.
template <class S, class Real>
static int64_t row_argmax(const S *row, int64_t classes, Real m) {
    typedef VecOf<Real> V;
    const int64_t c =
        first_class(row, classes, [m](V z) __attribute__((always_inline)) { return z == m; });
    return c < classes ? c : 0;  // -inf in every class: padding may answer first
}

// The largest logit and its lowest class in one pass; NaN is passed over, and where there is no
// other value the class is 0.
template <class Real>
struct Top {
    Real maximum;
    int64_t argmax;
};
// Four vectors make a piece of the row whose place is noted: more cost less on the way, and more to
// find the class in the end.
template <class S>
INLINE Top<typename Kind<S>::Real> row_top(const S *row, int64_t classes) {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    typedef typename Vector<Real>::Int I;
    const int W = kLanes<Real>, P = 4, kPiece = P * W;
    const Real lowest = Real(-__builtin_inf());
    V best = splat(lowest);
    I at = I{}, here = I{};  // where the piece of the row begins that holds a lane's maximum
    auto add = [&](V z, int step) __attribute__((always_inline)) {
        at = z > best ? here : at;
        best = maximum(z, best);
        here += step;
    };
    int64_t c = 0;
    for (; c + kPiece <= classes; c += kPiece) {
        V z = load(row + c);
        for (int v = 1; v < P; ++v) z = maximum(load(row + c + v * W), z);
        add(z, kPiece);
    }
    for_vectors(row + c, classes - c, lowest,
                [&](int64_t, V z) __attribute__((always_inline)) { add(z, W); });
    const Real m = largest<Real>(best);
    int64_t first = classes;
    typename Vector<Real>::Lane begins[kLanes<Real>];
    write(begins, at);
    for (unsigned lanes = lanes_equal(best, m); lanes; lanes &= lanes - 1)
        first = least<int64_t>(first, begins[__builtin_ctz(lanes)]);
    uint64_t hits = 0;
    for (int v = 0; v < P && first + v * W < classes; ++v) {
        const int n = int(least<int64_t>(W, classes - first - v * W));
        const S *part = row + first + v * W;
        const V z = n == W ? load(part) : load_partial(part, n, lowest);
        hits |= uint64_t(lanes_equal(z, m)) << (v * W);
    }
    return {m, hits ? first + __builtin_ctzll(hits) : 0};
}

// The same of W rows of few classes at once, without branches: a row at a time is added, and what
// its lanes hold is folded for all of them together.
template <class S>
struct ShortRowTops {
    typedef RealOf<S> Real;
    typedef VecOf<Real> V;
    static const int W = kLanes<Real>;
    V best[W], place[W];
    INLINE_MEMBER void add(int i, const S *row, int64_t classes) {
        const Real lowest = Real(-__builtin_inf());
        V m = splat(lowest), at = V{}, here = lane_numbers<Real>();
        for_vectors(row, classes, lowest, [&](int64_t, V z) __attribute__((always_inline)) {
            at = z > m ? here : at;
            m = maximum(z, m);
            here += Real(W);
        });
        best[i] = m;
        place[i] = at;
    }
    // Of the first n rows.
    INLINE_MEMBER void finish(int n, int64_t classes, Real *maxima, int64_t *argmax) {
        V folded[W];
        for (int i = 0; i < n; ++i) folded[i] = best[i];
        fold_rows(folded, n, Largest(), maxima);
        const V nowhere = splat(Real(classes));
        for (int i = 0; i < n; ++i) place[i] = best[i] == maxima[i] ? place[i] : nowhere;
        Real classes_of[W];
        fold_rows(place, n, Smallest(), classes_of);
        for (int i = 0; i < n; ++i)
            argmax[i] = classes_of[i] < Real(classes) ? int64_t(classes_of[i]) : 0;
    }
};
// row_of(i) is the i-th of n.
template <class S, class Real, class RowOf>
INLINE void short_row_tops(int n, int64_t classes, RowOf row_of, Real *maxima, int64_t *argmax) {
    ShortRowTops<S> tops;
    for (int i = 0; i < n; ++i) tops.add(i, row_of(i), classes);
    tops.finish(n, classes, maxima, argmax);
}

}  // namespace MSDKERN_NAMESPACE
