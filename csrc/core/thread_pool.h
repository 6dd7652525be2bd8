// One team of threads per process, for one pattern: independent chunks of work, taken in order by whoever is free.
//
// The team is a small pool of our own, unless an OpenMP runtime is loaded (torch brings one): then it is that
// runtime's team, because two teams that spin on the same cores cost milliseconds per call.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

namespace pycodesign::core {

using ChunkBody = void (*)(void* context, int64_t chunk, int slot);

// Calls body(context, chunk, slot) once for each chunk in [0, chunks), on up to max_threads threads, the caller among
// them. Chunks that run at the same time have different slots, all below max_threads (0 stands for num_threads()).
// Per-slot workspaces need an explicit max_threads: num_threads() may change between their allocation and this call.
//
// Runs on the caller alone, with slot 0, inside another parallel region and while another thread uses the team.
// The first exception skips the chunks not yet started and is rethrown here.
void parallel_for(int64_t chunks, ChunkBody body, void* context, int max_threads = 0);

// The same for a callable body(chunk, slot).
template <class F> void parallel_for(int64_t chunks, F&& body, int max_threads = 0) {
  using Body = std::remove_reference_t<F>;
  parallel_for(
      chunks, [](void* context, int64_t chunk, int slot) { (*static_cast<Body*>(context))(chunk, slot); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))), max_threads);
}

using MemberBody = void (*)(void* context, int member);
using Nanoseconds = std::chrono::nanoseconds;
inline constexpr Nanoseconds default_spin{50'000};
// Whoever waits longer than this for a thread to come yields: it may have been woken on the waiter's own core, where it
// would begin only after a time slice, milliseconds.
inline constexpr Nanoseconds wakeup{8'000};

// Calls body(context, member), which does not throw, on threads of the team; the caller is member 0, and a thread has
// the same number, below `members`, in every call. Nobody waits for a thread that is slow to come, so a member may not
// be called at all: the others must be able to do its work. Whoever waits for another spins for `spin`, then parks.
//
// Where the calling thread has a crew, of no more members than the crew has threads. False, and nobody is called, where
// that leaves the caller alone, inside another parallel region, and while another thread uses the team.
bool run_members(int members, MemberBody body, void* context, Nanoseconds spin = default_spin);

// A parallel loop in which other threads may take part.
class Job;
bool take_part(Job&);  // runs chunks until none is left; false when there was none

// Who runs the parallel loops of a thread, instead of the team.
struct Crew {
  int threads;  // at most, the thread's own among them; what num_threads() says
  // Gives the loop to whoever takes part, takes part, and returns when nobody does any more. Null: the team runs it.
  void (*share)(void* context, Job&) = nullptr;
  void* context = nullptr;
};

// The calling thread's crew for as long as it lives.
class CrewScope {
 public:
  explicit CrewScope(const Crew& crew);
  ~CrewScope();
  CrewScope(const CrewScope&) = delete;
  CrewScope& operator=(const CrewScope&) = delete;

 private:
  const Crew* before_;
};

// Threads within an operation: the crew's where the thread has one, else the last set_num_threads(), else
// PYCODESIGN_NUM_THREADS, else available_cores().
// Throws std::invalid_argument when PYCODESIGN_NUM_THREADS is not a number from 1 to 4096.
int num_threads();

// Lets the processor know that a thread spins.
void relax_cpu();

// Throws std::invalid_argument unless 1 <= n <= 4096.
void set_num_threads(int n);

// How many threads others' operations get that begin on the calling thread: those of the OpenMP runtime that is loaded,
// and those of MKL where torch has it (0: as many as OpenMP's).
struct RuntimeThreads {
  int openmp, mkl;
};

// Sets the calling thread's, also in a forked child, and returns what they were; without a runtime does nothing.
RuntimeThreads swap_runtime_threads(RuntimeThreads);

// The team the next call would run on: "pool" or "openmp: <path of the runtime>".
std::string team_name();

}  // namespace pycodesign::core
