"""Attention for CPU devices: flash-style tiles of 6 rows by 64 columns, no score matrix in memory, no atomics.

Layouts: Q[B, H, Tq, D], K[B, Hk, Tk, D], V[B, Hk, Tk, Dv], O[B, H, Tq, Dv] with any strides of B, H, T and unit stride along D;
H = Hk * group. K is read from panels of keys ("columns": pack_columns) and V from blocks of 64 keys ("rows": pack_rows_), both
made by gemm.pack_b; padding and 16-bit conversions happen there. Scores are kept in base 2: scale * log2(e) multiplies Q once.
A fully masked row gives 0 and a logsumexp of -inf, as PyTorch's fused kernels do.
"""

from __future__ import annotations

from dataclasses import replace

from ..kernel import Kernel, Target
from ..opencl import POINTEE
from .gemm import Schedule, micro, pack_b, schedule
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


def column_schedule(s: Schedule | None = None) -> Schedule:
    """Schedule of pack_b for "columns": B[D, T] into panels [cdiv(T, nr), D, nr]. D is at most 256."""
    return replace(s or schedule(), kc=MAX_HEAD)


def row_schedule(s: Schedule | None = None) -> Schedule:
    """Schedule of pack_b for "rows": B[T, D] into [cdiv(T, 64), cdiv(D, nr), min(64, rest), nr]."""
    return replace(s or schedule(), kc=BLOCK)


def pack_columns(target: Target, dtype: str) -> Kernel:
    """gemm.pack_b of X[.., T, D] seen as [D, T] (bk = 1, bn = stride of T; K = D, N = T)."""
    return pack_b(target, dtype, "t", column_schedule())


def pack_rows(target: Target, dtype: str) -> Kernel:
    """gemm.pack_b of X[.., T, D] (bk = stride of T, bn = 1; K = T, N = D)."""
    return pack_b(target, dtype, "n", row_schedule())


def _module(w: int, dtypes: tuple[str, ...]) -> str:
    exp2 = EXP2.replace("as_V", f"as_float{w}").replace("as_U", f"as_int{w}").replace("convert_U", f"convert_int{w}")
    return prelude("f32", w, dtypes) + exp2 + "#define LOG2E 1.44269504f\n"


def _hmax(w: int) -> str:
    h = (
        "T vmax(V v) { float8 a = "
        + ("max(v.lo, v.hi)" if w == 16 else "v")
        + "; float4 b = max(a.lo, a.hi); float2 c = max(b.lo, b.hi); return max(c.x, c.y); }\n"
    )
    return h


def _pack(dst: str, src: str, dtype: str, stride: str, depth: str, factor: str, mr: int) -> str:
    """dst[d * mr + r] = src[row r, d] * factor, for rows r of a group; rows beyond the last repeat it."""
    return (
        f"for (uint r = 0; r < {mr}u; r++) {{ const __global {POINTEE[dtype]}* s_ = {src} + (long)min(g0 + r, last) * {stride}; "
        f"for (uint d = 0; d < {depth}; d++) {dst}[d * {mr} + r] = LD_{dtype}(s_ + d) * {factor}; }}"
    )


def _product(s: Schedule, a: str, panels: str, depth: str, out: str) -> str:
    """out[6][64] = a (packed rows, depth) x 64 columns of `panels`."""
    acc = " ".join(f"V c{r}_{v} = (V)(0);" for r in range(s.mr) for v in range(s.nv))
    put = " ".join(
        f"store{s.w}(c{r}_{v}, {v}, {out} + {r * BLOCK} + q * {s.nr});" for r in range(s.mr) for v in range(s.nv)
    )
    return (
        f"for (uint q = 0; q < {BLOCK // s.nr}u && q * {s.nr}u < cols; q++) {{ const T* a_ = {a}; "
        f"const __global T* b_ = {panels} + (ulong)q * {depth} * {s.nr}; {acc} {micro(s, str(s.nr), depth)} {put} }}"
    )


