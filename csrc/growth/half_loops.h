// Loops over 16-bit floats, compiled in the file of each instruction set, which makes them kernels.
#pragma once

#include "core/half.h"
#include "growth/kernels.h"

namespace pycodesign::growth {
namespace {

struct AsFloat16 {
  [[gnu::always_inline]] static float load(uint16_t bits) { return core::from_float16(bits); }
  [[gnu::always_inline]] static uint16_t store(float value) { return core::to_float16(value); }
};
struct AsBFloat16 {
  [[gnu::always_inline]] static float load(uint16_t bits) { return core::from_bfloat16(bits); }
  [[gnu::always_inline]] static uint16_t store(float value) { return core::to_bfloat16(value); }
};

template <class E> void widen(const uint16_t* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = E::load(from[i]);
}

template <class E> void scale(const float* __restrict from, float factor, int64_t n, uint16_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = E::store(from[i] * factor);
}

template <class E>
void scale_each(const float* __restrict from, const float* __restrict factors, int64_t n, uint16_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = E::store(from[i] * factors[i]);
}

template <class E> constexpr HalfKernels half_kernels{widen<E>, scale<E>, scale_each<E>};

}  // namespace
}  // namespace pycodesign::growth
