#include "recording.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <functional>

#include "../runtime/device.h"
#include "../runtime/memory.h"
#include "ops.h"

namespace py = pybind11;

namespace spiral {

namespace {

// Per dimension (slot, class). An iterator's key tells only 0, 1 and other.
py::tuple stride_classes(uint32_t first, size_t ndim, const int64_t* slots, const int64_t* sizes, bool iterator) {
  py::tuple result(ndim);
  int64_t dense = 1;
  for (size_t i = ndim; i-- > 0;) {
    const int64_t s = slots[first + i];
    const uint64_t cls = sizes[i] <= 1 ? 0 : iterator ? (s == 0 || s == 1 ? static_cast<uint64_t>(s) : 3) : stride_class(s, dense);
    if (sizes[i] > 0) dense *= sizes[i];
    result[i] = py::make_tuple(first + i, cls);
  }
  return result;
}

// Between which steps each temporary lives.
void plan_memory(Plan& plan) {
  std::vector<std::pair<Step*, Step*>> lives(plan.allocations.size(), {nullptr, nullptr});
  for (Step& step : plan.steps) {
    for (const Buffer& b : step.buffers) {
      if (b.operand == kErrorBuffer || b.operand < plan.operands) continue;
      auto& [first, last] = lives[b.operand - plan.operands];
      if (!first) first = &step;
      last = &step;
    }
  }
  for (uint32_t i = 0; i < lives.size(); ++i) {
    if (plan.allocations[i].output || !lives[i].first) continue;
    lives[i].first->first.push_back(i);
    lives[i].second->last.push_back(i);
  }
}

}  // namespace

std::shared_ptr<Plan> Recording::record() {
  py::gil_scoped_acquire gil;
  const bool coarse = call.coarse_;
  const int64_t* slots = call.slots_.data();
  using Kind = Call::Kind;

  // A huge operand is seen through several windows: bits 40 to 47 of the flags.
  const int64_t limit = device_properties(call.device_).max_binding;
  auto flags = [&](const Call::Operand& o) {
    const auto size = o.data ? static_cast<int64_t>(locate(o.data).memory_size) : 0;
    const uint64_t windows = size <= limit ? 1 : static_cast<uint64_t>((size + limit - 1) / limit);
    return (o.flags & ((1ull << 40) - 1)) | windows << 40;
  };

  auto operand = [&](size_t number) -> py::object {
    const Call::Operand& o = call.operands_[number];
    py::tuple sizes(o.ndim);
    for (size_t i = 0; i < o.ndim; ++i) {
      sizes[i] = py::make_tuple(o.first_slot + i, Call::size_class(slots[o.first_slot + i], coarse));
    }
    return py::make_tuple(
        "tensor", number, static_cast<int>(o.dtype), sizes,
        stride_classes(o.first_slot + o.ndim, o.ndim, slots, slots + o.first_slot, false), o.written, flags(o));
  };

  size_t position = 0;
  std::function<py::object()> next = [&]() -> py::object {
    const Call::Arg& a = call.args_[position++];
    switch (a.kind) {
      case Kind::Tensor: return operand(a.index);
      case Kind::Undefined:
      case Kind::None: return py::none();
      case Kind::List: {
        py::list list;
        for (uint32_t i = 0; i < a.count; ++i) list.append(next());
        return list;
      }
      case Kind::Iterator: {
        const Call::Iterator& it = call.iterators_[a.index];
        py::list operands;
        for (uint32_t i = 0; i < it.operands; ++i) {
          const Call::Operand& o = call.operands_[it.first_operand + i];
          const bool scalar = o.ndim == UINT16_MAX;
          operands.append(py::make_tuple(
              it.first_operand + i, static_cast<int>(o.dtype), o.first_slot, scalar,
              scalar ? py::tuple() : stride_classes(o.first_slot, it.ndim, slots, slots + it.shape_slot, true), flags(o)));
        }
        py::tuple shape(it.ndim);
        for (uint32_t d = 0; d < it.ndim; ++d) {
          shape[d] = py::make_tuple(it.shape_slot + d, Call::size_class(slots[it.shape_slot + d], coarse));
        }
        return py::make_tuple("iterator", shape, operands, it.outputs, static_cast<int>(it.common_dtype));
      }
      case Kind::Int: return py::int_(static_cast<int64_t>(call.key_[a.index]));
      case Kind::Bool: return py::bool_(a.index != 0);
      case Kind::Double: {
        double d;
        std::memcpy(&d, &call.key_[a.index], sizeof d);
        return py::float_(d);
      }
      case Kind::String: return py::str(reinterpret_cast<const char*>(&call.key_[a.index]), a.count);
      case Kind::Dtype: return py::make_tuple("dtype", a.index);
      case Kind::Ints: {
        py::list list;
        for (uint32_t i = 0; i < a.count; ++i) list.append(py::int_(static_cast<int64_t>(call.key_[a.index + i])));
        return list;
      }
      case Kind::SlotInt: return py::make_tuple("int", a.index);
      case Kind::SlotDouble: return py::make_tuple("float", a.index);
      case Kind::SlotBool: return py::make_tuple("bool", a.index);
      case Kind::SlotComplex: return py::make_tuple("complex", a.index);
      case Kind::SlotInts: return py::make_tuple("ints", a.index, a.count);
      case Kind::SlotDoubles: return py::make_tuple("floats", a.index, a.count);
    }
    return py::none();
  };

  py::list args;
  while (position < call.args_.size()) args.append(next());
  py::list slot_values;
  for (int64_t s : call.slots_) slot_values.append(py::int_(s));
  std::shared_ptr<Plan> plan =
      record_plan(call.op_, call.device_, py::make_tuple(args, slot_values, call.operands_.size()));
  plan->operands = static_cast<uint32_t>(call.operands_.size());
  plan->slots = static_cast<uint32_t>(call.slots_.size());
  plan_memory(*plan);
  return plan;
}

}  // namespace spiral
