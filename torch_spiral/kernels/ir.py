"""Typed, immutable, hash-consed scalar expressions.

A Node is an operation on nodes; two equal expressions are the same object. Compute dtypes are f32 f64 i32 i64 u32
u64 bool.
Python numbers become constants of the other operand's dtype; mixed dtypes promote bool < integer < float and narrow
< wide,
but i32 with u32 and i64 with u64 is a TypeError: convert with `cast`. Semantics are PyTorch's: `//` and `%` follow
the divisor's sign,
minimum and maximum propagate NaN, integers wrap. Comparison for equality is the function eq, since == is identity of
objects.

    x, y = leaf("x", "f32"), leaf("y", "f32")
    gelu = x * 0.5 * (1.0 + erf(x * 0.7071067811865476))
    z = where(x > y, exp(x), y)

Complex numbers are pairs of nodes, the class Complex; every function of this module that is defined for complex
numbers takes it.
"""

from __future__ import annotations

import math
import struct
import threading
import weakref
from collections.abc import Callable
from typing import Any

from .kernel import COMPUTE, DTYPES, NARROW_FLOATS, compute_dtype

FLOATS = ("f32", "f64")
INTS = ("i32", "i64", "u32", "u64")
SIGNED = ("i32", "i64")
BITS = {"f32": 32, "f64": 64, "i32": 32, "i64": 64, "u32": 32, "u64": 64}

_pool: weakref.WeakValueDictionary[tuple, Node] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class Operators:
    """Python's operators, for whatever `as_node` understands."""

    __slots__ = ()

    def __add__(self, o: Any) -> Any:
        return add(self, o)

    def __radd__(self, o: Any) -> Any:
        return add(o, self)

    def __sub__(self, o: Any) -> Any:
        return sub(self, o)

    def __rsub__(self, o: Any) -> Any:
        return sub(o, self)

    def __mul__(self, o: Any) -> Any:
        return mul(self, o)

    def __rmul__(self, o: Any) -> Any:
        return mul(o, self)

    def __truediv__(self, o: Any) -> Any:
        return div(self, o)

    def __rtruediv__(self, o: Any) -> Any:
        return div(o, self)

    def __floordiv__(self, o: Any) -> Any:
        return floor_divide(self, o)

    def __rfloordiv__(self, o: Any) -> Any:
        return floor_divide(o, self)

    def __mod__(self, o: Any) -> Any:
        return remainder(self, o)

    def __rmod__(self, o: Any) -> Any:
        return remainder(o, self)

    def __pow__(self, o: Any) -> Any:
        return pow(self, o)

    def __neg__(self) -> Any:
        return neg(self)

    def __abs__(self) -> Any:
        return abs(self)

    def __lt__(self, o: Any) -> Any:
        return lt(self, o)

    def __le__(self, o: Any) -> Any:
        return le(self, o)

    def __gt__(self, o: Any) -> Any:
        return gt(self, o)

    def __ge__(self, o: Any) -> Any:
        return ge(self, o)

    def __and__(self, o: Any) -> Any:
        return and_(self, o)

    def __rand__(self, o: Any) -> Any:
        return and_(o, self)

    def __or__(self, o: Any) -> Any:
        return or_(self, o)

    def __ror__(self, o: Any) -> Any:
        return or_(o, self)

    def __xor__(self, o: Any) -> Any:
        return xor(self, o)

    def __rxor__(self, o: Any) -> Any:
        return xor(o, self)

    def __lshift__(self, o: Any) -> Any:
        return shl(self, o)

    def __rshift__(self, o: Any) -> Any:
        return shr(self, o)

    def __invert__(self) -> Any:
        return not_(self)

    def __bool__(self) -> bool:
        raise TypeError("the value of an expression is not known while the kernel is built; use ir.where or k.If")


class DtypeError(TypeError):
    """An operation that is not defined for a compute dtype."""

    def __init__(self, text: str, dtype: str) -> None:
        super().__init__(text)
        self.dtype = dtype


