// Plain x86-64, which has SSE2; on other processors the callers' loops do all of it.
#include "growth/half_loops.h"
#include "growth/kernels.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace pycodesign::growth {
namespace {

#if defined(__x86_64__)
void stream(char* to, const char* from, size_t lines) {
  for (size_t i = 0; i < 64 * lines; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}

void finish_streams() { _mm_sfence(); }

int64_t interleave(const float* const* rows, int64_t n, float* quads) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    __m128 v[4];
    for (int l = 0; l < 4; ++l) v[l] = _mm_loadu_ps(rows[l] + i);
    _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
    for (int l = 0; l < 4; ++l) _mm_store_ps(quads + 4 * (i + l), v[l]);
  }
  return i;
}

int64_t gather(const float* quads, const int32_t* sources, const float* scale, int64_t n, float* result) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    __m128 v[4];
    for (int l = 0; l < 4; ++l) v[l] = _mm_load_ps(quads + 4 * static_cast<int64_t>(sources[i + l]));
    _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
    for (int l = 0; l < 4; ++l) {
      if (scale) v[l] = _mm_mul_ps(v[l], _mm_loadu_ps(scale + i));
      _mm_storeu_ps(result + l * n + i, v[l]);
    }
  }
  return i;
}
#else
void stream(char* to, const char* from, size_t lines) { __builtin_memcpy(to, from, 64 * lines); }

void finish_streams() {}

int64_t interleave(const float* const*, int64_t, float*) { return 0; }

int64_t gather(const float*, const int32_t*, const float*, int64_t, float*) { return 0; }
#endif

}  // namespace

void fill_scalar(Kernels& k) {
  k = {stream, finish_streams, interleave, gather, half_kernels<AsFloat16>, half_kernels<AsBFloat16>};
}

}  // namespace pycodesign::growth
