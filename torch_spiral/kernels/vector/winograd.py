"""3x3 convolutions of stride 1 for CPU devices with 16 multiplications for four pixels instead of 36: Winograd's F(2x2, 3x3) (Lavin and
Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).

A tile is 2x2 pixels of the output, which see 4x4 of the input. Input tiles d and filters g are transformed to B^T d B and G g G^T; what
remains is, for each of the 16 places, a matrix product over channels, M[m, tile] = U[m, c] V[c, tile]; A^T M A are the pixels. B holds
0 and 1 only, so rounding errors are about twice those of direct sums. A value that is not finite spoils all pixels of the tiles that see it.

`pack` transforms the filters, which is done once; `winograd` the rest, block by block in a task's own memory, so that nothing but
input and output goes through the main memory. The input comes from conv.pad, with zeros around: [N, C, 2 * TH + 2, 2 * TW + 2] for TH x TW
tiles. The gradient for the input is the same with exchanged channels and filters from last to first.

The gradient for the filters is the transposed algorithm (`weight_gradient`): G^T (sum over tiles of (A y A^T) * (B^T d B)) G for the
2x2 tiles y of the result's gradient. Its sums run over tiles, so its operands are turned: [N, height, width, channels], from `pad_last`.
"""

from __future__ import annotations

from typing import Any

from ..kernel import Kernel, Target
from ..opencl import POINTEE
from .gemm import NO_EPILOGUE, Epilogue, Schedule, block_schedule, cdiv, micro, pack_macros
from .source import compute_dtype, finish, math_functions, prelude, transpose

TILES = 128  # of a block at most: the tiles of a row must be no more
PLACES = 16


def schedule(width: int | None = None) -> Schedule:
    """The register tile of mr output channels x nr tiles; mc channels of the output, kc of the input at a time."""
    s = block_schedule("f32", width)
    mr, nv = (6, 2) if s.w == 8 else (12, 2)
    return Schedule(s.w, mr, nv, 132, 128, TILES)


def pack(target: Target, dtype: str, flip: bool = False, s: Schedule | None = None) -> Kernel:
    """U[place, C, M] = G W[m, c] G^T, in panels of mr output channels as `winograd` reads them.

    W's nine taps of a filter are consecutive; flip: from last to first.
    Buffers: W, U (f32, elements: `packed_size`). Scalars: wm, wc (i64 strides of output and input channels); M, C (u32). Grid: (tasks along M, 1, 1).
    """
    s = s or schedule()
    mr, kc = s.mr, s.kc
    tw, macros = pack_macros(compute_dtype(dtype), s.w, dtype)
    assert tw == 8
    t = POINTEE[compute_dtype(dtype)]
    taps = [str(8 - i if flip else i) for i in range(9)]
    groups = []
    for r in range(0, mr, 8):
        text = " ".join(
            f"const __global {POINTEE[dtype]}* w{i} = W + (long)min(m + {r + i}u, M - 1) * wm + (long)c * wc; "
            f"const CV8 x{i} = LD8_{dtype}(w{i});"
            for i in range(8)
        )
        text += transpose(8, [f"x{i}" for i in range(8)], [f"g{i}" for i in range(8)], "const CV8")
        text += f"const CV8 g8 = (CV8)({', '.join(f'LD_{dtype}(w{i} + 8)' for i in range(8))});\n"
        for x in range(3):  # G from the left, then from the right
            a, b, c = (f"g{taps[3 * y + x]}" for y in range(3))
            text += (
                f"const CV8 s{x} = 0.5f * ({a} + {c}), h{x} = 0.5f * {b}, u0{x} = {a}, u1{x} = s{x} + h{x}, "
                f"u2{x} = s{x} - h{x}, u3{x} = {c};\n"
            )
        for y in range(4):
            a, b, c = (f"u{y}{x}" for x in range(3))
            text += f"const CV8 e{y} = 0.5f * ({a} + {c}), o{y} = 0.5f * {b};\n"
            for x, value in enumerate((a, f"e{y} + o{y}", f"e{y} - o{y}", c)):
                at = f"d + {4 * y + x}ul * place + {r}"
                text += f"{{ const CV8 v = {value}; "
                rest, lane = min(8, mr - r), 0
                for size in (8, 4, 2):
                    if rest & size:
                        part = "v" if size == 8 else f"({t}{size})({', '.join(f'v.s{lane + i}' for i in range(size))})"
                        text += f"vstore{size}({part}, 0, {at + (f' + {lane}' if lane else '')}); "
                        lane += size
                text += "}\n"
        groups.append(f"{{ {text} }}")
    body = f"""
  const uint MP = (M + {mr - 1}u) / {mr}u;
  const uint p0 = (ulong)MP * get_group_id(0) / get_num_groups(0), p1 = (ulong)MP * (get_group_id(0) + 1) / get_num_groups(0);
  const ulong place = (ulong)C * MP * {mr};
  for (uint p = p0; p < p1; p++) for (uint c = 0; c < C; c++) {{
    const uint m = p * {mr}u, k0 = c / {kc}u * {kc}u;
    __global T* d = U + ((ulong)k0 * MP + (ulong)p * min({kc}u, C - k0) + c - k0) * {mr};
    {" ".join(groups)}
  }}
"""
    return finish(
        target,
        f"vector_winograd_pack_{dtype}_{'flip_' if flip else ''}{s}",
        [("W", dtype, "r"), ("U", compute_dtype(dtype), "w")],
        [("wm", "i64"), ("wc", "i64"), ("M", "u32"), ("C", "u32")],
        prelude(compute_dtype(dtype), s.w, (dtype,)) + macros,
        body,
    )


