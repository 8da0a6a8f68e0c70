// SPDX-License-Identifier: Apache-2.0
// Vectors loaded from the storage types and rounded to them: whole, in part, past the caches.
#pragma once

#include "simd.h"

namespace MSDKERN_NAMESPACE {

INLINE VecF load(const float *p) { return read<VecF>(p); }
INLINE VecD load(const double *p) { return read<VecD>(p); }
INLINE void store(float *p, VecF v) { write(p, v); }
INLINE void store(double *p, VecD v) { write(p, v); }

// A bfloat is the upper half of a float: a shuffle brings it there, another takes it from there.
// (What GCC 12 makes of __builtin_convertvector takes two to three times as long.)
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
alignas(64) static const uint16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                      17, 19, 21, 23, 25, 27, 29, 31};
alignas(64) static const uint16_t kToUpperHalves[32] = {0, 0,  0, 1,  0, 2,  0, 3,  0, 4, 0,
                                                        5, 0,  6, 0,  7, 0,  8, 0,  9, 0, 10,
                                                        0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
INLINE BitsF to_upper_halves(HalfF h) {
    return (BitsF)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, read<__m512i>(kToUpperHalves),
                                                 _mm512_castsi256_si512((__m256i)h));
}
INLINE HalfF upper_halves(BitsF u) {
    return (HalfF)_mm512_castsi512_si256(
        _mm512_permutexvar_epi16(read<__m512i>(kUpperHalves), (__m512i)u));
}
#elif defined(__AVX2__) && !defined(MSDKERN_VECTOR_BYTES)
INLINE BitsF to_upper_halves(HalfF h) {
    const __m256i places =
        _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1,
                         -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return (BitsF)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)h), places);
}
INLINE HalfF upper_halves(BitsF u) {
    const __m256i places =
        _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10,
                         11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    return (HalfF)_mm256_castsi256_si128(
        _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)u, places), 0x08));
}
#else
INLINE BitsF to_upper_halves(HalfF h) { return __builtin_convertvector(h, BitsF) << 16; }
INLINE HalfF upper_halves(BitsF u) { return __builtin_convertvector(u >> 16, HalfF); }
#endif

INLINE VecF load(const bfloat *p) { return (VecF)to_upper_halves(read<HalfF>(p)); }

// Round to nearest even; NaN, quiet as arithmetic leaves it, stays NaN.
INLINE HalfF rounded_to(const bfloat *, VecF v) {
    const BitsF u = (BitsF)v;
    return upper_halves(u + (v == v ? 0x7fffu + ((u >> 16) & 1u) : BitsF{}));
}

#if defined(__F16C__) && !defined(MSDKERN_VECTOR_BYTES)
#if defined(__AVX512F__)
INLINE VecF load(const half *p) { return (VecF)_mm512_cvtph_ps(read<__m256i>(p)); }
INLINE HalfF rounded_to(const half *, VecF v) { return (HalfF)_mm512_cvtps_ph((__m512)v, 0); }
#else
INLINE VecF load(const half *p) { return (VecF)_mm256_cvtph_ps(read<__m128i>(p)); }
INLINE HalfF rounded_to(const half *, VecF v) { return (HalfF)_mm256_cvtps_ph((__m256)v, 0); }
#endif
#else
INLINE VecF load(const half *p) {
    BitsF h = __builtin_convertvector(read<HalfF>(p), BitsF);
    BitsF magnitude = (h & 0x7fffu) << 13;
    BitsF finite = (BitsF)((VecF)magnitude * 0x1p112f);  // moves the exponent bias, denormals too
    BitsF result = (BitsF)(magnitude >= 0x0f800000u) ? (magnitude | 0x7f800000u) : finite;
    return (VecF)(result | ((h & 0x8000u) << 16));
}

INLINE HalfF rounded_to(const half *, VecF v) {
    BitsF u = (BitsF)v, sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    BitsF normal = (u - 0x37fff001u + ((u >> 13) & 1u)) >> 13;  // rebias, round to nearest even
    BitsF tiny = (BitsF)((VecF)u + 0.5f) - 0x3f000000u;         // the addition rounds a denormal
    BitsF large = (BitsF)(u > 0x7f800000u) ? (BitsF{} + 0x7e00u) : (BitsF{} + 0x7c00u);
    BitsF h = (BitsF)(u < 0x38800000u) ? tiny : normal;
    h = (BitsF)(u >= 0x477ff000u) ? large : h;
    return __builtin_convertvector(h | sign, HalfF);
}
#endif
template <class S>
INLINE void store(S *p, VecF v) {
    write(p, rounded_to(p, v));
}

