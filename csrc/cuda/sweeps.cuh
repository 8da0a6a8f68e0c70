// SPDX-License-Identifier: Apache-2.0
// (2), (6) The sweeps over the classes of one sample that give divergences and gradients.
#pragma once

#include "sample.cuh"

namespace msdkern {

// One element of a chunk: x = (z - m) / T, bounded, and its exponential; z - m.
template <class Real>
struct Term {
    Real x, e, gap;
};

// One chunk of classes of all exits, from the deepest to the shallowest: forward KL or soft cross
// entropy with detached teachers, and the whole gradient. The teachers of every student are a
// running sum, so the work is O(K); with a matrix of weights it is O(K) per student.
template <class S, class Home, bool kMutual>
struct Mixture {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>;
    const Sample<S> &s;
    Home &home;
    const int i, pairs;
    const bool soft;
    Real reference_gap = 0;
    // mass = sum_j w_j q_j, moment = sum_j w_j q_j d_j with d relative to a reference exit. For
    // mutual pairs `mass` is less the deepest exit's share: exact where exits agree.
    Real reference[V] = {}, mass[V] = {}, moment[V] = {}, deepest[kMutual ? V : 1] = {};

    MSDKERN_DEVICE Mixture(const Sample<S> &s_, Home &h, int chunk)
        : s(s_),
          home(h),
          i(chunk),
          pairs(s_.call.pairs),
          soft(!Home::kLean && s_.call.divergence == MSDKERN_SOFT_CE) {}

    // The elements of row r, one after another: f(v, term).
    template <class F>
    MSDKERN_DEVICE void elements(int r, F f) const {
        S stored[V];
        Real e[V];
        const uint4 raw = home.raw(r, i);
        memcpy(stored, &raw, 16);
        if (home.keeps()) home.kept(r, i, e);
        const Real m = s.state[r].maximum;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            Term<Real> t;
            t.gap = to_real(stored[v]) - m;
            t.x = t.gap * s.inverse_t;
            t.e = home.keeps() ? e[v] : exponential(t.x);
            t.x = bounded(t.x);
            f(v, t);
        }
    }
    // All exits teach. The student's own share adds nothing to a divergence.
    MSDKERN_DEVICE void all_teach() {
        each_down<Home::kRows>(s.exits, [&](int k) {
            const Real inverse = s.state[k].inverse_t, gap = s.state[k].gap;
            const bool first = k == s.exits - 1;
            elements(k, [&](int v, const Term<Real> &t) {
                const Real q = t.e * inverse;
                if (first) deepest[v] = q;
                if (first) reference[v] = t.x;
                mass[v] += q - deepest[v];
                moment[v] += q * ((t.x - reference[v]) - gap);
            });
        });
    }
    // Any weights. Every student is its own reference: the deepest exit may be far away.
    MSDKERN_DEVICE void select(int k) {
        elements(k, [&](int v, const Term<Real> &t) {
            mass[v] = moment[v] = 0;
            reference[v] = t.x;
        });
        reference_gap = s.state[k].gap;
#pragma unroll 1
        for (int r = 0; r < s.rows; ++r) {
            const Real w = s.weight[k * s.rows + r];
            if (w == 0) continue;
            const Real gap = s.state[r].gap - reference_gap, share = w * s.state[r].inverse_t;
            elements(r, [&](int v, const Term<Real> &t) {
                mass[v] += t.e * share;
                moment[v] += t.e * share * ((t.x - reference[v]) - gap);
            });
        }
    }
    MSDKERN_DEVICE Real value(int v, Real gap, Real x, Real q, Real d, Real log_t) const {
        const Real all = kMutual ? mass[v] + Real(s.exits) * deepest[kMutual ? v : 0] : mass[v];
        if (soft) return (log_t - x) * (kMutual ? all - q : all);
        return forward_kl_value(gap, d, all, moment[v]);
    }
    MSDKERN_DEVICE void exit(int k) {
        const bool is_deepest = k == s.exits - 1;
        if constexpr (!kMutual && Home::kRows == 0)
            if (pairs == MSDKERN_PAIRS_DENSE) select(k);
        const RowState<Real> &state = s.state[k];
        const Real inverse = state.inverse_t, n = state.n, log_t = state.log_t;
        const Real distance = state.gap - reference_gap, scale = state.pair_scale;
        const Real p_scale = state.p_scale, mass_scale = state.mass_scale;
        // How it teaches the shallower exits.
        const bool next = pairs == MSDKERN_PAIRS_NEXT, deeper = pairs == MSDKERN_PAIRS_DEEPER;
        const bool joins = deeper || (is_deepest && pairs == MSDKERN_PAIRS_LAST);
        Real g[V], total = 0;
        elements(k, [&](int v, const Term<Real> &t) {
            const Real q = t.e * inverse;
            if (!kMutual && is_deepest && pairs != MSDKERN_PAIRS_DENSE) reference[v] = t.x;
            const Real d = (t.x - reference[v]) - distance;
            const Real gap =
                forward_kl_gradient(kMutual ? q - deepest[kMutual ? v : 0] : q, n, mass[v]);
            total += value(v, gap, t.x, q, d, log_t);
            g[v] = s.template with_cross_entropy<Home>(gap * scale, t.e, t.gap, s.class_at(i, v),
                                                       p_scale, mass_scale);
            if (kMutual) return;
            if (joins || next) mass[v] = q + (next ? Real(0) : mass[v]);
            if (joins) moment[v] += q * d;
            if (next) reference[v] = t.x;  // its own moment is 0
        });
        if (next) reference_gap = state.gap;
        home.value(k) += total;
        if (s.call.gradient[k]) s.cut.store(s.gradient_of(k), i, g);
    }
    MSDKERN_DEVICE void run() {
        if (kMutual) all_teach();
        each_down<Home::kRows>(s.exits, [&](int k) { exit(k); });
    }
};

