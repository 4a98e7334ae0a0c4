"""Attention for CPU devices: flash-style tiles of 6 rows by 64 columns, no score matrix in memory, no atomics.

Layouts: Q[B, H, Tq, D], K[B, Hk, Tk, D], V[B, Hk, Tk, Dv], O[B, H, Tq, Dv] with any strides of B, H, T and unit stride along D;
H = Hk * group. K is read from panels of keys ("columns": pack_columns) and V from blocks of 64 keys ("rows": pack_rows_), both
made by gemm.pack_b; padding and 16-bit conversions happen there. Scores are kept in base 2: scale * log2(e) multiplies Q once.
A fully masked row gives 0 and a logsumexp of -inf, as PyTorch's fused kernels do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..kernel import Kernel, Target
from ..opencl import POINTEE
from .gemm import IN_PAGES, Schedule, block_schedule, cdiv, micro, pack_b
from .source import finish, prelude, vector_width

BLOCK = 64  # columns of a tile
ROWS = 48  # rows of a task
MAX_HEAD = 256

EXP2 = r"""
V exp2v(V x) {  // relative error 2e-7; below -126.5 it is 0, NaN propagates; x is at most 127
  x = select(x, (V)(-127.f), x < (V)(-127.f));
  const V t = x + (V)(12583039.f), f = x - (t - (V)(12583039.f));  // 1.5 * 2^23 + 127: t ends in the exponent's bits of 2^n
  V p = fma(f, (V)(1.5403530e-4f), (V)(1.3333558e-3f)); p = fma(p, f, (V)(9.6181291e-3f)); p = fma(p, f, (V)(5.5504109e-2f));
  p = fma(p, f, (V)(2.4022651e-1f)); p = fma(p, f, (V)(6.9314718e-1f)); p = fma(p, f, (V)(1.f));
  return p * as_V(as_U(t) << 23);
}
"""
# Constants in two parts: scores of 100 would lose half the digits that a probability has left to a product rounded on the way.
LOGSUMEXP = r"""
#define LOG2E 1.44269504f
#define LOG2E_REST 1.9259630e-8f
T logsumexp(T top, T sum) {  // natural, from a maximum in base 2 and the sum of powers of 2 less that
  return top == -INFINITY ? -INFINITY : fma(top, 0.69314718f, fma(top, -1.9046542e-9f, log2(sum) * 0.69314718f));
}
T logsumexp_natural(T top, T sum) { return top == -INFINITY ? -INFINITY : fma(log2(sum), 0.69314718f, top); }
"""


def _natural(mask: str | None) -> bool:
    """Whether scores are natural, not in base 2: under a mask that is added, which may be the lowest number there is."""
    return mask not in (None, "bool")


def _units(mask: str | None) -> tuple[str, str, str]:
    """The scale of scores, what a difference of them is multiplied by for base 2, and the function that gives their logsumexp."""
    return ("scale", " * LOG2E", "logsumexp_natural") if _natural(mask) else ("(scale * LOG2E)", "", "logsumexp")


def _dropout(w: int) -> str:
    """factors(): what the probabilities of 4 queries for 64 keys are multiplied by, as ops/attention.py's forward() says."""
    words = " ".join(
        f"store{w}(select((V)(0), (V)(scale), c{i} >> 8 < keep), 0, F + {i * BLOCK} + j);" for i in range(4)
    )
    lanes = ", ".join(str(i) for i in range(w))
    return f"""
void factors(uint2 seed, uint query, uint key, uint bh, uint keep, T scale, T* F) {{
  typedef uint{w} W;
  for (uint j = 0; j < {BLOCK}u; j += {w}u) {{
    W c0 = key + j + (W)({lanes}), c1 = query / 4u, c2 = bh, c3 = 0; uint2 k = seed;
    for (uint r = 0; r < 10u; r++) {{
      const W h0 = mul_hi((W)(0xD2511F53u), c0), h1 = mul_hi((W)(0xCD9E8D57u), c2), l0 = c0 * 0xD2511F53u, l1 = c2 * 0xCD9E8D57u;
      c0 = h1 ^ c1 ^ k.x; c1 = l1; c2 = h0 ^ c3 ^ k.y; c3 = l0; k += (uint2)(0x9E3779B9u, 0xBB67AE85u);
    }}
    {words}
  }}
}}
"""


# F[row][64] of the task's rows, before a block of keys that they see.
FACTORS = """for (uint r = 0; r < tiles * {mr}u; r += 4u) if (seen[r / {mr}u] | seen[min(r / {mr}u + 1u, tiles - 1u)])
      factors((uint2)(seed[0], seed[1]), q0 + r, n0, bh, keep, drop_scale, F + r * {block});"""
KEEP = [("keep", "u32"), ("drop_scale", "f32")]


def column_schedule(s: Schedule | None = None) -> Schedule:
    """Schedule of pack_b for "columns": B[D, T] into panels [cdiv(T, nr), D, nr]. D is at most 256."""
    return replace(s or block_schedule(), kc=MAX_HEAD)


def row_schedule(s: Schedule | None = None) -> Schedule:
    """Schedule of pack_b for "rows": B[T, D] into [cdiv(T, 64), cdiv(D, nr), min(64, rest), nr]."""
    return replace(s or block_schedule(), kc=BLOCK)


def pack_columns(target: Target, dtype: str, paged: bool = False) -> Kernel:
    """gemm.pack_b of X[.., T, D] seen as [D, T] (bk = 1, bn = stride of T; K = D, N = T)."""
    return pack_b(target, dtype, "t", column_schedule(), paged=paged)


def pack_rows(target: Target, dtype: str, paged: bool = False) -> Kernel:
    """gemm.pack_b of X[.., T, D] (bk = stride of T, bn = 1; K = T, N = D)."""
    return pack_b(target, dtype, "n", row_schedule(), paged=paged)


