"""Reductions: ATen's iterator stubs over reduced dimensions, and the whole-tensor and along-a-dimension stubs.

A row is `name: (output dtypes, inputs, accumulation dtype) -> row expression`. Sums of floats accumulate in float32 (float64 in
float64), integers in the output's dtype. Long rows that are too few for the device are reduced in two launches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .. import autotune
from ..kernels import ir, nest
from ..kernels.builder import KernelBuilder
from ..kernels.kernel import DTYPES, Target, compute_dtype
from ..kernels.nest import Monoid
from ..kernels.nest.columns import for_columns, for_rows
from ..lowering import (
    Iter,
    Tensor,
    bucket,
    build,
    cdiv,
    check,
    composite,
    empty,
    eq,
    hint,
    is_one,
    is_zero,
    launch,
    lowering,
    maximum,
    minimum,
    product,
    stub,
    target,
    where,
)
from .elementwise import as_dtype, stride_classes
from .items import Item, each

SHORT_ROW = 4  # floor(log2) of rows so short that they go side by side
LONG_ROW = 12  # of rows worth splitting, where there are few of them


# ---- rows over strided tensors ---------------------------------------------------------------------------------------


def reduce_rows(
    name: str,
    function: Callable[..., Any],
    outs: Sequence[tuple[Tensor, Sequence[Any]]],
    ins: Sequence[tuple[Tensor, Sequence[Any]]],
    sizes: Sequence[Any],
    reduced: int,
    key: tuple = (),
    values: Sequence[Any] = (),
    types: Sequence[str] = (),
    splits: bool = True,
    enabled: Any = None,
    length: int | None = None,
    count: int | None = None,
) -> None:
    """outs = function(r, *ins, *values) of every row.

    outs, ins: (tensor, strides per dimension); sizes: the `reduced` dimensions first, then those of the rows, fastest first.
    function(key) is called with the static `key` first, and must be one of the module's; `name` says what it computes. splits:
    it has one reduction and stores per row only, so a long row may be cut. enabled: a Sym, 0 on calls that skip the launch.
    length, count: floor(log2) of a row's elements and of the number of rows, where sizes do not tell."""
    sizes = list(sizes)
    out_strides = [list(s) for _, s in outs]
    in_strides = [list(s) for _, s in ins]
    if reduced == 0:
        sizes.insert(0, 1)
        for s in (*out_strides, *in_strides):
            s.insert(0, 0)
        reduced = 1
    # Lanes go along the first dimension of rows: one of a single row, whose stride is none, must not be it.
    kept = [d for d, n in enumerate(sizes) if d < reduced or not is_one(n)]
    sizes = [sizes[d] for d in kept]
    out_strides, in_strides = ([[s[d] for d in kept] for s in strides] for strides in (out_strides, in_strides))
    t = target()
    length = sum(bucket(s) for s in sizes[:reduced]) if length is None else length
    count = sum(bucket(s) for s in sizes[reduced:]) if count is None else count
    per_row = all(is_zero(s) for strides in out_strides for s in strides[:reduced])
    vector = t.schedule_class == "vector"
    schedule = None
    if len(sizes) > reduced and length <= SHORT_ROW and count >= 4:
        schedule = "lanes_r" if vector else "invocation"
    columns = (
        vector and splits and per_row and reduced == 1 and len(sizes) == 2 and length > SHORT_ROW and count > SHORT_ROW
    )
    if columns and is_one(in_strides[0][1]) and not is_one(in_strides[0][0]):
        _reduce_columns(name, function, outs, ins, sizes, key, values, types, enabled)
        return
    few = count <= (2 if vector else 8)
    pieces = 256 >> min(count, 8)  # of a row that is cut, on a GPU
    gpu = t.schedule_class == "block" or (not vector and not t.software)
    if gpu:
        # About 1024 workgroups in all; where rows lie side by side, one takes 128 of them.
        side_by_side = len(sizes) > reduced and is_one(in_strides[0][reduced]) and not is_one(in_strides[0][0])
        pieces = 1 << max((17 if side_by_side else 10) - count, 0)
        few = pieces > 1
    enough = 8 if gpu else LONG_ROW
    cuttable = splits and per_row and (reduced == 1 or bucket(sizes[reduced - 1]) >= 5)
    cut = cuttable and few and length >= enough
    layout = (
        tuple((x.dtype, stride_classes(s), x.windows) for (x, _), s in zip(outs, out_strides)),
        tuple((x.dtype, stride_classes(s), x.windows) for (x, _), s in zip(ins, in_strides)),
    )
    pieces = (4 * t.compute_units if vector else pieces) if cut else 1
    if enabled is None and length + count >= 16:  # below a millisecond's fraction nothing is worth a search
        operands = "|".join(d + "".join(c) for part in layout for d, c, _ in part)
        picked: nest.RowSchedule = autotune.choose(
            "rows", f"{name} {operands} r{reduced} l{length} c{count}", nest.RowSchedule(schedule or "auto", pieces),
            lambda: nest.row_candidates(t, length, count, cuttable), [hint(n) for n in sizes],
        )  # fmt: skip
        schedule, pieces = None if picked.kind == "auto" else picked.kind, picked.pieces
        cut = pieces > 1
    built = build(_kernel, name, function, tuple(key), *layout, reduced, len(sizes), tuple(types), schedule, cut)

    def when(grid: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(grid) if enabled is None else (where(enabled, grid[0], 0), *grid[1:])

    out_tensors, in_tensors = [x for x, _ in outs], [x for x, _ in ins]
    if not cut:
        scalars = built.scalars(sizes, [*out_strides, *in_strides], values)
        launch(built.kernel, [*out_tensors, *in_tensors], scalars, when(built.groups(sizes)))
        return
    n_splits = minimum(sizes[reduced - 1], pieces)
    rows = product(sizes[reduced:])
    partials = [empty([rows * n_splits], dtype) for dtype in built.partial_dtypes]
    first, second = built.first, built.second
    launch(
        first.kernel,
        [*partials, *in_tensors],
        first.scalars(sizes, in_strides, values, n_splits),
        when(first.groups(sizes, n_splits)),
    )
    shape, strides = built.second_shape(sizes, n_splits, [s[reduced:] for s in out_strides])
    launch(
        second.kernel,
        [*out_tensors, *partials],
        second.scalars(shape, strides, [product(sizes[:reduced]), *values]),
        when(second.groups(shape)),
    )


COLUMN_BLOCK = 2048  # columns whose running totals stay in the first-level cache
ROW_BLOCK = 512  # rows that are added one after the other at most


def _reduce_columns(
    name: str,
    function: Callable[..., Any],
    outs: Sequence[Any],
    ins: Sequence[Any],
    sizes: Sequence[Any],
    key: tuple,
    values: Sequence[Any],
    types: Sequence[str],
    enabled: Any,
) -> None:
    """Reductions over the slow dimension on CPU devices: blocks of rows are read in order, four at a time, into running totals of
    every column; then the blocks' totals are combined."""
    m, n = sizes
    layout = [tuple((x.dtype, stride_classes(s)) for x, s in tensors) for tensors in (outs, ins)]
    first, second, dtypes = build(_column_kernels, name, function, tuple(key), *layout, tuple(types))
    rows = maximum(minimum(cdiv(m, 2 * target().compute_units), ROW_BLOCK), 4)
    splits = cdiv(m, rows)
    partials = [empty([splits, n], dtype) for dtype in dtypes]
    strides = [s for (_, given), (_, classes) in zip(ins, layout[1]) for s, c in zip(given, classes) if c == "s"]
    wide = [v for v, t in zip(values, types) if t in ("i64", "f64")]
    narrow = [v for v, t in zip(values, types) if t not in ("i64", "f64")]
    blocks = cdiv(n, COLUMN_BLOCK)
    on = (lambda g: g) if enabled is None else (lambda g: where(enabled, g, 0))
    launch(first, [*partials, *(x for x, _ in ins)], [*wide, m, n, rows, *strides, *narrow], (on(splits), blocks, 1))
    shape, partial = [splits, n], (n, 1)
    out_strides = [(0, s[1]) for _, s in outs]
    scalars = second.scalars(shape, [*out_strides, *[partial] * len(dtypes)], [m, *values])
    grid = second.groups(shape)
    launch(second.kernel, [*(x for x, _ in outs), *partials], scalars, (on(grid[0]), *grid[1:]))


def _column_kernels(
    target: Target, name: str, function: Callable[..., Any], key: tuple, outs: tuple, ins: tuple, types: tuple
) -> Any:
    """(the kernel of blocks' totals, the nest that combines them, the dtypes of totals)."""
    in_operands = [nest.Operand(f"in{i}", d, layout) for i, (d, layout) in enumerate(ins)]
    label = re.sub(r"\W+", "", "_".join([name, *(str(x) for x in key), *types]))

    def expression(r: Any, *args: Any) -> list[Any]:
        result = function(*key, r, *args)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        return [as_dtype(v, d) for v, (d, _) in zip(results, outs)]

    k = KernelBuilder(target, f"{label}_columns_" + "_".join(o.key for o in in_operands))
    monoid = nest.split_monoid(expression, in_operands, len(types), types)
    dtypes = tuple("i32" if t == "bool" else t for t in monoid.dtypes)
    totals = [k.buffer(f"total{i}", t, "rw") for i, t in enumerate(dtypes)]
    buffers = {o.name: k.buffer(o.name, o.dtype) for o in in_operands}
    m, n, per = (k.scalar(s, "u32") for s in ("rows", "columns", "rows_per_block"))
    strides = {
        o.name: [k.scalar(f"{o.name}_stride{d}", "i32") if c == "s" else None for d, c in enumerate(o.strides)]
        for o in in_operands
    }
    values = [k.scalar(f"value{i}", t) for i, t in enumerate(types)]
    results = expression(nest.RowContext(m), *[ir.leaf(o.name, o.dtype) for o in in_operands], *values)
    element = next(node for node in ir.walk(*_parts(results)) if node.op == "red").args
    lanes = 8 if any(DTYPES[d].size >= 8 for d in (*dtypes, *(d for d, _ in ins))) else 16

    def value(row: Any, column: Any) -> list[Any]:
        loaded: dict[str, Any] = {}

        def leaf(node: Any) -> Any:
            if node.op != "leaf":
                return None
            base = node.attr.removesuffix(".re").removesuffix(".im")
            if base not in buffers:
                return ir.cast(row, "i32")
            if base not in loaded:
                index: Any = ir.const(0, "i32")
                operand = next(o for o in in_operands if o.name == base)
                for at, c, stride in zip((row, column), operand.strides, strides[base]):
                    if c != "0":
                        index = index + (at if c == "1" else at * stride)
                loaded[base] = buffers[base].load(index)
            v = loaded[base]
            return v if not isinstance(v, ir.Complex) else v.re if node.attr.endswith(".re") else v.im

        memo: dict[Any, Any] = {}
        return [ir.substitute(e, leaf, memo) for e in element]

    split = k.workgroup_id(0)
    start = k.let(ir.cast(split * per, "i32"))
    stop = k.let(ir.cast(ir.minimum(split * per + per, m), "i32"))
    left = k.let(ir.cast(k.workgroup_id(1) * COLUMN_BLOCK, "i32"))
    right = k.let(ir.minimum(left + COLUMN_BLOCK, ir.cast(n, "i32")))
    base = k.let(ir.cast(split * n, "i32"))

    def clear(at: Any) -> None:
        for b, v, t in zip(totals, monoid.init, monoid.dtypes):
            b.store(base + at, ir.const(v, t))

    def add(rows: Sequence[Any], at: Any) -> None:
        acc = tuple(ir.cast(b.load(base + at), t) for b, t in zip(totals, monoid.dtypes))
        for row in rows:
            acc = tuple(k.let(v) for v in monoid.combine(acc, tuple(value(row, at))))
        for b, v in zip(totals, acc):
            b.store(base + at, v)

    for_columns(k, left, right, lanes, clear)
    for_rows(k, start, stop, left, right, lanes, add)

    def combine(r: Any, *args: Any) -> Any:
        parts, count, rest = args[: len(dtypes)], args[len(dtypes)], args[len(dtypes) + 1 :]
        results = expression(nest.RowContext(count), *[ir.leaf(o.name, o.dtype) for o in in_operands], *rest)
        total = r.reduce(monoid, *parts)
        total = total if isinstance(total, tuple) else (total,)
        return tuple(ir.substitute(v, lambda node: total[node.attr[1]] if node.op == "red" else None) for v in results)

    second = nest.rows(
        target,
        label + "_of_columns",
        [nest.Operand(f"out{i}", d, ("0", layout[1])) for i, (d, layout) in enumerate(outs)],
        [nest.Operand(f"part{i}", d, ("s", "1")) for i, d in enumerate(dtypes)],
        combine,
        reduced=1,
        ndim=2,
        scalars=["u32", *types],
    )
    return k.finish((1, 1, 1)), second, dtypes


def _parts(results: Sequence[Any]) -> list[Any]:
    return [p for r in results for p in ((r.re, r.im) if isinstance(r, ir.Complex) else (r,))]


def _kernel(
    target: Target,
    name: str,
    function: Callable[..., Any],
    key: tuple,
    outs: tuple,
    ins: tuple,
    reduced: int,
    ndim: int,
    types: tuple,
    schedule: str | None,
    cut: bool,
) -> Any:
    def expression(r: Any, *args: Any) -> Any:
        result = function(*key, r, *args)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        results = [as_dtype(v, d) for v, (d, *_) in zip(results, outs)]
        return results[0] if len(results) == 1 else tuple(results)

    label = re.sub(r"\W+", "", "_".join([name, *(str(x) for x in key), *types]))
    make: Any = nest.split_rows if cut else nest.rows
    return make(
        target,
        label,
        [nest.Operand(f"out{i}", *o) for i, o in enumerate(outs)],
        [nest.Operand(f"in{i}", *o) for i, o in enumerate(ins)],
        expression,
        reduced=reduced,
        ndim=ndim,
        scalars=types,
        schedule=schedule,
    )


def reduce_iterator(
    name: str,
    it: Iter,
    function: Callable[..., Any],
    key: tuple,
    values: Sequence[Any] = (),
    types: Sequence[str] = (),
    splits: bool = True,
    enabled: Any = None,
) -> None:
    """A reduction as ATen describes it: the output's strides are 0 along reduced dimensions, which come first."""
    shape: Sequence[Any] = it.shape or (1,)

    def operand(o: Any) -> tuple[Tensor, Sequence[Any]]:
        return o.tensor, o.strides if it.ndim else (0,)

    outs, ins = [operand(o) for o in it.outputs], [operand(o) for o in it.inputs]
    reduced = 0
    while reduced < len(shape) and is_zero(outs[0][1][reduced]):
        reduced += 1
    reduce_rows(name, function, outs, ins, shape, reduced, key, values, types, splits, enabled)


def accumulator(dtype: str) -> str:
    """The compute dtype that sums of results of `dtype` accumulate in."""
    return compute_dtype(dtype)


# ---- what is reduced -------------------------------------------------------------------------------------------------


def truth(x: Any) -> Any:
    """x != 0; NaN is true."""
    if isinstance(x, ir.Complex):
        return ir.or_(truth(x.re), truth(x.im))
    return x if x.dtype == "bool" else ir.ne(x, 0)


def _complex_sum(part: str) -> Monoid:
    return Monoid("csum", (part, part), (0, 0), lambda a, b: (a[0] + b[0], a[1] + b[1]), blocked=True)


def _complex_prod(part: str) -> Monoid:
    return Monoid(
        "cprod", (part, part), (1, 0), lambda a, b: (a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]), blocked=True
    )


