// Programs of random sums as machine code against the same in integers, on every vector length that the processor has.
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "repetition/program_code.h"

using namespace pycodesign;
using namespace pycodesign::repetition;

namespace {

constexpr int32_t inputs = 40, outputs = 30, instructions = 500;
constexpr int64_t vectors = 3;

struct Random {
  std::vector<uint8_t> op;
  std::vector<int32_t> left, right, values;
  const std::vector<double> constants{-3, 2, 5};

  explicit Random(uint32_t seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int32_t end) { return static_cast<int32_t>(random() % static_cast<uint32_t>(end)); };
    for (int32_t k = 0; k < instructions; ++k) {
      op.push_back(static_cast<uint8_t>(draw(3)));
      left.push_back(draw(inputs + k + 1) - 1);
      right.push_back(op.back() == Program::multiply ? draw(3) : draw(inputs + k + 1) - 1);
    }
    for (int32_t o = 0; o < outputs; ++o) values.push_back(inputs + instructions - 1 - draw(instructions));
  }
  Program program() const { return {inputs, op, left, right, values, constants}; }

  // Modulo 2^32, as the lanes.
  std::vector<uint32_t> evaluate(const std::vector<uint32_t>& x) const {
    std::vector<uint32_t> all{0};
    all.insert(all.end(), x.begin(), x.end());
    for (size_t k = 0; k < op.size(); ++k) {
      const uint32_t a = all[static_cast<size_t>(left[k] + 1)];
      if (op[k] == Program::multiply) {
        all.push_back(a * static_cast<uint32_t>(static_cast<int32_t>(constants[static_cast<size_t>(right[k])])));
      } else {
        const uint32_t b = all[static_cast<size_t>(right[k] + 1)];
        all.push_back(op[k] == Program::add ? a + b : a - b);
      }
    }
    std::vector<uint32_t> y;
    for (const int32_t value : values) y.push_back(all[static_cast<size_t>(value + 1)]);
    return y;
  }
};

void test_integers(bool avx512) {
  int64_t slots = 0;
  for (uint32_t seed = 0; seed < 10; ++seed) {
    const Random random(seed);
    const ProgramCode code(random.program(), DType::i32, avx512);
    const int64_t lanes = code.vector_bytes() / 4;
    CHECK_EQUAL(lanes, avx512 ? 16 : 8);
    slots += code.counts().slots;
    std::vector<uint32_t> x(static_cast<size_t>(vectors * inputs * lanes)),
        guarded(static_cast<size_t>(vectors * outputs * lanes + 2), 7);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint32_t>(i * 2654435761U);
    code.run(reinterpret_cast<const char*>(x.data()), reinterpret_cast<char*>(guarded.data() + 1), vectors);
    CHECK_EQUAL(guarded.front(), 7U);
    CHECK_EQUAL(guarded.back(), 7U);
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        std::vector<uint32_t> column;
        for (int64_t i = 0; i < inputs; ++i) column.push_back(x[static_cast<size_t>((v * inputs + i) * lanes + lane)]);
        const std::vector<uint32_t> y = random.evaluate(column);
        for (int64_t o = 0; o < outputs; ++o)
          CHECK_EQUAL(guarded[static_cast<size_t>((v * outputs + o) * lanes + lane + 1)], y[static_cast<size_t>(o)]);
      }
  }
  CHECK(slots > 0);
}

// The same program takes the same registers whatever the lanes; f32 has one fewer.
void test_counts() {
  const Random random(0);
  for (const bool avx512 : {false, true}) {
    const ProgramCode integers(random.program(), DType::i32, avx512), floats(random.program(), DType::f32, avx512);
    CHECK_EQUAL(integers.counts().operations, floats.counts().operations);
    CHECK(integers.counts().loads <= floats.counts().loads);
    CHECK(integers.counts().stores >= outputs);
  }
}

}  // namespace

int main() {
  if (!core::ExecutableMemory::available()) return check::report();
  test_counts();
  const core::Isa best = core::supported_isas().back();
  if (best >= core::Isa::avx2) test_integers(false);
  if (best >= core::Isa::avx512) test_integers(true);
  return check::report();
}
