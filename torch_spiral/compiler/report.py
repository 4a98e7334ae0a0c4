"""What a function is compiled to: explain()."""

from __future__ import annotations

import html
import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
class Step:
    """One kernel or operator of a compiled function: what it writes and reads, by name, and the fused kernel that it is, if any."""

    title: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    kernel: str = ""


@dataclass(frozen=True)
class Explanation:
    """groups: the fused kernels. graphs: per recorded graph, the names of all kernels it launches, in order. hosts: per compiled
    function its steps, in order. unfused: what kept two nodes apart, in the scheduler's words."""

    groups: tuple[FusedGroup, ...]
    graphs: tuple[tuple[str, ...], ...]
    unfused: tuple[str, ...]
    hosts: tuple[tuple[Step, ...], ...] = ()

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

    def svg(self, path: str | os.PathLike[str] | None = None) -> str:
        """A picture of the steps and of what flows between them, also written to `path`. Steps show a fused kernel's bytes and FLOPs
        and the operators it stands for; hovering shows its source. Reasons against fusion stand below."""
        text = _svg(self)
        if path is not None:
            Path(path).write_text(text)
        return text


WIDTH, LINE = 360, 16


def _svg(e: Explanation) -> str:
    groups = {g.name: g for g in e.groups}
    parts: list[str] = []
    y, right = 20, 0
    for number, steps in enumerate(e.hosts):
        parts.append(f'<text x="20" y="{y + 12}" class="t">function {number}</text>')
        y += 24
        made: dict[str, int] = {}  # name: the step that wrote it last
        # A step stands one column right of what it follows where that is not the step before it.
        places: list[tuple[int, int]] = []  # left edge and bottom of each
        depths: list[int] = []
        for i, step in enumerate(steps):
            g = groups.get(step.kernel)
            lines = [step.title]
            if g is not None:
                lines += [g.name + ("" if g.bytes is None else f"  {_short(g.bytes)}B, {_short(g.flops or 0)}FLOP")]
                origins = [o.strip("# ") for o in g.origins.split("\n") if "Original ATen" in o]
                lines += [w for o in origins for w in textwrap.wrap(o, 52)[:3]]
            lines.append("→ " + ", ".join(step.writes))
            sources = [made[r] for r in step.reads if r in made]
            depth = min((depths[s] for s in sources), default=0)
            if sources and max(sources) != i - 1:
                depth = (depth + 1) % 3
            depths.append(depth)
            x, height = 20 + depth * (WIDTH + 60), LINE * len(lines) + 12
            colour = "#dbeafe" if g is not None else "#fef3c7" if step.title.startswith("host") else "#dcfce7"
            parts.append(f"<g><title>{html.escape(g.source if g is not None else step.title)}</title>")
            parts.append(
                f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{height}" rx="4" fill="{colour}" stroke="#475569"/>'
            )
            for n, line in enumerate(lines):
                parts.append(f'<text x="{x + 8}" y="{y + 16 + n * LINE}">{html.escape(line[:56])}</text>')
            parts.append("</g>")
            for s in sorted(set(sources)):
                a, bottom = places[s]
                parts.append(
                    f'<path d="M{a + WIDTH / 2:.0f},{bottom} C{a + WIDTH / 2:.0f},{bottom + 20} {x + WIDTH / 2:.0f},{y - 20} {x + WIDTH / 2:.0f},{y}" class="e"/>'
                )
            places.append((x, y + height))
            made.update(dict.fromkeys(step.writes, i))
            y, right = y + height + 26, max(right, x + WIDTH)
    for line in [*(["not fused:"] if e.unfused else []), *e.unfused]:
        for part in textwrap.wrap(line, 110):
            parts.append(f'<text x="20" y="{y}">{html.escape(part)}</text>')
            y, right = y + LINE, max(right, 20 + 7 * len(part))
    style = "text{font:12px monospace;fill:#0f172a}.t{font-weight:bold}.e{fill:none;stroke:#64748b;marker-end:url(#a)}"
    marker = '<marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0,0L8,4L0,8z" fill="#64748b"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + 20}" height="{y + 20}"><style>{style}</style><defs>{marker}</defs>'
        + "".join(parts) + "</svg>"
    )  # fmt: skip


def _short(n: float) -> str:
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} T"


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compiles fn for these arguments, calls it once, and tells what became of it. Earlier compilations are forgotten."""
    from . import compat, device, runtime, wrapper

    device.register()
    torch._dynamo.reset()
    wrapper.reports.clear()
    wrapper.hosts.clear()
    runtime.recorded.clear()
    from torch_spiral import _C

    _C.clear_plans()
    with compat.fusion_reasons() as reasons, compat.config.patch(fx_graph_cache=False):
        torch.compile(fn, backend="spiral")(*args, **kwargs)
    used = {step.kernel for steps in wrapper.hosts for step in steps}  # the others became epilogues
    groups = tuple(_group(r) for r in wrapper.reports if r.kernel.name in used)
    return Explanation(
        groups, tuple(g.kernels for g in runtime.recorded), tuple(dict.fromkeys(reasons)), tuple(wrapper.hosts)
    )


def _group(r: Any) -> FusedGroup:
    costs = [_cost(p) for p in r.program.parts or (r.program,)]
    known = [c for c in costs if c is not None]
    moved, flops = map(sum, zip(*known, strict=True)) if len(known) == len(costs) else (None, None)
    return FusedGroup(r.kernel.name, r.origins, r.kernel.source, moved, flops)


def _cost(program: Any) -> tuple[int, int] | None:
    """(bytes, floating-point operations) of a program of known sizes."""
    sizes = [*program.rows, *program.reduced]
    if not all(s.op == "const" for s in sizes):
        return None
    rows, elements = (math.prod(s.attr for s in part) for part in (program.rows, sizes))
    dtypes = {name: dtype for name, dtype, _ in program.buffers}
    stores = [n for s in program.stores for n in (s.index, s.value)]
    nodes = ir.walk(*stores)
    inner = _inner(nodes)
    moved = sum(itemsize(dtypes[n.attr]) * (elements if n in inner else rows) for n in nodes if n.op == "load")
    moved += sum(
        itemsize(dtypes[s.buffer]) * (elements if s.per_element or not program.reduced else rows)
        for s in program.stores
    )
    free = ("const", "leaf", "load", "check", "cast")
    flops = sum(
        elements if n in inner or n.op == "red" else rows for n in nodes if n.dtype in ir.FLOATS and n.op not in free
    )
    return moved, flops


def _inner(nodes: list[ir.Node]) -> set[ir.Node]:
    """The nodes that are computed for each element of a row. nodes: arguments before users."""
    inner: set[ir.Node] = set()
    for n in nodes:
        if n.op != "red" and ((n.op == "leaf" and n.attr[0] in "rp") or any(a in inner for a in n.args)):
            inner.add(n)
    return inner