def add_up(r: Any, x: Any, dtype: str) -> Any:
    """The sum of x over the row, in the compute dtype of `dtype`."""
    x = as_dtype(x, dtype)
    if isinstance(x, ir.Complex):
        return ir.Complex(*r.reduce(_complex_sum(x.dtype), x.re, x.im))
    return r.reduce(nest.ANY, x) if x.dtype == "bool" else r.sum(x)


def _sum(dtype: str, r: Any, x: Any) -> Any:
    return add_up(r, x, dtype)


def _nansum(dtype: str, r: Any, x: Any) -> Any:
    if isinstance(x, ir.Complex):
        nan = ir.isnan(x)
        return add_up(r, ir.Complex(ir.where(nan, 0.0, x.re), ir.where(nan, 0.0, x.im)), dtype)
    return add_up(r, ir.where(ir.isnan(x), ir.const(0, x.dtype), x), dtype)


def _mean(dtype: str, r: Any, x: Any) -> Any:
    total = add_up(r, x, dtype)
    n = ir.cast(r.count, total.dtype)
    return ir.Complex(total.re / n, total.im / n) if isinstance(total, ir.Complex) else total / n


def _prod(dtype: str, r: Any, x: Any) -> Any:
    x = as_dtype(x, dtype)
    if isinstance(x, ir.Complex):
        return ir.Complex(*r.reduce(_complex_prod(x.dtype), x.re, x.im))
    return r.reduce(nest.ALL, x) if x.dtype == "bool" else r.reduce(nest.PROD(x.dtype), x)


