// The CUDA and HIP engine: memory, one stream, events and launches through the driver API, found at run time. Kernels
// arrive as the binaries that Triton made (torch_spiral/kernels/triton.py).
//
// The device's primary context is used, the one that torch.cuda has: addresses of either side are good on the other, and
// their streams can wait for each other's events.
#include "runtime/cuda_api.h"
#include "runtime/engine.h"
#include "runtime/fork.h"
#include "runtime/kernel_cache.h"
#include "runtime/library.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace spiral {
namespace {

using namespace cuda;

// Writes up to a segment's size go through a ring of pinned host memory, so that they neither wait for the stream nor need
// their data to live on. Larger ones are dominated by the copy itself and wait.
constexpr uint64_t kStagingSegment = 4 << 20;
constexpr int kStagingSegments = 4;

// Triton appends two pointers to a kernel's parameters: to scratch memory (tensor descriptors), and to one for profiling, which
// is never used.
constexpr size_t kScratchPointers = 2 * sizeof(void*);
constexpr size_t kMaxParams = 4096;  // CUDA's limit for all devices, scratch pointers included

constexpr uint32_t kMaxGridYZ = 65535;

// From how many launches on a graph is worth making: the driver takes some 3 us for a launch, and for one in a graph 0.2 us where
// its parameters change and the device 1 us from one kernel to the next (H200).
constexpr size_t kLeastInGraph = 8;

// Of scratch memory, in bytes. What launches that are handed over together take ends a stretch or a batch at the most.
constexpr size_t kLeastScratch = 1 << 20, kMaxScratch = 64 << 20, kScratchAlignment = 256;

// Graphs hold memory of the device for as long as they are kept: at most so many nodes in all (SPIRAL_CUDA_GRAPH_NODES; 0: no graphs),
// where a graph counts as some more. A graph that was dropped for others so often is not made again.
constexpr size_t kMaxGraphNodes = 1 << 15, kNodesOfGraph = 64;
constexpr int kMaxDrops = 3;

// Launches outside of sequences are held back and reach the driver in batches, which are graphs where they come again with the same
// kernels: but for the first ones after the device may have run empty. A batch ends behind one pair of kernels in so many, by their names,
// so that a loop is cut where it was cut the time before.
constexpr size_t kAtOnce = 8, kMaxBatch = 64, kCut = 8;
constexpr size_t kMaxBatches = 1024;  // that are remembered

size_t max_graph_nodes() {
  const char* text = std::getenv("SPIRAL_CUDA_GRAPH_NODES");
  return text ? std::strtoull(text, nullptr, 10) : kMaxGraphNodes;
}

// Whether kernels of graphs may start before those ahead of them have ended (programmatic dependent launch); SPIRAL_PDL=0: never.
bool programmatic_launches() {
  const char* text = std::getenv("SPIRAL_PDL");
  return !text || std::strcmp(text, "0") != 0;
}

std::string describe(const Api& api, Result code) {
  const char *name = nullptr, *text = nullptr;
  if (api.error_name) api.error_name(code, &name);
  if (api.error_text) api.error_text(code, &text);
  return std::string(name ? name : "error ") + " (" + std::to_string(code) + ")" + (text ? std::string(": ") + text : "");
}

#define CUDA_CHECK(expression, ...)                                                                                   \
  do {                                                                                                                \
    const Result code_ = (expression);                                                                                \
    TORCH_CHECK(code_ == kSuccess, api_.dialect->label, ": ", __VA_ARGS__, ": ", describe(api_, code_));              \
  } while (false)

// The functions of a driver, loaded once and never unloaded. Null, with `why`, where there is no driver.
const Api* load_api(const Dialect& dialect, std::string& why) {
  static std::mutex mutex;
  static Api loaded[2];
  std::lock_guard<std::mutex> lock(mutex);
  Api& api = loaded[dialect.hip];
  if (api.dialect) return &api;
  void* library = nullptr;
  for (const char* name : dialect.libraries) {
    if (name && (library = open_library(name))) break;
  }
  if (!library) {
    why = std::string("no ") + dialect.vendor + " driver (" + dialect.libraries[0] + ")";
    return nullptr;
  }
#define SPIRAL_CUDA_LOAD(member, parameters, cuda_name, hip_name)                                                     \
  api.member = reinterpret_cast<decltype(api.member)>(find_symbol(library, dialect.hip ? hip_name : cuda_name));     \
  if (!api.member) {                                                                                                  \
    why = std::string("the ") + dialect.vendor + " driver lacks " + (dialect.hip ? hip_name : cuda_name);             \
    return nullptr;                                                                                                   \
  }
  SPIRAL_CUDA_FUNCTIONS(SPIRAL_CUDA_LOAD)
#undef SPIRAL_CUDA_LOAD
#define SPIRAL_CUDA_LOAD(member, parameters, name) \
  if (!dialect.hip) api.member = reinterpret_cast<decltype(api.member)>(find_symbol(library, name));
  SPIRAL_CUDA_OPTIONAL_FUNCTIONS(SPIRAL_CUDA_LOAD)
#undef SPIRAL_CUDA_LOAD
  if (dialect.hip) api.properties = reinterpret_cast<decltype(api.properties)>(find_symbol(library, "hipGetDevicePropertiesR0600"));
  api.dialect = &dialect;
  return &api;
}

int attribute(const Api& api, DeviceHandle device, int what) {
  int value = 0;
  api.device_attribute(&value, what, device);
  return value;
}

// The architecture that kernels are compiled for: sm_90, gfx942. Empty where a HIP driver does not say.
std::string architecture(const Api& api, DeviceHandle device) {
  const Dialect& d = *api.dialect;
  if (!d.hip) {
    return "sm_" + std::to_string(attribute(api, device, d.capability_major)) + std::to_string(attribute(api, device, d.capability_minor));
  }
  alignas(16) char properties[4 * kHipPropertiesSize] = {};
  if (!api.properties || api.properties(properties, device) != kSuccess) return "";
  std::string name(properties + kHipArchitecture, strnlen(properties + kHipArchitecture, 256));
  return name.substr(0, name.find(':'));  // what follows are features: gfx942:sramecc+:xnack-
}

DeviceProperties query_properties(const Api& api, DeviceHandle device) {
  const Dialect& d = *api.dialect;
  DeviceProperties p;
  char name[256] = {};
  int version = 0;
  size_t memory = 0;
  api.device_name(name, sizeof name - 1, device);
  api.driver_version(&version);
  api.device_memory(&memory, device);
  p.engine = d.engine;
  p.name = name;
  p.vendor = d.vendor;
  p.driver = std::to_string(version);
  p.api_version = architecture(api, device);
  p.type = attribute(api, device, d.integrated) ? DeviceType::IntegratedGPU : DeviceType::DiscreteGPU;
  p.language = Language::Triton;
  p.schedule_class = ScheduleClass::Block;
  p.total_memory = static_cast<int64_t>(memory);
  p.max_allocation = p.max_binding = p.total_memory;
  p.max_params = kMaxParams - kScratchPointers;
  p.max_bindings = p.max_params / static_cast<int64_t>(sizeof(void*));
  p.compute_units = attribute(api, device, d.multiprocessors);
  p.max_workgroup_size = attribute(api, device, d.max_threads);
  p.max_workgroup_memory = attribute(api, device, d.shared_memory);
  p.max_workgroups = std::numeric_limits<int32_t>::max();
  p.float16 = p.float64 = p.int64 = p.int64_atomics = p.float32_atomics = p.timestamps = true;
  return p;  // subgroups: Triton's kernels have none
}

struct CudaMemory final : Memory {
  Address address;
  bool adopted = false;
};

struct CudaKernel final : Kernel {
  Module module;
  Function function;
  unsigned threads;
  unsigned shared_memory;
  size_t block;   // bytes of the parameter block
  size_t params;  // bytes of all parameters: the block and Triton's scratch pointers
  size_t scratch;  // bytes a workgroup
  uint64_t name_hash;
  bool waits;      // KernelSource::waits
};

// A kernel's parameters, all of them one after the other, as the driver takes them.
struct Arguments {
  size_t size;
  void* extra[5];
  Arguments(const Api& api, const CudaKernel& kernel, void* params)
      : size(kernel.params), extra{kParamBufferPointer, params, kParamBufferSize, &size, api.dialect->param_end} {}
  Arguments(const Arguments&) = delete;
};

Result launch_kernel(const Api& api, Stream stream, const CudaKernel& kernel, const uint32_t grid[3], void* params) {
  Arguments arguments(api, kernel, params);
  return api.launch(kernel.function, grid[0], grid[1], grid[2], kernel.threads, 1, 1, kernel.shared_memory, stream, nullptr,
                    arguments.extra);
}

thread_local Context left_current = nullptr;  // by a Current that stays

// The primary context, current in this thread while this lives. stays: also afterwards, where none was: device 0's is what the
// vendor's runtime takes in such a thread, and a launch is spared two calls.
class Current {
 public:
  Current(const Api& api, Context context, bool stays = false) : api_(api) {
    Context now = nullptr;
    const bool known = api.context_current(&now) == kSuccess;
    if (known && now == context) return;
    CUDA_CHECK(api.context_push(context), "making the device current");
    pushed_ = !(stays && known && now == nullptr);
    if (!pushed_) left_current = context;
  }
  ~Current() {
    Context popped;
    if (pushed_) api_.context_pop(&popped);
  }
  Current(const Current&) = delete;

