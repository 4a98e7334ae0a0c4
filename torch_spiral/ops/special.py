"""Special functions: what ATen's stubs for them compute.

Accuracy is that of the same formulas in ATen's CPU code, with coefficients of Cephes; half types compute as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..kernels import ir
from ..kernels.builder import KernelBuilder
from ..kernels.ir import where
from ..lowering import Iter, Sym, Tensor, stub
from . import special_tables as t
from .common import broadcast, map_tensors
from .elementwise import pointwise

NAN, INF = math.nan, math.inf


def polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's scheme, the highest power first."""
    y: Any = ir.const(coefficients[0], x.dtype)
    for c in coefficients[1:]:
        y = y * x + c
    return y


def chebyshev(x: Any, coefficients: Sequence[float]) -> Any:
    """Clenshaw's recurrence for a series in T_n(x / 2), the highest order first."""
    zero = ir.const(0.0, x.dtype)
    b, p, q = ir.const(coefficients[0], x.dtype), zero, zero
    for c in coefficients[1:]:
        p, q = q, b
        b = x * q - p + c
    return 0.5 * (b - p)


# ---- Bessel functions ------------------------------------------------------------------------------------------------


def _ratio(x: Any, p: Sequence[float], q: Sequence[float]) -> Any:
    return polynomial(x, p) / polynomial(x, q)


def _asymptotic(x: Any, z: Any, tables: tuple, phase: float, of_y: bool) -> Any:
    """sqrt(2 / (pi x)) times the modulus and phase form of J or Y, for x > 5."""
    pp, pq, qp, qq = tables
    angle = x - phase
    a, b = _ratio(z, pp, pq), 5.0 / x * _ratio(z, qp, qq)
    s, c = ir.sin(angle), ir.cos(angle)
    return (a * s + b * c if of_y else a * c - b * s) * math.sqrt(2 / math.pi) / ir.sqrt(x)


def bessel_j0(x: Any) -> Any:
    x = ir.abs(x)
    small = (x * x - 5.78318596294678452118) * (x * x - 30.4712623436620863991) * _ratio(x * x, t.J0_RP, t.J0_RQ)
    small = where(ir.lt(x, 0.00001), 1.0 - x * x / 4.0, small)
    return where(
        ir.le(x, 5.0), small, _asymptotic(x, 25.0 / (x * x), (t.J0_PP, t.J0_PQ, t.J0_QP, t.J0_QQ), math.pi / 4, False)
    )


def bessel_j1(x: Any) -> Any:
    a = ir.abs(x)
    small = _ratio(a * a, t.J1_RP, t.J1_RQ) * a * (a * a - 14.6819706421238932572) * (a * a - 49.2184563216946036703)
    y = where(
        ir.le(a, 5.0),
        small,
        _asymptotic(a, 25.0 / (a * a), (t.J1_PP, t.J1_PQ, t.J1_QP, t.J1_QQ), 3 * math.pi / 4, False),
    )
    return where(ir.lt(x, 0.0), -y, y)


def _y_domain(x: Any, y: Any, at_zero: float) -> Any:
    return where(ir.eq(x, 0.0), at_zero, where(ir.lt(x, 0.0), NAN, y))


def bessel_y0(x: Any) -> Any:
    small = _ratio(x * x, t.Y0_YP, t.Y0_YQ) + 2 / math.pi * ir.log(x) * bessel_j0(x)
    y = where(
        ir.le(x, 5.0), small, _asymptotic(x, 25.0 / (x * x), (t.Y0_PP, t.Y0_PQ, t.Y0_QP, t.Y0_QQ), math.pi / 4, True)
    )
    return _y_domain(x, y, -INF)