class Node(Operators):
    """One operation. op: its name; dtype: of the result; args: nodes; attr: hashable static data; lanes: how many
    values it holds at once (1 except where a builder widened a leaf)."""

    __slots__ = ("__weakref__", "args", "attr", "dtype", "lanes", "op")
    op: str
    dtype: str
    args: tuple[Node, ...]
    attr: Any
    lanes: int

    def __new__(cls, op: str, dtype: str, *args: Node, attr: Any = None, lanes: int = 0) -> Node:
        key = (op, dtype, args, attr, lanes)
        node = _pool.get(key)
        if node is None:
            with _lock:
                node = _pool.get(key)
                if node is None:
                    node = object.__new__(cls)
                    node.op, node.dtype, node.args, node.attr = op, dtype, args, attr
                    node.lanes = lanes or max((a.lanes for a in args), default=1)
                    _pool[key] = node
        return node

    def to(self, dtype: str) -> Node:
        """cast(self, dtype)."""
        return cast(self, dtype)

    def __repr__(self) -> str:
        if self.op == "const":
            return f"{const_value(self)!r}:{self.dtype}"
        if self.op in ("leaf", "tmp", "lane"):
            return f"{self.attr}:{self.dtype}"
        attr = f"[{self.attr}]" if self.attr is not None else ""
        return f"{self.op}{attr}:{self.dtype}({', '.join(map(repr, self.args))})"


# ---- leaves -------------------------------------------------------------------------------------------------------


def const(value: Any, dtype: str) -> Node:
    """A constant, exact: NaN, infinities, -0.0 and every 64-bit integer. Integers wrap to the dtype's range."""
    if dtype not in COMPUTE:
        raise TypeError(f"{dtype} is not a compute dtype")
    if dtype in FLOATS:
        v = float(value)
        if dtype == "f32":
            try:
                v = struct.unpack("<f", struct.pack("<f", v))[0]
            except OverflowError:
                v = math.copysign(math.inf, v)
        # Keyed by bits: 0.0 == -0.0 and nan != nan would confuse the pool.
        return Node("const", dtype, attr=struct.unpack("<Q", struct.pack("<d", v))[0])
    if dtype == "bool":
        return Node("const", dtype, attr=int(builtin_bool(value)))
    bits = BITS[dtype]
    v = int(value) & ((1 << bits) - 1)
    if dtype in SIGNED and v >> (bits - 1):
        v -= 1 << bits
    return Node("const", dtype, attr=v)


builtin_bool, builtin_abs = bool, abs


def const_value(node: Node) -> Any:
    """The Python value of a const node."""
    if node.dtype in FLOATS:
        return struct.unpack("<d", struct.pack("<Q", node.attr))[0]
    return node.attr


def leaf(name: str, dtype: str) -> Node:
    """A named unknown of a storage or compute dtype, to be replaced by `substitute`. Complex for complex dtypes."""
    if DTYPES.get(dtype) and DTYPES[dtype].is_pair:
        part = compute_dtype(dtype)
        return Complex(Node("leaf", part, attr=name + ".re"), Node("leaf", part, attr=name + ".im"))  # type: ignore[return-value]
    return Node("leaf", compute_dtype(dtype), attr=name)


def as_node(x: Any, like: str | None = None) -> Node:
    """x as a node: a Node, something with as_node() (a builder's variable), or a number, then of dtype `like`."""
    if isinstance(x, Node):
        return x
    if hasattr(x, "as_node"):
        return x.as_node()
    if like is None:
        raise TypeError(f"{x!r} needs a dtype here")
    return const(x, like)


_RANK = {"bool": 0, "i32": 1, "u32": 1, "i64": 2, "u64": 2, "f32": 3, "f64": 4}


def promote(a: str, b: str) -> str:
    """The dtype of an operation on a and b."""
    if a == b:
        return a
    if _RANK[a] == _RANK[b]:
        raise TypeError(f"{a} and {b} do not mix; convert one with ir.cast")
    return a if _RANK[a] > _RANK[b] else b


def _number_dtype(value: Any, other: str) -> str:
    if isinstance(value, float) and other not in FLOATS:
        return "f32"
    if not isinstance(value, builtin_bool) and other == "bool":
        return "i32"
    return other


