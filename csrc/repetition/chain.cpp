#include "repetition/chain.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "core/cpu.h"
#include "core/fork_guard.h"
#include "core/thread_pool.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

// For one set of input sizes. A value is lifted where every step that touches it works in the same bands and lanes.
struct ChainPlan {
  const Kernels& kernels;  // those in force when the call began
  std::vector<Chain::Shape> shape;
  std::vector<bool> lifted;
  std::vector<bool> channels_last;  // pixels of channels, which layers by rows of channels write and read
  std::vector<int64_t> elements;    // as stored: lanes that hold no pixel, or what lies behind its channels, too
  std::vector<size_t> at;           // bytes within the arena
  size_t bytes = 0;
  std::vector<const PackedConv2d*> layer;             // of each step: what runs
  std::vector<std::shared_ptr<const ConvPlan>> conv;  // null: nothing to compute
};

namespace {

constexpr size_t guard = 128;  // bytes before and after lifted activations, which restaging reads and masks

int64_t count(const Chain::Shape& s) { return s[0] * s[1] * s[2] * s[3]; }

Tensor contiguous(char* data, const Chain::Shape& s, DType dtype) {
  const int64_t e = element_bytes(dtype);
  return {data, s, {s[1] * s[2] * s[3] * e, s[2] * s[3] * e, s[3] * e, e}};
}

// Channels side by side, each pixel a row of whole cache lines.
Tensor pixel_rows(char* data, const Chain::Shape& s, DType dtype) {
  const int64_t e = element_bytes(dtype), row = (s[1] * e + 63) / 64 * 64;
  return {data, s, {s[2] * s[3] * row, e, s[3] * row, row}};
}

bool is_contiguous(const Tensor& t, DType dtype) {
  const Tensor plain = contiguous(t.data, t.size, dtype);
  for (size_t i = 0; i < 4; ++i)
    if (t.size[i] > 1 && t.stride[i] != plain.stride[i]) return false;
  return true;
}

// Itself, or a copy in `buffer`.
Tensor make_contiguous(const Tensor& t, DType dtype, core::AlignedBuffer<char>& buffer) {
  if (is_contiguous(t, dtype)) return contiguous(t.data, t.size, dtype);
  const auto e = static_cast<size_t>(element_bytes(dtype));
  char* to = buffer.reserve(static_cast<size_t>(count(t.size)) * e);
  const Tensor copy = contiguous(to, t.size, dtype);
  for (int64_t n = 0; n < t.size[0]; ++n)
    for (int64_t c = 0; c < t.size[1]; ++c)
      for (int64_t h = 0; h < t.size[2]; ++h)
        for (int64_t w = 0; w < t.size[3]; ++w, to += e)
          std::memcpy(to, t.data + n * t.stride[0] + c * t.stride[1] + h * t.stride[2] + w * t.stride[3], e);
  return copy;
}

std::string text(const Chain::Shape& s) {
  return "(" + std::to_string(s[0]) + ", " + std::to_string(s[1]) + ", " + std::to_string(s[2]) + ", " +
         std::to_string(s[3]) + ")";
}

// Whether windows share so much that their columns should be pooled first, which only plain maps do.
bool overlaps_much(const Pool& p) { return p.kernel[0] * p.kernel[1] > 9 * p.stride[0] * p.stride[1]; }

// Calls visit(lower) until it lowers nothing: lower(value) clears its mark.
template <class Visit> void settle(std::vector<bool>& marked, const Visit& visit) {
  for (bool changed = true; changed;) {
    changed = false;
    visit([&](int value) {
      const auto v = static_cast<size_t>(value);
      changed |= marked[v];
      marked[v] = false;
    });
  }
}

int64_t pooled_size(const Pool& p, size_t axis, int64_t size) {
  if (p.kernel[axis] == 0) return 1;
  const int64_t span = size + 2 * p.padding[axis] - p.dilation[axis] * (p.kernel[axis] - 1) - 1;
  return span < 0 ? 0 : span / p.stride[axis] + 1;
}

}  // namespace

Chain::Chain() = default;
Chain::~Chain() = default;

