"""Convolution for CPU devices as an implicit matrix product: out[n, g] = W[g] (Co/g x K) @ im2col(x[n, g]) (K x pixels), K = Ci/g * taps.

Kernels are three-dimensional; 1-d and 2-d have extents and taps of 1. `pad` copies the input once into a zero-bordered f32 buffer
X[N, C, DP, HP, WP], which makes every tap of every pixel an offset: X[off(pixel) + tap]. So stride, dilation, padding, any strides of the
input, and zero insertion (transposed convolution) live in two small tables, and the inner loops are those of `gemm`.

Backward for input is a forward convolution of the gradient with flipped weights: `pad` inserts stride - 1 zeros, `pack_weights`
takes negative strides. With stride > 1 that multiplies zeros; the caller launches once per phase of the output instead (strided
outputs, every stride-th tap), depthwise ones excepted. 1x1 convolutions with stride 1 are `gemm` on [Co, Ci] x [Ci, pixels].
"""

from __future__ import annotations

from typing import Any

from ..kernel import Kernel, Target
from ..opencl import POINTEE
from .gemm import NO_EPILOGUE, Epilogue, Schedule, block_schedule, micro, pack_macros
from .source import compute_dtype, finish, math_functions, prelude, transpose

SLACK = 64  # elements that X must have beyond its end: vectors read past the last pixel
PIXELS = 128  # of a block


def conv_schedule(compute: str = "f32", width: int | None = None) -> Schedule:
    """The matrix product's tile with blocks of 128 pixels, or of 256 taps for the gradient of the weights."""
    s = block_schedule(compute, width)
    return Schedule(s.w, s.mr, s.nv, 96, 256 if compute == "f32" else 128, 256)


def pad(target: Target, dtype: str, s: Schedule | None = None) -> Kernel:
    """X[n, c, z, y, x] = in[n, c, (z - pd) / ud, (y - ph) / uh, (x - pw) / uw] where those divide and are in range, else 0.

    Buffers: in (any strides), X (compute dtype, contiguous [N, C, DP, HP, WP] + SLACK elements).
    Scalars: sn, sc, sd, sh, sw (i64 strides); C, ID, IH, IW, DP, HP, WP, ud, uh, uw (u32); pd, ph, pw (i32, negative crops).
    Grid: (tasks along C * DP * HP, N, 1).
    """
    compute = compute_dtype(dtype)
    w = (s or conv_schedule(compute)).w
    body = f"""
  const uint R = C * DP * HP;
  const uint r0 = (ulong)R * get_group_id(0) / get_num_groups(0), r1 = (ulong)R * (get_group_id(0) + 1) / get_num_groups(0);
  in += (long)get_group_id(1) * sn; X += (ulong)get_group_id(1) * R * WP;
  for (uint r = r0; r < r1; r++) {{
    const uint c = r / (DP * HP); const int z = (int)(r / HP % DP) - pd, y = (int)(r % HP) - ph;
    __global T* d = X + (ulong)r * WP;
    if (z < 0 || y < 0 || z % (int)ud || y % (int)uh || z / (int)ud >= (int)ID || y / (int)uh >= (int)IH) {{ for (uint x = 0; x < WP; x++) d[x] = 0; continue; }}
    const __global {POINTEE[dtype]}* p = in + (long)c * sc + (long)(z / (int)ud) * sd + (long)(y / (int)uh) * sh;
    if (uw == 1) {{
      const uint lo = max(pw, 0), hi = max((int)lo, min((int)WP, (int)IW + pw));
      for (uint x = 0; x < lo; x++) d[x] = 0;
      uint x = lo; p += -(long)pw * sw;
      if (sw == 1) for (; x + {w}u <= hi; x += {w}u) store{w}(LDV_{dtype}(p + x), 0, d + x);
      for (; x < hi; x++) d[x] = LD_{dtype}(p + (long)x * sw);
      for (x = hi; x < WP; x++) d[x] = 0;
    }} else {{
      for (uint x = 0; x < WP; x++) d[x] = 0;
      for (uint i = 0; i < IW; i++) {{ const int x = (int)(i * uw) + pw; if (x >= 0 && x < (int)WP) d[x] = LD_{dtype}(p + (long)i * sw); }}
    }}
  }}
"""
    return finish(
        target,
        f"vector_conv_pad_{dtype}_w{w}",
        [("in", dtype, "r"), ("X", compute, "w")],
        [(x, "i64") for x in ("sn", "sc", "sd", "sh", "sw")]
        + [(x, "u32") for x in ("C", "ID", "IH", "IW", "DP", "HP", "WP", "ud", "uh", "uw")]
        + [(x, "i32") for x in ("pd", "ph", "pw")],
        prelude(compute, w, (dtype,)),
        body,
    )


