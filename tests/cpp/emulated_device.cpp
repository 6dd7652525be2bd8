// core/cuda.cu of the emulated module: one device, in the host's memory.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "core/cuda.h"

namespace pycodesign::core::cuda {

int device_count() { return 1; }
std::string absence() { return ""; }
std::string runtime_version() { return "emulated"; }
std::string driver_version() { return "emulated"; }

int current_device() { return 0; }

DeviceProperties device_properties(int device) {
  if (device != 0) throw std::invalid_argument("device: expected 0 to 0, got " + std::to_string(device));
  return {"emulated", 9, 0, 132, 1 << 30, 1 << 20, 227 << 10};  // so many multiprocessors that sums are cut
}

DeviceBuffer::~DeviceBuffer() { std::free(data_); }

void DeviceBuffer::fill(const void* data, std::size_t bytes) {
  if (bytes == 0) return;
  data_ = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memcpy(data_, data, bytes);
  bytes_ = bytes;
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
  if (device != 0) throw std::runtime_error("CUDA: invalid device ordinal");
}
DeviceGuard::~DeviceGuard() = default;

}  // namespace pycodesign::core::cuda
