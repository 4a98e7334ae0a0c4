"""Products of float8 matrices with scales: _scaled_mm and _scaled_mm_v2 (torch.nn.functional.scaled_mm), and of groups of them:
_scaled_grouped_mm and _scaled_grouped_mm_v2 (torch.nn.functional.scaled_grouped_mm).

Scales are float32, of a whole operand ("TensorWise") or of each row of the first and each column of the second ("RowWise").
Tensor cores of compute capability 8.9 and later multiply the numbers as they are; elsewhere both operands become float16 first,
which holds every float8 number."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.kernel import FLOAT8
from ..lowering import (
    SCALAR_TYPES,
    Tensor,
    all_of,
    any_of,
    check,
    composite,
    empty,
    eq,
    is_one,
    is_zero,
    le,
    lowering,
    maximum,
    where,
)
from .common import contiguous, copy_to, fill, map_tensors, out_variant
from .contraction import grouped_product, matrix, product
from .grouped import grouped_result


def _invalid(m: Any, n: Any, types: list[str], size_a: Any, stride_a: Any, size_b: Any, stride_b: Any) -> str:
    return (
        "Invalid scaling configuration.\n"
        "- For TensorWise scaling, a and b should be float8, scales should be float and singletons.\n"
        f"- For RowWise scaling, a and b should be float8, scales should be float, scale_a should be ({m}, 1) and scale_b should be "
        f"(1, {n}), and both should be contiguous.\n"
        f"Got mat_a.dtype()={types[0]}, scale_a.dtype()={types[1]}, scale_a.size()={size_a}, scale_a.stride()={stride_a}, "
        f"mat_b.dtype()={types[2]}, scale_b.dtype()={types[3]}, scale_b.size()={size_b} and scale_b.stride()={stride_b}"
    )


def _list(x: Tensor) -> str:
    return "[" + ", ".join(["{}"] * x.ndim) + "]"


def _check_scales(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> None:
    def one(x: Tensor) -> bool:
        return all(is_one(n) for n in x.sizes)

    m, n = a.sizes[0], b.sizes[1]
    float8 = a.dtype in FLOAT8 and b.dtype in FLOAT8 and scale_a.dtype == scale_b.dtype == "f32"
    valid: Any = float8 and one(scale_a) and one(scale_b)
    if float8 and not valid and scale_a.ndim == scale_b.ndim == 2 and scale_a.is_contiguous and scale_b.is_contiguous:
        valid = all_of(
            eq(scale_a.sizes[0], m), eq(scale_a.sizes[1], 1), eq(scale_b.sizes[0], 1), eq(scale_b.sizes[1], n)
        )
    types = [SCALAR_TYPES[x.dtype] for x in (a, scale_a, b, scale_b)]
    text = _invalid("{}", "{}", types, *(_list(x) for x in (scale_a, scale_a, scale_b, scale_b)))
    shown = [*scale_a.sizes, *scale_a.strides, *scale_b.sizes, *scale_b.strides]
    check(valid, "ValueError", text, m, n, *shown)


def _factor(scale: Tensor, m: Any, n: Any, dim: int) -> Tensor:
    """A scale as a term of a product [1, m, n]: of rows (dim 0), columns (1), or all."""
    if all(is_one(size) for size in scale.sizes):
        return scale.view((1, m, n), (0, 0, 0))
    return scale.view((1, m, n), (0, scale.strides[0], 0) if dim == 0 else (0, 0, scale.strides[1]))


@lowering("_scaled_mm")
def scaled_mm(
    self: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, scale_result: Tensor | None,
    out_dtype: str | None, use_fast_accum: bool,
) -> Tensor:  # fmt: skip
    """(self * scale_a) @ (mat2 * scale_b) + bias, for float8 [M, K] and [K, N]; scales of one element, or [M, 1] and [1, N].

    bias [N], of any float dtype. out_dtype: self's where there is none. scale_result: a float8 result is divided by it.
    use_fast_accum: sums may have the precision of the tensor cores (Hopper), else they are float32."""
    for name, x in (("mat1", self), ("mat2", mat2)):
        check(x.ndim == 2, "RuntimeError", f"{name} must be a matrix")
    _check_scales(self, mat2, scale_a, scale_b)
    (m, k), n = self.sizes, mat2.sizes[1]
    check(
        eq(k, mat2.sizes[0]), "RuntimeError", "mat_a and mat_b shapes cannot be multiplied ({}x{} and {}x{})",
        m, k, mat2.sizes[0], n,
    )  # fmt: skip
    if bias is not None:
        check(eq(bias.numel, n), "RuntimeError", "Bias must be size {} but got {}", n, bias.numel)
    out = empty([m, n], out_dtype or self.dtype)
    added = None if bias is None else bias.view((1, m, n), (0, 0, bias.strides[-1] if bias.ndim else 0))
    if is_zero(k) and not out.is_empty:
        fill(out, 0) if added is None else copy_to(matrix(out, 0, 1), added)
        return out
    terms = [("mul", _factor(scale_a, m, n, 0)), ("mul", _factor(scale_b, m, n, 1))]
    if added is not None:
        terms.append(("add", added))
    if scale_result is not None and out.dtype in FLOAT8:
        check(
            eq(scale_result.numel, 1), "RuntimeError", "scale_result must have one element, got {}", scale_result.numel
        )
        inverse = empty([1], "f32")
        map_tensors("reciprocal", _reciprocal, [inverse], [scale_result.view((1,), (1,))])
        terms.append(("mul", _factor(inverse, m, n, 0)))
    product(matrix(self, 0, 1), matrix(mat2, 0, 1), matrix(out, 0, 1), terms=terms, fast=use_fast_accum)
    return out


def _reciprocal(x: Any) -> Any:
    return 1.0 / x


out_variant("_scaled_mm.out", "_scaled_mm", "out")

# torch.nn.functional's ScalingType and SwizzleType.
TENSOR_WISE, ROW_WISE, NO_SWIZZLE = 0, 1, 0


@composite("_scaled_mm_v2")
def scaled_mm_v2(
    self: Any, mat2: Any, scale_a: list[Any], recipe_a: list[int], swizzle_a: list[int], scale_b: list[Any], recipe_b: list[int],
    swizzle_b: list[int], bias: Any, out_dtype: Any, contraction_dim: Any = (), use_fast_accum: bool = False,
) -> Any:  # fmt: skip
    """_scaled_mm with its kind of scaling named: both tensor-wise, or both row-wise."""
    for name, x in (("mat_a", self), ("mat_b", mat2)):
        _require(x.dim() == 2, f"{name} must be a matrix")
    if contraction_dim:
        _require(len(contraction_dim) == 2, "contraction_dim must have exactly 2 elements")
        first, second = contraction_dim
        matching = self.size(first) == mat2.size(second)
    else:
        matching = self.size(1) == mat2.size(0)
    (m, k), (rows, n) = self.shape, mat2.shape
    _require(matching, f"mat_a and mat_b shapes cannot be multiplied ({m}x{k} and {rows}x{n})")
    _require(
        bias is None or bias.numel() == n, f"Bias must be size {n} but got {bias.numel() if bias is not None else 0}"
    )
    _require(not any((*swizzle_a, *swizzle_b)), "spiral does not support swizzle.")
    if recipe_a == recipe_b == [TENSOR_WISE]:
        for name, (scale,) in (("scale_a", scale_a), ("scale_b", scale_b)):
            _require(scale.numel() == 1 and scale.dtype == torch.float32, f"{name} must have 1 Float element")
    elif recipe_a == recipe_b == [ROW_WISE]:
        (first,), (second,) = scale_a, scale_b
        _require(list(first.shape) == [m, 1], f"scale_a must have shape [{m}, 1], got [{list(first.shape)}]")
        _require(second.numel() == n, f"scale_b must have {n} Float elements, got {second.numel()}")
        _require(
            second.dim() == 2 and second.stride(1) == 1,
            f"expected scale_b.stride(1) to be 1, but got {second.stride(-1)}",
        )
        scale_b = [second.reshape(1, n)]
    else:
        types = [x.type().rpartition(".")[2].removesuffix("Tensor") for x in (self, scale_a[0], mat2, scale_b[0])]
        places = (x for s in (scale_a[0], scale_b[0]) for x in (list(s.shape), list(s.stride())))
        raise ValueError(_invalid(m, n, types, *places))
    return torch._scaled_mm(
        self, mat2, scale_a[0], scale_b[0], bias, out_dtype=out_dtype, use_fast_accum=use_fast_accum
    )


out_variant("_scaled_mm_v2.out", "_scaled_mm_v2", "out")


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


# ---- groups -----------------------------------------------------------------------------------------------------------


def _by_columns(x: Tensor) -> Any:
    """Whether the matrices of x are stored by columns; a RuntimeError where neither rows nor columns are contiguous, or where they
    don't start at multiples of 16 bytes."""
    (rows, columns), (down, along) = x.sizes[-2:], x.strides[-2:]
    turned = all_of(eq(down, 1), le(maximum(rows, 1), along))
    straight = all_of(eq(along, 1), le(maximum(columns, 1), down))
    text = f"Invalid strides/sizes, got {_list(x)} for strides and {_list(x)} for sizes"
    check(any_of(turned, straight), "RuntimeError", text, *x.strides, *x.sizes)
    check(eq(where(turned, along, down) % 16, 0), "RuntimeError", "strides should be multiple of 16 bytes")
    return turned


