// Views of NumPy arrays for kernels: checked here, never converted. Every message names the argument, what it takes and
// what came.
#pragma once

#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "repetition/repetition.h"

namespace pycodesign::bindings {

namespace py = pybind11;

// Calls what waits for Python's lock. A thread that does so while Python exits is ended there, its stack unwound: past
// destructors that need the lock, and up to functions that do not throw, where it would abort the process. It sleeps
// instead until the process ends.
template <class F> void sleep_at_exit(F&& call) {
#ifdef __GLIBCXX__
  try {
    call();
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  call();
#endif
}

// Not gil_scoped_release: its destructor ends the process when Python exits while a daemon thread computes.
template <class F> void without_gil(F&& compute) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    compute();
  } catch (...) {
    error = std::current_exception();
  }
  sleep_at_exit([&] { PyEval_RestoreThread(state); });
  if (error) std::rethrow_exception(error);
}

inline std::string describe(const py::array& a) {
  std::string text = py::str(a.dtype()).cast<std::string>() + " (";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + (a.ndim() == 1 ? ",)" : ")");
}

// -1 stands for any size, spelled by `shape`.
inline void check_array(const py::array& a, const char* name, const char* dtype, bool dtype_fits,
                        const std::vector<int64_t>& sizes, const std::string& shape) {
  bool fits = static_cast<size_t>(a.ndim()) == sizes.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i)
    fits = sizes[i] < 0 || sizes[i] == a.shape(static_cast<py::ssize_t>(i));
  if (!dtype_fits || !fits) {  // the text costs microseconds
    const std::string text = std::string(name) + ": expected " + dtype + " " + shape + ", got " + describe(a);
    if (!dtype_fits) throw py::type_error(text);
    throw py::value_error(text);
  }
  if (!(a.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    throw py::value_error(std::string(name) + ": expected elements aligned in memory, got an unaligned view");
}

template <class T> bool holds(const py::array& a) { return py::isinstance<py::array_t<T>>(a); }

inline bool holds(const py::array& a, repetition::DType dtype) {
  switch (dtype) {
    case repetition::DType::f32: return holds<float>(a);
    case repetition::DType::u8: return holds<uint8_t>(a);
    case repetition::DType::i8: return holds<int8_t>(a);
    default: return holds<int32_t>(a);
  }
}

inline const char* dtype_name(repetition::DType dtype) {
  switch (dtype) {
    case repetition::DType::f32: return "float32";
    case repetition::DType::u8: return "uint8";
    case repetition::DType::i8: return "int8";
    case repetition::DType::f16: return "float16";
    case repetition::DType::bf16: return "bfloat16";
    default: return "int32";
  }
}

// What layers take and give, in host memory and on a GPU.
using DTypes = std::initializer_list<repetition::DType>;
inline constexpr DTypes host_inputs = {repetition::DType::f32, repetition::DType::u8, repetition::DType::i8};
inline constexpr DTypes host_outputs = {repetition::DType::f32, repetition::DType::u8, repetition::DType::i8,
                                        repetition::DType::i32};
inline constexpr DTypes device_inputs = {repetition::DType::f32, repetition::DType::f16, repetition::DType::bf16,
                                         repetition::DType::u8, repetition::DType::i8};
inline constexpr DTypes device_outputs = {repetition::DType::f32, repetition::DType::f16, repetition::DType::bf16,
                                          repetition::DType::u8,  repetition::DType::i8,  repetition::DType::i32};

inline repetition::DType parse_dtype(const std::string& name, const char* argument, DTypes dtypes) {
  std::string wanted;
  for (const repetition::DType& dtype : dtypes) {
    if (name == dtype_name(dtype)) return dtype;
    if (&dtype != dtypes.begin()) wanted += &dtype + 1 == dtypes.end() ? " or " : ", ";
    wanted += std::string("'") + dtype_name(dtype) + "'";
  }
  throw py::value_error(std::string(argument) + ": expected " + wanted + ", got '" + name + "'");
}

// First and one-past-last byte an array can touch; null, null when it is empty.
inline std::pair<const char*, const char*> extent(const py::array& a) {
  const char *low = static_cast<const char*>(a.data()), *high = low + a.itemsize();
  if (a.size() == 0) return {nullptr, nullptr};
  for (py::ssize_t i = 0; i < a.ndim(); ++i) (a.strides(i) < 0 ? low : high) += a.strides(i) * (a.shape(i) - 1);
  return {low, high};
}

inline void check_apart(const py::array& out, const py::array& other, const char* name) {
  const auto [a, b] = extent(out);
  const auto [c, d] = extent(other);
  if (!a || !c || a >= d || c >= b) return;
  bool shares = true;  // slices of one buffer may lie apart in each other's gaps
  try {
    constexpr int most_work = 1 << 16;
    shares = py::module_::import("numpy").attr("shares_memory")(out, other, most_work).cast<bool>();
  } catch (py::error_already_set&) {  // too hard to tell
  }
  if (shares)
    throw py::value_error(std::string("out: expected memory apart from ") + name + ", got an array that overlaps it");
}

inline void check_writeable(const py::array& out) {
  bool repeats = false;
  for (py::ssize_t i = 0; i < out.ndim(); ++i) repeats |= out.strides(i) == 0 && out.shape(i) > 1;
  if (!out.writeable() || (repeats && out.size() > 0))
    throw py::value_error("out: expected a writeable array, got a read-only or broadcast one");
}

// Ascending strides, each beyond all that the ones before it reach: no element lies upon another.
inline void check_elements_apart(const py::array& out) {
  std::vector<std::pair<py::ssize_t, py::ssize_t>> axes;  // stride, size
  for (py::ssize_t i = 0; i < out.ndim(); ++i)
    if (out.shape(i) > 1) axes.emplace_back(std::abs(out.strides(i)), out.shape(i));
  std::sort(axes.begin(), axes.end());
  py::ssize_t reach = out.itemsize();
  for (const auto& [stride, size] : axes) {
    if (stride < reach && out.size() > 0)
      throw py::value_error("out: expected elements apart in memory, got an array that overlaps itself");
    reach += stride * (size - 1);
  }
}

}  // namespace pycodesign::bindings
