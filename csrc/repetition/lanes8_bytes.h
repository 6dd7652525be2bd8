// Eight lanes of AVX2 with their loops, and bytes between lanes and rows.
#pragma once

#include "repetition/lanes8.h"
#include "repetition/loops_bytes.h"

namespace pycodesign::repetition {
namespace {

// 16 x 16 bytes in each half.
inline void transpose_bytes(__m256i (&v)[16]) {
  for (int step = 0; step < 4; ++step) {  // each interleaves the first eight with the last
    __m256i next[16];
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm256_unpacklo_epi8(v[i], v[i + 8]);
      next[2 * i + 1] = _mm256_unpackhi_epi8(v[i], v[i + 8]);
    }
    for (int i = 0; i < 16; ++i) v[i] = next[i];
  }
}

// 512 bytes: vectors of 16 lanes, i and 16 + i in the halves of row i; of 8 lanes four of them, 16 apart.
inline int64_t block_vectors(const ByteRows& b) { return 512 / b.lanes; }
inline __m128i pair_at(const char* first, const char* second) {
  return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)),
                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second)));
}

// 4 x 16 bytes to 16 words.
inline void transpose_four(const char* from, char* to) {
  const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)); };
  const auto store = [&](int i, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), v); };
  const __m128i a = _mm_unpacklo_epi8(row(0), row(1)), b = _mm_unpacklo_epi8(row(2), row(3)),
                c = _mm_unpackhi_epi8(row(0), row(1)), d = _mm_unpackhi_epi8(row(2), row(3));
  store(0, _mm_unpacklo_epi16(a, b));
  store(1, _mm_unpackhi_epi16(a, b));
  store(2, _mm_unpacklo_epi16(c, d));
  store(3, _mm_unpackhi_epi16(c, d));
}

void unlift_one(const ByteRows& b, const char* lifted, char* flat) {
  if (b.lanes == 16 && b.segment <= 4) {
    char words[64];
    transpose_four(lifted, words);
    for (int64_t l = 0; l < 16; ++l) std::memcpy(flat + l * b.segment, words + 4 * l, 4);
    return;
  }
  const int64_t block = block_vectors(b), apart = 16 * b.lanes;
  for (int64_t j = (b.segment - 1) / block * block; j >= 0;
       j -= block) {  // as unlift: the owner of a byte writes it last
    __m256i v[16];
    for (int i = 0; i < 16; ++i) {
      const char* from = lifted + (j + i) * b.lanes;
      if (b.lanes == 16)
        v[i] =
            _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(from + apart), reinterpret_cast<const __m128i*>(from));
      else v[i] = _mm256_set_m128i(pair_at(from + 2 * apart, from + 3 * apart), pair_at(from, from + apart));
    }
    transpose_bytes(v);
    for (int l = 0; l < b.lanes; ++l) {
      char* to = flat + l * b.segment + j;
      if (b.lanes == 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v[l]);
      } else {
        const __m256i low = _mm256_permute2x128_si256(v[l], v[l + 8], 0x20),
                      high = _mm256_permute2x128_si256(v[l], v[l + 8], 0x31);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), high);
      }
    }
  }
}

void lift_one(const ByteRows& b, const char* flat, char* lifted) {
  const int64_t block = block_vectors(b), apart = 16 * b.lanes;
  for (int64_t j = 0; j < b.segment; j += block) {
    __m256i v[16];
    for (int l = 0; l < b.lanes; ++l) {
      const auto* from = reinterpret_cast<const __m256i*>(flat + l * b.segment + j);
      v[l] = _mm256_loadu_si256(from);
      if (b.lanes == 16) continue;
      const __m256i high = _mm256_loadu_si256(from + 1);
      v[l + 8] = _mm256_permute2x128_si256(v[l], high, 0x31);
      v[l] = _mm256_permute2x128_si256(v[l], high, 0x20);
    }
    transpose_bytes(v);
    for (int i = 0; i < 16; ++i) {
      char* to = lifted + (j + i) * b.lanes;
      const __m128i low = _mm256_castsi256_si128(v[i]), high = _mm256_extracti128_si256(v[i], 1);
      if (b.lanes == 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + apart), high);
      } else {
        _mm_storel_pi(reinterpret_cast<__m64*>(to), _mm_castsi128_ps(low));
        _mm_storeh_pi(reinterpret_cast<__m64*>(to + apart), _mm_castsi128_ps(low));
        _mm_storel_pi(reinterpret_cast<__m64*>(to + 2 * apart), _mm_castsi128_ps(high));
        _mm_storeh_pi(reinterpret_cast<__m64*>(to + 3 * apart), _mm_castsi128_ps(high));
      }
    }
  }
}

}  // namespace
}  // namespace pycodesign::repetition
