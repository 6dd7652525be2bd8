// Expansion against its definition, element by element. Its worth is in the sanitizers: w and out are allocations of
// their own, and results beyond the caches take the streaming stores.
#include "growth/growth.h"

#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "core/half.h"
#include "core/thread_pool.h"

namespace core = pycodesign::core;
using namespace pycodesign::growth;

namespace {

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::bytes1: return 1;
    case DType::bytes2:
    case DType::f16:
    case DType::bf16: return 2;
    case DType::bytes4:
    case DType::f32: return 4;
    default: return 8;
  }
}

double read(DType dtype, const char* from) {
  uint16_t bits;
  float single;
  double value;
  switch (dtype) {
    case DType::f16: std::memcpy(&bits, from, 2); return core::from_float16(bits);
    case DType::bf16: std::memcpy(&bits, from, 2); return core::from_bfloat16(bits);
    case DType::f32: std::memcpy(&single, from, 4); return single;
    default: std::memcpy(&value, from, 8); return value;
  }
}

// The bytes of value * in_scale * out_scale.
void multiply(DType dtype, const char* value, double in_scale, double out_scale, char* to) {
  const double x = read(dtype, value);
  const float single = static_cast<float>(x) * static_cast<float>(in_scale) * static_cast<float>(out_scale);
  const double product = x * in_scale * out_scale;
  const uint16_t bits = dtype == DType::f16 ? core::to_float16(single) : core::to_bfloat16(single);
  if (dtype == DType::f32) {
    std::memcpy(to, &single, 4);
  } else if (dtype == DType::f64) {
    std::memcpy(to, &product, 8);
  } else {
    std::memcpy(to, &bits, 2);
  }
}

struct Case {
  std::array<int64_t, 4> shape;
  int64_t rows, columns;
  bool runs, strided;
};

std::vector<int64_t> make_index(int64_t old, int64_t size, bool runs, std::mt19937& random) {
  std::vector<int64_t> index;
  for (int64_t i = 0; i < size; ++i)
    index.push_back(runs ? (i + 3) % (old + 1) - 1 : static_cast<int64_t>(random() % static_cast<size_t>(old + 1)) - 1);
  return index;
}

template <class T> std::vector<T> make_scale(int64_t size, std::mt19937& random) {
  std::vector<T> scale;
  for (int64_t i = 0; i < size; ++i) scale.push_back(static_cast<T>(static_cast<int>(random() % 64) - 32) / 8);
  return scale;
}

