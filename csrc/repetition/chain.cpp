#include "repetition/chain.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "core/fork_guard.h"
#include "core/thread_pool.h"
#include "repetition/chain_plan.h"

namespace pycodesign::repetition {

namespace {

bool is_contiguous(const Tensor& t, DType dtype) {
  const Tensor natural = contiguous(t.data, t.size, dtype);
  for (size_t i = 0; i < 4; ++i)
    if (t.size[i] > 1 && t.stride[i] != natural.stride[i]) return false;
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

}  // namespace

Chain::Chain() = default;
Chain::~Chain() = default;

const Chain::Shape& Chain::shape(const ChainPlan& plan, int value) { return plan.shape[static_cast<size_t>(value)]; }
Chain::Layout Chain::layout(const ChainPlan& plan, int value) { return plan.layout[static_cast<size_t>(value)]; }

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

std::shared_ptr<const ChainPlan> Chain::plan(const std::vector<Shape>& inputs) const {
  const Kernels& k = kernels();
  std::vector<int64_t> key{core::num_threads(), reinterpret_cast<int64_t>(&k)};
  for (const Shape& s : inputs) key.insert(key.end(), s.begin(), s.end());
  const core::ForkGuard lock(mutex_);
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  auto made = plan_chain(*this, k, inputs);
  if (plans_.size() >= 32) plans_.clear();  // a caller that never repeats a size
  return plans_[key] = std::move(made);
}

std::vector<Tensor> Chain::place_values(const ChainPlan& plan, char* arena) const {
  std::vector<Tensor> tensors(values_.size());
  for (size_t v = 0; v < tensors.size(); ++v) {
    const bool pixels = plan.layout[v] == Layout::channels_last;
    tensors[v] = (pixels ? pixel_rows : contiguous)(arena + plan.at[v], plan.shape[v], values_[v]);
    tensors[v].lifted = plan.layout[v] == Layout::lifted;
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
    const auto stays = [&](int value) { return !plan.has(value, Layout::plain); };
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
    } else if (s.kind == Kind::max_pool2d) {
      max_pool2d(plan.kernels, s.pool, dtype(s.x), from, out);
    } else {
      avg_pool2d(plan.kernels, {s.pool, s.scale, s.zero_point}, dtype(s.x), from, out, s.epilogue);
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

BoundChain::BoundChain(std::shared_ptr<const Chain> chain, const std::vector<Chain::Shape>& inputs)
    : chain_(std::move(chain)), plan_(chain_->plan(inputs)), arena_(plan_->bytes) {
  tensors_ = chain_->place_values(*plan_, arena_.data());
}

}  // namespace pycodesign::repetition
