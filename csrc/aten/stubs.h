// Bodies for ATen's DispatchStubs and structured operators: every argument goes into a Call, by its type.
#pragma once

#include <ATen/core/IListRef.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>
#include <c10/core/Scalar.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/OptionalArrayRef.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch/call.h"
#include "dispatch/iterator.h"

namespace spiral {

// Which arguments of a stub differ from the rule of their type, one bit per argument.
using Mask = uint32_t;

template <typename T>
constexpr bool is_tensor = std::is_base_of_v<at::TensorBase, T>;
template <typename T>
constexpr bool is_tensor_list = std::is_same_v<T, at::TensorList> || std::is_same_v<T, at::ITensorListRef>;

inline const at::Tensor& undefined() {
  static const at::Tensor none;
  return none;
}

// Appends an argument that is no output. Numbers with a fraction are slots; integers are slots where `int_slots` says so;
// all else is part of the key.
template <typename T>
void pass(Call& call, const T& v, bool int_slots) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    call.tensor(v);
  } else if constexpr (is_tensor<T>) {
    call.tensor(at::OptionalTensorRef(v).getTensorRef());
  } else if constexpr (std::is_same_v<T, at::OptionalTensorRef>) {
    call.tensor(v.has_value() ? *v : undefined());
  } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
    call.tensor(v ? *v : undefined());
  } else if constexpr (is_tensor_list<T>) {
    call.tensors(v);
  } else if constexpr (std::is_same_v<T, c10::List<std::optional<at::Tensor>>>) {
    std::vector<at::Tensor> tensors;
    for (const std::optional<at::Tensor>& t : v) {
      tensors.push_back(t.value_or(undefined()));
    }
    call.tensors(at::TensorList(tensors));
  } else if constexpr (std::is_same_v<T, std::optional<at::Generator>>) {
    call.generator(v);
  } else if constexpr (std::is_base_of_v<at::TensorIteratorBase, T>) {
    static_assert(!std::is_same_v<T, T>, "iterators are not const");
  } else if constexpr (std::is_same_v<T, at::OptionalScalarRef>) {
    v.has_value() ? call.slot(v.get()) : call.none();
  } else if constexpr (
      std::is_same_v<T, c10::Scalar> || std::is_same_v<T, std::optional<c10::Scalar>> ||
      std::is_same_v<T, std::optional<double>>) {
    call.slot(v);
  } else if constexpr (std::is_floating_point_v<T>) {
    call.slot(static_cast<double>(v));
  } else if constexpr (std::is_same_v<T, bool> || std::is_same_v<T, at::ScalarType>) {
    call.value(v);
  } else if constexpr (std::is_enum_v<T>) {
    call.value(static_cast<int64_t>(v));
  } else if constexpr (std::is_integral_v<T>) {
    int_slots ? call.slot(static_cast<int64_t>(v)) : call.value(static_cast<int64_t>(v));
  } else if constexpr (std::is_same_v<T, std::optional<int64_t>>) {
    int_slots ? call.slot(v) : call.value(v);
  } else if constexpr (std::is_same_v<T, at::IntArrayRef>) {
    int_slots ? call.slots(v) : call.value(v);
  } else if constexpr (std::is_same_v<T, at::OptionalIntArrayRef> || std::is_same_v<T, std::optional<std::string_view>>) {
    call.value(v);
  } else if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    call.value(std::string_view(v));
  } else {
    call.value(v);  // std::array<bool, N>, optionals
  }
}

inline void pass_out(Call& call, const at::TensorBase& v) {
  call.out(at::OptionalTensorRef(v).getTensorRef());
}