def _check_rowwise(x: Tensor, scale: Tensor, dim: int, groups: Any) -> None:
    """scale: [rows of x * groups], or [items, rows of x]; of columns where dim is 1."""
    if x.ndim == 2:
        check(scale.ndim == 1, "RuntimeError", f"scale must be a 1D tensor, but got {scale.ndim}D, arg {dim}")
        check(scale.is_contiguous, "RuntimeError", f"scale must be contiguous for arg {dim}")
        check(
            eq(scale.sizes[0], x.sizes[dim] * groups),
            "RuntimeError",
            f"scale must have the same length as mat for arg {dim}",
        )
        return
    check(scale.ndim == 2, "RuntimeError", f"scale must be a 2D tensor, but got {scale.ndim}D for arg {dim}")
    for condition, text in (
        (eq(scale.strides[1], 1), "scale must be contiguous in the last dimension"),
        (eq(scale.sizes[0], x.sizes[0]), "scale must have the same batch dimension as mat"),
        (eq(scale.sizes[1], x.sizes[1 + dim]), "scale must have the same first dimension as mat"),
    ):
        check(condition, "RuntimeError", f"{text} for arg {dim}")


@lowering("_scaled_grouped_mm")
def scaled_grouped_mm(
    self: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor | None, bias: Tensor | None,
    scale_result: Tensor | None, out_dtype: str | None, use_fast_accum: bool,
) -> Tensor:  # fmt: skip
    """_grouped_mm of float8 matrices, whose rows (of the first) and columns (of the second) have scales; bfloat16.

    - [M, K] x [G, K, N] -> [M, N]: scales [M] and [G, N];
    - [G, M, K] x [K, N] -> [M, N]: scales [G, M] and [N];
    - [M, K] x [K, N] -> [G, M, N]: scales [G * M] and [G * N], for each group its own;
    - [G, M, K] x [G, K, N] -> [G, M, N]: scales [G, M] and [G, N], without offs.

    The first is stored by rows, the second by columns; K and N are multiples of 16. Any float8 dtypes. use_fast_accum: sums may have
    the precision of the tensor cores (Hopper), else they are float32. ValueErrors and RuntimeErrors are upstream's, of its row-wise
    scales; blocks (MXFP8, NVFP4) are not there."""
    for name, x in (("mat_a", self), ("mat_b", mat2)):
        check(x.ndim in (2, 3), "ValueError", f"{name} has to be 2 or 3d")
    check(eq(_by_columns(self), 0), "ValueError", "Expected mat1 to not be transposed")
    check(_by_columns(mat2), "ValueError", "Expected mat2 to be transposed")
    both = self.ndim == mat2.ndim == 2
    k, n = mat2.sizes[-2:]
    check(eq(self.sizes[-1], k), "ValueError", "contraction dimension of mat_a and mat_b must match")
    check(
        eq(self.sizes[-1] % 16, 0), "ValueError",
        f"Expected trailing dimension of mat_a to be divisible by 16 but got mat1 shape: ({_list(self)}).", *self.sizes,
    )  # fmt: skip
    check(
        all_of(eq(k % 16, 0), eq(n % 16, 0)), "ValueError",
        f"Expected mat_b shape to be divisible by 16 but got mat_b shape: ({_list(mat2)}).", *mat2.sizes,
    )  # fmt: skip
    check(bias is None, "ValueError", "Bias not supported yet")
    check(scale_result is None, "ValueError", "Scale result not supported yet")
    check(
        (offs is None) == (self.ndim == mat2.ndim == 3), "ValueError", "Have to provide offsets if there is a 2d matrix"
    )
    if offs is not None:
        check(offs.ndim == 1, "ValueError", "offs has to be 1D")
        check(offs.dtype == "i32", "ValueError", "Offsets have to be int32")
        offs = contiguous(offs)
    check(
        scale_a.dtype == scale_b.dtype == "f32", "ValueError",
        "For FP8 tensorwise and rowwise, both scales must both be float32 tensors. For MXFP8, scales must both be float8_e8m0fnu "
        "tensors.",
    )  # fmt: skip
    groups = offs.sizes[0] if both and offs is not None else 1
    _check_rowwise(self, scale_a, 0, groups)
    _check_rowwise(mat2, scale_b, 1, groups)
    check(
        out_dtype in (None, "bf16"),
        "ValueError",
        "Only bf16 high precision output types are supported for grouped gemm",
    )
    for x in (self, mat2):  # both texts name mat_a upstream
        check(x.dtype in FLOAT8, "ValueError", f"Expected mat_a to be Float8_e4m3 matrix got {SCALAR_TYPES[x.dtype]}")
    out = grouped_result(self, mat2, offs, "bf16")
    m = self.sizes[-2]
    if is_zero(k):
        if not out.is_empty:
            fill(out, 0)
        return out
    items = out.sizes[0] if offs is None else offs.sizes[0]

    def factor(scale: Tensor, dim: int, own: bool) -> Tensor:
        """A scale as a term of a product [items, m, n]. own: each item has its own."""
        first = scale.strides[0] if scale.ndim == 2 else (m, n)[dim] if own else 0
        strides = [first, 0, 0]
        strides[1 + dim] = scale.strides[-1]
        return scale.view((items, m, n), strides)

    terms = [("mul", factor(scale_a, 0, both)), ("mul", factor(scale_b, 1, both))]
    if offs is None:
        product(self, mat2, out, terms=terms, fast=use_fast_accum)
    elif both:
        grouped_product(matrix(self, 0, 1), matrix(mat2, 0, 1), out, offs, "k", terms, use_fast_accum)
    elif self.ndim == 2:
        grouped_product(matrix(self, 0, 1), mat2, matrix(out, 0, 1), offs, "rows", terms, use_fast_accum)
    else:  # the rows of the transposes
        terms = [(kind, x.transpose(1, 2)) for kind, x in terms]
        transposed = matrix(mat2, 1, 0), self.transpose(1, 2), matrix(out, 1, 0)
        grouped_product(*transposed, offs, "rows", terms, use_fast_accum)
    return out


