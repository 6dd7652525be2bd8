// Dense sums of convolutions whose lanes are outputs, not pixels: each pixel's channels lie in one row, a tap reads a
// row from some distance, and no lane is spent on the borders of small maps. See README.md.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "repetition/costs.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

namespace {

constexpr int64_t row_units = 16;  // words staged at a time

// The levels of a row and zero, ascending.
std::vector<float> with_zero(const float* levels, int64_t count) {
  std::vector<float> all(levels, levels + count);
  all.insert(std::lower_bound(all.begin(), all.end(), 0.0f), 0);
  return all;
}

// Whether zero is among the levels of every output.
bool have_zero(const Weights& w) {
  for (int64_t r = 0; r < w.level_rows; ++r)
    if (!std::binary_search(w.levels + r * w.level_count, w.levels + (r + 1) * w.level_count, 0.0f)) return false;
  return true;
}

bool channels_last(const Tensor& t, DType dtype) { return !t.lifted && t.stride[1] == element_bytes(dtype); }

// Whether the pixels of a band follow one another, too.
bool pixels_follow(const LiftPlan& lift, const Tensor& t, DType dtype) {
  const Band& band = lift.band;
  return channels_last(t, dtype) && (band.rows == 1 || t.stride[2] == lift.columns * t.stride[3]) &&
         (band.images == 1 || t.stride[0] == band.rows * lift.columns * t.stride[3]) &&
         static_cast<int64_t>(lift.rows.pixels.size()) == band.images * band.rows * lift.columns;
}

}  // namespace

RowPlan::RowPlan(const LiftPlan& lift, const Geometry& g, int64_t units, int64_t words) {
  for (int64_t n = 0; n < lift.band.images; ++n)
    for (int64_t y = 0; y < lift.band.rows; ++y)
      for (int64_t x = 0; x < lift.columns; ++x)
        pixels.push_back(static_cast<int32_t>(n * lift.image_pitch + y * lift.row_pitch + x));
  // Outputs of nothing but padding may share one.
  std::sort(pixels.begin(), pixels.end());
  pixels.erase(std::unique(pixels.begin(), pixels.end()), pixels.end());
  // One word, or an odd number of lines: rows begin in cache sets far apart.
  row_bytes = units == 1 ? 4 : (divide_up(units, row_units) | 1) * row_units * 4;
  std::vector<int64_t> taps;  // rows
  for (int64_t r = 0, tap = 0; r < g.kernel[0]; ++r)
    for (int64_t s = 0; s < g.kernel[1]; ++s, ++tap)
      taps.push_back(r * g.dilation[0] / g.stride[0] * lift.row_pitch + s * g.dilation[1] / g.stride[1]);
  const int64_t used = pixels.back() + 1 + *std::max_element(taps.begin(), taps.end());
  positions = divide_up(used, row_units) * row_units;
  for (size_t tap = 0; tap < taps.size(); ++tap)
    for (int64_t word = 0; word < units; ++word)
      source.push_back((lift.taps[tap].phase * positions + taps[tap]) * row_bytes + word * 4);
  source.resize(static_cast<size_t>(words), units * 4);  // of codes that stand for no input: zeros behind a pixel
}

bool serves_rows(const Weights& w, const Geometry& g, const Activations& a) {
  constexpr int64_t least_words = 16, least_channels = 16, outputs_together = 32;
  constexpr int64_t most_levels = 255;  // that zero can join
  const bool is_float = a.dtype == DType::f32, whole = is_float || g.channels % 4 == 0;
  const int64_t words = divide_up(g.channels, is_float ? 1 : 4) * g.kernel[0] * g.kernel[1];
  const Kernels& k = kernels();
  return k.lanes >= 8 && (is_float || !k.dense_narrow) && g.groups == 1 &&
         (g.channels >= least_channels || (!is_float && g.channels <= 4)) && (w.codes || w.codebook) &&
         (whole || w.level_count <= most_levels || have_zero(w)) && words >= least_words &&
         4 * w.outputs >= 3 * divide_up(w.outputs, outputs_together) * outputs_together;
}

double row_share(int64_t outputs) {
  const double pixels = likely_pixels(outputs), lanes = kernels().lanes;
  return pixels / lanes / std::ceil((pixels + std::sqrt(pixels) - 1) / lanes);
}

