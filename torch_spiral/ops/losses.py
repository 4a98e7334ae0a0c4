"""Losses with kernels of their own: negative log likelihood, binary cross entropy, margins, CTC.

A loss per sample, then a sum where the reduction (0 none, 1 mean, 2 sum) asks for one. Gradients are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import ir
from ..lowering import Tensor, composite, empty, is_zero, lowering, product, structured
from .common import broadcast, contiguous, copy_to, fill, map_tensors
from .items import Item, each
from .norms import sum_all
from .reduce import reduce_rows

OUT_OF_BOUNDS = "Target {} is out of bounds."
WIDE = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64"}


# ---- sums of samples --------------------------------------------------------------------------------------------------


def _mean(r: Any, loss: Any) -> Any:
    return r.sum(loss) / ir.cast(r.count, loss.dtype)


def _sum(r: Any, loss: Any) -> Any:
    return r.sum(loss)


def _weighted_mean(r: Any, loss: Any, weight: Any) -> Any:
    total, weights = sum_all(r, [loss, weight])
    return total / weights, weights


def _weighted_sum(r: Any, loss: Any, weight: Any) -> Any:
    return sum_all(r, [loss, weight])


def _scalar(x: Tensor) -> tuple[Tensor, Sequence[Any]]:
    return x.view((), ()), (0,)


def _reduce_samples(out: Tensor, losses: Tensor, reduction: int) -> None:
    """out = mean or sum of contiguous losses."""
    name, function = ("mean_loss", _mean) if reduction == 1 else ("sum_loss", _sum)
    reduce_rows(name, function, [_scalar(out)], [(losses, (1,))], [losses.numel], 1, length=20)


# ---- negative log likelihood ------------------------------------------------------------------------------------------


def _nll_body(it: Item) -> None:
    """Items are samples [n, ...]; self is [n, classes, ...]."""
    k, kind = it.k, it.static[0]
    target = k.let(ir.cast(it.load("target"), "i32"))
    loss, weight = k.var(kind, 0.0), k.var(kind, 0.0)
    with k.If(ir.ne(target, it["ignore"])):
        t = it.check(target, 0, it["classes"])
        weight.set(it.load("weight", (t,)) if "weight" in it.buffers else ir.const(1.0, kind))
        loss.set(ir.neg(it.load("self", (it.at[0], t, *it.at[1:]))) * weight)
    it.store("out", loss)
    if "out_weight" in it.buffers:
        it.store("out_weight", weight)


def _nll_forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any, out: Tensor, total: Tensor) -> None:
    """x [n, classes, ...], target [n, ...]."""
    kind = WIDE[x.dtype]
    operands = {"self": x, "target": target}
    if weight is not None:
        operands["weight"] = weight
    if reduction == 0:
        operands["out"] = out
        fill(total.view((1,)), 0)
    else:
        operands["out"], operands["out_weight"] = empty(target.sizes, kind), empty(target.sizes, kind)
    each("nll_loss", _nll_body, target.sizes, operands, {"ignore": ignore, "classes": x.sizes[1]}, static=(kind,), site=OUT_OF_BOUNDS)
    if reduction:
        name, function = ("nll_mean", _weighted_mean) if reduction == 1 else ("nll_sum", _weighted_sum)
        ins = [(operands[key], (1,)) for key in ("out", "out_weight")]
        reduce_rows(name, function, [_scalar(out), _scalar(total)], ins, [target.numel], 1, length=20)


def _nll_backward_body(it: Item) -> None:
    """Items are elements [n, ..., classes] of the gradient; lanes along classes."""
    at, sample = it.at, it.at[:-1]
    kind, mean, per_sample = it.static
    target = ir.cast(it.load("target", sample), "i32")
    grad = it.load("grad", sample if per_sample else ())
    weight = it.load("weight", (at[-1],)) if "weight" in it.buffers else ir.const(1.0, kind)
    value = ir.neg(ir.cast(grad, kind)) * weight
    if mean:
        value = value / it.load("total", ())
    hit = ir.and_(ir.eq(target, at[-1]), ir.ne(target, it["ignore"]))
    it.store("out", ir.where(hit, value, ir.const(0.0, kind)))


def _nll_backward(grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any, total: Tensor,
                  out: Tensor) -> None:  # fmt: skip
    last = [0, *range(2, x.ndim), 1]
    operands = {"out": out.permute(last), "target": target, "grad": grad if reduction == 0 else grad.view((), ())}
    if weight is not None:
        operands["weight"] = weight
    if reduction == 1:
        operands["total"] = total.view((), ())
    kind = WIDE[x.dtype]
    each(
        "nll_loss_backward", _nll_backward_body, [x.sizes[d] for d in last], operands, {"ignore": ignore},
        static=(kind, reduction == 1, reduction == 0),
    )  # fmt: skip


def _batched(x: Tensor, dims: int) -> Tensor:
    """x with a first dimension of size 1 where it lacks the batch."""
    return x if x.ndim == dims else x.view([1, *x.sizes], [0, *x.strides])


@structured("nll_loss_forward")
def nll_loss_forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any, out: Tensor, total: Tensor) -> None:
    single = x.ndim == 1
    _nll_forward(
        _batched(x, 2), _batched(target, 1), weight, (2 if reduction == 0 else reduction) if single else reduction, ignore, out, total
    )


@structured("nll_loss_backward")
def nll_loss_backward(grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any, total: Tensor,
                      out: Tensor) -> None:  # fmt: skip
    single = x.ndim == 1
    reduction = 2 if single and reduction == 0 else reduction
    _nll_backward(grad, _batched(x, 2), _batched(target, 1), weight, reduction, ignore, total, _batched(out, 2))


@lowering("nll_loss2d_forward", slots=("ignore_index",))
def nll_loss2d_forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any) -> tuple[Tensor, Tensor]:
    out, total = empty(target.sizes if reduction == 0 else (), x.dtype), empty((), x.dtype)
    _nll_forward(x, target, weight, reduction, ignore, out, total)
    return out, total


@lowering("nll_loss2d_backward", slots=("ignore_index",))
def nll_loss2d_backward(grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any,
                        total: Tensor) -> Tensor:  # fmt: skip
    out = empty(x.sizes, x.dtype)
    _nll_backward(grad, x, target, weight, reduction, ignore, total, out)
    return out


# ---- binary cross entropy ---------------------------------------------------------------------------------------------


def _bce(x: Any, target: Any, *weight: Any) -> Any:
    loss = (target - 1.0) * ir.maximum(ir.log1p(ir.neg(x)), -100.0) - target * ir.maximum(ir.log(x), -100.0)
    return loss * weight[0] if weight else loss


def _bce_mean(r: Any, *args: Any) -> Any:
    return _mean(r, _bce(*args))


def _bce_sum(r: Any, *args: Any) -> Any:
    return r.sum(_bce(*args))


@lowering("binary_cross_entropy")
def binary_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    ins = [x, *(broadcast(t, x.sizes) for t in (target, weight) if t is not None)]
    suffix = "_weighted" if weight is not None else ""
    if reduction == 0:
        out = empty(x.sizes, x.dtype)
        map_tensors("bce" + suffix, _bce, [out], ins)
        return out
    out = empty((), x.dtype)
    name, function = ("bce_mean", _bce_mean) if reduction == 1 else ("bce_sum", _bce_sum)
    ins = [contiguous(t) for t in ins]
    reduce_rows(name + suffix, function, [(out, (0,))], [(t, (1,)) for t in ins], [x.numel], 1, length=20)
    return out


def _bce_backward(scaled: bool, weighted: bool) -> Any:
    def f(grad: Any, x: Any, target: Any, *rest: Any) -> Any:
        g = grad * (x - target) / ir.maximum((1.0 - x) * x, 1e-12)
        g = g * rest[0] if weighted else g
        return g / ir.cast(rest[-1], g.dtype) if scaled else g

    return f


_BCE_BACKWARD = {(s, w): _bce_backward(s, w) for s in (False, True) for w in (False, True)}


@lowering("binary_cross_entropy_backward")
def binary_cross_entropy_backward(grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    out = empty(x.sizes, x.dtype)
    ins = [broadcast(grad, x.sizes), x, *(broadcast(t, x.sizes) for t in (target, weight) if t is not None)]
    key = (reduction == 1, weight is not None)
    name = f"bce_backward{key[0]:d}{key[1]:d}"
    map_tensors(name, _BCE_BACKWARD[key], [out], ins, [x.numel] if key[0] else [], ["i32"] if key[0] else [])
    return out


# ---- margins ----------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x [classes] or [n, classes] (0-dim: one class) as [n, classes]."""
    if x.ndim == 0:
        return x.view((1, 1), (0, 0))
    return _batched(x, 2)


