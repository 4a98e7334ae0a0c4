"""Optimizer steps over many parameters a launch, gradient scaling, and the _foreach_ ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels import ir
from ..kernels.ir import where
from ..lowering import Tensor, composite, float_function, lowering, operator
from .common import map_tensors
from .multi import Operand, groups, map_rows

# ---- fused steps -----------------------------------------------------------------------------------------------------


def _step(name: str, function: Callable[..., Any], lists: Sequence[tuple[Sequence[Tensor], str]], values: Sequence[Any], shared: Sequence[Tensor],
          prepare: Callable[..., Any], guard: Tensor | None) -> None:  # fmt: skip
    rows = [
        [Operand(t, mode) for t, (_, mode) in zip(tensors, lists)]
        for tensors in zip(*(tensors for tensors, _ in lists), strict=True)
    ]
    for group in groups(rows):
        map_rows(name, function, group, group[0][0].tensor.dtype, values, shared=shared, prepare=prepare, guard=guard)


@functools.cache
def _body(make: Callable[..., Any], *key: Any) -> Any:
    """make(*key), one function for each key: kernels are cached by function."""
    return make(*key)


def _adam_prepare(scaled: bool) -> Callable[..., Any]:
    def prepare(step: Any, *rest: Any) -> tuple[Any, ...]:
        numbers = list(rest)
        scale = [numbers.pop(0)] if scaled else []
        lr = numbers.pop(0)
        log1, log2, one_beta1, beta2, one_beta2, decay, eps = numbers
        size = lr / -ir.expm1(step * log1)
        root = ir.sqrt(-ir.expm1(step * log2))
        return (size, root, lr * decay, one_beta1, beta2, one_beta2, decay, eps, *scale)

    return prepare


def _adam_body(decoupled: bool, amsgrad: bool, maximize: bool, scaled: bool) -> Callable[..., Any]:
    def f(p: Any, g: Any, m: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
        numbers = list(rest)
        largest = numbers.pop(0) if amsgrad else None
        size, root, lr_decay, one_beta1, beta2, one_beta2, decay, eps, *scale = numbers
        if scaled:
            g = g / scale[0]
        unscaled = g
        if maximize:
            g = -g
        if decoupled:
            p = p - lr_decay * p
        else:
            g = g + decay * p
        m = m + (g - m) * one_beta1
        v = v * beta2 + one_beta2 * g * g
        if amsgrad:
            largest = ir.maximum(largest, v)
        denominator = ir.sqrt(largest if amsgrad else v) / root + eps
        out = [p - size * m / denominator, *([unscaled] if scaled else []), m, v, *([largest] if amsgrad else [])]
        return tuple(out)

    return f


def _adam(decoupled: bool, params: Any, grads: Any, ms: Any, vs: Any, largest: Any, steps: Any, lr: Any, beta1: Any, beta2: Any, decay: Any,
          eps: Any, amsgrad: bool, maximize: bool, scale: Tensor | None, found_inf: Tensor | None) -> None:  # fmt: skip
    scaled, tensor_lr = scale is not None, isinstance(lr, Tensor)
    lists = [(params, "rw"), (grads, "rw" if scaled else "r"), (ms, "rw"), (vs, "rw")]
    if amsgrad:
        lists.append((largest, "rw"))
    lists.append((steps, "0"))
    shared = [t for t in (scale, lr) if isinstance(t, Tensor)]
    values = [] if tensor_lr else [lr]
    values += [
        float_function("FLog", beta1),
        float_function("FLog", beta2),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        decay,
        eps,
    ]
    name = f"adam{'w' * decoupled}{'_ams' * amsgrad}{'_max' * maximize}{'_scaled' * scaled}{'_lr' * tensor_lr}"
    _step(
        name,
        _body(_adam_body, decoupled, amsgrad, maximize, scaled),
        lists,
        values,
        shared,
        _body(_adam_prepare, scaled),
        found_inf,
    )


@lowering("_fused_adam_", coarse=True)
def fused_adam_(*args: Any) -> None:
    """Adam on lists of tensors; (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, weight_decay, eps,
    amsgrad, maximize, grad_scale, found_inf)."""
    _adam(False, *args)


@lowering("_fused_adamw_", coarse=True)
def fused_adamw_(*args: Any) -> None:
    """Adam with decoupled weight decay; arguments as of _fused_adam_."""
    _adam(True, *args)


def _sgd_prepare(scaled: bool) -> Callable[..., Any]:
    def prepare(*numbers: Any) -> tuple[Any, ...]:
        return (*numbers[1:], numbers[0]) if scaled else numbers

    return prepare


def _sgd_body(momentum_used: bool, nesterov: bool, maximize: bool, first: bool, scaled: bool) -> Callable[..., Any]:
    def f(p: Any, g: Any, *rest: Any) -> tuple[Any, ...]:
        numbers = list(rest)
        buffer = numbers.pop(0) if momentum_used else None
        lr, decay, momentum, undamped, *scale = numbers
        if scaled:
            g = g / scale[0]
        unscaled = g
        if maximize:
            g = -g
        g = g + decay * p
        if momentum_used:
            buffer = g if first else momentum * buffer + undamped * g
            g = g + momentum * buffer if nesterov else buffer
        return (p - lr * g, *([unscaled] if scaled else []), *([buffer] if momentum_used else []))

    return f


def _sgd(params: Any, grads: Any, buffers: Any, decay: Any, momentum: Any, lr: Any, dampening: Any, nesterov: bool, maximize: bool, first: bool,
         scale: Tensor | None, found_inf: Tensor | None) -> None:  # fmt: skip
    scaled, used = scale is not None, bool(buffers)
    lists = [(params, "rw"), (grads, "rw" if scaled else "r")]
    if used:
        lists.append((buffers, "rw"))
    shared = [t for t in (scale, lr) if isinstance(t, Tensor)]
    values = [] if isinstance(lr, Tensor) else [lr]
    values += [decay, momentum, 1.0 - dampening]
    name = f"sgd{'_momentum' * used}{'_nesterov' * nesterov}{'_max' * maximize}{'_first' * first}{'_scaled' * scaled}"
    name += "_lr" * isinstance(lr, Tensor)
    _step(
        name,
        _body(_sgd_body, used, nesterov, maximize, first, scaled),
        lists,
        values,
        shared,
        _body(_sgd_prepare, scaled),
        found_inf,
    )


@lowering("_fused_sgd_", coarse=True)
def fused_sgd_(*args: Any) -> None:
    """SGD on lists of tensors; (params, grads, momentum_buffers, weight_decay, momentum, lr, dampening, nesterov, maximize,
    is_first_step, grad_scale, found_inf)."""
    _sgd(*args)


def _adagrad_prepare(scaled: bool) -> Callable[..., Any]:
    def prepare(step: Any, *rest: Any) -> tuple[Any, ...]:
        numbers = list(rest)
        scale = [numbers.pop(0)] if scaled else []
        lr, lr_decay, decay, eps = numbers
        return (lr / (1.0 + (step - 1.0) * lr_decay), decay, eps, *scale)

    return prepare


def _adagrad_body(maximize: bool, scaled: bool) -> Callable[..., Any]:
    def f(p: Any, g: Any, total: Any, lr: Any, decay: Any, eps: Any, *scale: Any) -> tuple[Any, ...]:
        if scaled:
            g = g / scale[0]
        unscaled = g
        if maximize:
            g = -g
        g = g + decay * p
        total = total + g * g
        return (p - lr * g / (ir.sqrt(total) + eps), *([unscaled] if scaled else []), total)

    return f


def _adagrad(params: Any, grads: Any, sums: Any, steps: Any, lr: Any, lr_decay: Any, decay: Any, eps: Any, maximize: bool, scale: Tensor | None,
             found_inf: Tensor | None) -> None:  # fmt: skip
    scaled = scale is not None
    lists = [(params, "rw"), (grads, "rw" if scaled else "r"), (sums, "rw"), (steps, "0")]
    shared = [t for t in (scale, lr) if isinstance(t, Tensor)]
    values = [*([] if isinstance(lr, Tensor) else [lr]), lr_decay, decay, eps]
    name = f"adagrad{'_max' * maximize}{'_scaled' * scaled}{'_lr' * isinstance(lr, Tensor)}"
    _step(
        name, _body(_adagrad_body, maximize, scaled), lists, values, shared, _body(_adagrad_prepare, scaled), found_inf
    )


@lowering("_fused_adagrad_", coarse=True)
def fused_adagrad_(*args: Any) -> None:
    """Adagrad on lists of tensors; (params, grads, state_sums, steps, lr, lr_decay, weight_decay, eps, maximize, grad_scale,
    found_inf)."""
    _adagrad(*args)


def _tensor_lr(name: str) -> None:
    """The overload whose learning rate is a tensor: of the device, or of the host, whose number is taken."""
    schema = str(torch._C._get_schema(f"aten::{name}", "tensor_lr"))
    definition = schema.replace(f"aten::{name}.tensor_lr", f"{name}tensor_lr")
    operator(definition, coarse=True)(lambda *args: {"_fused_adam_": fused_adam_, "_fused_adamw_": fused_adamw_, "_fused_sgd_": fused_sgd_,
                                                     "_fused_adagrad_": fused_adagrad_}[name](*args))  # fmt: skip

    @composite(f"{name}.tensor_lr")
    def body(*args: Any, lr: torch.Tensor, **kwargs: Any) -> None:
        if lr.device.type == "spiral":
            getattr(torch.ops.spiral, f"{name}tensor_lr")(*args, lr=lr, **kwargs)
        else:
            getattr(torch.ops.aten, name)(*args, lr=lr.item(), **kwargs)


for _name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"):
    _tensor_lr(_name)


# ---- gradient scaling ------------------------------------------------------------------------------------------------


def _unscale(x: Any, inverse: Any) -> tuple[Any, Any]:
    return x * inverse, ir.logical_not(ir.isfinite(x))


@lowering("_amp_foreach_non_finite_check_and_unscale_", coarse=True)
def amp_unscale_(grads: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Multiplies every gradient by inverse_scale; found_inf becomes 1 where one has an element that is not finite."""
    for group in groups([[Operand(g, "rw")] for g in grads]):
        map_rows("amp_unscale", _unscale, group, group[0][0].tensor.dtype, shared=[inverse_scale], flag=found_inf)


def _update_scale(scale: Any, tracker: Any, found: Any, growth: Any, backoff: Any, interval: Any) -> tuple[Any, Any]:
    bad = ir.ne(found, 0.0)
    due = ir.eq(tracker + 1, interval)
    grown = scale * growth
    grown = where(ir.isfinite(grown), grown, scale)
    return where(bad, scale * backoff, where(due, grown, scale)), where(ir.or_(bad, due), 0, tracker + 1)


@lowering("_amp_update_scale_", slots=("growth_interval",), coarse=True)
def amp_update_scale_(
    scale: Tensor, tracker: Tensor, found_inf: Tensor, growth: Any, backoff: Any, interval: Any
) -> None:
    """Grows the scale after `interval` steps without infinities, shrinks it after one with them. float32, int32 and float32."""
    one = [t.view((1,), (1,)) for t in (scale, tracker, found_inf)]
    map_tensors("amp_update_scale", _update_scale, one[:2], one, (growth, backoff, interval), ("f32", "f32", "i32"))
