"""Inductor's scheduling for spiral: its fused groups become Programs, and those kernels of our own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch

from ..kernels import ir, nest
from ..kernels.kernel import Target, Unsupported, compute_dtype
from ..kernels.nest.operands import cdiv, lanes_for
from . import compat, indices
from .compat import V
from .loops import Built, Program, Store, build, columns_beside
from .ops import TORCH, Overrides, Value, dtype_name, index_node, node

# Elements that one workgroup reads several times in no more than several launches take, of columns; of a row, which is cut well, half
# (H200).
READ_AGAIN = 1 << 16
MIN_RUN = 16  # neighbours for which a dimension of their own pays


class _Variables(compat.CSE):
    """Values need no text: equal expressions are one node already."""

    def generate(self, buffer: Any, expr: Any, *, bounds: Any = None, write: bool = True, assignment: bool = True,
                 dtype: torch.dtype | None = None, shape: Any = None) -> Any:  # fmt: skip
        if isinstance(expr, compat.OpsValue):
            expr = expr.value
        if isinstance(expr, Value):
            if bounds is not None:
                expr.bounds = expr.bounds.tighten(bounds)
            return expr
        n = node(expr)
        if dtype is not None:
            name = dtype_name(dtype)
            n = ir.cast(n, compute_dtype(name))
            if name in ("i8", "i16", "u8", "u16") and n.op not in ("load", "where", "const"):
                n = ir.round_to(n, name)
        var = Value(
            f"{self.name_prefix}{next(self.iter_buffer_ids)}",
            bounds or compat.ValueRanges.unknown(),
            dtype or TORCH[n.dtype],
            shape,
        )
        var.node = n
        return var

    def newvar(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("spiral's compiler has no variables without an expression")


class FusedKernel(compat.SIMDKernel):
    """One fused group. Loads, reductions and stores are collected; codegen_kernel builds the kernel from them."""

    overrides = Overrides
    kexpr = staticmethod(str)
    sexpr = staticmethod(str)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cse: Any = _Variables(self.newvar_prefix, self.suffix)
        self.indirect: dict[sympy.Symbol, ir.Node] = {}
        self.checked: list[
            tuple[sympy.Expr, sympy.Symbol]
        ] = []  # index expressions that were checked, and their values
        self.recorded: list[tuple[str, sympy.Expr, ir.Node, str | None, bool]] = []
        self.loaded: list[tuple[str, sympy.Expr]] = []
        self.sites: list[str] = []
        self.sizes_used: dict[sympy.Symbol, None] = {}
        self.mask: ir.Node | None = None
        self.mask_other: Any = 0

    # ---- what Inductor asks of a kernel ------------------------------------------------------------------------------

    def should_use_persistent_reduction(self) -> bool:
        return True  # no loop is opened and closed here: levels of the expressions tell the loops

    def codegen_iteration_ranges_entry(self, entry: Any) -> None:
        pass

    def codegen_body(self) -> None:
        pass

    @property
    def index_dtype(self) -> str:
        return "tl.int32"  # in the words of Inductor's dtype propagation

    def range_symbols(self) -> Any:
        return self.range_tree_nodes

    def symbol_node(self, s: sympy.Symbol) -> ir.Node:
        """A symbol of an index expression: a coordinate, a loaded index or a size."""
        if s in self.range_tree_nodes:
            return ir.Node("leaf", "i32", attr=str(s))
        if s in self.indirect:
            return self.indirect[s]
        if compat.symbol_is_type(s, (compat.SymT.FLOAT, compat.SymT.UNBACKED_FLOAT)):
            raise NotImplementedError("spiral's compiler has no floating symbols")
        self.sizes_used[s] = None
        return ir.Node("leaf", "i32", attr=str(s))

    @contextlib.contextmanager
    def mask_nodes(self, mask: ir.Node, other: Any) -> Iterator[ir.Node]:
        prior = self.mask, self.mask_other
        self.mask = mask if self.mask is None else ir.and_(self.mask, mask)
        self.mask_other = other
        try:
            yield self.mask
        finally:
            self.mask, self.mask_other = prior

    def load(self, name: str, index: sympy.Expr) -> Any:
        self.args.input(name)
        index = self._with_checks(self.prepare_indexing(index))
        dtype = V.graph.get_dtype(name)
        compute = compute_dtype(dtype_name(dtype))
        self.loaded.append((name, index))
        args = [index_node(index)]
        if self.mask is not None:
            # What is not loaded may be anything: ops.masked replaces it.
            args += [self.mask, ir.const(0, compute)]
        n = ir.Node("load", compute, *args, attr=name)
        shown = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        return self.cse.generate(self.loads, n, dtype=shown, shape=())

    def indirect_load(self, name: str, index: sympy.Expr) -> Any:
        return self.load(name, index)

    def store(self, name: str, index: sympy.Expr, value: Any, mode: Any = None) -> None:
        if mode not in (None, "atomic_add"):
            raise NotImplementedError(f"spiral's compiler has no store mode {mode}")
        self.args.output(name)
        index = self._with_checks(self.prepare_indexing(index))
        self.recorded.append((name, index, node(value), "add" if mode else None, self.inside_reduction))

    def store_reduction(self, name: str, index: sympy.Expr, value: Any) -> None:
        prior, self.inside_reduction = self.inside_reduction, False
        try:
            self.store(name, index, value)
        finally:
            self.inside_reduction = prior

    def check_bounds(self, expr: sympy.Expr, size: sympy.Expr, lower: bool, upper: bool) -> None:
        if not (lower or upper):
            return
        text = f"index {{}} is out of bounds for dimension with size {size}"
        if text not in self.sites:
            self.sites.append(text)
        length = index_node(size)
        whole = expr in self.indirect
        index = self.indirect[expr] if whole else index_node(expr := self.prepare_indexing(expr))
        given = _before_wrapping(index) if whole else None  # what the program gave is what the error names
        index = index if given is None else given
        args = [index, ir.cast(length, index.dtype)]
        if self.mask is not None:
            args.append(self.mask)
        checked = ir.Node("check", "i32", *args, attr=(self.sites.index(text), given is not None))
        if given is not None:
            checked = ir.where(ir.lt(checked, 0), checked + length, checked)
        if whole:
            self.indirect[expr] = checked
        else:
            symbol = sympy.Symbol(f"checked{len(self.checked)}", integer=True)
            self.indirect[symbol] = checked
            self.checked.append((expr, symbol))

    def _with_checks(self, index: sympy.Expr) -> sympy.Expr:
        """index with the expressions that were checked replaced by their checked values."""
        for expr, symbol in self.checked:
            loaded = [s for s in expr.free_symbols if s in self.indirect]
            if not all(s in index.free_symbols for s in loaded):
                continue
            for scale in {sympy.Integer(1), *(index.coeff(s) / expr.coeff(s) for s in loaded if expr.coeff(s) != 0)}:
                rest = sympy.expand(index - scale * expr)
                if not any(s in rest.free_symbols for s in loaded):
                    index = rest + scale * symbol
                    break
            else:
                raise NotImplementedError(f"spiral's compiler cannot check the index {expr} in {index}")
        return index

    def reduction(self, dtype: torch.dtype, src_dtype: torch.dtype, reduction_type: str, value: Any) -> Any:
        assert self.inside_reduction and self.mask is None
        key = (src_dtype, reduction_type, value)
        if key not in self.cse.reduction_cache:
            out = self._reduce(
                dtype, reduction_type, [node(v) for v in (value if isinstance(value, tuple) else (value,))]
            )
            wrap = [self.cse.generate(self.compute, n, dtype=d, shape=()) for n, d in out]
            self.cse.reduction_cache[key] = wrap[0] if len(wrap) == 1 else tuple(wrap)
        return self.cse.reduction_cache[key]

    def _reduce(self, dtype: torch.dtype, kind: str, x: list[ir.Node]) -> list[tuple[ir.Node, torch.dtype]]:
        def red(monoid: nest.Monoid, *element: Any) -> list[ir.Node]:
            args = tuple(ir.cast(e, t) for e, t in zip(element, monoid.dtypes, strict=True))
            return [ir.Node("red", t, *args, attr=(monoid, i)) for i, t in enumerate(monoid.dtypes)]

        name = dtype_name(dtype)
        compute = compute_dtype(name)
        shown = torch.float32 if name in ("f16", "bf16") else dtype
        v = x[0]
        if kind in ("sum", "prod"):
            return [(red((nest.SUM if kind == "sum" else nest.PROD)(compute), v)[0], shown)]
        if kind in ("max", "min"):
            if v.dtype == "bool":
                return [(red(nest.ANY if kind == "max" else nest.ALL, v)[0], torch.bool)]
            return [(red((nest.MAX if kind == "max" else nest.MIN)(v.dtype), v)[0], shown)]
        if kind in ("argmax", "argmin"):
            v = ir.cast(v, "i32") if v.dtype == "bool" else v
            monoid = (nest.ARGMAX if kind == "argmax" else nest.ARGMIN)(v.dtype)
            return [(red(monoid, v, ir.Node("leaf", "i32", attr="position"))[1], torch.int64)]
        if kind == "any":
            return [(red(nest.ANY, v)[0], torch.bool)]
        if kind == "xor_sum":
            monoid = nest.Monoid("xor", (compute,), (0,), lambda a, b: (ir.xor(a[0], b[0]),))
            return [(red(monoid, v)[0], dtype)]
        if kind == "welford_reduce":
            # Two passes over a row that is in the cache cost less than a division per element.
            count = ir.cast(self._reduced_count(), compute)
            mean = red(nest.SUM(compute), v)[0] / count
            d = v - mean
            return [(n, shown) for n in (mean, red(nest.SUM(compute), d * d)[0], count)]
        if kind == "welford_combine":
            return [(n, shown) for n in red(nest.WELFORD(compute), *x)]
        if kind == "online_softmax_reduce":
            top = red(nest.MAX(v.dtype), v)[0]
            return [(top, shown), (red(nest.SUM(v.dtype), ir.exp(v - top))[0], shown)]
        raise NotImplementedError(f"spiral's compiler has no reduction {kind}")

    def _reduced_count(self) -> ir.Node:
        total: Any = sympy.Integer(1)
        for t in self.range_trees:
            if t.is_reduction:
                total = total * t.numel
        return index_node(total)

    # ---- the kernel ---------------------------------------------------------------------------------------------------

    def codegen_kernel(self, name: str | None = None) -> str:
        """Builds the kernel; its text stands for it in the wrapper's table of equal kernels."""
        self.built, self.launch = self._build()
        return f"{self.built!r}{self.sites!r}"

    def _build(self) -> tuple[Built, dict[str, Any]]:
        stores = [s for s in self.recorded if s[0] not in V.graph.removed_buffers and s[0] not in self.removed_buffers]
        nodes = ir.walk(*[n for _, index, value, _, _ in stores for n in (index_node(index), value)])
        used = {n.attr for n in nodes if n.op == "leaf"}
        reads = {n.attr for n in nodes if n.op == "load"}
        coordinates: dict[str, ir.Node] = {}
        sizes: dict[bool, list[sympy.Expr]] = {False: [], True: []}
        for tree in self.range_trees:
            found = [e for e in tree.nodes.values() if str(e.symbol()) in used]
            dims, entries = _dimensions(tree, found, self._runs(found))
            prefix, first = ("r", len(sizes[True])) if tree.is_reduction else ("x", len(sizes[False]))
            leaves = [ir.Node("leaf", "i32", attr=f"{prefix}{first + i}") for i in range(len(dims))]
            for symbol, make in entries.items():
                coordinates[symbol] = make(leaves)
            sizes[tree.is_reduction] += dims
        if not self.features.is_reduction():
            sizes[True] = []
        memo: dict[ir.Node, Any] = {}

        def place(n: ir.Node) -> Any:
            return coordinates.get(n.attr) if n.op == "leaf" else None

        # A buffer that is read and written travels once: its name in the kernel is that of what it really is.
        real = V.graph.scheduler.mutation_real_name if V.graph.scheduler else {}
        names: dict[str, str] = {}
        modes: dict[str, str] = {}
        for s in stores:
            outer = real.get(s[0], s[0])
            names.setdefault(outer, f"b{len(names)}")
            modes[outer] = "a" if s[3] else "rw" if modes.get(outer) != "a" else "a"
        for read in sorted(reads):
            outer = real.get(read, read)
            names.setdefault(outer, f"b{len(names)}")
            modes.setdefault(outer, "r")

        def rename(n: ir.Node) -> Any:
            if n.op != "load":
                return place(n)
            args = [ir.substitute(a, rename, memo) for a in n.args]
            return ir.Node("load", n.dtype, *args, attr=names[real.get(n.attr, n.attr)])

        ranges = {
            ir.Node("leaf", "i32", attr=f"{prefix}{d}"): (0, int(size) - 1)
            for reduced, prefix in ((False, "x"), (True, "r"))
            for d, size in enumerate(sizes[reduced])
            if size.is_Integer
        }
        lowered: dict[ir.Node, Any] = {}

        def final(n: ir.Node) -> ir.Node:
            return indices.lower(ir.substitute(n, rename, memo), ranges, lowered)

        program_stores = [
            Store(
                names[real.get(name, name)], final(index_node(index)), final(value), mode, element and bool(sizes[True])
            )
            for name, index, value, mode, element in stores
        ]
        numbers = {reduced: [indices.lower(index_node(s), {}, {}) for s in sizes[reduced]] for reduced in sizes}
        everything = ir.walk(*[n for s in program_stores for n in (s.index, s.value)], *numbers[False], *numbers[True])
        symbols = [s for s in self.sizes_used if any(n.op == "leaf" and n.attr == str(s) for n in everything)]
        program = Program(
            name="fused",
            buffers=[(inner, dtype_name(V.graph.get_dtype(outer)), modes[outer]) for outer, inner in names.items()],
            scalars=[(str(s), "i32") for s in symbols],
            rows=numbers[False],
            reduced=numbers[True],
            stores=program_stores,
            along_rows=self._along_rows(sizes),
            sites=len(self.sites),
        )
        self.program = program
        built = build(program, Target.of(V.graph.get_current_device_or_throw().index))
        launch = {
            "buffers": list(names), "written": [b for b, m in modes.items() if m != "r"], "symbols": symbols,
            "rows": sizes[False], "reduced": sizes[True],
        }  # fmt: skip
        return built, launch

    def _runs(self, entries: Sequence[Any]) -> list[sympy.Expr]:
        """Lengths d of a range's runs where something is read at (x + c) // d or (x + c) % d, d dividing c; of runs that are long
        enough for vectors, on CPU devices."""
        if Target.of(V.graph.get_current_device_or_throw().index).schedule_class != "vector":
            return []
        divisors = {e.symbol(): e.divisor for e in entries}
        runs = []
        for index in [*(i for _, i in self.loaded), *(s[1] for s in self.recorded)]:
            for e in index.atoms(compat.FloorDiv, compat.ModularIndexing):
                x, *lengths = e.args
                offset, rest = x.replace(compat.Identity, lambda e: e).as_coeff_Add()
                cuts = [sympy.Mul(*lengths[: i + 1]) for i in range(len(lengths))] if rest in divisors else []
                runs += [divisors[rest] * d for d in cuts if d.is_Integer and d >= MIN_RUN and offset % d == 0]
        return runs

    def _along_rows(self, sizes: dict[bool, list[sympy.Expr]]) -> bool:
        """Whether more accesses are contiguous along the rows than along the reduced dimension."""
        if not sizes[True]:
            return False
        votes = 0
        for index in [*(i for _, i in self.loaded), *(s[1] for s in self.recorded if s[4])]:
            steps = {reduced: self._step(index, reduced) for reduced in (False, True)}
            if steps[True] != 0:
                votes += (steps[True] == 1) - (steps[False] == 1)
        return votes < 0

    def _step(self, index: sympy.Expr, reduced: bool) -> sympy.Expr:
        """How much an index grows from the first row, or reduced element, to the second."""
        index = index.replace(compat.Identity, lambda e: e)
        first = dict.fromkeys(self.range_tree_nodes, 0)
        second = {s: int(e.divisor == 1 and e.root.is_reduction == reduced) for s, e in self.range_tree_nodes.items()}
        return sympy.expand(index.subs(second) - index.subs(first))

    def call_kernel(self, name: str, node: Any = None, deallocate_ws: bool = True) -> None:
        wrapper = V.graph.wrapper_code
        launch = self.launch
        for s in {f for e in (*launch["rows"], *launch["reduced"], *launch["symbols"]) for f in e.free_symbols}:
            wrapper.ensure_size_computed(s)

        def tuple_of(xs: Sequence[str]) -> str:
            return "(" + "".join(f"{x}, " for x in xs) + ")"

        sizes = [tuple_of([wrapper.codegen_sizevar(s) for s in launch[key]]) for key in ("symbols", "rows", "reduced")]
        wrapper.writeline(f"{name}({tuple_of(launch['buffers'])}, {', '.join(sizes)})")


