// Copies between spiral tensors, from and to the CPU, and between spiral devices; any strides, dtypes and lazy bits.
//
// What lies as one piece moves as one piece. Dtypes change on the CPU on the way there or back, and in a kernel between
// tensors of one device.
#include "aten/cuda_exchange.h"
#include "dispatch/iterator.h"
#include "runtime/device.h"
#include "runtime/memory.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_neg_view.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

namespace spiral {
namespace {

bool on_spiral(const at::Tensor& t) { return t.device().type() == c10::DeviceType::PrivateUse1; }

// The same memory without its conjugate and negative bits.
at::Tensor plain(const at::Tensor& t) {
  at::Tensor result = t;
  if (C10_UNLIKELY(result.is_conj())) result = result.conj();
  if (C10_UNLIKELY(result.is_neg())) result = at::_neg_view(result);
  return result;
}

// One piece of memory without holes, in the same order: sizes being equal, byte i of one is byte i of the other.
bool same_piece(const at::Tensor& a, const at::Tensor& b) {
  return a.dtype() == b.dtype() && a.is_non_overlapping_and_dense() &&
         (a.strides() == b.strides() || (a.is_contiguous() && b.is_contiguous()));
}

void write(const at::Tensor& destination, const void* data) {
  const Location to = locate(destination.mutable_data_ptr());
  bump_epoch(destination.storage().data());
  Device& owner = device(static_cast<c10::DeviceIndex>(to.device));
  DeviceLock lock(owner.mutex);
  owner.engine->write(to.memory, to.offset, data, destination.nbytes());
}

// `bytes` from where `source` starts.
void read(const at::Tensor& source, void* data, size_t bytes, bool asynchronous) {
  const Location from = locate(source.const_data_ptr());
  Device& owner = device(static_cast<c10::DeviceIndex>(from.device));
  if (asynchronous && is_pinned(data)) {
    DeviceLock lock(owner.mutex);
    owner.engine->read_async(from.memory, from.offset, data, bytes);
    pin_until_synchronized(data, owner);
    owner.engine->flush();
  } else {
    read_back(owner, from.memory, from.offset, data, bytes);
  }
}

void copy_on_device(const at::Tensor& source, const at::Tensor& destination) {
  if (same_piece(source, destination) && !source.is_alias_of(destination)) {
    const Location from = locate(source.const_data_ptr()), to = locate(destination.mutable_data_ptr());
    bump_epoch(destination.storage().data());
    Device& owner = device(static_cast<c10::DeviceIndex>(to.device));
    DeviceLock lock(owner.mutex);
    owner.engine->copy(from.memory, from.offset, to.memory, to.offset, destination.nbytes());
    return;
  }
  at::TensorIterator iter = at::TensorIteratorConfig()
                                .add_output(destination)
                                .add_const_input(source)
                                .resize_outputs(false)
                                .check_all_same_dtype(false)
                                .build();
  static const OpId op = op_id("copy_stub");
  run_iterator(op, iter);
}

void copy_from_host(const at::Tensor& source, const at::Tensor& destination) {
  if (same_piece(source, destination)) {
    write(destination, source.const_data_ptr());
    return;
  }
  // Converted and laid out by the CPU as the destination is, or densely where that has holes, to be spread by a kernel.
  const bool dense = destination.is_non_overlapping_and_dense();
  const auto options = at::TensorOptions(destination.dtype()).device(at::kCPU);
  at::Tensor host = dense ? at::empty_strided(destination.sizes(), destination.strides(), options)
                          : at::empty(destination.sizes(), options);
  host.copy_(source);
  if (dense) {
    write(destination, host.const_data_ptr());
    return;
  }
  at::Tensor staging = at::empty(destination.sizes(), destination.options());
  write(staging, host.const_data_ptr());
  copy_on_device(staging, destination);
}

void copy_to_host(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  if (same_piece(source, destination)) {
    read(source, destination.mutable_data_ptr(), destination.nbytes(), non_blocking);
    return;
  }
  // What the elements span, if that isn't much more than they are, and the CPU picks them out. Else a kernel does it.
  const size_t span = at::detail::computeStorageNbytes(source.sizes(), source.strides(), source.element_size());
  if (span > 2 * source.nbytes() + 65536) {
    at::Tensor gathered = at::empty(source.sizes(), source.options());
    copy_on_device(source, gathered);
    copy_to_host(gathered, destination, non_blocking);
    return;
  }
  at::Tensor bytes = at::empty({static_cast<int64_t>(span)}, at::TensorOptions(at::kByte).device(at::kCPU));
  read(source, bytes.mutable_data_ptr(), span, false);
  at::Tensor host = at::empty({0}, source.options().device(at::kCPU));
  host.set_(bytes.storage(), 0, source.sizes(), source.strides());
  destination.copy_(host);
}

void copy_between_devices(const at::Tensor& source, const at::Tensor& destination) {
  at::Tensor host = at::empty(source.sizes(), source.options().device(at::kCPU));
  copy_to_host(source, host, false);
  copy_from_host(host, destination);
}

// Between torch's CUDA backend and here: on the GPU where both have it, else through the host.
void copy_from_other(const at::Tensor& source, const at::Tensor& destination) {
  TORCH_CHECK(source.is_cpu() || source.is_cuda(), "Cannot copy from ", source.device(), " to ", destination.device());
  const auto index = source.is_cuda() ? device_of_cuda(source.device().index()) : std::nullopt;
  if (source.is_cpu()) {
    copy_from_host(source, destination);
  } else if (index == destination.device().index()) {
    copy_on_device(view_of_cuda(source), destination);
    order_with_cuda(*index);
  } else {
    copy_from_host(source.cpu(), destination);
  }
}

void copy_to_other(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  TORCH_CHECK(destination.is_cpu() || destination.is_cuda(), "Cannot copy from ", source.device(), " to ", destination.device());
  const auto index = destination.is_cuda() ? device_of_cuda(destination.device().index()) : std::nullopt;
  if (destination.is_cpu()) {
    copy_to_host(source, destination, non_blocking);
  } else if (index == source.device().index()) {
    copy_on_device(source, view_of_cuda(destination));
    order_with_cuda(*index);
  } else {
    at::Tensor host = at::empty(source.sizes(), source.options().device(at::kCPU));
    copy_to_host(source, host, false);
    destination.copy_(host);
  }
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool non_blocking) {
  if (self.is_same(destination)) return destination;
  TORCH_CHECK(self.layout() == at::kStrided && destination.layout() == at::kStrided,
              "Cannot copy between ", self.layout(), " on ", self.device(), " and ", destination.layout(), " on ",
              destination.device());
  const bool negate = self.is_neg() != destination.is_neg() && destination.scalar_type() != at::kBool;
  const bool conjugate = self.is_conj() != destination.is_conj() && destination.is_complex();
  at::Tensor source = plain(self.sizes() == destination.sizes() ? self : self.expand_as(destination));
  const at::Tensor target = plain(destination);
  at::assert_no_internal_overlap(target);
  if (target.numel() > 0) {
    const c10::OptionalDeviceGuard guard(on_spiral(target) ? target.device() : source.device());
    if (!on_spiral(source)) {
      copy_from_other(source, target);
    } else if (!on_spiral(target)) {
      copy_to_other(source, target, non_blocking && !negate && !conjugate);
    } else if (source.device() == target.device()) {
      copy_on_device(source, target);
    } else {
      copy_between_devices(source, target);
    }
    // What was copied is the memory; where a bit differs the values are brought in line.
    if (C10_UNLIKELY(negate)) target.neg_();
    if (C10_UNLIKELY(conjugate)) target.conj_physical_();
  }
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination) {
  if (self.sizes() != destination.sizes()) {
    destination.resize_(self.sizes());
    // An out= argument that a kernel of the CPU resized: LAPACK's results lie in columns.
    if (self.is_non_overlapping_and_dense()) destination.as_strided_(self.sizes(), self.strides());
  }
  return copy_from(self, destination, false);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
}

// The fallbacks of these keys would resolve the bits by a copy, which is where they came from.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
  m.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
  m.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace spiral