 private:
  const Api& api_;
  bool pushed_ = false;
};

// Launches and their parameters, one after the other.
struct Launches {
  struct Launch {
    const CudaKernel* kernel;
    uint32_t grid[3];
    size_t at;  // in params
  };
  std::vector<Launch> each;
  std::vector<char> params;

  void add(const CudaKernel& kernel, const uint32_t grid[3], const char* block) {
    const size_t at = (params.size() + 15) / 16 * 16;
    each.push_back({&kernel, {grid[0], grid[1], grid[2]}, at});
    params.resize(at + kernel.params);
    std::memcpy(params.data() + at, block, kernel.params);
  }
  void clear() { each.clear(), params.clear(); }
  void swap(Launches& other) { each.swap(other.each), params.swap(other.params); }
};

Result launch_each(const Api& api, Stream stream, Launches& launches) {
  Result code = kSuccess;
  for (const auto& launch : launches.each) {
    const Result result = launch_kernel(api, stream, *launch.kernel, launch.grid, launches.params.data() + launch.at);
    if (code == kSuccess) code = result;
  }
  return code;
}

class CudaSequence;

// The sequences of a device that have graphs, the one used last at the end. Plans and their sequences may go in any thread; what uses a
// sequence holds the device's lock.
struct Graphs {
  std::mutex mutex;
  std::list<CudaSequence*> kept;
  size_t nodes = 0, most = max_graph_nodes();
  bool programmatic = programmatic_launches();
};

// The launches of a plan's replay, one after the other. Stretches without anything between the launches become graphs as soon as two
// replays in turn have as many; later replays set what changed (addresses, sizes, grids, even kernels) and launch the graph.
class CudaSequence final : public Sequence {
 public:
  CudaSequence(const Api& api, Context context, std::shared_ptr<Graphs> graphs)
      : api_(api), context_(context), graphs_(std::move(graphs)) {}

