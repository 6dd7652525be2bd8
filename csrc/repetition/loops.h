// The loops of all kernels, written once over a vector type. The file of each instruction set defines, in an unnamed
// namespace of pycodesign::repetition,
//   f32v, i32v, u32v                            vectors of `lanes` words
//   fma(a, b, c), dot4(acc, x_u8x4, w_i8x4)     a * b + c; sums of four products, modulo 2^32
//   Lookup, load_lookup(p), look_up(t, index)   32 floats by the low five bits
//   high_half(v), shift_half(v, bits)           each word's upper 16 bits; its lower 16 >> bits, above them any
//   Levels, load_levels(p), levels_of(l, codes) 16 bytes by code, for each byte
//   widen_bytes(p), widen_halves(p)             to words
//   any_beyond(v, limit)                        whether the magnitude of a lane is larger
//   round_words(v)                              floats to the nearest word, halves to the even one
//   transpose(from, stride, rows, to, stride, rows)   lanes x lanes words, or only their first rows
// and how many vectors its registers hold: max_table_vectors, max_dense_vectors, dense_block, linear_rows,
// linear_vectors, packed_rows; whether generates_code; then includes this file. Everything here has internal linkage:
// no other file may share its code.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

namespace pycodesign::repetition {
namespace {

inline u32v splat_bits(uint32_t value) { return value - u32v{}; }

// The arithmetic of a kernel: float, 32-bit integers, or 8-bit integers four to a word. (Types that may alias lose that
// as template arguments, so kernels are templates over these.)
struct Float {
  using vec = f32v;
  static vec load(const void* p) { return *static_cast<const vec*>(p); }
  static void store(void* p, vec v) { *static_cast<vec*>(p) = v; }
  static vec splat(float value) { return value - vec{}; }  // exact for -0 and NaN too
  static vec broadcast(const char* p) { return splat(*reinterpret_cast<const float*>(p)); }
  static vec multiply_add(vec acc, vec x, vec w) { return fma(x, w, acc); }
  static float coefficient(const TableStep& step) { return step.coefficient.f; }
  // Plus or minus an entry, by the top bit of its code.
  template <class Code> static vec sign(uint32_t code) {
    constexpr int top = 8 * sizeof(Code) - 1;
    return reinterpret_cast<vec>(splat_bits(0x3f800000u | (code >> top) << 31));
  }
  static vec add_entry(vec acc, vec entry, vec sign) { return fma(entry, sign, acc); }
};
struct Int {
  using vec = i32v;
  static vec load(const void* p) { return *static_cast<const vec*>(p); }
  static void store(void* p, vec v) { *static_cast<vec*>(p) = v; }
  static vec splat(int32_t value) { return value - vec{}; }
  static vec broadcast(const char* p) { return splat(*reinterpret_cast<const int32_t*>(p)); }
  // Modulo 2^32: entries that nothing reads are built from whatever lies there.
  static vec multiply_add(vec acc, vec x, vec w) { return reinterpret_cast<vec>(u32v(acc) + u32v(x) * u32v(w)); }
  static int32_t coefficient(const TableStep& step) { return step.coefficient.i; }
  template <class Code> static vec sign(uint32_t code) {
    return splat(-static_cast<int32_t>(code >> (8 * sizeof(Code) - 1)));
  }
  static vec add_entry(vec acc, vec entry, vec sign) {
    return reinterpret_cast<vec>(u32v(acc) + u32v(entry ^ sign));
  }  // one too little when negative
};
struct Byte : Int {
  static vec multiply_add(vec acc, vec x, vec w) { return dot4(acc, x, w); }
};

constexpr int64_t vector_bytes = lanes * 4;
typedef uint16_t u16v __attribute__((vector_size(lanes * 4), may_alias));
typedef uint8_t bytesv __attribute__((vector_size(lanes), may_alias));

// Into the second-level cache, two pages ahead: hardware prefetchers stop at pages, and misses of the first level are
// too few at a time to cover memory's latency.
template <int64_t bytes> inline void prefetch(const char* p) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + 8192 + at, 0, 2);
}

// Elements `stride` bytes apart, one after another; strides of one and two elements are constants, so that they
// vectorize.
template <class T, class Put> inline void for_elements(const char* source, int64_t stride, int64_t count, Put put) {
  const T* p = reinterpret_cast<const T*>(source);
  if (stride == sizeof(T))
    for (int64_t i = 0; i < count; ++i) put(i, p[i]);
  else if (stride == 2 * sizeof(T))
    for (int64_t i = 0; i < count; ++i) put(i, p[2 * i]);
  else
    for (int64_t i = 0; i < count; ++i) put(i, *reinterpret_cast<const T*>(source + i * stride));
}

// `lanes` bytes `step` apart, each a word. Of two bytes read per element `high` drops the first: such a read ends with
// the last element.
template <int step, bool high> inline u32v widen(const uint8_t* p) {
  if constexpr (step == 1) return widen_bytes(p);
  else if constexpr (high) return widen_halves(p - 1) >> 8;
  else return widen_halves(p) & 0xff;
}

template <int step, bool high>
inline void interleave(const uint8_t* const* p, int64_t at, uint32_t flip, uint32_t* out) {
  u32v words = widen<step, high>(p[0] + at * step) ^ flip;
  for (int c = 1; c < 4; ++c) words ^= widen<step, high>(p[c] + at * step) << (8 * c);
  std::memcpy(out + at, &words, sizeof words);
}

