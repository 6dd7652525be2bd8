// Linear layers: lanes are outputs, so that weights stream once and rows need no transposition.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "core/cpu.h"
#include "core/thread_pool.h"
#include "repetition/costs.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

namespace {

// Where a code of packed float32 begins in its word: three of 5 bits or four of 4 bits in each half.
int64_t code_shift(int64_t code, int bits) {
  const int64_t half_codes = 16 / bits;
  return code / half_codes * 16 + code % half_codes * bits;
}
int64_t panel_count(int64_t outputs) { return divide_up(outputs, panel_outputs); }

}  // namespace

PackedLinear::PackedLinear(const Weights& w, const Activations& a, Algorithm algorithm)
    : PackedLayer(w, a, algorithm), group_inputs_(w.inputs / w.scale_groups) {
  const bool is_float = a.dtype == DType::f32, packed = algorithm == Algorithm::packed;
  if (algorithm != Algorithm::dense && !packed)
    throw std::invalid_argument(std::string("algorithm: expected 'dense' or 'packed', got '") +
                                algorithm_name(algorithm) + "'");
  set_correction(w, a.dtype == DType::i8 ? -128 : 0);
  if (packed) {
    values_ = distinct_levels(w);
    const size_t count = values_.size();
    if (count > 4)
      throw std::invalid_argument("algorithm: expected at most 4 distinct levels for 'packed', got " +
                                  std::to_string(count));
    if (is_float) {
      set_lookup();
    } else {
      code_bits_ = count <= 2 ? 1 : 2;
      word_inputs_ = 32 / code_bits_;
      for (size_t i = 0; i < 64; ++i) {
        const size_t code = i % 16 >> i / 16 * code_bits_ & ((1u << code_bits_) - 1);
        level_bytes_[i] = code < count ? static_cast<int8_t>(values_[code]) : int8_t{0};
      }
    }
  } else {
    word_inputs_ = is_float ? 1 : 4;
  }
  group_words_ = (group_inputs_ + word_inputs_ - 1) / word_inputs_;
  weights_size_ = static_cast<size_t>(panel_count(outputs_) * scale_groups_ * group_words_ * panel_outputs);
  if (!packed && is_float) {
    pack_words(w, [](float level, int64_t) { return std::bit_cast<uint32_t>(level); });
  } else if (!packed) {
    pack_words(w, [](float level, int64_t field) {
      return (static_cast<uint32_t>(static_cast<int>(level)) & 0xff) << 8 * field;
    });
  } else if (is_float) {
    std::array<uint32_t, 64> unit{};  // of a field: what its value counts
    for (int64_t field = 0; field < word_inputs_; ++field) unit[static_cast<size_t>(field)] = unit_of(field);
    pack_words(
        w, [&](float level, int64_t field) { return places_[value_code(level)] * unit[static_cast<size_t>(field)]; });
  } else {
    pack_words(
        w, [&](float level, int64_t field) { return value_code(level) << (8 * (field % 4) + field / 4 * code_bits_); });
  }
  if (narrow_run(w, a) >= 1) pack_runs();
}

// What a code of packed float32 stands for. As many inputs as a table of 32 sums holds: 5 binary, 3 ternary, 2 of four
// levels; where a register holds 8 floats, a code is two of 3 bits instead, each for the sum of three inputs: of six
// binary ones, or of those of three that have the one value or the other, none being zero.
void PackedLinear::set_lookup() {
  const size_t count = values_.size();
  const bool has_zero = std::find(values_.begin(), values_.end(), 0.0f) != values_.end();
  has_triples_ = kernels().lanes == 8 && (count <= 2 || (count == 3 && has_zero));
  entries_ = has_triples_ ? 16 : 32;
  code_inputs_ = has_triples_ ? (count <= 2 ? 6 : 3) : count <= 2 ? 5 : count == 3 ? 3 : 2;
  code_bits_ = has_triples_ ? 6 : count == 4 ? 4 : 5;
  codes_per_word_ = 32 / code_bits_;
  word_inputs_ = codes_per_word_ * code_inputs_;
  const auto value = [&](size_t at) { return at < count ? values_[at] : 0; };
  float* digit = digits_.reserve(static_cast<size_t>(code_inputs_ * entries_));
  if (!has_triples_) {
    places_ = {0, 1, 2, 3};
    const size_t base = std::max<size_t>(count, 2);
    for (size_t i = 0, place = 1; i < static_cast<size_t>(code_inputs_); ++i, place *= base)
      for (size_t e = 0; e < 32; ++e)
        // Four levels: 4-bit codes, the fifth bit belongs to the next code and must not matter.
        digit[i * 32 + e] = value((count == 4 ? e & 15 : e) / place % base);
  } else if (count <= 2) {
    places_ = {0, 1};
    for (size_t i = 0; i < 6; ++i)
      for (size_t e = 0; e < 16; ++e) digit[i * 16 + e] = e / 8 == i / 3 ? value(e >> i % 3 & 1) : 0;
  } else {
    places_ = {};
    for (size_t at = 0, half = 0; at < 3; ++at) {
      if (values_[at] == 0) continue;
      places_[at] = half ? 1 << 16 : 1;
      for (size_t i = 0; i < 3; ++i)
        for (size_t e = 0; e < 8; ++e) digit[i * 16 + half * 8 + e] = e >> i & 1 ? values_[at] : 0;
      ++half;
    }
  }
}

