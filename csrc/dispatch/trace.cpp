#include "trace.h"

#include <c10/util/Exception.h>

#include <chrono>
#include <map>
#include <mutex>

#include "../runtime/device.h"

namespace spiral {

namespace detail {
std::atomic<int> listeners{0};
}

namespace {

constexpr size_t kBatch = 2048;  // launches whose events wait to be read

struct Pending {
  std::unique_ptr<EventHandle> start, end;
  LaunchRecord record;
};

struct Timeline {
  std::unique_ptr<EventHandle> base;  // a point of the device's clock that is known on the host's
  int64_t base_ns = 0;
  std::vector<Pending> pending;
};

// Lock order: Device::mutex, then this.
struct State {
  std::mutex mutex;
  std::vector<LaunchRecord> log;
  uint64_t next = 0;  // sequence number
  std::map<c10::DeviceIndex, Timeline> timelines;
};

State& state() {
  static State* s = new State;
  return *s;
}

thread_local std::vector<uint64_t> correlations;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// With both locks held. Waits.
void collect(Device& d, State& s, Timeline& t) {
  std::vector<Pending> pending;
  pending.swap(t.pending);
  if (pending.empty()) return;
  std::vector<double> times(2 * pending.size());
  std::vector<EventHandle*> events;
  for (Pending& p : pending) {
    events.push_back(p.start.get());
    events.push_back(p.end.get());
  }
  bool lost = false;
  try {
    d.engine->wait(*events.back());
    d.engine->elapsed_many_ms(*t.base, events.data(), events.size(), times.data());
  } catch (const c10::Error&) {
    lost = true;  // the device's error is raised by the next synchronize()
  }
  for (size_t i = 0; i < pending.size(); ++i) {
    LaunchRecord& r = pending[i].record;
    if (!lost) {
      r.start_ns = t.base_ns + static_cast<int64_t>(times[2 * i] * 1e6);
      r.duration_ns = std::max<int64_t>(static_cast<int64_t>((times[2 * i + 1] - times[2 * i]) * 1e6), 0);
    }
    s.log.push_back(std::move(r));
  }
  if (!lost) {  // CUDA's clock gives floats: distances stay short
    t.base_ns += static_cast<int64_t>(times.back() * 1e6);
    t.base = std::move(pending.back().end);
  }
}

}  // namespace

uint64_t trace_begin() {
  State& s = state();
  std::lock_guard lock(s.mutex);
  detail::listeners.fetch_add(1);
  return s.next;
}

std::vector<LaunchRecord> trace_end(uint64_t token) {
  State& s = state();
  for (int i = 0; i < device_count(); ++i) {
    const auto index = static_cast<c10::DeviceIndex>(i);
    if (!device_is_open(index)) continue;
    Device& d = device(index);
    DeviceLock device_lock(d.mutex);
    std::lock_guard lock(s.mutex);
    auto found = s.timelines.find(index);
    if (found != s.timelines.end()) collect(d, s, found->second);
  }
  std::lock_guard lock(s.mutex);
  std::vector<LaunchRecord> records;
  for (const LaunchRecord& r : s.log) {
    if (r.sequence >= token) records.push_back(r);
  }
  if (detail::listeners.fetch_sub(1) == 1) {
    s.log.clear();
    s.timelines.clear();
  }
  return records;
}

std::unique_ptr<EventHandle> trace_start(Device& d) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  Timeline& t = s.timelines[static_cast<c10::DeviceIndex>(d.index)];
  if (!t.base) {
    d.engine->wait(*d.engine->record(false));
    // The device passes the mark between two looks at the host's clock: the tightest of a few tries tells when.
    int64_t tightest = INT64_MAX;
    for (int i = 0; i < 4; ++i) {
      const int64_t before = now_ns();
      auto mark = d.engine->record(true);
      d.engine->wait(*mark);
      const int64_t took = now_ns() - before;
      if (took >= tightest) continue;
      tightest = took;
      t.base = std::move(mark);
      t.base_ns = before + took / 2;
    }
  }
  return d.engine->record(true);
}

void trace_stop(Device& d, std::unique_ptr<EventHandle> start, LaunchRecord&& record) {
  auto end = d.engine->record(true);
  record.device = static_cast<c10::DeviceIndex>(d.index);
  record.correlation = correlations.empty() ? 0 : correlations.back();
  State& s = state();
  std::lock_guard lock(s.mutex);
  Timeline& t = s.timelines[record.device];
  if (!t.base) return;  // the last listener left while this was launched
  record.sequence = s.next++;
  t.pending.push_back({std::move(start), std::move(end), std::move(record)});
  if (t.pending.size() >= kBatch) collect(d, s, t);
}

void push_correlation(uint64_t id) { correlations.push_back(id); }

void pop_correlation() {
  if (!correlations.empty()) correlations.pop_back();
}

}  // namespace spiral
