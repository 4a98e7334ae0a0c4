"""Softmax, and layer, RMS, group and batch normalisation, with their gradients: rows of kernels/nest.

Statistics are float32 (float64 for float64). Every forward is one launch, every backward one or two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..kernels import ir, nest
from ..lowering import (
    Tensor,
    all_of,
    bucket,
    check,
    contiguous_strides,
    empty,
    eq,
    is_one,
    lowering,
    product,
    structured,
    stub,
    target,
)
from .common import braces, contiguous, map_tensors, out_variant
from .reduce import reduce_rows

STATISTICS = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64"}
EPSILON = {"f16": 2.0**-10, "bf16": 2.0**-7, "f32": 2.0**-23, "f64": 2.0**-52}


def _like(x: Tensor) -> list[Any]:
    """Strides of a fresh tensor of x's sizes: channels last where x is, else contiguous."""
    if x.ndim in (4, 5) and not x.is_contiguous and is_one(x.strides[1]):
        order = [0, *range(2, x.ndim), 1]
        dense = contiguous_strides([x.sizes[d] for d in order])
        return [dense[order.index(d)] for d in range(x.ndim)]
    return list(contiguous_strides(x.sizes))


# ---- softmax ---------------------------------------------------------------------------------------------------------


def _along(name: str, function: Any, out: Tensor, ins: Sequence[Tensor], dim: int) -> None:
    """A row expression along `dim`, all tensors of one shape."""
    if out.ndim == 0:
        reduce_rows(name, function, [(out, (0,))], [(x, (0,)) for x in ins], (1,), 1, (), splits=False)
        return
    length, count = bucket(out.sizes[dim]), sum(bucket(s) for d, s in enumerate(out.sizes) if d != dim)
    if all(x.is_contiguous for x in (out, *ins)):
        d, inner, outer = out.sizes[dim], product(out.sizes[dim + 1 :]), product(out.sizes[:dim])
        if all(is_one(s) for s in out.sizes[dim + 1 :]):
            sizes, strides = [d, outer], [1, d]
        elif all(is_one(s) for s in out.sizes[:dim]):
            sizes, strides = [d, inner], [inner, 1]
        else:
            sizes, strides = [d, inner, outer], [inner, 1, d * inner]
        both = [(x, strides) for x in (out, *ins)]
    else:
        order = [dim, *(d for d in reversed(range(out.ndim)) if d != dim)]
        sizes = [out.sizes[d] for d in order]
        both = [(x, [x.strides[d] for d in order]) for x in (out, *ins)]
    reduce_rows(name, function, both[:1], both[1:], sizes, 1, (), splits=False, length=length, count=count)


def _softmax(r: Any, x: Any) -> Any:
    e = ir.exp(x - r.reduce(nest.MAX(x.dtype), x))
    return e * (1.0 / r.sum(e))


def _log_softmax(r: Any, x: Any) -> Any:
    largest = r.reduce(nest.MAX(x.dtype), x)
    return (x - largest) - ir.log(r.sum(ir.exp(x - largest)))


LONG_IN_REGISTERS = 12  # floor(log2) of rows that nest keeps in registers


def largest_and_total(r: Any, x: Any) -> tuple[Any, Any]:
    """The largest element and the sum of exp(x - largest); of infinities, the sum is NaN."""
    largest, total = r.reduce(nest.LOGSUMEXP(x.dtype), x, ir.const(1.0, x.dtype))
    return largest, ir.where(ir.isfinite(largest), total, math.nan)


def _softmax_online(r: Any, x: Any) -> Any:
    largest, total = largest_and_total(r, x)
    return ir.exp(x - largest) / total


def _log_softmax_online(r: Any, x: Any) -> Any:
    largest, total = largest_and_total(r, x)
    return (x - largest) - ir.log(total)


def one_pass(length: int) -> bool:
    """Whether the largest element and the sum of a row of about 2**length elements are found in one pass over memory: GPUs, rows
    too long for registers."""
    t = target()
    return t.schedule_class != "vector" and not t.software and length > LONG_IN_REGISTERS


def _online(x: Tensor, dim: int) -> bool:
    return x.ndim > 0 and one_pass(bucket(x.sizes[dim]))


