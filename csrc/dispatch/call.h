// One call of an op on its way to a launch plan: what is in the plan's key and what is a slot of it.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/IListRef.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace at {
struct TensorIteratorBase;
}

namespace spiral {

using OpId = uint32_t;

// The number of a lowering's name; Python registers the lowering under the same name.
OpId op_id(std::string_view name);

class Call {
 public:
  Call(OpId op, c10::DeviceIndex device);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void tensor(const at::Tensor& t);  // an input; may be undefined
  void tensors(at::ITensorListRef list);
  void out(const at::Tensor& t);     // exists already and is written
  void outs(at::ITensorListRef list);
  // All operands of an iterator, coalesced and reordered as ATen left them (implemented in call.cpp).
  void iterator(at::TensorIteratorBase& iter);

  // By value: part of the key.
  void value(int64_t v);
  void value(bool v);
  void value(double v);
  void value(std::string_view v);
  void value(const char* v) { value(std::string_view(v)); }
  void value(at::ScalarType v);
  void value(at::IntArrayRef v);
  void value(at::OptionalIntArrayRef v) { v.has_value() ? value(*v) : none(); }
  template <size_t N>
  void value(const std::array<bool, N>& v) {
    for (bool b : v) value(b);
  }
  void none();
  template <typename T>
  void value(const std::optional<T>& v) {
    v ? value(*v) : none();
  }

  // By slot: only the type is part of the key.
  void slot(int64_t v);
  void slot(bool v) = delete;
  void slot(double v);
  void slot(const c10::Scalar& v);
  void slots(at::IntArrayRef v);
  void slots(c10::ArrayRef<double> v);
  template <typename T>
  void slot(const std::optional<T>& v) {
    v ? slot(*v) : none();
  }

  // Where the numbers of a random op come from; philox() in a lowering reserves from it.
  void generator(const std::optional<at::Generator>& g) { generator_ = g; }

  // Replays the plan of this key, recording it first where there is none. What the lowering returned is in
  // returned(); an undefined tensor where it returned None.
  void run();
  c10::SmallVector<at::Tensor, 4>& returned() { return returned_; }

 private:
  friend struct Replay;
  friend struct Recording;

  struct Operand {
    void* data;           // where the tensor starts in the device's address range; null when empty
    const void* storage;  // where its storage starts
    uint32_t first_slot;  // its sizes, then its strides in elements
    uint16_t ndim;
    int8_t dtype;
    bool written;
    bool is_iterator;     // has strides only; the shape is the iterator's
    uint64_t flags;       // its first key word
  };
  struct Iterator {
    uint32_t first_operand, operands, outputs, ndim, shape_slot;
    int8_t common_dtype = 0;
  };
  // What each argument was, to hand it to Python when a plan must be recorded.
  enum class Kind : uint8_t {
    Tensor, Undefined, List, Iterator, None, Int, Bool, Double, String, Dtype, Ints, SlotInt, SlotDouble, SlotBool,
    SlotComplex, SlotInts, SlotDoubles
  };
  struct Arg {
    Kind kind;
    uint32_t count;  // of a list
    uint32_t index;  // into operands_, iterators_, slots_ or key_
  };

  static uint64_t size_class(int64_t n, bool coarse);
  void operand(const at::Tensor& t, bool written);
  void arg(Kind kind, size_t index, size_t count = 1);

  c10::SmallVector<uint64_t, 64> key_;
  c10::SmallVector<int64_t, 64> slots_;
  c10::SmallVector<Operand, 8> operands_;
  c10::SmallVector<Arg, 16> args_;
  c10::SmallVector<Iterator, 1> iterators_;
  c10::SmallVector<at::Tensor, 4> returned_;
  std::optional<at::Generator> generator_;
  OpId op_;
  c10::DeviceIndex device_;
  bool coarse_;  // sizes enter the key as 0, 1 or more, not by bucket
};

}  // namespace spiral
