// AVX-512 VBMI: bytes from any place of 64 or 128.
#include <immintrin.h>

#include "repetition/kernels.h"

namespace pycodesign::repetition {
namespace {

inline __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : count > 0 ? ~__mmask64{0} >> (64 - count) : 0;
}

template <int registers> void order_from(const Order& b) {
  const char* from = b.from;
  char* to = b.to;
  for (int64_t o = 0; o < b.outputs; ++o, from += b.from_step, to += b.to_step) {
    __m512i source[registers];
    for (int i = 0; i < registers; ++i)
      source[i] = _mm512_maskz_loadu_epi8(first_bytes(b.from_count - 64 * i), from + 64 * i);
    for (int64_t i = 0; i < b.count; i += 64) {
      const __mmask64 here = first_bytes(b.count - i);
      const __m512i index = _mm512_maskz_loadu_epi8(here, b.index + i);
      __m512i bytes;
      if constexpr (registers == 1) bytes = _mm512_permutexvar_epi8(index, source[0]);
      else bytes = _mm512_permutex2var_epi8(source[0], index, source[1]);
      if constexpr (registers == 4)
        bytes = _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), bytes,
                                       _mm512_permutex2var_epi8(source[2], index, source[3]));
      _mm512_mask_storeu_epi8(to + i, here, bytes);
    }
  }
}

void order_bytes(const Order& b) {
  b.from_count <= 64 ? order_from<1>(b) : b.from_count <= 128 ? order_from<2>(b) : order_from<4>(b);
}

}  // namespace

void fill_avx512_vbmi(Kernels& k) { k.order_bytes = order_bytes; }

}  // namespace pycodesign::repetition
