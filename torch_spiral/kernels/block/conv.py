"""Convolution in Triton as an implicit matrix product: forward, gradient for the input (also transposed convolution) and for
the weight; any stride, padding, dilation, groups and tensor strides.

`last` is for channels-last tensors: rows are pixels, columns output channels, and the reduction runs over taps and, within one, over
blocks of channels, which are contiguous in both operands: they are copied 16 bytes at a time while earlier ones are multiplied.

`conv` takes the rest. Its three roles, their indices and their scalars are those of kernels/simt/conv.py (scalar_names). A tile of
the gathered operand is read at computed places, where what is outside reads as 0.
"""

from __future__ import annotations

from typing import Any

from ..kernel import DTYPES, Kernel, Target, compute_dtype
from ..simt.conv import MODES, scalar_names
from ..triton import TYPES
from ..vector.gemm import Epilogue
from . import INSIDE, STORAGE, EpilogueText, cdiv, template
from .gemm import Choice, Schedule

WIDE = 16  # from this many channels on their blocks are what `last` steps over; of fewer, a row of taps


def schedule(dtype: str, m: int, n: int) -> Schedule:
    """Of conv(), for about m rows (channels) and n columns."""
    tile_m = 16 if m < 32 else 64 if m < 128 else 128
    tile_n = 64 if n < 4096 or tile_m == 16 else 128
    if dtype == "f64":
        return Schedule(min(tile_m, 32), 32, 16, 4, 2)
    step = 32 if dtype == "f32" else 64
    return Schedule(tile_m, tile_n, step, 8 if tile_m * tile_n >= 128 * 128 else 4, 3)


# Of last(): a step is 128 bytes of channels. Two programs of four warps share a compute unit, where one of eight had it to itself; and ptxas
# makes the tensor cores wait for each product of 64x128 numbers of tf32 that eight warps share.
TILES = ((128, 128, 4, 3), (128, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4))
PARTS_TILES = ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3))  # float32 in parts of bfloat16: they take registers
RUN_TILES = ((64, 64, 4, 1), (64, 32, 4, 2))  # rows of taps are not aligned: they take registers too
# Operations a nanosecond of a compute unit, by what is multiplied, and bytes a nanosecond that it reads from the shared cache. Of the H200;
# on others the order of choices is about the same.
RATES = {"f16": 5000.0, "bf16": 5000.0, "tf32": 2500.0, "f64": 300.0}
PARTS_RATE, CACHE_RATE = 550.0, 60.0
STEP, REDUCE = 200.0, 3000.0  # nanoseconds: the shortest step, and what summing partial results costs at least


