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
// 2^x
MSDKERN_DEVICE float exponential2(float x) { return exp2_approx(x); }
MSDKERN_DEVICE double exponential2(double x) { return exp2(x); }
MSDKERN_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
MSDKERN_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
MSDKERN_ANYWHERE float logarithm(float x) { return logf(x); }
MSDKERN_ANYWHERE double logarithm(double x) { return log(x); }
// 0 log 0 = 0
MSDKERN_ANYWHERE float weigh(float p, float x) { return p == 0 ? 0.0f : p * x; }
MSDKERN_ANYWHERE double weigh(double p, double x) { return p == 0 ? 0.0 : p * x; }
MSDKERN_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
MSDKERN_DEVICE double quotient(double a, double b) { return a / b; }
MSDKERN_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
MSDKERN_DEVICE double larger(double a, double b) { return fmax(a, b); }
template <class Real>
MSDKERN_DEVICE Real lowest() {
    return -Real(INFINITY);
}

// f(0) ... f(n - 1): unrolled up to kMost, so that f may index registers; a loop where kMost is 0.
// n is kLeast or more.
template <int kMost, int kLeast = 0, class F>
MSDKERN_DEVICE void each(int n, F f) {
    if constexpr (kMost > 0) {
#pragma unroll
        for (int i = 0; i < kMost; ++i)
            if (i < kLeast || i < n) f(i);
    } else {
#pragma unroll 1
        for (int i = 0; i < n; ++i) f(i);
    }
}
// The same, where a loop takes kAtOnce at a time.
template <int kMost, int kAtOnce, class F>
MSDKERN_DEVICE void each_some(int n, F f) {
    if constexpr (kMost > 0) {
        each<kMost>(n, f);
    } else {
#pragma unroll kAtOnce
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
// neighbours, 16 bytes that begin on a multiple of 16, where the rows of a sample all begin equally
// far behind one: the first chunk is then `lead` classes short, and `spare` says how many that may
// be. Elsewhere the members take turns, one class each, so that loads of single elements are
// neighbours across the warp.
template <class S>
struct Cut {
    static constexpr int V = kVector<S>;
    int classes, members, chunks, own, start;
    bool vector;
    MSDKERN_DEVICE Cut(const Team &team, int64_t classes_, bool vector_, int spare = 0)
        : classes(int(classes_)),
          members(team.members()),
          chunks(int((classes_ + spare + int64_t(V) * members - 1) / (int64_t(V) * members))),
          own(team.member() * (vector_ ? V : 1)),
          start(own),
          vector(vector_) {}
    MSDKERN_DEVICE void lead(int by) { start = own - by; }
    MSDKERN_DEVICE int first(int i) const { return i * members * V + start; }
    MSDKERN_DEVICE int step() const { return vector ? 1 : members; }
    MSDKERN_DEVICE bool has(int c) const { return unsigned(c) < unsigned(classes); }
    MSDKERN_DEVICE bool whole(int i) const {
        return vector && has(first(i)) && first(i) + V <= classes;
    }

    // Classes outside the row are `fill`.
    template <class T>
    MSDKERN_DEVICE uint4 load(const T *row, int i, float fill) const {
        if (whole(i)) return __ldcs(reinterpret_cast<const uint4 *>(row + first(i)));
        T x[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int c = first(i) + v * step();
            if (has(c))
                x[v] = row[c];
            else
                round_to(RealOf<T>(fill), x[v]);
        }
        uint4 raw;
        memcpy(&raw, x, 16);
        return raw;
    }
    // The same, to be read again.
    MSDKERN_DEVICE uint4 load_early(const S *row, int i) const {
        return whole(i) ? *reinterpret_cast<const uint4 *>(row + first(i))
                        : load(row, i, -INFINITY);
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
    MSDKERN_DEVICE void store_whole(S *row, int i, const uint4 &raw) const {
        if (first(i) < classes) __stcs(reinterpret_cast<uint4 *>(row + first(i)), raw);
    }
    MSDKERN_DEVICE void store(S *row, int i, const RealOf<S> (&x)[V]) const {
        S y[V];
#pragma unroll
        for (int v = 0; v < V; ++v) round_to(x[v], y[v]);
        uint4 raw;
        memcpy(&raw, y, 16);
        store_raw(row, i, raw);
    }
    MSDKERN_DEVICE void store_raw(S *row, int i, const uint4 &raw) const {
        if (whole(i)) {
            __stcs(reinterpret_cast<uint4 *>(row + first(i)), raw);
            return;
        }
        S y[V];
        memcpy(y, &raw, 16);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int c = first(i) + v * step();
            if (has(c)) row[c] = y[v];
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

// The h-th W elements of 8 bytes, and back. h is known when this is compiled.
template <class S, int W>
MSDKERN_DEVICE void unpack_some(const uint2 &raw, int h, RealOf<S> (&x)[W]) {
    S stored[8 / sizeof(S)];
    memcpy(stored, &raw, 8);
#pragma unroll
    for (int w = 0; w < W; ++w) x[w] = to_real(stored[h * W + w]);
}
template <class S, int W>
MSDKERN_DEVICE void pack_some(const RealOf<S> (&x)[W], int h, uint2 &raw) {
    S stored[8 / sizeof(S)];
    memcpy(stored, &raw, 8);
#pragma unroll
    for (int w = 0; w < W; ++w) round_to(x[w], stored[h * W + w]);
    memcpy(&raw, stored, 8);
}

// The larger of the elements in two words, one by one; a NaN is left out.
template <class S>
struct Pair2;
template <>
struct Pair2<__half> {
    typedef __half2 Type;
};
template <>
struct Pair2<bfloat> {
    typedef __nv_bfloat162 Type;
};
template <class S>
MSDKERN_DEVICE unsigned larger_words(unsigned a, unsigned b) {
    if constexpr (sizeof(S) == 4)
        return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
    if constexpr (sizeof(S) == 2) {
        typename Pair2<S>::Type x, y;
        memcpy(&x, &a, 4), memcpy(&y, &b, 4);
        x = __hmax2(x, y);
        memcpy(&a, &x, 4);
    }
    return a;
}
// The largest of a thread's elements, a word at a time.
template <class S>
struct Largest {
    unsigned word;
    MSDKERN_DEVICE Largest() {
        S low[4 / sizeof(S)];
        for (S &x : low) round_to(lowest<RealOf<S>>(), x);
        memcpy(&word, low, 4);
    }
    MSDKERN_DEVICE void add(const uint4 &raw) {
        const unsigned a = larger_words<S>(raw.x, raw.y), b = larger_words<S>(raw.z, raw.w);
        word = larger_words<S>(word, larger_words<S>(a, b));
    }
    MSDKERN_DEVICE RealOf<S> value() const {
        S x[4 / sizeof(S)];
        memcpy(x, &word, 4);
        RealOf<S> m = to_real(x[0]);
        for (int v = 1; v < 4 / int(sizeof(S)); ++v) m = larger(m, to_real(x[v]));
        return m;
    }
};

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
    if (width == 32) {  // a mask that the compiler knows takes two instructions a step, not ten
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) x = Op::of(x, __shfl_xor_sync(~0u, x, o));
        return x;
    }
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
#pragma unroll 1
            for (int s = team.local; s < count; s += team.lanes) {
                Real x = part[s * warps];
#pragma unroll 4
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
#pragma unroll 1
        for (int i = team.local; i < count * team.blocks; i += team.lanes) {
            const int s = i % count;
            in_block(mine, i / count)[team.block * slots + s] = total[turn * slots + s];
        }
        cluster_sync();
#pragma unroll 1
        for (int s = team.local; s < count; s += team.lanes) {
            Real x = mine[s];
#pragma unroll 4
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

#define MSDKERN_QUOTIENT(a, b) quotient(a, b)
#include "../math.h"  // its formulas call weigh() and logarithm()
