// Whole numbers of parts.
#pragma once

#include <cstdint>

namespace pycodesign::core {

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t step) { return divide_up(n, step) * step; }

}  // namespace pycodesign::core