def bessel_y1(x: Any) -> Any:
    small = x * _ratio(x * x, t.Y1_YP, t.Y1_YQ) + 2 / math.pi * (bessel_j1(x) * ir.log(x) - 1.0 / x)
    y = where(
        ir.le(x, 5.0),
        small,
        _asymptotic(x, 25.0 / (x * x), (t.Y1_PP, t.Y1_PQ, t.Y1_QP, t.Y1_QQ), 3 * math.pi / 4, True),
    )
    return _y_domain(x, y, -INF)


def _i(order: int, scaled: bool) -> Callable[[Any], Any]:
    """I_0 and I_1, scaled: times exp(-|x|). Up to 8 by the power series, whose terms are all positive: Cephes' Chebyshev series
    for exp(-x) I(x) cancel there."""

    def f(x: Any) -> Any:
        a = ir.abs(x)
        terms = 24 if x.dtype == "f64" else 15
        series = [1.0 / (math.factorial(k) * math.factorial(k + order)) for k in range(terms, -1, -1)]
        small = polynomial(0.25 * a * a, series) * (0.5 * a if order else 1.0)
        large = chebyshev(32.0 / a - 2.0, t.I1_B if order else t.I0_B) / ir.sqrt(a)
        y = where(ir.le(a, 8.0), small * ir.exp(-a) if scaled else small, large if scaled else ir.exp(a) * large)
        return where(ir.lt(x, 0.0), -y, y) if order else y

    return f


i0, i0e, i1, i1e = _i(0, False), _i(0, True), _i(1, False), _i(1, True)


def _k(order: int, scaled: bool) -> Callable[[Any], Any]:
    def f(x: Any) -> Any:
        if order == 0:
            small = chebyshev(x * x - 2.0, t.K0_A) - ir.log(0.5 * x) * i0(x)
        else:
            small = ir.log(0.5 * x) * i1(x) + chebyshev(x * x - 2.0, t.K1_A) / x
        large = chebyshev(8.0 / x - 2.0, t.K1_B if order else t.K0_B) / ir.sqrt(x)
        y = where(ir.le(x, 2.0), small * ir.exp(x) if scaled else small, large if scaled else ir.exp(-x) * large)
        return where(ir.eq(x, 0.0), INF, where(ir.lt(x, 0.0), NAN, y))

    return f


def spherical_bessel_j0(x: Any) -> Any:
    z = x * x
    series = polynomial(z, [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(6, -1, -1)])
    return where(ir.isinf(x), 0.0, where(ir.lt(ir.abs(x), 0.5), series, ir.sin(x) / x))


AI_0, AI_1 = 0.355028053887817239260, 0.258819403792806798405  # Ai(0), -Ai'(0)


def airy_ai(x: Any) -> Any:
    root = ir.sqrt(ir.abs(x))
    zeta = 2.0 / 3.0 * ir.abs(x) * root
    z = 1.0 / zeta
    quarter = ir.sqrt(root)
    f, g = 1.0 + z * z * _ratio(z * z, t.AIRY_AFN, t.AIRY_AFD), z * _ratio(z * z, t.AIRY_AGN, t.AIRY_AGD)
    angle = zeta + math.pi / 4
    oscillating = (ir.sin(angle) * f - ir.cos(angle) * g) / (math.sqrt(math.pi) * quarter)
    decaying = _ratio(z, t.AIRY_AN, t.AIRY_AD) / (2.0 * math.sqrt(math.pi) * quarter * ir.exp(zeta))
    # Maclaurin series, for |x| < 2.09: terms of x**3.
    cube, m, n = x * x * x, ir.const(1.0, x.dtype), x
    total_f, total_g = m, n
    for i in range(1, 16):
        m, n = m * cube * (1.0 / ((3 * i - 1) * (3 * i))), n * cube * (1.0 / ((3 * i) * (3 * i + 1)))
        total_f, total_g = total_f + m, total_g + n
    y = where(ir.lt(x, -2.09), oscillating, where(ir.ge(x, 2.09), decaying, AI_0 * total_f - AI_1 * total_g))
    return where(ir.isinf(x), NAN, where(ir.gt(x, 103.892), 0.0, y))


