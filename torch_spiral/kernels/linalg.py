"""Kernels of dense linear algebra on batches of matrices [batch, rows, cols], any strides, real and complex.

Factorizations take one workgroup per matrix (one invocation on CPU devices) and work on a panel of columns, so that
larger matrices are handled in blocks with products in between (ops/linalg.py). Substitutions take one invocation per
column of the right-hand side. Scalars: all i32, in the order in which a kernel's docstring names them; a matrix has
three, its strides by batch, row and column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from . import ir
from .builder import Buffer, KernelBuilder
from .kernel import DTYPES, Kernel, Target, compute_dtype

TEAM = 64  # invocations that share a matrix


class Matrix:
    """One matrix of a batched operand: m[i, j]."""

    def __init__(self, buffer: Buffer, strides: tuple[Any, Any, Any]):
        self.buffer, self.strides, self.base = buffer, strides, ir.const(0, "i32")

    def at(self, k: KernelBuilder, batch: Any) -> None:
        """Selects the matrix."""
        self.base = k.let(batch * self.strides[0])

    def index(self, i: Any, j: Any) -> Any:
        return self.base + i * self.strides[1] + j * self.strides[2]

    def __getitem__(self, ij: tuple[Any, Any]) -> Any:
        return self.buffer[self.index(*ij)]

    def __setitem__(self, ij: tuple[Any, Any], value: Any) -> None:
        self.buffer[self.index(*ij)] = value


class Team:
    """The invocations that work on one matrix: one on CPU devices, where barriers are slow, else a workgroup."""

    def __init__(self, k: KernelBuilder):
        self.k = k
        self.size = 1 if k.target.schedule_class == "vector" else min(TEAM, k.target.max_workgroup_size)
        self.block = k.target.schedule_class == "block"
        self.arrays: dict[tuple[str, int], Any] = {}
        self.batch = k.let(ir.cast(k.group_index(), "i32"))
        self.id = ir.const(0, "i32") if self.size == 1 else k.let(ir.cast(k.local_id(), "i32"))

    @contextmanager
    def each(self, start: Any, stop: Any) -> Iterator[Any]:
        """start .. stop, split among the invocations."""
        with self.k.For(start + self.id, stop, self.size) as i:
            yield i

    def one(self) -> Any:
        """Work for a single invocation."""
        return nullcontext() if self.size == 1 else self.k.If(ir.eq(self.id, 0))

    def barrier(self) -> None:
        if self.size > 1:
            self.k.barrier(buffers=True)

    def reduce(
        self, name: str, combine: Callable[[tuple, tuple], tuple], dtypes: Sequence[str], values: Sequence[Any]
    ) -> list[Any]:
        """The invocations' tuples of values combined in order; all get the result. What they stored before is visible after."""
        k = self.k
        if self.size == 1:
            return [k.let(v) for v in values]
        if self.block:
            out = k.reduce(name, combine, dtypes, values)  # type: ignore[attr-defined]
            self.barrier()
            return out
        shared = [self._shared(t, n) for n, t in enumerate(dtypes)]
        for s, v in zip(shared, values, strict=True):
            s[self.id] = v
        self.barrier()
        total = [k.var(t, s[0]) for t, s in zip(dtypes, shared, strict=True)]
        with k.For(1, self.size) as i:
            new = combine(tuple(t.as_node() for t in total), tuple(s[i] for s in shared))
            for t, v in zip(total, [k.let(v) for v in new], strict=True):
                t.set(v)
        self.barrier()
        return [k.let(t) for t in total]

    def _shared(self, dtype: str, number: int) -> Any:
        if (dtype, number) not in self.arrays:
            self.arrays[dtype, number] = self.k.shared(dtype, self.size)
        return self.arrays[dtype, number]

    def finish(self) -> Kernel:
        return self.k.finish((self.size, 1, 1))


def team_groups(target: Target, batch: Any) -> Any:
    """The grid of a kernel with one workgroup per matrix."""
    from .nest import fold_groups

    return fold_groups(target, batch)


