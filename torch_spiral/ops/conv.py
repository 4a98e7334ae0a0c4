"""Convolution: forward, transposed, and gradients for input, weight and bias, in one to three dimensions.

A forward convolution of x with w, and the gradient for its input, are each other's transpose: `_forward` and `_transposed` serve
both directions of both. Filter extents are known to the plan (they unroll); all other sizes are run-time scalars.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import autotune
from ..kernels.block import conv as block
from ..kernels.block import gemm as block_gemm
from ..kernels.block import power_of_two
from ..kernels.kernel import DTYPES
from ..kernels.simt import conv as simt
from ..kernels.simt import gemm as simt_gemm
from ..kernels.vector import conv as vector
from ..kernels.vector import winograd
from ..kernels.vector.gemm import Epilogue
from ..lowering import (
    CHANNELS_LAST,
    Size,
    Tensor,
    about,
    bucket,
    build,
    cdiv,
    check,
    empty,
    fill_bytes,
    hint,
    is_one,
    is_zero,
    launch,
    le,
    lowering,
    maximum,
    minimum,
    packed,
    product,
    structured,
    target,
)
from .common import broadcast, contiguous, converted, copy_to, described
from .contraction import _epilogue_strides, _ordered, convolution_precision, matrix
from .contraction import product as matrix_product
from .integer_conv import integer_convolution
from .reduce import _sum, accumulator, reduce_rows

FLOATS = ("f32", "f16", "bf16", "f64")


@dataclass(frozen=True)
class Geometry:
    """Three spatial dimensions always; missing ones have extent 1."""

    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def volume(self) -> int:
        return self.taps[0] * self.taps[1] * self.taps[2]

    @property
    def pointwise(self) -> bool:
        """1x1, stride 1, no padding: a matrix product."""
        return self.volume == 1 and self.stride == (1, 1, 1) and self.padding == (0, 0, 0) and self.groups == 1


def _three(values: Sequence[int], fill: int, nd: int) -> tuple[int, ...]:
    values = list(values) * (nd if len(values) == 1 else 1)
    return (fill,) * (3 - nd) + tuple(values)


def _geometry(
    taps: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    nd = len(taps)
    return Geometry(_three(taps, 1, nd), _three(stride, 1, nd), _three(padding, 0, nd), _three(dilation, 1, nd), groups)


def _spatial(x: Tensor) -> list[Any]:
    return [1] * (5 - x.ndim) + list(x.sizes[2:])


def _strides(x: Tensor) -> list[Any]:
    """Image, channel and three spatial strides."""
    return [*x.strides[:2], *[0] * (5 - x.ndim), *x.strides[2:]]


def _channels_last(x: Tensor) -> bool:
    return x.is_channels_last and not x.is_contiguous


def _allocate(n: Any, c: Any, spatial: Sequence[Any], nd: int, dtype: str, channels_last: bool) -> Tensor:
    sizes = [n, c, *spatial[3 - nd :]]
    if not channels_last:
        return empty(sizes, dtype)
    strides: list[Any] = [0, 1]
    dense: Any = c
    inner: list[Any] = []
    for s in reversed(sizes[2:]):
        inner.append(dense)
        dense = dense * s
    strides[0] = dense
    out = empty(sizes, dtype, [*strides, *reversed(inner)])
    return replace(out, flags=out.flags | CHANNELS_LAST)


def _pixels(x: Tensor) -> Tensor | None:
    """x as [N, C, pixels] where its spatial dimensions collapse into one."""
    if x.is_contiguous:
        return x.view([x.sizes[0], x.sizes[1], product(x.sizes[2:])])
    if _channels_last(x):
        n, c, p = x.sizes[0], x.sizes[1], product(x.sizes[2:])
        return x.view([n, c, p], [p * c, 1, c])
    return None


# ---- forward ------------------------------------------------------------------------------------------------------------


Terms = Sequence[
    tuple[str, Tensor | None]
]  # as contraction.product's: operands are [N, Co, pixels], one value a channel or laid out as the result


def _forward(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, g: Geometry, terms: Terms = ()) -> None:
    """out[n, oc] = terms of bias + sum of w[oc, ic, tap] * x[n, ic, pixel * stride - padding + tap * dilation]."""
    if out.is_empty:
        return
    if g.pointwise and _pixels(x) and _pixels(out) and w.is_contiguous:
        w = converted(w, x.dtype)
        _pointwise(_pixels(x), w.view([w.sizes[0], w.sizes[1]]), bias, _pixels(out), terms)  # type: ignore[arg-type]
    elif target().schedule_class == "vector":
        _vector(x, w, bias, out, g, False, terms)
    else:
        _simt("forward", x, w if target().schedule_class == "block" else converted(w, x.dtype), out, g, bias, terms)


def _epilogue(bias: Tensor | None, terms: Terms) -> tuple[Epilogue, list[Tensor], list[Any]]:
    """The epilogue, its operands, and their strides as kernels of the vector class take them."""
    steps: list[Any] = []
    operands: list[Tensor] = []
    strides: list[Any] = []
    if bias is not None:
        steps.append(("add", bias.dtype, "m"))
        operands.append(bias)
        strides += [0, bias.strides[0]]
    for kind, x in terms:
        if x is None:
            steps.append(kind)
            continue
        per_channel = is_zero(x.strides[0]) and is_zero(x.strides[2])
        steps.append((kind, x.dtype, "m" if per_channel else "mn"))
        operands.append(x)
        strides += [x.strides[0], x.strides[1]]
    return Epilogue(tuple(steps)), operands, strides


def _pointwise(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, terms: Terms = ()) -> None:
    """out[n] = w @ x[n] + bias for [N, C, pixels]; channels_last as one product of all pixels."""
    n, c, p = x.sizes
    co = w.sizes[0]
    precision = convolution_precision(x.dtype)
    if is_one(x.strides[1]) and not x.is_contiguous and is_one(out.strides[1]):
        rows, result = x.view([1, n * p, c], [0, c, 1]), out.view([1, n * p, co], [0, co, 1])
        matrix_product(rows, matrix(w, 1, 0), result, terms=_by_pixels(bias, terms, n, co, p), precision=precision)
        return
    added: Terms = [] if bias is None else [("add", bias.view([1, co, 1], [0, bias.strides[0], 0]))]
    added = [*added, *terms]
    if target().schedule_class == "vector" and about(p) < 6 and bucket(c) >= 8:
        # Panels of columns are wider than those of rows, and fit few pixels badly.
        b = w.view([n, c, co], [0, w.strides[1], w.strides[0]])
        turned = [(kind, None if y is None else broadcast(y, out.sizes).transpose(1, 2)) for kind, y in added]
        matrix_product(x.transpose(1, 2), b, out.transpose(1, 2), terms=turned)
        return
    a = w.view([n, co, c], [0, w.strides[0], w.strides[1]])
    matrix_product(a, x, out, terms=added, precision=precision)


def _by_pixels(bias: Tensor | None, terms: Terms, n: Any, co: Any, p: Any) -> list[tuple[str, Tensor | None]]:
    """Bias and terms with operands [1, N * pixels, Co], for a channels-last result: those laid out as it are one matrix."""
    found: list[tuple[str, Tensor | None]] = []
    if bias is not None:
        found.append(("add", bias.view([1, n * p, co], [0, 0, bias.strides[0]])))
    for kind, x in terms:
        row = None if x is None else x.strides[0] if is_one(p) else x.strides[2]
        found.append((kind, None if x is None else x.view([1, n * p, co], [0, row, x.strides[1]])))
    return found


def _transposed(y: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, g: Geometry) -> None:
    """The transpose of `_forward` in x: out[n, ic] = bias + sum of w[oc, ic, tap] * y[n, oc, …]. w is [oc, ic / groups, taps]."""
    if out.is_empty:
        return
    if g.pointwise and _pixels(y) and _pixels(out) and w.is_contiguous:
        _pointwise(_pixels(y), w.view([w.sizes[0], w.sizes[1]]).transpose(0, 1), bias, _pixels(out))  # type: ignore[arg-type]
    elif target().schedule_class == "vector":
        _vector(y, w, bias, out, g, True)
    else:
        _simt_input(y, w, out, g, bias)


# ---- vector: OpenCL on CPUs ---------------------------------------------------------------------------------------------


def _pad(x: Tensor, extents: Sequence[Any], up: Sequence[int], offset: Sequence[int]) -> Tensor:
    """x with zeros around and `up - 1` zeros between its elements, contiguous, in the compute dtype."""
    n, c = x.sizes[0], x.sizes[1]
    compute = DTYPES[x.dtype].compute
    out = empty([n * c * product(extents) + vector.SLACK], compute)
    kernel = build(vector.pad, x.dtype)
    rows = c * extents[0] * extents[1]
    launch(
        kernel,
        [x, out],
        [*_strides(x), c, *_spatial(x), *extents, *up, *offset],
        (minimum(cdiv(rows, 64), target().compute_units), n, 1),
    )
    return out


@dataclass(frozen=True)
class Phase:
    """Of one dimension of a transposed convolution: the outputs first, first + stride, … use every step-th tap up to `last`, and
    output number i the inputs from i + start on, `spread` apart, the last tap first."""

    first: int
    stride: int
    taps: int
    last: int = 0
    step: int = 1
    start: int = 0
    spread: int = 1

    def outputs(self, size: Any) -> Any:
        return (size + (self.stride - 1 - self.first)) // self.stride


def _phases(taps: int, stride: int, padding: int, dilation: int) -> list[Phase]:
    """An output x sees tap k where x + padding - k * dilation is a multiple of the stride: that is the input's place."""
    phases = []
    for first in range(stride):
        seen = [k for k in range(taps) if (first + padding - k * dilation) % stride == 0]
        if not seen:
            phases.append(Phase(first, stride, 0))
            continue
        step = seen[1] - seen[0] if len(seen) > 1 else stride
        start = (first + padding - seen[-1] * dilation) // stride
        phases.append(Phase(first, stride, len(seen), seen[-1], step, start, step * dilation // stride))
    return phases


MAX_PHASES = 16  # more would be mostly launches


def _weights(w: Tensor, m: Any, k_channels: Any, g: Geometry, flip: Sequence[Phase] | None) -> Tensor:
    """w packed for `conv`; for the transpose the taps of a phase, the last one first, with the two channel dimensions exchanged."""
    kd, kh, kw = g.taps if flip is None else (phase.taps for phase in flip)
    volume, groups = g.volume, g.groups
    k = k_channels * kd * kh * kw
    s = vector.conv_schedule(DTYPES[w.dtype].compute)
    panels = cdiv(m, s.mr)
    w = contiguous(w)
    area, width = g.taps[1] * g.taps[2], g.taps[2]
    if flip is None:
        kind, strides = "", [0, m * k, k, volume, area, width, 1]
    else:
        kind = "T" + "".join(f"{p.last}-{p.step}x{p.taps}" for p in flip)
        first, steps = sum(p.last * n for p, n in zip(flip, (area, width, 1))), [p.step for p in flip]
        strides = [first, k_channels * m * volume, volume, m * volume, -steps[0] * area, -steps[1] * width, -steps[2]]
    with packed(w, [groups * k * panels * s.mr], DTYPES[w.dtype].compute, f"conv{kind}{g.taps}g{groups}{s}") as p:
        kernel = build(vector.pack_weights, w.dtype)
        launch(kernel, [w, p], [*strides, m, k, kd, kh, kw], (minimum(panels, 2), 2 if bucket(k) >= 8 else 1, groups))
    return p


def _vector(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, g: Geometry, flip: bool, terms: Terms = ()) -> None:
    n, c, co, o = x.sizes[0], x.sizes[1], out.sizes[1], _spatial(out)
    depthwise = (
        g.groups > 1
        and is_one(w.sizes[1])
        and g.taps[0] == 1
        and g.volume <= 49
        and out.is_contiguous
        and out.ndim <= 4
    )
    if depthwise and (not flip or is_one(w.sizes[0] // g.groups if isinstance(w.sizes[0], int) else 0)):
        _depthwise(x, w, bias, out, g, flip, terms)
        return
    padding = [2 - p if flip else p for p in g.padding[1:]]
    if (
        _by_tiles(x, out, g)
        and out.is_contiguous
        and max(padding) <= 1
        and 1 << bucket(x.sizes[3]) < 2 * winograd.TILES
    ):
        _winograd(x, w, bias, out, g, flip, terms)
        return
    strides = _strides(out)
    if out.is_contiguous:
        strides = [out.strides[0], out.strides[1], o[1] * o[2], o[2], 1]
    channels = c // g.groups
    known = all(isinstance(i, int | Size) for i in _spatial(x))
    few = known and product([_about(i) for i in _spatial(x)]) < 128 * product(g.stride)
    if not flip:
        extents = [i + 2 * p for i, p in zip(_spatial(x), g.padding)]
        padded = _pad(x, extents, (1, 1, 1), g.padding)
        p = _weights(w, co // g.groups, channels, g, None)
        _vector_product(
            padded,
            p,
            bias,
            terms,
            out,
            strides,
            o,
            g.taps,
            extents,
            g.stride,
            g.dilation,
            g.groups,
            n,
            channels,
            few=few,
        )
        return
    apart = 1 < g.stride[0] * g.stride[1] * g.stride[2] <= MAX_PHASES
    steps = g.stride if apart else (1, 1, 1)
    up = (1, 1, 1) if apart else g.stride
    phases = [_phases(*numbers) for numbers in zip(g.taps, steps, g.padding, g.dilation)]
    # All phases read one copy of x with zeros around.
    below = [max(0, *(-p.start for p in ps)) for ps in phases]
    above = [max(0, *(p.start + p.spread * (p.taps - 1) for p in ps)) for ps in phases]
    extents = [low + cdiv(i, s) + high for low, i, s, high in zip(below, o, steps, above)]
    padded = _pad(x, extents, up, below)
    inner = (extents[1] * extents[2], extents[2], 1)
    for phase in itertools.product(*phases):
        at = [low + p.start for low, p in zip(below, phase)]
        source = padded.view(padded.sizes, padded.strides, sum(i * size for i, size in zip(at, inner)))
        result = out.view(out.sizes, out.strides, sum(p.first * stride for p, stride in zip(phase, strides[2:])))
        taps, spread = [p.taps for p in phase], [p.spread for p in phase]
        p = _weights(w, co // g.groups, channels, g, phase) if product(taps) else padded
        _vector_product(
            source, p, bias, terms, result, [*strides[:2], *(a * b for a, b in zip(strides[2:], steps))],
            [p.outputs(size) for p, size in zip(phase, o)], taps, extents, (1, 1, 1), spread, g.groups, n, channels, apart, few,
        )  # fmt: skip


def _by_tiles(x: Tensor, y: Tensor, g: Geometry) -> bool:
    """Whether Winograd's algorithm computes a convolution of x, with y the result or its gradient, in less time than direct sums: enough
    channels that transforming tiles costs little beside the products, enough tiles that reading the transformed filters does."""
    known = all(isinstance(i, int | Size) for i in _spatial(x))
    return (
        known
        and g.taps == (1, 3, 3)
        and g.stride == g.dilation == (1, 1, 1)
        and g.groups == 1
        and x.ndim == 4
        and DTYPES[x.dtype].compute == DTYPES[y.dtype].compute == "f32"
        and min(bucket(x.sizes[1]), bucket(y.sizes[1])) >= 5
        and product([_about(i) for i in (x.sizes[0], *_spatial(x))]) >= 32
    )


def _winograd(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, g: Geometry, flip: bool, terms: Terms) -> None:
    n, c, m, (_, height, width) = x.sizes[0], x.sizes[1], out.sizes[1], _spatial(out)
    high, wide = cdiv(height, 2), cdiv(width, 2)
    offset = [2 - p if flip else p for p in g.padding[1:]]
    padded = _pad(x, [1, 2 * high + 2, 2 * wide + 2], (1, 1, 1), [0, *offset])
    s = winograd.schedule()
    w = contiguous(w)
    outer, inner = 9 * w.sizes[1], 9
    with packed(w, [winograd.packed_size(m, c, s)], "f32", f"winograd{'T' if flip else ''}{s}") as p:
        strides = (inner, outer) if flip else (outer, inner)
        kernel = build(winograd.pack, w.dtype, flip)
        launch(kernel, [w, p], [*strides, m, c], (minimum(cdiv(m, s.mr), target().compute_units), 1, 1))
    epilogue, operands, operand_strides = _epilogue(bias, terms)
    launch(
        build(winograd.winograd, out.dtype, epilogue), [padded, p, out, *operands],
        [out.strides[0], out.strides[1], *operand_strides, n, m, c, height, width],
        winograd.winograd_groups(n * high, wide, target().compute_units, minimum),
        lambda: 2 * winograd.PLACES * m * c * n * high * wide,
    )  # fmt: skip


def _vector_product(
    padded: Tensor, p: Tensor, bias: Tensor | None, terms: Terms, out: Tensor, strides: Sequence[Any], o: Sequence[Any],
    taps: Sequence[int], extents: Sequence[Any], step: Sequence[int], dilation: Sequence[int], groups: int, n: Any, channels: Any,
    apart: bool = False, few: bool = False,
) -> None:  # fmt: skip
    """The convolution of n padded images with packed weights into the pixels `o` of out, which has these strides. apart: they are not
    consecutive. few: an image has few of them."""
    epilogue, operands, operand_strides = _epilogue(bias, terms)
    m, k = out.sizes[1] // groups, channels * product(taps)
    s = vector.conv_schedule(DTYPES[out.dtype].compute)
    flat = is_one(o[0]) and taps[0] == 1 and is_one(extents[0])
    if few and flat and bucket(n) >= 1 and all(shape == "m" for _, _, _, shape in epilogue.operands):
        # The images as the depth of one, its steps as long as an image: they share panels of pixels.
        o, step, strides = [n, *o[1:]], [channels * groups, *step[1:]], [0, strides[1], strides[0], *strides[3:]]
        n, apart = 1, True
    kernel = build(vector.conv, out.dtype, out.is_contiguous and not apart, epilogue)
    launch(
        kernel, [padded, p, out, *operands],
        [channels * groups * product(extents), *strides, *operand_strides, m, groups, *o, *taps, *extents, *step, *dilation, k, channels],
        vector.conv_groups(m, product(o), n, groups, s, target().compute_units), lambda: 2 * m * k * product(o) * n * groups,
    )  # fmt: skip


def _depthwise(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, g: Geometry, flip: bool, terms: Terms = ()
) -> None:
    n, co, o = x.sizes[0], out.sizes[1], _spatial(out)
    _, kh, kw = g.taps
    step: tuple[int, ...]
    if flip:
        extents = [i + d * (k - 1) for i, d, k in zip(o, g.dilation, g.taps)]
        offset = [d * (k - 1) - p for d, k, p in zip(g.dilation, g.taps, g.padding)]
        padded, step = _pad(x, extents, g.stride, offset), (1, 1, 1)
    else:
        extents = [i + 2 * p for i, p in zip(_spatial(x), g.padding)]
        padded, step = _pad(x, extents, (1, 1, 1), g.padding), g.stride
    epilogue, operands, operand_strides = _epilogue(bias, terms)
    w = contiguous(converted(w, x.dtype))
    first, step_h, step_w = (g.volume - 1, -kw, -1) if flip else (0, kw, 1)
    kernel = build(vector.depthwise, w.dtype, (kh, kw), epilogue)
    launch(
        kernel, [padded, w, out, *operands],
        [first, g.volume, step_h, step_w, out.strides[0], out.strides[1], o[2], *operand_strides, co, co // g.groups, o[1], o[2],
         extents[1], extents[2], step[1], step[2], g.dilation[1], g.dilation[2]],
        (minimum(co, 2 * target().compute_units), n, 1), lambda: 2 * n * co * product(o) * g.volume,
    )  # fmt: skip


def _vector_weight(x: Tensor, y: Tensor, dw: Tensor, g: Geometry) -> None:
    """dw[oc, ic, tap] = sum over images and pixels of y[n, oc, pixel] * x[n, ic, pixel * stride - padding + tap * dilation]."""
    if _by_tiles(x, y, g):
        _winograd_weight(x, y, dw, g)
        return
    n, c, co = x.sizes[0], x.sizes[1], y.sizes[1]
    y = contiguous(y)
    extents = [i + 2 * p for i, p in zip(_spatial(x), g.padding)]
    padded = _pad(x, extents, (1, 1, 1), g.padding)
    o = _spatial(y)
    m, channels = co // g.groups, c // g.groups
    pixels = product(o)
    units = target().compute_units
    if g.groups > 1 and is_one(dw.sizes[1]) and g.taps[0] == 1 and g.volume <= 49 and y.ndim <= 4:
        kernel = build(vector.depthwise_backward_weight, y.dtype, g.taps[1:])
        launch(
            kernel, [padded, y, dw],
            [co * pixels, pixels, o[2], n, co, m, o[1], o[2], extents[1], extents[2], g.stride[1], g.stride[2], g.dilation[1], g.dilation[2]],
            (minimum(co, 2 * units), 1, 1), lambda: 2 * n * co * pixels * g.volume,
        )  # fmt: skip
        return
    kernel = build(vector.conv_backward_weight, y.dtype, dw.dtype)
    k = channels * g.volume
    # Along K first: tasks along M would each gather the same pixels.
    tasks = minimum(cdiv(k, 2 * vector.conv_schedule(DTYPES[y.dtype].compute).nr), 2 * units)
    launch(
        kernel, [padded, y, dw],
        [c * product(extents), co * pixels, pixels, m, g.groups, n, *o, *g.taps, *extents, *g.stride, *g.dilation, k, channels],
        (tasks, cdiv(2 * units, tasks), g.groups), lambda: 2 * m * k * pixels * n * g.groups,
    )  # fmt: skip


def _winograd_weight(x: Tensor, y: Tensor, dw: Tensor, g: Geometry) -> None:
    n, c, m = x.sizes[0], x.sizes[1], y.sizes[1]
    high, wide = (cdiv(size, 2) for size in y.sizes[2:])

    def turned(t: Tensor, height: Any, width: Any, padding: Sequence[int]) -> Tensor:
        out = empty([n * height * width * t.sizes[1] + vector.SLACK], "f32")
        launch(
            build(winograd.pad_last, t.dtype), [t, out], [*t.strides, n, t.sizes[1], *t.sizes[2:], height, width, *padding],
            (minimum(n * height, 2 * target().compute_units), 1, 1),
        )  # fmt: skip
        return out

    padded = turned(x, 2 * high + 2, 2 * wide + 2, g.padding[1:])
    launch(
        build(winograd.weight_gradient, dw.dtype), [padded, turned(y, 2 * high, 2 * wide, (0, 0)), dw], [n, m, c, high, wide],
        winograd.weight_groups(m, c, target().compute_units, maximum), lambda: 2 * winograd.PLACES * m * c * n * high * wide,
    )  # fmt: skip


def _tuned(x: Tensor, out: Tensor, g: Geometry, nd: int, flags: str, default: Any, candidates: Any) -> Any:
    """The schedule of a forward convolution of one group: the default, or what was measured to be faster."""
    cut = slice(3 - nd, 3)
    taps, stride = ("x".join(str(n) for n in numbers[cut]) for numbers in (g.taps, g.stride))
    pixels = sum(bucket(n) for n in (x.sizes[0], *out.sizes[2:]))
    key = f"{x.dtype} {nd}d {taps} s{stride} {flags} c{bucket(x.sizes[1])} o{bucket(out.sizes[1])} p{pixels}"
    spatial = ([1] * (nd - len(x.sizes) + 2)) + [hint(n) for n in x.sizes[2:]]
    sizes = [hint(x.sizes[0]), hint(x.sizes[1]), *spatial, hint(out.sizes[1])]
    return autotune.choose(
        "conv", key, default, candidates, [*sizes, *g.taps[cut], *g.stride[cut], *g.padding[cut], *g.dilation[cut]]
    )


# ---- simt: GPUs ---------------------------------------------------------------------------------------------------------


def _simt_input(y: Tensor, w: Tensor, out: Tensor, g: Geometry, bias: Tensor | None) -> None:
    """The transpose of a convolution on a GPU: a strided one phase by phase, without products with inserted zeros."""
    if not 1 < product(g.stride) <= MAX_PHASES:
        _simt("input", y, w, out, g, bias)
        return
    phases = list(itertools.product(*(_phases(*n) for n in zip(g.taps, g.stride, g.padding, g.dilation))))
    seen = [phase for phase in phases if all(p.taps for p in phase)]
    if bias is None and len(seen) < len(phases):  # one fill for the outputs that no tap reaches
        fill_bytes(out, 0)
        phases = seen
    for phase in phases:
        _simt("input", y, w, out, g, bias, phase=phase)


def _simt(
    mode: str, gathered: Tensor, w: Tensor, out: Tensor, g: Geometry, bias: Tensor | None = None, terms: Terms = (),
    phase: Sequence[Phase] | None = None,
) -> None:  # fmt: skip
    """mode "forward": x, w → y; "input": y, w → x, or one phase of it; "weight": x, y → w (the arguments in that order)."""
    t = target()
    bias = None if bias is None else contiguous(bias)
    nd = 3 if gathered.ndim == 5 else 2
    cut = slice(3 - nd, 3)
    taps, stride, padding, dilation = g.taps[cut], g.stride[cut], g.padding[cut], g.dilation[cut]
    weight = out if mode == "weight" else w
    x, y = (out, gathered) if mode == "input" else (gathered, w if mode == "weight" else out)
    ic, oc = x.sizes[1] // g.groups, y.sizes[1] // g.groups
    xs, ys = _strides(x), _strides(y)
    ws = _strides(weight)
    xs, ys, ws = ([*s[:2], *s[2:][cut]] for s in (xs, ys, ws))
    pixel = (_spatial(x) if mode == "input" else _spatial(y))[cut]
    mul: Sequence[int]
    add: Sequence[int]
    tap_mul: Sequence[int]
    div: Sequence[int]
    if phase:  # its outputs and taps are tensors with strides of their own; taps ascend, so inputs descend
        parts = phase[cut]
        pixel = [p.outputs(size) for p, size in zip(parts, pixel)]
        out = out.view(out.sizes, out.strides, sum(p.first * s for p, s in zip(parts, xs[2:])))
        w = w.view(w.sizes, w.strides, sum((p.last - p.step * max(p.taps - 1, 0)) * s for p, s in zip(parts, ws[2:])))
        xs = [*xs[:2], *(p.stride * s for p, s in zip(parts, xs[2:]))]
        ws = [*ws[:2], *(p.step * s for p, s in zip(parts, ws[2:]))]
        taps, stride = tuple(p.taps for p in parts), (1,) * nd
        padding = tuple(p.start + p.spread * (p.taps - 1) for p in parts)
        dilation = tuple(p.spread for p in parts)
    if mode == "input":
        mul, add, tap_mul, div, size = [1] * nd, padding, [-d for d in dilation], stride, _spatial(y)[cut]
        gs, cs, g_group, c_group, channels = ys, xs, oc * ys[1], ic * xs[1], oc
        w_part = [ws[1], ws[0], *ws[2:], oc * ws[0]]
    else:
        mul, add, tap_mul, div, size = stride, [-p for p in padding], dilation, [1] * nd, _spatial(x)[cut]
        gs, cs, g_group, c_group, channels = xs, ys, ic * xs[1], oc * ys[1], ic
        w_part = [ws[0], ws[1], *ws[2:], oc * ws[0]]
    c_part = [cs[1], cs[0], *cs[2:], c_group]
    if mode == "weight":
        c_part, w_part = w_part, [ys[1], ys[0], *ys[2:], oc * ys[1]]
    pixels, reduced = x.sizes[0] * product(pixel), channels * product(taps)
    m = ic if mode == "input" else oc
    n, k = (reduced, x.sizes[0] * product(pixel)) if mode == "weight" else (pixels, reduced)
    scalars = [
        g.groups, m, n, k, *pixel, *taps, channels, *mul, *add, *tap_mul, *div, *size, gs[0], gs[1], *gs[2:], g_group, *w_part, *c_part,
    ]  # fmt: skip
    divided = mode == "input" and any(s != 1 for s in stride)
    depthwise = g.groups > 1 and is_one(weight.sizes[1])
    dtype = gathered.dtype
    if t.schedule_class == "block":
        if _readable_by_channels(mode, gathered, w, out, g):
            _block_by_channels(mode, gathered, w, out, g, bias, terms, nd)
        else:
            _block(mode, gathered, w, out, g, bias, terms, nd, scalars, (m, n, k), divided)
        return
    epilogue, operands, _ = _epilogue(bias, terms)
    if depthwise and mode == "weight":
        kernel = build(simt.direct_weight, dtype, out.dtype, nd)
        groups = (minimum(m * n * g.groups, 65535), 1, 1)
        launch(kernel, [gathered, w, out], scalars, groups, lambda: 2 * m * n * k * g.groups)
        return
    if depthwise:
        kernel = build(simt.direct, mode, dtype, out.dtype, nd, divided, epilogue)
        groups = simt.direct_groups(m, n, g.groups, minimum)
        launch(kernel, [gathered, w, *operands, out], scalars, groups, lambda: 2 * m * n * k * g.groups)
        return
    last = _channels_last(gathered)
    columns_first = _channels_last(out) and mode != "weight"
    schedule = simt_gemm.default_schedule(t, dtype, bucket(out.sizes[1]), 10, whole=True)
    if mode == "forward" and g.groups == 1 and DTYPES[dtype].compute == "f32":
        flags = ("last" if last else "first") + ("-last" if columns_first else "-first")
        schedule = _tuned(x, out, g, nd, flags, schedule, lambda: simt.candidates(t, dtype))
    kernel = build(
        simt.conv,
        schedule,
        mode,
        dtype,
        out.dtype,
        nd,
        divided,
        not last,
        "k" if last else "r",
        columns_first,
        False,
        epilogue,
    )
    launch(
        kernel,
        [gathered, w, *operands, out],
        scalars,
        simt.conv_groups(schedule, m, n, g.groups, columns_first, 1, minimum),
        lambda: 2 * m * n * k * g.groups,
    )


# ---- block: Triton ------------------------------------------------------------------------------------------------------


def _about(n: Any) -> int:
    """A size, or the middle of what the plan's key leaves open."""
    return n if isinstance(n, int) else 1 if is_one(n) else 3 << bucket(n) >> 1


def _readable_by_channels(mode: str, x: Tensor, w: Tensor, out: Tensor, g: Geometry) -> bool:
    """Whether the kernel of channels-last tensors (block.last) computes it, from a copy of x where x is laid out otherwise."""
    if mode == "weight" or (mode == "input" and g.stride != (1, 1, 1)) or _pixels(out) is None:
        return False
    channels = w.sizes[1] if mode == "forward" else w.sizes[0] if g.groups == 1 else _about(w.sizes[0]) // g.groups
    wide = bucket(channels) >= block.WIDE.bit_length() - 1
    if not wide and not (
        mode == "forward" and g.groups == 1 and g.taps[2] > 1 and g.dilation[2] == 1 and bucket(channels) >= 1
    ):
        return False
    return wide or x.is_channels_last or sum(bucket(n) for n in (x.sizes[0], *x.sizes[2:])) >= 12


def _by_taps(w: Tensor, g: Geometry, mode: str, dtype: str) -> Tensor:
    """w as [output channels, taps, channels of a group], contiguous."""
    taps = w.sizes[2:]
    if mode == "forward":
        if w.dtype == dtype and ((g.volume == 1 and w.is_contiguous) or _channels_last(w)):
            return w
        sizes, strides = [w.sizes[0], *taps, w.sizes[1]], [w.strides[0], *w.strides[2:], w.strides[1]]
    else:
        channels = w.sizes[0] // g.groups
        sizes = [g.groups, w.sizes[1], *taps, channels]
        strides = [channels * w.strides[0], w.strides[1], *w.strides[2:], w.strides[0]]
    with packed(w, sizes, dtype, f"{mode} by taps, {g.groups} groups") as p:
        copy_to(p, w.view(sizes, strides))
    return p


def _block_by_channels(
    mode: str, x: Tensor, w: Tensor, out: Tensor, g: Geometry, bias: Tensor | None, terms: Terms, nd: int
) -> None:
    """A convolution of x into out, or for "input" one of the gradient x into the gradient out of its input, stride 1."""
    t, dtype, cut = target(), x.dtype, slice(3 - nd, 3)
    if not x.is_channels_last:
        copy = _allocate(x.sizes[0], x.sizes[1], _spatial(x), x.ndim - 2, dtype, True)
        copy_to(copy, x)
        x = copy
    taps, size, o = list(g.taps[cut]), _spatial(x)[cut], _spatial(out)[cut]
    mul: Sequence[int]
    add: Sequence[int]
    tap_mul: Sequence[int]
    if mode == "forward":
        mul, add, tap_mul = g.stride[cut], [-p for p in g.padding[cut]], g.dilation[cut]
        channels, n = w.sizes[1], out.sizes[1] // g.groups
    else:
        mul, add, tap_mul = [1] * nd, g.padding[cut], [-d for d in g.dilation[cut]]
        channels, n = w.sizes[0] // g.groups, w.sizes[1]
    images, pixels, co = x.sizes[0], product(o), out.sizes[1]
    volume, step = g.volume, 0
    about_channels = _about(w.sizes[1]) if mode == "forward" else _about(w.sizes[0]) // g.groups
    run = about_channels < block.WIDE and mode == "forward"
    if run:  # a row of taps is one run of channels
        step = power_of_two(max(taps[-1] * about_channels, 16))
        channels, about_channels = channels * taps[-1], about_channels * taps[-1]
        volume, taps[-1] = volume // taps[-1], 1
    xs = _strides(x)
    # Pixels of a channels-last result follow each other through all images.
    whole = out.is_channels_last
    batch, m = (1, images * pixels) if whole else (images, pixels)
    c = out.view([batch, m, co], [0, co, 1] if whole else [co * pixels, 1, pixels])
    if whole:
        steps = _by_pixels(bias, terms, images, co, pixels)
    else:
        steps = [] if bias is None else [("add", bias.view([images, pixels, co], [0, 0, bias.strides[0]]))]
        steps += [(kind, None if y is None else y.transpose(1, 2)) for kind, y in terms]
    epilogue, operands = _pixel_epilogue(steps)
    extra = [("i64", v) for v in _epilogue_strides(epilogue, operands)]
    # A choice by what the key knows of the sizes.
    about = [(_about(i) + 2 * p - d * (k - 1) - 1) // q + 1 for i, p, d, k, q in zip(size, g.padding[cut], g.dilation[cut], g.taps[cut], g.stride[cut])]  # fmt: skip
    if mode == "input":
        about = [_about(i) for i in size]
    about_m = max(product(about), 1) * (_about(images) if whole else 1)
    about_batch = g.groups * (1 if whole else _about(images))
    precision = convolution_precision(dtype)
    found = block.choices(
        t, dtype, precision, about_m, max(_about(co) // g.groups, 1), volume, max(about_channels, 1), about_batch, step
    )
    choice = found[0]
    if mode == "forward" and g.groups == 1 and whole and DTYPES[dtype].compute == "f32":
        choice = _tuned(x, out, g, nd, f"{'run' if run else 'last'}-{precision or 'half'}", choice, lambda: found)
    s, splits = choice.schedule, choice.splits
    weights = _by_taps(w, g, mode, dtype)
    groups = block.last_groups(s, m, n, batch, g.groups, splits)
    narrow = [m, n, channels, *xs[2:][cut], *o, *taps, *size, *mul, *add, *tap_mul]
    work = lambda: 2 * images * pixels * n * channels * volume * g.groups  # noqa: E731
    layout = "n" if whole else "t"
    key = (s, dtype, out.dtype, nd, run, precision)
    known = x.sizes[1] if isinstance(x.sizes[1], int) and g.groups == 1 and not run else 0
    tiles = known > 0 and known % s.k == 0 and described(weights, known * volume)
    if splits == 1:
        named = [("i64", c.strides[0]), ("i64", co if whole else pixels), ("i64", xs[0]), *(("i32", v) for v in narrow)]
        kernel = build(block.last, *key, layout, epilogue, False, tiles)
        launch(kernel, [x, weights, *operands, out], _ordered(None, [*named, *extra]), groups, work)
        return
    compute, total = DTYPES[dtype].compute, batch * m * co
    partial = empty((splits, batch, m, co), compute)
    span = cdiv(volume * cdiv(channels, s.k), splits)
    named = [*(("i64", v) for v in (m * co, co, total, xs[0])), *(("i32", v) for v in (*narrow, span))]
    launch(
        build(block.last, *key, "n", Epilogue(), True, tiles),
        [x, weights, partial],
        _ordered(None, named),
        groups,
        work,
    )
    finish = build(block_gemm.reduce_splits, compute, out.dtype, "n" if whole else "s", epilogue)
    named = [("i64", v) for v in (c.strides[:2] if whole else c.strides)] + [("i64", total)]
    named += [*(("i32", v) for v in (m, co, splits)), *extra]
    launch(finish, [partial, *operands, out], _ordered(None, named), block_gemm.reduce_groups(m, co, batch))


def _pixel_epilogue(terms: Terms) -> tuple[Epilogue, list[Tensor]]:
    """The epilogue of a result [batch, pixels, channels], and its operands."""
    steps: list[Any] = []
    for kind, x in terms:
        if x is None:
            steps.append(kind)
            continue
        unit, vector = is_one(x.strides[2]), is_zero(x.strides[1])
        steps.append((kind, x.dtype, "n" if unit and vector else "mn" if unit else "s"))
    return Epilogue(tuple(steps)), [x for _, x in terms if x is not None]


def _block(
    mode: str, gathered: Tensor, w: Tensor, out: Tensor, g: Geometry, bias: Tensor | None, terms: Terms, nd: int,
    scalars: list[Any], sizes: tuple[Any, Any, Any], divided: bool,
) -> None:  # fmt: skip
    """The product that _simt describes, by its scalars."""
    t, dtype, weight = target(), gathered.dtype, mode == "weight"
    m, n, k = sizes
    about_m = 1 << bucket(out.sizes[0] if weight else out.sizes[1]) if g.groups == 1 else 1
    pixels = sum(bucket(size) for size in (gathered.sizes[0], *gathered.sizes[2:]))
    s = block.schedule(dtype, about_m, 64 if weight else 4096)
    precision, taps_last = convolution_precision(dtype), weight or not _channels_last(gathered)
    epilogue, operands = _channel_epilogue(bias, terms)
    key = (s, mode, dtype, out.dtype, nd, divided, taps_last, precision)
    w = converted(w, dtype)
    if not weight or pixels < 10:
        kernel = build(block.conv, *key, epilogue, False)
        launch(
            kernel,
            [gathered, w, *operands, out],
            [*_epilogue_strides(epilogue, operands), *scalars],
            block.groups(s, m, n, g.groups),
            lambda: 2 * m * n * k * g.groups,
        )
        return
    # Few tiles and all pixels to sum over: the sum is cut.
    tiles = cdiv(m, s.m) * cdiv(n, s.n) * g.groups
    splits = maximum(minimum(cdiv(2 * t.compute_units, tiles), cdiv(k, 8 * s.k)), 1)
    span = cdiv(cdiv(k, splits), s.k) * s.k
    splits = cdiv(k, span)
    compute = DTYPES[dtype].compute
    partial = empty((splits, g.groups, m, n), compute)
    groups = block.groups(s, m, n, g.groups, splits)
    work = lambda: 2 * m * n * k * g.groups  # noqa: E731
    launch(build(block.conv, *key, Epilogue(), True), [gathered, w, partial], [*scalars, span], groups, work)
    finish = build(block_gemm.reduce_splits, compute, out.dtype, "n", Epilogue())
    launch(finish, [partial, out], [m * n, n, g.groups * m * n, m, n, splits], block_gemm.reduce_groups(m, n, g.groups))


def _channel_epilogue(bias: Tensor | None, terms: Terms) -> tuple[Epilogue, list[Tensor]]:
    """The epilogue of a result [N, channels, pixels], and its operands."""
    steps: list[Any] = []
    operands: list[Tensor] = []
    if bias is not None:
        terms = [("add", bias.view([1, bias.sizes[0], 1], [0, bias.strides[0], 0])), *terms]
    for kind, x in terms:
        if x is None:
            steps.append(kind)
            continue
        steps.append((kind, x.dtype, "m" if is_zero(x.strides[2]) else "s"))
        operands.append(x)
    return Epilogue(tuple(steps)), operands


def _sum_channels(out: Tensor, grad: Tensor) -> None:
    dims = [d for d in reversed(range(grad.ndim)) if d != 1]
    sizes = [grad.sizes[d] for d in dims] + [grad.sizes[1]]
    strides = [grad.strides[d] for d in dims] + [grad.strides[1]]
    out_strides = [0] * len(dims) + [1]
    reduce_rows("sum", _sum, [(out, out_strides)], [(grad, strides)], sizes, len(dims), key=(accumulator(out.dtype),))


# ---- ops ----------------------------------------------------------------------------------------------------------------


def _convolution(
    x: Tensor, w: Tensor, taps: list[int], bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int, terms: Terms = (), out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out, where it is given, is contiguous and takes the result; terms need it."""
    for name, t in (("input", x), ("weight", w)):
        check(t.dtype != "bool", "NotImplementedError", f"convolution of {name} dtype {t.dtype} is not supported")
    nd = len(taps)
    g = _geometry(taps, stride, padding, dilation, groups)
    last = _channels_last(x) or (_channels_last(w) and x.ndim == 4 and not is_one(x.sizes[1]))
    spatial_in = list(x.sizes[2:])
    s, p, d = g.stride[3 - nd :], g.padding[3 - nd :], g.dilation[3 - nd :]
    if transposed:
        op = list(output_padding) * (nd if len(output_padding) == 1 else 1)
        spatial = [(i - 1) * s[j] - 2 * p[j] + d[j] * (taps[j] - 1) + op[j] + 1 for j, i in enumerate(spatial_in)]
        channels = w.sizes[1] * groups
    else:
        spatial = [(i + (2 * p[j] - d[j] * (taps[j] - 1) - 1)) // s[j] + 1 for j, i in enumerate(spatial_in)]
        channels = w.sizes[0]
    for j, o in enumerate(spatial):
        check(
            le(1, o), "RuntimeError",
            "Calculated padded input size per channel: ({}). Kernel size: ({}). Kernel size can't be greater than actual input size",
            spatial_in[j] + 2 * p[j], d[j] * (taps[j] - 1) + 1,
        )  # fmt: skip
    if out is None:
        out = _allocate(x.sizes[0], channels, [1] * (3 - nd) + spatial, nd, x.dtype, last)
    if DTYPES[x.dtype].kind in ("int", "uint"):
        integer_convolution(x, w, bias, out, g, transposed)
    elif transposed:
        assert not terms
        _transposed(x, w, bias, out, g)
    else:
        _forward(x, w, bias, out, g, terms)
    return out


@lowering("convolution_overrideable", exact=("weight",))
def convolution(
    x: Tensor, w: Tensor, taps: list[int], bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """x [N, C, *S], w [Co, C / groups, *taps] (transposed: [C, Co / groups, *taps]), bias [Co] or None → [N, Co, *out]."""
    return _convolution(x, w, taps, bias, stride, padding, dilation, transposed, output_padding, groups)


@lowering("convolution_backward_overrideable", exact=("weight",))
def convolution_backward(
    grad: Tensor, x: Tensor, w: Tensor, taps: list[int], stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int, mask: list[int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients for input, weight and bias, those that `mask` asks for."""
    g = _geometry(taps, stride, padding, dilation, groups)
    nd = len(taps)
    dx = dw = db = None
    if mask[0]:
        dx = _allocate(x.sizes[0], x.sizes[1], _spatial(x), nd, x.dtype, _channels_last(x))
        (_forward if transposed else _transposed)(grad, w, None, dx, g)
    if mask[1]:
        dw = empty(w.sizes, w.dtype)
        a, b = (grad, x) if transposed else (x, grad)  # the side that taps gather from, and the other
        if target().schedule_class == "vector":
            _vector_weight(a, b, dw, g)
        else:
            _simt("weight", a, b, dw, g)
    if mask[2]:
        db = empty([grad.sizes[1]], grad.dtype)
        _sum_channels(db, grad)
    return dx, dw, db


@structured("slow_conv_transpose2d")
def slow_conv_transpose2d(
    x: Tensor, w: Tensor, taps: list[int], bias: Tensor | None, stride: list[int], padding: list[int], output_padding: list[int],
    dilation: list[int], out: Tensor,
) -> None:  # fmt: skip
    """x [N, C, H, W], w [C, Co, *taps]."""
    if x.ndim == 3:  # ATen's meta function makes an output with a batch dimension that only the CPU's body removes
        raise NotImplementedError("slow_conv_transpose2d of an image without a batch dimension")
    dense = out if out.is_contiguous else empty(out.sizes, out.dtype)
    _convolution(
        x, w, list(taps) * (3 - len(taps)), bias, stride, padding, dilation, True, output_padding, 1, (), dense
    )
    if dense is not out:
        copy_to(out, dense)
