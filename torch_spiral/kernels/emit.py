"""What the emitters of the kernel languages share: declarations and the text around a kernel's body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kernel import DTYPES, SCALARS, Kernel, Target

if TYPE_CHECKING:
    from .ir import Node

MODES = ("r", "w", "rw", "a")


@dataclass(frozen=True)
class BufferDecl:
    """A buffer argument. mode: "r" read, "w" written, "rw" both, "a" updated by atomics (and read or written).

    vector: 4 makes a WGSL binding an array of four elements (f32: vec4<f32>, f16 and bf16: vec2<u32>)."""

    name: str
    dtype: str
    mode: str = "r"
    windows: int = 1
    vector: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.mode not in MODES:
            raise ValueError(f"buffer {self.name}: unknown dtype {self.dtype!r} or mode {self.mode!r}")


@dataclass(frozen=True)
class ScalarDecl:
    """A scalar argument of type i32, u32, f32, i64 or f64."""

    name: str
    type: str

    def __post_init__(self) -> None:
        if self.type not in SCALARS:
            raise ValueError(f"scalar {self.name}: type {self.type!r} is not one of {SCALARS}")


@dataclass(frozen=True)
class Options:
    """How a kernel's text is wrapped. restrict: no buffer overlaps another (OpenCL). trusted: indices are proven in
    range (WGSL drops checks). subgroups: the body uses subgroup_size and subgroup_id/subgroup_lane (WGSL)."""

    errors: bool = False
    restrict: bool = False
    trusted: bool = False
    subgroups: bool = False


class Language:
    """One kernel language: how types, constants, operations and memory are written. Statements are C-like in both."""

    name = ""
    loop = ""
    """The head of a loop that only `break` leaves."""

    def prefix(
        self,
        target: Target,
        kernel: Kernel,
        buffers: list[BufferDecl],
        scalars: list[ScalarDecl],
        options: Options,
        module: str,
    ) -> str:
        raise NotImplementedError

    def immediate(self, target: Target, params_size: int) -> bool:
        """Whether a parameter block of that size needs no upload."""
        return True

    def type(self, target: Target, dtype: str, lanes: int) -> str:
        raise NotImplementedError

    def const(self, target: Target, node: Node) -> str:
        raise NotImplementedError

    def splat(self, type_: str, text: str) -> str:
        raise NotImplementedError

    def let(self, type_: str, name: str, text: str) -> str:
        raise NotImplementedError

    def var(self, type_: str, name: str, text: str) -> str:
        raise NotImplementedError

    def function(self, name: str, result: str, params: list[tuple[str, str]], body: list[str]) -> str:
        raise NotImplementedError

    def operation(self, emitter: Emitter, node: Node, args: list[str]) -> str | None:
        """Text of an operation on atoms; None where it is to be lowered by functions.LOWER."""
        raise NotImplementedError

    def load(self, k: Emitter, b: BufferDecl, index: str, lanes: int) -> list[Node]:
        """The elements from index on as a node, or two for pairs."""
        raise NotImplementedError

    def gather(self, k: Emitter, b: BufferDecl, index: Node) -> list[Node]:
        """The elements at a vector of indices."""
        raise NotImplementedError

    def store(self, k: Emitter, b: BufferDecl, index: str, values: list[Node], lanes: int) -> None:
        raise NotImplementedError

    def scatter(self, k: Emitter, b: BufferDecl, index: Node, values: list[Node]) -> None:
        raise NotImplementedError

    def load4(self, k: Emitter, b: BufferDecl, index: str) -> list[Node]:
        """The four elements from index on, which misaligned() finds at 0, as four scalars."""
        raise NotImplementedError

    def store4(self, k: Emitter, b: BufferDecl, index: str, values: list[Node]) -> None:
        """Stores four compute-dtype values from index on, which misaligned() finds at 0."""
        raise NotImplementedError

    def misaligned(self, b: BufferDecl, index: str) -> str:
        """Text of the place of an element in its group of four, 0 to 3 (u32)."""
        raise NotImplementedError


class Emitter:
    """Turns expressions into statements, each value once per scope. A node of one lane that a wider one uses is
    splat."""

    def __init__(self, lang: Language, target: Target, module: dict[str, str] | None = None, prefix: str = "t") -> None:
        self.lang, self.target, self.prefix = lang, target, prefix
        self.module: dict[str, str] = {} if module is None else module  # functions at module scope, by name, in order
        self.lines: list[str] = []
        self.scopes: list[dict[Node, str]] = [{}]
        self.count = 0
        self.streaming = ""  # OpenCL: a variable that is 0 where vector stores bypass the cache (KernelBuilder.stream)

    def fresh(self, prefix: str = "") -> str:
        self.count += 1
        return f"{prefix or self.prefix}{self.count}"

    def line(self, text: str) -> None:
        self.lines.append("  " * len(self.scopes) + text)

    def open(self, text: str) -> None:
        self.line(text + " {")
        self.scopes.append({})

    def close(self) -> None:
        self.scopes.pop()
        self.line("}")

    def type(self, dtype: str, lanes: int = 1) -> str:
        return self.lang.type(self.target, dtype, lanes)

    def tmp(self, dtype: str, text: str, lanes: int = 1) -> Node:
        """A node for a value written as text, computed here and now."""
        from .ir import Node

        name = self.fresh()
        self.line(self.lang.let(self.type(dtype, lanes), name, text))
        return Node("tmp", dtype, attr=name, lanes=lanes)

    def value(self, node: Node, lanes: int = 0) -> str:
        """An atom (a name or constant) for the node's value, splat to `lanes`."""
        if node.op == "const":
            text = self.lang.const(self.target, node)
        elif node.op == "tmp":
            text = node.attr
        else:
            text = self._find(node) or self._emit(node)
        if lanes > 1 and node.lanes == 1:
            if node.dtype == "bool":
                text = f"-{text}"
            return self.lang.splat(self.type(node.dtype, lanes), text)
        return text

    def _find(self, node: Node) -> str | None:
        for scope in reversed(self.scopes):
            if node in scope:
                return scope[node]
        return None

    def _emit(self, node: Node) -> str:
        if node.op == "leaf":
            raise ValueError(f"leaf {node.attr} has no value here")
        pending = [a for a in node.args if a.op not in ("const", "tmp") and self._find(a) is None]
        if pending:  # deep expressions: not one Python frame per node
            stack = list(reversed(pending))
            while stack:
                top = stack[-1]
                if top.op in ("const", "tmp") or self._find(top) is not None:
                    stack.pop()
                    continue
                more = [a for a in top.args if a.op not in ("const", "tmp") and self._find(a) is None]
                if more:
                    stack.extend(reversed(more))
                else:
                    self._emit(top)
                    stack.pop()
        width = max([a.lanes for a in node.args], default=node.lanes)
        args = [self.value(a, width) for a in node.args]
        text = self.lang.operation(self, node, args)
        if text is None:
            text = f"{self.function(node, width)}({', '.join(args)})"
        name = self.fresh()
        self.line(self.lang.let(self.type(node.dtype, node.lanes), name, text))
        self.scopes[-1][node] = name
        return name

    def function(self, node: Node, lanes: int) -> str:
        """The name of a module function made from functions.LOWER for this operation."""
        from .functions import LOWER
        from .ir import Node

        if node.op not in LOWER:
            raise ValueError(f"no language rule and no lowering for {node.op} of {node.args}")
        name = f"{node.op}_{node.args[0].dtype}" + (f"x{lanes}" if lanes > 1 else "")
        if name not in self.module:
            inner = Emitter(self.lang, self.target, self.module)
            params = [Node("tmp", a.dtype, attr=f"x{i}", lanes=lanes) for i, a in enumerate(node.args)]
            inner.line(f"return {inner.value(LOWER[node.op](*params), lanes)};")
            types = [(self.type(p.dtype, lanes), p.attr) for p in params]
            self.module[name] = self.lang.function(name, self.type(node.dtype, lanes), types, inner.lines)
        return name

    def helper(self, name: str, text: str) -> str:
        """Puts text at module scope once; gives name."""
        self.module.setdefault(name, text)
        return name


