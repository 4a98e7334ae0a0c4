"""Matrix products for CPU devices: C[b] = epilogue(A[b] @ B[b]).

A task is one invocation. It takes a range of row panels (`mr` rows) and of column panels (`nr` columns); the grid says how many tasks
there are along each, and any grid is correct, so balancing is the caller's formula (`gemm_groups`). For every block of `kc`
of the reduction A is packed into private memory, so that the inner loop reads it as consecutive broadcasts. Partial sums of earlier
blocks wait in a private tile: C is written once, in its own dtype, and rounding errors grow with K / kc + kc only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernel import DTYPES, Kernel, Target
from ..opencl import POINTEE
from .source import (
    activation,
    compute_dtype,
    finish,
    lanes,
    math_functions,
    prelude,
    transpose,
    vector_width,
)


def cdiv(a: Any, b: Any) -> Any:
    """Ceiling of a / b, for int and Sym."""
    return (a + (b - 1)) // b


@dataclass(frozen=True)
class Schedule:
    """Register tile mr x (nv * w) of vectors with w lanes; mc x kc of A and mc x nc of C are private to a task."""

    w: int
    mr: int
    nv: int
    mc: int
    kc: int
    nc: int

    @property
    def nr(self) -> int:
        """Columns of a panel."""
        return self.nv * self.w

    def __str__(self) -> str:
        return f"w{self.w}r{self.mr}v{self.nv}m{self.mc}k{self.kc}n{self.nc}"


def schedule(compute: str = "f32", width: int | None = None) -> Schedule:
    """The default schedule of a compute dtype: 24 accumulators of 32 registers with AVX-512, 12 of 16 with AVX2."""
    width = width or vector_width()
    if width == 16 or compute not in ("f32", "f64"):  # integers need a register for their products
        return block_schedule(compute, width)
    # Four rows by three vectors take fewer loads than six by two, and leave fewer rows over.
    return Schedule(lanes(width, compute), 4, 3, 256, 128, 66 * lanes(width, compute))


def block_schedule(compute: str = "f32", width: int | None = None) -> Schedule:
    """The schedule of kernels whose blocks have a power of two of columns (attention, convolution)."""
    width = width or vector_width()
    nv = 4 if width == 16 else 2
    return Schedule(lanes(width, compute), 6, nv, 192 if nv == 2 else 96, 128, 512)


def candidates(compute: str = "f32", width: int | None = None) -> list[Schedule]:
    """What a tuner may choose from: register tiles that leave room for operands, and how much of A and C a task keeps."""
    s = schedule(compute, width)
    registers = 32 if (width or vector_width()) == 16 else 16
    tiles = [
        (mr, nv)
        for nv in (1, 2, 3, 4, 6)
        for mr in (4, 6, 8, 12, 14)
        if registers // 2 <= mr * nv <= registers - nv - 1
    ]
    return [
        Schedule(s.w, mr, nv, max(rows // mr, 1) * mr, kc, max(columns // (nv * s.w), 1) * nv * s.w)
        for mr, nv in tiles
        for rows in (48, 96, 192)
        for kc in (128, 256)
        for columns in (256, 512)
    ]


def _bits(value: float) -> str:
    return struct.pack(">f", value).hex()


def constant_step(kind: str, value: float) -> str:
    """The step that adds ("add") a float32 constant, or multiplies ("mul") by it."""
    return f"{kind}_{_bits(value)}"


def rsqrt_step(epsilon: float) -> str:
    """The kind of a step that multiplies by 1 / sqrt(operand + epsilon)."""
    return f"rsqrt_{_bits(epsilon)}"


def is_constant(step: str) -> bool:
    return step.startswith(("add_", "mul_"))


def number(step: str) -> float:
    """The constant of a step or kind."""
    return float(struct.unpack(">f", bytes.fromhex(step.partition("_")[2]))[0])


def combine(kind: str, x: str, v: str, rsqrt: str = "") -> str:
    """Text of a step on x with an operand's or constant's value v. rsqrt: the language's function."""
    if kind.startswith("rsqrt"):
        return f"{x} * {rsqrt}({v} + {number(kind)!r}{'' if rsqrt.startswith('tl.') else 'f'})"
    return f"{x} {_SIGNS[kind.partition('_')[0]]} {v}"


_SIGNS = {"add": "+", "sub": "-", "mul": "*"}


