// Packed layers against naive loops, every algorithm and instruction set. Its worth is in the sanitizers: each case
// runs on a thread of its own, whose scratch is then exactly as large as the case needs, and every array is an
// allocation of its own.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "core/thread_pool.h"
#include "repetition/repetition.h"

namespace core = pycodesign::core;
using namespace pycodesign::repetition;

namespace {

struct Case {
  const char* name;
  int64_t images, height, width, outputs;
  Geometry geometry;
  int64_t level_count;
};

const Case cases[] = {
    {"one of each", 1, 1, 1, 1, {1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 3},
    {"3 pixels", 1, 1, 3, 2, {3, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 2},
    {"lanes - 1", 1, 3, 5, 7, {4, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 3},
    {"lanes", 1, 4, 4, 8, {5, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 4},
    {"lanes + 1", 1, 1, 17, 9, {7, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 3},
    {"3x3", 2, 11, 13, 17, {6, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}}, 3},
    {"3x3 on one pixel", 1, 1, 1, 3, {2, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}}, 2},
    {"3x3 on padding", 3, 1, 2, 3, {2, 1, {3, 3}, {1, 1}, {4, 3}, {1, 1}}, 3},
    {"stride beyond kernel", 2, 13, 11, 5, {3, 1, {1, 2}, {4, 3}, {0, 0}, {1, 1}}, 5},
    {"stride, dilation", 1, 17, 19, 4, {3, 1, {3, 2}, {2, 3}, {4, 1}, {3, 2}}, 3},
    {"stride past padding", 1, 2, 7, 4, {3, 1, {3, 3}, {5, 5}, {7, 6}, {1, 1}}, 3},
    {"stem", 1, 11, 41, 16, {3, 1, {7, 7}, {2, 2}, {3, 3}, {1, 1}}, 3},
    {"9 of 17 columns", 1, 2, 17, 3, {5, 1, {1, 1}, {1, 2}, {0, 0}, {1, 1}}, 3},
    {"17 of 33 columns", 1, 2, 33, 3, {4, 1, {1, 1}, {1, 2}, {0, 0}, {1, 1}}, 3},
    {"groups", 2, 7, 5, 12, {9, 3, {3, 3}, {1, 1}, {1, 1}, {1, 1}}, 3},
    {"depthwise", 1, 9, 6, 7, {7, 7, {3, 3}, {2, 1}, {1, 1}, {1, 1}}, 2},
    {"columns", 2, 11, 13, 33, {13, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}}, 2},
    {"columns, stride", 1, 12, 9, 40, {6, 1, {3, 3}, {2, 2}, {1, 1}, {1, 1}}, 2},
    {"columns, stride and dilation", 1, 9, 10, 40, {5, 1, {3, 3}, {1, 3}, {2, 2}, {2, 2}}, 2},
    {"columns on few pixels", 1, 2, 2, 40, {5, 1, {3, 2}, {1, 1}, {2, 3}, {1, 3}}, 2},
    {"columns, groups", 1, 6, 5, 40, {10, 2, {2, 3}, {1, 1}, {0, 1}, {1, 1}}, 2},
    {"kernel as large as input", 1, 5, 6, 3, {4, 1, {5, 6}, {1, 1}, {0, 0}, {1, 1}}, 16},
    {"64 channels", 1, 5, 7, 33, {64, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}}, 3},
    {"64 channels, 1x1", 1, 5, 4, 47, {64, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 3},
    {"128 channels, stride", 1, 7, 6, 40, {128, 1, {3, 3}, {2, 2}, {1, 1}, {1, 1}}, 2},
    {"62 channels, whole weights", 1, 4, 5, 20, {62, 1, {1, 2}, {1, 1}, {0, 0}, {1, 1}}, 16},
    {"groups of 66 channels", 2, 3, 5, 34, {132, 2, {3, 1}, {1, 1}, {1, 1}, {1, 1}}, 4},
    {"rows of channels", 2, 5, 7, 64, {36, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}}, 3},
    {"rows of channels, stride", 1, 9, 8, 96, {52, 1, {3, 2}, {2, 3}, {2, 4}, {2, 1}}, 16},
    {"rows of channels, bands", 1, 7, 7, 64, {64, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 16},
    {"rows of channels, one pixel", 1, 1, 1, 30, {128, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, 2},
    {"empty", 1, 2, 6, 3, {4, 1, {5, 6}, {1, 1}, {0, 0}, {1, 1}}, 3},
    {"no images", 0, 5, 6, 3, {4, 1, {5, 6}, {1, 1}, {0, 0}, {1, 1}}, 3},
};

// Rows, inputs, outputs, levels, scale groups of a linear layer.
struct LinearCase {
  int64_t rows, inputs, outputs, level_count, scale_groups;
};
const LinearCase linear_cases[] = {{1, 1, 1, 1, 1},   {2, 3, 15, 2, 1},  {3, 4, 16, 3, 1},    {5, 5, 17, 4, 1},
                                   {6, 15, 63, 3, 1}, {7, 17, 64, 3, 1}, {13, 31, 65, 2, 1},  {1, 33, 129, 4, 1},
                                   {4, 24, 70, 3, 3}, {2, 34, 5, 2, 17}, {1, 257, 130, 3, 1}, {0, 8, 8, 3, 1},
                                   {9, 40, 33, 9, 5}};

struct Layer {
  std::vector<uint8_t> codes;
  std::vector<float> levels, scale, bias;
  Weights weights;

  Layer(int64_t outputs, int64_t inputs, int64_t level_count, int64_t scale_groups, std::mt19937& random) {
    for (int64_t i = 0; i < level_count; ++i)
      levels.push_back(static_cast<float>(level_count == 2 ? 2 * i - 1 : i - level_count / 2));
    for (int64_t i = 0; i < outputs * inputs; ++i)
      codes.push_back(static_cast<uint8_t>(random() % static_cast<size_t>(level_count)));
    for (int64_t i = 0; i < outputs * scale_groups; ++i)
      scale.push_back(static_cast<float>(static_cast<int>(random() % 64) - 32) / 32);
    for (int64_t i = 0; i < outputs; ++i) bias.push_back(static_cast<float>(static_cast<int>(random() % 64) - 32) / 8);
    weights = {outputs, inputs, codes.data(), levels.data(), 1, level_count, scale.data(), scale_groups, bias.data()};
  }

  // Other weights: any of so many kernels of `inputs` inputs, other ones for either half where there are halves.
  std::vector<uint8_t> index;
  std::vector<int8_t> sign;
  std::vector<float> values;
  Codebook book;
  void use_kernels(int64_t kernels, int64_t inputs, std::mt19937& random) {
    const int64_t patterns = weights.inputs / inputs, books = patterns % 2 ? 1 : 2;
    for (int64_t i = 0; i < books * kernels * inputs; ++i) values.push_back(levels[random() % levels.size()]);
    for (int64_t i = 0; i < weights.outputs * patterns; ++i) {
      index.push_back(static_cast<uint8_t>(random() % static_cast<size_t>(kernels)));
      sign.push_back(random() % 2 ? 1 : -1);
    }
    book = {books, kernels, inputs, patterns, index.data(), sign.data(), values.data()};
    weights.codes = nullptr;
    weights.codebook = &book;
  }
};

size_t size_of(DType dtype) { return dtype == DType::f32 || dtype == DType::i32 ? 4 : 1; }

// Elements are small integers in every type, so that float sums are exact too; every array ends where its allocation
// does.
struct Array {
  std::vector<int64_t> size;
  DType dtype;
  std::unique_ptr<char[]> data;

  Array(std::vector<int64_t> size_, DType dtype_)
      : size(std::move(size_)), dtype(dtype_), data(new char[static_cast<size_t>(count()) * size_of(dtype)]) {}
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t s : size) n *= s;
    return n;
  }
  double at(int64_t i) const {
    const char* p = data.get() + static_cast<size_t>(i) * size_of(dtype);
    if (dtype == DType::u8) return static_cast<uint8_t>(*p);
    if (dtype == DType::i8) return static_cast<int8_t>(*p);
    int32_t integer;
    float real;
    std::memcpy(&integer, p, 4);
    std::memcpy(&real, p, 4);
    return dtype == DType::i32 ? integer : static_cast<double>(real);
  }
  void fill(std::mt19937& random) {
    for (int64_t i = 0; i < count(); ++i) {
      const int value = static_cast<int>(random() % 100) - (dtype == DType::u8 ? 0 : 50);
      const float real = static_cast<float>(value);
      if (dtype == DType::f32) std::memcpy(data.get() + i * 4, &real, 4);
      else data[static_cast<size_t>(i)] = static_cast<char>(value);
    }
  }
  Tensor tensor() const {
    const auto bytes = static_cast<int64_t>(size_of(dtype));
    return {data.get(),
            {size[0], size[1], size[2], size[3]},
            {size[1] * size[2] * size[3] * bytes, size[2] * size[3] * bytes, size[3] * bytes, bytes}};
  }
};

// acc * scale per scale group, plus bias and residual; exact in double: all are small multiples of powers of two.
double epilogue_of(const Layer& l, int64_t o, const std::vector<double>& acc, double residual) {
  double y = 0;
  for (size_t g = 0; g < acc.size(); ++g)
    y += acc[g] * static_cast<double>(l.scale[static_cast<size_t>(o) * acc.size() + g]);
  return y + static_cast<double>(l.bias[static_cast<size_t>(o)]) + residual;
}

double quantized(double y, DType dtype) {
  if (dtype == DType::f32) return y;
  const double low = dtype == DType::i8 ? -128 : 0;
  return std::clamp(std::nearbyint(y / 4) + 3, low, low + 255);
}

Epilogue epilogue(DType input, DType output, DType residual) {
  Epilogue e;
  e.acc_dtype = input == DType::f32 ? DType::f32 : DType::i32;
  e.out_dtype = output;
  e.has_residual = output != DType::i32;
  e.residual_dtype = residual;
  if (output == DType::u8 || output == DType::i8) e.out_scale = 4, e.out_zero_point = 3;
  return e;
}

template <class Packed> void check_codes(const Packed& packed, const Layer& layer, const std::string& what) {
  if (packed.codes() != layer.codes) check::fail(__FILE__, __LINE__, what + ": other codes came back");
  CHECK(packed.counts().bytes > 0);
}

void check_results(const Array& out, const std::vector<double>& expected, const std::string& what) {
  for (int64_t i = 0; i < out.count(); ++i)
    if (out.at(i) != expected[static_cast<size_t>(i)])
      return check::fail(__FILE__, __LINE__,
                         what + ": element " + std::to_string(i) + " expected " +
                             std::to_string(expected[static_cast<size_t>(i)]) + ", got " + std::to_string(out.at(i)));
}

// A layer, what it is called with, and what must come out, whatever algorithm, instruction set and threads.
struct ConvReference {
  const Case& c;
  DType input, output;
  Activations activations;
  Layer layer;
  std::vector<int64_t> shape;
  Array x, residual;
  std::vector<double> expected;

  ConvReference(const Case& c_, bool has_codebook, DType input_, DType output_, std::mt19937 random = std::mt19937(7))
      : c(c_),
        input(input_),
        output(output_),
        activations{input, 1,
                    input == DType::u8   ? 50
                    : input == DType::i8 ? -7
                                         : 0,
                    0},
        layer(c.outputs, channels() * taps(), c.level_count, 1, random),
        shape{c.images, c.outputs, c.geometry.output_size(0, c.height), c.geometry.output_size(1, c.width)},
        x({c.images, c.geometry.channels, c.height, c.width}, input),
        residual(shape, output == DType::f32 ? DType::f32 : DType::u8) {
    if (has_codebook)  // entries of one byte, and of two
      layer.use_kernels(c.outputs < 10 ? 5 : 150, taps() == 1 && channels() % 4 == 0 ? 4 : taps(), random);
    x.fill(random);
    residual.fill(random);
    for (int64_t n = 0; n < shape[0]; ++n)
      for (int64_t o = 0; o < shape[1]; ++o)
        for (int64_t h = 0; h < shape[2]; ++h)
          for (int64_t w = 0; w < shape[3]; ++w) {
            const double acc = sum(n, o, h, w);
            const double added = output == DType::i32 ? 0 : residual.at(static_cast<int64_t>(expected.size()));
            expected.push_back(output == DType::i32 ? acc : quantized(epilogue_of(layer, o, {acc}, added), output));
          }
  }

  int64_t channels() const { return c.geometry.channels / c.geometry.groups; }
  int64_t taps() const { return c.geometry.kernel[0] * c.geometry.kernel[1]; }

  double sum(int64_t n, int64_t o, int64_t h, int64_t w) const {
    const Geometry& g = c.geometry;
    double acc = 0;
    for (int64_t i = 0; i < channels() * taps(); ++i) {
      const int64_t channel = o / (c.outputs / g.groups) * channels() + i / taps(), r = i % taps() / g.kernel[1],
                    s = i % g.kernel[1];
      const int64_t row = h * g.stride[0] + r * g.dilation[0] - g.padding[0],
                    column = w * g.stride[1] + s * g.dilation[1] - g.padding[1];
      if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
      acc += static_cast<double>(layer.weights.level(o, i)) *
             (x.at(((n * g.channels + channel) * c.height + row) * c.width + column) - activations.zero_point);
    }
    return acc;
  }

  void check(Algorithm algorithm, const std::string& what) const {
    const PackedConv2d packed(layer.weights, c.geometry, activations, algorithm);
    if (algorithm == Algorithm::codebook) CHECK(packed.indices() == std::pair(layer.index, layer.sign));
    else check_codes(packed, layer, what);
    Array out(shape, output);
    const Tensor added = residual.tensor();
    packed.run(x.tensor(), out.tensor(), output == DType::i32 ? nullptr : &added,
               epilogue(input, output, residual.dtype));
    check_results(out, expected, what);
  }
};

struct LinearReference {
  const LinearCase& c;
  DType input, output;
  Activations activations;
  Layer layer;
  Array x, residual;
  std::vector<double> expected;

  LinearReference(const LinearCase& c_, DType input_, DType output_, std::mt19937 random = std::mt19937(11))
      : c(c_),
        input(input_),
        output(output_),
        activations{input, 1,
                    input == DType::u8   ? 50
                    : input == DType::i8 ? -7
                                         : 0,
                    0},
        layer(c.outputs, c.inputs, c.level_count, c.scale_groups, random),
        x({c.rows, c.inputs}, input),
        residual({c.rows, c.outputs}, DType::i8) {
    x.fill(random);
    residual.fill(random);
    const int64_t group = c.inputs / c.scale_groups;
    for (int64_t t = 0; t < c.rows; ++t)
      for (int64_t o = 0; o < c.outputs; ++o) {
        std::vector<double> acc(static_cast<size_t>(c.scale_groups));
        double sum = 0;
        for (int64_t i = 0; i < c.inputs; ++i) {
          const double term =
              static_cast<double>(layer.weights.level(o, i)) * (x.at(t * c.inputs + i) - activations.zero_point);
          acc[static_cast<size_t>(i / group)] += term;
          sum += term;
        }
        expected.push_back(
            output == DType::i32 ? sum : quantized(epilogue_of(layer, o, acc, residual.at(t * c.outputs + o)), output));
      }
  }

  void check(Algorithm algorithm, const std::string& what) const {
    const PackedLinear packed(layer.weights, activations, algorithm);
    check_codes(packed, layer, what);
    Array out({c.rows, c.outputs}, output);
    const auto rows = [](const Array& a) -> Tensor {
      const auto bytes = static_cast<int64_t>(size_of(a.dtype));
      return {a.data.get(), {1, a.size[1], 1, a.size[0]}, {0, bytes, 0, a.size[1] * bytes}};
    };
    const Tensor added = rows(residual);
    packed.run(rows(x), rows(out), output == DType::i32 ? nullptr : &added, epilogue(input, output, DType::i8));
    check_results(out, expected, what);
  }
};

void on_fresh_thread(const std::function<void()>& test) { std::thread(test).join(); }

// No level quietly runs the kernels of a lesser one.
void test_dispatch() {
  for (const core::Isa isa : core::supported_isas()) {
    core::set_isa(core::isa_name(isa));
    CHECK_EQUAL(kernels().lanes, isa == core::Isa::scalar ? 4 : isa < core::Isa::avx512 ? 8 : 16);
  }
}

// Each reference is computed once: it takes longer than the kernels.
void test_every_algorithm() {
  constexpr std::pair<DType, DType> dtypes[] = {{DType::f32, DType::f32}, {DType::f32, DType::u8},
                                                {DType::u8, DType::u8},   {DType::i8, DType::i8},
                                                {DType::u8, DType::i32},  {DType::i8, DType::f32}};
  int count = 0;
  const auto test = [&](const auto& reference, std::initializer_list<Algorithm> algorithms, const std::string& name) {
    const std::string types = " types " + std::to_string(static_cast<int>(reference.input)) + " to " +
                              std::to_string(static_cast<int>(reference.output)) + ", ";
    for (const core::Isa isa : check::isas())
      for (const int threads : check::threads({1, 3}))
        for (const Algorithm a : algorithms) {
          core::set_isa(core::isa_name(isa));
          core::set_num_threads(threads);
          const std::string what = std::string(core::isa_name(isa)) + " " + algorithm_name(a) + types + name;
          on_fresh_thread([&] { reference.check(a, what); });
          ++count;
        }
  };
  for (const auto& [input, output] : dtypes) {
    for (const Case& c : cases) {
      test(ConvReference(c, false, input, output), {Algorithm::codegen, Algorithm::tables, Algorithm::dense}, c.name);
      test(ConvReference(c, true, input, output), {Algorithm::codebook}, c.name);
    }
    for (const LinearCase& c : linear_cases) {
      const std::string name =
          std::to_string(c.rows) + " x " + std::to_string(c.inputs) + " -> " + std::to_string(c.outputs);
      const LinearReference reference(c, input, output);
      test(reference, {Algorithm::dense}, name);
      if (c.level_count <= 4) test(reference, {Algorithm::packed}, name);
    }
  }
  std::printf("%d cases on %zu instruction sets\n", count, check::isas().size());
}

// So many outputs call for large tables, and nearly fill them.
void test_tables_full_of_patterns() {
  std::mt19937 random(3);
  for (int64_t levels = 1; levels <= 16; ++levels) {
    const Layer layer(300, 4 * 9, levels, 1, random);
    const Geometry g{4, 1, {3, 3}, {1, 1}, {0, 0}, {1, 1}};
    try {
      check_codes(PackedConv2d(layer.weights, g, {}, Algorithm::tables), layer, std::to_string(levels) + " levels");
    } catch (const std::exception& error) {
      check::fail(__FILE__, __LINE__, std::to_string(levels) + " levels: " + error.what());
    }
  }
}

void test_errors() {
  std::mt19937 random(5);
  const Geometry g{2, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
  const Layer many(3, 2, 17, 1, random), five(3, 2, 5, 1, random);
  Layer huge(3, 2, 3, 1, random);
  for (float& level : huge.levels) level *= 8388608.0f;
  std::fill(huge.codes.begin(), huge.codes.end(), uint8_t{2});
  CHECK_THROWS(PackedConv2d(many.weights, g, {}, Algorithm::tables), std::invalid_argument, "at most 16");
  CHECK_THROWS(PackedConv2d(five.weights, g, {}, Algorithm::packed), std::invalid_argument, "'dense' or 'codebook'");
  CHECK_THROWS(PackedLinear(five.weights, {}, Algorithm::packed), std::invalid_argument, "at most 4");
  CHECK_THROWS(PackedLinear(five.weights, {}, Algorithm::tables), std::invalid_argument, "'dense' or 'packed'");
  CHECK_THROWS(PackedConv2d(huge.weights, g, {DType::u8}, Algorithm::tables), std::invalid_argument, "fit 32 bits");
  for (const Algorithm a : {Algorithm::dense, Algorithm::packed})
    CHECK_THROWS(PackedLinear(huge.weights, {DType::u8}, a), std::invalid_argument, "levels: expected ");
}

}  // namespace

int main() {
  test_dispatch();
  test_every_algorithm();
  test_tables_full_of_patterns();
  test_errors();
  return check::report();
}
