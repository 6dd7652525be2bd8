// AVX-512 F, BW, VL, DQ and VNNI: 16 lanes, 32 registers.
#include <immintrin.h>

#include "repetition/kernels.h"

namespace pycodesign::repetition {
namespace {

constexpr int lanes = 16;
constexpr bool generates_code = true;
constexpr int max_table_vectors = 8, max_dense_vectors = 3, dense_block = 8;
constexpr int linear_rows = 6, linear_vectors = 4, packed_rows = 3;
constexpr int pixel_rows = 6, pixel_vectors = 4;

typedef float f32v __attribute__((vector_size(64), may_alias));
typedef int32_t i32v __attribute__((vector_size(64), may_alias));
typedef uint32_t u32v __attribute__((vector_size(64), may_alias));

inline f32v fma(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a, b, c); }
inline i32v dot4(i32v acc, i32v x, i32v w) { return (i32v)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w); }

inline bool any_beyond(f32v v, float limit) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}

inline i32v round_words(f32v v) { return (i32v)_mm512_cvtps_epi32(v); }

inline u32v widen_bytes(const uint8_t* p) {
  return (u32v)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline u32v widen_halves(const uint8_t* p) {
  return (u32v)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int step> inline bool interleave_first(const uint8_t* const* p, int64_t count, uint32_t flip, uint32_t* out) {
  if (count == 0) return true;
  const auto masked = [count](const uint8_t* from) {
    const auto bytes = static_cast<__mmask32>((uint64_t{1} << (step * (count - 1) + 1)) - 1);
    if constexpr (step == 1)
      return (u32v)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>(bytes), from));
    else return (u32v)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi8(bytes, from)) & 0xff;
  };
  u32v words = masked(p[0]) ^ flip;
  for (int c = 1; c < 4; ++c) words ^= masked(p[c]) << (8 * c);
  _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1u << count) - 1), (__m512i)words);
  return true;
}

struct Lookup {
  f32v low, high;
};
inline Lookup load_lookup(const float* table) { return {_mm512_loadu_ps(table), _mm512_loadu_ps(table + 16)}; }
inline f32v look_up(const Lookup& t, i32v index) { return _mm512_permutex2var_ps(t.low, (__m512i)index, t.high); }

struct Octet {
  f32v twice;  // the fourth bit of an index does not matter
};
inline Octet load_octet(const float* table) {
  const __m512 once = _mm512_castps256_ps512(_mm256_loadu_ps(table));
  return {_mm512_shuffle_f32x4(once, once, 0x44)};
}
inline f32v look_up(const Octet& t, i32v index) { return _mm512_permutexvar_ps((__m512i)index, t.twice); }

// By multiplications: Zen 4 shifts in the pipes that add, and lookups take half of those of both.
inline u32v high_half(u32v v) { return (u32v)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi32(1 << 16)); }
inline u32v shift_half(u32v v, int bits) {
  return (u32v)_mm512_mulhi_epu16((__m512i)v, _mm512_set1_epi16(static_cast<short>(1 << (16 - bits))));
}

using Levels = __m512i;
inline Levels load_levels(const int8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline i32v levels_of(Levels levels, i32v codes) { return (i32v)_mm512_shuffle_epi8(levels, (__m512i)codes); }

// 16 x 16 words; strides in bytes. The first `rows` rows are read, for the others any; the first `to_rows` are
// stored, in order: unlift lets rows overlap.
inline void transpose(const char* from, int64_t from_stride, int64_t rows, char* to, int64_t to_stride,
                      int64_t to_rows) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + (i < rows ? i : 0) * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i >= to_rows) return;
    _mm512_storeu_si512(to + i * to_stride, a[i]);
  }
}

inline f32v minimum(f32v a, f32v b) { return _mm512_min_ps(a, b); }
inline f32v maximum(f32v a, f32v b) { return _mm512_max_ps(a, b); }
inline f32v farther(f32v farthest, f32v v) {
  return _mm512_range_ps(farthest, _mm512_reduce_ps(v, 0), 0b1011);  // magnitudes
}

inline __m512i pack_bytes(const i32v (&w)[4], short zero_point, bool is_signed) {
  const auto shorts = [&](int i) {
    return _mm512_adds_epi16(_mm512_packs_epi32((__m512i)w[i], (__m512i)w[i + 1]), _mm512_set1_epi16(zero_point));
  };
  const __m512i bytes =
      is_signed ? _mm512_packs_epi16(shorts(0), shorts(2)) : _mm512_packus_epi16(shorts(0), shorts(2));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

inline __mmask64 first_bytes(int64_t count) { return ~uint64_t{0} >> (64 - count); }  // 1 to 64
inline void copy_bytes(const char* from, char* to, int64_t count) {
  for (; count > 64; count -= 64, from += 64, to += 64) _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  _mm512_mask_storeu_epi8(to, first_bytes(count), _mm512_maskz_loadu_epi8(first_bytes(count), from));
}

}  // namespace
}  // namespace pycodesign::repetition

#include "repetition/loops_bytes.h"

