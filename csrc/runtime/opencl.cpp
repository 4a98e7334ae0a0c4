// The OpenCL engine: OpenCL 1.2 through whatever loader or driver library is found at run time.
#include "runtime/engine.h"
#include "runtime/fork.h"
#include "runtime/kernel_cache.h"
#include "runtime/library.h"
#include "runtime/opencl_api.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <string_view>

#ifdef __linux__
#include <sched.h>
#include <unistd.h>
#endif

namespace spiral {
namespace {

using namespace cl;

// Work is handed to the device after so many commands: late enough to batch, early enough to keep the device busy.
constexpr uint32_t kFlushAfter = 64;

// A host that never waits must not queue without end: commands take memory. Deep enough that a wait costs nothing.
constexpr uint32_t kMaxQueued = 16384;

// Writes up to a segment's size go through a ring of pinned host memory, so that they neither wait for the queue nor need
// their data to live on. Larger ones are dominated by the copy itself and block.
constexpr uint64_t kStagingSegment = 4 << 20;
constexpr int kStagingSegments = 4;

constexpr uint32_t kFillWorkgroup = 256;

// Up to so many bytes a copy by the calling thread costs less than waking another.
constexpr uint64_t kInlineBytes = 64 << 10;

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

const char* error_name(cl_int code) {
  switch (code) {
    case -1: return "CL_DEVICE_NOT_FOUND";
    case -2: return "CL_DEVICE_NOT_AVAILABLE";
    case -3: return "CL_COMPILER_NOT_AVAILABLE";
    case -4: return "CL_MEM_OBJECT_ALLOCATION_FAILURE";
    case -5: return "CL_OUT_OF_RESOURCES";
    case -6: return "CL_OUT_OF_HOST_MEMORY";
    case -7: return "CL_PROFILING_INFO_NOT_AVAILABLE";
    case -8: return "CL_MEM_COPY_OVERLAP";
    case -11: return "CL_BUILD_PROGRAM_FAILURE";
    case -14: return "CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST";
    case -30: return "CL_INVALID_VALUE";
    case -33: return "CL_INVALID_DEVICE";
    case -34: return "CL_INVALID_CONTEXT";
    case -36: return "CL_INVALID_COMMAND_QUEUE";
    case -38: return "CL_INVALID_MEM_OBJECT";
    case -42: return "CL_INVALID_BINARY";
    case -43: return "CL_INVALID_BUILD_OPTIONS";
    case -44: return "CL_INVALID_PROGRAM";
    case -45: return "CL_INVALID_PROGRAM_EXECUTABLE";
    case -46: return "CL_INVALID_KERNEL_NAME";
    case -48: return "CL_INVALID_KERNEL";
    case -49: return "CL_INVALID_ARG_INDEX";
    case -50: return "CL_INVALID_ARG_VALUE";
    case -51: return "CL_INVALID_ARG_SIZE";
    case -52: return "CL_INVALID_KERNEL_ARGS";
    case -54: return "CL_INVALID_WORK_GROUP_SIZE";
    case -55: return "CL_INVALID_WORK_ITEM_SIZE";
    case -59: return "CL_INVALID_OPERATION";
    case -61: return "CL_INVALID_BUFFER_SIZE";
    case -63: return "CL_INVALID_GLOBAL_WORK_SIZE";
    case -1001: return "CL_PLATFORM_NOT_FOUND_KHR";
    default: return "OpenCL error";
  }
}

std::string describe(cl_int code) { return std::string(error_name(code)) + " (" + std::to_string(code) + ")"; }

#define CL_CHECK(expression, ...)                                                    \
  do {                                                                               \
    const cl_int code_ = (expression);                                               \
    TORCH_CHECK(code_ == CL_SUCCESS, "OpenCL: ", __VA_ARGS__, ": ", describe(code_)); \
  } while (false)

bool is_out_of_memory(cl_int code) {
  return code == CL_MEM_OBJECT_ALLOCATION_FAILURE || code == CL_OUT_OF_RESOURCES || code == CL_OUT_OF_HOST_MEMORY ||
         code == CL_INVALID_BUFFER_SIZE;
}

// The functions of the library, loaded once and never unloaded: drivers keep threads. Null, with `why`, where it fails.
const Api* load_api(const std::string& requested, std::string& why) {
  static std::mutex mutex;
  static std::map<std::string, Api> loaded;
  std::lock_guard<std::mutex> lock(mutex);
  if (auto found = loaded.find(requested); found != loaded.end()) return &found->second;

  std::vector<std::string> names = {requested};
  if (requested.empty()) {
#if defined(_WIN32)
    names = {"OpenCL.dll"};
#elif defined(__APPLE__)
    names = {"/System/Library/Frameworks/OpenCL.framework/OpenCL"};
#else
    names = {"libOpenCL.so.1", "libOpenCL.so"};
#endif
  }
  void* library = nullptr;
  for (const std::string& name : names) {
    if ((library = open_library(name))) break;
  }
  if (!library) {
    why = "no OpenCL library (" + names[0] +
          ") could be loaded. Install an OpenCL loader (Debian and Ubuntu: ocl-icd-libopencl1) and the driver of your "
          "device (for CPUs: pocl-opencl-icd)";
    return nullptr;
  }
  Api api;
#define SPIRAL_CL_LOAD(result, name, parameters)                                      \
  api.name = reinterpret_cast<decltype(api.name)>(find_symbol(library, #name));       \
  if (!api.name) {                                                                    \
    why = "the OpenCL library lacks " #name ": OpenCL 1.2 or later is needed";        \
    return nullptr;                                                                   \
  }
  SPIRAL_CL_FUNCTIONS(SPIRAL_CL_LOAD)
#undef SPIRAL_CL_LOAD
  return &loaded.emplace(requested, api).first->second;
}

std::string device_string(const Api& api, cl_device_id device, cl_uint what) {
  size_t size = 0;
  if (api.clGetDeviceInfo(device, what, 0, nullptr, &size) != CL_SUCCESS || size == 0) return "";
  std::string text(size, '\0');
  if (api.clGetDeviceInfo(device, what, size, text.data(), nullptr) != CL_SUCCESS) return "";
  text.resize(std::strlen(text.c_str()));
  // Drivers pad names with blanks.
  const size_t first = text.find_first_not_of(' ');
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(' ') - first + 1);
}

template <typename T>
T device_value(const Api& api, cl_device_id device, cl_uint what) {
  T value{};
  api.clGetDeviceInfo(device, what, sizeof(value), &value, nullptr);
  return value;
}

int64_t saturate(cl_ulong value) { return int64_t(std::min<cl_ulong>(value, cl_ulong(kNoLimit))); }

struct Found {
  const Api* api;
  cl_platform_id platform;
  cl_device_id device;
  cl_device_id inline_device;  // null, or the same processor and memory, with commands run by the thread that enqueues them
  std::string platform_version;
  std::string build_options;
  bool migrate;  // whether buffers must be touched to find out that they don't fit
};

DeviceProperties query_properties(const Api& api, cl_device_id device) {
  DeviceProperties p;
  p.engine = "opencl";
  p.name = device_string(api, device, CL_DEVICE_NAME);
  p.vendor = device_string(api, device, CL_DEVICE_VENDOR);
  p.driver = device_string(api, device, CL_DRIVER_VERSION);
  p.api_version = device_string(api, device, CL_DEVICE_VERSION);
  p.language = Language::OpenCL;

  const auto type = device_value<cl_bitfield>(api, device, CL_DEVICE_TYPE);
  const bool unified = device_value<cl_bool>(api, device, CL_DEVICE_HOST_UNIFIED_MEMORY);
  const bool simulator = p.name.find("Oclgrind") != std::string::npos;  // says that it is of every type
  p.schedule_class = type & CL_DEVICE_TYPE_CPU ? ScheduleClass::Vector : ScheduleClass::Simt;
  p.type = simulator                   ? DeviceType::Software
           : type & CL_DEVICE_TYPE_CPU ? DeviceType::CPU
           : unified                   ? DeviceType::IntegratedGPU
                                       : DeviceType::DiscreteGPU;

  p.total_memory = saturate(device_value<cl_ulong>(api, device, CL_DEVICE_GLOBAL_MEM_SIZE));
  p.max_allocation = saturate(device_value<cl_ulong>(api, device, CL_DEVICE_MAX_MEM_ALLOC_SIZE));
  p.max_binding = p.max_allocation;
  // A buffer costs a pointer among the arguments and an 8-byte offset in the block: half for each, and 64-bit scalars
  // and the rest of the block come out of the buffers that a kernel doesn't have.
  const auto parameters = int64_t(device_value<size_t>(api, device, CL_DEVICE_MAX_PARAMETER_SIZE));
  p.max_params = parameters / 2;
  p.max_bindings = parameters / 2 / int64_t(sizeof(void*));
  p.compute_units = device_value<cl_uint>(api, device, CL_DEVICE_MAX_COMPUTE_UNITS);
  p.max_workgroup_size = int64_t(device_value<size_t>(api, device, CL_DEVICE_MAX_WORK_GROUP_SIZE));
  p.max_workgroup_memory = saturate(device_value<cl_ulong>(api, device, CL_DEVICE_LOCAL_MEM_SIZE));
  // OpenCL has none, but NVIDIA's driver silently runs nothing beyond this (CUDA's limit).
  p.max_workgroups = p.schedule_class == ScheduleClass::Vector ? kNoLimit : (int64_t(1) << 31) - 1;

  const std::string extensions = " " + device_string(api, device, CL_DEVICE_EXTENSIONS) + " ";
  const auto has = [&](const char* name) { return extensions.find(" " + std::string(name) + " ") != std::string::npos; };
  p.float16 = has("cl_khr_fp16");
  p.float64 = device_value<cl_bitfield>(api, device, CL_DEVICE_DOUBLE_FP_CONFIG) != 0;
  p.int64 = device_string(api, device, CL_DEVICE_PROFILE) == "FULL_PROFILE" || has("cles_khr_int64");
  p.int64_atomics = has("cl_khr_int64_base_atomics") && has("cl_khr_int64_extended_atomics");
  // Intel's extension is the one that adds subgroups to OpenCL C 1.2, which kernels are written in.
  if (has("cl_intel_subgroups") && has("cl_intel_required_subgroup_size")) {
    size_t sizes[16] = {}, bytes = 0;
    if (api.clGetDeviceInfo(device, CL_DEVICE_SUB_GROUP_SIZES_INTEL, sizeof(sizes), sizes, &bytes) == CL_SUCCESS && bytes) {
      const size_t count = bytes / sizeof(size_t);
      p.subgroup_min = int64_t(*std::min_element(sizes, sizes + count));
      p.subgroup_max = int64_t(*std::max_element(sizes, sizes + count));
    }
  }
  p.timestamps = device_value<cl_bitfield>(api, device, CL_DEVICE_QUEUE_PROPERTIES) & CL_QUEUE_PROFILING_ENABLE;
  return p;
}

struct CLMemory final : Memory {
  cl_mem handle;
  uint64_t id;  // never used again, unlike handles
};

struct Compiled {
  cl_kernel handle = nullptr;
  std::vector<uint64_t> bound;  // ids of the memories that the arguments hold now
  std::string params;           // the parameter block that they hold
};

struct CLKernel final : Kernel {
  Compiled queued, inlined;  // the second from its first launch of one workgroup on
  bool inlinable = true;     // until the inline device refuses it
  std::string entry;
  uint32_t bindings, params_size;
  size_t workgroup[3];
};

KernelSource fill_source() {
  KernelSource source;
  source.name = "fill_bytes";
  source.entry = "fill_bytes";
  source.bindings = 1;
  source.params_size = 24;
  source.workgroup[0] = kFillWorkgroup;
  source.source = R"(
typedef struct { ulong offset, size; uint word, padding; } Params;
__kernel __attribute__((reqd_work_group_size(256, 1, 1))) void fill_bytes(__global uchar* memory, const Params p) {
  // Vectors of 16 bytes, and the bytes before the first and after the last.
  const ulong head = min(p.size, (16 - p.offset % 16) % 16);
  const ulong vectors = (p.size - head) / 16, tail = (p.size - head) % 16, i = get_global_id(0);
  __global uchar* at = memory + p.offset;
  if (i < head) at[i] = (uchar)p.word;
  at += head;
  for (ulong j = i; j < vectors; j += get_global_size(0)) ((__global uint4*)at)[j] = (uint4)(p.word);
  if (i < tail) at[vectors * 16 + i] = (uchar)p.word;
})";
  return source;
}

struct CLEvent final : EventHandle {
  const Api& api;
  cl_event handle;
  uint64_t flushes;  // how often the queue had been flushed before
  bool timed;
  CLEvent(const Api& api, cl_event handle, uint64_t flushes, bool timed)
      : api(api), handle(handle), flushes(flushes), timed(timed) {}
  ~CLEvent() override {
    if (!is_forked()) api.clReleaseEvent(handle);
  }
};

class OpenCLEngine final : public Engine {
 public:
  OpenCLEngine(Found found, DeviceProperties properties)
      : found_(std::move(found)), api_(*found_.api), properties_(std::move(properties)) {
    const intptr_t context_properties[] = {CL_CONTEXT_PLATFORM, reinterpret_cast<intptr_t>(found_.platform), 0};
    cl_int code = CL_SUCCESS;
    const cl_device_id devices[] = {found_.device, found_.inline_device};
    context_ = api_.clCreateContext(context_properties, found_.inline_device ? 2 : 1, devices, nullptr, nullptr, &code);
    CL_CHECK(code, "opening ", properties_.name);
    queue_ = api_.clCreateCommandQueue(context_, found_.device, properties_.timestamps ? CL_QUEUE_PROFILING_ENABLE : 0, &code);
    if (code == CL_SUCCESS && found_.inline_device) {
      inline_queue_ = api_.clCreateCommandQueue(context_, found_.inline_device, 0, &code);
      if (code != CL_SUCCESS) api_.clReleaseCommandQueue(queue_);
    }
    if (code != CL_SUCCESS) api_.clReleaseContext(context_);
    CL_CHECK(code, "creating a queue on ", properties_.name);
    objects_ = 2;
  }

