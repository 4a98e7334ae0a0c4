// What ran on the devices and when: timed events around every launch, while someone listens.
#pragma once

#include <c10/core/Device.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../runtime/engine.h"

namespace spiral {

struct Device;

// One launch, fill or copy. Bytes are the sizes of the tensors that are bound: an upper bound where a kernel reads parts.
struct LaunchRecord {
  c10::DeviceIndex device = 0;
  std::string op, kernel, note;              // note: which schedule it has and why
  std::vector<std::vector<int64_t>> shapes;  // of the tensors, in the kernel's order
  std::vector<int8_t> dtypes;
  int64_t bytes = 0, flops = -1;             // -1: the lowering does not say
  uint32_t groups[3] = {1, 1, 1};
  uint64_t correlation = 0;                  // of the host's operator, from the profiler; 0: none
  uint64_t sequence = 0;                     // counts launches
  int64_t start_ns = 0, duration_ns = -1;    // on the host's clock, since 1970; -1: lost to a device error
};

namespace detail {
extern std::atomic<int> listeners;
}

inline bool tracing() { return detail::listeners.load(std::memory_order_relaxed) != 0; }

// Begins to listen; the token is for trace_end, which waits for the devices and gives what was launched in between.
uint64_t trace_begin();
std::vector<LaunchRecord> trace_end(uint64_t token);

// Around one launch, with Device::mutex held.
std::unique_ptr<EventHandle> trace_start(Device&);
void trace_stop(Device&, std::unique_ptr<EventHandle> start, LaunchRecord&&);

// The host's operators that are running in this thread, as the profiler numbers them.
void push_correlation(uint64_t id);
void pop_correlation();

// Whether torch.profiler shows what we record on a timeline of its own (csrc/aten/profiler.cpp).
bool native_profiler();

}  // namespace spiral