def same(*xs: Any) -> tuple[str, list[Node]]:
    """The operands as nodes of their common dtype, and that dtype."""
    nodes = [x if isinstance(x, Node) else (x.as_node() if hasattr(x, "as_node") else None) for x in xs]
    dtype = None
    for n in nodes:
        if n is not None:
            dtype = n.dtype if dtype is None else promote(dtype, n.dtype)
    if dtype is None:
        raise TypeError(f"{xs}: no operand has a dtype")
    for x, n in zip(xs, nodes, strict=False):
        if n is None:
            dtype = promote(dtype, _number_dtype(x, dtype))
    return dtype, [const(x, dtype) if n is None else cast(n, dtype) for x, n in zip(xs, nodes, strict=False)]


def is_const(node: Node, value: Any = None) -> bool:
    return node.op == "const" and (value is None or const_value(node) == value)


# ---- arithmetic ---------------------------------------------------------------------------------------------------

_FOLD: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


def _arith(op: str, a: Any, b: Any) -> Any:
    if isinstance(a, (Complex, complex)) or isinstance(b, (Complex, complex)):
        return getattr(_complex(), op)(*_complex().pair(a, b))
    dtype, (a, b) = same(a, b)
    if dtype == "bool":
        raise DtypeError(f"{op} is not defined for bool; use and_, or_, xor or cast", dtype)
    if dtype in INTS:  # index arithmetic is mostly constants
        if a.op == "const" and b.op == "const":
            return const(_FOLD[op](a.attr, b.attr), dtype)
        if is_const(b, 0):
            return a if op != "mul" else b
        if is_const(a, 0) and op != "sub":
            return b if op == "add" else a
        if op == "mul" and is_const(b, 1):
            return a
        if op == "mul" and is_const(a, 1):
            return b
    elif a.op == "const" and b.op == "const":  # WGSL refuses constant expressions that overflow
        return const(_FOLD[op](const_value(a), const_value(b)), dtype)
    return Node(op, dtype, a, b)


def add(a: Any, b: Any) -> Any:
    return _arith("add", a, b)


def sub(a: Any, b: Any) -> Any:
    return _arith("sub", a, b)


def mul(a: Any, b: Any) -> Any:
    return _arith("mul", a, b)


def div(a: Any, b: Any) -> Any:
    """True division of floats (IEEE; WGSL 2.5 ulp) or complex numbers. Integers: use floor_divide or trunc_divide."""
    if isinstance(a, (Complex, complex)) or isinstance(b, (Complex, complex)):
        return _complex().div(*_complex().pair(a, b))
    dtype, (a, b) = same(a, b)
    if dtype not in FLOATS:
        raise TypeError("true division of integers: cast to a float dtype, or use floor_divide or trunc_divide")
    return Node("div", dtype, a, b)


def fma(a: Any, b: Any, c: Any) -> Node:
    """a * b + c; fused where that is fast, so use it where either rounding will do."""
    dtype, args = same(a, b, c)
    return Node("fma", dtype, *args)


def neg(a: Any) -> Any:
    if isinstance(a, Complex):
        return Complex(neg(a.re), neg(a.im))
    a = as_node(a)
    if a.op == "const" and a.dtype != "bool":
        return const(-const_value(a), a.dtype)
    return Node("neg", a.dtype, a)


def abs(a: Any) -> Any:
    """|a|; of a complex number a float, without overflow in between."""
    if isinstance(a, Complex):
        return hypot(a.re, a.im)
    a = as_node(a)
    if a.op == "const" and a.dtype in FLOATS:  # naga folds no abs of a float64
        return const(math.fabs(const_value(a)), a.dtype)
    return a if a.dtype in ("u32", "u64", "bool") else Node("abs", a.dtype, a)


def idiv(a: Any, b: Any) -> Node:
    """Integer quotient towards zero. The divisor must be neither 0 nor -1 (which trap on some CPUs): sizes,
    constants."""
    dtype, (a, b) = same(a, b)
    if is_const(b, 1):
        return a
    if a.op == "const" and b.op == "const" and b.attr:
        q = builtin_abs(a.attr) // builtin_abs(b.attr)
        return const(q if (a.attr < 0) == (b.attr < 0) else -q, dtype)
    return Node("idiv", dtype, a, b)


