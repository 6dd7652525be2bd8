#include "repetition/codegen_x86.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>

#include "core/jitdump.h"
#include "repetition/assembler_x86.h"

namespace pycodesign::repetition {

namespace {

// Rows of x that a segment reads: three vectors of each, for the taps of a filter row, fit the first-level cache. int16
// sums cost more to keep.
int64_t segment_rows(DType dtype) { return dtype == DType::f32 ? 288 : 576; }
constexpr int64_t prefetch_bytes = 96;  // of code for each line that it prefetches
constexpr int64_t max_group = 4;
constexpr int64_t max_word = 32767;
constexpr int64_t sample_channels = 64;

// The complement trick, for integers with levels -1 and 1: twice the sum over the rows of level 1, less the sum over
// all rows, which a chunk needs once. There are fewer patterns, single rows need no addition to be one, and half the
// terms are left. Two registers share the sum over all rows, by turns of units, so that int16 holds them as long.
constexpr int64_t totals = 2;

bool is_complement(const CodeLayer& l) {
  const Weights& w = *l.weights;
  return l.dtype != DType::f32 && l.channels > 1 && w.level_rows == 1 && w.level_count == 2 && w.levels[0] == -1 &&
         w.levels[1] == 1;
}

// What patterns and sums are made of.
float level_of(const CodeLayer& l, bool complement, int64_t output, int64_t input) {
  const float level = l.weights->level(output, input);
  return complement ? std::max(level, 0.0f) : level;
}

// One step of a unit: a tap of a group of neighboring channels. Registers `to` and `from` hold sums of rows, row r
// being channel r of the group at that tap.
struct Step {
  enum Kind : uint8_t {
    load,        // to = row
    scale,       // to *= coefficient
    add_row,     // to = from +- row
    add_scaled,  // to = from +- coefficient * to
    accumulate,  // sum of `output` += or -= from
  } kind;
  bool minus;
  int8_t to, from, row;
  int16_t output;
  float coefficient;
};

// Levels of a group's channels, up to sign: the first that is not zero is positive.
struct Pattern {
  std::array<float, max_group> levels;
  int16_t output;
  bool minus;

  bool operator<(const Pattern& other) const {
    return levels != other.levels ? levels < other.levels : output < other.output;
  }
};

struct Unit {
  int64_t channel, width, tap, index;
};

// How a layer is cut, which follows from the group size.
struct Shape {
  int64_t group_size, chunks;  // chunks: per group of the convolution
  bool complement;

