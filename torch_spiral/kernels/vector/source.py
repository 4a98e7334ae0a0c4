"""What the `vector` templates share: types, loads and stores of every storage dtype, transposes, epilogues, kernel signatures.

The templates are for OpenCL on CPU devices: one invocation works on a large tile with explicit vectors, without barriers.
"""
# ruff: noqa: PERF401 (lines of kernel text)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from ..emit import header
from ..functions import EXP32, LN2, split
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
float{n} exp_{m}(float{n} x) {{  // as _exp32 in functions.py
  float{n} t = select(x, (float{n})(89.f), x > (float{n})(89.f)); t = select(t, (float{n})(-87.5f), t < (float{n})(-87.5f));
  const int{n} shifted = as_int{n}(fma(t, (float{n})(1.44269502f), (float{n})(12582912.f)));
  const float{n} r = convert_float{n}(shifted - (int{n})(0x4B400000));
  t = fma(r, (float{n})({minus_lo!r}f), fma(r, (float{n})({minus_hi!r}f), t));
  return ({series}) * as_float{n}((shifted + (int{n})(126)) << 23);
}}
float{n} tanh_{m}(float{n} x) {{
  float{n} a = fabs(x), e = exp_{m}(-2.f * a), big = (1.f - e) / (1.f + e), s = x * x;
  float{n} q = fma(s, (float{n})(-5.70498872745e-3f), (float{n})(2.06390887954e-2f));
  q = fma(s, q, (float{n})(-5.37397155531e-2f)); q = fma(s, q, (float{n})(1.33314422036e-1f));
  q = fma(s, q, (float{n})(-3.33332819422e-1f)); q = fma(s * x, q, x);
  return select(copysign(big, x), q, a < 0.625f);
}}
float{n} gelu_{m}(float{n} x) {{  // x Phi(x), the normal distribution's tail being exp(-x x / 2) times a series in t
  const float{n} t = 1.f / fma(fabs(x), (float{n})({rate!r}f), (float{n})(1.f));
  const float{n} tail = t * ({mills}) * exp_{m}(-0.5f * x * x);
  return x * select(1.f - tail, tail, x < (float{n})(0.f));
}}
"""
# erfc(x / sqrt(2)) exp(x x / 2) / 2 in t = 1 / (1 + MILLS_RATE x): fitted, so that the tail's absolute error is 1e-8.
MILLS_RATE = 0.28
MILLS = (0.116729289, 0.066228494, 0.271974891, -0.240672618, 0.392068982, -0.106329039)


def _series(x: str, coefficients: Sequence[float], type_: str) -> str:
    text = f"({type_})({coefficients[-1]!r}f)"
    for c in reversed(coefficients[:-1]):
        text = f"fma({text}, {x}, ({type_})({c!r}f))"
    return text


def math_functions(w: int) -> str:
    """exp_, tanh_ and gelu_ on float (suffix 1) and float{w}: the libraries' scalar versions do not vectorise."""
    hi, lo = split(LN2, "f32", 14, 2)
    return "".join(
        EXP.format(
            n=n, m=n or 1, minus_hi=-hi, minus_lo=-lo, series=_series("t", [2.0 * c for c in EXP32], f"float{n}"),
            rate=MILLS_RATE, mills=_series("t", MILLS, f"float{n}"),
        )
        for n in ("", w)
    )  # fmt: skip


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
        "gelu": lambda: f"gelu_{m}({x})",
        # x times the sigmoid of twice what the hyperbolic tangent is of
        "gelu_tanh": lambda: f"({x} / (1.f + exp_{m}(-1.59576912f * {x} - 0.0713548163f * {x} * {x} * {x})))",
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