def _margin_term(it: Item, x: Any, c: Any, own: Any, weight: Any) -> tuple[Any, Any]:
    """(margin - x[t] + x[c], its loss) for another class c."""
    z = it.k.let(it["margin"] - own + x)
    power = ir.where(ir.eq(it["p"], 1), z, z * z)
    return z, ir.where(ir.gt(z, 0.0), power * weight, ir.const(0.0, z.dtype))


def _multi_margin_body(it: Item) -> None:
    k, kind = it.k, it.static[0]
    n = it.at[0]
    t = it.check(ir.cast(it.load("target", (n,)), "i32"), 0, it["classes"])
    own = k.let(it.load("self", (n, t)))
    weight = k.let(it.load("weight", (t,))) if "weight" in it.buffers else ir.const(1.0, kind)
    total = k.var(kind, 0.0)
    with k.For(0, it["classes"]) as c, k.If(ir.ne(c, t)):
        total.set(total + _margin_term(it, it.load("self", (n, c)), c, own, weight)[1])
    it.store("out", total / ir.cast(it["classes"], kind))


def _multi_margin_backward_body(it: Item) -> None:
    k, (kind, mean, per_sample) = it.k, it.static
    n = it.at[0]
    t = it.check(ir.cast(it.load("target", (n,)), "i32"), 0, it["classes"])
    own = k.let(it.load("self", (n, t)))
    weight = k.let(it.load("weight", (t,))) if "weight" in it.buffers else ir.const(1.0, kind)
    scale = ir.cast(it.load("grad", (n,) if per_sample else ()), kind) / ir.cast(it["classes"], kind)
    if mean:
        scale = scale / ir.cast(it["samples"], kind)
    scale = k.let(scale * weight)
    total = k.var(kind, 0.0)
    with k.For(0, it["classes"]) as c, k.If(ir.ne(c, t)):
        z = k.let(it["margin"] - own + it.load("self", (n, c)))
        slope = ir.where(ir.eq(it["p"], 1), ir.const(1.0, kind), 2.0 * z)
        g = k.let(ir.where(ir.gt(z, 0.0), slope * scale, ir.const(0.0, kind)))
        it.store("out", g, (n, c))
        total.set(total - g)
    it.store("out", total, (n, t))


