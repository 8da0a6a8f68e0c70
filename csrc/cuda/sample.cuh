// SPDX-License-Identifier: Apache-2.0
// One sample as its team sees it: the softmax of every row, and the sweeps over the classes.
#pragma once

#include "homes.cuh"

namespace msdkern {

enum class Form { kScalar, kRows, kRowsBackward };

// Of tile.cuh: z becomes log2 of an exponential at T (Exponent), times `inverse` q; the gradient of
// CE is p_scale q^T. Read at once.
template <class Real>
struct alignas(16) Terms {
    Real rate, offset, inverse, p_scale;
};

// What a team knows of one row.
template <class Real>
struct alignas(16) RowState {
    Terms<Real> terms;
    Real maximum, inverse_t, gap, n;  // 1 / S at T; log S less the deepest exit's; sum_j w_ij
    Real pair_scale, p_scale, mass_scale,
        log_t;                        // dL/dD_i; gradient of CE: p_scale e - mass_scale u
    Real slack, share, value, total;  // D_i = share sum_j ..., its value, sum_c dL/dl
    // Of tile.cuh: Exponent at 1; log2 of both exponentials of the maximum, which is not quite 0;
    // log S less the deepest's, of such exponentials.
    Real one_rate, one_offset, drift, one_drift, level;
    const void *from;  // a row of logits, and the gradient's: cheaper here than in registers
    void *to;
    Real ce;              // CE_i
    double log;           // log S
    int prediction, nan;  // the first class that is the maximum, or NaN
};

// (3) W[i][j] of a named weight.
template <class Real>
MSDKERN_DEVICE Real named_weight(int pairs, int exits, int i, int j) {
    if (j >= exits || j == i || (j < i && pairs != MSDKERN_PAIRS_MUTUAL)) return 0;
    if (pairs == MSDKERN_PAIRS_MUTUAL) return Real(1) / Real(exits - 1);
    if (pairs == MSDKERN_PAIRS_DEEPER) return Real(1) / Real(exits - 1 - i);
    if (pairs == MSDKERN_PAIRS_LAST) return j == exits - 1;
    return pairs == MSDKERN_PAIRS_NEXT && j == i + 1;
}

// Classes without mass: so far down that they weigh nothing, and no inf - inf comes of them.
template <class Real>
MSDKERN_DEVICE Real bounded(Real x) {
    return larger(x, Real(-1e30));
}
// A sum that such a class has spoilt; the careful sweep then takes its place.
template <class Real>
MSDKERN_DEVICE bool spoilt(Real x) {
    return !(x < Real(1e15) && x > Real(-1e15));
}

// 2^y = e^((z - m) / T), or in proportion to it: y = rate z - offset is one instruction for
// elements of 2 bytes, whose products are exact. Its rounded offset is the row's, and cancels.
// Where the offset is so large that its rounding would not be small, neighbouring elements are so
// far apart that one of them has all the mass at any rate.
template <class S>
struct Exponent {
    typedef RealOf<S> Real;
    static constexpr bool kFused = sizeof(S) == 2;
    Real rate, offset;
    MSDKERN_DEVICE static Exponent of(Real m, Real rate) {
        if (!kFused) return {rate, m};
        Real offset = m * rate;
        if (fabs(offset) > kMost && fabs(m) < Real(INFINITY)) {
            rate = kMost / fabs(m);
            offset = m * rate;
        }
        return {rate, offset};
    }
    MSDKERN_DEVICE Real operator()(Real z) const {
        return kFused ? fused(z, rate, -offset) : (z - offset) * rate;
    }
    // 2^y here of where it was 1 there.
    MSDKERN_DEVICE Real move(const Exponent &from) const {
        if (kFused && rate != from.rate) return 0;  // so far apart that nothing is left
        return exponential2((from.offset - offset) * (kFused ? Real(1) : rate));
    }

    static constexpr Real kMost = Real(1 << 22);
};

template <class S>
struct Sample {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>;
    const msdkern_loss &call;
    const Team &team;
    Cut<S> &cut;
    const Plan &plan;
    Exchange<Real> exchange;
    RowState<Real> *state;
    Real *weight;  // W[exits][rows], share included
    const int exits, rows;
    int learners = 0;             // exits before the first that gets no gradient
    Real inverse_t, scale, rate;  // rate: log2(e) / T
    int power;                    // T where it is 1, 2, 3 or 4
    bool divergent, dense_target, gradient;
    int64_t n = 0;
    int label = -1;  // or -1 where the target is no class

