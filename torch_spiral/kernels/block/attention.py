"""Scaled dot product attention in Triton: forward and backward, without the matrix of scores in memory.

q [B, H, Tq, D], k [B, Hk, Tk, D], v [B, Hk, Tk, Dv] with unit stride along the last dimension; H is a multiple of Hk. causal:
query i sees keys up to i. A mask [B, H, Tq, Tk] is boolean (true: attend) or added; the argument `mask` is its dtype and, after an
underscore, "n" where keys have unit stride, "0n" where it is also the same for all queries ("" with any strides). Scores are kept times
log2(e), so that exp2 is the only exponential; under a mask that is added they are kept as they are, and differences of them take the
factor: a mask may be the lowest number there is, and a whole row of it stays a row of equal scores. A row that sees nothing gives 0 and a
logsumexp of -infinity.

varlen: the batch are sequences that lie one after the other in tensors with one batch (batch strides are 0). spans [sequences, 4]
(int32) says where each begins and ends, in q and in k. Row i of the queries sees keys from i + diagonal - left (with "window") to
i + diagonal + right, where the last query of a sequence has its diagonal at the last key. queries and keys are those of all
sequences together, longest those of the longest.

paged (with varlen): k and v are pages [pages, Hk, page, D], whose stride is k_b; table [sequences, ..] (int32) says which pages hold the
keys of a sequence, one after the other. Keys of a sequence count from 0. "tiles": a page is a multiple of a tile's keys; else "rows".

grouped (with varlen): the query heads that share keys are rows of one tile, query by query, so that the keys are read once for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..kernel import DTYPES, Kernel, Target
from . import STORAGE, cdiv, power_of_two, template

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Schedule:
    """Tiles of queries x keys. registers: of an invocation at most, so that more programs run on a unit at a time (0: any,
    as it is where the compute capability is not 9.0)."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    def __str__(self) -> str:
        limit = f"r{self.registers}" if self.registers else ""
        return f"{self.queries}x{self.keys}w{self.warps}s{self.stages}{limit}"


def forward_schedule(dtype: str, head: int, rows: int, mask: bool = False, plain: bool = False) -> Schedule:
    """head: the larger head dimension; rows: of queries a workgroup, as csrc/aten/attention.cpp has it. plain: without mask, dropout,
    splits or varlen."""
    queries = min(max(2 << rows, 16), 128)
    if dtype == "f32":
        return Schedule(min(queries, 64), 32 if head > 64 else 64, 4, 2)
    if head <= 64 and plain:  # tiles of 64 queries are the least that the tensor cores of sm_90 take at their full rate
        return Schedule(64 if rows >= 4 else queries, 64, 4, 3, 128)
    if head <= 64:
        return Schedule(min(queries, 64) if mask else queries, 64, 4, 3)
    if head <= 128:
        return Schedule(min(queries, 64), 64, 4, 3)
    return Schedule(queries, 64, 8 if queries == 128 else 4, 2)


PAGE_STAGES = 2  # of the pipeline, taken by the numbers of pages, which are loaded before what is in them


def paged_schedule(s: Schedule) -> Schedule:
    """A schedule of forward() for keys in pages: as many tiles of keys are on their way."""
    return replace(s, stages=s.stages + PAGE_STAGES)


def backward_schedule(dtype: str, head: int, keys: bool) -> Schedule:
    """keys: of the kernel that computes dk and dv."""
    if dtype == "f32":
        return Schedule(32, 32, 4, 1) if head > 64 else Schedule(64, 64, 4, 1)
    if head <= 64:
        return Schedule(64, 64, 4, 3)
    return Schedule(32, 64, 4, 2) if keys else Schedule(64, 32, 4, 2)


def candidates(dtype: str, head: int, rows: int) -> list[Schedule]:
    """What a tuner may choose from for forward()."""
    queries = (64, 128) if rows >= 6 else (32, 64) if rows >= 5 else (16,)
    found = [
        Schedule(q, k, warps, stages)
        for q in queries
        for k in (32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3, 4)
        if head <= 256 and (warps == 4 or q >= 64) and (dtype != "f32" or q * k <= 64 * 64)
    ]
    if dtype != "f32" and head <= 64 and rows >= 4:  # four, and five programs on a unit
        found += [Schedule(64, 64, 4, 3, 128), Schedule(64, 32, 4, 3, 96)]
    return found