def irem(a: Any, b: Any) -> Node:
    """a - b * idiv(a, b), with idiv's condition on b."""
    dtype, (a, b) = same(a, b)
    if is_const(b, 1):
        return const(0, dtype)
    return Node("irem", dtype, a, b)


def _safe(op: Callable[[Any, Any], Node], a: Any, b: Any, at_minus_one: Callable[[Node], Any]) -> Node:
    dtype, (a, b) = same(a, b)
    if b.op == "const" and b.attr not in (0, -1):
        return op(a, b)
    if dtype not in SIGNED:
        return op(a, where(eq(b, 0), 1, b))
    return where(eq(b, -1), at_minus_one(a), op(a, where(or_(eq(b, 0), eq(b, -1)), 1, b)))


def trunc_divide(a: Any, b: Any) -> Any:
    """Quotient rounded towards zero (torch.div(rounding_mode="trunc")). An integer divided by 0 gives an unspecified
    value."""
    dtype, (a, b) = same(a, b)
    return trunc(div(a, b)) if dtype in FLOATS else _safe(idiv, a, b, neg)


def floor_divide(a: Any, b: Any) -> Any:
    """Quotient rounded down, as torch.floor_divide. An integer divided by 0 gives an unspecified value."""
    dtype, (a, b) = same(a, b)
    if dtype in FLOATS:
        # As ATen: from the exact remainder, so that the result agrees with %.
        m = fmod(a, b)
        q = div(sub(a, m), b)
        q = where(and_(ne(m, 0.0), xor(lt(b, 0.0), lt(m, 0.0))), q - 1.0, q)
        f = floor(q)
        f = where(gt(q - f, 0.5), f + 1.0, f)
        f = where(ne(q, 0.0), f, copysign(const(0.0, dtype), div(a, b)))
        return where(eq(b, 0.0), div(a, b), f)
    if dtype not in SIGNED:
        return _safe(idiv, a, b, neg)
    q = _safe(idiv, a, b, neg)
    if b.op == "const" and b.attr > 0:
        return where(lt(a, mul(q, b)), q - 1, q)
    r = sub(a, mul(q, b))
    return where(and_(ne(r, 0), xor(lt(r, 0), lt(b, 0))), q - 1, q)


def remainder(a: Any, b: Any) -> Any:
    """a modulo b with the sign of b (torch.remainder, Python's %)."""
    dtype, (a, b) = same(a, b)
    if dtype in FLOATS:
        m = fmod(a, b)
        return where(and_(ne(m, 0.0), xor(lt(b, 0.0), lt(m, 0.0))), m + b, m)
    m = fmod(a, b)
    if dtype not in SIGNED:
        return m
    return where(and_(ne(m, 0), xor(lt(m, 0), lt(b, 0))), m + b, m)


def fmod(a: Any, b: Any) -> Any:
    """Remainder with the sign of a (torch.fmod, C's %)."""
    dtype, (a, b) = same(a, b)
    if dtype in FLOATS:
        return Node("fmod", dtype, a, b)
    return _safe(irem, a, b, lambda x: 0)


def sign(a: Any) -> Any:
    """-1, 0 or 1; NaN gives 0 (torch.sign). Of a complex number torch.sgn: a / |a|, 0 at 0."""
    if isinstance(a, Complex):
        m = abs(a)
        zero = eq(m, 0.0)
        d = where(zero, 1.0, m)
        return Complex(where(zero, 0.0, a.re / d), where(zero, 0.0, a.im / d))
    a = as_node(a)
    if a.dtype == "bool":
        return a
    return where(gt(a, 0), const(1, a.dtype), where(lt(a, 0), const(-1, a.dtype), const(0, a.dtype)))


def square(a: Any) -> Any:
    return mul(a, a)


def reciprocal(a: Any) -> Any:
    return div(1.0, a)


# ---- comparison, logic, bits --------------------------------------------------------------------------------------