def _matrix(k: KernelBuilder, name: str, dtype: str, mode: str) -> Matrix:
    return Matrix(k.buffer(name, dtype, mode), (ir.const(0, "i32"),) * 3)


def _strides(k: KernelBuilder, m: Matrix) -> None:
    m.strides = tuple(k.scalar(f"{m.buffer.name}_{d}", "i32") for d in ("batch", "row", "col"))  # type: ignore[assignment]


def _var(k: KernelBuilder, dtype: str, init: Any = 0) -> Any:
    return k.var(dtype if DTYPES[dtype].kind == "complex" else compute_dtype(dtype), init)


def _real(x: Any) -> Any:
    return x.re if isinstance(x, ir.Complex) else x


def _imag(x: Any) -> Any:
    return x.im if isinstance(x, ir.Complex) else ir.const(0, x.dtype)


def _conj(x: Any) -> Any:
    return x.conj() if isinstance(x, ir.Complex) else x


def _abs2(x: Any) -> Any:
    return x.re * x.re + x.im * x.im if isinstance(x, ir.Complex) else x * x


def _scaled(x: Any, by: Any) -> Any:
    """x times a real number."""
    return ir.Complex(x.re * by, x.im * by) if isinstance(x, ir.Complex) else x * by


def _divided(x: Any, by: Any) -> Any:
    """x by a real number."""
    return ir.Complex(x.re / by, x.im / by) if isinstance(x, ir.Complex) else x / by


# ---- Cholesky ---------------------------------------------------------------------------------------------------------


def cholesky(target: Target, dtype: str) -> Kernel:
    """The lower factor of the panel's diagonal block, in place. Buffers: a, info (i32 [batch]). Scalars: a's strides,
    batch, first column, columns. The first panel sets info to 0 or to the order of the minor that is not positive definite;
    later ones keep what is not 0."""
    k = KernelBuilder(target, f"cholesky_{dtype}")
    a = _matrix(k, "a", dtype, "rw")
    info = k.buffer("info", "i32", "rw")
    _strides(k, a)
    batches, first, count = (k.scalar(n, "i32") for n in ("batches", "first", "count"))
    team = Team(k)
    a.at(k, team.batch)
    failed = k.var("i32", 0)
    stop = k.let(first + count)
    alive = k.let(ir.where(team.batch < batches, stop, first))
    with k.For(first, stop) as j:
        with team.each(j, alive) as i:
            acc = _var(k, dtype, a[i, j])
            with k.For(first, j) as p:
                acc.set(acc - a[i, p] * _conj(a[j, p]))
            a[i, j] = acc
        team.barrier()
        pivot = k.let(_real(a[j, j]))
        good = k.let(pivot > 0)
        with k.If(ir.and_(ir.eq(failed, 0), ir.logical_not(good))):
            failed.set(j + 1)
        root = k.let(ir.sqrt(pivot))
        team.barrier()
        with team.each(j, alive) as i:
            with k.If(ir.eq(i, j)):
                a[i, j] = root
            with k.Else():
                a[i, j] = _divided(a[i, j], root)
        team.barrier()
    with team.one(), k.If(team.batch < batches):
        with k.If(ir.eq(first, 0)):
            info[team.batch] = failed
        with k.Else(), k.If(ir.eq(info[team.batch], 0)):
            info[team.batch] = failed
    return team.finish()


# ---- LU ---------------------------------------------------------------------------------------------------------------


def _first_largest(a: tuple, b: tuple) -> tuple:
    """Of two (value, place): the larger value, of equal ones that at the smaller place."""
    (x, i), (y, j) = a, b
    second = ir.or_(y > x, ir.and_(ir.eq(y, x), j < i))
    return ir.where(second, y, x), ir.where(second, j, i)


def _larger(a: tuple, b: tuple) -> tuple:
    return (ir.maximum(a[0], b[0]),)


