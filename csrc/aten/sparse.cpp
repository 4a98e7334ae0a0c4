// What makes sparse tensors, and tensors of nothing but zeros. Operators on sparse tensors are ATen's, in terms of their dense
// indices and values (register_sparse.cpp, register_sparse_csr.cpp), or those of torch_spiral/ops/sparse.py and
// sparse_compressed.py.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_to_sparse_native.h>
#include <ATen/ops/zeros.h>
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

// [nnz]: where entries of coordinates `indices` [dims, nnz] lie in a tensor of these sizes, flattened.
at::Tensor flatten_indices(const at::Tensor& indices, at::IntArrayRef size) {
  at::Tensor places = at::zeros({indices.size(1)}, indices.options().dtype(at::kLong));
  for (size_t d = 0; d < size.size(); ++d) places.mul_(size[d]).add_(indices[static_cast<int64_t>(d)]);
  return places;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_efficientzerotensor", efficient_zero_tensor);
  m.impl("_to_sparse", static_cast<at::Tensor (*)(const at::Tensor&, std::optional<at::Layout>, at::OptionalIntArrayRef,
                                                  std::optional<int64_t>)>(&at::native::dense_to_sparse));
  m.impl("_to_sparse.sparse_dim", static_cast<at::Tensor (*)(const at::Tensor&, int64_t)>(&at::native::dense_to_sparse));
}

}  // namespace
}  // namespace spiral

// Declared in a header that wheels do not ship (aten/src/ATen/native/sparse/SparseStubs.h).
namespace at::native {
DECLARE_DISPATCH(Tensor (*)(const Tensor&, c10::IntArrayRef), flatten_indices_stub)
REGISTER_PRIVATEUSE1_DISPATCH(flatten_indices_stub, &spiral::flatten_indices)
}  // namespace at::native
