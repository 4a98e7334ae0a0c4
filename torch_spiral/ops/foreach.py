"""The _foreach_ ops, from a table: each is an elementwise function over lists of tensors, many tensors a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels import ir
from ..kernels.kernel import DTYPES
from ..lowering import Tensor, check, composite, empty, eq, is_one, lowering, operator
from .common import broadcast, contiguous
from .multi import Operand, groups, map_rows
from .pointwise import STUBS

TORCH = {
    "f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8, "i16": torch.int16,
    "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
    "bool": torch.bool, "c32": torch.complex32, "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH.items()}


# ---- dtypes and shapes -----------------------------------------------------------------------------------------------


def _promote(tensors: Sequence[Tensor], numbers: Sequence[Any]) -> str:
    """The dtype of an op on these, by ATen's rules: tensors with dimensions, then 0-dim ones, then numbers."""
    dims = [TORCH[t.dtype] for t in tensors if t.ndim]
    zeros = [TORCH[t.dtype] for t in tensors if not t.ndim]
    kinds = [
        torch.complex64 if isinstance(n, tuple) else torch.get_default_dtype() if n.kind == "f" else torch.int64
        for n in numbers
    ]
    result: Any = None
    for dtypes in (dims, zeros, kinds):
        of_kind: Any = None
        for d in dtypes:
            of_kind = d if of_kind is None else torch.promote_types(of_kind, d)
        if of_kind is None:
            continue
        if result is None:
            result = of_kind
        elif _category(of_kind) > _category(result):
            result = torch.promote_types(result, of_kind) if _category(of_kind) == 3 else of_kind
    return NAMES[result]


def _category(d: torch.dtype) -> int:
    return 3 if d.is_complex else 2 if d.is_floating_point else 0 if d == torch.bool else 1


def _shape(tensors: Sequence[Tensor]) -> list[Any]:
    """The shape that they broadcast to, as far as the key tells sizes of 1; other sizes must be equal, which is checked."""
    ndim = max(t.ndim for t in tensors)
    out: list[Any] = []
    for d in range(ndim):
        sizes = [t.sizes[d - ndim + t.ndim] for t in tensors if d - ndim + t.ndim >= 0]
        wide = [s for s in sizes if not is_one(s)]
        out.append(wide[0] if wide else sizes[0])
        for s in wide[1:]:
            check(eq(wide[0], s), "RuntimeError", "The size of tensor a ({}) must match the size of tensor b ({}) at non-singleton dimension "
                  f"{d}", wide[0], s)  # fmt: skip
    return out


def _can_cast(result: str, to: str) -> None:
    if not torch.can_cast(TORCH[result], TORCH[to]):
        names = {"f32": "Float", "f64": "Double", "f16": "Half", "bf16": "BFloat16", "i64": "Long", "i32": "Int", "i16": "Short", "i8": "Char",
                 "u8": "Byte", "bool": "Bool", "c64": "ComplexFloat", "c128": "ComplexDouble"}  # fmt: skip
        raise RuntimeError(
            f"result type {names.get(result, result)} can't be cast to the desired output type {names.get(to, to)}"
        )


