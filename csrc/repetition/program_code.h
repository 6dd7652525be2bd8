// Straight-line machine code of a program of sums (pycodesign/repetition/program.py), for AVX-512 or AVX2. Lanes are
// pixels.
//
// Each instruction is computed just before it is first needed. Its result stays in a register as long as none that is
// needed sooner wants the place, then in memory.
#pragma once

#include <cstdint>
#include <span>

#include "core/executable_memory.h"
#include "repetition/repetition.h"

namespace pycodesign::repetition {

// Value v is input v, or the result of instruction v - inputs, or zero. Instruction k reads only values before it.
struct Program {
  enum Operation : uint8_t { add, subtract, multiply };  // multiply: left times constants[right]
  static constexpr int32_t zero = -1;

  int32_t inputs;
  std::span<const uint8_t> op;
  std::span<const int32_t> left, right, outputs;  // outputs: values
  std::span<const double> constants;              // integers for i32
};

struct ProgramCounts {
  int64_t operations = 0;    // of the program, but those that no output needs
  int64_t instructions = 0;  // loads that are instructions of their own, and stores, included
  int64_t loads = 0;         // operands in memory included
  int64_t stores = 0;
  int64_t slots = 0;  // vectors of memory for values
};

class ProgramCode {
 public:
  // Lanes are f32 or i32, modulo 2^32. Throws std::runtime_error if memory cannot be made executable.
  ProgramCode(const Program&, DType lanes, bool avx512);

  // x: [vector][input], y: [vector][output], of vectors of vector_bytes().
  void run(const char* x, char* y, int64_t vectors) const;

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }
  DType lanes() const { return lanes_; }
  int64_t vector_bytes() const { return vector_bytes_; }
  const ProgramCounts& counts() const { return counts_; }
  std::span<const char> code() const { return {memory_.data(), memory_.size()}; }  // with its constants

 private:
  explicit ProgramCode(struct ProgramWriter&&);

  int64_t inputs_, outputs_, vector_bytes_;
  DType lanes_;
  ProgramCounts counts_;
  core::ExecutableMemory memory_;
};

}  // namespace pycodesign::repetition
