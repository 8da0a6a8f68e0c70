// SPDX-License-Identifier: Apache-2.0
// Exponentials and logarithms of vectors.
#pragma once

#include "storage.h"

namespace MSDKERN_NAMESPACE {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// exp(x / T) is 2^(x scale).
template <class Real>
struct Rate {
    Real scale, rest;      // log2(e) / T in two parts
    Real step, step_rest;  // T ln 2 in two parts, the first so short that n step is exact
    Real lowest;           // the x that makes a power of 0
    explicit Rate(double temperature = 1) {
        const bool single = sizeof(Real) == 4;
        const double exact = 1.4426950408889634074 / temperature;
        scale = Real(exact);
        rest = single ? Real(exact - double(scale)) : Real(2.0355273740931033e-17 / temperature);
        const double unit = temperature * 0.69314718055994530942, most = single ? 3.4e38 : 1.7e308;
        // Adding a large number and taking it off again leaves 12 bits of a float, 39 of a double.
        const double large = unit * (single ? 4096 : 16384);
        step = Real(unit < most ? unit : most), step_rest = 0;
        if (large < most / 2) {
            step = (step + Real(large)) - Real(large);
            step_rest = Real((unit - double(step)) + temperature * 2.3190468138462996e-17);
        }
        const double edge = (single ? -127 : -1023) / exact;
        lowest = Real(edge > -most ? edge : -most);
    }
};

// x scale less the whole or broken number n nearest to it, as if the product were not rounded.
template <class V, class Real>
INLINE V remainder_of(V x, V n, Rate<Real> rate) {
    if constexpr (kFused) return x * rate.rest + (x * rate.scale - n);
    return ((x - n * rate.step) - n * rate.step_rest) * rate.scale;
}

// exp(x / T) for x <= 0: exactly 1 at 0, NaN for NaN; 0 for what is below half the smallest normal,
// and between the two not exact.
INLINE VecF exponential(VecF x, Rate<float> rate) {
    x = maximum(splat(rate.lowest), x);
#if defined(__AVX512F__) && !defined(MSDKERN_VECTOR_BYTES)
    // Sixteenths: 2^(j / 16) by a permutation, so that the polynomial is short. Multiplications are
    // what costs. From each entry its index is taken, which the exponent's addition brings back.
    alignas(64) static const uint32_t sixteenths[16] = {
        0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
        0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
        0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d,
    };
    const float shift = 786432.0f;  // 1.5 * 2^19: the low bits of t hold round(16 x scale)
    const VecF t = x * rate.scale + shift;
    const VecF r = remainder_of(x, VecF(t - shift), rate);
    const VecF whole = (VecF)(_mm512_permutexvar_epi32((__m512i)t, read<__m512i>(sixteenths)));
    const VecF power = (VecF)((IntF)whole + ((IntF)t << 19));
    VecF p = r * 5.5504109e-2f + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    return p * (power * r) + power;
#else
    // 1.5 * 2^23 + 127: the low bits of t hold round(x scale) with the exponent's bias.
    const float shift = 12583039.0f;
    const VecF t = x * rate.scale + shift;
    const VecF r = remainder_of(x, VecF(t - shift), rate);
    // 1 + r p(r) on [-1/2, 1/2]; p minimises the relative error, 3e-9.
    VecF p = splat(1.53210734e-4f);
    p = p * r + 1.33902184e-3f;
    p = p * r + 9.61852645e-3f;
    p = p * r + 5.55036236e-2f;
    p = p * r + 2.40226478e-1f;
    p = p * r + 6.93147181e-1f;
    p = p * r + 1.0f;
    return p * (VecF)((IntF)t << 23);
#endif
}
INLINE VecF exponential(VecF x) { return exponential(x, Rate<float>()); }

INLINE VecD exponential(VecD x, Rate<double> rate) {
    x = maximum(splat(rate.lowest), x);
    const double shift = 6755399441056767.0;  // 1.5 * 2^52 + 1023
    const VecD t = x * rate.scale + shift;
    const VecD r = remainder_of(x, VecD(t - shift), rate) * 0.69314718055994530942;
    VecD p = splat(1.0 / 6227020800.0);  // Taylor to degree 13: 4e-18 at ln 2 / 2
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    return ((p * (r * r) + r) + 1.0) * (VecD)((IntD)t << 52);
}
INLINE VecD exponential(VecD x) { return exponential(x, Rate<double>()); }

// log(x) for positive normal x; NaN for NaN. log m = 2 artanh((m - 1) / (m + 1)). -------------

INLINE VecF logarithm(VecF x) {
    IntF e = ((IntF)x - 0x3f3504f3) >> 23;  // so that m lies in [sqrt(1/2), sqrt(2))
    VecF m = (VecF)((IntF)x - (e << 23));
    VecF n = __builtin_convertvector(e, VecF);
    VecF s = (m - 1.0f) / (m + 1.0f), w = s * s;
    VecF p = splat(2.0f / 9.0f);
    p = p * w + 2.0f / 7.0f;
    p = p * w + 2.0f / 5.0f;
    p = p * w + 2.0f / 3.0f;
    VecF y = n * 0.693359375f + (s * 2.0f + (s * (p * w) - n * 2.12194440e-4f));
    return x == x ? (x > 3.4e38f ? x : y) : x;
}

INLINE VecD logarithm(VecD x) {
    IntD e = ((IntD)x - 0x3fe6a09e667f3bcd) >> 52;
    VecD m = (VecD)((IntD)x - (e << 52));
    VecD n = __builtin_convertvector(e, VecD);
    VecD s = (m - 1.0) / (m + 1.0), w = s * s;
    VecD p = splat(2.0 / 23.0);
    p = p * w + 2.0 / 21.0;
    p = p * w + 2.0 / 19.0;
    p = p * w + 2.0 / 17.0;
    p = p * w + 2.0 / 15.0;
    p = p * w + 2.0 / 13.0;
    p = p * w + 2.0 / 11.0;
    p = p * w + 2.0 / 9.0;
    p = p * w + 2.0 / 7.0;
    p = p * w + 2.0 / 5.0;
    p = p * w + 2.0 / 3.0;
    VecD y = n * 6.93145751953125e-1 + (s * 2.0 + (s * (p * w) + n * 1.42860682030941723212e-6));
    return x == x ? (x > 1.7e308 ? x : y) : x;
}

}  // namespace MSDKERN_NAMESPACE
