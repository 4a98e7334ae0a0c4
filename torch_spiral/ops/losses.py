"""Losses with kernels of their own: negative log likelihood, binary cross entropy, margins, CTC.

A loss per sample, then a sum where the reduction (0 none, 1 mean, 2 sum) asks for one. Gradients are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..kernels import ir, nest
from ..lowering import (
    SCALAR_TYPES,
    Tensor,
    all_of,
    bucket,
    check,
    empty,
    eq,
    internal,
    is_zero,
    le,
    lowering,
    lt,
    maximum,
    structured,
)
from .common import braces, broadcast, contiguous, fill, map_tensors, out_variant
from .items import Item, each, is_probability, require
from .norms import largest_and_total, one_pass, sum_all
from .reduce import reduce_rows

EXPECTED_ROWS = "Expected non-empty vector or matrix with optional 0-dim batch size, but got: "
OUT_OF_BOUNDS = "Target {} is out of bounds."
WIDE = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64"}


# ---- sums of samples -------------------------------------------------------------------------------------------------


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


# ---- negative log likelihood -----------------------------------------------------------------------------------------


def _nll_body(it: Item) -> None:
    """Items are samples [n, ...]; self is [n, classes, ...]."""
    k, kind = it.k, it.static[0]
    target = k.let(ir.cast(it.load("target"), "i32"))
    loss, weight = k.var(kind, 0.0), k.var(kind, 0.0)
    with k.If(ir.ne(target, it["ignore"])):
        t = it.check(target, 0, it["classes"])
        weight.set(it.load("weight", (t,)) if "weight" in it.buffers else ir.const(1.0, kind))
        x = it.load("self", (it.at[0], t, *it.at[1:]))
        if "largest" in it.buffers:  # logits, of which the log-probability is made here
            x = (x - it.load("largest")) - it.load("log_total")
        loss.set(ir.neg(x) * weight)
    it.store("out", loss)
    if "out_weight" in it.buffers:
        it.store("out_weight", weight)


def _nll_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any, out: Tensor, total: Tensor,
    rows: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """x [n, classes, ...], target [n, ...]. rows: of logits x, the largest one and the logarithm of the sum of exp(x - largest)."""
    kind = WIDE[x.dtype]
    operands = {"self": x, "target": target, **dict(zip(("largest", "log_total"), rows))}
    if weight is not None:
        operands["weight"] = weight
    if reduction == 0:
        operands["out"] = out
        fill(total.view((1,)), 0)
    else:
        operands["out"], operands["out_weight"] = empty(target.sizes, kind), empty(target.sizes, kind)
    each(
        "nll_loss",
        _nll_body,
        target.sizes,
        operands,
        {"ignore": ignore, "classes": x.sizes[1]},
        static=(kind,),
        site=OUT_OF_BOUNDS,
    )
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


def _nll_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore: Any,
    total: Tensor,
    out: Tensor,
) -> None:
    last = [0, *range(2, x.ndim), 1]
    operands = {"out": out.permute(last), "target": target, "grad": grad if reduction == 0 else grad.view((), ())}
    if weight is not None:
        operands["weight"] = weight
    if reduction == 1:
        operands["total"] = total.view((), ())
    kind = WIDE[x.dtype]
    each(
        "nll_loss_backward",
        _nll_backward_body,
        [x.sizes[d] for d in last],
        operands,
        {"ignore": ignore},
        static=(kind, reduction == 1, reduction == 0),
    )


def _batched(x: Tensor, dims: int) -> Tensor:
    """x with a first dimension of size 1 where it lacks the batch."""
    return x if x.ndim == dims else x.view([1, *x.sizes], [0, *x.strides])


@structured("nll_loss_forward")
def nll_loss_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any, out: Tensor, total: Tensor
) -> None:
    single = x.ndim == 1
    _nll_forward(
        _batched(x, 2),
        _batched(target, 1),
        weight,
        (2 if reduction == 0 else reduction) if single else reduction,
        ignore,
        out,
        total,
    )


@structured("nll_loss_backward")
def nll_loss_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore: Any,
    total: Tensor,
    out: Tensor,
) -> None:
    single = x.ndim == 1
    reduction = 2 if single and reduction == 0 else reduction
    _nll_backward(grad, _batched(x, 2), _batched(target, 1), weight, reduction, ignore, total, _batched(out, 2))


# ---- cross entropy of class indices ------------------------------------------------------------------------------------
#
# csrc/aten/cross_entropy.cpp calls these two. The log-probabilities of a row follow from two numbers, so they are never stored.


def _row_totals(online: bool, r: Any, x: Any) -> Any:
    if online:
        largest, total = largest_and_total(r, x)
    else:
        largest = r.reduce(nest.MAX(x.dtype), x)
        total = r.sum(ir.exp(x - largest))
    return largest, ir.log(total)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    reduction: int,
    ignore: Any,
    out: Tensor,
    largest: Tensor,
    log_total: Tensor,
    total: Tensor,
) -> None:
    """Loss of logits x [n, classes] and target [n]; largest, log_total [n] and total [] are for the gradient."""
    (n, c), (row, step) = x.sizes, x.strides
    online = one_pass(bucket(c))
    outs = [(largest, (0, 1)), (log_total, (0, 1))]
    reduce_rows("row_totals", _row_totals, outs, [(x, (step, row))], [c, n], 1, (online,), splits=online)
    _nll_forward(x, target, None, reduction, ignore, out, total, (largest, log_total))


def _cross_entropy_gradient(
    mean: bool, r: Any, x: Any, target: Any, largest: Any, log_total: Any, grad: Any, *rest: Any
) -> Any:
    target = ir.cast(target, "i32")
    if mean:
        grad = grad / rest[0]
    hit = ir.where(ir.eq(target, r.index), ir.const(1.0, x.dtype), ir.const(0.0, x.dtype))
    value = (ir.exp((x - largest) - log_total) - hit) * grad
    return ir.where(ir.eq(target, rest[-1]), ir.const(0.0, x.dtype), value)


def cross_entropy_backward(
    grad: Tensor, x: Tensor, target: Tensor, largest: Tensor, log_total: Tensor, total: Tensor, reduction: int, ignore: Any,
    out: Tensor,
) -> None:  # fmt: skip
    """The gradient for the logits."""
    (n, c), (row, step) = x.sizes, x.strides
    ins = [(x, (step, row)), *((t, (0, t.strides[0])) for t in (target, largest, log_total))]
    ins.append((grad, (0, grad.strides[0])) if reduction == 0 else (grad.view((), ()), (0, 0)))
    if reduction == 1:
        ins.append((total, (0, 0)))
    reduce_rows(
        "cross_entropy_gradient", _cross_entropy_gradient, [(out, (out.strides[1], out.strides[0]))], ins, [c, n], 1,
        (reduction == 1,), [ignore], ["i32"], splits=False,
    )  # fmt: skip


internal("cross_entropy", cross_entropy)
internal("cross_entropy_backward", cross_entropy_backward)


@lowering("nll_loss2d_forward", slots=("ignore_index",))
def nll_loss2d_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any
) -> tuple[Tensor, Tensor]:
    out, total = empty(target.sizes if reduction == 0 else (), x.dtype), empty((), x.dtype)
    _nll_forward(x, target, weight, reduction, ignore, out, total)
    return out, total


@lowering("nll_loss2d_backward", slots=("ignore_index",))
def nll_loss2d_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any, total: Tensor
) -> Tensor:
    out = empty(x.sizes, x.dtype)
    _nll_backward(grad, x, target, weight, reduction, ignore, total, out)
    return out


# ---- binary cross entropy --------------------------------------------------------------------------------------------


def _bce(x: Any, target: Any, *weight: Any) -> Any:
    loss = (target - 1.0) * ir.maximum(ir.log1p(ir.neg(x)), -100.0) - target * ir.maximum(ir.log(x), -100.0)
    return loss * weight[0] if weight else loss


def _bce_sum(r: Any, x: Any, *rest: Any) -> Any:
    """(the sum, how many x are no probabilities)"""
    zero, one = ir.const(0.0, x.dtype), ir.const(1.0, x.dtype)
    return sum_all(r, [_bce(x, *rest), ir.where(ir.and_(ir.ge(x, zero), ir.le(x, one)), zero, one)])


def _bce_mean(r: Any, *args: Any) -> Any:
    total, outside = _bce_sum(r, *args)
    return total / ir.cast(r.count, total.dtype), outside


def _is_zero(it: Item) -> None:
    it.check(ir.cast(ir.eq(it.load("x"), 0), "i32"), 1, 2)


@lowering("binary_cross_entropy")
def binary_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    """Elements of x outside of [0, 1] are reported by a kernel: by the loss's own where it reduces, counted on the way."""
    text = "binary_cross_entropy(): all elements of input should be between 0 and 1"
    ins = [x, *(broadcast(t, x.sizes) for t in (target, weight) if t is not None)]
    suffix = "_weighted" if weight is not None else ""
    if reduction == 0:
        out = empty(x.sizes, x.dtype)
        map_tensors("bce" + suffix, _bce, [out], ins)
        require("bce_check", is_probability, x, text)
        return out
    out, outside = empty((), x.dtype), empty((), WIDE[x.dtype])
    name, function = ("bce_mean", _bce_mean) if reduction == 1 else ("bce_sum", _bce_sum)
    ins = [contiguous(t) for t in ins]
    outs, rows = [(out, (0,)), (outside, (0,))], [(t, (1,)) for t in ins]
    reduce_rows(name + suffix, function, outs, rows, [x.numel], 1, length=20)
    require("bce_outside", _is_zero, outside, text)
    return out


