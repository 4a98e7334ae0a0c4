# mypy: disable-error-code="override"
"""Inductor's ops as expressions of kernels/ir.py: its loop bodies, run under Overrides, leave nodes instead of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from ..kernels import ir
from ..kernels.kernel import FLOAT8, NARROW_FLOATS, compute_dtype
from . import compat
from .compat import V
from .dtypes import DTYPES
from .indices import floor_division

TORCH = {name: dtype for dtype, name in DTYPES.items()}
SMALL = ("i8", "i16", "u8", "u16")
MAX_INDEX = 2**31 - 1


def dtype_name(dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise NotImplementedError(f"spiral's compiler has no {dtype}")
    return DTYPES[dtype]


class Value(compat.CSEVariable):
    """A value in a fused kernel: Inductor's variable with the expression that it stands for."""

    node: ir.Node

    def update_on_args(self, name: str, args: Any, kwargs: Any) -> None:
        pass


def node(x: Any, like: str | None = None) -> ir.Node:
    """The expression of a Value or a number."""
    x = x.value if isinstance(x, compat.OpsValue) else x
    if isinstance(x, Value):
        return x.node
    if isinstance(x, ir.Node):
        return x
    if isinstance(x, sympy.Expr):
        return index_node(x)
    if like is None:
        like = "bool" if isinstance(x, bool) else "i64" if isinstance(x, int) else "f32"
    return ir.const(x, like)


def nodes(*xs: Any) -> list[ir.Node]:
    """Expressions of values of which some may be Python numbers, in the others' dtype."""
    like = next((v.dtype for v in (_peek(x) for x in xs) if v is not None), None)
    return [node(x, like if like and not (isinstance(x, float) and like not in ir.FLOATS) else None) for x in xs]


def _peek(x: Any) -> ir.Node | None:
    x = x.value if isinstance(x, compat.OpsValue) else x
    return x.node if isinstance(x, Value) else x if isinstance(x, ir.Node) else None


# ---- sizes and indices ------------------------------------------------------------------------------------------------


def index_node(expr: Any, dtype: str = "i32") -> ir.Node:
    """A sympy expression over coordinates, sizes and loaded indices as an expression of integers."""
    kernel = V.kernel

    def visit(e: Any) -> ir.Node:
        if isinstance(e, int):
            return ir.const(e, dtype)
        if e.is_Integer:
            return ir.const(int(e), dtype)
        if e.is_Symbol:
            return ir.cast(kernel.symbol_node(e), dtype)
        if e.is_Add:
            out = visit(e.args[0])
            for a in e.args[1:]:
                if a.is_Mul and a.args[0] == -1:
                    out = ir.sub(out, visit(-a))
                else:
                    out = ir.add(out, visit(a))
            return out
        if e.is_Mul:
            out = visit(e.args[0])
            for a in e.args[1:]:
                out = ir.mul(out, visit(a))
            return out
        if isinstance(e, (compat.FloorDiv, compat.CleanDiv)):
            return _divide(visit(e.args[0]), visit(e.args[1]), _positive(e.args[0]))
        if isinstance(e, compat.ModularIndexing):
            x, divisor, modulus = e.args
            q = visit(x) if divisor == 1 else _divide(visit(x), visit(divisor), _positive(x))
            return _modulo(q, visit(modulus), _positive(x))
        if isinstance(e, (compat.PythonMod, sympy.Mod)):
            return _modulo(visit(e.args[0]), visit(e.args[1]), _positive(e.args[0]))
        if isinstance(e, compat.CeilDiv):
            a, b = visit(e.args[0]), visit(e.args[1])
            return _divide(a + (b - 1), b, _positive(e.args[0]))
        if isinstance(e, sympy.Abs):
            return ir.abs(visit(e.args[0]))
        if isinstance(e, compat.Identity):
            return visit(e.args[0])
        if isinstance(e, (compat.Max, sympy.Max)):
            return _fold(ir.maximum, [visit(a) for a in e.args])
        if isinstance(e, (compat.Min, sympy.Min)):
            return _fold(ir.minimum, [visit(a) for a in e.args])
        if isinstance(e, compat.Where) or type(e).__name__ == "Where":
            return ir.where(condition(e.args[0]), visit(e.args[1]), visit(e.args[2]))
        if isinstance(e, sympy.Pow) or type(e).__name__ == "PowByNatural":
            base, exponent = e.args
            if getattr(exponent, "is_Integer", False) and exponent > 0:
                return _fold(ir.mul, [visit(base)] * int(exponent))
        if isinstance(e, (sympy.Rel, sympy.logic.boolalg.BooleanFunction)):
            return ir.cast(condition(e), dtype)
        if isinstance(e, sympy.floor) and e.args[0].is_Mul:
            top, bottom = e.args[0].as_numer_denom()
            return _divide(visit(top), visit(bottom), _positive(top))
        raise NotImplementedError(f"spiral's compiler cannot index with {type(e).__name__}: {e}")

    def condition(e: Any) -> ir.Node:
        relations = {"Equality": ir.eq, "Unequality": ir.ne, "StrictLessThan": ir.lt, "LessThan": ir.le,
                     "StrictGreaterThan": ir.gt, "GreaterThan": ir.ge}  # fmt: skip
        if type(e).__name__ in relations:
            return relations[type(e).__name__](visit(e.args[0]), visit(e.args[1]))
        if e in (sympy.true, sympy.false):
            return ir.const(e == sympy.true, "bool")
        if isinstance(e, sympy.And):
            return _fold(ir.and_, [condition(a) for a in e.args])
        if isinstance(e, sympy.Or):
            return _fold(ir.or_, [condition(a) for a in e.args])
        if isinstance(e, sympy.Not):
            return ir.not_(condition(e.args[0]))
        raise NotImplementedError(f"spiral's compiler has no condition {e}")

    return visit(expr)


