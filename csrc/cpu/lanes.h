// SPDX-License-Identifier: Apache-2.0
// Few classes: as many samples at once as a vector has lanes, one sample per lane. Rows are turned
// into columns, so that sums and maxima over classes need nothing across lanes, and what belongs to
// a row (logarithms, scales) is worked out for all samples together. Forward KL and soft cross
// entropy with detached teachers, and cross entropy alone; everything else goes row by row.
#pragma once

#include "general.h"
#include "group.h"

namespace MSDKERN_NAMESPACE {

// L is the Loss<S> of loss.h, which knows the call.
template <class S, class L>
class Lanes {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    typedef typename Vector<Real>::Int I;
    static const int W = kLanes<Real>;
    static const int64_t kSpan = 32;  // classes that are added up before the sums are

    const L &loss;
    const msdkern_loss &call;
    const Group<Real> g;
    Real *const kept;
    Sweep<Real, V> s;

    // Classes of row r, a vector of samples each: x and, in its place, the gradient; e; e at 1.
    static int64_t row_size(const L &l) { return l.arrays() * l.classes * W; }
    Real *x_of(int r) const { return kept + r * row_size(loss); }
    Real *e_of(int r) const { return x_of(r) + loss.classes * W; }
    Real *one_of(int r) const { return e_of(r) + (loss.arrays() - 2) * loss.classes * W; }

 public:
    // Scratch memory: what a group's rows take, and their scalars.
    static size_t bytes(const L &l) {
        return size_t(l.rows * row_size(l)) * sizeof(Real) + Group<Real>::bytes(l.rows * W);
    }
    // Where it is the faster way, as measured.
    static bool fit(int64_t rows, int64_t classes) {
        return classes <= 64 && rows * classes * W * int64_t(sizeof(Real)) * 3 <= (256 << 10);
    }

    Lanes(const L &l, void *memory, Real *weight)
        : loss(l),
          call(l.call),
          g(static_cast<Real *>(memory) + l.rows * row_size(l), l.rows * W, 1, W),
          kept(static_cast<Real *>(memory)) {
        s.exits = loss.exits;
        s.rows = loss.rows;
        s.pairs = call.pairs;
        s.weight = weight;
        s.matrix = nullptr;
        s.mass = nullptr;
        // The group's arrays are [rows][lanes] and aligned: vectors of samples.
        s.log_t = vectors(g.log_t);
        s.inverse_t = vectors(g.inverse_t);
        s.gap = vectors(g.gap);
        s.slack = vectors(g.slack);
        pair_weights(call, s, weight);
        if (call.pairs == MSDKERN_PAIRS_DENSE) dense_weights(call, s, weight, 0);
    }

    // Samples first to last, W of them at most. Those that must go row by row are left: a bit each.
    unsigned group(int64_t first, int64_t last, typename L::Partials *partial) {
        const int count = int(last - first);
        for (int r = 0; r < loss.rows; ++r) {
            read(r, first, count);
            softmax(r);
        }
        if (loss.divergent) normalize_at_t(g, W, loss.rows, loss.exits);
        normalize_at_one(g, W * loss.rows);
        Real ce[MSDKERN_MAX_EXITS][W];
        scales(first, count, ce);
        sweep();
        if (loss.divergent) correct_values(s, call.divergence);
        const unsigned left = record(first, count, ce, partial);
        if (loss.gradient) write_gradients(first, count);
        for (int64_t n = first; n < last; ++n)
            if (ignored(n)) loss.leave_out(n);
        return left;
    }

 private:
    static const V *vectors(const Real *p) { return reinterpret_cast<const V *>(p); }
    bool ignored(int64_t n) const { return loss.targets.ignored(n); }

    // Row r of every sample; lanes without one repeat the last.
    void read(int r, int64_t first, int count) const {
        Real *const to = x_of(r);
        for (int64_t c = 0; c < loss.classes; c += W) {
            const int n = int(least<int64_t>(W, loss.classes - c));
            V v[W];
            for (int lane = 0; lane < W; ++lane) {
                const S *from = loss.row_of(r, first + least(lane, count - 1)) + c;
                v[lane] = n == W ? load(from) : load_partial(from, n, Real(0));
            }
            transpose<Real>(v);
            UNROLL for (int i = 0; i < W; ++i) if (n == W || i < n) store(to + (c + i) * W, v[i]);
        }
    }

