// SPDX-License-Identifier: Apache-2.0
// The sweeps over the classes of one sample: q, l and p of all exits in, divergences and gradients
// out. Everything here works on scratch rows of whole vectors in Real.
#pragma once

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// One sample, seen through a window of its classes.
template <class Real>
struct Sweep {
    int exits, rows;  // rows: exits and external teachers
    // Window: (z - m) / T, its exponential, and the exponential at T = 1.
    const Real *x[MSDKERN_MAX_ROWS], *e[MSDKERN_MAX_ROWS], *one[MSDKERN_MAX_EXITS];
    const Real *mass;              // u, the target's mass on each class, or null
    Real *out[MSDKERN_MAX_EXITS];  // gradient, or null
    // Whole row: l = x - log_t, q = e inverse_t.
    Real log_t[MSDKERN_MAX_ROWS], inverse_t[MSDKERN_MAX_ROWS];
    // Gradient of the cross entropy: p_scale * one - mass_scale * u.
    Real p_scale[MSDKERN_MAX_EXITS], mass_scale[MSDKERN_MAX_EXITS];
    // Divergence of student i: share[i] times a sum over teachers whose weights sum to n[i].
    Real share[MSDKERN_MAX_EXITS], n[MSDKERN_MAX_EXITS];
    Real pair_scale[MSDKERN_MAX_EXITS];  // dL/dD_i
    Real inverse_temperature;
    const Real *weight;  // W[exits][rows], share included
    Real value[MSDKERN_MAX_EXITS];
    Real *matrix;  // D[exits][rows], or null
    bool detach;
    Real beta;
    Real total[MSDKERN_MAX_EXITS];  // sum_c dL/dl of the general sweep
};

// Mixers: mass = sum_j w_j q_j and moment = sum_j w_j q_j d_j over the teachers of student i, asked
// for from the deepest exit to the shallowest. q and d hold NV vectors per row.
template <class V, int NV>
struct Mixture {
    V mass[NV], moment[NV];
    template <class Real>
    INLINE_MEMBER void add(const V *q, const V *d, Real w) {
        for (int v = 0; v < NV; ++v) {
            const V share = q[v] * w;
            mass[v] += share;
            moment[v] += share * d[v];
        }
    }
    INLINE_MEMBER void add(const V *q, const V *d) {
        for (int v = 0; v < NV; ++v) {
            mass[v] += q[v];
            moment[v] += q[v] * d[v];
        }
    }
    INLINE_MEMBER void clear() {
        for (int v = 0; v < NV; ++v) mass[v] = moment[v] = V{};
    }
};

// All exits teach. The student's own share adds nothing to a divergence, so one sum serves all.
template <class Real, int NV>
struct Mutual : Mixture<VecOf<Real>, NV> {
    typedef VecOf<Real> V;
    static const bool kOwnShare = true;
    INLINE_MEMBER void begin(const Sweep<Real> &s, const V (*q)[NV], const V (*d)[NV]) {
        this->clear();
        for (int k = 0; k < s.exits; ++k) this->add(q[k], d[k]);
    }
    INLINE_MEMBER void select(const Sweep<Real> &, int, const V (*)[NV], const V (*)[NV]) {}
    INLINE_MEMBER void passed(int, const V *, const V *) {}
};

// Every deeper exit teaches.
template <class Real, int NV>
struct Deeper : Mixture<VecOf<Real>, NV> {
    typedef VecOf<Real> V;
    static const bool kOwnShare = false;
    INLINE_MEMBER void begin(const Sweep<Real> &, const V (*)[NV], const V (*)[NV]) {
        this->clear();
    }
    INLINE_MEMBER void select(const Sweep<Real> &, int, const V (*)[NV], const V (*)[NV]) {}
    INLINE_MEMBER void passed(int, const V *q, const V *d) { this->add(q, d); }
};

// The next deeper exit teaches.
template <class Real, int NV>
struct Next : Deeper<Real, NV> {
    typedef VecOf<Real> V;
    INLINE_MEMBER void passed(int, const V *q, const V *d) {
        this->clear();
        this->add(q, d);
    }
};

// The deepest exit teaches.
template <class Real, int NV>
struct Last : Deeper<Real, NV> {
    typedef VecOf<Real> V;
    int asked = 0;
    INLINE_MEMBER void passed(int, const V *q, const V *d) {
        if (asked++ == 0) this->add(q, d);
    }
};

