#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "bindings/arrays.h"
#include "bindings/device_array.h"
#include "bindings/epilogue.h"
#include "bindings/weights.h"
#include "core/cuda.h"
#include "repetition/cuda.h"

namespace pycodesign::bindings {

namespace {

using repetition::DType, repetition::Tensor, repetition::cuda::DeviceLayer;

// A layer and the device that it is on.
struct Placed {
  int device;
  std::unique_ptr<DeviceLayer> layer;

  ~Placed() {
    without_gil([&] { layer.reset(); });
  }
};

std::shared_ptr<Placed> place(const repetition::Weights& w, const repetition::Geometry& g,
                              const repetition::Activations& in, repetition::Algorithm algorithm, int device) {
  using repetition::Algorithm;
  const core::cuda::DeviceProperties properties = core::cuda::device_properties(device);
  if (algorithm == Algorithm::dense && properties.capability_major < 8 &&
      (in.dtype == DType::f32 || in.dtype == DType::bf16))
    throw py::value_error("input_dtype: expected 'float16', 'uint8' or 'int8' for 'dense' on " + properties.name +
                          ", which has no bfloat16 products (capability 8.0 has), got '" + dtype_name(in.dtype) + "'");
  auto placed = std::make_shared<Placed>();
  placed->device = device;
  const core::cuda::DeviceGuard guard(device);
  if (const int compiled = repetition::cuda::compiled_capability();
      algorithm == Algorithm::dense && compiled < 80 && (in.dtype == DType::f32 || in.dtype == DType::bf16))
    throw std::runtime_error(
        "input_dtype: expected 'float16', 'uint8' or 'int8' for 'dense' by kernels that were "
        "compiled for capability " +
        std::to_string(compiled / 10) + "." + std::to_string(compiled % 10) + ", got '" + dtype_name(in.dtype) +
        "'; build with -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native");
  without_gil([&] {
    if (algorithm == Algorithm::dense)
      placed->layer = std::make_unique<repetition::cuda::DenseLayer>(
          w, g, in, repetition::cuda::Limits{properties.multiprocessors, properties.shared_bytes_per_block});
    else placed->layer = std::make_unique<repetition::cuda::FactoredLayer>(w, g, in, algorithm);
  });
  return placed;
}

std::shared_ptr<Placed> place_codes(py::array codes, py::array levels, py::array scale, std::optional<py::array> bias,
                                    int64_t channels, int64_t groups, std::array<int64_t, 2> kernel,
                                    std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                                    std::array<int64_t, 2> dilation, const std::string& input_dtype, double input_scale,
                                    int input_zero_point, int input_bits, const std::string& algorithm, int device) {
  const WeightArrays a(std::move(codes), std::move(levels), std::move(scale), std::move(bias));
  const auto g = geometry(channels, groups, kernel, stride, padding, dilation);
  if (!fits(a.weights, g) || (a.weights.scale_groups != 1 && (g.groups != 1 || g.kernel[0] * g.kernel[1] != 1)))
    throw py::value_error("codes: expected (O, C / groups * kH * kW), got " + describe(a.codes));
  const auto in = activations(input_dtype, input_scale, input_zero_point, input_bits, device_inputs);
  return place(a.weights, g, in, parse_algorithm(algorithm), device);
}

std::shared_ptr<Placed> place_codebook(py::array index, py::array sign, py::array kernels, py::array levels,
                                       py::array scale, std::optional<py::array> bias, int64_t channels, int64_t groups,
                                       std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                                       std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                                       const std::string& input_dtype, double input_scale, int input_zero_point,
                                       int input_bits, int device) {
  const CodebookArrays a(std::move(index), std::move(sign), std::move(kernels), std::move(levels), std::move(scale),
                         std::move(bias));
  const auto g = geometry(channels, groups, kernel, stride, padding, dilation);
  if (!fits(a.weights, g)) throw py::value_error("kernels: expected (C, U, p * kH * kW), got " + describe(a.kernels));
  const auto in = activations(input_dtype, input_scale, input_zero_point, input_bits, device_inputs);
  return place(a.weights, g, in, repetition::Algorithm::codebook, device);
}

// (N, C, H, W), or rows (T, I) as the pixels of one image.
Tensor view(const DeviceArray& a) {
  Tensor t{a.data, {}, {}};
  if (a.ndim() == 2) {
    t.size = {1, a.shape[1], 1, a.shape[0]};
    t.stride = {0, a.stride[1], 0, a.stride[0]};
  } else {
    std::copy(a.shape.begin(), a.shape.end(), t.size.begin());
    std::copy(a.stride.begin(), a.stride.end(), t.stride.begin());
  }
  return t;
}

void check_x_shape(const DeviceLayer& layer, const std::vector<int64_t>& x) {
  const int64_t channels = layer.geometry().channels;
  if (x.size() == 2 ? x[1] == channels : x.size() == 4 && x[1] == channels) return;
  throw py::value_error("x: expected (N, " + std::to_string(channels) + ", H, W) or (..., " + std::to_string(channels) +
                        "), got shape " + show_shape(x));
}

std::vector<int64_t> output_shape(const DeviceLayer& layer, const std::vector<int64_t>& x) {
  if (x.size() == 2) return {x[0], layer.outputs()};
  const auto& g = layer.geometry();
  return {x[0], layer.outputs(), g.output_size(0, x[2]), g.output_size(1, x[3])};
}

py::dict plan(const Placed& placed, const std::vector<int64_t>& x) {
  const DeviceLayer& layer = *placed.layer;
  check_x_shape(layer, x);
  const auto chosen = layer.plan(x.size() == 2 ? std::array<int64_t, 4>{1, x[1], 1, x[0]}
                                               : std::array<int64_t, 4>{x[0], x[1], x[2], x[3]});
  py::dict d;
  d["shape"] = py::tuple(py::cast(output_shape(layer, x)));
  d["workspace_bytes"] = chosen.staged_bytes + chosen.partial_bytes;
  d["why"] = chosen.why;
  return d;
}

DType residual_dtype(const DeviceArray& a) {
  for (const DType dtype : device_inputs)
    if (a.dtype == dtype_name(dtype)) return dtype;
  throw py::type_error("residual: expected a float of 16 or 32 bits, uint8 or int8, got " + a.dtype + " " +
                       show_shape(a.shape));
}

void run(const Placed& placed, const py::object& x_, const py::object& residual_, float residual_scale,
         float residual_zero_point, std::optional<float> lo, std::optional<float> hi, const std::string& out_dtype,
         std::optional<float> out_scale, int out_zero_point, const py::object& out_, const py::object& workspace_,
         uintptr_t stream) {
  const DeviceLayer& layer = *placed.layer;
  const DType dtype = layer.activations().dtype;
  const DeviceArray x = view_device_array(x_, "x"), out = view_device_array(out_, "out");
  check_device_array(x, "x", dtype_name(dtype), std::vector<int64_t>(x.ndim(), -1));
  check_x_shape(layer, x.shape);
  repetition::Epilogue epilogue =
      parse_epilogue(dtype, !residual_.is_none(), lo, hi, out_dtype, out_scale, out_zero_point, device_outputs);
  const std::vector<int64_t> shape = output_shape(layer, x.shape);
  check_device_array(out, "out", dtype_name(epilogue.out_dtype), shape);
  check_writeable(out);
  check_apart(out, x, "x");
  std::optional<Tensor> residual;
  if (!residual_.is_none()) {
    const DeviceArray added = view_device_array(residual_, "residual");
    epilogue.residual_dtype = residual_dtype(added);
    epilogue.residual_scale = residual_scale;
    epilogue.residual_zero_point = residual_zero_point;
    check_device_array(added, "residual", dtype_name(epilogue.residual_dtype), shape);
    check_apart(out, added, "residual");
    residual = view(added);
  }
  const Tensor from = view(x), to = view(out);
  const auto chosen = layer.plan(from.size);
  char* workspace = nullptr;
  if (!workspace_.is_none()) {
    const DeviceArray memory = view_device_array(workspace_, "workspace");
    check_device_array(memory, "workspace", "uint8", {-1}, "(n,)");
    workspace = memory.data;
    if (memory.size() < chosen.staged_bytes + chosen.partial_bytes) workspace = nullptr;
  }
  if (chosen.staged_bytes && !workspace)
    throw py::value_error("workspace: expected " + std::to_string(chosen.staged_bytes + chosen.partial_bytes) +
                          " bytes, got fewer");
  const core::cuda::DeviceGuard guard(placed.device);
  without_gil([&] {
    layer.run(from, to, residual ? &*residual : nullptr, epilogue, workspace, reinterpret_cast<void*>(stream));
  });
}

}  // namespace

void bind_cuda_repetition(py::module_& m) {
  py::class_<Placed, std::shared_ptr<Placed>> c(m, "PackedLayer");
  c.def(py::init(&place_codes), py::arg("codes"), py::arg("levels"), py::arg("scale"), py::arg("bias"),
        py::arg("channels"), py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("input_dtype"), py::arg("input_scale"), py::arg("input_zero_point"),
        py::arg("input_bits"), py::arg("algorithm"), py::arg("device"));
  c.def_static("from_codebook", &place_codebook, py::arg("index"), py::arg("sign"), py::arg("kernels"),
               py::arg("levels"), py::arg("scale"), py::arg("bias"), py::arg("channels"), py::arg("groups"),
               py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("input_dtype"),
               py::arg("input_scale"), py::arg("input_zero_point"), py::arg("input_bits"), py::arg("device"));
  c.def_readonly("device", &Placed::device);
  c.def_property_readonly("why", [](const Placed& p) { return p.layer->describe(); });
  c.def_property_readonly("algorithm",
                          [](const Placed& p) { return repetition::algorithm_name(p.layer->algorithm()); });
  c.def("counts", [](const Placed& p) {
    const repetition::Counts n = p.layer->counts();
    py::dict d;
    d["adds"] = n.adds;
    d["multiplies"] = n.multiplies;
    d["bytes"] = n.bytes;
    return d;
  });
  c.def("plan", &plan, py::arg("x_shape"));
  c.def("run", &run, py::arg("x"), py::arg("residual"), py::arg("residual_scale"), py::arg("residual_zero_point"),
        py::arg("lo"), py::arg("hi"), py::arg("out_dtype"), py::arg("out_scale"), py::arg("out_zero_point"),
        py::arg("out"), py::arg("workspace"), py::arg("stream"));
}

}  // namespace pycodesign::bindings
