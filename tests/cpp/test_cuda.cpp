// The CUDA kernels of the repetition family, run by the emulation, against plain loops: integers to the bit, floats
// within 4e-6 of the sum of magnitudes and one rounding to out. x, out and residual are allocations of their own, for
// the sanitizers.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/half.h"
#include "emulated_cuda.h"
#include "repetition/cuda.h"

using namespace pycodesign::repetition;
namespace core = pycodesign::core;
using cuda::DenseLayer, cuda::DeviceLayer, cuda::FactoredLayer;
namespace emulated = pycodesign::core::cuda::emulated;

namespace {

std::mt19937 random_bits(7);
int64_t draw(int64_t below) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(below)); }

enum class Levels { binary, ternary, four_bits, eight_bits, fractional, own_fractional };

struct Case {
  int64_t images, channels, height, width, outputs;
  Geometry geometry;
  DType dtype, out_dtype;
  Levels levels;
  bool channels_last, residual;
  int multiprocessors;  // many: sums are cut
  int64_t scale_groups = 1;
  bool is_factored = false;
};

// (N, C, H, W) in memory that ends with its last element.
struct Array {
  std::unique_ptr<char[]> memory;
  Tensor view;
  DType dtype;

  Array(std::array<int64_t, 4> size, DType dtype_, bool channels_last) : dtype(dtype_) {
    const int64_t element = element_bytes(dtype), count = size[0] * size[1] * size[2] * size[3];
    memory.reset(new char[static_cast<size_t>(count * element)]);
    view = {memory.get(), size, {}};
    const int order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
    int64_t stride = element;
    for (const int axis : order[channels_last]) {
      view.stride[static_cast<size_t>(axis)] = stride;
      stride *= size[static_cast<size_t>(axis)];
    }
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(draw(2001) - 1000) / 256;
      const uint16_t bits = dtype == DType::f16 ? core::to_float16(value) : core::to_bfloat16(value);
      if (element == 4) std::memcpy(memory.get() + 4 * i, &value, 4);
      else if (element == 2) std::memcpy(memory.get() + 2 * i, &bits, 2);
      else memory[static_cast<size_t>(i)] = static_cast<char>(draw(256));
    }
  }

  char* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return view.data + n * view.stride[0] + c * view.stride[1] + y * view.stride[2] + x * view.stride[3];
  }
  double get(int64_t n, int64_t c, int64_t y, int64_t x) const {
    const char* p = at(n, c, y, x);
    float value;
    int32_t integer;
    uint16_t bits;
    switch (dtype) {
      case DType::u8: return static_cast<uint8_t>(*p);
      case DType::i8: return static_cast<int8_t>(*p);
      case DType::i32: std::memcpy(&integer, p, 4); return integer;
      case DType::f16: std::memcpy(&bits, p, 2); return core::from_float16(bits);
      case DType::bf16: std::memcpy(&bits, p, 2); return core::from_bfloat16(bits);
      default: std::memcpy(&value, p, 4); return value;
    }
  }
};

std::vector<float> make_levels(Levels kind, int64_t outputs) {
  std::vector<float> levels;
  switch (kind) {
    case Levels::binary: return {-1, 1};
    case Levels::ternary: return {-1, 0, 1};
    case Levels::four_bits:
      for (int i = -8; i < 8; ++i) levels.push_back(static_cast<float>(i));
      return levels;
    case Levels::eight_bits:
      for (int i = -100; i < 128; ++i) levels.push_back(static_cast<float>(i));
      return levels;
    case Levels::fractional: return {-1.1f, -0.3f, 0.7f};
    default:
      for (int64_t o = 0; o < outputs; ++o)
        for (int i = 0; i < 3; ++i) levels.push_back(static_cast<float>(i) / 3 - 0.1f * static_cast<float>(o + 1));
      return levels;
  }
}

struct Sum {
  std::vector<double> parts;  // one per scale group
  double magnitude = 0;
};

