// AVX2 and FMA: 8 lanes, 16 registers.
#include "repetition/lanes8.h"
#include "repetition/loops.h"

namespace pycodesign::repetition {
namespace {

// Two instructions for 32 products. The empty statement keeps sums in place: compilers would add products to one
// another first, for which there are too few registers.
template <int O, int V> struct NarrowSums {
  __m256i sum[O][V] = {};

  __attribute__((always_inline)) void add(const char* x, const char* w) {
    __m256i value[V];
    for (int v = 0; v < V; ++v) value[v] = (__m256i)Byte::load(x + v * vector_bytes);
    for (int o = 0; o < O; ++o) {
      const __m256i weight = (__m256i)Byte::broadcast(w + o * 4);
      for (int v = 0; v < V; ++v) {
        sum[o][v] = _mm256_add_epi16(sum[o][v], _mm256_maddubs_epi16(value[v], weight));
        asm("" : "+x"(sum[o][v]));
      }
    }
  }
};

template <int O, int V> void dense_narrow_of(const DenseTile& d) {
  constexpr int64_t word = dense_outputs * 4, together = 4;
  const __m256i ones = _mm256_set1_epi16(1);
  const char *const x = d.x, *w = d.weights;
  const int64_t *source = d.source, *const end = source + d.steps;
  for (const uint16_t* run = d.runs; source < end; ++run) {
    NarrowSums<O, V> sums;
    int64_t left = *run;
    for (; left >= together; left -= together, source += together, w += together * word) {
      if (!d.prefetched) prefetch<together * word>(w);
      for (int i = 0; i < together; ++i) sums.add(x + source[i], w + i * word);
    }
    for (; left > 0; --left, ++source, w += word) sums.add(x + *source, w);
    for (int o = 0; o < O; ++o)
      for (int v = 0; v < V; ++v) {
        char* to = d.acc + o * d.acc_stride + v * vector_bytes;
        const i32v sum = (i32v)_mm256_madd_epi16(sums.sum[o][v], ones);
        Int::store(to, d.first && run == d.runs ? sum : Int::load(to) + sum);
      }
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

}  // namespace

void fill_avx2(Kernels& k) {
  fill(k);
  k.dense_narrow = dense_narrow;
}
}  // namespace pycodesign::repetition
