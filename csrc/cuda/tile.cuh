// SPDX-License-Identifier: Apache-2.0
// (2), (6) Few exits, forward KL: values and gradients by one sweep in which a thread has some
// classes of all exits in registers at once. With tile_sums.cuh every logit is turned into its
// exponential twice in all: once for the sums, once here.
#pragma once

#include "tile_sums.cuh"

namespace msdkern {

// Some classes of all exits: W of each. Gradients replace the logits where these were.
template <class S, class Home>
struct Tile {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>, P = V / 2, kRows = Home::kRows, W = kRows <= 4 ? P : 2;
    Sample<S> &s;
    Home &home;

    template <class F>
    MSDKERN_DEVICE static void rows(int n, F f) {
        each<kRows, Home::kLeast>(n, f);
    }

    // W classes of all exits: q; and log2 q up to a number per row, bounded where a class is
    // masked, which dL/dz replaces.
    struct Cells {
        Real q[kRows][W], y[kRows][W], p_scale[kRows];
    };
    // Whether q is taken relative to another row's: exact where exits agree. Of logits of 2 bytes
    // less is known than that adds, and an instruction counts.
    static constexpr bool kRelative = sizeof(S) > 2;

    // Values of all exits into RowState::value, gradients where they belong, and the next sample's
    // logits, n = `next`, where these were.
    MSDKERN_DEVICE void sweep(int64_t next) {
        if (!s.divergent && !s.gradient) return;
        Real values[kRows] = {};
        Cut<S> coming = s.cut;
        coming.lead(s.lead(next));
        each<Home::kChunks>(s.cut.chunks, [&](int j) {
            const int i = Home::kOnline ? s.cut.chunks - 1 - j : j;
            if (Home::kOnline) rows(s.rows, [&](int r) { home.fetch(s.cut, from(r), r, i); });
            halves(i, values);
            if (s.gradient)
                each<kRows, Home::kLearn>(s.learners, [&](int k) {
                    home.store(s.cut, static_cast<S *>(s.state[k].to), k, i);
                });
            if (next < s.call.rows)
                rows(s.rows, [&](int r) { home.refill(coming, from(r), r, i); });
        });
        home.filled();
        if (s.divergent) finish(values);
    }
    MSDKERN_DEVICE void finish(const Real (&values)[kRows]) {
        rows(s.exits, [&](int k) { s.exchange.template put<Sum>(s.team, k, values[k]); });
        s.exchange.template finish<Sum>(s.team, s.exits);
        for (int k = s.team.local; k < s.exits; k += s.team.lanes)
            s.state[k].value = s.state[k].share * s.exchange.get(k) + levels(k);
    }
    // What y lacks of log q. Where a row has a rate of its own, its y is of no use (Exponent).
    MSDKERN_DEVICE Real levels(int i) const {
        Real sum = 0;
        for (int j = 0; j < s.rows; ++j) {
            const Real w = s.weight[i * s.rows + j];
            if (w == 0) continue;
            sum += w * (s.state[i].level - s.state[j].level);
            if (s.state[j].terms.rate != s.rate || s.state[i].terms.rate != s.rate) sum = Real(NAN);
        }
        return sum;
    }
    MSDKERN_DEVICE const S *from(int r) const { return static_cast<const S *>(s.state[r].from); }
    // The 8 bytes of a chunk's halves, one after another: code for one is enough where they are not
    // in registers.
    MSDKERN_DEVICE void halves(int i, Real (&values)[kRows]) {
        each<Home::kLean ? 2 : 0>(2, [&](int p) {
#pragma unroll
            for (int h = 0; h < P / W; ++h) piece(i, p, h, values);
        });
    }
    // W classes, from the h-th W of half p of chunk i on.
    MSDKERN_DEVICE void piece(int i, int p, int h, Real (&values)[kRows]) {
        Cells cells;
        if (!s.divergent)
            rows(s.rows, [&](int r) { fill(cells, r, i, p, h); });
        else if (s.call.pairs == MSDKERN_PAIRS_MUTUAL)
            mutual(cells, i, p, h, values);
        else if (Home::kDense && s.call.pairs == MSDKERN_PAIRS_DENSE)
            matrix(cells, i, p, h, values);
        else
            chain(cells, i, p, h, values);
        if (!s.gradient) return;
        if (!s.divergent) rows(s.exits, [&](int k) { clear(cells.y[k]); });
        take_target(cells, i, p * P + h * W);
        add_cross_entropy(cells, i, p, h);
    }
    MSDKERN_DEVICE static void clear(Real (&x)[W]) {
#pragma unroll
        for (int w = 0; w < W; ++w) x[w] = 0;
    }
    MSDKERN_DEVICE void fill(Cells &cells, int r, int i, int p, int h) const {
        const Terms<Real> terms = s.state[r].terms;
        const Exponent<S> at_t = {terms.rate, terms.offset};
        Real z[W];
        unpack_some<S, W>(home.half(r, i, p), h, z);
#pragma unroll
        for (int w = 0; w < W; ++w) {
            cells.y[r][w] = at_t(z[w]);
            cells.q[r][w] = exponential2(cells.y[r][w]) * terms.inverse;
        }
        cells.p_scale[r] = terms.p_scale;
    }
    // Gradient and value of student k, whose teachers' probabilities sum to `mass`, `all` times
    // ln 2. q is taken relative to `base`, and y to another row's: exact where exits agree.
    MSDKERN_DEVICE Real student(Cells &cells, int k, Real n, Real moment, const Real (&base)[W],
                                const Real (&mass)[W], const Real (&all)[W]) const {
        const Real scale = s.state[k].pair_scale;
        Real value = moment;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            const Real gap = forward_kl_gradient(cells.q[k][w] - base[w], n, mass[w]);
            value += gap - cells.y[k][w] * all[w];
            cells.y[k][w] = gap * scale;
        }
        return value;
    }
    // All exits teach. The student's own share adds nothing to a divergence.
    MSDKERN_DEVICE void mutual(Cells &cells, int i, int p, int h, Real (&values)[kRows]) const {
        Real mass[W], base[W], all[W], reference[W], moment = 0;
        rows(s.exits, [&](int k) {
            fill(cells, k, i, p, h);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                if (k == 0) {
                    base[w] = kRelative ? cells.q[0][w] : Real(0);
                    reference[w] = cells.y[0][w];
                    mass[w] = cells.q[0][w] - base[w];
                    cells.y[0][w] = 0;
                } else {
                    cells.y[k][w] = bounded(cells.y[k][w] - reference[w]);
                    mass[w] += cells.q[k][w] - base[w];
                    moment += cells.q[k][w] * cells.y[k][w];
                }
            }
        });
        const Real n = Real(s.exits);
#pragma unroll
        for (int w = 0; w < W; ++w)
            all[w] = Real(kLn2) * (kRelative ? mass[w] + n * base[w] : mass[w]);
        moment *= Real(kLn2);
        rows(s.exits, [&](int k) { values[k] += student(cells, k, n, moment, base, mass, all); });
    }
    // Deeper exits teach: all, the next or the deepest.
    MSDKERN_DEVICE void chain(Cells &cells, int i, int p, int h, Real (&values)[kRows]) const {
        const bool next = s.call.pairs == MSDKERN_PAIRS_NEXT;
        const bool deeper = s.call.pairs == MSDKERN_PAIRS_DEEPER;
        Real zero[W], mass[W], all[W], reference[W], moment = 0;
        clear(zero), clear(mass), clear(all), clear(reference);
        each_down<kRows>(s.exits, [&](int k) {
            fill(cells, k, i, p, h);
            const bool deepest = k == s.exits - 1;
            Real y[W];
#pragma unroll
            for (int w = 0; w < W; ++w) {
                y[w] = bounded(cells.y[k][w]);
                cells.y[k][w] = y[w] - reference[w];
            }
            values[k] += student(cells, k, s.state[k].n, moment, zero, mass, all);
            if (!(next || deeper || deepest)) return;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const Real q = cells.q[k][w];
                if (next || deepest) reference[w] = y[w];
                if (deeper) moment += Real(kLn2) * (q * (y[w] - reference[w]));
                mass[w] = deeper ? mass[w] + q : q;
                all[w] = Real(kLn2) * mass[w];
            }
        });
    }
    // Any weights. Every student is its own reference: the others may be far away.
    MSDKERN_DEVICE void matrix(Cells &cells, int i, int p, int h, Real (&values)[kRows]) const {
        Real gradient[kRows][W];
        rows(s.rows, [&](int r) {
            fill(cells, r, i, p, h);
#pragma unroll
            for (int w = 0; w < W; ++w) cells.y[r][w] = bounded(cells.y[r][w]);
        });
        rows(s.exits, [&](int k) {
            Real mass[W], value = 0;
            clear(mass);
            rows(s.rows, [&](int r) {
                const Real weight = s.weight[k * s.rows + r];
                if (weight == 0) return;  // it may hold NaN
                Real moment = 0;
#pragma unroll
                for (int w = 0; w < W; ++w) {
                    mass[w] += weight * (cells.q[r][w] - (kRelative ? cells.q[k][w] : Real(0)));
                    moment += cells.q[r][w] * (cells.y[r][w] - cells.y[k][w]);
                }
                value += weight * moment;
            });
            value *= Real(kLn2);
            const Real n = kRelative ? Real(0) : s.state[k].n, scale = s.state[k].pair_scale;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const Real gap = forward_kl_gradient(cells.q[k][w], n, mass[w]);
                value += gap;
                gradient[k][w] = gap * scale;
            }
            values[k] += value;
        });
        rows(s.exits, [&](int k) {
#pragma unroll
            for (int w = 0; w < W; ++w) cells.y[k][w] = gradient[k][w];
        });
    }
    // A T by power of q, where T is a small integer. The factor goes first: a power of a small q
    // alone may be 0.
    MSDKERN_DEVICE void add_cross_entropy(Cells &cells, int i, int p, int h) {
        const auto add = [&](auto power) {
            rows(s.exits, [&](int k) {
                const Real scale = cells.p_scale[k];
#pragma unroll
                for (int w = 0; w < W; ++w) cells.y[k][w] += power(cells.q[k][w], scale);
                put(cells, k, i, p, h);
            });
        };
        switch (s.power) {
            case 1:
                return add([](Real q, Real scale) { return scale * q; });
            case 2:
                return add([](Real q, Real scale) { return scale * q * q; });
            case 3:
                return add([](Real q, Real scale) { return scale * q * q * q; });
            case 4:
                return add([](Real q, Real scale) { return scale * q * q * q * q; });
            default:
                rows(s.exits, [&](int k) {
                    const Exponent<S> at_one = {s.state[k].one_rate, s.state[k].one_offset};
                    const Real scale = cells.p_scale[k];
                    Real z[W];
                    unpack_some<S, W>(home.half(k, i, p), h, z);
#pragma unroll
                    for (int w = 0; w < W; ++w) cells.y[k][w] += scale * exponential2(at_one(z[w]));
                    put(cells, k, i, p, h);
                });
        }
    }
    MSDKERN_DEVICE void put(const Cells &cells, int k, int i, int p, int h) {
        uint2 raw = W == P ? uint2{} : home.half(k, i, p);
        pack_some<S, W>(cells.y[k], h, raw);
        home.put_half(k, i, p, raw);
    }
    // The target's share leaves before rounding.
    // v: the first class in the chunk.
    MSDKERN_DEVICE void take_target(Cells &cells, int i, int v) const {
        if (s.template dense<Home>()) {
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const Real u = s.mass(s.class_at(i, v + w));
                rows(s.exits, [&](int k) { cells.y[k][w] -= u * s.state[k].mass_scale; });
            }
            return;
        }
        const int step = s.cut.step(), at = s.label - s.class_at(i, v);
        if (unsigned(at) > unsigned((W - 1) * step)) return;
        rows(s.exits, [&](int k) {
            const Real share = s.state[k].mass_scale;
#pragma unroll
            for (int w = 0; w < W; ++w)
                if (at == w * step) cells.y[k][w] -= share;
        });
    }
};

}  // namespace msdkern
