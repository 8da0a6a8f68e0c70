// SPDX-License-Identifier: Apache-2.0
// Who teaches whom in a sweep, class by class: what each of the pair weights makes of the
// probabilities of all exits.
#pragma once

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// f(0) to f(n - 1): unrolled where K, the number of exits, is known. (Unrolled all the same, loops
// over any number of them were half of the binary, and no faster.)
template <int K, class F>
INLINE void each(int n, F f) {
    if constexpr (K != 0) {
        UNROLL for (int i = 0; i < n; ++i) f(i);
    } else {
        for (int i = 0; i < n; ++i) f(i);
    }
}

// Mixers: mass = sum_j w_j q_j and moment = sum_j w_j q_j d_j over the teachers of student i, asked
// for from the deepest exit to the shallowest, for NV vectors of classes.
template <class Real, int NV>
struct Mixture {
    typedef VecOf<Real> V;
    static const bool kCommon = false;     // part of the value is common to all students
    static const bool kAllRows = false;    // external teachers count as well
    static const bool kRemembers = false;  // passed() is of interest
    static const bool kChain = false;      // d is taken relative to the exit passed last
    V mass[NV], moment[NV];
    INLINE_MEMBER void clear() {
        for (int v = 0; v < NV; ++v) mass[v] = moment[v] = V{};
    }
    template <class Source, class T>
    INLINE_MEMBER void begin(const Source &, T &, int) {
        clear();
    }
    template <class Source, class T>
    INLINE_MEMBER void select(const Source &, const T &, int, int) {}
    // n q - mass, of the q in the tile; the value's part that is common to all students, and its
    // other one; the mass less the student's own share.
    INLINE_MEMBER V gradient(int v, V q, V n) const { return forward_kl_gradient(q, n, mass[v]); }
    INLINE_MEMBER V common(int) const { return V{}; }
    INLINE_MEMBER V others(int v, V) const { return mass[v]; }
    INLINE_MEMBER V value(int v, V gradient, V d) const {
        return forward_kl_value(gradient, d, mass[v], moment[v]);
    }
    INLINE_MEMBER void passed(bool, int, V, V) {}
};

// All exits teach. The student's own share adds nothing to a divergence, so one sum serves all.
// Probabilities are taken and summed relative to the deepest exit's: their differences are exact
// where exits agree. With q so and excess = sum_j q_j the value of student i is
//     (moment - excess) + (n q_i - d_i mass)
// The first part is what the deepest exit learns, the second 0 for it; both are of second order
// class by class where exits agree, so that sums over classes lose nothing.
template <class Real, int NV>
struct Mutual : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    static const bool kCommon = true;
    V deepest[NV], excess[NV];
    INLINE_MEMBER V common(int v) const { return this->moment[v] - excess[v]; }
    INLINE_MEMBER V gradient(int v, V q, V n) const { return forward_kl_gradient(q, n, excess[v]); }
    INLINE_MEMBER V value(int v, V gradient, V d) const {
        return (gradient + excess[v]) - d * this->mass[v];
    }
    INLINE_MEMBER V others(int v, V q) const { return this->mass[v] - (q + deepest[v]); }
    template <class Source, class T>
    INLINE_MEMBER void begin(const Source &, T &tile, int exits) {
        const int last = exits - 1;
        for (int v = 0; v < NV; ++v) {
            deepest[v] = tile.q[last][v];
            excess[v] = this->moment[v] = V{};
        }
        each<T::kExits>(last, [&](int k) __attribute__((always_inline)) {
            for (int v = 0; v < NV; ++v) {
                this->moment[v] += tile.q[k][v] * tile.x[k][v];  // related
                tile.q[k][v] -= deepest[v];
                excess[v] += tile.q[k][v];
            }
        });
        for (int v = 0; v < NV; ++v) {
            this->mass[v] = excess[v] + Real(exits) * deepest[v];
            tile.q[last][v] = V{};
        }
    }
};

// Every deeper exit teaches.
template <class Real, int NV>
struct Deeper : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    static const bool kRemembers = true;
    INLINE_MEMBER void passed(bool, int v, V q, V d) {
        this->mass[v] += q;
        this->moment[v] += q * d;
    }
};

// The next deeper exit teaches. It is the reference of d, so its own moment is 0.
template <class Real, int NV>
struct Next : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    static const bool kRemembers = true;
    static const bool kChain = true;
    INLINE_MEMBER void passed(bool, int v, V q, V) { this->mass[v] = q; }
};

// The deepest exit teaches. It is the reference of d, so its own moment is 0.
template <class Real, int NV>
struct Last : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    static const bool kRemembers = true;
    INLINE_MEMBER void passed(bool deepest, int v, V q, V) {
        if (deepest) this->mass[v] = q;
    }
};

// Any weights. Every student is its own reference: the deepest exit need not teach it, and may be
// far away.
template <class Real, int NV>
struct Dense : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    static const bool kAllRows = true;
    template <class Source, class T>
    INLINE_MEMBER void select(const Source &s, const T &tile, int rows, int i) {
        this->clear();
        each<T::kExits>(rows, [&](int r) __attribute__((always_inline)) {
            const Real w = s.weight[i * rows + r];
            if (w == 0) return;
            const auto gap = s.row[r].gap - s.row[i].gap;
            for (int v = 0; v < NV; ++v) {
                const V share = tile.q[r][v] * w;
                this->mass[v] += share;
                this->moment[v] += share * tile.distance(s, r, i, v, gap);
            }
        });
    }
    INLINE_MEMBER V value(int v, V gradient, V) const { return this->moment[v] + gradient; }
};

}  // namespace MSDKERN_NAMESPACE