  Shape(const CodeLayer& l, int64_t group_size_, bool avx512)
      : group_size(group_size_), complement(group_size_ > 1 && is_complement(l)) {
    const int64_t outputs = l.weights->outputs / l.groups;
    const int64_t accumulators = (avx512 ? 32 : 16) - group_size - (l.dtype == DType::f32) - (complement ? totals : 0);
    chunks = (outputs + accumulators - 1) / accumulators;
    if (chunks > 8 && chunks * l.groups % 2) ++chunks;  // two threads that share them finish together
  }
};

CodeChunk chunk_of(const CodeLayer& l, const Shape& shape, int64_t index) {
  const int64_t outputs = l.weights->outputs / l.groups, group = index / shape.chunks, chunk = index % shape.chunks;
  const int64_t first = outputs * chunk / shape.chunks, last = outputs * (chunk + 1) / shape.chunks;
  return {group, group * outputs + first, last - first, {}};
}

// Units of the first `channels` channels, in the order in which they are summed.
std::vector<Unit> units_of(const CodeLayer& l, const Shape& shape, int64_t channels) {
  std::vector<Unit> units;
  for (int64_t c = 0; c < channels; c += shape.group_size)
    for (int64_t t = 0; t < l.taps; ++t)
      units.push_back({c, std::min(shape.group_size, channels - c), t, static_cast<int64_t>(units.size())});
  return units;
}

// Register `to` = register `from`, or zero if from is -1, + level * row. `sibling` is the level with which the register
// was made last, 0 if it holds something else.
void build(const CodeLayer& l, int8_t to, int8_t row, float level, float sibling, std::vector<Step>& steps) {
  const int8_t from = static_cast<int8_t>(to - 1);
  const bool has_parent = from >= 0, minus = level < 0;
  const float magnitude = std::abs(level);
  const auto step = [&](Step::Kind kind, int8_t from_, float coefficient = 0) {
    steps.push_back({kind, minus, to, from_, row, 0, coefficient});
  };
  if (l.dtype == DType::f32) {
    if (!has_parent || magnitude != 1) step(Step::load, 0);
    if (!has_parent && magnitude != 1) step(Step::scale, 0, magnitude);
    if (has_parent && magnitude != 1) step(Step::add_scaled, from, magnitude);
    if (has_parent && magnitude == 1) step(Step::add_row, from);
    return;
  }
  // Integers are exact on any way: adding the row repeatedly, to the parent or to the sibling, often is the shortest.
  const float multiply = has_parent ? 2.0f : 1.0f, direct = has_parent ? magnitude : magnitude - 1;
  const float walk = sibling != 0 ? std::abs(level - sibling) : std::numeric_limits<float>::infinity();
  if (walk <= std::min(direct, multiply)) {
    for (float i = 0; i < walk; ++i) steps.push_back({Step::add_row, level < sibling, to, to, row, 0, 0});
  } else if (direct <= multiply) {
    step(has_parent ? Step::add_row : Step::load, from);
    for (float i = 1; i < magnitude; ++i) step(Step::add_row, to);
  } else {
    step(Step::load, 0);
    if (has_parent) step(Step::add_scaled, from, magnitude);
    else step(Step::scale, 0, magnitude);
  }
}

// The patterns of a unit in lexicographic order walk their trie depth first: register d holds the sum of the first d +
// 1 levels that are not zero, and what a pattern shares with the one before is there already.
void append_steps(const CodeLayer& l, bool complement, const CodeChunk& chunk, const Unit& unit,
                  std::vector<Step>& steps) {
  std::array<Pattern, 32> patterns;
  size_t count = 0;
  for (int64_t o = 0; o < chunk.outputs; ++o) {
    Pattern p{{}, static_cast<int16_t>(o), false};
    bool empty = true;
    for (int64_t c = 0; c < unit.width; ++c) {
      const float level = level_of(l, complement, chunk.first_output + o, (unit.channel + c) * l.taps + unit.tap);
      if (empty && level != 0) empty = false, p.minus = level < 0;
      p.levels[static_cast<size_t>(c)] = level == 0 ? 0 : p.minus ? -level : level;
    }
    if (!empty) patterns[count++] = p;
  }
  if (complement) {
    Pattern& all = patterns[count++] = {{}, static_cast<int16_t>(chunk.outputs + unit.index % totals), false};
    std::fill_n(all.levels.begin(), unit.width, 1.0f);
  }
  std::sort(patterns.begin(), patterns.begin() + static_cast<int64_t>(count));

  constexpr Pattern none{};
  for (size_t i = 0; i < count; ++i) {
    const auto &levels = patterns[i].levels, &former = (i ? patterns[i - 1] : none).levels;
    int8_t depth = 0;
    bool shared = true;
    for (size_t c = 0; c < static_cast<size_t>(unit.width); ++c) {
      const bool differs = levels[c] != former[c];
      if (levels[c] != 0) {
        if (!shared || differs) build(l, depth, static_cast<int8_t>(c), levels[c], shared ? former[c] : 0, steps);
        ++depth;
      }
      shared &= !differs;
    }
    steps.push_back({Step::accumulate, patterns[i].minus, 0, static_cast<int8_t>(depth - 1), 0, patterns[i].output, 0});
  }
}

int64_t adds_of(const Step& s) {
  return s.kind == Step::add_row || s.kind == Step::add_scaled || s.kind == Step::accumulate;
}
int64_t multiplies_of(const Step& s) { return s.kind == Step::scale || s.kind == Step::add_scaled; }

// Largest magnitude of a level; throws std::invalid_argument if int16 sums cannot serve it.
double largest_level(const CodeLayer& l) {
  const Weights& w = *l.weights;
  float largest = 0;
  for (int64_t i = 0; i < w.level_rows * w.level_count; ++i) {
    const float level = w.levels[i];
    largest = std::max(largest, std::abs(level));
    if (l.dtype != DType::f32 && level != std::round(level))
      throw std::invalid_argument("levels: expected integers for integer inputs, got " + std::to_string(level));
  }
  if (l.dtype != DType::f32 && static_cast<double>(largest) * static_cast<double>(l.range) > max_word)
    throw std::invalid_argument("levels: expected products that fit 16 bits, got a level of magnitude " +
                                std::to_string(largest) + " and inputs up to " + std::to_string(l.range));
  return static_cast<double>(largest);
}

struct Estimate {
  int64_t group_size;
  double cycles;
};

// Cycles of Zen 4 for 64 bytes of every plane, from one chunk and its first channels. For 512 bits two operations or
// one load take a cycle and a store takes two; for 256 bits half of that, but instructions come too slowly for it.
double sample_cycles(const CodeLayer& l, const Shape& shape, bool avx512) {
  const CodeChunk chunk = chunk_of(l, shape, 0);
  const int64_t channels = std::min(l.channels, sample_channels / shape.group_size * shape.group_size);
  std::vector<Step> steps;
  for (const Unit& unit : units_of(l, shape, channels)) append_steps(l, shape.complement, chunk, unit, steps);
  double operations = 0, loads = 0, magnitude = 0;
  for (const Step& s : steps) {
    operations += s.kind == Step::load ? 0 : s.kind == Step::add_scaled && l.dtype != DType::f32 ? 2 : 1;
    loads += s.kind != Step::accumulate;
  }
  for (int64_t o = 0; o < chunk.outputs; ++o)
    for (int64_t i = 0; i < channels * l.taps; ++i)
      magnitude += std::abs(static_cast<double>(level_of(l, shape.complement, chunk.first_output + o, i)));

  const double share = static_cast<double>(l.channels) / static_cast<double>(channels);
  const double outputs = static_cast<double>(chunk.outputs);
  double segments = static_cast<double>(l.channels * l.taps) / static_cast<double>(segment_rows(l.dtype));
  if (l.dtype != DType::f32)
    segments = std::max(segments, magnitude / outputs * share * static_cast<double>(l.range) / max_word);
  const double slow = avx512 ? 1.15 : 1.6;
  const double sums = slow * std::max(operations / 2, loads) * share;
  const double stores = outputs * (l.dtype == DType::f32 ? 2.5 : shape.complement ? 6.5 : 5) + (avx512 ? 20 : 40);
  return (sums + std::max(1.0, std::ceil(segments)) * stores) * static_cast<double>(shape.chunks * l.groups);
}

// The group size with the fewest cycles. Sums of a group's products must fit a word, too.
Estimate choose_group(const CodeLayer& l, bool avx512) {
  const double largest = largest_level(l) * static_cast<double>(l.range);
  Estimate best{0, std::numeric_limits<double>::infinity()};
  for (int64_t g = 1; g <= std::min(max_group, l.channels); ++g) {
    if (l.dtype != DType::f32 && largest * static_cast<double>(g) > max_word) break;
    const double cycles = sample_cycles(l, Shape(l, g, avx512), avx512);
    if (cycles < best.cycles) best = {g, cycles};
  }
  return best;
}

}  // namespace

struct Generator {
  Generator(const CodeLayer&, bool avx512);