// Four channels of bytes into words; `step` 0 is any stride.
template <int step>
void interleave_row(const uint8_t* const* p, int64_t stride, int64_t count, uint32_t flip, uint32_t* out) {
  if constexpr (step > 0)
    if (count > lanes) {
      for (int64_t i = 0; i + lanes < count; i += lanes) interleave<step, false>(p, i, flip, out);
      return interleave<step, true>(p, count - lanes, flip, out);
    }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * stride;
    out[i] =
        (uint32_t(p[0][at]) | uint32_t(p[1][at]) << 8 | uint32_t(p[2][at]) << 16 | uint32_t(p[3][at]) << 24) ^ flip;
  }
}

void stage_row(const Stage& s, const char* const* source, uint32_t flip, uint32_t* row) {
  const int64_t stride = s.stride_w, count = s.columns.data;
  const auto* bytes = reinterpret_cast<const uint8_t* const*>(source);
  const auto center = [=](int64_t i, int32_t x) { row[i] = static_cast<uint32_t>(x - s.center); };
  switch (s.staging) {
    case Staging::f32:
      if (stride == 4) return static_cast<void>(std::memcpy(row, source[0], static_cast<size_t>(count) * 4));
      return for_elements<uint32_t>(source[0], stride, count, [=](int64_t i, uint32_t x) { row[i] = x; });
    case Staging::centered_i32:
      if (s.dtype == DType::u8) return for_elements<uint8_t>(source[0], stride, count, center);
      return for_elements<int8_t>(source[0], stride, count, center);
    case Staging::bytes4:
    case Staging::halves_i16:
      if (stride == 1) return interleave_row<1>(bytes, stride, count, flip, row);
      if (stride == 2) return interleave_row<2>(bytes, stride, count, flip, row);
      return interleave_row<0>(bytes, stride, count, flip, row);
  }
}

// Blocks of words of four bytes, at some position and `half` behind it, to a plane of 16-bit pairs for each channel.
void split_halves(const Stage& s, int64_t position, int64_t at, int64_t count) {
  u32v low[lanes], high[lanes];
  const char* from = s.flat + position * 4;
  transpose(from, s.segment * 4, lanes, reinterpret_cast<char*>(low), vector_bytes, count);
  transpose(from + s.half * 4, s.segment * 4, lanes, reinterpret_cast<char*>(high), vector_bytes, count);
  const u16v center = static_cast<uint16_t>(s.center + (s.dtype == DType::i8 ? 128 : 0)) - u16v{};
  for (int64_t i = 0; i < count && i < lanes; ++i)
    for (int c = 0; c < s.channels; ++c) {
      const u32v pairs = (low[i] >> 8 * c & 0xff) | (high[i] >> 8 * c & 0xff) << 16;
      u16v* to = reinterpret_cast<u16v*>(s.lifted + c * s.channel_stride + (at + i) * vector_bytes);
      *to = reinterpret_cast<u16v>(pairs) - center;
    }
}

void stage(const Stage& s) {
  const bool halves = s.staging == Staging::halves_i16, bytes = halves || s.staging == Staging::bytes4;
  const uint32_t flip = s.dtype == DType::i8 ? 0x80808080u : 0u;
  const uint32_t padding = bytes ? (static_cast<uint32_t>(s.zero_point) & 0xff) * 0x01010101u ^ flip : 0;
  uint32_t* flat = reinterpret_cast<uint32_t*>(s.flat);
  for (int64_t i = 0; i < s.positions + s.half; ++i) flat[i] = padding;

  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t r = 0; r < s.rows.data; ++r) {
      uint32_t* row = flat + n * s.image_pitch + (s.rows.lead + r) * s.row_pitch + s.columns.lead;
      const char* p[4];
      for (int c = 0; c < 4; ++c) p[c] = s.source[c < s.channels ? c : 0] + n * s.stride_n + r * s.stride_h;
      stage_row(s, p, flip, row);
    }

  for (int i = 0; i < s.span_count; ++i) {  // vectors side by side
    const Span& span = s.spans[i];
    for (int64_t j = 0; j < span.count; j += lanes)
      if (halves) split_halves(s, span.first + j, span.at + j, span.count - j);
      else
        transpose(s.flat + (span.first + j) * 4, s.segment * 4, lanes, s.lifted + (span.at + j) * vector_bytes,
                  vector_bytes, span.count - j);
  }
}

// What `to(vector, lane, channel)` makes of the elements of other bands' rows.
template <class T, class Put> void put_halos(const Restage& s, Put put) {
  const int64_t step = lanes * (s.staging == Staging::halves_i16 ? 2 : 1);
  for (int64_t i = 0; i < s.halo_count; ++i) {
    const Halo& halo = s.halos[i];
    for (int c = 0; c < s.channels; ++c) {
      const T* source = reinterpret_cast<const T*>(s.data) + s.data_channels * halo.before +
                        (s.first_channel + c) * halo.step + halo.source;
      for (int64_t k = 0; k < halo.count; ++k) put((halo.vector + k) * vector_bytes, halo.lane, c, source[k * step]);
    }
  }
}

