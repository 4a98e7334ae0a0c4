"""Scans along a dimension: cumsum, cumprod, cummax, cummin, logcumsumexp; and distances between rows: cdist, pdist.

A scan walks each row once. Few long rows are cut into chunks: totals of the chunks, their running totals, then the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..kernels import ir, nest
from ..kernels.ir import Complex
from ..kernels.kernel import DTYPES, compute_dtype
from ..lowering import Tensor, bucket, cdiv, empty, lowering, maximum, stub, target
from .common import contiguous, copy_to, out_variant
from .elementwise import as_dtype
from .items import Item, each

CHUNK = 4096


# ---- what is scanned: a monoid, the element of x at an index, the result -------------------------------------------------


def _logaddexp(kind: str) -> Any:
    def combine(a: tuple, b: tuple) -> tuple:
        high, low = ir.maximum(a[0], b[0]), ir.minimum(a[0], b[0])
        finite = ir.where(ir.isfinite(high), high, ir.const(0.0, kind))
        total = finite + ir.log1p(ir.exp(low - high))
        return (ir.where(ir.or_(ir.isnan(high), ir.eq(ir.abs(high), float("inf"))), high, total),)

    return combine


def _complex_logaddexp(a: tuple, b: tuple) -> tuple:
    """log(exp(a) + exp(b)), from the one with the larger real part; minus infinity is neutral."""
    swap = ir.lt(a[0], b[0])
    high = Complex(ir.where(swap, b[0], a[0]), ir.where(swap, b[1], a[1]))
    low = Complex(ir.where(swap, a[0], b[0]), ir.where(swap, a[1], b[1]))
    total = high + ir.log(ir.exp(low - high) + 1.0)
    alone = ir.eq(low.re, float("-inf"))
    return ir.where(alone, high.re, total.re), ir.where(alone, high.im, total.im)


def _extreme_at(better: Any) -> Any:
    """Of (value, index): the later of the best so far; a NaN is the best."""

    def combine(a: tuple, b: tuple) -> tuple:
        take = ir.or_(better(b[0], a[0]), ir.isnan(b[0]))
        take = ir.and_(take, ir.or_(ir.isnan(b[0]), ir.not_(ir.isnan(a[0]))))
        return ir.where(take, b[0], a[0]), ir.where(take, b[1], a[1])

    return combine


def _monoid(op: str, dtype: str) -> nest.Monoid:
    """The scan's monoid; element and result are values of its dtypes."""
    kind = compute_dtype(dtype)
    if DTYPES[dtype].kind == "complex":
        combine = {
            "cumsum": lambda a, b: (a[0] + b[0], a[1] + b[1]),
            "cumprod": lambda a, b: (a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]),
            "logcumsumexp": _complex_logaddexp,
        }[op]
        if op == "logcumsumexp":
            return nest.Monoid(op, (kind, kind), (float("-inf"), 0), combine)
        return nest.Monoid(op, (kind, kind), (int(op == "cumprod"), 0), combine)
    if op == "cumsum":
        return nest.Monoid(op, (kind,), (0,), lambda a, b: (ir.or_(a[0], b[0]) if kind == "bool" else a[0] + b[0],))
    if op == "cumprod":
        return nest.Monoid(op, (kind,), (1,), lambda a, b: (ir.and_(a[0], b[0]) if kind == "bool" else a[0] * b[0],))
    if op == "logcumsumexp":
        return nest.Monoid(op, (kind,), (float("-inf"),), _logaddexp(kind))
    ends = nest.MAX(kind) if op == "cummax" else nest.MIN(kind)
    return nest.Monoid(op, (kind, "i32"), (ends.init[0], 0), _extreme_at(ir.ge if op == "cummax" else ir.le))


def _element(it: Item, op: str, dtype: str, at: Sequence[Any], c: Any) -> tuple:
    x = as_dtype(it.load("x", at), dtype)
    if isinstance(x, Complex):
        return x.re, x.im
    return (x, c) if op in ("cummax", "cummin") else (x,)


def _span(it: Item) -> tuple[Any, Any]:
    start = it.k.let(it.at[0] * it["chunk"])
    return start, it.k.let(ir.minimum(start + it["chunk"], it["length"]))


