#include "repetition/codegen_x86.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>

#include "core/jitdump.h"
#include "repetition/assembler_x86.h"
#include "repetition/code_steps.h"
#include "repetition/costs.h"

namespace pycodesign::repetition {

namespace {

constexpr int64_t prefetch_bytes = 60;  // of code for each line that it prefetches: all of a segment as long

}  // namespace

struct Generator {
  Generator(const CodeLayer&, bool avx512);

  std::vector<uint8_t> code;
  std::vector<CodeChunk> chunks;
  const CodeForm form;
  int64_t adds = 0, multiplies = 0;

 private:
  using Vector = Assembler::Vector;

  // Registers: sums of patterns, ones (floats), the last column's sums, sums of outputs, totals.
  Vector entry(int64_t depth) const { return {static_cast<int>(depth)}; }
  Vector ones() const { return entry(form.group_size); }
  Vector resident(int64_t plane) const { return entry(form.group_size + is_float_ + plane); }
  Vector sum(int64_t output) const { return resident((form.resident ? form.planes() : 0) + output); }
  Address accumulator(int64_t vector) const {
    return {General::rsi, 0, General::rax, vector * assembler_.vector_bytes()};
  }
  // Of the unit. Most rows that are added are the last channel's: AVX2's encoding of r9 and r10 takes a byte more.
  Address channel(int64_t c, General offset) const {
    constexpr General bases[] = {General::rdi, General::r9, General::r10, General::rsi};
    return {c > 0 && c == width_ - 1 ? General::rsi : bases[c], 1, offset};
  }
  Address column(int64_t row) const;
  Address row(const Step& s) const { return form.planes() ? column(s.row) : channel(s.row, General::rax); }

  void generate(CodeChunk&);
  CodeSegment generate(const CodeChunk&, size_t first, size_t last);
  void start_unit(const Unit&, const Unit* before);
  void start_channels();
  void start_columns();
  void add(Assembler::Opcode, const Step&);
  void emit(const Step&);
  void finish(int64_t output, bool is_first);
  void widen_totals(int64_t first);
  void finish_complement(int64_t total, int64_t output, bool is_first);
  void store(int64_t vector, Vector from, bool is_first);
  void prefetch(CodeSegment&);
  Constant constant(float);

  const CodeLayer& layer_;
  const bool is_float_, reads_ahead_;
  const std::vector<ColumnTap> column_taps_;
  Assembler assembler_;
  std::map<float, int64_t> constants_;
  std::vector<Unit> units_;
  std::vector<size_t> ends_;     // of the segments, in units
  std::vector<Step> steps_;      // of the chunk at work
  std::vector<size_t> step_at_;  // where each unit's begin, and their end
  int64_t balance_ = 0;          // of the accumulations: additions less multiply-adds
  int64_t width_ = 0;            // of the unit at work
};

Generator::Generator(const CodeLayer& layer, bool avx512)
    : form(choose_form(layer, avx512).form),
      layer_(layer),
      is_float_(layer.dtype == DType::f32),
      reads_ahead_(form.planes() && !is_float_ && costs(avx512).drops_prefetches),
      column_taps_(column_taps(layer.geometry)),
      assembler_(avx512),
      units_(units_of(layer, form, layer.channels())),
      ends_(cut_units(layer, form, units_)) {
  chunks = cut_outputs(layer, form, avx512);
  for (CodeChunk& chunk : chunks) generate(chunk);
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
    append_steps(layer_, form, chunk, unit, steps_);
    step_at_.push_back(steps_.size());
  }
  for (const Step& s : steps_) adds += adds_of(s), multiplies += multiplies_of(s);
  for (size_t i = 0; i < ends_.size(); ++i) chunk.segments.push_back(generate(chunk, i ? ends_[i - 1] : 0, ends_[i]));
  adds += chunk.outputs * static_cast<int64_t>(ends_.size() - 1);
}

CodeSegment Generator::generate(const CodeChunk& chunk, size_t first, size_t last) {
  Assembler& a = assembler_;
  a.align(64);
  const int64_t channel = units_[first].channel, end = units_[last - 1].channel + units_[last - 1].width;
  CodeSegment segment{a.size(), 0, channel, end - channel, 0};
  const bool is_first = first == 0;
  if (is_float_) a.vmovups(ones(), constant(1));
  for (int64_t o = 0; o < chunk.outputs + (form.complement ? totals : 0); ++o)
    a.operate(Assembler::vpxord, sum(o), sum(o), sum(o));
  a.lea(General::r11, {General::rsi});
  for (size_t u = first; u < last; ++u) {
    start_unit(units_[u], u == first ? nullptr : &units_[u - 1]);
    for (size_t s = step_at_[u]; s < step_at_[u + 1]; ++s) {
      emit(steps_[s]);
      prefetch(segment);
    }
  }
  a.lea(General::rsi, {General::r11});
  if (form.complement) widen_totals(chunk.outputs);
  for (int64_t o = 0; o < chunk.outputs; ++o) {
    form.complement ? finish_complement(chunk.outputs, o, is_first) : finish(o, is_first);
    prefetch(segment);
  }
  a.vzeroupper();
  a.ret();
  segment.end = a.size();
  return segment;
}

