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
from ..lowering import Tensor, build, cdiv, composite, empty, launch, minimum, operator, target
from .attention import OF_BOTH, OF_KEYS, OF_QUERIES, _bht, _block_key, _block_scalars, _pack
from .common import contiguous

ALL = 1 << 29  # a window that no sequence reaches the end of
WORKGROUP = 64


# ---- where sequences are ----------------------------------------------------------------------------------------------


@operator(
    "sequence_spans(Tensor cum_q, Tensor? cum_k, Tensor? used, int each_k, int queries, int keys) -> Tensor",
    slots=("each_k", "queries", "keys"),
)
def sequence_spans(
    cum_q: Tensor, cum_k: Tensor | None, used: Tensor | None, each_k: Any, queries: Any, keys: Any
) -> Tensor:
    """[sequences, 4] (int32): first query, end of the queries, first key, end of the keys. cum_q, cum_k [sequences + 1]: where each
    begins; without cum_k, at multiples of each_k. used [sequences]: how many of its keys count. All int32. Ends are moved into
    0 .. queries and 0 .. keys."""
    sequences = cum_q.sizes[0] - 1
    spans = empty([sequences, 4], "i32")
    given = [contiguous(x) for x in (cum_q, cum_k, used) if x is not None]
    kernel = build(_spans, cum_k is not None, used is not None)
    launch(kernel, [spans, *given], [sequences, each_k, queries, keys], (cdiv(sequences, WORKGROUP), 1, 1))
    return spans


def _spans(target: Target, has_k: bool, has_used: bool) -> Kernel:
    k = KernelBuilder(target, f"sequence_spans_{has_k:d}{has_used:d}")
    spans, cum_q = k.buffer("spans", "i32", "w"), k.buffer("cum_q", "i32")
    cum_k = k.buffer("cum_k", "i32") if has_k else None
    used = k.buffer("used", "i32") if has_used else None
    sequences, each_k, queries, keys = (k.scalar(n, "i32") for n in ("sequences", "each_k", "queries", "keys"))
    i = k.let(ir.cast(k.global_id(WORKGROUP), "i32"))
    with k.If(i < sequences):
        for place, cum, total in ((0, cum_q, queries), (2, cum_k, keys)):
            first, end = (i * each_k, (i + 1) * each_k) if cum is None else (cum[i], cum[i + 1])
            first = k.let(ir.clamp(first, ir.const(0, "i32"), total))
            end = k.let(ir.clamp(end, first, total))
            if place == 2 and used is not None:
                end = k.let(ir.clamp(first + used[i], first, end))
            spans[i * 4 + place] = first
            spans[i * 4 + place + 1] = end
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


@operator(
    f"varlen_forward(Tensor q, Tensor k, Tensor v, Tensor spans, {CLASSES}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    SLOTS,
    coarse=True,
)
def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, longest_q: Any, longest_k: Any, left: Any, right: Any, scale: Any, window: bool,
    head: int, head_v: int, vec: int, rows: int, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """out [Tq, H, Dv] and lse [H, Tq] of q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv]; classes as in ops/attention.py."""
    q, k, v, out = (_one_batch(x) for x in (q, k, v, out))
    t, kind = target(), "window" if window else "full"
    (_, heads, queries, d), sequences = q.sizes, spans.sizes[0]
    if t.schedule_class == "vector":
        kernel = build(vector.attention_forward, q.dtype, True, None, None, True)
        tail = [heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3], left, right, scale]
        buffers = [q, _pack(k, "columns"), _pack(v, "rows"), out, lse, spans]
        groups = (cdiv(longest_q, vector.ROWS), sequences * heads, 1)
        launch(kernel, buffers, [*_bht(q, out), *tail], groups, _work(q, v, longest_k))
    elif t.schedule_class == "block":
        s = block.forward_schedule(q.dtype, max(head, head_v), rows)
        kernel = build(block.forward, s, *_block_key(q, None, True, head, head_v, vec), kind)
        scalars = [*_block_scalars(q, k, v, None, scale, out), longest_q, left, right]
        groups = block.groups(s.queries, longest_q, sequences * heads)
        launch(kernel, [q, k, v, spans, out, lse], scalars, groups, _work(q, v, longest_k))
    else:
        schedule = simt.default_schedule(t, head_v, rows)
        wide = bool(vec) and all(x.aligned(4) for x in (q, k, v))
        kernel = build(simt.forward, schedule, q.dtype, head, head_v, "", True, wide, False, kind)
        scalars = [*_simt_scalars(q, k, v, spans, left, right, longest_q, scale), *_bht(q, k, v, out)]
        groups = simt.forward_groups(schedule, sequences, heads, longest_q, 1, minimum)
        launch(kernel, [q, k, v, spans, out, lse], scalars, groups, _work(q, v, longest_k))


def _simt_scalars(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, left: Any, right: Any, longest: Any, scale: Any
) -> list[Any]:
    _, heads, queries, d = q.sizes
    sizes = [spans.sizes[0], heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3]]
    return [*sizes, left, right, longest, scale]


