"""Resampling: upsample_* of all modes and their gradients, and grid_sampler.

Upsampling is separable and each dimension is a list of taps (input index, weight) of an output coordinate. Small fixed lists
are multiplied out in one kernel; antialiased filters run one dimension after the other, as do all gradients: an input element
sums weight * gradient over the outputs whose taps may include it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch_spiral import _C

from ..kernels import ir
from ..kernels.kernel import DTYPES, bits_dtype
from ..lowering import Tensor, all_of, check, empty, eq, fill_bytes, lowering, lt, structured, target, where
from .common import contiguous, copy_to, fill
from .gathering import Element, gather, named, planes

AA_SUPPORT = {"linear_aa": 1.0, "cubic_aa": 2.0, "lanczos_aa": 3.0}


def _floor(x: Any) -> Any:
    return ir.cast(ir.floor(x), "i32")


def _cubic(x: Any, a: float) -> tuple[Any, Any]:
    """The two pieces of Keys' kernel: at 0 <= x < 1 and at 1 <= x < 2."""
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0, ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a


def _cubic_weights(t: Any, a: float = -0.75) -> list[Any]:
    """Of the elements at -1, 0, 1, 2 around a place t in [0, 1)."""
    return [_cubic(t + 1.0, a)[1], _cubic(t, a)[0], _cubic(1.0 - t, a)[0], _cubic(2.0 - t, a)[1]]


def _taps(kind: str, align: bool, o: Any, scale: Any, size: Any, out: Any) -> list[tuple[Any, Any]]:
    """(input index, weight) of output coordinate o; weight None for 1. Places are computed as upstream's CPU kernels do."""
    x = ir.cast(o, scale.dtype)
    if kind in ("nearest", "nearest_exact"):
        place = x * scale if kind == "nearest" else (x + 0.5) * scale
        return [(ir.clamp(_floor(place), 0, size - 1), None)]
    place = x * scale if align else (x + 0.5) * scale - 0.5
    if kind == "linear":
        place = ir.where(ir.eq(size, out), x, ir.maximum(place, 0.0))
    first = ir.minimum(_floor(place), size - 1)
    t = ir.clamp(place - ir.cast(first, scale.dtype), 0.0, 1.0)
    if kind == "linear":
        return [(first, 1.0 - t), (ir.minimum(first + 1, size - 1), t)]
    return [(ir.clamp(first + (i - 1), 0, size - 1), w) for i, w in enumerate(_cubic_weights(t))]


def _filter(kind: str, x: Any) -> Any:
    x = ir.abs(x)
    if kind == "linear_aa":
        return ir.maximum(1.0 - x, 0.0)
    if kind == "cubic_aa":
        near, far = _cubic(x, -0.5)
        return ir.where(ir.lt(x, 1.0), near, ir.where(ir.lt(x, 2.0), far, 0.0))
    safe = ir.maximum(x, 1e-6) * math.pi
    value = ir.sin(safe) / safe * (ir.sin(safe / 3.0) / (safe / 3.0))
    return ir.where(ir.eq(x, 0.0), 1.0, ir.where(ir.lt(x, 3.0), value, 0.0))


class _Antialias:
    """The filter of one output coordinate: `count` taps from `first` on, unnormalised weights."""

    def __init__(self, e: Element, kind: str, o: Any) -> None:
        scale = e["scale"]
        self.kind, self.dtype = kind, scale.dtype
        wide = ir.ge(scale, 1.0)
        support = ir.where(wide, AA_SUPPORT[kind] * scale, AA_SUPPORT[kind])
        self.inverse = ir.where(wide, 1.0 / scale, 1.0)
        self.center = e.k.let((ir.cast(o, scale.dtype) + 0.5) * scale)
        self.first = e.k.let(ir.maximum(ir.cast(self.center - support + 0.5, "i32"), 0))
        self.most = e.k.let(ir.cast(ir.ceil(support), "i32") * 2 + 1)  # the same for all outputs
        count = ir.minimum(ir.cast(self.center + support + 0.5, "i32"), e["in"]) - self.first
        self.count = e.k.let(ir.clamp(count, 0, self.most))

    def weight(self, index: Any) -> Any:
        return _filter(self.kind, (ir.cast(index, self.dtype) - self.center + 0.5) * self.inverse)


