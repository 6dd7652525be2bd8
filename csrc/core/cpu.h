// What the processor can do and how much of it this process may use.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace pycodesign::core {

// A level includes those before it, except that the AVX-512 levels do not need AVX-VNNI.
enum class Isa {
  scalar,
  avx2,         // AVX2, FMA, F16C
  avx2_vnni,    // + AVX-VNNI
  avx512,       // F, BW, VL, DQ, VNNI
  avx512_vbmi,  // + VBMI
  avx512_amx,   // + AMX tiles of int8 and bfloat16
};

const char* isa_name(Isa isa);

// Levels this processor and its operating system support, ascending; scalar always is.
std::vector<Isa> supported_isas();

// The level kernels are chosen for: the last set_isa(), else PYCODESIGN_ISA, else the best one.
// Throws std::invalid_argument when PYCODESIGN_ISA is unknown or unsupported.
Isa active_isa();

// Throws std::invalid_argument when `name` is unknown or unsupported.
void set_isa(std::string_view name);

// Bytes; of one core, except that l3 may be shared. Typical sizes where the system does not tell.
struct CacheSizes {
  size_t l1d, l2, l3;
};
CacheSizes cache_sizes();

// Cores in the affinity mask, limited by the cgroup CPU quota rounded up; at least 1.
int available_cores();

// CPU quota in cores of the cgroups listed in `membership` (the format of /proc/self/cgroup, versions 1 and 2)
// and of their parents, below the mount point `mount`; 0 when there is no limit.
double cgroup_cpu_quota(const std::string& membership, const std::string& mount);

std::string cpu_name();

// Microarchitectures that cost models tell apart.
enum class CoreKind { other, zen3, zen4, zen5 };
CoreKind core_kind();

}  // namespace pycodesign::core
