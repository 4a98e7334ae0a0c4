"""Pointwise kernels: one expression for every element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import ir
from ..builder import KernelBuilder
from ..ir import Node
from ..kernel import DTYPES, Kernel, Target
from .operands import (
    BLOCK_LANES,
    SIMT_ELEMENTS,
    SIMT_WORKGROUP,
    TASK_ELEMENTS,
    TILE_ROWS,
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


@dataclass(frozen=True)
class Nest:
    """A built kernel and its launch. Buffers go in the order outputs, inputs, extra buffers."""

    kernel: Kernel
    target: Target
    operands: tuple[Operand, ...]
    ndim: int
    schedule: str
    wide_scalars: tuple[int, ...] = ()  # which of `values` are 64-bit and travel first
    unit: int = 1  # elements an invocation handles (simt)
    words: bool = False  # those of a word

    def scalars(
        self, sizes: Sequence[Any], strides: Sequence[Sequence[Any] | None] = (), values: Sequence[Any] = ()
    ) -> list[Any]:
        """The launch's scalars. sizes: per dimension. strides: per operand (outputs, inputs), of every dimension, None
        for dense ones. values: of the scalars that the expression takes."""
        out = [values[i] for i in self.wide_scalars]
        out += list(sizes)
        for i, op in enumerate(self.operands):
            if op.strides != "dense":
                out += [s for s, c in zip(strides[i] or (), op.strides, strict=False) if c == "s"]
        out += self._partition(sizes)
        out += [v for i, v in enumerate(values) if i not in self.wide_scalars]
        return out

    def _partition(self, sizes: Sequence[Any]) -> list[Any]:
        if self.schedule == "vector":
            # Rows longer than a task are cut into chunks; several short ones make a task.
            return [maximum(TASK_ELEMENTS // maximum(sizes[0], 1), 1)]
        return []

    def groups(self, sizes: Sequence[Any]) -> tuple[Any, Any, Any]:
        """The grid."""
        if self.schedule == "vector":
            items = product([cdiv(sizes[0], TASK_ELEMENTS), *sizes[1:]])
            return (cdiv(items, self._partition(sizes)[0]), 1, 1)
        if self.schedule == "tiles":
            return (product([cdiv(sizes[1], TILE_ROWS), *sizes[2:]]), 1, 1)
        n = cdiv(product(sizes), self.unit)
        if self.words:
            n = n + 1  # a first word that is cut off by the offset
        return fold_groups(self.target, cdiv(n, self.kernel.workgroup[0]))


@dataclass(frozen=True)
class Context:
    """What an expression may use besides its operands: the builder, the element's coordinates (i32, dimension 0
    first) and its place in the iteration order."""

    k: KernelBuilder
    coordinates: tuple[Node, ...]
    position: Node


def whole_blocks(
    k: KernelBuilder, n: Node, lanes: int, element: Callable[[Node], None], group: Node | None = None
) -> None:
    """element(i) for i below n in a Triton kernel: whole blocks without a mask, so that loads are wide; the last one with. group: of those
    that share the range, by default the workgroup's index."""
    k.num_warps = lanes // 256  # type: ignore[attr-defined]
    first = k.let((k.group_index() if group is None else group) * lanes)
    i = k.let(first + k.local_id())
    with k.If(ir.and_(ir.le(first, n), ir.le(ir.const(lanes, "u32"), n - first))):
        element(i)
    with k.Else(), k.If(i < n):
        element(i)


def a_workgroup_apart(
    k: KernelBuilder,
    n: Node,
    workgroup: int,
    each: int,
    read: Callable[[Node], Callable[[], None]],
    element: Callable[[Node], None],
    group: Node | None = None,
) -> None:
    """Elements below n (u32), `each` of an invocation: all read before the first is written, since a store may touch what a
    later load reads, as far as a compiler knows. read(e) computes element e and gives what stores it; element(e) does
    both. group: as of whole_blocks."""
    span = workgroup * each
    first = k.let((k.group_index() if group is None else group) * span)
    i = k.let(first + k.local_id())
    with k.If(ir.and_(ir.le(first, n), ir.le(ir.const(span, "u32"), n - first))):
        for store in [read(k.let(i + j * workgroup) if j else i) for j in range(each)]:
            store()
    with k.Else(), k.For(ir.const(0, "u32"), ir.const(each, "u32")) as turn:
        e = k.let(i + turn * workgroup)
        with k.If(e < n):
            element(e)


