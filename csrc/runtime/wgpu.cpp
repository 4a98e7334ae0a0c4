// WebGPU (Vulkan, Metal, DX12) through wgpu-native, which the wgpu wheel carries. Its library is loaded by path and never
// by way of wgpu-py, whose log callback takes the GIL.
//
// How work is queued. Dispatches accumulate in one open compute pass of one open command encoder; copies end the pass and
// go into the same encoder, so everything stays in order. flush() submits the encoder. Host data is copied into upload
// buffers that are mapped while they are filled and are mapped again when the device is done with them; read-backs go
// through staging buffers. Both are pooled, and bind groups are cached, so a steady state creates no GPU object.
//
// What wgpu forbids, and what is done about it:
// - A validation error at submit aborts the process: arguments are checked here, the encoder's errors are looked at after
//   it is finished, and a bad encoder is dropped, not submitted.
// - Buffers are released, never destroyed: recorded commands hold references, so a free needs no waiting.
// - One buffer as both read and read_write in a dispatch is refused: every binding is read_write, but the parameter block's.
// - Copies need multiples of 4 and two different buffers: two small kernels, fill and copy, do what is left.
#include "runtime/engine.h"
#include "runtime/fork.h"
#include "runtime/kernel_cache.h"
#include "runtime/library.h"

#include <c10/util/Exception.h>
#include <wgpu.h>

#ifndef _WIN32
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <list>
#include <mutex>
#include <thread>
#include <unordered_map>

