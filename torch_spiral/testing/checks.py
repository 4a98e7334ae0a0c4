"""What is asked of each (op, dtype): the CPU's result from the same inputs, in every way the op can be called.

An item is an entry of upstream's op_db, python_ref_db, module_db or optim_db. A check is a function of
(item, dtype, device, limit) that returns how many samples it compared (0: does not apply) and raises where the
device differs. limit bounds the samples of a check; None takes all.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# The backend must have its name before upstream's helpers look for it.
from torch_spiral.testing.devices import compare_with_cpu, spiral_available

spiral_available()
compare_with_cpu()

from torch.testing import assert_close  # noqa: E402
from torch.testing._internal import common_methods_invocations  # noqa: E402
from torch.testing._internal.common_device_type import toleranceOverride  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db, python_ref_db  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402
from torch.testing._internal.common_optimizers import optim_db  # noqa: E402
from torch.testing._internal.opinfo.core import (  # noqa: E402
    BinaryUfuncInfo,
    OpInfo,
    SampleInput,
    UnaryUfuncInfo,
)
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from torch_spiral.testing import randomness  # noqa: E402

Tensor = torch.Tensor

# Decompositions that are unique only up to signs, phases or order: compared through what upstream differentiates.
GAUGE = {
    "linalg.svd", "svd", "linalg.eig", "linalg.eigh", "linalg.qr", "qr", "svd_lowrank", "pca_lowrank", "lobpcg",
}  # fmt: skip

# Their memory is not initialised, so only shapes, strides and dtypes compare.
UNINITIALISED = {
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "resize_as_",
}  # fmt: skip


# Norms that save statistics: upstream's CPU kernels give those the input's dtype, its other devices float32; batch norm's in
# evaluation, which nothing reads, are empty on the CPU and the running ones elsewhere (torch/_decomp/decompositions.py).
NORMS = {"native_layer_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"}

# upstream wraps its random ops to draw from one seed, which would hide that they are random; ours choose their seeds.
_fixed_seed: int | None = None


def _seeded(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _fixed_seed is not None:
        torch.manual_seed(_fixed_seed)
    return op(*args, **kwargs)


common_methods_invocations.wrapper_set_seed = _seeded


@dataclass(frozen=True)
class Item:
    name: str  # "add", "div.floor_rounding", "_refs.add", "nn.Linear", "optim.AdamW"
    kind: str  # "op", "ref", "module", "optim"
    info: Any
    dtypes: tuple[torch.dtype, ...]


def _indices_on_cpu(tensor_split: Callable[..., Any]) -> Callable[..., Any]:
    """tensor_split with its indices on the CPU, where they belong on every device."""

    def split(x: Tensor, indices_or_sections: Any, dim: int = 0) -> Any:
        where = indices_or_sections
        return tensor_split(x, where.cpu() if isinstance(where, Tensor) else where, dim)

    return split


def items() -> dict[str, Item]:
    """Everything that upstream ships, by name."""
    found: dict[str, Item] = {}

    def add(name: str, kind: str, info: Any, dtypes: Iterable[torch.dtype]) -> None:
        assert name not in found, name
        found[name] = Item(name, kind, info, tuple(sorted(dtypes, key=str)))

    for op in op_db:
        if op.name == "tensor_split":
            op.op = op.method_variant = _indices_on_cpu(torch.tensor_split)
        add(op.full_name, "op", op, op.supported_dtypes("cpu"))
    for op in python_ref_db:
        if op.name == "_refs.tensor_split":
            op.op = _indices_on_cpu(torch._refs.tensor_split)
        add(op.full_name, "ref", op, op.supported_dtypes("cpu"))
    for module in module_db:
        add(module.name.replace("_", ".", 1) if module.name.startswith("nn_") else module.name, "module", module,
            module.dtypes)  # fmt: skip
    for info in optim_db:
        add(f"optim.{info.optim_cls.__name__}", "optim", info, (torch.float32,))  # type: ignore[attr-defined]
    return found


# Moving samples


def _move(value: Any, device: torch.device, dtype: torch.dtype | None = None, grad: bool = False) -> Any:
    """A copy of a tensor on a device with the same strides, offset, aliasing within itself and conj and neg bits."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            return value.detach().to(device)
        x = value.detach()
        conj, neg = x.is_conj(), x.is_neg()
        x = x.conj() if conj else x
        x = torch._neg_view(x) if neg else x
        target = _widened(x.dtype, dtype)
        if device.type == "meta":
            out = torch.empty_strided(x.shape, x.stride(), dtype=target, device=device)
        else:
            base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            base = base.to(device, target, copy=True)
            out = base.as_strided(x.shape, x.stride(), x.storage_offset())
        out = out.conj() if conj else out
        out = torch._neg_view(out) if neg else out
        out = out.detach()
        return out.requires_grad_() if grad and value.requires_grad else out
    if isinstance(value, torch.dtype) and dtype is not None:
        return _widened(value, dtype)
    if value == "cpu" or value == torch.device("cpu"):
        return device
    return value


