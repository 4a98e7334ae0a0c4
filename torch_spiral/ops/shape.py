"""Ops that move elements: flip, roll, repeat_interleave, unfold's gradient, shuffles and copies of views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import ir
from ..kernels.kernel import compute_dtype
from ..lowering import Iter, Tensor, composite, empty, lowering, stub
from .common import contiguous, copy_to
from .elementwise import pointwise
from .index import narrow
from .items import Item, each


@stub("flip_stub")
def flip(it: Iter, quantized: Any) -> None:
    """A copy; ATen made the strides of the flipped dimensions negative."""
    pointwise("copy", Iter(it.shape, it.outputs, it.inputs[:1], it.common), lambda x: x, "copy", ())


def _roll(x: Tensor, shift: Any, dim: int, out: Tensor) -> None:
    """out = x moved by `shift` places along dim: the end of x, then its start."""
    n = x.sizes[dim]
    if x.is_empty:
        return
    shift = shift % n

    copy_to(narrow(out, dim, 0, shift), narrow(x, dim, n - shift, shift))
    copy_to(narrow(out, dim, shift, n - shift), narrow(x, dim, 0, n - shift))


@lowering("roll", slots=("shifts",))
def roll(self: Tensor, shifts: Sequence[Any], dims: Sequence[int]) -> Tensor:
    """Elements moved along dims, those that leave at one end come in at the other; in C order where no dims are given."""
    if not len(shifts):
        raise RuntimeError("`shifts` required")
    if not dims:
        if len(shifts) != 1:
            raise RuntimeError(f"shifts and dimensions must align. shifts: {len(shifts)}, dims:{len(dims)}")
        out = empty(self.sizes, self.dtype)
        flat = contiguous(self).view((self.numel,))
        _roll(flat, shifts[0], 0, out.view((self.numel,)))
        return out
    if len(dims) != len(shifts):
        raise RuntimeError(f"shifts and dimensions must align. shifts: {len(shifts)}, dims:{len(dims)}")
    if len(dims) == 1 and self.is_empty:
        return empty(self.sizes, self.dtype)
    for shift, dim in zip(shifts, dims, strict=True):
        if not self.ndim:
            raise IndexError(f"Dimension specified as {dim} but tensor has no dimensions")
        if not -self.ndim <= dim < self.ndim:
            low, high = -self.ndim, self.ndim - 1
            raise IndexError(f"Dimension out of range (expected to be in range of [{low}, {high}], but got {dim})")
        out = empty(self.sizes, self.dtype)
        _roll(self, shift, dim % self.ndim, out)
        self = out
    return self


@composite("repeat_interleave.Tensor")
def repeat_interleave(repeats: Any, *, output_size: int | None = None) -> Any:
    """[0] * repeats[0] + [1] * repeats[1] + ...; waits for the sum of repeats where output_size is None."""
    if repeats.dim() != 1:
        raise RuntimeError("repeat_interleave only accept 1D vector as repeat")
    if repeats.dtype not in (torch.int64, torch.int32):
        raise RuntimeError("repeats has to be Long or Int tensor")
    if repeats.numel() == 0:
        return torch.empty_like(repeats)
    ends = repeats.cumsum(0, dtype=torch.int64)
    if output_size is None:
        lowest, output_size = torch.stack([repeats.min().long(), ends[-1]]).tolist()
        if lowest < 0:
            raise RuntimeError("repeats can not be negative")
    places = torch.arange(output_size, device=repeats.device)
    return torch.searchsorted(ends, places, right=True).to(repeats.dtype)


def _unfold_backward(it: Item) -> None:
    """Adds up the windows that cover an element of the input, from the first one on."""
    dim, dtype = it.static
    k = it.k
    size, step, windows = it["size"], it["step"], it["windows"]
    i = it.at[dim]
    first = k.let(ir.where(i < size, ir.const(0, "i32"), ir.idiv(i - size, step) + 1))
    last = k.let(ir.minimum(ir.idiv(i, step), windows - 1))
    total = k.var(dtype if dtype.startswith("c") else compute_dtype(dtype), 0)
    with k.For(first, last + 1) as w, k.If(i - w * step < size):
        total.set(total + it.load("grad", (*it.at[:dim], w, *it.at[dim + 1 :], i - w * step)))
    it.store("out", total)


@stub("unfold_backward_stub")
def unfold_backward(grad: Tensor, dim: int, size: Any, step: Any, grad_in: Tensor) -> None:
    """grad: [..., windows at dim, ..., size]; grad_in: the shape of unfold's input."""
    dim = dim % max(grad_in.ndim, 1)
    each(
        "unfold_backward",
        _unfold_backward,
        grad_in.sizes,
        {"out": grad_in, "grad": grad},
        {"size": size, "step": step, "windows": grad.sizes[dim]},
        static=(dim, grad.dtype),
    )