@operator(
    f"varlen_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor spans, Tensor out, Tensor lse, {CLASSES}, Tensor(a!) dq, "
    "Tensor(b!) dk, Tensor(c!) dv) -> ()", SLOTS, coarse=True,
)  # fmt: skip
def varlen_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor, lse: Tensor, longest_q: Any, longest_k: Any, left: Any,
    right: Any, scale: Any, window: bool, head: int, head_v: int, vec: int, rows: int, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Gradients of varlen_forward for g, the gradient of out. Deterministic."""
    g, q, k, v, out, dq, dk, dv = (_one_batch(x) for x in (g, q, k, v, out, dq, dk, dv))
    t, kind = target(), "window" if window else "full"
    (_, heads, queries, d), sequences, kv_heads, keys = q.sizes, spans.sizes[0], k.sizes[1], k.sizes[2]
    if t.schedule_class == "vector":
        blocks = cdiv(queries, vector.BLOCK)
        delta = empty((heads, 3, blocks * vector.BLOCK), "f32")
        kernel = build(vector.attention_delta, q.dtype)
        launch(kernel, [out, g, lse, delta], [*_bht(out, g), heads, queries, v.sizes[3]], (blocks, heads, 1))
        most = minimum(cdiv(longest_q, 4 * vector.ROWS), cdiv(1 << 26, kv_heads * keys * (d + v.sizes[3])))
        splits = minimum(cdiv(2 * t.compute_units, kv_heads), most)
        sums = [empty((splits * kv_heads * vector.sums(keys, x.sizes[3]),), "f32") for x in (k, v)]
        kernel = build(vector.attention_backward, q.dtype, True, None, True, True, False, None, True)
        tail = [heads, heads // kv_heads, queries, keys, d, v.sizes[3], left, right, scale, sequences]
        launch(
            kernel, [q, g, _pack(k, "columns"), _pack(v, "columns"), delta, _pack(k, "rows"), dq, *sums, spans],
            [*_bht(q, g, dq), *tail], (splits, kv_heads, 1), _work(q, v, longest_k, *OF_BOTH),
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
    schedule = simt.default_schedule(t, max(head, head_v), rows)
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
        return x.shape[-1] % 4 == 0 and all(n <= 1 or s % 4 == 0 for n, s in zip(x.shape[:2], x.stride()[:2]))

    d, dv = q.shape[-1], v.shape[-1]
    vec = all(vectors(x) for x in (q, k, v, *more)) << (d % 32 == 0 and dv % 32 == 0)
    return -(-d // 32) * 32, -(-dv // 32) * 32, vec, min(max(max_q, 1).bit_length() - 1, 6)


def _spans_of(query: Any, key: Any, cum_q: Any, cum_k: Any, used: Any) -> Any:
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
    queries, keys = (math.prod(x.shape[:-2]) for x in (query, key))
    return torch.ops.spiral.sequence_spans(cum_q, cum_k, used, keys // max(sequences, 1), queries, keys)


def _forward(
    query: Any, key: Any, value: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, dropout: float, causal: bool, scale: Any, left: Any,
    right: Any, used: Any, alibi_slopes: Any, block_table: Any, out: Any,
) -> Any:  # fmt: skip
    """Writes the result to `out`; gives the logsumexp."""
    _check(query, key, value, dropout)
    if alibi_slopes is not None:
        raise NotImplementedError("spiral's flash attention has no alibi slopes")
    if block_table is not None:
        if used is None:
            raise RuntimeError("block_table requires seqused_k")
        pages = block_table.clamp(0, key.shape[0] - 1)  # what lies behind a sequence's last page is not looked at
        key, value = (x[pages].flatten(0, 2) for x in (key, value))
        cum_k, max_k = None, key.shape[0] // max(block_table.shape[0], 1)
    if cum_q is None:
        max_q, max_k = query.shape[1], key.shape[1]
    spans = _spans_of(query, key, cum_q, cum_k, used)
    q, k, v, o = (_rows(x) for x in (query, key, value, out))
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    if q.numel() and k.numel():
        window = _reach(causal, left, right)
        head, head_v, vec, rows = _classes(q, k, v, max_q)
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        written = (
            o
            if o.stride(-1) == 1 and o.data_ptr() == out.data_ptr()
            else torch.zeros(o.shape, dtype=o.dtype, device=o.device)
        )
        torch.ops.spiral.varlen_forward(
            q, k, v, spans, max_q, max_k, *window, scale, window[0] < ALL, head, head_v, vec, rows, written, lse
        )
        if written is not o:
            out.copy_(written.view(out.shape))
    else:
        out.zero_()
        lse.fill_(-math.inf)
    return lse if cum_q is not None else lse.unflatten(1, query.shape[:2]).transpose(0, 1).contiguous()


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
    [sequences, pages]: key and value are pages [pages, page size, Hk, D], which are gathered first. logsumexp: [H, Tq] or [B, H, T]."""
    out = (
        torch.zeros_like(query)
        if value.shape[-1] == query.shape[-1]
        else query.new_zeros(*query.shape[:-1], value.shape[-1])
    )
    lse = _forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right, seqused_k,
        alibi_slopes, block_table, out,
    )  # fmt: skip
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return out, lse, state, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def flash_attention_forward_inplace(
    out: Any, query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    return_debug_mask: bool, *, scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: Any = None, alibi_slopes: Any = None, block_table: Any = None, num_splits: int | None = None,
) -> Any:  # fmt: skip
    """_flash_attention_forward into `out`; gives the logsumexp."""
    return _forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right, seqused_k,
        alibi_slopes, block_table, out,
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
    spans = _spans_of(query, key, cum_seq_q, cum_seq_k, None)
    window = _reach(is_causal, window_size_left, window_size_right)
    g, q, k, v, o = (_rows(x) for x in (grad_out, query, key, value, out))
    head, head_v, vec, rows = _classes(q, k, v, max_q, g)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    torch.ops.spiral.varlen_backward(
        g, q, k, v, spans, o, logsumexp.contiguous(), max_q, max_k, *window, scale, window[0] < ALL, head, head_v, vec, rows,
        *(_rows(x) for x in (dq, dk, dv)),
    )  # fmt: skip
    return dq, dk, dv
