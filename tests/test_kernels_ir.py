"""Kernels from expressions, on every language that this machine runs, against NumPy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from kernel_runner import run, targets

from torch_spiral.kernels import DTYPES, KernelBuilder, Target, Unsupported, ir
from torch_spiral.kernels.nest import (
    ALL,
    ANY,
    ARGMAX,
    ARGMIN,
    LOGSUMEXP,
    MAX,
    WELFORD,
    Operand,
    pointwise,
    rows,
    split_rows,
    stride_classes,
)

scipy_special = pytest.importorskip("scipy.special")
TARGETS = targets()
NUMPY: dict[str, Any] = {
    "f32": np.float32, "f16": np.float16, "bf16": np.uint16, "f64": np.float64, "i8": np.int8, "i16": np.int16,
    "i32": np.int32, "i64": np.int64, "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "bool": np.uint8, "c32": np.uint32, "c64": np.complex64, "c128": np.complex128,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def apply(target: Target, name: str, fn: Any, arrays: list[np.ndarray], dtypes: list[str], out: str) -> np.ndarray:
    """out = fn(*arrays) elementwise, in one dense nest."""
    ins = [Operand(f"x{i}", d) for i, d in enumerate(dtypes)]
    nest = pointwise(target, f"{name}_{'_'.join(dtypes)}_{out}", [Operand("out", out)], ins, fn, 1)
    n = arrays[0].size
    return run(nest.kernel, [np.zeros(n, NUMPY[out]), *arrays], nest.scalars([n]), nest.groups([n]))[0]


def close(got: np.ndarray, want: np.ndarray, rtol: float, atol: float) -> None:
    want = np.asarray(want, np.complex128 if np.iscomplexobj(want) else np.float64).reshape(-1)
    got = got.reshape(-1)
    with np.errstate(all="ignore"):
        ok = (np.abs(got - want) <= atol + rtol * np.abs(want)) | (got == want.astype(got.dtype))
    ok |= np.isnan(got) & np.isnan(want)
    where = np.nonzero(~ok)[0][:5]
    assert ok.all(), (where, got[where], want[where])


# ---- expressions --------------------------------------------------------------------------------------------------


def test_equal_expressions_are_one_node() -> None:
    x = ir.leaf("x", "f32")
    assert ir.exp(x * 2.0 + 1.0) is ir.exp(x * 2.0 + 1.0)
    assert ir.const(0.0, "f32") is not ir.const(-0.0, "f32")
    assert ir.const(math.nan, "f32") is ir.const(math.nan, "f32")


def test_mixing_dtypes() -> None:
    assert (ir.leaf("a", "i32") + ir.leaf("b", "f32")).dtype == "f32"
    assert (ir.leaf("a", "i32") + 1.5).dtype == "f32"
    with pytest.raises(TypeError, match="do not mix"):
        ir.leaf("a", "i32") + ir.leaf("b", "u32")
    with pytest.raises(TypeError, match="true division"):
        ir.leaf("a", "i32") / 2
    with pytest.raises(TypeError, match="not known"):
        bool(ir.leaf("a", "i32") < 1)


def test_constants_are_exact(target: Target) -> None:
    values = {
        "f32": [math.inf, -math.inf, math.nan, -0.0, 1e-40, 3.4028234663852886e38, 0.1],
        "i64": [-(2**63), 2**63 - 1, -1, 0],
        "u64": [2**64 - 1, 0],
        "i32": [-(2**31), 2**31 - 1],
        "u32": [2**32 - 1],
    }
    if target.float64:
        values["f64"] = [math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308, 0.1]
    for dtype, constants in values.items():
        k = KernelBuilder(target, f"constants_{dtype}")
        out = k.buffer("out", dtype, "w")
        for i, c in enumerate(constants):
            out[i] = ir.const(c, dtype)
        got = run(k.finish(), [np.zeros(len(constants), NUMPY[dtype])])[0]
        want = np.array(constants, NUMPY[dtype])
        same = got.view(np.uint8) == want.view(np.uint8)
        same = same.reshape(len(constants), -1).all(1) | (got != got) & (want != want)
        assert same.all(), (dtype, got, want)


FUNCTIONS: dict[str, Any] = {
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log10": np.log10,
    "log1p": np.log1p, "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh,
    "atanh": np.arctanh, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "erf": scipy_special.erf,
    "erfc": scipy_special.erfc, "erfinv": scipy_special.erfinv, "digamma": scipy_special.digamma,
    "lgamma": scipy_special.gammaln, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint,
    "sigmoid": scipy_special.expit,
}  # fmt: skip


def samples(dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1, -1, math.inf, math.nan, 2, -2, 3, 0.5, -0.5, 88, -88, 100, -100, 1e4, -1e4]
    sign = rng.choice([-1, 1], 600)
    parts = [rng.uniform(-10, 10, 1500), 10 ** rng.uniform(-6, 3, 600) * sign, rng.uniform(-1, 1, 900), special]
    return np.concatenate(parts).astype(dtype)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions(target: Target, name: str) -> None:
    """float32 within PyTorch's tolerance of 1.3e-6 (absolute 1e-6 near zeros), float64 within 2e-13."""
    for dtype, rtol, atol in (("f32", 1.3e-6, 1e-6), ("f64", 2e-13, 1e-13)):
        if dtype == "f64" and not target.float64:
            continue
        x = samples(NUMPY[dtype])
        with np.errstate(all="ignore"):
            want = FUNCTIONS[name](x.astype(np.float64))
        got = apply(target, name, getattr(ir, name), [x], [dtype], dtype)
        close(got, want, rtol, atol)


