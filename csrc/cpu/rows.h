// SPDX-License-Identifier: Apache-2.0
// What every kernel shares: blocks of rows over threads, scratch memory, and the exponentials of a
// row.
#pragma once

#include <stdlib.h>

#include "functions.h"
#include "tops.h"

#include "../math.h"  // after functions.h: it needs weigh() and logarithm()

namespace MSDKERN_NAMESPACE {

constexpr int64_t kMostSamples = 16;  // that are worked on together, in lanes or one by one

// Rows are handed out in blocks whose size depends on the shape alone, and partial sums are kept
// per block: the result does not depend on the number of threads.
struct Blocks {
    int64_t rows, size, count;
    Blocks(int64_t rows_, int64_t elements_per_row) : rows(rows_) {
        const int64_t elements = 16384;  // enough work to be worth handing out
        size = most<int64_t>(1, elements / most<int64_t>(1, elements_per_row));
        if (size > kMostSamples) size -= size % kMostSamples;  // whole groups
        count = (rows + size - 1) / size;
    }
    int64_t first(int64_t block) const { return block * size; }
    int64_t last(int64_t block) const { return least(rows, (block + 1) * size); }
};

template <class Body>
static void parallel_for(int64_t count, int threads, const Body &body) {
    threads = int(least<int64_t>(threads, count));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) body(i);
}

// Each thread's scratch memory, kept between calls while it is small: nothing is allocated per
// row, and usually nothing per call.
struct Arena {
    static const size_t kKept = size_t(16) << 20;
    void *data = nullptr;
    size_t size = 0;
    void *take(size_t wanted) {
        if (wanted <= size) return data;
        free(data);
        size = (wanted + 4095) / 4096 * 4096;
        data = aligned_alloc(64, size);
        if (!data) size = 0;
        return data;
    }
    void trim() {
        if (size <= kKept) return;
        free(data);
        data = nullptr;
        size = 0;
    }
    ~Arena() { free(data); }
};

static Arena &arena() {
    static thread_local Arena memory;
    return memory;
}

// Elements per scratch row: whole cache lines, an odd number of them, so that the rows of one
// sample do not all fall into the same cache sets.
template <class Real>
INLINE int64_t padded(int64_t classes) {
    const int64_t line = 64 / int64_t(sizeof(Real));
    return (((classes + line - 1) / line) | 1) * line;
}

// At least `size` elements: from array to array that are worked on side by side. Their addresses
// differ by 39/64 of a page, the golden section, so that of a few dozen no two come near each other
// within pages: a load waits for a store just before it if their places in a page are the same.
template <class Real>
INLINE int64_t apart(int64_t size) {
    const int64_t page = 4096 / int64_t(sizeof(Real)), step = page / 64 * 39;
    return (size - step + page - 1) / page * page + step;
}

// How the exponentials at T = 1 follow from those at T: e^(z - m) = (e^((z - m) / T))^T.
enum class Powers { kNone = 0, kOne = 1, kTwo = 2, kThree = 3, kFour = 4 };

INLINE Powers powers(double temperature) {
    return temperature == 1 || temperature == 2 || temperature == 3 || temperature == 4
               ? Powers(int(temperature))
               : Powers::kNone;
}

// e(z - m) = e^T from e = exp((z - m) / T); where it is no such power, what was given.
template <class V>
INLINE V raised(Powers p, V e) {
    if (p == Powers::kOne || p == Powers::kNone) return e;
    const V squared = e * e;
    if (p == Powers::kTwo) return squared;
    return squared * (p == Powers::kThree ? e : squared);
}

template <Powers P>
struct Power {
    static constexpr Powers value = P;
    INLINE_MEMBER constexpr operator Powers() const { return P; }
};

// f(the same as a constant of the compiler).
template <class F>
INLINE void with_power(Powers p, F f) {
    switch (p) {
        case Powers::kOne:
            return f(Power<Powers::kOne>());
        case Powers::kTwo:
            return f(Power<Powers::kTwo>());
        case Powers::kThree:
            return f(Power<Powers::kThree>());
        case Powers::kFour:
            return f(Power<Powers::kFour>());
        default:
            return f(Power<Powers::kNone>());
    }
}

// Where the exponentials of a row are kept; `one` only where they are no powers of e.
template <class Real>
struct RowStore {
    Real *e, *one;  // exp((z - m) / T), exp(z - m)
    RowStore operator+(int64_t classes) const { return {e + classes, one + classes}; }
};

