// SPDX-License-Identifier: Apache-2.0
// Where the logits of one sample are kept between sweeps. Every thread keeps, and finds again, the
// same classes of all rows: what passes from exit to exit never leaves the thread.
#pragma once

#include "../msdkern.h"
#include "ladder.h"
#include "rows.cuh"

namespace msdkern {

// How a call was laid out by the host (launch.h).
struct Plan {
    int lanes, teams, blocks;  // threads per team and block, teams per block, blocks per team
    bool vector;               // all rows of a sample lie alike to multiples of 16 bytes (Cut)
    int lead, turn, spare;     // classes by which row 0 begins behind one, and row n + 1 more; most
    bool keeps;                // exponentials too
    bool tile, general;        // the sweeps of tile.cuh; pair by pair
    int fields;                // doubles that a team adds up over its samples
    int slots;                 // of Exchange
    int team_at, team_bytes;   // in shared memory: each team's RowState, weights, sums, Exchange
    int values_at, rows_at;    // each thread's values per exit; the row set
    int64_t counted;           // rows whose labels every block counts; more are counted beforehand
};

template <class S>
MSDKERN_DEVICE const S *row_of(const msdkern_loss &call, int r, int64_t n) {
    return static_cast<const S *>(call.logits[r]) + n * call.stride[r];
}

// For calls of the common kind alone (`kLean`): rows of whole chunks, labels as targets, named
// pairs. All loops are unrolled here, and every option would be there K times.
template <class S, int kRows_, int kChunks_>
struct Registers {
    typedef RealOf<S> Real;
    static constexpr bool kTile = true, kLean = true, kDense = false, kOnline = false;
    static constexpr int V = kVector<S>, kRows = kRows_, kLeast = 1, kLearn = 1;
    static constexpr int kChunks = kChunks_;
    uint4 held[kRows][kChunks];
    Real sums[kRows];

    MSDKERN_DEVICE Registers(const Plan &, const Team &) {}
    MSDKERN_DEVICE void load(const msdkern_loss &call, const Cut<S> &cut, int rows, int64_t n) {
        each<kRows>(rows, [&](int r) {
            each<kChunks>(cut.chunks,
                          [&](int i) { held[r][i] = cut.load_whole(row_of<S>(call, r, n), i); });
        });
    }
    MSDKERN_DEVICE uint4 raw(int r, int i) const { return held[r][i]; }
    MSDKERN_DEVICE uint2 half(int r, int i, int p) const {
        return p ? uint2{held[r][i].z, held[r][i].w} : uint2{held[r][i].x, held[r][i].y};
    }
    MSDKERN_DEVICE void put_half(int r, int i, int p, uint2 half) {
        uint4 &raw = held[r][i];
        raw = p ? uint4{raw.x, raw.y, half.x, half.y} : uint4{half.x, half.y, raw.z, raw.w};
    }
    MSDKERN_DEVICE void store(const Cut<S> &cut, S *row, int k, int i) const {
        cut.store_whole(row, i, held[k][i]);
    }
    MSDKERN_DEVICE Real &value(int k) { return sums[k]; }
    MSDKERN_DEVICE void fetch(const Cut<S> &, const S *, int, int) {}
    MSDKERN_DEVICE void drop() {}
    MSDKERN_DEVICE void refill(const Cut<S> &, const S *, int, int) {}
    MSDKERN_DEVICE void filled() {}
};

// 16-byte pieces in shared memory; those of a warp are neighbours.
template <class S>
struct Pieces {
    typedef RealOf<S> Real;
    static constexpr bool kLean = false;
    static constexpr int V = kVector<S>, kChunks = 0;
    uint4 *held;
    Real *values;
    int chunks = 1;  // per row that have a place

    MSDKERN_DEVICE Pieces(const Plan &plan)
        : held(reinterpret_cast<uint4 *>(dyn_smem<unsigned char>() + plan.rows_at)),
          values(reinterpret_cast<Real *>(dyn_smem<unsigned char>() + plan.values_at)) {}
    // One wait for all loads: as many are in flight as the row set has.
    MSDKERN_DEVICE void load(const msdkern_loss &call, const Cut<S> &cut, int rows, int64_t n) {
        chunks = cut.chunks;
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < chunks; ++i) copy(cut, row_of<S>(call, r, n), r, i);
        wait_copies();
    }
    MSDKERN_DEVICE uint4 *place(int r, int i) const {
        return held + (r * chunks + i) * int(blockDim.x) + int(threadIdx.x);
    }
    MSDKERN_DEVICE void copy(const Cut<S> &cut, const S *row, int r, int i) {
        if (cut.whole(i))
            copy_async(place(r, i), row + cut.first(i));
        else
            *place(r, i) = cut.load(row, i, -INFINITY);
    }
    MSDKERN_DEVICE uint4 raw(int r, int i) const { return *place(r, i); }
    MSDKERN_DEVICE uint2 half(int r, int i, int p) const {
        return reinterpret_cast<const uint2 *>(place(r, i))[p];
    }
    MSDKERN_DEVICE void put_half(int r, int i, int p, const uint2 &half) const {
        reinterpret_cast<uint2 *>(place(r, i))[p] = half;
    }
    MSDKERN_DEVICE void store(const Cut<S> &cut, S *row, int k, int i) const {
        cut.store_raw(row, i, *place(k, i));
    }
    MSDKERN_DEVICE Real &value(int k) { return values[k * int(blockDim.x) + int(threadIdx.x)]; }
};

// With their exponentials where there is room.
template <class S>
struct Shared : Pieces<S> {
    typedef Pieces<S> Base;
    typedef RealOf<S> Real;
    static constexpr bool kTile = false;
    static constexpr int V = kVector<S>, kRows = 0;
    static constexpr int kParts = V * int(sizeof(Real)) / 16;  // of a chunk's exponentials
    uint4 *exponentials;
    bool keeps_;