    void softmax(int r) const {
        const Real *const x = x_of(r);
        V m = splat(Real(-__builtin_inf()));
        I at = I{}, here = I{};
        for (int64_t c = 0; c < loss.classes; ++c) {
            const V z = load(x + c * W);
            at = z > m ? here : at;
            m = maximum(z, m);
            here += 1;
        }
        const int first = g.at(0, r);
        store(g.maximum + first, m);
        for (int lane = 0; lane < W; ++lane) g.argmax[first + lane] = at[lane];
        V at_t = V{}, at_one = V{};
        for (int64_t c = 0; c < loss.classes; c += kSpan) {
            const int64_t count = least(kSpan, loss.classes - c);
            const RowStore<Real> out = {x_of(r) + c * W, e_of(r) + c * W, one_of(r) + c * W};
            const RowSums<V> sums =
                exponentials<true>(loss.power, x + c * W, count * W, m, loss.inverse_t, out);
            at_t += sums.at_t;
            at_one += sums.at_one;
        }
        store(g.sum_t + first, at_t);
        store(g.sum_one + first, at_one);
    }

    // Cross entropies, and what scales the gradients: 0 for ignored samples.
    void scales(int64_t first, int count, Real (*ce)[W]) {
        Real total[W];
        for (int lane = 0; lane < count; ++lane)
            total[lane] = ignored(first + lane) ? 0 : loss.targets.mass(first + lane, nullptr, 0);
        for (int k = 0; k < loss.exits; ++k) {
            Real p[W] = {}, u[W] = {}, d[W] = {};
            for (int lane = 0; lane < count; ++lane) {
                const int64_t n = first + lane;
                if (ignored(n)) continue;
                const auto c =
                    loss.targets.cross_entropy(g, g.at(lane, k), k, n, total[lane], nullptr);
                ce[k][lane] = c.value;
                p[lane] = c.p_scale;
                u[lane] = c.mass_scale;
                d[lane] = loss.divergence_scale(k, n) * s.share[k] * loss.inverse_t;
            }
            s.p_scale[k] = load(p);
            s.mass_scale[k] = load(u);
            s.pair_scale[k] = load(d);
        }
    }

    void sweep() {
        for (int k = 0; k < loss.exits; ++k) s.value[k] = V{};
        if (!loss.divergent && !loss.gradient) return;
        for (int64_t c = 0; c < loss.classes; c += kSpan) {
            for (int r = 0; r < loss.rows; ++r) {
                s.x[r] = x_of(r) + c * W;
                s.e[r] = e_of(r) + c * W;
                if (r >= loss.exits) continue;
                s.one[r] = one_of(r) + c * W;
                s.out[r] = call.gradient[r] ? x_of(r) + c * W : nullptr;  // x has been read
            }
            loss.lane_student(s, least(kSpan, loss.classes - c) * W);
        }
    }

    unsigned record(int64_t first, int count, Real (*ce)[W], typename L::Partials *partial) const {
        unsigned left = 0;
        for (int lane = 0; lane < count; ++lane) {
            const int64_t n = first + lane;
            if (loss.form == L::kScalar) loss.predictions(g, lane, n);
            if (ignored(n)) continue;
            Real own_ce[MSDKERN_MAX_EXITS], own[MSDKERN_MAX_EXITS];
            bool finite = true;
            for (int k = 0; k < loss.exits; ++k) {
                own_ce[k] = ce[k][lane];
                own[k] = s.value[k][lane];
                finite &= own[k] - own[k] == 0;
            }
            // A class masked with -inf makes running sums inf - inf.
            if (finite)
                loss.record(n, own_ce, own, partial);
            else
                left |= 1u << lane;
        }
        return left;
    }

    void write_gradients(int64_t first, int count) const {
        for (int k = 0; k < loss.exits; ++k) {
            if (!call.gradient[k]) continue;
            Real *const from = x_of(k);
            for (int lane = 0; call.label && lane < count; ++lane)
                if (!ignored(first + lane))
                    from[call.label[first + lane] * W + lane] -= s.mass_scale[k][lane];
            for (int64_t c = 0; c < loss.classes; c += W) {
                const int n = int(least<int64_t>(W, loss.classes - c));
                V v[W];
                UNROLL for (int i = 0; i < W; ++i) v[i] =
                    n == W || i < n ? load(from + (c + i) * W) : V{};
                transpose<Real>(v);
                for (int lane = 0; lane < count; ++lane) {
                    S *const to = loss.gradient_of(k, first + lane) + c;
                    if (n == W)
                        store(to, v[lane]);
                    else
                        store_partial(to, n, v[lane]);
                }
            }
        }
    }
};

}  // namespace MSDKERN_NAMESPACE