def _module(w: int, dtypes: tuple[str, ...]) -> str:
    exp2 = EXP2.replace("as_V", f"as_float{w}").replace("as_U", f"as_int{w}").replace("convert_U", f"convert_int{w}")
    return prelude("f32", w, dtypes) + exp2 + LOGSUMEXP


def _hmax(w: int) -> str:
    h = (
        "T vmax(V v) { float8 a = "
        + ("max(v.lo, v.hi)" if w == 16 else "v")
        + "; float4 b = max(a.lo, a.hi); float2 c = max(b.lo, b.hi); return max(c.x, c.y); }\n"
    )
    return h


def _pack(dst: str, src: str, dtype: str, stride: str, depth: str, factor: str, mr: int) -> str:
    """dst[group][d][r] = src[row, d] * factor for the rows of the task in groups of mr; rows beyond the last repeat it."""
    return (
        f"for (uint r = 0; r < tiles * {mr}u; r++) {{ const __global {POINTEE[dtype]}* s_ = {src} + (long)min(q0 + r, last) * {stride}; "
        f"T* d_ = {dst} + r / {mr} * {mr} * {depth} + r % {mr}; for (uint d = 0; d < {depth}; d++) d_[d * {mr}] = LD_{dtype}(s_ + d) * {factor}; }}"
    )


def _panels(s: Schedule, dst: str, src: str, dtype: str, stride: str, depth: str) -> str:
    """dst[panel][row][nr] = src[row, d] for the rows of the task, zero-filled."""
    return (
        f"for (uint r = 0; r < rows; r++) {{ const __global {POINTEE[dtype]}* s_ = {src} + (long)(q0 + r) * {stride}; uint d = 0; "
        f"for (; d + {s.w}u <= {depth}; d += {s.w}u) store{s.w}(LDV_{dtype}(s_ + d), 0, {dst} + (d / {s.nr}u * {ROWS} + r) * {s.nr} + d % {s.nr}u); "
        f"for (; d % {s.nr}u || d < {depth}; d++) {dst}[(d / {s.nr}u * {ROWS} + r) * {s.nr} + d % {s.nr}u] = d < {depth} ? LD_{dtype}(s_ + d) : (T)0; }}"
    )


def _accumulators(s: Schedule) -> str:
    return " ".join(f"V c{r}_{v} = (V)(0);" for r in range(s.mr) for v in range(s.nv))


def _product(s: Schedule, a: str, panels: str, depth: str, out: str) -> str:
    """out[row][64] = a (packed rows, depth) x 64 columns of `panels`, for the `tiles` groups of rows; of the columns of group i,
    the panels below seen[i]. A panel stays in the cache while the groups go over it."""
    put = " ".join(f"store{s.w}(c{r}_{v}, {v}, o_ + {r * BLOCK});" for r in range(s.mr) for v in range(s.nv))
    return (
        f"for (uint q = 0; q * {s.nr}u < keys; q++) for (uint i = 0; i < tiles; i++) {{ if (q * {s.nr}u >= seen[i]) continue; "
        f"const T* a_ = {a} + i * {s.mr} * {depth}; const __global T* b_ = {panels} + (ulong)q * {depth} * {s.nr}; "
        f"T* o_ = {out} + i * {s.mr * BLOCK} + q * {s.nr}; {_accumulators(s)} {micro(s, str(s.nr), depth)} {put} }}"
    )


def _accumulate(s: Schedule, a: str, rows: str, depth: str, out: str, factor: str, varlen: bool) -> str:
    """out[row][depth] = out * factor[row] + a[row][64] x rows[keys][depth], the first seen[i] keys for group i of rows; `out` has
    tiles [group][panel][6][nr]. varlen: without the first `skip` keys, which are of another sequence."""
    first, count = ("skip", "seen[i] - skip") if varlen else ("0", "seen[i]")
    put = " ".join(
        f"store{s.w}("
        + (f"fma({old}, (V)({factor}[i * {s.mr} + {r}]), c{r}_{v})" if factor else f"{old} + c{r}_{v}")
        + f", {v}, o_ + {r * s.nr});"
        for r in range(s.mr)
        for v in range(s.nv)
        for old in [f"load{s.w}({v}, o_ + {r * s.nr})"]
    )
    return (
        f"{{ const uint n_ = ({depth} + {s.nr - 1}u) / {s.nr}u; for (uint q = 0; q < n_; q++) for (uint i = 0; i < tiles; i++) {{ "
        f"if (seen[i] <= {first}) continue; const T* a_ = {a} + i * {s.mr * BLOCK} + {first}; T* o_ = {out} + (i * n_ + q) * {s.mr * s.nr}; "
        f"const __global T* b_ = {rows} + ((ulong)q * keys + {first}) * {s.nr}; {_accumulators(s)} "
        f"{micro(s, str(s.nr), count, a_k=1, a_row=BLOCK)} {put} }} }}"
    )


def _transposed(s: Schedule, a: str, rows: str, depth: str, out: str, causal: bool) -> str:
    """out[key][depth] += a[row][64]^T x rows[row][depth] for the keys of a block, 6 at a time, over the task's rows that see them;
    `out` has tiles [group of keys][panel][6][nr], `rows` panels [panel][row][nr]."""
    put = " ".join(
        f"store{s.w}(load{s.w}({v}, o_ + {r * s.nr}) + c{r}_{v}, {v}, o_ + {r * s.nr});"
        for r in range(s.mr)
        for v in range(s.nv)
    )
    first = f"(uint)max(0, (int)(n0 + i * {s.mr}u) - diagonal - (int)q0)" if causal else "0"
    return (
        f"{{ const uint n_ = ({depth} + {s.nr - 1}u) / {s.nr}u; for (uint q = 0; q < n_; q++) for (uint i = 0; i * {s.mr}u < keys; i++) {{ "
        f"const uint r0 = {first}; if (r0 >= rows) break; const uint count = rows - r0; "
        f"const T* a_ = {a} + r0 * {BLOCK} + i * {s.mr}; const T* b_ = {rows} + (q * {ROWS} + r0) * {s.nr}; "
        f"__global T* o_ = {out} + (i * n_ + q) * {s.mr * s.nr}; {_accumulators(s)} "
        f"{micro(s, str(s.nr), 'count', a_k=BLOCK)} {put} }} }}"
    )


