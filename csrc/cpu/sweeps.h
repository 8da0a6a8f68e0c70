// SPDX-License-Identifier: Apache-2.0
// The sweeps over the classes of one sample: q, l and p of all exits in, divergences and gradients
// out. Everything here works on scratch rows of whole vectors in Real.
#pragma once

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// Vectors of classes worked on at once: what is read per exit serves all of them.
constexpr int kTile = 3;

// One sample, seen through a window of its classes.
template <class Real>
struct Sweep {
    int exits, rows, pairs;  // rows: exits and external teachers
    // Window: (z - m) / T, its exponential, and the exponential at T = 1.
    const Real *x[MSDKERN_MAX_ROWS], *e[MSDKERN_MAX_ROWS], *one[MSDKERN_MAX_EXITS];
    const Real *mass;              // u, the target's mass on each class, or null
    Real *out[MSDKERN_MAX_EXITS];  // gradient, or null
    // Whole row: l = x - log_t, q = e inverse_t.
    Real log_t[MSDKERN_MAX_ROWS], inverse_t[MSDKERN_MAX_ROWS];
    // log_t less the deepest exit's, and what rounding does to a row's divergences (slacks()).
    Real gap[MSDKERN_MAX_ROWS], slack[MSDKERN_MAX_ROWS];
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

// q of row r at offset c, and d = l less the l of another row, the reference. The difference of x
// is formed first: it is exact, or nearly, where exits agree.
template <class Real, class V>
INLINE V probability(const Sweep<Real> &s, int r, int64_t c) {
    return load(s.e[r] + c) * s.inverse_t[r];
}
template <class Real, class V>
INLINE V relative_log(const Sweep<Real> &s, int r, int64_t c, V reference_x, Real gap) {
    return (load(s.x[r] + c) - reference_x) - gap;
}

// The normaliser S of a row enters as log S, rounded, and as 1 / S, rounded: then log q and q do
// not quite belong together, and a KL of near-identical exits, which is of second order, inherits
// an error of first order. That error is a constant per row, known here: rounding adds
// slack[j] - slack[i] to sum_c q_j (l_j - l_i) + (q_i - q_j). `sums` holds S on entry.
template <class Real>
static void slacks(Sweep<Real> &s, const Real *sums) {
    double logs[MSDKERN_MAX_ROWS];
    for (int r = 0; r < s.rows; ++r) logs[r] = double(sums[r]);
    logarithms(logs, s.rows);
    for (int r = 0; r < s.rows; ++r) {
        const double gap = logs[r] - logs[s.exits - 1];
        s.log_t[r] = Real(logs[r]);
        s.gap[r] = Real(gap);
        s.inverse_t[r] = 1 / sums[r];
        const double excess = double(s.inverse_t[r]) * double(sums[r]) - 1;
        s.slack[r] = Real((gap - double(s.gap[r])) - excess);
    }
}

// Takes it out of the divergences. W holds the weights, share included.
template <class Real>
static void correct_values(Sweep<Real> &s, int divergence) {
    if (divergence != MSDKERN_FORWARD_KL && divergence != MSDKERN_REVERSE_KL) return;
    const Real sign = divergence == MSDKERN_FORWARD_KL ? Real(1) : Real(-1);
    for (int i = 0; i < s.exits; ++i)
        for (int j = 0; j < s.rows; ++j) {
            const Real error = sign * (s.slack[j] - s.slack[i]);
            const Real w = s.weight[i * s.rows + j];
            if (w != 0) s.value[i] -= w * error;  // a teacher without weight may hold NaN
            if (s.matrix) s.matrix[i * s.rows + j] -= error;
        }
}

// Mixers: mass = sum_j w_j q_j and moment = sum_j w_j q_j d_j over the teachers of student i, asked
// for from the deepest exit to the shallowest, for NV vectors of classes.
template <class Real, int NV>
struct Mixture {
    typedef VecOf<Real> V;
    static const bool kOwnShare = false;
    static const bool kRemembers = false;  // passed() is of interest
    static const bool kChain = false;      // d is taken relative to the exit passed last
    V mass[NV], moment[NV];
    INLINE_MEMBER void clear() {
        for (int v = 0; v < NV; ++v) mass[v] = moment[v] = V{};
    }
    INLINE_MEMBER void begin(const Sweep<Real> &, int64_t, const V *) { clear(); }
    INLINE_MEMBER void select(const Sweep<Real> &, int) {}
    INLINE_MEMBER V gradient(int v, V q, V n) const { return forward_kl_gradient(q, n, mass[v]); }
    INLINE_MEMBER V value(int v, V gradient, V d) const {
        return forward_kl_value(gradient, d, mass[v], moment[v]);
    }
    INLINE_MEMBER void passed(int, int, V, V) {}
};

// All exits teach. The student's own share adds nothing to a divergence, so one sum serves all.
template <class Real, int NV>
struct Mutual : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    static const bool kOwnShare = true;
    // Probabilities are summed relative to the deepest exit's: their differences are exact where
    // exits agree.
    V deepest[NV], excess[NV];
    INLINE_MEMBER V gradient(int v, V q, V n) const {
        return forward_kl_gradient(q - deepest[v], n, excess[v]);
    }
    INLINE_MEMBER void begin(const Sweep<Real> &s, int64_t c, const V *deepest_x) {
        this->clear();
        for (int v = 0; v < NV; ++v) {
            deepest[v] = probability<Real, V>(s, s.exits - 1, c + v * kLanes<Real>);
            excess[v] = V{};
        }
        for (int k = 0; k < s.exits; ++k)
            for (int v = 0; v < NV; ++v) {
                const int64_t at = c + v * kLanes<Real>;
                const V q = probability<Real, V>(s, k, at);
                excess[v] += q - deepest[v];
                this->moment[v] += q * relative_log(s, k, at, deepest_x[v], s.gap[k]);
            }
        for (int v = 0; v < NV; ++v) this->mass[v] = excess[v] + Real(s.exits) * deepest[v];
    }
};

