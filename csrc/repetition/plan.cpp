// Everything decided before a pixel is seen: dispatch, the levels, the choice of an algorithm, the tables of a layer,
// the lifted layout.
#include "repetition/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>

#include "core/cpu.h"

namespace pycodesign::repetition {

const Kernels& kernels() {
  static const auto table = [] {
    std::array<Kernels, 5> all{};
    for (auto& k : all) fill_scalar(k);
#if defined(__x86_64__)
    for (const core::Isa isa : core::supported_isas()) {
      Kernels& k = all[static_cast<size_t>(isa)];
      if (isa >= core::Isa::avx2) fill_avx2(k);
      if (isa == core::Isa::avx2_vnni) fill_avx2_vnni(k);
      if (isa >= core::Isa::avx512) fill_avx512(k);
    }
#endif
    return all;
  }();
  return table[static_cast<size_t>(core::active_isa())];
}

const char* algorithm_name(Algorithm a) {
  return a == Algorithm::tables ? "tables" : a == Algorithm::dense ? "dense" : "packed";
}

std::vector<float> distinct_levels(const Weights& w) {
  std::set<float> values(w.levels, w.levels + w.level_rows * w.level_count);
  return {values.begin(), values.end()};
}

// The cost model: cycles of a core that loads one 64-byte vector per cycle, fitted on the layers of ResNet-18.
double tile_cost(double vectors, double width, double entries, double block, double outputs, double slots,
                 double vector_bytes) {
  constexpr double build = 3.2;  // per vector of an entry
  constexpr double output = 2;   // per vector of a sum, loaded and stored
  constexpr double slot = 0.7;   // per byte of the stream
  // Per vector added: tables in the first-level cache, spilling from it, in the second, beyond.
  const double bytes = entries * block * width * vector_bytes;
  double load = 4;
  if (bytes <= 32 << 10) load = 1.25;
  else if (bytes <= 64 << 10) load = 1.3;
  else if (bytes <= 112 << 10) load = 1.45;
  else if (bytes <= 512 << 10) load = 1.75;
  return entries * block * width * build + outputs * (slots * (vectors * load + slot) + vectors * output);
}

// Entries of the full table of `inputs` inputs, up to sign: every prefix of every pattern, zero included.
int64_t table_entries(const std::vector<float>& levels, int inputs) {
  // Patterns of levels that all have their negative among the levels halve; the zero pattern is its own negative.
  const bool zero = std::find(levels.begin(), levels.end(), 0.0f) != levels.end();
  const auto paired = std::count_if(levels.begin(), levels.end(), [&](float l) {
    return std::find(levels.begin(), levels.end(), -l) != levels.end();
  });
  const auto patterns = [&](int size) {
    const double all = std::pow(static_cast<double>(levels.size()), size),
                 halved = std::pow(static_cast<double>(paired), size);
    return all - halved + (halved + zero) / 2;
  };
  double entries = patterns(inputs);
  // Without a zero level the prefixes are entries of their own, and so is the zero that pads the last channels.
  if (!zero)
    for (int i = 1; i < inputs; ++i) entries += patterns(i);
  return entries > 1e6 ? 1000000 : static_cast<int64_t>(entries);
}

TableChoice choose_table(const std::vector<float>& levels, const Geometry& g, int64_t group_outputs) {
  constexpr double vector_bytes = 64,
                   most_table_bytes = 1 << 20;  // tables beyond the second-level cache pay for nothing
  const auto taps = static_cast<double>(g.kernel[0] * g.kernel[1]), outputs = static_cast<double>(group_outputs);
  const int64_t channels = g.channels / g.groups;
  TableChoice best;
  for (int size = 1; size <= 8 && size <= channels; ++size) {
    const int64_t entries = table_entries(levels, size), units = (channels + size - 1) / size;
    if (entries > max_table_entries) break;
    for (int block = 1; block <= 8 && block <= units; ++block)
      for (const double vectors : {4, 6, 8}) {  // the input's size comes later, with the plan
        // For each row of the filter one run of vectors per column phase; further taps of a phase add the vectors that
        // they are apart, or a run of their own.
        const auto phases = static_cast<double>(std::min(g.kernel[1], g.stride[1]));
        const double apart = std::min(static_cast<double>(g.dilation[1]), vectors);
        const double width =
            static_cast<double>(g.kernel[0]) * (phases * vectors + (static_cast<double>(g.kernel[1]) - phases) * apart);
        if (block > 1 && static_cast<double>(entries * block) * width * vector_bytes > most_table_bytes) continue;
        const double cost =
            tile_cost(vectors, width, static_cast<double>(entries), block, outputs, block * taps, vector_bytes);
        const double total = cost * static_cast<double>(units) / (block * vectors);
        if (best.size == 0 || total < best.cost) best = {size, block, total};
      }
  }
  return best;
}

Choice choose_conv2d(const Weights& w, const Geometry& g, const Activations& a) {
  if (a.dtype != DType::f32) return {Algorithm::dense, "8-bit dot products beat tables for 8-bit inputs"};
  const auto levels = distinct_levels(w);
  if (levels.size() > 16) return {Algorithm::dense, "more than 16 levels"};
  const int64_t group_outputs = w.outputs / g.groups;
  const TableChoice tables = choose_table(levels, g, group_outputs);
  constexpr double dense_cost = 1.25;  // cycles per multiply-add of a vector
  const double blocks = std::ceil(static_cast<double>(group_outputs) / dense_outputs) * dense_outputs;
  const double dense = static_cast<double>(w.inputs) *
                       (group_outputs < dense_outputs ? static_cast<double>(group_outputs) : blocks) * dense_cost;
  if (tables.size == 0 || tables.cost >= dense)
    return {Algorithm::dense, "too few outputs per table entry for tables to pay"};
  return {Algorithm::tables,
          "predicted " + std::to_string(tables.cost / dense).substr(0, 4) + " of the time of dense sums"};
}

Choice choose_linear(const Weights& w, const Activations&) {
  if (distinct_levels(w).size() <= 4) return {Algorithm::packed, "at most 4 levels: fewest weight bytes"};
  return {Algorithm::dense, "more than 4 levels"};
}

namespace {

struct Axis {
  int64_t out, reach, pitch;            // output size, largest tap offset, positions from one line to the next
  std::map<int64_t, PhaseAxis> phases;  // by residue of the stride, those that taps read
};

// Padding behind one line serves as padding before the next where both are wide enough.
Axis plan_axis(const Geometry& g, int axis, int64_t size) {
  const int64_t stride = g.stride[axis], pad = g.padding[axis], dilation = g.dilation[axis];
  Axis a;
  a.out = g.output_size(axis, size);
  a.reach = (g.kernel[axis] - 1) * dilation / stride;
  const int64_t span = a.out + a.reach;
  int64_t shared = span;
  for (int64_t k = 0; k < g.kernel[axis]; ++k) {
    const int64_t p = k * dilation % stride;
    const int64_t padded = p >= pad ? 0 : (pad - p + stride - 1) / stride;
    const int64_t first = padded * stride + p - pad, lead = std::min(padded, span);
    const int64_t data = std::clamp<int64_t>((size - first + stride - 1) / stride, 0, span - lead);
    a.phases[p] = {lead, data, first};
    shared = std::min({shared, lead, span - lead - data});
  }
  a.pitch = span - shared;
  return a;
}

}  // namespace

LiftPlan::LiftPlan(const Geometry& g, int64_t images, int64_t height, int64_t width, int lanes) : images(images) {
  const Axis rows = plan_axis(g, 0, height), columns = plan_axis(g, 1, width);
  out_rows = rows.out;
  out_columns = columns.out;
  row_pitch = columns.pitch;
  image_pitch = rows.pitch * row_pitch;
  const int64_t used = (images - 1) * image_pitch + (out_rows - 1) * row_pitch + out_columns;
  segment = (used + lanes - 1) / lanes;
  positions = lanes * (segment + 1) + rows.reach * row_pitch + columns.reach;

  std::map<std::pair<int64_t, int64_t>, int> index;
  for (int64_t r = 0; r < g.kernel[0]; ++r) {
    for (int64_t s = 0; s < g.kernel[1]; ++s) {
      const int64_t y = r * g.dilation[0], x = s * g.dilation[1];
      const std::pair key{y % g.stride[0], x % g.stride[1]};
      const auto [at, is_new] = index.emplace(key, static_cast<int>(phases.size()));
      if (is_new) phases.push_back({rows.phases.at(key.first), columns.phases.at(key.second), {}});
      taps.push_back({at->second, y / g.stride[0] * row_pitch + x / g.stride[1]});
    }
  }
  // A tap reads the vectors [offset, offset + segment): they either extend the last span or begin one.
  plane_vectors = 0;
  for (const int t : ascending_taps()) {
    Tap& tap = taps[static_cast<size_t>(t)];
    std::vector<Span>& spans = phases[static_cast<size_t>(tap.phase)].spans;
    if (spans.empty()) spans.push_back({tap.offset, segment, 0});
    else if (Span& last = spans.back(); tap.offset <= last.first + last.count)
      last.count = tap.offset + segment - last.first;
    else spans.push_back({tap.offset, segment, last.at + last.count});
    tap.offset += spans.back().at - spans.back().first;
    plane_vectors = std::max(plane_vectors, spans.back().at + spans.back().count);
  }
  plane_vectors =
      (plane_vectors + lanes) | 1;  // room for a block that runs over; odd: planes start in different cache sets
}

std::vector<int> LiftPlan::ascending_taps() const {
  std::vector<int> order(taps.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    const Tap &x = taps[static_cast<size_t>(a)], &y = taps[static_cast<size_t>(b)];
    return std::pair(x.phase, x.offset) < std::pair(y.phase, y.offset);
  });
  return order;
}