def _accumulate(s: Schedule, a: str, rows: str, depth: str, out: str, factor: str) -> str:
    """out[6][depth up to nr] = out * factor[r] + a[6][64] x rows[cols][depth]; tiles of `out` are [panel][6][nr]."""
    acc = " ".join(f"V c{r}_{v} = (V)(0);" for r in range(s.mr) for v in range(s.nv))
    old = f"load{s.w}({{v}}, o_ + {{r}} * {s.nr})"
    put = " ".join(
        f"store{s.w}("
        + (
            f"fma({old.format(v=v, r=r)}, (V)({factor}[{r}]), c{r}_{v})"
            if factor
            else f"{old.format(v=v, r=r)} + c{r}_{v}"
        )
        + f", {v}, o_ + {r} * {s.nr});"
        for r in range(s.mr)
        for v in range(s.nv)
    )
    return (
        f"for (uint q = 0; q * {s.nr}u < {depth}; q++) {{ const T* a_ = {a}; T* o_ = {out} + q * {s.mr * s.nr}; "
        f"const __global T* b_ = {rows} + (ulong)q * cols * {s.nr}; {acc} {micro(s, str(s.nr), 'cols', row_step=BLOCK)} {put} }}"
    )


def _masking(mask: str | None, causal: bool, w: int, row_stride: str, col_stride: str, transposed: bool) -> str:
    """Statements that mask one row of scores S_[0..63]: row `row`, columns n0 + j, j < cols."""
    out = []
    if mask == "bool":
        out.append(f"for (uint j = 0; j < cols; j++) if (!mk_[(long)(n0 + j) * {col_stride}]) S_[j] = -INFINITY;")
    elif mask:
        out.append(
            f"if ({col_stride} == 1 && cols == {BLOCK}u) for (uint j = 0; j < {BLOCK}u; j += {w}u) "
            f"store{w}(fma(LDV_{mask}(mk_ + n0 + j), (V)(LOG2E), load{w}(0, S_ + j)), 0, S_ + j); "
            f"else for (uint j = 0; j < cols; j++) S_[j] = fma(LD_{mask}(mk_ + (long)(n0 + j) * {col_stride}), LOG2E, S_[j]);"
        )
    if out:
        out.insert(0, f"const __global {POINTEE[mask or 'f32']}* mk_ = mask + (long)row * {row_stride};")
    if causal and not transposed:  # key n0 + j <= row + diagonal
        out.append("for (int j = max(0, (int)row + diagonal - (int)n0 + 1); j < (int)cols; j++) S_[j] = -INFINITY;")
    if causal and transposed:  # row is the key: query n0 + j >= row - diagonal
        out.append("for (int j = 0; j < min((int)cols, (int)row - diagonal - (int)n0); j++) S_[j] = -INFINITY;")
    out.append(f"for (uint j = cols; j < {BLOCK}u; j++) S_[j] = -INFINITY;")
    return " ".join(out)


