"""Products of float8 matrices with scales: _scaled_mm and _scaled_mm_v2 (torch.nn.functional.scaled_mm), and of groups of them:
_scaled_grouped_mm and _scaled_grouped_mm_v2 (torch.nn.functional.scaled_grouped_mm).

Scales are float32, of a whole operand ("TensorWise") or of each row of the first and each column of the second ("RowWise"); of blocks
of 128 numbers along the reduction, of one row or of 128 ("BlockWise1x128", "BlockWise128x128"); or powers of two (float8_e8m0fnu) of
blocks of 32 numbers of a row ("BlockWise1x32", MXFP8). The products of these are Triton's tl.dot of a block, times its scales.
Tensor cores of compute capability 8.9 and later multiply the numbers as they are; elsewhere both operands become float16 first,
which holds every float8 number, and where blocks have scales, but on CUDA and HIP, float32 with these."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.kernel import FLOAT8
from ..lowering import (
    SCALAR_TYPES,
    Tensor,
    all_of,
    any_of,
    cdiv,
    check,
    composite,
    empty,
    eq,
    is_one,
    is_zero,
    le,
    lowering,
    maximum,
    operator,
    where,
)
from .common import contiguous, copy_to, fill, map_tensors, out_variant
from .contraction import Blocks, grouped_product, matrix, product
from .grouped import grouped_result
from .items import Item, each

# Those with a sign and a fraction: what products are of.
NUMBERS = tuple(x for x in FLOAT8 if x != "f8e8m0fnu")


def _swizzled_size(rows: Any, k: Any) -> Any:
    """Elements of the scales of rows of k numbers, one for 32, in tiles of 128 x 4."""
    return cdiv(rows, 128) * 128 * (cdiv(cdiv(k, 32), 4) * 4)


def _invalid(m: Any, n: Any, k: Any, types: list[str], sizes: Any) -> str:
    """sizes: texts of the size and the stride of both scales. The numbers may be placeholders, in the order of _numbers()."""
    rows_a, rows_b, blocks, blocks_m, blocks_n, mx_a, mx_b = _numbers(m, n, k) if isinstance(m, int) else ("{}",) * 7
    return (
        "Invalid scaling configuration.\n"
        "- For TensorWise scaling, a and b should be float8, scales should be float and singletons.\n"
        f"- For RowWise scaling, a and b should be float8, scales should be float, scale_a should be ({rows_a}, 1) and scale_b should be "
        f"(1, {rows_b}), and both should be contiguous.\n"
        f"- For BlockWise 1x128 scaling, a and b should be float8, scales should be float, scale_a should be ({rows_a}, {blocks}) and "
        f"scale_b should be ({blocks}, {rows_b}), and both should be outer-dim-major.\n"
        f"- For BlockWise 128x128 scaling, a and b should be float8, scales should be float, scale_a should be ({blocks_m}, {blocks}) and "
        f"scale_b should be ({blocks}, {blocks_n}), and both should be near-inner-dim-major (with 16-byte aligned strides).\n"
        f"- For Blockwise 1x32 scaling, a and b should be float8, scales should be float8_e8m0fnu, scale_a should have {mx_a} elements and "
        f"scale_b should have {mx_b} elements, and both should be contiguous.\n"
        f"Got mat_a.dtype()={types[0]}, scale_a.dtype()={types[1]}, scale_a.size()={sizes[0]}, scale_a.stride()={sizes[1]}, "
        f"mat_b.dtype()={types[2]}, scale_b.dtype()={types[3]}, scale_b.size()={sizes[2]} and scale_b.stride()={sizes[3]}"
    )


def _numbers(m: Any, n: Any, k: Any) -> tuple[Any, ...]:
    return m, n, cdiv(k, 128), cdiv(m, 128), cdiv(n, 128), _swizzled_size(m, k), _swizzled_size(n, k)


def _shown(m: Any, n: Any, k: Any) -> list[Any]:
    """What the placeholders of _invalid() stand for, in order."""
    rows_a, rows_b, blocks, blocks_m, blocks_n, mx_a, mx_b = _numbers(m, n, k)
    return [rows_a, rows_b, rows_a, blocks, blocks, rows_b, blocks_m, blocks, blocks, blocks_n, mx_a, mx_b]


def _list(x: Tensor) -> str:
    return "[" + ", ".join(["{}"] * x.ndim) + "]"


def _one(x: Tensor) -> bool:
    return all(is_one(n) for n in x.sizes)


def _strided(x: Tensor, sizes: tuple[Any, Any], strides: tuple[Any, Any]) -> Any:
    """Whether x has these sizes and strides; the stride of a size of 1 may be any."""
    return all_of(
        *(eq(n, wanted) for n, wanted in zip(x.sizes, sizes)),
        *(any_of(le(n, 1), eq(stride, wanted)) for n, stride, wanted in zip(x.sizes, x.strides, strides)),
    )


def _scales(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Blocks | None:
    """The scales of blocks, or None for those of rows or of all; a ValueError where they are none of these."""
    (m, k), n = a.sizes, b.sizes[1]
    numbers, blocks = a.dtype in NUMBERS and b.dtype in NUMBERS, cdiv(k, 128)
    valid: Any = False
    found = None
    if numbers and scale_a.dtype == scale_b.dtype == "f32":
        plane = scale_a.ndim == scale_b.ndim == 2
        if _one(scale_a) and _one(scale_b):
            valid = True
        elif plane and is_one(scale_a.sizes[1]) and is_one(scale_b.sizes[0]):
            if scale_a.is_contiguous and scale_b.is_contiguous:
                valid = all_of(eq(scale_a.sizes[0], m), eq(scale_b.sizes[1], n))
        elif plane:
            turned = scale_b.transpose(0, 1)
            row_a, row_b = _strided(scale_a, (m, blocks), (1, m)), _strided(turned, (n, blocks), (1, n))
            tile_a = _strided(scale_a, (cdiv(m, 128), blocks), (blocks, 1))
            tile_b = _strided(turned, (cdiv(n, 128), blocks), (blocks, 1))
            valid = any_of(all_of(row_a, row_b), all_of(tile_a, row_b), all_of(row_a, tile_b))
            found = Blocks(128, scale_a, turned, where(row_a, 1, 128), where(row_b, 1, 128))
    elif numbers and scale_a.dtype == scale_b.dtype == "f8e8m0fnu" and scale_a.is_contiguous and scale_b.is_contiguous:
        valid = all_of(*(eq(x.numel, _swizzled_size(rows, k)) for x, rows in ((scale_a, m), (scale_b, n))))
        found = Blocks(32, _unswizzled(scale_a, m, k), _unswizzled(scale_b, n, k), 1, 1)
    types = [SCALAR_TYPES[x.dtype] for x in (a, scale_a, b, scale_b)]
    text = _invalid("{}", "{}", "{}", types, [_list(x) for x in (scale_a, scale_a, scale_b, scale_b)])
    shown = [*scale_a.sizes, *scale_a.strides, *scale_b.sizes, *scale_b.strides]
    check(valid, "ValueError", text, *_shown(m, n, k), *shown)
    return found


def _unswizzled(scale: Tensor, rows: Any, k: Any) -> Tensor:
    """Scales [rows, k / 32] in float32, stored by columns, of those in tiles of 128 x 4 ("SWIZZLE_32_4_4"): in a tile row r, column c is at
    r % 32 * 16 + r / 32 * 4 + c."""
    out = empty([cdiv(k, 32), rows], "f32").transpose(0, 1)
    flat = scale.view((scale.numel,), (1,))
    each(
        "unswizzle",
        _unswizzle,
        out.sizes[::-1],
        {"out": out.transpose(0, 1), "scale": flat},
        {"tiles": cdiv(cdiv(k, 32), 4)},
    )
    return out


def _unswizzle(it: Item) -> None:
    column, row = it.at
    tile = row // 128 * it["tiles"] + column // 4
    it.store("out", it.load("scale", (tile * 512 + row % 32 * 16 + row // 32 % 4 * 4 + column % 4,)))


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
    """(self * scale_a) @ (mat2 * scale_b) + bias, for float8 [M, K] and [K, N].

    Scales of one element; [M, 1] and [1, N]; of blocks of 128, [M, K / 128] stored by columns or [M / 128, K / 128] by rows, and for mat2
    the transpose of such, not both of 128 rows; all float32. Or float8_e8m0fnu of blocks of 32, in tiles of 128 x 4 (_unswizzled).
    bias [N], of any float dtype. out_dtype: self's where there is none. scale_result: a float8 result is divided by it.
    use_fast_accum: sums may have the precision of the tensor cores (Hopper), else they are float32."""
    for name, x in (("mat1", self), ("mat2", mat2)):
        check(x.ndim == 2, "RuntimeError", f"{name} must be a matrix")
    blocks = _scales(self, mat2, scale_a, scale_b)
    (m, k), n = self.sizes, mat2.sizes[1]
    check(
        eq(k, mat2.sizes[0]), "RuntimeError", "mat_a and mat_b shapes cannot be multiplied ({}x{} and {}x{})",
        m, k, mat2.sizes[0], n,
    )  # fmt: skip
    if bias is not None:
        check(eq(bias.numel, n), "RuntimeError", "Bias must be size {} but got {}", n, bias.numel)
    out = empty([m, n], out_dtype or self.dtype)
    terms = [] if blocks else [("mul", _factor(scale_a, m, n, 0)), ("mul", _factor(scale_b, m, n, 1))]
    _product(self, mat2, bias, scale_result, terms, use_fast_accum, blocks, out)
    return out


def _product(
    a: Tensor, b: Tensor, bias: Tensor | None, scale_result: Tensor | None, terms: list[tuple[str, Tensor]], fast: bool,
    blocks: Blocks | None, out: Tensor,
) -> None:  # fmt: skip
    (m, k), n = a.sizes, b.sizes[1]
    added = None if bias is None else bias.view((1, m, n), (0, 0, bias.strides[-1] if bias.ndim else 0))
    if is_zero(k) and not out.is_empty:
        fill(out, 0) if added is None else copy_to(matrix(out, 0, 1), added)
        return
    if added is not None:
        terms.append(("add", added))
    if scale_result is not None and out.dtype in FLOAT8:
        check(
            eq(scale_result.numel, 1), "RuntimeError", "scale_result must have one element, got {}", scale_result.numel
        )
        inverse = empty([1], "f32")
        map_tensors("reciprocal", _reciprocal, [inverse], [scale_result.view((1,), (1,))])
        terms.append(("mul", _factor(inverse, m, n, 0)))
    product(matrix(a, 0, 1), matrix(b, 0, 1), matrix(out, 0, 1), terms=terms, fast=fast, blocks=blocks)


def _reciprocal(x: Any) -> Any:
    return 1.0 / x


out_variant("_scaled_mm.out", "_scaled_mm", "out")


@operator(
    "scaled_blocks(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, int rows_a, int rows_b, bool swizzled, Tensor? bias, "
    "Tensor(a!) out) -> ()",
    slots=("rows_a", "rows_b"),
)
def scaled_blocks(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, rows_a: Any, rows_b: Any, swizzled: bool, bias: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """out = a [M, K] @ b [K, N] + bias with scales [M / rows_a, K / size] and [N / rows_b, K / size]: float32 and size 128, or
    float8_e8m0fnu and size 32, then also swizzled."""
    (m, k), n = a.sizes, b.sizes[1]
    size = 128 if scale_a.dtype == "f32" else 32
    if swizzled:
        scale_a, scale_b = _unswizzled(scale_a, m, k), _unswizzled(scale_b, n, k)
    elif size == 32:
        scale_a, scale_b = contiguous(scale_a, "f32"), contiguous(scale_b, "f32")
    _product(a, b, bias, None, [], False, Blocks(size, scale_a, scale_b, rows_a, rows_b), out)


# torch.nn.functional's ScalingType and SwizzleType.
TENSOR_WISE, ROW_WISE, ROWS_OF_32, ROWS_OF_128, TILES_OF_128 = 0, 1, 3, 4, 5
SWIZZLED = 1
BLOCKWISE = ([ROWS_OF_32] * 2, [ROWS_OF_128] * 2, [ROWS_OF_128, TILES_OF_128], [TILES_OF_128, ROWS_OF_128])


@composite("_scaled_mm_v2")
def scaled_mm_v2(
    self: Any, mat2: Any, scale_a: list[Any], recipe_a: list[int], swizzle_a: list[int], scale_b: list[Any], recipe_b: list[int],
    swizzle_b: list[int], bias: Any, out_dtype: Any, contraction_dim: Any = (), use_fast_accum: bool = False,
) -> Any:  # fmt: skip
    """_scaled_mm with its kind of scaling named: both tensor-wise, both row-wise, or of blocks (scaled_blocks): 1x128 [M, K / 128] and
    [N, K / 128] stored by columns, 128x128 for one of them [4 * ceil(K / 512), M / 128] by columns; 1x32 swizzled, or, unlike CUDA and
    like ROCm, [M, K / 32] and [N, K / 32] by rows."""
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
    recipes = [*recipe_a, *recipe_b]
    numbers = all(x.dtype.itemsize == 1 and x.is_floating_point() and x.dtype != SCALES for x in (self, mat2))
    if recipes in BLOCKWISE and len(recipe_a) == len(scale_a) == len(scale_b) == 1 and numbers:
        scales: Any = scale_a[0], scale_b[0]
        wanted = SCALES if recipes[0] == ROWS_OF_32 else torch.float32
        if scales[0].dtype == scales[1].dtype == wanted:
            out = self.new_empty((m, n), dtype=out_dtype or self.dtype)
            if wanted == SCALES:
                swizzled, rows = _check_mx(self, mat2, scale_a[0], scale_b[0], swizzle_a, swizzle_b), (1, 1)
            else:
                swizzled, (scales, rows) = False, _check_blocks(m, n, k, scale_a[0], scale_b[0], recipes)
            torch.ops.spiral.scaled_blocks(self, mat2, *scales, *rows, swizzled, bias, out)
            return out
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
        places = [x for s in (scale_a[0], scale_b[0]) for x in (list(s.shape), list(s.stride()))]
        raise ValueError(_invalid(m, n, k, types, places))
    return torch._scaled_mm(
        self, mat2, scale_a[0], scale_b[0], bias, out_dtype=out_dtype, use_fast_accum=use_fast_accum
    )


out_variant("_scaled_mm_v2.out", "_scaled_mm_v2", "out")


SCALES = torch.float8_e8m0fnu


def _check_mx(a: Any, b: Any, scale_a: Any, scale_b: Any, swizzle_a: list[int], swizzle_b: list[int]) -> bool:
    """Whether the scales are swizzled; a ValueError where they are neither so nor plain."""
    (m, k), n = a.shape, b.shape[1]
    contiguous = scale_a.is_contiguous() and scale_b.is_contiguous()
    if not any((*swizzle_a, *swizzle_b)) and contiguous:
        blocks = -(-k // 32)
        if (tuple(scale_a.shape), tuple(scale_b.shape)) == ((m, blocks), (n, blocks)):
            return False
    for name, swizzle in (("swizzle_a", swizzle_a), ("swizzle_b", swizzle_b)):
        _require(len(swizzle) == 1, f"{name} must have 1 value, got {len(swizzle)}")
    for name, scale, rows in (("scale_a", scale_a, m), ("scale_b", scale_b, n)):
        size = _swizzled_size(rows, k)
        _require(
            scale.numel() == size, f"For Blockwise scaling {name} should have {size} elements, got: {scale.numel()}"
        )
    for name, swizzle in (("scale_a", swizzle_a), ("scale_b", swizzle_b)):
        _require(swizzle[0] == SWIZZLED, f"{name} must be swizzled to SWIZZLE_32_4_4 format")
    _require(contiguous, "For Blockwise scaling both scales should be contiguous")
    return True


def _check_blocks(m: int, n: int, k: int, scale_a: Any, scale_b: Any, recipes: list[int]) -> Any:
    """Scales [M / rows, K / 128] and [N / rows, K / 128], and their rows; a ValueError where one has another shape or other strides."""
    blocks, scales, rows_of = -(-k // 128), [], []
    both = recipes == [ROWS_OF_128, ROWS_OF_128]
    for name, x, rows, recipe in (("scale_a", scale_a, m, recipes[0]), ("scale_b", scale_b, n, recipes[1])):
        first, second = (rows, blocks) if recipe == ROWS_OF_128 else (-(-blocks // 4) * 4, -(-rows // 128))
        text = f"{name} must have shape {first} x {second} Float elements, got {list(x.shape)}"
        _require(tuple(x.shape) == (first, second), text)
        right = all(
            size <= 1 or x.stride(d) == stride for d, (size, stride) in enumerate(((first, 1), (second, first)))
        )
        words = f"strides must be (1, {first}); got:" if both else f"must have strides (1, {first}); got"
        _require(right, f"{name} {words} {list(x.stride())}")
        scales.append(x if recipe == ROWS_OF_128 else x[:blocks].t())
        rows_of.append(1 if recipe == ROWS_OF_128 else 128)
    return scales, rows_of


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
        check(x.dtype in NUMBERS, "ValueError", f"Expected mat_a to be Float8_e4m3 matrix got {SCALAR_TYPES[x.dtype]}")
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
