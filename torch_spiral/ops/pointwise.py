"""Elementwise ops: what each of ATen's TensorIterator stubs computes, one line each.

A row is `stub name: (compute dtype, function of the inputs and the stub's further arguments)`. The compute dtype is
  common  the dtype ATen promoted the inputs to (that of the first output where it promoted none)
  out     the first output's
  in      the first input's
and the kernel loads each input into it; half types compute as float32, small integers as int32. A function that gives
several values writes several outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..kernels import ir
from ..kernels.ir import where
from ..kernels.kernel import compute_dtype
from ..lowering import Iter, any_of, check, eq, lt, stub
from ..lowering import where as select
from .elementwise import pointwise


def _alpha(op: Any) -> Any:
    """a + alpha * b; bool is logical or (add) as in ATen."""

    def f(a: Any, b: Any, alpha: Any) -> Any:
        if getattr(a, "dtype", None) == "bool":
            return ir.or_(a, ir.and_(b, ir.ne(alpha, 0)))
        return op(a, ir.mul(alpha, b))

    return f


def _mul(a: Any, b: Any) -> Any:
    return ir.and_(a, b) if getattr(a, "dtype", None) == "bool" else ir.mul(a, b)


def _abs(a: Any) -> Any:
    return a if getattr(a, "dtype", None) == "bool" else ir.abs(a)


def _maximum(a: Any, b: Any) -> Any:
    return ir.or_(a, b) if a.dtype == "bool" else ir.maximum(a, b)


def _minimum(a: Any, b: Any) -> Any:
    return ir.and_(a, b) if a.dtype == "bool" else ir.minimum(a, b)


def _clamp(x: Any, lo: Any, hi: Any) -> Any:
    return _minimum(_maximum(x, lo), hi)


def _truth(a: Any) -> Any:
    """a != 0, of complex numbers too; NaN is true."""
    if isinstance(a, ir.Complex):
        return ir.or_(_truth(a.re), _truth(a.im))
    return a if a.dtype == "bool" else ir.ne(a, 0)


def _relu_like(x: Any, threshold: Any, value: Any) -> Any:
    return where(ir.le(x, threshold), value, x)


def _elu(x: Any, alpha: Any, scale: Any, input_scale: Any) -> Any:
    return where(ir.le(x, 0.0), ir.expm1(x * input_scale) * (alpha * scale), x * scale)


def _elu_backward(grad: Any, x: Any, alpha: Any, scale: Any, input_scale: Any, is_result: bool) -> Any:
    coefficient = alpha * scale
    if is_result:
        return where(ir.le(x, 0.0), grad * input_scale * (x + coefficient), grad * scale)
    return where(ir.le(x, 0.0), grad * input_scale * coefficient * ir.exp(x * input_scale), grad * scale)


def _softplus(x: Any, beta: Any, threshold: Any) -> Any:
    return where(ir.gt(x * beta, threshold), x, ir.log1p(ir.exp(x * beta)) / beta)


def _softplus_backward(grad: Any, x: Any, beta: Any, threshold: Any) -> Any:
    z = ir.exp(x * beta)
    return where(ir.gt(x * beta, threshold), grad, grad * z / (z + 1.0))


def _hardsigmoid(x: Any) -> Any:
    return ir.clamp(x + 3.0, 0.0, 6.0) / 6.0


def _hardswish_backward(grad: Any, x: Any) -> Any:
    middle = grad * ((x / 3.0) + 0.5)
    return where(ir.le(x, -3.0), 0.0, where(ir.lt(x, 3.0), middle, grad))


def _silu_backward(grad: Any, x: Any) -> Any:
    s = ir.sigmoid(x)
    return grad * s * (1.0 + x * (1.0 - s))


def _mish_backward(grad: Any, x: Any) -> Any:
    s = ir.sigmoid(x)
    t = ir.tanh(ir.softplus(x))
    return grad * (t + x * s * (1.0 - t * t))


def gelu(x: Any, approximate: str) -> Any:
    """torch.nn.functional.gelu."""
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + ir.tanh(inner))
    return x * 0.5 * (1.0 + ir.erf(x * math.sqrt(0.5)))


def gelu_backward(grad: Any, x: Any, approximate: str) -> Any:
    """Gradient of gelu with respect to x."""
    if approximate == "tanh":
        beta, kappa = math.sqrt(2 / math.pi), 0.044715
        t = ir.tanh(beta * (x + kappa * (x * x * x)))
        return grad * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (beta * (1.0 + 3.0 * kappa * (x * x))))
    cdf = 0.5 * (1.0 + ir.erf(x * math.sqrt(0.5)))
    return grad * (cdf + x * (ir.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi))))


def _shrink_backward(grad: Any, x: Any, lambd: Any) -> Any:
    inside = ir.and_(ir.ge(x, ir.neg(lambd)), ir.le(x, lambd))
    return where(inside, 0.0, grad)


def _softshrink(x: Any, lambd: Any) -> Any:
    return where(ir.gt(x, lambd), x - lambd, where(ir.lt(x, ir.neg(lambd)), x + lambd, where(ir.isnan(x), x, 0.0)))


def _logit(x: Any, eps: Any) -> Any:
    z = where(ir.lt(eps, 0.0), x, ir.clamp(x, eps, 1.0 - eps))
    return ir.log(z / (1.0 - z))


def _logit_backward(grad: Any, x: Any, eps: Any) -> Any:
    inside = where(ir.lt(eps, 0.0), ir.and_(ir.ge(x, 0.0), ir.le(x, 1.0)), ir.and_(ir.ge(x, eps), ir.le(x, 1.0 - eps)))
    outside = where(ir.lt(eps, 0.0), ir.const(math.nan, x.dtype), 0.0)
    return where(inside, grad / (x * (1.0 - x)), outside)


def _smooth_l1(a: Any, b: Any, beta: Any) -> Any:
    z = ir.abs(a - b)
    return where(ir.lt(z, beta), 0.5 * z * z / beta, z - 0.5 * beta)


def _smooth_l1_backward(x: Any, target: Any, grad: Any, norm: Any, beta: Any) -> Any:
    d = x - target
    slope = where(ir.le(d, ir.neg(beta)), -1.0, where(ir.ge(d, beta), 1.0, d / beta))
    return norm * slope * grad


def _huber(a: Any, b: Any, delta: Any) -> Any:
    z = ir.abs(a - b)
    return where(ir.le(z, delta), 0.5 * z * z, delta * (z - 0.5 * delta))


def _huber_backward(x: Any, target: Any, grad: Any, norm: Any, delta: Any) -> Any:
    d = x - target
    bounded = where(ir.le(d, ir.neg(delta)), ir.neg(delta), where(ir.ge(d, delta), delta, d))
    return norm * bounded * grad


def _logaddexp(exp: Any, log1p: Any) -> Any:
    def f(a: Any, b: Any) -> Any:
        if isinstance(a, ir.Complex):
            larger = ir.ge(a.re, b.re)
            hi, lo = where(larger, a, b), where(larger, b, a)
            return hi + ir.log(1.0 + ir.exp(lo - hi))
        same_infinity = ir.and_(ir.isinf(a), ir.eq(a, b))
        return where(same_infinity, a, ir.maximum(a, b) + log1p(exp(ir.neg(ir.abs(a - b)))))

    return f


def _heaviside(x: Any, values: Any) -> Any:
    if x.dtype == "bool":
        return where(x, x, values)
    return where(ir.eq(x, 0), values, where(ir.gt(x, 0), ir.const(1, x.dtype), ir.const(0, x.dtype)))


def _xlogy(log: Any) -> Any:
    def f(x: Any, y: Any) -> Any:
        return where(ir.isnan(y), math.nan, where(ir.eq(x, 0.0), 0.0, x * log(y)))

    return f


def _lerp(a: Any, b: Any, weight: Any) -> Any:
    if isinstance(weight, ir.Complex):
        small = ir.lt(weight.re * weight.re + weight.im * weight.im, 0.25)
    else:
        small = ir.lt(ir.abs(weight), 0.5)
    return where(small, a + weight * (b - a), b - (b - a) * (1.0 - weight))


def _sgn(x: Any) -> Any:
    if isinstance(x, ir.Complex):
        size = ir.abs(x)
        return where(ir.eq(size, 0.0), ir.Complex(size * 0.0, size * 0.0), ir.Complex(x.re / size, x.im / size))
    return x if x.dtype == "bool" else ir.sign(x)


def _sign(x: Any) -> Any:
    return x if x.dtype == "bool" else where(ir.isnan(x), 0, ir.sign(x)) if x.dtype in ("f32", "f64") else ir.sign(x)


def _round_decimals(x: Any, decimals: Any) -> Any:
    places = ir.abs(ir.cast(decimals, "i32"))
    ten: Any = ir.const(1.0, x.dtype)  # to the power of places: exact, where a float can be
    for bit in range(9 if x.dtype == "f64" else 6):
        factor = float(10 ** (1 << bit))
        ten = ten * where(ir.ne(ir.and_(ir.shr(places, bit), 1), 0), ir.const(factor, x.dtype), 1.0)
    negative = ir.lt(decimals, 0)
    return where(negative, ir.rint(x / ten) * ten, ir.rint(x * ten) / ten)


def _sinc(x: Any) -> Any:
    if isinstance(x, ir.Complex):
        z = x * math.pi
        zero = ir.and_(ir.eq(x.re, 0.0), ir.eq(x.im, 0.0))
        return where(zero, ir.Complex(ir.const(1.0, x.dtype), ir.const(0.0, x.dtype)), ir.sin(z) / z)
    z = x * math.pi
    return where(ir.eq(x, 0.0), 1.0, ir.sin(z) / z)


def _entr(x: Any) -> Any:
    return where(
        ir.isnan(x), x, where(ir.gt(x, 0.0), -x * ir.log(x), where(ir.eq(x, 0.0), ir.const(0.0, x.dtype), -math.inf))
    )


def _ldexp(x: Any, e: Any) -> Any:
    return x * ir.exp2(ir.cast(e, x.dtype))


def _bitwise_not(x: Any) -> Any:
    return ir.logical_not(x) if x.dtype == "bool" else ir.not_(x)


def _sigmoid_backward(grad: Any, y: Any) -> Any:
    y = ir.conj(y)
    return grad * ((1.0 - y) * y)


def _tanh_backward(grad: Any, y: Any) -> Any:
    y = ir.conj(y)
    return grad * (1.0 - y * y)


def _glu_jvp(res: Any, b: Any, da: Any, db: Any) -> Any:
    s = ir.sigmoid(b)
    return da * s + res * (db - s * db)


def _polar(r: Any, theta: Any) -> Any:
    return ir.Complex(r * ir.cos(theta), r * ir.sin(theta))


def _nan_to_num(low: float, high: float) -> Any:
    """Infinities become `high` and `low`, the extremes of the storage dtype, unless the call gives numbers."""

    def number(x: Any, nan: Any, posinf: Any, neginf: Any) -> Any:
        if isinstance(x, ir.Complex):
            return ir.Complex(number(x.re, nan, posinf, neginf), number(x.im, nan, posinf, neginf))
        finite = where(ir.eq(x, -math.inf), low if neginf is None else neginf, x)
        finite = where(ir.eq(x, math.inf), high if posinf is None else posinf, finite)
        return where(ir.isnan(x), 0.0 if nan is None else nan, finite)

    return number


def _addr(self: Any, a: Any, b: Any, beta: Any, alpha: Any) -> Any:
    product = _mul(a, b)
    if self.dtype == "bool":
        return ir.or_(ir.and_(_truth(beta), self), ir.and_(_truth(alpha), product))
    return where(ir.eq(beta, 0), alpha * product, beta * self + alpha * product)


STUBS: dict[str, tuple[str, Any]] = {
    # arithmetic
    "add_stub": ("common", _alpha(ir.add)),
    "sub_stub": ("common", _alpha(ir.sub)),
    "add_clamp_stub": ("common", lambda a, b, alpha, lo, hi: _clamp(a + alpha * b, lo, hi)),
    "mul_stub": ("common", _mul),
    "div_true_stub": ("common", ir.div),
    "div_floor_stub": ("common", ir.floor_divide),
    "div_trunc_stub": ("common", ir.trunc_divide),
    "remainder_stub": ("common", ir.remainder),
    "fmod_stub": ("common", ir.fmod),
    "pow_tensor_tensor_stub": ("common", ir.pow),
    "lerp_kernel_scalar_weight": ("common", _lerp),
    "lerp_kernel_tensor_weight": ("common", _lerp),
    "addcmul_stub": ("common", lambda a, b, c, value: a + value * b * c),
    "addcdiv_stub": ("common", lambda a, b, c, value: a + value * b / c),
    "addr_stub": ("common", _addr),
    "atan2_stub": ("common", ir.atan2),
    "hypot_stub": ("common", ir.hypot),
    "copysign_stub": ("common", ir.copysign),
    "nextafter_stub": ("common", ir.nextafter),
    "ldexp_stub": ("out", _ldexp),
    "logaddexp_stub": ("common", _logaddexp(ir.exp, ir.log1p)),
    "logaddexp2_stub": ("common", _logaddexp(ir.exp2, lambda x: ir.log1p(x) * (1 / math.log(2)))),
    "xlogy_stub": ("common", _xlogy(ir.log)),
    "xlog1py_stub": ("common", _xlogy(ir.log1p)),
    "heaviside_stub": ("common", _heaviside),
    "maximum_stub": ("common", _maximum),
    "minimum_stub": ("common", _minimum),
    "fmax_stub": ("common", lambda a, b: ir.fmax(a, b)),
    "fmin_stub": ("common", lambda a, b: ir.fmin(a, b)),
    "mse_stub": ("common", lambda a, b: ir.square(a - b)),
    "mse_backward_stub": ("common", lambda x, y, grad, norm: norm * (x - y) * grad),
    "smooth_l1_stub": ("common", _smooth_l1),
    "smooth_l1_backward_stub": ("common", _smooth_l1_backward),
    "huber_stub": ("common", _huber),
    "huber_backward_stub": ("common", _huber_backward),
    # bits and logic
    "bitwise_and_stub": ("common", ir.and_),
    "bitwise_or_stub": ("common", ir.or_),
    "bitwise_xor_stub": ("common", ir.xor),
    "bitwise_not_stub": ("common", _bitwise_not),
    "lshift_stub": ("common", ir.shl),
    "rshift_stub": ("common", ir.shr),
    "logical_not_stub": ("in", lambda a: ir.logical_not(_truth(a))),
    "logical_and_stub": ("common", lambda a, b: ir.and_(_truth(a), _truth(b))),
    "logical_or_stub": ("common", lambda a, b: ir.or_(_truth(a), _truth(b))),
    "logical_xor_stub": ("common", lambda a, b: ir.xor(_truth(a), _truth(b))),
    # comparisons
    "eq_stub": ("common", ir.eq),
    "ne_stub": ("common", ir.ne),
    "lt_stub": ("common", ir.lt),
    "le_stub": ("common", ir.le),
    "gt_stub": ("common", ir.gt),
    "ge_stub": ("common", ir.ge),
    "isposinf_stub": ("in", lambda a: ir.eq(a, math.inf)),
    "isneginf_stub": ("in", lambda a: ir.eq(a, -math.inf)),
    "where_kernel": ("out", lambda c, a, b: where(_truth(c), a, b)),
    "clamp_stub": ("common", _clamp),
    "clamp_scalar_stub": ("common", _clamp),
    "clamp_min_scalar_stub": ("common", _maximum),
    "clamp_max_scalar_stub": ("common", _minimum),
    # functions of one argument
    "abs_stub": ("in", _abs),
    "angle_stub": ("in", lambda a: a * 0 if getattr(a, "dtype", "") == "bool" else ir.angle(a)),
    "conj_physical_stub": ("common", ir.conj),
    "neg_stub": ("common", ir.neg),
    "reciprocal_stub": ("common", ir.reciprocal),
    "sign_stub": ("common", _sign),
    "sgn_stub": ("common", _sgn),
    "signbit_stub": ("in", ir.signbit),
    "ceil_stub": ("common", ir.ceil),
    "floor_stub": ("common", ir.floor),
    "trunc_stub": ("common", ir.trunc),
    "round_stub": ("common", ir.rint),
    "round_decimals_stub": ("common", _round_decimals),
    "frac_stub": ("common", lambda a: a - ir.trunc(a)),
    "sqrt_stub": ("common", ir.sqrt),
    "rsqrt_stub": ("common", ir.rsqrt),
    "exp_stub": ("common", ir.exp),
    "exp2_stub": ("common", ir.exp2),
    "expm1_stub": ("common", ir.expm1),
    "log_stub": ("common", ir.log),
    "log2_stub": ("common", ir.log2),
    "log10_stub": ("common", ir.log10),
    "log1p_stub": ("common", ir.log1p),
    "sin_stub": ("common", ir.sin),
    "cos_stub": ("common", ir.cos),
    "tan_stub": ("common", ir.tan),
    "asin_stub": ("common", ir.asin),
    "acos_stub": ("common", ir.acos),
    "atan_stub": ("common", ir.atan),
    "sinh_stub": ("common", ir.sinh),
    "cosh_stub": ("common", ir.cosh),
    "tanh_stub": ("common", ir.tanh),
    "asinh_stub": ("common", ir.asinh),
    "acosh_stub": ("common", ir.acosh),
    "atanh_stub": ("common", ir.atanh),
    "erf_stub": ("common", ir.erf),
    "erfc_stub": ("common", ir.erfc),
    "erfinv_stub": ("common", ir.erfinv),
    "lgamma_stub": ("common", ir.lgamma),
    "digamma_stub": ("common", ir.digamma),
    "sigmoid_stub": ("common", ir.sigmoid),
    "logit_stub": ("common", _logit),
    "sinc_stub": ("common", _sinc),
    "special_entr_stub": ("common", _entr),
    "complex_stub": ("in", lambda re, im: ir.Complex(re, im)),
    "polar_stub": ("in", _polar),
    # activations
    "threshold_stub": ("common", lambda x, other, t, value: where(ir.le(x, t), value, other)),
    "elu_stub": ("common", _elu),
    "elu_backward_stub": ("common", _elu_backward),
    "softplus_stub": ("common", _softplus),
    "softplus_backward_stub": ("common", _softplus_backward),
    "hardtanh_backward_stub": (
        "common",
        lambda grad, x, lo, hi: where(ir.or_(ir.le(x, lo), ir.ge(x, hi)), 0.0, grad),
    ),
    "hardsigmoid_stub": ("common", _hardsigmoid),
    "hardsigmoid_backward_stub": (
        "common",
        lambda grad, x: where(ir.and_(ir.gt(x, -3.0), ir.lt(x, 3.0)), grad / 6.0, 0.0),
    ),
    "hardswish_stub": ("common", lambda x: x * ir.clamp(x + 3.0, 0.0, 6.0) / 6.0),
    "hardswish_backward_stub": ("common", _hardswish_backward),
    "hardshrink_stub": (
        "common",
        lambda x, lambd: where(ir.and_(ir.ge(x, ir.neg(lambd)), ir.le(x, lambd)), 0.0, x),
    ),
    "softshrink_stub": ("common", _softshrink),
    "shrink_backward_stub": ("common", _shrink_backward),
    "leaky_relu_stub": ("common", lambda x, slope: where(ir.gt(x, 0.0), x, x * slope)),
    "leaky_relu_backward_stub": ("common", lambda x, grad, slope: where(ir.gt(x, 0.0), grad, grad * slope)),
    "glu_stub": ("common", lambda a, b: a * ir.sigmoid(b)),
    "glu_jvp_stub": ("common", _glu_jvp),
    "glu_backward_stub": ("common", lambda s, a, grad: (1.0 - s) * s * a * grad),
    "silu_stub": ("common", lambda x: x * ir.sigmoid(x)),
    "silu_backward_stub": ("common", _silu_backward),
    "mish_stub": ("common", lambda x: x * ir.tanh(ir.softplus(x))),
    "mish_backward_stub": ("common", _mish_backward),
    "prelu_stub": ("common", lambda x, w: where(ir.gt(x, 0.0), x, w * x)),
    "prelu_backward_stub": (
        "common",
        lambda x, w, grad: (where(ir.gt(x, 0.0), grad, w * grad), where(ir.gt(x, 0.0), 0.0, x * grad)),
    ),
    "sigmoid_backward_stub": ("common", _sigmoid_backward),
    "tanh_backward_stub": ("common", _tanh_backward),
    "logit_backward_stub": ("common", _logit_backward),
}


def _define(name: str, compute: str, function: Any) -> None:
    @stub(name)
    def body(it: Iter, *extras: Any) -> None:
        pointwise(name, it, function, compute, extras)


for _name, (_compute, _function) in STUBS.items():
    _define(_name, _compute, _function)


@stub("fill_stub")
def fill(it: Iter, value: Any) -> None:
    """out = value. Powers of two that are scales have no signs; 0 (zero_) is their smallest."""
    if it.outputs[0].dtype == "f8e8m0fnu":
        inside = select(lt(value, 0.0), 0, select(lt(2.0**127, value), 0, 1))
        check(inside, "RuntimeError", "value cannot be converted to type c10::Float8_e8m0fnu without overflow")
    pointwise("fill", it, lambda v: v, "out", (value,))


@stub("copy_stub")
def copy(it: Iter) -> None:
    """out = in, converted; copies of one dtype move bits."""
    pointwise("copy", it, lambda x: x, "copy", ())


_LARGEST = {
    "f16": 65504.0,
    "bf16": float(torch.finfo(torch.bfloat16).max),
    "f32": float(torch.finfo(torch.float32).max),
    "f64": float(torch.finfo(torch.float64).max),
}
_TO_NUMBERS = {dtype: _nan_to_num(-largest, largest) for dtype, largest in _LARGEST.items()}


@stub("nan_to_num_stub")
def nan_to_num(it: Iter, nan: Any, posinf: Any, neginf: Any) -> None:
    """Numbers in the place of NaN and infinities."""
    part = {"c32": "f16", "c64": "f32", "c128": "f64"}.get(it.outputs[0].dtype, it.outputs[0].dtype)
    pointwise(f"nan_to_num_{part}", it, _TO_NUMBERS[part], "common", (nan, posinf, neginf))


def _small_power(x: Any, e: Any) -> Any:
    """x ** e for e among SMALL_POWERS, by products: correctly rounded where one is enough."""
    square = x * x
    r = where(ir.eq(e, 2), square, square * x)
    if isinstance(x, ir.Complex) or x.dtype in ir.FLOATS:
        one = ir.const(1, x.dtype)
        r = where(ir.eq(e, -1), one / x, where(ir.eq(e, -2), one / square, r))
    return r


SMALL_POWERS = (2, 3, -1, -2)


@stub("pow_tensor_scalar_stub")
def pow_tensor_scalar(it: Iter, exponent: Any) -> None:
    """in ** exponent. One of two kernels runs: the exponent is a number of the call, not of the plan."""
    if isinstance(exponent, tuple) or it.common == "bool":
        pointwise("pow_scalar", it, ir.pow, "common", (exponent,))
        return
    small = any_of(
        *(eq(exponent, e) for e in SMALL_POWERS[: None if compute_dtype(it.common or "f32") in ir.FLOATS else 2])
    )
    pointwise("small_power", it, _small_power, "common", (exponent,), enabled=small)
    pointwise("pow_scalar", it, ir.pow, "common", (exponent,), enabled=eq(small, 0))
