"""Pooling: max, average, adaptive, fractional and unpooling, over 2 or 3 spatial dimensions.

Backward passes gather: each input element sums over the windows that contain it, so they need no atomics and are
deterministic; only fractional pooling, whose windows are not known any more, adds with atomics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_spiral import _C

from ..kernels import ir
from ..lowering import (
    Tensor,
    all_of,
    check,
    empty,
    eq,
    error_site,
    fill_bytes,
    le,
    lowering,
    lt,
    structured,
    where,
)
from .common import braces, contiguous, copy_to, fill
from .gathering import Element, channels_last_strides, gather, named, out_variant, planes

LOWEST = {
    "f32": float("-inf"), "f64": float("-inf"), "i32": -(2**31), "i64": -(2**63),
}  # fmt: skip


def per_dim(values: Sequence[int], n: int, default: Sequence[int] | None = None) -> list[int]:
    """Kernel sizes and the like for n dimensions; one value stands for all."""
    values = list(values)
    if not values:
        assert default is not None
        return list(default)
    return values * n if len(values) == 1 else values


def window_scalars(
    n: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, Any]:
    kernel, padding, dilation = per_dim(kernel, n), per_dim(padding, n), per_dim(dilation, n)
    stride = per_dim(stride, n, kernel)
    return {
        **named("kernel", kernel),
        **named("stride", stride),
        **named("padding", padding),
        **named("dilation", dilation),
    }


def both(conditions: Sequence[Any]) -> Any:
    result = conditions[0]
    for c in conditions[1:]:
        result = ir.and_(result, c)
    return result


def flat(at: Sequence[Any], sizes: Sequence[Any]) -> Any:
    """The place in a plane."""
    result = at[0]
    for c, s in zip(at[1:], sizes[1:]):
        result = result * s + c
    return result


# ---- windows ----------------------------------------------------------------------------------------------------------
# "fixed" windows have a kernel size, a stride, a padding and a dilation; "adaptive" ones share the input out among the outputs.


def _first(e: Element, n: int, kind: str, o: Sequence[Any]) -> list[Any]:
    """Where windows start, in the input."""
    if kind == "fixed":
        return [e.k.let(x * s - p) for x, s, p in zip(o, e.list("stride", n), e.list("padding", n))]
    return [e.k.let(ir.idiv(x * i, size)) for x, i, size in zip(o, e.list("in", n), e.list("out", n))]


def _last(e: Element, n: int, o: Sequence[Any]) -> list[Any]:
    """Where adaptive windows end."""
    return [
        e.k.let(ir.idiv((x + 1) * i + (size - 1), size)) for x, i, size in zip(o, e.list("in", n), e.list("out", n))
    ]


def _window(e: Element, n: int, kind: str, o: Sequence[Any], body: Any) -> None:
    """body(coordinates in the input, whether each is inside) for the taps of window o."""
    first, sizes = _first(e, n, kind, o), e.list("in", n)
    dilation: list[Any]
    if kind == "fixed":
        counts, dilation = e.list("kernel", n), e.list("dilation", n)
    else:
        last = _last(e, n, o)
        counts, dilation = [e.k.let(ir.idiv(i + (s - 1), s) + 1) for i, s in zip(sizes, e.list("out", n))], [1] * n

    def tap(index: Sequence[Any]) -> None:
        at = [f + i * d for f, i, d in zip(first, index, dilation)]
        ends = last if kind == "adaptive" else sizes
        body(at, both([ir.and_(ir.ge(a, 0), ir.lt(a, s)) for a, s in zip(at, ends)]))

    e.loop(counts, tap)


def _owners(e: Element, n: int, kind: str, at: Sequence[Any], body: Any) -> None:
    """body(window, whether it exists and reaches there) for the windows that may contain the input element `at`."""
    outs, ins = e.list("out", n), e.list("in", n)
    if kind == "fixed":
        stride, padding = e.list("stride", n), e.list("padding", n)
        reach = [e.k.let((s - 1) * d + 1) for s, d in zip(e.list("kernel", n), e.list("dilation", n))]
        padded = [e.k.let(a + p) for a, p in zip(at, padding)]
        newest = [e.k.let(ir.idiv(a, s)) for a, s in zip(padded, stride)]
        counts = [e.k.let(ir.idiv(r + (s - 1), s)) for r, s in zip(reach, stride)]

        def owner(index: Sequence[Any]) -> None:
            o = [x - i for x, i in zip(newest, index)]
            inside = [
                both([ir.ge(x, 0), ir.lt(x, size), ir.lt(a - x * s, r)])
                for x, size, a, s, r in zip(o, outs, padded, stride, reach)
            ]
            body(o, both(inside))

    else:
        oldest = [e.k.let(ir.idiv(a * size, i)) for a, size, i in zip(at, outs, ins)]
        counts = [e.k.let(ir.idiv(size + (i - 1), i) + 1) for size, i in zip(outs, ins)]

        def owner(index: Sequence[Any]) -> None:
            o = [x + i for x, i in zip(oldest, index)]
            inside = [both([ir.lt(x, size), ir.lt(x * i, (a + 1) * size)]) for x, size, i, a in zip(o, outs, ins, at)]
            body(o, both(inside))

    e.loop(counts, owner)


def _clamped(at: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    return [ir.clamp(a, 0, s - 1) for a, s in zip(at, sizes)]


def _sizes(n: int, x: Tensor, out: Tensor) -> dict[str, Any]:
    return {**named("in", x.sizes[x.ndim - n :]), **named("out", out.sizes[out.ndim - n :])}


# ---- max ----------------------------------------------------------------------------------------------------------------


def _max_pool(e: Element, n: int, kind: str) -> tuple[Any, Any]:
    lead, o, sizes = e.at[:-n], e.at[-n:], e.list("in", n)
    compute = e.buffers["x"].compute
    best, place = e.var(compute, LOWEST[compute]), e.var("i32", -1)

    def tap(at: Sequence[Any], inside: Any) -> None:
        v = e.load("x", [*lead, *_clamped(at, sizes)])
        better = ir.or_(ir.gt(v, best), ir.lt(place, 0))
        if compute in ("f32", "f64"):
            better = ir.or_(better, ir.isnan(v))
        better = e.k.let(ir.and_(inside, better))
        best.set(ir.where(better, v, best))
        place.set(ir.where(better, flat(at, sizes), place))

    _window(e, n, kind, o, tap)
    return best.as_node(), place.as_node()


def _max_pool_backward(e: Element, n: int, kind: str) -> Any:
    lead, at, outs = e.at[:-n], e.at[-n:], e.list("out", n)
    compute = e.buffers["grad"].compute
    total, here = e.var(compute, 0), e.k.let(flat(at, e.list("in", n)))

    def owner(o: Sequence[Any], inside: Any) -> None:
        window = [*lead, *_clamped(o, outs)]
        mine = ir.and_(inside, ir.eq(ir.cast(e.load("indices", window), "i32"), here))
        total.set(total + ir.where(mine, e.load("grad", window), 0))

    _owners(e, n, kind, at, owner)
    return total.as_node()


def _max(n: int, kind: str, x: Tensor, out: Tensor, indices: Tensor, scalars: dict[str, Any]) -> None:
    x, out, indices = planes(n, x, out, indices)
    gather(_max_pool, [out, indices], {"x": x}, {**_sizes(n, x, out), **scalars}, (n, kind))


def _max_backward(
    n: int, kind: str, grad: Tensor, x: Tensor, indices: Tensor, grad_input: Tensor, scalars: dict[str, Any]
) -> None:
    if grad.is_empty:
        fill(grad_input, 0)
        return
    grad, indices, grad_input = planes(n, grad, indices, grad_input)
    gather(
        _max_pool_backward,
        [grad_input],
        {"grad": grad, "indices": indices},
        {**_sizes(n, grad_input, grad), **scalars},
        (n, kind),
    )


@structured("max_pool2d_with_indices", coarse=True)
def max_pool2d_with_indices(
    self: Tensor,
    kernel_size: list,
    stride: list,
    padding: list,
    dilation: list,
    ceil_mode: bool,
    out: Tensor,
    indices: Tensor,
) -> None:
    """Largest element of each window, NaN being largest, and its place in the plane."""
    _max(2, "fixed", self, out, indices, window_scalars(2, kernel_size, stride, padding, dilation))


@structured("max_pool2d_with_indices_backward", coarse=True)
def max_pool2d_with_indices_backward(
    grad_output: Tensor, self: Tensor, kernel_size: list, stride: list, padding: list, dilation: list, ceil_mode: bool,
    indices: Tensor, grad_input: Tensor,
) -> None:  # fmt: skip
    scalars = window_scalars(2, kernel_size, stride, padding, dilation)
    _max_backward(2, "fixed", grad_output, self, indices, grad_input, scalars)


@structured("adaptive_max_pool2d", "adaptive_max_pool3d", coarse=True)
def adaptive_max_pool(self: Tensor, output_size: list, out: Tensor, indices: Tensor) -> None:
    """Largest element of each of output_size windows that share the input out."""
    _max(len(output_size), "adaptive", self, out, indices, {})


@structured("adaptive_max_pool2d_backward", coarse=True)
def adaptive_max_pool2d_backward(grad_output: Tensor, self: Tensor, indices: Tensor, grad_input: Tensor) -> None:
    _max_backward(2, "adaptive", grad_output, self, indices, grad_input, {})


@structured("adaptive_max_pool3d_backward", coarse=True)
def adaptive_max_pool3d_backward(grad_output: Tensor, self: Tensor, indices: Tensor, grad_input: Tensor) -> None:
    _max_backward(3, "adaptive", grad_output, self, indices, grad_input, {})


def _pooled(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Any:
    """How many windows a dimension has."""
    windows = (size + (2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0))) // stride + 1
    if ceil_mode:
        windows = where(lt((windows - 1) * stride, size + padding), windows, windows - 1)
    return windows


@lowering("max_pool3d_with_indices", coarse=True)
def max_pool3d_with_indices(
    self: Tensor, kernel_size: list, stride: list, padding: list, dilation: list, ceil_mode: bool
) -> Any:
    """As max_pool2d_with_indices, over [N,] C, T, H, W."""
    for name, values in (("kernel_size", kernel_size), ("padding", padding), ("dilation", dilation)):
        check(
            len(values) in (1, 3),
            "RuntimeError",
            f"max_pool3d: {name} must either be a single int, or a tuple of three ints",
        )
    check(
        len(stride) in (0, 1, 3),
        "RuntimeError",
        "max_pool3d: stride must either be omitted, a single int, or a tuple of three ints",
    )
    check(self.ndim in (4, 5), "RuntimeError", "non-empty 4D or 5D (batch mode) tensor expected for input")
    kernel, pad, dil = (per_dim(v, 3) for v in (kernel_size, padding, dilation))
    step = per_dim(stride, 3, kernel)
    for k, s, p, d in zip(kernel, step, pad, dil):
        check(k > 0, "RuntimeError", "kernel size should be greater than zero, but got kT: {} kH: {} kW: {}", *kernel)
        check(s > 0, "RuntimeError", "stride should be greater than zero, but got dT: {} dH: {} dW: {}", *step)
        check(
            d > 0,
            "RuntimeError",
            "dilation should be greater than zero, but got dilationT: {} dilationH: {} dilationW: {}",
            *dil,
        )
        check(p >= 0, "RuntimeError", "pad must be non-negative, but got pad: {}", p)
        reach = (k - 1) * d + 1
        text = "pad should be at most half of effective kernel size, but got pad={}, kernel_size={} and dilation={}"
        check(p <= reach // 2, "RuntimeError", text, p, k, d)
    text = "max_pool3d_with_indices(): Expected input's non-batch dimensions to have positive length, but input has a shape of "
    text += braces(self.ndim) + " and non-batch dimension 0 has length zero!"
    check(all_of(*(le(1, s) for s in self.sizes[-4:])), "RuntimeError", text, *self.sizes)
    sizes = [_pooled(i, k, s, p, d, ceil_mode) for i, k, s, p, d in zip(self.sizes[-3:], kernel, step, pad, dil)]
    text = "Given input size: ({}x{}x{}x{}). Calculated output size: ({}x{}x{}x{}). Output size is too small"
    check(all_of(*(le(1, s) for s in sizes)), "RuntimeError", text, *self.sizes[-4:], self.sizes[-4], *sizes)
    strides = channels_last_strides(self, sizes)
    out, indices = (empty((*self.sizes[:-3], *sizes), dtype, strides) for dtype in (self.dtype, "i64"))
    if not out.is_empty:
        _max(3, "fixed", self, out, indices, window_scalars(3, kernel, step, pad, dil))
    return out, indices


@lowering("max_pool3d_with_indices_backward", coarse=True)
def max_pool3d_with_indices_backward(
    grad_output: Tensor,
    self: Tensor,
    kernel_size: list,
    stride: list,
    padding: list,
    dilation: list,
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    grad_input = empty(self.sizes, self.dtype, channels_last_strides(self, self.sizes[-3:]))
    if not grad_input.is_empty:
        scalars = window_scalars(3, kernel_size, stride, padding, dilation)
        _max_backward(3, "fixed", grad_output, self, indices, grad_input, scalars)
    return grad_input


# ---- average --------------------------------------------------------------------------------------------------------------


def _divisor(e: Element, n: int, kind: str, o: Sequence[Any], divisor: str) -> Any:
    """What the sum of window o is divided by. divisor: "given", "padded" (counts padding) or "inside"."""
    if divisor == "given":
        return e["divisor"]
    first, ins = _first(e, n, kind, o), e.list("in", n)
    if kind == "adaptive":
        lengths = [b - a for a, b in zip(first, _last(e, n, o))]
    else:
        ends = [ir.minimum(f + k, i + p) for f, k, i, p in zip(first, e.list("kernel", n), ins, e.list("padding", n))]
        if divisor == "inside":
            first = [ir.maximum(f, 0) for f in first]
            ends = [ir.minimum(x, i) for x, i in zip(ends, ins)]
        lengths = [b - a for a, b in zip(first, ends)]
    result = lengths[0]
    for x in lengths[1:]:
        result = result * x
    return result


def _divide(total: Any, divisor: Any) -> Any:
    divisor = ir.cast(divisor, total.dtype)
    return ir.div(total, divisor) if total.dtype in ("f32", "f64") else ir.trunc_divide(total, divisor)


def _avg_pool(e: Element, n: int, kind: str, divisor: str) -> Any:
    lead, o, sizes = e.at[:-n], e.at[-n:], e.list("in", n)
    total, found = e.var(e.buffers["x"].compute, 0), e.var("i32", 0)

    def tap(at: Sequence[Any], inside: Any) -> None:
        v = e.load("x", [*lead, *_clamped(at, sizes)])
        total.set(total + ir.where(inside, v, 0))
        found.set(ir.where(inside, 1, found))

    _window(e, n, kind, o, tap)
    # A window that lies in the padding gives 0, whatever its divisor.
    some = ir.ne(found, 0)
    return ir.where(some, _divide(total.as_node(), ir.where(some, _divisor(e, n, kind, o, divisor), 1)), 0)


def _avg_pool_backward(e: Element, n: int, kind: str, divisor: str) -> Any:
    lead, at, outs = e.at[:-n], e.at[-n:], e.list("out", n)
    total = e.var(e.buffers["grad"].compute, 0)

    def owner(o: Sequence[Any], inside: Any) -> None:
        window = _clamped(o, outs)
        count = ir.where(inside, _divisor(e, n, kind, o, divisor), 1)
        total.set(total + ir.where(inside, _divide(e.load("grad", [*lead, *window]), count), 0))

    _owners(e, n, kind, at, owner)
    return total.as_node()


def _avg(n: int, kind: str, x: Tensor, out: Tensor, scalars: dict[str, Any], divisor: str) -> None:
    x, out = planes(n, x, out)
    gather(_avg_pool, [out], {"x": x}, {**_sizes(n, x, out), **scalars}, (n, kind, divisor))


def _avg_backward(n: int, kind: str, grad: Tensor, grad_input: Tensor, scalars: dict[str, Any], divisor: str) -> None:
    if grad.is_empty:
        fill(grad_input, 0)
        return
    grad, grad_input = planes(n, grad, grad_input)
    gather(
        _avg_pool_backward, [grad_input], {"grad": grad}, {**_sizes(n, grad_input, grad), **scalars}, (n, kind, divisor)
    )


def _avg_scalars(
    n: int, kernel: list, stride: list, padding: list, include_pad: bool, override: int | None
) -> tuple[dict[str, Any], str]:
    scalars = window_scalars(n, kernel, stride, padding, [1])
    if override is not None:
        return {**scalars, "divisor": override}, "given"
    return scalars, "padded" if include_pad else "inside"


@structured("avg_pool2d", coarse=True)
def avg_pool2d(
    self: Tensor, kH: int, kW: int, dH: int, dW: int, padH: int, padW: int, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None, out: Tensor,
) -> None:  # fmt: skip
    """Mean of each window; integers divide towards zero."""
    _avg(2, "fixed", self, out, *_avg_scalars(2, [kH, kW], [dH, dW], [padH, padW], count_include_pad, divisor_override))


@structured("avg_pool3d", coarse=True)
def avg_pool3d(
    self: Tensor, kernel_size: list, stride: list, padding: list, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None, out: Tensor,
) -> None:  # fmt: skip
    _avg(3, "fixed", self, out, *_avg_scalars(3, kernel_size, stride, padding, count_include_pad, divisor_override))


def _register_avg_backward(n: int) -> None:
    @structured(f"avg_pool{n}d_backward", coarse=True)
    def backward(
        grad_output: Tensor, self: Tensor, kernel_size: list, stride: list, padding: list, ceil_mode: bool, count_include_pad: bool,
        divisor_override: int | None, grad_input: Tensor,
    ) -> None:  # fmt: skip
        scalars, divisor = _avg_scalars(n, kernel_size, stride, padding, count_include_pad, divisor_override)
        _avg_backward(n, "fixed", grad_output, grad_input, scalars, divisor)


_register_avg_backward(2)
_register_avg_backward(3)


def _adaptive_avg(n: int, self: Tensor, output_size: list) -> Tensor:
    check(len(output_size) == n, "RuntimeError", f"adaptive_avg_pool{n}d: output_size must be {n}")
    dims = "3D or 4D" if n == 2 else "4D or 5D"
    check(
        self.ndim in (n + 1, n + 2),
        "RuntimeError",
        f"adaptive_avg_pool{n}d(): Expected {dims} tensor, but got {self.ndim}D",
    )
    for i in range(1, n + 1):
        text = f"adaptive_avg_pool{n}d(): Expected input to have non-zero size for non-batch dimensions, but input has dimension {{}} being empty"
        check(lt(0, self.sizes[-i]), "RuntimeError", text, self.ndim - i)
    check(
        all_of(*(le(0, s) for s in output_size)),
        "RuntimeError",
        "elements of output_size must be greater than or equal to 0",
    )
    out = empty((*self.sizes[:-n], *output_size), self.dtype, channels_last_strides(self, output_size))
    if not out.is_empty:
        _avg(n, "adaptive", self, out, {}, "inside")
    return out


def _adaptive_avg_backward(n: int, grad_output: Tensor, self: Tensor) -> Tensor:
    ok = self.ndim in (n + 1, n + 2) and grad_output.ndim == self.ndim
    text = f"adaptive_avg_pool{n}d_backward(): Expected {'3D or 4D' if n == 2 else '4D or 5D'} tensor, but got {grad_output.ndim}D"
    check(ok, "RuntimeError", text)
    check(
        grad_output.dtype == self.dtype,
        "RuntimeError",
        f"expected dtype {self.dtype} for `grad_output` but got dtype {grad_output.dtype}",
    )
    grad_input = empty(self.sizes, self.dtype, channels_last_strides(self, self.sizes[-n:]))
    if not grad_input.is_empty:
        _avg_backward(n, "adaptive", grad_output, grad_input, {}, "inside")
    return grad_input


@lowering("_adaptive_avg_pool2d", slots=("output_size",), coarse=True)
def adaptive_avg_pool2d(self: Tensor, output_size: list) -> Tensor:
    """Mean of each of output_size windows that share the input out."""
    return _adaptive_avg(2, self, output_size)


@lowering("_adaptive_avg_pool3d", slots=("output_size",), coarse=True)
def adaptive_avg_pool3d(self: Tensor, output_size: list) -> Tensor:
    return _adaptive_avg(3, self, output_size)


@lowering("_adaptive_avg_pool2d_backward", coarse=True)
def adaptive_avg_pool2d_backward(grad_output: Tensor, self: Tensor) -> Tensor:
    return _adaptive_avg_backward(2, grad_output, self)


@lowering("_adaptive_avg_pool3d_backward", coarse=True)
def adaptive_avg_pool3d_backward(grad_output: Tensor, self: Tensor) -> Tensor:
    return _adaptive_avg_backward(3, grad_output, self)


# ---- fractional -------------------------------------------------------------------------------------------------------------


def _fractional(e: Element, n: int) -> tuple[Any, Any]:
    """Windows at pseudorandom places: of output o at trunc((o + u) * alpha) - trunc(u * alpha), the last one at the end."""
    lead, o, ins, outs, kernel = e.at[:-n], e.at[-n:], e.list("in", n), e.list("out", n), e.list("kernel", n)
    compute = e.buffers["x"].compute
    first = []
    for d in range(n):
        # Samples are in the order W, H in two dimensions, and T, H, W in three.
        u = e.load("samples", [*lead, ir.const(n - 1 - d if n == 2 else d, "i32")])
        span = ir.cast(ins[d] - kernel[d], u.dtype)
        alpha = ir.div(span, ir.cast(ir.maximum(outs[d] - 1, 1), u.dtype))
        start = ir.cast((ir.cast(o[d], u.dtype) + u) * alpha, "i32") - ir.cast(u * alpha, "i32")
        first.append(e.k.let(ir.where(ir.lt(o[d], outs[d] - 1), start, ins[d] - kernel[d])))
    best, place = e.var(compute, LOWEST[compute]), e.var("i32", flat(first, ins))

    def tap(index: Sequence[Any]) -> None:
        at = [f + i for f, i in zip(first, index)]
        v = e.load("x", [*lead, *_clamped(at, ins)])
        better = e.k.let(ir.or_(ir.gt(v, best), ir.isnan(v)))
        best.set(ir.where(better, v, best))
        place.set(ir.where(better, flat(at, ins), place))

    e.loop(kernel, tap)
    return best.as_node(), place.as_node()


def _fractional_forward(n: int, self: Tensor, kernel: list, samples: Tensor, output: Tensor, indices: Tensor) -> None:
    if self.ndim == n + 1:
        self, output, indices = (x.view((1, *x.sizes), (0, *x.strides)) for x in (self, output, indices))
    check(samples.ndim == 3, "RuntimeError", f"Expect _random_samples to have 3 dimensions got {samples.ndim}")
    check(
        le(self.sizes[0], samples.sizes[0]),
        "RuntimeError",
        "Expect _random_samples.size(0) no less then input batch size.",
    )
    scalars = {**_sizes(n, self, output), **named("kernel", kernel)}
    gather(_fractional, [output, indices], {"x": self, "samples": samples}, scalars, (n,))


@structured("fractional_max_pool2d", coarse=True)
def fractional_max_pool2d(
    self: Tensor, kernel_size: list, output_size: list, random_samples: Tensor, output: Tensor, indices: Tensor
) -> None:
    """Max pooling over output_size windows of kernel_size at places drawn by random_samples [N, C, 2]."""
    _fractional_forward(2, self, kernel_size, random_samples, output, indices)


@structured("fractional_max_pool3d", coarse=True)
def fractional_max_pool3d(
    self: Tensor, poolSizeT: int, poolSizeH: int, poolSizeW: int, outputT: Any, outputH: Any, outputW: Any, random_samples: Tensor,
    output: Tensor, indices: Tensor,
) -> None:  # fmt: skip
    _fractional_forward(3, self, [poolSizeT, poolSizeH, poolSizeW], random_samples, output, indices)


def _scatter_add(e: Element, n: int) -> None:
    lead, at = e.at[:-1], e.at
    place = ir.cast(e.load("indices", at), "i32")
    e.buffers["out"].atomic_add(e.index("out", [*lead, place]), e.load("x", at))


def _plane(n: int, x: Tensor) -> Tensor:
    """A contiguous [N,] C, *spatial as [N * C, spatial]."""
    lead: Any = 1
    for s in x.sizes[: x.ndim - n]:
        lead = lead * s
    spatial: Any = 1
    for s in x.sizes[x.ndim - n :]:
        spatial = spatial * s
    return x.view((lead, spatial))


def _fractional_backward(n: int, grad_output: Tensor, indices: Tensor, grad_input: Tensor) -> None:
    _C.alert_not_deterministic(f"fractional_max_pool{n}d_backward")
    result = grad_input if grad_input.is_contiguous else empty(grad_input.sizes, grad_input.dtype)
    fill_bytes(result, 0)
    if not grad_output.is_empty:
        grad, place, out = (_plane(n, x) for x in (contiguous(grad_output), contiguous(indices), result))
        gather(
            _scatter_add, [], {"x": grad, "indices": place, "out": out}, static=(n,), shape=grad.sizes, modes={"out": "a"},
            scalar_elements=True,
        )  # fmt: skip
    if result is not grad_input:
        copy_to(grad_input, result)


@structured("fractional_max_pool2d_backward", coarse=True)
def fractional_max_pool2d_backward(
    grad_output: Tensor, self: Tensor, kernel_size: list, output_size: list, indices: Tensor, grad_input: Tensor
) -> None:
    _fractional_backward(2, grad_output, indices, grad_input)


@lowering("fractional_max_pool3d_backward", slots=("output_size",), coarse=True)
def fractional_max_pool3d_backward(
    grad_output: Tensor, self: Tensor, kernel_size: list, output_size: list, indices: Tensor
) -> Tensor:
    grad_input = empty(self.sizes, self.dtype)
    if not grad_input.is_empty:
        _fractional_backward(3, grad_output, indices, grad_input)
    return grad_input


# ---- unpooling ----------------------------------------------------------------------------------------------------------------


def _scatter(e: Element, n: int) -> None:
    place = e.k.check_index(e.load("indices", e.at), 0, e["plane"], e["site"])
    e.buffers["out"].store(e.index("out", [e.at[0], place]), e.load("x", e.at))


def _unpool(n: int, self: Tensor, indices: Tensor, output_size: list) -> Tensor:
    check(indices.dtype == "i64", "RuntimeError", f"elements in indices should be type int64 but got: {indices.dtype}")
    check(
        len(output_size) == n,
        "RuntimeError",
        f"There should be exactly {'two' if n == 2 else 'three'} elements in output_size, but got {{}} elements.",
        len(output_size),
    )
    text = f"Input to max_unpooling{n}d should be a {n + 1}d or {n + 2}d Tensor, but got a tensor with {self.ndim} dimensions."
    check(self.ndim in (n + 1, n + 2), "RuntimeError", text)
    same = indices.ndim == self.ndim and all_of(*(eq(a, b) for a, b in zip(self.sizes, indices.sizes)))
    check(same, "RuntimeError", "Expected shape of indices to be same as that of the input tensor")
    text = f"max_unpooling{n}d(): Expected input to have non-zero size for non-batch dimensions, but got a tensor with dimension {{}} being empty."
    for i in range(1, self.ndim):
        check(lt(0, self.sizes[i]), "RuntimeError", text, i)
    out = empty((*self.sizes[:-n], *output_size), self.dtype)
    fill_bytes(out, 0)
    if not self.is_empty:
        x, place, planes_ = (_plane(n, t) for t in (contiguous(self), contiguous(indices), out))
        site = error_site("Found an invalid max index: {}")
        gather(
            _scatter, [], {"x": x, "indices": place, "out": planes_}, {"plane": planes_.sizes[1], "site": ("u32", site)}, (n,),
            shape=x.sizes, modes={"out": "w"}, scalar_elements=True,
        )  # fmt: skip
    return out


@lowering("max_unpool2d", slots=("output_size",), coarse=True)
def max_unpool2d(self: Tensor, indices: Tensor, output_size: list) -> Tensor:
    """Zeros, with each element of self at its index in the plane."""
    return _unpool(2, self, indices, output_size)


@lowering("max_unpool3d", slots=("output_size",), coarse=True)
def max_unpool3d(self: Tensor, indices: Tensor, output_size: list, stride: list, padding: list) -> Tensor:
    check(
        len(stride) == 3,
        "RuntimeError",
        "There should be exactly three elements (depth, height, width) in stride, but got: {} elements.",
        len(stride),
    )
    check(
        len(padding) == 3,
        "RuntimeError",
        "There should be exactly three elements (depth, height, width) in padding, but got: {} elements.",
        len(padding),
    )
    check(min(stride) > 0, "RuntimeError", "strides should be greater than zero, but got stride: [{}, {}, {}]", *stride)
    return _unpool(3, self, indices, output_size)


for _name, _out in (
    ("adaptive_avg_pool2d", "adaptive_avg_pool2d.out"),
    ("adaptive_avg_pool3d", "adaptive_avg_pool3d.out"),
    ("_adaptive_avg_pool3d_backward", "adaptive_avg_pool3d_backward.grad_input"),
    ("max_pool3d_with_indices", "max_pool3d_with_indices.out"),
    ("max_pool3d_with_indices_backward", "max_pool3d_with_indices_backward.grad_input"),
    ("fractional_max_pool3d_backward", "fractional_max_pool3d_backward.grad_input"),
    ("max_unpool2d", "max_unpool2d.out"),
    ("max_unpool3d", "max_unpool3d.out"),
):
    out_variant(_name, _out)
