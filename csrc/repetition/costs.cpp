#include "repetition/costs.h"

#include <algorithm>

#include "core/cpu.h"

namespace pycodesign::repetition {

namespace {

// Fitted on the layers of ResNet-18, run cold. Zen 4 has vector units of 256 bits, Zen 5 of 512. Those of other
// processors are reckoned from two units of 512 bits that add and multiply.
struct Machine {
  Costs avx512, avx2;
};
constexpr Machine zen4{{1.74, 0.87, 2.2, 2.5, 5, 20, 8, 1.1, 1.1}, {1.25, 0.63, 2.2, 2.5, 5, 40, 8, 1.1, 1.1}},
    zen5{{3.1, 2, 1.1, 4, 10, 20, 8, 0.6, 0.5}, {1.6, 1, 2.2, 4, 10, 40, 8, 1.25, 1}},
    other{{2, 2, 1.1, 4, 10, 20, 8, 0.6, 0.6}, {1.1, 1, 2.2, 4, 10, 40, 8, 1.2, 1.2}};

const Machine& machine() {
  switch (core::core_kind()) {
    case core::CoreKind::zen4: return zen4;
    case core::CoreKind::zen5: return zen5;
    default: return other;
  }
}

}  // namespace

const Costs& costs(bool avx512) { return avx512 ? machine().avx512 : machine().avx2; }

double dense_cycles(int64_t outputs, int64_t inputs, const Activations& a) {
  constexpr double without_vnni = 2.8;  // times as long
  const core::Isa isa = core::active_isa();
  const Costs& c = costs(isa >= core::Isa::avx512);
  const auto products = static_cast<double>(outputs * inputs);
  if (a.dtype == DType::f32) return products * c.multiply_add;
  return products / 4 * c.dot4 * (isa < core::Isa::avx2_vnni ? without_vnni : 1);
}

double likely_pixels(int64_t outputs) {
  const double side = std::clamp(3584 / static_cast<double>(outputs), 7.0, 56.0);
  return side * side;
}

}  // namespace pycodesign::repetition
