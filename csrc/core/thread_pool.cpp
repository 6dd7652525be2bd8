#include "core/thread_pool.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "core/affinity.h"
#include "core/cpu.h"
#include "core/fork_guard.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pycodesign::core {

// What the threads of a team do together.
class Job {
 public:
  explicit Job(Nanoseconds spin) : spin(spin) {}
  virtual ~Job() = default;
  // Any number of threads may call this, at any time until the job's owner has seen them return.
  virtual void run(int member) noexcept = 0;
  virtual bool is_over() const { return false; }

  const Nanoseconds spin;  // before a thread that waits parks
};

namespace {

constexpr int most_threads = 4096;

std::atomic<int> requested_threads = 0;  // 0: not yet decided
std::atomic<bool> team_in_use = false;   // by one caller, whose chunks may call again
std::atomic<bool> is_forked = false;     // this process is a fork without an exec

// One call of parallel_for, shared by the threads that work on it.
class Loop final : public Job {
 public:
  Loop(ChunkBody body, void* context, int64_t chunks, int slots)
      : Job(default_spin), body_(body), context_(context), chunks_(chunks), slots_(slots) {}

  void run(int) noexcept override {
    const int slot = next_slot_.fetch_add(1, std::memory_order_relaxed);
    if (slot >= slots_) return;
    try {
      while (!failed_.load(std::memory_order_relaxed)) {
        const int64_t chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= chunks_) break;
        body_(context_, chunk, slot);
      }
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  bool is_over() const override {
    return next_chunk_.load(std::memory_order_relaxed) >= chunks_ ||
           next_slot_.load(std::memory_order_relaxed) >= slots_ || failed_.load(std::memory_order_relaxed);
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  ChunkBody body_;
  void* context_;
  int64_t chunks_;
  int slots_;
  std::atomic<int64_t> next_chunk_ = 0;
  std::atomic<int> next_slot_ = 0;
  std::atomic<bool> failed_ = false;
  std::exception_ptr error_ = nullptr;
};

// One call of run_members.
class alignas(64) Meeting final : public Job {
 public:
  Meeting(int members, MemberBody body, void* context, Nanoseconds spin)
      : Job(spin), members_(members), body_(body), context_(context) {}
  void run(int member) noexcept override {
    if (member < members_) body_(context_, member);
  }

 private:
  int members_;
  MemberBody body_;
  void* context_;
};

using Time = std::chrono::steady_clock::time_point;

thread_local const Crew* current_crew = nullptr;

// True when `done` came true within `time`.
template <class Done> bool spin_until(Nanoseconds time, Done done) {
  if (done()) return true;
  if (time <= Nanoseconds::zero()) return false;
  const auto end = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// A thread and its mailbox, one word that says whose turn it is.
class alignas(64) Worker {
 public:
  explicit Worker(int member) : member_(member) { std::thread(&Worker::serve, this).detach(); }

  void post(Job* job) {
    job_ = job;
    poster_core_ = sched_getcpu();
    woken_ = {};
    if (state_.exchange(posted) != parked) return;
    woken_ = std::chrono::steady_clock::now();
    state_.notify_one();
  }

  // Returns when the worker is through with the posted job, or has not begun: then it never will, so that
  // nobody waits for a thread that is slow to wake up. Whoever has worked since `begun` spins as long again for one on
  // a slower core: to park and be woken takes up to 100 microseconds.
  void finish(Time begun) {
    int state = state_.load(std::memory_order_acquire);
    if (state == posted && state_.compare_exchange_strong(state, idle)) {
      // It may have been waiting for this core all the time: let it leave for another.
      if (woken_ != Time{} && std::chrono::steady_clock::now() - woken_ > default_spin) std::this_thread::yield();
      return;
    }
    const auto is_done = [this] { return state_.load(std::memory_order_acquire) == idle; };
    if (is_done()) return;
    const Nanoseconds spin = job_->spin, worked = std::chrono::steady_clock::now() - begun;
    if (spin_until(spin > Nanoseconds::zero() ? std::max(spin, worked) : spin, is_done)) return;
    state = busy;
    if (state_.compare_exchange_strong(state, awaited)) state_.wait(awaited);
  }

 private:
  enum State : int { idle, parked, posted, busy, awaited };

  [[noreturn]] void serve() {
    for (Nanoseconds spin = default_spin;;) {
      if (!spin_until(spin, [this] { return state_.load(std::memory_order_relaxed) == posted; })) {
        int state = idle;
        if (state_.compare_exchange_strong(state, parked)) {
          state_.wait(parked);
          leave_core(poster_core_);
        }
      }
      int state = posted;
      if (!state_.compare_exchange_strong(state, busy)) continue;
      spin = job_->spin;
      job_->run(member_);
      if (state_.exchange(idle) == awaited) state_.notify_one();
    }
  }

  std::atomic<int> state_ = idle;
  Job* job_ = nullptr;
  std::atomic<int> poster_core_ = -1;
  Time woken_;  // by the last post
  int member_;
};

// Never destroyed: parked workers outlive main() and end with the process. Used under team_in_use.
std::vector<Worker*>* workers = nullptr;

void run_on_pool(Job& job, int members) {
  if (!workers) workers = new std::vector<Worker*>;
  const size_t others = static_cast<size_t>(members - 1);
  try {
    while (workers->size() < others) {
      workers->reserve(workers->size() + 1);
      workers->push_back(new Worker(static_cast<int>(workers->size()) + 1));
    }
  } catch (const std::exception&) {
    // No more threads to be had: those there are do the work.
  }
  const size_t posted = std::min(others, workers->size());
  for (size_t i = 0; i < posted; ++i) (*workers)[i]->post(&job);
  const Time begun = std::chrono::steady_clock::now();
  job.run(0);
  for (size_t i = 0; i < posted; ++i) (*workers)[i]->finish(begun);
}

// An OpenMP runtime that somebody else loaded.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags) = nullptr;
  int (*get_max_threads)() = nullptr;
  void (*set_num_threads)(int) = nullptr;
  int (*in_parallel)() = nullptr;
  int (*get_thread_num)() = nullptr;
  int (*get_num_threads)() = nullptr;
  int (*set_mkl_threads)(int) = nullptr;  // of the calling thread; returns how many they were; null without MKL
  std::string path;
  bool is_best = false;  // no library that is loaded later comes first
};

bool has_prefix(std::string_view name, std::string_view prefix) { return name.substr(0, prefix.size()) == prefix; }

// Where several runtimes are loaded, the one that torch uses comes first.
int library_rank(const char* path) {
  const char* slash = std::strrchr(path, '/');
  const std::string_view name = slash ? slash + 1 : path;
  if (has_prefix(name, "libtorch_cpu.")) return 2;
  return has_prefix(name, "libgomp") || has_prefix(name, "libomp") || has_prefix(name, "libiomp5");
}

unsigned long long count_loaded_libraries() {
  unsigned long long count = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        *static_cast<unsigned long long*>(result) = info->dlpi_adds;
        return 1;
      },
      &count);
  return count;
}

template <class Function> bool find_function(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

std::unique_ptr<OpenMp> load_runtime(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // keeps it loaded from here on
  if (!library) return nullptr;
  auto runtime = std::make_unique<OpenMp>();
  Dl_info info;
  if (find_function(library, "GOMP_parallel", runtime->parallel) &&
      find_function(library, "omp_get_max_threads", runtime->get_max_threads) &&
      find_function(library, "omp_set_num_threads", runtime->set_num_threads) &&
      find_function(library, "omp_in_parallel", runtime->in_parallel) &&
      find_function(library, "omp_get_thread_num", runtime->get_thread_num) &&
      find_function(library, "omp_get_num_threads", runtime->get_num_threads) &&
      dladdr(reinterpret_cast<void*>(runtime->parallel), &info)) {
    runtime->path = info.dli_fname;
    find_function(library, "MKL_Set_Num_Threads_Local", runtime->set_mkl_threads);
    return runtime;
  }
  dlclose(library);
  return nullptr;
}

std::unique_ptr<OpenMp> search_runtime() {
  std::vector<std::string> paths[3];
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        if (const int rank = library_rank(info->dlpi_name))
          static_cast<std::vector<std::string>*>(found)[rank].push_back(info->dlpi_name);
        return 0;
      },
      paths);
  for (int rank : {2, 1})
    for (const std::string& path : paths[rank])
      if (auto runtime = load_runtime(path)) {
        runtime->is_best = rank == 2;
        return runtime;
      }
  return nullptr;
}