def _softmax_backward(r: Any, grad: Any, y: Any) -> Any:
    return y * (grad - r.sum(grad * y))


def _log_softmax_backward(r: Any, grad: Any, y: Any) -> Any:
    return grad - ir.exp(y) * r.sum(grad)


@structured("_softmax")
def softmax(x: Tensor, dim: int, half_to_float: bool, out: Tensor) -> None:
    if _online(x, dim):
        _along("softmax_online", _softmax_online, out, [x], dim)
    else:
        _along("softmax", _softmax, out, [x], dim)


@structured("_log_softmax")
def log_softmax(x: Tensor, dim: int, half_to_float: bool, out: Tensor) -> None:
    if _online(x, dim):
        _along("log_softmax_online", _log_softmax_online, out, [x], dim)
    else:
        _along("log_softmax", _log_softmax, out, [x], dim)


@structured("_softmax_backward_data")
def softmax_backward(grad: Tensor, y: Tensor, dim: int, input_dtype: str, out: Tensor) -> None:
    _along("softmax_backward", _softmax_backward, out, [grad, y], dim)


@structured("_log_softmax_backward_data")
def log_softmax_backward(grad: Tensor, y: Tensor, dim: int, input_dtype: str, out: Tensor) -> None:
    _along("log_softmax_backward", _log_softmax_backward, out, [grad, y], dim)


# ---- layer and RMS normalisation -------------------------------------------------------------------------------------


def _normalized(
    x: Tensor, shape: Sequence[Any], weight: Tensor | None, bias: Tensor | None = None
) -> tuple[Any, Any, int, int]:
    """(elements of a row, rows, floor(log2) of both) after the checks of upstream."""
    n = len(shape)
    check(
        n >= 1,
        "RuntimeError",
        "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, "
        f"but got normalized_shape = {[]}",
    )
    given = braces(n)
    for t, what in ((weight, "weight"), (bias, "bias")):
        if t is not None:
            text = f"Expected {what} to be of same shape as normalized_shape, but got {what} of shape "
            text += f"{braces(t.ndim)} and normalized_shape = {given}"
            same = t.ndim == n and all_of(*(eq(a, b) for a, b in zip(t.sizes, shape)))
            check(same, "RuntimeError", text, *t.sizes, *shape)
    text = f"Given normalized_shape={given}, expected input with shape [*{', {}' * n}], but got input of size{braces(x.ndim)}"
    fits = x.ndim >= n and all_of(*(eq(a, b) for a, b in zip(x.sizes[x.ndim - n :], shape)))
    check(fits, "RuntimeError", text, *shape, *shape, *x.sizes)
    cut = x.ndim - n
    return (
        product(x.sizes[cut:]),
        product(x.sizes[:cut]),
        sum(map(bucket, x.sizes[cut:])),
        sum(map(bucket, x.sizes[:cut])),
    )


def _affine(y: Any, parameters: Sequence[Any], weight: bool, bias: bool) -> Any:
    rest = list(parameters)
    if weight:
        y = y * rest.pop(0)
    return y + rest.pop(0) if bias else y


def _layer_norm(weight: bool, bias: bool, r: Any, x: Any, *rest: Any) -> Any:
    n = ir.cast(r.count, x.dtype)
    mean = r.sum(x) / n
    centered = x - mean
    rstd = ir.rsqrt(r.sum(ir.square(centered)) / n + rest[-1])
    return _affine(centered * rstd, rest[:-1], weight, bias), mean, rstd


@lowering("native_layer_norm", slots=("normalized_shape",))
def native_layer_norm(
    x: Tensor, shape: list[Any], weight: Tensor | None, bias: Tensor | None, eps: Any
) -> tuple[Tensor, ...]:
    n, m, length, count = _normalized(x, shape, weight, bias)
    x = contiguous(x)
    kind = STATISTICS[x.dtype]
    out = empty(x.sizes, x.dtype)
    outer = list(x.sizes[: x.ndim - len(shape)])
    mean, rstd = (empty([*outer, *[1] * len(shape)], kind) for _ in range(2))
    parameters = [contiguous(p) for p in (weight, bias) if p is not None]
    reduce_rows(
        "layer_norm",
        _layer_norm,
        [(out, (1, n)), (mean, (0, 1)), (rstd, (0, 1))],
        [(x, (1, n)), *((p, (1, 0)) for p in parameters)],
        [n, m],
        1,
        (weight is not None, bias is not None),
        [eps],
        [kind],
        splits=False,
        length=length,
        count=count,
    )
    return out, mean, rstd