# ---- forward, all dimensions at once --------------------------------------------------------------------------------------


def _upsample(e: Element, n: int, kind: str, align: bool) -> Any:
    lead = e.at[:-n]
    ins, outs = e.list("in", n), e.list("out", n)
    taps = [_taps(kind, align, o, s, i, c) for o, s, i, c in zip(e.at[-n:], e.list("scale", n), ins, outs)]
    taps = [[(e.k.let(i), w if w is None else e.k.let(w)) for i, w in dim] for dim in taps]

    def total(dim: int, at: list[Any]) -> Any:
        if dim == n:
            return e.load("x", [*lead, *at])
        terms = [(w, total(dim + 1, [*at, i])) for i, w in taps[dim]]
        result = terms[0][1] if terms[0][0] is None else terms[0][0] * terms[0][1]
        for w, v in terms[1:]:
            result = result + w * v
        return result

    return total(0, [])


def _upsample_1d(e: Element, kind: str, align: bool, inner: bool, small: bool) -> Any:
    """One dimension of [outer, length(, inner)]."""
    lead, o, rest = e.at[0], e.at[1], list(e.at[2:])
    if kind in AA_SUPPORT:
        aa = _Antialias(e, kind, o)
        total, weights = e.var(aa.dtype, 0.0), e.var(aa.dtype, 0.0)

        def tap(index: Sequence[Any]) -> None:
            j = index[0]
            at = aa.first + j
            w = e.k.let(ir.where(ir.lt(j, aa.count), aa.weight(at), 0.0))
            v = e.load("x", [lead, ir.clamp(at, 0, e["in"] - 1), *rest])
            total.set(total + ir.where(ir.lt(j, aa.count), w * ir.cast(v, aa.dtype), 0.0))
            weights.set(weights + w)

        e.loop([aa.most], tap)
        result = total / ir.where(ir.eq(weights, 0.0), 1.0, weights)
    else:
        scale = e["scale"]
        result = None
        for i, w in _taps(kind, align, o, scale, e["in"], e["out"]):
            v = ir.cast(e.load("x", [lead, i, *rest]), scale.dtype) * w
            result = v if result is None else result + v
    return ir.clamp(ir.floor(result + 0.5), 0.0, 255.0) if small else result


# ---- bytes in two dimensions: fixed point, as upstream ------------------------------------------------------------------------------

# Weights are computed in float64 where the device has it, divided by their sum and rounded to multiples of 2^-p, so that 16 bits
# hold them all; each dimension's sums of products with bytes are then exact, and rounded once.


def _weights(e: Element, kind: str, align: bool, o: Any, use: Callable[[Any, Any], None]) -> None:
    """use(input index, weight) for the taps of output coordinate o; taps beyond a border count for the element there."""
    if kind in AA_SUPPORT:
        aa = _Antialias(e, kind, o)
        total = e.k.var(aa.dtype, 0.0, o.lanes)

        def inside(j: Any) -> Any:
            return ir.where(ir.lt(j, aa.count), aa.weight(aa.first + j), 0.0)

        e.loop([aa.most], lambda j: total.set(total + inside(j[0])))
        whole = e.k.let(ir.where(ir.eq(total, 0.0), 1.0, total))
        e.loop([aa.most], lambda j: use(ir.clamp(aa.first + j[0], 0, e["in"] - 1), inside(j[0]) / whole))
        return
    taps = [(e.k.let(i), e.k.let(w)) for i, w in _taps(kind, align, o, e["scale"], e["in"], e["out"])]
    for n, (i, w) in enumerate(taps):
        for at, more in taps[n + 1 :]:
            w = w + ir.where(ir.eq(at, i), more, 0.0)
        for at, _ in taps[:n]:
            w = ir.where(ir.eq(at, i), 0.0, w)
        use(i, w)


def _largest_weight(e: Element, kind: str, align: bool) -> Any:
    most = e.var(e["scale"].dtype, 0.0)
    _weights(e, kind, align, e.at[0], lambda i, w: most.set(ir.maximum(most, w)))
    return most


