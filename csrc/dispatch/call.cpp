#include "call.h"

#include <ATen/TensorIterator.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <c10/core/DynamicCast.h>
#include <c10/util/llvmMathExtras.h>

#include <cstring>
#include <deque>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "ops.h"
#include "recording.h"

namespace spiral {
namespace {

struct Table {
  std::shared_mutex mutex;
  std::deque<Op> ops;
  std::unordered_map<std::string, OpId> ids;
};

Table& table() {
  static Table* t = new Table;  // never destroyed: calls may come while the process exits
  return *t;
}

int64_t bits(double v) {
  int64_t b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}

bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

}  // namespace

// 0, 1, or 2 + 3 * floor(log2) + divisibility (by 4: 1, by 16: 2). Size in lowering.py decodes it.
uint64_t Call::size_class(int64_t n, bool coarse) {
  if (n < 2) return static_cast<uint64_t>(n);
  const uint64_t divides = (n & 15) == 0 ? 2 : (n & 3) == 0 ? 1 : 0;
  const uint64_t bucket = coarse ? 0 : 63 - static_cast<uint64_t>(c10::llvm::countLeadingZeros(static_cast<uint64_t>(n)));
  return 2 + bucket * 3 + divides;
}

// 0, 1, 2 (dense: the product of the later sizes) or 3; the latter two + 4 or 8 if 4 or 16 divides the stride.
uint64_t stride_class(int64_t stride, int64_t dense) {
  if (stride == 0 || stride == 1) return static_cast<uint64_t>(stride);
  return (stride == dense ? 2 : 3) + ((stride & 15) == 0 ? 8 : (stride & 3) == 0 ? 4 : 0);
}

OpId op_id(std::string_view name) {
  Table& t = table();
  const std::string key(name);
  {
    std::shared_lock lock(t.mutex);
    auto it = t.ids.find(key);
    if (it != t.ids.end()) return it->second;
  }
  std::unique_lock lock(t.mutex);
  auto [it, fresh] = t.ids.try_emplace(key, static_cast<OpId>(t.ops.size()));
  if (fresh) t.ops.push_back(Op{key});
  return it->second;
}

const Op& op(OpId id) {
  Table& t = table();
  std::shared_lock lock(t.mutex);
  return t.ops[id];
}

void set_coarse(OpId id) {
  Table& t = table();
  std::unique_lock lock(t.mutex);
  t.ops[id].coarse = true;
}

Call::Call(OpId id, c10::DeviceIndex device) : op_(id), device_(device), coarse_(op(id).coarse) {
  key_.push_back(static_cast<uint64_t>(id) << 32 | static_cast<uint16_t>(device));
}

void Call::arg(Kind kind, size_t index, size_t count) {
  args_.push_back({kind, static_cast<uint32_t>(count), static_cast<uint32_t>(index)});
}

void Call::operand(const at::Tensor& t, bool written) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  TORCH_CHECK(
      impl->device_type() == c10::DeviceType::PrivateUse1 && impl->device().index() == device_,
      "Expected all tensors to be on the same device, but found at least two devices, spiral:", static_cast<int>(device_),
      " and ", impl->device(), "! (when checking argument for ", op(op_).name, ")");
  const auto sizes = impl->sizes();
  const auto strides = impl->strides();
  const size_t ndim = sizes.size();
  const bool empty = impl->numel() == 0;
  void* data = empty ? nullptr : written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  const void* storage = t.unsafeGetTensorImpl()->unsafe_storage().data();

