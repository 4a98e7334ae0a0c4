"""Sorting, selection, searching and counting: sort, topk, kthvalue, median, mode, searchsorted, unique, histograms.

Sorting is a stable merge sort on keys that are unsigned integers in the wanted order (NaN is the largest number): runs of RUN
elements are sorted by insertion, then merged two by two; every merge is cut into pieces of equal length by binary search
(merge path), so that all invocations have the same work whatever the data.

The k first of long rows are selected instead: rows are cut into pieces, the best of each are kept in a heap, then merged two by two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels import ir
from ..kernels.kernel import DTYPES
from ..lowering import (
    Tensor,
    bucket,
    cdiv,
    composite,
    empty,
    is_one,
    operator,
    product,
    structured,
    stub,
    target,
)
from .common import contiguous, copied, resize_out, write_out
from .index import at_least_1d, bits, number, replace, value_of
from .items import Item, each

RUN = 32  # elements sorted by insertion
RUN_BITS = 5


# ---- sort ----------------------------------------------------------------------------------------------------------


def key_dtype(dtype: str) -> str:
    return "u64" if DTYPES[dtype].size == 8 else "u32"


def sort_key(x: Any, dtype: str, descending: bool) -> Any:
    """x (bits of a float; else the value) as an unsigned integer in sorting order."""
    d = DTYPES[dtype]
    key = key_dtype(dtype)
    top = 1 << (63 if key == "u64" else 31)
    if d.kind == "float":
        wide = dtype == "f64"
        if not wide:
            nan, zero = ir.isnan(x), ir.eq(x, 0.0)
            raw = ir.bitcast(x, "u32")
        else:  # on the bits: a device without float64 sorts it too
            raw = x
            magnitude = raw & ((1 << 63) - 1)
            nan, zero = ir.gt(magnitude, 0x7FF << 52), ir.eq(magnitude, 0)
        negative = ir.ne(raw & top, 0)
        ones = (1 << (64 if wide else 32)) - 1
        k = ir.where(negative, raw ^ ones, raw ^ top)
        k = ir.where(zero, ir.const(top, key), ir.where(nan, ir.const(ones, key), k))
    elif d.kind == "int":
        k = ir.cast(x, key) ^ top
    else:
        k = ir.cast(x, key)
    return k ^ ((1 << (64 if key == "u64" else 32)) - 1) if descending else k


def _row(it: Item, row: Any, rank: int) -> tuple[Any, Any]:
    """(place of the first element of a row of x, stride of its elements); rank: dimensions of rows, whose sizes are scalars."""
    k = it.k
    coordinates, rest = [], row
    for d in reversed(range(rank)):
        if d:
            q = k.let(ir.idiv(rest, it[f"size{d}"]))
            coordinates.append(k.let(rest - q * it[f"size{d}"]))
            rest = q
        else:
            coordinates.append(rest)
    coordinates.reverse()
    stride = it.layouts["x"][-1]
    return k.let(it.offset("x", (*coordinates, ir.const(0, "i32")))), 0 if stride is None else stride


def _sort_runs(it: Item) -> None:
    """Item (row, run): encodes RUN elements and sorts them by insertion."""
    dtype, descending, rank = it.static
    k = it.k
    n = it["n"]
    row, run = it.at
    first = k.let(run * RUN)
    last = k.let(ir.minimum(first + RUN, n))
    base = k.let(row * n)
    start, stride = _row(it, row, rank)
    keys, places = it.buffers["keys"], it.buffers["places"]
    with k.For(first, last) as i:
        key = k.let(sort_key(it.buffers["x"].load(start + i * stride), dtype, descending))
        j = k.var("i32", i)
        moving = k.var("bool", True)
        with k.While(lambda: ir.and_(ir.gt(j, first), moving)):
            before = k.let(keys.load(base + j - 1))
            with k.If(ir.gt(before, key)):
                keys.store(base + j, before)
                places.store(base + j, places.load(base + j - 1))
                j.set(j - 1)
            with k.Else():
                moving.set(False)
        keys.store(base + j, key)
        places.store(base + j, i)


def _merge(it: Item) -> None:
    """Item (row, piece): `piece` consecutive results of merging runs of `width` elements two by two."""
    k = it.k
    n, width, piece = it["n"], it["width"], it["piece"]
    row, number_ = it.at
    base = k.let(row * n)
    keys, places = it.buffers["keys"], it.buffers["places"]
    start = k.let(number_ * piece)  # of the results, in the row; a piece lies within one pair of runs
    pair = k.let(ir.idiv(start, width * 2) * (width * 2))
    middle = k.let(ir.minimum(pair + width, n))
    end = k.let(ir.minimum(pair + width * 2, n))
    diagonal = k.let(start - pair)
    # How many of the first `diagonal` results come from the left run.
    low = k.var("i32", ir.maximum(diagonal - (end - middle), 0))
    high = k.var("i32", ir.minimum(diagonal, middle - pair))
    with k.While(lambda: low < high):
        half = k.let(ir.shr(low + high, 1))
        left = keys.load(base + pair + half)
        right = keys.load(base + middle + (diagonal - 1 - half))
        with k.If(ir.le(left, right)):
            low.set(half + 1)
        with k.Else():
            high.set(half)
    a = k.var("i32", pair + low)
    b = k.var("i32", middle + (diagonal - low))
    with k.For(start, k.let(ir.minimum(start + piece, end))) as i:
        from_left = k.var("bool", ir.ge(b, end))
        with k.If(ir.and_(ir.lt(a, middle), ir.lt(b, end))):
            from_left.set(ir.le(keys.load(base + a), keys.load(base + b)))
        source = k.let(ir.where(from_left, a, b))
        it.buffers["out_keys"].store(base + i, keys.load(base + source))
        it.buffers["out_places"].store(base + i, places.load(base + source))
        a.set(a + ir.cast(from_left, "i32"))
        b.set(b + 1 - ir.cast(from_left, "i32"))


def _rows(x: Tensor) -> tuple[Any, Tensor, dict[str, Any]]:
    """(number of rows of x, x as kernels read its keys, sizes of the rows' dimensions as scalars)."""
    outer = x.sizes[:-1]
    source = x.with_dtype("u64") if x.dtype == "f64" else x
    if not outer:
        source = source.view((1, x.sizes[-1]), (0, x.strides[0]))
    return product(outer), source, {f"size{d}": s for d, s in enumerate(outer)}


def sorted_places(x: Tensor, descending: bool) -> Tensor:
    """[rows, n] i32: where in its row each element of the sorted rows (the last dimension) of x stood."""
    n = x.sizes[-1]
    outer = x.sizes[:-1]
    rows, source, names = _rows(x)
    key = key_dtype(x.dtype)
    pairs = [(empty((rows, n), key), empty((rows, n), "i32"))]
    each(
        "sort_runs",
        _sort_runs,
        (rows, cdiv(n, RUN)),
        {"keys": pairs[0][0].view((rows * n,)), "places": pairs[0][1].view((rows * n,)), "x": source},
        {"n": n, **names},
        static=(x.dtype, descending, max(len(outer), 1)),
        modes={"keys": "rw", "places": "rw"},
        cost=RUN * 4,
    )
    length = bucket(n) if not is_one(n) else 0
    simt = target().schedule_class != "vector"
    current = pairs[0]
    for step in range(max(length + 1 - RUN_BITS, 0)):
        if len(pairs) == 1:
            pairs.append((empty((rows, n), key), empty((rows, n), "i32")))
        following = pairs[1 - step % 2]
        width = RUN << step
        piece = 16 if simt else min(2 * width, 2048)  # divides the pair of runs
        each(
            "sort_merge",
            _merge,
            (rows, cdiv(n, piece)),
            {
                "out_keys": following[0].view((rows * n,)),
                "out_places": following[1].view((rows * n,)),
                "keys": current[0].view((rows * n,)),
                "places": current[1].view((rows * n,)),
            },
            {"n": n, "width": width, "piece": piece},
            cost=piece * 2,
        )
        current = following
    return current[1]


# ---- selection of the first k --------------------------------------------------------------------------------------


def _sink(it: Item, at: Callable[[Any], Any], size: Any, key: Any, place: Any) -> None:
    """Puts (key, place) for the root of a heap of `size` elements, the largest key on top; at: where an element lies."""
    k = it.k
    keys, places = it.buffers["keys"], it.buffers["places"]
    hole, child = k.var("i32", 0), k.var("i32", 1)
    with k.While(lambda: child < size):
        below = k.var(key.dtype, keys.load(at(child.as_node())))
        with k.If(child + 1 < size):
            right = k.let(keys.load(at(child + 1)))
            with k.If(ir.gt(right, below)):
                below.set(right)
                child.set(child + 1)
        with k.If(ir.gt(below, key)):
            keys.store(at(hole.as_node()), below)
            places.store(at(hole.as_node()), places.load(at(child.as_node())))
            hole.set(child)
            child.set(child * 2 + 1)
        with k.Else():
            child.set(size)
    keys.store(at(hole.as_node()), key)
    places.store(at(hole.as_node()), place)


def _best_of_pieces(it: Item) -> None:
    """Item (row, piece): the k smallest keys of a piece of a row, in order. Slot s of piece p of row r is [r, s, p]; each piece has at
    least k elements."""
    dtype, descending, rank, pieces, interleaved = it.static
    k = it.k
    n, count = it["n"], it["k"]
    row, piece = it.at
    start, stride = _row(it, row, rank)
    if interleaved:  # neighbouring invocations read neighbouring elements
        first, step, length = piece, pieces, k.let(ir.idiv(n - piece + (pieces - 1), pieces))
    else:
        whole = k.let(ir.idiv(n, pieces))
        rest = k.let(n - whole * pieces)
        first, step = k.let(whole * piece + ir.minimum(piece, rest)), 1
        length = k.let(whole + ir.cast(piece < rest, "i32"))
    base = k.let(row * count * pieces + piece)
    keys, places = it.buffers["keys"], it.buffers["places"]

    def at(slot: Any) -> Any:
        return base + slot * pieces

    def element(i: Any) -> tuple[Any, Any]:
        place = k.let(first + i * step)
        return k.let(sort_key(it.buffers["x"].load(start + place * stride), dtype, descending)), place

    with k.For(ir.const(0, "i32"), count) as i:
        key, place = element(i)
        hole = k.var("i32", i)
        rising = k.var("bool", True)
        with k.While(lambda: ir.and_(ir.gt(hole, 0), rising)):
            parent = k.let(ir.shr(hole - 1, 1))
            above = k.let(keys.load(at(parent)))
            with k.If(ir.lt(above, key)):
                keys.store(at(hole.as_node()), above)
                places.store(at(hole.as_node()), places.load(at(parent)))
                hole.set(parent)
            with k.Else():
                rising.set(False)
        keys.store(at(hole.as_node()), key)
        places.store(at(hole.as_node()), place)
    worst = k.var(key_dtype(dtype), keys.load(at(ir.const(0, "i32"))))

    def take(i: Any) -> None:
        key, place = element(i)
        with k.If(ir.lt(key, worst)):
            _sink(it, at, count, key, place)
            worst.set(keys.load(at(ir.const(0, "i32"))))

    i = k.var("i32", count)
    with k.While(lambda: i + AT_ONCE <= length):
        least = element(i.as_node())[0]
        for j in range(1, AT_ONCE):
            least = k.let(ir.minimum(least, element(i + j)[0]))
        with k.If(ir.lt(least, worst)), k.For(i.as_node(), k.let(i + AT_ONCE)) as at_j:  # rarely so
            take(at_j)
        i.set(i + AT_ONCE)
    with k.For(i.as_node(), length) as at_j:
        take(at_j)
    with k.For(ir.const(1, "i32"), count) as i:  # the root is the last of those that are left
        last = k.let(count - i)
        key, place = k.let(keys.load(at(last))), k.let(places.load(at(last)))
        keys.store(at(last), keys.load(at(ir.const(0, "i32"))))
        places.store(at(last), places.load(at(ir.const(0, "i32"))))
        _sink(it, at, last, key, place)


def _merge_best(it: Item) -> None:
    """Item (row, pair): the k smallest of pieces 2 * pair and 2 * pair + 1, in order."""
    (pieces,) = it.static
    k = it.k
    count = it["k"]
    row, pair = it.at
    left = k.let(row * count * pieces + pair * 2)
    out = k.let(row * count * (pieces // 2) + pair)
    keys, places = it.buffers["keys"], it.buffers["places"]
    a, b = k.var("i32", left), k.var("i32", left + 1)
    with k.For(ir.const(0, "i32"), count) as i:
        x, y = k.let(keys.load(a.as_node())), k.let(keys.load(b.as_node()))
        from_left = k.let(ir.le(x, y))
        it.buffers["out_keys"].store(out + i * (pieces // 2), ir.where(from_left, x, y))
        it.buffers["out_places"].store(
            out + i * (pieces // 2), places.load(k.let(ir.where(from_left, a.as_node(), b.as_node())))
        )
        with k.If(from_left):
            a.set(a + pieces)
        with k.Else():
            b.set(b + pieces)


MOST_SELECTED = 7  # log2 of what k is below; the elements of a piece are at least 8 k
AT_ONCE = 16  # elements that are looked at together
SELECTING = 15  # log2 of the invocations without which a GPU sorts faster than it selects


def _pieces(x: Tensor, count: Any) -> int:
    """Into how many pieces (a power of two) rows are cut to select from; 0 where they are sorted instead."""
    n = x.sizes[-1]
    bits_k = bucket(count)
    if is_one(n) or bits_k >= MOST_SELECTED or bucket(n) - bits_k < 4:
        return 0
    most = bucket(n) - bits_k - 4
    rows = sum(bucket(s) for s in x.sizes[:-1])
    vector = target().schedule_class == "vector"
    wanted = (4 * target().compute_units - 1).bit_length() if vector else SELECTING
    if not vector and rows + most < SELECTING:
        return 0
    return 1 << min(max(wanted - rows, 0), most)


def best_places(x: Tensor, count: Any, descending: bool, pieces: int) -> Tensor:
    """[rows, count] i32: where in its row each of the first elements of the sorted rows (the last dimension) of x stood."""
    rows, source, names = _rows(x)
    n, key = x.sizes[-1], key_dtype(x.dtype)
    keys, places = empty((rows * count * pieces,), key), empty((rows * count * pieces,), "i32")
    each(
        "select",
        _best_of_pieces,
        (rows, pieces),
        {"keys": keys, "places": places, "x": source},
        {"n": n, "k": count, **names},
        static=(x.dtype, descending, max(len(names), 1), pieces, target().schedule_class != "vector"),
        modes={"keys": "rw", "places": "rw"},
        cost=n // pieces * 4,
    )
    while pieces > 1:
        half = pieces // 2
        out_keys, out_places = empty((rows * count * half,), key), empty((rows * count * half,), "i32")
        each(
            "select_merge",
            _merge_best,
            (rows, half),
            {"out_keys": out_keys, "out_places": out_places, "keys": keys, "places": places},
            {"k": count},
            static=(pieces,),
            cost=count * 4,
        )
        keys, places, pieces = out_keys, out_places, half
    return places


def _pick_sorted(it: Item) -> None:
    place = it.load("places")
    if "out_indices" in it.buffers:
        it.store("out_indices", place)
    it.store("out", it.load("x", (*it.at[:-1], place)))


def sort_into(x: Tensor, dim: int, descending: bool, values: Tensor, indices: Tensor, selected: bool = False) -> None:
    """The first elements of sorted x along dim, as many as values and indices hold; selected: in any order among equal ones."""
    x, values, indices = at_least_1d(x), at_least_1d(values), at_least_1d(indices)
    dim = dim % x.ndim
    order = [d for d in range(x.ndim) if d != dim] + [dim]
    x, values, indices = x.permute(order), values.permute(order), indices.permute(order)
    if values.same_storage(x):
        x = copied(x)
    count = values.sizes[-1]
    pieces = _pieces(x, count) if selected else 0
    if pieces:
        places = best_places(x, count, descending, pieces).view((*x.sizes[:-1], count))
    else:
        places = sorted_places(x, descending).view(x.sizes)
    each(
        "sort_pick",
        _pick_sorted,
        values.sizes,
        {"out": bits(values), "out_indices": indices, "x": bits(x), "places": places},
    )


@stub("sort_stub", coarse=False)
def sort(self: Tensor, dim: int, descending: bool, stable: bool, values: Tensor, indices: Tensor) -> None:
    """Always stable. indices: i64."""
    if self.is_empty:
        return
    sort_into(self, dim, descending, values, indices)


@structured("topk")
def topk(self: Tensor, k: Any, dim: int, largest: bool, sorted: bool, values: Tensor, indices: Tensor) -> None:
    """The k largest (or smallest) elements along dim, in order whether asked or not; equal ones in any order."""
    if self.is_empty:
        return
    sort_into(self, dim, largest, values, indices, True)


# ---- order statistics ----------------------------------------------------------------------------------------------


def _finish(results: tuple[Any, Any], out_values: Any, out_indices: Any) -> Any:
    """results in the tensors of an out= overload."""
    values, indices = results
    return write_out(out_values, values), write_out(out_indices, indices)


def _wrapped(dim: int, ndim: int) -> int:
    n = max(ndim, 1)
    if not -n <= dim < n:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})")
    return dim % n


def _shaped(name: str, self: Any, dim: int, keepdim: bool) -> tuple[Any, int]:
    dim = _wrapped(dim, self.dim())
    if self.dim() and self.shape[dim] == 0:
        raise IndexError(f"{name}(): Expected reduction dim {dim} to have non-zero size.")
    return (self.reshape(1), 0) if self.dim() == 0 else (self, dim)


def _select_sorted(
    self: Any, dim: int, keepdim: bool, zero_dim: bool, place: Any, sorted_: Any = None
) -> tuple[Any, Any]:
    """The element at `place` (an int, or a tensor of the reduced shape with dim kept) of the sorted rows."""
    values, indices = sorted_ if sorted_ is not None else torch.sort(self, dim=dim, stable=True)
    if isinstance(place, int):
        values, indices = values.narrow(dim, place, 1), indices.narrow(dim, place, 1)
    else:
        values, indices = values.gather(dim, place), indices.gather(dim, place)
    if zero_dim:
        return values.reshape(()), indices.reshape(())
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


@composite("kthvalue.values")
def kthvalue(self: Any, k: int, dim: int = -1, keepdim: bool = False, *, values: Any, indices: Any) -> Any:
    """The k-th smallest element along dim, and where it is."""
    if values.dtype != self.dtype:
        raise RuntimeError("output values must be of same type as input")
    if any(torch._C._is_alias_of(self, out) for out in (values, indices)):  # type: ignore[attr-defined]
        raise RuntimeError(
            "unsupported operation: some elements of the input tensor and the written-to tensor refer to a single memory "
            "location. Please clone() the tensor before performing the operation."
        )
    x, dim = _shaped("kthvalue", self, dim, keepdim)
    if not 1 <= k <= x.shape[dim]:
        raise RuntimeError("kthvalue(): selected number k out of range for dimension " + str(dim))
    return _finish(_select_sorted(x, dim, keepdim, self.dim() == 0, k - 1), values, indices)


def _median(self: Any, dim: int, keepdim: bool, ignore_nan: bool) -> tuple[Any, Any]:
    x, dim = _shaped("median", self, dim, keepdim)
    n = x.shape[dim]
    if not x.is_floating_point():
        return _select_sorted(x, dim, keepdim, self.dim() == 0, (n - 1) // 2)
    sorted_ = torch.sort(x, dim=dim, stable=True)
    numbers = torch.logical_not(torch.isnan(x)).sum(dim, keepdim=True)
    middle = torch.div(numbers - 1, 2, rounding_mode="floor").clamp_min(0)
    if not ignore_nan:  # the first NaN, where there is one
        middle = torch.where(numbers < n, numbers, torch.full_like(numbers, (n - 1) // 2))
    return _select_sorted(x, dim, keepdim, self.dim() == 0, middle, sorted_)


@composite("median.dim_values")
def median_dim(self: Any, dim: int, keepdim: bool = False, *, values: Any, indices: Any) -> Any:
    """The lower median along dim; NaN where there is one."""
    return _finish(_median(self, dim, keepdim, False), values, indices)


@composite("nanmedian.dim_values")
def nanmedian_dim(self: Any, dim: int, keepdim: bool = False, *, values: Any, indices: Any) -> Any:
    """The lower median along dim of what is not NaN."""
    return _finish(_median(self, dim, keepdim, True), values, indices)


def _median_all(self: Any, ignore_nan: bool) -> Any:
    if self.numel() == 0:
        return torch.full((), math.nan, dtype=self.dtype, device=self.device)
    return _median(self.reshape(-1), 0, False, ignore_nan)[0].reshape(())


@composite("median")
def median(self: Any) -> Any:
    """The lower median of all elements; NaN where there is one."""
    return _median_all(self, False)


@composite("nanmedian")
def nanmedian(self: Any) -> Any:
    """The lower median of all elements that are not NaN."""
    return _median_all(self, True)


def _longest_run(it: Item) -> None:
    """The first of the longest runs of a sorted row, and the last place where its value stood."""
    (dim,) = it.static
    k = it.k

    def at(i: Any) -> tuple[Any, ...]:
        return replace(it.at, dim, i)

    length = k.var("i32", 0)
    longest = k.var("i32", 0)
    best = k.var("i32", 0)
    with k.For(ir.const(0, "i32"), it["n"]) as i:
        before = it.load("x", at(ir.maximum(i - 1, 0)))
        length.set(ir.where(ir.eq(it.load("x", at(i)), before), length + 1, 1))
        with k.If(ir.gt(length, longest)):
            longest.set(length)
            best.set(i)
    it.store("out", it.load("x", at(best)))
    it.store("out_indices", it.load("order", at(best)))


@operator("mode_(Tensor(a!) values, Tensor(b!) indices, Tensor sorted, Tensor order, int dim) -> ()")
def mode_(values: Tensor, indices: Tensor, sorted_: Tensor, order: Tensor, dim: int) -> None:
    """mode along dim, which values and indices keep, of what a stable sort gave."""
    operands = {"out": values, "out_indices": indices, "x": sorted_, "order": order}
    n = sorted_.sizes[dim]
    each("mode", _longest_run, values.sizes, operands, {"n": n}, static=(dim,), cost=n)


@composite("mode")
def mode(self: Any, dim: int = -1, keepdim: bool = False) -> tuple[Any, Any]:
    """The most frequent element along dim, the smallest of equally frequent ones, and the last place where it is."""
    x, dim = _shaped("mode", self, dim, keepdim)
    shape = [1 if d == dim else n for d, n in enumerate(x.shape)]
    values = torch.empty(shape, dtype=x.dtype, device=x.device)
    indices = torch.empty(shape, dtype=torch.int64, device=x.device)
    if values.numel():
        torch.ops.spiral.mode_(values, indices, *torch.sort(x, dim=dim, stable=True), dim)
    if self.dim() == 0:
        return values.reshape(()), indices.reshape(())
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


@composite("mode.values")
def mode_values(self: Any, dim: int = -1, keepdim: bool = False, *, values: Any, indices: Any) -> Any:
    if values.dtype != self.dtype:
        raise RuntimeError(f"expected scalar type '{self.dtype}' for values but got '{values.dtype}'")
    if indices.dtype != torch.int64:
        raise RuntimeError(f"expected scalar type 'Long' for indices but got '{indices.dtype}'")
    return _finish(mode(self, dim, keepdim), values, indices)


# ---- searching -----------------------------------------------------------------------------------------------------


def _search(it: Item) -> None:
    """The place of each value by binary search in its row of boundaries."""
    right, dtype, sorted_ = it.static
    k = it.k
    row = it.at[0]
    value = value_of(it, dtype) if dtype else it.load("x")
    n = it["n"]
    low = k.var("i32", 0)
    high = k.var("i32", n)
    with k.While(lambda: low < high):
        half = k.let(low + ir.shr(high - low, 1))
        place: Any = half
        if sorted_:
            place = k.let(ir.cast(it.load("sorter", (row, half)), "i32"))
        bound = it.load("bounds", (row, place))
        stop = ir.gt(bound, value) if right else ir.ge(bound, value)
        with k.If(ir.logical_not(stop)):
            low.set(half + 1)
        with k.Else():
            high.set(half)
    it.store("out", low)


@operator(
    "search_(Tensor(a!) out, Tensor bounds, Tensor? values, Scalar? value, Tensor? sorter, bool right) -> ()",
    coarse=True,
)
def search_(out: Tensor, bounds: Tensor, values: Tensor | None, value: Any, sorter: Tensor | None, right: bool) -> None:
    """out[r][i] = the place of values[r][i] (or of `value`) in bounds[r]; bounds: [rows or 1, n]. Contiguous tensors."""
    rows, m = out.sizes
    operands = {"out": out}
    scalars: dict[str, Any] = {"n": bounds.sizes[1]}

    def by_row(x: Tensor) -> Tensor:
        return x.view((rows, x.sizes[1]), (0 if is_one(x.sizes[0]) else x.strides[0], 1))

    operands["bounds"] = by_row(bounds)
    dtype = None
    if values is not None:
        operands["x"] = values
    else:
        dtype = bounds.dtype
        scalars |= number(value, dtype)
    if sorter is not None:
        operands["sorter"] = by_row(sorter)
    each("search", _search, (rows, m), operands, scalars, static=(right, dtype, sorter is not None), cost=16)


def _searchsorted(
    name: str, bounds: Any, values: Any, out_int32: bool, right: bool, side: str | None, sorter: Any, out: Any
) -> Any:
    if side is not None:
        if side not in ("left", "right"):
            raise RuntimeError(f"torch.searchsorted(): side can only be 'left' or 'right' but got {side}")
        if side == "left" and right:
            raise RuntimeError(
                "torch.searchsorted(): side and right can't be set to opposites, got side of left while right was True"
            )
        right = right or side == "right"
    dtype = torch.int32 if out_int32 else torch.int64
    scalar = not isinstance(values, torch.Tensor)
    if not scalar and values.device != bounds.device and values.dim() == 0:
        values = values.to(bounds.device)
    if not scalar and values.device != bounds.device:
        raise RuntimeError(
            "torch.searchsorted(): boundaries and input value tensors should have same device type, but got "
            f"boundaries tensor device type {bounds.device} and input value tensor device type {values.device}"
        )
    shape = [] if scalar else list(values.shape)
    if bounds.dim() == 0:
        raise RuntimeError(
            "torch.searchsorted(): boundaries tensor should have positive dimension, but got 0 dimension"
        )
    if scalar or values.dim() == 0:
        if bounds.dim() != 1:
            raise RuntimeError(
                "torch.searchsorted(): input value can be a scalar only when boundaries tensor dimension is 1, but we got "
                f"boundaries tensor dim({bounds.dim()}) and input value's dim(0) numel(1)"
            )
    elif bounds.dim() != 1 and (bounds.dim() != values.dim() or bounds.shape[:-1] != values.shape[:-1]):
        raise RuntimeError(
            "torch.searchsorted(): boundaries tensor should be 1 dimension or the first N-1 dimensions of boundaries tensor "
            f"and input value tensor must match, but we got boundaries tensor {list(bounds.shape)} and input value tensor "
            f"{shape}"
        )
    if not scalar and bounds.dtype != values.dtype:
        if name == "bucketize":
            common = torch.promote_types(bounds.dtype, values.dtype)
            bounds, values = bounds.to(common), values.to(common)
        else:
            raise RuntimeError(
                "torch.searchsorted(): boundary tensor and input value tensor should have same dtype, but got boundary tensor "
                f"dtype {bounds.dtype} and input value tensor dtype {values.dtype}"
            )
    if scalar and isinstance(values, float) and not bounds.is_floating_point():
        bounds = bounds.to(torch.get_default_dtype())
    if sorter is not None:
        if sorter.shape != bounds.shape:
            raise RuntimeError(
                "torch.searchsorted(): boundary and sorter must have the same size, but got boundary tensor "
                f"{list(bounds.shape)}and got sorter tensor {list(sorter.shape)}"
            )
        if sorter.dtype != torch.int64:
            raise RuntimeError(
                f"torch.searchsorted(): sorter must be a tensor of long dtype but got dtype {sorter.dtype}"
            )
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=bounds.device)
    else:
        if out.dtype != dtype:
            raise RuntimeError(
                "torch.searchsorted(): output tensor's dtype is wrong, it can only be Int(int32) or Long(int64) depending on "
                f"whether out_int32 flag is True, but we got output tensor's dtype {out.dtype} and out_int32 flag is {out_int32}"
            )
        resize_out(out, shape)
    if out.numel() == 0:
        return out
    if bounds.shape[-1] == 0:
        return out.zero_()
    rows = bounds.numel() // bounds.shape[-1]
    m = out.numel() // rows
    target_ = out if out.is_contiguous() else torch.empty(shape, dtype=dtype, device=bounds.device)
    torch.ops.spiral.search_(
        target_.view(rows, m),
        bounds.contiguous().view(rows, bounds.shape[-1]),
        None if scalar else values.contiguous().view(rows, m),
        values if scalar else None,
        None if sorter is None else sorter.contiguous().view(rows, bounds.shape[-1]),
        right,
    )
    return out if target_ is out else out.copy_(target_)


@composite("searchsorted.Tensor", "searchsorted.Scalar")
def searchsorted(
    sorted_sequence: Any,
    self: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: Any = None,
    sorter: Any = None,
) -> Any:
    """Where each value would be inserted into its sorted row."""
    return _searchsorted("searchsorted", sorted_sequence, self, out_int32, right, side, sorter, None)


@composite("searchsorted.Tensor_out", "searchsorted.Scalar_out")
def searchsorted_out(
    sorted_sequence: Any,
    self: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: Any = None,
    sorter: Any = None,
    out: Any,
) -> Any:
    return _searchsorted("searchsorted", sorted_sequence, self, out_int32, right, side, sorter, out)


def _check_boundaries(boundaries: Any) -> None:
    if boundaries.dim() != 1:
        raise RuntimeError(f"boundaries tensor must be 1 dimension, but got dim({boundaries.dim()})")


@composite("bucketize.Tensor")
def bucketize(self: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """searchsorted in one vector of boundaries."""
    _check_boundaries(boundaries)
    return _searchsorted("bucketize", boundaries, self, out_int32, right, None, None, None)


@composite("bucketize.Tensor_out")
def bucketize_out(self: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False, out: Any) -> Any:
    _check_boundaries(boundaries)
    return _searchsorted("bucketize", boundaries, self, out_int32, right, None, None, out)


@composite("bucketize.Scalar")
def bucketize_scalar(self: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    _check_boundaries(boundaries)
    return _searchsorted("bucketize", boundaries, self, out_int32, right, None, None, None)


def _isin(it: Item) -> None:
    """Compares with every test element."""
    (invert,) = it.static
    k = it.k
    value = it.load("x")
    found = k.var("bool", False)
    with k.For(ir.const(0, "i32"), it["n"]) as j, k.If(ir.eq(it.load("test", (j,)), value)):
        found.set(True)
        k.Break()
    it.store("out", ir.logical_not(found) if invert else found.as_node())


@stub("isin_default_stub")
def isin(elements: Tensor, test_elements: Tensor, invert: bool, out: Tensor) -> None:
    """out = whether each element is among test_elements."""
    test = contiguous(test_elements)
    test = test.view((test.numel,))
    if not out.ndim:
        out, elements = out.view((1,), (0,)), elements.view((1,), (0,))
    operands = {"out": out, "x": elements, "test": test}
    each("isin", _isin, out.sizes, operands, {"n": test.sizes[0]}, static=(bool(invert),), cost=16)


def _check_isin(element: Any, test_elements: Any) -> None:
    kinds = {bool: "Bool", complex: "ComplexDouble"}
    dtypes = {torch.bool: "Bool", torch.complex64: "ComplexFloat", torch.complex128: "ComplexDouble"}
    refused = kinds.get(type(element)) or dtypes.get(test_elements.dtype)
    if refused:
        raise RuntimeError(f"Unsupported input type encountered for isin(): {refused}")


@composite("isin.Scalar_Tensor")
def isin_scalar(element: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False) -> Any:
    """Whether (invert: whether not) a number, rounded to the elements' dtype, is among them."""
    _check_isin(element, test_elements)
    found = (test_elements == element).any()
    return found.logical_not_() if invert else found


@composite("isin.Scalar_Tensor_out")
def isin_scalar_out(
    element: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False, out: Any
) -> Any:
    if out.dtype != torch.bool:
        got = _CPP_NAMES.get(out.dtype, out.dtype)
        raise RuntimeError(f"Expected out tensor to have dtype bool, but got {got} instead")
    resize_out(out, ())
    return out.copy_(isin_scalar(element, test_elements, invert=invert))


# ---- unique --------------------------------------------------------------------------------------------------------


def _groups(changed: Any, order: Any, return_inverse: bool, return_counts: bool) -> tuple[Any, Any, Any]:
    """(where groups start, the group of every element, sizes of groups) of runs; changed: bool, whether an element differs
    from the one before. order: where the elements stood before sorting, or None."""
    device, n = changed.device, changed.numel()
    none = torch.empty(0, dtype=torch.int64, device=device)
    starts = torch.nonzero(changed).view(-1)
    inverse = counts = none
    if return_inverse:
        group = changed.cumsum(0, dtype=torch.int64) - 1
        inverse = group if order is None else torch.empty_like(group).scatter_(0, order, group)
    if return_counts:
        ends = torch.cat([starts[1:], torch.full((1,), n, dtype=torch.int64, device=device)])
        counts = ends - starts
    return starts, inverse, counts


def _changes(x: Any) -> Any:
    """Whether each element (or, of a matrix, row) differs from the one before; the first does."""
    differs = x[1:] != x[:-1]
    if x.dim() > 1:
        differs = differs.flatten(1).any(1)
    return torch.cat([torch.ones(1, dtype=torch.bool, device=x.device), differs])


def _unique_flat(self: Any, return_inverse: bool, return_counts: bool, consecutive: bool) -> tuple[Any, Any, Any]:
    none = torch.empty(0, dtype=torch.int64, device=self.device)
    x = self.reshape(-1)
    if x.numel() == 0:
        inverse = torch.empty(self.shape, dtype=torch.int64, device=self.device) if return_inverse else none
        return torch.empty(0, dtype=self.dtype, device=self.device), inverse, none
    order = None
    if not consecutive:
        x, order = torch.sort(x, stable=True)
    starts, inverse, counts = _groups(_changes(x), order, return_inverse, return_counts)
    return x.index_select(0, starts), inverse.view(self.shape) if return_inverse else inverse, counts


@composite("_unique2")
def unique2(self: Any, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False) -> Any:
    """(sorted distinct elements, the place of each element among them, how often each comes). Waits for the number."""
    return _unique_flat(self, return_inverse, return_counts, False)


@composite("_unique")
def unique(self: Any, sorted: bool = True, return_inverse: bool = False) -> Any:
    return _unique_flat(self, return_inverse, False, False)[:2]


def _unique_rows(
    self: Any, dim: int, return_inverse: bool, return_counts: bool, consecutive: bool
) -> tuple[Any, Any, Any]:
    dim = _wrapped(dim, self.dim())
    none = torch.empty(0, dtype=torch.int64, device=self.device)
    if self.numel() == 0:
        if self.shape[dim] != 0:
            raise RuntimeError("There are 0 sized dimensions, and they aren't selected, so unique cannot be applied")
        return torch.empty(self.shape, dtype=self.dtype, device=self.device), none, none
    rows = self.movedim(dim, 0).reshape(self.shape[dim], -1)
    order = None
    if not consecutive:  # the last column first: the sorts are stable
        order = torch.arange(rows.shape[0], device=self.device)
        for column in reversed(range(rows.shape[1])):
            order = order[torch.sort(rows[:, column][order], stable=True)[1]]
        rows = rows.index_select(0, order)
    starts, inverse, counts = _groups(_changes(rows), order, return_inverse, return_counts)
    picked = starts if order is None else order.index_select(0, starts)
    return self.index_select(dim, picked), inverse, counts


@composite("unique_dim")
def unique_dim(
    self: Any, dim: int, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> Any:
    """unique of slices along dim."""
    return _unique_rows(self, dim, return_inverse, return_counts, False)


@composite("unique_dim_consecutive")
def unique_dim_consecutive(self: Any, dim: int, return_inverse: bool = False, return_counts: bool = False) -> Any:
    return _unique_rows(self, dim, return_inverse, return_counts, True)


@composite("unique_consecutive")
def unique_consecutive(
    self: Any, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> Any:
    """The first element of every run of equal ones."""
    if dim is None or (self.dim() == 1 and dim in (0, -1)):
        return _unique_flat(self, return_inverse, return_counts, True)
    return _unique_rows(self, dim, return_inverse, return_counts, True)


# ---- counting ------------------------------------------------------------------------------------------------------


@composite("bincount")
def bincount(self: Any, weights: Any = None, minlength: int = 0) -> Any:
    """How often each number comes, or the sum of its weights. Waits for the largest number."""
    if minlength < 0:
        raise RuntimeError("minlength should be >= 0")
    if self.dim() != 1 or self.dtype.is_floating_point or self.dtype.is_complex or self.dtype == torch.bool:
        if self.dim() == 1 and self.numel() == 0:
            return torch.zeros(minlength, dtype=torch.int64, device=self.device)
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    if weights is not None and (weights.dim() != 1 or weights.numel() != self.numel()):
        raise RuntimeError("weights should be 1-d and have the same length as input")
    if self.numel() == 0:
        return torch.zeros(minlength, dtype=torch.int64, device=self.device)
    lowest, highest = torch.stack([self.min().long(), self.max().long()]).tolist()
    if lowest < 0:
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    size = max(highest + 1, minlength)
    if weights is None:
        counts = torch.zeros(size, dtype=torch.int64, device=self.device)
        return counts.scatter_add_(0, self.long(), torch.ones_like(self, dtype=torch.int64))
    dtype = weights.dtype if weights.dtype == torch.float32 else torch.float64
    return torch.zeros(size, dtype=dtype, device=self.device).scatter_add_(0, self.long(), weights.to(dtype))


def _histc(self: Any, bins: int, low: Any, high: Any) -> Any:
    if bins <= 0:
        raise RuntimeError("bins must be > 0")
    x = self.reshape(-1)
    low, high = float(low), float(high)
    if low == high and x.numel():
        low, high = (float(v) for v in torch.stack([x.min(), x.max()]).tolist())
    if low == high:
        low, high = low - 1, high + 1
    if not (math.isfinite(low) and math.isfinite(high)):
        raise RuntimeError(f"range of [{low:g}, {high:g}] is not finite")
    if low > high:
        raise RuntimeError("max must be larger than min")
    counts = torch.zeros(bins, dtype=self.dtype, device=self.device)
    if x.numel() == 0:
        return counts
    inside = (x >= low) & (x <= high)
    place = ((x - low) * bins / (high - low)).to(torch.int64).clamp(0, bins - 1)
    place = torch.where(inside, place, torch.zeros_like(place))
    return counts.scatter_add_(0, place, inside.to(self.dtype))


@composite("histc")
def histc(self: Any, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    """How many elements lie in each of `bins` equal parts of [min, max]."""
    return _histc(self, bins, min, max)


_CPP_NAMES = {torch.float32: "float", torch.float64: "double", torch.int32: "int", torch.int64: "long int"}


def _check_hist(self: Any, hist: Any) -> None:
    if hist.dtype != self.dtype:
        names = (_CPP_NAMES.get(d, str(d)) for d in (self.dtype, hist.dtype))
        raise RuntimeError(
            "torch.histogram: input tensor and hist tensor should have the same dtype, but got input {} and hist {}".format(
                *names
            )
        )


@composite("histc.out")
def histc_out(self: Any, bins: int = 100, min: Any = 0, max: Any = 0, *, out: Any) -> Any:
    _check_hist(self, out)
    return write_out(out, _histc(self, bins, min, max))


def _histogramdd(self: Any, edges: Sequence[Any], weight: Any, density: bool) -> Any:
    """self: [points, dimensions]. Points on the last edge count as in the last bin; others outside are left out."""
    points = self.reshape(-1, self.shape[-1])
    shape = [e.numel() - 1 for e in edges]
    total = math.prod(shape)
    flat = torch.zeros(points.shape[0], dtype=torch.int64, device=self.device)
    inside = torch.ones(points.shape[0], dtype=torch.bool, device=self.device)
    for d, e in enumerate(edges):
        column = points[:, d].contiguous()
        inside &= (column >= e[0]) & (column <= e[-1])
        place = torch.searchsorted(e.contiguous(), column, right=True) - 1
        place = torch.where(column == e[-1], torch.full_like(place, shape[d] - 1), place)
        flat = flat * shape[d] + place.clamp(0, max(shape[d] - 1, 0))
    amount = inside.to(self.dtype)
    if weight is not None:
        amount = torch.where(inside, weight.reshape(-1).to(self.dtype), amount)
    hist = torch.zeros(total, dtype=self.dtype, device=self.device)
    if total and flat.numel():
        hist.scatter_add_(0, torch.where(inside, flat, torch.zeros_like(flat)), amount)
    hist = hist.view(shape)
    if density:
        hist = hist / hist.sum()
        for d, e in enumerate(edges):
            widths = e[1:] - e[:-1]
            hist = hist / widths.view([-1 if i == d else 1 for i in range(len(edges))])
    return hist


def _bin_edges(self: Any, bins: Sequence[int], range_: Any, weight: Any) -> list[Any]:
    points = self.reshape(-1, self.shape[-1])
    edges = []
    if len(bins) != self.shape[-1]:
        raise RuntimeError("histogramdd: The size of bins must be equal to the innermost dimension of the input.")
    if range_ is not None and len(range_) != 2 * len(bins):
        raise RuntimeError(
            f"torch.histogramdd: for a {len(bins)}-dimensional histogram range should have {2 * len(bins)} elements, but got "
            f"{len(range_)}"
        )
    for d, n in enumerate(bins):
        if n <= 0:
            raise RuntimeError(f"torch.histogramdd: bins must be > 0, but got {n} for dimension {d}")
        if range_ is not None:
            low, high = float(range_[2 * d]), float(range_[2 * d + 1])
        elif points.numel() == 0:
            low, high = 0.0, 1.0
        else:
            low, high = torch.stack([points[:, d].min(), points[:, d].max()]).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RuntimeError(f"torch.histogramdd: dimension {d}'s range [{low:g}, {high:g}] is not finite")
        if low > high:
            raise RuntimeError(
                f"torch.histogramdd: min should not exceed max, but got min {low:g} max {high:g} for dimension {d}"
            )
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges.append(torch.linspace(low, high, n + 1, dtype=self.dtype, device=self.device))
    return edges


@composite("_histogramdd_bin_edges")
def histogramdd_bin_edges(self: Any, bins: Any, *, range: Any = None, weight: Any = None, density: bool = False) -> Any:
    return _bin_edges(self, bins, range, weight)


@composite("_histogramdd_from_bin_cts")
def histogramdd_from_bin_cts(
    self: Any, bins: Any, *, range: Any = None, weight: Any = None, density: bool = False
) -> Any:
    return _histogramdd(self, _bin_edges(self, bins, range, weight), weight, density)


@composite("_histogramdd_from_bin_tensors")
def histogramdd_from_bin_tensors(self: Any, bins: Any, *, weight: Any = None, density: bool = False) -> Any:
    return _histogramdd(self, bins, weight, density)


@composite("histogram.bin_ct")
def histogram(self: Any, bins: int = 100, *, range: Any = None, weight: Any = None, density: bool = False) -> Any:
    """(hist, bin_edges) of `bins` equal bins."""
    flat = self.reshape(-1, 1)
    edges = _bin_edges(flat, [bins], range, weight)
    return _histogramdd(flat, edges, weight, density), edges[0]


@composite("histogram.bins_tensor")
def histogram_bins(self: Any, bins: Any, *, weight: Any = None, density: bool = False) -> Any:
    """(hist, bin_edges) of bins between given edges."""
    if bins.dim() != 1 or bins.numel() == 0:
        raise RuntimeError("torch.histogram: bins tensor should have one dimension and at least one element")
    return _histogramdd(self.reshape(-1, 1), [bins], weight, density), bins.clone()


@composite("histogram.bin_ct_out")
def histogram_out(
    self: Any,
    bins: int = 100,
    *,
    range: Any = None,
    weight: Any = None,
    density: bool = False,
    hist: Any,
    bin_edges: Any,
) -> Any:
    _check_hist(self, hist)
    return _finish(histogram(self, bins, range=range, weight=weight, density=density), hist, bin_edges)


@composite("histogram.bins_tensor_out")
def histogram_bins_out(
    self: Any, bins: Any, *, weight: Any = None, density: bool = False, hist: Any, bin_edges: Any
) -> Any:
    _check_hist(self, hist)
    return _finish(histogram_bins(self, bins, weight=weight, density=density), hist, bin_edges)