def four_neighbours(
    k: KernelBuilder, i: Node, n: Node, four: Callable[[Node], None], element: Callable[[Node], None]
) -> None:
    """four(i) for elements i .. i + 3 below n (u32), or element(e) for those that there are."""
    with k.If(ir.and_(ir.lt(i, n), ir.le(ir.const(4, "u32"), n - i))):
        four(i)
    with k.Else(), k.For(i, n) as e:
        element(e)


class Pointwise(Declarations):
    def __init__(
        self,
        target: Target,
        name: str,
        outs: Sequence[Operand],
        ins: Sequence[Operand],
        fn: Callable[..., Any],
        ndim: int,
        scalars: Sequence[str],
        buffers: Sequence[tuple],
        context: bool,
        lanes: int,
    ) -> None:
        self.target, self.outs, self.ins, self.fn, self.ndim = target, list(outs), list(ins), fn, ndim
        self.with_context = context
        operands = [*outs, *ins]
        for o in operands:
            if o.strides != "dense" and len(o.strides) != ndim:
                raise ValueError(f"operand {o.name}: {len(o.strides)} strides for {ndim} dimensions")
        vector = target.schedule_class == "vector"
        tiles = (
            vector
            and ndim > 1
            and any(o.strides != "dense" and o.strides[0] == "s" and "1" in o.strides[1:2] for o in operands)
        )
        self.schedule = "tiles" if tiles else "vector" if vector else "simt"
        self.lanes = lanes or lanes_for([o.dtype for o in operands])
        self.word_out = self._word_output() if not vector else None
        key = operands_key(operands, scalars, buffers)
        self.each = (
            1 if self.schedule != "simt" or target.schedule_class == "block" or target.software else SIMT_ELEMENTS
        )
        if self.each > 1 and all(accessed_by_four(o) or (o in self.ins and o.strides[0] == "0") for o in operands):
            self.fours = frozenset(o.name for o in operands if accessed_by_four(o))
        unit = self.each if self.word_out is None or self.fours else 4 // DTYPES[self.word_out.dtype].size
        by = f"{unit if unit > 1 else ''}{'aligned' if self.fours else ''}"
        k = KernelBuilder(target, f"{name}_{key}_{ndim}d_{self.schedule}{by}")
        self.declare(k, self.outs, self.ins, buffers, ndim)
        per_task = k.scalar("rows_per_task", "u32") if self.schedule == "vector" else None
        values = [k.scalar(f"value{i}", t) for i, t in enumerate(scalars)]
        self.values = values
        if self.schedule == "vector":
            assert per_task is not None
            self._vector(per_task)
            workgroup = (1, 1, 1)
        elif self.schedule == "tiles":
            self._tiles()
            workgroup = (1, 1, 1)
        else:
            block = target.schedule_class == "block"
            workgroup = (BLOCK_LANES if block else min(SIMT_WORKGROUP, target.max_workgroup_size), 1, 1)
            if block:
                whole_blocks(k, k.let(product(self.sizes)), workgroup[0], self._element)
            else:
                self._simt(workgroup[0])
        self.nest = Nest(
            kernel=k.finish(workgroup, trusted=not self.extra),  # every index is below the sizes
            target=target,
            operands=tuple(operands),
            ndim=ndim,
            schedule=self.schedule,
            wide_scalars=tuple(i for i, t in enumerate(scalars) if t in ("i64", "f64")),
            unit=unit,
            words=self.word_out is not None,
        )

    def _word_output(self) -> Operand | None:
        """The one dense output narrower than a WGSL word, where whole words can be written."""
        small = [o for o in self.outs if DTYPES[o.dtype].size < 4]
        if self.target.language == "wgsl" and len(small) == 1 and small[0].strides == "dense":
            return small[0]
        return None

    # ---- addressing -----------------------------------------------------------------------------------------------

    def offset(self, o: Operand, coordinates: Sequence[Node], first: int) -> Node:
        """i32 sum of coordinate * stride over dimensions `first` and up."""
        total: Any = ir.const(0, "i32")
        for d, c in enumerate(coordinates, first):
            cls = o.strides[d]
            if cls != "0":
                c = ir.cast(c, "i32")
                total = total + (c if cls == "1" else c * self.strides[o.name, d])
        return total

    def body(
        self,
        index: Callable[[Operand], Any],
        coordinates: Sequence[Any],
        position: Any,
        store: Callable[[Operand, Any], None],
    ) -> None:
        loaded = [self.bufs[o.name].load(index(o)) for o in self.ins]
        for o, v in zip(self.outs, self._values(loaded, coordinates, position), strict=True):
            store(o, v)

    def _values(self, loaded: Sequence[Any], coordinates: Sequence[Any], position: Any) -> Sequence[Any]:
        """What fn makes of an element of every input, for every output."""
        args = [*loaded, *self.values]
        if self.with_context:
            args.insert(0, Context(self.k, tuple(coordinates), position))
        args += self.extra
        result = self.fn(*args)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len(results) != len(self.outs):
            raise ValueError(f"{self.k.name}: {len(results)} results for {len(self.outs)} outputs")
        return results

    # ---- schedules ------------------------------------------------------------------------------------------------

    def _span(
        self, start: Node, stop: Node, row_position: Node, coordinates: list[Node], base: dict[str, Node]
    ) -> None:
        """Elements start .. stop of a row: wide, then one by one. All i32."""
        k = self.k
        j = k.var("i32", start)
        for width in (self.lanes, 1):
            with k.While(lambda: j + width <= stop):  # noqa: B023 (called at once)
                at = j.as_node() + k.lanes(width)

                def index(o: Operand, at: Node = at) -> Node:
                    if o.strides == "dense":
                        return row_position + at
                    c = o.strides[0]
                    if c == "0":
                        return base[o.name]
                    return base[o.name] + (at if c == "1" else at * self.strides[o.name, 0])

                def store(o: Operand, v: Any, index: Callable[[Operand], Node] = index) -> None:
                    self.bufs[o.name].store(index(o), v)

                self.body(index, [at, *coordinates], row_position + at, store)
                j.set(j + width)

    def _bases(self, coordinates: list[Node]) -> dict[str, Node]:
        return {
            o.name: self.k.let(self.offset(o, coordinates, 1)) for o in [*self.outs, *self.ins] if o.strides != "dense"
        }

    def _vector(self, per_task: Node) -> None:
        k = self.k
        size = self.sizes[0]
        chunks = k.let(ir.idiv(size + (TASK_ELEMENTS - 1), TASK_ELEMENTS))
        items: Any = chunks
        for s in self.sizes[1:]:
            items = items * s
        items = k.let(items)
        k.stream(product(self.sizes))
        first = k.let(k.group_index() * per_task)
        last = k.let(ir.minimum(first + per_task, items))
        with k.For(first, last) as item:
            if self.ndim == 1:
                row, chunk = ir.const(0, "u32"), item
            else:
                row = k.let(ir.idiv(item, chunks))
                chunk = k.let(item - row * chunks)
            start = k.let(chunk * TASK_ELEMENTS)
            stop = k.let(ir.minimum(start + TASK_ELEMENTS, size))
            coordinates = unravel(k, self.sizes[1:], row)
            base = self._bases(coordinates)
            position = k.let(ir.cast(row * size, "i32"))
            self._span(
                ir.cast(start, "i32"),
                k.let(ir.cast(stop, "i32")),
                position,
                [ir.cast(c, "i32") for c in coordinates],
                base,
            )

    def _tiles(self) -> None:
        """TILE_ROWS rows at a time, one column block after the other, so that operands whose unit stride is along
        dimension 1 have their cache lines used up."""
        k = self.k
        blocks = k.let(ir.idiv(self.sizes[1] + (TILE_ROWS - 1), TILE_ROWS))
        group = k.group_index()
        outer = k.let(ir.idiv(group, blocks)) if self.ndim > 2 else ir.const(0, "u32")
        first = k.let((group - outer * blocks) * TILE_ROWS)
        last = k.let(ir.minimum(first + TILE_ROWS, self.sizes[1]))
        rest = unravel(k, self.sizes[2:], outer)
        size = k.let(ir.cast(self.sizes[0], "i32"))
        step = 4 * self.lanes
        with k.For(ir.const(0, "i32"), size, step) as column:
            stop = k.let(ir.minimum(column + step, size))
            with k.For(first, last) as r:
                coordinates = [r, *rest]
                position = k.let(ir.cast((outer * self.sizes[1] + r) * self.sizes[0], "i32"))
                self._span(column, stop, position, [ir.cast(c, "i32") for c in coordinates], self._bases(coordinates))

    def _coordinates(self, i: Node) -> list[Node]:
        """Of an element, where they are asked for."""
        need = self.with_context or any(o.strides != "dense" for o in [*self.outs, *self.ins])
        return unravel(self.k, self.sizes, i) if need else []

    def _element(self, i: Node, store: Callable[[Operand, Any], None] | None = None) -> None:
        """One element of the whole nest, i: u32 place in the iteration order."""
        coordinates = self._coordinates(i)
        position = ir.cast(i, "i32")

        def index(o: Operand) -> Node:
            return position if o.strides == "dense" else self.offset(o, coordinates, 0)

        def plain(o: Operand, v: Any) -> None:
            self.bufs[o.name].store(index(o), v)

        self.body(index, [ir.cast(c, "i32") for c in coordinates], position, store or plain)

    def _read(self, e: Node) -> Callable[[], None]:
        """Computes element e; what stores it."""
        stores: list[tuple[Operand, Any, Any]] = []

        def store(o: Operand, v: Any) -> None:
            stores.append((o, self.k.let(self._place(o, e)), self.k.let(v)))

        self._element(e, store)

        def finish() -> None:
            for o, index, value in stores:
                self.bufs[o.name].store(index, value)

        return finish

    def _place(self, o: Operand, i: Node) -> Node:
        """Where element i of the iteration order lies in an operand."""
        return ir.cast(i, "i32") if o.strides == "dense" else self.offset(o, unravel(self.k, self.sizes, i), 0)

    def _aligned(self) -> Node:
        """Whether every group of four elements in the iteration order is one of four neighbours, and aligned, in every
        operand of `fours`. The same for all invocations."""
        operands = [o for o in [*self.outs, *self.ins] if o.name in self.fours]
        off: Any = ir.const(0, "u32")
        for o in operands:
            off = ir.or_(off, self.bufs[o.name].misaligned())
        if self.ndim > 1 and any(o.strides != "dense" for o in [*self.outs, *self.ins]):
            off = ir.or_(off, ir.and_(self.sizes[0], 3))
            for (name, d), stride in self.strides.items():
                if d and name in self.fours:
                    off = ir.or_(off, ir.and_(ir.cast(stride, "u32"), 3))
        return ir.eq(off, 0)

    def _four(self, i: Node) -> None:
        """Elements i .. i + 3 (u32) by one access of each operand of `fours`."""
        k = self.k
        coordinates = self._coordinates(i)
        position = ir.cast(i, "i32")
        index = {
            o.name: position if o.strides == "dense" else k.let(self.offset(o, coordinates, 0))
            for o in [*self.outs, *self.ins]
        }
        loaded = [
            b.load4(index[b.name]) if b.name in self.fours else [b.load(index[b.name])] * 4
            for b in (self.bufs[o.name] for o in self.ins)
        ]
        results = []
        for u in range(4):
            at = [ir.cast(c, "i32") for c in coordinates]
            at[:1] = [c + u for c in at[:1]]
            results.append([k.let(v) for v in self._values([x[u] for x in loaded], at, position + u)])
        for o, values in zip(self.outs, zip(*results, strict=True), strict=True):
            self.bufs[o.name].store4(index[o.name], list(values))

    def _simt(self, workgroup: int) -> None:
        k = self.k
        n = k.let(product(self.sizes))
        i = k.global_id(workgroup)
        if self.fours:
            with k.If(self._aligned()):
                four_neighbours(k, k.let(i * 4), n, self._four, self._element)
            with k.Else():
                self._one_by_one(i, n, workgroup)
        else:
            self._one_by_one(i, n, workgroup)

    def _one_by_one(self, i: Node, n: Node, workgroup: int) -> None:
        """Elements of any layout, by invocation i."""
        if self.word_out is None and self.each == 1:
            with self.k.If(i < n):
                self._element(i)
        elif self.word_out is None:
            a_workgroup_apart(self.k, n, workgroup, self.each, self._read, self._element)
        else:
            words = DTYPES[self.word_out.dtype].size if self.fours else 1
            for w in range(words):
                self._word(self.k.let(i * words + w), n)

    def _word(self, i: Node, n: Node) -> None:
        """The elements of the i-th word of the output that is narrower than one."""
        k, out = self.k, self.word_out
        assert out is not None
        per, bits = 4 // DTYPES[out.dtype].size, 8 * DTYPES[out.dtype].size
        offset = k.raw("u32", f"{out.name}_offset")
        word = k.let(ir.idiv(offset, per) + i)
        first = k.let(word * per - offset)  # of the word's elements; wraps below 0 for a first partial word
        with k.If(ir.or_(first < n, first + (per - 1) < per - 1)):  # the first word may start before 0
            packed, mask = k.var("u32", 0), k.var("u32", 0)
            for lane in range(per):
                e = k.let(first + lane)
                with k.If(e < n):

                    def store(o: Operand, v: Any, lane: int = lane, e: Node = e) -> None:
                        if o is not out:
                            index = ir.cast(e, "i32")
                            if o.strides != "dense":
                                index = self.offset(o, unravel(k, self.sizes, e), 0)
                            self.bufs[o.name].store(index, v)
                            return
                        value = ir.cast(v, DTYPES[o.dtype].compute)
                        code = k.lang.encode(o.dtype, value)  # type: ignore[attr-defined]
                        packed.set(ir.or_(packed, ir.shl(code, lane * bits)))
                        mask.set(ir.or_(mask, ((1 << bits) - 1) << (lane * bits)))

                    self._element(e, store)
            m, p, w = k.atom(mask), k.atom(packed), k.atom(word)
            if out.windows > 1:
                k.lang.mix(k.emitter, self.bufs[out.name].decl, w, p, m)  # type: ignore[attr-defined]
                k.forget_loads()
                return
            with k.If(ir.eq(mask, 0xFFFFFFFF)):
                k.text(f"atomicStore(&{out.name}[{w}], {p});")
            with k.Else():
                k.text(f"atomicXor(&{out.name}[{w}], (atomicLoad(&{out.name}[{w}]) ^ {p}) & {m});")


