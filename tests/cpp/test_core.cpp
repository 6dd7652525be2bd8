#include <dlfcn.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/aligned_buffer.h"
#include "core/cpu.h"
#include "core/thread_pool.h"

#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER 1
#elif defined(__SANITIZE_ADDRESS__)
#define ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER 1
#elif __has_feature(address_sanitizer)
#define ADDRESS_SANITIZER 1
#endif
#endif

namespace core = pycodesign::core;

namespace {

void test_isa_from_environment() {  // first: nothing has asked for the level yet
  setenv("PYCODESIGN_ISA", "sse9", 1);
  CHECK_THROWS(core::active_isa(), std::invalid_argument,
               "PYCODESIGN_ISA: expected one of scalar, avx2, avx2_vnni, avx512, avx512_vbmi, avx512_amx, got 'sse9'");
  CHECK_THROWS(core::active_isa(), std::invalid_argument, "PYCODESIGN_ISA");
  setenv("PYCODESIGN_ISA", "scalar", 1);
  CHECK(core::active_isa() == core::Isa::scalar);
}

void test_isa() {
  const std::vector<core::Isa> supported = core::supported_isas();
  CHECK(supported.front() == core::Isa::scalar);
  using enum core::Isa;
  for (core::Isa isa : {scalar, avx2, avx2_vnni, avx512, avx512_vbmi, avx512_amx}) {
    const bool is_supported = std::find(supported.begin(), supported.end(), isa) != supported.end();
    if (is_supported) {
      core::set_isa(core::isa_name(isa));
      CHECK(core::active_isa() == isa);
    } else {
      CHECK_THROWS(core::set_isa(core::isa_name(isa)), std::invalid_argument, "which this processor does not support");
    }
    std::printf("%-12s %s\n", core::isa_name(isa), is_supported ? "supported" : "not supported");
  }
  for (const char* name : {"", "avx", "AVX2", "avx2 "})
    CHECK_THROWS(core::set_isa(name), std::invalid_argument, "name: ");
  CHECK(core::active_isa() == supported.back());
}

void test_machine() {
  const core::CacheSizes caches = core::cache_sizes();
  CHECK(caches.l1d >= 4 << 10 && caches.l1d <= caches.l2 && caches.l1d <= caches.l3);
  CHECK(!core::cpu_name().empty());
  CHECK(core::available_cores() >= 1);

  cpu_set_t before, one;
  CHECK_EQUAL(sched_getaffinity(0, sizeof before, &before), 0);
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu)
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  CHECK_EQUAL(sched_setaffinity(0, sizeof one, &one), 0);
  CHECK_EQUAL(core::available_cores(), 1);
  sched_setaffinity(0, sizeof before, &before);
  std::printf("%s, %d cores, L1D %zu L2 %zu L3 %zu\n", core::cpu_name().c_str(), core::available_cores(), caches.l1d,
              caches.l2, caches.l3);
}

void test_cgroup_quota() {
  char directory[] = "/tmp/pycodesign_cgroup_XXXXXX";
  const std::string root = mkdtemp(directory);
  auto write = [&](const std::string& path, const std::string& text) {
    const std::filesystem::path file = root + "/" + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  };
  auto quota = [&](const std::string& membership) {
    write("membership", membership);
    return core::cgroup_cpu_quota(root + "/membership", root);
  };
  write("pod/cpu.max", "250000 100000");
  write("pod/tight/cpu.max", "50000 100000");
  write("pod/free/cpu.max", "max 100000");
  write("cpu,cpuacct/job/cpu.cfs_quota_us", "150000");
  write("cpu,cpuacct/job/cpu.cfs_period_us", "100000");
  write("cpu,cpuacct/job/free/cpu.cfs_quota_us", "-1");
  write("cpu,cpuacct/job/free/cpu.cfs_period_us", "100000");

  CHECK_EQUAL(quota("0::/"), 0.0);
  CHECK_EQUAL(quota("0::/elsewhere/unseen"), 0.0);
  CHECK_EQUAL(quota("0::/pod"), 2.5);
  CHECK_EQUAL(quota("0::/pod/free"), 2.5);
  CHECK_EQUAL(quota("0::/pod/tight"), 0.5);
  CHECK_EQUAL(quota("3:cpuset:/job\n2:cpu,cpuacct:/job/free\n0::/"), 1.5);
  CHECK_EQUAL(quota("not a line"), 0.0);
  write("cpu.max", "100000 100000");
  CHECK_EQUAL(quota("0::/elsewhere/unseen"), 1.0);
  CHECK_EQUAL(core::cgroup_cpu_quota(root + "/absent", root), 0.0);
  std::filesystem::remove_all(root);
}

