"""Kernels from fused groups: a Program is what Inductor's scheduler decided to fuse, as expressions over coordinates.

Expressions are those of kernels/ir.py with further operations: leaves x0, x1 … (coordinates of the rows, fastest first),
r0, r1 … (of the reduced dimensions), "position" (of an element in its row); load[buffer](index[, mask, other]);
check[site](index, size[, mask]), an index that is reported and clamped when it is out of range; red[monoid, i](elements…).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..kernels import ir
from ..kernels.builder import KernelBuilder, fourfold
from ..kernels.ir import Node
from ..kernels.kernel import DTYPES, Kernel, Target
from ..kernels.nest import SIMT_ELEMENTS, SIMT_WORKGROUP, TASK_ELEMENTS, Rows, lanes_for
from ..kernels.nest.columns import for_columns, for_rows
from ..kernels.nest.elementwise import a_workgroup_apart, four_neighbours, whole_blocks
from ..kernels.nest.operands import BLOCK_LANES, cdiv, product, unravel

MANY_ROWS = 512  # a compute unit of a GPU, of which each invocation takes one
SHORT = 32  # reduced elements whose totals fit registers anyway
MIN_COLUMNS = 128  # of a task of "columns"
KEPT_ELEMENTS = 8192  # of intermediate rows that one loop leaves for the next
COSTLY = frozenset(
    ("exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "erf", "pow", "sin", "cos", "sqrt", "rsqrt", "div")
)
SERIES = COSTLY - {"sqrt", "rsqrt", "div"}  # that take a series instead of an instruction
TOTALS = 4096  # that stay in the first-level cache
BLOCK_ROWS = 256  # summed one after the other
LONG = 400  # nodes of expressions that a GPU computes for one element at a time, for the sake of registers


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
    parts: tuple[Program, ...] = ()  # pointwise programs on these buffers, instead of rows and stores


@dataclass(frozen=True)
class Built:
    """A kernel and what its launch must know: schedule, vector lanes (of "columns", those of a task; of "elements", those of
    an invocation; of "parts", its workgroups)."""

    kernel: Kernel
    schedule: str  # "tasks" | "elements" | "lanes_d" | "lanes_r" | "columns" | "workgroup" | "beside" | "invocation" | "parts"
    lanes: int


def size_of(n: Node) -> int | None:
    """A size that is known when the kernel is built."""
    return n.attr if n.op == "const" else None


def progression(index: Node, leaf: str) -> tuple[int | None, int]:
    """(step, divisor) of an index: how much it grows from one value of a leaf to the next, None if not known; and what
    divides it where the leaf is 0 (0: it is 0)."""
    if index.op == "const":
        return 0, abs(int(index.attr))
    if index.op == "leaf":
        return (1, 0) if index.attr == leaf else (0, 1)
    if index.op == "cast" and {index.dtype, index.args[0].dtype} <= {"i32", "u32"}:
        return progression(index.args[0], leaf)
    parts = [progression(a, leaf) for a in index.args]
    steps = [step for step, _ in parts]
    if index.op in ("add", "sub") and None not in steps:
        (a, m), (b, n) = parts
        assert a is not None and b is not None
        return (a + b if index.op == "add" else a - b), math.gcd(m, n)
    for one, other, (step, divisor) in zip(index.args, reversed(index.args), parts, strict=False):
        if index.op == "mul" and other.op == "const" and step is not None and one is not other:
            return step * other.attr, divisor * abs(other.attr)
    return (0, 1) if all(step == 0 for step in steps) else (None, 1)


class _Evaluation:
    """Emits expressions of a Program."""

    k: KernelBuilder
    program: Program
    target: Target
    fours: frozenset[str] = frozenset()  # buffers that are accessed four elements at a time, where they are aligned
    loads4: tuple[Node, ...] = ()  # the loads of those, in order

    def _begin(self, program: Program, target: Target) -> None:
        self.program, self.target = program, target
        self.k = KernelBuilder(target, program.name)
        self.buffers = {}
        for n, t, m in program.buffers:
            more = {"four": True} if n in self.fours else {}
            self.buffers[n] = self.k.buffer(n, t, m, program.windows.get(n, 1), **more)
        self.scalar_nodes = {n: self.k.scalar(n, t) for n, t in program.scalars}
        self.site_nodes = [self.k.scalar(f"site{i}", "u32") for i in range(program.sites)]

    def _by_four(self, leaf: str, size: Node | None = None, anywhere: bool = False) -> None:
        """Finds what is accessed by four along a coordinate: fours and loads4; nothing, where a store is not among it. Four
        neighbours begin at a multiple of four, of a coordinate of this size where others follow it, or anywhere."""
        program = self.program
        if (size is not None and (size_of(size) or 1) % 4) or self._scalar_only():
            return

        def by_four(buffer: str, index: Node) -> bool:
            dtype, mode = kinds[buffer]
            step, divisor = progression(index, leaf)
            known = (anywhere or divisor % 4 == 0) and all(n.op != "red" for n in ir.walk(index))
            return step == 1 and known and fourfold(dtype, mode, program.windows.get(buffer, 1))

        kinds = {n: (t, m) for n, t, m in program.buffers}
        stores = [s for s in program.stores if s.per_element or not program.reduced]
        if not all(by_four(s.buffer, s.index) for s in stores):
            return
        loads = [n for n in ir.walk(*(n for s in program.stores for n in (s.index, s.value))) if n.op == "load"]
        self.loads4 = tuple(n for n in loads if len(n.args) == 1 and by_four(n.attr, n.args[0]))
        self.fours = frozenset([*(s.buffer for s in stores), *(n.attr for n in self.loads4)])

    def _load4(self, loads: Sequence[Node], leaves: dict[str, Any], done: dict[Node, Any]) -> list[dict[Node, Any]]:
        """The values of loads by four, element by element. leaves: coordinates of the first."""
        known: list[dict[Node, Any]] = [{} for _ in range(4)]
        for n in loads:
            for values, v in zip(known, self.buffers[n.attr].load4(self._emit(n.args, leaves, done)[0]), strict=True):
                values[n] = v
        return known

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
                return self._check(*n.attr, *args)
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

    def _check(self, site: int, from_end: bool, index: Node, size: Node, mask: Node | None = None) -> Node:
        """A checked index; from_end: which may be negative, down to -size. 0 or -size where it is out of range."""
        k = self.k
        index = k.let(index)
        size = ir.cast(size, index.dtype)
        low = k.let(ir.neg(size)) if from_end else ir.const(0, index.dtype)
        if mask is not None:
            index = k.let(ir.where(mask, index, ir.const(0, index.dtype)))
        number = self.site_nodes[site]
        if index.lanes == 1:
            return ir.cast(k.check_index(index, low, size, number), "i32")
        bad = k.let(ir.or_(ir.lt(index, low), ir.ge(index, size)))
        with k.If(k.raw("bool", f"any({k.atom(bad)})")):
            for lane in range(index.lanes):
                k.let(k.check_index(k.extract(index, lane), low, size, number))
        return ir.cast(ir.where(bad, low, index), "i32")

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

    def _lanes(self, along: str) -> int:
        """Of vectors along a coordinate, or those whose names begin so: as many as the widest of what is accessed there allows."""
        if self._scalar_only():
            return 1
        stores = self.program.stores
        accesses = [(s.buffer, s.index) for s in stores]
        accesses += [
            (n.attr, n.args[0]) for n in ir.walk(*(n for s in stores for n in (s.index, s.value))) if n.op == "load"
        ]
        kinds = {name: dtype for name, dtype, _ in self.program.buffers}
        moving = {
            name for name, index in accesses if any(n.op == "leaf" and n.attr.startswith(along) for n in ir.walk(index))
        }
        return lanes_for([kinds[name] for name in moving])

    def _scalar_only(self) -> bool:
        return any(s.mode == "add" for s in self.program.stores)


class _Pointwise(_Evaluation):
    def __init__(self, program: Program, target: Target) -> None:
        self._plan(program, target)
        self._begin(program, target)
        k = self.k
        vector = target.schedule_class == "vector"
        per_task = k.scalar("rows_per_task", "u32") if vector else None
        self.sizes = [self._size(n) for n in program.rows] or [ir.const(1, "u32")]
        if vector:
            assert per_task is not None
            lanes = self._tasks(per_task)
            self.built = Built(k.finish((1, 1, 1)), "tasks", lanes)
        else:
            block = target.schedule_class == "block"
            workgroup = BLOCK_LANES if block else min(SIMT_WORKGROUP, target.max_workgroup_size)
            n = k.let(product(self.sizes))
            if block:
                whole_blocks(k, n, workgroup, self._element)
            else:
                self._simt(n, workgroup)
            self.built = Built(k.finish((workgroup, 1, 1)), "elements", self.each)

    def _plan(self, program: Program, target: Target) -> None:
        """How many elements an invocation of a GPU computes, and which of them by four."""
        self.program, self.each, self.fours, self.loads4 = program, 1, frozenset(), ()
        if target.schedule_class == "simt" and not target.software and program.rows and not self._scalar_only():
            nodes = ir.walk(*(n for s in program.stores for n in (s.index, s.value)))
            if len(nodes) <= LONG:
                self.each = SIMT_ELEMENTS
                self._by_four("x0", program.rows[0] if len(program.rows) > 1 else None)

    def _simt(self, n: Node, workgroup: int, group: Node | None = None) -> None:
        """Elements of a workgroup; group: as of whole_blocks."""
        k = self.k
        i = k.global_id(workgroup) if group is None else k.let(group * workgroup + k.local_id())
        if self.each == 1:
            with k.If(i < n):
                self._element(i)
            return
        if not self.fours:
            a_workgroup_apart(k, n, workgroup, self.each, self._read, self._element, group)
            return
        off: Any = ir.const(0, "u32")
        for name in sorted(self.fours):
            off = ir.or_(off, self.buffers[name].misaligned())
        with k.If(ir.eq(off, 0)):
            four_neighbours(k, k.let(i * 4), n, self._four, self._element)
        with k.Else():
            a_workgroup_apart(k, n, workgroup, self.each, self._read, self._element, group)

    def _element(self, i: Node) -> None:
        self._stores(self.program.stores, self._leaves(unravel(self.k, self.sizes, i)), {})

    def _read(self, i: Node) -> Callable[[], None]:
        """Computes element i; what stores it."""
        stores = self.program.stores
        leaves = self._leaves(unravel(self.k, self.sizes, i))
        values = [self.k.let(v) for v in self._emit([e for s in stores for e in (s.index, s.value)], leaves, {})]

        def finish() -> None:
            for s, index, value in zip(stores, values[::2], values[1::2], strict=True):
                self._store(s, index, value)

        return finish

    def _four(self, i: Node) -> None:
        """Elements i .. i + 3."""
        k, stores = self.k, self.program.stores
        first = self._leaves(unravel(k, self.sizes, i))
        values = []
        for u, known in enumerate(self._load4(self.loads4, first, {})):
            leaves = {**first, "x0": first["x0"] + u}
            values.append([k.let(v) for v in self._emit([s.value for s in stores], leaves, known)])
        indices = [k.let(v) for v in self._emit([s.index for s in stores], first, {})]
        for s, index, four in zip(stores, indices, zip(*values, strict=True), strict=True):
            self.buffers[s.buffer].store4(index, list(four))

    @staticmethod
    def _leaves(coordinates: Sequence[Any]) -> dict[str, Any]:
        return {f"x{d}": ir.cast(c, "i32") for d, c in enumerate(coordinates)}

    def _tasks(self, per_task: Node) -> int:
        """Rows cut into chunks; a task takes several of them. As nest.pointwise on CPU devices. Gives the vectors' lanes."""
        k = self.k
        chunks = k.let(ir.idiv(self.sizes[0] + (TASK_ELEMENTS - 1), TASK_ELEMENTS))
        k.stream(product(self.sizes))
        first = k.let(k.group_index() * per_task)
        last = k.let(ir.minimum(first + per_task, product([chunks, *self.sizes[1:]])))
        return self._chunks(chunks, first, last)

    def _chunks(self, chunks: Node, first: Node, last: Node) -> int:
        """Chunks first .. last of the rows, each of which has `chunks`."""
        k, size = self.k, self.sizes[0]
        lanes, inner = self._lanes("x0"), size_of(self.program.rows[0]) if self.program.rows else 1
        while lanes > 1 and inner is not None and inner < lanes:
            lanes //= 2
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
        return lanes


