#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.h"
#include "bindings/epilogue.h"
#include "bindings/weights.h"
#include "core/executable_memory.h"
#include "repetition/codegen_x86.h"
#include "repetition/repetition.h"

namespace pycodesign::bindings {

namespace {

using repetition::DType, repetition::PackedLayer, repetition::Tensor;

template <class Layer> using Class = py::class_<Layer, PackedLayer, std::shared_ptr<Layer>>;

py::tuple choice(const repetition::Choice& c) { return py::make_tuple(repetition::algorithm_name(c.algorithm), c.why); }

// The epilogue and the array it reads, checked against the output's shape.
struct Finishing {
  repetition::Epilogue epilogue;
  std::optional<py::array> residual;

  Finishing(const repetition::PackedLayer& layer, const std::optional<py::array>& residual_, float residual_scale,
            float residual_zero_point, std::optional<float> lo, std::optional<float> hi, const std::string& out_dtype,
            std::optional<float> out_scale, int out_zero_point, const std::vector<int64_t>& shape)
      : residual(residual_) {
    epilogue =
        parse_epilogue(layer.activations().dtype, residual.has_value(), lo, hi, out_dtype, out_scale, out_zero_point);
    if (!residual) return;
    epilogue.residual_scale = residual_scale;
    epilogue.residual_zero_point = residual_zero_point;
    epilogue.residual_dtype = holds<float>(*residual) ? DType::f32 : holds<uint8_t>(*residual) ? DType::u8 : DType::i8;
    check_array(*residual, "residual", "float32, uint8 or int8", holds(*residual, epilogue.residual_dtype), shape,
                shape_text(shape));
  }

  static std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
  }

  py::array output(const std::optional<py::array>& given, const py::array& x, const std::vector<int64_t>& shape) const {
    const DType dtype = epilogue.out_dtype;
    if (!given) {
      const py::dtype type = dtype == DType::f32  ? py::dtype::of<float>()
                             : dtype == DType::u8 ? py::dtype::of<uint8_t>()
                             : dtype == DType::i8 ? py::dtype::of<int8_t>()
                                                  : py::dtype::of<int32_t>();
      return py::array(type, std::vector<py::ssize_t>(shape.begin(), shape.end()));
    }
    check_array(*given, "out", dtype_name(dtype), holds(*given, dtype), shape, shape_text(shape));
    check_writeable(*given);
    check_elements_apart(*given);
    check_apart(*given, x, "x");
    if (residual) check_apart(*given, *residual, "residual");
    return *given;
  }
};

Tensor images(const py::array& a) {
  return {static_cast<char*>(const_cast<void*>(a.data())),
          {a.shape(0), a.shape(1), a.shape(2), a.shape(3)},
          {a.strides(0), a.strides(1), a.strides(2), a.strides(3)}};
}

// (T, I) rows as the pixels of one image.
Tensor rows(const py::array& a) {
  return {static_cast<char*>(const_cast<void*>(a.data())),
          {1, a.shape(1), 1, a.shape(0)},
          {0, a.strides(1), 0, a.strides(0)}};
}

// Defines `name(x, ...)`: validate, view, allocate, release the GIL, one call, return. `shape_of` checks x and gives
// the output's shape.
template <class Layer, class ShapeOf>
void bind_run(Class<Layer>& c, const char* name, Tensor (*view)(const py::array&), ShapeOf shape_of) {
  c.def(
      name,
      [view, shape_of](const Layer& layer, const py::array& x, const std::optional<py::array>& residual,
                       float residual_scale, float residual_zero_point, std::optional<float> lo,
                       std::optional<float> hi, const std::string& out_dtype, std::optional<float> out_scale,
                       int out_zero_point, const std::optional<py::array>& out) {
        const std::vector<int64_t> shape = shape_of(layer, x);
        const Finishing finishing(layer, residual, residual_scale, residual_zero_point, lo, hi, out_dtype, out_scale,
                                  out_zero_point, shape);
        const py::array y = finishing.output(out, x, shape);
        const Tensor from = view(x), to = view(y);
        const std::optional<Tensor> added =
            finishing.residual ? std::optional(view(*finishing.residual)) : std::nullopt;
        without_gil([&] { layer.run(from, to, added ? &*added : nullptr, finishing.epilogue); });
        return y;
      },
      py::arg("x"), py::arg("residual"), py::arg("residual_scale"), py::arg("residual_zero_point"), py::arg("lo"),
      py::arg("hi"), py::arg("out_dtype"), py::arg("out_scale"), py::arg("out_zero_point"), py::arg("out"));
}

void check_x(const repetition::PackedLayer& layer, const py::array& x, const std::vector<int64_t>& sizes,
             const std::string& shape) {
  const DType dtype = layer.activations().dtype;
  check_array(x, "x", dtype_name(dtype), holds(x, dtype), sizes, shape);
}

void bind_layer(py::class_<PackedLayer, std::shared_ptr<PackedLayer>>& c) {
  c.def_property_readonly("algorithm",
                          [](const PackedLayer& l) { return std::string(repetition::algorithm_name(l.algorithm())); });
  c.def("counts", [](const PackedLayer& l) {
    const repetition::Counts n = l.counts();
    py::dict d;
    d["adds"] = n.adds;
    d["multiplies"] = n.multiplies;
    d["bytes"] = n.bytes;
    d["code_bytes"] = n.code_bytes;
    return d;
  });
  c.def("codes", [](const PackedLayer& l) {
    const std::vector<uint8_t> codes = l.codes();
    py::array_t<uint8_t> a({l.outputs(), static_cast<int64_t>(codes.size()) / l.outputs()});
    std::copy(codes.begin(), codes.end(), a.mutable_data());
    return a;
  });
}

}  // namespace

