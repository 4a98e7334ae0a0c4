"""Scaled dot product attention, forward and backward, by the fused kernels of the target's schedule class.

csrc/aten/attention.cpp decides which calls come here, makes the outputs and hands over what kernels are chosen by:
head_class, head_v_class (multiples of 32), vec (1: sizes and strides divisible by 4, 2: and heads as wide as
their classes, else 0), rows (floor(log2(queries)), at most 6) and
splits (1, or how many workgroups the keys of few queries are dealt to). Sizes are arguments of the kernels: no plan or kernel
depends on how long a sequence is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import autotune
from ..kernels.block import attention as block
from ..kernels.simt import attention as simt
from ..kernels.vector import attention as vector
from ..kernels.vector.gemm import block_schedule
from ..lowering import (
    Tensor,
    build,
    cdiv,
    composite,
    empty,
    eq,
    fill_bytes,
    hint,
    is_one,
    is_zero,
    launch,
    maximum,
    minimum,
    structured,
    target,
)
from ..lowering import where as select
from .contraction import dot_precision
from .random import draw_bits, threshold24

Dropout = tuple[list[Tensor], list[Any]]  # the last buffers and scalars of kernels with dropout; both empty without


def _bht(*tensors: Tensor) -> list[Any]:
    """Batch, head and row strides of each tensor."""
    return [s for x in tensors for s in x.strides[:3]]


@structured("_scaled_dot_product_fused_attention_overrideable", coarse=True)
def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: Any, dropout: Any, head_class: int, head_v_class: int,
    vec: int, rows: int, splits: int, out: Tensor, lse: Tensor, seed: Tensor | None,
) -> None:  # fmt: skip
    """out = dropout(softmax(scale * q k^T + mask)) v, and the logsumexp of the scores (natural logarithm, float32).

    q [B, H, Tq, D], k [B, Hk, Tk, D], v [B, Hk, Tk, Dv], out [B, H, Tq, Dv], lse [B, H, Tq] contiguous; mask [B, H, Tq, Tk]
    (any strides), boolean (true: attend) or added. H is a multiple of Hk. causal: query i sees keys up to i.

    dropout: the probability, or None; with it seed (int64, 0-dim) becomes 64 bits of the generator. Probability (b, h, i, j) is
    kept, times 1 / (1 - dropout), where the 24 high bits of word i % 4 of Philox with the key `seed` and the counter
    (j, i / 4, b * H + h, 0) are below (1 - dropout) * 2^24: whatever the tiles, and the same in backward()."""
    drop = _dropout(dropout, seed)
    if seed is not None:
        splits = 1
        draw_bits(drop[0][0])
    if target().schedule_class == "vector":
        _vector_forward(q, k, v, mask, causal, scale, drop, rows, splits, out, lse)
    elif target().schedule_class == "block":
        _block_forward(q, k, v, mask, causal, scale, drop, head_class, head_v_class, vec, rows, splits, out, lse)
    else:
        _simt_forward(q, k, v, mask, causal, scale, drop, head_class, head_v_class, vec, rows, splits, out, lse)


@structured("_scaled_dot_product_fused_attention_overrideable_backward", coarse=True)
def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: Any,
    dropout: Any, seed: Tensor | None, head_class: int, head_v_class: int, vec: int, rows: int, splits: int,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, ds: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of forward() for g, the gradient of out. dk and dv come together; ds [B, H, Tq, Tk] (float32, contiguous), the
    gradient of the scores, comes with dq. Deterministic."""
    if ds is not None and causal:
        fill_bytes(ds, 0)  # the kernels skip what no query sees
    drop = _dropout(dropout, seed)
    if target().schedule_class == "vector":
        _vector_backward(g, q, k, v, mask, out, lse, causal, scale, drop, rows, dq, dk, dv, ds)
    elif target().schedule_class == "block":
        _block_backward(g, q, k, v, mask, out, lse, causal, scale, drop, head_class, head_v_class, vec, dq, dk, dv, ds)
    else:
        _simt_backward(
            g, q, k, v, mask, out, lse, causal, scale, drop, head_class, head_v_class, vec, rows, dq, dk, dv, ds
        )