def _masking(mask: str | None, causal: bool, w: int, varlen: bool = False) -> str:
    """Statements that mask a row of scores S_[0..63]: query `row`, keys n0 + j, j < cols."""
    out = []
    if mask == "bool":
        out.append("for (uint j = 0; j < cols; j++) if (!mk_[(long)(n0 + j) * mk]) S_[j] = -INFINITY;")
    elif mask:
        out.append(
            f"if (mk == 1 && cols == {BLOCK}u) for (uint j = 0; j < {BLOCK}u; j += {w}u) "
            f"store{w}(LDV_{mask}(mk_ + n0 + j) + load{w}(0, S_ + j), 0, S_ + j); "
            f"else for (uint j = 0; j < cols; j++) S_[j] += LD_{mask}(mk_ + (long)(n0 + j) * mk);"
        )
    if out:
        out.insert(0, f"const __global {POINTEE[mask or 'f32']}* mk_ = mask + (long)row * mq;")
    if causal:  # key n0 + j <= row + diagonal
        out.append("for (int j = max(0, (int)row + diagonal - (int)n0 + 1); j < (int)cols; j++) S_[j] = -INFINITY;")
    if varlen:
        out.append(
            "for (int j = 0; j < min(max((int)skip, (int)row + lowest - (int)n0), (int)cols); j++) S_[j] = -INFINITY;"
        )
    out.append(f"for (uint j = cols; j < {BLOCK}u; j++) S_[j] = -INFINITY;")
    return " ".join(out)


def _whole(mask: str | None, causal: bool, varlen: bool) -> str:
    """Condition under which no score of a row and block is masked."""
    if mask:
        return "false"
    whole = f"cols == {BLOCK}u" + (f" && (int)n0 + {BLOCK - 1} <= (int)row + diagonal" if causal else "")
    return whole + (" && !skip && (int)n0 >= (int)row + lowest" if varlen else "")


# Of sequence z: its first and last query and key, and the range of keys that a row sees, relative to it.
SEQUENCE = """const uint qs = spans[z * 4], qe = spans[z * 4 + 1], ks = spans[z * 4 + 2], ke = spans[z * 4 + 3];
  const int diagonal = (int)(ke - qe) + right, lowest = (int)(ke - qe) - left;"""


def _see(s: Schedule, causal: bool, varlen: bool) -> str:
    """Statements that count the keys of the block that each group of rows sees."""
    count = (
        f"clamp((int)min(q0 + i * {s.mr}u + {s.mr - 1}u, last) + diagonal + 1 - (int)n0, 0, (int)keys)"
        if causal
        else "keys"
    )
    if not varlen:
        return f"for (uint i = 0; i < tiles; i++) seen[i] = {count};"
    return f"""const uint skip = ks > n0 ? ks - n0 : 0;
    for (uint i = 0; i < tiles; i++) seen[i] = min((uint){count}, ke - n0);"""


def _blocks(varlen: bool) -> tuple[str, str]:
    """The first key and the end of the keys over which a block of rows goes."""
    return (f"(uint)max((int)ks, (int)q0 + lowest) / {BLOCK}u * {BLOCK}u", "ke") if varlen else ("0", "Tk")


def _diagonals(causal: bool, varlen: bool) -> list[tuple[str, str]]:
    return [("left", "i32"), ("right", "i32")] if varlen else [("diagonal", "i32")] if causal else []


