"""Convolution of the `simt` class as an implicit matrix product: forward, backward for the input (also transposed
convolution),
backward for the weight; 2-d and 3-d (1-d is 2-d with height 1), any stride, padding, dilation, groups, any tensor
strides.

One product in three roles. `channel` counts one side's channels of a group, `column` and `k` the other two indices:

| mode    | result c      | row (m) | column (n)    | k             | gathered g | other w |
|---------|---------------|---------|---------------|---------------|------------|---------|
| forward | y[n, oc, o]   | oc      | pixel (n, o)  | tap (ic, t)   | x          | weight  |
| input   | dx[n, ic, i]  | ic      | pixel (n, i)  | tap (oc, t)   | dy         | weight  |
| weight  | dw[oc, ic, t] | oc      | tap (ic, t)   | pixel (n, o)  | x          | dy      |

The gathered operand is read at coordinate c_d = (pixel_d * mul_d + add_d + tap_d * tap_mul_d) / div_d of each
spatial dimension d, where the division
is exact and 0 <= c_d < size_d; elsewhere it is 0. forward and weight: mul = stride, add = -padding, tap_mul =
dilation, div = 1;
input: mul = 1, add = padding, tap_mul = -dilation, div = stride.
"""

from __future__ import annotations

from ..kernel import Kernel, Target, Unsupported
from . import ACCUMULATOR, COMPONENTS, MAX_GROUPS, NO_EPILOGUE, Epilogue, Text, cdiv, epilogue_name, write_epilogue
from .gemm import SCHEDULES, Accumulators, Schedule, thread_layout
from .gemm import candidates as products

MODES = ("forward", "input", "weight")
__all__ = ["MODES", "SCHEDULES", "conv", "conv_groups", "direct", "direct_groups", "direct_weight", "scalar_names"]


def scalar_names(nd: int, split: bool = False) -> list[str]:
    """Scalars of the kernels here, in order. The ones with a dimension number are per spatial dimension, slow to fast.

    groups, m (rows of a group), n (columns), k; pixel<d>: size of the pixel grid; tap<d>: of the filter; channels: of
    a tap index; mul<d>, add<d> (i32), tap_mul<d> (i32), div<d>, size<d>: see the module; strides of g: image, channel,
    <d>, group; of w: row, then its k index: image or channel, <d>, group; of the result: row, then its column: image
    or channel, <d>, group."""
    d = range(nd)
    names = ["groups", "m", "n", "k", *(f"pixel{i}" for i in d), *(f"tap{i}" for i in d), "channels"]
    for p in ("mul", "add", "tap_mul", "div", "size"):
        names += [f"{p}{i}" for i in d]
    names += ["g_image", "g_channel", *(f"g_{i}" for i in d), "g_group"]
    names += ["w_row", "w_major", *(f"w_{i}" for i in d), "w_group"]
    names += ["c_row", "c_major", *(f"c_{i}" for i in d), "c_group"]
    return names + (["splits", "k_span"] if split else [])


def candidates(target: Target, dtype: str) -> list[Schedule]:
    """What a tuner may choose from: tiles of matrix products, whatever the sizes."""
    return list(dict.fromkeys(c.schedule for c in products(target, dtype, 1 << 20, 1 << 20, 1, 1)))


