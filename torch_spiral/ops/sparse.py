"""Sparse COO tensors: what ATen's shared natives (csrc/aten/generate.py) leave to a backend, in dense ops on indices and values.

Sparse gradients of embeddings and their optimizers are what this is for; products with sparse matrices work, and are not tuned.
"""

from __future__ import annotations

from typing import Any

import torch

from ..lowering import composite, sparse_composite


@composite("_nested_tensor_from_mask_left_aligned")
def nested_tensor_from_mask_left_aligned(t: Any, mask: Any) -> bool:
    """Whether a padded batch may become a nested tensor: spiral has none, so encoders keep the padding."""
    return False


def _places(indices: Any, shape: Any) -> Any:
    """[nnz]: where the entries with indices [dims, nnz] lie in a tensor of the sizes `shape`, flattened."""
    places = torch.zeros(indices.shape[1], dtype=torch.int64, device=indices.device)
    for row, size in zip(indices, shape, strict=True):
        places = places * size + row
    return places


def _sparse(indices: Any, values: Any, shape: Any, coalesced: bool) -> Any:
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)._coalesced_(coalesced)


@sparse_composite("_coalesce")
def coalesce(self: Any) -> Any:
    """Sorted by index, values of equal indices added. Waits for the number of different ones."""
    indices, values = self._indices(), self._values()
    if values.shape[0] < 2:
        return self.clone()._coalesced_(True)
    sizes = self.shape[: self.sparse_dim()]
    places, group = torch.unique(_places(indices, sizes), return_inverse=True)
    rows = []
    for size in reversed(sizes):
        rows.append(places % size)
        places = places // size
    if values.dtype == torch.bool:  # any of them
        total = values.new_zeros((rows[0].shape[0] if rows else 1, *values.shape[1:]), dtype=torch.uint8)
        total = total.index_add_(0, group, values.to(torch.uint8)).to(torch.bool)
    else:
        total = values.new_zeros((rows[0].shape[0] if rows else 1, *values.shape[1:])).index_add_(0, group, values)
    kept = torch.stack(rows[::-1]) if rows else indices[:, :1]
    return _sparse(kept, total, self.shape, True)


def _into(out: Any, result: Any) -> Any:
    """result in the sparse tensor of an out= or in-place overload."""
    out.sparse_resize_and_clear_(result.shape, result.sparse_dim(), result.dense_dim())
    return out.copy_(result)


@sparse_composite("add.out")
def add_out(self: Any, other: Any, *, alpha: Any = 1, out: Any) -> Any:
    """sparse + alpha * sparse, or dense + alpha * sparse, which adds at the entries alone."""
    if not other.is_sparse:
        raise RuntimeError("add(sparse, dense) is not supported. Use add(dense, sparse) instead.")
    if self.shape != other.shape:
        raise RuntimeError(
            f"add: expected sizes of 'self' and 'other' to match, but {list(self.shape)} != {list(other.shape)}"
        )
    if not self.is_sparse:
        if out is not self:
            out.resize_(self.shape).copy_(self)
        indices, values = other._indices(), other._values().to(out.dtype)
        if alpha != 1:
            values = values * alpha
        if values.numel():
            if indices.shape[0]:
                out.index_put_(tuple(indices), values, accumulate=True)
            else:
                out.add_(values.sum(0))
        return out
    dtype = torch.result_type(self, other)
    values = torch.cat([self._values().to(dtype), other._values().to(dtype) * alpha])
    return _into(out, _sparse(torch.cat([self._indices(), other._indices()], 1), values, self.shape, False))


@sparse_composite("mul.out")
def mul_out(self: Any, other: Any, *, out: Any) -> Any:
    """The products at the entries of the sparse operand; of two, where both have some."""
    if not self.is_sparse:
        self, other = other, self
    if isinstance(other, torch.Tensor) and (
        other.is_sparse or other.dim()
    ):  # else a number, a tensor when it comes from ATen
        self = self.coalesce()
        other = (other.to_dense() if other.is_sparse else other).expand(self.shape)[tuple(self._indices())]
    return _into(out, _sparse(self._indices(), self._values() * other, self.shape, self.is_coalesced()))


def _product(self: Any, mat1: Any, mat2: Any, beta: Any, alpha: Any) -> Any:
    """beta * self + alpha * mat1 @ mat2 of a sparse mat1 [m, k] and a dense mat2 [k, n]."""
    if mat1.dim() != 2 or mat2.dim() != 2 or mat1.shape[1] != mat2.shape[0]:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({list(mat1.shape)} and {list(mat2.shape)})")
    rows, columns = mat1._indices()
    out = (self * beta).expand(mat1.shape[0], mat2.shape[1]).contiguous()
    return out.index_add_(0, rows, mat2.index_select(0, columns) * mat1._values()[:, None], alpha=alpha)


@sparse_composite("addmm")
def addmm(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _product(self, mat1, mat2, beta, alpha)


@sparse_composite("addmm.out")
def addmm_out(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any) -> Any:
    result = _product(self, mat1, mat2, beta, alpha)
    return out.resize_(result.shape).copy_(result)


@sparse_composite("index_select")
def index_select(self: Any, dim: int, index: Any) -> Any:
    """The entries whose index along dim is among `index`."""
    dim = dim % self.dim()
    self = self.coalesce()
    indices, values = self._indices(), self._values()
    shape = [index.shape[0] if d == dim else n for d, n in enumerate(self.shape)]
    if dim >= self.sparse_dim():
        return _sparse(indices, values.index_select(dim - self.sparse_dim() + 1, index), shape, True)
    at, entry = torch.nonzero(index[:, None] == indices[dim][None], as_tuple=True)
    picked = indices.index_select(1, entry)
    picked[dim] = at
    return _sparse(picked, values.index_select(0, entry), shape, False)
