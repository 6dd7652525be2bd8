// What an instruction set may do better: elements of four bytes, four source rows at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycodesign::growth {

struct Kernels {
  // Copies whole cache lines past the caches; `to` begins at one.
  void (*stream)(char* to, const char* from, size_t lines);
  void (*finish_streams)();
  // quads[4 i + l] = rows[l][i]; returns how many i it did.
  int64_t (*interleave)(const float* const* rows, int64_t n, float* quads);
  // result[l n + i] = quads[4 sources[i] + l] * scale[i], bit by bit where scale is null; returns how many i it did.
  int64_t (*gather)(const float* quads, const int32_t* sources, const float* scale, int64_t n, float* result);
};

// avx2 overwrites what it improves; scalar fills everything.
void fill_scalar(Kernels&);
void fill_avx2(Kernels&);

const Kernels& kernels();  // of the active instruction set

}  // namespace pycodesign::growth