  ~OpenCLEngine() override {
    if (is_forked()) return;  // the driver's threads are not in this process
    api_.clFinish(queue_);
    for (Segment& segment : staging_) {
      if (segment.busy_until) api_.clReleaseEvent(segment.busy_until);
    }
    if (staging_memory_) {
      api_.clEnqueueUnmapMemObject(queue_, staging_memory_, staging_data_, 0, nullptr, nullptr);
      api_.clFinish(queue_);
      api_.clReleaseMemObject(staging_memory_);
    }
    for (auto& kernel : kernels_) {
      api_.clReleaseKernel(kernel->queued.handle);
      if (kernel->inlined.handle) api_.clReleaseKernel(kernel->inlined.handle);
    }
    if (inline_queue_) api_.clReleaseCommandQueue(inline_queue_);
    api_.clReleaseCommandQueue(queue_);
    api_.clReleaseContext(context_);
  }

  const DeviceProperties& properties() const override { return properties_; }

  Memory* allocate(uint64_t size) override {
    check_not_forked();
    TORCH_CHECK(size > 0, "OpenCL: an allocation has at least one byte");
    // PoCL and others promise more than the machine has: the limit that they state is held to here.
    TORCH_CHECK_WITH(OutOfMemoryError, size <= uint64_t(properties_.max_allocation), "OpenCL: ", size,
                     " bytes are more than one allocation on ", properties_.name, " may have (", properties_.max_allocation,
                     ")");
    cl_int code = CL_SUCCESS;
    cl_mem handle = api_.clCreateBuffer(context_, CL_MEM_READ_WRITE, size, nullptr, &code);
    if (code == CL_SUCCESS && found_.migrate) {
      // GPU drivers allocate on first use, and a launch that fails then can't be retried.
      code = api_.clEnqueueMigrateMemObjects(queue_, 1, &handle, CL_MIGRATE_MEM_OBJECT_CONTENT_UNDEFINED, 0, nullptr, nullptr);
      if (code != CL_SUCCESS) api_.clReleaseMemObject(handle);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, !is_out_of_memory(code), "OpenCL: ", properties_.name, " has no ", size,
                     " bytes left: ", describe(code));
    CL_CHECK(code, "allocating ", size, " bytes");
    objects_++;
    auto* memory = new CLMemory;
    memory->size = size;
    memory->handle = handle;
    memory->id = ++last_id_;
    return memory;
  }