# ---- error functions -------------------------------------------------------------------------------------------------


def erfcx(x: Any) -> Any:
    """exp(x**2) * erfc(x)."""
    a = ir.abs(x)
    fraction: Any = a
    for k in range(40, 0, -1):  # Laplace's continued fraction
        fraction = a + (0.5 * k) / fraction
    y = where(ir.lt(a, 2.0), ir.exp(a * a) * ir.erfc(a), 1.0 / (math.sqrt(math.pi) * fraction))
    return where(ir.lt(x, 0.0), 2.0 * ir.exp(x * x) - y, y)


def log_ndtr(x: Any) -> Any:
    z = x * math.sqrt(0.5)
    return where(ir.lt(x, -1.0), ir.log(erfcx(-z) * 0.5) - z * z, ir.log1p(ir.erfc(z) * -0.5))


def ndtri(p: Any) -> Any:
    edge = math.exp(-2)
    upper = ir.gt(p, 1.0 - edge)
    y = where(upper, 1.0 - p, p)
    middle = y - 0.5
    square = middle * middle
    central = (middle + middle * (square * _ratio(square, t.NDTRI_P0, t.NDTRI_Q0))) * math.sqrt(2 * math.pi)
    r = ir.sqrt(-2.0 * ir.log(y))
    z = 1.0 / r
    tail = (
        r
        - ir.log(r) / r
        - z * where(ir.lt(r, 8.0), _ratio(z, t.NDTRI_P1, t.NDTRI_Q1), _ratio(z, t.NDTRI_P2, t.NDTRI_Q2))
    )
    result = where(ir.gt(y, edge), central, where(upper, tail, -tail))
    result = where(ir.eq(p, 0.0), -INF, where(ir.eq(p, 1.0), INF, result))
    return where(ir.or_(ir.lt(p, 0.0), ir.gt(p, 1.0)), NAN, result)


# ---- gamma functions -------------------------------------------------------------------------------------------------


def trigamma(x: Any) -> Any:
    reflect = ir.lt(x, 0.5)
    s = ir.sin(math.pi * (x - ir.rint(x)))
    y = where(reflect, 1.0 - x, x)
    total: Any = ir.const(0.0, x.dtype)
    for _ in range(6):
        total = total + 1.0 / (y * y)
        y = y + 1.0
    z = 1.0 / (y * y)
    total = total + (1.0 + 1.0 / (2.0 * y) + z * (1.0 / 6 - z * (1.0 / 30 - z * (1.0 / 42)))) / y
    return where(reflect, math.pi * math.pi / (s * s) - total, total)


def zeta(k: KernelBuilder, x: Any, q: Any) -> Any:
    """Hurwitz's zeta function, the sum of (q + n) ** -x, by Euler and Maclaurin."""
    x, q = k.let(x), k.let(q)
    total, a = k.var(x.dtype, ir.pow(q, -x)), k.var(x.dtype, q)
    eps = 2.0**-53 if x.dtype == "f64" else 2.0**-24
    b, done, count = k.var(x.dtype, 0.0), k.var("i32", 0), k.var("i32", 0)
    # Skipped where the result is settled: an argument in the domain needs few steps, a hugely negative one none.
    with k.While(lambda: ir.and_(ir.eq(done, 0), ir.or_(count < 9, ir.and_(a <= 9.0, count < 100000)))):
        count.set(count + 1)
        a.set(a + 1.0)
        b.set(ir.pow(a.as_node(), -x))
        total.set(total + b)
        with k.If(ir.lt(ir.abs(b.as_node()), eps * ir.abs(total.as_node()))):
            done.set(1)
    with k.If(ir.eq(done, 0)):
        w = k.let(a.as_node())
        last = k.let(b.as_node())
        sum_ = k.let(total + last * w / (x - 1.0) - 0.5 * last)
        factor: Any = ir.const(1.0, x.dtype)
        n = 0.0
        power: Any = last
        result = sum_
        for c in t.ZETA_A:
            factor = k.let(factor * (x + n))
            power = k.let(power / w)
            result = k.let(result + factor * power / c)
            n += 1.0
            factor = k.let(factor * (x + n))
            power = k.let(power / w)
            n += 1.0
        total.set(result)
    y = total.as_node()
    whole = ir.eq(q, ir.floor(q))
    y = where(ir.le(q, 0.0), where(whole, INF, where(ir.ne(x, ir.floor(x)), NAN, y)), y)
    y = where(ir.eq(x, 1.0), INF, where(ir.lt(x, 1.0), NAN, y))
    return where(ir.or_(ir.isnan(x), ir.isnan(q)), NAN, y)