def pack_weights(target: Target, dtype: str, s: Schedule | None = None) -> Kernel:
    """P[g, cdiv(K, kc), cdiv(M, mr), min(kc, rest), mr] = W[g, m, k], k = ((c * KD + kz) * KH + ky) * KW + kx.

    Buffers: W, P (compute dtype; G * K * cdiv(M, mr) * mr elements). Scalars: w0 (i64, offset of the first element: strides may be negative), wg, wm, wc,
    wd, wh, ww (i64); M, K, KD, KH, KW (u32). Grid: (tasks along panels, tasks along K, G).
    """
    compute = compute_dtype(dtype)
    s = s or conv_schedule(compute)
    mr, kc = s.mr, s.kc
    tw, macros = pack_macros(compute, s.w, dtype)
    assert mr <= tw or tw == 4
    loads = " ".join(
        f"const CV{tw} x{g}_{i} = "
        + (f"LD{tw}_{dtype}(W + (long)min(m + {i + g}u, M - 1) * wm + k);" if i + g < mr else f"(CV{tw})(0);")
        for g in range(0, mr, tw)
        for i in range(tw)
    )
    turn = "\n".join(
        transpose(tw, [f"x{g}_{i}" for i in range(tw)], [f"y{g}_{i}" for i in range(tw)], f"const CV{tw}")
        for g in range(0, mr, tw)
    )
    rest = " ".join(f"d[{i * mr + r}] = y{r // tw * tw}_{i}.s{r % tw};" for i in range(tw) for r in range(mr))
    body = f"""
  const uint MP = (M + {mr - 1}u) / {mr}u, KB = (K + 7u) / 8u;
  const uint p0 = (ulong)MP * get_group_id(0) / get_num_groups(0), p1 = (ulong)MP * (get_group_id(0) + 1) / get_num_groups(0);
  const uint k0 = (ulong)KB * get_group_id(1) / get_num_groups(1) * 8u, k1 = min(K, (uint)((ulong)KB * (get_group_id(1) + 1) / get_num_groups(1) * 8u));
  W += w0 + (long)get_group_id(2) * wg; P += (ulong)get_group_id(2) * K * MP * {mr};
  const bool dense = ww == 1 && wh == KW && wd == KW * KH && wc == KW * KH * KD;
  for (uint p = p0; p < p1; p++) {{
    const uint m = p * {mr}u; uint k = k0;
    if (dense) for (; k + {tw}u <= k1; k += {tw}u) {{
      __global T* d = P + ((ulong)(k / {kc}u * {kc}u) * MP + (ulong)p * min({kc}u, K - k / {kc}u * {kc}u) + k % {kc}u) * {mr};
      {loads}
      {turn} {rest}
    }}
    uint x = k % KW, y = k / KW % KH, z = k / (KW * KH) % KD, c = k / (KW * KH * KD);
    for (; k < k1; k++) {{
      __global T* d = P + ((ulong)(k / {kc}u * {kc}u) * MP + (ulong)p * min({kc}u, K - k / {kc}u * {kc}u) + k % {kc}u) * {mr};
      const __global {POINTEE[dtype]}* q = W + (long)c * wc + (long)z * wd + (long)y * wh + (long)x * ww;
      UNROLL for (uint r = 0; r < {mr}u; r++) d[r] = LD_{dtype}(q + (long)min(m + r, M - 1) * wm);
      if (++x == KW) {{ x = 0; if (++y == KH) {{ y = 0; if (++z == KD) {{ z = 0; c++; }} }} }}
    }}
  }}
"""
    return finish(
        target,
        f"vector_conv_pack_{dtype}_{s}",
        [("W", dtype, "r"), ("P", compute, "w")],
        [(x, "i64") for x in ("w0", "wg", "wm", "wc", "wd", "wh", "ww")]
        + [(x, "u32") for x in ("M", "K", "KD", "KH", "KW")],
        prelude(compute, s.w, (dtype,)) + macros,
        body,
    )


