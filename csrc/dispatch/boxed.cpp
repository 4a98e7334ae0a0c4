// Ops that Python defines: one boxed kernel sorts the dispatcher's stack into a Call, by the op's schema.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "../runtime/device.h"
#include "ops.h"

namespace spiral {
namespace {

using c10::IValue;
using c10::TypeKind;

struct Argument {
  TypeKind kind;  // of the type inside Optional, List
  bool list, written, slot;
  bool exact;  // its sizes beyond the second follow it, by value
};

struct Signature {
  OpId id = 0;
  std::vector<Argument> arguments;
  std::vector<int> aliases;  // per return: the argument that it is, or -1
  std::vector<bool> lists;   // per return: a list of tensors
};

Signature parse(
    const c10::FunctionSchema& schema, const std::string& name, const std::vector<std::string>& slots,
    const std::vector<std::string>& exact) {
  Signature s;
  s.id = op_id(name);
  for (const c10::Argument& a : schema.arguments()) {
    c10::TypePtr type = a.real_type();
    bool list = false;
    for (;;) {
      if (auto optional = type->cast<c10::OptionalType>()) {
        type = optional->getElementType();
      } else if (auto l = type->cast<c10::ListType>()) {
        type = l->getElementType();
        list = true;
      } else {
        break;
      }
    }
    const TypeKind kind = type->kind();
    const bool named = std::find(slots.begin(), slots.end(), a.name()) != slots.end();
    const bool slot = named || kind == TypeKind::FloatType || kind == TypeKind::NumberType;
    const bool by_size = std::find(exact.begin(), exact.end(), a.name()) != exact.end();
    s.arguments.push_back({kind, list, a.alias_info() && a.alias_info()->isWrite(), slot, by_size});
  }
  for (const c10::Argument& r : schema.returns()) {
    int alias = -1;
    if (r.alias_info()) {
      for (size_t i = 0; i < schema.arguments().size(); ++i) {
        const auto* info = schema.arguments()[i].alias_info();
        if (info && info->beforeSets() == r.alias_info()->beforeSets()) alias = static_cast<int>(i);
      }
    }
    s.aliases.push_back(alias);
    s.lists.push_back(r.type()->kind() == TypeKind::ListType);
  }
  return s;
}

c10::DeviceIndex device_of(const IValue* args, size_t count) {
  auto index = [](const at::Tensor& t) -> int {
    return t.defined() && t.device().is_privateuseone() ? t.device().index() : -1;
  };
  for (size_t i = 0; i < count; ++i) {
    if (args[i].isTensor()) {
      if (int d = index(args[i].toTensor()); d >= 0) return static_cast<c10::DeviceIndex>(d);
    } else if (args[i].isList()) {
      for (const IValue& v : args[i].toListRef()) {
        if (!v.isTensor()) break;
        if (int d = index(v.toTensor()); d >= 0) return static_cast<c10::DeviceIndex>(d);
      }
    } else if (args[i].isDevice() && args[i].toDevice().is_privateuseone() && args[i].toDevice().has_index()) {
      return args[i].toDevice().index();
    }
  }
  return current_device();
}

// kept: numbers of the CPU that came in a list of a foreach op, as tensors of the device; they live until the call has run.
void add(Call& call, const Argument& a, const IValue& v, c10::DeviceIndex device, std::vector<at::Tensor>* kept) {
  if (a.kind == TypeKind::GeneratorType) {
    if (!v.isNone()) call.generator(v.toGenerator());
    call.none();
  } else if (v.isNone()) {
    call.none();
  } else if (v.isTensor()) {
    a.written ? call.out(v.toTensor()) : call.tensor(v.toTensor());
    if (a.exact) call.value(v.toTensor().sizes().slice(std::min<size_t>(2, v.toTensor().dim())));
  } else if (a.list && a.kind == TypeKind::TensorType) {
    const auto& list = v.toListRef();
    c10::SmallVector<at::Tensor, 8> tensors;
    for (const IValue& t : list) tensors.push_back(t.isNone() ? at::Tensor() : t.toTensor());
    if (kept && !a.written) {
      for (at::Tensor& t : tensors) {
        if (!t.defined() || !t.is_cpu() || t.dim() > 0) continue;
        t = t.to(c10::Device(c10::DeviceType::PrivateUse1, device));
        kept->push_back(t);
      }
    }
    const at::ArrayRef<at::Tensor> ref(tensors);
    a.written ? call.outs(ref) : call.tensors(ref);
  } else if (a.list && a.kind == TypeKind::FloatType) {
    const auto list = v.toDoubleVector();
    call.slots(c10::ArrayRef<double>(list));
  } else if (a.list && a.kind == TypeKind::NumberType) {
    call.value(static_cast<int64_t>(v.toListRef().size()));
    for (const IValue& s : v.toListRef()) call.slot(s.toScalar());
  } else if (a.list && a.kind == TypeKind::BoolType) {
    c10::SmallVector<int64_t, 8> bools;
    for (const IValue& b : v.toListRef()) bools.push_back(b.toBool());
    call.value(at::IntArrayRef(bools));
  } else if (a.list) {
    c10::SmallVector<int64_t, 8> ints;
    for (const IValue& i : v.toListRef()) ints.push_back(i.isSymInt() ? i.toSymInt().guard_int(__FILE__, __LINE__) : i.toInt());
    a.slot ? call.slots(at::IntArrayRef(ints)) : call.value(at::IntArrayRef(ints));
  } else if (v.isBool() && !a.slot) {
    call.value(v.toBool());
  } else if (a.slot) {
    v.isDouble() ? call.slot(v.toDouble()) : call.slot(v.toScalar());
  } else if (v.isString()) {
    call.value(std::string_view(v.toStringRef()));
  } else if (a.kind == TypeKind::ScalarTypeType) {
    call.value(v.toScalarType());
  } else if (v.isDouble()) {
    call.value(v.toDouble());
  } else if (v.isDevice()) {
    call.value(static_cast<int64_t>(v.toDevice().index()));
  } else {
    call.value(v.isSymInt() ? v.toSymInt().guard_int(__FILE__, __LINE__) : v.toInt());
  }
}

class Boxed final : public c10::OperatorKernel {
 public:
  Boxed(std::string name, std::vector<std::string> slots, std::vector<std::string> exact)
      : name_(std::move(name)), slots_(std::move(slots)), exact_(std::move(exact)), foreach_(name_.rfind("_foreach_", 0) == 0) {}

