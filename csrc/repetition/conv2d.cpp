// Convolutions: stage a band of the input into the lifted layout, sum, finish. See README.md for the drawing.
#include <algorithm>
#include <cstring>

#include "core/fork_guard.h"
#include "core/thread_pool.h"
#include "repetition/codegen_x86.h"
#include "repetition/costs.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

namespace {

// Where channel c of this band begins in lifted activations.
char* lifted_channel(const Tensor& t, const LiftPlan& lift, int64_t c, DType dtype) {
  return t.data + (t.size[1] * lift.vectors_before + c * lift.segment) * lift.lanes * element_bytes(dtype);
}

// Touches share i of n of the code that a chunk runs first.
void prefetch(const LayerCode& code, int64_t chunk, int64_t i, int64_t n) {
  const CodeSegment& first = code.chunks()[static_cast<size_t>(chunk)].segments[0];
  const int64_t lines = (first.end - first.begin) / 64;
  for (int64_t l = lines * i / n; l < lines * (i + 1) / n; ++l) __builtin_prefetch(code.address(first) + l * 64, 0, 2);
}

}  // namespace

// Large ones in huge pages, as planes lie far apart.
char* scratch(int which, size_t bytes) {
  thread_local core::AlignedBuffer<char> buffers[4];
  if (bytes > core::huge_page / 4) bytes = (bytes + core::huge_page - 1) / core::huge_page * core::huge_page;
  return buffers[which].reserve(bytes);
}

std::span<const int64_t> list_sources(const LiftPlan& lift, int64_t units, int64_t together) {
  thread_local std::vector<int64_t> source;
  source.clear();
  for (int64_t u = 0; u < units; u += together)
    for (const int64_t tap : lift.tap_source) source.push_back(u * lift.unit_bytes + tap);
  return source;
}

// Machine code for this kind of vectors; null where none can be made.
const LayerCode* PackedConv2d::code(const Kernels& k) const {
  return k.generates_code && core::ExecutableMemory::available() ? &machine_code(k.lanes == 16) : nullptr;
}

const LayerCode& PackedConv2d::machine_code(bool avx512) const {
  if (const LayerCode* code = made_code_[avx512]) return *code;
  const core::ForkGuard lock(mutex_);
  auto& made = code_[avx512];
  if (!made) {
    const std::vector<uint8_t> unpacked = codes();
    const Weights weights = weights_of(unpacked);
    made = std::make_unique<LayerCode>(code_layer(weights, geometry_, activations_), avx512);
    made_code_[avx512] = made.get();
  }
  return *made;
}

// The same layer by tables.
const PackedConv2d& PackedConv2d::without_code() const {
  const core::ForkGuard lock(mutex_);
  if (!without_code_) {
    const std::vector<uint8_t> unpacked = codes();
    without_code_.reset(new PackedConv2d(*this, weights_of(unpacked), Algorithm::tables));
  }
  return *without_code_;
}

const PackedConv2d& PackedConv2d::prepared(const Kernels& k) const {
  return algorithm_ == Algorithm::codegen && !code(k) ? without_code() : *this;
}

ConvCase PackedConv2d::conv_case(const Kernels& k, int64_t images, int64_t height, int64_t width) const {
  const LayerCode* code = algorithm_ == Algorithm::codegen ? this->code(k) : nullptr;
  const int64_t segments = code                              ? static_cast<int64_t>(code->chunks()[0].segments.size())
                           : algorithm_ == Algorithm::tables ? units_
                                                             : 1;
  return {k,
          geometry_,
          images,
          height,
          width,
          k.lanes,
          halves(),
          cycles_,
          static_cast<double>(code    ? code->bytes()
                              : rows_ ? rows_->counts().bytes
                                      : static_cast<int64_t>(weights_size_)),
          geometry_.groups * units_,
          outputs_,
          code ? static_cast<int64_t>(code->chunks().size()) : blocks_,
          segments,
          segments > 1 ? outputs_
          : matrix_    ? matrix_together() * block_outputs
          : rows_      ? 2 * panel_outputs
                       : 0,
          code ? static_cast<int64_t>(code->columns().patterns.size()) : 0,
          !columns_.empty(),
          rows_ != nullptr};
}

