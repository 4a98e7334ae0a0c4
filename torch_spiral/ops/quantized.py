"""Products with quantized operands: int8 times int8, and weights of 8 or 4 bits that are dequantized in the product.

Weights of 4 bits are dequantized first on CPU devices, and for more than a few rows through OpenCL and WebGPU."""

from __future__ import annotations

from typing import Any

from ..kernels import ir
from ..kernels.block import quantized as block
from ..kernels.builder import KernelBuilder
from ..kernels.kernel import Kernel, Target
from ..kernels.nest import fold_groups
from ..kernels.simt import gemm as simt
from ..lowering import (
    Tensor,
    bucket,
    build,
    cdiv,
    check,
    copy_bytes,
    empty,
    eq,
    is_one,
    launch,
    lowering,
    minimum,
    target,
)
from .common import broadcast, contiguous, copied
from .contraction import dot_precision, few_rows, int8_product, matrix, product

WORKGROUP = 64


@lowering("_int_mm")
def int_mm(self: Tensor, mat2: Tensor) -> Tensor:
    """int8 [M, K] @ int8 [K, N], summed in int32."""
    check(
        self.dtype == mat2.dtype == "i8",
        "RuntimeError",
        f"Expected operands of dtype int8 but got {self.dtype} and {mat2.dtype}",
    )
    check(self.ndim == mat2.ndim == 2, "RuntimeError", "Expected operands to be of dimension 2")
    check(
        eq(self.sizes[1], mat2.sizes[0]), "RuntimeError", "self.size(1) needs to match mat2.size(0) but got {} and {}",
        self.sizes[1], mat2.sizes[0],
    )  # fmt: skip
    out = empty([self.sizes[0], mat2.sizes[1]], "i32")
    int8_product(matrix(self, 0, 1), matrix(mat2, 0, 1), matrix(out, 0, 1))
    return out


def _rows(x: Tensor) -> Tensor:
    return x if is_one(x.strides[1]) else contiguous(x)


@lowering("_weight_int8pack_mm")
def weight_int8pack_mm(self: Tensor, mat2: Tensor, scales: Tensor) -> Tensor:
    """[M, K] @ (int8 [N, K] as floats).T * scales [N]."""
    check(
        self.dtype in ("f32", "f16", "bf16"),
        "RuntimeError",
        f"_weight_int8pack_mm : expect A to be float, got {self.dtype}",
    )
    check(mat2.dtype == "i8", "RuntimeError", f"_weight_int8pack_mm : expect B to be int8 tensor, got {mat2.dtype}")
    m, k, n = self.sizes[0], self.sizes[1], mat2.sizes[0]
    check(
        eq(k, mat2.sizes[1]),
        "RuntimeError",
        "_weight_int8pack_mm : expect B to have {} columns, got {}",
        k,
        mat2.sizes[1],
    )
    check(
        eq(scales.sizes[0], n),
        "RuntimeError",
        "_weight_int8pack_mm : expect scales to have {} elements, got {}",
        n,
        scales.sizes[0],
    )
    out = empty([m, n], self.dtype)
    if target().schedule_class != "block":
        terms = [("mul", broadcast(scales.view((1, 1, n), (0, 0, scales.strides[0])), (1, m, n)))]
        product(matrix(self, 0, 1), matrix(mat2, 1, 0), matrix(out, 0, 1), terms=terms)
        return out
    x, w, scales = _rows(self), contiguous(mat2), contiguous(scales)
    s = block.schedule(x.dtype, 1 << bucket(m))
    kernel = build(block.product, s, x.dtype, 8, scales.dtype, 0, dot_precision(x.dtype))
    launch(kernel, [x, w, scales, out], [x.strides[0], m, n, k], block.groups(s, m, n))
    return out