  ~CudaSequence() override {
    if (is_forked()) return;
    std::lock_guard<std::mutex> lock(graphs_->mutex);
    drop(false);
  }

  void begin() {
    current_ = 0;
    if (!nodes_) return;
    std::lock_guard<std::mutex> lock(graphs_->mutex);
    graphs_->kept.splice(graphs_->kept.end(), graphs_->kept, place_);
  }

  // Gives all graphs back, with the mutex of `graphs_` held. for_others: they would have been wanted again.
  void drop(bool for_others) {
    for (Stretch& s : stretches_) {
      if (s.exec && for_others && ++s.drops == kMaxDrops) s.fails = true;
      destroy(s);
    }
  }

  // The launches of the stretch under way, to add to.
  Launches& launches() {
    if (current_ == stretches_.size()) stretches_.emplace_back();
    return stretches_[current_].now;
  }

  // Queues the launches added since the last call. The first error, if any; `objects` counts what was created.
  Result submit(Stream stream, uint64_t& objects) {
    if (current_ == stretches_.size() || stretches_[current_].now.each.empty()) return kSuccess;
    Stretch& s = stretches_[current_++];
    const bool graph = s.now.each.size() >= kLeastInGraph && prepare(s, objects);
    const Result code = graph ? api_.graph_launch(s.exec, stream) : launch_each(api_, stream, s.now);
    s.now.swap(s.last);
    s.now.clear();
    return code;
  }

 private:
  using Launch = Launches::Launch;
  struct Stretch {
    Launches now, last;  // of this replay, of the one before
    bool fails = false;  // the driver makes no graph of it, or it was dropped too often
    int drops = 0;
    Graph graph = nullptr;
    GraphExec exec = nullptr;
    std::vector<GraphNode> nodes;
    std::vector<bool> early;  // whether a node's kernel must wait for the one before by itself
  };

  KernelNode node(const Launch& l, Arguments& a) const {
    return {l.kernel->function, {l.grid[0], l.grid[1], l.grid[2]}, {l.kernel->threads, 1, 1}, l.kernel->shared_memory,
            nullptr, a.extra, nullptr, context_};
  }

