// SPDX-License-Identifier: Apache-2.0
// (2), (6) The sweeps over the classes of one sample that give divergences and gradients.
#pragma once

#include "sample.cuh"

namespace msdkern {

// One chunk of classes of all exits, from the deepest to the shallowest: forward KL or soft cross
// entropy with detached teachers, and the whole gradient. The teachers of every student are a
// running sum, so the work is O(K); with a matrix of weights it is O(K) per student.
template <class S, class Home>
struct Mixture {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>;
    const Sample<S> &s;
    Home &home;
    const int i, pairs;
    const bool mutual, soft;
    Real reference_gap = 0;
    // mass = sum_j w_j q_j, moment = sum_j w_j q_j d_j with d relative to a reference exit. For
    // mutual pairs probabilities are summed less the deepest exit's: exact where exits agree.
    Real reference[V] = {}, mass[V] = {}, moment[V] = {}, deepest[V] = {}, excess[V] = {},
         u[V] = {};

    MSDKERN_DEVICE Mixture(const Sample<S> &s_, Home &h, int chunk)
        : s(s_),
          home(h),
          i(chunk),
          pairs(s_.call.pairs),
          mutual(pairs == MSDKERN_PAIRS_MUTUAL),
          soft(s_.call.divergence == MSDKERN_SOFT_CE) {
        if (s.dense_target && s.gradient) s.masses(i, u);
    }
    MSDKERN_DEVICE void probabilities(int r, Real (&x)[V], Real (&e)[V], Real (&q)[V]) const {
        s.terms(home, r, i, x, e);
        const Real inverse = s.state[r].inverse_t;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            x[v] = bounded(x[v]);
            q[v] = e[v] * inverse;
        }
    }
    // All exits teach. The student's own share adds nothing to a divergence.
    MSDKERN_DEVICE void all_teach() {
        each_down<Home::kRows>(s.exits, [&](int k) {
            Real x[V], e[V], q[V];
            probabilities(k, x, e, q);
            const Real gap = s.state[k].gap;
            const bool first = k == s.exits - 1;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (first) deepest[v] = q[v];
                if (first) reference[v] = x[v];
                excess[v] += q[v] - deepest[v];
                moment[v] += q[v] * ((x[v] - reference[v]) - gap);
            }
        });
#pragma unroll
        for (int v = 0; v < V; ++v) mass[v] = excess[v] + Real(s.exits) * deepest[v];
    }
    // Any weights. Every student is its own reference: the deepest exit may be far away.
    MSDKERN_DEVICE void select(int k, const Real (&x)[V]) {
#pragma unroll
        for (int v = 0; v < V; ++v) mass[v] = moment[v] = 0;
#pragma unroll 1
        for (int r = 0; r < s.rows; ++r) {
            const Real w = s.weight[k * s.rows + r];
            if (w == 0) continue;
            Real x_r[V], e_r[V], q_r[V];
            probabilities(r, x_r, e_r, q_r);
            const Real gap = s.state[r].gap - s.state[k].gap;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                mass[v] += q_r[v] * w;
                moment[v] += q_r[v] * w * ((x_r[v] - x[v]) - gap);
            }
        }
    }
    // Exit k becomes a teacher of the shallower ones.
    MSDKERN_DEVICE void passed(int k, const Real (&x)[V], const Real (&q)[V], const Real (&d)[V]) {
        if (pairs == MSDKERN_PAIRS_DEEPER || (pairs == MSDKERN_PAIRS_LAST && k == s.exits - 1)) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                mass[v] += q[v];
                moment[v] += q[v] * d[v];
            }
        } else if (pairs == MSDKERN_PAIRS_NEXT) {
            reference_gap = s.state[k].gap;  // it is the reference, so its own moment is 0
#pragma unroll
            for (int v = 0; v < V; ++v) {
                mass[v] = q[v];
                reference[v] = x[v];
            }
        }
    }
    MSDKERN_DEVICE Real value(int v, Real gap, Real x, Real q, Real d, Real log_t) const {
        if (soft) return (log_t - x) * (mutual ? mass[v] - q : mass[v]);
        if (pairs == MSDKERN_PAIRS_DENSE) return moment[v] + gap;
        return forward_kl_value(gap, d, mass[v], moment[v]);
    }
    MSDKERN_DEVICE void exit(int k) {
        Real x[V], e[V], q[V], d[V], g[V], total = 0;
        probabilities(k, x, e, q);
        if (k == s.exits - 1 && !mutual)
#pragma unroll
            for (int v = 0; v < V; ++v) reference[v] = x[v];
        if constexpr (Home::kRows == 0)
            if (pairs == MSDKERN_PAIRS_DENSE) select(k, x);
        const RowState<Real> &state = s.state[k];
        const Real n = state.n, distance = state.gap - reference_gap, log_t = state.log_t;
        const Real scale = state.pair_scale;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            d[v] = (x[v] - reference[v]) - distance;
            const Real gap = mutual ? forward_kl_gradient(q[v] - deepest[v], n, excess[v])
                                    : forward_kl_gradient(q[v], n, mass[v]);
            total += value(v, gap, x[v], q[v], d[v], log_t);
            g[v] = gap * scale;
        }
        home.value(k) += total;
        if (s.call.gradient[k]) s.write(home, k, i, g, e, x, u);
        passed(k, x, q, d);
    }
    MSDKERN_DEVICE void run() {
        if (mutual) all_teach();
        each_down<Home::kRows>(s.exits, [&](int k) { exit(k); });
    }
    MSDKERN_DEVICE void cross_entropies() const {
        each<Home::kRows>(s.exits, [&](int k) {
            if (!s.call.gradient[k]) return;
            Real x[V], e[V], g[V] = {};
            s.terms(home, k, i, x, e);
            s.write(home, k, i, g, e, x, u);
        });
    }
};

