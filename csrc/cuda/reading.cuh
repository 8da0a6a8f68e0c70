// SPDX-License-Identifier: Apache-2.0
// What a gate or a statistic reads of a row, in one read of it, whatever its length and alignment.
// A thread takes pieces of the row and rescales what it summed when a larger maximum appears; then
// the threads of the team merge what they found. Which classes a thread owns follows from the
// number of classes alone: neither the other rows nor the alignment change a row's result.
#pragma once

#include "rows.cuh"

namespace msdkern {

constexpr int kDeep = 4;             // loads of 16 bytes that a thread has in flight
constexpr int kMostParts = 8;        // warps of a block, blocks of a cluster
constexpr int kNowhere = INT32_MAX;  // no class

// What is needed of a row besides its maximum and the first class that is it.
enum Need { kNothing = 0, kSum = 1, kWeighted = 2, kRunnerUp = 4, kSquares = 8, kAll = 15 };

template <class Real>
struct Reading {
    Real top, runner_up;          // the largest logit, and the largest but one
    Real sum, weighted, squares;  // with x = (z - top) scale: sum b^x, sum x b^x, sum b^2x
    int at;                       // the first class that is `top`
};

// Exponentials have the base b that the device is quickest at: two for float.
MSDKERN_DEVICE float power(float x) { return exp2_approx(x); }
MSDKERN_DEVICE double power(double x) { return exp(x); }
template <class Real>
constexpr double kLogBase = 1;
template <>
constexpr double kLogBase<float> = 0.6931471805599453;

MSDKERN_DEVICE float smaller(float a, float b) { return fminf(a, b); }
MSDKERN_DEVICE double smaller(double a, double b) { return fmin(a, b); }

template <class Real>
MSDKERN_DEVICE Reading<Real> nothing_read() {
    return {lowest<Real>(), lowest<Real>(), 0, 0, 0, kNowhere};
}

// Sums relative to another maximum, `gap` below it. A part whose classes are all masked has summed
// nothing but, perhaps, NaN, which stays.
template <int kNeeds, class Real>
MSDKERN_DEVICE void rescale(Reading<Real> &r, Real gap) {
    gap = r.top > lowest<Real>() ? gap : Real(0);
    const Real factor = power(gap);
    // Of logits that lie so far apart that `gap` overflows, nothing is left.
    if (kNeeds & kWeighted) r.weighted = weigh(factor, r.weighted + r.sum * gap);
    if (kNeeds & kSquares) r.squares *= factor * factor;
    r.sum *= factor;
}

// The same whichever of the two comes first, to the bit.
template <int kNeeds, class Real>
MSDKERN_DEVICE Reading<Real> merged(const Reading<Real> &a, const Reading<Real> &b, Real scale) {
    const bool b_wins = b.top > a.top || (b.top == a.top && b.at < a.at);
    Reading<Real> high = b_wins ? b : a, low = b_wins ? a : b;
    if (kNeeds & kRunnerUp) high.runner_up = larger(larger(high.runner_up, low.runner_up), low.top);
    if (kNeeds & kSum) rescale<kNeeds>(low, (low.top - high.top) * scale);
    high.sum += low.sum;
    if (kNeeds & kWeighted) high.weighted += low.weighted;
    if (kNeeds & kSquares) high.squares += low.squares;
    return high;
}

template <int kNeeds, class Real>
MSDKERN_DEVICE Reading<Real> over_lanes(Reading<Real> r, unsigned mask, int width, Real scale) {
#pragma unroll 1
    for (int o = width / 2; o > 0; o /= 2) {
        Reading<Real> other = nothing_read<Real>();
        other.top = __shfl_xor_sync(mask, r.top, o);
        other.at = __shfl_xor_sync(mask, r.at, o);
        other.sum = __shfl_xor_sync(mask, r.sum, o);
        if (kNeeds & kRunnerUp) other.runner_up = __shfl_xor_sync(mask, r.runner_up, o);
        if (kNeeds & kWeighted) other.weighted = __shfl_xor_sync(mask, r.weighted, o);
        if (kNeeds & kSquares) other.squares = __shfl_xor_sync(mask, r.squares, o);
        r = merged<kNeeds>(r, other, scale);
    }
    return r;
}

// In shared memory, for teams of more than a warp. Buffers alternate, so that nobody overwrites
// what another still reads.
template <class Real>
struct Meeting {
    Reading<Real> warp[2][kMostParts], block[2][kMostParts];
};

// Which classes of a row a thread owns: chunks of 16 bytes, `kDeep` of them to a piece. `width`:
// bytes on whose multiples every row begins, 16 at most.
template <class S>
struct Slice {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>, kPiece = kDeep * V;
    const Team &team;
    const int classes, width;
    const bool owns_rest;  // the classes that fill no chunk