def _widened(dtype: torch.dtype, widest: torch.dtype | None) -> torch.dtype:
    if widest is None:
        return dtype
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def move(tree: Any, device: torch.device, dtype: torch.dtype | None = None, grad: bool = False) -> Any:
    """Copies a tree of arguments to a device; with dtype=float64, floating and complex tensors are widened."""
    return tree_map(lambda v: _move(v, device, dtype, grad), tree)


def _call(sample: SampleInput) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (sample.input, *sample.args), sample.kwargs


CPU = torch.device("cpu")


def _samples(item: Item, dtype: torch.dtype, limit: int | None, grad: bool = False, how: str = "sample_inputs"):
    produce = getattr(item.info, how)
    return itertools.islice(produce("cpu", dtype, requires_grad=grad), limit)


# Comparing


def _tolerances(info: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The loosest of upstream's own tolerance for comparisons of this op, or torch.testing's for the dtype."""
    atol = rtol = 0.0
    for d in getattr(info, "decorators", None) or ():
        if getattr(d, "cls_name", None) not in (None, "TestCommon", "TestModule"):
            continue
        for override in getattr(d, "decorators", [d]):
            if isinstance(override, toleranceOverride) and dtype in override.d:
                atol, rtol = max(atol, override.d[dtype].atol), max(rtol, override.d[dtype].rtol)
    default = torch.testing._comparison.default_tolerances(dtype)  # rtol, atol
    return {"rtol": max(rtol, default[0]), "atol": max(atol, default[1])}


def _like(result: Any, reference: Any) -> None:
    """Same structure, and shapes and dtypes of tensors."""
    ours, theirs = tree_leaves(result), tree_leaves(reference)
    assert len(ours) == len(theirs), f"{len(ours)} results instead of {len(theirs)}"
    for o, t in zip(ours, theirs, strict=True):
        if isinstance(t, Tensor):
            assert isinstance(o, Tensor), f"{type(o).__name__} instead of a tensor"
            assert o.shape == t.shape, f"shape {tuple(o.shape)} instead of {tuple(t.shape)}"
            assert o.dtype == t.dtype, f"{o.dtype} instead of {t.dtype}"
            assert o.layout == t.layout, f"{o.layout} instead of {t.layout}"


def _close(result: Any, reference: Any, info: Any) -> None:
    for o, t in zip(tree_leaves(result), tree_leaves(reference), strict=True):
        if isinstance(t, Tensor):
            assert_close(o.detach().cpu(), t.detach(), equal_nan=True, **_tolerances(info, t.dtype))
        elif isinstance(t, float):
            assert_close(o, t, equal_nan=True)
        elif not isinstance(t, torch.device):
            assert o == t, f"{o} instead of {t}"


def _as_good(result: Any, reference: Any, exact: Any, info: Any, grad: bool = False) -> bool:
    """Whether every result is about as near to the one computed in float64 as the CPU's is."""
    # Gradients of what was broadcast are sums, in which large terms may cancel.
    elementwise = isinstance(info, (UnaryUfuncInfo, BinaryUfuncInfo)) and not grad
    for o, t, e in zip(tree_leaves(result), tree_leaves(reference), tree_leaves(exact), strict=True):
        if not isinstance(t, Tensor):
            if not isinstance(t, (float, torch.device)) and o != t:
                return False
            continue
        if not (t.dtype.is_floating_point or t.dtype.is_complex):
            if not torch.equal(o.cpu(), t):
                return False
            continue
        if o.layout != torch.strided or e.shape != t.shape:
            return False
        wide = torch.complex128 if t.dtype.is_complex else torch.float64
        o, t, e = (x.detach().cpu().to(wide) for x in (o, t, e))
        finite = e.isfinite() & t.isfinite()
        if not torch.equal(o.isfinite() & finite, finite):
            return False
        if not finite.any():
            continue
        o, t, e = o[finite], t[finite], e[finite]
        eps = torch.finfo(tree_leaves(reference)[0].dtype).eps if _floating(tree_leaves(reference)[0]) else 1e-7
        ours, theirs = (o - e).abs(), (t - e).abs()
        if elementwise:  # each element on its own: large ones must not excuse small ones
            if bool((ours > 8 * theirs + 8 * eps * e.abs() + 1e-7).any()):
                return False
        elif float(ours.max()) > 8 * float(theirs.max()) + 8 * eps * float(e.abs().max()):
            return False
    return True


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


# Which of equal elements these pick, and which gets the gradient, is not specified.
PICKS = {"sort": 1, "argsort": 1, "msort": None, "topk": 2, "kthvalue": 2}  # the place of `dim` among the arguments


def _as_picked(item: Item, tree: Any, result: Any, reference: Any, grad: bool) -> bool:
    """Whether results differ only in which of equal elements the op picked."""
    if not isinstance(tree[-1], dict):  # ((args, kwargs), out)
        tree = tree[0]
    (x, *rest), kwargs = tree
    place = PICKS[item.info.name]
    if kwargs.get("stable") or (item.info.name == "argsort" and len(rest) > 2):
        return False
    given = 0 if place is None else kwargs.get("dim", rest[place - 1] if len(rest) >= place else -1)
    x, dim = x.detach().cpu().resolve_neg(), int(given)
    both = [tree_leaves(v) for v in (result, reference)]
    ours, theirs = ([t.detach().cpu() for t in leaves if isinstance(t, Tensor)] for leaves in both)
    others = [[t for t in leaves if not isinstance(t, Tensor)] for leaves in both]
    if not x.dim() or others[0] != others[1]:
        return False
    if grad:  # what the elements of one value get together
        values, order = x.sort(dim=dim, stable=True)
        first = torch.ones_like(values.narrow(dim, 0, 1), dtype=torch.bool)
        same = values.narrow(dim, 1, values.shape[dim] - 1) == values.narrow(dim, 0, values.shape[dim] - 1)
        group = torch.cat([first, ~same], dim).cumsum(dim) - 1
        sums = [torch.zeros_like(g).scatter_add_(dim, group, g.gather(dim, order)) for g in (ours[0], theirs[0])]
    else:
        kept = x.dim() == ours[-1].dim()
        picks = [v[-1] if kept else v[-1].unsqueeze(dim) for v in (ours, theirs)]
        if any(bool((p.sort(dim)[0].diff(dim=dim) == 0).any()) for p in picks):
            return False  # an element twice
        sums = [torch.cat([x.gather(dim, p), *(v[0] if kept else v[0].unsqueeze(dim) for _ in v[1:])], dim)
                for p, v in zip(picks, (ours, theirs), strict=True)]  # fmt: skip
    try:
        assert_close(sums[0], sums[1], equal_nan=True, **_tolerances(item.info, sums[1].dtype))
    except AssertionError:
        return False
    return True


def compare(run: Callable[[Any], Any], tree: Any, device: torch.device, item: Item, grad: bool = False) -> str:
    """Runs on the device and on the CPU from copies of the same inputs. How they agree: "" where the CPU cannot run it.

    Where results differ, the device must be as near to float64 as the CPU is ("as good"), or, where the CPU drew random
    numbers, agree with it in distribution ("random").
    """
    theirs = move(tree, CPU, grad=grad)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    try:
        reference = run(theirs)
    except Exception:
        return ""
    random = not torch.equal(torch.get_rng_state(), state)
    ours = move(tree, device, grad=grad)
    torch.manual_seed(0)
    result = run(ours)
    _like(result, reference)
    if device.type == "meta" or item.name.removeprefix("_refs.") in UNINITIALISED:
        return "alike"
    try:
        _close(result, reference, item.info)
        return "equal"
    except AssertionError:
        if random:
            _check_random(run, tree, device, grad, tree_leaves(result), tree_leaves(reference))
            return "random"
        if item.info.name in PICKS and _as_picked(item, tree, result, reference, grad):
            return "as good"
        try:
            exact = run(move(tree, CPU, torch.float64, grad=grad))
        except Exception:
            exact = None
        if exact is None or not _as_good(result, reference, exact, item.info, grad):
            raise
    return "as good"


def _check_random(
    run: Callable[[Any], Any], tree: Any, device: torch.device, grad: bool, result: list[Any], reference: list[Any]
) -> None:
    for o, t in zip(result, reference, strict=True):
        if not isinstance(t, (Tensor, float, int, torch.device)):
            assert o == t, f"{o} instead of {t}"
    dtypes = {t.dtype for t in tree_leaves((tree, reference)) if isinstance(t, Tensor)}
    rounding = max((randomness.ROUNDING.get(d, 1e-4 if d.is_complex else 0.0) for d in dtypes), default=1e-4)
    randomness.check_distribution(
        lambda: run(move(tree, device, grad=grad)), lambda: run(move(tree, CPU, grad=grad)), rounding
    )


class Mismatch(AssertionError):
    """A difference, with the sample that shows it."""


def _each(item: Item, samples: Iterable[SampleInput], one: Callable[[SampleInput], bool]) -> int:
    count = 0
    for k, sample in enumerate(samples):
        try:
            count += bool(one(sample))
        except Exception as e:  # noqa: PERF203
            text = " ".join(str(e).split())
            raise Mismatch(f"{type(e).__name__}: {text} [sample {k}: {_summary(sample)}]") from e
    return count


def _summary(sample: Any) -> str:
    def one(v: Any) -> Any:
        if isinstance(v, Tensor):
            dense = "" if v.layout != torch.strided or v.is_contiguous() else f" strides {list(v.stride())}"
            return f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}{dense}"
        return v

    args, kwargs = _call(sample) if isinstance(sample, SampleInput) else ((sample,), {})
    parts = [str(tree_map(one, a)) for a in args] + [f"{k}={tree_map(one, v)}" for k, v in kwargs.items()]
    return ", ".join(parts)[:300]


