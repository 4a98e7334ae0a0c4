"""Kernels whose addresses depend on data: one body for each item of an index space, with any access to its operands.

    @kernel_body
    def body(it):                                   # it.at: coordinates, the tensor's last dimension last
        i = it.check(it.load("index"), 0, it["n"])  # load at the item's own place
        it.store("out", it.buffers["x"].load(it.offset("x", (i, *it.at[1:]))))

    each("index_select", body, out.sizes, {"out": out, "x": x, "index": index.view(...)}, {"n": x.sizes[0]}, site=text)

Sizes and strides are scalars of the launch; only ranks, dtypes and stride classes are built into a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels import ir
from ..kernels.builder import Buffer, KernelBuilder
from ..kernels.kernel import DTYPES, Kernel, Target
from ..kernels.nest import SIMT_WORKGROUP, fold_groups
from ..kernels.nest.operands import unravel
from ..lowering import Sym, Tensor, build, cdiv, error_site, is_one, is_zero, launch, maximum, product, target
from .common import contiguous

TASK = 16384  # elements that one workgroup of a CPU device handles


@dataclass
class Item:
    """What a body may use. at: the item's coordinates, i32, the last one with lanes where the kernel has them.
    buffers, scalars: by name. static: what was given to each()."""

    k: KernelBuilder
    at: tuple[Any, ...]
    buffers: dict[str, Buffer]
    scalars: dict[str, Any]
    layouts: dict[str, tuple[Any, ...]]
    static: tuple
    site: Any = None

    def __getitem__(self, name: str) -> Any:
        return self.scalars[name]

    def offset(self, name: str, at: Sequence[Any] | None = None) -> Any:
        """The place of an operand's element, in elements: the sum of coordinate * stride."""
        total: Any = ir.const(0, "i32")
        for c, stride in zip(self.at if at is None else at, self.layouts[name], strict=True):
            if stride is not None:
                c = ir.cast(c, "i32")
                total = total + (c if stride == 1 else c * stride)
        return total

    def load(self, name: str, at: Sequence[Any] | None = None) -> Any:
        return self.buffers[name].load(self.offset(name, at))

    def store(self, name: str, value: Any, at: Sequence[Any] | None = None) -> None:
        self.buffers[name].store(self.offset(name, at), value)

    def check(self, index: Any, low: Any, high: Any) -> Any:
        """index as i32 if low <= index < high; else the error is reported and the value is `low`."""
        return self.k.let(ir.cast(self.k.check_index(index, low, high, self.site), "i32"))

    def wrap(self, index: Any, size: Any) -> Any:
        """A checked index that may count from the end."""
        i = self.check(index, ir.neg(size), size)
        return self.k.let(ir.where(i < 0, i + size, i))


