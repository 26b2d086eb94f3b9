// Elements of the three dtypes as float, for the references: plain C++, no processor support needed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "show1/types.h"

namespace show1 {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3ffu;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
    const float magnitude = std::ldexp(static_cast<float>(exponent ? mantissa | 0x400u : mantissa),
                                       static_cast<int>(exponent ? exponent : 1) - 25);
    return from_bits(sign | to_bits(magnitude));
}

// To nearest, ties to even, as the processor's own conversion.
inline uint16_t float_to_half(float value) {
    const uint32_t bits = to_bits(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00u;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    if (magnitude < 6.103515625e-05f)  // subnormal: a multiple of 2^-24; rounding up to 2^-14 gives the right bits too
        return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(magnitude, 24))));
    const uint32_t rounded = to_bits(magnitude) + 0xfffu + (to_bits(magnitude) >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float bfloat_to_float(uint16_t bfloat) { return from_bits(static_cast<uint32_t>(bfloat) << 16); }

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float load(int dtype, const void* data, int64_t at) {
    if (dtype == SHOW1_FLOAT32) return static_cast<const float*>(data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(data)[at];
    return dtype == SHOW1_FLOAT16 ? half_to_float(bits) : bfloat_to_float(bits);
}

inline void store(int dtype, void* data, int64_t at, float value) {
    if (dtype == SHOW1_FLOAT32) {
        static_cast<float*>(data)[at] = value;
    } else {
        static_cast<uint16_t*>(data)[at] = dtype == SHOW1_FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
    }
}

inline int64_t plane(const show1_planes& planes, int b, int c, int f) {
    return b * planes.batch + c * planes.channel + f * planes.frame;
}

}  // namespace show1
