// Factored layers for a GPU: which patterns of inputs the weights consist of.
#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>

#include "repetition/cuda.h"

namespace pycodesign::repetition::cuda {
namespace {

constexpr int most_inputs = 8;                  // of a pattern of tables
constexpr std::size_t shared_bytes = 40 << 10;  // of inputs and tables in a block

int divide_up(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

// The pattern or its negative, whichever has its first number that is not zero positive; whether it is the negative.
bool make_positive(std::vector<float>& pattern) {
  const auto first = std::find_if(pattern.begin(), pattern.end(), [](float v) { return v != 0; });
  const bool negative = first != pattern.end() && *first < 0;
  for (float& v : pattern) v = negative ? 0 - v : v + 0.0f;  // no -0
  return negative;
}

}  // namespace

struct FactoredLayer::Patterns {
  int pattern, units;
  std::size_t entries = 0;                              // of the unit with most
  std::vector<std::map<std::vector<float>, int>> unit;  // (group, unit): entry by pattern
  std::vector<unsigned char> codes;                     // (output, unit)

  double cost() const { return (static_cast<double>(entries) * pattern + factored_outputs) / pattern; }
  bool fits() const { return entries <= factored_entries; }
};

FactoredLayer::Patterns FactoredLayer::list_patterns(const Weights& w, int pattern) const {
  Patterns p{pattern, divide_up(w.inputs, pattern), 0, {}, {}};
  p.unit.resize(static_cast<std::size_t>(geometry_.groups * p.units));
  for (int64_t o = 0; o < w.outputs && p.fits(); ++o)
    for (int u = 0; u < p.units; ++u) {
      std::vector<float> levels(static_cast<std::size_t>(pattern));
      for (int k = 0; k < pattern && u * pattern + k < w.inputs; ++k)
        levels[static_cast<std::size_t>(k)] = w.level(o, u * pattern + k);
      const bool negative = make_positive(levels);
      auto& entries = p.unit[static_cast<std::size_t>(o / group_outputs_ * p.units + u)];
      const int entry = entries.emplace(std::move(levels), static_cast<int>(entries.size())).first->second;
      p.entries = std::max(p.entries, entries.size());
      p.codes.push_back(static_cast<unsigned char>(entry | (negative ? 128 : 0)));
    }
  return p;
}

FactoredLayer::FactoredLayer(const Weights& w, const Geometry& g, const Activations& a, Algorithm algorithm)
    : DeviceLayer(w, g, a, algorithm) {
  if (w.scale_groups != 1) throw std::invalid_argument("scale: expected one per output for factored sums on a GPU");
  const bool is_codebook = algorithm == Algorithm::codebook;
  const int first = is_codebook ? static_cast<int>(w.codebook->inputs) : 1, last = is_codebook ? first : most_inputs;
  Patterns best{1, 0, std::numeric_limits<std::size_t>::max(), {}, {}};
  for (int pattern = first; pattern <= last; ++pattern) {
    Patterns p = list_patterns(w, pattern);
    if (!p.fits()) break;
    if (!best.fits() || p.cost() < best.cost()) best = std::move(p);
  }
  if (!best.fits())
    throw std::invalid_argument("algorithm: expected at most " + std::to_string(factored_entries) +
                                " distinct patterns of inputs for '" + algorithm_name(algorithm) +
                                "' on a GPU, got more");
  pattern_ = best.pattern;
  units_ = best.units;
  entries_ = static_cast<int>(best.entries);
  blocks_ = divide_up(group_outputs_, factored_outputs);

  const std::size_t unit_digits = best.entries * static_cast<std::size_t>(pattern_);
  std::vector<float> digits(best.unit.size() * unit_digits);
  for (std::size_t u = 0; u < best.unit.size(); ++u) {
    listed_ += static_cast<int64_t>(best.unit[u].size());
    for (const auto& [levels, entry] : best.unit[u])
      std::copy(levels.begin(), levels.end(),
                digits.begin() + static_cast<std::ptrdiff_t>(u * unit_digits) + entry * pattern_);
  }
  if (integers()) digits_.fill(std::vector<int32_t>(digits.begin(), digits.end()));
  else digits_.fill(digits);
  std::vector<unsigned char> codes(static_cast<std::size_t>(g.groups * blocks_ * units_ * factored_outputs));
  for (int64_t o = 0; o < w.outputs; ++o) {
    const int64_t group = o / group_outputs_, in_group = o % group_outputs_, block = in_group / factored_outputs;
    for (int u = 0; u < units_; ++u)
      codes[static_cast<std::size_t>(((group * blocks_ + block) * units_ + u) * factored_outputs +
                                     in_group % factored_outputs)] =
          best.codes[static_cast<std::size_t>(o * units_ + u)];
  }
  codes_.fill(codes);
  upload_epilogue(w, a.zero_point);
}

Plan FactoredLayer::plan(const std::array<int64_t, 4>&) const {
  Plan plan;
  plan.why = "128 outputs by 32 pixels a block";
  return plan;
}

void FactoredLayer::run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue& epilogue, char*,
                        void* stream) const {
  if (out.size[0] == 0 || out.size[2] == 0 || out.size[3] == 0) return;
  if (out.size[0] * out.size[2] * out.size[3] > std::numeric_limits<int32_t>::max() - 32)
    throw std::invalid_argument("x: expected fewer than 2^31 pixels on a GPU");
  Factored f{};
  f.output = output(out, residual, epilogue);
  f.dtype = activations_.dtype;
  f.x = x.data;
  std::copy(x.stride.begin(), x.stride.end(), f.stride);
  f.height = static_cast<int>(x.size[2]);
  f.width = static_cast<int>(x.size[3]);
  f.zero_point = activations_.zero_point;
  for (std::size_t axis = 0; axis < 2; ++axis) {
    f.kernel[axis] = static_cast<int>(geometry_.kernel[axis]);
    f.stride_hw[axis] = static_cast<int>(geometry_.stride[axis]);
    f.padding[axis] = static_cast<int>(geometry_.padding[axis]);
    f.dilation[axis] = static_cast<int>(geometry_.dilation[axis]);
  }
  f.groups = static_cast<int>(geometry_.groups);
  f.group_outputs = static_cast<int>(group_outputs_);
  f.blocks = blocks_;
  f.inputs = static_cast<int>(inputs_);
  f.image_pixels = static_cast<int>(out.size[2] * out.size[3]);
  f.row_pixels = static_cast<int>(out.size[3]);
  f.pixels = static_cast<int>(out.size[0]) * f.image_pixels;
  f.units = units_;
  f.pattern = pattern_;
  f.entries = entries_;
  const std::size_t unit_bytes = static_cast<std::size_t>(pattern_ + entries_) * 32 * 4;
  f.at_once = static_cast<int>(std::clamp<std::size_t>(shared_bytes / unit_bytes, 1, 8));
  f.digits = digits_.as<void>();
  f.codes = codes_.as<unsigned char>();
  add_patterns(f, stream);
}

std::string FactoredLayer::describe() const {
  return "CUDA cores, sums of " + std::to_string(pattern_) + " inputs shared by all outputs, at most " +
         std::to_string(entries_) + " of them";
}

Counts FactoredLayer::counts() const {
  Counts n;
  n.adds = listed_ * (pattern_ - 1) + outputs_ * (units_ - 1);
  n.multiplies = listed_ * pattern_;
  n.bytes = static_cast<int64_t>(digits_.bytes() + codes_.bytes() + multipliers_.bytes() + biases_.bytes() +
                                 corrections_.bytes());
  return n;
}

}  // namespace pycodesign::repetition::cuda