def _fraction_bits(e: Element) -> Any:
    """p, from the largest weight of each output: the most bits, up to 22, that leave the largest one 16 bits."""
    most = e.var(e.buffers["most"].compute, 0.0)
    e.loop([e["out"]], lambda o: most.set(ir.maximum(most, e.load("most", [o[0]]))))
    bits: Any = ir.const(0, "i32")
    for p in range(22):
        bits = bits + ir.cast(ir.lt(most * float(2 << p) + 0.5, 32768.0), "i32")
    return bits


def _bytes_1d(e: Element, kind: str, align: bool, inner: bool) -> Any:
    """One dimension of [outer, length(, inner)]."""
    lead, o, rest = e.at[0], e.at[1], list(e.at[2:])
    bits = e.k.let(e.load("bits", [ir.const(0, "i32")]))
    unit = e.k.let(ir.cast(ir.shl(ir.const(1, "i32"), bits), e["scale"].dtype))
    total = e.var("i32", 0)

    def add(i: Any, w: Any) -> None:
        w = w * unit
        fixed = ir.cast(ir.where(ir.lt(w, 0.0), w - 0.5, w + 0.5), "i32")  # towards zero
        total.set(total + fixed * ir.cast(e.load("x", [lead, i, *rest]), "i32"))

    _weights(e, kind, align, o, add)
    rounded = total + ir.shr(ir.shl(ir.const(1, "i32"), bits), ir.const(1, "i32"))
    return ir.minimum(ir.shr(ir.maximum(rounded, 0), bits), 255)


def _forward_bytes(kind: str, x: Tensor, align: bool, scales: Sequence[Any], out: Tensor) -> None:
    """The last dimension first, with bytes in between."""
    dtype = "f64" if target().float64 else "f32"
    x = contiguous(x)
    for d in (1, 0):
        size, length = x.sizes[x.ndim - 2 + d], out.sizes[x.ndim - 2 + d]
        scale = (dtype, _scale(size, length, scales[d], align))
        scalars = {"in": size, "out": length, "scale": scale}
        most, bits = empty([length], dtype), empty([1], "i32")
        gather(_largest_weight, [most], {}, scalars, (kind, align))
        gather(_fraction_bits, [bits], {"most": most}, {"out": length})
        final = out if d == 0 and out.is_contiguous else None
        x = _pass(
            _bytes_1d, x, x.ndim - 2 + d, length, "u8", scale, (size, length), (kind, align), final, more={"bits": bits}
        )
    if x is not out:
        copy_to(out, x)


# ---- gradients ---------------------------------------------------------------------------------------------------------------


def _downsample_1d(e: Element, kind: str, align: bool, inner: bool) -> Any:
    """The gradient of one dimension of [outer, length(, inner)]: e.at is of the input."""
    lead, i, rest = e.at[0], e.at[1], list(e.at[2:])
    scale, size, count = e["scale"], e["in"], e["out"]
    dtype = scale.dtype
    total = e.var(dtype, 0.0)
    if kind in AA_SUPPORT:
        reach = AA_SUPPORT[kind] * ir.maximum(scale, 1.0) + 1.0
        base = 0.5 * scale - 0.5
    else:
        reach = ir.const(3.0 if kind == "cubic" else 2.0, dtype)
        base = 0.0 if kind == "nearest" or align else 0.5 * scale - (0.0 if kind == "nearest_exact" else 0.5)
    x = ir.cast(i, dtype)
    whole = ir.le(scale, 0.0)
    step = ir.where(whole, 1.0, scale)
    limit = ir.cast(count, dtype)
    low = ir.cast(ir.clamp(ir.floor((x - reach - base) / step), 0.0, limit), "i32")
    high = ir.cast(ir.clamp(ir.ceil((x + reach - base) / step) + 1.0, 0.0, limit), "i32")
    # Outputs beyond the borders count for the elements there; equal sizes are copied whatever the scale.
    low = ir.where(ir.or_(whole, ir.eq(i, 0)), 0, ir.minimum(low, i))
    high = ir.where(ir.or_(whole, ir.eq(i, size - 1)), count, ir.minimum(ir.maximum(high, i + 1), count))
    low, high = e.k.let(low), e.k.let(high)

    def output(index: Sequence[Any]) -> None:
        o = e.k.let(low + index[0])
        g = ir.cast(e.load("x", [lead, o, *rest]), dtype)
        if kind in AA_SUPPORT:
            aa = _Antialias(e, kind, o)
            weights = e.k.var(dtype, 0.0)

            def tap(j: Sequence[Any]) -> None:
                weights.set(weights + aa.weight(aa.first + j[0]))

            e.loop([aa.count], tap)
            mine = ir.and_(ir.ge(i, aa.first), ir.lt(i, aa.first + aa.count))
            w = ir.where(mine, aa.weight(i), 0.0) / ir.where(ir.eq(weights, 0.0), 1.0, weights)
            # Infinite gradients reach only the elements that were read.
            total.set(total + ir.where(mine, w * g, 0.0))
            return
        for at, w in _taps(kind, align, o, scale, size, count):
            total.set(total + ir.where(ir.eq(at, i), g if w is None else w * g, 0.0))

    e.loop([e.k.let(ir.maximum(high - low, 0))], output)
    return total.as_node()


