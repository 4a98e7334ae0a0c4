"""Matrix products in Triton: C[b] = epilogue(A[b] @ B[b]), with tl.dot on tiles.

Floats of 16 bits accumulate in float32. float32 is computed as PyTorch's own switch says (`precision`): "ieee" products,
or on the tensor cores in tf32, or in three bfloat16 parts ("bf16x6": six products of parts, which keep all 24 bits).
Integers and whatever tl.dot lacks are summed as outer products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..kernel import DTYPES, FLOAT8, Kernel, Target, compute_dtype
from ..triton import TYPES
from ..vector.gemm import Epilogue
from . import INSIDE, STORAGE, EpilogueText, cdiv, template


@dataclass(frozen=True)
class Schedule:
    """Tiles of m x n x k; group: rows of tiles that are walked together, for the cache. persistent: a program computes
    several tiles, one after the other (one batch, no splits). streamed: stream-K (Osama et al., PPoPP 2023): the programs that the
    device runs at a time share all steps of the reduction evenly, wherever tiles begin and end; stream_reduce finishes the tiles
    that several programs computed (no splits)."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    persistent: bool = False
    streamed: bool = False

    def __str__(self) -> str:
        group = "" if self.group == 8 else f"g{self.group}"
        flags = "p" * self.persistent + "k" * self.streamed
        return f"{self.m}x{self.n}x{self.k}w{self.warps}s{self.stages}{group}{flags}"


HALF = (
    Schedule(128, 256, 64, 8, 3),
    Schedule(128, 128, 64, 8, 4),
    Schedule(64, 128, 64, 4, 4),
    Schedule(64, 64, 64, 4, 4),
)
# Through tensor descriptors: no registers go to addresses.
HALF_TILES = (
    Schedule(128, 256, 64, 8, 3, persistent=True), Schedule(128, 128, 64, 4, 3), Schedule(64, 128, 64, 4, 4), Schedule(64, 64, 64, 4, 4)
)  # fmt: skip
# While one tile's epilogue reads a matrix, or computes much, the next one's operands are on their way.
BUSY = {
    **dict.fromkeys(("f16", "bf16"), Schedule(128, 128, 64, 8, 4, persistent=True)),
    "f32tf32": Schedule(128, 128, 32, 8, 3, persistent=True),
}
SINGLE = Schedule(128, 128, 32, 8, 3), Schedule(64, 64, 32, 4, 3)
# The tensor cores read tf32 along the reduction only: operands of another layout pass through registers, unpipelined.
TF32 = Schedule(128, 256, 32, 8, 3), Schedule(128, 128, 64, 8, 2), Schedule(64, 64, 32, 4, 3)
DOUBLE = (Schedule(64, 64, 16, 4, 3),)
WHOLE = (Schedule(32, 64, 1, 4, 1),)  # outer products
# Sums of float8 go from the tensor cores' registers to others of their own at each step.
EIGHT_TILES = Schedule(128, 128, 128, 8, 3, persistent=True), Schedule(64, 128, 128, 4, 3), Schedule(64, 64, 128, 4, 4)
SKINNY = {
    1: Schedule(16, 64, 128, 4, 4),
    2: Schedule(16, 64, 128, 4, 4),
    4: Schedule(16, 64, 64, 4, 4),
    8: Schedule(16, 32, 32, 4, 3),
}


def precision_of(target: Target, dtype: str, fast: bool) -> str:
    """How products of `dtype` are computed. fast: PyTorch's "high" precision of float32; few of AMD's devices have tf32."""
    if dtype != "f32":
        return ""
    return "bf16x6" if not fast else "bf16x3" if target.engine == "hip" else "tf32"


# As Triton names the numbers of 8 bits that NVIDIA's tensor cores multiply.
FLOAT8_TYPES = {"f8e4m3fn": "tl.float8e4nv", "f8e5m2": "tl.float8e5"}


def multiplies_float8(target: Target, *dtypes: str) -> bool:
    """Whether the device multiplies numbers of these dtypes as they are stored (compute capability 8.9 and later)."""
    return target.schedule_class == "block" and target.capability >= 89 and all(d in FLOAT8_TYPES for d in dtypes)


