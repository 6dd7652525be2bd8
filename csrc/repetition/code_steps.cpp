#include "repetition/code_steps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>

#include "repetition/costs.h"

namespace pycodesign::repetition {

namespace {

constexpr int64_t sample_channels = 64;
constexpr size_t max_columns_staged = 8;
constexpr int64_t planes_bytes = (max_columns_staged + 1) * 64;  // of one vector, at most

// A segment's code stays in the first-level cache while it runs over all vectors.
constexpr double segment_bytes = 24 << 10;

// Rows of x that a segment reads at most; int16 sums cost more to keep. On large maps x has to stay in the first-level
// cache from one vector to the next.
int64_t most_rows(const CodeLayer& l, const CodeForm& f, bool avx512) {
  constexpr double few_pixels = 64, many_pixels = 256;
  const bool is_float = l.dtype == DType::f32;
  if (!f.planes()) return is_float ? 144 : likely_pixels(l.weights->outputs) > many_pixels ? 240 : 288;
  if (!is_float) return 384;
  // AVX2 has few sums in registers, to keep less often where few vectors share the caches.
  return avx512 || likely_pixels(l.weights->outputs) > few_pixels ? 128 : 256;
}
int64_t rows_of(const CodeForm& f, const Unit& u) { return f.planes() ? f.group_size * f.planes() : u.width; }

bool is_complement(const CodeLayer& l) {
  const Weights& w = *l.weights;
  return l.dtype != DType::f32 && l.channels() > 1 && w.level_rows == 1 && w.level_count == 2 && w.levels[0] == -1 &&
         w.levels[1] == 1;
}

// What patterns and sums are made of.
float level_of(const CodeLayer& l, const CodeForm& f, int64_t output, int64_t input) {
  const float level = l.weights->level(output, input);
  return f.complement ? std::max(level, 0.0f) : level;
}

// Sum of |level| of one output over a unit.
double magnitude_of(const CodeLayer& l, const CodeForm& f, int64_t output, const Unit& u) {
  double sum = 0;
  const int64_t taps = l.taps();
  const auto add = [&](int64_t channel, int64_t tap) {
    sum += std::abs(static_cast<double>(level_of(l, f, output, channel * taps + tap)));
  };
  if (f.planes())
    for (int64_t t = 0; t < taps; ++t) add(u.channel, t);
  else
    for (int64_t c = u.channel; c < u.channel + u.width; ++c) add(c, u.tap);
  return sum;
}

// The levels of column `s` up to sign, the first that is not zero positive, and whether the sign was turned.
ColumnPattern column_of(const CodeLayer& l, int64_t output, int64_t channel, int64_t s, bool& minus) {
  const int64_t rows = l.geometry.kernel[0], columns = l.geometry.kernel[1];
  return column_pattern(
      rows, [&](int64_t r) { return l.weights->level(output, (channel * rows + r) * columns + s); }, minus);
}

// The columns that occur, where all levels are -1, 0 or 1; none where filters are of another size, where columns lie
// further apart than an address in the code can say, or where planes would be read from memory more often than added.
Columns columns_of(const CodeLayer& l) {
  const Weights& w = *l.weights;
  const auto& [rows, columns] = l.geometry.kernel;
  if (rows < 2 || rows > max_column_rows || columns > max_columns) return {};
  for (const ColumnTap& tap : column_taps(l.geometry))
    if ((tap.shift + 1) * planes_bytes > std::numeric_limits<int32_t>::max()) return {};
  for (int64_t i = 0; i < w.level_rows * w.level_count; ++i)
    if (w.levels[i] != 0 && std::abs(w.levels[i]) != 1) return {};
  std::set<ColumnPattern> found;
  bool minus;
  for (int64_t i = 0; i < w.outputs * l.channels() * columns; ++i) {
    const int64_t pair = i / columns;
    found.insert(column_of(l, pair / l.channels(), pair % l.channels(), i % columns, minus));
    if (found.size() > max_columns_staged + 1) return {};
  }
  found.erase(ColumnPattern{});
  return {{found.begin(), found.end()}};
}

// Levels of a group's channels, or numbers (from 1) of one channel's columns, up to sign: the first that is not zero is
// positive.
struct Pattern {
  std::array<float, max_group> levels;
  int16_t output;
  bool minus;

