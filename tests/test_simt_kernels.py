"""Contractions of the simt class, as WGSL on a Vulkan device and as OpenCL, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import run, targets

from torch_spiral.kernels.simt import conv as C
from torch_spiral.kernels.simt import gemm as G

TARGETS = {name: t for name, t in targets().items() if name in ("opencl-simt", "wgsl")}
NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "f64": np.float64, "i32": np.int32, "i64": np.int64}
EPS = {"f32": 2e-6, "f16": 1e-3, "bf16": 8e-3, "f64": 1e-14}

pytestmark = pytest.mark.skipif(not TARGETS, reason="neither OpenCL nor Vulkan here")


@pytest.fixture(params=list(TARGETS), scope="module")
def target(request):
    return TARGETS[request.param]


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Float64 values as storage of `dtype` (bf16 as uint16, rounded to nearest even)."""
    if dtype != "bf16":
        return x.astype(NUMPY[dtype])
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x if dtype in ("i32", "i64") else x.astype(np.float64)


def random(rng, shape, dtype):
    x = rng.integers(-50, 50, shape) if dtype in ("i32", "i64") else rng.standard_normal(shape)
    return encode(x, dtype)


def place(x: np.ndarray, order: tuple[int, ...], pad: int, offset: int):
    """A buffer that holds x with its dimensions from slow to fast in `order`, rows padded by `pad`: (buffer, strides)."""
    moved = x.transpose(order)
    shape = list(moved.shape)
    shape[-1] += pad
    storage = np.zeros(offset + int(np.prod(shape)), x.dtype)
    storage[offset:].reshape(shape)[..., : moved.shape[-1]] = moved
    steps = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    strides = [0] * x.ndim
    for slow, dim in enumerate(order):
        strides[dim] = steps[slow]
    return storage, strides


def close(got, want, dtype):
    if dtype in ("i32", "i64"):
        assert np.array_equal(got, want)
        return
    scale = np.abs(want).max() + 1e-30
    error = np.abs(got - want).max() / scale
    assert error <= EPS[dtype], error


def check_gemm(target, schedule, m, n, k, batch=1, dtype="f32", a="n", b="n", c="n", vec=False, splits=0, pad=0, out=None, broadcast=False):
    rng = np.random.default_rng(0)
    out = out or dtype
    A, B = random(rng, (batch, m, k), dtype), random(rng, (1 if broadcast else batch, k, n), dtype)
    offset = 4 if vec else 3
    sa, ta = place(A, {"n": (0, 1, 2), "t": (0, 2, 1), "s": (1, 2, 0)}[a], pad, offset)
    sb, tb = place(B, {"n": (0, 1, 2), "t": (0, 2, 1), "s": (1, 2, 0)}[b], pad, offset)
    C = np.zeros((batch, m, n), NUMPY[out])
    sc, tc = place(C, {"n": (0, 1, 2), "s": (0, 2, 1)}[c], pad, offset)
    if broadcast:
        tb[0] = 0
    want = decode(A, dtype) @ decode(B, dtype)
    kernel = G.gemm(target, schedule, dtype, out, a, b, c, vec, vec, vec and c == "n", k % schedule.tile_k == 0, splits > 0)
    scalars = [batch, m, n, k, *ta, *tb]
    if splits:
        span = G.k_span(schedule, k, splits)
        sc, tc, offset = np.zeros(batch * splits * m * n, np.float32), [splits * m * n, n, 1], 0
        scalars += [*tc, splits, span, m * n]
    else:
        scalars += tc
    got = run(kernel, [sa, sb, sc], scalars, G.groups(schedule, m, n, batch, max(splits, 1)), [4 if vec else 3] * 2 + [offset])[2]
    if splits:
        got = got.reshape(batch, splits, m, n).sum(1)
    else:
        got = np.lib.stride_tricks.as_strided(got[offset:], (batch, m, n), [s * got.itemsize for s in tc])
        got = decode(np.ascontiguousarray(got), out)
    close(got, want, out if not splits else "f32")


SMALL = G.SCHEDULES[0]


@pytest.mark.parametrize("layout", ["nnn", "ntn", "tnn", "ttn", "sss", "nns"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 17), (70, 40, 96)])
def test_gemm_layouts(target, layout, shape):
    check_gemm(target, SMALL, *shape, batch=2, a=layout[0], b=layout[1], c=layout[2])


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("shape", [(4, 4, 4), (68, 36, 52), (64, 128, 96)])
def test_gemm_vec4(target, layout, shape):
    check_gemm(target, SMALL, *shape, a=layout[0], b=layout[1], vec=True, pad=4)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64", "i32", "i64"])