void test_aligned_buffer() {
  core::AlignedBuffer<float> buffer;
  CHECK(buffer.data() == nullptr);
  for (size_t size : {0, 1, 15, 16, 17, 1009}) {
    float* data = buffer.reserve(size);
    CHECK_EQUAL(reinterpret_cast<uintptr_t>(data) % core::cache_line, 0u);
    CHECK_EQUAL(buffer.size(), size);
    for (size_t i = 0; i < size; ++i) data[i] = 1.0f;
  }
  const float* before = buffer.data();
  CHECK(buffer.reserve(7) == before && buffer.size() == 1009);
  CHECK_THROWS(buffer.reserve(SIZE_MAX / 2), std::bad_alloc, "");
  CHECK_EQUAL(buffer.size(), 1009u);
}

void test_thread_count() {
  setenv("PYCODESIGN_NUM_THREADS", "two", 1);
  CHECK_THROWS(core::num_threads(), std::invalid_argument,
               "PYCODESIGN_NUM_THREADS: expected a number from 1 to 4096, got 'two'");
  setenv("PYCODESIGN_NUM_THREADS", "0", 1);
  CHECK_THROWS(core::parallel_for(1, [](int64_t, int) {}), std::invalid_argument, "got '0'");
  setenv("PYCODESIGN_NUM_THREADS", "3", 1);
  CHECK_EQUAL(core::num_threads(), 3);
  core::set_num_threads(2);
  CHECK_EQUAL(core::num_threads(), 2);
  for (int n : {0, -1, 4097}) CHECK_THROWS(core::set_num_threads(n), std::invalid_argument, "n: expected");
  CHECK_EQUAL(core::num_threads(), 2);
}

void nap(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

// Runs each chunk once, on slots below max_threads that nobody shares; returns how many slots had a part. Chunks that
// take a nap give the core to other threads, so that these meet even on a busy machine.
int cover(int64_t chunks, int max_threads, int nap_microseconds = 0) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(chunks));
  std::vector<std::atomic<int>> users(static_cast<size_t>(max_threads)), used(static_cast<size_t>(max_threads));
  core::parallel_for(
      chunks,
      [&](int64_t chunk, int slot) {
        if (slot < 0 || slot >= max_threads) return check::fail(__FILE__, __LINE__, "slot " + std::to_string(slot));
        const size_t s = static_cast<size_t>(slot);
        CHECK_EQUAL(users[s].fetch_add(1), 0);
        used[s] = 1;
        if (nap_microseconds) nap(nap_microseconds);
        ++runs[static_cast<size_t>(chunk)];
        users[s].fetch_sub(1);
      },
      max_threads);
  for (const auto& count : runs) CHECK_EQUAL(count.load(), 1);
  return static_cast<int>(std::count(used.begin(), used.end(), 1));
}

void test_each_chunk_once() {
  for (int threads : {1, 2, 3, 4, 8}) {
    core::set_num_threads(threads);
    for (int64_t chunks : {0, 1, 2, 3, 4, 5, 7, 8, 9, 64, 1009})
      for (int repeat = 0; repeat < 5; ++repeat) cover(chunks, threads);
    cover(100, threads, 100);
    cover(100, std::max(1, threads / 2), 100);
  }
}

void test_parked_workers() {
  core::set_num_threads(3);
  for (int milliseconds : {0, 1, 2, 10}) {
    nap(1000 * milliseconds);
    CHECK(cover(50, 3, 1000) >= 2);
  }
}

void test_uneven_chunks() {
  core::set_num_threads(2);
  for (int slow : {0, 1}) {  // the caller waits for the other thread longer than it spins
    std::atomic<int> done = 0;
    core::parallel_for(2, [&](int64_t chunk, int) {
      nap(chunk == slow ? 10'000 : 1'000);
      ++done;
    });
    CHECK_EQUAL(done.load(), 2);
  }
}

void test_exception() {
  for (int threads : {1, 4}) {
    core::set_num_threads(threads);
    for (int64_t culprit : {0, 1, 500, 999}) {
      std::atomic<int64_t> runs = 0;
      auto body = [&](int64_t chunk, int) {
        ++runs;
        if (chunk == culprit) throw std::runtime_error("chunk " + std::to_string(chunk));
      };
      CHECK_THROWS(core::parallel_for(1000, body), std::runtime_error, "chunk " + std::to_string(culprit));
      CHECK(runs >= culprit + 1 && runs <= 1000);
      if (threads == 1) CHECK_EQUAL(runs.load(), culprit + 1);
    }
    std::atomic<int64_t> runs = 0;
    auto fail_late = [&](int64_t chunk, int) {
      ++runs;
      nap(chunk == 0 ? 2000 : 100);
      if (chunk == 0) throw std::runtime_error("late");
    };
    CHECK_THROWS(core::parallel_for(1000, fail_late), std::runtime_error, "late");
    CHECK(runs < 1000);
    auto always = [](int64_t, int) { throw std::runtime_error("all"); };
    CHECK_THROWS(core::parallel_for(50, always), std::runtime_error, "all");
    cover(64, threads);
  }
}

