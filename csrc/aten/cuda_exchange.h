// Tensors of torch's CUDA (or HIP) backend and spiral tensors of the same GPU, seen as one another without a copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace spiral {

// The spiral device that is the GPU of a CUDA device.
std::optional<c10::DeviceIndex> device_of_cuda(c10::DeviceIndex cuda);
// The CUDA device that is the GPU of a spiral device.
std::optional<c10::DeviceIndex> cuda_of_device(c10::DeviceIndex index);

// Later work of either waits for the earlier work of the other: a device's queue, and the current stream of its GPU.
void order_with_cuda(c10::DeviceIndex index);

// The same memory as a tensor of the other device. Both sides keep it alive; reads and writes in flight are waited for. Later
// work on the two tensors is ordered by order_with_cuda(). Throws where there is no common GPU.
at::Tensor view_of_cuda(const at::Tensor& cuda);
at::Tensor cuda_view_of(const at::Tensor& spiral);

}  // namespace spiral