  const bool channels_last = (ndim == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
                             (ndim == 5 && t.is_contiguous(at::MemoryFormat::ChannelsLast3d));
  // Which earlier operand shares its storage (1 + number, 0: none).
  uint64_t shares = 0;
  for (size_t i = 0; i < operands_.size() && i < 16; ++i) {
    if (storage && operands_[i].storage == storage) {
      shares = i + 1;
      break;
    }
  }
  key_.push_back(
      static_cast<uint64_t>(impl->dtype().toScalarType() == at::ScalarType::Undefined
                                ? 0xff
                                : static_cast<uint8_t>(impl->dtype().toScalarType())) |
      static_cast<uint64_t>(ndim) << 8 | static_cast<uint64_t>(written) << 24 | static_cast<uint64_t>(t.is_conj()) << 25 |
      static_cast<uint64_t>(t.is_neg()) << 26 | static_cast<uint64_t>(aligned16(data)) << 27 | static_cast<uint64_t>(channels_last) << 28 | shares << 32 |
      static_cast<uint64_t>(Kind::Tensor) << 56);

  arg(Kind::Tensor, operands_.size());
  operands_.push_back(
      {data, storage, static_cast<uint32_t>(slots_.size()), static_cast<uint16_t>(ndim),
       static_cast<int8_t>(impl->dtype().toScalarType()), written, false, key_.back()});
  for (int64_t s : sizes) slots_.push_back(s);
  for (int64_t s : strides) slots_.push_back(s);

  // 16 bits a dimension: size class, and stride class of sizes over 1.
  uint64_t word = 0;
  int64_t dense = 1;
  for (size_t i = ndim, filled = 0; i-- > 0;) {
    const uint64_t stride = sizes[i] > 1 ? stride_class(strides[i], dense) : 0;
    if (sizes[i] > 0) dense *= sizes[i];
    word = word << 16 | size_class(sizes[i], coarse_) << 4 | stride;
    if (++filled % 4 == 0 || i == 0) {
      key_.push_back(word);
      word = 0;
    }
  }
}

void Call::tensor(const at::Tensor& t) {
  if (t.defined()) {
    operand(t, false);
  } else {
    key_.push_back(static_cast<uint64_t>(Kind::Undefined) << 56);
    arg(Kind::Undefined, 0);
  }
}

void Call::out(const at::Tensor& t) {
  if (t.defined()) {
    operand(t, true);
  } else {
    tensor(t);
  }
}

void Call::tensors(at::ITensorListRef list) {
  key_.push_back(static_cast<uint64_t>(Kind::List) << 56 | list.size());
  arg(Kind::List, 0, list.size());
  for (const at::Tensor& t : list) tensor(t);
}

void Call::outs(at::ITensorListRef list) {
  key_.push_back(static_cast<uint64_t>(Kind::List) << 56 | list.size());
  arg(Kind::List, 0, list.size());
  for (const at::Tensor& t : list) out(t);
}

void Call::iterator(at::TensorIteratorBase& iter) {
  const size_t ndim = static_cast<size_t>(iter.ndim());
  const size_t operands = static_cast<size_t>(iter.ntensors());
  const auto shape = iter.shape();
  arg(Kind::Iterator, iterators_.size());
  iterators_.push_back(
      {static_cast<uint32_t>(operands_.size()), static_cast<uint32_t>(operands), static_cast<uint32_t>(iter.noutputs()),
       static_cast<uint32_t>(ndim), static_cast<uint32_t>(slots_.size())});
  // The dtype to compute in, where ATen inferred one (unreliable for reductions: their lowerings don't ask).
  struct Peek : at::TensorIteratorBase {
    static at::ScalarType get(const at::TensorIteratorBase& i) { return i.*(&Peek::common_dtype_); }
  };
  const auto common = Peek::get(iter);
  iterators_.back().common_dtype = static_cast<int8_t>(common);
  uint64_t word = static_cast<uint64_t>(Kind::Iterator) << 56 | static_cast<uint64_t>(static_cast<uint8_t>(common)) << 32 | operands << 8 | static_cast<uint64_t>(iter.noutputs()) << 16 | ndim;
  key_.push_back(word);
  word = 0;
  for (size_t d = 0; d < ndim; ++d) {
    slots_.push_back(shape[d]);
    word = word << 8 | size_class(shape[d], coarse_);
    if (d % 8 == 7) {
      key_.push_back(word);
      word = 0;
    }
  }
  key_.push_back(word);
  for (size_t i = 0; i < operands; ++i) {
    const at::TensorBase& t = iter.tensor_base(static_cast<int>(i));
    const at::ScalarType dtype = iter.dtype(static_cast<int>(i));
    const bool written = i < static_cast<size_t>(iter.noutputs());
    const uint64_t head = static_cast<uint64_t>(static_cast<uint8_t>(dtype)) | static_cast<uint64_t>(written) << 8;
    if (t.device().is_cpu()) {
      // A 0-dim operand on the host is a number of this call.
      const void* p = t.const_data_ptr();
      key_.push_back(head | 1u << 9);
      operands_.push_back({nullptr, nullptr, static_cast<uint32_t>(slots_.size()), UINT16_MAX, static_cast<int8_t>(dtype), false, true, key_.back()});
      if (at::isComplexType(dtype)) {
        const auto z = c10::fetch_and_cast<c10::complex<double>>(dtype, p);
        slots_.push_back(bits(z.real()));
        slots_.push_back(bits(z.imag()));
      } else if (at::isFloatingType(dtype)) {
        slots_.push_back(bits(c10::fetch_and_cast<double>(dtype, p)));
      } else {
        slots_.push_back(c10::fetch_and_cast<int64_t>(dtype, p));
      }
      continue;
    }
    TORCH_CHECK(
        t.device().type() == c10::DeviceType::PrivateUse1 && t.device().index() == device_,
        "Expected all tensors to be on the same device, but found at least two devices, spiral:", static_cast<int>(device_),
        " and ", t.device(), "!");
    void* data = iter.data_ptr(static_cast<int>(i));
    const int64_t element = static_cast<int64_t>(iter.element_size(static_cast<int>(i)));
    const auto strides = iter.strides(static_cast<int>(i));
    operands_.push_back(
        {data, t.storage().data(), static_cast<uint32_t>(slots_.size()), static_cast<uint16_t>(ndim), static_cast<int8_t>(dtype), written, true,
         static_cast<uint64_t>(aligned16(data)) << 27});
    word = head | static_cast<uint64_t>(aligned16(data)) << 10;
    for (size_t d = 0; d < ndim; ++d) {
      const int64_t s = strides[d] / element;
      slots_.push_back(s);
      word |= static_cast<uint64_t>(shape[d] <= 1 || s == 0 ? 0 : s == 1 ? 1 : 3) << (16 + 2 * (d % 24));
      if (d % 24 == 23) {
        key_.push_back(word);
        word = 0;
      }
    }
    key_.push_back(word);
  }
}

void Call::value(int64_t v) {
  arg(Kind::Int, key_.size() + 1);
  key_.push_back(static_cast<uint64_t>(Kind::Int) << 56);
  key_.push_back(static_cast<uint64_t>(v));
}

void Call::value(bool v) {
  arg(Kind::Bool, v);
  key_.push_back(static_cast<uint64_t>(Kind::Bool) << 56 | static_cast<uint64_t>(v));
}

void Call::value(double v) {
  arg(Kind::Double, key_.size() + 1);
  key_.push_back(static_cast<uint64_t>(Kind::Double) << 56);
  key_.push_back(static_cast<uint64_t>(bits(v)));
}

void Call::value(std::string_view v) {
  arg(Kind::String, key_.size() + 1, v.size());
  key_.push_back(static_cast<uint64_t>(Kind::String) << 56 | v.size());
  for (size_t i = 0; i < v.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, v.data() + i, std::min<size_t>(8, v.size() - i));
    key_.push_back(word);
  }
}