  // Whether the stretch's graph does what this replay wants.
  bool prepare(Stretch& s, uint64_t& objects) {
    const size_t count = s.now.each.size();
    if (!s.exec || s.nodes.size() != count) {
      if (s.last.each.size() != count || s.fails) return false;
      std::lock_guard<std::mutex> lock(graphs_->mutex);
      destroy(s);
      while (graphs_->nodes + count + kNodesOfGraph > graphs_->most && !graphs_->kept.empty() && graphs_->kept.front() != this) {
        graphs_->kept.front()->drop(true);
      }
      if (!make(s)) {
        destroy(s);
        s.fails = true;
        return false;
      }
      objects++;
      return true;
    }
    const bool known = s.last.each.size() == count;  // else the last replay was not the graph's
    for (size_t i = 0; i < count; ++i) {
      const Launch& now = s.now.each[i];
      char* params = s.now.params.data() + now.at;
      if (known && same(now, params, s.last.each[i], s.last.params.data())) continue;
      Arguments a(api_, *now.kernel, params);
      const KernelNode n = node(now, a);
      if ((s.early[i] && !now.kernel->waits) || api_.graph_exec_set_kernel(s.exec, s.nodes[i], &n) != kSuccess) {
        std::lock_guard<std::mutex> lock(graphs_->mutex);
        destroy(s);  // the next replay makes it anew
        return false;
      }
    }
    return true;
  }

  static bool same(const Launch& now, const char* params, const Launch& then, const char* last_params) {
    return now.kernel == then.kernel && std::equal(now.grid, now.grid + 3, then.grid) &&
           std::memcmp(params, last_params + then.at, now.kernel->params) == 0;
  }

  bool make(Stretch& s) {
    if (api_.graph_create(&s.graph, 0) != kSuccess) return false;
    for (const Launch& launch : s.now.each) {
      Arguments a(api_, *launch.kernel, s.now.params.data() + launch.at);
      const KernelNode n = node(launch, a);
      const GraphNode* before = s.nodes.empty() ? nullptr : &s.nodes.back();
      const bool early = before && launch.kernel->waits && graphs_->programmatic && api_.graph_add_edges;
      GraphNode added = nullptr;
      if (api_.graph_add_kernel(&added, s.graph, before, before && !early, &n) != kSuccess) return false;
      if (early && api_.graph_add_edges(s.graph, before, &added, &kProgrammaticEdge, 1) != kSuccess) return false;
      s.nodes.push_back(added);
      s.early.push_back(early);
    }
    if (api_.graph_instantiate(&s.exec, s.graph, 0) != kSuccess) return false;
    count(s.nodes.size() + kNodesOfGraph);
    return true;
  }

  // Keeps the sum of the nodes, and the sequence's place among those that have any.
  void count(size_t more) {
    if (!nodes_) place_ = graphs_->kept.insert(graphs_->kept.end(), this);
    nodes_ += more;
    graphs_->nodes += more;
  }

  void destroy(Stretch& s) {
    if (s.exec) {
      api_.graph_exec_destroy(s.exec);  // once its launches have ended
      const size_t less = s.nodes.size() + kNodesOfGraph;
      graphs_->nodes -= less;
      if (!(nodes_ -= less)) graphs_->kept.erase(place_);
    }
    if (s.graph) api_.graph_destroy(s.graph);
    s.exec = nullptr, s.graph = nullptr;
    s.nodes.clear(), s.early.clear();
  }

  const Api& api_;
  Context context_;
  std::shared_ptr<Graphs> graphs_;
  std::list<CudaSequence*>::iterator place_;  // where nodes_ is not 0
  size_t nodes_ = 0;                          // of its graphs
  std::vector<Stretch> stretches_;
  size_t current_ = 0;
};

// Batches of launches that no plan's replay holds together, each with its sequence, found by their kernels.
class Batches {
 public:
  Batches(const Api& api, Context context, std::shared_ptr<Graphs> graphs)
      : api_(api), context_(context), graphs_(std::move(graphs)), possible_(graphs_->most > 0 && api.graph_add_kernel) {}

  // Whether the launch is held back; else it is for the caller to make.
  bool hold(const CudaKernel& kernel, const uint32_t grid[3], const char* block) {
    if (!possible_ || made_at_once_ < kAtOnce) {
      made_at_once_++;
      return false;
    }
    held_.add(kernel, grid, block);
    kernels_ = (kernels_ ^ reinterpret_cast<uintptr_t>(&kernel)) * 0x9E3779B97F4A7C15u;
    kernels_ ^= kernels_ >> 32;
    return true;
  }

  bool full() const {
    const auto& each = held_.each;
    if (each.size() < kLeastInGraph) return false;
    const uint64_t before = each[each.size() - 2].kernel->name_hash, last = each.back().kernel->name_hash;
    return each.size() == kMaxBatch || ((before * 31 + last) * 0x9E3779B97F4A7C15u >> 32) % kCut == 0;
  }
  bool empty() const { return held_.each.empty(); }
  void device_is_idle() { made_at_once_ = 0; }

  // Queues what was held back. The first error, if any; `objects` counts what was created.
  Result submit(Stream stream, uint64_t& objects) {
    Result code = kSuccess;
    if (held_.each.size() < kLeastInGraph) {
      code = launch_each(api_, stream, held_);
      held_.clear();
    } else {
      if (known_.size() == kMaxBatches && !known_.count(kernels_)) known_.clear();
      auto& sequence = known_[kernels_];
      if (!sequence) sequence = std::make_unique<CudaSequence>(api_, context_, graphs_);
      sequence->begin();
      sequence->launches().swap(held_);
      code = sequence->submit(stream, objects);
    }
    kernels_ = 0;
    return code;
  }

