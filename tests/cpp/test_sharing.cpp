// Deltas against their definition, and against themselves: alone, among others, on other numbers of threads and rows.
// x, base and z are allocations of their own, for the sanitizers.
#include "sharing/sharing.h"

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/cpu.h"
#include "core/half.h"
#include "core/thread_pool.h"

namespace core = pycodesign::core;
using namespace pycodesign::sharing;

namespace {

using Floats = std::vector<float>;

Floats draw(int64_t count, std::mt19937& random) {
  Floats values;
  for (int64_t i = 0; i < count; ++i)
    values.push_back(static_cast<float>(static_cast<int>(random() % 4096) - 2048) / 1024);
  return values;
}

float stored(float value, Storage storage) {
  return storage == Storage::f32 ? value : core::from_bfloat16(core::to_bfloat16(value));
}

// A task and what it is made of, as doubles: w (O, I), or a (r, I) and b (O, r).
struct Task {
  DeltaPointer delta;
  std::vector<double> w, a, b;
  Floats bias;
  int64_t rank = 0;
};

Task make_task(Kind kind, int64_t O, int64_t I, double density, bool has_bias, Storage storage, std::mt19937& random) {
  Task task;
  if (has_bias) task.bias = draw(O, random);
  const float* bias = has_bias ? task.bias.data() : nullptr;
  const auto keep = [&](const Floats& values, std::vector<double>& to) {
    for (const float v : values) to.push_back(stored(v, storage));
  };
  if (kind == Kind::none) {
    task.delta = pack_none(O, I, bias);
  } else if (kind == Kind::low_rank) {
    task.rank = 1 + static_cast<int64_t>(random() % 40);
    const Floats b = draw(O * task.rank, random), a = draw(task.rank * I, random);
    task.delta = pack_low_rank(O, I, task.rank, b.data(), a.data(), bias, storage);
    keep(b, task.b);
    keep(a, task.a);
  } else if (kind == Kind::dense) {
    const Floats w = draw(O * I, random);
    task.delta = pack_dense(O, I, w.data(), bias, storage);
    keep(w, task.w);
  } else {
    std::vector<int32_t> row, column;
    Floats value, w(static_cast<size_t>(O * I));
    for (int64_t o = 0; o < O; ++o)
      for (int64_t i = 0; i < I; ++i)
        if (static_cast<double>(random() % 10000) < 10000 * density) {
          row.push_back(static_cast<int32_t>(o));
          column.push_back(static_cast<int32_t>(i));
          value.push_back(draw(1, random)[0]);
          w[static_cast<size_t>(o * I + i)] = value.back();
        }
    const Entries entries{static_cast<int64_t>(row.size()), row.data(), column.data(), value.data()};
    task.delta = pack_sparse(O, I, entries, bias, storage);
    CHECK_EQUAL(task.delta->entries, entries.count);
    keep(w, task.w);
  }
  CHECK(task.delta->kind == kind);
  return task;
}

// One output by its definition, and the sum of magnitudes that its error is relative to.
struct Exact {
  double value = 0, magnitude = 0;

  void add(double term, double size) {
    value += term;
    magnitude += size;
  }
  void add(double term) { add(term, std::fabs(term)); }
};

// All outputs (O) of one row of x (I) and of base (O).
std::vector<Exact> define(const Task& task, int64_t O, int64_t I, const float* x, const float* base) {
  std::vector<Exact> low(static_cast<size_t>(task.rank)), outputs(static_cast<size_t>(O));
  for (int64_t r = 0; r < task.rank; ++r)
    for (int64_t i = 0; i < I; ++i) low[static_cast<size_t>(r)].add(task.a[static_cast<size_t>(r * I + i)] * x[i]);
  for (int64_t o = 0; o < O; ++o) {
    Exact& exact = outputs[static_cast<size_t>(o)];
    if (base) exact.add(base[o]);
    if (!task.bias.empty()) exact.add(task.bias[static_cast<size_t>(o)]);
    for (int64_t i = 0; i < I && !task.w.empty(); ++i) exact.add(task.w[static_cast<size_t>(o * I + i)] * x[i]);
    for (int64_t r = 0; r < task.rank; ++r) {
      const double b = task.b[static_cast<size_t>(o * task.rank + r)];
      const Exact& sum = low[static_cast<size_t>(r)];
      exact.add(b * sum.value, std::fabs(b) * sum.magnitude);
    }
  }
  return outputs;
}

// z (N, T, O) of a call in which rows are `padding` elements further apart than they need be.
Floats run(const std::vector<DeltaPointer>& tasks, int64_t T, const Floats& x, bool own_x, const Floats& base,
           bool own_base, int64_t padding) {
  const int64_t O = tasks[0]->outputs, I = tasks[0]->inputs, N = static_cast<int64_t>(tasks.size());
  const int64_t row = O + padding;
  constexpr float guard = 12345;
  std::vector<float> z(static_cast<size_t>(N * T * row), guard);
  delta_linear({tasks, T, x.data(), own_x ? T * I : 0, I, base.empty() ? nullptr : base.data(), own_base ? T * O : 0, O,
                z.data(), T * row, row});
  Floats dense;
  for (int64_t t = 0; t < N * T; ++t) {
    dense.insert(dense.end(), z.begin() + t * row, z.begin() + t * row + O);
    for (int64_t i = O; i < row; ++i) CHECK_EQUAL(z[static_cast<size_t>(t * row + i)], guard);
  }
  return dense;
}

bool equal_bits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) return false;
  return true;
}

