// Linear layers: lanes are outputs. A part of loops.h.
#pragma once

namespace pycodesign::repetition {
namespace {

// R rows of x by P vectors of outputs.
template <class Math, int R, int P, bool scattered = false> void linear_of(const LinearTile& t) {
  using vec = typename Math::vec;
  constexpr int64_t part_words = 512;
  const char* x[R];
  char* to[R];
  for (int r = 0; r < R; ++r) {
    x[r] = t.x + (scattered ? t.position[r] : r) * t.x_stride;
    to[r] = t.acc + (scattered && t.acc_position ? t.acc_position[r] : r) * t.acc_stride;
  }
  int64_t k = 0;
  do {
    vec acc[R][P] = {};
    const bool is_first = t.first && k == 0;
    for (const int64_t end = t.words - k < part_words ? t.words : k + part_words; k < end; ++k) {
      const char* w = t.weights + k * panel_outputs * 4;
      if constexpr (R == 1) prefetch<P * vector_bytes>(w);
      vec weight[P];
      for (int p = 0; p < P; ++p) weight[p] = Math::load(w + p * vector_bytes);
      for (int r = 0; r < R; ++r) {
        const vec value = Math::broadcast(x[r] + (scattered ? t.source[k] : k * 4));
        for (int p = 0; p < P; ++p) acc[r][p] = Math::multiply_add(acc[r][p], value, weight[p]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) add_part<Math>(to[r] + p * vector_bytes, acc[r][p], is_first);
  } while (k < t.words);
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

void expand_codes(const CodeExpansion& e) {
  const int fields = 4 / e.code_bits;
  const i32v mask = Int::splat(0x0f0f0f0f);
  for (int64_t k = 0; k < e.words; ++k)
    for (int64_t at = 0; at < panel_outputs * 4; at += vector_bytes) {
      i32v codes = Int::load(e.codes + k * panel_outputs * 4 + at);
      char* to = e.to + k * 2 * fields * panel_outputs * 4 + at;
      for (int half = 0; half < 2; ++half, codes = codes >> 4)
        for (int f = 0; f < fields; ++f, to += panel_outputs * 4)
          Int::store(to, levels_of(load_levels(e.level_bytes + f * 16), codes & mask));
    }
}

constexpr int64_t lookup_part_words = 128;  // long float sums are made of parts

// One code looks up the sum of several inputs times their levels.
template <int R, int P> void linear_packed_f32_of(const LinearTile& t) {
  const int half_codes = 16 / t.code_bits;
  const float* at = t.table;
  int64_t k = 0;
  do {
    f32v acc[R][P] = {};
    const bool is_first = k == 0;
    for (const int64_t end = t.words - k < lookup_part_words ? t.words : k + lookup_part_words; k < end; ++k) {
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
      for (int p = 0; p < P; ++p) add_part<Float>(t.acc + r * t.acc_stride + p * vector_bytes, acc[r][p], is_first);
  } while (k < t.words);
}

// The same by two sums of three inputs each.
template <int R, int P> void linear_triples_f32_of(const LinearTile& t) {
  const float* at = t.table;
  int64_t k = 0;
  do {
    f32v acc[R][P] = {};
    const bool is_first = k == 0;
    for (const int64_t end = t.words - k < lookup_part_words ? t.words : k + lookup_part_words; k < end; ++k) {
      const char* w = t.weights + k * panel_outputs * 4;
      if constexpr (R == 1) prefetch<P * vector_bytes>(w);
#pragma GCC unroll 1
      for (int half = 0; half < 2; ++half) {
        u32v codes[P];
        for (int p = 0; p < P; ++p) {
          const u32v word = *reinterpret_cast<const u32v*>(w + p * vector_bytes);
          codes[p] = half ? high_half(word) : word;
        }
        for (int c = 0; c < word_triples; ++c) {
          if (c)
            for (int p = 0; p < P; ++p) codes[p] = shift_half(codes[p], 3);
          for (int r = 0; r < R; ++r) {
            const Octet table = load_octet(at + r * t.table_stride + c * 16 + half * 8);
            for (int p = 0; p < P; ++p) acc[r][p] = acc[r][p] + look_up(table, reinterpret_cast<i32v>(codes[p]));
          }
        }
      }
      at += word_triples * 16;
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) add_part<Float>(t.acc + r * t.acc_stride + p * vector_bytes, acc[r][p], is_first);
  } while (k < t.words);
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

// The same of rows anywhere, in blocks of nearly equal size.
template <class Math, int R, int P> void linear_block(const LinearTile& t, int rows) {
  if constexpr (R > 1)
    if (rows < R) return linear_block<Math, R - 1, P>(t, rows);
  linear_of<Math, R, P, true>(t);
}
template <class Math> void linear_scattered(const LinearTile& t) {
  constexpr int few = pixel_vectors / 2;
  const int blocks = (t.rows + pixel_rows - 1) / pixel_rows, vectors = (t.outputs + lanes - 1) / lanes;
  const int64_t lines = t.next_bytes / 64;
  for (int p = 0; p < vectors; p += pixel_vectors) {
    LinearTile part = t;
    part.weights += p * vector_bytes;
    part.acc += p * vector_bytes;
    for (int b = 0, row = 0; b < blocks; ++b) {
      const int end = static_cast<int>(int64_t{t.rows} * (b + 1) / blocks);
      part.position = t.position + row;
      if (t.acc_position) part.acc_position = t.acc_position + row;
      else part.acc = t.acc + row * t.acc_stride + p * vector_bytes;
      for (int64_t at = lines * b / blocks; p == 0 && at < lines * (b + 1) / blocks; ++at)
        __builtin_prefetch(t.next + at * 64, 0, 2);
      vectors - p > few ? linear_block<Math, pixel_rows, pixel_vectors>(part, end - row)
                        : linear_block<Math, pixel_rows, few>(part, end - row);
      row = end;
    }
  }
}

template <class Math> void linear(const LinearTile& t) {
  if (t.position) return linear_scattered<Math>(t);
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

void linear_triples_f32(const LinearTile& t) {
  for_linear_blocks<packed_rows, linear_vectors>(t, linear_triples_f32_of<packed_rows, linear_vectors>,
                                                 linear_triples_f32_of<1, linear_vectors>);
}

template <int inputs, int entries = 32> void build_lookup_of(const LookupBuild& b) {
  constexpr int vectors = entries / lanes;
  f32v digit[inputs][vectors];
  std::memcpy(digit, b.digit, sizeof digit);
  for (int64_t position = 0; position < b.positions; ++position) {
    const float* x = b.x + position * inputs;
    for (int v = 0; v < vectors; ++v) {
      f32v sum{};
      for (int i = 0; i < inputs; ++i) {
        const f32v more = fma(Float::splat(x[i]), digit[i][v], sum);
        sum = digit[i][v] != 0 ? more : sum;  // what is infinite may belong to other sums
      }
      Float::store(b.table + position * entries + v * lanes, sum);
    }
  }
}
void build_lookup(const LookupBuild& b) {
  if (b.entries == 16) return b.inputs == 3 ? build_lookup_of<3, 16>(b) : build_lookup_of<6, 16>(b);
  b.inputs == 2 ? build_lookup_of<2>(b) : b.inputs == 3 ? build_lookup_of<3>(b) : build_lookup_of<5>(b);
}

}  // namespace
}  // namespace pycodesign::repetition