template <class Vector> void restage_vectors(const Restage& s, char* lifted, u32v padding, Vector vector) {
  for (int64_t v = 0; v < s.vectors; ++v) {
    const u32v mask = *reinterpret_cast<const u32v*>(s.mask + v * vector_bytes);
    *reinterpret_cast<u32v*>(lifted + v * vector_bytes) = ((vector(s.first[v]) ^ padding) & mask) ^ padding;
  }
}

void restage(const Restage& s) {
  const auto word = [](const char* p) -> uint32_t& { return *reinterpret_cast<uint32_t*>(const_cast<char*>(p)); };
  const uint32_t flip = s.dtype == DType::i8 ? 0x80 : 0;
  const uint32_t center = static_cast<uint32_t>(s.center) + flip, zero_point = static_cast<uint32_t>(s.zero_point);
  const auto* const* bytes = reinterpret_cast<const uint8_t* const*>(s.source);
  switch (s.staging) {
    case Staging::f32:
      restage_vectors(s, s.lifted, u32v{}, [&](int64_t at) {
        u32v x;
        std::memcpy(&x, s.source[0] + at * 4, sizeof x);
        return x;
      });
      return put_halos<uint32_t>(s, [&](int64_t at, int lane, int, uint32_t x) { word(s.lifted + at + lane * 4) = x; });
    case Staging::centered_i32:
      restage_vectors(s, s.lifted, splat_bits(zero_point - static_cast<uint32_t>(s.center)),
                      [&](int64_t at) { return (widen_bytes(bytes[0] + at) ^ flip) - center; });
      return put_halos<uint8_t>(
          s, [&](int64_t at, int lane, int, uint32_t x) { word(s.lifted + at + lane * 4) = (x ^ flip) - center; });
    case Staging::bytes4:
      restage_vectors(s, s.lifted, splat_bits(((zero_point & 0xff) ^ flip) * 0x01010101u), [&](int64_t at) {
        u32v words = widen_bytes(bytes[0] + at);
        for (int c = 1; c < s.channels; ++c) words |= widen_bytes(bytes[c] + at) << (8 * c);
        return words ^ flip * 0x01010101u;
      });
      return put_halos<uint8_t>(s, [&](int64_t at, int lane, int c, uint32_t x) {
        s.lifted[at + lane * 4 + c] = static_cast<char>(x ^ flip);
      });
    case Staging::halves_i16: {
      const u16v minus = static_cast<uint16_t>(center) - u16v{};
      const auto padding = static_cast<uint16_t>(zero_point - static_cast<uint32_t>(s.center));
      for (int c = 0; c < s.channels; ++c)
        restage_vectors(s, s.lifted + c * s.channel_stride, splat_bits(padding * 0x00010001u), [&](int64_t at) {
          const u32v pairs = widen_bytes(bytes[c] + at) | widen_bytes(bytes[c] + at + lanes) << 16;
          return reinterpret_cast<u32v>(reinterpret_cast<u16v>(pairs ^ flip * 0x00010001u) - minus);
        });
      return put_halos<uint8_t>(s, [&](int64_t at, int lane, int c, uint32_t x) {
        const int64_t half = lane % lanes * 2 + lane / lanes;
        reinterpret_cast<uint16_t*>(s.lifted + c * s.channel_stride + at)[half] =
            static_cast<uint16_t>((x ^ flip) - center);
      });
    }
  }
}

// Pairs of int16, modulo 2^16.
struct Pairs {
  using vec = u16v;
  static vec load(const void* p) { return *static_cast<const vec*>(p); }
  static void store(void* p, vec v) { *static_cast<vec*>(p) = v; }
};

// One pattern of `terms` rows for all vectors, `step` bytes apart.
template <class Math, int terms, bool minus1, bool minus2>
void sum_column(const char* const* row, int64_t vectors, int64_t step, char* to) {
  for (int64_t at = 0; at < vectors * vector_bytes; at += vector_bytes, to += step) {
    auto sum = Math::load(row[0] + at);
    if constexpr (terms > 1) sum = minus1 ? sum - Math::load(row[1] + at) : sum + Math::load(row[1] + at);
    if constexpr (terms > 2) sum = minus2 ? sum - Math::load(row[2] + at) : sum + Math::load(row[2] + at);
    Math::store(to, sum);
  }
}

template <class Math> void sum_columns(const ColumnSums& s) {
  const int64_t step = s.count * vector_bytes;
  int terms = 0;
  for (int64_t i = 0; i < 3 * s.count; ++i) terms += s.patterns[i] != 0;
  if (s.count == 4 && terms == 12) {  // all signs of three rows, in ascending order
    char* to = s.sums;
    for (int64_t at = 0; at < s.vectors * vector_bytes; at += vector_bytes, to += step) {
      const auto a = Math::load(s.row[0] + at), b = Math::load(s.row[1] + at), c = Math::load(s.row[2] + at);
      const auto minus = a - b, plus = a + b;
      Math::store(to, minus - c);
      Math::store(to + vector_bytes, minus + c);
      Math::store(to + 2 * vector_bytes, plus - c);
      Math::store(to + 3 * vector_bytes, plus + c);
    }
    return;
  }
  for (int64_t i = 0; i < s.count; ++i) {
    const char* row[3];
    bool minus[3] = {};
    int n = 0;
    for (int r = 0; r < 3; ++r)
      if (const int level = s.patterns[3 * i + r]) row[n] = s.row[r], minus[n++] = level < 0;
    constexpr decltype(&sum_column<Math, 1, false, false>) two[] = {sum_column<Math, 2, false, false>,
                                                                    sum_column<Math, 2, true, false>};
    constexpr decltype(&sum_column<Math, 1, false, false>) three[] = {
        sum_column<Math, 3, false, false>, sum_column<Math, 3, false, true>, sum_column<Math, 3, true, false>,
        sum_column<Math, 3, true, true>};
    const auto sum = n == 1   ? sum_column<Math, 1, false, false>
                     : n == 2 ? two[minus[1]]
                              : three[2 * minus[1] + minus[2]];
    sum(row, s.vectors, step, s.sums + i * vector_bytes);
  }
}

