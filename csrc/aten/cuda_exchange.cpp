#include "aten/cuda_exchange.h"

#include "runtime/device.h"
#include "runtime/memory.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

namespace spiral {
namespace {

constexpr c10::DeviceType kCudaType = c10::DeviceType::CUDA;

bool on_gpu_engine(c10::DeviceIndex index) { return device_properties(index).language == Language::Triton; }

c10::Stream current_cuda_stream(c10::DeviceIndex cuda) {
  return c10::impl::VirtualGuardImpl(kCudaType).getStream(c10::Device(kCudaType, cuda));
}

// A device's queue as torch.cuda numbers streams that it did not make: by the driver's handle.
c10::Stream queue_of(Device& device, c10::DeviceIndex cuda) {
  const auto id = reinterpret_cast<c10::StreamId>(device.engine->native_queue());
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kCudaType, cuda), id);
}

// What `later` does from now on waits for what `earlier` has been given.
void order(const c10::Stream& earlier, const c10::Stream& later) {
  c10::Event event(kCudaType);
  event.record(earlier);
  event.block(later);
}

}  // namespace

std::optional<c10::DeviceIndex> device_of_cuda(c10::DeviceIndex cuda) {
  for (int i = 0; i < device_count(); ++i) {
    const auto index = static_cast<c10::DeviceIndex>(i);
    if (on_gpu_engine(index) && device_properties(index).ordinal == cuda) return index;
  }
  return std::nullopt;
}

std::optional<c10::DeviceIndex> cuda_of_device(c10::DeviceIndex index) {
  if (!on_gpu_engine(index) || !c10::impl::hasDeviceGuardImpl(kCudaType)) return std::nullopt;
  return static_cast<c10::DeviceIndex>(device_properties(index).ordinal);
}

void order_with_cuda(c10::DeviceIndex index) {
  const auto cuda = cuda_of_device(index);
  TORCH_CHECK(cuda, "spiral:", static_cast<int>(index), " (", device_properties(index).engine,
              ") is no device of torch.cuda: there is nothing to wait for");
  Device& owner = device(index);
  const c10::Stream stream = current_cuda_stream(*cuda), queue = queue_of(owner, *cuda);
  DeviceLock lock(owner.mutex);
  owner.engine->flush();
  order(stream, queue);
  order(queue, stream);
}

at::Tensor view_of_cuda(const at::Tensor& cuda) {
  TORCH_CHECK(cuda.is_cuda() && cuda.layout() == at::kStrided, "from_cuda() takes a strided CUDA tensor, not one on ",
              cuda.device());
  const auto index = device_of_cuda(cuda.device().index());
  TORCH_CHECK(index, "No spiral device is the GPU of ", cuda.device(), " through the CUDA engine (SPIRAL_ENGINE, `python -m "
              "torch_spiral`)");
  Device& owner = device(*index);
  const c10::Storage& storage = cuda.storage();
  c10::DataPtr memory = c10::DataPtr(nullptr, c10::Device(c10::DeviceType::PrivateUse1, *index));
  if (storage.nbytes() > 0) {
    const c10::Stream queue = queue_of(owner, cuda.device().index());
    DeviceLock lock(owner.mutex);
    owner.engine->flush();
    order(current_cuda_stream(cuda.device().index()), queue);
    // torch's allocator hands the memory out again only when our queue is done with it.
    c10::impl::VirtualGuardImpl(kCudaType).recordDataPtrOnStream(storage.data_ptr(), queue);
    memory = adopt(*index, reinterpret_cast<uint64_t>(storage.data()), storage.nbytes(), std::make_shared<c10::Storage>(storage));
  }
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), nullptr, false),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), cuda.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(cuda.sym_sizes(), cuda.sym_strides(), cuda.sym_storage_offset());
  view._set_conj(cuda.is_conj());
  view._set_neg(cuda.is_neg());
  return view;
}

at::Tensor cuda_view_of(const at::Tensor& spiral) {
  TORCH_CHECK(spiral.device().type() == c10::DeviceType::PrivateUse1 && spiral.layout() == at::kStrided,
              "to_cuda() takes a strided spiral tensor, not one on ", spiral.device());
  const c10::DeviceIndex index = spiral.device().index();
  const auto cuda = cuda_of_device(index);
  TORCH_CHECK(cuda, spiral.device(), " (", device_properties(index).engine, ") is no device of torch.cuda: its memory cannot be shared");
  const auto options = spiral.options().device(c10::Device(kCudaType, *cuda));
  void* data = nullptr;
  Device& owner = device(index);
  if (spiral.numel() > 0) {
    const Location at = locate(spiral.const_data_ptr());
    data = reinterpret_cast<void*>(owner.engine->address(at.memory) + at.offset);
  }
  bump_epoch(spiral.storage().data());  // it may be written from now on
  order_with_cuda(index);
  // The memory is free for our queue's next work once the stream that is current then has done its part.
  auto release = [kept = spiral, index](void*) mutable {
    if (!in_bad_fork()) order_with_cuda(index);
    kept = at::Tensor();
  };
  at::Tensor view = at::from_blob(data, spiral.sizes(), spiral.strides(), release, options, options.device());
  view._set_conj(spiral.is_conj());
  view._set_neg(spiral.is_neg());
  return view;
}

// Called by torch_spiral/device/exchange.py.
TORCH_LIBRARY_FRAGMENT(spiral, m) {
  m.def("from_cuda(Tensor(a) tensor) -> Tensor(a)");
  m.def("to_cuda(Tensor(a) tensor) -> Tensor(a)");
  m.def("order_with_cuda(int device) -> ()", [](int64_t index) { order_with_cuda(static_cast<c10::DeviceIndex>(index)); });
  m.impl("from_cuda", c10::DispatchKey::CompositeExplicitAutograd, &view_of_cuda);
  m.impl("to_cuda", c10::DispatchKey::CompositeExplicitAutograd, &cuda_view_of);
}

}  // namespace spiral
