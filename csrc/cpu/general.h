// SPDX-License-Identifier: Apache-2.0
// Divergences that need two sweeps over a sample: every one but forward KL and soft cross entropy
// with detached teachers, and whatever wants the matrix of all pairs.
#pragma once

#include "sweeps.h"

namespace MSDKERN_NAMESPACE {

// (2), (5), (6) Every divergence, teachers detached or not, pair by pair and with 0 log 0 = 0. The
// first phase sums values and dL/dl, the second writes gradients through the softmax Jacobian.
template <class Real, int kDivergence>
INLINE Pair<VecOf<Real>> pair_terms(const Sweep<Real> &s, int i, int j, int64_t c) {
    typedef VecOf<Real> V;
    const V q_i = load(s.e[i] + c) * s.row[i].inverse_t,
            q_j = load(s.e[j] + c) * s.row[j].inverse_t;
    if (kDivergence == MSDKERN_JSD) return jsd_pair(q_i, q_j, splat(s.beta));
    const V x_i = below_maximum<Real>(s, i, c), x_j = below_maximum<Real>(s, j, c);
    if (kDivergence == MSDKERN_SOFT_CE)
        return soft_ce_pair(relative_log(s, x_i, V{}, s.row[i].log_t), q_j);
    // Both less the deepest exit's log-sum, which their difference does not see.
    const V l_i = relative_log(s, x_i, V{}, s.row[i].gap);
    const V l_j = relative_log(s, x_j, V{}, s.row[j].gap);
    if (kDivergence == MSDKERN_FORWARD_KL) return forward_kl_pair(q_i, l_i, q_j, l_j);
    return reverse_kl_pair(q_i, l_i, q_j, l_j);
}

template <class Real, int kDivergence>
static void pair_values(Sweep<Real> &s, int64_t classes) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    for (int i = 0; i < s.exits; ++i)
        for (int j = 0; j < s.rows; ++j) {
            const Real w = s.weight[i * s.rows + j];
            if (w == 0 && !s.matrix) continue;
            V value = V{}, of_student = V{}, of_teacher = V{};
            for (int64_t c = 0; c < classes; c += W) {
                const Pair<V> pair = pair_terms<Real, kDivergence>(s, i, j, c);
                value += pair.value;
                of_student += pair.of_student;
                of_teacher += pair.of_teacher;
            }
            const Real d = sum<Real>(value), scale = w * s.row[i].pair_scale;
            if (s.matrix) s.matrix[i * s.rows + j] += d;
            if (w == 0) continue;
            s.value[i] += w * d;
            if (scale == 0) continue;
            s.total[i] += scale * sum<Real>(of_student);
            if (!s.detach && j < s.exits) s.total[j] += scale * sum<Real>(of_teacher);
        }
}

// dL/dl of every exit at offset c, up to multiples of q.
template <class Real, int kDivergence>
struct PairTerms {
    typedef VecOf<Real> V;
    INLINE_MEMBER static void at(const Sweep<Real> &s, int64_t c, V *h) {
        for (int i = 0; i < s.exits; ++i) h[i] = V{};
        for (int i = 0; i < s.exits; ++i)
            for (int j = 0; j < s.rows; ++j) {
                const Real scale = s.weight[i * s.rows + j] * s.row[i].pair_scale;
                if (scale == 0) continue;
                const Pair<V> pair = pair_terms<Real, kDivergence>(s, i, j, c);
                h[i] += pair.of_student * scale;
                if (!s.detach && j < s.exits) h[j] += pair.of_teacher * scale;
            }
    }
};

// The same for mutual and deeper in O(K): sums over the teachers of a student, and over the
// students of a teacher, are running sums. (last and next are K - 1 pairs anyhow.) Not for JSD,
// whose mixture belongs to the pair, and not where classes are masked with -inf.
template <class V>
INLINE void sum_teachers(int pairs, int exits, const V *x, V *result) {
    V total = V{};
    if (pairs == MSDKERN_PAIRS_MUTUAL)
        for (int k = 0; k < exits; ++k) total += x[k];
    for (int i = exits - 1; i >= 0; --i) {
        result[i] = pairs == MSDKERN_PAIRS_MUTUAL ? total - x[i] : total;
        if (pairs == MSDKERN_PAIRS_DEEPER) total += x[i];
    }
}

template <class V>
INLINE void sum_students(int pairs, int exits, const V *x, V *result) {
    if (pairs == MSDKERN_PAIRS_MUTUAL) return sum_teachers(pairs, exits, x, result);
    V total = V{};
    for (int j = 0; j < exits; ++j) {
        result[j] = total;
        total += x[j];
    }
}

template <class Real, int kDivergence>
struct NamedTerms {
    typedef VecOf<Real> V;
    static const bool kForward = kDivergence == MSDKERN_FORWARD_KL;
    static const bool kReverse = kDivergence == MSDKERN_REVERSE_KL;