def _bce_backward(scaled: bool, weighted: bool) -> Any:
    def f(grad: Any, x: Any, target: Any, *rest: Any) -> Any:
        g = grad * (x - target) / ir.maximum((1.0 - x) * x, 1e-12)
        g = g * rest[0] if weighted else g
        return g / ir.cast(rest[-1], g.dtype) if scaled else g

    return f


_BCE_BACKWARD = {(s, w): _bce_backward(s, w) for s in (False, True) for w in (False, True)}


@lowering("binary_cross_entropy_backward")
def binary_cross_entropy_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int
) -> Tensor:
    out = empty(x.sizes, x.dtype)
    ins = [broadcast(grad, x.sizes), x, *(broadcast(t, x.sizes) for t in (target, weight) if t is not None)]
    key = (reduction == 1, weight is not None)
    name = f"bce_backward{key[0]:d}{key[1]:d}"
    map_tensors(name, _BCE_BACKWARD[key], [out], ins, [x.numel] if key[0] else [], ["i32"] if key[0] else [])
    return out


# ---- margins ---------------------------------------------------------------------------------------------------------


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


def _check_classes(x: Tensor) -> None:
    """Refuses rows without a class; a batch may be empty."""
    ok = 1 <= x.ndim <= 2 and not is_zero(x.sizes[-1])
    check(ok or x.ndim == 0, "RuntimeError", EXPECTED_ROWS + braces(x.ndim), *x.sizes)


