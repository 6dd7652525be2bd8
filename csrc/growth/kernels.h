// What an instruction set may do better: elements of four bytes, four source rows at once, and 16-bit floats.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycodesign::growth {

// 16-bit floats of one kind. A product is rounded once.
struct HalfKernels {
  void (*widen)(const uint16_t* from, int64_t n, float* to);
  void (*scale)(const float* from, float factor, int64_t n, uint16_t* to);
  void (*scale_each)(const float* from, const float* factors, int64_t n, uint16_t* to);
};

struct Kernels {
  // Copies whole cache lines past the caches; `to` begins at one.
  void (*stream)(char* to, const char* from, size_t lines);
  void (*finish_streams)();
  // quads[4 i + l] = rows[l][i]; returns how many i it did.
  int64_t (*interleave)(const float* const* rows, int64_t n, float* quads);
  // result[l n + i] = quads[4 sources[i] + l] * scale[i], bit by bit where scale is null; returns how many i it did.
  int64_t (*gather)(const float* quads, const int32_t* sources, const float* scale, int64_t n, float* result);
  HalfKernels f16, bf16;
};

// avx2 overwrites what it improves; scalar fills everything.
void fill_scalar(Kernels&);
void fill_avx2(Kernels&);

const Kernels& kernels();  // of the active instruction set

}  // namespace pycodesign::growth
