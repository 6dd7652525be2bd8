// AVX2 and FMA: 8 lanes, 16 registers.
#include "repetition/lanes8_bytes.h"

namespace pycodesign::repetition {
namespace {

// Two instructions for 32 products. The empty statement keeps sums in place: compilers would add products to one
// another first, for which there are too few registers.
inline __attribute__((always_inline)) void add_products(__m256i& sum, i32v x, i32v w) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)x, (__m256i)w));
  asm("" : "+x"(sum));
}

// Ends a run.
inline __attribute__((always_inline)) void widen(__m256i sum, char* to, bool is_first) {
  const i32v words = (i32v)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  Int::store(to, is_first ? words : Int::load(to) + words);
}

template <int O, int V> void dense_narrow_of(const DenseTile& d) {
  constexpr int64_t step_bytes = dense_outputs * 4, together = 4;
  const char *const x = d.x, *w = d.weights;
  const int64_t *source = d.source, *const end = source + d.steps;
  for (const uint16_t* run = d.runs; source < end; ++run) {
    __m256i sum[O][V] = {};
    const auto add = [&](int64_t at, const char* weights) __attribute__((always_inline)) {
      i32v value[V];
      for (int v = 0; v < V; ++v) value[v] = Byte::load(x + at + v * vector_bytes);
      for (int o = 0; o < O; ++o) {
        const i32v weight = Byte::broadcast(weights + o * 4);
        for (int v = 0; v < V; ++v) add_products(sum[o][v], value[v], weight);
      }
    };
    int64_t left = *run;
    for (; left >= together; left -= together, source += together, w += together * step_bytes) {
      if (!d.prefetched) prefetch<together * step_bytes>(w);
      for (int i = 0; i < together; ++i) add(source[i], w + i * step_bytes);
    }
    for (; left > 0; --left, ++source, w += step_bytes) add(*source, w);
    for (int o = 0; o < O; ++o)
      for (int v = 0; v < V; ++v)
        widen(sum[o][v], d.acc + o * d.acc_stride + v * vector_bytes, d.first && run == d.runs);
  }
}

template <int O> void dense_narrow_vectors(const DenseTile& d) {
  d.vectors == 1 ? dense_narrow_of<O, 1>(d) : dense_narrow_of<O, 2>(d);
}

void dense_narrow(const DenseTile& d) {
  for (DenseTile part = d; part.outputs > 0;) {
    const int done = part.outputs >= 4 ? 4 : part.outputs >= 2 ? 2 : 1;
    if (done == 4) dense_narrow_vectors<4>(part);
    else if (done == 2) dense_narrow_vectors<2>(part);
    else dense_narrow_vectors<1>(part);
    part.outputs -= done;
    part.weights += done * 4;
    part.acc += done * part.acc_stride;
  }
}

template <int R, int P> void linear_narrow_of(const LinearTile& t) {
  const char* w = t.weights;
  int64_t k = 0;
  for (const uint16_t* run = t.runs; k < t.words; ++run) {
    __m256i sum[R][P] = {};
    for (const int64_t end = k + *run; k < end; ++k, w += panel_outputs * 4) {
      if constexpr (R == 1) prefetch<P * vector_bytes>(w);
      i32v weight[P];
      for (int p = 0; p < P; ++p) weight[p] = Byte::load(w + p * vector_bytes);
      for (int r = 0; r < R; ++r) {
        const i32v x = Byte::broadcast(t.x + r * t.x_stride + k * 4);
        for (int p = 0; p < P; ++p) add_products(sum[r][p], x, weight[p]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p)
        widen(sum[r][p], t.acc + r * t.acc_stride + p * vector_bytes, t.first && run == t.runs);
  }
}

void linear_narrow(const LinearTile& t) {
  for_linear_blocks<linear_rows, linear_vectors>(t, linear_narrow_of<linear_rows, linear_vectors>,
                                                 linear_narrow_of<1, linear_vectors>);
}

}  // namespace

void fill_avx2(Kernels& k) {
  fill(k);
  fill_bytes(k);
  k.dense_narrow = dense_narrow;
  k.linear_narrow = linear_narrow;
}
}  // namespace pycodesign::repetition