// What a word counts of the value of one of its inputs.
uint32_t PackedLinear::unit_of(int64_t field) const {
  const int64_t code = field / code_inputs_, input = field % code_inputs_;
  if (has_triples_) return 1u << (input / 3 * 16 + code * 3 + input % 3);
  uint32_t place = 1;
  for (int64_t d = 0; d < input; ++d) place *= static_cast<uint32_t>(std::max<size_t>(values_.size(), 2));
  return place << code_shift(code, code_bits_);
}

// Without a branch that weights, which are random, would decide.
uint32_t PackedLinear::value_code(float level) const {
  uint32_t code = 0;
  for (const float value : values_) code += value < level;
  return code;
}

// visit(output, input, which of its word's inputs it is, the word's index)
template <class Visit> void PackedLinear::visit_weights(Visit visit) const {
  core::parallel_for(panel_count(outputs_), [&](int64_t panel, int) {
    for (int64_t o = panel * panel_outputs; o < std::min(outputs_, (panel + 1) * panel_outputs); ++o) {
      int64_t word = panel * scale_groups_ * group_words_ * panel_outputs + o % panel_outputs;
      for (int64_t group = 0; group < inputs_; group += group_inputs_)
        for (int64_t i = 0; i < group_inputs_; i += word_inputs_, word += panel_outputs)
          for (int64_t field = 0; field < std::min(word_inputs_, group_inputs_ - i); ++field)
            visit(o, group + i + field, field, word);
    }
  });
}

// A word is the sum of what `encode` makes of its levels and of their places in it.
template <class Encode> void PackedLinear::pack_words(const Weights& w, Encode encode) {
  uint32_t* const to = weights_.reserve(weights_size_);
  std::fill_n(to, weights_size_, 0u);
  visit_weights([&](int64_t o, int64_t i, int64_t field, int64_t word) { to[word] += encode(w.level(o, i), field); });
}

// Words of `dense`: the codes of a packed word are as many.
int64_t PackedLinear::word_fields() const {
  return algorithm_ == Algorithm::packed && activations_.dtype != DType::f32 ? 8 / code_bits_ : 1;
}

void PackedLinear::expand(const Kernels& k, int64_t panel_group, int64_t word, int64_t words, char* to) const {
  const uint32_t* codes = weights_.data() + (panel_group * group_words_ + word) * panel_outputs;
  k.expand_codes({reinterpret_cast<const char*>(codes), words, code_bits_, level_bytes_.data(), to});
}

void PackedLinear::pack_runs() {
  const int64_t words = group_words_ * word_fields();
  core::AlignedBuffer<char> expanded;
  char* const to = algorithm_ == Algorithm::packed ? expanded.reserve(words * panel_outputs * 4) : nullptr;
  for (int64_t at = 0; at < panel_count(outputs_) * scale_groups_; ++at) {
    const char* panel = reinterpret_cast<const char*>(weights_.data() + at * words * panel_outputs);
    if (to) expand(kernels(), at, 0, group_words_, to);
    add_runs(runs_, to ? to : panel, words, panel_outputs, linear_part_words, activations_);
  }
}