def _dropout(p: Any, seed: Tensor | None) -> Dropout:
    """seed as two words; of 2^24 the probability to keep, and what kept ones are multiplied by."""
    if seed is None:
        return [], []
    keep = 1.0 - p
    return [replace(seed, dtype="u32", sizes=(2,), strides=(1,))], [
        threshold24(keep),
        select(eq(keep, 0.0), 0.0, 1.0 / keep),
    ]


def default_splits(queries: int, keys: int, tiles: int) -> int:
    """How many workgroups the keys of each of so many tiles (heads of all items) are dealt to, about 256 in all: as
    csrc/aten/attention.cpp has it."""
    return 256 >> tiles.bit_length() - 1 if queries <= 32 and keys >= 512 and 0 < tiles <= 128 else 1


def _work(q: Tensor, k: Tensor, v: Tensor, causal: bool, products: int = 1, products_v: int = 1) -> Any:
    """Operations of so many products along the heads of q and of v, those of a forward pass by default; of causal ones, half."""
    batch, heads, queries, d = q.sizes
    each = products * d + products_v * v.sizes[3]
    return lambda: batch * heads * queries * k.sizes[2] * each * (1 if causal else 2)


# Products of the backward kernels: scores and their gradient, then dq; or dk and dv.
OF_QUERIES, OF_KEYS, OF_BOTH = (2, 1), (2, 2), (3, 2)


def _tuned(
    flags: str,
    default: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    head: int,
    head_v: int,
    rows: int,
    candidates: Any,
) -> Any:
    """The schedule of a forward kernel: the default, or what was measured to be faster."""
    key = f"{q.dtype} {flags} {'causal' if causal else 'full'} {mask.dtype if mask is not None else '-'} h{head} v{head_v} q{rows}"
    sizes = (*q.sizes[:3], k.sizes[1], k.sizes[2], q.sizes[3], v.sizes[3])
    return autotune.choose("attention", key, default, candidates, [hint(n) for n in sizes])


# ---- vector: OpenCL on CPUs -------------------------------------------------------------------------------------------


def _pack(x: Tensor, kind: str) -> Tensor:
    """x [B, H, T, D] as the "columns" or "rows" that the vector kernels read, in float32."""
    batch, heads, t, d = x.sizes
    nr = block_schedule().nr
    groups = (cdiv(2 * target().compute_units, batch * heads), 1, batch * heads)
    sb, sh, st = x.strides[:3]
    if kind == "columns":
        p = empty((batch * heads, cdiv(t, nr), d, nr), "f32")
        launch(build(vector.pack_columns, x.dtype), [x, p], [sb, sh, 1, st, heads, d, t], groups)
    else:
        p = empty((batch * heads, t, cdiv(d, nr), nr), "f32")
        groups = (1, groups[0], groups[2])
        launch(build(vector.pack_rows, x.dtype), [x, p], [sb, sh, st, 1, heads, t, d], groups)
    return p


def _sizes(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Any) -> list[Any]:
    _, heads, queries, d = q.sizes
    return [heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3], *([0] if causal else []), scale]


