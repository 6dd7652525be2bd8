// Chains against naive loops, every instruction set, thread count and kind of staging. Its worth is in the sanitizers:
// each run is on a thread of its own, whose arena and scratch are then exactly as large as it needs, and every array is
// an allocation of its own.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "core/thread_pool.h"
#include "repetition/chain.h"
#include "repetition/plan.h"

namespace core = pycodesign::core;
using namespace pycodesign::repetition;

namespace {

constexpr float lowest = -60, highest = 70;  // of every value: so that float32 sums are exact

double scale_of(DType dtype) { return dtype == DType::f32 ? 1 : 4; }
int32_t zero_point_of(DType dtype) { return dtype == DType::u8 ? 30 : dtype == DType::i8 ? -7 : 0; }
size_t size_of(DType dtype) { return dtype == DType::f32 || dtype == DType::i32 ? 4 : 1; }

// Real values, and how many bytes an element takes where a chain stores them.
struct Value {
  DType dtype;
  Chain::Shape size;
  std::vector<double> real;

  Value(DType dtype_, Chain::Shape size_) : dtype(dtype_), size(size_), real(static_cast<size_t>(count())) {}
  int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
  double& at(int64_t n, int64_t c, int64_t h, int64_t w) {
    return real[static_cast<size_t>(((n * size[1] + c) * size[2] + h) * size[3] + w)];
  }
  // Zero in the padding.
  double padded(int64_t n, int64_t c, int64_t h, int64_t w) {
    return h < 0 || w < 0 || h >= size[2] || w >= size[3] ? 0 : at(n, c, h, w);
  }
};

struct Array {
  std::unique_ptr<char[]> data;
  Tensor tensor;

  explicit Array(const Value& v) : data(new char[static_cast<size_t>(v.count()) * size_of(v.dtype)]) {
    const auto bytes = static_cast<int64_t>(size_of(v.dtype));
    tensor = {data.get(),
              v.size,
              {v.size[1] * v.size[2] * v.size[3] * bytes, v.size[2] * v.size[3] * bytes, v.size[3] * bytes, bytes}};
    for (int64_t i = 0; i < v.count(); ++i) {
      const double stored = v.real[static_cast<size_t>(i)] / scale_of(v.dtype) + zero_point_of(v.dtype);
      const auto real = static_cast<float>(stored);
      if (v.dtype == DType::f32) std::memcpy(data.get() + i * 4, &real, 4);
      else data[static_cast<size_t>(i)] = static_cast<char>(static_cast<int>(stored));
    }
  }
  double real(const Value& v, int64_t i) const {
    float value;
    if (v.dtype == DType::f32) return std::memcpy(&value, data.get() + i * 4, 4), static_cast<double>(value);
    const char byte = data[static_cast<size_t>(i)];
    return scale_of(v.dtype) *
           ((v.dtype == DType::u8 ? static_cast<uint8_t>(byte) : static_cast<int8_t>(byte)) - zero_point_of(v.dtype));
  }
};

struct Layer {
  std::vector<uint8_t> codes;
  std::vector<float> levels{-1, 0, 1}, scale, bias;
  Weights weights;

  Layer(int64_t outputs, int64_t inputs, std::mt19937& random) {
    for (int64_t i = 0; i < outputs * inputs; ++i) codes.push_back(static_cast<uint8_t>(random() % 3));
    for (int64_t i = 0; i < outputs; ++i) {
      scale.push_back(random() % 2 ? 1.0f : -2.0f);
      bias.push_back(static_cast<float>(random() % 9) - 4);
    }
    weights = {outputs, inputs, codes.data(), levels.data(), 1, 3, scale.data(), 1, bias.data()};
  }
  double weight(int64_t o, int64_t i) const {
    return static_cast<double>(scale[static_cast<size_t>(o)] * weights.level(o, i));
  }
};

// A chain, and what its values are. Methods return the index of the value that they make.
struct Network {
  Chain chain;
  std::vector<Value> values;
  std::mt19937 random{7};
  Algorithm algorithm;

