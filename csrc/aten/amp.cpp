// Autocast: torch.autocast("spiral") with ATen's own lists of which operators run in which precision.
//
// Products of weights: without gradients a float32 weight is not cast in every call. The product takes it as it is, and where its kernels
// want the narrow form, that is a packed form, kept while the weight is not written (torch_spiral/ops/contraction.py).
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include "../dispatch/call.h"
#include "plain.h"

namespace spiral {
namespace {

using namespace at;  // the lists are written inside it

at::Tensor refuse_binary_cross_entropy(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t) {
  TORCH_CHECK(false,
              "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast. Use "
              "torch.nn.functional.binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss, which are safe.");
}

using MaybeTensor = std::optional<at::Tensor>;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// Whether x @ weight + bias, weight [K, N], is a product that leaves its weight as it is.
bool keeps(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  const bool biased = bias && bias->defined();
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  for (const at::Tensor* t : {&x, &weight, biased ? &*bias : &x}) {
    if (!is_plain(*t) || t->layout() != at::kStrided || t->is_conj() || (at::GradMode::is_enabled() && t->requires_grad())) return false;
  }
  if (biased && (bias->scalar_type() != at::kFloat || bias->dim() != 1 || bias->size(0) != weight.size(1))) return false;
  return weight.scalar_type() == at::kFloat && x.is_floating_point() && x.scalar_type() != at::kDouble && x.dim() >= 2 &&
      x.device() == weight.device() && (!biased || bias->device() == x.device()) && x.size(-1) == weight.size(0) && x.numel() != 0 &&
      weight.numel() != 0;
}

at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  const at::Tensor rows = at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), x, kDevice).reshape({-1, x.size(-1)});
  at::Tensor out = at::empty({rows.size(0), weight.size(1)}, rows.options());
  static const OpId id = op_id("autocast_product");
  Call call(id, x.device().index());
  call.tensor(rows);
  call.tensor(weight);
  call.tensor(bias ? *bias : at::Tensor());
  call.out(out);
  call.run();
  at::DimVector sizes(x.sizes());
  sizes.back() = weight.size(1);
  return x.dim() == 2 ? out : out.view(sizes);
}

template <typename... Args>
auto casts(Args... args) {
  return std::make_tuple(at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), args, kDevice)...);
}

const c10::DispatchKeySet kAutocast(c10::DispatchKey::AutocastPrivateUse1);

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  if (weight.dim() == 2 && keeps(x, weight.t(), bias)) return product(x, weight.t(), bias);
  return std::apply([](auto... a) { return at::linear(a...); }, casts(x, weight, bias));
}

at::Tensor matmul(const at::Tensor& x, const at::Tensor& weight) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  if (weight.dim() == 2 && keeps(x, weight, {})) return product(x, weight, {});
  return std::apply([](auto... a) { return at::matmul(a...); }, casts(x, weight));
}

at::Tensor mm(const at::Tensor& x, const at::Tensor& weight) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  if (x.dim() == 2 && weight.dim() == 2 && keeps(x, weight, {})) return product(x, weight, {});
  return std::apply([](auto... a) { return at::mm(a...); }, casts(x, weight));
}

at::Tensor addmm(const at::Tensor& bias, const at::Tensor& x, const at::Tensor& weight, const at::Scalar& beta, const at::Scalar& alpha) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocast);
  if (x.dim() == 2 && weight.dim() == 2 && beta.equal(1) && alpha.equal(1) && keeps(x, weight, bias)) return product(x, weight, bias);
  const auto [c, a, b] = casts(bias, x, weight);
  return at::addmm(c, a, b, beta, alpha);
}

// ATen's list of operators in lower precision without those above.
struct Others {
  torch::Library& library;

  template <typename Name, typename Function>
  void impl(Name name, Function function) {
    const std::string_view text(static_cast<const char*>(name));
    for (std::string_view ours : {"aten::linear", "aten::matmul", "aten::mm", "aten::addmm"}) {
      if (text == ours) return;
    }
    library.impl(name, function);
  }
};

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FP32_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  Others others{m};
  {
    Others& m = others;
    AT_FORALL_LOWER_PRECISION_FP(LOWER)
  }
  m.impl("linear", linear);
  m.impl("matmul", matmul);
  m.impl("mm", mm);
  m.impl("addmm", addmm);
  AT_FORALL_FP32(FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FP32_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(PROMOTE)
#undef LOWER
#undef FP32
#undef FP32_DTYPE
#undef PROMOTE
  m.impl("binary_cross_entropy", refuse_binary_cross_entropy);
}

}  // namespace
}  // namespace spiral