def _sum(a: tuple, b: tuple) -> tuple:
    return (a[0] + b[0],)


def lu(target: Target, dtype: str, pivoting: bool) -> Kernel:
    """LU of a panel: columns first .. first + count, rows from `first`, in place, rows swapped within the panel alone.

    Buffers: a, pivots (i32 [batch, min(rows, cols)], from 1 as LAPACK's), info (i32 [batch]: first zero pivot from 1, or 0).
    Scalars: a's strides, batch, rows, first, count, pivots' batch stride."""
    k = KernelBuilder(target, f"lu_{dtype}" + ("" if pivoting else "_nopivot"))
    a = _matrix(k, "a", dtype, "rw")
    pivots, info = k.buffer("pivots", "i32", "w"), k.buffer("info", "i32", "rw")
    _strides(k, a)
    batches, rows, first, count, pivot_stride = (
        k.scalar(n, "i32") for n in ("batches", "rows", "first", "count", "pivot_stride")
    )
    team = Team(k)
    part = compute_dtype(dtype)
    a.at(k, team.batch)
    live = team.batch < batches
    last = k.let(first + count)
    row_stop, col_stop = k.let(ir.where(live, rows, 0)), k.let(ir.where(live, last, first))
    failed = k.var("i32", 0)
    with k.For(first, last) as j:
        if pivoting:
            best, row = k.var(part, -1.0), k.var("i32", j)
            with team.each(j, row_stop) as i:
                x = a[i, j]
                size = k.let(ir.abs(x.re) + ir.abs(x.im) if isinstance(x, ir.Complex) else ir.abs(x))
                with k.If(size > best):
                    best.set(size)
                    row.set(i)
            _, chosen = team.reduce("first_largest", _first_largest, (part, "i32"), (best, row))
            with team.one(), k.If(live):
                pivots[team.batch * pivot_stride + j] = chosen + 1
            with k.If(ir.ne(chosen, j)), team.each(first, col_stop) as c:
                x, y = a[j, c], a[chosen, c]
                a[j, c] = y
                a[chosen, c] = x
            team.barrier()
        else:
            with team.one(), k.If(live):
                pivots[team.batch * pivot_stride + j] = j + 1
        pivot = k.let(a[j, j])
        zero = (
            ir.and_(ir.eq(pivot.re, 0.0), ir.eq(pivot.im, 0.0)) if isinstance(pivot, ir.Complex) else ir.eq(pivot, 0.0)
        )
        with k.If(ir.and_(ir.eq(failed, 0), zero)):
            failed.set(j + 1)
        with team.each(j + 1, row_stop) as i:
            factor = a[i, j]
            scaled = k.let(ir.where(zero, factor, factor / pivot))
            a[i, j] = scaled
            with k.For(j + 1, last) as c:
                a[i, c] = a[i, c] - scaled * a[j, c]
        team.barrier()
    with team.one(), k.If(live):
        with k.If(ir.eq(first, 0)):
            info[team.batch] = failed
        with k.Else(), k.If(ir.eq(info[team.batch], 0)):
            info[team.batch] = failed
    return team.finish()


def swap_rows(target: Target, dtype: str, backward: bool) -> Kernel:
    """Applies the swaps of rows `first` .. `first + count` with those that pivots names (from 1), last first if `backward`, to
    all columns but `skip` ones from `first` on.

    Buffers: a, pivots. Scalars: a's strides, batch, columns without the skipped, first, count, skip, pivots' batch stride."""
    k = KernelBuilder(target, f"swap_rows_{dtype}" + ("_backward" if backward else ""))
    a = _matrix(k, "a", dtype, "rw")
    pivots = k.buffer("pivots", "i32")
    _strides(k, a)
    names = ("batches", "columns", "first", "count", "skip", "pivot_stride")
    batches, columns, first, count, skip, pivot_stride = (k.scalar(n, "i32") for n in names)
    item = k.let(ir.cast(k.global_id(TEAM), "i32"))
    with k.If(item < batches * columns):
        batch = k.let(ir.idiv(item, columns))
        q = k.let(item - batch * columns)
        c = k.let(q + ir.where(q < first, ir.const(0, "i32"), skip))
        a.at(k, batch)
        with k.For(0, count) as t:
            j = k.let(first + (count - 1 - t if backward else t))
            p = k.let(pivots[batch * pivot_stride + j] - 1)
            with k.If(ir.ne(p, j)):
                x, y = a[j, c], a[p, c]
                a[j, c] = y
                a[p, c] = x
    return k.finish((TEAM, 1, 1))


