"""Kernels of discrete Fourier transforms along the middle dimension of a contiguous [outer, n, inner].

A transform of size n = r1 r2 … is a pass per factor (Stockham's order: no bit reversal, loads contiguous). In a pass with
factor r, where `length` = r * (what later passes still have to do) and `stride` = inner * (the product of earlier factors),
the butterfly (p, q), p < length / r, q < stride, reads x[q + stride * (p + k * length / r)] for k < r and writes
y[q + stride * (r p + j)] for j < r. Inverse transforms have sign -1."""

from __future__ import annotations

import math
from typing import Any

from . import ir
from .builder import KernelBuilder
from .ir import Complex
from .kernel import DTYPES, Kernel, Target, compute_dtype

WORKGROUP = 64
UNROLLED = (16, 8, 7, 5, 4, 3, 2)  # factors with butterflies of their own
LARGEST_LOOP = 64  # larger prime factors take Bluestein's algorithm


def factors(n: int) -> list[int] | None:
    """The factors of the passes for n, large ones first; None where Bluestein's algorithm is needed."""
    found = []
    for r in UNROLLED:
        while n % r == 0:
            found.append(r)
            n //= r
    for r in range(11, LARGEST_LOOP):
        while n % r == 0:
            found.append(r)
            n //= r
    return found if n == 1 else None


def twiddle(k: KernelBuilder, number: Any, of: Any, part: str) -> Complex:
    """exp(2 pi i number / of), i32 0 <= number <= of < 2**28. The quadrant is found in integers, so that accuracy does not
    depend on the size, nor on the language's sin and cos."""
    quadrant = k.let(ir.idiv(number * 8 + of, of * 2))
    rest = ir.cast(number * 4 - quadrant * of, part) / ir.cast(of, part)
    x = k.let(rest * (math.pi / 2))
    x2 = k.let(x * x)
    terms = 6 if part == "f32" else 10

    def series(first: int) -> Any:
        value = ir.const((-1) ** terms / math.factorial(2 * terms + first), part)
        for i in reversed(range(terms)):
            value = value * x2 + (-1) ** i / math.factorial(2 * i + first)
        return value

    cos, sin = k.let(series(0)), k.let(series(1) * x)
    odd = ir.eq(quadrant & 1, 1)
    flip_cos = ir.eq((quadrant + 1) & 2, 2)
    flip_sin = ir.eq(quadrant & 2, 2)
    re, im = ir.where(odd, sin, cos), ir.where(odd, cos, sin)
    return Complex(k.let(ir.where(flip_cos, -re, re)), k.let(ir.where(flip_sin, -im, im)))


def _rotate(x: Complex, sign: Any) -> Complex:
    """x times -i sign."""
    return Complex(x.im * sign, -(x.re * sign))


