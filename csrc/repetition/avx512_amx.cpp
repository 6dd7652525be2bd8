// AMX: eight tiles of 16 rows of 64 bytes; products of 16 x 64 bytes and 64 x 16 in 16 cycles, half as many bfloat16.
#include <immintrin.h>

#include "repetition/kernels.h"

namespace pycodesign::repetition {
namespace {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16};
};
constexpr TileConfig whole_tiles;

constexpr int64_t row_bytes = 64;
typedef uint16_t halves __attribute__((vector_size(64)));

inline __m512i load(const char* p) { return _mm512_loadu_si512(p); }
inline void store(char* p, __m512i v) { _mm512_storeu_si512(p, v); }
// The levels of one output by their codes. A permutation looks at six bits of an index: those above a code are
// another's, and tables repeat.
inline __m512i levels_of(const char* table, __m512i codes) {
  return _mm512_permutexvar_epi8(codes,
                                 _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))));
}

// One block from its codes.
template <bool bf16, int bits> inline void expand(const char* codes, const char* levels, int64_t stride, char* to) {
  constexpr int lines = bf16 ? block_outputs / 2 : block_outputs, together = 8 / bits;
#pragma GCC unroll 16
  for (int line = 0; line < lines; ++line) {
    const char* const from = codes + line / together * row_bytes;
    if (line % together == 0) _mm_prefetch(from + 4096, _MM_HINT_T1);
    const auto c = (__m512i)((halves)load(from) >> line % together * bits);
    if constexpr (!bf16) {
      store(to + line * row_bytes, levels_of(levels + line * stride, c));
    } else {
      const char *const first = levels + 2 * line * stride, *const second = first + stride;
      store(to + 2 * line * row_bytes, _mm512_unpacklo_epi8(levels_of(first, c), levels_of(first + 16, c)));
      store(to + (2 * line + 1) * row_bytes, _mm512_unpackhi_epi8(levels_of(second, c), levels_of(second + 16, c)));
    }
  }
}

// Rows of two vectors of pixels one after another, [step][term][vector][row], with zeros behind the last.
template <int terms, int vectors> void gather(const MatrixSum& m, int64_t first) {
  const char* x = m.x + first * row_bytes;
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

// Few tiles: see README.md. 0 and 1: sums of a block of outputs at two vectors of pixels. 2: weights, 3: words of
// pixels.
template <bool bf16> inline void multiply_0() {
  if constexpr (bf16) _tile_dpbf16ps(0, 2, 3);
  else _tile_dpbsud(0, 2, 3);
}
template <bool bf16> inline void multiply_1() {
  if constexpr (bf16) _tile_dpbf16ps(1, 2, 3);
  else _tile_dpbsud(1, 2, 3);
}

// Where the words of two vectors of pixels lie: of each step from `source`, or one step after another.
struct Words {
  const char* x;
  const int64_t* source;
  int64_t step, term, vector, row;  // bytes from each to the next
  int64_t at;                       // of the first vector
};

// Steps [first, last) of block `block` of outputs.
struct Part {
  int64_t block, first, last;
  char* expanded;  // of its first step
};

// So many steps of weights and of pixels stay in the first-level cache; reading both from the second takes longer than
// multiplying them.
template <bool bf16> constexpr int64_t part_steps = bf16 ? 6 : 9;

// `bits` of codes that become weights, for the first vectors: a few steps before they are multiplied, as what was
// stored must have reached the cache before a tile is loaded from it. 0: weights are there.
template <bool bf16, int vectors, int bits>
void multiply_part(const MatrixSum& m, const Words& words, const Part& part) {
  constexpr int64_t ahead = 3, code_bytes = block_bytes / (bf16 ? 16 : 8) * bits;
  const int64_t first = part.block * m.steps + part.first, steps = part.last - part.first;
  const char* const weights = m.codes.bits ? part.expanded : m.weights + first * block_bytes;
  const auto expand_step = [&](int64_t s) {
    if constexpr (bits > 0)
      if (s < steps)
        expand<bf16, bits>(m.codes.codes + (first + s) * code_bytes,
                           m.codes.levels + part.block * block_outputs * m.codes.level_stride, m.codes.level_stride,
                           part.expanded + s * block_bytes);
  };
  char* const acc = m.acc + part.block * block_outputs * m.acc_stride + words.at;
  for (int64_t s = 0; s < ahead; ++s) expand_step(s);
  if (part.first == 0) {
    _tile_zero(0);
    if constexpr (vectors > 1) _tile_zero(1);
  } else {
    _tile_loadd(0, acc, m.acc_stride);
    if constexpr (vectors > 1) _tile_loadd(1, acc + row_bytes, m.acc_stride);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const char* x = words.x + (words.source ? words.source[part.first + s] : s * words.step);
    _tile_loadd(2, weights + s * block_bytes, row_bytes);
    for (int t = 0; t < (bf16 ? bf16_terms : 1); ++t, x += words.term) {
      _tile_loadd(3, x, words.row);
      multiply_0<bf16>();
      if constexpr (vectors > 1) {
        _tile_loadd(3, x + words.vector, words.row);
        multiply_1<bf16>();
      }
    }
    expand_step(s + ahead);
  }
  _tile_stored(0, acc, m.acc_stride);
  if constexpr (vectors > 1) _tile_stored(1, acc + row_bytes, m.acc_stride);
}

template <bool bf16, int vectors> void multiply_vectors(const MatrixSum& m, int64_t v, const Part& part) {
  const int64_t at = v * row_bytes;
  constexpr int64_t terms = bf16 ? bf16_terms : 1;
  const Words words =
      m.gathered ? Words{m.words, nullptr, terms * 2 * block_bytes, 2 * block_bytes, block_bytes, row_bytes, at}
                 : Words{m.x + at, m.source, 0, m.term_stride, row_bytes, m.row_stride, at};
  switch (v == 0 ? m.codes.bits : 0) {
    case 1: return multiply_part<bf16, vectors, 1>(m, words, part);
    case 2: return multiply_part<bf16, vectors, 2>(m, words, part);
    case 4: return multiply_part<bf16, vectors, 4>(m, words, part);
    default: return multiply_part<bf16, vectors, 0>(m, words, part);
  }
}

template <bool bf16> void multiply_pair(const MatrixSum& m, int64_t v, const Part& part) {
  v + 2 <= m.vectors ? multiply_vectors<bf16, 2>(m, v, part) : multiply_vectors<bf16, 1>(m, v, part);
}

template <bool bf16> void multiply(const MatrixSum& m) {
  _tile_loadconfig(&whole_tiles);
  const int64_t blocks = (m.outputs + block_outputs - 1) / block_outputs;
  if (m.gathered) {
    for (int64_t v = 0; v < m.vectors; v += 2) {
      v + 2 <= m.vectors ? gather<bf16 ? bf16_terms : 1, 2>(m, v) : gather<bf16 ? bf16_terms : 1, 1>(m, v);
      for (int64_t b = 0; b < blocks; ++b)
        multiply_pair<bf16>(m, v, {b, 0, m.steps, m.expanded + b * m.steps * block_bytes});
    }
  } else {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t s = 0; s < m.steps; s += part_steps<bf16>) {
        const int64_t last = s + part_steps<bf16> < m.steps ? s + part_steps<bf16> : m.steps;
        for (int64_t v = 0; v < m.vectors; v += 2) multiply_pair<bf16>(m, v, {b, s, last, m.expanded});
      }
  }
  _tile_release();
}

