// index_put_ with accumulate, and in deterministic mode, goes through a stub that gets indices as the caller gave them: masks
// become coordinates here, which waits for their number; the lowering sees broadcast int64 indices of adjacent dimensions.
#define AT_PER_OPERATOR_HEADERS
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/IndexingUtils.h>
#include <ATen/native/TensorAdvancedIndexing.h>

#include "dispatch/call.h"

namespace spiral {
namespace {

void index_put_with_sort(
    at::Tensor& self, const c10::List<std::optional<at::Tensor>>& given, const at::Tensor& value, bool accumulate,
    bool /*unsafe*/) {
  static const OpId op = op_id("index_put_with_sort_stub");
  at::native::checkIndexTensorTypes(given, /*allow_int=*/true);
  std::vector<at::Tensor> indices = at::native::expandTensors(self, given, /*ensure_same_device=*/true);
  try {
    indices = at::expand_outplace(indices);
  } catch (const std::exception&) {
    std::ostringstream shapes;
    for (const at::Tensor& index : indices) {
      if (index.defined()) shapes << (shapes.tellp() > 0 ? ", " : "") << index.sizes();
    }
    TORCH_CHECK_INDEX(
        false, "shape mismatch: indexing tensors could not be broadcast together with shapes ", shapes.str());
  }
  indices.resize(static_cast<size_t>(self.dim()));
  at::Tensor target = self;
  if (!at::native::hasContiguousSubspace(indices)) std::tie(target, indices) = at::native::transposeToFront(target, indices);

  c10::DimVector shape;
  bool placed = false;
  for (size_t d = 0; d < indices.size(); ++d) {
    if (!indices[d].defined()) {
      shape.push_back(target.size(static_cast<int64_t>(d)));
      continue;
    }
    TORCH_CHECK_INDEX(
        target.size(static_cast<int64_t>(d)) != 0 || indices[d].numel() == 0, "index is out of bounds for dimension with size 0");
    if (indices[d].scalar_type() != at::kLong) indices[d] = indices[d].to(at::kLong);
    if (!placed) shape.append(indices[d].sizes().begin(), indices[d].sizes().end());
    placed = true;
  }
  TORCH_CHECK(
      at::is_expandable_to(value.sizes(), shape), "shape mismatch: value tensor of shape ", value.sizes(),
      " cannot be broadcast to indexing result of shape ", at::IntArrayRef(shape));
  if (c10::multiply_integers(shape) == 0) return;
  Call call(op, self.device().index());
  call.tensors(at::TensorList(indices));
  call.tensor(value.expand(shape));
  call.value(accumulate);
  call.out(target);
  call.run();
}

}  // namespace
}  // namespace spiral

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(index_put_with_sort_stub, &spiral::index_put_with_sort)
}  // namespace at::native