def _names(tensors: str, mask: str, varlen: str = "", paged: str = "") -> list[tuple[str, str]]:
    """Scalars: batch, head and row strides of each tensor, those of the mask or the table's row stride, then sizes; with varlen longest,
    left and right after them."""
    names = [(f"{t}_{d}", "i64") for t in tensors.split() for d in "bht"]
    names += [(f"mask_{d}", "i64") for d in "bhqk"] * bool(mask) + [("table_b", "i64")] * bool(paged)
    return [*names, *((n, "i32") for n in ("heads", "share", "queries", "keys", "head", "head_v")), ("scale", "f32"),
            *((n, "i32") for n in ("longest", "left", "right") if varlen)]  # fmt: skip


def _score(
    mask: str,
    causal: bool,
    q: str,
    k: str,
    transposed: bool = False,
    edge: bool = True,
    varlen: str = "",
    limit: str = "",
) -> list[str]:
    """Lines that turn `s`, the product of queries `q` and keys `k` (vectors of indices), into masked scores (times _unit()).
    edge: some keys of the tile are out of range or after a query. limit: the vector of the last keys that queries see, where there
    is one: one comparison in place of two."""
    qi, ki = (f"{q}[None, :]", f"{k}[:, None]") if transposed else (f"{q}[:, None]", f"{k}[None, :]")
    lines = ["s = s * scale2"]
    if mask:
        kind, _, layout = mask.partition("_")
        row = "" if layout == "0n" else f"{qi}.to(tl.int64) * mask_q + "
        at = f"mask_base + ({row}{ki}{'' if layout else '.to(tl.int64) * mask_k'})"
        inside = f"({ki} < keys)" + (f" & ({qi} < queries)" if row else "")
        if kind == "bool":
            lines.append(f"s = tl.where(tl.load({at}, mask={inside}, other=0) != 0, s, float('-inf'))")
        else:
            lines.append(f"s += tl.load({at}, mask={inside}, other=0).to(tl.float32)")
    if edge and limit:
        lines.append(f"s = tl.where({ki} <= {limit}[:, None], s, float('-inf'))")
    elif edge:
        seen = f" & ({ki} <= {qi}{' + diagonal + right' if varlen else ''})" if causal else ""
        seen += f" & ({ki} >= {qi} + diagonal - left)" if varlen == "window" else ""
        lines.append(f"s = tl.where(({ki} < keys){seen}, s, float('-inf'))")
    return lines


# With dropout, the last buffer and scalars: the call's key of Philox, of 2^24 the probability to keep, what kept ones are multiplied by.
SEED, KEEP = [("seed", "u32")], [("keep", "i32"), ("drop_scale", "f32")]


def _kept(s: Schedule, q: str, k: str, bh: str, transposed: bool = False) -> list[str]:
    """`kept`: which probabilities of queries from `q` on (divisible by 4) for keys `k` are, as ops/attention.py's forward() says."""
    four = f"({q} // 4 + tl.arange(0, {s.queries // 4}))"
    place = f"{k}[:, None], {four}[None, :]" if transposed else f"{k}[None, :], {four}[:, None]"
    by_query = "kept" if transposed else "tl.permute(kept, (0, 2, 3, 1))"
    return [
        "key = tl.load(seed).to(tl.uint64) | (tl.load(seed + 1).to(tl.uint64) << 32)",
        f"c0, c1, c2, c3 = tl.philox(key, {place}, {bh}, 0)",
        "kept = (tl.join(tl.join(c0, c2), tl.join(c1, c3)) >> 8).to(tl.int32) < keep",
        f"kept = tl.reshape({by_query}, [{f'{s.keys}, {s.queries}' if transposed else f'{s.queries}, {s.keys}'}])",
    ]


def _mask(*conditions: str) -> str:
    """The arguments of a load for those conditions that are not empty."""
    given = " & ".join(c for c in conditions if c)
    return f", mask={given}, other=0" if given else ""


# Where a program is: a tile of the sequence, and a head of a batch.
PLACE = ["tiles = tl.cdiv({length}, {tile})", "bh = tl.program_id(0) // tiles"]
PLACE_HEAD = ["b = (bh // {heads}).to(tl.int64)", "h = (bh % {heads}).to(tl.int64)"]
# Causal: of as many heads as have their keys and values in the L2 cache together, the last tiles, which see most keys, go first.
NEAR, TOGETHER = 16 << 20, 128  # bytes; heads at most
PLACE_HEAVY = [
    "tiles = tl.cdiv(queries, {tile})",
    "together = tl.minimum(tl.maximum({near} // (head + head_v) // keys, 1), {together}) * share",
    "first = tl.program_id(0) // (together * tiles) * together",
    "members = tl.minimum(tl.num_programs(0) // tiles - first, together)",
    "within = tl.program_id(0) - first * tiles",
    "bh = first + within % members",
]


