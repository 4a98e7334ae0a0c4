"""What the emitters of the kernel languages share: declarations and the text around a kernel's body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kernel import DTYPES, SCALARS, Kernel, Target

if TYPE_CHECKING:
    from .ir import Node

MODES = ("r", "w", "rw", "a")


@dataclass(frozen=True)
class BufferDecl:
    """A buffer argument. mode: "r" read, "w" written, "rw" both, "a" updated by atomics (and read or written).

    vector: 4 makes a WGSL binding an array of four elements (f32: vec4<f32>, f16 and bf16: vec2<u32>), for templates."""

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
    """One kernel language. Text fragments are C-like in both, so statements are built by the builder."""

    name = ""

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
        return True

    def wide(self, node: Node) -> bool:
        raise NotImplementedError


def language(target: Target) -> Language:
    """The emitter of a target's language."""
    if target.language == "opencl":
        from .opencl import OPENCL

        return OPENCL
    if target.language == "wgsl":
        from .wgsl import WGSL

        return WGSL
    raise ValueError(f"no emitter for language {target.language!r}")


def header(
    target: Target,
    name: str,
    buffers: list[BufferDecl | tuple],
    scalars: list[ScalarDecl | tuple],
    workgroup: tuple[int, int, int],
    errors: bool = False,
    *,
    module: str = "",
    restrict: bool = False,
    trusted: bool = False,
    subgroups: bool = False,
) -> tuple[str, str, Kernel]:
    """The text around a kernel's body: (prefix, suffix, Kernel without source). For templates that write the body as text.

    buffers: (name, dtype, mode) each, scalars: (name, type) each; 64-bit scalars may stand anywhere in the list, they
    travel first. In the body:
      OpenCL: a buffer is a pointer, already advanced by its offset, to float, half (f16: use vload_half), ushort (bf16), double,
        char, short, int, long, uchar, ..., uchar (bool), float2 (c64), double2 (c128), uint (c32), ulong2 (b128).
        Scalars are constants of their names. `group_index` is the flattened workgroup index (uint).
      WGSL: a buffer `x` is array<f32|i32|u32>, array<u32> (8- and 16-bit dtypes, two or four elements a word), array<vec2<u32>>
        (64-bit), array<vec2<f32>> (c64), array<vec4<u32>> (c128, b128); atomic<u32> where mode is "a", or a written dtype
        is narrower than a word. Its first element is `x_offset` (elements). Scalars are constants of their names
        (i64, u64: native where the target has int64, else vec2<u32>). `wg`, `nwg`, `lid3`: vec3<u32>; `lid`: u32, flattened
        local index; `group_index`: u32, flattened workgroup index.
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