void PackedConv2d::pack_rows(const Weights& w) {
  constexpr int64_t most_inputs = 32;  // of a word of codes
  const bool is_float = activations_.dtype == DType::f32;
  staging_ = is_float ? Staging::f32 : Staging::bytes4;
  set_correction(w, activations_.dtype == DType::i8 ? -128 : 0);
  stage_channels_ = row_units * unit_channels_;
  blocks_ = divide_up(outputs_, panel_outputs);
  Weights by_tap = w;
  // Words repeat the first channel where others are missing: the weights of those are zeros.
  row_channels_ = units_ * unit_channels_;
  std::vector<float> levels;
  if (row_channels_ > group_channels_ && !have_zero(w)) {
    for (int64_t r = 0; r < w.level_rows; ++r)
      for (const float level : with_zero(w.levels + r * w.level_count, w.level_count)) levels.push_back(level);
    by_tap.levels = levels.data();
    ++by_tap.level_count;
  }
  const std::vector<float> distinct = distinct_levels(by_tap);
  const double largest = std::max(std::abs(distinct.front()), std::abs(distinct.back()));
  const int64_t inputs = divide_up(row_channels_ * taps_, most_inputs) * most_inputs;
  const bool few = !is_float && units_ > 1 && distinct.size() <= 4 &&
                   largest * static_cast<double>(256 * inputs) <= std::numeric_limits<int32_t>::max();
  std::vector<uint8_t> codes;
  for (int64_t o = 0; o < outputs_; ++o) {
    const float* const row = by_tap.levels + (w.level_rows == 1 ? 0 : o) * by_tap.level_count;
    const auto code_of = [&](float level) {
      return static_cast<uint8_t>(std::lower_bound(row, row + by_tap.level_count, level) - row);
    };
    for (int64_t t = 0; t < taps_; ++t)
      for (int64_t c = 0; c < row_channels_; ++c)
        codes.push_back(code_of(c < group_channels_ ? w.level(o, c * taps_ + t) : 0));
  }
  by_tap.inputs = taps_ * row_channels_;
  by_tap.codes = codes.data();
  rows_ = std::make_unique<PackedLinear>(by_tap, activations_, few ? Algorithm::packed : Algorithm::dense);
  cycles_ = halves() * dense_cycles(outputs_, inputs_, activations_, 0, row_finish);
}

std::vector<uint8_t> PackedConv2d::row_codes() const {
  const std::vector<uint8_t> by_tap = rows_->codes();
  std::vector<uint8_t> codes;
  for (int64_t o = 0; o < outputs_; ++o)
    for (int64_t c = 0; c < group_channels_; ++c)
      for (int64_t t = 0; t < taps_; ++t)
        codes.push_back(code_of(o, rows_->level(o, by_tap[static_cast<size_t>((o * taps_ + t) * row_channels_ + c)])));
  return codes;
}

// Sixteen words of all pixels: flat, one after another, and then turned. One word is a row as it is.
void PackedConv2d::stage_rows(const Call& call, const LiftPlan& lift, int64_t index, char* rows) const {
  if (units_ == 1) {
    for (size_t p = 0; p < lift.phases.size(); ++p) {
      Stage s = stage_of(call, lift, p, 0, group_channels_);
      s.positions = lift.rows.positions;
      s.flat = rows + static_cast<int64_t>(p) * lift.rows.positions * lift.rows.row_bytes;
      call.k.stage(s);
    }
    return;
  }
  if (channels_last(call.x, activations_.dtype)) return copy_rows(call, lift, index, rows);
  const int64_t flat_bytes = lift.rows.positions * 4, first = index * stage_channels_,
                count = std::min(stage_channels_, group_channels_ - first), units = divide_up(count, unit_channels_);
  char* const flat = scratch(1, static_cast<size_t>(row_units * flat_bytes));
  std::fill_n(flat + units * flat_bytes, (row_units - units) * flat_bytes, '\0');
  for (size_t p = 0; p < lift.phases.size(); ++p) {
    char* const to = rows + static_cast<int64_t>(p) * lift.rows.positions * lift.rows.row_bytes;
    for (int64_t u = 0; u < units; ++u) {
      const int64_t channel = u * unit_channels_;
      Stage s = stage_of(call, lift, p, first + channel, std::min(unit_channels_, count - channel));
      s.positions = lift.rows.positions;
      s.flat = flat + u * flat_bytes;
      call.k.stage(s);
    }
    call.k.turn({flat, flat_bytes, row_units, lift.rows.positions, to + index * row_units * 4, lift.rows.row_bytes});
  }
}