def _fold(f: Callable[[Any, Any], Any], xs: list[Any]) -> Any:
    out = xs[0]
    for x in xs[1:]:
        out = f(out, x)
    return out


def _positive(e: Any) -> bool:
    """Whether an index is known not to be negative."""
    if e.is_nonnegative:
        return True
    if e.has(sympy.Abs):
        return False
    symbols = V.kernel.range_symbols()
    return all(s in symbols or s.is_nonnegative for s in e.free_symbols) and not any(
        c.is_negative for c in sympy.preorder_traversal(e) if c.is_number
    )


def _divide(a: ir.Node, b: ir.Node, positive: bool) -> ir.Node:
    return ir.idiv(a, b) if positive else floor_division("quotient", a, b)


def _modulo(a: ir.Node, b: ir.Node, positive: bool) -> ir.Node:
    return ir.irem(a, b) if positive else floor_division("remainder", a, b)


# ---- ops ----------------------------------------------------------------------------------------------------------------


def _unary(f: Callable[[Any], Any]) -> Any:
    def op(x: Any) -> ir.Node:
        return f(node(x))

    return staticmethod(op)


def _float_unary(f: Callable[[Any], Any]) -> Any:
    def op(x: Any) -> ir.Node:
        x = node(x)
        return f(x if x.dtype in ir.FLOATS else ir.cast(x, "f32"))

    return staticmethod(op)


def _binary(f: Callable[[Any, Any], Any], boolean: Callable[[Any, Any], Any] | None = None) -> Any:
    def op(a: Any, b: Any) -> ir.Node:
        a, b = nodes(a, b)
        if a.dtype == b.dtype == "bool" and boolean is not None:
            return boolean(a, b)
        return f(a, b)

    return staticmethod(op)


def _truth(x: Any) -> ir.Node:
    return ir.cast(node(x), "bool")


def _true_divide(a: Any, b: Any) -> ir.Node:
    if a.dtype not in ir.FLOATS and b.dtype not in ir.FLOATS:
        a, b = ir.cast(a, "f32"), ir.cast(b, "f32")
    return ir.div(a, b)


def _short(x: ir.Node) -> ir.Node | None:
    """The value in 32 bits, where it has no more."""
    if x.op == "const" and x.dtype == "i64":
        return ir.cast(x, "i32") if abs(x.attr) <= MAX_INDEX else None
    x = x.args[0] if x.op == "cast" and x.dtype == "i64" else x
    return x if x.dtype == "i32" else None


