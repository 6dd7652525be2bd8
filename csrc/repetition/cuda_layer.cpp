// Layers for a GPU: how codes are packed, what is chosen for a size, and the arguments of the kernels.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/divide.h"
#include "core/half.h"
#include "repetition/cuda.h"

namespace pycodesign::repetition::cuda {
namespace {

using core::divide_up;

constexpr int64_t most_groups = 65535;  // blocks in the third direction, with the splits of each

int to_int(int64_t value, const char* what) {
  if (value > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(std::string(what) + ": expected fewer than 2^31 on a GPU, got " +
                                std::to_string(value));
  return static_cast<int>(value);
}

}  // namespace

DeviceLayer::DeviceLayer(const Weights& w, const Geometry& g, const Activations& a, Algorithm algorithm)
    : Layer(w, a, algorithm),
      geometry_(g),
      taps_(g.kernel[0] * g.kernel[1]),
      group_channels_(g.channels / g.groups),
      group_outputs_(w.outputs / g.groups) {
  if (g.groups > most_groups)
    throw std::invalid_argument("groups: expected at most 65535 on a GPU, got " + std::to_string(g.groups));
}

void DeviceLayer::upload_epilogue(const Weights& w, int32_t center) {
  set_correction(w, center);
  if (scale_groups_ > 1 && !correction_.empty()) {  // and their sums, modulo 2^32
    std::vector<uint32_t> total(static_cast<size_t>(outputs_));
    for (size_t i = 0; i < correction_.size(); ++i) total[i % total.size()] += static_cast<uint32_t>(correction_[i]);
    correction_.insert(correction_.end(), total.begin(), total.end());
  }
  multipliers_.fill(multiplier_);
  biases_.fill(bias_);
  corrections_.fill(correction_);
}

Output DeviceLayer::output(const Tensor& out, const Tensor* residual, const Epilogue& epilogue) const {
  Output o{};
  o.epilogue = epilogue;
  o.out = out.data;
  std::copy(out.stride.begin(), out.stride.end(), o.out_stride);
  if (residual) {
    o.residual = residual->data;
    std::copy(residual->stride.begin(), residual->stride.end(), o.residual_stride);
  }
  o.multiplier = multipliers_.as<float>();
  o.bias = biases_.as<float>();
  o.correction = corrections_.as<int32_t>();
  o.total_correction = o.correction && scale_groups_ > 1 ? o.correction + scale_groups_ * outputs_ : o.correction;
  return o;
}

DenseLayer::DenseLayer(const Weights& w, const Geometry& g, const Activations& a, const Limits& limits)
    : DeviceLayer(w, g, a, Algorithm::dense), limits_(limits), center_(a.dtype == DType::u8 ? 128 : 0) {
  // Few channels would leave most of a chunk empty at every tap.
  gathers_ = taps_ > 1 && taps_ * chunk_of(group_channels_) > 2 * chunk_of(group_channels_ * taps_);
  part_inputs_ = gathers_ ? group_channels_ * taps_ : group_channels_ / parts();
  chunks_ = chunk_of(part_inputs_);
  if (parts() > 1) chunks_ = static_cast<int>(divide_up(chunks_, stage_chunks)) * stage_chunks;  // a scale per stage
  staged_taps_ = gathers_ ? 1 : to_int(taps_ * parts(), "kernel");
  stages_ = to_int(divide_up(int64_t{staged_taps_} * chunks_, stage_chunks), "inputs");
  segment_stages_ = stages_ / parts();
  tiles_ = to_int(divide_up(group_outputs_, tile_outputs), "outputs");
  choose_codes(w);
  for (float& m : multiplier_) m = std::ldexp(m, -exponent_);
  upload_epilogue(w, center_);
  words_.fill(pack(w));
}

std::string DenseLayer::describe() const {
  const std::string codes = std::to_string(bits_) + "-bit " + (bits_ < 8 ? "codes unpacked in registers" : "levels");
  if (integers()) return "matrix unit, " + codes + ", exact 8-bit products";
  const char* inputs = activations_.dtype == DType::f32   ? "inputs in 3 bfloat16 terms"
                       : activations_.dtype == DType::f16 ? "float16 inputs"
                                                          : "bfloat16 inputs";
  return "matrix unit, " + codes + ", " + inputs + ", " +
         (terms_ == 1 ? "exact weights" : "weights in " + std::to_string(terms_) + " terms");
}

int DenseLayer::chunk_of(int64_t size) const { return to_int(divide_up(size, chunk_inputs(integers())), "inputs"); }

// The 16-bit numbers whose sum a level is, the largest first. Of bfloat16 each takes the next 8 bits, of float16 it is
// rounded: the sum is the level, or differs by at most 2^-39 of the largest.
std::array<uint16_t, most_terms> DenseLayer::split(float level) const {
  const bool is_f16 = activations_.dtype == DType::f16;
  std::array<uint16_t, most_terms> terms;
  level = std::ldexp(level, exponent_);
  for (uint16_t& term : terms) {
    term = is_f16 ? core::to_float16(level) : static_cast<uint16_t>(std::bit_cast<uint32_t>(level) >> 16);
    level -= is_f16 ? core::from_float16(term) : core::from_bfloat16(term);
  }
  return terms;
}

// Codes of as few bits as name the levels, looked up in registers; beyond 16 levels the level itself.
void DenseLayer::choose_codes(const Weights& w) {
  values_ = distinct_levels(w);
  const size_t count = values_.size();
  bits_ = count <= 2 ? 1 : count <= 4 ? 2 : count <= 16 ? 4 : integers() ? 8 : 16;
  const float largest = std::max(std::fabs(values_.front()), std::fabs(values_.back()));
  if (activations_.dtype == DType::f16 && largest > 0) exponent_ = 14 - std::ilogb(largest);
  auto* bytes = reinterpret_cast<unsigned char*>(lookup_);
  for (size_t i = 0; i < count; ++i) {
    if (integers()) {
      if (count <= 16) bytes[i] = static_cast<unsigned char>(static_cast<int>(values_[i]));
      continue;
    }
    const auto terms = split(values_[i]);
    for (size_t t = 0; t < most_terms; ++t) {
      if (terms[t]) terms_ = std::max(terms_, static_cast<int>(t) + 1);
      if (count > 16) continue;
      bytes[t * sizeof(Lookup) + i] = static_cast<unsigned char>(terms[t]);
      bytes[t * sizeof(Lookup) + 16 + i] = static_cast<unsigned char>(terms[t] >> 8);
    }
  }
}

uint32_t DenseLayer::code_of(const Weights& w, int64_t output, int64_t input, int term) const {
  const float level = w.level(output, input);
  if (bits_ == 8) return static_cast<uint8_t>(static_cast<int>(level));
  if (bits_ == 16) return split(level)[static_cast<size_t>(term)];
  return static_cast<uint32_t>(std::lower_bound(values_.begin(), values_.end(), level) - values_.begin());
}

// The weight that a place in the staged inputs of a pixel meets, -1: none.
int64_t DenseLayer::find_input(int64_t place) const {
  const int64_t in_chunk = chunk_inputs(integers()), in_tap = chunks_ * in_chunk, tap = place / in_tap,
                input = place % in_tap;
  if (tap >= staged_taps_ || input >= part_inputs_) return -1;
  if (gathers_) return input;
  return parts() > 1 ? tap * part_inputs_ + input : input * taps_ + tap;
}

// Of each lane the fragments of a stage, in quads as cuda_codes.cuh reads them.
std::vector<uint32_t> DenseLayer::pack(const Weights& w) const {
  const bool bytes = integers();
  const int count = lane_words(bytes, bits_), quads = bytes ? 16 : 8, width = std::min(count, 4), lanes = 32;
  const int64_t stage_words = int64_t{count} * lanes, stage_inputs = stage_chunks * chunk_inputs(bytes);
  const int64_t term_words = geometry_.groups * tiles_ * stages_ * stage_words;
  const int terms = bits_ == 16 ? terms_ : 1;
  std::vector<uint32_t> words(static_cast<size_t>(term_words * terms));
  for (int64_t block = 0; block < terms * geometry_.groups * tiles_ * stages_; ++block) {
    const int64_t stage = block % stages_, tile = block / stages_ % tiles_,
                  group = block / stages_ / tiles_ % geometry_.groups;
    const auto term = static_cast<int>(block / stages_ / tiles_ / geometry_.groups);
    for (int lane = 0; lane < lanes; ++lane)
      for (int quad = 0; quad < quads; ++quad)
        for (int i = 0; i < 4; ++i) {
          // Row and step of the product, as core/warp.cuh has the fragments of A.
          const int step = quad / (quads / 2), in_step = quad % (quads / 2);
          const int half = bytes ? in_step / 4 : in_step / 2, part = bytes ? in_step % 4 : in_step % 2 * 2 + i / 2;
          const int row = half * 16 + part % 2 * 8 + lane / 4;
          const int k =
              bytes ? step * 32 + part / 2 * 16 + lane % 4 * 4 + i : step * 16 + part / 2 * 8 + lane % 4 * 2 + i % 2;
          const int64_t output = tile * tile_outputs + row, input = find_input(stage * stage_inputs + k);
          if (output >= group_outputs_ || input < 0) continue;
          const uint32_t code = code_of(w, group * group_outputs_ + output, input, term);
          const int in_word = bits_ < 8 ? 8 / bits_ : 1, in_half = std::max(in_word / 2, 1), at = quad % in_word;
          int word = quad / in_word, shift = 16 * (at / in_half) + bits_ * (at % in_half) + 4 * i;
          if (bits_ == 8) shift = 8 * i;
          if (bits_ == 16) word = 2 * quad + i / 2, shift = i % 2 * 16;
          const int64_t at_word = block * stage_words + (word / width * lanes + lane) * width + word % width;
          words[static_cast<size_t>(at_word)] |= code << shift;
        }
  }
  return words;
}

// In cycles of a multiprocessor that two blocks of 4 warps, or one of 8, keep busy: the products at the rate of
// mma.sync, or the chunks at 32 bytes a cycle, and about 2000 cycles to begin and end.
Plan DenseLayer::plan(const std::array<int64_t, 4>& size) const {
  Plan best;
  const int64_t rows = size[3],
                pixels = size[0] * geometry_.output_size(0, size[2]) * geometry_.output_size(1, size[3]);
  const bool is_linear = size[0] == 1 && size[2] == 1 && taps_ == 1 && geometry_.groups == 1 &&
                         geometry_.stride[1] == 1 && geometry_.padding[0] == 0 && geometry_.padding[1] == 0;
  if (is_linear && rows <= 2 * rows_block && (!integers() || parts() == 1)) {
    best.few_rows = true;
    best.why = "few rows: each code read once, no staging";
    return best;
  }
  const int64_t staged_pixels =
      gathers_ ? pixels : size[0] * (size[2] + 2 * geometry_.padding[0]) * (size[3] + 2 * geometry_.padding[1]);
  const int planes = planes_of(activations_.dtype);
  best.staged_bytes = staged_pixels * geometry_.groups * parts() * chunks_ * chunk_bytes * planes;
  best.staged_bytes = divide_up(best.staged_bytes, 256) * 256;
  const bool is_segmented = integers() && parts() > 1;
  double best_cost = std::numeric_limits<double>::infinity();
  for (const Shape& shape : shapes) {
    if ((is_segmented || !fits_registers(planes, bits_)) && (shape.warps != 2 || shape.eights != 4)) continue;
    if (shape.shared_bytes(planes) > limits_.shared_bytes) continue;
    const int64_t blocks = divide_up(pixels, shape.pixels()) * divide_up(tiles_, shape.warps) * geometry_.groups;
    const int64_t at_once = int64_t{limits_.multiprocessors} * 4 / shape.warps;
    const double products = 1.6 * 8 * shape.warps * shape.eights * planes * terms_,
                 bytes = shape.pixels() * 64.0 * planes / 32;
    const auto most_splits = static_cast<int>(std::min<int64_t>(is_segmented ? 1 : 16, most_groups / geometry_.groups));
    for (int splits = 1; splits <= std::min(most_splits, std::max(stages_ / 4, 1)); ++splits) {
      const int64_t waves = divide_up(blocks * splits, at_once),
                    here = divide_up(blocks * splits, limits_.multiprocessors);
      double cost =
          static_cast<double>(here) * std::max(products, bytes) * static_cast<double>(divide_up(stages_, splits)) +
          2000.0 * static_cast<double>(waves);
      if (splits > 1)
        cost += 3000 + static_cast<double>(pixels * outputs_ * 8 * splits) / (32.0 * limits_.multiprocessors);
      if (cost >= best_cost) continue;
      best_cost = cost;
      best.shape = shape;
      best.splits = splits;
    }
  }
  best.partial_bytes = best.splits > 1 ? best.splits * outputs_ * pixels * 4 : 0;
  best.why = std::to_string(tile_outputs * best.shape.warps) + " outputs by " + std::to_string(best.shape.pixels()) +
             " pixels a block" + (best.splits > 1 ? ", inputs in " + std::to_string(best.splits) + " parts" : "");
  return best;
}

DenseWeights DenseLayer::weights() const {
  DenseWeights w{words_.as<uint32_t>(), bits_, terms_, 0, {}};
  w.term_words = geometry_.groups * tiles_ * stages_ * 32 * lane_words(integers(), bits_);
  std::memcpy(w.lookup, lookup_, sizeof lookup_);
  return w;
}

void DenseLayer::run_rows(const Tensor& x, const Output& o, void* stream) const {
  Rows r{};
  r.weights = weights();
  r.output = o;
  r.dtype = activations_.dtype;
  r.x = x.data;
  r.stride[0] = x.stride[3];
  r.stride[1] = x.stride[1];
  r.rows = static_cast<int>(x.size[3]);
  r.outputs = static_cast<int>(outputs_);
  r.tiles = tiles_;
  r.part_inputs = static_cast<int>(part_inputs_);
  r.parts = parts();
  r.part_stages = segment_stages_;
  r.center = center_;
  const int64_t element = element_bytes(r.dtype), word = integers() ? 4 : 2 * element;
  r.is_packed = r.stride[1] == element && (r.rows == 1 || r.stride[0] % word == 0) &&
                part_inputs_ * element % word == 0 &&
                reinterpret_cast<uintptr_t>(r.x) % static_cast<uintptr_t>(word) == 0;
  multiply_rows(r, stream);
}

Stage DenseLayer::make_stage(const Tensor& x, char* workspace) const {
  Stage s{};
  s.x = x.data;
  s.dtype = activations_.dtype;
  std::copy(x.stride.begin(), x.stride.end(), s.stride);
  s.height = to_int(x.size[2], "x");
  s.width = to_int(x.size[3], "x");
  s.out = workspace;
  s.images = x.size[0];
  const auto pixels = [&](int axis) {
    const int64_t input = x.size[static_cast<size_t>(2 + axis)], padding = geometry_.padding[static_cast<size_t>(axis)];
    return to_int(gathers_ ? geometry_.output_size(axis, input) : input + 2 * padding, "x");
  };
  s.rows = pixels(0);
  s.columns = pixels(1);
  s.parts = to_int(geometry_.groups * parts(), "groups");
  s.part_inputs = static_cast<int>(part_inputs_);
  s.chunks = chunks_;
  s.plane = to_int(s.images * s.rows * s.columns * s.parts * s.chunks, "x");
  for (size_t axis = 0; axis < 2; ++axis) {
    s.padding[axis] = static_cast<int>(geometry_.padding[axis]);
    s.kernel[axis] = static_cast<int>(geometry_.kernel[axis]);
    s.stride_hw[axis] = static_cast<int>(geometry_.stride[axis]);
    s.dilation[axis] = static_cast<int>(geometry_.dilation[axis]);
  }
  s.gathers = gathers_;
  s.center = center_;
  s.pad = activations_.zero_point - center_;
  const int64_t element = element_bytes(s.dtype);
  s.is_packed = !gathers_ && s.stride[1] == element && part_inputs_ % chunk_inputs(integers()) == 0 &&
                reinterpret_cast<uintptr_t>(s.x) % chunk_bytes == 0 && s.stride[0] % chunk_bytes == 0 &&
                s.stride[2] % chunk_bytes == 0 && s.stride[3] % chunk_bytes == 0;
  return s;
}

// Whether x lies in memory as it would be staged.
bool DenseLayer::is_staged(const Tensor& x, const Stage& s) const {
  int64_t step = int64_t{s.parts} * s.chunks * chunk_bytes;
  if (!s.is_packed || planes_of(s.dtype) > 1 || s.center || s.padding[0] || s.padding[1] ||
      step != x.size[1] * element_bytes(s.dtype))
    return false;
  for (const size_t axis : {3, 2, 0}) {
    if (x.size[axis] > 1 && x.stride[axis] != step) return false;
    step *= x.size[axis];
  }
  return true;
}

Dense DenseLayer::make_dense(const Tensor& x, const Stage& s, const Output& o, const Plan& plan) const {
  Dense d{};
  d.weights = weights();
  d.output = o;
  d.dtype = activations_.dtype;
  d.groups = static_cast<int>(geometry_.groups);
  d.group_outputs = static_cast<int>(group_outputs_);
  d.tiles = tiles_;
  d.staged = s.out;
  d.plane = s.plane;
  const int64_t height = geometry_.output_size(0, x.size[2]), width = geometry_.output_size(1, x.size[3]);
  d.pixels = to_int(x.size[0] * height * width, "x");
  d.image_pixels = static_cast<int>(height * width);
  d.row_pixels = static_cast<int>(width);
  const int64_t pixel = int64_t{s.parts} * s.chunks, row = s.columns * pixel;
  d.image_step = to_int(s.rows * row, "x");
  d.row_step = to_int(row * (gathers_ ? 1 : geometry_.stride[0]), "x");
  d.pixel_step = to_int(pixel * (gathers_ ? 1 : geometry_.stride[1]), "x");
  d.group_step = to_int(pixel / geometry_.groups, "x");
  d.taps = staged_taps_;
  d.row_taps = gathers_ ? 1 : parts() > 1 ? staged_taps_ : static_cast<int>(geometry_.kernel[1]);
  d.tap_row_step = to_int(row * geometry_.dilation[0], "x");
  d.tap_step = parts() > 1 ? s.chunks : to_int(pixel * geometry_.dilation[1], "x");
  d.chunks = s.chunks;
  d.stages = stages_;
  d.segment_stages = segment_stages_;
  d.splits = plan.splits;
  d.partial = s.out + plan.staged_bytes;
  return d;
}

void DenseLayer::run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue& epilogue,
                     char* workspace, void* stream) const {
  if (out.size[0] == 0 || out.size[2] == 0 || out.size[3] == 0) return;
  const Plan chosen = plan(x.size);
  const Output o = output(out, residual, epilogue);
  if (chosen.few_rows) return run_rows(x, o, stream);
  const Stage s = make_stage(x, workspace);
  Dense d = make_dense(x, s, o, chosen);
  if (is_staged(x, s)) d.staged = x.data;
  else stage(s, stream);
  multiply(d, chosen.shape, stream);
}

Counts DenseLayer::counts() const {
  Counts n;
  n.multiplies = outputs_ * inputs_;
  n.adds = outputs_ * (inputs_ - 1);
  n.bytes = static_cast<int64_t>(words_.bytes() + multipliers_.bytes() + biases_.bytes() + corrections_.bytes());
  return n;
}

}  // namespace pycodesign::repetition::cuda
