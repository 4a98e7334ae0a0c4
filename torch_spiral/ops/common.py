"""What several families of lowerings need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..kernels import ir, nest
from ..kernels.kernel import DTYPES, Target, bits_dtype, compute_dtype
from ..lowering import Tensor, build, composite, divisible_by, empty, is_one, is_zero, launch, packed, target
from .elementwise import as_dtype


def braces(n: int) -> str:
    """The text of a shape of n dimensions, for `check`: "[{}, {}]"."""
    return "[" + ", ".join(["{}"] * n) + "]"


def layout_of(x: Tensor, sizes: Sequence[Any]) -> tuple[str, ...]:
    """Stride classes of x, the fastest dimension first; dimensions of size 1 count as stride 0."""
    return tuple(
        "0" if is_one(n) or is_zero(s) else "1" if is_one(s) else "s"
        for n, s in zip(reversed(sizes), reversed(x.strides))
    )


def map_tensors(name: str, function: Callable[..., Any], outs: Sequence[Tensor], ins: Sequence[Tensor], values: Sequence[Any] = (),
                types: Sequence[str] = ()) -> None:  # fmt: skip
    """outs = function(*ins, *values) element by element. All tensors have the shape of outs[0] (expand with `broadcast`).

    `name` and the dtypes must say what function computes, and function must live as long as the module. values: Syms, with their
    scalar types ("f32", "i32", …). A result is converted to its output's dtype; inputs arrive in their compute dtypes."""
    sizes = outs[0].sizes or (1,)

    dense = all(x.is_contiguous for x in (*outs, *ins))
    if dense:
        shape: list[Any] = [outs[0].numel]
        outs_l, ins_l = ["dense"] * len(outs), ["dense"] * len(ins)
        strides: list[Any] = [None] * (len(outs) + len(ins))
    else:
        shape = list(reversed(sizes))
        outs_l = [layout_of(x, sizes) if x.sizes else ("0",) for x in outs]  # type: ignore[misc]
        ins_l = [layout_of(x, sizes) if x.sizes else ("0",) for x in ins]  # type: ignore[misc]
        strides = [tuple(reversed(x.strides)) if x.sizes else (0,) for x in (*outs, *ins)]
    built = build(
        _map_kernel, name, function, len(shape), tuple((x.dtype, layout, x.windows) for x, layout in zip(outs, outs_l)),
        tuple((x.dtype, layout, x.windows) for x, layout in zip(ins, ins_l)), tuple(types),
    )  # fmt: skip
    launch(built.kernel, [*outs, *ins], built.scalars(shape, strides, values), built.groups(shape))


def _map_kernel(
    target: Target, name: str, function: Callable[..., Any], ndim: int, outs: tuple, ins: tuple, types: tuple
) -> nest.Nest:
    def expression(*args: Any) -> Any:
        result = function(*args)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        results = [
            as_dtype(ir.const(r, compute_dtype(d)) if isinstance(r, (int, float)) else r, d)
            for r, (d, _, _) in zip(results, outs)
        ]
        return results[0] if len(results) == 1 else tuple(results)

    label = name + ("_" + "".join(types) if types else "")
    return nest.pointwise(
        target, label,
        [nest.Operand(f"o{i}", *o) for i, o in enumerate(outs)],
        [nest.Operand(f"i{i}", *o) for i, o in enumerate(ins)],
        expression, ndim, scalars=types,
    )  # fmt: skip


def _identity(x: Any) -> Any:
    return x


def _conjugate(x: Any) -> Any:
    return ir.conj(x)


def copy_to(out: Tensor, x: Tensor) -> None:
    """out = x, converted; x has out's shape. Resolves conjugate and negative views of x."""
    if x.is_conj or x.is_neg:
        negate = x.is_neg
        name = "copy_" + "conj" * x.is_conj + "neg" * negate
        map_tensors(
            name, {(True, False): _conjugate, (False, True): ir.neg}.get((x.is_conj, negate), _conj_neg), [out], [x]
        )
    elif out.dtype == x.dtype:
        bits = bits_dtype(x.dtype)
        map_tensors("copy", _identity, [out.with_dtype(bits)], [x.with_dtype(bits)])
    else:
        map_tensors("convert", _identity, [out], [x])