def schedule(
    target: Target,
    dtype: str,
    precision: str,
    m: int,
    n: int,
    batch: int,
    along_k: bool = True,
    described: bool = False,
    busy: bool = False,
) -> Schedule:
    """For about m rows and n columns: the largest tiles that still occupy the device. along_k: both operands have unit stride
    along the reduction. busy: is_busy(epilogue)."""
    compute = compute_dtype(dtype)
    size = {"i8": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, **dict.fromkeys(FLOAT8, 1)}.get(dtype)
    if size is None or (compute == "f64" and target.engine == "hip"):  # Triton has no tl.dot of float64 for AMD
        return WHOLE[0]
    if m < 32:
        return SKINNY[size]
    choices: tuple[Schedule, ...]
    if compute == "f64":
        choices = DOUBLE
    elif dtype in FLOAT8:
        choices = EIGHT_TILES
    elif size <= 2:
        choices = HALF_TILES if described else HALF
    else:
        choices = TF32 if precision == "tf32" else SINGLE
    s = BUSY.get(f"{dtype}{precision}") if described and batch == 1 and along_k and busy else None
    if s and n >= s.n and cdiv(m, s.m) * cdiv(n, s.n) * 2 >= 3 * target.compute_units:
        return s
    enough = target.compute_units * (3 if size <= 2 else 6) // 4  # by measurement
    fitting = (s for s in choices if s.n <= n and -(-m // s.m) * -(-n // s.n) * batch >= enough)
    found = next(fitting, choices[-1])
    return replace(found, stages=1) if precision == "tf32" and not along_k else found


def is_busy(epilogue: Epilogue) -> bool:
    """Whether it reads a matrix, or computes more than an access to memory takes."""
    return any(step == "gelu" if isinstance(step, str) else step[2] in ("mn", "s") for step in epilogue.steps)


# Of operands whose blocks have factors: the sums of a block have registers of their own.
BLOCKS = Schedule(64, 128, 128, 4, 3), Schedule(64, 64, 128, 4, 4)


def blocks_schedule(target: Target, blocks: int, m: int, n: int) -> Schedule:
    """For about m rows and n columns, of blocks of so many products."""
    enough = target.compute_units * 3 // 4
    fitting = (s for s in BLOCKS if s.n <= n and -(-m // s.m) * -(-n // s.n) >= enough)
    return replace(SKINNY[1] if m < 32 else next(fitting, BLOCKS[-1]), k=min(blocks, 128))


def splits(target: Target, s: Schedule, m: int, n: int, k: int, batch: int) -> int:
    """Into how many runs the reduction is cut, for about these sizes: a power of two, 1 where there is work for all."""
    tiles = -(-m // s.m) * -(-n // s.n) * batch
    count = 1
    while tiles * count * 2 <= target.compute_units and k // (count * 2) >= 4 * s.k and count < 32 and s.k > 1:
        count *= 2
    return count


def stores_tiles(target: Target, s: Schedule, dtype: str, c: str) -> bool:
    """Whether a tile of c fits into shared memory beside the operands' tiles (gemm's `stored`)."""
    operands = s.stages * (s.m + s.n) * s.k * DTYPES[dtype].size
    return operands + s.m * s.n * DTYPES[c].size + 1024 <= target.max_workgroup_memory


@dataclass(frozen=True)
class Choice:
    """How a product is computed: the tiles, and into how many runs the reduction is cut."""

    schedule: Schedule
    splits: int = 1

    def __str__(self) -> str:
        return f"{self.schedule}/{self.splits}"


STREAMED_WAVES = 8  # of tiles; with more of them a last one that is not full matters little


def candidates(target: Target, dtype: str, precision: str, m: int, n: int, k: int, batch: int) -> list[Choice]:
    """What a tuner may choose from for about these sizes."""
    size = {"f16": 2, "bf16": 2, "f32": 4}.get(dtype)
    if size is None:
        return []
    rows = (16, 32, 64) if m < 32 else (32, 64, 128, 256)
    found = []
    for tm in rows:
        for tn in (32, 64, 128, 256):
            for tk in (32, 64, 128) if size == 2 else (16, 32, 64):
                for warps in (4, 8):
                    accumulators = tm * tn // (32 * warps)
                    if not 4 <= accumulators <= 128 or (warps == 8 and tm * tn < 64 * 64):
                        continue
                    for stages in (2, 3, 4, 5):
                        if stages * (tm + tn) * tk * size > target.max_workgroup_memory and stages > 2:
                            continue
                        tiles = cdiv(m, tm) * cdiv(n, tn) * batch
                        count = 1
                        while True:
                            found.append(Choice(Schedule(tm, tn, tk, warps, stages), count))
                            if count == batch == 1 and tiles > target.compute_units:
                                found.append(Choice(Schedule(tm, tn, tk, warps, stages, persistent=True)))
                            streamed = Schedule(tm, tn, tk, warps, stages, streamed=True)
                            if count == 1 and tiles < STREAMED_WAVES * programs(target, streamed, size):
                                found.append(Choice(streamed))
                            count *= 2
                            if tiles * count > 4 * target.compute_units or k // count < 4 * tk or count > 32:
                                break
    return found


def gemm_scalars(a_layout: str, b_layout: str, c_layout: str, split: bool) -> list[tuple[str, str]]:
    """(name, type), but for the epilogue's. Layouts: "n" unit stride along columns, "t" along rows, "s" none."""
    names = ["ab", "bb", "cb"]
    names += ["am"] * (a_layout != "t") + ["ak"] * (a_layout != "n")
    names += ["bk"] * (b_layout != "t") + ["bn"] * (b_layout != "n")
    names += ["cm"] + ["cn"] * (c_layout != "n") + ["cs"] * split
    return [(n, "i64") for n in names] + [(n, "i32") for n in ("m", "n", "k")] + [("span", "i32")] * split


def gemm(
    target: Target, s: Schedule, a: str, b: str, c: str, a_layout: str, b_layout: str, c_layout: str, precision: str, split: bool,
    epilogue: Epilogue, described: bool = False, stored: bool = False, grouped: str = "", blocks: int = 0, even: bool = False,
) -> Kernel:  # fmt: skip
    """Buffers: a, b, epilogue operands, c, with grouped offs, with blocks fa and fb. Scalars: gemm_scalars, then the epilogue's strides and factors. Grid: (tiles of all
    batches, splits), or with s.persistent, of one batch, programs(). split: c is partial sums, one matrix (stride cs) for each
    run of `span` of the reduction.

    s.streamed: the last buffer is partial [programs, 2, s.m, s.n] of the compute dtype, the last scalar the size of the batch (i32; 1
    with described), the grid stream_programs(). A program leaves in partial its share of a tile that an earlier one begins, then of
    one that it begins and does not finish.

    described: the operands are read through tensor descriptors, by the copy engine, which takes no registers for addresses;
    layouts are "n" or "t", and starts, batch strides and strides multiples of 16 bytes. stored: c is written so too.

    grouped: the items of the batch are groups, that the ends in offs (int32) cut out of one matrix: of the rows of a and of c ("rows",
    grid: grouped_groups), or of the reduction ("k"); their number is the last scalar (i32). Ends beyond the matrix or before their
    predecessor are moved there.

    blocks (a multiple of s.k; 0: none): so many products of a row and a column have a factor fa [M / rows_a, K / blocks] and one fb
    [N / rows_b, K / blocks] in common, float32. Last scalars: the strides of fa and fb (i64), rows_a and rows_b. even: rows_b is a
    multiple of s.n, so that a tile's columns have one factor."""
    assert not grouped or not (split or described or stored or s.persistent or s.streamed)
    assert not blocks or not (grouped or stored or s.persistent or s.streamed or blocks % s.k)
    compute = compute_dtype(a)
    acc = TYPES[compute]
    e = EpilogueText(target, epilogue, compute, c)
    unit = {"am": "1" if a_layout == "t" else "am", "ak": "1" if a_layout == "n" else "ak",
            "bk": "1" if b_layout == "t" else "bk", "bn": "1" if b_layout == "n" else "bn",
            "cn": "1" if c_layout == "n" else "cn"}  # fmt: skip
    narrow = a in FLOAT8 and b in FLOAT8
    cast = "" if (a == b and a != "bool") or narrow else f".to({acc})"
    dot = f", input_precision={precision!r}" if precision else ""
    zero = "0.0" if narrow else "0"
    if narrow:
        # Hopper's tensor cores keep 14 bits of a sum of these: unless asked for ("fast"), a tile's worth and no more.
        dot = "" if precision == "fast" else f", max_num_imprecise_acc={s.k}"
    out_type = f", out_dtype={acc}" if compute in ("f64", "i32") else ""

    def product(at: str) -> list[str]:
        """Adds x @ y to acc. at: where in the reduction they begin."""
        if not blocks:
            return [f"    acc = tl.dot(x, y, acc{dot}{out_type})"]
        return [
            f"    block = ({at}) // {blocks}",
            "    factor_a = tl.load(pfa + block * fak)[:, None]",
            f"    factor_b = tl.load(pfb + block * fbk){'' if even else '[None, :]'}",
            f"    acc += tl.dot(x, y{dot if not narrow else ''}) * {'(factor_a * factor_b)' if even else 'factor_a * factor_b'}",
        ]

    place = [
        *_place(s),
        f"ra = row + tl.arange(0, {s.m})",
        f"rb = column + tl.arange(0, {s.n})",
        f"acc = tl.zeros([{s.m}, {s.n}], {acc})",
    ]
    rows = "m"
    if grouped == "rows":
        rows = "row_end"
        place = [f"column = tl.program_id(0) % tiles_n * {s.n}", f"ra = row + tl.arange(0, {s.m})", *place[-2:]]
    indices = [
        f"rows = ra[:, None] < {rows}",
        *INSIDE[1:],
        "ra = ra.to(tl.int64)",
        "rb = rb.to(tl.int64)",
    ]
    finish = e.text().split("\n")
    part = " + tl.program_id(1).to(tl.int64) * cs" if split else ""
    if stored:
        finish.append(f"c_tiles.store([row, column], acc.to({STORAGE[c]}))")
    else:
        finish += [
            f"pc = c + z * cb_ + ra[:, None] * cm + rb[None, :] * {unit['cn']}{part}",
            f"tl.store(pc, acc.to({STORAGE[c]}), mask=inside)",
        ]
    if s.streamed:
        finish = [
            "if high - low == steps:",
            *("    " + t for t in finish if t),
            "else:",
            f"    p = partial + (program * 2 + (low == 0).to(tl.int32)).to(tl.int64) * {s.m * s.n}",
            f"    tl.store(p + tl.arange(0, {s.m})[:, None] * {s.n} + tl.arange(0, {s.n})[None, :], acc)",
        ]
    finish = indices + finish
    lines = [f"{x} = {x}.to(tl.pointer_type({FLOAT8_TYPES[d]}))" for x, d in (("a", a), ("b", b)) if narrow]
    ahead: list[str] = []
    lines += [f"tiles_m = tl.cdiv(m, {s.m})", f"tiles_n = tl.cdiv(n, {s.n})", "tiles = tiles_m * tiles_n"]
    if grouped == "rows":
        lines += [
            "z, row, row_end = groups, 0, 0",
            "first, begin = 0, 0",
            "wanted = tl.program_id(0) // tiles_n",
            "for g in range(0, groups):",
            "    last = tl.minimum(tl.maximum(tl.load(offs + g), begin), m)",
            f"    count = tl.cdiv(last - begin, {s.m})",
            "    found = (wanted >= first) & (wanted < first + count)",
            "    z = tl.where(found, g, z)",
            f"    row = tl.where(found, begin + (wanted - first) * {s.m}, row)",
            "    row_end = tl.where(found, last, row_end)",
            "    first += count",
            "    begin = last",
            "if z >= groups:",
            "    return",
            "z = z.to(tl.int64)",
        ]
    elif s.persistent or (s.streamed and described):
        lines.append("z = tl.full([], 0, tl.int64)")
    elif not s.streamed:
        lines += ["z = (tl.program_id(0) // tiles).to(tl.int64)", "tile = tl.program_id(0) % tiles"]
    if split:
        lines += ["start = tl.program_id(1) * span", "end = tl.minimum(start + span, k)"]
    elif grouped == "k":
        lines += [
            "start, end = 0, 0",
            "for g in range(0, tl.program_id(0) // tiles + 1):",
            "    start = end",
            "    end = tl.minimum(tl.maximum(tl.load(offs + g), start), k)",
        ]
    elif not s.streamed:
        lines += ["start = 0", "end = k"]
    last = "k" if s.streamed else "end"
    factors = [
        "pfa = fa + (tl.where(ra < m, ra, 0) // rows_a * fam).to(tl.int32)",
        f"pfb = fb + ({'column' if even else 'tl.where(rb < n, rb, 0)'} // rows_b * fbn).to(tl.int32)",
    ] * bool(blocks)
    if described:

        def tiles(
            name: str, base: str, sizes: tuple[str, str], strides: tuple[str, str], block: tuple[int, int], turned: bool
        ) -> str:
            (i, j), (p, q), (u, v) = (x[::-1] if turned else x for x in (sizes, strides, block))
            return f"{name} = tl.make_tensor_descriptor({base}, [{i}, {j}], [{p}, {q}], [{u}, {v}])"

        def load(name: str, rows: str, columns: str, turned: bool) -> str:
            return f"{name}.load([{columns}, {rows}]).T" if turned else f"{name}.load([{rows}, {columns}])"

        lines += [
            tiles("a_tiles", "a + z * ab", ("m", last), (unit["am"], unit["ak"]), (s.m, s.k), a_layout == "t"),
            tiles("b_tiles", "b + z * bb", (last, "n"), (unit["bk"], unit["bn"]), (s.k, s.n), b_layout == "t"),
        ]
        if stored:
            lines.append(tiles("c_tiles", f"c + z * cb_{part}", ("m", "n"), ("cm", "1"), (s.m, s.n), False))
        if not grouped:  # they are made while the kernels ahead end
            ahead, lines = lines, []
        work = [
            *place,
            *factors,
            f"for j in range(start, end, {s.k}):",
            f"    x = {load('a_tiles', 'row', 'j', a_layout == 't')}{cast}",
            f"    y = {load('b_tiles', 'j', 'column', b_layout == 't')}{cast}",
            *product("j"),
            *finish,
        ]
    else:
        step = [f"pa += {s.k} * {unit['ak']}", f"pb += {s.k} * {unit['bk']}"]
        work = [
            *place,
            f"rk = tl.arange(0, {s.k})",
            # What is out of range is computed from the first row or column, and not stored.
            "ca = tl.where(ra < row_end, ra, row)"
            if grouped == "rows"
            else f"ca = tl.max_contiguous(tl.multiple_of(tl.where(ra < m, ra, 0), {s.m}), {s.m})",
            f"cb = tl.max_contiguous(tl.multiple_of(tl.where(rb < n, rb, 0), {s.n}), {s.n})",
            f"pa = a + z * ab + (ca[:, None] * {unit['am']} + (start + rk)[None, :] * {unit['ak']})",
            f"pb = b + z * bb + ((start + rk)[:, None] * {unit['bk']} + cb[None, :] * {unit['bn']})",
            *factors,
        ]
        if s.k == 1:
            work += [
                "for i in range(start, end):",
                f"    acc += tl.load(pa).to({acc}) * tl.load(pb).to({acc})",
                *("    " + t for t in step),
            ]
        else:
            work += [
                f"for i in range(0, (end - start) // {s.k}):",
                f"    x = tl.load(pa){cast}",
                f"    y = tl.load(pb){cast}",
                *product(f"start + i * {s.k}"),
                *("    " + t for t in step),
                f"rest = (end - start) % {s.k}",
                "if rest > 0:",
                f"    x = tl.load(pa, mask=rk[None, :] < rest, other={zero}){cast}",
                f"    y = tl.load(pb, mask=rk[:, None] < rest, other={zero}){cast}",
                *product("end - rest"),
            ]
        work += finish
    if s.persistent:
        assert not split
        lines += [
            "for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):",
            *("    " + t for t in work),
        ]
    elif s.streamed:
        assert not split
        lines += [
            "programs = tl.num_programs(0)",
            *_shares(s),
            "program = tl.program_id(0)",
            "begin = program * each + tl.minimum(program, more)",
            "stop = begin + each + (program < more).to(tl.int32)",
            "waves = whole // programs",
            "for turn in range(0, waves + (stop - 1) // steps - begin // steps + 1):",
            "    shared = turn >= waves",
            "    item = begin // steps + turn - waves",
            "    tile = tl.where(shared, whole + item, program + turn * programs)",
            "    low = tl.where(shared, tl.maximum(begin - item * steps, 0), 0)",
            "    high = tl.where(shared, tl.minimum(stop - item * steps, steps), steps)",
            *([] if described else ["    z = (tile // tiles).to(tl.int64)", "    tile = tile % tiles"]),
            f"    start = low * {s.k}",
            f"    end = tl.minimum(high * {s.k}, k)",
            *("    " + t for t in work),
        ]
    else:
        lines += work
    body = "\n".join(line for line in lines if line.strip())
    scalars = [("cb_" if n == "cb" else n, t) for n, t in gemm_scalars(a_layout, b_layout, c_layout, split)] + e.scalars
    scalars += [("groups", "i32")] if grouped else [("batch", "i32")] if s.streamed else []
    scalars += [*((n, "i64") for n in ("fam", "fak", "fbn", "fbk")), ("rows_a", "i32"), ("rows_b", "i32")] * bool(
        blocks
    )
    flags = "_split" * split + "_d" * described + "_st" * stored + (f"_by_{grouped}" if grouped else "")
    flags += f"_x{blocks}{'e' * even}" if blocks else ""
    name = f"gemm_{a}_{b}_{c}_{a_layout}{b_layout}{c_layout}{precision}{flags}_{s}_{epilogue}"
    extra = [("offs", "i32")] if grouped else [("partial", compute)] if s.streamed else []
    extra += [("fa", "f32"), ("fb", "f32")] * bool(blocks)
    return template(
        target,
        name,
        [("a", a), ("b", b), *e.buffers, ("c", c), *extra],
        scalars,
        body,
        s.warps,
        s.stages,
        e.module,
        ahead,
    )


def _place(s: Schedule) -> list[str]:
    """Lines: the row and column at which `tile` of a matrix begins."""
    return [
        f"first = tile // ({s.group} * tiles_n) * {s.group}",
        f"height = tl.minimum(tiles_m - first, {s.group})",
        f"within = tile % ({s.group} * tiles_n)",
        f"row = (first + within % height) * {s.m}",
        f"column = (within // height) * {s.n}",
    ]


def _shares(s: Schedule) -> list[str]:
    """Lines of a streamed product: the first `whole` tiles are dealt in turns, one program each; of the rest's steps every program takes
    `each`, the first `more` programs one more, in order."""
    return [
        f"steps = tl.cdiv(k, {s.k})",
        "whole = tl.maximum(tiles * batch // programs - 1, 0) * programs",
        "each = (tiles * batch - whole) * steps // programs",
        "more = (tiles * batch - whole) * steps % programs",
    ]


def groups(s: Schedule, m: Any, n: Any, batch: Any, count: Any = 1) -> tuple[Any, Any, Any]:
    """The grid of gemm()."""
    return (cdiv(m, s.m) * cdiv(n, s.n) * batch, count, 1)


def grouped_groups(s: Schedule, m: Any, n: Any, count: Any) -> tuple[Any, Any, Any]:
    """The grid of gemm() for `count` groups of rows: each may have a tile that is not full."""
    return ((cdiv(m, s.m) + count) * cdiv(n, s.n), 1, 1)


def programs(target: Target, s: Schedule, itemsize: int) -> int:
    """How many programs of a persistent or streamed schedule the device runs at a time, of operands of `itemsize` bytes."""
    if not s.streamed:
        return target.compute_units
    tiles = s.stages * (s.m + s.n) * s.k * itemsize
    return target.compute_units * max(1, min(8 // s.warps, target.max_workgroup_memory // tiles))


def stream_programs(
    most: int, s: Schedule, m: Any, n: Any, k: Any, batch: Any, minimum: Callable[..., Any] = min
) -> Any:
    """The programs of a streamed product: `most`, and no more than there are steps."""
    return minimum(cdiv(m, s.m) * cdiv(n, s.n) * batch * cdiv(k, s.k), most)


# ---- one row of A: as fast as B streams from memory, without tensor cores ------------------------------------------------


@dataclass(frozen=True)
class RowSchedule:
    """A program sums `columns` columns, in steps of k. The reduction of a column lies within a warp where B's columns are contiguous
    (16 bytes an invocation), so that its sum needs no shared memory."""

    columns: int
    k: int
    warps: int = 4

    def __str__(self) -> str:
        return f"{self.columns}x{self.k}w{self.warps}"


ROW_UNDER_WAY = 64  # elements of B that an invocation loads together
# Bytes of B that are on their way into the L2 cache before the kernels ahead have ended, at most, and by one instruction.
ROW_AHEAD, PREFETCHED = 4 << 20, 64


def row_schedule(target: Target, dtype: str, b_layout: str, n: int, k: int, batch: int) -> RowSchedule:
    """For about n columns and k products of each, by measurement in graphs, with weights from memory: with few columns, all loads of one are
    under way together."""
    size, few = DTYPES[dtype].size, n * batch < 8 * target.compute_units
    if b_layout == "n" and few:
        return RowSchedule(8, 2048 // size, 4) if k < 2048 else RowSchedule(8, 4096 // size, 8)
    if b_layout == "n":
        return RowSchedule(16, 512, 4) if k < 2048 else RowSchedule(16, 1024, 8)
    step, many = 32 * 16 // size, n * batch >= 32 * target.compute_units
    return RowSchedule(8 if many else 4, 4 * step if k >= (4096 if many else 4 * step) else step)


def row_product(
    target: Target, s: RowSchedule, a: str, b: str, c: str, a_layout: str, b_layout: str, c_layout: str, epilogue: Epilogue,
    beside: int = 0,
) -> Kernel:  # fmt: skip
    """gemm() for m = 1 and b_layout "t" or "n": C[z] = epilogue(A[z] @ B[z]), in float32. Buffers and scalars are gemm()'s, its m
    unused. Grid: row_groups.

    beside: so many products of one A without epilogues, of one batch and with unit strides of A and C, in one kernel. Buffers: a, then b
    and c of each. Scalars: of each the stride of B that is not 1, of each n, then k. Grid: the sum of their row_groups."""
    e = EpilogueText(target, epilogue, "f32", c, early=True)
    finish = e.text("inside", "inside")
    ak, cn = "1" if a_layout == "n" else "ak", "1" if c_layout == "n" else "cn"
    along, bk, bn = (1, "1", "bn") if b_layout == "t" else (0, "bk", "1")
    columns, rows = ("[:, None]", "[None, :]") if along else ("[None, :]", "[:, None]")
    shape = [s.columns, s.k] if along else [s.k, s.columns]
    # Each column has its own copy of A, from the cache, where a warp reads along one: no invocation waits for another's.
    copies = f"(tl.zeros([{s.columns}], tl.int32){columns} + rk{rows})" if along else f"rk{rows}"

    def step(at: str, mask: str) -> list[str]:
        # Of addresses, `at` is a scalar: tensors of pointers that a loop carries would change their layout in each turn.
        inside = f"(rb < n){columns}{mask and f' & {mask}'}"
        x = f"tl.load(pa + ({at}) * {ak}{mask and f', mask={mask}, other=0'}).to(tl.float32)"
        y = f"tl.load(pb + ({at}) * {bk}, mask={inside}, other=0).to(tl.float32)"
        return [f"    sums += {x} * {y}"]

    unrolled = max(ROW_UNDER_WAY * 32 * s.warps // (s.columns * s.k), 1)
    if beside:
        stride = "bn" if along else "bk"
        parts = ["b", "c", "n", stride]
        ahead = [
            *(f"{x} = {x}0" for x in parts),
            "first = tl.full([], 0, tl.int32)",
            f"after = tl.cdiv(n, {s.columns})",
        ]
        for i in range(1, beside):
            ahead += ["if tl.program_id(0) >= after:", *(f"    {x} = {x}{i}" for x in parts), "    first = after"]
            ahead += [f"after += tl.cdiv(n{i}, {s.columns})"]
        ahead += ["z, ab, bb, cb_ = 0, 0, 0, 0", "tile = tl.program_id(0) - first"]
    else:
        ahead = [
            f"tiles = tl.cdiv(n, {s.columns})",
            "z = (tl.program_id(0) // tiles).to(tl.int64)",
            "tile = tl.program_id(0) % tiles",
        ]
    ahead.append(f"rb = (tile * {s.columns} + tl.arange(0, {s.columns})).to(tl.int64)")
    if target.dependent_launch and along:  # of columns, rows' lines are too many instructions
        ahead += _prefetch(s, DTYPES[b].size)
    lines = [
        "ra = tl.zeros([1], tl.int64)",
        "inside = (rb < n)[None, :]",
        *e.loads,
        f"rk = tl.arange(0, {s.k})",
        f"pa = a + z * ab + {copies} * {ak}",
        f"pb = b + z * bb + rb{columns} * {bn} + rk{rows} * {bk}",
        f"sums = tl.zeros({shape}, tl.float32)",
        f"for i in tl.range(0, k // {s.k}, loop_unroll_factor={unrolled}):",
        *step(f"i * {s.k}", ""),
        # So written, the mask is seen to be the same for whole vectors where k is a multiple of theirs.
        f"done = k // {s.k} * {s.k}",
        "if done < k:",
        *step("done", f"(done + rk < k){rows}"),
        f"acc = tl.sum(sums, {along})[None, :]",
        finish,
        f"tl.store(c + z * cb_ + rb[None, :] * {cn}, acc.to({STORAGE[c]}), mask=inside)",
    ]
    scalars = [("cb_" if n == "cb" else n, t) for n, t in gemm_scalars(a_layout, b_layout, c_layout, False)] + e.scalars
    buffers = [("a", a), ("b", b), *e.buffers, ("c", c)]
    name = f"gemm_row_{a}_{b}_{c}_{a_layout}{b_layout}{c_layout}_{s}_{epilogue}"
    if beside:
        each = range(beside)
        buffers = [("a", a), *((f"{x}{i}", d) for i in each for x, d in (("b", b), ("c", c)))]
        scalars = [*((f"{stride}{i}", "i64") for i in each), *((f"n{i}", "i32") for i in each), ("k", "i32")]
        name += f"beside{beside}"
    body = "\n".join(t for t in lines if t)
    return template(target, name, buffers, scalars, body, s.warps, 1, e.module, ahead)


def _prefetch(s: RowSchedule, size: int) -> list[str]:
    """Lines of row_product: the program's columns of B, contiguous ones of elements of `size` bytes, go to the L2 cache, where other programs'
    writes to them are seen as well."""
    each, at_once = PREFETCHED // size, max(32 * s.warps // s.columns, 1)
    place = "tl.minimum(rb, n - 1)[:, None] * bn + tl.minimum(i + rp, k - 1)[None, :]"
    return [
        f"if tl.program_id(0) < {ROW_AHEAD // (s.columns * size)} // k:",
        f"    rp = tl.arange(0, {at_once}) * {each}",
        f"    for i in range(0, k, {at_once * each}):",
        f"        line = (b + z * bb + {place}).to(tl.int64)",
        '        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1)',
    ]


def row_groups(s: RowSchedule, n: Any, batch: Any) -> tuple[Any, Any, Any]:
    return (cdiv(n, s.columns) * batch, 1, 1)


def stream_reduce(target: Target, s: Schedule, compute: str, c: str, c_layout: str, epilogue: Epilogue) -> Kernel:
    """The tiles of a streamed product that several programs computed: c = epilogue(their sum, in the order of the reduction). Buffers:
    gemm's partial, epilogue operands, c. Scalars: cb, cm, (cn), m, n, k, programs (of gemm's grid), batch, then the epilogue's. Grid:
    stream_reduce_groups."""
    e = EpilogueText(target, epilogue, compute, c)
    rows = _stream_rows(s)
    cn = "1" if c_layout == "n" else "cn"

    def owner(step: str) -> str:
        return (
            f"tl.where({step} < more * (each + 1), ({step}) // (each + 1), more + ({step} - more * (each + 1)) // each)"
        )

    lines = [
        f"tiles_m = tl.cdiv(m, {s.m})",
        f"tiles_n = tl.cdiv(n, {s.n})",
        "tiles = tiles_m * tiles_n",
        *_shares(s),
        "item = tl.program_id(0)",
        f"low = {owner('item * steps')}",
        f"high = {owner('(item + 1) * steps - 1')}",
        "if low == high:",
        "    return",
        "tile = whole + item",
        "z = (tile // tiles).to(tl.int64)",
        "tile = tile % tiles",
        *_place(s),
        f"within_tile = tl.program_id(1) * {rows} + tl.arange(0, {rows})",
        "ra = (row + within_tile).to(tl.int64)",
        f"rb = (column + tl.arange(0, {s.n})).to(tl.int64)",
        *INSIDE,
        f"p = partial + (low * 2 + 1).to(tl.int64) * {s.m * s.n}",
        f"p += within_tile[:, None] * {s.n} + tl.arange(0, {s.n})[None, :]",
        "acc = tl.load(p)",
        f"p += {s.m * s.n}",
        "for i in range(low, high):",
        "    acc += tl.load(p)",
        f"    p += {2 * s.m * s.n}",
        e.text(),
        f"tl.store(c + z * cb + ra[:, None] * cm + rb[None, :] * {cn}, acc.to({STORAGE[c]}), mask=inside)",
    ]
    scalars = [("cb", "i64"), ("cm", "i64"), *([("cn", "i64")] if c_layout != "n" else [])]
    scalars += [*((x, "i32") for x in ("m", "n", "k", "programs", "batch")), *e.scalars]
    name = f"stream_reduce_{compute}_{c}_{c_layout}_{s}_{epilogue}"
    body = "\n".join(t for t in lines if t)
    return template(target, name, [("partial", compute), *e.buffers, ("c", c)], scalars, body, 4, 1, e.module)


def _stream_rows(s: Schedule) -> int:
    """Rows of a tile that a program of stream_reduce sums: 32 elements an invocation."""
    return min(s.m, max(4096 // s.n, 1))


def stream_reduce_groups(
    s: Schedule, programs: Any, m: Any, n: Any, batch: Any, maximum: Callable[..., Any] = max
) -> tuple[Any, Any, Any]:
    tiles = cdiv(m, s.m) * cdiv(n, s.n) * batch
    return (tiles - maximum(tiles // programs - 1, 0) * programs, s.m // _stream_rows(s), 1)


REDUCE = (4, 128)  # tile of reduce_splits: an access of 16 bytes an invocation


def reduce_splits(target: Target, compute: str, c: str, c_layout: str, epilogue: Epilogue) -> Kernel:
    """c = epilogue(sum of partial[split]), partial [splits, batch, m, n] contiguous. Buffers: partial, epilogue operands, c.
    Scalars: cb, cm, (cn), total (batch * m * n), m, n, splits, then the epilogue's. Grid: reduce_groups."""
    e = EpilogueText(target, epilogue, compute, c)
    rows, columns = REDUCE
    cn = "1" if c_layout == "n" else "cn"
    lines = [
        f"tiles_m = tl.cdiv(m, {rows})",
        f"tiles_n = tl.cdiv(n, {columns})",
        "z = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)",
        "tile = tl.program_id(0) % (tiles_m * tiles_n)",
        f"ra = ((tile // tiles_n) * {rows} + tl.arange(0, {rows})).to(tl.int64)",
        f"rb = ((tile % tiles_n) * {columns} + tl.arange(0, {columns})).to(tl.int64)",
        *INSIDE,
        "p = partial + (z * m + ra[:, None]) * n + rb[None, :]",
        f"acc = tl.zeros([{rows}, {columns}], {TYPES[compute]})",
        "for i in tl.range(0, splits, loop_unroll_factor=4):",  # loads that wait for one another, not for the sum
        "    acc += tl.load(p, mask=inside, other=0)",
        "    p += total",
        e.text(),
        f"tl.store(c + z * cb + ra[:, None] * cm + rb[None, :] * {cn}, acc.to({STORAGE[c]}), mask=inside)",
    ]
    scalars = [("cb", "i64"), ("cm", "i64"), *([("cn", "i64")] if c_layout != "n" else []), ("total", "i64")]
    scalars += [("m", "i32"), ("n", "i32"), ("splits", "i32"), *e.scalars]
    name = f"reduce_splits_{compute}_{c}_{c_layout}_{epilogue}"
    return template(
        target, name, [("partial", compute), *e.buffers, ("c", c)], scalars, "\n".join(t for t in lines if t), 4, 3, e.module
    )  # fmt: skip


def reduce_groups(m: Any, n: Any, batch: Any) -> tuple[Any, Any, Any]:
    return (cdiv(m, REDUCE[0]) * cdiv(n, REDUCE[1]) * batch, 1, 1)