def polygamma(k: KernelBuilder, x: Any, n: Any) -> Any:
    """The n-th derivative of digamma, n > 1."""
    n = k.let(ir.cast(n, x.dtype))
    odd = ir.ne(ir.fmod(n, ir.const(2.0, n.dtype)), 0.0)
    size = ir.rint(ir.exp(ir.lgamma(n + 1.0))) if x.dtype == "f64" else ir.exp(ir.lgamma(n + 1.0))
    return where(odd, 1.0, ir.const(-1.0, x.dtype)) * size * zeta(k, n + 1.0, x)


def _igamma(upper: bool) -> Callable[..., Any]:
    """The regularised incomplete gamma functions P(a, x) and Q(a, x): a series for x < a + 1, Lentz's continued fraction beyond."""

    def f(k: KernelBuilder, a: Any, x: Any) -> Any:
        a, x = k.let(a), k.let(x)
        dtype = a.dtype
        eps, tiny = (2.0**-53, 1e-290) if dtype == "f64" else (2.0**-25, 1e-30)
        ordinary = ir.and_(ir.and_(ir.gt(a, 0.0), ir.gt(x, 0.0)), ir.and_(ir.isfinite(a), ir.isfinite(x)))
        p = k.var(dtype, 0.0)  # P where series, else Q
        series = k.let(ir.lt(x, a + 1.0))
        with k.If(ordinary):
            factor = k.let(ir.exp(_log_gamma_density(a, x)))
            count = k.var("i32", 0)
            with k.If(series):
                term, total, d = k.var(dtype, 1.0), k.var(dtype, 1.0), k.var(dtype, a)
                with k.While(lambda: ir.and_(count < 4000, ir.gt(term.as_node(), eps * total.as_node()))):
                    d.set(d + 1.0)
                    term.set(term * x / d)
                    total.set(total + term)
                    count.set(count + 1)
                p.set(factor * total / a)
            with k.Else():
                b = k.var(dtype, x + 1.0 - a)
                c, d = k.var(dtype, 1.0 / tiny), k.var(dtype, 1.0 / b.as_node())
                h, delta, i = k.var(dtype, d.as_node()), k.var(dtype, 0.0), k.var(dtype, 0.0)
                with k.While(lambda: ir.and_(count < 4000, ir.gt(ir.abs(delta - 1.0), eps))):
                    i.set(i + 1.0)
                    an = k.let(-i.as_node() * (i - a))
                    b.set(b + 2.0)
                    u, v = k.let(an * d + b), k.let(b + an / c)
                    d.set(1.0 / where(ir.lt(ir.abs(u), tiny), ir.const(tiny, dtype), u))
                    c.set(where(ir.lt(ir.abs(v), tiny), ir.const(tiny, dtype), v))
                    delta.set(d * c)
                    h.set(h * delta)
                    count.set(count + 1)
                p.set(factor * h)
        y = p.as_node()
        y = where(series, 1.0 - y, y) if upper else where(series, y, 1.0 - y)
        zero, one = (1.0, 0.0) if upper else (0.0, 1.0)
        y = where(ir.eq(x, 0.0), ir.const(zero, dtype), y)
        y = where(ir.eq(a, 0.0), where(ir.gt(x, 0.0), ir.const(one, dtype), NAN), y)
        y = where(
            ir.isinf(a), where(ir.isinf(x), NAN, ir.const(zero, dtype)), where(ir.isinf(x), ir.const(one, dtype), y)
        )
        bad = ir.or_(ir.or_(ir.isnan(a), ir.isnan(x)), ir.or_(ir.lt(a, 0.0), ir.lt(x, 0.0)))
        return where(bad, NAN, y)

    return f