@dataclass(frozen=True)
class Epilogue:
    """What happens to the accumulator on its way to C, in the order of `steps`.

    A step is "alpha" (times the scalar alpha), an activation's name, a constant (constant_step), or (kind, dtype, broadcast) with an
    operand: kind "add", "mul", "sub", or rsqrt_step's, times 1 / sqrt(operand + a constant), as batch norm does; broadcast
    "n" (a vector along columns), "m" (along rows), "mn" (a matrix, unit stride along columns), "s" (any strides);
    ("beta", dtype, broadcast) adds beta times the operand, and nothing where beta is 0, as addmm does.
    Each operand is a buffer, in order, after the product's own; its scalars are strides (i64), see `scalars`.
    """

    steps: tuple = ()

    def __str__(self) -> str:
        return "_".join(s if isinstance(s, str) else "".join(s) for s in self.steps)

    @property
    def operands(self) -> list[tuple[int, str, str, str]]:
        """(index, kind, dtype, broadcast) of each operand."""
        return [(i, *s) for i, s in enumerate(s for s in self.steps if not isinstance(s, str))]

    @property
    def buffers(self) -> list[tuple[str, str, str]]:
        return [(f"e{i}", dtype, "r") for i, _, dtype, _ in self.operands]

    @property
    def strides(self) -> list[tuple[str, str]]:
        """Stride scalars: per operand its batch stride, then "m": row stride; "n": column stride is 1, none; "mn": row stride;
        "s": row and column stride."""
        out = []
        for i, _, _, b in self.operands:
            out.append((f"e{i}b", "i64"))
            if b in ("m", "mn", "s"):
                out.append((f"e{i}m", "i64"))
            if b == "s":
                out.append((f"e{i}n", "i64"))
        return out

    def factors(self, compute: str) -> list[tuple[str, str]]:
        """Number scalars: alpha, beta, in the order in which the steps name them."""
        t = compute if compute in ("f64", "i64", "i32") else "f32"
        return [("alpha" if s == "alpha" else "beta", t) for s in self.steps if s == "alpha" or s[0] == "beta"]

    @property
    def folded(self) -> tuple[int, str]:
        """How many of the first steps are one multiply-add by numbers of the row ("m") or of the column ("n"), where a square root is
        among them that every element would repeat otherwise (batch norm), and which of the two; else (0, "")."""
        along, count = "", 0
        for s in self.steps:
            if isinstance(s, str):
                if not is_constant(s):
                    break
            elif s[2] not in ("m", "n") or s[2] != (along or s[2]) or s[0] == "beta":
                break
            else:
                along = s[2]
            count += 1
        return (count, along) if any(s[0].startswith("rsqrt") for s in self.steps[:count]) else (0, "")

    def fold(self, size: int) -> tuple[str, Callable[[str, str], str]]:
        """For a kernel that treats up to `size` rows (or columns, as `folded` says) at a time: the declarations, and the statements that
        compute the multiply-adds from one on up to another, after which `apply` may be called for these."""
        count, along = self.folded
        if not count:
            return "", lambda begin, end: ""
        out, i = [], 0
        for s in self.steps[:count]:
            if isinstance(s, str):
                v = f"(T){number(s)!r}f"
            else:
                v = f"LD_{s[1]}(e{i} + " + (f"(long)f_ * e{i}m)" if along == "m" else "f_)")
                i += 1
            kind = s if isinstance(s, str) else s[0]
            if kind.startswith("rsqrt"):
                out.append(f"{{ const T v_ = {combine(kind, '(T)1', v, 'rsqrt')}; s_ *= v_; h_ *= v_; }}")
            elif kind.startswith("mul"):
                out.append(f"{{ const T v_ = {v}; s_ *= v_; h_ *= v_; }}")
            else:
                out.append(f"h_ = {combine(kind, 'h_', v)};")
        body = f"T s_ = 1, h_ = 0; {' '.join(out)} scale_[f_ - fold_] = s_; shift_[f_ - fold_] = h_;"
        return (
            f"T scale_[{size}]; T shift_[{size}]; uint fold_ = 0;",
            lambda begin, end: f"fold_ = {begin}; for (uint f_ = {begin}; f_ < {end}; f_++) {{ {body} }}",
        )

    def apply(self, x: str, row: str, col: str, m: int, folded: bool = False) -> str:
        """Statements that turn variable x (V at width m > 1, else T) at (row, col...) into the result. folded: the kernel has done what
        `fold` says."""
        out, i = [], 0
        t = "V" if m > 1 else "T"
        count, along = self.folded if folded else (0, "")
        if count:
            at = f"{row if along == 'm' else col} - fold_"
            scale, shift = (
                f"load{m}(0, {a} + {at})" if m > 1 and along == "n" else f"({t})({a}[{at}])"
                for a in ("scale_", "shift_")
            )
            out.append(f"{x} = FMA({x}, {scale}, {shift});")
            i = sum(not isinstance(s, str) for s in self.steps[:count])
        for s in self.steps[count:]:
            if s == "alpha":
                out.append(f"{x} *= ({t})((T)alpha);")
            elif isinstance(s, str) and is_constant(s):
                out.append(f"{x} = {combine(s, x, f'({t})((T){number(s)!r}f)')};")
            elif isinstance(s, str):
                out.append(f"{x} = {activation(s, x, m)};")
            else:
                kind, dtype, b = s
                e = f"e{i}"
                at = {
                    "n": f"{col}",
                    "m": f"(long)({row}) * {e}m",
                    "mn": f"(long)({row}) * {e}m + {col}",
                    "s": f"(long)({row}) * {e}m + (long)({col}) * {e}n",
                }[b]
                if m > 1 and b in ("n", "mn"):
                    v = f"LDV_{dtype}({e} + {at})"
                elif m > 1 and b == "s":
                    v = "(V)(" + ", ".join(f"LD_{dtype}({e} + {at} + {j} * {e}n)" for j in range(m)) + ")"
                else:
                    v = f"({t})(LD_{dtype}({e} + {at}))"
                if kind == "beta":
                    out.append(f"if (beta != 0) {x} = {x} + ({t})((T)beta) * {v};")
                else:
                    out.append(f"{x} = {combine(kind, x, v, 'rsqrt')};")
                i += 1
        return " ".join(out)

    def needs_math(self) -> bool:
        return any(s in ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh") for s in self.steps)


NO_EPILOGUE = Epilogue()


def module(compute: str, w: int, dtypes: tuple[str, ...], epilogue: Epilogue | None = None) -> str:
    """Module-scope text of a contraction kernel."""
    extra = tuple(d for _, _, d, _ in epilogue.operands) if epilogue else ()
    return prelude(compute, w, (*dtypes, *extra)) + (math_functions(w) if epilogue and epilogue.needs_math() else "")


def store_rows(ep: Epilogue, out_dtype: str, c_layout: str, w: int, folded: bool = False, panel: int = 0) -> str:
    """Macro STORE_ROW(p, row, col, n): n sums at the private pointer p through the epilogue to C[row, col...]. folded: as `apply` takes it.
    panel: vectors of a whole row, whose epilogues are computed side by side: each by itself is a chain in which every operation waits for
    the one before it."""
    at = "C + (long)(row_) * cm + col_" if c_layout == "n" else "C + (long)(row_) * cm + (long)(col_) * cn"
    vec = (
        ""
        if c_layout != "n"
        else (
            f"for (; j_ + {w} <= n_; j_ += {w}) {{ const uint col_ = (col0) + j_; V x_ = load{w}(0, (p) + j_); {ep.apply('x_', 'row_', 'col_', w, folded)} "
            f"STV_{out_dtype}({at}, x_); }} "
        )
    )
    if panel and c_layout == "n":
        columns = [f"((col0) + {v * w}u)" for v in range(panel)]
        whole = " ".join(
            [f"V x{v}_ = load{w}(0, (p) + {v * w});" for v in range(panel)]
            + [f"{{ {ep.apply(f'x{v}_', 'row_', c, w, folded)} }}" for v, c in enumerate(columns)]
            + [f"STV_{out_dtype}(C + (long)(row_) * cm + {c}, x{v}_);" for v, c in enumerate(columns)]
        )
        vec = f"if (n_ == {panel * w}u) {{ {whole} j_ = n_; }} {vec}"
    text = (
        f"{{ const uint row_ = (row0), n_ = (n0); uint j_ = 0; {vec}for (; j_ < n_; j_++) {{ const uint col_ = (col0) + j_; T x_ = (p)[j_]; "
        f"{ep.apply('x_', 'row_', 'col_', 1, folded)} ST_{out_dtype}({at}, x_); }} }}"
    )
    return "#define STORE_ROW(p, row0, col0, n0) " + text.replace("\n", " ") + "\n"


def pack_rows(dst: str, src: str, layout: str, dtype: str, s: Schedule, rows: str, kc: str, tw: int) -> str:
    """Statements that pack `rows` (1..mr, run time) rows of `src`, a pointer to A[row, k], into dst[k * mr + r].
    Missing rows repeat the last one. Writes up to tw - 1 elements beyond the panel. layout: "n" unit stride along k (row stride am),
    "t" along rows (k stride ak), "g" neither."""
    mr = s.mr
    one = f"LD_{dtype}({src} + (long)min({{r}}u, {rows} - 1u) * am + (long)k_ * ak)"
    scalar = " ".join(f"{dst}[k_ * {mr} + {r}] = {one.format(r=r)};" for r in range(mr))
    if layout == "n":
        cv = f"CV{tw}"
        ptr = "\n".join(f"const __global {{p}}* a{r}_ = {src} + (long)min({r}u, {rows} - 1u) * am;" for r in range(mr))
        groups = []
        for g in range(0, mr, tw):
            names = [f"LD{tw}_{dtype}(a{r}_ + k_)" if r < mr else f"({cv})(0)" for r in range(g, g + tw)]
            load = " ".join(f"const {cv} x{g}_{i} = {n};" for i, n in enumerate(names))
            groups.append(
                load
                + "\n"
                + transpose(tw, [f"x{g}_{i}" for i in range(tw)], [f"y{g}_{i}" for i in range(tw)], f"const {cv}")
            )
        stores = " ".join(
            f"store{tw}(y{g}_{i}, 0, {dst} + (k_ + {i}) * {mr} + {g});" for i in range(tw) for g in range(0, mr, tw)
        )
        tail = " ".join(f"{dst}[k_ * {mr} + {r}] = LD_{dtype}(a{r}_ + k_);" for r in range(mr))
        return (
            f"{{ {ptr} uint k_ = 0; for (; k_ + {tw} <= {kc}; k_ += {tw}) {{ {' '.join(groups)} {stores} }} "
            f"for (; k_ < {kc}; k_++) {{ {tail} }} }}"
        )
    if layout == "t":
        full = " ".join(f"{dst}[k_ * {mr} + {r}] = LD_{dtype}({src} + (long)k_ * ak + {r});" for r in range(mr))
        return (
            f"if ({rows} == {mr}) {{ for (uint k_ = 0; k_ < {kc}; k_++) {{ {full} }} }} else {{ const long am = 1; "
            f"for (uint k_ = 0; k_ < {kc}; k_++) {{ {scalar} }} }}"
        )
    return f"for (uint k_ = 0; k_ < {kc}; k_++) {{ {scalar} }}"


def pack_macros(compute: str, w: int, dtype: str) -> tuple[int, str]:
    """(width of transposes, macros LD<w>_<dtype> and type CV<w>)."""
    tw = min(w, 8)
    t = POINTEE[compute]
    load = {
        compute: f"load{tw}(0, p)",
        "f16": f"convert_{t}{tw}(vload_half{tw}(0, p))",
        "bf16": f"convert_{t}{tw}(as_float{tw}(convert_uint{tw}(vload{tw}(0, p)) << 16))",
    }.get(dtype, f"convert_{t}{tw}(vload{tw}(0, p))")
    return tw, f"typedef {t}{tw} CV{tw};\n#define LD{tw}_{dtype}(p) {load}\n"


UNROLL_K = 4

# Fetches the panel behind this one, which comes from memory, bit by bit: the tiles i = p..pe - 1 of this panel take turns.
PREFETCH_PANEL = (
    "const uint l_ = kc * {nr}u / {line}u, le_ = l_ * (i - p + 1) / (pe - p); "
    "for (uint j_ = l_ * (i - p) / (pe - p); j_ < le_; j_++) PREFETCH(Bk + kc * {nr}u + j_ * {line}u);"
)
BALANCED = "uint balanced(uint n, uint most) { const uint parts = max((n + most - 1) / most, 1u); return (n + parts - 1) / parts; }\n"


def micro(
    s: Schedule, b_step: str, kc: str, load: Callable[[int, int], str] | None = None, a_k: int = 0, a_row: int = 1
) -> str:
    """Accumulates c<r>_<v> over kc steps from the pointers a_, with strides a_k (0: mr, packed rows) and a_row, and b_ (advancing by b_step).
    load(u, v): the text of vector v of B in step u from where b_ points to."""
    a_k = a_k or s.mr
    load = load or (lambda u, v: f"load{s.w}(0, b_ + {u} * {b_step} + {v * s.w})")
    lines = []
    for u in range(UNROLL_K):
        lines.append("{ " + " ".join(f"const V b{v} = {load(u, v)};" for v in range(s.nv)))
        lines += [
            f"{{ const V a_{r} = (V)(a_[{u * a_k + r * a_row}]); "
            + " ".join(f"c{r}_{v} = FMA(a_{r}, b{v}, c{r}_{v});" for v in range(s.nv))
            + " }"
            for r in range(s.mr)
        ]
        lines.append("}")
    step = "\n".join(lines[: len(lines) // UNROLL_K])
    return (
        f"uint k_ = {kc}; for (; k_ >= {UNROLL_K}u; k_ -= {UNROLL_K}u) {{ {chr(10).join(lines)}\n"
        f"a_ += {UNROLL_K * a_k}; b_ += {UNROLL_K} * {b_step}; }}\nfor (; k_; k_--) {{ {step}\na_ += {a_k}; b_ += {b_step}; }}"
    )


# Where a key of a paged cache is: row `key` of the pages that a row of the table lists. A page that does not exist is not read.
IN_PAGES = """
long in_pages(uint key, long page_stride, long row_stride, const __global int* table, uint page, uint pages) {
  return (long)min((uint)max(table[key / page], 0), pages - 1) * page_stride + (long)(key % page) * row_stride;
}
"""


def pack_b(
    target: Target,
    dtype: str,
    layout: str,
    s: Schedule | None = None,
    compute: str | None = None,
    paged: bool = False,
) -> Kernel:
    """Packs B[b, K, N] into P[b, cdiv(K, kc), cdiv(N, nr), min(kc, rest of K), nr] of the dtype `compute` (default: what B's is
    computed in), zero-filled beyond N.

    layout: "n" unit stride along N, "t" along K, "g" any strides.
    The batch has two levels (batch and head): item i starts at B + i / inner * bb + i % inner * bi.
    Buffers: B, P. Scalars: bb, bi, bk, bn (i64), inner, K, N (u32).
    Grid: (tasks along panels, tasks along K, batch), any numbers >= 1. Temporary: batch * cdiv(N, nr) * K * nr elements.

    paged (of attention's keys and values): the keys, which are N ("t") or K ("n"), are those of sequences of `slot` keys each, whose
    pages of `page` keys table [sequences * slot / page] (int32) lists; bb is the stride of pages, of which there are `pages`, and the
    batch has one level. Further buffers: table, spans [sequences, 4] (int32; the last: where the keys of a sequence end, what lies
    behind is not read). Further scalars: slot, page, pages (u32).
    """
    assert not paged or layout in ("n", "t")
    compute = compute or compute_dtype(dtype)
    s = s or schedule(compute)
    w, nr, kc = s.w, s.nr, s.kc  # kc is a multiple of 8: a block of the transpose never crosses it
    tw, macros = pack_macros(compute, w, dtype)
    g = 4 if layout == "n" else 1
    unused = "{key} >= (uint)spans[{key} / slot * 4 + 3]"
    if layout == "n":
        row = "in_pages(k, bb, bk, table, page, pages)" if paged else "(long)k * bk"
        skip = f"if ({unused.format(key='k')}) continue;" if paged else ""
        inner = f"""
  for (uint g = p0; g < p1; g += {g}u) {{
    const uint ge = min(g + {g}u, p1);
    for (uint k = k0; k < k1; k++) {{
      {skip}const __global {{ptr}}* s_ = B + {row};
      for (uint p = g; p < ge; p++) {{
        __global T* d = P + ((ulong)(k / {kc}u * {kc}u) * NP + (ulong)p * min({kc}u, K - k / {kc}u * {kc}u) + k % {kc}u) * {nr}; const uint n0 = p * {nr}u;
        if (n0 + {nr}u <= N) {{ UNROLL for (uint v = 0; v < {s.nv}u; v++) store{w}(LDV_{dtype}(s_ + n0 + v * {w}u), v, d); }}
        else for (uint j = 0; j < {nr}u; j++) d[j] = n0 + j < N ? LD_{dtype}(s_ + n0 + j) : (T)0;
      }}
    }}
  }}"""
    else:
        names = [f"x{i}" for i in range(tw)]
        load = " ".join(
            f"const CV{tw} x{i} = LD{tw}_{dtype}({f'B + at_[{i}] + k' if paged else f's_ + {i} * bn'});"
            for i in range(tw)
        )
        body = transpose(tw, names, [f"y{i}" for i in range(tw)], f"const CV{tw}")
        stores = " ".join(f"store{tw}(y{i}, 0, d + {i} * {nr});" for i in range(tw))
        fast = (
            f"""
      if (j + {tw}u <= n) {{ for (; k + {tw}u <= k1; k += {tw}u) {{
        {"" if paged else "const __global {ptr}* s_ = B + (long)(n0 + j) * bn + k;"} __global T* d = P + ((ulong)(k / {kc}u * {kc}u) * NP + (ulong)p * min({kc}u, K - k / {kc}u * {kc}u) + k % {kc}u) * {nr} + j;
        {load}
        {body} {stores}
      }} }}"""
            if layout == "t"
            else ""
        )
        item, skip, places = "(long)k * bk + (long)(n0 + j + i) * bn", "", ""
        if paged:
            item, skip = "at_[i] + k", f"if ({unused.format(key='n0')} && n0 / slot == (n0 + n - 1) / slot) continue;"
            each = (f"in_pages(min(n0 + j + {i}u, N - 1), bb, bn, table, page, pages)" for i in range(tw))
            places = f"const long at_[{tw}] = {{{', '.join(each)}}};"
        inner = f"""
  for (uint p = p0; p < p1; p++) {{
    const uint n0 = p * {nr}u, n = min({nr}u, N - n0);{skip}
    for (uint j = 0; j < {nr}u; j += {tw}u) {{{places}
      uint k = k0;{fast}
      for (; k < k1; k++) {{
        __global T* d = P + ((ulong)(k / {kc}u * {kc}u) * NP + (ulong)p * min({kc}u, K - k / {kc}u * {kc}u) + k % {kc}u) * {nr} + j;
        for (uint i = 0; i < {tw}u; i++) d[i] = j + i < n ? LD_{dtype}(B + {item}) : (T)0;
      }}
    }}
  }}"""
    inner = inner.replace("{ptr}", POINTEE[dtype])
    body = f"""
  const uint NP = (N + {nr - 1}u) / {nr}u;
  const uint p0 = (ulong)NP * get_group_id(0) / get_num_groups(0), p1 = (ulong)NP * (get_group_id(0) + 1) / get_num_groups(0);
  const uint KB = (K + 7u) / 8u;
  const uint k0 = (ulong)KB * get_group_id(1) / get_num_groups(1) * 8u, k1 = min(K, (uint)((ulong)KB * (get_group_id(1) + 1) / get_num_groups(1) * 8u));
  const uint item = get_group_id(2); B += {"" if paged else "(long)(item / inner) * bb + "}(long)(item % inner) * bi; P += (ulong)get_group_id(2) * NP * K * {nr};
{inner}
"""
    return finish(
        target,
        f"vector_pack_b_{dtype}{'' if compute == compute_dtype(dtype) else f'_{compute}'}_{layout}{'_paged' * paged}_{s}",
        [("B", dtype, "r"), ("P", compute, "w")] + [("table", "i32", "r"), ("spans", "i32", "r")] * paged,
        [("bb", "i64"), ("bi", "i64"), ("bk", "i64"), ("bn", "i64")]
        + [(x, "u32") for x in ("inner", "K", "N", *(("slot", "page", "pages") if paged else ()))],
        module(compute, w, (dtype,)) + IN_PAGES * paged + macros,
        body,
    )


def gemm(
    target: Target,
    a_dtype: str,
    b_dtype: str,
    c_dtype: str,
    a_layout: str = "n",
    b_layout: str = "packed",
    c_layout: str = "n",
    epilogue: Epilogue = NO_EPILOGUE,
    split: bool = False,
    s: Schedule | None = None,
    grouped: str = "",
) -> Kernel:
    """C[b, M, N] = epilogue(A[b, M, K] @ B[b, K, N]).

    a_layout: "n" unit stride along K, "t" along M, "g" any strides. b_layout: "packed" (from pack_b, b_dtype is the compute dtype)
    or "n" (B in place, unit stride along N: for few rows). c_layout: "n" unit stride along N, "g" any strides.
    Buffers: A, B, C, then the epilogue's operands.
    Scalars: ab, am, ak, bb, bk, cb, cm, cn (i64 strides; bb counts elements of B or of the packed B, bk is unused when packed), the epilogue's
    strides, its factors; M, N, K (u32).
    Grid: (tasks along M, tasks along N, batch), any numbers >= 1: `gemm_groups`.
    split: group_id(0) is a range of K instead; C is a temporary of the compute dtype [num_groups(0), b, M, N] without epilogue
    (cm = N, cb = M * N), that `reduce_splits` finishes.
    grouped: the items of the batch are groups, that the ends in a further buffer, offs (int32, last), cut out of one matrix: of the
    rows of A and of C ("rows"), or of the reduction ("k", with B in place). Ends beyond the matrix or before their predecessor are
    moved there.
    """
    compute = compute_dtype(a_dtype)
    s = s or schedule(compute)
    w, mr, nv, nr = s.w, s.mr, s.nv, s.nr
    tw, macros = pack_macros(compute, w, a_dtype)
    ep = NO_EPILOGUE if split else epilogue
    out = compute if split else c_dtype
    ptr = POINTEE[a_dtype]
    packed = b_layout == "packed"
    acc = "".join(f"V c{r}_{v} = (V)(0);" for r in range(mr) for v in range(nv))
    in_place = None if packed else (lambda u, v: f"LDV_{b_dtype}(b_ + {u} * bk + {v * w})")
    loop_packed = micro(s, str(nr) if packed else "bk", "kc", in_place)
    loop_edge = micro(s, str(nr), "kc")
    bptr = POINTEE[compute if packed else b_dtype]
    panel = f"const __global {bptr}* Bk = B + " + (
        f"((ulong)k0 * NP + (ulong)(q0 + q) * kc) * {nr};" if packed else f"(long)k0 * bk + (q0 + q) * {nr}u;"
    )
    edge_pack = (
        ""
        if packed
        else f"""
        const uint edge = n < {nr}u;
        if (edge) for (uint k_ = 0; k_ < kc; k_++) for (uint j = 0; j < {nr}u; j++)
          Bb[k_ * {nr} + j] = j < n ? LD_{b_dtype}(Bk + (long)k_ * bk + j) : (T)0;"""
    )
    loop = f"{{ const __global {bptr}* b_ = Bk; {loop_packed} }}"
    if packed:
        loop = f"{{ {PREFETCH_PANEL.format(nr=nr, line=64 // DTYPES[compute].size)} }} {loop}"
    else:
        loop = f"if (!edge) {loop} else {{ const T* b_ = Bb; {loop_edge} }}"
    vec_store = "\n".join(
        f"if ({r}u < rows) {{ const uint row = m0 + {r}u; "
        + " ".join(
            f"{{ const uint col = n0 + {v * w}u; V x = c{r}_{v}; {ep.apply('x', 'row', 'col', w, True)} "
            f"STV_{out}(C + (long)row * cm + col, x); }}"
            for v in range(nv)
        )
        + " }"
        for r in range(mr)
    )
    to_tile = " ".join(f"store{w}(c{r}_{v}, {v}, t_ + {r} * {nr});" for r in range(mr) for v in range(nv))
    from_tile = " ".join(f"c{r}_{v} += load{w}({v}, t_ + {r} * {nr});" for r in range(mr) for v in range(nv))
    # An epilogue with polynomials is inlined for one row, behind the tile in memory: twelve copies take seconds to compile.
    full = f"if (n == {nr}u) {{ {vec_store} }} else" if c_layout == "n" and not ep.needs_math() else ""
    if split:
        tasks = f"""
  const uint kb = (ulong)((K + {s.kc - 1}u) / {s.kc}u) * get_group_id(0) / get_num_groups(0) * {s.kc}u;
  const uint ke = min(K, (uint)((ulong)((K + {s.kc - 1}u) / {s.kc}u) * (get_group_id(0) + 1) / get_num_groups(0) * {s.kc}u));
  const uint p0 = 0, p1 = MP; C += (ulong)get_group_id(0) * get_num_groups(2) * M * N;"""
    else:
        tasks = f"""
  const uint kb = {"begin" if grouped == "k" else "0"}, ke = {"end" if grouped == "k" else "K"};
  const uint p0 = (ulong)MP * get_group_id(0) / get_num_groups(0), p1 = (ulong)MP * (get_group_id(0) + 1) / get_num_groups(0);"""
    cut = ""
    if grouped:
        cut = f"""
  int begin = 0, end = 0;
  for (uint g = 0; g <= get_group_id(2); g++) {{ begin = end; end = clamp(offs[g], begin, (int){"ALL_M" if grouped == "rows" else "K"}); }}
"""
    # What the epilogue reads and writes comes while the tile is computed, or every tile would wait for the memory.
    lines = sorted({*range(0, nr, 64 // DTYPES[compute].size), nr - 1})
    tiles = [f"e{e} + (long)(i * {mr}u + {{r}}u) * e{e}m" for e, _, _, shape in ep.operands if shape == "mn"]
    if c_layout == "n":
        tiles.append(f"C + (long)(i * {mr}u + {{r}}u) * cm")
    fetch = " ".join(f"PREFETCH({t.format(r=r)} + n0 + {j});" for t in tiles for r in range(mr) for j in lines)
    by_row = ep.folded[1] == "m"
    arrays, fold = ep.fold(s.mc if by_row else s.nc)
    fold_rows = fold(f"p * {mr}u", f"min(pe * {mr}u, M)") if by_row else ""
    fold_columns = "" if by_row else fold(f"q0 * {nr}u", f"min((q0 + qn) * {nr}u, N)")
    if grouped == "rows":
        moved = "".join(f" e{i} += (long)begin * e{i}m;" for i, _, _, shape in ep.operands if shape != "n")
        cut += f"  A += (long)begin * am; C += (long)begin * cm;{moved} const uint M = end - begin;\n"
    body = f"""{cut}
  T Ab[{s.mc * s.kc + 16}]; T Ct[{s.mc * s.nc}]; {"" if packed else f"T Bb[{s.kc * nr}];"} {arrays}
  const uint MP = (M + {mr - 1}u) / {mr}u, NP = (N + {nr - 1}u) / {nr}u;{tasks}
  const uint pn0 = (ulong)NP * get_group_id(1) / get_num_groups(1), pn1 = (ulong)NP * (get_group_id(1) + 1) / get_num_groups(1);
  A += (long)get_group_id(2) * ab; B += (long)get_group_id(2) * bb; C += (long)get_group_id(2) * cb;
  {"".join(f"e{i} += (long)get_group_id(2) * e{i}b; " for i, *_ in ep.operands)}
  // Blocks of about the same size: B's panels would come from memory once more for a few rows left over.
  const uint ps = balanced(p1 - p0, {s.mc // mr}u), qs = balanced(pn1 - pn0, {s.nc // nr}u);
  for (uint p = p0; p < p1; p += ps) {{
    const uint pe = min(p + ps, p1);
    {fold_rows}
    for (uint q0 = pn0; q0 < pn1; q0 += qs) {{
      const uint qn = min(qs, pn1 - q0);
      {fold_columns}
      uint k0 = kb;
      do {{
        const uint kc = min({s.kc}u, ke - k0); const bool first = k0 == kb, last = k0 + kc >= ke;
        for (uint i = p; i < pe; i++) {{
          const uint rows = min({mr}u, M - i * {mr}u); const __global {ptr}* Ar = A + (long)(i * {mr}u) * am + (long)k0 * ak;
          T* d = Ab + (i - p) * (kc * {mr});
          {pack_rows("d", "Ar", a_layout, a_dtype, s, "rows", "kc", tw).replace("{p}", ptr)}
        }}
        for (uint q = 0; q < qn; q++) {{
        const uint n0 = (q0 + q) * {nr}u, n = min({nr}u, N - n0);
        {panel}{edge_pack}
        for (uint i = p; i < pe; i++) {{
          const T* a_ = Ab + (i - p) * (kc * {mr}); T* t_ = Ct + (q * {s.mc // mr}u + i - p) * {mr * nr};
          {acc}
          if (last) {{ {fetch} }}
          {loop}
          if (!first) {{ {from_tile} }}
          if (!last) {{ {to_tile} }}
          else {{
            const uint m0 = i * {mr}u, rows = min({mr}u, M - m0);
            {full} {{ {to_tile} for (uint r = 0; r < rows; r++) STORE_ROW(t_ + r * {nr}, m0 + r, n0, n); }}
          }}
        }}
        }}
        k0 += {s.kc}u;
      }} while (k0 < ke);
    }}
  }}
"""
    name = "_".join(
        x
        for x in (
            "vector_gemm",
            a_dtype,
            b_dtype,
            c_dtype,
            a_layout,
            b_layout,
            c_layout,
            str(ep),
            "split" if split else "",
            f"by_{grouped}" if grouped else "",
            str(s),
        )
        if x
    )
    scalars = [(x, "i64") for x in ("ab", "am", "ak", "bb", "bk", "cb", "cm", "cn")] + ep.strides + ep.factors(compute)
    offs = [("offs", "i32", "r")] if grouped else []
    return finish(
        target,
        name,
        [("A", a_dtype, "r"), ("B", compute if packed else b_dtype, "r"), ("C", out, "rw"), *ep.buffers, *offs],
        [*scalars, ("ALL_M" if grouped == "rows" else "M", "u32"), ("N", "u32"), ("K", "u32")],
        module(compute, w, (a_dtype, b_dtype, out), ep)
        + macros
        + BALANCED
        + store_rows(ep, out, c_layout, w, True, nv if ep.needs_math() else 0),
        body,
    )


def gemm_groups(s: Schedule, m: Any, n: Any, batch: Any, compute_units: int) -> tuple[Any, Any, Any]:
    """Grid of `gemm`: whole rounds of the compute units along M, blocks of at most mc rows."""
    rows = cdiv(m, s.mc * compute_units) * compute_units
    return rows, 1, batch


def gemm_groups_wide(
    s: Schedule, m: Any, n: Any, batch: Any, compute_units: int, minimum: Callable = min
) -> tuple[Any, Any, Any]:
    """Grid of `gemm` for few rows (minimum: of Syms, where sizes are): along N first, at least four panels a task. Their panels are too few
    to come out even along M, and B is read once."""
    columns = minimum(cdiv(n, 4 * s.nr), compute_units)
    return cdiv(compute_units, columns), columns, batch


def reduce_splits(
    target: Target,
    c_dtype: str,
    c_layout: str = "n",
    epilogue: Epilogue = NO_EPILOGUE,
    compute: str | None = None,
    s: Schedule | None = None,
) -> Kernel:
    """C[b, M, N] = epilogue(sum over s of P[s, b, M, N]), the end of a product that was split along K.

    Buffers: P (compute dtype, contiguous), C, the epilogue's. Scalars: cb, cm, cn (i64), the epilogue's; M, N, S (u32; S parts).
    Grid: (tasks along M, tasks along N, batch).
    """
    compute = compute or compute_dtype(c_dtype)
    s = s or schedule(compute)
    w, nc = s.w, 64 * s.w
    body = f"""
  T t[{nc}];
  const uint m0 = (ulong)M * get_group_id(0) / get_num_groups(0), m1 = (ulong)M * (get_group_id(0) + 1) / get_num_groups(0);
  const uint NB = (N + {w - 1}u) / {w}u;
  const uint n0 = (ulong)NB * get_group_id(1) / get_num_groups(1) * {w}u, n1 = min(N, (uint)((ulong)NB * (get_group_id(1) + 1) / get_num_groups(1) * {w}u));
  C += (long)get_group_id(2) * cb;
  {_operand_batches(epilogue)}
  for (uint m = m0; m < m1; m++) for (uint n = n0; n < n1; n += {nc}u) {{
    const uint c = min({nc}u, n1 - n);
    for (uint j = 0; j < c; j++) t[j] = 0;
    for (uint i = 0; i < S; i++) {{
      const __global T* p = P + (((ulong)i * get_num_groups(2) + get_group_id(2)) * M + m) * N + n;
      uint j = 0;
      for (; j + {w}u <= c; j += {w}u) store{w}(load{w}(0, t + j) + load{w}(0, p + j), 0, t + j);
      for (; j < c; j++) t[j] += p[j];
    }}
    STORE_ROW(t, m, n, c);
  }}
"""
    name = "_".join(x for x in ("vector_reduce_splits", compute, c_dtype, c_layout, str(epilogue), f"w{w}") if x)
    return finish(
        target,
        name,
        [("P", compute, "r"), ("C", c_dtype, "rw"), *epilogue.buffers],
        [
            ("cb", "i64"),
            ("cm", "i64"),
            ("cn", "i64"),
            *epilogue.strides,
            *epilogue.factors(compute),
            ("M", "u32"),
            ("N", "u32"),
            ("S", "u32"),
        ],
        module(compute, w, (c_dtype,), epilogue) + store_rows(epilogue, c_dtype, c_layout, w),
        body,
    )


def _operand_batches(ep: Epilogue) -> str:
    return "".join(f"e{i} += (long)get_group_id(2) * e{i}b; " for i, *_ in ep.operands)


def gemm_dot(
    target: Target,
    a_dtype: str,
    b_dtype: str,
    c_dtype: str,
    rows: int = 0,
    c_layout: str = "n",
    epilogue: Epilogue = NO_EPILOGUE,
    width: int | None = None,
) -> Kernel:
    """C[b, M, N] = epilogue(A[b, M, K] @ B[b, N, K]^T) as dot products along K, without packing: x @ w.t() with few rows, and with
    rows=1 the matrix-vector product, which streams B once.

    A and B have unit stride along K. rows: rows of the register tile, 0 for the default, 1 where M is 1.
    Buffers: A, B, C, the epilogue's. Scalars: ab, am, bb, bn, cb, cm, cn (i64), the epilogue's; M, N, K (u32).
    Grid: (tasks along M, tasks along N, batch): `gemm_dot_groups`.
    """
    compute = compute_dtype(a_dtype)
    width = width or vector_width()
    w = lanes(width, compute)
    dm, dn = (1, 8) if rows == 1 else (6, 4) if width == 16 else (4, 3)
    mb, nb, kc = (1, 8, 512) if rows == 1 else (60, 48, 512)  # one row: each row of B is streamed to its end
    ep = epilogue
    acc = "".join(f"V c{r}_{j} = (V)(0);" for r in range(dm) for j in range(dn))
    pa = "".join(
        f"const __global {POINTEE[a_dtype]}* a{r} = A + (long)min(m + {r}u, M - 1) * am + k0; " for r in range(dm)
    )
    pb = "".join(
        f"const __global {POINTEE[b_dtype]}* b{j} = B + (long)min(n + {j}u, N - 1) * bn + k0; " for j in range(dn)
    )
    step = "".join(f"const V y{j} = LDV_{b_dtype}(b{j}); b{j} += {w}; " for j in range(dn)) + "\n".join(
        f"{{ const V x = LDV_{a_dtype}(a{r}); a{r} += {w}; "
        + " ".join(f"c{r}_{j} = FMA(x, y{j}, c{r}_{j});" for j in range(dn))
        + " }"
        for r in range(dm)
    )
    sums = " ".join(f"T s{r}_{j} = vsum(c{r}_{j});" for r in range(dm) for j in range(dn))
    tail = " ".join(
        f"s{r}_{j} = FMA(LD_{a_dtype}(a{r} + i), LD_{b_dtype}(b{j} + i), s{r}_{j});"
        for r in range(dm)
        for j in range(dn)
    )
    put = " ".join(f"t[(m - m0 + {r}) * {nb} + n - n0 + {j}] {{op}} s{r}_{j};" for r in range(dm) for j in range(dn))
    body = f"""
  T t[{mb * nb}];
  const uint MT = (M + {dm - 1}u) / {dm}u, NT = (N + {dn - 1}u) / {dn}u;
  const uint ms = (ulong)MT * get_group_id(0) / get_num_groups(0) * {dm}u, me = min(M, (uint)((ulong)MT * (get_group_id(0) + 1) / get_num_groups(0) * {dm}u));
  const uint ns = (ulong)NT * get_group_id(1) / get_num_groups(1) * {dn}u, ne = min(N, (uint)((ulong)NT * (get_group_id(1) + 1) / get_num_groups(1) * {dn}u));
  A += (long)get_group_id(2) * ab; B += (long)get_group_id(2) * bb; C += (long)get_group_id(2) * cb;
  {_operand_batches(ep)}
  for (uint n0 = ns; n0 < ne; n0 += {nb}u) for (uint m0 = ms; m0 < me; m0 += {mb}u) {{
    const uint n1 = min(n0 + {nb}u, ne), m1 = min(m0 + {mb}u, me);
    uint k0 = 0;
    do {{
      const uint kc = min({kc}u, K - k0);
      for (uint n = n0; n < n1; n += {dn}u) {{
        for (uint m = m0; m < m1; m += {dm}u) {{
          {pb}
          {pa}  // they advance: computed from k, LLVM would do so in every step
          {acc}
          uint k = 0;
          for (; k + {w}u <= kc; k += {w}u) {{ {step} }}
          {sums}
          for (uint i = 0; k + i < kc; i++) {{ {tail} }}
          if (k0 == 0) {{ {put.format(op="=")} }} else {{ {put.format(op="+=")} }}
        }}
      }}
      k0 += {kc}u;
    }} while (k0 < K);
    for (uint m = m0; m < m1; m++) STORE_ROW(t + (m - m0) * {nb}, m, n0, n1 - n0);
  }}
"""
    name = "_".join(
        x for x in ("vector_gemm_dot", a_dtype, b_dtype, c_dtype, c_layout, str(ep), f"w{w}r{dm}n{dn}") if x
    )
    return finish(
        target,
        name,
        [("A", a_dtype, "r"), ("B", b_dtype, "r"), ("C", c_dtype, "rw"), *ep.buffers],
        [(x, "i64") for x in ("ab", "am", "bb", "bn", "cb", "cm", "cn")]
        + ep.strides
        + ep.factors(compute)
        + [("M", "u32"), ("N", "u32"), ("K", "u32")],
        module(compute, w, (a_dtype, b_dtype, c_dtype), ep) + store_rows(ep, c_dtype, c_layout, w),
        body,
    )


def gemm_dot_groups(m: Any, n: Any, batch: Any, compute_units: int) -> tuple[Any, Any, Any]:
    """Grid of `gemm_dot`: along N only, blocks of at most 192 columns."""
    return 1, cdiv(n, 192 * compute_units) * compute_units, batch


def gemv(
    target: Target,
    a_dtype: str,
    b_dtype: str,
    c_dtype: str,
    c_layout: str = "n",
    epilogue: Epilogue = NO_EPILOGUE,
    split: bool = False,
    width: int | None = None,
) -> Kernel:
    """C[b, 1, N] = epilogue(a[b, K] @ B[b, K, N]), B with unit stride along N and read once, in long runs.

    Buffers: A, B, C, the epilogue's. Scalars: ab, ak, bb, bk, cb, cn (i64), the epilogue's; N, K (u32).
    Grid: (tasks along K: 1, or with split any number, tasks along N, batch).
    split: C is a temporary of the compute dtype [num_groups(0), b, 1, N] (cb = N), that `reduce_splits` finishes with M = 1.
    """
    compute = compute_dtype(a_dtype)
    w = lanes(width or vector_width(), compute)
    ep = NO_EPILOGUE if split else epilogue
    out = compute if split else c_dtype
    nc, ku = 256 * w, 8  # columns and rows of B at a time
    rows = "".join(f"const T a{i} = LD_{a_dtype}(A + (long)(k + {i}) * ak); " for i in range(ku))
    vec = "V x = load{w}(0, t + j); ".replace("{w}", str(w)) + " ".join(
        f"x = FMA((V)(a{i}), LDV_{b_dtype}(b{i}), x); b{i} += {w};" for i in range(ku)
    )
    starts = " ".join(f"const __global {POINTEE[b_dtype]}* b{i} = B + (long)(k + {i}) * bk + n;" for i in range(ku))
    one = "T x = t[j]; " + " ".join(f"x = FMA(a{i}, LD_{b_dtype}(b{i}), x); b{i}++;" for i in range(ku))
    body = f"""
  T t[{nc}]; T total[{nc}];
  const uint NB = (N + {w - 1}u) / {w}u, NK = (K + {ku - 1}u) / {ku}u;
  const uint n0 = (ulong)NB * get_group_id(1) / get_num_groups(1) * {w}u, n1 = min(N, (uint)((ulong)NB * (get_group_id(1) + 1) / get_num_groups(1) * {w}u));
  const uint ks = (ulong)NK * get_group_id(0) / get_num_groups(0) * {ku}u, ke = min(K, (uint)((ulong)NK * (get_group_id(0) + 1) / get_num_groups(0) * {ku}u));
  A += (long)get_group_id(2) * ab; B += (long)get_group_id(2) * bb; C += (long)get_group_id(2) * cb;
  {"C += (ulong)get_group_id(0) * get_num_groups(2) * N;" if split else ""}
  {_operand_batches(ep)}
  const long cm = 0;
  for (uint n = n0; n < n1; n += {nc}u) {{
    const uint c = min({nc}u, n1 - n);
    for (uint j = 0; j < c; j++) total[j] = 0;
    for (uint k0 = ks; k0 < ke; k0 += 128u) {{
      const uint k1 = min(k0 + 128u, ke); uint k = k0;
      for (uint j = 0; j < c; j++) t[j] = 0;
      for (; k + {ku} <= k1; k += {ku}) {{
        {rows} {starts} uint j = 0;
        for (; j + {w}u <= c; j += {w}u) {{ {vec} store{w}(x, 0, t + j); }}
        for (; j < c; j++) {{ {one} t[j] = x; }}
      }}
      for (; k < k1; k++) for (uint j = 0; j < c; j++)
        t[j] = FMA(LD_{a_dtype}(A + (long)k * ak), LD_{b_dtype}(B + (long)k * bk + n + j), t[j]);
      for (uint j = 0; j < c; j++) total[j] += t[j];
    }}
    STORE_ROW(total, 0, n, c);
  }}
"""
    name = "_".join(
        x for x in ("vector_gemv", a_dtype, b_dtype, c_dtype, c_layout, str(ep), "split" if split else "", f"w{w}") if x
    )
    return finish(
        target,
        name,
        [("A", a_dtype, "r"), ("B", b_dtype, "r"), ("C", out, "rw"), *ep.buffers],
        [(x, "i64") for x in ("ab", "ak", "bb", "bk", "cb", "cn")]
        + ep.strides
        + ep.factors(compute)
        + [("N", "u32"), ("K", "u32")],
        module(compute, w, (a_dtype, b_dtype, out), ep) + store_rows(ep, out, c_layout, w),
        body,
    )