def _walk(
    it: Item, op: str, dtype: str, monoid: nest.Monoid, start: Any, stop: Any, initial: Sequence[Any], store: Any
) -> list[Any]:
    """Combines the elements start .. stop of a row; store(index, values) gets each running value."""
    k = it.k
    acc = [
        k.var(t, ir.const(v, t) if isinstance(v, (int, float)) else v)
        for t, v in zip(monoid.dtypes, initial, strict=True)
    ]
    with k.For(start, stop) as c:
        at = (c, *it.at[1:])
        new = [k.let(v) for v in monoid.combine(tuple(a.as_node() for a in acc), _element(it, op, dtype, at, c))]
        for a, v in zip(acc, new, strict=True):
            a.set(v)
        if store is not None:
            store(at, [a.as_node() for a in acc])
    return [a.as_node() for a in acc]


def _totals_body(it: Item) -> None:
    """Items are (chunk, row...); the totals of chunks."""
    op, dtype = it.static[:2]
    monoid = _monoid(op, dtype)
    start, stop = _span(it)
    for i, v in enumerate(_walk(it, op, dtype, monoid, start, stop, monoid.init, None)):
        it.store(f"out{i}", v)


def _running_body(it: Item) -> None:
    """Items are (0, row...); totals become what comes before each chunk."""
    op, dtype = it.static[:2]
    k, monoid = it.k, _monoid(op, dtype)
    acc = [k.var(t, ir.const(v, t)) for t, v in zip(monoid.dtypes, monoid.init, strict=True)]
    with k.For(0, it["chunks"]) as c:
        at = (c, *it.at[1:])
        total = tuple(k.let(ir.cast(it.load(f"out{i}", at), t)) for i, t in enumerate(monoid.dtypes))
        before = [a.as_node() for a in acc]
        new = [k.let(v) for v in monoid.combine(tuple(before), total)]
        for i, v in enumerate(before):
            it.store(f"out{i}", v, at)
        for a, v in zip(acc, new, strict=True):
            a.set(v)


def _scan_body(it: Item) -> None:
    """Items are (chunk, row...)."""
    op, dtype, chunked = it.static
    k, monoid = it.k, _monoid(op, dtype)
    start, stop = _span(it)
    initial: Sequence[Any] = monoid.init
    if chunked:
        initial = [k.let(ir.cast(it.load(f"total{i}"), t)) for i, t in enumerate(monoid.dtypes)]

    def store(at: Any, values: list[Any]) -> None:
        if DTYPES[dtype].kind == "complex":
            it.store("out", Complex(*values), at)
            return
        it.store("out", values[0], at)
        if len(values) == 2:
            it.store("out_index", values[1], at)

    _walk(it, op, dtype, monoid, start, stop, initial, store)


def scan(op: str, x: Tensor, dim: int, out: Tensor, indices: Tensor | None = None) -> None:
    """out (and indices) = the running combination of x along dim."""
    if x.ndim == 0:
        x, out, indices = (None if t is None else t.view((1,), (0,)) for t in (x, out, indices))  # type: ignore[assignment]
        dim = 0
    assert x is not None and out is not None
    if x.is_conj or x.is_neg:
        x = contiguous(x)
    dtype = out.dtype
    order = [dim, *(d for d in range(x.ndim) if d != dim)]
    x, out, indices = (None if t is None else t.permute(order) for t in (x, out, indices))  # type: ignore[assignment]
    assert x is not None and out is not None
    length, rows = x.sizes[0], list(x.sizes[1:])
    operands = {"x": x, "out": out}
    if indices is not None:
        operands["out_index"] = indices
    vector = target().schedule_class == "vector"
    few = sum(bucket(s) for s in rows) <= (1 if vector else 8)
    chunked = few and bucket(length) >= (14 if vector else 9)
    if not chunked:
        each(
            op,
            _scan_body,
            (1, *rows),
            operands,
            {"chunk": length, "length": length},
            static=(op, dtype, False),
            cost=length,
        )
        return
    chunk: Any = CHUNK if vector else maximum(cdiv(length, 1024), 32)
    chunks = cdiv(length, chunk)
    storage = ["i32" if t == "bool" else t for t in _monoid(op, dtype).dtypes]
    totals = [empty([chunks, *rows], t) for t in storage]
    scalars = {"chunk": chunk, "length": length}
    outs = {f"out{i}": t for i, t in enumerate(totals)}
    each(op + "_totals", _totals_body, (chunks, *rows), {"x": x, **outs}, scalars, static=(op, dtype), cost=chunk)
    modes = dict.fromkeys(outs, "rw")
    each(
        op + "_running",
        _running_body,
        (1, *rows),
        outs,
        {"chunks": chunks},
        static=(op, dtype),
        modes=modes,
        cost=chunks,
    )
    each(
        op + "_chunks",
        _scan_body,
        (chunks, *rows),
        {**operands, **{f"total{i}": t for i, t in enumerate(totals)}},
        scalars,
        static=(op, dtype, True),
        cost=chunk,
    )