def language(target: Target) -> Language:
    """The emitter of a target's language."""
    if target.language == "opencl":
        from .opencl import OPENCL

        return OPENCL
    if target.language == "wgsl":
        from .wgsl import WGSL

        return WGSL
    if target.language == "triton":
        from .triton import TRITON

        return TRITON
    raise ValueError(f"no emitter for language {target.language!r}")


def header(
    target: Target,
    name: str,
    buffers: Sequence[BufferDecl | tuple],
    scalars: Sequence[ScalarDecl | tuple],
    workgroup: tuple[int, int, int],
    errors: bool = False,
    *,
    module: str = "",
    restrict: bool = False,
    trusted: bool = False,
    subgroups: bool = False,
) -> tuple[str, str, Kernel]:
    """The text around a kernel's body: (prefix, suffix, Kernel without source). For templates that write the body as
    text.

    buffers: (name, dtype, mode) each, scalars: (name, type) each; 64-bit scalars may stand anywhere in the list, they
    travel first. In the body:
      OpenCL: a buffer is a pointer, already advanced by its offset, to float, half (f16: use vload_half), ushort
        (bf16), double, char, short, int, long, uchar, ..., uchar (bool), float2 (c64), double2 (c128), uint (c32),
        ulong2 (b128). Scalars are constants of their names. `group_index` is the flattened workgroup index (uint).
      WGSL: a buffer `x` is array<f32|i32|u32>, array<u32> (8- and 16-bit dtypes, two or four elements a word),
        array<vec2<u32>> (64-bit), array<vec2<f32>> (c64), array<vec4<u32>> (c128, b128); atomic<u32> where mode is
        "a", or a written dtype is narrower than a word. Its first element is `x_offset` (elements). Scalars are
        constants of their names (i64, u64: native where the target has int64, else vec2<u32>). `wg`, `nwg`, `lid3`:
        vec3<u32>; `lid`: u32, flattened local index; `group_index`: u32, flattened workgroup index.
    module: text at module scope (functions, WGSL workgroup variables).

        prefix, suffix, kernel = header(t, "scale_f32", [("x", "f32", "rw")], [("n", "u32"), ("a", "f32")], (64, 1, 1))
        body = "uint i = get_global_id(0); if (i < n) x[i] *= a;"
        kernel = dataclasses.replace(kernel, source=prefix + body + suffix)
    """
    lang = language(target)
    bufs = [b if isinstance(b, BufferDecl) else BufferDecl(*b) for b in buffers]
    scs = [s if isinstance(s, ScalarDecl) else ScalarDecl(*s) for s in scalars]
    scs = [s for s in scs if s.type in ("i64", "f64")] + [s for s in scs if s.type not in ("i64", "f64")]
    kernel = Kernel(
        name=name,
        source="",
        entry="main_",
        language=lang.name,
        windows=tuple(b.windows for b in bufs),
        scalars=tuple(s.type for s in scs),
        workgroup=workgroup,
        errors=errors,
        trusted=trusted,
        dtypes=tuple(b.dtype for b in bufs),
    )
    if not lang.immediate(target, kernel.params_size):
        from dataclasses import replace

        kernel = replace(kernel, immediate=False)
    options = Options(errors=errors, restrict=restrict, trusted=trusted, subgroups=subgroups)
    return lang.prefix(target, kernel, bufs, scs, options, module), "}\n", kernel