def _check_indices(target: Tensor) -> None:
    check(target.dtype == "i64", "RuntimeError", f"expected scalar type Long but found {SCALAR_TYPES[target.dtype]}")


def _margin_scalars(x: Tensor, p: Any, margin: Any) -> dict[str, Any]:
    return {"p": ("i32", p), "margin": (WIDE[x.dtype], margin), "classes": x.sizes[1], "samples": x.sizes[0]}


def margin_targets(x: Tensor, target: Tensor) -> tuple[str, list[Any]]:
    """What is wrong with targets that are not one for each sample: the text, and the sizes in it after the number of samples."""
    text = (
        "multi_margin_loss: target tensor should be 1-D with size equal to the number of input samples (batch size). "
    )
    text += f"Expected target size [{{}}], but got {braces(target.ndim)}. Input has shape {braces(x.ndim)}."
    return text, [*target.sizes, *x.sizes]


@lowering("multi_margin_loss")
def multi_margin_loss(x: Tensor, target: Tensor, p: Any, margin: Any, weight: Tensor | None, reduction: int) -> Tensor:
    _check_classes(x)
    rows = _rows(x)
    samples, classes = rows.sizes
    text, sizes = margin_targets(x, target)
    check(target.ndim <= 1 and eq(target.numel, samples), "RuntimeError", text, samples, *sizes)
    if weight is not None:
        text = f"inconsistent weight size, expected {{}} but got {braces(weight.ndim)}"
        check(weight.ndim <= 1 and eq(weight.numel, classes), "RuntimeError", text, classes, *weight.sizes)
    _check_indices(target)
    targets = target if target.ndim else target.view((1,), (0,))
    out = empty(target.sizes if reduction == 0 else (), x.dtype)
    losses = out if reduction == 0 else empty(targets.sizes, WIDE[x.dtype])
    operands = {"self": rows, "target": targets, "out": losses.view(targets.sizes) if losses.ndim == 0 else losses}
    if weight is not None:
        operands["weight"] = weight
    scalars = _margin_scalars(rows, 1 if p is None else p, 1 if margin is None else margin)
    each(
        "multi_margin",
        _multi_margin_body,
        targets.sizes,
        operands,
        scalars,
        static=(WIDE[x.dtype],),
        site=OUT_OF_BOUNDS,
        cost=rows.sizes[1],
    )
    if reduction:
        _reduce_samples(out, losses, reduction)
    return out