def apply(
    name: str, function: Callable[..., Any], lists: Sequence[Sequence[Tensor]], numbers: Sequence[Any], each: Sequence[Sequence[Any]],
    in_place: bool, floating: bool = False, result: str | None = None, exact: bool = False,
) -> list[Tensor] | None:  # fmt: skip
    """function(*elements of the lists, *numbers, *each's) for every tensor of lists[0]; a list of new tensors, or in place.

    floating: of integers the result is float32. result: the dtype of the results where it isn't the common one. exact: numbers
    don't take part in type promotion."""
    count = len(lists[0])
    if not count:
        raise RuntimeError("Tensor list must have at least one tensor.")
    for other in lists[1:]:
        if len(other) != count:
            raise RuntimeError(f"Tensor lists must have the same number of tensors, got {count} and {len(other)}")
    if each and len(each) != count:
        raise RuntimeError(f"Tensor list must have same number of elements as scalar list, got {count} and {len(each)}")
    outs: list[Tensor] = []
    by_dtype: dict[tuple, list[tuple[list[Operand], Sequence[Any]]]] = {}
    for i, tensors in enumerate(zip(*lists)):
        own = each[i] if each else ()
        common = _promote(tensors, () if exact else (*numbers, *own))
        if floating and DTYPES[common].kind not in ("float", "complex"):
            common = NAMES[torch.get_default_dtype()]
        sizes = _shape(tensors)
        if in_place:
            _can_cast(result or common, tensors[0].dtype)
            out = tensors[0]
        else:
            out = empty(sizes, result or common)
            outs.append(out)
        ins = [t if t.ndim == len(sizes) and t is tensors[0] else broadcast(t, sizes) for t in tensors]
        ins = [contiguous(t) if t.is_conj or t.is_neg else t for t in ins]
        row = [Operand(out, "rw"), *map(Operand, ins[1:])] if in_place else [Operand(out, "w"), *map(Operand, ins)]
        by_dtype.setdefault((common, tuple(isinstance(n, tuple) for n in own)), []).append((row, own))
    for (common, _), members in by_dtype.items():
        own_of = {id(row): own for row, own in members}
        for group in groups([row for row, _ in members]):
            map_rows(
                f"{name}{'_' * in_place}",
                function,
                group,
                common,
                numbers,
                row_values=[own_of[id(row)] for row in group] if each else (),
            )
    return None if in_place else outs


# ---- functions of one list -------------------------------------------------------------------------------------------

FLOATING = [
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "exp",
    "expm1",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "reciprocal",
    "rsqrt",
    "sigmoid",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
]
ANY = ["abs", "ceil", "floor", "frac", "neg", "round", "sign", "trunc"]


def _define_unary(op: str) -> None:
    function = STUBS[f"{op}_stub"][1]

    @lowering(f"_foreach_{op}", coarse=True)
    def body(tensors: list[Tensor]) -> Any:
        return _unary(op, function, tensors, False)

    @lowering(f"_foreach_{op}_", coarse=True)
    def body_(tensors: list[Tensor]) -> Any:
        return _unary(op, function, tensors, True)


def _unary(op: str, function: Callable[..., Any], tensors: list[Tensor], in_place: bool) -> Any:
    if op == "abs" and not in_place and tensors and all(DTYPES[t.dtype].kind == "complex" for t in tensors):
        real = {"c32": "f16", "c64": "f32", "c128": "f64"}[tensors[0].dtype]
        if all(t.dtype == tensors[0].dtype for t in tensors):
            return apply(op, function, [tensors], (), (), False, result=real)
    if op == "neg" and any(t.dtype == "bool" for t in tensors):
        raise RuntimeError("Negation, the `-` operator, on a bool tensor is not supported. If you are trying to invert a mask, use the "
                           "`~` or `logical_not()` operator instead.")  # fmt: skip
    return apply(op, function, [tensors], (), (), in_place, floating=op in FLOATING)


for _op in (*FLOATING, *ANY):
    _define_unary(_op)


@lowering("_foreach_zero_", coarse=True)
def foreach_zero_(tensors: list[Tensor]) -> None:
    """Zero in every element."""
    apply("zero", _zero, [tensors], (), (), True)


def _zero(x: Any) -> Any:
    return (
        ir.Complex(ir.const(0.0, x.dtype), ir.const(0.0, x.dtype))
        if isinstance(x, ir.Complex)
        else ir.const(0, x.dtype)
    )


def _same(x: Any) -> Any:
    return x


# ---- two lists, or a list and numbers --------------------------------------------------------------------------------


