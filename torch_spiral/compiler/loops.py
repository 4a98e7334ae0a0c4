"""Kernels from fused groups: a Program is what Inductor's scheduler decided to fuse, as expressions over coordinates.

Expressions are those of kernels/ir.py with further operations: leaves x0, x1 … (coordinates of the rows, fastest first),
r0, r1 … (of the reduced dimensions), "position" (of an element in its row); load[buffer](index[, mask, other]);
check[site](index, size[, mask]), an index that is reported and clamped when it is out of range; red[monoid, i](elements…).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..kernels import ir
from ..kernels.builder import KernelBuilder
from ..kernels.ir import Node
from ..kernels.kernel import DTYPES, Kernel, Target
from ..kernels.nest import SIMT_WORKGROUP, TASK_ELEMENTS, Rows, lanes_for
from ..kernels.nest.elementwise import whole_blocks
from ..kernels.nest.operands import BLOCK_LANES, product, unravel


@dataclass(frozen=True)
class Store:
    """mode: None, or "add" for an atomic addition. per_element: in the reduction's loop, not once a row."""

    buffer: str
    index: Node
    value: Any
    mode: str | None
    per_element: bool

    @property
    def name(self) -> str:
        """The buffer, in nest's words."""
        return self.buffer


@dataclass
class Program:
    """buffers: (name, storage dtype, mode). scalars: (name, type). rows and reduced: sizes, fastest first, as nodes of u32.
    along_rows: whether vectors should lie along the rows instead of along the reduced dimension."""

    name: str
    buffers: list[tuple[str, str, str]]
    scalars: list[tuple[str, str]]
    rows: list[Node]
    reduced: list[Node]
    stores: list[Store]
    along_rows: bool = False
    sites: int = 0
    windows: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """A kernel and what its launch must know: schedule, vector lanes, number of reduced dimensions."""

    kernel: Kernel
    schedule: str  # "tasks" | "elements" | "lanes_d" | "lanes_r" | "workgroup" | "invocation"
    lanes: int


def size_of(n: Node) -> int | None:
    """A size that is known when the kernel is built."""
    return n.attr if n.op == "const" else None


class _Evaluation:
    """Emits expressions of a Program."""

    k: KernelBuilder
    program: Program
    target: Target

    def _begin(self, program: Program, target: Target) -> None:
        self.program, self.target = program, target
        self.k = KernelBuilder(target, program.name)
        self.buffers = {n: self.k.buffer(n, t, m, program.windows.get(n, 1)) for n, t, m in program.buffers}
        self.scalar_nodes = {n: self.k.scalar(n, t) for n, t in program.scalars}
        self.site_nodes = [self.k.scalar(f"site{i}", "u32") for i in range(program.sites)]

    def _size(self, n: Node) -> Node:
        """A size, with scalars in place."""
        return self.k.let(ir.cast(self._emit([n], {}, {})[0], "u32"))

    def _emit(self, exprs: Sequence[Any], leaves: dict[str, Any], done: dict[Node, Any]) -> list[Any]:
        """The values of expressions. leaves: coordinates by name. done: nodes that have values already."""
        memo: dict[Node, Any] = dict(done)

        def replace(n: Node) -> Any:
            if n.op == "leaf":
                return self.scalar_nodes[n.attr] if n.attr in self.scalar_nodes else leaves[n.attr]
            if n.op == "load":
                args = [ir.substitute(a, replace, memo) for a in n.args]
                return self._load(n.attr, *args)
            if n.op == "check":
                args = [ir.substitute(a, replace, memo) for a in n.args]
                return self._check(n.attr, *args)
            return None

        return [ir.substitute(e, replace, memo) for e in exprs]

    def _load(self, buffer: str, index: Node, mask: Node | None = None, other: Node | None = None) -> Any:
        b = self.buffers[buffer]
        if mask is None or (mask.op == "const" and mask.attr):
            return b.load(index)
        if mask.op == "const":
            return other
        assert other is not None
        if mask.lanes == 1:
            lanes = max(index.lanes, other.lanes)
            v = self.k.var(b.compute, ir.cast(other, b.compute), lanes)
            with self.k.If(mask):
                v.set(b.load(index))
            return v.as_node()
        # Lanes that must not read take element 0; a load at a computed index reads lane by lane.
        return ir.where(mask, b.load(ir.where(mask, index, ir.const(0, index.dtype))), other)

    def _check(self, site: int, index: Node, size: Node, mask: Node | None = None) -> Node:
        k = self.k
        index = k.let(index)
        size = ir.cast(size, index.dtype)
        if mask is not None:
            index = k.let(ir.where(mask, index, ir.const(0, index.dtype)))
        number = self.site_nodes[site]
        if index.lanes == 1:
            return ir.cast(k.check_index(index, ir.const(0, index.dtype), size, number), "i32")
        bad = k.let(ir.or_(ir.lt(index, 0), ir.ge(index, size)))
        with k.If(k.raw("bool", f"any({k.atom(bad)})")):
            for lane in range(index.lanes):
                k.let(k.check_index(k.extract(index, lane), ir.const(0, index.dtype), size, number))
        return ir.cast(ir.where(bad, ir.const(0, index.dtype), index), "i32")

    def _store(self, s: Store, index: Node, value: Any) -> None:
        b = self.buffers[s.buffer]
        if s.mode == "add":
            b.atomic_add(index, value)
        else:
            b.store(index, value)

    def _stores(self, stores: Sequence[Store], leaves: dict[str, Any], done: dict[Node, Any]) -> None:
        """All values before the first store: a kernel may overwrite what it reads."""
        exprs = [e for s in stores for e in (s.index, s.value)]
        values = self._emit(exprs, leaves, done)
        values = [self.k.let(v) for v in values] if len(stores) > 1 else values
        for s, index, value in zip(stores, values[::2], values[1::2], strict=True):
            self._store(s, index, value)

    def _scalar_only(self) -> bool:
        return any(s.mode == "add" for s in self.program.stores)