def test_special_pairs(target: Target) -> None:
    """Functions of two floats, at every pair of special values."""
    v = np.array([0.0, -0.0, 1, -1, math.inf, -math.inf, math.nan, 2, -2, 3, 0.5, -0.5, 7, 100.5, -7.25], np.float32)
    a, b = np.repeat(v, v.size), np.tile(v, v.size)
    wants: dict[str, Any] = {
        "pow": np.power, "atan2": np.arctan2, "hypot": np.hypot, "fmod": np.fmod, "remainder": np.mod,
        "copysign": np.copysign, "maximum": np.maximum, "minimum": np.minimum, "fmax": np.fmax, "fmin": np.fmin,
        "nextafter": lambda x, y: np.nextafter(x.astype(np.float32), y.astype(np.float32)).astype(np.float64),
    }  # fmt: skip
    for name, f in wants.items():
        with np.errstate(all="ignore"):
            want = f(a.astype(np.float64), b.astype(np.float64))
        # Remainders by infinity: NumPy gives NaN where torch gives the divisor.
        keep = np.isfinite(b) if name == "remainder" else np.ones(a.size, bool)
        close(apply(target, name, getattr(ir, name), [a, b], ["f32", "f32"], "f32")[keep], want[keep], 1e-6, 0)


@pytest.mark.parametrize("dtype", ["i32", "i64", "u64", "i8", "u8"])
def test_integers(target: Target, dtype: str) -> None:
    """Wrapping, Python's signs in // and %, divisors of 0 and -1 that must not trap, comparisons and shifts."""
    info = np.iinfo(NUMPY[dtype])
    rng = np.random.default_rng(1)
    a = rng.integers(info.min, info.max, 1000, NUMPY[dtype], endpoint=True)
    b = rng.integers(info.min, info.max, 1000, NUMPY[dtype], endpoint=True) >> rng.integers(
        0, info.bits - 1, 1000
    ).astype(NUMPY[dtype])
    a[:3], b[:3] = [info.min, info.max, info.min], [info.max, 1, info.max]
    if info.min:
        b[5:20] = -1
        a[5] = info.min
    zero = b == 0
    with np.errstate(all="ignore"):
        for name, f in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "maximum": np.maximum}.items():
            assert (apply(target, name, getattr(ir, name), [a, b], [dtype] * 2, dtype) == f(a, b)).all(), name
        for name in ("floor_divide", "remainder", "fmod"):
            want = getattr(np, name)(a, b)
            got = apply(target, name, getattr(ir, name), [a, b], [dtype] * 2, dtype)
            assert (got == want)[~zero].all(), (name, a[got != want][:3], b[got != want][:3])
    for name, f in {"lt": np.less, "ge": np.greater_equal, "eq": np.equal}.items():
        assert (apply(target, name, getattr(ir, name), [a, b], [dtype] * 2, "bool") == f(a, b)).all(), name
    n = rng.integers(0, info.bits, 1000).astype(NUMPY[dtype])
    assert (apply(target, "shl", ir.shl, [a, n], [dtype] * 2, dtype) == a << n).all()
    assert (apply(target, "shr", ir.shr, [a, n], [dtype] * 2, dtype) == a >> n).all()
    got = apply(target, "to_f32", lambda x: ir.cast(x, "f32"), [a], [dtype], "f32")
    assert (got == a.astype(np.float32)).all()