    MSDKERN_DEVICE Sample(const msdkern_loss &c, const Plan &plan_, const Team &t, Cut<S> &cut_,
                          unsigned char *memory)
        : call(c),
          team(t),
          cut(cut_),
          plan(plan_),
          exchange(exchange_at(memory, c), plan_.slots, t),
          state(reinterpret_cast<RowState<Real> *>(memory)),
          weight(weight_at(memory, c)),
          exits(c.exits),
          rows(c.exits + c.teachers) {
        const double given = c.temperature_at ? double(*real(c.temperature_at)) : c.temperature;
        const double temperature = given > 0 && given <= 1e300 ? given : double(NAN);
        const double by = c.pair_scale_at ? double(*real(c.pair_scale_at)) : c.pair_scale;
        scale = Real(by * (c.temperature_squared ? temperature * temperature : 1));
        inverse_t = Real(1 / temperature);
        divergent = c.pairs != MSDKERN_PAIRS_NONE || c.pair_divergence;
        if (!divergent) inverse_t = 1;
        rate = Real(divergent ? kLog2E / temperature : kLog2E);
        power = inverse_t == 1     ? 1
                : temperature == 2 ? 2
                : temperature == 3 ? 3
                : temperature == 4 ? 4
                                   : 0;
        dense_target = c.target || (c.label && c.label_smoothing != 0);
        gradient = false;
        for (int k = 0; k < exits; ++k) gradient |= c.gradient[k] != nullptr;
        while (learners < exits && c.gradient[learners]) ++learners;
    }
    static MSDKERN_DEVICE Real *weight_at(unsigned char *memory, const msdkern_loss &c) {
        return reinterpret_cast<Real *>(memory + sizeof(RowState<Real>) * (c.exits + c.teachers));
    }
    static MSDKERN_DEVICE Real *exchange_at(unsigned char *memory, const msdkern_loss &c) {
        return weight_at(memory, c) + c.exits * (c.exits + c.teachers);
    }
    static MSDKERN_DEVICE const Real *real(const void *p) { return static_cast<const Real *>(p); }
    static MSDKERN_DEVICE Real *real(void *p) { return static_cast<Real *>(p); }

    template <class Home>
    MSDKERN_DEVICE bool dense() const {
        return !Home::kLean && dense_target;
    }
    // e^(z - m) from e^((z - m) / T).
    MSDKERN_DEVICE Real at_one(Real e, Real gap) const {
        switch (power) {
            case 1:
                return e;
            case 2:
                return e * e;
            case 3:
                return e * e * e;
            case 4:
                return (e * e) * (e * e);
            default:
                return exponential(gap);
        }
    }
    // (1) u of one class.
    MSDKERN_DEVICE Real mass(int c) const {
        if (!cut.has(c)) return 0;
        const Real on_label = 1 - Real(call.label_smoothing);
        Real u = Real(call.label_smoothing) / Real(cut.classes);
        if (call.target) u += real(call.target)[n * call.classes + c] * on_label;
        if (call.class_weight) u *= real(call.class_weight)[c];
        if (c == label) u += on_label * (call.class_weight ? real(call.class_weight)[c] : Real(1));
        return u;
    }
    // Classes by which the rows of sample n begin behind a multiple of 16 bytes.
    MSDKERN_DEVICE int lead(int64_t n) const { return (plan.lead + int(n % V) * plan.turn) % V; }
    MSDKERN_DEVICE int class_at(int i, int v) const { return cut.first(i) + v * cut.step(); }

