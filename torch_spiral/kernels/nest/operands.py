"""What nests are made of: operands, grids, and what every kernel of them declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import ir
from ..builder import KernelBuilder, fourfold
from ..ir import Node
from ..kernel import DTYPES, Target

SIMT_ELEMENTS = 4  # that an invocation of a GPU handles, a workgroup apart: so many loads are in flight
SIMT_KEPT = 16  # elements of a row that an invocation of a GPU keeps in registers, where several loops read them
SIMT_WORKGROUP = 256  # invocations; 64 on software rasterisers would do as well
BLOCK_LANES = 1024  # of a Triton kernel: 16 bytes a thread and access for most dtypes
TASK_ELEMENTS = 16384  # what one workgroup of a CPU device handles at least
TILE_ROWS = 64


def cdiv(a: Any, b: Any) -> Any:
    return (a + (b - 1)) // b


def minimum(a: Any, b: Any) -> Any:
    """Of ints or Syms."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    from ... import lowering

    return lowering.minimum(a, b)


def maximum(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    from ... import lowering

    return lowering.maximum(a, b)


def product(xs: Sequence[Any]) -> Any:
    r: Any = 1
    for x in xs:
        r = x if isinstance(r, int) and r == 1 else r * x
    return r


def fold_groups(target: Target, n: Any) -> tuple[Any, Any, Any]:
    """A grid of at least n workgroups; kernels use the flattened index and skip what is beyond."""
    limit = target.max_workgroups
    if limit >= 1 << 31:
        return (n, 1, 1)
    return (minimum(n, limit), cdiv(n, limit), 1)


@dataclass(frozen=True)
class Operand:
    """A tensor in a nest. strides: "dense" (the element's index is its place in the iteration order), or per dimension
    "0", "1" or "s" (a stride given at launch, in elements, may be negative)."""

    name: str
    dtype: str
    strides: str | tuple[str, ...] = "dense"
    windows: int = 1  # bindings it takes (Tensor.windows)

    @property
    def key(self) -> str:
        s = "d" if self.strides == "dense" else "".join(self.strides)
        return f"{self.dtype}{s}" + (f"w{self.windows}" if self.windows > 1 else "")


def stride_classes(strides: Sequence[Any]) -> tuple[str, ...]:
    """Classes of integer strides."""
    return tuple("0" if s == 0 else "1" if s == 1 else "s" for s in strides)


def lanes_for(dtypes: Sequence[str]) -> int:
    widest = max((DTYPES[d].size for d in dtypes), default=4)
    return 8 if widest >= 8 else 16


def unravel(k: KernelBuilder, sizes: Sequence[Node], flat: Node) -> list[Node]:
    """The coordinates of a flattened index over dimensions of these sizes, the fastest first, in the index's dtype."""
    at = []
    for size in sizes[:-1]:
        rest = k.let(ir.idiv(flat, size))
        at.append(k.let(flat - rest * size))
        flat = rest
    return [*at, flat] if sizes else []


def accessed_by_four(o: Operand) -> bool:
    """Whether four neighbours in dimension 0 are one load on GPUs."""
    return (o.strides == "dense" or o.strides[0] == "1") and fourfold(o.dtype, windows=o.windows)


class Declarations:
    """What pointwise and row kernels declare alike: operands and further buffers, sizes, and strides that are neither 0
    nor 1."""

    fours: frozenset[str] = frozenset()  # operands that are accessed four elements at a time, where they are aligned

    def declare(
        self, k: KernelBuilder, outs: Sequence[Operand], ins: Sequence[Operand], buffers: Sequence[tuple], ndim: int
    ) -> None:
        self.k, self.ndim = k, ndim
        operands = [*outs, *ins]
        self.bufs = {}
        for i, o in enumerate(operands):
            more = {"four": True} if o.name in self.fours else {}
            self.bufs[o.name] = k.buffer(o.name, o.dtype, "w" if i < len(outs) else "r", o.windows, **more)
        self.extra = tuple(k.buffer(*b) for b in buffers)
        self.sizes = [k.scalar(f"size{d}", "u32") for d in range(ndim)]
        self.strides: dict[tuple[str, int], Node] = {}
        for o in operands:
            for d, c in enumerate(o.strides if o.strides != "dense" else ()):
                if c == "s":
                    self.strides[o.name, d] = k.scalar(f"{o.name}_stride{d}", "i32")


def operands_key(operands: Sequence[Operand], scalars: Sequence[str], buffers: Sequence[tuple]) -> str:
    """The part of a kernel's name that says what it takes."""
    return "_".join([*(o.key for o in operands), *scalars, *("".join(map(str, b[1:])) for b in buffers)])