// Any weights: K fused multiply-adds per element.
template <class Real, int NV>
struct Dense : Mixture<VecOf<Real>, NV> {
    typedef VecOf<Real> V;
    static const bool kOwnShare = false;
    INLINE_MEMBER void begin(const Sweep<Real> &, const V (*)[NV], const V (*)[NV]) {}
    INLINE_MEMBER void select(const Sweep<Real> &s, int i, const V (*q)[NV], const V (*d)[NV]) {
        this->clear();
        const Real *w = s.weight + i * s.rows;
        for (int r = 0; r < s.rows; ++r) this->add(q[r], d[r], w[r]);
    }
    INLINE_MEMBER void passed(int, const V *, const V *) {}
};

// A whole vector, or only its first `partial` lanes where that is not 0.
template <class Real>
INLINE void store_some(Real *to, VecOf<Real> v, int partial) {
    if (partial)
        store_partial(to, partial, v);
    else
        store(to, v);
}

// (2), (6) NV vectors of classes at offset c: forward KL or soft cross entropy with detached
// teachers, and the whole gradient. One sweep, O(K) but for Dense.
template <class Real, template <class, int> class Mixer, bool kSoft, bool kGradient, int NV>
INLINE void student_tile(const Sweep<Real> &s, int64_t c, VecOf<Real> *value, int partial = 0) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    V q[MSDKERN_MAX_ROWS][NV], d[MSDKERN_MAX_ROWS][NV], reference[NV];
    const int deepest = s.exits - 1;
    for (int v = 0; v < NV; ++v)
        reference[v] = load(s.x[deepest] + c + v * W) - s.log_t[deepest];
    for (int r = 0; r < s.rows; ++r)
        for (int v = 0; v < NV; ++v) {
            q[r][v] = load(s.e[r] + c + v * W) * s.inverse_t[r];
            d[r][v] = (load(s.x[r] + c + v * W) - s.log_t[r]) - reference[v];
        }
    Mixer<Real, NV> mixer;
    mixer.begin(s, q, d);
    for (int i = deepest; i >= 0; --i) {
        mixer.select(s, i, q, d);
        const V n = splat(s.n[i]);
        for (int v = 0; v < NV; ++v) {
            const V q_i = q[i][v], d_i = d[i][v], mass = mixer.mass[v];
            if (kSoft)
                value[i] -= (d_i + reference[v]) * (mixer.kOwnShare ? mass - q_i : mass);
            else
                value[i] += forward_kl_value(q_i, d_i, n, mass, mixer.moment[v]);
            if (kGradient && s.out[i]) {
                V g = forward_kl_gradient(q_i, n, mass) * s.pair_scale[i];
                g += load(s.one[i] + c + v * W) * s.p_scale[i];
                if (s.mass) g -= load(s.mass + c + v * W) * s.mass_scale[i];
                store_some(s.out[i] + c + v * W, g, partial);
            }
        }
        mixer.passed(i, q[i], d[i]);
    }
}

template <class Real, template <class, int> class Mixer, bool kSoft, bool kGradient>
static void student_sweep(Sweep<Real> &s, int64_t classes) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    V value[MSDKERN_MAX_EXITS];
    for (int i = 0; i < s.exits; ++i) value[i] = V{};
    int64_t c = 0;
    for (; c + 2 * W <= classes; c += 2 * W)
        student_tile<Real, Mixer, kSoft, kGradient, 2>(s, c, value);
    for (; c + W <= classes; c += W)
        student_tile<Real, Mixer, kSoft, kGradient, 1>(s, c, value);
    if (c < classes)
        student_tile<Real, Mixer, kSoft, kGradient, 1>(s, c, value, int(classes - c));
    for (int i = 0; i < s.exits; ++i) s.value[i] += s.share[i] * sum<Real>(value[i]);
}

template <class Real>
using SweepFunction = void (*)(Sweep<Real> &, int64_t);

