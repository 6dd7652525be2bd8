// Machine code made at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pycodesign::core {

// A copy of bytes that can be executed, and no more written: at no time are both allowed.
class ExecutableMemory {
 public:
  // `spare` bytes behind the code can be read.
  explicit ExecutableMemory(std::span<const uint8_t> code,
                            size_t spare = 0);  // throws std::runtime_error naming what failed
  ~ExecutableMemory();
  ExecutableMemory(const ExecutableMemory&) = delete;
  ExecutableMemory& operator=(const ExecutableMemory&) = delete;

  // Whether this process may execute what it writes; false on other systems than x86-64 Linux and when the environment
  // has PYCODESIGN_JIT=0, or anything but 1, on, true and yes. Decided once.
  static bool available();

  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
};

}  // namespace pycodesign::core
