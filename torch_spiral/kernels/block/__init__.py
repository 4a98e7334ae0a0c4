"""Triton templates: contractions of the schedule class `block` (CUDA and HIP devices)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from .. import ir
from ..ir import Node
from ..kernel import DTYPES, Kernel, Target, Unsupported
from ..triton import HEADER, TRITON, TYPES, TritonEmitter, opening
from ..vector.gemm import Epilogue, combine, is_constant, number

# Storage dtypes as Triton writes them.
STORAGE = {
    **TYPES, "f16": "tl.float16", "bf16": "tl.bfloat16", "i8": "tl.int8", "i16": "tl.int16", "u8": "tl.uint8",
    "u16": "tl.uint16", "bool": "tl.uint8",
}  # fmt: skip


# The masks that EpilogueText takes, of the rows ra and columns rb of a matrix [m, n].
INSIDE = ["rows = ra[:, None] < m", "columns = rb[None, :] < n", "inside = rows & columns"]


def cdiv(a: Any, b: Any) -> Any:
    """Ceiling of a / b, for int and Sym."""
    return (a + (b - 1)) // b


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def template(
    target: Target, name: str, buffers: Sequence[tuple[str, str]], scalars: Sequence[tuple[str, str]], body: str, warps: int,
    stages: int = 3, module: str = "", ahead: Sequence[str] = (), registers: int = 0,
) -> Kernel:  # fmt: skip
    """A kernel from the text of its body. buffers: (name, dtype) each; scalars: (name, type) each; 64-bit ones travel first. module,
    ahead: as for triton.opening(). registers: of an invocation at most (CUDA only; 0: any)."""
    scalars = [s for s in scalars if s[1] in ("i64", "f64")] + [s for s in scalars if s[1] not in ("i64", "f64")]
    names = [*(n for n, _ in buffers), *(n for n, _ in scalars)]
    limit = f", registers: {registers}" if registers else ""
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return Kernel(
        name=name,
        source=f"{HEADER.format(warps=warps, stages=stages, limit=limit)}{opening(target, module, 'main_', names, ahead)}{body}\n",
        entry="main_", language="triton", windows=(1,) * len(buffers), scalars=tuple(t for _, t in scalars),
        workgroup=(32 * warps, 1, 1), trusted=True, dtypes=tuple(d for _, d in buffers),
    )  # fmt: skip


def ordered(named: Sequence[tuple[str, Any]]) -> list[Any]:
    """Values of (type, value) pairs in launch order."""
    return [v for t, v in named if t in ("i64", "f64")] + [v for t, v in named if t not in ("i64", "f64")]


def _relu(x: Node) -> Node:
    return ir.maximum(x, 0.0)


def _hardsigmoid(x: Node) -> Node:
    return ir.clamp(x * (1.0 / 6.0) + 0.5, 0.0, 1.0)


ACTIVATIONS: dict[str, Callable[[Node], Any]] = {
    "relu": _relu,
    "relu6": lambda x: ir.clamp(x, 0.0, 6.0),
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda x: x * _hardsigmoid(x),
    "sigmoid": lambda x: ir.sigmoid(x),
    "silu": lambda x: x * ir.sigmoid(x),
    "tanh": lambda x: ir.tanh(x),
    "gelu": lambda x: 0.5 * x * (1.0 + ir.erf(x * 0.7071067811865476)),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + ir.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
}


# In few instructions and without branches: an epilogue's arithmetic is in the way of the tensor cores. 2 ulp and |x| * 2**-24 from exact.
FAST = {
    "relu": "tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "sigmoid": "1.0 / (1.0 + tl.exp(-acc))",
    "silu": "acc / (1.0 + tl.exp(-acc))",
    "gelu_tanh": "acc / (1.0 + tl.exp(acc * (-1.5957691216057308 - 0.07135481282553484 * acc * acc)))",
}
# For results of 16 bits: erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
FAST_GELU = """u = tl.abs(acc) * 0.7071067811865476
v = 1.0 / (1.0 + 0.3275911 * u)
v = v * (0.254829592 + v * (-0.284496736 + v * (1.421413741 + v * (-1.453152027 + v * 1.061405429))))
v = 1.0 - v * tl.exp(-u * u)
acc = 0.5 * acc * (1.0 + tl.where(acc < 0, -v, v))"""


class EpilogueText:
    """Epilogue as Triton text: what turns the tile `acc` of rows ra and columns rb of batch z into the result."""

    def __init__(self, target: Target, epilogue: Epilogue, compute: str, result: str, early: bool = False) -> None:
        """result: the dtype in which the tile is stored. early: text() leaves the loads of operands in `loads`, for a place ahead of the
        product: then they do not wait for it, but take registers."""
        self.epilogue, self.compute, self.result = epilogue, compute, result
        self.early, self.loads = early, list[str]()
        self.emitter = TritonEmitter(TRITON, target)

    @property
    def buffers(self) -> list[tuple[str, str]]:
        return [(name, dtype) for name, dtype, _ in self.epilogue.buffers]

    @property
    def scalars(self) -> list[tuple[str, str]]:
        return [*self.epilogue.strides, *self.epilogue.factors(self.compute)]

    def text(self, rows: str = "rows", columns: str = "columns", inside: str = "inside") -> str:
        """Lines. rows [M, 1], columns [1, N], inside [M, N]: masks of what the matrix has of the tile; ra, rb: indices, int64."""
        lines, i = [], 0
        masks = {"n": columns, "m": rows}
        folded, _ = self.epilogue.folded
        if folded:
            lines += ["scale = 1.0", "shift = 0.0"]
        for number_of_step, step in enumerate(self.epilogue.steps):
            if isinstance(step, str):
                kind, value = step, repr(number(step)) if is_constant(step) else ""
            else:
                kind, dtype, shape = step
                value = self._operand(f"e{i}", kind, dtype, shape, masks.get(shape, inside))
                if self.early:
                    self.loads.append(f"e{i}_value = {value}")
                    value = f"e{i}_value"
                i += 1
            if number_of_step < folded:  # by vectors: no element repeats the square root
                if kind.startswith(("rsqrt", "mul")):
                    lines.append(f"factor = {combine(kind, '1.0', value, 'tl.rsqrt')}")
                    lines += ["scale = scale * factor", "shift = shift * factor"]
                else:
                    lines.append(f"shift = {combine(kind, 'shift', value)}")
                if number_of_step == folded - 1:
                    lines.append("acc = acc * scale + shift")
            elif kind in ("alpha", "beta"):
                lines.append("acc = acc * alpha" if kind == "alpha" else f"acc += beta * {value}")
            elif value:
                lines.append(f"acc = {combine(kind, 'acc', value, 'tl.rsqrt')}")
            else:
                lines.append(self._activation(kind))
        return "\n".join(lines)

    def _operand(self, e: str, kind: str, dtype: str, shape: str, mask: str) -> str:
        """The operand's part of the tile: a vector where it is one, so that no element of the tile loads it again."""
        if DTYPES[dtype].kind == "bool":
            raise Unsupported("an epilogue with a bool operand")
        at = {
            "n": "rb[None, :]",
            "m": f"ra[:, None] * {e}m",
            "mn": f"ra[:, None] * {e}m + rb[None, :]",
            "s": f"ra[:, None] * {e}m + rb[None, :] * {e}n",
        }[shape]
        if kind == "beta":
            mask = f"{mask} & (beta != 0)"
        return f"tl.load({e} + z * {e}b + {at}, mask={mask}, other=0).to({TYPES[self.compute]})"

    def _activation(self, kind: str) -> str:
        """acc becomes its activation."""
        if self.compute not in ("f32", "f64"):
            raise Unsupported(f"{kind} of {self.compute}")
        if self.compute == "f32" and kind in FAST:
            return f"acc = {FAST[kind]}"
        if kind == "gelu" and self.result in ("f16", "bf16"):
            return FAST_GELU
        x = Node("tmp", self.compute, attr="x0")
        return f"acc = {self.emitter.define(f'epilogue_{kind}_{self.compute}', [x], [ACTIVATIONS[kind](x)])}(acc)"

    @property
    def module(self) -> str:
        texts = sorted(self.emitter.module.values(), key=lambda t: not t.startswith("from "))
        return "\n\n".join(texts)
