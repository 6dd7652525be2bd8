#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "branches/branches.h"
#include "core/cpu.h"

namespace pycodesign::branches {

using Clock = std::chrono::steady_clock;

Plan::Plan(const std::vector<Task>& tasks, int teams) : teams_(static_cast<size_t>(std::clamp(teams, 1, 4096))) {
  if (teams < 1) throw std::invalid_argument("teams: expected at least 1, got " + std::to_string(teams));
  if (const int cores = core::available_cores(); teams > cores)
    throw std::invalid_argument("teams: expected at most " + std::to_string(cores) +
                                ", the cores that this process may use, got " + std::to_string(teams));
  const int count = static_cast<int>(tasks.size());
  for (const Task& task : tasks) {
    if (task.team < 0 || task.team >= teams)
      throw std::invalid_argument("team: expected 0 to " + std::to_string(teams - 1) + ", got " +
                                  std::to_string(task.team));
    if (task.threads < 1)
      throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(task.threads));
    for (const int before : task.after)
      if (before < 0 || before >= count)
        throw std::invalid_argument("after: expected tasks from 0 to " + std::to_string(count - 1) + ", got " +
                                    std::to_string(before));
    threads_.push_back(task.threads);
    has_loops_ |= teams > 1 && task.threads > 1;
  }
  compile(tasks);
}

// Every team's tasks with the waits between them that nothing else implies.
void Plan::compile(const std::vector<Task>& tasks) {
  const size_t n = tasks.size(), teams = teams_.size();
  // What each task comes after: what it reads, and the task before it in its team.
  std::vector<std::vector<size_t>> before(n), behind(n);
  std::vector<size_t> position(n), order;
  std::vector<std::vector<size_t>> own(teams);
  for (size_t i = 0; i < n; ++i) {
    auto& mine = own[static_cast<size_t>(tasks[i].team)];
    for (const int b : tasks[i].after) before[i].push_back(static_cast<size_t>(b));
    if (!mine.empty()) before[i].push_back(mine.back());
    position[i] = mine.size();
    mine.push_back(i);
  }
  std::vector<size_t> missing(n);
  for (size_t i = 0; i < n; ++i) {
    missing[i] = before[i].size();
    for (const size_t b : before[i]) behind[b].push_back(i);
    if (missing[i] == 0) order.push_back(i);
  }
  std::vector<size_t> place(n);
  for (size_t at = 0; at < order.size(); ++at) {
    place[order[at]] = at;
    for (const size_t b : behind[order[at]])
      if (--missing[b] == 0) order.push_back(b);
  }
  if (order.size() < n) {
    // Whatever is left waits for something that is left: going back long enough leads into a cycle.
    size_t at = 0;
    while (missing[at] == 0) ++at;
    std::vector<size_t> path;
    while (std::find(path.begin(), path.end(), at) == path.end()) {
      path.push_back(at);
      at = *std::find_if(before[at].begin(), before[at].end(), [&](size_t b) { return missing[b] > 0; });
    }
    std::string text = std::to_string(at);
    for (size_t i = path.size(); path[--i] != at;) text += " -> " + std::to_string(path[i]);
    throw std::invalid_argument("after: expected no cycle, got " + text + " -> " + std::to_string(at));
  }

  // known[i][t]: so many of team t's tasks are done when task i is.
  std::vector<std::vector<size_t>> known(n, std::vector<size_t>(teams));
  std::vector<std::vector<Instruction>> waits(n);
  std::vector<bool> is_awaited(n);
  const auto learn = [](std::vector<size_t>& to, const std::vector<size_t>& from) {
    for (size_t t = 0; t < to.size(); ++t) to[t] = std::max(to[t], from[t]);
  };
  const auto wait_for = [&](std::vector<size_t>& knows, size_t task, std::vector<Instruction>& list) {
    const auto team = static_cast<size_t>(tasks[task].team);
    if (knows[team] > position[task]) return;
    list.push_back({Instruction::wait, static_cast<int32_t>(team), position[task] + 1});
    is_awaited[task] = true;
    learn(knows, known[task]);
  };
  for (const size_t i : order) {
    // Latest first: it often knows of the others.
    std::sort(before[i].begin(), before[i].end(), [&](size_t a, size_t b) { return place[a] > place[b]; });
    const auto team = static_cast<size_t>(tasks[i].team);
    if (position[i] > 0) learn(known[i], known[own[team][position[i] - 1]]);
    for (const size_t b : before[i]) wait_for(known[i], b, waits[i]);
    known[i][team] = position[i] + 1;
  }
  // Where there are loops, the caller takes part until all are done.
  std::vector<size_t> knows(teams);
  std::vector<Instruction> last;
  if (!own[0].empty()) learn(knows, known[own[0].back()]);
  knows[0] = own[0].size();
  std::vector<size_t> ends;
  for (const auto& mine : own)
    if (has_loops_ && !mine.empty()) ends.push_back(mine.back());
  std::sort(ends.begin(), ends.end(), [&](size_t a, size_t b) { return place[a] > place[b]; });
  for (const size_t end : ends) wait_for(knows, end, last);

  for (size_t t = 0; t < teams; ++t) {
    std::vector<Instruction>& list = teams_[t].instructions;
    for (const size_t i : own[t]) {
      list.insert(list.end(), waits[i].begin(), waits[i].end());
      list.push_back({Instruction::run, static_cast<int32_t>(i), 0});
      if (is_awaited[i]) list.push_back({Instruction::signal, 0, position[i] + 1});
    }
    if (t == 0) list.insert(list.end(), last.begin(), last.end());
    for (const Instruction& i : list) waits_ += i.kind == Instruction::wait;
    stride_ = std::max<uint64_t>(stride_, own[t].size() + 1);
  }
}

