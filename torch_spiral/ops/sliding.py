"""Sliding blocks: im2col (unfold) and its adjoint, col2im (fold)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..kernels import ir
from ..kernels.kernel import DTYPES, bits_dtype
from ..lowering import Tensor, all_of, check, empty, eq, le, lowering, lt
from .common import braces, contiguous
from .gathering import Element, gather, named, out_variant


def _im2col(e: Element) -> Any:
    """At [N, C, kH, kW, blocks in H, blocks in W]."""
    batch, channel, *taps = e.at[:4]
    at = [
        o * s - p + t * d
        for o, t, s, p, d in zip(e.at[4:], taps, e.list("stride", 2), e.list("padding", 2), e.list("dilation", 2))
    ]
    sizes = e.list("in", 2)
    inside = [ir.and_(ir.ge(a, 0), ir.lt(a, s)) for a, s in zip(at, sizes)]
    v = e.load("x", [batch, channel, *(ir.clamp(a, 0, s - 1) for a, s in zip(at, sizes))])
    zero = (
        ir.Complex(ir.const(0, v.re.dtype), ir.const(0, v.re.dtype))
        if isinstance(v, ir.Complex)
        else ir.const(0, v.dtype)
    )
    return ir.where(ir.and_(*inside), v, zero)


def _col2im(e: Element) -> Any:
    """At [N, C, H, W]: the sum over the blocks that contain it."""
    batch, channel, *at = e.at
    x = e.buffers["x"]
    total = e.var(x.dtype if DTYPES[x.dtype].kind == "complex" else x.compute, 0)
    stride, dilation = e.list("stride", 2), e.list("dilation", 2)
    padded = [e.k.let(a + p) for a, p in zip(at, e.list("padding", 2))]

    def tap(index: Sequence[Any]) -> None:
        blocks, inside = [], []
        for a, i, s, d, count in zip(padded, index, stride, dilation, e.list("blocks", 2)):
            start = a - i * d
            block = ir.idiv(start, s)
            inside.append(ir.and_(ir.and_(ir.ge(start, 0), ir.eq(block * s, start)), ir.lt(block, count)))
            blocks.append(ir.clamp(block, 0, count - 1))
        total.set(total + ir.where(ir.and_(*inside), e.load("x", [batch, channel, *index, *blocks]), 0))

    e.loop(e.list("kernel", 2), tap)
    return ir.Complex(total.re, total.im) if isinstance(total, ir.Complex) else total.as_node()


def _blocks(size: Any, kernel: int, dilation: int, padding: int, stride: int) -> Any:
    return (size + (2 * padding - dilation * (kernel - 1) - 1)) // stride + 1


def _pairs(kernel_size: list, dilation: list, padding: list, stride: list) -> list[list[int]]:
    names = ("kernel_size", "dilation", "padding", "stride")
    lists = [v * 2 if len(v) == 1 else v for v in (kernel_size, dilation, padding, stride)]
    for name, values in zip(names, lists):
        check(len(values) == 2, "RuntimeError", f"It is expected {name} equals to 2, but got size {{}}", len(values))
    for name, text, values in (
        ("kernel", "kernel size", lists[0]), ("dilation", "dilation", lists[1]), ("stride", "stride", lists[3]),
    ):  # fmt: skip
        check(
            min(values) > 0,
            "RuntimeError",
            f"{text} should be greater than zero, but got {name}_height: {{}} {name}_width: {{}}",
            *values,
        )
    check(
        min(lists[2]) >= 0,
        "RuntimeError",
        "padding should be non-negative, but got pad_height: {} pad_width: {}",
        *lists[2],
    )
    return lists


def _scalars(kernel: list, dilation: list, padding: list, stride: list) -> dict[str, Any]:
    return {**named("dilation", dilation), **named("padding", padding), **named("stride", stride)}


@lowering("im2col", coarse=True)
def im2col(self: Tensor, kernel_size: list, dilation: list, padding: list, stride: list) -> Tensor:
    """The blocks of [N,] C, H, W as columns of [N,] C * kH * kW, blocks."""
    kernel, dilation, padding, stride = _pairs(kernel_size, dilation, padding, stride)
    text = "Expected 3D or 4D (batch mode) tensor with possibly 0 batch size and other non-zero dimensions for input, but got: "
    text += braces(self.ndim)
    check(
        self.ndim in (3, 4) and all_of(*(lt(0, s) for s in self.sizes[self.ndim - 3 :])),
        "RuntimeError",
        text,
        *self.sizes,
    )
    counts = [_blocks(*v) for v in zip(self.sizes[-2:], kernel, dilation, padding, stride)]
    text = (
        "Given input with spatial size ({}, {}), kernel_size=({}, {}), dilation=({}, {}), padding=({}, {}), calculated shape of the "
        "array of sliding blocks as ({}, {}), but its components must be at least one."
    )
    numbers = [*self.sizes[-2:], *kernel, *dilation, *padding, *counts]
    check(all_of(*(lt(0, c) for c in counts)), "RuntimeError", text, *numbers)
    if self.is_conj or self.is_neg:
        self = contiguous(self)
    channels = self.sizes[-3]
    out = empty((*self.sizes[:-3], channels * (kernel[0] * kernel[1]), counts[0] * counts[1]), self.dtype)
    if not out.is_empty:
        bits = bits_dtype(self.dtype)
        x = self.with_dtype(bits)
        if x.ndim == 3:
            x = x.view((1, *x.sizes), (0, *x.strides))
        columns = out.with_dtype(bits).view((x.sizes[0], channels, *kernel, *counts))
        gather(
            _im2col, [columns], {"x": x}, {**named("in", x.sizes[2:]), **_scalars(kernel, dilation, padding, stride)}
        )
    return out


@lowering("col2im", slots=("output_size",), coarse=True)
def col2im(self: Tensor, output_size: list, kernel_size: list, dilation: list, padding: list, stride: list) -> Tensor:
    """[N,] C, *output_size: the sum of blocks given as columns of [N,] C * kH * kW, blocks, where they overlap."""
    check(
        len(output_size) == 2,
        "RuntimeError",
        "It is expected output_size equals to 2, but got size {}",
        len(output_size),
    )
    kernel, dilation, padding, stride = _pairs(kernel_size, dilation, padding, stride)
    text = "Expected 2D or 3D (batch mode) tensor for input with possibly 0 batch size and non-zero dimensions for input, but got: "
    text += braces(self.ndim)
    ok = self.ndim in (2, 3) and all_of(*(lt(0, s) for s in self.sizes[self.ndim - 2 :]))
    check(ok, "RuntimeError", text, *self.sizes)
    taps = kernel[0] * kernel[1]
    text = (
        "Expected size of input's dimension 1 to be divisible by the product of kernel_size, but got input.size(1)={} and "
        "kernel_size=({}, {})."
    )
    check(eq(self.sizes[-2] % taps, 0), "RuntimeError", text, self.sizes[-2], *kernel)
    counts = [_blocks(*v) for v in zip(output_size, kernel, dilation, padding, stride)]
    text = "Given output_size=({}, {}), kernel_size=({}, {}), dilation=({}, {}), padding=({}, {}), stride=({}, {}), "
    numbers = [*output_size, *kernel, *dilation, *padding, *stride]
    more = "expected size of input's dimension 2 to match the calculated number of sliding blocks {} * {} = {}, but got input.size(2)={}."
    total = counts[0] * counts[1]
    check(eq(self.sizes[-1], total), "RuntimeError", text + more, *numbers, *counts, total, self.sizes[-1])
    more = "expected input.size(2) to be positive: the array of sliding blocks is ({}, {})."
    check(all_of(*(le(1, c) for c in counts)), "RuntimeError", text + more, *numbers, *counts)
    channels = self.sizes[-2] // taps
    out = empty((*self.sizes[:-2], channels, *output_size), self.dtype)
    if not out.is_empty:
        batch = self.sizes[0] if self.ndim == 3 else 1
        columns = contiguous(self).view((batch, channels, *kernel, *counts))
        image = out.view((batch, channels, *output_size))
        scalars = {**named("kernel", kernel), **named("blocks", counts), **_scalars(kernel, dilation, padding, stride)}
        pair = DTYPES[self.dtype].kind == "complex"
        gather(_col2im, [image], {"x": columns}, scalars, scalar_elements=pair)
    return out


for _name in ("im2col", "col2im"):
    out_variant(_name, f"{_name}.out")