@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "sin", "tanh", "asin", "acosh", "atanh", "log1p", "expm1"])
def test_complex_functions(target: Target, name: str) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(500) * 2 + 2j * rng.standard_normal(500)).astype(np.complex64)
    x[:100] *= 1e-3
    f = getattr(np, {"asin": "arcsin", "acosh": "arccosh", "atanh": "arctanh"}.get(name, name))
    close(apply(target, name, getattr(ir, name), [x], ["c64"], "c64"), f(x.astype(np.complex128)), 3e-6, 2e-6)


def test_complex_arithmetic(target: Target) -> None:
    rng = np.random.default_rng(3)
    x, y = ((rng.standard_normal(100) + 1j * rng.standard_normal(100)).astype(np.complex64) for _ in range(2))
    for name, f in {
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "mixed": lambda a, b: a * (2 - 1j) + b,
    }.items():
        close(
            apply(target, name, f, [x, y], ["c64", "c64"], "c64"), f(x.astype(complex), y.astype(complex)), 1e-6, 1e-6
        )
    big = np.full(4, 1e30 + 1e30j, np.complex64)
    close(apply(target, "div", lambda a, b: a / b, [big, big], ["c64", "c64"], "c64"), np.ones(4), 1e-6, 1e-6)


# ---- storage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "b128"])
def test_storage_round_trip(target: Target, dtype: str) -> None:
    """Every bit pattern of 8- and 16-bit dtypes survives load and store at any offset; nothing beside is touched."""
    if dtype in ("f64", "c128") and not target.float64:
        with pytest.raises(Unsupported):
            pointwise(target, "copy", [Operand("out", dtype)], [Operand("x", dtype)], lambda x: x, 1)
        return
    size = DTYPES[dtype].size
    n = 65536 if size == 2 else 1000
    rng = np.random.default_rng(4)
    raw = rng.integers(0, 256, n * size, dtype=np.uint8) if size != 2 else np.arange(n, dtype=np.uint16).view(np.uint8)
    if dtype == "bool":
        raw &= 1
    nest = pointwise(target, "copy", [Operand("out", dtype)], [Operand("x", dtype)], lambda x: x, 1)
    for first in (0, 1, 3):
        m = n - 7
        out = np.full((n + 8) * size, 0xAA, np.uint8)
        got = run(nest.kernel, [out, raw], nest.scalars([m]), nest.groups([m]), offsets=[first, 5])[0]
        inside, want = got[first * size : (first + m) * size], raw[5 * size : (5 + m) * size]
        assert (got[: first * size] == 0xAA).all() and (got[(first + m) * size :] == 0xAA).all()
        floats = {"f32": "f4", "c64": "f4", "f64": "f8", "c128": "f8", "f16": "f2", "c32": "f2"}.get(dtype)
        if floats:
            a, b = inside.copy().view(floats), want.copy().view(floats)
            same = (a.view("u" + floats[1:]) == b.view("u" + floats[1:])) | (np.isnan(a) & np.isnan(b))
        elif dtype == "bf16":
            a, b = ((v.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32) for v in (inside, want))
            same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
        else:
            same = inside == want
            if dtype == "f8e5m2":  # which has three NaNs of each sign
                same |= ((inside & 0x7F) > 0x7C) & ((want & 0x7F) > 0x7C)
        assert same.all()