def permutation(target: Target, ndim: int) -> Kernel:
    """Swaps entries i and pivots[i] - 1 of a permutation, for each of `count` pivots in turn; both are dense in i.

    Buffers: permutation (i64), pivots (i32). Scalars: batches, count, batch sizes, strides of both by batch dimension."""
    k = KernelBuilder(target, f"permutation_{ndim}d")
    out, pivots = k.buffer("permutation", "i64", "rw"), k.buffer("pivots", "i32")
    batches, count = k.scalar("batches", "i32"), k.scalar("count", "i32")
    sizes, to, of = ([k.scalar(f"{name}{d}", "i32") for d in range(ndim)] for name in ("size", "out", "pivot"))
    item = k.let(ir.cast(k.global_id(TEAM), "i32"))
    with k.If(item < batches):
        start, source, rest = ir.const(0, "i32"), ir.const(0, "i32"), item
        for d in range(ndim):
            quotient = k.let(ir.idiv(rest, sizes[d]))
            i = k.let(rest - quotient * sizes[d])
            start, source, rest = start + i * to[d], source + i * of[d], quotient
        start, source = k.let(start), k.let(source)
        with k.For(0, count) as i:
            p = k.let(pivots[source + i] - 1)
            x, y = out[start + i], out[start + p]
            out[start + i] = y
            out[start + p] = x
    return k.finish((TEAM, 1, 1))


# ---- substitution -----------------------------------------------------------------------------------------------------


def substitute(target: Target, dtype: str, upper: bool, unit: bool, conjugate: bool) -> Kernel:
    """Solves a x = b for triangular a [n, n], in place of b [n, columns]. conjugate: with conj(a).

    Buffers: a, b. Scalars: strides of a and of b, batch, n, columns."""
    name = f"substitute_{'upper' if upper else 'lower'}{'_unit' * unit}{'_conj' * conjugate}_{dtype}"
    k = KernelBuilder(target, name)
    a, b = _matrix(k, "a", dtype, "r"), _matrix(k, "b", dtype, "rw")
    _strides(k, a)
    _strides(k, b)
    batches, n, columns = (k.scalar(s, "i32") for s in ("batches", "n", "columns"))
    item = k.let(ir.cast(k.global_id(TEAM), "i32"))
    with k.If(item < batches * columns):
        batch = k.let(ir.idiv(item, columns))
        c = k.let(item - batch * columns)
        a.at(k, batch)
        b.at(k, batch)
        with k.For(0, n) as t:
            i = k.let(n - 1 - t if upper else t)
            acc = _var(k, dtype, b[i, c])
            with k.For(i + 1 if upper else ir.const(0, "i32"), n if upper else i) as p:
                x = a[i, p]
                acc.set(acc - (_conj(x) if conjugate else x) * b[p, c])
            if not unit:
                x = a[i, i]
                acc.set(acc / (_conj(x) if conjugate else x))
            b[i, c] = acc
    return k.finish((TEAM, 1, 1))


def item_groups(target: Target, items: Any) -> Any:
    """The grid of a kernel with an invocation per item."""
    from .nest import cdiv, fold_groups

    return fold_groups(target, cdiv(items, TEAM))


# ---- Householder reflections --------------------------------------------------------------------------------------------