def _before_wrapping(index: ir.Node) -> ir.Node | None:
    """x, where index is where(x < 0, x + size, x), in 64 bits or in 32; else None."""
    index = index.args[0] if index.op == "cast" else index
    if index.op != "where" or index.args[0].op != "lt" or index.args[1].op != "add":
        return None
    (negative, zero), x = index.args[0].args, index.args[2]
    return x if negative is x and index.args[1].args[0] is x and (zero.op, zero.attr) == ("const", 0) else None


def _dimensions(
    tree: Any, entries: Sequence[Any], runs: Sequence[sympy.Expr] = ()
) -> tuple[list[sympy.Expr], dict[str, Any]]:
    """Dimensions of a range that make every entry (x // divisor) % length affine in them, fastest first; one dimension
    where there are none. Also, per entry, how it is made of the dimensions' coordinates. runs: lengths at which to cut the range
    as well, where that can be had."""
    numel = V.graph.sizevars.simplify(tree.numel)
    if compat.equal(numel, 1):
        return [], {str(e.symbol()): lambda leaves: ir.const(0, "i32") for e in entries}
    marks: list[sympy.Expr] = []
    for m in [sympy.Integer(1), numel, *(m for e in entries for m in (e.divisor, e.divisor * e.length)), *runs]:
        m = V.graph.sizevars.simplify(m)
        if not any(compat.equal(m, o) for o in marks):
            marks.append(m)
    marks.sort(key=compat.hint)
    chain = all(compat.multiple_of(b, a) for a, b in itertools.pairwise(marks)) and compat.equal(marks[-1], numel)
    if not chain and runs:
        return _dimensions(tree, entries)
    if not chain:

        def general(entry: Any) -> Any:
            def make(leaves: Sequence[ir.Node]) -> ir.Node:
                q = leaves[0] if entry.divisor == 1 else ir.idiv(leaves[0], index_node(entry.divisor))
                if compat.equal(entry.divisor * entry.length, numel):
                    return q
                return ir.irem(q, index_node(entry.length))

            return make

        return [numel], {str(e.symbol()): general(e) for e in entries}
    dims = [V.graph.sizevars.simplify(compat.FloorDiv(b, a)) for a, b in itertools.pairwise(marks)]

    def affine(entry: Any) -> Any:
        def make(leaves: Sequence[ir.Node]) -> ir.Node:
            out: Any = ir.const(0, "i32")
            scale: Any = sympy.Integer(1)
            inside = False
            for mark, dim, leaf in zip(marks, dims, leaves, strict=False):
                if compat.equal(mark, entry.divisor):
                    inside = True
                elif compat.equal(mark, entry.divisor * entry.length):
                    break
                if inside:
                    out = out + leaf * index_node(scale)
                    scale = scale * dim
            return out

        return make

    return dims, {str(e.symbol()): affine(e) for e in entries}


