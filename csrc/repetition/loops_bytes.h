// Epilogues to bytes, and bytes between lanes and rows: loops.h and more, for the instruction sets that define, besides
// what loops.h wants,
//   minimum(a, b), maximum(a, b)                of floats, b where one is NaN
//   farther(farthest, v)                        the larger of it and the distance of v from the nearest integer
//   pack_bytes(words[4], zero_point, is_signed) plus the zero point, saturated, in order
//   copy_bytes(from, to, count)                 one byte or more
// and behind it, to call fill_bytes,
//   lift_one(b, flat, lifted), unlift_one(b, lifted, flat)   of one output
#pragma once

#include "repetition/loops.h"

namespace pycodesign::repetition {
namespace {

// Sums to bytes, four vectors at a time. Clamping and saturating are one where nothing can be NaN, as division by the
// scale keeps the order; which vectors must be divided after all (see Quantization) is asked once for the four.
struct Bytes4 {
  struct Scaling {
    f32v multiplier{}, bias{};
    u32v correction{};
  };
  Scaling scaling[4];  // of all vectors the first, or of each its own
  f32v residual_scale, residual_zero, scale, reciprocal, lo, hi;
  float largest_residual;
  short zero_point;
  bool is_signed, clamps, limited;

  static float magnitude(float x) { return x < 0 ? -x : x; }

  // Of any output.
  explicit Bytes4(const Epilogue& e) {
    is_signed = e.out_dtype == DType::i8;
    const float lowest = static_cast<float>((is_signed ? -128 : 0) - e.out_zero_point);
    residual_scale = Float::splat(e.residual_scale);
    residual_zero = Float::splat(e.residual_zero_point);
    scale = Float::splat(e.out_scale);
    reciprocal = Float::splat(1 / e.out_scale);
    const float from = e.has_lo ? e.lo / e.out_scale : lowest, to = e.has_hi ? e.hi / e.out_scale : lowest + 255;
    lo = Float::splat(from > lowest ? from < lowest + 255 ? from : lowest + 255 : lowest);
    hi = Float::splat(to < lowest + 255 ? to > lowest ? to : lowest : lowest + 255);
    clamps = from > lowest || to < lowest + 255;
    zero_point = static_cast<short>(e.out_zero_point);
    largest_residual = e.has_residual ? magnitude(e.residual_scale) * (256 + magnitude(e.residual_zero_point)) : 0;
  }

