// Weights to packed layers: what every layer keeps, and the two packed forms of a convolution.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "repetition/code_steps.h"
#include "repetition/costs.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

Layer::Layer(const Weights& w, const Activations& a, Algorithm algorithm)
    : algorithm_(algorithm),
      activations_(a),
      outputs_(w.outputs),
      inputs_(w.inputs),
      scale_groups_(w.scale_groups),
      level_rows_(w.level_rows),
      level_count_(w.level_count),
      levels_(w.levels, w.levels + w.level_rows * w.level_count) {
  for (int64_t g = 0; g < w.scale_groups; ++g)
    for (int64_t o = 0; o < w.outputs; ++o)
      multiplier_.push_back(static_cast<float>(a.scale * static_cast<double>(w.scale[o * w.scale_groups + g])));
  if (w.bias) bias_.assign(w.bias, w.bias + w.outputs);
  if (is_float(a.dtype)) return;

  // Largest |x - zero point| that the input type, or the promised bits, allow.
  const bool is_signed = a.dtype == DType::i8;
  const int bits = a.bits ? a.bits : 8;
  const int64_t lowest = is_signed ? -(1 << (bits - 1)) : 0, highest = lowest + (1 << bits) - 1;
  const int64_t range = std::max(std::abs(highest - a.zero_point), std::abs(lowest - a.zero_point));
  for (int64_t o = 0; o < w.outputs; ++o) {
    double magnitude = 0;
    w.visit_levels(o, 0, w.inputs, [&](double level, int count) { magnitude += std::abs(level) * count; });
    if (magnitude * static_cast<double>(range) > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("levels: expected sums that fit 32 bits, got output " + std::to_string(o) +
                                  " with a sum of |levels| of " + std::to_string(magnitude) + " over its " +
                                  std::to_string(w.inputs) + " inputs");
  }
}

Layer::Layer(Copy, const Layer& other, Algorithm algorithm)
    : algorithm_(algorithm),
      activations_(other.activations_),
      outputs_(other.outputs_),
      inputs_(other.inputs_),
      scale_groups_(other.scale_groups_),
      level_rows_(other.level_rows_),
      level_count_(other.level_count_),
      levels_(other.levels_),
      multiplier_(other.multiplier_),
      bias_(other.bias_) {}

// sum level * (x - z) = sum level * (x - center) - (z - center) * sum level
void Layer::set_correction(const Weights& w, int32_t center) {
  if (is_float(activations_.dtype)) return;
  correction_.assign(static_cast<size_t>(w.outputs * scale_groups_), 0);
  const int64_t group = w.inputs / scale_groups_;
  const auto offset = static_cast<uint32_t>(activations_.zero_point - center);
  for (int64_t g = 0; g < scale_groups_; ++g)
    for (int64_t o = 0; o < w.outputs; ++o) {
      uint32_t sum = 0;  // modulo 2^32, as the sums are
      w.visit_levels(o, g * group, (g + 1) * group, [&](float level, int count) {
        sum += static_cast<uint32_t>(static_cast<int32_t>(level)) * static_cast<uint32_t>(count);
      });
      correction_[static_cast<size_t>(g * w.outputs + o)] = static_cast<int32_t>(0 - sum * offset);
    }
}

uint8_t Layer::code_of(int64_t o, float level) const {
  const float* row = levels_.data() + (level_rows_ == 1 ? 0 : o) * level_count_;
  return static_cast<uint8_t>(std::lower_bound(row, row + level_count_, level) - row);
}

namespace {

void check_level_count(const std::vector<float>& values, Algorithm algorithm) {
  if (values.size() > 16)
    throw std::invalid_argument(std::string("algorithm: expected at most 16 distinct levels for '") +
                                algorithm_name(algorithm) + "', got " + std::to_string(values.size()));
}

}  // namespace

PackedConv2d::PackedConv2d(const Weights& w, const Geometry& g, const Activations& a, Algorithm algorithm)
    : PackedLayer(w, a, algorithm),
      geometry_(g),
      taps_(g.kernel[0] * g.kernel[1]),
      group_channels_(g.channels / g.groups),
      group_outputs_(w.outputs / g.groups) {
  pack(w);
}

PackedConv2d::PackedConv2d(const PackedConv2d& other, const Weights& w, Algorithm algorithm)
    : PackedLayer(Copy{}, other, algorithm),
      geometry_(other.geometry_),
      taps_(other.taps_),
      group_channels_(other.group_channels_),
      group_outputs_(other.group_outputs_) {
  pack(w);
}

PackedConv2d::~PackedConv2d() = default;

void PackedConv2d::pack(const Weights& w) {
  const bool integers = activations_.dtype != DType::f32;
  unit_channels_ = algorithm_ == Algorithm::dense && integers ? 4 : 1;
  units_ = (group_channels_ + unit_channels_ - 1) / unit_channels_;
  stage_channels_ = integers && (algorithm_ == Algorithm::codegen || algorithm_ == Algorithm::dense) ? 4 : 1;
  stage_planes_ = stage_channels_ / unit_channels_;
  blocks_ = geometry_.groups * block_count(group_outputs_);
  switch (algorithm_) {
    case Algorithm::codegen: return pack_codes(w);
    case Algorithm::tables: return pack_tables(w);
    case Algorithm::dense:
      if (matrix_cycles(w, geometry_, activations_) <
          dense_cycles(outputs_, inputs_, activations_, narrow_run(w, activations_)))
        return pack_matrix(w);
      return serves_rows(w, geometry_, activations_) ? pack_rows(w) : pack_dense(w);
    case Algorithm::codebook: return pack_codebook(w);
    case Algorithm::packed:
      throw std::invalid_argument(
          "algorithm: expected 'codegen', 'tables', 'dense' or 'codebook' for a convolution, got 'packed'");
  }
}

// Codes of 1, 2, 4 or 8 bits.
void PackedConv2d::pack_codes(const Weights& w) {
  check_level_count(distinct_levels(w), algorithm_);
  code_bits_ = w.level_count <= 2 ? 1 : w.level_count <= 4 ? 2 : w.level_count <= 16 ? 4 : 8;
  if (activations_.dtype != DType::f32) staging_ = Staging::halves_i16;
  center_ = code_center(activations_);
  set_correction(w, center_);
  const int64_t per_byte = 8 / code_bits_, count = outputs_ * inputs_;
  weights_size_ = static_cast<size_t>((count + per_byte - 1) / per_byte);
  char* to = weights_.reserve(weights_size_);
  std::memset(to, 0, weights_size_);
  for (int64_t i = 0; i < count; ++i)
    to[i / per_byte] = static_cast<char>(to[i / per_byte] | w.codes[i] << i % per_byte * code_bits_);
  // Throws for levels that machine code cannot hold, also where none is made.
  cycles_ = choose_form(code_layer(w, geometry_, activations_), true).run;
  code(kernels());  // now rather than at the first call
}

Weights PackedConv2d::weights_of(const std::vector<uint8_t>& codes) const {
  return {outputs_, inputs_, codes.data(), levels_.data(), level_rows_, level_count_, nullptr, 1, nullptr};
}

namespace {

// The levels of `size` channels as one number, a key: digit i, in base 2 M + 1, says which of the M magnitudes channel
// i has, and its sign.
class Patterns {
 public:
  Patterns(const std::vector<float>& levels, int size) : size_(size) {
    for (const float l : levels)
      if (l != 0) magnitudes_.push_back(std::abs(l));
    std::sort(magnitudes_.begin(), magnitudes_.end());
    magnitudes_.erase(std::unique(magnitudes_.begin(), magnitudes_.end()), magnitudes_.end());
    for (int i = 0; i < size; ++i) place_.push_back(place_.back() * base());
  }

  int64_t count() const { return place_.back(); }
  int64_t zero() const { return (count() - 1) / 2; }
  int64_t negative(int64_t key) const { return 2 * zero() - key; }
  float magnitude(int digit) const { return digit == 0 ? 0.0f : magnitudes_[static_cast<size_t>(std::abs(digit) - 1)]; }
  int digit(int64_t key, int i) const { return static_cast<int>(key / place(i) % base()) - signs(); }
  int64_t with_digit(int64_t key, int i, int digit_) const { return key + (digit_ - digit(key, i)) * place(i); }
  int64_t with_level(int64_t key, int i, float level) const {
    const int at = static_cast<int>(std::lower_bound(magnitudes_.begin(), magnitudes_.end(), std::abs(level)) -
                                    magnitudes_.begin()) +
                   1;
    return with_digit(key, i, level == 0 ? 0 : level < 0 ? -at : at);
  }
  int last(int64_t key) const {  // channel of the last non-zero digit, -1 for zero
    int i = size_ - 1;
    while (i >= 0 && digit(key, i) == 0) --i;
    return i;
  }
  int64_t parent(int64_t key) const { return last(key) < 0 ? key : with_digit(key, last(key), 0); }
  bool is_positive(int64_t key) const {  // its first non-zero digit is
    for (int i = 0; i < size_; ++i)
      if (const int d = digit(key, i)) return d > 0;
    return true;
  }
  int length(int64_t key) const {  // non-zero digits
    int n = 0;
    for (int i = 0; i < size_; ++i) n += digit(key, i) != 0;
    return n;
  }

 private:
  int signs() const { return static_cast<int>(magnitudes_.size()); }
  int base() const { return 2 * signs() + 1; }
  int64_t place(int i) const { return place_[static_cast<size_t>(i)]; }

  int size_;
  std::vector<float> magnitudes_;  // ascending
  std::vector<int64_t> place_{1};
};

// The entries of the tables: patterns that occur, up to sign, and what they are built from, the shorter first.
std::vector<int64_t> table_patterns(const Patterns& patterns, const std::vector<int64_t>& keys) {
  std::vector<bool> seen(static_cast<size_t>(patterns.count()));
  std::vector<int64_t> used;
  const auto use = [&](int64_t key) {
    if (!seen[static_cast<size_t>(key)]) seen[static_cast<size_t>(key)] = true, used.push_back(key);
  };
  for (const int64_t key : keys) use(patterns.is_positive(key) ? key : patterns.negative(key));
  for (size_t i = 0; i < used.size(); ++i)
    if (patterns.length(used[i]) > 1) use(patterns.parent(used[i]));
  std::sort(used.begin(), used.end(),
            [&](int64_t a, int64_t b) { return std::pair(patterns.length(a), a) < std::pair(patterns.length(b), b); });
  return used;
}

// One step for each entry, or for two that differ in the sign of their last level.
std::vector<TableStep> table_steps(const Patterns& patterns, const std::vector<int64_t>& used,
                                   const std::vector<int16_t>& entry, bool is_float) {
  std::vector<TableStep> steps;
  for (const int64_t key : used) {
    const int last = patterns.last(key), digit = last < 0 ? 0 : patterns.digit(key, last);
    const bool has_parent = patterns.length(key) > 1;
    const int16_t other = has_parent ? entry[static_cast<size_t>(patterns.with_digit(key, last, -digit))] : int16_t{-1};
    if (digit < 0 && other >= 0) continue;  // the positive one's step builds it
    TableStep step{-1, -1, -1, static_cast<int16_t>(last), {}};
    (digit < 0 ? step.minus : step.plus) = entry[static_cast<size_t>(key)];
    if (other >= 0) step.minus = other;
    if (has_parent) step.parent = entry[static_cast<size_t>(patterns.parent(key))];
    if (is_float) step.coefficient.f = patterns.magnitude(digit);
    else step.coefficient.i = static_cast<int32_t>(patterns.magnitude(digit));
    steps.push_back(step);
  }
  return steps;
}

}  // namespace

void PackedConv2d::pack_dense(const Weights& w) {
  staging_ = activations_.dtype == DType::f32 ? Staging::f32 : Staging::bytes4;
  set_correction(w, activations_.dtype == DType::i8 ? -128 : 0);
  const double run = narrow_run(w, activations_);
  cycles_ = dense_cycles(outputs_, inputs_, activations_, run);
  const int64_t blocks = block_count(group_outputs_),
                words = geometry_.groups * blocks * units_ * taps_ * dense_outputs;
  weights_size_ = static_cast<size_t>(words * 4);
  char* to = weights_.reserve(weights_size_);
  std::memset(to, 0, weights_size_);
  for (int64_t o = 0; o < w.outputs; ++o) {
    const int64_t group = o / group_outputs_, block = o % group_outputs_ / dense_outputs,
                  lane = o % group_outputs_ % dense_outputs;
    for (int64_t c = 0; c < group_channels_; ++c)
      for (int64_t t = 0; t < taps_; ++t) {
        const float level = w.level(o, c * taps_ + t);
        const int64_t word =
            (((group * blocks + block) * units_ + c / unit_channels_) * taps_ + t) * dense_outputs + lane;
        if (unit_channels_ == 1) std::memcpy(to + word * 4, &level, 4);
        else to[word * 4 + c % 4] = static_cast<char>(static_cast<int>(level));
      }
  }
  const int64_t steps = units_ * taps_;
  for (int64_t block = 0; run >= 1 && block < blocks_; ++block)
    add_runs(runs_, weights_.data() + block * steps * dense_outputs * 4, steps, dense_outputs, dense_part_steps,
             activations_);
}

void PackedConv2d::pack_tables(const Weights& w) {
  const auto values = distinct_levels(w);
  check_level_count(values, algorithm_);
  staging_ = activations_.dtype == DType::f32 ? Staging::f32 : Staging::centered_i32;
  center_ = activations_.zero_point;
  const TableChoice choice = choose_table(values, geometry_, group_outputs_);
  cycles_ = choice.cost * static_cast<double>(geometry_.groups);
  group_size_ = choice.size;
  block_units_ = choice.block;
  unit_slots_ = taps_;
  table_units_ = (group_channels_ + group_size_ - 1) / group_size_;
  const Patterns patterns(values, group_size_);
  std::vector<int64_t> keys(static_cast<size_t>(w.outputs * table_units_ * taps_),
                            patterns.zero());  // [output][unit][tap]
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t i = 0; i < inputs_; ++i) {
      const int64_t c = i / taps_;
      int64_t& key = keys[static_cast<size_t>((o * table_units_ + c / group_size_) * taps_ + i % taps_)];
      key = patterns.with_level(key, static_cast<int>(c % group_size_), w.level(o, i));
    }
  const std::vector<int64_t> used = table_patterns(patterns, keys);
  if (used.size() > max_table_entries) throw std::logic_error("a table has more entries than a stream byte can name");
  max_entries_ = static_cast<int>(used.size());
  std::vector<int16_t> entry(static_cast<size_t>(patterns.count()), -1);
  for (size_t e = 0; e < used.size(); ++e) entry[static_cast<size_t>(used[e])] = static_cast<int16_t>(e);
  steps_ = table_steps(patterns, used, entry, activations_.dtype == DType::f32);

  weights_size_ = keys.size();
  auto* stream = reinterpret_cast<uint8_t*>(weights_.reserve(weights_size_));
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t unit = 0; unit < table_units_; ++unit)
      for (int64_t t = 0; t < taps_; ++t) {
        const int64_t key = keys[static_cast<size_t>((o * table_units_ + unit) * taps_ + t)];
        const bool negative = !patterns.is_positive(key);
        const int e = entry[static_cast<size_t>(negative ? patterns.negative(key) : key)];
        stream[stream_at(o, unit) + t] = static_cast<uint8_t>(e | (negative ? 128 : 0));
      }

  // Integer sums see x - zero point, and -t as ~t + 1.
  set_correction(w, center_);
  for (int64_t o = 0; activations_.dtype != DType::f32 && o < outputs_; ++o) {
    int32_t& negatives = correction_[static_cast<size_t>(o)];
    for (int64_t unit = 0; unit < table_units_; ++unit)
      for (int64_t t = 0; t < taps_; ++t) negatives += stream[stream_at(o, unit) + t] >> 7;
  }
}

