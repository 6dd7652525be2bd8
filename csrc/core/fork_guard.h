// Locks that fork() waits for.
#pragma once

#include <mutex>

namespace pycodesign::core {

// Holds a mutex, and keeps the process from forking meanwhile: a child has only the thread that forked, so that a mutex
// held by another would stay locked there, and what it guards half changed. Not around anything that waits for a thread
// that may fork, nor for Python's lock.
class ForkGuard {
 public:
  explicit ForkGuard(std::mutex&);
  ~ForkGuard();
  ForkGuard(const ForkGuard&) = delete;
  ForkGuard& operator=(const ForkGuard&) = delete;

 private:
  std::mutex& mutex_;
};

}  // namespace pycodesign::core
