// Every kernel for any processor: 4 lanes of the compiler's own vectors (SSE2 on x86-64, NEON on aarch64).
#include "repetition/kernels.h"

namespace pycodesign::repetition {
namespace {

constexpr int lanes = 4;
constexpr bool generates_code = false;
constexpr int max_table_vectors = 8, max_dense_vectors = 3, dense_block = 4;
constexpr int linear_rows = 2, linear_vectors = 4, packed_rows = 2;
constexpr int pixel_rows = 6, pixel_vectors = 2;

typedef float f32v __attribute__((vector_size(16), may_alias));
typedef int32_t i32v __attribute__((vector_size(16), may_alias));
typedef uint32_t u32v __attribute__((vector_size(16), may_alias));

inline f32v fma(f32v a, f32v b, f32v c) { return a * b + c; }  // two roundings

inline i32v dot4(i32v acc, i32v x, i32v w) {
  u32v sum = (u32v)acc;
  for (int byte = 0; byte < 32; byte += 8)
    sum += ((u32v)x >> byte & 0xff) * (u32v)((i32v)((u32v)w << (24 - byte)) >> 24);
  return (i32v)sum;
}

inline bool any_beyond(f32v v, float limit) {
  const i32v beyond = (v > limit) | (-v > limit);
  return (beyond[0] | beyond[1] | beyond[2] | beyond[3]) != 0;
}

// Adding 1.5 * 2^23 rounds to even on every machine.
inline i32v round_words(f32v v) { return __builtin_convertvector((v + 12582912.0f) - 12582912.0f, i32v); }

inline u32v widen_bytes(const uint8_t* p) { return u32v{p[0], p[1], p[2], p[3]}; }
inline u32v widen_halves(const uint8_t* p) {
  uint16_t h[lanes];
  __builtin_memcpy(h, p, sizeof h);
  return u32v{h[0], h[1], h[2], h[3]};
}

template <int step> inline bool interleave_first(const uint8_t* const*, int64_t, uint32_t, uint32_t*) { return false; }

struct Lookup {
  const float* table;
};
inline Lookup load_lookup(const float* table) { return {table}; }
inline f32v look_up(const Lookup& t, i32v i) {
  return f32v{t.table[i[0] & 31], t.table[i[1] & 31], t.table[i[2] & 31], t.table[i[3] & 31]};
}

struct Octet {
  const float* table;
};
inline Octet load_octet(const float* table) { return {table}; }
inline f32v look_up(const Octet& t, i32v i) {
  return f32v{t.table[i[0] & 7], t.table[i[1] & 7], t.table[i[2] & 7], t.table[i[3] & 7]};
}

inline u32v high_half(u32v v) { return v >> 16; }
inline u32v shift_half(u32v v, int bits) { return v >> bits; }

using Levels = const int8_t*;
inline Levels load_levels(const int8_t* p) { return p; }
inline i32v levels_of(Levels levels, i32v codes) {
  i32v out;
  for (int l = 0; l < lanes; ++l) {
    const uint32_t c = static_cast<uint32_t>(codes[l]);
    uint32_t bytes = 0;
    for (int b = 0; b < 32; b += 8) bytes |= static_cast<uint32_t>(static_cast<uint8_t>(levels[(c >> b) & 15])) << b;
    out[l] = static_cast<int32_t>(bytes);
  }
  return out;
}

// 4 x 4 words; strides in bytes. The first `rows` rows are read, for the others any; the first `to_rows` are
// stored, in order: unlift lets rows overlap.
inline void transpose(const char* from, int64_t from_stride, int64_t rows, char* to, int64_t to_stride,
                      int64_t to_rows) {
  uint32_t w[lanes][lanes];
  for (int i = 0; i < lanes; ++i) __builtin_memcpy(w[i], from + (i < rows ? i : 0) * from_stride, sizeof w[i]);
  for (int i = 0; i < lanes && i < to_rows; ++i)
    for (int k = 0; k < lanes; ++k) __builtin_memcpy(to + i * to_stride + k * 4, &w[k][i], 4);
}

}  // namespace
}  // namespace pycodesign::repetition

#include "repetition/loops.h"

namespace pycodesign::repetition {
void fill_scalar(Kernels& k) { fill(k); }
}  // namespace pycodesign::repetition
