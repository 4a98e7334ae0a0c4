"""Fused attention inside a graph: what csrc/aten/attention.cpp does around the lowering, for sizes known when the graph is compiled."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any

from .. import lowering as low
from ..ops.attention import default_splits

NAME = "_scaled_dot_product_fused_attention_overrideable"
MAX_HEAD = 256
Shape = tuple[Sequence[int], Sequence[int]]  # sizes, strides


def bias_of(backward: bool, node: ast.Call) -> ast.AST | None:
    """The argument that is added to the scores."""
    at = 4 if backward else 3
    found = (
        node.args[at] if at < len(node.args) else next((k.value for k in node.keywords if k.arg == "attn_bias"), None)
    )
    return None if isinstance(found, ast.Constant) else found


def reads(old: Shape, new: Shape, offset: int) -> bool:
    """Whether attention may read an operand with the second strides at an offset instead of the first: no more slowly."""
    return new[1][3] == 1 and (not _vectors(*old) or (_vectors(*new) and offset % 4 == 0))


def layouts(backward: bool, operands: Sequence[Shape]) -> list[list[int]]:
    """Strides of the results for the operator's operands (g,) q, k, v: as those of the query, and of each gradient's own tensor."""
    q, v = operands[-3], operands[-1]
    return [_dense(*s) for s in (operands[1:] if backward else [(_output(q, v[0][3]), q[1])])]


def plan(
    backward: bool, node: ast.Call, shapes: Sequence[Shape | None], dtypes: Sequence[str], bias: Shape | None = None
) -> dict[str, Any] | None:
    """Keyword arguments of forward() or backward() below for a call of the operator, or None where C++ must look at it. shapes and
    dtypes: of the operator's first arguments, (g,) q, k, v."""
    if any(s is None for s in shapes) or len(set(dtypes)) != 1 or dtypes[0] not in ("f32", "f16", "bf16"):
        return None
    known = [s for s in shapes if s is not None]
    q, k, v = known[-3:]
    if any(len(sizes) != 4 or strides[3] != 1 or 0 in sizes for sizes, strides in known):
        return None
    (_, heads, queries, d), (_, kv_heads, keys, head_v) = q[0], (*k[0][:3], v[0][3])
    if max(d, head_v) > MAX_HEAD or heads % kv_heads:
        return None

    def argument(index: int, name: str, default: Any) -> Any:
        found = (
            node.args[index]
            if index < len(node.args)
            else next((k.value for k in node.keywords if k.arg == name), None)
        )
        return default if found is None else ast.literal_eval(found)

    try:
        at = (12, 13) if backward else (4, 5)
        dropout, causal = (
            argument(i, n, x) for i, n, x in zip(at, ("dropout_p", "is_causal"), (0.0, False), strict=True)
        )
        wanted = argument(5, "grad_input_mask", None) if backward else [False] * 4
        scale = argument(16 if backward else 99, "scale", None)
    except ValueError:
        return None
    if not backward and scale is not None and scale < 0:
        return None
    # One query of each head: the query heads that share keys become queries of one head.
    fold = queries == 1 and kv_heads != heads and not dropout
    if wanted[3] or (bias_of(backward, node) is not None and bias is None) or (fold and (backward or causal)):
        return None
    added = None
    if bias is not None:
        sizes, strides = [1] * (4 - len(bias[0])) + list(bias[0]), [0] * (4 - len(bias[0])) + list(bias[1])
        added = [0 if n == 1 else step for n, step in zip(sizes, strides, strict=True)]
    if fold:
        heads, queries = kv_heads, heads // kv_heads
    tiles = q[0][0] * heads
    rows = min(queries.bit_length() - 1, 6)
    while rows > 3 and -(-queries // (2 << rows)) * tiles < 64:
        rows -= 1
    return {
        "causal": causal, "bias": added, "scale": scale if scale is not None else 1.0 / math.sqrt(d), "dropout": float(dropout),
        "classes": (
            (d + 31) // 32 * 32, (head_v + 31) // 32 * 32,
            int(all(_vectors(*s) for s in known)) << int(d % 32 == 0 and head_v % 32 == 0),
            rows, default_splits(queries, keys, tiles),
        ),
        "strides": layouts(backward, known),
        **({"wanted": wanted} if backward else {"head_v": head_v, "fold": fold}),
    }  # fmt: skip


def _output(q: Shape, head_v: int) -> list[int]:
    return [*q[0][:3], head_v]


def _vectors(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    return sizes[3] % 4 == 0 and all(n <= 1 or s % 4 == 0 for n, s in zip(sizes[:3], strides[:3], strict=True))


def _dense(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides in the order of `strides`, without holes."""
    out, step = [0] * len(sizes), 1
    for d in sorted(range(len(sizes)), key=lambda d: (strides[d], -d)):
        out[d] = step
        step *= sizes[d]
    return out


def forward(
    *args: Any, causal: bool, bias: Any, scale: float, dropout: float, classes: Any, strides: Any, head_v: int, fold: bool,
    attn_bias: Any = None,
) -> Any:  # fmt: skip
    """The operator's results on handles. There is no random state without dropout, but its callers want tensors."""
    q, k, v = args[:3]
    mask = _mask(args[3] if len(args) > 3 else attn_bias, q, k, bias)
    out = low.empty((*q.sizes[:3], head_v), q.dtype, strides[0])
    lse = low.empty(q.sizes[:3], "f32")
    taken = [q, mask, out, lse]
    if fold:
        taken = [None if x is None else _folded(x, k.sizes[1]) for x in taken]
    query, mask, result, logsumexp = taken
    seed, p = low.empty((), "i64"), low.recorder().lift(dropout) if dropout else None
    low.lowerings[NAME](
        query, k, v, mask, causal, low.recorder().lift(float(scale)), p, *classes, result, logsumexp, seed if dropout else None
    )  # fmt: skip
    return out, lse, None, None, q.sizes[2], k.sizes[2], seed, low.empty((), "i64"), None


def _folded(x: Any, heads: int) -> Any:
    """x [B, H, 1, …] as [B, heads, H / heads, …]."""
    many = x.sizes[1] // heads
    return x.view(
        (x.sizes[0], heads, many, *x.sizes[3:]), (x.strides[0], x.strides[1] * many, x.strides[1], *x.strides[3:])
    )


def _mask(bias: Any, q: Any, k: Any, strides: Sequence[int] | None) -> Any:
    return None if strides is None else bias.view((*q.sizes[:3], k.sizes[2]), strides)


def backward(
    *args: Any,
    causal: bool,
    bias: Any,
    scale: float,
    dropout: float,
    classes: Any,
    strides: Any,
    wanted: Sequence[bool],
) -> Any:
    g, q, k, v = args[:4]
    out, lse = args[6:8]
    dq = low.empty(q.sizes, q.dtype, strides[0]) if wanted[0] else None
    dk, dv = (
        low.empty(x.sizes, x.dtype, s) if wanted[1] or wanted[2] else None
        for x, s in ((k, strides[1]), (v, strides[2]))
    )
    low.lowerings[f"{NAME}_backward"](
        g,
        q,
        k,
        v,
        _mask(args[4], q, k, bias),
        out,
        lse,
        causal,
        low.recorder().lift(float(scale)),
        low.recorder().lift(dropout) if dropout else None,
        args[14] if dropout else None,
        *classes,
        dq,
        dk,
        dv,
        None,
    )
    return dq, dk, dv, None