def each(
    name: str,
    body: Callable[[Item], None],
    sizes: Sequence[Any],
    operands: Mapping[str, Tensor],
    scalars: Mapping[str, Any] | None = None,
    *,
    static: tuple = (),
    modes: Mapping[str, str] | None = None,
    site: str | None = None,
    lanes: bool = False,
    cost: Any = 1,
) -> None:
    """Runs body for every item of the space `sizes`.

    name and static must say what body does; body must be a function of a module. scalars: Syms or ints (i32), floats (f32), or
    (type, value). modes: of operands that are not "w" (those whose name starts with "out") or "r". site: the text of an index
    error. lanes: the body works on several consecutive items of the last dimension at once (CPU devices). cost: about how many
    elements an item handles."""
    sizes = tuple(sizes) or (1,)
    buffers, layouts, strides = [], [], []
    for key, x in operands.items():
        mode = (modes or {}).get(key) or ("w" if key.startswith("out") else "r")
        buffers.append((key, x.dtype, mode, x.windows))
        classes = "".join(
            "0" if is_one(n) or is_zero(s) else "1" if is_one(s) else "s"
            for n, s in zip(x.sizes, x.strides, strict=True)
        )
        layouts.append(classes)
        strides += [s for s, c in zip(x.strides, classes, strict=True) if c == "s"]
    named = {}
    for key, v in (scalars or {}).items():
        floating = isinstance(v, float) or (isinstance(v, Sym) and v.kind == "f")
        named[key] = v if isinstance(v, tuple) else ("f32" if floating else "i32", v)
    types = tuple((key, t) for key, (t, _) in named.items())
    kernel, simt, lane_count = build(
        _build,
        name,
        body,
        len(sizes),
        tuple(buffers),
        tuple(layouts),
        types,
        static,
        site is not None,
        lanes and not is_one(sizes[-1]),
    )
    values: list[Any] = []
    if simt:
        groups = fold_groups(target(), cdiv(product(sizes), kernel.workgroup[0]))
    else:
        span = maximum(TASK // maximum(cost, 1), lane_count)
        rows = maximum(span // maximum(sizes[-1], 1), 1)
        values = [span, rows]
        groups = (cdiv(product([*sizes[:-1], cdiv(sizes[-1], span)]), rows), 1, 1)
    wide = [v for t, v in named.values() if t in ("i64", "f64")]
    narrow = [v for t, v in named.values() if t not in ("i64", "f64")]
    number = [error_site(site)] if site is not None else []
    launch(kernel, list(operands.values()), [*wide, *sizes, *values, *number, *strides, *narrow], groups)


def require(name: str, body: Callable[[Item], None], x: Tensor, text: str) -> None:
    """Has a body check each element of x, "x"; `text` is reported where it does not hold."""
    flat = contiguous(x)
    each(name, body, (flat.numel,), {"x": flat.view((flat.numel,), (1,))}, site=text)


def is_probability(it: Item) -> None:
    """0 <= x <= 1, which NaN is not."""
    x = it.load("x")
    it.check(ir.cast(ir.and_(ir.ge(x, 0), ir.le(x, 1)), "i32"), 1, 2)


def _build(
    target: Target,
    name: str,
    body: Callable[[Item], None],
    ndim: int,
    buffers: tuple,
    layouts: tuple,
    types: tuple,
    static: tuple,
    checked: bool,
    lanes: bool,
) -> tuple[Kernel, bool, int]:
    simt = target.schedule_class != "vector"
    widest = max((DTYPES[d].size for _, d, _, _ in buffers), default=4)
    width = 1 if simt or not lanes else 8 if widest >= 8 else 16
    label = "_".join(
        [
            name,
            *map(_text, static),
            *(f"{d}{m}{w if w > 1 else ''}{s}" for (_, d, m, w), s in zip(buffers, layouts, strict=True)),
            *(t for _, t in types),
            f"{ndim}d{width}",
        ]
    )
    k = KernelBuilder(target, label)
    named_buffers = {key: k.buffer(key, d, m, w) for key, d, m, w in buffers}
    sizes = [k.scalar(f"size{d}", "u32") for d in range(ndim)]
    span, rows = (None, None) if simt else (k.scalar("span", "u32"), k.scalar("rows", "u32"))
    site = k.scalar("site", "u32") if checked else None
    strides = {
        key: tuple(
            None if c == "0" else 1 if c == "1" else k.scalar(f"{key}_stride{d}", "i32") for d, c in enumerate(layout)
        )
        for (key, *_), layout in zip(buffers, layouts, strict=True)
    }
    scalars = {key: k.scalar(f"value_{key}", t) for key, t in types}

    def run(at: Sequence[Any]) -> None:
        body(Item(k, tuple(at), named_buffers, scalars, strides, static, site))

    def coordinates(row: Any, sizes: Sequence[Any]) -> list[Any]:
        return [k.let(ir.cast(c, "i32")) for c in reversed(unravel(k, sizes[::-1], row))]

    if simt:
        n: Any = sizes[0]
        for s in sizes[1:]:
            n = n * s
        workgroup = min(SIMT_WORKGROUP, target.max_workgroup_size)
        i = k.global_id(workgroup)
        with k.If(i < n):
            run(coordinates(i, sizes))
        return k.finish((workgroup, 1, 1)), True, 1

    assert span is not None and rows is not None
    inner = sizes[-1]
    chunks = k.let(ir.idiv(inner + (span - 1), span))
    items: Any = chunks
    for s in sizes[:-1]:
        items = items * s
    items = k.let(items)
    first = k.let(k.group_index() * rows)
    with k.For(first, k.let(ir.minimum(first + rows, items))) as item:
        row = k.let(ir.idiv(item, chunks))
        start = k.let((item - row * chunks) * span)
        stop = k.let(ir.cast(ir.minimum(start + span, inner), "i32"))
        outer = coordinates(row, sizes[:-1])
        j = k.var("i32", ir.cast(start, "i32"))
        for step in (width, 1) if width > 1 else (1,):
            with k.While(lambda step=step: j + step <= stop):  # type: ignore[misc]
                run([*outer, k.let(j.as_node()) + k.lanes(step)])
                j.set(j + step)
    return k.finish((1, 1, 1)), False, width


def _text(x: Any) -> str:
    text = "".join(map(_text, x)) if isinstance(x, tuple) else str(x)
    return text.replace("-", "m").replace(".", "_")
