"""OpenCL C 1.2."""

from __future__ import annotations

import math
import struct

from .emit import BufferDecl, Emitter, Language, Options, ScalarDecl
from .ir import BITS, ELEMENTARY, FLOATS, INTS, Node, const_value
from .kernel import DTYPES, FLOAT8, Kernel, Target, Unsupported

POINTEE = {
    "f32": "float", "f16": "half", "bf16": "ushort", "f64": "double",
    "i8": "char", "i16": "short", "i32": "int", "i64": "long",
    "u8": "uchar", "u16": "ushort", "u32": "uint", "u64": "ulong", "bool": "uchar", **dict.fromkeys(FLOAT8, "uchar"),
    "c32": "uint", "c64": "float2", "c128": "double2", "b128": "ulong2",
}  # fmt: skip
TYPES = {"f32": "float", "f64": "double", "i32": "int", "i64": "long", "u32": "uint", "u64": "ulong", "bool": "int"}
# A store that does not first read the cache line it overwrites; the pointer is aligned.
STREAM = """#if defined(__clang__)
#define STREAM(value, pointer) __builtin_nontemporal_store(value, pointer)
#else
#define STREAM(value, pointer) *(pointer) = (value)
#endif"""
# Brings a cache line in ahead of its use; any address will do.
PREFETCH = """#if defined(__clang__)
#define PREFETCH(pointer) __builtin_prefetch((const __private void*)(size_t)(pointer))
#else
#define PREFETCH(pointer)
#endif"""
NATIVE = ELEMENTARY | {
    "sqrt", "rsqrt", "floor", "ceil", "trunc", "rint", "atan2", "pow", "fmod", "hypot", "copysign", "nextafter", "fma",
}  # fmt: skip
NATIVE_F64 = NATIVE | {"erf", "erfc", "lgamma"}
# In vectors of float32 our own are faster on PoCL (sin 9 times, exp, tanh and pow 1.6), and as accurate; sin, cos and tan up to 5e4.
FASTER_LOWERED = frozenset(("exp", "expm1", "log1p", "sinh", "tanh", "atan2", "pow"))
FASTER_REDUCED = frozenset(("sin", "cos", "tan"))
INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "idiv": "/", "irem": "%", "and": "&", "or": "|", "xor": "^",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")