@lowering("multi_margin_loss_backward")
def multi_margin_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, p: Any, margin: Any, weight: Tensor | None, reduction: int
) -> Tensor:
    rows, targets = _rows(x), target if target.ndim else target.view((1,), (0,))
    out = empty(x.sizes, x.dtype)
    operands = {"self": rows, "target": targets, "grad": grad, "out": _rows(out)}
    if weight is not None:
        operands["weight"] = weight
    static = (WIDE[x.dtype], reduction == 1, grad.ndim == 1)
    each(
        "multi_margin_backward",
        _multi_margin_backward_body,
        targets.sizes,
        operands,
        _margin_scalars(rows, p, margin),
        static=static,
        site=OUT_OF_BOUNDS,
        cost=rows.sizes[1],
    )
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
    _check_classes(x)
    if x.ndim == 2:
        same = target.ndim == 2 and all_of(*(eq(a, b) for a, b in zip(x.sizes, target.sizes)))
    else:
        same = target.ndim <= 1 and eq(target.numel, x.numel)
    text = f"inconsistent target size: {braces(target.ndim)} for input of size: {braces(x.ndim)}"
    check(same, "RuntimeError", text, *target.sizes, *x.sizes)
    _check_indices(target)
    rows, targets = _rows(x), _rows(target)
    out = empty((rows.sizes[0],) if reduction == 0 and x.ndim == 2 else (), x.dtype)
    is_target = empty(target.sizes, x.dtype)
    losses = out if reduction == 0 else empty((rows.sizes[0],), WIDE[x.dtype])
    operands = {"self": rows, "target": targets, "out": losses.view((rows.sizes[0],)), "out_is": _rows(is_target)}
    each(
        "multilabel_margin",
        _multilabel_body,
        (rows.sizes[0],),
        operands,
        {"classes": rows.sizes[1]},
        static=(WIDE[x.dtype],),
        modes={"out_is": "rw"},
        site=OUT_OF_BOUNDS,
        cost=rows.sizes[1] * rows.sizes[1],
    )
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
def multilabel_margin_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor
) -> Tensor:
    out = empty(x.sizes, x.dtype)
    rows = _rows(x)
    operands = {"self": rows, "target": _rows(target), "is": _rows(is_target), "grad": grad, "out": _rows(out)}
    each(
        "multilabel_margin_backward",
        _multilabel_backward_body,
        (rows.sizes[0],),
        operands,
        {"classes": rows.sizes[1], "samples": rows.sizes[0]},
        static=(WIDE[x.dtype], reduction == 1, grad.ndim == 1),
        cost=rows.sizes[1] * rows.sizes[1],
    )
    return out


# ---- CTC -------------------------------------------------------------------------------------------------------------

_PIECE = 16  # numbers that one launch carries


def _numbers_body(it: Item) -> None:
    for i in range(_PIECE):
        with it.k.If(i < it["count"]):
            it.buffers["out"].store(it["first"] + i, it[f"v{i}"])


def _numbers(values: Sequence[Any]) -> Tensor:
    """Integers of the call as an i32 tensor."""
    out = empty((max(len(values), 1),), "i32")
    for first in range(0, len(values), _PIECE):
        part = list(values[first : first + _PIECE])
        scalars = {
            "first": first,
            "count": len(part),
            **{f"v{i}": v for i, v in enumerate(part + [0] * (_PIECE - len(part)))},
        }
        each("numbers", _numbers_body, (1,), {"out": out}, scalars)
    return out


def _log_add(a: Any, b: Any) -> Any:
    high, low = ir.maximum(a, b), ir.minimum(a, b)
    at = ir.where(ir.eq(high, float("-inf")), ir.const(0.0, a.dtype), high)
    return ir.where(ir.eq(high, float("-inf")), high, at + ir.log1p(ir.exp(low - at)))


