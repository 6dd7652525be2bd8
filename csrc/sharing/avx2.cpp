// AVX2 and FMA: 8 lanes, 16 registers.
#include <immintrin.h>

#include "sharing/kernels.h"

namespace pycodesign::sharing {
namespace {

constexpr int lanes = 8;
constexpr int tile_vectors = 8;
constexpr int panel_rows = 6, panel_vectors = 2;

typedef __m256 f32v;

inline f32v load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, f32v v) { _mm256_storeu_ps(p, v); }
inline f32v splat(float value) { return _mm256_set1_ps(value); }
inline f32v load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
inline f32v fma(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a, b, c); }
inline f32v gather(const float* x, const uint16_t* index) {
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index))), 4);
}
inline f32v select_first(int64_t n, f32v a, f32v b) {
  const __m256i first =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first));
}

inline void transpose(f32v (&v)[lanes]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace pycodesign::sharing

#include "sharing/loops.h"

namespace pycodesign::sharing {
void fill_avx2(Kernels& k) { fill(k); }
}  // namespace pycodesign::sharing
