// Dense sums of blocks of weights: what a matrix unit does, by vectors. A part of loops.h.
#pragma once

namespace pycodesign::repetition {
namespace {

// The blocks of all outputs from rows of codes. The bits above a code are another's: tables repeat.
template <bool bf16> void expand(const MatrixSum& m) {
  const BlockCodes& b = m.codes;
  const int together = 8 / b.bits, lines = bf16 ? block_outputs / 2 : block_outputs;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(b.codes);
  char* to = m.expanded;
  for (int64_t o = 0; o < m.outputs; o += block_outputs)
    for (int64_t s = 0; s < m.steps; ++s)
      for (int line = 0; line < lines; ++line, codes += line % together == 0 ? 64 : 0) {
        const int shift = line % together * b.bits;
        const auto levels = [&](int row) { return b.levels + (o + row) * b.level_stride; };
        if constexpr (!bf16) {
          for (int at = 0; at < 64; ++at) *to++ = levels(line)[codes[at] >> shift & 15];
        } else {
          for (int odd = 0; odd < 2; ++odd)
            for (int k = 0; k < 32; ++k) {
              const int code = codes[k / 8 * 16 + odd * 8 + k % 8] >> shift & 15;
              *to++ = levels(2 * line + odd)[code];
              *to++ = levels(2 * line + odd)[16 + code];
            }
        }
      }
}

struct Bf16Pairs {
  using vec = f32v;
  static f32v multiply_add(f32v acc, u32v x, uint32_t w) {
    const f32v first = reinterpret_cast<f32v>(splat_bits(w << 16)),
               second = reinterpret_cast<f32v>(splat_bits(w & 0xffff0000u));
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
  if (m.codes.bits) expand<(terms > 1)>(m);
  const char* const weights = m.codes.bits ? m.expanded : m.weights;
  using vec = typename Products::vec;
  for (int64_t v = 0; v < m.vectors; ++v)
    for (int64_t o = 0; o < m.outputs; o += together) {
      vec acc[together] = {};
      const char* w = weights + (o / block_outputs * m.steps * block_outputs + o % block_outputs) * 64;
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