@stub("cumsum_stub", coarse=False)
def cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    scan("cumsum", x, dim, out)


@stub("cumprod_stub", coarse=False)
def cumprod(x: Tensor, dim: int, out: Tensor) -> None:
    scan("cumprod", x, dim, out)


@lowering("_cummax_helper")
def cummax(x: Tensor, values: Tensor, indices: Tensor, dim: int) -> None:
    scan("cummax", x, dim % max(x.ndim, 1), values, indices)


@lowering("_cummin_helper")
def cummin(x: Tensor, values: Tensor, indices: Tensor, dim: int) -> None:
    scan("cummin", x, dim % max(x.ndim, 1), values, indices)


@lowering("_logcumsumexp")
def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    n = max(x.ndim, 1)
    if not -n <= dim < n:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})")
    out = empty(x.sizes, x.dtype)
    scan("logcumsumexp", x, dim % max(x.ndim, 1), out)
    return out


out_variant("_logcumsumexp.out", "_logcumsumexp", "out")


# ---- distances -------------------------------------------------------------------------------------------------------


def _distance(it: Item, a: Any, b: Any, kind: str) -> Any:
    """The p-norm of a(c) - b(c) over the features; p decides once, outside the loops."""
    k, p = it.k, it["p"]
    total = k.var(kind, 0.0)

    def loop(step: Any) -> None:
        with k.For(0, it["features"]) as c:
            total.set(step(total.as_node(), k.let(ir.abs(a(c) - b(c)))))

    with k.If(ir.eq(p, 2.0)):
        loop(lambda t, d: t + d * d)
        total.set(ir.sqrt(total.as_node()))
    with k.Else(), k.If(ir.eq(p, 1.0)):
        loop(lambda t, d: t + d)
    with k.If(ir.eq(p, 0.0)):
        loop(lambda t, d: t + ir.where(ir.ne(d, 0.0), ir.const(1.0, kind), ir.const(0.0, kind)))
    with k.If(ir.eq(p, float("inf"))):
        loop(lambda t, d: ir.maximum(t, d))
    other = ir.and_(ir.and_(ir.ne(p, 2.0), ir.ne(p, 1.0)), ir.and_(ir.ne(p, 0.0), ir.ne(p, float("inf"))))
    with k.If(other):
        loop(lambda t, d: t + ir.pow(d, p))
        total.set(ir.pow(total.as_node(), 1.0 / p))
    return total.as_node()


def _cdist_body(it: Item) -> None:
    n, i, j = it.at
    d = _distance(it, lambda c: it.load("a", (n, i, c)), lambda c: it.load("b", (n, j, c)), it.static[0])
    it.store("out", d)


def _three(x: Tensor) -> Tensor:
    """x [..., r, c], contiguous, as [batch, r, c]."""
    x = contiguous(x)
    batch: Any = 1
    for s in x.sizes[:-2]:
        batch = batch * s
    return x.view([batch, x.sizes[-2], x.sizes[-1]])


def _p(x: Tensor, p: Any) -> tuple[str, Any]:
    return compute_dtype(x.dtype), p


@stub("cdist_stub")
def cdist(a: Tensor, b: Tensor, p: Any, out: Tensor) -> None:
    """out[n, i, j] = the distance of a[n, i] and b[n, j]."""
    a, b, result = _three(a), _three(b), _three(out) if out.is_contiguous else empty(_three(out).sizes, out.dtype)
    each(
        "cdist",
        _cdist_body,
        result.sizes,
        {"a": a, "b": b, "out": result},
        {"features": a.sizes[2], "p": _p(a, p)},
        static=(compute_dtype(a.dtype),),
        cost=a.sizes[2],
    )
    if not out.is_contiguous:
        copy_to(out, result.view(out.sizes))