def _all(r: Any, x: Any) -> Any:
    return r.reduce(nest.ALL, truth(x))


def _any(r: Any, x: Any) -> Any:
    return r.reduce(nest.ANY, truth(x))


def _max(r: Any, x: Any) -> Any:
    return r.reduce(nest.MAX(x.dtype), x)


def _min(r: Any, x: Any) -> Any:
    return r.reduce(nest.MIN(x.dtype), x)


def _argmax(r: Any, x: Any) -> Any:
    return r.reduce(nest.ARGMAX(x.dtype), x, r.index)[1]


def _argmin(r: Any, x: Any) -> Any:
    return r.reduce(nest.ARGMIN(x.dtype), x, r.index)[1]


def _max_dim(r: Any, x: Any) -> Any:
    return r.reduce(nest.ARGMAX(x.dtype), x, r.index)


def _min_dim(r: Any, x: Any) -> Any:
    return r.reduce(nest.ARGMIN(x.dtype), x, r.index)


def _aminmax(r: Any, x: Any) -> Any:
    both = Monoid(
        "minmax",
        (x.dtype,) * 2,
        (nest.MIN(x.dtype).init[0], nest.MAX(x.dtype).init[0]),
        lambda a, b: (ir.minimum(a[0], b[0]), ir.maximum(a[1], b[1])),
    )
    return r.reduce(both, x, x)