  explicit Network(Algorithm algorithm_) : algorithm(algorithm_) {}

  int input(DType dtype, Chain::Shape size) {
    Value& v = values.emplace_back(dtype, size);
    for (double& x : v.real) x = scale_of(dtype) * (static_cast<int>(random() % 19) - 7);
    return chain.add_input(dtype);
  }

  int conv2d(int x, int64_t outputs, Geometry g, DType dtype, int residual = -1) {
    Value v = value(x);
    g.channels = v.size[1];
    const int64_t channels = g.channels / g.groups, taps = g.kernel[0] * g.kernel[1];
    const Layer layer(outputs, channels * taps, random);
    Value out(dtype, {v.size[0], outputs, g.output_size(0, v.size[2]), g.output_size(1, v.size[3])});
    for_pixels(out, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
      double y = static_cast<double>(layer.bias[static_cast<size_t>(o)]);
      for (int64_t i = 0; i < channels * taps; ++i)
        y += layer.weight(o, i) * v.padded(n, o / (outputs / g.groups) * channels + i / taps,
                                           h * g.stride[0] + i % taps / g.kernel[1] * g.dilation[0] - g.padding[0],
                                           w * g.stride[1] + i % g.kernel[1] * g.dilation[1] - g.padding[1]);
      return y;
    });
    const auto packed = std::make_shared<PackedConv2d>(layer.weights, g, activations(v.dtype), algorithm);
    return made(finish(out, residual), chain.add_conv2d(packed, x, residual, epilogue(v.dtype, dtype, residual)));
  }

