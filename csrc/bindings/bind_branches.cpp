#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bound_call.h"
#include "branches/branches.h"
#include "core/cpu.h"
#include "core/thread_pool.h"

namespace pycodesign::bindings {

namespace {

core::Nanoseconds parse_time(const char* name, double microseconds) {
  if (!(microseconds >= 0 && microseconds <= 1e12))
    throw py::value_error(std::string(name) + ": expected microseconds from 0 to 1e12, got " +
                          std::to_string(microseconds));
  return core::Nanoseconds(std::llround(microseconds * 1e3));
}

// In Python, as one of several threads of a run. One that has to wait for the interpreter's lock sleeps, and takes tens
// of microseconds to wake up: so it spins a little first, while another of the run is in Python.
class InPython {
 public:
  explicit InPython(std::atomic<bool>& inside) : inside_(inside) {
    if (inside_.exchange(true)) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(5);
      while (!(is_counted_ = !inside_.load() && !inside_.exchange(true)) && std::chrono::steady_clock::now() < end)
        core::relax_cpu();
    }
    // A thread of a team keeps the state that it gets.
    sleep_at_exit([] {
      if (PyThreadState* state = PyGILState_GetThisThreadState()) PyEval_RestoreThread(state);
      else PyGILState_Ensure();
    });
  }
  ~InPython() {
    PyEval_SaveThread();
    if (is_counted_) inside_ = false;
  }
  InPython(const InPython&) = delete;
  InPython& operator=(const InPython&) = delete;

 private:
  std::atomic<bool>& inside_;
  bool is_counted_ = true;
};

// Lets torch's operations that begin on this thread run on one thread, where torch is loaded. In Python only.
class OneTorchThread {
 public:
  OneTorchThread() : is_held_(start_torch()) {
    if (is_held_) before_ = core::swap_runtime_threads({1, 1});
  }
  ~OneTorchThread() {
    if (is_held_) core::swap_runtime_threads(before_);
  }
  OneTorchThread(const OneTorchThread&) = delete;
  OneTorchThread& operator=(const OneTorchThread&) = delete;

 private:
  // torch's first operation on a thread sets what the thread has. Returns whether torch is loaded.
  static bool start_torch() {
    thread_local bool has_started = false;
    if (has_started) return true;
    static PyObject* const name = PyUnicode_InternFromString("torch");
    PyObject* const torch = PyDict_GetItem(PyImport_GetModuleDict(), name);
    if (!torch || !PyObject_HasAttrString(torch, "get_num_threads")) return false;  // or it is still being imported
    py::handle(torch).attr("get_num_threads")();
    return has_started = true;
  }

  bool is_held_;
  core::RuntimeThreads before_{};
};

// A body: a chain, which needs no Python, a callable, or None, which is nothing but a place in the order.
struct Body {
  py::object object;
  BoundCall* chain;

  explicit Body(py::object body)
      : object(std::move(body)), chain(is_chain(object) ? object.cast<BoundCall*>() : nullptr) {
    if (chain) chain->check_complete();
    else if (!object.is_none() && !PyCallable_Check(object.ptr()))
      throw py::type_error("bodies: expected chains and callables, got " +
                           py::str(py::type::of(object).attr("__name__")).cast<std::string>());
  }

 private:
  static bool is_chain(py::handle object) {
    static PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(py::type::of<BoundCall>().release().ptr());
    return PyObject_TypeCheck(object.ptr(), type);  // isinstance() asks the metaclass: half a microsecond
  }
};

// A new reference; throws what the callable raises. The caller is in Python.
PyObject* call(const Body& body, PyObject* arguments) {
  PyObject* result = PyObject_CallObject(body.object.ptr(), arguments);
  if (!result) throw py::error_already_set();
  return result;
}

// Bodies and who runs them.
class Runner {
 public:
  Runner(const std::vector<int>& team, const std::vector<int>& threads, const std::vector<std::vector<int>>& after,
         int teams, const std::vector<py::object>& bodies)
      : plan_(make_tasks(team, threads, after, bodies.size()), teams) {
    for (const py::object& body : bodies) bodies_.emplace_back(body);
  }

  void run(double spin, double patience, bool pin) {
    const branches::Options options{parse_time("spin", spin), parse_time("patience", patience), pin};
    for (const Body& body : bodies_)
      if (body.chain) body.chain->check_complete();
    std::atomic<bool> inside = false;
    const auto run_body = [&](int task) {
      const Body& body = bodies_[static_cast<size_t>(task)];
      if (body.chain) return body.chain->chain.run();
      if (body.object.is_none()) return;
      const InPython in(inside);
      sleep_at_exit([&] { Py_DECREF(call(body, nullptr)); });
    };
    without_gil([&] { plan_.run(run_body, options); });
  }

