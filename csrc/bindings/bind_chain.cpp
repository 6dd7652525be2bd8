#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.h"
#include "bindings/bound_call.h"
#include "bindings/epilogue.h"
#include "core/thread_pool.h"
#include "repetition/chain.h"

namespace pycodesign::bindings {

namespace {

using repetition::Chain, repetition::DType, repetition::Epilogue, repetition::Tensor;

py::dtype numpy_dtype(DType dtype) {
  switch (dtype) {
    case DType::f32: return py::dtype::of<float>();
    case DType::u8: return py::dtype::of<uint8_t>();
    case DType::i8: return py::dtype::of<int8_t>();
    default: return py::dtype::of<int32_t>();
  }
}

// Inputs and outputs of two dimensions are rows: (N, C, 1, 1).
Chain::Shape shape_of(const py::array& a) {
  return a.ndim() == 2 ? Chain::Shape{a.shape(0), a.shape(1), 1, 1}
                       : Chain::Shape{a.shape(0), a.shape(1), a.shape(2), a.shape(3)};
}

Tensor view(const py::array& a) {
  Tensor t{static_cast<char*>(const_cast<void*>(a.data())), shape_of(a), {}};
  for (py::ssize_t i = 0; i < a.ndim(); ++i) t.stride[static_cast<size_t>(i)] = a.strides(i);
  if (a.ndim() == 2) t.stride[2] = t.stride[3] = a.itemsize();
  return t;
}

// The epilogue of a step over a value of this dtype.
Epilogue epilogue(DType input, bool has_residual, float residual_scale, float residual_zero_point,
                  std::optional<float> lo, std::optional<float> hi, const std::string& out_dtype,
                  std::optional<float> out_scale, int out_zero_point) {
  Epilogue e = parse_epilogue(input, has_residual, lo, hi, out_dtype, out_scale, out_zero_point);
  e.residual_scale = residual_scale;
  e.residual_zero_point = residual_zero_point;
  return e;
}

std::vector<py::array> run(const Chain& chain, const std::vector<py::array>& inputs,
                           const std::optional<std::vector<py::array>>& out, const std::vector<bool>& rows) {
  std::vector<Chain::Shape> shapes;
  std::vector<Tensor> from, to;
  if (inputs.size() != chain.inputs().size() || rows.size() != chain.outputs().size() ||
      (out && out->size() != rows.size()))
    throw py::value_error("inputs, out, rows: expected one for each input and output");
  for (size_t i = 0; i < inputs.size(); ++i) {
    const py::array& a = inputs[i];
    const DType dtype = chain.dtype(chain.inputs()[i]);
    const std::vector<int64_t> sizes(a.ndim() == 2 ? 2 : 4, -1);
    check_array(a, "inputs", dtype_name(dtype), holds(a, dtype), sizes, "(N, C, H, W) or (N, I)");
    shapes.push_back(shape_of(a));
    from.push_back(view(a));
  }
  std::shared_ptr<const repetition::ChainPlan> plan;
  without_gil([&] { plan = chain.plan(shapes); });  // it may make machine code
  std::vector<py::array> results;
  for (size_t i = 0; i < chain.outputs().size(); ++i) {
    const int value = chain.outputs()[i];
    const Chain::Shape& s = Chain::shape(*plan, value);
    const std::vector<int64_t> shape(s.begin(), s.begin() + (rows[i] ? 2 : 4));
    if (!out) {
      results.emplace_back(numpy_dtype(chain.dtype(value)), shape);
    } else {
      const py::array& given = (*out)[i];
      std::string text = "(";
      for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
      check_array(given, "out", dtype_name(chain.dtype(value)), holds(given, chain.dtype(value)), shape, text + ")");
      check_writeable(given);
      if (!(given.flags() & py::array::c_style)) throw py::value_error("out: expected C order, got other strides");
      for (const py::array& x : inputs) check_apart(given, x, "the inputs");
      for (const py::array& other : results) check_apart(given, other, "the other outputs");
      results.push_back(given);
    }
    to.push_back(view(results.back()));
  }
  without_gil([&] { chain.run(*plan, from, to); });
  return results;
}

std::string show(const Chain::Shape& s, py::ssize_t dimensions) {
  std::string text = "(" + std::to_string(s[0]);
  for (size_t i = 1; i < static_cast<size_t>(dimensions); ++i) text += ", " + std::to_string(s[i]);
  return text + ")";
}

// A view of an array that takes the place of a value of this dtype and shape.
Tensor bind_array(const py::array& a, const char* name, DType dtype, const Chain::Shape& shape) {
  const py::ssize_t dimensions = a.ndim() == 2 && shape[2] == 1 && shape[3] == 1 ? 2 : 4;
  check_array(a, name, dtype_name(dtype), holds(a, dtype), {shape.begin(), shape.begin() + dimensions},
              show(shape, dimensions));
  return view(a);
}

// Without an array: lets the one go that was set.
void set_input(BoundCall& b, size_t index, const std::optional<py::array>& x) {
  if (index >= b.inputs.size()) throw py::index_error("index: expected one of the chain's inputs");
  if (!x) {
    b.inputs[index] = py::object();
    return;
  }
  const int value = b.chain.chain().inputs()[index];
  b.chain.set_input(index, bind_array(*x, "x", b.chain.chain().dtype(value), b.chain.input_shape(index)));
  b.inputs[index] = *x;
}

void set_output(BoundCall& b, size_t index, const std::optional<py::array>& out) {
  if (index >= b.outputs.size()) throw py::index_error("index: expected one of the chain's outputs");
  if (!out) {
    b.outputs[index] = py::object();
    return;
  }
  const int value = b.chain.chain().outputs()[index];
  const Tensor t = bind_array(*out, "out", b.chain.chain().dtype(value), b.chain.output_shape(index));
  check_writeable(*out);
  int64_t natural = out->itemsize();
  for (size_t d = 3; d > 0; natural *= t.size[d--])
    if (out->size() > 0 && t.size[d] > 1 && t.stride[d] != natural)
      throw py::value_error("out: expected images whose elements follow one another, got other strides");
  b.chain.set_output(index, t);
  b.outputs[index] = *out;
}

}  // namespace

void bind_chain(py::module_& m) {
  using repetition::PackedConv2d, repetition::PackedLayer, repetition::Pool;
  using Sizes = std::array<int64_t, 2>;

  py::class_<Chain, std::shared_ptr<Chain>> chain(m, "Chain");
  chain.def(py::init());
  chain.def(
      "add_input",
      [](Chain& c, const std::string& dtype) { return c.add_input(parse_dtype(dtype, "dtype", host_inputs)); },
      py::arg("dtype"));
  chain.def(
      "add_layer",
      [](Chain& c, std::shared_ptr<PackedLayer> layer, bool rows, int x, int residual, float residual_scale,
         float residual_zero_point, std::optional<float> lo, std::optional<float> hi, const std::string& out_dtype,
         std::optional<float> out_scale, int out_zero_point) {
        const Epilogue e = epilogue(c.dtype(x), residual >= 0, residual_scale, residual_zero_point, lo, hi, out_dtype,
                                    out_scale, out_zero_point);
        if (rows) return c.add_linear(layer, x, residual, e);
        auto conv = std::dynamic_pointer_cast<PackedConv2d>(layer);
        if (!conv) throw py::type_error("layer: expected a PackedConv2d, got another layer");
        return c.add_conv2d(std::move(conv), x, residual, e);
      },
      py::arg("layer"), py::arg("rows"), py::arg("x"), py::arg("residual"), py::arg("residual_scale"),
      py::arg("residual_zero_point"), py::arg("lo"), py::arg("hi"), py::arg("out_dtype"), py::arg("out_scale"),
      py::arg("out_zero_point"));
  chain.def(
      "add_max_pool2d",
      [](Chain& c, int x, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation) {
        return c.add_max_pool2d(x, Pool{kernel, stride, padding, dilation, true});
      },
      py::arg("x"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"));
  chain.def(
      "add_avg_pool2d",
      [](Chain& c, int x, Sizes kernel, Sizes stride, Sizes padding, bool counts_padding, double scale, int zero_point,
         std::optional<float> lo, std::optional<float> hi, const std::string& out_dtype, std::optional<float> out_scale,
         int out_zero_point) {
        const Epilogue e = epilogue(c.dtype(x), false, 1, 0, lo, hi, out_dtype, out_scale, out_zero_point);
        return c.add_avg_pool2d(x, Pool{kernel, stride, padding, {1, 1}, counts_padding}, scale, zero_point, e);
      },
      py::arg("x"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("counts_padding"),
      py::arg("scale"), py::arg("zero_point"), py::arg("lo"), py::arg("hi"), py::arg("out_dtype"), py::arg("out_scale"),
      py::arg("out_zero_point"));
  chain.def(
      "add_add",
      [](Chain& c, int a, int b, float scale, int zero_point, float residual_scale, float residual_zero_point,
         std::optional<float> lo, std::optional<float> hi, const std::string& out_dtype, std::optional<float> out_scale,
         int out_zero_point) {
        const Epilogue e = epilogue(c.dtype(a), b >= 0, residual_scale, residual_zero_point, lo, hi, out_dtype,
                                    out_scale, out_zero_point);
        return c.add_add(a, b, scale, zero_point, e);
      },
      py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("zero_point"), py::arg("residual_scale"),
      py::arg("residual_zero_point"), py::arg("lo"), py::arg("hi"), py::arg("out_dtype"), py::arg("out_scale"),
      py::arg("out_zero_point"));
  chain.def("set_outputs", &Chain::set_outputs, py::arg("values"));
  chain.def("run", run, py::arg("inputs"), py::arg("out"), py::arg("rows"));
  chain.def(
      "plan",
      [](const Chain& c, const std::vector<Chain::Shape>& inputs, int values) {
        constexpr std::array layouts{"plain", "lifted", "channels_last"};
        const auto plan = c.plan(inputs);
        py::list all;
        for (int v = 0; v < values; ++v)
          all.append(py::make_tuple(Chain::shape(*plan, v), layouts[static_cast<size_t>(Chain::layout(*plan, v))]));
        return all;
      },
      py::arg("inputs"), py::arg("values"));

  py::class_<BoundCall, std::shared_ptr<BoundCall>> bound(m, "BoundChain");
  bound.def(py::init([](std::shared_ptr<Chain> chain, const std::vector<Chain::Shape>& inputs, int threads) {
              if (inputs.size() != chain->inputs().size() || chain->outputs().empty())
                throw py::value_error("inputs: expected a shape for each of " + std::to_string(chain->inputs().size()) +
                                      " inputs of a chain that has outputs, got " + std::to_string(inputs.size()));
              if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
              const core::Crew crew{threads};
              const core::CrewScope scope(crew);
              std::shared_ptr<BoundCall> made;
              without_gil([&] { made = std::make_shared<BoundCall>(std::move(chain), inputs); });
              return made;
            }),
            py::arg("chain"), py::arg("inputs"), py::arg("threads"));
  bound.def_property_readonly("output_shapes", [](const BoundCall& b) {
    std::vector<Chain::Shape> shapes;
    for (size_t i = 0; i < b.outputs.size(); ++i) shapes.push_back(b.chain.output_shape(i));
    return shapes;
  });
  bound.def("set_input", &set_input, py::arg("index"), py::arg("x"));
  bound.def("set_output", &set_output, py::arg("index"), py::arg("out"));
  bound.def("release", [](BoundCall& b) {
    for (auto* arrays : {&b.inputs, &b.outputs})
      for (py::object& array : *arrays) array = py::object();
  });
  bound.def("run", [](const BoundCall& b) {
    b.check_complete();
    without_gil([&] { b.chain.run(); });
  });
}

}  // namespace pycodesign::bindings
