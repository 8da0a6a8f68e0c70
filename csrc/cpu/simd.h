// SPDX-License-Identifier: Apache-2.0
// Vectors of the widest kind that the instruction set offers, from one source: GCC's and Clang's
// vector extensions. Every function lives in the namespace of its instruction set, and nothing
// here instantiates the standard library, so that the linker cannot merge code compiled for one
// instruction set into another.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace MSDKERN_NAMESPACE {

#if defined(MSDKERN_VECTOR_BYTES)
constexpr int kBytes = MSDKERN_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

typedef float VecF __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef double WideF __attribute__((vector_size(2 * kBytes)));  // a double per lane of VecF
typedef int32_t IntF __attribute__((vector_size(kBytes)));
typedef int64_t IntD __attribute__((vector_size(kBytes)));
typedef uint32_t BitsF __attribute__((vector_size(kBytes)));
typedef uint16_t HalfF __attribute__((vector_size(kBytes / 2)));

// Storage types. Arithmetic happens in Real: float, or double for double.
struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

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

template <class Real>
struct Vector;
template <>
struct Vector<float> {
    typedef VecF Vec;
    typedef WideF Wide;
    typedef IntF Int;
    typedef int32_t Lane;
};
template <>
struct Vector<double> {
    typedef VecD Vec;
    typedef VecD Wide;
    typedef IntD Int;
    typedef int64_t Lane;
};
template <class Real>
using VecOf = typename Vector<Real>::Vec;
template <class S>
using StoredIn = VecOf<RealOf<S>>;  // what is loaded from storage type S
template <class Real>
constexpr int kLanes = kBytes / int(sizeof(Real));

INLINE VecF splat(float x) { return x - VecF{}; }
INLINE VecD splat(double x) { return x - VecD{}; }

// Anywhere, whatever lies there. (memcpy would do, but GCC 12 sends some such vectors through the
// stack.)
template <class V>
struct __attribute__((packed, may_alias)) Anywhere {
    V v;
};
template <class V, class T>
INLINE V read(const T *p) {
    return reinterpret_cast<const Anywhere<V> *>(p)->v;
}
template <class V, class T>
INLINE void write(T *p, V v) {
    reinterpret_cast<Anywhere<V> *>(p)->v = v;
}

// Selections and reductions, in a fixed order. ------------------------------------------------

template <class V>
INLINE V maximum(V a, V b) {
    return a > b ? a : b;  // b where a is NaN
}
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
// Beside another choice by the same comparison GCC would choose here, too, by its mask: three
// times the latency of this instruction, from class to class.
INLINE VecF maximum(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE VecD maximum(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
#endif

// Whether any lane of a comparison holds.
template <class I>
INLINE bool any(I hit) {
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
    return _mm512_test_epi32_mask((__m512i)hit, (__m512i)hit) != 0;
#elif defined(__AVX__) && !defined(MSDKERN_VECTOR_BYTES)
    return !_mm256_testz_si256((__m256i)hit, (__m256i)hit);
#else
    uint64_t words[sizeof(I) / 8], all = 0;
    memcpy(words, &hit, sizeof hit);
    for (uint64_t word : words) all |= word;
    return all != 0;
#endif
}

// p x with 0 log 0 = 0.
template <class V>
INLINE V weigh(V p, V x) {
    return p * (p == V{} ? V{} : x);
}

// Halves are combined until one lane is left: a fixed tree.
typedef float F4 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F16 __attribute__((vector_size(64)));
typedef double D2 __attribute__((vector_size(16)));
typedef double D4 __attribute__((vector_size(32)));
typedef double D8 __attribute__((vector_size(64)));

struct Add {
    template <class V>
    INLINE_MEMBER V operator()(V a, V b) const {
        return a + b;
    }
};
struct Largest {
    template <class V>
    INLINE_MEMBER V operator()(V a, V b) const {
        return a > b ? a : b;
    }
};

struct Smallest {
    template <class V>
    INLINE_MEMBER V operator()(V a, V b) const {
        return a < b ? a : b;
    }
};

template <class Op>
INLINE float reduce(F4 v, Op op) {
    const F4 w = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return op(w, __builtin_shufflevector(w, w, 1, 0, 3, 2))[0];
}
template <class Op>
INLINE float reduce(F8 v, Op op) {
    return reduce(
        op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)),
        op);
}
template <class Op>
INLINE float reduce(F16 v, Op op) {
    return reduce(op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                  op);
}
template <class Op>
INLINE double reduce(D2 v, Op op) {
    return op(v, __builtin_shufflevector(v, v, 1, 0))[0];
}
template <class Op>
INLINE double reduce(D4 v, Op op) {
    return reduce(op(__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)), op);
}
template <class Op>
INLINE double reduce(D8 v, Op op) {
    return reduce(
        op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)),
        op);
}