def _layer_norm_backward(weight: bool, r: Any, grad: Any, x: Any, mean: Any, rstd: Any, *w: Any) -> Any:
    n = ir.cast(r.count, x.dtype)
    normal = (x - mean) * rstd
    g = grad * w[0] if weight else grad
    a, b = r.sum(g) / n, r.sum(g * normal) / n
    # A row of one element has no gradient; contracted products would leave their rounding error, times rstd.
    return ir.where(ir.gt(n, 1.0), (g - a - normal * b) * rstd, 0.0)


def _layer_norm_parameters(which: tuple, r: Any, grad: Any, x: Any, mean: Any, rstd: Any) -> Any:
    sums = []
    if which[0]:
        sums.append(grad * ((x - mean) * rstd))
    if which[1]:
        sums.append(grad)
    return sum_all(r, sums)


def sum_all(r: Any, xs: Sequence[Any]) -> Any:
    """The sums of several expressions, as one reduction (which may be split)."""
    if len(xs) == 1:
        return r.sum(xs[0])
    sums = nest.Monoid(
        f"sum{len(xs)}",
        tuple(x.dtype for x in xs),
        (0,) * len(xs),
        lambda a, b: tuple(p + q for p, q in zip(a, b)),
        blocked=True,
    )
    return r.reduce(sums, *xs)


def _input_gradient(
    name: str, function: Any, grad: Tensor, x: Tensor, statistics: Sequence[Tensor], weight: Tensor | None, rows: tuple
) -> Tensor:
    """The gradient of x by a row expression of grad, x, statistics (one number a row each) and the weight. rows: elements
    of a row, rows, and the buckets of both."""
    n, m, length, count = rows
    dx = empty(x.sizes, x.dtype)
    ins = [(grad, (1, n)), (x, (1, n)), *((s, (0, 1)) for s in statistics)]
    if weight is not None:
        ins.append((contiguous(weight), (1, 0)))
    key = (weight is not None,)
    reduce_rows(name, function, [(dx, (1, n))], ins, [n, m], 1, key, splits=False, length=length, count=count)
    return dx


@lowering("native_layer_norm_backward", slots=("normalized_shape",))
def native_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: list[Any],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[int],
) -> tuple[Tensor | None, ...]:
    n, m, length, count = _normalized(x, shape, weight, bias)
    grad, x, mean, rstd = contiguous(grad), contiguous(x), contiguous(mean), contiguous(rstd)
    dx = dw = db = None
    if mask[0]:
        rows = (n, m, length, count)
        dx = _input_gradient("layer_norm_backward", _layer_norm_backward, grad, x, [mean, rstd], weight, rows)
    wanted = (bool(mask[1]) and weight is not None, bool(mask[2]) and bias is not None)
    outs = []
    if wanted[0]:
        dw = empty(x.sizes[x.ndim - len(shape) :], weight.dtype)  # type: ignore[union-attr]
        outs.append((dw, (0, 1)))
    if wanted[1]:
        db = empty(x.sizes[x.ndim - len(shape) :], bias.dtype)  # type: ignore[union-attr]
        outs.append((db, (0, 1)))
    if outs:
        ins = [(grad, (n, 1)), (x, (n, 1)), (mean, (1, 0)), (rstd, (1, 0))]
        reduce_rows(
            "layer_norm_parameters", _layer_norm_parameters, outs, ins, [m, n], 1, (wanted,), length=count, count=length
        )
    return dx, dw, db


def _rms_norm(weight: bool, r: Any, x: Any, *rest: Any) -> Any:
    rstd = ir.rsqrt(r.sum(ir.square(x)) / ir.cast(r.count, x.dtype) + rest[-1])
    y = x * rstd
    return (y * rest[0] if weight else y), rstd