std::shared_ptr<ConvPlan> PackedConv2d::make_plan(const ConvCase& c, const Pitch& pitch, const Cut& cut,
                                                  int64_t splits) const {
  auto made = std::make_shared<ConvPlan>(c, pitch, cut, splits);
  const int64_t outputs = std::max<int64_t>(outputs_ / splits, 1);
  for (LiftPlan& lift : made->bands)
    if (rows_) lift.rows = RowPlan(lift, geometry_, units_, rows_->words());
    else if (algorithm_ == Algorithm::tables)
      lift.tables = TablePlan(lift, max_entries_, block_units_, outputs, c.kernels);
    else if (algorithm_ == Algorithm::codebook)
      lift.tables = TablePlan::of_codebook(lift, columns_.empty() ? std::vector<ColumnTap>{} : column_taps(geometry_),
                                           max_entries_, block_units_, outputs, c.kernels);
  return made;
}

std::shared_ptr<const ConvPlan> PackedConv2d::plan(const Kernels& k, int64_t images, int64_t height,
                                                   int64_t width) const {
  const ConvCase c = conv_case(k, images, height, width);
  const int threads = core::num_threads();
  const std::array<int64_t, 5> key{images, height, width, reinterpret_cast<int64_t>(&k), threads};
  const core::ForkGuard lock(mutex_);
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  if (plans_.size() >= 32) plans_.clear();  // a caller that never repeats a size
  const Pitch pitch = c.least_pitch();
  std::vector<int64_t> splits;
  const Cut cut = choose_cut({c}, pitch, threads, splits);
  return plans_[key] = make_plan(c, pitch, cut, splits[0]);
}

void PackedConv2d::run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue& epilogue) const {
  if (out.size[0] * out.size[1] * out.size[2] * out.size[3] == 0) return;
  const Kernels& k = kernels();
  const PackedConv2d& layer = prepared(k);
  layer.run(*layer.plan(k, x.size[0], x.size[2], x.size[3]), x, out, residual, epilogue);
}

void PackedConv2d::run(const ConvPlan& plan, const Tensor& x, const Tensor& out, const Tensor* residual,
                       const Epilogue& epilogue) const {
  const Kernels& k = plan.kernels;
  const LayerCode* code = algorithm_ == Algorithm::codegen ? this->code(k) : nullptr;
  const Call call{k, code, x, out, residual, epilogue};
  const auto bands = static_cast<int64_t>(plan.bands.size()), splits = plan.splits;
  const int64_t blocks = code ? static_cast<int64_t>(code->chunks().size()) : blocks_;
  // Planes for every unit; entries of channels that do not exist are built (from what lies behind) but never read.
  const LiftPlan& largest = *std::max_element(plan.bands.begin(), plan.bands.end(), [](const auto& a, const auto& b) {
    return std::pair(a.row_band_bytes(), a.summed_bytes()) < std::pair(b.row_band_bytes(), b.summed_bytes());
  });
  const int64_t stages = geometry_.groups * divide_up(group_channels_, stage_channels_);
  const int64_t band_bytes =
      rows_ ? largest.row_band_bytes() : (geometry_.groups * units_ + group_size_ + 1) * largest.summed_bytes();
  const int64_t spare_bytes = code ? max_touched_bytes : 0;
  if (splits == 1 || x.lifted) {  // what lies in lanes is staged sooner than threads meet
    core::parallel_for(bands * splits, [&](int64_t item, int) {
      const LiftPlan& lift = plan.bands[static_cast<size_t>(item / splits)];
      const int64_t s = item % splits, first = blocks * s / splits, last = blocks * (s + 1) / splits;
      if (code) return sum_code(call, lift, nullptr, first, last);
      char* staged = scratch(0, static_cast<size_t>(band_bytes));
      for (int64_t i = 0; i < stages; ++i) stage(call, lift, i, staged);
      sum(call, lift, staged, first, last);
    });
    return;
  }
  char* const staged = scratch(0, static_cast<size_t>(bands * band_bytes + spare_bytes));
  // Ranges of planes: large enough to be worth a hand-over, and as many as threads can share.
  constexpr int64_t words_per_chunk = 8192;
  const auto phases = static_cast<int64_t>(largest.phases.size());
  const int64_t threads = core::num_threads(), wanted = stages * phases * largest.positions / words_per_chunk + 1;
  const int64_t chunks = std::min(divide_up(wanted, threads) * threads, stages);
  core::parallel_for(bands * chunks, [&](int64_t item, int) {
    const int64_t b = item / chunks, c = item % chunks;
    for (int64_t i = stages * c / chunks; i < stages * (c + 1) / chunks; ++i)
      stage(call, plan.bands[static_cast<size_t>(b)], i, staged + b * band_bytes);
  });
  core::parallel_for(bands * splits, [&](int64_t item, int) {
    const int64_t b = item / splits, s = item % splits;
    sum(call, plan.bands[static_cast<size_t>(b)], staged + b * band_bytes, blocks * s / splits,
        blocks * (s + 1) / splits);
  });
}