template <class Real>
INLINE Real sum(VecOf<Real> v) {
    return reduce(v, Add());
}
template <class Real>
INLINE Real largest(VecOf<Real> v) {
    return reduce(v, Largest());
}

// Transposition of as many vectors as they have lanes. ----------------------------------------

// a0 b0 a1 b1 ..., by halves.
template <class V>
INLINE void interleave(V a, V b, V &low, V &high) {
    constexpr int n = int(sizeof(V) / sizeof(a[0]));
    if constexpr (n == 2) {
        low = __builtin_shufflevector(a, b, 0, 2);
        high = __builtin_shufflevector(a, b, 1, 3);
    } else if constexpr (n == 4) {
        low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    } else if constexpr (n == 8) {
        low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
        low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                       15, 31);
    }
}

// Row by row what `op` makes of its lanes: as many vectors in, one number per row and lane out.
// Half of the vectors take the place of two at a time.
template <class V, class Op>
INLINE V fold(V *v, Op op) {
    constexpr int n = int(sizeof(V) / sizeof(v[0][0]));
    UNROLL for (int half = n / 2; half >= 1; half /= 2) UNROLL for (int i = 0; i < half; ++i) {
        V low, high;
        interleave(v[i], v[i + half], low, high);
        v[i] = op(low, high);
    }
    return v[0];
}

// The rows v[0], v[1], ... become columns: log2(n) perfect shuffles.
template <class V>
INLINE void transpose(V *v) {
    constexpr int n = int(sizeof(V) / sizeof(v[0][0]));
    for (int done = 1; done < n; done *= 2) {
        V shuffled[n];
        for (int i = 0; i < n / 2; ++i)
            interleave(v[i], v[i + n / 2], shuffled[2 * i], shuffled[2 * i + 1]);
        for (int i = 0; i < n; ++i) v[i] = shuffled[i];
    }
}
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
// By instructions that leave their operands alone: half as many.
INLINE void transpose(VecF *v) {
    __m512 a[16], b[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
    }
    // b[4 i + c]: column c of every quarter, rows 4 i to 4 i + 3.
    UNROLL for (int i = 0; i < 16; i += 4) for (int h = 0; h < 2; ++h) {
        const __m512d x = _mm512_castps_pd(a[i + h]), y = _mm512_castps_pd(a[i + 2 + h]);
        b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
        b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
    UNROLL for (int c = 0; c < 4; ++c) {
        const __m512 even01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
        const __m512 odd01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const __m512 even23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        v[c] = (VecF)_mm512_shuffle_f32x4(even01, even23, 0x88);
        v[4 + c] = (VecF)_mm512_shuffle_f32x4(odd01, odd23, 0x88);
        v[8 + c] = (VecF)_mm512_shuffle_f32x4(even01, even23, 0xdd);
        v[12 + c] = (VecF)_mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
}
#endif

// The lanes for which a comparison holds, as bits.
INLINE unsigned lanes_of(IntF hit) {
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
    return _mm512_test_epi32_mask((__m512i)hit, (__m512i)hit);
#elif defined(__AVX__) && !defined(MSDKERN_VECTOR_BYTES)
    return unsigned(_mm256_movemask_ps((__m256)hit));
#else
    unsigned lanes = 0;
    for (int i = 0; i < kLanes<float>; ++i) lanes |= unsigned(hit[i] != 0) << i;
    return lanes;
#endif
}
INLINE unsigned lanes_of(IntD hit) {
    unsigned lanes = 0;
    for (int i = 0; i < kLanes<double>; ++i) lanes |= unsigned(hit[i] != 0) << i;
    return lanes;
}

// The lanes that hold x, as bits.
INLINE unsigned lanes_equal(VecF v, float x) {
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_EQ_OQ);
#else
    return lanes_of(IntF(v == x));
#endif
}
INLINE unsigned lanes_equal(VecD v, double x) { return lanes_of(IntD(v == x)); }

// The first lane for which a comparison holds, or -1.
template <class I>
INLINE int first_lane(I hit) {
    const unsigned lanes = lanes_of(hit);
    return lanes ? __builtin_ctz(lanes) : -1;
}

}  // namespace MSDKERN_NAMESPACE
