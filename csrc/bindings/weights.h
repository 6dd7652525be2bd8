// Weights and options of a layer as NumPy and Python hold them, checked.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "bindings/arrays.h"
#include "repetition/repetition.h"

namespace pycodesign::bindings {

inline void check_c_order(std::initializer_list<const py::array*> arrays, const std::string& names) {
  for (const py::array* a : arrays)
    if (!(a->flags() & py::array::c_style)) throw py::value_error(names + ": expected C order, got other strides");
}

// Weights as NumPy holds them, checked; `weights` borrows from the arrays.
struct WeightArrays {
  py::array codes, levels, scale;
  std::optional<py::array> bias;
  repetition::Weights weights;

  WeightArrays(py::array codes_, py::array levels_, py::array scale_, std::optional<py::array> bias_)
      : codes(std::move(codes_)), levels(std::move(levels_)), scale(std::move(scale_)), bias(std::move(bias_)) {
    check_array(codes, "codes", "uint8", holds<uint8_t>(codes), {-1, -1}, "(O, I)");
    const int64_t O = codes.shape(0);
    check_array(levels, "levels", "float32", holds<float>(levels), {-1, -1}, "(1 or O, Q)");
    check_array(scale, "scale", "float32", holds<float>(scale), {O, -1}, "(O, G)");
    if (bias) check_array(*bias, "bias", "float32", holds<float>(*bias), {O}, "(" + std::to_string(O) + ",)");
    check_c_order({&codes, &levels, &scale}, "codes, levels, scale");
    if (bias) check_c_order({&*bias}, "bias");
    const int64_t Q = levels.shape(1), G = scale.shape(1);
    if (O == 0 || codes.shape(1) == 0)
      throw py::value_error("codes: expected at least one output and input, got " + describe(codes));
    if (Q == 0 || Q > 256) throw py::value_error("levels: expected (1 or O, 1 to 256), got " + describe(levels));
    if (G == 0 || codes.shape(1) % G)
      throw py::value_error("scale: expected (O, a divisor of the " + std::to_string(codes.shape(1)) +
                            " inputs), got " + describe(scale));
    if (levels.shape(0) != 1 && levels.shape(0) != O)
      throw py::value_error("levels: expected (1 or O, Q), got " + describe(levels));
    const auto* c = static_cast<const uint8_t*>(codes.data());
    for (py::ssize_t i = 0; i < codes.size(); ++i)
      if (c[i] >= Q)
        throw py::value_error("codes: expected values below " + std::to_string(Q) + ", got " + std::to_string(c[i]));
    weights = {O,
               codes.shape(1),
               c,
               static_cast<const float*>(levels.data()),
               levels.shape(0),
               Q,
               static_cast<const float*>(scale.data()),
               G,
               bias ? static_cast<const float*>(bias->data()) : nullptr,
               nullptr};
  }
};

// The same as indices into a codebook.
struct CodebookArrays {
  py::array index, sign, kernels, levels, scale;
  std::optional<py::array> bias;
  repetition::Codebook codebook;
  repetition::Weights weights;

  CodebookArrays(py::array index_, py::array sign_, py::array kernels_, py::array levels_, py::array scale_,
                 std::optional<py::array> bias_)
      : index(std::move(index_)),
        sign(std::move(sign_)),
        kernels(std::move(kernels_)),
        levels(std::move(levels_)),
        scale(std::move(scale_)),
        bias(std::move(bias_)) {
    check_array(index, "index", "uint8", holds<uint8_t>(index), {-1, -1}, "(O, J)");
    const int64_t O = index.shape(0), J = index.shape(1);
    check_array(sign, "sign", "int8", holds<int8_t>(sign), {O, J}, "(O, J)");
    check_array(kernels, "kernels", "float32", holds<float>(kernels), {-1, -1, -1}, "(C, U, inputs)");
    check_array(levels, "levels", "float32", holds<float>(levels), {1, -1}, "(1, Q)");
    check_array(scale, "scale", "float32", holds<float>(scale), {O, 1}, "(O, 1)");
    if (bias) check_array(*bias, "bias", "float32", holds<float>(*bias), {O}, "(" + std::to_string(O) + ",)");
    check_c_order({&index, &sign, &kernels, &levels, &scale}, "index, sign, kernels, levels, scale");
    if (bias) check_c_order({&*bias}, "bias");
    const int64_t C = kernels.shape(0), U = kernels.shape(1), inputs = kernels.shape(2);
    if (O == 0 || J == 0 || C == 0 || U == 0 || U > 256 || inputs == 0 || J % C)
      throw py::value_error("kernels: expected (C, U, inputs) with at most 256 kernels and C a divisor of the " +
                            std::to_string(J) + " patterns, got " + describe(kernels));
    const auto* at = static_cast<const uint8_t*>(index.data());
    const auto* signs = static_cast<const int8_t*>(sign.data());
    for (py::ssize_t i = 0; i < index.size(); ++i) {
      if (at[i] >= U)
        throw py::value_error("index: expected values below " + std::to_string(U) + ", got " + std::to_string(at[i]));
      if (signs[i] != 1 && signs[i] != -1)
        throw py::value_error("sign: expected -1 or 1, got " + std::to_string(signs[i]));
    }
    codebook = {C, U, inputs, J, at, signs, static_cast<const float*>(kernels.data())};
    weights = {O,
               J * inputs,
               nullptr,
               static_cast<const float*>(levels.data()),
               1,
               levels.shape(1),
               static_cast<const float*>(scale.data()),
               1,
               bias ? static_cast<const float*>(bias->data()) : nullptr,
               &codebook};
  }
  CodebookArrays(const CodebookArrays&) = delete;
  CodebookArrays& operator=(const CodebookArrays&) = delete;
};

inline repetition::Algorithm parse_algorithm(const std::string& name) {
  using repetition::Algorithm;
  for (const auto a : {Algorithm::codegen, Algorithm::tables, Algorithm::dense, Algorithm::packed, Algorithm::codebook})
    if (name == repetition::algorithm_name(a)) return a;
  throw py::value_error("algorithm: expected 'codegen', 'tables', 'dense', 'packed' or 'codebook', got '" + name + "'");
}

inline repetition::Activations activations(const std::string& dtype, double scale, int zero_point, int bits,
                                           DTypes dtypes = host_inputs) {
  return {parse_dtype(dtype, "input_dtype", dtypes), scale, zero_point, bits};
}

inline repetition::Geometry geometry(int64_t channels, int64_t groups, std::array<int64_t, 2> kernel,
                                     std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                                     std::array<int64_t, 2> dilation) {
  for (const int64_t v : {channels, groups, kernel[0], kernel[1], stride[0], stride[1], dilation[0], dilation[1]})
    if (v < 1 || v > (1 << 24))
      throw py::value_error("channels, groups, kernel, stride, dilation: expected positive sizes, got " +
                            std::to_string(v));
  if (std::min(padding[0], padding[1]) < 0 || std::max(padding[0], padding[1]) > (1 << 24))
    throw py::value_error("padding: expected sizes from 0 to 2^24, got (" + std::to_string(padding[0]) + ", " +
                          std::to_string(padding[1]) + ")");
  return {channels, groups, kernel, stride, padding, dilation};
}

inline bool fits(const repetition::Weights& w, const repetition::Geometry& g) {
  return g.channels % g.groups == 0 && w.outputs % g.groups == 0 &&
         w.inputs == g.channels / g.groups * g.kernel[0] * g.kernel[1] &&
         (!w.codebook || w.codebook->inputs % (g.kernel[0] * g.kernel[1]) == 0);
}

}  // namespace pycodesign::bindings