// Where the entries of one unit begin: [group][block][output][unit of the block][slot].
int64_t PackedConv2d::stream_at(int64_t output, int64_t unit) const {
  const int64_t first = unit / block_units_ * block_units_,
                units_here = std::min<int64_t>(block_units_, table_units_ - first);
  const int64_t group = output / group_outputs_;
  return ((group * table_units_ + first) * group_outputs_ + output % group_outputs_ * units_here + unit - first) *
         unit_slots_;
}

std::vector<uint8_t> PackedConv2d::codes() const {
  std::vector<uint8_t> codes(static_cast<size_t>(outputs_ * inputs_));
  if (algorithm_ == Algorithm::codegen) {
    const size_t per_byte = static_cast<size_t>(8 / code_bits_);
    for (size_t i = 0; i < codes.size(); ++i)
      codes[i] = static_cast<uint8_t>(static_cast<uint8_t>(weights_[i / per_byte]) >> i % per_byte * code_bits_ &
                                      ((1 << code_bits_) - 1));
    return codes;
  }
  if (matrix_) return matrix_codes();
  if (rows_) return row_codes();
  if (algorithm_ == Algorithm::codebook)
    throw std::invalid_argument("codes: expected another algorithm than 'codebook', whose weights are indices");
  const int64_t blocks = block_count(group_outputs_);
  std::vector<float> entries(static_cast<size_t>(max_entries_ * group_size_));  // tables: levels of each entry
  for (const TableStep& step : steps_)
    for (const int sign : {1, -1}) {
      const int at = sign > 0 ? step.plus : step.minus;
      if (at < 0 || step.channel < 0) continue;
      float* entry = entries.data() + at * group_size_;
      if (step.parent >= 0) std::copy_n(entries.data() + step.parent * group_size_, group_size_, entry);
      entry[step.channel] =
          static_cast<float>(sign) *
          (activations_.dtype == DType::f32 ? step.coefficient.f : static_cast<float>(step.coefficient.i));
    }
  for (int64_t o = 0; o < outputs_; ++o)
    for (int64_t i = 0; i < inputs_; ++i) {
      const int64_t c = i / taps_, t = i % taps_;
      float level;
      if (algorithm_ == Algorithm::tables) {
        const auto byte = static_cast<uint8_t>(weights_[static_cast<size_t>(stream_at(o, c / group_size_) + t)]);
        level = entries[static_cast<size_t>((byte & 127) * group_size_ + c % group_size_)];
        if (byte & 128) level = -level;
      } else {
        const int64_t group = o / group_outputs_, block = o % group_outputs_ / dense_outputs,
                      lane = o % group_outputs_ % dense_outputs;
        const char* word =
            weights_.data() +
            ((((group * blocks + block) * units_ + c / unit_channels_) * taps_ + t) * dense_outputs + lane) * 4;
        if (unit_channels_ == 1) std::memcpy(&level, word, 4);
        else level = static_cast<float>(static_cast<signed char>(word[c % 4]));
      }
      codes[static_cast<size_t>(o * inputs_ + i)] = code_of(o, level);
    }
  return codes;
}