class _Conv:
    """Index arithmetic that the kernels share."""

    def __init__(self, t: Text, mode: str, nd: int, divided: bool, taps_last: bool, split: bool = False):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {MODES}")
        self.t, self.mode, self.nd, self.divided, self.taps_last = t, mode, nd, divided, taps_last
        for name in scalar_names(nd, split):
            t.scalar(name, type="i32" if name.startswith(("add", "tap_mul")) else "u32")

    def u(self, x: str) -> str:
        return self.t.cast(x, "u32")

    def digits(self, index: str, kind: str, name: str) -> tuple[str, list[str]]:
        """Splits a pixel or tap index: declares and returns (image or channel, [spatial digits])."""
        t, spatial = self.t, [f"{name}_{i}" for i in range(self.nd)]
        major = f"{name}_major"
        if kind == "tap" and not self.taps_last:  # (taps, channel), channel fastest
            t.let(major, f"{index} % channels")
            rest = t.let(f"{name}_rest{self.nd}", f"{index} / channels")
        else:
            rest = index
        for i in reversed(range(self.nd)):
            last_of_all = i == 0 and kind == "tap" and not self.taps_last
            t.let(spatial[i], rest if last_of_all else f"{rest} % {kind}{i}")
            if not last_of_all:
                rest = t.let(f"{name}_rest{i}", f"{rest} / {kind}{i}")
        if not (kind == "tap" and not self.taps_last):
            t.let(major, rest)
        return major, spatial

    def linear(self, prefix: str, major: str, spatial: list[str]) -> str:
        return " + ".join([f"{major} * {prefix}_major", *(f"{s} * {prefix}_{i}" for i, s in enumerate(spatial))])

    def side(self, kind: str, major: str, spatial: list[str]) -> tuple[str, list[str]]:
        """What a pixel or tap adds to the gathered operand's offset and coordinates. u32 arithmetic wraps, negative
        numbers too."""
        if kind == "pixel":
            return f"{major} * g_image", [f"{s} * mul{i} + {self.u(f'add{i}')}" for i, s in enumerate(spatial)]
        return f"{major} * g_channel", [f"{s} * {self.u(f'tap_mul{i}')}" for i, s in enumerate(spatial)]

    @property
    def column_kind(self) -> str:
        return "tap" if self.mode == "weight" else "pixel"

    @property
    def k_kind(self) -> str:
        return "pixel" if self.mode == "weight" else "tap"

    def gather(self, value: str, offset: str, coords: list[str], extra: str = "") -> None:
        """value (a variable that holds 0) = the gathered element."""
        t = self.t
        names, conditions = [], [extra] if extra else []
        t.open()
        for i, c in enumerate(coords):
            n = t.let(f"at{i}", c)
            if self.divided:
                q = t.let(f"quotient{i}", f"{n} / div{i}")
                conditions.append(f"{q} * div{i} == {n}")
                n = q
            conditions.append(f"{n} < size{i}")
            names.append(n)
        t.open(" && ".join(conditions))
        index = " + ".join([offset, *(f"{n} * g_{i}" for i, n in enumerate(names))])
        t.add(f"{value} = {t.load('g', 'g_base', index)};")
        t.end()
        t.end()


class _Store:
    """Epilogue of a convolution. Operands: "m" one value a row (channel; index group * m + row), "mn" strides as the
    result."""

    def __init__(self, t: Text, epilogue: Epilogue, acc: str):
        self.t, self.e, self.acc = t, epilogue, acc
        for _, _, _, b in epilogue.operands:
            if b not in ("m", "mn"):
                raise Unsupported(f"epilogue operand {b!r} of a convolution")

    def buffers(self, out_dtype: str) -> None:
        for i, _, dtype, _ in self.e.operands:
            self.t.buffer(f"x{i}", dtype)
        self.t.buffer("c", out_dtype, "w")

    def scalars(self) -> None:
        for name, dtype in self.e.factors(self.acc):
            self.t.scalar(name, type=dtype)
        if self.e.steps:
            write_epilogue(self.t, self.e, self.acc)

    def begin(self, group: str) -> None:
        self.t.base("c_base", "c", (group, "c_group"))
        for i, _, _, b in self.e.operands:
            self.t.base(f"x{i}_base", f"x{i}", (group, "c_group" if b == "mn" else "m"))

    def store(self, row: str, at: str, value: str) -> None:
        t = self.t
        if self.e.steps:
            x = [t.load(f"x{i}", f"x{i}_base", at if b == "mn" else row) for i, _, _, b in self.e.operands]
            value = f"epilogue({', '.join([value, *x, *(n for n, _ in self.e.factors(self.acc))])})"
        t.store("c", "c_base", at, value)


