// The emulation that other tests stand on: products of fragments against plain products through the PTX manual's
// layouts, and that the faults it is there to find are found.
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "core/warp.cuh"

using namespace pycodesign::core;
using namespace pycodesign::core::cuda;

namespace {

// Row and column of element i of lane l, as the manual's sections on mma.m16n8k32 and mma.m16n8k16 give them.
struct Place {
  int row, column;
};
Place place_a8(int l, int i) {
  return {l / 4 + (i < 4 || (i >= 8 && i < 12) ? 0 : 8), l % 4 * 4 + (i & 3) + (i < 8 ? 0 : 16)};
}
Place place_b8(int l, int i) { return {l % 4 * 4 + (i & 3) + (i < 4 ? 0 : 16), l / 4}; }
Place place_a16(int l, int i) {
  return {l / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8), l % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Place place_b16(int l, int i) { return {l % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), l / 4}; }
Place place_c(int l, int i) { return {l / 4 + (i < 2 ? 0 : 8), l % 4 * 2 + (i & 1)}; }

template <class T> void multiply_kernel(const T* a, const T* b, float* c, int kind) {
  constexpr int K = 32 / sizeof(T), in_a = 16 / sizeof(T), in_b = 8 / sizeof(T);
  T as[in_a], bs[in_b];
  const int l = static_cast<int>(threadIdx.x);
  for (int i = 0; i < in_a; ++i) {
    const Place at = sizeof(T) == 1 ? place_a8(l, i) : place_a16(l, i);
    as[i] = a[at.row * K + at.column];
  }
  for (int i = 0; i < in_b; ++i) {
    const Place at = sizeof(T) == 1 ? place_b8(l, i) : place_b16(l, i);
    bs[i] = b[at.row * 8 + at.column];
  }
  uint32_t a_words[4], b_words[2];
  std::memcpy(a_words, as, 16);
  std::memcpy(b_words, bs, 8);
  float sums[4] = {1, 1, 1, 1};
  int32_t sums_i32[4] = {1, 1, 1, 1};
  if (kind == 0) multiply_s8(sums_i32, a_words, b_words[0], b_words[1]);
  else if (kind == 1) multiply_bf16(sums, a_words, b_words[0], b_words[1]);
  else multiply_f16(sums, a_words, b_words[0], b_words[1]);
  for (int i = 0; i < 4; ++i) {
    const Place at = place_c(l, i);
    c[at.row * 8 + at.column] = kind == 0 ? static_cast<float>(sums_i32[i]) : sums[i];
  }
}

template <class T> void test_multiply(int kind) {
  constexpr int K = 32 / sizeof(T);
  std::mt19937 random(3);
  std::vector<T> a(16 * K), b(K * 8);
  std::vector<float> a_values, b_values, c(16 * 8);
  const auto fill = [&](std::vector<T>& to, std::vector<float>& values) {
    for (T& element : to) {
      const int value = static_cast<int>(random() % 255) - 127;
      values.push_back(static_cast<float>(value));
      element = static_cast<T>(kind == 0   ? value
                               : kind == 1 ? to_bfloat16(static_cast<float>(value))
                                           : to_float16(static_cast<float>(value)));
    }
  };
  fill(a, a_values);
  fill(b, b_values);
  launch(multiply_kernel<T>, 1, 32, 0, nullptr, a.data(), b.data(), c.data(), kind);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float sum = 1;
      for (int k = 0; k < K; ++k)
        sum += a_values[static_cast<size_t>(row * K + k)] * b_values[static_cast<size_t>(k * 8 + column)];
      CHECK_EQUAL(c[static_cast<size_t>(row * 8 + column)], sum);
    }
}

void shift_kernel(const int* x, int* y, bool wait, bool meet) {  // y[i] = x[i + 1], around, through shared memory
  int* shared = shared_memory<int>();
  const unsigned i = threadIdx.x, count = blockDim.x;
  if (i % 4 == 0) copy_async(&shared[i], &x[i], true);
  copy_commit();
  if (wait) copy_wait<0>();
  if (meet) barrier();
  y[i] = shared[(i + 1) % count];
}

bool shifts(bool wait, bool meet) {
  alignas(16) int x[96], y[96];
  for (int i = 0; i < 96; ++i) x[i] = i;
  launch(shift_kernel, 1, 96, sizeof x, nullptr, x, y, wait, meet);
  for (int i = 0; i < 96; ++i)
    if (y[i] != (i + 1) % 96) return false;
  return true;
}

void transpose_kernel(uint32_t* out) {  // four 8x8 matrices of 16 bits, row r of matrix m holds 100 m + 8 r + column
  auto* shared = shared_memory<uint16_t>();
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32)
    shared[i] = static_cast<uint16_t>(i / 64 * 100 + i % 64);
  warp_barrier();
  uint32_t word[4];
  load_matrices(word, shared + threadIdx.x * 8);
  for (int m = 0; m < 4; ++m) out[threadIdx.x * 4 + static_cast<unsigned>(m)] = word[m];
}

void diverging_kernel(int fault) {
  if (fault == 0 && threadIdx.x == 40) return;
  if (fault == 1 && threadIdx.x == 40) warp_barrier();
  if (fault == 2) shared_memory<char>()[64] = 0;
  if (fault == 3 && threadIdx.x == 40) copy_async(shared_memory<char>() + 4, nullptr, false);
  if (fault == 4) __ldg(reinterpret_cast<const uint4*>(shared_memory<char>() + 8));
  uint32_t word[4];
  if (fault == 1) load_matrices(word, shared_memory<uint16_t>());
  barrier();
}

void test_faults() {
  CHECK(shifts(true, true));
  CHECK(!shifts(true, false));
  CHECK(!shifts(false, true));
  CHECK_THROWS(launch(diverging_kernel, 1, 64, 64, nullptr, 0), std::logic_error, "waits forever at barrier");
  CHECK_THROWS(launch(diverging_kernel, 1, 64, 64, nullptr, 1), std::logic_error, "of its warp at");
  CHECK_THROWS(launch(diverging_kernel, 1, 64, 64, nullptr, 2), std::logic_error, "outside the dynamic shared memory");
  CHECK_THROWS(launch(diverging_kernel, 1, 64, 64, nullptr, 3), std::logic_error, "aligned to 16");
  CHECK_THROWS(launch(diverging_kernel, 1, 64, 64, nullptr, 4), std::logic_error, "__ldg: expected an address");
  launch(diverging_kernel, dim3(2, 2), 64, 64, nullptr, 5);
}

void test_warp() {
  uint32_t words[128];
  launch(transpose_kernel, 1, 32, 512, nullptr, words);
  for (uint32_t i = 0; i < 128; ++i) {
    const uint32_t first = i % 4 * 100 + i / 4 * 2;
    CHECK_EQUAL(words[i], first | (first + 1) << 16);
  }
  CHECK_EQUAL(__byte_perm(0x33221100, 0x77665544, 0x7514), 0x77551144u);
  CHECK_EQUAL(__byte_perm(0x80000000, 0, 0xb), 0x000000ffu);
  CHECK_EQUAL(__dp4a(0x01ff02fe, 0x7f010102, -1), -1 + 127 - 1 + 2 - 4);
}

}  // namespace

int main() {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    emulated::set_seed(seed);
    test_multiply<int8_t>(0);
    test_multiply<uint16_t>(1);
    test_multiply<uint16_t>(2);
    test_faults();
    test_warp();
  }
  return check::report();
}