// (6) Cross entropy alone.
template <class S, class Home>
MSDKERN_DEVICE void cross_entropies(const Sample<S> &s, Home &home, int i) {
    typedef RealOf<S> Real;
    constexpr int V = kVector<S>;
    const Mixture<S, Home, false> chunk(s, home, i);
    each<Home::kRows>(s.exits, [&](int k) {
        if (!s.call.gradient[k]) return;
        const Real p_scale = s.state[k].p_scale, mass_scale = s.state[k].mass_scale;
        Real g[V];
        chunk.elements(k, [&](int v, const Term<Real> &t) {
            g[v] = s.template with_cross_entropy<Home>(Real(0), t.e, t.gap, s.class_at(i, v),
                                                       p_scale, mass_scale);
        });
        s.cut.store(s.gradient_of(k), i, g);
    });
}

// Values of all exits into RowState::value, gradients where they belong.
template <class S, class Home>
MSDKERN_DEVICE void sweep_students(Sample<S> &s, Home &home) {
    if (!s.divergent && !s.gradient) return;
    each<Home::kRows>(s.exits, [&](int k) { home.value(k) = 0; });
    each<Home::kChunks>(s.cut.chunks, [&](int i) {
        if (!s.divergent)
            cross_entropies(s, home, i);
        else if (s.call.pairs == MSDKERN_PAIRS_MUTUAL)
            Mixture<S, Home, true>(s, home, i).run();
        else
            Mixture<S, Home, false>(s, home, i).run();
    });
    if (!s.divergent) return;
    each<Home::kRows>(s.exits,
                      [&](int k) { s.exchange.template put<Sum>(s.team, k, home.value(k)); });
    s.exchange.template finish<Sum>(s.team, s.exits);
    for (int k = s.team.local; k < s.exits; k += s.team.lanes)
        s.state[k].value = s.state[k].share * s.exchange.get(k);
}

// The values of a sample that masked classes have spoilt, pair by pair and with 0 log 0 = 0. Rare:
// one class after another, from global memory.
template <class S>
struct Careful {
    typedef RealOf<S> Real;
    Sample<S> &s;