def attention_forward(
    target: Target,
    dtype: str,
    causal: bool = False,
    mask: str | None = None,
    width: int | None = None,
    varlen: bool = False,
    dropout: bool = False,
) -> Kernel:
    """O = softmax(scale * Q K^T + mask) V and its logsumexp (natural logarithm).

    Buffers: Q, Kc (packed columns of K, per B * Hk), Vr (packed rows of V), O, L[B, H, Tq] (f32, contiguous), and mask where given.
    mask: dtype of an additive mask, or "bool" (true: attend); strides may be 0. causal: key <= query + diagonal.
    Scalars: qb, qh, qt, ob, oh, ot, and with mask mb, mh, mq, mk (i64); H, group, Tq, Tk, D, Dv (u32), diagonal (i32, if causal), scale (f32).
    Grid: (cdiv(Tq, 48), B * H, 1).

    varlen (with causal, without mask): the sequences of a batch lie one after the other in tensors with B = 1. A further buffer, spans
    [sequences, 4] (int32), says where each begins and ends, in Q and in K. Query i sees keys from i + d - left to i + d + right, where
    the last query of a sequence has its d at the last key; left and right (i32) take the place of diagonal. Tq and Tk are
    those of all sequences together. Grid: (cdiv(the longest, 48), sequences * H, 1).

    dropout: the last buffer is seed (two u32), the last scalars are keep (of 2^24, the probability to keep) and drop_scale.
    """
    assert not varlen or (causal and not mask)
    s = block_schedule("f32", width or vector_width())
    w, mr, nr = s.w, s.mr, s.nr
    first, end = _blocks(varlen)
    scaling, base2, logsumexp = _units(mask)
    kept = [f" * load{w}(j, F + (r + {i}) * {BLOCK})" if dropout else "" for i in range(2)]
    if varlen:
        place = f"""const uint z = bh / H; {SEQUENCE}
  const uint q0 = qs + qi * {ROWS}u; if (q0 >= qe) return;
  const uint last = qe - 1, rows = min({ROWS}u, qe - q0)"""
    else:
        place = f"const uint q0 = qi * {ROWS}u, last = Tq - 1, rows = min({ROWS}u, Tq - q0)"
    body = f"""
  T Qp[{ROWS * MAX_HEAD}]; T Op[{ROWS * MAX_HEAD}]; T S[{ROWS * BLOCK}]; T M_[{ROWS}]; T Z[{ROWS}]; T top[{ROWS}]; T al[{ROWS}]; uint seen[{ROWS // mr}];{f" T F[{ROWS * BLOCK}];" if dropout else ""}
  const uint nq = get_num_groups(0), x = get_group_id(0), bh = get_group_id(1), b = {"0" if varlen else "bh / H"}, h = bh % H;
  const uint qi = {"(x & 1) ? nq - 1 - x / 2 : x / 2" if causal else "x"};  // heavy and light tasks alternate
  {place}, tiles = (rows + {mr - 1}u) / {mr}u;
  const uint NPk = (Tk + {nr - 1}u) / {nr}u, NPv = (Dv + {nr - 1}u) / {nr}u, hk = b * (H / group) + h / group;
  Q += (long)b * qb + (long)h * qh; O += (long)b * ob + (long)h * oh; L += (ulong){"h" if varlen else "bh"} * Tq;
  Kc += (ulong)hk * NPk * D * {nr}; Vr += (ulong)hk * Tk * NPv * {nr};
  {"mask += (long)b * mb + (long)h * mh;" if mask else ""}
  {_pack("Qp", "Q", dtype, "qt", "D", scaling, mr)}
  for (uint j = 0; j < tiles * {mr}u * NPv * {nr}u; j++) Op[j] = 0;
  for (uint r = 0; r < {ROWS}u; r++) {{ M_[r] = -INFINITY; Z[r] = 0; al[r] = 0; }}
  for (uint n0 = {first}; n0 < {end}; n0 += {BLOCK}u) {{
    const uint keys = min({BLOCK}u, Tk - n0);
    {"if ((int)n0 > (int)(q0 + rows - 1) + diagonal) break;" if causal else ""}
    {_see(s, causal, varlen)}{FACTORS.format(mr=mr, block=BLOCK) if dropout else ""}
    {_product(s, "Qp", f"Kc + (ulong)(n0 / {nr}u) * D * {nr}", "D", "S")}
    for (uint i = 0; i < tiles; i++) {{
      const uint cols = seen[i]; if (!cols) continue;
      for (uint r = i * {mr}u; r < (i + 1) * {mr}u; r++) {{
        const uint row = min(q0 + r, last); T* S_ = S + r * {BLOCK};
        if (!({_whole(mask, causal, varlen)})) {{ {_masking(mask, causal, w, varlen)} }}
        V x0 = load{w}(0, S_), x1 = load{w}(1, S_);
        UNROLL for (uint j = 2; j < {BLOCK // w}u; j += 2) {{ x0 = max(x0, load{w}(j, S_)); x1 = max(x1, load{w}(j + 1, S_)); }}
        const T m = max(M_[r], vmax(max(x0, x1))); top[r] = m == -INFINITY ? 0 : m;
        al[r] = (M_[r] - top[r]){base2}; M_[r] = m;
      }}
    }}
    UNROLL for (uint r = 0; r < {ROWS // w}u; r++) store{w}(exp2v(load{w}(r, al)), r, al);
    for (uint i = 0; i < tiles; i++) if (seen[i]) for (uint r = i * {mr}u; r < (i + 1) * {mr}u; r += 2) {{  // two rows at a time: a row alone waits for its own sum
      T* S_ = S + r * {BLOCK}; T* R_ = S_ + {BLOCK}; const V t0 = (V)(top[r]), t1 = (V)(top[r + 1]); V z0 = (V)(0), z1 = (V)(0);
      UNROLL for (uint j = 0; j < {BLOCK // w}u; j++) {{
        const V e0 = exp2v((load{w}(j, S_) - t0){base2}), e1 = exp2v((load{w}(j, R_) - t1){base2});
        z0 += e0; z1 += e1; store{w}(e0{kept[0]}, j, S_); store{w}(e1{kept[1]}, j, R_);
      }}
      Z[r] = fma(Z[r], al[r], vsum(z0)); Z[r + 1] = fma(Z[r + 1], al[r + 1], vsum(z1));
    }}
    {_accumulate(s, "S", f"Vr + (ulong)n0 * NPv * {nr}", "Dv", "Op", "al", varlen)}
  }}
  for (uint r = 0; r < rows; r++) {{
    const T z = Z[r] == 0 ? 0 : 1 / Z[r]; const T* o = Op + (r / {mr}) * {mr} * NPv * {nr} + r % {mr} * {nr};
    L[q0 + r] = {logsumexp}(M_[r], Z[r]);
    __global {POINTEE[dtype]}* o_ = O + (long)(q0 + r) * ot; uint d = 0;
    for (; d + {w}u <= Dv; d += {w}u) STV_{dtype}(o_ + d, load{w}(0, o + d / {nr}u * {mr * nr} + d % {nr}u) * z);
    for (; d < Dv; d++) ST_{dtype}(o_ + d, o[d / {nr}u * {mr * nr} + d % {nr}u] * z);
  }}
"""
    strides = ["qb", "qh", "qt", "ob", "oh", "ot"] + (["mb", "mh", "mq", "mk"] if mask else [])
    name = "_".join(
        x
        for x in (
            "vector_attention",
            dtype,
            "causal" if causal else "",
            "varlen" if varlen else "",
            "dropout" if dropout else "",
            f"mask{mask}" if mask else "",
            f"w{w}",
        )
        if x
    )
    return finish(
        target,
        name,
        [("Q", dtype, "r"), ("Kc", "f32", "r"), ("Vr", "f32", "r"), ("O", dtype, "w"), ("L", "f32", "w")]
        + ([("mask", mask, "r")] if mask else [])
        + ([("spans", "i32", "r")] if varlen else [])
        + ([("seed", "u32", "r")] if dropout else []),
        [(x, "i64") for x in strides]
        + [(x, "u32") for x in ("H", "group", "Tq", "Tk", "D", "Dv")]
        + _diagonals(causal, varlen)
        + [("scale", "f32")]
        + (KEEP if dropout else []),
        _module(w, (dtype, *((mask,) if mask and mask != "bool" else ())))
        + _hmax(w)
        + (_dropout(w) if dropout else ""),
        body,
    )