  int linear(int x, int64_t outputs, DType dtype, int residual = -1) {
    const Value v = value(x);
    const int64_t inputs = v.size[1] * v.size[2] * v.size[3];
    const Layer layer(outputs, inputs, random);
    Value out(dtype, {v.size[0], outputs, 1, 1});
    for_pixels(out, [&](int64_t n, int64_t o, int64_t, int64_t) {
      double y = static_cast<double>(layer.bias[static_cast<size_t>(o)]);
      for (int64_t i = 0; i < inputs; ++i) y += layer.weight(o, i) * v.real[static_cast<size_t>(n * inputs + i)];
      return y;
    });
    std::shared_ptr<PackedLayer> packed;
    const Geometry rows{inputs, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    if (algorithm == Algorithm::dense)
      packed = std::make_shared<PackedLinear>(layer.weights, activations(v.dtype), Algorithm::packed);
    else packed = std::make_shared<PackedConv2d>(layer.weights, rows, activations(v.dtype), algorithm);
    return made(finish(out, residual), chain.add_linear(packed, x, residual, epilogue(v.dtype, dtype, residual)));
  }

  int pool(int x, const Pool& p, DType dtype, bool mean) {
    Value v = value(x);
    const bool whole = p.kernel[0] == 0;
    const std::array<int64_t, 2> kernel = whole ? std::array{v.size[2], v.size[3]} : p.kernel;
    const Geometry g{1, 1, kernel, p.stride, p.padding, p.dilation};
    Value out(mean ? dtype : v.dtype, {v.size[0], v.size[1], g.output_size(0, v.size[2]), g.output_size(1, v.size[3])});
    for_pixels(out, [&](int64_t n, int64_t c, int64_t oh, int64_t ow) {
      double sum = 0, largest = -std::numeric_limits<double>::infinity(), pixels = 0;
      for (int64_t r = 0; r < kernel[0]; ++r)
        for (int64_t s = 0; s < kernel[1]; ++s) {
          const int64_t h = oh * p.stride[0] + r * p.dilation[0] - p.padding[0],
                        w = ow * p.stride[1] + s * p.dilation[1] - p.padding[1];
          if (h < 0 || w < 0 || h >= v.size[2] || w >= v.size[3]) continue;
          sum += v.at(n, c, h, w), ++pixels;
          largest = std::max(largest, v.at(n, c, h, w));
        }
      return mean ? sum / (p.counts_padding ? static_cast<double>(kernel[0] * kernel[1]) : pixels) : largest;
    });
    if (!mean) return made(out, chain.add_max_pool2d(x, p));
    return made(finish(out, -1),
                chain.add_avg_pool2d(x, p, scale_of(v.dtype), zero_point_of(v.dtype), epilogue(v.dtype, dtype, -1)));
  }

  int add(int a, int b, DType dtype) {
    const Value v = value(a);
    Value out(dtype, v.size);
    out.real = v.real;
    return made(finish(out, b), chain.add_add(a, b, static_cast<float>(scale_of(v.dtype)), zero_point_of(v.dtype),
                                              epilogue(v.dtype, dtype, b)));
  }

  std::vector<Chain::Shape> shapes() const {
    std::vector<Chain::Shape> all;
    for (const int x : chain.inputs()) all.push_back(values[static_cast<size_t>(x)].size);
    return all;
  }

  void run(const std::string& what) const {
    std::vector<Array> from, to;
    std::vector<Tensor> inputs, outputs;
    for (const int x : chain.inputs()) inputs.push_back(from.emplace_back(values[static_cast<size_t>(x)]).tensor);
    const auto plan = chain.plan(shapes());
    for (const int y : chain.outputs()) {
      const Value& v = values[static_cast<size_t>(y)];
      if (Chain::shape(*plan, y) != v.size) check::fail(__FILE__, __LINE__, what + ": another shape");
      outputs.push_back(to.emplace_back(v).tensor);
      std::memset(to.back().data.get(), 0x55, static_cast<size_t>(v.count()) * size_of(v.dtype));
    }
    chain.run(*plan, inputs, outputs);
    for (size_t k = 0; k < to.size(); ++k) {
      const Value& v = values[static_cast<size_t>(chain.outputs()[k])];
      for (int64_t i = 0; i < v.count(); ++i)
        if (to[k].real(v, i) != v.real[static_cast<size_t>(i)])
          return check::fail(__FILE__, __LINE__,
                             what + ": output " + std::to_string(k) + ", element " + std::to_string(i) + " expected " +
                                 std::to_string(v.real[static_cast<size_t>(i)]) + ", got " +
                                 std::to_string(to[k].real(v, i)));
    }
  }

 private:
  Value& value(int index) { return values[static_cast<size_t>(index)]; }
  int made(Value out, int index) {
    values.push_back(std::move(out));
    CHECK_EQUAL(index, static_cast<int>(values.size()) - 1);
    return index;
  }
  static Activations activations(DType dtype) { return {dtype, scale_of(dtype), zero_point_of(dtype), 0}; }

  template <class F> static void for_pixels(Value& out, F&& f) {
    for (int64_t n = 0; n < out.size[0]; ++n)
      for (int64_t c = 0; c < out.size[1]; ++c)
        for (int64_t h = 0; h < out.size[2]; ++h)
          for (int64_t w = 0; w < out.size[3]; ++w) out.at(n, c, h, w) = f(n, c, h, w);
  }

  Value finish(Value out, int residual) {
    const double low = out.dtype == DType::i8 ? -128 : 0, scale = scale_of(out.dtype);
    for (size_t i = 0; i < out.real.size(); ++i) {
      double& y = out.real[i];
      if (residual >= 0) y += value(residual).real[i];
      y = std::clamp(y, double{lowest}, double{highest});
      if (out.dtype == DType::f32) continue;
      const int32_t zero_point = zero_point_of(out.dtype);
      y = scale * (std::clamp(std::nearbyint(y / scale) + zero_point, low, low + 255) - zero_point);
    }
    return out;
  }

  Epilogue epilogue(DType input, DType output, int residual) {
    Epilogue e;
    e.acc_dtype = input == DType::f32 ? DType::f32 : DType::i32;
    e.out_dtype = output;
    e.has_lo = e.has_hi = true;
    e.lo = lowest;
    e.hi = highest;
    if (residual >= 0) {
      e.residual_scale = static_cast<float>(scale_of(value(residual).dtype));
      e.residual_zero_point = static_cast<float>(zero_point_of(value(residual).dtype));
    }
    if (output != DType::f32) e.out_scale = 4, e.out_zero_point = zero_point_of(output);
    return e;
  }
};

Geometry filter(int64_t height, int64_t width, int64_t dilation = 1, int64_t groups = 1) {  // the size stays
  return {0, groups, {height, width}, {1, 1}, {height / 2 * dilation, width / 2 * dilation}, {dilation, dilation}};
}

// Blocks with residuals, of every filter size, and a classifier.
void build_blocks(Network& n, DType d, const Chain::Shape& size) {
  const int x = n.input(d, size), stem = n.conv2d(x, 9, filter(3, 3), d);
  const int a = n.conv2d(stem, 9, filter(1, 5), d), b = n.conv2d(a, 9, filter(3, 3, 2), d, stem);
  const int c = n.conv2d(b, 6, filter(1, 1, 1, 3), d), e = n.conv2d(c, 9, filter(7, 3), d, b);
  const int f = n.add(e, b, DType::f32), g = n.add(f, e, d), h = n.conv2d(g, 9, filter(3, 3, 1, 9), d, f);
  const int last = n.conv2d(h, 4, filter(5, 5), d, -1);
  const int largest = n.pool(last, {{2, 3}, {1, 2}, {1, 1}, {1, 1}}, d, false);
  const int mean = n.pool(last, {{2, 2}, {2, 1}, {1, 1}, {1, 1}}, DType::i8, true);
  const int flat = n.linear(largest, 21, d), rows = n.linear(flat, 21, d, flat);
  n.chain.set_outputs({rows, mean, last});
}

// Rows between the steps: strides, residuals from inputs and pools, outputs on the way.
void build_rows(Network& n, DType d, const Chain::Shape& size) {
  const int x = n.input(d, size), other = n.input(DType::i8, size);
  const int a = n.conv2d(x, size[1], filter(3, 3), d, other), b = n.pool(a, {{3, 3}, {1, 1}, {1, 1}, {1, 1}}, d, false);
  const int c = n.conv2d(b, size[1], filter(3, 3), d, b), e = n.conv2d(c, size[1], filter(1, 3), d, x);
  Geometry smaller = filter(3, 3);
  smaller.stride = {2, 2};
  const int f = n.conv2d(e, 7, smaller, d), g = n.conv2d(f, 7, filter(3, 3), d),
            h = n.conv2d(g, 3, filter(1, 1), d, -1);
  Geometry unpadded = filter(2, 2);
  unpadded.padding = {1, 0};
  n.chain.set_outputs({h, c, n.conv2d(e, 2, unpadded, d), n.add(x, other, DType::u8)});
}

void on_fresh_thread(const std::function<void()>& test) { std::thread(test).join(); }

constexpr DType dtypes[] = {DType::f32, DType::u8, DType::i8};
constexpr Algorithm algorithms[] = {Algorithm::codegen, Algorithm::tables, Algorithm::dense};

void test_every_kind() {
  const Chain::Shape sizes[] = {{1, 2, 1, 2},   {2, 5, 1, 17}, {3, 3, 7, 5},
                                {1, 4, 13, 11}, {2, 3, 4, 16}, {1, 3, 47, 29}};
  for (const DType dtype : dtypes)
    for (const Algorithm algorithm : algorithms)
      for (const Chain::Shape& size : sizes)
        for (const auto build : {build_blocks, build_rows}) {
          Network n(algorithm);
          build(n, dtype, size);
          for (const core::Isa isa : check::isas())
            for (const int threads : check::threads({1, 2, 5, 3})) {
              core::set_isa(core::isa_name(isa));
              core::set_num_threads(threads);
              const std::string what = std::string(core::isa_name(isa)) + " " + algorithm_name(algorithm) + " type " +
                                       std::to_string(static_cast<int>(dtype)) + ", " + std::to_string(size[2]) +
                                       " x " + std::to_string(size[3]) + ", " + std::to_string(threads) + " threads";
              on_fresh_thread([&] { n.run(what); });
            }
        }
}

// The largest of these sizes is cut into bands of rows, and its values stay in lanes: halos are put in.
void test_bands() {
  for (const core::Isa isa : core::supported_isas()) {
    core::set_isa(core::isa_name(isa));
    core::set_num_threads(3);
    std::mt19937 random(3);
    const Layer layer(9, 9 * 9, random);
    Geometry g = filter(3, 3);
    g.channels = 9;
    for (const Algorithm algorithm : algorithms) {
      const PackedConv2d packed(layer.weights, g, {}, algorithm);
      ConvCase c = packed.prepared(kernels()).conv_case(kernels(), 1, 47, 29);
      c.lifted_input = c.lifted_output = true;
      std::vector<int64_t> splits;
      CHECK(choose_cut({c}, c.least_pitch(), 3, splits).row_bands > 1);
    }
    Network n(Algorithm::dense);
    build_blocks(n, DType::f32, {1, 3, 47, 29});
    const auto plan = n.chain.plan(n.shapes());
    int lifted = 0;
    for (int v = 0; v < static_cast<int>(n.values.size()); ++v)
      lifted += Chain::layout(*plan, v) == Chain::Layout::lifted;
    CHECK_EQUAL(lifted, 8);  // stem, a to h
  }
}

// One chain, many callers, sizes that are planned meanwhile.
void test_concurrent_calls() {
  core::set_isa(core::isa_name(core::supported_isas().back()));
  core::set_num_threads(2);
  Network n(Algorithm::codegen);
  build_blocks(n, DType::u8, {1, 3, 9, 8});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int64_t i = 1; i < 20; ++i) {
        n.run("call " + std::to_string(i) + " of thread " + std::to_string(t));
        n.chain.plan({{i % 5, 3, 9, 8}});
      }
    });
  for (std::thread& thread : threads) thread.join();
}

