// What the cost models of this family know of the machine; internal to it.
#pragma once

#include <cstdint>

#include "repetition/repetition.h"

namespace pycodesign::repetition {

// Of one core, for vectors of 64 bytes (two of AVX2).
struct Costs {
  double instructions;          // of straight-line code, a cycle
  double loads;                 // vectors a cycle
  double store;                 // cycles of a vector
  double keep_f32, keep_words;  // cycles to load and store one sum of a segment; int16 widened to int32
  double call;                  // cycles to begin a segment
  double memory;                // bytes of weights or code a cycle, from memory
  double multiply_add, dot4;    // cycles of the products of `dense`
  bool drops_prefetches;        // of code, while sums of columns of integers are added (README.md)
};
// Of this processor, for AVX-512 or AVX2 (at `avx2`, dot4 is many instructions).
const Costs& costs(bool avx512);

// Steps that a run of dense_narrow is likely to have; less than 1: sums need 32 bits, or the kernels have no other.
double narrow_run(const Weights&, const Activations&);

// Per vector of pixels; `finish`: of a sum of each output.
double dense_cycles(int64_t outputs, int64_t inputs, const Activations&, double narrow_run, double finish = 4);
inline constexpr double row_finish = 2;  // by rows of channels, whose results stay such rows

// Pixels that a layer is likely to have, before any were seen: the maps of common networks halve where channels double.
double likely_pixels(int64_t outputs);

}  // namespace pycodesign::repetition
