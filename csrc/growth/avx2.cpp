// Eight columns at once: the two halves of a register hold four each.
#include <immintrin.h>

#include "growth/half_loops.h"
#include "growth/kernels.h"

namespace pycodesign::growth {
namespace {

// Stores half as wide as a cache line fill the processor's write buffers in half as many steps.
void stream(char* to, const char* from, size_t lines) {
  for (size_t i = 0; i < 64 * lines; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}

// 4 x 4 floats, in each half.
inline __attribute__((always_inline)) void transpose(__m256 (&v)[4]) {
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(a, c, 0x44);
  v[1] = _mm256_shuffle_ps(a, c, 0xee);
  v[2] = _mm256_shuffle_ps(b, d, 0x44);
  v[3] = _mm256_shuffle_ps(b, d, 0xee);
}

int64_t interleave(const float* const* rows, int64_t n, float* quads) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 v[4];
    for (int l = 0; l < 4; ++l) v[l] = _mm256_loadu_ps(rows[l] + i);
    transpose(v);
    for (int l = 0; l < 4; ++l) {
      _mm_store_ps(quads + 4 * (i + l), _mm256_castps256_ps128(v[l]));
      _mm_store_ps(quads + 4 * (i + 4 + l), _mm256_extractf128_ps(v[l], 1));
    }
  }
  return i;
}

int64_t gather(const float* quads, const int32_t* sources, const float* scale, int64_t n, float* result) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 v[4];
    for (int l = 0; l < 4; ++l)
      v[l] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(quads + 4 * int64_t{sources[i + l]})),
                                  _mm_load_ps(quads + 4 * int64_t{sources[i + 4 + l]}), 1);
    transpose(v);
    for (int l = 0; l < 4; ++l) {
      if (scale) v[l] = _mm256_mul_ps(v[l], _mm256_loadu_ps(scale + i));
      _mm256_storeu_ps(result + l * n + i, v[l]);
    }
  }
  return i;
}

// What half_loops.h computes, NaNs too, by instructions of their own.
void widen_f16(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  widen<AsFloat16>(from + i, n - i, to + i);
}

inline __attribute__((always_inline)) void store_f16(uint16_t* to, __m256 v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, nearest));
}

void scale_f16(const float* from, float factor, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store_f16(to + i, _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_set1_ps(factor)));
  scale<AsFloat16>(from + i, factor, n - i, to + i);
}

void scale_each_f16(const float* from, const float* factors, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store_f16(to + i, _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_loadu_ps(factors + i)));
  scale_each<AsFloat16>(from + i, factors + i, n - i, to + i);
}

}  // namespace

void fill_avx2(Kernels& k) {
  k.stream = stream;
  k.interleave = interleave;
  k.gather = gather;
  k.f16 = {widen_f16, scale_f16, scale_each_f16};
  k.bf16 = half_kernels<AsBFloat16>;
}

}  // namespace pycodesign::growth