std::vector<uint8_t> PackedLinear::codes() const {
  std::vector<uint8_t> codes(static_cast<size_t>(outputs_ * inputs_));
  const bool is_float = activations_.dtype == DType::f32;
  const auto base = static_cast<uint32_t>(std::max<size_t>(values_.size(), 2));
  const uint32_t bits = base == 3 ? 1 << 16 | 1 : 1;  // of an input of triples
  visit_weights([&](int64_t o, int64_t i, int64_t field, int64_t at) {
    const uint32_t word = weights_[static_cast<size_t>(at)];
    float level;
    if (has_triples_) {
      const auto place = std::find(places_.begin(), places_.end(), word / unit_of(field) & bits);
      level = values_[static_cast<size_t>(place - places_.begin())];
    } else if (algorithm_ == Algorithm::packed && is_float) {
      uint32_t code = word >> code_shift(field / code_inputs_, code_bits_) & ((1u << code_bits_) - 1);
      for (int64_t d = 0; d < field % code_inputs_; ++d) code /= base;
      level = values_[code % base];
    } else if (algorithm_ == Algorithm::packed) {
      level = values_[word >> (8 * (field % 4) + field / 4 * code_bits_) & ((1u << code_bits_) - 1)];
    } else if (is_float) {
      level = std::bit_cast<float>(word);
    } else {
      level = static_cast<float>(static_cast<int8_t>(word >> (8 * field)));
    }
    codes[static_cast<size_t>(o * inputs_ + i)] = code_of(o, level);
  });
  return codes;
}

Counts PackedLinear::counts() const {
  Counts c;
  c.bytes = static_cast<int64_t>(weights_size_ * 4 + digits_.size() * 4) + level_bytes() + runs_.bytes();
  if (algorithm_ == Algorithm::packed && activations_.dtype == DType::f32) {
    const int64_t codes = scale_groups_ * group_words_ * codes_per_word_;
    c.multiplies = codes * entries_ * code_inputs_;
    c.adds = codes * entries_ * (code_inputs_ - 1) + outputs_ * ((has_triples_ ? 2 : 1) * codes - 1);
  } else {
    c.multiplies = outputs_ * inputs_;
    c.adds = outputs_ * (inputs_ - 1);
  }
  return c;
}

void PackedLinear::stage_row(const Tensor& x, int64_t index, int64_t group_bytes, char* to) const {
  const int64_t element = activations_.dtype == DType::f32 ? 4 : 1;
  const auto flip = static_cast<char>(activations_.dtype == DType::i8 ? 0x80 : 0);
  for (int64_t g = 0; g < scale_groups_; ++g, to += group_bytes) {
    const char* from = x.data + index * x.stride[3] + g * group_inputs_ * x.stride[1];
    if (x.stride[1] == element) std::memcpy(to, from, static_cast<size_t>(group_inputs_ * element));
    else
      for (int64_t i = 0; i < group_inputs_; ++i)
        std::memcpy(to + i * element, from + i * x.stride[1], static_cast<size_t>(element));
    for (int64_t i = 0; flip && i < group_inputs_; ++i) to[i] = static_cast<char>(to[i] ^ flip);
    std::memset(to + group_inputs_ * element, 0, static_cast<size_t>(group_bytes - group_inputs_ * element));
  }
}