def _xor_sum(r: Any, x: Any) -> Any:
    """The bits of x as 64-bit integers (floats as float64), xor-ed."""
    if x.dtype in ir.FLOATS:
        x = ir.bitcast(ir.cast(x, "f64"), "i64")
    x = ir.cast(x, "i64")
    return r.reduce(Monoid("xor", ("i64",), (0,), lambda a, b: (ir.xor(a[0], b[0]),)), x)


_function: Callable[..., Any]
for _name, _function in {"sum": _sum, "nansum": _nansum, "mean": _mean, "prod": _prod}.items():

    @stub(f"{_name}_stub", coarse=False)
    def _stub(it: Iter, _name: str = _name, _function: Any = _function) -> None:
        reduce_iterator(_name, it, _function, (it.outputs[0].dtype,))


for _name, _function in {
    "and": _all,
    "or": _any,
    "min_values": _min,
    "max_values": _max,
    "argmax": _argmax,
    "argmin": _argmin,
    "xor_sum": _xor_sum,
}.items():

    @stub(f"{_name}_stub", coarse=False)
    def _stub_of_values(it: Iter, _name: str = _name, _function: Any = _function) -> None:
        reduce_iterator(_name, it, _function, ())


# ---- variances and norms ---------------------------------------------------------------------------------------------


