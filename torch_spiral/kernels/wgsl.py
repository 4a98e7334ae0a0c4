"""WGSL, as naga (wgpu-native) takes it."""

from __future__ import annotations

import math
import struct

from .emit import BufferDecl, Emitter, Language, Options, ScalarDecl
from .ir import FLOATS, Node, bitcast, cast, const_value, ne, shl, shr
from .kernel import DTYPES, NARROW_FLOATS, Kernel, Target, Unsupported

ELEMENT = {
    "f32": "f32", "i32": "i32", "u32": "u32", "i64": "vec2<u32>", "u64": "vec2<u32>", "f64": "vec2<u32>",
    "c64": "vec2<f32>", "c128": "vec4<u32>", "b128": "vec4<u32>",
}  # fmt: skip

VECTOR4 = {
    "f32": "vec4<f32>",
    "i32": "vec4<i32>",
    "u32": "vec4<u32>",
    "f16": "vec2<u32>",
    "bf16": "vec2<u32>",
    "i8": "u32",
}


def is_atomic(b: BufferDecl) -> bool:
    """Whether the buffer's words are atomic<u32>: those of elements narrower than a word are, where they are stored."""
    return b.mode == "a" or (b.mode != "r" and DTYPES[b.dtype].size < 4)


INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "idiv": "/", "and": "&", "or": "|", "xor": "^",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
# What every driver computes well enough; the rest is lowered.
NATIVE = {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "round", "sqrt": "sqrt"}
SUFFIX = {"i32": "i", "u32": "u", "i64": "li", "u64": "lu"}

# By NVIDIA's exp2, which is good to 2 units in the last place (Vulkan allows hundreds), with the rounding error of x * log2(e)
# made up for; where the result overflows or vanishes there is none. exp2 may lose NaN.
EXP = """fn native_exp(x: f32) -> f32 {
  let t = x * 1.44269504f;
  let rest = fma(x, 1.44269504f, -t) + x * 1.92596303e-8f;
  let y = exp2(t);
  let z = select(y, fma(y, rest * 0.693147182f, y), abs(x) < 88.7228f);
  return select(z, x, (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u);
}"""
# b where it is NaN. Drivers make minima and maxima that drop NaN of select(b, a, a < b).
OR_NAN = """fn or_nan(y: f32, b: f32) -> f32 {
  return select(y, b, (bitcast<u32>(b) & 0x7fffffffu) > 0x7f800000u);
}"""