class OpenCL(Language):
    """A scalar bool is int 0 or 1; a vector of bools is intN, 0 or -1, as select wants it."""

    name = "opencl"

    def type(self, target: Target, dtype: str, lanes: int) -> str:
        if dtype == "f64" and not target.float64:
            raise Unsupported("this device has no float64 arithmetic")
        return TYPES[dtype] + (str(lanes) if lanes > 1 else "")

    def const(self, target: Target, node: Node) -> str:
        v, dtype = const_value(node), node.dtype
        if dtype == "f32":
            if math.isnan(v):
                return "as_float(0x7fc00000)"
            if math.isinf(v):
                return "INFINITY" if v > 0 else "(-INFINITY)"
            text = f"{v:.9g}"
            text = (text if "." in text or "e" in text else text + ".0") + "f"
            return text if v > 0 or text[0] != "-" else f"({text})"
        if dtype == "f64":
            if not math.isfinite(v):
                return f"as_double(0x{struct.unpack('<Q', struct.pack('<d', v))[0]:x}UL)"
            return repr(v) if repr(v)[0] != "-" else f"({v!r})"
        if dtype == "bool":
            return str(v)
        suffix = {"i32": "", "u32": "u", "i64": "L", "u64": "UL"}[dtype]
        if v < 0:
            return f"(-{-v - 1}{suffix} - 1{suffix})"
        return f"{v}{suffix}"

    def splat(self, type_: str, text: str) -> str:
        return f"({type_})({text})"

    def let(self, type_: str, name: str, text: str) -> str:
        return f"const {type_} {name} = {text};"

    def var(self, type_: str, name: str, text: str) -> str:
        return f"{type_} {name} = {text};"

    def function(self, name: str, result: str, params: list[tuple[str, str]], body: list[str]) -> str:
        return (
            f"static {result} {name}({', '.join(f'const {t} {n}' for t, n in params)}) {{\n" + "\n".join(body) + "\n}"
        )

    def operation(self, emitter: Emitter, node: Node, args: list[str]) -> str | None:
        op, lanes, dtype = node.op, node.lanes, node.dtype
        source = node.args[0].dtype if node.args else dtype
        vector = lanes > 1
        type_ = self.type(emitter.target, dtype, lanes)
        if op in INFIX and dtype != "bool":
            return f"{args[0]} {INFIX[op]} {args[1]}"
        if op in COMPARE:
            text = f"{args[0]} {INFIX[op]} {args[1]}"
            return f"convert_int{lanes}({text})" if vector and BITS.get(source) == 64 else text
        if op in ("and", "or", "xor"):
            return f"{args[0]} {INFIX[op]} {args[1]}"
        if op == "not":
            return f"!{args[0]}" if dtype == "bool" and not vector else f"~{args[0]}"
        if op in ("shl", "shr"):
            amount = args[1] if not vector or dtype == "u32" else f"convert_{type_}({args[1]})"
            return f"{args[0]} {'<<' if op == 'shl' else '>>'} {amount}"
        if op == "neg":
            return f"-{args[0]}"
        if op == "where":
            if not vector:
                return f"{args[0]} ? {args[1]} : {args[2]}"
            mask = args[0] if BITS.get(dtype) != 64 else f"convert_long{lanes}({args[0]})"
            return f"select({args[2]}, {args[1]}, {mask})"
        if op == "cast":
            if source == "bool":
                return f"convert_{type_}(-{args[0]})" if vector else f"({type_}){args[0]}"
            if source in FLOATS and dtype in INTS:
                return f"convert_{type_}_sat({args[0]})"
            return f"convert_{type_}({args[0]})" if vector else f"({type_}){args[0]}"
        if op == "bitcast":
            return f"as_{type_}({args[0]})"
        if op == "abs":
            return f"fabs({args[0]})" if dtype in FLOATS else f"as_{type_}(abs({args[0]}))"
        if op in ("min", "max"):
            return f"{op}({args[0]}, {args[1]})"
        if op == "isnan":
            return f"convert_int{lanes}(isnan({args[0]}))" if vector and source == "f64" else f"isnan({args[0]})"
        if op == "fma" and dtype not in FLOATS:
            return f"{args[0]} * {args[1]} + {args[2]}"
        if op == "lane":
            return f"({type_})({', '.join(map(str, range(lanes)))})"
        if op in ("lo", "hi"):
            return f"{args[0]}.{op}" if vector or dtype != "bool" else f"{args[0]}.{op} & 1"
        if op == "extract":
            return f"{args[0]}.s{node.attr:x}" + (" & 1" if dtype == "bool" else "")
        if vector and dtype == "f32" and op in FASTER_REDUCED:
            x, large = args[0], f"fabs({args[0]}) > 5e4f"
            # Lane by lane: beside large ones PoCL's are wrong for small ones (sin(1e-9) as 0.016).
            return f"select({emitter.function(node, lanes)}({x}), any({large}) ? {op}({x}) : {x}, {large})"
        if vector and dtype == "f32" and op in FASTER_LOWERED:
            return None
        if op in (NATIVE if dtype == "f32" else NATIVE_F64):
            return f"{op}({', '.join(args)})"
        return None

    # ---- memory -----------------------------------------------------------------------------------------------

    def load(self, k: Emitter, b: BufferDecl, index: str, lanes: int) -> list[Node]:
        """The element at index, or `lanes` consecutive ones, as a node, or two for pairs."""
        d, n, p = DTYPES[b.dtype], lanes if lanes > 1 else "", b.name
        if d.is_pair:
            return self._load_pair(k, b, index, lanes)
        if b.dtype == "f16" and n:
            # PoCL compiles vload_half16 to aligned loads, which fault on odd rows: load the bits, convert a private copy.
            bits = k.fresh()
            k.line(f"const ushort{n} {bits} = vload{n}(0, (__global const ushort*)({p} + {index}));")
            text = f"vload_half{n}(0, (const __private half*)&{bits})"
        elif b.dtype == "f16":
            text = f"vload_half(0, {p} + {index})"
        else:
            text = f"vload{n}(0, {p} + {index})" if n else f"{p}[{index}]"
            if b.dtype == "bf16":
                text = f"as_float{n}(convert_uint{n}({text}) << 16)" if n else f"as_float((uint){text} << 16)"
            elif b.dtype in FLOAT8:
                byte = k.tmp("u32", f"convert_uint{n}({text})", lanes)
                return [Node(f"{b.dtype}_decode", "f32", byte)]
            elif b.dtype == "bool":
                text = f"convert_int{n}({text}) != 0" if n else f"{text} != 0"
            elif d.size < 4:
                text = f"convert_int{n}({text})"
        return [k.tmp(d.compute, text, lanes)]

    def _load_pair(self, k: Emitter, b: BufferDecl, index: str, lanes: int) -> list[Node]:
        d, p = DTYPES[b.dtype], b.name
        half = b.dtype == "c32"
        pointer = f"((__global {'half' if half else TYPES[d.compute]}*)({p} + {index}))"
        load = "vload_half" if half else "vload"
        if lanes == 1:
            pair = k.fresh()
            k.line(f"const {TYPES[d.compute]}2 {pair} = {load}2(0, {pointer});")
            return [k.tmp(d.compute, f"{pair}.{c}") for c in "xy"]
        parts = []
        width = min(16, 2 * lanes)
        for i in range(2 * lanes // width):
            v = k.fresh()
            k.line(f"const {TYPES[d.compute]}{width} {v} = {load}{width}({i}, {pointer});")
            parts.append(v)
        type_ = f"{TYPES[d.compute]}{lanes}"
        return [k.tmp(d.compute, f"({type_})({', '.join(f'{v}.{s}' for v in parts)})", lanes) for s in ("even", "odd")]

    def gather(self, k: Emitter, b: BufferDecl, index: Node) -> list[Node]:
        """Elements at a vector of indices."""
        lanes, i = index.lanes, k.value(index)
        each = [self.load(k, b, f"{i}.s{lane:x}", 1) for lane in range(lanes)]
        d = DTYPES[b.dtype]
        out = []
        for part in range(len(each[0])):
            atoms = [("-" if d.compute == "bool" else "") + k.value(e[part]) for e in each]
            out.append(k.tmp(d.compute, f"({k.type(d.compute, lanes)})({', '.join(atoms)})", lanes))
        return out

    def store(self, k: Emitter, b: BufferDecl, index: str, values: list[Node], lanes: int) -> None:
        """Stores compute-dtype values to index and, if lanes > 1, those after it."""
        d, n, p = DTYPES[b.dtype], lanes if lanes > 1 else "", b.name
        v = [k.value(x, lanes) for x in values]
        if d.is_pair:
            half = b.dtype == "c32"
            store = "vstore_half" if half else "vstore"
            rounding = "_rte" if half else ""
            t = TYPES[d.compute]
            pointer = f"((__global {'half' if half else t}*)({p} + {index}))"
            if lanes == 1:
                k.line(f"{store}2{rounding}(({t}2)({v[0]}, {v[1]}), 0, {pointer});")
                return
            width = min(8, lanes)
            for i in range(lanes // width):
                c = ", ".join(f"{v[part]}.s{i * width + j:x}" for j in range(width) for part in (0, 1))
                k.line(f"{store}{2 * width}{rounding}(({t}{2 * width})({c}), {i}, {pointer});")
            return
        value = v[0]
        if b.dtype == "f16" and n:
            bits = k.fresh()
            k.line(f"ushort{n} {bits}; vstore_half{n}_rte({value}, 0, (__private half*)&{bits});")
            self._store_vector(k, f"(__global ushort*)({p} + {index})", "ushort", 2, bits, lanes)
            return
        if b.dtype == "f16":
            k.line(f"vstore_half_rte({value}, 0, {p} + {index});")
            return
        if b.dtype == "bf16":
            bits = k.value(Node("bf16_encode", "u32", values[0]), lanes)
            value = f"convert_ushort{n}({bits})"
        elif b.dtype in FLOAT8:
            bits = k.value(Node(f"{b.dtype}_encode", "u32", values[0]), lanes)
            value = f"convert_uchar{n}({bits})"
        elif b.dtype == "bool":
            value = f"convert_uchar{n}({value} & 1)" if n else f"(uchar)({value} != 0)"
        elif d.size < 4:
            value = f"convert_{POINTEE[b.dtype]}{n}({value})"
        if n:
            self._store_vector(k, f"{p} + {index}", POINTEE[b.dtype], d.size, value, lanes)
        else:
            k.line(f"{p}[{index}] = {value};")

    def _store_vector(self, k: Emitter, pointer: str, type_: str, size: int, value: str, lanes: int) -> None:
        plain = f"vstore{lanes}({value}, 0, {pointer});"
        if not k.streaming or lanes * size < 16:
            k.line(plain)
            return
        k.module["STREAM"] = STREAM
        k.line(f"if (((ulong)({pointer}) & {lanes * size - 1}) | {k.streaming}) {plain}")
        k.line(f"else STREAM({value}, (__global {type_}{lanes}*)({pointer}));")

    def prefetch(self, k: Emitter, b: BufferDecl, index: str) -> None:
        k.module["PREFETCH"] = PREFETCH
        k.line(f"PREFETCH({b.name} + {index});")

    def scatter(self, k: Emitter, b: BufferDecl, index: Node, values: list[Node]) -> None:
        lanes = index.lanes
        i, atoms = k.value(index), [k.value(v, lanes) for v in values]
        for lane in range(lanes):
            parts = [Node("tmp", v.dtype, attr=f"{a}.s{lane:x}") for v, a in zip(values, atoms, strict=True)]
            if DTYPES[b.dtype].kind == "bool":
                parts = [Node("tmp", "bool", attr=f"({p.attr} & 1)") for p in parts]
            self.store(k, b, f"{i}.s{lane:x}", parts, 1)

    def load4(self, k: Emitter, b: BufferDecl, index: str) -> list[Node]:
        d, place = DTYPES[b.dtype], f"{b.name} + {index}"
        raw, type_ = k.fresh(), POINTEE[b.dtype]
        if b.dtype == "f16":
            k.line(f"const float4 {raw} = vloada_half4(0, {place});")
        else:
            k.line(f"const {type_}4 {raw} = *(__global const {type_}4*)({place});")
        parts = [f"{raw}.s{i}" for i in range(4)]
        if b.dtype in FLOAT8:
            return [Node(f"{b.dtype}_decode", "f32", k.tmp("u32", p)) for p in parts]
        text = {"bf16": "as_float((uint){} << 16)", "bool": "{} != 0"}.get(b.dtype, "{}")
        return [k.tmp(d.compute, text.format(p)) for p in parts]

    def store4(self, k: Emitter, b: BufferDecl, index: str, values: list[Node]) -> None:
        place, type_ = f"{b.name} + {index}", POINTEE[b.dtype]
        if b.dtype == "bf16" or b.dtype in FLOAT8:
            values = [Node(f"{b.dtype}_encode", "u32", v) for v in values]
        v = [k.value(x) for x in values]
        if b.dtype == "f16":
            k.line(f"vstorea_half4_rte((float4)({', '.join(v)}), 0, {place});")
            return
        if DTYPES[b.dtype].size < 4:
            v = [f"({type_})({x} != 0)" if b.dtype == "bool" else f"({type_}){x}" for x in v]
        k.line(f"*(__global {type_}4*)({place}) = ({type_}4)({', '.join(v)});")

    def misaligned(self, b: BufferDecl, index: str) -> str:
        return f"(uint)((ulong)({b.name} + {index}) / {DTYPES[b.dtype].size}u) & 3u"

    barrier = "barrier(CLK_LOCAL_MEM_FENCE);"
    memory_barrier = "barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);"
    loop = "for (;;)"

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