@pytest.mark.parametrize("vec", [False, True])
def test_gemm_dtypes(target, dtype, vec):
    schedule = SMALL if dtype in ("f16", "bf16") else G.WIDE_SCHEDULE
    shape = (36, 44, 40) if vec else (37, 45, 41)
    check_gemm(target, schedule, *shape, batch=2, dtype=dtype, vec=vec)
    check_gemm(target, schedule, *shape, dtype=dtype, a="t", b="t", vec=vec)


def test_gemm_split_and_broadcast(target):
    check_gemm(target, SMALL, 40, 33, 700, splits=3, batch=2)
    check_gemm(target, SMALL, 40, 33, 50, batch=3, broadcast=True)


@pytest.mark.parametrize("schedule", G.SCHEDULES, ids=lambda s: s.key)
def test_gemm_schedules(target, schedule):
    if not schedule.fits(target):
        pytest.skip("more than the device has")
    check_gemm(target, schedule, 132, 260, 72, vec=True)
    check_gemm(target, schedule, 77, 131, 45)


def reference_epilogue(x, bias, res, beta):
    y = np.maximum(x * 0.5 + bias, 0) + beta * res
    return y


@pytest.mark.parametrize("out,vec", [("f32", True), ("f32", False), ("f16", True), ("bf16", False)])
def test_gemm_epilogue(target, out, vec):
    rng = np.random.default_rng(1)
    m, n, k = 36, 44, 20
    A, B, bias, res = (random(rng, s, "f32") for s in ((m, k), (k, n), (n,), (m, n)))
    e = G.Epilogue(("alpha", ("add", "f32", "n"), "relu", ("beta", "f32", "mn")))
    kernel = G.gemm(target, SMALL, "f32", out, "n", "n", "n", vec, vec, vec, False, epilogue=e)
    c = np.zeros((m, n), NUMPY[out])
    scalars = [1, m, n, k, 0, k, 1, 0, n, 1, 0, n, 1, 0, 0, 1, 0, n, 1, 0.5, 2.0]
    got = run(kernel, [A, B, bias, res, c], scalars, G.groups(SMALL, m, n, 1))[4]
    close(decode(got, out), reference_epilogue(A.astype(float) @ B, bias, res, 2.0), out)


