// SPDX-License-Identifier: Apache-2.0
// What every kernel shares: how a row is dealt to threads, 16 bytes at a time, and how threads add
// up what they found.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ptx.h"

#define MSDKERN_ANYWHERE static __host__ __device__ __forceinline__

namespace msdkern {

typedef __nv_bfloat16 bfloat;

template <class S>
struct Kind {
    typedef float Real;
};
template <>
struct Kind<double> {
    typedef double Real;
};
template <class S>
using RealOf = typename Kind<S>::Real;

// Elements in 16 bytes.
template <class S>
constexpr int kVector = 16 / int(sizeof(S));

MSDKERN_DEVICE float to_real(float x) { return x; }
MSDKERN_DEVICE double to_real(double x) { return x; }
MSDKERN_DEVICE float to_real(__half x) { return __half2float(x); }
MSDKERN_DEVICE float to_real(bfloat x) { return __bfloat162float(x); }
MSDKERN_DEVICE void round_to(float x, float &to) { to = x; }
MSDKERN_DEVICE void round_to(double x, double &to) { to = x; }
MSDKERN_DEVICE void round_to(float x, __half &to) { to = __float2half_rn(x); }
MSDKERN_DEVICE void round_to(float x, bfloat &to) { to = __float2bfloat16_rn(x); }

// e^x. In float one multiplication and one instruction: the rounding of the product is an error of
// |x| 2^-24, that of any float x of this size.
MSDKERN_DEVICE float exponential(float x) { return exp2_approx(x * 1.4426950408889634f); }
MSDKERN_DEVICE double exponential(double x) { return exp(x); }
MSDKERN_ANYWHERE float logarithm(float x) { return logf(x); }
MSDKERN_ANYWHERE double logarithm(double x) { return log(x); }
// 0 log 0 = 0
MSDKERN_ANYWHERE float weigh(float p, float x) { return p == 0 ? 0.0f : p * x; }
MSDKERN_ANYWHERE double weigh(double p, double x) { return p == 0 ? 0.0 : p * x; }
MSDKERN_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
MSDKERN_DEVICE double larger(double a, double b) { return fmax(a, b); }
template <class Real>
MSDKERN_DEVICE Real lowest() {
    return -Real(INFINITY);
}

// What was computed before is not kept for later: where a sweep is unrolled, registers are dearer
// than arithmetic.
MSDKERN_DEVICE void forget() { asm volatile("" ::: "memory"); }

// f(0) ... f(n - 1): unrolled up to kMost, so that f may index registers; a loop where kMost is 0.
template <int kMost, class F>
MSDKERN_DEVICE void each(int n, F f) {
    if constexpr (kMost > 0) {
#pragma unroll
        for (int i = 0; i < kMost; ++i)
            if (i < n) f(i);
    } else {
#pragma unroll 1
        for (int i = 0; i < n; ++i) f(i);
    }
}
template <int kMost, class F>
MSDKERN_DEVICE void each_down(int n, F f) {
    if constexpr (kMost > 0) {
#pragma unroll
        for (int i = kMost - 1; i >= 0; --i)
            if (i < n) f(i);
    } else {
#pragma unroll 1
        for (int i = n - 1; i >= 0; --i) f(i);
    }
}

// Threads that work on one sample: a part of a warp, a block, or a cluster of blocks.
struct Team {
    int lanes;          // threads of this block
    int local, index;   // which of them; which team of the block
    int blocks, block;  // of the cluster
    unsigned mask;      // lanes of this warp
    MSDKERN_DEVICE Team(int lanes_, int blocks_)
        : lanes(lanes_),
          local(threadIdx.x % lanes_),
          index(threadIdx.x / lanes_),
          blocks(blocks_),
          block(blocks_ > 1 ? int(cluster_rank()) : 0),
          mask(~0u) {
        if (lanes < 32) mask = ((1u << lanes) - 1) << (threadIdx.x % 32 / lanes * lanes);
    }
    MSDKERN_DEVICE int width() const { return lanes < 32 ? lanes : 32; }
    MSDKERN_DEVICE int warps() const { return lanes < 32 ? 1 : lanes / 32; }
    MSDKERN_DEVICE int member() const { return block * lanes + local; }
    MSDKERN_DEVICE int members() const { return blocks * lanes; }
    MSDKERN_DEVICE void sync() const {
        if (lanes <= 32)
            __syncwarp(mask);
        else
            __syncthreads();
    }
};

// How a row's classes are dealt to a team: chunk i of a member is kVector classes. They are
// neighbours where rows begin on 16 bytes; elsewhere the members take turns, one class each, so
// that loads of single elements are neighbours across the warp.
template <class S>
struct Cut {
    static constexpr int V = kVector<S>;
    int classes, member, members, chunks;
    bool vector;
    MSDKERN_DEVICE Cut(const Team &team, int64_t classes_, bool vector_)
        : classes(int(classes_)),
          member(team.member()),
          members(team.members()),
          chunks(int((classes_ + int64_t(V) * members - 1) / (int64_t(V) * members))),
          vector(vector_) {}
    MSDKERN_DEVICE int first(int i) const {
        return vector ? (i * members + member) * V : i * members * V + member;
    }
    MSDKERN_DEVICE int step() const { return vector ? 1 : members; }
    MSDKERN_DEVICE bool whole(int i) const { return vector && first(i) + V <= classes; }