def attention_decode(
    target: Target,
    dtype: str,
    causal: bool = False,
    mask: str | None = None,
    width: int | None = None,
    split: bool = False,
    varlen: bool = False,
    paged: bool = False,
) -> Kernel:
    """attention_forward for few queries (decoding with a KV cache): K and V are read in place, once per query, without packing.

    K and V have any strides of B, H and T and unit stride along D. Buffers: Q, K, V, O, L, and mask where given.
    Scalars: strides (i64) qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, and with mask mb, mh, mq, mk; then as attention_forward.
    Grid: (Tq, B * H, 1).

    split (few queries and heads for the compute units; not causal but varlen): group_id(2) is one of several runs of `span` keys. O
    [runs, B, H, Tq, Dv] (f32) and L [runs, B, H, Tq] are contiguous; simt's merge() finishes. span (u32) is the last scalar. Grid: (Tq,
    B * H, runs).

    varlen: as in attention_forward; the keys that a query sees are dealt to the runs evenly, without a span. Grid: (the longest,
    sequences * H, runs). paged (with varlen): K and V are pages [pages, Hk, page, D], whose strides are kb and vb; a further buffer,
    table [sequences, ..] (int32), says which pages hold the keys of a sequence, one after the other, which count from 0. Last
    scalars: tb (the row stride of table), page (keys of one), pages (u32).
    """
    assert varlen or not paged
    assert not split or varlen or not causal
    assert not varlen or (causal and not mask)
    w = block_schedule("f32", width or vector_width()).w
    scaling, base2, logsumexp = _units(mask)
    n, ku = 256, 4  # keys of a chunk, keys at a time

    def at(x: str, j: int) -> str:
        key = f"n0 + min(t + {j}u, cols - 1)"
        return f"in_pages({key}, {x}b, {x}t, table, page, pages)" if paged else f"(long)({key}) * {x}t"

    kptr = " ".join(
        f"const __global {POINTEE[dtype]}* k{j} = Ki + {at('k', j)}; V s{j} = (V)(0); T r{j} = 0;" for j in range(ku)
    )
    dots = " ".join(f"s{j} = FMA(q, LDV_{dtype}(k{j} + d), s{j});" for j in range(ku))
    dot1 = " ".join(f"r{j} = FMA(Qs[d], LD_{dtype}(k{j} + d), r{j});" for j in range(ku))
    put = " ".join(f"S[t + {j}] = vsum(s{j}) + r{j};" for j in range(ku))
    vptr = " ".join(
        f"const __global {POINTEE[dtype]}* v{j} = Vi + {at('v', j)}; const T p{j} = S[t + {j}];" for j in range(ku)
    )
    add = " ".join(f"a = FMA((V)(p{j}), LDV_{dtype}(v{j} + d), a);" for j in range(ku))
    add1 = " ".join(f"a = FMA(p{j}, LD_{dtype}(v{j} + d), a);" for j in range(ku))
    masked = (
        _masking(mask, causal and not varlen, w)
        .replace(f"j < {BLOCK}u", "j < ((cols + 15u) & ~15u)")
        .replace(f"cols == {BLOCK}u", "(cols & 15u) == 0")
    )
    out = "f32" if split else dtype
    # The row's place in what a run writes.
    place = f"{'((ulong)get_group_id(2) * H + h)' if varlen else '((ulong)get_group_id(2) * get_num_groups(1) + bh)'} * Tq + row"
    if varlen:  # no key of the range is masked
        query = f"""const uint z = bh / H; {SEQUENCE}
  const uint row = qs + get_group_id(0); if (row >= qe) return;
  const int seen = max((int)ks, (int)row + lowest), unseen = max(seen, min((int)ke, (int)row + diagonal + 1));
  {"table += (ulong)z * tb;" if paged else ""}"""
        first, keys = "(uint)seen", "(uint)unseen"
        if split:
            query += " const uint span = ((uint)(unseen - seen) + get_num_groups(2) - 1) / get_num_groups(2);"
            first, keys = "(uint)seen + get_group_id(2) * span", "min((uint)unseen, first + span)"
    else:
        query = "const uint row = get_group_id(0);"
        first = "get_group_id(2) * span" if split else "0"
        keys = (
            "min(Tk, (uint)max(0, (int)row + diagonal + 1))" if causal else "min(Tk, first + span)" if split else "Tk"
        )
    body = f"""
  T Qs[{MAX_HEAD}]; T Os[{MAX_HEAD}]; T S[{n}];
  const uint bh = get_group_id(1), b = {"0" if varlen else "bh / H"}, h = bh % H, hk = h / group;
  {query}
  Q += (long)b * qb + (long)h * qh + (long)row * qt; O += {f"({place}) * Dv" if split else "(long)b * ob + (long)h * oh + (long)row * ot"};
  Ki += (long)b * kb + (long)hk * kh; Vi += (long)b * vb + (long)hk * vh;
  {"mask += (long)b * mb + (long)h * mh;" if mask else ""}
  for (uint d = 0; d < D; d++) Qs[d] = LD_{dtype}(Q + d) * {scaling};
  for (uint d = 0; d < Dv; d++) Os[d] = 0;
  T m = -INFINITY, sum = 0;
  const uint first = {first};
  const uint keys = {keys};
  for (uint n0 = first; n0 < keys; n0 += {n}u) {{
    const uint cols = min({n}u, keys - n0); T* S_ = S;
    for (uint t = 0; t < cols; t += {ku}u) {{
      {kptr} uint d = 0;
      for (; d + {w}u <= D; d += {w}u) {{ const V q = load{w}(0, Qs + d); {dots} }}
      for (; d < D; d++) {{ {dot1} }}
      {put}
    }}
    {masked}
    T top = m; for (uint j = 0; j < cols; j++) top = max(top, S[j]);
    const T base = top == -INFINITY ? 0 : top, al = exp2((m - base){base2}); m = top;
    V zs = (V)(0); for (uint j = 0; j < cols; j += {w}u) {{ const V e = exp2v((load{w}(0, S + j) - base){base2}); zs += e; store{w}(e, 0, S + j); }}
    sum = fma(sum, al, vsum(zs));
    for (uint d = 0; d < Dv; d++) Os[d] *= al;
    for (uint t = 0; t < cols; t += {ku}u) {{
      {vptr} uint d = 0;
      for (; d + {w}u <= Dv; d += {w}u) {{ V a = load{w}(0, Os + d); {add} store{w}(a, 0, Os + d); }}
      for (; d < Dv; d++) {{ T a = Os[d]; {add1} Os[d] = a; }}
    }}
  }}
  const T inv = sum == 0 ? 0 : 1 / sum;
  L[{place if split else f"(ulong){'h' if varlen else 'bh'} * Tq + row"}] = {logsumexp}(m, sum);
  for (uint d = 0; d < Dv; d++) ST_{out}(O + d, Os[d] * inv);
"""
    strides = [p + e for p in "qkvo" for e in "bht"] + (["mb", "mh", "mq", "mk"] if mask else [])
    name = "_".join(
        x
        for x in (
            "vector_attention_decode",
            dtype,
            "causal" if causal else "",
            "varlen" if varlen else "",
            "paged" if paged else "",
            f"mask{mask}" if mask else "",
            "split" if split else "",
            f"w{w}",
        )
        if x
    )
    return finish(
        target,
        name,
        [("Q", dtype, "r"), ("Ki", dtype, "r"), ("Vi", dtype, "r"), ("O", out, "w"), ("L", "f32", "w")]
        + ([("mask", mask, "r")] if mask else [])
        + ([("spans", "i32", "r")] if varlen else [])
        + ([("table", "i32", "r")] if paged else []),
        [(x, "i64") for x in strides]
        + [(x, "u32") for x in ("H", "group", "Tq", "Tk", "D", "Dv")]
        + _diagonals(causal, varlen)
        + [("scale", "f32")]
        + ([("span", "u32")] if split and not varlen else [])
        + ([(x, "u32") for x in ("tb", "page", "pages")] if paged else []),
        _module(w, (dtype, *((mask,) if mask and mask != "bool" else ()))) + IN_PAGES * paged,
        body,
    )