  bool operator<(const Pattern& other) const {
    return levels != other.levels ? levels < other.levels : output < other.output;
  }
};

// Register `to` = register `from`, or zero if from is -1, + level * row. `sibling` is the level with which the register
// was made last, 0 if it holds something else.
void build(const CodeLayer& l, int8_t to, int8_t row, float level, float sibling, std::vector<Step>& steps) {
  const int8_t from = static_cast<int8_t>(to - 1);
  const bool has_parent = from >= 0, minus = level < 0;
  const float magnitude = std::abs(level);
  const auto step = [&](Step::Kind kind, int8_t from_, float coefficient = 0) {
    steps.push_back({kind, minus, to, from_, row, 0, coefficient});
  };
  if (l.dtype == DType::f32) {
    if (!has_parent || magnitude != 1) step(Step::load, 0);
    if (!has_parent && magnitude != 1) step(Step::scale, 0, magnitude);
    if (has_parent && magnitude != 1) step(Step::add_scaled, from, magnitude);
    if (has_parent && magnitude == 1) step(Step::add_row, from);
    return;
  }
  // Integers are exact on any way: adding the row repeatedly, to the parent or to the sibling, often is the shortest.
  const float multiply = has_parent ? 2.0f : 1.0f, direct = has_parent ? magnitude : magnitude - 1;
  const float walk = sibling != 0 ? std::abs(level - sibling) : std::numeric_limits<float>::infinity();
  if (walk <= std::min(direct, multiply)) {
    for (float i = 0; i < walk; ++i) steps.push_back({Step::add_row, level < sibling, to, to, row, 0, 0});
  } else if (direct <= multiply) {
    step(has_parent ? Step::add_row : Step::load, from);
    for (float i = 1; i < magnitude; ++i) step(Step::add_row, to);
  } else {
    step(Step::load, 0);
    if (has_parent) step(Step::add_scaled, from, magnitude);
    else step(Step::scale, 0, magnitude);
  }
}

Pattern pattern_of(const CodeLayer& l, const CodeForm& f, int64_t output, const Unit& unit) {
  Pattern p{};
  bool empty = true;
  for (int64_t i = 0; i < (f.planes() ? f.group_size : unit.width); ++i) {
    float level;
    if (f.planes()) {
      bool minus;
      const auto& all = f.columns.patterns;
      const ColumnPattern column = column_of(l, output, unit.channel, i, minus);
      const auto at = std::lower_bound(all.begin(), all.end(), column);
      level = column == ColumnPattern{} ? 0 : static_cast<float>((at - all.begin() + 1) * (minus ? -1 : 1));
    } else {
      level = level_of(l, f, output, (unit.channel + i) * l.taps() + unit.tap);
    }
    if (empty && level != 0) empty = false, p.minus = level < 0;
    p.levels[static_cast<size_t>(i)] = level == 0 ? 0 : p.minus ? -level : level;
  }
  return p;
}

// Largest magnitude of a level; throws std::invalid_argument if int16 sums cannot serve it.
double largest_level(const CodeLayer& l) {
  const Weights& w = *l.weights;
  float largest = 0;
  for (int64_t i = 0; i < w.level_rows * w.level_count; ++i) {
    const float level = w.levels[i];
    largest = std::max(largest, std::abs(level));
    if (l.dtype != DType::f32 && level != std::round(level))
      throw std::invalid_argument("levels: expected integers for integer inputs, got " + std::to_string(level));
  }
  if (l.dtype != DType::f32 && static_cast<double>(largest) * static_cast<double>(l.range) > max_word)
    throw std::invalid_argument("levels: expected products that fit 16 bits, got a level of magnitude " +
                                std::to_string(largest) + " and inputs up to " + std::to_string(l.range));
  return static_cast<double>(largest);
}

// From one chunk and its first channels.
CodeEstimate estimate(const CodeLayer& l, CodeForm f, bool avx512) {
  const Costs& cost = costs(avx512);
  const bool is_float = l.dtype == DType::f32;
  const std::vector<CodeChunk> chunks = cut_outputs(l, f, avx512);
  const CodeChunk& chunk = chunks[0];
  const int64_t group = f.planes() ? 1 : f.group_size;
  const int64_t channels = std::min(l.channels(), sample_channels / group * group);
  double instructions = 0, loads = 0, magnitude = 0, rows = 0;
  std::vector<Step> steps;
  for (const Unit& unit : units_of(l, f, channels)) {
    append_steps(l, f, chunk, unit, steps);
    rows += static_cast<double>(rows_of(f, unit));
    if (f.resident) loads += static_cast<double>(f.planes()), instructions += static_cast<double>(f.planes());
    for (int64_t o = 0; o < chunk.outputs; ++o) magnitude += magnitude_of(l, f, chunk.first_output + o, unit);
  }
  for (const Step& s : steps) {
    instructions += s.kind == Step::add_scaled && !is_float ? 2 : 1;
    loads += s.kind != Step::accumulate && !(f.resident && s.row >= (f.group_size - 1) * f.planes());
  }
  const double share = static_cast<double>(l.channels()) / static_cast<double>(channels);
  const double outputs = static_cast<double>(chunk.outputs), count = static_cast<double>(chunks.size());
  const double instruction_bytes = avx512 ? 7.2 : 5.5;  // with prefetches
  f.segment_rows = std::min(
      most_rows(l, f, avx512),
      std::max<int64_t>(static_cast<int64_t>(segment_bytes * rows / (instructions * instruction_bytes + 1)), 1));
  double segments = rows * share / static_cast<double>(f.segment_rows);
  if (!is_float) segments = std::max(segments, magnitude / outputs * share * static_cast<double>(l.range) / max_word);
  const double slow = f.planes() && !is_float && cost.drops_prefetches ? 1.4 : 1;  // whose code also reads ahead
  const double sums = slow * std::max(instructions / cost.instructions, loads / cost.loads) * share;
  const double keep = outputs * (is_float ? cost.keep_f32 : f.complement ? 1.3 * cost.keep_words : cost.keep_words);
  const double columns = f.planes() ? cost.store * static_cast<double>(f.planes() + 2) : 0;  // of a channel, to make
  const double run = (sums + std::max(1.0, std::ceil(segments)) * (keep + cost.call) - keep / 2) * count +
                     columns * static_cast<double>(l.channels() * l.geometry.groups);
  const double bytes = instructions * share * count * instruction_bytes;
  const double vectors = std::max(1.0, likely_pixels(l.weights->outputs) / ((avx512 ? 16 : 8) * (is_float ? 1 : 2)));
  return {f, run, run + bytes / cost.memory / vectors};
}

}  // namespace

int64_t adds_of(const Step& s) {
  return s.kind == Step::add_row || s.kind == Step::add_scaled || s.kind == Step::accumulate;
}
int64_t multiplies_of(const Step& s) { return s.kind == Step::scale || s.kind == Step::add_scaled; }

std::vector<CodeChunk> cut_outputs(const CodeLayer& l, const CodeForm& f, bool avx512) {
  const int64_t groups = l.geometry.groups, outputs = l.weights->outputs / groups;
  const int64_t accumulators = (avx512 ? 32 : 16) - f.registers(l);
  int64_t chunks = (outputs + accumulators - 1) / accumulators;
  if (chunks > 8 && chunks * groups % 2) ++chunks;  // two threads that share them finish together
  std::vector<CodeChunk> all;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = outputs * c / chunks;
      all.push_back({g, g * outputs + first, outputs * (c + 1) / chunks - first, {}});
    }
  return all;
}

