"""Kernels whose outputs are made from elements at computed places of other tensors: windows, padding, resampling."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..kernels import ir, nest
from ..kernels.builder import KernelBuilder
from ..kernels.ir import Node
from ..kernels.kernel import DTYPES, Target
from ..lowering import Tensor, build, composite, is_one, is_zero, launch
from .common import write_out


class Element:
    """The element that a body computes, or on CPUs several at once: coordinates then have lanes, so that conditions on
    them need ir.where and loads need clamped coordinates.

    at: coordinates (i32) in the order of the outputs' dimensions. lanes: how many elements; a variable needs as many."""

    def __init__(self, k: KernelBuilder, at: Sequence[Node], values: Mapping[str, Node], buffers: Mapping[str, Any],
                 strides: Mapping[str, Sequence[Any]]) -> None:  # fmt: skip
        self.k, self.at, self._values, self.buffers, self._strides = k, tuple(at), values, buffers, strides
        self.lanes = max((c.lanes for c in at), default=1)

    def __getitem__(self, name: str) -> Node:
        """A scalar of the launch."""
        return self._values[name]

    def list(self, name: str, n: int) -> list[Node]:
        """The scalars name0, name1, …."""
        return [self[f"{name}{d}"] for d in range(n)]

    def index(self, name: str, at: Sequence[Any]) -> Any:
        """The place, in elements, of coordinates `at` in an input."""
        total: Any = ir.const(0, "i32")
        for c, s in zip(at, self._strides[name], strict=True):
            if s is not None:
                total = total + c * s
        return total

    def load(self, name: str, at: Sequence[Any]) -> Any:
        """An input at coordinates that lie in it."""
        return self.buffers[name].load(self.index(name, at))

    def var(self, dtype: str, value: Any) -> Any:
        return self.k.var(dtype, value, self.lanes)

    def loop(
        self, counts: Sequence[Any], body: Callable[[tuple[Node, ...]], None], _index: tuple[Node, ...] = ()
    ) -> None:
        """body for all indices (i32) below counts, the last one fastest. Counts of Python ints are unrolled."""
        if not counts:
            body(_index)
        elif isinstance(counts[0], int):
            for unrolled in range(counts[0]):
                self.loop(counts[1:], body, (*_index, ir.const(unrolled, "i32")))
        else:
            with self.k.For(ir.const(0, "i32"), counts[0]) as i:
                self.loop(counts[1:], body, (*_index, i))