def pieces(device: torch.device, reduced: int, results: int, inner: bool, again: bool) -> int:
    """Into how many partial reductions one of `reduced` elements is cut where `results` of them leave units of the device idle;
    a divisor of `reduced` where there is one of about that size, so that no piece needs a mask. inner: along the fast dimension.
    again: what is reduced is read once more with the results, as by a softmax, which is one kernel instead of five."""
    target = Target.of(device.index)
    vector = target.schedule_class == "vector"
    beside = 1 if inner else lanes_for(["f32"]) if vector else max(columns_beside(target, results, results), 1)
    most = READ_AGAIN // 2 if inner else READ_AGAIN
    if again and (reduced * min(beside, results) <= most or cdiv(results, beside) >= target.compute_units):
        return 1
    if vector:
        tasks, busy, least = results if inner else results // 1024, 4 * target.compute_units, nest.TASK_ELEMENTS
    else:
        tasks, busy, least = results if inner else results // 64, 8 * target.compute_units, 4096
    # A row that one workgroup reads in a few steps is not worth two kernels.
    wanted = min(busy // max(tasks, 1), reduced * results // least, reduced // (4096 if inner and not vector else 32))
    if wanted < 2:
        return 1
    return next((n for n in range(wanted, 2 * wanted) if reduced % n == 0), wanted)


def summary(origins: str) -> str:
    """The nodes of a graph that a kernel stands for, in a line."""
    return origins.split("\n")[0].removeprefix("# Topologically Sorted ").strip("# ")


class Scheduling(compat.SIMDScheduling):
    """Fusion as for other SIMD devices; one range for the rows, which the kernel cuts into dimensions itself."""

    kernel_type = FusedKernel

    @classmethod
    def get_backend_features(cls, device: torch.device) -> Any:
        return compat.OrderedSet()

    @classmethod
    def get_tiling_and_scores(
        cls, node_schedule: Any, numel: Any, reduction_numel: Any = sympy.S.One, *args: Any, **kwargs: Any
    ) -> Any:
        return cls.create_tiling([numel], [reduction_numel]), None

    @classmethod
    def select_tiling(
        cls, node_schedule: Any, numel: Any, reduction_numel: Any = sympy.S.One, *args: Any, **kwargs: Any
    ) -> Any:
        return cls.create_tiling([numel], [reduction_numel])

    def codegen_node_schedule(self, kernel_features: Any) -> Any:
        try:
            return super().codegen_node_schedule(kernel_features)
        except (NotImplementedError, Unsupported) as error:
            origins, _ = compat.get_kernel_metadata(kernel_features.node_schedule, V.graph.wrapper_code)
            raise type(error)(f"{error}, in {summary(origins)}") from error

    def define_kernel(self, src_code: str, node_schedule: Any, kernel: FusedKernel) -> str:
        wrapper: Any = V.graph.wrapper_code

        def origins() -> str:
            return compat.get_kernel_metadata(node_schedule, wrapper)[0]

        return wrapper.define(src_code, kernel.built, kernel.sites, kernel.launch, kernel.program, origins)

    def codegen_sync(self) -> None:
        pass


__all__ = ["FusedKernel", "Scheduling"]