# 64-bit integers as vec2<u32>, low word first.
EMULATED = {
    "i64_add": """fn i64_add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  let low = a.x + b.x;
  return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < a.x));
}""",
    "i64_sub": """fn i64_sub(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}""",
    "i64_mul": """fn i64_mul(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  let al = a.x & 0xffffu; let ah = a.x >> 16u; let bl = b.x & 0xffffu; let bh = b.x >> 16u;
  let ll = al * bl; let lh = al * bh; let hl = ah * bl;
  let mid = (ll >> 16u) + (lh & 0xffffu) + (hl & 0xffffu);
  let high = ah * bh + (lh >> 16u) + (hl >> 16u) + (mid >> 16u);
  return vec2<u32>(a.x * b.x, high + a.x * b.y + a.y * b.x);
}""",
    "u64_lt": """fn u64_lt(a: vec2<u32>, b: vec2<u32>) -> bool {
  return a.y < b.y || (a.y == b.y && a.x < b.x);
}""",
    "i64_lt": """fn i64_lt(a: vec2<u32>, b: vec2<u32>) -> bool {
  return bitcast<i32>(a.y) < bitcast<i32>(b.y) || (a.y == b.y && a.x < b.x);
}""",
    "i64_shl": """fn i64_shl(a: vec2<u32>, n: u32) -> vec2<u32> {
  if (n == 0u) { return a; }
  if (n >= 32u) { return vec2<u32>(0u, a.x << (n - 32u)); }
  return vec2<u32>(a.x << n, (a.y << n) | (a.x >> (32u - n)));
}""",
    "u64_shr": """fn u64_shr(a: vec2<u32>, n: u32) -> vec2<u32> {
  if (n == 0u) { return a; }
  if (n >= 32u) { return vec2<u32>(a.y >> (n - 32u), 0u); }
  return vec2<u32>((a.x >> n) | (a.y << (32u - n)), a.y >> n);
}""",
    "i64_shr": """fn i64_shr(a: vec2<u32>, n: u32) -> vec2<u32> {
  let high = bitcast<i32>(a.y);
  if (n == 0u) { return a; }
  if (n >= 32u) { return vec2<u32>(bitcast<u32>(high >> (n - 32u)), bitcast<u32>(high >> 31u)); }
  return vec2<u32>((a.x >> n) | (a.y << (32u - n)), bitcast<u32>(high >> n));
}""",
    "u64_divide": """fn u64_divide(a: vec2<u32>, b: vec2<u32>) -> vec4<u32> {
  if (a.y == 0u && b.y == 0u) { return vec4<u32>(a.x / b.x, 0u, a.x - b.x * (a.x / b.x), 0u); }
  var q = vec2<u32>(0u, 0u); var r = vec2<u32>(0u, 0u);
  for (var i = 63i; i >= 0i; i = i - 1i) {
    let top = r.y >> 31u;
    let word = select(a.x, a.y, i >= 32i);
    r = vec2<u32>((r.x << 1u) | ((word >> (u32(i) & 31u)) & 1u), (r.y << 1u) | (r.x >> 31u));
    if (top == 1u || r.y > b.y || (r.y == b.y && r.x >= b.x)) {
      r = vec2<u32>(r.x - b.x, r.y - b.y - select(0u, 1u, r.x < b.x));
      if (i >= 32i) { q.y = q.y | (1u << (u32(i) & 31u)); } else { q.x = q.x | (1u << u32(i)); }
    }
  }
  return vec4<u32>(q, r);
}""",
    "i64_neg": """fn i64_neg(a: vec2<u32>) -> vec2<u32> {
  return vec2<u32>(0u - a.x, 0u - a.y - select(0u, 1u, a.x != 0u));
}""",
    "i64_abs": """fn i64_abs(a: vec2<u32>) -> vec2<u32> {
  return select(a, vec2<u32>(0u - a.x, 0u - a.y - select(0u, 1u, a.x != 0u)), bitcast<i32>(a.y) < 0i);
}""",
    "u64_from_f32": """fn u64_from_f32(x: f32) -> vec2<u32> {
  if (!(x > 0.0f)) { return vec2<u32>(0u, 0u); }
  if (x >= 1.8446744e19f) { return vec2<u32>(0xffffffffu, 0xffffffffu); }
  let t = trunc(x);
  let high = floor(t * 2.3283064e-10f);
  return vec2<u32>(u32(t - high * 4294967296.0f), u32(high));
}""",
    "u64_to_f32": """fn u64_to_f32(a: vec2<u32>) -> f32 {
  if (a.y == 0u) { return f32(a.x); }
  // The upper 32 significant bits, the lowest of them sticky: then one rounding, in f32().
  let n = countLeadingZeros(a.y);
  let high = select((a.y << n) | (a.x >> (32u - n)), a.y, n == 0u);
  let rest = a.x << n;
  return f32(high | select(0u, 1u, rest != 0u)) * bitcast<f32>((32u - n + 127u) << 23u);
}""",
}


