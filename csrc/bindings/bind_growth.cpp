#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>

#include "bindings/arrays.h"
#include "growth/growth.h"

namespace pycodesign::bindings {

namespace {

using growth::DType, growth::Expansion;

// What the kernel is told about elements that `name` calls by their dtype; without scales they are bytes.
DType parse_element(const std::string& name, py::ssize_t bytes, bool has_scale) {
  if (has_scale) {
    if (name == "float16") return DType::f16;
    if (name == "bfloat16") return DType::bf16;
    if (name == "float32") return DType::f32;
    if (name == "float64") return DType::f64;
    throw py::value_error("in_scale, out_scale: expected None for w of " + name + ", got an array");
  }
  switch (bytes) {
    case 1: return DType::bytes1;
    case 2: return DType::bytes2;
    case 4: return DType::bytes4;
    case 8: return DType::bytes8;
    default: throw py::type_error("w: expected elements of 1, 2, 4 or 8 bytes, got " + name);
  }
}

std::string show_shape(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

void check_index(const py::array& index, const char* name) {
  check_array(index, name, "int64", holds<int64_t>(index), {-1}, "(n,)");
  if (!(index.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + ": expected elements one after another, got other strides");
}

void check_scale(const py::array& scale, const char* name, bool is_double, int64_t size) {
  check_array(scale, name, is_double ? "float64" : "float32", is_double ? holds<double>(scale) : holds<float>(scale),
              {size}, "(" + std::to_string(size) + ",)");
  if (!(scale.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + ": expected elements one after another, got other strides");
}

py::array expand(const py::array& w, const std::string& dtype, const py::array& out_index,
                 const std::optional<py::array>& in_index, const std::optional<py::array>& in_scale,
                 const std::optional<py::array>& out_scale, const std::optional<py::array>& out) {
  const bool has_scale = in_scale || out_scale;
  const DType element = parse_element(dtype, w.itemsize(), has_scale);
  if (w.ndim() < 2 || w.ndim() > 4)
    throw py::value_error("w: expected 1 to 4 dimensions, got " + std::to_string(w.ndim()));
  check_array(w, "w", dtype.c_str(), true, std::vector<int64_t>(static_cast<size_t>(w.ndim()), -1), "");
  check_index(out_index, "out_index");
  if (in_index) check_index(*in_index, "in_index");

  Expansion x{};
  x.dtype = element;
  x.w = static_cast<const char*>(w.data());
  x.shape = {1, 1, 1, 1};
  for (py::ssize_t d = 0; d < w.ndim(); ++d) {
    x.shape[static_cast<size_t>(d)] = w.shape(d);
    x.stride[static_cast<size_t>(d)] = w.strides(d);
  }
  x.rows = out_index.size();
  x.columns = in_index ? in_index->size() : x.shape[1];
  x.out_index = static_cast<const int64_t*>(out_index.data());
  x.in_index = in_index ? static_cast<const int64_t*>(in_index->data()) : nullptr;
  if (in_scale) check_scale(*in_scale, "in_scale", element == DType::f64, x.columns);
  if (out_scale) check_scale(*out_scale, "out_scale", element == DType::f64, x.rows);
  x.in_scale = in_scale ? in_scale->data() : nullptr;
  x.out_scale = out_scale ? out_scale->data() : nullptr;

  std::vector<int64_t> shape{x.rows, x.columns, x.shape[2], x.shape[3]};
  shape.resize(static_cast<size_t>(w.ndim()));
  py::array y;
  if (out) {
    y = *out;
    check_array(y, "out", dtype.c_str(), y.dtype().equal(w.dtype()), shape, show_shape(shape));
    check_writeable(y);
    py::ssize_t natural = y.itemsize();
    for (py::ssize_t d = y.ndim() - 1; d > 0; natural *= y.shape(d--))
      if (y.size() && y.shape(d) > 1 && y.strides(d) != natural)
        throw py::value_error("out: expected rows whose elements follow one another, got other strides");
    if (y.size() && y.shape(0) > 1 && std::abs(y.strides(0)) < natural)
      throw py::value_error("out: expected rows apart from one another, got rows that overlap");
    check_apart(y, w, "w");
    check_apart(y, out_index, "out_index");
    if (in_index) check_apart(y, *in_index, "in_index");
    if (in_scale) check_apart(y, *in_scale, "in_scale");
    if (out_scale) check_apart(y, *out_scale, "out_scale");
  } else {
    y = py::array(w.dtype(), shape);
  }
  x.out = static_cast<char*>(y.mutable_data());
  x.row_stride = y.strides(0);
  without_gil([&] { growth::expand(x); });
  return y;
}

}  // namespace

void bind_growth(py::module_& m) {
  m.def("expand", &expand, py::arg("w"), py::arg("dtype"), py::arg("out_index"), py::arg("in_index"),
        py::arg("in_scale"), py::arg("out_scale"), py::arg("out"));
}

}  // namespace pycodesign::bindings