    // Maxima, sums of exponentials at both temperatures, and what a dense target makes of them.
    // Leaves S at T in slot r, S at 1 in slot rows + r, -sum_c u (z - m) in slot 2 rows + k, and
    // sum_c u in the slot after.
    template <class Home>
    MSDKERN_DEVICE void softmaxes(Home &home, bool predicts) {
        for (int r = team.local; r < rows; r += team.lanes)
            state[r].prediction = state[r].nan = INT32_MAX;
        each<Home::kRows>(rows, [&](int r) {
            Real m = lowest<Real>();
            each<Home::kChunks>(cut.chunks, [&](int i) {
                Real z[V];
                unpack<S>(home.raw(r, i), z);
#pragma unroll
                for (int v = 0; v < V; ++v) m = larger(m, z[v]);
            });
            exchange.template put<Maximum>(team, r, m);
        });
        exchange.template finish<Maximum>(team, rows);
        each<Home::kRows>(rows, [&](int r) { row_sums(home, r, predicts && r < exits); });
        exchange.template finish<Sum>(team, sums<Home>());
    }
    template <class Home>
    MSDKERN_DEVICE void row_sums(Home &home, int r, bool predicts) {
        const Real m = exchange.get(r);
        if (team.local == r % team.lanes) state[r].maximum = m;
        Real at_t = 0, one = 0, moved = 0, total = 0;
        each<Home::kChunks>(cut.chunks, [&](int i) {
            Real z[V], e[V];
            unpack<S>(home.raw(r, i), z);
            bool top = false;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Real gap = z[v] - m;
                e[v] = exponential(gap * inverse_t);
                at_t += e[v];
                one += at_one(e[v], gap);
                top |= !(z[v] < m);
            }
            home.keep(r, i, e);
            if (predicts && top) note_top(r, i, z, m);
            if (dense<Home>() && r < exits) {
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const Real u = mass(class_at(i, v));
                    moved -= weigh(u, z[v] - m);
                    total += u;
                }
            }
        });
        exchange.template put<Sum>(team, r, at_t);
        exchange.template put<Sum>(team, rows + r, one);
        if (!dense<Home>() || r >= exits) return;
        exchange.template put<Sum>(team, 2 * rows + r, moved);
        if (r == 0) exchange.template put<Sum>(team, 2 * rows + exits, total);
    }
    // Few get here: whoever holds the maximum or a NaN. The lowest class wins.
    MSDKERN_DEVICE void note_top(int r, int i, const Real (&z)[V], Real m) {
        RowState<Real> *first = team.blocks > 1 ? in_block(state, 0) : state;
        int top = INT32_MAX, nan = INT32_MAX;
#pragma unroll
        for (int v = V - 1; v >= 0; --v) {
            const int c = class_at(i, v);
            if (z[v] == m && c >= 0) top = c;
            if (z[v] != z[v]) nan = c;
        }
        if (top < cut.classes) atomicMin(&first[r].prediction, top);
        if (nan < cut.classes) atomicMin(&first[r].nan, nan);
    }

    // x = (z - m) / T and e^x of row r at chunk i.
    template <class Home>
    MSDKERN_DEVICE void terms(const Home &home, int r, int i, Real (&x)[V], Real (&e)[V]) const {
        unpack<S>(home.raw(r, i), x);
        const Real m = state[r].maximum;
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = (x[v] - m) * inverse_t;
        if (home.keeps())
            home.kept(r, i, e);
        else
#pragma unroll
            for (int v = 0; v < V; ++v) e[v] = exponential(x[v]);
    }

    // The gradient g of the divergences at class c, and that of the cross entropy added to it. The
    // label's share leaves before rounding.
    template <class Home>
    MSDKERN_DEVICE Real with_cross_entropy(Real g, Real e, Real gap, int c, Real p_scale,
                                           Real mass_scale) const {
        g += at_one(e, gap) * p_scale;
        if (dense<Home>()) return g - mass(c) * mass_scale;
        return c == label ? g - mass_scale : g;
    }
    MSDKERN_DEVICE S *gradient_of(int k) const {
        return static_cast<S *>(call.gradient[k]) + n * call.classes;
    }
    // How many slots softmaxes() fills.
    template <class Home>
    MSDKERN_DEVICE int sums() const {
        return 2 * rows + (dense<Home>() ? exits + 1 : 0);
    }
    // The normaliser S of a row enters as log S, rounded, and as 1 / S, rounded. What that does to
    // D_ij is a constant per row, known from `slack`.
    MSDKERN_DEVICE Real error(int i, int j) const {
        const Real gap = state[j].slack - state[i].slack;
        if (call.divergence == MSDKERN_FORWARD_KL) return gap;
        return call.divergence == MSDKERN_REVERSE_KL ? -gap : Real(0);
    }
    MSDKERN_DEVICE void zero_gradients() const {
        Real zero[V] = {};
        for (int k = 0; k < exits; ++k)
            for (int i = 0; call.gradient[k] && i < cut.chunks; ++i)
                cut.store(gradient_of(k), i, zero);
    }
};

}  // namespace msdkern