@composite("_scaled_grouped_mm_v2")
def scaled_grouped_mm_v2(
    self: Any, mat2: Any, scale_a: list[Any], recipe_a: list[int], swizzle_a: list[int], scale_b: list[Any], recipe_b: list[int],
    swizzle_b: list[int], offs: Any = None, bias: Any = None, out_dtype: Any = None, contraction_dim: Any = (),
    use_fast_accum: bool = False,
) -> Any:  # fmt: skip
    """_scaled_grouped_mm with its kind of scaling named: row-wise, without swizzle."""
    if contraction_dim and (self.dim(), mat2.dim()) != (2, 2):
        _require(tuple(contraction_dim) == (-1, -2), "Curently contraction dims must be (-1, -2) only")
    _require(not any((*swizzle_a, *swizzle_b)), "spiral does not support swizzle.")
    rowwise = list(recipe_a) == list(recipe_b) == [ROW_WISE] and len(scale_a) == len(scale_b) == 1
    float8 = self.dtype.itemsize == mat2.dtype.itemsize == 1 and self.is_floating_point() and mat2.is_floating_point()
    _require(
        rowwise and float8 and scale_a[0].dtype == scale_b[0].dtype == torch.float32,
        "No gemm implementation was found",
    )
    return torch._scaled_grouped_mm(
        self, mat2, scale_a[0], scale_b[0], offs, bias, out_dtype=out_dtype, use_fast_accum=use_fast_accum
    )
