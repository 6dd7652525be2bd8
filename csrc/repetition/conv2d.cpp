// Convolutions: stage the input into the lifted layout, sum over tiles, finish. See README.md for the drawing.
#include <algorithm>
#include <cstring>

#include "core/thread_pool.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

std::shared_ptr<const LiftPlan> PackedConv2d::plan(int64_t images, int64_t height, int64_t width,
                                                   const Kernels& k) const {
  const int threads = core::num_threads();
  const std::array<int64_t, 5> key{images, height, width, k.lanes, threads};
  const std::lock_guard lock(mutex_);
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  if (plans_.size() >= 32) plans_.clear();  // a caller that never repeats a size
  auto lift = std::make_shared<LiftPlan>(geometry_, images, height, width, k.lanes);
  if (algorithm_ == Algorithm::tables)
    lift->tables = TablePlan(*lift, {max_entries_, block_units_, geometry_.groups, group_outputs_}, k, threads);
  return plans_[key] = std::move(lift);
}

namespace {

// Scratch that outlives a call, one set per calling thread and slot; large ones in huge pages, as planes lie far apart.
char* scratch(int which, size_t bytes) {
  thread_local core::AlignedBuffer<char> buffers[4];
  if (bytes > core::huge_page / 4) bytes = (bytes + core::huge_page - 1) / core::huge_page * core::huge_page;
  return buffers[which].reserve(bytes);
}

// Calls work(first, last) for ranges of items: large enough to be worth a hand-over, and as many as threads can share.
template <class Work> void parallel_ranges(int64_t items, int64_t words_per_item, Work work) {
  constexpr int64_t words_per_chunk = 8192;
  const int64_t threads = core::num_threads(), wanted = items * words_per_item / words_per_chunk + 1;
  const int64_t chunks = std::min((wanted + threads - 1) / threads * threads, items);
  core::parallel_for(chunks, [&](int64_t c, int) { work(items * c / chunks, items * (c + 1) / chunks); });
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

// One call: what to compute, and where its parts lie.
struct PackedConv2d::Call {
  const LiftPlan& lift;
  const Kernels& k;
  const Tensor &x, &out;
  const Tensor* residual;
  const Epilogue& epilogue;
  char* staged = nullptr;  // [group][unit][phase] planes
  char* planes = nullptr;  // [output] sums

  int64_t vector_bytes() const { return k.lanes * 4; }
  int64_t phases() const { return static_cast<int64_t>(lift.phases.size()); }
  int64_t plane() const { return lift.plane_vectors * vector_bytes(); }
  int64_t out_plane() const { return (lift.segment | 1) * vector_bytes(); }
  size_t flat_bytes() const { return static_cast<size_t>(lift.positions * 4); }
};

void PackedConv2d::run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue& epilogue) const {
  if (out.size[0] * out.size[1] * out.size[2] * out.size[3] == 0) return;
  const Kernels& k = kernels();
  const auto lift = plan(x.size[0], x.size[2], x.size[3], k);
  Call call{*lift, k, x, out, residual, epilogue};
  // Entries of channels that do not exist are built (from what lies behind) but never read.
  const int64_t staged_planes = (geometry_.groups * units_ + group_size_) * call.phases() + 1;
  call.staged = scratch(0, static_cast<size_t>(staged_planes * call.plane()));
  call.planes = scratch(2, static_cast<size_t>(outputs_ * call.out_plane()));
  parallel_ranges(geometry_.groups * units_ * call.phases(), lift->positions, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) stage_plane(call, i);
  });
  if (algorithm_ == Algorithm::dense && sum_dense_and_finish(call)) return;
  if (algorithm_ == Algorithm::tables) sum_tables(call);
  parallel_ranges(outputs_, lift->images * lift->out_rows * lift->out_columns,
                  [&](int64_t first, int64_t last) { finish_outputs(call, first, last); });
}

