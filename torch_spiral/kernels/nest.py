"""Pointwise and row (reduction) kernels from expressions, for the schedule classes `vector` and `simt`.

Dimension 0 is the fastest. A kernel is built for stride classes, never for sizes: sizes and strides that are not 0
or 1 are scalars of the
launch. What is built is a Nest: the Kernel and how to launch it for given sizes. Sizes may be ints or the Syms of a
lowering.

    nest = pointwise(target, "gelu", [Operand("out", "f16", "dense")], [Operand("x", "f16", "dense")],
                     lambda x: x * 0.5 * (1.0 + ir.erf(x * 0.7071067811865476)), ndim=1)
    launch(nest.kernel, [out, x], nest.scalars(sizes=[n]), nest.groups(sizes=[n]))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import ir
from .builder import KernelBuilder
from .ir import Complex, Node
from .kernel import DTYPES, Kernel, Target

SIMT_ELEMENTS = 4  # that an invocation of a GPU handles, a workgroup apart: so many loads are in flight
SIMT_KEPT = 16  # elements of a row that an invocation of a GPU keeps in registers, where several loops read them
SIMT_WORKGROUP = 256  # invocations; 64 on software rasterisers would do as well
BLOCK_LANES = 1024  # of a Triton kernel: 16 bytes a thread and access for most dtypes
TASK_ELEMENTS = 16384  # what one workgroup of a CPU device handles at least
TILE_ROWS = 64


def cdiv(a: Any, b: Any) -> Any:
    return (a + (b - 1)) // b


def minimum(a: Any, b: Any) -> Any:
    """Of ints or Syms."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    from torch_spiral import lowering

    return lowering.minimum(a, b)