def packed_size(m: Any, c: Any, s: Schedule) -> Any:
    """Elements of the transformed filters."""
    return PLACES * c * cdiv(m, s.mr) * s.mr


def winograd(target: Target, dtype: str, epilogue: Epilogue = NO_EPILOGUE, s: Schedule | None = None) -> Kernel:
    """out[n, m, y, x] = epilogue(sum over c and taps of W[m, c, ky, kx] * X[n, c, y + ky, x + kx]), float32 sums.

    out: consecutive pixels of an image's channel. Epilogue operands: "m" (a value an output channel) and "mn" (consecutive pixels).
    Buffers: X (from conv.pad), U (from pack), out, operands. Scalars: on, oc (i64 strides of out), the epilogue's; N, M, C, OH, OW (u32), where
    cdiv(OW, 2) <= TILES. Grid: (tasks along the images' rows of tiles, tasks along M, 1), any numbers: `winograd_groups`.
    """
    s = s or schedule()
    w, mr, nv, nr, mc, kc = s.w, s.mr, s.nv, s.nr, s.mc, s.kc
    row = TILES + nr  # of V and of Mt: an odd number of panels, so that rows fall into different sets of the cache
    ep = epilogue
    arrays, fold = ep.fold(mc)
    fold_rows = fold(f"p * {mr}u", f"min(pe * {mr}u, M)")

    lanes = [f"a.s{i:x},b.s{i:x}" for i in range(w)]
    evens = ", ".join(f"a.s{2 * i:x}" for i in range(w // 2)) + ", " + ", ".join(f"b.s{2 * i:x}" for i in range(w // 2))
    odds = evens.replace(".s", ".S")
    for i in range(w // 2):
        odds = odds.replace(f".S{2 * i:x}", f".s{2 * i + 1:x}")
    rows = " ".join(
        f"const V d{i}a = load{w}(0, in_ + {i} * WP + x), d{i}b = load{w}(0, in_ + {i} * WP + x + {w});"
        for i in range(4)
    )
    down = ("d0{h} - d2{h}", "d1{h} + d2{h}", "d2{h} - d1{h}", "d1{h} - d3{h}")
    vertical = " ".join(
        f"{{ const V a = {text.format(h='a')}, b = {text.format(h='b')}; "
        f"store{w}((V)({evens}), 0, even[{i}] + x / 2); store{w}((V)({odds}), 0, odd[{i}] + x / 2); }}"
        for i, text in enumerate(down)
    )
    horizontal = " ".join(
        f"{{ const V e0 = load{w}(0, even[{i}] + x), e1 = load{w}(0, even[{i}] + x + 1), o0 = load{w}(0, odd[{i}] + x), "
        f"o1 = load{w}(0, odd[{i}] + x + 1); "
        + " ".join(
            f"store{w}({text}, 0, d + {(4 * i + j) * kc * row});"
            for j, text in enumerate(("e0 - e1", "o0 + e1", "e1 - o0", "o0 - o1"))
        )
        + " }"
        for i in range(4)
    )

    acc = " ".join(f"V c{r}_{v} = (V)(0);" for r in range(mr) for v in range(nv))
    at = [(f"c{r}_{v}", f"t_ + {r * row + v * w}") for r in range(mr) for v in range(nv)]
    add = " ".join(f"{c} += load{w}(0, {t});" for c, t in at)
    put = " ".join(f"store{w}({c}, 0, {t});" for c, t in at)

    columns = " ".join(
        f"const V m{y}{x} = load{w}(0, m_ + {(4 * y + x) * mc * row});" for y in range(4) for x in range(4)
    ) + " ".join(f"const V a{x} = m0{x} + m1{x} + m2{x}, b{x} = m1{x} - m2{x} - m3{x};" for x in range(4))
    pixels = " ".join(
        f"{{ const V a = {h}0 + {h}1 + {h}2, b = {h}1 - {h}2 - {h}3; __private T* y_ = Y + (2 * t + {i}) * OW + 2 * x; "
        f"store{w}((V)({', '.join(lanes[: w // 2])}), 0, y_); store{w}((V)({', '.join(lanes[w // 2 :])}), 1, y_); }}"
        for i, h in enumerate("ab")
    )
    own = " ".join(f"const __global {POINTEE[d]}* e{i} = all{i} + (long)n * e{i}b;" for i, _, d, _ in ep.operands)
    body = f"""
  T Vt[{PLACES * kc * row}]; T Mt[{PLACES * mc * row}]; T Y[{4 * TILES + 4 * w}]; T even[4][{TILES + 2 * w}], odd[4][{TILES + 2 * w}]; {arrays}
  const uint TH = (OH + 1) / 2, TW = (OW + 1) / 2, HP = 2 * TH + 2, WP = 2 * TW + 2, R = N * TH, MP = (M + {mr - 1}u) / {mr}u;
  const uint r0 = (ulong)R * get_group_id(0) / get_num_groups(0), r1 = (ulong)R * (get_group_id(0) + 1) / get_num_groups(0);
  const uint p0 = (ulong)MP * get_group_id(1) / get_num_groups(1), p1 = (ulong)MP * (get_group_id(1) + 1) / get_num_groups(1);
  {" ".join(f"const __global {POINTEE[d]}* all{i} = e{i};" for i, _, d, _ in ep.operands)}
  uint most = 1, least = UINT_MAX;  // rows of tiles that make the fewest panels
  for (uint t = 1; t <= r1 - r0 && t * TW <= {TILES}u; t++) {{
    const uint panels = (r1 - r0) / t * ((t * TW + {nr - 1}u) / {nr}u) + ((r1 - r0) % t * TW + {nr - 1}u) / {nr}u;
    if (panels <= least) {{ least = panels; most = t; }}
  }}
  for (uint r = r0; r < r1; r += most) {{
    const uint rn = min(most, r1 - r), tiles = rn * TW, panels = (tiles + {nr - 1}u) / {nr}u;
    for (uint p = p0; p < p1; p += {mc // mr}u) {{
      const uint pe = min(p + {mc // mr}u, p1);
      {fold_rows}
      for (uint k0 = 0; k0 < C; k0 += {kc}u) {{
        const uint kn = min({kc}u, C - k0);
        if (p == p0 || C > {kc}u) for (uint k = 0; k < kn; k++) {{
          T* v_ = Vt + k * {row};
          for (uint t = 0; t < rn; t++) {{
            const uint n = (r + t) / TH, y = (r + t) % TH;
            const __global T* in_ = X + (((ulong)n * C + k0 + k) * HP + 2 * y) * WP;
            for (uint x = 0; x < WP; x += {2 * w}u) {{ {rows} {vertical} }}
            for (uint x = 0; x < TW; x += {w}u) {{ T* d = v_ + t * TW + x; {horizontal} }}
          }}
        }}
        for (uint f = 0; f < {PLACES}u; f++) for (uint q = 0; q < panels; q++) for (uint i = p; i < pe; i++) {{
          const __global T* a_ = U + ((ulong)f * C * MP + (ulong)k0 * MP + (ulong)i * kn) * {mr};
          const T* b_ = Vt + f * {kc * row} + q * {nr}; T* t_ = Mt + (f * {mc}u + (i - p) * {mr}u) * {row} + q * {nr};
          {acc}
          {micro(s, str(row), "kn")}
          if (k0) {{ {add} }}
          {put}
        }}
      }}
      for (uint row = p * {mr}u; row < min(pe * {mr}u, M); row++) {{
        // In this order, what a vector writes behind its row of pixels is overwritten by those of the next row.
        for (uint t = 0; t < rn; t++) for (uint x = (TW - 1) / {w}u * {w}u; ; x -= {w}u) {{
          const T* m_ = Mt + (row - p * {mr}u) * {row} + t * TW + x;
          {columns} {pixels}
          if (x == 0) break;
        }}
        for (uint t = 0; t < rn;) {{  // the rows of one image
          const uint n = (r + t) / TH, y = (r + t) % TH, count = min(rn - t, TH - y), length = min(2 * count, OH - 2 * y) * OW;
          __global {POINTEE[dtype]}* o = out + (long)n * on + (long)row * oc + 2 * y * OW; const T* y_ = Y + 2 * t * OW;
          {own}
          uint j = 0;
          for (; j + {w}u <= length; j += {w}u) {{ const uint col = 2 * y * OW + j; V x = load{w}(0, y_ + j); {ep.apply("x", "row", "col", w, True)} STV_{dtype}(o + j, x); }}
          for (; j < length; j++) {{ const uint col = 2 * y * OW + j; T x = y_[j]; {ep.apply("x", "row", "col", 1, True)} ST_{dtype}(o + j, x); }}
          t += count;
        }}
      }}
    }}
  }}
"""
    name = "_".join(x for x in ("vector_winograd", dtype, str(ep), str(s)) if x)
    extra = tuple(d for _, _, d, _ in ep.operands)
    return finish(
        target,
        name,
        [("X", "f32", "r"), ("U", "f32", "r"), ("out", dtype, "rw"), *ep.buffers],
        [
            ("on", "i64"),
            ("oc", "i64"),
            *ep.strides,
            *ep.factors("f32"),
            *((x, "u32") for x in ("N", "M", "C", "OH", "OW")),
        ],
        prelude("f32", w, (dtype, *extra)) + (math_functions(w) if ep.needs_math() else ""),
        body,
    )


def winograd_groups(rows: Any, row: Any, compute_units: int, minimum: Any = min) -> tuple[Any, Any, Any]:
    """Grid of `winograd` for `rows` rows of `row` tiles: along the rows where there are enough for a block each, else along M."""
    tasks = minimum(cdiv(rows * row, TILES), compute_units)
    return tasks, cdiv(compute_units, tasks), 1


def pad_last(target: Target, dtype: str, s: Schedule | None = None) -> Kernel:
    """X[n, y, x, c] = in[n, c, y - ph, x - pw], 0 outside.

    Buffers: in (any strides), X (f32, contiguous [N, HP, WP, C] + conv.SLACK elements). Scalars: sn, sc, sh, sw (i64 strides); N, C, IH, IW, HP, WP,
    ph, pw (u32). Grid: (tasks along N * HP, 1, 1).
    """
    s = s or schedule()
    tw, macros = pack_macros("f32", s.w, dtype)
    load = " ".join(f"const CV{tw} x{i} = LD{tw}_{dtype}(i_ + {i} * sc);" for i in range(tw))
    turn = transpose(tw, [f"x{i}" for i in range(tw)], [f"y{i}" for i in range(tw)], f"const CV{tw}")
    put = " ".join(f"store{tw}(y{i}, 0, o_ + (ulong){i} * C);" for i in range(tw))
    body = f"""
  const ulong R = (ulong)N * HP; const ulong r0 = R * get_group_id(0) / get_num_groups(0), r1 = R * (get_group_id(0) + 1) / get_num_groups(0);
  for (ulong r = r0; r < r1; r++) {{
    __global T* d = X + r * WP * C; const uint y = r % HP;
    if (y < ph || y >= ph + IH) {{ for (ulong j = 0; j < (ulong)WP * C; j++) d[j] = 0; continue; }}
    for (ulong j = 0; j < (ulong)pw * C; j++) d[j] = 0;
    for (ulong j = (ulong)(pw + IW) * C; j < (ulong)WP * C; j++) d[j] = 0;
    const __global {POINTEE[dtype]}* p = in + (long)(r / HP) * sn + (long)(y - ph) * sh; d += (ulong)pw * C;
    if (sc == 1) {{
      for (uint x = 0; x < IW; x++) {{
        uint c = 0;
        for (; c + {tw}u <= C; c += {tw}u) store{tw}(LD{tw}_{dtype}(p + (long)x * sw + c), 0, d + (ulong)x * C + c);
        for (; c < C; c++) d[(ulong)x * C + c] = LD_{dtype}(p + (long)x * sw + c);
      }}
      continue;
    }}
    uint c = 0;
    if (sw == 1 && IW >= {tw}u) for (; c + {tw}u <= C; c += {tw}u) for (uint x_ = 0; x_ < IW; x_ += {tw}u) {{
      const uint x = min(x_, IW - {tw}u); const __global {POINTEE[dtype]}* i_ = p + (long)c * sc + x; __global T* o_ = d + (ulong)x * C + c;
      {load} {turn} {put}
    }}
    for (; c < C; c++) for (uint x = 0; x < IW; x++) d[(ulong)x * C + c] = LD_{dtype}(p + (long)c * sc + (long)x * sw);
  }}
"""
    return finish(
        target,
        f"vector_winograd_pad_last_{dtype}_w{s.w}",
        [("in", dtype, "r"), ("X", "f32", "w")],
        [(x, "i64") for x in ("sn", "sc", "sh", "sw")]
        + [(x, "u32") for x in ("N", "C", "IH", "IW", "HP", "WP", "ph", "pw")],
        prelude("f32", s.w, (dtype,)) + macros,
        body,
    )


STEP = 48  # tiles that are added up before sums go to a task's memory
CHANNELS = 96  # of the input and of the output that a task keeps sums of


def weight_gradient(target: Target, out_dtype: str, s: Schedule | None = None) -> Kernel:
    """dW[m, c, ky, kx] = sum over n, y, x of Gr[n, y, x, m] * X[n, y + ky, x + kx, c].

    Buffers: X, Gr (f32, from pad_last: [N, 2 * TH + 2, 2 * TW + 2, C] and [N, 2 * TH, 2 * TW, M]), dW (contiguous [M, C, 3, 3]).
    Scalars: N, M, C, TH, TW (u32). Grid: (tasks along C, tasks along M, 1), any numbers: `weight_groups`.
    """
    s = s or schedule()
    w, mr, nv, nr = s.w, s.mr, s.nv, s.nr
    mc = cdiv(CHANNELS, mr) * mr
    pc, cc = cdiv(mc, w) * w, cdiv(CHANNELS, nr) * nr
    loads = " ".join(
        f"const V d{y}{x} = load{w}(0, in_ + ((ulong){y} * WP + {x}) * C);" for y in range(4) for x in range(4)
    )
    rows = " ".join(
        f"const V t0{x} = d0{x} - d2{x}, t1{x} = d1{x} + d2{x}, t2{x} = d2{x} - d1{x}, t3{x} = d1{x} - d3{x};"
        for x in range(4)
    )
    tile = " ".join(
        f"store{w}({text.format(y=y)}, 0, v_ + {(4 * y + x) * STEP * cc});"
        for y in range(4)
        for x, text in enumerate(("t{y}0 - t{y}2", "t{y}1 + t{y}2", "t{y}2 - t{y}1", "t{y}1 - t{y}3"))
    )
    gradient = " ".join(
        f"const V g{y}{x} = load{w}(0, g_ + ((ulong){y} * 2 * TW + {x}) * M);" for y in range(2) for x in range(2)
    )
    gradient += " ".join(
        f"const V t0{x} = g0{x}, t1{x} = g0{x} + g1{x}, t2{x} = g0{x} - g1{x}, t3{x} = -g1{x};" for x in range(2)
    )
    gradient += " ".join(
        f"store{w}({text.format(y=y)}, 0, p_ + {(4 * y + x) * STEP * pc});"
        for y in range(4)
        for x, text in enumerate(("t{y}0", "t{y}0 + t{y}1", "t{y}0 - t{y}1", "-t{y}1"))
    )
    acc = " ".join(f"V c{r}_{v} = (V)(0);" for r in range(mr) for v in range(nv))
    at = [(f"c{r}_{v}", f"t_ + {r * cc + v * w}") for r in range(mr) for v in range(nv)]
    add = " ".join(f"{c} += load{w}(0, {t});" for c, t in at)
    put = " ".join(f"store{w}({c}, 0, {t});" for c, t in at)
    back = " ".join(f"const V u{y}{x} = load{w}(0, u_ + {(4 * y + x) * mc * cc});" for y in range(4) for x in range(4))
    half = "{0} = {a} + 0.5f * ({b} + {c}), {1} = 0.5f * ({b} - {c}), {2} = 0.5f * ({b} + {c}) + {d}"
    for x in range(4):
        names = [f"h{y}{x}" for y in range(3)]
        back += f"const V {half.format(*names, a=f'u0{x}', b=f'u1{x}', c=f'u2{x}', d=f'u3{x}')};"
    for y in range(3):
        names = [f"w{y}{x}" for x in range(3)]
        back += f"const V {half.format(*names, a=f'h{y}0', b=f'h{y}1', c=f'h{y}2', d=f'h{y}3')};"
    taps = " ".join(f"store{w}(w{i // 3}{i % 3}, {i}, taps);" for i in range(9))
    body = f"""
  T Vt[{PLACES * STEP * cc}]; T Pt[{PLACES * STEP * pc}]; T Mt[{PLACES * mc * cc}]; T taps[{9 * w}];
  const uint WP = 2 * TW + 2, HP = 2 * TH + 2, MP = (M + {mr - 1}u) / {mr}u, NP = (C + {nr - 1}u) / {nr}u, tiles = N * TH * TW;
  const uint q0 = (ulong)NP * get_group_id(0) / get_num_groups(0), q1 = (ulong)NP * (get_group_id(0) + 1) / get_num_groups(0);
  const uint p0 = (ulong)MP * get_group_id(1) / get_num_groups(1), p1 = (ulong)MP * (get_group_id(1) + 1) / get_num_groups(1);
  for (uint q = q0; q < q1; q += {cc // nr}u) for (uint p = p0; p < p1; p += {mc // mr}u) {{
    const uint qe = min(q + {cc // nr}u, q1), pe = min(p + {mc // mr}u, p1), c0 = q * {nr}u, m0 = p * {mr}u;
    const uint cn = min(qe * {nr}u, C) - c0, mn = min(pe * {mr}u, M) - m0;
    for (uint t0 = 0; t0 < tiles; t0 += {STEP}u) {{
      const uint kn = min({STEP}u, tiles - t0);
      for (uint k = 0; k < kn; k++) {{
        const uint t = t0 + k, n = t / (TH * TW), y = t / TW % TH * 2, x = t % TW * 2;
        for (uint c = 0; c < cn; c += {w}u) {{
          const __global T* in_ = X + (((ulong)n * HP + y) * WP + x) * C + c0 + c; T* v_ = Vt + k * {cc} + c;
          {loads} {rows} {tile}
        }}
        for (uint m = 0; m < mn; m += {w}u) {{
          const __global T* g_ = Gr + (((ulong)n * 2 * TH + y) * 2 * TW + x) * M + m0 + m; T* p_ = Pt + k * {pc} + m;
          {gradient}
        }}
      }}
      for (uint f = 0; f < {PLACES}u; f++) for (uint j = q; j < qe; j++) for (uint i = p; i < pe; i++) {{
        const T* a_ = Pt + f * {STEP * pc} + (i - p) * {mr}; const T* b_ = Vt + f * {STEP * cc} + (j - q) * {nr};
        T* t_ = Mt + (f * {mc}u + (i - p) * {mr}u) * {cc} + (j - q) * {nr};
        {acc}
        {micro(s, str(cc), "kn", a_k=pc)}
        if (t0) {{ {add} }}
        {put}
      }}
    }}
    for (uint m = 0; m < mn; m++) for (uint c = 0; c < cn; c += {w}u) {{
      const T* u_ = Mt + m * {cc} + c; __global {POINTEE[out_dtype]}* d = dW + ((ulong)(m0 + m) * C + c0 + c) * 9;
      {back} {taps}
      for (uint j = 0; j < min({w}u, cn - c); j++) for (uint i = 0; i < 9; i++) ST_{out_dtype}(d + j * 9 + i, taps[i * {w} + j]);
    }}
  }}
"""
    return finish(
        target,
        f"vector_winograd_weight_{out_dtype}_{s}",
        [("X", "f32", "r"), ("Gr", "f32", "r"), ("dW", out_dtype, "w")],
        [(x, "u32") for x in ("N", "M", "C", "TH", "TW")],
        prelude("f32", w, (out_dtype,)),
        body,
    )


def weight_groups(m: Any, c: Any, compute_units: int, maximum: Any = max) -> tuple[Any, Any, Any]:
    """Grid of `weight_gradient`."""
    return maximum(cdiv(c, CHANNELS), compute_units), cdiv(m, CHANNELS), 1