def conv(
    target: Target,
    schedule: Schedule,
    mode: str,
    dtype: str,
    out_dtype: str,
    nd: int = 2,
    divided: bool = False,
    taps_last: bool = True,
    gather_unit: str = "r",
    columns_first: bool = False,
    split: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Kernel:
    """A convolution in one of MODES (see the module).

    divided: some div<d> is not 1. taps_last: order of a tap index is (channel, taps), as in a contiguous weight; else
    (taps, channel). gather_unit: consecutive invocations read the gathered operand along "r", columns (NCHW), or along
    "k" (channels_last with taps_last False). columns_first: columns of the product are the tile's m side, so that rows
    (channels), which are then the fast dimension of the result, are stored together (channels_last).
    split: the result is partial sums, f32, contiguous (splits, groups, m, n) of runs of k_span(schedule, k, splits)
    along k; finish with gemm.split_reduce. No epilogue then; the c strides are unused.
    Schedules: gemm.SCHEDULES without slices (tiles, lanes and pairs apply; f32, f16, bf16), gemm.WIDE_SCHEDULE for f64.

    Buffers: g, w, epilogue operands, c. Scalars: scalar_names(nd, split), then the epilogue's factors. Grid:
    conv_groups().
    """
    s, acc = schedule, ACCUMULATOR[dtype]
    assert s.slices == 1
    if split:
        out_dtype, epilogue = acc, NO_EPILOGUE
    flags = ("d" if divided else "") + ("t" if taps_last else "c") + gather_unit + ("s" if columns_first else "")
    name = f"conv{nd}_{mode}_{dtype}_{out_dtype}_{flags}{'_split' if split else ''}_{s.key}{epilogue_name(epilogue)}"
    t = Text(target, name, s.threads)
    t.buffer("g", dtype)
    t.buffer("w", dtype)
    out = _Store(t, epilogue, acc)
    out.buffers(out_dtype)
    cv = _Conv(t, mode, nd, divided, taps_last, split)
    out.scalars()

    gm, wn = (s.tile_m, s.tile_n) if columns_first else (s.tile_n, s.tile_m)  # rows of the tiles of g and of w
    chunked = s.chunk > 0 and acc == "f32"
    accs = Accumulators(t, "c", s.thread_m, s.thread_n, acc, chunked)
    lanes_n, lanes_m = s.tile_n // s.thread_n, s.tile_m // s.thread_m
    pg, pw = gm // 4 + (gather_unit == "k"), wn // 4 + 1
    t.shared("tg", acc, s.tile_k * pg)
    t.shared("tw", acc, s.tile_k * pw)
    table = max(s.tile_k, min(64, s.threads) // s.tile_k * s.tile_k)  # k indices that are split at a time
    for n in ("k_offset", "k_w", *(f"k_at{i}" for i in range(nd))):
        t.shared(n, "u32", table, 1)
    thread_layout(t, lanes_n, lanes_m, s.lanes, s.paired)
    t.let("tiles_c", f"(n + {gm - 1}u) / {gm}u")
    t.let("tiles_r", f"(m + {wn - 1}u) / {wn}u")
    t.loop("tile", t.group, "tiles_c * tiles_r * groups" + (" * splits" if split else ""), t.groups)
    t.let("col0", f"(tile % tiles_c) * {gm}u")
    t.let("row0", f"((tile / tiles_c) % tiles_r) * {wn}u")
    if split:
        t.let("zs", "tile / (tiles_c * tiles_r)")
        t.let("part", "zs % splits")
        t.let("z", "zs / splits")
        t.let("k_begin", "min(part * k_span, k)")
        t.let("k_end", "min(k_begin + k_span, k)")
    else:
        t.let("z", "tile / (tiles_c * tiles_r)")
        t.let("k_begin", "0u")
        t.let("k_end", "k")
    t.base("g_base", "g", ("z", "g_group"))
    t.base("w_base", "w", ("z", "w_group"))

    # Where each load is; an invocation meets few distinct columns, and splits each once.
    def places(rows: int, unit: str) -> list[tuple[str, str]]:
        count = rows * s.tile_k
        if count % s.threads:
            raise Unsupported(f"{name}: {s.threads} invocations do not share a tile of {rows}x{s.tile_k} evenly")
        found = []
        for step in range(count // s.threads):
            e = step * s.threads
            if unit == "r" and s.threads % rows == 0:
                found.append((f"(lid % {rows}u)", f"(lid / {rows}u + {e // rows}u)"))
            elif unit == "r" and rows % s.threads == 0:
                found.append((f"(lid + {e % rows}u)", f"{e // rows}u"))
            elif unit == "k" and s.threads % s.tile_k == 0:
                found.append((f"(lid / {s.tile_k}u + {e // s.tile_k}u)", f"(lid % {s.tile_k}u)"))
            else:
                per = rows if unit == "r" else s.tile_k
                pair = (f"((lid + {e}u) % {per}u)", f"((lid + {e}u) / {per}u)")
                found.append(pair if unit == "r" else pair[::-1])
        return found

    g_places, w_places = places(gm, gather_unit), places(wn, "k")
    columns: dict[str, int] = {}
    for row, _ in g_places:
        if row not in columns:
            i = columns[row] = len(columns)
            t.let(f"col{i}_index", f"min(col0 + {row}, n - 1u)")
            major, spatial = cv.digits(f"col{i}_index", cv.column_kind, f"col{i}")
            offset, coords = cv.side(cv.column_kind, major, spatial)
            t.let(f"col{i}_offset", offset)
            for d, c in enumerate(coords):
                t.let(f"col{i}_at{d}", c)
    for step, (row, _) in enumerate(w_places):
        t.let(f"w_at{step}", f"min(row0 + {row}, m - 1u) * w_row")
    accs.declare()
    if chunked:
        t.var("run", "0u")
    t.loop("k0", "k_begin", "k_end", f"{s.tile_k}u")
    t.let("in_table", f"(k0 - k_begin) % {table}u")
    t.open("in_table == 0u")
    t.loop("e", "lid", f"{table}u", f"{s.threads}u")
    t.let("k_index", "min(k0 + e, k_end - 1u)")
    major, spatial = cv.digits("k_index", cv.k_kind, "kd")
    offset, coords = cv.side(cv.k_kind, major, spatial)
    t.add(f"k_offset[e] = {offset};", f"k_w[e] = {cv.linear('w', major, spatial)};")
    for d, c in enumerate(coords):
        t.add(f"k_at{d}[e] = {c};")
    t.end()
    t.barrier()
    t.end()
    for step, (row, kk) in enumerate(g_places):
        i = columns[row]
        t.var(f"g{step}", t.zero(acc), acc)
        t.open()
        t.let("kt", f"in_table + {kk}")
        cv.gather(
            f"g{step}",
            f"col{i}_offset + k_offset[kt]",
            [f"col{i}_at{d} + k_at{d}[kt]" for d in range(nd)],
            f"k0 + {kk} < k_end",
        )
        t.end()
    for step, (_, kk) in enumerate(w_places):
        t.var(f"w{step}", t.zero(acc), acc)
        t.open(f"k0 + {kk} < k_end")
        t.add(f"w{step} = {t.load('w', 'w_base', f'w_at{step} + k_w[in_table + {kk}]')};")
        t.end()
    for step, (row, kk) in enumerate(g_places):
        t.put_component("tg", f"{kk} * {pg}u + {row} / 4u", f"({row} % 4u)", f"g{step}", acc)
    for step, (row, kk) in enumerate(w_places):
        t.put_component("tw", f"{kk} * {pw}u + {row} / 4u", f"({row} % 4u)", f"w{step}", acc)
    t.barrier()
    a, b = (("tg", pg), ("tw", pw)) if columns_first else (("tw", pw), ("tg", pg))
    accs.multiply(a[0], a[1], lanes_m, b[0], b[1], lanes_n, s.tile_k, unroll=s.unroll)
    if chunked:
        runs = s.chunk // s.tile_k
        if runs > 1:
            t.add("run += 1u;")
            t.open(f"run % {runs}u == 0u")
        accs.fold()
        if runs > 1:
            t.end()
    t.barrier()
    t.end()
    accs.finish()
    if split:
        t.base("c_base", "c", ("(part * groups + z)", "m * n"))
    else:
        out.begin("z")

    def column_offset(name: str, index: str) -> None:
        if split:
            t.let(name, index)
        else:
            major, spatial = cv.digits(f"min({index}, n - 1u)", cv.column_kind, name + "d")
            t.let(name, cv.linear("c", major, spatial))

    row_stride = "n" if split else "c_row"
    # Each column index is split once.
    if columns_first:
        for m in range(s.thread_m):
            t.open()
            t.let("column", f"col0 + {(m // 4) * lanes_m * 4 + m % 4}u + ty * 4u")
            column_offset("place", "column")
            t.open("column < n")
            for v in range(accs.v):
                for j, c in enumerate(COMPONENTS):
                    t.open()
                    t.let("row", f"row0 + ({v * lanes_n}u + tx) * 4u + {j}u")
                    t.open("row < m")
                    out.store("row", f"row * {row_stride} + place", f"c{m}_{v}.{c}")
                    t.end(2)
            t.end(2)
    else:
        for v in range(accs.v):
            for j, c in enumerate(COMPONENTS):
                t.open()
                t.let("column", f"col0 + ({v * lanes_n}u + tx) * 4u + {j}u")
                column_offset("place", "column")
                t.open("column < n")
                for m in range(s.thread_m):
                    t.open()
                    t.let("row", f"row0 + {(m // 4) * lanes_m * 4 + m % 4}u + ty * 4u")
                    t.open("row < m")
                    out.store("row", f"row * {row_stride} + place", f"c{m}_{v}.{c}")
                    t.end(2)
                t.end(2)
    t.end()
    return t.finish()


def conv_groups(schedule: Schedule, m, n, groups, columns_first=False, splits=1, minimum=min):
    """Grid of conv(): m rows and n columns of each group."""
    gm, wn = (schedule.tile_m, schedule.tile_n) if columns_first else (schedule.tile_n, schedule.tile_m)
    return (minimum(cdiv(m, wn) * cdiv(n, gm) * groups * splits, MAX_GROUPS), 1, 1)


def direct(
    target: Target,
    mode: str,
    dtype: str,
    out_dtype: str,
    nd: int = 2,
    divided: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Kernel:
    """mode "forward" or "input" with few rows a group (depthwise): one invocation an element of the result,
    consecutive ones along
    columns. Buffers and scalars of conv(). Grid: direct_groups(m, n, groups)."""
    if mode == "weight":
        raise ValueError("direct() has no mode weight: direct_weight()")
    acc = ACCUMULATOR[dtype]
    t = Text(
        target, f"conv{nd}_direct_{mode}_{dtype}_{out_dtype}{'_d' if divided else ''}{epilogue_name(epilogue)}", 64
    )
    t.buffer("g", dtype)
    t.buffer("w", dtype)
    out = _Store(t, epilogue, acc)
    out.buffers(out_dtype)
    cv = _Conv(t, mode, nd, divided, True)
    out.scalars()
    t.let("count", "n * m * groups")
    t.loop("e", f"{t.group} * 64u + lid", "count", f"{t.groups} * 64u")
    t.let("column", "e % n")
    t.let("row", "(e / n) % m")
    t.let("z", "e / (n * m)")
    t.base("g_base", "g", ("z", "g_group"))
    t.base("w_base", "w", ("z", "w_group"))
    major, spatial = cv.digits("column", "pixel", "col")
    offset, coords = cv.side("pixel", major, spatial)
    t.let("col_offset", offset)
    for d, c in enumerate(coords):
        t.let(f"col_at{d}", c)
    t.var("sum", t.zero(acc), acc)
    t.loop("channel", "0u", "channels", "1u")
    for d in range(nd):
        t.loop(f"t{d}", "0u", f"tap{d}", "1u")
    taps = [f"t{d}" for d in range(nd)]
    k_offset, k_coords = cv.side("tap", "channel", taps)
    t.var("value", t.zero(acc), acc)
    cv.gather("value", f"col_offset + {k_offset}", [f"col_at{d} + {c}" for d, c in enumerate(k_coords)])
    weight = t.load("w", "w_base", f"row * w_row + {cv.linear('w', 'channel', taps)}")
    t.add(f"sum = {t.fma('value', weight, 'sum', acc)};")
    t.end(nd + 1)
    out.begin("z")
    out.store("row", f"row * c_row + {cv.linear('c', major, spatial)}", "sum")
    t.end()
    return t.finish()


def direct_groups(m, n, groups, minimum=min):
    """Grid of direct()."""
    return (minimum(cdiv(m * n * groups, 64), MAX_GROUPS), 1, 1)


def direct_weight(target: Target, dtype: str, out_dtype: str, nd: int = 2) -> Kernel:
    """mode "weight" with few rows and channels a group (depthwise): a workgroup an element of dw, its 64 invocations
    along pixels.

    Buffers g, w, c and scalars of conv(). Grid: (min(m * n * groups, 65535), 1, 1)."""
    acc = ACCUMULATOR[dtype]
    t = Text(target, f"conv{nd}_direct_weight_{dtype}_{out_dtype}", 64)
    near = t.subgroup_lanes(acc)
    if near:
        t.name += f"_subgroups{near}"
        t.declare_lane()
    t.buffer("g", dtype)
    t.buffer("w", dtype)
    out = _Store(t, NO_EPILOGUE, acc)
    out.buffers(out_dtype)
    cv = _Conv(t, "weight", nd, False, True)
    out.scalars()
    if near:
        t.shared("parts", acc, 64 // near, 1)
    else:
        t.shared("sums", acc, 64, 1)
        t.shared("eighths", acc, 8, 1)
    t.loop("e", t.group, "n * m * groups", t.groups)
    t.let("column", "e % n")
    t.let("row", "(e / n) % m")
    t.let("z", "e / (n * m)")
    t.base("g_base", "g", ("z", "g_group"))
    t.base("w_base", "w", ("z", "w_group"))
    major, spatial = cv.digits("column", "tap", "col")
    offset, coords = cv.side("tap", major, spatial)
    t.let("col_offset", offset)
    for d, c in enumerate(coords):
        t.let(f"col_at{d}", c)
    t.var("sum", t.zero(acc), acc)
    t.loop("p", "lid", "k", "64u")
    p_major, p_spatial = cv.digits("p", "pixel", "pd")
    p_offset, p_coords = cv.side("pixel", p_major, p_spatial)
    t.var("value", t.zero(acc), acc)
    cv.gather("value", f"col_offset + {p_offset}", [f"col_at{d} + {c}" for d, c in enumerate(p_coords)])
    dy = t.load("w", "w_base", f"row * w_row + {cv.linear('w', p_major, p_spatial)}")
    t.add(f"sum = {t.fma('value', dy, 'sum', acc)};")
    t.end()
    if near:
        step = 1
        while step < near:
            t.add(f"sum = sum + {t.shuffle_xor('sum', step)};")
            step *= 2
        t.open(f"(lane & {near - 1}u) == 0u")
        t.add(f"parts[lane / {near}u] = sum;")
        t.end()
        total = " + ".join(f"parts[{j}]" for j in range(64 // near))
    else:
        t.add("sums[lid] = sum;")
        t.barrier()
        t.open("lid < 8u")
        t.add(f"eighths[lid] = {' + '.join(f'sums[lid * 8u + {j}u]' for j in range(8))};")
        t.end()
        total = " + ".join(f"eighths[{j}]" for j in range(8))
    t.barrier()
    t.open("lid == 0u")
    out.begin("z")
    out.store("row", f"row * c_row + {cv.linear('c', major, spatial)}", total)
    t.end()
    t.barrier()
    t.end()
    return t.finish()