// Rows of x are the other operand here as they lie, 16 of 16 words, and so are the words of a panel, 16 of 16 outputs.
// Tiles 0 and 1: sums of two blocks of rows at one of outputs. 2: rows, 3: weights.
template <int blocks> void multiply_rows(const LinearTile& t, int64_t first, int64_t last, bool zero) {
  constexpr int64_t panel_bytes = panel_outputs * 4;
  char *const acc = t.acc, *const next_acc = acc + block_outputs * t.acc_stride;
  if (zero) {
    _tile_zero(0);
    if constexpr (blocks > 1) _tile_zero(1);
  } else {
    _tile_loadd(0, acc, t.acc_stride);
    if constexpr (blocks > 1) _tile_loadd(1, next_acc, t.acc_stride);
  }
  for (int64_t word = first; word < last; word += block_words) {
    const char* const x = t.x + word * 4;
    _tile_loadd(3, t.weights + word * panel_bytes, panel_bytes);
    _tile_loadd(2, x, t.x_stride);
    _tile_dpbusd(0, 2, 3);
    if constexpr (blocks > 1) {
      _tile_loadd(2, x + block_outputs * t.x_stride, t.x_stride);
      _tile_dpbusd(1, 2, 3);
    }
  }
  _tile_stored(0, acc, t.acc_stride);
  if constexpr (blocks > 1) _tile_stored(1, next_acc, t.acc_stride);
}

void linear(const LinearTile& t) {
  const int64_t whole = t.words / block_words * block_words;
  const auto multiply_words = [&](int64_t first, int64_t last, bool zero) {
    for (int64_t o = 0; o < panel_outputs; o += block_outputs) {
      LinearTile part = t;
      part.weights += o * 4;
      part.acc += o * 4;
      for (int row = 0; row < t.rows; row += 32, part.x += 32 * t.x_stride, part.acc += 32 * t.acc_stride)
        t.rows - row > 16 ? multiply_rows<2>(part, first, last, zero) : multiply_rows<1>(part, first, last, zero);
    }
  };
  if (whole) {
    _tile_loadconfig(&whole_tiles);
    multiply_words(0, whole, t.first);
  }
  if (const auto rest = static_cast<uint8_t>(t.words - whole)) {
    TileConfig config;
    config.row_bytes[2] = static_cast<uint16_t>(4 * rest);
    config.rows[3] = rest;
    _tile_loadconfig(&config);
    multiply_words(whole, t.words, t.first && !whole);
  }
  _tile_release();
}

}  // namespace

void fill_avx512_amx(Kernels& k) {
  k.has_matrix_unit = true;
  k.multiply_i8 = multiply<false>;
  k.multiply_bf16 = multiply<true>;
  k.linear_matrix_i8 = linear;
}
}  // namespace pycodesign::repetition