// Elements of every dtype are random 16-bit patterns of small finite numbers.
std::vector<char> make_elements(DType dtype, int64_t count, std::mt19937& random) {
  std::vector<char> elements(static_cast<size_t>(count * size_of(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    char* to = elements.data() + i * size_of(dtype);
    const double value = (static_cast<int>(random() % 4096) - 2048) / 64.0;
    const float single = static_cast<float>(value);
    const uint16_t half = dtype == DType::bf16 ? core::to_bfloat16(single) : core::to_float16(single);
    switch (dtype) {
      case DType::f32: std::memcpy(to, &single, 4); break;
      case DType::f64: std::memcpy(to, &value, 8); break;
      default: std::memcpy(to, &half, static_cast<size_t>(std::min<int64_t>(2, size_of(dtype))));
    }
  }
  return elements;
}

void check_case(DType dtype, const Case& c, bool has_scales, std::mt19937& random) {
  const int64_t size = size_of(dtype), step = c.strided ? 2 : 1, inner = c.shape[2] * c.shape[3];
  const std::vector<char> w = make_elements(dtype, step * c.shape[0] * c.shape[1] * inner, random);
  const auto rows = make_index(c.shape[0], c.rows, c.runs, random);
  const auto columns = make_index(c.shape[1], c.columns, c.runs, random);
  const auto in32 = make_scale<float>(c.columns, random), out32 = make_scale<float>(c.rows, random);
  const std::vector<double> in64(in32.begin(), in32.end()), out64(out32.begin(), out32.end());
  std::vector<char> out(static_cast<size_t>(c.rows * c.columns * inner * size));
  Expansion x{dtype,          w.data(),  c.shape, {},      rows.data(), c.rows,
              columns.data(), c.columns, nullptr, nullptr, out.data(),  c.columns * inner * size};
  for (int64_t d = 4, stride = step * size; d-- > 0; stride *= c.shape[static_cast<size_t>(d)])
    x.stride[static_cast<size_t>(d)] = stride;
  const bool is_double = dtype == DType::f64;
  if (has_scales) {
    x.in_scale = is_double ? static_cast<const void*>(in64.data()) : in32.data();
    x.out_scale = is_double ? static_cast<const void*>(out64.data()) : out32.data();
  }
  expand(x);
  int64_t wrong = 0;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t q = 0; q < c.columns; ++q)
      for (int64_t i = 0; i < inner; ++i) {
        char expected[8] = {};
        const int64_t row = rows[static_cast<size_t>(r)], column = columns[static_cast<size_t>(q)];
        const char* got = out.data() + ((r * c.columns + q) * inner + i) * size;
        if (row >= 0 && column >= 0) {
          const char* from = w.data() + ((row * c.shape[1] + column) * inner + i) * step * size;
          if (has_scales) {
            multiply(dtype, from, in64[static_cast<size_t>(q)], out64[static_cast<size_t>(r)], expected);
          } else {
            std::memcpy(expected, from, static_cast<size_t>(size));
          }
          wrong += std::memcmp(got, expected, static_cast<size_t>(size)) != 0;
        } else {
          wrong += has_scales ? read(dtype, got) != 0 : std::memcmp(got, expected, static_cast<size_t>(size)) != 0;
        }
      }
  if (wrong)
    check::fail(__FILE__, __LINE__,
                std::to_string(wrong) + " elements of dtype " + std::to_string(static_cast<int>(dtype)) + " differ");
}

#if defined(__SANITIZE_THREAD__) || defined(EMULATED)
constexpr bool is_slow = true;  // some thirty times as slow: large cases with several threads, of two types
#else
constexpr bool is_slow = false;
#endif

void test_every_dtype() {
  std::mt19937 random(1);
  const std::string best = core::isa_name(core::supported_isas().back());
  const std::pair<std::string, int> settings[] = {{"scalar", 1}, {best, 1}, {best, 3}};
  const int64_t beyond = static_cast<int64_t>(std::min<size_t>(core::cache_sizes().l3, 48 << 20));
  for (const DType dtype :
       {DType::bytes1, DType::bytes2, DType::bytes4, DType::bytes8, DType::f16, DType::bf16, DType::f32, DType::f64}) {
    const int64_t many = beyond / 2 / size_of(dtype) / 1031 + 5;
    const Case cases[] = {{{1, 1, 1, 1}, 1, 1, false, false},        {{3, 5, 1, 1}, 7, 9, false, true},
                          {{4, 16, 1, 1}, 8, 17, false, false},      {{5, 17, 2, 3}, 11, 31, false, true},
                          {{9, 100, 1, 1}, 30, 257, true, false},    {{9, 100, 1, 1}, 30, 1057, false, false},
                          {{9, 40, 3, 1}, 30, 57, true, true},       {{2, 3, 0, 1}, 4, 4, false, false},
                          {{2, 3, 1, 1}, 0, 4, false, false},        {{70, 300, 1, 1}, many, 1031, false, false},
                          {{70, 300, 1, 1}, many, 1031, true, false}};
    const bool is_float = dtype >= DType::f16;
    for (const auto& [isa, threads] : settings) {
      core::set_isa(isa);
      core::set_num_threads(threads);
      const bool has_many = !is_slow || (threads > 1 && (dtype == DType::bytes1 || dtype == DType::bf16));
      for (const Case& c : cases)
        if (c.rows < many || has_many) check_case(dtype, c, is_float, random);
    }
  }
}

void test_half() {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    if (!std::isnan(core::from_float16(half))) CHECK_EQUAL(core::to_float16(core::from_float16(half)), half);
    if (!std::isnan(core::from_bfloat16(half))) CHECK_EQUAL(core::to_bfloat16(core::from_bfloat16(half)), half);
  }
  CHECK_EQUAL(core::from_float16(0x0001), 0x1p-24f);
  CHECK_EQUAL(core::from_float16(0x7bff), 65504.0f);
  CHECK_EQUAL(core::to_float16(65519.996f), 0x7bff);
  CHECK_EQUAL(core::to_float16(65520.0f), 0x7c00);
  CHECK_EQUAL(core::to_float16(0x1p-25f), 0);
  CHECK_EQUAL(core::to_float16(-0x1.8p-25f), 0x8001);
  CHECK(std::isnan(core::from_float16(core::to_float16(NAN))));
  CHECK(std::isnan(core::from_bfloat16(core::to_bfloat16(std::bit_cast<float>(0x7f800001)))));
}

void test_errors() {
  const float w[6] = {};
  float out[4] = {7, 7, 7, 7};
  const int64_t good[] = {0, -1}, above[] = {0, 3}, below[] = {-2, 0};
  Expansion x{DType::f32,
              reinterpret_cast<const char*>(w),
              {2, 3, 1, 1},
              {12, 4, 4, 4},
              good,
              2,
              good,
              2,
              nullptr,
              nullptr,
              reinterpret_cast<char*>(out),
              8};
  x.in_index = above;
  CHECK_THROWS(expand(x), std::invalid_argument, "in_index: expected indices from -1 to 2, got 3");
  x.in_index = good;
  x.out_index = below;
  CHECK_THROWS(expand(x), std::invalid_argument, "out_index: expected indices from -1 to 1, got -2");
  for (const float value : out) CHECK_EQUAL(value, 7.0f);
}

}  // namespace

int main() {
  test_every_dtype();
  test_half();
  test_errors();
  return check::report();
}
