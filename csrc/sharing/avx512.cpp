// AVX-512 F, BW, VL, DQ: 16 lanes, 32 registers.
#include <immintrin.h>

#include "sharing/kernels.h"

namespace pycodesign::sharing {
namespace {

constexpr int lanes = 16;
constexpr int tile_vectors = 4;
constexpr int panel_rows = 6, panel_vectors = 4;

typedef __m512 f32v;

inline f32v load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, f32v v) { _mm512_storeu_ps(p, v); }
inline f32v splat(float value) { return _mm512_set1_ps(value); }
inline f32v load_bf16(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline f32v fma(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a, b, c); }
inline f32v gather(const float* x, const uint16_t* index) {
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index))), x, 4);
}
inline f32v select_first(int64_t n, f32v a, f32v b) {
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>((1u << (n < lanes ? n : lanes)) - 1), a);
}

inline void transpose(f32v (&v)[lanes]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
  }
}

}  // namespace
}  // namespace pycodesign::sharing

#include "sharing/loops.h"

namespace pycodesign::sharing {
void fill_avx512(Kernels& k) { fill(k); }
}  // namespace pycodesign::sharing
