// Names of generated code for `perf`. With PYCODESIGN_JITDUMP=1 in the environment, or a folder instead of 1, the file
// jit-PID.dump there (or in the working directory) records every piece; `perf inject --jit` reads it.
#pragma once

#include <span>
#include <string>

namespace pycodesign::core {

bool records_code();  // decided once

// Throws std::invalid_argument if the file cannot be written.
void record_code(std::span<const char> code, const std::string& name);

}  // namespace pycodesign::core
