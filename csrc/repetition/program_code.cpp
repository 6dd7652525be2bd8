#include "repetition/program_code.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>
#include <vector>

#include "core/aligned_buffer.h"
#include "repetition/assembler_x86.h"

namespace pycodesign::repetition {

namespace {

using Vector = Assembler::Vector;

constexpr Assembler::Opcode vpmulld{2, 1, 0x40};
constexpr int none = -1;
constexpr int64_t never = std::numeric_limits<int64_t>::max();

// The instructions that outputs need, each just before the first that reads it, output after output.
std::vector<int32_t> order_instructions(const Program& p) {
  std::vector<int32_t> order, stack;
  std::vector<bool> done(p.op.size());
  for (const int32_t output : p.outputs) {
    stack.push_back(output);
    while (!stack.empty()) {
      const int32_t value = stack.back(), k = value - p.inputs;
      if (k < 0 || done[static_cast<size_t>(k)]) {
        stack.pop_back();
        continue;
      }
      const auto at = static_cast<size_t>(k);
      const size_t before = stack.size();
      const auto need = [&](int32_t operand) {
        if (operand >= p.inputs && !done[static_cast<size_t>(operand - p.inputs)]) stack.push_back(operand);
      };
      if (p.op[at] != Program::multiply) need(p.right[at]);
      need(p.left[at]);
      if (stack.size() > before) continue;
      done[at] = true;
      order.push_back(k);
      stack.pop_back();
    }
  }
  return order;
}

// When values are read. A value goes by its number plus one, so that 0 is zero.
class Uses {
 public:
  Uses(const Program&, const std::vector<int32_t>& order);

  // The position in the order at which it is read next; `never` if it is not.
  int64_t next(size_t value) const {
    const size_t at = first_[value] + past_[value];
    return at < first_[value + 1] ? positions_[at] : never;
  }
  void read(size_t value) { ++past_[value]; }

 private:
  std::vector<size_t> first_;  // [value]: in positions_, ascending for each value
  std::vector<int64_t> positions_;
  std::vector<size_t> past_;  // [value]: how many of them
};

Uses::Uses(const Program& p, const std::vector<int32_t>& order)
    : first_(static_cast<size_t>(p.inputs) + p.op.size() + 2), past_(first_.size() - 1) {
  const auto for_each = [&](const auto& visit) {
    for (size_t i = 0; i < order.size(); ++i) {
      const auto k = static_cast<size_t>(order[i]);
      visit(static_cast<size_t>(p.left[k] + 1), i);
      if (p.op[k] != Program::multiply) visit(static_cast<size_t>(p.right[k] + 1), i);
    }
  };
  for_each([&](size_t value, size_t) { ++first_[value + 1]; });
  for (size_t v = 1; v < first_.size(); ++v) first_[v] += first_[v - 1];
  positions_.resize(first_.back());
  std::vector<size_t> at(first_.begin(), first_.end() - 1);
  for_each([&](size_t value, size_t i) { positions_[at[value]++] = static_cast<int64_t>(i); });
}

}  // namespace

struct ProgramWriter {
  ProgramWriter(const Program&, DType, bool avx512);

  const Program& program;
  const DType lanes;
  Assembler assembler;
  std::vector<uint8_t> code;
  ProgramCounts counts;

 private:
  void write(size_t k);
  template <class Operand> void add(bool minus, int to, int a, const Operand& b);
  bool is_worth_a_register(size_t value) const;
  int take_register();
  void drop(int r);
  int load(size_t value);
  void store(int r, const Address&);
  void store_outputs(size_t value);
  void free_slot(size_t value);
  int64_t next_use(size_t r) const { return held_[r] == nothing ? never : uses_.next(held_[r]); }
  void pin(int r) {
    if (r != none) pinned_[static_cast<size_t>(r)] = true;
  }
  Address memory(General base, size_t vector) const {
    return {base, 0, General::rax, static_cast<int64_t>(vector) * assembler.vector_bytes()};
  }
  Vector ones() const { return {static_cast<int>(held_.size())}; }