template <typename T>
bool append(Call& call, std::remove_reference_t<T>& v, bool outputs, bool is_out, bool int_slots) {
  using Value = std::remove_cv_t<std::remove_reference_t<T>>;
  if constexpr (is_tensor<Value>) {
    // A Tensor& is an output; of const Tensor&, which ATen uses for outputs as well, the mask tells.
    if (is_out || (std::is_lvalue_reference_v<T> && !std::is_const_v<std::remove_reference_t<T>>)) {
      if (outputs) {
        pass_out(call, v);
      }
      return true;
    }
  }
  if (!outputs) {
    if constexpr (std::is_base_of_v<at::TensorIteratorBase, Value>) {
      call.iterator(v);
    } else {
      pass<Value>(call, v, int_slots);
    }
  }
  return true;
}

// An iterator stub: the operands of the iterator, then the further arguments in order (integers are slots).
template <typename Name, typename Fn, Mask outs>
struct IteratorStub;

template <typename Name, typename Iter, typename... Extras, Mask outs>
struct IteratorStub<Name, void (*)(Iter&, Extras...), outs> {
  static void run(Iter& iter, Extras... extras) {
    static const OpId op = op_id(Name::value);
    if constexpr ((std::is_base_of_v<at::TensorIteratorBase, std::remove_reference_t<Extras>> || ...)) {
      TORCH_CHECK_NOT_IMPLEMENTED(iter.can_use_32bit_indexing(), Name::value, ": more than 2^31 bytes");
    }
    run_iterator(op, iter, [&](Call& call) {
      for ([[maybe_unused]] bool outputs : {false, true}) {
        [[maybe_unused]] unsigned i = 1;
        ((append<Extras>(call, extras, outputs, outs >> i & 1, true), ++i), ...);
      }
    });
  }
};

// A stub over tensors: the inputs and other arguments in order, then the outputs in order. An operand that is read and
// written is an output. `outs`, `slots` and `drop` name the outputs that are const, the integers that are slots, and the
// arguments that are left out.
template <typename Name, typename Fn, Mask outs, Mask slots, Mask drop>
struct TensorStub;

template <typename Name, typename Result, typename... Args, Mask outs, Mask slots, Mask drop>
struct TensorStub<Name, Result (*)(Args...), outs, slots, drop> {
  static Result run(Args... args) {
    static const OpId op = op_id(Name::value);
    Call call(op, device_of(args...));
    for (bool outputs : {false, true}) {
      unsigned i = 0;
      ((drop >> i & 1 || append<Args>(call, args, outputs, outs >> i & 1, slots >> i & 1), ++i), ...);
    }
    call.run();
    if constexpr (std::is_same_v<Result, at::Tensor>) {
      return std::move(call.returned()[0]);
    } else if constexpr (std::is_reference_v<Result>) {
      return std::get<0>(std::forward_as_tuple(args...));  // ATen's convention: the result is the first argument
    }
  }

 private:
  template <typename First, typename... Rest>
  static c10::DeviceIndex device_of(const First& first, const Rest&... rest) {
    if constexpr (is_tensor<First>) {
      return first.device().index();
    } else {
      return device_of(rest...);
    }
  }
};

}  // namespace spiral

// Both stand in namespace at::native, whose elaborated type names REGISTER_PRIVATEUSE1_DISPATCH uses.
#define SPIRAL_STUB_NAME(stub)                  \
  namespace {                                   \
  struct stub##_spiral {                        \
    static constexpr const char* value = #stub; \
  };                                            \
  }
#define SPIRAL_ITERATOR_STUB(stub, outs) \
  SPIRAL_STUB_NAME(stub)                 \
  REGISTER_PRIVATEUSE1_DISPATCH(         \
      stub, (&spiral::IteratorStub<stub##_spiral, stub##_DECLARE_DISPATCH_type::FnPtr, outs>::run))
#define SPIRAL_TENSOR_STUB(stub, outs, slots, drop) \
  SPIRAL_STUB_NAME(stub)                            \
  REGISTER_PRIVATEUSE1_DISPATCH(                    \
      stub, (&spiral::TensorStub<stub##_spiral, stub##_DECLARE_DISPATCH_type::FnPtr, outs, slots, drop>::run))