def _butterfly(k: KernelBuilder, x: list[Complex], sign: Any) -> list[Complex]:
    """The transform of len(x) values."""
    n = len(x)
    if n == 1:
        return x
    out: list[Any] = [None] * n
    if n % 2 == 0:
        even, odd = _butterfly(k, x[::2], sign), _butterfly(k, x[1::2], sign)
        for j in range(n // 2):
            angle = 2 * math.pi * j / n
            c, s = math.cos(angle), math.sin(angle)
            if j == 0:
                t = odd[0]
            elif 4 * j == n:
                t = _rotate(odd[j], sign)
            else:
                turned = _rotate(odd[j], sign)
                t = Complex(odd[j].re * c + turned.re * s, odd[j].im * c + turned.im * s)
            t = k.let(t)
            out[j], out[j + n // 2] = k.let(even[j] + t), k.let(even[j] - t)
        return out
    half = (n - 1) // 2
    sums = [k.let(x[i] + x[n - i]) for i in range(1, half + 1)]
    differences = [k.let(x[i] - x[n - i]) for i in range(1, half + 1)]
    total = x[0]
    for a in sums:
        total = total + a
    out[0] = k.let(total)
    for j in range(1, half + 1):
        real, across = x[0], None
        for i in range(1, half + 1):
            angle = 2 * math.pi * (i * j % n) / n
            c, s = math.cos(angle), math.sin(angle)
            a, d = sums[i - 1], differences[i - 1]
            real = Complex(real.re + a.re * c, real.im + a.im * c)
            part = Complex(d.re * s, d.im * s)
            across = part if across is None else across + part
        assert across is not None
        real, turned = k.let(real), k.let(_rotate(across, sign))
        out[j], out[n - j] = k.let(real + turned), k.let(real - turned)
    return out


def _load(buffer: Any, index: Any) -> Complex:
    x = buffer[index]
    return x if isinstance(x, Complex) else Complex(x, ir.const(0, x.dtype))


def _store(buffer: Any, index: Any, value: Complex) -> None:
    buffer[index] = value if DTYPES[buffer.dtype].kind == "complex" else value.re


def _items(k: KernelBuilder, count: Any) -> Any:
    item = k.let(ir.cast(k.global_id(WORKGROUP), "i32"))
    return item, k.If(item < count)


def fft_pass(target: Target, dtype: str, out_dtype: str, r: int, last: bool) -> Kernel:
    """One pass. dtype: of x, complex or real; out_dtype: real keeps the real part alone. r: one of UNROLLED, 1 (a copy), or 0,
    a loop over a factor given at launch. last: scales, and keeps the first `limit` elements of each outer index.

    Buffers: x, y. Scalars: scale, sign (of the compute dtype); then i32: butterflies in all (times the factor for r = 0), of one
    outer index, length, stride, outer strides of x and of y, limit, factor."""
    part = compute_dtype(out_dtype)
    k = KernelBuilder(target, f"fft{r}_{dtype}_{out_dtype}{'_last' * last}")
    x, y = k.buffer("x", dtype), k.buffer("y", out_dtype, "w")
    scale, sign = k.scalar("scale", part), k.scalar("sign", part)
    names = ("count", "butterflies", "length", "stride", "x_outer", "y_outer", "limit", "factor")
    count, butterflies, length, stride, x_outer, y_outer, limit, factor = (k.scalar(n, "i32") for n in names)
    item, inside = _items(k, count)
    with inside:
        j0: Any = None
        if r == 0:
            j0 = k.let(ir.irem(item, factor))
            item = k.let(ir.idiv(item, factor))
        outer = k.let(ir.idiv(item, butterflies))
        i = k.let(item - outer * butterflies)
        p = k.let(ir.idiv(i, stride))
        q = k.let(i - p * stride)
        base = k.let(outer * x_outer + i)

        def store(j: Any, value: Complex) -> None:
            index = k.let(q + stride * (p * (factor if r == 0 else r) + j))
            if last:
                with k.If(index < limit):
                    _store(y, outer * y_outer + index, Complex(value.re * scale, value.im * scale))
            else:
                _store(y, outer * y_outer + index, value)

        if r == 0:
            acc_re, acc_im = k.var(part, 0.0), k.var(part, 0.0)
            with k.For(ir.const(0, "i32"), factor) as t:
                w = twiddle(k, ir.irem(j0 * t, factor), factor, part)
                v = _load(x, base + t * butterflies)
                im = w.im * -sign
                acc_re.set(acc_re + (v.re * w.re - v.im * im))
                acc_im.set(acc_im + (v.re * im + v.im * w.re))
            w = twiddle(k, p * j0, length, part)
            im = k.let(w.im * -sign)
            re_, im_ = acc_re.as_node(), acc_im.as_node()
            store(j0, Complex(k.let(re_ * w.re - im_ * im), k.let(re_ * im + im_ * w.re)))
        else:
            values = _butterfly(k, [k.let(_load(x, base + butterflies * t)) for t in range(r)], sign)
            store(0, values[0])
            if last:  # p is 0
                for j in range(1, r):
                    store(j, values[j])
            elif r > 1:
                w = twiddle(k, p, length, part)
                w = Complex(w.re, k.let(w.im * -sign))
                powers = {1: w}
                for j in range(1, r):
                    if j > 1:
                        powers[j] = k.let(powers[j // 2] * powers[j - j // 2])
                    store(j, k.let(values[j] * powers[j]))
    return k.finish((WORKGROUP, 1, 1))


def hermitian(target: Target, dtype: str) -> Kernel:
    """All n values from the first n // 2 + 1 of a Hermitian sequence. Buffers: x, y. Scalars (i32): elements of y, n, inner."""
    k = KernelBuilder(target, f"fft_hermitian_{dtype}")
    x, y = k.buffer("x", dtype), k.buffer("y", dtype, "w")
    count, n, inner = (k.scalar(s, "i32") for s in ("count", "n", "inner"))
    item, inside = _items(k, count)
    with inside:
        block = n * inner
        outer = k.let(ir.idiv(item, block))
        rest = k.let(item - outer * block)
        t = k.let(ir.idiv(rest, inner))
        half = ir.idiv(n, ir.const(2, "i32"))
        mirrored = k.let(t > half)
        source = ir.where(mirrored, n - t, t)
        v = k.let(x[(outer * (half + 1) + source) * inner + (rest - t * inner)])
        y[item] = Complex(v.re, ir.where(mirrored, -v.im, v.im))
    return k.finish((WORKGROUP, 1, 1))


# ---- Bluestein's algorithm: a transform of any size as a convolution of size m, a power of two -----------------------------


def _chirp(k: KernelBuilder, t: Any, n: Any, part: str, sign: Any, large: bool) -> Complex:
    """exp(-pi i sign t^2 / n)."""
    twice = n * 2
    if large:
        square, addend, left = k.var("i32", 0), k.var("i32", t), k.var("i32", t)
        with k.While(lambda: left > 0):
            with k.If(ir.eq(left & 1, 1)):
                square.set(square + addend)
                square.set(ir.where(square >= twice, square - twice, square.as_node()))
            addend.set(addend + addend)
            addend.set(ir.where(addend >= twice, addend - twice, addend.as_node()))
            left.set(left >> 1)
        number = square.as_node()
    else:
        number = ir.irem(t * t, twice)
    w = twiddle(k, number, twice, part)
    return Complex(w.re, k.let(w.im * -sign))


def bluestein(target: Target, step: str, dtype: str, out_dtype: str, large: bool) -> Kernel:
    """The steps around the transforms of size m. large: n exceeds 32768.

    "in": y [outer, m, inner] = x [outer, n, inner] times the chirp, zeros beyond. "filter": y [m], the conjugate chirp.
    "multiply": y [outer, m, inner] = x times the second buffer [m]. "out": y [outer, limit, inner] = x times chirp and scale.
    Buffers: x, (filter,) y. Scalars: scale, sign; then i32: elements of y, n, m, inner, limit."""
    part = compute_dtype(out_dtype)
    k = KernelBuilder(target, f"fft_bluestein_{step}_{dtype}_{out_dtype}{'_large' * large}")
    x = k.buffer("x", dtype) if step != "filter" else None
    weights = k.buffer("weights", dtype) if step == "multiply" else None
    y = k.buffer("y", out_dtype, "w")
    scale, sign = k.scalar("scale", part), k.scalar("sign", part)
    count, n, m, inner, limit = (k.scalar(s, "i32") for s in ("count", "n", "m", "inner", "limit"))
    item, inside = _items(k, count)
    zero = ir.const(0, part)
    with inside:
        rows = limit if step == "out" else m
        row = k.let(ir.idiv(item, inner))
        outer = k.let(ir.idiv(row, rows))
        t = k.let(row - outer * rows)
        within = item - row * inner
        if step == "multiply":
            assert weights is not None
            _store(y, item, _load(x, item) * _load(weights, t))
        elif step == "filter":
            distance = k.let(ir.minimum(t, m - t))
            w = _chirp(k, ir.minimum(distance, n - 1), n, part, sign, large)
            used = distance < n
            _store(y, item, Complex(ir.where(used, w.re, zero), ir.where(used, -w.im, zero)))
        elif step == "out":
            v = _load(x, (outer * m + t) * inner + within) * _chirp(k, t, n, part, sign, large)
            _store(y, item, Complex(v.re * scale, v.im * scale))
        else:
            with k.If(t < n):
                _store(y, item, _load(x, (outer * n + t) * inner + within) * _chirp(k, t, n, part, sign, large))
            with k.Else():
                _store(y, item, Complex(zero, zero))
    return k.finish((WORKGROUP, 1, 1))
