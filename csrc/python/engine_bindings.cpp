// torch_spiral._C.engines: engines without torch's devices, for tests and tools. Waits and compilation release the GIL.
#include "runtime/engine.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>

namespace py = pybind11;

namespace spiral {

namespace {

const char* name_of(DeviceType type) {
  switch (type) {
    case DeviceType::DiscreteGPU: return "discrete_gpu";
    case DeviceType::IntegratedGPU: return "integrated_gpu";
    case DeviceType::CPU: return "cpu";
    default: return "software";
  }
}

const char* name_of(Language language) {
  return language == Language::OpenCL ? "opencl" : language == Language::WGSL ? "wgsl" : "triton";
}

const char* name_of(ScheduleClass schedule_class) {
  return schedule_class == ScheduleClass::Vector ? "vector" : schedule_class == ScheduleClass::Simt ? "simt" : "block";
}

}  // namespace

// Also of runtime_bindings.cpp.
py::dict to_dict(const DeviceProperties& p) {
  py::dict d;
  d["engine"] = p.engine;
  d["name"] = p.name;
  d["vendor"] = p.vendor;
  d["driver"] = p.driver;
  d["api_version"] = p.api_version;
  d["type"] = name_of(p.type);
  d["language"] = name_of(p.language);
  d["schedule_class"] = name_of(p.schedule_class);
#define SPIRAL_PROPERTY(name) d[#name] = p.name;
  SPIRAL_PROPERTY(ordinal)
  SPIRAL_PROPERTY(total_memory)
  SPIRAL_PROPERTY(max_allocation)
  SPIRAL_PROPERTY(max_binding)
  SPIRAL_PROPERTY(max_params)
  SPIRAL_PROPERTY(compute_units)
  SPIRAL_PROPERTY(max_workgroup_size)
  SPIRAL_PROPERTY(max_workgroup_memory)
  SPIRAL_PROPERTY(max_workgroups)
  SPIRAL_PROPERTY(max_bindings)
  SPIRAL_PROPERTY(subgroup_min)
  SPIRAL_PROPERTY(subgroup_max)
  SPIRAL_PROPERTY(float16)
  SPIRAL_PROPERTY(float64)
  SPIRAL_PROPERTY(int64)
  SPIRAL_PROPERTY(int64_atomics)
  SPIRAL_PROPERTY(float32_atomics)
  SPIRAL_PROPERTY(timestamps)
#undef SPIRAL_PROPERTY
  return d;
}

namespace {

// An engine with the lock that its callers owe it. Whatever came from it keeps it alive.
struct RawEngine {
  std::unique_ptr<Engine> engine;
  std::mutex mutex;

  // Calls f(engine) without the GIL.
  template <typename F>
  auto call(F&& f) {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex);
    return f(*engine);
  }
};

struct RawMemory {
  std::shared_ptr<RawEngine> owner;
  Memory* memory;
  uint64_t size;

  RawMemory(std::shared_ptr<RawEngine> owner, Memory* memory, uint64_t size)
      : owner(std::move(owner)), memory(memory), size(size) {}
  RawMemory(const RawMemory&) = delete;
  ~RawMemory() { release(); }