std::vector<TapSegment> LiftPlan::tap_segments(int vectors_per_tile) const {
  std::vector<TapSegment> segments;
  for (const int t : ascending_taps()) {
    const Tap& tap = taps[static_cast<size_t>(t)];
    // A gap wider than a tile is cheaper as a segment of its own.
    if (segments.empty() || segments.back().phase != tap.phase ||
        tap.offset - segments.back().last() > vectors_per_tile)
      segments.push_back({tap.phase, tap.offset, {}});
    segments.back().taps.push_back({t, tap.offset - segments.back().offset});
  }
  return segments;
}

TablePlan::TablePlan(const LiftPlan& lift, const Layer& layer, const Kernels& k, int threads) {
  const int64_t vector_bytes = k.lanes * 4, plane = lift.plane_vectors * vector_bytes;
  const auto taps = static_cast<int64_t>(lift.taps.size());
  const auto width_of = [&](int vectors_) {
    int64_t sum = 0;
    for (const TapSegment& s : lift.tap_segments(vectors_)) sum += vectors_ + s.taps.back().shift;
    return sum;
  };
  // Tiles of nearly equal width, as wide as the caches like; outputs split where that makes threads finish together.
  double best = std::numeric_limits<double>::max();
  for (int v = 1; v <= k.max_table_vectors; ++v) {
    const auto wide = static_cast<double>(width_of(v));
    const int64_t least = (lift.segment + v - 1) / v;
    for (int64_t count = least; count < least + threads && count <= lift.segment; ++count)
      for (int64_t split = 1; split <= 2 * threads && split <= layer.group_outputs; ++split) {
        const int64_t rounds = (count * split * layer.groups + threads - 1) / threads;
        const double cost =
            static_cast<double>(rounds) *
            tile_cost(static_cast<double>(lift.segment) / static_cast<double>(count), wide, layer.entries, layer.block,
                      static_cast<double>(layer.group_outputs) / static_cast<double>(split),
                      static_cast<double>(layer.block * taps), static_cast<double>(vector_bytes));
        if (cost < best) best = cost, vectors = v, tiles = count, splits = split;
      }
  }
  slot_offset.resize(static_cast<size_t>(layer.block * taps));
  for (const TapSegment& s : lift.tap_segments(vectors)) {
    segment_source.push_back(s.phase * plane + s.offset * vector_bytes);
    segment_at.push_back(width * vector_bytes);
    segment_shift.push_back(static_cast<int>(s.taps.back().shift));
    for (const auto& [tap, shift] : s.taps) slot_offset[static_cast<size_t>(tap)] = (width + shift) * vector_bytes;
    width += vectors + s.taps.back().shift;
  }
  const int64_t unit_bytes = width * vector_bytes * layer.entries;
  for (int64_t slot = taps; slot < layer.block * taps; ++slot)
    slot_offset[static_cast<size_t>(slot)] = slot_offset[static_cast<size_t>(slot % taps)] + slot / taps * unit_bytes;
}

}  // namespace pycodesign::repetition
