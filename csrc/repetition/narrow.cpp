// Dense sums of bytes in 16 bits, for processors that have no dot product of four bytes.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "repetition/costs.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {
namespace {

constexpr int most = std::numeric_limits<int16_t>::max();

// Of bytes as they are staged: int8 plus 128.
int largest_input(const Activations& a) { return a.dtype == DType::u8 && a.bits ? (1 << a.bits) - 1 : 255; }

}  // namespace

double narrow_run(const Weights& w, const Activations& a) {
  constexpr double shortest = 4;  // that pays
  if (a.dtype == DType::f32 || !kernels().dense_narrow) return 0;
  double largest = 0, plus = 0, minus = 0;
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t i = 0; i < w.inputs; ++i) {
      const double level = w.level(o, i);
      largest = std::max(largest, std::abs(level));
      (level > 0 ? plus : minus) += std::abs(level);
    }
  const double input = 2 * largest_input(a), mean = std::max(plus, minus) / static_cast<double>(w.outputs * w.inputs);
  if (input * largest > most) return 0;
  const double run = mean == 0 ? double{dense_part_steps} : std::min(double{dense_part_steps}, most / (input * mean));
  return run < shortest ? 0 : run;
}

// Runs as long as no inputs whatever can take one of a block's sums beyond 16 bits, on the way or at the end.
void PackedConv2d::pack_runs() {
  constexpr int halves = 2 * dense_outputs;
  const int64_t steps = units_ * taps_;
  const int limit = most / largest_input(activations_);
  const auto* w = reinterpret_cast<const int8_t*>(weights_.data());
  for (int64_t block = 0; block < blocks_; ++block) {
    std::array<int, halves> plus, minus;  // of the run
    uint16_t run = 0;
    const auto end_run = [&] {
      if (run > 0) runs_.push_back(run);
      run = 0, plus = minus = {};
    };
    for (int64_t step = 0; step < steps; ++step, w += 2 * halves) {
      if (step % dense_part_steps == 0) end_run(), run_begin_.push_back(static_cast<int64_t>(runs_.size()));
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
      if (!add()) end_run(), add();
      ++run;
    }
    end_run();
  }
}

}  // namespace pycodesign::repetition
