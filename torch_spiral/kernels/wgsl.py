"""WGSL, as naga (wgpu-native) takes it."""

from __future__ import annotations

from .emit import BufferDecl, Language, Options, ScalarDecl
from .kernel import DTYPES, Kernel, Target, Unsupported

ELEMENT = {
    "f32": "f32", "i32": "i32", "u32": "u32", "i64": "vec2<u32>", "u64": "vec2<u32>", "f64": "vec2<u32>",
    "c64": "vec2<f32>", "c128": "vec4<u32>", "b128": "vec4<u32>",
}  # fmt: skip

VECTOR4 = {"f32": "vec4<f32>", "i32": "vec4<i32>", "u32": "vec4<u32>", "f16": "vec2<u32>", "bf16": "vec2<u32>"}


def is_atomic(b: BufferDecl) -> bool:
    """Whether the buffer's words are atomic<u32>: elements narrower than a word are stored by atomicXor."""
    return b.mode == "a" or (b.mode != "r" and DTYPES[b.dtype].size < 4)


class Wgsl(Language):
    name = "wgsl"

    def immediate(self, target: Target, params_size: int) -> bool:
        return params_size <= target.max_params

    def element(self, target: Target, b: BufferDecl) -> str:
        """Type of the elements of a binding's array."""
        if b.vector == 4:
            return VECTOR4[b.dtype]
        if is_atomic(b):
            if DTYPES[b.dtype].kind in ("int", "uint") and DTYPES[b.dtype].size == 8 and target.int64_atomics:
                return "atomic<i64>" if b.dtype == "i64" else "atomic<u64>"
            return "atomic<i32>" if b.dtype == "i32" else "atomic<u32>"
        return ELEMENT.get(b.dtype, "u32")

    def scalar(self, target: Target, s: ScalarDecl) -> str:
        if s.type == "i64":
            if target.int64:
                return f"i64(u64(params.{s.name}_lo) | (u64(params.{s.name}_hi) << 32u))"
            return f"vec2<u32>(params.{s.name}_lo, params.{s.name}_hi)"
        if s.type == "f64":
            if not target.float64:
                raise Unsupported(f"scalar {s.name}: this device has no float64 arithmetic")
            return f"bitcast<f64>(u64(params.{s.name}_lo) | (u64(params.{s.name}_hi) << 32u))"
        return f"params.{s.name}"

    def prefix(
        self,
        target: Target,
        kernel: Kernel,
        buffers: list[BufferDecl],
        scalars: list[ScalarDecl],
        options: Options,
        module: str,
    ) -> str:
        fields = [f"  {b.name}_offset: u32," for b in buffers]
        for s in scalars:
            if s.type in ("i64", "f64"):
                fields += [f"  {s.name}_lo: u32,", f"  {s.name}_hi: u32,"]
            else:
                fields.append(f"  {s.name}: {s.type},")
        if not fields:
            fields = ["  padding: u32,"]
        lines, binding = ["struct Params {", *fields, "}"], 0
        for b in buffers:
            for w in range(b.windows):
                name = b.name if b.windows == 1 else f"{b.name}_{w}"
                element = self.element(target, b)
                lines.append(f"@group(0) @binding({binding}) var<storage, read_write> {name}: array<{element}>;")
                binding += 1
        if options.errors:
            lines.append(f"@group(0) @binding({binding}) var<storage, read_write> error_word: array<atomic<u32>>;")
            binding += 1
        if kernel.immediate:
            lines.append("var<immediate> params: Params;")
        else:
            lines.append(f"@group(0) @binding({binding}) var<storage, read> params: Params;")
        lines.append(module)
        x, y, z = kernel.workgroup
        builtins = [
            "@builtin(workgroup_id) wg: vec3<u32>",
            "@builtin(num_workgroups) nwg: vec3<u32>",
            "@builtin(local_invocation_id) lid3: vec3<u32>",
            "@builtin(local_invocation_index) lid: u32",
        ]
        if options.subgroups:
            builtins += [
                "@builtin(subgroup_size) subgroup_size: u32",
                "@builtin(subgroup_id) subgroup_id: u32",
                "@builtin(subgroup_invocation_id) subgroup_lane: u32",
            ]
        lines.append(f"@compute @workgroup_size({x}, {y}, {z})")
        lines.append(f"fn {kernel.entry}({', '.join(builtins)}) {{")
        lines += [f"  let {b.name}_offset = params.{b.name}_offset;" for b in buffers]
        lines += [f"  let {s.name} = {self.scalar(target, s)};" for s in scalars]
        lines.append("  let group_index = wg.x + nwg.x * (wg.y + nwg.y * wg.z);")
        return "\n".join(lines) + "\n"


WGSL = Wgsl()
