// What makes sparse tensors, and tensors of nothing but zeros. Operators on sparse COO tensors are ATen's, in terms of their dense
// indices and values (register_sparse.cpp), or torch_spiral/ops/sparse.py's.
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_to_sparse_native.h>
#include <torch/library.h>

namespace spiral {
namespace {

// A tensor without memory, known to be zero: autograd's gradients of piecewise constant functions.
at::Tensor efficient_zero_tensor(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                                 std::optional<at::Device> device, std::optional<bool>) {
  at::native::ZeroTensorAllocator allocator(c10::device_or_default(device));
  constexpr c10::DispatchKeySet keys{c10::DispatchKey::PrivateUse1, c10::DispatchKey::ZeroTensor};
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), std::nullopt);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_efficientzerotensor", efficient_zero_tensor);
  m.impl("_to_sparse", static_cast<at::Tensor (*)(const at::Tensor&, std::optional<at::Layout>, at::OptionalIntArrayRef,
                                                  std::optional<int64_t>)>(&at::native::dense_to_sparse));
  m.impl("_to_sparse.sparse_dim", static_cast<at::Tensor (*)(const at::Tensor&, int64_t)>(&at::native::dense_to_sparse));
}

}  // namespace
}  // namespace spiral
