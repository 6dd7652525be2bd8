#include "core/cuda.h"

#include <stdexcept>

#include "core/launch.cuh"

namespace pycodesign::core::cuda {
namespace {

// Of an error that nobody has to know: the next launch would report it as its own.
void forget(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
}

// While it lives, what this thread asks of the runtime disturbs no capture of another thread.
class BesideCaptures {
 public:
  BesideCaptures() { forget(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~BesideCaptures() { forget(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

std::string format_version(int version) {
  return version == 0 ? "none" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  forget(error);
  return error == cudaSuccess ? count : 0;
}

std::string absence() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  forget(error);
  if (error == cudaSuccess && count > 0) return "";
  const std::string cpu = "; the CPU kernels work without it";
  switch (error) {
    case cudaSuccess:
    case cudaErrorNoDevice: return "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES" + cpu;
    case cudaErrorInsufficientDriver:
      if (driver_version() == "none") return "no CUDA driver: install the NVIDIA driver" + cpu;
      return "the CUDA driver serves CUDA " + driver_version() + ", this build needs " + runtime_version() +
             ": update the NVIDIA driver" + cpu;
    default: return std::string("CUDA does not start (") + cudaGetErrorString(error) + ")" + cpu;
  }
}

std::string runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return format_version(version);
}

std::string driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return format_version(version);
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

DeviceProperties device_properties(int device) {
  const int count = device_count();
  if (count == 0) throw std::runtime_error(absence());
  if (device < 0 || device >= count) {
    throw std::invalid_argument("device: expected 0 to " + std::to_string(count - 1) + ", got " +
                                std::to_string(device));
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device));
  return {properties.name,
          properties.major,
          properties.minor,
          properties.multiProcessorCount,
          properties.totalGlobalMem,
          static_cast<std::size_t>(properties.l2CacheSize),
          properties.sharedMemPerBlockOptin};
}

DeviceBuffer::~DeviceBuffer() {
  if (!data_) return;
  const BesideCaptures here;
  forget(cudaFree(data_));  // an error, too, where CUDA is gone, as in a forked process
}

void DeviceBuffer::fill(const void* data, std::size_t bytes) {
  if (bytes == 0) return;
  const BesideCaptures here;
  check(cudaMalloc(&data_, bytes));
  check(cudaMemcpy(data_, data, bytes, cudaMemcpyHostToDevice));
  check(cudaStreamSynchronize(nullptr));  // a copy of pageable memory may return before its last bytes are there
  bytes_ = bytes;
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check(cudaGetDevice(&before_));
  if (device_ != before_) check(cudaSetDevice(device_));
}

DeviceGuard::~DeviceGuard() {
  if (device_ != before_) forget(cudaSetDevice(before_));
}

}  // namespace pycodesign::core::cuda