GEOMETRY = ("OD", "OH", "OW", "KD", "KH", "KW", "DP", "HP", "WP", "td", "th", "tw", "dd", "dh", "dw", "K", "CG")
GEOMETRY_DOC = """OD, OH, OW (output extents), KD, KH, KW (taps), DP, HP, WP (extents of X), td, th, tw (strides), dd, dh, dw (dilations),
    K = CG * KD * KH * KW, CG = input channels of a group"""

OFFSETS = """
#define PIXEL(p) ((uint)(((p) / (OH * OW) * td * HP + (p) / OW % OH * th) * WP + (p) % OW * tw))
#define TAP(k) ((uint)((((k) / (KW * KH * KD) * DP + (k) / (KW * KH) % KD * dd) * HP + (k) / KW % KH * dh) * WP + (k) % KW * dw))
"""


def _pixel_vector(w: int, src: str) -> dict[int, str]:
    """Expression of the w pixels of one vector, by kind: 0 consecutive, 1 with one jump (lanes >= cut are `gap` further), 2 stride of two, 3 anything."""
    lanes = ", ".join(f"({src})[of[{i}]]" for i in range(w))
    return {
        0: f"load{w}(0, {src} + base)",
        1: f"select(load{w}(0, {src} + base), load{w}(0, {src} + base + gap), cut)",
        2: f"(V)(load{w}(0, {src} + base).even, load{w}(0, {src} + base + {w}).even)",
        3: f"(V)({lanes})",
    }


CLASSIFY = """
const __private uint* of = off + {v}; const uint base = of[0]; int kind = 0, jump = {w}; uint gap = 0;
{{ int two = 1, ones = 1, jumps = 0;
  for (int i = 1; i < {w}; i++) {{ const uint s_ = of[i] - of[i - 1]; if (s_ != 2) two = 0; if (s_ != 1) {{ ones = 0; jumps++; jump = i; gap = s_ - 1; }} }}
  kind = ones ? 0 : jumps == 1 && gap < 0x7fffffffu ? 1 : two ? 2 : 3; }}
const U cut = ((U)({iota}) >= (U)(jump)) ? (U)(-1) : (U)(0);
"""


