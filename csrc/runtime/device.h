// The devices of this process: which adapters were found, the engine of each, and the errors that its kernels report.
#pragma once

#include "engine.h"

#include <c10/core/Device.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace spiral {

// One device, opened on first use and never closed.
//
// Lock order: Device::mutex, then the allocator's (which is a leaf: no engine is called under it). The GIL is never
// taken while `mutex` is held, and a thread that may wait for the device releases the GIL first.
struct Device {
  int index = 0;
  DeviceProperties properties;
  std::unique_ptr<Engine> engine;
  std::recursive_mutex mutex;  // serialises the calls to `engine`

  // What kernels with index checks write: two u32, the site (0: no error) and a detail. The first writer wins.
  Memory* error_buffer = nullptr;
  // Whoever enqueues a kernel that takes error_buffer sets this, so that other read-backs needn't fetch it.
  bool errors_possible = false;
  uint32_t error_words[2] = {0, 0};  // where it is read to
};

using DeviceLock = std::lock_guard<std::recursive_mutex>;

// How many devices there are. Looks for adapters on the first call; opens none; never throws.
int device_count() noexcept;

// Whether devices have been looked for.
bool devices_known() noexcept;

// Opens the device on first use. Throws c10::Error for an index that doesn't exist, for a device that doesn't open, and in a
// child forked after the first use of any device.
Device& device(c10::DeviceIndex index);

// Properties without opening.
const DeviceProperties& device_properties(c10::DeviceIndex index);

// The current device of this thread.
c10::DeviceIndex current_device() noexcept;
void set_current_device(c10::DeviceIndex index);                       // throws for an index that doesn't exist
c10::DeviceIndex exchange_device_unchecked(c10::DeviceIndex) noexcept;  // returns the previous one

bool device_is_open(c10::DeviceIndex index) noexcept;

// True in a child forked after this process had looked for devices: they are unusable there.
bool in_bad_fork() noexcept;

// An engine, the library it was loaded from, and why it offers no device (empty: it does, or is filtered out).
struct EngineReport {
  std::string engine, library, why;
  int devices = 0;
};
std::vector<EngineReport> engine_reports();

// Where an engine's library is ("opencl", "wgpu"); before the first look for devices.
void set_engine_library(const std::string& engine, const std::string& path);

// Offers no device of an engine, and says why: something in Python that it needs is missing. Before the first look for devices.
void refuse_engine(const std::string& engine, const std::string& why);

// What a thread calls as it comes to a device, and as it goes from one: a place to hold it while the interpreter ends. No lock of
// ours is held there.
void set_gate(void (*gate)());
void pass_gate();

// Waits for all queued work; throws what the engine kept, then what the kernels reported. The device stays usable.
void synchronize(Device&);
void synchronize_all();  // of the open devices

// Engine::read, with the error check of synchronize().
void read_back(Device&, Memory*, uint64_t offset, void* data, uint64_t size);

// Throws c10::IndexError if a kernel has reported an error; raised once. Waits only if errors_possible.
void check_errors(Device&);

// The number of a message for kernels to report; equal texts share one. "{}" in it becomes the detail, as a signed integer.
int error_site(const std::string& text);

}  // namespace spiral