  void release() {
    if (!memory) return;
    std::lock_guard<std::mutex> lock(owner->mutex);
    owner->engine->free(std::exchange(memory, nullptr));
  }
  Memory* get() const {
    if (!memory) throw py::value_error("this memory was freed");
    return memory;
  }
};

struct RawKernel {
  std::shared_ptr<RawEngine> owner;
  Kernel* kernel;
  uint32_t bindings, params_size;
};

struct RawEvent {
  std::shared_ptr<RawEngine> owner;  // outlives the handle
  std::unique_ptr<EventHandle> handle;
};

struct RawAdapter {
  std::unique_ptr<Adapter> adapter;
};

py::tuple adapters(const std::string& engine, const std::string& library) {
  std::string why;
  std::vector<std::unique_ptr<Adapter>> found;
  {
    py::gil_scoped_release release;
    if (engine == "opencl") {
      found = opencl_adapters(library, why);
    } else if (engine == "wgpu") {
      found = wgpu_adapters(library, why);
    } else if (engine == "cuda") {
      found = cuda_adapters(why);
    } else {
      TORCH_CHECK_VALUE(false, "no such engine: ", engine, "; there are opencl, wgpu and cuda");
    }
  }
  py::list list;
  for (auto& adapter : found) list.append(py::cast(RawAdapter{std::move(adapter)}));
  return py::make_tuple(list, why);
}

std::string_view contiguous_bytes(const py::buffer_info& info) {
  py::ssize_t stride = info.itemsize;
  for (py::ssize_t i = info.ndim; i-- > 0; stride *= info.shape[i]) {
    if (info.shape[i] != 1 && info.strides[i] != stride) throw py::value_error("the data must be contiguous");
  }
  return {static_cast<const char*>(info.ptr), size_t(info.size * info.itemsize)};
}

KernelSource to_source(const py::dict& d) {
  KernelSource source;
  std::vector<uint32_t> workgroup = {1, 1, 1};
  for (auto [key, value] : d) {
    const auto name = key.cast<std::string>();
    if (name == "name") source.name = value.cast<std::string>();
    else if (name == "source") source.source = value.cast<std::string>();
    else if (name == "entry") source.entry = value.cast<std::string>();
    else if (name == "workgroup") workgroup = value.cast<std::vector<uint32_t>>();
    else if (name == "bindings") source.bindings = value.cast<uint32_t>();
    else if (name == "params_size") source.params_size = value.cast<uint32_t>();
    else if (name == "params_immediate") source.params_immediate = value.cast<bool>();
    else if (name == "trusted") source.trusted = value.cast<bool>();
    else if (name == "shared_memory") source.shared_memory = value.cast<uint32_t>();
    else if (name == "scratch") source.scratch = value.cast<uint32_t>();
    else if (name == "waits") source.waits = value.cast<bool>();
    else throw py::key_error("a kernel has no " + name);
  }
  TORCH_CHECK_VALUE(workgroup.size() == 3, "a workgroup has three sizes");
  std::copy(workgroup.begin(), workgroup.end(), source.workgroup);
  return source;
}

// Enqueues `times` times; more than once to measure the host's share.
void enqueue(RawEngine& self, const RawKernel& kernel, const std::vector<RawMemory*>& memories, const py::bytes& params,
             const std::vector<uint32_t>& groups, int64_t times) {
  const auto block = std::string_view(params);
  TORCH_CHECK_VALUE(memories.size() == kernel.bindings, "the kernel takes ", kernel.bindings, " buffers, not ", memories.size());
  TORCH_CHECK_VALUE(block.size() == kernel.params_size, "the kernel's parameter block has ", kernel.params_size, " bytes, not ",
                    block.size());
  TORCH_CHECK_VALUE(groups.size() == 3, "groups are three counts");
  std::vector<Binding> bindings;
  for (RawMemory* memory : memories) bindings.push_back({memory->get(), 0, memory->size});
  self.call([&](Engine& engine) {
    for (int64_t i = 0; i < times; i++) {
      engine.enqueue(kernel.kernel, bindings.data(), uint32_t(bindings.size()), block.data(), groups.data());
    }
  });
}

}  // namespace