def _vector_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: Any, drop: Dropout, rows: int, splits: int,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    batch, heads, queries, _ = q.sizes
    masks, mask_strides = ([mask], list(mask.strides)) if mask is not None else ([], [])
    key = (q.dtype, causal, mask.dtype if mask is not None else None)
    tail = [*mask_strides, *_sizes(q, k, v, causal, scale)]
    units = target().compute_units
    if rows <= 2 and splits > 1 and not causal and (256 // splits << rows) < units:
        # Fewer rows than compute units: each is cut, into runs of at least 256 keys.
        keys, head_v, total = k.sizes[2], v.sizes[3], batch * heads * queries
        span = maximum(cdiv(keys, cdiv(units, total)), 256)
        runs = cdiv(keys, span)
        parts, part_lse = empty((runs, total, head_v), "f32"), empty((runs, total), "f32")
        kernel = build(vector.attention_decode, *key, None, True)
        launch(
            kernel, [q, k, v, parts, part_lse, *masks], [*_bht(q, k, v, out), *tail, span], (queries, batch * heads, runs),
            _work(q, k, v, causal),
        )  # fmt: skip
        _merge(parts, part_lse, runs, out, lse)
    elif rows <= 2 and not drop[0]:  # packing would cost more than it saves
        kernel = build(vector.attention_decode, *key)
        launch(kernel, [q, k, v, out, lse, *masks], [*_bht(q, k, v, out), *tail], (queries, batch * heads, 1))
    else:
        _vector_tiles(q, k, v, mask, causal, scale, drop, out, lse)


def _vector_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: Any,
    drop: Dropout,
    out: Tensor,
    lse: Tensor,
) -> None:
    batch, heads, queries, _ = q.sizes
    masks, mask_strides = ([mask], list(mask.strides)) if mask is not None else ([], [])
    kernel = build(
        vector.attention_forward, q.dtype, causal, mask.dtype if mask is not None else None, dropout=bool(drop[0])
    )
    buffers = [q, _pack(k, "columns"), _pack(v, "rows"), out, lse, *masks, *drop[0]]
    scalars = [*_bht(q, out), *mask_strides, *_sizes(q, k, v, causal, scale), *drop[1]]
    launch(kernel, buffers, scalars, (cdiv(queries, vector.ROWS), batch * heads, 1), _work(q, k, v, causal))


def _vector_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: Any,
    drop: Dropout, rows: int, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, ds: Tensor | None,
) -> None:  # fmt: skip
    batch, heads, queries, _ = q.sizes
    kv_heads, keys = k.sizes[1], k.sizes[2]
    if rows <= 2 and not drop[0]:
        # attention_decode adds in another order: with its sums, the probabilities from these scores would not add up to 1.
        out, lse = empty(out.sizes, out.dtype), empty(lse.sizes, "f32")
        _vector_tiles(q, k, v, mask, causal, scale, drop, out, lse)
    masks, mask_strides = ([mask], list(mask.strides)) if mask is not None else ([], [])
    key = (q.dtype, causal, mask.dtype if mask is not None else None)
    tail = [*mask_strides, *_sizes(q, k, v, causal, scale)]
    blocks = cdiv(queries, vector.BLOCK)
    delta = empty((batch * heads, 3, blocks * vector.BLOCK), "f32")
    kernel = build(vector.attention_delta, q.dtype, None, mask.dtype if mask is not None else None)
    launch(kernel, [out, g, lse, delta], [*_bht(out, g), heads, queries, v.sizes[3]], (blocks, batch * heads, 1))
    # Tasks a key head: few heads for the compute units are cut, into parts of at least four blocks of queries and sums of at
    # most 256 MB.
    each = batch * kv_heads
    most = minimum(cdiv(queries, 4 * vector.ROWS), cdiv(1 << 26, each * keys * (k.sizes[3] + v.sizes[3])))
    splits = minimum(cdiv(2 * target().compute_units, each), most)
    buffers, strides = [q, g, _pack(k, "columns"), _pack(v, "columns"), delta], _bht(q, g)
    if dq is not None:
        buffers += [_pack(k, "rows"), dq]
        strides += _bht(dq)
    sums = []
    if dk is not None:
        sums = [empty((splits * each * vector.sums(keys, x.sizes[3]),), "f32") for x in (k, v)]
    buffers += [*sums, *([ds] if ds is not None else []), *masks, *drop[0]]
    kernel = build(
        vector.attention_backward, *key, dq is not None, dk is not None, ds is not None, dropout=bool(drop[0])
    )
    products = OF_BOTH if dq is not None and dk is not None else OF_QUERIES if dq is not None else OF_KEYS
    launch(kernel, buffers, [*strides, *tail, *drop[1]], (splits, each, 1), _work(q, k, v, causal, *products))
    if dk is not None and dv is not None:
        kernel = build(vector.attention_backward_sum, q.dtype)
        scalars = [*_bht(dk, dv), splits, kv_heads, keys, k.sizes[3], v.sizes[3], scale]
        launch(kernel, [*sums, dk, dv], scalars, (cdiv(keys, vector.BLOCK), each, 1))