class _Pointwise(_Evaluation):
    def __init__(self, program: Program, target: Target) -> None:
        self._begin(program, target)
        k = self.k
        vector = target.schedule_class == "vector"
        per_task = k.scalar("rows_per_task", "u32") if vector else None
        self.sizes = [self._size(n) for n in program.rows] or [ir.const(1, "u32")]
        if vector:
            assert per_task is not None
            lanes = 1 if self._scalar_only() else lanes_for([t for _, t, _ in program.buffers])
            inner = size_of(program.rows[0]) if program.rows else 1
            if inner is not None:
                while lanes > 1 and inner < lanes:
                    lanes //= 2
            self._tasks(per_task, lanes, inner)
            self.built = Built(k.finish((1, 1, 1)), "tasks", lanes)
        else:
            block = target.schedule_class == "block"
            workgroup = BLOCK_LANES if block else min(SIMT_WORKGROUP, target.max_workgroup_size)
            n = k.let(product(self.sizes))
            if block:
                whole_blocks(k, n, workgroup, self._element)
            else:
                i = k.global_id(workgroup)
                with k.If(i < n):
                    self._element(i)
            self.built = Built(k.finish((workgroup, 1, 1)), "elements", 1)

    def _element(self, i: Node) -> None:
        self._stores(self.program.stores, self._leaves(unravel(self.k, self.sizes, i)), {})

    @staticmethod
    def _leaves(coordinates: Sequence[Any]) -> dict[str, Any]:
        return {f"x{d}": ir.cast(c, "i32") for d, c in enumerate(coordinates)}

    def _tasks(self, per_task: Node, lanes: int, inner: int | None) -> None:
        """Rows cut into chunks; a task takes several of them. As nest.pointwise on CPU devices."""
        k, size = self.k, self.sizes[0]
        chunks = k.let(ir.idiv(size + (TASK_ELEMENTS - 1), TASK_ELEMENTS))
        items: Any = chunks
        for s in self.sizes[1:]:
            items = items * s
        k.stream(product(self.sizes))
        first = k.let(k.group_index() * per_task)
        last = k.let(ir.minimum(first + per_task, items))
        with k.For(first, last) as item:
            if chunks.op == "const" and chunks.attr == 1:
                row, start, stop = item, ir.const(0, "i32"), ir.cast(size, "i32")
            else:
                row = k.let(ir.idiv(item, chunks))
                start = k.let(ir.cast((item - row * chunks) * TASK_ELEMENTS, "i32"))
                stop = k.let(ir.minimum(start + TASK_ELEMENTS, ir.cast(size, "i32")))
            rest = unravel(k, self.sizes[1:], row)
            j = k.var("i32", start)
            for width in (lanes, 1) if lanes > 1 and (inner is None or inner % lanes) else (lanes,):
                with k.While(lambda: j + width <= stop):  # noqa: B023 (called at once)
                    at = j.as_node() + k.lanes(width)
                    self._stores(self.program.stores, self._leaves([at, *rest]), {})
                    j.set(j + width)