@composite("narrow_copy.out")
def narrow_copy_out(self: Any, dim: int, start: int, length: int, *, out: Any) -> Any:
    if self.dtype != out.dtype:
        raise RuntimeError("Expected self.dtype() == output.dtype() to be true, but got false.")
    part = self.narrow(dim, start, length)
    if out.shape != part.shape:
        out.resize_(part.shape)
    return out.copy_(part)


@composite("native_channel_shuffle")
def native_channel_shuffle(self: Any, groups: int) -> Any:
    """[batch, channels, ...] with the channels of `groups` groups interleaved."""
    batch, channels, *rest = self.shape
    return self.reshape(batch, groups, channels // groups, *rest).transpose(1, 2).reshape(self.shape).contiguous()


# ---- jagged tensors ------------------------------------------------------------------------------------------------


def _one_level(name: str, offsets: Sequence[Any]) -> Any:
    if len(offsets) != 1:
        raise RuntimeError(f"{name}(): only a single jagged dim is supported")
    return offsets[0]


@composite("_jagged_to_padded_dense_forward")
def jagged_to_padded(
    values: Any, offsets: Sequence[Any], max_lengths: Sequence[int], padding_value: float = 0.0
) -> Any:
    """values [rows, ...] of sequences that start at offsets [sequences + 1] as [sequences, max_lengths[0], ...]; longer ones are cut."""
    starts = _one_level("_jagged_to_padded_dense_forward", offsets)
    length = max_lengths[0]
    place = torch.arange(length, device=values.device)
    inside = place < starts.diff()[:, None]
    shape = (inside.shape[0], length, *values.shape[1:])
    if values.shape[0] == 0:
        return torch.full(shape, padding_value, dtype=values.dtype, device=values.device)
    rows = torch.where(inside, starts[:-1, None] + place, 0)
    out = values.index_select(0, rows.flatten()).view(shape)
    return out.masked_fill_(~inside.view(*inside.shape, *(1 for _ in values.shape[1:])), padding_value)


@composite("_padded_dense_to_jagged_forward")
def padded_to_jagged(dense: Any, offsets: Sequence[Any], total_L: int | None = None) -> Any:
    """The other way; rows that were cut are zero. total_L, the number of rows, is read from the device where it is not given."""
    starts = _one_level("_padded_dense_to_jagged_forward", offsets)
    total = int(starts[-1].item()) if total_L is None else total_L
    length = dense.shape[1]
    row = torch.arange(total, device=dense.device)
    sequence = torch.searchsorted(starts[1:].contiguous(), row.to(starts.dtype), right=True)
    place = row - starts.index_select(0, sequence)
    inside = place < length
    if dense.numel() == 0:
        return dense.new_zeros((total, *dense.shape[2:]))
    picked = dense.flatten(0, 1).index_select(0, torch.where(inside, sequence * length + place, 0))
    return picked.masked_fill_(~inside.view(total, *(1 for _ in dense.shape[2:])), 0)
