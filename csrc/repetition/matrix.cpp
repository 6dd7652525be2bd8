// Dense sums of convolutions by a matrix unit: weights in blocks of 16 outputs x 16 words, kept as codes and expanded
// block by block, times 16 words of 16 pixels. See README.md.
#include <algorithm>
#include <cstring>
#include <limits>

#include "repetition/plan.h"

namespace pycodesign::repetition {

namespace {

constexpr int max_codes = 16;

int words_channels(const Activations& a) { return a.dtype == DType::f32 ? 2 : 4; }
int terms_of(const Activations& a) { return a.dtype == DType::f32 ? bf16_terms : 1; }

uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

bool is_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0xffff) == 0;
}

}  // namespace

MatrixShape::MatrixShape(const Geometry& g, const Activations& a) {
  const int64_t units = divide_up(g.channels / g.groups, words_channels(a)), taps = g.kernel[0] * g.kernel[1];
  gathered = units % block_words != 0;
  steps = gathered ? divide_up(units * taps, block_words) : units / block_words * taps;
}

double matrix_cycles(const Weights& w, const Geometry& g, const Activations& a) {
  const bool exact = a.dtype != DType::f32 || std::all_of(w.levels, w.levels + w.level_rows * w.level_count, is_bf16);
  if (!kernels().has_matrix_unit || w.level_count == 0 || !exact) return std::numeric_limits<double>::infinity();
  constexpr double product = 16 * 1.25, gathered_row = 7;  // cycles; some wait for the second-level cache
  const MatrixShape shape(g, a);
  const auto blocks = static_cast<double>(divide_up(w.outputs / g.groups, block_outputs)),
             steps = static_cast<double>(g.groups * shape.steps * terms_of(a));
  return steps * (blocks * product + (shape.gathered ? block_words * gathered_row : 0));
}

// Where the weight of input i of output o lies, in blocks [group][block of outputs][step]: whole as the matrix unit
// reads them, [output][word][channel], or as codes, several of these rows in the bits of one.
struct PackedConv2d::MatrixPlaces {
  std::vector<int64_t> input, output;  // their sum: byte
  std::vector<int> shift;              // by output
};

PackedConv2d::MatrixPlaces PackedConv2d::matrix_places() const {
  const MatrixShape shape(geometry_, activations_);
  const bool pairs = code_bits_ && unit_channels_ == 2;  // a row of bfloat16 codes is two of a block
  const int64_t together = code_bits_ ? 8 / code_bits_ : 1, bytes = block_bytes / together / (pairs ? 2 : 1);
  MatrixPlaces places;
  for (int64_t i = 0; i < inputs_; ++i) {
    const int64_t c = i / taps_, t = i % taps_, unit = c / unit_channels_, flat = unit * taps_ + t;
    const int64_t step = shape.gathered ? flat / block_words : unit / block_words * taps_ + t,
                  word = (shape.gathered ? flat : unit) % block_words, k = word * unit_channels_ + c % unit_channels_;
    places.input.push_back(step * bytes + (pairs ? k / 8 * 16 + k % 8 : k * (code_bits_ ? 1 : 4 / unit_channels_)));
  }
  for (int64_t o = 0; o < outputs_; ++o) {
    const int64_t in_group = o % group_outputs_, row = in_group % block_outputs, line = pairs ? row / 2 : row;
    const int64_t block = o / group_outputs_ * divide_up(group_outputs_, block_outputs) + in_group / block_outputs;
    places.output.push_back(block * shape.steps * bytes + line / together * 64 + (pairs ? row % 2 * 8 : 0));
    places.shift.push_back(static_cast<int>(line % together) * code_bits_);
  }
  return places;
}

void PackedConv2d::pack_matrix(const Weights& w) {
  const bool is_float = activations_.dtype == DType::f32;
  matrix_ = true;
  unit_channels_ = words_channels(activations_);
  stage_channels_ = unit_channels_;
  stage_planes_ = terms_of(activations_);
  units_ = divide_up(group_channels_, unit_channels_) * stage_planes_;
  blocks_ = geometry_.groups * divide_up(group_outputs_, block_outputs);
  staging_ = is_float ? Staging::bf16_terms : Staging::bytes4;
  set_correction(w, activations_.dtype == DType::i8 ? -128 : 0);
  cycles_ = matrix_cycles(w, geometry_, activations_);

  // Words of fewer than four channels repeat the first: their weights are zeros.
  const bool needs_zero = group_channels_ % unit_channels_ != 0;
  const int64_t count = level_count_ + needs_zero;
  code_bits_ = count <= 2 ? 1 : count <= 4 ? 2 : count <= max_codes ? 4 : 0;
  const MatrixShape shape(geometry_, activations_);
  const int64_t blocks = geometry_.groups * divide_up(group_outputs_, block_outputs) * shape.steps;
  const int64_t bytes = block_bytes * (code_bits_ ? code_bits_ : 8) / 8 / (is_float && code_bits_ ? 2 : 1);
  weights_size_ = static_cast<size_t>(blocks * bytes);
  char* to = weights_.reserve(weights_size_);
  std::memset(to, 0, weights_size_);
  if (code_bits_ && needs_zero) {  // everywhere first
    for (size_t i = 0; i < weights_size_; ++i)
      for (int bit = 0; bit < 8; bit += code_bits_) to[i] = static_cast<char>(to[i] | level_count_ << bit);
  }
  const int mask = (1 << code_bits_) - 1;
  const MatrixPlaces places = matrix_places();
  for (int64_t o = 0; o < outputs_; ++o)
    for (int64_t i = 0; i < inputs_; ++i) {
      const int64_t at = places.output[static_cast<size_t>(o)] + places.input[static_cast<size_t>(i)];
      const int shift = places.shift[static_cast<size_t>(o)];
      const float level = w.level(o, i);
      if (code_bits_) {
        const int code = w.codes ? w.codes[o * inputs_ + i] : code_of(o, level);
        to[at] = static_cast<char>((to[at] & ~(mask << shift)) | code << shift);
      } else if (is_float) {
        const uint16_t bits = bf16_bits(level);
        std::memcpy(to + at, &bits, 2);
      } else {
        to[at] = static_cast<char>(static_cast<int>(level));
      }
    }

  // What codes stand for, sixteen for every output, or for all alike: bytes, or the low bytes of bfloat16 and the high.
  const int64_t table = is_float ? 32 : 16;
  for (int64_t r = 0; code_bits_ && r < level_rows_; ++r)
    for (int64_t i = 0; i < table; ++i) {
      const int64_t code = i % 16 & mask;
      const float level = code < level_count_ ? levels_[static_cast<size_t>(r * level_count_ + code)] : 0;
      const int bits = is_float ? bf16_bits(level) >> (i < 16 ? 0 : 8) : static_cast<int>(level);
      level_bytes_.push_back(static_cast<char>(bits));
    }
  // Rows of outputs that do not exist are expanded too.
  if (level_rows_ > 1) level_bytes_.resize(level_bytes_.size() + static_cast<size_t>(table * block_outputs));
}