def named(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """{name0: values[0], …}: scalars that Element.list gives back."""
    return {f"{name}{d}": v for d, v in enumerate(values)}


def gather(body: Callable[..., Any], outs: Sequence[Tensor], ins: Mapping[str, Tensor], scalars: Mapping[str, Any] | None = None,
           static: Sequence[Any] = (), *, shape: Sequence[Any] | None = None, modes: Mapping[str, str] | None = None,
           scalar_elements: bool = False) -> None:  # fmt: skip
    """outs = body(element, *static), one value for each of outs, which have one shape.

    body: a function of a module. ins: what it loads, by name. scalars: numbers of the launch, i32, or (type, number).
    static: what the kernel is built for, hashable. A kernel that scatters has no outs, gives its `shape`, and stores to
    buffers with modes "w" or "a". scalar_elements: the body's conditions need one element at a time."""
    sizes = list(outs[0].sizes if outs else shape or ())
    channels_last = len(sizes) > 3 and bool(outs) and is_one(outs[0].strides[1]) and not is_one(outs[0].sizes[1])
    channels_last = channels_last and not (is_one(outs[0].strides[-1]) and not is_one(outs[0].sizes[-1]))
    order = tuple(reversed(range(len(sizes))))
    if channels_last:
        order = (1, *reversed(range(2, len(sizes))), 0)
    dense = not channels_last and all(x.is_contiguous for x in outs)
    modes = modes or {}
    typed = {n: v if isinstance(v, tuple) else ("i32", v) for n, v in (scalars or {}).items()}
    outs_key: list[tuple[str, Any]] = []
    strides: list[Any] = []
    for x in outs:
        if dense:
            outs_key.append((x.dtype, "dense"))
            strides.append(None)
        else:
            # Lanes run along the first dimension, also where it has one element.
            first, *rest = (_class(x, d) for d in order)
            outs_key.append((x.dtype, ("1" if first == "0" else first, *rest)))
            strides.append([x.strides[d] for d in order])
    ins_key, ins_strides = [], []
    for name, x in ins.items():
        classes = tuple(_class(x, d) for d in range(x.ndim))
        ins_key.append((name, x.dtype, modes.get(name, "r"), x.windows, classes))
        ins_strides += [s for s, c in zip(x.strides, classes) if c == "s"]
    built: Any = build(
        _kernel, body, tuple(static), order, tuple(outs_key), tuple(ins_key), tuple((n, t) for n, (t, _) in typed.items()),
        scalar_elements,
    )  # fmt: skip
    shape_ = [sizes[d] for d in order]
    values = [*ins_strides, *(v for _, v in typed.values())]
    launch(built.kernel, [*outs, *ins.values()], built.scalars(shape_, strides, values), built.groups(shape_))


def _class(x: Tensor, d: int) -> str:
    return "0" if is_one(x.sizes[d]) or is_zero(x.strides[d]) else "1" if is_one(x.strides[d]) else "s"


def _kernel(target: Target, body: Callable[..., Any], static: tuple, order: tuple[int, ...], outs: tuple, ins: tuple,
            scalars: tuple, scalar_elements: bool) -> Any:  # fmt: skip
    stride_names = [(name, d) for name, _, _, _, classes in ins for d, c in enumerate(classes) if c == "s"]

    def expression(context: nest.Context, *args: Any) -> Any:
        stride_values = dict(zip(stride_names, args[: len(stride_names)]))
        values = dict(zip((n for n, _ in scalars), args[len(stride_names) :]))
        buffers = dict(zip((i[0] for i in ins), args[len(stride_names) + len(scalars) :], strict=True))
        strides = {
            name: [None if c == "0" else 1 if c == "1" else stride_values[name, d] for d, c in enumerate(classes)]
            for name, _, _, _, classes in ins
        }
        at: list[Any] = [None] * len(order)
        for d, c in zip(order, context.coordinates):
            at[d] = c
        result = body(Element(context.k, at, values, buffers, strides), *static)
        return () if result is None else result

    layout = "".join(("_p" if order != tuple(reversed(range(len(order)))) else "", *("_" + "".join(i[4]) for i in ins)))
    label = re.sub(r"\W+", "_", "_".join([body.__name__.strip("_"), *map(str, static)])) + layout
    largest = max((DTYPES[d].size for d in (*(o[0] for o in outs), *(i[1] for i in ins))), default=4)
    return nest.pointwise(
        target, label, [nest.Operand(f"o{i}", dtype, layout) for i, (dtype, layout) in enumerate(outs)], [], expression, len(order),
        scalars=["i32"] * len(stride_names) + [t for _, t in scalars],
        buffers=[(name, dtype, mode, windows) for name, dtype, mode, windows, _ in ins],
        context=True, lanes=1 if scalar_elements else 8 if largest >= 8 else 16,
    )  # fmt: skip


def planes(n: int, *tensors: Tensor) -> list[Tensor]:
    """Tensors of [N,] C and n spatial dimensions, with N and C as one dimension where all are contiguous."""
    dense = all(x.is_contiguous for x in tensors)
    result = []
    for x in tensors:
        if dense:
            lead: Any = 1
            for s in x.sizes[: x.ndim - n]:
                lead = lead * s
            result.append(x.view((lead, *x.sizes[x.ndim - n :])))
        elif x.ndim == n + 1:
            result.append(x.view((1, *x.sizes), (0, *x.strides)))
        else:
            result.append(x)
    return result


def channels_last_strides(x: Tensor, sizes: Sequence[Any]) -> list[Any] | None:
    """Strides of an output [N, C, *sizes] that has channels last where x has."""
    n = len(sizes)
    if x.ndim != n + 2 or not is_one(x.strides[1]) or is_one(x.sizes[1]) or x.is_contiguous:
        return None
    strides: list[Any] = [None] * n
    dense: Any = x.sizes[1]
    for d in reversed(range(n)):
        strides[d] = dense
        dense = dense * sizes[d]
    return [dense, 1, *strides]


def out_variant(name: str, out_name: str) -> None:
    """Registers the overload `out_name` as the functional overload `name` written into given tensors."""

    def overload(full: str) -> torch._ops.OpOverload:
        packet, _, which = full.partition(".")
        return getattr(getattr(torch.ops.aten, packet), which or "default")

    functional, arguments = overload(name), overload(out_name)._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]

    @composite(out_name)
    def body(*args: Any, **kwargs: Any) -> Any:
        outs = [kwargs.pop(n) for n in written]
        result = functional(*args, **kwargs)
        for out, r in zip(outs, result if isinstance(result, tuple) else (result,), strict=True):
            if out.dtype != r.dtype:
                raise RuntimeError(f"Expected out tensor to have dtype {r.dtype}, but got {out.dtype} instead")
            write_out(out, r)
        return outs[0] if len(outs) == 1 else tuple(outs)
