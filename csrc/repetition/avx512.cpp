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
namespace {

// Sums to bytes, four vectors at a time. Clamping and saturating are one where nothing can be NaN, as division by the
// scale keeps the order; which vectors must be divided after all (see Quantization) is asked once for the four.
struct Bytes4 {
  __m512 multiplier, bias, residual_scale, residual_zero, scale, reciprocal, lo, hi;
  __m512i correction, zero_point;
  float largest_residual;
  bool is_signed, clamps, limited;

  static float magnitude(float x) { return x < 0 ? -x : x; }

  // Of any output.
  explicit Bytes4(const Epilogue& e) {
    is_signed = e.out_dtype == DType::i8;
    const float lowest = static_cast<float>((is_signed ? -128 : 0) - e.out_zero_point);
    const auto splat = [](float x) { return _mm512_set1_ps(x); };
    residual_scale = splat(e.residual_scale);
    residual_zero = splat(e.residual_zero_point);
    scale = splat(e.out_scale);
    reciprocal = splat(1 / e.out_scale);
    const float from = e.has_lo ? e.lo / e.out_scale : lowest, to = e.has_hi ? e.hi / e.out_scale : lowest + 255;
    lo = splat(from > lowest ? from < lowest + 255 ? from : lowest + 255 : lowest);
    hi = splat(to < lowest + 255 ? to > lowest ? to : lowest : lowest + 255);
    clamps = from > lowest || to < lowest + 255;
    zero_point = _mm512_set1_epi16(static_cast<short>(e.out_zero_point));
    largest_residual = e.has_residual ? magnitude(e.residual_scale) * (256 + magnitude(e.residual_zero_point)) : 0;
  }

  void take(const Finish& f) {  // of its first output
    const float b = f.bias ? *f.bias : 0;
    multiplier = _mm512_set1_ps(*f.multiplier);
    bias = _mm512_set1_ps(b);
    correction = _mm512_set1_epi32(f.correction ? *f.correction : 0);
    // Without clamping, conversions to shorter integers saturate, if nothing leaves int32 before.
    const float largest = 2147483648.0f * magnitude(*f.multiplier) + magnitude(b) + largest_residual;
    limited = clamps || !(largest < 1e9f * f.epilogue->out_scale);
  }

  // Where no step can overflow to infinity, nor a scale's reciprocal be less than normal.
  static bool serve(const Finish& f) {
    const Epilogue& e = *f.epilogue;
    const auto moderate = [](float x) { return x > -1e20f && x < 1e20f; };
    const auto bound = [](bool has, float x) { return !has || x == x; };
    bool all = true;
    for (int64_t o = 0; o < f.outputs; ++o) all &= moderate(f.multiplier[o]) && (!f.bias || moderate(f.bias[o]));
    return all && moderate(e.residual_scale) && moderate(e.residual_zero_point) && e.out_scale > 1e-10f &&
           e.out_scale < 1e10f && bound(e.has_lo, e.lo) && bound(e.has_hi, e.hi) &&
           !(e.has_lo && e.has_hi && e.lo > e.hi);
  }

  template <class Residual> __m512 value(const char* acc, const char* residual) const {
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(acc), correction)), multiplier);
    y = _mm512_add_ps(y, bias);
    if constexpr (std::is_void_v<Residual>) return y;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual));
    const __m512i words = std::is_signed_v<Residual> ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    return _mm512_add_ps(y, _mm512_mul_ps(residual_scale, _mm512_sub_ps(_mm512_cvtepi32_ps(words), residual_zero)));
  }
  template <bool limited> __m512 limit(__m512 v) const { return limited ? _mm512_min_ps(_mm512_max_ps(v, lo), hi) : v; }

  // acc: of four vectors; residual: side by side, as the result.
  template <class Residual, bool limited> __m512i operator()(const char* const* acc, const char* residual) const {
    __m512 y[4], v[4];
    __m512 farthest = _mm512_setzero_ps();  // from the nearest integer
    for (int i = 0; i < 4; ++i) {
      y[i] = value<Residual>(acc[i], residual + i * lanes);
      v[i] = limit<limited>(_mm512_mul_ps(y[i], reciprocal));
      farthest = _mm512_range_ps(farthest, _mm512_reduce_ps(v[i], 0), 0b1011);  // magnitudes
    }
    if (__builtin_expect(_mm512_cmp_ps_mask(farthest, _mm512_set1_ps(0.4999f), _CMP_GT_OQ) != 0, 0))
      for (int i = 0; i < 4; ++i) v[i] = limit<limited>(_mm512_div_ps(y[i], scale));
    const auto shorts = [&](int i) {
      return _mm512_adds_epi16(_mm512_packs_epi32(_mm512_cvtps_epi32(v[i]), _mm512_cvtps_epi32(v[i + 1])), zero_point);
    };
    const __m512i bytes =
        is_signed ? _mm512_packs_epi16(shorts(0), shorts(2)) : _mm512_packus_epi16(shorts(0), shorts(2));
    constexpr auto order = [](int i) { return i % 4 * 4 + i / 4; };  // of words of each vector, within 128 bits
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(order(0), order(1), order(2), order(3), order(4), order(5), order(6), order(7), order(8),
                          order(9), order(10), order(11), order(12), order(13), order(14), order(15)),
        bytes);
  }
};

