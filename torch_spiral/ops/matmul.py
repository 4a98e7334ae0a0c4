"""Matrix products: mm, addmm, bmm, baddbmm, addmv, dot, vdot."""

from __future__ import annotations

from typing import Any

from ..lowering import Tensor, check, empty, eq, internal, lowering, structured
from .contraction import matrix, product, weight


@structured("mm")
def mm(self: Tensor, mat2: Tensor, out: Tensor) -> None:
    """[M, K] @ [K, N]."""
    product(matrix(self, 0, 1), matrix(mat2, 0, 1), matrix(out, 0, 1))


@structured("bmm")
def bmm(self: Tensor, mat2: Tensor, out: Tensor) -> None:
    """[B, M, K] @ [B, K, N]."""
    product(self, mat2, out)


@structured("addmm")
def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, beta: Any, alpha: Any, out: Tensor) -> None:
    """beta * self + alpha * mat1 @ mat2."""
    product(matrix(mat1, 0, 1), matrix(mat2, 0, 1), matrix(out, 0, 1), alpha, (beta, self))


def autocast_product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x [M, K] @ w [K, N] + bias (broadcast to the result) for csrc/aten/amp.cpp, which leaves w and bias in float32."""
    terms = [] if bias is None else [("add", bias)]
    product(matrix(x, 0, 1), weight(matrix(w, 0, 1), x.dtype), matrix(out, 0, 1), terms=terms)


internal("autocast_product", autocast_product)


@structured("_addmm_activation")
def addmm_activation(
    self: Tensor, mat1: Tensor, mat2: Tensor, beta: Any, alpha: Any, use_gelu: bool, out: Tensor
) -> None:
    """relu (or gelu, tanh form) of addmm."""
    activation = "gelu_tanh" if use_gelu else "relu"
    product(matrix(mat1, 0, 1), matrix(mat2, 0, 1), matrix(out, 0, 1), alpha, (beta, self), activation=activation)


@structured("baddbmm")
def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, beta: Any, alpha: Any, out: Tensor) -> None:
    """beta * self + alpha * batch1 @ batch2."""
    product(batch1, batch2, out, alpha, (beta, self))


@structured("addmv")
def addmv(self: Tensor, mat: Tensor, vec: Tensor, beta: Any, alpha: Any, out: Tensor) -> None:
    """beta * self + alpha * mat @ vec."""
    column = vec.view((1, vec.sizes[0], 1), (0, vec.strides[0], 0))
    result = out.view((1, out.sizes[0], 1), (0, out.strides[0], 0))
    bias = self.view((1, self.sizes[0], 1), (0, self.strides[0], 0)) if self.ndim else self.view((1, 1, 1), (0, 0, 0))
    product(matrix(mat, 0, 1), column, result, alpha, (beta, bias))


def _dot(self: Tensor, other: Tensor) -> Tensor:
    check(
        eq(self.sizes[0], other.sizes[0]), "RuntimeError",
        "inconsistent tensor size, expected tensor [{}] and src [{}] to have the same number of elements, but got {} and {} elements respectively",
        self.sizes[0], other.sizes[0], self.sizes[0], other.sizes[0],
    )  # fmt: skip
    out = empty((), self.dtype)
    row = self.view((1, 1, self.sizes[0]), (0, 0, self.strides[0]))
    product(row, other.view((1, other.sizes[0], 1), (0, other.strides[0], 0)), out.view((1, 1, 1), (0, 0, 0)))
    return out


def _check_vectors(name: str, self: Tensor, other: Tensor) -> None:
    check(
        self.ndim == 1 and other.ndim == 1,
        "RuntimeError",
        f"1D tensors expected, but got {self.ndim}D and {other.ndim}D tensors",
    )
    check(
        self.dtype == other.dtype,
        "RuntimeError",
        f"{name} : expected both vectors to have same dtype, but found {self.dtype} and {other.dtype}",
    )


@lowering("dot")
def dot(self: Tensor, other: Tensor) -> Tensor:
    """Sum of products of two vectors."""
    _check_vectors("dot", self, other)
    return _dot(self, other)


@lowering("vdot")
def vdot(self: Tensor, other: Tensor) -> Tensor:
    """dot with the first vector conjugated."""
    _check_vectors("vdot", self, other)
    if self.dtype in ("c64", "c128"):
        self = Tensor(
            self.number,
            self.dtype,
            self.sizes,
            self.strides,
            self.offset,
            self.written,
            self.flags ^ 1 << 25,
            self.windows,
        )
    return _dot(self, other)
