// Checks that say what failed and let the rest of the test run; main() returns check::report().
#pragma once

#include <atomic>
#include <cstdio>
#include <sstream>
#include <string>

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
