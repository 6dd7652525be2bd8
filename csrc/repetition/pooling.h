// Pooling of plain maps and of pixels of channels (channels last), as a chain runs it.
#pragma once

#include <array>

#include "repetition/repetition.h"

namespace pycodesign::repetition {

// Windows of a pooling; kernel 0: the whole image.
struct Pool {
  std::array<int64_t, 2> kernel{}, stride{1, 1}, padding{}, dilation{1, 1};
  bool counts_padding = true;  // in the mean

  int64_t output_size(size_t axis, int64_t size) const;
  // Whether windows share so much that their columns should be pooled first, which only plain maps do.
  bool overlaps_much() const { return kernel[0] * kernel[1] > 9 * stride[0] * stride[1]; }
};

// Both plain, the elements of an image one after another (of x all images'), or both channels last.
void max_pool2d(const Kernels&, const Pool&, DType, const Tensor& x, const Tensor& out);

struct AvgPool {
  Pool window;
  double scale;  // integers of x mean scale * (x - zero_point)
  int32_t zero_point;
};
// Both plain, as before, or x channels last and `out` of any strides.
void avg_pool2d(const Kernels&, const AvgPool&, DType, const Tensor& x, const Tensor& out, const Epilogue&);

}  // namespace pycodesign::repetition