// Share `index` of all channels, where `sum` looks for them.
void PackedConv2d::stage(const Call& call, const LiftPlan& lift, int64_t index, char* staged) const {
  if (rows_) return stage_rows(call, lift, index, staged);
  const int64_t per_group = divide_up(group_channels_, stage_channels_), group = index / per_group,
                channel = index % per_group * stage_channels_;
  stage_channels(call, lift, group, channel,
                 staged + (group * units_ + channel / stage_channels_ * stage_planes_) * lift.summed_bytes());
}

// Channels of a group, stage_channels_ of them from `channel` on.
void PackedConv2d::stage_channels(const Call& call, const LiftPlan& lift, int64_t group, int64_t channel,
                                  char* to) const {
  const int64_t first = group * group_channels_ + channel, count = std::min(stage_channels_, group_channels_ - channel);
  const bool has_columns = !lift.column_phases.empty();
  char* const planes = has_columns ? scratch(3, static_cast<size_t>(count * lift.unit_bytes)) : to;
  if (call.x.lifted) restage_channels(call, lift, first, count, planes);
  else
    for (size_t p = 0; p < lift.phases.size(); ++p) stage_phase(call, lift, p, first, count, planes);
  for (int64_t c = 0; has_columns && c < count; ++c)
    sum_columns(call, lift, planes + c * lift.unit_bytes, to + c * lift.column_bytes);
}

// What to stage of a phase, but for where it goes.
Stage PackedConv2d::stage_of(const Call& call, const LiftPlan& lift, size_t index, int64_t first, int64_t count) const {
  const Tensor& x = call.x;
  const LiftPlan::Phase& phase = lift.phases[index];
  const bool empty = phase.rows.data == 0 || phase.columns.data == 0;
  Stage s{};
  s.channels = static_cast<int>(count);
  for (int c = 0; c < s.channels; ++c)
    s.source[c] = x.data + lift.band.image * x.stride[0] + (first + c) * x.stride[1] +
                  (empty ? 0 : phase.rows.first * x.stride[2] + phase.columns.first * x.stride[3]);
  s.staging = staging_;
  s.dtype = activations_.dtype;
  s.zero_point = activations_.zero_point;
  s.center = center_;
  s.images = lift.band.images;
  s.stride_n = x.stride[0];
  s.stride_h = x.stride[2] * geometry_.stride[0];
  s.stride_w = x.stride[3] * geometry_.stride[1];
  s.rows = phase.rows;
  s.columns = phase.columns;
  s.image_pitch = lift.image_pitch;
  s.row_pitch = lift.row_pitch;
  return s;
}