void PackedConv2d::stage_plane(const Call& call, int64_t index) const {
  const LiftPlan& lift = call.lift;
  const Tensor& x = call.x;
  const int64_t unit = index / call.phases() % units_, group = index / call.phases() / units_;
  const LiftPlan::Phase& phase = lift.phases[static_cast<size_t>(index % call.phases())];
  const int64_t channel = group * group_channels_ + unit * unit_channels_;
  const bool empty = phase.rows.data == 0 || phase.columns.data == 0;
  Stage s{};
  s.channels = static_cast<int>(std::min(unit_channels_, group_channels_ - unit * unit_channels_));
  for (int c = 0; c < s.channels; ++c)
    s.source[c] = x.data + (channel + c) * x.stride[1] +
                  (empty ? 0 : phase.rows.first * x.stride[2] + phase.columns.first * x.stride[3]);
  s.staging = activations_.dtype == DType::f32 ? Staging::f32
              : unit_channels_ == 4            ? Staging::bytes4
                                               : Staging::centered_i32;
  s.dtype = activations_.dtype;
  s.zero_point = activations_.zero_point;
  s.images = lift.images;
  s.stride_n = x.stride[0];
  s.stride_h = x.stride[2] * geometry_.stride[0];
  s.stride_w = x.stride[3] * geometry_.stride[1];
  s.rows = phase.rows;
  s.columns = phase.columns;
  s.image_pitch = lift.image_pitch;
  s.row_pitch = lift.row_pitch;
  s.segment = lift.segment;
  s.spans = phase.spans.data();
  s.span_count = static_cast<int>(phase.spans.size());
  s.positions = lift.positions;
  s.flat = scratch(1, call.flat_bytes());
  s.lifted = call.staged + index * call.plane();
  call.k.stage(s);
}

// Planes of sums back to rows, then the epilogue.
void PackedConv2d::finish_outputs(const Call& call, int64_t first, int64_t last) const {
  const LiftPlan& lift = call.lift;
  const Tensor &out = call.out, *residual = call.residual;
  const int64_t N = lift.images, rows = lift.out_rows, columns = lift.out_columns, pixels = rows * columns;
  const bool whole = (rows == 1 || out.stride[2] == columns * out.stride[3]) &&
                     (!residual || rows == 1 || residual->stride[2] == columns * residual->stride[3]);
  char* flat = scratch(1, call.flat_bytes() + static_cast<size_t>(N * pixels * 4));
  char* sums = flat + call.flat_bytes();
  for (int64_t o = first; o < last; ++o) {
    call.k.unlift({call.planes + o * call.out_plane(), lift.segment, flat, N, rows, columns, lift.image_pitch,
                   lift.row_pitch, sums});
    Finish f{};
    f.epilogue = &call.epilogue;
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
        if (residual)
          f.residual = residual->data + n * residual->stride[0] + o * residual->stride[1] + r * residual->stride[2];
        call.k.finish(f);
      }
  }
}

void PackedConv2d::sum_tables(const Call& call) const {
  const LiftPlan& lift = call.lift;
  const Kernels& k = call.k;
  const int64_t vector_bytes = call.vector_bytes(), channel_bytes = call.phases() * call.plane();
  const bool is_float = activations_.dtype == DType::f32;

  const TablePlan& t = lift.tables;
  const int64_t entry_bytes = t.width * vector_bytes, unit_bytes = entry_bytes * max_entries_;
  const size_t row_bytes = static_cast<size_t>((group_size_ + 1) * entry_bytes),
               table_bytes = static_cast<size_t>(unit_bytes * block_units_);
  core::parallel_for(geometry_.groups * t.tiles * t.splits, [&](int64_t chunk, int) {
    const int64_t group = chunk / (t.tiles * t.splits), tile = chunk / t.splits % t.tiles, split = chunk % t.splits;
    const int64_t j = lift.segment * tile / t.tiles;
    const int64_t first = group_outputs_ * split / t.splits, count = group_outputs_ * (split + 1) / t.splits - first;
    const int vectors = static_cast<int>(lift.segment * (tile + 1) / t.tiles - j);
    TableBuild build{};
    build.channel_stride = channel_bytes;
    build.segment_source = t.segment_source.data();
    build.segment_at = t.segment_at.data();
    build.segment_shift = t.segment_shift.data();
    build.segments = static_cast<int>(t.segment_source.size());
    build.vectors = vectors;
    build.entry_bytes = entry_bytes;
    build.unit_bytes = unit_bytes;
    build.group_size = group_size_;
    build.steps = steps_.data();
    build.step_count = static_cast<int64_t>(steps_.size());
    build.rows = scratch(3, row_bytes + table_bytes + static_cast<size_t>(count * t.vectors * vector_bytes));
    build.tables = build.rows + row_bytes;
    TableSum sum{};
    sum.tables = build.tables;
    sum.slot_offset = t.slot_offset.data();
    sum.entry_bytes = entry_bytes;
    sum.acc = build.tables + table_bytes;
    sum.acc_stride = t.vectors * vector_bytes;
    sum.outputs = count;
    sum.vectors = vectors;
    for (int64_t block = 0; block * block_units_ < table_units_; ++block) {
      const int64_t units_here = std::min<int64_t>(block_units_, table_units_ - block * block_units_),
                    slots = units_here * taps_;
      build.x = call.staged + (group * group_channels_ + block * block_units_ * group_size_) * channel_bytes +
                j * vector_bytes;
      build.units = units_here;
      (is_float ? k.build_tables_f32 : k.build_tables_i32)(build);
      sum.slots = static_cast<int>(slots);
      sum.stream = reinterpret_cast<const uint8_t*>(weights_.data()) +
                   (group * table_units_ + block * block_units_) * taps_ * group_outputs_ + first * slots;
      sum.first = block == 0;
      (is_float ? k.sum_tables_f32 : k.sum_tables_i32)(sum);
    }
    for (int64_t o = 0; o < count; ++o)
      std::memcpy(call.planes + (group * group_outputs_ + first + o) * call.out_plane() + j * vector_bytes,
                  sum.acc + o * sum.acc_stride, static_cast<size_t>(vectors * vector_bytes));
  });
}