    // Classes beyond the row are `fill`.
    template <class T>
    MSDKERN_DEVICE uint4 load(const T *row, int i, float fill) const {
        if (whole(i)) return __ldcs(reinterpret_cast<const uint4 *>(row + first(i)));
        T x[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int c = first(i) + v * step();
            if (c < classes)
                x[v] = row[c];
            else
                round_to(RealOf<T>(fill), x[v]);
        }
        uint4 raw;
        memcpy(&raw, x, 16);
        return raw;
    }
    // The same where rows are whole chunks.
    MSDKERN_DEVICE uint4 load_whole(const S *row, int i) const {
        if (first(i) < classes) return __ldcs(reinterpret_cast<const uint4 *>(row + first(i)));
        S x[V];
#pragma unroll
        for (int v = 0; v < V; ++v) round_to(lowest<RealOf<S>>(), x[v]);
        uint4 raw;
        memcpy(&raw, x, 16);
        return raw;
    }
    MSDKERN_DEVICE void store_whole(S *row, int i, const RealOf<S> (&x)[V]) const {
        S y[V];
#pragma unroll
        for (int v = 0; v < V; ++v) round_to(x[v], y[v]);
        uint4 raw;
        memcpy(&raw, y, 16);
        if (first(i) < classes) __stcs(reinterpret_cast<uint4 *>(row + first(i)), raw);
    }
    MSDKERN_DEVICE void store(S *row, int i, const RealOf<S> (&x)[V]) const {
        S y[V];
#pragma unroll
        for (int v = 0; v < V; ++v) round_to(x[v], y[v]);
        if (whole(i)) {
            uint4 raw;
            memcpy(&raw, y, 16);
            __stcs(reinterpret_cast<uint4 *>(row + first(i)), raw);
            return;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int c = first(i) + v * step();
            if (c < classes) row[c] = y[v];
        }
    }
};

template <class S>
MSDKERN_DEVICE void unpack(const uint4 &raw, RealOf<S> (&x)[kVector<S>]) {
    S stored[kVector<S>];
    memcpy(stored, &raw, 16);
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) x[v] = to_real(stored[v]);
}

struct Maximum {
    template <class Real>
    MSDKERN_DEVICE static Real of(Real a, Real b) {
        return larger(a, b);
    }
};
struct Sum {
    template <class Real>
    MSDKERN_DEVICE static Real of(Real a, Real b) {
        return a + b;
    }
};

template <class Op, class Real>
MSDKERN_DEVICE Real over_lanes(const Team &team, Real x) {
    const int width = team.width();
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        if (o < width) x = Op::of(x, __shfl_xor_sync(team.mask, x, o));
    return x;
}

// Numbers that a team reduces together, in an order that depends on the shape alone: lanes, warps,
// blocks of the cluster. put() every slot, then finish(), then get(). Buffers alternate, so that
// nobody overwrites what another still reads.
template <class Real>
struct Exchange {
    int slots;
    Real *part;   // [slots][warps]
    Real *total;  // [2][slots]
    Real *peers;  // [2][blocks][slots], written by the blocks of the cluster
    int turn = 0;

    static size_t size(int slots, int warps, int blocks) {  // in Reals
        return size_t(slots) * (warps + 2 + (blocks > 1 ? 2 * blocks : 0));
    }
    MSDKERN_DEVICE Exchange(Real *memory, int slots_, const Team &team)
        : slots(slots_),
          part(memory),
          total(part + slots_ * team.warps()),
          peers(total + 2 * slots_) {}
    MSDKERN_DEVICE Real *next() const { return total + (turn ^ 1) * slots; }
    MSDKERN_DEVICE Real get(int slot) const { return total[turn * slots + slot]; }

    template <class Op>
    MSDKERN_DEVICE void put(const Team &team, int slot, Real x) const {
        x = over_lanes<Op>(team, x);
        if (team.local % 32 != 0) return;
        if (team.lanes <= 32)
            next()[slot] = x;
        else
            part[slot * team.warps() + team.local / 32] = x;
    }
    template <class Op>
    MSDKERN_DEVICE void finish(const Team &team, int count) {
        team.sync();
        turn ^= 1;
        if (team.lanes > 32) {
            const int warps = team.warps();
            for (int s = team.local; s < count; s += team.lanes) {
                Real x = part[s * warps];
                for (int w = 1; w < warps; ++w) x = Op::of(x, part[s * warps + w]);
                total[turn * slots + s] = x;
            }
            team.sync();
        }
        if (team.blocks > 1) over_blocks<Op>(team, count);
    }
    template <class Op>
    MSDKERN_DEVICE void over_blocks(const Team &team, int count) {
        Real *const mine = peers + turn * team.blocks * slots;
        for (int i = team.local; i < count * team.blocks; i += team.lanes) {
            const int s = i % count;
            in_block(mine, i / count)[team.block * slots + s] = total[turn * slots + s];
        }
        cluster_sync();
        for (int s = team.local; s < count; s += team.lanes) {
            Real x = mine[s];
            for (int b = 1; b < team.blocks; ++b) x = Op::of(x, mine[b * slots + s]);
            total[turn * slots + s] = x;
        }
        team.sync();
    }
};

// The sum of a value over the block's threads, given to all. `scratch`: one double per warp.
MSDKERN_DEVICE double block_sum(double x, double *scratch) {
    Team warp(32, 1);
    x = over_lanes<Sum>(warp, x);
    __syncthreads();  // scratch may still be read
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (unsigned w = 0; w < (blockDim.x + 31) / 32; ++w) total += scratch[w];
    return total;
}

}  // namespace msdkern

#include "../math.h"  // its formulas call weigh() and logarithm()