def conv(
    target: Target, dtype: str, contiguous: bool = True, epilogue: Epilogue = NO_EPILOGUE, s: Schedule | None = None
) -> Kernel:
    """out[n, g * M + m, pixel] = epilogue(sum over k of W[g, m, k] * X[n, g * CG + c(k), pixel + tap(k)]).

    contiguous: the pixels of one output channel are consecutive; else they have strides od, oh, ow. K = 0: the epilogue of 0. Epilogue operands: "m" (per output channel,
    the row index is g * M + m), "mn" (strided as the output: row stride, pixels as in the output), batch stride as usual.
    Buffers: X (from pad), P (pack_weights), out, operands. Scalars: xn (elements of X an image), on, oc, od, oh, ow (i64 strides of the output), the
    epilogue's; M (output channels of a group), G, {geometry} (u32).
    Grid: (tasks along pixels, tasks along M, N * G), any numbers: see conv_groups.
    """
    compute = compute_dtype(dtype)
    s = s or conv_schedule(compute)
    w, mr, nv, nr, mc, kc = s.w, s.mr, s.nv, s.nr, s.mc, s.kc
    ep = epilogue
    iota = ", ".join(str(i) for i in range(w))
    if compute in ("f64", "i64"):
        iota = ", ".join(f"{i}l" for i in range(w))
    cases = _pixel_vector(w, "Xg + ko[k]")
    gather = " ".join(
        f"{'' if i == 0 else 'else '}if (kind == {i}) for (uint k = 0; k < kn; k++) store{w}({c}, 0, d + k * {nr});"
        for i, c in cases.items()
    )
    acc = " ".join(f"V c{r}_{v} = (V)(0);" for r in range(mr) for v in range(nv))
    to_tile = " ".join(f"store{w}(c{r}_{v}, {v}, t_ + {r * nr});" for r in range(mr) for v in range(nv))
    from_tile = " ".join(f"c{r}_{v} += load{w}({v}, t_ + {r * nr});" for r in range(mr) for v in range(nv))

    starts = " ".join(f"const __global T* x{v}_ = Xg + off[b * {nr}u + {v * w}u];" for v in range(nv))
    at = "out + (long)row * oc + "
    if contiguous:
        full = "\n".join(
            f"if ({r}u < rows) {{ const uint row = m0 + {r}u; "
            + " ".join(
                f"{{ const uint col = n0 + {v * w}u; V x = c{r}_{v}; {ep.apply('x', 'row', 'col', w, True)} STV_{dtype}({at}col, x); }}"
                for v in range(nv)
            )
            + " }"
            for r in range(mr)
        )
        store = "" if ep.needs_math() else f"if (n == {nr}u) {{ {full} }} else"  # as in gemm
        pos = "n0 + j"
    else:
        store = ""
        pos = f"place[b * {nr}u + j]"
    place = (
        "" if contiguous else "place[j] = (long)(p / (OH * OW)) * od + (long)(p / OW % OH) * oh + (long)(p % OW) * ow;"
    )
    vector = (
        ""
        if not contiguous
        else (
            f"for (; j + {w}u <= n; j += {w}u) {{ const uint col = n0 + j; V x = load{w}(0, t_ + r * {nr} + j); {ep.apply('x', 'row', 'col', w, True)} "
            f"STV_{dtype}({at}col, x); }}"
        )
    )
    edge = (
        f"{{ {to_tile} for (uint r = 0; r < rows; r++) {{ const uint row = m0 + r; uint j = 0; {vector} for (; j < n; j++) {{ "
        f"T x = t_[r * {nr} + j]; {ep.apply('x', 'row', pos, 1, True)} ST_{dtype}({at}{pos}, x); }} }} }}"
    )
    arrays, fold = ep.fold(mc)
    body = f"""
  T Bb[{kc * PIXELS}]; T Ct[{mc * PIXELS}]; uint off[{PIXELS}]; uint ko[{kc}]; bool runs[{PIXELS // nr}]; {arrays} {"" if contiguous else f"long place[{PIXELS}];"}
  const uint N_ = OD * OH * OW, MP = (M + {mr - 1}u) / {mr}u, NP = (N_ + {nr - 1}u) / {nr}u;
  const uint p0 = (ulong)MP * get_group_id(1) / get_num_groups(1), p1 = (ulong)MP * (get_group_id(1) + 1) / get_num_groups(1);
  const uint q0 = (ulong)NP * get_group_id(0) / get_num_groups(0), q1 = (ulong)NP * (get_group_id(0) + 1) / get_num_groups(0);
  const uint im = get_group_id(2) / G, g = get_group_id(2) % G;
  const __global T* Xg = X + (long)im * xn + (ulong)g * CG * DP * HP * WP; P += (ulong)g * K * MP * {mr};
  out += (long)im * on;
  {"".join(f"e{i} += (long)im * e{i}b; " for i, *_ in ep.operands)}
  for (uint q = q0; q < q1; q += {PIXELS // nr}u) {{
    const uint qe = min(q + {PIXELS // nr}u, q1), cols = (qe - q) * {nr}u;
    for (uint j = 0; j < cols; j++) {{ const uint p = min(q * {nr}u + j, N_ - 1); off[j] = PIXEL(p); {place} }}
    for (uint b = 0; b < qe - q; b++) {{  // panels whose vectors are consecutive pixels are read in place
      runs[b] = true; for (uint j = b * {nr}u; j < (b + 1) * {nr}u; j++) if (j % {w}u && off[j] != off[j - 1] + 1) runs[b] = false;
    }}
    for (uint p = p0; p < p1; p += {mc // mr}u) {{
      const uint pe = min(p + {mc // mr}u, p1);
      {fold(f"g * M + p * {mr}u", f"g * M + min(pe * {mr}u, M)")}
      uint k0 = 0, kx = 0, ky = 0, kz = 0, c_ = 0;  // taps are counted: four divisions each would be a twentieth of the time
      do {{
        const uint kn = min({kc}u, K - k0); const bool first = k0 == 0, last = k0 + kn >= K;
        for (uint k = 0; k < kn; k++) {{
          ko[k] = ((c_ * DP + kz * dd) * HP + ky * dh) * WP + kx * dw;
          if (++kx == KW) {{ kx = 0; if (++ky == KH) {{ ky = 0; if (++kz == KD) {{ kz = 0; c_++; }} }} }}
        }}
        for (uint b = 0; b < qe - q; b++) if (!runs[b]) for (uint v = b * {nr}u; v < (b + 1) * {nr}u; v += {w}u) {{
          {CLASSIFY.format(v="v", w=w, iota=iota)}
          T* d = Bb + (v / {nr}u) * (kn * {nr}) + v % {nr}u;
          {gather}
        }}
        for (uint b = 0; b < qe - q; b++) {{
          const uint n0 = (q + b) * {nr}u, n = min({nr}u, N_ - n0);
          for (uint i = p; i < pe; i++) {{
            const __global T* a_ = P + ((ulong)k0 * MP + (ulong)i * kn) * {mr}; T* t_ = Ct + (b * {mc // mr}u + i - p) * {mr * nr};
            {acc}
            if (runs[b]) {{ const uint* b_ = ko; {starts} {micro(s, "1", "kn", lambda u, v: f"load{w}(0, x{v}_ + b_[{u}])")} }}
            else {{ const T* b_ = Bb + b * (kn * {nr}); {micro(s, str(nr), "kn")} }}
            if (!first) {{ {from_tile} }}
            if (!last) {{ {to_tile} }}
            else {{
              const uint rows = min({mr}u, M - i * {mr}u), m0 = g * M + i * {mr}u;
              {store} {edge}
            }}
          }}
        }}
        k0 += {kc}u;
      }} while (k0 < K);
    }}
  }}
"""
    name = "_".join(x for x in ("vector_conv", dtype, "" if contiguous else "strided", str(ep), str(s)) if x)
    extra = tuple(d for _, _, d, _ in ep.operands)
    return finish(
        target,
        name,
        [("X", compute, "r"), ("P", compute, "r"), ("out", dtype, "rw"), *ep.buffers],
        [(x, "i64") for x in ("xn", "on", "oc", "od", "oh", "ow")]
        + ep.strides
        + ep.factors(compute)
        + [("M", "u32"), ("G", "u32")]
        + [(x, "u32") for x in GEOMETRY],
        prelude(compute, w, (dtype, *extra)) + (math_functions(w) if ep.needs_math() else "") + OFFSETS,
        body,
    )


