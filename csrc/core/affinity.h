// Which core a thread runs on.
#pragma once

#include <sched.h>

namespace pycodesign::core {

// Different cores for the members of a team, out of those that the calling thread may run on. No allocation.
class CoreChoice {
 public:
  explicit CoreChoice(int members);  // member 0 stays where it is: it is the calling thread
  CoreChoice() = default;            // none
  int of(int member) const;          // -1 when there are fewer cores than members, or more than a cpu_set_t holds

 private:
  cpu_set_t allowed_{};
  int members_ = 0, first_ = -1;
};

// Keeps the calling thread on a core for as long as it lives, then lets it run where it could before. Core -1: nothing.
class Pin {
 public:
  explicit Pin(int core);
  ~Pin();
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

 private:
  cpu_set_t before_{};
  bool is_set_ = false;
};

// Moves the calling thread away if it runs on this core; afterwards it may run where it could before. In a virtual
// machine an idle core looks busy, so a thread that wakes up often begins on the core of whoever woke it.
void leave_core(int core);

}  // namespace pycodesign::core
