// Convolutions: stage the input into the lifted layout, sum over tiles, finish. See README.md for the drawing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/thread_pool.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

// ---- what every packed layer holds ------------------------------------------------------------------------------------------------

PackedLayer::PackedLayer(const Weights& w, const Activations& a, Algorithm algorithm)
    : algorithm_(algorithm), activations_(a), outputs_(w.outputs), inputs_(w.inputs), scale_groups_(w.scale_groups), level_rows_(w.level_rows),
      level_count_(w.level_count), levels_(w.levels, w.levels + w.level_rows * w.level_count) {
  for (int64_t g = 0; g < w.scale_groups; ++g)
    for (int64_t o = 0; o < w.outputs; ++o)
      multiplier_.push_back(static_cast<float>(a.scale * static_cast<double>(w.scale[o * w.scale_groups + g])));
  if (w.bias) bias_.assign(w.bias, w.bias + w.outputs);
  if (a.dtype == DType::f32) return;

  // Largest |x - zero point| that the input type, or the promised bits, allow.
  const bool is_signed = a.dtype == DType::i8;
  const int bits = a.bits ? a.bits : 8;
  const int64_t lowest = is_signed ? -(1 << (bits - 1)) : 0, highest = lowest + (1 << bits) - 1;
  const int64_t range = std::max(std::abs(highest - a.zero_point), std::abs(lowest - a.zero_point));
  const int64_t group = w.inputs / w.scale_groups;
  for (int64_t o = 0; o < w.outputs; ++o) {
    double magnitude = 0;
    for (int64_t i = 0; i < w.inputs; ++i) magnitude += std::abs(static_cast<double>(w.level(o, i)));
    if (magnitude * static_cast<double>(std::max<int64_t>(range, 255)) > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("levels: expected sums that fit 32 bits, got output " + std::to_string(o) + " with a sum of |levels| of " +
                                  std::to_string(magnitude) + " over its " + std::to_string(w.inputs) + " inputs");
  }
  // sum level * (x - z) = sum level * (x + flip) - (z + flip) * sum level
  correction_.resize(static_cast<size_t>(w.outputs * w.scale_groups));
  const int64_t offset = a.zero_point + (is_signed ? 128 : 0);
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t i = 0; i < w.inputs; ++i)
      correction_[static_cast<size_t>(i / group * w.outputs + o)] -= static_cast<int32_t>(w.level(o, i)) * static_cast<int32_t>(offset);
}

uint8_t PackedLayer::code_of(int64_t o, float level) const {
  const float* row = levels_.data() + (level_rows_ == 1 ? 0 : o) * level_count_;
  return static_cast<uint8_t>(std::lower_bound(row, row + level_count_, level) - row);
}

// ---- packing ----------------------------------------------------------------------------------------------------------------------

PackedConv2d::PackedConv2d(const Weights& w, const Geometry& g, const Activations& a, Algorithm algorithm)
    : PackedLayer(w, a, algorithm), geometry_(g), taps_(g.kernel[0] * g.kernel[1]), group_channels_(g.channels / g.groups),
      group_outputs_(w.outputs / g.groups) {
  unit_channels_ = algorithm == Algorithm::dense && a.dtype != DType::f32 ? 4 : 1;
  units_ = (group_channels_ + unit_channels_ - 1) / unit_channels_;
  if (algorithm == Algorithm::tables) pack_tables(w);
  else if (algorithm == Algorithm::dense) pack_dense(w);
  else throw std::invalid_argument("algorithm: expected 'tables' or 'dense' for a convolution, got 'packed'");
}

PackedConv2d::~PackedConv2d() = default;