    MSDKERN_DEVICE Slice(const Team &team_, int64_t classes_, int width_)
        : team(team_),
          classes(int(classes_)),
          width(width_),
          owns_rest(classes % V != 0 && classes / V % team.members() == team.member()) {}
    // The class of element e of the thread's part of the piece that begins at `begin`.
    MSDKERN_DEVICE int class_at(int begin, int e) const {
        return begin + (e / V * team.members() + team.member()) * V + e % V;
    }
    // f(element, logit) for all that a thread has of a piece. 16-bit logits stay packed in between.
    template <class F>
    MSDKERN_DEVICE static void elements(const uint4 (&raw)[kDeep], F f) {
#pragma unroll
        for (int i = 0; i < kDeep; ++i) {
            Real z[V];
            unpack<S>(raw[i], z);
#pragma unroll
            for (int v = 0; v < V; ++v) f(i * V + v, z[v]);
        }
    }
    // Classes beyond the row are `fill`.
    MSDKERN_DEVICE void load(const S *row, int begin, uint4 (&raw)[kDeep],
                             Real fill = lowest<Real>()) const {
        if (width == 16)
            load_whole<uint4>(row, begin, raw, fill);
        else if (sizeof(S) == 8 || width == 8)
            load_whole<uint2>(row, begin, raw, fill);
        else if (sizeof(S) == 4 || width == 4)
            load_whole<unsigned>(row, begin, raw, fill);
        else
            load_whole<unsigned short>(row, begin, raw, fill);
        const int rest = classes - classes % V;
        if (!owns_rest || rest < begin || rest >= begin + team.members() * kPiece) return;
        const uint4 last = load_rest(row, rest, fill);
#pragma unroll
        for (int i = 0; i < kDeep; ++i)
            if (class_at(begin, i * V) == rest) raw[i] = last;
    }
    // Of a row that is one piece.
    MSDKERN_DEVICE void store(S *row, const uint4 (&raw)[kDeep]) const {
        if (width == 16)
            store_whole<uint4>(row, raw);
        else if (sizeof(S) == 8 || width == 8)
            store_whole<uint2>(row, raw);
        else if (sizeof(S) == 4 || width == 4)
            store_whole<unsigned>(row, raw);
        else
            store_whole<unsigned short>(row, raw);
        if (!owns_rest) return;
        const int rest = classes - classes % V;
#pragma unroll
        for (int i = 0; i < kDeep; ++i) {
            if (class_at(0, i * V) != rest) continue;
            S x[V];
            memcpy(x, &raw[i], 16);
#pragma unroll
            for (int v = 0; v < V; ++v)
                if (rest + v < classes) row[rest + v] = x[v];
        }
    }

 private:
    // Chunks that the row has whole.
    template <class Unit>
    MSDKERN_DEVICE void load_whole(const S *row, int begin, uint4 (&raw)[kDeep], Real fill) const {
        constexpr int kUnits = 16 / sizeof(Unit);
#pragma unroll
        for (int i = 0; i < kDeep; ++i) {
            const int c = class_at(begin, i * V);
            raw[i] = filled(fill);
            if (c + V > classes) continue;
            const Unit *from = reinterpret_cast<const Unit *>(row + c);
            Unit unit[kUnits];
#pragma unroll
            for (int u = 0; u < kUnits; ++u) unit[u] = kUnits == 1 ? __ldcs(from) : __ldg(from + u);
            memcpy(&raw[i], unit, 16);
        }
    }
    MSDKERN_DEVICE static uint4 filled(Real fill) {
        S x[V];
#pragma unroll
        for (int v = 0; v < V; ++v) round_to(fill, x[v]);
        uint4 raw;
        memcpy(&raw, x, 16);
        return raw;
    }
    MSDKERN_DEVICE uint4 load_rest(const S *row, int c, Real fill) const {
        uint4 raw = filled(fill);
        S x[V];
        memcpy(x, &raw, 16);
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (c + v < classes) x[v] = row[c + v];
        memcpy(&raw, x, 16);
        return raw;
    }
    template <class Unit>
    MSDKERN_DEVICE void store_whole(S *row, const uint4 (&raw)[kDeep]) const {
        constexpr int kUnits = 16 / sizeof(Unit);
#pragma unroll
        for (int i = 0; i < kDeep; ++i) {
            const int c = class_at(0, i * V);
            if (c + V > classes) continue;
            Unit *to = reinterpret_cast<Unit *>(row + c);
            Unit unit[kUnits];
            memcpy(unit, &raw[i], 16);
#pragma unroll
            for (int u = 0; u < kUnits; ++u) to[u] = unit[u];
        }
    }
};

// A team's reading of one row after another.
template <class S>
class Reader {
 public:
    typedef RealOf<S> Real;
    static constexpr int kPiece = Slice<S>::kPiece;
    const Slice<S> slice;