void test_sizes() {
  Network n(Algorithm::dense);
  build_rows(n, DType::u8, {1, 3, 4, 5});
  n.chain.plan({{0, 3, 4, 5}, {0, 3, 4, 5}});
  CHECK_THROWS(n.chain.plan({{1, 4, 4, 5}, {1, 3, 4, 5}}), std::invalid_argument, "x: expected (N, 3, H, W)");
  CHECK_THROWS(n.chain.plan({{1, 3, 4, 5}, {1, 3, 5, 4}}), std::invalid_argument, "residual: expected the shape");
  CHECK_THROWS(n.chain.plan({{1 << 30, 3, 1 << 20, 1 << 20}, {1, 3, 5, 4}}), std::bad_alloc, "");
  CHECK_THROWS(n.chain.set_outputs({0, 99}), std::out_of_range, "");
  CHECK_THROWS(n.chain.add_max_pool2d(-1, {}), std::out_of_range, "");
  Chain mean, rows;
  mean.add_avg_pool2d(mean.add_input(DType::u8), {}, 1, 0, {});
  CHECK_THROWS(mean.plan({{1, 1, 4096, 4096}}), std::invalid_argument, "fit 32 bits");
  std::mt19937 random(3);
  const Layer layer(4, 6, random);
  rows.add_linear(std::make_shared<PackedLinear>(layer.weights, Activations{}, Algorithm::dense),
                  rows.add_input(DType::f32), -1, {});
  CHECK_THROWS(rows.plan({{2, 3, 1, 1}}), std::invalid_argument, "expected 6 values a row");

  for (const Chain::Shape& empty : {Chain::Shape{0, 3, 4, 5}, {2, 3, 0, 5}, {2, 3, 4, 0}}) {
    Network none(Algorithm::codegen);
    const int x = none.input(DType::u8, empty);
    none.chain.set_outputs({none.conv2d(x, 4, filter(3, 3), DType::i8), none.add(x, x, DType::f32)});
    on_fresh_thread([&] { none.run("empty"); });
  }
}

}  // namespace

int main() {
  test_every_kind();
  test_bands();
  test_concurrent_calls();
  test_sizes();
  return check::report();
}