namespace {

int64_t block_count(int64_t outputs) { return (outputs + dense_outputs - 1) / dense_outputs; }

// Signed magnitudes: level index -> id in [-M, M], 0 for level 0.
struct SignedLevels {
  std::vector<float> magnitudes;               // ascending, without zero
  explicit SignedLevels(const std::vector<float>& levels) {
    for (const float l : levels)
      if (l != 0) magnitudes.push_back(std::abs(l));
    std::sort(magnitudes.begin(), magnitudes.end());
    magnitudes.erase(std::unique(magnitudes.begin(), magnitudes.end()), magnitudes.end());
  }
  int id(float level) const {
    if (level == 0) return 0;
    const int at = static_cast<int>(std::lower_bound(magnitudes.begin(), magnitudes.end(), std::abs(level)) - magnitudes.begin()) + 1;
    return level < 0 ? -at : at;
  }
  float value(int id) const { return id == 0 ? 0.0f : id < 0 ? -magnitudes[static_cast<size_t>(-id - 1)] : magnitudes[static_cast<size_t>(id - 1)]; }
};

}  // namespace

void PackedConv2d::pack_dense(const Weights& w) {
  const int64_t blocks = block_count(group_outputs_), words = geometry_.groups * blocks * units_ * taps_ * dense_outputs;
  weights_size_ = static_cast<size_t>(words * 4);
  char* to = weights_.reserve(weights_size_);
  std::memset(to, 0, weights_size_);
  for (int64_t o = 0; o < w.outputs; ++o) {
    const int64_t group = o / group_outputs_, block = o % group_outputs_ / dense_outputs, lane = o % group_outputs_ % dense_outputs;
    for (int64_t c = 0; c < group_channels_; ++c)
      for (int64_t t = 0; t < taps_; ++t) {
        const float level = w.level(o, c * taps_ + t);
        const int64_t word = (((group * blocks + block) * units_ + c / unit_channels_) * taps_ + t) * dense_outputs + lane;
        if (unit_channels_ == 1) std::memcpy(to + word * 4, &level, 4);
        else to[word * 4 + c % 4] = static_cast<char>(static_cast<int>(level));
      }
  }
}