def _arithmetic(x: Tensor) -> str:
    """The dtype of places and weights."""
    return "f64" if x.dtype == "f64" and target().float64 else "f32"


def _scale(size: Any, out: Any, scale: Any, align: bool) -> Any:
    """Input elements per output."""
    if align:
        return where(lt(1, out), (size - 1) / (out - 1), 0.0)
    ratio = size / out
    return ratio if scale is None else where(lt(0.0, scale), 1.0 / scale, ratio)


def _pass(body: Callable[..., Any], x: Tensor, dim: int, length: Any, out_dtype: str, scale: Any, sizes: tuple[Any, Any],
          static: tuple, out: Tensor | None = None, scalar: bool = False, more: dict[str, Tensor] | None = None) -> Tensor:  # fmt: skip
    """One dimension of the contiguous x, which gets `length`. more: what else the body loads."""
    new = [*x.sizes[:dim], length, *x.sizes[dim + 1 :]]
    result = empty(new, out_dtype) if out is None else out
    outer: Any = 1
    for s in x.sizes[:dim]:
        outer = outer * s
    last = dim == x.ndim - 1
    rest: Any = 1
    for s in x.sizes[dim + 1 :]:
        rest = rest * s
    tail = [] if last else [rest]
    gather(
        body, [result.view([outer, length, *tail])], {"x": x.view([outer, x.sizes[dim], *tail]), **(more or {})},
        {"in": sizes[0], "out": sizes[1], "scale": scale}, (*static[:2], not last, *static[2:]), scalar_elements=scalar and last,
    )  # fmt: skip
    return result


def _forward(n: int, kind: str, x: Tensor, align: bool, scales: Sequence[Any], out: Tensor) -> None:
    kind_type = _arithmetic(x)
    ins, outs = x.sizes[-n:], out.sizes[-n:]
    scale = [(kind_type, _scale(i, o, s, align)) for i, o, s in zip(ins, outs, scales)]
    small = x.dtype == "u8" and not kind.startswith("nearest")
    if small and n == 2:
        _forward_bytes(kind, x, align, scales, out)
        return
    if kind in AA_SUPPORT or small:
        # One dimension after the other, the last one first, with intermediate results in the input's dtype as upstream.
        x = contiguous(x)
        for d in reversed(range(n)):
            final = out if d == 0 and out.is_contiguous else None
            between = x.dtype
            x = _pass(
                _upsample_1d,
                x,
                x.ndim - n + d,
                outs[d],
                between,
                scale[d],
                (ins[d], outs[d]),
                (kind, align, small),
                final,
            )
        if x is not out:
            copy_to(out, x)
        return
    if kind.startswith("nearest"):
        bits = bits_dtype(x.dtype)
        x, out = x.with_dtype(bits), out.with_dtype(bits)
    x, out = planes(n, x, out)
    scalars = {**named("in", ins), **named("out", outs), **named("scale", scale)}
    gather(_upsample, [out], {"x": x}, scalars, (n, kind, align))


def _backward(n: int, kind: str, grad: Tensor, align: bool, scales: Sequence[Any], grad_input: Tensor) -> None:
    if grad.is_empty:
        fill(grad_input, 0)
        return
    kind_type = _arithmetic(grad)
    ins, outs = grad_input.sizes[-n:], grad.sizes[-n:]
    x = contiguous(grad)
    for d in reversed(range(n)):
        final = grad_input if d == 0 and grad_input.is_contiguous else None
        scale = (kind_type, _scale(ins[d], outs[d], scales[d], align))
        dtype = grad_input.dtype if d == 0 else kind_type
        static = (kind, align)
        x = _pass(_downsample_1d, x, x.ndim - n + d, ins[d], dtype, scale, (ins[d], outs[d]), static, final, True)
    if x is not grad_input:
        copy_to(grad_input, x)