  std::vector<uint8_t> code;
  std::vector<CodeChunk> chunks;
  int64_t group_size, adds = 0, multiplies = 0;

 private:
  using Vector = Assembler::Vector;

  // Registers: sums of patterns, ones (floats), sums of outputs.
  Vector entry(int depth) const { return {depth}; }
  Vector ones() const { return {static_cast<int>(group_size)}; }
  Vector sum(int64_t output) const { return {static_cast<int>(group_size + is_float_ + output)}; }
  Address accumulator(int64_t vector) const {
    return {General::rsi, 0, General::rax, vector * assembler_.vector_bytes()};
  }
  static Address row(int r, General offset = General::rax) {
    constexpr General bases[] = {General::rdi, General::r9, General::r10, General::r11};
    return {bases[r], 1, offset};
  }

  void generate(CodeChunk&);
  std::vector<size_t> cut() const;
  CodeSegment generate(const CodeChunk&, size_t first, size_t last);
  void start_rows(int64_t width);
  void emit(const Step&);
  void finish(int64_t output, bool is_first);
  void widen_totals(int64_t first);
  void finish_complement(int64_t total, int64_t output, bool is_first);
  void store(int64_t vector, Vector from, bool is_first);
  void prefetch(CodeSegment&);
  Constant constant(float);