void PackedConv2d::pack_tables(const Weights& w) {
  const auto values = distinct_levels(w);
  if (values.size() > 16) throw std::invalid_argument("algorithm: expected at most 16 distinct levels for 'tables', got " + std::to_string(values.size()));
  const TableChoice choice = choose_table(values, geometry_, group_outputs_);
  const SignedLevels levels(values);
  const int M = static_cast<int>(levels.magnitudes.size()), base = 2 * M + 1;
  group_size_ = choice.size;
  block_units_ = choice.block;
  table_units_ = (group_channels_ + group_size_ - 1) / group_size_;
  // A pattern of signed levels is a number in base `base`, digit i that of channel i; negation mirrors it at `origin`, the zero pattern.
  std::vector<int64_t> place{1};
  for (int i = 0; i < group_size_; ++i) place.push_back(place.back() * base);
  const int64_t origin = (place.back() - 1) / 2;
  const auto digit = [&](int64_t key, int i) { return static_cast<int>(key / place[static_cast<size_t>(i)] % base) - M; };
  const auto is_positive = [&](int64_t key) {            // its first non-zero digit is
    for (int i = 0; i < group_size_; ++i)
      if (const int d = digit(key, i)) return d > 0;
    return true;
  };
  const auto last_digit = [&](int64_t key) {
    int i = group_size_ - 1;
    while (i >= 0 && digit(key, i) == 0) --i;
    return i;
  };
  const auto parent_of = [&](int64_t key, int last) { return key - digit(key, last) * place[static_cast<size_t>(last)]; };

  // Which patterns occur, up to sign, anywhere in the layer; every entry is one addition to a shorter one.
  std::vector<int16_t> entry(static_cast<size_t>(place.back()), -1);
  std::vector<int64_t> used, keys(static_cast<size_t>(w.outputs * table_units_ * taps_), origin);   // [output][unit][tap]
  const auto use = [&](int64_t key) {
    if (entry[static_cast<size_t>(key)] < 0) entry[static_cast<size_t>(key)] = 0, used.push_back(key);
  };
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t i = 0; i < inputs_; ++i) {
      const int64_t c = i / taps_;
      keys[static_cast<size_t>((o * table_units_ + c / group_size_) * taps_ + i % taps_)] += levels.id(w.level(o, i)) * place[static_cast<size_t>(c % group_size_)];
    }
  for (const int64_t key : keys) use(is_positive(key) ? key : 2 * origin - key);
  for (size_t i = 0; i < used.size(); ++i) {
    const int last = last_digit(used[i]);
    if (last >= 0 && parent_of(used[i], last) != origin) use(parent_of(used[i], last));
  }
  const auto length = [&](int64_t key) {
    int n = 0;
    for (int i = 0; i < group_size_; ++i) n += digit(key, i) != 0;
    return n;
  };
  std::sort(used.begin(), used.end(), [&](int64_t a, int64_t b) { return std::pair(length(a), a) < std::pair(length(b), b); });
  if (used.size() > max_table_entries) throw std::logic_error("a table has more entries than a stream byte can name");
  max_entries_ = static_cast<int>(used.size());
  for (size_t i = 0; i < used.size(); ++i) entry[static_cast<size_t>(used[i])] = static_cast<int16_t>(i);
  for (const int64_t key : used) {
    const int last = last_digit(key), value = last < 0 ? 0 : digit(key, last);
    const int64_t parent = last < 0 ? origin : parent_of(key, last);
    // Two entries that differ in the sign of their last level are one step, that of the positive one if it is there.
    const int64_t other = last < 0 ? key : parent - value * place[static_cast<size_t>(last)];
    const bool has_other = last >= 0 && parent != origin && entry[static_cast<size_t>(other)] >= 0;
    if (has_other && value < 0) continue;
    TableStep step{-1, -1, -1, static_cast<int16_t>(last), {}};
    if (parent != origin) step.parent = entry[static_cast<size_t>(parent)];
    (value < 0 ? step.minus : step.plus) = entry[static_cast<size_t>(key)];
    if (has_other) step.minus = entry[static_cast<size_t>(other)];
    const float level = levels.value(std::abs(value));
    if (activations_.dtype == DType::f32) step.coefficient.f = level;
    else step.coefficient.i = static_cast<int32_t>(level);
    steps_.push_back(step);
  }

  weights_size_ = keys.size();
  auto* stream = reinterpret_cast<uint8_t*>(weights_.reserve(weights_size_));
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t unit = 0; unit < table_units_; ++unit)
      for (int64_t t = 0; t < taps_; ++t) {
        const int64_t key = keys[static_cast<size_t>((o * table_units_ + unit) * taps_ + t)];
        const bool negative = !is_positive(key);
        const int e = entry[static_cast<size_t>(negative ? 2 * origin - key : key)];
        stream[stream_at(o, unit) + t] = static_cast<uint8_t>(e | (negative ? 128 : 0));
      }

  // Integer sums see x - zero point, and -t as ~t + 1.
  for (int64_t o = 0; activations_.dtype != DType::f32 && o < outputs_; ++o) {
    int32_t negatives = 0;
    for (int64_t unit = 0; unit < table_units_; ++unit)
      for (int64_t t = 0; t < taps_; ++t) negatives += stream[stream_at(o, unit) + t] >> 7;
    correction_[static_cast<size_t>(o)] = negatives;
  }
}

// Where the bytes of one unit's taps begin: [group][block][output][unit of the block][tap].
int64_t PackedConv2d::stream_at(int64_t output, int64_t unit) const {
  const int64_t first = unit / block_units_ * block_units_, units_here = std::min<int64_t>(block_units_, table_units_ - first);
  const int64_t group = output / group_outputs_;
  return ((group * table_units_ + first) * group_outputs_ + output % group_outputs_ * units_here + unit - first) * taps_;
}