def _numbers_as_elements(op: Callable[..., Any]) -> Callable[..., Any]:
    """op with numbers converted to the elements' dtype: bool and small integers travel as int32."""

    def f(*args: Any) -> Any:
        dtype = args[0].dtype
        complex_ = any(isinstance(a, ir.Complex) for a in args)
        return op(*[a if complex_ or isinstance(a, ir.Complex) else ir.cast(a, dtype) for a in args])

    return f


def _lerp(a: Any, b: Any, weight: Any) -> Any:
    return STUBS["lerp_kernel_scalar_weight"][1](a, b, weight)


def _reversed_pow(exponent: Any, base: Any) -> Any:
    return ir.pow(base, exponent)


# op: (function, whether integers give floats, whether there is an overload with a tensor of one element)
BINARY = {
    "mul": (STUBS["mul_stub"][1], False, True),
    "div": (ir.div, True, True),
    "maximum": (STUBS["maximum_stub"][1], False, False),
    "minimum": (STUBS["minimum_stub"][1], False, False),
    "clamp_min": (STUBS["maximum_stub"][1], False, False),
    "clamp_max": (STUBS["minimum_stub"][1], False, False),
    "pow": (ir.pow, False, False),
    "add": (lambda a, b: ir.or_(a, b) if getattr(a, "dtype", "") == "bool" else a + b, False, True),
    "sub": (ir.sub, False, False),
}
WITH_ALPHA = {"add": STUBS["add_stub"][1], "sub": STUBS["sub_stub"][1]}
TERNARY = {"addcmul": STUBS["addcmul_stub"][1], "addcdiv": STUBS["addcdiv_stub"][1]}


def _define_binary(op: str, in_place: bool) -> None:
    function, floating, with_tensor = BINARY[op]
    function = _numbers_as_elements(function)
    alpha = _numbers_as_elements(WITH_ALPHA[op]) if op in WITH_ALPHA else None
    name = f"_foreach_{op}{'_' * in_place}"

    @lowering(f"{name}.Scalar", coarse=True)
    def scalar(tensors: list[Tensor], number: Any) -> Any:
        return apply(op, function, [tensors], [number], (), in_place, floating)

    @lowering(f"{name}.List", coarse=True)
    def pairs(tensors: list[Tensor], others: list[Tensor], *factor: Any) -> Any:
        if alpha is None:
            return apply(op, function, [tensors, others], (), (), in_place, floating)
        return apply(f"{op}_alpha", alpha, [tensors, others], factor, (), in_place, exact=True)

    @lowering(f"{name}.ScalarList", coarse=True)
    def numbers(tensors: list[Tensor], count: int, *scalars: Any) -> Any:
        return apply(op, function, [tensors], (), [(s,) for s in scalars], in_place, floating)

    if not with_tensor:
        return
    lists, result = ("Tensor(a!)[]", "()") if in_place else ("Tensor[]", "Tensor[]")
    factor = ", Scalar alpha=1" if alpha else ""

    @operator(f"{name[1:]}({lists} self, Tensor other{factor}) -> {result}", coarse=True)
    def with_one(tensors: list[Tensor], other: Tensor, *factor: Any) -> Any:
        others = [other.view((), ())] * len(tensors)
        if alpha is None:
            return apply(op, function, [tensors, others], (), (), in_place, floating)
        return apply(f"{op}_alpha", alpha, [tensors, others], factor, (), in_place, exact=True)

    @composite(f"{name}.Tensor")
    def body(tensors: Sequence[torch.Tensor], other: torch.Tensor, **alpha: Any) -> Any:
        if other.dim() or other.numel() != 1:
            raise RuntimeError(
                f"scalar tensor expected to be 0 dim but it has {other.dim()} dimensions and {other.numel()} elements."
            )
        if other.device.type == "cpu" and not alpha:
            return getattr(torch.ops.aten, name).Scalar(tensors, other.item())
        own = getattr(torch.ops.spiral, name[1:])
        return own(tensors, other.to(tensors[0].device), *alpha.values())


