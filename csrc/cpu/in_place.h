// SPDX-License-Identifier: Apache-2.0
// A layout of lanes.h: rows stay as they are, a vector of classes of one sample at a time. What a
// sum over classes leaves in the lanes of a vector is folded for all samples together.
#pragma once

#include "lanes.h"

namespace MSDKERN_NAMESPACE {

template <class S, class L>
class InPlace {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    typedef LaneGroup<S, L> Lane;
    static const int W = kLanes<Real>;
    static const int kConstants = int(sizeof(RowConstants<Real>) / sizeof(Real));

    // [lanes][rows][arrays][stride] exponentials, so that the rows of a sample, which are swept
    // together, follow one another; what is to be folded, a vector per lane: two of the row at
    // hand, and [exits] values; and the constants of each sample's rows.
    const L &loss;
    const msdkern_loss &call;
    Real *const kept;
    V *const folds, *const values;
    Real *const constants;
    Sweep<Real> s;
    ShortRowTops<S> tops;  // of the first rows of samples from `pending` on
    int64_t pending = -1;

    static int64_t sample_size(const L &l) { return l.rows * l.arrays() * l.stride; }
    static int64_t constants_size(const L &l) {
        return (l.rows * kConstants + W - 1) / W * W;  // whole vectors
    }
    RowStore<Real> store_of(int lane, int r) const {
        Real *const at = kept + lane * sample_size(loss) + r * loss.arrays() * loss.stride;
        return {at, at + (loss.arrays() - 1) * loss.stride};
    }
    RowConstants<Real> *constants_of(int lane) const {
        return reinterpret_cast<RowConstants<Real> *>(constants + lane * constants_size(loss));
    }

 public:
    static size_t bytes(const L &l) {
        const int64_t vectors = (2 + l.exits) * W;
        return sizeof(Real) * size_t(W * (sample_size(l) + constants_size(l)) + vectors * W);
    }
    InPlace(const L &l, void *memory, Real *weight)
        : loss(l),
          call(l.call),
          kept(static_cast<Real *>(memory)),
          folds(reinterpret_cast<V *>(kept + W * sample_size(l))),
          values(folds + 2 * W),
          constants(reinterpret_cast<Real *>(values + l.exits * W)),
          s(l.power, l.rate) {
        loss.prepare(s, weight);
    }

    // Row after row, the same exit's of all samples: its exponentials, and beside them the maximum
    // of a row of the exit after it, so that memory is read at an even pace.
    void softmaxes(const Lane &x, int64_t first, int count, int64_t end) {
        if (pending != first)
            for (int n = 0; n < count; ++n) tops.add(n, loss.row_of(0, first + n), loss.classes);
        for (int r = 0; r < loss.rows; ++r) {
            const int at = x.g.at(0, r);
            Real *const maximum = x.g.maximum + at;
            tops.finish(count, loss.classes, maximum, x.g.argmax + at);
            const bool more = r + 1 < loss.rows;
            const int next = more ? r + 1 : 0;
            const int64_t from = more ? first : first + W;
            const int fetched = int(most<int64_t>(0, least<int64_t>(more ? count : W, end - from)));
            with_power(loss.power, [&](auto p) __attribute__((always_inline)) {
                for (int n = 0; n < count; ++n) {
                    const auto sums = exponentials<decltype(p)::value, true>(
                        loss.row_of(r, first + n), loss.classes, maximum[n], loss.rate,
                        store_of(n, r));
                    folds[n] = sums.at_t;
                    folds[W + n] = sums.at_one;
                    if (n < fetched) tops.add(n, loss.row_of(next, from + n), loss.classes);
                    fetch(r + 2, first + n, count);
                }
            });
            pending = from;
            fold_rows(folds, count, Add(), x.g.sum_t + at);
            fold_rows(folds + W, count, Add(), x.g.sum_one + at);
            for (int n = count; n < W; ++n) {
                maximum[n] = 0;
                x.g.sum_t[at + n] = x.g.sum_one[at + n] = 1;
            }
        }
    }

    void sweep(Lane &x, int64_t first, int count) {
        spread(x.s.row);
        for (int n = 0; n < count; ++n) {
            s.row = constants_of(n);
            s.values = values + n;
            if (x.valid[n] != 0)
                sweep(n, first + n);
            else
                for (int k = 0; k < loss.exits; ++k) values[k * W + n] = V{};
        }
        if (!loss.divergent) return;
        for (int k = 0; k < loss.exits; ++k) {
            Real folded[W] = {};
            fold_rows(values + k * W, count, Add(), folded);
            x.s.value[k] = x.s.share[k] * load(folded);
        }
    }

 private:
    // Asks for row r of sample n; beyond the last row, for the first ones of the next group.
    INLINE_MEMBER void fetch(int r, int64_t n, int count) const {
        const int64_t line = 64 / int64_t(sizeof(S));
        n += r / loss.rows * count;
        if (n >= call.rows) return;
        const S *const row = loss.row_of(r % loss.rows, n);
        for (int64_t c = 0; c < loss.classes; c += line) __builtin_prefetch(row + c);
    }
    // From vectors of samples to what is known of each sample's rows.
    void spread(const RowConstants<V> *rows) const {
        const V *const from = reinterpret_cast<const V *>(rows);
        const int all = loss.rows * kConstants;
        for (int i = 0; i < all; i += W) {
            V v[W];
            UNROLL for (int j = 0; j < W; ++j) v[j] = i + j < all ? from[i + j] : V{};
            transpose(v);
            UNROLL for (int n = 0; n < W; ++n)
                store(constants + n * constants_size(loss) + i, v[n]);
        }
    }
    // Points a sweep at the classes of sample n, in lane `lane`, from `begin` on.
    void aim(int lane, int64_t n, int64_t begin) {
        for (int r = 0; r < loss.rows; ++r) {
            const RowStore<Real> kept_of = store_of(lane, r) + begin;
            s.z[r] = loss.row_of(r, n) + begin;
            s.e[r] = kept_of.e;
            if (r >= loss.exits) continue;
            s.one[r] = kept_of.one;
            s.out[r] = call.gradient[r] ? loss.gradient_of(r, n) + begin : nullptr;
        }
    }
    void sweep(int lane, int64_t n) {
        aim(lane, n, 0);
        loss.student(s, loss.classes);
        if (!loss.gradient || !call.label) return;
        if (sizeof(S) == sizeof(Real))
            loss.subtract_in_row(n, s.row);
        else
            subtract_rounded(lane, n, call.label[n]);
    }
    // Before the gradient is rounded: by the sweep once more, over the vector that has the label.
    void subtract_rounded(int lane, int64_t n, int64_t label) {
        const int64_t begin = label / W * W;
        Real mass[W] = {};
        mass[label - begin] = 1;
        V unused[MSDKERN_MAX_EXITS * W];
        s.mass = mass;
        s.values = unused;
        aim(lane, n, begin);
        loss.labelled(s, least<int64_t>(W, loss.classes - begin));
        s.mass = nullptr;
        s.values = nullptr;
    }
};

}  // namespace MSDKERN_NAMESPACE