std::vector<uint8_t> PackedConv2d::matrix_codes() const {
  std::vector<uint8_t> codes;
  const MatrixPlaces places = matrix_places();
  for (int64_t o = 0; o < outputs_; ++o)
    for (int64_t i = 0; i < inputs_; ++i) {
      const char* from = weights_.data() + places.output[static_cast<size_t>(o)] + places.input[static_cast<size_t>(i)];
      const int shift = places.shift[static_cast<size_t>(o)];
      if (code_bits_) {
        codes.push_back(static_cast<uint8_t>(static_cast<uint8_t>(*from) >> shift & ((1 << code_bits_) - 1)));
      } else if (activations_.dtype == DType::f32) {
        uint32_t bits = 0;
        std::memcpy(reinterpret_cast<char*>(&bits) + 2, from, 2);
        float level;
        std::memcpy(&level, &bits, 4);
        codes.push_back(code_of(o, level));
      } else {
        codes.push_back(code_of(o, static_cast<float>(static_cast<signed char>(*from))));
      }
    }
  return codes;
}

// Blocks of outputs that are summed together: those for which rows are gathered once.
int64_t PackedConv2d::matrix_together() const {
  constexpr int64_t expanded_bytes = 256 << 10;
  const MatrixShape shape(geometry_, activations_);
  if (!shape.gathered) return 1;
  return std::clamp<int64_t>(expanded_bytes / (shape.steps * block_bytes), 1, divide_up(group_outputs_, block_outputs));
}

// A few blocks of outputs after the other: their weights are expanded once and stay in the second-level cache. The
// rows of small groups of channels are gathered for all outputs that fit there.
void PackedConv2d::sum_matrix(const Call& call, const LiftPlan& lift, const char* x, int64_t group, int64_t first,
                              int64_t last) const {
  const Kernels& k = call.k;
  const bool is_float = activations_.dtype == DType::f32;
  const MatrixShape shape(geometry_, activations_);
  const int64_t terms = stage_planes_, vector_bytes = call.vector_bytes();
  const int64_t plane = (lift.segment | 1) * vector_bytes, output_block_bytes = shape.steps * block_bytes;
  const int64_t together = matrix_together();
  const std::span<const int64_t> source = list_sources(lift, units_, shape.gathered ? terms : block_words * terms);
  MatrixSum m{};
  m.x = x;
  m.source = source.data();
  m.rows = static_cast<int64_t>(source.size());
  m.gathered = shape.gathered;
  m.row_stride = terms * lift.unit_bytes;
  m.term_stride = lift.unit_bytes;
  m.steps = shape.steps;
  m.acc_stride = plane;
  m.vectors = lift.segment;
  const int64_t gathered_bytes = shape.gathered ? shape.steps * terms * block_words * 2 * vector_bytes : 0;
  const int64_t weights_bytes = code_bits_ ? together * output_block_bytes : 0;
  char* const expanded = scratch(3, static_cast<size_t>(gathered_bytes + weights_bytes));
  m.expanded = expanded;
  m.words = expanded + weights_bytes;
  char* const sums = scratch(2, static_cast<size_t>(together * block_outputs * plane));
  m.acc = sums;
  const int64_t whole_bytes = code_bits_ ? output_block_bytes * code_bits_ / (is_float ? 16 : 8) : output_block_bytes,
                level_stride = level_rows_ == 1 ? 0
                               : is_float       ? 32
                                                : 16;
  const int64_t group_blocks = divide_up(group_outputs_, block_outputs);
  for (int64_t o = first; o < last; o += together * block_outputs) {
    m.outputs = std::min(together * block_outputs, last - o);
    const char* const weights = weights_.data() + (group * group_blocks + o / block_outputs) * whole_bytes;
    m.weights = weights;
    m.codes = {weights, code_bits_, level_bytes_.data() + (group * group_outputs_ + o) * level_stride, level_stride};
    (is_float ? k.multiply_bf16 : k.multiply_i8)(m);
    finish_outputs(call, lift, {sums, plane, vector_bytes, group * group_outputs_ + o, m.outputs});
  }
}

}  // namespace pycodesign::repetition
