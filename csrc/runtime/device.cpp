#include "runtime/device.h"

#include "runtime/fork.h"
#include "runtime/memory.h"

#include <c10/util/Exception.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <sstream>
#include <unordered_map>

namespace spiral {

// An engine may be left out of a build.
[[gnu::weak]] std::vector<std::unique_ptr<Adapter>> opencl_adapters(const std::string& library, std::string& why);
[[gnu::weak]] std::vector<std::unique_ptr<Adapter>> wgpu_adapters(const std::string& library, std::string& why);
[[gnu::weak]] std::vector<std::unique_ptr<Adapter>> cuda_adapters(std::string& why);

namespace {

constexpr uint64_t kErrorBufferSize = 256;  // two u32 are used; a Binding wants multiples of 256

struct Slot {
  std::unique_ptr<Adapter> adapter;
  std::mutex opening;
  std::atomic<Device*> device{nullptr};
};

// Everything that was found. Never destroyed: tensors may outlive static destructors.
struct Registry {
  std::vector<std::unique_ptr<Slot>> slots;
  std::vector<EngineReport> reports;
};

std::mutex& configuration_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::map<std::string, std::string>& libraries() {
  static auto* paths = new std::map<std::string, std::string>;
  return *paths;
}

// Why an engine is not to be looked for, because a part of it that is not a library is missing.
std::map<std::string, std::string>& refusals() {
  static auto* reasons = new std::map<std::string, std::string>;
  return *reasons;
}

std::atomic<bool> discovered{false};

std::vector<std::string> split(const char* text) {
  std::vector<std::string> parts;
  std::stringstream stream(text ? text : "");
  for (std::string part; std::getline(stream, part, ',');) {
    part.erase(std::remove_if(part.begin(), part.end(), [](unsigned char c) { return std::isspace(c); }), part.end());
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

// Best first (docs/design.md, decision 4).
int rank(const DeviceProperties& p) {
  const bool discrete = p.type == DeviceType::DiscreteGPU;
  if (p.language == Language::Triton) return 0;
  if (p.engine == "wgpu" && discrete) return 1;
  if (p.engine == "opencl" && discrete) return 2;
  if (p.type == DeviceType::IntegratedGPU) return 3;
  if (p.engine == "opencl") return 4;
  return 5;
}

Registry* discover() {
  auto* registry = new Registry;
  std::vector<std::unique_ptr<Adapter>> found;
  const auto engines = split(std::getenv("SPIRAL_ENGINE"));
  auto search = [&](const char* engine, bool built, auto&& adapters) {
    EngineReport report;
    report.engine = engine;
    {
      std::lock_guard<std::mutex> lock(configuration_mutex());
      auto path = libraries().find(engine);
      if (path != libraries().end()) report.library = path->second;
      auto refused = refusals().find(engine);
      if (refused != refusals().end()) report.why = refused->second;
    }
    const auto named = [&](const char* name) { return std::find(engines.begin(), engines.end(), name) != engines.end(); };
    const bool wanted = engines.empty() || named(engine) || (std::string(engine) == "cuda" && named("hip"));
    if (!wanted) {
      report.why = "left out by SPIRAL_ENGINE=" + std::string(std::getenv("SPIRAL_ENGINE"));
    } else if (!built) {
      report.why = "not part of this build";
    } else if (report.why.empty()) {
      try {
        for (auto& adapter : adapters(report)) {
          ++report.devices;
          found.push_back(std::move(adapter));
        }
        if (report.devices > 0) report.why.clear();
      } catch (const c10::Error& e) {
        report.why = e.what_without_backtrace();
      } catch (const std::exception& e) {
        report.why = e.what();
      }
    }
    registry->reports.push_back(std::move(report));
  };
  search("cuda", cuda_adapters != nullptr, [](EngineReport& r) { return cuda_adapters(r.why); });
  search("opencl", opencl_adapters != nullptr, [](EngineReport& r) { return opencl_adapters(r.library, r.why); });
  search("wgpu", wgpu_adapters != nullptr, [](EngineReport& r) { return wgpu_adapters(r.library, r.why); });
  for (const auto& engine : engines) {
    if (engine != "cuda" && engine != "hip" && engine != "opencl" && engine != "wgpu") {
      registry->reports.push_back({engine, "", "SPIRAL_ENGINE names no engine: cuda, hip, opencl or wgpu", 0});
    }
  }

  std::stable_sort(found.begin(), found.end(),
                   [](const auto& a, const auto& b) { return rank(a->properties) < rank(b->properties); });
  auto keep = [&](std::unique_ptr<Adapter> adapter) {
    registry->slots.push_back(std::make_unique<Slot>());
    registry->slots.back()->adapter = std::move(adapter);
  };
  if (const char* visible = std::getenv("SPIRAL_VISIBLE_DEVICES")) {
    // As CUDA_VISIBLE_DEVICES: indices into the full list, in the order wanted; the first that doesn't exist ends it.
    for (const auto& part : split(visible)) {
      char* end = nullptr;
      const long index = std::strtol(part.c_str(), &end, 10);
      if (*end || index < 0 || index >= static_cast<long>(found.size()) || !found[index]) break;
      keep(std::move(found[index]));
    }
    for (const auto& left : found) {
      if (!left) continue;
      const std::string engine = left->properties.engine == "hip" ? "cuda" : left->properties.engine;
      for (EngineReport& report : registry->reports) {
        if (report.engine != engine) continue;
        --report.devices;
        report.why = std::string("left out by SPIRAL_VISIBLE_DEVICES=") + visible;
      }
    }
  } else {
    for (auto& adapter : found) keep(std::move(adapter));
  }
  // DeviceIndex has eight bits.
  if (registry->slots.size() > 127) registry->slots.resize(127);
  return registry;
}

Registry& registry() {
  static Registry* instance = [] {
    watch_fork();  // even looking for devices may start a driver's threads
    Registry* made = discover();
    discovered.store(true, std::memory_order_release);
    return made;
  }();
  return *instance;
}

Slot& slot(c10::DeviceIndex index) {
  auto& slots = registry().slots;
  if (slots.empty()) {
    std::string text;
    for (const auto& report : registry().reports) {
      if (!report.why.empty()) text += "\n  " + report.engine + ": " + report.why;
    }
    TORCH_CHECK(false, "No spiral device is available:", text, "\n`python -m torch_spiral` says more.");
  }
  TORCH_CHECK(index >= 0 && index < static_cast<int>(slots.size()), "Invalid device: spiral:", static_cast<int>(index),
              "; there ", slots.size() == 1 ? "is 1 device" : "are " + std::to_string(slots.size()) + " devices",
              " (see `python -m torch_spiral`)");
  return *slots[index];
}

Device& open(Slot& slot, c10::DeviceIndex index) {
  std::lock_guard<std::mutex> lock(slot.opening);
  if (Device* open = slot.device.load(std::memory_order_acquire)) return *open;
  auto device = std::make_unique<Device>();
  device->index = index;
  device->engine = slot.adapter->open();
  device->properties = device->engine->properties();
  device->error_buffer = device->engine->allocate(kErrorBufferSize);
  device->engine->fill(device->error_buffer, 0, kErrorBufferSize, 0);
  Device* opened = device.release();  // never closed
  slot.device.store(opened, std::memory_order_release);
  return *opened;
}

thread_local c10::DeviceIndex current = 0;

std::atomic<void (*)()> the_gate{nullptr};

struct ErrorSites {
  std::mutex mutex;
  std::vector<std::string> texts{""};
  std::unordered_map<std::string, int> numbers;
};

ErrorSites& error_sites() {
  static auto* sites = new ErrorSites;
  return *sites;
}

// Waits with the device's mutex held, and fetches the error buffer with what else is being read.
void finish(Device& device) {
  const bool check = device.errors_possible;
  if (check) device.engine->read_async(device.error_buffer, 0, device.error_words, sizeof device.error_words);
  device.engine->synchronize();
  release_pinned(device);
  if (!check) return;
  device.errors_possible = false;
  const auto [site, detail] = device.error_words;
  if (site == 0) return;
  device.engine->fill(device.error_buffer, 0, kErrorBufferSize, 0);
  std::string text;
  {
    ErrorSites& sites = error_sites();
    std::lock_guard<std::mutex> lock(sites.mutex);
    text = site < sites.texts.size() ? sites.texts[site]
                                           : "a kernel reported the unknown error " + std::to_string(site);
  }
  const auto hole = text.find("{}");  // of the index, where one is at fault
  TORCH_CHECK(hole != std::string::npos, text);
  text.replace(hole, 2, std::to_string(static_cast<int32_t>(detail)));
  C10_THROW_ERROR(IndexError, text);
}

}  // namespace

int device_count() noexcept {
  try {
    return static_cast<int>(registry().slots.size());
  } catch (...) {
    return 0;
  }
}

bool devices_known() noexcept { return discovered.load(std::memory_order_acquire); }

Device& device(c10::DeviceIndex index) {
  Slot& s = slot(index);
  check_not_forked();
  Device* open_device = s.device.load(std::memory_order_acquire);
  return C10_LIKELY(open_device != nullptr) ? *open_device : open(s, index);
}

const DeviceProperties& device_properties(c10::DeviceIndex index) {
  Slot& s = slot(index);
  Device* open_device = s.device.load(std::memory_order_acquire);
  return open_device ? open_device->properties : s.adapter->properties;
}

c10::DeviceIndex current_device() noexcept { return current; }

void set_current_device(c10::DeviceIndex index) {
  slot(index);
  current = index;
}

c10::DeviceIndex exchange_device_unchecked(c10::DeviceIndex index) noexcept {
  const auto previous = current;
  if (index >= 0) current = index;
  return previous;
}

bool device_is_open(c10::DeviceIndex index) noexcept {
  return discovered.load(std::memory_order_acquire) && index >= 0 && index < device_count() &&
         registry().slots[index]->device.load(std::memory_order_acquire) != nullptr;
}

bool in_bad_fork() noexcept { return is_forked(); }

std::vector<EngineReport> engine_reports() { return registry().reports; }

void set_engine_library(const std::string& engine, const std::string& path) {
  TORCH_CHECK(!discovered.load(), "The library of an engine has to be set before the first look for devices");
  std::lock_guard<std::mutex> lock(configuration_mutex());
  libraries()[engine] = path;
}

void refuse_engine(const std::string& engine, const std::string& why) {
  TORCH_CHECK(!discovered.load(), "An engine has to be refused before the first look for devices");
  std::lock_guard<std::mutex> lock(configuration_mutex());
  refusals()[engine] = why;
}

void set_gate(void (*gate)()) { the_gate.store(gate, std::memory_order_release); }

void pass_gate() {
  if (auto* gate = the_gate.load(std::memory_order_acquire); C10_UNLIKELY(gate != nullptr)) gate();
}

void synchronize(Device& device) {
  {
    DeviceLock lock(device.mutex);
    finish(device);
  }
  pass_gate();
}

void synchronize_all() {
  if (!discovered.load(std::memory_order_acquire)) return;
  for (auto& slot : registry().slots) {
    if (Device* open_device = slot->device.load(std::memory_order_acquire)) synchronize(*open_device);
  }
}

void read_back(Device& device, Memory* memory, uint64_t offset, void* data, uint64_t size) {
  {
    DeviceLock lock(device.mutex);
    if (device.errors_possible) {
      device.engine->read_async(memory, offset, data, size);
      finish(device);
    } else {
      device.engine->read(memory, offset, data, size);
    }
  }
  pass_gate();
}

void check_errors(Device& device) {
  DeviceLock lock(device.mutex);
  if (device.errors_possible) finish(device);
}

int error_site(const std::string& text) {
  ErrorSites& sites = error_sites();
  std::lock_guard<std::mutex> lock(sites.mutex);
  auto [entry, fresh] = sites.numbers.emplace(text, static_cast<int>(sites.texts.size()));
  if (fresh) sites.texts.push_back(text);
  return entry->second;
}

}  // namespace spiral