struct Case {
  int64_t O, I, T;
  double density;
  bool own_x, has_base, own_base;
};

// Tasks of every kind, what they are called with, and what must come out.
struct Reference {
  const Case& c;
  std::vector<Task> tasks;
  std::vector<DeltaPointer> deltas;
  Floats x, base;
  std::vector<Exact> z;

  Reference(const Case& c_, Storage storage, std::mt19937& random) : c(c_) {
    for (const Kind kind : {Kind::sparse, Kind::low_rank, Kind::none, Kind::dense, Kind::sparse, Kind::low_rank}) {
      tasks.push_back(make_task(kind, c.O, c.I, c.density, tasks.size() > 0 && tasks.size() < 5, storage, random));
      deltas.push_back(tasks.back().delta);
    }
    const auto N = static_cast<int64_t>(tasks.size());
    x = draw((c.own_x ? N : 1) * c.T * c.I, random);
    if (c.has_base) base = draw((c.own_base ? N : 1) * c.T * c.O, random);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t t = 0; t < c.T; ++t) {
        const float* from = c.has_base ? base.data() + ((c.own_base ? n * c.T : 0) + t) * c.O : nullptr;
        const std::vector<Exact> row =
            define(tasks[static_cast<size_t>(n)], c.O, c.I, x.data() + ((c.own_x ? n * c.T : 0) + t) * c.I, from);
        z.insert(z.end(), row.begin(), row.end());
      }
  }

  void check() const {
    const auto N = static_cast<int64_t>(tasks.size());
    const Floats got = run(deltas, c.T, x, c.own_x, base, c.own_base, 3);
    int64_t wrong = 0;
    for (size_t i = 0; i < z.size(); ++i) {
      const int64_t terms = c.I + tasks[i / static_cast<size_t>(c.T * c.O)].rank + 4;
      const double bound = std::numeric_limits<float>::epsilon() * static_cast<double>(terms) * z[i].magnitude;
      wrong += !(std::fabs(got[i] - z[i].value) <= bound);
    }
    if (wrong)
      check::fail(__FILE__, __LINE__,
                  std::to_string(wrong) + " outputs differ: " + std::to_string(c.O) + "x" + std::to_string(c.I) + ", " +
                      std::to_string(c.T) + " tokens");
    // Alone, in another order, and each row alone: the same bits.
    const auto own = [](const Floats& all, int64_t size, bool is_own, int64_t n) {
      return is_own ? Floats(all.begin() + n * size, all.begin() + (n + 1) * size) : all;
    };
    for (int64_t n = 0; n < N; ++n) {
      const float* expected = got.data() + n * c.T * c.O;
      const Floats own_x = own(x, c.T * c.I, c.own_x, n);
      const Floats own_base = base.empty() ? base : own(base, c.T * c.O, c.own_base, n);
      const Floats alone = run({deltas[static_cast<size_t>(n)]}, c.T, own_x, false, own_base, false, 0);
      CHECK(equal_bits(alone.data(), expected, c.T * c.O));
      for (int64_t t = 0; t < c.T; t += 7) {
        const Floats x_row(own_x.begin() + t * c.I, own_x.begin() + (t + 1) * c.I);
        Floats base_row = own_base;
        if (!base.empty()) base_row = {own_base.begin() + t * c.O, own_base.begin() + (t + 1) * c.O};
        const Floats row = run({deltas[static_cast<size_t>(n)]}, 1, x_row, false, base_row, false, 0);
        CHECK(equal_bits(row.data(), expected + t * c.O, c.O));
      }
    }
    if (!c.own_x && !c.own_base) {
      const Floats reversed = run({deltas.rbegin(), deltas.rend()}, c.T, x, false, base, false, 1);
      for (int64_t n = 0; n < N; ++n)
        CHECK(equal_bits(reversed.data() + (N - 1 - n) * c.T * c.O, got.data() + n * c.T * c.O, c.T * c.O));
    }
    const int threads = core::num_threads();
    for (const int other : {1, 2, 5}) {
      core::set_num_threads(other);
      const Floats again = run(deltas, c.T, x, c.own_x, base, c.own_base, 0);
      CHECK(equal_bits(again.data(), got.data(), N * c.T * c.O));
    }
    core::set_num_threads(threads);
  }
};