  void free(Memory* memory) override {
    // OpenCL itself keeps the buffer until the commands that use it have finished.
    if (memory && !is_forked()) api_.clReleaseMemObject(static_cast<CLMemory*>(memory)->handle);
    delete memory;
  }

  void write(Memory* memory, uint64_t offset, const void* data, uint64_t size) override {
    check_range(memory, offset, size, "write");
    if (size == 0) return;
    if (size > kStagingSegment || runs_inline(size)) {
      const cl_command_queue queue = idle() ? inline_queue_ : queue_;
      CL_CHECK(api_.clEnqueueWriteBuffer(queue, handle(memory), true, offset, size, data, 0, nullptr, nullptr), "writing ",
               size, " bytes");
      return;
    }
    uint8_t* staged = stage(size);
    std::memcpy(staged, data, size);
    CL_CHECK(api_.clEnqueueWriteBuffer(queue_, handle(memory), false, offset, size, staged, 0, nullptr, nullptr), "writing ",
             size, " bytes");
    count_command();
  }

  void read(Memory* memory, uint64_t offset, void* data, uint64_t size) override {
    check_range(memory, offset, size, "read");
    if (size == 0) return synchronize();
    if (inline_queue_ && !idle()) {  // the thread that waits copies as well as another would
      keep(api_.clFinish(queue_), "queued work");
      finished();
    }
    const cl_command_queue queue = inline_queue_ ? inline_queue_ : queue_;
    const cl_int code = api_.clEnqueueReadBuffer(queue, handle(memory), true, offset, size, data, 0, nullptr, nullptr);
    finished();
    throw_kept();
    CL_CHECK(code, "reading ", size, " bytes");
  }

