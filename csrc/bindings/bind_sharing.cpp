#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <new>
#include <optional>

#include "bindings/arrays.h"
#include "sharing/sharing.h"

namespace pycodesign::bindings {

namespace {

using sharing::Delta, sharing::DeltaPointer, sharing::Storage;

std::string show(int64_t size) { return size < 0 ? "n" : std::to_string(size); }

std::string show_shape(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + show(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

template <class T>
const T* check_vector(const py::array& a, const char* name, const char* dtype, const std::vector<int64_t>& shape) {
  check_array(a, name, dtype, holds<T>(a), shape, show_shape(shape));
  if (!(a.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + ": expected C order, got other strides");
  return static_cast<const T*>(a.data());
}

const float* check_floats(const py::array& a, const char* name, const std::vector<int64_t>& shape) {
  return check_vector<float>(a, name, "float32", shape);
}

const float* check_bias(const std::optional<py::array>& bias, int64_t outputs) {
  return bias ? check_floats(*bias, "bias", {outputs}) : nullptr;
}

Storage parse_storage(const std::string& name) {
  if (name == "float32") return Storage::f32;
  if (name == "bfloat16") return Storage::bf16;
  throw py::value_error("dtype: expected 'float32' or 'bfloat16', got '" + name + "'");
}

// Python holds a Delta without const, but has no way to change one.
using Held = std::shared_ptr<Delta>;

template <class Pack> Held pack(Pack&& make) {
  DeltaPointer delta;
  without_gil([&] { delta = make(); });
  return std::const_pointer_cast<Delta>(delta);
}

// Strides in elements of (N, T, n) rows whose elements follow one another; of (T, n) rows the first is 0.
std::array<int64_t, 2> row_strides(const py::array& a, const char* name) {
  const py::ssize_t last = a.ndim() - 1;
  if (a.size() && a.shape(last) > 1 && a.strides(last) != a.itemsize())
    throw py::value_error(std::string(name) + ": expected rows whose elements follow one another, got other strides");
  std::array<int64_t, 2> strides{};
  for (py::ssize_t d = 0; d < last; ++d) {
    if (a.strides(d) % a.itemsize())
      throw py::value_error(std::string(name) + ": expected strides of whole elements, got others");
    strides[static_cast<size_t>(d + 2 - last)] = a.strides(d) / a.itemsize();
  }
  return strides;
}

void check_rows_apart(const py::array& out) {
  py::ssize_t reach = out.shape(2) * out.itemsize();  // bytes from the first to one past the last element
  bool apart = true;
  std::array<py::ssize_t, 2> axes{1, 0};
  if (std::abs(out.strides(0)) < std::abs(out.strides(1))) std::swap(axes[0], axes[1]);
  for (const py::ssize_t d : axes) {
    if (out.shape(d) < 2) continue;
    apart &= std::abs(out.strides(d)) >= reach;
    reach += std::abs(out.strides(d)) * (out.shape(d) - 1);
  }
  if (out.size() && !apart) throw py::value_error("out: expected rows apart from one another, got rows that overlap");
}

// On a cache line: a vector that straddles two takes twice as long to store.
py::array make_output(const std::vector<py::ssize_t>& shape) {
  size_t bytes = sizeof(float);
  for (const py::ssize_t size : shape) bytes *= static_cast<size_t>(size);
  constexpr auto alignment = std::align_val_t{64};
  void* data = ::operator new(std::max<size_t>(bytes, 1), alignment);
  const py::capsule owner(data, [](void* memory) { ::operator delete(memory, alignment); });
  return py::array(py::dtype::of<float>(), shape, data, owner);
}

py::array delta_linear(const py::array& x, const std::optional<py::array>& base, const std::vector<Held>& held,
                       const std::optional<py::array>& out) {
  const std::vector<DeltaPointer> deltas(held.begin(), held.end());
  if (deltas.empty()) throw py::value_error("deltas: expected at least one task, got none");
  for (const DeltaPointer& delta : deltas)
    if (!delta || delta->outputs != deltas[0]->outputs || delta->inputs != deltas[0]->inputs)
      throw py::value_error("deltas: expected tasks of one size, got several");
  const auto N = static_cast<int64_t>(deltas.size());
  const int64_t O = deltas[0]->outputs, I = deltas[0]->inputs;
  const auto check = [&](const py::array& a, const char* name, int64_t T, int64_t size) {
    const std::string sizes = show(T) + ", " + show(size) + ")";
    std::vector<int64_t> shape{T, size};
    if (a.ndim() == 3) shape.insert(shape.begin(), N);
    check_array(a, name, "float32", holds<float>(a), shape, "(" + sizes + " or (" + show(N) + ", " + sizes);
  };
  check(x, "x", -1, I);
  const int64_t T = x.shape(x.ndim() - 2);
  if (base) check(*base, "base", T, O);

  sharing::Call call{};
  call.tasks = deltas;
  call.tokens = T;
  const auto [x_task, x_row] = row_strides(x, "x");
  call.x = static_cast<const float*>(x.data());
  call.x_task = x_task;
  call.x_row = x_row;
  if (base) {
    const auto [base_task, base_row] = row_strides(*base, "base");
    call.base = static_cast<const float*>(base->data());
    call.base_task = base_task;
    call.base_row = base_row;
  }
  py::array z;
  if (out) {
    z = *out;
    check_array(z, "out", "float32", holds<float>(z), {N, T, O}, show_shape({N, T, O}));
    check_writeable(z);
    check_rows_apart(z);
    check_apart(z, x, "x");
    if (base) check_apart(z, *base, "base");
  } else {
    z = make_output({N, T, O});
  }
  const auto [z_task, z_row] = row_strides(z, "out");
  call.z = static_cast<float*>(z.mutable_data());
  call.z_task = z_task;
  call.z_row = z_row;
  without_gil([&] { sharing::delta_linear(call); });
  return z;
}

// What a delta is packed into, by name; views that keep it alive. 16-bit values are int16.
py::dict view_arrays(const Held& delta) {
  const py::object owner = py::cast(delta);
  py::dict arrays;
  const auto add = [&](const char* name, const char* dtype, size_t count, const void* data) {
    py::array view(py::dtype(dtype), {static_cast<py::ssize_t>(count)}, {}, data, owner);
    view.attr("flags").attr("writeable") = false;
    arrays[name] = view;
  };
  const bool is_wide = delta->storage == Storage::f32;
  const auto add_values = [&](const char* name, const core::AlignedBuffer<char>& value) {
    add(name, is_wide ? "float32" : "int16", value.size() / (is_wide ? 4 : 2), value.data());
  };
  if (delta->kind == sharing::Kind::sparse) {
    const sharing::SparseRows& sparse = delta->sparse;
    add("count", "uint32", sparse.count.size(), sparse.count.data());
    add("order", "uint8", sparse.order.size(), sparse.order.data());
    add("index", "int16", sparse.index.size(), sparse.index.data());
    add_values("value", sparse.value);
  } else if (delta->kind != sharing::Kind::none) {
    add_values("up", delta->up.value);
    if (delta->kind == sharing::Kind::low_rank) add_values("down", delta->down.value);
  }
  if (!delta->bias.empty()) add("bias", "float32", delta->bias.size(), delta->bias.data());
  return arrays;
}

}  // namespace

void bind_sharing(py::module_& m) {
  py::class_<Delta, Held> delta(m, "Delta");
  delta.def_property_readonly("kind", [](const Delta& d) { return sharing::kind_name(d.kind); });
  delta.def_property_readonly("dtype",
                              [](const Delta& d) { return d.storage == Storage::f32 ? "float32" : "bfloat16"; });
  delta.def_readonly("outputs", &Delta::outputs);
  delta.def_readonly("inputs", &Delta::inputs);
  delta.def_readonly("entries", &Delta::entries);
  delta.def_readonly("rank", &Delta::rank);
  delta.def_readonly("bytes", &Delta::bytes);
  delta.def("arrays", &view_arrays);
  delta.def_property_readonly("has_bias", [](const Delta& d) { return !d.bias.empty(); });

  m.def(
      "pack_none",
      [](int64_t outputs, int64_t inputs, const std::optional<py::array>& bias) {
        const float* b = check_bias(bias, outputs);
        return pack([&] { return sharing::pack_none(outputs, inputs, b); });
      },
      py::arg("outputs"), py::arg("inputs"), py::arg("bias"));
  m.def(
      "pack_sparse",
      [](int64_t outputs, int64_t inputs, const py::array& row, const py::array& column, const py::array& value,
         const std::optional<py::array>& bias, const std::string& dtype) {
        const int64_t count = value.size();
        const sharing::Entries entries{count, check_vector<int32_t>(row, "row", "int32", {count}),
                                       check_vector<int32_t>(column, "column", "int32", {count}),
                                       check_floats(value, "value", {count})};
        const float* b = check_bias(bias, outputs);
        const Storage storage = parse_storage(dtype);
        return pack([&] { return sharing::pack_sparse(outputs, inputs, entries, b, storage); });
      },
      py::arg("outputs"), py::arg("inputs"), py::arg("row"), py::arg("column"), py::arg("value"), py::arg("bias"),
      py::arg("dtype"));
  m.def(
      "pack_low_rank",
      [](const py::array& b, const py::array& a, const std::optional<py::array>& bias, const std::string& dtype) {
        const float* up = check_floats(b, "b", {-1, -1});
        const float* down = check_floats(a, "a", {b.shape(1), -1});
        const float* d = check_bias(bias, b.shape(0));
        const Storage storage = parse_storage(dtype);
        return pack([&] { return sharing::pack_low_rank(b.shape(0), a.shape(1), b.shape(1), up, down, d, storage); });
      },
      py::arg("b"), py::arg("a"), py::arg("bias"), py::arg("dtype"));
  m.def(
      "pack_dense",
      [](const py::array& w, const std::optional<py::array>& bias, const std::string& dtype) {
        const float* weights = check_floats(w, "w", {-1, -1});
        const float* b = check_bias(bias, w.shape(0));
        const Storage storage = parse_storage(dtype);
        return pack([&] { return sharing::pack_dense(w.shape(0), w.shape(1), weights, b, storage); });
      },
      py::arg("w"), py::arg("bias"), py::arg("dtype"));
  m.def("delta_linear", &delta_linear, py::arg("x"), py::arg("base"), py::arg("deltas"), py::arg("out"));
}

}  // namespace pycodesign::bindings