def attention_forward(
    target: Target, dtype: str, causal: bool = False, mask: str | None = None, width: int | None = None
) -> Kernel:
    """O = softmax(scale * Q K^T + mask) V and its logsumexp (natural logarithm).

    Buffers: Q, Kc (packed columns of K, per B * Hk), Vr (packed rows of V), O, L[B, H, Tq] (f32, contiguous), and mask where given.
    mask: dtype of an additive mask, or "bool" (true: attend); strides may be 0. causal: key <= query + diagonal.
    Scalars: qb, qh, qt, ob, oh, ot, and with mask mb, mh, mq, mk (i64); H, group, Tq, Tk, D, Dv (u32), diagonal (i32, if causal), scale (f32).
    Grid: (cdiv(Tq, 48), B * H, 1).
    """
    s = schedule("f32", width or vector_width())
    w, mr, nr = s.w, s.mr, s.nr
    groups = ROWS // mr
    dpad = MAX_HEAD
    body = f"""
  T Qp[{groups * mr * dpad}]; T Op[{groups * mr * dpad}]; T S[{mr * BLOCK}]; T M_[{ROWS}]; T Z[{ROWS}]; T al[{w}] = {{0}}; T zs[{mr}], top[{mr}];  // {w} lanes hold the {mr} rows of a group
  const uint nq = get_num_groups(0), x = get_group_id(0), bh = get_group_id(1), b = bh / H, h = bh % H;
  const uint qi = {"(x & 1) ? nq - 1 - x / 2 : x / 2" if causal else "x"};  // heavy and light tasks alternate
  const uint q0 = qi * {ROWS}u, last = Tq - 1, rows = min({ROWS}u, Tq - q0);
  const uint NPk = (Tk + {nr - 1}u) / {nr}u, NPv = (Dv + {nr - 1}u) / {nr}u, hk = b * (H / group) + h / group;
  Q += (long)b * qb + (long)h * qh; O += (long)b * ob + (long)h * oh; L += (ulong)bh * Tq;
  Kc += (ulong)hk * NPk * D * {nr}; Vr += (ulong)hk * Tk * NPv * {nr};
  {"mask += (long)b * mb + (long)h * mh;" if mask else ""}
  for (uint i = 0; i < {groups}u; i++) {{ const uint g0 = q0 + i * {mr}u; if (g0 >= Tq) break;
    T* d_ = Qp + i * {mr} * D; {_pack("d_", "Q", dtype, "qt", "D", "(scale * LOG2E)", mr)} }}
  for (uint j = 0; j < {groups * mr}u * NPv * {nr}u; j++) Op[j] = 0;
  for (uint r = 0; r < {ROWS}u; r++) {{ M_[r] = -INFINITY; Z[r] = 0; }}
  for (uint n0 = 0; n0 < Tk; n0 += {BLOCK}u) {{
    const uint cols = min({BLOCK}u, Tk - n0);
    for (uint i = 0; i * {mr}u < rows; i++) {{
      const uint g0 = q0 + i * {mr}u;
      {f"if ((int)n0 > (int)min(g0 + {mr - 1}u, last) + diagonal) continue;" if causal else ""}
      {_product(s, f"Qp + i * {mr} * D", f"Kc + (ulong)(n0 / {nr}u) * D * {nr}", "D", "S")}
      for (uint r = 0; r < {mr}u; r++) {{
        const uint row = min(g0 + r, last); T* S_ = S + r * {BLOCK};
        {f"if (cols < {BLOCK}u" + (f" || (int)n0 + {BLOCK - 1} > (int)row + diagonal" if causal else "") + ") {" if not mask else "{"}
          {_masking(mask, causal, w, "mq", "mk", False)} }}
        V x0 = load{w}(0, S_), x1 = load{w}(1, S_);
        UNROLL for (uint j = 2; j < {BLOCK // w}u; j += 2) {{ x0 = max(x0, load{w}(j, S_)); x1 = max(x1, load{w}(j + 1, S_)); }}
        const T m = max(M_[i * {mr} + r], vmax(max(x0, x1))); top[r] = m == -INFINITY ? 0 : m;
        al[r] = M_[i * {mr} + r] - top[r]; M_[i * {mr} + r] = m;
      }}
      for (uint r = 0; r < {mr}u; r += 2) {{  // two rows at a time: a row alone waits for its own sum
        T* S_ = S + r * {BLOCK}; T* R_ = S_ + {BLOCK}; const V t0 = (V)(top[r]), t1 = (V)(top[r + 1]); V z0 = (V)(0), z1 = (V)(0);
        UNROLL for (uint j = 0; j < {BLOCK // w}u; j++) {{
          const V e0 = exp2v(load{w}(j, S_) - t0), e1 = exp2v(load{w}(j, R_) - t1);
          z0 += e0; z1 += e1; store{w}(e0, j, S_); store{w}(e1, j, R_);
        }}
        zs[r] = vsum(z0); zs[r + 1] = vsum(z1);
      }}
      store{w}(exp2v(load{w}(0, al)), 0, al);
      for (uint r = 0; r < {mr}u; r++) Z[i * {mr} + r] = fma(Z[i * {mr} + r], al[r], zs[r]);
      {_accumulate(s, "S", f"Vr + (ulong)n0 * NPv * {nr}", "Dv", f"Op + i * {mr} * NPv * {nr}", "al")}
    }}
  }}
  for (uint r = 0; r < rows; r++) {{
    const T z = Z[r] == 0 ? 0 : 1 / Z[r]; const T* o = Op + (r / {mr}) * {mr} * NPv * {nr} + r % {mr} * {nr};
    L[q0 + r] = M_[r] == -INFINITY ? -INFINITY : (M_[r] + log2(Z[r])) * 0.69314718f;
    for (uint d = 0; d < Dv; d++) ST_{dtype}(O + (long)(q0 + r) * ot + d, o[d / {nr}u * {mr * nr} + d % {nr}u] * z);
  }}
"""
    strides = ["qb", "qh", "qt", "ob", "oh", "ot"] + (["mb", "mh", "mq", "mk"] if mask else [])
    name = "_".join(
        x for x in ("vector_attention", dtype, "causal" if causal else "", f"mask{mask}" if mask else "", f"w{w}") if x
    )
    return finish(
        target,
        name,
        [("Q", dtype, "r"), ("Kc", "f32", "r"), ("Vr", "f32", "r"), ("O", dtype, "w"), ("L", "f32", "w")]
        + ([("mask", mask, "r")] if mask else []),
        [(x, "i64") for x in strides]
        + [(x, "u32") for x in ("H", "group", "Tq", "Tk", "D", "Dv")]
        + ([("diagonal", "i32")] if causal else [])
        + [("scale", "f32")],
        _module(w, (dtype, *((mask,) if mask and mask != "bool" else ()))) + _hmax(w),
        body,
    )