// True where the sums were finished on the way: while they are in the cache, and with no other thread to wait for.
bool PackedConv2d::sum_dense_and_finish(const Call& call) const {
  const LiftPlan& lift = call.lift;
  const Kernels& k = call.k;
  const int64_t vector_bytes = call.vector_bytes(), unit_bytes = call.phases() * call.plane();
  std::vector<int64_t> tap_source;
  for (const LiftPlan::Tap& tap : lift.taps) tap_source.push_back(tap.phase * call.plane() + tap.offset * vector_bytes);

  // A chunk keeps either its weights or its tile of inputs in the cache and streams the other: weights, if the inputs
  // stream from the second level.
  constexpr int64_t second_level = 640 << 10;
  const int64_t blocks = block_count(group_outputs_), block_bytes = units_ * taps_ * dense_outputs * 4;
  const int64_t tiles = (lift.segment + k.max_dense_vectors - 1) / k.max_dense_vectors, groups = geometry_.groups;
  const bool weights_stay = units_ * unit_bytes < std::max(blocks * block_bytes, second_level);
  const int64_t outer = weights_stay ? blocks : tiles, inner = weights_stay ? tiles : blocks;
  const int64_t splits = output_splits(outer * groups, inner * 8, core::num_threads());
  const bool finishes = weights_stay && splits == 1;
  core::parallel_for(groups * outer * splits, [&](int64_t chunk, int) {
    const int64_t group = chunk / (outer * splits), at = chunk / splits % outer, split = chunk % splits;
    for (int64_t i = inner * split / splits; i < inner * (split + 1) / splits; ++i) {
      const int64_t block = weights_stay ? at : i, tile = weights_stay ? i : at;
      const int64_t j = lift.segment * tile / tiles;  // tiles of nearly equal width
      DenseTile d{};
      d.x = call.staged + group * units_ * unit_bytes + j * vector_bytes;
      d.unit_stride = unit_bytes;
      d.tap_source = tap_source.data();
      d.units = units_;
      d.taps = static_cast<int>(taps_);
      d.weights = weights_.data() + (group * blocks + block) * block_bytes;
      d.acc = call.planes + (group * group_outputs_ + block * dense_outputs) * call.out_plane() + j * vector_bytes;
      d.acc_stride = call.out_plane();
      d.outputs = static_cast<int>(std::min<int64_t>(dense_outputs, group_outputs_ - block * dense_outputs));
      d.vectors = static_cast<int>(lift.segment * (tile + 1) / tiles - j);
      (activations_.dtype == DType::f32 ? k.dense_f32 : k.dense_i8)(d);
    }
    if (finishes)
      finish_outputs(call, group * group_outputs_ + at * dense_outputs,
                     group * group_outputs_ + std::min(group_outputs_, (at + 1) * dense_outputs));
  });
  return finishes;
}

}  // namespace pycodesign::repetition
