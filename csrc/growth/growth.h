// Larger weights from smaller ones: rows and columns copied by index, scaled on the way.
#pragma once

#include <array>
#include <cstdint>

namespace pycodesign::growth {

// bytesN: elements of N bytes that are copied, whatever they hold.
enum class DType { bytes1, bytes2, bytes4, bytes8, f16, bf16, f32, f64 };

// out[r, c, ...] = (w[out_index[r], in_index[c], ...] * in_scale[c]) * out_scale[r], and zeros where an index is -1.
struct Expansion {
  DType dtype;
  const char* w;
  std::array<int64_t, 4> shape, stride;  // of w; strides in bytes, of any sign
  const int64_t* out_index;              // (rows)
  int64_t rows;
  const int64_t* in_index;  // (columns); null: every column of w in its place
  int64_t columns;
  const void *in_scale, *out_scale;  // finite doubles for f64, floats for the other floats; null: 1
  char* out;                         // (rows, columns, shape[2], shape[3]), apart from everything else
  int64_t row_stride;                // in bytes; within a row elements follow one another
};

// 16-bit floats are multiplied in float32 and rounded once. Scales with bytesN are not allowed.
// Throws std::invalid_argument, before anything is written, for an index that is neither -1 nor in w.
void expand(const Expansion& x);

}  // namespace pycodesign::growth