def _comparison(name: str) -> Any:
    """Comparisons of indices take 32 bits."""
    f = getattr(ir, name)

    def op(a: Any, b: Any) -> ir.Node:
        a, b = nodes(a, b)
        shorter = [_short(a), _short(b)]
        for i, y in enumerate((b, a)):
            index = shorter[i]
            if index is None or shorter[1 - i] is not None or y.dtype != "i64" or name not in ("eq", "ne"):
                continue
            if index.op != "const" and not any(n.op == "load" for n in ir.walk(index)):
                low = ir.cast(y, "i32")
                shorter[1 - i] = ir.where(ir.eq(ir.cast(low, "i64"), y), low, -MAX_INDEX - 1)  # which no index is
        return f(a, b) if None in shorter else f(*shorter)

    return staticmethod(op)


def _shift(f: Callable[[Any, Any], Any]) -> Any:
    def op(a: Any, b: Any) -> ir.Node:
        return f(*nodes(a, b))

    return staticmethod(op)


def philox(seed: ir.Node, offset: ir.Node) -> list[ir.Node]:
    """Four u32 of Philox 4x32-10 with the key `seed` (i64) and the counter (offset, 0, 0, 0)."""
    seed, offset = ir.cast(seed, "u64"), ir.cast(offset, "u64")
    key = [ir.cast(seed, "u32"), ir.cast(ir.shr(seed, 32), "u32")]
    c = [ir.cast(offset, "u32"), ir.cast(ir.shr(offset, 32), "u32"), ir.const(0, "u32"), ir.const(0, "u32")]
    for _ in range(10):
        low, high = [], []
        for x, m in ((c[0], 0xD2511F53), (c[2], 0xCD9E8D57)):
            p = ir.mul(ir.cast(x, "u64"), ir.const(m, "u64"))
            low.append(ir.cast(p, "u32"))
            high.append(ir.cast(ir.shr(p, 32), "u32"))
        c = [ir.xor(ir.xor(high[1], c[1]), key[0]), low[1], ir.xor(ir.xor(high[0], c[3]), key[1]), low[0]]
        key = [key[0] + ir.const(0x9E3779B9, "u32"), key[1] + ir.const(0xBB67AE85, "u32")]
    return c


def _uniform(bits: ir.Node) -> ir.Node:
    """[0, 1) from the upper 24 bits."""
    return ir.cast(ir.shr(bits, 8), "f32") * (1.0 / 16777216.0)


