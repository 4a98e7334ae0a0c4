// Cross entropy of class indices without a tensor of log-probabilities: forward and gradient read the logits once each. The
// kernels are in torch_spiral/ops/losses.py; every other call goes ATen's way, by log_softmax and nll_loss.
#include "dispatch/call.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/cross_entropy_loss_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nll_loss_backward.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "plain.h"

namespace spiral {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool fused(const at::Tensor& x, const at::Tensor& target, const std::optional<at::Tensor>& weight, int64_t reduction, double smoothing) {
  if ((weight && weight->defined()) || smoothing != 0 || reduction < at::Reduction::None || reduction > at::Reduction::Sum) {
    return false;
  }
  if (c10::impl::TorchDispatchModeTLS::any_modes_set() || !is_plain(x) || !is_plain(target) || target.device() != x.device()) {
    return false;
  }
  const at::ScalarType dtype = x.scalar_type();
  const bool floating = dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kDouble;
  return floating && target.scalar_type() == at::kLong && x.dim() == 2 && target.dim() == 1 && x.size(0) == target.size(0) &&
      x.numel() != 0;
}

struct Forward {
  at::Tensor loss, largest, log_total, total;
};

Forward run_forward(const at::Tensor& x, const at::Tensor& target, int64_t reduction, int64_t ignore_index) {
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto state = x.options().dtype(wide).requires_grad(false);
  // Under autocast ATen's log_softmax gives float32.
  const auto dtype = at::autocast::is_autocast_enabled(c10::DeviceType::PrivateUse1) ? wide : x.scalar_type();
  Forward f{
      reduction == at::Reduction::None ? at::empty({x.size(0)}, state.dtype(dtype)) : at::empty({}, state.dtype(dtype)),
      at::empty({x.size(0)}, state), at::empty({x.size(0)}, state), at::empty({}, state)};
  static const OpId id = op_id("cross_entropy");
  Call call(id, x.device().index());
  call.tensor(x);
  call.tensor(target);
  call.value(reduction);
  call.slot(ignore_index);
  for (const at::Tensor& t : {f.loss, f.largest, f.log_total, f.total}) call.out(t);
  call.run();
  return f;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& x, const at::Tensor& target, int64_t reduction, int64_t ignore_index) {
    const Forward f = run_forward(x, target, reduction, ignore_index);
    ctx->save_for_backward({x, target, f.largest, f.log_total, f.total});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    return f.loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &target = saved[1], &largest = saved[2], &log_total = saved[3], &total = saved[4];
    const int64_t reduction = ctx->saved_data["reduction"].toInt(), ignore_index = ctx->saved_data["ignore_index"].toInt();
    at::Tensor dx;
    if (at::GradMode::is_enabled() || !is_plain(grads[0])) {  // a gradient of the gradient is asked for: ATen's operators have one
      const at::Tensor y = at::log_softmax(x, 1);
      const at::Tensor dy =
          at::nll_loss_backward(grads[0].to(y.scalar_type()), y, target, {}, reduction, ignore_index, total.to(y.scalar_type()));
      dx = at::_log_softmax_backward_data(dy, y, 1, x.scalar_type());
    } else {
      dx = at::empty_like(x);
      static const OpId id = op_id("cross_entropy_backward");
      Call call(id, x.device().index());
      call.tensor(grads[0]);
      call.tensor(x);
      call.tensor(target);
      call.tensor(largest);
      call.tensor(log_total);
      call.tensor(total);
      call.value(reduction);
      call.slot(ignore_index);
      call.out(dx);
      call.run();
    }
    return {dx, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor cross_entropy_loss(
    const at::Tensor& x, const at::Tensor& target, const std::optional<at::Tensor>& weight, int64_t reduction,
    c10::SymInt ignore_index, double label_smoothing) {
  const auto ignore = ignore_index.maybe_as_int();
  if (!ignore || !fused(x, target, weight, reduction, label_smoothing)) {
    return at::native::cross_entropy_loss_symint(x, target, weight, reduction, std::move(ignore_index), label_smoothing);
  }
  if (at::GradMode::is_enabled() && x.requires_grad()) return CrossEntropy::apply(x, target, reduction, *ignore);
  return run_forward(x, target, reduction, *ignore).loss;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("cross_entropy_loss", cross_entropy_loss);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("cross_entropy_loss", cross_entropy_loss);
}

}  // namespace
}  // namespace spiral
