"""What the compiler does to a graph between AOTAutograd and Inductor's lowerings, and what its result depends on."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..kernels.block.conv import WIDE
from ..kernels.kernel import Target
from . import compat
from .key import built_for

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default


class Passes(compat.CustomGraphModulePass):
    """Called by Inductor on every graph with tensors on the device."""

    def __call__(self, gm: torch.fx.GraphModule) -> None:
        share_equal(gm.graph)
        merge_rows(gm.graph)
        add_biases(gm.graph)
        keep_residuals(gm.graph)
        keep_masks(gm.graph)

    def uuid(self) -> str:
        """Part of the key of Inductor's caches on disk: what kernels are built for, device by device, and what builds them."""
        return built_for()


_MADE = (
    convert, torch.ops.prims.iota.default, aten.full.default, aten.scalar_tensor.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.permute.default, aten.view.default, aten.reshape.default,
)  # fmt: skip


def share_equal(graph: fx.Graph) -> None:
    """Elementwise nodes and views that are computed from the same are computed once, as are the masks that each layer makes of one tensor.
    (AOTAutograd sees to that in graphs for training.) What leaves the graph stays a tensor of its own."""
    leaving: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        if n.op == "output" or (n in leaving and n.target in _MADE):
            leaving.update(n.all_input_nodes)
    seen: dict[tuple[Any, str, str], fx.Node] = {}
    for n in graph.nodes:
        tags = getattr(n.target, "tags", ())
        made = n.target in _MADE or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags)
        if not made or n.op != "call_function" or n.target._schema.is_mutable or n in leaving:
            continue
        first = seen.setdefault((n.target, repr(n.args), repr(n.kwargs)), n)
        if first is not n:
            n.replace_all_uses_with(first)
            graph.erase_node(n)


_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _product(n: Any) -> tuple[Any, list[fx.Node]]:
    """(the mm that n is a view of, with its columns last, the views from the outermost on), where nothing else reads them; else (None, [])."""
    views = []
    while _alone(n) and (n.target in _RESHAPES or n.target is aten.permute.default):
        views.append(n)
        n = n.args[0]
    if not _alone(n) or n.target is not aten.mm.default:
        return None, []
    columns = str(n.meta["val"].shape[1])
    for v in views:
        kept = v.args[1][-1] in (-1, len(v.args[1]) - 1) if v.target is aten.permute.default else True
        if not kept or str(v.meta["val"].shape[-1]) != columns:
            return None, []
    return n, views