 private:
  const Api& api_;
  Context context_;
  std::shared_ptr<Graphs> graphs_;
  bool possible_;
  size_t made_at_once_ = 0;
  Launches held_;
  uint64_t kernels_ = 0;  // a hash of the held launches' kernels
  std::unordered_map<uint64_t, std::unique_ptr<CudaSequence>> known_;
};

class CudaEngine;

// Goes back to its engine's pool. An engine that closes outlives its events: engines of torch's devices never close, raw ones
// are kept by whoever holds an event.
struct CudaEvent final : EventHandle {
  CudaEngine& engine;
  Event handle;
  bool timed;
  CudaEvent(CudaEngine& engine, Event handle, bool timed) : engine(engine), handle(handle), timed(timed) {}
  ~CudaEvent() override;
};

class CudaEngine final : public Engine {
 public:
  CudaEngine(const Api& api, DeviceHandle device, DeviceProperties properties)
      : api_(api), device_(device), properties_(std::move(properties)) {
    CUDA_CHECK(api_.context_retain(&context_, device_), "opening ", properties_.name);
    const Current current(api_, context_);
    CUDA_CHECK(api_.stream_create(&stream_, kStreamNonBlocking), "creating a stream on ", properties_.name);
    objects_ = 2;
    batches_ = std::make_unique<Batches>(api_, context_, graphs_);
  }

  ~CudaEngine() override {
    if (is_forked()) return;
    {
      Context popped;
      if (api_.context_push(context_) != kSuccess) return;
      submit();
      api_.stream_synchronize(stream_);
      batches_.reset();
      for (auto& kernel : kernels_) api_.module_unload(kernel->module);
      for (auto& pool : events_) {
        for (Event event : pool) api_.event_destroy(event);
      }
      for (Event event : segment_events_) {
        if (event) api_.event_destroy(event);
      }
      if (staging_) api_.host_free(staging_);
      if (scratch_) api_.free(scratch_);
      api_.stream_destroy(stream_);
      api_.context_pop(&popped);
      if (Context now = nullptr; left_current == context_ && api_.context_current(&now) == kSuccess && now == context_) {
        api_.context_pop(&popped);
      }
      left_current = nullptr;
    }
    api_.context_release(device_);
  }

  const DeviceProperties& properties() const override { return properties_; }

  Memory* allocate(uint64_t size) override {
    TORCH_CHECK(size > 0, api_.dialect->label, ": an allocation has at least one byte");
    const Current current = enter();
    auto* memory = new CudaMemory;
    memory->size = size;
    try {
      memory->address = take(size);
    } catch (...) {
      delete memory;
      throw;
    }
    return memory;
  }

  uint64_t address(Memory* memory) const override { return static_cast<CudaMemory*>(memory)->address; }

  Memory* adopt(uint64_t address, uint64_t size) override {
    auto* memory = new CudaMemory;
    memory->size = size;
    memory->address = address;
    memory->adopted = true;
    return memory;
  }

  void* native_queue() const override { return stream_; }

  void free(Memory* memory) override {
    if (memory && !is_forked()) submit();  // launches that may use it
    if (memory && !static_cast<CudaMemory*>(memory)->adopted && !is_forked()) {
      Context popped;
      if (api_.context_push(context_) == kSuccess) {
        api_.stream_synchronize(stream_);
        drop_graphs();  // memory is wanted back
        api_.free(static_cast<CudaMemory*>(memory)->address);
        api_.context_pop(&popped);
      }
    }
    delete memory;
  }

  void write(Memory* memory, uint64_t offset, const void* data, uint64_t size) override {
    const Address to = range(memory, offset, size, "write");
    if (size == 0) return;
    const Current current = enter();
    if (size > kStagingSegment) {
      CUDA_CHECK(api_.copy_to_device(to, data, size, stream_), "writing ", size, " bytes");
      keep(api_.stream_synchronize(stream_), "queued work");  // pinned data is read until then
      return;
    }
    void* staged = stage(size);
    std::memcpy(staged, data, size);
    CUDA_CHECK(api_.copy_to_device(to, staged, size, stream_), "writing ", size, " bytes");
  }

  void read(Memory* memory, uint64_t offset, void* data, uint64_t size) override {
    read_async(memory, offset, data, size);
    synchronize();
  }

  void read_async(Memory* memory, uint64_t offset, void* data, uint64_t size) override {
    const Address from = range(memory, offset, size, "read");
    if (size == 0) return;
    const Current current = enter();
    keep(api_.copy_to_host(data, from, size, stream_), "a read");
  }