def _variance(dtype: str, root: bool, two: bool, welford: bool, r: Any, x: Any, correction: Any) -> Any:
    x = as_dtype(x, dtype)
    if welford:
        mean, squares, n = r.reduce(nest.WELFORD(x.dtype), x, 0.0, 1.0)
    else:
        n = ir.cast(r.count, x.dtype)
        mean = r.sum(x) / n
        squares = r.sum(ir.square(x - mean))
    n = n - ir.cast(correction, x.dtype)
    var = squares / ir.where(ir.gt(n, 0.0), n, 0.0)
    var = ir.sqrt(var) if root else var
    return (var, mean) if two else var


def variance_rows(x: Tensor, dims: Sequence[int], correction: Any, root: bool, outs: Sequence[Tensor]) -> None:
    """outs = the variance (or its root) and the mean of x over dims, which outs keep with size 1."""
    order = [*(d for d in reversed(range(x.ndim)) if d in dims), *(d for d in reversed(range(x.ndim)) if d not in dims)]
    compute = accumulator(x.dtype)
    strides = [[0 if d in dims else o.strides[d] for d in order] for o in outs]
    reduce_rows(
        "var",
        _variance,
        list(zip(outs, strides)),
        [(x, [x.strides[d] for d in order])],
        [x.sizes[d] for d in order],
        len(dims),
        (compute, root, len(outs) == 2, False),
        [correction],
        [compute],
        splits=False,
    )