  int waits() const { return plan_.waits(); }

 private:
  static std::vector<branches::Task> make_tasks(const std::vector<int>& team, const std::vector<int>& threads,
                                                const std::vector<std::vector<int>>& after, size_t bodies) {
    if (team.size() != bodies || threads.size() != bodies || after.size() != bodies)
      throw py::value_error("team, threads, after: expected one for each of " + std::to_string(bodies) + " bodies");
    std::vector<branches::Task> tasks;
    for (size_t i = 0; i < bodies; ++i) tasks.push_back({team[i], threads[i], after[i]});
    return tasks;
  }

  std::vector<Body> bodies_;
  branches::Plan plan_;
};

// Bodies without an order, each on a thread of its own as far as there are cores; the caller runs the first. Every
// other callable has a copy of the caller's context variables.
class Parallel {
 public:
  Parallel(const py::list& bodies, PyObject* arguments) : arguments_(arguments) {
    for (const py::handle body : bodies) {
      bodies_.emplace_back(py::reinterpret_borrow<py::object>(body));
      contexts_.push_back(bodies_.size() == 1 || bodies_.back().chain ? py::object() : copy_context());
    }
    results_.resize(bodies_.size());
  }

  py::list run(core::Nanoseconds spin, bool alone) {
    const auto count = static_cast<int>(bodies_.size());
    const int members = alone ? 1 : std::min(count, core::available_cores());
    const auto work_as = [](void* self, int member) { static_cast<Parallel*>(self)->work(member); };
    without_gil([&] {
      if (members < 2 || !core::run_members(members, work_as, this, spin)) work(0);
    });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    py::list results(bodies_.size());
    for (size_t i = 0; i < results_.size(); ++i) results[i] = results_[i] ? std::move(results_[i]) : py::none();
    return results;
  }

 private:
  void work(int member) noexcept {
    const core::Crew alone{1};
    const core::CrewScope scope(alone);
    const auto count = static_cast<int>(bodies_.size());
    for (int i = member == 0 ? 0 : next_++; i < count && !failed_; i = next_++) {
      try {
        run_body(static_cast<size_t>(i));
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
  }

  void run_body(size_t i) {
    const Body& body = bodies_[i];
    if (body.chain) return body.chain->chain.run();
    if (body.object.is_none()) return;
    const InPython in(inside_);
    sleep_at_exit([&] {
      const OneTorchThread one;
      PyObject* const context = contexts_[i].ptr();
      if (context && PyContext_Enter(context) < 0) throw py::error_already_set();
      results_[i] = py::reinterpret_steal<py::object>(PyObject_CallObject(body.object.ptr(), arguments_));
      if (context) PyContext_Exit(context);  // also when it raised

      if (!results_[i]) throw py::error_already_set();
    });
  }

  static py::object copy_context() {
    PyObject* const context = PyContext_CopyCurrent();
    if (!context) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(context);
  }

  std::vector<Body> bodies_;
  std::vector<py::object> contexts_, results_;
  PyObject* arguments_;
  std::exception_ptr error_;
  std::atomic<int> next_ = 1;
  std::atomic<bool> inside_ = false, failed_ = false;
};

}  // namespace

void bind_branches(py::module_& m) {
  py::class_<Runner> runner(m, "BranchRunner");
  runner.def(py::init<const std::vector<int>&, const std::vector<int>&, const std::vector<std::vector<int>>&, int,
                      const std::vector<py::object>&>(),
             py::arg("team"), py::arg("threads"), py::arg("after"), py::arg("teams"), py::arg("bodies"));
  runner.def("run", &Runner::run, py::arg("spin"), py::arg("patience"), py::arg("pin"));
  runner.def_property_readonly("waits", &Runner::waits);
  m.def(
      "call_with_threads",
      [](const py::object& function, int threads) {
        if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
        const core::Crew crew{threads};
        const core::CrewScope scope(crew);
        return function();
      },
      py::arg("function"), py::arg("threads"));
  m.def(
      "run_branches",
      [](const py::list& bodies, const py::tuple& arguments, double spin, bool alone) {
        return Parallel(bodies, arguments.ptr()).run(parse_time("spin", spin), alone);
      },
      py::arg("bodies"), py::arg("arguments"), py::arg("spin"), py::arg("alone"));
}

}  // namespace pycodesign::bindings