def _compare(op: str, a: Any, b: Any) -> Node:
    dtype, args = same(a, b)
    if dtype == "bool" and op not in ("eq", "ne"):
        args = [cast(x, "i32") for x in args]
    return Node(op, "bool", *args)


def lt(a: Any, b: Any) -> Node:
    return _compare("lt", a, b)


def le(a: Any, b: Any) -> Node:
    return _compare("le", a, b)


def gt(a: Any, b: Any) -> Node:
    return _compare("gt", a, b)


def ge(a: Any, b: Any) -> Node:
    return _compare("ge", a, b)


def eq(a: Any, b: Any) -> Node:
    if isinstance(a, Complex) or isinstance(b, Complex):
        a, b = _complex().pair(a, b)
        return and_(eq(a.re, b.re), eq(a.im, b.im))
    return _compare("eq", a, b)


def ne(a: Any, b: Any) -> Node:
    if isinstance(a, Complex) or isinstance(b, Complex):
        return not_(eq(a, b))
    return _compare("ne", a, b)


def _bitwise(op: str, a: Any, b: Any) -> Node:
    dtype, args = same(a, b)
    if dtype in FLOATS:
        raise DtypeError(f"{op} is not defined for {dtype}", dtype)
    return Node(op, dtype, *args)


def and_(a: Any, b: Any) -> Node:
    """Bitwise and; logical for bool."""
    return _bitwise("and", a, b)


def or_(a: Any, b: Any) -> Node:
    return _bitwise("or", a, b)


def xor(a: Any, b: Any) -> Node:
    return _bitwise("xor", a, b)


def not_(a: Any) -> Node:
    a = as_node(a)
    return Node("not", a.dtype, a)


def shl(a: Any, b: Any) -> Node:
    """a << b for 0 <= b < bits; a shift by the width or more gives 0, as in torch. The amount's dtype may differ."""
    return _shift("shl", a, b)


def shr(a: Any, b: Any) -> Node:
    """a >> b, arithmetic for signed dtypes; a shift by the width or more gives 0 or -1, as in torch."""
    return _shift("shr", a, b)


def _shift(op: str, a: Any, b: Any) -> Node:
    a = as_node(a, b.dtype if isinstance(b, Node) else None)
    bits = BITS[a.dtype]
    if not isinstance(b, int) and (n := as_node(b)).op != "const":
        out = ge(cast(n, "u64" if BITS[n.dtype] == 64 else "u32"), bits)  # negative amounts count as too large
        amount = cast(n, "u32")
        if op == "shl":
            return where(out, const(0, a.dtype), Node("shl", a.dtype, a, and_(amount, bits - 1)))
        if a.dtype not in SIGNED:
            return where(out, const(0, a.dtype), Node("shr", a.dtype, a, and_(amount, bits - 1)))
        return Node("shr", a.dtype, a, where(out, const(bits - 1, "u32"), amount))
    b = b if isinstance(b, int) else b.attr
    if b == 0:
        return a
    if b < 0 or b >= bits:
        if op == "shl" or a.dtype not in SIGNED:
            return const(0, a.dtype)
        b = bits - 1
    return Node(op, a.dtype, a, const(b, "u32"))


def cast(a: Any, dtype: str) -> Any:
    """Converts as C does: floats truncate towards zero (saturating; NaN gives an unspecified value), integers wrap,
    bool is value != 0. dtype: a compute dtype, or a storage dtype, then the value is also rounded or wrapped to it.
    Complex keeps both parts when dtype is complex, and loses the imaginary part otherwise; a real becomes Complex."""
    if dtype not in COMPUTE:
        d = DTYPES[dtype]
        if d.kind == "complex":
            a = a if isinstance(a, Complex) else Complex(cast(a, d.compute), const(0, d.compute))
            re, im = cast(a.re, d.compute), cast(a.im, d.compute)
            return Complex(round_to(re, "f16"), round_to(im, "f16")) if dtype == "c32" else Complex(re, im)
        return round_to(cast(a, d.compute), dtype)
    if isinstance(a, Complex):
        return ne(a, 0.0) if dtype == "bool" else cast(a.re, dtype)
    a = as_node(a, dtype)
    if a.dtype == dtype:
        return a
    if a.op == "const":
        v = const_value(a)
        if a.dtype not in FLOATS or dtype in (*FLOATS, "bool"):
            return const(v, dtype)
        if math.isfinite(v) and builtin_abs(v) < 2**31:
            return const(int(v), dtype)
    if dtype == "bool":
        return ne(a, 0)
    return Node("cast", dtype, a)