// [pairs][soft][gradient]
template <class Real>
static SweepFunction<Real> find_student_sweep(int pairs, bool soft, bool gradient) {
#define ROW(M)                                                          \
    {                                                                   \
        {student_sweep<Real, M, false, false>, student_sweep<Real, M, false, true>}, \
        {student_sweep<Real, M, true, false>, student_sweep<Real, M, true, true>},   \
    }
    static const SweepFunction<Real> table[5][2][2] = {ROW(Mutual), ROW(Last), ROW(Deeper),
                                                       ROW(Next), ROW(Dense)};
#undef ROW
    return table[pairs - MSDKERN_PAIRS_MUTUAL][soft][gradient];
}

// (6) Cross entropy alone.
template <class Real>
static void cross_entropy_sweep(Sweep<Real> &s, int64_t classes) {
    const int W = kLanes<Real>;
    for (int i = 0; i < s.exits; ++i) {
        if (!s.out[i]) continue;
        for (int64_t c = 0; c < classes; c += W) {
            VecOf<Real> g = load(s.one[i] + c) * s.p_scale[i];
            if (s.mass) g -= load(s.mass + c) * s.mass_scale[i];
            store_some(s.out[i] + c, g, c + W <= classes ? 0 : int(classes - c));
        }
    }
}

// (2), (5), (6) Every divergence, teachers detached or not, pair by pair and with 0 log 0 = 0. The
// first phase sums values and dL/dl, the second writes gradients through the softmax Jacobian.
template <class Real, int kDivergence>
INLINE Pair<VecOf<Real>> pair_terms(const Sweep<Real> &s, int i, int j, int64_t c) {
    typedef VecOf<Real> V;
    const V q_i = load(s.e[i] + c) * s.inverse_t[i], q_j = load(s.e[j] + c) * s.inverse_t[j];
    if (kDivergence == MSDKERN_JSD) return jsd_pair(q_i, q_j, splat(s.beta));
    const V l_i = load(s.x[i] + c) - s.log_t[i], l_j = load(s.x[j] + c) - s.log_t[j];
    if (kDivergence == MSDKERN_FORWARD_KL) return forward_kl_pair(q_i, l_i, q_j, l_j);
    if (kDivergence == MSDKERN_REVERSE_KL) return reverse_kl_pair(q_i, l_i, q_j, l_j);
    return soft_ce_pair(l_i, q_j);
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
            const Real d = sum<Real>(value), scale = w * s.pair_scale[i];
            if (s.matrix) s.matrix[i * s.rows + j] += d;
            if (w == 0) continue;
            s.value[i] += w * d;
            s.total[i] += scale * sum<Real>(of_student);
            if (!s.detach && j < s.exits) s.total[j] += scale * sum<Real>(of_teacher);
        }
}

template <class Real, int kDivergence>
static void pair_gradients(Sweep<Real> &s, int64_t classes) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    V h[MSDKERN_MAX_EXITS];
    for (int64_t c = 0; c < classes; c += W) {
        for (int i = 0; i < s.exits; ++i) h[i] = V{};
        for (int i = 0; i < s.exits; ++i)
            for (int j = 0; j < s.rows; ++j) {
                const Real scale = s.weight[i * s.rows + j] * s.pair_scale[i];
                if (scale == 0) continue;
                const Pair<V> pair = pair_terms<Real, kDivergence>(s, i, j, c);
                h[i] += pair.of_student * scale;
                if (!s.detach && j < s.exits) h[j] += pair.of_teacher * scale;
            }
        for (int i = 0; i < s.exits; ++i) {
            if (!s.out[i]) continue;
            const V q = load(s.e[i] + c) * s.inverse_t[i];
            V g = softmax_jacobian(h[i], q, splat(s.total[i]), splat(s.inverse_temperature));
            g += load(s.one[i] + c) * s.p_scale[i];
            if (s.mass) g -= load(s.mass + c) * s.mass_scale[i];
            store_some(s.out[i] + c, g, c + W <= classes ? 0 : int(classes - c));
        }
    }
}

template <class Real>
static SweepFunction<Real> find_pair_sweep(int divergence, bool gradients) {
    static const SweepFunction<Real> table[4][2] = {
        {pair_values<Real, 0>, pair_gradients<Real, 0>},
        {pair_values<Real, 1>, pair_gradients<Real, 1>},
        {pair_values<Real, 2>, pair_gradients<Real, 2>},
        {pair_values<Real, 3>, pair_gradients<Real, 3>},
    };
    return table[divergence][gradients];
}

}  // namespace MSDKERN_NAMESPACE
