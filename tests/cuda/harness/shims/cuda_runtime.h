// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header when kernels are compiled for the host: the language, then what a
// kernel calls. The runtime's own functions are in cuda_runtime_api.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../simt.h"
#include "cuda_runtime_api.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
// One block runs at a time, on one thread of the operating system. A thread-local variable, unlike
// a static one, may also be a template's.
#define __shared__ thread_local
#define __align__(n) alignas(n)
#ifndef __noinline__
#define __noinline__ __attribute__((noinline))
#endif
#define __activemask() static_assert(false, "__activemask: which lanes run together is undefined")

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Meeting --------------------------------------------------------------------------------------

inline void __syncthreads(simt::Site site = simt::Site::here()) {
    simt::block_barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int yes, simt::Site site = simt::Site::here()) {
    return simt::block_barrier("__syncthreads_count", yes != 0, site);
}
inline int __syncthreads_or(int yes, simt::Site site = simt::Site::here()) {
    return simt::block_barrier("__syncthreads_or", yes != 0, site) != 0;
}
inline int __syncthreads_and(int yes, simt::Site site = simt::Site::here()) {
    const int threads = int(blockDim.x * blockDim.y * blockDim.z);
    return simt::block_barrier("__syncthreads_and", yes != 0, site) == threads;
}
inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::here()) {
    simt::collective(simt::kSyncWarp, mask, 0, 0, site);
}

namespace simt {

template <class T>
std::uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a value of a shuffle");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Lanes move inside segments of `width`; who would leave his gets his own value.
template <class T>
T shuffle(unsigned mask, T value, int source, int width, bool inside, Site site) {
    if (width < 1 || width > 32 || (width & (width - 1))) fail(site, "shuffle: width %d", width);
    source = inside ? source : int(lane());
    return from_bits<T>(collective(kShuffle, mask, to_bits(value), source, site));
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              simt::Site site = simt::Site::here()) {
    const int base = int(simt::lane()) & ~(width - 1);
    return simt::shuffle(mask, value, base + (source & (width - 1)), width, true, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  simt::Site site = simt::Site::here()) {
    const int lane = int(simt::lane()), source = lane ^ bits;
    return simt::shuffle(mask, value, source, width, source < (lane & ~(width - 1)) + width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   simt::Site site = simt::Site::here()) {
    const int lane = int(simt::lane()), source = lane + int(by);
    return simt::shuffle(mask, value, source, width, source < (lane & ~(width - 1)) + width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 simt::Site site = simt::Site::here()) {
    const int lane = int(simt::lane()), source = lane - int(by);
    return simt::shuffle(mask, value, source, width, source >= (lane & ~(width - 1)), site);
}
inline unsigned __ballot_sync(unsigned mask, int yes, simt::Site site = simt::Site::here()) {
    return unsigned(simt::collective(simt::kBallot, mask, yes != 0, 0, site));
}
inline int __any_sync(unsigned mask, int yes, simt::Site site = simt::Site::here()) {
    return int(simt::collective(simt::kAny, mask, yes != 0, 0, site));
}
inline int __all_sync(unsigned mask, int yes, simt::Site site = simt::Site::here()) {
    return int(simt::collective(simt::kAll, mask, yes != 0, 0, site));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::here()) {
    return unsigned(simt::collective(simt::kMatch, mask, simt::to_bits(value), 0, site));
}

#define SIMT_REDUCE(name, T, what)                                              \
    inline T __reduce_##name##_sync(unsigned mask, T value,                     \
                                    simt::Site site = simt::Site::here()) {     \
        return T(simt::collective(simt::what, mask, unsigned(value), 0, site)); \
    }
SIMT_REDUCE(add, int, kAdd)
SIMT_REDUCE(add, unsigned, kAdd)
SIMT_REDUCE(min, int, kMinSigned)
SIMT_REDUCE(min, unsigned, kMinUnsigned)
SIMT_REDUCE(max, int, kMaxSigned)
SIMT_REDUCE(max, unsigned, kMaxUnsigned)
SIMT_REDUCE(and, unsigned, kAnd)
SIMT_REDUCE(or, unsigned, kOr)
SIMT_REDUCE(xor, unsigned, kXor)
#undef SIMT_REDUCE

// Memory ---------------------------------------------------------------------------------------

inline void __threadfence() { simt::fence(); }

namespace simt {

// old = *p; *p = f(old), as one relaxed access.
template <class T, class F>
__attribute__((always_inline)) inline T exchange_here(T *p, F f) {
    T old, next;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do next = f(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template <class T, class F>
T exchange(T *p, F f) {
    return exchange_here(p, f);
}
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T exchange_unseen(T *p, F f) {
    return exchange_here(p, f);
}
template <class T, class F>
T atomic(T *p, F f, Site site) {
    const bool seen = before_atomic(p, sizeof *p, site);
    const T old = seen ? exchange(p, f) : exchange_unseen(p, f);
    after_atomic(p);
    return old;
}

template <class T>
struct Same {  // keeps an argument out of template deduction, as overloads would
    typedef T type;
};

}  // namespace simt

#define SIMT_ATOMIC(name, expression)                                                    \
    template <class T>                                                                   \
    T name(T *p, typename simt::Same<T>::type v, simt::Site site = simt::Site::here()) { \
        return simt::atomic(p, [v](T old) -> T { return expression; }, site);            \
    }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicSub, old - v)
SIMT_ATOMIC(atomicExch, ((void)old, v))
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicAnd, old &v)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicXor, old ^ v)
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T *p, typename simt::Same<T>::type expected, typename simt::Same<T>::type v,
            simt::Site site = simt::Site::here()) {
    return simt::atomic(p, [=](T old) { return old == expected ? v : old; }, site);
}

#define SIMT_LOAD(name)                                        \
    template <class T>                                         \
    T name(const T *p, simt::Site site = simt::Site::here()) { \
        simt::check_aligned(p, sizeof(T), site);               \
        return *p;                                             \
    }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldlu)