def _log_gamma_density(a: Any, x: Any) -> Any:
    """log(x**a * exp(-x) / gamma(a)); for large a without the cancellation of large terms."""
    plain = a * ir.log(x) - x - ir.lgamma(a)
    u = (x - a) / a
    z = 1.0 / (a * a)
    stirling = (1.0 / 12 - z * (1.0 / 360 - z * (1.0 / 1260))) / a
    near = a * (ir.log1p(u) - u) + 0.5 * ir.log(a) - 0.5 * math.log(2 * math.pi) - stirling
    return where(ir.and_(ir.gt(a, 8.0), ir.gt(u, -0.9)), near, plain)


# ---- orthogonal polynomials ------------------------------------------------------------------------------------------


def _recurrence(
    first: Callable[[Any], Any],
    step: Callable[..., Any],
    special: Callable[..., Any] | None = None,
    hermite: bool = False,
) -> Callable[..., Any]:
    """P_0 = 1, P_1 = first(x), P_{i + 1} = step(x, i, P_i, P_{i - 1}); 0 for n < 0."""

    def f(k: KernelBuilder, x: Any, n: Any) -> Any:
        x = k.let(x)
        limit = 1.0e6
        order = k.let(where(ir.lt(ir.abs(n), limit), ir.trunc(n), limit))
        p, q, i = k.var(x.dtype, 1.0), k.var(x.dtype, first(x)), k.var(x.dtype, 1.0)
        out = k.var(x.dtype, where(order < 0.0, 0.0, where(ir.eq(order, 0.0), 1.0, q.as_node())))
        most = (512.0 if x.dtype == "f64" else 128.0) if hermite else limit
        skip = None if special is None else special(x, order)
        run = ir.and_(order > 1.0, order <= most)
        if skip is not None:
            run = ir.and_(run, ir.logical_not(skip[0]))
        with k.If(run):
            with k.While(lambda: ir.and_(i < order, ir.logical_not(ir.isnan(q.as_node())))):
                r = k.let(step(x, i.as_node(), q.as_node(), p.as_node()))
                p.set(q)
                q.set(r)
                i.set(i + 1.0)
            out.set(q)
        y = out.as_node()
        if hermite:
            y = where(order > most, NAN, y)
        if skip is not None:
            y = where(skip[0], skip[1], y)
        return y

    return f