@lowering("_fused_rms_norm", slots=("normalized_shape",))
def fused_rms_norm(x: Tensor, shape: list[Any], weight: Tensor | None, eps: Any) -> tuple[Tensor, Tensor]:
    n, m, length, count = _normalized(x, shape, weight)
    x = contiguous(x)
    kind = STATISTICS[x.dtype]
    out = empty(x.sizes, x.dtype)
    rstd = empty([*x.sizes[: x.ndim - len(shape)], *[1] * len(shape)], kind)
    ins = [(x, (1, n))] + ([] if weight is None else [(contiguous(weight), (1, 0))])
    reduce_rows(
        "rms_norm",
        _rms_norm,
        [(out, (1, n)), (rstd, (0, 1))],
        ins,
        [n, m],
        1,
        (weight is not None,),
        [EPSILON[x.dtype] if eps is None else eps],
        [kind],
        splits=False,
        length=length,
        count=count,
    )
    return out, rstd


def _rms_norm_backward(weight: bool, r: Any, grad: Any, x: Any, rstd: Any, *w: Any) -> Any:
    g = grad * w[0] if weight else grad
    normal = x * rstd
    return (g - normal * (r.sum(g * normal) / ir.cast(r.count, x.dtype))) * rstd


def _rms_norm_weight(r: Any, grad: Any, x: Any, rstd: Any) -> Any:
    return r.sum(grad * (x * rstd))


@lowering("_fused_rms_norm_backward", slots=("normalized_shape",))
def fused_rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[Any], rstd: Tensor, weight: Tensor | None, mask: Sequence[int]
) -> tuple[Tensor | None, ...]:
    n, m, length, count = _normalized(x, shape, weight)
    grad, x, rstd = contiguous(grad), contiguous(x), contiguous(rstd)
    dx = dw = None
    if mask[0]:
        rows = (n, m, length, count)
        dx = _input_gradient("rms_norm_backward", _rms_norm_backward, grad, x, [rstd], weight, rows)
    if mask[1] and weight is not None:
        dw = empty(weight.sizes, weight.dtype)
        ins = [(grad, (n, 1)), (x, (n, 1)), (rstd, (1, 0))]
        reduce_rows("rms_norm_weight", _rms_norm_weight, [(dw, (0, 1))], ins, [m, n], 1, length=count, count=length)
    return dx, dw


# ---- group normalisation ---------------------------------------------------------------------------------------------