def _insert(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call of an operator, with its value."""
    n = graph.call_function(target, args)
    n.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return n


def merge_rows(graph: fx.Graph) -> None:
    """bmm(x [A, B, K], w [K, N] expanded) becomes mm of all rows, in the order that they have in memory: what a linear layer without gradients
    decomposes to where the first dimensions of its input are exchanged, as nn.MultiheadAttention(batch_first=True) does."""
    for n in graph.find_nodes(op="call_function", target=aten.bmm.default):
        x, w = n.args
        if w.target is not aten.expand.default or w.args[0].meta["val"].ndim != 2:
            continue
        strides, inner = x.meta["val"].stride(), x.meta["val"].shape[2]
        columns = n.meta["val"].shape[2]
        if not all(isinstance(s, int) for s in (*strides, inner, columns)):
            continue
        exchanged = strides[0] < strides[1]
        outer, rows = (1, 0) if exchanged else (0, 1)
        many = x.meta["val"].shape[rows]
        if not isinstance(many, int) or strides[outer] != many * strides[rows]:
            continue
        # Inductor stores what is cast in the order of its own dimensions, so that these are exchanged before.
        casts: list[fx.Node] = []
        while x.target is convert or (
            x.target is aten.expand.default and str(x.args[0].meta["val"].shape) == str(x.meta["val"].shape)
        ):
            casts += [x] if x.target is convert else []
            x = x.args[0]
        with graph.inserting_before(n):
            if exchanged:
                x = _insert(graph, aten.permute.default, x, [1, 0, 2])
            for cast in reversed(casts):
                x = _insert(graph, convert, x, cast.args[1])
            x = _insert(graph, aten.reshape.default, x, [-1, inner])
            y = _insert(graph, aten.mm.default, x, w.args[0])
            y = _insert(graph, aten.reshape.default, y, [-1, many, columns])
            if exchanged:
                y = _insert(graph, aten.permute.default, y, [1, 0, 2])
        n.replace_all_uses_with(y)
        graph.erase_node(n)


def add_biases(graph: fx.Graph) -> None:
    """view(mm(x, w)) + bias becomes view(addmm(bias, x, w)): what a linear layer decomposes to where its input is not contiguous.
    What only copies the result can then be left out."""
    for n in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for x, bias in (n.args[:2], n.args[1::-1]):
            mm, views = _product(x)
            if mm is None or n.kwargs or not isinstance(bias, fx.Node):
                continue
            added, result, before, product = (a.meta["val"] for a in (bias, n, x, mm))
            dtypes, devices = {t.dtype for t in (added, result, product)}, {t.device for t in (added, result)}
            if len(dtypes) != 1 or len(devices) != 1 or str(before.shape) != str(result.shape):
                continue
            if [str(s) for s in added.shape] != [str(product.shape[1])]:
                continue
            with graph.inserting_before(n):
                new = graph.call_function(aten.addmm.default, (bias, *mm.args))
                new.meta.update(mm.meta)
                for v in reversed(views):
                    view: Any = v.target
                    new = graph.call_function(view, (new, *v.args[1:]))
                    new.meta.update(v.meta)
            n.replace_all_uses_with(new)
            break
    graph.eliminate_dead_code()


_MOVES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.clone.default,
    aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip


def keep_residuals(graph: fx.Graph) -> None:
    """Has what a product is added to stored once where more reads it, so that the product's epilogue adds it and a norm after the sum reads one
    tensor, not every product since the last one that Inductor stored."""
    for n in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for x, kept in (n.args[:2], n.args[1::-1]):
            while _alone(x) and x.target in _MOVES:
                x = x.args[0]
            product = _alone(x) and x.target in (aten.mm.default, aten.addmm.default)
            if not product or not isinstance(kept, fx.Node) or kept.op != "call_function" or len(kept.users) == 1:
                continue
            if str(kept.meta["val"].shape) == str(n.meta["val"].shape):
                compat.store(kept)


def keep_masks(graph: fx.Graph) -> None:
    """Has what several calls of attention add to their scores stored once; Inductor would make it for each call."""
    attention = aten._scaled_dot_product_fused_attention_overrideable.default
    for n in graph.find_nodes(op="call_function", target=attention):
        mask = n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_bias")
        if isinstance(mask, fx.Node) and mask.op == "call_function":
            compat.store(mask)


_SAME = (
    *_RESHAPES,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.permute.default,
)


def reads_again(n: fx.Node) -> bool:
    """Whether what a reduction gives is combined with rows as long as those it was made of, as in softmax and norms; or what is reduced with it is:
    the same rows, or rows combined with its results."""
    given, results = (_elements(x) for x in (next(iter(n.all_input_nodes), None), n))
    if given is None or results is None or given == results:
        return False
    rows: set[fx.Node] = set()
    todo, together = [*n.all_input_nodes], [n]
    while todo:
        x = todo.pop()
        if x in rows or _elements(x) not in (given, results):
            continue
        rows.add(x)
        together += [r for r in x.users if _elements(x) == given and _elements(r) == results]
        todo += x.all_input_nodes if _elementwise(x) or _elements(x) == results else []
    return any(_combined(r, given) for r in together)


def _combined(n: fx.Node, count: str) -> bool:
    """Whether elementwise nodes of so many elements are made of n without another reduction between."""
    todo, seen = list(n.users), set()
    while todo:
        user = todo.pop()
        if user not in seen and _elementwise(user):
            seen.add(user)
            if _elements(user) == count and user.target not in _SAME:
                return True
            todo += user.users
    return False


def _elementwise(n: fx.Node) -> bool:
    """Whether a node is computed element by element, or is a part or another view of what it is made of."""
    pointwise = torch.Tag.pointwise in getattr(n.target, "tags", ()) or n.target is convert
    return pointwise or n.target is operator.getitem or n.target in _SAME


def _elements(n: Any) -> str | None:
    """How many elements a node's first tensor has; a text, as sizes may be symbols."""
    value = n.meta.get("val") if isinstance(n, fx.Node) else None
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return str(value.numel()) if isinstance(value, torch.Tensor) else None


def reads_by_channels(gm: fx.GraphModule) -> bool:
    """Whether the convolutions of a graph gain from channels-last tensors: on devices of the schedule class `block`, where most of
    their work is in convolutions with wide channels, rather than in grouped ones with narrow groups. Sizes must be known."""
    wide = narrow = 0
    for n in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
        (x, w), out = (a.meta["val"] for a in n.args[:2]), n.meta["val"]
        if not all(isinstance(s, int) for t in (x, w) for s in t.shape):
            return False
        if Target.of(x.device.index or 0).schedule_class != "block":
            return False
        work = out.numel() * w[0].numel()
        readable = x.ndim == 4 and w.shape[1] >= WIDE
        wide += work * readable
        narrow += work * (not readable and n.args[8] != 1)
    return wide > narrow


# ---- attention, as models spell it out ------------------------------------------------------------------------------------
#
# Before AOTAutograd, so that forward and backward are fused attention's. Inductor knows some forms itself; this knows
# softmax(q @ k.T, scaled, masked by addition, where or masked_fill) @ v, with casts and dropout on the way, in three or four dimensions.

_MATMUL = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm")
_SOFTMAX = (torch.softmax, F.softmax, torch.nn.functional.softmax, "softmax")
_SCALE = {
    operator.mul: 1, torch.mul: 1, "mul": 1, operator.imul: 1, "mul_": 1,
    operator.truediv: -1, torch.div: -1, torch.true_divide: -1, "div": -1, operator.itruediv: -1, "div_": -1,
}  # fmt: skip
_ADD = (operator.add, torch.add, operator.iadd, "add", "add_")
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as")
HEAD = 256  # the largest head that the kernels take
HIDDEN = -1e4  # scores of this or less, as of GPT-2, mean that a key is not seen


def _value(n: Any) -> Any:
    return n.meta.get("example_value") if isinstance(n, fx.Node) else n


def _number(n: Any) -> float | None:
    """A number, or what a tensor without dimensions was made of."""
    if isinstance(n, (int, float)) and not isinstance(n, bool):
        return float(n)
    if isinstance(n, fx.Node) and n.target in (torch.full, torch.tensor):
        given = n.args[-1]
        shape = n.args[0] if n.target is torch.full else ()
        return float(given) if not shape and isinstance(given, (int, float)) else None
    return None


def _argument(n: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return n.args[index] if index < len(n.args) else n.kwargs.get(name, default)


def _alone(n: Any) -> bool:
    return isinstance(n, fx.Node) and len(n.users) == 1


def _through_casts(n: Any) -> Any:
    while (
        _alone(n)
        and n.op == "call_method"
        and n.target in _CASTS
        and isinstance(_value(n), torch.Tensor)
        and _value(n).is_floating_point()
    ):
        n = n.args[0]
    return n


def _rewrite(gm: fx.GraphModule, rewrite: Callable[[fx.Graph], int]) -> int:
    """How often rewrite found something. What nothing reads any more because of it is taken out; what nothing read before stays, since
    Dynamo's graph holds writes whose result nobody wants (a cache's index_copy_)."""
    unread = {n for n in gm.graph.nodes if not n.users}
    found = rewrite(gm.graph)
    if found:
        gm.graph.eliminate_dead_code(lambda n: n.is_impure() or n in unread)
        gm.recompile()
    return found


def fuse_attention(gm: fx.GraphModule) -> int:
    """Replaces attention that is spelled out by scaled_dot_product_attention; how often."""
    return _rewrite(gm, _fuse_attention)


def share_keys(gm: fx.GraphModule) -> int:
    """Has attention read key heads that are repeated for groups of query heads (transformers' repeat_kv) where they are; how often."""
    return _rewrite(gm, _share_keys)


def skip_empty_caches(gm: fx.GraphModule) -> int:
    """Has attention read keys and values where they are, rather than concatenated to nothing, as transformers' caches do at first; how often."""
    return _rewrite(gm, _skip_empty_caches)


def _fuse_attention(graph: fx.Graph) -> int:
    found = 0
    for out in list(graph.nodes):
        if out.target in _MATMUL and out.op in ("call_function", "call_method") and _fuse(graph, out):
            found += 1
    return found


def _share_keys(graph: fx.Graph) -> int:
    found = 0
    for n in graph.nodes:
        if n.target is F.scaled_dot_product_attention and len(n.args) >= 3 and not n.kwargs.get("enable_gqa"):
            k, v = map(_repeated, n.args[1:3])
            if k is None or v is None or _value(k).shape[1] != _value(v).shape[1]:
                continue
            if _written_between(n.args[1], n) or _written_between(n.args[2], n):
                continue
            n.args = (n.args[0], k, v, *n.args[3:])
            n.kwargs = {**n.kwargs, "enable_gqa": True}
            found += 1
    return found


def _skip_empty_caches(graph: fx.Graph) -> int:
    found = 0
    for n in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        for i, joined in enumerate(n.args[:3]):
            if (
                not isinstance(joined, fx.Node)
                or joined.target is not torch.cat
                or not isinstance(joined.args[0], (list, tuple))
            ):
                continue
            parts = [t for t in joined.args[0] if not isinstance(t, fx.Node) or _value(t).shape != (0,)]
            if len(parts) != 1 or _value(parts[0]).dtype != _value(joined).dtype:
                continue
            if not _written_between(joined, n):
                n.update_arg(i, parts[0])
                found += 1
    return found


def _written_between(n: fx.Node, end: fx.Node) -> bool:
    """Whether a node of Dynamo's graph after n and before end may write to a tensor."""
    while (n := n.next) is not end:
        if _writes(n):
            return True
    return False


def _writes(n: fx.Node) -> bool:
    """Whether a node of Dynamo's graph may write to a tensor."""
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("setitem", "iadd", "isub", "imul", "itruediv") or "out" in n.kwargs


def _repeated(n: Any) -> Any:
    """x [B, heads, T, D], where n is x[:, :, None].expand(B, heads, groups, T, D).reshape(B, heads * groups, T, D); else None."""
    chain = []
    for targets in ((torch.reshape, "reshape", "view"), ("expand",), (operator.getitem, torch.unsqueeze, "unsqueeze")):
        if not isinstance(n, fx.Node) or n.target not in targets or not isinstance(_value(n), torch.Tensor):
            return None
        chain.append(_value(n).shape)
        place, n = n.args[1:], n.args[0]
    every = slice(None)
    if place not in (
        (2,),
        ((every, every, None),),
        ((every, every, None, every, every),),
        ((every, every, None, ...),),
    ):
        return None
    x = _value(n)
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.device.type != "spiral":
        return None
    flat, wide, _ = chain
    heads, groups = x.shape[1], wide[2]
    if not isinstance(heads, int) or not isinstance(groups, int):
        return None
    batch, _, rows, width = map(str, x.shape)  # symbols too
    same = [str(i) for i in wide] == [batch, str(heads), str(groups), rows, width]
    return n if same and [str(i) for i in flat] == [batch, str(heads * groups), rows, width] else None


def _fuse(graph: fx.Graph, out: fx.Node) -> bool:
    probabilities, v = out.args[:2] if len(out.args) > 1 else (None, None)
    dropout = 0.0
    n = _through_casts(probabilities)
    if _alone(n) and n.target in (F.dropout, torch.dropout):
        p, training = _argument(n, 1, "p", 0.5), _argument(n, 2, "training", n.target is F.dropout)
        if not isinstance(p, float) or not isinstance(training, bool):
            return False
        dropout = p if training else 0.0
        n = _through_casts(n.args[0])
    if not _alone(n) or n.target not in _SOFTMAX or not isinstance(_value(n), torch.Tensor):
        return False
    if _argument(n, 1, "dim") not in (-1, _value(n).ndim - 1):
        return False
    n = _through_casts(n.args[0])
    biases: list[Any] = []  # (what makes a bias, its arguments)
    shape = str(_value(n).shape) if isinstance(_value(n), torch.Tensor) else ""
    scale = after = 1.0  # after: of what follows the bias
    while _alone(n) and n.target not in _MATMUL:
        a, b = (n.args[0], _argument(n, 1, "other")) if n.args else (None, None)
        if n.target in _ADD and not biases and set(n.kwargs) <= {"other"}:
            if _has_product(a) == _has_product(b):
                return False
            biases.append(("tensor", b if _has_product(a) else a))
            n = _through_casts(a if _has_product(a) else b)
            after = scale
        elif (
            n.target in (torch.where, "where")
            and not biases
            and len(n.args) == 3
            and isinstance(n.args[0], fx.Node)
            and _number(n.args[2]) is not None
        ):
            condition, scores, other = n.args if n.target is torch.where else (n.args[1], n.args[0], n.args[2])
            biases.append(("where", condition, _number(other)))
            n = _through_casts(scores)
            after = scale
        elif n.target in ("masked_fill", "masked_fill_") and not biases:
            biases.append(("fill", _argument(n, 1, "mask"), _number(_argument(n, 2, "value"))))
            n = _through_casts(n.args[0])
            after = scale
        elif n.target in _SCALE:
            factor, scores = (_number(b), a) if _number(b) is not None else (_number(a), b)
            if not factor or (_SCALE[n.target] < 0 and scores is b) or not isinstance(scores, fx.Node):
                return False
            scale *= factor ** _SCALE[n.target]
            n = _through_casts(scores)
        else:
            return False
    if not _alone(n) or n.target not in _MATMUL or len(n.args) < 2:
        return False
    q, kt = n.args[:2]
    values = [_value(x) for x in (q, kt, v)]
    if not all(isinstance(x, torch.Tensor) for x in values):
        return False
    qv, kv, vv = values
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if (
        qv.device.type != "spiral" or qv.dtype not in floats or len({x.dtype for x in values}) != 1 or qv.ndim not in (3, 4)
        or len({x.ndim for x in values}) != 1 or qv.shape[:-2] != kv.shape[:-2] or qv.shape[:-2] != vv.shape[:-2]
        or _value(out).dtype != qv.dtype or not isinstance(qv.shape[-1], int) or max(qv.shape[-1], vv.shape[-1]) > HEAD
    ):  # fmt: skip
        return False
    if str(_value(n).shape) != shape:  # a mask of more batches than there are scores
        return False
    flat = qv.ndim == 3
    with graph.inserting_before(out):
        call = graph.call_function
        bias = None
        for kind, tensor, *number in biases:
            if kind == "tensor":
                given = _value(tensor)
                if (
                    not isinstance(given, torch.Tensor)
                    or not given.is_floating_point()
                    or given.device.type != "spiral"
                ):
                    return False
                bias = tensor if after == 1.0 else call(torch.mul, (tensor, after))
                bias = bias if given.dtype == qv.dtype else graph.call_method("to", (bias, qv.dtype))
            else:
                given = _value(tensor)
                if not isinstance(given, torch.Tensor) or given.dtype != torch.bool or given.device.type != "spiral":
                    return False
                if number[0] is None or after <= 0 or not number[0] * after <= HIDDEN:
                    return False
                # Rows that are hidden altogether have equal weights, and their queries no gradients: those are 0 here, or the number
                # leaves nothing of their scores (but its logsumexp does not tell how many keys there are, as gradients must know).
                train = qv.requires_grad or kv.requires_grad or vv.requires_grad
                wide = torch.float32 if qv.dtype == torch.float16 else qv.dtype
                low = number[0] if math.isinf(number[0]) else HIDDEN if train else torch.finfo(wide).min
                zero, other = (call(torch.full, ((), x), {"dtype": wide, "device": qv.device}) for x in (0.0, low))
                bias = call(torch.where, (tensor, zero, other) if kind == "where" else (tensor, other, zero))
                if train and not math.isinf(low):
                    hidden = call(torch.logical_not, (tensor,)) if kind == "where" else tensor
                    q = graph.call_method("masked_fill", (q, call(torch.all, (hidden, -1, True)), 0.0))
            ndim = given.ndim
            if flat and ndim == 3:
                bias = call(torch.unsqueeze, (bias, 1))
        k = graph.call_method("transpose", (kt, -2, -1))
        qkv = tuple(call(torch.unsqueeze, (x, 1)) if flat else x for x in (q, k, v))
        fused = call(F.scaled_dot_product_attention, qkv, {"attn_mask": bias, "dropout_p": dropout, "scale": scale})
        if flat:
            fused = call(torch.squeeze, (fused, 1))
    fused.meta.update(out.meta)
    out.replace_all_uses_with(fused)
    return True


def _has_product(n: Any) -> bool:
    """Whether n is made of a matrix product by what _fuse sees through."""
    for _ in range(4):
        if not isinstance(n, fx.Node):
            return False
        if n.target in _MATMUL:
            return True
        inner = [a for a in n.args if isinstance(a, fx.Node) and _number(a) is None]
        if n.target not in _SCALE and n.target not in _CASTS and n.target not in _ADD:
            return False
        if not inner:
            return False
        n = inner[0]
    return False


__all__ = ["Passes", "fuse_attention", "reads_again", "reads_by_channels", "share_keys", "skip_empty_caches"]
