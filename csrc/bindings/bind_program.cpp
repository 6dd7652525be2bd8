#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings/arrays.h"
#include "core/cpu.h"
#include "repetition/program_code.h"

namespace pycodesign::bindings {

namespace {

using repetition::DType, repetition::Program, repetition::ProgramCode;

template <class T> std::span<const T> view(const py::array& a, const char* name, const char* dtype, int64_t size) {
  check_array(a, name, dtype, holds<T>(a), {size}, "(n,)");
  if (!(a.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + ": expected elements one after another, got other strides");
  return {static_cast<const T*>(a.data()), static_cast<size_t>(a.size())};
}

void check_values(const Program& p) {
  const auto values = [&](std::span<const int32_t> numbers, size_t k, int64_t end) {
    return numbers[k] >= Program::zero && numbers[k] < end;
  };
  for (size_t k = 0; k < p.op.size(); ++k) {
    const int64_t result = p.inputs + static_cast<int64_t>(k);
    const bool is_product = p.op[k] == Program::multiply;
    if (p.op[k] > Program::multiply || !values(p.left, k, result) || (is_product && p.right[k] < 0) ||
        !values(p.right, k, is_product ? static_cast<int64_t>(p.constants.size()) : result))
      throw py::value_error("program: expected operations on values that lie before them, got another instruction " +
                            std::to_string(k));
  }
  for (size_t o = 0; o < p.outputs.size(); ++o)
    if (!values(p.outputs, o, p.inputs + static_cast<int64_t>(p.op.size())))
      throw py::value_error("program: expected outputs that are values, got another output " + std::to_string(o));
}

DType parse_lanes(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "int32") return DType::i32;
  throw py::value_error("dtype: expected 'float32' or 'int32', got '" + name + "'");
}

std::unique_ptr<ProgramCode> generate(int32_t inputs, const py::array& op, const py::array& left,
                                      const py::array& right, const py::array& constants, const py::array& outputs,
                                      const std::string& dtype) {
  const auto operations = view<uint8_t>(op, "op", "uint8", -1);
  const auto count = static_cast<int64_t>(operations.size());
  const Program program{inputs,
                        operations,
                        view<int32_t>(left, "left", "int32", count),
                        view<int32_t>(right, "right", "int32", count),
                        view<int32_t>(outputs, "outputs", "int32", -1),
                        view<double>(constants, "constants", "float64", -1)};
  check_values(program);
  const DType lanes = parse_lanes(dtype);
  std::unique_ptr<ProgramCode> code;
  without_gil([&] { code = std::make_unique<ProgramCode>(program, lanes, core::active_isa() >= core::Isa::avx512); });
  return code;
}

void run(const ProgramCode& code, const py::array& x, const py::array& y) {
  const int64_t bytes = code.vector_bytes(), lanes = bytes / 4;
  const char* dtype = dtype_name(code.lanes());
  check_array(x, "x", dtype, holds(x, code.lanes()), {-1, code.inputs(), lanes}, "(vectors, inputs, lanes)");
  check_array(y, "y", dtype, holds(y, code.lanes()), {x.shape(0), code.outputs(), lanes}, "(vectors, outputs, lanes)");
  check_writeable(y);
  if (!(x.flags() & y.flags() & py::array::c_style)) throw py::value_error("x, y: expected C order, got other strides");
  check_apart(y, x, "x");
  auto* out = const_cast<char*>(static_cast<const char*>(y.data()));
  without_gil([&] { code.run(static_cast<const char*>(x.data()), out, x.shape(0)); });
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<ProgramCode>(m, "ProgramCode")
      .def(py::init(&generate), py::arg("inputs"), py::arg("op"), py::arg("left"), py::arg("right"),
           py::arg("constants"), py::arg("outputs"), py::arg("dtype"))
      .def_property_readonly("lanes", [](const ProgramCode& code) { return code.vector_bytes() / 4; })
      .def_property_readonly("counts",
                             [](const ProgramCode& code) {
                               const repetition::ProgramCounts& c = code.counts();
                               py::dict counts;
                               counts["operations"] = c.operations;
                               counts["instructions"] = c.instructions;
                               counts["loads"] = c.loads;
                               counts["stores"] = c.stores;
                               counts["slots"] = c.slots;
                               return counts;
                             })
      .def("code", [](const ProgramCode& code) { return py::bytes(code.code().data(), code.code().size()); })
      .def("run", &run, py::arg("x"), py::arg("y"));
}

}  // namespace pycodesign::bindings