const Chain::Shape& Chain::shape(const ChainPlan& plan, int value) { return plan.shape[static_cast<size_t>(value)]; }
Chain::Layout Chain::layout(const ChainPlan& plan, int value) {
  const auto v = static_cast<size_t>(value);
  return plan.lifted[v] ? Layout::lifted : plan.channels_last[v] ? Layout::channels_last : Layout::plain;
}

int Chain::add_input(DType dtype) {
  values_.push_back(dtype);
  inputs_.push_back(static_cast<int>(values_.size()) - 1);
  return inputs_.back();
}

int Chain::add_step(Step step, DType out) {
  values_.push_back(out);
  step.out = static_cast<int>(values_.size()) - 1;
  if (step.residual >= 0) {
    step.epilogue.has_residual = true;
    step.epilogue.residual_dtype = dtype(step.residual);
  }
  steps_.push_back(std::move(step));
  return steps_.back().out;
}

int Chain::add_conv2d(std::shared_ptr<const PackedConv2d> layer, int x, int residual, const Epilogue& e) {
  return add_step({Kind::conv2d, x, residual, 0, e, std::move(layer), nullptr, {}, 1, 0}, e.out_dtype);
}
int Chain::add_linear(std::shared_ptr<const PackedLayer> layer, int x, int residual, const Epilogue& e) {
  return add_step({Kind::linear, x, residual, 0, e, nullptr, std::move(layer), {}, 1, 0}, e.out_dtype);
}
int Chain::add_max_pool2d(int x, const Pool& pool) {
  return add_step({Kind::max_pool2d, x, -1, 0, {}, nullptr, nullptr, pool, 1, 0}, dtype(x));
}
int Chain::add_avg_pool2d(int x, const Pool& pool, double scale, int32_t zero_point, const Epilogue& e) {
  return add_step({Kind::avg_pool2d, x, -1, 0, e, nullptr, nullptr, pool, scale, zero_point}, e.out_dtype);
}
int Chain::add_add(int a, int b, float scale, int32_t zero_point, const Epilogue& e) {
  return add_step({Kind::add, a, b, 0, e, nullptr, nullptr, {}, scale, zero_point}, e.out_dtype);
}
void Chain::set_outputs(std::vector<int> values) {
  for (const int v : values) static_cast<void>(dtype(v));  // throws where there is none
  outputs_ = std::move(values);
}

Chain::Shape Chain::output_shape(const Step& step, const Shape& x) const {
  switch (step.kind) {
    case Kind::conv2d: {
      const Geometry& g = step.conv->geometry();
      if (x[1] != g.channels)
        throw std::invalid_argument("x: expected (N, " + std::to_string(g.channels) +
                                    ", H, W) for a convolution, got " + text(x));
      return {x[0], step.conv->outputs(), g.output_size(0, x[2]), g.output_size(1, x[3])};
    }
    case Kind::linear:
      if (x[1] * x[2] * x[3] != step.linear->inputs())
        throw std::invalid_argument("x: expected " + std::to_string(step.linear->inputs()) +
                                    " values a row for a linear layer, got " + text(x));
      return {x[0], step.linear->outputs(), 1, 1};
    case Kind::add: return x;
    case Kind::avg_pool2d: {
      const auto pixels = [&](size_t axis) {
        return step.pool.kernel[axis] ? std::min(step.pool.kernel[axis], x[axis + 2]) : x[axis + 2];
      };
      if (dtype(step.x) != DType::f32 && pixels(0) * pixels(1) > std::numeric_limits<int32_t>::max() / 255)
        throw std::invalid_argument("x: expected windows of 8-bit values whose sums fit 32 bits, got " + text(x));
      [[fallthrough]];
    }
    default: return {x[0], x[1], pooled_size(step.pool, 0, x[2]), pooled_size(step.pool, 1, x[3])};
  }
}

