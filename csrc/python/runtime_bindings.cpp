// What torch_spiral/device needs of C++ and torch has no way to ask for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "aten/fallback.h"
#include "aten/random.h"
#include "dispatch/packed.h"
#include "runtime/device.h"
#include "runtime/memory.h"

#include <ATen/Context.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <unordered_set>

namespace py = pybind11;

namespace spiral {

py::dict to_dict(const DeviceProperties&);  // engine_bindings.cpp

namespace {

using Index = c10::DeviceIndex;
using NoGil = py::call_guard<py::gil_scoped_release>;

// The innermost frame that isn't torch's or ours.
std::string caller() {
  if (!Py_IsInitialized()) return "";
  py::gil_scoped_acquire gil;
  try {
    for (py::object frame = py::module_::import("sys").attr("_getframe")(); !frame.is_none(); frame = frame.attr("f_back")) {
      const auto file = frame.attr("f_code").attr("co_filename").cast<std::string>();
      if (file.find("/torch/") != std::string::npos || file.find("/torch_spiral/") != std::string::npos) continue;
      return file + ":" + std::to_string(frame.attr("f_lineno").cast<int>());
    }
  } catch (py::error_already_set& e) {  // no Python frame: a thread of autograd's
    e.restore();
    PyErr_Clear();
  }
  return "";
}

// Threads that may not go back to Python. One that takes the GIL while the interpreter is finalised is ended by unwinding its
// stack, which aborts the process where frames of C++ are on it; these stay where they are until the process ends.
std::atomic<const std::unordered_set<unsigned long>*> held{nullptr};

void hold() {
  if (held.load(std::memory_order_acquire)->count(PyThread_get_thread_ident()) == 0) return;
  if (PyGILState_Check()) PyEval_SaveThread();
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

const char* name_of(FallbackMode mode) {
  return mode == FallbackMode::Warn ? "warn" : mode == FallbackMode::Error ? "error" : "silent";
}

}  // namespace

void bind_runtime(py::module_& m) {
  set_caller_finder(&caller);
  set_reclaimer([](Index index) { drop_packed(index, true); });

  m.def("set_engine_library", &set_engine_library, py::arg("engine"), py::arg("path"));
  m.def("refuse_engine", &refuse_engine, py::arg("engine"), py::arg("why"));
  m.def("engine_reports", [] {
    std::vector<EngineReport> reports;
    {
      py::gil_scoped_release release;
      reports = engine_reports();
    }
    py::list list;
    for (const auto& r : reports) {
      py::dict d;
      d["engine"] = r.engine;
      d["library"] = r.library;
      d["why"] = r.why;
      d["devices"] = r.devices;
      list.append(d);
    }
    return list;
  });

  m.def("device_count", &device_count, NoGil());
  m.def("devices_known", &devices_known);
  m.def("manual_seed_all", &manual_seed_all);
  m.def("current_device", [] { return static_cast<int>(current_device()); });
  m.def("set_device", [](int index) { set_current_device(static_cast<Index>(index)); }, NoGil());
  m.def("exchange_device", [](int index) {
    return static_cast<int>(exchange_device_unchecked(static_cast<Index>(index)));
  });
  m.def("device_is_open", [](int index) { return device_is_open(static_cast<Index>(index)); });
  m.def("in_bad_fork", &in_bad_fork);
  m.def("device_properties", [](int index) {
    const DeviceProperties* p;
    {
      py::gil_scoped_release release;
      p = &device_properties(static_cast<Index>(index));
    }
    return to_dict(*p);
  });
  m.def("objects_created", [](int index) {
    Device& d = device(static_cast<Index>(index));
    DeviceLock lock(d.mutex);
    return d.engine->objects_created();
  }, NoGil());
  m.def("synchronize", [](int index) { synchronize(device(static_cast<Index>(index))); }, NoGil());
  m.def("synchronize_all", &synchronize_all, NoGil());

  m.def("empty_cache", [](int index) {
    if (!device_is_open(static_cast<Index>(index))) return;
    drop_packed(static_cast<Index>(index), true);
    empty_cache(static_cast<Index>(index));
  }, NoGil());
  m.def("memory_budget", [](int index) { return memory_budget(static_cast<Index>(index)); }, NoGil());
  m.def("set_memory_budget", [](int index, uint64_t bytes) { set_memory_budget(static_cast<Index>(index), bytes); }, NoGil());
  m.def("memory_allocated", [](int index) { return memory_allocated(static_cast<Index>(index)); }, NoGil());
  m.def("memory_reserved", [](int index) { return memory_reserved(static_cast<Index>(index)); }, NoGil());
  m.def("format_bytes", &format_bytes);
  m.def("write_epoch", [](uintptr_t storage) { return write_epoch(reinterpret_cast<const void*>(storage)); });

  m.def("hold_threads", [](const std::vector<unsigned long>& identifiers) {
    held.store(new std::unordered_set<unsigned long>(identifiers.begin(), identifiers.end()), std::memory_order_release);
    set_gate(&hold);
  });

  m.def("alert_not_deterministic", [](const std::string& name) { at::globalContext().alertNotDeterministic(name); });

  m.def("fallback_mode", [] { return name_of(fallback_mode()); });
  m.def("set_fallback_mode", [](const std::string& mode) { set_fallback_mode(parse_fallback_mode(mode)); });
  m.def("fallbacks", &fallbacks);
  m.def("reset_fallbacks", &reset_fallbacks);
  m.def("register_host", &register_host);
  m.def("host_ops", [] {
    std::vector<std::tuple<std::string, int64_t, int64_t>> out;
    for (const HostOp& op : host_ops()) out.emplace_back(op.name, op.calls, op.bytes);
    return out;
  });
}

}  // namespace spiral