void PackedConv2d::stage_phase(const Call& call, const LiftPlan& lift, size_t index, int64_t first, int64_t count,
                               char* planes) const {
  const LiftPlan::Phase& phase = lift.phases[index];
  Stage s = stage_of(call, lift, index, first, count);
  s.segment = lift.segment;
  s.spans = phase.spans.data();
  s.span_count = static_cast<int>(phase.spans.size());
  s.positions = lift.positions;
  s.half = lift.half;
  s.flat = scratch(1, lift.flat_bytes() * (staging_ == Staging::bf16_terms ? 2 : 1));
  s.channel_stride = lift.unit_bytes;
  s.lifted = planes + static_cast<int64_t>(index) * lift.plane_bytes;
  call.k.stage(s);
}

// The planes of one unit to the sums of its filters' columns.
void PackedConv2d::sum_columns(const Call& call, const LiftPlan& lift, const char* planes, char* sums) const {
  const std::vector<ColumnPattern>& patterns = call.code->columns().patterns;
  for (size_t p = 0; p < lift.column_phases.size(); ++p) {
    const LiftPlan::ColumnPhase& phase = lift.column_phases[p];
    ColumnSums s{};
    for (int64_t r = 0; r < geometry_.kernel[0]; ++r) s.row[r] = planes + phase.row_source[static_cast<size_t>(r)];
    s.patterns = patterns.data()->data();
    s.count = static_cast<int64_t>(patterns.size());
    s.vectors = phase.vectors;
    s.sums = sums + lift.column_source[p];
    (staging_ == Staging::f32 ? call.k.sum_columns_f32 : call.k.sum_columns_i16)(s);
  }
}

void PackedConv2d::restage_channels(const Call& call, const LiftPlan& lift, int64_t first, int64_t count,
                                    char* staged) const {
  Restage s{};
  s.channels = static_cast<int>(count);
  for (int64_t c = 0; c < count; ++c) s.source[c] = lifted_channel(call.x, lift, first + c, activations_.dtype);
  s.data = call.x.data;
  s.data_channels = call.x.size[1];
  s.first_channel = first;
  s.staging = staging_;
  s.dtype = activations_.dtype;
  s.zero_point = activations_.zero_point;
  s.center = center_;
  s.vectors = static_cast<int64_t>(lift.restage_first.size());
  s.first = lift.restage_first.data();
  s.mask = reinterpret_cast<const char*>(lift.restage_mask.data());
  s.halos = lift.halos.data();
  s.halo_count = static_cast<int64_t>(lift.halos.size());
  s.lifted = staged;
  s.channel_stride = lift.unit_bytes;
  call.k.restage(s);
}

// Blocks [first, last) of outputs over one staged band: sums and the epilogue.
void PackedConv2d::sum(const Call& call, const LiftPlan& lift, const char* staged, int64_t first, int64_t last) const {
  if (algorithm_ == Algorithm::codegen) return sum_code(call, lift, staged, first, last);
  if (rows_) return sum_rows(call, lift, staged, first, last);
  const int64_t per_group = blocks_ / geometry_.groups;
  for (int64_t block = first; block < last;) {  // outputs of one group of the convolution at a time
    const int64_t group = block / per_group, end = std::min(last, (group + 1) * per_group);
    const int64_t from = block % per_group * block_size(),
                  to = std::min((end - group * per_group) * block_size(), group_outputs_);
    const char* x = staged + group * units_ * lift.unit_bytes;
    if (matrix_) sum_matrix(call, lift, x, group, from, to);
    else if (algorithm_ == Algorithm::dense) sum_dense(call, lift, x, group, from, to);
    else sum_tables(call, lift, x, group, from, to);
    block = end;
  }
}

// The epilogue of outputs whose sums lie in lanes, into such lanes.
void PackedConv2d::finish_lanes(const Call& call, const LiftPlan& lift, const Sums& sums, const char* residual,
                                char* out) const {
  Finish f = finish_of(call, sums.first_output);
  f.acc = sums.data;
  f.run = lift.lanes;
  f.run_stride = sums.vector_stride;
  f.count = lift.segment * lift.lanes;
  f.out = out;
  f.out_stride = element_bytes(call.epilogue.out_dtype);
  f.residual = residual;
  f.residual_stride = element_bytes(call.epilogue.residual_dtype);
  f.outputs = sums.outputs;
  f.acc_step = sums.output_stride;
  f.out_step = f.count * f.out_stride;
  f.residual_step = f.count * f.residual_stride;
  call.k.finish(f);
}