void unlift(const Unlift& u) {
  // Last block first: what a block writes past its segment is then overwritten by its owner.
  for (int64_t j = (u.segment - 1) / lanes * lanes; j >= 0; j -= lanes)
    for (int h = 0; h < u.halves; ++h)
      transpose(u.lifted + j * u.vector_stride + h * vector_bytes, u.vector_stride, u.segment - j,
                u.flat + (h * lanes * u.segment + j) * 4, u.segment * 4, lanes);
  char* out = u.out;
  for (int64_t n = 0; n < u.images; ++n)
    for (int64_t r = 0; r < u.rows; ++r, out += u.columns * 4)
      std::memcpy(out, u.flat + (n * u.image_pitch + r * u.row_pitch) * 4, u.columns * 4);
}

inline float clamp(float v, float lo, float hi) {  // keeps NaN
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <class T>
void add_residual(float* y, const char* p, int64_t stride, int64_t count, float zero_point, float scale) {
  if (stride == sizeof(T)) {
    const T* r = reinterpret_cast<const T*>(p);
    for (int64_t i = 0; i < count; ++i) y[i] = y[i] + scale * (static_cast<float>(r[i]) - zero_point);
  } else {
    for (int64_t i = 0; i < count; ++i)
      y[i] = y[i] + scale * (static_cast<float>(*reinterpret_cast<const T*>(p + i * stride)) - zero_point);
  }
}

// saturate(rint(y / scale) + zero_point); NaN gives the lowest. A product with the reciprocal is within 1e-4 of the
// quotient, so both round alike unless it is that close to a half: then the vector is divided after all.
struct Quantization {
  f32v scale, reciprocal, lowest, highest;
  i32v zero_point;
  bool divides;

  Quantization(DType dtype, float scale_, int32_t zero_point_)
      : scale(Float::splat(scale_)),
        reciprocal(Float::splat(1.0f / scale_)),
        lowest(Float::splat(static_cast<float>((dtype == DType::i8 ? -128 : 0) - zero_point_))),
        highest(lowest + 255.0f),
        zero_point(Int::splat(zero_point_)),
        divides(!(scale_ > 1e-30f && scale_ < 1e30f)) {}  // a reciprocal would not be normal

  f32v saturate(f32v v) const {
    v = v > lowest ? v : lowest;
    return v < highest ? v : highest;
  }
  bytesv operator()(f32v y) const {
    const f32v v = saturate(y * reciprocal);
    i32v q = round_words(v);
    if (__builtin_expect(divides || any_beyond(v - __builtin_convertvector(q, f32v), 0.4998f), 0))
      q = round_words(saturate(y / scale));
    return __builtin_convertvector(q + zero_point, bytesv);
  }
};

void quantize(const float* y, char* out, int64_t stride, int64_t count, const Quantization& q) {
  for (int64_t i = 0; i < count; i += lanes) {  // y is a buffer of whole vectors
    const bytesv bytes = q(Float::load(y + i));
    for (int64_t k = 0; k < lanes && i + k < count; ++k) out[(i + k) * stride] = static_cast<char>(bytes[k]);
  }
}

// y = acc * multiplier + bias, clamped.
template <bool per_element, class Acc, bool has_bias>
void scale_acc(const Finish& f, int64_t first, int64_t count, float lo, float hi, float* y) {
  const Acc* acc = reinterpret_cast<const Acc*>(f.acc) + first;
  const int64_t at = per_element ? first : 0;
  const auto pick = [](int64_t i) { return per_element ? i : 0; };
  const float *m = f.multiplier + at, *b = has_bias ? f.bias + at : nullptr;
  const int32_t* c = std::is_integral_v<Acc> ? f.correction + at : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    float v;
    if constexpr (std::is_integral_v<Acc>)
      v = static_cast<float>(static_cast<int32_t>(acc[i] + static_cast<uint32_t>(c[pick(i)]))) * m[pick(i)];
    else v = acc[i] * m[pick(i)];
    if constexpr (has_bias) v = v + b[pick(i)];
    y[i] = clamp(v, lo, hi);
  }
}