def _conj_neg(x: Any) -> Any:
    return ir.neg(ir.conj(x))


def converted(x: Tensor, dtype: str) -> Tensor:
    """A weight in another dtype, contiguous, kept as packed forms are: autocast's conversion of weights is left to us."""
    if x.dtype == dtype:
        return x
    with packed(x, x.sizes, dtype, "converted") as p:
        copy_to(p, x)
    return p


def contiguous(x: Tensor, dtype: str | None = None) -> Tensor:
    """x as a contiguous tensor of `dtype`: x itself where it is one, else a copy for the time of the call."""
    dtype = dtype or x.dtype
    if x.is_contiguous and x.dtype == dtype and not x.is_conj and not x.is_neg:
        return x
    return copied(x, dtype)


def copied(x: Tensor, dtype: str | None = None) -> Tensor:
    """A contiguous tensor of its own with x's elements, of `dtype` (default: x's), for the time of the call."""
    out = empty(x.sizes, dtype or x.dtype)
    copy_to(out, x)
    return out


def broadcast(x: Tensor, sizes: Sequence[Any]) -> Tensor:
    """x expanded to `sizes` (aligned at the last dimension). Where a size of x is not known to be 1, it must be equal."""
    missing = len(sizes) - x.ndim
    if not missing and all(is_one(n) == is_one(m) for n, m in zip(x.sizes, sizes)):
        return x  # it has the shape, and its key may say that it is contiguous
    strides: list[Any] = [0] * missing
    strides += [0 if is_one(n) else s for n, s in zip(x.sizes, x.strides)]
    return x.view(sizes, strides, None)


def fill(out: Tensor, value: int | float) -> None:
    """out = value, of Python."""
    map_tensors(f"fill_{str(value).replace('-', 'm').replace('.', '_')}", _constant(value), [out], [])


_constants: dict[Any, Callable[..., Any]] = {}


def _constant(value: Any) -> Callable[..., Any]:
    return _constants.setdefault((type(value), value), lambda: value)


def resize_out(out: Any, shape: list[int] | tuple[int, ...]) -> Any:
    """An out= argument in the shape of the result, with ATen's warning where it had elements and another shape."""
    import torch

    return torch._prims_common.wrappers._maybe_resize_out(out, shape)


def write_out(out: Any, result: Any) -> Any:
    """out = result, resized as out= arguments are."""
    return resize_out(out, result.shape).copy_(result)


def out_variant(name: str, function: str, *outs: str) -> None:
    """Registers the out= overload `name` of an aten op by its functional overload `function`: the results are copied into the
    arguments `outs`, resized as out= arguments are."""
    import torch

    base, _, overload = function.partition(".")

    def body(*args: Any, **kwargs: Any) -> Any:
        targets = [kwargs.pop(o) for o in outs]
        results = getattr(getattr(torch.ops.aten, base), overload or "default")(*args, **kwargs)
        for out, result in zip(targets, results if isinstance(results, (tuple, list)) else (results,)):
            resize_out(out, result.shape)
            torch._prims_common.wrappers._safe_copy_out(copy_from=result, copy_to=out)
        return targets[0] if len(targets) == 1 else tuple(targets)

    composite(name)(body)


def described(x: Tensor, *strides: Any) -> bool:
    """Whether a tensor descriptor can read x (kernels/block): the device has a copy engine that does, and x starts at a multiple
    of 16 bytes, as do the rows and matrices at these strides (elements)."""
    step = 16 // DTYPES[x.dtype].size
    return target().capability >= 90 and x.aligned(step) and all(divisible_by(s, step) for s in strides)