std::vector<uint8_t> PackedConv2d::codes() const {
  std::vector<uint8_t> codes(static_cast<size_t>(outputs_ * inputs_));
  const int64_t blocks = block_count(group_outputs_);
  std::vector<float> entries(static_cast<size_t>(max_entries_ * group_size_));   // tables: levels of each entry
  for (const TableStep& step : steps_)
    for (const int sign : {1, -1}) {
      const int at = sign > 0 ? step.plus : step.minus;
      if (at < 0 || step.channel < 0) continue;
      float* entry = entries.data() + at * group_size_;
      if (step.parent >= 0) std::copy_n(entries.data() + step.parent * group_size_, group_size_, entry);
      entry[step.channel] = static_cast<float>(sign) * (activations_.dtype == DType::f32 ? step.coefficient.f : static_cast<float>(step.coefficient.i));
    }
  for (int64_t o = 0; o < outputs_; ++o)
    for (int64_t i = 0; i < inputs_; ++i) {
      const int64_t c = i / taps_, t = i % taps_;
      float level;
      if (algorithm_ == Algorithm::tables) {
        const auto byte = static_cast<uint8_t>(weights_[static_cast<size_t>(stream_at(o, c / group_size_) + t)]);
        level = entries[static_cast<size_t>((byte & 127) * group_size_ + c % group_size_)];
        if (byte & 128) level = -level;
      } else {
        const int64_t group = o / group_outputs_, block = o % group_outputs_ / dense_outputs, lane = o % group_outputs_ % dense_outputs;
        const char* word = weights_.data() + ((((group * blocks + block) * units_ + c / unit_channels_) * taps_ + t) * dense_outputs + lane) * 4;
        if (unit_channels_ == 1) std::memcpy(&level, word, 4);
        else level = static_cast<float>(static_cast<signed char>(word[c % 4]));
      }
      codes[static_cast<size_t>(o * inputs_ + i)] = code_of(o, level);
    }
  return codes;
}

Counts PackedConv2d::counts() const {
  Counts c;
  c.bytes = static_cast<int64_t>(weights_size_ + steps_.size() * sizeof(TableStep)) + level_bytes();
  if (algorithm_ == Algorithm::dense) {
    c.multiplies = outputs_ * inputs_;
    c.adds = outputs_ * (inputs_ - 1);
    return c;
  }
  // A table is built once per row of the filter, and read once per tap.
  const int64_t builds = geometry_.groups * table_units_ * geometry_.kernel[0];
  for (const TableStep& s : steps_) {
    const int64_t entries = (s.plus >= 0) + (s.minus >= 0);
    const float k = activations_.dtype == DType::f32 ? s.coefficient.f : static_cast<float>(s.coefficient.i);
    c.adds += (s.parent >= 0) * entries * builds;
    c.multiplies += (s.channel >= 0 && k != 1) * entries * builds;
  }
  c.adds += outputs_ * (table_units_ * taps_ - 1);
  return c;
}

// ---- running ----------------------------------------------------------------------------------------------------------------------

std::shared_ptr<const LiftPlan> PackedConv2d::plan(int64_t images, int64_t height, int64_t width, const Kernels& k) const {
  const std::array<int64_t, 4> key{images, height, width, k.lanes};
  const std::lock_guard lock(mutex_);
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  if (plans_.size() >= 32) plans_.clear();       // a caller that never repeats a size
  return plans_[key] = std::make_shared<const LiftPlan>(geometry_, images, height, width, k.lanes);
}

namespace {

// Scratch that outlives a call, one set per calling thread and slot.
char* scratch(int which, size_t bytes) {
  thread_local core::AlignedBuffer<char> buffers[4];
  return buffers[which].reserve(bytes);
}

// Cut `items` so that `threads` finish together.
int64_t output_splits(int64_t tiles, int64_t outputs, int threads) {
  for (int64_t split = 1;; ++split) {
    const int64_t rounds = (tiles * split + threads - 1) / threads;
    const bool balanced = static_cast<double>(rounds * threads) <= 1.06 * static_cast<double>(tiles * split);
    if (balanced || split >= 4 * threads || outputs / (split + 1) < 8) return split;
  }
}

}  // namespace

