"""What generated modules call: fused kernels, and graphs that C++ replays from one plan.

The body of a graph is the text that Inductor's wrapper generated, run once per signature on the handles of lowering.py;
what it launches, and what the lowerings of the external operators in between launch, is recorded as one plan."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _C
from .. import lowering as low
from ..kernels.kernel import Kernel
from ..kernels.nest import TASK_ELEMENTS, fold_groups
from ..lowering import Size, Tensor, cdiv, error_site, launch, maximum, product
from . import attention
from .dtypes import DTYPES


@dataclass(frozen=True)
class Fused:
    """A kernel of a generated module. Called, while a graph is recorded, with its buffers, scalars and sizes."""

    kernel: Kernel
    schedule: str
    lanes: int = 1
    sites: tuple[str, ...] = ()
    nodes: str = ""  # of the graph, for messages

    def __call__(
        self, buffers: Sequence[Tensor], symbols: Sequence[Any], rows: Sequence[Any], reduced: Sequence[Any]
    ) -> None:
        scalars = [*symbols, *(error_site(text) for text in self.sites)]
        if self.schedule in ("tasks", "lanes_d", "lanes_r"):
            scalars.append(self._per_task(rows, reduced))
        try:
            launch(self.kernel, list(buffers), scalars, self._groups(rows, reduced))
        except RuntimeError as error:
            raise RuntimeError(f"{error}\nThe kernel stands for {self.nodes}") from error

    def _per_task(self, rows: Sequence[Any], reduced: Sequence[Any]) -> Any:
        work = product(reduced) if self.schedule != "tasks" else rows[0] if rows else 1
        if self.schedule == "lanes_r":
            work = work * self.lanes
        return maximum(TASK_ELEMENTS // maximum(work, 1), 1)

    def _groups(self, rows: Sequence[Any], reduced: Sequence[Any]) -> tuple[Any, ...]:
        if self.schedule == "tasks":
            items = product([cdiv(rows[0], TASK_ELEMENTS), *rows[1:]]) if rows else 1
            return (cdiv(items, self._per_task(rows, reduced)), 1, 1)
        if self.schedule == "lanes_r":
            items = cdiv(rows[0], self.lanes) * product(rows[1:])
            return (cdiv(items, self._per_task(rows, reduced)), 1, 1)
        if self.schedule == "parts":
            return fold_groups(low.target(), self.lanes)
        if self.schedule == "beside":
            return fold_groups(low.target(), cdiv(rows[0], self.lanes) * product(rows[1:]))
        if self.schedule == "columns":
            return (cdiv(rows[0], self.lanes) * product(rows[1:]), 1, 1)
        n = product(rows)
        if self.schedule == "lanes_d":
            return (cdiv(n, self._per_task(rows, reduced)), 1, 1)
        if self.schedule == "elements":
            n = cdiv(n, self.kernel.workgroup[0] * self.lanes)
        elif self.schedule == "invocation":
            n = cdiv(n, self.kernel.workgroup[0])
        return fold_groups(low.target(), n)


def empty(sizes: Sequence[Any], strides: Sequence[Any], dtype: str) -> Tensor:
    """A buffer of a graph."""
    dense = all(
        low.is_plain(a, 1) or _same(b, c) for a, b, c in zip(sizes, strides, low.contiguous_strides(sizes), strict=True)
    )
    return _marked(low.empty(sizes, dtype, None if dense else strides))


def _marked(x: Tensor) -> Tensor:
    """x, marked if it is channels-last."""
    if x.ndim != 4 or x.is_contiguous:
        return x
    wanted = (None, 1, *low.contiguous_strides([*x.sizes[2:], x.sizes[1]])[:-1])
    wanted = (product(x.sizes[1:]), *wanted[1:])
    same = all(low.is_plain(n, 1) or _same(a, b) for n, a, b in zip(x.sizes, x.strides, wanted, strict=True))
    return dataclasses.replace(x, flags=x.flags | low.CHANNELS_LAST) if same else x


def _same(a: Any, b: Any) -> bool:
    return (
        a._ref == b._ref
        if isinstance(a, low.Sym) and isinstance(b, low.Sym)
        else not isinstance(a, low.Sym) and not isinstance(b, low.Sym) and a == b
    )


def reinterpret(x: Tensor, sizes: Sequence[Any], strides: Sequence[Any], offset: Any = 0) -> Tensor:
    """reinterpret_tensor on handles."""
    return _marked(x.view(sizes, strides, None if low.is_plain(offset, 0) else offset))


class Externs:
    """The operators that Inductor calls through `extern_kernels`, on handles."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(_with_out, name)

    @staticmethod
    def convolution(x: Any, weight: Any, bias: Any = None, stride: Any = (), padding: Any = (), dilation: Any = (),
                    transposed: bool = False, output_padding: Any = (), groups: int = 1, taps: Any = (), sizes: Any = (), strides: Any = ()) -> Any:  # fmt: skip
        """taps: the filter's sizes. sizes, strides: those that Inductor gave the result."""
        from ..ops.conv import _convolution

        out = empty(sizes, strides, x.dtype)
        return _convolution(
            x,
            weight,
            list(taps),
            bias,
            list(stride),
            list(padding),
            list(dilation),
            transposed,
            list(output_padding),
            groups,
            (),
            out,
        )