    MSDKERN_DEVICE Shared(const Plan &plan, const Team &) : Base(plan), keeps_(plan.keeps) {}
    MSDKERN_DEVICE void load(const msdkern_loss &call, const Cut<S> &cut, int rows, int64_t n) {
        Base::load(call, cut, rows, n);
        exponentials = this->held + rows * cut.chunks * int(blockDim.x);
    }
    MSDKERN_DEVICE bool keeps() const { return keeps_; }
    MSDKERN_DEVICE uint4 *part(int r, int i, int p) const {
        return exponentials + ((r * this->chunks + i) * kParts + p) * int(blockDim.x) +
               int(threadIdx.x);
    }
    MSDKERN_DEVICE void keep(int r, int i, const Real (&e)[V]) {
        if (!keeps_) return;
#pragma unroll
        for (int p = 0; p < kParts; ++p) memcpy(part(r, i, p), e + p * (V / kParts), 16);
    }
    MSDKERN_DEVICE void kept(int r, int i, Real (&e)[V]) const {
#pragma unroll
        for (int p = 0; p < kParts; ++p) memcpy(e + p * (V / kParts), part(r, i, p), 16);
    }
};

// For the sweeps of tile.cuh. A chunk's place is free as soon as its gradients are on their way,
// and the next sample's logits come to it: loads and stores are under way at all times.
template <class S, int kRows_>
struct Tiled : Pieces<S> {
    typedef Pieces<S> Base;
    static constexpr bool kTile = true, kDense = true, kOnline = false;
    static constexpr int kRows = kRows_, kLeast = kRows_ <= 4 ? 1 : 5;
    static constexpr int kLearn = kRows_ <= 4 ? 1 : 4;  // of the exits, get a gradient at least
    bool coming = false;  // the logits of the sample that is next were asked for

    MSDKERN_DEVICE Tiled(const Plan &plan, const Team &) : Base(plan) {}
    MSDKERN_DEVICE void load(const msdkern_loss &call, const Cut<S> &cut, int rows, int64_t n) {
        if (coming)
            drop();
        else
            Base::load(call, cut, rows, n);
    }
    MSDKERN_DEVICE void drop() {
        wait_copies();
        coming = false;
    }
    MSDKERN_DEVICE void fetch(const Cut<S> &, const S *, int, int) {}
    MSDKERN_DEVICE void refill(const Cut<S> &cut, const S *row, int r, int i) {
        this->copy(cut, row, r, i);
    }
    MSDKERN_DEVICE void filled() { coming = true; }
};

// Nowhere: every sweep reads them again, and hopes for a cache.
template <class S>
struct Global {
    typedef RealOf<S> Real;
    static constexpr bool kTile = false, kLean = false;
    static constexpr int V = kVector<S>, kRows = 0, kChunks = 0;
    const msdkern_loss *call;
    const Cut<S> *cut;
    Real *values;
    int64_t n;

    MSDKERN_DEVICE Global(const Plan &plan, const Team &)
        : values(reinterpret_cast<Real *>(dyn_smem<unsigned char>() + plan.values_at)) {}
    MSDKERN_DEVICE void load(const msdkern_loss &c, const Cut<S> &of, int, int64_t sample) {
        call = &c;
        cut = &of;
        n = sample;
    }
    MSDKERN_DEVICE uint4 raw(int r, int i) const {
        return cut->load(row_of<S>(*call, r, n), i, -INFINITY);
    }
    MSDKERN_DEVICE bool keeps() const { return false; }
    MSDKERN_DEVICE void keep(int, int, const Real (&)[V]) {}
    MSDKERN_DEVICE void kept(int, int, Real (&)[V]) const {}
    MSDKERN_DEVICE Real &value(int k) { return values[k * int(blockDim.x) + threadIdx.x]; }
};

// Nowhere, for the sweeps of tile.cuh: one reads for the sums, from the first chunk to the last,
// one for the gradients, from the last, which the cache still has.
template <class S, int kRows_>
struct Streamed : Pieces<S> {
    typedef Pieces<S> Base;
    static constexpr bool kTile = true, kDense = false, kOnline = true;
    static constexpr int kRows = kRows_, kLeast = 1, kLearn = 1;
    const msdkern_loss *call;
    const Cut<S> *cut;
    int64_t n;

    MSDKERN_DEVICE Streamed(const Plan &plan, const Team &) : Base(plan) {}
    MSDKERN_DEVICE void load(const msdkern_loss &c, const Cut<S> &of, int, int64_t sample) {
        call = &c;
        cut = &of;
        n = sample;
    }
    MSDKERN_DEVICE uint4 early(int r, int i) const {
        return cut->load_early(row_of<S>(*call, r, n), i);
    }
    MSDKERN_DEVICE uint4 raw(int r, int i) const { return early(r, i); }
    // One chunk of all rows has a place in shared memory.
    MSDKERN_DEVICE void fetch(const Cut<S> &, const S *row, int r, int i) const {
        *this->place(r, 0) = cut->load(row, i, -INFINITY);
    }
    MSDKERN_DEVICE uint2 half(int r, int, int p) const { return Base::half(r, 0, p); }
    MSDKERN_DEVICE void put_half(int r, int, int p, const uint2 &half) const {
        Base::put_half(r, 0, p, half);
    }
    MSDKERN_DEVICE void store(const Cut<S> &, S *row, int k, int i) const {
        cut->store_raw(row, i, *this->place(k, 0));
    }
    MSDKERN_DEVICE void drop() {}
    MSDKERN_DEVICE void refill(const Cut<S> &, const S *, int, int) {}
    MSDKERN_DEVICE void filled() {}
};

}  // namespace msdkern
