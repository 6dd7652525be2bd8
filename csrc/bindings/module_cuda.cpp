#include <pybind11/pybind11.h>

#include "core/cuda.h"

namespace py = pybind11;
namespace cuda = pycodesign::core::cuda;

namespace pycodesign::bindings {
void bind_cuda_growth(py::module_&);
void bind_cuda_repetition(py::module_&);
void bind_cuda_sharing(py::module_&);
}  // namespace pycodesign::bindings

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA backend. Loads without a driver, and then sees no device.";
  module.def("device_count", &cuda::device_count, "Number of CUDA devices; 0 without a driver.");
  module.def("absence", &cuda::absence, "Why there is no CUDA device, in one sentence; empty where there is one.");
  module.def("current_device", &cuda::current_device, "Index of this thread's current device.");
  module.def(
      "device_properties",
      [](int device) {
        const cuda::DeviceProperties properties = cuda::device_properties(device);
        py::dict result;
        result["name"] = properties.name;
        result["capability"] = py::make_tuple(properties.capability_major, properties.capability_minor);
        result["multiprocessors"] = properties.multiprocessors;
        result["memory_bytes"] = properties.memory_bytes;
        result["l2_bytes"] = properties.l2_bytes;
        result["shared_bytes_per_block"] = properties.shared_bytes_per_block;
        return result;
      },
      py::arg("device"), "Name, capability (major, minor), multiprocessors and sizes in bytes of one device.");
  module.def(
      "build_info",
      [] {
        py::dict result;
        result["runtime"] = cuda::runtime_version();
        result["driver"] = cuda::driver_version();
        result["architectures"] = PYCODESIGN_CUDA_ARCHITECTURES;
        return result;
      },
      "Versions of the CUDA runtime in this module and of the driver, and the architectures compiled for.");
  pycodesign::bindings::bind_cuda_growth(module);
  pycodesign::bindings::bind_cuda_repetition(module);
  pycodesign::bindings::bind_cuda_sharing(module);
}