    INLINE_MEMBER static void at(const Sweep<Real> &s, int64_t c, V *h, V *value = nullptr) {
        V q[MSDKERN_MAX_EXITS], d[MSDKERN_MAX_EXITS], mass[MSDKERN_MAX_EXITS];
        V other[MSDKERN_MAX_EXITS], work[MSDKERN_MAX_EXITS];
        const int exits = s.exits, pairs = s.pairs;
        // Soft cross entropy takes l itself, the divergences l relative to the deepest exit's.
        const V deepest = below_maximum<Real>(s, exits - 1, c);
        for (int k = 0; k < exits; ++k) {
            q[k] = probability<V>(s, k, c);
            const V x = below_maximum<Real>(s, k, c);
            if (kForward || kReverse)
                d[k] = relative_log(s, x, deepest, s.row[k].gap);
            else
                d[k] = relative_log(s, x, V{}, s.row[k].log_t);
            work[k] = kForward ? q[k] * d[k] : d[k];
        }
        sum_teachers(pairs, exits, q, mass);
        if (kForward || kReverse) sum_teachers(pairs, exits, work, other);
        for (int i = 0; i < exits; ++i) {
            // The student's own share is not in these sums.
            const Real n = s.n[i] - Real(pairs == MSDKERN_PAIRS_MUTUAL ? 1 : 0);
            const V gap = q[i] * (n * d[i] - other[i]);  // for reverse KL
            if (value && kForward)
                value[i] = forward_kl_value(forward_kl_gradient(q[i], splat(n), mass[i]), d[i],
                                            mass[i], other[i]);
            if (value && kReverse) value[i] = gap + (mass[i] - n * q[i]);
            if (value && !kForward && !kReverse) value[i] = -(d[i] * mass[i]);
            h[i] = (kReverse ? gap : -mass[i]) * coefficient(s, i);
        }
        if (!s.detach) add_teaching(s, q, d, other, work, h);
    }
    INLINE_MEMBER static Real coefficient(const Sweep<Real> &s, int i) {
        return s.row[i].pair_scale * s.share[i];
    }
    INLINE_MEMBER static void add_teaching(const Sweep<Real> &s, const V *q, const V *d, V *other,
                                           V *work, V *h) {
        for (int i = 0; i < s.exits; ++i) work[i] = (kReverse ? q[i] : d[i]) * coefficient(s, i);
        sum_students(s.pairs, s.exits, work, other);
        if (kForward) {
            V weight[MSDKERN_MAX_EXITS];
            for (int i = 0; i < s.exits; ++i) work[i] = splat(coefficient(s, i));
            sum_students(s.pairs, s.exits, work, weight);
            for (int j = 0; j < s.exits; ++j) other[j] -= d[j] * weight[j];
        }
        for (int j = 0; j < s.exits; ++j) h[j] -= kReverse ? other[j] : q[j] * other[j];
    }
};

template <class Real, int kDivergence>
static void named_values(Sweep<Real> &s, int64_t classes) {
    typedef VecOf<Real> V;
    V h[MSDKERN_MAX_EXITS], v[MSDKERN_MAX_EXITS];
    V total[MSDKERN_MAX_EXITS] = {}, value[MSDKERN_MAX_EXITS] = {};
    for (int64_t c = 0; c < classes; c += kLanes<Real>) {
        NamedTerms<Real, kDivergence>::at(s, c, h, v);
        for (int k = 0; k < s.exits; ++k) {
            total[k] += h[k];
            value[k] += v[k];
        }
    }
    for (int k = 0; k < s.exits; ++k) {
        s.total[k] += sum<Real>(total[k]);
        s.value[k] += s.share[k] * sum<Real>(value[k]);
    }
}

template <class S, class Terms>
static void general_gradients(Sweep<RealOf<S>> &s, int64_t classes) {
    typedef RealOf<S> Real;
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    V h[MSDKERN_MAX_EXITS];
    for (int64_t c = 0; c < classes; c += W) {
        Terms::at(s, c, h);
        for (int i = 0; i < s.exits; ++i) {
            if (!s.out[i]) continue;
            const V q = probability<V>(s, i, c);
            const V g = softmax_jacobian(h[i], q, splat(s.total[i]), splat(s.inverse_temperature));
            const V one = at_one<V>(s, s.power, i, c);
            if (c + W <= classes)
                write_gradient<S, Writes::kAny>(s, i, c, g, one, Whole());
            else
                write_gradient<S, Writes::kAny>(s, i, c, g, one, First{int(classes - c)});
        }
    }
}

// A divergence that needs two sweeps: the values, then the gradients.
template <class Real>
struct TwoSweeps {
    SweepFunction<Real> values, gradients;
};

template <class S, class Real = RealOf<S>>
static TwoSweeps<Real> find_pair_sweeps(int divergence) {
    static const TwoSweeps<Real> table[4] = {
        {pair_values<Real, 0>, general_gradients<S, PairTerms<Real, 0>>},
        {pair_values<Real, 1>, general_gradients<S, PairTerms<Real, 1>>},
        {pair_values<Real, 2>, general_gradients<S, PairTerms<Real, 2>>},
        {pair_values<Real, 3>, general_gradients<S, PairTerms<Real, 3>>},
    };
    return table[divergence];
}

template <class S, class Real = RealOf<S>>
static TwoSweeps<Real> find_named_sweeps(int divergence) {
    if (divergence == MSDKERN_FORWARD_KL)
        return {named_values<Real, 0>, general_gradients<S, NamedTerms<Real, 0>>};
    if (divergence == MSDKERN_REVERSE_KL)
        return {named_values<Real, 1>, general_gradients<S, NamedTerms<Real, 1>>};
    return {named_values<Real, 3>, general_gradients<S, NamedTerms<Real, 3>>};
}

}  // namespace MSDKERN_NAMESPACE
