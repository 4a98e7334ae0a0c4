"""Which pointwise kernels before a matrix product or attention only prepare one of its operands, so that it can read what they read.

A cast that loses nothing becomes the operand's own dtype; factors that are constant along the reduction become factors of the result;
attention reads what a copy would have put in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels import ir
from ..kernels.ir import Node
from .epilogue import terms
from .loops import Program, Store

# (read, stored): every number of the first is one of the second.
EXACT = {("f16", "f32"), ("bf16", "f32"), ("i8", "f32"), ("i8", "f16"), ("i8", "bf16")}
# What autocast does to weights, which products do themselves (contraction.weight), and to biases, which they read unrounded.
WEIGHTS = {("f32", "f16"), ("f32", "bf16")}


@dataclass(frozen=True)
class Factor:
    """A tensor that multiplies the operand: a buffer of the fused kernel, with a stride for each coordinate of the kernel."""

    buffer: int
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Prologue:
    """What a fused kernel stores: elements of the buffer `source` at the index of the store, times factors and a constant; or a copy of elements
    `moved` from elsewhere. sizes and strides: of the kernel's coordinates and of the store's index in them; None where the index is not
    affine, and then there are no factors."""

    target: int
    source: int
    factors: tuple[Factor, ...]
    constant: float
    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None
    moved: Factor | None = None

    def along(self, shape: Sequence[int], strides: Sequence[int], factor: Factor) -> list[int] | None:
        """Strides of a factor along the dimensions of an operand that reads what is stored, with this shape and these strides, from the
        first element on."""
        assert self.strides is not None
        step = {t: f for s, t, f in zip(self.sizes, self.strides, factor.strides, strict=True) if s > 1}
        left = {t: s - 1 for s, t in zip(self.sizes, self.strides, strict=True) if s > 1}
        found = []
        for size, stride in zip(shape, strides, strict=True):
            # A dimension runs along one coordinate, of which several may take a share.
            inside = [t for t in left if t and stride % t == 0 and (size - 1) * (stride // t) <= left[t]]
            if size > 1 and not inside:
                return None
            t = max(inside, default=1)
            found.append(step[t] * (stride // t) if size > 1 else 0)
            if size > 1:
                left[t] -= (size - 1) * (stride // t)
        return found


def match(program: Program) -> list[Prologue]:
    """The prologues that a program's stores are; empty where one of them is something else."""
    if program.reduced or program.sites or program.scalars or not all(s.op == "const" for s in program.rows):
        return []
    found = [_match(program, store) for store in program.stores]
    return [p for p in found if p is not None] if None not in found else []


def _match(program: Program, store: Store) -> Prologue | None:
    if store.mode:
        return None
    names = [name for name, _, _ in program.buffers]
    dtypes = {name: dtype for name, dtype, _ in program.buffers}
    sources, factors, constant = [], [], 1.0
    for term in terms("mul", store.value):
        if term.op == "const":
            constant *= float(ir.const_value(term))
            continue
        load = term.args[0] if term.op == "cast" else term
        if load.op != "load" or len(load.args) != 1:
            return None
        pair = (dtypes[load.attr], dtypes[store.buffer])
        if load.args[0] is store.index and (pair in EXACT | WEIGHTS or pair[0] == pair[1]):
            sources.append(load)
        elif term is load and (load.dtype == "f32" or term is store.value):
            factors.append(load)
        else:
            return None
    if not math.isfinite(constant):  # of which sums of infinities that cancel would make something else
        return None
    place = _affine(store.index, len(program.rows))
    found = []
    for load in factors:
        index = _affine(load.args[0], len(program.rows))
        if index is None or place is None or place[1] != 0:
            return None
        found.append(Factor(names.index(load.attr), *index))
    moved = None
    if not sources and store.value in factors and dtypes[factors[0].attr] == dtypes[store.buffer]:
        sources, moved = factors, found.pop()
    if len(sources) != 1 or (
        moved is None and not found and constant == 1.0 and dtypes[sources[0].attr] == dtypes[store.buffer]
    ):
        return None
    return Prologue(
        names.index(store.buffer),
        names.index(sources[0].attr),
        tuple(found),
        constant,
        tuple(int(s.attr) for s in program.rows),
        None if place is None else place[0],
        moved,
    )


def _affine(n: Node, dims: int) -> tuple[tuple[int, ...], int] | None:
    """(strides along the coordinates, offset) of an index, where it is affine."""
    if n.op == "leaf":
        found = tuple(int(n.attr == f"x{d}") for d in range(dims))
        return (found, 0) if any(found) else None
    if n.op == "const":
        return (0,) * dims, int(ir.const_value(n))
    if n.op not in ("add", "sub", "mul"):
        return None
    a, b = (_affine(x, dims) for x in n.args)
    if a is None or b is None:
        return None
    if n.op == "mul":
        if any(a[0]) and any(b[0]):
            return None
        if any(a[0]):
            a, b = b, a
        return tuple(a[1] * s for s in b[0]), a[1] * b[1]
    sign = -1 if n.op == "sub" else 1
    return tuple(s + sign * t for s, t in zip(a[0], b[0], strict=True)), a[1] + sign * b[1]