// The same of pixels whose channels lie side by side.
void PackedConv2d::copy_rows(const Call& call, const LiftPlan& lift, int64_t index, char* rows) const {
  constexpr int64_t line = row_units * 4;
  using Line = std::array<uint8_t, line>;
  const int64_t at = index * line, channel_bytes = group_channels_ * element_bytes(activations_.dtype),
                bytes = std::min(line, channel_bytes - at);
  const uint8_t flip = activations_.dtype == DType::i8 ? 0x80 : 0;
  Line padding{};
  if (activations_.dtype != DType::f32)
    std::fill_n(padding.begin(), bytes, static_cast<uint8_t>(activations_.zero_point) ^ flip);
  for (size_t p = 0; p < lift.phases.size(); ++p) {
    const Stage s = stage_of(call, lift, p, 0, 1);
    char* to = rows + static_cast<int64_t>(p) * lift.rows.positions * lift.rows.row_bytes + at;
    int64_t position = 0;
    const auto pad = [&](int64_t end) {
      for (; position < end; ++position, to += lift.rows.row_bytes) std::memcpy(to, padding.data(), line);
    };
    for (int64_t n = 0; n < s.images; ++n)
      for (int64_t r = 0; r < s.rows.data; ++r) {
        pad(n * s.image_pitch + (s.rows.lead + r) * s.row_pitch + s.columns.lead);
        const char* from = s.source[0] + n * s.stride_n + r * s.stride_h + at;
        for (int64_t c = 0; c < s.columns.data; ++c, ++position, from += s.stride_w, to += lift.rows.row_bytes) {
          Line pixel{};
          if (bytes == line) std::memcpy(pixel.data(), from, line);
          else std::memcpy(pixel.data(), from, static_cast<size_t>(bytes));
          if (flip)
            for (int64_t b = 0; b < bytes; ++b) pixel[static_cast<size_t>(b)] ^= flip;
          std::memcpy(to, pixel.data(), line);
        }
      }
    pad(lift.rows.positions);
  }
}

// Panels [first, last) of outputs: the sums of a pixel side by side, finished as they lie, or turned into lanes of
// pixels.
void PackedConv2d::sum_rows(const Call& call, const LiftPlan& lift, const char* rows, int64_t first,
                            int64_t last) const {
  const int64_t vector_bytes = call.vector_bytes(), vectors = lift.segment * halves(), lanes = call.k.lanes,
                plane = (vectors | 1) * vector_bytes, position_bytes = panel_outputs * 4,
                pixel_bytes = lift.segment * lift.lanes * position_bytes;
  char* const pixels = scratch(2, static_cast<size_t>(pixel_bytes + panel_outputs * plane));
  char* const sums = pixels + pixel_bytes;
  const bool stay = pixels_follow(lift, call.out, call.epilogue.out_dtype) &&
                    (!call.residual || pixels_follow(lift, *call.residual, call.epilogue.residual_dtype));
  LinearTile t{};
  t.x = rows;
  t.x_stride = lift.rows.row_bytes;
  t.rows = static_cast<int>(lift.rows.pixels.size());
  t.acc = pixels;
  t.acc_stride = position_bytes;
  t.position = lift.rows.pixels.data();
  t.acc_position = stay ? nullptr : t.position;
  t.source = lift.rows.source.data();
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t output = panel * panel_outputs, count = std::min<int64_t>(panel_outputs, outputs_ - output);
    t.outputs = static_cast<int>(count);
    if (stay) {
      Finish f = finish_of(call, output);
      f.per_element = true;
      f.count = count;
      f.acc_step = position_bytes;
      f.out_stride = element_bytes(call.epilogue.out_dtype);
      f.out_step = call.out.stride[3];
      f.residual_stride = element_bytes(call.epilogue.residual_dtype);
      f.residual_step = call.residual ? call.residual->stride[3] : 0;
      const auto finish = [&](int64_t pixel, int64_t pixels_here, const char* acc) {
        const auto at = [&](const Tensor& to) {
          return to.data + lift.band.image * to.stride[0] + output * to.stride[1] + lift.band.row * to.stride[2] +
                 pixel * to.stride[3];
        };
        f.acc = acc;
        f.outputs = pixels_here;
        f.out = at(call.out);
        f.residual = call.residual ? at(*call.residual) : nullptr;
        call.k.finish(f);
      };
      rows_->sum_panel(call.k, panel, t, std::ref(finish));  // allocates nothing
      continue;
    }
    rows_->sum_panel(call.k, panel, t);
    for (int64_t j = 0; j < lift.segment; ++j)
      for (int64_t h = 0; h < halves(); ++h)
        call.k.turn({pixels + (j + h * lanes * lift.segment) * position_bytes, lift.segment * position_bytes, lanes,
                     count, sums + (j * halves() + h) * vector_bytes, plane});
    finish_outputs(call, lift, {sums, plane, halves() * vector_bytes, output, count});
  }
}

}  // namespace pycodesign::repetition