void bind_engine(py::module_& root) {
  py::module_ m = root.def_submodule("engines", "Raw engines, for tests and tools. Offsets and sizes are bytes.");

  py::class_<RawMemory, std::shared_ptr<RawMemory>>(m, "Memory").def_readonly("size", &RawMemory::size);
  py::class_<RawKernel>(m, "Kernel").def_property_readonly("name", [](const RawKernel& k) { return k.kernel->name; });
  py::class_<RawEvent>(m, "Event");

  py::class_<RawAdapter>(m, "Adapter")
      .def_property_readonly("properties", [](const RawAdapter& a) { return to_dict(a.adapter->properties); })
      .def("open", [](RawAdapter& a) {
        py::gil_scoped_release release;
        auto raw = std::make_shared<RawEngine>();
        raw->engine = a.adapter->open();
        return raw;
      });

  py::class_<RawEngine, std::shared_ptr<RawEngine>>(m, "Engine")
      .def_property_readonly("properties", [](const RawEngine& e) { return to_dict(e.engine->properties()); })
      .def_property_readonly("objects_created", [](RawEngine& e) { return e.engine->objects_created(); })
      .def("allocate",
           [](const std::shared_ptr<RawEngine>& e, uint64_t size) {
             Memory* memory = e->call([&](Engine& engine) { return engine.allocate(size); });
             return std::make_shared<RawMemory>(e, memory, size);
           })
      .def("free", [](RawEngine&, RawMemory& memory) { memory.release(); })
      .def("write",
           [](RawEngine& e, RawMemory& memory, uint64_t offset, const py::buffer& data) {
             const py::buffer_info info = data.request();
             const std::string_view bytes = contiguous_bytes(info);
             Memory* target = memory.get();
             e.call([&](Engine& engine) { engine.write(target, offset, bytes.data(), bytes.size()); });
           })
      .def("read",
           [](RawEngine& e, RawMemory& memory, uint64_t offset, uint64_t size) {
             // A buffer of its own first: a bytes object of a wild size would be allocated before the range is checked.
             TORCH_CHECK_VALUE(offset <= memory.size && size <= memory.size - offset, "a read of ", size, " bytes at ", offset,
                               " exceeds an allocation of ", memory.size);
             py::bytes result(nullptr, size);
             void* data = PyBytes_AsString(result.ptr());
             Memory* source = memory.get();
             e.call([&](Engine& engine) { engine.read(source, offset, data, size); });
             return result;
           })
      .def("read_async",
           [](RawEngine& e, RawMemory& memory, uint64_t offset, const py::buffer& data) {
             // The caller keeps `data` until the next synchronize().
             const py::buffer_info info = data.request(true);
             const std::string_view bytes = contiguous_bytes(info);
             Memory* source = memory.get();
             e.call([&](Engine& engine) { engine.read_async(source, offset, const_cast<char*>(bytes.data()), bytes.size()); });
           })
      .def("copy",
           [](RawEngine& e, RawMemory& src, uint64_t src_offset, RawMemory& dst, uint64_t dst_offset, uint64_t size) {
             Memory *from = src.get(), *to = dst.get();
             e.call([&](Engine& engine) { engine.copy(from, src_offset, to, dst_offset, size); });
           })
      .def("fill",
           [](RawEngine& e, RawMemory& memory, uint64_t offset, uint64_t size, uint8_t value) {
             Memory* target = memory.get();
             e.call([&](Engine& engine) { engine.fill(target, offset, size, value); });
           })
      .def("compile",
           [](const std::shared_ptr<RawEngine>& e, const py::dict& kernel) {
             const KernelSource source = to_source(kernel);
             Kernel* compiled = e->call([&](Engine& engine) { return engine.compile(source); });
             return RawKernel{e, compiled, source.bindings, source.params_size};
           },
           "The keys are the fields of KernelSource in csrc/runtime/engine.h.")
      .def("enqueue", enqueue, py::arg("kernel"), py::arg("memories"), py::arg("params"), py::arg("groups"), py::arg("times") = 1)
      .def("flush", [](RawEngine& e) { e.call([](Engine& engine) { engine.flush(); }); })
      .def("synchronize", [](RawEngine& e) { e.call([](Engine& engine) { engine.synchronize(); }); })
      .def("record",
           [](const std::shared_ptr<RawEngine>& e, bool timed) {
             return RawEvent{e, e->call([&](Engine& engine) { return engine.record(timed); })};
           },
           py::arg("timed") = false)
      .def("query", [](RawEngine& e, RawEvent& event) { return e.call([&](Engine& engine) { return engine.query(*event.handle); }); })
      .def("wait", [](RawEngine& e, RawEvent& event) { e.call([&](Engine& engine) { engine.wait(*event.handle); }); })
      .def("elapsed_ms", [](RawEngine& e, RawEvent& start, RawEvent& end) {
        return e.call([&](Engine& engine) { return engine.elapsed_ms(*start.handle, *end.handle); });
      });

  m.def("adapters", adapters, py::arg("engine"), py::arg("library") = "",
        "(adapters, why): what \"opencl\", \"wgpu\" or \"cuda\" offers, and where that is nothing, the reason.");
}

}  // namespace spiral