@pytest.mark.parametrize("name", ["relu6", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh", "hardswish", "hardsigmoid"])
def test_activations(target, name):
    import torch

    x = np.concatenate([np.linspace(-12, 12, 2001), [np.nan, np.inf, -np.inf, 1e-20, 100, -100]]).astype(np.float32)
    kernel = G.split_reduce(target, "f32", "f32", epilogue=G.Epilogue((name,)))
    got = run(kernel, [x, np.zeros_like(x)], [1, 1, x.size, 1, 0, 0, 0, 0, x.size, 1], G.reduce_groups(1, x.size, 1))[1]
    f = torch.nn.functional
    functions = {"gelu_tanh": lambda v: f.gelu(v, approximate="tanh"), **{a: getattr(f, a, None) for a in ("relu6", "silu", "gelu", "hardswish", "hardsigmoid")}, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    want = functions[name](torch.tensor(x, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-7, equal_nan=True)


@pytest.mark.parametrize("b", ["t", "n"])
@pytest.mark.parametrize("vec", [False, True])
@pytest.mark.parametrize("splits", [0, 3])
def test_skinny(target, b, vec, splits):
    rng = np.random.default_rng(2)
    m, n, k, rows = (3, 100, 264, 4) if vec else (2, 71, 301, 2)
    A, B = random(rng, (m, k), "f32"), random(rng, (k, n), "bf16")
    sb = np.ascontiguousarray(B.T) if b == "t" else B
    e = G.NO_EPILOGUE if splits else G.Epilogue(("relu",))
    kernel = G.skinny(target, "f32", "f32", rows, b, vec, splits > 0, e, "bf16")
    strides = [1, k] if b == "t" else [n, 1]
    c = np.zeros((max(splits, 1), m, n), np.float32)
    scalars = [1, m, n, k, 0, k, 1, 0, *strides, 0, n, 1] + ([splits, -(-k // splits // 4) * 4, m * n] if splits else [])
    got = run(kernel, [A, sb, c], scalars, G.skinny_groups(b, n, 1, max(splits, 1)))[2]
    want = A.astype(float) @ decode(B, "bf16")
    if not splits:
        close(got[0], np.maximum(want, 0), "f32")
        return
    reduce = G.split_reduce(target, "f32", "f16", "s", epilogue=G.Epilogue((("add", "f32", "m"),)))
    bias, out = np.arange(m, dtype=np.float32), np.zeros((n, m), np.float16)
    out = run(reduce, [got, bias, out], [1, m, n, splits, 0, m * n, n, 0, 1, m, 0, 1, 0], G.reduce_groups(m, n, 1))[2]
    close(out.T.astype(float), want + bias[:, None], "f16")


def contiguous(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def conv_scalars(mode, x, w, y, xs, ws, ys, stride, padding, dilation, groups, m, n, k):
    """Scalars of simt.conv for shapes x, w, y with strides xs, ws, ys."""
    nd = len(stride)
    pixel = x[2:] if mode == "input" else y[2:]
    ic, oc = x[1] // groups, y[1] // groups
    if mode == "input":
        mul, add, tap_mul, div, size = [1] * nd, padding, [-d for d in dilation], stride, y[2:]
        gs, cs, g_group, c_group, channels = ys, xs, oc * ys[1], ic * xs[1], oc
        w_part = [ws[1], ws[0], *ws[2:], oc * ws[0]]
    else:
        mul, add, tap_mul, div, size = stride, [-p for p in padding], dilation, [1] * nd, x[2:]
        gs, cs, g_group, c_group, channels = xs, ys, ic * xs[1], oc * ys[1], ic
        w_part = [ws[0], ws[1], *ws[2:], oc * ws[0]]
    c_part = [cs[1], cs[0], *cs[2:], c_group]
    if mode == "weight":
        c_part, w_part = w_part, [ys[1], ys[0], *ys[2:], oc * ys[1]]
    return [groups, m, n, k, *pixel, *w[2:], channels, *mul, *add, *tap_mul, *div, *size, gs[0], gs[1], *gs[2:], g_group, *w_part, *c_part]


CONVOLUTIONS = [  # x shape, out channels, kernel, stride, padding, dilation, groups
    ((2, 5, 9, 11), 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 8, 12, 7), 6, (3, 2), (2, 3), (2, 0), (1, 2), 2),
    ((2, 4, 1, 30), 4, (1, 5), (1, 2), (0, 3), (1, 1), 4),
    ((1, 3, 5, 6, 7), 4, (2, 3, 3), (2, 1, 1), (1, 1, 0), (1, 2, 1), 1),
]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mode", C.MODES)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=["3x3", "strided", "1d", "3d"])
def test_conv(target, mode, case, last, dtype="f32"):
    import torch

    x_shape, out_channels, kernel, stride, padding, dilation, groups = case
    nd, rng = len(kernel), np.random.default_rng(3)
    w_shape = (out_channels, x_shape[1] // groups, *kernel)
    X, W = random(rng, x_shape, dtype), random(rng, w_shape, dtype)
    function = torch.nn.functional.conv2d if nd == 2 else torch.nn.functional.conv3d
    tx, tw = (torch.tensor(decode(a, dtype), requires_grad=True) for a in (X, W))
    ty = function(tx, tw, None, stride, padding, dilation, groups)
    y_shape = tuple(ty.shape)
    Y = random(rng, y_shape, dtype)
    ty.backward(torch.tensor(decode(Y, dtype)))
    order = (0, *range(2, nd + 2), 1) if last else tuple(range(nd + 2))
    arrays = {"x": (X, x_shape), "w": (W, w_shape), "y": (Y, y_shape)}
    stored = {n: place(a, order, 0, 0) for n, (a, _) in arrays.items()}
    (g, w, c), want = {
        "forward": (("x", "w", "y"), ty.detach()),
        "input": (("y", "w", "x"), tx.grad),
        "weight": (("x", "y", "w"), tw.grad),
    }[mode]
    pixels = y_shape[0] * int(np.prod(y_shape[2:])) if mode != "input" else x_shape[0] * int(np.prod(x_shape[2:]))
    taps = int(np.prod(kernel)) * (y_shape[1] if mode == "input" else x_shape[1]) // groups
    m = (x_shape[1] if mode == "input" else y_shape[1]) // groups
    n, k = (taps, pixels) if mode == "weight" else (pixels, taps)
    strides = [stored[i][1] for i in "xwy"]
    scalars = conv_scalars(mode, x_shape, w_shape, y_shape, *strides, stride, padding, dilation, groups, m, n, k)
    out, out_strides = np.zeros_like(stored[c][0]), stored[c][1]
    divided = mode == "input" and stride != (1,) * nd
    shape = arrays[c][1]

    def view(flat):
        return np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in out_strides])

    kernel_ = C.conv(target, SMALL, mode, dtype, dtype, nd, divided, not last, "k" if last else "r", last)
    got = run(kernel_, [stored[g][0], stored[w][0], out], scalars, C.conv_groups(SMALL, m, n, groups, last))[2]
    close(decode(view(got), dtype), want.numpy(), dtype)
    if mode == "weight":
        kernel_, grid = C.direct_weight(target, dtype, dtype, nd), m * n * groups
    else:
        kernel_, grid = C.direct(target, mode, dtype, dtype, nd, divided), C.direct_groups(m, n, groups)
    got = run(kernel_, [stored[g][0], stored[w][0], out], scalars, grid)[2]
    close(decode(view(got), dtype), want.numpy(), dtype)