class Check {
 public:
  explicit Check(const Case& c) : c_(c), g_(c.geometry) {
    const int64_t inputs = g_.channels / g_.groups * g_.kernel[0] * g_.kernel[1];
    levels_ = make_levels(c.levels, c.outputs);
    rows_ = c.levels == Levels::own_fractional ? c.outputs : 1;
    const auto count = static_cast<int64_t>(levels_.size()) / rows_;
    for (int64_t i = 0; i < c.outputs * inputs; ++i) codes_.push_back(static_cast<uint8_t>(draw(count)));
    for (int64_t i = 0; i < c.outputs * c.scale_groups; ++i) scale_.push_back(static_cast<float>(draw(200) - 99) / 128);
    for (int64_t o = 0; o < c.outputs; ++o) bias_.push_back(static_cast<float>(draw(200) - 99) / 7);
    weights_ = {c.outputs, inputs,        codes_.data(),  levels_.data(), rows_,
                count,     scale_.data(), c.scale_groups, bias_.data()};
    activations_.dtype = c.dtype;
    if (!is_float(c.dtype)) {
      activations_.scale = 0.037;
      activations_.zero_point = c.dtype == DType::u8 ? 119 : -5;
    }
  }

  void run() {
    const int64_t height = g_.output_size(0, c_.height), width = g_.output_size(1, c_.width);
    const Array x({c_.images, c_.channels, c_.height, c_.width}, c_.dtype, c_.channels_last);
    const Array out({c_.images, c_.outputs, height, width}, c_.out_dtype, c_.channels_last);
    const DType residual_dtype = is_float(c_.out_dtype) ? c_.out_dtype : DType::u8;
    const Array residual({c_.images, c_.outputs, height, width}, residual_dtype, !c_.channels_last);
    Epilogue& e = epilogue_;
    e.acc_dtype = is_float(c_.dtype) ? DType::f32 : DType::i32;
    e.out_dtype = c_.out_dtype;
    e.has_residual = c_.residual;
    e.residual_dtype = residual_dtype;
    e.residual_scale = 0.3f;
    e.residual_zero_point = is_float(residual_dtype) ? 0 : 17;
    if (c_.out_dtype != DType::i32) e.has_lo = true, e.lo = -6.1f;
    e.has_hi = is_float(c_.out_dtype) && c_.residual;
    e.hi = 29;
    e.out_scale = 0.21f;
    e.out_zero_point = c_.out_dtype == DType::u8 ? 121 : c_.out_dtype == DType::i8 ? -3 : 0;

    std::unique_ptr<DeviceLayer> made;
    if (c_.is_factored) made = std::make_unique<FactoredLayer>(weights_, g_, activations_, Algorithm::tables);
    else made = std::make_unique<DenseLayer>(weights_, g_, activations_, cuda::Limits{c_.multiprocessors});
    const DeviceLayer& layer = *made;
    const cuda::Plan plan = layer.plan(x.view.size);
    auto* workspace = static_cast<char*>(
        std::aligned_alloc(256, static_cast<size_t>((plan.staged_bytes + plan.partial_bytes + 255) / 256 * 256 + 256)));
    layer.run(x.view, out.view, c_.residual ? &residual.view : nullptr, e, workspace, nullptr);
    std::free(workspace);
    int wrong = 0;
    for (int64_t n = 0; n < c_.images; ++n)
      for (int64_t o = 0; o < c_.outputs; ++o)
        for (int64_t y = 0; y < height; ++y)
          for (int64_t column = 0; column < width; ++column) {
            const Sum sum = add(x, n, o, y, column);
            const double got = out.get(n, o, y, column), r = c_.residual ? residual.get(n, o, y, column) : 0;
            const double wanted = is_float(c_.dtype) ? finish<double>(sum, o, r) : finish<float>(sum, o, r);
            double bound = !is_float(c_.dtype) ? 0 : 4e-6 * (sum.magnitude * std::fabs(scale_of(o, 0)) + 20);
            if (is_float(c_.dtype) && !is_float(c_.out_dtype)) bound = 1;
            if (element_bytes(c_.out_dtype) == 2)
              bound += std::ldexp(std::fabs(wanted) + bound, c_.out_dtype == DType::f16 ? -11 : -8);
            if (!(std::fabs(got - wanted) <= bound) && ++wrong <= 3)
              check::fail(__FILE__, __LINE__,
                          describe(plan) + ": output " + std::to_string(n) + " " + std::to_string(o) + " " +
                              std::to_string(y) + " " + std::to_string(column) + ": expected " +
                              std::to_string(wanted) + ", got " + std::to_string(got));
          }
  }

