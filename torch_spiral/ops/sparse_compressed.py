"""Compressed sparse tensors (CSR, CSC, BSR, BSC): what ATen's shared natives (csrc/aten/generate.py) leave to a backend, in dense
ops on indices and values.

Conversions, elementwise functions, sums and autograd are upstream's. Products with a compressed matrix go through its
coordinates; they work, and are not tuned.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..lowering import composite, sparse_composite

compressed_composite = functools.partial(composite, key="SparseCsrPrivateUse1")
"""composite, for calls with a compressed sparse tensor."""

DENSE = torch.strided
LAYOUTS = {
    torch.sparse_csr: "SparseCsr",
    torch.sparse_csc: "SparseCsc",
    torch.sparse_bsr: "SparseBsr",
    torch.sparse_bsc: "SparseBsc",
}


def _is_compressed(x: Any) -> bool:
    return x.layout in LAYOUTS


# ---- indices -------------------------------------------------------------------------------------------------------


@composite("_convert_indices_from_coo_to_csr")
def coo_to_csr(self: Any, size: int, *, out_int32: bool = False) -> Any:
    """[size + 1]: where the entries of each row start. self [nnz]: sorted rows, each below `size`."""
    bounds = torch.arange(size + 1, dtype=self.dtype, device=self.device)
    return torch.searchsorted(self, bounds, out_int32=out_int32)


@composite("_convert_indices_from_csr_to_coo")
def csr_to_coo(crow_indices: Any, col_indices: Any, *, out_int32: bool = False, transpose: bool = False) -> Any:
    """[batch dimensions + 2, entries]: the coordinates of the entries of crow [*batch, rows + 1] and col [*batch, nnz];
    transpose exchanges the last two."""
    dtype = torch.int32 if out_int32 else torch.int64
    shape, device = col_indices.shape, col_indices.device
    if not col_indices.numel():
        return torch.empty(len(shape) + 1, 0, dtype=dtype, device=device)
    entries = torch.arange(shape[-1], dtype=crow_indices.dtype, device=device).expand(shape)
    rows = torch.searchsorted(crow_indices[..., 1:].contiguous(), entries.contiguous(), right=True, out_int32=out_int32)
    batch = torch.meshgrid(*(torch.arange(n, dtype=dtype, device=device) for n in shape), indexing="ij")[:-1]
    pair = (col_indices.to(dtype), rows) if transpose else (rows, col_indices.to(dtype))
    return torch.stack([i.reshape(-1) for i in (*batch, *pair)])


@composite("_validate_compressed_sparse_indices")
def validate(is_crow: bool, compressed_idx: Any, plain_idx: Any, cdim: int, dim: int, nnz: int) -> None:
    """Raises upstream's errors for indices that are none of a compressed tensor. cdim, dim: sizes of the compressed dimension
    and of the other one. Waits for the answer."""
    row, column, rows, columns = ("row", "col", "nrows", "ncols") if is_crow else ("col", "row", "ncols", "nrows")
    compressed, plain = f"c{row}_indices", f"{column}_indices"
    counts = compressed_idx.diff(dim=-1)
    # Entries ascend but where a compressed index starts.
    starts = torch.zeros((*plain_idx.shape[:-1], nnz + 1), dtype=torch.bool, device=plain_idx.device)
    starts.scatter_(-1, compressed_idx.clamp(0, nnz).long(), True)
    invariants = {
        f"{compressed}[..., 0] == 0": compressed_idx[..., 0] == 0,
        f"{compressed}[..., -1] == nnz": compressed_idx[..., -1] == nnz,
        f"0 <= {compressed}[..., 1:] - {compressed}[..., :-1] <= {columns}": (counts >= 0) & (counts <= dim),
        f"0 <= {plain} < {columns}": (plain_idx >= 0) & (plain_idx < dim),
        f"{plain}[..., {compressed}[..., i - 1]:{compressed}[..., i]] for all i = 1, ..., {rows} are sorted and distinct along "
        "the last dimension values": (plain_idx.diff(dim=-1) > 0) | starts[..., 1:nnz],
    }
    for text, holds in zip(invariants, torch.stack([v.all() for v in invariants.values()]).tolist(), strict=True):
        if not holds:
            raise RuntimeError(f"`{text}` is not satisfied.")


def _rows(x: Any) -> tuple[Any, Any]:
    """The row and the column of every entry of a CSR matrix, [nnz] each."""
    return csr_to_coo(x.crow_indices(), x.col_indices(), out_int32=x.col_indices().dtype == torch.int32).unbind()


# ---- sums and products ---------------------------------------------------------------------------------------------


def _into(out: Any, result: Any) -> Any:
    """result in the tensor of an out= overload, which may be sparse."""
    if not _is_compressed(result):
        return out.resize_(result.shape).copy_(result)
    if not _is_compressed(out):
        raise RuntimeError(f"Expected out to be a tensor of layout {result.layout}, but got {out.layout}")
    return out.resize_as_sparse_(result).copy_(result)


def _like(coo: Any, x: Any) -> Any:
    """A COO tensor in the layout of the compressed tensor x."""
    block = x.values().shape[-2:] if x.layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return coo.coalesce().to_sparse(layout=x.layout, blocksize=block)


@compressed_composite("add.out")
def add_out(self: Any, other: Any, *, alpha: Any = 1, out: Any) -> Any:
    """compressed + alpha * compressed of one layout, or dense + alpha * compressed, which adds at the entries alone."""
    if not _is_compressed(self) or not _is_compressed(other):
        dense, sparse = (other, self) if _is_compressed(self) else (self, other)
        if dense is other and alpha != 1:
            dense = dense * alpha
        if dense.shape != sparse.shape:
            raise RuntimeError(
                f"add: expected 'self' and 'other' to have same size, but self has size {list(self.shape)} while other has size "
                f"{list(other.shape)} (FYI: op2-sparse addition does not currently support broadcasting)"
            )
        return _into(out, torch.add(dense, sparse.to_sparse(), alpha=alpha if sparse is other else 1))
    if self.shape != other.shape:
        raise RuntimeError(
            "torch.add: Expected input tensors to have the same shape, but got tensor `self` with shape "
            f"{list(self.shape)} and tensor `other` with shape {list(other.shape)}"
        )
    return _into(out, _like(torch.add(self.to_sparse(), other.to_sparse(), alpha=alpha), self))


def _sparse_product(a: Any, b: Any) -> Any:
    """The COO product of CSR matrices [m, k] and [k, n]: every entry of a meets the entries of its column's row of b."""
    rows, columns = _rows(a)
    starts = b.crow_indices()
    counts = starts.diff().index_select(0, columns)
    left = torch.repeat_interleave(counts)
    within = torch.arange(left.shape[0], device=left.device) - (counts.cumsum(0) - counts).index_select(0, left)
    right = starts.index_select(0, columns.index_select(0, left)) + within
    indices = torch.stack([rows.index_select(0, left), b.col_indices().index_select(0, right)])
    values = a.values().index_select(0, left) * b.values().index_select(0, right)
    return torch.sparse_coo_tensor(indices, values, (a.shape[0], b.shape[1]), check_invariants=False).coalesce()


