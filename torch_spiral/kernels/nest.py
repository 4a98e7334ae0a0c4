"""Pointwise and row (reduction) kernels from expressions, for the schedule classes `vector` and `simt`.

Dimension 0 is the fastest. A kernel is built for stride classes, never for sizes: sizes and strides that are not 0 or 1 are scalars of the
launch. What is built is a Nest: the Kernel and how to launch it for given sizes. Sizes may be ints or the Syms of a lowering.

    nest = pointwise(target, "gelu", [Operand("out", "f16", "dense")], [Operand("x", "f16", "dense")],
                     lambda x: x * 0.5 * (1.0 + ir.erf(x * 0.7071067811865476)), ndim=1)
    launch(nest.kernel, [out, x], nest.scalars(sizes=[n]), nest.groups(sizes=[n]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from . import ir
from .builder import Buffer, KernelBuilder
from .ir import Complex, Node
from .kernel import DTYPES, Kernel, Target

SIMT_WORKGROUP = 256  # invocations; 64 on software rasterisers would do as well
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
    strides: Union[str, tuple[str, ...]] = "dense"

    @property
    def key(self) -> str:
        s = "d" if self.strides == "dense" else "".join(self.strides)
        return f"{self.dtype}{s}"


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
    n_values: int = 0
    extra: dict[str, int] = field(default_factory=dict, compare=False)

    def scalars(
        self, sizes: Sequence[Any], strides: Sequence[Sequence[Any] | None] = (), values: Sequence[Any] = ()
    ) -> list[Any]:
        """The launch's scalars. sizes: per dimension. strides: per operand (outputs, inputs), of every dimension; None for
        dense ones. values: of the scalars that the expression takes."""
        out = [values[i] for i in self.wide_scalars]
        out += list(sizes)
        for i, op in enumerate(self.operands):
            if op.strides != "dense":
                out += [s for s, c in zip(strides[i] or (), op.strides) if c == "s"]
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
        if self.unit > 1:
            n = n + 1  # a first word that is cut off by the offset
        return fold_groups(self.target, cdiv(n, self.kernel.workgroup[0]))


@dataclass(frozen=True)
class Context:
    """What an expression may use besides its operands: the builder, the element's coordinates (i32, dimension 0 first), its
    place in the iteration order, and the extra buffers."""

    k: KernelBuilder
    coordinates: tuple[Node, ...]
    position: Node
    buffers: tuple[Buffer, ...]


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
        tiles = vector and ndim > 1 and any(
            o.strides != "dense" and o.strides[0] == "s" and "1" in o.strides[1:2] for o in operands
        )
        self.schedule = "tiles" if tiles else "vector" if vector else "simt"
        self.lanes = lanes or _lanes_for([o.dtype for o in operands])
        self.word_out = self._word_output() if not vector else None
        key = "_".join(o.key for o in operands)
        unit = 1 if self.word_out is None else 4 // DTYPES[self.word_out.dtype].size
        k = self.k = KernelBuilder(target, f"{name}_{key}_{ndim}d_{self.schedule}{unit if unit > 1 else ''}")
        self.bufs = {o.name: k.buffer(o.name, o.dtype, "w" if i < len(self.outs) else "r") for i, o in enumerate(operands)}
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
            workgroup = (min(SIMT_WORKGROUP, target.max_workgroup_size), 1, 1)
            self._simt(workgroup[0])
        self.nest = Nest(
            kernel=k.finish(workgroup),
            target=target,
            operands=tuple(operands),
            ndim=ndim,
            schedule=self.schedule,
            wide_scalars=tuple(i for i, t in enumerate(scalars) if t in ("i64", "f64")),
            unit=unit,
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

    def body(self, index: Callable[[Operand], Any], coordinates: Sequence[Any], position: Any, store: Callable[[Operand, Any], None]) -> None:
        loaded = [self.bufs[o.name].load(index(o)) for o in self.ins]
        args = [*loaded, *self.values]
        if self.with_context:
            args.insert(0, Context(self.k, tuple(coordinates), position, self.extra))
        elif self.extra:
            args += self.extra
        result = self.fn(*args)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len(results) != len(self.outs):
            raise ValueError(f"{self.k.name}: {len(results)} results for {len(self.outs)} outputs")
        for o, v in zip(self.outs, results):
            store(o, v)

    # ---- schedules ------------------------------------------------------------------------------------------------

    def _span(self, start: Node, stop: Node, row_position: Node, coordinates: list[Node], base: dict[str, Node]) -> None:
        """Elements start .. stop of a row: wide, then one by one. All i32."""
        k = self.k
        j = k.var("i32", start)
        for width in (self.lanes, 1):
            with k.While(lambda: j + width <= stop):
                at = j.as_node() + k.lanes(width)

                def index(o: Operand) -> Node:
                    if o.strides == "dense":
                        return row_position + at
                    c = o.strides[0]
                    if c == "0":
                        return base[o.name]
                    return base[o.name] + (at if c == "1" else at * self.strides[o.name, 0])

                self.body(index, [at, *coordinates], row_position + at, lambda o, v: self.bufs[o.name].store(index(o), v))
                j.set(j + width)

    def _bases(self, coordinates: list[Node]) -> dict[str, Node]:
        return {o.name: self.k.let(self.offset(o, coordinates, 1)) for o in [*self.outs, *self.ins] if o.strides != "dense"}

    def _vector(self, per_task: Node) -> None:
        k = self.k
        size = self.sizes[0]
        chunks = k.let(ir.idiv(size + (TASK_ELEMENTS - 1), TASK_ELEMENTS))
        items: Any = chunks
        for s in self.sizes[1:]:
            items = items * s
        items = k.let(items)
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
            self._span(ir.cast(start, "i32"), k.let(ir.cast(stop, "i32")), position, [ir.cast(c, "i32") for c in coordinates], base)

    def _tiles(self) -> None:
        """TILE_ROWS rows at a time, one column block after the other, so that operands whose unit stride is along dimension 1
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
        k = self.k
        need = self.with_context or any(o.strides != "dense" for o in [*self.outs, *self.ins])
        coordinates = self.decompose(i, 0) if need else []
        position = ir.cast(i, "i32")

        def index(o: Operand) -> Node:
            return position if o.strides == "dense" else self.offset(o, coordinates, 0)

        def plain(o: Operand, v: Any) -> None:
            self.bufs[o.name].store(index(o), v)

        self.body(index, [ir.cast(c, "i32") for c in coordinates], position, store or plain)

    def _simt(self, workgroup: int) -> None:
        k = self.k
        n: Any = self.sizes[0]
        for s in self.sizes[1:]:
            n = n * s
        n = k.let(n)
        i = k.global_id(workgroup)
        if self.word_out is None:
            with k.If(i < n):
                self._element(i)
            return
        out = self.word_out
        per, bits = 4 // DTYPES[out.dtype].size, 8 * DTYPES[out.dtype].size
        offset = k.raw("u32", f"{out.name}_offset")
        word = k.let(ir.idiv(offset, per) + i)
        first = k.let(word * per - offset)  # of the word's elements; wraps below 0 for a first partial word
        with k.If(ir.or_(first < n, first + (per - 1) < n)):
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

    name: says what fn computes; operand dtypes, stride classes and the schedule are added to it. ndim: dimensions, 1 or more,
    coalesced by the caller. fn takes the inputs as compute-dtype nodes (Complex for complex dtypes), then the scalars; it gives one
    value per output, cast on the store. It is called several times. scalars: types ("f32", "i32", ...). buffers: further (name, dtype,
    mode) buffers, passed to fn as Buffer after the scalars, to be loaded at any index (OpenCL: with a vector of indices too).
    context: fn takes a Context first. Each operand has fewer than 2**31 elements in reach. Inputs may be the same tensor as an output only
    element by element.

        pointwise(t, "add_alpha", [Operand("out", "f32", ("1", "s"))], [Operand("x", "f32", ("s", "1")), Operand("y", "f16", ("1", "0"))],
                  lambda x, y, alpha: x + alpha * y, 2, scalars=["f32"])
    """
    return _Pointwise(target, name, outs, ins, fn, ndim, scalars, buffers, context, lanes).nest
