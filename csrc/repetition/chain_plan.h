// What a chain decides once for each set of input sizes; internal to this family.
#pragma once

#include "repetition/chain.h"

namespace pycodesign::repetition {

struct ChainPlan {
  const Kernels& kernels;  // those in force when the call began
  std::vector<Chain::Shape> shape;
  std::vector<Chain::Layout> layout;
  std::vector<int64_t> elements;  // as stored: lanes that hold no pixel, or what lies behind its channels, too
  std::vector<size_t> at;         // bytes within the arena
  size_t bytes = 0;
  std::vector<const PackedConv2d*> layer;             // of each step: what runs
  std::vector<std::shared_ptr<const ConvPlan>> conv;  // null: nothing to compute

  bool has(int value, Chain::Layout l) const { return layout[static_cast<size_t>(value)] == l; }
};

inline int64_t count(const Chain::Shape& s) { return s[0] * s[1] * s[2] * s[3]; }

// Elements one after another.
inline Tensor contiguous(char* data, const Chain::Shape& s, DType dtype) {
  const int64_t e = element_bytes(dtype);
  return {data, s, {s[1] * s[2] * s[3] * e, s[2] * s[3] * e, s[3] * e, e}};
}

// Channels side by side, each pixel a row of whole cache lines.
inline Tensor pixel_rows(char* data, const Chain::Shape& s, DType dtype) {
  const int64_t e = element_bytes(dtype), row = (s[1] * e + 63) / 64 * 64;
  return {data, s, {s[2] * s[3] * row, e, s[3] * row, row}};
}

std::shared_ptr<const ChainPlan> plan_chain(const Chain&, const Kernels&, const std::vector<Chain::Shape>& inputs);

}  // namespace pycodesign::repetition
