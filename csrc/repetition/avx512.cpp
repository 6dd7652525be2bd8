// AVX-512 F, BW, VL, DQ and VNNI: 16 lanes, 32 registers.
#include <immintrin.h>

#include "repetition/kernels.h"

namespace pycodesign::repetition {
namespace {

constexpr int lanes = 16;
constexpr bool generates_code = true;
constexpr int max_table_vectors = 8, max_dense_vectors = 3, dense_block = 8;
constexpr int linear_rows = 6, linear_vectors = 4, packed_rows = 3;

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

}  // namespace
}  // namespace pycodesign::repetition

#include "repetition/loops.h"

namespace pycodesign::repetition {
void fill_avx512(Kernels& k) { fill(k); }
}  // namespace pycodesign::repetition
