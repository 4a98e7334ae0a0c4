// Checks that upstream keeps in its CPU and CUDA bodies of structured operators and not in their meta functions. The texts
// are upstream's. Arguments are those of the body.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>

namespace spiral::prechecks {

inline void same_dtype(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(
      a.scalar_type() == b.scalar_type(), "expected m1 and m2 to have the same dtype, but got: ", a.dtype(), " != ", b.dtype());
}

inline void mm(const at::Tensor& self, const at::Tensor& mat2, const at::Tensor&) {
  same_dtype(self, mat2);
}

inline void bmm(const at::Tensor& self, const at::Tensor& mat2, const at::Tensor&) {
  same_dtype(self, mat2);
}

inline void baddbmm(
    const at::Tensor& self, const at::Tensor& batch1, const at::Tensor& batch2, const at::Scalar&, const at::Scalar&,
    const at::Tensor&) {
  same_dtype(batch1, batch2);
  same_dtype(self, batch1);
}

inline void addmv(
    const at::Tensor& self, const at::Tensor& mat, const at::Tensor& vec, const at::Scalar&, const at::Scalar&,
    const at::Tensor&) {
  same_dtype(mat, vec);
  same_dtype(self, mat);
}

inline void softmax(const at::Tensor& self, int64_t, bool half_to_float, const at::Tensor&) {
  TORCH_CHECK(
      !half_to_float || self.scalar_type() == at::kHalf || self.scalar_type() == at::kBFloat16,
      "conversion is supported for Half and BFloat16 type only");
}

inline void log_softmax(const at::Tensor& self, int64_t dim, bool half_to_float, const at::Tensor& out) {
  softmax(self, dim, half_to_float, out);
}

}  // namespace spiral::prechecks