  static constexpr size_t nothing = std::numeric_limits<size_t>::max();
  const bool is_float_;
  const std::vector<int32_t> order_;
  Uses uses_;
  std::vector<size_t> held_;   // [register]: value or nothing
  std::vector<bool> pinned_;   // [register]: operands of the instruction at work
  std::vector<int> place_;     // [value]: register or none
  std::vector<Address> home_;  // [value]: where it is in memory,
  std::vector<bool> has_home_;
  std::vector<size_t> slot_;  // [value]: the slot that is its home, or nothing
  std::vector<size_t> free_slots_;
  std::vector<std::vector<size_t>> outputs_of_;  // [value]
  int balance_ = 0;                              // additions less multiply-adds
};

ProgramWriter::ProgramWriter(const Program& p, DType lanes_, bool avx512)
    : program(p),
      lanes(lanes_),
      assembler(avx512),
      is_float_(lanes == DType::f32),
      order_(order_instructions(p)),
      uses_(p, order_),
      held_((avx512 ? 32 : 16) - is_float_, nothing),
      pinned_(held_.size()) {
  const size_t values = static_cast<size_t>(p.inputs) + p.op.size() + 1;
  place_.assign(values, none);
  home_.assign(values, memory(General::rdi, 0));
  has_home_.resize(values);
  slot_.assign(values, nothing);
  outputs_of_.resize(values);
  has_home_[0] = true;  // needs none
  for (size_t i = 0; i < static_cast<size_t>(p.inputs); ++i) {
    home_[i + 1] = memory(General::rdi, i);
    has_home_[i + 1] = true;
  }
  for (size_t o = 0; o < p.outputs.size(); ++o) outputs_of_[static_cast<size_t>(p.outputs[o] + 1)].push_back(o);

  std::vector<uint32_t> words;
  for (const double c : p.constants)
    words.push_back(is_float_ ? std::bit_cast<uint32_t>(static_cast<float>(c))
                              : static_cast<uint32_t>(static_cast<int64_t>(c)));
  if (is_float_) {
    assembler.vmovups(ones(), Constant{static_cast<int64_t>(words.size())});
    words.push_back(std::bit_cast<uint32_t>(1.0f));
    counts.loads = counts.instructions = 1;
  }
  for (size_t value = 0; value <= static_cast<size_t>(p.inputs); ++value)
    if (!outputs_of_[value].empty()) {
      load(value);
      store_outputs(value);
    }
  for (const int32_t k : order_) write(static_cast<size_t>(k));
  assembler.vzeroupper();
  assembler.ret();
  counts.operations = static_cast<int64_t>(order_.size());
  code = assembler.finish(words);
}

// One instruction of the program: its left operand in a register, the right one there or in memory.
void ProgramWriter::write(size_t k) {
  const uint8_t op = program.op[k];
  const bool is_product = op == Program::multiply;
  auto left = static_cast<size_t>(program.left[k] + 1);
  auto right = is_product ? left : static_cast<size_t>(program.right[k] + 1);
  if (op == Program::add && place_[left] == none) std::swap(left, right);
  pin(place_[right]);
  const int a = load(left);
  pin(a);
  uses_.read(left);
  if (!is_product) uses_.read(right);
  if (place_[right] == none && is_worth_a_register(right)) pin(load(right));
  const int b = place_[right];

  pinned_.assign(pinned_.size(), false);  // the result may take an operand's place
  const int to = uses_.next(left) == never ? a : take_register();
  if (is_product) assembler.operate(is_float_ ? Assembler::vmulps : vpmulld, {to}, {a}, Constant{program.right[k]});
  else if (b != none) add(op == Program::subtract, to, a, Vector{b});
  else add(op == Program::subtract, to, a, home_[right]);
  ++counts.instructions;
  counts.loads += is_product || b == none;

  const auto result = static_cast<size_t>(program.inputs) + k + 1;
  drop(to);
  held_[static_cast<size_t>(to)] = result;
  place_[result] = to;
  store_outputs(result);
  free_slot(left);
  free_slot(right);
}

template <class Operand> void ProgramWriter::add(bool minus, int to, int a, const Operand& b) {
  if (!is_float_) return assembler.operate(minus ? Assembler::vpsubd : Assembler::vpaddd, {to}, {a}, b);
  // Additions and multiply-adds have pipes of their own on AMD.
  if (to != a || balance_ <= 0) {
    ++balance_;
    return assembler.operate(minus ? Assembler::vsubps : Assembler::vaddps, {to}, {a}, b);
  }
  --balance_;
  assembler.operate(minus ? Assembler::vfnmadd231ps : Assembler::vfmadd231ps, {to}, ones(), b);
}

// What comes from memory is kept if it is read again before something that a register holds. Zero is never there.
bool ProgramWriter::is_worth_a_register(size_t value) const {
  if (value == 0) return true;
  int64_t latest = 0;
  for (size_t r = 0; r < held_.size(); ++r)
    if (!pinned_[r]) latest = std::max(latest, next_use(r));
  return uses_.next(value) < latest;
}

// A register that is free, or is read last of all; its value goes to memory.
int ProgramWriter::take_register() {
  size_t best = nothing;
  for (size_t r = 0; r < held_.size(); ++r)
    if (!pinned_[r] && (best == nothing || next_use(r) > next_use(best))) best = r;
  const int r = static_cast<int>(best);
  if (next_use(best) != never && !has_home_[held_[best]]) {
    const size_t value = held_[best];
    if (free_slots_.empty()) free_slots_.push_back(static_cast<size_t>(counts.slots++));
    slot_[value] = free_slots_.back();
    free_slots_.pop_back();
    store(r, memory(General::rdx, slot_[value]));
    home_[value] = memory(General::rdx, slot_[value]);
    has_home_[value] = true;
  }
  drop(r);
  return r;
}

void ProgramWriter::drop(int r) {
  size_t& value = held_[static_cast<size_t>(r)];
  if (value != nothing) place_[value] = none;
  value = nothing;
}

// The register that holds a value, from now on if none does.
int ProgramWriter::load(size_t value) {
  if (place_[value] != none) return place_[value];
  const int r = take_register();
  if (value == 0) assembler.operate(Assembler::vpxord, {r}, {r}, Vector{r});
  else assembler.vmovups({r}, home_[value]);
  counts.loads += value != 0;
  ++counts.instructions;
  held_[static_cast<size_t>(r)] = value;
  return place_[value] = r;
}

void ProgramWriter::store(int r, const Address& to) {
  assembler.vmovups(to, {r});
  ++counts.stores;
  ++counts.instructions;
}

void ProgramWriter::store_outputs(size_t value) {
  for (const size_t o : outputs_of_[value]) {
    const Address to = memory(General::rsi, o);
    store(place_[value], to);
    if (!has_home_[value]) home_[value] = to;
    has_home_[value] = true;
  }
}

// The slot of a value that is not read again.
void ProgramWriter::free_slot(size_t value) {
  if (slot_[value] == nothing || uses_.next(value) != never) return;
  free_slots_.push_back(std::exchange(slot_[value], nothing));
}

ProgramCode::ProgramCode(const Program& program, DType lanes, bool avx512)
    : ProgramCode(ProgramWriter(program, lanes, avx512)) {}

ProgramCode::ProgramCode(ProgramWriter&& writer)
    : inputs_(writer.program.inputs),
      outputs_(static_cast<int64_t>(writer.program.outputs.size())),
      vector_bytes_(writer.assembler.vector_bytes()),
      lanes_(writer.lanes),
      counts_(writer.counts),
      memory_(writer.code) {}

void ProgramCode::run(const char* x, char* y, int64_t vectors) const {
  core::AlignedBuffer<char> slots(static_cast<size_t>(std::max<int64_t>(counts_.slots, 1) * vector_bytes_));
  const auto function = std::bit_cast<void (*)(const char*, char*, char*)>(memory_.data());
  for (int64_t v = 0; v < vectors; ++v)
    function(x + v * inputs_ * vector_bytes_, y + v * outputs_ * vector_bytes_, slots.data());
}

}  // namespace pycodesign::repetition