def maximum(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    from torch_spiral import lowering

    return lowering.maximum(a, b)


def product(xs: Sequence[Any]) -> Any:
    r: Any = 1
    for x in xs:
        r = x if isinstance(r, int) and r == 1 else r * x
    return r


def fold_groups(target: Target, n: Any) -> tuple[Any, Any, Any]:
    """A grid of at least n workgroups; kernels use the flattened index and skip what is beyond."""
    limit = target.max_workgroups
    if limit >= 1 << 31:
        return (n, 1, 1)
    return (minimum(n, limit), cdiv(n, limit), 1)


@dataclass(frozen=True)
class Operand:
    """A tensor in a nest. strides: "dense" (the element's index is its place in the iteration order), or per dimension
    "0", "1" or "s" (a stride given at launch, in elements, may be negative)."""

    name: str
    dtype: str
    strides: str | tuple[str, ...] = "dense"
    windows: int = 1  # bindings it takes (Tensor.windows)

    @property
    def key(self) -> str:
        s = "d" if self.strides == "dense" else "".join(self.strides)
        return f"{self.dtype}{s}" + (f"w{self.windows}" if self.windows > 1 else "")


def stride_classes(strides: Sequence[Any]) -> tuple[str, ...]:
    """Classes of integer strides."""
    return tuple("0" if s == 0 else "1" if s == 1 else "s" for s in strides)


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
    n_values: int = 0
    extra: dict[str, int] = field(default_factory=dict, compare=False)

    def scalars(
        self, sizes: Sequence[Any], strides: Sequence[Sequence[Any] | None] = (), values: Sequence[Any] = ()
    ) -> list[Any]:
        """The launch's scalars. sizes: per dimension. strides: per operand (outputs, inputs), of every dimension;
        None for
        dense ones. values: of the scalars that the expression takes."""
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


def _lanes_for(dtypes: Sequence[str]) -> int:
    widest = max((DTYPES[d].size for d in dtypes), default=4)
    return 8 if widest >= 8 else 16


class _Pointwise:
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
        self.lanes = lanes or _lanes_for([o.dtype for o in operands])
        self.word_out = self._word_output() if not vector else None
        key = "_".join([*(o.key for o in operands), *scalars, *("".join(map(str, b[1:])) for b in buffers)])
        self.each = 1 if self.schedule != "simt" or target.schedule_class == "block" or target.software else SIMT_ELEMENTS
        unit = self.each if self.word_out is None else 4 // DTYPES[self.word_out.dtype].size
        k = self.k = KernelBuilder(target, f"{name}_{key}_{ndim}d_{self.schedule}{unit if unit > 1 else ''}")
        self.bufs = {
            o.name: k.buffer(o.name, o.dtype, "w" if i < len(self.outs) else "r", o.windows)
            for i, o in enumerate(operands)
        }
        self.extra = tuple(k.buffer(*b) for b in buffers)
        self.sizes = [k.scalar(f"size{d}", "u32") for d in range(ndim)]
        self.strides: dict[tuple[str, int], Node] = {}
        for o in operands:
            for d, c in enumerate(o.strides if o.strides != "dense" else ()):
                if c == "s":
                    self.strides[o.name, d] = k.scalar(f"{o.name}_stride{d}", "i32")
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
            (self._block if block else self._simt)(workgroup[0])
        self.nest = Nest(
            kernel=k.finish(workgroup, trusted=not self.extra),  # every index is below the sizes
            target=target,
            operands=tuple(operands),
            ndim=ndim,
            schedule=self.schedule,
            wide_scalars=tuple(i for i, t in enumerate(scalars) if t in ("i64", "f64")),
            unit=unit,
            words=self.word_out is not None,
            n_values=len(values),
        )

    def _word_output(self) -> Operand | None:
        """The one dense output narrower than a WGSL word, where whole words can be written."""
        small = [o for o in self.outs if DTYPES[o.dtype].size < 4]
        if self.target.language == "wgsl" and len(small) == 1 and small[0].strides == "dense":
            return small[0]
        return None

    # ---- addressing -----------------------------------------------------------------------------------------------

    def decompose(self, row: Node, first: int) -> list[Node]:
        """Coordinates of dimensions `first` and up (u32) of a flattened index over them."""
        k, out = self.k, []
        for d in range(first, self.ndim):
            if d == self.ndim - 1:
                out.append(row)
            else:
                q = k.let(ir.idiv(row, self.sizes[d]))
                out.append(k.let(row - q * self.sizes[d]))
                row = q
        return out

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
        args = [*loaded, *self.values]
        if self.with_context:
            args.insert(0, Context(self.k, tuple(coordinates), position))
        args += self.extra
        result = self.fn(*args)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len(results) != len(self.outs):
            raise ValueError(f"{self.k.name}: {len(results)} results for {len(self.outs)} outputs")
        for o, v in zip(self.outs, results, strict=False):
            store(o, v)

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
            coordinates = self.decompose(row, 1) if self.ndim > 1 else []
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
        dimension 1
        have their cache lines used up."""
        k = self.k
        blocks = k.let(ir.idiv(self.sizes[1] + (TILE_ROWS - 1), TILE_ROWS))
        group = k.group_index()
        outer = k.let(ir.idiv(group, blocks)) if self.ndim > 2 else ir.const(0, "u32")
        first = k.let((group - outer * blocks) * TILE_ROWS)
        last = k.let(ir.minimum(first + TILE_ROWS, self.sizes[1]))
        rest = self.decompose(outer, 2) if self.ndim > 2 else []
        size = k.let(ir.cast(self.sizes[0], "i32"))
        step = 4 * self.lanes
        with k.For(ir.const(0, "i32"), size, step) as column:
            stop = k.let(ir.minimum(column + step, size))
            with k.For(first, last) as r:
                coordinates = [r, *rest]
                position = k.let(ir.cast((outer * self.sizes[1] + r) * self.sizes[0], "i32"))
                self._span(column, stop, position, [ir.cast(c, "i32") for c in coordinates], self._bases(coordinates))

    def _element(self, i: Node, store: Callable[[Operand, Any], None] | None = None) -> None:
        """One element of the whole nest, i: u32 place in the iteration order."""
        need = self.with_context or any(o.strides != "dense" for o in [*self.outs, *self.ins])
        coordinates = self.decompose(i, 0) if need else []
        position = ir.cast(i, "i32")

        def index(o: Operand) -> Node:
            return position if o.strides == "dense" else self.offset(o, coordinates, 0)

        def plain(o: Operand, v: Any) -> None:
            self.bufs[o.name].store(index(o), v)

        self.body(index, [ir.cast(c, "i32") for c in coordinates], position, store or plain)

    def _block(self, lanes: int) -> None:
        """Whole blocks without a mask, so that loads are wide; the last one with."""
        k = self.k
        k.num_warps = lanes // 256  # type: ignore[attr-defined]
        n: Any = self.sizes[0]
        for s in self.sizes[1:]:
            n = n * s
        n = k.let(n)
        first = k.let(k.group_index() * lanes)
        i = k.let(first + k.local_id())
        with k.If(ir.and_(ir.le(first, n), ir.le(ir.const(lanes, "u32"), n - first))):
            self._element(i)
        with k.Else(), k.If(i < n):
            self._element(i)

    def _several(self, n: Any, workgroup: int) -> None:
        """Elements a workgroup apart, all read before the first is written: a store may touch what a later load reads, as far
        as a compiler knows."""
        k = self.k
        span = workgroup * self.each
        first = k.let(k.group_index() * span)
        i = k.let(first + k.local_id())
        with k.If(ir.and_(ir.le(first, n), ir.le(ir.const(span, "u32"), n - first))):
            stores: list[tuple[Operand, Any, Any]] = []
            for j in range(self.each):
                e = k.let(i + j * workgroup) if j else i

                def store(o: Operand, v: Any, e: Node = e) -> None:
                    stores.append((o, k.let(self._place(o, e)), k.let(v)))

                self._element(e, store)
            for o, index, value in stores:
                self.bufs[o.name].store(index, value)
        with k.Else(), k.For(ir.const(0, "u32"), ir.const(self.each, "u32")) as turn:
            e = k.let(i + turn * workgroup)
            with k.If(e < n):
                self._element(e)

    def _place(self, o: Operand, i: Node) -> Node:
        """Where element i of the iteration order lies in an operand."""
        return ir.cast(i, "i32") if o.strides == "dense" else self.offset(o, self.decompose(i, 0), 0)

    def _simt(self, workgroup: int) -> None:
        k = self.k
        n: Any = self.sizes[0]
        for s in self.sizes[1:]:
            n = n * s
        n = k.let(n)
        i = k.global_id(workgroup)
        if self.word_out is None and self.each == 1:
            with k.If(i < n):
                self._element(i)
            return
        if self.word_out is None:
            self._several(n, workgroup)
            return
        out = self.word_out
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
                                index = self.offset(o, self.decompose(e, 0), 0)
                            self.bufs[o.name].store(index, v)
                            return
                        value = ir.cast(v, DTYPES[o.dtype].compute)
                        code = k.lang.encode(o.dtype, value)  # type: ignore[attr-defined]
                        packed.set(ir.or_(packed, ir.shl(code, lane * bits)))
                        mask.set(ir.or_(mask, ((1 << bits) - 1) << (lane * bits)))

                    self._element(e, store)
            m, p, w = k.atom(mask), k.atom(packed), k.atom(word)
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
    or more,
    coalesced by the caller. fn takes the inputs as compute-dtype nodes (Complex for complex dtypes), then the
    scalars; it gives one
    value per output, cast on the store. It is called several times. scalars: types ("f32", "i32", ...). buffers:
    further (name, dtype,
    mode) buffers, passed to fn as Buffer after the scalars, to be loaded at any index (OpenCL: with a vector of
    indices too).
    context: fn takes a Context first. Each operand has fewer than 2**31 elements in reach. Inputs may be the same
    tensor as an output only
    element by element.

        pointwise(t, "add_alpha", [Operand("out", "f32", ("1", "s"))], [Operand("x", "f32", ("s", "1")), Operand("y",
        "f16", ("1", "0"))],
                  lambda x, y, alpha: x + alpha * y, 2, scalars=["f32"])
    """
    return _Pointwise(target, name, outs, ins, fn, ndim, scalars, buffers, context, lanes).nest


# ---- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Monoid:
    """An associative combination with a neutral element, on tuples of values. blocked: rounding errors grow with the
    number of
    combinations, so long reductions go in blocks."""

    name: str
    dtypes: tuple[str, ...]
    init: tuple[Any, ...]
    combine: Callable[[tuple, tuple], tuple] = field(compare=False)
    blocked: bool = False


def SUM(dtype: str = "f32") -> Monoid:
    return Monoid("sum", (dtype,), (0,), lambda a, b: (a[0] + b[0],), blocked=dtype in ir.FLOATS)


def PROD(dtype: str = "f32") -> Monoid:
    return Monoid("prod", (dtype,), (1,), lambda a, b: (a[0] * b[0],), blocked=dtype in ir.FLOATS)


_LOWEST: dict[str, Any] = {
    "f32": -math.inf, "f64": -math.inf, "i32": -(2**31), "i64": -(2**63), "u32": 0, "u64": 0, "bool": 0
}  # fmt: skip
_HIGHEST: dict[str, Any] = {
    "f32": math.inf, "f64": math.inf, "i32": 2**31 - 1, "i64": 2**63 - 1, "u32": 2**32 - 1, "u64": 2**64 - 1, "bool": 1
}  # fmt: skip


def MAX(dtype: str = "f32") -> Monoid:
    """NaN propagates."""
    return Monoid("max", (dtype,), (_LOWEST[dtype],), lambda a, b: (ir.maximum(a[0], b[0]),))


def MIN(dtype: str = "f32") -> Monoid:
    return Monoid("min", (dtype,), (_HIGHEST[dtype],), lambda a, b: (ir.minimum(a[0], b[0]),))


def _arg(better: Callable[[Any, Any], Node]) -> Callable[[tuple, tuple], tuple]:
    def combine(a: tuple, b: tuple) -> tuple:
        tie = ir.or_(ir.eq(a[0], b[0]), ir.and_(ir.isnan(a[0]), ir.isnan(b[0])))
        wins = ir.or_(better(b[0], a[0]), ir.isnan(b[0]))
        wins = ir.and_(wins, ir.not_(ir.isnan(a[0])))
        take = ir.or_(wins, ir.and_(tie, ir.lt(b[1], a[1])))
        return ir.where(take, b[0], a[0]), ir.where(take, b[1], a[1])

    return combine


def ARGMAX(dtype: str = "f32") -> Monoid:
    """(value, index): the first of the largest, or the first NaN. Elements are (x, rows.index)."""
    return Monoid("argmax", (dtype, "i32"), (_LOWEST[dtype], 2**31 - 1), _arg(ir.gt))


def ARGMIN(dtype: str = "f32") -> Monoid:
    return Monoid("argmin", (dtype, "i32"), (_HIGHEST[dtype], 2**31 - 1), _arg(ir.lt))


ANY = Monoid("any", ("bool",), (False,), lambda a, b: (ir.or_(a[0], b[0]),))
ALL = Monoid("all", ("bool",), (True,), lambda a, b: (ir.and_(a[0], b[0]),))


def WELFORD(dtype: str = "f32") -> Monoid:
    """(mean, sum of squared deviations, count). Elements are (x, 0, 1)."""

    def combine(a: tuple, b: tuple) -> tuple:
        n = a[2] + b[2]
        d = b[0] - a[0]
        r = b[2] / ir.where(ir.gt(n, 1.0), n, 1.0)
        return a[0] + d * r, a[1] + b[1] + d * d * a[2] * r, n

    return Monoid("welford", (dtype,) * 3, (0, 0, 0), combine)


def LOGSUMEXP(dtype: str = "f32") -> Monoid:
    """(m, s) for m + log(s). Elements are (x, 1)."""

    def combine(a: tuple, b: tuple) -> tuple:
        m = ir.maximum(a[0], b[0])
        at = ir.where(ir.isfinite(m), m, 0.0)  # infinities: exp(-inf - -inf) would be NaN
        s = a[1] * ir.exp(a[0] - at) + b[1] * ir.exp(b[0] - at)
        return m, ir.where(ir.eq(m, math.inf), 1.0, s)

    return Monoid("logsumexp", (dtype, dtype), (-math.inf, 0), combine)


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
    """How rows are reduced. kind: a schedule of rows(), or "auto" for its own choice; pieces: into how many a long row is cut (1: not)."""

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


class _Rows:
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
        self.lanes = _lanes_for([o.dtype for o in operands]) if target.schedule_class == "vector" else 1
        if split:  # evaluate fn once, to know the components of its reduction
            monoid = split_monoid(fn, ins, len(scalars), scalars)
            self.outs = [Operand(f"partial{i}", _storage(t), "dense") for i, t in enumerate(monoid.dtypes)]
            operands = [*self.outs, *ins]
        self.subgroups = subgroups and self.schedule == "workgroup" and target.subgroup > 0 and not self.block
        key = "_".join([*(o.key for o in operands), *scalars, *("".join(map(str, b[1:])) for b in buffers)])
        k = self.k = KernelBuilder(
            target,
            f"{name}_{key}_r{reduced}of{ndim}_{self.schedule}"
            f"{'_split' if split else ''}{'_subgroups' if self.subgroups else ''}",
        )
        self.bufs = {
            o.name: k.buffer(o.name, o.dtype, "w" if i < len(self.outs) else "r", o.windows)
            for i, o in enumerate(operands)
        }
        self.extra = tuple(k.buffer(*b) for b in buffers)
        self.sizes = [k.scalar(f"size{d}", "u32") for d in range(ndim)]
        self.strides: dict[tuple[str, int], Node] = {}
        for o in operands:
            for d, c in enumerate(o.strides if o.strides != "dense" else ()):
                if c == "s":
                    self.strides[o.name, d] = k.scalar(f"{o.name}_stride{d}", "i32")
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
        self.workgroup = self._workgroup()
        if self.schedule == "lanes_d":
            self._lanes_d(per_task)
        elif self.schedule == "lanes_r":
            self._lanes_r(per_task)
        elif self.schedule == "invocation":
            self._invocation()
        else:
            self._workgroup_row()
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

    def _workgroup(self) -> int:
        if self.schedule == "workgroup":
            return BLOCK_LANES if self.block else min(256, self.target.max_workgroup_size)
        if self.schedule == "invocation":
            return 128 if self.block else min(64, self.target.max_workgroup_size)
        return 1

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

    # ---- addressing
    # ---------------------------------------------------------------------------------------------------

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
            bases[o.name] = total if total.lanes > 1 else self.k.let(total)
        return bases

    def _coordinates(self, row: Node) -> list[Node]:
        """Of a flattened row index."""
        out, k = [], self.k
        for d in range(self.reduced, self.ndim):
            if d == self.ndim - 1:
                out.append(row)
            else:
                q = k.let(ir.idiv(row, self.sizes[d]))
                out.append(k.let(row - q * self.sizes[d]))
                row = q
        return out

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
        kept = self._read_again() if self.schedule == "workgroup" and self.reduced == 1 and not self.target.software else []
        if not kept or self.block or self.split:
            self._loops_of_row(lanes_r, split, row_id)
            return
        size, length = self.workgroup, self.sizes[0]
        short = ir.and_(ir.le(length, size * SIMT_KEPT), ir.gt(length, 0))
        with k.If(short):
            for j in range(SIMT_KEPT):
                place = {0: k.let(ir.minimum(k.local_id() + j * size, length - 1))}
                self.kept.append({o.name: self._load(o, place) for o in kept})
            self._loops_of_row(lanes_r, split, row_id)
        with k.Else():
            self.kept, self.done = [], {}
            self.row_leaf = self._leaf_loader(row_index, ir.const(0, "i32"))
            self._loops_of_row(lanes_r, split, row_id)

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
        kept: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """One element (or lanes of them) at reduced coordinates `at`. later: takes the stores, to be made after other loads.
        kept: operands that are in registers."""

        def index(o: Operand) -> Node:
            total: Any = self.bases[o.name]
            for d in range(self.reduced):
                total = total + self._term(o, d, at[d])
            return total

        leaf = self._leaf_loader(index, position, kept)
        exprs = [x for _, xs in now for x in xs] + [self.results[i] for i in stores]
        values = self.evaluate(exprs, leaf)
        if stores and self.loops > 1 and position.lanes > 1:
            self._prefetch(index)
        for (monoid, xs), acc in zip(now, accs, strict=False):
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
        """Elements dealt to the invocations of a workgroup, then a tree."""
        k, size = self.k, self.workgroup
        inner: Any = ir.const(1, "u32")
        for s in self.sizes[: self.reduced - 1]:
            inner = inner * s
        first, end = self._range(split)
        first, end = k.let(first * inner), k.let(end * inner)
        totals = self._accumulators(now, 1)
        lid = k.local_id()

        each = 1 if self.block or self.target.software else SIMT_ELEMENTS

        def body(t: Any, accs: list, later: list | None = None, kept: dict[str, Any] | None = None) -> None:
            at, rest = {}, t
            for d in range(self.reduced - 1):
                q = k.let(ir.idiv(rest, self.sizes[d]))
                at[d] = k.let(rest - q * self.sizes[d])
                rest = q
            at[self.reduced - 1] = rest
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

        if self.kept:
            from_registers()
        elif self.block:  # whole blocks without a mask, then the rest
            span = k.let(ir.where(ir.lt(first, end), end - first, ir.const(0, "u32")))
            whole = k.let(first + span - ir.irem(span, size))
            with k.For(first, whole, size) as t:
                body(k.let(t + lid), totals)
            with k.If(ir.lt(whole, first + span)):
                t = k.let(whole + lid)
                with k.If(t < end):
                    body(t, totals)
        elif any(m.blocked for m, _ in now):
            j = k.var("u32", first + lid)
            with k.While(lambda: j < end):
                accs = self._accumulators(now, 1)
                stop = k.let(ir.minimum(end, j + 128 * size))
                if each > 1:
                    several(j.as_node(), stop, accs)
                    j.set(j + 128 * size)
                else:
                    with k.While(lambda: j < stop):
                        t = j.as_node()
                        body(t, accs)
                        j.set(t + size)
                for (m, _), a, b in zip(now, totals, accs, strict=False):
                    self._combine(m, a, [x.as_node() for x in b])
        elif each > 1:
            several(first + lid, end, totals)
        else:
            with k.For(first + lid, end, size) as t:
                body(t, totals)
        out = []
        for m, acc in zip([m for m, _ in now], totals, strict=False):
            out.append(self._tree(m, acc))
        return out

    def _tree(self, monoid: Monoid, acc: list[Any]) -> list[Node]:
        """Combines the invocations' accumulators; every invocation gets the result."""
        k, size = self.k, self.workgroup
        if self.block:
            return k.reduce(monoid.name, monoid.combine, monoid.dtypes, acc)  # type: ignore[attr-defined]
        if self.subgroups and all(t in ("f32", "i32", "u32") for t in monoid.dtypes):
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
        while step:
            with k.If(lid < step):
                new = monoid.combine(tuple(s[lid] for s in shared), tuple(s[lid + step] for s in shared))
                new = tuple(k.let(n) for n in new)
                for s, n in zip(shared, new, strict=False):
                    s[lid] = n
            k.barrier()
            step //= 2
        out = [s[0] for s in shared]
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
        self.row(self._coordinates(rest) if self.ndim > self.reduced else [], 1, split, row)

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
            others = []
            index = outer
            for d in range(self.reduced + 1, self.ndim):
                if d == self.ndim - 1:
                    others.append(index)
                else:
                    q = k.let(ir.idiv(index, self.sizes[d]))
                    others.append(k.let(index - q * self.sizes[d]))
                    index = q

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
        with k.If(row < self._rows_total()):
            self._one(row)


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

    Dimensions: the `reduced` ones first (fastest first), then those of the rows; every operand has a stride class
    for each of the `ndim`.
    fn(r, *ins, *scalars, *buffers) gives one value per output; r is a RowContext. An output is stored per row where
    its reduced
    strides are all "0", else per element. schedule: None chooses by the stride classes; a caller that knows rows to
    be short and many
    passes "lanes_r" (vector) or "invocation" (simt). subgroups: False takes the shared-memory tree. An output may be
    an input's tensor,
    element by element. Zero-size reductions give the monoid's neutral element.

        def softmax(r, x):
            e = ir.exp(x - r.reduce(MAX(), x))
            return e / r.sum(e)

        nest = rows(t, "softmax", [Operand("out", "f16", ("1", "s"))], [Operand("x", "f16", ("1", "s"))], softmax)
        launch(nest.kernel, [out, x], nest.scalars([d, n], [(1, d), (1, d)]), nest.groups([d, n]))

        def max_dim(r, x):
            return r.reduce(ARGMAX(), x, r.index)     # outputs: value, index (stored as i64 where the buffer is i64)
    """
    return _Rows(target, name, outs, ins, fn, reduced, ndim, scalars, buffers, schedule, False, subgroups).nest


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
    launch(s.first.kernel, [*partials, *ins], s.first.scalars(sizes, strides, values, splits), s.first.groups(sizes,
    splits))
    launch(s.second.kernel, [*outs, *partials], s.second.scalars(*s.second_shape(sizes, splits, out_strides),
    values=[count, *values]), ...)
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
    """Like rows, for one reduction per row and per-row outputs, cut into splits along the outermost reduced
    dimension. Arguments as
    for rows. The second launch takes the value r.count (u32) before fn's scalars."""
    n = len(scalars)
    monoid = split_monoid(fn, ins, n, scalars)
    first = _Rows(target, name, outs, ins, fn, reduced, ndim, scalars, (), schedule, True, True).nest
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