std::vector<Chain::Shape> Chain::shapes(const std::vector<Shape>& inputs) const {
  std::vector<Shape> shape(values_.size());
  for (size_t i = 0; i < inputs.size(); ++i) shape[static_cast<size_t>(inputs_[i])] = inputs[i];
  for (const Step& s : steps_) {
    Shape& out = shape[static_cast<size_t>(s.out)];
    out = output_shape(s, shape[static_cast<size_t>(s.x)]);
    double elements = 1;
    for (const int64_t size : out) elements *= static_cast<double>(size);
    if (elements > 1e15) throw std::bad_alloc();  // before a product of sizes overflows
    if (s.residual >= 0 && shape[static_cast<size_t>(s.residual)] != out)
      throw std::invalid_argument(std::string(s.kind == Kind::add ? "b" : "residual") + ": expected the shape " +
                                  text(out) + ", got " + text(shape[static_cast<size_t>(s.residual)]));
  }
  return shape;
}

std::shared_ptr<const ChainPlan> Chain::plan(const std::vector<Shape>& inputs) const {
  const Kernels& k = kernels();
  std::vector<int64_t> key{core::num_threads(), reinterpret_cast<int64_t>(&k)};
  for (const Shape& s : inputs) key.insert(key.end(), s.begin(), s.end());
  const core::ForkGuard lock(mutex_);
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  auto made = make_plan(k, inputs);
  if (plans_.size() >= 32) plans_.clear();  // a caller that never repeats a size
  return plans_[key] = std::move(made);
}