def _product(self: Any, mat1: Any, mat2: Any, beta: Any, alpha: Any) -> Any:
    """beta * self + alpha * mat1 @ mat2, dense unless both are compressed."""
    if mat1.dim() != 2 or mat2.dim() != 2 or mat1.shape[1] != mat2.shape[0]:
        shapes = " and ".join("x".join(map(str, m.shape)) for m in (mat1, mat2))
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({shapes})")
    if mat1.dtype != mat2.dtype:
        raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, but got: {mat1.dtype} != {mat2.dtype}")
    if _is_compressed(mat1) and _is_compressed(mat2):
        result = _sparse_product(mat1.to_sparse_csr(), mat2.to_sparse_csr()) * alpha
        if not _is_compressed(self):
            return torch.add(self * beta, result)
        if beta != 0:
            result = result + self.to_sparse() * beta
        return _like(result, self)
    if _is_compressed(mat1):
        return torch.addmm(self, mat1.to_sparse(), mat2, beta=beta, alpha=alpha)
    self = self.expand(mat1.shape[0], mat2.shape[1])
    return torch.addmm(self.t(), mat2.to_sparse().t(), mat1.t(), beta=beta, alpha=alpha).t().contiguous()


@compressed_composite("addmm.out")
def addmm_out(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any) -> Any:
    return _into(out, _product(self, mat1, mat2, beta, alpha))


