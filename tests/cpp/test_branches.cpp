// Plans with delays in all places, so that a wait that is missing shows as a wrong result; the sanitizers see the rest.
// `test_branches N` counts N forks and joins instead of some thousands.
#include <dlfcn.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "branches/branches.h"
#include "check.h"
#include "core/affinity.h"
#include "core/cpu.h"
#include "core/thread_pool.h"
#include "repetition/chain.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif

namespace {
std::atomic<int64_t> allocations = 0;
}

#if !defined(SANITIZED)
void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void* operator new(size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto unit = static_cast<size_t>(alignment);
  if (void* memory = std::aligned_alloc(unit, (size + unit - 1) / unit * unit)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
#endif

namespace core = pycodesign::core;
using namespace pycodesign::branches;

namespace {

int cores() { return core::available_cores(); }

// Nothing most of the time, a nap or a busy wait now and then.
void delay(std::mt19937& random, int one_in) {
  if (random() % static_cast<unsigned>(one_in)) return;
  const auto time = std::chrono::microseconds(random() % 60);
  if (random() % 2) return std::this_thread::sleep_for(time);
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) continue;
}

// Tasks whose values depend on those that they come after; written without any synchronization of their own.
class Network {
 public:
  Network(std::vector<Task> tasks, int teams, uint64_t seed)
      : tasks_(std::move(tasks)), plan_(tasks_, teams), values_(tasks_.size()), runs_(tasks_.size()) {
    for (size_t i = 0; i < tasks_.size(); ++i) random_.emplace_back(static_cast<unsigned>(seed + i));
  }

  static Network random(int count, int teams, uint64_t seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    std::vector<Task> tasks;
    for (int i = 0; i < count; ++i) {
      Task task{static_cast<int>(random() % static_cast<unsigned>(teams)), random() % 4 ? 1 : teams, {}};
      for (int b = 0; b < i; ++b)
        if (random() % 4 == 0) task.after.push_back(b);
      tasks.push_back(task);
    }
    return Network(std::move(tasks), teams, seed);
  }

  void run(uint64_t input, const Options& options, int one_in) {
    plan_.run([&](int task) { compute(static_cast<size_t>(task), input, one_in); }, options);
    for (size_t i = 0; i < tasks_.size(); ++i) {
      CHECK_EQUAL(runs_[i], 1);
      runs_[i] = 0;
      CHECK_EQUAL(values_[i], expected(i, input));
    }
  }

  Plan& plan() { return plan_; }

 private:
  static uint64_t mix(uint64_t sum, uint64_t value) { return (sum ^ value) * 0x9e3779b97f4a7c15; }

  uint64_t combine(size_t task, uint64_t input, const std::vector<uint64_t>& values) const {
    uint64_t sum = mix(input, task);
    for (const int b : tasks_[task].after) sum = mix(sum, values[static_cast<size_t>(b)]);
    return sum;
  }

  uint64_t expected(size_t task, uint64_t input) const { return combine(task, input, values_); }

  void compute(size_t task, uint64_t input, int one_in) {
    delay(random_[task], one_in);
    if (tasks_[task].threads > 1) {
      std::vector<std::atomic<int>> chunks(7);
      core::parallel_for(7, [&](int64_t chunk, int slot) {
        CHECK(slot < tasks_[task].threads);
        ++chunks[static_cast<size_t>(chunk)];
      });
      for (const auto& count : chunks) CHECK_EQUAL(count.load(), 1);
    }
    ++runs_[task];
    values_[task] = combine(task, input, values_);
    delay(random_[task], one_in);
  }

  std::vector<Task> tasks_;
  Plan plan_;
  std::vector<uint64_t> values_;
  std::vector<int> runs_;
  std::vector<std::mt19937> random_;
};

std::vector<Options> all_options() {
  std::vector<Options> all;
  for (const int spin : {0, 3, 1000})
    for (const int patience : {0, 5, 200})
      for (const bool pin : {false, true})
        all.push_back({std::chrono::microseconds(spin), std::chrono::microseconds(patience), pin});
  return all;
}

void test_random_networks() {
  for (int teams = 1; teams <= std::min(cores(), 4); ++teams)
    for (const int count : {0, 1, 2, 7, 20}) {
      uint64_t seed = static_cast<uint64_t>(count * 10 + teams);
      for (const Options& options : all_options()) {
        Network network = Network::random(count, teams, ++seed);
        for (uint64_t run = 0; run < 20; ++run) network.run(run, options, 8);
      }
    }
}

// Forks to two teams and joins, again and again, in one plan.
Network ladder(int steps) {
  std::vector<Task> tasks;
  for (int i = 0; i < steps; ++i) {
    const int last = static_cast<int>(tasks.size()) - 1;
    tasks.push_back({0, 1, i ? std::vector<int>{last} : std::vector<int>{}});
    tasks.push_back({1, 1, {last + 1}});
    tasks.push_back({0, 1, {last + 1}});
    tasks.push_back({0, 1, {last + 2, last + 3}});
  }
  return Network(std::move(tasks), 2, 1);
}

void test_forks_and_joins(int64_t count) {
  if (cores() < 2) return;
  constexpr int steps = 50;
  Network network = ladder(steps);
  const std::vector<Options> options = all_options();
  for (int64_t i = 0; i < count; i += steps)
    network.run(static_cast<uint64_t>(i), options[static_cast<size_t>(i / steps) % options.size()], 200);
  Network fork({{0, 1, {}}, {1, 1, {}}}, 2, 3);
  for (int64_t i = 0; i < count / 10; ++i)
    fork.run(static_cast<uint64_t>(i), options[static_cast<size_t>(i) % options.size()], 200);
  std::printf("%lld forks and joins within plans, %lld runs\n", static_cast<long long>(count),
              static_cast<long long>(count / 10));
}

void test_waits() {
  if (cores() < 2) return;
  // Team 1's second task knows by its first that team 0's first is done.
  CHECK_EQUAL(Plan({{0, 1, {}}, {1, 1, {0}}, {1, 1, {0}}}, 2).waits(), 1);
  // By way of another team's task.
  CHECK_EQUAL(Plan({{0, 1, {}}, {1, 1, {0}}, {0, 1, {1}}, {1, 1, {0, 2}}}, 2).waits(), 3);
  CHECK_EQUAL(Plan({{0, 1, {}}, {0, 1, {0}}, {0, 1, {1, 0}}}, 1).waits(), 0);
}

void test_errors() {
  CHECK_THROWS(Plan({}, 0), std::invalid_argument, "teams: expected at least 1, got 0");
  CHECK_THROWS(Plan({}, cores() + 1), std::invalid_argument, "the cores that this process may use, got");
  CHECK_THROWS(Plan({{1, 1, {}}}, 1), std::invalid_argument, "team: expected 0 to 0, got 1");
  CHECK_THROWS(Plan({{-1, 1, {}}}, 1), std::invalid_argument, "team: expected 0 to 0, got -1");
  CHECK_THROWS(Plan({{0, 0, {}}}, 1), std::invalid_argument, "threads: expected at least 1, got 0");
  CHECK_THROWS(Plan({{0, 1, {1}}}, 1), std::invalid_argument, "after: expected tasks from 0 to 0, got 1");
  CHECK_THROWS(Plan({{0, 1, {-1}}}, 1), std::invalid_argument, "got -1");
  CHECK_THROWS(Plan({{0, 1, {0}}}, 1), std::invalid_argument, "after: expected no cycle, got 0 -> 0");
  CHECK_THROWS(Plan({{0, 1, {2}}, {0, 1, {}}, {0, 1, {}}}, 1), std::invalid_argument, "no cycle, got ");
  CHECK_THROWS(Plan({{0, 1, {}}, {0, 1, {2}}, {0, 1, {3}}, {0, 1, {1}}}, 1), std::invalid_argument, "no cycle, got ");
}

void test_exceptions() {
  for (int teams = 1; teams <= std::min(cores(), 3); ++teams)
    for (const Options& options : all_options())
      for (int culprit = 0; culprit < 6; ++culprit) {
        std::vector<Task> tasks;
        for (int i = 0; i < 6; ++i)
          tasks.push_back({i % teams, 1, i > 1 ? std::vector<int>{i - 2} : std::vector<int>{}});
        Plan plan(tasks, teams);
        std::atomic<int> running = 0;
        bool fails = true;
        const auto body = [&](int task) {
          ++running;
          if (task == culprit && fails) {
            --running;
            throw std::runtime_error("task " + std::to_string(task));
          }
          --running;
        };
        for (int repeat = 0; repeat < 3; ++repeat) {
          CHECK_THROWS(plan.run(body, options), std::runtime_error, "task " + std::to_string(culprit));
          CHECK_EQUAL(running.load(), 0);
        }
        fails = false;
        plan.run(body, options);
      }
  if (cores() < 2) return;
  Plan all({{0, 2, {}}, {1, 2, {}}}, 2);
  const auto throw_in_loop = [](int) { core::parallel_for(4, [](int64_t, int) { throw std::runtime_error("loop"); }); };
  CHECK_THROWS(all.run(throw_in_loop), std::runtime_error, "loop");
}

void test_threads_within_tasks() {
  const auto threads_are = [](int expected) { return [expected](int) { CHECK_EQUAL(core::num_threads(), expected); }; };
  core::set_num_threads(3);
  Plan({{0, 2, {}}}, 1).run(threads_are(2));
  if (cores() >= 2) {
    Plan({{0, 1, {}}, {1, 1, {}}}, 2).run(threads_are(1));
    Plan({{0, 2, {}}, {1, 2, {}}}, 2).run(threads_are(2));
    // The idle team takes part in the loop.
    Plan shared({{0, 2, {}}}, 2);
    std::atomic<int> others = 0;
    for (int repeat = 0; repeat < 50 && others == 0; ++repeat)
      shared.run([&](int) {
        const auto caller = std::this_thread::get_id();
        core::parallel_for(20, [&](int64_t, int) {
          std::this_thread::sleep_for(std::chrono::microseconds(100));
          others += std::this_thread::get_id() != caller;
        });
      });
    CHECK(others > 0);
  }
  CHECK_EQUAL(core::num_threads(), 3);
}

cpu_set_t affinity() {
  cpu_set_t set;
  CHECK_EQUAL(sched_getaffinity(0, sizeof set, &set), 0);
  return set;
}

void test_cores() {
  if (cores() < 2) return;
  const cpu_set_t before = affinity();
  Plan plan({{0, 1, {}}, {1, 1, {}}}, 2);
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::vector<cpu_set_t> sets(2);
    // Both wait for the other, so that no team does the work of both.
    std::atomic<int> arrived = 0;
    Options options;
    options.patience = std::chrono::seconds(10);
    plan.run(
        [&](int task) {
          sets[static_cast<size_t>(task)] = affinity();
          ++arrived;
          while (arrived < 2) std::this_thread::yield();
        },
        options);
    cpu_set_t both;
    for (const cpu_set_t& set : sets) {
      CHECK_EQUAL(CPU_COUNT(&set), 1);
      CPU_AND(&both, &set, &before);
      CHECK(CPU_EQUAL(&both, &set));
    }
    CPU_AND(&both, &sets[0], &sets[1]);
    CHECK_EQUAL(CPU_COUNT(&both), 0);
    const cpu_set_t after = affinity();
    CHECK(CPU_EQUAL(&before, &after));
  }
  bool left = false;
  for (int attempt = 0; attempt < 1000 && !left; ++attempt) {  // the system may move it at any time
    const int here = sched_getcpu();
    core::leave_core(here);
    left = sched_getcpu() != here;
  }
  CHECK(left);
  core::leave_core(-1);
  core::leave_core(CPU_SETSIZE);
  const cpu_set_t after = affinity();
  CHECK(CPU_EQUAL(&before, &after));
  const core::CoreChoice none(CPU_COUNT(&before) + 1);
  CHECK_EQUAL(none.of(0), -1);
  const core::CoreChoice two(2);
  CHECK(two.of(0) >= 0 && two.of(1) >= 0 && two.of(0) != two.of(1));
  CHECK_EQUAL(two.of(2), -1);
}

void test_nested_and_concurrent() {
  if (cores() < 2) return;
  Plan inner({{0, 1, {}}, {1, 1, {}}, {0, 1, {1}}}, 2), outer({{0, 1, {}}, {1, 1, {}}}, 2);
  std::atomic<int> runs = 0;
  outer.run([&](int task) {
    if (task == 0) inner.run([&](int) { ++runs; });
  });
  CHECK_EQUAL(runs.load(), 3);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 100; ++repeat) inner.run([&](int) { ++runs; });
    });
  for (std::thread& caller : callers) caller.join();
  CHECK_EQUAL(runs.load(), 3 + 4 * 100 * 3);
}