  // The largest magnitude; NaN where one is.
  static float largest(const float* p, int64_t count) {
    uint32_t bits = 0;
    for (int64_t i = 0; p && i < count; ++i) {
      uint32_t here;
      std::memcpy(&here, p + i, 4);
      here &= 0x7fffffff;
      bits = bits > here ? bits : here;
    }
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  // Without clamping, conversions to shorter integers saturate, if nothing leaves int32 before.
  bool exceeds(const Finish& f, int64_t count) const {
    const float most = 2147483648.0f * largest(f.multiplier, count) + largest(f.bias, count) + largest_residual;
    return !(most < 1e9f * f.epilogue->out_scale);
  }
  void take(const Finish& f) {  // of its first output
    scaling[0] = {Float::splat(*f.multiplier), Float::splat(f.bias ? *f.bias : 0),
                  splat_bits(f.correction ? static_cast<uint32_t>(*f.correction) : 0)};
    limited = clamps || exceeds(f, 1);
  }
  void take(const Finish& f, int64_t first, int64_t count) {  // of elements that have their own
    limited = clamps || exceeds(f, f.count);
    for (int64_t i = 0; i < 4; ++i, first += lanes, count -= lanes) {
      const auto bytes = static_cast<size_t>(count < 0 ? 0 : count < lanes ? count : lanes) * 4;
      scaling[i] = {};
      if (bytes == 0) continue;
      std::memcpy(&scaling[i].multiplier, f.multiplier + first, bytes);
      if (f.bias) std::memcpy(&scaling[i].bias, f.bias + first, bytes);
      if (f.correction) std::memcpy(&scaling[i].correction, f.correction + first, bytes);
    }
  }

  // Where no step can overflow to infinity, nor a scale's reciprocal be less than normal.
  static bool serve(const Finish& f) {
    const Epilogue& e = *f.epilogue;
    const auto moderate = [](float x) { return x > -1e20f && x < 1e20f; };
    const auto bound = [](bool has, float x) { return !has || x == x; };
    const int64_t count = f.per_element ? f.count : f.outputs;
    return moderate(largest(f.multiplier, count)) && moderate(largest(f.bias, count)) && moderate(e.residual_scale) &&
           moderate(e.residual_zero_point) && e.out_scale > 1e-10f && e.out_scale < 1e10f && bound(e.has_lo, e.lo) &&
           bound(e.has_hi, e.hi) && !(e.has_lo && e.has_hi && e.lo > e.hi);
  }

  template <class Residual> f32v value(const char* acc, const Scaling& s, const char* residual) const {
    u32v sum;
    std::memcpy(&sum, acc, sizeof sum);
    const f32v y = __builtin_convertvector(reinterpret_cast<i32v>(sum + s.correction), f32v) * s.multiplier + s.bias;
    if constexpr (std::is_void_v<Residual>) return y;
    else return y + residual_scale * (load_residual<Residual>(residual) - residual_zero);
  }
  template <bool limited> f32v limit(f32v v) const { return limited ? minimum(maximum(v, lo), hi) : v; }

  // acc: of four vectors; residual: side by side, as the result.
  template <class Residual, bool limited, bool each = false>
  auto operator()(const char* const* acc, const char* residual) const {
    f32v y[4], v[4], farthest{};
    for (int i = 0; i < 4; ++i) {
      y[i] = value<Residual>(acc[i], scaling[each ? i : 0], residual + i * size_of<Residual> * lanes);
      v[i] = limit<limited>(y[i] * reciprocal);
      farthest = farther(farthest, v[i]);
    }
    if (__builtin_expect(any_beyond(farthest, 0.4999f), 0))
      for (int i = 0; i < 4; ++i) v[i] = limit<limited>(y[i] / scale);
    const i32v words[4] = {round_words(v[0]), round_words(v[1]), round_words(v[2]), round_words(v[3])};
    return pack_bytes(words, zero_point, is_signed);
  }
};

template <class Residual, bool limited> void finish_four(const Bytes4& finish4, Finish f) {
  const int64_t run = f.run ? f.run * 4 : vector_bytes, stride = f.run ? f.run_stride : vector_bytes;
  const char* acc[4];
  int64_t at = 0;  // within a run
  const auto next = [&] {
    const char* here = f.acc + at;
    at += vector_bytes;
    if (at == run) at = 0, f.acc += stride;
    return here;
  };
  for (; f.count >= 4 * lanes; f.count -= 4 * lanes, f.out += 4 * lanes) {
    for (const char*& vector : acc) vector = next();
    const auto bytes = finish4.template operator()<Residual, limited>(acc, f.residual);
    std::memcpy(f.out, &bytes, sizeof bytes);
    if constexpr (!std::is_void_v<Residual>) f.residual += 4 * lanes;
  }
  if (f.count == 0) return;
  // Fewer vectors than four: the first in place of those that are missing.
  for (int64_t i = 0; i < 4; ++i) acc[i] = i * lanes < f.count ? next() : acc[0];
  alignas(64) char residual[4 * lanes];
  if constexpr (!std::is_void_v<Residual>) copy_bytes(f.residual, residual, f.count);
  alignas(64) const auto bytes = finish4.template operator()<Residual, limited>(acc, residual);
  copy_bytes(reinterpret_cast<const char*>(&bytes), f.out, f.count);
}

// Elements [first, first + count) of all outputs.
template <class Residual, bool limited>
void finish_columns(const Bytes4& finish4, const Finish& f, int64_t first, int64_t count) {
  const char *at = f.acc + first * 4, *residual = f.residual + first * size_of<Residual>;
  char* out = f.out + first;
  for (int64_t o = 0; o < f.outputs; ++o, at += f.acc_step, out += f.out_step) {
    const char* acc[4];  // the first in place of those that are missing
    for (int64_t i = 0; i < 4; ++i) acc[i] = at + (i * lanes < count ? i * vector_bytes : 0);
    alignas(64) char tail[4 * lanes];
    const char* added = residual;
    if constexpr (!std::is_void_v<Residual>) {
      if (count < 4 * lanes) copy_bytes(residual, tail, count), added = tail;
      residual += f.residual_step;
    }
    alignas(64) const auto bytes = finish4.template operator()<Residual, limited, true>(acc, added);
    if (count == 4 * lanes) std::memcpy(out, &bytes, sizeof bytes);
    else copy_bytes(reinterpret_cast<const char*>(&bytes), out, count);
  }
}

template <class Residual> void finish_bytes(Finish f) {
  Bytes4 finish4(*f.epilogue);
  if (f.per_element) {
    for (int64_t i = 0; i < f.count; i += 4 * lanes) {
      const int64_t count = f.count - i < 4 * lanes ? f.count - i : 4 * lanes;
      finish4.take(f, i, count);
      (finish4.limited ? finish_columns<Residual, true> : finish_columns<Residual, false>)(finish4, f, i, count);
    }
    return;
  }
  for (int64_t o = 0; o < f.outputs; ++o, f.next_output()) {
    finish4.take(f);
    finish4.limited ? finish_four<Residual, true>(finish4, f) : finish_four<Residual, false>(finish4, f);
  }
}

void finish_or_bytes(const Finish& f) {
  const Epilogue& e = *f.epilogue;
  const bool bytes = e.acc_dtype == DType::i32 && (e.out_dtype == DType::u8 || e.out_dtype == DType::i8) &&
                     f.out_stride == 1 && f.run % lanes == 0 && Bytes4::serve(f);
  if (bytes && !e.has_residual) return finish_bytes<void>(f);
  if (bytes && e.residual_dtype != DType::f32 && f.residual_stride == 1)
    return e.residual_dtype == DType::u8 ? finish_bytes<uint8_t>(f) : finish_bytes<int8_t>(f);
  finish(f);
}

void lift_one(const ByteRows&, const char* flat, char* lifted);
void unlift_one(const ByteRows&, const char* lifted, char* flat);

template <class Copy> void for_rows(const ByteRows& b, Copy copy) {
  if (b.columns == 0) return;
  char *flat = b.flat, *data = b.data;
  for (int64_t o = 0; o < b.outputs; ++o, flat += b.lanes * b.segment, data += b.data_step)
    for (int64_t n = 0; n < b.images; ++n)
      for (int64_t r = 0; r < b.rows; ++r)
        copy(flat + n * b.image_pitch + r * b.row_pitch, data + n * b.stride_n + r * b.stride_h);
}

// Ascending: what an output writes past its end is then overwritten by its owner. Loads that follow stores of other
// widths wait for them, so each step is done for all outputs.
void lift_bytes(const ByteRows& b) {
  for_rows(b, [&](char* flat, const char* row) { copy_bytes(row, flat, b.columns); });
  for (int64_t o = 0; o < b.outputs; ++o) lift_one(b, b.flat + o * b.lanes * b.segment, b.lifted + o * b.lifted_step);
}
void unlift_bytes(const ByteRows& b) {
  for (int64_t o = 0; o < b.outputs; ++o) unlift_one(b, b.lifted + o * b.lifted_step, b.flat + o * b.lanes * b.segment);
  for_rows(b, [&](const char* flat, char* row) { copy_bytes(flat, row, b.columns); });
}

void fill_bytes(Kernels& k) {
  k.finish = finish_or_bytes;
  k.lift_bytes = lift_bytes;
  k.unlift_bytes = unlift_bytes;
}

}  // namespace
}  // namespace pycodesign::repetition