class _Sample:
    """One sample of CTC: labels of the extended target (blanks between and around)."""

    def __init__(self, it: Item) -> None:
        self.it, self.k, self.n = it, it.k, it.at[0]
        self.kind = it.static[0]
        self.time = self.k.let(it.load("input_lengths", (self.n,)))
        self.length = self.k.let(it.load("target_lengths", (self.n,)))
        self.start = self.k.let(it.load("starts", (self.n,)))
        self.states = self.k.let(2 * self.length + 1)

    def label(self, s: Any) -> Any:
        """Of state s, which is in range."""
        label = self.k.var("i32", self.it["blank"])
        with self.k.If(ir.eq(ir.and_(s, 1), 1)):
            label.set(self.it.load("targets", (self.start + ir.idiv(s, 2) * self.it["step"],)))
        return self.k.let(ir.clamp(label.as_node(), 0, self.it["classes"] - 1))

    def skips(self, s: Any, label: Any, to: int) -> Any:
        """Whether state s + to, two away, may be skipped to."""
        inside = self.k.let(ir.ge(s + to, 0) & ir.lt(s + to, self.states))
        other = self.label(self.k.let(ir.where(inside, s + to, s)))
        return self.k.let(inside & ir.ne(other, label))

    def sum_before(self, name: str, t: Any, s: Any, label: Any, sign: int) -> Any:
        """log of the sum over the states that lead to s (sign -1), or that s leads to (sign 1), at time t."""
        value = self.k.var(self.kind, self.it.load(name, (self.n, t, s)))
        with self.k.If(ir.ge(s + sign, 0) & ir.lt(s + sign, self.states)):
            value.set(_log_add(value.as_node(), self.it.load(name, (self.n, t, s + sign))))
        with self.k.If(self.skips(s, label, 2 * sign)):
            value.set(_log_add(value.as_node(), self.it.load(name, (self.n, t, s + 2 * sign))))
        return value.as_node()


def _ctc_forward_body(it: Item) -> None:
    x = _Sample(it)
    k, low = it.k, ir.const(float("-inf"), x.kind)
    with k.If(x.time > 0):
        with k.For(0, x.states) as s:
            label = x.label(s)
            first = it.load("log_probs", (0, x.n, label))
            it.store("out_alpha", ir.where(s < 2, first, low), (x.n, 0, s))
        with k.For(1, x.time) as t, k.For(0, x.states) as s:
            label = x.label(s)
            value = x.sum_before("out_alpha", t - 1, s, label, -1)
            it.store("out_alpha", value + it.load("log_probs", (t, x.n, label)), (x.n, t, s))
        last = k.var(x.kind, it.load("out_alpha", (x.n, x.time - 1, x.states - 1)))
        with k.If(x.length > 0):
            last.set(_log_add(last.as_node(), it.load("out_alpha", (x.n, x.time - 1, x.states - 2))))
        it.store("out", ir.neg(last.as_node()), (x.n,))
    with k.Else():
        it.store("out", ir.where(ir.eq(x.length, 0), ir.const(0.0, x.kind), ir.const(float("inf"), x.kind)), (x.n,))


def _ctc_backward_body(it: Item) -> None:
    x = _Sample(it)
    k, kind, n = it.k, x.kind, x.n
    low, zero = ir.const(float("-inf"), kind), ir.const(0.0, kind)
    with k.For(0, it["times"]) as t, k.For(0, it["classes"]) as c:
        it.store("out", ir.where(t < x.time, low, zero), (t, n, c))
    nll, grad = k.let(it.load("nll", (n,))), k.let(it.load("grad", (n,)))
    with k.For(0, x.time) as back:
        t = k.let(x.time - 1 - back)
        with k.For(0, x.states) as s:
            label = x.label(s)
            value = k.var(kind, ir.where(ir.ge(s, x.states - 2), zero, low))
            with k.If(back > 0):
                value.set(x.sum_before("out_beta", t + 1, s, label, 1))
            beta = k.let(value.as_node() + it.load("log_probs", (t, n, label)))
            it.store("out_beta", beta, (n, t, s))
            both = _log_add(it.load("out", (t, n, label)), it.load("alpha", (n, t, s)) + beta)
            it.store("out", both, (t, n, label))
    with k.For(0, x.time) as t, k.For(0, it["classes"]) as c:
        p = k.let(it.load("log_probs", (t, n, c)))
        g = (ir.exp(p) - ir.exp(it.load("out", (t, n, c)) + nll - p)) * grad
        if it.static[1]:
            g = ir.where(ir.eq(nll, float("inf")), zero, g)
        it.store("out", g, (t, n, c))


