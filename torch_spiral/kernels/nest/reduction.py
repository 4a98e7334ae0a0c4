"""Row kernels: expressions whose reductions run over some dimensions, in as many loops as they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import ir
from ..builder import KernelBuilder
from ..ir import Complex, Node
from ..kernel import DTYPES, Kernel, Target
from .monoids import SUM, Monoid
from .operands import (
    BLOCK_LANES,
    SIMT_ELEMENTS,
    SIMT_KEPT,
    TASK_ELEMENTS,
    Declarations,
    Operand,
    accessed_by_four,
    cdiv,
    fold_groups,
    lanes_for,
    maximum,
    operands_key,
    product,
    unravel,
)


class RowContext:
    """What a row expression is made of: reductions, the index of the element in its row, and sizes."""

    def __init__(self, count: Node) -> None:
        self.index = Node("leaf", "i32", attr="row index")
        """i32 position of the element in its row, counted over all reduced dimensions."""
        self.count = count
        """Elements of a row, u32."""

    def reduce(self, monoid: Monoid, *element: Any) -> Any:
        """The combination of `element` (one expression per component of the monoid) over the row: one node, or a
        tuple."""
        if len(element) != len(monoid.dtypes):
            raise ValueError(f"{monoid.name} takes {len(monoid.dtypes)} components, not {len(element)}")
        args = tuple(ir.cast(ir.as_node(x, t), t) for x, t in zip(element, monoid.dtypes, strict=False))
        out = tuple(Node("red", t, *args, attr=(monoid, i)) for i, t in enumerate(monoid.dtypes))
        return out[0] if len(out) == 1 else out

    def sum(self, x: Any) -> Any:
        """Sum of a node of an arithmetic dtype, or of a Complex."""
        if isinstance(x, Complex):
            return Complex(self.sum(x.re), self.sum(x.im))
        return self.reduce(SUM(x.dtype), x)


@dataclass(frozen=True)
class RowSchedule:
    """How rows are reduced. kind: a schedule of rows(), or "auto" for its own choice; pieces: into how many a long row
    is cut (1: not)."""

    kind: str = "auto"
    pieces: int = 1

    def __str__(self) -> str:
        return f"{self.kind}/{self.pieces}"


def row_candidates(target: Target, length: int, count: int, cuttable: bool) -> list[RowSchedule]:
    """What a tuner may choose from for about 2**count rows of about 2**length elements."""
    kinds = ("lanes_d", "lanes_r") if target.schedule_class == "vector" else ("workgroup", "invocation")
    pieces = [1]
    while cuttable and pieces[-1] << count < 16 * target.compute_units and length - pieces[-1].bit_length() >= 8:
        pieces.append(2 * pieces[-1])
    return [RowSchedule(kind, p) for kind in kinds if count > 0 or kind in ("lanes_d", "workgroup") for p in pieces]


@dataclass(frozen=True)
class RowNest:
    """A built row kernel. Buffers: outputs, inputs, extra. Dimensions: reduced ones first, then those of the rows."""

    kernel: Kernel
    target: Target
    operands: tuple[Operand, ...]
    reduced: int
    ndim: int
    schedule: str  # "lanes_d" | "lanes_r" | "workgroup" | "invocation"
    lanes: int
    split: bool = False
    wide_scalars: tuple[int, ...] = ()

    def _count(self, sizes: Sequence[Any], splits: Any) -> Any:
        """Rows, or partial rows."""
        return product(sizes[self.reduced :]) * splits if self.split else product(sizes[self.reduced :])

    def _per_task(self, sizes: Sequence[Any], splits: Any = 1) -> Any:
        work = product(sizes[: self.reduced])
        if self.split:
            work = cdiv(work, splits)
        if self.schedule == "lanes_r":
            work = work * self.lanes
        return maximum(TASK_ELEMENTS // maximum(work, 1), 1)

    def scalars(
        self,
        sizes: Sequence[Any],
        strides: Sequence[Sequence[Any] | None] = (),
        values: Sequence[Any] = (),
        splits: Any = 1,
    ) -> list[Any]:
        """The launch's scalars; sizes and strides as for Nest.scalars, but strides of the inputs only in a split
        first stage."""
        out = [values[i] for i in self.wide_scalars]
        out += list(sizes)
        strided = [op for op in self.operands if op.strides != "dense"]
        for op, given in zip(strided, strides, strict=False):
            out += [s for s, c in zip(given or (), op.strides, strict=False) if c == "s"]
        if self.schedule in ("lanes_d", "lanes_r"):
            out.append(self._per_task(sizes, splits))
        if self.split:
            out += [splits, cdiv(sizes[self.reduced - 1], splits)]
        out += [v for i, v in enumerate(values) if i not in self.wide_scalars]
        return out

    def groups(self, sizes: Sequence[Any], splits: Any = 1) -> tuple[Any, Any, Any]:
        """The grid."""
        rows = sizes[self.reduced :]
        if self.schedule == "lanes_r":
            items = cdiv(rows[0], self.lanes) * product(rows[1:])
            items = items * splits if self.split else items
            return (cdiv(items, self._per_task(sizes, splits)), 1, 1)
        n = self._count(sizes, splits)
        if self.schedule == "lanes_d":
            return (cdiv(n, self._per_task(sizes, splits)), 1, 1)
        if self.schedule == "invocation":
            n = cdiv(n, self.kernel.workgroup[0])
        return fold_groups(self.target, n)


class Rows(Declarations):
    columns = 1  # rows beside each other that a workgroup takes; the invocations l, l + columns, … share row l

    def __init__(
        self,
        target: Target,
        name: str,
        outs: Sequence[Operand],
        ins: Sequence[Operand],
        fn: Callable[..., Any],
        reduced: int,
        ndim: int,
        scalars: Sequence[str],
        buffers: Sequence[tuple],
        schedule: str | None,
        split: bool,
        subgroups: bool,
    ) -> None:
        self.target, self.outs, self.ins, self.reduced, self.ndim, self.split = (
            target,
            list(outs),
            list(ins),
            reduced,
            ndim,
            split,
        )
        operands = [*outs, *ins]
        for o in operands:
            if len(o.strides) != ndim or o.strides == "dense":
                raise ValueError(f"operand {o.name}: row kernels take a stride class for each of {ndim} dimensions")
        self.schedule = schedule or self._choose()
        self.block = target.schedule_class == "block"
        self.lanes = lanes_for([o.dtype for o in operands]) if target.schedule_class == "vector" else 1
        if split:  # evaluate fn once, to know the components of its reduction
            monoid = split_monoid(fn, ins, len(scalars), scalars)
            self.outs = [Operand(f"partial{i}", _storage(t), "dense") for i, t in enumerate(monoid.dtypes)]
            operands = [*self.outs, *ins]
        self.subgroups = subgroups and self.schedule == "workgroup" and target.subgroup > 0 and not self.block
        self.fours = self._find_fours()
        key = operands_key(operands, scalars, buffers)
        k = KernelBuilder(
            target,
            f"{name}_{key}_r{reduced}of{ndim}_{self.schedule}"
            f"{'_split' if split else ''}{'_subgroups' if self.subgroups else ''}{'_fours' if self.fours else ''}",
        )
        self.declare(k, self.outs, self.ins, buffers, ndim)
        vector = self.schedule in ("lanes_d", "lanes_r")
        per_task = k.scalar("rows_per_task", "u32") if vector else None
        if split:
            self.n_splits, self.split_size = k.scalar("splits", "u32"), k.scalar("split_size", "u32")
        values = [k.scalar(f"value{i}", t) for i, t in enumerate(scalars)]

        count: Any = self.sizes[0]
        for s in self.sizes[1:reduced]:
            count = count * s
        self.count = k.let(count)
        self.context = RowContext(self.count)
        leaves = [ir.leaf(o.name, o.dtype) for o in self.ins]
        result = fn(self.context, *leaves, *values, *self.extra)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if split:
            reds = [n for n in ir.walk(*results) if n.op == "red"]
            monoid = reds[0].attr[0]
            self.results: list[Any] = [
                Node("red", t, *reds[0].args, attr=(monoid, i)) for i, t in enumerate(monoid.dtypes)
            ]
        else:
            if len(results) != len(self.outs):
                raise ValueError(f"{k.name}: {len(results)} results for {len(self.outs)} outputs")
            self.results = [
                r if isinstance(r, (Node, Complex)) else ir.as_node(r, self.bufs[o.name].compute)
                for r, o in zip(results, self.outs, strict=False)
            ]
        self._analyse()
        self._emit_schedule(per_task)
        self.nest = RowNest(
            kernel=k.finish((self.workgroup, 1, 1), trusted=not self.extra), target=target, operands=tuple(operands), reduced=reduced,
            ndim=ndim, schedule=self.schedule, lanes=self.lanes, split=split,
            wide_scalars=tuple(i for i, t in enumerate(scalars) if t in ("i64", "f64")),
        )  # fmt: skip

    def _choose(self) -> str:
        """Lanes (or invocations) along the rows where those are contiguous and the reduced dimension is not."""
        along_rows = any(o.strides[self.reduced : self.reduced + 1] == ("1",) and o.strides[0] == "s" for o in self.ins)
        along_d = any(
            o.strides[0] == "1" and o.strides[self.reduced :] != ("0",) * (self.ndim - self.reduced) for o in self.ins
        )
        if self.target.schedule_class == "vector":
            return "lanes_r" if along_rows and not along_d else "lanes_d"
        return "invocation" if along_rows and not along_d else "workgroup"

    def _find_fours(self) -> frozenset[str]:
        """The operands of a workgroup's row that are accessed by four, wherever it begins."""
        if not self._on_gpu() or self.reduced != 1:
            return frozenset()
        outs = [o for o in self.outs if not self.split and o.strides[0] != "0"]
        ins = [o for o in self.ins if o.strides[0] != "0"]
        fits = bool(ins) and all(accessed_by_four(o) for o in [*outs, *ins])
        return frozenset(o.name for o in [*outs, *ins]) if fits else frozenset()

    def _on_gpu(self) -> bool:
        """Whether a workgroup of a GPU takes a row."""
        simt = self.target.schedule_class == "simt" and not self.target.software
        return simt and self.schedule == "workgroup"

    def _workgroup(self) -> int:
        if self.schedule == "workgroup":
            return BLOCK_LANES if self.block else min(256, self.target.max_workgroup_size)
        if self.schedule == "invocation":
            return 128 if self.block else min(64, self.target.max_workgroup_size)
        return 1

    @property
    def _sharing(self) -> int:
        """Invocations of a workgroup that share a row."""
        return self.workgroup // self.columns

    # ---- what is computed when --------------------------------------------------------------------------------------

    def _analyse(self) -> None:
        """Levels: a reduction's result is one above its arguments; loop n computes the reductions of level n + 1."""
        self.leaf_of: dict[str, Operand] = {}
        for o in self.ins:
            for suffix in ("", ".re", ".im"):
                self.leaf_of[o.name + suffix] = o
        nodes = ir.walk(*self.results)
        self.level: dict[Node, int] = {}
        self.varies: dict[Node, bool] = {}
        for n in nodes:
            self.level[n] = max((self.level[a] for a in n.args), default=0) + (n.op == "red")
            if n.op == "leaf":
                leaf = self.leaf_of.get(n.attr)
                self.varies[n] = leaf is None or any(c != "0" for c in leaf.strides[: self.reduced])
            else:
                self.varies[n] = n.op != "red" and any(self.varies[a] for a in n.args)
        self.groups: dict[tuple[Monoid, tuple[Node, ...]], int] = {}
        for n in nodes:
            if n.op == "red":
                self.groups[n.attr[0], n.args] = self.level[n] - 1
        self.elementwise = [
            i for i, o in enumerate(self.outs) if not self.split and any(c != "0" for c in o.strides[: self.reduced])
        ]

        def parts(v: Any) -> list[Node]:
            return [v.re, v.im] if isinstance(v, Complex) else [v]

        store_level = max((self.level[p] for i in self.elementwise for p in parts(self.results[i])), default=-1)
        self.loops = max(max(self.groups.values(), default=-1), store_level) + 1

    def evaluate(self, exprs: Sequence[Any], leaf: Callable[[Node], Any]) -> list[Any]:
        """Expressions with leaves and finished reductions replaced by values."""
        memo: dict[Node, Any] = dict(self.done)

        def replace(n: Node) -> Any:
            return leaf(n) if n.op == "leaf" else None

        return [ir.substitute(e, replace, memo) for e in exprs]

    def _leaf_loader(
        self, index: Callable[[Operand], Node], position: Any, kept: dict[str, Any] | None = None
    ) -> Callable[[Node], Any]:
        cache: dict[str, Any] = dict(kept or {})

        def leaf(n: Node) -> Any:
            o = self.leaf_of.get(n.attr)
            if o is None:
                return ir.cast(position, "i32")
            if o.name not in cache:
                cache[o.name] = self.bufs[o.name].load(index(o))
            v = cache[o.name]
            return v if not isinstance(v, Complex) else v.re if n.attr.endswith(".re") else v.im

        return leaf

    def _hoist(self, exprs: Sequence[Any]) -> None:
        """Computes, before a loop, what does not vary in it."""
        seen: set[Node] = set()

        def visit(n: Node) -> None:
            if n in seen or n.op in ("const", "tmp"):
                return
            seen.add(n)
            if self.varies.get(n, False):
                for a in n.args:
                    visit(a)
            elif n not in self.done:
                self.done[n] = self.k.let(self.evaluate([n], self.row_leaf)[0])

        for e in exprs:
            for p in (e.re, e.im) if isinstance(e, Complex) else (e,):
                visit(p)

    # ---- addressing --------------------------------------------------------------------------------------

    def _term(self, o: Operand, d: int, c: Any) -> Any:
        cls = o.strides[d]
        if cls == "0":
            return ir.const(0, "i32")
        c = ir.cast(c, "i32")
        return c if cls == "1" else c * self.strides[o.name, d]

    def _row_bases(self, coordinates: Sequence[Any]) -> dict[str, Node]:
        """Per operand: offset of a row from its coordinates (the first may have lanes)."""
        bases = {}
        for o in [*self.outs, *self.ins]:
            if o.strides == "dense":
                continue
            total: Any = ir.const(0, "i32")
            for d, c in enumerate(coordinates, self.reduced):
                total = total + self._term(o, d, c)
            bases[o.name] = self.k.let(total)
        return bases

    def _range(self, split: Node | None) -> tuple[Any, Any]:
        """First and end of the outermost reduced dimension, u32."""
        size = self.sizes[self.reduced - 1]
        if split is None:
            return ir.const(0, "u32"), size
        first = self.k.let(ir.minimum(split * self.split_size, size))
        return first, self.k.let(ir.minimum(first + self.split_size, size))

    # ---- one row (or `lanes` rows) -----------------------------------------------------------------------------------

    def row(self, coordinates: Sequence[Any], lanes_r: int, split: Any, row_id: Any) -> None:
        """All loops of a row, or of lanes_r rows beside each other, and its stores."""
        k = self.k
        self.bases = self._row_bases(coordinates)
        self.done: dict[Node, Any] = {}

        def row_index(o: Operand) -> Node:
            return self.bases[o.name]

        self.row_leaf = self._leaf_loader(row_index, ir.const(0, "i32"))
        self.kept: list[dict[str, Any]] = []
        self.kept_fours: list[list[dict[Any, Any]]] = []
        self._begin_fours(split)
        kept = self._read_again() if self._on_gpu() and self.reduced == 1 and not self.split else []
        if not kept:
            self._loops_of_row(lanes_r, split, row_id)
            return
        size, length = self.workgroup, self.sizes[0]
        short = ir.and_(ir.le(length, size * SIMT_KEPT), ir.gt(length, 0))
        if self.fours:  # and there is a whole group
            short = ir.and_(ir.and_(short, self.agree), ir.ge(length, 8))
        with k.If(short):
            if self.fours:
                self._keep_fours(kept)
            else:
                for j in range(SIMT_KEPT):
                    place = {0: k.let(ir.minimum(k.local_id() + j * size, length - 1))}
                    self.kept.append({o.name: self._load(o, place) for o in kept})
            self._loops_of_row(lanes_r, split, row_id)
        with k.Else():
            self.kept, self.kept_fours, self.done = [], [], {}
            self.row_leaf = self._leaf_loader(row_index, ir.const(0, "i32"))
            self._loops_of_row(lanes_r, split, row_id)

    # ---- four elements at a time -------------------------------------------------------------------------------------

    def _begin_fours(self, split: Any) -> None:
        """Finds, for a row, whether groups of four begin at the same elements of all operands (agree), and how many elements
        lie before the first group (head, u32)."""
        if not self.fours:
            return
        k = self.k
        places = self._misaligned(self._range(split)[0])
        agree: Any = ir.const(True, "bool")
        for p in places[1:]:
            agree = ir.and_(agree, ir.eq(p, places[0]))
        self.agree = k.let(agree)
        self.head = k.let(ir.and_(4 - places[0], 3))

    def _keep_fours(self, operands: Sequence[Operand]) -> None:
        """Reads the groups of a row of at least 8 and at most SIMT_KEPT elements an invocation into registers."""
        k = self.k
        groups = k.let(ir.shr(self.sizes[0] - self.head, 2))
        for j in range(SIMT_KEPT // 4):
            q = ir.minimum(k.local_id() + j * self.workgroup, groups - 1)
            at = k.let(ir.cast(self.head + q * 4, "i32"))
            values = {o.name: self.bufs[o.name].load4(self.bases[o.name] + at) for o in operands}
            self.kept_fours.append([{name: k.let(v[u]) for name, v in values.items()} for u in range(4)])

    def _misaligned(self, first: Any) -> list[Node]:
        """Where in their groups the row's first elements lie."""
        first = ir.cast(first, "i32")
        return [self.bufs[name].misaligned(self.bases[name] + first) for name in sorted(self.fours)]

    def _load_fours(self, exprs: Sequence[Any], t: Node) -> list[dict[Any, Any]]:
        """What _element takes as kept for elements t .. t + 3: the operands that expressions are made of."""
        names: set[str] = set()
        todo, seen = list(exprs), set()
        while todo:
            n = todo.pop()
            if n in seen or n.op == "red" or n in self.done:
                continue
            seen.add(n)
            todo += n.args
            if n.op == "leaf" and n.attr in self.leaf_of and self.varies[n]:
                names.add(n.attr)
        at = ir.cast(t, "i32")
        values = {name: self.bufs[name].load4(self.bases[name] + at) for name in sorted(names)}
        return [{name: v[u] for name, v in values.items()} for u in range(4)]

    def _loop_exprs(self, now: list, stores: Sequence[int]) -> list[Any]:
        """What a loop evaluates of an element."""
        return [x for _, xs in now for x in xs] + [self.results[i] for i in stores]

    def _combine_several(self, now: list, accs: list, taken: list[list[Any]]) -> None:
        """accs <- combine(accs, taken), of several elements each."""
        for (monoid, _), acc, elements in zip(now, accs, taken, strict=True):
            new = monoid.several(tuple(a.as_node() for a in acc), elements)
            for a, n in zip(acc, [self.k.let(n) for n in new], strict=True):
                a.set(n)

    def _four(self, now: list, accs: list, stores: Sequence[int], t: Node, kept: list[dict[Any, Any]] | None) -> None:
        """Elements t .. t + 3, which are a group."""
        k = self.k
        kept = self._load_fours(self._loop_exprs(now, stores), t) if kept is None else kept
        later: list[tuple[Any, Any, Any]] = []
        taken: list[list[Any]] = [[] for _ in now]
        for u, values in enumerate(kept):
            c = k.let(t + u) if u else t
            self._element(now, taken, stores, {0: c}, c, later, values, collect=True)
        self._combine_several(now, accs, taken)
        n = len(later) // 4
        for j in range(n):
            (o, index, _), *_ = group = later[j::n]
            self.bufs[o.name].store4(index, [value for *_, value in group])

    def _loop_of_fours(self, now: list, totals: list, stores: Sequence[int], first: Node, end: Node) -> None:
        """Elements first .. end of a row: those before the first group and after the last one by one, then the groups."""
        k, size, lid = self.k, self.workgroup, self.k.local_id()
        span = k.let(end - first)
        head = k.let(ir.minimum(self.head, span))
        groups = k.let(ir.shr(span - head, 2))
        with k.If(lid < span - groups * 4):
            t = k.let(first + lid + ir.where(ir.lt(lid, head), ir.const(0, "u32"), groups * 4))
            self._element(now, totals, stores, {0: t}, t)
        start = k.let(first + head)

        def group(q: Any, accs: list, kept: list[dict[Any, Any]] | None = None) -> None:
            self._four(now, accs, stores, k.let(start + q * 4), kept)

        if self.kept_fours:
            for j, kept in enumerate(self.kept_fours):
                q = k.let(lid + j * size)
                with k.If(q < groups):
                    group(q, totals, kept)
        elif any(m.blocked for m, _ in now):
            self._by_blocks(now, totals, lid, groups, 32, lambda j, stop, accs: self._one_by_one(j, stop, accs, group))
        else:
            with k.For(lid, groups, size) as q:
                group(q, totals)

    def _by_blocks(
        self, now: list, totals: list, first: Any, end: Any, steps: int, block: Callable[[Any, Any, list], None]
    ) -> None:
        """An invocation's sums of first, first + workgroup … below end as sums of blocks' sums, of so many steps each. block(j, stop,
        accumulators) adds up a block and moves j, a variable, to its end."""
        k = self.k
        j = k.var("u32", first)
        with k.While(lambda: j < end):
            accs = self._accumulators(now, 1)
            block(j, k.let(ir.minimum(end, j + steps * self._sharing)), accs)
            for (m, _), a, b in zip(now, totals, accs, strict=True):
                self._combine(m, a, [x.as_node() for x in b])

    def _one_by_one(self, j: Any, stop: Any, accs: list, add: Callable[[Any, list], None]) -> None:
        with self.k.While(lambda: j < stop):
            t = j.as_node()
            add(t, accs)
            j.set(t + self._sharing)

    def _read_again(self) -> list[Operand]:
        """The operands that several loops read, element by element."""
        loops: dict[str, set[int]] = {}

        def visit(n: Node, loop: int) -> None:
            if n.op == "leaf":
                if self.varies[n] and n.attr in self.leaf_of:
                    loops.setdefault(self.leaf_of[n.attr].name, set()).add(loop)
            elif n.op != "red":
                for a in n.args:
                    visit(a, loop)

        for (_, xs), loop in self.groups.items():
            for x in xs:
                visit(x, loop)
        for i in self.elementwise:
            for p in (r.re, r.im) if isinstance(r := self.results[i], Complex) else (r,):
                visit(p, self.loops - 1)
        return [o for o in self.ins if len(loops.get(o.name, ())) > 1 and not DTYPES[o.dtype].is_pair]

    def _load(self, o: Operand, at: dict[int, Any]) -> Any:
        """An element as a value of its own: not one that a later load of the same index stands for."""
        index = self.bases[o.name] + self._term(o, 0, at[0])
        return self.k.let(self.bufs[o.name].load(index))

    def _loops_of_row(self, lanes_r: int, split: Any, row_id: Any) -> None:
        k = self.k
        for loop in range(self.loops):
            now = [g for g, at in self.groups.items() if at == loop]
            stores = self.elementwise if loop == self.loops - 1 else []
            self._hoist([x for _, xs in now for x in xs] + [self.results[i] for i in stores])
            results = self._loop(now, stores, lanes_r, split)
            for (monoid, xs), values in zip(now, results, strict=False):
                for i, (t, v) in enumerate(zip(monoid.dtypes, values, strict=False)):
                    self.done[Node("red", t, *xs, attr=(monoid, i))] = v
        rest = [i for i in range(len(self.outs)) if i not in self.elementwise]
        if rest:
            values = self.evaluate([self.results[i] for i in rest], self.row_leaf)

            def store() -> None:
                for i, v in zip(rest, values, strict=False):
                    o = self.outs[i]
                    self.bufs[o.name].store(ir.cast(row_id, "i32") if o.strides == "dense" else self.bases[o.name], v)

            if self.schedule == "workgroup":
                with k.If(ir.eq(k.local_id(), 0)):
                    store()
            else:
                store()

    def _accumulators(self, now: list, lanes: int) -> list[list[Any]]:
        return [[self.k.var(t, ir.const(c, t), lanes) for t, c in zip(m.dtypes, m.init, strict=False)] for m, _ in now]

    def _combine(self, monoid: Monoid, acc: list[Any], values: Sequence[Any]) -> None:
        """acc <- combine(acc, values)."""
        new: Sequence[Any] = monoid.combine(tuple(a.as_node() for a in acc), tuple(values))
        new = [self.k.let(n) if len(acc) > 1 else n for n in new]
        for a, n in zip(acc, new, strict=False):
            a.set(n)

    def _element(
        self, now: list, accs: list, stores: Sequence[int], at: dict[int, Any], position: Any, later: list | None = None,
        kept: dict[Any, Any] | None = None, collect: bool = False,
    ) -> None:  # fmt: skip
        """One element (or lanes of them) at reduced coordinates `at`. later: takes the stores, to be made after other
        loads. kept: operands that are in registers. collect: accs are lists that take the elements of the reductions."""

        def index(o: Operand) -> Node:
            total: Any = self.bases[o.name]
            for d in range(self.reduced):
                total = total + self._term(o, d, at[d])
            return total

        leaf = self._leaf_loader(index, position, kept)
        values = self.evaluate(self._loop_exprs(now, stores), leaf)
        if stores and self.loops > 1 and position.lanes > 1:
            self._prefetch(index)
        for (monoid, xs), acc in zip(now, accs, strict=False):
            if collect:
                acc.append(tuple(values[: len(xs)]))
            else:
                self._combine(monoid, acc, values[: len(xs)])
            values = values[len(xs) :]
        for i, v in zip(stores, values, strict=False):
            o = self.outs[i]
            if later is None:
                self.bufs[o.name].store(index(o), v)
            else:
                later.append((o, self.k.let(index(o)), self.k.let(v)))

    def _prefetch(self, index: Callable[[Operand], Node]) -> None:
        """A row's last loop works from the cache; meanwhile the row after the next comes in."""
        if self.ndim != self.reduced + 1:
            return
        for o in self.ins:
            if o.strides[0] == "1" and o.strides[self.reduced] == "s":
                self.bufs[o.name].prefetch(index(o) + 2 * self.strides[o.name, self.reduced])

    def _loop(self, now: list, stores: Sequence[int], lanes_r: int, split: Any) -> list[list[Node]]:
        if self.schedule == "workgroup":
            return self._loop_workgroup(now, stores, split)
        return self._loop_nested(now, stores, lanes_r, split)

    def _loop_nested(self, now: list, stores: Sequence[int], lanes_r: int, split: Any) -> list[list[Node]]:
        """Nested loops over the reduced dimensions; lanes along dimension 0 (lanes_d), or along the rows, or none."""
        k = self.k
        along_d = self.schedule == "lanes_d"
        blocked = any(m.blocked for m, _ in now)
        wide = self.lanes if along_d else 1
        unroll = 4 if along_d and sum(len(m.dtypes) for m, _ in now) <= 2 and now else 1
        each = SIMT_ELEMENTS if self.schedule == "invocation" and not self.target.software else 1
        totals = self._accumulators(now, lanes_r * wide)
        tails = self._accumulators(now, 1) if along_d else totals

        def inner(d: int, at: dict[int, Any], position: Any) -> None:
            if d > 0:
                first, end = self._range(split) if d == self.reduced - 1 else (ir.const(0, "u32"), self.sizes[d])
                with k.For(first, end) as c:
                    inner(d - 1, {**at, d: c}, k.let((position + c) * self.sizes[d - 1]))
                return
            first, end = self._range(split) if self.reduced == 1 else (ir.const(0, "u32"), self.sizes[0])
            place = ir.cast(position, "i32")
            if self.block:
                self._loop_counted(now, totals, stores, at, place, first, end)
                return
            last = k.let(ir.cast(end, "i32"))
            j = k.var("i32", ir.cast(first, "i32"))

            def several(j: Any, stop: Any, accs: list) -> None:
                """Elements j .. stop; on GPUs a few at a time, all read before the first is written."""
                if each > 1:
                    with k.While(lambda: j + each <= stop):
                        later: list[tuple[Operand, Any, Any]] = []
                        base = j.as_node()
                        for u in range(each):
                            c = k.let(base + u) if u else base
                            self._element(now, accs, stores, {**at, 0: c}, place + c, later)
                        for o, index, value in later:
                            self.bufs[o.name].store(index, value)
                        j.set(base + each)
                with k.While(lambda: j < stop):
                    c = j.as_node()
                    self._element(now, accs, stores, {**at, 0: c}, place + c)
                    j.set(c + 1)

            block = 128 * unroll * wide if along_d else 128
            if along_d:
                with k.While(lambda: j + unroll * wide <= last):
                    accs = [self._accumulators(now, wide) for _ in range(unroll)]
                    stop = k.let(ir.minimum(j + block, last))
                    with k.While(lambda: j + unroll * wide <= stop):
                        base = j.as_node()
                        for u in range(unroll):
                            c = base + u * wide + k.lanes(wide)
                            self._element(now, accs[u], stores, {**at, 0: c}, place + c)
                        j.set(base + unroll * wide)
                    for u in range(1, unroll):
                        for (m, _), a, b in zip(now, accs[0], accs[u], strict=False):
                            self._combine(m, a, [x.as_node() for x in b])
                    for (m, _), a, b in zip(now, totals, accs[0], strict=False):
                        self._combine(m, a, [x.as_node() for x in b])
                if unroll > 1:
                    with k.While(lambda: j + wide <= last):
                        c = j.as_node() + k.lanes(wide)
                        self._element(now, totals, stores, {**at, 0: c}, place + c)
                        j.set(j + wide)
                with k.While(lambda: j < last):
                    c = j.as_node()
                    self._element(now, tails, stores, {**at, 0: c}, place + c)
                    j.set(c + 1)
            elif blocked:
                with k.While(lambda: j < last):
                    block_accs = self._accumulators(now, lanes_r)
                    several(j, k.let(ir.minimum(j + block, last)), block_accs)
                    for (m, _), a, b in zip(now, totals, block_accs, strict=False):
                        self._combine(m, a, [x.as_node() for x in b])
            else:
                several(j, last, totals)

        inner(self.reduced - 1, {}, ir.const(0, "u32"))
        if not along_d:
            return [[a.as_node() for a in acc] for acc in totals]
        out = []
        for (m, _), acc, tail in zip(now, totals, tails, strict=False):
            values = [a.as_node() for a in acc]
            while values[0].lanes > 1:
                low, high = zip(*(k.halves(v) for v in values), strict=False)
                values = [k.let(v) for v in m.combine(low, high)]
            out.append([k.let(v) for v in m.combine(tuple(values), tuple(t.as_node() for t in tail))])
        return out

    def _loop_counted(
        self, now: list, totals: list, stores: Sequence[int], at: dict[int, Any], place: Any, first: Any, end: Any
    ) -> None:
        """Elements first .. end along dimension 0 by loops whose lengths are known when they start; sums in blocks."""
        k = self.k

        def run(start: Any, stop: Any, accs: list) -> None:
            with k.For(start, stop) as c:
                self._element(now, accs, stores, {**at, 0: c}, place + ir.cast(c, "i32"))

        if not any(m.blocked for m, _ in now):
            run(first, end, totals)
            return
        with k.For(first, end, 128) as base:
            accs = self._accumulators(now, 1)
            run(base, k.let(ir.minimum(base + 128, end)), accs)
            for (m, _), a, b in zip(now, totals, accs, strict=False):
                self._combine(m, a, [x.as_node() for x in b])

    def _loop_workgroup(self, now: list, stores: Sequence[int], split: Any) -> list[list[Node]]:
        """Elements dealt to the invocations of a workgroup, or to those that share a row, then a tree."""
        k, size = self.k, self._sharing
        inner: Any = ir.const(1, "u32")
        for s in self.sizes[: self.reduced - 1]:
            inner = inner * s
        first, end = self._range(split)
        first, end = k.let(first * inner), k.let(end * inner)
        totals = self._accumulators(now, 1)
        lid = k.local_id()
        if self.columns > 1:
            lid = k.let(ir.idiv(lid, self.columns))
            if not self.block:
                end = k.let(ir.where(self.inside, end, first))

        each = 1 if self.block or self.target.software else SIMT_ELEMENTS

        def body(t: Any, accs: list, later: list | None = None, kept: dict[str, Any] | None = None) -> None:
            at = dict(enumerate(unravel(k, self.sizes[: self.reduced], t)))
            if self.columns > 1 and self.block:
                with k.If(self.inside):
                    self._element(now, accs, stores, at, t, later, kept)
            else:
                self._element(now, accs, stores, at, t, later, kept)

        def from_registers() -> None:
            for j in range(0, SIMT_KEPT, SIMT_ELEMENTS):
                places = [(k.let(lid + i * size), self.kept[i]) for i in range(j, j + SIMT_ELEMENTS)]
                with k.If(places[-1][0] < end):
                    later: list[tuple[Operand, Any, Any]] = []
                    for t, kept in places:
                        body(t, totals, later, kept)
                    for o, index, value in later:
                        self.bufs[o.name].store(index, value)
                with k.Else():
                    for t, kept in places:
                        with k.If(t < end):
                            body(t, totals, None, kept)

        def several(start: Any, stop: Any, accs: list) -> None:
            """Of start, start + size … below stop: `each` at a time, all read before the first is written."""
            with k.For(start, stop, size * each) as t:
                with k.If(t + size * (each - 1) < stop):
                    later: list[tuple[Operand, Any, Any]] = []
                    for j in range(each):
                        body(k.let(t + j * size) if j else t, accs, later)
                    for o, index, value in later:
                        self.bufs[o.name].store(index, value)
                with k.Else(), k.For(t, stop, size) as u:
                    body(u, accs)

        def dealt() -> None:
            if self.block:  # whole blocks without a mask, then the rest
                span = k.let(ir.where(ir.lt(first, end), end - first, ir.const(0, "u32")))
                whole = k.let(first + span - ir.irem(span, size))
                start = first
                if self.columns == 1 and not stores and any(m.together for m, _ in now):
                    start = k.let(first + span - ir.irem(span, 4 * size))
                    with k.For(first, start, 4 * size) as t:
                        taken: list[list[Any]] = [[] for _ in now]
                        for u in range(4):
                            c = k.let(t + u * size + lid)
                            at = dict(enumerate(unravel(k, self.sizes[: self.reduced], c)))
                            self._element(now, taken, stores, at, c, collect=True)
                        self._combine_several(now, totals, taken)
                with k.For(start, whole, size) as t:
                    body(k.let(t + lid), totals)
                with k.If(ir.lt(whole, first + span)):
                    t = k.let(whole + lid)
                    with k.If(t < end):
                        body(t, totals)
            elif any(m.blocked for m, _ in now):

                def block(j: Any, stop: Any, accs: list) -> None:
                    if each > 1:
                        several(j.as_node(), stop, accs)
                        j.set(j + 128 * size)
                    else:
                        self._one_by_one(j, stop, accs, body)

                self._by_blocks(now, totals, first + lid, end, 128, block)
            elif each > 1:
                several(first + lid, end, totals)
            else:
                with k.For(first + lid, end, size) as t:
                    body(t, totals)

        if self.kept_fours:
            self._loop_of_fours(now, totals, stores, first, end)
        elif self.kept:
            from_registers()
        elif self.fours:
            with k.If(self.agree):
                self._loop_of_fours(now, totals, stores, first, end)
            with k.Else():
                dealt()
        else:
            dealt()
        out = []
        for m, acc in zip([m for m, _ in now], totals, strict=False):
            out.append(self._tree(m, acc))
        return out

    def _tree(self, monoid: Monoid, acc: list[Any]) -> list[Node]:
        """Combines the invocations' accumulators; every invocation gets the result."""
        k, size = self.k, self.workgroup
        if self.block:
            return k.reduce(monoid.name, monoid.combine, monoid.dtypes, acc, self.columns)  # type: ignore[attr-defined]
        if self.subgroups:
            # Butterflies of the guaranteed subgroup size, then one slot for each group of that many lanes.
            step = 1
            while step < self.target.subgroup:
                self._combine_ordered(monoid, acc, step)
                step *= 2
            slots = size // self.target.subgroup
            shared = self._shared(monoid, slots)
            lane = k.subgroup_id() * k.subgroup_size() + k.subgroup_lane()
            with k.If(ir.eq(ir.and_(lane, self.target.subgroup - 1), 0)):
                for s, a in zip(shared, acc, strict=False):
                    s[ir.idiv(lane, self.target.subgroup)] = a
            k.barrier()
            total = [k.var(t, s[0]) for t, s in zip(monoid.dtypes, shared, strict=False)]
            with k.For(ir.const(1, "u32"), slots) as i:
                self._combine(monoid, total, [s[i] for s in shared])
            k.barrier()
            return [t.as_node() for t in total]
        shared = self._shared(monoid, size)
        lid = k.local_id()
        for s, a in zip(shared, acc, strict=False):
            s[lid] = a
        k.barrier()
        step = size // 2
        while step >= self.columns:
            with k.If(lid < step):
                new = monoid.combine(tuple(s[lid] for s in shared), tuple(s[lid + step] for s in shared))
                new = tuple(k.let(n) for n in new)
                for s, n in zip(shared, new, strict=False):
                    s[lid] = n
            k.barrier()
            step //= 2
        out = [s[ir.irem(lid, self.columns) if self.columns > 1 else 0] for s in shared]
        k.barrier()
        return out

    def _combine_ordered(self, monoid: Monoid, acc: list[Any], step: int) -> None:
        """Every monoid here is commutative, so a butterfly will do."""
        self._combine(monoid, acc, [self.k.subgroup_shuffle_xor(a, step) for a in acc])

    def _shared(self, monoid: Monoid, size: int) -> list[Any]:
        """Shared arrays, reused by reductions of the same dtypes."""
        pool = self.__dict__.setdefault("_pool", {})
        used: dict[str, int] = {}
        out = []
        for t in monoid.dtypes:
            i = used.get(t, 0)
            used[t] = i + 1
            if (t, i) not in pool:
                pool[t, i] = self.k.shared(t, size)
            out.append(pool[t, i])
        return out

    # ---- schedules ------------------------------------------------------------------------------------------------

    def _emit_schedule(self, per_task: Node | None) -> None:
        """The kernel's body. per_task: the scalar of the vector schedules that says how many rows (or, of lanes_r,
        blocks of rows) a workgroup takes."""
        self.workgroup = self._workgroup()
        if self.schedule == "lanes_d":
            self._lanes_d(per_task)
        elif self.schedule == "lanes_r":
            self._lanes_r(per_task)
        elif self.schedule == "invocation":
            self._invocation()
        else:
            self._workgroup_row()

    def _rows_total(self) -> Node:
        n: Any = ir.const(1, "u32")
        for s in self.sizes[self.reduced :]:
            n = n * s
        return self.k.let(n * self.n_splits if self.split else n)

    def _one(self, row: Node) -> None:
        """One flattened row; with splits, the split varies fastest."""
        k = self.k
        split, rest = None, row
        if self.split and self.block and self.schedule == "invocation":  # neighbours are of neighbouring rows
            rows: Any = ir.const(1, "u32")
            for s in self.sizes[self.reduced :]:
                rows = rows * s
            rows = k.let(rows)
            split = k.let(ir.idiv(row, rows))
            rest = k.let(row - split * rows)
            row = k.let(rest * self.n_splits + split)
        elif self.split:
            rest = k.let(ir.idiv(row, self.n_splits))
            split = k.let(row - rest * self.n_splits)
        self.row(unravel(k, self.sizes[self.reduced :], rest), 1, split, row)

    def _lanes_d(self, per_task: Any) -> None:
        k = self.k
        if self.elementwise:
            k.stream(product(self.sizes))
        first = k.let(k.group_index() * per_task)
        last = k.let(ir.minimum(first + per_task, self._rows_total()))
        with k.For(first, last) as row:
            self._one(row)

    def _lanes_r(self, per_task: Any) -> None:
        """Blocks of `lanes` rows beside each other along the first dimension of the rows."""
        k = self.k
        size = self.sizes[self.reduced]
        blocks = k.let(ir.idiv(size + (self.lanes - 1), self.lanes))
        items: Any = blocks
        for s in self.sizes[self.reduced + 1 :]:
            items = items * s
        if self.split:
            items = items * self.n_splits
        first = k.let(k.group_index() * per_task)
        last = k.let(ir.minimum(first + per_task, items))
        with k.For(first, last) as item:
            split, rest = None, item
            if self.split:
                rest = k.let(ir.idiv(item, self.n_splits))
                split = k.let(item - rest * self.n_splits)
            outer = k.let(ir.idiv(rest, blocks))
            start = k.let((rest - outer * blocks) * self.lanes)
            others = unravel(k, self.sizes[self.reduced + 1 :], outer)

            def rows(c0: Any, lanes: int) -> None:
                flat: Any = outer * size + c0
                if self.split:
                    assert split is not None
                    flat = flat * self.n_splits + split
                self.row([c0, *others], lanes, split, flat)

            with k.If(start + self.lanes <= size):
                rows(start + k.lanes(self.lanes, "u32"), self.lanes)
            with k.Else(), k.For(start, size) as c0:
                rows(c0, 1)

    def _invocation(self) -> None:
        k = self.k
        row = k.global_id(self.workgroup)
        with k.If(row < self._rows_total()):
            self._one(row)

    def _workgroup_row(self) -> None:
        k = self.k
        row = k.group_index()
        if self.columns > 1:
            self._workgroup_rows(row)
            return
        with k.If(row < self._rows_total()):
            self._one(row)

    def _workgroup_rows(self, group: Node) -> None:
        """Rows beside each other along the first dimension of the rows, of which a workgroup takes `columns`."""
        k, size = self.k, self.sizes[self.reduced]
        blocks = k.let(ir.idiv(size + (self.columns - 1), self.columns))
        groups: Any = blocks
        for s in self.sizes[self.reduced + 1 :]:
            groups = groups * s
        with k.If(group < groups):
            outer = k.let(ir.idiv(group, blocks))
            row = k.let((group - outer * blocks) * self.columns + ir.irem(k.local_id(), self.columns))
            self.inside = k.let(row < size)
            others = unravel(k, self.sizes[self.reduced + 1 :], outer)
            self.row([k.let(ir.minimum(row, size - 1)), *others], 1, None, row)


def _storage(dtype: str) -> str:
    return "i32" if dtype == "bool" else dtype


def rows(
    target: Target,
    name: str,
    outs: Sequence[Operand],
    ins: Sequence[Operand],
    fn: Callable[..., Any],
    *,
    reduced: int = 1,
    ndim: int = 2,
    scalars: Sequence[str] = (),
    buffers: Sequence[tuple] = (),
    schedule: str | None = None,
    subgroups: bool = True,
) -> RowNest:
    """A kernel over rows: element expressions, reductions of them over the row, expressions of both, as many levels
    as needed.

    Dimensions: the `reduced` ones first (fastest first), then those of the rows; every operand has a stride class for
    each of the `ndim`. fn(r, *ins, *scalars, *buffers) gives one value per output; r is a RowContext. An output is
    stored per row where its reduced strides are all "0", else per element. schedule: None chooses by the stride
    classes; a caller that knows rows to be short and many passes "lanes_r" (vector) or "invocation" (simt).
    subgroups: False takes the shared-memory tree. An output may be an input's tensor, element by element. Zero-size
    reductions give the monoid's neutral element.

        def softmax(r, x):
            e = ir.exp(x - r.reduce(MAX(), x))
            return e / r.sum(e)

        nest = rows(t, "softmax", [Operand("out", "f16", ("1", "s"))], [Operand("x", "f16", ("1", "s"))], softmax)
        launch(nest.kernel, [out, x], nest.scalars([d, n], [(1, d), (1, d)]), nest.groups([d, n]))

        def max_dim(r, x):
            return r.reduce(ARGMAX(), x, r.index)     # outputs: value, index (stored as i64 where the buffer is i64)
    """
    return Rows(target, name, outs, ins, fn, reduced, ndim, scalars, buffers, schedule, False, subgroups).nest


def _single_reduction(results: Sequence[Any]) -> tuple[Monoid, tuple[Node, ...]]:
    reds = {(n.attr[0], n.args) for n in ir.walk(*results) if n.op == "red"}
    if len(reds) != 1:
        raise ValueError(f"a split reduction has one reduction, not {len(reds)}")
    return reds.pop()


def split_monoid(fn: Callable[..., Any], ins: Sequence[Operand], n: int, scalars: Sequence[str]) -> Monoid:
    """The monoid of fn's only reduction."""
    values = [Node("tmp", t, attr=f"value{i}") for i, t in enumerate(scalars)]
    result = fn(RowContext(Node("tmp", "u32", attr="count")), *[ir.leaf(o.name, o.dtype) for o in ins], *values)
    return _single_reduction(result if isinstance(result, (tuple, list)) else (result,))[0]


@dataclass(frozen=True)
class SplitRows:
    """A reduction of long rows in two launches: partial results of every split, then their combination.

    partials = [empty([n_rows * splits], dtype) for dtype in s.partial_dtypes]
    launch(s.first.kernel, [*partials, *ins],
           s.first.scalars(sizes, strides, values, splits), s.first.groups(sizes, splits))
    combined = s.second_shape(sizes, splits, out_strides)
    launch(s.second.kernel, [*outs, *partials],
           s.second.scalars(*combined, values=[count, *values]), s.second.groups(combined[0]))
    """

    first: RowNest
    second: RowNest
    partial_dtypes: tuple[str, ...]

    def second_shape(
        self, sizes: Sequence[Any], splits: Any, out_strides: Sequence[Sequence[Any]]
    ) -> tuple[list[Any], list[list[Any]]]:
        """Sizes and strides of the second launch. out_strides: of the outputs over the row dimensions."""
        row_sizes = list(sizes[self.first.reduced :])
        strides, step = [1], splits
        for s in row_sizes:
            strides.append(step)
            step = step * s
        return [splits, *row_sizes], [[0, *s] for s in out_strides] + [strides] * len(self.partial_dtypes)


def split_rows(
    target: Target,
    name: str,
    outs: Sequence[Operand],
    ins: Sequence[Operand],
    fn: Callable[..., Any],
    *,
    reduced: int = 1,
    ndim: int = 2,
    scalars: Sequence[str] = (),
    schedule: str | None = None,
) -> SplitRows:
    """Like rows, for one reduction per row and per-row outputs, cut into splits along the outermost reduced dimension.
    Arguments as for rows. The second launch takes the value r.count (u32) before fn's scalars."""
    n = len(scalars)
    monoid = split_monoid(fn, ins, n, scalars)
    first = Rows(target, name, outs, ins, fn, reduced, ndim, scalars, (), schedule, True, True).nest
    dtypes = tuple(_storage(t) for t in monoid.dtypes)
    row_dims = ndim - reduced
    partials = [Operand(f"partial{i}", t, ("1", *["s"] * row_dims)) for i, t in enumerate(dtypes)]
    second_outs = [Operand(o.name, o.dtype, ("0", *o.strides[reduced:])) for o in outs]

    def combine(r: RowContext, *args: Any) -> Any:
        parts, count, values = args[: len(dtypes)], args[len(dtypes)], args[len(dtypes) + 1 :]
        inner = RowContext(count)
        result = fn(inner, *[ir.leaf(o.name, o.dtype) for o in ins], *values)
        results = result if isinstance(result, (tuple, list)) else (result,)
        total = r.reduce(monoid, *parts)
        total = total if isinstance(total, tuple) else (total,)
        return tuple(ir.substitute(v, lambda node: total[node.attr[1]] if node.op == "red" else None) for v in results)

    second = rows(
        target,
        name + "_combine",
        second_outs,
        partials,
        combine,
        reduced=1,
        ndim=1 + row_dims,
        scalars=["u32", *scalars],
    )
    return SplitRows(first, second, dtypes)