std::shared_ptr<const ChainPlan> Chain::make_plan(const Kernels& kernels, const std::vector<Shape>& inputs) const {
  auto plan = std::make_shared<ChainPlan>(kernels);
  plan->shape = shapes(inputs);
  plan->layer.resize(steps_.size());
  plan->conv.resize(steps_.size());
  plan->lifted = plan->channels_last = std::vector<bool>(values_.size());
  for (const Shape& s : plan->shape) plan->elements.push_back(count(s));

  // Convolutions of one output size and as many lanes share their bands.
  std::map<std::array<int64_t, 4>, std::vector<size_t>> grids;
  std::vector<std::array<int64_t, 4>> grid(values_.size());  // of each value; zeros: none
  std::map<std::array<int64_t, 4>, Pitch> pitches;
  std::vector<ConvCase> cases;
  std::vector<size_t> case_of(steps_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    const Shape &x = plan->shape[static_cast<size_t>(s.x)], &out = plan->shape[static_cast<size_t>(s.out)];
    if (s.kind == Kind::add) grid[static_cast<size_t>(s.out)] = grid[static_cast<size_t>(s.x)];
    if (s.kind != Kind::conv2d || count(out) == 0) continue;
    case_of[i] = cases.size();
    plan->layer[i] = &s.conv->prepared(kernels);
    cases.push_back(plan->layer[i]->conv_case(kernels, x[0], x[2], x[3]));
    const std::array<int64_t, 4> key{out[0], out[2], out[3], cases.back().word_lanes * cases.back().halves};
    grids[key].push_back(i);
    grid[static_cast<size_t>(s.out)] = key;
    Pitch& pitch = pitches[key];
    const Pitch least = cases.back().least_pitch();
    pitch = {std::max(pitch.row, least.row), std::max(pitch.image, least.image)};
  }
  const auto holds = [](const std::vector<int>& values, int value) {
    return std::find(values.begin(), values.end(), value) != values.end();
  };
  // Bytes that no caller holds move between lanes and rows where a layer is finished: its residual may lie in the ones
  // and its output in the others, unless outputs of nothing but padding share a lane.
  const auto moves_residual = [&](const Step& s) {
    if (s.kind != Kind::conv2d || !kernels.lift_bytes || !kernels.unlift_bytes ||
        element_bytes(s.epilogue.out_dtype) > 1 || element_bytes(s.epilogue.residual_dtype) > 1 ||
        holds(inputs_, s.residual) || holds(outputs_, s.out))
      return false;
    const Shape& out = plan->shape[static_cast<size_t>(s.out)];
    const auto pitch = pitches.find(grid[static_cast<size_t>(s.out)]);
    return pitch != pitches.end() && pitch->second.row >= out[3] && pitch->second.image >= out[2];
  };

  // Lifted until a step cannot have it so.
  for (const Step& s : steps_) {
    const auto out = static_cast<size_t>(s.out);
    plan->lifted[out] = (s.kind == Kind::conv2d || s.kind == Kind::add) && grid[out][0] > 0 &&
                        s.epilogue.out_dtype != DType::i32 && !holds(outputs_, s.out);
  }
  settle(plan->lifted, [&](const auto& lower) {
    const auto agree = [&](int a, int b) {  // both or neither
      const auto i = static_cast<size_t>(a), j = static_cast<size_t>(b);
      if (plan->lifted[i] && plan->lifted[j] && grid[i] == grid[j]) return;
      lower(a);
      lower(b);
    };
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Step& s = steps_[i];
      if (s.kind == Kind::add) agree(s.x, s.out);
      else if (s.kind != Kind::conv2d || count(plan->shape[static_cast<size_t>(s.out)]) == 0 ||
               !cases[case_of[i]].takes_lifted() || grid[static_cast<size_t>(s.x)] != grid[static_cast<size_t>(s.out)])
        lower(s.x);
      if (s.residual < 0) continue;
      if (!moves_residual(s)) agree(s.residual, s.out);
      else if (grid[static_cast<size_t>(s.residual)] != grid[static_cast<size_t>(s.out)]) lower(s.residual);
    }
  });

  // Channels last until a step cannot have it so: `dense` by rows of channels, pooling and adds can.
  const auto by_rows = [&](size_t step) { return plan->layer[step] && cases[case_of[step]].by_rows; };
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    const auto out = static_cast<size_t>(s.out);
    plan->channels_last[out] = (s.kind == Kind::conv2d ? by_rows(i) : s.kind != Kind::linear) && !plan->lifted[out] &&
                               s.epilogue.out_dtype != DType::i32 && !holds(outputs_, s.out);
  }
  settle(plan->channels_last, [&](const auto& lower) {
    const auto pitch = [&](int value) {  // elements from pixel to pixel
      const auto v = static_cast<size_t>(value);
      return pixel_rows(nullptr, plan->shape[v], values_[v]).stride[3] / element_bytes(values_[v]);
    };
    const auto has = [&](int value) { return value < 0 || plan->channels_last[static_cast<size_t>(value)]; };
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Step& s = steps_[i];
      const bool is_pool = s.kind == Kind::max_pool2d || s.kind == Kind::avg_pool2d;
      if (!is_pool && s.kind != Kind::add && !by_rows(i)) lower(s.x);
      if (is_pool && !has(s.x)) lower(s.out);
      if (s.kind == Kind::max_pool2d && (!has(s.out) || overlaps_much(s.pool))) lower(s.x), lower(s.out);
      if (s.kind == Kind::add && !(has(s.x) && has(s.out) && pitch(s.x) == pitch(s.out) &&
                                   (s.residual < 0 || pitch(s.residual) == pitch(s.out))))
        lower(s.x), lower(s.out);
      if (s.residual < 0) continue;
      const bool adds_pixels = s.kind == Kind::add || by_rows(i);
      if (adds_pixels && has(s.residual) && has(s.out)) continue;
      lower(s.residual);
      if (adds_pixels) lower(s.out);
    }
  });

  for (const auto& [key, steps] : grids) {
    std::vector<ConvCase> together;
    const Pitch& pitch = pitches[key];
    for (const size_t i : steps) {
      ConvCase& c = cases[case_of[i]];
      c.lifted_input = plan->lifted[static_cast<size_t>(steps_[i].x)];
      c.lifted_output = plan->lifted[static_cast<size_t>(steps_[i].out)];
      together.push_back(c);
    }
    std::vector<int64_t> splits;
    const Cut cut = choose_cut(together, pitch, core::num_threads(), splits);
    for (size_t k = 0; k < steps.size(); ++k)
      plan->conv[steps[k]] = plan->layer[steps[k]]->make_plan(together[k], pitch, cut, splits[k]);
    int64_t vectors = 0;
    for (const LiftPlan& band : plan->conv[steps[0]]->bands) vectors += band.segment;
    for (size_t v = 0; v < values_.size(); ++v)
      if (plan->lifted[v] && grid[v] == key) plan->elements[v] = plan->shape[v][1] * vectors * key[3];
  }
  for (size_t v = 0; v < values_.size(); ++v)
    if (plan->channels_last[v])
      plan->elements[v] =
          pixel_rows(nullptr, plan->shape[v], values_[v]).stride[0] * plan->shape[v][0] / element_bytes(values_[v]);
  plan_memory(*plan);
  return plan;
}