  void read_async(Memory* memory, uint64_t offset, void* data, uint64_t size) override {
    check_range(memory, offset, size, "read");
    if (size == 0) return;
    CL_CHECK(api_.clEnqueueReadBuffer(queue_, handle(memory), false, offset, size, data, 0, nullptr, nullptr), "reading ", size,
             " bytes");
    count_command();
  }

  void copy(Memory* src, uint64_t src_offset, Memory* dst, uint64_t dst_offset, uint64_t size) override {
    check_range(src, src_offset, size, "copy");
    check_range(dst, dst_offset, size, "copy");
    if (size == 0) return;
    TORCH_CHECK(src != dst || src_offset + size <= dst_offset || dst_offset + size <= src_offset,
                "OpenCL: the source and the destination of a copy overlap");
    const bool now = runs_inline(size);
    keep(api_.clEnqueueCopyBuffer(now ? inline_queue_ : queue_, handle(src), handle(dst), src_offset, dst_offset, size, 0,
                                  nullptr, nullptr),
         "a copy");
    enqueued(now);
  }

  void fill(Memory* memory, uint64_t offset, uint64_t size, uint8_t value) override {
    check_range(memory, offset, size, "fill");
    if (size == 0) return;
    if (properties_.schedule_class == ScheduleClass::Vector && !checked_) {
      // A pattern of one byte has no alignment, and PoCL makes it a memset: three times as fast as a wide pattern.
      const bool now = runs_inline(size);
      keep(api_.clEnqueueFillBuffer(now ? inline_queue_ : queue_, handle(memory), &value, 1, offset, size, 0, nullptr, nullptr),
           "a fill");
      enqueued(now);
      return;
    }
    // On a GPU NVIDIA's clEnqueueFillBuffer ignores 4 GiB, faults at large offsets and is slow.
    if (!fill_kernel_) fill_kernel_ = compile(fill_source());
    const struct {
      uint64_t offset, size;
      uint32_t word, padding;
    } params = {offset, size, value * 0x01010101u, 0};
    const Binding binding = {memory, 0, memory->size};
    const uint64_t wanted = std::max<uint64_t>(1, size / (16 * kFillWorkgroup));
    const uint32_t groups[3] = {uint32_t(std::min<uint64_t>(wanted, 16 * uint64_t(properties_.compute_units))), 1, 1};
    enqueue(fill_kernel_, &binding, 1, &params, groups);
  }

  Kernel* compile(const KernelSource& source) override {
    check_not_forked();
    TORCH_CHECK(source.params_size <= uint64_t(properties_.max_params), "OpenCL: the parameter block of ", source.name, " has ",
                source.params_size, " bytes; ", properties_.name, " takes ", properties_.max_params);
    TORCH_CHECK(source.bindings <= uint64_t(properties_.max_bindings), "OpenCL: ", source.name, " takes ", source.bindings,
                " buffers; ", properties_.name, " allows ", properties_.max_bindings);
    cl_program program = build(source, found_.device);
    cl_int code = CL_SUCCESS;
    cl_kernel handle = api_.clCreateKernel(program, source.entry.c_str(), &code);
    api_.clReleaseProgram(program);  // the kernel keeps it
    CL_CHECK(code, "kernel ", source.name, ": entry point ", source.entry);
    objects_++;

    auto kernel = std::make_unique<CLKernel>();
    kernel->name = source.name;
    kernel->entry = source.entry;
    kernel->queued = {handle, std::vector<uint64_t>(source.bindings, 0)};
    kernel->bindings = source.bindings;
    kernel->params_size = source.params_size;
    std::copy(source.workgroup, source.workgroup + 3, kernel->workgroup);
    CLKernel* result = kernel.get();
    kernels_.push_back(std::move(kernel));

    cl_uint arguments = 0;
    CL_CHECK(api_.clGetKernelInfo(handle, CL_KERNEL_NUM_ARGS, sizeof(arguments), &arguments, nullptr), "kernel ", source.name);
    TORCH_CHECK(arguments == source.bindings + (source.params_size > 0), "OpenCL: kernel ", source.name, " has ", arguments,
                " arguments, but is launched with ", source.bindings, " buffers and a block of ", source.params_size, " bytes");
    size_t largest = 0;
    CL_CHECK(api_.clGetKernelWorkGroupInfo(handle, found_.device, CL_KERNEL_WORK_GROUP_SIZE, sizeof(largest), &largest, nullptr),
             "kernel ", source.name);
    const size_t invocations = result->workgroup[0] * result->workgroup[1] * result->workgroup[2];
    TORCH_CHECK(invocations > 0 && invocations <= largest, "OpenCL: kernel ", source.name, " has workgroups of ", invocations,
                " invocations; compiled for ", properties_.name, " it can have ", largest);
    return result;
  }

