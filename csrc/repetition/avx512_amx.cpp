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

// One block from its codes.
template <bool bf16> inline void expand(const char* codes, const BlockCodes& b, const char* levels, char* to) {
  constexpr int lines = bf16 ? block_outputs / 2 : block_outputs;
  const int together = 8 / b.bits;
  for (int line = 0; line < lines; line += together, codes += row_bytes) {
    const __m512i bytes = load(codes);
    _mm_prefetch(codes + 4096, _MM_HINT_T1);
    for (int r = 0; r < together; ++r, to += bf16 ? 2 * row_bytes : row_bytes) {
      const __m512i c = codes_of(bytes, r * b.bits);
      const char* first = levels + (line + r) * (bf16 ? 2 : 1) * b.level_stride;
      if constexpr (!bf16) {
        store(to, _mm512_shuffle_epi8(table(first), c));
      } else {
        const char* second = first + b.level_stride;
        store(to, _mm512_unpacklo_epi8(_mm512_shuffle_epi8(table(first), c), _mm512_shuffle_epi8(table(first + 16), c)));
        store(to + row_bytes,
              _mm512_unpackhi_epi8(_mm512_shuffle_epi8(table(second), c), _mm512_shuffle_epi8(table(second + 16), c)));
      }
    }
  }
}

// Rows of two vectors of pixels one after another, [step][term][vector][row], with zeros behind the last.
template <int terms, int vectors> void gather(const MatrixSum& m, const char* x) {
  char* to = m.words;
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
  int64_t at;                       // of the first vector
};

// `expands`: codes become weights a step before they are multiplied, while the matrix unit is busy with that step.
template <bool bf16, int blocks, int vectors, bool expands>
void multiply_block(const MatrixSum& m, const Words& words, int64_t block) {
  const char *const weights = (m.codes.bits ? m.expanded : m.weights) + block * m.steps * block_bytes,
                    *const next_weights = weights + m.steps * block_bytes;
  const int64_t code_bytes = block_bytes / (bf16 ? 16 : 8) * m.codes.bits;
  const auto expand_step = [&](int64_t s) {
    for (int64_t b = block; b < block + blocks; ++b)
      expand<bf16>(m.codes.codes + (b * m.steps + s) * code_bytes, m.codes,
                   m.codes.levels + b * block_outputs * m.codes.level_stride,
                   m.expanded + (b * m.steps + s) * block_bytes);
  };
  if constexpr (expands) expand_step(0);
  _tile_zero(0);
  if constexpr (vectors > 1) _tile_zero(1);
  if constexpr (blocks > 1) _tile_zero(2);
  if constexpr (blocks > 1 && vectors > 1) _tile_zero(3);
  for (int64_t s = 0; s < m.steps; ++s) {
    const char* x = words.source ? words.x + words.source[s] : words.x + s * words.step;
    _tile_loadd(4, weights + s * block_bytes, row_bytes);
    if constexpr (blocks > 1) _tile_loadd(5, next_weights + s * block_bytes, row_bytes);
    for (int t = 0; t < (bf16 ? bf16_terms : 1); ++t, x += words.term) {
      _tile_loadd(6, x, words.row);
      if constexpr (vectors > 1) _tile_loadd(7, x + words.vector, words.row);
      multiply_00<bf16>();
      if constexpr (vectors > 1) multiply_01<bf16>();
      if constexpr (blocks > 1) multiply_10<bf16>();
      if constexpr (blocks > 1 && vectors > 1) multiply_11<bf16>();
    }
    if constexpr (expands)
      if (s + 1 < m.steps) expand_step(s + 1);
  }
  char *const acc = m.acc + block * block_outputs * m.acc_stride + words.at,
              *const next_acc = acc + block_outputs * m.acc_stride;
  _tile_stored(0, acc, m.acc_stride);
  if constexpr (vectors > 1) _tile_stored(1, acc + row_bytes, m.acc_stride);
  if constexpr (blocks > 1) _tile_stored(2, next_acc, m.acc_stride);
  if constexpr (blocks > 1 && vectors > 1) _tile_stored(3, next_acc + row_bytes, m.acc_stride);
}

template <bool bf16, int vectors, bool expands> void multiply_vectors(const MatrixSum& m, int64_t v) {
  constexpr int terms = bf16 ? bf16_terms : 1;
  const int64_t at = v * row_bytes;
  Words words{m.x + at, m.source, 0, m.term_stride, row_bytes, m.row_stride, at};
  if (m.gathered) {
    gather<terms, vectors>(m, words.x);
    words = {m.words, nullptr, terms * 2 * block_bytes, 2 * block_bytes, block_bytes, row_bytes, at};
  }
  const int64_t blocks = (m.outputs + block_outputs - 1) / block_outputs;
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) multiply_block<bf16, 2, vectors, expands>(m, words, b);
  if (b < blocks) multiply_block<bf16, 1, vectors, expands>(m, words, b);
}

template <bool bf16> void multiply(const MatrixSum& m) {
  _tile_loadconfig(&whole_tiles);
  int64_t v = 0;
  for (; v + 2 <= m.vectors; v += 2)
    if (v == 0 && m.codes.bits) multiply_vectors<bf16, 2, true>(m, v);
    else multiply_vectors<bf16, 2, false>(m, v);
  if (v < m.vectors)
    if (v == 0 && m.codes.bits) multiply_vectors<bf16, 1, true>(m, v);
    else multiply_vectors<bf16, 1, false>(m, v);
  _tile_release();
}

}  // namespace

void fill_avx512_amx(Kernels& k) {
  k.has_matrix_unit = true;
  k.multiply_i8 = multiply<false>;
  k.multiply_bf16 = multiply<true>;
}
}  // namespace pycodesign::repetition