@stub("GroupNormKernel", coarse=False)
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: Any,
    c: Any,
    hw: Any,
    group: Any,
    eps: Any,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Groups of c / group channels of x [n, c, ...]; mean and rstd are [n, group]."""
    d = c // group
    x = contiguous(x)
    ins = [(x, (1, hw, d * hw, c * hw))] + [(contiguous(p), (0, 1, d, 0)) for p in (weight, bias) if p is not None]
    statistics = [(s, (0, 0, 1, group)) for s in (mean, rstd)]
    _groups(
        "group_norm",
        _layer_norm,
        [(out, (1, hw, d * hw, c * hw)), *statistics],
        ins,
        x,
        [hw, d, group, n],
        (weight is not None, bias is not None),
        [eps],
        [STATISTICS[x.dtype]],
    )


def _groups(
    name: str,
    function: Any,
    outs: Sequence[Any],
    ins: Sequence[Any],
    x: Tensor,
    sizes: Sequence[Any],
    key: tuple,
    values: Sequence[Any] = (),
    types: Sequence[str] = (),
) -> None:
    length = sum(map(bucket, x.sizes[2:])) + max(bucket(x.sizes[1]) - 3, 0)
    first = (
        1 if all(is_one(s) for s in x.sizes[2:]) else 0
    )  # without spatial extent, the channels of a group are the row
    outs, ins = ([(t, s[first:]) for t, s in ts] for ts in (outs, ins))
    reduce_rows(
        name,
        function,
        outs,
        ins,
        sizes[first:],
        2 - first,
        key,
        values,
        types,
        splits=False,
        length=length + 5,
        count=5,
    )


@stub("GroupNormBackwardKernel", coarse=False)
def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: Any,
    c: Any,
    hw: Any,
    group: Any,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    d = c // group
    grad, x, mean, rstd = contiguous(grad), contiguous(x), contiguous(mean), contiguous(rstd)
    full, per_group = (1, hw, d * hw, c * hw), (0, 0, 1, group)
    ins = [(grad, full), (x, full), (mean, per_group), (rstd, per_group)]
    if dx is not None:
        more = [] if weight is None else [(contiguous(weight), (0, 1, d, 0))]
        _groups(
            "group_norm_backward",
            _layer_norm_backward,
            [(dx, full)],
            [*ins, *more],
            x,
            [hw, d, group, n],
            (weight is not None,),
        )
    if dw is not None or db is not None:
        # Rows are channels (d fastest, then group); reduced are positions and samples.
        order = (0, 3, 1, 2)
        outs = [(t, (0, 0, 1, d)) for t in (dw, db) if t is not None]
        reduce_rows(
            "group_norm_parameters",
            _layer_norm_parameters,
            outs,
            [(t, [s[i] for i in order]) for t, s in ins],
            [hw, n, d, group],
            2,
            ((dw is not None, db is not None),),
            splits=False,
            length=sum(map(bucket, x.sizes[2:])) + 5,
            count=5,
        )


# ---- batch normalisation ---------------------------------------------------------------------------------------------


def _channel_strides(x: Tensor, collapse: bool) -> list[Any]:
    if collapse:
        return [1, x.strides[0], x.strides[1]]
    return [*reversed(x.strides[2:]), x.strides[0], x.strides[1]]


def _logs(x: Tensor) -> dict[str, int]:
    return {"length": sum(map(bucket, x.sizes[2:])) + bucket(x.sizes[0]), "count": bucket(x.sizes[1])}


def _rows_of_channels(
    name: str,
    function: Any,
    key: tuple,
    full: Sequence[Tensor],
    fulls: int,
    outs: Sequence[Tensor],
    ins: Sequence[Tensor],
    values: Sequence[Any],
    kind: str,
) -> None:
    """A row per channel. full: tensors of the input's shape, the first `fulls` of them outputs; outs, ins: per channel."""
    x = full[-1]
    collapse = x.ndim > 2 and all(t.is_contiguous for t in full)
    if collapse:
        sizes = [product(x.sizes[2:]), x.sizes[0], x.sizes[1]]
    else:
        sizes = [*reversed(x.sizes[2:]), x.sizes[0], x.sizes[1]]
    reduced = len(sizes) - 1

    def channel(t: Tensor) -> tuple[Tensor, list[Any]]:
        return t, [0] * reduced + [t.strides[0]]

    def whole(t: Tensor) -> tuple[Tensor, list[Any]]:
        return t, _channel_strides(t, collapse)

    reduce_rows(
        name,
        function,
        [*map(whole, full[:fulls]), *map(channel, outs)],
        [*map(whole, full[fulls:]), *map(channel, ins)],
        sizes,
        reduced,
        key,
        values,
        [kind] * len(values),
        splits=False,
        **_logs(x),
    )


def _batch_norm_training(flags: tuple, r: Any, x: Any, *rest: Any) -> Any:
    """Per channel: the output, mean, 1 / deviation, and the running statistics, where kept."""
    weight, bias, running_mean, running_var = flags
    ins = list(rest[: sum(flags)])
    momentum, eps = rest[sum(flags) :]
    n = ir.cast(r.count, x.dtype)
    mean = r.sum(x) / n
    squares = r.sum(ir.square(x - mean))
    rstd = ir.rsqrt(squares / n + eps)
    scale = rstd * ins.pop(0) if weight else rstd
    y = (x - mean) * scale
    y = y + ins.pop(0) if bias else y
    out = [y, mean, rstd]
    if running_mean:
        out.append((1.0 - momentum) * ins.pop(0) + momentum * mean)
    if running_var:
        out.append((1.0 - momentum) * ins.pop(0) + momentum * (squares / (n - 1.0)))
    return tuple(out)


def _batch_norm_eval(flags: tuple, *args: Any) -> Any:
    x, mean, var, *rest = args
    scale = ir.rsqrt(ir.cast(var, x.dtype) + ir.cast(rest[-1], x.dtype))
    if flags[0]:
        scale = scale * rest[0]
    y = (x - mean) * scale
    return y + rest[int(flags[0])] if flags[1] else y


