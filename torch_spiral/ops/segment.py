"""segment_reduce and its gradient: reductions of consecutive slices whose lengths are data."""

from __future__ import annotations

import math
from typing import Any

from ..kernels import ir
from ..kernels.kernel import compute_dtype
from ..lowering import Sym, Tensor, empty, stub
from .common import fill
from .index import MAX, MEAN, MIN, PROD, SUM, combine
from .items import Item, each


def _offsets(it: Item) -> None:
    """Running sum of a row of lengths, its total last."""
    k = it.k
    total = k.var("i32", 0)
    row = it.at[:-1]
    with k.For(ir.const(0, "i32"), it["segments"]) as s:
        it.store("out", total, (*row, s))
        total.set(total + ir.cast(it.load("lengths", (*row, s)), "i32"))
    it.store("out", total, (*row, it["segments"]))


def offsets_of(lengths: Tensor) -> Tensor:
    """[..., segments + 1] from [..., segments]."""
    segments = lengths.sizes[-1]
    out = empty((*lengths.sizes[:-1], segments + 1), "i32")
    sizes = (*lengths.sizes[:-1], 1)
    each("segment_offsets", _offsets, sizes, {"out": out, "lengths": lengths}, {"segments": segments}, cost=segments)
    return out


def _bounds(it: Item, axis: int) -> tuple[Any, Any]:
    row = it.at[:axis]
    segment = it.at[axis]
    begin = it.k.let(ir.cast(it.load("offsets", (*row, segment)), "i32"))
    end = it.k.let(ir.cast(it.load("offsets", (*row, segment + 1)), "i32"))
    return begin, end


def _start(it: Item, reduce: int, part: str) -> Any:
    if "initial" in it.scalars:
        return ir.cast(it["initial"], part)
    return ir.const({MAX: -math.inf, MIN: math.inf, PROD: 1.0}.get(reduce, 0.0), part)


def _reduce(it: Item) -> None:
    axis, reduce, dtype = it.static
    k = it.k
    part = compute_dtype(dtype)
    begin, end = _bounds(it, axis)
    total = k.var(part, _start(it, reduce, part))
    with k.For(begin, end) as i:
        total.set(combine(reduce, total.as_node(), it.load("data", (*it.at[:axis], i, *it.at[axis + 1 :]))))
    result = total.as_node()
    if reduce == MEAN:
        length = end - begin
        mean = result / ir.cast(ir.maximum(length, 1), part)
        empty_one = result if "initial" in it.scalars else ir.const(math.nan, part)
        result = ir.where(ir.gt(length, 0), mean, empty_one)
    it.store("out", result)


def _initial(initial: Any) -> dict[str, Any]:
    if initial is None:
        return {}
    return {"initial": ("f32", initial)} if isinstance(initial, Sym | int | float) else {"initial": ("f32", initial[0])}


def _segment_reduce(reduce: int, data: Tensor, offsets: Tensor, axis: int, initial: Any) -> Tensor:
    sizes = (*offsets.sizes[:-1], offsets.sizes[-1] - 1, *data.sizes[axis + 1 :])
    out = empty(sizes, data.dtype)
    operands = {"out": out, "data": data, "offsets": offsets}
    each("segment_reduce", _reduce, sizes, operands, _initial(initial), static=(axis, reduce, data.dtype), cost=16)
    return out


@stub("_segment_reduce_lengths_stub")
def segment_reduce_lengths(reduce: int, data: Tensor, lengths: Tensor, axis: int, initial: Any) -> Tensor:
    """lengths: [..., segments], of the dimensions of data up to axis."""
    return _segment_reduce(reduce, data, offsets_of(lengths), axis, initial)


@stub("_segment_reduce_offsets_stub")
def segment_reduce_offsets(reduce: int, data: Tensor, offsets: Tensor, axis: int, initial: Any) -> Tensor:
    """offsets: [..., segments + 1]."""
    return _segment_reduce(reduce, data, offsets, axis, initial)


def _backward(it: Item) -> None:
    axis, reduce, dtype = it.static
    k = it.k
    part = compute_dtype(dtype)
    begin, end = _bounds(it, axis)
    grad = it.load("grad")

    def at(i: Any) -> tuple[Any, ...]:
        return (*it.at[:axis], i, *it.at[axis + 1 :])

    if reduce in (MAX, MIN):  # shared equally by all elements that are the result
        result = it.load("result")

        def is_result(i: Any) -> Any:
            x = it.load("data", at(i))
            return ir.or_(ir.isnan(x), ir.eq(x, result))

        count = k.var("i32", 0)
        with k.For(begin, end) as i:
            count.set(count + ir.cast(is_result(i), "i32"))
        with k.For(begin, end) as i, k.If(is_result(i)):
            it.store("out", grad / ir.cast(count, part), at(i))
    elif reduce == PROD:
        result = it.load("result")
        with k.For(begin, end) as i:
            x = k.let(it.load("data", at(i)))
            with k.If(ir.or_(ir.eq(x, 0.0), ir.isnan(x))):
                others = k.var(part, _start(it, PROD, part))
                with k.For(begin, end) as j, k.If(ir.ne(i, j)):
                    others.set(others * it.load("data", at(j)))
                it.store("out", grad * others, at(i))
            with k.Else():
                it.store("out", grad * result / x, at(i))
    else:
        share = grad / ir.cast(ir.maximum(end - begin, 1), part) if reduce == MEAN else grad
        with k.For(begin, end) as i:
            it.store("out", share, at(i))


def _segment_backward(
    grad: Tensor, result: Tensor, data: Tensor, reduce: int, offsets: Tensor, axis: int, initial: Any
) -> Tensor:
    assert reduce in (MAX, MEAN, MIN, SUM, PROD)
    out = empty(data.sizes, grad.dtype)
    fill(out, 0)
    operands = {"out": out, "grad": grad, "result": result, "data": data, "offsets": offsets}
    each(
        "segment_backward",
        _backward,
        grad.sizes,
        operands,
        _initial(initial),
        static=(axis, reduce, grad.dtype),
        cost=16,
    )
    return out


@stub("_segment_reduce_lengths_backward_stub")
def segment_reduce_lengths_backward(
    grad: Tensor, result: Tensor, data: Tensor, reduce: int, lengths: Tensor, axis: int, initial: Any
) -> Tensor:
    """The gradient of data; elements of no segment get 0."""
    return _segment_backward(grad, result, data, reduce, offsets_of(lengths), axis, initial)


@stub("_segment_reduce_offsets_backward_stub")
def segment_reduce_offsets_backward(
    grad: Tensor, result: Tensor, data: Tensor, reduce: int, offsets: Tensor, axis: int, initial: Any
) -> Tensor:
    """The gradient of data; elements of no segment get 0."""
    return _segment_backward(grad, result, data, reduce, offsets, axis, initial)
