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
    if (kNeeds & kWeighted) r.weighted = (r.weighted + r.sum * gap) * factor;
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

template <class S>
class Reader {
 public:
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>, kPiece = kDeep * V;

    // `width`: bytes on whose multiples every row begins, 16 at most.
    MSDKERN_DEVICE Reader(const Team &team, Meeting<Real> &meeting, int64_t classes, int width)
        : team_(team),
          meeting_(meeting),
          classes_(int(classes)),
          width_(width),
          owns_rest_(classes_ % V != 0 && classes_ / V % team.members() == team.member()) {}

    // Known to every thread of the team. scale = 1 / (T log b).
    template <int kNeeds>
    MSDKERN_DEVICE Reading<Real> read(const S *row, Real scale) {
        Reading<Real> r = nothing_read<Real>();
        const int step = team_.members() * kPiece;
#pragma unroll 1
        for (int begin = 0; begin < classes_; begin += step) {
            uint4 raw[kDeep];
            load(row, begin, raw);
            add<kNeeds>(r, raw, begin, scale);
        }
        r = meet<kNeeds>(r, scale);
        if (r.sum != r.sum) {
            const int at = first_nan(row);
            if (at != kNowhere) r.at = at, r.top = r.sum;
        } else if (r.top == lowest<Real>()) {  // every class is masked: there is no softmax
            r.at = 0;
            if (kNeeds & kSum) r.sum = Real(NAN);
        }
        return r;
    }

 private:
    // The class of element e of the thread's part of the piece that begins at `begin`.
    MSDKERN_DEVICE int class_at(int begin, int e) const {
        return begin + (e / V * team_.members() + team_.member()) * V + e % V;
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
    MSDKERN_DEVICE void load(const S *row, int begin, uint4 (&raw)[kDeep]) const {
        if (width_ == 16)
            load_whole<uint4>(row, begin, raw);
        else if (sizeof(S) == 8 || width_ == 8)
            load_whole<uint2>(row, begin, raw);
        else if (sizeof(S) == 4 || width_ == 4)
            load_whole<unsigned>(row, begin, raw);
        else
            load_whole<unsigned short>(row, begin, raw);
        const int rest = classes_ - classes_ % V;
        if (!owns_rest_ || rest < begin || rest >= begin + team_.members() * kPiece) return;
        const uint4 last = load_rest(row, rest);
#pragma unroll
        for (int i = 0; i < kDeep; ++i)
            if (class_at(begin, i * V) == rest) raw[i] = last;
    }
    // Chunks that the row has whole; others are masked.
    template <class Unit>
    MSDKERN_DEVICE void load_whole(const S *row, int begin, uint4 (&raw)[kDeep]) const {
        constexpr int kUnits = 16 / sizeof(Unit);
#pragma unroll
        for (int i = 0; i < kDeep; ++i) {
            const int c = class_at(begin, i * V);
            raw[i] = masked();
            if (c + V > classes_) continue;
            const Unit *from = reinterpret_cast<const Unit *>(row + c);
            Unit unit[kUnits];
#pragma unroll
            for (int u = 0; u < kUnits; ++u) unit[u] = kUnits == 1 ? __ldcs(from) : __ldg(from + u);
            memcpy(&raw[i], unit, 16);
        }
    }
    MSDKERN_DEVICE static uint4 masked() {
        S x[V];
#pragma unroll
        for (int v = 0; v < V; ++v) round_to(lowest<Real>(), x[v]);
        uint4 raw;
        memcpy(&raw, x, 16);
        return raw;
    }
    MSDKERN_DEVICE uint4 load_rest(const S *row, int c) const {
        uint4 raw = masked();
        S x[V];
        memcpy(x, &raw, 16);
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (c + v < classes_) x[v] = row[c + v];
        memcpy(&raw, x, 16);
        return raw;
    }

    template <int kNeeds>
    MSDKERN_DEVICE void add(Reading<Real> &r, const uint4 (&raw)[kDeep], int begin, Real scale) {
        Real top = lowest<Real>(), second = lowest<Real>();
        elements(raw, [&](int, Real z) {
            if (kNeeds & kRunnerUp) second = larger(second, smaller(top, z));
            top = larger(top, z);
        });
        if (kNeeds & kRunnerUp)
            r.runner_up = larger(larger(r.runner_up, second), smaller(r.top, top));
        if (top > r.top) {  // seldom, but for the first piece
            int first = kPiece;
            elements(raw, [&](int e, Real z) { first = z == top && e < first ? e : first; });
            r.at = class_at(begin, first);
            if (kNeeds & kSum) rescale<kNeeds>(r, (r.top - top) * scale);
            r.top = top;
        }
        // Sums of sums: whoever added up the whole row would round thousands of times.
        const Real shift = r.top > lowest<Real>() ? r.top : Real(0);
        Real sum = 0, weighted = 0, squares = 0;
        elements(raw, [&](int, Real z) {
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
    // torch.argmax answers with the first NaN. A row whose sums are NaN need not hold any: an
    // infinite logit makes them so.
    MSDKERN_DEVICE int first_nan(const S *row) {
        Reading<Real> r = nothing_read<Real>();
        for (int c = team_.member(); c < classes_ && r.at == kNowhere; c += team_.members()) {
            const Real z = to_real(row[c]);
            if (z != z) r.at = c, r.top = 0;
        }
        return meet<kNothing>(r, Real(0)).at;
    }

    const Team &team_;
    Meeting<Real> &meeting_;
    const int classes_, width_;
    const bool owns_rest_;  // the classes that fill no chunk
    int turn_ = 0;
};

}  // namespace msdkern
