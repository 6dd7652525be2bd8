// AMX: eight tiles of 16 rows of 64 bytes; products of 16 x 64 bytes and 64 x 16 in 16 cycles, half as many bfloat16.
#include <immintrin.h>

#include "repetition/kernels.h"

namespace pycodesign::repetition {
namespace {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig whole_tiles;

constexpr int64_t row_bytes = 64;

inline __m512i load(const char* p) { return _mm512_loadu_si512(p); }
inline void store(char* p, __m512i v) { _mm512_storeu_si512(p, v); }
inline __m512i table(const char* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Codes of one row in the lowest bits of bytes, below bits of others. (Shifts of 16 bits: four bits are always a byte's
// own, or a table's repetition.)
inline __m512i codes_of(__m512i bytes, int shift) {
  return _mm512_and_si512(_mm512_srl_epi16(bytes, _mm_cvtsi32_si128(shift)), _mm512_set1_epi8(15));
}

void expand_i8(const BlockCodes& b) {
  const int together = 8 / b.bits;
  const char* codes = b.codes;
  char* to = b.to;
  for (int64_t i = 0; i < b.count; ++i)
    for (int row = 0; row < block_outputs; row += together, codes += 64) {
      const __m512i bytes = load(codes);
      _mm_prefetch(codes + 4096, _MM_HINT_T1);
      for (int r = 0; r < together; ++r, to += row_bytes)
        store(to, _mm512_shuffle_epi8(table(b.levels + (row + r) * b.level_stride), codes_of(bytes, r * b.bits)));
    }
}

void expand_bf16(const BlockCodes& b) {
  const int together = 8 / b.bits;
  const char* codes = b.codes;
  char* to = b.to;
  for (int64_t i = 0; i < b.count; ++i)
    for (int pair = 0; pair < block_outputs / 2; pair += together, codes += 64) {
      const __m512i bytes = load(codes);
      _mm_prefetch(codes + 4096, _MM_HINT_T1);
      for (int r = 0; r < together; ++r, to += 2 * row_bytes) {
        const __m512i c = codes_of(bytes, r * b.bits);
        const char *first = b.levels + 2 * (pair + r) * b.level_stride, *second = first + b.level_stride;
        store(to, _mm512_unpacklo_epi8(_mm512_shuffle_epi8(table(first), c), _mm512_shuffle_epi8(table(first + 16), c)));
        store(to + row_bytes,
              _mm512_unpackhi_epi8(_mm512_shuffle_epi8(table(second), c), _mm512_shuffle_epi8(table(second + 16), c)));
      }
    }
}

// Rows of two vectors of pixels one after another, [step][term][vector][row], with zeros behind the last.
template <int terms, int vectors> void gather(const MatrixSum& m, const char* x) {
  char* to = m.scratch;
  for (int64_t s = 0; s < m.steps; ++s, to += terms * 2 * block_bytes)
    for (int64_t r = 0; r < block_words; ++r) {
      const int64_t row = s * block_words + r;
      for (int t = 0; t < terms; ++t)
        for (int v = 0; v < vectors; ++v)
          store(to + (t * 2 + v) * block_bytes + r * row_bytes,
                row < m.rows ? load(x + m.source[row] + t * m.term_stride + v * row_bytes) : _mm512_setzero_si512());
    }
}

// Tiles 0 to 3: sums of two blocks of outputs at two vectors of pixels. 4, 5: weights; 6, 7: words of pixels.
template <bool bf16> inline void multiply_00() {
  if constexpr (bf16) _tile_dpbf16ps(0, 4, 6);
  else _tile_dpbsud(0, 4, 6);
}
template <bool bf16> inline void multiply_01() {
  if constexpr (bf16) _tile_dpbf16ps(1, 4, 7);
  else _tile_dpbsud(1, 4, 7);
}
template <bool bf16> inline void multiply_10() {
  if constexpr (bf16) _tile_dpbf16ps(2, 5, 6);
  else _tile_dpbsud(2, 5, 6);
}
template <bool bf16> inline void multiply_11() {
  if constexpr (bf16) _tile_dpbf16ps(3, 5, 7);
  else _tile_dpbsud(3, 5, 7);
}

// Where the words of two vectors of pixels lie: of each step from `source`, or one step after another.
struct Words {
  const char* x;
  const int64_t* source;
  int64_t step, term, vector, row;  // bytes from each to the next
};

template <bool bf16, int blocks, int vectors>
void multiply_block(const MatrixSum& m, const Words& words, const char* weights, char* acc) {
  const char* next_weights = weights + m.steps * block_bytes;
  _tile_zero(0);
  if constexpr (vectors > 1) _tile_zero(1);
  if constexpr (blocks > 1) _tile_zero(2);
  if constexpr (blocks > 1 && vectors > 1) _tile_zero(3);
  for (int64_t s = 0; s < m.steps; ++s, weights += block_bytes, next_weights += block_bytes) {
    const char* x = words.source ? words.x + words.source[s] : words.x + s * words.step;
    _tile_loadd(4, weights, row_bytes);
    if constexpr (blocks > 1) _tile_loadd(5, next_weights, row_bytes);
    for (int t = 0; t < (bf16 ? bf16_terms : 1); ++t, x += words.term) {
      _tile_loadd(6, x, words.row);
      if constexpr (vectors > 1) _tile_loadd(7, x + words.vector, words.row);
      multiply_00<bf16>();
      if constexpr (vectors > 1) multiply_01<bf16>();
      if constexpr (blocks > 1) multiply_10<bf16>();
      if constexpr (blocks > 1 && vectors > 1) multiply_11<bf16>();
    }
  }
  char* next_acc = acc + block_outputs * m.acc_stride;
  _tile_stored(0, acc, m.acc_stride);
  if constexpr (vectors > 1) _tile_stored(1, acc + row_bytes, m.acc_stride);
  if constexpr (blocks > 1) _tile_stored(2, next_acc, m.acc_stride);
  if constexpr (blocks > 1 && vectors > 1) _tile_stored(3, next_acc + row_bytes, m.acc_stride);
}

template <bool bf16, int vectors> void multiply_vectors(const MatrixSum& m, int64_t v) {
  constexpr int terms = bf16 ? bf16_terms : 1;
  const char* x = m.x + v * row_bytes;
  Words words{x, m.source, 0, m.term_stride, row_bytes, m.row_stride};
  if (m.gathered) {
    gather<terms, vectors>(m, x);
    words = {m.scratch, nullptr, terms * 2 * block_bytes, 2 * block_bytes, block_bytes, row_bytes};
  }
  const char* weights = m.weights;
  char* acc = m.acc + v * row_bytes;
  const int64_t blocks = (m.outputs + block_outputs - 1) / block_outputs;
  for (int64_t b = 0; b < blocks; b += 2) {
    if (b + 1 < blocks) multiply_block<bf16, 2, vectors>(m, words, weights, acc);
    else multiply_block<bf16, 1, vectors>(m, words, weights, acc);
    weights += 2 * m.steps * block_bytes;
    acc += 2 * block_outputs * m.acc_stride;
  }
}

template <bool bf16> void multiply(const MatrixSum& m) {
  _tile_loadconfig(&whole_tiles);
  int64_t v = 0;
  for (; v + 2 <= m.vectors; v += 2) multiply_vectors<bf16, 2>(m, v);
  if (v < m.vectors) multiply_vectors<bf16, 1>(m, v);
  _tile_release();
}

}  // namespace

void fill_avx512_amx(Kernels& k) {
  k.has_matrix_unit = true;
  k.expand_i8 = expand_i8;
  k.expand_bf16 = expand_bf16;
  k.multiply_i8 = multiply<false>;
  k.multiply_bf16 = multiply<true>;
}
}  // namespace pycodesign::repetition