def _chebyshev_kind(kind: str, shifted: bool) -> Callable[..., Any]:
    offset = {"t": 0.0, "u": 0.0, "v": -1.0, "w": 1.0}[kind]
    most = (
        {"t": 6.0, "u": 8.0, "v": 8.0, "w": 8.0}[kind]
        if not shifted
        else {"t": 6.0, "u": 6.0, "v": 6.0, "w": 4.0}[kind]
    )

    def argument(x: Any) -> Any:
        return x + x - 1.0 if shifted else x

    def first(x: Any) -> Any:
        z = argument(x)
        return z if kind == "t" else z + z + offset

    def step(x: Any, i: Any, q: Any, p: Any) -> Any:
        z = argument(x)
        return (z + z) * q - p

    def special(x: Any, n: Any) -> tuple[Any, Any]:
        z = argument(x)
        even = ir.eq(ir.fmod(n, ir.const(2.0, n.dtype)), 0.0)
        sign = where(even, 1.0, ir.const(-1.0, x.dtype))
        at_one = {"t": ir.const(1.0, x.dtype), "u": n + 1.0, "v": ir.const(1.0, x.dtype), "w": n + n + 1.0}[kind]
        at_minus = {"t": sign, "u": sign * (n + 1.0), "v": sign * (n + n + 1.0), "w": sign}[kind]
        theta = ir.acos(ir.clamp(z, -1.0, 1.0))
        wave = {
            "t": lambda: ir.cos(n * theta),
            "u": lambda: ir.sin((n + 1.0) * theta) / ir.sin(theta),
            "v": lambda: ir.cos((n + 0.5) * theta) / ir.cos(theta * 0.5),
            "w": lambda: ir.sin((n + 0.5) * theta) / ir.sin(theta * 0.5),
        }[kind]()
        edge = ir.eq(ir.abs(z), 1.0)
        waves = ir.and_(n > most, ir.lt(ir.abs(z), 1.0))
        value = where(edge, where(z > 0.0, at_one, at_minus), wave)
        return ir.and_(ir.ge(n, 0.0), ir.or_(edge, waves)), value

    return _recurrence(first, step, special)


def _legendre_special(x: Any, n: Any) -> tuple[Any, Any]:
    even = ir.eq(ir.fmod(n, ir.const(2.0, n.dtype)), 0.0)
    return ir.and_(ir.ge(n, 0.0), ir.eq(ir.abs(x), 1.0)), where(ir.or_(x > 0.0, even), 1.0, ir.const(-1.0, x.dtype))


# ---- integers, parts of floats, the rest -----------------------------------------------------------------------------


def gcd(k: KernelBuilder, a: Any, b: Any) -> Any:
    """Euclid's algorithm on magnitudes."""
    x, y = k.var(a.dtype, _magnitude(a)), k.var(a.dtype, _magnitude(b))
    with k.While(lambda: ir.ne(x, 0)):
        rest = k.let(ir.fmod(y.as_node(), x.as_node()))
        y.set(x)
        x.set(rest)
    return y.as_node()


def _magnitude(a: Any) -> Any:
    return ir.abs(a) if a.dtype in ("i32", "i64") else a


def lcm(k: KernelBuilder, a: Any, b: Any) -> Any:
    """|a / gcd * b|, 0 where both are 0."""
    g = gcd(k, a, b)
    one = ir.const(1, a.dtype)
    return where(ir.eq(g, 0), ir.const(0, a.dtype), _magnitude(ir.trunc_divide(a, where(ir.eq(g, 0), one, g)) * b))


def frexp(x: Any) -> tuple[Any, Any]:
    """Mantissa in [1/2, 1) and exponent."""
    bits, width, bias, unsigned = (52, 11, 1022, "u64") if x.dtype == "f64" else (23, 8, 126, "u32")
    scale = 2.0 ** (bits + 2)
    tiny = ir.lt(ir.abs(x), 2.0 ** -(bias - 1))
    b = ir.bitcast(where(tiny, x * scale, x), unsigned)
    field = ir.and_(ir.shr(b, bits), (1 << width) - 1)
    mask = ir.const(((1 << (1 + width + bits)) - 1) & ~(((1 << width) - 1) << bits), unsigned)
    mantissa = ir.bitcast(ir.or_(ir.and_(b, mask), ir.const(bias << bits, unsigned)), x.dtype)
    exponent = ir.cast(field, "i32") - bias - where(tiny, ir.const(bits + 2, "i32"), ir.const(0, "i32"))
    same = ir.or_(ir.eq(x, 0.0), ir.logical_not(ir.isfinite(x)))
    return where(same, x, mantissa), where(same, ir.const(0, "i32"), exponent)


