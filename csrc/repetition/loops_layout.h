// Into the lifted layout and out of it. A part of loops.h.
#pragma once

namespace pycodesign::repetition {
namespace {

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
  if constexpr (step > 0) {
    if (count > lanes) {
      for (int64_t i = 0; i + lanes < count; i += lanes) interleave<step, false>(p, i, flip, out);
      return interleave<step, true>(p, count - lanes, flip, out);
    }
    if (interleave_first<step>(p, count, flip, out)) return;
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
    case Staging::bf16_terms:
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
  constexpr uint32_t even = 0x00ff00ff, lower = 0xffff;
  for (int64_t i = 0; i < count && i < lanes; ++i) {
    const u32v low0 = low[i] & even, low1 = low[i] >> 8 & even, high0 = high[i] & even, high1 = high[i] >> 8 & even;
    const u32v pairs[4] = {(low0 & lower) | high0 << 16, (low1 & lower) | high1 << 16, low0 >> 16 | (high0 & ~lower),
                           low1 >> 16 | (high1 & ~lower)};
    char* to = s.lifted + (at + i) * vector_bytes;
    for (int c = 0; c < s.channels; ++c, to += s.channel_stride)
      *reinterpret_cast<u16v*>(to) = reinterpret_cast<u16v>(pairs[c]) - center;
  }
}

// The three bfloat16, in the upper halves of words, whose sum a float is: each the leading bits of what is left.
// Infinity is one term; the last terms of magnitudes below 2^-103 may be lost.
struct Terms {
  u32v term[bf16_terms];
  explicit Terms(u32v x) {
    const u32v infinite = reinterpret_cast<u32v>((x & 0x7fffffffu) == 0x7f800000u);
    term[0] = x & 0xffff0000u;
    const u32v rest = reinterpret_cast<u32v>(reinterpret_cast<f32v>(x) - reinterpret_cast<f32v>(term[0])) & ~infinite;
    term[1] = rest & 0xffff0000u;
    term[2] = reinterpret_cast<u32v>(reinterpret_cast<f32v>(rest) - reinterpret_cast<f32v>(term[1]));
  }
};

void store_pairs(const Terms& first, const Terms& second, char* to, int64_t stride) {
  for (int t = 0; t < bf16_terms; ++t, to += stride)
    *reinterpret_cast<u32v*>(to) = first.term[t] >> 16 | (second.term[t] & 0xffff0000u);
}

// Blocks of two channels to planes of pairs of terms.
void split_terms(const Stage& s, int64_t position, int64_t at, int64_t count) {
  u32v first[lanes], second[lanes];
  const char* from = s.flat + position * 4;
  transpose(from, s.segment * 4, lanes, reinterpret_cast<char*>(first), vector_bytes, count);
  transpose(from + s.positions * 4, s.segment * 4, lanes, reinterpret_cast<char*>(second), vector_bytes, count);
  for (int64_t i = 0; i < count && i < lanes; ++i)
    store_pairs(Terms(first[i]), Terms(second[i]), s.lifted + (at + i) * vector_bytes, s.channel_stride);
}

void stage(const Stage& s) {
  const bool halves = s.staging == Staging::halves_i16, bytes = halves || s.staging == Staging::bytes4,
             terms = s.staging == Staging::bf16_terms;
  const int images_of_channels = terms ? 2 : 1;
  const uint32_t flip = s.dtype == DType::i8 ? 0x80808080u : 0u;
  const uint32_t padding = bytes ? (static_cast<uint32_t>(s.zero_point) & 0xff) * 0x01010101u ^ flip : 0;
  uint32_t* flat = reinterpret_cast<uint32_t*>(s.flat);
  for (int64_t i = 0; i < s.positions * images_of_channels + s.half; ++i) flat[i] = padding;

  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t r = 0; r < s.rows.data; ++r) {
      uint32_t* row = flat + n * s.image_pitch + (s.rows.lead + r) * s.row_pitch + s.columns.lead;
      const char* p[4];
      for (int c = 0; c < 4; ++c) p[c] = s.source[c < s.channels ? c : 0] + n * s.stride_n + r * s.stride_h;
      stage_row(s, p, flip, row);
      if (terms && s.channels > 1) stage_row(s, p + 1, flip, row + s.positions);
    }

  for (int i = 0; i < s.span_count; ++i) {  // vectors side by side
    const Span& span = s.spans[i];
    for (int64_t j = 0; j < span.count; j += lanes)
      if (halves) split_halves(s, span.first + j, span.at + j, span.count - j);
      else if (terms) split_terms(s, span.first + j, span.at + j, span.count - j);
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
    case Staging::bf16_terms:
      for (int64_t v = 0; v < s.vectors; ++v) {
        const u32v mask = *reinterpret_cast<const u32v*>(s.mask + v * vector_bytes);
        u32v first, second{};
        std::memcpy(&first, s.source[0] + s.first[v] * 4, sizeof first);
        if (s.channels > 1) std::memcpy(&second, s.source[1] + s.first[v] * 4, sizeof second);
        store_pairs(Terms(first & mask), Terms(second & mask), s.lifted + v * vector_bytes, s.channel_stride);
      }
      return put_halos<uint32_t>(s, [&](int64_t at, int lane, int c, uint32_t x) {
        const Terms terms(splat_bits(x));
        for (int t = 0; t < bf16_terms; ++t) {
          const auto upper = static_cast<uint16_t>(terms.term[t][0] >> 16);
          std::memcpy(s.lifted + t * s.channel_stride + at + lane * 4 + c * 2, &upper, 2);
        }
      });
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

// One pattern of `terms` rows for all vectors, `step` bytes apart.
template <class Math, int terms, bool minus1, bool minus2>
void sum_column(const char* const* row, int64_t vectors, int64_t step, char* to) {
  for (int64_t at = 0; at < vectors * vector_bytes; at += vector_bytes, to += step) {
    typename Math::vec sum{};
    if constexpr (terms > 0) sum = Math::load(row[0] + at);
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
    const auto sum = n == 0   ? sum_column<Math, 0, false, false>
                     : n == 1 ? sum_column<Math, 1, false, false>
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

void turn(const Turn& t) {
  for (int64_t r = 0; r < t.rows; r += lanes)
    for (int64_t c = 0; c < t.columns; c += lanes)
      transpose(t.from + r * t.from_stride + c * 4, t.from_stride, t.rows - r, t.to + c * t.to_stride + r * 4,
                t.to_stride, t.columns - c);
}

}  // namespace
}  // namespace pycodesign::repetition
