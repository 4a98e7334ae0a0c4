// The operators that only the owner of the memory can supply: making tensors, viewing and resizing them, reading one number.
#include "aten/fallback.h"
#include "runtime/device.h"
#include "runtime/memory.h"

#include <ATen/Context.h>
#include <ATen/Dispatch_v2.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/native/ResizeCommon.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace spiral {
namespace {

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using MaybeDevice = std::optional<at::Device>;

void check_factory(Layout layout, std::optional<bool> pin_memory) {
  [[maybe_unused]] static const FallbackMode checked = fallback_mode();  // a wrong SPIRAL_FALLBACK fails the first tensor
  TORCH_CHECK(!layout || *layout == at::kStrided, "spiral tensors are strided; got layout ", *layout);
  TORCH_CHECK(!pin_memory || !*pin_memory, "Only dense CPU tensors can be pinned");
}

at::Tensor& fill_if_deterministic(at::Tensor& tensor) {
  auto& context = at::globalContext();
  if (C10_UNLIKELY(context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())) {
    at::native::fill_empty_deterministic_(tensor);
  }
  return tensor;
}

at::Tensor empty(at::IntArrayRef size, Dtype dtype, Layout layout, MaybeDevice device, std::optional<bool> pin_memory,
                 std::optional<at::MemoryFormat> memory_format) {
  check_factory(layout, pin_memory);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  at::Tensor result = at::detail::empty_generic(size, allocator(), kKeys, c10::dtype_or_default(dtype), memory_format);
  return fill_if_deterministic(result);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout layout, MaybeDevice device,
                         std::optional<bool> pin_memory) {
  check_factory(layout, pin_memory);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  at::Tensor result = at::detail::empty_strided_generic(size, stride, allocator(), kKeys, c10::dtype_or_default(dtype));
  return fill_if_deterministic(result);
}

at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

// ATen's resize functions for the CPU copy through data_ptr; these go through Hooks::resizePrivateUse1Bytes.
void grow_storage(c10::TensorImpl* tensor, size_t bytes) {
  if (tensor->numel() == 0) return;  // as ATen: nothing to hold, whatever the offset
  const c10::Storage& storage = tensor->unsafe_storage();
  TORCH_CHECK(storage, "Tensor: invalid null storage");
  if (bytes > storage.nbytes()) at::native::resize_bytes_nocuda(storage, bytes);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> memory_format) {
  auto* impl = self.unsafeGetTensorImpl();
  const int64_t old_bytes = self.storage() ? static_cast<int64_t>(self.storage().nbytes()) : 0;
  if (self.sizes() != size) {
    at::detail::check_size_nonnegative(size);
    impl->set_sizes_contiguous(size);
    grow_storage(impl, at::detail::computeStorageNbytesContiguous(size, self.dtype().itemsize(), self.storage_offset()));
  }
  if (memory_format) {
    TORCH_CHECK(*memory_format != at::MemoryFormat::Preserve, "Unsupported memory format ", *memory_format);
    impl->empty_tensor_restride(*memory_format);
  }
  auto& context = at::globalContext();
  if (C10_UNLIKELY(context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())) {
    at::native::fill_resize_deterministic_(self, old_bytes);
  }
  return self;
}

at::Tensor& set_storage_offset_(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                                at::IntArrayRef stride) {
  at::native::checkSetStorage(self, source, offset, size, stride);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  const size_t itemsize = self.dtype().itemsize();
  if (stride.data()) {
    impl->set_sizes_and_strides(size, stride);
    grow_storage(impl, at::detail::computeStorageNbytes(size, stride, itemsize, offset));
  } else {
    impl->set_sizes_contiguous(size);
    grow_storage(impl, at::detail::computeStorageNbytesContiguous(size, itemsize, offset));
  }
  return self;
}

at::Tensor& set_(at::Tensor& self) {
  const c10::Device device = self.device();
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, device), allocator(), true);
  return set_storage_offset_(self, std::move(storage), 0, {0}, {});
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  TORCH_CHECK(self.numel() == 1, "a Tensor with ", self.numel(), " elements cannot be converted to Scalar");
  alignas(16) char bytes[16];
  const Location place = locate(self.const_data_ptr());
  read_back(device(self.device().index()), place.memory, place.offset, bytes, self.element_size());
  at::Scalar result;
  AT_DISPATCH_V2(self.scalar_type(), "_local_scalar_dense", AT_WRAP([&] {
                   result = at::Scalar(*reinterpret_cast<const scalar_t*>(bytes));
                 }),
                 AT_EXPAND(AT_ALL_TYPES_AND_COMPLEX), AT_EXPAND(AT_BAREBONES_UNSIGNED_TYPES), AT_EXPAND(AT_FLOAT8_TYPES),
                 at::kComplexHalf, at::kHalf, at::kBool, at::kBFloat16);
  return result;
}

void record_stream(at::Tensor& self, c10::Stream stream) { allocator()->recordStream(self.storage().data_ptr(), stream); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", resize_);
  m.impl("set_", set_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", set_storage_offset_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("record_stream", record_stream);
}

}  // namespace
}  // namespace spiral