template <class V>
struct RowSums {
    V at_t, at_one;  // sums of exponentials, lane by lane
    INLINE_MEMBER void operator+=(const RowSums &more) {
        at_t += more.at_t;
        at_one += more.at_one;
    }
};

// What a sum over vectors of classes comes to for each sample: a number; or the vector itself,
// where the lanes are samples.
INLINE float per_sample(VecF v, float) { return sum<float>(v); }
INLINE double per_sample(VecD v, double) { return sum<double>(v); }
template <class V>
INLINE V per_sample(V v, V) {
    return v;
}

// One sweep over a row: exponentials stored where asked for, their sums returned. The padding up
// to a whole vector is 0 and adds nothing anywhere.
template <Powers P, bool Store, class S, class Num, class Real>
INLINE RowSums<VecOf<Real>> exponentials(const S *row, int64_t classes, Num m, Rate<Real> rate,
                                         RowStore<Real> out) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    V t0 = V{}, t1 = V{}, o0 = V{}, o1 = V{};
    auto one = [&](int64_t c, V z, V &t, V &o) __attribute__((always_inline)) {
        const V e = exponential(z - m, rate);
        const V p = P == Powers::kNone ? exponential(z - m) : raised(P, e);
        if (Store) {
            store(out.e + c, e);
            if (P == Powers::kNone) store(out.one + c, p);
        }
        t += e;
        if (P != Powers::kOne) o += p;
    };
    int64_t c = 0;
    for (; c + 2 * W <= classes; c += 2 * W) {
        one(c, load(row + c), t0, o0);
        one(c + W, load(row + c + W), t1, o1);
    }
    if (c + W <= classes) {
        one(c, load(row + c), t0, o0);
        c += W;
    }
    if (c < classes)
        one(c, load_partial(row + c, int(classes - c), Real(-__builtin_inf())), t1, o1);
    return {t0 + t1, P == Powers::kOne ? t0 + t1 : o0 + o1};
}

// The same strip by strip, while what will be read after it, as many classes at `next`, is fetched.
template <Powers P, bool Store, class S, class Real>
INLINE RowSums<VecOf<Real>> strips(const S *row, int64_t classes, Real m, Rate<Real> rate,
                                   RowStore<Real> out, const S *next) {
    const int64_t kStrip = 1024 / int64_t(sizeof(S));
    RowSums<VecOf<Real>> total = {};
    for (int64_t c = 0; c < classes; c += kStrip) {
        for (int64_t i = 0; i < kStrip; i += 64 / int64_t(sizeof(S)))
            __builtin_prefetch(next + c + i);
        total += exponentials<P, Store>(row + c, least(kStrip, classes - c), m, rate,
                                        Store ? out + c : out);
    }
    return total;
}

// The same without keeping anything, and the maximum, in one read of a long row from memory: piece
// by piece, each of which stays in the innermost cache for its exponentials. Sums relative to an
// earlier maximum are rescaled when a larger one appears.
template <Powers P, class S, class Real>
INLINE RowSums<VecOf<Real>> read_once(const S *row, int64_t classes, Rate<Real> rate,
                                      Top<Real> &top) {
    typedef VecOf<Real> V;
    const int64_t kPiece = 16384 / int64_t(sizeof(S));
    const Real lowest = Real(-__builtin_inf());
    RowSums<V> total = {};
    top = {lowest, 0};
    for (int64_t begin = 0; begin < classes; begin += kPiece) {
        const S *piece = row + begin;
        const int64_t count = least(kPiece, classes - begin);
        const Top<Real> here = row_top(piece, count);
        if (here.maximum > top.maximum) {
            const V gap = splat(top.maximum - here.maximum), e = exponential(gap, rate);
            total.at_t *= e;
            total.at_one *= P == Powers::kNone ? exponential(gap) : raised(P, e);
            top = {here.maximum, begin + here.argmax};
        }
        // 0 while every class is masked by -inf, so that only NaN makes NaN.
        const Real m = top.maximum > lowest ? top.maximum : Real(0);
        total += strips<P, false>(piece, count, m, rate, RowStore<Real>(), piece + kPiece);
    }
    const V infinite = splat(top.maximum - top.maximum);  // NaN where there is no softmax, else 0
    total += {infinite, infinite};
    return total;
}

// logarithm() of n values in place.
template <class Real>
INLINE void logarithms(Real *values, int n) {
    const int W = kLanes<Real>;
    int i = 0;
    for (; i + W <= n; i += W) store(values + i, logarithm(load(values + i)));
    if (i < n)
        store_partial(values + i, n - i, logarithm(load_partial(values + i, n - i, Real(1))));
}

}  // namespace MSDKERN_NAMESPACE