def _merge(parts: Tensor, part_lse: Tensor, runs: Any, out: Tensor, lse: Tensor) -> None:
    """out and lse from those of `runs` runs of the keys, by OpenCL or WGSL."""
    batch, heads, queries, head_v = out.sizes
    launch(
        build(simt.merge, out.dtype), [parts, part_lse, out, lse], [runs, batch, heads, queries, head_v, *_bht(out)],
        simt.merge_groups(batch, heads, queries, head_v, minimum),
    )  # fmt: skip


# ---- block: Triton ----------------------------------------------------------------------------------------------------


def _block_key(q: Tensor, mask: Tensor | None, causal: bool, head: int, head_v: int, vec: int) -> tuple:
    kind = ""
    if mask is not None:
        layout = "" if not is_one(mask.strides[3]) else "_0n" if is_zero(mask.strides[2]) else "_n"
        kind = mask.dtype + layout
    return q.dtype, head, head_v, vec == 2, kind, causal, dot_precision(q.dtype)


def _block_scalars(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Any, *tensors: Tensor) -> list[Any]:
    _, heads, queries, d = q.sizes
    strides = [*_bht(q, k, v, *tensors), *(mask.strides if mask is not None else [])]
    return [*strides, heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3], scale]


def _block_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: Any, drop: Dropout, head: int, head_v: int, vec: int,
    rows: int, splits: int, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    batch, heads, queries, _ = q.sizes
    plain = mask is None and not drop[0] and (splits == 1 or causal)
    s = block.forward_schedule(q.dtype, max(head, head_v), rows, mask is not None, plain)
    if splits > 1 and not causal:
        keys, head_v_size, total = k.sizes[2], v.sizes[3], batch * heads * queries
        span = cdiv(cdiv(keys, splits), s.keys) * s.keys
        runs = cdiv(keys, span)
        parts, part_lse = empty((runs, total, head_v_size), "f32"), empty((runs, total), "f32")
        kernel = build(block.forward, s, *_block_key(q, mask, causal, head, head_v, vec), "", True)
        scalars = [*_block_scalars(q, k, v, mask, scale, out), span, total]
        groups = (block.groups(s.queries, queries, batch * heads)[0], runs, 1)
        masks = [mask] if mask is not None else []
        launch(kernel, [q, k, v, *masks, parts, part_lse], scalars, groups, _work(q, k, v, causal))
        scalars = [*out.strides[:3], runs, total, heads, queries, head_v_size]
        kernel = build(block.merge, q.dtype, head_v)
        launch(kernel, [parts, part_lse, out, lse], scalars, (total, 1, 1))
        return
    flags = "rows" + ("-exact" if vec == 2 else "")
    if not drop[0]:
        s = _tuned(
            flags, s, q, k, v, mask, causal, head, head_v, rows, lambda: block.candidates(q.dtype, max(head, head_v), rows),
        )  # fmt: skip
    kernel = build(block.forward, s, *_block_key(q, mask, causal, head, head_v, vec), dropout=bool(drop[0]))
    masks = [mask] if mask is not None else []
    groups = block.groups(s.queries, queries, batch * heads)
    scalars = [*_block_scalars(q, k, v, mask, scale, out), *drop[1]]
    launch(kernel, [q, k, v, *masks, out, lse, *drop[0]], scalars, groups, _work(q, k, v, causal))


