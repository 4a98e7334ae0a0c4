"""Matrix products on handles: out[b] = act(alpha * a[b] @ b[b] + …), by the kernels of the target's schedule class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import autotune
from ..kernels import ir
from ..kernels.block import gemm as block
from ..kernels.kernel import DTYPES, FLOAT8
from ..kernels.simt import gemm as simt
from ..kernels.vector import gemm as vector
from ..kernels.vector.gemm import Epilogue
from ..lowering import (
    Size,
    Tensor,
    about,
    bucket,
    build,
    cdiv,
    divisible_by,
    empty,
    hint,
    is_one,
    is_zero,
    launch,
    maximum,
    minimum,
    packed,
    recorder,
    target,
)
from .common import broadcast, contiguous, converted, copy_to, described, map_tensors
from .items import Item, each

FLOATS = ("f32", "f16", "bf16", "f64")


def matrix(x: Tensor, rows: int, cols: int, batch: int | None = None) -> Tensor:
    """x as [batch, rows, cols], of dimensions given by number; batch size 1 where there is none."""
    sizes = [1 if batch is None else x.sizes[batch], x.sizes[rows], x.sizes[cols]]
    strides = [0 if batch is None else x.strides[batch], x.strides[rows], x.strides[cols]]
    return x.view(sizes, strides)


def _unit(x: Tensor, dim: int) -> bool:
    return is_one(x.strides[dim]) or is_one(x.sizes[dim])


def _batch_stride(x: Tensor) -> Any:
    return 0 if is_one(x.sizes[0]) else x.strides[0]


def _tuned(key: str, sizes: Sequence[Any], default: Any, candidates: Any) -> Any:
    """The choice for a product of sizes (m, n, k, batch): the default, or what was measured to be faster."""
    key += " " + " ".join(f"{name}{bucket(size)}" for name, size in zip("mnkb", sizes))
    return autotune.choose("gemm", key, default, candidates, [hint(s) for s in sizes])


@dataclass
class Blocks:
    """Factors of the operands [1, M, K] and [1, K, N] of a product: a [M / rows_a, K / size] and b [N / rows_b, K / size], float32."""

    size: int
    a: Tensor
    b: Tensor
    rows_a: Any
    rows_b: Any


def product(
    a: Tensor, b: Tensor, out: Tensor, alpha: Any = None, add: tuple[Any, Tensor] | None = None,
    terms: Sequence[tuple[str, Tensor | None]] = (), activation: str | None = None, fast: bool = False,
    precision: str | None = None, blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """out = activation(alpha * (a @ b) + beta * bias, then terms in order).

    a [B, M, K], b [B, K, N], out [B, M, N], any strides, B broadcast by stride 0; `add` is (beta, bias); bias and terms
    ("add" or "mul", tensor) broadcast to out; a term (name, None) is an activation at that place. Floats accumulate in f32 (f64 in f64), integers in i32 or i64, complex numbers in
    their parts. fast: float8 may be summed with the precision of the tensor cores alone. precision: as dot_precision
    says, where it is not that of matrix products. blocks: of float8, one batch. A beta of 0 ignores bias, NaN included; K = 0 counts as a product of zeros."""
    if out.is_empty:
        return
    kind = DTYPES[out.dtype].kind
    if kind == "complex":
        _complex_product(a, b, out, alpha, add)
        return
    if a.dtype in FLOAT8 and out.dtype not in ("f32", "f16", "bf16"):
        result = empty(out.sizes, "f32")
        product(a, b, result, alpha, add, terms, activation, fast, precision, blocks)
        copy_to(out, result)
        return
    if blocks is not None and target().schedule_class != "block" and not is_zero(a.sizes[2]):
        a = _dequantized(a, blocks.a, blocks.rows_a, blocks.size)
        b = _dequantized(b.transpose(1, 2), blocks.b, blocks.rows_b, blocks.size).transpose(1, 2)
        blocks = None
    if a.dtype in FLOAT8 and not block.multiplies_float8(target(), a.dtype, b.dtype):
        a, b = _in_order(a, "f16"), _in_order(b, "f16")  # which holds each number of 8 bits
    if a.dtype not in FLOATS and a.dtype not in FLOAT8:
        wide = "i64" if out.dtype in ("i64", "u64", "u32") else "i32"
        a, b = contiguous(a, wide), contiguous(b, wide)
        if out.dtype != wide:
            result = empty(out.sizes, wide)
            if add is not None:
                add = (add[0], contiguous(broadcast(add[1], out.sizes), wide))
            product(a, b, result, alpha, add, terms, activation)
            copy_to(out, result)
            return
    if is_zero(a.sizes[2]):
        _no_products(out, add, terms, activation)
        return
    rows = a.sizes[1]
    if is_zero(b.strides[0]) and isinstance(rows, int | Size) and bucket(rows) < min(5, bucket(out.sizes[0])):
        # One matrix for all of a batch of few rows each, as where the batch is the second dimension: many rows of a small batch.
        turned = [(kind, None if x is None else broadcast(x, out.sizes).transpose(0, 1)) for kind, x in terms]
        bias = (add[0], broadcast(add[1], out.sizes).transpose(0, 1)) if add else None
        b = b.view([a.sizes[1], *b.sizes[1:]], [0, *b.strides[1:]])
        product(a.transpose(0, 1), b, out.transpose(0, 1), alpha, bias, turned, activation, fast, precision)
        return
    steps: list[Any] = []
    operands: list[Tensor] = []
    factors: list[Any] = []
    if alpha is not None:
        steps.append("alpha")
        factors.append(alpha)
    for kind, x in [*([("beta", add[1])] if add else []), *terms]:
        if x is None:
            steps.append(kind)
        else:
            step, x = _epilogue_step(kind, broadcast(x, out.sizes), out)
            steps.append(step)
            operands.append(x)
    if add is not None:
        factors.append(add[0])
    if activation is not None:
        steps.append(activation)
    epilogue = Epilogue(tuple(steps))
    if target().schedule_class == "block":
        _block_product(a, b, out, epilogue, operands, factors, fast, precision, blocks)
    else:
        by_class = {"vector": _vector_product, "simt": _simt_product}
        by_class[target().schedule_class](a, b, out, epilogue, operands, factors)


def _epilogue_step(kind: str, x: Tensor, out: Tensor) -> tuple[tuple[str, str, str], Tensor]:
    """The step of an Epilogue that takes x, of the sizes of out's items, and x as it is read."""
    if x.is_conj or x.is_neg:
        x = contiguous(x)
    rows, cols = x.strides[1], x.strides[2]
    shape = "n" if is_zero(rows) and is_one(cols) else "m" if is_zero(cols) else "mn" if is_one(cols) else "s"
    if (shape == "mn" or (shape == "n" and target().schedule_class != "vector")) and not _unit(out, 2):
        shape = "s"
    return (kind, x.dtype, shape), x