void PackedConv2d::run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue& epilogue) const {
  const int64_t N = x.size[0];
  if (N * out.size[1] * out.size[2] * out.size[3] == 0) return;
  const Kernels& k = kernels();
  const auto lift = plan(N, x.size[2], x.size[3], k);
  const int64_t vector_bytes = k.lanes * 4, plane = lift->plane_vectors * vector_bytes;
  const auto phases = static_cast<int64_t>(lift->phases.size());
  const int threads = core::num_threads();

  // Stage: [group][unit][phase] planes.
  const int64_t staged_planes = geometry_.groups * units_ * phases;
  // Entries of channels that do not exist are built (from what lies behind) but never read.
  char* staged = scratch(0, static_cast<size_t>((staged_planes + group_size_ * phases + 1) * plane));
  const size_t flat_bytes = static_cast<size_t>(lift->positions * 4);
  core::parallel_for(staged_planes, [&](int64_t chunk, int) {
    const int64_t unit = chunk / phases % units_, group = chunk / phases / units_;
    const LiftPlan::Phase& phase = lift->phases[static_cast<size_t>(chunk % phases)];
    Stage s{};
    const int64_t channel = group * group_channels_ + unit * unit_channels_;
    s.channels = static_cast<int>(std::min(unit_channels_, group_channels_ - unit * unit_channels_));
    const bool empty = phase.rows.data == 0 || phase.columns.data == 0;
    for (int c = 0; c < s.channels; ++c)
      s.source[c] = x.data + (channel + c) * x.stride[1] + (empty ? 0 : phase.rows.first * x.stride[2] + phase.columns.first * x.stride[3]);
    s.staging = activations_.dtype == DType::f32 ? Staging::f32 : unit_channels_ == 4 ? Staging::bytes4 : Staging::centered_i32;
    s.dtype = activations_.dtype;
    s.zero_point = activations_.zero_point;
    s.images = N;
    s.stride_n = x.stride[0];
    s.stride_h = x.stride[2] * geometry_.stride[0];
    s.stride_w = x.stride[3] * geometry_.stride[1];
    s.rows = phase.rows;
    s.columns = phase.columns;
    s.image_pitch = lift->image_pitch;
    s.row_pitch = lift->row_pitch;
    s.segment = lift->segment;
    s.spans = phase.spans.data();
    s.span_count = static_cast<int>(phase.spans.size());
    s.positions = lift->positions;
    s.flat = scratch(1, flat_bytes);
    s.lifted = staged + chunk * plane;
    k.stage(s);
  });

  // Sum: one plane per output.
  const int64_t out_plane = (lift->segment | 1) * vector_bytes;
  char* planes = scratch(2, static_cast<size_t>(outputs_ * out_plane + (k.lanes + 1) * vector_bytes));
  if (algorithm_ == Algorithm::tables) run_tables(*lift, k, staged, planes);
  else run_dense(*lift, k, staged, planes);

  // Finish: planes back to rows, then the epilogue. A few outputs at a time, so that a chunk is worth a hand-over.
  const int64_t rows = lift->out_rows, columns = lift->out_columns, pixels = rows * columns;
  const int64_t step = std::clamp<int64_t>(8192 / (N * pixels), 1, std::max<int64_t>(outputs_ / threads, 1));
  const bool whole = (rows == 1 || out.stride[2] == columns * out.stride[3]) && (!residual || rows == 1 || residual->stride[2] == columns * residual->stride[3]);
  core::parallel_for((outputs_ + step - 1) / step, [&](int64_t chunk, int) {
    char* flat = scratch(1, flat_bytes + static_cast<size_t>(N * pixels * 4));
    char* sums = flat + flat_bytes;
    for (int64_t o = chunk * step; o < std::min(outputs_, (chunk + 1) * step); ++o) {
      k.unlift({planes + o * out_plane, lift->segment, flat, N, rows, columns, lift->image_pitch, lift->row_pitch, sums});
      Finish f{};
      f.epilogue = &epilogue;
      f.multiplier = &multiplier_[static_cast<size_t>(o)];
      f.bias = bias_.empty() ? nullptr : &bias_[static_cast<size_t>(o)];
      f.correction = correction_.empty() ? nullptr : &correction_[static_cast<size_t>(o)];
      f.out_stride = out.stride[3];
      f.residual_stride = residual ? residual->stride[3] : 0;
      f.count = whole ? pixels : columns;
      for (int64_t n = 0; n < N; ++n)
        for (int64_t r = 0; r < (whole ? 1 : rows); ++r) {
          f.acc = sums + (n * pixels + r * columns) * 4;
          f.out = out.data + n * out.stride[0] + o * out.stride[1] + r * out.stride[2];
          if (residual) f.residual = residual->data + n * residual->stride[0] + o * residual->stride[1] + r * residual->stride[2];
          k.finish(f);
        }
    }
  });
}