Finish PackedConv2d::finish_of(const Call& call, int64_t output) const {
  Finish f{};
  f.epilogue = &call.epilogue;
  f.multiplier = &multiplier_[static_cast<size_t>(output)];
  f.bias = bias_.empty() ? nullptr : &bias_[static_cast<size_t>(output)];
  f.correction = correction_.empty() ? nullptr : &correction_[static_cast<size_t>(output)];
  return f;
}

namespace {

// The kernel that moves elements between the lanes of one output and contiguous rows, in one step; null: none does.
auto order_of(const Kernels& k, const LiftPlan& lift, const Tensor& rows, DType dtype) -> void (*)(const Order&) {
  const int64_t bytes = element_bytes(dtype);
  if (lift.lane_pixels.empty() || dtype == DType::i32 || rows.stride[3] != bytes ||
      (lift.band.rows > 1 && rows.stride[2] != lift.columns * bytes))
    return nullptr;
  return bytes == 1 ? k.order_bytes : lift.segment * lift.lanes <= 64 ? k.order_words : nullptr;
}

bool moves_lanes(const Kernels& k, const LiftPlan& lift, const Tensor& rows, DType dtype) {
  return order_of(k, lift, rows, dtype) || (k.unlift_bytes && element_bytes(dtype) == 1 && rows.stride[3] == 1);
}

// Outputs [first, first + count) of `rows` into lanes, or back; `flat` is scratch.
void move_lanes(const Kernels& k, const LiftPlan& lift, const Tensor& rows, DType dtype, int64_t first, int64_t count,
                bool lifts, char* in_lanes, char* flat) {
  const Band& band = lift.band;
  const int64_t lanes = lift.segment * lift.lanes, pixels = band.rows * lift.columns,
                step = lanes * element_bytes(dtype);
  char* const data = rows.data + band.image * rows.stride[0] + first * rows.stride[1] + band.row * rows.stride[2];
  if (const auto order = order_of(k, lift, rows, dtype); order && lifts)
    order({data, pixels, rows.stride[1], lift.lane_pixels.data(), lanes, in_lanes, step, count});
  else if (order) order({in_lanes, lanes, step, lift.pixel_lanes.data(), pixels, data, rows.stride[1], count});
  else
    (lifts ? k.lift_bytes : k.unlift_bytes)({in_lanes, static_cast<int>(lift.lanes), lift.segment, flat, band.images,
                                             band.rows, lift.columns, lift.image_pitch, lift.row_pitch, data,
                                             rows.stride[0], rows.stride[2], count, step, rows.stride[1]});
}

}  // namespace

