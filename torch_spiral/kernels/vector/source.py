"""What the `vector` templates share: types, loads and stores of every storage dtype, transposes, epilogues, kernel signatures.

The templates are for OpenCL on CPU devices: one invocation works on a large tile with explicit vectors, without barriers.
"""
# ruff: noqa: PERF401 (lines of kernel text)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from ..emit import header
from ..kernel import DTYPES, Kernel, Target
from ..opencl import POINTEE

ACTIVATIONS = ("relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid")


def compute_dtype(dtype: str) -> str:
    """The dtype a contraction accumulates in, for operands stored as `dtype`; bool counts as an integer."""
    return "i32" if dtype == "bool" else DTYPES[dtype].compute


@cache
def vector_width() -> int:
    """float32 lanes of the CPU's registers: the device is the host."""
    import torch

    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability().upper() else 8


def lanes(width: int, compute: str) -> int:
    """Vector lanes of a compute dtype on a device with `width` float lanes."""
    return width if compute in ("f32", "i32") else max(2, width // 2)


def prelude(compute: str, w: int, storages: tuple[str, ...]) -> str:
    """Types T (scalar), V (vector), U (int vector as wide as V); loads and stores LD_/ST_ (scalar), LDV_/STV_ (w lanes) per dtype."""
    t = POINTEE[compute]
    out = [
        '#define UNROLL _Pragma("unroll")',
        # The standard's prefetch() does nothing in PoCL.
        "#ifdef __has_builtin\n#if __has_builtin(__builtin_prefetch)\n"
        "#define PREFETCH(p) __builtin_prefetch((const void*)(size_t)(p))\n#endif\n#endif\n"
        "#ifndef PREFETCH\n#define PREFETCH(p) prefetch(p, 1)\n#endif",
        f"typedef {t} T; typedef {t}{w} V; typedef {'long' if t in ('double', 'long') else 'int'}{w} U;",
    ]
    if compute in ("f32", "f64"):
        out.append("#define FMA(a, b, c) fma(a, b, c)")
    else:
        out.append("#define FMA(a, b, c) ((a) * (b) + (c))")
    # load<n>, store<n> are vload<n>, vstore<n> on T: PoCL's own become half-width pieces where LLVM cannot merge them.
    for n in sorted({w, min(w, 8)}):
        out.append(f"typedef {t}{n} V{n}_unaligned __attribute__((aligned({8 if t in ('double', 'long') else 4})));")
        for space in ("__global", "__private"):
            out.append(
                f"{t}{n} __attribute__((overloadable)) load{n}(size_t i, const {space} T* p) {{ return *(const {space} V{n}_unaligned*)(p + i * {n}); }}\n"
                f"void __attribute__((overloadable)) store{n}({t}{n} v, size_t i, {space} T* p) {{ *({space} V{n}_unaligned*)(p + i * {n}) = v; }}"
            )
    h = w // 2
    out.append(
        f"T vsum(V v) {{ {t}{h} h = v.lo + v.hi; "
        + (
            "".join(
                f"{t}{n} h{n} = {'h' if n * 2 == h else f'h{n * 2}'}.lo + {'h' if n * 2 == h else f'h{n * 2}'}.hi; "
                for n in (4, 2)
                if n < h
            )
        )
        + f"return {'h' if h == 2 else 'h2'}.x + {'h' if h == 2 else 'h2'}.y; }}"
        if w > 2
        else "T vsum(V v) { return v.x + v.y; }"
    )
    for s in dict.fromkeys((compute, *storages)):
        c = POINTEE[s]
        if s == compute:
            out.append(
                f"#define LD_{s}(p) (*(p))\n#define ST_{s}(p, v) (*(p) = (v))\n"
                f"#define LDV_{s}(p) load{w}(0, p)\n#define STV_{s}(p, v) store{w}(v, 0, p)"
            )
        elif s == "f16":
            out.append(
                f"#define LD_f16(p) ((T)vload_half(0, p))\n#define ST_f16(p, v) vstore_half_rte((float)(v), 0, p)\n"
                f"#define LDV_f16(p) convert_{t}{w}(vload_half{w}(0, p))\n"
                f"#define STV_f16(p, v) vstore_half{w}_rte(convert_float{w}(v), 0, p)"
            )
        elif s == "bf16":
            for m in (1, w):
                size = "" if m == 1 else str(m)
                out.append(
                    f"ushort{size} to_bf16_{m}(float{size} f) {{ uint{size} u = as_uint{size}(f); "
                    f"return convert_ushort{size}(select((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, (uint{size})(0x7fc0u), "
                    f"{'as_uint(isnan(f))' if m == 1 else f'as_uint{size}(isnan(f))'})); }}"
                )
            out.append(
                f"#define LD_bf16(p) ((T)as_float((uint)*(p) << 16))\n#define ST_bf16(p, v) (*(p) = to_bf16_1((float)(v)))\n"
                f"#define LDV_bf16(p) convert_{t}{w}(as_float{w}(convert_uint{w}(vload{w}(0, p)) << 16))\n"
                f"#define STV_bf16(p, v) vstore{w}(to_bf16_{w}(convert_float{w}(v)), 0, p)"
            )
        else:
            put = "(v) != 0" if s == "bool" else "v"
            vput = f"(v) != (V)(0)) & (uchar{w})(1)" if s == "bool" else "v)"
            out.append(
                f"#define LD_{s}(p) ((T)*(p))\n#define ST_{s}(p, v) (*(p) = ({c})({put}))\n"
                f"#define LDV_{s}(p) convert_{t}{w}(vload{w}(0, p))\n"
                f"#define STV_{s}(p, v) vstore{w}(convert_{c}{w}({vput}, 0, p)"
            )
    return "\n".join(out) + "\n"


EXP = r"""
float{n} exp_{m}(float{n} x) {{  // 2^n * p(f), relative error 2e-7; below -87.3 it is 0, NaN and infinity propagate
  float{n} t = clamp(x * 1.44269504f, (float{n})(-126.f), (float{n})(127.99f)), r = rint(t);
  float{n} f = fma(r, (float{n})(-1.42860677e-6f), fma(r, (float{n})(-0.693145752f), clamp(x, (float{n})(-87.33654f), (float{n})(88.72f))));
  float{n} p = fma(f, (float{n})(1.9875691500e-4f), (float{n})(1.3981999507e-3f));
  p = fma(f, p, (float{n})(8.3334519073e-3f)); p = fma(f, p, (float{n})(4.1665795894e-2f)); p = fma(f, p, (float{n})(1.6666665459e-1f));
  p = fma(f, p, (float{n})(5.0000001201e-1f)); p = fma(f * f, p, f) + 1.f;
  p *= as_float{n}((convert_int{n}(r) + 126) << 23); p *= 2.f;
  p = select(p, (float{n})(0.f), x < -87.33654f); p = select(p, (float{n})(INFINITY), x > 88.72283f);
  return select(p, x, {isnan});
}}
float{n} tanh_{m}(float{n} x) {{
  float{n} a = fabs(x), e = exp_{m}(-2.f * a), big = (1.f - e) / (1.f + e), s = x * x;
  float{n} q = fma(s, (float{n})(-5.70498872745e-3f), (float{n})(2.06390887954e-2f));
  q = fma(s, q, (float{n})(-5.37397155531e-2f)); q = fma(s, q, (float{n})(1.33314422036e-1f));
  q = fma(s, q, (float{n})(-3.33332819422e-1f)); q = fma(s * x, q, x);
  return select(copysign(big, x), q, a < 0.625f);
}}
float{n} erf_{m}(float{n} x) {{  // Abramowitz-Stegun 7.1.26 loses digits near 0: two polynomials, fitted, absolute error 2e-7
  float{n} a = fabs(x), s = x * x;
  float{n} p = fma(s, (float{n})(-5.96761703e-4f), (float{n})(4.99119423e-3f));
  p = fma(s, p, (float{n})(-2.67681349e-2f)); p = fma(s, p, (float{n})(1.12819925e-1f));
  p = fma(s, p, (float{n})(-3.76125336e-1f)); p = fma(s, p, (float{n})(1.28379166e-1f)); p = fma(x, p, x);
  float{n} t = 1.f / fma(a, (float{n})(0.3275911f), (float{n})(1.f));
  float{n} q = fma(t, (float{n})(1.061405429f), (float{n})(-1.453152027f)); q = fma(t, q, (float{n})(1.421413741f));
  q = fma(t, q, (float{n})(-0.284496736f)); q = fma(t, q, (float{n})(0.254829592f)); q = 1.f - q * t * exp_{m}(-s);
  return select(copysign(q, x), p, a < 0.921875f);
}}
"""


def math_functions(w: int) -> str:
    """exp_, tanh_ and erf_ on float (suffix 1) and float{w}: the libraries' scalar versions do not vectorise."""
    return "".join(EXP.format(n=n, m=n or 1, isnan="as_int(isnan(x))" if not n else "isnan(x)") for n in ("", w))


def activation(name: str, x: str, m: int) -> str:
    """OpenCL text of an activation at width m (1: scalar); NaN propagates."""
    t = "T" if m == 1 else "V"
    sel = (lambda a, b, c: f"(({c}) ? {b} : {a})") if m == 1 else (lambda a, b, c: f"select({a}, {b}, {c})")
    if name == "relu":
        return sel(x, f"({t})(0)", f"{x} < ({t})(0)")
    hs = sel(f"({sel(f'({x} * (1.f/6.f) + 0.5f)', f'({t})(1)', f'{x} > ({t})(3)')})", f"({t})(0)", f"{x} < ({t})(-3)")
    return {
        "relu6": lambda: sel(sel(x, f"({t})(6)", f"{x} > ({t})(6)"), f"({t})(0)", f"{x} < ({t})(0)"),
        "hardsigmoid": lambda: hs,
        "hardswish": lambda: f"({x} * {hs})",
        "sigmoid": lambda: f"(1.f / (1.f + exp_{m}(-{x})))",
        "silu": lambda: f"({x} / (1.f + exp_{m}(-{x})))",
        "tanh": lambda: f"tanh_{m}({x})",
        "gelu": lambda: f"(0.5f * {x} * (1.f + erf_{m}({x} * 0.70710678f)))",
        "gelu_tanh": lambda: f"(0.5f * {x} * (1.f + tanh_{m}(0.79788456f * ({x} + 0.044715f * {x} * {x} * {x}))))",
    }[name]()


def transpose(w: int, src: list[str], dst: list[str], vec: str) -> str:
    """Statements that transpose w vectors of w lanes (w 2, 4 or 8) by two-source shuffles."""
    if w == 2:
        return f"{vec} {dst[0]} = ({vec})({src[0]}.x, {src[1]}.x), {dst[1]} = ({vec})({src[0]}.y, {src[1]}.y);\n"
    out, a = [], src

    def let(name, *parts):
        out.append(f"{vec} {name} = ({vec})({', '.join(parts)});")
        return name

    lo, hi = [], []
    for i in range(0, w, 2):
        p, q = a[i], a[i + 1]
        ls = [0, 1, 4, 5] if w == 8 else [0, 2]
        hs = [2, 3, 6, 7] if w == 8 else [1, 3]
        lo.append(let(f"{dst[0]}l{i}", *(f"{x}.s{j}" for j in ls for x in (p, q))))
        hi.append(let(f"{dst[0]}h{i}", *(f"{x}.s{j}" for j in hs for x in (p, q))))
    if w == 4:
        for i, (x, y) in enumerate((lo, hi)):
            let(dst[i], f"{x}.lo", f"{y}.lo")
            let(dst[i + 2], f"{x}.hi", f"{y}.hi")
        return "\n".join(out) + "\n"
    halves = []
    for g in (0, 2):
        halves.append(
            [
                let(f"{dst[0]}v{g}{j}", f"{s[g]}.s{c}", f"{s[g + 1]}.s{c}", f"{s[g]}.s{d}", f"{s[g + 1]}.s{d}")
                for j, (s, c, d) in enumerate(((lo, "01", "45"), (lo, "23", "67"), (hi, "01", "45"), (hi, "23", "67")))
            ]
        )
    for j in range(4):
        let(dst[j], f"{halves[0][j]}.lo", f"{halves[1][j]}.lo")
        let(dst[j + 4], f"{halves[0][j]}.hi", f"{halves[1][j]}.hi")
    return "\n".join(out) + "\n"


def finish(
    target: Target,
    name: str,
    buffers: Sequence[tuple],
    scalars: Sequence[tuple],
    module: str,
    body: str,
) -> Kernel:
    """A kernel of one invocation a workgroup, from its body."""
    prefix, suffix, kernel = header(target, name, list(buffers), list(scalars), (1, 1, 1), module=module)
    return replace(kernel, source=prefix + body + suffix)
