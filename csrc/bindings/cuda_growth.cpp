#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "bindings/arrays.h"
#include "bindings/device_array.h"
#include "core/cuda.h"
#include "growth/cuda.h"

namespace pycodesign::bindings {

namespace {

using growth::DType, growth::Expansion;

DType parse_element(const DeviceArray& w, bool has_scale) {
  if (has_scale) {
    if (w.dtype == "float16") return DType::f16;
    if (w.dtype == "bfloat16") return DType::bf16;
    if (w.dtype == "float32") return DType::f32;
    if (w.dtype == "float64") return DType::f64;
    throw py::value_error("in_scale, out_scale: expected None for w of " + w.dtype + ", got an array");
  }
  switch (w.itemsize) {
    case 1: return DType::bytes1;
    case 2: return DType::bytes2;
    case 4: return DType::bytes4;
    case 8: return DType::bytes8;
    default: throw py::type_error("w: expected elements of 1, 2, 4 or 8 bytes, got " + w.dtype);
  }
}

// A vector that is apart from `out`; null where there is none.
const char* view_vector(const py::object& vector, const char* name, const std::string& dtype, int64_t size,
                        const DeviceArray& out) {
  if (vector.is_none()) return nullptr;
  const DeviceArray a = view_device_array(vector, name);
  check_device_array(a, name, dtype, {size}, "(" + std::to_string(size) + ",)");
  check_c_order(a, name);
  check_apart(out, a, name);
  return a.data;
}

void check_rows(const DeviceArray& out) {
  if (!out.data) return;
  int64_t natural = out.itemsize;
  for (size_t d = out.ndim() - 1; d > 0; natural *= out.shape[d--])
    if (out.shape[d] > 1 && out.stride[d] != natural)
      throw py::value_error("out: expected rows whose elements follow one another, got other strides");
  if (out.shape[0] > 1 && std::abs(out.stride[0]) < natural)
    throw py::value_error("out: expected rows apart from one another, got rows that overlap");
}

// A vector's elements are the columns of one row.
void add_row(DeviceArray& a) {
  a.shape.insert(a.shape.begin(), 1);
  a.stride.insert(a.stride.begin(), 0);
}

void expand(const py::object& w_, const py::object& out_index, const py::object& in_index, const py::object& in_scale,
            const py::object& out_scale, const py::object& out_, int device, uintptr_t stream) {
  DeviceArray w = view_device_array(w_, "w"), out = view_device_array(out_, "out");
  const bool is_vector = w.ndim() == 1;
  if (w.ndim() < 1 || w.ndim() > 4)
    throw py::value_error("w: expected 1 to 4 dimensions, got " + std::to_string(w.ndim()));
  if (is_vector && !(in_index.is_none() && in_scale.is_none()))
    throw py::value_error("in_index, in_scale: expected None for w " + show_shape(w.shape) + ", got an array");
  Expansion x{};
  x.dtype = parse_element(w, !in_scale.is_none() || !out_scale.is_none());
  check_device_array(out, "out", w.dtype, std::vector<int64_t>(w.ndim(), -1), "of as many dimensions as w");
  std::vector<int64_t> shape = w.shape;
  shape[0] = out.shape[0];
  if (!in_index.is_none()) shape[1] = out.shape[1];
  check_device_array(out, "out", w.dtype, shape);
  check_writeable(out);
  check_apart(out, w, "w");
  const std::string scale = x.dtype == DType::f64 ? "float64" : "float32";
  const int64_t columns = is_vector ? 0 : shape[1];
  const char* rows = view_vector(out_index, "out_index", "int64", shape[0], out);
  x.in_index = reinterpret_cast<const int64_t*>(view_vector(in_index, "in_index", "int64", columns, out));
  x.in_scale = view_vector(in_scale, "in_scale", scale, columns, out);
  x.out_scale = view_vector(out_scale, "out_scale", scale, shape[0], out);
  x.out_index = reinterpret_cast<const int64_t*>(rows);
  if (is_vector) {
    add_row(w);
    add_row(out);
    std::swap(x.out_index, x.in_index);
    std::swap(x.out_scale, x.in_scale);
  }
  check_rows(out);
  x.w = w.data;
  x.shape = {1, 1, 1, 1};
  std::copy(w.shape.begin(), w.shape.end(), x.shape.begin());
  std::copy(w.stride.begin(), w.stride.end(), x.stride.begin());
  x.rows = out.shape[0];
  x.columns = out.shape[1];
  x.out = out.data;
  x.row_stride = out.stride[0];
  const core::cuda::DeviceGuard guard(device);
  without_gil([&] { growth::cuda::expand(x, reinterpret_cast<void*>(stream)); });
}

}  // namespace

void bind_cuda_growth(py::module_& m) {
  m.def("expand", &expand, py::arg("w"), py::arg("out_index"), py::arg("in_index"), py::arg("in_scale"),
        py::arg("out_scale"), py::arg("out"), py::arg("device"), py::arg("stream"));
}

}  // namespace pycodesign::bindings
