#include "bindings/device_array.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace pycodesign::bindings {
namespace {

std::string parse_dtype(const std::string& typestr, const char* name) {
  const std::string wanted = std::string(name) + ": expected numbers in native order, got ";
  if (typestr.size() < 3 || typestr[0] == '>') throw py::type_error(wanted + typestr);
  const int bytes = std::atoi(typestr.c_str() + 2);
  const std::string bits = std::to_string(8 * bytes);
  switch (typestr[1]) {
    case 'f': return "float" + bits;
    case 'i': return "int" + bits;
    case 'u': return "uint" + bits;
    case 'c': return "complex" + bits;
    case 'b': return "bool";
    case 'V':
      if (bytes <= 2) return bytes == 2 ? "bfloat16" : "float8";
      [[fallthrough]];
    default: throw py::type_error(wanted + typestr);
  }
}

std::string describe(const DeviceArray& a) { return a.dtype + " " + show_shape(a.shape); }

// First and one-past-last byte that an array can touch.
std::pair<const char*, const char*> extent(const DeviceArray& a) {
  const char *low = a.data, *high = a.data + a.itemsize;
  for (size_t d = 0; d < a.ndim(); ++d) (a.stride[d] < 0 ? low : high) += a.stride[d] * (a.shape[d] - 1);
  return {low, high};
}

}  // namespace

int64_t DeviceArray::size() const {
  int64_t size = 1;
  for (const int64_t n : shape) size *= n;
  return size;
}

std::string show_shape(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

DeviceArray view_device_array(const py::object& array, const char* name) {
  py::object found = array;
  if (!py::isinstance<py::dict>(array)) {
    if (!py::hasattr(array, "__cuda_array_interface__"))
      throw py::type_error(std::string(name) + ": expected an array on a CUDA device, got " +
                           py::str(py::type::of(array).attr("__name__")).cast<std::string>());
    found = array.attr("__cuda_array_interface__");
  }
  const auto interface = py::cast<py::dict>(found);
  DeviceArray a;
  const auto typestr = interface["typestr"].cast<std::string>();
  a.dtype = parse_dtype(typestr, name);
  a.itemsize = std::atoi(typestr.c_str() + 2);
  if (a.itemsize < 1)
    throw py::type_error(std::string(name) + ": expected a typestr such as '<f4', got '" + typestr + "'");
  a.shape = interface["shape"].cast<std::vector<int64_t>>();
  const auto data = py::cast<py::tuple>(interface["data"]);
  a.is_writeable = !data[1].cast<bool>();
  const py::object strides = interface.contains("strides") ? py::object(interface["strides"]) : py::object(py::none());
  if (strides.is_none()) {
    a.stride.resize(a.ndim());
    int64_t stride = a.itemsize;
    for (size_t d = a.ndim(); d-- > 0; stride *= a.shape[d]) a.stride[d] = stride;
  } else {
    a.stride = strides.cast<std::vector<int64_t>>();
  }
  if (a.stride.size() != a.ndim() || std::any_of(a.shape.begin(), a.shape.end(), [](int64_t n) { return n < 0; }))
    throw py::value_error(std::string(name) + ": expected a stride for each size, got others");
  if (a.size() == 0) return a;
  const auto address = data[0].cast<uintptr_t>();
  bool is_aligned = address && address % static_cast<uintptr_t>(a.itemsize) == 0;
  for (const int64_t stride : a.stride) is_aligned &= stride % a.itemsize == 0;
  if (!is_aligned)
    throw py::value_error(std::string(name) + ": expected elements aligned in memory, got an unaligned view");
  a.data = reinterpret_cast<char*>(address);
  return a;
}

void check_device_array(const DeviceArray& a, const char* name, const std::string& dtype,
                        const std::vector<int64_t>& sizes, const std::string& text) {
  const bool dtype_fits = dtype.empty() || a.dtype == dtype;
  bool fits = a.ndim() == sizes.size();
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = sizes[d] < 0 || sizes[d] == a.shape[d];
  if (dtype_fits && fits) return;
  const std::string what =
      std::string(name) + ": expected " + dtype + (dtype.empty() ? "" : " ") + text + ", got " + describe(a);
  if (!dtype_fits) throw py::type_error(what);
  throw py::value_error(what);
}

void check_device_array(const DeviceArray& a, const char* name, const std::string& dtype,
                        const std::vector<int64_t>& sizes) {
  check_device_array(a, name, dtype, sizes, show_shape(sizes));
}

void check_c_order(const DeviceArray& a, const char* name) {
  int64_t natural = a.itemsize;
  for (size_t d = a.ndim(); d-- > 0; natural *= a.shape[d])
    if (a.data && a.shape[d] > 1 && a.stride[d] != natural)
      throw py::value_error(std::string(name) + ": expected elements one after another, got other strides");
}

void check_writeable(const DeviceArray& out) {
  bool repeats = false;
  for (size_t d = 0; d < out.ndim(); ++d) repeats |= out.stride[d] == 0 && out.shape[d] > 1;
  if (out.data && (!out.is_writeable || repeats))
    throw py::value_error("out: expected a writeable array, got a read-only or broadcast one");
}

void check_apart(const DeviceArray& out, const DeviceArray& other, const char* name) {
  if (!out.data || !other.data) return;
  const auto [a, b] = extent(out);
  const auto [c, d] = extent(other);
  if (a < d && c < b)
    throw py::value_error(std::string("out: expected memory apart from ") + name + ", got an array that overlaps it");
}

}  // namespace pycodesign::bindings