@lowering("_convert_weight_to_int4pack")
def convert_weight_to_int4pack(self: Tensor, inner_k_tiles: int) -> Tensor:
    """Bytes [N, K / 2], of two weights each, the even one in the high half → what _weight_int4pack_mm takes: the same bytes in a
    tensor of upstream's shape."""
    check(
        self.dtype == "u8" and self.ndim == 2,
        "RuntimeError",
        "_convert_weight_to_int4pack: expect a 2D tensor of uint8",
    )
    check(inner_k_tiles in (2, 4, 8), "RuntimeError", "_convert_weight_to_int4pack: innerKTiles is 2, 4 or 8")
    n, k = self.sizes[0], self.sizes[1] * 2
    check(eq(n % 8, 0), "RuntimeError", "_convert_weight_to_int4pack: {} rows are no multiple of 8", n)
    check(
        eq(k % (inner_k_tiles * 16), 0),
        "RuntimeError",
        "_convert_weight_to_int4pack: {} columns are no multiple of {}",
        k,
        inner_k_tiles * 16,
    )
    out = empty([n // 8, k // (inner_k_tiles * 16), 32, inner_k_tiles // 2], "i32")
    copy_bytes(out, contiguous(self))
    return out


@lowering("_weight_int4pack_mm")
def weight_int4pack_mm(self: Tensor, mat2: Tensor, group: int, scales: Tensor) -> Tensor:
    """[M, K] @ dequantized [N, K].T. mat2: of _convert_weight_to_int4pack; scales [K / group, N, 2]: s and z of (q - 8) * s + z."""
    check(
        self.dtype in ("f32", "f16", "bf16"),
        "RuntimeError",
        f"_weight_int4pack_mm : expect A to be float, got {self.dtype}",
    )
    check(
        mat2.dtype == "i32" and mat2.ndim == 4,
        "RuntimeError",
        "_weight_int4pack_mm : expect B to be a 4d tensor of int32",
    )
    check(
        group in (32, 64, 128, 256),
        "RuntimeError",
        f"_weight_int4pack_mm: expect qGroupSize to be 32, 64, 128 or 256, got {group}",
    )
    check(scales.ndim == 3, "RuntimeError", "_weight_int4pack_mm: expect qScaleAndZeros to be 3d")
    m, k, n = self.sizes[0], self.sizes[1], mat2.sizes[0] * 8
    check(
        eq(mat2.sizes[1] * mat2.sizes[3] * 32, k), "RuntimeError", "_weight_int4pack_mm : B is of another K than {}", k
    )
    check(
        eq(scales.sizes[0] * group, k),
        "RuntimeError",
        "_weight_int4pack_mm: {} groups are not those of {} columns",
        scales.sizes[0],
        k,
    )
    check(
        eq(scales.sizes[1], n),
        "RuntimeError",
        "_weight_int4pack_mm: expect scales for {} rows, got {}",
        n,
        scales.sizes[1],
    )
    out = empty([m, n], self.dtype)
    w, scales = contiguous(mat2), contiguous(scales)
    rows = few_rows(m) if target().schedule_class == "simt" and scales.windows == 1 else 0
    if rows:
        x = contiguous(self)
        x = x if x.aligned(4) else copied(x)
        packed = ("i32", w.windows, simt.SKINNY_THREADS, group, scales.dtype)
        kernel = build(simt.skinny, x.dtype, out.dtype, rows, "t", True, False, simt.NO_EPILOGUE, *packed)
        launch(
            kernel, [x, w, scales, out], [1, m, n, k, 0, k, 1, 0, 1, k, 0, n, 1], simt.skinny_groups("t", n, 1, 1, minimum),
            lambda: 2 * m * n * k,
        )  # fmt: skip
        return out
    if target().schedule_class != "block":
        weight = empty([n, k], self.dtype)
        kernel = build(dequantize4, self.dtype, scales.dtype)
        launch(kernel, [w, scales, weight], [n, k, group], fold_groups(target(), cdiv(n * k, WORKGROUP)))
        product(matrix(self, 0, 1), matrix(weight, 1, 0), matrix(out, 0, 1))
        return out
    x = _rows(self)
    s = block.schedule(x.dtype, 1 << bucket(m), group)
    kernel = build(block.product, s, x.dtype, 4, scales.dtype, group, dot_precision(x.dtype))
    launch(kernel, [x, w, scales, out], [x.strides[0], m, n, k], block.groups(s, m, n))
    return out


def dequantize4(target: Target, dtype: str, scale: str) -> Kernel:
    """out [n, k] = (q - 8) * s + z. Buffers: q (i32, eight weights each), scales [k / group, n, 2], out. Scalars: n, k, group."""
    k = KernelBuilder(target, f"dequantize4_{dtype}_{scale}")
    words, scales, out = k.buffer("q", "i32"), k.buffer("scales", scale), k.buffer("out", dtype, "w")
    n, columns, group = (k.scalar(name, "u32") for name in ("n", "columns", "group"))
    i = k.global_id(WORKGROUP)
    with k.If(i < n * columns):
        row = k.let(ir.idiv(i, columns))
        word: Any = ir.bitcast(k.let(words[ir.idiv(i, 8)]), "u32")
        byte = ir.and_(ir.idiv(i, 2), 3)
        # Of a byte the even weight is in the high half.
        shift = k.let(byte * 8 + ir.where(ir.eq(ir.and_(i, 1), 0), ir.const(4, "u32"), 0))
        q = ir.cast(ir.and_(ir.shr(word, shift), 15), "f32") - 8.0
        at = k.let((ir.idiv(i - row * columns, group) * n + row) * 2)
        out[i] = q * scales[at] + scales[at + 1]
    return k.finish((WORKGROUP, 1, 1))
