// SPDX-License-Identifier: Apache-2.0
// (1), (7) The sweeps before those of tile.cuh: each row's maximum, its exponentials summed at both
// temperatures, the class that is predicted, and what a target of many classes makes of them.
#pragma once

#include "sample.cuh"

namespace msdkern {

template <class S, class Home>
struct TileSums {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>, kRows = Home::kRows;
    static constexpr int kLooped = Home::kLean ? kRows : 0;  // sweeps that take exit after exit
    Sample<S> &s;
    Home &home;

    MSDKERN_DEVICE void softmaxes(bool predicts) {
        for (int r = s.team.local; r < s.rows; r += s.team.lanes)
            s.state[r].prediction = s.state[r].nan = INT32_MAX;
        each<kLooped>(s.rows, [&](int r) {
            home.value(r) = top(r);
            s.exchange.template put<Maximum>(s.team, r, home.value(r));
        });
        s.exchange.template finish<Maximum>(s.team, s.rows);
        each<kLooped>(s.rows, [&](int r) { row_sums(r, predicts && r < s.exits); });
        s.exchange.template finish<Sum>(s.team, s.template sums<Home>());
    }
    MSDKERN_DEVICE Real top(int r) {
        if constexpr (Home::kOnline) return online(r);
        Largest<S> largest;
        each_some<Home::kChunks, 4>(s.cut.chunks, [&](int i) { largest.add(home.raw(r, i)); });
        return largest.value();
    }
    // Maximum and sums of one thread in one reading: what was summed moves with the maximum.
    MSDKERN_DEVICE Real online(int r) {
        constexpr int kAhead = 4;  // loads in flight
        Exponent<S> at_t = {s.rate, 0}, at_one = {Real(kLog2E), 0};
        Real m = lowest<Real>(), sum = 0, one = 0;
#pragma unroll 1
        for (int i = 0; i < s.cut.chunks; i += kAhead) {
            uint4 raw[kAhead];
            each<kAhead>(s.cut.chunks - i, [&](int a) { raw[a] = home.early(r, i + a); });
            Largest<S> largest;
            each<kAhead>(s.cut.chunks - i, [&](int a) { largest.add(raw[a]); });
            if (largest.value() > m) {
                const Real before = m;
                m = largest.value();
                move(m, before, at_t, at_one, sum, one);
            }
            each<kAhead>(s.cut.chunks - i, [&](int a) {
                Real z[V];
                unpack<S>(raw[a], z);
                add_exponentials(z, at_t, at_one, sum, one);
            });
        }
        home.value(s.rows + r) = sum;
        home.value(2 * s.rows + r) = one;
        return m;
    }
    // Sums whose maximum was `before`, nothing where that is -inf, for maximum m.
    MSDKERN_DEVICE void move(Real m, Real before, Exponent<S> &at_t, Exponent<S> &at_one, Real &sum,
                             Real &one) const {
        const Exponent<S> new_t = Exponent<S>::of(m, s.rate);
        const Exponent<S> new_one = Exponent<S>::of(m, Real(kLog2E));
        if (before > lowest<Real>()) {
            const Real by = new_t.move(at_t);
            sum *= by;
            one *= s.power ? raise(by) : new_one.move(at_one);
        }
        at_t = new_t;
        at_one = new_one;
    }
    MSDKERN_DEVICE Real raise(Real x) const {
        Real result = x;
        for (int i = 1; i < s.power; ++i) result *= x;
        return result;
    }
    MSDKERN_DEVICE void row_sums(int r, bool predicts) {
        const Real m = s.exchange.get(r);
        const Exponent<S> at_t = Exponent<S>::of(m, s.rate),
                          at_one = Exponent<S>::of(m, Real(kLog2E));
        if (s.team.local == r % s.team.lanes) remember(s.state[r], m, at_t, at_one);
        Real sum = 0, one = 0;
        if constexpr (Home::kOnline) {
            Exponent<S> mine_t = Exponent<S>::of(home.value(r), s.rate);
            Exponent<S> mine_one = Exponent<S>::of(home.value(r), Real(kLog2E));
            sum = home.value(s.rows + r);
            one = home.value(2 * s.rows + r);
            move(m, home.value(r), mine_t, mine_one, sum, one);
        } else {
            each_some<Home::kChunks, 2>(s.cut.chunks, [&](int i) {
                Real z[V];
                unpack<S>(home.raw(r, i), z);
                add_exponentials(z, at_t, at_one, sum, one);
            });
        }
        // Few get here: whoever holds the maximum or a NaN.
        if (predicts && (home.value(r) == m || sum != sum))
            each<Home::kChunks>(s.cut.chunks, [&](int i) {
                Real z[V];
                unpack<S>(home.raw(r, i), z);
                s.note_top(r, i, z, m);
            });
        s.exchange.template put<Sum>(s.team, r, sum);
        s.exchange.template put<Sum>(s.team, s.rows + r, one);
        if (s.template dense<Home>() && r < s.exits) target_sums(r, m);
    }
    MSDKERN_DEVICE void remember(RowState<Real> &state, Real m, const Exponent<S> &at_t,
                                 const Exponent<S> &at_one) const {
        state.maximum = m;
        state.terms.rate = at_t.rate;
        state.terms.offset = at_t.offset;
        state.one_rate = at_one.rate;
        state.one_offset = at_one.offset;
        state.drift = at_t(m);
        state.one_drift = s.power ? Real(s.power) * state.drift : at_one(m);
    }
    // e^(z - m) is a power of e^((z - m) / T) where T is a small integer.
    MSDKERN_DEVICE void add_exponentials(const Real (&z)[V], const Exponent<S> &at_t,
                                         const Exponent<S> &at_one, Real &sum, Real &one) const {
        Real e[V];
#pragma unroll
        for (int v = 0; v < V; ++v) sum += e[v] = exponential2(at_t(z[v]));
        switch (s.power) {
            case 1:
#pragma unroll
                for (int v = 0; v < V; ++v) one += e[v];
                return;
            case 2:
#pragma unroll
                for (int v = 0; v < V; ++v) one += e[v] * e[v];
                return;
            case 3:
#pragma unroll
                for (int v = 0; v < V; ++v) one += e[v] * e[v] * e[v];
                return;
            case 4:
#pragma unroll
                for (int v = 0; v < V; ++v) one += e[v] * e[v] * (e[v] * e[v]);
                return;
            default:
#pragma unroll
                for (int v = 0; v < V; ++v) one += exponential2(at_one(z[v]));
        }
    }
    // What a target of many classes makes of them: -sum_c u (z - m) and sum_c u.
    MSDKERN_DEVICE void target_sums(int r, Real m) {
        Real moved = 0, total = 0;
#pragma unroll 1
        for (int i = 0; i < s.cut.chunks; ++i) {
            Real z[V];
            unpack<S>(home.raw(r, i), z);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Real u = s.mass(s.class_at(i, v));
                moved -= weigh(u, z[v] - m);
                total += u;
            }
        }
        s.exchange.template put<Sum>(s.team, 2 * s.rows + r, moved);
        if (r == 0) s.exchange.template put<Sum>(s.team, 2 * s.rows + s.exits, total);
    }
};

}  // namespace msdkern
