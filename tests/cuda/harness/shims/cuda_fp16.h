// SPDX-License-Identifier: Apache-2.0
// __half: storage and conversions. Arithmetic is in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector_types.h"

namespace simt {

inline std::uint32_t float_bits(float x) {
    std::uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float bits_float(std::uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

// To nearest, ties to even.
inline std::uint16_t half_bits(float x) {
    std::uint32_t u = float_bits(x);
    const std::uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return 0x7fff;
    if (u >= 0x477ff000) return std::uint16_t(sign | 0x7c00);  // from 65520 on, infinity
    if (u < 0x38800000)  // subnormal: 0.5f + x has its last bit where the half has its own
        return std::uint16_t(sign | (float_bits(bits_float(u) + 0.5f) - 0x3f000000));
    u += 0xfff + (u >> 13 & 1);
    return std::uint16_t(sign | (u - 0x38000000) >> 13);
}
inline float half_value(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | rest << 13);
    const float size =
        rest < 0x400 ? float(rest) * 0x1p-24f : bits_float((rest << 13) + 0x38000000);
    return bits_float(sign | float_bits(size));
}

}  // namespace simt

struct __half_raw {
    unsigned short x;
};
struct __half {
    std::uint16_t bits;
    __half() = default;
    __half(float x) : bits(simt::half_bits(x)) {}
    __half(__half_raw raw) : bits(raw.x) {}
    operator float() const { return simt::half_value(bits); }
    operator __half_raw() const { return {bits}; }
};
typedef __half half;
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half2 half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline float __low2float(__half2 v) { return float(v.x); }
inline float __high2float(__half2 v) { return float(v.y); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return __half(__half_raw{x}); }
inline __half __hmax(__half a, __half b) {
    return float(a) > float(b) || float(b) != float(b) ? a : b;
}
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
