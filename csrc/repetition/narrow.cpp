// Sums of bytes in 16 bits, for processors that have no dot product of four bytes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "repetition/costs.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {
namespace {

constexpr int most = std::numeric_limits<int16_t>::max();

// Of bytes as they are staged: int8 plus 128. Padding is the zero point, of which no bits are promised.
int largest_input(const Activations& a) {
  return a.dtype == DType::u8 && a.bits ? std::max((1 << a.bits) - 1, a.zero_point) : 255;
}

}  // namespace

double narrow_run(const Weights& w, const Activations& a) {
  constexpr double shortest = 4;  // that pays
  if (a.dtype == DType::f32 || !kernels().dense_narrow) return 0;
  double largest = 0, plus = 0, minus = 0;
  for (int64_t o = 0; o < w.outputs; ++o)
    w.visit_levels(o, 0, w.inputs, [&](double level, int count) {
      largest = std::max(largest, std::abs(level));
      (level > 0 ? plus : minus) += std::abs(level) * count;
    });
  const double input = 2 * largest_input(a), mean = std::max(plus, minus) / static_cast<double>(w.outputs * w.inputs);
  if (input * largest > most) return 0;
  const double run = mean == 0 ? double{dense_part_steps} : std::min(double{dense_part_steps}, most / (input * mean));
  return run < shortest ? 0 : run;
}

// Runs as long as no inputs whatever can take one of the sums beyond 16 bits, on the way or at the end.
void add_runs(Runs& runs, const char* weights, int64_t steps, int64_t outputs, int64_t part_steps,
              const Activations& a) {
  const int limit = most / largest_input(a);
  const auto* w = reinterpret_cast<const int8_t*>(weights);
  const auto halves = static_cast<size_t>(2 * outputs);
  std::vector<int> plus(halves), minus(halves);  // of the run
  uint16_t run = 0;
  const auto end_run = [&] {
    if (run > 0) runs.lengths.push_back(run);
    run = 0;
    std::fill(plus.begin(), plus.end(), 0);
    std::fill(minus.begin(), minus.end(), 0);
  };
  const auto add = [&] {
    bool fits = true;
    for (size_t i = 0; i < halves; ++i) {
      const int more = std::max<int>(w[2 * i], 0) + std::max<int>(w[2 * i + 1], 0);
      plus[i] += more;
      minus[i] += more - w[2 * i] - w[2 * i + 1];
      fits = fits && plus[i] <= limit && minus[i] <= limit;
    }
    return fits;
  };
  for (int64_t step = 0; step < steps; ++step, ++run, w += 2 * halves) {
    if (step % part_steps == 0) end_run(), runs.begin.push_back(static_cast<int64_t>(runs.lengths.size()));
    if (!add()) end_run(), add();
  }
  end_run();
}

}  // namespace pycodesign::repetition
