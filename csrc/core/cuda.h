#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace pycodesign::core::cuda {

struct DeviceProperties {
  std::string name;
  int capability_major;
  int capability_minor;
  int multiprocessors;
  std::size_t memory_bytes;
  std::size_t l2_bytes;
  std::size_t shared_bytes_per_block;  // with opt-in
};

int device_count();             // 0 where there is no driver or no device; never throws
std::string absence();          // why device_count() is 0, one sentence; empty where there are devices
std::string runtime_version();  // of the runtime inside this module, e.g. "13.0"
std::string driver_version();   // the newest CUDA version that the driver serves; "none" without a driver

int current_device();  // of this thread

// Throws std::runtime_error with absence() where there is no device, std::invalid_argument for one that does not exist.
DeviceProperties device_properties(int device);

// Memory of the device that is current when it is filled, as whole for every stream once it is.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer();  // waits for kernels that run
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void fill(const void* data, std::size_t bytes);  // once
  template <class T> void fill(const std::vector<T>& values) { fill(values.data(), values.size() * sizeof(T)); }
  template <class T> const T* as() const { return static_cast<const T*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Makes a device the current one of this thread for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

}  // namespace pycodesign::core::cuda