void Call::value(at::ScalarType v) {
  arg(Kind::Dtype, static_cast<uint8_t>(v));
  key_.push_back(static_cast<uint64_t>(Kind::Dtype) << 56 | static_cast<uint8_t>(v));
}

void Call::value(at::IntArrayRef v) {
  arg(Kind::Ints, key_.size() + 1, v.size());
  key_.push_back(static_cast<uint64_t>(Kind::Ints) << 56 | v.size());
  for (int64_t i : v) key_.push_back(static_cast<uint64_t>(i));
}

void Call::none() {
  arg(Kind::None, 0);
  key_.push_back(static_cast<uint64_t>(Kind::None) << 56);
}

void Call::slot(int64_t v) {
  arg(Kind::SlotInt, slots_.size());
  key_.push_back(static_cast<uint64_t>(Kind::SlotInt) << 56);
  slots_.push_back(v);
}

void Call::slot(double v) {
  arg(Kind::SlotDouble, slots_.size());
  key_.push_back(static_cast<uint64_t>(Kind::SlotDouble) << 56);
  slots_.push_back(bits(v));
}

void Call::slot(const c10::Scalar& v) {
  if (v.isComplex()) {
    arg(Kind::SlotComplex, slots_.size());
    key_.push_back(static_cast<uint64_t>(Kind::SlotComplex) << 56);
    const auto z = v.toComplexDouble();
    slots_.push_back(bits(z.real()));
    slots_.push_back(bits(z.imag()));
  } else if (v.isFloatingPoint()) {
    slot(v.toDouble());
  } else if (v.isBoolean()) {
    arg(Kind::SlotBool, slots_.size());
    key_.push_back(static_cast<uint64_t>(Kind::SlotBool) << 56);
    slots_.push_back(v.toBool());
  } else {
    slot(v.type() == at::ScalarType::UInt64 ? static_cast<int64_t>(v.toUInt64()) : v.toLong());
  }
}

void Call::slots(at::IntArrayRef v) {
  arg(Kind::SlotInts, slots_.size(), v.size());
  key_.push_back(static_cast<uint64_t>(Kind::SlotInts) << 56 | v.size());
  slots_.append(v.begin(), v.end());
}

void Call::slots(c10::ArrayRef<double> v) {
  arg(Kind::SlotDoubles, slots_.size(), v.size());
  key_.push_back(static_cast<uint64_t>(Kind::SlotDoubles) << 56 | v.size());
  for (double d : v) slots_.push_back(bits(d));
}

}  // namespace spiral