// Every deeper exit teaches.
template <class Real, int NV>
struct Deeper : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    static const bool kRemembers = true;
    INLINE_MEMBER void passed(int, int v, V q, V d) {
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
    INLINE_MEMBER void passed(int, int v, V q, V) { this->mass[v] = q; }
};

// The deepest exit teaches.
template <class Real, int NV>
struct Last : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    int deepest = 0;
    static const bool kRemembers = true;
    INLINE_MEMBER void begin(const Sweep<Real> &s, int64_t, const V *) {
        this->clear();
        deepest = s.exits - 1;
    }
    INLINE_MEMBER void passed(int i, int v, V q, V d) {
        if (i != deepest) return;
        this->mass[v] = q;
        this->moment[v] = q * d;
    }
};

// Any weights. Every student is its own reference: the deepest exit need not teach it, and may be
// far away.
template <class Real, int NV>
struct Dense : Mixture<Real, NV> {
    typedef VecOf<Real> V;
    V q[MSDKERN_MAX_ROWS][NV], x[MSDKERN_MAX_ROWS][NV];
    INLINE_MEMBER void begin(const Sweep<Real> &s, int64_t c, const V *) {
        for (int r = 0; r < s.rows; ++r)
            for (int v = 0; v < NV; ++v) {
                const int64_t at = c + v * kLanes<Real>;
                q[r][v] = probability<Real, V>(s, r, at);
                x[r][v] = load(s.x[r] + at);
            }
    }
    INLINE_MEMBER void select(const Sweep<Real> &s, int i) {
        this->clear();
        for (int r = 0; r < s.rows; ++r) {
            const Real w = s.weight[i * s.rows + r], gap = s.gap[r] - s.gap[i];
            if (w == 0) continue;
            for (int v = 0; v < NV; ++v) {
                const V share = q[r][v] * w;
                this->mass[v] += share;
                this->moment[v] += share * ((x[r][v] - x[i][v]) - gap);
            }
        }
    }
    INLINE_MEMBER V value(int v, V gradient, V) const { return this->moment[v] + gradient; }
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
    V reference_x[NV];
    const int deepest = s.exits - 1;
    Real reference_gap = 0;
    for (int v = 0; v < NV; ++v) reference_x[v] = load(s.x[deepest] + c + v * W);
    Mixer<Real, NV> mixer;
    mixer.begin(s, c, reference_x);
    for (int i = deepest; i >= 0; --i) {
        mixer.select(s, i);
        const V n = splat(s.n[i]);
        const Real distance = s.gap[i] - reference_gap;
        Real *const out = kGradient ? s.out[i] : nullptr;
        V total = V{};
        for (int v = 0; v < NV; ++v) {
            const int64_t at = c + v * W;
            const V q = probability<Real, V>(s, i, at);
            const V d = relative_log(s, i, at, reference_x[v], distance);
            const V mass = mixer.mass[v];
            const V gap = mixer.gradient(v, q, n);
            if (kSoft)
                total -= (load(s.x[i] + at) - s.log_t[i]) * (mixer.kOwnShare ? mass - q : mass);
            else
                total += mixer.value(v, gap, d);
            if (out) {
                V g = gap * s.pair_scale[i];
                g += load(s.one[i] + at) * s.p_scale[i];
                if (s.mass) g -= load(s.mass + at) * s.mass_scale[i];
                store_some(out + at, g, partial);
            }
            if (mixer.kRemembers) mixer.passed(i, v, q, d);
            if (mixer.kChain) reference_x[v] = load(s.x[i] + at);
        }
        if (mixer.kChain) reference_gap = s.gap[i];
        value[i] += total;
    }
}

template <class Real, template <class, int> class Mixer, bool kSoft, bool kGradient>
static void student_sweep(Sweep<Real> &s, int64_t classes) {
    typedef VecOf<Real> V;
    const int W = kLanes<Real>;
    V value[MSDKERN_MAX_EXITS];
    for (int i = 0; i < s.exits; ++i) value[i] = V{};
    int64_t c = 0;
    for (; c + kTile * W <= classes; c += kTile * W)
        student_tile<Real, Mixer, kSoft, kGradient, kTile>(s, c, value);
    for (; c + W <= classes; c += W) student_tile<Real, Mixer, kSoft, kGradient, 1>(s, c, value);
    if (c < classes) student_tile<Real, Mixer, kSoft, kGradient, 1>(s, c, value, int(classes - c));
    for (int i = 0; i < s.exits; ++i) s.value[i] += s.share[i] * sum<Real>(value[i]);
}

template <class Real>
using SweepFunction = void (*)(Sweep<Real> &, int64_t);

// [pairs][soft][gradient]
template <class Real>
static SweepFunction<Real> find_student_sweep(int pairs, bool soft, bool gradient) {
#define ROW(M)                                                                         \
    {                                                                                  \
        {student_sweep<Real, M, false, false>, student_sweep<Real, M, false, true>},   \
            {student_sweep<Real, M, true, false>, student_sweep<Real, M, true, true>}, \
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

}  // namespace MSDKERN_NAMESPACE