def test_half_rounds_to_nearest_even(target: Target) -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    x[:10000] = (rng.standard_normal(10000) * 10.0 ** rng.uniform(-9, 6, 10000)).astype(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        want = x.astype(np.float16)
    got = apply(target, "to_f16", lambda v: v, [x], ["f32"], "f16")
    assert (got.view(np.uint16) == want.view(np.uint16)).all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64", "i32", "i64", "u8", "i16", "c64"])
def test_atomic_add(target: Target, dtype: str) -> None:
    k = KernelBuilder(target, f"atomic_{dtype}")
    x, out = k.buffer("x", "f32"), k.buffer("out", dtype, "a")
    i = k.global_id(64)
    try:
        out.atomic_add(i % 7 + 1, x[i])
    except Unsupported as e:
        assert dtype == "f64" and not target.int64_atomics, e
        return
    values = np.random.default_rng(6).integers(-2, 4, 1024).astype(np.float32)
    got = run(k.finish((64, 1, 1)), [values, np.zeros(12, NUMPY[dtype])], groups=16)[1]
    want = np.zeros(12)
    np.add.at(want, np.arange(1024) % 7 + 1, values)
    if dtype == "bf16":
        got = (got.astype(np.uint32) << 16).view(np.float32)
    assert (got == want.astype(np.int64).astype(got.dtype)).all()


def test_check_index(target: Target) -> None:
    """An index out of range is reported, once, and clamped."""
    k = KernelBuilder(target, "checked")
    x, index, out = k.buffer("x", "f32"), k.buffer("index", "i64"), k.buffer("out", "f32", "w")
    n, site = k.scalar("n", "i32"), k.scalar("site", "u32")
    i = k.global_id(8)
    out[i] = x[k.check_index(index[i], 0, n, site)]
    kernel = k.finish((8, 1, 1))
    data, indices = np.arange(5, dtype=np.float32), np.array([0, 4, 2, 9, 1, 3, 0, 0])
    got = run(kernel, [data, indices, np.zeros(8, np.float32)], [5, 42])
    assert got[3].tolist() == [42, 9] and got[2].tolist() == [0, 4, 2, 0, 1, 3, 0, 0]
    got = run(kernel, [data, indices % 5, np.zeros(8, np.float32)], [5, 42])
    assert got[3].tolist() == [0, 0]


def test_windows() -> None:
    """A buffer larger than a binding is several bindings; the kernel finds the right one."""
    if "wgsl" not in TARGETS:
        pytest.skip("no Vulkan adapter")
    from dataclasses import replace

    target = replace(TARGETS["wgsl"], max_binding=1024)
    k = KernelBuilder(target, "windows")
    x, out = k.buffer("x", "f32", windows=3), k.buffer("out", "f32", "w")
    i = k.global_id(64)
    out[i] = x[i * 11]
    got = run(k.finish((64, 1, 1)), [np.arange(768, dtype=np.float32), np.zeros(64, np.float32)])[1]
    assert (got == np.arange(64) * 11).all()


# ---- statements ---------------------------------------------------------------------------------------------------


def test_statements(target: Target) -> None:
    """Variables keep program order, loops and branches nest, shared memory and barriers work."""
    k = KernelBuilder(target, "statements")
    out, n = k.buffer("out", "i32", "w"), k.scalar("n", "i32")
    lid = k.local_id()
    shared = k.shared("i32", 16)
    total = k.var("i32", 0)
    before = total + 100
    with k.For(0, n) as j:
        with k.If(ir.eq(j % 3, 0)):
            total.set(total + j)
        with k.Else():
            total.set(total - 1)
        with k.If(j > 8):
            k.Break()
    countdown = k.var("i32", n)
    with k.While(lambda: countdown > 3):
        countdown.set(countdown - 1)
    shared[lid] = total + ir.cast(lid, "i32")
    k.barrier()
    out[lid] = shared[15 - lid] + before + countdown
    got = run(k.finish((16, 1, 1)), [np.zeros(16, np.int32)], [20])[0]
    want = sum(j if j % 3 == 0 else -1 for j in range(10))
    assert got.tolist() == [want + 15 - i + 100 + 3 for i in range(16)]


# ---- nests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "u8", "f16"])
@pytest.mark.parametrize("shape", [(7,), (65537,), (33, 5), (3, 70, 2), (40, 37)])
def test_pointwise_layouts(target: Target, dtype: str, shape: tuple[int, ...]) -> None:
    """Dense, transposed and broadcast operands, all at offsets; sizes with dimension 0 first."""
    rng = np.random.default_rng(7)
    n = math.prod(shape)
    x, y = ((rng.standard_normal(4 * n) * 10).astype(NUMPY[dtype]) for _ in range(2))
    order = shape[::-1]
    strides: list[list[int]] = [[0] + [1 if d == 1 else 3 for d in range(1, len(shape))]]
    if len(shape) > 1:
        rest = [shape[0] * shape[1] * math.prod(shape[2:d]) for d in range(2, len(shape))]
        strides.append([shape[1], 1, *rest])
    for s in strides:
        view = np.lib.stride_tricks.as_strided(y, order, [v * y.itemsize for v in s[::-1]])
        ins = [Operand("x", dtype), Operand("y", dtype, stride_classes(s))]
        nest = pointwise(target, "add", [Operand("out", dtype)], ins, lambda a, b: a + b, len(shape))
        out = np.full(n + 9, 77, NUMPY[dtype])
        got = run(nest.kernel, [out, x, y], nest.scalars(shape, [None, None, s]), nest.groups(shape), [5, 3, 0])[0]
        want = x[3 : 3 + n].astype(np.float32) + view.astype(np.float32).reshape(-1)
        want = want.astype(np.int64).astype(np.uint8) if dtype == "u8" else want.astype(NUMPY[dtype])
        assert (got[5 : 5 + n] == want).all() and (got[:5] == 77).all() and (got[5 + n :] == 77).all()


def test_pointwise_gather(target: Target) -> None:
    """Loads at computed indices, with coordinates."""
    nest = pointwise(
        target, "gather", [Operand("out", "f32")], [Operand("i", "i64")],
        lambda c, i, table: table[i * 3 + c.coordinates[0] % 3], 1, buffers=[("table", "f32", "r")], context=True,
    )  # fmt: skip
    table = np.arange(30, dtype=np.float32)
    index = np.random.default_rng(8).integers(0, 10, 100)
    got = run(nest.kernel, [np.zeros(100, np.float32), index, table], nest.scalars([100]), nest.groups([100]))[0]
    assert (got == table[index * 3 + np.arange(100) % 3]).all()


def softmax(r: Any, x: Any) -> Any:
    e = ir.exp(x - r.reduce(MAX(), x))
    return e / r.sum(e)


def layer_norm(r: Any, x: Any, w: Any, eps: Any) -> Any:
    mean, m2, n = r.reduce(WELFORD(), x, 0.0, 1.0)
    rstd = ir.rsqrt(m2 / n + eps)
    return (x - mean) * rstd * w, mean


def logsumexp(r: Any, x: Any) -> Any:
    m, s = r.reduce(LOGSUMEXP(), x, 1.0)
    return m + ir.log(s)


@pytest.mark.parametrize("layout", ["rows", "columns", "short"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 1000), (70, 33), (2, 9000), (1, 1)])
def test_rows(target: Target, layout: str, shape: tuple[int, int]) -> None:
    """Reductions of one and several phases, along contiguous and strided dimensions."""
    r, d = shape
    x = (np.random.default_rng(9).standard_normal(shape) * 3).astype(np.float32)
    x64 = x.astype(np.float64)
    columns = layout == "columns"
    classes, strides = (("s", "1"), (r, 1)) if columns else (("1", "s"), (1, d))
    short = {"vector": "lanes_r", "simt": "invocation"}[target.schedule_class]

    def launch(
        name: str, outs: list, fn: Any, data: np.ndarray, more: Any = (), scalars: Any = (), values: Any = ()
    ) -> Any:
        """outs: dtype per row output, or None for an elementwise one."""
        operands = [Operand(f"o{i}", o or "f32", ("0", "1") if o else classes) for i, o in enumerate(outs)]
        ins = [Operand("x", "f32", classes), *[Operand(f"w{i}", "f32", ("1", "0")) for i in range(len(more))]]
        nest = rows(target, name, operands, ins, fn, scalars=scalars, schedule=short if layout == "short" else None)
        arrays = [np.zeros(r if o else r * d, NUMPY[o or "f32"]) for o in outs]
        memory = data.T.copy() if columns else data
        given = [*[(0, 1) if o else strides for o in outs], strides, *[(1, 0)] * len(more)]
        got = run(nest.kernel, [*arrays, memory, *more], nest.scalars([d, r], given, values), nest.groups([d, r]))
        return [g.reshape(d, r).T if not o and columns else g for g, o in zip(got, outs, strict=False)]

    close(launch("softmax", [None], softmax, x)[0], scipy_special.softmax(x64, 1), 1e-5, 1e-7)
    close(launch("logsumexp", ["f32"], logsumexp, x)[0], scipy_special.logsumexp(x64, 1), 2e-6, 1e-6)
    close(launch("sum", ["f32"], lambda c, v: c.sum(v * v), x)[0], (x64 * x64).sum(1), 1e-6, 0)
    weight = np.arange(d, dtype=np.float32)
    got = launch("layer_norm", [None, "f32"], layer_norm, x, [weight], ["f32"], [1e-3])
    mean = x64.mean(1, keepdims=True)
    want = (x64 - mean) / np.sqrt(x64.var(1, keepdims=True) + 1e-3) * weight
    close(got[0], want, 2e-5, 1e-3 * d / 100)
    close(got[1], mean, 1e-5, 1e-6)
    nan = x.copy()
    if d > 6:
        nan[0, 3] = nan[0, 5] = np.nan
        nan[-1, 2] = nan[-1, 4] = 50
    got = launch("argmax", ["f32", "i64"], lambda c, v: c.reduce(ARGMAX(), v, c.index), nan)
    assert (got[1] == nan.argmax(1)).all()
    close(got[0], nan.max(1), 0, 0)
    assert (launch("any", ["bool"], lambda c, v: c.reduce(ANY, v > 7.0), x)[0] == (x > 7).any(1)).all()
    assert (launch("all", ["bool"], lambda c, v: c.reduce(ALL, v > -5.0), x)[0] == (x > -5).all(1)).all()

    out = [Operand("out", "f32", ("0", "1"))]
    split = split_rows(
        target, "mean", out, [Operand("x", "f32", classes)],
        lambda c, v, a: c.sum(v) / ir.cast(c.count, "f32") * a, scalars=["f32"],
    )  # fmt: skip
    splits = 3
    memory = x.T.copy() if columns else x
    first = split.first
    partial = run(
        first.kernel, [np.zeros(r * splits, np.float32), memory],
        first.scalars([d, r], [strides], [2.0], splits), first.groups([d, r], splits),
    )[0]  # fmt: skip
    sizes, given = split.second_shape([d, r], splits, [(1,)])
    arguments = split.second.scalars(sizes, given, [d, 2.0])
    got = run(split.second.kernel, [np.zeros(r, np.float32), partial], arguments, split.second.groups(sizes))
    close(got[0], 2 * x64.mean(1), 2e-6, 1e-6)