// Searches again only after a library was loaded, until torch's is found.
const OpenMp* find_runtime() {
  static std::mutex mutex;
  static std::atomic<unsigned long long> searched_at = 0;
  static std::atomic<const OpenMp*> runtime = nullptr;
  if (const OpenMp* found = runtime.load(std::memory_order_acquire); found && found->is_best) return found;
  if (count_loaded_libraries() != searched_at.load(std::memory_order_acquire)) {
    const ForkGuard lock(mutex);
    const unsigned long long count = count_loaded_libraries();
    if (count != searched_at.load(std::memory_order_relaxed)) {
      std::unique_ptr<OpenMp> found = search_runtime();
      const OpenMp* known = runtime.load();
      if (!found || !known || found->parallel != known->parallel || found->set_mkl_threads != known->set_mkl_threads)
        runtime.store(found.release());
      searched_at.store(count, std::memory_order_release);
    }
  }
  return runtime.load(std::memory_order_relaxed);
}

// The runtime whose team is to be used. A child of fork() has lost the runtime's threads, and the runtime does not
// know.
const OpenMp* find_team() { return is_forked.load(std::memory_order_relaxed) ? nullptr : find_runtime(); }

void run_on_openmp(const OpenMp& runtime, Job& job, int members) {
  // A team of another size than before costs the runtime new threads, so ask for the one that others ask for:
  // threads without a part return at once.
  struct Call {
    const OpenMp& runtime;
    Job& job;
    int core = sched_getcpu();
    std::atomic<int> arrived = 0;
  } call{runtime, job};
  const int size = std::max({num_threads(), runtime.get_max_threads(), members});
  runtime.parallel(
      [](void* data) {
        Call& c = *static_cast<Call*>(data);
        const int member = c.runtime.get_thread_num();
        if (member > 0) leave_core(c.core);
        c.arrived.fetch_add(1, std::memory_order_relaxed);
        c.job.run(member);
        if (member > 0) return;
        // The runtime waits for all of its threads, and spins without yielding.
        const auto all_arrived = [&] {
          return c.arrived.load(std::memory_order_relaxed) == c.runtime.get_num_threads();
        };
        if (!spin_until(wakeup, all_arrived))
          while (!all_arrived()) std::this_thread::yield();
      },
      &call, static_cast<unsigned>(size), 0);
}