def _block_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: Any,
    drop: Dropout, head: int, head_v: int, vec: int, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, ds: Tensor | None,
) -> None:  # fmt: skip
    batch, heads, queries, _ = q.sizes
    delta = empty((batch, heads, queries), "f32")
    launch(
        build(block.delta, q.dtype, head_v), [g, out, delta], [*_bht(g, out), heads, queries, v.sizes[3]],
        block.groups(32, queries, batch * heads),
    )  # fmt: skip
    key = _block_key(q, mask, causal, head, head_v, vec)
    buffers = [q, k, v, g, *([mask] if mask is not None else []), lse, delta]
    if dq is not None:
        s = block.backward_schedule(q.dtype, max(head, head_v), False)
        kernel = build(block.backward_query, s, *key, ds is not None, dropout=bool(drop[0]))
        groups = block.groups(s.queries, queries, batch * heads)
        launch(
            kernel,
            [*buffers, dq, *([ds] if ds is not None else []), *drop[0]],
            [*_block_scalars(q, k, v, mask, scale, g, dq), *drop[1]],
            groups,
            _work(q, k, v, causal, *OF_QUERIES),
        )
    if dk is not None and dv is not None:
        s = block.backward_schedule(q.dtype, max(head, head_v), True)
        kernel = build(block.backward_key, s, *key, dropout=bool(drop[0]))
        groups = block.groups(s.keys, k.sizes[2], batch * k.sizes[1])
        scalars = [*_block_scalars(q, k, v, mask, scale, g, dk, dv), *drop[1]]
        launch(kernel, [*buffers, dk, dv, *drop[0]], scalars, groups, _work(q, k, v, causal, *OF_KEYS))


# ---- simt: GPUs -------------------------------------------------------------------------------------------------------


def _common(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: Any) -> list[Any]:
    batch, heads, queries, d = q.sizes
    mask_strides = list(mask.strides) if mask is not None else []
    sizes = [batch, heads, heads // k.sizes[1], queries, k.sizes[2], d, v.sizes[3]]
    return [*sizes, *mask_strides, *([0] if causal else []), scale]


def _simt_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: Any, drop: Dropout, head_class: int, head_v_class: int,
    vec: int, rows: int, splits: int, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    t = target()
    batch, heads, queries, _ = q.sizes
    keys, head_v = k.sizes[2], v.sizes[3]
    s = simt.default_schedule(t, head_class, head_v_class, rows)
    vec = bool(vec) and all(x.aligned(4) for x in (q, k, v))
    if splits == 1 and not drop[0]:
        s = _tuned(
            "vec" if vec else "-",
            s,
            q,
            k,
            v,
            mask,
            causal,
            head_class,
            head_v_class,
            rows,
            lambda: [c for c in simt.SCHEDULES if c.fits(t, head_class, head_v_class)],
        )
    masks = [mask] if mask is not None else []
    key = (s, q.dtype, head_class, head_v_class, mask.dtype if mask is not None else "", causal, vec)
    scalars = [*_common(q, k, v, mask, causal, scale), *_bht(q, k, v, out)]
    if splits == 1 or t.compute_units <= 4:
        kernel = build(simt.forward, *key, dropout=bool(drop[0]))
        groups = simt.forward_groups(s, batch, heads, queries, 1, minimum)
        launch(kernel, [q, k, v, *masks, out, lse, *drop[0]], [*scalars, *drop[1]], groups, _work(q, k, v, causal))
        return
    span = maximum(cdiv(cdiv(keys, splits), s.block_k), 4) * s.block_k
    parts = cdiv(keys, span)
    partial, partial_lse = (
        empty((parts, batch, heads, queries, head_v), "f32"),
        empty((parts, batch, heads, queries), "f32"),
    )
    groups = simt.forward_groups(s, batch, heads, queries, parts, minimum)
    buffers = [q, k, v, *masks, partial, partial_lse]
    launch(build(simt.forward, *key, True), buffers, [*scalars, parts, span], groups, _work(q, k, v, causal))
    _merge(partial, partial_lse, parts, out, lse)


def _simt_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: Any,
    drop: Dropout, head_class: int, head_v_class: int, vec: int, rows: int,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, ds: Tensor | None,
) -> None:  # fmt: skip
    t = target()
    batch, heads, queries, _ = q.sizes
    kv_heads, keys, head_v = k.sizes[1], k.sizes[2], v.sizes[3]
    s = simt.backward_schedule(t, max(head_class, head_v_class), rows)
    vec = bool(vec) and all(x.aligned(4) for x in (q, k, v, g))
    delta = empty((batch, heads, queries), "f32")
    launch(
        build(simt.delta, q.dtype), [g, out, delta], [batch, heads, queries, head_v, *_bht(g, out)],
        (minimum(cdiv(batch * heads * queries, 64), simt.MAX_GROUPS), 1, 1),
    )  # fmt: skip
    key = (s, q.dtype, head_class, head_v_class, mask.dtype if mask is not None else "", causal, vec)
    buffers = [q, k, v, g, *([mask] if mask is not None else []), lse, delta]
    scalars = [*_common(q, k, v, mask, causal, scale), *_bht(q, k, v, g)]
    if dq is not None:
        kernel = build(simt.backward_query, *key, ds is not None, dropout=bool(drop[0]))
        groups = simt.forward_groups(s, batch, heads, queries, 1, minimum)
        results = [dq, *([ds] if ds is not None else []), *drop[0]]
        work = _work(q, k, v, causal, *OF_QUERIES)
        launch(kernel, [*buffers, *results], [*scalars, *_bht(dq), *drop[1]], groups, work)
    if dk is not None and dv is not None:
        groups = simt.backward_key_groups(s, batch, kv_heads, keys, minimum)
        work = _work(q, k, v, causal, *OF_KEYS)
        kernel = build(simt.backward_key, *key, dropout=bool(drop[0]))
        launch(kernel, [*buffers, dk, dv, *drop[0]], [*scalars, *_bht(dk, dv), *drop[1]], groups, work)