def test_rows_over_several_dimensions(target: Target) -> None:
    """The first and last of three dimensions reduced, and one without subgroups."""
    x = np.random.default_rng(10).standard_normal((6, 37, 20)).astype(np.float32)
    outs = [Operand("out", "f32", ("0", "0", "1"))]
    for subgroups in (True, False):
        nest = rows(
            target, "sum", outs, [Operand("x", "f32", ("1", "s", "s"))], lambda r, v: r.sum(v),
            reduced=2, ndim=3, subgroups=subgroups,
        )  # fmt: skip
        sizes = [20, 6, 37]
        arguments = nest.scalars(sizes, [(0, 0, 1), (1, 37 * 20, 20)])
        got = run(nest.kernel, [np.zeros(37, np.float32), x], arguments, nest.groups(sizes))[0]
        close(got, x.astype(np.float64).sum((0, 2)), 1e-6, 1e-6)


@pytest.mark.parametrize("kind", ["i64", "f64", "bool", "argmin"])
def test_reductions_of_any_type_between_lanes_and_in_shared_memory(target: Target, kind: str) -> None:
    """One long row, by both ways of a workgroup: 64-bit numbers whose halves both count, conditions, values with their index."""
    dtype = "i64" if kind == "argmin" else kind
    if (dtype == "i64" and not target.int64) or (dtype == "f64" and not target.float64):
        pytest.skip(f"no {dtype}")
    rng = np.random.default_rng(12)
    d = 3000
    x = {
        "i64": rng.integers(-(1 << 52), 1 << 52, (2, d)), "f64": rng.standard_normal((2, d)) * 1e100,
        "bool": np.arange(2 * d).reshape(2, d) % (2 * d) == d + 17, "argmin": rng.integers(-(1 << 60), 1 << 60, (2, d)),
    }[kind]  # fmt: skip

    def reduce(r: Any, v: Any) -> Any:
        if kind == "argmin":
            return r.reduce(ARGMIN("i64"), v, r.index)
        return r.reduce(ANY, v) if kind == "bool" else r.sum(v)

    want = {"i64": x.sum(1), "f64": x.sum(1), "bool": x.any(1), "argmin": None}[kind]
    outs = [Operand("out", dtype, ("0", "1"))] + [Operand("at", "i32", ("0", "1"))] * (kind == "argmin")
    for subgroups in (True, False):
        nest = rows(
            target, kind, outs, [Operand("x", dtype, ("1", "s"))], reduce, subgroups=subgroups, schedule="workgroup" if target.schedule_class == "simt" else None,
        )  # fmt: skip
        assert ("_subgroups" in nest.kernel.name) == (subgroups and target.subgroup > 0)
        arrays = [np.zeros(2, x.dtype)] + [np.zeros(2, np.int32)] * (kind == "argmin") + [x]
        scalars = nest.scalars([d, 2], [(0, 1)] * len(outs) + [(1, d)])
        got = run(nest.kernel, arrays, scalars, nest.groups([d, 2]))
        if kind == "argmin":
            np.testing.assert_array_equal(got[0], x.min(1))
            np.testing.assert_array_equal(got[1], x.argmin(1))
        elif kind == "f64":
            np.testing.assert_allclose(got[0], want, rtol=1e-13, atol=1e88)
        else:
            np.testing.assert_array_equal(got[0], want)


def test_long_sum_is_accurate(target: Target) -> None:
    x = np.random.default_rng(11).uniform(0, 1, 1 << 20).astype(np.float32)
    nest = rows(
        target, "sum", [Operand("out", "f32", ("0", "1"))], [Operand("x", "f32", ("1", "s"))], lambda r, v: r.sum(v)
    )
    got = run(
        nest.kernel,
        [np.zeros(1, np.float32), x],
        nest.scalars([x.size, 1], [(0, 1), (1, x.size)]),
        nest.groups([x.size, 1]),
    )[0]
    assert abs(got[0] / x.astype(np.float64).sum() - 1) < 3e-7