class Overrides(compat.OpOverrides):
    """Each op gives a node; compat.CSE (see codegen.py) wraps it in a Value."""

    @staticmethod
    def constant(value: Any, dtype: torch.dtype) -> ir.Node:
        name = dtype_name(dtype)
        return (
            ir.round_to(ir.const(value, compute_dtype(name)), name)
            if name in SMALL
            else ir.const(value, compute_dtype(name))
        )

    @staticmethod
    def index_expr(expr: sympy.Expr, dtype: torch.dtype) -> ir.Node:
        """An index: 32 bits, as FusedKernel.index_dtype says."""
        n = index_node(V.kernel.prepare_indexing(expr))
        return n if dtype in (torch.int32, torch.int64) else ir.cast(n, dtype_name(dtype))

    @staticmethod
    def value_expr(expr: sympy.Expr, dtype: torch.dtype) -> ir.Node:
        """An index used as a number of its dtype."""
        return ir.cast(index_node(V.kernel.prepare_indexing(expr)), dtype_name(dtype))

    @staticmethod
    def to_dtype(
        x: Any, dtype: torch.dtype, src_dtype: torch.dtype | None = None, use_compute_types: bool = True
    ) -> ir.Node:
        name = dtype_name(dtype)
        x = node(x)
        if name in ("i32", *SMALL) and (short := _short(x)) is not None:
            x = short
        if name in ("f16", "bf16"):
            x = ir.cast(x, "f32")
            return x if use_compute_types else ir.round_to(x, name)
        if name in FLOAT8:
            return ir.round_to(ir.cast(x, "f32"), name)
        if name in ("u8", "u16") and x.dtype in ir.FLOATS:
            return ir.cast(ir.cast(x, "i32"), name)
        return ir.cast(x, name)

    @staticmethod
    def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> ir.Node:
        x, to, source = node(x), dtype_name(dtype), dtype_name(src_dtype)
        if source in NARROW_FLOATS:
            bits: Any = ir.cast(ir.Node(f"{source}_encode", "u32", x), "i32")
        elif source in SMALL:
            bits = x
        else:
            bits = x
        if to in NARROW_FLOATS:
            return ir.Node(f"{to}_decode", "f32", ir.and_(ir.cast(bits, "u32"), 0xFF if to in FLOAT8 else 0xFFFF))
        if to in SMALL:
            return ir.round_to(ir.cast(bits, "i32"), to)
        return ir.bitcast(bits, to)

    @staticmethod
    def trunc_to_int(x: Any, dtype: torch.dtype) -> ir.Node:
        return ir.cast(ir.trunc(node(x)), dtype_name(dtype))

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> ir.Node:
        return ir.cast(ir.floor(node(x)), dtype_name(dtype))

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> ir.Node:
        return ir.cast(ir.ceil(node(x)), dtype_name(dtype))

    @staticmethod
    def round_to_int(x: Any, dtype: torch.dtype) -> ir.Node:
        return ir.cast(ir.rint(node(x)), dtype_name(dtype))

    @staticmethod
    def identity(x: Any) -> ir.Node:
        return node(x)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> ir.Node:
        a, b = nodes(a, b)
        short = (_short(a), _short(b)) if a.dtype == b.dtype == "i64" else (None,)
        if None not in short:
            return ir.cast(ir.where(_truth(condition), *short), "i64")
        return ir.where(_truth(condition), a, b)

    @staticmethod
    def masked(mask: Any, body: Callable[[], Any], other: Any) -> Any:
        kernel = V.kernel
        with kernel.mask_nodes(_truth(mask), other) as whole:
            result = body()
        value = node(result)
        return kernel.cse.generate(
            kernel.compute,
            ir.where(whole, value, ir.cast(node(other, value.dtype), value.dtype)),
            dtype=TORCH[value.dtype],
            shape=(),
        )

    @staticmethod
    def load_seed(name: str, offset: Any) -> ir.Node:
        return node(V.ops.load(name, sympy.Integer(offset) if isinstance(offset, int) else offset))

    @staticmethod
    def rand(seed: Any, offset: Any) -> ir.Node:
        return _uniform(philox(node(seed), node(offset))[0])

    @staticmethod
    def randn(seed: Any, offset: Any) -> ir.Node:
        a, b, _, _ = philox(node(seed), node(offset))
        radius = ir.sqrt(-2.0 * ir.log(1.0 - _uniform(a)))
        return radius * ir.cos(_uniform(b) * (2 * math.pi))

    @staticmethod
    def randint64(seed: Any, offset: Any, low: Any, high: Any) -> ir.Node:
        a, b, _, _ = philox(node(seed), node(offset))
        bits = ir.or_(ir.shl(ir.cast(a, "u64"), 32), ir.cast(b, "u64"))
        low, high = ir.cast(node(low), "i64"), ir.cast(node(high), "i64")
        span = ir.cast(high - low, "u64")
        return low + ir.cast(ir.irem(bits, ir.where(ir.eq(span, 0), 1, span)), "i64")

    add, sub, mul = _binary(ir.add, ir.or_), _binary(ir.sub, ir.xor), _binary(ir.mul, ir.and_)
    minimum, maximum = _binary(ir.minimum, ir.and_), _binary(ir.maximum, ir.or_)
    truediv = int_truediv = div_rn = _binary(_true_divide)
    floordiv, truncdiv, remainder = _binary(ir.floor_divide), _binary(ir.trunc_divide), _binary(ir.remainder)
    mod = fmod = _binary(ir.fmod)
    pow, atan2, hypot = _binary(ir.pow), _binary(ir.atan2), _binary(ir.hypot)
    copysign, nextafter = _binary(ir.copysign), _binary(ir.nextafter)
    eq, ne, lt, le, gt, ge = (_comparison(n) for n in ("eq", "ne", "lt", "le", "gt", "ge"))
    bitwise_and = and_ = _binary(ir.and_)
    bitwise_or = or_ = _binary(ir.or_)
    bitwise_xor = xor = _binary(ir.xor)
    bitwise_left_shift = lshift = _shift(ir.shl)
    bitwise_right_shift = rshift = _shift(ir.shr)
    bitwise_not = _unary(ir.not_)

    abs, neg, sign, square = _unary(ir.abs), _unary(ir.neg), _unary(ir.sign), _unary(ir.square)
    isnan, isinf, signbit = _unary(ir.isnan), _unary(ir.isinf), _unary(ir.signbit)
    floor, ceil, trunc, round = _unary(ir.floor), _unary(ir.ceil), _unary(ir.trunc), _unary(ir.rint)
    exp, exp2, expm1 = _float_unary(ir.exp), _float_unary(ir.exp2), _float_unary(ir.expm1)
    log, log2, log10, log1p = (_float_unary(getattr(ir, n)) for n in ("log", "log2", "log10", "log1p"))
    sin, cos, tan, asin, acos, atan = (
        _float_unary(getattr(ir, n)) for n in ["sin", "cos", "tan", "asin", "acos", "atan"]
    )
    sinh, cosh, tanh, asinh, acosh, atanh = (
        _float_unary(getattr(ir, n)) for n in ["sinh", "cosh", "tanh", "asinh", "acosh", "atanh"]
    )
    sqrt, rsqrt, erf, erfc, erfinv = (_float_unary(getattr(ir, n)) for n in ["sqrt", "rsqrt", "erf", "erfc", "erfinv"])
    lgamma, digamma, sigmoid = _float_unary(ir.lgamma), _float_unary(ir.digamma), _float_unary(ir.sigmoid)
    reciprocal = _float_unary(ir.reciprocal)

    @staticmethod
    def relu(x: Any) -> ir.Node:
        return ir.maximum(node(x), 0)

    @staticmethod
    def fma(x: Any, y: Any, z: Any) -> ir.Node:
        return ir.fma(*nodes(x, y, z))

    @staticmethod
    def mul_rn(x: Any, y: Any) -> ir.Node:
        return ir.mul(*nodes(x, y))

    @staticmethod
    def logical_and(a: Any, b: Any) -> ir.Node:
        return ir.and_(_truth(a), _truth(b))

    @staticmethod
    def logical_or(a: Any, b: Any) -> ir.Node:
        return ir.or_(_truth(a), _truth(b))

    @staticmethod
    def logical_xor(a: Any, b: Any) -> ir.Node:
        return ir.xor(_truth(a), _truth(b))

    @staticmethod
    def logical_not(a: Any) -> ir.Node:
        return ir.not_(_truth(a))

    def indirect_indexing(self, var: Any, size: Any, check: bool = True, wrap_neg: bool = True) -> sympy.Symbol:
        symbol = compat.sympy_index_symbol(str(var))
        V.kernel.indirect[symbol] = node(var)
        return symbol