def _evaluation(*flags: bool) -> Any:
    return _EVALUATIONS[flags]


def _make_evaluation(flags: tuple) -> Any:
    return lambda *args: _batch_norm_eval(flags, *args)


_EVALUATIONS: dict[tuple[bool, ...], Any] = {
    (w, b): _make_evaluation((w, b)) for w in (False, True) for b in (False, True)
}


def _per_channel(
    name: str,
    function: Any,
    outs: Sequence[Tensor],
    full: Sequence[Tensor],
    channel: Sequence[Tensor],
    values: Sequence[Any],
    types: Sequence[str],
) -> None:
    """An expression of tensors [n, c, ...] and of one number per channel."""
    x = full[0]
    if all(t.is_contiguous for t in (*outs, *full)) and x.ndim > 2:
        sizes = [x.sizes[0], x.sizes[1], product(x.sizes[2:])]
        strides = [x.sizes[1] * sizes[2], sizes[2], 1]
        outs, full = ([t.view(sizes, strides) for t in ts] for ts in (outs, full))
        channel = [t.view(sizes, [0, t.strides[0], 0]) for t in channel]
    else:
        order = list(range(x.ndim))
        if is_one(x.strides[1]) and x.ndim > 2:
            order = [0, *range(2, x.ndim), 1]  # channels last: they are the fastest
        outs, full = ([t.permute(order) for t in ts] for ts in (outs, full))
        at = order.index(1)
        sizes = [x.sizes[d] for d in order]
        channel = [t.view(sizes, [t.strides[0] if d == at else 0 for d in range(x.ndim)]) for t in channel]
    map_tensors(name, function, outs, [*full, *channel], values, types)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: Any,
    eps: Any,
) -> tuple[Tensor, ...]:
    """(output, mean, 1 / deviation) of x [n, c, ...]; both statistics are empty unless training."""
    kind = STATISTICS[x.dtype]
    out = empty(x.sizes, x.dtype, _like(x))
    present = (weight is not None, bias is not None)
    parameters = [p for p in (weight, bias) if p is not None]
    if not training:
        assert running_mean is not None and running_var is not None
        name = f"batch_norm_eval{present[0]:d}{present[1]:d}"
        _per_channel(name, _evaluation(*present), [out], [x], [running_mean, running_var, *parameters], [eps], [kind])
        return out, empty([0], kind), empty([0], kind)
    mean, rstd = empty([x.sizes[1]], kind), empty([x.sizes[1]], kind)
    running = [s for s in (running_mean, running_var) if s is not None]
    flags = (*present, running_mean is not None, running_var is not None)
    _rows_of_channels(
        "batch_norm",
        _batch_norm_training,
        (flags,),
        [out, x],
        1,
        [mean, rstd, *running],
        [*parameters, *running],
        [momentum, eps],
        kind,
    )
    return out, mean, rstd


@lowering("native_batch_norm")
def native_batch_norm(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return batch_norm(x, *args)


@lowering("_native_batch_norm_legit")
def native_batch_norm_legit(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return batch_norm(x, *args)


@lowering("_native_batch_norm_legit.no_stats")
def native_batch_norm_no_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: Any, eps: Any
) -> tuple[Tensor, ...]:
    return batch_norm(x, weight, bias, None, None, training, momentum, eps)


@lowering("_batch_norm_with_update")
def batch_norm_with_update(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: Any,
    eps: Any,
) -> tuple[Tensor, ...]:
    return *batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps), empty([0], "u8")


def _batch_norm_backward(flags: tuple, r: Any, grad: Any, x: Any, *rest: Any) -> Any:
    """Of one channel. flags: training, weight, and which gradients are wanted."""
    training, weight, dx, dw, db = flags
    mean, rstd = rest[0], rest[1]
    if not training:
        rstd = ir.rsqrt(ir.cast(rstd, x.dtype) + rest[-1])
    normal = (x - mean) * rstd
    scale = rstd * rest[2] if weight else rstd
    total, dot = r.sum(grad), r.sum(grad * normal)
    out = []
    if dx:
        n = ir.cast(r.count, x.dtype)
        out.append((grad - total / n - normal * (dot / n)) * scale if training else grad * scale)
    return tuple(out + [dot] * dw + [total] * db)


