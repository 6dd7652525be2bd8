// The loops of all kernels, written once over a vector type. The file of each instruction set defines, in an unnamed
// namespace of pycodesign::repetition,
//   f32v, i32v, u32v                            vectors of `lanes` words
//   fma(a, b, c), dot4(acc, x_u8x4, w_i8x4)     a * b + c; sums of four products, modulo 2^32
//   Lookup, load_lookup(p), look_up(t, index)   32 floats by the low five bits; Octet, load_octet(p): 8 by three
//   high_half(v), shift_half(v, bits)           each word's upper 16 bits; its lower 16 >> bits, above them any
//   Levels, load_levels(p), levels_of(l, codes) 16 bytes by code, for each byte
//   widen_bytes(p), widen_halves(p)             to words
//   interleave_first<step>(p, count, flip, out) `interleave_row` of at most a vector, or false
//   any_beyond(v, limit)                        whether the magnitude of a lane is larger
//   round_words(v)                              floats to the nearest word, halves to the even one
//   transpose(from, stride, rows, to, stride, rows)   lanes x lanes words, or only their first rows
// and how many vectors its registers hold: max_table_vectors, max_dense_vectors, dense_block, linear_rows,
// linear_vectors, packed_rows, pixel_rows, pixel_vectors; whether generates_code; then includes this file. Everything
// here has internal linkage: no other file may share its code.
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
  static vec owed(int) { return vec{}; }  // to a sum of so many negative entries
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
  static vec owed(int negative) { return splat(negative); }
};
struct Byte : Int {
  static vec multiply_add(vec acc, vec x, vec w) { return dot4(acc, x, w); }
};

constexpr int64_t vector_bytes = lanes * 4;
typedef uint16_t u16v __attribute__((vector_size(lanes * 4), may_alias));
typedef uint8_t bytesv __attribute__((vector_size(lanes), may_alias));

// Parts of a sum are summed from zero each, so that the errors of long sums of floats stay those of short ones.
template <class Math> inline void add_part(char* acc, typename Math::vec part, bool is_first) {
  if constexpr (std::is_same_v<Math, Float>) Math::store(acc, is_first ? part : Math::load(acc) + part);
  else Math::store(acc, is_first ? part : reinterpret_cast<typename Math::vec>(u32v(Math::load(acc)) + u32v(part)));
}

// Sums modulo 2^32, and of pairs modulo 2^16.
struct Words {
  using vec = u32v;
  static vec load(const void* p) { return *static_cast<const vec*>(p); }
  static void store(void* p, vec v) { *static_cast<vec*>(p) = v; }
};
struct Pairs {
  using vec = u16v;
  static vec load(const void* p) { return *static_cast<const vec*>(p); }
  static void store(void* p, vec v) { *static_cast<vec*>(p) = v; }
};

// Into the second-level cache, two pages ahead: hardware prefetchers stop at pages, and misses of the first level are
// too few at a time to cover memory's latency.
constexpr int64_t prefetch_distance = 8192;
template <int64_t bytes> inline void prefetch(const char* p) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + prefetch_distance + at, 0, 2);
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

}  // namespace
}  // namespace pycodesign::repetition

#include "repetition/loops_finish.h"
#include "repetition/loops_layout.h"
#include "repetition/loops_linear.h"
#include "repetition/loops_matrix.h"
#include "repetition/loops_sums.h"

namespace pycodesign::repetition {
namespace {

void fill(Kernels& k) {
  k = {lanes,
       false,
       generates_code,
       max_table_vectors,
       max_dense_vectors,
       stage,
       restage,
       unlift,
       turn,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       finish,
       max_pool,
       max_pool_pixels,
       sum_columns<Float>,
       sum_columns<Pairs>,
       sum_columns<Words>,
       add_columns<Float>,
       add_columns<Int>,
       build_tables<Float>,
       build_tables<Int>,
       sum_tables<Float>,
       sum_tables<Int>,
       dense<Float>,
       dense<Byte>,
       nullptr,
       dense<Int>,
       multiply<BytesOfFour, 1>,
       multiply<Bf16Pairs, bf16_terms>,
       linear<Float>,
       linear<Byte>,
       nullptr,
       nullptr,
       expand_codes,
       build_lookup,
       linear_packed_f32,
       linear_triples_f32,
       linear_packed_i8};
}

}  // namespace
}  // namespace pycodesign::repetition