def _register(n: int, name: str, kind: str, takes_align: bool) -> None:
    def split(args: tuple) -> tuple[bool, tuple, Tensor]:
        return (args[0], args[1:-1], args[-1]) if takes_align else (False, args[:-1], args[-1])

    @structured(name, coarse=True)
    def forward(self: Tensor, output_size: list, *args: Any) -> None:
        align, scales, out = split(args)
        _forward(n, kind, self, align, scales, out)

    @structured(f"{name}_backward", coarse=True)
    def backward(grad_output: Tensor, output_size: list, input_size: list, *args: Any) -> None:
        align, scales, grad_input = split(args)
        _backward(n, kind, grad_output, align, scales, grad_input)


for _n in (1, 2, 3):
    _register(_n, f"upsample_nearest{_n}d", "nearest", False)
    _register(_n, f"_upsample_nearest_exact{_n}d", "nearest_exact", False)
_register(1, "upsample_linear1d", "linear", True)
_register(2, "upsample_bilinear2d", "linear", True)
_register(3, "upsample_trilinear3d", "linear", True)
_register(2, "upsample_bicubic2d", "cubic", True)
_register(2, "_upsample_bilinear2d_aa", "linear_aa", True)
_register(2, "_upsample_bicubic2d_aa", "cubic_aa", True)
_register(2, "_upsample_lanczos2d_aa", "lanczos_aa", True)


# ---- grid_sampler ------------------------------------------------------------------------------------------------------------

BILINEAR, NEAREST, BICUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)


def _reflect(x: Any, twice_low: Any, twice_high: Any) -> tuple[Any, Any]:
    """x reflected at two borders until it lies between them, and the sign of the derivative."""
    low, span = twice_low * 0.5, (twice_high - twice_low) * 0.5
    point = ir.le(span, 0.0)
    length = ir.where(point, 1.0, span)
    distance = ir.abs(x - low)
    flips = ir.floor(distance / length)
    extra = ir.fmod(distance, length)
    even = ir.eq(flips - 2.0 * ir.floor(flips * 0.5), 0.0)
    one = ir.const(1.0, x.dtype)
    sign = ir.where(ir.xor(ir.lt(x, low), even), one, -1.0)
    return ir.where(point, 0.0, ir.where(even, extra, length - extra) + low), ir.where(point, 0.0, sign)


def _inside(x: Any, size: Any, padding: int, align: bool) -> tuple[Any, Any]:
    """A coordinate, moved into the input as the padding mode says, and the derivative."""
    last = ir.cast(size - 1, x.dtype)
    factor: Any = ir.const(1.0, x.dtype)
    if padding == REFLECTION:
        zero = ir.const(0.0, x.dtype)
        x, factor = _reflect(x, zero, 2.0 * last) if align else _reflect(x, zero - 1.0, 2.0 * last + 1.0)
    if padding != ZEROS:
        clipped = ir.or_(ir.not_(ir.gt(x, 0.0)), ir.ge(x, last))
        factor = ir.where(clipped, 0.0, factor)
        x = ir.where(ir.gt(x, 0.0), ir.where(ir.lt(x, last), x, last), 0.0)  # NaN becomes 0
    # Casts of what no i32 holds are undefined: such places lie outside.
    return ir.where(ir.lt(ir.abs(x), 1e9), x, -100.0), factor


