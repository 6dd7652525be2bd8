#include "core/executable_memory.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/aligned_buffer.h"

#if defined(__x86_64__) && defined(__linux__)
#include <strings.h>
#include <sys/mman.h>
#endif

namespace pycodesign::core {

#if defined(__x86_64__) && defined(__linux__)

ExecutableMemory::ExecutableMemory(std::span<const uint8_t> code, size_t spare) : size_(code.size()) {
  const auto fail = [](const char* what) {
    throw std::runtime_error(std::string("machine code: expected memory to execute it, but ") + what +
                             " failed: " + std::strerror(errno) + "; PYCODESIGN_JIT=0 does without");
  };
  // Code that runs once per call misses the TLB on every small page; its tables are cold as well.
  const bool is_huge = size_ >= huge_page / 4;
  const size_t unit = is_huge ? huge_page : 1;
  mapped_ = (size_ + spare + unit - 1) / unit * unit;
  const size_t room = mapped_ + (is_huge ? huge_page : 0);
  void* const address = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) fail("mmap");
  data_ = static_cast<char*>(address);
  if (is_huge) {
    const size_t before = -reinterpret_cast<uintptr_t>(address) % huge_page;
    if (before) munmap(data_, before);
    data_ += before;
    if (before < huge_page) munmap(data_ + mapped_, huge_page - before);
    madvise(data_, mapped_, MADV_HUGEPAGE);
  }
  std::memcpy(data_, code.data(), size_);
  if (mprotect(data_, mapped_, PROT_READ | PROT_EXEC) == 0) return;
  const int error = errno;
  munmap(data_, mapped_);
  errno = error;
  fail("mprotect");
}

ExecutableMemory::~ExecutableMemory() { munmap(data_, mapped_); }

bool ExecutableMemory::available() {
  static const bool decided = [] {
    if (const char* text = std::getenv("PYCODESIGN_JIT"))
      if (std::ranges::none_of(std::array{"", "1", "on", "true", "yes"},
                               [&](const char* on) { return strcasecmp(text, on) == 0; }))
        return false;
    constexpr uint8_t ret[] = {0xc3};
    try {
      const ExecutableMemory memory(ret);
      std::bit_cast<void (*)()>(memory.data())();
      return true;
    } catch (const std::runtime_error&) {
      return false;
    }
  }();
  return decided;
}

#else

ExecutableMemory::ExecutableMemory(std::span<const uint8_t>, size_t) {
  throw std::runtime_error("machine code: expected x86-64 Linux; other systems do without");
}
ExecutableMemory::~ExecutableMemory() = default;
bool ExecutableMemory::available() { return false; }

#endif

}  // namespace pycodesign::core
