// AVX2 and FMA: 8 lanes, 16 registers.
#include <immintrin.h>

#include "sharing/kernels.h"

namespace pycodesign::sharing {
namespace {

constexpr int lanes = 8;
constexpr int widest_tile = 32, tile_vectors = 4, joint_sums = 8;
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
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Rows r and r + 4 as the halves of a vector: what remains is to transpose 4 x 4 in each half.
inline void load_transposed(const float* p, int64_t step, f32v (&v)[4]) {
  __m256 a[4];
  for (int r = 0; r < 4; ++r)
    a[r] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + r * step)), _mm_loadu_ps(p + (r + 4) * step), 1);
  const __m256 b0 = _mm256_unpacklo_ps(a[0], a[1]), b1 = _mm256_unpackhi_ps(a[0], a[1]);
  const __m256 b2 = _mm256_unpacklo_ps(a[2], a[3]), b3 = _mm256_unpackhi_ps(a[2], a[3]);
  v[0] = _mm256_shuffle_ps(b0, b2, 0x44);
  v[1] = _mm256_shuffle_ps(b0, b2, 0xee);
  v[2] = _mm256_shuffle_ps(b1, b3, 0x44);
  v[3] = _mm256_shuffle_ps(b1, b3, 0xee);
}

}  // namespace
}  // namespace pycodesign::sharing

#include "sharing/loops.h"

namespace pycodesign::sharing {
void fill_avx2(Kernels& k) { fill(k); }
}  // namespace pycodesign::sharing
