// mode: sorts, then the lowering looks for the longest run of each row. ATen leaves it to the stub to shape the results.
#include <ATen/core/Tensor.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorCompare.h>
#include <ATen/ops/sort.h>

#include "dispatch/call.h"

namespace spiral {
namespace {

void mode(at::Tensor& values, at::Tensor& indices, const at::Tensor& self, int64_t dim, bool keepdim) {
  static const OpId op = op_id("mode_stub");
  c10::DimVector shape(self.sizes());
  if (shape.empty()) shape.push_back(1);
  shape[static_cast<size_t>(dim)] = 1;
  at::native::resize_output(values, shape);
  at::native::resize_output(indices, shape);
  if (values.numel() > 0) {
    const auto [sorted, order] = at::sort(self.dim() == 0 ? self.unsqueeze(0) : self, /*stable=*/true, dim, /*descending=*/false);
    Call call(op, self.device().index());
    call.tensor(sorted);
    call.tensor(order);
    call.value(dim);
    call.out(values);
    call.out(indices);
    call.run();
  }
  if (!keepdim) {
    values.squeeze_(dim);
    indices.squeeze_(dim);
  }
}

}  // namespace
}  // namespace spiral

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(mode_stub, &spiral::mode)
}  // namespace at::native
