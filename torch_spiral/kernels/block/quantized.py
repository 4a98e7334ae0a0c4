"""Products with quantized weights in Triton: out[m, n] = sum over k of x[m, k] * w[n, k], w dequantized tile by tile."""

from __future__ import annotations

from typing import Any

from ..kernel import Kernel, Target
from . import STORAGE, cdiv, template
from .gemm import Schedule


def schedule(dtype: str, m: int, group: int = 64) -> Schedule:
    """For about m rows; a tile lies within a group of the reduction."""
    step = min(group, 32 if dtype == "f32" else 64)
    return (
        Schedule(16, 64, step, 4, 4)
        if m < 32
        else Schedule(64, 64, step, 4, 3)
        if m < 256
        else Schedule(128, 128, step, 8, 3)
    )


def product(target: Target, s: Schedule, dtype: str, bits: int, scale: str, group: int, precision: str) -> Kernel:
    """bits 8: w is int8 [N, K], scales [N]; a column's scale multiplies its sum. bits 4: w is bytes [N, K / 2], the even one of
    two in the high half, in a buffer of i32; scales [K / group, N, 2] holds s and z of (q - 8) * s + z.

    Buffers: x, w, scales (of dtype `scale`), out, the latter three contiguous. Scalars: x's row stride, m, n, k. Grid: groups()."""
    stored = STORAGE[dtype]
    ip = f", input_precision={precision!r}" if precision else ""
    lines = [
        f"tiles_m = tl.cdiv(m, {s.m})",
        f"ra = (tl.program_id(0) % tiles_m) * {s.m} + tl.arange(0, {s.m})",
        f"rb = (tl.program_id(0) // tiles_m) * {s.n} + tl.arange(0, {s.n})",
        f"rk = tl.arange(0, {s.k})",
        "ca = tl.where(ra < m, ra, 0).to(tl.int64)",
        "cb = tl.where(rb < n, rb, 0).to(tl.int64)",
        "px = x + ca[:, None] * xm + rk[None, :]",
        f"acc = tl.zeros([{s.m}, {s.n}], tl.float32)",
    ]
    if bits == 8:
        lines.append("pw = w + cb[:, None] * k + rk[None, :]")
        read = [
            "q = tl.load(pw, mask=(rk < k - j)[None, :], other=0)",
            f"y = q.to({stored})",
            f"pw += {s.k}",
        ]
    else:
        lines += [
            f"rh = tl.arange(0, {s.k // 2})",
            "pw = w.to(tl.pointer_type(tl.uint8)) + cb[:, None] * (k // 2) + rh[None, :]",
        ]
        read = [
            "both = tl.load(pw, mask=(rh < (k - j) // 2)[None, :], other=0)",
            f"q = tl.reshape(tl.join(both >> 4, both & 15), [{s.n}, {s.k}])",
            f"ps = scales + ((j // {group}) * n + cb) * 2",
            "factor = tl.load(ps).to(tl.float32)",
            "zero = tl.load(ps + 1).to(tl.float32)",
            f"y = ((q.to(tl.float32) - 8) * factor[:, None] + zero[:, None]).to({stored})",
            f"pw += {s.k // 2}",
        ]
    lines += [
        f"for j in range(0, k, {s.k}):",
        "    t = tl.load(px, mask=(rk < k - j)[None, :], other=0)",
        *("    " + line for line in read),
        f"    acc = tl.dot(t, tl.trans(y), acc{ip})",
        f"    px += {s.k}",
    ]
    if bits == 8:
        lines.append("acc = acc * tl.load(scales + cb)[None, :].to(tl.float32)")
    lines += [
        "place = out + ra.to(tl.int64)[:, None] * n + rb[None, :]",
        f"tl.store(place, acc.to({stored}), mask=(ra < m)[:, None] & (rb < n)[None, :])",
    ]
    name = f"quantized_{dtype}_{bits}_{scale}_{group}_{precision}_{s}"
    buffers = [("x", dtype), ("w", "i8" if bits == 8 else "i32"), ("scales", scale), ("out", dtype)]
    return template(
        target,
        name,
        buffers,
        [("xm", "i64"), ("m", "i32"), ("n", "i32"), ("k", "i32")],
        "\n".join(lines),
        s.warps,
        s.stages,
    )


def groups(s: Schedule, m: Any, n: Any) -> tuple[Any, Any, Any]:
    """The grid of product()."""
    return (cdiv(m, s.m) * cdiv(n, s.n), 1, 1)