def _margin_scalars(x: Tensor, p: Any, margin: Any) -> dict[str, Any]:
    return {"p": ("i32", p), "margin": (WIDE[x.dtype], margin), "classes": x.sizes[1], "samples": x.sizes[0]}


@lowering("multi_margin_loss")
def multi_margin_loss(x: Tensor, target: Tensor, p: Any, margin: Any, weight: Tensor | None, reduction: int) -> Tensor:
    rows, targets = _rows(x), target if target.ndim else target.view((1,), (0,))
    out = empty(target.sizes if reduction == 0 else (), x.dtype)
    losses = out if reduction == 0 else empty(targets.sizes, WIDE[x.dtype])
    operands = {"self": rows, "target": targets, "out": losses.view(targets.sizes) if losses.ndim == 0 else losses}
    if weight is not None:
        operands["weight"] = weight
    scalars = _margin_scalars(rows, 1 if p is None else p, 1 if margin is None else margin)
    each(
        "multi_margin", _multi_margin_body, targets.sizes, operands, scalars, static=(WIDE[x.dtype],), site=OUT_OF_BOUNDS,
        cost=rows.sizes[1],
    )  # fmt: skip
    if reduction:
        _reduce_samples(out, losses, reduction)
    return out


@lowering("multi_margin_loss_backward")
def multi_margin_loss_backward(grad: Tensor, x: Tensor, target: Tensor, p: Any, margin: Any, weight: Tensor | None, reduction: int) -> Tensor:
    rows, targets = _rows(x), target if target.ndim else target.view((1,), (0,))
    out = empty(x.sizes, x.dtype)
    operands = {"self": rows, "target": targets, "grad": grad, "out": _rows(out)}
    if weight is not None:
        operands["weight"] = weight
    static = (WIDE[x.dtype], reduction == 1, grad.ndim == 1)
    each(
        "multi_margin_backward", _multi_margin_backward_body, targets.sizes, operands, _margin_scalars(rows, p, margin), static=static,
        site=OUT_OF_BOUNDS, cost=rows.sizes[1],
    )  # fmt: skip
    return out


