// SPDX-License-Identifier: Apache-2.0
// A layout of lanes.h: rows are turned into columns, a vector of samples per class. Then sums and
// maxima over classes need nothing across lanes, and no lane is idle however few the classes.
#pragma once

#include "lanes.h"

namespace MSDKERN_NAMESPACE {

template <class S, class L>
class Columns {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    typedef typename Vector<Real>::Int I;
    typedef LaneGroup<S, L> Lane;
    static const int W = kLanes<Real>;
    static const int64_t kSpan = 32;  // classes that are added up before the sums are

    const L &loss;
    const msdkern_loss &call;
    Real *const kept;

    // Classes of row r, a vector of samples each: z and, in its place, the gradient; e; e at 1.
    static int64_t array_size(const L &l) { return apart<Real>(l.classes * W); }
    static int64_t row_size(const L &l) { return (1 + l.arrays()) * array_size(l); }
    Real *z_of(int r) const { return kept + r * row_size(loss); }
    Real *e_of(int r) const { return z_of(r) + array_size(loss); }
    Real *one_of(int r) const { return e_of(r) + (loss.arrays() - 1) * array_size(loss); }

 public:
    static size_t bytes(const L &l) { return size_t(l.rows * row_size(l)) * sizeof(Real); }
    Columns(const L &l, void *memory, Real *)
        : loss(l), call(l.call), kept(static_cast<Real *>(memory)) {}

    // Lanes without a sample repeat the last.
    void softmaxes(const Lane &x, int64_t first, int count, int64_t) const {
        for (int r = 0; r < loss.rows; ++r) softmax(x.g, r, read(r, first, count));
    }
    // Blocks of W classes, each of which is turned back into rows while it is at hand.
    void sweep(Lane &x, int64_t first, int count) const {
        Sweep<Real, V> &s = x.s;
        for (int64_t c = 0; c < loss.classes; c += W) {
            const int classes = int(least<int64_t>(W, loss.classes - c));
            for (int r = 0; r < loss.rows; ++r) {
                s.z[r] = z_of(r) + c * W;
                s.e[r] = e_of(r) + c * W;
                if (r >= loss.exits) continue;
                s.one[r] = one_of(r) + c * W;
                s.out[r] = call.gradient[r] ? z_of(r) + c * W : nullptr;  // z has been read
            }
            loss.lane_student(s, classes * W);
            for (int k = 0; k < loss.exits; ++k)
                if (s.out[k]) write(k, first, count, c, classes);
        }
        if (loss.gradient) subtract_labels(x, first, count);
    }

 private:
    // The largest logit of each sample and its lowest class.
    struct Tops {
        V m = splat(Real(-__builtin_inf()));
        I at = I{}, here = I{};
        INLINE_MEMBER void add(V z) {
            at = z > m ? here : at;
            m = maximum(z, m);
            here += 1;
        }
    };
    // Row r of every sample; lanes without one repeat the last. Whole blocks of W classes: loads
    // and shuffles of one overlap with the comparisons of another.
    Tops read(int r, int64_t first, int count) const {
        Real *const to = z_of(r);
        const int64_t classes = loss.classes;
        const S *from[W];
        for (int lane = 0; lane < W; ++lane)
            from[lane] = loss.row_of(r, first + least(lane, count - 1));
        // What is read after the next row: of the next group's samples after the last.
        const int next = (r + 2) % loss.rows;
        const int64_t n = first + (r + 2) / loss.rows * count, step = call.stride[next];
        const S *const ahead = n + W <= call.rows ? loss.row_of(next, n) : nullptr;
        V v[W];
        Tops tops;
        int64_t c = 0;
        for (; c + W <= classes; c += W) {
            UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = load(from[lane] + c);
            if (ahead)
                UNROLL for (int lane = 0; lane < W; ++lane)
                    __builtin_prefetch(ahead + lane * step + c);
            transpose(v);
            UNROLL for (int i = 0; i < W; ++i) {
                store(to + (c + i) * W, v[i]);
                tops.add(v[i]);
            }
        }
        const int rest = int(classes - c);
        if (rest == 0) return tops;
        for (int lane = 0; lane < W; ++lane) v[lane] = load_partial(from[lane] + c, rest, Real(0));
        transpose(v);
        for (int i = 0; i < rest; ++i) {
            store(to + (c + i) * W, v[i]);
            tops.add(v[i]);
        }
        return tops;
    }

    void softmax(const Group<Real> &g, int r, const Tops &tops) const {
        const Real *const from = z_of(r);
        const V m = tops.m;
        const int first = g.at(0, r);
        store(g.maximum + first, m);
        for (int lane = 0; lane < W; ++lane) g.argmax[first + lane] = tops.at[lane];
        RowSums<V> sums = {};
        with_power(loss.power, [&](auto power) __attribute__((always_inline)) {
            for (int64_t c = 0; c < loss.classes; c += kSpan) {
                const int64_t count = least(kSpan, loss.classes - c);
                const RowStore<Real> out = {e_of(r) + c * W, one_of(r) + c * W};
                sums += exponentials<decltype(power)::value, true>(from + c * W, count * W, m,
                                                                   loss.rate, out);
            }
        });
        store(g.sum_t + first, sums.at_t);
        store(g.sum_one + first, sums.at_one);
    }
    void write(int k, int64_t first, int count, int64_t c, int classes) const {
        const Real *const from = z_of(k) + c * W;
        S *const to = loss.gradient_of(k, first) + c;
        const int64_t stride = loss.classes;
        V v[W];
        UNROLL for (int i = 0; i < W; ++i) v[i] = i < classes ? load(from + i * W) : V{};
        transpose(v);
        if (classes == W)
            for (int lane = 0; lane < count; ++lane) store(to + lane * stride, v[lane]);
        else
            for (int lane = 0; lane < count; ++lane)
                store_partial(to + lane * stride, classes, v[lane]);
    }
    // The label's share is subtracted in Real, before rounding to the storage dtype.
    void subtract_labels(const Lane &x, int64_t first, int count) const {
        if (!call.label) return;
        int lanes[W], counted = 0;
        int64_t labels[W];
        for (int lane = 0; lane < count; ++lane) {
            lanes[counted] = lane;
            labels[counted] = call.label[first + lane];
            counted += x.valid[lane] != 0;
        }
        for (int k = 0; k < loss.exits; ++k) {
            if (!call.gradient[k]) continue;
            const Real *const from = z_of(k);
            S *const to = loss.gradient_of(k, first);
            Real share[W];
            store(share, x.s.row[k].mass_scale);
            for (int i = 0; i < counted; ++i) {
                const Real left = from[labels[i] * W + lanes[i]] - share[lanes[i]];
                store_one(to + lanes[i] * loss.classes + labels[i], left);
            }
        }
    }
};

}  // namespace MSDKERN_NAMESPACE
