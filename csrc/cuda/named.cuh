// SPDX-License-Identifier: Apache-2.0
// (2), (5), (6) The divergences whose gradients need a sum over all classes first, for mutual and
// deeper pairs in O(K): what the teachers of a student add up to, and what the students of a
// teacher do, are running sums. Not for JSD, whose mixture belongs to the pair.
#pragma once

#include "sample.cuh"

namespace msdkern {

template <class S, class Home>
struct Named {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>;
    Sample<S> &s;
    Home &home;
    const bool mutual, forward, reverse, teaches;

    MSDKERN_DEVICE Named(Sample<S> &s_, Home &h)
        : s(s_),
          home(h),
          mutual(s_.call.pairs == MSDKERN_PAIRS_MUTUAL),
          forward(s_.call.divergence == MSDKERN_FORWARD_KL),
          reverse(s_.call.divergence == MSDKERN_REVERSE_KL),
          teaches(!s_.call.detach_teacher) {}
    MSDKERN_DEVICE static bool serves(const msdkern_loss &call) {
        return (call.pairs == MSDKERN_PAIRS_MUTUAL || call.pairs == MSDKERN_PAIRS_DEEPER) &&
               call.divergence != MSDKERN_JSD && !call.pair_divergence;
    }

    // Sums over exits at each class of a chunk: q; what a student takes of its teachers' l; what a
    // teacher takes of its students'.
    struct Sums {
        Real q[V] = {}, taught[V] = {}, teaching[V] = {};
        MSDKERN_DEVICE void add(int v, Real q_k, Real to_students, Real to_teachers) {
            q[v] += q_k;
            taught[v] += to_students;
            teaching[v] += to_teachers;
        }
    };
    // dL/dD_i of one pair.
    MSDKERN_DEVICE Real coefficient(int k) const {
        return s.state[k].pair_scale * s.state[k].share;
    }
    // f(v, q, d) for exit k at chunk i; d = l less the deepest exit's, which cancels; or l.
    template <class F>
    MSDKERN_DEVICE void classes(int k, int i, const Real (&reference)[V], F f) const {
        const RowState<Real> &row = s.state[k];
        const Real m = row.maximum, inverse = row.inverse_t;
        const Real level = forward || reverse ? row.gap : row.log_t;
        Real z[V];
        unpack<S>(home.raw(k, i), z);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Real x = (z[v] - m) * s.inverse_t;
            f(v, exponential(x) * inverse, (bounded(x) - reference[v]) - level);
        }
    }
    MSDKERN_DEVICE void refer(int i, Real (&reference)[V]) const {
        Real z[V];
        const int deepest = s.exits - 1;
        if (forward || reverse) unpack<S>(home.raw(deepest, i), z);
#pragma unroll
        for (int v = 0; v < V; ++v)
            reference[v] = forward || reverse
                               ? bounded((z[v] - s.state[deepest].maximum) * s.inverse_t)
                               : Real(0);
    }
    // From the deepest exit to the shallowest: f(k, h, value) with dL/dl up to multiples of q,
    // class by class, and the sum of the values.
    template <class F>
    MSDKERN_DEVICE void walk(int i, F f) const {
        Real reference[V], coefficients = 0;
        refer(i, reference);
        Sums all, deeper;
#pragma unroll 1
        for (int k = 0; k < s.exits; ++k) {
            const Real c = coefficient(k);
            coefficients += c;
            classes(k, i, reference, [&](int v, Real q, Real d) {
                all.add(v, q, forward ? q * d : d, c * (reverse ? q : d));
            });
        }
        Real shallower = coefficients;  // of the students of a teacher
#pragma unroll 1
        for (int k = s.exits - 1; k >= 0; --k) {
            const Real c = coefficient(k), n = s.state[k].n - Real(mutual);
            shallower -= c;
            const Real students = mutual ? coefficients - c : shallower;
            Real h[V], value = 0;
            classes(k, i, reference, [&](int v, Real q, Real d) {
                const Real to_students = forward ? q * d : d, to_teachers = c * (reverse ? q : d);
                const Real mass = mutual ? all.q[v] - q : deeper.q[v];
                const Real taught = mutual ? all.taught[v] - to_students : deeper.taught[v];
                deeper.add(v, q, to_students, to_teachers);
                const Real teaching = all.teaching[v] - (mutual ? to_teachers : deeper.teaching[v]);
                const Real gap = q * (n * d - taught);  // of reverse KL
                value += forward
                             ? forward_kl_value(forward_kl_gradient(q, n, mass), d, mass, taught)
                         : reverse ? gap + (mass - n * q)
                                   : -d * mass;
                h[v] = (reverse ? gap : -mass) * c;
                if (teaches)
                    h[v] -=
                        reverse ? teaching : q * (teaching - (forward ? d * students : Real(0)));
            });
            f(k, h, value);
        }
    }
    // Values, and sum_c dL/dl where gradients follow. False where masked classes have spoilt one.
    MSDKERN_DEVICE bool values() {
        const int exits = s.exits;
        for (int k = 0; k < 2 * exits; ++k) home.value(k) = 0;
#pragma unroll 1
        for (int i = 0; i < s.cut.chunks; ++i)
            walk(i, [&](int k, const Real(&h)[V], Real value) {
                Real total = 0;
#pragma unroll
                for (int v = 0; v < V; ++v) total += h[v];
                home.value(k) += value;
                home.value(exits + k) += total;
            });
        for (int k = 0; k < 2 * exits; ++k) s.exchange.template put<Sum>(s.team, k, home.value(k));
        s.exchange.template finish<Sum>(s.team, 2 * exits);
        bool whole = true;
        for (int k = 0; k < 2 * exits; ++k) whole &= !spoilt(s.exchange.get(k));
        for (int k = s.team.local; k < exits; k += s.team.lanes) {
            s.state[k].value = s.state[k].share * s.exchange.get(k);
            s.state[k].total = s.exchange.get(exits + k);
        }
        s.team.sync();
        return whole;
    }
    MSDKERN_DEVICE void gradients() const {
#pragma unroll 1
        for (int i = 0; i < s.cut.chunks; ++i)
            walk(i, [&](int k, const Real(&h)[V], Real) {
                if (s.call.gradient[k]) gradient(k, i, h);
            });
    }
    MSDKERN_DEVICE void gradient(int k, int i, const Real (&h)[V]) const {
        const RowState<Real> &row = s.state[k];
        Real z[V], g[V];
        unpack<S>(home.raw(k, i), z);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Real gap = z[v] - row.maximum, e = exponential(gap * s.inverse_t);
            g[v] = softmax_jacobian(h[v], e * row.inverse_t, row.total, s.inverse_t);
            g[v] = s.template with_cross_entropy<Home>(g[v], e, gap, s.class_at(i, v), row.p_scale,
                                                       row.mass_scale);
        }
        s.cut.store(s.gradient_of(k), i, g);
    }
};

}  // namespace msdkern
