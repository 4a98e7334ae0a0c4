"""Contractions of the `simt` schedule class: workgroup tiles in shared memory, for GPUs (OpenCL, WGSL) and lavapipe.

One generator writes OpenCL C and WGSL. Everything is unrolled and every accumulator is a named variable: naga and
several
drivers keep indexed arrays in memory (13 times slower). `Text` is the dialect: declarations, loads, stores, shared
memory.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..emit import BufferDecl, header
from ..kernel import Kernel, Target, Unsupported
from ..vector.gemm import Epilogue, combine, is_constant, number
from ..wgsl import OR_NAN

COMPONENTS = "xyzw"
# Storage dtypes that the templates take, and what they accumulate in.
ACCUMULATOR = {"f32": "f32", "f16": "f32", "bf16": "f32", "i8": "f32", "f64": "f64", "i32": "i32", "i64": "i64"}
_CL = {"f32": "float", "f64": "double", "i32": "int", "i64": "long", "u32": "uint", "bool": "bool"}
# Above every index that the templates form: a launch has at most this many workgroups, each takes several tiles.
MAX_GROUPS = 65535

_WGSL_FUNCTIONS = {
    "to_f16": """
fn to_f16(x: f32) -> u32 {  // rounds to nearest even; pack2x16float may round to zero
  let u = bitcast<u32>(x); let s = (u >> 16u) & 0x8000u; let a = u & 0x7fffffffu;
  if (a > 0x7f800000u) { return s | 0x7e00u; }
  if (a >= 0x477ff000u) { return s | 0x7c00u; }
  if (a < 0x38800000u) { return s | (bitcast<u32>(bitcast<f32>(a) + 0.5) - 0x3f000000u); }
  return s | ((a - 0x38000000u + 0xfffu + ((a >> 13u) & 1u)) >> 13u);
}""",
    "to_bf16": """
fn to_bf16(x: f32) -> u32 {
  let u = bitcast<u32>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) { return (u >> 16u) | 0x40u; }
  return (u + 0x7fffu + ((u >> 16u) & 1u)) >> 16u;
}""",
}
_CL_FUNCTIONS = {
    "to_bf16": """
