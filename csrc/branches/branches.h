// Bodies of a network run by teams of threads: who runs what and waits for whom, compiled once into one list of
// instructions per team.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "core/affinity.h"
#include "core/thread_pool.h"

namespace pycodesign::branches {

// One body; a team runs its tasks in the order in which they are given.
struct Task {
  int team;
  int threads = 1;         // of the loops within it: its team's own, and those of teams that wait meanwhile
  std::vector<int> after;  // indices of the tasks whose results it reads
};

struct Options {
  core::Nanoseconds spin = core::default_spin;  // before a team that waits parks; 0 for cores that are shared
  // Until a team that waits for one whose thread has not come runs that one's tasks itself.
  core::Nanoseconds patience{5'000};
  bool pin = true;  // teams to different cores, for the duration of a run
};

// Teams wait for each other by flags: how many of its tasks a team is through with, counted on from run to run, on a
// cache line of its own. In a run of bodies that do none of these, there is no lock, no allocation and, unless a thread
// parks or is late, no system call; before and after it there may be.
class Plan {
 public:
  using Body = void (*)(void* context, int task);

  // Team 0 is the caller's. A team without tasks takes part in the loops of the others. Throws std::invalid_argument
  // for an unknown team or task, for a cycle, and for more teams than cores.
  Plan(const std::vector<Task>& tasks, int teams);

  // Calls body(context, task) once for each task, and returns when all have returned. After an exception no task is
  // begun any more, and the first one is rethrown here. Calls at the same time wait for each other.
  void run(Body body, void* context, const Options& = {});
  template <class F> void run(F&& body, const Options& options = {}) {
    using Callable = std::remove_reference_t<F>;
    run([](void* context, int task) { (*static_cast<Callable*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(std::addressof(body))), options);
  }

  int teams() const { return static_cast<int>(teams_.size()); }
  int waits() const { return waits_; }  // instructions of all teams that wait for another

 private:
  struct Instruction {
    enum Kind : uint8_t { wait, run, signal } kind;
    int32_t index;   // wait: a team; run: a task
    uint64_t count;  // wait, signal: tasks of that team
  };
  struct Team {
    alignas(64) std::atomic<uint64_t> progress = 0;      // written by whoever runs the team, as all that follows
    alignas(64) std::atomic<uint64_t> claimed = 0;       // the number of the run, by who comes first
    size_t next = 0;                                     // instruction
    Team* also = nullptr;                                // another that the same thread runs
    alignas(64) std::atomic<core::Job*> loop = nullptr;  // in which others may take part, and how many do
    std::atomic<int> guests = 0;
    std::vector<Instruction> instructions;
  };

  void compile(const std::vector<Task>& tasks);
  void work(int member) noexcept;
  bool claim(Team& team);
  void advance(Team& team);
  void run_task(Team& team, int task);
  bool is_blocked(const Team& team) const;
  bool can_go_on(const Team* mine) const;
  Team* missing_team(Team* mine);
  bool adopt(Team* mine);
  bool take_part();
  void wait_for_others(Team* mine);
  template <class Ready> void park(Ready ready);
  void notify();

  std::vector<int> threads_;  // of each task
  std::vector<Team> teams_;
  int waits_ = 0;
  bool has_loops_ = false;  // a task of several threads
  uint64_t stride_ = 1;     // by which counts grow from run to run
  core::CoreChoice cores_;
  std::mutex mutex_;  // one run at a time
  std::exception_ptr error_;

  // What differs from run to run, on a line that every thread fetches.
  alignas(64) Body body_ = nullptr;
  void* context_ = nullptr;
  uint64_t run_ = 0, base_ = 0;
  Options options_;

  alignas(64) std::atomic<bool> failed_ = false;
  std::atomic<uint64_t> finished_ = 0;  // the last run that is over, where a task has loops
  std::atomic<int> parked_ = 0;         // how many threads
  std::atomic<uint32_t> event_ = 0;     // changes to wake them
};

}  // namespace pycodesign::branches
