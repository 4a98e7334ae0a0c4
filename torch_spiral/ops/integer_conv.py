"""Convolutions of integers: one item for each element of the result, exact modulo the width of the dtype."""

from __future__ import annotations

from typing import Any

from ..kernels import ir
from ..kernels.kernel import compute_dtype
from ..lowering import Tensor
from .items import Item, each


def _integer_convolution(it: Item) -> None:
    """Adds up the taps and channels that reach the item (n, channel, z, y, x)."""
    transposed, has_bias, kind, *numbers = it.static
    taps, stride, padding, dilation = (tuple(numbers[i : i + 3]) for i in range(0, 12, 3))
    k = it.k
    n, channel, *place = it.at
    group = k.let(ir.idiv(channel, it["out_per_group"]))
    first = k.let(group * it["in_per_group"])
    total = k.var(kind, it.load("bias", (channel,)) if has_bias else 0)
    for number in range(taps[0] * taps[1] * taps[2]):
        tap = (number // (taps[1] * taps[2]), number // taps[2] % taps[1], number % taps[2])
        inside: Any = ir.const(True, "bool")
        at = []
        for p, t, s, pad, d, size in zip(
            place, tap, stride, padding, dilation, ("depth", "height", "width"), strict=True
        ):
            if transposed:  # the element that this tap spreads to the item, if there is one
                reached = k.let(p + (pad - t * d))
                source = k.let(ir.idiv(reached, s))
                inside = ir.and_(inside, ir.eq(source * s, reached))
            else:
                source = k.let(p * s + (t * d - pad))
            inside = ir.and_(inside, ir.and_(ir.ge(source, 0), ir.lt(source, it[size])))
            at.append(source)
        with k.If(inside), k.For(ir.const(0, "i32"), it["in_per_group"]) as c:
            weight = (first + c, channel - group * it["out_per_group"]) if transposed else (channel, c)
            total.set(total + it.load("x", (n, first + c, *at)) * it.load("weight", (*weight, *tap)))
    it.store("out", total)


def _five(x: Tensor) -> Tensor:
    """x with three spatial dimensions."""
    ones = [1] * (5 - x.ndim)
    return x.view([*x.sizes[:2], *ones, *x.sizes[2:]], [*x.strides[:2], *[0] * len(ones), *x.strides[2:]])


def integer_convolution(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, g: Any, transposed: bool) -> None:
    """out = x convolved with w, all of one integer dtype; g: conv.Geometry."""
    x, w, out = _five(x), _five(w), _five(out)
    operands = {"out": out, "x": x, "weight": w} | ({} if bias is None else {"bias": bias})
    scalars = {
        "in_per_group": x.sizes[1] // g.groups,
        "out_per_group": out.sizes[1] // g.groups,
        "depth": x.sizes[2],
        "height": x.sizes[3],
        "width": x.sizes[4],
    }
    each(
        "integer_convolution",
        _integer_convolution,
        out.sizes,
        operands,
        scalars,
        static=(transposed, bias is not None, compute_dtype(x.dtype), *g.taps, *g.stride, *g.padding, *g.dilation),
        cost=64,
    )