  void enqueue(Kernel* base, const Binding* bindings, uint32_t count, const void* params, const uint32_t groups[3]) override {
    check_not_forked();
    auto* kernel = static_cast<CLKernel*>(base);
    TORCH_INTERNAL_ASSERT(count == kernel->bindings, kernel->name, " takes ", kernel->bindings, " buffers, not ", count);
    if (groups[0] == 0 || groups[1] == 0 || groups[2] == 0) return;
    const uint32_t most = std::max({groups[0], groups[1], groups[2]});
    TORCH_CHECK(most <= properties_.max_workgroups, "OpenCL: kernel ", kernel->name, ": ", most, " workgroups; ",
                properties_.name, " takes ", properties_.max_workgroups, " per dimension");
    const bool now = idle() && groups[0] == 1 && groups[1] == 1 && groups[2] == 1 && compile_inline(kernel);
    Compiled& compiled = now ? kernel->inlined : kernel->queued;
    cl_int code = CL_SUCCESS;
    for (uint32_t i = 0; i < count && code == CL_SUCCESS; i++) {
      auto* memory = static_cast<CLMemory*>(bindings[i].memory);
      if (compiled.bound[i] == memory->id) continue;
      code = api_.clSetKernelArg(compiled.handle, i, sizeof(cl_mem), &memory->handle);
      compiled.bound[i] = code == CL_SUCCESS ? memory->id : 0;
    }
    const std::string_view block(static_cast<const char*>(params), kernel->params_size);
    if (code == CL_SUCCESS && compiled.params != block) {  // a call on the same memory finds its own: PoCL copies it in 900 instructions
      code = api_.clSetKernelArg(compiled.handle, count, block.size(), block.data());
      compiled.params = code == CL_SUCCESS ? block : std::string_view();
    }
    if (code == CL_SUCCESS) {
      const size_t global[3] = {groups[0] * kernel->workgroup[0], groups[1] * kernel->workgroup[1],
                                groups[2] * kernel->workgroup[2]};
      const cl_uint dimensions = global[2] > 1 ? 3 : global[1] > 1 ? 2 : 1;
      code = api_.clEnqueueNDRangeKernel(now ? inline_queue_ : queue_, compiled.handle, dimensions, nullptr, global,
                                         kernel->workgroup, 0, nullptr, nullptr);
    }
    if (code != CL_SUCCESS) keep(code, kernel->name.c_str());
    enqueued(now);
  }

  void flush() override {
    check_not_forked();
    if (commands_ == 0) return;
    keep(api_.clFlush(queue_), "a flush");
    flushed();
  }

  void synchronize() override {
    check_not_forked();
    keep(api_.clFinish(queue_), "waiting");
    finished();
    throw_kept();
  }

  std::unique_ptr<EventHandle> record(bool timed) override {
    check_not_forked();
    TORCH_CHECK(!timed || properties_.timestamps, "OpenCL: ", properties_.name, " has no timestamps");
    cl_event handle = marker();
    commands_++;
    if (timed) queued_++;  // what is timed after it must not run before the marker does
    return std::make_unique<CLEvent>(api_, handle, flushes_, timed);
  }

  bool query(EventHandle& base) override {
    check_not_forked();
    auto& event = static_cast<CLEvent&>(base);
    if (event.flushes == flushes_) flush();  // else it might never complete
    cl_int status = CL_COMPLETE;
    CL_CHECK(api_.clGetEventInfo(event.handle, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof(status), &status, nullptr),
             "querying an event");
    if (status < 0) keep(status, "queued work");
    return status <= CL_COMPLETE;
  }

  void wait(EventHandle& base) override {
    check_not_forked();
    auto& event = static_cast<CLEvent&>(base);
    if (event.flushes == flushes_) flush();
    keep(api_.clWaitForEvents(1, &event.handle), "queued work");
  }

  double elapsed_ms(EventHandle& start, EventHandle& end) override {
    TORCH_CHECK(static_cast<CLEvent&>(start).timed && static_cast<CLEvent&>(end).timed,
                "elapsed_ms needs two events that were recorded with timing");
    TORCH_CHECK(query(start) && query(end), "elapsed_ms needs two events that have completed");
    return double(int64_t(end_time(end) - end_time(start))) * 1e-6;
  }

  uint64_t objects_created() const override { return objects_; }

 private:
  struct Segment {
    cl_event busy_until = nullptr;
  };

  // Whether nothing is queued. A command that the calling thread runs then keeps the order of commands.
  bool idle() const { return inline_queue_ && queued_ == 0; }

  bool runs_inline(uint64_t bytes) const { return idle() && bytes <= kInlineBytes; }