def attention_delta(target: Target, dtype: str, width: int | None = None, mask: str | None = None) -> Kernel:
    """What the backward kernels need of each query: D[B * H, 3, cdiv(Tq, 64) * 64] (f32), the logsumexp in base 2 (natural for a mask that
    is added), what its rounding left, and sum(dO * O); 0 in padding.

    Buffers: O, G (gradient of O), L (from the forward), D. Scalars: ob, oh, ot, gb, gh, gt (i64), H, Tq, Dv (u32).
    Grid: (cdiv(Tq, 64), B * H, 1).
    """
    w = block_schedule("f32", width or vector_width()).w
    body = f"""
  const uint bh = get_group_id(1), b = bh / H, h = bh % H, q0 = get_group_id(0) * {BLOCK}u, T_ = get_num_groups(0) * {BLOCK}u;
  O += (long)b * ob + (long)h * oh; G += (long)b * gb + (long)h * gh; L += (ulong)bh * Tq; D += (ulong)bh * 3 * T_;
  for (uint t = q0; t < q0 + {BLOCK}u; t++) {{
    T sum = 0, l = 0, rest = 0;
    if (t < Tq) {{
      V x = (V)(0); uint d = 0; const __global {POINTEE[dtype]}* o = O + (long)t * ot; const __global {POINTEE[dtype]}* g = G + (long)t * gt;
      for (; d + {w}u <= Dv; d += {w}u) x = fma(LDV_{dtype}(o + d), LDV_{dtype}(g + d), x);
      sum = vsum(x);
      for (; d < Dv; d++) sum = fma(LD_{dtype}(o + d), LD_{dtype}(g + d), sum);
      if (L[t] != -INFINITY) {{ {"l = L[t];" if _natural(mask) else "l = L[t] * LOG2E; rest = fma(L[t], LOG2E, -l) + L[t] * LOG2E_REST;"} }}
    }}
    D[t] = l; D[T_ + t] = rest; D[2 * T_ + t] = sum;
  }}
"""
    return finish(
        target,
        f"vector_attention_delta_{dtype}{'_natural' * _natural(mask)}_w{w}",
        [("O", dtype, "r"), ("G", dtype, "r"), ("L", "f32", "r"), ("D", "f32", "w")],
        [(x, "i64") for x in ("ob", "oh", "ot", "gb", "gh", "gt")] + [(x, "u32") for x in ("H", "Tq", "Dv")],
        _module(w, (dtype,)),
        body,
    )


