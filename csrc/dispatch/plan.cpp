#include "plan.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/util/Exception.h>
#include <c10/util/hash.h>

#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "../aten/random.h"
#include "../runtime/device.h"
#include "../runtime/memory.h"
#include "call.h"
#include "ops.h"
#include "packed.h"
#include "recording.h"
#include "trace.h"

namespace spiral {
namespace {

constexpr size_t kMaxPlans = 1 << 14;

using Key = c10::SmallVector<uint64_t, 64>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0x9E3779B97F4A7C15ull;
    for (uint64_t word : key) {
      h ^= word;
      h *= 0xff51afd7ed558ccdull;
      h ^= h >> 32;
    }
    return static_cast<size_t>(h);
  }
};

struct Plans {
  std::shared_mutex mutex;
  std::unordered_map<Key, std::shared_ptr<Plan>, KeyHash> by_key;
  std::atomic<uint64_t> clock{0}, hits{0}, misses{0}, evicted{0}, launches{0};
};

Plans& plans() {
  static Plans* p = new Plans;
  return *p;
}

std::shared_ptr<Plan> find(const Key& key) {
  Plans& p = plans();
  std::shared_lock lock(p.mutex);
  auto it = p.by_key.find(key);
  if (it == p.by_key.end()) return nullptr;
  it->second->last_used.store(p.clock.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
  return it->second;
}

void publish(const Key& key, const std::shared_ptr<Plan>& plan) {
  Plans& p = plans();
  std::unique_lock lock(p.mutex);
  if (p.by_key.size() >= kMaxPlans) {
    // Drop the older half in one pass: rare, and plans in use live on through their replay.
    std::vector<uint64_t> ages;
    ages.reserve(p.by_key.size());
    for (auto& entry : p.by_key) ages.push_back(entry.second->last_used.load(std::memory_order_relaxed));
    std::nth_element(ages.begin(), ages.begin() + ages.size() / 2, ages.end());
    const uint64_t limit = ages[ages.size() / 2];
    for (auto it = p.by_key.begin(); it != p.by_key.end();) {
      if (it->second->last_used.load(std::memory_order_relaxed) < limit) {
        it = p.by_key.erase(it);
        p.evicted.fetch_add(1, std::memory_order_relaxed);
      } else {
        ++it;
      }
    }
  }
  plan->last_used.store(p.clock.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
  p.by_key.insert_or_assign(key, plan);
}

thread_local uint32_t plan_variant = 0;

double to_double(int64_t v) {
  double d;
  std::memcpy(&d, &v, sizeof d);
  return d;
}

int64_t to_bits(double d) {
  int64_t v;
  std::memcpy(&v, &d, sizeof v);
  return v;
}

int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) return 0;  // guarded by a check or a select in the lowering
  const int64_t q = a / b;
  return q - ((a % b != 0) && ((a < 0) != (b < 0)));
}

[[noreturn]] void raise(const std::string& exception, const std::string& text) {
  if (exception == "IndexError") TORCH_CHECK_INDEX(false, text);
  if (exception == "ValueError") TORCH_CHECK_VALUE(false, text);
  if (exception == "TypeError") TORCH_CHECK_TYPE(false, text);
  if (exception == "NotImplementedError") TORCH_CHECK_NOT_IMPLEMENTED(false, text);
  TORCH_CHECK(false, text);
}

}  // namespace

// One run of a plan over the operands and slots of a call.
struct Replay {
  Call& call;
  const Plan& plan;
  Device& device;
  c10::SmallVector<int64_t, 128> values;
  struct Place {
    Memory* memory;
    uint64_t offset, size;
    void* data;
  };
  c10::SmallVector<Place, 16> places;
  c10::SmallVector<c10::DataPtr, 4> temporaries;
  c10::SmallVector<at::Tensor, 4> outputs;
  c10::SmallVector<int8_t, 8> make_packed;  // per allocation: steps that make its packed form run
  const bool traced = tracing();

  Replay(Call& c, const Plan& p) : call(c), plan(p), device(spiral::device(c.device_)) {}

