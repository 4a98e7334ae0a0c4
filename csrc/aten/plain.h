// What fused paths ask before they take a call away from ATen's own operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

namespace spiral {

// Nothing between the caller and the device that wants to see ATen's own operators.
inline bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet seen{
      c10::DispatchKey::Python,   c10::DispatchKey::Functionalize,        c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::Negative, c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::ZeroTensor};
  return t.device().is_privateuseone() && !t.key_set().has_any(seen) && !t._fw_grad(/*level=*/0).defined();
}

}  // namespace spiral