template <bool per_element> void finish_as(const Finish& f) {
  const Epilogue& e = *f.epilogue;
  constexpr int64_t piece = 512;
  alignas(64) float buffer[piece];
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const float lo = e.has_lo ? e.lo : -infinity, hi = e.has_hi ? e.hi : infinity;
  const Quantization quantization(e.out_dtype, e.out_scale, e.out_zero_point);
  const bool in_place = e.out_dtype == DType::f32 && f.out_stride == 4;
  for (int64_t first = 0; first < f.count; first += piece) {
    const int64_t count = f.count - first < piece ? f.count - first : piece;
    char* out = f.out + first * f.out_stride;
    float* const y = in_place ? reinterpret_cast<float*>(out) : buffer;
    if (e.out_dtype == DType::i32) {
      const uint32_t* acc = reinterpret_cast<const uint32_t*>(f.acc) + first;
      const int32_t* c = f.correction + (per_element ? first : 0);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t sum = acc[i] + static_cast<uint32_t>(c[per_element ? i : 0]);
        std::memcpy(out + i * f.out_stride, &sum, 4);
      }
      continue;
    }
    const bool integers = e.acc_dtype == DType::i32;
    const auto scale = f.bias ? integers ? scale_acc<per_element, uint32_t, true> : scale_acc<per_element, float, true>
                       : integers ? scale_acc<per_element, uint32_t, false>
                                  : scale_acc<per_element, float, false>;
    scale(f, first, count, e.has_residual ? -infinity : lo, e.has_residual ? infinity : hi, y);
    if (e.has_residual) {
      const char* r = f.residual + first * f.residual_stride;
      if (e.residual_dtype == DType::f32)
        add_residual<float>(y, r, f.residual_stride, count, e.residual_zero_point, e.residual_scale);
      else if (e.residual_dtype == DType::u8)
        add_residual<uint8_t>(y, r, f.residual_stride, count, e.residual_zero_point, e.residual_scale);
      else add_residual<int8_t>(y, r, f.residual_stride, count, e.residual_zero_point, e.residual_scale);
      for (int64_t i = 0; i < count; ++i) y[i] = clamp(y[i], lo, hi);
    }
    if (e.out_dtype != DType::f32) quantize(y, out, f.out_stride, count, quantization);
    else if (!in_place)
      for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * f.out_stride, y + i, 4);
  }
}

template <class T> f32v load_residual(const char* p) {
  f32v v;
  if constexpr (std::is_same_v<T, float>) std::memcpy(&v, p, sizeof v);
  else {
    const u32v bytes = widen_bytes(reinterpret_cast<const uint8_t*>(p));
    v = __builtin_convertvector(
        std::is_signed_v<T> ? reinterpret_cast<i32v>(bytes ^ 0x80) - 128 : reinterpret_cast<i32v>(bytes), f32v);
  }
  return v;
}

// The same where one multiplier serves all and elements lie side by side: in whole vectors, which may read a vector
// past the last sum.
template <class Acc, class Residual, class Out> void finish_plain(const Finish& f) {
  const Epilogue& e = *f.epilogue;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const f32v multiplier = Float::splat(*f.multiplier), bias = Float::splat(f.bias ? *f.bias : 0),
             lo = Float::splat(e.has_lo ? e.lo : -infinity), hi = Float::splat(e.has_hi ? e.hi : infinity);
  const f32v residual_scale = Float::splat(e.residual_scale), residual_zero = Float::splat(e.residual_zero_point);
  const u32v correction = splat_bits(f.correction ? static_cast<uint32_t>(*f.correction) : 0);
  const Quantization quantization(e.out_dtype, e.out_scale, e.out_zero_point);
  const bool has_bias = f.bias;
  const int64_t count = f.count, run = f.run ? f.run : count + lanes, skip = f.run_stride - run * 4;
  const char *acc = f.acc, *residual = f.residual;
  char* out = f.out;
  for (int64_t i = 0, left = run; i < count; i += lanes, acc += vector_bytes) {
    u32v sum;
    std::memcpy(&sum, acc, sizeof sum);
    f32v y;
    if constexpr (std::is_integral_v<Acc>) y = __builtin_convertvector(reinterpret_cast<i32v>(sum + correction), f32v);
    else y = reinterpret_cast<f32v>(sum);
    y = y * multiplier;
    if (has_bias) y = y + bias;
    const int64_t here = count - i < lanes ? count - i : lanes;
    if constexpr (!std::is_void_v<Residual>) {
      char tail[lanes * sizeof(Residual)];
      const char* r = residual + i * int64_t{sizeof(Residual)};
      if (here < lanes) r = static_cast<char*>(std::memcpy(tail, r, static_cast<size_t>(here) * sizeof(Residual)));
      y = y + residual_scale * (load_residual<Residual>(r) - residual_zero);
    }
    y = y < lo ? lo : y;  // keeps NaN
    y = y > hi ? hi : y;
    const auto store = [&](const auto& values) {
      char* to = out + i * int64_t{sizeof(Out)};
      if (here == lanes) std::memcpy(to, &values, sizeof values);
      else std::memcpy(to, &values, static_cast<size_t>(here) * sizeof(Out));
    };
    if constexpr (std::is_same_v<Out, float>) store(y);
    else store(quantization(y));
    left -= lanes;
    if (left == 0) left = run, acc += skip;
  }
}

template <class Acc, class Residual> void finish_to(const Finish& f) {
  f.epilogue->out_dtype == DType::f32 ? finish_plain<Acc, Residual, float>(f) : finish_plain<Acc, Residual, char>(f);
}
template <class Acc> void finish_side_by_side(const Finish& f) {
  if (!f.epilogue->has_residual) return finish_to<Acc, void>(f);
  switch (f.epilogue->residual_dtype) {
    case DType::u8: return finish_to<Acc, uint8_t>(f);
    case DType::i8: return finish_to<Acc, int8_t>(f);
    default: return finish_to<Acc, float>(f);
  }
}