// Runs the job on the team, or returns false where the caller has to be alone.
bool run_on_team(Job& job, int members) {
  const OpenMp* runtime = find_team();
  if ((runtime && runtime->in_parallel()) || team_in_use.exchange(true, std::memory_order_acquire)) return false;
  struct GivenBack {
    ~GivenBack() { team_in_use.store(false, std::memory_order_release); }
  } given_back;  // also where PYCODESIGN_NUM_THREADS is no number
  if (runtime) {
    run_on_openmp(*runtime, job, members);
  } else {
    run_on_pool(job, members);
  }
  return true;
}

// In the child of a fork() only the calling thread lives on.
void forget_team() {
  is_forked = true;
  team_in_use = false;
  workers = nullptr;
}

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, forget_team);

}  // namespace

void relax_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void parallel_for(int64_t chunks, ChunkBody body, void* context, int max_threads) {
  int64_t width = num_threads();
  if (max_threads > 0) width = std::min<int64_t>(width, max_threads);
  width = std::min(width, chunks);
  if (width > 1) {
    Loop loop(body, context, chunks, static_cast<int>(width));
    bool is_run = true;
    if (current_crew && current_crew->share) current_crew->share(current_crew->context, loop);
    else is_run = run_on_team(loop, static_cast<int>(width));
    if (is_run) return loop.rethrow();
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk, 0);
}

bool run_members(int members, MemberBody body, void* context, Nanoseconds spin) {
  if (current_crew) members = std::min(members, current_crew->threads);
  if (members < 2) return false;
  Meeting meeting(members, body, context, spin);
  return run_on_team(meeting, members);
}

bool take_part(Job& job) {
  if (job.is_over()) return false;
  job.run(0);
  return true;
}

CrewScope::CrewScope(const Crew& crew) : before_(current_crew) { current_crew = &crew; }
CrewScope::~CrewScope() { current_crew = before_; }

int num_threads() {
  if (current_crew) return current_crew->threads;
  int n = requested_threads.load(std::memory_order_relaxed);
  if (n > 0) return n;
  int initial = std::min(available_cores(), most_threads);
  if (const char* text = std::getenv("PYCODESIGN_NUM_THREADS"); text && *text) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end || value < 1 || value > most_threads)
      throw std::invalid_argument("PYCODESIGN_NUM_THREADS: expected a number from 1 to " +
                                  std::to_string(most_threads) + ", got '" + text + "'");
    initial = static_cast<int>(value);
  }
  return requested_threads.compare_exchange_strong(n, initial) ? initial : n;
}

void set_num_threads(int n) {
  if (n < 1 || n > most_threads)
    throw std::invalid_argument("n: expected a number from 1 to " + std::to_string(most_threads) + ", got " +
                                std::to_string(n));
  requested_threads = n;
}

RuntimeThreads swap_runtime_threads(RuntimeThreads wanted) {
  const OpenMp* runtime = find_runtime();
  if (!runtime) return {0, 0};
  const int before = runtime->get_max_threads();
  if (wanted.openmp > 0) runtime->set_num_threads(wanted.openmp);
  return {before, runtime->set_mkl_threads ? runtime->set_mkl_threads(wanted.mkl) : 0};
}

std::string team_name() {
  const OpenMp* runtime = find_team();
  return runtime ? "openmp: " + runtime->path : "pool";
}

}  // namespace pycodesign::core
