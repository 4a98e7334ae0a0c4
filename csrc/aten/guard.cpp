// The device guard: current device, streams and events of PrivateUse1.
//
// A device has one in-order queue. Streams are distinct objects that all feed it, so they are ordered trivially, and waiting
// for an event of the same device is done before it starts.
#include "runtime/device.h"

#include <chrono>
#include <thread>
#include <c10/core/DeviceCapability.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>

namespace spiral {
namespace {

struct Event {
  std::unique_ptr<EventHandle> handle;
  c10::DeviceIndex device;
  bool timed;
};

thread_local std::array<c10::StreamId, 128> streams{};  // the current one of each device
std::atomic<c10::StreamId> next_stream{1};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::PrivateUse1;

  static c10::Device of(c10::DeviceIndex index) { return {static_type, index}; }
  static c10::DeviceIndex index_of(c10::Device d) { return d.has_index() ? d.index() : current_device(); }
  static c10::Stream stream(c10::DeviceIndex index, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, of(index), id);
  }

  c10::DeviceType type() const override { return static_type; }
  c10::Device getDevice() const override { return of(current_device()); }
  void setDevice(c10::Device d) const override {
    if (d.has_index()) set_current_device(d.index());
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override { exchange_device_unchecked(d.index()); }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device previous = getDevice();
    if (d.has_index() && d.index() != previous.index()) set_current_device(d.index());
    return previous;
  }
  c10::DeviceCapability getDeviceCapability(c10::Device d) const override {
    c10::DeviceCapability capability;
    uint64_t bits = 0;
    for (const auto index : {c10::kIndex_Byte, c10::kIndex_Char, c10::kIndex_Short, c10::kIndex_Int, c10::kIndex_Long,
                             c10::kIndex_Half, c10::kIndex_BFloat16, c10::kIndex_Float, c10::kIndex_Bool,
                             c10::kIndex_ComplexFloat}) {
      bits |= uint64_t{1} << index;
    }
    if (device_properties(index_of(d)).float64) bits |= uint64_t{1} << c10::kIndex_Double;
    capability.capability_data.capability_bits = bits;
    return capability;
  }

  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }

  c10::Stream getStream(c10::Device d) const override {
    const auto index = index_of(d);
    return stream(index, streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(index_of(d), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    return stream(index_of(d), next_stream.fetch_add(1, std::memory_order_relaxed));
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const c10::Stream previous = stream(s.device_index(), streams[s.device_index()]);
    streams[s.device_index()] = s.id();
    return previous;
  }
  bool queryStream(const c10::Stream& s) const override {
    if (!device_is_open(s.device_index())) return true;
    Device& d = device(s.device_index());
    DeviceLock lock(d.mutex);
    auto here = d.engine->record(false);
    d.engine->flush();
    // Behind an idle queue the mark completes at once, but not before the device has seen it.
    for (int tries = 0; tries < 50; ++tries) {
      if (d.engine->query(*here)) return true;
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return false;
  }
  void synchronizeStream(const c10::Stream& s) const override { synchronizeDevice(s.device_index()); }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    if (device_is_open(index)) synchronize(device(index));
  }

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex index, const c10::EventFlag flag) const override {
    TORCH_CHECK(index == -1 || index == s.device_index(), "The event belongs to spiral:", static_cast<int>(index),
                ", the stream to spiral:", static_cast<int>(s.device_index()));
    Device& d = device(s.device_index());
    if (!*event) *event = new Event{nullptr, s.device_index(), flag == c10::EventFlag::BACKEND_DEFAULT};
    auto* e = static_cast<Event*>(*event);
    DeviceLock lock(d.mutex);
    e->handle = d.engine->record(e->timed);
  }

  // Work of the same device waits anyway; work of another device waits on the host.
  void block(void* event, const c10::Stream& s) const override {
    auto* e = static_cast<Event*>(event);
    if (e && e->device != s.device_index()) wait(*e);
  }

  bool queryEvent(void* event) const override {
    auto* e = static_cast<Event*>(event);
    if (!e) return true;
    Device& d = device(e->device);
    DeviceLock lock(d.mutex);
    d.engine->flush();
    return d.engine->query(*e->handle);
  }

  void synchronizeEvent(void* event) const override {
    if (auto* e = static_cast<Event*>(event)) wait(*e);
  }

  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    auto *start = static_cast<Event*>(first), *end = static_cast<Event*>(second);
    TORCH_CHECK(start && end, "Both events must be recorded before the elapsed time is calculated");
    TORCH_CHECK(start->timed && end->timed, "Both events must be created with enable_timing=True");
    TORCH_CHECK(start->device == end->device, "The events are of different devices");
    Device& d = device(start->device);
    DeviceLock lock(d.mutex);
    TORCH_CHECK(d.engine->query(*start->handle) && d.engine->query(*end->handle),
                "Both events must be completed before the elapsed time is calculated: synchronize first");
    return d.engine->elapsed_ms(*start->handle, *end->handle);
  }

  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    auto* e = static_cast<Event*>(event);
    if (!e || in_bad_fork()) return;
    try {
      Device& d = device(e->device);
      DeviceLock lock(d.mutex);
      delete e;
    } catch (...) {  // leaked rather than thrown
    }
  }

 private:
  static void wait(Event& e) {
    Device& d = device(e.device);
    DeviceLock lock(d.mutex);
    d.engine->wait(*e.handle);
    check_errors(d);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace
}  // namespace spiral
