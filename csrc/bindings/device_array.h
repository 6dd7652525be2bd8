// Views of arrays in a GPU's memory: checked here, never converted.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace pycodesign::bindings {

namespace py = pybind11;

struct DeviceArray {
  char* data = nullptr;                // null when it is empty
  std::vector<int64_t> shape, stride;  // strides in bytes
  std::string dtype;                   // as NumPy names it, "bfloat16" and "float8" besides
  int64_t itemsize = 0;
  bool is_writeable = false;

  size_t ndim() const { return shape.size(); }
  int64_t size() const;
  template <class T> const T* as() const { return reinterpret_cast<const T*>(data); }
};

// From an object with `__cuda_array_interface__`, version 2 or 3, or from such a dict. Its typestr may be <V2 and <V1,
// which stand for bfloat16 and 8-bit floats.
DeviceArray view_device_array(const py::object& array, const char* name);

std::string show_shape(const std::vector<int64_t>& shape);

// -1 stands for any size, spelled by `text`. An empty dtype stands for any.
void check_device_array(const DeviceArray& a, const char* name, const std::string& dtype,
                        const std::vector<int64_t>& sizes, const std::string& text);
void check_device_array(const DeviceArray& a, const char* name, const std::string& dtype,
                        const std::vector<int64_t>& sizes);

void check_c_order(const DeviceArray& a, const char* name);
void check_writeable(const DeviceArray& out);
void check_apart(const DeviceArray& out, const DeviceArray& other, const char* name);

}  // namespace pycodesign::bindings