def attention_backward(
    target: Target,
    dtype: str,
    causal: bool = False,
    mask: str | None = None,
    queries: bool = True,
    keys: bool = True,
    mask_grad: bool = False,
    width: int | None = None,
    varlen: bool = False,
    dropout: bool = False,
) -> Kernel:
    """dQ (queries), and sums of dK and dV (keys), in one pass over the scores: five products, or three or four where less is wanted.

    A task takes one key head and every so many blocks of queries of the query heads that share it. It writes these queries' dQ, and
    adds to its own sums of dK and dV, which attention_backward_sum adds up. With mask_grad also the gradient of the scores, for the
    mask: dS[B, H, Tq, Tk] (f32, contiguous; where causal, the caller fills it with zeros first).
    Buffers: Q, G (dO), Kc, Vc (packed columns), D (attention_delta), Kr (packed rows) and dQ if queries, Ks and Vs if keys (f32,
    tasks * B * Hk * `sums(Tk, head)` elements each), dS with mask_grad, mask where given.
    Scalars: strides (i64) qb, qh, qt of Q; gb, gh, gt of G; dqb, dqh, dqt of dQ if queries; with mask mb, mh, mq, mk; then as the forward.
    Grid: (tasks a head: any number, B * Hk, 1).
    varlen: as in attention_forward; spans is the last buffer, the number of sequences (u32) the last scalar. dropout: as there.
    """
    s = block_schedule("f32", width or vector_width())
    w, mr, nr = s.w, s.mr, s.nr
    zero = "for (ulong j = 0; j < {n}; j += {w}u) store{w}((V)(0), 0, {p} + j);"
    size = f"(ulong)NB * {_block_rows(s) * nr}u"
    own = "((ulong)get_group_id(0) * get_num_groups(1) + get_group_id(1))"
    sums = ""
    if keys:
        sums = "".join(
            f"{p} += {own} * {size} * {n}; {zero.format(n=f'{size} * {n}', w=w, p=p)} "
            for p, n in (("Ks", "NPd"), ("Vs", "NPv"))
        )
    dq = dk = store = ""
    if queries:
        store = f"""for (uint r = 0; r < rows; r++) {{
        const T* a = X + r / {mr} * {mr} * NPd * {nr} + r % {mr} * {nr}; __global {POINTEE[dtype]}* d_ = dQ + (long)b * dqb + (long)h * dqh + (long)(q0 + r) * dqt;
        for (uint d = 0; d < D; d++) ST_{dtype}(d_ + d, a[d / {nr}u * {mr * nr} + d % {nr}u] * scale);
      }}"""
        dq = _accumulate(s, "P", f"Kr + ((ulong)hx * Tk + n0) * NPd * {nr}", "D", "X", "", varlen)
    if keys:
        at = f"(ulong)(n0 / {BLOCK}u) * {_block_rows(s) * nr}u"
        dk = _transposed(s, "S", "Gr", "Dv", f"Vs + {at} * NPv", causal) + _transposed(
            s, "P", "Qr", "D", f"Ks + {at} * NPd", causal
        )
    rows_of = _panels(s, "Qr", "Q_", dtype, "qt", "D") + _panels(s, "Gr", "G_", dtype, "gt", "Dv") if keys else ""
    first, end = _blocks(varlen)
    kept = f" * load{w}(j, F + r * {BLOCK})" if dropout else ""
    scaling, base2, _ = _units(mask)
    score = f"(load{w}(j, S_) - l - rest){base2}"
    if _natural(mask):  # which may leave scores no digits: a probability is 1 at most, and NaN stays
        score = f"select({score}, (V)(0), {score} > (V)(0))"
    sequences, length, start, stop = "", "Tq", "", "Tq"
    if varlen:
        sequences = f"for (uint z = 0; z < sequences; z++) {{ {SEQUENCE} const uint last = qe - 1;"
        length, start, stop = "qe - qs", "qs + ", "qe"
    body = f"""
  T Qp[{ROWS * MAX_HEAD}]; T Gp[{ROWS * MAX_HEAD}]; T S[{ROWS * BLOCK + w}]; T P[{ROWS * BLOCK + w}]; uint seen[{ROWS // mr}];{f" T F[{ROWS * BLOCK}];" if dropout else ""}
  {f"T X[{ROWS * MAX_HEAD}];" if queries else ""} {f"T Qr[{ROWS * MAX_HEAD}]; T Gr[{ROWS * MAX_HEAD}];" if keys else ""}
  const uint splits = get_num_groups(0), hx = get_group_id(1), hk = hx % (H / group), b = hx / (H / group){"" if varlen else ", last = Tq - 1"};
  const uint NB = (Tk + {BLOCK - 1}u) / {BLOCK}u, Td = (Tq + {BLOCK - 1}u) / {BLOCK}u * {BLOCK}u;
  const uint NPk = (Tk + {nr - 1}u) / {nr}u, NPd = (D + {nr - 1}u) / {nr}u, NPv = (Dv + {nr - 1}u) / {nr}u;
  Kc += (ulong)hx * NPk * D * {nr}; Vc += (ulong)hx * NPk * Dv * {nr};
  {sums}
  for (uint h = hk * group; h < (hk + 1) * group; h++) {{
    const uint bh = b * H + h; const __global T* Dn = Dl + (ulong)bh * 3 * Td;
    const __global {POINTEE[dtype]}* Q_ = Q + (long)b * qb + (long)h * qh; const __global {POINTEE[dtype]}* G_ = G + (long)b * gb + (long)h * gh;
    {"const __global " + POINTEE[mask] + "* mask = mask_ + (long)b * mb + (long)h * mh;" if mask else ""}
    {sequences}
    for (uint t = 0; t * splits * {ROWS}u < {length}; t++) {{  // blocks are dealt to and fro: later ones see more keys
      const uint q0 = {start}(t * splits + ((t & 1) ? splits - 1 - get_group_id(0) : get_group_id(0))) * {ROWS}u; if (q0 >= {stop}) continue;
      const uint rows = min({ROWS}u, {stop} - q0), tiles = (rows + {mr - 1}u) / {mr}u;
      {_pack("Qp", "Q_", dtype, "qt", "D", scaling, mr)} {_pack("Gp", "G_", dtype, "gt", "Dv", "1", mr)}
      {rows_of}
      {f"for (uint j = 0; j < tiles * {mr}u * NPd * {nr}u; j++) X[j] = 0;" if queries else ""}
      for (uint n0 = {first}; n0 < {end}; n0 += {BLOCK}u) {{
        const uint keys = min({BLOCK}u, Tk - n0);
        {"if ((int)n0 > (int)(q0 + rows - 1) + diagonal) break;" if causal else ""}
        {_see(s, causal, varlen)}{FACTORS.format(mr=mr, block=BLOCK) if dropout else ""}
        {_product(s, "Qp", f"Kc + (ulong)(n0 / {nr}u) * D * {nr}", "D", "S")}
        {_product(s, "Gp", f"Vc + (ulong)(n0 / {nr}u) * Dv * {nr}", "Dv", "P")}
        for (uint i = 0; i < tiles; i++) {{
          const uint cols = seen[i]; if (!cols) continue;
          for (uint r = i * {mr}u; r < (i + 1) * {mr}u; r++) {{
            const uint row = min(q0 + r, last); T* S_ = S + r * {BLOCK}; T* P_ = P + r * {BLOCK};
            if (!({_whole(mask, causal, varlen)})) {{ {_masking(mask, causal, w, varlen)} {"for (uint j = 0; j < skip; j++) P_[j] = 0;" if varlen else ""} for (uint j = cols; j < {BLOCK}u; j++) P_[j] = 0; }}
            const V l = (V)(Dn[row]), rest = (V)(Dn[Td + row]), delta = (V)(Dn[2 * Td + row]);
            UNROLL for (uint j = 0; j < {BLOCK // w}u; j++) {{
              const V p = exp2v({score}); store{w}(p * (load{w}(j, P_){kept} - delta), j, P_); {f"store{w}(p{kept}, j, S_);" if keys else ""}
            }}
            {"if (q0 + r <= last) for (uint j = 0; j < cols; j++) dS[((ulong)bh * Tq + row) * Tk + n0 + j] = P_[j];" if mask_grad else ""}
          }}
        }}
        {dq}
        {dk}
      }}
      {store}
    }}
    {"}" if varlen else ""}
  }}
"""
    strides = [p + e for p in ("q", "g", *(("dq",) if queries else ())) for e in ("b", "h", "t")]
    strides += ["mb", "mh", "mq", "mk"] if mask else []
    parts = (
        "dq" if queries else "",
        "dkv" if keys else "",
        dtype,
        "causal" if causal else "",
        "varlen" if varlen else "",
        "dropout" if dropout else "",
        f"mask{mask}" if mask else "",
    )
    return finish(
        target,
        "_".join(x for x in ("vector_attention", *parts, "ds" if mask_grad else "", f"w{w}") if x),
        [("Q", dtype, "r"), ("G", dtype, "r"), *((p, "f32", "r") for p in ("Kc", "Vc", "Dl"))]
        + ([("Kr", "f32", "r"), ("dQ", dtype, "w")] if queries else [])
        + ([("Ks", "f32", "rw"), ("Vs", "f32", "rw")] if keys else [])
        + ([("dS", "f32", "w")] if mask_grad else [])
        + ([("mask_", mask, "r")] if mask else [])
        + ([("spans", "i32", "r")] if varlen else [])
        + ([("seed", "u32", "r")] if dropout else []),
        [(x, "i64") for x in strides]
        + [(x, "u32") for x in ("H", "group", "Tq", "Tk", "D", "Dv")]
        + _diagonals(causal, varlen)
        + [("scale", "f32")]
        + ([("sequences", "u32")] if varlen else [])
        + (KEEP if dropout else []),
        _module(w, (dtype, *((mask,) if mask and mask != "bool" else ()))) + (_dropout(w) if dropout else ""),
        body,
    )