Counts PackedConv2d::counts() const {
  Counts c;
  c.bytes =
      static_cast<int64_t>(weights_size_ + steps_.size() * sizeof(TableStep) + level_bytes_.size()) + level_bytes();
  if (algorithm_ == Algorithm::dense) {
    c.bytes += runs_.bytes() + (rows_ ? rows_->counts().bytes : 0);
    c.multiplies = outputs_ * inputs_;
    c.adds = outputs_ * (inputs_ - 1);
    return c;
  }
  if (algorithm_ == Algorithm::codegen) {
    const LayerCode* made = code(kernels());
    if (!made) return without_code().counts();
    c.adds = made->adds();
    c.multiplies = made->multiplies();
    c.code_bytes = made->bytes();
    return c;
  }
  if (algorithm_ == Algorithm::codebook) {
    const int64_t inputs = group_size_ * taps_, tables = geometry_.groups * table_units_;
    c.bytes += static_cast<int64_t>(kernels_.size() * 4 + columns_.size() * sizeof(columns_[0]) +
                                    column_terms_.size() * sizeof(ColumnTerm));
    c.adds = outputs_ * (table_units_ - 1);
    if (columns_.empty()) {
      c.multiplies = tables * max_entries_ * inputs;
      c.adds += tables * max_entries_ * (inputs - 1);
      return c;
    }
    const std::vector<ColumnTap> columns = column_taps(geometry_);
    const int64_t phases = std::count_if(columns.begin(), columns.end(), [](const auto& s) { return s.shift == 0; });
    for (const auto& column : columns_)
      c.adds += tables * phases * std::max<int64_t>(2 - std::count(column.begin(), column.end(), 0), 0);
    c.adds += tables * max_entries_ * (geometry_.kernel[1] - 1);
    return c;
  }
  // A table is built once per row of the filter and column phase of the stride, and read once per tap.
  const int64_t phases =
      std::min(geometry_.kernel[1], geometry_.stride[1] / std::gcd(geometry_.stride[1], geometry_.dilation[1]));
  const int64_t builds = geometry_.groups * table_units_ * geometry_.kernel[0] * phases;
  for (const TableStep& s : steps_) {
    const int64_t entries = (s.plus >= 0) + (s.minus >= 0);
    const float k = activations_.dtype == DType::f32 ? s.coefficient.f : static_cast<float>(s.coefficient.i);
    c.adds += (s.parent >= 0) * entries * builds;
    c.multiplies += (s.channel >= 0 && k != 1) * entries * builds;
  }
  c.adds += outputs_ * (table_units_ * taps_ - 1);
  return c;
}

}  // namespace pycodesign::repetition