@compressed_composite("addmv.out")
def addmv_out(self: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1, out: Any) -> Any:
    if vec.dim() != 1 or mat.shape[1] != vec.shape[0]:
        raise RuntimeError(
            f"size mismatch, got input ({mat.shape[0]}), mat ({mat.shape[0]}x{mat.shape[1]}), vec ({vec.shape[0]})"
        )
    column = self.expand(mat.shape[0])[:, None]
    return _into(out, _product(column, mat, vec[:, None], beta, alpha)[:, 0])


@sparse_composite("_sparse_sparse_matmul")
def sparse_sparse_matmul(self: Any, other: Any) -> Any:
    """The product of two COO matrices."""
    if self.dim() != 2 or other.dim() != 2 or self.shape[1] != other.shape[0]:
        shapes = " and ".join("x".join(map(str, m.shape)) for m in (self, other))
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({shapes})")
    return _sparse_product(self.to_sparse_csr(), other.to_sparse_csr())


def _sampled(self: Any, mat1: Any, mat2: Any, beta: Any, alpha: Any) -> Any:
    for name, m in (("mat1", mat1), ("mat2", mat2)):
        if m.layout != DENSE or m.dim() != 2:
            got = f"got {m.dim()}-D tensor" if m.layout == DENSE else f"got a tensor of layout {m.layout}"
            raise RuntimeError(f"sampled_addmm: Expected {name} to be a matrix, {got}")
    if self.layout != torch.sparse_csr:
        raise RuntimeError(f"sampled_addmm: Expected result to have sparse csr layout, but got {LAYOUTS[self.layout]}")
    if mat1.dtype != mat2.dtype or self.dtype != mat1.dtype:
        what, a, b = ("mat1 and mat2", mat1, mat2) if mat1.dtype != mat2.dtype else ("self and mat1", self, mat1)
        raise RuntimeError(f"sampled_addmm: Expected {what} to have the same dtype, but got {a.dtype} and {b.dtype}")
    if mat1.shape[1] != mat2.shape[0]:
        shapes = " and ".join("x".join(map(str, m.shape)) for m in (mat1, mat2))
        raise RuntimeError(f"sampled_addmm: mat1 and mat2 shapes cannot be multiplied ({shapes})")
    if self.shape[0] != mat1.shape[0]:
        raise RuntimeError("sampled_addmm: self.shape[-2] must match mat1.shape[-2]")
    if self.shape[1] != mat2.shape[1]:
        raise RuntimeError("sampled_addmm: self.shape[-1] must match mat2.shape[-1]")
    rows, columns = _rows(self)
    values = (mat1.index_select(0, rows) * mat2.t().index_select(0, columns)).sum(1) * alpha
    if beta != 0:
        values = values + self.values() * beta
    return torch.sparse_csr_tensor(
        self.crow_indices().clone(), self.col_indices().clone(), values, self.shape, check_invariants=False
    )


