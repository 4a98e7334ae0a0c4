"""Embedding tables: gradients of embedding, and embedding_bag. The lookup itself is index_select."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels import ir
from ..kernels.kernel import compute_dtype
from ..lowering import Tensor, composite, empty, lowering
from .common import contiguous, fill
from .index import SUM, atomic, count_indices
from .items import Item, each

BAG_SUM, BAG_MEAN, BAG_MAX = range(3)


# ---- embedding -----------------------------------------------------------------------------------------------------


def _add(it: Item, place: Any, value: Any, in_order: bool) -> None:
    """weight[place] += value; atomically, but where one item adds up all of a column in order."""
    weight = it.buffers["weight"]
    if in_order:
        weight.store(place, weight.load(place) + value)
    else:
        weight.atomic_add(place, value)


def _every(it: Item, in_order: bool, one: Callable[[Any], None]) -> None:
    """one(j) of every index j, in a loop, or of the item's own."""
    if in_order:
        with it.k.For(ir.const(0, "i32"), it["length"]) as j:
            one(j)
    else:
        one(it.at[0])


def _embedding_backward(it: Item) -> None:
    dtype, in_order, scaled = it.static
    k = it.k

    def one(j: Any) -> None:
        index = it.check(it.load("index", (j,)), 0, it["n"])
        with k.If(ir.ne(index, it["padding"])):
            value = it.load("grad", (j, it.at[1]))
            if scaled:
                value = value / ir.cast(it.load("counts", (index,)), compute_dtype(dtype))
            _add(it, it.offset("weight", (index, it.at[1])), value, in_order)

    _every(it, in_order, one)