def attention_decode(
    target: Target, dtype: str, causal: bool = False, mask: str | None = None, width: int | None = None
) -> Kernel:
    """attention_forward for few queries (decoding with a KV cache): K and V are read in place, once per query, without packing.

    K and V have any strides of B, H and T and unit stride along D. Buffers: Q, K, V, O, L, and mask where given.
    Scalars: strides (i64) qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, and with mask mb, mh, mq, mk; then as attention_forward.
    Grid: (Tq, B * H, 1).
    """
    w = schedule("f32", width or vector_width()).w
    n, ku = 256, 4  # keys of a chunk, keys at a time
    kptr = " ".join(
        f"const __global {POINTEE[dtype]}* k{j} = Ki + (long)(n0 + min(t + {j}u, cols - 1)) * kt; V s{j} = (V)(0); T r{j} = 0;"
        for j in range(ku)
    )
    dots = " ".join(f"s{j} = FMA(q, LDV_{dtype}(k{j} + d), s{j});" for j in range(ku))
    dot1 = " ".join(f"r{j} = FMA(Qs[d], LD_{dtype}(k{j} + d), r{j});" for j in range(ku))
    put = " ".join(f"S[t + {j}] = vsum(s{j}) + r{j};" for j in range(ku))
    vptr = " ".join(
        f"const __global {POINTEE[dtype]}* v{j} = Vi + (long)(n0 + min(t + {j}u, cols - 1)) * vt; const T p{j} = S[t + {j}];"
        for j in range(ku)
    )
    add = " ".join(f"a = FMA((V)(p{j}), LDV_{dtype}(v{j} + d), a);" for j in range(ku))
    add1 = " ".join(f"a = FMA(p{j}, LD_{dtype}(v{j} + d), a);" for j in range(ku))
    masked = (
        _masking(mask, causal, w, "mq", "mk", False)
        .replace(f"j < {BLOCK}u", "j < ((cols + 15u) & ~15u)")
        .replace(f"cols == {BLOCK}u", "(cols & 15u) == 0")
    )
    body = f"""
  T Qs[{MAX_HEAD}]; T Os[{MAX_HEAD}]; T S[{n}];
  const uint row = get_group_id(0), bh = get_group_id(1), b = bh / H, h = bh % H, hk = h / group;
  Q += (long)b * qb + (long)h * qh + (long)row * qt; O += (long)b * ob + (long)h * oh + (long)row * ot;
  Ki += (long)b * kb + (long)hk * kh; Vi += (long)b * vb + (long)hk * vh;
  {"mask += (long)b * mb + (long)h * mh;" if mask else ""}
  for (uint d = 0; d < D; d++) Qs[d] = LD_{dtype}(Q + d) * (scale * LOG2E);
  for (uint d = 0; d < Dv; d++) Os[d] = 0;
  T m = -INFINITY, z = 0;
  const uint keys = {"min(Tk, (uint)max(0, (int)row + diagonal + 1))" if causal else "Tk"};
  for (uint n0 = 0; n0 < keys; n0 += {n}u) {{
    const uint cols = min({n}u, keys - n0); T* S_ = S;
    for (uint t = 0; t < cols; t += {ku}u) {{
      {kptr} uint d = 0;
      for (; d + {w}u <= D; d += {w}u) {{ const V q = load{w}(0, Qs + d); {dots} }}
      for (; d < D; d++) {{ {dot1} }}
      {put}
    }}
    {masked}
    T top = m; for (uint j = 0; j < cols; j++) top = max(top, S[j]);
    const T base = top == -INFINITY ? 0 : top, al = exp2(m - base); m = top;
    V zs = (V)(0); for (uint j = 0; j < cols; j += {w}u) {{ const V e = exp2v(load{w}(0, S + j) - base); zs += e; store{w}(e, 0, S + j); }}
    z = fma(z, al, vsum(zs));
    for (uint d = 0; d < Dv; d++) Os[d] *= al;
    for (uint t = 0; t < cols; t += {ku}u) {{
      {vptr} uint d = 0;
      for (; d + {w}u <= Dv; d += {w}u) {{ V a = load{w}(0, Os + d); {add} store{w}(a, 0, Os + d); }}
      for (; d < Dv; d++) {{ T a = Os[d]; {add1} Os[d] = a; }}
    }}
  }}
  const T inv = z == 0 ? 0 : 1 / z;
  L[(ulong)bh * Tq + row] = m == -INFINITY ? -INFINITY : (m + log2(z)) * 0.69314718f;
  for (uint d = 0; d < Dv; d++) ST_{dtype}(O + d, Os[d] * inv);
"""
    strides = [p + e for p in "qkvo" for e in "bht"] + (["mb", "mh", "mq", "mk"] if mask else [])
    name = "_".join(
        x
        for x in ("vector_attention_decode", dtype, "causal" if causal else "", f"mask{mask}" if mask else "", f"w{w}")
        if x
    )
    return finish(
        target,
        name,
        [("Q", dtype, "r"), ("Ki", dtype, "r"), ("Vi", dtype, "r"), ("O", dtype, "w"), ("L", "f32", "w")]
        + ([("mask", mask, "r")] if mask else []),
        [(x, "i64") for x in strides]
        + [(x, "u32") for x in ("H", "group", "Tq", "Tk", "D", "Dv")]
        + ([("diagonal", "i32")] if causal else [])
        + [("scale", "f32")],
        _module(w, (dtype, *((mask,) if mask and mask != "bool" else ()))),
        body,
    )