def _grid_taps(e: Element, mode: int, padding: int, align: bool, x: Any, size: Any) -> list[tuple[Any, Any, Any, Any]]:
    """(index, whether it is inside, weight, derivative of the weight by the grid's coordinate) for one dimension."""
    dtype = x.dtype
    length = ir.cast(size, dtype)
    scale = (length - 1.0) * 0.5 if align else length * 0.5
    x = (x + 1.0) * 0.5 * (length - 1.0) if align else ((x + 1.0) * length - 1.0) * 0.5
    factor: Any = scale
    if mode != BICUBIC:
        x, derivative = _inside(x, size, padding, align)
        factor = scale * derivative
    else:
        x = ir.where(ir.lt(ir.abs(x), 1e9), x, -100.0)
    x, factor = e.k.let(x), e.k.let(factor)
    zero = ir.const(0.0, dtype)

    def tap(index: Any, w: Any, dw: Any) -> tuple[Any, Any, Any, Any]:
        index = e.k.let(index)
        return index, ir.and_(ir.ge(index, 0), ir.lt(index, size)), w, dw

    if mode == NEAREST:
        return [tap(ir.cast(ir.rint(x), "i32"), zero + 1.0, zero)]
    low = ir.floor(x)
    first, t = e.k.let(ir.cast(low, "i32")), e.k.let(x - low)
    if mode == BILINEAR:
        return [tap(first, 1.0 - t, -factor), tap(first + 1, t, factor)]
    a = -0.75
    derivatives: list[Any] = []
    for d, sign in ((t + 1.0, 1.0), (t, 1.0), (1.0 - t, -1.0), (2.0 - t, -1.0)):
        near = len(derivatives) in (1, 2)
        value = (3.0 * (a + 2.0) * d - 2.0 * (a + 3.0)) * d if near else (3.0 * a * d - 10.0 * a) * d + 8.0 * a
        derivatives.append(sign * value * factor)
    result = []
    for i, (w, dw) in enumerate(zip(_cubic_weights(t), derivatives)):
        place, _ = _inside(ir.cast(first + (i - 1), dtype), size, padding, align)
        result.append(tap(ir.cast(place, "i32"), w, dw))
    return result


def _products(taps: Sequence[Sequence[Any]]) -> list[list[Any]]:
    combinations: list[list[Any]] = [[]]
    for dim in taps:
        combinations = [[*c, t] for c in combinations for t in dim]
    return combinations


def _all_taps(
    e: Element, n: int, mode: int, padding: int, align: bool, batch: Any, place: Sequence[Any]
) -> list[list[Any]]:
    """Taps per spatial dimension; the grid holds (x, y, z), the last dimension first."""
    coordinates = [e.load("grid", [batch, *place, ir.const(n - 1 - d, "i32")]) for d in range(n)]
    sizes = e.list("in", n)
    return [
        [(i, inside, e.k.let(w), e.k.let(dw)) for i, inside, w, dw in _grid_taps(e, mode, padding, align, x, size)]
        for x, size in zip(coordinates, sizes)
    ]


def _both(conditions: Sequence[Any]) -> Any:
    result = conditions[0]
    for c in conditions[1:]:
        result = ir.and_(result, c)
    return result


def _grid_sampler(e: Element, n: int, mode: int, padding: int, align: bool) -> Any:
    taps = _all_taps(e, n, mode, padding, align, e.at[0], e.at[2:])
    total = e.var(e.buffers["x"].compute, 0.0)
    for chosen in _products(taps):
        at = [ir.clamp(t[0], 0, size - 1) for t, size in zip(chosen, e.list("in", n))]
        weight = chosen[0][2]
        for t in chosen[1:]:
            weight = weight * t[2]
        value = e.load("x", [*e.at[:2], *at]) * weight
        total.set(total + ir.where(_both([t[1] for t in chosen]), value, 0.0))
    return total.as_node()


def _grid_sampler_backward(e: Element, n: int, mode: int, padding: int, align: bool, wants_input: bool) -> None:
    """For one place of the grid, all channels: scatters to grad_input, stores grad_grid."""
    batch, place = e.at[0], e.at[1:]
    taps = _all_taps(e, n, mode, padding, align, batch, place)
    compute = e.buffers["x"].compute
    totals = [e.k.var(compute, 0.0) for _ in range(n)]

    def channel(index: Sequence[Any]) -> None:
        c = index[0]
        g = e.k.let(e.load("grad", [batch, c, *place]))
        for chosen in _products(taps):
            with e.k.If(_both([t[1] for t in chosen])):
                at = [batch, c, *(t[0] for t in chosen)]
                weight = chosen[0][2]
                for t in chosen[1:]:
                    weight = weight * t[2]
                if mode != NEAREST:
                    v = e.k.let(e.load("x", at) * g)
                    for d in range(n):
                        slope = v
                        for i, t in enumerate(chosen):
                            slope = slope * (t[3] if i == d else t[2])
                        totals[d].set(totals[d] + slope)
                if wants_input:
                    e.buffers["grad_input"].atomic_add(e.index("grad_input", at), weight * g)

    e.loop([e["channels"]], channel)
    for d in range(n):
        e.buffers["grad_grid"].store(e.index("grad_grid", [batch, *place, ir.const(n - 1 - d, "i32")]), totals[d])