@lowering("native_batch_norm_backward")
def native_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    training: bool,
    eps: Any,
    mask: Sequence[int],
) -> tuple[Tensor | None, ...]:
    kind = STATISTICS[x.dtype]
    own = weight.dtype if weight is not None else kind
    dx = empty(x.sizes, x.dtype, _like(x)) if mask[0] else None
    dw, db = (empty([x.sizes[1]], own) if m else None for m in mask[1:])
    first, second = (mean, rstd) if training else (running_mean, running_var)
    assert first is not None and second is not None
    flags = (training, weight is not None, *(bool(m) for m in mask))
    if any(mask):
        _rows_of_channels(
            "batch_norm_backward",
            _batch_norm_backward,
            (flags,),
            [*([dx] if dx else []), grad, x],
            int(bool(mask[0])),
            [t for t in (dw, db) if t is not None],
            [first, second, *([weight] if weight is not None else [])],
            [eps],
            kind,
        )
    return dx, dw, db


@lowering("batch_norm_backward")
def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    update: bool,
    eps: Any,
    mask: Sequence[int],
    reserve: Tensor,
) -> tuple[Tensor | None, ...]:
    return native_batch_norm_backward(grad, x, weight, running_mean, running_var, mean, rstd, update, eps, mask)


for _out, _function, _names in (
    ("native_batch_norm.out", "native_batch_norm", ("out", "save_mean", "save_invstd")),
    ("_native_batch_norm_legit.out", "_native_batch_norm_legit", ("out", "save_mean", "save_invstd")),
    ("_native_batch_norm_legit.no_stats_out", "_native_batch_norm_legit.no_stats", ("out", "save_mean", "save_invstd")),
    ("_batch_norm_with_update.out", "_batch_norm_with_update", ("out", "save_mean", "save_invstd", "reserve")),
):
    out_variant(_out, _function, *_names)


# ---- weight normalisation --------------------------------------------------------------------------------------------


def _weight_norm(r: Any, v: Any, g: Any) -> Any:
    norm = ir.sqrt(r.sum(ir.square(v)))
    return v * (g / norm), norm


def _weight_norm_backward(r: Any, grad: Any, v: Any, g: Any, norm: Any) -> Any:
    dot = r.sum(grad * v)
    return (g / norm) * (grad - v * (dot / (norm * norm))), dot / norm


def _weight_rows(v: Tensor, dim: int) -> tuple[list[Any], Any]:
    """Sizes of the rows of v (contiguous) for each index of its first or last dimension, and their strides by tensor kind."""
    check(dim in (0, v.ndim - 1), "RuntimeError", "fused kernels can only be applied for first or last dim")
    last = v.sizes[dim]
    rest = product(v.sizes[1:] if dim == 0 else v.sizes[:-1])
    return [rest, last], ((1, rest) if dim == 0 else (last, 1))


@lowering("_weight_norm_interface")
def weight_norm(v: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    v, g = contiguous(v), contiguous(g)
    out, norm = empty(v.sizes, v.dtype), empty(g.sizes, STATISTICS[g.dtype])
    sizes, strides = _weight_rows(v, dim)
    outs = [(out, strides), (norm, (0, 1))]
    reduce_rows(
        "weight_norm", _weight_norm, outs, [(v, strides), (g, (0, 1))], sizes, 1, splits=False, length=8, count=8
    )
    return out, norm


@lowering("_weight_norm_interface_backward")
def weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norm: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    grad, v, g, norm = contiguous(grad), contiguous(v), contiguous(g), contiguous(norm)
    dv, dg = empty(v.sizes, v.dtype), empty(g.sizes, g.dtype)
    sizes, strides = _weight_rows(v, dim)
    ins = [(grad, strides), (v, strides), (g, (0, 1)), (norm, (0, 1))]
    reduce_rows(
        "weight_norm_backward",
        _weight_norm_backward,
        [(dv, strides), (dg, (0, 1))],
        ins,
        sizes,
        1,
        splits=False,
        length=8,
        count=8,
    )
    return dv, dg
