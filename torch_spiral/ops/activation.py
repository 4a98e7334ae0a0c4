"""Activations that ATen registers as operators of their own, not as iterator stubs."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import ir
from ..kernels.ir import where
from ..lowering import Iter, Sym, Tensor, check, composite, empty, empty_like, eq, lowering, structured
from . import pointwise as stubs
from .common import broadcast, map_tensors, write_out
from .elementwise import pointwise


def _check_approximation(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise RuntimeError("approximate argument must be either none or tanh.")


@structured("gelu", coarse=True)
def gelu(it: Iter, approximate: str) -> None:
    """x * Phi(x), exactly or by tanh."""
    _check_approximation(approximate)
    pointwise("gelu", it, stubs.gelu, "common", (approximate,))


@structured("gelu_backward", coarse=True)
def gelu_backward(it: Iter, approximate: str) -> None:
    """Gradient of gelu: inputs (grad, x)."""
    _check_approximation(approximate)
    pointwise("gelu_backward", it, stubs.gelu_backward, "common", (approximate,))


@lowering("log_sigmoid_forward", coarse=True)
def log_sigmoid_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """log(sigmoid(x)); the buffer that CPU's backward wants stays empty, as on CUDA."""
    out = empty_like(x)
    map_tensors("log_sigmoid", ir.log_sigmoid, [out], [x])
    return out, empty((0,), x.dtype)


def _log_sigmoid_backward(grad: Any, x: Any) -> Any:
    z = ir.exp(ir.neg(ir.abs(x)))
    negative = ir.lt(x, 0.0)
    share = z / (1.0 + z)
    return grad * where(negative, 1.0 - share, share)


@lowering("log_sigmoid_backward", coarse=True)
def log_sigmoid_backward(grad: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    """Gradient of log_sigmoid_forward; the buffer is not read."""
    out = empty_like(x)
    map_tensors("log_sigmoid_backward", _log_sigmoid_backward, [out], [broadcast(grad, x.sizes), x])
    return out


@composite("log_sigmoid_forward.output")
def log_sigmoid_forward_output(x: torch.Tensor, *, output: torch.Tensor, buffer: torch.Tensor) -> Any:
    """log_sigmoid_forward into given tensors."""
    if output.dtype != x.dtype:
        raise RuntimeError(f"expected scalar type {x.dtype} but found {output.dtype}")
    result, empty_buffer = torch.ops.aten.log_sigmoid_forward(x)
    # Resized without ATen's warning, as upstream's kernel does it.
    return output.resize_(result.shape).copy_(result), buffer.resize_(empty_buffer.shape).copy_(empty_buffer)


@composite("log_sigmoid_backward.grad_input")
def log_sigmoid_backward_out(
    grad: torch.Tensor, x: torch.Tensor, buffer: torch.Tensor, *, grad_input: torch.Tensor
) -> Any:
    """log_sigmoid_backward into a given tensor."""
    return write_out(grad_input, torch.ops.aten.log_sigmoid_backward(grad, x, buffer))


@lowering("glu", coarse=True)
def glu(x: Tensor, dim: int = -1) -> Tensor:
    """a * sigmoid(b), x = (a, b) along dim."""
    if x.ndim == 0:
        raise RuntimeError("glu does not support 0-dimensional tensors")
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-x.ndim}, {x.ndim - 1}], but got {dim})"
        )
    dim = dim % x.ndim
    check(
        eq(x.sizes[dim] % 2, 0),
        "RuntimeError",
        f"Halving dimension must be even, but dimension {dim} is size {{}}",
        x.sizes[dim],
    )
    a, b = _halves(x, dim)
    out = empty(a.sizes, x.dtype)
    map_tensors("glu", stubs.STUBS["glu_stub"][1], [out], [a, b])
    return out


@composite("glu.out")
def glu_out(x: torch.Tensor, dim: int = -1, *, out: torch.Tensor) -> torch.Tensor:
    """glu into a given tensor."""
    return write_out(out, torch.ops.aten.glu(x, dim))


def _glu_backward(a: Any, b: Any, grad: Any) -> Any:
    s = ir.sigmoid(b)
    return s * grad, (1.0 - s) * s * a * grad


@lowering("glu_backward", coarse=True)
def glu_backward(grad: Tensor, x: Tensor, dim: int) -> Tensor:
    """Gradient of a * sigmoid(b), x = (a, b) along dim."""
    dim = dim % x.ndim
    out = empty(x.sizes, x.dtype)
    (a, b), (out_a, out_b) = _halves(x, dim), _halves(out, dim)
    map_tensors("glu_backward", _glu_backward, [out_a, out_b], [a, b, grad])
    return out


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x cut in two along dim."""
    half = x.sizes[dim] // 2
    sizes = [half if d == dim else s for d, s in enumerate(x.sizes)]
    # The strides of the outer dimensions are those of x, not dense in a half.
    strides = [
        Sym(s._ref, "i", s._recorder, s._hint) if d < dim and isinstance(s, Sym) else s for d, s in enumerate(x.strides)
    ]
    return x.view(sizes, strides), x.view(sizes, strides, half * x.strides[dim])


@composite("glu_backward.grad_input")
def glu_backward_out(grad: torch.Tensor, x: torch.Tensor, dim: int, *, grad_input: torch.Tensor) -> Any:
    """glu_backward into a given tensor."""
    return write_out(grad_input, torch.ops.aten.glu_backward(grad, x, dim))
