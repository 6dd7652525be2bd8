#include <pybind11/pybind11.h>

namespace pycodesign::bindings {
void bind_chain(pybind11::module_&);
void bind_core(pybind11::module_&);
void bind_growth(pybind11::module_&);
void bind_program(pybind11::module_&);
void bind_repetition(pybind11::module_&);
void bind_sharing(pybind11::module_&);
}  // namespace pycodesign::bindings

PYBIND11_MODULE(_core, module) {
  module.doc() = "CPU kernels of pycodesign";
  pycodesign::bindings::bind_core(module);
  pycodesign::bindings::bind_repetition(module);
  pycodesign::bindings::bind_chain(module);
  pycodesign::bindings::bind_growth(module);
  pycodesign::bindings::bind_program(module);
  pycodesign::bindings::bind_sharing(module);
}