_special_names = (
    "airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 erfcx i0 i0e i1 i1e log_ndtr modified_bessel_i0 modified_bessel_i1 "
    "modified_bessel_k0 modified_bessel_k1 ndtri scaled_modified_bessel_k0 scaled_modified_bessel_k1 spherical_bessel_j0"
)
# Recurrences and series with a loop in them: operators of their own, between the fused kernels.
_operator_names = (
    "chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w hermite_polynomial_h "
    "hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p shifted_chebyshev_polynomial_t "
    "shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w zeta polygamma igamma igammac "
    "gammainc gammaincc frexp"
)
SPECIAL, OPERATORS = _special_names.split(), _operator_names.split()


def _special(name: str) -> None:
    """A function that eager mode has in ops/special.py."""
    from ..ops.special import FUNCTIONS

    names = (f"special_{name}_stub", f"{name}_stub")
    function: Any = next((FUNCTIONS[n] for n in names if n in FUNCTIONS), None)
    if function is None:
        OPERATORS.append(name)
        return

    def op(*xs: Any) -> ir.Node:
        return function(*(x if x.dtype in ir.FLOATS else ir.cast(x, "f32") for x in nodes(*xs)))

    setattr(Overrides, name, staticmethod(op))


for _name in SPECIAL:
    _special(_name)