def _kaiser(position: Any, length: Any, beta: Any) -> Any:
    x = position * (2.0 / (ir.cast(length, position.dtype) - 1.0)) - 1.0
    return i0(beta * ir.sqrt(ir.maximum(1.0 - x * x, 0.0))) / i0(beta + position * 0.0)


def _renorm(norm: Any, limit: Any) -> Any:
    return where(ir.gt(norm, limit), limit / (norm + 1e-7), ir.const(1.0, norm.dtype))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "special_bessel_j0_stub": bessel_j0, "special_bessel_j1_stub": bessel_j1, "special_bessel_y0_stub": bessel_y0,
    "special_bessel_y1_stub": bessel_y1, "i0_stub": i0, "special_i0e_stub": i0e, "special_i1_stub": i1, "special_i1e_stub": i1e,
    "special_modified_bessel_i0_stub": i0, "special_modified_bessel_i1_stub": i1, "special_modified_bessel_k0_stub": _k(0, False),
    "special_modified_bessel_k1_stub": _k(1, False), "special_scaled_modified_bessel_k0_stub": _k(0, True),
    "special_scaled_modified_bessel_k1_stub": _k(1, True), "special_spherical_bessel_j0_stub": spherical_bessel_j0,
    "special_airy_ai_stub": airy_ai, "special_erfcx_stub": erfcx, "special_log_ndtr_stub": log_ndtr, "special_ndtri_stub": ndtri,
    "trigamma_stub": trigamma, "frexp_stub": frexp, "kaiser_window_stub": _kaiser, "renorm_scale_factor_stub": _renorm,
}  # fmt: skip
LOOPS: dict[str, Callable[..., Any]] = {
    "zeta_stub": zeta, "polygamma_stub": polygamma, "igamma_stub": _igamma(False), "igammac_stub": _igamma(True), "gcd_stub": gcd, "lcm_stub": lcm,
    **{f"chebyshev_polynomial_{kind}_stub": _chebyshev_kind(kind, False) for kind in "tuvw"},
    **{f"shifted_chebyshev_polynomial_{kind}_stub": _chebyshev_kind(kind, True) for kind in "tuvw"},
    "hermite_polynomial_h_stub": _recurrence(lambda x: x + x, lambda x, i, q, p: (x + x) * q - (i + i) * p, hermite=True),
    "hermite_polynomial_he_stub": _recurrence(lambda x: x, lambda x, i, q, p: x * q - i * p, hermite=True),
    "laguerre_polynomial_l_stub": _recurrence(lambda x: 1.0 - x, lambda x, i, q, p: ((i + i + (1.0 - x)) * q - i * p) / (i + 1.0)),
    "legendre_polynomial_p_stub": _recurrence(lambda x: x, lambda x, i, q, p: ((i + i + 1.0) * x * q - i * p) / (i + 1.0), _legendre_special),
}  # fmt: skip


def _define(name: str, function: Callable[..., Any], loops: bool) -> None:
    compute = "in" if name in ("frexp_stub", "kaiser_window_stub") else "common"

    @stub(name)
    def body(it: Iter, *extras: Any) -> None:
        pointwise(name, it, function, compute, extras, loops)


for _name, _function in FUNCTIONS.items():
    _define(_name, _function, False)
for _name, _function in LOOPS.items():
    _define(_name, _function, True)


# ---- fake quantization -----------------------------------------------------------------------------------------------


def _fake_quantize(x: Any, scale: Any, zero: Any, low: Any, high: Any) -> tuple[Any, Any]:
    inverse = 1.0 / scale
    q = ir.rint(x * inverse) + ir.cast(zero, x.dtype)
    inside = ir.and_(ir.ge(q, ir.cast(low, x.dtype)), ir.le(q, ir.cast(high, x.dtype)))
    bounded = ir.minimum(ir.maximum(q, ir.cast(low, x.dtype)), ir.cast(high, x.dtype))
    return (bounded - ir.cast(zero, x.dtype)) * scale, inside


