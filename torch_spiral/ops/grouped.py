"""Grouped products: _grouped_mm (torch.nn.functional.grouped_mm), whose groups are cut by offsets that stay on the device."""

from __future__ import annotations

from ..kernels.kernel import DTYPES
from ..lowering import SCALAR_TYPES, Tensor, cdiv, check, empty, eq, is_zero, lowering
from .common import contiguous, fill
from .contraction import grouped_product, matrix, product


def grouped_result(a: Tensor, b: Tensor, offs: Tensor | None, dtype: str) -> Tensor:
    """The result, its rows padded to 16 bytes, as upstream's are; a RuntimeError where the groups differ in number."""
    if offs is None:
        check(eq(a.sizes[0], b.sizes[0]), "RuntimeError", "batched dimension has to match")
    elif a.ndim != b.ndim:
        groups = (a if a.ndim == 3 else b).sizes[0]
        check(eq(offs.sizes[0], groups), "RuntimeError", "matrix batch sizes have to match")
    sizes = [a.sizes[-2], b.sizes[-1]]
    if a.ndim == b.ndim:
        sizes.insert(0, a.sizes[0] if offs is None else offs.sizes[0])
    unit = 16 // DTYPES[dtype].size
    row = cdiv(sizes[-1], unit) * unit
    strides = [row, 1] if len(sizes) == 2 else [sizes[1] * row, row, 1]
    return empty(sizes, dtype, strides)


@lowering("_grouped_mm")
def grouped_mm(self: Tensor, mat2: Tensor, offs: Tensor | None, bias: Tensor | None, out_dtype: str | None) -> Tensor:
    """Products of groups. offs [G] (int32, on the device): where each group ends, in the dimension that

    - [M, K] x [G, K, N] -> [M, N]: cuts the rows (a group of tokens for each expert);
    - [G, M, K] x [K, N] -> [M, N]: cuts the columns;
    - [M, K] x [K, N] -> [G, M, N]: cuts the reduction (the gradient of weights);
    - [G, M, K] x [G, K, N] -> [G, M, N]: without offs.

    float32, float16 or bfloat16. What lies behind the last end is neither read nor written. Unlike upstream's, rows may lie at any
    stride. RuntimeErrors are upstream's."""
    dtypes = {"f32": "float", "bf16": "c10::BFloat16", "f16": "c10::Half"}
    for name, x in (("mat_a", self), ("mat_b", mat2)):
        check(
            x.dtype in dtypes, "RuntimeError",
            f"Expected {name} to be Float32, BFloat16 or Float16 matrix, got {SCALAR_TYPES[x.dtype]}",
        )  # fmt: skip
        check(x.ndim in (2, 3), "RuntimeError", f"{name} has to be 2 or 3d")
    check(
        self.dtype == mat2.dtype, "RuntimeError",
        f"expected m1 and m2 to have the same dtype, but got: {dtypes[self.dtype]} != {dtypes[mat2.dtype]}",
    )  # fmt: skip
    check(
        eq(self.sizes[-1], mat2.sizes[-2]),
        "RuntimeError",
        "contraction dimension of mat_a and mat_b must match",
    )
    check(
        (offs is None) == (self.ndim == mat2.ndim == 3), "RuntimeError",
        "Have to provide offsets if there is a 2d matrix, or no offset if both matrices are 3d",
    )  # fmt: skip
    if offs is not None:
        check(offs.ndim == 1, "RuntimeError", "offs has to be 1D")
        check(offs.dtype == "i32", "RuntimeError", "Offsets have to be int32")
        offs = contiguous(offs)
    check(bias is None, "RuntimeError", "Bias not supported yet")
    check(out_dtype in (None, self.dtype), "RuntimeError", "Grouped gemm output dtype must match `mat_a` dtype")
    out = grouped_result(self, mat2, offs, self.dtype)
    if is_zero(self.sizes[-1]):
        if not out.is_empty:
            fill(out, 0)
    elif offs is None:
        product(self, mat2, out)
    elif self.ndim == mat2.ndim:
        grouped_product(matrix(self, 0, 1), matrix(mat2, 0, 1), out, offs, "k")
    elif self.ndim == 2:
        grouped_product(matrix(self, 0, 1), mat2, matrix(out, 0, 1), offs, "rows")
    else:  # the rows of the transposes
        grouped_product(matrix(mat2, 1, 0), self.transpose(1, 2), matrix(out, 1, 0), offs, "rows")
    return out
