#include "aten/fallback.h"

#include "aten/random.h"
#include "runtime/device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUFallback.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <sstream>
#include <unordered_map>

namespace spiral {
namespace {

struct Counts {
  std::mutex mutex;
  std::vector<std::pair<std::string, int64_t>> ops;
  std::unordered_map<std::string, size_t> index;
};

Counts& counts() {
  static auto* instance = new Counts;
  return *instance;
}

std::atomic<FallbackMode>& mode() {
  static std::atomic<FallbackMode> value{[] {
    const char* text = std::getenv("SPIRAL_FALLBACK");
    return text && *text ? parse_fallback_mode(text) : FallbackMode::Warn;
  }()};
  return value;
}

std::atomic<std::string (*)()> caller_finder{nullptr};

void describe(std::ostream& out, const at::Tensor& t) {
  if (!t.defined()) {
    out << "None";
    return;
  }
  out << c10::toString(t.scalar_type()) << "[";
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << "]";
  if (t.device().is_cpu()) out << " on cpu";
}

// "Float[3, 4], Long[7], 2.5": what the operator was called with.
std::string describe(c10::ArrayRef<c10::IValue> arguments) {
  std::ostringstream out;
  const char* separator = "";
  for (const auto& value : arguments) {
    if (value.isNone()) continue;
    out << separator;
    separator = ", ";
    if (value.isTensor()) {
      describe(out, value.toTensor());
    } else if (value.isTensorList()) {
      out << "[";
      const char* inner = "";
      for (const at::Tensor& t : value.toTensorVector()) {
        out << inner;
        inner = ", ";
        describe(out, t);
      }
      out << "]";
    } else if (value.isInt() || value.isDouble() || value.isBool() || value.isIntList() || value.isString()) {
      out << value;
    } else {
      out << value.tagKind();
    }
  }
  return out.str();
}

std::string where() {
  const auto finder = caller_finder.load();
  const std::string place = finder ? finder() : "";
  return place.empty() ? "" : " at " + place;
}

std::vector<at::Tensor> tensors_of(c10::ArrayRef<c10::IValue> arguments) {
  std::vector<at::Tensor> tensors;
  for (const auto& value : arguments) {
    if (value.isTensor()) tensors.push_back(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) tensors.push_back(t);
    }
  }
  return tensors;
}

bool is_ours(const at::Tensor& t) { return t.defined() && t.device().is_privateuseone(); }

// A CPU tensor beside ours is a mistake of the caller, which no copy may hide; numbers, tensors of no dimension, belong to both.
void check_same_device(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  const at::Tensor* ours = nullptr;
  const at::Tensor* other = nullptr;
  const std::vector<at::Tensor> tensors = tensors_of(arguments);
  for (const at::Tensor& t : tensors) {
    if (is_ours(t)) {
      ours = &t;
    } else if (t.defined() && t.dim() > 0) {
      other = &t;
    }
  }
  TORCH_CHECK(
      !ours || !other, "Expected all tensors to be on the same device, but found at least two devices, ", ours->device(), " and ",
      other->device(), "! (when checking argument for ", name, ")");
}

c10::DeviceIndex device_of(c10::ArrayRef<c10::IValue> arguments) {
  for (const at::Tensor& t : tensors_of(arguments)) {
    if (is_ours(t)) return t.device().index();
  }
  for (const auto& value : arguments) {
    if (value.isDevice() && value.toDevice().has_index()) return value.toDevice().index();
  }
  return current_device();
}

// The CPU's kernels take a CPU generator. It starts from the state of ours, which moves on, so that results follow the seed of
// the device.
void map_generators(const c10::FunctionSchema& schema, torch::jit::Stack* stack, c10::DeviceIndex index) {
  const auto& formal = schema.arguments();
  const size_t first = stack->size() - formal.size();
  for (size_t i = 0; i < formal.size(); ++i) {
    const auto& type = *formal[i].type();
    const bool takes_generator = type.kind() == c10::TypeKind::GeneratorType ||
                                 (type.kind() == c10::TypeKind::OptionalType &&
                                  type.expect<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType);
    if (!takes_generator) continue;
    c10::IValue& value = (*stack)[first + i];
    std::optional<at::Generator> ours;
    if (value.isGenerator()) ours = value.toGenerator();
    if (ours && ours->device().is_cpu()) continue;
    const auto [seed, offset] = philox_reserve(ours, index, 1);
    at::Generator generator = at::detail::createCPUGenerator(static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15u +
                                                             static_cast<uint64_t>(offset));
    value = generator;
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const FallbackMode how = fallback_mode();
  const std::string name = c10::toString(schema.operator_name());
  check_same_device(name, arguments);
  TORCH_CHECK_NOT_IMPLEMENTED(
      how != FallbackMode::Error, name, " has no kernel for the spiral device, called with (", describe(arguments), ")",
      where(), ". SPIRAL_FALLBACK=error refuses to run it on the CPU: set SPIRAL_FALLBACK=warn to allow that, or add the ",
      "operator (docs/adding-an-op.md).");
  bool first;
  {
    Counts& c = counts();
    std::lock_guard<std::mutex> lock(c.mutex);
    const auto [entry, fresh] = c.index.emplace(name, c.ops.size());
    if (fresh) c.ops.emplace_back(name, 0);
    ++c.ops[entry->second].second;
    first = fresh;
  }
  if (first && how == FallbackMode::Warn) {
    TORCH_WARN(name, " has no kernel for the spiral device and runs on the CPU, which is slow; called with (",
               describe(arguments), ")", where(),
               ". This is said once per operator; torch.spiral.fallbacks() counts. SPIRAL_FALLBACK=error refuses instead.");
  }
  const c10::DeviceIndex index = device_of(arguments);
  map_generators(schema, stack, index);
  at::native::cpu_fallback(op, stack);
}

// Declared host operators: registered by name, never warned about or refused, counted with the bytes that they copy.
struct HostCounts {
  std::mutex mutex;
  std::vector<HostOp> ops;
};

HostCounts& host_counts() {
  static auto* instance = new HostCounts;
  return *instance;
}

int64_t bytes_on_device(c10::ArrayRef<c10::IValue> values) {
  int64_t bytes = 0;
  const auto add = [&](const at::Tensor& t) {
    if (t.defined() && t.device().is_privateuseone()) bytes += static_cast<int64_t>(t.numel() * t.element_size());
  };
  for (const auto& value : values) {
    if (value.isTensor()) add(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) add(t);
    }
  }
  return bytes;
}

class Host final : public c10::OperatorKernel {
 public:
  explicit Host(size_t index) : index_(index) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const auto arguments = torch::jit::last(*stack, schema.arguments().size());
    int64_t bytes = bytes_on_device(arguments);
    map_generators(schema, stack, device_of(arguments));
    at::native::cpu_fallback(op, stack);
    bytes += bytes_on_device(torch::jit::last(*stack, schema.returns().size()));
    HostCounts& c = host_counts();
    std::lock_guard<std::mutex> lock(c.mutex);
    ++c.ops[index_].calls;
    c.ops[index_].bytes += bytes;
  }