@stub("fake_quant_tensor_cachemask_stub")
def fake_quant_tensor(x: Tensor, scale: Any, zero: Any, low: Any, high: Any, out: Tensor, mask: Tensor) -> None:
    """Rounds to a quantized grid; mask tells what lay inside."""
    map_tensors(
        "fake_quantize", _fake_quantize, [out, mask], [x], (scale, zero, low, high), ("f32", "i32", "i32", "i32")
    )


def _fake_quantize_if(x: Any, scale: Any, zero: Any, enabled: Any, low: Any, high: Any) -> tuple[Any, Any]:
    y, inside = _fake_quantize(x, ir.cast(scale, x.dtype), zero, low, high)
    on = ir.ne(enabled, 0)
    return where(on, y, x), ir.or_(inside, ir.logical_not(on))


@stub("fake_quant_tensor_cachemask_tensor_qparams_stub")
def fake_quant_tensor_parameters(
    x: Tensor, scale: Tensor, zero: Tensor, enabled: Tensor, low: Any, high: Any, out: Tensor, mask: Tensor
) -> None:
    """Rounds to the quantized grid of tensors of one element, where `enabled` is not 0."""
    one = [broadcast(p.view((1,) * x.ndim, (0,) * x.ndim), x.sizes) for p in (scale, zero, enabled)]
    map_tensors("fake_quantize_if", _fake_quantize_if, [out, mask], [x, *one], (low, high), ("i32", "i32"))


def _fake_quantize_gradients(
    x: Any, grad: Any, scale: Any, inverse: Any, zero: Any, low: Any, high: Any, factor: Any
) -> tuple[Any, ...]:
    zero, low, high = (ir.cast(v, x.dtype) for v in (zero, low, high))
    q = zero + ir.rint(x * inverse)
    below, above = ir.lt(q, low), ir.gt(q, high)
    outside = ir.or_(below, above)
    rounded = (ir.minimum(ir.maximum(q, low), high) - zero) * scale
    edge = where(below, low - zero, high - zero)
    dscale = where(outside, grad * edge, grad * (rounded - x) * inverse) * factor
    return where(outside, 0.0, grad), dscale, where(outside, -(grad * scale * factor), 0.0)


@stub("fake_quant_grad_learnable_tensor_stub")
def fake_quant_gradients(it: Iter, scale: Any, inverse: Any, zero: Any, low: Any, high: Any, factor: Any) -> None:
    """Gradients of x, the scale and the zero point, element by element."""
    pointwise(
        "fake_quant_grad_learnable_tensor",
        it,
        _fake_quantize_gradients,
        "common",
        (scale, inverse, zero, low, high, factor),
    )


def _channel_gradients(x: Any, grad: Any, scale: Any, zero: Any, low: Any, high: Any, factor: Any) -> tuple[Any, ...]:
    return _fake_quantize_gradients(x, grad, scale, 1.0 / scale, zero, low, high, factor)


@stub("fake_quant_grad_learnable_channel_stub")
def fake_quant_channel_gradients(it: Iter, low: Any, high: Any, factor: Any) -> None:
    """fake_quant_gradients with a scale and zero point for each channel."""
    pointwise("fake_quant_grad_learnable_channel", it, _channel_gradients, "common", (low, high, factor))


@stub("fake_quant_per_channel_cachemask_stub")
def fake_quant_channels(it: Iter, mask_it: Iter, low: Sym, high: Sym) -> None:
    """fake_quant_tensor with a scale and zero point for each channel; the mask by its own iterator."""
    pointwise("fake_quant_channel", it, _quantized, "common", (low, high))
    pointwise("fake_quant_channel_mask", mask_it, _inside, "in", (low, high))


def _quantized(*args: Any) -> Any:
    return _fake_quantize(*args)[0]


def _inside(*args: Any) -> Any:
    return _fake_quantize(*args)[1]