 private:
  float scale_of(int64_t o, int64_t g) const { return scale_[static_cast<size_t>(o * c_.scale_groups + g)]; }

  std::string describe(const cuda::Plan& plan) const {
    return std::to_string(c_.images) + "x" + std::to_string(c_.channels) + "x" + std::to_string(c_.height) + "x" +
           std::to_string(c_.width) + " to " + std::to_string(c_.outputs) + ", kernel " + std::to_string(g_.kernel[0]) +
           "x" + std::to_string(g_.kernel[1]) + ", groups " + std::to_string(g_.groups) + ", dtype " +
           std::to_string(static_cast<int>(c_.dtype)) + ", levels " + std::to_string(static_cast<int>(c_.levels)) +
           " (" + plan.why + ")";
  }

  Sum add(const Array& x, int64_t n, int64_t o, int64_t row, int64_t column) const {
    Sum sum;
    sum.parts.assign(static_cast<size_t>(c_.scale_groups), 0);
    const int64_t channels = g_.channels / g_.groups, group = o / (c_.outputs / g_.groups);
    int64_t i = 0;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < g_.kernel[0]; ++r)
        for (int64_t s = 0; s < g_.kernel[1]; ++s, ++i) {
          const int64_t y = row * g_.stride[0] + r * g_.dilation[0] - g_.padding[0],
                        at = column * g_.stride[1] + s * g_.dilation[1] - g_.padding[1];
          if (y < 0 || y >= c_.height || at < 0 || at >= c_.width) continue;
          const double term = static_cast<double>(weights_.level(o, i)) *
                              (x.get(n, group * channels + c, y, at) - activations_.zero_point);
          sum.parts[static_cast<size_t>(i * c_.scale_groups / weights_.inputs)] += term;
          sum.magnitude += std::fabs(term);
        }
    return sum;
  }

  template <class Real> double finish(const Sum& sum, int64_t o, double r) const {
    const Epilogue& e = epilogue_;
    if (e.out_dtype == DType::i32) return sum.parts[0];
    Real y = 0;
    for (int64_t g = 0; g < c_.scale_groups; ++g) {
      const auto m = static_cast<Real>(activations_.scale * static_cast<double>(scale_of(o, g)));
      const Real part = static_cast<Real>(sum.parts[static_cast<size_t>(g)]) * m;
      y = g ? y + part : part;
    }
    y = y + static_cast<Real>(bias_[static_cast<size_t>(o)]);
    if (e.has_residual)
      y = y + static_cast<Real>(e.residual_scale) * (static_cast<Real>(r) - static_cast<Real>(e.residual_zero_point));
    if (e.has_lo && y < static_cast<Real>(e.lo)) y = static_cast<Real>(e.lo);
    if (e.has_hi && y > static_cast<Real>(e.hi)) y = static_cast<Real>(e.hi);
    if (is_float(e.out_dtype)) return static_cast<double>(y);
    const int lowest = e.out_dtype == DType::i8 ? -128 : 0;
    const double v = std::nearbyint(static_cast<double>(y / static_cast<Real>(e.out_scale))) + e.out_zero_point;
    return std::min(std::max(v, static_cast<double>(lowest)), lowest + 255.0);
  }

  const Case& c_;
  const Geometry& g_;
  std::vector<float> levels_, scale_, bias_;
  std::vector<uint8_t> codes_;
  int64_t rows_;
  Weights weights_;
  Activations activations_;
  Epilogue epilogue_;
};