def fused_product(
    kind: str,
    args: Sequence[Any],
    out: Tensor,
    shape: Sequence[int],
    steps: Sequence[Any],
    before: Sequence[Any] = (),
    **options: Any,
) -> None:
    """A matrix product ("mm", "bmm", "addmm", "baddbmm") or "convolution" with an epilogue. out takes the result [batch, rows, columns]
    or [batch, channels, pixels], contiguous; of a convolution also channels-last, as options' sizes and strides say. steps: names, and (kind, tensor, strides, offset) as in epilogue.Operand.
    before: such steps that precede the bias, of operands that were scaled."""
    from ..ops.conv import _convolution

    terms = _steps(steps, shape)
    if kind == "convolution":
        x, w, bias = args if len(args) == 3 else (*args, options["bias"])
        stride, padding, dilation, extra = (
            list(options[k]) for k in ("stride", "padding", "dilation", "output_padding")
        )
        out = reinterpret(out, options["sizes"], options["strides"])
        _convolution(
            x, w, list(options["taps"]), bias, stride, padding, dilation, False, extra, options["groups"], terms, out
        )
        return
    _product(kind, args, out.view(shape), _steps(before, shape), terms, **options)


def _steps(steps: Sequence[Any], shape: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(s, None) if isinstance(s, str) else (s[0], s[1].view(shape, s[2], s[3] or None)) for s in steps]


def _product(
    kind: str, args: Sequence[Any], out: Tensor, before: list[Any], terms: list[Any], alpha: Any = 1, beta: Any = 1
) -> None:
    """out [batch, rows, columns]. With `before`, alpha and beta are 1."""
    from ..ops import contraction

    bias, (a, b) = (args[0], args[1:3]) if kind in ("addmm", "baddbmm") else (None, args[:2])
    if kind in ("mm", "addmm"):
        a, b = contraction.matrix(a, 0, 1), contraction.matrix(b, 0, 1)
    if before and bias is not None:
        before, bias = [*before, ("add", bias)], None
    contraction.product(
        a,
        b,
        out,
        None if alpha == 1 else _number(alpha),
        None if bias is None else (_number(float(beta)), bias),
        [*before, *terms],
    )


def aten(name: str) -> Callable[..., Any]:
    """The lowering of an aten overload, called as the operator is."""
    base, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.aten, base), overload or "default")._schema

    def call(*args: Any, **kwargs: Any) -> Any:
        values = []
        for i, a in enumerate(schema.arguments):
            v = args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
            if isinstance(v, torch.dtype):
                v = DTYPES[v]
            elif str(a.type) in ("float", "Scalar", "Optional[float]", "number", "Optional[number]"):
                v = _number(float(v) if str(a.type) in ("float", "Optional[float]") and v is not None else v)
            values.append(list(v) if isinstance(v, tuple) else v)
        return low.lowerings[name](*values)

    return call