    struct Row {
        const S *z;
        Real maximum, inverse, gap;
    };
    MSDKERN_DEVICE Row row(int r) const {
        const RowState<Real> &state = s.state[r];
        const bool soft = s.call.divergence == MSDKERN_SOFT_CE;
        return {row_of<S>(s.call, r, s.n), state.maximum, state.inverse_t,
                soft ? state.log_t : state.gap};
    }
    MSDKERN_DEVICE Real sum(int i, int j) const {
        const Row student = row(i), teacher = row(j);
        Real value = 0;
#pragma unroll 1
        for (int c = s.team.member(); c < s.cut.classes; c += s.team.members()) {
            const Real x_i = (to_real(student.z[c]) - student.maximum) * s.inverse_t;
            const Real x_j = (to_real(teacher.z[c]) - teacher.maximum) * s.inverse_t;
            const Real q_i = exponential(x_i) * student.inverse, l_i = x_i - student.gap;
            const Real q_j = exponential(x_j) * teacher.inverse, l_j = x_j - teacher.gap;
            value += s.call.divergence == MSDKERN_SOFT_CE
                         ? soft_ce_pair(l_i, q_j).value
                         : forward_kl_pair(q_i, l_i, q_j, l_j).value;
        }
        return value;
    }
    MSDKERN_DEVICE void values() const {
#pragma unroll 1
        for (int i = 0; i < s.exits; ++i) {
#pragma unroll 1
            for (int j = 0; j < s.rows; ++j) {
                const bool teaches = s.weight[i * s.rows + j] != 0;
                s.exchange.template put<Sum>(s.team, j, teaches ? sum(i, j) : Real(0));
            }
            s.exchange.template finish<Sum>(s.team, s.rows);
            if (s.team.local != 0) continue;
            s.state[i].value = 0;
            for (int j = 0; j < s.rows; ++j) {
                const Real w = s.weight[i * s.rows + j];
                if (w != 0) s.state[i].value += w * s.exchange.get(j);
            }
        }
        s.team.sync();
    }
};

// The careful sweeps: every divergence, pair by pair, with 0 log 0 = 0.
template <class S, class Home>
struct Pairs {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>;
    Sample<S> &s;
    const Home &home;
    double *matrix;  // sums of D[exits][rows] over samples, or null

