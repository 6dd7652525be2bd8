#include "core/cpu.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace pycodesign::core {
namespace {

constexpr Isa all_isas[] = {Isa::scalar, Isa::avx2, Isa::avx2_vnni, Isa::avx512, Isa::avx512_vbmi, Isa::avx512_amx};

#if defined(__x86_64__)

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf read_cpuid(unsigned leaf, unsigned subleaf = 0) {
  CpuidLeaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros when the leaf does not exist
  return r;
}

// Register files the operating system saves on a context switch (XCR0).
unsigned read_saved_state() {
  unsigned eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

// Linux keeps the registers of tiles for processes that ask for them (8 KiB a thread).
bool may_use_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, as in asm/prctl.h since 5.16
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

std::vector<Isa> detect_isas() {
  auto all = [](unsigned reg, std::initializer_list<unsigned> bits) {
    return std::all_of(bits.begin(), bits.end(), [reg](unsigned bit) { return reg >> bit & 1; });
  };
  std::vector<Isa> found = {Isa::scalar};
  const CpuidLeaf basic = read_cpuid(1), extended = read_cpuid(7);
  constexpr unsigned fma = 12, osxsave = 27, avx = 28, f16c = 29;
  if (!all(basic.ecx, {fma, osxsave, avx, f16c})) return found;

  const unsigned saved = read_saved_state();
  constexpr unsigned xmm = 1, ymm = 2, opmask = 5, zmm_low = 6, zmm_high = 7;
  constexpr unsigned avx2 = 5;
  if (!all(saved, {xmm, ymm}) || !all(extended.ebx, {avx2})) return found;
  found.push_back(Isa::avx2);

  constexpr unsigned avx_vnni = 4;
  if (extended.eax >= 1 && all(read_cpuid(7, 1).eax, {avx_vnni})) found.push_back(Isa::avx2_vnni);

  constexpr unsigned f = 16, dq = 17, bw = 30, vl = 31;  // ebx
  constexpr unsigned vbmi = 1, vnni = 11;                // ecx
  if (!all(saved, {opmask, zmm_low, zmm_high}) || !all(extended.ebx, {f, dq, bw, vl}) || !all(extended.ecx, {vnni}))
    return found;
  found.push_back(Isa::avx512);
  if (!all(extended.ecx, {vbmi})) return found;
  found.push_back(Isa::avx512_vbmi);

  constexpr unsigned amx_bf16 = 22, amx_tile = 24, amx_int8 = 25;  // edx
  constexpr unsigned tile_config = 17, tile_data = 18;
  if (all(extended.edx, {amx_bf16, amx_tile, amx_int8}) && all(saved, {tile_config, tile_data}) && may_use_tiles())
    found.push_back(Isa::avx512_amx);
  return found;
}

#else

std::vector<Isa> detect_isas() { return {Isa::scalar}; }

#endif

template <class Isas> std::string join_names(const Isas& isas) {
  std::string names;
  for (Isa isa : isas) names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  return names;
}

Isa parse_isa(std::string_view argument, std::string_view name) {
  const std::string got = std::string(argument) + ": expected one of ";
  const auto* isa = std::find_if(std::begin(all_isas), std::end(all_isas), [&](Isa i) { return name == isa_name(i); });
  if (isa == std::end(all_isas))
    throw std::invalid_argument(got + join_names(all_isas) + ", got '" + std::string(name) + "'");
  const std::vector<Isa> supported = supported_isas();
  if (std::find(supported.begin(), supported.end(), *isa) == supported.end())
    throw std::invalid_argument(got + join_names(supported) + ", got '" + std::string(name) +
                                "', which this processor does not support");
  return *isa;
}

constexpr int isa_unset = -1;
std::atomic<int> current_isa = isa_unset;

// The processors this thread may run on, ascending.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  for (int capacity = 1024; capacity <= 1 << 18; capacity *= 2) {  // too small a mask fails with EINVAL
    cpu_set_t* set = CPU_ALLOC(capacity);
    if (!set) break;
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    for (int cpu = 0; ok && cpu < capacity; ++cpu)
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    CPU_FREE(set);
    if (ok) break;
  }
  return cpus;
}

int first_allowed_cpu() {
  const std::vector<int> cpus = allowed_cpus();
  return cpus.empty() ? 0 : cpus.front();
}

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

