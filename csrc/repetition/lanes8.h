// Eight lanes of AVX2, for avx2.cpp and avx2_vnni.cpp; internal linkage as in loops.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "repetition/kernels.h"

namespace pycodesign::repetition {
namespace {

constexpr int lanes = 8;
constexpr bool generates_code = true;
constexpr int max_table_vectors = 8, max_dense_vectors = 3, dense_block = 4;
constexpr int linear_rows = 2, linear_vectors = 4, packed_rows = 2;
constexpr int pixel_rows = 6, pixel_vectors = 2;

typedef float f32v __attribute__((vector_size(32), may_alias));
typedef int32_t i32v __attribute__((vector_size(32), may_alias));
typedef uint32_t u32v __attribute__((vector_size(32), may_alias));

inline f32v fma(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a, b, c); }

// Sum of four products uint8 * int8 per lane, exact for every value (vpmaddubsw would saturate).
inline i32v dot4(i32v acc, i32v x, i32v w) {
#ifdef __AVXVNNI__
  return (i32v)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)x, (__m256i)w);
#else
  const __m256i even_x = _mm256_and_si256((__m256i)x, _mm256_set1_epi16(0xff)),
                odd_x = _mm256_srli_epi16((__m256i)x, 8);
  const __m256i even_w = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8),
                odd_w = _mm256_srai_epi16((__m256i)w, 8);
  return (i32v)((u32v)acc + (u32v)_mm256_madd_epi16(even_x, even_w) + (u32v)_mm256_madd_epi16(odd_x, odd_w));
#endif
}

inline bool any_beyond(f32v v, float limit) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
  return _mm256_movemask_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
}

inline i32v round_words(f32v v) { return (i32v)_mm256_cvtps_epi32(v); }

inline u32v widen_bytes(const uint8_t* p) {
  return (u32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline u32v widen_halves(const uint8_t* p) {
  return (u32v)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline f32v minimum(f32v a, f32v b) { return _mm256_min_ps(a, b); }
inline f32v maximum(f32v a, f32v b) { return _mm256_max_ps(a, b); }
inline f32v farther(f32v farthest, f32v v) {
  const __m256 distance = _mm256_sub_ps(v, _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return _mm256_max_ps(farthest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), distance));
}

inline __m256i pack_bytes(const i32v (&w)[4], short zero_point, bool is_signed) {
  const auto shorts = [&](int i) {
    return _mm256_adds_epi16(_mm256_packs_epi32((__m256i)w[i], (__m256i)w[i + 1]), _mm256_set1_epi16(zero_point));
  };
  const __m256i bytes =
      is_signed ? _mm256_packs_epi16(shorts(0), shorts(2)) : _mm256_packus_epi16(shorts(0), shorts(2));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The first ones and the last ones, which may be the same.
template <class Piece> inline void copy_ends(const char* from, char* to, int64_t count) {
  Piece first, last;
  const int64_t at = count - static_cast<int64_t>(sizeof(Piece));
  std::memcpy(&first, from, sizeof first);
  std::memcpy(&last, from + at, sizeof last);
  std::memcpy(to, &first, sizeof first);
  std::memcpy(to + at, &last, sizeof last);
}
inline void copy_bytes(const char* from, char* to, int64_t count) {
  for (; count > 64; count -= 32, from += 32, to += 32) std::memcpy(to, from, 32);
  if (count >= 32) return copy_ends<__m256i>(from, to, count);
  if (count >= 16) return copy_ends<__m128i>(from, to, count);
  if (count >= 8) return copy_ends<uint64_t>(from, to, count);
  if (count >= 4) return copy_ends<uint32_t>(from, to, count);
  if (count >= 2) return copy_ends<uint16_t>(from, to, count);
  *to = *from;
}

template <int step> inline bool interleave_first(const uint8_t* const*, int64_t, uint32_t, uint32_t*) { return false; }

struct Lookup {
  f32v part[4];
};
inline Lookup load_lookup(const float* t) {
  return {{_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8), _mm256_loadu_ps(t + 16), _mm256_loadu_ps(t + 24)}};
}
inline f32v look_up(const Lookup& t, i32v index) {
  const __m256i i = (__m256i)index;
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)),
               bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 27));
  const __m256 low =
      _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.part[0], i), _mm256_permutevar8x32_ps(t.part[1], i), bit3);
  const __m256 high =
      _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.part[2], i), _mm256_permutevar8x32_ps(t.part[3], i), bit3);
  return _mm256_blendv_ps(low, high, bit4);
}

struct Octet {
  f32v table;
};
inline Octet load_octet(const float* t) { return {_mm256_loadu_ps(t)}; }
inline f32v look_up(const Octet& t, i32v index) { return _mm256_permutevar8x32_ps(t.table, (__m256i)index); }

inline u32v high_half(u32v v) { return v >> 16; }
// By a multiplication: Zen 3 shifts in the pipes that look up.
inline u32v shift_half(u32v v, int bits) {
  return (u32v)_mm256_mulhi_epu16((__m256i)v, _mm256_set1_epi16(static_cast<short>(1 << (16 - bits))));
}

using Levels = __m256i;
inline Levels load_levels(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline i32v levels_of(Levels levels, i32v codes) { return (i32v)_mm256_shuffle_epi8(levels, (__m256i)codes); }

// 8 x 8 words; strides in bytes. The first `rows` rows are read, for the others any; the first `to_rows` are
// stored, in order: unlift lets rows overlap.
inline void transpose(const char* from, int64_t from_stride, int64_t rows, char* to, int64_t to_stride,
                      int64_t to_rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + (i < rows ? i : 0) * from_stride));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (i >= to_rows) return;
    _mm256_storeu_ps(reinterpret_cast<float*>(to + i * to_stride), b[i]);
  }
}

}  // namespace
}  // namespace pycodesign::repetition