void PackedConv2d::run_tables(const LiftPlan& lift, const Kernels& k, const char* staged, char* planes) const {
  const int64_t vector_bytes = k.lanes * 4, plane = lift.plane_vectors * vector_bytes, out_plane = (lift.segment | 1) * vector_bytes;
  const auto phases = static_cast<int64_t>(lift.phases.size());
  const bool is_float = activations_.dtype == DType::f32;

  // Tiles of nearly equal width, as wide as the caches like.
  int64_t tiles = lift.segment;
  int tile = 1;
  double best = std::numeric_limits<double>::max();
  for (int vectors = 1; vectors <= k.max_table_vectors; ++vectors) {
    const int64_t count = (lift.segment + vectors - 1) / vectors;
    int64_t width = 0;
    for (const TapSegment& s : lift.tap_segments(vectors)) width += vectors + s.taps.back().shift;
    const double cost = static_cast<double>(count) * tile_cost(static_cast<double>(lift.segment) / static_cast<double>(count), static_cast<double>(width), max_entries_,
                                                               block_units_, static_cast<double>(group_outputs_), static_cast<double>(block_units_ * taps_),
                                                               static_cast<double>(vector_bytes));
    if (cost < best) best = cost, tile = vectors, tiles = count;
  }
  const auto segments = lift.tap_segments(tile);
  std::vector<int64_t> segment_source;
  std::vector<int> segment_at, segment_shift;
  std::vector<int32_t> slot_offset(static_cast<size_t>(block_units_ * taps_));
  int64_t width = 0;
  for (const TapSegment& s : segments) {
    segment_source.push_back(s.phase * plane + s.offset * vector_bytes);
    segment_at.push_back(static_cast<int>(width * vector_bytes));
    segment_shift.push_back(static_cast<int>(s.taps.back().shift));
    for (const auto& [tap, shift] : s.taps) slot_offset[static_cast<size_t>(tap)] = static_cast<int32_t>((width + shift) * vector_bytes);
    width += tile + s.taps.back().shift;
  }
  const int64_t entry_bytes = width * vector_bytes, unit_bytes = entry_bytes * max_entries_;
  for (int64_t slot = taps_; slot < block_units_ * taps_; ++slot)
    slot_offset[static_cast<size_t>(slot)] = slot_offset[static_cast<size_t>(slot % taps_)] + static_cast<int32_t>(slot / taps_ * unit_bytes);
  const int64_t groups = geometry_.groups;
  const int64_t splits = output_splits(tiles * groups, group_outputs_, core::num_threads());
  const size_t row_bytes = static_cast<size_t>((group_size_ + 1) * entry_bytes), table_bytes = static_cast<size_t>(unit_bytes * block_units_);
  core::parallel_for(tiles * groups * splits, [&](int64_t chunk, int) {
    const int64_t group = chunk / (tiles * splits), t = chunk / splits % tiles, split = chunk % splits;
    const int64_t j = lift.segment * t / tiles;
    const int64_t first = group_outputs_ * split / splits, count = group_outputs_ * (split + 1) / splits - first;
    const int vectors = static_cast<int>(lift.segment * (t + 1) / tiles - j);
    TableBuild build{};
    build.channel_stride = phases * plane;
    build.segment_source = segment_source.data();
    build.segment_at = segment_at.data();
    build.segment_shift = segment_shift.data();
    build.segments = static_cast<int>(segments.size());
    build.vectors = vectors;
    build.entry_bytes = entry_bytes;
    build.unit_bytes = unit_bytes;
    build.group_size = group_size_;
    build.steps = steps_.data();
    build.step_count = static_cast<int64_t>(steps_.size());
    build.rows = scratch(3, row_bytes + table_bytes + static_cast<size_t>(count * tile * vector_bytes));
    build.tables = build.rows + row_bytes;
    TableSum sum{};
    sum.tables = build.tables;
    sum.slot_offset = slot_offset.data();
    sum.entry_bytes = entry_bytes;
    sum.acc = build.tables + table_bytes;
    sum.acc_stride = tile * vector_bytes;
    sum.outputs = count;
    sum.vectors = vectors;
    for (int64_t block = 0; block * block_units_ < table_units_; ++block) {
      const int64_t units_here = std::min<int64_t>(block_units_, table_units_ - block * block_units_), slots = units_here * taps_;
      build.x = staged + (group * group_channels_ + block * block_units_ * group_size_) * phases * plane + j * vector_bytes;
      build.units = units_here;
      (is_float ? k.build_tables_f32 : k.build_tables_i32)(build);
      sum.slots = static_cast<int>(slots);
      sum.stream = reinterpret_cast<const uint8_t*>(weights_.data()) + (group * table_units_ + block * block_units_) * taps_ * group_outputs_ + first * slots;
      sum.first = block == 0;
      (is_float ? k.sum_tables_f32 : k.sum_tables_i32)(sum);
    }
    for (int64_t o = 0; o < count; ++o)
      std::memcpy(planes + (group * group_outputs_ + first + o) * out_plane + j * vector_bytes, sum.acc + o * sum.acc_stride, static_cast<size_t>(vectors * vector_bytes));
  });
}