ushort to_bf16(float x) {
  uint u = as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (ushort)((u >> 16) | 0x40u);
  return (ushort)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}""",
}


def cdiv(a, b):
    """Ceiling division of ints or Syms."""
    return (a + (b - 1)) // b


NO_EPILOGUE = Epilogue()


def operand_layouts(epilogue: Epilogue) -> list[tuple[str, str]]:
    """(dtype, layout) of each operand: "v" unit stride along columns, "r" one value a row, "s" any strides."""
    return [(dtype, {"n": "v", "mn": "v", "m": "r", "s": "s"}[b]) for _, _, dtype, b in epilogue.operands]


def epilogue_name(epilogue: Epilogue) -> str:
    return f"_{epilogue}" if epilogue.steps else ""


def write_epilogue(t: Text, epilogue: Epilogue, acc: str) -> None:
    """Module-scope function `epilogue(acc, operands..., factors...)` on scalars of the accumulator dtype."""
    ty, body, i = t.type(acc), [], 0
    params = [("x", ty)]
    for j, (_, _, dtype, _) in enumerate(epilogue.operands):
        params.append((f"x{j}", t.type(ACCUMULATOR[dtype])))
    params += [(n, t.type(d)) for n, d in epilogue.factors(acc)]
    for step in epilogue.steps:
        if step == "alpha":
            body.append("y = y * alpha;")
        elif isinstance(step, str) and is_constant(step):
            body.append(f"y = {combine(step, 'y', t.cast(f'{number(step)!r}f', acc))};")
        elif isinstance(step, str):
            body.append(f"y = {activation(t, step, 'y')};")
        else:
            x = t.cast(f"x{i}", acc)
            if step[0] == "beta":
                body.append(f"if (beta != {t.cast('0', acc)}) {{ y = y + beta * {x}; }}")
            else:
                body.append(f"y = {combine(step[0], 'y', x, 'inverseSqrt' if t.wgsl else 'rsqrt')};")
            i += 1
    if t.wgsl:
        head = f"fn epilogue({', '.join(f'{n}: {d}' for n, d in params)}) -> {ty} {{ var y = x; "
    else:
        head = f"{ty} epilogue({', '.join(f'{d} {n}' for n, d in params)}) {{ {ty} y = x; "
    t.module["epilogue"] = head + " ".join(body) + " return y; }"


def activation(t: Text, name: str, x: str) -> str:
    """Text of a float32 activation of variable x. NaN propagates; exp does not overflow into NaN."""
    if name in ("gelu",):
        t.module.setdefault("erf1", _ERF_WGSL if t.wgsl else "float erf1(float x) { return erf(x); }")
    if name in ("tanh", "gelu_tanh"):
        t.module.setdefault("tanh1", _TANH_WGSL if t.wgsl else _TANH_CL)
    f = (lambda v: v) if t.wgsl else (lambda v: v + "f")
    hs = t.select(
        t.select(f"({x} * {f('0.16666667')} + {f('0.5')})", f("1.0"), f"{x} > {f('3.0')}"),
        f("0.0"),
        f"{x} < -{f('3.0')}",
    )

    def keep(y: str) -> str:  # of WGSL's selects drivers make minima and maxima, which drop NaN
        if not t.wgsl:
            return y
        t.module.setdefault("or_nan", OR_NAN)
        return f"or_nan({y}, {x})"

    one, half = f("1.0"), f("0.5")
    inner = f"{f('0.7978845608')} * ({x} + {f('0.044715')} * {x} * {x} * {x})"
    return {
        "relu": lambda: keep(t.select(x, f("0.0"), f"{x} < {f('0.0')}")),
        "relu6": lambda: keep(t.select(t.select(x, f("6.0"), f"{x} > {f('6.0')}"), f("0.0"), f"{x} < {f('0.0')}")),
        "hardsigmoid": lambda: keep(hs),
        "hardswish": lambda: f"({x} * {hs})",
        "sigmoid": lambda: f"({one} / ({one} + exp(-{x})))",
        "silu": lambda: f"({x} / ({one} + exp(-{x})))",
        "tanh": lambda: f"tanh1({x})",
        "gelu": lambda: f"({half} * {x} * ({one} + erf1({x} * {f('0.7071067812')})))",
        "gelu_tanh": lambda: f"({half} * {x} * ({one} + tanh1({inner})))",
    }[name]()


# tanh overflows on some drivers and loses digits near 0. Comparisons with NaN are false and fall through to exp.
_TANH_WGSL = """fn tanh1(x: f32) -> f32 {
  let a = abs(x);
  if (a < 0.02) { return x - x * x * x * 0.33333333; }
  if (a > 10.0) { return select(-1.0, 1.0, x > 0.0); }
  let e = exp(2.0 * x); return (e - 1.0) / (e + 1.0);
}"""
_TANH_CL = """float tanh1(float x) {
  float a = fabs(x);
  if (a < 0.02f) return x - x * x * x * 0.33333333f;
  if (a > 10.0f) return x > 0.0f ? 1.0f : -1.0f;
  float e = exp(2.0f * x); return (e - 1.0f) / (e + 1.0f);
}"""
# Below 1 the Taylor series, to 1e-7 of erf; above, 1 - erfc by Chebyshev fitting (Numerical Recipes' erfcc), to 1.2e-7.
_ERF_WGSL = """fn erf1(x: f32) -> f32 {
  let a = abs(x);
  if (a < 1.0) {
    let z = x * x;
    var p = 1.0 / 76204800.0; p = fma(-p, z, 1.0 / 6894720.0); p = fma(-p, z, 1.0 / 685440.0);
    p = fma(-p, z, 1.0 / 75600.0); p = fma(-p, z, 1.0 / 9360.0); p = fma(-p, z, 1.0 / 1320.0); p = fma(-p, z, 1.0 /
    216.0);
    p = fma(-p, z, 1.0 / 42.0); p = fma(-p, z, 1.0 / 10.0); p = fma(-p, z, 1.0 / 3.0); p = fma(-p, z, 1.0);
    return 1.1283791671 * x * p;
  }
  if (a > 4.0) { return select(-1.0, 1.0, x > 0.0); }
  let t = 1.0 / (1.0 + 0.5 * a);
  var q = 0.17087277; q = fma(q, t, -0.82215223); q = fma(q, t, 1.48851587); q = fma(q, t, -1.13520398);
  q = fma(q, t, 0.27886807); q = fma(q, t, -0.18628806); q = fma(q, t, 0.09678418); q = fma(q, t, 0.37409196);
  q = fma(q, t, 1.00002368); q = fma(q, t, -1.26551223);
  let r = 1.0 - t * exp(q - a * a);
  return select(-r, r, x > 0.0);
}"""


class Text:
    """Writes one kernel's body in OpenCL C or WGSL. Indices and sizes are u32."""

    def __init__(self, target: Target, name: str, threads: int) -> None:
        if threads > target.max_workgroup_size:
            raise Unsupported(f"{name}: {threads} invocations, the device allows {target.max_workgroup_size}")
        self.target, self.name, self.threads = target, name, threads
        self.wgsl = target.language == "wgsl"
        self.buffers: list[BufferDecl] = []
        self.scalars: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.module: dict[str, str] = {}
        self.shared_bytes = 0
        self.shared_lines: list[str] = []
        self.barrier_text = "workgroupBarrier();" if self.wgsl else "barrier(CLK_LOCAL_MEM_FENCE);"
        self.subgroups = False
        self._unique = 0

    # Declarations
    def buffer(self, name: str, dtype: str, mode: str = "r", vector: int = 1, windows: int = 1) -> None:
        if dtype == "f64" and not self.target.float64:
            raise Unsupported(f"{self.name}: this device has no float64 arithmetic")
        if self.wgsl and dtype == "i64" and not self.target.int64:
            raise Unsupported(f"{self.name}: this device has no int64 arithmetic")
        if dtype in ("f64", "i64") and self.wgsl:
            vector = 1
        self.buffers.append(BufferDecl(name, dtype, mode, windows, vector))

    def decl(self, name: str) -> BufferDecl:
        return next(b for b in self.buffers if b.name == name)

    def scalar(self, *names: str, type: str = "u32") -> None:
        self.scalars += [(n, type) for n in names]

    def shared(self, name: str, dtype: str, count: int, vector: int = 4) -> None:
        """Workgroup memory of `count` vectors."""
        size = {"f64": 8, "i64": 8}.get(dtype, 4)
        self.shared_bytes += size * vector * count
        if self.shared_bytes > self.target.max_workgroup_memory:
            raise Unsupported(
                f"{self.name}: {self.shared_bytes} bytes of workgroup memory, "
                f"the device has {self.target.max_workgroup_memory}"
            )
        if self.wgsl:
            self.module[f"shared {name}"] = f"var<workgroup> {name}: array<{self.type(dtype, vector)}, {count}>;"
        else:
            self.shared_lines.append(f"__local {self.type(dtype, vector)} {name}[{count}];")

    def shared_base(self, name: str, array: str, index: str, dtype: str = "f32") -> tuple[str, str]:
        """Declares a place in a shared array of vec4: (array, index) to add constants to. In OpenCL a pointer: a constant that is added
        to an index that might wrap around cannot be part of a load."""
        if self.wgsl:
            return array, self.let(name, index)
        self.add(f"__local {self.type(dtype, 4)}* {name} = {array} + {index};")
        return name, "0u"

    def function(self, name: str) -> None:
        text = (_WGSL_FUNCTIONS if self.wgsl else _CL_FUNCTIONS).get(name)
        if text:
            self.module.setdefault(name, text)

    # Types and statements
    def type(self, dtype: str, width: int = 1) -> str:
        if self.wgsl:
            return f"vec{width}<{dtype}>" if width > 1 else dtype
        return _CL[dtype] + (str(width) if width > 1 else "")

    def add(self, *lines: str) -> None:
        self.lines += lines

    def let(self, name: str, expr: str, dtype: str = "u32", width: int = 1) -> str:
        self.add(f"let {name} = {expr};" if self.wgsl else f"const {self.type(dtype, width)} {name} = {expr};")
        return name

    def var(self, name: str, expr: str, dtype: str = "u32", width: int = 1) -> str:
        t = self.type(dtype, width)
        self.add(f"var {name}: {t} = {expr};" if self.wgsl else f"{t} {name} = {expr};")
        return name

    def fresh(self, stem: str = "t") -> str:
        self._unique += 1
        return f"{stem}_{self._unique}"

    def zero(self, dtype: str, width: int = 1) -> str:
        if self.wgsl:
            return f"{self.type(dtype, width)}()"
        return f"({self.type(dtype, width)})(0)"

    def splat(self, expr: str, dtype: str = "f32", width: int = 4) -> str:
        return f"{self.type(dtype, width)}({expr})" if self.wgsl else f"({self.type(dtype, width)})({expr})"

    def vector(self, parts: list[str], dtype: str = "f32") -> str:
        t = self.type(dtype, len(parts))
        return f"{t}({', '.join(parts)})" if self.wgsl else f"({t})({', '.join(parts)})"

    def cast(self, expr: str, dtype: str) -> str:
        return f"{dtype}({expr})" if self.wgsl else f"(({_CL[dtype]})({expr}))"

    def select(self, no: str, yes: str, condition: str) -> str:
        """A scalar choice; both sides are evaluated in WGSL."""
        return f"select({no}, {yes}, {condition})" if self.wgsl else f"(({condition}) ? ({yes}) : ({no}))"

    def fma(self, a: str, b: str, c: str, dtype: str) -> str:
        return f"fma({a}, {b}, {c})" if dtype in ("f32", "f64") else f"({a} * {b} + {c})"

    def barrier(self) -> None:
        self.add(self.barrier_text)

    # Subgroups
    def subgroup_lanes(self, dtype: str) -> int:
        """How many neighbouring lanes can surely exchange values of dtype; 0: sums go through shared memory."""
        lanes = self.target.subgroup if self.wgsl and dtype in ("f32", "i32", "u32") else 0
        return lanes if self.threads % max(lanes, 1) == 0 else 0

    def declare_lane(self) -> None:
        """`lane`: the invocation's number, those of a subgroup's lanes in order (`lid` need not follow them)."""
        self.subgroups = True
        self.let("lane", "subgroup_id * subgroup_size + subgroup_lane")

    def shuffle_xor(self, value: str, mask: int) -> str:
        """Expression: the value of the lane whose number differs by mask."""
        return f"subgroupShuffleXor({value}, {mask}u)"

    def loop(self, name: str, start: str, end: str, step: str) -> None:
        """Opens a loop with a u32 counter; closed by end()."""
        if self.wgsl and self.target.software and re.fullmatch(r"\d+u", end):
            # Mesa unrolls loops of a known length, and attention then takes four times as long to compile.
            end += " * min(nwg.x, 1u)"
        declare = f"var {name}: u32 = {start}" if self.wgsl else f"uint {name} = {start}"
        self.add(f"for ({declare}; {name} < {end}; {name} += {step}) {{")

    def open(self, condition: str = "") -> None:
        self.add(f"if ({condition}) {{" if condition else "{")

    def end(self, count: int = 1) -> None:
        self.add("}" * count)

    @property
    def group(self) -> str:
        return "group_index"

    @property
    def groups(self) -> str:
        """Workgroups of the launch."""
        return (
            "(nwg.x * nwg.y * nwg.z)"
            if self.wgsl
            else "(uint)(get_num_groups(0) * get_num_groups(1) * get_num_groups(2))"
        )

    # Memory. A base is a place in a buffer that stays over many loads: a pointer in OpenCL (advanced by 64 bits), an
    # index in WGSL.
    def base(self, name: str, buffer: str, *advance: tuple[str, str]) -> str:
        """Declares a base of `buffer`, advanced by the products (index, stride)."""
        if self.wgsl:
            return self.let(name, " + ".join([f"{buffer}_offset", *(f"{i} * {s}" for i, s in advance)]))
        from ..opencl import POINTEE

        terms = "".join(f" + (ulong)({i}) * ({s})" for i, s in advance)
        self.add(f"__global {POINTEE[self.decl(buffer).dtype]}* {name} = {buffer}{terms};")
        return name

    def load(self, buffer: str, base: str, index: str, width: int = 1) -> str:
        """Expression: one element, or four consecutive ones (index and base divisible by 4), in the accumulator
        dtype."""
        b = self.decl(buffer)
        if not self.wgsl:
            return self._load_cl(b, base, index, width)
        if b.windows > 1:
            return self._load_windows(b, f"{base} + {index}", width)
        return self._load_wgsl(b, b.name, f"{base} + {index}", width)

    def _load_cl(self, b: BufferDecl, base: str, i: str, width: int) -> str:
        if width == 4:
            if b.dtype == "f16":
                return f"vloada_half4(0, {base} + {i})"
            if b.dtype == "bf16":
                return f"as_float4(convert_uint4(*(__global ushort4*)({base} + {i})) << 16)"
            if b.dtype == "i8":
                return f"convert_float4(*(__global char4*)({base} + {i}))"
            return f"(*(__global {self.type(b.dtype, 4)}*)({base} + {i}))"
        if b.dtype == "f16":
            return f"vload_half({i}, {base})"
        if b.dtype == "bf16":
            return f"as_float((uint){base}[{i}] << 16)"
        if b.dtype == "i8":
            return f"(float){base}[{i}]"
        return f"{base}[{i}]"

    def _load_wgsl(self, b: BufferDecl, array: str, i: str, width: int) -> str:
        atomic = b.vector == 1 and (b.mode == "a" or (b.mode != "r" and b.dtype in ("f16", "bf16")))

        def word(k: str) -> str:
            return f"atomicLoad(&{array}[{k}])" if atomic else f"{array}[{k}]"

        if b.vector == 4:
            w = f"{array}[({i}) >> 2u]"
            if b.dtype in ("f16", "bf16", "i8"):
                self._wgsl_unpack(b.dtype)
                vec = f"unpack4_{b.dtype}({w})"
            else:
                vec = w
            return vec if width == 4 else f"{vec}[({i}) & 3u]"
        if width == 4:
            name = self.let(self.fresh("i"), i)
            return self.vector([self._load_wgsl(b, array, f"{name} + {j}u", 1) for j in range(4)], ACCUMULATOR[b.dtype])
        if b.dtype == "f16":
            return f"unpack2x16float({word(f'({i}) >> 1u')} >> ((({i}) & 1u) * 16u)).x"
        if b.dtype == "bf16":
            return f"bitcast<f32>(({word(f'({i}) >> 1u')} >> ((({i}) & 1u) * 16u)) << 16u)"
        if b.dtype == "i8":
            return f"f32(bitcast<i32>({word(f'({i}) >> 2u')} << (24u - (({i}) & 3u) * 8u)) >> 24u)"
        if b.dtype in ("f64", "i64"):
            self._wgsl_wide(b.dtype)
            return f"from_words_{b.dtype}({word(i)})"
        return word(i)

    def _load_windows(self, b: BufferDecl, i: str, width: int) -> str:
        """A load from a buffer of several bindings goes through a function that selects the window."""
        name = f"{b.name}_window{width}"
        if name not in self.module:
            t = self.type(ACCUMULATOR[b.dtype], width)
            from ..kernel import itemsize

            per = self.target.max_binding // itemsize(b.dtype)
            lines, plain = [f"fn {name}(i: u32) -> {t} {{"], replace(b, windows=1)
            saved, self.lines = self.lines, []
            for w in range(b.windows):
                at = self._load_wgsl(plain, f"{b.name}_{w}", f"(i - {w * per}u)", width)
                body = "".join(self.lines) + f"return {at};"
                self.lines = []
                lines.append(f"if (i < {(w + 1) * per}u) {{ {body} }}" if w + 1 < b.windows else body)
            self.lines = saved
            self.module[name] = "\n".join([*lines, "}"])
        return f"{name}({i})"

    def _wgsl_unpack(self, dtype: str) -> None:
        words = "u32" if dtype == "i8" else "vec2<u32>"
        if dtype == "f16":
            body = "return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));"
        elif dtype == "i8":
            body = "return vec4<f32>(bitcast<vec4<i32>>(vec4<u32>(w << 24u, w << 16u, w << 8u, w)) >> vec4<u32>(24u));"
        else:
            body = "return bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u));"
        self.module.setdefault(f"unpack4_{dtype}", f"fn unpack4_{dtype}(w: {words}) -> vec4<f32> {{ {body} }}")

    def _wgsl_wide(self, dtype: str) -> None:
        self.module.setdefault(
            f"wide_{dtype}",
            f"fn from_words_{dtype}(w: vec2<u32>) -> {dtype} {{ "
            f"return bitcast<{dtype}>(u64(w.x) | (u64(w.y) << 32u)); }}\n"
            f"fn to_words_{dtype}(v: {dtype}) -> vec2<u32> {{ let u = bitcast<u64>(v); "
            "return vec2<u32>(u32(u & 0xfffffffflu), u32(u >> 32u)); }",
        )

    def store(self, buffer: str, base: str, index: str, value: str, width: int = 1) -> None:
        """Stores one element, or four (index and base divisible by 4). Narrow dtypes: one word, or an atomicXor of a
        half word."""
        b = self.decl(buffer)
        self.function(f"to_{b.dtype}")
        if not self.wgsl:
            if width == 4:
                if b.dtype == "f16":
                    self.add(f"vstorea_half4_rte({value}, 0, {base} + {index});")
                elif b.dtype == "bf16":
                    v = self.let(self.fresh("v"), value, "f32", 4)
                    parts = ", ".join(f"to_bf16({v}.{c})" for c in COMPONENTS)
                    self.add(f"*(__global ushort4*)({base} + {index}) = (ushort4)({parts});")
                else:
                    self.add(f"*(__global {self.type(b.dtype, 4)}*)({base} + {index}) = {value};")
            elif b.dtype == "f16":
                self.add(f"vstore_half_rte({value}, {index}, {base});")
            else:
                self.add(f"{base}[{index}] = {f'to_bf16({value})' if b.dtype == 'bf16' else value};")
            return
        if b.windows > 1:
            raise Unsupported(f"{self.name}: the result spans several bindings")
        i = f"{base} + {index}"
        if b.vector == 4:
            assert width == 4
            if b.dtype in ("f16", "bf16"):
                v = self.let(self.fresh("v"), value)
                h = [f"to_{b.dtype}({v}.{c})" for c in COMPONENTS]
                value = f"vec2<u32>({h[0]} | ({h[1]} << 16u), {h[2]} | ({h[3]} << 16u))"
            self.add(f"{b.name}[({i}) >> 2u] = {value};")
            return
        if width == 4:
            v = self.let(self.fresh("v"), value)
            for j, c in enumerate(COMPONENTS):
                self.store(buffer, base, f"{index} + {j}u", f"{v}.{c}")
            return
        if b.dtype in ("f16", "bf16"):  # the other half of the word belongs to another invocation
            self.module.setdefault(
                f"store16_{b.name}",
                f"fn store16_{b.name}(i: u32, h: u32) {{ "
                f"let s = (i & 1u) * 16u; let old = atomicLoad(&{b.name}[i >> 1u]); "
                f"atomicXor(&{b.name}[i >> 1u], (old ^ (h << s)) & (0xffffu << s)); }}",
            )
            self.add(f"store16_{b.name}({i}, to_{b.dtype}({value}));")
        elif b.dtype in ("f64", "i64"):
            self._wgsl_wide(b.dtype)
            self.add(f"{b.name}[{i}] = to_words_{b.dtype}({value});")
        else:
            self.add(f"{b.name}[{i}] = {value};")

    def put_component(self, shared: str, vector_index: str, component: str, value: str, dtype: str) -> None:
        """shared[vector_index][component] = value, with a run-time component."""
        if self.wgsl:
            self.add(f"{shared}[{vector_index}][{component}] = {value};")
        else:
            self.add(f"((__local {_CL[dtype]}*){shared})[({vector_index}) * 4u + {component}] = {value};")

    def get_component(self, shared: str, index: str, dtype: str) -> str:
        """Element `index` of a shared array of vec4."""
        if self.wgsl:
            return f"{shared}[({index}) >> 2u][({index}) & 3u]"
        return f"((__local {_CL[dtype]}*){shared})[{index}]"

    def finish(self) -> Kernel:
        """The kernel. trusted: every load of a template is clamped or guarded, every store masked, so indices stay
        within what sizes and strides describe; the tests run with the checks on."""
        prefix, suffix, kernel = header(
            self.target,
            self.name,
            self.buffers,
            self.scalars,
            (self.threads, 1, 1),
            module="\n".join(self.module.values()),
            trusted=True,
            subgroups=self.subgroups,
        )
        start = [] if self.wgsl else ["const uint lid = get_local_id(0);"]
        source = prefix + "\n".join(self.shared_lines + start + self.lines) + "\n" + suffix
        return replace(kernel, source=source)