def _number(v: Any) -> Any:
    """Numbers of the text as the slots that lowerings expect."""
    return low.recorder().lift(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v


def _with_out(name: str, *args: Any, out: Tensor, alpha: Any = 1, beta: Any = 1, before: Sequence[Any] = ()) -> None:
    if before:
        from ..ops import contraction

        out = contraction.matrix(out, 0, 1) if out.ndim == 2 else out
        _product(name, args, out, _steps(before, out.sizes), [])
    elif name in ("addmm", "baddbmm"):
        low.lowerings[name](*args, _number(beta), _number(alpha), out)
    else:
        low.lowerings[name](*args, out)


def kept_weight(x: Tensor, dtype: str) -> Tensor:
    """contraction.weight of a matrix or of matrices."""
    from ..ops import contraction

    if x.ndim == 3:
        return contraction.weight(x, dtype)
    y = contraction.weight(contraction.matrix(x, 0, 1), dtype)
    return y.view(x.sizes, y.strides[1:])


OUT_EXTERNS = ("mm", "bmm", "addmm", "baddbmm")
GLOBALS = {
    "empty": empty, "reinterpret_tensor": reinterpret, "extern_kernels": Externs(), "max": maximum, "min": low.minimum,
    "attention": attention.forward, "attention_backward": attention.backward, "product": fused_product, "aten": aten, "kept_weight": kept_weight,
}  # fmt: skip


recorded: collections.deque[Graph] = collections.deque(maxlen=256)
"""The graphs recorded last, for explain() and tests."""


class Graph:
    """A stretch of a compiled graph without anything but kernels of ours, replayed from one plan.

    name: by its content, so that equal graphs share plans. body(inputs, written, sizes) runs on handles and gives the handles
    that leave the graph. counts: of inputs, written buffers and sizes. `call` takes all of them, in this order, and returns a
    tuple of tensors."""

    def __init__(
        self, name: str, body: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Any]], Sequence[Tensor]],
        counts: tuple[int, int, int], device: int,
    ):  # fmt: skip
        self.name, self.body, self.device = name, body, device
        self.kernels: tuple[str, ...] = ()
        low.internal(f"spiral::{name}", self._record)
        a, b, c = counts
        self.call = _C.graph_call(
            f"spiral::{name}",
            device,
            a + b + c,
            list(range(a)),
            list(range(a, a + b)),
            list(range(a + b, a + b + c)),
            [],
            [],
        )

    def _record(self, inputs: Any, written: Any, sizes: Any, classes: Any) -> Any:
        r = low.recorder()
        known = [Size(s._ref, r, s._hint, c) for s, c in zip(sizes, classes, strict=True)]
        results = tuple(self.body(inputs, written, known))
        self.kernels = tuple(r.kernels)
        recorded.append(self)
        return results

    def direct(
        self,
        arguments: int,
        inputs: Sequence[int],
        written: Sequence[int],
        sizes: Sequence[int],
        outputs: Sequence[tuple],
    ) -> Any:
        """What a whole compiled function is when it is nothing but this graph: takes the function's arguments, returns its results.

        inputs, written, sizes: positions among the arguments. outputs: ("returned", number, (), (), 0), ("view", number of the
        tensor, sizes, strides, offset), ("argument", position, (), (), 0) or ("none", 0, (), (), 0)."""
        return _C.graph_call(
            f"spiral::{self.name}",
            self.device,
            arguments,
            list(inputs),
            list(written),
            list(sizes),
            list(outputs),
            list(written),
        )


__all__ = ["GLOBALS", "OUT_EXTERNS", "Fused", "Graph", "Kernel", "empty", "recorded", "reinterpret"]
