#include "emulated_cuda.h"

#include <cmath>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> 4 * i & 15, byte = bytes >> 8 * (select & 7) & 255;
    result |= (select & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}

namespace pycodesign::core::cuda::emulated {
namespace {

constexpr std::size_t stack_bytes = 256 << 10, guard_bytes = 256, exchange_bytes = 128;
constexpr unsigned char guard = 0xa5;

// A stack to switch to.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
  const void* stack = nullptr;
  std::size_t size = 0;
};

#if defined(__x86_64__)
extern "C" void pycodesign_switch_stack(void** save, void* load);
asm(R"(
.text
.type pycodesign_switch_stack, @function
pycodesign_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size pycodesign_switch_stack, .-pycodesign_switch_stack
)");
#endif

void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.size);
#endif
#if defined(__x86_64__)
  pycodesign_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// A place where `expected` threads meet; `met` counts how often they did.
struct Meeting {
  unsigned expected = 0, arrived = 0;
  uint64_t met = 0;
  const char* what = "";
};

struct Warp {
  Meeting meeting;
  alignas(16) char exchange[2][warpSize * exchange_bytes];
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  uint3 index;
  bool done;
  const Meeting* waits_at;  // or null
  uint64_t waits_for;
  std::deque<std::vector<Copy>> copies;  // groups under way; the last one is open
  bool can_run() const { return !done && (!waits_at || waits_at->met != waits_for); }
};

struct Block {
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept, with their stacks, from block to block
  std::vector<Warp> warps;
  Meeting everyone;
  std::vector<unsigned char> shared;  // dynamic, aligned, between guards
  std::size_t shared_size = 0;
  unsigned threads = 0, current = 0;
  std::string error;
  const std::function<void()>* body = nullptr;
};

thread_local Block block;
thread_local uint64_t random_state = 1;

uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

Fiber& fiber() { return *block.fibers[block.current]; }
Warp& warp() { return block.warps[block.current / warpSize]; }

void leave() { switch_to(fiber().context, block.scheduler); }

[[noreturn]] void fail(std::string error) {
  block.error = std::move(error);  // nothing that this stack owns is ever destroyed
  for (;;) leave();
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.stack, &block.scheduler.size);
#endif
  (*block.body)();
  fiber().done = true;
  for (;;) leave();
}

void prepare(Context& context, char* stack) {
  context.stack = stack;
  context.size = stack_bytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack, stack_bytes);  // of threads that an error left behind
#endif
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + stack_bytes - 64) & ~uintptr_t{63});
  *--top = nullptr;  // enter() returns nowhere, and starts as if called: 8 bytes off an alignment of 16
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
  context.stack_pointer = top;
#else
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = stack_bytes;
  makecontext(&context.machine, enter, 0);
#endif
}

std::string name(const Fiber& fiber) {
  return "thread (" + std::to_string(fiber.index.x) + ", " + std::to_string(fiber.index.y) + ", " +
         std::to_string(fiber.index.z) + ") of block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

void meet(Meeting& meeting, const char* what) {
  if (meeting.arrived && std::strcmp(meeting.what, what) != 0)
    fail(name(fiber()) + " is at " + what + ", others of its warp at " + meeting.what);
  meeting.what = what;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.met;
    if (draw() % 2) return;  // now and then the last one goes on first
    return leave();
  }
  fiber().waits_at = &meeting;
  fiber().waits_for = meeting.met;
  leave();
  fiber().waits_at = nullptr;
}

void start_block(dim3 size) {
  block.everyone = {block.threads, 0, 0, ""};
  block.warps.assign((block.threads + warpSize - 1) / warpSize, {});
  for (unsigned w = 0; w < block.warps.size(); ++w)
    block.warps[w].meeting.expected = std::min<unsigned>(warpSize, block.threads - w * warpSize);
  while (block.fibers.size() < block.threads) block.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    fiber.done = false;
    fiber.waits_at = nullptr;
    fiber.copies.assign(1, {});
    prepare(fiber.context, fiber.stack.get());
  }
  block.shared.assign(block.shared_size + 2 * guard_bytes + 16, 0xff);  // NaN, -1
  std::memset(shared_bytes() - guard_bytes, guard, guard_bytes);
  std::memset(shared_bytes() + block.shared_size, guard, guard_bytes);
}

void run_block() {
  for (unsigned left = block.threads; left && block.error.empty();) {
    unsigned tries = 0;
    for (block.current = static_cast<unsigned>(draw() % block.threads); !fiber().can_run();
         block.current = (block.current + 1) % block.threads) {
      if (++tries < block.threads) continue;
      while (!fiber().waits_at) block.current = (block.current + 1) % block.threads;
      block.error = name(fiber()) + " waits forever at " + fiber().waits_at->what;
      return;
    }
    threadIdx = fiber().index;
    switch_to(block.scheduler, fiber().context);
    left -= fiber().done;
  }
}