  void operator()(const c10::OperatorHandle& handle, c10::DispatchKeySet, torch::jit::Stack* stack) {
    std::call_once(parsed_, [&] { signature_ = parse(handle.schema(), name_, slots_, exact_); });
    const size_t count = signature_.arguments.size();
    const IValue* args = stack->data() + stack->size() - count;
    const c10::DeviceIndex device = device_of(args, count);
    Call call(signature_.id, device);
    std::vector<at::Tensor> kept;
    for (size_t i = 0; i < count; ++i) add(call, signature_.arguments[i], args[i], device, foreach_ ? &kept : nullptr);
    call.run();

    c10::SmallVector<IValue, 4> results;
    size_t next = 0;
    for (size_t i = 0; i < signature_.aliases.size(); ++i) {
      if (signature_.aliases[i] >= 0) {
        results.push_back(args[signature_.aliases[i]]);
      } else if (signature_.lists[i]) {
        c10::List<at::Tensor> list;
        while (next < call.returned().size()) list.push_back(std::move(call.returned()[next++]));
        results.emplace_back(std::move(list));
      } else {
        TORCH_INTERNAL_ASSERT(next < call.returned().size(), name_, ": the lowering returned too few tensors");
        results.emplace_back(std::move(call.returned()[next++]));
      }
    }
    torch::jit::drop(*stack, count);
    for (IValue& r : results) stack->push_back(std::move(r));
  }

 private:
  std::string name_;
  std::vector<std::string> slots_, exact_;
  bool foreach_;  // its lists may hold numbers of the CPU, as binary operators do
  std::once_flag parsed_;
  Signature signature_;
};

}  // namespace

void register_boxed(const std::string& name, const std::vector<std::string>& slots, const std::vector<std::string>& exact) {
  // One library per namespace, never destroyed: the registrations live as long as the process.
  static auto* aten = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static auto* own = new torch::Library(torch::Library::IMPL, "spiral", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  torch::Library* library = name.rfind("spiral::", 0) == 0 ? own : aten;
  library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Boxed>(name, slots, exact)));
}

}  // namespace spiral
