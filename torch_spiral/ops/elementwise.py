"""Lowers a TensorIterator to one pointwise kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..kernels import ir, nest
from ..kernels.kernel import DTYPES, Target, bits_dtype, compute_dtype
from ..lowering import Iter, IterOperand, Sym, build, check, is_one, is_zero, launch, not_implemented, where

SCALAR_TYPES = {"f32": "f32", "f64": "f64", "i32": "i32", "i64": "i64", "u32": "u32", "u64": "i64", "bool": "i32"}


# Kinds of compute dtype that an op takes, where ATen's own kernels, and nothing before them, refuse the others.
KINDS = {
    "int bool": "bitwise_and bitwise_or bitwise_xor bitwise_not",
    "int": "lshift rshift gcd lcm",
    "int float": "remainder fmod",
    "float": "atan2 hypot copysign nextafter logit mse smooth_l1 huber gelu elu softplus hardsigmoid hardswish hardshrink "
    "softshrink leaky_relu glu mish prelu frac round_decimals erfinv lgamma digamma",
    "float complex": "silu sigmoid sinc",
}
_KINDS = {name: kinds.split() for kinds, names in KINDS.items() for name in names.split()}


def _check_kind(name: str, dtype: str) -> None:
    """Refuses a dtype of a kind that the op does not take, as AT_DISPATCH does."""
    kinds = _KINDS.get(name.removesuffix("_stub"))
    if kinds and DTYPES[dtype].kind.replace("uint", "int") not in kinds:
        check(False, "NotImplementedError", not_implemented(name, dtype))


def stride_classes(strides: Sequence[Any]) -> tuple[str, ...]:
    """ "0", "1" or "s" per dimension, from the classes of strides."""
    return tuple("0" if is_zero(s) else "1" if is_one(s) else "s" for s in strides)


def as_dtype(x: Any, dtype: str) -> Any:
    """A loaded value in the compute dtype of `dtype`: a pair for complex dtypes and their bits."""
    part = compute_dtype(dtype)
    if DTYPES[dtype].is_pair:
        if isinstance(x, ir.Complex):
            return ir.Complex(ir.cast(x.re, part), ir.cast(x.im, part))
        return ir.Complex(ir.cast(x, part), ir.const(0, part))
    if isinstance(x, ir.Complex):
        x = ir.or_(ir.ne(x.re, 0.0), ir.ne(x.im, 0.0)) if dtype == "bool" else x.re
    return ir.cast(x, part)


def pointwise(name: str, it: Iter, function: Callable[..., Any], compute: str, extras: Sequence[Any] = (), loops: bool = False,
              enabled: Any = None) -> None:  # fmt: skip
    """outputs = function(*inputs, *extras) for every element.

    compute: "common", "in" or "out" as in pointwise.py, a dtype's name, or "copy": bits where the dtypes agree, else a
    conversion. extras: Syms (and pairs of them, for complex numbers) become scalars of the kernel; anything else is part
    of it. loops: function takes the KernelBuilder first, and emits statements; its values have one lane. enabled: a Sym, 0 on
    calls that skip the launch."""
    first = it.outputs[0].dtype
    dtype = {"common": it.common or first, "in": it.inputs[0].dtype if it.inputs else first, "out": first}.get(
        compute, compute
    )
    _check_kind(name, dtype)
    bits = False
    if compute == "copy":
        dtype = first
        source = it.inputs[0]
        if source.dtype == first and source.tensor is not None:
            bits = True
            flags = source.tensor.flags ^ it.outputs[0].tensor.flags if it.outputs[0].tensor else 0
            assert not flags >> 25 & 3, "conjugate and negative views are resolved before a copy"
    tensors = [o for o in (*it.outputs, *it.inputs) if not o.is_scalar]
    shape: Sequence[Any] = it.shape or (1,)

    def strides(o: IterOperand) -> tuple[Any, ...]:
        return o.strides if it.ndim else (0,)

    def layout(o: IterOperand) -> Any:
        classes = stride_classes(strides(o))
        return "dense" if classes == ("1",) else classes

    values: list[Any] = []
    part = compute_dtype(dtype)
    inputs: list[Any] = []
    for o in it.inputs:
        if o.is_scalar:
            inputs.append(("value", o.dtype, 1))
            values += o.value if isinstance(o.value, tuple) else [o.value]
        else:
            inputs.append((o.dtype, layout(o), o.tensor.windows))  # type: ignore[union-attr]
    static: list[Any] = []
    for e in extras:
        if isinstance(e, tuple):
            static.append("complex")
            values += e
        elif isinstance(e, Sym):
            static.append("float" if e.kind == "f" and part not in ("f32", "f64") else "number")
            values.append(e)
        else:
            static.append(("is", e))
    outputs = tuple((o.dtype, layout(o), o.tensor.windows) for o in it.outputs)  # type: ignore[union-attr]
    built = build(
        _kernel, name, function, dtype, bits, len(shape), outputs, tuple(inputs),
        tuple(static), it.common, loops,
    )  # fmt: skip
    grid = built.groups(shape)
    launch(
        built.kernel,
        [o.tensor for o in tensors],  # type: ignore[misc]
        built.scalars(shape, [strides(o) for o in tensors], values),
        grid if enabled is None else (where(enabled, grid[0], 0), *grid[1:]),
    )


def _kernel(
    target: Target, name: str, function: Callable[..., Any], dtype: str, bits: bool, ndim: int, outputs: tuple, inputs: tuple,
    extras: tuple, common: str | None, loops: bool,
) -> nest.Nest:  # fmt: skip
    part = compute_dtype(dtype)
    scalars: list[str] = []
    reads: list[Callable[[Any, Any], Any]] = []  # from (iterator of loads, iterator of values) to an argument

    for kind, layout, _ in inputs:
        if kind != "value":
            reads.append(lambda loads, values: next(loads) if bits else as_dtype(next(loads), dtype))
            continue
        own = DTYPES[layout]
        if own.kind == "complex":
            scalars += [part, part]
            reads.append(lambda loads, values: as_dtype(ir.Complex(next(values), next(values)), dtype))
        else:
            # A number is converted to the compute dtype on the host where both are of a kind, else here.
            floating = own.kind == "float"
            own_part = part if floating == (part in ("f32", "f64")) else ("f32" if floating else "i64")
            scalars.append(SCALAR_TYPES[own_part])
            reads.append(lambda loads, values: as_dtype(next(values), dtype))
    for e in extras:
        if e == "complex":
            scalars += [part, part]
            reads.append(lambda loads, values: ir.Complex(next(values), next(values)))
        elif e == "number":
            scalars.append(SCALAR_TYPES[part])
            kind = "i32" if part == "bool" else part
            reads.append(lambda loads, values, kind=kind: ir.cast(next(values), kind))  # type: ignore[misc]
        elif e == "float":
            scalars.append("f32")
            reads.append(lambda loads, values: next(values))
        else:
            reads.append(lambda loads, values, e=e: e[1])  # type: ignore[misc]

    loads = [i for i in inputs if i[0] != "value"]

    def expression(*args: Any) -> Any:
        first = [args[0].k] if loops else []
        args = args[len(first) :]
        of_loads, of_values = iter(args[: len(loads)]), iter(args[len(loads) :])
        result = function(*first, *[read(of_loads, of_values) for read in reads])
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if bits:
            return result
        for i, (r, (out, *_)) in enumerate(zip(results, outputs)):
            if isinstance(r, (bool, int, float)):
                r = ir.const(r, part)
            if (
                common in ("f16", "bf16")
                and out in ("f32", "f64")
                and not isinstance(r, ir.Complex)
                and r.dtype == "f32"
            ):
                r = ir.round_to(r, common)
            results[i] = as_dtype(r, out)
        return results[0] if len(results) == 1 else tuple(results)

    storage = bits_dtype if bits else lambda d: d
    label = f"{name}_{dtype}" + "".join(f"_{e if isinstance(e, str) else e[1]}" for e in extras)
    if scalars:  # which inputs are numbers, and as what they travel
        label += "_" + "".join("v" if kind == "value" else "t" for kind, *_ in inputs) + "".join(scalars)
        label += "".join(d for kind, d, _ in inputs if kind == "value" and d != dtype)
    if common in ("f16", "bf16"):
        label += f"_{common}"
    return nest.pointwise(
        target, label.replace(".", "_").replace("-", "m"),
        [nest.Operand(f"o{i}", storage(d), *rest) for i, (d, *rest) in enumerate(outputs)],
        [nest.Operand(f"i{i}", storage(d), *rest) for i, (d, *rest) in enumerate(loads)],
        expression, ndim, scalars=scalars, context=loops, lanes=1 if loops else 0,
    )  # fmt: skip