void test_nested_calls() {
  core::set_num_threads(4);
  std::atomic<int> inner_runs = 0;
  core::parallel_for(16, [&](int64_t, int) {
    const auto thread = std::this_thread::get_id();
    core::parallel_for(9, [&](int64_t, int slot) {
      CHECK_EQUAL(slot, 0);
      CHECK(std::this_thread::get_id() == thread);
      ++inner_runs;
    });
  });
  CHECK_EQUAL(inner_runs.load(), 16 * 9);
  auto inner = [](int64_t, int) { throw std::logic_error("inner"); };
  CHECK_THROWS(core::parallel_for(4, [&](int64_t, int) { core::parallel_for(4, inner); }), std::logic_error, "inner");
}

void test_concurrent_callers() {
  core::set_num_threads(3);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([] {
      for (int repeat = 0; repeat < 100; ++repeat) cover(20, 3, repeat % 10 ? 0 : 100);
    });
  for (std::thread& caller : callers) caller.join();
}

void test_changing_thread_count() {
  std::atomic<bool> stop = false;
  std::thread changer([&] {
    for (int n = 1; !stop; n = n % 6 + 1) core::set_num_threads(n);
  });
  for (int repeat = 0; repeat < 500; ++repeat) cover(20, 3);
  stop = true;
  changer.join();
}

// The exit status of a child that runs `body`.
template <class Body> [[maybe_unused]] int run_in_child(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    check::failures = 0;
    body();
    _exit(check::report());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

void test_fork() {
#if defined(THREAD_SANITIZER) || defined(EMULATED)
  std::puts("fork not tested: neither ThreadSanitizer nor QEMU lets a forked child start threads");
#elif defined(ADDRESS_SANITIZER)
  std::puts("fork not tested: a child waits forever when another thread held AddressSanitizer's allocator lock");
#else
  core::set_num_threads(3);
  cover(50, 3);
  auto use_team = [] {
    CHECK_EQUAL(core::team_name(), "pool");
    for (int repeat = 0; repeat < 20; ++repeat) cover(50, 3);
    CHECK_EQUAL(run_in_child([] { cover(50, 3); }), 0);
  };
  CHECK_EQUAL(run_in_child(use_team), 0);
  cover(50, 3);

  std::atomic<bool> stop = false;
  std::thread other([&] {
    while (!stop) cover(50, 3);
  });
  for (int repeat = 0; repeat < 5; ++repeat) CHECK_EQUAL(run_in_child(use_team), 0);
  stop = true;
  other.join();
  cover(50, 3);
#endif
}

void test_team() {
  test_each_chunk_once();
  test_parked_workers();
  test_uneven_chunks();
  test_exception();
  test_nested_calls();
  test_concurrent_callers();
  test_changing_thread_count();
  test_fork();
}

void test_openmp_team() {
#if defined(THREAD_SANITIZER)
  std::puts("OpenMP team not tested: ThreadSanitizer does not see the synchronization inside the runtime");
#else
  void* library = dlopen("libgomp.so.1", RTLD_LAZY);
  if (!library) return void(std::puts("OpenMP team not tested: there is no libgomp.so.1"));
  CHECK_EQUAL(core::team_name().rfind("openmp: ", 0), 0u);
  CHECK(core::team_name().find("libgomp.so.1") != std::string::npos);
  std::printf("%s\n", core::team_name().c_str());
  test_team();

  const auto get_max_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
  const int threads = get_max_threads();
  const core::RuntimeThreads before = core::swap_runtime_threads({threads + 2, 0});
  CHECK_EQUAL(before.openmp, threads);
  CHECK_EQUAL(get_max_threads(), threads + 2);
  CHECK_EQUAL(core::swap_runtime_threads(before).openmp, threads + 2);
  CHECK_EQUAL(get_max_threads(), threads);

  // A call from inside the runtime's own parallel region runs on its caller alone.
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  const auto parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
  const auto set_max_active_levels = reinterpret_cast<void (*)(int)>(dlsym(library, "omp_set_max_active_levels"));
  set_max_active_levels(2);
  std::atomic<int> runs = 0;
  core::set_num_threads(2);
  parallel(
      [](void* data) {
        const auto thread = std::this_thread::get_id();
        core::parallel_for(5, [&](int64_t, int slot) {
          CHECK_EQUAL(slot, 0);
          CHECK(std::this_thread::get_id() == thread);
          nap(1000);
          ++*static_cast<std::atomic<int>*>(data);
        });
      },
      &runs, 2, 0);
  CHECK_EQUAL(runs.load(), 2 * 5);
#endif
}

}  // namespace

int main() {
  test_isa_from_environment();
  test_isa();
  test_machine();
  test_cgroup_quota();
  test_aligned_buffer();
  test_thread_count();
  CHECK_EQUAL(core::team_name(), "pool");
  test_team();
  test_openmp_team();
  return check::report();
}
