#include "core/fork_guard.h"

#include <pthread.h>

#include <new>
#include <shared_mutex>

namespace pycodesign::core {

namespace {

std::shared_mutex forking;    // shared by guards; a fork has it alone
thread_local int guards = 0;  // of this thread, the first of which shares

void close_gate() { forking.lock(); }
void open_gate() { forking.unlock(); }
// Its owner has another identity here, and cannot unlock it.
void make_gate() { new (&forking) std::shared_mutex; }

[[maybe_unused]] const int fork_handlers = pthread_atfork(close_gate, open_gate, make_gate);

}  // namespace

ForkGuard::ForkGuard(std::mutex& mutex) : mutex_(mutex) {
  if (guards++ == 0) forking.lock_shared();
  mutex_.lock();
}

ForkGuard::~ForkGuard() {
  mutex_.unlock();
  if (--guards == 0) forking.unlock_shared();
}

}  // namespace pycodesign::core