constexpr DType inputs[] = {DType::f32, DType::u8, DType::i8, DType::f16, DType::bf16};
constexpr Levels integer_levels[] = {Levels::binary, Levels::ternary, Levels::four_bits, Levels::eight_bits};

void test_convolutions() {
  struct Size {
    int64_t images, channels, height, width, outputs, groups;
    std::array<int64_t, 2> kernel, stride, padding, dilation;
  };
  const Size sizes[] = {
      {1, 64, 8, 8, 64, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}},  {2, 17, 7, 5, 33, 1, {3, 3}, {2, 1}, {1, 1}, {1, 1}},
      {1, 3, 11, 13, 40, 1, {5, 3}, {2, 2}, {2, 1}, {1, 1}}, {1, 40, 9, 9, 31, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {1, 72, 6, 6, 34, 2, {3, 3}, {1, 1}, {2, 2}, {2, 2}},  {1, 6, 5, 5, 6, 6, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {1, 1, 3, 3, 1, 1, {3, 3}, {1, 1}, {0, 0}, {1, 1}},    {3, 130, 3, 4, 130, 1, {2, 2}, {1, 1}, {1, 0}, {1, 1}},
      {1, 24, 15, 15, 5, 1, {1, 1}, {2, 3}, {0, 1}, {1, 1}},
  };
  int turn = 0;
  for (const Size& s : sizes)
    for (const DType dtype : inputs)
      for (const Levels levels : integer_levels) {
        ++turn;
        const DType outs[] = {DType::f32, DType::u8, DType::f16, DType::bf16, DType::i8, DType::i32};
        const DType out = outs[turn % (is_float(dtype) ? 5 : 6)];
        Case c{s.images,
               s.channels,
               s.height,
               s.width,
               s.outputs,
               {s.channels, s.groups, s.kernel, s.stride, s.padding, s.dilation},
               dtype,
               out,
               levels,
               turn % 2 == 0,
               out != DType::i32 && turn % 3 != 0,
               turn % 4 == 1 ? 1 : 132};
        Check(c).run();
        c.is_factored = true;
        if (levels != Levels::eight_bits) Check(c).run();
      }
}

void test_float_levels() {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const Levels levels : {Levels::fractional, Levels::own_fractional})
      for (const int64_t pixels : {2, 9}) {
        Case c{1,     37,         4,      pixels, 18,   {37, 1, {3, 1}, {1, 1}, {1, 0}, {1, 1}},
               dtype, DType::f32, levels, false,  true, 132};
        Check(c).run();
        c.is_factored = true;
        Check(c).run();
        Case linear{1,     70,         1,      pixels, 33,    {70, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
                    dtype, DType::f32, levels, true,   false, 132};
        Check(linear).run();
      }
}

void test_rows() {
  for (const int64_t rows : {1, 7, 9, 16, 17, 66})
    for (const int64_t channels : {1, 30, 256, 1030})
      for (const DType dtype : inputs)
        for (const Levels levels : integer_levels) {
          if (channels > 256 && rows > 9 && levels != Levels::ternary) continue;
          Case c{1,
                 channels,
                 1,
                 rows,
                 channels == 30 ? 65 : 31,
                 {channels, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
                 dtype,
                 DType::f32,
                 levels,
                 rows % 2 == 0,
                 rows % 3 == 0,
                 4};
          Check(c).run();
        }
}

void test_scale_groups() {
  for (const int64_t rows : {1, 20})
    for (const int64_t groups : {2, 5})
      for (const DType dtype : inputs)
        for (const Levels levels : {Levels::ternary, Levels::eight_bits}) {
          const int64_t channels = groups * (is_float(dtype) ? 35 : 64);
          Case c{1,      channels, 1,     rows, 40,    {channels, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, dtype, DType::f32,
                 levels, true,     false, 132,  groups};
          Check(c).run();
        }
}

}  // namespace

int main() {
  for (uint64_t seed = 1; seed <= 1; ++seed) {
    emulated::set_seed(seed);
    test_convolutions();
    test_float_levels();
    test_rows();
    test_scale_groups();
  }
  return check::report();
}