@lowering("embedding_dense_backward", slots=("num_weights", "padding_idx"))
def embedding_dense_backward(
    grad: Tensor, indices: Tensor, num_weights: Any, padding_idx: Any, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of the weight: rows of grad added up by index, those of padding_idx left out."""
    width = grad.sizes[-1]
    out = empty((num_weights, width), grad.dtype)
    fill(out, 0)
    index = contiguous(indices)
    index = index.view((index.numel,))
    grad = contiguous(grad)
    grad = grad.view((index.numel, width))
    in_order = not atomic(SUM, grad.dtype)
    operands = {"weight": out, "index": index, "grad": grad}
    if scale_grad_by_freq:
        counts = empty((num_weights,), "i32")
        fill(counts, 0)
        count_indices("embedding_dense_backward", index, counts)
        operands["counts"] = counts
    each(
        "embedding_backward",
        _embedding_backward,
        (1 if in_order else index.numel, width),
        operands,
        {"n": num_weights, "length": index.numel, "padding": padding_idx},
        static=(grad.dtype, in_order, scale_grad_by_freq),
        modes={"weight": "rw" if in_order else "a"},
        lanes=in_order,
        cost=index.numel if in_order else 1,
        site="embedding_dense_backward(): index {} is out of range",
    )
    return out


@composite("embedding_renorm_")
def embedding_renorm_(self: Any, indices: Any, max_norm: float, norm_type: float) -> Any:
    """Scales the rows of self that indices name down to a norm of at most max_norm."""
    if indices.dim() == 0 or indices.numel() == 0:
        indices = indices.reshape(-1)
    rows = indices.reshape(-1)
    picked = self.detach().index_select(0, rows)
    norms = torch.linalg.vector_norm(picked.flatten(1), norm_type, dim=1)
    scale = torch.where(norms > max_norm, max_norm / (norms + 1e-7), torch.ones_like(norms))
    shape = [-1] + [1] * (self.dim() - 1)
    self.index_copy_(0, rows, picked * scale.view(shape).to(self.dtype))  # equal rows are written with equal values
    return self


# ---- embedding_bag -------------------------------------------------------------------------------------------------


def _bag_end(it: Item, bag: Any) -> Any:
    """Where the indices of a bag end; `offsets` may or may not hold the last one's."""
    k = it.k
    end = k.var("i32", it["length"])
    with k.If(bag + 1 < it["known"]):
        end.set(ir.cast(it.load("offsets", (bag + 1,)), "i32"))
    return k.let(end)


def _bag(it: Item) -> None:
    mode, dtype, weighted = it.static
    k = it.k
    part = compute_dtype(dtype)
    bag, column = it.at
    total = k.var(part, 0, lanes=column.lanes)
    count = k.var("i32", 0)
    best = k.var("i32", -1)
    begin = k.let(ir.cast(it.load("offsets", (bag,)), "i32"))
    with k.For(begin, _bag_end(it, bag)) as i:
        index = it.check(it.load("index", (i,)), 0, it["n"])
        with k.If(ir.ne(index, it["padding"])):
            value = it.load("weight", (index, column))
            if mode == BAG_MAX:
                better = ir.or_(ir.eq(count, 0), ir.or_(ir.gt(value, total), ir.isnan(value)))
                with k.If(better):
                    total.set(value)
                    best.set(index)
            else:
                if weighted:
                    value = value * it.load("scale", (i,))
                total.set(total + value)
            count.set(count + 1)
    result = total.as_node()
    if mode == BAG_MEAN:
        result = result / ir.cast(ir.maximum(count, 1), part)
    it.store("out", result)
    if mode == BAG_MAX:
        it.store("out_best", best)


def _bag_members(it: Item) -> None:
    """The bag of every index, and how many indices that are not padding each bag has."""
    k = it.k
    (bag,) = it.at
    count = k.var("i32", 0)
    begin = k.let(ir.cast(it.load("offsets", (bag,)), "i32"))
    with k.For(begin, _bag_end(it, bag)) as i:
        it.store("out_bags", bag, (i,))
        with k.If(ir.ne(ir.cast(it.load("index", (i,)), "i32"), it["padding"])):
            count.set(count + 1)
    it.store("out_sizes", count)


@lowering("_embedding_bag", "_embedding_bag_forward_only", slots=("padding_idx",))
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums, means or maxima of the rows of each bag [bags, width]; the bag of each index; sizes of bags; rows of maxima)."""
    known = offsets.sizes[0]
    bags = known - 1 if include_last_offset else known
    width = weight.sizes[1]
    out = empty((bags, width), weight.dtype)
    offset2bag = empty(indices.sizes, indices.dtype)
    bag_size = empty((bags,), indices.dtype)
    best = empty((bags, width) if mode == BAG_MAX else (0,), indices.dtype)
    scalars = {"length": indices.sizes[0], "known": known, "padding": padding_idx}
    common = {"offsets": offsets, "index": indices}
    fill(offset2bag, 0)
    each(
        "bag_members",
        _bag_members,
        (bags,),
        {"out_bags": offset2bag, "out_sizes": bag_size, **common},
        scalars,
        cost=16,
    )
    operands = {"out": out, "weight": weight, **common}
    if mode == BAG_MAX:
        operands["out_best"] = best
    if per_sample_weights is not None:
        operands["scale"] = per_sample_weights
    each(
        "embedding_bag",
        _bag,
        out.sizes,
        operands,
        {"n": weight.sizes[0], **scalars},
        static=(mode, weight.dtype, per_sample_weights is not None),
        lanes=mode != BAG_MAX,
        cost=16,
        site="embedding_bag(): index {} is out of range",
    )
    return out, offset2bag, bag_size, best


def _bag_backward(it: Item) -> None:
    mode, dtype, in_order, scaled, weighted = it.static
    k = it.k
    part = compute_dtype(dtype)
    column = it.at[1]

    def one(j: Any) -> None:
        if mode == BAG_MAX:
            index = ir.cast(it.load("best", (j, column)), "i32")
            index, bag, good = k.let(ir.maximum(index, 0)), j, ir.ge(index, 0)
        else:
            bag = k.let(ir.cast(it.load("bags", (j,)), "i32"))
            index = it.check(it.load("index", (j,)), 0, it["n"])
            good = ir.ne(index, it["padding"])
        with k.If(good):
            value = it.load("grad", (bag, column))
            if mode == BAG_MEAN:
                value = value / ir.cast(it.load("sizes", (bag,)), part)
            if scaled:
                value = value / ir.cast(it.load("counts", (index,)), part)
            if weighted:
                value = value * it.load("scale", (j,))
            _add(it, it.offset("weight", (index, column)), value, in_order)

    _every(it, in_order, one)


@lowering("_embedding_bag_dense_backward", slots=("num_weights", "padding_idx"))
def embedding_bag_dense_backward(
    grad: Tensor,
    indices: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: Any,
    scale_grad_by_freq: bool,
    mode: int,
    per_sample_weights: Tensor | None,
    padding_idx: Any,
) -> Tensor:
    """The gradient of the weight."""
    width = grad.sizes[1]
    out = empty((num_weights, width), grad.dtype)
    fill(out, 0)
    in_order = not atomic(SUM, grad.dtype)
    length = grad.sizes[0] if mode == BAG_MAX else indices.sizes[0]
    operands = {"weight": out, "grad": grad}
    if mode == BAG_MAX:
        operands["best"] = maximum_indices
    else:
        operands |= {"index": indices, "bags": offset2bag}
    if mode == BAG_MEAN:
        operands["sizes"] = bag_size
    scaled = scale_grad_by_freq and mode != BAG_MAX
    if scaled:
        counts = empty((num_weights,), "i32")
        fill(counts, 0)
        count_indices("embedding_bag", indices, counts)
        operands["counts"] = counts
    weighted = False
    if per_sample_weights is not None and mode == BAG_SUM:
        weighted = True
        operands["scale"] = per_sample_weights
    each(
        "bag_backward",
        _bag_backward,
        (1 if in_order else length, width),
        operands,
        {"n": num_weights, "length": length, "padding": padding_idx},
        static=(mode, grad.dtype, in_order, scaled, weighted),
        modes={"weight": "rw" if in_order else "a"},
        lanes=in_order and mode != BAG_MAX,
        cost=length if in_order else 1,
        site="embedding_bag(): index {} is out of range",
    )
    return out


def _bag_dots(it: Item) -> None:
    (dtype,) = it.static
    k = it.k
    (i,) = it.at
    index = it.check(it.load("index", (i,)), 0, it["n"])
    total = k.var(compute_dtype(dtype), 0)
    with k.If(ir.ne(index, it["padding"])):
        bag = k.let(ir.cast(it.load("bags", (i,)), "i32"))
        with k.For(ir.const(0, "i32"), it["width"]) as column:
            total.set(total + it.load("grad", (bag, column)) * it.load("weight", (index, column)))
    it.store("out", total)


@lowering("_embedding_bag_per_sample_weights_backward", slots=("padding_idx",))
def embedding_bag_per_sample_weights_backward(
    grad: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor, offset2bag: Tensor, mode: int, padding_idx: Any
) -> Tensor:
    """The gradient of per_sample_weights: of each index, its bag's gradient times its row. Sums only."""
    if mode != BAG_SUM:
        raise RuntimeError("embedding_bag_backward: per_sample_weights only supported for mode='sum'")
    out = empty(indices.sizes, grad.dtype)
    each(
        "bag_dots",
        _bag_dots,
        out.sizes,
        {"out": out, "grad": grad, "weight": weight, "index": indices, "bags": offset2bag},
        {"n": weight.sizes[0], "width": weight.sizes[1], "padding": padding_idx},
        static=(grad.dtype,),
        cost=weight.sizes[1],
        site="embedding_bag(): index {} is out of range",
    )
    return out
