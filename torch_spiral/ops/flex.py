"""torch.nn.attention.flex_attention: upstream's checks, tracing and gradients, with the device let in and a forward pass that uses the
fused attention kernels where the score is only added to.

A score_mod that is the score, or the score plus or minus what does not depend on it (ALiBi, relative positions), and any mask_mod, are a
mask of the fused kernels, which has only those of the dimensions [B, H, Tq, Tk] that they depend on. Any other score_mod, float64, and
maxima of scores take upstream's math, which has all scores in memory; so do gradients. Blocks that a BlockMask leaves out are not skipped."""

from __future__ import annotations

import functools
import math
import operator
from importlib import import_module
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

# The names of these modules are also those of what they define.
hop: Any = import_module("torch._higher_order_ops.flex_attention")
upstream: Any = import_module("torch.nn.attention.flex_attention")
DispatchKey: Any = torch._C.DispatchKey

_ADD = (operator.add, torch.add, torch.ops.aten.add.Tensor)
_ONES = ("new_ones", torch.ops.aten.new_ones.default)
_SUBTRACT = (operator.sub, torch.sub, torch.ops.aten.sub.Tensor)


def _allow_the_device() -> None:
    """upstream knows its devices by name."""
    check = upstream._validate_device

    @functools.wraps(check)
    def validate(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.device.type != "spiral":
            check(query, key, value)

    upstream._validate_device = validate


def _inner(graph: Any) -> torch.fx.Graph | None:
    return graph.graph if isinstance(graph, torch.fx.GraphModule) else None


def _added(score_mod: Any) -> bool | None:
    """Whether something is added to the score; None where it is not known that nothing else happens to it."""
    graph = _inner(score_mod)
    if graph is None:
        return None
    score = next(n for n in graph.nodes if n.op == "placeholder")
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    result = result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result
    if result is score:
        return False
    if (
        not isinstance(result, torch.fx.Node)
        or result.op != "call_function"
        or result.kwargs
        or list(score.users) != [result]
    ):
        return None
    first, second = (*result.args, None)[:2]
    added = result.target in _ADD and (first is score) != (second is score)
    return True if added or (result.target in _SUBTRACT and first is score and second is not score) else None


def _sees_all(mask_mod: Any) -> bool:
    """Whether a mask is the one that upstream makes where there is none."""
    graph = _inner(mask_mod)
    if graph is None:
        return mask_mod is upstream.noop_mask
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    result = result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result
    return isinstance(result, torch.fx.Node) and result.target in _ONES


def _without_repeats(x: torch.Tensor) -> torch.Tensor:
    """x with size 1 where it repeats itself."""
    for dim, stride in enumerate(x.stride()):
        x = x.narrow(dim, 0, 1) if stride == 0 and x.shape[dim] > 1 else x
    return x


def _bias(
    sizes: tuple[int, ...],
    device: torch.device,
    added: bool,
    score_mod: Any,
    mask_mod: Any,
    buffers: Any,
    mask_buffers: Any,
) -> Any:
    """What is added to scores of these sizes, or which of them count, or None; sizes are 1 where it repeats itself."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    places = [torch.arange(n, device=device) for n in sizes]
    bias = mask = None
    with TransformGetItemToIndex():
        if added:
            each = upstream._vmap_for_bhqkv(score_mod, prefix=(None,), suffix=(None,) * len(buffers))
            bias = _without_repeats(each(torch.zeros((), device=device), *places, *buffers))
        if not _sees_all(mask_mod):
            each = upstream._vmap_for_bhqkv(mask_mod, prefix=(), suffix=(None,) * len(mask_buffers))
            mask = _without_repeats(each(*places, *mask_buffers))
    if bias is None or mask is None:
        return mask if bias is None else bias.float()
    return torch.where(mask, bias.float(), -math.inf)


@hop.flex_attention.py_impl(DispatchKey.PrivateUse1)
def flex_attention(
    query: Any, key: Any, value: Any, score_mod: Any, block_mask: tuple, scale: float, kernel_options: dict[str, Any],
    score_mod_other_buffers: tuple = (), mask_mod_other_buffers: tuple = (),
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(out [B, H, Tq, Dv], logsumexp and maximum of the scores [B, H, Tq] in base 2; the maximum only where it is asked for)."""
    added = _added(score_mod)
    dtype = query.dtype
    fused = added is not None and not kernel_options.get("OUTPUT_MAX") and dtype == key.dtype == value.dtype
    if (
        not fused
        or dtype == torch.float64
        or max(query.shape[-1], value.shape[-1]) > 256
        or key.shape[0] not in (1, query.shape[0])
    ):
        out, lse, most = hop.math_attention(
            query,
            key,
            value,
            score_mod,
            block_mask,
            scale,
            kernel_options,
            score_mod_other_buffers,
            mask_mod_other_buffers,
        )
        return _ordered_as(out, query), lse, most
    key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    sizes = (*query.shape[:3], key.shape[2])
    bias = _bias(
        sizes, query.device, bool(added), score_mod, block_mask[-1], score_mod_other_buffers, mask_mod_other_buffers
    )
    out, lse, *_ = torch.ops.aten._scaled_dot_product_fused_attention_overrideable(query, key, value, bias, scale=scale)
    return _ordered_as(out, query), lse / math.log(2), torch.empty_like(lse)


@hop.flex_attention_backward.py_impl(DispatchKey.PrivateUse1)
def flex_attention_backward(
    query: Any, key: Any, value: Any, out: Any, lse: Any, grad_out: Any, grad_lse: Any, score_mod: Any, joint: Any, block_mask: tuple,
    scale: float, kernel_options: dict[str, Any], score_mod_other_buffers: tuple = (), mask_mod_other_buffers: tuple = (),
) -> tuple[Any, Any, Any, tuple]:  # fmt: skip
    """Gradients of query, key, value and of what score_mod captures (None where it needs none). joint: scores and their places, the
    gradient of what score_mod gives, and what it captures, to their gradients."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    buffers, dtype = score_mod_other_buffers, query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    group, batch = query.shape[1] // key.shape[1], query.shape[0]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    q, g = query.to(wide), grad_out.to(wide)
    k, v = (x.to(wide).expand(batch, *x.shape[1:]).repeat_interleave(group, 1) for x in (key, value))
    scores = q @ k.mT * scale
    places = [torch.arange(n, device=query.device) for n in scores.shape]
    unmapped = (None,) * len(buffers)
    with TransformGetItemToIndex():
        modified = upstream._vmap_for_bhqkv(score_mod, prefix=(0,), suffix=unmapped)(scores, *places, *buffers)
        seen = lse.unsqueeze(-1) > -math.inf
        if not _sees_all(block_mask[-1]):
            each = upstream._vmap_for_bhqkv(block_mask[-1], prefix=(), suffix=(None,) * len(mask_mod_other_buffers))
            seen = seen & each(*places, *mask_mod_other_buffers)
        p = torch.where(seen, torch.exp(modified - lse.unsqueeze(-1) * math.log(2)), 0.0)
        delta = (out.to(wide) * g).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse.unsqueeze(-1) / math.log(2)
        ds = p * (g @ v.mT - delta)
        results = [0, *[None] * (4 + len(buffers))]
        each = upstream._vmap_for_bhqkv(joint, prefix=(0,), suffix=(0, *unmapped), out_dims=results)
        ds, _, _, _, _, *captured = each(scores, *places, ds, *buffers)
    ds = torch.where(seen, ds, 0.0)  # whatever the modification makes of scores that do not count

    def shared(x: Any, like: Any) -> Any:
        """The sum over the query heads that share keys, and over the queries' batch where the keys have one item."""
        x = x.unflatten(1, (-1, group)).sum(2)
        return _ordered_as((x.sum(0, keepdim=True) if like.shape[0] != batch else x).to(like.dtype), like)

    dq = _ordered_as((ds @ k * scale).to(dtype), query)
    dk, dv = shared(ds.mT @ q * scale, key), shared(p.mT @ g, value)
    needed = [isinstance(x, torch.Tensor) and x.requires_grad for x in buffers]
    return dq, dk, dv, tuple(x.contiguous() if need else None for x, need in zip(captured, needed, strict=True))


def _ordered_as(x: Any, like: Any) -> Any:
    """x with its dimensions in memory in the order of those of `like`, the last one innermost: what upstream's traces expect."""
    order = [*sorted(range(3), key=like.stride, reverse=True), 3]
    return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])