// Registers that lead to the unit's rows.
void Generator::start_unit(const Unit& unit, const Unit* before) {
  Assembler& a = assembler_;
  if (before && unit.channel != before->channel) {
    if (width_ == 4) a.lea(General::rdi, {General::rdi, 4, General::rcx});
    else a.lea(General::rdi, channel(width_ - 1, General::rcx));
  }
  width_ = unit.width;
  if (form.planes()) {
    if (!before) start_columns();
    for (int64_t i = 0; form.resident && i < form.planes(); ++i)
      a.vmovups(resident(i), column((form.group_size - 1) * form.planes() + i));
    return;
  }
  if (!before || unit.channel != before->channel) start_channels();
  if (!before || unit.tap != before->tap) a.mov(General::rax, {General::r8, 0, General::rax, 8 * unit.tap});
}

void Generator::start_channels() {
  if (width_ > 1) assembler_.lea(channel(1, General::rcx).base, {General::rdi, 1, General::rcx});
  if (width_ > 2) assembler_.lea(channel(2, General::rcx).base, {General::rdi, 2, General::rcx});
  if (width_ > 3) assembler_.lea(channel(3, General::rcx).base, {General::r9, 2, General::rcx});
}

// The first phase begins at the unit, rax leads to the second and rsi to the third.
void Generator::start_columns() {
  int phases = 0;
  for (const ColumnTap& tap : column_taps_) phases = std::max(phases, tap.phase + 1);
  if (phases > 1) assembler_.mov(General::rax, {General::r8, 0, General::rax, 8});
  if (phases > 2) assembler_.mov(General::rsi, {General::r8, 0, General::rax, 16});
}

Address Generator::column(int64_t row) const {
  const ColumnTap& tap = column_taps_[static_cast<size_t>(row / form.planes())];
  return {General::rdi, tap.phase > 0, tap.phase == 2 ? General::rsi : General::rax,
          (tap.shift * form.planes() + row % form.planes()) * assembler_.vector_bytes()};
}

// to = from + or - row, from wherever the row is.
void Generator::add(Assembler::Opcode op, const Step& s) {
  const int64_t last = s.row - (form.group_size - 1) * form.planes();
  if (form.resident && last >= 0) assembler_.operate(op, entry(s.to), entry(s.from), resident(last));
  else assembler_.operate(op, entry(s.to), entry(s.from), row(s));
}

void Generator::emit(const Step& s) {
  using A = Assembler;
  A& a = assembler_;
  const Vector to = entry(s.to), from = entry(s.from);
  switch (s.kind) {
    case Step::load: return a.vmovups(to, row(s));
    case Step::scale: return a.operate(is_float_ ? A::vmulps : A::vpmullw, to, to, constant(s.coefficient));
    case Step::add_row: {
      if (is_float_) ++balance_;
      const A::Opcode op = is_float_ ? (s.minus ? A::vsubps : A::vaddps) : (s.minus ? A::vpsubw : A::vpaddw);
      return add(op, s);
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
  if (is_float_) return store(output, sum(output), is_first);
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
  if (!is_first) assembler_.operate(is_float_ ? Assembler::vaddps : Assembler::vpaddd, from, from, accumulator(vector));
  assembler_.vmovups(accumulator(vector), from);
}

// A line for each prefetch_bytes of the segment so far. Where prefetches would be dropped, reading every second line
// keeps the code to memory's pace.
void Generator::prefetch(CodeSegment& segment) {
  while (assembler_.size() - segment.begin >= (segment.prefetch_lines + 1) * prefetch_bytes &&
         (segment.prefetch_lines + 1) * 64 <= max_touched_bytes) {
    const Address line{General::rdx, 0, General::rax, 64 * segment.prefetch_lines++};
    if (reads_ahead_ && segment.prefetch_lines % 2) assembler_.test(line);
    else assembler_.prefetcht1(line);
  }
}

Constant Generator::constant(float value) {
  return {constants_.try_emplace(value, static_cast<int64_t>(constants_.size())).first->second};
}

LayerCode::LayerCode(const CodeLayer& layer, bool avx512) : LayerCode(Generator(layer, avx512)) {
  if (!core::records_code()) return;
  const char* dtype = layer.dtype == DType::f32 ? "f32" : layer.dtype == DType::u8 ? "u8" : "i8";
  const std::string shape = std::to_string(layer.weights->outputs) + "x" + std::to_string(layer.channels()) + "x" +
                            std::to_string(layer.taps());
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
      group_size_(g.form.group_size),
      adds_(g.adds),
      multiplies_(g.multiplies),
      columns_(g.form.columns),
      memory_(g.code, max_touched_bytes) {}

CodeCost code_cost(const CodeLayer& layer, bool avx512) {
  try {
    const CodeEstimate e = choose_form(layer, avx512);
    return {e.run, e.cold};
  } catch (const std::invalid_argument&) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    return {infinity, infinity};
  }
}

}  // namespace pycodesign::repetition