// Values that are alive at the same time lie apart, each as low as it fits.
void Chain::plan_memory(ChainPlan& plan) const {
  struct Place {
    size_t begin, end, last_step;
  };
  std::vector<size_t> last_use(values_.size());
  for (size_t i = 0; i < steps_.size(); ++i)
    for (const int v : {steps_[i].x, steps_[i].residual, steps_[i].out})
      if (v >= 0) last_use[static_cast<size_t>(v)] = i;
  plan.at.resize(values_.size());
  std::vector<Place> places;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto v = static_cast<size_t>(steps_[i].out);
    if (std::find(outputs_.begin(), outputs_.end(), steps_[i].out) != outputs_.end()) continue;
    const size_t bytes = (static_cast<size_t>(plan.elements[v] * element_bytes(values_[v])) + 2 * guard + 63) / 64 * 64;
    std::erase_if(places, [&](const Place& p) { return p.last_step < i; });
    std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.begin < b.begin; });
    size_t begin = 0;
    for (const Place& p : places)
      if (begin + bytes <= p.begin) break;
      else begin = std::max(begin, p.end);
    places.push_back({begin, begin + bytes, last_use[v]});
    plan.at[v] = begin + guard;
    plan.bytes = std::max(plan.bytes, begin + bytes);
  }
}

std::vector<Tensor> Chain::place_values(const ChainPlan& plan, char* arena) const {
  std::vector<Tensor> tensors(values_.size());
  for (size_t v = 0; v < tensors.size(); ++v) {
    tensors[v] = (plan.channels_last[v] ? pixel_rows : contiguous)(arena + plan.at[v], plan.shape[v], values_[v]);
    tensors[v].lifted = plan.lifted[v];
  }
  return tensors;
}

void Chain::run(const ChainPlan& plan, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const {
  thread_local core::AlignedBuffer<char> buffer;
  std::vector<Tensor> tensors = place_values(plan, buffer.reserve(plan.bytes));
  for (size_t i = 0; i < inputs.size(); ++i) tensors[static_cast<size_t>(inputs_[i])] = inputs[i];
  for (size_t i = 0; i < outputs.size(); ++i) tensors[static_cast<size_t>(outputs_[i])] = outputs[i];
  run_steps(plan, tensors);
}

void Chain::run_steps(const ChainPlan& plan, const std::vector<Tensor>& tensors) const {
  thread_local core::AlignedBuffer<char> copies[2];
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    const Tensor &x = tensors[static_cast<size_t>(s.x)], &out = tensors[static_cast<size_t>(s.out)];
    const Tensor* residual = s.residual < 0 ? nullptr : &tensors[static_cast<size_t>(s.residual)];
    if (count(out.size) == 0) continue;
    if (s.kind == Kind::conv2d) {
      plan.layer[i]->run(*plan.conv[i], x, out, residual, s.epilogue);
      continue;
    }
    const auto stays = [&](int value) {
      const auto v = static_cast<size_t>(value);
      return plan.lifted[v] || plan.channels_last[v];
    };
    const Tensor from = stays(s.x) ? x : make_contiguous(x, dtype(s.x), copies[0]);
    if (s.kind == Kind::add) {
      std::optional<Tensor> b;
      if (residual) b = stays(s.residual) ? *residual : make_contiguous(*residual, dtype(s.residual), copies[1]);
      const bool flat = stays(s.out) || is_contiguous(out, dtype(s.out));  // else image by image
      const int64_t images = flat ? 1 : out.size[0], elements = plan.elements[static_cast<size_t>(s.out)] / images;
      for (int64_t n = 0; n < images; ++n) {
        Tensor image = out, a = from;
        image.data += n * out.stride[0];
        a.data += n * elements * element_bytes(dtype(s.x));
        if (b && n > 0) b->data += elements * element_bytes(dtype(s.residual));
        run_add(plan.kernels, s, a, b ? &*b : nullptr, image, elements);
      }
    } else if (s.kind == Kind::linear) {
      const auto rows = [](const Tensor& t) {  // as the pixels of one image
        return Tensor{t.data, {1, t.size[1] * t.size[2] * t.size[3], 1, t.size[0]}, {0, t.stride[3], 0, t.stride[0]}};
      };
      std::optional<Tensor> added;
      if (residual) added = rows(make_contiguous(*residual, dtype(s.residual), copies[1]));
      s.linear->run(rows(from), rows(out), added ? &*added : nullptr, s.epilogue);
    } else {
      const bool pixels = plan.channels_last[static_cast<size_t>(s.x)];
      const auto run = s.kind == Kind::max_pool2d ? pixels ? &Chain::run_max_pool_pixels : &Chain::run_max_pool
                       : pixels                   ? &Chain::run_avg_pool_pixels
                                                  : &Chain::run_avg_pool;
      (this->*run)(plan.kernels, s, from, out);
    }
  }
}