  static cl_mem handle(Memory* memory) { return static_cast<CLMemory*>(memory)->handle; }

  // Before every command on memory.
  void check_range(Memory* memory, uint64_t offset, uint64_t size, const char* what) {
    check_not_forked();
    TORCH_CHECK(offset <= memory->size && size <= memory->size - offset, "OpenCL: a ", what, " of ", size, " bytes at ", offset,
                " exceeds an allocation of ", memory->size);
  }

  void enqueued(bool inlined) {
    if (inlined) {
      keep(api_.clFinish(inline_queue_), "a command");  // it has run already, if the driver is what it was
    } else {
      count_command();
    }
  }

  void count_command() {
    if (++queued_ >= kMaxQueued) {
      keep(api_.clFinish(queue_), "queued work");
      finished();
    } else if (++commands_ >= kFlushAfter) {
      flush();
    }
  }

  void flushed() {
    commands_ = 0;
    flushes_++;
  }

  void finished() {
    flushed();
    queued_ = 0;
  }

  // An error of queued work: the first one since the last synchronize() is what it throws.
  void keep(cl_int code, const char* what) {
    if (code != CL_SUCCESS && kept_.empty()) kept_ = std::string("OpenCL: ") + what + " failed: " + describe(code);
  }

  void throw_kept() {
    if (kept_.empty()) return;
    const std::string text = std::exchange(kept_, {});
    TORCH_CHECK(false, text);
  }

  cl_event marker() {
    cl_event event = nullptr;
    CL_CHECK(api_.clEnqueueMarkerWithWaitList(queue_, 0, nullptr, &event), "recording an event");
    objects_++;
    return event;
  }

  cl_ulong end_time(EventHandle& event) {
    cl_ulong time = 0;
    CL_CHECK(api_.clGetEventProfilingInfo(static_cast<CLEvent&>(event).handle, CL_PROFILING_COMMAND_END, sizeof(time), &time,
                                          nullptr),
             "reading a timestamp");
    return time;
  }

  // Host memory for a write, free again when the queue has passed the commands that are queued until its segment is full.
  uint8_t* stage(uint64_t size) {
    if (!staging_memory_) {
      cl_int code = CL_SUCCESS;
      const uint64_t total = kStagingSegment * kStagingSegments;
      staging_memory_ = api_.clCreateBuffer(context_, CL_MEM_READ_WRITE | CL_MEM_ALLOC_HOST_PTR, total, nullptr, &code);
      CL_CHECK(code, "allocating staging memory");
      void* data = api_.clEnqueueMapBuffer(queue_, staging_memory_, true, CL_MAP_WRITE, 0, total, 0, nullptr, nullptr, &code);
      if (code != CL_SUCCESS) api_.clReleaseMemObject(std::exchange(staging_memory_, nullptr));
      CL_CHECK(code, "mapping staging memory");
      staging_data_ = static_cast<uint8_t*>(data);
      objects_++;
    }
    if (staging_used_ + size > kStagingSegment) {
      staging_[staging_current_].busy_until = marker();
      staging_current_ = (staging_current_ + 1) % kStagingSegments;
      staging_used_ = 0;
      if (cl_event event = std::exchange(staging_[staging_current_].busy_until, nullptr)) {
        flush();
        keep(api_.clWaitForEvents(1, &event), "queued work");
        api_.clReleaseEvent(event);
      }
    }
    uint8_t* place = staging_data_ + staging_current_ * kStagingSegment + staging_used_;
    staging_used_ += (size + 63) / 64 * 64;
    return place;
  }

  // PoCL wakes its threads for each command, which takes as long as a kernel on 50,000 elements, and a kernel of one workgroup
  // has no use for them. Its second driver runs the same machine code on the thread that enqueues, but refuses the other's
  // binaries by the id behind their magic number: it is given them under its own, so that nothing is compiled twice.
  bool compile_inline(CLKernel* kernel) {
    if (kernel->inlined.handle || !kernel->inlinable) return kernel->inlinable;
    constexpr size_t kId = 8, kIdSize = 8;
    kernel->inlinable = false;
    if (inline_id_.empty()) {
      KernelSource probe;
      probe.name = probe.entry = "nothing";
      probe.source = "__kernel void nothing(__global uint* memory) {}";
      cl_program program = build(probe, found_.inline_device);
      inline_id_ = binary_of(program).substr(kId, kIdSize);
      api_.clReleaseProgram(program);
    }
    cl_program queued = nullptr;
    CL_CHECK(api_.clGetKernelInfo(kernel->queued.handle, CL_KERNEL_PROGRAM, sizeof(queued), &queued, nullptr), "kernel ",
             kernel->name);
    std::string binary = binary_of(queued);
    if (inline_id_.size() != kIdSize || binary.compare(0, kId, std::string("poclbin\0", kId)) != 0) return false;
    binary.replace(kId, kIdSize, inline_id_);
    cl_program program = load(binary, found_.inline_device);
    if (!program) return false;
    cl_int code = CL_SUCCESS;
    kernel->inlined = {api_.clCreateKernel(program, kernel->entry.c_str(), &code), std::vector<uint64_t>(kernel->bindings, 0)};
    api_.clReleaseProgram(program);  // the kernel keeps it
    if (code != CL_SUCCESS) return false;
    objects_ += 2;
    return kernel->inlinable = true;
  }