class _Parts(_Pointwise):
    """Programs without symbols that have nothing to do with each other, of any sizes: a workgroup computes elements of one of them, a task of a CPU
    of those that its share of all elements lies in."""

    def __init__(self, program: Program, target: Target) -> None:
        plans = []
        for part in program.parts:
            self._plan(part, target)
            plans.append((part, self.each, self.fours, self.loads4))
        self.fours = frozenset(name for _, _, fours, _ in plans for name in fours)
        self._begin(program, target)
        self.plans = plans
        groups = {"vector": self._shares, "simt": self._branches, "block": self._choices}[target.schedule_class]()
        self.built = Built(self.k.finish((self.workgroup, 1, 1)), "parts", groups)

    def _enter(self, number: int) -> list[int]:
        """Turns to a part; its sizes."""
        self.program, self.each, self.fours, self.loads4 = self.plans[number]
        sizes = [int(n.attr) for n in self.program.rows] or [1]
        self.sizes = [ir.const(n, "u32") for n in sizes]
        return sizes

    def _shares(self) -> int:
        """Tasks of CPUs. A task has the chunks that begin in its share of all elements."""
        k, self.workgroup = self.k, 1
        begin = k.let(k.group_index() * TASK_ELEMENTS)
        before = 0
        for number in range(len(self.plans)):
            sizes = self._enter(number)
            chunks = cdiv(sizes[0], TASK_ELEMENTS)
            count, each = chunks * product(sizes[1:]), min(sizes[0], TASK_ELEMENTS)

            def at(position: Node, count: int = count, each: int = each, before: int = before) -> Node:
                """How many of the chunks begin before a position."""
                place = ir.maximum(position, before) - before
                return k.let(ir.minimum(ir.idiv(place + (each - 1), each), count))

            self._chunks(ir.const(chunks, "u32"), at(begin), at(begin + TASK_ELEMENTS))
            before += count * each
        return cdiv(before, TASK_ELEMENTS)

    def _branches(self) -> int:
        """Workgroups of GPUs."""
        self.workgroup = min(SIMT_WORKGROUP, self.target.max_workgroup_size)
        ends = [0]
        for number, (_, each, _, _) in enumerate(self.plans):
            ends.append(ends[-1] + cdiv(product(self._enter(number)), self.workgroup * each))
        group = self.k.group_index()

        def body(number: int) -> None:
            n = product(self._enter(number))
            self._simt(ir.const(n, "u32"), self.workgroup, self.k.let(group - ends[number]))

        self._branch(group, ends, 0, len(self.plans), body)
        return ends[-1]

    def _branch(self, group: Node, ends: Sequence[int], first: int, last: int, body: Callable[[int], None]) -> None:
        """body(i) in the workgroups ends[i] .. ends[i + 1], of i from first to last."""
        if last - first == 1:
            with self.k.If(group < ends[last]):
                body(first)
            return
        middle = (first + last) // 2
        with self.k.If(group < ends[middle]):
            self._branch(group, ends, first, middle, body)
        with self.k.Else():
            self._branch(group, ends, middle, last, body)

    def _choices(self) -> int:
        """Blocks of Triton. Parts that differ in their buffers and in how many elements they have are one piece of code, for which pointers are chosen."""
        k, self.workgroup = self.k, BLOCK_LANES
        alike: dict[Any, list[tuple[list[str], int]]] = {}
        programs: dict[Any, Program] = {}
        for number, (part, *_) in enumerate(self.plans):
            slots = {name: f"slot{i}" for i, (name, _, _) in enumerate(part.buffers)}
            renamed = with_buffers(part, slots)
            key = (tuple(part.rows[:-1]), tuple(b[1:] for b in part.buffers), tuple(renamed.stores))
            alike.setdefault(key, []).append(([name for name, _, _ in part.buffers], product(self._enter(number))))
            programs[key] = renamed
        ends = [0]
        for rows in alike.values():
            ends.append(ends[-1] + sum(cdiv(n, BLOCK_LANES) for _, n in rows))
        group, everything = k.group_index(), self.buffers

        def body(number: int) -> None:
            key = list(alike)[number]
            rows, start = [], ends[number]
            for names, n in alike[key]:
                rows.append(([everything[name] for name in names], [start, n]))
                start += cdiv(n, BLOCK_LANES)
            self.program = programs[key]
            chosen, (begin, n) = k.choose(group, [numbers[0] for _, numbers in rows], rows)  # type: ignore[attr-defined]
            self.buffers = dict(zip((name for name, _, _ in self.program.buffers), chosen, strict=True))
            self.sizes = [*map(self._size, key[0]), n]
            whole_blocks(k, n, BLOCK_LANES, self._element, k.let(group - begin))

        self._branch(group, ends, 0, len(alike), body)
        return ends[-1]