@stub("std_var_stub", coarse=False)
def std_var(it: Iter, correction: Any, take_sqrt: bool) -> None:
    compute = accumulator(it.inputs[0].dtype)
    key = (compute, take_sqrt, len(it.outputs) == 2)
    # Two passes over a row are exact and cheaper than Welford's divisions, but only a single reduction can be split.
    long = sum(bucket(s) for s in it.shape) >= LONG_ROW + 4 and all(is_zero(s) for s in it.outputs[0].strides)
    reduce_iterator("var", it, _variance, (*key, long), [correction], [compute], splits=long)


def _absolute(x: Any, dtype: str) -> Any:
    if isinstance(x, ir.Complex):
        return ir.hypot(ir.cast(x.re, dtype), ir.cast(x.im, dtype))
    return ir.abs(ir.cast(x, dtype))


def _squares(dtype: str, x: Any) -> Any:
    if isinstance(x, ir.Complex):
        return ir.square(ir.cast(x.re, dtype)) + ir.square(ir.cast(x.im, dtype))
    return ir.square(ir.cast(x, dtype))


def _norm2(dtype: str, r: Any, x: Any) -> Any:
    return ir.sqrt(r.sum(_squares(dtype, x)))


def _squares_sum(dtype: str, r: Any, x: Any) -> Any:
    return r.sum(_squares(dtype, x))


def _norm_extreme(dtype: str, r: Any, x: Any, sign: Any) -> Any:
    """The largest (sign 1) or the smallest (sign -1) magnitude."""
    sign = ir.cast(sign, dtype)
    return r.reduce(nest.MAX(dtype), _absolute(x, dtype) * sign) * sign


def _powers(dtype: str, r: Any, x: Any, p: Any) -> Any:
    a = _absolute(x, dtype)
    power = ir.where(ir.eq(p, 1.0), a, ir.where(ir.eq(p, 0.0), ir.cast(ir.ne(a, 0.0), dtype), ir.pow(a, p)))
    return r.sum(power)


def _norm_power(dtype: str, r: Any, x: Any, p: Any) -> Any:
    total = _powers(dtype, r, x, p)
    return ir.where(ir.or_(ir.eq(p, 0.0), ir.eq(p, 1.0)), total, ir.pow(total, 1.0 / ir.where(ir.eq(p, 0.0), 1.0, p)))


def _norm_dtype(it: Iter) -> str:
    return "f64" if "f64" in (compute_dtype(it.outputs[0].dtype), compute_dtype(it.inputs[0].dtype)) else "f32"


@stub("norm_stub", coarse=False)
def norm(it: Iter, p: Any) -> None:
    """One of three kernels runs: p is a number of the call, not of the plan."""
    dtype = _norm_dtype(it)
    two, positive, negative = eq(p, 2.0), eq(p, float("inf")), eq(p, float("-inf"))
    reduce_iterator("norm2", it, _norm2, (dtype,), enabled=two)
    sign = where(positive, 1.0, -1.0)
    reduce_iterator("norm_extreme", it, _norm_extreme, (dtype,), [sign], [dtype], enabled=positive + negative)
    reduce_iterator("norm_power", it, _norm_power, (dtype,), [p], [dtype], enabled=eq(two + positive + negative, 0))


@stub("powsum_stub", coarse=False)
def powsum(it: Iter, p: Any) -> None:
    dtype = _norm_dtype(it)
    two = eq(p, 2.0)
    reduce_iterator("squares_sum", it, _squares_sum, (dtype,), enabled=two)
    reduce_iterator("powers_sum", it, _powers, (dtype,), [p], [dtype], enabled=eq(two, 0))


# ---- along a dimension, and over everything --------------------------------------------------------------------------