// One scale group of a panel. For several rows, by parts of its weights that stay in the first-level cache, where codes
// are expanded once for all of them.
void PackedLinear::sum_panel(const Kernels& k, int64_t panel_group, LinearTile t, const RowsDone& done) const {
  constexpr int least_expanded_rows = 4;
  constexpr int64_t done_rows = 96;  // whose sums stay in the first-level cache
  // Sums go through memory in between: a matrix unit waits for them long, and pixels are many.
  constexpr int64_t matrix_part_words = 256, small_cache = 32 << 10;
  const int64_t pixel_part_words = k.lanes < 16 ? 64 : core::cache_sizes().l1d > small_cache ? 144 : 96;
  const bool is_float = activations_.dtype == DType::f32, packed = algorithm_ == Algorithm::packed;
  const bool expands = packed && !is_float && (t.rows >= least_expanded_rows || t.position);
  const char* const weights =
      reinterpret_cast<const char*>(weights_.data() + panel_group * group_words_ * panel_outputs);
  if (packed && !expands) {
    t.weights = weights;
    t.words = group_words_;
    t.code_bits = code_bits_;
    t.level_bytes = level_bytes_.data();
    return (has_triples_ ? k.linear_triples_f32 : is_float ? k.linear_packed_f32 : k.linear_packed_i8)(t);
  }
  const bool narrow = k.linear_narrow && !runs_.empty(),
             matrix = k.linear_matrix_i8 && !t.position && t.rows >= (packed ? 8 : 4);
  const auto sum = is_float ? k.linear_f32 : narrow ? k.linear_narrow : matrix ? k.linear_matrix_i8 : k.linear_i8;
  const int64_t part_words = matrix       ? matrix_part_words
                             : t.position ? pixel_part_words
                                          : linear_part_words,
                fields = word_fields(), words = group_words_ * fields, parts = divide_up(words, part_words),
                together = t.rows == 1 && !t.position ? parts : 1;
  const int64_t pieces = done ? divide_up(t.rows, done_rows) : 1;
  char* const expanded = expands ? scratch(3, static_cast<size_t>(part_words * panel_outputs * 4)) : nullptr;
  const char* const x = t.x;
  const int64_t* const source = t.source;
  for (int64_t part = 0; part < parts; part += together) {
    const int64_t word = part * part_words;
    t.words = std::min(together * part_words, words - word);
    if (t.position) t.source = source + word;
    else t.x = x + word * 4;
    t.weights = weights + word * panel_outputs * 4;
    t.next = t.weights + t.words * panel_outputs * 4, t.next_bytes = t.words * panel_outputs * 4;
    if (expands) {
      const int64_t first = word / fields, count = t.words / fields;
      expand(k, panel_group, first, count, expanded);
      t.weights = expanded;
      t.next = weights + (first + count) * panel_outputs * 4, t.next_bytes = count * panel_outputs * 4;
    }
    if (narrow) t.runs = runs_.of(panel_group * parts + part);
    t.first = part == 0;
    if (!done) {
      sum(t);
      continue;
    }
    const bool last = part + together >= parts;
    for (int64_t p = 0; p < pieces; ++p) {
      LinearTile piece = t;
      const int64_t first = t.rows * p / pieces, lines = t.next_bytes / 64;
      piece.rows = static_cast<int>(t.rows * (p + 1) / pieces - first);
      piece.position += first;
      if (parts > 1) piece.acc += first * t.acc_stride;
      piece.next += lines * p / pieces * 64;
      piece.next_bytes = (lines * (p + 1) / pieces - lines * p / pieces) * 64;
      sum(piece);
      if (last) done(first, piece.rows, piece.acc);
    }
  }
}

