// SPDX-License-Identifier: Apache-2.0
// The sweeps over the classes of one sample: q, l and p of all exits in, divergences and gradients
// out. Logits and gradients are the caller's rows, in their storage type S, whose ends are read and
// written in part; exponentials and what else is kept are in Real and in whole vectors.
#pragma once

#include "mixers.h"

namespace MSDKERN_NAMESPACE {

// Vectors of classes worked on at once: what is read per exit serves all of them.
constexpr int kTile = 3;

// What is constant along a row of logits z. With x = z - maximum, l = x / T - log_t and
// q = e inverse_t; gap is log_t less the deepest exit's, slack what rounding does to the row's
// divergences (group.h). The gradient of the cross entropy is p_scale exp(x) - mass_scale u, and
// pair_scale is dL/dD_i of a student.
template <class Num>
struct RowConstants {
    Num maximum, log_t, inverse_t, gap, slack, p_scale, mass_scale, pair_scale;
};

// One sample, seen through a window of its classes. Num is what is constant along a row: a number;
// or a vector of them where the lanes are samples and each class is a vector (lanes.h). The sweeps
// read these numbers again for each vector of classes, broadcast from memory: were they local to a
// sweep, the compiler would hold them as vectors, ten times what there are registers for.
template <class Real, class Num = Real>
struct Sweep {
    int exits, rows, pairs;  // rows: exits and external teachers
    const Powers power;
    const Rate<Real> rate;
    // Window: logits z, e = exp((z - m) / T), and what exp(z - m) is raised from: e or itself.
    const void *z[MSDKERN_MAX_ROWS];
    const Real *e[MSDKERN_MAX_ROWS], *one[MSDKERN_MAX_EXITS];
    const Real *mass;              // u, the target's mass on each class, or null
    void *out[MSDKERN_MAX_EXITS];  // gradient, or null
    bool streams;                  // past the caches
    RowConstants<Num> *row;        // of each row
    // Divergence of student i: share[i] times a sum over teachers whose weights sum to n[i].
    Real share[MSDKERN_MAX_EXITS], n[MSDKERN_MAX_EXITS];
    Real inverse_temperature;
    const Real *weight;  // W[exits][rows], share included
    Num value[MSDKERN_MAX_EXITS];
    // Or, where not null: [exits][lanes] of what one sweep finds, before it is folded and times
    // share.
    VecOf<Real> *values;
    Real *matrix;  // D[exits][rows], or null
    bool detach;
    Real beta;
    Num total[MSDKERN_MAX_EXITS];  // sum_c dL/dl of the general sweep
    Sweep(Powers p, Rate<Real> r) : power(p), rate(r) {}
};

// A sweep with the constants of its rows.
template <class Real, class Num = Real>
struct OwnSweep : Sweep<Real, Num> {
    RowConstants<Num> constants[MSDKERN_MAX_ROWS];
    OwnSweep(Powers p, Rate<Real> r) : Sweep<Real, Num>(p, r) { this->row = constants; }
    OwnSweep(const OwnSweep &) = delete;
};

template <class S>
INLINE void put(S *to, StoredIn<S> v, Whole, bool streams) {
    streams ? stream(to, v) : store(to, v);
}
template <class S>
INLINE void put(S *to, StoredIn<S> v, First part, bool) {
    store_partial(to, part.lanes, v);
}

// q and x = z - m of row r at offset c, and d = l less the l of another row, the reference. The
// difference of x is formed first: it is exact, or nearly, where exits agree.
template <class V, class Real, class Num>
INLINE V probability(const Sweep<Real, Num> &s, int r, int64_t c) {
    return load(s.e[r] + c) * s.row[r].inverse_t;
}
template <class S, class Source, class Part = Whole>
INLINE StoredIn<S> below_maximum(const Source &s, int r, int64_t c, Part part = {}) {
    return load_some(static_cast<const S *>(s.z[r]) + c, part) - s.row[r].maximum;
}
template <class V, class Real, class Num, class Gap>
INLINE V relative_log(const Sweep<Real, Num> &s, V x, V reference, Gap gap) {
    return (x - reference) * s.inverse_temperature - gap;
}

// exp(z - m) of exit i.
template <class V, class Real, class Num>
INLINE V at_one(const Sweep<Real, Num> &s, Powers power, int i, int64_t c) {
    return raised(power, load(s.one[i] + c));
}

// Takes what rounding does to the divergences out of them (group.h). W holds the weights, share
// included.
template <class Real, class Num>
static void correct_values(Sweep<Real, Num> &s, int divergence) {
    if (divergence != MSDKERN_FORWARD_KL && divergence != MSDKERN_REVERSE_KL) return;
    const Real sign = divergence == MSDKERN_FORWARD_KL ? Real(1) : Real(-1);
    if (s.pairs == MSDKERN_PAIRS_MUTUAL && !s.matrix) {
        Num total = s.row[0].slack;
        for (int j = 1; j < s.exits; ++j) total += s.row[j].slack;
        for (int i = 0; i < s.exits; ++i)
            s.value[i] -= (sign * s.share[i]) * (total - Real(s.exits) * s.row[i].slack);
        return;
    }
    for (int i = 0; i < s.exits; ++i)
        for (int j = 0; j < s.rows; ++j) {
            const Num error = sign * (s.row[j].slack - s.row[i].slack);
            const Real w = s.weight[i * s.rows + j];
            if (w != 0) s.value[i] -= w * error;  // a teacher without weight may hold NaN
            if constexpr (sizeof(Num) == sizeof(Real))
                if (s.matrix) s.matrix[i * s.rows + j] -= error;
        }
}

// q and x of every row for NV vectors of classes, read once. With K known the compiler keeps them
// in registers; K = 0 stands for any number.
template <class S, int NV, int K>
struct Tile {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    static const int kExits = K, kRows = K ? K : MSDKERN_MAX_ROWS;
    V q[kRows][NV], x[kRows][NV];
    template <class Source, class Part>
    INLINE_MEMBER void read(const Source &s, int rows, int64_t c, Part part) {
        each<K>(rows, [&](int r) __attribute__((always_inline)) {
            for (int v = 0; v < NV; ++v) {
                x[r][v] = below_maximum<S>(s, r, c + v * kLanes<Real>, part);
                q[r][v] = probability<V>(s, r, c + v * kLanes<Real>);
            }
        });
    }
    // d of row r less row j's: 0 where they agree, and nearly exact where they almost do.
    template <class Source, class Gap>
    INLINE_MEMBER V distance(const Source &s, int r, int j, int v, Gap gap) const {
        return relative_log(s, x[r][v], x[j][v], gap);
    }
    // x becomes d, less the deepest exit's.
    template <class Source>
    INLINE_MEMBER void relate(const Source &s, int exits) {
        each<K>(exits - 1, [&](int k) __attribute__((always_inline)) {
            for (int v = 0; v < NV; ++v) x[k][v] = distance(s, k, exits - 1, v, s.row[k].gap);
        });
        for (int v = 0; v < NV; ++v) x[exits - 1][v] = V{};
    }
};

// Which gradients are written: none; of all exits, to the caches, without mass on other classes
// than the label's; or as the sweep says. What the sweep need not be asked the compiler need not
// keep at hand.
enum class Writes { kNone, kPlain, kAny };

// (6) The gradient at offset `at`: what comes of the divergences, and the cross entropy's.
template <class S, Writes kWrites, class Source, class V, class Part>
INLINE void write_gradient(const Source &s, int i, int64_t at, V g, V one, Part part) {
    const bool any = kWrites == Writes::kAny;
    g += one * s.row[i].p_scale;
    if (any && s.mass) g -= load(s.mass + at) * s.row[i].mass_scale;
    put(static_cast<S *>(s.out[i]) + at, g, part, any && s.streams);
}

// (2), (6) NV vectors of classes at offset c: forward KL or soft cross entropy with detached
// teachers, and the whole gradient. One sweep, O(K) but for Dense.
template <class S, template <class, int> class Mixer, bool kSoft, Writes kWrites, int NV, int K,
          class Real, class Num, class Part>
INLINE void student_tile(const Sweep<Real, Num> &s, Powers power, int64_t c, VecOf<Real> *value,
                         VecOf<Real> &common, Part part) {
    typedef VecOf<Real> V;
    typedef Mixer<Real, NV> M;
    const int W = kLanes<Real>, exits = K ? K : s.exits, rows = K ? K : s.rows;
    Tile<S, NV, K> tile;
    tile.read(s, M::kAllRows ? rows : exits, c, part);
    const bool related = !kSoft && !M::kChain && !M::kAllRows;
    if (related) tile.relate(s, exits);
    M mixer;
    mixer.begin(s, tile, exits);
    if (M::kCommon && !kSoft)
        for (int v = 0; v < NV; ++v) common += mixer.common(v);
    each<K>(exits, [&](int done) __attribute__((always_inline)) {
        const int i = exits - 1 - done;
        mixer.select(s, tile, rows, i);
        const V n = splat(s.n[i]);
        const int reference = M::kChain && i + 1 < exits ? i + 1 : exits - 1;
        for (int v = 0; v < NV; ++v) {
            const int64_t at = c + v * W;
            const V q = tile.q[i][v];
            const V d =
                related ? tile.x[i][v]
                        : tile.distance(s, i, reference, v, s.row[i].gap - s.row[reference].gap);
            const V gradient = mixer.gradient(v, q, n);
            if (kSoft)
                value[i] -= relative_log(s, tile.x[i][v], V{}, s.row[i].log_t) * mixer.others(v, q);
            else if (!M::kCommon || done != 0)  // the deepest exit has the common part alone
                value[i] += mixer.value(v, gradient, d);
            if (kWrites == Writes::kPlain || (kWrites == Writes::kAny && s.out[i]))
                write_gradient<S, kWrites>(s, i, at, gradient * s.row[i].pair_scale,
                                           at_one<V>(s, power, i, at), part);
            if (M::kRemembers) mixer.passed(i == exits - 1, v, q, d);
        }
    });
}

template <class S, class Num, template <class, int> class Mixer, bool kSoft, Writes kWrites, int K>
static void student_sweep(Sweep<RealOf<S>, Num> &s, int64_t classes) {
    typedef RealOf<S> Real;
    typedef VecOf<Real> V;
    // One vector of each exit at a time where there are registers for all; of two exits as many.
    const int W = kLanes<Real>, NV = K > 2 ? 1 : kTile;
    V value[K ? K : MSDKERN_MAX_EXITS], common = V{};
    const int exits = K ? K : s.exits;
    for (int i = 0; i < exits; ++i) value[i] = V{};
    const auto tiles = [&](auto power) __attribute__((always_inline)) {
        int64_t c = 0;
        for (; c + NV * W <= classes; c += NV * W)
            student_tile<S, Mixer, kSoft, kWrites, NV, K>(s, power, c, value, common, Whole());
        for (; c + W <= classes; c += W)
            student_tile<S, Mixer, kSoft, kWrites, 1, K>(s, power, c, value, common, Whole());
        if (c < classes)
            student_tile<S, Mixer, kSoft, kWrites, 1, K>(s, power, c, value, common,
                                                         First{int(classes - c)});
    };
    if constexpr (kWrites == Writes::kPlain)
        with_power(s.power, tiles);
    else
        tiles(s.power);
    if (Mixer<Real, NV>::kCommon)
        for (int i = 0; i < exits; ++i) value[i] += common;
    if (s.values)
        for (int i = 0; i < exits; ++i) s.values[i * W] = value[i];
    else
        for (int i = 0; i < exits; ++i) s.value[i] += s.share[i] * per_sample(value[i], Num());
}

template <class Real, class Num = Real>
using SweepFunction = void (*)(Sweep<Real, Num> &, int64_t);

// [pairs][soft][gradient], any number of exits.
template <class S, class Num>
static SweepFunction<RealOf<S>, Num> find_student_sweep(int pairs, bool soft, bool gradient) {
#define ONE(M, soft, writes) student_sweep<S, Num, M, soft, Writes::writes, 0>
#define ROW(M)                                                                                   \
    {                                                                                            \
        {ONE(M, false, kNone), ONE(M, false, kAny)}, { ONE(M, true, kNone), ONE(M, true, kAny) } \
    }
    static const SweepFunction<RealOf<S>, Num> table[5][2][2] = {
        ROW(Mutual), ROW(Last), ROW(Deeper), ROW(Next), ROW(Dense)};
#undef ROW
#undef ONE
    return table[pairs - MSDKERN_PAIRS_MUTUAL][soft][gradient];
}

// [exits - 2], few exits and no external teachers: forward KL in float, unrolled where that pays.
// Null where there is none.
template <class S, class Num>
static SweepFunction<RealOf<S>, Num> find_unrolled(int pairs, int exits, Writes writes) {
    if constexpr (sizeof(RealOf<S>) == sizeof(float)) {
        constexpr int kMost = 8;
        constexpr Writes kNone = Writes::kNone, kPlain = Writes::kPlain, kAny = Writes::kAny;
#define ONE(M, K, w) student_sweep<S, Num, M, false, w, K>
#define ROW(M, w)                                                                           \
    {                                                                                       \
        ONE(M, 2, w), ONE(M, 3, w), ONE(M, 4, w), ONE(M, 5, w), ONE(M, 6, w), ONE(M, 7, w), \
            ONE(M, kMost, w)                                                                \
    }
        static const SweepFunction<RealOf<S>, Num> mutual[][kMost - 1] = {
            ROW(Mutual, kNone), ROW(Mutual, kPlain), ROW(Mutual, kAny)};
        static const SweepFunction<RealOf<S>, Num> last[][kMost - 1] = {
            ROW(Last, kNone), ROW(Last, kPlain), ROW(Last, kAny)};
        static const SweepFunction<RealOf<S>, Num> dense[kMost - 1] = ROW(Dense, kAny);
#undef ROW
#undef ONE
        if (exits < 2 || exits > kMost) return nullptr;
        if (pairs == MSDKERN_PAIRS_MUTUAL) return mutual[int(writes)][exits - 2];
        if (pairs == MSDKERN_PAIRS_LAST) return last[int(writes)][exits - 2];
        if (pairs == MSDKERN_PAIRS_DENSE && writes != kNone) return dense[exits - 2];
    }
    return nullptr;
}

// Cross entropy alone.
template <class S, class Num, Writes kWrites>
static void cross_entropy_sweep(Sweep<RealOf<S>, Num> &s, int64_t classes) {
    typedef VecOf<RealOf<S>> V;
    const int W = kLanes<RealOf<S>>;
    with_power(s.power, [&](auto power) __attribute__((always_inline)) {
        const auto vector = [&](int i, int64_t c, auto part) __attribute__((always_inline)) {
            write_gradient<S, kWrites>(s, i, c, V{}, at_one<V>(s, power, i, c), part);
        };
        for (int i = 0; i < s.exits; ++i) {
            if (!s.out[i]) continue;
            int64_t c = 0;
            for (; c + W <= classes; c += W) vector(i, c, Whole());
            if (c < classes) vector(i, c, First{int(classes - c)});
        }
    });
}

// The fastest sweep for what is wanted.
template <class S, class Num>
static SweepFunction<RealOf<S>, Num> find_sweep(const msdkern_loss &call, Writes writes) {
    if (call.pairs == MSDKERN_PAIRS_NONE)
        return writes == Writes::kPlain ? cross_entropy_sweep<S, Num, Writes::kPlain>
                                        : cross_entropy_sweep<S, Num, Writes::kAny>;
    const bool soft = call.divergence == MSDKERN_SOFT_CE;
    if (!soft && !call.teachers)
        if (const auto unrolled = find_unrolled<S, Num>(call.pairs, call.exits, writes))
            return unrolled;
    return find_student_sweep<S, Num>(call.pairs, soft, writes != Writes::kNone);
}

}  // namespace MSDKERN_NAMESPACE