namespace spiral {
namespace {

#define SPIRAL_WGPU_FUNCTIONS(X)                                                                                     \
  X(CreateInstance) X(GetVersion) X(SetLogCallback) X(SetLogLevel) X(InstanceEnumerateAdapters)                       \
  X(AdapterGetInfo) X(AdapterInfoFreeMembers) X(AdapterGetLimits) X(AdapterHasFeature) X(AdapterRequestDevice)        \
  X(AdapterRelease) X(DeviceRelease) X(DeviceGetQueue) X(DevicePoll) X(DevicePushErrorScope) X(DevicePopErrorScope)   \
  X(DeviceCreateBuffer) X(BufferRelease) X(BufferMapAsync) X(BufferGetMappedRange) X(BufferGetConstMappedRange)       \
  X(BufferUnmap) X(DeviceCreateShaderModule) X(DeviceCreateShaderModuleTrusted) X(ShaderModuleRelease)                \
  X(DeviceCreateBindGroupLayout) X(BindGroupLayoutRelease) X(DeviceCreatePipelineLayout) X(PipelineLayoutRelease)     \
  X(DeviceCreateComputePipeline) X(ComputePipelineRelease) X(DeviceCreateBindGroup) X(BindGroupRelease)               \
  X(DeviceCreateQuerySet) X(QuerySetRelease) X(DeviceCreateCommandEncoder) X(CommandEncoderRelease)                   \
  X(CommandEncoderFinish) X(CommandEncoderBeginComputePass) X(CommandEncoderCopyBufferToBuffer)                       \
  X(CommandEncoderWriteTimestamp) X(CommandEncoderResolveQuerySet) X(CommandBufferRelease)                            \
  X(ComputePassEncoderSetPipeline) X(ComputePassEncoderSetBindGroup) X(ComputePassEncoderSetImmediates)               \
  X(ComputePassEncoderDispatchWorkgroups) X(ComputePassEncoderEnd) X(ComputePassEncoderRelease)                       \
  X(QueueSubmitForIndex) X(QueueOnSubmittedWorkDone) X(QueueGetTimestampPeriod) X(QueueRelease)

// The functions of wgpu-native, without their "wgpu".
struct Api {
#define X(name) decltype(&::wgpu##name) name = nullptr;
  SPIRAL_WGPU_FUNCTIONS(X)
#undef X
  WGPUInstance instance = nullptr;
};

constexpr uint32_t kVersion = 29;  // of wgpu-native's headers: its structs change between major versions

constexpr uint32_t kMaxDispatches = 128;           // in one submission
constexpr uint32_t kFirstDispatches = 16;           // in a submission to a device that has nothing to do
constexpr uint64_t kMaxStaged = 32u << 20;         // bytes written in one submission
constexpr size_t kMaxInFlight = 16;                // submissions
constexpr std::chrono::milliseconds kAwake{2};     // of waiting without sleeping
constexpr uint64_t kMaxUpload = 256u << 20;        // bytes of upload buffers
constexpr uint64_t kUploadChunk = 1u << 20;        // shared by small writes
constexpr uint64_t kUploadPiece = 16u << 20;       // of a large write
constexpr uint64_t kReadPiece = 64u << 20;         // of a large read
constexpr size_t kMaxBindGroups = 16384;
constexpr uint64_t kParamSlot = 4096, kParamSlots = 1024;  // parameter blocks that don't fit immediates
constexpr uint32_t kQueries = 1024;                // in a query set
constexpr uint32_t kInternalWorkgroup = 256;

constexpr uint64_t round_up(uint64_t n, uint64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

uint64_t power_of_two(uint64_t n, uint64_t least) {
  while (least < n) least *= 2;
  return least;
}

WGPUStringView view(const std::string& s) { return {s.data(), s.size()}; }

std::string text(WGPUStringView s) {
  if (!s.data) return "";
  return s.length == WGPU_STRLEN ? std::string(s.data) : std::string(s.data, s.length);
}

void log(WGPULogLevel, WGPUStringView message, void*) {
  std::fprintf(stderr, "torch_spiral: wgpu: %s\n", text(message).c_str());
}

// Loaded once; never unloaded, since drivers start threads. nullptr and `why` where it can't be used.
const Api* load(const std::string& path, std::string& why) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::unique_ptr<Api>> loaded;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = loaded.find(path);
  if (found != loaded.end()) return found->second.get();

  if (path.empty()) {
    why = "wgpu-native was not found; pip install \"wgpu>=0.32\"";
    return nullptr;
  }
  std::string error;
  void* library = open_library(path, &error);
  if (!library) {
    why = path + " does not load (" + error + "); reinstall it: pip install --force-reinstall \"wgpu>=0.32\"";
    return nullptr;
  }
  auto api = std::make_unique<Api>();
#define X(name)                                                                                   \
  api->name = reinterpret_cast<decltype(api->name)>(find_symbol(library, "wgpu" #name));        \
  if (!api->name) {                                                                               \
    why = path + " has no function wgpu" #name "; install wgpu 0.32 and build torch_spiral again"; \
    return nullptr;                                                                               \
  }
  SPIRAL_WGPU_FUNCTIONS(X)
#undef X
  const uint32_t major = api->GetVersion() >> 24;
  if (major != kVersion) {
    why = path + " is wgpu-native " + std::to_string(major) + ", this build needs " + std::to_string(kVersion) +
          "; pip install \"wgpu==0.32.*\"";
    return nullptr;
  }
  api->SetLogCallback(log, nullptr);
  api->SetLogLevel(WGPULogLevel_Error);

  WGPUInstanceExtras extras{};
  extras.chain.sType = static_cast<WGPUSType>(WGPUSType_InstanceExtras);
  // Not OpenGL: what it offers, a Vulkan driver of the same device offers better.
  extras.backends = WGPUInstanceBackend_Vulkan | WGPUInstanceBackend_Metal | WGPUInstanceBackend_DX12;
  extras.flags = WGPUInstanceFlag_Empty;
  WGPUInstanceDescriptor descriptor{};
  descriptor.nextInChain = &extras.chain;
  api->instance = api->CreateInstance(&descriptor);
  if (!api->instance) {
    why = "wgpu-native made no instance; see its message on stderr";
    return nullptr;
  }
  return (loaded[path] = std::move(api)).get();
}

struct WgpuMemory final : Memory {
  WGPUBuffer buffer = nullptr;
  uint64_t id = 0;         // never used again, unlike the address
  uint64_t allocated = 0;  // size, rounded up to 16: what may be bound and copied
};

struct WgpuKernel final : Kernel {
  WGPUComputePipeline pipeline = nullptr;
  uint32_t bindings = 0;
  uint32_t params_size = 0;
  bool immediate = true;
};

// A buffer that the host maps: for writing while it waits to be filled, for reading once the device has filled it.
struct Staging {
  enum State { Free, InUse, Pending, Mapped, Failed };  // an idle upload is Mapped, an idle read-back Free
  WGPUBuffer buffer = nullptr;
  uint64_t size = 0;
  State state = InUse;
};

struct PendingRead {
  Staging* staging;
  uint64_t skip;  // bytes in front of what was asked for, since copies need multiples of 4
  uint64_t size;
  void* data;
  uint64_t submission;
};

// Slots for timestamps, handed back by events wherever those die.
struct QuerySlots {
  std::mutex mutex;
  std::vector<uint32_t> free;
};

struct WgpuEvent final : EventHandle {
  uint64_t submission = 0;  // complete when this one is
  int64_t query = -1;
  double host_ms = 0;       // of a timed event where the device has no timestamps
  std::shared_ptr<QuerySlots> slots;
  ~WgpuEvent() override {
    if (query < 0) return;
    std::lock_guard<std::mutex> lock(slots->mutex);
    slots->free.push_back(static_cast<uint32_t>(query));
  }
};

using Words = std::vector<uint64_t>;
struct HashWords {
  size_t operator()(const Words& words) const {
    uint64_t hash = 0x9e3779b97f4a7c15u;
    for (uint64_t word : words) {
      hash = (hash ^ word) * 0xff51afd7ed558ccdu;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

const char* const kFillSource = R"(
struct Params { first: u32, count: u32, pattern: u32, head: u32, tail: u32 }
var<immediate> p: Params;
@group(0) @binding(0) var<storage, read_write> destination: array<u32>;

// Words first .. first + count; of the first and the last only the bits in head and tail.
@compute @workgroup_size(256)
fn fill(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  for (var i = id.x; i < p.count; i += groups.x * 256u) {
    var mask = 0xffffffffu;
    if (i == 0u) { mask &= p.head; }
    if (i == p.count - 1u) { mask &= p.tail; }
    let word = p.first + i;
    if (mask == 0xffffffffu) {
      destination[word] = p.pattern;
    } else {
      destination[word] = (destination[word] & ~mask) | (p.pattern & mask);
    }
  }
}
)";

const char* const kCopySource = R"(
struct Params { source: i32, first: u32, count: u32, head: u32, tail: u32 }
var<immediate> p: Params;
@group(0) @binding(0) var<storage, read_write> source: array<u32>;
@group(0) @binding(1) var<storage, read_write> destination: array<u32>;

fn load(word: i32) -> u32 {  // the masks drop what lies outside
  if (word < 0 || u32(word) >= arrayLength(&source)) { return 0u; }
  return source[word];
}

// Words first .. first + count, as in fill, from the bytes that begin at p.source.
@compute @workgroup_size(256)
fn copy(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  for (var i = id.x; i < p.count; i += groups.x * 256u) {
    let at = p.source + 4 * i32(i);
    let shift = u32(at & 3) * 8u;
    var value = load(at >> 2u);
    if (shift != 0u) { value = (value >> shift) | (load((at >> 2u) + 1) << (32u - shift)); }
    var mask = 0xffffffffu;
    if (i == 0u) { mask &= p.head; }
    if (i == p.count - 1u) { mask &= p.tail; }
    let word = p.first + i;
    if (mask == 0xffffffffu) {
      destination[word] = value;
    } else {
      destination[word] = (destination[word] & ~mask) | (value & mask);
    }
  }
}
)";

// Groups of four words: drivers copy large buffers at a fifth of the memory's rate (NVIDIA's, measured).
const char* const kCopyWideSource = R"(
struct Params { source: u32, destination: u32, count: u32, unused: vec2u }
var<immediate> p: Params;
@group(0) @binding(0) var<storage, read_write> source: array<vec4u>;
@group(0) @binding(1) var<storage, read_write> destination: array<vec4u>;

@compute @workgroup_size(256)
fn copy(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  for (var i = id.x; i < p.count; i += groups.x * 256u) {
    destination[p.destination + i] = source[p.source + i];
  }
}
)";
constexpr uint64_t kCopyWide = 1 << 20;  // bytes from which it is used

// Whole words that cover bytes [offset, offset + size), and which bits of the outer ones belong to it.
struct WordRange {
  uint32_t first, count, head, tail;
};

WordRange words(uint64_t offset, uint64_t size) {
  const uint64_t first = offset / 4, last = (offset + size - 1) / 4;
  const uint32_t end = (offset + size) % 4;
  return {static_cast<uint32_t>(first), static_cast<uint32_t>(last - first + 1), 0xffffffffu << (offset % 4 * 8),
          end == 0 ? 0xffffffffu : 0xffffffffu >> (32 - end * 8)};
}

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class WgpuEngine final : public Engine {
 public:
  WgpuEngine(const Api& api, DeviceProperties properties, uint32_t offset_alignment)
      : api_(api), properties_(std::move(properties)), slots_(std::make_shared<QuerySlots>()) {
    TORCH_CHECK(offset_alignment <= 256, properties_.name, ": storage buffer offsets need to be multiples of ",
                offset_alignment, ", torch_spiral's are multiples of 256");
    // The masked copies index with 32 signed bits.
    step_ = std::min<uint64_t>(properties_.max_binding, uint64_t{1} << 30) / 2 / 256 * 256;
    trust_ = std::getenv("SPIRAL_BOUNDS_CHECKS") == nullptr;
  }

  // wgpu-py, where it is imported after us, has put its own log callback in our place.
  void attach(WGPUDevice device) {
    device_ = device;
    queue_ = api_.DeviceGetQueue(device_);
    api_.SetLogCallback(log, nullptr);
  }

  ~WgpuEngine() override {
    if (!device_ || is_forked()) return;
    drop_encoder();
    wait_for(submitted_);
    for (auto& entry : bind_groups_) api_.BindGroupRelease(entry.second);
    for (auto& entry : pipeline_layouts_) api_.PipelineLayoutRelease(entry.second);
    for (auto& entry : bind_group_layouts_) api_.BindGroupLayoutRelease(entry.second);
    for (auto& kernel : kernels_) api_.ComputePipelineRelease(kernel->pipeline);
    for (auto& staging : uploads_) api_.BufferRelease(staging->buffer);
    for (auto& staging : downloads_) api_.BufferRelease(staging->buffer);
    for (auto set : query_sets_) api_.QuerySetRelease(set);
    for (Memory* memory : {params_, resolved_, resolved_many_}) {
      if (memory) free(memory);
    }
    api_.QueueRelease(queue_);
    api_.DeviceRelease(device_);
  }

  const DeviceProperties& properties() const override { return properties_; }
  uint64_t objects_created() const override { return objects_; }

  void device_lost(const std::string& message) {
    lost_ = true;
    keep("the device was lost: " + message + ". Start the process again to go on with it");
  }
  void uncaptured(const std::string& message) {
    if (scoped_) {
      internal_error_ = message;
    } else {
      keep(message);
    }
  }

  // Memory

  Memory* allocate(uint64_t size) override {
    check_not_forked();
    return make_memory(size, WGPUBufferUsage_Storage | WGPUBufferUsage_CopySrc | WGPUBufferUsage_CopyDst);
  }

  void free(Memory* memory) override {
    if (is_forked()) return;  // the driver's threads and locks are not in this process
    auto* freed = static_cast<WgpuMemory*>(memory);
    for (auto entry = bind_groups_.begin(); entry != bind_groups_.end();) {
      bool uses = false;
      for (size_t i = 1; i < entry->first.size(); i += 3) uses |= entry->first[i] == freed->id;
      if (uses) api_.BindGroupRelease(entry->second);
      entry = uses ? bind_groups_.erase(entry) : std::next(entry);
    }
    // Recorded and submitted commands hold references of their own.
    api_.BufferRelease(freed->buffer);
    delete freed;
  }

  void write(Memory* memory, uint64_t offset, const void* data, uint64_t size) override {
    auto* to = check_range(memory, offset, size, "write");
    const auto* bytes = static_cast<const uint8_t*>(data);
    // Bytes in front of and behind the whole words travel in a fill's immediates.
    while (size > 0 && (offset % 4 != 0 || size < 4)) {
      const uint64_t part = std::min(4 - offset % 4, size);
      put_bytes(to, offset, bytes, part);
      offset += part, bytes += part, size -= part;
    }
    const uint64_t tail = size % 4;
    size -= tail;
    if (tail) put_bytes(to, offset + size, bytes + size, tail);
    while (size > 0) {
      const uint64_t part = std::min(size, kUploadPiece);
      upload(to, offset, bytes, part);
      offset += part, bytes += part, size -= part;
      if (staged_ >= kMaxStaged) flush();
    }
  }

  void read(Memory* memory, uint64_t offset, void* data, uint64_t size) override {
    auto* from = check_range(memory, offset, size, "read");
    auto* bytes = static_cast<uint8_t*>(data);
    while (size > 0) {  // piece by piece, so that staging stays small
      const uint64_t part = std::min(size, kReadPiece);
      download(from, offset, bytes, part);
      flush();
      wait_for(submitted_);
      offset += part, bytes += part, size -= part;
    }
    throw_kept();
  }

  void read_async(Memory* memory, uint64_t offset, void* data, uint64_t size) override {
    auto* from = check_range(memory, offset, size, "read");
    auto* bytes = static_cast<uint8_t*>(data);
    while (size > 0) {
      const uint64_t part = std::min(size, kReadPiece);
      download(from, offset, bytes, part);
      offset += part, bytes += part, size -= part;
    }
    flush();
  }

  void copy(Memory* source, uint64_t source_offset, Memory* destination, uint64_t offset, uint64_t size) override {
    auto* from = check_range(source, source_offset, size, "copy from");
    auto* to = check_range(destination, offset, size, "copy to");
    if (size == 0 || (from == to && source_offset == offset)) return;
    if (from != to && size >= kCopyWide && source_offset % 16 == 0 && offset % 16 == 0) {
      WgpuKernel* kernel = internal(copy_wide_kernel_, "copy_wide", kCopyWideSource, "copy", 2);
      for (uint64_t part; size >= 16; source_offset += part, offset += part, size -= part) {
        part = std::min(size, step_) / 16 * 16;
        const Binding bindings[2] = {window(from, source_offset), window(to, offset)};
        const uint32_t params[5] = {static_cast<uint32_t>((source_offset - bindings[0].offset) / 16),
                                    static_cast<uint32_t>((offset - bindings[1].offset) / 16), static_cast<uint32_t>(part / 16)};
        dispatch_words(kernel, bindings, 2, params, part / 16);
      }
      if (size == 0) return;
    }
    if (from != to && source_offset % 4 == 0 && offset % 4 == 0 && size % 4 == 0) {
      end_pass();
      api_.CommandEncoderCopyBufferToBuffer(encoder(), from->buffer, source_offset, to->buffer, offset, size);
      return;
    }
    TORCH_CHECK(from != to || source_offset + size <= offset || offset + size <= source_offset,
                "copy: source and destination overlap: bytes ", source_offset, " and ", offset, ", size ", size);
    WgpuKernel* kernel = internal(copy_kernel_, "copy_bytes", kCopySource, "copy", 2);
    while (size > 0) {
      const uint64_t part = std::min(size, step_);
      const Binding bindings[2] = {window(from, source_offset), window(to, offset)};
      const WordRange range = words(offset - bindings[1].offset, part);
      const auto start = static_cast<int64_t>(source_offset - bindings[0].offset) - static_cast<int64_t>(offset % 4);
      const uint32_t params[5] = {static_cast<uint32_t>(static_cast<int32_t>(start)), range.first, range.count, range.head,
                                  range.tail};
      dispatch_words(kernel, bindings, 2, params, range.count);
      source_offset += part, offset += part, size -= part;
    }
  }

  void fill(Memory* memory, uint64_t offset, uint64_t size, uint8_t value) override {
    auto* to = check_range(memory, offset, size, "fill");
    while (size > 0) {
      const uint64_t part = std::min(size, step_);
      fill_words(to, offset, part, value * 0x01010101u);
      offset += part, size -= part;
    }
  }

  // Kernels

  Kernel* compile(const KernelSource& source) override {
    check_not_forked();
    TORCH_CHECK(!lost_, properties_.name, " was lost; start the process again");
    TORCH_CHECK(source.bindings <= properties_.max_bindings, "kernel ", source.name, " takes ", source.bindings,
                " buffers; ", properties_.name, " binds at most ", properties_.max_bindings);
    TORCH_CHECK(source.params_size <= (source.params_immediate ? properties_.max_params : kParamSlot), "kernel ", source.name,
                " has a parameter block of ", source.params_size, " bytes; the most is ",
                source.params_immediate ? properties_.max_params : kParamSlot,
                source.params_immediate ? " as immediates (params_immediate=false takes more)" : "");
    auto kernel = std::make_unique<WgpuKernel>();
    kernel->name = source.name;
    kernel->bindings = source.bindings;
    kernel->params_size = source.params_size;
    kernel->immediate = source.params_immediate || source.params_size == 0;

    push_scopes();
    WGPUShaderSourceWGSL code{};
    code.chain.sType = WGPUSType_ShaderSourceWGSL;
    code.code = view(source.source);
    WGPUShaderModuleDescriptor module_descriptor{};
    module_descriptor.nextInChain = &code.chain;
    module_descriptor.label = view(source.name);
    WGPUShaderModule module = source.trusted && trust_
                                  ? api_.DeviceCreateShaderModuleTrusted(device_, &module_descriptor, WGPUShaderRuntimeChecks_None)
                                  : api_.DeviceCreateShaderModule(device_, &module_descriptor);
    std::string problem = pop_scopes();
    if (problem.empty()) {
      push_scopes();
      WGPUComputePipelineDescriptor descriptor{};
      descriptor.label = view(source.name);
      descriptor.layout = pipeline_layout(*kernel);
      descriptor.compute.module = module;
      descriptor.compute.entryPoint = view(source.entry);
      kernel->pipeline = api_.DeviceCreateComputePipeline(device_, &descriptor);
      problem = pop_scopes();
    }
    if (module) api_.ShaderModuleRelease(module);
    if (!problem.empty()) {
      if (kernel->pipeline) api_.ComputePipelineRelease(kernel->pipeline);
      const std::string saved = save_failed_kernel(source.name, properties_.name, source.source, problem);
      TORCH_CHECK(false, "kernel ", source.name, " does not compile for ", properties_.name, " (wgpu): ", problem,
                  saved.empty() ? "" : "\nSource and log: ", saved);
    }
    objects_ += 2;
    kernels_.push_back(std::move(kernel));
    return kernels_.back().get();
  }

  void enqueue(Kernel* kernel, const Binding* bindings, uint32_t count, const void* params,
               const uint32_t groups[3]) override {
    check_not_forked();
    auto* k = static_cast<WgpuKernel*>(kernel);
    TORCH_CHECK(count == k->bindings, "kernel ", k->name, " takes ", k->bindings, " buffers, got ", count);
    if (groups[0] == 0 || groups[1] == 0 || groups[2] == 0) return;
    const auto most = static_cast<uint32_t>(properties_.max_workgroups);
    TORCH_CHECK(groups[0] <= most && groups[1] <= most && groups[2] <= most, "kernel ", k->name, ": a grid of ", groups[0],
                " x ", groups[1], " x ", groups[2], " workgroups; ", properties_.name, " takes ", most, " per dimension");
    uint32_t slot = 0;
    if (!k->immediate) slot = param_slot(params, k->params_size);
    WGPUBindGroup group = count == 0 && k->immediate ? nullptr : bind_group(*k, bindings);

    WGPUComputePassEncoder pass = this->pass();
    if (pipeline_ != k->pipeline) {
      api_.ComputePassEncoderSetPipeline(pass, k->pipeline);
      pipeline_ = k->pipeline;
    }
    if (group) api_.ComputePassEncoderSetBindGroup(pass, 0, group, k->immediate ? 0 : 1, k->immediate ? nullptr : &slot);
    if (k->immediate && k->params_size > 0) {
      api_.ComputePassEncoderSetImmediates(pass, 0, params, round_up(k->params_size, 4));
    }
    api_.ComputePassEncoderDispatchWorkgroups(pass, groups[0], groups[1], groups[2]);
    if (++dispatches_ >= (in_flight_.empty() ? kFirstDispatches : kMaxDispatches)) flush();
  }

  // The queue

  void flush() override {
    end_pass();
    if (!encoder_) return;
    if (lost_) return drop_encoder();
    push_scopes();
    WGPUCommandBuffer commands = api_.CommandEncoderFinish(encoder_, nullptr);
    const std::string problem = pop_scopes();
    for (Staging* chunk : filled_) api_.BufferUnmap(chunk->buffer);
    if (problem.empty()) {
      in_flight_.push_back({submitted_ + 1, api_.QueueSubmitForIndex(queue_, 1, &commands)});
      ++submitted_;
      WGPUQueueWorkDoneCallbackInfo done{};
      done.mode = WGPUCallbackMode_AllowSpontaneous;
      done.callback = [](WGPUQueueWorkDoneStatus, WGPUStringView, void* engine, void* submission) {
        auto& completed = static_cast<WgpuEngine*>(engine)->completed_;
        completed = std::max<uint64_t>(completed, reinterpret_cast<uintptr_t>(submission));
      };
      done.userdata1 = this;
      done.userdata2 = reinterpret_cast<void*>(static_cast<uintptr_t>(submitted_));
      api_.QueueOnSubmittedWorkDone(queue_, done);
    } else {
      keep("queued work was dropped: " + problem);
    }
    api_.CommandBufferRelease(commands);
    api_.CommandEncoderRelease(encoder_);
    encoder_ = nullptr;
    dispatches_ = 0, staged_ = 0;
    for (Staging* chunk : filled_) map(chunk, WGPUMapMode_Write);
    filled_.clear();
    chunk_ = nullptr;
    for (PendingRead& read : recorded_reads_) {
      if (problem.empty()) {
        map(read.staging, WGPUMapMode_Read);
        reads_.push_back(read);
      } else {
        read.staging->state = Staging::Free;
      }
    }
    recorded_reads_.clear();
    if (in_flight_.size() > kMaxInFlight) {
      wait_for(in_flight_.front().id);
    } else {
      poll();
    }
  }

  void synchronize() override {
    check_not_forked();
    flush();
    wait_for(submitted_);
    throw_kept();
  }

  // Events

  std::unique_ptr<EventHandle> record(bool timed) override {
    check_not_forked();
    auto event = std::make_unique<WgpuEvent>();
    if (timed && properties_.timestamps) {
      event->slots = slots_;
      event->query = query_slot();
      end_pass();
      api_.CommandEncoderWriteTimestamp(encoder(), query_sets_[event->query / kQueries],
                                        static_cast<uint32_t>(event->query % kQueries));
    } else if (timed) {
      flush();
      wait_for(submitted_);
      event->host_ms = now_ms();
    }
    event->submission = submitted_ + (encoder_ ? 1 : 0);
    return event;
  }

  bool query(EventHandle& handle) override {
    auto& event = static_cast<WgpuEvent&>(handle);
    if (event.submission > submitted_) flush();
    poll();
    return event.submission <= completed_ || event.submission > submitted_ || lost_;
  }

  void wait(EventHandle& handle) override {
    auto& event = static_cast<WgpuEvent&>(handle);
    if (event.submission > submitted_) flush();
    wait_for(std::min(event.submission, submitted_));
  }

  double elapsed_ms(EventHandle& start_handle, EventHandle& end_handle) override {
    wait(start_handle);
    wait(end_handle);
    auto& start = static_cast<WgpuEvent&>(start_handle);
    auto& end = static_cast<WgpuEvent&>(end_handle);
    if (!properties_.timestamps) return end.host_ms - start.host_ms;
    TORCH_CHECK(start.query >= 0 && end.query >= 0, "elapsed_ms needs two events that were recorded with timing");
    if (!resolved_) resolved_ = make_memory(512, WGPUBufferUsage_QueryResolve | WGPUBufferUsage_CopySrc);
    uint64_t offset = 0;
    for (int64_t query : {start.query, end.query}) {
      end_pass();
      api_.CommandEncoderResolveQuerySet(encoder(), query_sets_[query / kQueries], static_cast<uint32_t>(query % kQueries), 1,
                                         resolved_->buffer, offset);
      offset += 256;
    }
    uint64_t ticks[33];
    read(resolved_, 0, ticks, sizeof ticks);
    return static_cast<double>(static_cast<int64_t>(ticks[32] - ticks[0])) * api_.QueueGetTimestampPeriod(queue_) * 1e-6;
  }

  // One read for many.
  void elapsed_many_ms(EventHandle& start, EventHandle* const* ends, size_t count, double* out) override {
    if (!properties_.timestamps) return Engine::elapsed_many_ms(start, ends, count, out);
    constexpr size_t kBatch = 1023, kStride = 256;
    if (!resolved_many_) resolved_many_ = make_memory((kBatch + 1) * kStride, WGPUBufferUsage_QueryResolve | WGPUBufferUsage_CopySrc);
    std::vector<uint64_t> ticks((kBatch + 1) * kStride / 8);
    for (size_t first = 0; first < count; first += kBatch) {
      const size_t n = std::min(kBatch, count - first);
      for (size_t i = 0; i <= n; ++i) {
        const int64_t query = static_cast<WgpuEvent&>(i ? *ends[first + i - 1] : start).query;
        TORCH_CHECK(query >= 0, "elapsed_ms needs events that were recorded with timing");
        end_pass();
        api_.CommandEncoderResolveQuerySet(encoder(), query_sets_[query / kQueries], static_cast<uint32_t>(query % kQueries), 1,
                                           resolved_many_->buffer, i * kStride);
      }
      read(resolved_many_, 0, ticks.data(), (n + 1) * kStride);
      const double period = api_.QueueGetTimestampPeriod(queue_) * 1e-6;
      for (size_t i = 1; i <= n; ++i) {
        out[first + i - 1] = static_cast<double>(static_cast<int64_t>(ticks[i * kStride / 8] - ticks[0])) * period;
      }
    }
  }

 private:
  struct Submission {
    uint64_t id;
    WGPUSubmissionIndex index;
  };

  // Errors

  // The first error since the last one that was thrown says most.
  void keep(const std::string& message) {
    if (kept_.empty()) kept_ = properties_.name + " (wgpu): " + message;
  }

  void throw_kept() {
    if (kept_.empty()) return;
    std::string message;
    std::swap(message, kept_);
    TORCH_CHECK(false, message);
  }

  void push_scopes() {
    // wgpu-native has no scope for internal errors: they arrive in uncaptured().
    for (auto filter : {WGPUErrorFilter_OutOfMemory, WGPUErrorFilter_Validation}) api_.DevicePushErrorScope(device_, filter);
    scoped_ = true;
    internal_error_.clear();
  }

  // What went wrong since push_scopes(); empty: nothing. `out_of_memory` tells that kind apart.
  std::string pop_scopes(bool* out_of_memory = nullptr) {
    struct Popped {
      std::string message;
      bool out_of_memory = false;
    } popped;
    WGPUPopErrorScopeCallbackInfo info{};
    info.mode = WGPUCallbackMode_AllowSpontaneous;
    info.callback = [](WGPUPopErrorScopeStatus, WGPUErrorType type, WGPUStringView message, void* user, void*) {
      if (type == WGPUErrorType_NoError) return;
      auto& popped = *static_cast<Popped*>(user);
      popped.out_of_memory |= type == WGPUErrorType_OutOfMemory;
      popped.message += (popped.message.empty() ? "" : "\n") + text(message);
      if (popped.message.empty()) popped.message = "an error without a message";
    };
    info.userdata1 = &popped;
    for (int i = 0; i < 2; ++i) api_.DevicePopErrorScope(device_, info);  // wgpu-native calls back before it returns
    scoped_ = false;
    if (out_of_memory) *out_of_memory = popped.out_of_memory;
    return popped.message.empty() ? internal_error_ : popped.message;
  }

  WgpuMemory* check_range(Memory* memory, uint64_t offset, uint64_t size, const char* what) const {
    check_not_forked();
    TORCH_CHECK(offset <= memory->size && size <= memory->size - offset, what, ": bytes ", offset, " to ", offset + size,
                " of a memory of ", memory->size);
    return static_cast<WgpuMemory*>(memory);
  }

  // Objects

  WGPUBuffer make_buffer(uint64_t size, WGPUBufferUsage usage, bool mapped) {
    TORCH_CHECK(!lost_, properties_.name, " was lost; start the process again");
    WGPUBufferDescriptor descriptor{};
    descriptor.usage = usage;
    descriptor.size = size;
    descriptor.mappedAtCreation = mapped;
    push_scopes();
    WGPUBuffer buffer = api_.DeviceCreateBuffer(device_, &descriptor);
    bool out_of_memory = false;
    const std::string problem = pop_scopes(&out_of_memory);
    if (buffer && problem.empty()) {
      ++objects_;
      return buffer;
    }
    if (buffer) api_.BufferRelease(buffer);
    TORCH_CHECK_WITH(OutOfMemoryError, !out_of_memory, properties_.name, " (wgpu) has no ", size, " bytes left: ", problem);
    TORCH_CHECK(false, properties_.name, " (wgpu) made no buffer of ", size, " bytes: ", problem);
  }

  WgpuMemory* make_memory(uint64_t size, WGPUBufferUsage usage) {
    TORCH_CHECK(size > 0, "an allocation of 0 bytes");
    TORCH_CHECK_WITH(OutOfMemoryError, size <= static_cast<uint64_t>(properties_.max_allocation), "an allocation of ", size,
                     " bytes; ", properties_.name, " (wgpu) allows ", properties_.max_allocation, " in one buffer");
    auto memory = std::make_unique<WgpuMemory>();
    memory->size = size;
    memory->allocated = round_up(size, 16);
    memory->buffer = make_buffer(memory->allocated, usage, false);
    memory->id = ++memories_;
    return memory.release();
  }

  // `bindings` read_write buffers; then, where `params`, the parameter block, read-only at a dynamic offset.
  WGPUBindGroupLayout bind_group_layout(uint32_t bindings, bool params) {
    WGPUBindGroupLayout& layout = bind_group_layouts_[bindings * 2 + params];
    if (layout) return layout;
    std::vector<WGPUBindGroupLayoutEntry> entries(bindings + params);
    for (uint32_t i = 0; i < entries.size(); ++i) {
      entries[i].binding = i;
      entries[i].visibility = WGPUShaderStage_Compute;
      entries[i].buffer.type = i < bindings ? WGPUBufferBindingType_Storage : WGPUBufferBindingType_ReadOnlyStorage;
      entries[i].buffer.hasDynamicOffset = i >= bindings;
    }
    WGPUBindGroupLayoutDescriptor descriptor{};
    descriptor.entryCount = entries.size();
    descriptor.entries = entries.data();
    layout = api_.DeviceCreateBindGroupLayout(device_, &descriptor);
    ++objects_;
    return layout;
  }

  WGPUPipelineLayout pipeline_layout(const WgpuKernel& kernel) {
    const uint32_t immediates = kernel.immediate ? static_cast<uint32_t>(round_up(kernel.params_size, 4)) : 0;
    WGPUPipelineLayout& layout =
        pipeline_layouts_[uint64_t{kernel.bindings} << 33 | uint64_t{!kernel.immediate} << 32 | immediates];
    if (layout) return layout;
    WGPUBindGroupLayout groups = bind_group_layout(kernel.bindings, !kernel.immediate);
    WGPUPipelineLayoutDescriptor descriptor{};
    descriptor.bindGroupLayoutCount = kernel.bindings > 0 || !kernel.immediate ? 1 : 0;
    descriptor.bindGroupLayouts = &groups;
    descriptor.immediateSize = immediates;
    layout = api_.DeviceCreatePipelineLayout(device_, &descriptor);
    ++objects_;
    return layout;
  }

  WGPUBindGroup bind_group(const WgpuKernel& kernel, const Binding* bindings) {
    key_.clear();
    key_.push_back(uint64_t{kernel.bindings} * 2 + !kernel.immediate);
    for (uint32_t i = 0; i < kernel.bindings; ++i) {
      key_.push_back(static_cast<WgpuMemory*>(bindings[i].memory)->id);
      key_.push_back(bindings[i].offset);
      key_.push_back(bindings[i].size);
    }
    auto found = bind_groups_.find(key_);
    if (found != bind_groups_.end()) return found->second;

    std::vector<WGPUBindGroupEntry> entries(kernel.bindings + !kernel.immediate);
    for (uint32_t i = 0; i < kernel.bindings; ++i) {
      const auto* memory = static_cast<WgpuMemory*>(bindings[i].memory);
      const uint64_t offset = bindings[i].offset, size = bindings[i].size;
      TORCH_CHECK(offset % 256 == 0 && size > 0 && offset < memory->size && size <= memory->size - offset &&
                      size <= static_cast<uint64_t>(properties_.max_binding),
                  "kernel ", kernel.name, ": buffer ", i, " is bound at ", offset, " with ", size, " bytes of ", memory->size,
                  "; offsets are multiples of 256 and sizes at most ", properties_.max_binding);
      entries[i].binding = i;
      entries[i].buffer = memory->buffer;
      entries[i].offset = offset;
      // Up to the end of a vec4: the buffer has room for it.
      entries[i].size = std::min(round_up(size, 16), static_cast<uint64_t>(properties_.max_binding));
    }
    if (!kernel.immediate) {
      entries.back().binding = kernel.bindings;
      entries.back().buffer = params_->buffer;
      entries.back().size = kParamSlot;
    }
    if (bind_groups_.size() >= kMaxBindGroups) {  // recorded commands hold references of their own
      for (auto& entry : bind_groups_) api_.BindGroupRelease(entry.second);
      bind_groups_.clear();
    }
    WGPUBindGroupDescriptor descriptor{};
    descriptor.label = view(kernel.name);
    descriptor.layout = bind_group_layout(kernel.bindings, !kernel.immediate);
    descriptor.entryCount = entries.size();
    descriptor.entries = entries.data();
    push_scopes();
    WGPUBindGroup group = api_.DeviceCreateBindGroup(device_, &descriptor);
    const std::string problem = pop_scopes();
    if (!problem.empty()) {
      if (group) api_.BindGroupRelease(group);
      TORCH_CHECK(false, "kernel ", kernel.name, " (wgpu): ", problem);
    }
    ++objects_;
    bind_groups_.emplace(key_, group);
    return group;
  }

  // The offset in params_ of a block with this content, uploaded where it isn't there yet. The upload is a command in the
  // encoder, so a slot may be taken over while commands before it, recorded or submitted, still read the old content.
  uint32_t param_slot(const void* params, uint32_t size) {
    param_key_.assign(static_cast<const char*>(params), size);
    auto found = param_slots_.find(param_key_);
    if (found != param_slots_.end()) {
      param_order_.splice(param_order_.begin(), param_order_, found->second);
      return found->second->second;
    }
    if (!params_) params_ = static_cast<WgpuMemory*>(allocate(kParamSlot * kParamSlots));
    auto slot = static_cast<uint32_t>(param_slots_.size() * kParamSlot);
    if (param_slots_.size() == kParamSlots) {
      slot = param_order_.back().second;
      param_slots_.erase(param_order_.back().first);
      param_order_.pop_back();
    }
    param_key_.resize(round_up(size, 4));
    upload(params_, slot, param_key_.data(), param_key_.size());
    param_key_.resize(size);
    param_order_.emplace_front(param_key_, slot);
    param_slots_[param_key_] = param_order_.begin();
    return slot;
  }

  WgpuKernel* internal(WgpuKernel*& kernel, const char* name, const char* source, const char* entry, uint32_t bindings) {
    if (!kernel) {
      KernelSource description;
      description.name = name;
      description.source = source;
      description.entry = entry;
      description.workgroup[0] = kInternalWorkgroup;
      description.bindings = bindings;
      description.params_size = 20;
      description.trusted = true;  // check_range() has seen the indices
      kernel = static_cast<WgpuKernel*>(compile(description));
    }
    return kernel;
  }

  int64_t query_slot() {
    std::lock_guard<std::mutex> lock(slots_->mutex);
    if (slots_->free.empty()) {
      WGPUQuerySetDescriptor descriptor{};
      descriptor.type = WGPUQueryType_Timestamp;
      descriptor.count = kQueries;
      const auto first = static_cast<uint32_t>(query_sets_.size()) * kQueries;
      query_sets_.push_back(api_.DeviceCreateQuerySet(device_, &descriptor));
      ++objects_;
      for (uint32_t i = kQueries; i-- > 0;) slots_->free.push_back(first + i);
    }
    const uint32_t slot = slots_->free.back();
    slots_->free.pop_back();
    return slot;
  }

  // Recording

  WGPUCommandEncoder encoder() {
    if (!encoder_) encoder_ = api_.DeviceCreateCommandEncoder(device_, nullptr);
    return encoder_;
  }

  WGPUComputePassEncoder pass() {
    if (!pass_) pass_ = api_.CommandEncoderBeginComputePass(encoder(), nullptr);
    return pass_;
  }

  void end_pass() {
    if (!pass_) return;
    api_.ComputePassEncoderEnd(pass_);
    api_.ComputePassEncoderRelease(pass_);
    pass_ = nullptr;
    pipeline_ = nullptr;
  }

  void drop_encoder() {
    end_pass();
    if (encoder_) api_.CommandEncoderRelease(encoder_);
    encoder_ = nullptr;
    dispatches_ = 0, staged_ = 0;
    recorded_reads_.clear();
    filled_.clear();
    chunk_ = nullptr;
  }

  // The part of a memory that a masked copy or fill at `offset` binds: on a coarse grid, so that bind groups are few.
  Binding window(WgpuMemory* memory, uint64_t offset) const {
    const uint64_t base = memory->size <= 2 * step_ ? 0 : offset / step_ * step_;
    return {memory, base, std::min(2 * step_, memory->size - base)};
  }

  void dispatch_words(WgpuKernel* kernel, const Binding* bindings, uint32_t count, const uint32_t params[5], uint64_t n) {
    const uint32_t groups[3] = {static_cast<uint32_t>(std::min<uint64_t>(round_up(n, kInternalWorkgroup) / kInternalWorkgroup, 16384)), 1, 1};
    enqueue(kernel, bindings, count, params, groups);
  }

  // At most step_ bytes.
  void fill_words(WgpuMemory* to, uint64_t offset, uint64_t size, uint32_t pattern) {
    WgpuKernel* kernel = internal(fill_kernel_, "fill_bytes", kFillSource, "fill", 1);
    const Binding binding = window(to, offset);
    const WordRange range = words(offset - binding.offset, size);
    const uint32_t params[5] = {range.first, range.count, pattern, range.head, range.tail};
    dispatch_words(kernel, &binding, 1, params, range.count);
  }

  // Bytes of one word.
  void put_bytes(WgpuMemory* to, uint64_t offset, const uint8_t* bytes, uint64_t size) {
    uint32_t pattern = 0;
    std::memcpy(reinterpret_cast<uint8_t*>(&pattern) + offset % 4, bytes, size);
    fill_words(to, offset, size, pattern);
  }

  // Whole words.
  void upload(WgpuMemory* to, uint64_t offset, const void* data, uint64_t size) {
    if (!chunk_ || chunk_->size - chunk_used_ < size) {
      Staging* chunk = mapped_chunk(power_of_two(size, kUploadChunk));
      filled_.push_back(chunk);
      chunk_ = chunk;
      chunk_used_ = 0;
    }
    std::memcpy(static_cast<uint8_t*>(api_.BufferGetMappedRange(chunk_->buffer, 0, chunk_->size)) + chunk_used_, data, size);
    end_pass();
    api_.CommandEncoderCopyBufferToBuffer(encoder(), chunk_->buffer, chunk_used_, to->buffer, offset, size);
    chunk_used_ = round_up(chunk_used_ + size, 16);
    staged_ += size;
  }

  // An upload buffer of exactly `size` bytes, mapped.
  Staging* mapped_chunk(uint64_t size) {
    for (;;) {
      for (int polled = 0; polled < 2; ++polled) {
        for (auto& chunk : uploads_) {
          if (chunk->size == size && chunk->state == Staging::Mapped) {
            chunk->state = Staging::InUse;
            return chunk.get();
          }
        }
        if (!polled) poll();
      }
      if (upload_bytes_ + size <= kMaxUpload || uploads_.empty()) break;
      // Over the budget: hand out what the device gives back, or give up buffers of other sizes.
      const uint64_t before = upload_bytes_;
      release_idle_uploads();
      if (upload_bytes_ < before) continue;
      flush();
      if (in_flight_.empty() || lost_) break;
      wait_for(in_flight_.front().id);
    }
    auto chunk = std::make_unique<Staging>();
    chunk->buffer = make_buffer(size, WGPUBufferUsage_MapWrite | WGPUBufferUsage_CopySrc, true);
    chunk->size = size;
    upload_bytes_ += size;
    uploads_.push_back(std::move(chunk));
    return uploads_.back().get();
  }

  void release_idle_uploads() {
    uploads_.erase(std::remove_if(uploads_.begin(), uploads_.end(),
                                  [&](std::unique_ptr<Staging>& chunk) {
                                    if (chunk->state != Staging::Mapped) return false;
                                    upload_bytes_ -= chunk->size;
                                    api_.BufferRelease(chunk->buffer);
                                    return true;
                                  }),
                   uploads_.end());
  }

  // At most kReadPiece bytes, to be handed over by finish_reads().
  void download(WgpuMemory* from, uint64_t offset, void* data, uint64_t size) {
    const uint64_t skip = offset % 4;
    const uint64_t span = round_up(skip + size, 4);
    const uint64_t wanted = power_of_two(span, 4096);
    Staging* staging = nullptr;
    for (auto& candidate : downloads_) {
      if (candidate->size == wanted && candidate->state == Staging::Free) staging = candidate.get();
    }
    if (!staging) {
      downloads_.push_back(std::make_unique<Staging>());
      staging = downloads_.back().get();
      staging->size = wanted;
      staging->buffer = make_buffer(wanted, WGPUBufferUsage_MapRead | WGPUBufferUsage_CopyDst, false);
    }
    staging->state = Staging::InUse;
    end_pass();
    api_.CommandEncoderCopyBufferToBuffer(encoder(), from->buffer, offset - skip, staging->buffer, 0, span);
    recorded_reads_.push_back({staging, skip, size, data, submitted_ + 1});
  }

  // Calls back once the device has finished with the buffer; poll() makes it do so.
  void map(Staging* staging, WGPUMapMode mode) {
    staging->state = Staging::Pending;
    WGPUBufferMapCallbackInfo info{};
    info.mode = WGPUCallbackMode_AllowSpontaneous;
    info.callback = [](WGPUMapAsyncStatus status, WGPUStringView, void* user, void*) {
      static_cast<Staging*>(user)->state = status == WGPUMapAsyncStatus_Success ? Staging::Mapped : Staging::Failed;
    };
    info.userdata1 = staging;
    api_.BufferMapAsync(staging->buffer, mode, 0, staging->size, info);
  }

  // Completion

  void poll() {
    api_.DevicePoll(device_, false, nullptr);
    retire();
  }

  // Asleep, a thread learns of the end some 100 us late. A software adapter needs its core meanwhile.
  void wait_awake(uint64_t submission) {
    if (properties_.type == DeviceType::Software) return;
    const auto end = std::chrono::steady_clock::now() + kAwake;
    while (completed_ < submission && !lost_ && std::chrono::steady_clock::now() < end) api_.DevicePoll(device_, false, nullptr);
  }

  void wait_for(uint64_t submission) {
    wait_awake(submission);
    while (completed_ < submission && !lost_) {
      auto found = std::find_if(in_flight_.begin(), in_flight_.end(), [&](const Submission& s) { return s.id >= submission; });
      if (found == in_flight_.end()) break;
      api_.DevicePoll(device_, true, &found->index);
      completed_ = std::max(completed_, found->id);
    }
    retire();
    while (!reads_.empty() && reads_.front().submission <= submission && !lost_) {
      api_.DevicePoll(device_, true, nullptr);
      retire();
    }
  }

  void retire() {
    while (!in_flight_.empty() && in_flight_.front().id <= completed_) in_flight_.pop_front();
    while (!reads_.empty() && (reads_.front().staging->state != Staging::Pending || lost_)) {
      const PendingRead read = reads_.front();
      reads_.pop_front();
      if (read.staging->state == Staging::Mapped) {
        const void* mapped = api_.BufferGetConstMappedRange(read.staging->buffer, 0, read.staging->size);
        std::memcpy(read.data, static_cast<const uint8_t*>(mapped) + read.skip, read.size);
        api_.BufferUnmap(read.staging->buffer);
        read.staging->state = Staging::Free;
      } else {
        keep("a read-back failed");
      }
    }
  }

  const Api& api_;
  DeviceProperties properties_;
  WGPUDevice device_ = nullptr;
  WGPUQueue queue_ = nullptr;
  bool trust_ = true;
  bool lost_ = false;
  bool scoped_ = false;  // between push_scopes() and pop_scopes()
  std::string internal_error_;
  std::string kept_;
  uint64_t objects_ = 0, memories_ = 0;
  uint64_t step_ = 0;

  WGPUCommandEncoder encoder_ = nullptr;
  WGPUComputePassEncoder pass_ = nullptr;
  WGPUComputePipeline pipeline_ = nullptr;  // set in pass_
  uint32_t dispatches_ = 0;                 // in encoder_
  uint64_t staged_ = 0;                     // bytes written in encoder_

  uint64_t submitted_ = 0, completed_ = 0;
  std::deque<Submission> in_flight_;

  std::vector<std::unique_ptr<Staging>> uploads_, downloads_;
  uint64_t upload_bytes_ = 0;
  std::vector<Staging*> filled_;  // uploads that encoder_ copies from
  Staging* chunk_ = nullptr;      // the last of them, filled up to chunk_used_
  uint64_t chunk_used_ = 0;
  std::vector<PendingRead> recorded_reads_;  // in encoder_
  std::deque<PendingRead> reads_;            // submitted

  std::vector<std::unique_ptr<WgpuKernel>> kernels_;
  WgpuKernel *copy_kernel_ = nullptr, *copy_wide_kernel_ = nullptr, *fill_kernel_ = nullptr;
  std::unordered_map<uint32_t, WGPUBindGroupLayout> bind_group_layouts_;
  std::unordered_map<uint64_t, WGPUPipelineLayout> pipeline_layouts_;
  std::unordered_map<Words, WGPUBindGroup, HashWords> bind_groups_;
  Words key_;

  WgpuMemory* params_ = nullptr;
  std::list<std::pair<std::string, uint32_t>> param_order_;  // content and offset in params_, the last used first
  std::unordered_map<std::string, std::list<std::pair<std::string, uint32_t>>::iterator> param_slots_;
  std::string param_key_;

  WgpuMemory *resolved_ = nullptr, *resolved_many_ = nullptr;
  std::vector<WGPUQuerySet> query_sets_;
  std::shared_ptr<QuerySlots> slots_;
};

// Adapters

constexpr WGPUFeatureName native(WGPUNativeFeature feature) { return static_cast<WGPUFeatureName>(feature); }

// Those that torch_spiral uses where an adapter has them.
const WGPUFeatureName kFeatures[] = {
    native(WGPUNativeFeature_Immediates),
    WGPUFeatureName_ShaderF16,
    native(WGPUNativeFeature_ShaderF64),
    native(WGPUNativeFeature_ShaderInt64),
    native(WGPUNativeFeature_Subgroup),
    native(WGPUNativeFeature_SubgroupBarrier),
    native(WGPUNativeFeature_ShaderInt64AtomicMinMax),
    native(WGPUNativeFeature_ShaderInt64AtomicAllOps),
    native(WGPUNativeFeature_ShaderFloat32Atomic),
    WGPUFeatureName_TimestampQuery,
    native(WGPUNativeFeature_TimestampQueryInsideEncoders),
};

struct WgpuAdapter final : Adapter {
  const Api& api;
  WGPUAdapter adapter;
  WGPULimits limits{};

  WgpuAdapter(const Api& api, WGPUAdapter adapter) : api(api), adapter(adapter) {}
  ~WgpuAdapter() override { api.AdapterRelease(adapter); }

  bool has(WGPUFeatureName feature) const { return api.AdapterHasFeature(adapter, feature); }
  bool has(WGPUNativeFeature feature) const { return has(native(feature)); }

  std::unique_ptr<Engine> open() override {
    auto engine = std::make_unique<WgpuEngine>(api, properties, limits.minStorageBufferOffsetAlignment);
    std::vector<WGPUFeatureName> features;
    for (WGPUFeatureName feature : kFeatures) {
      if (has(feature)) features.push_back(feature);
    }
    WGPUDeviceDescriptor descriptor{};
    descriptor.requiredFeatureCount = features.size();
    descriptor.requiredFeatures = features.data();
    descriptor.requiredLimits = &limits;
    descriptor.deviceLostCallbackInfo.mode = WGPUCallbackMode_AllowSpontaneous;
    descriptor.deviceLostCallbackInfo.callback = [](WGPUDevice const*, WGPUDeviceLostReason reason, WGPUStringView message,
                                                    void* user, void*) {
      // Our own release of the device is reported here too, when the engine is gone.
      if (reason == WGPUDeviceLostReason_Unknown) static_cast<WgpuEngine*>(user)->device_lost(text(message));
    };
    descriptor.deviceLostCallbackInfo.userdata1 = engine.get();
    descriptor.uncapturedErrorCallbackInfo.callback = [](WGPUDevice const*, WGPUErrorType, WGPUStringView message, void* user,
                                                         void*) { static_cast<WgpuEngine*>(user)->uncaptured(text(message)); };
    descriptor.uncapturedErrorCallbackInfo.userdata1 = engine.get();

    struct Result {
      WGPUDevice device = nullptr;
      std::string message;
    } result;
    WGPURequestDeviceCallbackInfo callback{};
    callback.mode = WGPUCallbackMode_AllowSpontaneous;
    callback.callback = [](WGPURequestDeviceStatus status, WGPUDevice device, WGPUStringView message, void* user, void*) {
      auto& result = *static_cast<Result*>(user);
      if (status == WGPURequestDeviceStatus_Success) result.device = device;
      result.message = text(message);
    };
    callback.userdata1 = &result;
    api.AdapterRequestDevice(adapter, &descriptor, callback);  // wgpu-native calls back before it returns
    TORCH_CHECK(result.device, properties.name, " (wgpu) does not open: ", result.message);
    engine->attach(result.device);
    return engine;
  }
};

const char* vendor_name(uint32_t id) {
  switch (id) {
    case 0x1002: return "AMD";
    case 0x1010: return "Imagination";
    case 0x106B: return "Apple";
    case 0x10DE: return "NVIDIA";
    case 0x13B5: return "Arm";
    case 0x1414: return "Microsoft";
    case 0x5143: return "Qualcomm";
    case 0x8086: return "Intel";
    case 0x10005: return "Mesa";
    default: return "unknown";
  }
}

int64_t host_memory() {
#ifdef _WIN32
  MEMORYSTATUSEX status{};
  status.dwLength = sizeof status;
  return GlobalMemoryStatusEx(&status) ? static_cast<int64_t>(status.ullTotalPhys) : 0;
#else
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
#endif
}

void describe(WgpuAdapter& adapter, const WGPUAdapterInfo& info) {
  DeviceProperties& p = adapter.properties;
  const WGPULimits& limits = adapter.limits;
  const std::string driver = text(info.vendor);
  p.engine = "wgpu";
  p.name = text(info.device);
  p.vendor = vendor_name(info.vendorID);
  p.driver = driver + (driver.empty() ? "" : " ") + text(info.description);
  const char* backend = info.backendType == WGPUBackendType_Vulkan  ? "Vulkan"
                        : info.backendType == WGPUBackendType_Metal ? "Metal"
                                                                    : "DX12";
  const uint32_t version = adapter.api.GetVersion();
  p.api_version = std::string(backend) + ", wgpu-native " + std::to_string(version >> 24) + "." +
                  std::to_string(version >> 16 & 255) + "." + std::to_string(version >> 8 & 255);
  p.type = info.adapterType == WGPUAdapterType_DiscreteGPU ? DeviceType::DiscreteGPU
           : info.adapterType == WGPUAdapterType_CPU       ? DeviceType::Software
                                                           : DeviceType::IntegratedGPU;
  const bool software = p.type == DeviceType::Software;
  p.language = Language::WGSL;
  p.schedule_class = ScheduleClass::Simt;
  p.max_allocation = static_cast<int64_t>(limits.maxBufferSize / 256 * 256);
  p.max_binding = static_cast<int64_t>(std::min(limits.maxStorageBufferBindingSize, limits.maxBufferSize) / 256 * 256);
  p.max_params = limits.maxImmediateSize / 8 * 8;
  p.max_workgroup_size = limits.maxComputeInvocationsPerWorkgroup;
  p.max_workgroup_memory = limits.maxComputeWorkgroupStorageSize;
  p.max_workgroups = limits.maxComputeWorkgroupsPerDimension;
  // One is for a parameter block that doesn't fit immediates.
  p.max_bindings = std::min<int64_t>(limits.maxStorageBuffersPerShaderStage, limits.maxBindingsPerBindGroup) - 1;
  // WebGPU tells neither memory nor compute units. A discrete GPU's number is a guess that only splits of work depend on.
  p.total_memory = software || p.type == DeviceType::IntegratedGPU ? host_memory() : std::numeric_limits<int64_t>::max();
  p.compute_units = software ? std::max(1u, std::thread::hardware_concurrency()) : p.type == DeviceType::DiscreteGPU ? 64 : 16;
  if (adapter.has(WGPUNativeFeature_Subgroup)) {
    p.subgroup_min = info.subgroupMinSize;
    p.subgroup_max = info.subgroupMaxSize;
    if (!p.subgroup_max) {  // some drivers do not tell: NVIDIA's has 32
      p.subgroup_min = p.subgroup_max = info.vendorID == 0x10DE ? 32 : 0;
    }
    // llvmpipe reports 4 to 128; the true size is its vectors', "llvmpipe (LLVM 15.0.6, 256 bits)".
    const size_t bits = p.name.rfind(" bits)");
    if (p.name.rfind("llvmpipe", 0) == 0 && bits != std::string::npos) {
      p.subgroup_min = p.subgroup_max = std::atoi(p.name.c_str() + p.name.rfind(' ', bits - 1)) / 32;
    }
  }
  p.float16 = adapter.has(WGPUFeatureName_ShaderF16);
  p.float64 = adapter.has(WGPUNativeFeature_ShaderF64);
  p.int64 = adapter.has(WGPUNativeFeature_ShaderInt64);
  p.int64_atomics = adapter.has(WGPUNativeFeature_ShaderInt64AtomicAllOps);
  p.float32_atomics = adapter.has(WGPUNativeFeature_ShaderFloat32Atomic);
  p.timestamps = adapter.has(WGPUFeatureName_TimestampQuery) && adapter.has(WGPUNativeFeature_TimestampQueryInsideEncoders);
}

// Why an adapter is left out; empty: it is not.
std::string unfit(const WgpuAdapter& adapter) {
  const DeviceProperties& p = adapter.properties;
  if (!adapter.has(WGPUNativeFeature_Immediates) || p.max_params < 64) {
    return p.name + " has no immediates of 64 bytes (push constants); update its driver";
  }
  // Mesa 22.3 (Debian 12) stops an invocation after 65,535 loop iterations and says nothing.
  const size_t mesa = p.driver.find("Mesa ");
  if (p.type == DeviceType::Software && mesa != std::string::npos && std::atoi(p.driver.c_str() + mesa + 5) < 24) {
    return p.name + " of Mesa before 24 computes wrong results in long loops; scripts/install_engines.sh installs a newer one";
  }
  return "";
}

}  // namespace

std::vector<std::unique_ptr<Adapter>> wgpu_adapters(const std::string& library, std::string& why) {
  std::vector<std::unique_ptr<Adapter>> found;
  check_not_forked();
  const Api* api = load(library, why);
  if (!api) return found;
  watch_fork();
  std::vector<WGPUAdapter> handles(api->InstanceEnumerateAdapters(api->instance, nullptr, nullptr));
  if (!handles.empty()) handles.resize(api->InstanceEnumerateAdapters(api->instance, nullptr, handles.data()));
  for (WGPUAdapter handle : handles) {
    auto adapter = std::make_unique<WgpuAdapter>(*api, handle);
    WGPUAdapterInfo info{};
    if (api->AdapterGetInfo(handle, &info) != WGPUStatus_Success) continue;
    api->AdapterGetLimits(handle, &adapter->limits);
    describe(*adapter, info);
    const bool native = info.backendType == WGPUBackendType_Vulkan || info.backendType == WGPUBackendType_Metal ||
                        info.backendType == WGPUBackendType_D3D12;
    api->AdapterInfoFreeMembers(info);
    if (!native) continue;
    const std::string reason = unfit(*adapter);
    if (reason.empty()) {
      found.push_back(std::move(adapter));
    } else {
      why += (why.empty() ? "" : "; ") + reason;
    }
  }
  if (found.empty() && why.empty()) {
    why = "no Vulkan, Metal or DX12 device; install the GPU's driver, or scripts/install_engines.sh for a software device";
  }
  return found;
}

}  // namespace spiral