void test_every_isa() {
  std::mt19937 random(1);
  const Case cases[] = {{1, 1, 1, 1.0, false, true, false},       {3, 5, 2, 0.5, false, false, false},
                        {64, 16, 3, 0.3, false, true, false},     {65, 17, 16, 0.2, true, true, false},
                        {15, 31, 17, 0.9, false, true, true},     {130, 33, 33, 0.1, true, true, true},
                        {128, 100, 64, 0.02, false, true, false}, {79, 257, 65, 0.05, false, false, false},
                        {200, 48, 130, 0.1, false, true, false},  {16, 300, 5, 0.0, true, false, false},
                        {600, 40, 67, 0.2, false, true, false}};
  for (const Storage storage : {Storage::f32, Storage::bf16})
    for (const Case& c : cases) {
      const Reference reference(c, storage, random);
      for (const core::Isa isa : check::isas())
        for (const int threads : check::threads({1, 3})) {
          core::set_isa(core::isa_name(isa));
          core::set_num_threads(threads);
          reference.check();
        }
    }
  core::set_isa(core::isa_name(core::supported_isas().back()));
}

// An infinity is seen by the outputs that read it, and by no others.
void test_infinity() {
  const int32_t row[] = {0, 1, 1}, column[] = {1, 0, 2};
  const float value[] = {1, 1, 1};
  const auto delta = pack_sparse(3, 3, {3, row, column, value}, nullptr, Storage::f32);
  for (const int64_t T : {1, 3, 20}) {
    Floats x(static_cast<size_t>(3 * T), std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < T; ++t) x[static_cast<size_t>(3 * t + 1)] = 5;
    const Floats z = run({delta}, T, x, false, {}, false, 0);
    for (int64_t t = 0; t < T; ++t) {
      CHECK_EQUAL(z[static_cast<size_t>(3 * t)], 5.0f);
      CHECK(std::isinf(z[static_cast<size_t>(3 * t + 1)]));
      CHECK_EQUAL(z[static_cast<size_t>(3 * t + 2)], 0.0f);
    }
  }
}

void test_errors() {
  const int32_t row[] = {0, 1}, column[] = {1, 0}, above[] = {1, 3}, below[] = {-1, 0}, descending[] = {1, 0};
  const float value[] = {1, 1};
  const auto pack = [&](const int32_t* r, const int32_t* c) {
    return pack_sparse(2, 3, {2, r, c, value}, nullptr, Storage::f32);
  };
  CHECK_EQUAL(pack(row, column)->entries, 2);
  CHECK_THROWS(pack(row, above), std::invalid_argument, "deltas: expected indices within (2, 3), got (1, 3)");
  CHECK_THROWS(pack(row, below), std::invalid_argument, "deltas: expected indices within (2, 3), got (0, -1)");
  CHECK_THROWS(pack(descending, column), std::invalid_argument, "deltas: expected entries in ascending order");
  const int32_t same[] = {1, 1};
  CHECK_THROWS(pack(same, same), std::invalid_argument, "deltas: expected entries in ascending order");
  CHECK_THROWS(pack_none(0, 3, nullptr), std::invalid_argument, "expected at least one output and one input");
  CHECK_THROWS(pack_low_rank(2, 3, 0, value, value, nullptr, Storage::f32), std::invalid_argument, "rank");
  CHECK_THROWS(pack_sparse(2, most_inputs + 1, {0, row, column, value}, nullptr, Storage::f32), std::invalid_argument,
               "at most 65535 inputs");
}

}  // namespace

int main() {
  test_every_isa();
  test_infinity();
  test_errors();
  return check::report();
}