class Wgsl(Language):
    """64-bit integers are i64 and u64 where the target computes with them, else vec2<u32>. One lane only."""

    name = "wgsl"
    barrier = "workgroupBarrier();"
    memory_barrier = "workgroupBarrier(); storageBarrier();"
    loop = "loop"

    def type(self, target: Target, dtype: str, lanes: int) -> str:
        if lanes > 1:
            raise ValueError("WGSL kernels compute one lane at a time")
        if dtype == "f64" and not target.float64:
            raise Unsupported("this device has no float64 arithmetic")
        return "vec2<u32>" if dtype in ("i64", "u64") and not target.int64 else dtype

    def const(self, target: Target, node: Node) -> str:
        v, dtype = const_value(node), node.dtype
        if dtype == "f32":
            bits = struct.unpack("<I", struct.pack("<f", v))[0]
            if not math.isfinite(v) or (v == 0 and bits) or 0 < abs(v) < 1.2e-38:
                return f"bitcast<f32>(0x{bits:x}u)"
            return f"{v:.9g}f" if v >= 0 else f"({v:.9g}f)"
        if dtype == "f64":
            if not math.isfinite(v) or (v == 0 and math.copysign(1, v) < 0) or 0 < abs(v) < 2.3e-308:
                return f"bitcast<f64>(0x{struct.unpack('<Q', struct.pack('<d', v))[0]:x}lu)"
            return f"{v!r}lf" if v >= 0 else f"({v!r}lf)"
        if dtype == "bool":
            return "true" if v else "false"
        if dtype in ("i64", "u64") and not target.int64:
            return f"vec2<u32>(0x{v & 0xFFFFFFFF:x}u, 0x{(v >> 32) & 0xFFFFFFFF:x}u)"
        s = SUFFIX[dtype]
        return f"{v}{s}" if v >= 0 else f"(-{-v - 1}{s} - 1{s})"

    def splat(self, type_: str, text: str) -> str:
        return text

    def let(self, type_: str, name: str, text: str) -> str:
        return f"let {name}: {type_} = {text};"

    def var(self, type_: str, name: str, text: str) -> str:
        return f"var {name}: {type_} = {text};"

    def function(self, name: str, result: str, params: list[tuple[str, str]], body: list[str]) -> str:
        return f"fn {name}({', '.join(f'{n}: {t}' for t, n in params)}) -> {result} {{\n" + "\n".join(body) + "\n}"

    def operation(self, k: Emitter, node: Node, args: list[str]) -> str | None:
        op, dtype = node.op, node.dtype
        source = node.args[0].dtype if node.args else dtype
        if not k.target.int64 and (dtype in ("i64", "u64") or source in ("i64", "u64")) and op != "where":
            return self._emulated(k, node, args)
        if op == "ne" and source in FLOATS:
            return f"!({args[0]} == {args[1]})"  # drivers compute != as "ordered and not equal"
        if op == "xor" and dtype == "bool":
            return f"{args[0]} != {args[1]}"
        if op in INFIX:
            return f"{args[0]} {INFIX[op]} {args[1]}"
        if op == "irem":
            return f"{args[0]} - {args[1]} * ({args[0]} / {args[1]})"
        if op == "not":
            return f"!{args[0]}" if dtype == "bool" else f"~{args[0]}"
        if op in ("shl", "shr"):
            return f"{args[0]} {'<<' if op == 'shl' else '>>'} {args[1]}"
        if op == "neg":
            return f"-{args[0]}" if dtype not in ("u32", "u64") else f"0{SUFFIX[dtype]} - {args[0]}"
        if op == "where":
            y = f"select({args[2]}, {args[1]}, {args[0]})"
            condition, a, b = node.args
            if (
                dtype == "f32"
                and condition.op in ("lt", "le", "gt", "ge")
                and {a, b} == {*condition.args}
                and b.op != "const"
            ):
                return f"{k.helper('or_nan', OR_NAN)}({y}, {args[2]})"
            return y
        if op == "cast":
            if source == "bool":
                zero, one = (self.const(k.target, Node("const", dtype, attr=a)) for a in self._bool_bits(dtype))
                return f"select({zero}, {one}, {args[0]})"
            return f"{dtype}({args[0]})"
        if op == "bitcast":
            return f"bitcast<{dtype}>({args[0]})"
        if op == "abs":
            if dtype == "i64":
                return f"select({args[0]}, -{args[0]}, {args[0]} < 0li)"
            return f"abs({args[0]})"
        if op in ("min", "max"):
            return f"select({args[1]}, {args[0]}, {args[0]} {'<' if op == 'min' else '>'} {args[1]})"
        if op == "fma":
            return f"{args[0]} * {args[1]} + {args[2]}"
        if op == "exp" and dtype == "f32" and k.target.vendor == "NVIDIA":
            return f"{k.helper('native_exp', EXP)}({args[0]})"
        if op in NATIVE and op != "sqrt" and dtype == "f64":  # lavapipe goes through integers
            return f"select({args[0]}, {NATIVE[op]}({args[0]}), abs({args[0]}) < 4503599627370496.0lf)"
        if op in NATIVE:
            return f"{NATIVE[op]}({args[0]})"
        return None

    @staticmethod
    def _bool_bits(dtype: str) -> tuple[int, int]:
        return (0, 0x3FF0000000000000) if dtype in FLOATS else (0, 1)

    def _emulated(self, k: Emitter, node: Node, args: list[str]) -> str:
        """Operations on 64-bit integers without shader-int64."""
        op, dtype = node.op, node.dtype
        source = node.args[0].dtype

        def call(name: str, *a: str) -> str:
            return f"{k.helper(name, EMULATED[name])}({', '.join(a)})"

        if op in ("add", "sub", "mul"):
            return call(f"i64_{op}", *args)
        if op == "fma":
            return call("i64_add", call("i64_mul", *args[:2]), args[2])
        if op in ("and", "or", "xor"):
            return f"{args[0]} {INFIX[op]} {args[1]}"
        if op == "not":
            return f"~{args[0]}"
        if op in ("neg", "abs"):
            return call(f"i64_{op}", *args)
        if op == "shl":
            return call("i64_shl", *args)
        if op == "shr":
            return call(f"{dtype}_shr", *args)
        if op in ("eq", "ne"):
            return f"{'all' if op == 'eq' else 'any'}({args[0]} {INFIX[op]} {args[1]})"
        if op in ("lt", "gt", "le", "ge"):
            less = call(f"{source}_lt", *(args if op in ("lt", "ge") else args[::-1]))
            return less if op in ("lt", "gt") else f"!{less}"
        if op in ("min", "max"):
            return f"select({args[1]}, {args[0]}, {call(f'{dtype}_lt', *(args if op == 'min' else args[::-1]))})"
        if op in ("idiv", "irem"):
            part = "xy" if op == "idiv" else "zw"
            if dtype == "u64":
                return f"{call('u64_divide', *args)}.{part}"
            q = f"{call('u64_divide', call('i64_abs', args[0]), call('i64_abs', args[1]))}.{part}"
            negative = f"(({args[0]}.y ^ {args[1]}.y) >> 31u) == 1u" if op == "idiv" else f"({args[0]}.y >> 31u) == 1u"
            return f"select({q}, {call('i64_neg', q)}, {negative})"
        if op == "bitcast":
            return args[0]
        if op == "cast":
            a = args[0]
            if source in ("i64", "u64"):
                if dtype in ("i64", "u64"):
                    return a
                if dtype in ("i32", "u32"):
                    return f"bitcast<i32>({a}.x)" if dtype == "i32" else f"{a}.x"
                if dtype != "f32":
                    raise Unsupported(f"{source} to {dtype} needs 64-bit integer arithmetic, which this device lacks")
                if source == "u64":
                    return call("u64_to_f32", a)
                positive = call("u64_to_f32", call("i64_abs", a))
                return f"select({positive}, -{positive}, ({a}.y >> 31u) == 1u)"
            if source == "bool":
                return f"vec2<u32>(select(0u, 1u, {a}), 0u)"
            if source == "u32":
                return f"vec2<u32>({a}, 0u)"
            if source == "i32":
                return f"vec2<u32>(bitcast<u32>({a}), bitcast<u32>({a} >> 31u))"
            if source == "f32":
                positive = call("u64_from_f32", f"abs({a})")
                return f"select({positive}, {call('i64_neg', positive)}, {a} < 0.0f)"
        raise Unsupported(f"{op} of {source} needs 64-bit integer arithmetic, which this device lacks")

    # ---- memory -----------------------------------------------------------------------------------------------

    def place(self, b: BufferDecl, index: str) -> str:
        """Text of the position of an element in the binding's array, in elements."""
        return f"{b.name}_offset + {index}"

    def reference(self, k: Emitter, b: BufferDecl, position: str) -> str:
        """The array element at a position, in units of the array."""
        if b.windows > 1:
            raise Unsupported(f"buffer {b.name}: atomic operations on a buffer of several bindings")
        return f"{b.name}[{position}]"

    def _read(self, k: Emitter, b: BufferDecl, position: str) -> str:
        """Text of an array element, by value."""
        if b.vector == 4:
            return self._component(b, position)
        if b.windows == 1:
            return f"atomicLoad(&{b.name}[{position}])" if is_atomic(b) else f"{b.name}[{position}]"
        element = self.element(k.target, b)
        per = self.window(k.target, b)
        body = [
            f"  if (i < {w + 1}u * {per}u) {{ return {b.name}_{w}[i - {w}u * {per}u]; }}" for w in range(b.windows - 1)
        ]
        body.append(f"  return {b.name}_{b.windows - 1}[i - {b.windows - 1}u * {per}u];")
        return (
            f"{k.helper(f'{b.name}_read', self.function(f'{b.name}_read', element, [('u32', 'i')], body))}({position})"
        )

    @staticmethod
    def _component(b: BufferDecl, position: str) -> str:
        """A word of a binding of vectors; position in words."""
        words = DTYPES[b.dtype].size
        return f"{b.name}[({position}) >> {words // 2}u][({position}) & {words - 1}u]"

    def window(self, target: Target, b: BufferDecl) -> int:
        """Array elements in one window."""
        return target.max_binding // max(4, DTYPES[b.dtype].size)

    def _write(self, k: Emitter, b: BufferDecl, position: str, text: str) -> None:
        if b.vector == 4:
            k.line(f"{self._component(b, position)} = {text};")
            return
        if b.windows == 1:
            k.line(
                f"atomicStore(&{b.name}[{position}], {text});" if is_atomic(b) else f"{b.name}[{position}] = {text};"
            )
            return
        if is_atomic(b):
            raise Unsupported(f"buffer {b.name}: stores of {b.dtype} to a buffer of several bindings")
        per, name = self.window(k.target, b), f"{b.name}_write"
        body = [
            f"  {'if' if not w else 'else if'} (i < {w + 1}u * {per}u) {{ {b.name}_{w}[i - {w}u * {per}u] = v; }}"
            for w in range(b.windows)
        ]
        text_ = f"fn {name}(i: u32, v: {self.element(k.target, b)}) {{\n" + "\n".join(body) + "\n}"
        k.line(f"{k.helper(name, text_)}({position}, {text});")

    def mix(self, k: Emitter, b: BufferDecl, word: str, bits: str, mask: str) -> None:
        """Replaces what `mask` covers of a word of a buffer of several bindings."""
        per, name = self.window(k.target, b), f"{b.name}_mix"
        body = []
        for w in range(b.windows):
            element = f"&{b.name}_{w}[i - {w}u * {per}u]"
            body += [
                f"  {'if' if not w else 'else if'} (i < {w + 1}u * {per}u) {{",
                f"    if (mask == 0xffffffffu) {{ atomicStore({element}, bits); return; }}",
                f"    var old = atomicLoad({element});",
                "    loop {",
                f"      let got = atomicCompareExchangeWeak({element}, old, (old & ~mask) | bits);",
                "      if (got.exchanged) { break; }",
                "      old = got.old_value;",
                "    }",
                "  }",
            ]
        text = f"fn {name}(i: u32, bits: u32, mask: u32) {{\n" + "\n".join(body) + "\n}"
        k.line(f"{k.helper(name, text)}({word}, {bits}, {mask});")

    def _join(self, k: Emitter, low: str, high: str, dtype: str) -> str:
        if dtype == "f64":
            if not k.target.float64:
                raise Unsupported("this device has no float64 arithmetic")
            return f"bitcast<f64>(u64({low}) | (u64({high}) << 32u))"
        if not k.target.int64:
            return f"vec2<u32>({low}, {high})"
        bits = f"(u64({low}) | (u64({high}) << 32u))"
        return bits if dtype == "u64" else f"bitcast<i64>({bits})"

    def _split(self, k: Emitter, v: Node) -> tuple[str, str]:
        """The two words of a 64-bit value."""
        a = k.value(v)
        if v.dtype != "f64" and not k.target.int64:
            return f"{a}.x", f"{a}.y"
        bits = k.value(k.tmp("u64", a if v.dtype == "u64" else f"bitcast<u64>({a})"))
        return f"u32({bits} & 0xfffffffflu)", f"u32({bits} >> 32u)"

    def load(self, k: Emitter, b: BufferDecl, index: str, lanes: int) -> list[Node]:
        """The element at index (text of a u32) as a node, or two for pairs."""
        d = DTYPES[b.dtype]
        at = k.fresh()
        k.line(f"let {at} = {self.place(b, index)};")
        if d.size < 4:
            per = 4 // d.size
            bits = 8 * d.size
            shift = {2: 1, 1: 2}[d.size]
            word = self._read(k, b, f"{at} >> {shift}u")
            raw = k.tmp("u32", f"({word} >> (({at} & {per - 1}u) * {bits}u)) & {(1 << bits) - 1}u")
            return [self.decode(b.dtype, raw)]
        if is_atomic(b) and d.size >= 8 and not self.element(k.target, b).endswith("64>"):
            words = [self._read(k, b, f"{d.size // 4}u * {at} + {i}u") for i in range(d.size // 4)]
        else:
            raw_ = k.fresh()
            k.line(f"let {raw_} = {self._read(k, b, at)};")
            if d.size == 4:
                element = self.element(k.target, b)
                if b.dtype == "c32":
                    low, high = k.tmp("u32", f"{raw_} & 0xffffu"), k.tmp("u32", f"{raw_} >> 16u")
                    return [self.decode("f16", low), self.decode("f16", high)]
                same = b.vector == 4 or element in (d.compute, f"atomic<{d.compute}>")
                return [k.tmp(d.compute, raw_ if same else f"bitcast<{d.compute}>({raw_})")]
            if self.element(k.target, b).endswith("64>"):  # a native 64-bit atomic
                return [k.tmp(d.compute, f"bitcast<f64>({raw_})" if d.compute == "f64" else raw_)]
            if b.dtype == "c64":
                return [k.tmp("f32", f"{raw_}.x"), k.tmp("f32", f"{raw_}.y")]
            words = [f"{raw_}.{c}" for c in "xyzw"[: d.size // 4]]
        if d.compute == "f32":
            return [k.tmp("f32", f"bitcast<f32>({w})") for w in words]
        return [k.tmp(d.compute, self._join(k, words[i], words[i + 1], d.compute)) for i in range(0, len(words), 2)]

    @staticmethod
    def decode(dtype: str, raw: Node) -> Node:
        """The compute value of an 8- or 16-bit element's bits."""
        if dtype in NARROW_FLOATS:
            return Node(f"{dtype}_decode", "f32", raw)
        if dtype == "bool":
            return ne(raw, 0)
        if dtype in ("u8", "u16"):
            return cast(raw, "i32")
        s = 32 - 8 * DTYPES[dtype].size
        return shr(bitcast(shl(raw, s), "i32"), s)

    @staticmethod
    def encode(dtype: str, v: Node) -> Node:
        """The bits, in a u32, of a compute value stored as an 8- or 16-bit element."""
        if dtype in NARROW_FLOATS:
            return Node(f"{dtype}_encode", "u32", v)
        if dtype == "bool":
            return cast(v, "u32")
        from .ir import and_

        return and_(cast(v, "u32"), (1 << 8 * DTYPES[dtype].size) - 1)

    def store(self, k: Emitter, b: BufferDecl, index: str, values: list[Node], lanes: int) -> None:
        """Stores compute-dtype values. Elements narrower than a word are exchanged in it until nobody came between, so
        that of several stores to one element (scattered by equal indices) one wins."""
        d = DTYPES[b.dtype]
        at = k.fresh()
        k.line(f"let {at} = {self.place(b, index)};")
        if d.size < 4:
            new = k.value(self.encode(b.dtype, values[0]))
            per, bits = 4 // d.size, 8 * d.size
            word, shift = f"{at} >> {per // 2}u", k.fresh()
            k.line(f"let {shift} = ({at} & {per - 1}u) * {bits}u;")
            if b.windows > 1:
                self.mix(k, b, word, f"{new} << {shift}", f"{(1 << bits) - 1}u << {shift}")
                return
            target = self.reference(k, b, word)
            old, got = k.fresh(), k.fresh()
            k.line(f"var {old} = atomicLoad(&{target});")
            k.line("loop {")
            k.line(
                f"  let {got} = atomicCompareExchangeWeak(&{target}, {old}, "
                f"insertBits({old}, {new}, {shift}, {bits}u));"
            )
            k.line(f"  if ({got}.exchanged) {{ break; }}")
            k.line(f"  {old} = {got}.old_value;")
            k.line("}")
            return
        element = self.element(k.target, b)
        if d.size == 4:
            if b.dtype == "c32":
                lo, hi = (k.value(self.encode("f16", v)) for v in values)
                text = f"{lo} | ({hi} << 16u)"
            else:
                text = k.value(values[0])
                if b.vector == 1 and element not in (d.compute, f"atomic<{d.compute}>"):
                    text = f"bitcast<u32>({text})"
            self._write(k, b, at, text)
            return
        if b.dtype == "c64" and not is_atomic(b):
            self._write(k, b, at, f"vec2<f32>({', '.join(k.value(v) for v in values)})")
            return
        if element.endswith("64>"):
            v = k.value(values[0])
            self._write(k, b, at, f"bitcast<u64>({v})" if d.compute == "f64" else v)
            return
        if d.compute == "f32":
            words = [f"bitcast<u32>({k.value(v)})" for v in values]
        else:
            words = [w for v in values for w in self._split(k, v)]
        if is_atomic(b):
            for i, w in enumerate(words):
                self._write(k, b, f"{len(words)}u * {at} + {i}u", w)
        else:
            self._write(k, b, at, f"vec{len(words)}<u32>({', '.join(words)})")

    def load4(self, k: Emitter, b: BufferDecl, index: str) -> list[Node]:
        d = DTYPES[b.dtype]
        if d.size == 4:
            raw = k.fresh()
            k.line(f"let {raw} = {b.name}[({self.place(b, index)}) >> 2u];")
            return [k.tmp(d.compute, f"{raw}.{c}") for c in "xyzw"]
        at, per, bits = k.fresh(), 4 // d.size, 8 * d.size
        k.line(f"let {at} = ({self.place(b, index)}) >> {per // 2}u;")
        if b.vector == 4:
            raw = k.fresh()
            k.line(f"let {raw} = {b.name}[{at} >> 1u];")
            words = [f"{raw}.x", f"{raw}.y"]
        else:
            words = [k.value(k.tmp("u32", self._read(k, b, f"{at} + {w}u"))) for w in range(d.size)]
        parts = [k.tmp("u32", f"extractBits({words[i // per]}, {i % per * bits}u, {bits}u)") for i in range(4)]
        return [self.decode(b.dtype, p) for p in parts]

    def store4(self, k: Emitter, b: BufferDecl, index: str, values: list[Node]) -> None:
        d = DTYPES[b.dtype]
        if d.size == 4:
            value = f"vec4<{d.compute}>({', '.join(k.value(v) for v in values)})"
            k.line(f"{b.name}[({self.place(b, index)}) >> 2u] = {value};")
            return
        at, per, bits = k.fresh(), 4 // d.size, 8 * d.size
        k.line(f"let {at} = ({self.place(b, index)}) >> {per // 2}u;")
        codes = [k.value(self.encode(b.dtype, v)) for v in values]
        for w in range(d.size):
            parts = [f"({c} << {i * bits}u)" if i else c for i, c in enumerate(codes[w * per : (w + 1) * per])]
            k.line(f"atomicStore(&{b.name}[{at} + {w}u], {' | '.join(parts)});")

    def misaligned(self, b: BufferDecl, index: str) -> str:
        return f"({self.place(b, index)}) & 3u"

    def immediate(self, target: Target, params_size: int) -> bool:
        return params_size <= target.max_params

    def element(self, target: Target, b: BufferDecl) -> str:
        """Type of the elements of a binding's array."""
        if b.vector == 4:
            return VECTOR4[b.dtype]
        if is_atomic(b):
            if b.dtype in ("i64", "u64", "f64") and target.int64_atomics:
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