def attention_delta(target: Target, dtype: str, width: int | None = None) -> Kernel:
    """What the backward kernels need of each query: D[B * H, 2, cdiv(Tq, 64) * 64] (f32), the logsumexp in base 2 and sum(dO * O), 0 in padding.

    Buffers: O, G (gradient of O), L (from the forward), D. Scalars: ob, oh, ot, gb, gh, gt (i64), H, Tq, Dv (u32).
    Grid: (cdiv(Tq, 64), B * H, 1).
    """
    w = schedule("f32", width or vector_width()).w
    body = f"""
  const uint bh = get_group_id(1), b = bh / H, h = bh % H, q0 = get_group_id(0) * {BLOCK}u, T_ = get_num_groups(0) * {BLOCK}u;
  O += (long)b * ob + (long)h * oh; G += (long)b * gb + (long)h * gh; L += (ulong)bh * Tq; D += (ulong)bh * 2 * T_;
  for (uint t = q0; t < q0 + {BLOCK}u; t++) {{
    T sum = 0, l = 0;
    if (t < Tq) {{
      V x = (V)(0); uint d = 0; const __global {POINTEE[dtype]}* o = O + (long)t * ot; const __global {POINTEE[dtype]}* g = G + (long)t * gt;
      for (; d + {w}u <= Dv; d += {w}u) x = fma(LDV_{dtype}(o + d), LDV_{dtype}(g + d), x);
      sum = vsum(x);
      for (; d < Dv; d++) sum = fma(LD_{dtype}(o + d), LD_{dtype}(g + d), sum);
      l = L[t] == -INFINITY ? 0 : L[t] * LOG2E;
    }}
    D[t] = l; D[T_ + t] = sum;
  }}
"""
    return finish(
        target,
        f"vector_attention_delta_{dtype}_w{w}",
        [("O", dtype, "r"), ("G", dtype, "r"), ("L", "f32", "r"), ("D", "f32", "w")],
        [(x, "i64") for x in ("ob", "oh", "ot", "gb", "gh", "gt")] + [(x, "u32") for x in ("H", "Tq", "Dv")],
        _module(w, (dtype,)),
        body,
    )