void check_guards() {
  for (std::size_t i = 0; i < guard_bytes && block.error.empty(); ++i)
    if (shared_bytes()[block.shared_size + i] != guard || shared_bytes()[-1 - static_cast<std::ptrdiff_t>(i)] != guard)
      block.error = "write outside the dynamic shared memory of " + std::to_string(block.shared_size) + " bytes";
}

// The matrix unit: addends cut to one bit more than the largest one's 24, their sum cut to 24.
float add_truncated(const double* addends, int count) {
  double largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(addends[i]));
  double sum = 0;
  if (largest == 0 || !std::isfinite(largest)) {
    for (int i = 0; i < count; ++i) sum += addends[i];
    return static_cast<float>(sum);
  }
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  for (int i = 0; i < count; ++i) sum += std::isfinite(addends[i]) ? std::trunc(addends[i] / unit) * unit : addends[i];
  const float rounded = static_cast<float>(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafterf(rounded, 0.0f) : rounded;
}

}  // namespace

void set_seed(uint64_t seed) { random_state = seed * 2654435769u + 1; }
int lane() { return static_cast<int>(block.current % warpSize); }
unsigned char* shared_bytes() {
  const auto address = reinterpret_cast<uintptr_t>(block.shared.data() + guard_bytes);
  return reinterpret_cast<unsigned char*>((address + 15) & ~uintptr_t{15});
}

void run(dim3 grid, dim3 size, std::size_t shared_size, const std::function<void()>& thread) {
  block.threads = size.x * size.y * size.z;
  if (block.threads == 0 || block.threads > 1024 || shared_size > 227 << 10 || grid.y > 65535 || grid.z > 65535 ||
      grid.x == 0 || grid.y == 0 || grid.z == 0)
    throw std::logic_error("launch: expected a grid, 1 to 1024 threads and at most 227 KiB of shared memory");
  block.shared_size = shared_size;
  block.body = &thread;
  blockDim = size;
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        start_block(size);
        run_block();
        check_guards();
        if (!block.error.empty()) throw std::logic_error(std::exchange(block.error, ""));
      }
}

void check_aligned(const void* pointer, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    fail("__ldg: expected an address aligned to " + std::to_string(bytes) + " bytes");
}

void block_barrier() { meet(block.everyone, "barrier"); }

const void* gather_bytes(const char* what, const void* mine, std::size_t bytes) {
  Meeting& meeting = warp().meeting;
  if (bytes > exchange_bytes || meeting.expected != warpSize)
    fail(std::string(what) + ": expected a whole warp and at most 128 bytes a lane");
  char* exchange = warp().exchange[meeting.met % 2];  // no lane is two meetings ahead of another
  std::memcpy(exchange + static_cast<std::size_t>(lane()) * bytes, mine, bytes);
  meet(meeting, what);
  return exchange;
}

void copy_async(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    fail("copy_async: expected addresses aligned to 16 bytes");
  fiber().copies.back().push_back({to, from, valid});
}
void copy_commit() { fiber().copies.emplace_back(); }
void copy_wait(int groups) {
  for (auto& copies = fiber().copies; copies.size() > static_cast<std::size_t>(groups) + 1; copies.pop_front())
    for (const Copy& copy : copies.front())
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
}

void load_matrices(uint32_t (&word)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("load_matrices: expected rows aligned to 16 bytes");
  const void* const* rows = gather("load_matrices", row);
  for (int m = 0; m < 4; ++m)
    std::memcpy(&word[m], static_cast<const char*>(rows[8 * m + lane() / 4]) + lane() % 4 * 4, 4);
}

struct Fragments {
  uint32_t a[4], b[2];
};

void multiply_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fragments* of = gather("multiply_s8", Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4, half = i / 2, column = lane() % 4 * 2 + i % 2;
    uint32_t sum = static_cast<uint32_t>(c[i]);
    for (int k = 0; k < 32; ++k) {
      const auto x = static_cast<int8_t>(of[4 * row + k / 4 % 4].a[k / 16 * 2 + half] >> k % 4 * 8);
      const auto w = static_cast<int8_t>(of[4 * column + k / 4 % 4].b[k / 16] >> k % 4 * 8);
      sum += static_cast<uint32_t>(x * w);
    }
    c[i] = static_cast<int32_t>(sum);
  }
}

void multiply_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t)) {
  const Fragments* of = gather("multiply_16", Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4, half = i / 2, column = lane() % 4 * 2 + i % 2;
    double addends[17];
    addends[16] = static_cast<double>(c[i]);
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = of[4 * row + k / 2 % 4].a[k / 8 * 2 + half] >> k % 2 * 16;
      const uint32_t w = of[4 * column + k / 2 % 4].b[k / 8] >> k % 2 * 16;
      addends[k] = static_cast<double>(to_float(static_cast<uint16_t>(x))) * to_float(static_cast<uint16_t>(w));
    }
    c[i] = add_truncated(addends, 17);
  }
}

}  // namespace pycodesign::core::cuda::emulated