conv.__doc__ = (conv.__doc__ or "").replace("{geometry}", GEOMETRY_DOC)


def conv_groups(m: Any, pixels: Any, images: Any, groups: int, s: Schedule, compute_units: int) -> tuple:
    """Grid of `conv` where images * groups is at least the compute units: one task an image and group, else tasks along pixels."""
    from .gemm import cdiv

    return cdiv(compute_units * 2, images * groups), 1, images * groups


def conv_backward_weight(target: Target, dtype: str, out_dtype: str | None = None, s: Schedule | None = None) -> Kernel:
    """dW[g, m, k] = sum over n and pixels of G[n, g * M + m, pixel] * X[n, g * CG + c(k), pixel + tap(k)].

    Buffers: X (from pad), Gr (gradient of the output, consecutive pixels), dW (contiguous [G, M, K], out_dtype).
    Scalars: xn (elements of X an image), gn, gc (i64 strides of Gr); M, G, N (images), {geometry} (u32).
    Grid: (tasks along K, tasks along M, G), any numbers.
    """
    compute = compute_dtype(dtype)
    out = out_dtype or dtype
    s = s or conv_schedule(compute)
    w, mr, nv, nr, mc, kc, nc = s.w, s.mr, s.nv, s.nr, s.mc, s.kc, s.nc
    tw, macros = pack_macros(compute, w, dtype)
    integer = "long" if compute in ("f64", "i64") else "int"
    iota = ", ".join(f"{i}{'l' if integer == 'long' else ''}" for i in range(tw))
    classify = (
        CLASSIFY.format(v="v", w=tw, iota=iota)
        .replace("(U)", f"({integer}{tw})")
        .replace("const U", f"const {integer}{tw}")
    )
    kinds = []
    for kind, text in _pixel_vector(tw, "(Xn + ko[t + {i}])").items():
        text = text.replace("(V)", f"(CV{tw})")
        loads = (
            " ".join(f"const CV{tw} x{i} = {text.format(i=i)};" for i in range(tw))
            if kind != 3
            else " ".join(
                f"const CV{tw} x{i} = (CV{tw})(" + ", ".join(f"Xn[ko[t + {i}] + of[{j}]]" for j in range(tw)) + ");"
                for i in range(tw)
            )
        )
        turn = transpose(tw, [f"x{i}" for i in range(tw)], [f"y{i}" for i in range(tw)], f"const CV{tw}")
        put = " ".join(f"store{tw}(y{i}, 0, d + {i * nr});" for i in range(tw))
        kinds.append(
            f"if (kind == {kind}) for (uint t = 0; t < {nr}u; t += {tw}u) {{ T* d = Bb + v * {nr} + t; {loads} {turn} {put} }}"
        )
    a_pack = " ".join(
        f"const CV{tw} x{i} = {f'LD{tw}_{dtype}(Gn + (long)min(m + {i}u, M - 1) * gc + k)' if i < mr else f'(CV{tw})(0)'};"
        for i in range(tw)
    )
    if mr > tw:
        a_loop = ""
    else:
        a_loop = (
            f"for (; k + {tw}u <= kn; k += {tw}u) {{ {a_pack} {transpose(tw, [f'x{i}' for i in range(tw)], [f'y{i}' for i in range(tw)], f'const CV{tw}')} "
            + " ".join(f"store{tw}(y{i}, 0, d + (k + {i}) * {mr});" for i in range(tw))
            + " }"
        )
    acc = " ".join(f"V c{r}_{v} = (V)(0);" for r in range(mr) for v in range(nv))
    add = " ".join(
        f"store{w}(load{w}({v}, t_ + {r * nr}) + c{r}_{v}, {v}, t_ + {r * nr});" for r in range(mr) for v in range(nv)
    )
    body = f"""
  T Ab[{mc * kc + 16}]; T Bb[{kc * nr}]; T Ct[{mc * nc}]; uint off[{kc}]; uint ko[{nr}];
  const uint N_ = OD * OH * OW, MP = (M + {mr - 1}u) / {mr}u, NP = (K + {nr - 1}u) / {nr}u, g = get_group_id(2);
  const uint p0 = (ulong)MP * get_group_id(1) / get_num_groups(1), p1 = (ulong)MP * (get_group_id(1) + 1) / get_num_groups(1);
  const uint q0 = (ulong)NP * get_group_id(0) / get_num_groups(0), q1 = (ulong)NP * (get_group_id(0) + 1) / get_num_groups(0);
  X += (ulong)g * CG * DP * HP * WP; Gr += (long)g * M * gc; dW += (ulong)g * M * K;
  for (uint q = q0; q < q1; q += {nc // nr}u) for (uint p = p0; p < p1; p += {mc // mr}u) {{
    const uint qe = min(q + {nc // nr}u, q1), pe = min(p + {mc // mr}u, p1);
    for (uint j = 0; j < (qe - q) * {mc * nr}u; j++) Ct[j] = 0;
    for (uint k0 = 0; k0 < N_; k0 += {kc}u) {{
      const uint kn = min({kc}u, N_ - k0), kr = (kn + {tw - 1}u) / {tw}u * {tw}u;
      for (uint j = 0; j < kr; j++) {{ const uint x = min(k0 + j, N_ - 1); off[j] = PIXEL(x); }}
      for (uint n = 0; n < N; n++) {{
        const __global T* Xn = X + (long)n * xn; const __global {POINTEE[dtype]}* Gn = Gr + (long)n * gn + k0;
        for (uint i = p; i < pe; i++) {{
          const uint m = i * {mr}u; T* d = Ab + (i - p) * (kn * {mr}); uint k = 0;
          {a_loop}
          for (; k < kn; k++) for (uint r = 0; r < {mr}u; r++) d[k * {mr} + r] = LD_{dtype}(Gn + (long)min(m + r, M - 1) * gc + k);
        }}
        for (uint b = q; b < qe; b++) {{
          for (uint j = 0; j < {nr}u; j++) {{ const uint x = min(b * {nr}u + j, K - 1); ko[j] = TAP(x); }}
          for (uint v = 0; v < kn; v += {tw}u) {{
            {classify}
            {" else ".join(kinds)}
          }}
          for (uint i = p; i < pe; i++) {{
            const T* a_ = Ab + (i - p) * (kn * {mr}); const T* b_ = Bb; T* t_ = Ct + ((b - q) * {mc // mr}u + i - p) * {mr * nr};
            {acc}
            {micro(s, str(nr), "kn")}
            {add}
          }}
        }}
      }}
    }}
    for (uint b = q; b < qe; b++) for (uint i = p; i < pe; i++) {{
      const T* t_ = Ct + ((b - q) * {mc // mr}u + i - p) * {mr * nr};
      for (uint r = 0; r < {mr}u && i * {mr}u + r < M; r++) for (uint j = 0; j < {nr}u && b * {nr}u + j < K; j++)
        ST_{out}(dW + (ulong)(i * {mr}u + r) * K + b * {nr}u + j, t_[r * {nr} + j]);
    }}
  }}
"""
    return finish(
        target,
        f"vector_conv_backward_weight_{dtype}_{out}_{s}",
        [("X", compute, "r"), ("Gr", dtype, "r"), ("dW", out, "w")],
        [(x, "i64") for x in ("xn", "gn", "gc")] + [(x, "u32") for x in ("M", "G", "N", *GEOMETRY)],
        prelude(compute, w, (dtype, out)) + macros + OFFSETS,
        body,
    )


