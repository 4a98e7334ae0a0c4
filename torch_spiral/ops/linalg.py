"""Linear algebra on the device: Cholesky, LU, triangular systems, QR, determinants (through LU), cross products.

Matrices of up to BLOCK columns take one kernel, a workgroup for each. Larger ones are worked on in panels of BLOCK columns,
with the rest updated by our matrix products; a plan holds as many panels as its size class may need, and those beyond
the matrix launch nothing. Eigenvalues, singular values and least squares are in host.py."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ..kernels import ir, nest
from ..kernels import linalg as kernels
from ..kernels.kernel import DTYPES, compute_dtype
from ..lowering import (
    SCALAR_TYPES,
    Iter,
    Size,
    Sym,
    Tensor,
    bucket,
    build,
    check,
    composite,
    empty,
    is_one,
    launch,
    lowering,
    lt,
    maximum,
    minimum,
    recorder,
    stub,
    target,
    where,
)
from ..lowering import product as multiply
from .common import broadcast, contiguous, copied, copy_to, map_tensors
from .contraction import product
from .items import Item, each

BLOCK = 64


# ---- batches of matrices ------------------------------------------------------------------------------------------------


def _is_plain(x: Tensor) -> bool:
    return not x.is_conj and not x.is_neg


def _collapsed(x: Tensor) -> Tensor | None:
    """x as [batch, rows, cols] without a copy, where the key tells that this is possible."""
    if not _is_plain(x):
        return None
    if x.ndim == 2:
        return x.view([1, *x.sizes], [0, *x.strides])
    if x.ndim == 3:
        return x
    batch = multiply(x.sizes[:-2])
    for y in (x, x.transpose(-2, -1)):
        if y.is_contiguous:
            return x.view([batch, *x.sizes[-2:]], [x.sizes[-1] * x.sizes[-2], *x.strides[-2:]])
    return None


def _input(x: Tensor, batch: Sequence[Any]) -> Tensor:
    """x, expanded to the batch dimensions, as [batch, rows, cols]."""
    x = broadcast(x, [*batch, *x.sizes[-2:]])
    found = _collapsed(x)
    if found is None:
        found = _collapsed(contiguous(x))
    assert found is not None
    return found


@contextlib.contextmanager
def _in_place(x: Tensor) -> Iterator[Tensor]:
    """An operand that is read and written, as [batch, rows, cols]; in a copy where its layout needs one."""
    found = _collapsed(x)
    if found is not None:
        yield found
        return
    temporary = copied(x)
    collapsed = _collapsed(temporary)
    assert collapsed is not None
    yield collapsed
    copy_to(x, temporary)


def _batch_stride(x: Tensor) -> Any:
    return 0 if is_one(x.sizes[0]) else x.strides[0]


def _strides(x: Tensor) -> list[Any]:
    return [_batch_stride(x), x.strides[1], x.strides[2]]


def _columns_first(x: Sequence[Any], dtype: str) -> Tensor:
    """A new tensor with matrices in column-major order, as LAPACK's."""
    *batch, m, n = x
    strides = [1, m]
    dense = m * n
    for size in reversed(batch):
        strides.insert(0, dense)
        dense = dense * size
    return empty(x, dtype, strides)


def _vectors(x: Tensor) -> Tensor:
    """[..., k] as a contiguous [batch, k]."""
    return contiguous(x).view([multiply(x.sizes[:-1]), x.sizes[-1]])


def _of_bucket(n: Any, b: int) -> Any:
    """A number known to be of a size class, so that schedules can be chosen for it."""
    if not isinstance(n, Sym):
        return n
    return Size(n._ref, recorder(), int(n._hint), 2 + 3 * b)


def _block(x: Tensor, row: Any, rows: Any, col: Any, cols: Any) -> Tensor:
    """A part of each matrix."""
    return x.view([x.sizes[0], rows, cols], x.strides, row * x.strides[1] + col * x.strides[2])


