// 16-bit floats as integer and float32 arithmetic without branches, so that loops over them vectorize on every
// processor. Rounding is to nearest even; NaN stays NaN. Always inlined: files for one instruction set use them, too.
#pragma once

#include <bit>
#include <cstdint>

namespace pycodesign::core {

[[gnu::always_inline]] inline float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

[[gnu::always_inline]] inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
}

// float16 has 5 bits of exponent (bias 15) and 10 of mantissa, float32 8 (bias 127) and 23.
[[gnu::always_inline]] inline float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = static_cast<uint32_t>(bits & 0x7fff);
  const uint32_t rebias = magnitude >= 0x7c00 ? (255 - 31) << 23 : (127 - 15) << 23;  // infinity and NaN stay so
  const uint32_t normal = (magnitude << 13) + rebias;
  // Below 2^-14 the value is magnitude * 2^-24: put behind the leading one of 2^-1, where one unit is 2^-24.
  const float subnormal = std::bit_cast<float>(0x3f000000 + magnitude) - 0.5f;
  return std::bit_cast<float>(sign | (magnitude < 0x400 ? std::bit_cast<uint32_t>(subnormal) : normal));
}

[[gnu::always_inline]] inline uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint32_t rounded = (magnitude - ((127u - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14 adding 0.5 leaves, rounded, the multiple of 2^-24 in the lowest bits of the sum.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t result = magnitude < 0x38800000 ? subnormal : rounded;
  result = magnitude >= 0x47800000 ? 0x7c00 : result;  // 2^16 and above are infinity; 65520 rounds to it
  result = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : result;  // as F16C's instruction
  return static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(result);
}

}  // namespace pycodesign::core