  void copy(Memory* src, uint64_t src_offset, Memory* dst, uint64_t dst_offset, uint64_t size) override {
    const Address from = range(src, src_offset, size, "copy"), to = range(dst, dst_offset, size, "copy");
    if (size == 0) return;
    TORCH_CHECK(from + size <= to || to + size <= from, api_.dialect->label,
                ": the source and the destination of a copy overlap");
    const Current current = enter();
    keep(api_.copy(to, from, size, stream_), "a copy");
  }

  void fill(Memory* memory, uint64_t offset, uint64_t size, uint8_t value) override {
    const Address at = range(memory, offset, size, "fill");
    if (size == 0) return;
    const Current current = enter();
    keep(api_.fill_bytes(at, value, size, stream_), "a fill");
  }

  Kernel* compile(const KernelSource& source) override {
    TORCH_CHECK(source.params_size <= uint64_t(properties_.max_params), api_.dialect->label, ": the parameter block of ",
                source.name, " has ", source.params_size, " bytes; a kernel takes ", properties_.max_params);
    TORCH_CHECK(source.shared_memory <= uint64_t(properties_.max_workgroup_memory), api_.dialect->label, ": ", source.name,
                " takes ", source.shared_memory, " bytes of shared memory; ", properties_.name, " has ",
                properties_.max_workgroup_memory);
    const Current current = enter();
    auto kernel = std::make_unique<CudaKernel>();
    kernel->name = source.name;
    Result code = api_.module_load(&kernel->module, source.source.data());
    TORCH_CHECK(code == kSuccess, api_.dialect->label, ": ", properties_.name, " does not load kernel ", source.name, ": ",
                describe(api_, code));
    objects_++;
    code = api_.module_function(&kernel->function, kernel->module, source.entry.c_str());
    if (code == kSuccess && source.shared_memory > 48 << 10 && !api_.dialect->hip) {
      code = api_.function_set(kernel->function, kFunctionMaxDynamicSharedMemory, static_cast<int>(source.shared_memory));
    }
    if (code != kSuccess) api_.module_unload(kernel->module);
    CUDA_CHECK(code, "kernel ", source.name, ": entry point ", source.entry);
    kernel->threads = source.workgroup[0] * source.workgroup[1] * source.workgroup[2];
    kernel->shared_memory = source.shared_memory;
    kernel->block = source.params_size;
    kernel->scratch = source.scratch;
    kernel->name_hash = std::hash<std::string>()(source.name);
    kernel->waits = source.waits;
    kernel->params = params_of(*kernel);
    kernels_.push_back(std::move(kernel));
    return kernels_.back().get();
  }

  // The block holds the addresses: bindings are for engines whose kernels take opaque buffers.
  void enqueue(Kernel* base, const Binding*, uint32_t, const void* params, const uint32_t groups[3]) override {
    auto* kernel = static_cast<CudaKernel*>(base);
    if (groups[0] == 0 || groups[1] == 0 || groups[2] == 0) return;
    TORCH_CHECK(groups[0] <= uint64_t(properties_.max_workgroups) && groups[1] <= kMaxGridYZ && groups[2] <= kMaxGridYZ,
                api_.dialect->label, ": kernel ", kernel->name, ": a grid of ", groups[0], " x ", groups[1], " x ", groups[2],
                " workgroups is too large");
    alignas(16) char block[kMaxParams];
    std::memcpy(block, params, kernel->block);
    if (kernel->params > kernel->block) std::memset(block + kernel->block, 0, kernel->params - kernel->block);
    if (kernel->scratch) {
      const Address scratch = scratch_of(kernel->scratch * groups[0] * groups[1] * groups[2]);
      std::memcpy(block + kernel->block, &scratch, sizeof scratch);
    }
    if (sequence_) return sequence_->launches().add(*kernel, groups, block);
    check_not_forked();
    if (batches_->hold(*kernel, groups, block)) {
      if (batches_->full()) submit();
      return;
    }
    const Current current = enter();
    keep(launch_kernel(api_, stream_, *kernel, groups, block), kernel->name.c_str());
  }

  std::unique_ptr<Sequence> sequence(size_t launches) override {
    if (launches < kLeastInGraph || graphs_->most == 0 || !api_.graph_add_kernel || !api_.graph_exec_set_kernel) return nullptr;
    return std::make_unique<CudaSequence>(api_, context_, graphs_);
  }

  void begin(Sequence& sequence) override {
    check_not_forked();
    submit();
    sequence_ = static_cast<CudaSequence*>(&sequence);
    sequence_->begin();
  }

  void end() noexcept override {
    submit();
    sequence_ = nullptr;
  }

