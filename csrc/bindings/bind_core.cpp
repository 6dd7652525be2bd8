#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/cpu.h"
#include "core/thread_pool.h"

namespace pycodesign::bindings {

namespace py = pybind11;

void bind_core(py::module_& m) {
  // Detected on import: a child that is forked while another thread detects for the first time would wait for it.
  core::supported_isas();
  core::cache_sizes();
  core::core_kind();
  core::available_cores();
  m.def("set_isa", [](const std::string& name) { core::set_isa(name); }, py::arg("name"));
  m.def("active_isa", [] { return std::string(core::isa_name(core::active_isa())); });
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const core::Isa isa : core::supported_isas()) names.emplace_back(core::isa_name(isa));
    return names;
  });
  m.def("set_num_threads", &core::set_num_threads, py::arg("n"));
  m.def("get_num_threads", &core::num_threads);
  m.def(
      "swap_runtime_threads",
      [](int openmp, int mkl) {
        const core::RuntimeThreads before = core::swap_runtime_threads({openmp, mkl});
        return py::make_tuple(before.openmp, before.mkl);
      },
      py::arg("openmp"), py::arg("mkl"));
  m.def("thread_backend", &core::team_name);
  m.def("available_cores", &core::available_cores);
  m.def("cpu_name", &core::cpu_name);
  m.def("cache_sizes", [] {
    const core::CacheSizes c = core::cache_sizes();
    py::dict sizes;
    sizes["l1d"] = c.l1d;
    sizes["l2"] = c.l2;
    sizes["l3"] = c.l3;
    return sizes;
  });
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["version"] = PYCODESIGN_VERSION;
#if defined(__x86_64__)
    info["isas"] = std::vector<std::string>{"scalar", "avx2", "avx2_vnni", "avx512", "avx512_vbmi", "avx512_amx"};
#else
    info["isas"] = std::vector<std::string>{"scalar"};
#endif
    return info;
  });
}

}  // namespace pycodesign::bindings
