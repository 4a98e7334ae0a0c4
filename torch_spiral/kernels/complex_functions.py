"""Functions of complex numbers, as ir.py's names; reached through them."""

from __future__ import annotations

import math
from typing import Any

from . import ir
from .ir import Complex, Node, where


def lift(a: Any, dtype: str) -> Complex:
    """a as a Complex with parts of a float dtype."""
    if isinstance(a, Complex):
        return Complex(ir.cast(a.re, dtype), ir.cast(a.im, dtype))
    if isinstance(a, complex):
        return Complex(ir.const(a.real, dtype), ir.const(a.imag, dtype))
    return Complex(ir.cast(ir.as_node(a, dtype), dtype), ir.const(0, dtype))


def pair(a: Any, b: Any) -> tuple[Complex, Complex]:
    """Both as Complex of the common dtype."""
    dtype = None
    for x in (a, b):
        if isinstance(x, Complex) or hasattr(x, "dtype"):
            dtype = x.dtype if dtype is None else ir.promote(dtype, x.dtype)
    if dtype is None:
        raise TypeError(f"{a!r}, {b!r}: no operand has a dtype")
    dtype = dtype if dtype in ("f64", "u64") else "f32"
    return lift(a, dtype), lift(b, dtype)


def _zero(a: Complex) -> Node:
    return ir.const(0.0, a.dtype)


def add(a: Complex, b: Complex) -> Complex:
    return Complex(a.re + b.re, a.im + b.im)


def sub(a: Complex, b: Complex) -> Complex:
    return Complex(a.re - b.re, a.im - b.im)


def mul(a: Complex, b: Complex) -> Complex:
    return Complex(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re)


def div(a: Complex, b: Complex) -> Complex:
    """Scaled, as ATen's: no overflow where the quotient has none."""
    s = ir.fmax(ir.abs(b.re), ir.abs(b.im))
    s = where(ir.and_(ir.gt(s, 0.0), ir.lt(s, math.inf)), s, 1.0)
    c, d = b.re / s, b.im / s
    q = c * c + d * d
    re, im = (a.re * c + a.im * d) / q / s, (a.im * c - a.re * d) / q / s
    zero = ir.and_(ir.eq(b.re, 0.0), ir.eq(b.im, 0.0))
    return Complex(where(zero, a.re / b.re, re), where(zero, a.im / b.re, im))


def times_i(a: Complex) -> Complex:
    return Complex(-a.im, a.re)


def over_i(a: Complex) -> Complex:
    return Complex(a.im, -a.re)


def exp(a: Complex) -> Complex:
    m = ir.exp(a.re)
    real = ir.eq(a.im, 0.0)
    re, im = m * ir.cos(a.im), m * ir.sin(a.im)
    gone = ir.eq(a.re, -math.inf)  # 0, whatever the angle
    zero = _zero(a)
    return Complex(where(gone, zero, where(real, m, re)), where(gone, zero, where(real, a.im, im)))


def exp2(a: Complex) -> Complex:
    return exp(Complex(a.re * math.log(2.0), a.im * math.log(2.0)))


def expm1(a: Complex) -> Complex:
    """exp(a) - 1, accurate near 0."""
    s = ir.sin(a.im * 0.5)
    e = ir.expm1(a.re)
    return Complex(e * ir.cos(a.im) - 2.0 * s * s, (e + 1.0) * ir.sin(a.im))


def log(a: Complex) -> Complex:
    """Near |a| = 1 through log1p, so that the real part keeps its digits."""
    x, y = ir.abs(a.re), ir.abs(a.im)
    big, small = where(ir.gt(x, y), x, y), where(ir.gt(x, y), y, x)
    near = ir.and_(ir.gt(big, 0.5), ir.lt(big, 2.0))
    close = 0.5 * ir.log1p((big - 1.0) * (big + 1.0) + small * small)
    return Complex(where(near, close, ir.log(ir.hypot(a.re, a.im))), ir.atan2(a.im, a.re))


def _scaled(a: Complex, by: float) -> Complex:
    return Complex(a.re * by, a.im * by)


def log2(a: Complex) -> Complex:
    return _scaled(log(a), 1 / math.log(2.0))


def log10(a: Complex) -> Complex:
    return _scaled(log(a), 1 / math.log(10.0))


def log1p(a: Complex) -> Complex:
    """log(1 + a), accurate near 0."""
    small = ir.lt(ir.abs(a.re) + ir.abs(a.im), 0.5)
    near = 0.5 * ir.log1p(where(small, a.re * (2.0 + a.re) + a.im * a.im, _zero(a)))
    far = log(Complex(a.re + 1.0, a.im))
    return Complex(where(small, near, far.re), far.im)