  cl_program load(const std::string& binary, cl_device_id device) {
    cl_int code = CL_SUCCESS;
    const size_t size = binary.size();
    const auto* data = reinterpret_cast<const unsigned char*>(binary.data());
    cl_program program = api_.clCreateProgramWithBinary(context_, 1, &device, &size, &data, nullptr, &code);
    if (code != CL_SUCCESS) return nullptr;
    if (api_.clBuildProgram(program, 1, &device, found_.build_options.c_str(), nullptr, nullptr) == CL_SUCCESS) return program;
    api_.clReleaseProgram(program);
    return nullptr;
  }

  cl_program build(const KernelSource& source, cl_device_id device) {
    const DeviceProperties& p = properties_;
    const Digest key = cache_key({"opencl", found_.platform_version, device_string(api_, device, CL_DEVICE_NAME), p.vendor,
                                  p.driver, p.api_version, found_.build_options, source.source});
    if (const auto binary = cache_load(key)) {
      if (cl_program program = load(*binary, device)) {
        objects_++;
        return program;
      }
      // The driver doesn't take its own binary (it was updated under the same version, say): build from source.
    }

    const char* text = source.source.c_str();
    const size_t length = source.source.size();
    cl_int code = CL_SUCCESS;
    cl_program program = api_.clCreateProgramWithSource(context_, 1, &text, &length, &code);
    CL_CHECK(code, "kernel ", source.name);
    objects_++;
    code = api_.clBuildProgram(program, 1, &device, found_.build_options.c_str(), nullptr, nullptr);
    if (code != CL_SUCCESS) {
      const std::string log = build_log(program, device);
      api_.clReleaseProgram(program);
      const std::string path = save_failed_kernel(source.name, p.name + ", " + p.driver, source.source, log);
      TORCH_CHECK(false, "OpenCL: kernel ", source.name, " does not compile for ", p.name, ": ", describe(code), "\n",
                  first_lines(log, 10), path.empty() ? "" : "\nSource and build log: ", path);
    }
    if (const std::string binary = binary_of(program); !binary.empty()) cache_store(key, binary);
    return program;
  }

  // Empty where the driver gives none. The program was built for one device, though the context may have two.
  std::string binary_of(cl_program program) {
    size_t sizes[2] = {}, bytes = 0;
    if (api_.clGetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof(sizes), sizes, &bytes) != CL_SUCCESS) return {};
    std::string binary(sizes[0] + sizes[1], '\0');
    char* data[2] = {sizes[0] ? binary.data() : nullptr, sizes[1] ? binary.data() + sizes[0] : nullptr};
    if (api_.clGetProgramInfo(program, CL_PROGRAM_BINARIES, bytes, data, nullptr) != CL_SUCCESS) return {};
    return binary;
  }

  std::string build_log(cl_program program, cl_device_id device) {
    size_t size = 0;
    api_.clGetProgramBuildInfo(program, device, CL_PROGRAM_BUILD_LOG, 0, nullptr, &size);
    std::string log(size, '\0');
    if (size) api_.clGetProgramBuildInfo(program, device, CL_PROGRAM_BUILD_LOG, size, log.data(), nullptr);
    log.resize(std::strlen(log.c_str()));
    return log;
  }

  static std::string first_lines(const std::string& text, int count) {
    size_t end = 0;
    while (count-- > 0 && end != std::string::npos) end = text.find('\n', end + 1);
    return end == std::string::npos ? text : text.substr(0, end) + "\n...";
  }

  Found found_;
  const Api& api_;
  DeviceProperties properties_;
  cl_context context_ = nullptr;
  cl_command_queue queue_ = nullptr, inline_queue_ = nullptr;
  std::string inline_id_;
  std::vector<std::unique_ptr<CLKernel>> kernels_;
  Kernel* fill_kernel_ = nullptr;
  const bool checked_ = std::getenv("SPIRAL_MEMORY_EXACT") != nullptr;  // a memory checker takes no note of clEnqueueFillBuffer
  std::string kept_;
  uint64_t last_id_ = 0, objects_ = 0, flushes_ = 0;
  uint32_t commands_ = 0;  // since the last flush
  uint32_t queued_ = 0;    // since the last wait for all of them

  cl_mem staging_memory_ = nullptr;
  uint8_t* staging_data_ = nullptr;
  Segment staging_[kStagingSegments];
  int staging_current_ = 0;
  uint64_t staging_used_ = 0;
};

struct OpenCLAdapter final : Adapter {
  Found found;
  std::unique_ptr<Engine> open() override {
    check_not_forked();
    return std::make_unique<OpenCLEngine>(found, properties);
  }
};

std::string platform_string(const Api& api, cl_platform_id platform, cl_uint what) {
  size_t size = 0;
  if (api.clGetPlatformInfo(platform, what, 0, nullptr, &size) != CL_SUCCESS || size == 0) return "";
  std::string text(size, '\0');
  api.clGetPlatformInfo(platform, what, size, text.data(), nullptr);
  text.resize(std::strlen(text.c_str()));
  return text;
}

#ifndef _WIN32
// Whether this PoCL has its two CPU drivers and no other, which a list of drivers would hide. They are files beside its library.
bool has_cpu_drivers_only(cl_platform_id platform) {
  Dl_info library{};
  if (!dladdr(platform, &library) || !library.dli_fname) return false;
  int wanted = 0, others = 0;
  const auto folder = std::filesystem::path(library.dli_fname).parent_path() / "pocl";
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(folder, missing)) {
    const std::string name = entry.path().stem().string();
    if (name.rfind("libpocl-devices-", 0) != 0) continue;
    (name == "libpocl-devices-basic" || name == "libpocl-devices-pthread" ? wanted : others)++;
  }
  return wanted == 2 && others == 0;
}