@hop.flex_attention.py_impl(DispatchKey.AutocastPrivateUse1)
def flex_attention_autocast(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """Queries, keys and values in autocast's dtype."""
    dtype = torch.get_autocast_dtype("spiral")
    cast = [
        x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in (query, key, value)
    ]
    autocast = torch._C.DispatchKeySet(DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(autocast):
        return hop.flex_attention(*cast, *rest)


def _trace(graph: Any, score: bool, like: Any, buffers: tuple, gradient: bool = False) -> torch.fx.GraphModule:
    """What is done to a score (and in the backward graph also with its gradient), or which scores count, as operators."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    first = [like.new_zeros((), requires_grad=like.requires_grad)] * score
    places = [like.new_zeros((), dtype=torch.int) for _ in range(4)]
    with TransformGetItemToIndex():
        return hop._maybe_reenter_make_fx(graph)(*first, *places, *[like.new_zeros(())] * gradient, *buffers)


def _trace_operators() -> None:
    """Graphs of spiral tensors get the operators of flex_attention: there is no template for it, and they fuse with what is around."""
    originals = {
        f: f.python_key_table[ProxyTorchDispatchMode] for f in (hop.flex_attention, hop.flex_attention_backward)
    }

    def forward(mode: Any, query: Any, key: Any, value: Any, score_mod: Any, block_mask: tuple, scale: float, options: Any,
                buffers: tuple = (), mask_buffers: tuple = ()) -> Any:  # fmt: skip
        if query.device.type != "spiral":
            original = originals[hop.flex_attention]
            return original(mode, query, key, value, score_mod, block_mask, scale, options, buffers, mask_buffers)
        score_mod = _trace(score_mod, True, query, buffers)
        mask = (*block_mask[:-1], _trace(block_mask[-1], False, query, mask_buffers))
        with mode:
            return flex_attention(query, key, value, score_mod, mask, scale, options, buffers, mask_buffers)

    def backward(mode: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, grad_out: Any, grad_lse: Any, score_mod: Any, joint: Any,
                 block_mask: tuple, scale: float, options: Any, buffers: tuple = (), mask_buffers: tuple = ()) -> Any:  # fmt: skip
        rest = (block_mask, scale, options, buffers, mask_buffers)
        if query.device.type != "spiral":
            original = originals[hop.flex_attention_backward]
            return original(mode, query, key, value, out, lse, grad_out, grad_lse, score_mod, joint, *rest)
        score_mod = _trace(score_mod, True, query, buffers)
        joint = _trace(joint, True, query, buffers, True)
        mask = (*block_mask[:-1], _trace(block_mask[-1], False, query, mask_buffers))
        with mode:
            return flex_attention_backward(
                query, key, value, out, lse, grad_out, grad_lse, score_mod, joint, mask, *rest[1:]
            )

    for function, traced in ((hop.flex_attention, forward), (hop.flex_attention_backward, backward)):
        function.python_key_table[ProxyTorchDispatchMode] = traced


_allow_the_device()
_trace_operators()
