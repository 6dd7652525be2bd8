#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "repetition/pairs.h"

using pycodesign::repetition::Pair;
using pycodesign::repetition::PairElimination;
using Rows = std::vector<std::vector<int32_t>>;

namespace {

Rows draw_rows(size_t count, int32_t inputs, uint32_t seed) {
  std::mt19937 random(seed);
  Rows rows(count);
  for (auto& row : rows)
    for (int32_t i = 0; i < inputs; ++i)
      if (const uint32_t weight = random() % 3; weight != 2) row.push_back(2 * i + static_cast<int32_t>(weight));
  return rows;
}

/// The coefficients of the inputs in each row.
Rows expand(const Rows& rows, const std::vector<Pair>& pairs, int32_t inputs) {
  Rows variables;
  for (int32_t i = 0; i < inputs; ++i) {
    variables.emplace_back(inputs);
    variables.back()[i] = 1;
  }
  for (const Pair& pair : pairs) {
    std::vector<int32_t> sum = variables.at(pair.u);
    for (int32_t i = 0; i < inputs; ++i) sum[i] += (pair.differ ? -1 : 1) * variables.at(pair.v)[i];
    variables.push_back(sum);
  }
  Rows sums;
  for (const auto& row : rows) {
    sums.emplace_back(inputs);
    for (int32_t t : row)
      for (int32_t i = 0; i < inputs; ++i) sums.back()[i] += (t & 1 ? -1 : 1) * variables.at(t >> 1)[i];
  }
  return sums;
}

void test_sums_stay() {
  for (size_t count : {0, 1, 2, 63, 64, 65, 130})
    for (int32_t inputs : {0, 1, 2, 17})
      for (uint64_t seed : {0, 1, 2}) {
        const Rows rows = draw_rows(count, inputs, static_cast<uint32_t>(count));
        const PairElimination untouched(rows, inputs, seed);
        PairElimination done(rows, inputs, seed);
        while (done.run(5)) {
        }
        CHECK(expand(done.rows(), done.pairs(), inputs) == expand(rows, {}, inputs));
        CHECK(done.additions() <= untouched.additions());
      }
}

void test_by_hand() {
  // x0 + x1 thrice up to sign, then x2 - (x0 + x1) twice.
  PairElimination elimination({{0, 2, 4}, {1, 3, 4}, {0, 2, 5}, {0, 4}}, 3, 0);
  CHECK_EQUAL(elimination.additions(), 7U);
  CHECK(elimination.run(1));
  CHECK_EQUAL(elimination.additions(), 5U);
  CHECK(elimination.run(1));
  CHECK(!elimination.run(1));
  CHECK_EQUAL(elimination.additions(), 4U);
  CHECK((elimination.rows() == Rows{{4, 6}, {8}, {9}, {0, 4}}));
}

}  // namespace

int main() {
  test_sums_stay();
  test_by_hand();
  return check::report();
}