def _multilabel_body(it: Item) -> None:
    """Targets of a row end at the first -1; every other class pays against each of them."""
    k, kind = it.k, it.static[0]
    n, classes = it.at[0], it["classes"]
    with k.For(0, classes) as c:
        it.store("out_is", ir.const(0.0, kind), (n, c))
    count = k.var("i32", 0)
    with k.While(lambda: count < classes):
        t = k.let(ir.cast(it.load("target", (n, count.as_node())), "i32"))
        with k.If(t < 0):
            k.Break()
        it.store("out_is", ir.const(1.0, kind), (n, it.check(t, 0, classes)))
        count.set(count + 1)
    total = k.var(kind, 0.0)
    with k.For(0, count.as_node()) as i:
        t = k.let(ir.clamp(ir.cast(it.load("target", (n, i)), "i32"), 0, classes - 1))
        own = k.let(it.load("self", (n, t)))
        with k.For(0, classes) as c:
            other = ir.eq(it.load("out_is", (n, c)), 0.0)
            z = 1.0 - own + it.load("self", (n, c))
            total.set(total + ir.where(ir.and_(other, ir.gt(z, 0.0)), z, ir.const(0.0, kind)))
    it.store("out", total / ir.cast(classes, kind))


@lowering("multilabel_margin_loss_forward")
def multilabel_margin_loss_forward(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    rows, targets = _rows(x), _rows(target)
    out = empty((rows.sizes[0],) if reduction == 0 and x.ndim == 2 else (), x.dtype)
    is_target = empty(target.sizes, x.dtype)
    losses = out if reduction == 0 else empty((rows.sizes[0],), WIDE[x.dtype])
    operands = {"self": rows, "target": targets, "out": losses.view((rows.sizes[0],)), "out_is": _rows(is_target)}
    each(
        "multilabel_margin", _multilabel_body, (rows.sizes[0],), operands, {"classes": rows.sizes[1]}, static=(WIDE[x.dtype],),
        modes={"out_is": "rw"}, site=OUT_OF_BOUNDS, cost=rows.sizes[1] * rows.sizes[1],
    )  # fmt: skip
    if reduction:
        _reduce_samples(out, losses, reduction)
    return out, is_target


def _multilabel_backward_body(it: Item) -> None:
    k, (kind, mean, per_sample) = it.k, it.static
    n, classes = it.at[0], it["classes"]
    scale = ir.cast(it.load("grad", (n,) if per_sample else ()), kind) / ir.cast(classes, kind)
    scale = k.let(scale / ir.cast(it["samples"], kind) if mean else scale)
    with k.For(0, classes) as c:
        # A target's gradient counts the classes that pay against it, a class's the targets it pays against.
        target = k.let(ir.ne(it.load("is", (n, c)), 0.0))
        own = k.let(it.load("self", (n, c)))
        total = k.var(kind, 0.0)
        with k.If(target):
            repeats = k.var(kind, 0.0)
            j = k.var("i32", 0)
            with k.While(lambda: j < classes):
                t = k.let(ir.cast(it.load("target", (n, j.as_node())), "i32"))
                with k.If(t < 0):
                    k.Break()
                repeats.set(repeats + ir.where(ir.eq(t, c), ir.const(1.0, kind), ir.const(0.0, kind)))
                j.set(j + 1)
            with k.For(0, classes) as d:
                pays = ir.and_(ir.eq(it.load("is", (n, d)), 0.0), ir.gt(1.0 - own + it.load("self", (n, d)), 0.0))
                total.set(total - ir.where(pays, repeats.as_node(), ir.const(0.0, kind)))
        with k.Else():
            j = k.var("i32", 0)
            with k.While(lambda: j < classes):
                t = k.let(ir.cast(it.load("target", (n, j.as_node())), "i32"))
                with k.If(t < 0):
                    k.Break()
                pays = ir.gt(1.0 - it.load("self", (n, ir.clamp(t, 0, classes - 1))) + own, 0.0)
                total.set(total + ir.where(pays, ir.const(1.0, kind), ir.const(0.0, kind)))
                j.set(j + 1)
        it.store("out", total * scale, (n, c))


@lowering("multilabel_margin_loss_backward")
def multilabel_margin_loss_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor) -> Tensor:
    out = empty(x.sizes, x.dtype)
    rows = _rows(x)
    operands = {"self": rows, "target": _rows(target), "is": _rows(is_target), "grad": grad, "out": _rows(out)}
    each(
        "multilabel_margin_backward", _multilabel_backward_body, (rows.sizes[0],), operands,
        {"classes": rows.sizes[1], "samples": rows.sizes[0]}, static=(WIDE[x.dtype], reduction == 1, grad.ndim == 1),
        cost=rows.sizes[1] * rows.sizes[1],
    )  # fmt: skip
    return out