void bind_repetition(py::module_& m) {
  using repetition::PackedConv2d, repetition::PackedLinear;

  // A chain holds on to its layers.
  py::class_<PackedLayer, std::shared_ptr<PackedLayer>> layer(m, "PackedLayer");
  bind_layer(layer);
  Class<PackedConv2d> conv(m, "PackedConv2d");
  conv.def(py::init([](py::array codes, py::array levels, py::array scale, std::optional<py::array> bias,
                       int64_t channels, int64_t groups, std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                       std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation, const std::string& input_dtype,
                       double input_scale, int input_zero_point, int input_bits, const std::string& algorithm) {
             const WeightArrays a(std::move(codes), std::move(levels), std::move(scale), std::move(bias));
             const auto g = geometry(channels, groups, kernel, stride, padding, dilation);
             if (!fits(a.weights, g) || a.weights.scale_groups != 1)
               throw py::value_error("codes: expected (O, C / groups * kH * kW), got " + describe(a.codes));
             const auto in = activations(input_dtype, input_scale, input_zero_point, input_bits);
             const auto chosen = parse_algorithm(algorithm);
             std::shared_ptr<PackedConv2d> layer;
             without_gil([&] { layer = std::make_shared<PackedConv2d>(a.weights, g, in, chosen); });
             return layer;
           }),
           py::arg("codes"), py::arg("levels"), py::arg("scale"), py::arg("bias"), py::arg("channels"),
           py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
           py::arg("input_dtype"), py::arg("input_scale"), py::arg("input_zero_point"), py::arg("input_bits"),
           py::arg("algorithm"));
  conv.def_static(
      "from_codebook",
      [](py::array index, py::array sign, py::array kernels, py::array levels, py::array scale,
         std::optional<py::array> bias, int64_t channels, int64_t groups, std::array<int64_t, 2> kernel,
         std::array<int64_t, 2> stride, std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
         const std::string& input_dtype, double input_scale, int input_zero_point, int input_bits) {
        const CodebookArrays a(std::move(index), std::move(sign), std::move(kernels), std::move(levels),
                               std::move(scale), std::move(bias));
        const auto g = geometry(channels, groups, kernel, stride, padding, dilation);
        if (!fits(a.weights, g))
          throw py::value_error("kernels: expected (C, U, p * kH * kW) and index (O, C / groups / p), got " +
                                describe(a.kernels) + " and " + describe(a.index));
        const auto in = activations(input_dtype, input_scale, input_zero_point, input_bits);
        std::shared_ptr<PackedConv2d> layer;
        without_gil([&] { layer = std::make_shared<PackedConv2d>(a.weights, g, in, repetition::Algorithm::codebook); });
        return layer;
      },
      py::arg("index"), py::arg("sign"), py::arg("kernels"), py::arg("levels"), py::arg("scale"), py::arg("bias"),
      py::arg("channels"), py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("input_dtype"), py::arg("input_scale"), py::arg("input_zero_point"),
      py::arg("input_bits"));
  conv.def("indices", [](const PackedConv2d& layer) {
    if (layer.algorithm() != repetition::Algorithm::codebook)
      throw py::value_error("algorithm: expected 'codebook', got '" +
                            std::string(repetition::algorithm_name(layer.algorithm())) + "'");
    const auto [index, sign] = layer.indices();
    const int64_t patterns = static_cast<int64_t>(index.size()) / layer.outputs();
    py::array_t<uint8_t> indices({layer.outputs(), patterns});
    py::array_t<int8_t> signs({layer.outputs(), patterns});
    std::copy(index.begin(), index.end(), indices.mutable_data());
    std::copy(sign.begin(), sign.end(), signs.mutable_data());
    return py::make_tuple(indices, signs);
  });
  conv.def_property_readonly("group_size", &PackedConv2d::group_size);
  conv.def_property_readonly("max_entries", &PackedConv2d::max_entries);
  conv.def(
      "machine_code",
      [](const PackedConv2d& layer, bool avx512) -> py::object {
        if (layer.algorithm() != repetition::Algorithm::codegen || !core::ExecutableMemory::available())
          return py::none();
        const repetition::LayerCode& made = layer.machine_code(avx512);
        py::list chunks;
        for (const repetition::CodeChunk& c : made.chunks()) {
          py::list segments;
          for (const repetition::CodeSegment& s : c.segments)
            segments.append(py::make_tuple(s.begin, s.end, s.channel, s.prefetch_lines));
          chunks.append(py::make_tuple(c.group, c.first_output, c.outputs, segments));
        }
        return py::make_tuple(py::bytes(made.code().data(), made.code().size()), chunks, made.columns().patterns);
      },
      py::arg("avx512"));
  bind_run(conv, "run", images, [](const PackedConv2d& layer, const py::array& x) {
    const repetition::Geometry& g = layer.geometry();
    check_x(layer, x, {-1, g.channels, -1, -1}, "(N, " + std::to_string(g.channels) + ", H, W)");
    return std::vector<int64_t>{x.shape(0), layer.outputs(), g.output_size(0, x.shape(2)),
                                g.output_size(1, x.shape(3))};
  });
  // A linear layer through the convolution's kernels: its rows are the pixels.
  bind_run(conv, "run_rows", rows, [](const PackedConv2d& layer, const py::array& x) {
    check_x(layer, x, {-1, layer.inputs()}, "(..., " + std::to_string(layer.inputs()) + ")");
    return std::vector<int64_t>{x.shape(0), layer.outputs()};
  });

  Class<PackedLinear> linear(m, "PackedLinear");
  linear.def(py::init([](py::array codes, py::array levels, py::array scale, std::optional<py::array> bias,
                         const std::string& input_dtype, double input_scale, int input_zero_point, int input_bits,
                         const std::string& algorithm) {
               const WeightArrays a(std::move(codes), std::move(levels), std::move(scale), std::move(bias));
               const auto in = activations(input_dtype, input_scale, input_zero_point, input_bits);
               const auto chosen = parse_algorithm(algorithm);
               std::shared_ptr<PackedLinear> layer;
               without_gil([&] { layer = std::make_shared<PackedLinear>(a.weights, in, chosen); });
               return layer;
             }),
             py::arg("codes"), py::arg("levels"), py::arg("scale"), py::arg("bias"), py::arg("input_dtype"),
             py::arg("input_scale"), py::arg("input_zero_point"), py::arg("input_bits"), py::arg("algorithm"));
  bind_run(linear, "run_rows", rows, [](const PackedLinear& layer, const py::array& x) {
    check_x(layer, x, {-1, layer.inputs()}, "(..., " + std::to_string(layer.inputs()) + ")");
    return std::vector<int64_t>{x.shape(0), layer.outputs()};
  });

  m.def("generates_code", &repetition::generates_code);
  m.def(
      "choose_conv2d",
      [](py::array codes, py::array levels, py::array scale, int64_t channels, int64_t groups,
         std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
         std::array<int64_t, 2> dilation, const std::string& input_dtype, int input_zero_point, int input_bits) {
        const WeightArrays a(std::move(codes), std::move(levels), std::move(scale), std::nullopt);
        return choice(repetition::choose_conv2d(a.weights,
                                                geometry(channels, groups, kernel, stride, padding, dilation),
                                                activations(input_dtype, 1, input_zero_point, input_bits)));
      },
      py::arg("codes"), py::arg("levels"), py::arg("scale"), py::arg("channels"), py::arg("groups"), py::arg("kernel"),
      py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("input_dtype"), py::arg("input_zero_point"),
      py::arg("input_bits"));
  m.def(
      "choose_codebook",
      [](py::array index, py::array sign, py::array kernels, py::array levels, py::array scale, int64_t channels,
         int64_t groups, std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
         std::array<int64_t, 2> dilation, const std::string& input_dtype, int input_zero_point, int input_bits) {
        const CodebookArrays a(std::move(index), std::move(sign), std::move(kernels), std::move(levels),
                               std::move(scale), std::nullopt);
        const auto g = geometry(channels, groups, kernel, stride, padding, dilation);
        if (!fits(a.weights, g))
          throw py::value_error("kernels: expected (C, U, p * kH * kW), got " + describe(a.kernels));
        return choice(
            repetition::choose_conv2d(a.weights, g, activations(input_dtype, 1, input_zero_point, input_bits)));
      },
      py::arg("index"), py::arg("sign"), py::arg("kernels"), py::arg("levels"), py::arg("scale"), py::arg("channels"),
      py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("input_dtype"), py::arg("input_zero_point"), py::arg("input_bits"));
  m.def(
      "choose_linear",
      [](py::array codes, py::array levels, py::array scale, const std::string& input_dtype) {
        const WeightArrays a(std::move(codes), std::move(levels), std::move(scale), std::nullopt);
        return choice(repetition::choose_linear(a.weights, activations(input_dtype, 1, 0, 0)));
      },
      py::arg("codes"), py::arg("levels"), py::arg("scale"), py::arg("input_dtype"));
}

}  // namespace pycodesign::bindings