def _block_rows(s: Schedule) -> int:
    """Rows of a block of keys in whole register tiles."""
    return -(-BLOCK // s.mr) * s.mr


def sums(keys: Any, head: Any, s: Schedule | None = None) -> Any:
    """Elements of a task's sums of dK or dV: [cdiv(keys, 64)][group of mr keys][cdiv(head, nr)][mr][nr]."""
    s = s or block_schedule()
    return cdiv(keys, BLOCK) * _block_rows(s) * cdiv(head, s.nr) * s.nr


def attention_backward_sum(target: Target, dtype: str, width: int | None = None) -> Kernel:
    """dK and dV from the sums of attention_backward's tasks.

    Buffers: Ks, Vs, dK, dV. Scalars: dkb, dkh, dkt, dvb, dvh, dvt (i64), splits (tasks a head), Hk, Tk, D, Dv (u32), scale (f32).
    Grid: (cdiv(Tk, 64), B * Hk, 1).
    """
    s = block_schedule("f32", width or vector_width())
    w, mr, nr, block = s.w, s.mr, s.nr, _block_rows(s)
    parts = " ".join(
        f"""{{ const uint NP = ({depth} + {nr - 1}u) / {nr}u; const ulong whole = (ulong)get_num_groups(0) * {block * nr}u * NP;
    const __global T* p_ = {src} + hx * whole + get_group_id(0) * {block * nr}ul * NP + (r / {mr}u * NP * {mr}u + r % {mr}u) * {nr}u;
    __global {POINTEE[dtype]}* d_ = {dst} + (long)b * {dst.lower()}b + (long)h * {dst.lower()}h + (long)(n0 + r) * {dst.lower()}t;
    for (uint d = 0; d < {depth}; d += {w}u) {{
      const __global T* a_ = p_ + d / {nr}u * {mr * nr}u + d % {nr}u; V x = (V)(0);
      for (uint i = 0; i < splits; i++) x += load{w}(0, a_ + i * get_num_groups(1) * whole);
      {factor}
      if (d + {w}u <= {depth}) STV_{dtype}(d_ + d, x); else {{ T t[{w}]; store{w}(x, 0, t); for (uint j = 0; d + j < {depth}; j++) ST_{dtype}(d_ + d + j, t[j]); }}
    }} }}"""
        for src, dst, depth, factor in (("Ks", "dK", "D", "x *= scale;"), ("Vs", "dV", "Dv", ""))
    )
    body = f"""
  const uint n0 = get_group_id(0) * {BLOCK}u, rows = min({BLOCK}u, Tk - n0), hx = get_group_id(1), b = hx / Hk, h = hx % Hk;
  for (uint r = 0; r < rows; r++) {{ {parts} }}
"""
    return finish(
        target,
        f"vector_attention_sum_{dtype}_w{w}",
        [("Ks", "f32", "r"), ("Vs", "f32", "r"), ("dK", dtype, "w"), ("dV", dtype, "w")],
        [(x, "i64") for x in ("dkb", "dkh", "dkt", "dvb", "dvh", "dvt")]
        + [(x, "u32") for x in ("splits", "Hk", "Tk", "D", "Dv")]
        + [("scale", "f32")],
        _module(w, (dtype,)),
        body,
    )