def _in_order(x: Tensor, dtype: str) -> Tensor:
    """x in another dtype, its matrices stored by columns where x's are."""
    if is_one(x.strides[1]) and not is_one(x.strides[2]):
        return contiguous(x.transpose(1, 2), dtype).transpose(1, 2)
    return contiguous(x, dtype)


def _dequantized(x: Tensor, factors: Tensor, rows: Any, size: int) -> Tensor:
    """x [1, M, K] times its factors [M / rows, K / size] in float32, stored by columns where x is."""
    _, m, k = x.sizes
    if is_one(x.strides[1]) and not is_one(x.strides[2]):
        out = empty([1, k, m], "f32").transpose(1, 2)
    else:
        out = empty([1, m, k], "f32")
    operands = {"out": _plane(out), "x": _plane(x), "factors": factors}
    each("dequantize", _dequantize, (m, k), operands, {"rows": rows}, static=(size,))
    return out


def _plane(x: Tensor) -> Tensor:
    return x.view(x.sizes[1:], x.strides[1:])


def _dequantize(it: Item) -> None:
    row, k = it.at
    it.store("out", it.load("x") * it.load("factors", (row // it["rows"], k // it.static[0])))


def weight(b: Tensor, dtype: str) -> Tensor:
    """The float32 operand b [B, K, N] of a product under autocast: as it is on CPUs, whose kernels compute in float32; on GPUs in `dtype`, its
    matrices stored as b's are, kept."""
    if target().schedule_class == "vector":
        return b
    shared = is_zero(_batch_stride(b))
    x = b.view([1, *b.sizes[1:]], [0, *b.strides[1:]]) if shared else b
    by_columns = is_one(b.strides[1]) and not is_one(b.strides[2])
    x = converted(x.transpose(1, 2), dtype).transpose(1, 2) if by_columns else converted(x, dtype)
    return x.view(b.sizes, [0, *x.strides[1:]]) if shared else x


def int8_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (int32) = a @ b, both int8."""
    if target().schedule_class == "block" and not out.is_empty and not is_zero(a.sizes[2]):
        _block_product(a, b, out, Epilogue(), [], [])
    else:
        product(a, b, out)


def _no_products(out: Tensor, add: Any, terms: Any, activation: str | None) -> None:
    assert not terms and activation is None
    if add is None:
        map_tensors("zero", _zero, [out], [])
    else:
        map_tensors("times_beta", _times_beta, [out], [broadcast(add[1], out.sizes)], [add[0]], ["f32"])


def _zero() -> Any:
    return 0


def _times_beta(x: Any, beta: Any) -> Any:
    return ir.where(ir.eq(beta, 0.0), ir.const(0, x.dtype), x * ir.cast(beta, x.dtype))


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    part = "f32" if x.dtype == "c64" else "f64"
    strides = tuple(s * 2 for s in x.strides)
    start = None if x.offset is None else x.offset * 2
    flags = x.flags & ~(1 << 27)
    re = Tensor(x.number, part, x.sizes, strides, start, x.written, flags, x.windows)
    return re, Tensor(x.number, part, x.sizes, strides, 1 if start is None else start + 1, x.written, flags, x.windows)


def _complex_product(a: Tensor, b: Tensor, out: Tensor, alpha: Any, add: Any) -> None:
    """Four real products; conjugate operands change signs."""
    a, b = (contiguous(x, out.dtype) if x.is_conj or x.is_neg or x.dtype != out.dtype else x for x in (a, b))
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    result = out if alpha is None and add is None else empty(out.sizes, out.dtype)
    re, im = _parts(result)
    part = re.dtype
    for x, y, z, first, sign in (
        (ar, br, re, True, 1.0),
        (ai, bi, re, False, -1.0),
        (ar, bi, im, True, 1.0),
        (ai, br, im, False, 1.0),
    ):
        x, y = _plain(x), _plain(y)
        if first:
            product(x, y, z)
        elif not is_zero(x.sizes[2]):
            product(x, y, z, alpha=sign, terms=[("add", z)])
    if result is out:
        return

    def number(v: Any) -> list[Any]:
        return list(v) if isinstance(v, tuple) else [v if v is not None else 1.0, 0.0]

    kind = "f64" if part == "f64" else "f32"
    if add is None:
        map_tensors("complex_scale", _complex_scale, [out], [result], number(alpha), [kind] * 2)
    else:
        bias = broadcast(contiguous(add[1]) if add[1].is_conj or add[1].is_neg else add[1], out.sizes)
        map_tensors(
            "complex_addmm", _complex_addmm, [out], [result, bias], [*number(alpha), *number(add[0])], [kind] * 4
        )


def _plain(x: Tensor) -> Tensor:
    return contiguous(x.view(x.sizes, x.strides))


def _complex_scale(x: Any, re: Any, im: Any) -> Any:
    return x * ir.Complex(re, im)


def _complex_addmm(x: Any, bias: Any, ar: Any, ai: Any, br: Any, bi: Any) -> Any:
    beta = ir.Complex(br, bi)
    zero = ir.and_(ir.eq(br, 0.0), ir.eq(bi, 0.0))
    scaled = x * ir.Complex(ar, ai)
    return ir.where(zero, scaled, scaled + bias * beta)


def grouped_product(
    a: Tensor, b: Tensor, out: Tensor, offs: Tensor, cut: str, terms: Sequence[tuple[str, Tensor]] = (), fast: bool = False,
) -> None:  # fmt: skip
    """out[g] = a[g] @ b[g], then terms in order, where the ends offs [G] (int32, contiguous) cut groups out of one matrix on the device.

    cut "rows": a [1, M, K] and out [1, M, N] by rows, b [G, K, N]; rows behind the last end stay as they are. "k": a [1, M, K] and
    b [1, K, N] along the reduction, out [G, M, N]. Floats of 16 or 32 bits, any strides; float8 (a's rows and b's columns of unit
    stride), whose sums are float32, or with `fast` of the tensor cores' precision. terms: ("add" or "mul", a tensor [G, M, N], read
    at the rows of the whole matrix)."""
    if out.is_empty:
        return
    t = target()
    narrow = a.dtype in FLOAT8
    if narrow and not block.multiplies_float8(t, a.dtype, b.dtype):
        a, b, narrow = _in_order(a, "f16"), _in_order(b, "f16"), False  # which holds each number of 8 bits
    found = [_epilogue_step(kind, x, out) for kind, x in terms]
    epilogue, operands = Epilogue(tuple(step for step, _ in found)), [x for _, x in found]
    count, m, k, n = offs.sizes[0], a.sizes[1], a.sizes[2], b.sizes[2]

    def work() -> Any:
        return 2 * m * n * k

    if t.schedule_class == "vector":
        if cut == "k" and not _unit(b, 2):
            b = contiguous(b)
        a_layout, c_layout = "n" if _unit(a, 2) else "t" if _unit(a, 1) else "g", "n" if _unit(out, 2) else "g"
        units, s = t.compute_units, vector.schedule()
        a_strides, c_strides = [0, *a.strides[1:]], [_batch_stride(out), *out.strides[1:]]
        if cut == "k":
            kernel = build(vector.gemm, a.dtype, b.dtype, out.dtype, a_layout, "n", c_layout, epilogue, False, s, cut)
            scalars = [*a_strides, 0, b.strides[1], *c_strides, *_epilogue_strides(epilogue, operands), m, n, k]
            launch(kernel, [a, b, out, *operands, offs], scalars, vector.gemm_groups(s, m, n, count, units), work)
            return
        p, stride = _panels(b, s, "f32")
        kernel = build(vector.gemm, a.dtype, "f32", out.dtype, a_layout, "packed", c_layout, epilogue, False, s, cut)
        scalars = [*a_strides, stride, 0, *c_strides, *_epilogue_strides(epilogue, operands), m, n, k]
        launch(kernel, [a, p, out, *operands, offs], scalars, (units, 1, count), work)
        return
    a_layout = "n" if _unit(a, 2) else "t" if _unit(a, 1) else "s"
    b_layout = "n" if _unit(b, 2) else "t" if _unit(b, 1) else "s"
    layouts = (a_layout, b_layout, "n" if _unit(out, 2) else "s")
    batch = 1 if is_one(count) else 1 << bucket(count)
    rows = (1 << bucket(m)) // batch if cut == "rows" else 1 << bucket(m)
    if t.schedule_class == "block":
        precision = ("fast" if fast else "") if narrow else dot_precision(a.dtype)
        schedule = block.schedule(t, a.dtype, precision, max(rows, 1), 1 << bucket(n), batch)
        schedule = replace(schedule, persistent=False)
        kernel = build(
            block.gemm, schedule, a.dtype, b.dtype, out.dtype, *layouts, precision, False, epilogue, False, False, cut
        )
        strides = {
            "ab": 0,
            "am": a.strides[1],
            "ak": a.strides[2],
            "bb": _batch_stride(b),
            "bk": b.strides[1],
            "bn": b.strides[2],
        }
        strides |= {"cb": _batch_stride(out), "cm": out.strides[1], "cn": out.strides[2], "m": m, "n": n, "k": k}
        named = [(kind, strides[name]) for name, kind in block.gemm_scalars(*layouts, False)]
        named += [("i64", v) for v in _epilogue_strides(epilogue, operands)]
        if cut == "rows":
            groups = block.grouped_groups(schedule, m, n, count)
        else:
            groups = block.groups(schedule, m, n, count)
        launch(kernel, [a, b, *operands, out, offs], _ordered(None, [*named, ("i32", count)]), groups, work)
        return
    simt_schedule = simt.default_schedule(t, a.dtype, max(rows, 1).bit_length() - 1, bucket(n))
    # A group starts at any row, or anywhere along the reduction: no vectors of four along it.
    uncut = {"rows": ("n", "nt"), "k": ("t", "n")}[cut]
    vec_a = a_layout in uncut[0] and _aligned4(a, 2 if a_layout == "n" else 1, (1 if a_layout == "n" else 2,))
    vec_b = b_layout in uncut[1] and _aligned4(b, 2 if b_layout == "n" else 1, (0, 1 if b_layout == "n" else 2))
    vec_c = layouts[2] == "n" and all(
        _aligned4(x, 2, (0, 1))
        for x in (out, *(x for (_, _, shape), x in zip(epilogue.steps, operands) if shape in ("n", "mn")))
    )
    full_k = cut == "rows" and divisible_by(k, 16) and simt_schedule.tile_k <= 16
    kernel = build(
        simt.gemm, simt_schedule, a.dtype, out.dtype, *layouts, vec_a, vec_b, vec_c, full_k, False, epilogue, b.dtype,
        (a.windows, b.windows), cut,
    )  # fmt: skip
    scalars = [
        count,
        m,
        n,
        k,
        0,
        *a.strides[1:],
        _batch_stride(b),
        *b.strides[1:],
        _batch_stride(out),
        *out.strides[1:],
        *_operand_strides(operands),
    ]
    if cut == "rows":
        groups = simt.grouped_groups(simt_schedule, m, n, count, minimum)
    else:
        groups = simt.groups(simt_schedule, m, n, count, 1, minimum)
    launch(kernel, [a, b, *operands, out, offs], scalars, groups, work)


# ---- vector: OpenCL on CPUs -------------------------------------------------------------------------------------------


def _epilogue_strides(epilogue: Epilogue, operands: Sequence[Tensor]) -> list[Any]:
    scalars: list[Any] = []
    for (_, _, _, shape), x in zip(epilogue.operands, operands):
        scalars.append(_batch_stride(x))
        if shape in ("m", "mn", "s"):
            scalars.append(x.strides[1])
        if shape == "s":
            scalars.append(x.strides[2])
    return scalars


def _ordered(kernel: Any, named: Sequence[tuple[str, Any]]) -> list[Any]:
    """Scalars in launch order: 64-bit ones first."""
    return [v for t, v in named if t in ("i64", "f64")] + [v for t, v in named if t not in ("i64", "f64")]


def _panels(b: Tensor, s: vector.Schedule, compute: str) -> tuple[Tensor, Any]:
    """b [B, K, N] packed for the vector kernels, and the stride of its batch there."""
    layout = "n" if _unit(b, 2) else "t" if _unit(b, 1) else "g"
    (_, k, n), units = b.sizes, target().compute_units
    panels = cdiv(n, s.nr)
    shared = is_zero(_batch_stride(b))
    copies = 1 if shared else b.sizes[0]
    with packed(b, (copies, panels, k, s.nr), compute, f"panels_{layout}_{b.dtype}_{s}") as p:
        launch(
            build(vector.pack_b, b.dtype, layout, s, compute), [b, p], [_batch_stride(b), 0, b.strides[1], b.strides[2], 1, k, n],
            (minimum(panels, 4 * units), 1 if bucket(k) < 8 else units, copies),
        )  # fmt: skip
    return p.view((copies, panels, k * s.nr)), 0 if shared else panels * k * s.nr


def _vector_product(
    a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue, operands: Sequence[Tensor], factors: Sequence[Any]
) -> None:
    batch, m, k = out.sizes[0], a.sizes[1], a.sizes[2]
    n = b.sizes[2]
    compute = DTYPES[a.dtype].compute
    # Less work than it takes to wake another thread is one workgroup's, which the calling thread may run.
    units = 1 if about(m) + about(n) + about(k) <= 15 else target().compute_units
    a_layout = "n" if _unit(a, 2) else "t" if _unit(a, 1) else "g"
    b_layout = "n" if _unit(b, 2) else "t" if _unit(b, 1) else "g"
    c_layout = "n" if _unit(out, 2) else "g"
    factor = compute if compute in ("f64", "i64", "i32") else "f32"

    def scalars(strides: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
        named = [("i64", s) for s in (*strides, *_epilogue_strides(epilogue, operands))]
        named += [(factor, f) for f in factors] + [("u32", s) for s in sizes]
        return _ordered(None, named)

    ab, bb, cb = (_batch_stride(x) for x in (a, b, out))
    am, ak, cm, cn = a.strides[1], a.strides[2], out.strides[1], out.strides[2]
    floating = compute in ("f32", "f64")
    if floating and a_layout == "n" and b_layout == "t" and (is_one(m) or (about(m) <= 2 and about(k) >= 5)):
        kernel = build(vector.gemm_dot, a.dtype, b.dtype, out.dtype, 1 if is_one(m) else 0, c_layout, epilogue)
        launch(
            kernel, [a, b, out, *operands], scalars([ab, am, bb, b.strides[2], cb, cm, cn], [m, n, k]),
            vector.gemm_dot_groups(m, n, batch, units), lambda: 2 * m * n * k * batch,
        )  # fmt: skip
        return
    if floating and is_one(m) and b_layout == "n":
        kernel = build(vector.gemv, a.dtype, b.dtype, out.dtype, c_layout, epilogue)
        launch(
            kernel, [a, b, out, *operands], scalars([ab, ak, bb, b.strides[1], cb, cn], [n, k]),
            (1, cdiv(n, 256 * units) * units, batch), lambda: 2 * n * k * batch,
        )  # fmt: skip
        return
    s = vector.schedule(compute)
    if compute == "f32" and "g" not in a_layout + b_layout:
        key = f"{a.dtype} {b.dtype} {out.dtype} {a_layout}{b_layout}{c_layout}"
        s = _tuned(key, (m, n, k, batch), s, lambda: vector.candidates(compute))
    p, pb = _panels(b, s, compute)
    # Few tiles and a long reduction: split it among the compute units.
    if floating and about(m) <= 6 and about(n) <= 7 and about(k) >= 11:
        splits = 2 * units
        partial = empty((splits, batch, m, n), compute)
        kernel = build(vector.gemm, a.dtype, compute, compute, a_layout, "packed", "n", Epilogue(), True, s)
        named = [("i64", v) for v in (ab, am, ak, pb, 0, m * n, n, 1)] + [("u32", v) for v in (m, n, k)]
        launch(kernel, [a, p, partial], _ordered(None, named), (splits, 1, batch), lambda: 2 * m * n * k * batch)
        finish = build(vector.reduce_splits, out.dtype, c_layout, epilogue, compute)
        named = [("i64", v) for v in (cb, cm, cn, *_epilogue_strides(epilogue, operands))]
        named += [(factor, f) for f in factors] + [("u32", v) for v in (m, n, splits)]
        launch(finish, [partial, out, *operands], _ordered(None, named), (minimum(m, units), 1, batch))
        return
    kernel = build(vector.gemm, a.dtype, compute, out.dtype, a_layout, "packed", c_layout, epilogue, False, s)
    if about(m) <= 7:
        groups = vector.gemm_groups_wide(s, m, n, batch, units, minimum)
    else:
        groups = vector.gemm_groups(s, m, n, batch, units)
    launch(
        kernel,
        [a, p, out, *operands],
        scalars([ab, am, ak, pb, 0, cb, cm, cn], [m, n, k]),
        groups,
        lambda: 2 * m * n * k * batch,
    )


# ---- block: Triton ------------------------------------------------------------------------------------------------------


def dot_precision(dtype: str) -> str:
    """How Triton's products of dtype are computed, by PyTorch's switch, which is in the key of the plans of Triton devices."""
    import torch

    return block.precision_of(target(), dtype, bool(torch._C._get_cublas_allow_tf32()))


def convolution_precision(dtype: str) -> str:
    """As dot_precision, by the switch of convolutions (torch.backends.cudnn.allow_tf32, which is on unless it is turned off)."""
    import torch

    return block.precision_of(target(), dtype, torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def _described(x: Tensor, layout: str) -> bool:
    """Whether a tensor descriptor can read the matrices of x."""
    rows = x.strides[1 if layout == "n" else 2]
    return layout in ("n", "t") and not is_zero(rows) and described(x, _batch_stride(x), rows)


def _block_product(
    a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue, operands: Sequence[Tensor], factors: Sequence[Any],
    fast: bool = False, precision: str | None = None, blocks: Blocks | None = None,
) -> None:  # fmt: skip
    t = target()
    batch, m, k, n = out.sizes[0], a.sizes[1], a.sizes[2], b.sizes[2]
    compute = DTYPES[a.dtype].compute
    narrow = a.dtype in FLOAT8
    if narrow:
        precision = "fast" if fast else ""
    elif precision is None:
        precision = dot_precision(a.dtype if a.dtype == b.dtype else compute)
    sizes = [1 << about(x) for x in (m, n, k, batch)]
    if (precision == "tf32" and sizes[0] >= 64 and sizes[1] >= 64) or narrow:
        # The tensor cores read tf32 and float8 along the reduction only.
        if not _unit(a, 2):
            a = contiguous(a)
        if not _unit(b, 1):
            b = contiguous(b.transpose(1, 2)).transpose(1, 2)
    a_layout = "n" if _unit(a, 2) else "t" if _unit(a, 1) else "s"
    b_layout = "n" if _unit(b, 2) else "t" if _unit(b, 1) else "s"
    c_layout = "n" if _unit(out, 2) else "s"

    def strides(c: Sequence[Any], layout: str) -> list[tuple[str, Any]]:
        own = [
            _batch_stride(a), _batch_stride(b), c[0], *([a.strides[1]] if a_layout != "t" else []),
            *([a.strides[2]] if a_layout != "n" else []), *([b.strides[1]] if b_layout != "t" else []),
            *([b.strides[2]] if b_layout != "n" else []), c[1], *([c[2]] if layout != "n" else []), *c[3:],
        ]  # fmt: skip
        return [("i64", v) for v in own]

    extra = [("i64", v) for v in _epilogue_strides(epilogue, operands)]
    extra += [(compute if compute in ("f64", "i64", "i32") else "f32", f) for f in factors]
    own = [_batch_stride(out), out.strides[1], out.strides[2]]
    work = lambda: 2 * m * n * k * batch  # noqa: E731
    if is_one(m) and b_layout in ("t", "n") and compute == "f32" and not narrow and blocks is None:
        if a_layout == c_layout == "n" and is_one(batch) and not epilogue.steps:
            _row_beside(a, b, out, b_layout)
            return
        row = block.row_schedule(t, b.dtype, b_layout, *sizes[1:])
        kernel = build(block.row_product, row, a.dtype, b.dtype, out.dtype, a_layout, b_layout, c_layout, epilogue)
        named = [*strides(own, c_layout), ("i32", m), ("i32", n), ("i32", k), *extra]
        launch(kernel, [a, b, *operands, out], _ordered(None, named), block.row_groups(row, n, batch), work)
        return
    tiles = _described(a, a_layout) and _described(b, b_layout)
    along_k = a_layout == "n" and b_layout == "t"
    s = block.schedule(t, a.dtype, precision, sizes[0], sizes[1], sizes[3], along_k, tiles, block.is_busy(epilogue))
    size, even, factored, scaling = 0, False, [], []
    if blocks is not None:
        s, size, factored = block.blocks_schedule(t, blocks.size, sizes[0], sizes[1]), blocks.size, [blocks.a, blocks.b]
        even = isinstance(blocks.rows_b, int) and blocks.rows_b % s.n == 0
        scaling = [("i64", v) for x in factored for v in x.strides] + [
            ("i32", v) for v in (blocks.rows_a, blocks.rows_b)
        ]
    count = block.splits(t, s, *sizes) if compute in ("f32", "f64") else 1
    if compute == "f32" and "s" not in a_layout + b_layout and blocks is None:
        key = f"{a.dtype} {b.dtype} {out.dtype} {a_layout}{b_layout}{c_layout} {'tiles' if tiles else 'rows'} {precision or '-'}"
        choice = _tuned(
            key, (m, n, k, batch), block.Choice(s, count), lambda: block.candidates(t, a.dtype, precision, *sizes)
        )
        s, count = choice.schedule, choice.splits
    tiles = tiles and s.k > 1 and (is_one(batch) or not s.streamed)  # a descriptor reads 16 bytes at least
    if s.persistent and (count > 1 or not is_one(batch) or not block.stores_tiles(t, s, a.dtype, out.dtype)):
        s = replace(s, persistent=False)  # which needs room for a tile of the result beside those of the next operands

    if count == 1:
        stored = tiles and blocks is None and c_layout == "n" and _described(out, "n")
        stored = stored and block.stores_tiles(t, s, a.dtype, out.dtype)
        kernel = build(
            block.gemm,
            s,
            a.dtype,
            b.dtype,
            out.dtype,
            a_layout,
            b_layout,
            c_layout,
            precision,
            False,
            epilogue,
            tiles,
            stored,
            "",
            size,
            even,
        )
        named = [*strides(own, c_layout), ("i32", m), ("i32", n), ("i32", k), *extra, *scaling]
        groups = block.groups(s, m, n, batch)
        if s.streamed:
            most = block.programs(t, s, DTYPES[a.dtype].size)
            programs = block.stream_programs(most, s, m, n, k, batch, minimum)
            partial = empty((most, 2, s.m, s.n), compute)
            named.append(("i32", batch))
            launch(kernel, [a, b, *operands, out, partial], _ordered(None, named), (programs, 1, 1), work)
            finish = build(block.stream_reduce, s, compute, out.dtype, c_layout, epilogue)
            named = [("i64", v) for v in (own if c_layout != "n" else own[:2])]
            named += [*(("i32", v) for v in (m, n, k, programs, batch)), *extra]
            groups = block.stream_reduce_groups(s, programs, m, n, batch, maximum)
            launch(finish, [partial, *operands, out], _ordered(None, named), groups)
            return
        if s.persistent:
            groups = (minimum(groups[0], block.programs(t, s, DTYPES[a.dtype].size)), 1, 1)
        launch(kernel, [a, b, *operands, out, *factored], _ordered(None, named), groups, work)
        return
    partial = empty((count, batch, m, n), compute)
    total = batch * m * n
    kernel = build(
        block.gemm,
        s,
        a.dtype,
        b.dtype,
        compute,
        a_layout,
        b_layout,
        "n",
        precision,
        True,
        Epilogue(),
        tiles,
        False,
        "",
        size,
        even,
    )
    span = cdiv(cdiv(k, count), s.k) * s.k
    named = [*strides([m * n, n, 1, total], "n"), ("i32", m), ("i32", n), ("i32", k), ("i32", span), *scaling]
    launch(kernel, [a, b, partial, *factored], _ordered(None, named), block.groups(s, m, n, batch, count), work)
    finish = build(block.reduce_splits, compute, out.dtype, c_layout, epilogue)
    named = [("i64", v) for v in (own if c_layout != "n" else own[:2])] + [("i64", total)]
    named += [*(("i32", v) for v in (m, n, count)), *extra]
    launch(finish, [partial, *operands, out], _ordered(None, named), block.reduce_groups(m, n, batch))


@dataclass
class _Beside:
    """Products of one row of A that one launch computes, the last step of a plan. key: what they have in common."""

    step: list
    key: tuple
    parts: list[tuple[Tensor, Tensor]]  # B and result of each


MOST_BESIDE = 4


def _row_beside(a: Tensor, b: Tensor, out: Tensor, b_layout: str) -> None:
    """A product of one row and one batch without an epilogue. Where the step before computes others of the same row, and all results are
    memory of their own, they become one kernel: queries, keys and values."""
    r = recorder()
    key = (a.number, a.offset, *a.sizes, *a.strides, a.dtype, b.dtype, out.dtype, b_layout, r.when, r.note)
    parts, last = [(b, out)], r.beside
    joins = (
        last is not None
        and r.steps
        and r.steps[-1] is last.step
        and all(x is None or isinstance(x, (int, str)) for x in key)
        and last.key == key
        and len(last.parts) < MOST_BESIDE
        and all(y.number >= r.operand_count for _, y in (*parts, *last.parts))
        and out.number not in (a.number, b.number)
        and all(out.number not in (x.number, y.number) and b.number != y.number for x, y in last.parts)
    )
    if joins:
        r.steps.pop(), r.kernels.pop()
        parts = last.parts + parts
    k, columns = a.sizes[2], [x.sizes[2] for x, _ in parts]
    total = columns[0] if len(columns) == 1 else sum(columns[1:], columns[0])
    row = block.row_schedule(target(), b.dtype, b_layout, 1 << about(total), 1 << about(k), 1)
    kernel = build(block.row_product, row, a.dtype, b.dtype, out.dtype, "n", b_layout, "n", Epilogue(), len(parts))
    strides = [x.strides[2 if b_layout == "t" else 1] for x, _ in parts]
    named = [*(("i64", s) for s in strides), *(("i32", n) for n in columns), ("i32", k)]
    groups = [block.row_groups(row, n, 1)[0] for n in columns]
    launch(
        kernel, [a, *(x for part in parts for x in part)], _ordered(None, named), (sum(groups[1:], groups[0]), 1, 1), lambda: 2 * k * total
    )  # fmt: skip
    r.beside = _Beside(r.steps[-1], key, parts)


# ---- simt: GPUs ---------------------------------------------------------------------------------------------------------


def _aligned4(x: Tensor, unit: int, others: Sequence[int]) -> bool:
    size = DTYPES[x.dtype].size
    return (
        size in (2, 4) and x.aligned(4) and divisible_by(x.sizes[unit], 4)
        and all(is_one(x.sizes[d]) or divisible_by(x.strides[d], 4) for d in others)
    )  # fmt: skip


def _operand_strides(operands: Sequence[Tensor]) -> list[Any]:
    out: list[Any] = []
    for x in operands:
        out += [_batch_stride(x), x.strides[1], x.strides[2]]
    return out


def few_rows(m: Any) -> int:
    """A bound (1, 2, 4 or 8) of the rows of a product that simt.skinny computes; 0: there may be more."""
    if is_one(m):
        return 1
    if isinstance(m, int) and m == 8:
        return 8
    return 1 << (bucket(m) + 1) if isinstance(m, int | Size) and 1 <= bucket(m) <= 2 else 0  # bucket 0: not known


def _simt_product(
    a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue, operands: Sequence[Tensor], factors: Sequence[Any]
) -> None:
    t = target()
    batch, m, k, n = out.sizes[0], a.sizes[1], a.sizes[2], b.sizes[2]
    a_layout = "n" if _unit(a, 2) else "t" if _unit(a, 1) else "s"
    b_layout = "n" if _unit(b, 2) else "t" if _unit(b, 1) else "s"
    c_layout = "n" if _unit(out, 2) else "s"
    compute = DTYPES[a.dtype].compute
    factor = compute if compute in ("f64", "i64", "i32") else "f32"
    windows = (a.windows, b.windows)
    bm, bn, bk = (1 << bucket(x) for x in (m, n, k))
    bb = 1 << bucket(batch)
    vec_a = a_layout != "s" and _aligned4(a, 2 if a_layout == "n" else 1, (0, 1 if a_layout == "n" else 2))
    vec_b = b_layout != "s" and _aligned4(b, 2 if b_layout == "n" else 1, (0, 1 if b_layout == "n" else 2))

    def scalars(
        c: Sequence[Any], operand_strides: Sequence[Any], numbers: Sequence[Any], extra: Sequence[Any] = ()
    ) -> list[Any]:
        named = [
            ("u32", v)
            for v in (
                batch,
                m,
                n,
                k,
                _batch_stride(a),
                a.strides[1],
                a.strides[2],
                _batch_stride(b),
                b.strides[1],
                b.strides[2],
            )
        ]
        named += (
            [("u32", v) for v in (*c, *operand_strides)] + [(factor, f) for f in numbers] + [("u32", v) for v in extra]
        )
        return _ordered(None, named)

    def work() -> Any:
        return 2 * m * n * k * batch

    own = [_batch_stride(out), out.strides[1], out.strides[2]]
    rows = few_rows(m)
    skinny = (
        compute == "f32" and rows and a_layout == "n" and b_layout in ("n", "t") and c_layout == "n" and bucket(k) >= 5
    )
    if skinny:
        k_or_n = k if b_layout == "t" else n
        vec = vec_b and (b_layout == "n" or vec_a) and divisible_by(k_or_n, 4)
        kernel = build(simt.skinny, a.dtype, out.dtype, rows, b_layout, vec, False, epilogue, b.dtype, b.windows)
        launch(
            kernel,
            [a, b, *operands, out],
            scalars(own, _operand_strides(operands), factors),
            simt.skinny_groups(b_layout, n, batch, 1, minimum),
            work,
        )
        return
    schedule = simt.default_schedule(t, a.dtype, bucket(m), bucket(n))
    splits = simt.default_splits(t, schedule, bm, bn, bb, bk) if compute in ("f32", "f64") else 1
    if compute == "f32" and "s" not in a_layout + b_layout and windows == (1, 1):
        flags = "".join("v" if v else "s" for v in (vec_a, vec_b)) + ("f" if divisible_by(k, 16) else "r")
        key = f"{a.dtype} {b.dtype} {out.dtype} {a_layout}{b_layout}{c_layout} {flags}"
        choice = _tuned(
            key, (m, n, k, batch), simt.Choice(schedule, splits), lambda: simt.candidates(t, a.dtype, bm, bn, bk, bb)
        )
        schedule, splits = choice.schedule, choice.splits
    full_k = divisible_by(k, 16) and schedule.tile_k <= 16
    if splits > 1:
        partial = empty((batch, splits, m, n), compute)
        kernel = build(
            simt.gemm, schedule, a.dtype, compute, a_layout, b_layout, "n", vec_a, vec_b, divisible_by(n, 4), full_k, True, Epilogue(),
            b.dtype, windows,
        )  # fmt: skip
        span = simt.k_span(schedule, k, splits)
        launch(
            kernel, [a, b, partial],
            scalars([m * n * splits, n, 1], (), (), (splits, span, m * n)), simt.groups(schedule, m, n, batch, splits, minimum), work,
        )  # fmt: skip
        finish = build(simt.split_reduce, compute, out.dtype, c_layout, False, epilogue)
        named = [("u32", v) for v in (batch, m, n, splits, m * n * splits, m * n, n, *own, *_operand_strides(operands))]
        named += [(factor, f) for f in factors]
        launch(finish, [partial, *operands, out], _ordered(None, named), simt.reduce_groups(m, n, batch, minimum))
        return
    vec_c = (
        c_layout == "n"
        and _aligned4(out, 2, (0, 1))
        and all(
            _aligned4(x, 2, (0, 1)) for (_, _, _, shape), x in zip(epilogue.operands, operands) if shape in ("n", "mn")
        )
    )
    kernel = build(
        simt.gemm,
        schedule,
        a.dtype,
        out.dtype,
        a_layout,
        b_layout,
        c_layout,
        vec_a,
        vec_b,
        vec_c,
        full_k,
        False,
        epilogue,
        b.dtype,
        windows,
    )
    launch(
        kernel,
        [a, b, *operands, out],
        scalars(own, _operand_strides(operands), factors),
        simt.groups(schedule, m, n, batch, 1, minimum),
        work,
    )