def geqrf(target: Target, dtype: str) -> Kernel:
    """QR as LAPACK's geqrf: R above the diagonal, the vectors of the reflections below, in place.

    Buffers: a [m, n], tau [min(m, n)]. Scalars: a's strides, batch, m, n, tau's batch stride."""
    k = KernelBuilder(target, f"geqrf_{dtype}")
    a = _matrix(k, "a", dtype, "rw")
    tau = k.buffer("tau", dtype, "rw")
    _strides(k, a)
    batches, m, n, tau_stride = (k.scalar(s, "i32") for s in ("batches", "m", "n", "tau_stride"))
    team = Team(k)
    part = compute_dtype(dtype)
    a.at(k, team.batch)
    live = team.batch < batches
    row_stop, col_stop = k.let(ir.where(live, m, 0)), k.let(ir.where(live, n, 0))
    with k.For(0, ir.minimum(m, n)) as j:
        largest = k.var(part, 0.0)
        norm = k.var(part, 0.0)
        with team.each(j + 1, row_stop) as i:
            x = a[i, j]
            size = ir.maximum(ir.abs(x.re), ir.abs(x.im)) if isinstance(x, ir.Complex) else ir.abs(x)
            largest.set(ir.maximum(largest, size))
        (most,) = team.reduce("larger", _larger, (part,), (largest,))
        scale = k.let(ir.where(ir.eq(most, 0.0), ir.const(1.0, part), most))
        with team.each(j + 1, row_stop) as i:
            norm.set(norm + _abs2(_divided(a[i, j], scale)))
        (squares,) = team.reduce("sum", _sum, (part,), (norm,))
        alpha = a[j, j]
        alpha = k.let(alpha)
        re, im = _real(alpha), _imag(alpha)
        none = ir.eq(squares, 0.0)
        none = k.let(ir.and_(none, ir.eq(im, 0.0)) if isinstance(alpha, ir.Complex) else none)
        length = ir.sqrt(squares + _abs2(_divided(alpha, scale))) * scale
        beta = k.let(ir.where(re < 0.0, length, -length))
        safe = k.let(ir.where(none, ir.const(1.0, part), beta))
        one, zero = ir.const(1.0, part), ir.const(0.0, part)
        if isinstance(alpha, ir.Complex):
            t_re = k.let(ir.where(none, zero, (beta - re) / safe))
            t_im = k.let(ir.where(none, zero, -im / safe))
            factor: Any = ir.Complex(t_re, t_im)
            divisor: Any = ir.Complex(k.let(ir.where(none, one, re - beta)), k.let(ir.where(none, zero, im)))
        else:
            factor = k.let(ir.where(none, zero, (beta - re) / safe))
            divisor = k.let(ir.where(none, one, re - beta))
        team.barrier()
        with team.each(j, row_stop) as i:
            with k.If(ir.eq(i, j)):
                kept = ir.where(none, re, beta)
                a[i, j] = ir.Complex(kept, zero) if isinstance(alpha, ir.Complex) else kept
            with k.Else():
                a[i, j] = a[i, j] / divisor
        with team.one(), k.If(live):
            tau[team.batch * tau_stride + j] = factor
        team.barrier()
        with team.each(j + 1, col_stop) as c:
            _reflect(k, a, a, j, c, m, _conj(factor), dtype)
        team.barrier()
    return team.finish()


def _reflect(k: KernelBuilder, v: Matrix, a: Matrix, j: Any, c: Any, m: Any, factor: Any, dtype: str) -> None:
    """a[j:, c] -= factor * v * (v^H a[j:, c]) for the reflection j of v, whose first element is 1."""
    dot = _var(k, dtype, a[j, c])
    with k.For(j + 1, m) as i:
        dot.set(dot + _conj(v[i, j]) * a[i, c])
    scaled = k.let(factor * (dot if isinstance(dot, ir.Complex) else dot.as_node()))
    a[j, c] = a[j, c] - scaled
    with k.For(j + 1, m) as i:
        a[i, c] = a[i, c] - v[i, j] * scaled