def _define_ternary(op: str, in_place: bool) -> None:
    function = _numbers_as_elements(TERNARY[op])
    name = f"_foreach_{op}{'_' * in_place}"

    @lowering(f"{name}.Scalar", coarse=True)
    def scalar(a: list[Tensor], b: list[Tensor], c: list[Tensor], value: Any) -> Any:
        return apply(op, function, [a, b, c], [value], (), in_place, op == "addcdiv", exact=True)

    @lowering(f"{name}.ScalarList", coarse=True)
    def numbers(a: list[Tensor], b: list[Tensor], c: list[Tensor], count: int, *scalars: Any) -> Any:
        return apply(op, function, [a, b, c], (), [(s,) for s in scalars], in_place, op == "addcdiv", exact=True)

    @composite(f"{name}.Tensor")
    def body(a: Any, b: Any, c: Any, scalars: torch.Tensor) -> Any:
        if scalars.device.type != "cpu":
            raise RuntimeError(f"Expected scalars to be on CPU, got {scalars.device} instead.")
        if scalars.dim() != 1 or len(scalars) != len(a):
            raise RuntimeError("Expected length of scalars to match input of length "
                               f"{len(a)} but got {scalars.numel()} instead.")  # fmt: skip
        return getattr(torch.ops.aten, name).ScalarList(a, b, c, scalars.tolist())


def _define_lerp(in_place: bool) -> None:
    name = f"_foreach_lerp{'_' * in_place}"
    function = _numbers_as_elements(_lerp)

    @lowering(f"{name}.List", coarse=True)
    def tensors(a: list[Tensor], b: list[Tensor], weights: list[Tensor]) -> Any:
        return apply("lerp", function, [a, b, weights], (), (), in_place)

    @lowering(f"{name}.Scalar", coarse=True)
    def scalar(a: list[Tensor], b: list[Tensor], weight: Any) -> Any:
        return apply("lerp", function, [a, b], [weight], (), in_place, exact=True)

    @lowering(f"{name}.ScalarList", coarse=True)
    def numbers(a: list[Tensor], b: list[Tensor], count: int, *weights: Any) -> Any:
        return apply("lerp", function, [a, b], (), [(w,) for w in weights], in_place, exact=True)


for _in_place in (False, True):
    for _op in BINARY:
        _define_binary(_op, _in_place)
    for _op in TERNARY:
        _define_ternary(_op, _in_place)
    _define_lerp(_in_place)

_power = _numbers_as_elements(_reversed_pow)


@lowering("_foreach_pow.ScalarAndTensor", coarse=True)
def foreach_pow_scalar_and_tensor(base: Any, exponents: list[Tensor]) -> Any:
    """base ** exponent for every exponent."""
    return apply("reversed_pow", _power, [exponents], [base], (), False)


# ---- copies ----------------------------------------------------------------------------------------------------------


@operator("foreach_copy_(Tensor(a!)[] self, Tensor[] src) -> ()", coarse=True)
def copy_lists_(tensors: list[Tensor], sources: list[Tensor]) -> None:
    """Every tensor = its source, converted and broadcast."""
    rows = [[Operand(out, "w"), Operand(contiguous(s) if s.is_conj or s.is_neg else broadcast(s, out.sizes))]
            for out, s in zip(tensors, sources, strict=True)]  # fmt: skip
    for group in groups(rows):
        map_rows("copy", _same, group, group[0][1].tensor.dtype)


@composite("_foreach_copy_")
def foreach_copy_(tensors: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], non_blocking: bool = False) -> None:
    """Copies, between devices too."""
    if len(tensors) != len(sources):
        raise RuntimeError(f"Tensor lists must have the same number of tensors, got {len(tensors)} and {len(sources)}")
    device = tensors[0].device
    if all(t.device == device for t in (*tensors, *sources)) and not any(t.is_conj() or t.is_neg() for t in tensors):
        torch.ops.spiral.foreach_copy_(tensors, sources)
        return
    for t, s in zip(tensors, sources):
        t.copy_(s, non_blocking)