void finish(const Finish& f) {
  const Epilogue& e = *f.epilogue;
  const auto bytes = [](DType d) { return d == DType::f32 ? 4 : 1; };
  if (!f.per_element && e.out_dtype != DType::i32 && f.out_stride == bytes(e.out_dtype) &&
      (!e.has_residual || f.residual_stride == bytes(e.residual_dtype)))
    return e.acc_dtype == DType::i32 ? finish_side_by_side<uint32_t>(f) : finish_side_by_side<float>(f);
  f.per_element ? finish_as<true>(f) : finish_as<false>(f);
}

// The largest of each column first, then of neighboring columns, then every stride-th. NaN is larger than any number.
template <class T> void max_pool_of(const MaxPool& p) {
  typedef T vec __attribute__((vector_size(vector_bytes)));
  constexpr int64_t step = vector_bytes / int64_t{sizeof(T)};
  constexpr T lowest = std::is_integral_v<T> ? std::numeric_limits<T>::min() : -std::numeric_limits<T>::infinity();
  const auto load = [](const T* from, int64_t count) {
    vec v = lowest - vec{};
    if (count >= step) std::memcpy(&v, from, sizeof v);
    else std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
    return v;
  };
  const auto larger = [](vec a, vec b) {
    const vec m = a > b ? a : b;
    if constexpr (std::is_integral_v<T>) return m;
    else return a != a ? a : m;
  };
  const int64_t padded = p.width + 2 * p.padding, last = padded - (p.columns - 1) * p.dilation;
  T *const row = reinterpret_cast<T*>(p.scratch), *const data = row + p.padding, *const pooled = row + padded + step;
  for (int64_t i = 0; i < p.padding; ++i) row[i] = lowest;
  for (int64_t i = 0; i < p.width; i += step) {
    vec v = lowest - vec{};
    for (int r = 0; r < p.rows; ++r) v = larger(load(reinterpret_cast<const T*>(p.source[r]) + i, p.width - i), v);
    std::memcpy(data + i, &v, sizeof v);
  }
  for (int64_t i = p.padding + p.width; i < padded; ++i) row[i] = lowest;
  for (int64_t i = 0; i < last; i += step) {
    vec v = load(row + i, step);
    for (int64_t s = 1; s < p.columns; ++s) v = larger(load(row + i + s * p.dilation, step), v);
    std::memcpy(pooled + i, &v, sizeof v);
  }
  T* const out = reinterpret_cast<T*>(p.out);
  for_elements<T>(reinterpret_cast<const char*>(pooled), p.stride * int64_t{sizeof(T)}, p.count,
                  [=](int64_t i, T x) { out[i] = x; });
}

void max_pool(const MaxPool& p) {
  switch (p.dtype) {
    case DType::u8: return max_pool_of<uint8_t>(p);
    case DType::i8: return max_pool_of<int8_t>(p);
    default: return max_pool_of<float>(p);
  }
}

template <class Math> void build_tables(const TableBuild& b) {
  const int64_t entry_bytes = b.entry_bytes;
  char* const zero = b.rows + b.group_size * entry_bytes;
  for (int64_t w = 0; w < entry_bytes; w += vector_bytes) Math::store(zero + w, typename Math::vec{});
  for (int64_t u = 0; u < b.units; ++u) {
    // The channels' vectors side by side, as in an entry.
    for (int64_t c = 0; c < b.group_size; ++c) {
      const char* x = b.x + (u * b.group_size + c) * b.channel_stride;
      for (int s = 0; s < b.segments; ++s) {
        char* to = b.rows + c * entry_bytes + b.segment_at[s];
        const int64_t bytes = (b.vectors + b.segment_shift[s]) * vector_bytes;
        for (int64_t w = 0; w < bytes; w += vector_bytes) Math::store(to + w, Math::load(x + b.segment_source[s] + w));
      }
    }
    char* const table = b.tables + u * b.unit_bytes;
    for (int64_t i = 0; i < b.step_count; ++i) {
      const TableStep step = b.steps[i];
      const auto plus = Math::splat(Math::coefficient(step)), minus = -plus;
      const char* x = step.channel < 0 ? zero : b.rows + step.channel * entry_bytes;
      const char* parent = step.parent < 0 ? zero : table + step.parent * entry_bytes;
      char *to = table + step.plus * entry_bytes, *and_to = table + step.minus * entry_bytes;
      if (step.plus < 0 || step.minus < 0) {
        const auto coefficient = step.plus < 0 ? minus : plus;
        if (step.plus < 0) to = and_to;
        for (int64_t w = 0; w < entry_bytes; w += vector_bytes)
          Math::store(to + w, Math::multiply_add(Math::load(parent + w), Math::load(x + w), coefficient));
      } else {
        for (int64_t w = 0; w < entry_bytes; w += vector_bytes) {
          const auto base = Math::load(parent + w), row = Math::load(x + w);
          Math::store(to + w, Math::multiply_add(base, row, plus));
          Math::store(and_to + w, Math::multiply_add(base, row, minus));
        }
      }
    }
  }
}