  void flush() override { submit(); }

  void synchronize() override {
    const Current current = enter();
    keep(api_.stream_synchronize(stream_), "queued work");
    batches_->device_is_idle();
    if (kept_.empty()) return;
    const std::string text = std::exchange(kept_, {});
    TORCH_CHECK(false, text);
  }

  std::unique_ptr<EventHandle> record(bool timed) override {
    const Current current = enter();
    Event event = take_event(timed);
    const Result code = api_.event_record(event, stream_);
    if (code != kSuccess) give_event(event, timed);
    CUDA_CHECK(code, "recording an event");
    return std::make_unique<CudaEvent>(*this, event, timed);
  }

  bool query(EventHandle& base) override {
    const Current current = enter();
    const Result code = api_.event_query(static_cast<CudaEvent&>(base).handle);
    if (code != kSuccess && code != kNotReady) keep(code, "queued work");
    return code != kNotReady;
  }

  void wait(EventHandle& base) override {
    const Current current = enter();
    keep(api_.event_synchronize(static_cast<CudaEvent&>(base).handle), "queued work");
  }

  double elapsed_ms(EventHandle& start, EventHandle& end) override {
    auto &from = static_cast<CudaEvent&>(start), &to = static_cast<CudaEvent&>(end);
    TORCH_CHECK(from.timed && to.timed, "elapsed_ms needs two events that were recorded with timing");
    TORCH_CHECK(query(start) && query(end), "elapsed_ms needs two events that have completed");
    const Current current = enter();
    float milliseconds = 0;
    CUDA_CHECK(api_.event_elapsed(&milliseconds, from.handle, to.handle), "reading timestamps");
    return milliseconds;
  }

  uint64_t objects_created() const override { return objects_; }

  void give_event(Event event, bool timed) {
    std::lock_guard<std::mutex> lock(events_mutex_);
    events_[timed].push_back(event);
  }

 private:
  Current enter() {
    check_not_forked();
    submit();
    return Current(api_, context_, device_ == 0);
  }

  // What goes on follows the launches that are held back.
  void submit() noexcept {
    scratch_used_ = 0;
    if (!sequence_ && batches_->empty()) return;
    try {
      const Current current(api_, context_, device_ == 0);
      keep(sequence_ ? sequence_->submit(stream_, objects_) : batches_->submit(stream_, objects_), "a sequence of kernels");
    } catch (const std::exception& e) {
      if (kept_.empty()) kept_ = e.what();
    }
  }

  // Memory of the device; graphs give way to it.
  Address take(size_t size) {
    Address address = 0;
    Result code = api_.allocate(&address, size);
    if (code == kOutOfMemory && drop_graphs()) {
      api_.stream_synchronize(stream_);
      code = api_.allocate(&address, size);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, code != kOutOfMemory, api_.dialect->label, ": ", properties_.name, " has no ", size,
                     " bytes left");
    CUDA_CHECK(code, "allocating ", size, " bytes");
    objects_++;
    return address;
  }

  // Whether there were any.
  bool drop_graphs() {
    std::lock_guard<std::mutex> lock(graphs_->mutex);
    const bool any = !graphs_->kept.empty();
    while (!graphs_->kept.empty()) graphs_->kept.front()->drop(false);
    return any;
  }

  Address range(Memory* memory, uint64_t offset, uint64_t size, const char* what) const {
    TORCH_CHECK(offset <= memory->size && size <= memory->size - offset, api_.dialect->label, ": a ", what, " of ", size,
                " bytes at ", offset, " exceeds an allocation of ", memory->size);
    return static_cast<CudaMemory*>(memory)->address + offset;
  }

  // Bytes of all parameters. The block is padded to 8 bytes; a last parameter of 4 ends before the padding.
  size_t params_of(const CudaKernel& kernel) const {
    if (!api_.function_param) return kernel.block + kScratchPointers;
    size_t end = 0, offset = 0, size = 0;
    for (size_t i = 0; api_.function_param(kernel.function, i, &offset, &size) == kSuccess; i++) {
      end = std::max(end, offset + size);
    }
    TORCH_CHECK(end <= kernel.block + kScratchPointers && end + 4 >= kernel.block, api_.dialect->label, ": kernel ", kernel.name,
                " takes ", end, " bytes of parameters, but is launched with a block of ", kernel.block);
    return end;
  }

  // An error of queued work: the first one since the last synchronize() is what it throws.
  void keep(Result code, const char* what) {
    if (code != kSuccess && kept_.empty()) {
      kept_ = std::string(api_.dialect->label) + ": " + what + " failed: " + describe(api_, code);
    }
  }

