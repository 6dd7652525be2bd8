// Straight-line machine code for the sums of one convolution layer, for AVX-512 or AVX2: weights are the instructions.
//
// The accumulators of up to 31 outputs stay in registers. Patterns of a few neighboring channels' levels, a + b or a -
// b, are summed once, in registers too, and added to every output that has them.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "core/executable_memory.h"
#include "repetition/repetition.h"

namespace pycodesign::repetition {

struct CodeLayer {
  const Weights* weights;  // borrowed while generating; input i of a group is channel i / taps, tap i % taps
  const Geometry& geometry;
  DType dtype;    // f32: lanes are floats; u8, i8: int16
  int64_t range;  // integers: largest |x| in a staged plane

  int64_t channels() const { return geometry.channels / geometry.groups; }  // of one group
  int64_t taps() const { return geometry.kernel[0] * geometry.kernel[1]; }
};

// Where all levels are -1, 0 or 1, code may add whole columns of filters in place of single inputs: staging makes the
// sums of the rows of every column that occurs, up to sign, for each channel, side by side for each vector.
inline constexpr int64_t max_column_rows = 3, max_columns = 3;
using ColumnPattern = std::array<int8_t, max_column_rows>;  // the first level that is not zero is 1
// Of the levels -1, 0 and 1 of `rows` rows, or of the first ones; and whether their signs were turned.
template <class Level> ColumnPattern column_pattern(int64_t rows, Level level, bool& minus) {
  ColumnPattern p{};
  int sign = 0;
  for (size_t r = 0; r < std::min(p.size(), static_cast<size_t>(rows)); ++r) {
    const auto value = static_cast<int>(level(static_cast<int64_t>(r)));
    if (sign == 0) sign = value;
    p[r] = static_cast<int8_t>(value * sign);
  }
  minus = sign < 0;
  return p;
}
struct Columns {
  std::vector<ColumnPattern> patterns;  // ascending; none: code reads the planes of the input
};
// The columns of a filter read sums of one phase of the stride, and there a vector some positions on.
struct ColumnTap {
  int phase;
  int64_t shift;
};
std::vector<ColumnTap> column_taps(const Geometry&);
int64_t phase_reach(const std::vector<ColumnTap>&, int phase);  // the largest shift

// One function. Vectors are 64 bytes (AVX-512) or 32 (AVX2); of integers, 32 bits hold two pixels.
//   x: staged plane of channel `channel`, at one vector; channel c and tap t of the group are read at
//      x + (c - channel) * channel_stride + tap_source[t]
//      With columns: pattern i of column s, the sums of whose phase begin at tap_source[phase], at
//      x + (c - channel) * channel_stride + tap_source[phase] + (shift * patterns + i) * vector bytes
//   acc: f32: a vector for each output of the chunk; integers: two vectors of int32, the low halves of the words and
//      the high ones. The first segment of a chunk overwrites them, the others add.
//   prefetch: touches the lines prefetch + 64 k, k < prefetch_lines: as many as the segment itself has, about, and at
//      most max_touched_bytes, all of which must be readable
using SegmentFunction = void (*)(const char* x, char* acc, const char* prefetch, int64_t channel_stride,
                                 const int64_t* tap_source);

inline constexpr int64_t max_touched_bytes = 64 << 10;  // so many behind the code are

struct CodeSegment {
  int64_t begin, end;         // bytes of the code
  int64_t channel, channels;  // what it reads of its group
  int64_t prefetch_lines;
};

// Outputs whose accumulators share the registers; its segments run one after another.
struct CodeChunk {
  int64_t group, first_output, outputs;  // first_output: of the layer
  std::vector<CodeSegment> segments;
};

class LayerCode {
 public:
  // Throws std::invalid_argument if int16 cannot hold a product, std::runtime_error if memory cannot be made
  // executable.
  LayerCode(const CodeLayer&, bool avx512);

  const std::vector<CodeChunk>& chunks() const { return chunks_; }
  SegmentFunction function(const CodeSegment& s) const { return std::bit_cast<SegmentFunction>(address(s)); }
  const char* address(const CodeSegment& s) const { return memory_.data() + s.begin; }

  std::span<const char> code() const { return {memory_.data(), memory_.size()}; }  // with its constants
  int64_t bytes() const { return static_cast<int64_t>(memory_.size()); }
  int64_t group_size() const { return group_size_; }  // channels, or columns, of a pattern
  const Columns& columns() const { return columns_; }
  int64_t adds() const { return adds_; }  // vector instructions per vector of pixels
  int64_t multiplies() const { return multiplies_; }

 private:
  LayerCode(struct Generator&&);

  std::vector<CodeChunk> chunks_;
  int64_t group_size_, adds_, multiplies_;
  Columns columns_;
  core::ExecutableMemory memory_;
};

// Predicted cycles for 64 bytes of every plane (16 floats or 32 integers), from a sample of the weights; infinite if
// LayerCode would throw std::invalid_argument. To run the code, and with its share of reading the code from memory.
struct CodeCost {
  double run, cold;
};
CodeCost code_cost(const CodeLayer&, bool avx512);

}  // namespace pycodesign::repetition
