// What torch_spiral asks of a compute API. OpenCL, wgpu and CUDA/HIP implement this in one file each, by dlopen.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace spiral {

enum class DeviceType { DiscreteGPU, IntegratedGPU, CPU, Software };

// The language that kernels are written in for a device.
enum class Language { OpenCL, WGSL, Triton };

// The schedule class of its kernels (docs/design.md, decision 3).
enum class ScheduleClass { Vector, Simt, Block };

// Units: bytes, counts, nanoseconds. A limit that the API does not have is INT64_MAX.
struct DeviceProperties {
  std::string engine;  // "opencl", "wgpu", "cuda", "hip"
  std::string name, vendor, driver, api_version;
  DeviceType type = DeviceType::Software;
  Language language = Language::OpenCL;
  ScheduleClass schedule_class = ScheduleClass::Simt;
  int64_t total_memory = 0;
  int64_t max_allocation = 0;         // one Memory
  int64_t max_binding = 0;            // what one kernel argument can see of a Memory
  int64_t max_params = 0;             // bytes of a parameter block that cost no upload
  int64_t compute_units = 1;
  int64_t max_workgroup_size = 1;     // invocations
  int64_t max_workgroup_memory = 0;
  int64_t max_workgroups = 0;         // per dimension
  int64_t max_bindings = 0;           // buffers a kernel may take
  int64_t subgroup_min = 0, subgroup_max = 0;  // 0: no subgroup operations
  bool float16 = false;               // arithmetic; storage always works
  bool float64 = false;
  bool int64 = false;                 // arithmetic; storage always works
  bool int64_atomics = false, float32_atomics = false;
  bool timestamps = false;
  int ordinal = 0;                    // the driver's number of the device
};

// Device memory. Opaque to everyone but its engine. Freed through Engine::free.
struct Memory {
  uint64_t size = 0;
  virtual ~Memory() = default;
};

// A compiled kernel; owned by its engine for the life of the process.
struct Kernel {
  std::string name;
  virtual ~Kernel() = default;
};

struct KernelSource {
  std::string name;      // is its key: op, dtypes, layout class, schedule
  std::string source;    // OpenCL C, WGSL, or a Triton binary
  std::string entry;     // the function in it
  uint32_t workgroup[3] = {1, 1, 1};
  uint32_t bindings = 0;       // buffers, in order: @binding(0..), or the first kernel arguments
  uint32_t params_size = 0;    // bytes of the parameter block; it follows the buffers
  bool params_immediate = true;  // WGSL: block is var<immediate>; else @binding(bindings) var<storage>
  bool trusted = false;        // WGSL: indices are proven in range, drop bounds checks
  uint32_t shared_memory = 0;  // CUDA/HIP: bytes of dynamic shared memory
  uint32_t scratch = 0;        // CUDA/HIP: bytes of global memory that a workgroup has to itself
  bool waits = false;          // CUDA: every workgroup waits for the kernels before (griddepcontrol.wait) ahead of its memory accesses
};

// A window of a Memory as a kernel sees it. offset is a multiple of 256.
struct Binding {
  Memory* memory;
  uint64_t offset;
  uint64_t size;
};

// A point in a device's queue.
struct EventHandle {
  virtual ~EventHandle() = default;
};

// The launches of one plan, as an engine keeps them from replay to replay.
struct Sequence {
  virtual ~Sequence() = default;
};

// One device. Calls are serialised by the caller (Device::mutex); none takes the GIL or calls back into Python.
// Work is asynchronous and in order. Errors: allocation and compile errors throw at once (c10::OutOfMemoryError, c10::Error);
// an error of queued work is kept and thrown once by the next synchronize() or read(), and the device stays usable.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual const DeviceProperties& properties() const = 0;

  virtual Memory* allocate(uint64_t size) = 0;  // size > 0; throws c10::OutOfMemoryError
  virtual uint64_t address(Memory*) const { return 0; }  // CUDA/HIP: the device pointer
  // CUDA/HIP: memory that someone else owns, and the driver's handle of the queue (flush() before giving it work). Null elsewhere.
  virtual Memory* adopt(uint64_t address, uint64_t size) { (void)address, (void)size; return nullptr; }
  virtual void* native_queue() const { return nullptr; }
  virtual void free(Memory*) = 0;               // after the work queued so far; never throws

  virtual void write(Memory*, uint64_t offset, const void* data, uint64_t size) = 0;  // data is consumed on return
  virtual void read(Memory*, uint64_t offset, void* data, uint64_t size) = 0;         // flushes and waits
  // Like read, but returns at once; data must live until the next synchronize() or completed event.
  virtual void read_async(Memory*, uint64_t offset, void* data, uint64_t size) = 0;
  virtual void copy(Memory* src, uint64_t src_offset, Memory* dst, uint64_t dst_offset, uint64_t size) = 0;
  virtual void fill(Memory*, uint64_t offset, uint64_t size, uint8_t value) = 0;

  // Throws c10::Error with the log and the path where source and log were saved.
  virtual Kernel* compile(const KernelSource&) = 0;
  virtual void enqueue(Kernel*, const Binding* bindings, uint32_t count, const void* params, const uint32_t groups[3]) = 0;

  // Launches between begin() and end() may reach the driver together, at the latest with end(), which does not throw. A sequence is
  // begun once a replay. Null from an engine that gains nothing by it for so many launches.
  virtual std::unique_ptr<Sequence> sequence(size_t launches) { return (void)launches, nullptr; }
  virtual void begin(Sequence&) {}
  virtual void end() noexcept {}

  virtual void flush() = 0;        // hand queued work to the device
  virtual void synchronize() = 0;  // flush, wait, throw a kept error

  virtual std::unique_ptr<EventHandle> record(bool timed) = 0;
  virtual bool query(EventHandle&) = 0;
  virtual void wait(EventHandle&) = 0;
  virtual double elapsed_ms(EventHandle& start, EventHandle& end) = 0;
  // Of many events from one on; events must have completed.
  virtual void elapsed_many_ms(EventHandle& start, EventHandle* const* ends, size_t count, double* out) {
    for (size_t i = 0; i < count; ++i) out[i] = elapsed_ms(start, *ends[i]);
  }

  // Objects created at the compute API so far (buffers, kernels, bind groups, events …): a steady state creates none.
  virtual uint64_t objects_created() const = 0;
};

// A device that was found but not opened.
struct Adapter {
  DeviceProperties properties;
  virtual ~Adapter() = default;
  virtual std::unique_ptr<Engine> open() = 0;
};

// Each finds its devices; where there are none, `why` says what is missing and what to install.
std::vector<std::unique_ptr<Adapter>> opencl_adapters(const std::string& library, std::string& why);
std::vector<std::unique_ptr<Adapter>> wgpu_adapters(const std::string& library, std::string& why);
std::vector<std::unique_ptr<Adapter>> cuda_adapters(std::string& why);

}  // namespace spiral