# ---- what torch.nn's inference fast path calls --------------------------------------------------------------------------


@composite("_native_multi_head_attention")
def native_multi_head_attention(
    query: Any, key: Any, value: Any, embed_dim: int, num_head: int, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, proj_bias: Any,
    mask: Any = None, need_weights: bool = True, average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Projections, attention and output projection of [B, T, D] tensors; (result, weights or None). mask: true where nothing is
    seen; mask_type 0: [T, T], 1: [B, T] padding, 2: [B, H, T, T]."""
    from torch.nn.functional import linear, scaled_dot_product_attention

    if query.dim() != 3 or embed_dim % num_head:
        raise RuntimeError(
            f"expected a 3-D query and heads that divide {embed_dim}, got {query.dim()}-D and {num_head} heads"
        )
    if query is key and key is value:
        parts = linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
        parts = tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in parts)
    keep = None
    if mask is not None:
        keep = mask.to(torch.bool).logical_not()
        keep = keep[:, None, None, :] if mask_type == 1 else keep
    scores = None
    if need_weights:
        scores = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(-2, -1)
        if keep is not None:
            scores = scores.masked_fill(keep.logical_not(), float("-inf"))
        scores = scores.softmax(-1)
        out = scores @ v
        if average_attn_weights:
            scores = scores.mean(1)
    else:
        out = scaled_dot_product_attention(q, k, v, keep)
    return linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), scores


# ---- under vmap ------------------------------------------------------------------------------------------------------


def _batched(t: torch.Tensor, dim: int | None, n: int) -> torch.Tensor:
    """t with the mapped dimension, of size n, in front."""
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold(n: int, tensors: Sequence[torch.Tensor], dims: Sequence[int | None]) -> list[torch.Tensor]:
    return [_batched(t, d, n).flatten(0, 1) for t, d in zip(tensors, dims, strict=True)]


def _fold_mask(mask: torch.Tensor | None, dim: int | None, n: int, batch: int) -> torch.Tensor | None:
    """The mask of n * batch problems: [n * batch, heads or 1, queries or 1, keys or 1]."""
    if mask is None:
        return None
    mask = _batched(mask, dim, n)
    mask = mask.view(n, *[1] * (5 - mask.ndim), *mask.shape[1:])
    return mask.expand(n, batch, *mask.shape[2:]).reshape(n * batch, *mask.shape[2:])


def _one_by_one(n: int, op: Any, dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Calls the operator for each sample; of each of its results, those of all samples."""
    batched = {i: d for i, d in enumerate(dims) if isinstance(d, int)}

    def sample(j: int) -> list[Any]:
        return [x.select(batched[i], j) if i in batched else x for i, x in enumerate(args)]

    return list(zip(*(op(*sample(j), **kwargs) for j in range(n)), strict=True))


def _same_numbers(info: Any, dims: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Dropout with one mask for all samples. It follows from the place in the batch, so each sample is a batch of its own."""
    if torch._guards.detect_fake_mode(args[:3]) is not None:
        raise NotImplementedError(
            'a graph of vmap(randomness="same") with attention\'s dropout: the generator is not in it'
        )
    generator = torch.ops.spiral._default_generator(args[0].device.index)
    op, state = torch.ops.aten._scaled_dot_product_fused_attention_overrideable, generator.get_state()

    def again(*args: Any, **kwargs: Any) -> Any:
        generator.set_state(state)
        return op(*args, **kwargs)

    out, lse, *others = _one_by_one(info.batch_size, again, dims, args, kwargs)
    return (torch.stack(out), torch.stack(lse), *(x[0] for x in others)), (0, 0, *[None] * len(others))


def _forward_batched(info: Any, dims: Any, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **scale: Any) -> Any:
    n = info.batch_size
    if rest and rest[0] > 0 and info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' randomness flags "
            "on vmap or perform the randomness operation out of vmap"
        )
    if rest and rest[0] > 0 and info.randomness == "same":
        return _same_numbers(info, dims, (q, k, v, mask, *rest), scale)
    folded = _fold(n, (q, k, v), dims[:3])
    batch = folded[0].shape[0] // n
    bias = _fold_mask(mask, dims[3] if len(dims) > 3 else None, n, batch)
    op = torch.ops.aten._scaled_dot_product_fused_attention_overrideable
    out, lse, *others = op(*folded, bias, *rest, **scale)
    return (out.unflatten(0, (n, batch)), lse.unflatten(0, (n, batch)), *others), (0, 0, *[None] * len(others))


def _backward_batched(
    info: Any, dims: Any, grad: Any, q: Any, k: Any, v: Any, mask: Any, wanted: Any, out: Any, lse: Any, *rest: Any, **scale: Any
) -> Any:  # fmt: skip
    n, op = info.batch_size, torch.ops.aten._scaled_dot_product_fused_attention_overrideable_backward
    # The mask of dropout is that of the forward call: of one for all samples, of one for each, or of the folded one.
    if rest[4] > 0 and (dims[7] is None or info.randomness == "same"):
        found = _one_by_one(n, op, dims, (grad, q, k, v, mask, wanted, out, lse, *rest), scale)
        return tuple(None if x[0] is None else torch.stack(x) for x in found), tuple(
            None if x[0] is None else 0 for x in found
        )
    folded = _fold(n, (grad, q, k, v, out, lse), (*dims[:4], *dims[6:8]))
    batch = folded[0].shape[0] // n
    bias = _fold_mask(mask, dims[4], n, batch)
    *grads, grad_mask = op(*folded[:4], bias, wanted, *folded[4:], *rest, **scale)
    results = [g if g is None else g.unflatten(0, (n, batch)) for g in grads]
    if grad_mask is not None and mask is not None:
        shape = mask.shape if dims[4] is None else mask.movedim(dims[4], 0).shape[1:]
        grad_mask = grad_mask.unflatten(0, (n, batch)).sum_to_size(n, *[1] * (4 - len(shape)), *shape).view(n, *shape)
    return (*results, grad_mask), tuple(None if g is None else 0 for g in (*results, grad_mask))


torch.library.register_vmap("aten::_scaled_dot_product_fused_attention_overrideable", _forward_batched)
torch.library.register_vmap("aten::_scaled_dot_product_fused_attention_overrideable_backward", _backward_batched)