// Values of all exits into RowState::value, gradients where they belong.
template <class S, class Home>
MSDKERN_DEVICE void sweep_students(Sample<S> &s, Home &home) {
    if (!s.divergent && !s.gradient) return;
    each<Home::kRows>(s.exits, [&](int k) { home.value(k) = 0; });
    each<Home::kChunks>(s.cut.chunks, [&](int i) {
        Mixture<S, Home> mixture(s, home, i);
        if (s.divergent)
            mixture.run();
        else
            mixture.cross_entropies();
    });
    if (!s.divergent) return;
    each<Home::kRows>(s.exits,
                      [&](int k) { s.exchange.template put<Sum>(s.team, k, home.value(k)); });
    s.exchange.template finish<Sum>(s.team, s.exits);
    for (int k = s.team.local; k < s.exits; k += s.team.lanes)
        s.state[k].value = s.state[k].share * s.exchange.get(k);
}

// The careful sweeps: every divergence, pair by pair, with 0 log 0 = 0.
template <class S, class Home>
struct Pairs {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>;
    Sample<S> &s;
    const Home &home;
    double *matrix;  // sums of D[exits][rows] over samples, or null

    // q and l of row r at a chunk; for KL less the deepest exit's log-sum, which cancels.
    MSDKERN_DEVICE void logs(int r, int i, Real (&l)[V], Real (&q)[V]) const {
        s.terms(home, r, i, l, q);
        const RowState<Real> &state = s.state[r];
        const Real gap = s.call.divergence == MSDKERN_SOFT_CE ? state.log_t : state.gap;
        const Real inverse = state.inverse_t;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            l[v] -= gap;
            q[v] *= inverse;
        }
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
            Real l_i[V], q_i[V], l_j[V], q_j[V];
            logs(i, c, l_i, q_i);
            logs(j, c, l_j, q_j);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Pair<Real> p = pair(q_i[v], l_i[v], q_j[v], l_j[v]);
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
    MSDKERN_DEVICE void derivative(int k, int c, const Real (&l_k)[V], const Real (&q_k)[V],
                                   Real (&h)[V]) const {
#pragma unroll 1
        for (int j = 0; j < s.rows; ++j) {
            const bool exit = j < s.exits && !s.call.detach_teacher;
            const Real learns = s.weight[k * s.rows + j] * s.state[k].pair_scale;
            const Real teaches = exit ? s.weight[j * s.rows + k] * s.state[j].pair_scale : Real(0);
            if (learns == 0 && teaches == 0) continue;
            Real l_j[V], q_j[V];
            logs(j, c, l_j, q_j);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (learns != 0) h[v] += learns * pair(q_k[v], l_k[v], q_j[v], l_j[v]).of_student;
                if (teaches != 0) h[v] += teaches * pair(q_j[v], l_j[v], q_k[v], l_k[v]).of_teacher;
            }
        }
    }
    MSDKERN_DEVICE void gradients() const {
#pragma unroll 1
        for (int c = 0; c < s.cut.chunks; ++c) {
            Real u[V] = {};
            if (s.dense_target) s.masses(c, u);
#pragma unroll 1
            for (int k = 0; k < s.exits; ++k) {
                if (!s.call.gradient[k]) continue;
                Real l[V], q[V], h[V] = {}, x[V], e[V];
                logs(k, c, l, q);
                derivative(k, c, l, q, h);
                const Real total = s.state[k].total;
#pragma unroll
                for (int v = 0; v < V; ++v) h[v] = softmax_jacobian(h[v], q[v], total, s.inverse_t);
                s.terms(home, k, c, x, e);
                s.write(home, k, c, h, e, x, u);
            }
        }
    }
};

}  // namespace msdkern