def _backward(
    target: Target, dtype: str, causal: bool, mask: str | None, width: int | None, keys: bool, mask_grad: bool = False
) -> Kernel:
    s = schedule("f32", width or vector_width())
    w, mr, nr = s.w, s.mr, s.nr
    groups = ROWS // mr
    # rows: this task's; columns: what it sums over. For keys: S^T, a row is a key.
    r1, r2, c1, c2, o1 = ("Ki", "Vi", "Qc", "Gc", "dK") if keys else ("Q", "G", "Kc", "Vc", "dQ")
    nrows, ncols = ("Tk", "Tq") if keys else ("Tq", "Tk")
    rs, cs = ("mk", "mq") if keys else ("mq", "mk")
    skip = ""
    if causal:
        skip = (
            "if ((int)(n0 + cols) <= (int)g0 - diagonal) continue;"
            if keys
            else f"if ((int)n0 > (int)min(g0 + {mr - 1}u, last) + diagonal) continue;"
        )
    full = " || (int)n0 < (int)row - diagonal" if keys else f" || (int)n0 + {BLOCK - 1} > (int)row + diagonal"
    guard = "" if mask else f"if (cols < {BLOCK}u{full if causal else ''}) "
    lse = "load{w}(0, Dn + n0 + j)" if keys else "(V)(Dn[row])"
    delta = "load{w}(0, Dn + Td + n0 + j)" if keys else "(V)(Dn[Td + row])"
    lse, delta = lse.format(w=w), delta.format(w=w)
    grad_rows = "Qr" if keys else "Kr"
    heads = "for (uint hh = 0; hh < group; hh++)" if keys else ""
    per_head = f"""
    const uint h = {"hk * group + hh" if keys else "hx"}; const uint bh = b * H + h;
    const __global float* Dn = Dl + (ulong)bh * 2 * Td;
    {"const __global " + POINTEE[mask] + "* mask = mask_ + (long)b * mb + (long)h * mh;" if mask else ""}
    const ulong ci = {"bh" if keys else "b * (H / group) + h / group"};
    const __global T* C1 = {c1} + ci * NPc * D * {nr}; const __global T* C2 = {c2} + ci * NPc * Dv * {nr};
    const __global T* R1 = {grad_rows} + ci * {ncols} * NPd * {nr};
    {"const __global T* R2 = Gr + ci * Tq * NPv * " + str(nr) + ";" if keys else ""}"""
    body = f"""
  T Ap[{groups * mr * MAX_HEAD}]; T Bp[{groups * mr * MAX_HEAD}]; T X1[{groups * mr * MAX_HEAD}]; {
        f"T X2[{groups * mr * MAX_HEAD}];" if keys else ""
    }
  T S[{mr * BLOCK}]; T P[{mr * BLOCK}];
  const uint nx = get_num_groups(0), x = get_group_id(0), Hx = {
        "H / group" if keys else "H"
    }, b = get_group_id(1) / Hx, hx = get_group_id(1) % Hx;
  {"const uint hk = hx;" if keys else ""}
  const uint qi = {"(x & 1) ? nx - 1 - x / 2 : x / 2" if causal else "x"};
  const uint q0 = qi * {ROWS}u, last = {nrows} - 1, rows = min({ROWS}u, {nrows} - q0), Td = (Tq + {BLOCK - 1}u) / {
        BLOCK
    }u * {BLOCK}u;
  const uint NPc = ({ncols} + {nr - 1}u) / {nr}u, NPd = (D + {nr - 1}u) / {nr}u, NPv = (Dv + {nr - 1}u) / {nr}u;
  {r1} += (long)b * xb + (long)hx * xh; {r2} += (long)b * yb + (long)hx * yh;
  {o1} += (long)b * dxb + (long)hx * dxh; {"dV += (long)b * dyb + (long)hx * dyh;" if keys else ""}
  for (uint i = 0; i * {mr}u < rows; i++) {{ const uint g0 = q0 + i * {mr}u;
    T* d1 = Ap + i * {mr} * D; {_pack("d1", r1, dtype, "xt", "D", "(scale * LOG2E)", mr)}
    T* d2 = Bp + i * {mr} * Dv; {_pack("d2", r2, dtype, "yt", "Dv", "1", mr)} }}
  for (uint j = 0; j < {groups * mr}u * NPd * {nr}u; j++) X1[j] = 0;
  {f"for (uint j = 0; j < {groups * mr}u * NPv * {nr}u; j++) X2[j] = 0;" if keys else ""}
  {heads} {{ {per_head}
    for (uint n0 = 0; n0 < {ncols}; n0 += {BLOCK}u) {{
      const uint cols = min({BLOCK}u, {ncols} - n0);
      for (uint i = 0; i * {mr}u < rows; i++) {{
        const uint g0 = q0 + i * {mr}u;
        {skip}
        {_product(s, f"Ap + i * {mr} * D", f"C1 + (ulong)(n0 / {nr}u) * D * {nr}", "D", "S")}
        {_product(s, f"Bp + i * {mr} * Dv", f"C2 + (ulong)(n0 / {nr}u) * Dv * {nr}", "Dv", "P")}
        for (uint r = 0; r < {mr}u; r++) {{
          const uint row = min(g0 + r, last); T* S_ = S + r * {BLOCK}; T* P_ = P + r * {BLOCK};
          {guard}{{ {_masking(mask, causal, w, rs, cs, keys)} for (uint j = cols; j < {BLOCK}u; j++) P_[j] = 0; }}
          UNROLL for (uint j = 0; j < {BLOCK}u; j += {w}u) {{
            const V p = exp2v(load{w}(0, S_ + j) - {lse if not keys else f"({lse})"});
            store{w}(p * (load{w}(0, P_ + j) - {delta}), 0, P_ + j); {f"store{w}(p, 0, S_ + j);" if keys else ""}
          }}
          {
        "if (g0 + r <= last) for (uint j = 0; j < cols; j++) dS[((ulong)bh * Tq + row) * Tk + n0 + j] = P_[j];"
        if mask_grad
        else ""
    }
        }}
        {_accumulate(s, "P", f"R1 + (ulong)n0 * NPd * {nr}", "D", f"X1 + i * {mr} * NPd * {nr}", "")}
        {_accumulate(s, "S", f"R2 + (ulong)n0 * NPv * {nr}", "Dv", f"X2 + i * {mr} * NPv * {nr}", "") if keys else ""}
      }}
    }}
  }}
  for (uint r = 0; r < rows; r++) {{
    const T* a = X1 + (r / {mr}) * {mr} * NPd * {nr} + r % {mr} * {nr};
    for (uint d = 0; d < D; d++) ST_{dtype}({o1} + (long)(q0 + r) * dxt + d, a[d / {nr}u * {mr * nr} + d % {
        nr
    }u] * scale);
    {
        f'''const T* v = X2 + (r / {mr}) * {mr} * NPv * {nr} + r % {mr} * {nr};
    for (uint d = 0; d < Dv; d++) ST_{dtype}(dV + (long)(q0 + r) * dyt + d, v[d / {nr}u * {mr * nr} + d % {nr}u]);'''
        if keys
        else ""
    }
  }}
"""
    packed = ("Qc", "Gc", "Qr", "Gr") if keys else ("Kc", "Vc", "Kr")
    outs = ("dK", "dV") if keys else ("dQ",)
    strides = [p + e for p in ("x", "y", "dx", *(("dy",) if keys else ())) for e in ("b", "h", "t")] + (
        ["mb", "mh", "mq", "mk"] if mask else []
    )
    name = "_".join(
        x
        for x in (
            "vector_attention",
            "dkv" if keys else "dq",
            dtype,
            "causal" if causal else "",
            f"mask{mask}" if mask else "",
            "ds" if mask_grad else "",
            f"w{w}",
        )
        if x
    )
    return finish(
        target,
        name,
        [
            (r1, dtype, "r"),
            (r2, dtype, "r"),
            *((p, "f32", "r") for p in packed),
            ("Dl", "f32", "r"),
            *((o, dtype, "w") for o in outs),
            *((("dS", "f32", "w"),) if mask_grad else ()),
        ]
        + ([("mask_", mask, "r")] if mask else []),
        [(x, "i64") for x in strides]
        + [(x, "u32") for x in ("H", "group", "Tq", "Tk", "D", "Dv")]
        + ([("diagonal", "i32")] if causal else [])
        + [("scale", "f32")],
        _module(w, (dtype, *((mask,) if mask and mask != "bool" else ()))),
        body,
    )