void PackedConv2d::run_dense(const LiftPlan& lift, const Kernels& k, const char* staged, char* planes) const {
  const int64_t vector_bytes = k.lanes * 4, plane = lift.plane_vectors * vector_bytes, out_plane = (lift.segment | 1) * vector_bytes;
  const auto phases = static_cast<int64_t>(lift.phases.size());
  std::vector<int64_t> tap_source;
  for (const LiftPlan::Tap& tap : lift.taps) tap_source.push_back(tap.phase * plane + tap.offset * vector_bytes);

  const int64_t blocks = block_count(group_outputs_), block_bytes = units_ * taps_ * dense_outputs * 4;
  const int64_t tiles = (lift.segment + k.max_dense_vectors - 1) / k.max_dense_vectors;
  // A chunk keeps one side in the second-level cache and streams the other: the smaller one streams.
  const bool weights_stay = units_ * phases * plane < blocks * block_bytes;
  const int64_t threads = core::num_threads(), groups = geometry_.groups;
  const int64_t outer = weights_stay ? blocks : tiles, inner = weights_stay ? tiles : blocks;
  const int64_t splits = output_splits(outer * groups, inner * 8, static_cast<int>(threads));
  core::parallel_for(groups * outer * splits, [&](int64_t chunk, int) {
    const int64_t group = chunk / (outer * splits), at = chunk / splits % outer, split = chunk % splits;
    for (int64_t i = inner * split / splits; i < inner * (split + 1) / splits; ++i) {
      const int64_t block = weights_stay ? at : i, t = weights_stay ? i : at;
      // Tiles of nearly equal width.
      const int64_t j = lift.segment * t / tiles, vectors = lift.segment * (t + 1) / tiles - j;
      DenseTile d{};
      d.x = staged + group * units_ * phases * plane + j * vector_bytes;
      d.unit_stride = phases * plane;
      d.tap_source = tap_source.data();
      d.units = units_;
      d.taps = static_cast<int>(taps_);
      d.weights = weights_.data() + (group * blocks + block) * block_bytes;
      d.acc = planes + (group * group_outputs_ + block * dense_outputs) * out_plane + j * vector_bytes;
      d.acc_stride = out_plane;
      d.outputs = static_cast<int>(std::min<int64_t>(dense_outputs, group_outputs_ - block * dense_outputs));
      d.vectors = static_cast<int>(vectors);
      (activations_.dtype == DType::f32 ? k.dense_f32 : k.dense_i8)(d);
    }
  });
}

}  // namespace pycodesign::repetition
