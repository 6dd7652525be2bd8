// Dense sums of blocks of weights: what a matrix unit does, by vectors. A part of loops.h.
#pragma once

namespace pycodesign::repetition {
namespace {

// Rows of bytes that hold codes, to rows of levels. The bits above a code are another's: tables repeat.
void expand_i8(const BlockCodes& b) {
  const int together = 8 / b.bits;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(b.codes);
  char* to = b.to;
  for (int64_t i = 0; i < b.count; ++i)
    for (int row = 0; row < block_outputs; row += together, codes += 64)
      for (int r = 0; r < together; ++r, to += 64) {
        const char* levels = b.levels + (row + r) * b.level_stride;
        for (int at = 0; at < 64; ++at) to[at] = levels[codes[at] >> (r * b.bits) & 15];
      }
}

void expand_bf16(const BlockCodes& b) {
  const int together = 8 / b.bits;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(b.codes);
  char* to = b.to;
  for (int64_t i = 0; i < b.count; ++i)
    for (int pair = 0; pair < block_outputs / 2; pair += together, codes += 64)
      for (int r = 0; r < together; ++r)
        for (int odd = 0; odd < 2; ++odd, to += 64) {
          const char* levels = b.levels + (2 * (pair + r) + odd) * b.level_stride;
          for (int k = 0; k < 32; ++k) {
            const int code = codes[k / 8 * 16 + odd * 8 + k % 8] >> (r * b.bits) & 15;
            to[2 * k] = levels[code];
            to[2 * k + 1] = levels[16 + code];
          }
        }
}

struct Bf16Pairs {
  using vec = f32v;
  static f32v multiply_add(f32v acc, u32v x, uint32_t w) {
    const f32v first = reinterpret_cast<f32v>(splat_bits(w << 16)), second = reinterpret_cast<f32v>(splat_bits(w & 0xffff0000u));
    return fma(reinterpret_cast<f32v>(x & 0xffff0000u), second, fma(reinterpret_cast<f32v>(x << 16), first, acc));
  }
};
struct BytesOfFour {
  using vec = i32v;
  static i32v multiply_add(i32v acc, u32v x, uint32_t w) {
    return dot4(acc, reinterpret_cast<i32v>(x), reinterpret_cast<i32v>(splat_bits(w)));
  }
};

template <class Products, int terms> void multiply(const MatrixSum& m) {
  constexpr int together = 8;  // outputs
  using vec = typename Products::vec;
  for (int64_t v = 0; v < m.vectors; ++v)
    for (int64_t o = 0; o < m.outputs; o += together) {
      vec acc[together] = {};
      const char* w = m.weights + (o / block_outputs * m.steps * block_outputs + o % block_outputs) * 64;
      for (int64_t s = 0; s < m.steps; ++s, w += block_bytes)
        for (int word = 0; word < block_words; ++word) {
          if (m.gathered && s * block_words + word >= m.rows) break;
          const char* x = m.x + (m.gathered ? m.source[s * block_words + word] : m.source[s] + word * m.row_stride) +
                          v * vector_bytes;
          for (int t = 0; t < terms; ++t, x += m.term_stride) {
            const u32v words = *reinterpret_cast<const u32v*>(x);
            for (int i = 0; i < together; ++i) {
              uint32_t weight;
              std::memcpy(&weight, w + i * 64 + word * 4, 4);
              acc[i] = Products::multiply_add(acc[i], words, weight);
            }
          }
        }
      for (int i = 0; i < together; ++i)
        *reinterpret_cast<vec*>(m.acc + (o + i) * m.acc_stride + v * vector_bytes) = acc[i];
    }
}

}  // namespace
}  // namespace pycodesign::repetition