// The epilogue over elements as they lie, a few at a time as 32-bit words.
void Chain::run_add(const Kernels& k, const Step& s, const Tensor& a, const Tensor* b, const Tensor& out,
                    int64_t elements) const {
  constexpr int64_t piece = 1024, chunk = 16 * piece;
  const DType from = dtype(s.x);
  const float multiplier = s.scale;
  const int32_t correction = -s.zero_point;
  const int64_t b_bytes = b ? element_bytes(s.epilogue.residual_dtype) : 0,
                out_bytes = element_bytes(s.epilogue.out_dtype);
  core::parallel_for((elements + chunk - 1) / chunk, [&](int64_t index, int) {
    alignas(64) int32_t words[piece + 16] = {};
    for (int64_t at = index * chunk; at < std::min(elements, (index + 1) * chunk); at += piece) {
      Finish f{};
      f.epilogue = &s.epilogue;
      f.count = std::min(piece, elements - at);
      f.acc = reinterpret_cast<const char*>(words);
      if (from == DType::f32) {
        if (at + f.count + 16 <= elements) f.acc = a.data + at * 4;  // no vector ends behind the last
        else std::memcpy(words, a.data + at * 4, static_cast<size_t>(f.count) * 4);
      } else if (from == DType::u8) std::copy_n(reinterpret_cast<const uint8_t*>(a.data) + at, f.count, words);
      else std::copy_n(reinterpret_cast<const int8_t*>(a.data) + at, f.count, words);
      f.multiplier = &multiplier;
      f.correction = &correction;
      f.out = out.data + at * out_bytes;
      f.out_stride = out_bytes;
      if (b) f.residual = b->data + at * b_bytes;
      f.residual_stride = b_bytes;
      k.finish(f);
    }
  });
}

