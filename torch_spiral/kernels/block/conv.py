"""Convolution in Triton as an implicit matrix product: forward, gradient for the input (also transposed convolution) and for
the weight; any stride, padding, dilation, groups and tensor strides.

The three roles, their indices and their scalars are those of kernels/simt/conv.py (scalar_names). A tile of the gathered
operand is read at computed places, where what is outside reads as 0; products are tl.dot's.
"""

from __future__ import annotations

from typing import Any

from ..kernel import Kernel, Target, compute_dtype
from ..simt.conv import MODES, scalar_names
from ..triton import TYPES
from . import STORAGE, cdiv, template
from .gemm import Schedule
from .gemm import candidates as products


def schedule(dtype: str, m: int, n: int) -> Schedule:
    """For about m rows (channels) and n columns."""
    tile_m = 16 if m < 32 else 64 if m < 128 else 128
    tile_n = 64 if n < 4096 or tile_m == 16 else 128
    if dtype == "f64":
        return Schedule(min(tile_m, 32), 32, 16, 4, 2)
    step = 32 if dtype == "f32" else 64
    return Schedule(tile_m, tile_n, step, 8 if tile_m * tile_n >= 128 * 128 else 4, 3)


def candidates(target: Target, dtype: str) -> list[Schedule]:
    """What a tuner may choose from: tiles of matrix products, whatever the sizes."""
    found = (c.schedule for c in products(target, dtype, "", 1 << 20, 1 << 20, 1, 1))
    return list(dict.fromkeys(s for s in found if not s.persistent))


def conv(
    target: Target, s: Schedule, mode: str, dtype: str, out_dtype: str, nd: int, divided: bool, taps_last: bool, precision: str,
    bias: str, split: bool,
) -> Kernel:  # fmt: skip
    """Buffers: g, w, (bias), c. Scalars: scalar_names(nd), then the bias's stride, or for `split` (partial sums, c [splits,
    groups, m, n] contiguous) the length of a run of k. Grid: groups()."""
    assert mode in MODES
    acc = TYPES[compute_dtype(dtype)]
    dims = range(nd)
    lines = [
        f"tiles_m = tl.cdiv(m, {s.m})",
        f"tiles_n = tl.cdiv(n, {s.n})",
        "tiles = tiles_m * tiles_n",
        "z = tl.program_id(0) // tiles",
        "tile = tl.program_id(0) % tiles",
        f"rm = (tile % tiles_m) * {s.m} + tl.arange(0, {s.m})",
        f"rn = (tile // tiles_m) * {s.n} + tl.arange(0, {s.n})",
        "z64 = z.to(tl.int64)",
    ]

    def digits(index: str, kind: str, p: str) -> list[str]:
        """Splits a pixel or tap index into p_major and p_0, p_1 …"""
        out, rest = [], index
        if kind == "tap" and not taps_last:
            out += [f"{p}_major = {index} % channels", f"{p}_rest = {index} // channels"]
            rest = f"{p}_rest"
        for i in reversed(dims):
            if i == 0 and kind == "tap" and not taps_last:
                out.append(f"{p}_{i} = {rest}")
            else:
                out += [f"{p}_{i} = {rest} % {kind}{i}", f"{p}_rest{i} = {rest} // {kind}{i}"]
                rest = f"{p}_rest{i}"
        return out if kind == "tap" and not taps_last else [*out, f"{p}_major = {rest}"]

    def linear(tensor: str, p: str) -> str:
        return " + ".join([f"{p}_major * {tensor}_major", *(f"{p}_{i} * {tensor}_{i}" for i in dims)])

    def side(kind: str, p: str) -> list[str]:
        """What an index adds to the gathered operand's offset and coordinates."""
        if kind == "pixel":
            return [f"{p}_offset = {p}_major * g_image", *(f"{p}_at{i} = {p}_{i} * mul{i} + add{i}" for i in dims)]
        return [f"{p}_offset = {p}_major * g_channel", *(f"{p}_at{i} = {p}_{i} * tap_mul{i}" for i in dims)]

    column, inner = ("tap", "pixel") if mode == "weight" else ("pixel", "tap")
    lines += digits("rn", column, "col") + side(column, "col")
    lines += [
        "g_base = g + z64 * g_group",
        "w_base = w + z64 * w_group + tl.where(rm < m, rm, 0)[:, None] * w_row",
        f"acc = tl.zeros([{s.m}, {s.n}], {acc})",
    ]
    if split:
        lines += ["start = tl.program_id(1) * span", "end = tl.minimum(start + span, k)"]
    else:
        lines += ["start = 0", "end = k"]
    body = [f"rk = j + tl.arange(0, {s.k})", *digits("rk", inner, "in"), *side(inner, "in")]
    body.append("inside = (rk < end)[:, None] & (rn < n)[None, :]")
    index = ["in_offset[:, None] + col_offset[None, :]"]
    for i in dims:
        body.append(f"at{i} = in_at{i}[:, None] + col_at{i}[None, :]")
        if divided:
            body += [
                f"quotient{i} = at{i} // div{i}",
                f"inside = inside & (quotient{i} * div{i} == at{i})",
                f"at{i} = quotient{i}",
            ]
        body.append(f"inside = inside & (at{i} >= 0) & (at{i} < size{i})")
        index.append(f"at{i} * g_{i}")
    dot = f", input_precision={precision!r}" if precision else ""
    out_type = f", out_dtype={acc}" if dtype == "f64" else ""
    body += [
        f"y = tl.load(g_base + ({' + '.join(index)}), mask=inside, other=0)",
        f"x = tl.load(w_base + ({linear('w', 'in')})[None, :], mask=(rk < end)[None, :], other=0)",
        f"acc = tl.dot(x, y, acc{dot}{out_type})",
    ]
    lines += [f"for j in range(start, end, {s.k}):", *("    " + t for t in body)]
    lines.append("stored = (rm < m)[:, None] & (rn < n)[None, :]")
    if split:
        lines += [
            "place = ((tl.program_id(1).to(tl.int64) * groups + z) * m + rm[:, None]) * n + rn[None, :]",
            "tl.store(c + place, acc, mask=stored)",
        ]
    else:
        if bias:
            lines.append(f"acc += tl.load(bias + (z * m + rm) * bias_stride, mask=rm < m, other=0).to({acc})[:, None]")
        lines += [
            f"place = rm[:, None] * c_row + ({linear('c', 'col')})[None, :]",
            f"tl.store(c + z64 * c_group + place, acc.to({STORAGE[out_dtype]}), mask=stored)",
        ]
    scalars = [(n, "i32") for n in scalar_names(nd)]
    scalars += [("span", "i32")] if split else [("bias_stride", "i32")] if bias else []
    out_dtype = compute_dtype(dtype) if split else out_dtype
    flags = ("d" if divided else "") + ("t" if taps_last else "c") + ("_split" if split else "")
    name = f"conv{nd}_{mode}_{dtype}_{out_dtype}_{flags}{precision}_{bias}_{s}"
    buffers = [("g", dtype), ("w", dtype), *([("bias", bias)] if bias else []), ("c", out_dtype)]
    return template(name, buffers, scalars, "\n".join(lines), s.warps, s.stages)


def groups(s: Schedule, m: Any, n: Any, count: Any, splits: Any = 1) -> tuple[Any, Any, Any]:
    """The grid of conv(); count: of convolution groups."""
    return (cdiv(m, s.m) * cdiv(n, s.n) * count, splits, 1)
