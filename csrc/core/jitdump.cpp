#include "core/jitdump.h"

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "core/fork_guard.h"

namespace pycodesign::core {

#if defined(__x86_64__) && defined(__linux__)

namespace {

const std::string& folder() {  // empty: not asked for
  static const std::string decided = [] {
    const char* text = std::getenv("PYCODESIGN_JITDUMP");
    const std::string value = text ? text : "";
    return value == "0" ? "" : value == "1" ? "." : value;
  }();
  return decided;
}

// As in tools/perf/Documentation/jitdump-specification.txt of the Linux sources.
struct FileHeader {
  uint32_t magic = 0x4a695444, version = 1, size = sizeof(FileHeader), machine = EM_X86_64, padding = 0, process;
  uint64_t time, flags = 0;
};

struct LoadRecord {  // followed by the name, ended by a zero, and the code
  uint32_t kind = 0, size;
  uint64_t time;
  uint32_t process, thread;
  uint64_t virtual_address, address, code_size, number;
};

uint64_t now() {  // perf record --clockid mono
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000 + static_cast<uint64_t>(t.tv_nsec);
}

// The file of one process.
struct Dump {
  pid_t process = 0;
  int file = -1;
  uint64_t records = 0;

  void open_for(pid_t pid) {
    const std::string path = folder() + "/jit-" + std::to_string(pid) + ".dump";
    if (file >= 0) close(file);  // a fork's parent goes on writing its own
    file = open(path.c_str(), O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0666);
    if (file < 0) fail("open");
    records = 0;
    const FileHeader header{.process = static_cast<uint32_t>(pid), .time = now()};
    append({reinterpret_cast<const char*>(&header), sizeof header});
    // perf notes what is mapped executable, and so finds the file.
    if (mmap(nullptr, sizeof header, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0) == MAP_FAILED) fail("mmap");
    process = pid;
  }
  void append(std::span<const char> bytes) const {
    while (!bytes.empty()) {
      const ssize_t written = write(file, bytes.data(), bytes.size());
      if (written >= 0) bytes = bytes.subspan(static_cast<size_t>(written));
      else if (errno != EINTR) fail("write");
    }
  }
  [[noreturn]] static void fail(const char* what) {
    throw std::invalid_argument("PYCODESIGN_JITDUMP: expected 1 or a folder to write in, got " + folder() + ", where " +
                                what + " failed: " + std::strerror(errno));
  }
};

}  // namespace

bool records_code() { return !folder().empty(); }

void record_code(std::span<const char> code, const std::string& name) {
  static std::mutex mutex;
  static Dump dump;
  const ForkGuard lock(mutex);
  if (const pid_t pid = getpid(); dump.process != pid) dump.open_for(pid);
  const auto address = reinterpret_cast<uint64_t>(code.data());
  const LoadRecord record{.size = static_cast<uint32_t>(sizeof(LoadRecord) + name.size() + 1 + code.size()),
                          .time = now(),
                          .process = static_cast<uint32_t>(dump.process),
                          .thread = static_cast<uint32_t>(syscall(SYS_gettid)),
                          .virtual_address = address,
                          .address = address,
                          .code_size = code.size(),
                          .number = dump.records++};
  dump.append({reinterpret_cast<const char*>(&record), sizeof record});
  dump.append({name.c_str(), name.size() + 1});
  dump.append(code);
}

#else

bool records_code() { return false; }
void record_code(std::span<const char>, const std::string&) {}

#endif

}  // namespace pycodesign::core
