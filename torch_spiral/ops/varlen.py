"""Attention of sequences that lie one after the other in one tensor (torch.nn.attention.varlen): _flash_attention_forward and
_flash_attention_backward. Where sequences begin and end stays on the device."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..kernels import ir
from ..kernels.block import attention as block
from ..kernels.builder import KernelBuilder
from ..kernels.kernel import Kernel, Target
from ..kernels.simt import attention as simt
from ..kernels.vector import attention as vector
from ..kernels.vector.gemm import block_schedule
from ..lowering import (
    Tensor,
    build,
    cdiv,
    check,
    composite,
    empty,
    error_site,
    launch,
    lt,
    maximum,
    minimum,
    operator,
    target,
)
from .attention import OF_BOTH, OF_KEYS, OF_QUERIES, _bht, _block_key, _block_scalars, _merge, _pack, default_splits
from .common import contiguous, fill

ALL = 1 << 29  # a window that no sequence reaches the end of
WORKGROUP = 64


# ---- where sequences are ----------------------------------------------------------------------------------------------


def _spans(
    cum_q: Tensor, cum_k: Tensor | None, used: Tensor | None, each_k: Any, step_k: Any, queries: Any, keys: Any,
    table: Tensor | None = None, page: Any = 1, pages: Any = 0,
) -> Tensor:  # fmt: skip
    """[sequences, 4] (int32): first query, end of the queries, first key, end of the keys. cum_q, cum_k [sequences + 1]: where each
    begins; without cum_k, each_k keys at multiples of step_k. used [sequences]: how many of its keys count. All int32. Ends are moved
    into 0 .. queries and 0 .. keys. table [sequences, ..]: an entry that lists keys that count has to be below pages, else an error is
    reported."""
    sequences = cum_q.sizes[0] - 1
    spans = empty([sequences, 4], "i32")
    given = [contiguous(x) for x in (cum_q, cum_k, used) if x is not None]
    scalars, items = [sequences, each_k, step_k, queries, keys], sequences
    if table is not None:
        given.append(table)
        site = error_site("block_table lists page {}, which key and value don't have")
        scalars += [table.strides[0], table.sizes[1], page, pages, site]
        items = sequences * maximum(table.sizes[1], 1)
    kernel = build(_spans_kernel, cum_k is not None, used is not None, table is not None)
    launch(kernel, [spans, *given], scalars, (cdiv(items, WORKGROUP), 1, 1))
    return spans


def _spans_kernel(target: Target, has_k: bool, has_used: bool, paged: bool) -> Kernel:
    k = KernelBuilder(target, f"sequence_spans_{has_k:d}{has_used:d}{paged:d}")
    spans, cum_q = k.buffer("spans", "i32", "w"), k.buffer("cum_q", "i32")
    cum_k = k.buffer("cum_k", "i32") if has_k else None
    used = k.buffer("used", "i32") if has_used else None
    table = k.buffer("table", "i32") if paged else None
    sequences, each_k, step_k, queries, keys = (
        k.scalar(n, "i32") for n in ("sequences", "each_k", "step_k", "queries", "keys")
    )
    i = k.let(ir.cast(k.global_id(WORKGROUP), "i32"))
    with k.If(i < sequences):
        for place, cum, total in ((0, cum_q, queries), (2, cum_k, keys)):
            first, end = (i * step_k, i * step_k + each_k) if cum is None else (cum[i], cum[i + 1])
            first = k.let(ir.clamp(first, ir.const(0, "i32"), total))
            end = k.let(ir.clamp(end, first, total))
            if place == 2 and used is not None:
                end = k.let(ir.clamp(first + used[i], first, end))
            spans[i * 4 + place] = first
            spans[i * 4 + place + 1] = end
    if table is not None and used is not None:
        row, width, page, pages = (k.scalar(n, "i32") for n in ("row", "width", "page", "pages"))
        site = k.scalar("site", "u32")
        z = k.let(i // ir.maximum(width, 1))
        x = k.let(i - z * width)
        with k.If(ir.and_(z < sequences, x < width)), k.If(x * page < used[z]):
            k.let(k.check_index(table[z * row + x], 0, pages, site))
    return k.finish((WORKGROUP, 1, 1))


# ---- kernels ----------------------------------------------------------------------------------------------------------

CLASSES = "int longest_q, int longest_k, int left, int right, float scale, bool window, int head, int head_v, int vec, int rows"
SLOTS = ("longest_q", "longest_k", "left", "right")


def _one_batch(x: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]; the batch's stride is 0 for every sequence."""
    t, h, d = x.sizes
    return x.view((1, h, t, d), (0, x.strides[1], x.strides[0], x.strides[2]))