size_t read_cache_size(int level) {
  const std::string directory = "/sys/devices/system/cpu/cpu" + std::to_string(first_allowed_cpu()) + "/cache/index";
  for (int index = 0;; ++index) {
    const std::string entry = directory + std::to_string(index);
    const std::string found_level = read_line(entry + "/level");
    if (found_level.empty()) return 0;
    if (found_level != std::to_string(level) || read_line(entry + "/type") == "Instruction") continue;
    char* unit = nullptr;
    const std::string size = read_line(entry + "/size");
    const size_t number = std::strtoull(size.c_str(), &unit, 10);
    return number << (*unit == 'G' ? 30 : *unit == 'M' ? 20 : *unit == 'K' ? 10 : 0);
  }
}

size_t find_cache_size(int level, int sysconf_name, size_t fallback) {
  if (const size_t size = read_cache_size(level)) return size;
  const long size = sysconf(sysconf_name);
  return size > 0 ? static_cast<size_t>(size) : fallback;
}

// Quota over period of one cgroup directory; 0 when unlimited or absent.
double read_quota(const std::string& directory) {
  std::string quota, period;
  std::istringstream version2(read_line(directory + "/cpu.max"));
  if (!(version2 >> quota >> period)) {
    quota = read_line(directory + "/cpu.cfs_quota_us");
    period = read_line(directory + "/cpu.cfs_period_us");
  }
  const double q = std::atof(quota.c_str()), p = std::atof(period.c_str());  // "max" and "" read as 0, v1 has -1
  return q > 0 && p > 0 ? q / p : 0;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx2_vnni: return "avx2_vnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512_vbmi: return "avx512_vbmi";
    case Isa::avx512_amx: return "avx512_amx";
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  static const std::vector<Isa> supported = detect_isas();
  return supported;
}

Isa active_isa() {
  int isa = current_isa.load(std::memory_order_relaxed);
  if (isa == isa_unset) {
    const char* forced = std::getenv("PYCODESIGN_ISA");
    const Isa initial = forced && *forced ? parse_isa("PYCODESIGN_ISA", forced) : supported_isas().back();
    if (current_isa.compare_exchange_strong(isa, static_cast<int>(initial))) return initial;
  }
  return static_cast<Isa>(isa);
}

void set_isa(std::string_view name) { current_isa = static_cast<int>(parse_isa("name", name)); }

CacheSizes cache_sizes() {
  static const CacheSizes sizes = {find_cache_size(1, _SC_LEVEL1_DCACHE_SIZE, 32 << 10),
                                   find_cache_size(2, _SC_LEVEL2_CACHE_SIZE, 512 << 10),
                                   find_cache_size(3, _SC_LEVEL3_CACHE_SIZE, 8 << 20)};
  return sizes;
}

double cgroup_cpu_quota(const std::string& membership, const std::string& mount) {
  double limit = 0;
  std::ifstream lines(membership);
  for (std::string line; std::getline(lines, line);) {
    // "<id>:<controllers>:<path>": no controllers in version 2, "cpu" among them in version 1
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string root = controllers.empty() ? mount : mount + "/" + controllers;
    // Inside a container the path may name a directory only its host sees: then only the root is there.
    for (;; path.resize(path.rfind('/'))) {
      const double quota = read_quota(root + path);
      if (quota > 0 && (limit == 0 || quota < limit)) limit = quota;
      if (path.find('/') == std::string::npos) break;
    }
  }
  return limit;
}

int available_cores() {
  cpu_set_t few;  // usually enough, and no allocation
  const int allowed = sched_getaffinity(0, sizeof few, &few) == 0
                          ? CPU_COUNT(&few)
                          : std::max(1, static_cast<int>(allowed_cpus().size()));
  static const double quota = cgroup_cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");  // of many files, read once
  return quota > 0 && quota < allowed ? std::max(1, static_cast<int>(std::ceil(quota))) : allowed;
}

CoreKind core_kind() {
#if defined(__x86_64__)
  static const CoreKind kind = [] {
    const CpuidLeaf vendor = read_cpuid(0), signature = read_cpuid(1);
    constexpr unsigned amd = 0x68747541;  // "Auth", of "AuthenticAMD"
    const unsigned family = (signature.eax >> 8 & 0xf) + (signature.eax >> 20 & 0xff);
    if (vendor.ebx != amd) return CoreKind::other;
    if (family >= 0x1a) return CoreKind::zen5;
    const bool has_avx512 = read_cpuid(7).ebx >> 16 & 1;
    return family != 0x19 ? CoreKind::other : has_avx512 ? CoreKind::zen4 : CoreKind::zen3;
  }();
  return kind;
#else
  return CoreKind::other;
#endif
}

std::string cpu_name() {
  std::ifstream lines("/proc/cpuinfo");
  for (std::string line; std::getline(lines, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(std::min(line.size(), line.find(':') + 2));
  return "unknown";
}

}  // namespace pycodesign::core