  void evaluate() {
    values.resize(plan.slots + plan.constants.size() + plan.exprs.size());
    std::copy(call.slots_.begin(), call.slots_.end(), values.begin());
    std::copy(plan.constants.begin(), plan.constants.end(), values.begin() + plan.slots);
    int64_t* out = values.data() + plan.slots + plan.constants.size();
    const int64_t* v = values.data();
    int64_t seed = 0;
    const size_t count = traced ? plan.exprs.size() : plan.needed;
    for (size_t i = 0; i < count; ++i) {
      const Expr& e = plan.exprs[i];
      const int64_t a = v[e.a], b = v[e.b];
      int64_t r = 0;
      switch (e.code) {
        case Code::Add: r = a + b; break;
        case Code::Sub: r = a - b; break;
        case Code::Mul: r = a * b; break;
        case Code::FloorDiv: r = floor_div(a, b); break;
        case Code::Mod: r = b ? a - b * floor_div(a, b) : 0; break;
        case Code::CeilDiv: r = -floor_div(-a, b); break;
        case Code::Min: r = std::min(a, b); break;
        case Code::Max: r = std::max(a, b); break;
        case Code::Neg: r = -a; break;
        case Code::Eq: r = a == b; break;
        case Code::Lt: r = a < b; break;
        case Code::Le: r = a <= b; break;
        case Code::And: r = a && b; break;
        case Code::Or: r = a || b; break;
        case Code::Not: r = !a; break;
        case Code::Select: r = a ? b : v[e.c]; break;
        case Code::FAdd: r = to_bits(to_double(a) + to_double(b)); break;
        case Code::FSub: r = to_bits(to_double(a) - to_double(b)); break;
        case Code::FMul: r = to_bits(to_double(a) * to_double(b)); break;
        case Code::FDiv: r = to_bits(to_double(a) / to_double(b)); break;
        case Code::FPow: r = to_bits(std::pow(to_double(a), to_double(b))); break;
        case Code::FMin: r = to_bits(std::fmin(to_double(a), to_double(b))); break;
        case Code::FMax: r = to_bits(std::fmax(to_double(a), to_double(b))); break;
        case Code::FNeg: r = to_bits(-to_double(a)); break;
        case Code::FEq: r = to_double(a) == to_double(b); break;
        case Code::FLt: r = to_double(a) < to_double(b); break;
        case Code::FLe: r = to_double(a) <= to_double(b); break;
        case Code::FSqrt: r = to_bits(std::sqrt(to_double(a))); break;
        case Code::FExp: r = to_bits(std::exp(to_double(a))); break;
        case Code::FLog: r = to_bits(std::log(to_double(a))); break;
        case Code::FFloor: r = to_bits(std::floor(to_double(a))); break;
        case Code::ToFloat: r = to_bits(static_cast<double>(a)); break;
        case Code::ToInt: r = static_cast<int64_t>(to_double(a)); break;
        case Code::PhiloxSeed:
          std::tie(r, seed) = philox_reserve(call.generator_, call.device_, a);
          break;
        case Code::PhiloxOffset: r = seed; break;  // follows its PhiloxSeed
      }
      *out++ = r;
    }
  }

  void check() {
    for (const Check& c : plan.checks) {
      if (values[c.condition]) continue;
      std::string text;
      size_t next = 0;
      for (size_t i = 0; i < c.text.size(); ++i) {
        if (c.text[i] == '{' && i + 1 < c.text.size() && c.text[i + 1] == '}' && next < c.args.size()) {
          const auto [index, is_float] = c.args[next++];
          text += is_float ? c10::str(to_double(values[index])) : std::to_string(values[index]);
          ++i;
        } else {
          text += c.text[i];
        }
      }
      raise(c.exception, text);
    }
  }

  Place place(void* data) const {
    if (data == nullptr) return {device.error_buffer, 0, device.error_buffer->size, nullptr};  // empty: bound, never used
    const Location l = locate(data);
    return {l.memory, l.offset, l.memory_size, data};
  }

  uint64_t windows(uint64_t bytes) const {
    const auto limit = static_cast<uint64_t>(device.properties.max_binding);
    return bytes <= limit ? 1 : (bytes + limit - 1) / limit;
  }

