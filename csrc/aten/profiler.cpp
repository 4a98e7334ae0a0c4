// torch.profiler: kernels on a timeline of their own, linked to the operators that launched them.
//
// Where torch takes profilers of PrivateUse1 devices (2.13 does), ours is one. Everywhere, device times of operators in
// key_averages() come from events that torch asks for around each (ProfilerStubs).
#include <torch/csrc/profiler/stubs/base.h>

#include <chrono>

#include "dispatch/trace.h"
#include "runtime/device.h"

#if __has_include(<torch/csrc/profiler/standalone/privateuse1_profiler.h>) && __has_include(<kineto/libkineto.h>)
#define SPIRAL_KINETO
#define FMT_HEADER_ONLY 1  // torch does not export what its copy of fmt compiled
#include <kineto/libkineto.h>
#include <kineto/output_base.h>
#endif

namespace spiral {
namespace {

struct Stubs final : torch::profiler::impl::ProfilerStubs {
  struct Mark {
    c10::DeviceIndex device;
    std::unique_ptr<EventHandle> handle;
  };

  void record(c10::DeviceIndex* index, torch::profiler::impl::ProfilerVoidEventStub* event, int64_t* cpu_ns) const override {
    const c10::DeviceIndex current = current_device();
    if (index) *index = current;
    if (cpu_ns) *cpu_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    Device& d = device(current);
    DeviceLock lock(d.mutex);
    *event = std::make_shared<Mark>(Mark{current, d.engine->record(true)});
  }

  // Microseconds.
  float elapsed(const torch::profiler::impl::ProfilerVoidEventStub* first, const torch::profiler::impl::ProfilerVoidEventStub* last) const override {
    auto &from = *static_cast<Mark*>(first->get()), &to = *static_cast<Mark*>(last->get());
    Device& d = device(to.device);
    DeviceLock lock(d.mutex);
    d.engine->wait(*to.handle);
    return static_cast<float>(d.engine->elapsed_ms(*from.handle, *to.handle) * 1e3);
  }

  void mark(const char*) const override {}  // no engine has named ranges
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override { return true; }
  void onEachDevice(std::function<void(int)> f) const override {
    for (int i = 0; i < device_count(); ++i) f(i);
  }
  void synchronize() const override { synchronize_all(); }
};

const bool stubs_registered = [] {
  static Stubs stubs;
  torch::profiler::impl::registerPrivateUse1Methods(&stubs);
  return true;
}();

#ifdef SPIRAL_KINETO

using libkineto::ActivityType;

std::string shapes_of(const LaunchRecord& r) {
  std::string text = "[";
  for (const auto& shape : r.shapes) {
    text += text.size() > 1 ? ", [" : "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    text += "]";
  }
  return text + "]";
}

class Session final : public libkineto::IActivityProfilerSession {
 public:
  explicit Session(bool wanted) : wanted_(wanted) {}
  ~Session() override { stop(); }

  void start() override {
    if (wanted_ && !listening_) token_ = trace_begin();
    listening_ = wanted_;
    status_ = libkineto::TraceStatus::RECORDING;
  }

  void stop() override {
    if (std::exchange(listening_, false)) records_ = trace_end(token_);
    status_ = libkineto::TraceStatus::PROCESSING;
  }

  std::vector<std::string> errors() override { return {}; }

  void processTrace(libkineto::ActivityLogger& logger) override { processTrace(logger, nullptr, INT64_MIN, INT64_MAX); }

