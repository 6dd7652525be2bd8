#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <deque>
#include <memory>

#include "bindings/arrays.h"
#include "bindings/device_array.h"
#include "core/cuda.h"
#include "core/divide.h"
#include "sharing/cuda.h"

namespace pycodesign::bindings {

namespace {

using sharing::Kind, sharing::Storage, sharing::cuda::Task;

using core::round_up;

// A task's Delta on a device, and the memory that it lies in.
struct DeviceDelta {
  Task task{};
  int64_t outputs, inputs;
  std::deque<core::cuda::DeviceBuffer> memory;

  ~DeviceDelta() {
    without_gil([&] { memory.clear(); });
  }
};

Kind parse_kind(const std::string& name) {
  if (name == "none") return Kind::none;
  if (name == "sparse") return Kind::sparse;
  if (name == "low_rank") return Kind::low_rank;
  if (name == "dense") return Kind::dense;
  throw py::value_error("kind: expected 'none', 'sparse', 'low_rank' or 'dense', got '" + name + "'");
}

// `arrays` as _core.Delta.arrays() names them.
std::shared_ptr<DeviceDelta> make_delta(const std::string& kind, int64_t outputs, int64_t inputs, int32_t rank,
                                        const py::dict& arrays, int device) {
  const core::cuda::DeviceGuard guard(device);
  auto delta = std::make_shared<DeviceDelta>();
  delta->outputs = outputs;
  delta->inputs = inputs;
  Task& task = delta->task;
  task.kind = parse_kind(kind);
  task.rank = rank;
  const auto take = [&](const char* name, int64_t size, auto... dtypes) {
    const py::array a = py::array::ensure(arrays[name], py::array::c_style);
    check_array(a, name, "packed", (holds<decltype(dtypes)>(a) || ...), {size}, "values");
    core::cuda::DeviceBuffer& buffer = delta->memory.emplace_back();
    without_gil([&] { buffer.fill(a.data(), static_cast<size_t>(a.nbytes())); });
    return &buffer;
  };
  const auto take_values = [&](const char* name, int64_t size) {
    task.storage = holds<float>(arrays[name].cast<py::array>()) ? Storage::f32 : Storage::bf16;
    return take(name, size, float(), int16_t())->as<void>();
  };
  const int64_t rows = round_up(outputs, sharing::block_rows);
  if (arrays.contains("bias")) task.bias = take("bias", rows, float())->as<float>();
  if (task.kind == Kind::sparse) {
    task.begin = take("begin", rows / sharing::group_rows + 1, int32_t())->as<int32_t>();
    task.order = take("order", rows, uint8_t())->as<uint8_t>();
    const core::cuda::DeviceBuffer* index = take("index", -1, int16_t());
    task.index = index->as<uint16_t>();
    task.value = take_values("value", static_cast<int64_t>(index->bytes() / sizeof(int16_t)));
  } else if (task.kind != Kind::none) {
    task.value = take_values("up", round_up(outputs, sharing::panel_width) * (rank ? rank : inputs));
    if (rank) task.down = take_values("down", round_up(rank, sharing::panel_width) * inputs);
  }
  return delta;
}

// Strides in elements of (N, T, n) rows whose elements follow one another; 0 for axes that it does not have.
std::array<int64_t, 2> row_strides(const DeviceArray& a, const char* name) {
  const size_t last = a.ndim() - 1;
  if (a.data && a.shape[last] > 1 && a.stride[last] != a.itemsize)
    throw py::value_error(std::string(name) + ": expected rows whose elements follow one another, got other strides");
  std::array<int64_t, 2> strides{};
  for (size_t d = 0; d < last; ++d) strides[d + 2 - last] = a.stride[d] / a.itemsize;
  return strides;
}

void check_rows_apart(const DeviceArray& out) {
  int64_t reach = out.shape[2] * out.itemsize;  // bytes from the first to one past the last element
  bool apart = true;
  std::array<size_t, 2> axes{1, 0};
  if (std::abs(out.stride[0]) < std::abs(out.stride[1])) std::swap(axes[0], axes[1]);
  for (const size_t d : axes) {
    if (out.shape[d] < 2) continue;
    apart &= std::abs(out.stride[d]) >= reach;
    reach += std::abs(out.stride[d]) * (out.shape[d] - 1);
  }
  if (out.data && !apart) throw py::value_error("out: expected rows apart from one another, got rows that overlap");
}

void delta_linear(const py::object& x_, const py::object& base_,
                  const std::vector<std::shared_ptr<DeviceDelta>>& deltas, const py::object& positions_,
                  const py::object& out_, int device, uintptr_t stream) {
  if (deltas.empty()) throw py::value_error("deltas: expected at least one task, got none");
  std::vector<Task> tasks;
  for (const auto& delta : deltas) {
    if (!delta || delta->outputs != deltas[0]->outputs || delta->inputs != deltas[0]->inputs)
      throw py::value_error("deltas: expected tasks of one size, got several");
    tasks.push_back(delta->task);
  }
  const auto N = static_cast<int64_t>(tasks.size());
  sharing::cuda::Call call{};
  call.tasks = tasks;
  call.outputs = deltas[0]->outputs;
  call.inputs = deltas[0]->inputs;
  const auto shape_of = [&](const DeviceArray& a, int64_t T, int64_t size) {
    return a.ndim() == 3 ? std::vector<int64_t>{N, T, size} : std::vector<int64_t>{T, size};
  };
  const DeviceArray x = view_device_array(x_, "x"), out = view_device_array(out_, "out");
  check_device_array(x, "x", "float32", shape_of(x, -1, call.inputs));
  const int64_t T = x.shape[x.ndim() - 2];
  call.tokens = T;
  if (!positions_.is_none()) {
    const DeviceArray positions = view_device_array(positions_, "positions");
    check_device_array(positions, "positions", "int64", {-1});
    check_c_order(positions, "positions");
    check_apart(out, positions, "positions");
    call.positions = positions.as<int64_t>();
    call.tokens = positions.size();
  }
  call.x = x.as<float>();
  const auto [x_task, x_row] = row_strides(x, "x");
  call.x_task = x_task;
  call.x_row = x_row;
  if (!base_.is_none()) {
    const DeviceArray base = view_device_array(base_, "base");
    if (base.ndim() == 1) check_device_array(base, "base", "float32", {call.outputs});
    else check_device_array(base, "base", "float32", shape_of(base, T, call.outputs));
    check_apart(out, base, "base");
    call.base = base.as<float>();
    const auto [base_task, base_row] = row_strides(base, "base");
    call.base_task = base_task;
    call.base_row = base_row;
  }
  check_device_array(out, "out", "float32", {N, call.tokens, call.outputs});
  check_writeable(out);
  check_rows_apart(out);
  check_apart(out, x, "x");
  call.z = reinterpret_cast<float*>(out.data);
  const auto [z_task, z_row] = row_strides(out, "out");
  call.z_task = z_task;
  call.z_row = z_row;
  const core::cuda::DeviceGuard guard(device);
  without_gil([&] { sharing::cuda::delta_linear(call, reinterpret_cast<void*>(stream)); });
}

}  // namespace

void bind_cuda_sharing(py::module_& m) {
  py::class_<DeviceDelta, std::shared_ptr<DeviceDelta>>(m, "Delta")
      .def(py::init(&make_delta), py::arg("kind"), py::arg("outputs"), py::arg("inputs"), py::arg("rank"),
           py::arg("arrays"), py::arg("device"));
  m.def("delta_linear", &delta_linear, py::arg("x"), py::arg("base"), py::arg("deltas"), py::arg("positions"),
        py::arg("out"), py::arg("device"), py::arg("stream"));
}

}  // namespace pycodesign::bindings