def _check_grid(n: int, x: Tensor, grid: Tensor, mode: int) -> None:
    name = "grid_sampler(): expected input and grid to have same dtype, but input has {} and grid has {}"
    check(x.dtype == grid.dtype, "RuntimeError", name.format(x.dtype, grid.dtype))
    text = f"grid_sampler(): expected {n + 2}D input and grid with same number of dimensions"
    check(x.ndim == n + 2 and grid.ndim == n + 2, "RuntimeError", text)
    text = "grid_sampler(): expected grid and input to have same batch size"
    check(eq(x.sizes[0], grid.sizes[0]), "RuntimeError", text)
    text = f"grid_sampler(): expected grid to have size {n} in last dimension, but got {{}}"
    check(eq(grid.sizes[-1], n), "RuntimeError", text, grid.sizes[-1])
    text = "grid_sampler(): expected input to have non-empty spatial dimensions"
    check(all_of(*(lt(0, s) for s in x.sizes[2:])), "RuntimeError", text)
    check(mode != BICUBIC or n == 2, "RuntimeError", "grid_sampler(): bicubic interpolation only supports 4D input")


def _sample(n: int, x: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Tensor:
    _check_grid(n, x, grid, mode)
    out = empty((*x.sizes[:2], *grid.sizes[1:-1]), x.dtype)
    if not out.is_empty:
        gather(_grid_sampler, [out], {"x": x, "grid": grid}, named("in", x.sizes[2:]), (n, mode, padding, align))
    return out


def _sample_backward(
    n: int, grad: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align: bool, mask: Sequence[int]
) -> tuple[Tensor | None, Tensor]:
    _check_grid(n, x, grid, mode)
    grad_grid = empty(grid.sizes, grid.dtype)
    grad_input: Tensor | None = None
    accumulator: Tensor | None = None
    if mask[0]:
        grad_input = empty(x.sizes, x.dtype)
        compute = DTYPES[x.dtype].compute
        accumulator = grad_input if x.dtype == compute else empty(x.sizes, compute)
        fill_bytes(accumulator, 0)
        _C.alert_not_deterministic(f"grid_sampler_{n}d_backward")  # places of the grid add to it with atomics
    if not grad_grid.is_empty:
        ins = {"grad": grad, "x": x, "grid": grid, "grad_grid": grad_grid}
        modes = {"grad_grid": "w", "grad_input": "a"}
        if accumulator is not None:
            ins["grad_input"] = accumulator
        scalars = {**named("in", x.sizes[2:]), "channels": x.sizes[1]}
        gather(
            _grid_sampler_backward, [], ins, scalars, (n, mode, padding, align, bool(mask[0])), shape=grid.sizes[:-1], modes=modes,
            scalar_elements=True,
        )  # fmt: skip
    if grad_input is not None and accumulator is not None and accumulator is not grad_input:
        copy_to(grad_input, accumulator)
    return grad_input, grad_grid


@lowering("grid_sampler_2d", coarse=True)
def grid_sampler_2d(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """input [N, C, H, W] at the places grid [N, h, w, 2], as (x, y) in -1 .. 1."""
    return _sample(2, input, grid, interpolation_mode, padding_mode, align_corners)


@lowering("grid_sampler_3d", coarse=True)
def grid_sampler_3d(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """input [N, C, D, H, W] at the places grid [N, d, h, w, 3], as (x, y, z) in -1 .. 1."""
    return _sample(3, input, grid, interpolation_mode, padding_mode, align_corners)


@lowering("grid_sampler_2d_backward", coarse=True)
def grid_sampler_2d_backward(
    grad_output: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
    output_mask: list,
) -> Any:
    return _sample_backward(2, grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask)


@lowering("grid_sampler_3d_backward", coarse=True)
def grid_sampler_3d_backward(
    grad_output: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
    output_mask: list,
) -> Any:
    return _sample_backward(3, grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask)