def pointwise(
    target: Target,
    name: str,
    outs: Sequence[Operand],
    ins: Sequence[Operand],
    fn: Callable[..., Any],
    ndim: int,
    *,
    scalars: Sequence[str] = (),
    buffers: Sequence[tuple] = (),
    context: bool = False,
    lanes: int = 0,
) -> Nest:
    """A nest that computes outs = fn(*ins, *scalars) for every element.

    name: says what fn computes; operand dtypes, stride classes and the schedule are added to it. ndim: dimensions, 1
    or more, coalesced by the caller. fn takes the inputs as compute-dtype nodes (Complex for complex dtypes), then the
    scalars; it gives one value per output, cast on the store. It is called several times. scalars: types ("f32",
    "i32", ...). buffers: further (name, dtype, mode) buffers, passed to fn as Buffer after the scalars, to be loaded
    at any index (OpenCL: with a vector of indices too). context: fn takes a Context first. lanes: elements of a vector
    (schedule class `vector`), 0 chooses by the dtypes. Each operand has fewer than 2**31 elements in reach. Inputs may
    be the same tensor as an output only element by element.

        x, y = Operand("x", "f32", ("s", "1")), Operand("y", "f16", ("1", "0"))
        pointwise(t, "add_alpha", [Operand("out", "f32", ("1", "s"))], [x, y],
                  lambda x, y, alpha: x + alpha * y, 2, scalars=["f32"])
    """
    return Pointwise(target, name, outs, ins, fn, ndim, scalars, buffers, context, lanes).nest