def _panels(n: Any) -> Iterator[tuple[int, Any, Any, int]]:
    """(first, count, rest, size class of the rest) of each panel that a size of n's class may need. rest is None where
    there can be one panel only; panels beyond n have a count and a rest of 0."""
    b = bucket(n)
    least, limit = (n, n) if isinstance(n, int) else (1 << b, (2 << b) - 1)
    if limit <= BLOCK or b == 0:
        yield 0, n, None, 0
        return
    width = BLOCK if b < 11 else 2 * BLOCK
    for first in range(0, limit, width):
        last = first + width
        count = width if last <= least else maximum(minimum(n - first, width), 0)
        size_class = max((least + limit) // 2 - last, 1).bit_length() - 1
        yield first, count, _of_bucket(maximum(n - last, 0), size_class), size_class


def _subtract_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out -= a @ b."""
    product(a, b, out, alpha=(-1.0, 0.0) if DTYPES[out.dtype].kind == "complex" else -1.0, add=(1.0, out))


def _transposed(x: Tensor) -> Tensor:
    return x.permute([0, 2, 1])


# ---- triangular systems -----------------------------------------------------------------------------------------------


def _substitute(a: Tensor, b: Tensor, upper: bool, unit: bool, conjugate: bool) -> None:
    kernel = build(kernels.substitute, a.dtype, upper, unit, conjugate)
    batch, n, columns = b.sizes
    launch(
        kernel, [a, b], [*_strides(a), *_strides(b), batch, n, columns], kernels.item_groups(target(), batch * columns)
    )


def solve_triangular(a: Tensor, b: Tensor, upper: bool, unit: bool = False, conjugate: bool = False) -> None:
    """b = a^-1 b for triangular a [batch, n, n], b [batch, n, columns]; with conj(a) where `conjugate`."""
    n = b.sizes[1]
    panels = list(_panels(n))
    if len(panels) == 1:
        _substitute(a, b, upper, unit, conjugate)
        return
    if conjugate:
        copy = empty(a.sizes, a.dtype)
        map_tensors("conj_physical", _conjugate, [copy], [a])
        a = copy
    columns = b.sizes[2]
    for first, count, rest, _ in reversed(panels) if upper else panels:
        x = _block(b, first, count, 0, columns)
        _substitute(_block(a, first, count, first, count), x, upper, unit, False)
        if upper:
            if first:
                above = where(lt(first, n), first, 0)  # nothing for panels beyond the matrix
                _subtract_product(_block(a, 0, above, first, count), x, _block(b, 0, above, 0, columns))
        else:
            _subtract_product(
                _block(a, first + count, rest, first, count), x, _block(b, first + count, rest, 0, columns)
            )


def _conjugate(x: Any) -> Any:
    return ir.conj(x)


def _solve_op(a: Tensor, b: Tensor, upper: bool, trans: int, unit: bool = False) -> None:
    """b = op(a)^-1 b; trans: 0 a, 1 its transpose, 2 its conjugate transpose."""
    if trans:
        a, upper = _transposed(a), not upper
    solve_triangular(a, b, upper, unit, trans == 2 and DTYPES[a.dtype].kind == "complex")


@stub("triangular_solve_stub", coarse=False)
def triangular_solve(a: Tensor, left: bool, upper: bool, trans: int, unit: bool, b: Tensor) -> None:
    """op(a) x = b, or x op(a) = b; x in place of b. As LAPACK, ATen means by `a` its memory read in columns, whatever strides
    and the conjugate bit say."""
    found = f"expected scalar type {SCALAR_TYPES[a.dtype]} but found {SCALAR_TYPES[b.dtype]}"
    check(a.dtype == b.dtype, "RuntimeError", found)
    if b.is_empty:
        return
    if is_one(a.strides[-1]) and not is_one(a.strides[-2]):
        a = a.transpose(-2, -1)
    a = dataclasses.replace(a, flags=a.flags & ~(3 << 25))
    with _in_place(b) as x:
        a = _input(a, b.sizes[:-2])
        if left:
            _solve_op(a, x, upper, trans, unit)
        else:  # x op(a) = b is op(a)^T x^T = b^T
            conjugate = trans == 2 and DTYPES[a.dtype].kind == "complex"
            if not trans:
                a, upper = _transposed(a), not upper
            solve_triangular(a, _transposed(x), upper, unit, conjugate)


# ---- Cholesky ---------------------------------------------------------------------------------------------------------


@stub("cholesky_stub", coarse=False)
def cholesky(upper: bool, a: Tensor, info: Tensor) -> None:
    """a = L L^H, or U^H U, in place; info: 0 or the order of the minor that is not positive definite."""
    with _in_place(a) as x:
        if upper:  # U^T is the lower factor of conj(a), which is what the upper triangle holds when read transposed
            x = _transposed(x)
        batch, n = x.sizes[0], x.sizes[1]
        for first, count, rest, _ in _panels(n):
            kernel = build(kernels.cholesky, x.dtype)
            # A panel beyond the matrix has nothing to do, but the first sets info also for empty ones.
            groups = kernels.team_groups(target(), batch * minimum(count, 1) if first else batch)
            launch(kernel, [x, info], [*_strides(x), batch, first, count], groups)
            if rest is None:
                return
            below = _block(x, first + count, rest, first, count)
            diagonal = _block(x, first, count, first, count)
            # below L^H = a, that is conj(L) below^T = a^T
            conjugate = DTYPES[x.dtype].kind == "complex"
            _substitute(diagonal, _transposed(below), False, False, conjugate)
            right = _transposed(below)
            if conjugate:
                right = empty([batch, count, rest], x.dtype)
                map_tensors("conj_physical", _conjugate, [right], [_transposed(below)])
            _subtract_product(below, right, _block(x, first + count, rest, first + count, rest))


@stub("cholesky_inverse_stub", coarse=False)
def cholesky_inverse(upper: bool, result: Tensor) -> None:
    """result = (L L^H)^-1 of the factor that it holds."""
    if result.is_empty:
        return
    with _in_place(result) as x:
        factor = copied(x)
        _set_identity(x)
        _cholesky_solve(factor, x, upper)


def _set_identity(x: Tensor) -> None:
    sizes = tuple(reversed(x.sizes))
    strides = tuple(reversed(_strides(x)))
    built = build(_identity_kernel, x.dtype)
    launch(built.kernel, [x], built.scalars(sizes, [strides]), built.groups(sizes))


def _identity_kernel(t: Any, dtype: str) -> nest.Nest:
    part = compute_dtype(dtype)

    def element(c: nest.Context) -> Any:
        one = ir.where(ir.eq(c.coordinates[0], c.coordinates[1]), ir.const(1, part), ir.const(0, part))
        return ir.Complex(one, ir.const(0, part)) if DTYPES[dtype].kind == "complex" else one

    return nest.pointwise(t, "identity", [nest.Operand("o0", dtype, ("s", "s", "s"))], [], element, 3, context=True)


def _cholesky_solve(factor: Tensor, x: Tensor, upper: bool) -> None:
    if upper:
        _solve_op(factor, x, True, 2)
        _solve_op(factor, x, True, 0)
    else:
        _solve_op(factor, x, False, 0)
        _solve_op(factor, x, False, 2)


@lowering("_cholesky_solve_helper")
def cholesky_solve_helper(self: Tensor, a: Tensor, upper: bool) -> Tensor:
    """x with L L^H x = self for the factor a; both have the same batch dimensions."""
    out = _columns_first(self.sizes, self.dtype)
    copy_to(out, self)
    if out.is_empty:
        return out
    with _in_place(out) as x:
        _cholesky_solve(_input(a, self.sizes[:-2]), x, upper)
    return out


# ---- LU ---------------------------------------------------------------------------------------------------------------


def _swap(x: Tensor, pivots: Tensor, columns: Any, first: Any, count: Any, skip: Any, backward: bool = False) -> None:
    kernel = build(kernels.swap_rows, x.dtype, backward)
    batch = x.sizes[0]
    scalars = [*_strides(x), batch, columns, first, count, skip, _batch_stride(pivots)]
    launch(kernel, [x, pivots], scalars, kernels.item_groups(target(), batch * columns * minimum(count, 1)))


@stub("lu_factor_stub", coarse=False)
def lu_factor(pivoting: bool, a: Tensor, pivots: Tensor, info: Tensor) -> None:
    """a = P L U in place, with LAPACK's pivots from 1."""
    with _in_place(a) as x:
        batch, m, n = x.sizes
        k = pivots.sizes[-1]
        swaps = pivots.view([batch, k])
        kernel = build(kernels.lu, x.dtype, pivoting)
        for first, count, rest, size_class in _panels(k):
            groups = kernels.team_groups(target(), batch * minimum(count, 1) if first else batch)
            launch(kernel, [x, swaps, info], [*_strides(x), batch, m, first, count, _batch_stride(swaps)], groups)
            last = first + count
            if pivoting:
                _swap(x, swaps, n - count, first, count, count)
            if rest is None:
                _substitute(_block(x, 0, k, 0, k), _block(x, 0, k, k, n - k), False, True, False)
                return
            right = _of_bucket(maximum(n - last, 0), size_class)
            below = _of_bucket(maximum(m - last, 0), size_class)
            top = _block(x, first, count, last, right)
            _substitute(_block(x, first, count, first, count), top, False, True, False)
            _subtract_product(_block(x, last, below, first, count), top, _block(x, last, below, last, right))


@stub("unpack_pivots_stub")
def unpack_pivots(it: Iter, count: Any, size: Any) -> None:
    """Permutations (i64) from the swaps that pivots (i32, from 1) list: entry i and entry pivots[i] - 1 change places."""
    kernel = build(kernels.permutation, it.ndim)
    permutation, pivots = it.outputs[0], it.inputs[0]
    scalars = [it.numel, count, *it.shape, *permutation.strides, *pivots.strides]
    assert permutation.tensor is not None and pivots.tensor is not None
    launch(kernel, [permutation.tensor, pivots.tensor], scalars, kernels.item_groups(target(), it.numel))


@stub("lu_solve_stub", coarse=False)
def lu_solve(lu: Tensor, pivots: Tensor, trans: int, b: Tensor) -> None:
    """b = (P L U)^-1 b, or of its transpose (trans 1) or conjugate transpose (2)."""
    if b.is_empty:
        return
    batch = b.sizes[:-2]
    with _in_place(b) as x:
        factors = _input(lu, batch)
        swaps = _vectors(broadcast(pivots, [*batch, pivots.sizes[-1]]))
        n, columns = x.sizes[1], x.sizes[2]
        if trans:
            _solve_op(factors, x, True, trans)
            _solve_op(factors, x, False, trans, True)
            _swap(x, swaps, columns, 0, n, 0, backward=True)
        else:
            _swap(x, swaps, columns, 0, n, 0)
            _solve_op(factors, x, False, 0, True)
            _solve_op(factors, x, True, 0)


# ---- QR ---------------------------------------------------------------------------------------------------------------


@stub("geqrf_stub")
def geqrf(a: Tensor, tau: Tensor) -> None:
    """QR in place as LAPACK's: R above, Householder vectors below the diagonal, their factors in tau."""
    if a.is_empty:
        return
    with _in_place(a) as x, _vectors_in_place(tau) as factors:
        kernel = build(kernels.geqrf, x.dtype)
        batch, m, n = x.sizes
        launch(
            kernel,
            [x, factors],
            [*_strides(x), batch, m, n, _batch_stride(factors)],
            kernels.team_groups(target(), batch),
        )


@contextlib.contextmanager
def _vectors_in_place(x: Tensor) -> Iterator[Tensor]:
    found = _vectors(x)
    yield found
    if found.number != x.number:
        copy_to(x, found.view(x.sizes))


@stub("orgqr_stub")
def orgqr(tau: Tensor, result: Tensor) -> None:
    """The columns of Q, in place of the Householder vectors."""
    if result.is_empty:
        return
    with _in_place(result) as x:
        factors = _vectors(tau)
        batch, m, n = x.sizes
        scalars = [*_strides(x), batch, m, n, tau.sizes[-1], _batch_stride(factors)]
        launch(build(kernels.orgqr, x.dtype), [x, factors], scalars, kernels.team_groups(target(), batch))


@stub("ormqr_stub")
def ormqr(v: Tensor, tau: Tensor, left: bool, transpose: bool, other: Tensor) -> None:
    """other = op(Q) other, or other op(Q), in place."""
    if other.is_empty:
        return
    with _in_place(other) as x:
        factors = _vectors(tau)
        vectors = _input(v, other.sizes[:-2])
        if not left:  # x Q is (Q^T x^T)^T: reflections with conj(v), first to last
            x = _transposed(x)
        batch, m, columns = x.sizes
        kernel = build(kernels.ormqr, x.dtype, transpose if left else not transpose, transpose, not left)
        scalars = [*_strides(vectors), *_strides(x), batch, m, columns, tau.sizes[-1], _batch_stride(factors)]
        launch(kernel, [vectors, factors, x], scalars, kernels.item_groups(target(), batch * columns))


# ---- products -----------------------------------------------------------------------------------------------------------


def _cross_component(a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * b - c * d


@stub("cross_stub")
def cross(a: Tensor, b: Tensor, dim: int, out: Tensor) -> None:
    """The cross product of vectors along `dim`, of size 3."""

    def part(x: Tensor, i: int) -> Tensor:
        sizes = [s for d, s in enumerate(x.sizes) if d != dim]
        strides = [s for d, s in enumerate(x.strides) if d != dim]
        return x.view(sizes, strides, i * x.strides[dim])

    a, b = contiguous(a) if not _is_plain(a) else a, contiguous(b) if not _is_plain(b) else b
    a, b = (broadcast(x, out.sizes) for x in (a, b))
    result = empty(out.sizes, out.dtype) if out.number in (a.number, b.number) or out.root in (a.root, b.root) else out
    for i in range(3):
        j, m = (i + 1) % 3, (i + 2) % 3
        map_tensors("cross", _cross_component, [part(result, i)], [part(a, j), part(b, m), part(a, m), part(b, j)])
    if result is not out:
        copy_to(out, result)


@composite("linalg_matrix_exp")
def matrix_exp(self: Any) -> Any:
    """exp of matrices by scaling and squaring with the Taylor polynomial of degree 18 (Paterson-Stockmeyer: seven products
    and the squarings). One scaling, by the largest 1-norm, for the whole batch."""
    import torch

    if self.numel() == 0 or self.size(-1) == 1:
        return self.exp()
    if not (self.is_floating_point() or self.is_complex()):
        raise NotImplementedError("linalg.matrix_exp: expected a floating or complex tensor")
    norm = float(torch.linalg.matrix_norm(self, 1).max())
    if norm != norm or norm == float("inf"):
        return torch.full_like(self, float("nan"))
    squarings = 0
    while norm > 1.0:
        norm, squarings = norm / 2, squarings + 1
    a = self * (0.5**squarings)
    eye = torch.eye(self.size(-1), dtype=self.dtype, device=self.device).expand_as(self)
    powers = [eye, a]
    for _ in range(3):
        powers.append(powers[-1] @ a)
    factorials = [1.0]
    for i in range(1, 20):
        factorials.append(factorials[-1] * i)

    def group(g: int) -> Any:
        """The coefficients of degrees 4g .. 4g + 3."""
        terms = [powers[i] / factorials[4 * g + i] for i in range(4) if 4 * g + i <= 18]
        return sum(terms[1:], terms[0])

    result = group(4)
    for g in (3, 2, 1, 0):
        result = result @ powers[4] + group(g)
    for _ in range(squarings):
        result = result @ result
    return result


def _linear_combination(it: Item) -> None:
    """Adds `count` products of elements that are in_stride and coefficient_stride apart to what out holds."""
    (dtype,) = it.static
    k = it.k
    x, c = it.buffers["x"], it.buffers["coefficients"]
    at, coefficient = k.let(it.offset("x")), k.let(it.offset("coefficients"))
    total = k.var(dtype if dtype.startswith("c") else compute_dtype(dtype), it.load("out"))
    with k.For(ir.const(0, "i32"), it["count"]) as j:
        step = c.load(coefficient + j * it["coefficient_stride"])
        total.set(total + x.load(at + j * it["in_stride"]) * step)
    it.store("out", total)


@stub("_compute_linear_combination_stub")
def compute_linear_combination(it: Iter, in_stride: Any, coefficient_stride: Any, count: Any) -> None:
    """out[s] += sum of coefficients[s, i] * x[i], as the iterator's strides and these say."""
    operands = {
        name: o.tensor.view(list(reversed(it.shape)), list(reversed(o.strides)))  # type: ignore[union-attr]
        for name, o in zip(("out", "x", "coefficients"), (*it.outputs, *it.inputs), strict=True)
    }
    scalars = {"in_stride": in_stride, "coefficient_stride": coefficient_stride, "count": count}
    each(
        "linear_combination",
        _linear_combination,
        list(reversed(it.shape)),
        operands,
        scalars,
        static=(it.outputs[0].dtype,),
        modes={"out": "rw"},
    )