namespace pycodesign::repetition {
namespace {

// Four vectors of 16 bytes <-> 16 words of a byte of each.
inline __m512i transpose_words(__m512i v) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}
inline __m512i transpose_bytes(__m512i v) {
  return _mm512_shuffle_epi8(
      v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

// Of half h of the lanes, vectors [at, at + 4): a word of four bytes for each lane, and back.
inline __m512i load_words(const ByteRows& b, const char* lifted, int64_t at, int h) {
  const char* from = lifted + at * b.lanes;
  __m512i four = _mm512_loadu_si512(from);
  if (b.lanes > lanes) {
    const __m512i next = _mm512_loadu_si512(from + 64);
    four = h == 0 ? _mm512_shuffle_i32x4(four, next, 0x88) : _mm512_shuffle_i32x4(four, next, 0xdd);
  }
  return transpose_bytes(transpose_words(four));
}
inline void store_words(const ByteRows& b, char* lifted, int64_t at, int h, __m512i words) {
  const __m512i four = transpose_words(transpose_bytes(words));
  char* to = lifted + at * b.lanes + h * lanes;
  if (b.lanes == lanes) return _mm512_storeu_si512(to, four);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(four));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(four, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 64), _mm512_extracti32x4_epi32(four, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 96), _mm512_extracti32x4_epi32(four, 3));
}

// In each 128 bits 4 x 4 words: of lanes 4 q to 4 q + 3, one of which is a row, in part q.
inline void transpose_parts(__m512i (&w)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]),
                c = _mm512_unpacklo_epi32(w[2], w[3]), d = _mm512_unpackhi_epi32(w[2], w[3]);
  w[0] = _mm512_unpacklo_epi64(a, c);
  w[1] = _mm512_unpackhi_epi64(a, c);
  w[2] = _mm512_unpacklo_epi64(b, d);
  w[3] = _mm512_unpackhi_epi64(b, d);
}

// 64 vectors at a time, as 16 x 16 words of four; the last ones, where 16 are left or fewer, as 16 x 4.
void unlift_one(const ByteRows& b, const char* lifted, char* all) {
  alignas(64) char words[16 * 64];
  for (int64_t j = (b.segment - 1) / 64 * 64; j >= 0; j -= 64)  // as unlift: the owner of a byte writes it last
    for (int h = 0; h < b.lanes / lanes; ++h) {
      char* flat = all + h * lanes * b.segment + j;
      const int64_t left = b.segment - j;
      const auto load = [&](int i) {
        return 4 * i < left ? load_words(b, lifted, j + 4 * i, h) : _mm512_setzero_si512();
      };
      if (left > 16) {
        for (int i = 0; i < 16; ++i) _mm512_store_si512(words + i * 64, load(i));
        transpose(words, 64, 16, flat, b.segment, 16);
        continue;
      }
      __m512i w[4];
      for (int i = 0; i < 4; ++i) w[i] = load(i);
      transpose_parts(w);
      const auto store_part = [&](auto part) {
        for (int i = 0; i < 4; ++i, flat += b.segment)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(flat), _mm512_extracti32x4_epi32(w[i], part.value));
      };
      store_part(std::integral_constant<int, 0>{});
      store_part(std::integral_constant<int, 1>{});
      store_part(std::integral_constant<int, 2>{});
      store_part(std::integral_constant<int, 3>{});
    }
}
void lift_one(const ByteRows& b, const char* all, char* lifted) {
  alignas(64) char words[16 * 64];
  for (int64_t j = 0; j < b.segment; j += 64)
    for (int h = 0; h < b.lanes / lanes; ++h) {
      const char* flat = all + h * lanes * b.segment + j;
      const int64_t left = b.segment - j;
      if (left > 16) {
        transpose(flat, b.segment, 16, words, 64, 16);
        for (int i = 0; i < 16 && 4 * i < left; ++i)
          store_words(b, lifted, j + 4 * i, h, _mm512_load_si512(words + i * 64));
        continue;
      }
      __m512i w[4];
      for (int i = 0; i < 4; ++i) {
        const auto row = [&](int part) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(flat + (4 * part + i) * b.segment));
        };
        w[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
        w[i] = _mm512_inserti32x4(_mm512_inserti32x4(w[i], row(2), 2), row(3), 3);
      }
      transpose_parts(w);
      for (int i = 0; i < 4 && 4 * i < left; ++i) store_words(b, lifted, j + 4 * i, h, w[i]);
    }
}
template <int registers> void order_from(const Order& b) {
  const auto first_words = [](int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? 0xffff >> (16 - count) : 0);
  };
  const char* from = b.from;
  char* to = b.to;
  for (int64_t o = 0; o < b.outputs; ++o, from += b.from_step, to += b.to_step) {
    __m512i source[registers];
    for (int i = 0; i < registers; ++i)
      source[i] = _mm512_maskz_loadu_epi32(first_words(b.from_count - 16 * i), from + 64 * i);
    for (int64_t i = 0; i < b.count; i += 16) {
      const __mmask16 here = first_words(b.count - i);
      const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, b.index + i));
      __m512i words;
      if constexpr (registers == 1) words = _mm512_permutexvar_epi32(index, source[0]);
      else words = _mm512_permutex2var_epi32(source[0], index, source[1]);
      if constexpr (registers == 4)
        words = _mm512_mask_blend_epi32(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), words,
                                        _mm512_permutex2var_epi32(source[2], index, source[3]));
      _mm512_mask_storeu_epi32(to + i * 4, here, words);
    }
  }
}
void order_words(const Order& b) {
  b.from_count <= 16 ? order_from<1>(b) : b.from_count <= 32 ? order_from<2>(b) : order_from<4>(b);
}

}  // namespace

void fill_avx512(Kernels& k) {
  fill(k);
  fill_bytes(k);
  k.order_words = order_words;
}
}  // namespace pycodesign::repetition