def bitcast(a: Any, dtype: str) -> Node:
    """The same bits as a compute dtype of the same size."""
    a = as_node(a)
    if BITS[a.dtype] != BITS[dtype]:
        raise TypeError(f"bitcast from {a.dtype} to {dtype}: sizes differ")
    if a.dtype == dtype:
        return a
    if a.op == "bitcast":
        return bitcast(a.args[0], dtype)
    return Node("bitcast", dtype, a)


def round_to(a: Any, dtype: str) -> Node:
    """a (of compute dtype compute_dtype(dtype)) with the precision or range of a storage dtype: nearest even for
    narrow floats,
    wrapped for small integers."""
    a = as_node(a)
    d = DTYPES[dtype]
    if d.compute != a.dtype:
        raise TypeError(f"round_to({dtype}) of {a.dtype}")
    if dtype in NARROW_FLOATS:
        return Node(f"{dtype}_decode", "f32", Node(f"{dtype}_encode", "u32", a))
    if dtype in ("i8", "i16"):
        s = 32 - 8 * d.size
        return shr(shl(a, s), s)
    if dtype in ("u8", "u16"):
        return and_(a, (1 << 8 * d.size) - 1)
    return a


def where(c: Any, a: Any, b: Any) -> Any:
    """a where c, else b. Both are evaluated: guard loads with their mask."""
    if isinstance(a, Complex) or isinstance(b, Complex):
        a, b = _complex().pair(a, b)
        return Complex(where(c, a.re, b.re), where(c, a.im, b.im))
    c = cast(c, "bool")
    dtype, (a, b) = same(a, b)
    if c.op == "const":
        return a if c.attr else b
    return a if a is b else Node("where", dtype, c, a, b)


def logical_not(a: Any) -> Node:
    return not_(cast(a, "bool"))


# ---- minimum and maximum, classes of floats -----------------------------------------------------------------------


def isnan(a: Any) -> Node:
    """Whether a is NaN, by its bits. Integers never are."""
    if isinstance(a, Complex):
        return or_(isnan(a.re), isnan(a.im))
    a = as_node(a)
    return Node("isnan", "bool", a) if a.dtype in FLOATS else const(False, "bool")


def isinf(a: Any) -> Node:
    if isinstance(a, Complex):
        return or_(isinf(a.re), isinf(a.im))
    a = as_node(a)
    return eq(abs(a), math.inf) if a.dtype in FLOATS else const(False, "bool")


def isfinite(a: Any) -> Node:
    if isinstance(a, Complex):
        return and_(isfinite(a.re), isfinite(a.im))
    a = as_node(a)
    return lt(abs(a), math.inf) if a.dtype in FLOATS else const(True, "bool")


def maximum(a: Any, b: Any) -> Node:
    """The larger; NaN if either is."""
    return _extreme("max", gt, a, b)


def minimum(a: Any, b: Any) -> Node:
    """The smaller; NaN if either is."""
    return _extreme("min", lt, a, b)


def _extreme(op: str, better: Callable[[Any, Any], Node], a: Any, b: Any) -> Node:
    dtype, (a, b) = same(a, b)
    if dtype == "bool":
        return or_(a, b) if op == "max" else and_(a, b)
    if dtype in INTS:
        return Node(op, dtype, a, b)
    if b.op == "const":
        a, b = b, a  # then a comparison with the constant decides alone: NaN > c is false and gives NaN
        if const_value(a) == const_value(a):
            return where(better(a, b), a, b)
    return where(or_(better(a, b), isnan(a)), a, b)


def fmax(a: Any, b: Any) -> Node:
    """The larger; the other one if one is NaN."""
    dtype, (a, b) = same(a, b)
    return maximum(a, b) if dtype not in FLOATS else where(or_(gt(a, b), isnan(b)), a, b)


