#include "repetition/costs.h"

#include <algorithm>

#include "core/cpu.h"

namespace pycodesign::repetition {

namespace {

// Fitted on the layers of ResNet-18, run cold. Zen 4 has vector units of 256 bits, Zen 5 of 512. Those of other
// processors are reckoned from two units of 512 bits that add and multiply.
// instructions, loads, store, keep_f32, keep_words, call, memory, multiply_add, dot4, drops_prefetches
constexpr Costs zen3_avx2{1.25, 0.63, 2.2, 2.5, 5, 40, 8, 1.1, 1.1, false};
constexpr Costs zen4_avx512{1.74, 0.87, 2.2, 2.5, 5, 20, 12, 1.1, 1.2, false};
constexpr Costs zen4_avx2{1.25, 0.63, 2.2, 2.5, 5, 40, 4, 1.1, 1.1, false};
constexpr Costs zen5_avx512{3.1, 2, 1.1, 4, 10, 20, 8, 0.6, 0.56, true};
constexpr Costs zen5_avx2{1.6, 1, 2.2, 4, 10, 40, 4, 1.25, 1, true};
constexpr Costs other_avx512{2, 2, 1.1, 4, 10, 20, 8, 0.6, 0.6, true};
constexpr Costs other_avx2{1.1, 1, 2.2, 4, 10, 40, 4, 1.2, 1.2, true};

}  // namespace

const Costs& costs(bool avx512) {
  switch (core::core_kind()) {
    case core::CoreKind::zen3: return zen3_avx2;
    case core::CoreKind::zen4: return avx512 ? zen4_avx512 : zen4_avx2;
    case core::CoreKind::zen5: return avx512 ? zen5_avx512 : zen5_avx2;
    default: return avx512 ? other_avx512 : other_avx2;
  }
}

double dense_cycles(int64_t outputs, int64_t inputs, const Activations& a, double narrow_run, double finish) {
  constexpr double without_vnni = 2.8, narrow = 1.25, widen = 1.6;  // times as long
  const core::Isa isa = core::active_isa();
  const Costs& c = costs(isa >= core::Isa::avx512);
  const auto products = static_cast<double>(outputs * inputs);
  const double finished = static_cast<double>(outputs) * finish;
  if (a.dtype == DType::f32) return products * c.multiply_add + finished;
  const double times = narrow_run >= 1 ? narrow + widen / narrow_run : isa < core::Isa::avx2_vnni ? without_vnni : 1;
  return products / 4 * c.dot4 * times + finished;
}

double likely_pixels(int64_t outputs) {
  const double side = std::clamp(3584 / static_cast<double>(outputs), 7.0, 56.0);
  return side * side;
}

}  // namespace pycodesign::repetition
