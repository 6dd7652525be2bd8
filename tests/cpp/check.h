// Checks that say what failed and let the rest of the test run; main() returns check::report().
#pragma once

#include <atomic>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "core/cpu.h"

namespace check {

inline std::atomic<int> failures = 0;

inline void fail(const char* file, int line, const std::string& what) {
  ++failures;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <class A, class B>
void equal(const A& got, const B& expected, const char* expression, const char* file, int line) {
  if (got == expected) return;
  std::ostringstream what;
  what << expression << ": expected " << expected << ", got " << got;
  fail(file, line, what.str());
}

// Instruction sets and thread counts to test. What the thread sanitizer looks for takes several threads, and is the
// same for all vectors.
#ifdef __SANITIZE_THREAD__
inline constexpr bool only_threads = true;
#else
inline constexpr bool only_threads = false;
#endif
inline std::vector<pycodesign::core::Isa> isas() {
  const std::vector<pycodesign::core::Isa> all = pycodesign::core::supported_isas();
  return only_threads ? std::vector{all.front(), all.back()} : all;
}
inline std::vector<int> threads(std::vector<int> all) { return only_threads ? std::vector{all.back()} : all; }

inline int report() {
  if (failures) std::fprintf(stderr, "%d checks failed\n", failures.load());
  return failures ? 1 : 0;
}

}  // namespace check

#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, "not true: " #condition))
#define CHECK_EQUAL(got, expected) check::equal(got, expected, #got, __FILE__, __LINE__)

// The statement throws `Exception` and its message contains `part`.
#define CHECK_THROWS(statement, Exception, part)                                                             \
  try {                                                                                                      \
    statement;                                                                                               \
    check::fail(__FILE__, __LINE__, "did not throw: " #statement);                                           \
  } catch (const Exception& error) {                                                                         \
    if (std::string(error.what()).find(part) == std::string::npos)                                           \
      check::fail(__FILE__, __LINE__, std::string("unexpected message of " #statement ": ") + error.what()); \
  }
