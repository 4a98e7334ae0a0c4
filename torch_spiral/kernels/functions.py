"""Functions that a language lacks or computes badly, as expressions of simpler nodes, for float32 and float64.

LOWER[op](*args) gives the expression. The emitter of a language says which ops it has itself; it makes a function of
the module out of
each of the others. Coefficients of series are computed; those of fits are Chebyshev expansions computed with 50 digits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from . import ir
from .ir import Node, where

LOWER: dict[str, Callable[..., Node]] = {}


def lower(f: Callable[..., Node]) -> Callable[..., Node]:
    LOWER[f.__name__.rstrip("_")] = f
    return f


class _Format:
    """Layout of a float dtype."""

    def __init__(self, bits: int, mantissa: int, int_: str, uint: str) -> None:
        self.bits, self.mantissa, self.int, self.uint = bits, mantissa, int_, uint
        self.bias = (1 << (bits - mantissa - 2)) - 1
        self.sign = 1 << (bits - 1)
        self.infinity = (2 * self.bias + 1) << mantissa
        self.tiny = 2.0 ** (1 - self.bias)  # smallest normal
        self.max_exp = math.log(2.0) * (self.bias + 1)


FORMAT = {"f32": _Format(32, 23, "i32", "u32"), "f64": _Format(64, 52, "i64", "u64")}


def poly(x: Node, coefficients: Any) -> Node:
    """Horner; coefficients from the constant up."""
    r: Any = ir.const(coefficients[-1], x.dtype)
    for c in reversed(coefficients[:-1]):
        r = ir.fma(r, x, c)
    return r


def by_dtype(x: Node, f32: Any, f64: Any) -> Any:
    return f32 if x.dtype == "f32" else f64


def split(value: Fraction | float, dtype: str, bits: int, parts: int) -> list[float]:
    """value as a sum of `parts` floats; all but the last have `bits` bits, so that products with small integers are
    exact."""
    out, rest = [], Fraction(value)
    for i in range(parts):
        if i == parts - 1 or rest == 0:
            out.append(float(rest))
            break
        m, e = math.frexp(float(rest))
        head = Fraction(int(m * (1 << bits))) * Fraction(2) ** (e - bits)
        out.append(float(head))
        rest -= head
    return out


# 40 digits: more than any split needs.
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254120680009")
LOG10_2 = Fraction("0.301029995663981195213738894724493026768189881462108541310427461")
LOG2_E = Fraction("1.44269504088896340735992468100189213742664595415298593413544940")


def scale(x: Node, n: Node) -> Node:
    """x * 2**n for an integer-valued float node n of up to twice the exponent range."""
    f = FORMAT[x.dtype]
    n = ir.cast(n, f.int)
    half = ir.shr(n, 1)
    return x * _power_of_two(half, x.dtype) * _power_of_two(n - half, x.dtype)


def _power_of_two(n: Node, dtype: str) -> Node:
    f = FORMAT[dtype]
    return ir.bitcast(ir.shl(n + f.bias, f.mantissa), dtype)


def head(x: Node) -> Node:
    """x rounded to the upper half of its mantissa. By bits: drivers simplify (x + c) - c as if floats were reals."""
    f = FORMAT[x.dtype]
    unit = 1 << (f.mantissa // 2 + 1)
    bits = ir.bitcast(x, f.uint) + unit // 2
    return ir.bitcast(ir.and_(bits, (1 << f.bits) - unit), x.dtype)


def two_product(a: Node, b: Any) -> tuple[Node, Node]:
    """a * b as an exact sum of two floats (Dekker); unaffected by contraction."""
    _, (a, b) = ir.same(a, b)
    p = a * b
    ah, bh = head(a), head(b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def two_sum(a: Node, b: Node) -> tuple[Node, Node]:
    """a + b, for |a| >= |b|, as the head of the sum and the rest, good to one and a half times the precision."""
    s = head(a + b)
    return s, b - (s - a)


# ---- bits ---------------------------------------------------------------------------------------------------------


@lower
def copysign(a: Node, b: Node) -> Node:
    f = FORMAT[a.dtype]
    magnitude = ir.and_(ir.bitcast(a, f.uint), f.sign - 1)
    return ir.bitcast(ir.or_(magnitude, ir.and_(ir.bitcast(b, f.uint), f.sign)), a.dtype)


@lower
def isnan(a: Node) -> Node:
    f = FORMAT[a.dtype]
    return ir.gt(ir.and_(ir.bitcast(a, f.uint), f.sign - 1), f.infinity)


@lower
def nextafter(a: Node, b: Node) -> Node:
    f = FORMAT[a.dtype]
    bits = ir.bitcast(a, f.int)
    away = ir.xor(ir.lt(a, b), ir.lt(bits, 0))  # the magnitude grows
    step = ir.bitcast(where(away, bits + 1, bits - 1), a.dtype)
    smallest = copysign(ir.bitcast(ir.const(1, f.int), a.dtype), b)
    r = where(ir.eq(a, 0.0), smallest, step)
    r = where(ir.eq(a, b), b, r)
    return where(ir.or_(ir.isnan(a), ir.isnan(b)), a + b, r)


@lower
def f16_decode(h: Node) -> Node:
    """float16 bits (low half of a u32) as f32."""
    magnitude = ir.and_(h, 0x7FFF)
    exponent = ir.shr(magnitude, 10)
    normal = ir.bitcast(ir.shl(magnitude, 13) + (112 << 23), "f32")
    special = ir.bitcast(ir.or_(ir.shl(magnitude, 13), 0x7F800000), "f32")
    small = ir.cast(magnitude, "f32") * 2.0**-24
    r = where(ir.eq(exponent, 0), small, where(ir.eq(exponent, 31), special, normal))
    return ir.bitcast(ir.or_(ir.bitcast(r, "u32"), ir.shl(ir.and_(h, 0x8000), 16)), "f32")


@lower
def f16_encode(x: Node) -> Node:
    """f32 as float16 bits in a u32, nearest even, NaN stays NaN."""
    bits = ir.bitcast(x, "u32")
    magnitude = ir.and_(bits, 0x7FFFFFFF)
    normal = ir.shr(magnitude - (112 << 23) + 0xFFF + ir.and_(ir.shr(magnitude, 13), 1), 13)
    # Below 2**-14: count in units of 2**-24, by adding 2**23 units of 2**-24 = 0.5, whose rounding is nearest even.
    small = ir.bitcast(ir.bitcast(magnitude, "f32") + 0.5, "u32") - 0x3F000000
    r = where(ir.lt(magnitude, 113 << 23), small, normal)
    r = where(ir.ge(magnitude, 0x477FF000), 0x7C00, r)  # 65520 and more is infinity
    r = where(ir.gt(magnitude, 0x7F800000), 0x7E00, r)
    return ir.or_(r, ir.and_(ir.shr(bits, 16), 0x8000))


@lower
def bf16_decode(h: Node) -> Node:
    return ir.bitcast(ir.shl(h, 16), "f32")


@lower
def bf16_encode(x: Node) -> Node:
    bits = ir.bitcast(x, "u32")
    rounded = ir.shr(bits + 0x7FFF + ir.and_(ir.shr(bits, 16), 1), 16)
    nan = ir.gt(ir.and_(bits, 0x7FFFFFFF), 0x7F800000)
    return where(nan, ir.or_(ir.shr(bits, 16), 0x40), rounded)


def define_float8(
    name: str, exponent: int, mantissa: int, bias: int, unsigned_zero: bool = False, saturates: bool = False
) -> None:
    """LOWER[<name>_decode and _encode]: bits (low byte of a u32) to f32, and back, to nearest even, as PyTorch does on the CPU.

    unsigned_zero: of the formats whose only NaN is what would be -0; else NaN is all ones, and with five bits of exponent there
    are infinities. saturates: what is beyond the largest number becomes it, else NaN."""
    shift = 23 - mantissa
    unit = 2.0 ** (1 - bias - mantissa)  # of subnormal numbers
    infinity = 0x7C if exponent == 5 and not unsigned_zero else None

    def decode(b: Node) -> Node:
        magnitude = ir.and_(b, 0x7F)
        normal = ir.bitcast(ir.shl(magnitude, shift) + ((127 - bias) << 23), "f32")
        small = ir.cast(magnitude, "f32") * unit
        r = where(ir.lt(magnitude, 1 << mantissa), small, normal)
        if infinity is not None:
            special = ir.bitcast(ir.or_(ir.shl(magnitude, shift), 0x7F800000), "f32")
            r = where(ir.ge(magnitude, infinity), special, r)
        elif not unsigned_zero:
            r = where(ir.eq(magnitude, 0x7F), ir.const(math.nan, "f32"), r)
        r = ir.bitcast(ir.or_(ir.bitcast(r, "u32"), ir.shl(ir.and_(b, 0x80), 24)), "f32")
        return where(ir.eq(b, 0x80), ir.const(math.nan, "f32"), r) if unsigned_zero else r

    def encode(x: Node) -> Node:
        bits = ir.bitcast(x, "u32")
        magnitude = ir.and_(bits, 0x7FFFFFFF)
        odd = ir.and_(ir.shr(magnitude, shift), 1)
        normal = ir.shr(magnitude - ((127 - bias) << 23) + ((1 << (shift - 1)) - 1) + odd, shift)
        # Adding 2**23 units rounds to a whole number of them.
        big = unit * 2.0**23
        (big_bits,) = struct.unpack("<I", struct.pack("<f", big))
        small = ir.bitcast(ir.bitcast(magnitude, "f32") + big, "u32") - big_bits
        r = where(ir.lt(magnitude, (128 - bias) << 23), small, normal)
        sign = ir.and_(ir.shr(bits, 24), 0x80)
        # What is beyond the largest number, by a unit in its last place or more.
        end = (480.0 if exponent == 4 else 65536.0) if not unsigned_zero else 256.0 if exponent == 4 else 65536.0
        (end_bits,) = struct.unpack("<I", struct.pack("<f", end))
        beyond = 0x80 if unsigned_zero else 0x7F if infinity is None else infinity
        r = where(ir.ge(magnitude, end_bits), beyond, r)
        if saturates:
            r = ir.minimum(r, ir.const(0x7E, "u32"))
        if infinity is not None or saturates:
            r = where(ir.gt(magnitude, 0x7F800000), 0x7F, r)
        if unsigned_zero:
            return where(ir.eq(r, 0), r, ir.or_(r, sign))
        return ir.or_(r, sign)

    LOWER[f"{name}_decode"], LOWER[f"{name}_encode"] = decode, encode


define_float8("f8e4m3fn", 4, 3, 7, saturates=True)
define_float8("f8e5m2", 5, 2, 15)
define_float8("f8e4m3fnuz", 4, 3, 8, unsigned_zero=True)
define_float8("f8e5m2fnuz", 5, 2, 16, unsigned_zero=True)


@lower
def f8e8m0fnu_decode(b: Node) -> Node:
    """2^(b - 127), NaN for 255."""
    bits = where(ir.eq(b, 0), 1 << 22, where(ir.eq(b, 255), 0x7FC00000, ir.shl(b, 23)))
    return ir.bitcast(bits, "f32")


@lower
def f8e8m0fnu_encode(x: Node) -> Node:
    """The exponent of |x|, rounded to nearest and up from the middle; what is below 2^-127 becomes that, what is beyond 2^127 NaN."""
    bits = ir.and_(ir.bitcast(x, "u32"), 0x7FFFFFFF)
    small, exponent = ir.le(bits, 1 << 22), ir.shr(bits, 23)
    up = ir.cast(ir.ne(ir.and_(bits, 1 << 22), 0), "u32")
    return where(small, 0, ir.minimum(exponent + up, ir.const(255, "u32")))


# ---- exponentials and logarithms ----------------------------------------------------------------------------------


def _exp_series(r: Node, first: int) -> Node:
    """(exp(r) - the terms below r**first / first!) / r**first for |r| <= ln(2)/2."""
    n = by_dtype(r, 8, 14)
    return poly(r, [1 / math.factorial(k) for k in range(first, n)])


def _exp_reduce(x: Node) -> tuple[Node, Node]:
    """x = n ln 2 + r, |r| <= ln(2)/2."""
    hi, lo = split(LN2, x.dtype, by_dtype(x, 14, 40), 2)
    n = ir.rint(x * float(LOG2_E))
    return n, (x - n * hi) - n * lo


# exp(r) for |r| <= ln(2)/2, to a relative 9e-8; exactly 1 at 0.
EXP32 = (1.0, 0.99999971, 0.49999149, 0.16667637, 0.04189802, 0.0082903)


def _exp32(x: Node) -> Node:
    """exp in as few operations as vectors allow: within 2 units in the last place; results below 2**-125 may be flushed to 0."""
    # Comparisons, so that NaN passes, each with what it selects: an instruction of x86.
    x = where(ir.gt(x, 89.0), 89.0, x)
    x = where(ir.lt(x, -87.5), -87.5, x)
    # 1.5 * 2**23: the sum's low bits are the nearest integer. It is taken from the bits, since Vulkan's drivers may cancel
    # a number that is added and subtracted again.
    shifted = ir.bitcast(ir.fma(x, float(LOG2_E), 12582912.0), "i32")
    n = ir.cast(shifted - 0x4B400000, "f32")
    hi, lo = split(LN2, "f32", 14, 2)
    r = ir.fma(n, -lo, ir.fma(n, -hi, x))
    # A factor of 2 moves from the power to the series, so that the power's exponent, from -127 to 127, is 0 where the result is.
    power = ir.bitcast(ir.shl(shifted + 126, 23), "f32")
    return poly(r, [2.0 * c for c in EXP32]) * power


@lower
def exp(x: Node) -> Node:
    if x.dtype == "f32":
        return _exp32(x)
    f = FORMAT[x.dtype]
    x = ir.clamp(x, -f.max_exp - by_dtype(x, 20.0, 40.0), f.max_exp + 1.0)
    n, r = _exp_reduce(x)
    return scale(1.0 + (r + r * r * _exp_series(r, 2)), n)


@lower
def exp2(x: Node) -> Node:
    f = FORMAT[x.dtype]
    x = ir.clamp(x, -f.bias - by_dtype(x, 26.0, 56.0), f.bias + 2.0)
    n = ir.rint(x)
    r = (x - n) * float(LN2)
    return scale(1.0 + (r + r * r * _exp_series(r, 2)), n)


@lower
def expm1(x: Node) -> Node:
    c = ir.clamp(x, by_dtype(x, -30.0, -60.0), 60.0)
    n, r = _exp_reduce(c)
    q = r + r * r * _exp_series(r, 2)
    s = _power_of_two(ir.cast(n, FORMAT[x.dtype].int), x.dtype)
    y = where(ir.eq(n, 0.0), q, q * s + (s - 1.0))
    y = where(ir.gt(x, 50.0), ir.exp(x), y)
    return where(ir.or_(ir.eq(x, 0.0), ir.isnan(x)), x, y)


def _log_reduce(x: Node) -> tuple[Node, Node]:
    """x = 2**e m, m from sqrt(1/2) to sqrt(2), for positive finite x; e as a float node."""
    f = FORMAT[x.dtype]
    small = ir.lt(x, f.tiny)
    shift = f.mantissa + 1
    bits = ir.bitcast(where(small, x * 2.0**shift, x), f.int)
    root = by_dtype(x, 0x3F3504F3, 0x3FE6A09E667F3BCD)
    t = bits - root
    e = ir.cast(ir.shr(t, f.mantissa), x.dtype) - where(small, float(shift), ir.const(0.0, x.dtype))
    return e, ir.bitcast(ir.and_(t, (1 << f.mantissa) - 1) + root, x.dtype)


def _log_mantissa(m: Node) -> Node:
    """log(m) for m from sqrt(1/2) to sqrt(2)."""
    return _log_series(m - 1.0)


def _log_series(f: Node) -> Node:
    """log(1 + f) for f from sqrt(1/2) - 1 to sqrt(2) - 1."""
    s = f / (2.0 + f)
    z = s * s
    series = z * poly(z, [2 / (2 * k + 3) for k in range(by_dtype(f, 5, 11))])
    h = 0.5 * f * f
    return f - (h - s * (h + series))


def _log_special(x: Node, y: Node) -> Node:
    y = where(ir.lt(x, math.inf), y, x)  # infinity and NaN
    return where(ir.gt(x, 0.0), y, where(ir.eq(x, 0.0), -math.inf, where(ir.isnan(x), x, math.nan)))


@lower
def log(x: Node) -> Node:
    hi, lo = split(LN2, x.dtype, by_dtype(x, 14, 40), 2)
    e, m = _log_reduce(x)
    return _log_special(x, e * hi + (_log_mantissa(m) + e * lo))


@lower
def log2(x: Node) -> Node:
    e, m = _log_reduce(x)
    return _log_special(x, e + _log_mantissa(m) * float(LOG2_E))


@lower
def log10(x: Node) -> Node:
    hi, lo = split(LOG10_2, x.dtype, by_dtype(x, 14, 40), 2)
    e, m = _log_reduce(x)
    return _log_special(x, e * hi + (_log_mantissa(m) * (1 / math.log(10.0)) + e * lo))


@lower
def log1p(x: Node) -> Node:
    near = ir.and_(ir.gt(x, -0.29), ir.lt(x, 0.41))
    return where(near, _log_series(where(near, x, ir.const(0.0, x.dtype))), ir.log(1.0 + x))


@lower
def pow_(x: Node, y: Node) -> Node:
    """Through log2 with twice the precision."""
    a = ir.abs(x)
    e, m = _log_reduce(a)
    f = m - 1.0
    d = head(2.0 + f)
    d_lo = (2.0 - d) + f
    s = f / (2.0 + f)
    p, p_lo = two_product(s, d)
    s_lo = (((f - p) - p_lo) - s * d_lo) / d
    z = s * s
    # log(m) = 2 s + s**3 (2/3 + 2/5 s**2 ...); the cubic term needs more than one float, too.
    z_hi, z_lo = two_product(s, s)
    cube, cube_lo = two_product(z_hi, s)
    cube_lo = cube_lo + (z_lo * s + 3.0 * z * s_lo)
    third = split(Fraction(2, 3), x.dtype, by_dtype(x, 24, 53), 2)
    t, t_lo = two_product(cube, third[0])
    t_lo = t_lo + cube * third[1] + cube_lo * third[0]
    rest = z * z * s * poly(z, [2 / (2 * k + 5) for k in range(by_dtype(x, 5, 11))])
    hi, lo = two_sum(2.0 * s, t)
    lo = lo + (2.0 * s_lo + t_lo + rest)
    hi, lo = two_sum(hi, lo)
    # to base 2
    l2 = split(LOG2_E, x.dtype, by_dtype(x, 24, 53), 2)
    g, g_lo = two_product(hi, l2[0])
    g_lo = g_lo + (hi * l2[1] + lo * l2[0])
    big, small = two_sum(e, g)
    small = where(ir.eq(e, 0.0), g_lo, small + g_lo)
    big = where(ir.eq(e, 0.0), g, big)
    big, small = two_sum(big, small)
    fmt = FORMAT[x.dtype]
    limit = 1.9 * fmt.bias
    yc = ir.clamp(y, -(2.0 ** (fmt.bias // 2)), 2.0 ** (fmt.bias // 2))
    w, w_lo = two_product(yc, big)
    w_lo = w_lo + yc * small
    out = ir.not_(ir.lt(ir.abs(w), limit))
    n = ir.rint(where(out, ir.const(0.0, x.dtype), w))
    r = ((w - n) + w_lo) * float(LN2)
    v = scale(1.0 + (r + r * r * _exp_series(r, 2)), n)
    v = where(out, where(ir.gt(w, 0.0), math.inf, ir.const(0.0, x.dtype)), v)
    # specials
    whole = ir.eq(ir.floor(y), y)
    odd = ir.and_(whole, ir.ne(ir.floor(y * 0.5), y * 0.5))
    odd = ir.and_(odd, ir.lt(ir.abs(y), math.inf))
    zero, inf = ir.const(0.0, x.dtype), ir.const(math.inf, x.dtype)
    v = where(ir.eq(a, 0.0), where(ir.lt(y, 0.0), inf, zero), v)
    v = where(ir.eq(a, math.inf), where(ir.lt(y, 0.0), zero, inf), v)
    grows = ir.eq(ir.gt(a, 1.0), ir.gt(y, 0.0))
    v = where(ir.eq(ir.abs(y), math.inf), where(ir.eq(a, 1.0), 1.0, where(grows, inf, zero)), v)
    negative = ir.lt(ir.bitcast(x, fmt.int), 0)
    v = where(ir.and_(negative, odd), -v, v)
    bad = ir.and_(ir.and_(ir.lt(x, 0.0), ir.gt(x, -math.inf)), ir.not_(whole))
    v = where(bad, math.nan, v)
    v = where(ir.or_(ir.isnan(x), ir.isnan(y)), x + y, v)
    return where(ir.or_(ir.eq(x, 1.0), ir.eq(y, 0.0)), 1.0, v)


# ---- trigonometry -------------------------------------------------------------------------------------------------


def _quadrant(x: Node) -> tuple[Node, Node]:
    """x = n pi/2 + r, |r| <= pi/4, and n modulo 4. float32 to |x| = 5e4, float64 to 1e6, after which accuracy falls."""
    parts = split(PI / 2, x.dtype, by_dtype(x, 9, 32), 4)
    n = ir.rint(x * float(2 / PI))
    r = x
    for p in parts:  # by fma: NVIDIA's Vulkan compiler makes x - n * p - n * q of float64 into x - n * (p + q)
        r = ir.fma(n, -p, r)
    return ir.and_(ir.cast(n, "i32"), 3), r


def _sin_cos(x: Node) -> tuple[Node, Node, Node]:
    q, r = _quadrant(x)
    z = r * r
    n = by_dtype(x, 5, 9)
    s = r + r * z * poly(z, [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, n + 1)])
    c = (1.0 - 0.5 * z) + z * z * poly(z, [(-1) ** k / math.factorial(2 * k) for k in range(2, n + 2)])
    return q, s, c


@lower
def sin(x: Node) -> Node:
    q, s, c = _sin_cos(x)
    v = where(ir.eq(ir.and_(q, 1), 0), s, c)
    v = where(ir.ge(q, 2), -v, v)
    return where(ir.lt(ir.abs(x), math.inf), v, math.nan)


@lower
def cos(x: Node) -> Node:
    q, s, c = _sin_cos(x)
    v = where(ir.eq(ir.and_(q, 1), 0), c, s)
    v = where(ir.eq(ir.and_(q + 1, 2), 0), v, -v)
    return where(ir.lt(ir.abs(x), math.inf), v, math.nan)


@lower
def tan(x: Node) -> Node:
    q, s, c = _sin_cos(x)
    odd = ir.eq(ir.and_(q, 1), 1)
    v = where(odd, -c, s) / where(odd, s, c)
    return where(ir.lt(ir.abs(x), math.inf), v, math.nan)


@lower
def atan(x: Node) -> Node:
    a = ir.abs(x)
    far, mid = ir.gt(a, 2.414213562373095), ir.gt(a, 0.4142135623730950)
    t = where(far, -1.0, where(mid, a - 1.0, a)) / where(far, a, where(mid, a + 1.0, 1.0))
    z = t * t
    y = t + t * z * poly(z, [(-1) ** k / (2 * k + 1) for k in range(1, by_dtype(x, 10, 23))])
    bits = by_dtype(x, 24, 53)
    half, quarter = split(PI / 2, x.dtype, bits, 2), split(PI / 4, x.dtype, bits, 2)
    hi = where(far, half[0], where(mid, quarter[0], ir.const(0.0, x.dtype)))
    lo = where(far, half[1], where(mid, quarter[1], ir.const(0.0, x.dtype)))
    return ir.copysign(hi + (y + lo), x)


@lower
def atan2(y: Node, x: Node) -> Node:
    ax, ay = ir.abs(x), ir.abs(y)
    steep = ir.gt(ay, ax)
    top, bottom = where(steep, ax, ay), where(steep, ay, ax)
    t = where(ir.eq(top, bottom), where(ir.eq(top, 0.0), ir.const(0.0, x.dtype), 1.0), top / bottom)
    r = ir.atan(t)
    r = where(steep, float(PI / 2) - r, r)
    r = where(ir.signbit(x), float(PI) - r, r)
    return where(ir.or_(ir.isnan(x), ir.isnan(y)), x + y, ir.copysign(r, y))


@lower
def asin(x: Node) -> Node:
    return where(ir.le(ir.abs(x), 1.0), ir.atan2(x, ir.sqrt((1.0 - x) * (1.0 + x))), math.nan)


@lower
def acos(x: Node) -> Node:
    return where(ir.le(ir.abs(x), 1.0), ir.atan2(ir.sqrt((1.0 - x) * (1.0 + x)), x), math.nan)


# ---- hyperbolic ---------------------------------------------------------------------------------------------------


@lower
def sinh(x: Node) -> Node:
    a = ir.abs(x)
    e, h = ir.expm1(a), ir.exp(0.5 * a)
    return ir.copysign(where(ir.gt(a, 40.0), 0.5 * h * h, 0.5 * (e + e / (e + 1.0))), x)


@lower
def cosh(x: Node) -> Node:
    a = ir.abs(x)
    e, h = ir.exp(a), ir.exp(0.5 * a)
    return where(ir.gt(a, 40.0), 0.5 * h * h, 0.5 * e + 0.5 / e)


TANH32 = (
    -0.3333326,
    0.13330831,
    -0.053688023,
    0.02046942,
    -0.0055151642,
)  # of (tanh(x) / x - 1) / x² in x * x, on [0, 0.65]


@lower
def tanh(x: Node) -> Node:
    a = ir.abs(x)
    if x.dtype == "f32":  # within 2 units in the last place
        far = 1.0 - 2.0 / (ir.exp(2.0 * where(ir.gt(a, 20.0), 20.0, a)) + 1.0)
        s = x * x
        return where(ir.lt(a, 0.65), ir.fma(x * s, poly(s, TANH32), x), ir.copysign(far, x))
    e = ir.expm1(ir.minimum(2.0 * a, 60.0))
    return ir.copysign(where(ir.gt(a, 22.0), 1.0, e / (e + 2.0)), x)


@lower
def asinh(x: Node) -> Node:
    a = ir.abs(x)
    far = ir.gt(a, by_dtype(x, 4096.0, 2.0**28))
    s = where(far, 1.0, a)
    near = ir.log1p(s + s * s / (1.0 + ir.sqrt(s * s + 1.0)))
    return ir.copysign(where(far, ir.log(a) + float(LN2), near), x)


@lower
def acosh(x: Node) -> Node:
    far = ir.gt(x, by_dtype(x, 4096.0, 2.0**28))
    t = where(far, 1.0, x) - 1.0
    y = where(far, ir.log(x) + float(LN2), ir.log1p(t + ir.sqrt(2.0 * t + t * t)))
    return where(ir.lt(x, 1.0), math.nan, y)


@lower
def atanh(x: Node) -> Node:
    a = ir.abs(x)
    return ir.copysign(0.5 * ir.log1p(2.0 * a / (1.0 - a)), x)


# ---- powers and remainders ----------------------------------------------------------------------------------------


@lower
def rsqrt(x: Node) -> Node:
    return 1.0 / ir.sqrt(x)


@lower
def hypot(a: Node, b: Node) -> Node:
    a, b = ir.abs(a), ir.abs(b)
    big, small = where(ir.gt(a, b), a, b), where(ir.gt(a, b), b, a)
    t = small / where(ir.eq(big, 0.0), 1.0, big)
    y = where(ir.eq(big, 0.0), big, big * ir.sqrt(1.0 + t * t))
    y = where(ir.or_(ir.isnan(a), ir.isnan(b)), a + b, y)
    return where(ir.or_(ir.eq(a, math.inf), ir.eq(b, math.inf)), math.inf, y)


@lower
def fmod(a: Node, b: Node) -> Node:
    """Exact for |a / b| below 2**100, about."""
    r, d = ir.abs(a), ir.abs(b)
    for _ in range(by_dtype(a, 6, 3)):
        p, p_lo = two_product(ir.trunc(r / d), d)
        r = where(ir.lt(ir.abs(r), d), r, (r - p) - p_lo)
    r = where(ir.lt(r, 0.0), r + d, r)
    r = where(ir.ge(r, d), r - d, r)
    r = where(ir.eq(d, math.inf), ir.abs(a), r)
    r = where(ir.and_(ir.gt(d, 0.0), ir.lt(ir.abs(a), math.inf)), r, math.nan)
    return where(ir.or_(ir.isnan(a), ir.isnan(b)), a + b, ir.copysign(r, a))


# ---- error function -----------------------------------------------------------------------------------------------

# exp(a a) erfc(a) (1 + 2 a) in t = (a - 4) / (a + 4); log(erfc(a)) from 1 to 4; lgamma(x) / ((x - 1) (x - 2)) from 1
# to 2;
# erfinv(x) / x in w = -log(1 - x x) below, in sqrt(w) above. The variable of each is scaled to [-1, 1].
ERFCX32 = (
    1.232995117, -0.1396211139, 0.01537976872, 0.06809694142, -0.1010409408, 0.09373407344, -0.06631904409,
    0.03716148287, -0.01623039198, 0.005047229283, -0.0007091327872, -0.0002204044944, 0.0001142081728,
    -8.625303353e-6,
)  # fmt: skip
ERFCX64 = (
    1.232995118625552509, -0.1396211168405625059, 0.01537965210262004392, 0.06809705425469155514,
    -0.1010390660363253664, 0.09373283499839601941, -0.06633036581163648626, 0.0371675155366440533,
    -0.01619773406615478091, 0.005031969985840801, -0.0007577732176142186577, -0.0001992567349796424434,
    0.0001506212960600684998, -0.00002439910619582832303, -0.00001122070854632643107, 5.709646373555176772e-6,
    2.907848740782514529e-7, -8.257585894673802401e-7, 7.916369199346503607e-8, 1.112176348040388976e-7,
    -2.22201201633469999e-8, -1.574522607317695644e-8, 4.256113632752915993e-9, 2.431139789646190831e-9,
    -7.153294871835132144e-10, -3.852889957880852259e-10, 1.06151198765621577e-10, 5.192409094143247452e-11,
    -1.240863779976342888e-11, -4.045868648934004166e-12, 8.282292682106802808e-13,
)  # fmt: skip
ERF32 = (  # of erf(x) / x in x * x, on [0, 1]
    1.128379166, -0.3761262667, 0.1128359472, -0.02685421201, 0.005189087424, -0.0008016864289, 7.875875069e-05,
)  # fmt: skip
LOGERFC = (
    -7.806815277, -8.029021022, -2.123760691, -0.03664749492, 0.01096112407, -0.00319047281, 0.0008815708784,
    -0.0002274034123, 4.136663368e-5,
)  # fmt: skip
LGAMMA32 = (
    0.4831289523, -0.07297995105, 0.01572776201, -0.003913499793, 0.001050513437, -0.0002948871807,
    8.320684673e-5, -2.434717638e-5, 9.563504411e-6, -2.979403955e-6,
)  # fmt: skip
LGAMMA64 = (
    0.48312895054098089, -0.07297994795715304331, 0.01572785026864109483, -0.003913560937626182647,
    0.001049818664454740155, -0.0002945507015196472115, 0.00008510090373499431308, -0.00002509432866894719382,
    7.511391855641882936e-6, -2.274247410238393648e-6, 6.948428064186311891e-7, -2.138632338411551949e-7,
    6.623878077265300676e-8, -2.062102743185428608e-8, 6.430260727636965631e-9, -2.016947955623981688e-9,
    6.566403819263111722e-10, -2.087462069397109279e-10, 5.025822209560934585e-11, -1.539574800642078583e-11,
    1.158611529515727769e-11, -3.803618166622364032e-12,
)  # fmt: skip
ERFINV32_NEAR = (
    1.501409352, 0.6166007235, -0.02610828076, -0.01957419401, 0.008525934498, -0.0004843499507,
    -0.0008364687382, 0.0002840751529, 2.515743537e-5, -3.333980931e-5, 4.149577433e-6,
)  # fmt: skip
ERFINV32_FAR = (
    3.051757101, 0.9867813306, 0.005541301257, -0.003870413677, 0.002578983363, -0.001715070153,
    0.0009364357785, -0.0003187472543, -1.710037994e-5, 7.970657251e-5, -2.715947369e-5,
)  # fmt: skip
ERFINV64_NEAR = (
    1.653654562683102714, 0.7504943200799635751, -0.05892256710377839195, -0.02260444745345023169,
    0.0178083618183217554, -0.004137314377403390971, -0.001271692268923054069, 0.00123248556855009309,
    -0.0002643936637645027404, -0.0001168888390636839765, 0.00009336736525855552695,
    -0.00001502771392660767249, -0.00001125722374228959915, 7.130066374076711427e-6, -6.839448584111028586e-7,
    -1.059336931327947965e-6, 5.397895417173956961e-7, -1.016788152284389942e-8, -9.905042307855316046e-8,
    3.914267100133108248e-8, 5.039596477958063511e-9, -8.557984074479201939e-9, 1.446105050767602308e-9,
    7.680990475576524956e-10, -2.546615799889266722e-10,
)  # fmt: skip
ERFINV64_FAR = (
    4.193227791584449329, 1.868691304955463374, 0.001856703339106322552, -0.003349799493654582288,
    0.002142913928651258527, -0.001150347595255086196, 0.00065053205388713555, -0.0004854575067831568067,
    0.0004813039981252615054, -0.0005030366800744006726, 0.0004645320799772825452, -0.0003420044811452613311,
    0.0001691323082276490417, -9.572213544131441248e-6, -0.00007769119442548080724, 0.00008119782679914712609,
    -0.00004864171242196551952, 0.00002119023809445298294, 4.391436041848135236e-6,
    -0.00002186055790710637822, 0.00001330637509878014928, 2.881455216232336686e-6, -4.514547791625892333e-6,
    2.942713269533360338e-7, 3.943803723704450446e-7,
)  # fmt: skip


def _erf_small(x: Node) -> Node:
    """erf(x) for |x| <= 1."""
    c = 2 / math.sqrt(math.pi)
    series = [c * (-1) ** k / (math.factorial(k) * (2 * k + 1)) for k in range(20)]
    return x * poly(x * x, by_dtype(x, ERF32, series))


def _erfc_large(a: Node) -> Node:
    """erfc(a) for a >= 0, with small relative error."""
    t = (a - 4.0) / (a + 4.0)
    hi = head(a)  # exp(-a a) in two factors, so that the rounding of a a does not matter
    e = ir.exp(-(hi * hi)) * ir.exp(-((a - hi) * (a + hi)))
    y = e * poly(t, by_dtype(a, ERFCX32, ERFCX64)) / (1.0 + 2.0 * a)
    return where(ir.gt(a, by_dtype(a, 10.1, 27.3)), ir.const(0.0, a.dtype), y)


@lower
def erf(x: Node) -> Node:
    a = ir.abs(x)
    if x.dtype == "f32":
        far = 1.0 - ir.exp(poly((ir.minimum(a, 4.0) - 2.5) * (1 / 1.5), LOGERFC))
    else:
        far = 1.0 - _erfc_large(a)
    return where(ir.gt(a, 1.0), ir.copysign(far, x), _erf_small(x))


@lower
def erfc(x: Node) -> Node:
    a = ir.abs(x)
    far = _erfc_large(a)
    far = where(ir.lt(x, 0.0), 2.0 - far, far)
    return where(ir.lt(a, 0.5), 1.0 - _erf_small(x), far)


@lower
def erfinv(x: Node) -> Node:
    table: tuple[float, ...]
    w = -ir.log((1.0 - x) * (1.0 + x))
    w = where(ir.lt(ir.abs(x), by_dtype(x, 2.0**-6, 2.0**-6)), -ir.log1p(-(x * x)), w)
    if x.dtype == "f32":
        near = poly(w * (2 / 5) - 1.0, ERFINV32_NEAR)
        lo, hi, edge = math.sqrt(5.0), 4.2, 5.0
        table = ERFINV32_FAR
    else:
        near = poly(w * (2 / 6.25) - 1.0, ERFINV64_NEAR)
        lo, hi, edge = 2.5, 6.2, 6.25
        table = ERFINV64_FAR
    far = poly((ir.sqrt(ir.maximum(w, 1.0)) * 2.0 - (lo + hi)) * (1 / (hi - lo)), table)
    y = x * where(ir.lt(w, edge), near, far)
    y = where(ir.eq(ir.abs(x), 1.0), ir.copysign(ir.const(math.inf, x.dtype), x), y)
    return where(ir.le(ir.abs(x), 1.0), y, math.nan)


# ---- gamma function -----------------------------------------------------------------------------------------------

BERNOULLI = [
    Fraction(1, 6), Fraction(-1, 30), Fraction(1, 42), Fraction(-1, 30), Fraction(5, 66), Fraction(-691, 2730),
    Fraction(7, 6), Fraction(-3617, 510), Fraction(43867, 798), Fraction(-174611, 330),
]  # fmt: skip


def _sin_pi(a: Node) -> Node:
    """sin(pi a) for a >= 0."""
    t = a - 2.0 * ir.floor(0.5 * a)  # [0, 2)
    n = ir.rint(2.0 * t)
    r = (t - 0.5 * n) * float(PI)
    z = r * r
    k = by_dtype(a, 5, 9)
    s = r + r * z * poly(z, [(-1) ** i / math.factorial(2 * i + 1) for i in range(1, k + 1)])
    c = 1.0 + z * poly(z, [(-1) ** i / math.factorial(2 * i) for i in range(1, k + 2)])
    q = ir.and_(ir.cast(n, "i32"), 3)
    v = where(ir.eq(ir.and_(q, 1), 0), s, c)
    return where(ir.ge(q, 2), -v, v)


def _lgamma_positive(a: Node) -> Node:
    terms = by_dtype(a, 4, 10)
    big = ir.ge(a, 8.0)
    s = where(big, a, 8.0)
    i = 1.0 / s
    stirling = poly(i * i, [float(b / (2 * k * (2 * k - 1))) for k, b in enumerate(BERNOULLI[:terms], 1)])
    ls = ir.log(s)
    large = (s - 0.5) * (ls - 1.0) + (0.5 * math.log(2 * math.pi) - 0.5) + i * stirling
    large = where(ir.eq(a, math.inf), a, large)
    # Down to [1, 2] by the recurrence.
    y, product = where(big, 1.5, a), ir.const(1.0, a.dtype)
    low = ir.lt(y, 1.0)
    product = where(low, 1.0 / y, product)
    y = where(low, y + 1.0, y)
    for _ in range(6):
        high = ir.gt(y, 2.0)
        y = where(high, y - 1.0, y)
        product = where(high, product * y, product)
    g = (y - 1.0) * (y - 2.0) * poly(2.0 * y - 3.0, by_dtype(a, LGAMMA32, LGAMMA64))
    tiny = where(ir.lt(a, FORMAT[a.dtype].tiny * 4.0), -ir.log(a), ir.log(product) + g)
    return where(big, large, tiny)


@lower
def lgamma(x: Node) -> Node:
    a = ir.abs(x)
    y = _lgamma_positive(a)
    s = ir.abs(_sin_pi(a)) * a
    reflected = ir.log(float(PI) / s) - y
    reflected = where(ir.lt(a, by_dtype(x, 1e-6, 1e-12)), -ir.log(a), reflected)
    reflected = where(ir.and_(ir.eq(ir.floor(a), a), ir.gt(a, 0.0)), math.inf, reflected)
    return where(ir.lt(x, 0.0), where(ir.eq(a, math.inf), math.inf, reflected), where(ir.eq(a, 0.0), math.inf, y))


@lower
def digamma(x: Node) -> Node:
    negative = ir.lt(x, 0.0)
    y = where(negative, 1.0 - x, x)
    total = ir.const(0.0, x.dtype)
    limit, terms = by_dtype(x, (6.0, 4), (10.0, 8))
    for _ in range(int(limit)):
        low = ir.lt(y, limit)
        total = where(low, total - 1.0 / y, total)
        y = where(low, y + 1.0, y)
    i = 1.0 / y
    z = i * i
    series = z * poly(z, [float(b / (2 * k)) for k, b in enumerate(BERNOULLI[:terms], 1)])
    v = total + (ir.log(y) - 0.5 * i - series)
    v = where(ir.eq(y, math.inf), y, v)
    a = ir.abs(x)
    t = a - ir.floor(a)  # pi / tan(pi x), of period 1 and odd
    s, c = _sin_pi(t), _sin_pi(t + 0.5)
    v = where(negative, v + float(PI) * c / s, v)
    v = where(ir.and_(negative, ir.eq(ir.floor(x), x)), math.nan, v)
    return where(ir.eq(x, 0.0), ir.copysign(ir.const(math.inf, x.dtype), -x), v)