  // Places of operands and allocations. A temporary is given back before later ones are made, so that these take its memory: the
  // queue is in order, and no other thread may queue anything in between (the caller holds the device's lock until all steps
  // are queued). False: an allocation needs another number of windows than the plan's kernels were built for.
  bool allocate() {
    places.resize(plan.operands + plan.allocations.size());
    for (size_t i = 0; i < plan.operands; ++i) places[i] = place(call.operands_[i].data);
    make_packed.assign(plan.allocations.size(), 1);
    for (size_t i = 0; i < plan.allocations.size(); ++i) {
      const Allocation& a = plan.allocations[i];
      if (!a.output) {
        if (windows(bytes(a)) != a.windows) return false;
        continue;
      }
      c10::SmallVector<int64_t, 6> sizes, strides;
      for (uint32_t s : a.sizes) sizes.push_back(values[s]);
      if (a.strides.empty()) {
        strides.resize(sizes.size());
        int64_t dense = 1;
        for (size_t d = sizes.size(); d-- > 0;) {
          strides[d] = dense;
          dense *= std::max<int64_t>(sizes[d], 1);
        }
      } else {
        for (uint32_t s : a.strides) strides.push_back(values[s]);
      }
      outputs.push_back(at::detail::empty_strided_generic(
          sizes, strides, spiral::allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), a.dtype));
      const at::Tensor& t = outputs.back();
      if (windows(t.storage().nbytes()) != a.windows) return false;
      places[plan.operands + i] = place(t.numel() ? t.mutable_data_ptr() : nullptr);
    }
    temporaries.resize(plan.allocations.size());
    for (const Step& step : plan.steps) {
      for (uint32_t i : step.first) places[plan.operands + i] = temporary(i);
      for (uint32_t i : step.last) temporaries[i].clear();
    }
    return true;
  }

  uint64_t bytes(const Allocation& a) const { return static_cast<uint64_t>(std::max<int64_t>(values[a.bytes], 0)); }

  Place temporary(uint32_t i) {
    const Allocation& a = plan.allocations[i];
    if (a.packed_operand != kNone) {
      const Call::Operand& operand = call.operands_[a.packed_operand];
      c10::SmallVector<int64_t, 12> layout;
      for (uint32_t s = 0; s < 2u * operand.ndim; ++s) layout.push_back(values[operand.first_slot + s]);
      const Packed packed = find_packed(call.device_, operand.data, operand.storage, layout, a.packed_kind, bytes(a));
      make_packed[i] = packed.stale;
      if (packed.data) return place(packed.data);
    }
    temporaries[i] = spiral::allocate(call.device_, bytes(a));
    return place(bytes(a) ? temporaries[i].get() : nullptr);
  }

  uint64_t element_offset(const Buffer& b) const {
    if (b.operand == kErrorBuffer) return 0;
    const uint64_t view = b.offset == kNone ? 0 : static_cast<uint64_t>(values[b.offset]);
    return places[b.operand].offset / b.element_size + view;
  }

  void launch(const Step& step) {
    uint32_t groups[3];
    for (int d = 0; d < 3; ++d) {
      const int64_t g = values[step.groups[d]];
      if (g <= 0) return;
      TORCH_CHECK(g <= UINT32_MAX, op(call.op_).name, ": a grid of ", g, " workgroups is too large");
      groups[d] = static_cast<uint32_t>(g);
    }
    c10::SmallVector<Binding, 16> bindings;
    for (const Buffer& b : step.buffers) {
      if (b.operand == kErrorBuffer) {
        bindings.push_back({device.error_buffer, 0, device.error_buffer->size});
        device.errors_possible = true;
        continue;
      }
      const Place& p = places[b.operand];
      if (b.windows == 1) {
        bindings.push_back({p.memory, 0, std::min(p.size, static_cast<uint64_t>(device.properties.max_binding))});
      } else {
        const auto limit = static_cast<uint64_t>(device.properties.max_binding);
        for (uint32_t w = 0; w < b.windows; ++w) {
          bindings.push_back({p.memory, w * limit, std::min(limit, p.size - w * limit)});
        }
      }
    }
    alignas(8) char params[4096];  // CUDA's limit; other engines take less
    TORCH_CHECK(step.params_size <= sizeof params, op(call.op_).name, ": a parameter block of ", step.params_size, " bytes, the most is ",
                sizeof params);
    char* out = params;
    auto put = [&out](auto v) {
      std::memcpy(out, &v, sizeof v);
      out += sizeof v;
    };
    for (const Word& w : step.words) {
      switch (w.kind) {
        case WordKind::Offset64: put(element_offset(step.buffers[w.index])); break;
        case WordKind::Offset32: put(static_cast<uint32_t>(element_offset(step.buffers[w.index]))); break;
        case WordKind::Pointer: {
          const Buffer& b = step.buffers[w.index];
          Memory* memory = b.operand == kErrorBuffer ? device.error_buffer : places[b.operand].memory;
          put(device.engine->address(memory) + element_offset(b) * b.element_size);
          break;
        }
        case WordKind::I64: put(values[w.index]); break;
        case WordKind::F64: put(to_double(values[w.index])); break;
        case WordKind::I32: put(static_cast<int32_t>(values[w.index])); break;
        case WordKind::U32: put(static_cast<uint32_t>(values[w.index])); break;
        case WordKind::F32: put(static_cast<float>(to_double(values[w.index]))); break;
      }
    }
    std::memset(out, 0, static_cast<size_t>(params + step.params_size - out));
    plans().launches.fetch_add(1, std::memory_order_relaxed);
    auto start = traced ? trace_start(device) : nullptr;
    device.engine->enqueue(step.kernel, bindings.data(), static_cast<uint32_t>(bindings.size()), params, groups);
    if (start) {
      LaunchRecord r = describe(step, step.kernel->name);
      std::copy(groups, groups + 3, r.groups);
      trace_stop(device, std::move(start), std::move(r));
    }
  }

  // What a step works on, for a trace.
  LaunchRecord describe(const Step& step, const std::string& kernel) const {
    LaunchRecord r;
    r.op = op(call.op_).name;
    r.kernel = kernel;
    r.note = step.note;
    if (step.flops != kNone) r.flops = values[step.flops];
    c10::SmallVector<uint32_t, 16> seen;
    for (const Buffer& b : step.buffers) {
      if (b.operand == kErrorBuffer || std::find(seen.begin(), seen.end(), b.operand) != seen.end()) continue;
      seen.push_back(b.operand);
      std::vector<int64_t> shape;
      int64_t elements = 1;  // that exist: a broadcast dimension counts once
      if (b.operand < plan.operands) {
        const Call::Operand& o = call.operands_[b.operand];
        uint32_t sizes = o.first_slot, strides = o.first_slot + o.ndim;
        if (o.is_iterator) {
          strides = o.first_slot;
          for (const Call::Iterator& it : call.iterators_) {
            if (b.operand >= it.first_operand && b.operand < it.first_operand + it.operands) sizes = it.shape_slot;
          }
        }
        for (uint32_t d = 0; d < o.ndim; ++d) {
          shape.push_back(values[sizes + d]);
          if (values[strides + d] != 0) elements *= shape.back();
        }
        if (o.is_iterator) std::reverse(shape.begin(), shape.end());
        r.dtypes.push_back(o.dtype);
      } else {
        const Allocation& a = plan.allocations[b.operand - plan.operands];
        for (uint32_t s : a.sizes) elements *= shape.emplace_back(values[s]);
        r.dtypes.push_back(static_cast<int8_t>(a.dtype));
      }
      r.bytes += elements * static_cast<int64_t>(c10::elementSize(static_cast<c10::ScalarType>(r.dtypes.back())));
      r.shapes.push_back(std::move(shape));
    }
    return r;
  }

  // Lets the engine hand a plan's launches to the driver together.
  struct Together {
    Engine* engine = nullptr;
    explicit Together(const Replay& r) {
      if (r.traced || r.plan.steps.size() < 2) return;
      if (!r.plan.sequence) r.plan.sequence = r.device.engine->sequence(r.plan.steps.size());
      if (!r.plan.sequence) return;
      engine = r.device.engine.get();
      engine->begin(*r.plan.sequence);
    }
    ~Together() {
      if (engine) engine->end();
    }
    Together(const Together&) = delete;
  };

  void steps() {
    const Together together(*this);
    for (const Step& step : plan.steps) {
      if (step.when != kNone && !make_packed[step.when]) continue;
      if (step.kind == Step::Kind::Launch) {
        launch(step);
        continue;
      }
      const auto bytes = static_cast<uint64_t>(std::max<int64_t>(values[step.bytes], 0));
      if (bytes == 0) continue;
      const Buffer& to = step.buffers[0];
      const uint64_t at = element_offset(to) * to.element_size;
      auto start = traced ? trace_start(device) : nullptr;
      if (step.kind == Step::Kind::Fill) {
        device.engine->fill(places[to.operand].memory, at, bytes, step.fill_value);
      } else {
        const Buffer& from = step.buffers[1];
        device.engine->copy(places[from.operand].memory, element_offset(from) * from.element_size, places[to.operand].memory, at, bytes);
      }
      if (start) {
        LaunchRecord r = describe(step, step.kind == Step::Kind::Fill ? "fill" : "copy");
        r.bytes = static_cast<int64_t>(bytes) * (step.kind == Step::Kind::Fill ? 1 : 2);
        trace_stop(device, std::move(start), std::move(r));
      }
    }
    for (const Call::Operand& operand : call.operands_) {
      if (operand.written) bump_epoch(operand.storage);
    }
  }

  bool run() {
    evaluate();
    check();
    DeviceLock lock(device.mutex);
    try {
      if (!allocate()) return false;
      steps();
    } catch (...) {
      drop_packed(call.device_, true);  // what was about to be packed is not
      throw;
    }
    for (uint32_t r : plan.returned) {
      if (r == kNone) {
        call.returned_.emplace_back();
        continue;
      }
      size_t position = 0;
      for (uint32_t i = 0; i < r - plan.operands; ++i) position += plan.allocations[i].output;
      call.returned_.push_back(outputs[position]);
    }
    return true;
  }

  static void run(Call& call) {
    pass_gate();
    find_and_run(call);
    pass_gate();
  }

  static void find_and_run(Call& call) {
    // Outputs are allocated on the current device.
    struct Current {
      c10::DeviceIndex previous;
      explicit Current(c10::DeviceIndex d) : previous(exchange_device_unchecked(d)) {}
      ~Current() { exchange_device_unchecked(previous); }
    } current(call.device_);
    // A huge operand that the kernel sees through several windows is another signature.
    const auto limit = device_properties(call.device_).max_binding;
    for (size_t i = 0; i < call.operands_.size(); ++i) {
      if (!call.operands_[i].data) continue;
      const auto size = static_cast<int64_t>(locate(call.operands_[i].data).memory_size);
      if (size > limit) call.key_.push_back(0xfeull << 56 | static_cast<uint64_t>(i) << 32 | static_cast<uint64_t>((size + limit - 1) / limit));
    }
    // How Triton's kernels multiply float32 follows torch's switches: one for products, one for convolutions.
    if (device_properties(call.device_).language == Language::Triton) {
      const auto& context = at::globalContext();
      const auto convolutions = static_cast<uint64_t>(context.allowTF32CuDNN(at::Float32Op::CONV));
      call.key_.push_back(0xfdull << 56 | convolutions << 1 | static_cast<uint64_t>(context.allowTF32CuBLAS()));
    }
    // Scattered sums are added up in order where torch.use_deterministic_algorithms asks for it.
    if (const auto& context = at::globalContext(); C10_UNLIKELY(context.deterministicAlgorithms())) {
      call.key_.push_back(0xfbull << 56 | static_cast<uint64_t>(context.deterministicAlgorithmsWarnOnly()));
    }
    if (plan_variant) call.key_.push_back(0xfcull << 56 | plan_variant);
    std::shared_ptr<Plan> known = find(call.key_);
    if (known && (!known->expires || known->uses.fetch_add(1, std::memory_order_relaxed) < known->expires)) {
      plans().hits.fetch_add(1, std::memory_order_relaxed);
      if (Replay(call, *known).run()) return;
    }
    plans().misses.fetch_add(1, std::memory_order_relaxed);
    std::shared_ptr<Plan> plan = Recording{call}.record();
    TORCH_CHECK(Replay(call, *plan).run(), op(call.op_).name, ": the recorded plan does not fit its own call");
    publish(call.key_, plan);
  }
};

void Call::run() { Replay::run(*this); }

PlanStatistics plan_statistics() {
  Plans& p = plans();
  std::shared_lock lock(p.mutex);
  return {p.hits.load(), p.misses.load(), p.by_key.size(), p.evicted.load(), p.launches.load()};
}

void set_plan_variant(uint32_t variant) { plan_variant = variant; }

void clear_plans() {
  Plans& p = plans();
  std::unique_lock lock(p.mutex);
  p.by_key.clear();
}

}  // namespace spiral