def _slope(p: Any, diff: Any, distance: Any, kind: str) -> Any:
    """d distance / d diff."""
    zero = ir.const(0.0, kind)
    size, sign = ir.abs(diff), ir.cast(ir.sign(diff), kind)
    general = sign * ir.pow(size / ir.where(ir.eq(distance, 0.0), 1.0, distance), p - 1.0)
    general = ir.where(ir.or_(ir.eq(distance, 0.0), ir.and_(ir.lt(p, 1.0), ir.eq(diff, 0.0))), zero, general)
    two = ir.where(ir.eq(distance, 0.0), zero, diff / distance)
    largest = ir.where(ir.eq(size, distance), sign, zero)
    value = ir.where(
        ir.eq(p, 2.0), two, ir.where(ir.eq(p, 1.0), sign, ir.where(ir.eq(p, float("inf")), largest, general))
    )
    return ir.where(ir.eq(p, 0.0), zero, value)


def _cdist_backward_body(it: Item) -> None:
    """Items are elements of the gradient of a: a sum over the rows of b."""
    k, kind = it.k, it.static[0]
    n, i, c = it.at
    own, total = k.let(it.load("a")), k.var(kind, 0.0)
    with k.For(0, it["rows"]) as j:
        diff = k.let(own - it.load("b", (n, j, c)))
        slope = _slope(it["p"], diff, k.let(it.load("distance", (n, i, j))), kind)
        total.set(total + it.load("grad", (n, i, j)) * slope)
    it.store("out", total)


@stub("cdist_backward_stub")
def cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: Any, distance: Tensor, out: Tensor) -> None:
    a, b, grad, distance = _three(a), _three(b), _three(grad), _three(distance)
    result = _three(out) if out.is_contiguous else empty(a.sizes, out.dtype)
    each(
        "cdist_backward",
        _cdist_backward_body,
        result.sizes,
        {"a": a, "b": b, "grad": grad, "distance": distance, "out": result},
        {"rows": b.sizes[1], "p": _p(a, p)},
        static=(compute_dtype(a.dtype),),
        cost=b.sizes[1],
    )
    if not out.is_contiguous:
        copy_to(out, result.view(out.sizes))


def _pair(i: Any, j: Any, n: Any) -> Any:
    """The place of the pair i < j among all pairs of n rows."""
    return n * i - ir.idiv(i * (i + 1), 2) + j - i - 1


def _pdist_body(it: Item) -> None:
    """Items are all (i, j); those with i < j store."""
    i, j = it.at
    with it.k.If(i < j):
        d = _distance(it, lambda c: it.load("a", (i, c)), lambda c: it.load("a", (j, c)), it.static[0])
        it.store("out", d, (_pair(i, j, it["rows"]),))


@stub("pdist_forward_stub")
def pdist_forward(a: Tensor, p: Any, out: Tensor) -> None:
    n = a.sizes[0]
    each(
        "pdist",
        _pdist_body,
        (n, n),
        {"a": a, "out": out},
        {"features": a.sizes[1], "rows": n, "p": _p(a, p)},
        static=(compute_dtype(a.dtype),),
        cost=a.sizes[1],
    )


def _pdist_backward_body(it: Item) -> None:
    k, kind = it.k, it.static[0]
    i, c = it.at
    own, total = k.let(it.load("a")), k.var(kind, 0.0)
    with k.For(0, it["rows"]) as j, k.If(ir.ne(i, j)):
        pair = k.let(_pair(ir.minimum(i, j), ir.maximum(i, j), it["rows"]))
        slope = _slope(it["p"], k.let(own - it.load("a", (j, c))), k.let(it.load("distance", (pair,))), kind)
        total.set(total + it.load("grad", (pair,)) * slope)
    it.store("out", total)


@stub("pdist_backward_stub")
def pdist_backward(grad: Tensor, a: Tensor, p: Any, distance: Tensor, out: Tensor) -> None:
    each(
        "pdist_backward",
        _pdist_backward_body,
        a.sizes,
        {"a": a, "grad": grad, "distance": distance, "out": out},
        {"rows": a.sizes[0], "p": _p(a, p)},
        static=(compute_dtype(a.dtype),),
        cost=a.sizes[0],
    )
