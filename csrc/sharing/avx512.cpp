// AVX-512 F, BW, VL, DQ: 16 lanes, 32 registers.
#include <immintrin.h>

#include "sharing/kernels.h"

namespace pycodesign::sharing {
namespace {

constexpr int lanes = 16;
constexpr int widest_tile = 64, tile_vectors = 4, joint_sums = 16;
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
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Rows r, r + 4, r + 8, r + 12 as the quarters of a vector, which loads can do without the port that shuffles: what
// remains is to transpose 4 x 4 in each quarter.
inline void load_transposed(const float* p, int64_t step, f32v (&v)[4]) {
  __m512 a[4];
  for (int r = 0; r < 4; ++r) {
    const float* row = p + r * step;
    a[r] = _mm512_castps128_ps512(_mm_loadu_ps(row));
    a[r] = _mm512_insertf32x4(a[r], _mm_loadu_ps(row + 4 * step), 1);
    a[r] = _mm512_insertf32x4(a[r], _mm_loadu_ps(row + 8 * step), 2);
    a[r] = _mm512_insertf32x4(a[r], _mm_loadu_ps(row + 12 * step), 3);
  }
  const __m512 b0 = _mm512_unpacklo_ps(a[0], a[1]), b1 = _mm512_unpackhi_ps(a[0], a[1]);
  const __m512 b2 = _mm512_unpacklo_ps(a[2], a[3]), b3 = _mm512_unpackhi_ps(a[2], a[3]);
  v[0] = _mm512_shuffle_ps(b0, b2, 0x44);
  v[1] = _mm512_shuffle_ps(b0, b2, 0xee);
  v[2] = _mm512_shuffle_ps(b1, b3, 0x44);
  v[3] = _mm512_shuffle_ps(b1, b3, 0xee);
}

}  // namespace
}  // namespace pycodesign::sharing

#include "sharing/loops.h"

namespace pycodesign::sharing {
namespace {

inline f32v gather(const float* x, const uint16_t* index) {
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index))), x, 4);
}
inline f32v select_first(int64_t n, f32v a, f32v b) {
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>((1u << (n < lanes ? n : lanes)) - 1), a);
}

// Lanes are rows: one gather for 16 of them.
template <class Value> void gather_token_as(const SparseGroups& groups, const float* x, float* sums) {
  constexpr int V = group_rows / lanes;
  const uint16_t* index = groups.index;
  const auto* value = static_cast<const Value*>(groups.value);
  for (int64_t g = 0; g < groups.rows; g += group_rows) {
    const uint8_t* order = groups.order + g;
    float lane[group_rows];
    for (int l = 0; l < group_rows; ++l) lane[l] = groups.bias ? groups.bias[order[l]] : 0;
    f32v sum[V];
    for (int v = 0; v < V; ++v) sum[v] = load(lane + v * lanes);
    constexpr int64_t octets = group_rows / octet_rows;
    const uint32_t* count = groups.count + g / octet_rows;
    int64_t j = 0;
    for (int64_t active = octets; active > 0; --active)  // until the last of them ends
      for (; j < count[active - 1]; ++j, index += group_rows, value += group_rows)
        for (int v = 0; v < V; ++v) {
          const f32v next = fma(load_values(value + v * lanes), gather(x, index + v * lanes), sum[v]);
          sum[v] = select_first(active * octet_rows - v * lanes, next, sum[v]);
        }
    for (int v = 0; v < V; ++v) store(lane + v * lanes, sum[v]);
    for (int l = 0; l < group_rows; ++l) sums[order[l]] = lane[l];
  }
}

void gather_token(const SparseGroups& groups, const float* x, float* sums) {
  groups.storage == Storage::f32 ? gather_token_as<float>(groups, x, sums) : gather_token_as<uint16_t>(groups, x, sums);
}

}  // namespace

void fill_avx512(Kernels& k) {
  fill(k);
  k.sum_token = gather_token;
}
}  // namespace pycodesign::sharing