// The epilogue, in the lanes, whose elements then move to rows; or of sums that were moved.
void PackedConv2d::finish_outputs(const Call& call, const LiftPlan& lift, const Sums& sums) const {
  const Tensor &out = call.out, *residual = call.residual;
  const Band& band = lift.band;
  const DType out_dtype = call.epilogue.out_dtype, residual_dtype = call.epilogue.residual_dtype;
  const int64_t columns = lift.columns, pixels = band.rows * columns;
  // Outputs of nothing but padding may share a position in the lanes: their sums are the same, their residuals not.
  const bool apart = lift.row_pitch >= columns && (band.images == 1 || lift.image_pitch >= band.rows * lift.row_pitch);
  if ((out.lifted || moves_lanes(call.k, lift, out, out_dtype)) &&
      (!residual || residual->lifted || (apart && moves_lanes(call.k, lift, *residual, residual_dtype)))) {
    const bool moves = !out.lifted || (residual && !residual->lifted);
    const int64_t lanes = lift.segment * lift.lanes, spare = 64 * lift.lanes;
    const int64_t together = moves ? std::clamp<int64_t>(4096 / lanes, 1, sums.outputs) : sums.outputs;
    const int64_t out_bytes = together * lanes * element_bytes(out_dtype) + spare,
                  residual_bytes = together * lanes * element_bytes(residual_dtype) + spare;
    char* const out_lanes =
        moves ? scratch(1, static_cast<size_t>(out_bytes + residual_bytes + together * lanes + 64)) : nullptr;
    for (int64_t i = 0; i < sums.outputs; i += together) {
      Sums here = sums;
      here.data += i * sums.output_stride;
      here.first_output += i;
      here.outputs = std::min(together, sums.outputs - i);
      const auto place = [&](const Tensor& t, DType dtype, int64_t scratch_at) {
        return t.lifted ? lifted_channel(t, lift, here.first_output, dtype) : out_lanes + scratch_at;
      };
      char* const to = place(out, out_dtype, 0);
      char* const added = residual ? place(*residual, residual_dtype, out_bytes) : nullptr;
      const auto move = [&](const Tensor& rows, DType dtype, bool lifts, char* in_lanes) {
        move_lanes(call.k, lift, rows, dtype, here.first_output, here.outputs, lifts, in_lanes,
                   out_lanes + out_bytes + residual_bytes);
      };
      if (residual && !residual->lifted) move(*residual, residual_dtype, true, added);
      finish_lanes(call, lift, here, added, to);
      if (!out.lifted) move(out, out_dtype, false, to);
    }
    return;
  }
  const bool whole = (band.rows == 1 || out.stride[2] == columns * out.stride[3]) &&
                     (!residual || band.rows == 1 || residual->stride[2] == columns * residual->stride[3]);
  char* flat = scratch(1, lift.flat_bytes() + static_cast<size_t>(band.images * pixels * 4 + call.vector_bytes()));
  char* rows = flat + lift.flat_bytes();
  for (int64_t i = 0; i < sums.outputs; ++i) {
    const int64_t o = sums.first_output + i;
    call.k.unlift({sums.data + i * sums.output_stride, sums.vector_stride, lift.segment, halves(), flat, band.images,
                   band.rows, columns, lift.image_pitch, lift.row_pitch, rows});
    Finish f = finish_of(call, o);
    f.out_stride = out.stride[3];
    f.residual_stride = residual ? residual->stride[3] : 0;
    f.count = whole ? pixels : columns;
    const auto at = [&](const Tensor& t, int64_t n, int64_t r) {
      return t.data + (band.image + n) * t.stride[0] + o * t.stride[1] + (band.row + r) * t.stride[2];
    };
    for (int64_t n = 0; n < band.images; ++n)
      for (int64_t r = 0; r < (whole ? 1 : band.rows); ++r) {
        f.acc = rows + (n * pixels + r * columns) * 4;
        f.out = at(out, n, r);
        if (residual) f.residual = at(*residual, n, r);
        call.k.finish(f);
      }
  }
}

