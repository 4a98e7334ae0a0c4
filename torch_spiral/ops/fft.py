"""Fourier transforms of any size: mixed radix passes, or Bluestein's algorithm where a prime factor is large.

A plan is made for one size along the transformed dimension; all its kernels take sizes at launch and are shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import fft as kernels
from ..kernels.nest import cdiv, fold_groups
from ..lowering import Tensor, build, composite, empty, launch, operator, product, target
from .common import contiguous, write_out

COMPLEX_OF = {"f32": "c64", "f64": "c128", "c64": "c64", "c128": "c128"}
REAL_OF = {"c64": "f32", "c128": "f64"}


def _launch(kernel: Any, buffers: list[Tensor], floats: list[Any], integers: list[Any]) -> None:
    """integers[0]: how many items."""
    launch(kernel, buffers, [*floats, *integers], fold_groups(target(), cdiv(integers[0], kernels.WORKGROUP)))


def _transform(x: Tensor, y: Tensor, outer: Any, n: int, inner: Any, kept: int, sign: float, scale: Any) -> None:
    """y [outer, kept, inner] = scale * the first `kept` values of the transform of x [outer, n, inner]."""
    found = kernels.factors(n)
    if found is None:
        _bluestein(x, y, outer, n, inner, kept, sign, scale)
        return
    passes = found or [1]
    complex_ = COMPLEX_OF[x.dtype]
    length, stride = n, inner
    for i, r in enumerate(passes):
        last = i == len(passes) - 1
        to = y if last else empty([outer, n, inner], complex_)
        unrolled = r if r in kernels.UNROLLED or r == 1 else 0
        kernel = build(kernels.fft_pass, x.dtype, to.dtype, unrolled, last)
        butterflies = inner * (n // r)
        block = inner * n
        integers = [
            outer * butterflies * (1 if unrolled else r), butterflies, length, stride, block, inner * kept if last else block, inner * kept, r
        ]  # fmt: skip
        _launch(kernel, [x, to], [scale, sign], integers)
        x, length, stride = to, length // r, stride * r


def _bluestein(x: Tensor, y: Tensor, outer: Any, n: int, inner: Any, kept: int, sign: float, scale: Any) -> None:
    m = 1 << (2 * n - 2).bit_length()
    large = n > 32768
    complex_ = COMPLEX_OF[x.dtype]
    a, spectrum, b, filter_ = (empty(s, complex_) for s in ([outer, m, inner], [outer, m, inner], [m], [m]))

    def step(name: str, buffers: list[Tensor], items: Any, width: Any, limit: Any) -> None:
        kernel = build(kernels.bluestein, name, buffers[0].dtype, buffers[-1].dtype, large)
        _launch(kernel, buffers, [scale, sign], [items, n, m, width, limit])

    step("filter", [b], m, 1, m)
    _transform(b, filter_, 1, m, 1, m, 1.0, 1.0)
    step("in", [x, a], outer * m * inner, inner, m)
    _transform(a, spectrum, outer, m, inner, m, 1.0, 1.0)
    step("multiply", [spectrum, filter_, a], outer * m * inner, inner, m)
    _transform(a, spectrum, outer, m, inner, m, -1.0, 1.0 / m)
    step("out", [spectrum, y], outer * inner * kept, inner, kept)


@operator("fft(Tensor self, int dim, int n, str kind, bool forward, float scale) -> Tensor", coarse=True)
def fft(self: Tensor, dim: int, n: int, kind: str, forward: bool, scale: Any) -> Tensor:
    """The transform along `dim`, where n is the size of the signal. kind: "c2c" (a real input has no imaginary part), "half"
    (the first n // 2 + 1 values), "c2r" (of the first n // 2 + 1 values of a Hermitian sequence, to real numbers)."""
    x = contiguous(self)
    outer, inner = product(x.sizes[:dim]), product(x.sizes[dim + 1 :])
    kept = n // 2 + 1 if kind == "half" else n
    dtype = REAL_OF[x.dtype] if kind == "c2r" else COMPLEX_OF[x.dtype]
    out = empty([*x.sizes[:dim], kept, *x.sizes[dim + 1 :]], dtype)
    if any(s.is_zero for i, s in enumerate(x.sizes) if i != dim):
        return out
    if kind == "c2r":
        full = empty([outer, n, inner], x.dtype)
        _launch(build(kernels.hermitian, x.dtype), [x, full], [], [outer * n * inner, n, inner])
        x = full
    _transform(x, out, outer, n, inner, kept, 1.0 if forward else -1.0, scale)
    return out


def _scale(sizes: Sequence[int], normalization: int) -> float:
    n = math.prod(sizes)
    return (1.0, 1.0 / math.sqrt(n) if n else 1.0, 1.0 / n if n else 1.0)[normalization]


def _check(x: Any) -> None:
    if x.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise RuntimeError(f"Unsupported dtype {str(x.dtype).removeprefix('torch.')}")


def _ordered(x: Any, dims: Sequence[int]) -> tuple[Any, list[int]]:
    """(x with the dims last, in their order, and the others before them by stride; what takes that back): so results get the strides
    that ATen's have, and that fake tensors foretell."""
    others = sorted((d for d in range(x.dim()) if d not in dims), key=x.stride, reverse=True)
    order = [*others, *dims]
    return x.permute(order), [order.index(d) for d in range(x.dim())]


def _by_stride(x: Any, dims: Sequence[int]) -> list[int]:
    return sorted((d % x.dim() for d in dims), key=x.stride, reverse=True)


def _c2c(x: Any, count: int, forward: bool, scale: float, skip: int = 0) -> Any:
    """Complex transforms of `count` dimensions, before the last `skip`."""
    for i in range(count):
        d = x.dim() - 1 - skip - i
        x = torch.ops.spiral.fft(x, d, x.size(d), "c2c", forward, scale if i == count - 1 else 1.0)
    return x


@composite("_fft_c2c")
def fft_c2c(self: Any, dim: Sequence[int], normalization: int, forward: bool) -> Any:
    """Complex to complex over dimensions."""
    _check(self)
    if not dim:
        return self.clone()
    x, back = _ordered(self, _by_stride(self, dim))
    return _c2c(x, len(dim), forward, _scale([self.size(d) for d in dim], normalization)).permute(back)


@composite("_fft_r2c")
def fft_r2c(self: Any, dim: Sequence[int], normalization: int, onesided: bool) -> Any:
    """Real to complex; onesided keeps the first n // 2 + 1 values along the last of the dimensions."""
    _check(self)
    scale = _scale([self.size(d) for d in dim], normalization)
    kind = "half" if onesided else "c2c"
    last = dim[-1] % self.dim()
    x, back = _ordered(self, [*_by_stride(self, dim[:-1]), last])
    x = torch.ops.spiral.fft(x, x.dim() - 1, self.size(last), kind, True, scale if len(dim) == 1 else 1.0)
    return _c2c(x, len(dim) - 1, True, scale, 1).permute(back)


@composite("_fft_c2r")
def fft_c2r(self: Any, dim: Sequence[int], normalization: int, last_dim_size: int) -> Any:
    """The inverse of a onesided _fft_r2c, of size last_dim_size along the last of the dimensions."""
    _check(self)
    scale = _scale([*(self.size(d) for d in dim[:-1]), last_dim_size], normalization)
    x = self
    if len(dim) > 1:
        x, back = _ordered(self, _by_stride(self, dim[:-1]))
        x = _c2c(x, len(dim) - 1, False, 1.0).permute(back)
    x, back = _ordered(x, [dim[-1] % x.dim()])
    return torch.ops.spiral.fft(x, x.dim() - 1, last_dim_size, "c2r", False, scale).permute(back)


@composite("_fft_c2c.out")
def fft_c2c_out(self: Any, dim: Sequence[int], normalization: int, forward: bool, *, out: Any) -> Any:
    return write_out(out, fft_c2c(self, dim, normalization, forward))


@composite("_fft_r2c.out")
def fft_r2c_out(self: Any, dim: Sequence[int], normalization: int, onesided: bool, *, out: Any) -> Any:
    result = fft_r2c(self, dim, normalization, onesided)
    return write_out(out, result)


@composite("_fft_c2r.out")
def fft_c2r_out(self: Any, dim: Sequence[int], normalization: int, last_dim_size: int, *, out: Any) -> Any:
    return write_out(out, fft_c2r(self, dim, normalization, last_dim_size))
