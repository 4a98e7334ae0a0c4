"""What a function is compiled to: explain()."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import ir
from ..kernels.kernel import itemsize


@dataclass(frozen=True)
class FusedGroup:
    """A fused kernel. bytes and flops are None where sizes are dynamic; flops counts one for each operation on floats."""

    name: str
    origins: str
    source: str
    bytes: int | None
    flops: int | None


@dataclass(frozen=True)
class Explanation:
    """groups: the fused kernels. graphs: per recorded graph, the names of all kernels it launches, in order. unfused: what kept
    two nodes apart, in the scheduler's words."""

    groups: tuple[FusedGroup, ...]
    graphs: tuple[tuple[str, ...], ...]
    unfused: tuple[str, ...]

    @property
    def launches(self) -> int:
        """Kernels of one call, packing of operands that can be kept included."""
        return sum(map(len, self.graphs))

    def __str__(self) -> str:
        lines = []
        for i, kernels in enumerate(self.graphs):
            lines.append(f"graph {i}: {len(kernels)} kernels")
            lines += [f"  {k}" for k in kernels]
        for g in self.groups:
            size = "" if g.bytes is None else f", {g.bytes} bytes, {g.flops} floating-point operations"
            lines += [
                f"{g.name}{size}",
                *(f"  {line}" for line in g.origins.split("\n")),
                *(f"    {s}" for s in g.source.split("\n")),
            ]
        if self.unfused:
            lines += ["not fused:", *(f"  {u}" for u in self.unfused)]
        return "\n".join(lines)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compiles fn for these arguments, calls it once, and tells what became of it. Earlier compilations are forgotten."""
    from . import compat, device, runtime, wrapper

    device.register()
    torch._dynamo.reset()
    wrapper.reports.clear()
    runtime.recorded.clear()
    from torch_spiral import _C

    _C.clear_plans()
    with compat.fusion_reasons() as reasons, compat.config.patch(fx_graph_cache=False):
        torch.compile(fn, backend="spiral")(*args, **kwargs)
    groups = tuple(_group(r) for r in wrapper.reports)
    return Explanation(groups, tuple(g.kernels for g in runtime.recorded), tuple(dict.fromkeys(reasons)))


def _group(r: Any) -> FusedGroup:
    sizes = [*r.program.rows, *r.program.reduced]
    if not all(s.op == "const" for s in sizes):
        return FusedGroup(r.kernel.name, r.origins, r.kernel.source, None, None)
    rows, elements = (math.prod(s.attr for s in part) for part in (r.program.rows, sizes))
    dtypes = {name: dtype for name, dtype, _ in r.program.buffers}
    stores = [n for s in r.program.stores for n in (s.index, s.value)]
    nodes = ir.walk(*stores)
    inner = _inner(nodes)
    moved = sum(itemsize(dtypes[n.attr]) * (elements if n in inner else rows) for n in nodes if n.op == "load")
    moved += sum(
        itemsize(dtypes[s.buffer]) * (elements if s.per_element or not r.program.reduced else rows)
        for s in r.program.stores
    )
    free = ("const", "leaf", "load", "check", "cast")
    flops = sum(
        elements if n in inner or n.op == "red" else rows for n in nodes if n.dtype in ir.FLOATS and n.op not in free
    )
    return FusedGroup(r.kernel.name, r.origins, r.kernel.source, moved, flops)


def _inner(nodes: list[ir.Node]) -> set[ir.Node]:
    """The nodes that are computed for each element of a row. nodes: arguments before users."""
    inner: set[ir.Node] = set()
    for n in nodes:
        if n.op != "red" and ((n.op == "leaf" and n.attr[0] in "rp") or any(a in inner for a in n.args)):
            inner.add(n)
    return inner