template <class Math, int V, class Entry> void sum_tables_of(const TableSum& s) {
  using vec = typename Math::vec;
  constexpr uint32_t top = 1u << (8 * sizeof(Entry) - 1);  // the sign
  // Copies: the stores below could alias the fields.
  const char* const tables = s.tables;
  const int64_t* const slot_offset = s.slot_offset;
  const int64_t entry_bytes = s.entry_bytes, outputs = s.outputs, acc_stride = s.acc_stride;
  const int slots = s.slots;
  const bool first = s.first;
  const Entry* stream = reinterpret_cast<const Entry*>(s.stream);
  char* out = s.acc;
  for (int64_t o = 0; o < outputs; ++o, out += acc_stride) {
    prefetch<64>(reinterpret_cast<const char*>(stream));
    vec acc[V];
    for (int v = 0; v < V; ++v) acc[v] = first ? vec{} : Math::load(out + v * vector_bytes);
    const auto add = [&](int slot, uint32_t code) __attribute__((always_inline)) {
      const char* entry = tables + slot_offset[slot] + (code & (top - 1)) * entry_bytes;
      const vec sign = Math::template sign<Entry>(code);
      for (int v = 0; v < V; ++v) acc[v] = Math::add_entry(acc[v], Math::load(entry + v * vector_bytes), sign);
    };
    int m = 0;
    for (; m + 9 <= slots; m += 9, stream += 9)
      for (int i = 0; i < 9; ++i) add(m + i, stream[i]);
    for (; m + 4 <= slots; m += 4, stream += 4)
      for (int i = 0; i < 4; ++i) add(m + i, stream[i]);
    for (; m < slots; ++m) add(m, *stream++);
    for (int v = 0; v < V; ++v) Math::store(out + v * vector_bytes, acc[v]);
  }
}

template <class Math, class Entry> void sum_tables_from(const TableSum& s) {
  switch (s.vectors) {
    case 1: return sum_tables_of<Math, 1, Entry>(s);
    case 2: return sum_tables_of<Math, 2, Entry>(s);
    case 3: return sum_tables_of<Math, 3, Entry>(s);
    case 4: return sum_tables_of<Math, 4, Entry>(s);
    case 5: return sum_tables_of<Math, 5, Entry>(s);
    case 6: return sum_tables_of<Math, 6, Entry>(s);
    case 7: return sum_tables_of<Math, 7, Entry>(s);
    default: return sum_tables_of<Math, 8, Entry>(s);
  }
}
template <class Math> void sum_tables(const TableSum& s) {
  s.wide ? sum_tables_from<Math, uint16_t>(s) : sum_tables_from<Math, uint8_t>(s);
}

template <class Math, int O, int V> void dense_of(const DenseTile& d) {
  using vec = typename Math::vec;
  vec acc[O][V] = {};
  const char* w = d.weights;
  const char* unit = d.x;
  for (int64_t u = 0; u < d.units; ++u, unit += d.unit_stride) {
    for (int t = 0; t < d.taps; ++t, w += dense_outputs * 4) {
      const char* x = unit + d.tap_source[t];
      prefetch<64>(w);
      vec value[V];
      for (int v = 0; v < V; ++v) value[v] = Math::load(x + v * vector_bytes);
      for (int o = 0; o < O; ++o) {
        const vec weight = Math::broadcast(w + o * 4);
        for (int v = 0; v < V; ++v) acc[o][v] = Math::multiply_add(acc[o][v], value[v], weight);
      }
    }
  }
  for (int o = 0; o < O; ++o)
    for (int v = 0; v < V; ++v) Math::store(d.acc + o * d.acc_stride + v * vector_bytes, acc[o][v]);
}

template <class Math, int O> void dense_vectors(const DenseTile& d) {
  switch (d.vectors) {
    case 1: return dense_of<Math, O, 1>(d);
    case 2: return dense_of<Math, O, 2>(d);
    default: return dense_of<Math, O, 3>(d);
  }
}

// Outputs in blocks that the registers hold.
template <class Math> void dense(const DenseTile& d) {
  DenseTile part = d;
  while (part.outputs > 0) {
    int done;
    if (dense_block >= 8 && part.outputs >= 8) dense_vectors<Math, dense_block>(part), done = dense_block;
    else if (part.outputs >= 4) dense_vectors<Math, 4>(part), done = 4;
    else if (part.outputs >= 2) dense_vectors<Math, 2>(part), done = 2;
    else dense_vectors<Math, 1>(part), done = 1;
    part.outputs -= done;
    part.weights += done * 4;
    part.acc += done * part.acc_stride;
  }
}