def attention_backward_q(
    target: Target,
    dtype: str,
    causal: bool = False,
    mask: str | None = None,
    width: int | None = None,
    mask_grad: bool = False,
) -> Kernel:
    """dQ, one pass over blocks of queries; with mask_grad also the gradient of the scores, for the mask: dS[B, H, Tq, Tk] (f32,
    contiguous; where causal, the caller fills it with zeros first).

    Buffers: Q, G (dO), Kc, Vc (packed columns), Kr (packed rows), D (attention_delta), dQ, dS with mask_grad, mask where given.
    Scalars: strides (i64) xb, xh, xt of Q; yb, yh, yt of G; dxb, dxh, dxt of dQ; with mask mb, mh, mq, mk; then as the forward.
    Grid: (cdiv(Tq, 48), B * H, 1).
    """
    return _backward(target, dtype, causal, mask, width, False, mask_grad)


def attention_backward_kv(
    target: Target, dtype: str, causal: bool = False, mask: str | None = None, width: int | None = None
) -> Kernel:
    """dK and dV, one pass over blocks of keys, summed over the query heads that share them.

    Buffers: K, V, Qc, Gc (packed columns of Q and dO), Qr, Gr (packed rows), D (attention_delta), dK, dV, mask where given.
    Scalars: strides (i64) x* of K, y* of V, dx* of dK, dy* of dV (b, h, t each); with mask mb, mh, mq, mk; then as the forward.
    Grid: (cdiv(Tk, 48), B * Hk, 1).
    """
    return _backward(target, dtype, causal, mask, width, True)
