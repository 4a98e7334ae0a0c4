"""Triton templates: contractions of the schedule class `block` (CUDA and HIP devices)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from .. import ir
from ..ir import Node
from ..kernel import DTYPES, Kernel, Target, Unsupported
from ..triton import HEADER, IMPORTS, TRITON, TYPES, TritonEmitter
from ..vector.gemm import Epilogue, combine, is_constant, number

# Storage dtypes as Triton writes them.
STORAGE = {
    **TYPES, "f16": "tl.float16", "bf16": "tl.bfloat16", "i8": "tl.int8", "i16": "tl.int16", "u8": "tl.uint8",
    "u16": "tl.uint16", "bool": "tl.uint8",
}  # fmt: skip


def cdiv(a: Any, b: Any) -> Any:
    """Ceiling of a / b, for int and Sym."""
    return (a + (b - 1)) // b


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def template(
    name: str, buffers: Sequence[tuple[str, str]], scalars: Sequence[tuple[str, str]], body: str, warps: int, stages: int = 3,
    module: str = "",
) -> Kernel:  # fmt: skip
    """A kernel from the text of its body. buffers: (name, dtype) each; scalars: (name, type) each; 64-bit ones travel first."""
    scalars = [s for s in scalars if s[1] in ("i64", "f64")] + [s for s in scalars if s[1] not in ("i64", "f64")]
    names = ", ".join([*(n for n, _ in buffers), *(n for n, _ in scalars)])
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return Kernel(
        name=name, source=HEADER.format(warps=warps, stages=stages) + IMPORTS + module + f"\n\n@triton.jit\ndef main_({names}):\n{body}\n",
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


class EpilogueText:
    """Epilogue as Triton text: what turns the tile `acc` of rows ra and columns rb of batch z into the result."""

    def __init__(self, target: Target, epilogue: Epilogue, compute: str) -> None:
        self.epilogue, self.compute = epilogue, compute
        self.factor = compute if compute in ("f64", "i64", "i32") else "f32"
        self.emitter = TritonEmitter(TRITON, target)

    @property
    def buffers(self) -> list[tuple[str, str]]:
        return [(name, dtype) for name, dtype, _ in self.epilogue.buffers]

    @property
    def scalars(self) -> list[tuple[str, str]]:
        return [*self.epilogue.strides, *self.epilogue.factors(self.compute)]

    def text(self, rows: str = "ra", columns: str = "rb", inside: str = "inside") -> str:
        """Lines. rows, columns: int64 vectors of indices; inside: the mask of the tile."""
        lines, i = [], 0
        for step in self.epilogue.steps:
            if step == "alpha":
                lines.append("acc = acc * alpha")
            elif isinstance(step, str) and is_constant(step):
                lines.append(f"acc = {combine(step, 'acc', repr(number(step)))}")
            elif isinstance(step, str):
                dtype = self.compute
                if dtype not in ("f32", "f64"):
                    raise Unsupported(f"{step} of {dtype}")
                x = Node("tmp", dtype, attr="x0")
                name = self.emitter.define(f"{step}_{dtype}", [x], [ACTIVATIONS[step](x)])
                lines.append(f"acc = {name}(acc)")
            else:
                kind, dtype, shape = step
                e = f"e{i}"
                at = {
                    "n": f"{columns}[None, :]",
                    "m": f"{rows}[:, None] * {e}m",
                    "mn": f"{rows}[:, None] * {e}m + {columns}[None, :]",
                    "s": f"{rows}[:, None] * {e}m + {columns}[None, :] * {e}n",
                }[shape]
                value = f"tl.load({e} + z * {e}b + {at}, mask={inside}, other=0).to({TYPES[self.compute]})"
                if DTYPES[dtype].kind == "bool":
                    raise Unsupported("an epilogue with a bool operand")
                if kind == "beta":
                    lines.append("if beta != 0:")
                    lines.append(f"    acc += beta * {value}")
                else:
                    lines.append(f"acc = {combine(kind, 'acc', value, 'tl.rsqrt')}")
                i += 1
        return "\n".join(lines)

    @property
    def module(self) -> str:
        texts = sorted(self.emitter.module.values(), key=lambda t: not t.startswith("from "))
        return "\n\n".join(texts)