  Event take_event(bool timed) {
    {
      std::lock_guard<std::mutex> lock(events_mutex_);
      if (auto& pool = events_[timed]; !pool.empty()) {
        Event event = pool.back();
        pool.pop_back();
        return event;
      }
    }
    Event event = nullptr;
    CUDA_CHECK(api_.event_create(&event, timed ? kEventDefault : kEventDisableTiming), "creating an event");
    objects_++;
    return event;
  }

  // Scratch memory of a launch, not shared with the launches that are handed over with it: a kernel of a graph may make its tensor
  // descriptors before those ahead of it have ended.
  Address scratch_of(size_t size) {
    size = (size + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
    if (scratch_used_ + size > kMaxScratch) submit();
    if (scratch_used_ + size > scratch_size_) {
      const size_t more = std::max({scratch_used_ + size, std::min(2 * scratch_size_, kMaxScratch), kLeastScratch});
      const Current current = enter();
      if (scratch_) {
        api_.stream_synchronize(stream_);
        api_.free(scratch_);
        scratch_ = scratch_size_ = 0;
      }
      scratch_ = take(more);
      scratch_size_ = more;
    }
    const Address address = scratch_ + scratch_used_;
    scratch_used_ += size;
    return address;
  }

  // Pinned memory for a write, free again when the stream has passed the work that is queued until its segment is full.
  void* stage(uint64_t size) {
    if (!staging_) {
      void* data = nullptr;
      CUDA_CHECK(api_.host_allocate(&data, kStagingSegment * kStagingSegments, 0), "allocating staging memory");
      staging_ = static_cast<uint8_t*>(data);
      objects_++;
    }
    if (staging_used_ + size > kStagingSegment) {
      Event& full = segment_events_[staging_current_];
      if (!full) full = take_event(false);
      CUDA_CHECK(api_.event_record(full, stream_), "recording an event");
      staging_current_ = (staging_current_ + 1) % kStagingSegments;
      staging_used_ = 0;
      if (Event busy = segment_events_[staging_current_]) keep(api_.event_synchronize(busy), "queued work");
    }
    uint8_t* place = staging_ + staging_current_ * kStagingSegment + staging_used_;
    staging_used_ += (size + 63) / 64 * 64;
    return place;
  }

  const Api& api_;
  DeviceHandle device_;
  DeviceProperties properties_;
  Context context_ = nullptr;
  Stream stream_ = nullptr;
  std::vector<std::unique_ptr<CudaKernel>> kernels_;
  std::string kept_;
  uint64_t objects_ = 0;
  CudaSequence* sequence_ = nullptr;  // of the replay under way
  std::shared_ptr<Graphs> graphs_ = std::make_shared<Graphs>();
  std::unique_ptr<Batches> batches_;  // what is not of a replay

  std::mutex events_mutex_;  // handles are given back by whoever drops them
  std::vector<Event> events_[2];

  Address scratch_ = 0;
  size_t scratch_size_ = 0, scratch_used_ = 0;  // used: by what is held back

  uint8_t* staging_ = nullptr;
  Event segment_events_[kStagingSegments] = {};
  int staging_current_ = 0;
  uint64_t staging_used_ = 0;
};

CudaEvent::~CudaEvent() {
  if (!is_forked()) engine.give_event(handle, timed);
}

struct CudaAdapter final : Adapter {
  const Api* api;
  DeviceHandle device;
  std::unique_ptr<Engine> open() override {
    check_not_forked();
    return std::make_unique<CudaEngine>(*api, device, properties);
  }
};

void find_adapters(const Dialect& dialect, std::vector<std::unique_ptr<Adapter>>& adapters, std::string& why) {
  std::string reason;
  const Api* api = load_api(dialect, reason);
  int count = 0;
  if (api) {
    watch_fork();
    Result code = api->init(0);
    if (code == kSuccess) code = api->device_count(&count);
    if (code != kSuccess) {
      reason = std::string("the ") + dialect.vendor + " driver offers no device: " + describe(*api, code);
    } else if (count == 0) {
      reason = std::string("the ") + dialect.vendor + " driver finds no device";
    }
  }
  if (!reason.empty()) why += (why.empty() ? "" : "; ") + reason;
  for (int i = 0; i < count; i++) {
    auto adapter = std::make_unique<CudaAdapter>();
    adapter->api = api;
    if (api->device_get(&adapter->device, i) != kSuccess) continue;
    adapter->properties = query_properties(*api, adapter->device);
    adapter->properties.ordinal = i;
    adapters.push_back(std::move(adapter));
  }
}

}  // namespace

std::vector<std::unique_ptr<Adapter>> cuda_adapters(std::string& why) {
  check_not_forked();
  std::vector<std::unique_ptr<Adapter>> adapters;
  find_adapters(kCuda, adapters, why);
  find_adapters(kHip, adapters, why);
  return adapters;
}

}  // namespace spiral