def with_buffers(program: Program, names: Mapping[str, str]) -> Program:
    """A program with other names for its buffers."""
    memo: dict[Node, Any] = {}

    def rename(n: Node) -> Any:
        if n.op != "load":
            return None
        args = [ir.substitute(a, rename, memo) for a in n.args]
        return Node("load", n.dtype, *args, attr=names[n.attr])

    stores = [
        replace(
            s, buffer=names[s.buffer], **{f: ir.substitute(getattr(s, f), rename, memo) for f in ("index", "value")}
        )
        for s in program.stores
    ]
    return replace(program, buffers=[(names[n], dtype, mode) for n, dtype, mode in program.buffers], stores=stores)


def columns_beside(target: Target, rows: int | None, first: int | None) -> int:
    """Of how many rows beside each other a workgroup of a GPU computes all: as many as fill accesses to memory, fewer where units would be
    left idle. 1 where there are enough rows for an invocation each. rows: of all dimensions; first: along the fastest; None if not known."""
    if rows is not None and rows >= MANY_ROWS * target.compute_units:
        return 1
    columns = 32 if first is None else min(32, 1 << (first - 1).bit_length())
    while columns > 8 and rows is not None and rows < columns * target.compute_units:
        columns //= 2
    return columns


class _Reduction(_Evaluation, Rows):
    """Row loops of nest.rows over a Program: levels, accumulators and trees are those of nest.rows."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program, self.target = program, target
        self.split, self.block = False, target.schedule_class == "block"
        self.kept = []
        self.kept_fours = []
        self.reduced = len(program.reduced)
        self.ndim = self.reduced + len(program.rows)
        vector = target.schedule_class == "vector"
        along = program.along_rows and bool(program.rows)
        self.schedule = ("lanes_r" if along else "lanes_d") if vector else "invocation" if along else "workgroup"
        if along and not vector:
            self.columns = self._beside()
            self.schedule = "workgroup" if self.columns > 1 else "invocation"
        if self._on_gpu() and self.reduced == 1 and self.columns == 1:
            self._by_four("r0", anywhere=True)
        self._begin(program, target)
        k = self.k
        self.bufs = self.buffers
        self.lanes = self._lanes("x0" if along else "r") if vector else 1
        self.subgroups = self.schedule == "workgroup" and target.subgroup > 0 and not self.block and self.columns == 1
        self.sizes = [self._size(n) for n in (*program.reduced, *program.rows)]
        self.results = [e for s in program.stores for e in (s.index, s.value)]
        self._analyse()
        if self._by_columns():
            width = self._columns()
            self.built = Built(k.finish((1, 1, 1)), "columns", width)
            return
        self._emit_schedule(k.scalar("rows_per_task", "u32") if vector else None)
        kernel = k.finish((self.workgroup, 1, 1))
        self.built = (
            Built(kernel, "beside", self.columns) if self.columns > 1 else Built(kernel, self.schedule, self.lanes)
        )

    def _beside(self) -> int:
        """How many rows beside each other a workgroup takes where all of a row is computed in one kernel; 1 for an invocation a row, where rows are
        short or enough for the whole device."""
        program, target = self.program, self.target
        known = [[size_of(n) for n in part] for part in (program.rows, program.reduced)]
        rows, length = (None if None in part else product(part) for part in known)
        if not any(s.per_element for s in program.stores) or (length is not None and length < 2 * SHORT):
            return 1
        return columns_beside(target, rows, known[0][0])

    def _by_columns(self) -> bool:
        """Whether the rows' totals are kept in memory, so that what is reduced over a slow dimension is read in order."""
        if self.schedule != "lanes_r" or self.lanes == 1:
            return False
        known = [size_of(n) for n in self.program.reduced]
        columns = size_of(self.program.rows[0])
        return (None in known or product(known) >= SHORT) and (columns is None or columns >= 2 * self.lanes)

    def _columns(self) -> int:
        """Every task reduces some columns; how many."""
        k = self.k
        arrays = 2 * sum(len(m.dtypes) for m, _ in self.groups)
        work = product([size_of(n) or 1 for n in self.program.rows])
        tasks = 2 if self.elementwise else 4  # a unit; several reads of all rows gain more from wide pieces of them
        width = min(work // (tasks * self.target.compute_units), TOTALS // arrays)
        width = max(width // self.lanes * self.lanes, MIN_COLUMNS // 2 if self.elementwise else MIN_COLUMNS)
        columns = self.sizes[self.reduced]
        blocks = k.let(ir.idiv(columns + (width - 1), width))
        outer = k.let(ir.idiv(k.group_index(), blocks))
        left = k.let(ir.cast((k.group_index() - outer * blocks) * width, "i32"))
        right = k.let(ir.minimum(left + width, ir.cast(columns, "i32")))
        others = unravel(k, self.sizes[self.reduced + 1 :], outer)
        count = k.let(ir.cast(product(self.sizes[: self.reduced]), "i32"))
        arrays_of = {g: [k.shared(t, width) for t in g[0].dtypes] for g in self.groups}  # of totals
        stores = self.program.stores

        def leaves(column: Node) -> dict[str, Any]:
            return {f"x{d}": ir.cast(c, "i32") for d, c in enumerate([column, *others])}

        def finished(loop: int, column: Node) -> dict[Node, Any]:
            """The totals that loops before this one found."""
            return {
                Node("red", t, *xs, attr=(m, i)): array[column - left]
                for ((m, xs), at), arrays in zip(self.groups.items(), arrays_of.values(), strict=True)
                for i, (t, array) in enumerate(zip(m.dtypes, arrays, strict=True))
                if at < loop
            }

        for loop in range(self.loops):
            now = [g for g, at in self.groups.items() if at == loop]
            here = [stores[i] for i in self.elementwise] if loop == self.loops - 1 else []

            def each(rows: Sequence[Node], column: Node, now: list = now, here: list = here, loop: int = loop) -> list:
                """Stores the elements of a few rows; per reduction, what its total takes in."""
                elements: list[list[Sequence[Any]]] = [[] for _ in now]
                done = finished(loop, column)
                for row in rows:
                    at = dict(enumerate(unravel(k, self.sizes[: self.reduced], ir.cast(row, "u32"))))
                    place = self._leaves_at(leaves(column), at, row)
                    values = self._emit([x for _, xs in now for x in xs], place, done)
                    for (_, xs), taken in zip(now, elements, strict=True):
                        taken.append(values[: len(xs)])
                        values = values[len(xs) :]
                    if here:
                        self._stores(here, place, done)
                return elements

            if now:
                self._column_totals(now, [arrays_of[g] for g in now], width, left, right, count, each)
            else:
                for_rows(k, ir.const(0, "i32"), count, left, right, self.lanes, each)
        rest = [s for s in stores if not s.per_element]
        if rest:
            for_columns(
                k,
                left,
                right,
                self.lanes,
                lambda column: self._stores(rest, leaves(column), finished(self.loops, column)),
            )
        return width

    def _column_totals(
        self, now: list, totals: list[list[Any]], width: int, left: Node, right: Node, count: Node,
        each: Callable[[Sequence[Node], Node], list],
    ) -> None:  # fmt: skip
        """Adds up columns left .. right of all rows. Long sums are sums of blocks' sums, as everywhere."""
        k = self.k
        parts = [[k.shared(t, width) for t in m.dtypes] for m, _ in now]

        def clear(arrays: list) -> None:
            def body(column: Node) -> None:
                for (m, _), components in zip(now, arrays, strict=True):
                    for array, start, t in zip(components, m.init, m.dtypes, strict=True):
                        array[column - left] = ir.const(start, t)

            for_columns(k, left, right, self.lanes, body)

        def combine(arrays: list, column: Node, elements: Sequence[Sequence[Sequence[Any]]]) -> None:
            """elements: per reduction, those that its total takes in."""
            for (m, _), components, values in zip(now, arrays, elements, strict=True):
                total = tuple(array[column - left] for array in components)
                for v in values:
                    total = tuple(k.let(x) for x in m.combine(total, tuple(v)))
                for array, x in zip(components, total, strict=True):
                    array[column - left] = x

        clear(totals)
        with k.For(ir.const(0, "i32"), count, BLOCK_ROWS) as start:
            clear(parts)
            stop = k.let(ir.minimum(start + BLOCK_ROWS, count))
            for_rows(
                k, start, stop, left, right, self.lanes, lambda rows, column: combine(parts, column, each(rows, column))
            )

            def whole(column: Node) -> None:
                combine(totals, column, [[[array[column - left] for array in components]] for components in parts])

            for_columns(k, left, right, self.lanes, whole)

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
        self.rows_kept: dict[Node, Any] = {}
        self.ahead: list[Node] = []
        self.ahead_in = self.loops - 1
        if self.schedule == "lanes_d" and self.loops > 1:
            self._plan_loops()

    def _exprs(self, loop: int) -> list[Any]:
        """What a loop evaluates."""
        stores = self.program.stores
        here = self.elementwise if loop == self.loops - 1 else []
        return [x for (_, xs), at in self.groups.items() if at == loop for x in xs] + [
            e for i in here for e in (stores[i].index, stores[i].value)
        ]

    def _plan_loops(self) -> None:
        """What the loops of a row keep for later ones in memory that stays in the first-level cache (rows_kept), and which loads one
        of them (ahead_in) makes for the rows to come (ahead)."""
        loops: dict[Node, list[int]] = {}
        users: dict[Node, set[Node]] = {}
        ends: dict[Node, int] = {}  # the last loop that wants an expression itself
        for loop in range(self.loops):
            seen: set[Node] = set()
            todo = self._exprs(loop)
            ends.update((n, loop) for n in todo)
            while todo:
                n = todo.pop()
                if n in seen or n.op == "red" or not self.varies[n]:
                    continue
                seen.add(n)
                loops.setdefault(n, []).append(loop)
                todo += n.args
                for a in n.args:
                    users.setdefault(a, set()).add(n)
        several = {n for n, at in loops.items() if len(at) > 1}
        length = size_of(self.program.reduced[0]) if self.reduced == 1 else None
        costly: set[Node] = set()  # to compute once more, from what is kept
        for n in ir.walk(*loops):
            if n not in loops or (n.op not in COSTLY and not any(a in costly for a in n.args)):
                continue
            first = loops[n][0]
            again = n in several and (  # not only for what is there already
                ends.get(n, 0) > first or any(u not in several or loops[u][0] > first for u in users.get(n, ()))
            )
            room = KEPT_ELEMENTS - len(self.rows_kept) * (length or 0)
            if again and length is not None and length <= room and n.dtype in ("f32", "f64"):
                self.rows_kept[n] = (first, self.k.shared(n.dtype, length))
            else:
                costly.add(n)
        if len(self.program.rows) == 1:
            reads = {name for name, _, mode in self.program.buffers if mode == "r"}
            for n in loops:
                if n.op == "load" and len(n.args) == 1 and n.attr in reads and self._contiguous(n.args[0]):
                    self.ahead.append(n)
            # The loop that computes most leaves memory idle; the last one works from the cache, but may store.
            series = [0] * self.loops
            for n, at in loops.items():
                series[at[0]] += n.op in SERIES
            if any(series):
                self.ahead_in = series.index(max(series))

    @staticmethod
    def _contiguous(index: Node) -> bool:
        """Whether an index is x0 * a size + r0."""
        leaves = {n.attr for n in ir.walk(index) if n.op == "leaf"}
        terms = index.args if index.op == "add" else ()
        return (
            {"x0", "r0"} <= leaves
            and any(t.op == "leaf" and t.attr == "r0" for t in terms)
            and all(n.op in ("add", "mul", "leaf", "const") for n in ir.walk(index))
        )

    @staticmethod
    def _leaves_at(row: dict[str, Any], at: dict[int, Any], position: Any) -> dict[str, Any]:
        leaves = dict(row)
        for d, c in at.items():
            leaves[f"r{d}"] = ir.cast(c, "i32")
        leaves["position"] = ir.cast(position, "i32")
        return leaves

    def evaluate(self, exprs: Sequence[Any], leaf: Any) -> list[Any]:
        return self._emit(exprs, leaf, self.done)

    def _misaligned(self, first: Any) -> list[Node]:
        leaves = self._leaves_at(self.row_leaves, {0: first}, first)
        accesses = dict.fromkeys((n.attr, n.args[0]) for n in self.loads4)
        accesses.update(dict.fromkeys((s.buffer, s.index) for s in self.program.stores if s.per_element))
        return [self.buffers[name].misaligned(self._emit([index], leaves, {})[0]) for name, index in accesses]

    def _loop_exprs(self, now: list, stores: Sequence[int]) -> list[Any]:
        chosen = [self.program.stores[i] for i in stores]
        return [x for _, xs in now for x in xs] + [e for s in chosen for e in (s.index, s.value)]

    def _load_fours(self, exprs: Sequence[Any], t: Node) -> list[dict[Any, Any]]:
        used: set[Node] = set()
        todo = list(exprs)
        while todo:
            n = todo.pop()
            if n not in used and n.op != "red" and n not in self.done:
                used.add(n)
                todo += n.args
        loads = [n for n in self.loads4 if n in used]
        return self._load4(loads, self._leaves_at(self.row_leaves, {0: t}, t), self.done)

    def row(self, coordinates: Sequence[Any], lanes_r: int, split: Any, row_id: Any) -> None:
        self.row_leaves: Any = {f"x{d}": ir.cast(c, "i32") for d, c in enumerate(coordinates)}
        self.row_leaf = self.row_leaves  # type: ignore[assignment]
        self.done = {}
        self._begin_fours(split)
        stores = self.program.stores
        for loop in range(self.loops):
            now = [g for g, at in self.groups.items() if at == loop]
            here = self.elementwise if loop == self.loops - 1 else []
            self._hoist(self._exprs(loop))
            self.loop = loop
            results = self._loop(now, here, lanes_r, split)
            for (monoid, xs), values in zip(now, results, strict=True):
                for i, (t, v) in enumerate(zip(monoid.dtypes, values, strict=True)):
                    self.done[Node("red", t, *xs, attr=(monoid, i))] = v
        rest = [s for s in stores if not s.per_element]
        if not rest:
            return
        if self.schedule == "workgroup":
            lid = self.k.local_id()
            once = ir.eq(lid, 0) if self.columns == 1 else ir.and_(lid < self.columns, self.inside)
            with self.k.If(once):
                self._stores(rest, self.row_leaves, self.done)
        else:
            self._stores(rest, self.row_leaves, self.done)

    def _element(
        self, now: list, accs: list, stores: Sequence[int], at: dict[int, Any], position: Any, later: list | None = None,
        kept: dict[Any, Any] | None = None, collect: bool = False,
    ) -> None:  # fmt: skip
        leaves = self._leaves_at(self.row_leaves, at, position)
        done = {**self.done, **(kept or {})}
        if self.rows_kept:
            done = dict(done)
            for n, (first, array) in self.rows_kept.items():
                if self.loop == first:
                    done[n] = self.k.let(self._emit([n], leaves, done)[0])
                    array[position] = done[n]
                elif self.loop > first:
                    done[n] = array[position]
        if self.ahead and self.loop == self.ahead_in and position.lanes > 1:
            later_row = {**leaves, "x0": leaves["x0"] + 2}
            for n in self.ahead:
                self.buffers[n.attr].prefetch(self._emit([n.args[0]], later_row, {})[0])
        if now:
            values = self._emit([x for _, xs in now for x in xs], leaves, done)
            for (monoid, xs), acc in zip(now, accs, strict=True):
                if collect:
                    acc.append(tuple(values[: len(xs)]))
                else:
                    self._combine(monoid, acc, values[: len(xs)])
                values = values[len(xs) :]
        chosen = [self.program.stores[i] for i in stores]
        if later is None or any(s.mode for s in chosen):
            if chosen:
                self._stores(chosen, leaves, done)
            return
        values = self._emit([e for s in chosen for e in (s.index, s.value)], leaves, done)
        later += [(s, self.k.let(i), self.k.let(v)) for s, i, v in zip(chosen, values[::2], values[1::2], strict=True)]


def build(program: Program, target: Target) -> Built:
    """The kernel of a fused group; kernels.kernel.Unsupported where the target cannot compute it."""
    return (_Parts if program.parts else _Reduction if program.reduced else _Pointwise)(program, target).built


__all__ = ["DTYPES", "Built", "Callable", "Program", "Store", "build", "columns_beside", "with_buffers"]