def _ctc_operands(
    log_probs: Tensor, targets: Tensor, input_lengths: Sequence[Any], target_lengths: Sequence[Any]
) -> tuple[dict, Any, Any]:
    """(operands, distance of a sample's targets, the longest target)."""
    n = log_probs.sizes[1]
    text = "input_lengths must be of size batch_size"
    check(eq(n, len(input_lengths)), "RuntimeError", text)
    check(eq(n, len(target_lengths)), "RuntimeError", text.replace("input", "target"))
    starts, total, longest = [], 0, 0
    for i, length in enumerate(target_lengths):
        starts.append(targets.strides[0] * i if targets.ndim == 2 else total)
        total, longest = total + length, maximum(longest, length)
    for length in input_lengths:
        check(
            le(length, log_probs.sizes[0]),
            "RuntimeError",
            "Expected input_lengths to have value at most {}, but got value {} (while checking arguments for ctc_loss_cpu)",
            log_probs.sizes[0],
            length,
        )
    if targets.ndim == 2:
        check(
            le(longest, targets.sizes[1]),
            "RuntimeError",
            "Expected tensor to have size at least {} at dimension 1, but got size {}",
            longest,
            targets.sizes[1],
        )
    flat = targets.view([targets.numel], [1])
    operands = {
        "log_probs": log_probs,
        "targets": flat,
        "starts": _numbers(starts),
        "input_lengths": _numbers(list(input_lengths)),
        "target_lengths": _numbers(list(target_lengths)),
    }
    return operands, targets.strides[-1], longest


@lowering("_ctc_loss", slots=("input_lengths", "target_lengths", "blank"))
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Sequence[Any],
    target_lengths: Sequence[Any],
    blank: Any,
    zero_infinity: bool,
) -> tuple[Tensor, Tensor]:
    check(all_of(le(0, blank), lt(blank, log_probs.sizes[2])), "RuntimeError", "blank must be in label range")
    operands, step, longest = _ctc_operands(log_probs, targets, input_lengths, target_lengths)
    times, n = log_probs.sizes[0], log_probs.sizes[1]
    out, alpha = empty((n,), log_probs.dtype), empty((n, times, 2 * longest + 1), log_probs.dtype)
    scalars = {"blank": blank, "step": step, "classes": log_probs.sizes[2]}
    each(
        "ctc",
        _ctc_forward_body,
        (n,),
        {**operands, "out": out, "out_alpha": alpha},
        scalars,
        static=(WIDE[log_probs.dtype],),
        modes={"out_alpha": "rw"},
        cost=times * 32,
    )
    return out, alpha


@lowering("_ctc_loss_backward", slots=("input_lengths", "target_lengths", "blank"))
def ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Sequence[Any],
    target_lengths: Sequence[Any],
    nll: Tensor,
    alpha: Tensor,
    blank: Any,
    zero_infinity: bool,
) -> Tensor:
    operands, step, _ = _ctc_operands(log_probs, targets, input_lengths, target_lengths)
    out, beta = empty(log_probs.sizes, log_probs.dtype), empty(alpha.sizes, log_probs.dtype)
    scalars = {"blank": blank, "step": step, "classes": log_probs.sizes[2], "times": log_probs.sizes[0]}
    each(
        "ctc_backward",
        _ctc_backward_body,
        (log_probs.sizes[1],),
        {**operands, "nll": nll, "grad": grad, "alpha": alpha, "out": out, "out_beta": beta},
        scalars,
        static=(WIDE[log_probs.dtype], zero_infinity),
        modes={"out": "rw", "out_beta": "rw"},
        cost=log_probs.sizes[0] * 32,
    )
    return out


for _out, _function, _names in (
    ("binary_cross_entropy.out", "binary_cross_entropy", ("out",)),
    ("binary_cross_entropy_backward.grad_input", "binary_cross_entropy_backward", ("grad_input",)),
    ("multi_margin_loss.out", "multi_margin_loss", ("out",)),
    ("multi_margin_loss_backward.grad_input", "multi_margin_loss_backward", ("grad_input",)),
    ("multilabel_margin_loss_forward.output", "multilabel_margin_loss_forward", ("output", "is_target")),
    ("multilabel_margin_loss_backward.grad_input", "multilabel_margin_loss_backward", ("grad_input",)),
    ("nll_loss2d_forward.output", "nll_loss2d_forward", ("output", "total_weight")),
    ("nll_loss2d_backward.grad_input", "nll_loss2d_backward", ("grad_input",)),
):
    out_variant(_out, _function, *_names)