// Past the caches where that is possible; to an address of whole vectors.
INLINE void stream(float *p, VecF v) {
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__) && !defined(MSDKERN_VECTOR_BYTES)
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
}
INLINE void stream(double *p, VecD v) { stream(reinterpret_cast<float *>(p), (VecF)v); }
template <class S>
INLINE void stream(S *p, VecF v) {
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
    _mm256_stream_si256(reinterpret_cast<__m256i *>(p), (__m256i)rounded_to(p, v));
#elif defined(__AVX__) && !defined(MSDKERN_VECTOR_BYTES)
    _mm_stream_si128(reinterpret_cast<__m128i *>(p), (__m128i)rounded_to(p, v));
#else
    store(p, v);
#endif
}
// What was streamed is seen by other threads before anything stored later.
INLINE void end_streams() {
#if defined(__AVX__) && !defined(MSDKERN_VECTOR_BYTES)
    _mm_sfence();
#endif
}

// The first n lanes (1 <= n <= lanes); the others are `fill`. Nothing beyond p[n - 1] is read or
// written.
template <class Real>
INLINE typename Vector<Real>::Int first_lanes(int n) {
    typedef typename Vector<Real>::Lane Lane;
    static const Lane window[32] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                    -1, -1, -1, -1, -1, -1, -1, -1};  // then zeros
    return read<typename Vector<Real>::Int>(window + 16 - n);
}

#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
template <class S>
INLINE VecF load_partial(const S *p, int n, float fill) {
    const __m256i part = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    return first_lanes<float>(n) ? load(reinterpret_cast<const S *>(&part)) : splat(fill);
}
template <class S>
INLINE void store_partial(S *p, int n, VecF v) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)rounded_to(p, v));
}
#else
template <class S>
INLINE VecOf<typename Kind<S>::Real> load_partial(const S *p, int n, typename Kind<S>::Real fill) {
    typedef typename Kind<S>::Real Real;
    S part[kLanes<Real>] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    return first_lanes<Real>(n) ? load(part) : splat(fill);
}

template <class S>
INLINE void store_partial(S *p, int n, VecOf<typename Kind<S>::Real> v) {
    S part[kLanes<typename Kind<S>::Real>];
    store(part, v);
    for (int i = 0; i < n; ++i) p[i] = part[i];
}
#endif

INLINE void store_one(float *p, float x) { *p = x; }
INLINE void store_one(double *p, double x) { *p = x; }
template <class S>
INLINE void store_one(S *p, float x) {
    store_partial(p, 1, splat(x));
}

// 0, 1, 2, ...
template <class Real>
INLINE VecOf<Real> lane_numbers() {
    static const Real numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return read<VecOf<Real>>(numbers);
}

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
INLINE VecF load_partial(const float *p, int n, float fill) {
    const IntF lanes = first_lanes<float>(n);
    return lanes ? (VecF)_mm256_maskload_ps(p, (__m256i)lanes) : splat(fill);
}
INLINE VecD load_partial(const double *p, int n, double fill) {
    const IntD lanes = first_lanes<double>(n);
    return lanes ? (VecD)_mm256_maskload_pd(p, (__m256i)lanes) : splat(fill);
}
#elif defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
INLINE VecF load_partial(const float *p, int n, float fill) {
    return (VecF)_mm512_mask_loadu_ps((__m512)splat(fill), __mmask16((1u << n) - 1), p);
}
INLINE VecD load_partial(const double *p, int n, double fill) {
    return (VecD)_mm512_mask_loadu_pd((__m512d)splat(fill), __mmask8((1u << n) - 1), p);
}
INLINE void store_partial(float *p, int n, VecF v) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
INLINE void store_partial(double *p, int n, VecD v) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#endif

// Vectors of classes: whole ones, or the first `lanes` lanes of the last.
struct Whole {};
struct First {
    int lanes;
};
template <class S>
INLINE StoredIn<S> load_some(const S *from, Whole) {
    return load(from);
}
template <class S>
INLINE StoredIn<S> load_some(const S *from, First part) {
    return load_partial(from, part.lanes, typename Kind<S>::Real(0));
}

}  // namespace MSDKERN_NAMESPACE