std::vector<Unit> units_of(const CodeLayer& l, const CodeForm& f, int64_t channels) {
  std::vector<Unit> units;
  const int64_t group = f.planes() ? 1 : f.group_size, taps = f.planes() ? 1 : l.taps();
  for (int64_t c = 0; c < channels; c += group)
    for (int64_t t = 0; t < taps; ++t)
      units.push_back({c, std::min(group, channels - c), t, static_cast<int64_t>(units.size())});
  return units;
}

// The patterns of a unit in lexicographic order walk their trie depth first: register d holds the sum of the first d +
// 1 rows that are in it, and what a pattern shares with the one before is there already.
void append_steps(const CodeLayer& l, const CodeForm& f, const CodeChunk& chunk, const Unit& unit,
                  std::vector<Step>& steps) {
  std::array<Pattern, 32> patterns;
  size_t count = 0;
  for (int64_t o = 0; o < chunk.outputs; ++o) {
    Pattern p = pattern_of(l, f, chunk.first_output + o, unit);
    p.output = static_cast<int16_t>(o);
    if (p.levels != decltype(p.levels){}) patterns[count++] = p;
  }
  if (f.complement) {
    Pattern& all = patterns[count++] = {{}, static_cast<int16_t>(chunk.outputs + unit.index % totals), false};
    std::fill_n(all.levels.begin(), unit.width, 1.0f);
  }
  std::sort(patterns.begin(), patterns.begin() + static_cast<int64_t>(count));

  constexpr Pattern none{};
  for (size_t i = 0; i < count; ++i) {
    const auto &levels = patterns[i].levels, &former = (i ? patterns[i - 1] : none).levels;
    int8_t depth = 0;
    bool shared = true;
    for (size_t c = 0; c < max_group; ++c) {
      const bool differs = levels[c] != former[c];
      if (levels[c] != 0) {
        if (!shared || differs) {
          if (f.planes()) {
            const auto row = static_cast<int64_t>(c) * f.planes() + static_cast<int64_t>(std::abs(levels[c])) - 1;
            build(l, depth, static_cast<int8_t>(row), levels[c] < 0 ? -1.0f : 1.0f, 0, steps);
          } else {
            build(l, depth, static_cast<int8_t>(c), levels[c], shared ? former[c] : 0, steps);
          }
        }
        ++depth;
      }
      shared &= !differs;
    }
    steps.push_back({Step::accumulate, patterns[i].minus, 0, static_cast<int8_t>(depth - 1), 0, patterns[i].output, 0});
  }
}

