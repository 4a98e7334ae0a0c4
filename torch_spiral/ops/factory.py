"""Tensors from numbers: arange, range, linspace, logspace, eye, tril, triu and their indices."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..kernels import ir
from ..kernels.kernel import DTYPES
from ..lowering import Tensor, composite, operator, structured, target
from .elementwise import as_dtype
from .index import bits
from .items import Item, each


def _precise(dtype: str) -> str:
    """The dtype to compute sequences of `dtype` in: float64 where the device has it, as ATen does on the host."""
    kind = DTYPES[dtype].kind
    if kind in ("int", "uint", "bool"):
        return "i64"
    return "f64" if target().float64 else "f32"


# ---- arange and range ----------------------------------------------------------------------------------------------


def _sequence(it: Item) -> None:
    """start + step * i."""
    dtype, part = it.static
    i = ir.cast(it.at[0], part)
    it.store("out", as_dtype(it["start"] + it["step"] * i, dtype))


@operator("sequence_(Tensor(a!) out, Scalar start, Scalar step) -> ()", coarse=True)
def sequence_(out: Tensor, start: Any, step: Any) -> None:
    """out[i] = start + step * i, for a vector."""
    part = _precise(out.dtype)
    scalars = {"start": (part, start), "step": (part, step)}
    each("sequence", _sequence, out.sizes, {"out": out}, scalars, static=(out.dtype, part), lanes=True)


def _integral(dtype: Any) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _check_range(start: Any, end: Any, step: Any) -> None:
    if step == 0:
        raise RuntimeError("step must be nonzero")
    if not (math.isfinite(start) and math.isfinite(end)):
        raise RuntimeError(f"unsupported range: {start} -> {end}")
    if (step > 0 and end < start) or (step < 0 and end > start):
        raise RuntimeError("upper bound and lower bound inconsistent with step sign")


def _write_sequence(out: Any, size: int, start: Any, step: Any) -> Any:
    if out.numel() != size:
        out.resize_([size])
    if size:
        flat = out if out.dim() == 1 else torch.empty(size, dtype=out.dtype, device=out.device)
        torch.ops.spiral.sequence_(flat, start, step)
        if flat is not out:
            out.copy_(flat.view(out.shape))
    return out


@composite("arange.start_out")
def arange_out(start: Any, end: Any, step: Any = 1, *, out: Any) -> Any:
    """start, start + step, ... below end."""
    if out.dtype.is_complex or out.dtype == torch.bool:
        name = {torch.bool: "Bool", torch.complex64: "ComplexFloat"}.get(out.dtype, str(out.dtype))
        raise NotImplementedError(f"\"arange_spiral\" not implemented for '{name}'")
    _check_range(start, end, step)
    if _integral(out.dtype):
        start, end, step = int(start), int(end), int(step)
        if step == 0:  # it was a fraction: upstream has another type of error for that
            raise ValueError("step must be nonzero")
        size = max(0, -((start - end) // step))
    else:
        size = math.ceil((float(end) - float(start)) / float(step))
    return _write_sequence(out, size, start, step)


@composite("range.out")
def range_out(start: Any, end: Any, step: Any = 1, *, out: Any) -> Any:
    """start, start + step, ... up to and with end."""
    _check_range(start, end, step)
    if _integral(out.dtype):
        start, end, step = int(start), int(end), int(step)
    return _write_sequence(out, math.floor((end - start) / step) + 1, start, step)


# ---- linspace and logspace -----------------------------------------------------------------------------------------


def _linear(it: Item) -> None:
    """From both ends, so that both are met exactly."""
    dtype, part, powers = it.static
    i = it.at[0]
    low = ir.lt(i, it["half"])
    n = ir.cast(ir.where(low, i, it["last"] - i), part)

    def value(start: str, end: str, step: str) -> Any:
        return ir.where(low, it[start] + it[step] * n, it[end] - it[step] * n)

    x = value("start", "end", "step")
    if "start_im" in it.scalars:
        x = ir.Complex(x, value("start_im", "end_im", "step_im"))
    if powers:
        base = it["base"] if not isinstance(x, ir.Complex) else ir.Complex(it["base"], ir.const(0.0, part))
        x = ir.pow(base, x)
    it.store("out", as_dtype(x, dtype))


@operator("linear_(Tensor(a!) out, int half, int last, float[] start, float[] end, float[] step, float? base) -> ()",
          slots=("half", "last"), coarse=True)  # fmt: skip
def linear_(out: Tensor, half: Any, last: Any, start: Any, end: Any, step: Any, base: Any) -> None:
    """linspace (or base ** linspace) into a vector. start, end, step: [real] or [real, imaginary]."""
    part = "f64" if target().float64 else "f32"
    scalars: dict[str, Any] = {"half": half, "last": last}
    for name, v in (("start", start), ("end", end), ("step", step)):
        scalars[name] = (part, v[0])
        if len(v) > 1:
            scalars[name + "_im"] = (part, v[1])
    if base is not None:
        scalars["base"] = (part, base)
    each("linear", _linear, out.sizes, {"out": out}, scalars, static=(out.dtype, part, base is not None))


def _linspace(name: str, start: Any, end: Any, steps: int, base: float | None, out: Any) -> Any:
    if steps < 0:
        raise RuntimeError("number of steps must be non-negative")
    if out.numel() != steps:
        out.resize_([steps])
    if steps == 0:
        return out
    flat = out if out.dim() == 1 else torch.empty(steps, dtype=out.dtype, device=out.device)
    if base is not None and _integral(out.dtype):
        start, end = float(start), float(end)
    elif _integral(out.dtype):
        start, end = int(start), int(end)
    if steps == 1:
        step: Any = 0.0
        end = start
    else:
        step = (end - start) / (steps - 1)

    def parts(z: Any) -> list[float]:
        return [complex(z).real, complex(z).imag] if out.dtype.is_complex else [float(z)]

    half = max(steps // 2, 1) if steps == 1 else steps // 2
    torch.ops.spiral.linear_(flat, half, steps - 1, parts(start), parts(end), parts(step), base)
    return out if flat is out else out.copy_(flat.view(out.shape))


@composite("linspace.out")
def linspace_out(start: Any, end: Any, steps: int, *, out: Any) -> Any:
    """steps numbers from start to end, evenly spaced."""
    return _linspace("linspace", start, end, steps, None, out)


@composite("logspace.out")
def logspace_out(start: Any, end: Any, steps: int, base: float = 10.0, *, out: Any) -> Any:
    """base ** linspace(start, end, steps)."""
    return _linspace("logspace", start, end, steps, float(base), out)


# ---- eye, tril, triu -----------------------------------------------------------------------------------------------


def _eye(it: Item) -> None:
    (dtype,) = it.static
    it.store(
        "out",
        as_dtype(ir.eq(it.at[0], it.at[1]), dtype) if dtype == "bool" else ir.cast(ir.eq(it.at[0], it.at[1]), "i32"),
    )


@operator("eye_(Tensor(a!) out) -> ()", coarse=True)
def eye_(out: Tensor) -> None:
    """Ones on the diagonal of a matrix, zeros elsewhere."""
    each("eye", _eye, out.sizes, {"out": out}, static=(out.dtype,))


@composite("eye.m_out")
def eye_m_out(n: int, m: int, *, out: Any) -> Any:
    """The n x m identity."""
    if n < 0:
        raise RuntimeError(f"n must be greater or equal to 0, got {n}")
    if m < 0:
        raise RuntimeError(f"m must be greater or equal to 0, got {m}")
    out.resize_([n, m])
    if out.numel():
        torch.ops.spiral.eye_(out)
    return out


@composite("eye.out")
def eye_out(n: int, *, out: Any) -> Any:
    """The n x n identity."""
    return eye_m_out(n, n, out=out)


def _triangle(it: Item) -> None:
    (upper,) = it.static
    row, column = it.at[-2], it.at[-1]
    distance = column - row
    keep = ir.ge(distance, it["diagonal"]) if upper else ir.le(distance, it["diagonal"])
    x = it.load("x")
    zero = x ^ x if not isinstance(x, ir.Complex) else ir.Complex(x.re ^ x.re, x.im ^ x.im)
    it.store("out", ir.where(keep, x, zero))


def _triangular(name: str, self: Tensor, diagonal: Any, out: Tensor) -> None:
    operands = {"out": bits(out), "x": bits(self)}
    each(name, _triangle, out.sizes, operands, {"diagonal": diagonal}, static=(name == "triu",), lanes=True)


@structured("tril", coarse=True)
def tril(self: Tensor, diagonal: Any, out: Tensor) -> None:
    """Elements on and below a diagonal, zeros above."""
    _triangular("tril", self, diagonal, out)


@structured("triu", coarse=True)
def triu(self: Tensor, diagonal: Any, out: Tensor) -> None:
    """Elements on and above a diagonal, zeros below."""
    _triangular("triu", self, diagonal, out)


def _triangle_indices(name: str, row: int, col: int, offset: int, dtype: Any, layout: Any, device: Any) -> Any:
    if row < 0:
        raise RuntimeError(f"row must be non-negative, got{row}")
    if col < 0:
        raise RuntimeError(f"col must be non-negative, got{col}")
    if layout is not None and layout != torch.strided:
        raise RuntimeError(f"only support layout=torch.strided, got {layout}")
    lower = sum(min(max(r + offset + 1, 0), col) for r in range(row)) if name == "tril" else 0
    if name == "tril":
        count = lower
    else:
        count = sum(col - min(max(r + offset, 0), col) for r in range(row))
    if count == 0:
        return torch.empty((2, 0), dtype=dtype or torch.int64, device=device)
    ones = torch.ones((row, col), dtype=torch.bool, device=device)
    kept = ones.tril(offset) if name == "tril" else ones.triu(offset)
    return torch.nonzero_static(kept, size=count).t().contiguous().to(dtype or torch.int64)


@composite("tril_indices")
def tril_indices(
    row: int,
    col: int,
    offset: int = 0,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Any:
    """[2, count]: rows and columns of tril's elements, row by row."""
    return _triangle_indices("tril", row, col, offset, dtype, layout, device)


@composite("triu_indices")
def triu_indices(
    row: int,
    col: int,
    offset: int = 0,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Any:
    """[2, count]: rows and columns of triu's elements, row by row."""
    return _triangle_indices("triu", row, col, offset, dtype, layout, device)