def _place(
    length: str,
    tile: int,
    heads: str = "heads",
    reverse: bool = False,
    varlen: str = "",
    grouped: bool = False,
    size: int = 0,
) -> list[str]:
    """reverse: the last tiles, which see most keys, go first. varlen: from here on queries and keys are the ends of the sequence.
    grouped: start is the first query of the tile. size: bytes of an element, with reverse."""
    start = f"(tiles - 1 - tl.program_id(0) % tiles) * {tile}" if reverse else f"tl.program_id(0) % tiles * {tile}"
    whole = ("longest * share" if grouped else "longest") if varlen else length
    place = PLACE
    if reverse and not varlen:
        place, start = PLACE_HEAVY, f"(tiles - 1 - within // members) * {tile}"
    values = {"length": whole, "tile": tile, "heads": heads, "near": NEAR // max(size, 1), "together": TOGETHER}
    lines = [*(t.format(**values) for t in (*place, *PLACE_HEAD)), f"start = {start}"]
    if not varlen:
        return lines
    return [
        *lines,
        "total = queries",
        "first_query = tl.load(spans + b * 4)",
        "queries = tl.load(spans + b * 4 + 1)",
        "first_key = tl.load(spans + b * 4 + 2)",
        "keys = tl.load(spans + b * 4 + 3)",
        *(
            [
                f"packed = start + tl.arange(0, {tile})",
                f"end = tl.cdiv(start + {tile}, share)",
                "start = start // share",
            ]
            if grouped
            else []
        ),
        f"start += first_{'query' if length == 'queries' else 'key'}",
        f"if start >= {length}:",
        "    return",
        "diagonal = keys - queries",
    ]


def _precision(dtype: str, precision: str) -> str:
    return f", input_precision={precision!r}" if dtype == "f32" else ""


def _unit(mask: str) -> float:
    """What scores and their logarithms are kept times."""
    return LOG2E if mask.partition("_")[0] in ("", "bool") else 1.0


def _exp(mask: str, difference: str) -> str:
    """The exponential of a difference of scores that are kept times _unit()."""
    return f"tl.math.exp2({difference})" if _unit(mask) == LOG2E else f"tl.math.exp2(({difference}) * {LOG2E})"


def _probability(mask: str, difference: str) -> list[str]:
    """Lines for `p` from scores less their logsumexp. Where a mask leaves scores no digits, that may be off by any amount: 1 at most."""
    lines = [f"p = {_exp(mask, difference)}"]
    return lines if _unit(mask) == LOG2E else [*lines, "p = tl.where(p > 1.0, 1.0, p)"]


def _dims(d: int, dv: int, mask: str) -> list[str]:
    """Indices along the head dimensions, and the scale of scores in their unit."""
    return [f"rd = tl.arange(0, {d})", f"rv = tl.arange(0, {dv})", f"scale2 = scale * {_unit(mask)}"]


def _queries(
    s: Schedule,
    dtype: str,
    d: int,
    dv: int,
    mask: str,
    causal: bool,
    varlen: str,
    paged: str = "",
    grouped: bool = False,
) -> list[str]:
    """A tile of queries, where its keys and values begin, its rows of [B, H, Tq], and the keys `begin` to `last` that it sees."""
    if not causal:
        last = "keys"
    elif varlen:
        end = "first_query + end" if grouped else f"start + {s.queries}"
        last = f"tl.maximum(tl.minimum(tl.minimum({end}, queries) + diagonal + right, keys), first_key)"
    else:
        last = f"tl.minimum(start + {s.queries}, keys)"
    begin = "tl.maximum(first_key, start + diagonal - left)" if varlen == "window" else "first_key" if varlen else "0"
    heads = ["hk = h // share"]
    if grouped:
        heads = ["hk = h", "h = hk * share + packed % share"]
    return [
        *_place(
            "queries",
            s.queries,
            "(heads // share)" if grouped else "heads",
            causal,
            varlen,
            grouped,
            DTYPES[dtype].size,
        ),
        *heads,
        f"last = {last}",
        f"begin = {begin}" + (f" // {s.keys} * {s.keys}" if paged and varlen == "window" else ""),
        "rq = first_query + packed // share" if grouped else f"rq = start + tl.arange(0, {s.queries})",
        *_dims(d, dv, mask),
        f"k_base = k + hk * k_h{'' if paged else ' + b * k_b'}",
        f"v_base = v + hk * v_h{'' if paged else ' + b * v_b'}",
        f"row = {'h * total' if varlen else 'bh.to(tl.int64) * queries'} + rq",
    ]


def _page(paged: str, keys: int) -> list[str]:
    """Where the keys and values of the tile at j are: k_at [D, keys] and v_at [keys, Dv]. A page that does not exist is not read."""
    x, mask = ("j", "") if paged == "tiles" else ("x", ", mask=x < keys, other=0")
    lines = [
        f"at = tl.load(table + b * table_b + {x} // page{mask})",
        "at = tl.minimum(tl.maximum(at, 0), pages - 1).to(tl.int64)",
    ]
    if paged == "rows":
        return [
            *lines,
            "k_at = rd[:, None] + (at * k_b + x % page * k_t)[None, :]",
            "v_at = (at * v_b + x % page * v_t)[:, None] + rv[None, :]",
        ]
    return [
        *lines,
        f"k_at = rd[:, None] + (at * k_b + (j % page + tl.arange(0, {keys})) * k_t)[None, :]",
        f"v_at = (at * v_b + (j % page + tl.arange(0, {keys})) * v_t)[:, None] + rv[None, :]",
    ]


def _buffers(
    dtype: str, tensors: str, mask: str, varlen: str, *more: tuple[str, str], paged: str = ""
) -> list[tuple[str, str]]:
    tables = (
        [("mask", mask.partition("_")[0])] * bool(mask)
        + [("spans", "i32")] * bool(varlen)
        + [("table", "i32")] * bool(paged)
    )
    return [*((t, dtype) for t in tensors.split()), *tables, *more]


def _name(
    kind: str, dtype: str, head: int, head_v: int, exact: bool, mask: str, causal: bool, precision: str, varlen: str
) -> str:
    flags = f"{'_causal' if causal else ''}{f'_varlen{varlen}' if varlen else ''}{precision}"
    return f"attention{kind}_{dtype}_{head}_{head_v}{'x' if exact else ''}_{mask}{flags}"


def forward(
    target: Target,
    s: Schedule,
    dtype: str,
    head: int,
    head_v: int,
    exact: bool,
    mask: str,
    causal: bool,
    precision: str,
    varlen: str = "",
    split: bool = False,
    paged: str = "",
    dropout: bool = False,
    grouped: bool = False,
) -> Kernel:
    """head, head_v: the dimensions' upper bounds; exact: the dimensions themselves. Buffers: q, k, v, (mask), (spans), (table), out,
    lse [B, H, Tq] (natural logarithm). Scalars: _names("q k v out"), with paged also page (keys of one) and pages; without mask
    and varlen the scale is not negative. Grid: groups(). varlen goes with causal, without mask. The grid of grouped is that of longest * share queries of H / share
    heads.

    split (few queries, many keys; not causal but varlen): program_id(1) is one of several runs of `span` keys, a multiple of the
    tile's. out [runs, B, H, Tq, Dv] (float32) and lse [runs, B, H, Tq] are contiguous; merge() finishes. Further scalars: span, rows
    (B * H * Tq). With varlen the keys that a tile sees are dealt to the runs evenly: there is no span."""
    assert not varlen or (causal and not mask)
    assert not split or varlen or not causal
    assert varlen or not (paged or grouped)
    d, dv = max(power_of_two(head), 16), max(power_of_two(head_v), 16)
    ip = _precision(dtype, precision)
    p = f"p.to({STORAGE[dtype]})" if dtype != "f32" else "p"
    in_d = "" if exact and head == d else "(rd[{}] < head)"
    in_v = "" if exact and head_v == dv else "(rv[None, :] < head_v)"

    # Where nothing is added to the scores, their scale is part of the exponential; it is positive for that, and no row's largest score
    # is -infinity: tiles without a key that the row sees are left out, or come after others. The queries are multiplied as they lie in
    # shared memory: with anything done to them, they would take registers throughout the loop.
    fold = not mask and not varlen  # where a row may see nothing
    # An invocation of NVIDIA's has two columns of eight: it adds up its own, and what others have is added once, at the end.
    apart = fold and dtype != "f32" and target.engine != "hip" and s.queries >= 16 * s.warps

    def body(edge: bool) -> list[str]:
        in_k = _mask(in_d.format(":, None"), "(x[None, :] < keys)" if edge else "")
        in_x = _mask("(x[:, None] < keys)" if edge else "", in_v)
        need_x = edge or mask or dropout or paged == "rows"
        lines = [
            *([f"x = j + tl.arange(0, {s.keys})"] if need_x else []),
            *(_page(paged, s.keys) if paged else []),
            f"kt = tl.load(k_base + k_at{in_k})",
            f"s = tl.dot(q_tile, kt{ip})",
            *_score(mask, causal, "rq", "x", edge=edge, varlen=varlen, limit="limit" if causal and not varlen else "")[fold:],
            f"m_new = tl.maximum(m_i, tl.max(s, 1){' * scale2' * fold})",
            *([] if fold else ["m_safe = tl.where(m_new == float('-inf'), 0.0, m_new)"]),
            f"p = {_exp(mask, 's' + ' * scale2' * fold + (' - m_new' if fold else ' - m_safe') + '[:, None]')}",
            f"alpha = {_exp(mask, 'm_i - m_new' if fold else 'm_i - m_safe')}",
            f"l_i = l_i * alpha[:, None] + tl.sum(tl.reshape(p, [{s.queries}, {s.keys // 8}, 8]), 1)"
            if apart
            else "l_i = l_i * alpha + tl.sum(p, 1)",
            *([*_kept(s, "start", "x", "bh"), "p = tl.where(kept, p, 0.0)"] if dropout else []),
            "acc = acc * alpha[:, None]",
            f"vt = tl.load(v_base + v_at{in_x})",
            f"acc = tl.dot({p}, vt, acc{ip})",
            "m_i = m_new",
            *([f"k_base += {s.keys} * k_t", f"v_base += {s.keys} * v_t"] if not paged else []),
        ]  # fmt: skip
        return ["    " + line for line in lines]

    if varlen == "window":
        full = "begin"
    elif varlen:
        full = f"begin + tl.maximum(tl.minimum(start + diagonal + right + 1, last) - begin, 0) // {s.keys} * {s.keys}"
    else:
        full = f"{'tl.minimum(start, keys)' if causal else 'last'} // {s.keys} * {s.keys}"
    to, at = ("tl.float32", "row[:, None] * head_v") if split else (STORAGE[dtype], "rq[:, None].to(tl.int64) * out_t")
    head_of = "h[:, None]" if grouped else "h"
    store = [
        "o_base = out" + ("" if split else f" + b * out_b + {head_of} * out_h"),
        f"tl.store(o_base + {at} + rv[None, :], acc.to({to}), mask=(rq[:, None] < queries) & (rv[None, :] < head_v))",
    ]
    run = ["begin = tl.program_id(1) * span", "last = tl.minimum(begin + span, keys)"]
    if varlen:
        run = [
            f"span = tl.cdiv(tl.cdiv(tl.maximum(last - begin, 0), tl.num_programs(1)), {s.keys}) * {s.keys}",
            "begin += tl.program_id(1) * span",
            "last = tl.minimum(begin + span, last)",
        ]
    lines = [
        *_queries(s, dtype, d, dv, mask, causal, varlen, paged, grouped),
        *(run if split else []),
        *(["row += tl.program_id(1).to(tl.int64) * rows"] if split else []),
        # Tensor descriptors, which products gain from, were slower here: 0.63 of torch's rate where this had 0.80 (H200, D 64).
        *([f"k_at = rd[:, None] + tl.arange(0, {s.keys})[None, :].to(tl.int64) * k_t",
           f"v_at = tl.arange(0, {s.keys})[:, None].to(tl.int64) * v_t + rv[None, :]"] if not paged else []),
        *(["mask_base = mask + b * mask_b + h * mask_h"] if mask else []),
        f"q_tile = tl.load(q + b * q_b + {head_of} * q_h + rq[:, None].to(tl.int64) * q_t + rd[None, :]"
        f"{_mask('(rq[:, None] < queries)', in_d.format('None, :'))})",
        *(["scale2 = tl.maximum(scale2, 1e-30)"] if fold else []),
        *(["limit = tl.minimum(rq, keys - 1)"] if causal and not varlen else []),
        f"m_i = tl.full([{s.queries}], float('-inf'), tl.float32)",
        f"l_i = tl.zeros([{s.queries}{', 8' * apart}], tl.float32)",
        f"acc = tl.zeros([{s.queries}, {dv}], tl.float32)",
        *(["k_base += begin.to(tl.int64) * k_t", "v_base += begin.to(tl.int64) * v_t"] if (varlen or split) and not paged else []),
        f"full = {full}",
        f"for j in range(begin, full, {s.keys}):",
        *body(False),
        f"for j in range(full, last, {s.keys}):",
        *body(True),
        *(["l_i = tl.sum(l_i, 1)"] if apart else []),
        "l_safe = tl.where(l_i == 0.0, 1.0, l_i)",
        *(["acc = acc * drop_scale"] if dropout else []),
        "acc = acc / l_safe[:, None]",
        f"tl.store(lse + row, m_i * {1 / _unit(mask)} + tl.math.log2(l_safe) * {1 / LOG2E}, mask=rq < queries)"
        if mask
        else f"tl.store(lse + row, (m_i + tl.math.log2(l_safe)) * {1 / LOG2E}, mask=rq < queries)",
        *store,
    ]  # fmt: skip
    kind = f"{f'_paged{paged}' if paged else ''}{'_grouped' * grouped}{'_split' * split}"
    name = f"{_name('', dtype, head, head_v, exact, mask, causal, precision, varlen)}{kind}_{s}"
    buffers = _buffers(dtype, "q k v", mask, varlen, ("out", "f32" if split else dtype), ("lse", "f32"), paged=paged)
    scalars = [("page", "i32"), ("pages", "i32")] * bool(paged)
    scalars += ([("span", "i32")] * (not varlen) + [("rows", "i32")]) * split
    return template(
        target,
        name + "_dropout" * dropout,
        buffers + SEED * dropout,
        _names("q k v out", mask, varlen, paged) + KEEP * dropout + scalars,
        "\n".join(lines),
        s.warps,
        s.stages,
        registers=s.registers if target.capability == 90 else 0,
    )


MERGED = 16  # runs that a program of merge loads together


def merge(target: Target, dtype: str, head_v: int) -> Kernel:
    """Combines the runs of forward(split=True). Buffers: parts, part_lse, out, lse [B, H, Tq]. Scalars: strides of out, runs, rows
    (B * H * Tq), heads, queries, head_v. Grid: (rows, 1, 1)."""
    dv = power_of_two(head_v)
    body = f"""
        row = tl.program_id(0).to(tl.int64)
        rv = tl.arange(0, {dv})
        high = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([{dv}], tl.float32)
        for i in range(0, runs, {MERGED}):
            run = i + tl.arange(0, {MERGED})
            part = tl.load(part_lse + run * rows + row, mask=run < runs, other=float("-inf"))
            at = parts + (run * rows + row)[:, None] * head_v + rv[None, :]
            values = tl.load(at, mask=(run < runs)[:, None] & (rv[None, :] < head_v), other=0)
            new = tl.maximum(high, tl.max(part, 0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            weight = tl.exp(part - safe)
            before = tl.exp(high - safe)
            total = total * before + tl.sum(weight, 0)
            acc = acc * before + tl.sum(tl.where((weight > 0)[:, None], weight[:, None] * values, 0.0), 0)
            high = new
        whole = tl.where(total == 0.0, 1.0, total)
        tl.store(lse + row, high + tl.log(whole))
        place = out + row // (heads * queries) * out_b + row // queries % heads * out_h + row % queries * out_t
        tl.store(place + rv, (acc / whole).to({STORAGE[dtype]}), mask=rv < head_v)
    """
    scalars = [(f"out_{d}", "i64") for d in "bht"] + [
        (n, "i32") for n in ("runs", "rows", "heads", "queries", "head_v")
    ]
    buffers = [("parts", "f32"), ("part_lse", "f32"), ("out", dtype), ("lse", "f32")]
    return template(target, f"attention_merge_{dtype}_{head_v}", buffers, scalars, body, 4)


def delta(target: Target, dtype: str, head_v: int) -> Kernel:
    """delta = sum of g * out over the head dimension. Buffers: g, out, delta [B, H, Tq]. Scalars: strides of g and out, then
    heads, queries, head_v. Grid: groups()."""
    dv = power_of_two(head_v)
    body = f"""
        tiles = tl.cdiv(queries, 32)
        bh = tl.program_id(0) // tiles
        b = (bh // heads).to(tl.int64)
        h = (bh % heads).to(tl.int64)
        rq = tl.program_id(0) % tiles * 32 + tl.arange(0, 32)
        rv = tl.arange(0, {dv})
        inside = (rq[:, None] < queries) & (rv[None, :] < head_v)
        x = tl.load(g + b * g_b + h * g_h + rq[:, None].to(tl.int64) * g_t + rv[None, :], mask=inside, other=0).to(tl.float32)
        y = tl.load(out + b * out_b + h * out_h + rq[:, None].to(tl.int64) * out_t + rv[None, :], mask=inside, other=0).to(tl.float32)
        tl.store(delta + bh.to(tl.int64) * queries + rq, tl.sum(x * y, 1), mask=rq < queries)
    """
    scalars = [(f"{t}_{d}", "i64") for t in ("g", "out") for d in "bht"] + [
        (n, "i32") for n in ("heads", "queries", "head_v")
    ]
    return template(
        target, f"attention_delta_{dtype}_{head_v}", [("g", dtype), ("out", dtype), ("delta", "f32")], scalars, body, 4
    )


def backward_query(
    target: Target,
    s: Schedule,
    dtype: str,
    head: int,
    head_v: int,
    exact: bool,
    mask: str,
    causal: bool,
    precision: str,
    scores: bool,
    varlen: str = "",
    dropout: bool = False,
) -> Kernel:
    """dq, and with `scores` the gradient of the scores ds [B, H, Tq, Tk] (contiguous, float32). Buffers: q, k, v, g, (mask),
    (spans), lse, delta, dq, (ds). Scalars: _names("q k v g dq"). Grid: groups()."""
    d, dv = max(power_of_two(head), 16), max(power_of_two(head_v), 16)
    ip = _precision(dtype, precision)
    in_d = "" if exact and head == d else " & (rd[None, :] < head)"
    in_v = "" if exact and head_v == dv else " & (rv[None, :] < head_v)"
    low = f".to({STORAGE[dtype]})" if dtype != "f32" else ""
    lines = [
        *_queries(s, dtype, d, dv, mask, causal, varlen),
        *(["mask_base = mask + b * mask_b + h * mask_h"] if mask else []),
        "in_q = rq[:, None] < queries",
        f"q_tile = tl.load(q + b * q_b + h * q_h + rq[:, None].to(tl.int64) * q_t + rd[None, :], mask=in_q{in_d}, other=0)",
        f"g_tile = tl.load(g + b * g_b + h * g_h + rq[:, None].to(tl.int64) * g_t + rv[None, :], mask=in_q{in_v}, other=0)",
        f"log = tl.load(lse + row, mask=rq < queries, other=0) * {_unit(mask)}",
        "log = tl.where(log == float('-inf'), 0.0, log)",
        "di = tl.load(delta + row, mask=rq < queries, other=0)",
        f"acc = tl.zeros([{s.queries}, {d}], tl.float32)",
        f"for j in range(begin, last, {s.keys}):",
        f"    x = j + tl.arange(0, {s.keys})",
        "    in_k = x[:, None] < keys",
        f"    kt = tl.load(k_base + x[:, None].to(tl.int64) * k_t + rd[None, :], mask=in_k{in_d}, other=0)",
        f"    vt = tl.load(v_base + x[:, None].to(tl.int64) * v_t + rv[None, :], mask=in_k{in_v}, other=0)",
        f"    s = tl.dot(q_tile, tl.trans(kt){ip})",
        *("    " + t for t in _score(mask, causal, "rq", "x", varlen=varlen)),
        *("    " + t for t in _probability(mask, "s - log[:, None]")),
        f"    dp = tl.dot(g_tile, tl.trans(vt){ip})",
        *("    " + t for t in [*_kept(s, "start", "x", "bh"), "dp = tl.where(kept, dp * drop_scale, 0.0)"] if dropout),
        "    ds = p * (dp - di[:, None])",
        *(["    tl.store(ds_out + row[:, None] * keys + x[None, :], ds, mask=in_q & (x[None, :] < keys))"] if scores else []),
        f"    acc = tl.dot(ds{low}, kt, acc{ip})",
        "acc = acc * scale",
        "tl.store(dq + b * dq_b + h * dq_h + rq[:, None].to(tl.int64) * dq_t + rd[None, :], "
        f"acc.to({STORAGE[dtype]}), mask=in_q & (rd[None, :] < head))",
    ]  # fmt: skip
    name = (
        _name("_backward_query", dtype, head, head_v, exact, mask, causal, precision, varlen) + f"{'_ds' * scores}_{s}"
    )
    more = [("ds_out", "f32")] if scores else []
    buffers = _buffers(dtype, "q k v g", mask, varlen, ("lse", "f32"), ("delta", "f32"), ("dq", dtype), *more)
    scalars = _names("q k v g dq", mask, varlen) + KEEP * dropout
    return template(
        target, name + "_dropout" * dropout, buffers + SEED * dropout, scalars, "\n".join(lines), s.warps, s.stages
    )


def backward_key(
    target: Target,
    s: Schedule,
    dtype: str,
    head: int,
    head_v: int,
    exact: bool,
    mask: str,
    causal: bool,
    precision: str,
    varlen: str = "",
    dropout: bool = False,
) -> Kernel:
    """dk and dv, summed over the query heads that share a key head. Buffers: q, k, v, g, (mask), (spans), lse, delta, dk, dv. Scalars:
    _names("q k v g dk dv"). Grid: groups()."""
    d, dv = max(power_of_two(head), 16), max(power_of_two(head_v), 16)
    ip = _precision(dtype, precision)
    in_d = "" if exact and head == d else " & (rd[None, :] < head)"
    in_v = "" if exact and head_v == dv else " & (rv[None, :] < head_v)"
    low = f".to({STORAGE[dtype]})" if dtype != "f32" else ""
    first, end = f"(start // {s.queries}) * {s.queries}" if causal else "0", "queries"
    if varlen:
        first = "tl.maximum(start - diagonal - right, first_query)"
        end = f"tl.minimum(start + {s.keys} - diagonal + left, queries)" if varlen == "window" else end
    lines = [
        "kv_heads = heads // share",
        *(t.replace("h = ", "hk = ") if t.startswith("h = ") else t for t in _place("keys", s.keys, "kv_heads", varlen=varlen)),
        f"rk = start + tl.arange(0, {s.keys})",
        *_dims(d, dv, mask),
        "in_k = rk[:, None] < keys",
        f"kt = tl.load(k + b * k_b + hk * k_h + rk[:, None].to(tl.int64) * k_t + rd[None, :], mask=in_k{in_d}, other=0)",
        f"vt = tl.load(v + b * v_b + hk * v_h + rk[:, None].to(tl.int64) * v_t + rv[None, :], mask=in_k{in_v}, other=0)",
        f"dk_acc = tl.zeros([{s.keys}, {d}], tl.float32)",
        f"dv_acc = tl.zeros([{s.keys}, {dv}], tl.float32)",
        "for i in range(0, share):",
        "    h = hk * share + i",
        *(["    mask_base = mask + b * mask_b + h * mask_h"] if mask else []),
        "    q_base = q + b * q_b + h * q_h",
        "    g_base = g + b * g_b + h * g_h",
        f"    rows = {'h * total' if varlen else '(b * heads + h) * queries'}",
        f"    for j in range({first}, {end}, {s.queries}):",
        f"        x = j + tl.arange(0, {s.queries})",
        "        in_q = x[:, None] < queries",
        f"        q_tile = tl.load(q_base + x[:, None].to(tl.int64) * q_t + rd[None, :], mask=in_q{in_d}, other=0)",
        f"        g_tile = tl.load(g_base + x[:, None].to(tl.int64) * g_t + rv[None, :], mask=in_q{in_v}, other=0)",
        f"        log = tl.load(lse + rows + x, mask=x < queries, other=0) * {_unit(mask)}",
        "        log = tl.where(log == float('-inf'), 0.0, log)",
        "        di = tl.load(delta + rows + x, mask=x < queries, other=0)",
        f"        s = tl.dot(kt, tl.trans(q_tile){ip})",
        *("        " + t for t in _score(mask, causal, "x", "rk", True, varlen=varlen)),
        *("        " + t for t in _probability(mask, "s - log[None, :]")),
        "        p = tl.where(x[None, :] < queries, p, 0.0)",
        *("        " + t for t in _kept(s, "j", "rk", "(b * heads + h).to(tl.int32)", True) if dropout),
        f"        dv_acc = tl.dot({'tl.where(kept, p, 0.0)' if dropout else 'p'}{low}, g_tile, dv_acc{ip})",
        f"        dp = tl.dot(vt, tl.trans(g_tile){ip})",
        *(["        dp = tl.where(kept, dp * drop_scale, 0.0)"] if dropout else []),
        "        ds = p * (dp - di[None, :])",
        f"        dk_acc = tl.dot(ds{low}, q_tile, dk_acc{ip})",
        "dk_acc = dk_acc * scale",
        *(["dv_acc = dv_acc * drop_scale"] if dropout else []),
        "tl.store(dk + b * dk_b + hk * dk_h + rk[:, None].to(tl.int64) * dk_t + rd[None, :], "
        f"dk_acc.to({STORAGE[dtype]}), mask=in_k & (rd[None, :] < head))",
        "tl.store(dv + b * dv_b + hk * dv_h + rk[:, None].to(tl.int64) * dv_t + rv[None, :], "
        f"dv_acc.to({STORAGE[dtype]}), mask=in_k & (rv[None, :] < head_v))",
    ]  # fmt: skip
    name = f"{_name('_backward_key', dtype, head, head_v, exact, mask, causal, precision, varlen)}_{s}"
    buffers = _buffers(dtype, "q k v g", mask, varlen, ("lse", "f32"), ("delta", "f32"), ("dk", dtype), ("dv", dtype))
    scalars = _names("q k v g dk dv", mask, varlen) + KEEP * dropout
    return template(
        target, name + "_dropout" * dropout, buffers + SEED * dropout, scalars, "\n".join(lines), s.warps, s.stages
    )


def groups(tile: int, length: Any, heads: Any) -> tuple[Any, Any, Any]:
    """A grid of tiles of the sequence for every head of every batch."""
    return (cdiv(length, tile) * heads, 1, 1)