#if !defined(SANITIZED)
namespace repetition = pycodesign::repetition;

// A chain of two convolutions, an add and poolings, with its arrays.
struct Branch {
  static constexpr int64_t channels = 32;  // enough for `dense` by rows of channels
  std::vector<uint8_t> codes = std::vector<uint8_t>(channels * channels * 9);
  std::vector<float> levels{-1, 0, 1}, scale = std::vector<float>(channels, 0.1f);
  std::vector<char> x = std::vector<char>(channels * 14 * 14 * 4), y = std::vector<char>(channels * 7 * 7 * 4);
  std::shared_ptr<repetition::Chain> chain = std::make_shared<repetition::Chain>();
  std::unique_ptr<repetition::BoundChain> bound;

  explicit Branch(repetition::Algorithm algorithm) {
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 7 % 11 % 3);
    const repetition::Weights weights{channels, channels * 9, codes.data(), levels.data(), 1, 3, scale.data(),
                                      1,        nullptr};
    const repetition::Geometry geometry{channels, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}};
    const auto layer =
        std::make_shared<repetition::PackedConv2d>(weights, geometry, repetition::Activations{}, algorithm);
    repetition::Epilogue e;
    e.acc_dtype = e.out_dtype = repetition::DType::f32;
    const int in = chain->add_input(repetition::DType::f32);
    const int first = chain->add_conv2d(layer, in, -1, e), second = chain->add_conv2d(layer, first, first, e);
    const int sum = chain->add_add(second, first, 1, 0, e);
    const repetition::Pool pool{{2, 2}, {2, 2}, {0, 0}, {1, 1}, true};
    const int most = chain->add_max_pool2d(sum, {{3, 3}, {1, 1}, {1, 1}, {1, 1}, true});
    chain->set_outputs({chain->add_avg_pool2d(most, pool, 1, 0, e)});
    const core::Crew one{1};
    const core::CrewScope scope(one);
    bound =
        std::make_unique<repetition::BoundChain>(chain, std::vector<repetition::Chain::Shape>{{1, channels, 14, 14}});
    bound->set_input(0, {x.data(), {1, channels, 14, 14}, {channels * 14 * 14 * 4, 14 * 14 * 4, 14 * 4, 4}});
    bound->set_output(0, {y.data(), {1, channels, 7, 7}, {channels * 7 * 7 * 4, 7 * 7 * 4, 7 * 4, 4}});
  }
};

