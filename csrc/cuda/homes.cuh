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
    bool vector;               // rows of logits and gradients all begin on 16 bytes
    bool keeps;                // exponentials too
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

// For calls of the common kind alone (`kLean`): rows of whole chunks, labels as targets, forward KL
// with named pairs. All loops are unrolled here, and every option would be there K times.
template <class S, int kRows_, int kChunks_>
struct Registers {
    typedef RealOf<S> Real;
    static constexpr bool kLean = true;
    static constexpr int V = kVector<S>, kRows = kRows_, kChunks = kChunks_;
    static constexpr bool kKeeps = kRows * kChunks * V <= 0;
    uint4 held[kRows][kChunks];
    Real exponentials[kKeeps ? kRows : 1][kKeeps ? kChunks : 1][V];
    Real sums[kRows];

    MSDKERN_DEVICE Registers(const Plan &, const Team &) {}
    MSDKERN_DEVICE void load(const msdkern_loss &call, const Cut<S> &cut, int rows, int64_t n) {
        each<kRows>(rows, [&](int r) {
            each<kChunks>(cut.chunks,
                          [&](int i) { held[r][i] = cut.load_whole(row_of<S>(call, r, n), i); });
        });
    }
    MSDKERN_DEVICE uint4 raw(int r, int i) const { return held[r][i]; }
    MSDKERN_DEVICE bool keeps() const { return kKeeps; }
    MSDKERN_DEVICE void keep(int r, int i, const Real (&e)[V]) {
        if constexpr (kKeeps)
#pragma unroll
            for (int v = 0; v < V; ++v) exponentials[r][i][v] = e[v];
    }
    MSDKERN_DEVICE void kept(int r, int i, Real (&e)[V]) const {
        if constexpr (kKeeps)
#pragma unroll
            for (int v = 0; v < V; ++v) e[v] = exponentials[r][i][v];
    }
    MSDKERN_DEVICE Real &value(int k) { return sums[k]; }
};

// 16-byte pieces in shared memory; those of a warp are neighbours.
template <class S>
struct Shared {
    typedef RealOf<S> Real;
    static constexpr bool kLean = false;
    static constexpr int V = kVector<S>, kRows = 0, kChunks = 0;
    static constexpr int kPieces = V * int(sizeof(Real)) / 16;  // of a chunk's exponentials
    uint4 *held, *exponentials;
    Real *values;
    int lanes, chunks = 0, threads;
    bool keeps_;

    MSDKERN_DEVICE Shared(const Plan &plan, const Team &team)
        : held(reinterpret_cast<uint4 *>(dyn_smem<unsigned char>() + plan.rows_at)),
          values(reinterpret_cast<Real *>(dyn_smem<unsigned char>() + plan.values_at)),
          lanes(team.lanes),
          threads(blockDim.x),
          keeps_(plan.keeps) {}
    // One wait for all loads: as many are in flight as the row set has.
    MSDKERN_DEVICE void load(const msdkern_loss &call, const Cut<S> &cut, int rows, int64_t n) {
        chunks = cut.chunks;
        exponentials = held + rows * chunks * threads;
        for (int r = 0; r < rows; ++r) {
            const S *row = row_of<S>(call, r, n);
            for (int i = 0; i < chunks; ++i) {
                uint4 *to = held + (r * chunks + i) * threads + threadIdx.x;
                if (cut.whole(i))
                    copy_async(to, row + cut.first(i));
                else
                    *to = cut.load(row, i, -INFINITY);
            }
        }
        wait_copies();
    }
    MSDKERN_DEVICE uint4 raw(int r, int i) const {
        return held[(r * chunks + i) * threads + threadIdx.x];
    }
    MSDKERN_DEVICE bool keeps() const { return keeps_; }
    MSDKERN_DEVICE void keep(int r, int i, const Real (&e)[V]) {
        if (!keeps_) return;
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
            memcpy(exponentials + ((r * chunks + i) * kPieces + p) * threads + threadIdx.x,
                   e + p * (V / kPieces), 16);
    }
    MSDKERN_DEVICE void kept(int r, int i, Real (&e)[V]) const {
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
            memcpy(e + p * (V / kPieces),
                   exponentials + ((r * chunks + i) * kPieces + p) * threads + threadIdx.x, 16);
    }
    MSDKERN_DEVICE Real &value(int k) { return values[k * threads + threadIdx.x]; }
};

// Nowhere: every sweep reads them again, and hopes for a cache.
template <class S>
struct Global {
    typedef RealOf<S> Real;
    static constexpr bool kLean = false;
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

}  // namespace msdkern