conv_backward_weight.__doc__ = (conv_backward_weight.__doc__ or "").replace("{geometry}", GEOMETRY_DOC)


def _row_loads(w: int) -> str:
    """Macro LOAD(p, s): w elements s apart."""
    any_ = ", ".join(f"(p)[{i} * (s)]" for i in range(w))
    return (
        f"V load_row(const __global T* p, uint s) {{ if (s == 1) return load{w}(0, p); "
        f"if (s == 2) return (V)(load{w}(0, p).even, load{w}(1, p).even); return (V)({any_}); }}\n"
    )


def depthwise(
    target: Target, dtype: str, taps: tuple[int, int], epilogue: Epilogue = NO_EPILOGUE, s: Schedule | None = None
) -> Kernel:
    """out[n, c * mult + j, y, x] = epilogue(sum over ky, kx of W[c * mult + j, ky, kx] * X[n, c, y * th + ky * dh, x * tw + kx * dw]).

    taps: (KH, KW), unrolled. Buffers: X (from pad), W, out (consecutive pixels in a row), operands ("m": per output channel, "mn": consecutive as
    the output: row stride is the channel's). Scalars: w0, wc, wh, ww (i64 strides of W, may be negative), on, oc, oh (i64 strides of out),
    the epilogue's; C (output channels), mult, OH, OW, HP, WP, th, tw, dh, dw (u32).
    Grid: (tasks along C, N, 1).
    """
    compute = compute_dtype(dtype)
    s = s or conv_schedule(compute)
    w, (kh, kw) = s.w, taps
    weights = " ".join(
        f"const V w{i}_{j} = (V)(LD_{dtype}(wp + {i} * wh + {j} * ww));" for i in range(kh) for j in range(kw)
    )
    step = " ".join(
        f"a = FMA(w{i}_{j}, load_row(xr + {i} * dh * WP + {j} * dw, tw), a);" for i in range(kh) for j in range(kw)
    )
    body = f"""
  const uint c0 = (ulong)C * get_group_id(0) / get_num_groups(0), c1 = (ulong)C * (get_group_id(0) + 1) / get_num_groups(0), n = get_group_id(1);
  out += (long)n * on;
  {"".join(f"e{i} += (long)n * e{i}b; " for i, *_ in epilogue.operands)}
  for (uint row = c0; row < c1; row++) {{
    const __global T* xc = X + ((ulong)n * (C / mult) + row / mult) * HP * WP; const __global {POINTEE[dtype]}* wp = W + w0 + (long)row * wc;
    {weights}
    for (uint y = 0; y < OH; y++) for (uint x0 = 0; x0 < OW; x0 += {w}u) {{
      const __global T* xr = xc + y * th * WP + x0 * tw; V a = (V)(0);
      {step}
      const uint col = y * OW + x0; __global {POINTEE[dtype]}* o = out + (long)row * oc + (long)y * oh + x0;
      if (x0 + {w}u <= OW) {{ {epilogue.apply("a", "row", "col", w)} STV_{dtype}(o, a); }}
      else {{ T t[{w}]; store{w}(a, 0, t); for (uint j = 0; x0 + j < OW; j++) {{ T v = t[j]; {epilogue.apply("v", "row", "col + j", 1)} ST_{dtype}(o + j, v); }} }}
    }}
  }}
"""
    name = "_".join(x for x in ("vector_depthwise", dtype, f"{kh}x{kw}", str(epilogue), f"w{w}") if x)
    extra = tuple(d for _, _, d, _ in epilogue.operands)
    return finish(
        target,
        name,
        [("X", compute, "r"), ("W", dtype, "r"), ("out", dtype, "rw"), *epilogue.buffers],
        [(x, "i64") for x in ("w0", "wc", "wh", "ww", "on", "oc", "oh")]
        + epilogue.strides
        + epilogue.factors(compute)
        + [(x, "u32") for x in ("C", "mult", "OH", "OW", "HP", "WP", "th", "tw", "dh", "dw")],
        prelude(compute, w, (dtype, *extra)) + (math_functions(w) if epilogue.needs_math() else "") + _row_loads(w),
        body,
    )