std::vector<size_t> cut_units(const CodeLayer& l, const CodeForm& f, const std::vector<Unit>& units) {
  const Weights& w = *l.weights;
  std::vector<double> sums(static_cast<size_t>(w.outputs));
  std::array<int64_t, totals> total_rows;
  const auto cut_every = [&](int64_t most) {
    std::vector<size_t> ends;
    int64_t rows = 0;
    const auto start = [&] {
      rows = 0;
      total_rows.fill(0);
      std::fill(sums.begin(), sums.end(), 0);
    };
    const auto add = [&](const Unit& unit) {  // whether it fits
      rows += rows_of(f, unit);
      bool fits = rows <= most;
      for (int64_t o = 0; o < w.outputs && l.dtype != DType::f32; ++o) {
        double& total = sums[static_cast<size_t>(o)];
        total += magnitude_of(l, f, o, unit);
        fits &= total * static_cast<double>(l.range) <= max_word;
      }
      int64_t& all = total_rows[static_cast<size_t>(unit.index % totals)];
      all += unit.width;
      fits &= !f.complement || all * l.range <= max_word;
      return fits;
    };
    start();
    for (size_t u = 0; u < units.size(); ++u)
      if (!add(units[u]) && u > (ends.empty() ? 0 : ends.back())) {
        ends.push_back(u);
        start();
        add(units[u]);
      }
    ends.push_back(units.size());
    return ends;
  };
  int64_t rows = 0;
  for (const Unit& unit : units) rows += rows_of(f, unit);
  const int64_t limit = f.segment_rows;
  const auto segments = static_cast<int64_t>(cut_every(limit).size());
  for (int64_t most = rows / segments;; most += most / 32 + 1)
    if (auto ends = cut_every(most); static_cast<int64_t>(ends.size()) == segments || most >= limit) return ends;
}

CodeEstimate choose_form(const CodeLayer& l, bool avx512) {
  const double largest = largest_level(l) * static_cast<double>(l.range);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  CodeEstimate best{{}, infinity, infinity};
  const auto consider = [&](CodeForm form) {
    if (CodeEstimate e = estimate(l, std::move(form), avx512); e.cold < best.cold) best = std::move(e);
  };
  // Sums of a pattern's products must fit a word, too.
  const auto fits = [&](int64_t rows) {
    return l.dtype == DType::f32 || largest * static_cast<double>(rows) <= max_word;
  };
  for (int64_t g = 1; g <= std::min(max_group, l.channels()) && fits(g); ++g)
    consider({.group_size = g, .complement = g > 1 && is_complement(l)});
  const Columns columns = columns_of(l);
  if (columns.patterns.empty() || !fits(l.taps())) return best;
  consider({.group_size = l.geometry.kernel[1], .columns = columns});
  if (avx512 && columns.patterns.size() <= 4)
    consider({.group_size = l.geometry.kernel[1], .resident = true, .columns = columns});
  return best;
}

}  // namespace pycodesign::repetition