void PackedLinear::run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue& epilogue) const {
  const int64_t T = x.size[3], G = scale_groups_;
  if (T * outputs_ == 0) return;
  const Kernels& k = kernels();
  const bool is_float = activations_.dtype == DType::f32, lookup = is_float && algorithm_ == Algorithm::packed;
  const int64_t element = is_float ? 4 : 1;

  // Rows as the kernels read them, each scale group padded with zeros to whole words; a few at a time, so that they
  // (and their lookup tables) stay in the second-level cache while the weights pass.
  const int64_t padded = group_words_ * word_inputs_, row_bytes = ((G * padded * element + 63) / 64 | 1) * 64;
  const int64_t positions = lookup ? G * group_words_ * codes_per_word_ : 0, step = lookup ? 6
                                                                                    : k.linear_matrix_i8 && !is_float
                                                                                        ? 128
                                                                                        : 48;
  Epilogue last = epilogue;
  if (G > 1 && epilogue.out_dtype != DType::i32) last.acc_dtype = DType::f32;
  static constexpr auto ones = [] {
    std::array<float, panel_outputs> a{};
    a.fill(1);
    return a;
  }();
  for (int64_t first = 0; first < T; first += step) {
    const int64_t count = std::min(step, T - first);
    const int64_t room = round_up(count, 16);  // a matrix unit's rows
    char* rows = scratch(0, static_cast<size_t>(room * row_bytes));
    core::parallel_for(count, [&](int64_t t, int) { stage_row(x, first + t, padded * element, rows + t * row_bytes); });
    float* tables = nullptr;
    if (lookup) {
      tables = reinterpret_cast<float*>(scratch(1, static_cast<size_t>(count * positions * entries_ * 4)));
      const int64_t piece = 512, pieces = (positions + piece - 1) / piece;
      core::parallel_for(count * pieces, [&](int64_t chunk, int) {
        const int64_t t = chunk / pieces, at = chunk % pieces * piece;
        const float* row = reinterpret_cast<const float*>(rows + t * row_bytes);
        k.build_lookup({row + at * code_inputs_, std::min(piece, positions - at), code_inputs_, entries_,
                        digits_.data(), tables + (t * positions + at) * entries_});
      });
    }
    core::parallel_for(panel_count(outputs_), [&](int64_t panel, int) {
      const int64_t sums_bytes = room * panel_outputs * 4;
      char* sums = scratch(2, static_cast<size_t>(2 * sums_bytes));
      char* total = G > 1 ? sums + sums_bytes : sums;
      const int64_t outputs_here = std::min<int64_t>(panel_outputs, outputs_ - panel * panel_outputs);
      for (int64_t g = 0; g < G; ++g) {
        LinearTile t{};
        t.x = rows + g * padded * element;
        t.x_stride = row_bytes;
        t.rows = static_cast<int>(count);
        t.table = tables + g * group_words_ * codes_per_word_ * entries_;
        t.table_stride = positions * entries_;
        t.acc = sums;
        t.acc_stride = panel_outputs * 4;
        sum_panel(k, panel * G + g, t);
        if (G == 1) break;
        add_group(sums, total, count, panel, outputs_here, g, epilogue.out_dtype == DType::i32);
      }
      Finish f{};
      f.epilogue = &last;
      f.count = outputs_here;
      f.per_element = true;
      f.multiplier = G > 1 ? ones.data() : &multiplier_[static_cast<size_t>(panel * panel_outputs)];
      f.bias = bias_.empty() ? nullptr : &bias_[static_cast<size_t>(panel * panel_outputs)];
      static constexpr std::array<int32_t, panel_outputs> zeros{};
      f.correction = G > 1                 ? zeros.data()
                     : correction_.empty() ? nullptr
                                           : &correction_[static_cast<size_t>(panel * panel_outputs)];
      f.out_stride = out.stride[1];
      f.residual_stride = residual ? residual->stride[1] : 0;
      f.acc = total;
      f.outputs = count;  // rows
      f.acc_step = panel_outputs * 4;
      f.out = out.data + first * out.stride[3] + panel * panel_outputs * out.stride[1];
      f.out_step = out.stride[3];
      if (residual) {
        f.residual = residual->data + first * residual->stride[3] + panel * panel_outputs * residual->stride[1];
        f.residual_step = residual->stride[3];
      }
      k.finish(f);
    });
  }
}

// total (+)= sums * multiplier of one scale group, in float32, groups in ascending order; or the plain integer sum.
void PackedLinear::add_group(const char* sums, char* total, int64_t rows, int64_t panel, int64_t outputs_here,
                             int64_t group, bool integers) const {
  const size_t at = static_cast<size_t>(group * outputs_ + panel * panel_outputs);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t o = 0; o < outputs_here; ++o) {
      const int64_t index = t * panel_outputs + o;
      const auto* acc = reinterpret_cast<const int32_t*>(sums) + index;
      if (activations_.dtype != DType::f32) {
        const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(*acc) +
                                                 static_cast<uint32_t>(correction_[at + static_cast<size_t>(o)]));
        auto* to = reinterpret_cast<int32_t*>(total) + index;
        if (integers) {
          *to = group == 0 ? sum : static_cast<int32_t>(static_cast<uint32_t>(*to) + static_cast<uint32_t>(sum));
          continue;
        }
        const float term = static_cast<float>(sum) * multiplier_[at + static_cast<size_t>(o)];
        auto* y = reinterpret_cast<float*>(total) + index;
        *y = group == 0 ? term : *y + term;
      } else {
        const float term = reinterpret_cast<const float*>(sums)[index] * multiplier_[at + static_cast<size_t>(o)];
        auto* y = reinterpret_cast<float*>(total) + index;
        *y = group == 0 ? term : *y + term;
      }
    }
}

}  // namespace pycodesign::repetition