def depthwise_backward_weight(target: Target, dtype: str, taps: tuple[int, int], s: Schedule | None = None) -> Kernel:
    """dW[c * mult + j, ky, kx] = sum over n, y, x of G[n, c * mult + j, y, x] * X[n, c, y * th + ky * dh, x * tw + kx * dw].

    Buffers: X (from pad), Gr (consecutive pixels in a row), dW (contiguous [C, KH, KW]). Scalars: gn, gc, gh (i64); N, C (output channels), mult, OH,
    OW, HP, WP, th, tw, dh, dw (u32). Grid: (tasks along C, 1, 1).
    """
    compute = compute_dtype(dtype)
    s = s or conv_schedule(compute)
    w, (kh, kw) = s.w, taps
    at = [(i, j) for i in range(kh) for j in range(kw)]
    iota = ", ".join(str(i) for i in range(w))
    body = f"""
  const uint c0 = (ulong)C * get_group_id(0) / get_num_groups(0), c1 = (ulong)C * (get_group_id(0) + 1) / get_num_groups(0);
  for (uint c = c0; c < c1; c++) {{
    {" ".join(f"T s{i}_{j} = 0;" for i, j in at)}
    for (uint n = 0; n < N; n++) {{
      const __global T* xc = X + ((ulong)n * (C / mult) + c / mult) * HP * WP; const __global {POINTEE[dtype]}* g = Gr + (long)n * gn + (long)c * gc;
      for (uint y0 = 0; y0 < OH; y0 += 16u) {{
        {" ".join(f"V a{i}_{j} = (V)(0);" for i, j in at)}
        for (uint y = y0; y < min(y0 + 16u, OH); y++) for (uint x0 = 0; x0 < OW; x0 += {w}u) {{
          const __global T* xr = xc + y * th * WP + x0 * tw; V v; const U beyond = ((U)({iota}) >= (U)(OW - x0)) ? (U)(-1) : (U)(0);
          if (x0 + {w}u <= OW) v = LDV_{dtype}(g + (long)y * gh + x0);
          else {{ T t[{w}]; for (uint j = 0; j < {w}u; j++) t[j] = x0 + j < OW ? LD_{dtype}(g + (long)y * gh + x0 + j) : (T)0; v = load{w}(0, t); }}
          {" ".join(f"{{ V x = load_row(xr + {i} * dh * WP + {j} * dw, tw); if (x0 + {w}u > OW) x = select(x, (V)(0), beyond); a{i}_{j} = FMA(v, x, a{i}_{j}); }}" for i, j in at)}
        }}
        {" ".join(f"s{i}_{j} += vsum(a{i}_{j});" for i, j in at)}
      }}
    }}
    {" ".join(f"ST_{dtype}(dW + (ulong)c * {kh * kw} + {i * kw + j}, s{i}_{j});" for i, j in at)}
  }}
"""
    return finish(
        target,
        f"vector_depthwise_backward_weight_{dtype}_{kh}x{kw}_w{w}",
        [("X", compute, "r"), ("Gr", dtype, "r"), ("dW", dtype, "w")],
        [(x, "i64") for x in ("gn", "gc", "gh")]
        + [(x, "u32") for x in ("N", "C", "mult", "OH", "OW", "HP", "WP", "th", "tw", "dh", "dw")],
        prelude(compute, w, (dtype,)) + _row_loads(w),
        body,
    )