def _along(
    name: str, function: Callable[..., Any], x: Tensor, dim: int, keepdim: bool, outs: Sequence[Tensor], key: tuple = ()
) -> None:
    """Reduces dimension `dim` of x into outs, which have it with size 1 (keepdim) or not at all."""
    if x.ndim == 0:
        reduce_rows(name, function, [(o, (0,)) for o in outs], [(x, (0,))], (1,), 1, key)
        return
    order = [dim, *(d for d in reversed(range(x.ndim)) if d != dim)]

    def strides(o: Tensor) -> list[Any]:
        s = list(o.strides)
        if not keepdim:
            s.insert(dim, 0)
        s[dim] = 0
        return [s[d] for d in order]

    reduce_rows(
        name,
        function,
        [(o, strides(o)) for o in outs],
        [(x, [x.strides[d] for d in order])],
        [x.sizes[d] for d in order],
        1,
        key,
    )


@stub("max_stub", coarse=False)
def max_dim(x: Tensor, dim: int, keepdim: bool, values: Tensor, indices: Tensor) -> None:
    _along("max_dim", _max_dim, x, dim, keepdim, [values, indices])


@stub("min_stub", coarse=False)
def min_dim(x: Tensor, dim: int, keepdim: bool, values: Tensor, indices: Tensor) -> None:
    _along("min_dim", _min_dim, x, dim, keepdim, [values, indices])


@stub("aminmax_stub", coarse=False)
def aminmax(x: Tensor, dim: int, keepdim: bool, low: Tensor, high: Tensor) -> None:
    _along("aminmax", _aminmax, x, dim, keepdim, [low, high])


def _everything(name: str, function: Callable[..., Any], x: Tensor, outs: Sequence[Tensor]) -> None:
    length = sum(bucket(s) for s in x.sizes)
    if x.is_contiguous:
        sizes, strides = [x.numel], [1]
    else:
        sizes, strides = list(reversed(x.sizes)), list(reversed(x.strides))
    outputs = [(o, [0] * len(sizes)) for o in outs]
    reduce_rows(name, function, outputs, [(x, strides)], sizes, len(sizes), length=length)


@stub("max_all_stub", coarse=False)
def max_all(x: Tensor, out: Tensor) -> None:
    _everything("max_values", _max, x, [out])


@stub("min_all_stub", coarse=False)
def min_all(x: Tensor, out: Tensor) -> None:
    _everything("min_values", _min, x, [out])


@stub("aminmax_allreduce_stub", coarse=False)
def aminmax_all(x: Tensor, low: Tensor, high: Tensor) -> None:
    _everything("aminmax", _aminmax, x, [low, high])


# ---- single ops ------------------------------------------------------------------------------------------------------


@lowering("trace")
def trace(x: Tensor) -> Tensor:
    check(x.ndim == 2, "RuntimeError", "trace: expected a matrix, but got tensor with dim " + str(x.ndim))
    integral = DTYPES[x.dtype].kind not in ("float", "complex")
    out = empty((), "i64" if integral else x.dtype)
    size = minimum(x.sizes[0], x.sizes[1])
    reduce_rows("sum", _sum, [(out, (0,))], [(x, (x.strides[0] + x.strides[1],))], [size], 1, (out.dtype,))
    return out


def _assert_true(it: Item) -> None:
    holds = truth(it.load("x"))
    it.check(ir.cast(holds, "i32"), 1, 2)


@lowering("_assert_async", "_assert_async.msg")
def assert_async(x: Tensor, message: str = "Assertion failed") -> None:
    """Reports the message as a RuntimeError when the device is next waited for, unless the one element of x is true."""
    check(eq(x.numel, 1), "RuntimeError", "Boolean value of Tensor with other than one value is ambiguous")
    x = x.view((1,), (1,))
    each("assert_async", _assert_true, (1,), {"x": x}, site=message)


@composite("equal")
def equal(a: Any, b: Any) -> bool:
    """Whether sizes and elements are equal; waits for the device."""
    if a.device != b.device:
        raise RuntimeError(f"Cannot compare two tensors on different devices. Got: {a.device} and {b.device}")
    if a.dtype != b.dtype:
        raise RuntimeError(
            f"Expected object of data type {a.dtype} but got data type {b.dtype} for argument 'other' in call to equal"
        )
    return a.shape == b.shape and bool((a == b).all().item())