@compressed_composite("sparse_sampled_addmm")
def sampled_addmm(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * self + alpha * (mat1 @ mat2 where the CSR self has entries): mat1 [m, k], mat2 [k, n]. Makes [nnz, k] of products."""
    return _sampled(self, mat1, mat2, beta, alpha)


@compressed_composite("sparse_sampled_addmm.out")
def sampled_addmm_out(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any) -> Any:
    return _into(out, _sampled(self, mat1, mat2, beta, alpha))


# ---- products that reduce as asked ---------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Sums of halves are taken in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _counts(self: Any, dtype: torch.dtype) -> Any:
    """[rows, 1]: by what a mean divides."""
    return self.crow_indices().diff().clamp(min=1).to(dtype)[:, None]


@compressed_composite("_sparse_mm_reduce_impl")
def mm_reduce(self: Any, other: Any, reduce: str) -> tuple[Any, Any]:
    """(the product of the CSR self [m, k] and other [k, n], its sums replaced by a reduction over the row's entries; for amax
    and amin the entry of each result, nnz where the row has none). A row without entries gives zeros."""
    if self.layout != torch.sparse_csr:
        raise RuntimeError(f"sparse_mm_reduce: expect self to be SparseCsr, got {LAYOUTS[self.layout]}")
    if reduce == "prod":
        raise RuntimeError("sparse_mm_reduce: reduce type of prod has not been enabled.")
    if reduce not in ("sum", "mean", "amax", "amin"):
        raise RuntimeError(f"reduce argument must be either sum, prod, mean, amax or amin, got {reduce}")
    if other.dim() != 2 or other.shape[0] != self.shape[1]:
        raise RuntimeError(
            f"Expected a tensor of dimension 2 and tensor.size[0] == {self.shape[1]} but got: dimension {other.dim()} and "
            f"tensor.size[0] = {other.shape[0] if other.dim() else 0}"
        )
    if self.dtype != other.dtype:
        raise RuntimeError(
            f"Expected tensor for argument #1 'other' to have scalar type {self.dtype}; but got {other.dtype}"
        )
    rows, columns = _rows(self)
    wide, nnz = _wide(self.dtype), rows.shape[0]
    products = self.values().to(wide)[:, None] * other.index_select(0, columns).to(wide)
    out = products.new_zeros(self.shape[0], other.shape[1])
    if reduce in ("sum", "mean"):
        out.index_add_(0, rows, products)
        if reduce == "mean":
            out = out / _counts(self, wide)
        return out.to(self.dtype), rows.new_empty(0)
    # Upstream compares what it rounded to the result's dtype.
    products = products.to(self.dtype)
    out = out.to(self.dtype).index_reduce_(0, rows, products, reduce, include_self=False)
    best = out.index_select(0, rows)
    entries = torch.arange(nnz, dtype=rows.dtype, device=rows.device)[:, None]
    entries = torch.where((products == best) | products.isnan(), entries, nnz)
    return out, torch.full_like(out, nnz, dtype=rows.dtype).index_reduce_(0, rows, entries, "amin")


@compressed_composite("_sparse_mm_reduce_impl_backward")
def mm_reduce_backward(
    self: Any, grad_out: Any, weight: Any, reduce: str, arg_out: Any, output_mask: Sequence[bool]
) -> tuple[Any, Any]:
    """Gradients for self, a CSR matrix of its entries, and for the dense factor, here `weight`."""
    rows, columns = _rows(self)
    wide, nnz = _wide(self.dtype), rows.shape[0]
    grad = grad_out.to(wide)
    if reduce == "mean":
        grad = grad / _counts(self, wide)
    grad = grad.index_select(0, rows)  # [nnz, n], what each product gets
    if reduce in ("amax", "amin"):
        entries = torch.arange(nnz, dtype=arg_out.dtype, device=rows.device)[:, None]
        grad = torch.where(arg_out.index_select(0, rows) == entries, grad, 0)
    to_self = to_weight = None
    if output_mask[0]:
        values = (grad * weight.index_select(0, columns).to(wide)).sum(1).to(self.dtype)
        to_self = torch.sparse_csr_tensor(
            self.crow_indices().clone(), self.col_indices().clone(), values, self.shape, check_invariants=False
        )
    if output_mask[1]:
        to_weight = grad.new_zeros(weight.shape)
        to_weight = to_weight.index_add_(0, columns, grad * self.values().to(wide)[:, None]).to(weight.dtype)
    return to_self, to_weight