def fmin(a: Any, b: Any) -> Node:
    dtype, (a, b) = same(a, b)
    return minimum(a, b) if dtype not in FLOATS else where(or_(lt(a, b), isnan(b)), a, b)


def clamp(a: Any, lo: Any, hi: Any) -> Node:
    """min(max(a, lo), hi), NaN propagating; lo or hi may be None."""
    if lo is not None:
        a = maximum(a, lo)
    return a if hi is None else minimum(a, hi)


# ---- functions of floats ------------------------------------------------------------------------------------------


def _complex() -> Any:
    from . import complex_functions

    return complex_functions


def _unary(op: str, doc: str = "", ints: bool = False) -> Callable[[Any], Any]:
    def f(a: Any) -> Any:
        if isinstance(a, Complex):
            return getattr(_complex(), op)(a)
        a = as_node(a)
        if a.dtype not in FLOATS:
            if ints:
                return a
            raise DtypeError(f"{op} of {a.dtype}: cast to a float dtype first", a.dtype)
        return Node(op, a.dtype, a)

    f.__name__ = f.__qualname__ = op
    f.__doc__ = doc or f"{op}(a) of a float{' or complex' if op in COMPLEX_FUNCTIONS else ''} node."
    return f


ELEMENTARY = frozenset(
    (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan",
        "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    )
)  # fmt: skip
COMPLEX_FUNCTIONS = ELEMENTARY | {"sqrt", "rsqrt"}
exp, exp2, expm1 = _unary("exp"), _unary("exp2"), _unary("expm1")
log, log2, log10, log1p = _unary("log"), _unary("log2"), _unary("log10"), _unary("log1p")
sin, cos, tan = _unary("sin"), _unary("cos"), _unary("tan")
asin, acos, atan = _unary("asin"), _unary("acos"), _unary("atan")
sinh, cosh, tanh = _unary("sinh"), _unary("cosh"), _unary("tanh")
asinh, acosh, atanh = _unary("asinh"), _unary("acosh"), _unary("atanh")
sqrt, rsqrt = _unary("sqrt"), _unary("rsqrt")
erf, erfc, erfinv = _unary("erf"), _unary("erfc"), _unary("erfinv")
lgamma, digamma = _unary("lgamma"), _unary("digamma")
floor, ceil = _unary("floor", ints=True), _unary("ceil", ints=True)
trunc = _unary("trunc", ints=True)
rint = _unary("rint", "Nearest integer, ties to even (torch.round).", ints=True)


def _binary(op: str, doc: str) -> Callable[[Any, Any], Node]:
    def f(a: Any, b: Any) -> Node:
        dtype, args = same(a, b)
        if dtype not in FLOATS:
            raise DtypeError(f"{op} of {dtype}: cast to a float dtype first", dtype)
        return Node(op, dtype, *args)

    f.__name__ = f.__qualname__ = op
    f.__doc__ = doc
    return f


atan2 = _binary("atan2", "Angle of the point (b, a).")
hypot = _binary("hypot", "sqrt(a * a + b * b) without overflow in between.")
copysign = _binary("copysign", "|a| with the sign of b.")
nextafter = _binary("nextafter", "The float after a towards b.")


def pow(a: Any, b: Any) -> Any:
    """a ** b for floats and complex numbers; integers with a constant exponent >= 0 multiply, others loop over the
    bits of b
    (a negative exponent gives 0 unless a is 1 or -1, as torch)."""
    if isinstance(a, (Complex, complex)) or isinstance(b, (Complex, complex)):
        return _complex().pow(*_complex().pair(a, b))
    if isinstance(b, (int, float)) and float(b).is_integer() and 0 <= b <= 4:
        a = as_node(a)
        n = int(b)
        if n == 0:
            return const(1, a.dtype)
        r = a
        for _ in range(n - 1):
            r = mul(r, a)
        return mul(mul(a, a), mul(a, a)) if n == 4 else r
    dtype, (a, b) = same(a, b)
    if dtype in FLOATS:
        if b.op == "const" and const_value(b) == 0.5:
            return where(eq(a, -math.inf), math.inf, sqrt(a + 0.0))
        return Node("pow", dtype, a, b)
    r, base, e = const(1, dtype), a, b
    for i in range(BITS[dtype] - (dtype in SIGNED)):
        if i >= 6 and b.op == "const" and not b.attr >> i:
            break
        r = where(ne(and_(shr(e, i), 1), 0), mul(r, base), r)
        base = mul(base, base)
    if dtype in SIGNED:
        odd = ne(and_(b, 1), 0)
        negative = where(eq(a, 1), 1, where(eq(a, -1), where(odd, const(-1, dtype), const(1, dtype)), 0))
        r = where(lt(b, 0), negative, r)
    return r


def sigmoid(a: Any) -> Any:
    """1 / (1 + exp(-a))."""
    if isinstance(a, Complex):
        return div(1.0, add(1.0, exp(neg(a))))
    return div(1.0, add(1.0, exp(neg(a))))


def log_sigmoid(a: Any) -> Node:
    """log(sigmoid(a)) without overflow."""
    return sub(minimum(a, 0.0), log1p(exp(neg(abs(a)))))


def softplus(a: Any) -> Node:
    """log(1 + exp(a)) without overflow."""
    return add(maximum(a, 0.0), log1p(exp(neg(abs(a)))))


def signbit(a: Any) -> Node:
    """Whether the sign bit is set, also of -0.0 and NaN."""
    a = as_node(a)
    if a.dtype == "f32":
        return lt(bitcast(a, "i32"), 0)
    if a.dtype == "f64":
        return lt(bitcast(a, "i64"), 0)
    return lt(a, 0) if a.dtype in SIGNED else const(False, "bool")


# ---- complex ------------------------------------------------------------------------------------------------------


class Complex(Operators):
    """A complex number: two nodes of one float dtype (or, for copies, two u64: the halves of a c128)."""

    __slots__ = ("im", "re")

    def __init__(self, re: Any, im: Any) -> None:
        if isinstance(re, Node) or isinstance(im, Node) or hasattr(re, "as_node") or hasattr(im, "as_node"):
            _, (re, im) = same(re, im)
        self.re, self.im = re, im

    @property
    def dtype(self) -> str:
        """dtype of a part."""
        return self.re.dtype

    def conj(self) -> Complex:
        return Complex(self.re, neg(self.im))

    def angle(self) -> Node:
        return atan2(self.im, self.re)

    def __repr__(self) -> str:
        return f"Complex({self.re!r}, {self.im!r})"


def conj(a: Any) -> Any:
    return a.conj() if isinstance(a, Complex) else a


def angle(a: Any) -> Any:
    """torch.angle: of a real, 0 or pi, NaN for NaN."""
    if isinstance(a, Complex):
        return a.angle()
    return where(lt(a, 0), math.pi, where(isnan(a), a, 0.0))


Value = Node | Complex


# ---- whole expressions --------------------------------------------------------------------------------------------


def substitute(expr: Any, replace: Callable[[Node], Any], memo: dict[Node, Any] | None = None) -> Any:
    """expr with nodes replaced, bottom up: replace(node) gives a new node, or None to keep it (then its arguments are
    visited). memo: shared by calls that must agree."""
    memo = {} if memo is None else memo
    if isinstance(expr, Complex):
        return Complex(substitute(expr.re, replace, memo), substitute(expr.im, replace, memo))
    got = memo.get(expr)
    if got is None:
        got = replace(expr)
        if got is None:
            args = tuple(substitute(a, replace, memo) for a in expr.args)
            got = expr if args == expr.args else Node(expr.op, expr.dtype, *args, attr=expr.attr)
        memo[expr] = got
    return got


def walk(*exprs: Any) -> list[Node]:
    """Every node below the expressions, arguments before users, once each."""
    seen: dict[Node, None] = {}

    def visit(n: Node) -> None:
        if n not in seen:
            for a in n.args:
                visit(a)
            seen[n] = None

    for e in exprs:
        for n in (e.re, e.im) if isinstance(e, Complex) else (e,):
            visit(n)
    return list(seen)