inline __mmask64 first_bytes(int64_t count) { return ~uint64_t{0} >> (64 - count); }  // 1 to 64

template <class Residual, bool limited> void finish_four(const Bytes4& finish4, Finish f) {
  const int64_t run = f.run ? f.run * 4 : vector_bytes, stride = f.run ? f.run_stride : vector_bytes;
  const char* acc[4];
  int64_t at = 0;  // within a run
  const auto next = [&] {
    const char* here = f.acc + at;
    at += vector_bytes;
    if (at == run) at = 0, f.acc += stride;
    return here;
  };
  for (; f.count >= 4 * lanes; f.count -= 4 * lanes, f.out += 4 * lanes) {
    for (const char*& vector : acc) vector = next();
    _mm512_storeu_si512(f.out, finish4.template operator()<Residual, limited>(acc, f.residual));
    if constexpr (!std::is_void_v<Residual>) f.residual += 4 * lanes;
  }
  if (f.count == 0) return;
  // Fewer vectors than four: the first in place of those that are missing.
  for (int64_t i = 0; i < 4; ++i) acc[i] = i * lanes < f.count ? next() : acc[0];
  const __mmask64 here = first_bytes(f.count);
  alignas(64) char residual[4 * lanes];
  if constexpr (!std::is_void_v<Residual>) _mm512_store_si512(residual, _mm512_maskz_loadu_epi8(here, f.residual));
  _mm512_mask_storeu_epi8(f.out, here, finish4.template operator()<Residual, limited>(acc, residual));
}

template <class Residual> void finish_bytes(Finish f) {
  Bytes4 finish4(*f.epilogue);
  for (int64_t o = 0; o < f.outputs; ++o, f.next_output()) {
    finish4.take(f);
    finish4.limited ? finish_four<Residual, true>(finish4, f) : finish_four<Residual, false>(finish4, f);
  }
}

inline void copy_bytes(const char* from, char* to, int64_t count) {
  for (; count > 64; count -= 64, from += 64, to += 64) _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  _mm512_mask_storeu_epi8(to, first_bytes(count), _mm512_maskz_loadu_epi8(first_bytes(count), from));
}
template <class Copy> void for_rows(const ByteRows& b, char* data, Copy copy) {
  if (b.columns == 0) return;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t r = 0; r < b.rows; ++r)
      copy(b.flat + n * b.image_pitch + r * b.row_pitch, data + n * b.stride_n + r * b.stride_h);
}

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
void unlift_one(const ByteRows& b, const char* lifted, char* data) {
  alignas(64) char words[16 * 64];
  for (int64_t j = (b.segment - 1) / 64 * 64; j >= 0; j -= 64)  // as unlift: the owner of a byte writes it last
    for (int h = 0; h < b.lanes / lanes; ++h) {
      char* flat = b.flat + h * lanes * b.segment + j;
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
  for_rows(b, data, [&](const char* flat, char* row) { copy_bytes(flat, row, b.columns); });
}
void unlift_bytes(const ByteRows& b) {
  for (int64_t o = 0; o < b.outputs; ++o) unlift_one(b, b.lifted + o * b.lifted_step, b.data + o * b.data_step);
}

void lift_one(const ByteRows& b, char* data, char* lifted) {
  for_rows(b, data, [&](char* flat, const char* row) { copy_bytes(row, flat, b.columns); });
  alignas(64) char words[16 * 64];
  for (int64_t j = 0; j < b.segment; j += 64)
    for (int h = 0; h < b.lanes / lanes; ++h) {
      const char* flat = b.flat + h * lanes * b.segment + j;
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
void lift_bytes(const ByteRows& b) {
  for (int64_t o = 0; o < b.outputs; ++o) lift_one(b, b.data + o * b.data_step, b.lifted + o * b.lifted_step);
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

void finish_avx512(const Finish& f) {
  const Epilogue& e = *f.epilogue;
  const bool bytes = e.acc_dtype == DType::i32 && (e.out_dtype == DType::u8 || e.out_dtype == DType::i8) &&
                     !f.per_element && f.out_stride == 1 && f.run % lanes == 0 && Bytes4::serve(f);
  if (bytes && !e.has_residual) return finish_bytes<void>(f);
  if (bytes && e.residual_dtype != DType::f32 && f.residual_stride == 1)
    return e.residual_dtype == DType::u8 ? finish_bytes<uint8_t>(f) : finish_bytes<int8_t>(f);
  finish(f);
}

}  // namespace

void fill_avx512(Kernels& k) {
  fill(k);
  k.finish = finish_avx512;
  k.lift_bytes = lift_bytes;
  k.unlift_bytes = unlift_bytes;
  k.order_words = order_words;
}
}  // namespace pycodesign::repetition
