"""OpenCL C 1.2."""

from __future__ import annotations

from .emit import BufferDecl, Language, Options, ScalarDecl
from .kernel import Kernel, Target

POINTEE = {
    "f32": "float", "f16": "half", "bf16": "ushort", "f64": "double",
    "i8": "char", "i16": "short", "i32": "int", "i64": "long",
    "u8": "uchar", "u16": "ushort", "u32": "uint", "u64": "ulong", "bool": "uchar",
    "c32": "uint", "c64": "float2", "c128": "double2", "b128": "ulong2",
}  # fmt: skip
TYPES = {"f32": "float", "f64": "double", "i32": "int", "i64": "long", "u32": "uint", "u64": "ulong", "bool": "int"}


class OpenCL(Language):
    name = "opencl"

    def prefix(
        self,
        target: Target,
        kernel: Kernel,
        buffers: list[BufferDecl],
        scalars: list[ScalarDecl],
        options: Options,
        module: str,
    ) -> str:
        fields = [f"  ulong {b.name}_offset;" for b in buffers]
        fields += [f"  {TYPES[s.type]} {s.name};" for s in scalars]
        used = 8 * len(buffers) + sum(8 if s.type in ("i64", "f64") else 4 for s in scalars)
        if used % 8 or not used:
            fields.append("  int padding;")
        restrict = "restrict " if options.restrict else ""
        args = [f"__global {POINTEE[b.dtype]}* {restrict}{b.name}" for b in buffers]
        if options.errors:
            args.append("volatile __global uint* error_word")
        args.append("const Params params")
        x, y, z = kernel.workgroup
        lines = ["#pragma OPENCL FP_CONTRACT OFF"]
        if target.float64:
            lines.append("#pragma OPENCL EXTENSION cl_khr_fp64 : enable")
        if target.int64_atomics:
            lines.append("#pragma OPENCL EXTENSION cl_khr_int64_base_atomics : enable")
            lines.append("#pragma OPENCL EXTENSION cl_khr_int64_extended_atomics : enable")
        lines += ["typedef struct {", *fields, "} Params;", module]
        lines.append(f"__kernel __attribute__((reqd_work_group_size({x}, {y}, {z})))")
        lines.append(f"void {kernel.entry}({', '.join(args)}) {{")
        lines += [f"  {b.name} += params.{b.name}_offset;" for b in buffers]
        lines += [f"  const {TYPES[s.type]} {s.name} = params.{s.name};" for s in scalars]
        lines.append(
            "  const uint group_index = get_group_id(0) + get_num_groups(0) * "
            "(get_group_id(1) + get_num_groups(1) * get_group_id(2));"
        )
        return "\n".join(lines) + "\n"


OPENCL = OpenCL()
