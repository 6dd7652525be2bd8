#!/usr/bin/env bash
# Builds the C++ tests for aarch64 and runs them under QEMU: the portable kernels without an ARM machine. QEMU on
# x86-64 keeps the memory order of x86-64, so races that only ARM's weaker one has do not show.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  if ! command -v "$tool" >/dev/null; then
    echo "aarch64 tests skipped: no $tool; Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user"
    exit
  fi
done

cmake --preset aarch64
cmake --build --preset aarch64
ctest --preset aarch64