# Checks of ops


def _processed(item: Item, sample: SampleInput) -> Callable[[Any], Any]:
    if item.info.name in GAUGE:
        return lambda tree: sample.output_process_fn_grad(item.info(*tree[0], **tree[1]))
    return lambda tree: _results(item, *tree)


def _results(item: Item, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an op gives, less what upstream's devices disagree in and what is undefined."""
    out = item.info(*args, **kwargs)
    if item.info.name == "linalg.cholesky_ex":  # info > 0: LAPACK did not complete the factor
        return [out[0].masked_fill((out[1] > 0)[..., None, None], 0), out[1]]
    if item.info.name not in NORMS:
        return out
    statistics = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in out[1:3]] if _trains(item, args) else []
    return [out[0], *statistics, *out[3:]]


def _trains(item: Item, args: tuple[Any, ...]) -> bool:
    """Whether a call of one of NORMS makes statistics."""
    return item.info.name in ("native_layer_norm", "_batch_norm_with_update") or args[5]


def forward(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Results from upstream's sample inputs."""
    return _each(
        item,
        _samples(item, dtype, limit),
        lambda s: bool(compare(_processed(item, s), _call(s), device, item)),
    )


def reference(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Results from upstream's reference inputs: extremal values, broadcasting, odd sizes."""
    if item.info.reference_inputs_func is None:
        return 0
    return _each(
        item,
        _samples(item, dtype, limit, how="reference_inputs"),
        lambda s: bool(compare(_processed(item, s), _call(s), device, item)),
    )


def _dense(sample: SampleInput) -> bool:
    return all(v.layout == torch.strided for v in tree_leaves(_call(sample)) if isinstance(v, Tensor))


def noncontiguous(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Results from inputs with gaps between elements and an offset."""
    dense = (s for s in _samples(item, dtype, limit) if _dense(s))
    return _each(
        item,
        (s.noncontiguous() for s in dense),
        lambda s: bool(compare(_processed(item, s), _call(s), device, item)),
    )


def views(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Results from inputs with the negative bit, and for complex ones the conjugate bit."""
    if dtype is torch.bool or not (item.info.test_neg_view or (dtype.is_complex and item.info.test_conjugated_samples)):
        return 0

    def lazily(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.layout != torch.strided:
            return v
        if v.is_complex() and item.info.test_conjugated_samples:
            return v.detach().conj()
        if (v.is_complex() or v.is_floating_point()) and item.info.test_neg_view:
            return torch._neg_view(v.detach())
        return v

    def one(sample: SampleInput) -> bool:
        op = _processed(item, sample)

        def run(tree: Any) -> Any:
            # Some of upstream's CPU kernels overlook the bits; what reads the memory below a view must keep it.
            resolve = _on_cpu(tree) and not item.info.name.startswith("as_strided")
            return op(tree_map(_resolved, tree) if resolve else tree)

        tree = tree_map(lazily, _call(sample))
        try:
            return bool(compare(run, tree, device, item))
        except RuntimeError as e:
            try:
                op(move(tree, CPU))
            except RuntimeError as refused:
                if str(refused) == str(e):  # upstream's own on every device: two tensors with the bit to write to
                    return False
            raise

    return _each(item, _samples(item, dtype, limit), one)


def _resolved(v: Any) -> Any:
    return v.resolve_conj().resolve_neg() if isinstance(v, Tensor) and v.layout == torch.strided else v


def _on_cpu(tree: Any) -> bool:
    return all(v.device == CPU for v in tree_leaves(tree) if isinstance(v, Tensor))


def backward(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Gradients of every floating input, from random cotangents."""
    op = item.info
    if not op.supports_autograd or dtype not in op.supported_backward_dtypes("cpu"):
        return 0

    def one(sample: SampleInput) -> bool:
        def outputs(tree: Any) -> tuple[list[Tensor], list[Tensor]]:
            out = sample.output_process_fn_grad(op(*tree[0], **tree[1]))
            outs = [o for o in tree_leaves(out) if isinstance(o, Tensor) and o.requires_grad]
            leaves = [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.requires_grad]
            if not outs or not leaves:
                raise NotImplementedError("nothing to differentiate")
            return outs, leaves

        agreed = compare(lambda tree: gradients(*outputs(tree)), _call(sample), device, item, grad=True)
        if agreed == "random" and dtype in (torch.float32, torch.float64):
            randomness.check_gradient(outputs, gradients, lambda: move(_call(sample), device, grad=True))
        return bool(agreed)

    return _each(item, _samples(item, dtype, limit, grad=True), one)


def gradients(outs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients from cotangents that are the same numbers on every device; those of unused leaves are zero."""
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for o in outs:
        dtype = torch.complex128 if o.is_complex() else torch.float64
        c = torch.randn(o.shape, dtype=dtype, generator=generator).to(o.dtype)
        cotangents.append(c.to_sparse().to(o.device) if o.is_sparse else c.to(o.device))
    grads = torch.autograd.grad(outs, leaves, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def gradcheck(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Numerical against analytical gradients, in float64 and complex128."""
    op = item.info
    if dtype not in (torch.float64, torch.complex128) or device.type == "meta":
        return 0
    if not op.supports_autograd or dtype not in op.supported_backward_dtypes("cpu"):
        return 0

    def check(sample: SampleInput, on: torch.device) -> bool:
        args, kwargs = move(_call(sample), on, grad=True)
        flat = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.requires_grad]
        if not flat:
            return False

        def fn(*values: Tensor) -> Any:
            feed = iter(values)
            a, k = tree_map(lambda v: next(feed) if isinstance(v, Tensor) and v.requires_grad else v, (args, kwargs))
            out = sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), *a, **k))
            return tuple(o for o in tree_leaves(out) if isinstance(o, Tensor) and o.requires_grad)

        global _fixed_seed
        _fixed_seed = 0  # numerical gradients of one function, not of many
        try:
            return torch.autograd.gradcheck(
                fn,
                flat,
                check_batched_grad=False,
                check_grad_dtypes=True,
                nondet_tol=op.gradcheck_nondet_tol,
                fast_mode=True,
            )
        finally:
            _fixed_seed = None

    def one(sample: SampleInput) -> bool:
        try:
            return check(sample, device)
        except Exception:
            try:  # a sample that the CPU's gradients do not pass says nothing
                check(sample, CPU)
            except Exception:
                return False
            raise

    return _each(item, _samples(item, dtype, limit, grad=True), one)


def _variants(op: OpInfo) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    for name, fn, inplace in (
        ("method", op.method_variant, False),
        ("in-place", op.inplace_variant, True),
        ("operator", op.operator_variant, False),
        ("in-place operator", op.inplace_operator_variant, True),
    ):
        if fn is not None:
            yield name, fn, inplace
    for alias in op.aliases or ():
        yield f"alias {alias.name}", alias.op, False
        if alias.inplace_variant is not None:
            yield f"alias {alias.name}_", alias.inplace_variant, True


def variants(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Methods, operators, aliases and in-place forms; in-place ones write into their own tensor."""
    count = 0
    for name, fn, inplace in _variants(item.info):

        def one(sample: SampleInput, fn: Any = fn, inplace: bool = inplace) -> bool:
            def run(tree: Any) -> Any:
                args, kwargs = tree
                before = args[0].data_ptr() if inplace and isinstance(args[0], Tensor) else None
                out = fn(*args, **kwargs)
                if before is not None and device.type != "meta":
                    assert out is args[0] and (out.numel() == 0 or out.data_ptr() == before), "not in place"
                return out

            tree = _call(sample)
            if inplace:  # a tensor that aliases itself cannot be written
                tree = ((move(sample.input, CPU), *sample.args), sample.kwargs)
                if isinstance(sample.input, Tensor):
                    tree = ((sample.input.detach().clone(), *sample.args), sample.kwargs)
            if compare(run, tree, device, item):
                return True
            return _raises(run, tree, device)

        try:
            count += _each(item, _samples(item, dtype, limit), one)
        except Mismatch as e:
            raise Mismatch(f"{name}: {e}") from e
    return count


def _raises(run: Callable[[Any], Any], tree: Any, device: torch.device) -> bool:
    """The CPU refuses: so must the device, with the same type of error where it is an argument's."""
    try:
        run(move(tree, CPU))
    except Exception as e:
        expected = e
    if isinstance(expected, NotImplementedError) or "not implemented for" in str(expected):
        return False  # what the CPU lacks, the device may have
    try:
        run(move(tree, device))
    except Exception as e:
        if _unimplemented(e):
            raise
        return True
    raise AssertionError(f"no error, where the CPU says: {expected}")


def _unimplemented(e: Exception) -> bool:
    return isinstance(e, NotImplementedError) or "SPIRAL_FALLBACK" in str(e)


def out(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """out= of the right shape, with strides, empty, of a wrong shape and of a wrong dtype: as the CPU treats them."""
    op = item.info
    if not op.supports_out:
        return 0

    def one(sample: SampleInput) -> bool:
        tree = _call(sample)
        if item.info.name in NORMS and not _trains(item, tree[0]):
            return False
        try:
            expected = op(*move(tree, CPU)[0], **move(tree, CPU)[1])
        except Exception:
            return False
        if not all(isinstance(o, Tensor) and o.layout == torch.strided for o in tree_leaves(expected)):
            return False

        def given(make: Callable[[Tensor], Tensor]) -> Any:
            outs = [make(o) for o in tree_leaves(expected)]
            return tuple(outs) if isinstance(expected, (tuple, list)) else outs[0]

        def writes(run: Callable[[Any], Any], outs: Any, where: torch.device) -> bool:
            """Whether a call with out= gives what the CPU gives without."""
            try:
                _close(run(move((tree, outs), where))[0], expected, op)
            except AssertionError:
                return False
            return True

        for case, make in OUT_CASES.items():

            def run(tree: Any) -> Any:
                (args, kwargs), outs = tree
                before = [(o.data_ptr(), o.shape) for o in tree_leaves(outs)]
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    result = op(*args, **kwargs, out=outs)
                resized = sum("was resized" in str(w.message) for w in caught)
                for o, r, (pointer, shape) in zip(tree_leaves(outs), tree_leaves(result), before, strict=True):
                    assert o is r or o.data_ptr() == r.data_ptr(), "out is not what was returned"
                    assert o.shape != shape or o.data_ptr() == pointer or not o.numel(), "out was moved"
                strides = [[s for s, n in zip(o.stride(), o.shape, strict=True) if n > 1] for o in tree_leaves(outs)]
                return result, strides, resized > 0

            try:
                outs = given(make)
                try:
                    if not compare(run, (tree, outs), device, item):
                        _raises(run, (tree, outs), device)
                except AssertionError:
                    # Some of upstream's CPU kernels write into an out of other strides as if it were contiguous.
                    cpu_wrong = case in ("transposed", "strided") and not writes(run, outs, CPU)
                    if not (cpu_wrong and writes(run, outs, device)):
                        raise
            except Exception as e:
                if isinstance(e, AssertionError) or _unimplemented(e):
                    raise type(e)(f"out ({case}): {e}") from e
                raise Mismatch(f"out ({case}): {type(e).__name__}: {e}") from e
        return True

    return _each(item, _samples(item, dtype, limit), one)


def _strided(o: Tensor) -> Tensor:
    return torch.empty([2 * n for n in o.shape], dtype=o.dtype).fill_(1)[tuple(slice(None, None, 2) for _ in o.shape)]


OUT_CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda o: torch.full_like(o, 1, memory_format=torch.contiguous_format),
    "transposed": lambda o: torch.full(o.shape[::-1], 1, dtype=o.dtype).permute(tuple(reversed(range(o.ndim)))),
    "strided": _strided,
    "empty": lambda o: torch.empty(0, dtype=o.dtype),
    "wrong shape": lambda o: torch.ones([n + 1 for n in o.shape], dtype=o.dtype),
    "wrong dtype": lambda o: torch.ones(o.shape, dtype=torch.int32 if _floating(o) else torch.bool),
}


def errors(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Upstream's bad inputs raise what upstream says; once an op, at its first dtype."""
    op = item.info
    if op.error_inputs_func is None or dtype != first_dtype(item):
        return 0

    def complaint(bad: Any) -> str | None:
        sample = bad.sample_input
        try:
            op(sample.input, *sample.args, **sample.kwargs)
        except bad.error_type as e:
            if re.search(bad.error_regex, str(e), re.DOTALL):
                return None
            return f"says {str(e)[:200]!r}, not {bad.error_regex!r}"
        except Exception as e:
            return f"{type(e).__name__}: {e}, not {bad.error_type.__name__}"
        return f"no error, where {bad.error_regex!r} is due"

    count = 0
    theirs = list(op.error_inputs("cpu"))
    for k, bad in enumerate(itertools.islice(op.error_inputs(str(device)), limit)):
        found = complaint(bad)
        if found is None:
            count += 1
        elif k >= len(theirs) or complaint(theirs[k]) is None:  # else the CPU is no better
            raise Mismatch(f"error input {k} [{_summary(bad.sample_input)}]: {found}")
    return count


def first_dtype(item: Item) -> torch.dtype:
    return torch.float32 if torch.float32 in item.dtypes or not item.dtypes else item.dtypes[0]


def fake(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Fake tensors predict the device's shapes, strides, dtypes and devices."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def predict(args: Any, kwargs: Any) -> Any:
        with FakeTensorMode() as mode:
            a, k = tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, (args, kwargs))
            return _results(item, a, k)

    def one(sample: SampleInput) -> bool:
        if not _dense(sample):
            return False
        try:  # results whose shapes depend on data can't be predicted, for the CPU neither
            _results(item, *move(_call(sample), CPU))
            predict(*move(_call(sample), CPU))
        except Exception:
            return False
        args, kwargs = move(_call(sample), device)
        predicted = predict(args, kwargs)
        real = _results(item, args, kwargs)
        _like(real, predicted)
        for r, p in zip(tree_leaves(real), tree_leaves(predicted), strict=True):
            if isinstance(r, Tensor) and r.layout == torch.strided:
                assert r.device == p.device or r.device.type == p.device.type, f"on {r.device}, predicted {p.device}"
                if r.numel():
                    ours, theirs = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (r, p))
                    assert ours == theirs, f"strides {ours}, predicted {theirs}"
        return True

    return _each(item, _samples(item, dtype, limit), one)


# Checks of modules and optimizers


def _module_runs(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None, grad: bool) -> int:
    info = item.info
    count = 0
    for training in (True, False):
        inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=grad, training=training)
        for k, given in enumerate(itertools.islice(inputs, limit)):
            if given.forward_input is None:
                continue
            torch.manual_seed(0)
            made = info.module_cls(*given.constructor_input.args, **given.constructor_input.kwargs)
            made = made.to(dtype).train(training)
            tree = (given.forward_input.args, given.forward_input.kwargs)

            def run(tree: Any, made: Any = made) -> Any:
                tensors = [v for v in tree_leaves(tree) if isinstance(v, Tensor)]
                where = tensors[0].device if tensors else CPU
                wide = next((t.dtype for t in tensors if t.dtype in (torch.float64, torch.complex128)), dtype)
                module = copy.deepcopy(made).to(where, wide)
                result = module(*tree[0], **tree[1])
                if not grad:
                    return result
                outs = [o for o in tree_leaves(result) if isinstance(o, Tensor) and o.requires_grad]
                leaves = [t for t in (*tensors, *module.parameters()) if t.requires_grad]
                if not outs or not leaves:
                    raise NotImplementedError("nothing to differentiate")
                return gradients(outs, leaves)

            try:
                count += bool(compare(run, tree, device, item, grad=grad))
            except Exception as e:
                text = " ".join(str(e).split())
                mode = "training" if training else "eval"
                raise Mismatch(f"{type(e).__name__}: {text} [input {k}, {mode}, {given.desc}]") from e
    return count


def module_forward(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """A module's outputs, in training and evaluation mode."""
    return _module_runs(item, dtype, device, limit, grad=False)


def module_backward(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """A module's gradients for inputs and parameters."""
    return _module_runs(item, dtype, device, limit, grad=True)


def optimizer(item: Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Four steps with every upstream setting, plain, foreach and fused: parameters, state and its round trip."""
    info, count = item.info, 0
    forms = [{}, *({form: True} for form in ("foreach", "fused") if form in info.supported_impls)]
    for given in itertools.islice(info.optim_inputs_func(device="cpu"), limit):
        for form in forms:
            if "fused" in form and (given.kwargs.get("differentiable") or given.kwargs.get("foreach")):
                continue
            kwargs = {k: v for k, v in given.kwargs.items() if k not in ("foreach", "fused", "capturable")}

            def run(tree: Any, form: Any = form, kwargs: Any = kwargs) -> Any:
                params = [t.detach().clone().requires_grad_() for t in tree]
                where, given_form = params[0].device, form
                if where.type == "cpu":
                    given_form = {}
                extra = {k: (v.to(where) if isinstance(v, Tensor) and v.ndim else v) for k, v in kwargs.items()}
                made = info.optim_cls(params, **extra, **given_form)
                for step in range(4):

                    def closure(params: Any = params, made: Any = made) -> Tensor:
                        made.zero_grad()
                        loss = sum((p * p).sum() + (p.sin()).sum() for p in params)
                        if info.only_supports_sparse_grads:
                            for p in params:
                                p.grad = (2 * p + p.cos()).detach().to_sparse()
                        else:
                            loss.backward()
                        return loss

                    if info.step_requires_closure:
                        made.step(closure)
                    else:
                        closure()
                        made.step()
                    if step == 1:
                        made.load_state_dict(copy.deepcopy(made.state_dict()))
                return [p.detach() for p in params]

            generator = torch.Generator().manual_seed(0)
            start = [torch.randn(s, generator=generator) for s in ((4, 3), (3,), (2, 2))]
            if item.name == "optim.Muon":
                start = [s for s in start if s.ndim == 2]
            try:
                count += bool(compare(run, start, device, item))
            except Exception as e:
                text = " ".join(str(e).split())
                raise Mismatch(f"{type(e).__name__}: {text} [{form or 'plain'}, {given.desc or 'default'}]") from e
    return count


CHECKS: dict[str, dict[str, Callable[..., int]]] = {
    "op": {
        f.__name__: f
        for f in (forward, backward, noncontiguous, reference, variants, out, errors, views, fake, gradcheck)
    },
    "ref": {"forward": forward},
    "module": {"forward": module_forward, "backward": module_backward},
    "optim": {"steps": optimizer},
}
ALL_CHECKS = tuple(dict.fromkeys(itertools.chain.from_iterable(CHECKS.values())))

assert all(list(inspect.signature(f).parameters)[:3] == ["item", "dtype", "device"] for f in CHECKS["op"].values())


def native_ops() -> set[str]:
    """Names of the aten ops that have a kernel of ours: "add", "mm" …; what works without one is decomposed."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    return {n.removeprefix("aten::").split(".")[0] for n in names if n.startswith("aten::")}