// One segment of all chunks after the other: what it reads of the band stays in the cache, the sums do too. Without
// `staged` planes each segment's are made just before.
void PackedConv2d::sum_code(const Call& call, const LiftPlan& lift, const char* staged, int64_t first,
                            int64_t last) const {
  const LayerCode& code = *call.code;
  const int64_t vector_bytes = call.vector_bytes(), output_bytes = halves() * vector_bytes,
                channel_bytes = lift.summed_bytes();
  const bool has_columns = !lift.column_phases.empty();
  const int64_t* source = (has_columns ? lift.column_source : lift.tap_source).data();
  const int64_t step = has_columns ? static_cast<int64_t>(code.columns().patterns.size()) * vector_bytes : vector_bytes;
  const auto chunk = [&](int64_t i) -> const CodeChunk& { return code.chunks()[static_cast<size_t>(i)]; };
  const auto sums_at = [&](int64_t i) {
    return (chunk(i).first_output - chunk(first).first_output) * lift.segment * output_bytes;
  };
  const CodeChunk& final_chunk = chunk(last - 1);
  char* const sums =
      scratch(2, static_cast<size_t>(sums_at(last - 1) + final_chunk.outputs * lift.segment * output_bytes));
  const size_t segments = final_chunk.segments.size();
  const int64_t first_group = chunk(first).group, groups = final_chunk.group - first_group + 1;
  for (size_t s = 0; s < segments; ++s) {
    const CodeSegment& shared = chunk(first).segments[s];  // all chunks read the same channels, of their group
    const int64_t from = staged ? 0 : shared.channel / stage_channels_ * stage_channels_,
                  planes = staged ? units_ : shared.channel + shared.channels - from;
    const char* x = staged ? staged + first_group * units_ * channel_bytes : nullptr;
    if (!staged) {
      const int64_t pieces = divide_up(planes, stage_channels_), room = planes + stage_channels_;
      char* const to = scratch(0, static_cast<size_t>((groups * planes + room) * channel_bytes + max_touched_bytes));
      for (int64_t i = 0; i < groups * pieces; ++i) {
        if (s == 0) prefetch(code, first, i, groups * pieces);
        const int64_t g = i / pieces, c = i % pieces * stage_channels_;
        stage_channels(call, lift, first_group + g, from + c, to + (g * planes + c) * channel_bytes);
      }
      x = to;
    }
    for (int64_t i = first; i < last; ++i) {
      const CodeSegment& segment = chunk(i).segments[s];
      // The first runs of a segment touch the next one's code, a second time where there is time for it, as prefetches
      // may have been dropped. The others touch what is near.
      const int64_t touching = lift.segment < 6 && costs(call.vector_bytes() == 64).drops_prefetches ? 1 : 2;
      const CodeSegment& next = i + 1 < last ? chunk(i + 1).segments[s] : chunk(first).segments[(s + 1) % segments];
      const char* at = x + ((chunk(i).group - first_group) * planes + segment.channel - from) * channel_bytes;
      char* acc = sums + sums_at(i);
      const SegmentFunction run = code.function(segment);
      for (int64_t v = 0; v < lift.segment; ++v, at += step, acc += chunk(i).outputs * output_bytes)
        run(at, acc, v < touching ? code.address(next) : x, channel_bytes, source);
      if (s + 1 == segments)
        finish_outputs(call, lift,
                       {sums + sums_at(i), output_bytes, chunk(i).outputs * output_bytes, chunk(i).first_output,
                        chunk(i).outputs});
    }
  }
}

