// The arguments of an epilogue, checked against each other.
#pragma once

#include <limits>
#include <optional>
#include <string>

#include "bindings/arrays.h"

namespace pycodesign::bindings {

inline repetition::Epilogue parse_epilogue(repetition::DType input_dtype, bool has_residual, std::optional<float> lo,
                                           std::optional<float> hi, const std::string& out_dtype,
                                           std::optional<float> out_scale, int out_zero_point,
                                           DTypes outputs = host_outputs) {
  using repetition::DType;
  const bool integers = !repetition::is_float(input_dtype);
  repetition::Epilogue epilogue;
  epilogue.acc_dtype = integers ? DType::i32 : DType::f32;
  epilogue.out_dtype = parse_dtype(out_dtype, "out_dtype", outputs);
  if (epilogue.out_dtype == DType::i32) {
    if (!integers)
      throw py::value_error(std::string("out_dtype: expected 'float32', 'uint8' or 'int8' for ") +
                            dtype_name(input_dtype) + " inputs, got 'int32'");
    if (has_residual || lo || hi)
      throw py::value_error("out_dtype: 'int32' gives the exact sums; expected no residual and no clamp with it");
  }
  const bool quantized = epilogue.out_dtype == DType::u8 || epilogue.out_dtype == DType::i8;
  if (quantized != out_scale.has_value())
    throw py::value_error(quantized
                              ? "out_scale: expected a positive number for out_dtype '" + out_dtype + "', got None"
                              : "out_scale: expected None for out_dtype '" + out_dtype + "', got a number");
  if (quantized && !(*out_scale > 0 && *out_scale < std::numeric_limits<float>::infinity()))
    throw py::value_error("out_scale: expected a positive finite float32, got " + std::to_string(*out_scale));
  const int lowest = epilogue.out_dtype == DType::i8 ? -128 : 0;
  if (quantized ? out_zero_point < lowest || out_zero_point > lowest + 255 : out_zero_point != 0)
    throw py::value_error("out_zero_point: expected a value of " + out_dtype + (quantized ? "" : ": 0") + ", got " +
                          std::to_string(out_zero_point));
  epilogue.out_scale = out_scale.value_or(1.0f);
  epilogue.out_zero_point = out_zero_point;
  epilogue.has_lo = lo.has_value();
  epilogue.has_hi = hi.has_value();
  epilogue.lo = lo.value_or(0.0f);
  epilogue.hi = hi.value_or(0.0f);
  epilogue.has_residual = has_residual;
  return epilogue;
}

}  // namespace pycodesign::bindings
