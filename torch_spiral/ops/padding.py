"""Padding by reflection and replication, in 1 to 3 dimensions, and their gradients (gathered, without atomics)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..kernels import ir
from ..kernels.kernel import DTYPES, bits_dtype
from ..lowering import Tensor, all_of, check, empty, eq, le, lowering, lt, structured
from .common import braces, contiguous, fill
from .gathering import Element, channels_last_strides, gather, named, out_variant, planes


def _source(e: Element, n: int, kind: str) -> Any:
    """The input element that the output shows."""
    lead, sizes = e.at[:-n], e.list("in", n)
    at = []
    for o, size, before in zip(e.at[-n:], sizes, e.list("before", n)):
        x = o - before
        if kind == "reflect":
            x = ir.abs(x)
            x = (size - 1) - ir.abs(size - 1 - x)
        at.append(ir.clamp(x, 0, size - 1))
    return e.load("x", [*lead, *at])


def _reflected(e: Element, n: int) -> Any:
    """Sum of the outputs that show the element itself, its mirror image before the start, or the one after the end."""
    lead, x = e.at[:-n], e.at[-n:]
    total = e.var(_accumulator(e), 0)

    def image(which: Sequence[Any]) -> None:
        at, shown = [], []
        for w, i, size, count, before in zip(which, x, e.list("in", n), e.list("out", n), e.list("before", n)):
            place = ir.where(ir.eq(w, 0), i, ir.where(ir.eq(w, 1), -i, 2 * (size - 1) - i)) + before
            image_of_another = ir.or_(ir.eq(w, 0), ir.where(ir.eq(w, 1), ir.gt(i, 0), ir.lt(i, size - 1)))
            shown.append(ir.and_(image_of_another, ir.and_(ir.ge(place, 0), ir.lt(place, count))))
            at.append(ir.clamp(place, 0, count - 1))
        inside = shown[0]
        for s in shown[1:]:
            inside = ir.and_(inside, s)
        total.set(total + ir.where(inside, e.load("grad", [*lead, *at]), 0))

    e.loop([ir.const(3, "i32")] * n, image)
    return _value(total)


def _replicated(e: Element, n: int) -> Any:
    """Sum of the outputs that show the element: elements at the border are shown by all outputs beyond them."""
    lead, x = e.at[:-n], e.at[-n:]
    total = e.var(_accumulator(e), 0)
    first, counts = [], []
    for i, size, count, before in zip(x, e.list("in", n), e.list("out", n), e.list("before", n)):
        low = e.k.let(ir.maximum(ir.where(ir.eq(i, 0), 0, i + before), 0))
        high = ir.minimum(ir.where(ir.eq(i, size - 1), count, i + before + 1), count)
        first.append(low)
        counts.append(e.k.let(high - low))

    def output(index: Sequence[Any]) -> None:
        total.set(total + e.load("grad", [*lead, *(f + i for f, i in zip(first, index))]))

    e.loop(counts, output)
    return _value(total)


def _accumulator(e: Element) -> str:
    dtype = e.buffers["grad"].dtype
    return dtype if DTYPES[dtype].kind == "complex" else e.buffers["grad"].compute


def _value(total: Any) -> Any:
    return ir.Complex(total.re, total.im) if isinstance(total, ir.Complex) else total.as_node()


def _scalars(n: int, x: Tensor, out: Tensor, padding: Sequence[Any]) -> dict[str, Any]:
    before = [padding[2 * (n - 1 - d)] for d in range(n)]
    return {**named("in", x.sizes[x.ndim - n :]), **named("out", out.sizes[out.ndim - n :]), **named("before", before)}


def _pad(kind: str, x: Tensor, padding: Sequence[Any], out: Tensor) -> None:
    n = len(padding) // 2
    if x.is_conj or x.is_neg:
        x = contiguous(x)
    bits = bits_dtype(x.dtype)
    x, out = planes(n, x.with_dtype(bits), out.with_dtype(bits))
    gather(_source, [out], {"x": x}, _scalars(n, x, out, padding), (n, kind))


def _pad_backward(kind: str, grad: Tensor, padding: Sequence[Any], grad_input: Tensor) -> None:
    if grad.is_empty:
        fill(grad_input, 0)
        return
    n = len(padding) // 2
    if grad.is_conj or grad.is_neg:
        grad = contiguous(grad)
    grad, grad_input = planes(n, grad, grad_input)
    scalars = _scalars(n, grad_input, grad, padding)
    scalar = kind == "replicate" or DTYPES[grad.dtype].kind == "complex"
    body = _reflected if kind == "reflect" else _replicated
    gather(body, [grad_input], {"grad": grad}, scalars, (n,), scalar_elements=scalar)


@structured("reflection_pad1d", "reflection_pad3d", coarse=True)
def reflection_pad(self: Tensor, padding: list, out: Tensor) -> None:
    """self with its mirror image, without the border element itself, at both ends of each spatial dimension."""
    _pad("reflect", self, padding, out)


@structured("reflection_pad1d_backward", "reflection_pad3d_backward", coarse=True)
def reflection_pad_backward(grad_output: Tensor, self: Tensor, padding: list, grad_input: Tensor) -> None:
    _pad_backward("reflect", grad_output, padding, grad_input)


@structured("replication_pad1d", "replication_pad2d", "replication_pad3d", coarse=True)
def replication_pad(self: Tensor, padding: list, out: Tensor) -> None:
    """self with its border elements repeated at both ends of each spatial dimension."""
    _pad("replicate", self, padding, out)


@structured("replication_pad1d_backward", coarse=True)
def replication_pad1d_backward(grad_output: Tensor, self: Tensor, padding: list, grad_input: Tensor) -> None:
    _pad_backward("replicate", grad_output, padding, grad_input)


@lowering("reflection_pad2d", slots=("padding",), coarse=True)
def reflection_pad2d(self: Tensor, padding: list) -> Tensor:
    """As reflection_pad, over [N,] C, H, W."""
    check(len(padding) == 4, "RuntimeError", "padding size is expected to be 4, but got: {}", len(padding))
    text = "Expected 3D or 4D (batch mode) tensor with possibly 0 batch size and other non-zero dimensions for input, but got: "
    text += braces(self.ndim)
    check(
        self.ndim in (3, 4) and all_of(*(lt(0, s) for s in self.sizes[self.ndim - 3 :])),
        "RuntimeError",
        text,
        *self.sizes,
    )
    left, right, top, bottom = padding
    height, width = self.sizes[-2:]
    for number, size, pads, dim in (
        (4, width, (left, right), self.ndim - 1),
        (6, height, (top, bottom), self.ndim - 2),
    ):
        text = f"Argument #{number}: Padding size should be less than the corresponding input dimension, but got: "
        text += f"padding ({{}}, {{}}) at dimension {{}} of input {braces(self.ndim)}"
        check(all_of(*(lt(p, size) for p in pads)), "RuntimeError", text, *pads, dim, *self.sizes)
    sizes = [height + top + bottom, width + left + right]
    text = "input (H: {}, W: {}) is too small. Calculated output H: {} W: {}"
    # Upstream accepts an output that is empty in one dimension only.
    check(all_of(*(le(0, s) for s in sizes)), "RuntimeError", text, height, width, *sizes)
    out = empty((*self.sizes[:-2], *sizes), self.dtype, channels_last_strides(self, sizes))
    _pad("reflect", self, padding, out)
    return out


@lowering("reflection_pad2d_backward", slots=("padding",), coarse=True)
def reflection_pad2d_backward(grad_output: Tensor, self: Tensor, padding: list) -> Tensor:
    left, right, top, bottom = padding
    height, width = self.sizes[-2] + top + bottom, self.sizes[-1] + left + right
    text = "grad_output width unexpected. Expected: {}, Got: {}"
    check(eq(width, grad_output.sizes[-1]), "RuntimeError", text, width, grad_output.sizes[-1])
    text = "grad_output height unexpected. Expected: {}, Got: {}"
    check(eq(height, grad_output.sizes[-2]), "RuntimeError", text, height, grad_output.sizes[-2])
    return _backward("reflect", grad_output, self, padding)


@lowering("replication_pad2d_backward", "replication_pad3d_backward", slots=("padding",), coarse=True)
def replication_pad_backward(grad_output: Tensor, self: Tensor, padding: list) -> Tensor:
    n = len(padding) // 2
    check(
        grad_output.ndim == self.ndim,
        "RuntimeError",
        "gradOutput has {} dimensions, self {}",
        grad_output.ndim,
        self.ndim,
    )
    for d, name in zip(range(1, n + 1), ("width", "height", "depth")):
        size = self.sizes[-d] + padding[2 * d - 2] + padding[2 * d - 1]
        text = f"gradOutput {name} unexpected. Expected: {{}}, Got: {{}}"
        check(eq(size, grad_output.sizes[-d]), "RuntimeError", text, size, grad_output.sizes[-d])
    return _backward("replicate", grad_output, self, padding)


def _backward(kind: str, grad_output: Tensor, self: Tensor, padding: Sequence[Any]) -> Tensor:
    n = len(padding) // 2
    grad_input = empty(self.sizes, self.dtype, channels_last_strides(self, self.sizes[self.ndim - n :]))
    if not grad_input.is_empty:
        _pad_backward(kind, grad_output, padding, grad_input)
    return grad_input


for _name, _out in (
    ("reflection_pad2d", "reflection_pad2d.out"),
    ("reflection_pad2d_backward", "reflection_pad2d_backward.grad_input"),
    ("replication_pad2d_backward", "replication_pad2d_backward.grad_input"),
    ("replication_pad3d_backward", "replication_pad3d_backward.grad_input"),
):
    out_variant(_name, _out)
