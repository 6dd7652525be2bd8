// Generated code against sums in double, on every vector length that the processor has.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/aligned_buffer.h"
#include "core/cpu.h"
#include "repetition/codegen_x86.h"

using namespace pycodesign;
using namespace pycodesign::repetition;

namespace {

struct Case {
  const char* name;
  int64_t outputs, groups, channels, taps;
  std::vector<float> levels;
  int64_t level_rows = 1;  // else each output has the levels times its own number
  double zeros = 0;        // of the weights, at least
};

const std::vector<float> binary{-1, 1}, ternary{-1, 0, 1}, odd{-3, -1, 1, 3}, two_bits{-2, -1, 0, 1},
    powers{-64, -16, -4, 0, 1, 8, 32}, real{-1.7f, -0.3f, 0.25f, 1, 2.5f},
    four_bits{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

const Case cases[] = {
    {"one of each", 1, 1, 1, 1, binary},
    {"two channels", 3, 1, 2, 1, ternary},
    {"three channels", 29, 1, 3, 9, ternary},
    {"five channels, one output more", 30, 1, 5, 9, odd},
    {"no zeros", 31, 1, 7, 4, binary},
    {"levels without their negatives", 32, 1, 5, 9, two_bits},
    {"16 levels", 33, 1, 6, 9, four_bits},
    {"16 levels of few outputs", 3, 1, 64, 9, four_bits},
    {"powers", 13, 1, 9, 4, powers},
    {"real levels", 29, 1, 5, 9, real},
    {"negative levels", 7, 1, 4, 1, {-2, -1}},
    {"zeros only", 30, 1, 3, 9, {0}},
    {"few weights", 64, 1, 16, 9, ternary, 1, 0.97},
    {"an output's own levels", 30, 1, 5, 9, two_bits, 30},
    {"groups", 100, 5, 3, 9, ternary},
    {"depthwise", 7, 7, 1, 9, odd},
    {"stem", 64, 1, 3, 49, ternary},
    {"segments", 64, 1, 64, 9, ternary},
    {"segments of four", 100, 1, 64, 9, odd},
    {"segments of one tap", 64, 2, 300, 1, binary},
};

// Filters of `taps` rows; sums of columns, which whole layers need, are for test_repetition.
Geometry one_column(const Case& c) { return {c.groups * c.channels, c.groups, {c.taps, 1}, {1, 1}, {0, 0}, {1, 1}}; }

struct Layer {
  std::vector<uint8_t> codes;
  std::vector<float> levels;
  Weights weights;

  Layer(const Case& c, std::mt19937& random) {
    for (int64_t row = 0; row < c.level_rows; ++row)
      for (const float level : c.levels) levels.push_back(level * static_cast<float>(1 + row % 3));
    const auto zero = std::find(c.levels.begin(), c.levels.end(), 0.0f) - c.levels.begin();
    for (int64_t i = 0; i < c.outputs * c.channels * c.taps; ++i) {
      const bool is_zero = static_cast<double>(random() % 1000) < 1000 * c.zeros;
      codes.push_back(static_cast<uint8_t>(is_zero ? static_cast<size_t>(zero) : random() % c.levels.size()));
    }
    weights = {c.outputs,    c.channels * c.taps,
               codes.data(), levels.data(),
               c.level_rows, static_cast<int64_t>(c.levels.size()),
               nullptr,      0,
               nullptr};
  }
};

// Each channel and tap reads vectors of its own, so that its inputs can be any. Elements are floats or int16.
template <class T> struct Planes {
  static constexpr int64_t vectors = 2;  // of pixels
  int64_t lanes, taps, channel_stride;
  std::vector<int64_t> tap_source;
  core::AlignedBuffer<char> buffer;
  T* x;

  Planes(const Case& c, int64_t vector_bytes)
      : lanes(vector_bytes / static_cast<int64_t>(sizeof(T))),
        taps(c.taps),
        channel_stride((taps * vectors + 1) * vector_bytes) {
    for (int64_t t = 0; t < taps; ++t) tap_source.push_back((taps - 1 - t) * vectors * vector_bytes);
    x = reinterpret_cast<T*>(buffer.reserve(static_cast<size_t>(c.groups * c.channels * channel_stride)));
  }
  const char* plane(int64_t channel) const { return reinterpret_cast<const char*>(x) + channel * channel_stride; }
  T& at(int64_t channel, int64_t tap, int64_t pixel) {
    const int64_t bytes = channel * channel_stride + tap_source[static_cast<size_t>(tap)];
    return x[bytes / static_cast<int64_t>(sizeof(T)) + pixel];
  }
};

// All inputs random, or as large as they may be with the signs of one output's weights; a pixel has its output.
template <class T>
void fill(Planes<T>& planes, const Case& c, const Layer& layer, int64_t range, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform(-static_cast<double>(range), static_cast<double>(range));
  for (int64_t channel = 0; channel < c.groups * c.channels; ++channel)
    for (int64_t t = 0; t < c.taps; ++t)
      for (int64_t pixel = 0; pixel < planes.vectors * planes.lanes; ++pixel) {
        T& x = planes.at(channel, t, pixel);
        const double value = uniform(random);
        x = static_cast<T>(sizeof(T) == 2 ? std::round(value) : value);
        const int64_t output = pixel % c.outputs, per_group = c.outputs / c.groups;
        if (pixel % 3 == 0 || output / per_group != channel / c.channels) continue;
        const bool minus = (layer.weights.level(output, channel % c.channels * c.taps + t) < 0) != (pixel % 3 == 1);
        x = static_cast<T>(minus ? -range : range);
      }
}

template <class T> void test_case(const Case& c, DType dtype, int64_t range, bool avx512, const std::string& what) {
  std::mt19937 random(5);
  const Layer layer(c, random);
  const Geometry geometry = one_column(c);
  const CodeLayer code_layer{&layer.weights, geometry, dtype, range};
  const LayerCode code(code_layer, avx512);
  const int64_t vector_bytes = avx512 ? 64 : 32;
  Planes<T> planes(c, vector_bytes);
  fill(planes, c, layer, range, random);
  CHECK(code_cost(code_layer, avx512).run > 0);
  CHECK(code.bytes() > 0 && code.group_size() >= 1 && code.group_size() <= 4);

  int64_t next_output = 0;
  const int64_t acc_words = vector_bytes / 4 * (dtype == DType::f32 ? 1 : 2);
  for (const CodeChunk& chunk : code.chunks()) {
    CHECK_EQUAL(chunk.first_output, next_output);
    next_output += chunk.outputs;
    for (int64_t v = 0; v < planes.vectors; ++v) {
      constexpr uint32_t guard = 0xdeadbeef;
      core::AlignedBuffer<uint32_t> buffer;
      uint32_t* acc = buffer.reserve(static_cast<size_t>(chunk.outputs * acc_words + 1));
      std::fill_n(acc, chunk.outputs * acc_words + 1, guard);
      for (const CodeSegment& s : chunk.segments) {
        CHECK(s.prefetch_lines >= (s.end - s.begin) / 64 - 1 && s.begin % 64 == 0);
        const char* x = planes.plane(chunk.group * c.channels + s.channel) + v * vector_bytes;
        code.function(s)(x, reinterpret_cast<char*>(acc), code.address(s), planes.channel_stride,
                         planes.tap_source.data());
      }
      CHECK_EQUAL(acc[chunk.outputs * acc_words], guard);
      for (int64_t o = 0; o < chunk.outputs; ++o)
        for (int64_t lane = 0; lane < planes.lanes; ++lane) {
          double expected = 0, magnitude = 0;
          for (int64_t i = 0; i < layer.weights.inputs; ++i) {
            const double product = static_cast<double>(layer.weights.level(chunk.first_output + o, i)) *
                                   static_cast<double>(planes.at(chunk.group * c.channels + i / c.taps, i % c.taps,
                                                                 v * planes.lanes + lane));
            expected += product;
            magnitude += std::abs(product);
          }
          double got;
          if (dtype == DType::f32) {
            float f;
            std::memcpy(&f, acc + o * acc_words + lane, 4);
            got = static_cast<double>(f);
          } else {
            got = static_cast<int32_t>(acc[o * acc_words + lane % 2 * (acc_words / 2) + lane / 2]);
          }
          const double bound = dtype == DType::f32
                                   ? 8 * static_cast<double>(std::numeric_limits<float>::epsilon()) *
                                         std::sqrt(static_cast<double>(layer.weights.inputs)) * magnitude
                                   : 0;
          if (!(std::abs(got - expected) <= bound))
            return check::fail(__FILE__, __LINE__,
                               what + ": output " + std::to_string(chunk.first_output + o) + ", lane " +
                                   std::to_string(lane) + ": expected " + std::to_string(expected) + ", got " +
                                   std::to_string(got));
        }
    }
  }
  CHECK_EQUAL(next_output, c.outputs);
}

bool are_integers(const std::vector<float>& levels) {
  return std::all_of(levels.begin(), levels.end(), [](float l) { return l == std::round(l); });
}

void test_sums() {
  for (const core::Isa isa : {core::Isa::avx2, core::Isa::avx512}) {
    const std::vector<core::Isa> supported = core::supported_isas();
    if (std::find(supported.begin(), supported.end(), isa) == supported.end()) continue;
    const bool avx512 = isa == core::Isa::avx512;
    int count = 0;
    for (const Case& c : cases) {
      const auto name = [&](const char* dtype, int64_t range) {
        return std::string(core::isa_name(isa)) + " " + dtype + " up to " + std::to_string(range) + ", " + c.name;
      };
      test_case<float>(c, DType::f32, 3, avx512, name("f32", 3));
      ++count;
      for (const auto& [dtype, range] : {std::pair(DType::i8, 8), {DType::i8, 128}, {DType::u8, 255}}) {
        if (!are_integers(c.levels)) continue;
        test_case<int16_t>(c, dtype, range, avx512, name(dtype == DType::i8 ? "i8" : "u8", range));
        ++count;
      }
    }
    std::printf("%-8s %d cases\n", core::isa_name(isa), count);
  }
}

// Outputs that do not fit the registers are cut evenly, and many chunks for two threads.
void test_chunks() {
  std::mt19937 random(5);
  for (const int64_t outputs : {29, 32, 64, 100}) {
    const Case c{"", outputs, 1, 2, 1, ternary};
    const Layer layer(c, random);
    const LayerCode code({&layer.weights, one_column(c), DType::f32, 0}, true);
    int64_t least = outputs, most = 0;
    for (const CodeChunk& chunk : code.chunks())
      least = std::min(least, chunk.outputs), most = std::max(most, chunk.outputs);
    CHECK((code.chunks().size() == 1) == (outputs == 29));
    CHECK(most - least <= 1 && (code.chunks().size() <= 8 || code.chunks().size() % 2 == 0));
  }
}

void test_errors() {
  std::mt19937 random(5);
  const Case case_large{"", 3, 1, 2, 1, {-129, 129}}, case_fraction{"", 3, 1, 2, 1, {-0.5, 0.5}};
  const Layer large(case_large, random), fraction(case_fraction, random);
  const Geometry geometry = one_column(case_large);
  const CodeLayer integers{&large.weights, geometry, DType::u8, 255};
  CHECK_THROWS(LayerCode(integers, true), std::invalid_argument, "fit 16 bits");
  CHECK(std::isinf(code_cost(integers, true).run));
  CHECK_THROWS(LayerCode({&fraction.weights, geometry, DType::i8, 128}, true), std::invalid_argument, "integers");
}

// Once it may be executed it may not be written, whether on small pages or on huge ones.
void test_executable_memory() {
  for (const size_t size : {size_t{1}, size_t{5000}, (size_t{2} << 20) / 4, size_t{3} << 20}) {
    const std::vector<uint8_t> bytes(size, 0xc3);
    const core::ExecutableMemory memory(bytes);
    CHECK_EQUAL(memory.size(), size);
    CHECK(std::memcmp(memory.data(), bytes.data(), size) == 0);
    for (const char* ret : {memory.data(), memory.data() + size - 1}) std::bit_cast<void (*)()>(ret)();

    const auto begin = std::bit_cast<uintptr_t>(memory.data());
    std::ifstream maps("/proc/self/maps");
    size_t found = 0;
    for (std::string line; std::getline(maps, line);) {
      uintptr_t first, last;
      char permissions[5];
      if (std::sscanf(line.c_str(), "%zx-%zx %4s", &first, &last, permissions) != 3) continue;
      CHECK(permissions[1] != 'w' || permissions[2] != 'x');
      if (last <= begin || first >= begin + size) continue;
      CHECK_EQUAL(std::string(permissions), "r-xp");
      found += std::min(last, begin + size) - std::max(first, begin);
    }
    CHECK_EQUAL(found, size);
  }
  CHECK_THROWS(core::ExecutableMemory({}), std::runtime_error, "mmap failed");
}

}  // namespace

int main() {
  if (!core::ExecutableMemory::available()) {
    std::printf("machine code cannot be executed here\n");
    return check::report();
  }
  test_executable_memory();
  test_sums();
  test_chunks();
  test_errors();
  return check::report();
}
