#include "aten/random.h"

#include "runtime/device.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GeneratorImpl.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

namespace spiral {
namespace {

class PhiloxGenerator final : public c10::GeneratorImpl {
 public:
  explicit PhiloxGenerator(c10::DeviceIndex index)
      : c10::GeneratorImpl({c10::DeviceType::PrivateUse1, index}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    offset_ = 0;
  }
  uint64_t current_seed() const override { return seed_; }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }

  // The seed, then the offset: 16 bytes.
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::empty({kStateSize}, at::TensorOptions(at::kByte).device(at::kCPU));
    auto* bytes = state.mutable_data_ptr<uint8_t>();
    std::memcpy(bytes, &seed_, 8);
    std::memcpy(bytes + 8, &offset_, 8);
    return state.getIntrusivePtr();
  }
  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    TORCH_CHECK(state.numel() == kStateSize, "The state of a spiral generator has ", kStateSize, " bytes, this has ",
                state.numel());
    const auto* bytes = static_cast<const uint8_t*>(state.data());
    std::memcpy(&seed_, bytes, 8);
    std::memcpy(&offset_, bytes + 8, 8);
  }

  std::pair<int64_t, int64_t> reserve(int64_t calls) {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t first = offset_;
    offset_ += static_cast<uint64_t>(calls);
    return {static_cast<int64_t>(seed_), static_cast<int64_t>(first)};
  }

 private:
  static constexpr int64_t kStateSize = 16;

  PhiloxGenerator* clone_impl() const override {
    auto* copy = new PhiloxGenerator(device().index());
    copy->seed_ = seed_;
    copy->offset_ = offset_;
    return copy;
  }

  uint64_t seed_ = c10::default_rng_seed_val;
  uint64_t offset_ = 0;
};

}  // namespace

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<PhiloxGenerator>(index < 0 ? current_device() : index);
}

namespace {

struct Defaults {
  std::mutex mutex;
  std::optional<uint64_t> seed;           // for generators that aren't made yet
  std::vector<at::Generator> generators;  // complete or empty
};

Defaults& defaults() {
  static auto* instance = new Defaults;
  return *instance;
}

}  // namespace

const at::Generator& default_generator(c10::DeviceIndex index) {
  const int count = device_count();
  Defaults& d = defaults();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (d.generators.empty()) {
    d.generators.reserve(count);
    for (int i = 0; i < count; ++i) {
      d.generators.push_back(new_generator(static_cast<c10::DeviceIndex>(i)));
      if (d.seed) d.generators.back().set_current_seed(*d.seed);
    }
  }
  if (index < 0) index = current_device();
  TORCH_CHECK(index < count, "Invalid device: spiral:", static_cast<int>(index));
  return d.generators[index];
}

void manual_seed_all(uint64_t seed) {
  Defaults& d = defaults();
  std::lock_guard<std::mutex> lock(d.mutex);
  d.seed = seed;
  for (auto& generator : d.generators) {
    std::lock_guard<std::mutex> generator_lock(generator.mutex());
    generator.set_current_seed(seed);
  }
}

std::pair<int64_t, int64_t> philox_reserve(const std::optional<at::Generator>& generator, c10::DeviceIndex index,
                                           int64_t calls) {
  const at::Generator& g = generator && generator->defined() ? *generator : default_generator(index);
  TORCH_CHECK(g.device().type() == c10::DeviceType::PrivateUse1, "Expected a 'spiral' device type for generator but found '",
              g.device().type(), "'");
  return static_cast<PhiloxGenerator*>(g.unsafeGetGeneratorImpl())->reserve(calls);
}

// For torch.spiral.default_generators: torch_python alone can wrap a generator, and does it for operators.
TORCH_LIBRARY_FRAGMENT(spiral, m) {
  m.def("_default_generator(int device) -> Generator?",
        [](int64_t index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
}

}  // namespace spiral
