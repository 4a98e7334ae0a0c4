// What torch_spiral/lowering.py needs of C++: the op table, kernels, and plans made from what a lowering recorded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include "../dispatch/ops.h"
#include "../dispatch/packed.h"
#include "../dispatch/plan.h"
#include "../dispatch/trace.h"
#include "../runtime/device.h"
#include "../runtime/memory.h"

namespace py = pybind11;

namespace spiral {

namespace {

py::object* recorder = nullptr;  // never freed: calls may come while the interpreter exits

// Kernels by device and name.
struct Kernels {
  std::mutex mutex;
  std::unordered_map<std::string, std::pair<Kernel*, size_t>> by_name;
};

Kernels& kernels() {
  static Kernels* k = new Kernels;
  return *k;
}

uintptr_t compile(int index, const KernelSource& source) {
  py::gil_scoped_release release;
  Kernels& k = kernels();
  const std::string key = std::to_string(index) + ":" + source.name;
  const size_t hash = std::hash<std::string>()(source.source);
  {
    std::lock_guard lock(k.mutex);
    auto it = k.by_name.find(key);
    if (it != k.by_name.end()) {
      TORCH_CHECK(it->second.second == hash, "two kernels are named ", source.name, " but their sources differ: the name must spell all that the source depends on");
      return reinterpret_cast<uintptr_t>(it->second.first);
    }
  }
  Device& d = device(static_cast<c10::DeviceIndex>(index));
  Kernel* kernel;
  {
    DeviceLock lock(d.mutex);
    kernel = d.engine->compile(source);
  }
  std::lock_guard lock(k.mutex);
  k.by_name.emplace(key, std::make_pair(kernel, hash));
  return reinterpret_cast<uintptr_t>(kernel);
}

std::vector<uint32_t> indices(const py::handle& list) {
  std::vector<uint32_t> out;
  for (auto i : list) out.push_back(i.cast<uint32_t>());
  return out;
}

std::shared_ptr<Plan> make_plan(const py::dict& d) {
  auto plan = std::make_shared<Plan>();
  plan->needed = d["needed"].cast<size_t>();
  plan->expires = d["expires"].cast<uint64_t>();
  plan->constants = d["constants"].cast<std::vector<int64_t>>();
  for (auto e : d["exprs"]) {
    auto t = e.cast<py::tuple>();
    plan->exprs.push_back({static_cast<Code>(t[0].cast<int>()), t[1].cast<uint32_t>(), t[2].cast<uint32_t>(), t[3].cast<uint32_t>()});
  }
  for (auto c : d["checks"]) {
    auto t = c.cast<py::tuple>();
    plan->checks.push_back({t[0].cast<uint32_t>(), t[1].cast<std::string>(), t[2].cast<std::string>(),
                            t[3].cast<std::vector<std::pair<uint32_t, bool>>>()});
  }
  for (auto a : d["allocations"]) {
    auto t = a.cast<py::tuple>();
    plan->allocations.push_back({t[0].cast<bool>(), static_cast<c10::ScalarType>(t[1].cast<int>()), indices(t[2]), indices(t[3]),
                                 t[4].cast<uint32_t>(), t[5].cast<uint32_t>(), t[6].cast<uint32_t>(), t[7].cast<uint32_t>()});
  }
  for (auto s : d["steps"]) {
    auto t = s.cast<py::tuple>();
    Step step;
    step.kind = static_cast<Step::Kind>(t[0].cast<int>());
    step.when = t[1].cast<uint32_t>();
    for (auto b : t[2]) {
      auto u = b.cast<py::tuple>();
      step.buffers.push_back({u[0].cast<uint32_t>(), u[1].cast<uint32_t>(), u[2].cast<uint32_t>(), u[3].cast<uint32_t>()});
    }
    if (step.kind == Step::Kind::Launch) {
      step.kernel = reinterpret_cast<Kernel*>(t[3].cast<uintptr_t>());
      for (auto w : t[4]) {
        auto u = w.cast<py::tuple>();
        step.words.push_back({static_cast<WordKind>(u[0].cast<int>()), u[1].cast<uint32_t>()});
      }
      step.params_size = t[5].cast<uint32_t>();
      auto g = indices(t[6]);
      std::copy(g.begin(), g.end(), step.groups);
      step.flops = t[7].cast<uint32_t>();
      step.note = t[8].cast<std::string>();
    } else {
      step.bytes = t[3].cast<uint32_t>();
      step.fill_value = t[4].cast<uint8_t>();
    }
    plan->steps.push_back(std::move(step));
  }
  plan->returned = indices(d["returned"]);
  return plan;
}

// c10's exception for what Python raised, so that it crosses threads and PyTorch's own handlers as usual.
[[noreturn]] void rethrow(py::error_already_set& e) {
  std::string text = py::str(e.value());
  const bool index = e.matches(PyExc_IndexError), value = e.matches(PyExc_ValueError), type = e.matches(PyExc_TypeError);
  const bool missing = e.matches(PyExc_NotImplementedError), runtime = e.matches(PyExc_RuntimeError);
  if (!(index || value || type || missing || runtime) || std::getenv("SPIRAL_DEBUG")) text = e.what();
  TORCH_CHECK_INDEX(!index, text);
  TORCH_CHECK_VALUE(!value, text);
  TORCH_CHECK_TYPE(!(type && !std::getenv("SPIRAL_DEBUG")), text);
  TORCH_CHECK_NOT_IMPLEMENTED(!missing, text);
  TORCH_CHECK(false, text);
}

}  // namespace

std::shared_ptr<Plan> record_plan(OpId id, c10::DeviceIndex device, const py::object& args) {
  try {
    TORCH_CHECK(recorder, op(id).name, ": torch_spiral is not imported");
    return make_plan((*recorder)(id, op(id).name, static_cast<int>(device), args).cast<py::dict>());
  } catch (py::error_already_set& e) {
    rethrow(e);
  }
}

void bind_dispatch(py::module_& m) {
  m.def("op_id", [](const std::string& name) { return op_id(name); });
  m.def("set_coarse", &set_coarse);
  m.def("register_boxed", &register_boxed, py::arg("name"), py::arg("slots"), py::arg("exact"));
  m.def("set_recorder", [](py::object f) { recorder = new py::object(std::move(f)); });
  m.def("compile_kernel", [](int device, const py::dict& d) {
    KernelSource s;
    s.name = d["name"].cast<std::string>();
    s.source = d["source"].cast<std::string>();
    s.entry = d["entry"].cast<std::string>();
    const auto w = d["workgroup"].cast<std::array<uint32_t, 3>>();
    std::copy(w.begin(), w.end(), s.workgroup);
    s.bindings = d["bindings"].cast<uint32_t>();
    s.params_size = d["params_size"].cast<uint32_t>();
    s.params_immediate = d["immediate"].cast<bool>();
    s.trusted = d["trusted"].cast<bool>();
    if (d.contains("shared_memory")) s.shared_memory = d["shared_memory"].cast<uint32_t>();
    if (d.contains("scratch")) s.scratch = d["scratch"].cast<uint32_t>();
    if (d.contains("waits")) s.waits = d["waits"].cast<bool>();
    return compile(device, s);
  });
  m.def("error_site", &error_site);
  m.def("drop_packed", &drop_packed);
  m.def("plan_statistics", [] {
    const PlanStatistics s = plan_statistics();
    py::dict d;
    d["hits"] = s.hits;
    d["misses"] = s.misses;
    d["plans"] = s.plans;
    d["evicted"] = s.evicted;
    d["launches"] = s.launches;
    return d;
  });
  m.def("clear_plans", &clear_plans);
  m.def("set_plan_variant", &set_plan_variant);
  m.def("set_packing", &set_packing);
  m.def("release_packed", &release_packed, py::call_guard<py::gil_scoped_release>());
  m.def("packed_statistics", [](int device, uint32_t holder) {
    const PackedStatistics s = packed_statistics(static_cast<c10::DeviceIndex>(device), holder);
    return py::make_tuple(s.entries, s.bytes);
  });
  m.def("tracing", &tracing);
  m.attr("native_profiler") = native_profiler();
  m.def("trace_begin", &trace_begin, py::call_guard<py::gil_scoped_release>());
  m.def("trace_end", [](uint64_t token) {
    std::vector<LaunchRecord> records;
    {
      py::gil_scoped_release release;
      records = trace_end(token);
    }
    py::list list;
    for (const LaunchRecord& r : records) {
      list.append(py::make_tuple(static_cast<int>(r.device), r.op, r.kernel, r.note, r.shapes, r.dtypes, r.bytes, r.flops,
                                 py::make_tuple(r.groups[0], r.groups[1], r.groups[2]), r.start_ns, r.duration_ns));
    }
    return list;
  }, "What was launched since the token: (device, op, kernel, note, shapes, dtypes, bytes, flops, grid, start_ns, duration_ns).");
}

}  // namespace spiral