void PackedConv2d::sum_tables(const Call& call, const LiftPlan& lift, const char* x, int64_t group, int64_t first,
                              int64_t last) const {
  const Kernels& k = call.k;
  const int64_t vector_bytes = call.vector_bytes(), count = last - first, channel_bytes = lift.unit_bytes;
  const bool is_float = activations_.dtype == DType::f32;
  const TablePlan& t = lift.tables;
  const int64_t entry_bytes = t.width * vector_bytes, unit_bytes = entry_bytes * max_entries_;
  const int64_t row_bytes = algorithm_ == Algorithm::codebook
                                ? t.column_vectors * static_cast<int64_t>(columns_.size()) * vector_bytes
                                : (group_size_ + 1) * entry_bytes,
                table_bytes = unit_bytes * block_units_;
  TableBuild build{};
  build.channel_stride = channel_bytes;
  build.segment_source = t.segment_source.data();
  build.segment_at = t.segment_at.data();
  build.segment_shift = t.segment_shift.data();
  build.segments = static_cast<int>(t.segment_source.size());
  build.entry_bytes = entry_bytes;
  build.unit_bytes = unit_bytes;
  build.group_size = group_size_;
  build.steps = steps_.data();
  build.step_count = static_cast<int64_t>(steps_.size());
  build.rows = scratch(3, static_cast<size_t>(row_bytes + table_bytes + count * t.vectors * vector_bytes));
  build.tables = build.rows + row_bytes;
  TableSum sum{};
  sum.tables = build.tables;
  sum.slot_offset = t.slot_offset.data();
  sum.entry_bytes = entry_bytes;
  sum.wide = entry_bytes_ == 2;
  sum.acc = build.tables + table_bytes;
  sum.acc_stride = t.vectors * vector_bytes;
  sum.outputs = count;
  const int64_t plane = (lift.segment | 1) * vector_bytes;
  char* const sums = scratch(2, static_cast<size_t>(count * plane));
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const int64_t j = lift.segment * tile / t.tiles;
    build.vectors = sum.vectors = static_cast<int>(lift.segment * (tile + 1) / t.tiles - j);
    for (int64_t block = 0; block * block_units_ < table_units_; ++block) {
      const int64_t units_here = std::min<int64_t>(block_units_, table_units_ - block * block_units_),
                    slots = units_here * unit_slots_;
      if (algorithm_ == Algorithm::codebook) {
        build_kernels(k, lift, x + j * vector_bytes, block * block_units_, units_here, sum.vectors, build.rows,
                      build.tables);
      } else {
        build.x = x + block * block_units_ * group_size_ * channel_bytes + j * vector_bytes;
        build.units = units_here;
        (is_float ? k.build_tables_f32 : k.build_tables_i32)(build);
      }
      sum.slots = static_cast<int>(slots);
      const int64_t before = (group * table_units_ + block * block_units_) * unit_slots_ * group_outputs_;
      sum.stream = weights_.data() + (before + first * slots) * entry_bytes_;
      sum.first = block == 0;
      (is_float ? k.sum_tables_f32 : k.sum_tables_i32)(sum);
    }
    for (int64_t o = 0; o < count; ++o)
      std::memcpy(sums + o * plane + j * vector_bytes, sum.acc + o * sum.acc_stride,
                  static_cast<size_t>(sum.vectors * vector_bytes));
  }
  finish_outputs(call, lift, {sums, plane, vector_bytes, group * group_outputs_ + first, count});
}

// One block of outputs after the other, by parts of its weights that stay in the first-level cache; the band stays in
// the second.
void PackedConv2d::sum_dense(const Call& call, const LiftPlan& lift, const char* x, int64_t group, int64_t first,
                             int64_t last) const {
  const Kernels& k = call.k;
  const bool narrow = k.dense_narrow && !runs_.empty();
  const auto sum = narrow ? k.dense_narrow : activations_.dtype == DType::f32 ? k.dense_f32 : k.dense_i8;
  const int64_t vector_bytes = call.vector_bytes(), plane = (lift.segment | 1) * vector_bytes;
  const int64_t tiles = divide_up(lift.segment, narrow ? max_narrow_vectors : k.max_dense_vectors);
  const int64_t steps = units_ * taps_, parts = divide_up(steps, dense_part_steps);
  const std::span<const int64_t> source = list_sources(lift, units_, 1);
  char* const sums = scratch(2, static_cast<size_t>(dense_outputs * plane));
  for (int64_t o = first; o < last; o += dense_outputs) {
    const int64_t block = group * block_count(group_outputs_) + o / dense_outputs;
    DenseTile d{};
    d.acc_stride = plane;
    d.outputs = static_cast<int>(std::min<int64_t>(dense_outputs, last - o));
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t step = part * dense_part_steps;
      d.source = source.data() + step;
      d.steps = std::min(dense_part_steps, steps - step);
      d.weights = weights_.data() + (block * steps + step) * dense_outputs * 4;
      d.first = part == 0;
      if (narrow) d.runs = runs_.of(block * parts + part);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t j = lift.segment * tile / tiles;  // tiles of nearly equal width
        d.x = x + j * vector_bytes;
        d.acc = sums + j * vector_bytes;
        d.vectors = static_cast<int>(lift.segment * (tile + 1) / tiles - j);
        d.prefetched = tile > 0;
        sum(d);
      }
    }
    finish_outputs(call, lift, {sums, plane, vector_bytes, group * group_outputs_ + o, d.outputs});
  }
}

}  // namespace pycodesign::repetition