def _tiles(dtype: str, precision: str, step: int) -> list[Schedule]:
    """step: 0, or how many channels a row of taps has at most."""
    if dtype == "f64":
        return [Schedule(32, 32, 16, 4, 2)]
    found = RUN_TILES if step else PARTS_TILES if precision.startswith("bf16") else TILES
    size = DTYPES[dtype].size
    return [Schedule(m, n, min(step, 128 // size) or 128 // size, warps, stages) for m, n, warps, stages in found]


def _seconds(
    target: Target, c: Choice, dtype: str, precision: str, m: int, n: int, taps: int, channels: int, batch: int
) -> float:
    """An estimate, in nanoseconds."""
    s, size = c.schedule, DTYPES[dtype].size
    rate = RATES.get(precision or dtype, PARTS_RATE)
    step = max(STEP, (s.m + s.n) * s.k * size / CACHE_RATE, 2 * s.m * s.n * s.k / rate)
    programs = cdiv(m, s.m) * cdiv(n, s.n) * batch * c.splits
    steps = cdiv(taps * cdiv(channels, s.k), c.splits)
    steps += 2  # the first loads, and the stores
    seconds = max(programs / target.compute_units, 1.0) * steps * step
    return seconds if c.splits == 1 else seconds + REDUCE + (c.splits + 1) * m * n * batch * 4 / 2000


def choices(
    target: Target, dtype: str, precision: str, m: int, n: int, taps: int, channels: int, batch: int, step: int = 0
) -> list[Choice]:
    """Of last(), for about m rows and n columns, `batch` times: what a tuner may choose from, the best by an estimate first. step:
    as in _tiles."""
    found = []
    for s in _tiles(dtype, precision, step):
        count, steps = 1, taps * cdiv(channels, s.k)
        while count == 1 or (count <= 32 and steps >= 4 * count):
            found.append(Choice(s, count))
            count *= 2
    return sorted(found, key=lambda c: _seconds(target, c, dtype, precision, m, n, taps, channels, batch))


def last_scalars(nd: int, c_layout: str, split: bool) -> list[tuple[str, str]]:
    """(name, type) of last(), but for the epilogue's.

    cb, cm, cn: strides of c [batch, m, groups * n], without the unit one, cs: from one partial result to the next; x_image, x_i:
    x's strides. m: rows, n: columns of a group; channels: of a group, of x. out, taps, size: extents of the result, the filter and x.
    Pixel o and tap t read x at o * mul + add + t * tap_mul. span: steps of a partial result."""
    wide = ["cb"] + ["cm"] * (c_layout != "t") + ["cn"] * (c_layout != "n") + ["cs"] * split + ["x_image"]
    kinds = ("x_", "out", "taps", "size", "mul", "add", "tap_mul")
    narrow = ["m", "n", "channels", *(f"{kind}{i}" for kind in kinds for i in range(nd))] + ["span"] * split
    return [(name, "i64") for name in wide] + [(name, "i32") for name in narrow]


def last(
    target: Target, s: Schedule, dtype: str, out_dtype: str, nd: int, run: bool, precision: str, c_layout: str, epilogue: Epilogue,
    split: bool, described: bool = False,
) -> Kernel:  # fmt: skip
    """Buffers: x (unit stride along channels), w [groups * n, taps, channels] contiguous, epilogue operands (indexed [batch, pixel,
    channel]), c. Grid: last_groups(). A batch is one image, or all of them, whose pixels then follow each other in c (m = images * pixels).

    c_layout: which of c's strides is 1, "n" along channels, "t" along pixels, "s" none. run: the taps of the filter's last dimension
    are part of `channels`: beside each other they read what lies beside each other in x (no dilation, one group, dense there).
    split: c is partial sums. described: weights are read through a tensor descriptor, which needs no registers and half the way of the
    other operand: w and its rows start at multiples of 16 bytes, channels are a multiple of s.k."""
    acc = TYPES[compute_dtype(dtype)]
    e = EpilogueText(target, epilogue, compute_dtype(dtype), out_dtype)
    dims = range(nd)
    assert not (described and run)
    volume = " * ".join(f"taps{i}" for i in dims)
    length = f"{volume} * channels"
    if described:
        weights = [
            f"w_tiles = tl.make_tensor_descriptor(w, [tl.num_programs(2) * n, {length}], [{length}, 1], [{s.n}, {s.k}])",
            f"first_row = group * n + tile % tiles_n * {s.n}",
        ]
    else:
        weights = [
            "row = (group * n + tl.where(rb < n, rb, 0)).to(tl.int64)",
            f"pw = w + row[None, :] * ({length}) + rk[:, None]",
        ]
    lines = [
        f"tiles_n = tl.cdiv(n, {s.n})",
        f"tiles = tl.cdiv(m, {s.m}) * tiles_n",
        "z = (tl.program_id(0) // tiles).to(tl.int64)",
        "tile = tl.program_id(0) % tiles",
        "group = tl.program_id(2)",
        f"ra = (tile // tiles_n) * {s.m} + tl.arange(0, {s.m})",
        f"rb = (tile % tiles_n) * {s.n} + tl.arange(0, {s.n})",
        f"rk = tl.arange(0, {s.k})",
        "rest = tl.where(ra < m, ra, 0)",  # what is out of range is computed from the first row or column, and not stored
    ]
    for i in reversed(dims):
        lines += [f"at{i} = (rest % out{i}) * mul{i} + add{i}", f"rest = rest // out{i}"]
    lines += [
        "first = (z + rest) * x_image",
        *(f"first += at{i} * x_{i}" for i in dims),
        "px = x + group * channels + first[:, None] + rk[None, :]",
        *weights,
        f"blocks = tl.cdiv(channels, {s.k})",
        f"steps = {volume} * blocks",
        f"acc = tl.zeros([{s.m}, {s.n}], {acc})",
    ]
    if split:
        lines += ["start = tl.program_id(1) * span", "end = tl.minimum(start + span, steps)"]
    else:
        lines += ["start = 0", "end = steps"]
    # Where step j is, block by block and tap by tap, counted along: divisions take longer than the step's products.
    lines += [f"block = start % blocks * {s.k}", "left = start // blocks", "row_w = left * channels"]
    for i in reversed(dims):
        lines += [f"tap{i} = left % taps{i}", f"left = left // taps{i}"]
    checked = dims[:-1] if run else dims
    # Unsigned: what is below 0 is beyond the end.
    valid = " & ".join(f"((at{i} + tap{i} * tap_mul{i}).to(tl.uint32) < size{i})" for i in checked)
    whole = "" if described else "(block + rk < channels)[None, :]"
    body = [f"inside = {' & '.join(t for t in (whole, valid and f'({valid})[:, None]') if t)}"]
    if run:
        body += [
            f"place = (at{nd - 1} * x_{nd - 1})[:, None] + (block + rk)[None, :]",
            f"inside = inside & (place >= 0) & (place < size{nd - 1} * x_{nd - 1})",
        ]
    dot = f", input_precision={precision!r}" if precision else ""
    out_type = f", out_dtype={acc}" if dtype == "f64" else ""
    body += [
        f"a = tl.load(px + (block + {' + '.join(f'tap{i} * tap_mul{i} * x_{i}' for i in dims)}), mask=inside, other=0)",
        "b = w_tiles.load([first_row, row_w + block]).T"
        if described
        else "b = tl.load(pw + (block + row_w), mask=(block + rk < channels)[:, None], other=0)",
        f"acc = tl.dot(a, b, acc{dot}{out_type})",
        f"block += {s.k}",
        "carry = (block >= channels).to(tl.int32)",
        "block *= 1 - carry",
        "row_w += carry * channels",
        f"tap{nd - 1} += carry",
    ]
    for i in reversed(dims[1:]):
        body += [f"carry = (tap{i} == taps{i}).to(tl.int32)", f"tap{i} *= 1 - carry", f"tap{i - 1} += carry"]
    cm, cn = ("1" if c_layout == "t" else "cm"), ("1" if c_layout == "n" else "cn")
    part = " + tl.program_id(1).to(tl.int64) * cs" if split else ""
    out_dtype = compute_dtype(dtype) if split else out_dtype
    lines += [
        "for j in range(start, end):",
        *("    " + t for t in body),
        *INSIDE,
        "ra = ra.to(tl.int64)",
        "rb = (group * n + rb).to(tl.int64)",
        e.text(),
        f"pc = c + z * cb + ra[:, None] * {cm} + rb[None, :] * {cn}{part}",
        f"tl.store(pc, acc.to({STORAGE[out_dtype]}), mask=inside)",
    ]
    name = f"conv{nd}_last{'_run' * run}{'_d' * described}_{dtype}_{out_dtype}_{c_layout}{precision}{'_split' * split}_{s}_{epilogue}"
    buffers = [("x", dtype), ("w", dtype), *e.buffers, ("c", out_dtype)]
    scalars = [*last_scalars(nd, c_layout, split), *e.scalars]
    return template(target, name, buffers, scalars, "\n".join(t for t in lines if t), s.warps, s.stages, e.module)


def last_groups(s: Schedule, m: Any, n: Any, batch: Any, groups: Any, splits: Any = 1) -> tuple[Any, Any, Any]:
    """The grid of last()."""
    return (cdiv(m, s.m) * cdiv(n, s.n) * batch, splits, groups)


def conv(
    target: Target, s: Schedule, mode: str, dtype: str, out_dtype: str, nd: int, divided: bool, taps_last: bool, precision: str,
    epilogue: Epilogue, split: bool,
) -> Kernel:  # fmt: skip
    """Buffers: g, w, epilogue operands (indexed [image, channel, pixel]), c. Scalars: the epilogue's strides, scalar_names(nd), and for
    `split` (partial sums, c [splits, groups, m, n] contiguous) the length of a run of k. Grid: groups()."""
    assert mode in MODES
    acc = TYPES[compute_dtype(dtype)]
    e = EpilogueText(target, epilogue, compute_dtype(dtype), out_dtype)
    dims = range(nd)
    lines = [
        f"tiles_m = tl.cdiv(m, {s.m})",
        f"tiles_n = tl.cdiv(n, {s.n})",
        "tiles = tiles_m * tiles_n",
        "group = tl.program_id(0) // tiles",
        "tile = tl.program_id(0) % tiles",
        f"rm = (tile % tiles_m) * {s.m} + tl.arange(0, {s.m})",
        f"rn = (tile // tiles_m) * {s.n} + tl.arange(0, {s.n})",
        "group64 = group.to(tl.int64)",
    ]

    def digits(index: str, kind: str, p: str) -> list[str]:
        """Splits a pixel or tap index into p_major and p_0, p_1 …"""
        out, rest = [], index
        if kind == "tap" and not taps_last:
            out += [f"{p}_major = {index} % channels", f"{p}_rest = {index} // channels"]
            rest = f"{p}_rest"
        for i in reversed(dims):
            if i == 0 and kind == "tap" and not taps_last:
                out.append(f"{p}_{i} = {rest}")
            else:
                out += [f"{p}_{i} = {rest} % {kind}{i}", f"{p}_rest{i} = {rest} // {kind}{i}"]
                rest = f"{p}_rest{i}"
        return out if kind == "tap" and not taps_last else [*out, f"{p}_major = {rest}"]

    def linear(tensor: str, p: str) -> str:
        return " + ".join([f"{p}_major * {tensor}_major", *(f"{p}_{i} * {tensor}_{i}" for i in dims)])

    def side(kind: str, p: str) -> list[str]:
        """What an index adds to the gathered operand's offset and coordinates."""
        if kind == "pixel":
            return [f"{p}_offset = {p}_major * g_image", *(f"{p}_at{i} = {p}_{i} * mul{i} + add{i}" for i in dims)]
        return [f"{p}_offset = {p}_major * g_channel", *(f"{p}_at{i} = {p}_{i} * tap_mul{i}" for i in dims)]

    column, inner = ("tap", "pixel") if mode == "weight" else ("pixel", "tap")
    lines += digits("rn", column, "col") + side(column, "col")
    lines += [
        "g_base = g + group64 * g_group",
        "w_base = w + group64 * w_group + tl.where(rm < m, rm, 0)[:, None] * w_row",
        f"acc = tl.zeros([{s.m}, {s.n}], {acc})",
    ]
    if split:
        lines += ["start = tl.program_id(1) * span", "end = tl.minimum(start + span, k)"]
    else:
        lines += ["start = 0", "end = k"]
    body = [f"rk = j + tl.arange(0, {s.k})", *digits("rk", inner, "in"), *side(inner, "in")]
    body.append("inside = (rk < end)[:, None] & (rn < n)[None, :]")
    index = ["in_offset[:, None] + col_offset[None, :]"]
    for i in dims:
        body.append(f"at{i} = in_at{i}[:, None] + col_at{i}[None, :]")
        if divided:
            body += [
                f"quotient{i} = at{i} // div{i}",
                f"inside = inside & (quotient{i} * div{i} == at{i})",
                f"at{i} = quotient{i}",
            ]
        body.append(f"inside = inside & (at{i} >= 0) & (at{i} < size{i})")
        index.append(f"at{i} * g_{i}")
    dot = f", input_precision={precision!r}" if precision else ""
    out_type = f", out_dtype={acc}" if dtype == "f64" else ""
    body += [
        f"y = tl.load(g_base + ({' + '.join(index)}), mask=inside, other=0)",
        f"x = tl.load(w_base + ({linear('w', 'in')})[None, :], mask=(rk < end)[None, :], other=0)",
        f"acc = tl.dot(x, y, acc{dot}{out_type})",
    ]
    lines += [f"for j in range(start, end, {s.k}):", *("    " + t for t in body)]
    lines.append("stored = (rm < m)[:, None] & (rn < n)[None, :]")
    if split:
        lines += [
            "place = ((tl.program_id(1).to(tl.int64) * groups + group) * m + rm[:, None]) * n + rn[None, :]",
            "tl.store(c + place, acc, mask=stored)",
        ]
    else:
        if epilogue.steps:
            pixels = " * ".join(f"pixel{i}" for i in dims)
            lines += [
                "z = col_major.to(tl.int64)[None, :]",
                "ra = (group * m + rm).to(tl.int64)",
                f"rb = (rn - col_major * ({pixels})).to(tl.int64)",
                e.text("stored", "stored", "stored"),
            ]
        lines += [
            f"place = rm[:, None] * c_row + ({linear('c', 'col')})[None, :]",
            f"tl.store(c + group64 * c_group + place, acc.to({STORAGE[out_dtype]}), mask=stored)",
        ]
    scalars = [*e.scalars, *((n, "i32") for n in scalar_names(nd)), *([("span", "i32")] if split else [])]
    out_dtype = compute_dtype(dtype) if split else out_dtype
    flags = ("d" if divided else "") + ("t" if taps_last else "c") + ("_split" if split else "")
    name = f"conv{nd}_{mode}_{dtype}_{out_dtype}_{flags}{precision}_{s}_{epilogue}"
    buffers = [("g", dtype), ("w", dtype), *e.buffers, ("c", out_dtype)]
    return template(target, name, buffers, scalars, "\n".join(lines), s.warps, s.stages, e.module)


def groups(s: Schedule, m: Any, n: Any, count: Any, splits: Any = 1) -> tuple[Any, Any, Any]:
    """The grid of conv(); count: of convolution groups."""
    return (cdiv(m, s.m) * cdiv(n, s.n) * count, splits, 1)
