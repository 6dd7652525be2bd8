// AVX2 and FMA: 8 lanes, 16 registers.
#include "repetition/lanes8.h"
#include "repetition/loops.h"

namespace pycodesign::repetition {
void fill_avx2(Kernels& k) { fill(k); }
}  // namespace pycodesign::repetition