// Precedes the platform's first answer about devices, which is when it reads the environment. What the user has set stays.
void configure_pocl(cl_platform_id platform, const std::string& version) {
  // A binary holds a kernel for any workgroup size. PoCL would compile it once more for the size of each launch, which ours fix
  // in the source already: a third of the time of a first launch, and again where a binary of our cache is loaded.
  setenv("POCL_WORK_GROUP_SPECIALIZATION", "0", /*overwrite=*/0);
  // The CPU twice: with threads, and for `compile_inline`. The drivers have other names since 4 or so; an unknown one is an error.
  const int major = std::atoi(version.c_str() + version.find("PoCL ") + 5);
  if (major != 4 && has_cpu_drivers_only(platform)) {
    setenv("POCL_DEVICES", major < 4 ? "pthread basic" : "cpu cpu-minimal", /*overwrite=*/0);
  }
#ifdef __linux__
  // PoCL's threads, woken together by one that is running, often end up on one processor, and a kernel of a few milliseconds is
  // over before the scheduler moves them. Thread i then stays on processor i: only where the process may use all of them.
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0 && CPU_COUNT(&allowed) == sysconf(_SC_NPROCESSORS_CONF)) {
    setenv("POCL_AFFINITY", "1", /*overwrite=*/0);
  }
#endif
}
#endif

// PoCL's driver that runs commands on the calling thread, beside the one with threads: null where there is none.
cl_device_id find_inline(const Api& api, const std::vector<cl_device_id>& devices) {
  cl_device_id minimal = nullptr;
  bool threads = false;
  for (cl_device_id device : devices) {
    const std::string name = device_string(api, device, CL_DEVICE_NAME);
    const auto starts = [&](const char* text) { return name.rfind(text, 0) == 0; };
    if (starts("basic-") || starts("cpu-minimal-")) {
      minimal = device;
    } else if (starts("pthread-") || starts("cpu-")) {
      threads = true;
    }
  }
  return threads ? minimal : nullptr;
}

}  // namespace

std::vector<std::unique_ptr<Adapter>> opencl_adapters(const std::string& library, std::string& why) {
  check_not_forked();
  std::vector<std::unique_ptr<Adapter>> adapters;
  const Api* api = load_api(library, why);
  if (!api) return adapters;
  watch_fork();  // drivers start their threads when they are first asked for devices

  cl_uint count = 0;
  const cl_int code = api->clGetPlatformIDs(0, nullptr, &count);
  if ((code != CL_SUCCESS && code != CL_PLATFORM_NOT_FOUND_KHR) || count == 0) {
    why = "the OpenCL library finds no driver. Install the one of your device (for CPUs, Debian and Ubuntu: pocl-opencl-icd)";
    if (code != CL_SUCCESS && code != CL_PLATFORM_NOT_FOUND_KHR) why += " [" + describe(code) + "]";
    return adapters;
  }
  std::vector<cl_platform_id> platforms(count);
  api->clGetPlatformIDs(count, platforms.data(), nullptr);
  for (cl_platform_id platform : platforms) {
    const std::string platform_version = platform_string(*api, platform, CL_PLATFORM_VERSION);
    const bool pocl = platform_version.find("PoCL ") != std::string::npos;
#ifndef _WIN32
    if (pocl) configure_pocl(platform, platform_version);
#endif
    cl_uint device_count = 0;
    if (api->clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 0, nullptr, &device_count) != CL_SUCCESS) continue;
    std::vector<cl_device_id> devices(device_count);
    if (api->clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, device_count, devices.data(), nullptr) != CL_SUCCESS) continue;
    const cl_device_id inline_device = pocl ? find_inline(*api, devices) : nullptr;
    for (cl_device_id device : devices) {
      if (device == inline_device) continue;
      const std::string version = device_string(*api, device, CL_DEVICE_VERSION);  // "OpenCL 1.2 …"
      const char* missing = nullptr;
      if (!device_value<cl_bool>(*api, device, CL_DEVICE_AVAILABLE)) missing = "is not available";
      if (!device_value<cl_bool>(*api, device, CL_DEVICE_COMPILER_AVAILABLE)) missing = "has no compiler";
      if (!device_value<cl_bool>(*api, device, CL_DEVICE_ENDIAN_LITTLE)) missing = "is big-endian";
      if (version.compare(0, 10, "OpenCL 1.0") == 0 || version.compare(0, 10, "OpenCL 1.1") == 0) missing = "lacks OpenCL 1.2";
      if (missing) {
        why += (why.empty() ? "" : "; ") + device_string(*api, device, CL_DEVICE_NAME) + " " + missing;
        continue;
      }
      auto adapter = std::make_unique<OpenCLAdapter>();
      adapter->properties = query_properties(*api, device);
      // Of the options that trade accuracy for speed only the contraction of a*b+c: NaN, infinities and signed zeros stay.
      std::string options = "-cl-std=CL1.2 -cl-mad-enable -w";  // -w: some compilers print warnings on the terminal
      if (device_value<cl_bitfield>(*api, device, CL_DEVICE_SINGLE_FP_CONFIG) & CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT) {
        // The default, 2.5 ulp, makes floor(6 / 3) 1 on some devices.
        options += " -cl-fp32-correctly-rounded-divide-sqrt";
      }
      const bool cpu = adapter->properties.schedule_class == ScheduleClass::Vector;
      adapter->found = {api, platform, device, cpu ? inline_device : nullptr, platform_version, options, !cpu};
      adapters.push_back(std::move(adapter));
    }
  }
  if (adapters.empty() && why.empty()) why = "the OpenCL drivers offer no device";
  return adapters;
}

}  // namespace spiral