void Plan::run(Body body, void* context, const Options& options) {
  const std::lock_guard lock(mutex_);
  body_ = body;
  context_ = context;
  options_ = options;
  ++run_;
  base_ += stride_;
  if (failed_) failed_ = false;
  const int members = teams();
  options_.pin &= members > 1;
  if (options_.pin) cores_ = core::CoreChoice(members);
  const auto work_as = [](void* plan, int member) { static_cast<Plan*>(plan)->work(member); };
  claim(teams_[0]);
  const bool is_run = members > 1 && core::run_members(members, work_as, this, options.spin);
  options_.patience = core::Nanoseconds::zero();  // nobody comes any more
  if (!is_run) work(0);
  for (int member = 1; member < members; ++member) work(member);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

// Runs a team to its end, unless somebody does, and on the way those whose threads have not come.
void Plan::work(int member) noexcept {
  Team& own = teams_[static_cast<size_t>(member)];
  if (member > 0 && !claim(own)) return;
  const core::Pin pin(options_.pin ? cores_.of(member) : -1);
  for (;;) {
    bool finished = true;
    for (Team* team = &own; team; team = team->also) {
      advance(*team);
      finished &= team->next == team->instructions.size();
    }
    if (failed_) return;
    if (finished) break;
    wait_for_others(&own);
  }
  if (!has_loops_) return;
  if (member > 0) return wait_for_others(nullptr);
  finished_ = run_;
  notify();
}

bool Plan::claim(Team& team) {
  uint64_t before = team.claimed;
  if (before == run_ || !team.claimed.compare_exchange_strong(before, run_)) return false;
  team.next = 0;
  team.also = nullptr;
  return true;
}

bool Plan::is_blocked(const Team& team) const {
  if (team.next == team.instructions.size()) return true;
  const Instruction& i = team.instructions[team.next];
  return i.kind == Instruction::wait && teams_[static_cast<size_t>(i.index)].progress < base_ + i.count;
}

// Runs a team's instructions until one has to wait.
void Plan::advance(Team& team) {
  for (; !is_blocked(team); ++team.next) {
    const Instruction& i = team.instructions[team.next];
    if (i.kind == Instruction::run) {
      if (failed_) return;
      run_task(team, i.index);
    } else if (i.kind == Instruction::signal) {
      team.progress = base_ + i.count;
      notify();
    }
  }
}

void Plan::run_task(Team& team, int task) {
  struct Call {
    Plan& plan;
    Team& team;
  } call{*this, team};
  // Another thread may be in a loop until it has finished its chunk.
  const auto share = [](void* context, core::Job& loop) {
    auto& [plan, owner] = *static_cast<Call*>(context);
    owner.loop = &loop;
    plan.notify();
    core::take_part(loop);
    owner.loop = nullptr;
    const auto alone = [&guests = owner.guests] { return guests == 0; };
    const auto end = Clock::now() + plan.options_.spin;
    while (!alone()) {
      core::relax_cpu();
      if (Clock::now() >= end) plan.park(alone);
    }
  };
  core::Crew crew{threads_[static_cast<size_t>(task)]};
  if (has_loops_ && crew.threads > 1) {
    crew.share = share;
    crew.context = &call;
  }
  const core::CrewScope scope(crew);
  try {
    body_(context_, task);
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
    notify();
  }
}

bool Plan::can_go_on(const Team* mine) const {
  if (failed_) return true;
  if (!mine) return finished_ == run_;
  for (const Team* team = mine; team; team = team->also)
    if (!is_blocked(*team)) return true;
  return false;
}

// One that nobody runs yet, though one of `mine` waits for it; null where there is none.
Plan::Team* Plan::missing_team(Team* mine) {
  for (Team* team = mine; team; team = team->also) {
    if (team->next == team->instructions.size()) continue;
    Team& awaited = teams_[static_cast<size_t>(team->instructions[team->next].index)];
    if (awaited.claimed != run_) return &awaited;
  }
  return nullptr;
}

// Claims a team that is missing.
bool Plan::adopt(Team* mine) {
  while (Team* team = missing_team(mine)) {
    if (!claim(*team)) continue;
    team->also = mine->also;
    mine->also = team;
    return true;
  }
  return false;
}

// In a loop of another team; false when there is none.
bool Plan::take_part() {
  bool took_part = false;
  for (Team& team : teams_) {
    if (!team.loop.load(std::memory_order_relaxed)) continue;
    ++team.guests;
    if (core::Job* loop = team.loop) took_part |= core::take_part(*loop);
    if (--team.guests == 0) notify();
  }
  return took_part;
}

// Returns when one of `mine` can go on, or, with none, when the run is over.
void Plan::wait_for_others(Team* mine) {
  // Most waits are short: first without a pause, which is as long as a tenth of a message.
  for (int i = 0; i < 64; ++i)
    if (can_go_on(mine)) return;
  const auto start = Clock::now();
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (can_go_on(mine)) return;
      if (has_loops_ && take_part()) continue;
      core::relax_cpu();
    }
    const auto waited = Clock::now() - start;
    if (mine && waited >= options_.patience && adopt(mine)) return;
    if (mine && waited >= core::wakeup && missing_team(mine)) std::this_thread::yield();
    if (waited >= options_.spin && waited >= options_.patience)
      park([&] { return can_go_on(mine) || (has_loops_ && take_part()); });
  }
}

// Sleeps until notified, unless `ready`; it may wake for nothing.
template <class Ready> void Plan::park(Ready ready) {
  ++parked_;
  const uint32_t seen = event_;
  if (!ready()) event_.wait(seen);
  --parked_;
}

void Plan::notify() {
  if (parked_ == 0) return;
  ++event_;
  event_.notify_all();
}

}  // namespace pycodesign::branches