SIMT_LOAD(__ldcv)
#undef SIMT_LOAD
#define SIMT_STORE(name)                                                                    \
    template <class T>                                                                      \
    void name(T *p, typename simt::Same<T>::type v, simt::Site site = simt::Site::here()) { \
        simt::check_aligned(p, sizeof(T), site);                                            \
        *p = v;                                                                             \
    }
SIMT_STORE(__stcs)
SIMT_STORE(__stcg)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_STORE

// Arithmetic -----------------------------------------------------------------------------------

namespace simt {

// The hardware's power of two is not rounded correctly. So that nobody comes to depend on it, the
// last bit is wrong for two arguments of three, by the argument's bits, between exact powers.
inline float exp2_approximately(float x) {
    const float y = exp2f(x), below = exp2f(floorf(x)), above = exp2f(ceilf(x));
    if (!(y > below && y < above)) return y;
    const unsigned pick = from_bits<unsigned>(to_bits(x)) * 2654435761u >> 16;
    return pick % 3 == 0 ? y : nextafterf(y, pick % 3 == 1 ? below : above);
}
inline float exp_approximately(float x) { return exp2_approximately(x * 1.44269504f); }
inline float log_approximately(float x) { return log2f(x) * 0.693147181f; }

}  // namespace simt

// Macros, since glibc has some of these names.
#define __expf(x) simt::exp_approximately(x)
#define __logf(x) simt::log_approximately(x)
#define __log2f(x) log2f(x)
inline float __fdividef(float x, float y) { return x * (1.0f / y); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float_as_int(float x) { return simt::from_bits<int>(simt::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return simt::from_bits<unsigned>(simt::to_bits(x)); }
inline float __int_as_float(int x) { return simt::from_bits<float>(simt::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_bits<float>(simt::to_bits(x)); }
inline long long __double_as_longlong(double x) { return (long long)simt::to_bits(x); }
inline double __longlong_as_double(long long x) {
    return simt::from_bits<double>(simt::to_bits(x));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }

template <class A, class B>
typename std::common_type<A, B>::type max(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    if constexpr (std::is_floating_point<T>::value)
        return std::fmax(T(a), T(b));
    else
        return T(a) < T(b) ? T(b) : T(a);
}
template <class A, class B>
typename std::common_type<A, B>::type min(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    if constexpr (std::is_floating_point<T>::value)
        return std::fmin(T(a), T(b));
    else
        return T(b) < T(a) ? T(b) : T(a);
}