def _work(q: Tensor, v: Tensor, longest_k: Any, products: int = 1, products_v: int = 1) -> Any:
    """Operations where all sequences are as long as the longest: an upper bound. How long they are only the device knows."""
    _, heads, queries, d = q.sizes
    return lambda: 2 * heads * queries * longest_k * (products * d + products_v * v.sizes[3])


def _in_pages(x: Tensor) -> Tensor:
    """[pages, page, H, D] as [pages, H, page, D]."""
    return x.transpose(1, 2)


@operator(
    "varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cum_q, Tensor? cum_k, Tensor? used, Tensor? table, "
    f"{CLASSES}, int grouped, int page, int splits, bool given, Tensor(a!) out, Tensor(b!) lse) -> ()",
    SLOTS,
    coarse=True,
)
def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor, cum_k: Tensor | None, used: Tensor | None, table: Tensor | None, longest_q: Any,
    longest_k: Any, left: Any, right: Any, scale: Any, window: bool, head: int, head_v: int, vec: int, rows: int, grouped: int, page: int,
    splits: int, given: bool, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """out [Tq, H, Dv] and lse [H, Tq] of q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv]; with table [sequences, ..] (int32, unit stride
    along a row), k and v are pages [pages, page size, Hk, D], of which `page` is the largest power of two that divides the page size.
    Classes as in ops/attention.py. grouped: rows where the query heads that share keys are rows too, or -1. splits: how many
    workgroups the keys of few queries are dealt to; given: by the caller."""
    t, kind = target(), "window" if window else "full"
    sequences, each, units = cum_q.sizes[0] - 1, k.sizes[0], t.compute_units
    few = t.schedule_class == "vector" and rows <= 2  # read in place; more are packed
    if t.schedule_class == "vector":
        split = few and splits > 1 and (given or (256 // min(splits, 256) << rows) < units)
    else:
        split = splits > 1 and (given or units > 4)
    if table is None:
        each = each // maximum(sequences, 1)
        spans = _spans(cum_q, cum_k, used, each, each, q.sizes[0], k.sizes[0])
        q, k, v, out = (_one_batch(x) for x in (q, k, v, out))
        pages: list[Any] = []
    else:
        pages = [k.sizes[1], k.sizes[0]]
        each = table.sizes[1] * k.sizes[1]
        packed = t.schedule_class == "vector" and not few  # the sequences lie one after the other there
        step, total = (each, each * sequences) if packed else (0, each)
        spans = _spans(cum_q, None, used, each, step, q.sizes[0], total, table, *pages)
        q, k, v, out = _one_batch(q), _in_pages(k), _in_pages(v), _one_batch(out)
    tables = [] if table is None else [table]
    (_, heads, queries, d), runs, written, logs = q.sizes, splits, out, lse
    if split:
        if not given and t.schedule_class == "vector":
            runs = cdiv(units, heads * queries)
        elif not given and t.schedule_class == "simt" and grouped >= 0:  # the heads are workgroups there
            runs = maximum(runs // (heads // k.sizes[1]), 1)
        written, logs = empty((runs, heads, queries, v.sizes[3]), "f32"), empty((runs, heads, queries), "f32")
        fill(logs, -math.inf)  # rows of no sequence stay so
    work = _work(q, v, longest_k)
    if few:
        kernel = build(vector.attention_decode, q.dtype, True, None, None, split, True, table is not None)
        sizes = [heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3], left, right, scale]
        scalars = [*_bht(q, k, v, out), *sizes, *(x.strides[0] for x in tables), *pages]
        launch(
            kernel,
            [q, k, v, written, logs, spans, *tables],
            scalars,
            (longest_q, sequences * heads, runs if split else 1),
            work,
        )
    elif t.schedule_class == "vector":
        if table is None:
            keys, packed_k, packed_v = k.sizes[2], _pack(k, "columns"), _pack(v, "rows")
        else:
            rows_of = (contiguous(table), spans, each, sequences)
            keys, packed_k, packed_v = (
                each * sequences,
                _pack_pages(k, "columns", *rows_of),
                _pack_pages(v, "rows", *rows_of),
            )
        sizes = [heads, heads // k.sizes[1], queries, keys, d, v.sizes[3], left, right, scale]
        _vector_tiles(q, packed_k, packed_v, spans, sizes, longest_q, out, lse, work)
    elif t.schedule_class == "block":
        s = block.forward_schedule(q.dtype, max(head, head_v), max(rows, grouped))
        paged = "" if table is None else "rows" if page % s.keys else "tiles"
        s = block.paged_schedule(s) if paged else s
        kernel = build(
            block.forward, s, *_block_key(q, None, True, head, head_v, vec), kind, split, paged, False, grouped >= 0
        )
        strides, sizes = _bht(q, k, v, out), [heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3], scale]
        scalars = [*strides, *(x.strides[0] for x in tables), *sizes, longest_q, left, right, *pages]
        share = heads // k.sizes[1] if grouped >= 0 else 1
        groups = block.groups(s.queries, longest_q * share, sequences * (heads // share))
        if split:
            scalars.append(heads * queries)
            groups = (groups[0], runs, 1)
        launch(kernel, [q, k, v, spans, *tables, written, logs], scalars, groups, work)
    else:
        if table is not None:
            for x in (k, v):
                check(lt(x.sizes[0] * x.strides[0], 1 << 32), "RuntimeError", "pages of more than 2^32 elements")
        schedule = simt.default_schedule(t, head, head_v, rows)
        wide = bool(vec) and all(x.aligned(4) for x in (q, k, v))
        kernel = build(simt.forward, schedule, q.dtype, head, head_v, "", True, wide, split, kind, table is not None)
        scalars = [*_simt_scalars(q, k, v, spans, left, right, longest_q, scale), *_bht(q, k, v, out)]
        scalars += [*([runs] if split else []), *(x.strides[0] for x in tables), *pages]
        groups = simt.forward_groups(schedule, sequences, heads, longest_q, runs if split else 1, minimum)
        launch(kernel, [q, k, v, spans, *tables, written, logs], scalars, groups, work)
    if split and t.schedule_class == "block":
        scalars = [*out.strides[:3], runs, heads * queries, heads, queries, v.sizes[3]]
        launch(build(block.merge, q.dtype, head_v), [written, logs, out, lse], scalars, (heads * queries, 1, 1))
    elif split:
        _merge(written, logs, runs, out, lse)


def _vector_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    sizes: list[Any],
    longest_q: Any,
    out: Tensor,
    lse: Tensor,
    work: Any,
) -> None:
    """out and lse of packed keys ("columns") and values ("rows")."""
    kernel = build(vector.attention_forward, q.dtype, True, None, None, True)
    groups = (cdiv(longest_q, vector.ROWS), spans.sizes[0] * q.sizes[1], 1)
    launch(kernel, [q, k, v, out, lse, spans], [*_bht(q, out), *sizes], groups, work)


def _pack_pages(x: Tensor, kind: str, table: Tensor, spans: Tensor, slot: Any, sequences: Any) -> Tensor:
    """ops.attention._pack of the keys or values x [pages, H, page, D] of sequences of `slot` keys, one after the other."""
    pages, heads, page, d = x.sizes
    keys, nr = slot * sequences, block_schedule().nr
    tasks = cdiv(2 * target().compute_units, heads)
    sb, sh, st = x.strides[:3]
    tail, buffers = [slot, page, pages], [table, spans]
    if kind == "columns":
        p = empty((heads, cdiv(keys, nr), d, nr), "f32")
        kernel, groups = build(vector.pack_columns, x.dtype, True), (tasks, 1, heads)
        launch(kernel, [x, p, *buffers], [sb, sh, 1, st, heads, d, keys, *tail], groups)
    else:
        p = empty((heads, keys, cdiv(d, nr), nr), "f32")
        kernel, groups = build(vector.pack_rows, x.dtype, True), (1, tasks, heads)
        launch(kernel, [x, p, *buffers], [sb, sh, st, 1, heads, keys, d, *tail], groups)
    return p


def _simt_scalars(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, left: Any, right: Any, longest: Any, scale: Any
) -> list[Any]:
    _, heads, queries, d = q.sizes
    sizes = [spans.sizes[0], heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3]]
    return [*sizes, left, right, longest, scale]


@operator(
    f"varlen_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor cum_q, Tensor? cum_k, Tensor out, Tensor lse, {CLASSES}, Tensor(a!) dq, "
    "Tensor(b!) dk, Tensor(c!) dv) -> ()", SLOTS, coarse=True,
)  # fmt: skip
def varlen_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor, cum_k: Tensor | None, out: Tensor, lse: Tensor, longest_q: Any,
    longest_k: Any, left: Any, right: Any, scale: Any, window: bool, head: int, head_v: int, vec: int, rows: int, dq: Tensor, dk: Tensor,
    dv: Tensor,
) -> None:  # fmt: skip
    """Gradients of varlen_forward for g, the gradient of out. Deterministic."""
    each = k.sizes[0] // maximum(cum_q.sizes[0] - 1, 1)
    spans = _spans(cum_q, cum_k, None, each, each, q.sizes[0], k.sizes[0])
    g, q, k, v, out, dq, dk, dv = (_one_batch(x) for x in (g, q, k, v, out, dq, dk, dv))
    t, kind = target(), "window" if window else "full"
    (_, heads, queries, d), sequences, kv_heads, keys = q.sizes, spans.sizes[0], k.sizes[1], k.sizes[2]
    if t.schedule_class == "vector":
        sizes, columns = (
            [heads, heads // kv_heads, queries, keys, d, v.sizes[3], left, right, scale],
            _pack(k, "columns"),
        )
        if rows <= 2:
            # attention_decode adds in another order: with its sums, the probabilities from these scores would not add up to 1.
            out, lse = _one_batch(empty((queries, heads, v.sizes[3]), out.dtype)), empty((heads, queries), "f32")
            _vector_tiles(q, columns, _pack(v, "rows"), spans, sizes, longest_q, out, lse, _work(q, v, longest_k))
        blocks = cdiv(queries, vector.BLOCK)
        delta = empty((heads, 3, blocks * vector.BLOCK), "f32")
        kernel = build(vector.attention_delta, q.dtype)
        launch(kernel, [out, g, lse, delta], [*_bht(out, g), heads, queries, v.sizes[3]], (blocks, heads, 1))
        most = minimum(cdiv(longest_q, 4 * vector.ROWS), cdiv(1 << 26, kv_heads * keys * (d + v.sizes[3])))
        splits = minimum(cdiv(2 * t.compute_units, kv_heads), most)
        sums = [empty((splits * kv_heads * vector.sums(keys, x.sizes[3]),), "f32") for x in (k, v)]
        kernel = build(vector.attention_backward, q.dtype, True, None, True, True, False, None, True)
        launch(
            kernel, [q, g, columns, _pack(v, "columns"), delta, _pack(k, "rows"), dq, *sums, spans],
            [*_bht(q, g, dq), *sizes, sequences], (splits, kv_heads, 1), _work(q, v, longest_k, *OF_BOTH),
        )  # fmt: skip
        kernel = build(vector.attention_backward_sum, q.dtype)
        scalars = [*_bht(dk, dv), splits, kv_heads, keys, d, v.sizes[3], scale]
        launch(kernel, [*sums, dk, dv], scalars, (cdiv(keys, vector.BLOCK), kv_heads, 1))
        return
    delta = empty((heads, queries), "f32")
    buffers = [q, k, v, g, spans, lse, delta]
    if t.schedule_class == "block":
        launch(
            build(block.delta, q.dtype, head_v), [g, out, delta], [*_bht(g, out), heads, queries, v.sizes[3]],
            block.groups(32, queries, heads),
        )  # fmt: skip
        key, window_of = _block_key(q, None, True, head, head_v, vec), [left, right]
        s = block.backward_schedule(q.dtype, max(head, head_v), False)
        scalars = [*_block_scalars(q, k, v, None, scale, g, dq), longest_q, *window_of]
        groups = block.groups(s.queries, longest_q, sequences * heads)
        launch(
            build(block.backward_query, s, *key, False, kind),
            [*buffers, dq],
            scalars,
            groups,
            _work(q, v, longest_k, *OF_QUERIES),
        )
        s = block.backward_schedule(q.dtype, max(head, head_v), True)
        scalars = [*_block_scalars(q, k, v, None, scale, g, dk, dv), longest_k, *window_of]
        groups = block.groups(s.keys, longest_k, sequences * kv_heads)
        launch(
            build(block.backward_key, s, *key, kind),
            [*buffers, dk, dv],
            scalars,
            groups,
            _work(q, v, longest_k, *OF_KEYS),
        )
        return
    launch(
        build(simt.delta, q.dtype), [g, out, delta], [1, heads, queries, v.sizes[3], *_bht(g, out)],
        (minimum(cdiv(heads * queries, 64), simt.MAX_GROUPS), 1, 1),
    )  # fmt: skip
    schedule = simt.backward_schedule(t, max(head, head_v), rows)
    wide = bool(vec) and all(x.aligned(4) for x in (q, k, v, g))
    simt_key = (schedule, q.dtype, head, head_v, "", True, wide)
    scalars = [*_simt_scalars(q, k, v, spans, left, right, longest_q, scale), *_bht(q, k, v, g, dq)]
    groups = simt.forward_groups(schedule, sequences, heads, longest_q, 1, minimum)
    launch(
        build(simt.backward_query, *simt_key, False, kind),
        [*buffers, dq],
        scalars,
        groups,
        _work(q, v, longest_k, *OF_QUERIES),
    )
    scalars = [*_simt_scalars(q, k, v, spans, left, right, longest_k, scale), *_bht(q, k, v, g, dk, dv)]
    groups = simt.backward_key_groups(schedule, sequences, kv_heads, longest_k, minimum)
    launch(
        build(simt.backward_key, *simt_key, kind), [*buffers, dk, dv], scalars, groups, _work(q, v, longest_k, *OF_KEYS)
    )


# ---- the operators ----------------------------------------------------------------------------------------------------


def _check(q: Any, k: Any, v: Any, dropout: float) -> None:
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(
            f"Flash attention takes float32, float16 or bfloat16, all the same: got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if max(q.shape[-1], v.shape[-1]) > 256 or q.shape[-1] != k.shape[-1]:
        raise RuntimeError(
            f"head dimensions {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}: queries' and keys' agree, and 256 is the most"
        )
    if k.shape[-2] != v.shape[-2] or q.shape[-2] % max(k.shape[-2], 1):
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if dropout:
        raise NotImplementedError("spiral's flash attention has no dropout")


def _rows(x: Any) -> Any:
    """[T, H, D], or [B, T, H, D] flattened, with unit stride along D."""
    x = x.flatten(0, 1) if x.dim() == 4 else x
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _reach(causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    """How many keys before and behind its diagonal a query sees."""
    left = ALL if left is None or left < 0 else min(left, ALL)
    return left, 0 if causal else ALL if right is None or right < 0 else min(right, ALL)


def _classes(q: Any, k: Any, v: Any, max_q: int, *more: Any) -> tuple[int, int, int, int]:
    def vectors(x: Any) -> bool:
        return x.shape[-1] % 4 == 0 and all(n <= 1 or s % 4 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1]))

    d, dv = q.shape[-1], v.shape[-1]
    vec = all(vectors(x) for x in (q, k, v, *more)) << (d % 32 == 0 and dv % 32 == 0)
    return -(-d // 32) * 32, -(-dv // 32) * 32, vec, min(max(max_q, 1).bit_length() - 1, 6)


def _ends(query: Any, cum_q: Any, cum_k: Any, used: Any) -> Any:
    """cum_q, or where the queries of [B, T, H, D] begin. A RuntimeError where one of them is not as it should be."""
    if cum_q is None:
        cum_q = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device) * query.shape[1]
    sequences = cum_q.shape[0] - 1
    for name, x, size in (
        ("cum_seq_q", cum_q, sequences + 1),
        ("cum_seq_k", cum_k, sequences + 1),
        ("seqused_k", used, sequences),
    ):
        if x is not None and (x.dtype != torch.int32 or tuple(x.shape) != (size,)):
            raise RuntimeError(f"{name} must have dtype int32 and shape ({size},), got {x.dtype} and {tuple(x.shape)}")
    return cum_q


def _check_pages(key: Any, value: Any, table: Any, sequences: int) -> None:
    if table.dtype != torch.int32:
        raise RuntimeError("block_table must have dtype torch.int32")
    if table.dim() != 2 or table.shape[0] != sequences:
        raise RuntimeError(f"block_table must have {sequences} rows, one a sequence, got shape {tuple(table.shape)}")
    if table.stride(-1) != 1 and table.shape[1] > 1:
        raise RuntimeError("block_table must have contiguous last dimension")
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise RuntimeError(
            "with block_table, key and value are [pages, page size, heads, head dimension], got shapes "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )


def _forward(
    query: Any, key: Any, value: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, dropout: float, causal: bool, scale: Any, left: Any,
    right: Any, used: Any, alibi_slopes: Any, table: Any, num_splits: int | None, out: Any,
) -> Any:  # fmt: skip
    """Writes the result to `out`; gives the logsumexp."""
    _check(query, key, value, dropout)
    if alibi_slopes is not None:
        raise NotImplementedError("spiral's flash attention has no alibi slopes")
    dense = cum_q is None
    if dense:
        max_q, max_k = query.shape[1], key.shape[1]
    cum_q = _ends(query, cum_q, cum_k, used)
    sequences, page, keys = cum_q.shape[0] - 1, 0, max_k
    q, o = (_rows(x) for x in (query, out))
    if table is None:
        k, v = (_rows(x) for x in (key, value))
    else:
        if used is None:
            raise RuntimeError("block_table requires seqused_k")
        _check_pages(key, value, table, sequences)
        k, v = (x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in (key, value))
        cum_k, page, keys = None, key.shape[1] & -key.shape[1], table.shape[1] * key.shape[1]
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    if q.numel() and k.numel() and keys and sequences:
        window = _reach(causal, left, right)
        head, head_v, vec, rows = _classes(q, k, v, max_q)
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        share = q.shape[1] // k.shape[-2]
        grouped = min((max_q * share).bit_length() - 1, 6) if share > 1 and max_q <= 16 else -1
        tiles = sequences * (q.shape[1] if grouped < 0 else k.shape[-2])
        runs = num_splits or default_splits(max_q, keys, tiles)
        written = (
            o
            if o.stride(-1) == 1 and o.data_ptr() == out.data_ptr()
            else torch.zeros(o.shape, dtype=o.dtype, device=o.device)
        )
        torch.ops.spiral.varlen_forward(
            q, k, v, cum_q, cum_k, used, table, max_q, max_k, *window, scale, window[0] < ALL, head, head_v, vec, rows, grouped, page,
            runs, bool(num_splits), written, lse,
        )  # fmt: skip
        if written is not o:
            out.copy_(written.view(out.shape))
    else:
        out.zero_()
        lse.fill_(-math.inf)
    return lse.unflatten(1, query.shape[:2]).transpose(0, 1).contiguous() if dense else lse


@composite("_flash_attention_forward")
def flash_attention_forward(
    query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    return_debug_mask: bool, *, scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: Any = None, alibi_slopes: Any = None, block_table: Any = None, num_splits: int | None = None,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """Attention within sequences: (out, logsumexp, and what dropout would need).

    query [Tq, H, D], key and value [Tk, Hk, D], H a multiple of Hk, with cum_seq_q and cum_seq_k [sequences + 1] (int32): where each begins.
    Without them [B, T, H, D]. A query sees keys from its diagonal minus window_size_left to plus window_size_right (-1: all; causal:
    0), where the last query of a sequence has its diagonal at the last key. seqused_k [sequences]: how many keys count. block_table
    [sequences, most pages of one] (int32): key and value are pages [pages, page size, Hk, D] of any size, read where they are.
    num_splits: how many workgroups the keys of a query are dealt to (1: the result does not depend on other sequences).
    logsumexp: [H, Tq] or [B, H, T]."""
    out = (
        torch.zeros_like(query)
        if value.shape[-1] == query.shape[-1]
        else query.new_zeros(*query.shape[:-1], value.shape[-1])
    )
    lse = _forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right, seqused_k,
        alibi_slopes, block_table, num_splits, out,
    )  # fmt: skip
    state, unused = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    return out, lse, state, unused, query.new_empty(0)


def flash_attention_forward_inplace(
    out: Any, query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    return_debug_mask: bool, *, scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: Any = None, alibi_slopes: Any = None, block_table: Any = None, num_splits: int | None = None,
) -> Any:  # fmt: skip
    """_flash_attention_forward into `out`; gives the logsumexp."""
    return _forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right, seqused_k,
        alibi_slopes, block_table, num_splits, out,
    )  # fmt: skip


if hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"):  # from 2.12 on
    composite("_flash_attention_forward_no_dropout_inplace")(flash_attention_forward_inplace)


@composite("_flash_attention_backward")
def flash_attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, rng_state: Any, unused: Any, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Gradients of query, key and value."""
    _check(query, key, value, dropout_p)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    if not query.numel() or not key.numel():
        return dq, dk, dv
    if cum_seq_q is None:
        max_q, max_k = query.shape[1], key.shape[1]
        logsumexp = logsumexp.transpose(0, 1).flatten(1)
    cum_seq_q = _ends(query, cum_seq_q, cum_seq_k, None)
    window = _reach(is_causal, window_size_left, window_size_right)
    g, q, k, v, o = (_rows(x) for x in (grad_out, query, key, value, out))
    head, head_v, vec, rows = _classes(q, k, v, max_q, g)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    torch.ops.spiral.varlen_backward(
        g, q, k, v, cum_seq_q, cum_seq_k, o, logsumexp.contiguous(), max_q, max_k, *window, scale, window[0] < ALL, head, head_v, vec, rows,
        *(_rows(x) for x in (dq, dk, dv)),
    )  # fmt: skip
    return dq, dk, dv
