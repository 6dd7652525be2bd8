// AVX2 with AVX-VNNI: the loops of AVX2, compiled with a one-instruction dot4.
#include "repetition/lanes8_bytes.h"

namespace pycodesign::repetition {
void fill_avx2_vnni(Kernels& k) {
  fill(k);
  fill_bytes(k);
}
}  // namespace pycodesign::repetition
