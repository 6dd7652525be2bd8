// Everything decided before a pixel is seen: dispatch, the levels, the choice of an algorithm, the tables of a layer,
// the lifted layout.
#include "repetition/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "core/cpu.h"
#include "core/executable_memory.h"
#include "repetition/costs.h"

namespace pycodesign::repetition {

const Kernels& kernels() {
  static const auto table = [] {
    std::array<Kernels, 6> all{};
    for (auto& k : all) fill_scalar(k);
#if defined(__x86_64__)
    for (const core::Isa isa : core::supported_isas()) {
      Kernels& k = all[static_cast<size_t>(isa)];
      if (isa >= core::Isa::avx2) fill_avx2(k);
      if (isa == core::Isa::avx2_vnni) fill_avx2_vnni(k);
      if (isa >= core::Isa::avx512) fill_avx512(k);
      if (isa >= core::Isa::avx512_vbmi) fill_avx512_vbmi(k);
      if (isa >= core::Isa::avx512_amx) fill_avx512_amx(k);
    }
#endif
    return all;
  }();
  return table[static_cast<size_t>(core::active_isa())];
}

bool generates_code() { return kernels().generates_code && core::ExecutableMemory::available(); }

const char* algorithm_name(Algorithm a) {
  switch (a) {
    case Algorithm::codegen: return "codegen";
    case Algorithm::tables: return "tables";
    case Algorithm::dense: return "dense";
    case Algorithm::packed: return "packed";
    default: return "codebook";
  }
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

int32_t code_center(const Activations& a) { return a.dtype == DType::u8 ? 1 << ((a.bits ? a.bits : 8) - 1) : 0; }

CodeLayer code_layer(const Weights& w, const Geometry& g, const Activations& a) {
  const int64_t half = int64_t{1} << ((a.bits ? a.bits : 8) - 1);
  return {&w, g, a.dtype, std::max<int64_t>(half, std::abs(a.zero_point - code_center(a)))};
}

Choice choose_conv2d(const Weights& w, const Geometry& g, const Activations& a) {
  const auto levels = distinct_levels(w);
  if (levels.empty()) return {Algorithm::codebook, "kernels of real values"};
  const int64_t group_outputs = w.outputs / g.groups;
  const bool integers = a.dtype != DType::f32;
  const int64_t outputs =
      g.groups * (group_outputs < dense_outputs ? group_outputs : block_count(group_outputs) * dense_outputs);
  const int64_t words = (g.channels / g.groups + 3) / 4;  // of four 8-bit channels
  const bool rows = serves_rows(w, g, a);
  const int64_t inputs = integers ? words * 4 * g.kernel[0] * g.kernel[1] : w.inputs;
  const double by_vectors = rows ? dense_cycles(outputs, inputs, a, 0, row_finish) * row_share(w.outputs)
                                 : dense_cycles(outputs, inputs, a, narrow_run(w, a)),
               by_matrices = matrix_cycles(w, g, a), dense = std::min(by_vectors, by_matrices);
  const auto predicted = [&](double cycles) {
    return "predicted " + std::to_string(cycles / dense).substr(0, 4) + " of the time of dense sums";
  };
  const double book = w.codebook ? choose_codebook(*w.codebook, g, w.outputs, a).cost : dense;
  if (levels.size() > 16 && book >= dense) return {Algorithm::dense, "more than 16 levels"};
  if (generates_code() && levels.size() <= 16) {
    constexpr double pairs = 4;  // more cycles to stage a channel as 16-bit pairs than as bytes
    const auto phases =
        static_cast<double>(std::min(g.kernel[0], g.stride[0]) * std::min(g.kernel[1], g.stride[1]) * g.channels);
    const double sums = code_cost(code_layer(w, g, a), kernels().lanes == 16).cold,
                 code = integers ? sums / 2 + phases * pairs : sums;
    if (code < dense && code <= book) return {Algorithm::codegen, predicted(code)};
    if (book >= dense)
      return {Algorithm::dense, by_matrices < by_vectors
                                    ? "a matrix unit (AMX) multiplies faster than shared sums are added"
                                    : "machine code: " + predicted(code)};
  }
  if (book < dense) return {Algorithm::codebook, predicted(book)};
  if (integers) return {Algorithm::dense, "8-bit dot products beat tables for 8-bit inputs"};
  const TableChoice tables = choose_table(levels, g, group_outputs);
  if (tables.size == 0 || tables.cost * static_cast<double>(g.groups) >= dense)
    return {Algorithm::dense, "too few outputs per table entry for tables to pay"};
  return {Algorithm::tables, predicted(tables.cost * static_cast<double>(g.groups))};
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

// Outputs [first, first + count) of one axis. Padding behind one line serves as padding before the next where both are
// wide enough.
Axis plan_axis(const Geometry& g, int axis, int64_t size, int64_t first_out, int64_t count) {
  const int64_t stride = g.stride[axis], dilation = g.dilation[axis];
  const int64_t pad = g.padding[axis] - first_out * stride;  // before the first output; negative: input skipped
  Axis a;
  a.out = count;
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

// Column s reads what column s - stride reads, one vector on.
std::vector<ColumnTap> column_taps(const Geometry& g) {
  std::vector<ColumnTap> taps;
  std::map<int64_t, std::pair<int, int64_t>> phases;  // by residue: number, and the shift of its first column
  for (int64_t s = 0; s < g.kernel[1]; ++s) {
    const int64_t at = s * g.dilation[1], number = static_cast<int64_t>(phases.size());
    const auto [phase, first] =
        phases.try_emplace(at % g.stride[1], static_cast<int>(number), at / g.stride[1]).first->second;
    taps.push_back({phase, at / g.stride[1] - first});
  }
  return taps;
}

int64_t phase_reach(const std::vector<ColumnTap>& columns, int phase) {
  int64_t reach = 0;
  for (const ColumnTap& c : columns)
    if (c.phase == phase) reach = std::max(reach, c.shift);
  return reach;
}

// Bytes of a unit's vectors and planes, so that neighboring units begin in cache sets far apart.
static int64_t spread_lines(int64_t lines) {
  constexpr int64_t sets = 64;
  lines |= 1;
  return lines % sets == 1 || lines % sets == sets - 1 ? lines + 4 : lines;
}

LiftPlan::LiftPlan(const Geometry& g, int64_t height, int64_t width, const Band& band, const Pitch& pitch,
                   int word_lanes, int halves, int64_t column_planes, bool adds_columns)
    : band(band), columns(g.output_size(1, width)), lanes(word_lanes * halves) {
  const Axis y = plan_axis(g, 0, height, band.row, band.rows), x = plan_axis(g, 1, width, 0, columns);
  row_pitch = pitch.row;
  image_pitch = pitch.image * row_pitch;
  const int64_t used = (band.images - 1) * image_pitch + (band.rows - 1) * row_pitch + columns;
  segment = (used + lanes - 1) / lanes;
  half = halves > 1 ? word_lanes * segment : 0;
  positions = word_lanes * (segment + 1) + y.reach * row_pitch + x.reach;

  std::map<std::pair<int64_t, int64_t>, int> index;
  for (int64_t r = 0; r < g.kernel[0]; ++r) {
    for (int64_t s = 0; s < g.kernel[1]; ++s) {
      const int64_t at_y = r * g.dilation[0], at_x = s * g.dilation[1];
      const std::pair key{at_y % g.stride[0], at_x % g.stride[1]};
      const auto [at, is_new] = index.emplace(key, static_cast<int>(phases.size()));
      if (is_new) phases.push_back({y.phases.at(key.first), x.phases.at(key.second), {}});
      taps.push_back({at->second, at_y / g.stride[0] * row_pitch + at_x / g.stride[1]});
    }
  }
  // A tap reads the vectors [offset, offset + segment): they either extend the last span or begin one.
  const int64_t gap = column_planes || adds_columns ? x.reach : 0;
  int64_t plane_vectors = 0;
  for (const int t : ascending_taps()) {
    Tap& tap = taps[static_cast<size_t>(t)];
    std::vector<Span>& spans = phases[static_cast<size_t>(tap.phase)].spans;
    if (spans.empty()) spans.push_back({tap.offset, segment, 0});
    else if (Span& last = spans.back(); tap.offset <= last.first + last.count + gap)
      last.count = tap.offset + segment - last.first;
    else spans.push_back({tap.offset, segment, last.at + last.count});
    tap.offset += spans.back().at - spans.back().first;
    plane_vectors = std::max(plane_vectors, spans.back().at + spans.back().count);
  }
  constexpr int64_t line = 64;
  const int64_t plane_lines = (plane_vectors * word_lanes * 4 + line - 1) / line;
  plane_bytes = plane_lines * line;
  unit_bytes = spread_lines(plane_lines * static_cast<int64_t>(phases.size())) * line;
  for (const Tap& tap : taps) tap_source.push_back(tap.phase * plane_bytes + tap.offset * word_lanes * 4);
  if (column_planes) plan_columns(g, column_planes, word_lanes * 4);
  if (band.images == 1 && segment * lanes <= 256 && row_pitch >= columns) {
    lane_pixels.resize(static_cast<size_t>(segment * lanes));
    for (int64_t y = 0; y < band.rows; ++y)
      for (int64_t x = 0; x < columns; ++x) {
        const int64_t position = y * row_pitch + x, at = position % segment * lanes + position / segment;
        lane_pixels[static_cast<size_t>(at)] = static_cast<uint8_t>(pixel_lanes.size());
        pixel_lanes.push_back(static_cast<uint8_t>(at));
      }
  }
}

void LiftPlan::plan_columns(const Geometry& g, int64_t planes, int64_t vector_bytes) {
  const std::vector<ColumnTap> columns = column_taps(g);
  for (size_t s = 0; s < columns.size(); ++s) {
    if (columns[s].phase == static_cast<int>(column_phases.size())) {
      column_phases.push_back({{}, 0});
      for (int64_t r = 0; r < g.kernel[0]; ++r)
        column_phases.back().row_source[static_cast<size_t>(r)] = tap_source[static_cast<size_t>(r * g.kernel[1]) + s];
    }
    int64_t& vectors = column_phases[static_cast<size_t>(columns[s].phase)].vectors;
    vectors = std::max(vectors, segment + columns[s].shift);
  }
  for (const ColumnPhase& phase : column_phases) {
    column_source.push_back(column_bytes);
    column_bytes += phase.vectors * planes * vector_bytes;
  }
  column_bytes = spread_lines((column_bytes + 63) / 64) * 64;
}

// Where the vectors of the staged planes lie in activations of the same bands.
void LiftPlan::plan_restaging(const std::vector<LiftPlan>& all) {
  const Phase& phase = phases[0];
  const auto inside = [](int64_t at, const PhaseAxis& axis) { return at >= axis.lead && at < axis.lead + axis.data; };
  const int64_t vectors = phase.spans.back().at + phase.spans.back().count, words = lanes / (half ? 2 : 1);
  // Position p of the padded input is position p - offset of the activations.
  const int64_t offset = (phase.rows.lead + band.row - phase.rows.first) * row_pitch + phase.columns.lead;
  restage_first.assign(static_cast<size_t>(vectors), 0);
  std::vector<bool> own(static_cast<size_t>(vectors * lanes));
  for (const Span& span : phase.spans)
    for (int64_t j = 0; j < span.count; ++j)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t position = span.first + j + lane * segment, column = position % row_pitch,
                      image = band.images > 1 ? position / image_pitch : 0,
                      row = (position - image * image_pitch) / row_pitch;
        const int64_t input_row = phase.rows.first + row - phase.rows.lead;
        if (image >= band.images || !inside(row, phase.rows) || !inside(column, phase.columns) ||
            input_row < band.row || input_row >= band.row + band.rows)
          continue;
        const int64_t source = position - offset;  // its lane is source / segment
        own[static_cast<size_t>((span.at + j) * lanes + lane)] = true;
        restage_first[static_cast<size_t>(span.at + j)] = source % segment * lanes + source / segment - lane;
      }
  // Words of ones, or of halves: lanes l and l + words side by side.
  uint32_t* mask = restage_mask.reserve(static_cast<size_t>(vectors * words));
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t w = 0; w < words; ++w) {
      const auto is_own = [&](int64_t lane) { return own[static_cast<size_t>(v * lanes + lane)]; };
      *mask++ = half ? (is_own(w) ? 0xffffu : 0u) | (is_own(w + words) ? 0xffff0000u : 0u) : (is_own(w) ? ~0u : 0u);
    }
  for (int64_t row = phase.rows.lead; row < phase.rows.lead + phase.rows.data; ++row) {
    const int64_t input_row = phase.rows.first + row - phase.rows.lead;
    if (input_row >= band.row && input_row < band.row + band.rows) continue;
    const LiftPlan& other = *std::find_if(all.begin(), all.end(), [&](const LiftPlan& l) {
      return l.band.image == band.image && input_row >= l.band.row && input_row < l.band.row + l.band.rows;
    });
    for (const Span& span : phase.spans)
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t c = 0; c < phase.columns.data; ++c) {
          const int64_t j = row * row_pitch + phase.columns.lead + c - lane * segment - span.first;
          if (j < 0 || j >= span.count) continue;
          const int64_t position = (input_row - other.band.row) * row_pitch + c,
                        source = position % other.segment * lanes + position / other.segment, vector = span.at + j;
          if (c > 0 && !halos.empty() && halos.back().vector + halos.back().count == vector &&
              halos.back().lane == lane && position % other.segment > 0)
            ++halos.back().count;
          else
            halos.push_back(
                {other.vectors_before * lanes, other.segment * lanes, source, vector, static_cast<int>(lane), 1});
        }
  }
}

bool ConvCase::takes_lifted() const {
  return !by_rows && geometry.stride == std::array<int64_t, 2>{1, 1} && geometry.output_size(0, height) == height &&
         geometry.output_size(1, width) == width;
}

Pitch ConvCase::least_pitch() const {
  return {plan_axis(geometry, 1, width, 0, geometry.output_size(1, width)).pitch,
          plan_axis(geometry, 0, height, 0, geometry.output_size(0, height)).pitch};
}

namespace {

// Cycles of one layer so cut, and the best number of parts for its outputs.
double cut_cost(const ConvCase& c, const Pitch& pitch, const Cut& cut, int threads, int64_t& splits) {
  const double stage = c.lifted_input ? 4 : 10, column = 2, finish = c.lifted_output ? 10 : 16;  // cycles per vector
  const double output = c.lifted_output ? 20 : 60;  // cycles to begin to finish one
  constexpr double item = 2000, meeting = 4000;     // cycles to begin a piece of work, and for threads to wait for all
  const double weight_bytes_per_cycle = costs(c.word_lanes == 16).memory / (threads == 1 ? 1 : 1.5);  // shared
  constexpr double first_weight_bytes_per_cycle = 24;  // what the first vector waits for
  constexpr double crossing = 1.5, crossed = 1.06;     // writing planes that other threads read, and reading theirs
  constexpr double spilled = 1.1;                      // what exceeding the second-level cache costs, and
  constexpr double kept_bytes_per_cycle = 8;           // that sums then come back
  const double second_level = 0.625 * static_cast<double>(std::clamp<size_t>(core::cache_sizes().l2, 1 << 20, 4 << 20));
  const Geometry& g = c.geometry;
  const int64_t rows = g.output_size(0, c.height), columns = g.output_size(1, c.width), lanes = c.word_lanes * c.halves;
  const auto phases = static_cast<double>(std::min(g.kernel[0], g.stride[0]) * std::min(g.kernel[1], g.stride[1]));
  const int64_t images_here = (c.images + cut.image_bands - 1) / cut.image_bands,
                rows_here = (rows + cut.row_bands - 1) / cut.row_bands;
  const Axis y = plan_axis(g, 0, c.height, 0, rows_here), x = plan_axis(g, 1, c.width, 0, columns);
  const int64_t used = ((images_here - 1) * pitch.image + rows_here - 1) * pitch.row + columns;
  const int64_t segment = (used + lanes - 1) / lanes;
  const int64_t reach = y.reach * pitch.row + x.reach,
                span = std::min(segment + reach, g.kernel[0] * (segment + x.reach));
  // By rows only what is a pixel is summed, and each position staged once.
  const double vectors = c.by_rows ? static_cast<double>(images_here * rows_here * columns) / static_cast<double>(lanes)
                                   : static_cast<double>(segment),
               outputs = static_cast<double>(c.outputs);
  const double staged = static_cast<double>(c.planes) * phases *
                        (c.by_rows ? static_cast<double>(used + reach) / c.word_lanes : static_cast<double>(span)),
               columns_staged = static_cast<double>(c.planes * c.column_planes * (segment + x.reach)),
               bands = static_cast<double>(cut.image_bands * cut.row_bands);
  // What sums of one segment of the weights go through again and again.
  const double vector_bytes = c.word_lanes * 4, kept = static_cast<double>(c.kept * c.halves) * vectors * vector_bytes;
  const double planes_here = (c.column_planes ? columns_staged : staged) / static_cast<double>(c.segments);
  const bool spills = planes_here * vector_bytes + kept > second_level;
  // Weights come behind the sums of the first vector.
  const double sums = ((vectors - 1) * c.cycles + std::max(c.cycles, c.weight_bytes / weight_bytes_per_cycle) +
                       c.weight_bytes / first_weight_bytes_per_cycle) *
                          (spills ? spilled : 1) +
                      (spills && c.segments == 1 ? kept / kept_bytes_per_cycle : 0) +
                      outputs * (output + c.halves * vectors * finish);
  const double planes = staged * stage + columns_staged * column;
  double best = std::numeric_limits<double>::max();
  for (int64_t s = 1; s <= c.blocks && s <= (threads == 1 ? 1 : 4 * threads); ++s) {
    const double rounds = std::ceil(bands * static_cast<double>(s) / threads);
    const double pieces =
        std::ceil(static_cast<double>(c.blocks) / static_cast<double>(s)) / static_cast<double>(c.blocks);
    const double cost = s == 1 || c.lifted_input
                            ? rounds * (planes + sums * pieces + item)
                            : planes * bands * crossing / threads + meeting + rounds * (sums * pieces * crossed + item);
    if (cost < best) best = cost, splits = s;
  }
  return best;
}

}  // namespace

Cut choose_cut(const std::vector<ConvCase>& layers, const Pitch& pitch, int threads, std::vector<int64_t>& splits) {
  const ConvCase& any = layers[0];
  const int64_t rows = any.geometry.output_size(0, any.height);
  double best = std::numeric_limits<double>::max();
  Cut chosen;
  const auto consider = [&](const Cut& cut) {
    std::vector<int64_t> splits_here(layers.size(), 1);
    double cost = 0;
    for (size_t i = 0; i < layers.size(); ++i) cost += cut_cost(layers[i], pitch, cut, threads, splits_here[i]);
    if (cost < best) best = cost, chosen = cut, splits = std::move(splits_here);
  };
  for (int64_t b = 1; b <= any.images && b <= 64; ++b) consider({b, 1});
  for (int64_t r = 2; r <= rows && r <= 256; ++r) consider({any.images, r});
  return chosen;
}

ConvPlan::ConvPlan(const ConvCase& c, const Pitch& pitch, const Cut& cut, int64_t splits)
    : kernels(c.kernels), splits(splits) {
  const int64_t rows = c.geometry.output_size(0, c.height);
  int64_t vectors = 0;
  for (int64_t i = 0; i < cut.image_bands; ++i)
    for (int64_t r = 0; r < cut.row_bands; ++r) {
      const int64_t image = c.images * i / cut.image_bands, row = rows * r / cut.row_bands;
      const Band band{image, c.images * (i + 1) / cut.image_bands - image, row, rows * (r + 1) / cut.row_bands - row};
      LiftPlan& lift = bands.emplace_back(c.geometry, c.height, c.width, band, pitch, c.word_lanes, c.halves,
                                          c.column_planes, c.adds_columns);
      lift.vectors_before = vectors;
      vectors += lift.segment;
    }
  if (c.lifted_input)
    for (LiftPlan& lift : bands) lift.plan_restaging(bands);
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

TablePlan::TablePlan(const LiftPlan& lift, int entries, int block, int64_t outputs, const Kernels& k) {
  const int64_t vector_bytes = k.lanes * 4;
  const auto taps = static_cast<int64_t>(lift.taps.size());
  const auto width_of = [&](int vectors_) {
    int64_t sum = 0;
    for (const TapSegment& s : lift.tap_segments(vectors_)) sum += vectors_ + s.taps.back().shift;
    return sum;
  };
  // Tiles of nearly equal width, as wide as the caches like.
  double best = std::numeric_limits<double>::max();
  for (int v = 1; v <= k.max_table_vectors; ++v) {
    const int64_t count = (lift.segment + v - 1) / v;
    const double cost = static_cast<double>(count) *
                        tile_cost(static_cast<double>(lift.segment) / static_cast<double>(count),
                                  static_cast<double>(width_of(v)), entries, block, static_cast<double>(outputs),
                                  static_cast<double>(block * taps), static_cast<double>(vector_bytes));
    if (cost < best) best = cost, vectors = v, tiles = count;
  }
  slot_offset.resize(static_cast<size_t>(block * taps));
  for (const TapSegment& s : lift.tap_segments(vectors)) {
    segment_source.push_back(s.phase * lift.plane_bytes + s.offset * vector_bytes);
    segment_at.push_back(width * vector_bytes);
    segment_shift.push_back(static_cast<int>(s.taps.back().shift));
    for (const auto& [tap, shift] : s.taps) slot_offset[static_cast<size_t>(tap)] = (width + shift) * vector_bytes;
    width += vectors + s.taps.back().shift;
  }
  const int64_t unit_bytes = width * vector_bytes * entries;
  for (int64_t slot = taps; slot < block * taps; ++slot)
    slot_offset[static_cast<size_t>(slot)] = slot_offset[static_cast<size_t>(slot % taps)] + slot / taps * unit_bytes;
}

// One run of `vectors` vectors for each entry, and one slot for each table.
TablePlan TablePlan::of_codebook(const LiftPlan& lift, std::vector<ColumnTap> columns, int entries, int block,
                                 int64_t outputs, const Kernels& k) {
  TablePlan plan;
  double best = std::numeric_limits<double>::max();
  const int64_t vector_bytes = k.lanes * 4;
  for (int v = 1; v <= k.max_table_vectors; ++v) {
    const int64_t count = (lift.segment + v - 1) / v;
    const double vectors = static_cast<double>(lift.segment) / static_cast<double>(count);
    const double cost = static_cast<double>(count) * tile_cost(vectors, v, entries, block, static_cast<double>(outputs),
                                                               block, static_cast<double>(vector_bytes));
    if (cost < best) best = cost, plan.vectors = v, plan.tiles = count;
  }
  plan.width = plan.vectors;
  for (int64_t unit = 0; unit < block; ++unit) plan.slot_offset.push_back(unit * entries * plan.width * vector_bytes);
  for (const ColumnTap& c : columns)
    if (c.shift == 0) plan.column_vectors += plan.vectors + phase_reach(columns, c.phase);
  plan.columns = std::move(columns);
  return plan;
}

}  // namespace pycodesign::repetition