    MSDKERN_DEVICE Reader(const Team &team, Meeting<Real> &meeting, int64_t classes, int width)
        : slice(team, classes, width), team_(team), meeting_(meeting) {}

    // Known to every thread of the team. scale = 1 / (T log b).
    template <int kNeeds>
    MSDKERN_DEVICE Reading<Real> read(const S *row, Real scale) {
        Reading<Real> r = nothing_read<Real>();
        const int step = team_.members() * kPiece;
#pragma unroll 1
        for (int begin = 0; begin < slice.classes; begin += step) {
            uint4 raw[kDeep];
            slice.load(row, begin, raw);
            add<kNeeds>(r, raw, begin, scale);
        }
        r = meet<kNeeds>(r, scale);
        if (r.sum != r.sum) {
            const int at = first_nan(row);
            if (at != kNowhere) r.at = at, r.top = r.sum;
            if (r.at == kNowhere) r.at = 0;    // masked, and the temperature leaves no softmax
        } else if (r.top == lowest<Real>()) {  // every class is masked: there is no softmax
            r.at = 0;
            if (kNeeds & kSum) r.sum = Real(NAN);
        }
        return r;
    }

    // A piece, to what the thread has read of the row before.
    template <int kNeeds>
    MSDKERN_DEVICE void add(Reading<Real> &r, const uint4 (&raw)[kDeep], int begin, Real scale) {
        Real top = lowest<Real>(), second = lowest<Real>();
        Slice<S>::elements(raw, [&](int, Real z) {
            if (kNeeds & kRunnerUp) second = larger(second, smaller(top, z));
            top = larger(top, z);
        });
        if (kNeeds & kRunnerUp)
            r.runner_up = larger(larger(r.runner_up, second), smaller(r.top, top));
        if (top > r.top) {  // seldom, but for the first piece
            int first = kPiece;
            Slice<S>::elements(raw,
                               [&](int e, Real z) { first = z == top && e < first ? e : first; });
            r.at = slice.class_at(begin, first);
            if (kNeeds & kSum) rescale<kNeeds>(r, (r.top - top) * scale);
            r.top = top;
        }
        // Sums of sums: whoever added up the whole row would round thousands of times.
        const Real shift = r.top > lowest<Real>() ? r.top : Real(0);
        Real sum = 0, weighted = 0, squares = 0;
        Slice<S>::elements(raw, [&](int, Real z) {
            if (!(kNeeds & kSum)) {
                sum = z == z ? sum : z;
                return;
            }
            const Real x = (z - shift) * scale, b = power(x);
            sum += b;
            if (kNeeds & kWeighted) weighted += b * larger(x, Real(-1e30));  // 0 log 0 = 0
            if (kNeeds & kSquares) squares += b * b;
        });
        r.sum += sum;
        if (kNeeds & kWeighted) r.weighted += weighted;
        if (kNeeds & kSquares) r.squares += squares;
    }
    // What the whole team found, given to each of it.
    template <int kNeeds>
    MSDKERN_DEVICE Reading<Real> meet(Reading<Real> r, Real scale) {
        const int lane = threadIdx.x % 32;
        r = over_lanes<kNeeds>(r, team_.mask, team_.width(), scale);
        if (team_.lanes > 32) {
            Reading<Real> *const part = meeting_.warp[turn_];
            if (lane == 0) part[threadIdx.x / 32] = r;
            __syncthreads();
            r = over_lanes<kNeeds>(part[lane & (team_.warps() - 1)], ~0u, team_.warps(), scale);
        }
        if (team_.blocks > 1) {
            Reading<Real> *const part = meeting_.block[turn_];
            if (int(threadIdx.x) < team_.blocks) *in_block(part + team_.block, threadIdx.x) = r;
            cluster_sync();
            r = over_lanes<kNeeds>(part[lane & (team_.blocks - 1)], ~0u, team_.blocks, scale);
        }
        turn_ ^= 1;
        return r;
    }
    // The sum of a value over the team, given to each of it.
    MSDKERN_DEVICE Real sum(Real x) {
        Reading<Real> r = nothing_read<Real>();
        r.sum = x;
        return meet<kNothing>(r, Real(0)).sum;
    }

 private:
    // torch.argmax answers with the first NaN. A row whose sums are NaN need not hold any: an
    // infinite logit makes them so.
    MSDKERN_DEVICE int first_nan(const S *row) {
        Reading<Real> r = nothing_read<Real>();
        for (int c = team_.member(); c < slice.classes && r.at == kNowhere; c += team_.members()) {
            const Real z = to_real(row[c]);
            if (z != z) r.at = c, r.top = 0;
        }
        return meet<kNothing>(r, Real(0)).at;
    }

    const Team &team_;
    Meeting<Real> &meeting_;
    int turn_ = 0;
};

}  // namespace msdkern