namespace {

// A window of a plane.
struct Window {
  const char* plane;
  int64_t width, top, bottom, left, right;
  int64_t pixels() const { return (bottom - top) * (right - left); }
};

template <class T, class Sum> Sum sum_window(const Window& v) {
  Sum sum = 0;
  for (int64_t h = v.top; h < v.bottom; ++h)
    for (int64_t w = v.left; w < v.right; ++w)
      sum += static_cast<Sum>(reinterpret_cast<const T*>(v.plane)[h * v.width + w]);
  return sum;
}

// Rows that lie side by side are one.
template <class T> int32_t sum_bytes(const Window& v) {
  if (v.left > 0 || v.right < v.width) return sum_window<T, int32_t>(v);
  return sum_window<T, int32_t>({v.plane, 0, 0, 1, v.top * v.width, v.bottom * v.width});
}

// Sums of 16, added in double: a window may be a whole map. Inlined, it would slow small windows down.
[[gnu::noinline]] float sum_large_window(const Window& v) {
  double sum = 0;
  for (int64_t h = v.top; h < v.bottom; ++h)
    for (int64_t w = v.left; w < v.right; w += 16)
      sum += sum_window<float, float>({v.plane, v.width, h, h + 1, w, std::min(w + 16, v.right)});
  return static_cast<float>(sum);
}

MaxPool::Axis axis_of(const Pool& p, size_t i, const Tensor& x, const Tensor& out) {
  const int64_t size = x.size[i + 2];
  return {size, p.kernel[0] ? p.kernel[i] : size, p.stride[i], p.dilation[i], p.padding[i], out.size[i + 2]};
}

// Of the windows of one pooled axis: all, or what of them lies in the map.
struct Range {
  int64_t begin, end;
};
Range within(const Pool& p, size_t axis, int64_t index, int64_t size) {
  const int64_t window = p.kernel[0] ? p.kernel[axis] : size, first = index * p.stride[axis] - p.padding[axis];
  return {std::max<int64_t>(first, 0), std::min(first + window, size)};
}

// Sums of windows of pixels, for some channels: in the order of one channel's.
template <class T>
void sum_pixels(const Tensor& x, const char* from, Range rows, Range columns, int64_t count, char* sums) {
  using Sum = std::conditional_t<std::is_same_v<T, float>, float, int32_t>;
  constexpr int64_t most = 64;
  Sum part[most]{};
  const auto add = [&](int64_t h, int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      const T* pixel = reinterpret_cast<const T*>(from + h * x.stride[2] + w * x.stride[3]);
      for (int64_t c = 0; c < count; ++c) part[c] += static_cast<Sum>(pixel[c]);
    }
  };
  if (!std::is_same_v<T, float> || (rows.end - rows.begin) * (columns.end - columns.begin) <= 16) {
    for (int64_t h = rows.begin; h < rows.end; ++h) add(h, columns.begin, columns.end);
    std::memcpy(sums, part, static_cast<size_t>(count) * 4);
    return;
  }
  double total[most]{};
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t w = columns.begin; w < columns.end; w += 16) {
      std::fill_n(part, most, Sum{});
      add(h, w, std::min(w + 16, columns.end));
      for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(part[c]);
    }
  for (int64_t c = 0; c < count; ++c) reinterpret_cast<float*>(sums)[c] = static_cast<float>(total[c]);
}

}  // namespace

void Chain::run_max_pool_pixels(const Kernels& k, const Step& s, const Tensor& x, const Tensor& out) const {
  core::parallel_for(out.size[0] * out.size[2], [&](int64_t item, int) {
    const int64_t n = item / out.size[2], row = item % out.size[2];
    k.max_pool_pixels({dtype(s.x), x.data + n * x.stride[0], x.stride[2], x.stride[3], axis_of(s.pool, 0, x, out),
                       axis_of(s.pool, 1, x, out), row, x.stride[3], out.data + n * out.stride[0] + row * out.stride[2],
                       out.stride[3]});
  });
}

void Chain::run_avg_pool_pixels(const Kernels& k, const Step& s, const Tensor& x, const Tensor& out) const {
  constexpr int64_t together = 64;  // channels
  const Pool& p = s.pool;
  const DType from = dtype(s.x);
  const int64_t pieces = (x.size[1] + together - 1) / together, OH = out.size[2], OW = out.size[3];
  core::parallel_for(out.size[0] * OH * pieces, [&](int64_t item, int) {
    const int64_t n = item / pieces / OH, oh = item / pieces % OH, first = item % pieces * together,
                  count = std::min(together, x.size[1] - first);
    alignas(64) char sums[together * 4 + 64];
    float multiplier[together];
    int32_t correction[together];
    const Range rows = within(p, 0, oh, x.size[2]);
    for (int64_t ow = 0; ow < OW; ++ow) {
      const Range columns = within(p, 1, ow, x.size[3]);
      const char* channels = x.data + n * x.stride[0] + first * element_bytes(from);
      (from == DType::f32  ? sum_pixels<float>
       : from == DType::u8 ? sum_pixels<uint8_t>
                           : sum_pixels<int8_t>)(x, channels, rows, columns, count, sums);
      const int64_t pixels = (rows.end - rows.begin) * (columns.end - columns.begin),
                    all = p.kernel[0] ? p.kernel[0] * p.kernel[1] : x.size[2] * x.size[3];
      std::fill_n(multiplier, count,
                  static_cast<float>(s.scale / static_cast<double>(p.counts_padding ? all : pixels)));
      std::fill_n(correction, count, static_cast<int32_t>(-s.zero_point * pixels));
      Finish f{};
      f.epilogue = &s.epilogue;
      f.acc = sums;
      f.count = count;
      f.per_element = true;
      f.multiplier = multiplier;
      f.correction = correction;
      f.out = out.data + n * out.stride[0] + first * out.stride[1] + oh * out.stride[2] + ow * out.stride[3];
      f.out_stride = out.stride[1];
      k.finish(f);
    }
  });
}