// R rows of x by P vectors of outputs.
template <class Math, int R, int P> void linear_of(const LinearTile& t) {
  using vec = typename Math::vec;
  vec acc[R][P] = {};
  for (int64_t k = 0; k < t.words; ++k) {
    const char* w = t.weights + k * panel_outputs * 4;
    if constexpr (R == 1) prefetch<P * vector_bytes>(w);
    vec weight[P];
    for (int p = 0; p < P; ++p) weight[p] = Math::load(w + p * vector_bytes);
    for (int r = 0; r < R; ++r) {
      const vec x = Math::broadcast(t.x + r * t.x_stride + k * 4);
      for (int p = 0; p < P; ++p) acc[r][p] = Math::multiply_add(acc[r][p], x, weight[p]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) Math::store(t.acc + r * t.acc_stride + p * vector_bytes, acc[r][p]);
}

// Two bits (or one) a weight; each byte of a word holds the codes of one of four neighbouring inputs. Four bits at a
// time name the level of each code in them, so that codes need no shifts of their own. Loops stay rolled: unrolled,
// they spill registers.
template <int R, int P> void linear_packed_i8_of(const LinearTile& t) {
  const int fields = 4 / t.code_bits;
  const i32v mask = Int::splat(0x0f0f0f0f);
  i32v acc[R][P] = {};
  const char* x = t.x;
  for (int64_t k = 0; k < t.words; ++k) {
    const char* w = t.weights + k * panel_outputs * 4;
    if constexpr (R == 1) prefetch<P * vector_bytes>(w);
    i32v codes[P];
    for (int p = 0; p < P; ++p) codes[p] = Int::load(w + p * vector_bytes);
#pragma GCC unroll 1
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 1
      for (int f = 0; f < fields; ++f, x += 4) {
        const Levels levels = load_levels(t.level_bytes + f * 16);
        i32v weight[P];
        for (int p = 0; p < P; ++p) weight[p] = levels_of(levels, codes[p] & mask);
        for (int r = 0; r < R; ++r) {
          const i32v row = Byte::broadcast(x + r * t.x_stride);
          for (int p = 0; p < P; ++p) acc[r][p] = dot4(acc[r][p], row, weight[p]);
        }
      }
      for (int p = 0; p < P; ++p) codes[p] = codes[p] >> 4;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) Int::store(t.acc + r * t.acc_stride + p * vector_bytes, acc[r][p]);
}

// One code looks up the sum of several inputs times their levels.
template <int R, int P> void linear_packed_f32_of(const LinearTile& t) {
  const int half_codes = 16 / t.code_bits;
  f32v acc[R][P] = {};
  const float* at = t.table;
  for (int64_t k = 0; k < t.words; ++k) {
    const char* w = t.weights + k * panel_outputs * 4;
    if constexpr (R == 1) prefetch<P * vector_bytes>(w);
#pragma GCC unroll 1
    for (int half = 0; half < 2; ++half) {
      u32v codes[P];
      for (int p = 0; p < P; ++p) {
        const u32v word = *reinterpret_cast<const u32v*>(w + p * vector_bytes);
        codes[p] = half ? high_half(word) : word;
      }
      for (int c = 0; c < half_codes; ++c, at += 32) {
        if (c)
          for (int p = 0; p < P; ++p) codes[p] = shift_half(codes[p], t.code_bits);
        for (int r = 0; r < R; ++r) {
          const Lookup table = load_lookup(at + r * t.table_stride);
          for (int p = 0; p < P; ++p) acc[r][p] = acc[r][p] + look_up(table, reinterpret_cast<i32v>(codes[p]));
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) Float::store(t.acc + r * t.acc_stride + p * vector_bytes, acc[r][p]);
}

// Cuts a panel and its rows into the blocks that the registers hold.
template <int R, int P, class Many, class One> void for_linear_blocks(const LinearTile& t, Many many, One one) {
  for (int p = 0; p < panel_outputs / lanes; p += P) {
    LinearTile part = t;
    part.weights += p * vector_bytes;
    part.acc += p * vector_bytes;
    int row = 0;
    for (; row + R <= t.rows;
         row += R, part.x += R * t.x_stride, part.table += R * t.table_stride, part.acc += R * t.acc_stride)
      many(part);
    for (; row < t.rows; ++row, part.x += t.x_stride, part.table += t.table_stride, part.acc += t.acc_stride) one(part);
  }
}

template <class Math> void linear(const LinearTile& t) {
  for_linear_blocks<linear_rows, linear_vectors>(t, linear_of<Math, linear_rows, linear_vectors>,
                                                 linear_of<Math, 1, linear_vectors>);
}
void linear_packed_i8(const LinearTile& t) {
  for_linear_blocks<packed_rows, linear_vectors>(t, linear_packed_i8_of<packed_rows, linear_vectors>,
                                                 linear_packed_i8_of<1, linear_vectors>);
}
void linear_packed_f32(const LinearTile& t) {
  for_linear_blocks<packed_rows, linear_vectors>(t, linear_packed_f32_of<packed_rows, linear_vectors>,
                                                 linear_packed_f32_of<1, linear_vectors>);
}

template <int inputs> void build_lookup_of(const LookupBuild& b) {
  constexpr int vectors = 32 / lanes;
  f32v digit[inputs][vectors];
  std::memcpy(digit, b.digit, sizeof digit);
  for (int64_t position = 0; position < b.positions; ++position) {
    const float* x = b.x + position * inputs;
    for (int v = 0; v < vectors; ++v) {
      f32v sum{};
      for (int i = 0; i < inputs; ++i) sum = fma(Float::splat(x[i]), digit[i][v], sum);
      Float::store(b.table + position * 32 + v * lanes, sum);
    }
  }
}
void build_lookup(const LookupBuild& b) {
  b.inputs == 2 ? build_lookup_of<2>(b) : b.inputs == 3 ? build_lookup_of<3>(b) : build_lookup_of<5>(b);
}

void fill(Kernels& k) {
  k = {lanes,
       generates_code,
       max_table_vectors,
       max_dense_vectors,
       stage,
       restage,
       unlift,
       finish,
       max_pool,
       sum_columns<Float>,
       sum_columns<Pairs>,
       build_tables<Float>,
       build_tables<Int>,
       sum_tables<Float>,
       sum_tables<Int>,
       dense<Float>,
       dense<Byte>,
       dense<Int>,
       linear<Float>,
       linear<Byte>,
       build_lookup,
       linear_packed_f32,
       linear_packed_i8};
}

}  // namespace
}  // namespace pycodesign::repetition