 private:
  size_t index_;
};

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace

FallbackMode fallback_mode() { return mode().load(std::memory_order_relaxed); }
void set_fallback_mode(FallbackMode value) { mode().store(value, std::memory_order_relaxed); }

FallbackMode parse_fallback_mode(const std::string& text) {
  if (text == "warn") return FallbackMode::Warn;
  if (text == "error") return FallbackMode::Error;
  if (text == "silent") return FallbackMode::Silent;
  C10_THROW_ERROR(ValueError, "SPIRAL_FALLBACK is \"warn\", \"error\" or \"silent\", not \"" + text + "\"");
}

std::vector<std::pair<std::string, int64_t>> fallbacks() {
  Counts& c = counts();
  std::lock_guard<std::mutex> lock(c.mutex);
  return c.ops;
}

void reset_fallbacks() {
  Counts& c = counts();
  std::lock_guard<std::mutex> lock(c.mutex);
  c.ops.clear();
  c.index.clear();
}

void register_host(const std::string& name) {
  static auto* library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  HostCounts& c = host_counts();
  size_t index;
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    index = c.ops.size();
    c.ops.push_back({name, 0, 0});
  }
  library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Host>(index)));
}

std::vector<HostOp> host_ops() {
  HostCounts& c = host_counts();
  std::lock_guard<std::mutex> lock(c.mutex);
  return c.ops;
}

void set_caller_finder(std::string (*finder)()) { caller_finder.store(finder); }

}  // namespace spiral