class _Reduction(_Evaluation, Rows):
    """Row loops of nest.rows over a Program: levels, accumulators and trees are those of nest.rows."""

    def __init__(self, program: Program, target: Target) -> None:
        self._begin(program, target)
        k = self.k
        self.split, self.block = False, target.schedule_class == "block"
        self.bufs = self.buffers
        self.kept = []
        self.reduced = len(program.reduced)
        self.ndim = self.reduced + len(program.rows)
        vector = target.schedule_class == "vector"
        along = program.along_rows and bool(program.rows)
        self.schedule = ("lanes_r" if along else "lanes_d") if vector else "invocation" if along else "workgroup"
        self.lanes = 1 if self._scalar_only() or not vector else lanes_for([t for _, t, _ in program.buffers])
        self.subgroups = self.schedule == "workgroup" and target.subgroup > 0 and not self.block
        per_task = k.scalar("rows_per_task", "u32") if vector else None
        self.sizes = [self._size(n) for n in (*program.reduced, *program.rows)]
        self.results = [e for s in program.stores for e in (s.index, s.value)]
        self._analyse()
        self._emit_schedule(per_task)
        self.built = Built(k.finish((self.workgroup, 1, 1)), self.schedule, self.lanes)

    def _workgroup(self) -> int:
        known = [size_of(n) for n in self.program.reduced]
        if self.block and self.schedule == "workgroup" and None not in known:  # short rows leave no lanes idle
            return min(BLOCK_LANES, max(128, 1 << (product(known) - 1).bit_length()))
        return super()._workgroup()

    def _analyse(self) -> None:
        nodes = ir.walk(*self.results)
        self.level: dict[Node, int] = {}
        self.varies: dict[Node, bool] = {}
        self.groups: dict[tuple, int] = {}
        for n in nodes:
            self.level[n] = max((self.level[a] for a in n.args), default=0) + (n.op == "red")
            if n.op == "leaf":
                self.varies[n] = n.attr[0] in "rp" and n.attr not in self.scalar_nodes
            else:
                self.varies[n] = n.op != "red" and any(self.varies[a] for a in n.args)
            if n.op == "red":
                self.groups[n.attr[0], n.args] = self.level[n] - 1
        stores = self.program.stores
        self.elementwise = [i for i, s in enumerate(stores) if s.per_element]
        top = max((self.level[e] for i in self.elementwise for e in (stores[i].index, stores[i].value)), default=-1)
        self.loops = max(max(self.groups.values(), default=-1), top) + 1

    def _leaves_at(self, at: dict[int, Any], position: Any) -> dict[str, Any]:
        leaves = dict(self.row_leaves)
        for d, c in at.items():
            leaves[f"r{d}"] = ir.cast(c, "i32")
        leaves["position"] = ir.cast(position, "i32")
        return leaves

    def evaluate(self, exprs: Sequence[Any], leaf: Any) -> list[Any]:
        return self._emit(exprs, leaf, self.done)

    def row(self, coordinates: Sequence[Any], lanes_r: int, split: Any, row_id: Any) -> None:
        self.row_leaves: Any = {f"x{d}": ir.cast(c, "i32") for d, c in enumerate(coordinates)}
        self.row_leaf = self.row_leaves  # type: ignore[assignment]
        self.done = {}
        stores = self.program.stores
        for loop in range(self.loops):
            now = [g for g, at in self.groups.items() if at == loop]
            here = self.elementwise if loop == self.loops - 1 else []
            self._hoist(
                [x for _, xs in now for x in xs] + [e for i in here for e in (stores[i].index, stores[i].value)]
            )
            results = self._loop(now, here, lanes_r, split)
            for (monoid, xs), values in zip(now, results, strict=True):
                for i, (t, v) in enumerate(zip(monoid.dtypes, values, strict=True)):
                    self.done[Node("red", t, *xs, attr=(monoid, i))] = v
        rest = [s for s in stores if not s.per_element]
        if not rest:
            return
        if self.schedule == "workgroup":
            with self.k.If(ir.eq(self.k.local_id(), 0)):
                self._stores(rest, self.row_leaves, self.done)
        else:
            self._stores(rest, self.row_leaves, self.done)

    def _element(
        self, now: list, accs: list, stores: Sequence[int], at: dict[int, Any], position: Any, later: list | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        leaves = self._leaves_at(at, position)
        if now:
            values = self.evaluate([x for _, xs in now for x in xs], leaves)
            for (monoid, xs), acc in zip(now, accs, strict=True):
                self._combine(monoid, acc, values[: len(xs)])
                values = values[len(xs) :]
        chosen = [self.program.stores[i] for i in stores]
        if later is None or any(s.mode for s in chosen):
            if chosen:
                self._stores(chosen, leaves, self.done)
            return
        values = self._emit([e for s in chosen for e in (s.index, s.value)], leaves, self.done)
        later += [(s, self.k.let(i), self.k.let(v)) for s, i, v in zip(chosen, values[::2], values[1::2], strict=True)]


def build(program: Program, target: Target) -> Built:
    """The kernel of a fused group; kernels.kernel.Unsupported where the target cannot compute it."""
    return (_Reduction if program.reduced else _Pointwise)(program, target).built


__all__ = ["DTYPES", "Built", "Callable", "Program", "Store", "build"]