  const CodeLayer& layer_;
  const bool is_float_, complement_;
  Assembler assembler_;
  std::map<float, int64_t> constants_;
  std::vector<Unit> units_;
  std::vector<size_t> ends_;     // of the segments, in units
  std::vector<Step> steps_;      // of the chunk at work
  std::vector<size_t> step_at_;  // where each unit's begin, and their end
  int64_t balance_ = 0;          // of the accumulations: additions less multiply-adds
};

Generator::Generator(const CodeLayer& layer, bool avx512)
    : group_size(choose_group(layer, avx512).group_size),
      layer_(layer),
      is_float_(layer.dtype == DType::f32),
      complement_(Shape(layer, group_size, avx512).complement),
      assembler_(avx512) {
  const Shape shape(layer, group_size, avx512);
  units_ = units_of(layer, shape, layer.channels);
  ends_ = cut();
  for (int64_t i = 0; i < layer.groups * shape.chunks; ++i) {
    chunks.push_back(chunk_of(layer, shape, i));
    generate(chunks.back());
  }
  std::vector<uint32_t> words(constants_.size());
  for (const auto& [value, number] : constants_)
    words[static_cast<size_t>(number)] =
        is_float_ ? std::bit_cast<uint32_t>(value) : static_cast<uint32_t>(value) * 0x10001u;  // both halves
  code = assembler_.finish(words);
}

void Generator::generate(CodeChunk& chunk) {
  steps_.clear();
  step_at_ = {0};
  for (const Unit& unit : units_) {
    append_steps(layer_, complement_, chunk, unit, steps_);
    step_at_.push_back(steps_.size());
  }
  for (const Step& s : steps_) adds += adds_of(s), multiplies += multiplies_of(s);
  for (size_t i = 0; i < ends_.size(); ++i) chunk.segments.push_back(generate(chunk, i ? ends_[i - 1] : 0, ends_[i]));
  adds += chunk.outputs * static_cast<int64_t>(ends_.size() - 1);
}

// Ends of the segments, in units, for all chunks alike: as few as the cache and the range of int16 allow, all about as
// long.
std::vector<size_t> Generator::cut() const {
  const Weights& w = *layer_.weights;
  std::vector<double> sums(static_cast<size_t>(w.outputs));
  std::array<int64_t, totals> total_rows;
  const auto cut_every = [&](int64_t most) {
    std::vector<size_t> ends;
    int64_t rows = 0;
    const auto start = [&] {
      rows = 0;
      total_rows.fill(0);
      std::fill(sums.begin(), sums.end(), 0);
    };
    const auto add = [&](const Unit& unit) {  // whether it fits
      rows += unit.width;
      bool fits = rows <= most;
      for (int64_t o = 0; o < w.outputs && !is_float_; ++o) {
        double& total = sums[static_cast<size_t>(o)];
        for (int64_t c = unit.channel; c < unit.channel + unit.width; ++c)
          total += std::abs(static_cast<double>(level_of(layer_, complement_, o, c * layer_.taps + unit.tap)));
        fits &= total * static_cast<double>(layer_.range) <= max_word;
      }
      int64_t& all = total_rows[static_cast<size_t>(unit.index % totals)];
      all += unit.width;
      fits &= !complement_ || all * layer_.range <= max_word;
      return fits;
    };
    start();
    for (size_t u = 0; u < units_.size(); ++u)
      if (!add(units_[u]) && u > (ends.empty() ? 0 : ends.back())) {
        ends.push_back(u);
        start();
        add(units_[u]);
      }
    ends.push_back(units_.size());
    return ends;
  };
  const auto segments = static_cast<int64_t>(cut_every(segment_rows(layer_.dtype)).size());
  for (int64_t most = layer_.channels * layer_.taps / segments;; most += most / 32 + 1)
    if (auto ends = cut_every(most);
        static_cast<int64_t>(ends.size()) == segments || most >= segment_rows(layer_.dtype))
      return ends;
}

CodeSegment Generator::generate(const CodeChunk& chunk, size_t first, size_t last) {
  Assembler& a = assembler_;
  a.align(64);
  CodeSegment segment{a.size(), 0, units_[first].channel, 0};
  const bool is_first = first == 0;
  if (is_float_) a.vmovups(ones(), constant(1));
  for (int64_t o = 0; o < chunk.outputs + (complement_ ? totals : 0); ++o) {
    if (is_first || !is_float_) a.operate(Assembler::vpxord, sum(o), sum(o), sum(o));
    else a.vmovups(sum(o), accumulator(o));
  }
  for (size_t u = first; u < last; ++u) {
    const Unit &unit = units_[u], &before = units_[u == first ? u : u - 1];
    if (unit.channel != before.channel) {
      const int64_t width = before.width;
      if (width == 4) a.lea(General::rdi, {General::rdi, 4, General::rcx});
      else a.lea(General::rdi, row(static_cast<int>(width) - 1, General::rcx));
    }
    if (u == first || unit.channel != before.channel) start_rows(unit.width);
    if (u == first || unit.tap != before.tap) a.mov(General::rax, {General::rdx, 0, General::rax, 8 * unit.tap});
    for (size_t s = step_at_[u]; s < step_at_[u + 1]; ++s) {
      emit(steps_[s]);
      prefetch(segment);
    }
  }
  if (complement_) widen_totals(chunk.outputs);
  for (int64_t o = 0; o < chunk.outputs; ++o) {
    complement_ ? finish_complement(chunk.outputs, o, is_first) : finish(o, is_first);
    prefetch(segment);
  }
  a.vzeroupper();
  a.ret();
  segment.end = a.size();
  return segment;
}

void Generator::start_rows(int64_t width) {
  if (width > 1) assembler_.lea(General::r9, row(0, General::rcx));
  if (width > 2) assembler_.lea(General::r10, {General::rdi, 2, General::rcx});
  if (width > 3) assembler_.lea(General::r11, {General::r9, 2, General::rcx});
}

void Generator::emit(const Step& s) {
  using A = Assembler;
  A& a = assembler_;
  const Vector to = entry(s.to), from = entry(s.from);
  switch (s.kind) {
    case Step::load: return a.vmovups(to, row(s.row));
    case Step::scale: return a.operate(is_float_ ? A::vmulps : A::vpmullw, to, to, constant(s.coefficient));
    case Step::add_row: {
      if (is_float_) ++balance_;
      const A::Opcode op = is_float_ ? (s.minus ? A::vsubps : A::vaddps) : (s.minus ? A::vpsubw : A::vpaddw);
      return a.operate(op, to, from, row(s.row));
    }
    case Step::add_scaled: {
      if (is_float_) {
        --balance_;
        return a.operate(s.minus ? A::vfnmadd132ps : A::vfmadd132ps, to, from, constant(s.coefficient));
      }
      a.operate(A::vpmullw, to, to, constant(s.coefficient));
      return a.operate(s.minus ? A::vpsubw : A::vpaddw, to, from, to);
    }
    case Step::accumulate: {
      const Vector acc = sum(s.output);
      if (!is_float_) return a.operate(s.minus ? A::vpsubw : A::vpaddw, acc, acc, from);
      // Additions and multiply-adds have pipes of their own on AMD.
      if (balance_ <= 0) {
        ++balance_;
        return a.operate(s.minus ? A::vsubps : A::vaddps, acc, acc, from);
      }
      --balance_;
      return a.operate(s.minus ? A::vfnmadd231ps : A::vfmadd231ps, acc, ones(), from);
    }
  }
}

// Stores the sums of an output, integers widened: the low halves of the words, then the high ones.
void Generator::finish(int64_t output, bool is_first) {
  Assembler& a = assembler_;
  if (is_float_) return a.vmovups(accumulator(output), sum(output));
  a.vpslld(entry(0), sum(output), 16);
  a.vpsrad(entry(0), entry(0), 16);
  store(2 * output, entry(0), is_first);
  a.vpsrad(sum(output), sum(output), 16);
  store(2 * output + 1, sum(output), is_first);
}

// Registers `first` and the next: the totals' low halves added, and the high ones.
void Generator::widen_totals(int64_t first) {
  Assembler& a = assembler_;
  for (int i = 0; i < totals; ++i) {
    a.vpslld(entry(i), sum(first + i), 16);
    a.vpsrad(entry(i), entry(i), 16);
    a.vpsrad(sum(first + i), sum(first + i), 16);
  }
  a.operate(Assembler::vpaddd, sum(first + 1), sum(first), sum(first + 1));
  a.operate(Assembler::vpaddd, sum(first), entry(0), entry(1));
}

void Generator::finish_complement(int64_t total, int64_t output, bool is_first) {
  Assembler& a = assembler_;
  a.vpslld(entry(0), sum(output), 16);
  a.vpsrad(entry(0), entry(0), 15);  // doubled
  a.operate(Assembler::vpsubd, entry(0), entry(0), sum(total));
  store(2 * output, entry(0), is_first);
  a.vpsrad(sum(output), sum(output), 16);
  a.operate(Assembler::vpaddd, sum(output), sum(output), sum(output));
  a.operate(Assembler::vpsubd, sum(output), sum(output), sum(total + 1));
  store(2 * output + 1, sum(output), is_first);
}

void Generator::store(int64_t vector, Vector from, bool is_first) {
  if (!is_first) assembler_.operate(Assembler::vpaddd, from, from, accumulator(vector));
  assembler_.vmovups(accumulator(vector), from);
}

// A line for each prefetch_bytes of the segment so far.
void Generator::prefetch(CodeSegment& segment) {
  while (assembler_.size() - segment.begin >= (segment.prefetch_lines + 1) * prefetch_bytes)
    assembler_.prefetcht1({General::r8, 0, General::rax, 64 * segment.prefetch_lines++});
}

Constant Generator::constant(float value) {
  return {constants_.try_emplace(value, static_cast<int64_t>(constants_.size())).first->second};
}

LayerCode::LayerCode(const CodeLayer& layer, bool avx512) : LayerCode(Generator(layer, avx512)) {
  if (!core::records_code()) return;
  const char* dtype = layer.dtype == DType::f32 ? "f32" : layer.dtype == DType::u8 ? "u8" : "i8";
  const std::string shape =
      std::to_string(layer.weights->outputs) + "x" + std::to_string(layer.channels) + "x" + std::to_string(layer.taps);
  for (const CodeChunk& c : chunks_)
    for (size_t i = 0; i < c.segments.size(); ++i) {
      const auto size = static_cast<size_t>(c.segments[i].end - c.segments[i].begin);
      core::record_code({address(c.segments[i]), size},
                        "pycodesign " + shape + " " + dtype + " outputs " + std::to_string(c.first_output) + "-" +
                            std::to_string(c.first_output + c.outputs - 1) + " segment " + std::to_string(i));
    }
}

LayerCode::LayerCode(Generator&& g)
    : chunks_(std::move(g.chunks)),
      group_size_(g.group_size),
      adds_(g.adds),
      multiplies_(g.multiplies),
      memory_(g.code) {}

double code_cost(const CodeLayer& layer, bool avx512) {
  try {
    return choose_group(layer, avx512).cycles;
  } catch (const std::invalid_argument&) {
    return std::numeric_limits<double>::infinity();
  }
}

}  // namespace pycodesign::repetition