// The kernel ends the process when the calling thread makes any system call but write. False where it cannot.
[[maybe_unused]] bool forbid_system_calls() {
  sock_filter steps[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_write, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
  };
  const sock_fprog program{4, steps};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// With native bodies a run makes no system call.
void test_no_system_call() {
#if !defined(EMULATED)
  if (cores() < 2) return;
  int ends[2];
  CHECK_EQUAL(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    Branch first(repetition::Algorithm::codegen), second(repetition::Algorithm::tables);
    std::vector<Task> tasks{{0, 1, {}}, {1, 1, {}}};
    for (int i = 2; i < 40; ++i) tasks.push_back({i % 2, 1, {i - 1, i - 2}});
    Plan plan(tasks, 2);
    // Unpinned: a thread lets go of its core, by a system call, as soon as its own tasks are done.
    const Options options{std::chrono::seconds(50), std::chrono::seconds(50), false};
    const auto body = [&](int task) { (task % 2 ? first : second).bound->run(); };
    for (int warm = 0; warm < 3; ++warm) plan.run(body, options);
    plan.run(
        [&](int task) {
          if (task < 2 && !forbid_system_calls()) std::puts("system calls not tested: there is no seccomp here");
          body(task);
          if (task + 1 == static_cast<int>(tasks.size())) static_cast<void>(!write(ends[1], "done", 4));
        },
        options);
    _exit(1);
  }
  close(ends[1]);
  char text[5] = {};
  CHECK_EQUAL(read(ends[0], text, 4), 4);
  CHECK_EQUAL(std::string(text), "done");
  close(ends[0]);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
#endif
}

// With native bodies a run allocates nothing once every thread has run every body.
void test_no_allocation() {
  if (cores() < 2) return;
  using enum repetition::Algorithm;
  for (const auto algorithm : {codegen, tables, dense}) {
    Branch first(algorithm), second(algorithm);
    Plan plan({{0, 1, {}}, {1, 1, {}}, {0, 1, {1}}, {1, 1, {0}}}, 2);
    const auto body = [&](int task) { (task % 2 ? first : second).bound->run(); };
    Options options;
    options.patience = std::chrono::seconds(10);
    for (int warm = 0; warm < 5; ++warm) plan.run(body, options);
    const int64_t before = allocations;
    for (int run = 0; run < 100; ++run) plan.run(body, options);
    CHECK_EQUAL(allocations.load(), before);
  }
}
#endif

void test_all(int64_t forks) {
  std::printf("%s, %d cores\n", core::team_name().c_str(), cores());
  test_random_networks();
  test_forks_and_joins(forks);
  test_exceptions();
  test_threads_within_tasks();
  test_cores();
  test_nested_and_concurrent();
#if !defined(SANITIZED)
  test_no_allocation();
#endif
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t forks = count > 1 ? std::atoll(arguments[1]) : 5'000;
  test_waits();
  test_errors();
#if !defined(SANITIZED)
  test_no_system_call();  // first: the child of a fork has no other thread
#endif
  test_all(forks);
#if !defined(SANITIZED)
  if (dlopen("libgomp.so.1", RTLD_LAZY)) test_all(forks);
#endif
  return check::report();
}