    // What an element of row r needs for q and l; l less the deepest exit's log-sum for KL, which
    // cancels there.
    struct Row {
        S stored[V];
        Real maximum, inverse, gap;
    };
    MSDKERN_DEVICE Row row(int r, int i) const {
        Row result;
        const uint4 raw = home.raw(r, i);
        memcpy(result.stored, &raw, 16);
        const RowState<Real> &state = s.state[r];
        result.maximum = state.maximum;
        result.inverse = state.inverse_t;
        result.gap = s.call.divergence == MSDKERN_SOFT_CE ? state.log_t : state.gap;
        return result;
    }
    MSDKERN_DEVICE void logs(const Row &row, int v, Real &l, Real &q) const {
        const Real x = (to_real(row.stored[v]) - row.maximum) * s.inverse_t;
        l = x - row.gap;
        q = exponential(x) * row.inverse;
    }
    MSDKERN_DEVICE Pair<Real> pair(Real q_i, Real l_i, Real q_j, Real l_j) const {
        switch (s.call.divergence) {
            case MSDKERN_FORWARD_KL:
                return forward_kl_pair(q_i, l_i, q_j, l_j);
            case MSDKERN_REVERSE_KL:
                return reverse_kl_pair(q_i, l_i, q_j, l_j);
            case MSDKERN_JSD:
                return jsd_pair(q_i, q_j, Real(s.call.beta));
            default:
                return soft_ce_pair(l_i, q_j);
        }
    }
    MSDKERN_DEVICE void sums(int i, int j) const {
        Real value = 0, of_student = 0, of_teacher = 0;
#pragma unroll 1
        for (int c = 0; c < s.cut.chunks; ++c) {
            const Row student = row(i, c), teacher = row(j, c);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                Real l_i, q_i, l_j, q_j;
                logs(student, v, l_i, q_i);
                logs(teacher, v, l_j, q_j);
                const Pair<Real> p = pair(q_i, l_i, q_j, l_j);
                value += p.value;
                of_student += p.of_student;
                of_teacher += p.of_teacher;
            }
        }
        s.exchange.template put<Sum>(s.team, 3 * j, value);
        s.exchange.template put<Sum>(s.team, 3 * j + 1, of_student);
        s.exchange.template put<Sum>(s.team, 3 * j + 2, of_teacher);
    }
    // Values, and sum_c dL/dl where gradients follow.
    MSDKERN_DEVICE void values() const {
        const int exits = s.exits, rows = s.rows;
        for (int k = s.team.local; k < exits; k += s.team.lanes)
            s.state[k].value = s.state[k].total = 0;
#pragma unroll 1
        for (int i = 0; i < exits; ++i) {
#pragma unroll 1
            for (int j = 0; j < rows; ++j)
                if (s.weight[i * rows + j] != 0 || s.call.pair_divergence) sums(i, j);
            s.exchange.template finish<Sum>(s.team, 3 * rows);
            if (s.team.local == 0) add(i);
        }
        s.team.sync();
    }
    MSDKERN_DEVICE void add(int i) const {
        for (int j = 0; j < s.rows; ++j) {
            const Real w = s.weight[i * s.rows + j], scale = w * s.state[i].pair_scale;
            if (matrix) matrix[i * s.rows + j] += double(s.exchange.get(3 * j) - s.error(i, j));
            if (w == 0) continue;
            s.state[i].value += w * s.exchange.get(3 * j);
            if (scale == 0) continue;
            s.state[i].total += scale * s.exchange.get(3 * j + 1);
            if (!s.call.detach_teacher && j < s.exits)
                s.state[j].total += scale * s.exchange.get(3 * j + 2);
        }
    }
    // dL/dl of exit k at a chunk, up to multiples of q.
    MSDKERN_DEVICE void derivative(int k, int c, const Row &student, Real (&h)[V]) const {
#pragma unroll 1
        for (int j = 0; j < s.rows; ++j) {
            const bool exit = j < s.exits && !s.call.detach_teacher;
            const Real learns = s.weight[k * s.rows + j] * s.state[k].pair_scale;
            const Real teaches = exit ? s.weight[j * s.rows + k] * s.state[j].pair_scale : Real(0);
            if (learns == 0 && teaches == 0) continue;
            const Row other = row(j, c);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                Real l_k, q_k, l_j, q_j;
                logs(student, v, l_k, q_k);
                logs(other, v, l_j, q_j);
                if (learns != 0) h[v] += learns * pair(q_k, l_k, q_j, l_j).of_student;
                if (teaches != 0) h[v] += teaches * pair(q_j, l_j, q_k, l_k).of_teacher;
            }
        }
    }
    MSDKERN_DEVICE void gradient(int k, int c) const {
        Real h[V] = {};
        const Row student = row(k, c);
        derivative(k, c, student, h);
        const RowState<Real> &state = s.state[k];
        const Real total = state.total, p_scale = state.p_scale, mass_scale = state.mass_scale;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Real gap = to_real(student.stored[v]) - student.maximum;
            const Real e = exponential(gap * s.inverse_t);
            const Real g = softmax_jacobian(h[v], e * student.inverse, total, s.inverse_t);
            h[v] = s.template with_cross_entropy<Home>(g, e, gap, s.class_at(c, v), p_scale,
                                                       mass_scale);
        }
        s.cut.store(s.gradient_of(k), c, h);
    }
    MSDKERN_DEVICE void gradients() const {
#pragma unroll 1
        for (int c = 0; c < s.cut.chunks; ++c)
#pragma unroll 1
            for (int k = 0; k < s.exits; ++k)
                if (s.call.gradient[k]) gradient(k, c);
    }
};

}  // namespace msdkern