void Chain::run_max_pool(const Kernels& k, const Step& s, const Tensor& x, const Tensor& out) const {
  const int64_t bytes = element_bytes(dtype(s.x)), out_bytes = out.size[2] * out.size[3] * bytes;
  core::parallel_for(x.size[0] * x.size[1], [&](int64_t map, int) {
    thread_local core::AlignedBuffer<char> buffer;
    MaxPool pool{dtype(s.x),
                 x.data + map * x.size[2] * x.size[3] * bytes,
                 axis_of(s.pool, 0, x, out),
                 axis_of(s.pool, 1, x, out),
                 nullptr,
                 out.data + map / x.size[1] * out.stride[0] + map % x.size[1] * out_bytes};
    pool.scratch = buffer.reserve(static_cast<size_t>(pool.scratch_elements() * bytes));
    k.max_pool(pool);
  });
}

// Sums of windows, each with its own divisor: of one row, or, where a map has only one, of many maps.
void Chain::run_avg_pool(const Kernels& k, const Step& s, const Tensor& x, const Tensor& out) const {
  const DType from = dtype(s.x);
  const Pool& p = s.pool;
  const int64_t C = x.size[1], H = x.size[2], W = x.size[3], OH = out.size[2], OW = out.size[3];
  const int64_t R = p.kernel[0] ? p.kernel[0] : H, S = p.kernel[0] ? p.kernel[1] : W;
  const int64_t map_bytes = H * W * element_bytes(from), out_bytes = element_bytes(dtype(s.out));
  constexpr int64_t many = 128;
  const int64_t maps = OH * OW == 1 ? std::min(C, many) : 1, pieces = (C + maps - 1) / maps;
  core::parallel_for(x.size[0] * pieces, [&](int64_t item, int) {
    const int64_t n = item / pieces, first = item % pieces * maps, count = maps > 1 ? std::min(maps, C - first) : OW;
    const char* const map = x.data + (n * C + first) * map_bytes;
    char* to = out.data + n * out.stride[0] + first * OH * OW * out_bytes;
    thread_local core::AlignedBuffer<char> buffer;
    char* const sums = buffer.reserve(static_cast<size_t>(count) * 12 + 64);
    auto* const multiplier = reinterpret_cast<float*>(sums + count * 4);
    auto* const correction = reinterpret_cast<int32_t*>(sums + count * 8);
    for (int64_t oh = 0; oh < OH; ++oh, to += OW * out_bytes) {
      const Range rows = within(p, 0, oh, H);
      for (int64_t i = 0; i < count; ++i) {
        const Range columns = within(p, 1, maps > 1 ? 0 : i, W);
        const Window window{map + (maps > 1 ? i * map_bytes : 0), W, rows.begin, rows.end, columns.begin, columns.end};
        const int64_t pixels = window.pixels();
        if (from == DType::f32)
          reinterpret_cast<float*>(sums)[i] = pixels > 16 ? sum_large_window(window) : sum_window<float, float>(window);
        else
          reinterpret_cast<int32_t*>(sums)[i] =
              from == DType::u8 ? sum_bytes<uint8_t>(window) : sum_bytes<int8_t>(window);
        multiplier[i] = static_cast<float>(s.scale / static_cast<double>(p.counts_padding ? R * S : pixels));
        correction[i] = static_cast<int32_t>(-s.zero_point * pixels);
      }
      Finish f{};
      f.epilogue = &s.epilogue;
      f.acc = sums;
      f.count = count;
      f.per_element = true;
      f.multiplier = multiplier;
      f.correction = correction;
      f.out = to;
      f.out_stride = out_bytes;
      k.finish(f);
    }
  });
}

BoundChain::BoundChain(std::shared_ptr<const Chain> chain, const std::vector<Chain::Shape>& inputs)
    : chain_(std::move(chain)), plan_(chain_->plan(inputs)), arena_(plan_->bytes) {
  tensors_ = chain_->place_values(*plan_, arena_.data());
}

}  // namespace pycodesign::repetition
