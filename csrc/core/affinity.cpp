#include "core/affinity.h"

namespace pycodesign::core {

CoreChoice::CoreChoice(int members) {
  if (sched_getaffinity(0, sizeof allowed_, &allowed_) || CPU_COUNT(&allowed_) < members) return;
  const int here = sched_getcpu();
  if (here < 0 || here >= CPU_SETSIZE || !CPU_ISSET(here, &allowed_)) return;
  members_ = members;
  first_ = here;
}

int CoreChoice::of(int member) const {
  if (member >= members_) return -1;
  if (member == 0) return first_;
  for (int core = 0, seen = 0; core < CPU_SETSIZE; ++core)
    if (core != first_ && CPU_ISSET(core, &allowed_) && ++seen == member) return core;
  return -1;
}

Pin::Pin(int core) {
  if (core < 0 || sched_getaffinity(0, sizeof before_, &before_)) return;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  is_set_ = sched_setaffinity(0, sizeof one, &one) == 0;
}

Pin::~Pin() {
  if (is_set_) sched_setaffinity(0, sizeof before_, &before_);
}

void leave_core(int core) {
  cpu_set_t before;
  if (core < 0 || core >= CPU_SETSIZE || sched_getcpu() != core || sched_getaffinity(0, sizeof before, &before)) return;
  cpu_set_t others = before;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
    sched_setaffinity(0, sizeof before, &before);
}

}  // namespace pycodesign::core
