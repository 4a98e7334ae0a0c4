"""Ops whose natives refused devices other than CPU, CUDA and XPU before torch 2.13; imported there alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import functions
from ..lowering import Tensor, call, composite, empty, operator
from . import losses
from .common import braces
from .reduce import variance_rows

functions.define_float8("f8e4m3fn", 4, 3, 7)  # what is too large became NaN


def _margin_targets(x: Tensor, target: Tensor) -> tuple[str, list[Any]]:
    return f"inconsistent target size, expected {{}} but got {braces(target.ndim)}", [*target.sizes]


losses.margin_targets = _margin_targets


@operator("variance(Tensor self, int[] dim, float correction, bool root) -> (Tensor, Tensor)")
def variance(self: Tensor, dims: Sequence[int], correction: Any, root: bool) -> tuple[Tensor, Tensor]:
    """(variance or standard deviation, mean) over dims, which stay with size 1."""
    sizes = [1 if d in dims else n for d, n in enumerate(self.sizes)]
    var, mean = empty(sizes, self.dtype), empty(sizes, self.dtype)
    variance_rows(self, dims, correction, root, [var, mean])
    return var, mean


def _var_mean(name: str, self: Any, dim: Any, correction: Any, keepdim: bool, root: bool) -> tuple[Any, Any]:
    if not (self.is_floating_point() or self.is_complex()):
        raise RuntimeError(f"{name} only support floating point and complex dtypes")
    if self.is_complex():
        parts = [_var_mean(name, part, dim, correction, keepdim, False) for part in (self.real, self.imag)]
        total = parts[0][0] + parts[1][0]
        return (total.sqrt() if root else total), torch.complex(parts[0][1], parts[1][1])
    dims = sorted(d % max(self.dim(), 1) for d in dim) if dim else list(range(self.dim()))
    if len(set(dims)) != len(dims):
        raise RuntimeError(f"dim {dims} appears multiple times in the list of dims")
    x = self if self.dim() else self.reshape(1)
    sizes = [1 if d in dims else n for d, n in enumerate(self.shape)]
    if x.numel():
        results = torch.ops.spiral.variance(x, dims or [0], 1.0 if correction is None else float(correction), root)
    else:
        results = tuple(torch.full(sizes, math.nan, dtype=self.dtype, device=self.device) for _ in range(2))
    kept = sizes if keepdim else [n for d, n in enumerate(self.shape) if d not in dims]
    return results[0].view(kept), results[1].view(kept)


def _resized(out: Any, result: Any) -> Any:
    if not torch.can_cast(result.dtype, out.dtype):
        raise RuntimeError(f"result type {result.dtype} can't be cast to the desired output type {out.dtype}")
    return out.resize_(result.shape).copy_(result)


def _register(name: str, root: bool) -> None:
    @composite(f"{name}.correction")
    def one(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        return _var_mean(name, self, dim, correction, keepdim, root)[0]

    @composite(f"{name}.correction_out")
    def into(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False, out: Any) -> Any:
        return _resized(out, _var_mean(name, self, dim, correction, keepdim, root)[0])

    @composite(f"{name}_mean.correction")
    def both(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        return _var_mean(f"{name}_mean", self, dim, correction, keepdim, root)


_register("var", False)
_register("std", True)


# ---- distances -------------------------------------------------------------------------------------------------------


@operator("cdist(Tensor a, Tensor b, float p) -> Tensor")
def _cdist(a: Tensor, b: Tensor, p: Any) -> Tensor:
    out = empty([*a.sizes[:-1], b.sizes[-2]], a.dtype)
    call("cdist_stub", a, b, p, out)
    return out


@operator("cdist_backward(Tensor grad, Tensor a, Tensor b, float p, Tensor distance) -> Tensor")
def _cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: Any, distance: Tensor) -> Tensor:
    out = empty(a.sizes, a.dtype)
    call("cdist_backward_stub", grad, a, b, p, distance, out)
    return out


@operator("pdist(Tensor a, float p) -> Tensor")
def _pdist(a: Tensor, p: Any) -> Tensor:
    n = a.sizes[0]
    out = empty((n * (n - 1) // 2,), a.dtype)
    call("pdist_forward_stub", a, p, out)
    return out


@operator("pdist_backward(Tensor grad, Tensor a, float p, Tensor distance) -> Tensor")
def _pdist_backward(grad: Tensor, a: Tensor, p: Any, distance: Tensor) -> Tensor:
    out = empty(a.sizes, a.dtype)
    call("pdist_backward_stub", grad, a, p, distance, out)
    return out


def _batches(x1: Any, x2: Any) -> tuple[Any, Any]:
    """Both contiguous, with the same batch dimensions."""
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    return x1.expand(*batch, *x1.shape[-2:]).contiguous(), x2.expand(*batch, *x2.shape[-2:]).contiguous()


@composite("_cdist_forward")
def cdist_forward(x1: Any, x2: Any, p: float, compute_mode: int | None) -> Any:
    """[..., rows of x1, rows of x2]: distances in the p-norm."""
    if x1.shape[-1] != x2.shape[-1]:
        raise RuntimeError(f"X1 and X2 must have the same number of columns. X1: {x1.shape[-1]} X2: {x2.shape[-1]}")
    a, b = _batches(x1, x2)
    if a.shape[-1] == 0 or a.numel() == 0 or b.numel() == 0:
        return torch.zeros((*a.shape[:-1], b.shape[-2]), dtype=x1.dtype, device=x1.device)
    rows = max(a.shape[-2], b.shape[-2])
    if p == 2 and (compute_mode == 1 or (compute_mode in (None, 0) and rows > 25)):
        return torch.ops.aten._euclidean_dist(a, b)
    return torch.ops.spiral.cdist(a, b, p)


@composite("_cdist_backward")
def cdist_backward(grad: Any, x1: Any, x2: Any, p: float, cdist: Any) -> Any:
    """The gradient of x1, with the batch dimensions of both."""
    a, b = _batches(x1, x2)
    if a.numel() == 0 or b.numel() == 0:
        return torch.zeros_like(x1)
    return torch.ops.spiral.cdist_backward(grad.contiguous(), a, b, p, cdist.contiguous())


@composite("_pdist_forward")
def pdist_forward(self: Any, p: float = 2) -> Any:
    """Distances of all pairs of rows."""
    n = self.shape[0]
    if n < 2 or self.shape[1] == 0:
        return torch.zeros(n * (n - 1) // 2, dtype=self.dtype, device=self.device)
    return torch.ops.spiral.pdist(self.contiguous(), p)


@composite("_pdist_backward")
def pdist_backward(grad: Any, self: Any, p: float, pdist: Any) -> Any:
    if self.numel() == 0 or self.shape[0] < 2:
        return torch.zeros_like(self)
    return torch.ops.spiral.pdist_backward(grad.contiguous(), self.contiguous(), p, pdist.contiguous())