  void processTrace(libkineto::ActivityLogger& logger, libkineto::getLinkedActivityCallback linked, int64_t from, int64_t to) override {
    buffer_ = std::make_unique<libkineto::CpuTraceBuffer>();
    buffer_->span = libkineto::TraceSpan(from, to, "spiral");
    buffer_->gpuOpCount = static_cast<int>(records_.size());
    int32_t number = 0;
    for (const LaunchRecord& r : records_) {
      if (r.duration_ns < 0) continue;
      const ActivityType type = r.kernel == "fill" ? ActivityType::GPU_MEMSET : r.kernel == "copy" ? ActivityType::GPU_MEMCPY : ActivityType::CONCURRENT_KERNEL;
      buffer_->emplace_activity(buffer_->span, type, r.kernel);
      libkineto::GenericTraceActivity& a = *buffer_->activities.back();
      a.startTime = r.start_ns;
      a.endTime = r.start_ns + r.duration_ns;
      a.id = r.correlation ? static_cast<int32_t>(r.correlation) : -++number;
      a.device = r.device;
      a.resource = 0;
      if (r.correlation && linked) a.linked = linked(static_cast<int32_t>(r.correlation));
      a.addMetadataQuoted("op", r.op);
      a.addMetadata("shapes", shapes_of(r));
      a.addMetadata("bytes", r.bytes);
      if (r.flops >= 0) a.addMetadata("flops", r.flops);
      if (!r.note.empty()) a.addMetadataQuoted("schedule", r.note);
      a.addMetadata("grid", "[" + std::to_string(r.groups[0]) + ", " + std::to_string(r.groups[1]) + ", " + std::to_string(r.groups[2]) + "]");
      logger.handleGenericActivity(a);
    }
    records_.clear();
  }

  std::unique_ptr<libkineto::DeviceInfo> getDeviceInfo() override { return nullptr; }

  std::vector<libkineto::ResourceInfo> getResourceInfos() override {
    std::vector<libkineto::ResourceInfo> infos;
    if (!devices_known()) return infos;
    for (int i = 0; i < device_count(); ++i) {
      if (device_is_open(static_cast<c10::DeviceIndex>(i))) infos.push_back({0, 0, i, "spiral:" + std::to_string(i) + " queue"});
    }
    return infos;
  }

  std::unique_ptr<libkineto::CpuTraceBuffer> getTraceBuffer() override { return std::move(buffer_); }

  void pushCorrelationId(uint64_t id) override { push_correlation(id); }
  void popCorrelationId() override { pop_correlation(); }

 private:
  bool wanted_, listening_ = false;
  uint64_t token_ = 0;
  std::vector<LaunchRecord> records_;
  std::unique_ptr<libkineto::CpuTraceBuffer> buffer_;
};

class Profiler final : public libkineto::IActivityProfiler {
 public:
  const std::string& name() const override { return name_; }
  const std::set<ActivityType>& availableActivities() const override { return activities_; }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(const std::set<ActivityType>& types, const libkineto::Config&) override {
    return std::make_unique<Session>(types.count(ActivityType::CONCURRENT_KERNEL) > 0);
  }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(int64_t, int64_t, const std::set<ActivityType>& types, const libkineto::Config& config) override {
    return configure(types, config);
  }

 private:
  std::string name_ = "spiral";
  std::set<ActivityType> activities_{ActivityType::CONCURRENT_KERNEL, ActivityType::GPU_MEMCPY, ActivityType::GPU_MEMSET};
};

#endif

}  // namespace

bool native_profiler() {
#ifdef SPIRAL_KINETO
  return true;
#else
  return false;
#endif
}

}  // namespace spiral

#ifdef SPIRAL_KINETO

// As in torch/csrc/profiler/standalone/privateuse1_profiler.h, which finds its includes only with Kineto's folder on the path.
namespace torch::profiler::impl {
class PrivateUse1ProfilerRegistry {
 public:
  static PrivateUse1ProfilerRegistry& instance();
  void registerFactory(std::function<std::unique_ptr<libkineto::IActivityProfiler>()> factory);
};
}  // namespace torch::profiler::impl

namespace {
const bool profiler_registered = [] {
  torch::profiler::impl::PrivateUse1ProfilerRegistry::instance().registerFactory([] { return std::make_unique<spiral::Profiler>(); });
  return true;
}();
}  // namespace

#endif
