// What the machine code of a layer computes, step by step, and what that takes; codegen_x86.cpp writes it down as
// instructions.
#pragma once

#include <cstdint>
#include <vector>

#include "repetition/codegen_x86.h"

namespace pycodesign::repetition {

inline constexpr int64_t max_group = 4;
inline constexpr int64_t max_word = 32767;

// The complement trick, for integers with levels -1 and 1: twice the sum over the rows of level 1, less the sum over
// all rows, which a chunk needs once. There are fewer patterns, single rows need no addition to be one, and half the
// terms are left. Two registers share the sum over all rows, by turns of units, so that int16 holds them as long.
inline constexpr int64_t totals = 2;

// What a pattern is made of: the levels of a few neighboring channels at one tap; or, with `columns`, the sums of the
// filter's columns in one channel.
struct CodeForm {
  int64_t group_size = 0;  // rows that a pattern adds: channels, or columns
  bool complement = false;
  bool resident = false;  // the sums of the last column stay in registers
  Columns columns{};
  int64_t segment_rows = 0;  // at most

  int64_t planes() const { return static_cast<int64_t>(columns.patterns.size()); }
  int64_t registers(const CodeLayer& l) const {  // besides those of the outputs
    return group_size + (l.dtype == DType::f32) + (complement ? totals : 0) + (resident ? planes() : 0);
  }
};

// The rows of one unit: of `width` channels at a tap, or of all columns of one channel.
struct Unit {
  int64_t channel, width, tap, index;
};

// Registers `to` and `from` hold sums of rows; row r is channel r of the unit, or sum r % planes of column r / planes
// of the filter.
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

int64_t adds_of(const Step&);
int64_t multiplies_of(const Step&);

// The form with the fewest cycles, code read from memory included. Throws std::invalid_argument if int16 cannot hold a
// product.
struct CodeEstimate {
  CodeForm form;
  double run, cold;  // cycles, as in CodeCost
};
CodeEstimate choose_form(const CodeLayer&, bool avx512);

std::vector<CodeChunk> cut_outputs(const CodeLayer&, const CodeForm&, bool avx512);
// Units of the first `channels` channels, in the order in which they are summed.
std::vector<Unit> units_of(const CodeLayer&, const CodeForm&, int64_t channels);
// Ends of the segments, in units, for all chunks alike: as few as the cache and the range of int16 allow, all about as
// long.
std::vector<size_t> cut_units(const CodeLayer&, const CodeForm&, const std::vector<Unit>&);
void append_steps(const CodeLayer&, const CodeForm&, const CodeChunk&, const Unit&, std::vector<Step>&);

}  // namespace pycodesign::repetition