def orgqr(target: Target, dtype: str) -> Kernel:
    """The first columns of the product of reflections, in place of their vectors.

    Buffers: a [m, n], tau. Scalars: a's strides, batch, m, n, reflections, tau's batch stride."""
    k = KernelBuilder(target, f"orgqr_{dtype}")
    a = _matrix(k, "a", dtype, "rw")
    tau = k.buffer("tau", dtype)
    _strides(k, a)
    batches, m, n, count, tau_stride = (k.scalar(s, "i32") for s in ("batches", "m", "n", "count", "tau_stride"))
    team = Team(k)
    a.at(k, team.batch)
    live = team.batch < batches
    row_stop, col_stop = k.let(ir.where(live, m, 0)), k.let(ir.where(live, n, 0))
    complex_ = DTYPES[dtype].kind == "complex"
    one, zero = ir.const(1.0, compute_dtype(dtype)), ir.const(0.0, compute_dtype(dtype))

    def number(x: Any) -> Any:
        return ir.Complex(x, zero) if complex_ else x

    with team.each(count, col_stop) as c, k.For(0, row_stop) as i:
        a[i, c] = number(ir.where(ir.eq(i, c), one, zero))
    team.barrier()
    with k.For(0, count) as t:
        j = k.let(count - 1 - t)
        with k.If(live):
            factor = tau[team.batch * tau_stride + j]
            with team.each(j + 1, col_stop) as c:
                _reflect(k, a, a, j, c, m, factor, dtype)
        team.barrier()
        with k.If(live):
            factor = tau[team.batch * tau_stride + j]
            with team.each(ir.const(0, "i32"), row_stop) as i:
                with k.If(i < j):
                    a[i, j] = number(zero)
                with k.Else():
                    with k.If(ir.eq(i, j)):
                        a[i, j] = number(one) - factor
                    with k.Else():
                        a[i, j] = -(factor * a[i, j])
        team.barrier()
    return team.finish()


def ormqr(target: Target, dtype: str, forward: bool, conjugate_tau: bool, conjugate_v: bool) -> Kernel:
    """Applies reflections to columns c: x -= tau v (v^H x), first to last if `forward`; conjugate_v: with conj(v).

    Buffers: v [m, count], tau, c [m, columns]. Scalars: strides of v and c, batch, m, columns, count, tau's batch stride."""
    flags = "_forward" * forward + "_ctau" * conjugate_tau + "_cv" * conjugate_v
    k = KernelBuilder(target, f"ormqr_{dtype}{flags}")
    v = _matrix(k, "v", dtype, "r")
    tau = k.buffer("tau", dtype)
    c = _matrix(k, "c", dtype, "rw")
    _strides(k, v)
    _strides(k, c)
    batches, m, columns, count, tau_stride = (
        k.scalar(s, "i32") for s in ("batches", "m", "columns", "count", "tau_stride")
    )
    item = k.let(ir.cast(k.global_id(TEAM), "i32"))

    def of_v(i: Any, j: Any) -> Any:
        return _conj(v[i, j]) if conjugate_v else v[i, j]

    with k.If(item < batches * columns):
        batch = k.let(ir.idiv(item, columns))
        q = k.let(item - batch * columns)
        v.at(k, batch)
        c.at(k, batch)
        with k.For(0, count) as t:
            j = k.let(t if forward else count - 1 - t)
            factor = tau[batch * tau_stride + j]
            dot = _var(k, dtype, c[j, q])
            with k.For(j + 1, m) as i:
                dot.set(dot + _conj(of_v(i, j)) * c[i, q])
            scaled = k.let(
                (_conj(factor) if conjugate_tau else factor) * (dot if isinstance(dot, ir.Complex) else dot.as_node())
            )
            c[j, q] = c[j, q] - scaled
            with k.For(j + 1, m) as i:
                c[i, q] = c[i, q] - of_v(i, j) * scaled
    return k.finish((TEAM, 1, 1))