def sqrt(a: Complex) -> Complex:
    """The root with a real part of at least 0."""
    m = ir.hypot(a.re, a.im)
    x, y = ir.abs(a.re), ir.abs(a.im)
    t = ir.sqrt((x * 0.5) + (m * 0.5))
    other = where(ir.eq(t, 0.0), _zero(a), 0.5 * y / where(ir.eq(t, 0.0), 1.0, t))
    right = ir.ge(a.re, 0.0)
    re, im = where(right, t, other), where(right, other, t)
    infinite = ir.eq(y, math.inf)
    return Complex(where(infinite, math.inf, re), ir.copysign(where(infinite, math.inf, im), a.im))


def rsqrt(a: Complex) -> Complex:
    return div(lift(1.0, a.dtype), sqrt(a))


def pow(a: Complex, b: Complex) -> Complex:
    """exp(b log(a)); a ** 0 is 1, and 0 ** b is 0 for a positive real part of b."""
    v = exp(mul(b, log(a)))
    a_zero = ir.and_(ir.eq(a.re, 0.0), ir.eq(a.im, 0.0))
    b_zero = ir.and_(ir.eq(b.re, 0.0), ir.eq(b.im, 0.0))
    vanish = ir.and_(a_zero, ir.gt(b.re, 0.0))
    v = Complex(where(vanish, _zero(a), v.re), where(vanish, _zero(a), v.im))
    return Complex(where(b_zero, 1.0, v.re), where(b_zero, _zero(a), v.im))


def sinh(a: Complex) -> Complex:
    return Complex(ir.sinh(a.re) * ir.cos(a.im), ir.cosh(a.re) * ir.sin(a.im))


def cosh(a: Complex) -> Complex:
    return Complex(ir.cosh(a.re) * ir.cos(a.im), ir.sinh(a.re) * ir.sin(a.im))


def tanh(a: Complex) -> Complex:
    """Through exp(-2 |re|), so that nothing overflows."""
    x = ir.abs(a.re)
    e = ir.exp(-2.0 * x)
    s, c = ir.sin(a.im), ir.cos(a.im)
    down = -ir.expm1(-2.0 * x)
    d = down * down + 4.0 * e * c * c  # 4 exp(-2x) |cosh(x + iy)|**2
    re, im = down * (1.0 + e) / d, 4.0 * e * s * c / d
    infinite = ir.eq(x, math.inf)
    return Complex(ir.copysign(where(infinite, 1.0, re), a.re), where(infinite, _zero(a), im))


def sin(a: Complex) -> Complex:
    return over_i(sinh(times_i(a)))


def cos(a: Complex) -> Complex:
    return cosh(times_i(a))


def tan(a: Complex) -> Complex:
    return over_i(tanh(times_i(a)))


def asin(a: Complex) -> Complex:
    """From the square roots of 1 - a and 1 + a (Kahan), so that no digits cancel."""
    u, v = sqrt(Complex(1.0 - a.re, -a.im)), sqrt(Complex(1.0 + a.re, a.im))
    return Complex(ir.atan2(a.re, u.re * v.re - u.im * v.im), ir.asinh(u.re * v.im - u.im * v.re))


def asinh(a: Complex) -> Complex:
    return over_i(asin(times_i(a)))


def acos(a: Complex) -> Complex:
    u, v = sqrt(Complex(1.0 - a.re, -a.im)), sqrt(Complex(1.0 + a.re, a.im))
    return Complex(2.0 * ir.atan2(u.re, v.re), ir.asinh(v.re * u.im - v.im * u.re))


def acosh(a: Complex) -> Complex:
    u, v = sqrt(Complex(a.re - 1.0, a.im)), sqrt(Complex(a.re + 1.0, a.im))
    return Complex(ir.asinh(u.re * v.re + u.im * v.im), 2.0 * ir.atan2(u.im, v.re))


def atanh(a: Complex) -> Complex:
    x, y = ir.abs(a.re), a.im
    d = (1.0 - x) * (1.0 - x) + y * y
    re = 0.25 * ir.log1p(4.0 * x / d)
    im = 0.5 * ir.atan2(2.0 * y, (1.0 - x) * (1.0 + x) - y * y)
    return Complex(ir.copysign(re, a.re), im)


def atan(a: Complex) -> Complex:
    return over_i(atanh(times_i(a)))
