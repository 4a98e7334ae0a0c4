"""Contractions of the simt class, and nests as GPUs get them: as WGSL on a Vulkan device and as OpenCL, against NumPy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from kernel_runner import run, targets
from philox import kept

from torch_spiral.kernels import ir, nest
from torch_spiral.kernels.kernel import Unsupported
from torch_spiral.kernels.simt import Text
from torch_spiral.kernels.simt import attention as A
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
    """A buffer that holds x with its dimensions from slow to fast in `order`, rows padded by `pad`: (buffer,
    strides)."""
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


def check_gemm(
    target,
    schedule,
    m,
    n,
    k,
    batch=1,
    dtype="f32",
    a="n",
    b="n",
    c="n",
    vec=False,
    splits=0,
    pad=0,
    out=None,
    broadcast=False,
):
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
    kernel = G.gemm(
        target, schedule, dtype, out, a, b, c, vec, vec, vec and c == "n", k % schedule.tile_k == 0, splits > 0
    )
    scalars = [batch, m, n, k, *ta, *tb]
    if splits:
        span = G.k_span(schedule, k, splits)
        sc, tc, offset = np.zeros(batch * splits * m * n, np.float32), [splits * m * n, n, 1], 0
        scalars += [*tc, splits, span, m * n]
    else:
        scalars += tc
    got = run(
        kernel, [sa, sb, sc], scalars, G.groups(schedule, m, n, batch, max(splits, 1)), [4 if vec else 3] * 2 + [offset]
    )[2]
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


@pytest.mark.parametrize("dtype,vec", [("f32", True), ("bf16", False)])
def test_gemm_windows(dtype, vec):
    """B larger than a binding is bound in pieces."""
    if "wgsl" not in TARGETS:
        pytest.skip("no Vulkan device")
    rng = np.random.default_rng(5)
    m, n, k = 5, 32, 48
    A, B = random(rng, (m, k), "f32"), random(rng, (k, n), dtype)
    target = dataclasses.replace(TARGETS["wgsl"], max_binding=B.nbytes // 3)
    kernel = G.gemm(target, SMALL, "f32", "f32", vec_b=vec, b_dtype=dtype, windows=(1, 3))
    scalars = [1, m, n, k, 0, k, 1, 0, n, 1, 0, n, 1]
    got = run(kernel, [A, B, np.zeros((m, n), np.float32)], scalars, G.groups(SMALL, m, n, 1))[2]
    close(got, A.astype(float) @ decode(B, dtype), "f32")


def test_gemm_accuracy(target):
    rng = np.random.default_rng(6)
    m, n, k = 64, 64, 3072
    A, B = random(rng, (m, k), "f32"), random(rng, (k, n), "f32")
    scalars = [1, m, n, k, 0, k, 1, 0, n, 1, 0, n, 1]
    kernel = G.gemm(target, SMALL, "f32", "f32")
    got = run(kernel, [A, B, np.zeros((m, n), np.float32)], scalars, G.groups(SMALL, m, n, 1))[2]
    want = A.astype(float) @ B
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 3e-7


@pytest.mark.parametrize("schedule", G.SCHEDULES, ids=lambda s: s.key)
def test_gemm_schedules(target, schedule):
    if not schedule.fits(target):
        pytest.skip("more than the device has")
    check_gemm(target, schedule, 132, 260, 72, vec=True)


FACTORS = [  # of a schedule, apart and together; tiles are small so that a case has several
    G.Schedule(32, 64, 16, 4, 4, lanes=4, chunk=0, unroll=1, paired=True),
    G.Schedule(32, 32, 16, 4, 4, chunk=0, unroll=1, slices=4),
    G.Schedule(32, 32, 16, 4, 4, lanes=8, chunk=32, unroll=1, paired=True, slices=2, raster=3),
]


@pytest.mark.parametrize("shape,layout", [((132, 100, 72), "nn"), ((37, 45, 41), "tt"), ((4, 8, 4), "nt")])
@pytest.mark.parametrize("schedule", FACTORS, ids=lambda s: s.key)
def test_gemm_schedule_factors(target, schedule, shape, layout):
    """Sizes that fill no tile; bands of rows of tiles that are not full."""
    vec = all(s % 4 == 0 for s in shape)
    check_gemm(target, schedule, *shape, batch=2, a=layout[0], b=layout[1], vec=vec)


def test_gemm_schedule_factors_split(target):
    check_gemm(target, FACTORS[2], 70, 33, 300, splits=3, batch=2)


def test_gemm_slices_that_do_not_fit(target):
    with pytest.raises(Unsupported, match="slices of 128 invocations"):
        G.gemm(target, G.Schedule(64, 32, 8, 4, 4, slices=2), "f32", "f32")


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
    functions = {
        "gelu_tanh": lambda v: f.gelu(v, approximate="tanh"),
        **{a: getattr(f, a, None) for a in ("relu6", "silu", "gelu", "hardswish", "hardsigmoid")},
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
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
    scalars = [1, m, n, k, 0, k, 1, 0, *strides, 0, n, 1] + (
        [splits, -(-k // splits // 4) * 4, m * n] if splits else []
    )
    got = run(kernel, [A, sb, c], scalars, G.skinny_groups(b, n, 1, max(splits, 1)))[2]
    want = A.astype(float) @ decode(B, "bf16")
    if not splits:
        close(got[0], np.maximum(want, 0), "f32")
        return
    reduce = G.split_reduce(target, "f32", "f16", "s", epilogue=G.Epilogue((("add", "f32", "m"),)))
    bias, out = np.arange(m, dtype=np.float32), np.zeros((n, m), np.float16)
    out = run(reduce, [got, bias, out], [1, m, n, splits, 0, m * n, n, 0, 1, m, 0, 1, 0], G.reduce_groups(m, n, 1))[2]
    close(out.T.astype(float), want + bias[:, None], "f16")


@pytest.mark.parametrize("dtype,rows,m,group", [("f32", 1, 1, 32), ("bf16", 4, 3, 64), ("f16", 8, 8, 32)])
def test_skinny_of_4_bits(target, dtype, rows, m, group):
    """Weights are dequantized as they are read; 9 columns fill two workgroups unevenly."""
    rng = np.random.default_rng(3)
    n, k = 9, 640
    A, q = random(rng, (m, k), dtype), rng.integers(0, 16, (n, k))
    packed = (q[:, ::2] * 16 + q[:, 1::2]).astype(np.uint8).view(np.int32)
    scales = np.stack([rng.uniform(0, 0.1, (k // group, n)), rng.standard_normal((k // group, n))], -1)
    scales = scales.astype(np.float32)
    kernel = G.skinny(target, dtype, "f32", rows, "t", True, b_dtype="i32", group=group)
    scalars = [1, m, n, k, 0, k, 1, 0, 1, k, 0, n, 1]
    got = run(kernel, [A, packed, scales, np.zeros((m, n), np.float32)], scalars, G.skinny_groups("t", n, 1))[3]
    factor, zero = (np.repeat(scales[..., i], group, 0).T for i in (0, 1))
    close(got, decode(A, dtype).astype(float) @ ((q - 8) * factor + zero).T, "f32")


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
    return [
        groups,
        m,
        n,
        k,
        *pixel,
        *w[2:],
        channels,
        *mul,
        *add,
        *tap_mul,
        *div,
        *size,
        gs[0],
        gs[1],
        *gs[2:],
        g_group,
        *w_part,
        *c_part,
    ]


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


ATTENTION = {  # batch, heads, kv heads, queries, keys, head, head_v, dtype, mask, causal
    "ragged": (2, 4, 2, 37, 70, 40, 24, "f32", "", False),
    "causal": (1, 2, 2, 45, 45, 16, 16, "f32", "", True),
    "mask": (1, 2, 1, 20, 33, 8, 12, "f32", "f32", False),
    "bool": (2, 2, 2, 9, 40, 32, 32, "f16", "bool", True),
    "wide": (1, 1, 1, 33, 35, 72, 100, "bf16", "", False),
}

ATTENTION_SCHEDULES = {
    "causal": A.Schedule(32, 16, 4, 8, 1, paired=True),  # lanes of a row are a subgroup's
    "mask": A.Schedule(32, 32, 4, 8, 1, resident=True, paired=True),
}


def attention_reference(q, k, v, mask, causal, scale, g):
    """(out, lse, dq, dk, dv, ds) in float64."""
    import torch

    q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    bias = torch.zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.float64)
    if mask is not None:
        bias = (
            torch.where(torch.tensor(mask), 0.0, -np.inf) + bias
            if mask.dtype == bool
            else torch.tensor(mask).double() + bias
        )
    if causal:
        bias = bias.masked_fill(~torch.ones(bias.shape[2:], dtype=bool).tril(), -np.inf)
    bias.requires_grad_()
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale + bias
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    p = torch.softmax(torch.where(empty, 0.0, scores), -1) * ~empty
    out = p @ v.repeat_interleave(group, 1)
    out.backward(torch.tensor(g))
    return [x.detach().numpy() for x in (out, torch.logsumexp(scores, -1), q.grad, k.grad, v.grad, bias.grad)]


@pytest.mark.parametrize("vec", [False, True], ids=["scalar", "vec4"])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(target, case, vec):
    batch, heads, kv_heads, queries, keys, head, head_v, dtype, mask_dtype, causal = ATTENTION[case]
    if vec and case != "ragged":
        pytest.skip("covered by the other cases")
    if target.language == "opencl" and (vec or case != "bool"):
        pytest.skip("PoCL compiles one of these kernels for 15 s")
    rng = np.random.default_rng(4)
    schedule, scale = ATTENTION_SCHEDULES.get(case, A.SCHEDULES[1]), 0.3
    shapes = [
        (batch, heads, queries, head),
        (batch, kv_heads, keys, head),
        (batch, kv_heads, keys, head_v),
        (batch, heads, queries, head_v),
    ]
    values = [random(rng, s, dtype) for s in shapes]
    # (batch, tokens, heads, head) in memory, as a projection leaves it
    stored = [place(x, (0, 2, 1, 3), 4, 0) for x in values]
    mask, mask_strides = None, []
    if mask_dtype == "bool":
        mask = rng.random((batch, 1, queries, keys)) < 0.6
        mask[0, 0, 3] = False  # a row that sees nothing
        mask_strides = [queries * keys, 0, keys, 1]
    elif mask_dtype:
        mask = rng.standard_normal((heads, 1, keys)).astype(np.float32)
        mask[:, :, 5:9] = -np.inf
        mask_strides = [0, keys, 0, 1]
    want = attention_reference(*(decode(x, dtype) for x in values[:3]), mask, causal, scale, decode(values[3], dtype))
    extra = [mask.astype(np.uint8) if mask_dtype == "bool" else mask] if mask_dtype else []
    common = [
        batch,
        heads,
        heads // kv_heads,
        queries,
        keys,
        head,
        head_v,
        *mask_strides,
        *([0] if causal else []),
        scale,
    ]
    (q, qs), (k, ks), (v, vs), (g, gs) = [(x, s[:3]) for x, s in stored]
    sizes = A.head_class(head), A.head_class(head_v)

    def view(flat, shape, strides):
        return decode(
            np.ascontiguousarray(
                np.lib.stride_tricks.as_strided(flat, shape, [i * flat.itemsize for i in (*strides, 1)])
            ),
            dtype,
        )

    kernel = A.forward(target, schedule, dtype, *sizes, mask_dtype, causal, vec)
    lse = np.zeros((batch, heads, queries), np.float32)
    arrays = run(
        kernel,
        [q, k, v, *extra, np.zeros_like(g), lse],
        [*common, *qs, *ks, *vs, *gs],
        A.forward_groups(schedule, batch, heads, queries),
    )
    out, lse = arrays[-2:]
    close(view(out, shapes[3], gs), want[0], dtype)
    finite = np.isfinite(want[1])
    assert np.array_equal(np.isneginf(lse), ~finite)
    close(lse[finite], want[1][finite], "f32")

    splits = 3
    span = -(-keys // splits)
    kernel = A.forward(target, schedule, dtype, *sizes, mask_dtype, causal, vec, split=True)
    parts = [np.zeros((splits, *shapes[3]), np.float32), np.zeros((splits, batch, heads, queries), np.float32)]
    scalars = [*common, *qs, *ks, *vs, *gs, splits, span]
    parts = run(kernel, [q, k, v, *extra, *parts], scalars, A.forward_groups(schedule, batch, heads, queries, splits))[
        -2:
    ]
    scalars = [splits, batch, heads, queries, head_v, *gs]
    merged = run(
        A.merge(target, dtype),
        [*parts, np.zeros_like(g), np.zeros_like(lse)],
        scalars,
        A.merge_groups(batch, heads, queries, head_v),
    )
    close(view(merged[2], shapes[3], gs), want[0], dtype)
    close(merged[3][finite], want[1][finite], "f32")

    delta = run(
        A.delta(target, dtype),
        [g, out, np.zeros_like(lse)],
        [batch, heads, queries, head_v, *gs, *gs],
        -(-lse.size // 64),
    )[2]
    schedule = dataclasses.replace(schedule, resident=False)
    kernel = A.backward_query(target, schedule, dtype, *sizes, mask_dtype, causal, vec, bool(mask_dtype))
    ds = [np.zeros((batch, heads, queries, keys), np.float32)] if mask_dtype else []
    inputs = [q, k, v, g, *extra, lse, delta]
    got = run(
        kernel,
        [*inputs, np.zeros_like(q), *ds],
        [*common, *qs, *ks, *vs, *gs, *qs],
        A.forward_groups(schedule, batch, heads, queries),
    )
    tolerance = dtype if dtype == "f32" else "bf16"
    close(view(got[len(inputs)], shapes[0], qs), want[2], tolerance)
    if mask_dtype:
        close(got[-1], want[5], tolerance)
    kernel = A.backward_key(target, schedule, dtype, *sizes, mask_dtype, causal, vec)
    scalars = [*common, *qs, *ks, *vs, *gs, *ks, *vs]
    got = run(
        kernel,
        [*inputs, np.zeros_like(k), np.zeros_like(v)],
        scalars,
        A.backward_key_groups(schedule, batch, kv_heads, keys),
    )
    close(view(got[-2], shapes[1], ks), want[3], tolerance)
    close(view(got[-1], shapes[2], vs), want[4], tolerance)


def test_dropout_mask(target):
    """An invocation's bits are those of 4 queries and 4 keys."""
    heads, queries, keys, p, key = 3, 8, 64, 0.3, (0x89ABCDEF, 0xFEDCBA98)
    t = Text(target, "dropout_mask", 64)
    t.buffer("out", "u32", "w")
    A._declare_dropout(t)
    t.let("bh", f"{t.group}")
    A._kept(t, 0, "lid / 16u * 4u", "lid % 16u * 4u")
    t.base("out_base", "out")
    t.open("lid < 32u")
    t.store("out", "out_base", "bh * 32u + lid", "kept0")
    t.end()
    words = np.zeros((heads, 2, 16), np.uint32)
    scalars = [math.ceil((1 - p) * 2**24), 1 / (1 - p)]
    bits = run(t.finish(), [words, np.array(key, np.uint32)], scalars, heads)[0].reshape(heads, 2, 16)
    got = np.stack([bits >> i & 1 for i in range(16)], -1).reshape(heads, 2, 16, 4, 4)  # .., key, query
    got = got.transpose(0, 1, 4, 2, 3).reshape(1, heads, queries, keys)
    assert np.array_equal(got == 1, kept(key, p, (1, heads, queries, keys)).numpy())


# ---- nests, as GPUs get them: several elements an invocation, rows in registers ---------------------------------------


@pytest.fixture(scope="module")
def gpu(target):
    return dataclasses.replace(target, compute_units=132)


@pytest.mark.parametrize("n", [1, 255, 1024, 1025, 5000])
def test_pointwise_on_gpus(gpu, n):
    """Whole groups of elements, a last one that is cut, and one with fewer than a workgroup's."""
    operands = [nest.Operand("o", "f32", ("1",))], [nest.Operand("x", "f32", ("1",)), nest.Operand("y", "f32", ("s",))]
    built = nest.pointwise(gpu, "f", *operands, lambda x, y: x * 2.0 + y, 1)
    assert built.unit == nest.SIMT_ELEMENTS and built.kernel.trusted
    x, y = np.random.default_rng(0).standard_normal((2, 2 * n)).astype(np.float32)
    out = np.full(n + 9, 7, np.float32)
    got = run(built.kernel, [out, x[:n], y], built.scalars([n], [(1,), (1,), (2,)]), built.groups([n]))[0]
    np.testing.assert_allclose(got[:n], x[:n] * 2 + y[::2], rtol=1e-6)
    assert (got[n:] == 7).all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i8"])
def test_four_elements_in_one_access(gpu, dtype):
    """Aligned and misaligned operands, a last group that is cut, and neighbours of the result that stay as they are."""
    operands = [nest.Operand("o", dtype)], [nest.Operand("x", dtype), nest.Operand("y", "f32")]
    built = nest.pointwise(gpu, "f", *operands, lambda x, y: ir.cast(x, "f32") * 2.0 + y, 1)
    assert built.unit == 4 and ("vec4" if gpu.language == "wgsl" else "float4") in built.kernel.source
    numpy = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "i8": np.int8}[dtype]
    values = np.random.default_rng(0).integers(-9, 9, (2, 5000))

    def stored(v):
        return (v.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else v.astype(numpy)

    for n, offsets in ((1, (0, 0, 0)), (1030, (0, 0, 0)), (1031, (8, 4, 12)), (1030, (1, 2, 3)), (7, (4, 4, 1))):
        x, y = stored(values[0]), values[1].astype(np.float32)
        out = np.full(5000, 7, numpy)
        got = run(built.kernel, [out, x, y], built.scalars([n]), built.groups([n]), offsets=list(offsets))[0]
        a, b, c = offsets
        want = out.copy()
        want[a : a + n] = stored(values[0, b : b + n] * 2 + values[1, c : c + n])
        np.testing.assert_array_equal(got, want)


def test_exp_on_gpus(gpu):
    """By the exp2 of NVIDIA's hardware: overflow, underflow, infinities, NaN."""
    nvidia = dataclasses.replace(gpu, vendor="NVIDIA")
    built = nest.pointwise(nvidia, "exp", [nest.Operand("o", "f32")], [nest.Operand("x", "f32")], ir.exp, 1)
    assert ("native_exp" in built.kernel.source) == (gpu.language == "wgsl")
    x = np.concatenate([np.linspace(-86, 88.7, 4001), [0, 89, 1e30, np.inf, -104, -1e30, -np.inf, np.nan]])
    x = x.astype(np.float32)
    got = run(built.kernel, [np.zeros_like(x), x], built.scalars([x.size]), built.groups([x.size]))[0]
    with np.errstate(over="ignore"):
        want = np.exp(x.astype(np.float64)).astype(np.float32)
    # lavapipe's fma rounds the product
    np.testing.assert_allclose(got, want, rtol=5e-6 if gpu.language == "wgsl" else 5e-7, atol=1e-38)


def test_four_elements_of_rows(gpu):
    """Rows of a slice and a row that is added to all: by fours where sizes and strides divide by four."""
    operands = (
        [nest.Operand("o", "f32", ("1", "s"))],
        [
            nest.Operand("x", "f32", ("1", "s")),
            nest.Operand("w", "f32", ("1", "0")),
            nest.Operand("c", "f32", ("0", "s")),
        ],
    )
    built = nest.pointwise(
        gpu, "rows", *operands, lambda at, x, w, c: x * w + c + ir.cast(at.coordinates[0], "f32"), 2, context=True
    )
    rng = np.random.default_rng(0)
    for columns, rows, stride, first in ((64, 5, 72, 0), (64, 5, 70, 0), (66, 3, 68, 4), (8, 3, 8, 1)):
        x = rng.standard_normal(first + rows * stride).astype(np.float32)
        w, c = rng.standard_normal(columns).astype(np.float32), rng.standard_normal(rows * 2).astype(np.float32)
        strides = [(1, columns), (1, stride), (1, 0), (0, 2)]
        out = np.zeros((rows, columns), np.float32)
        got = run(
            built.kernel, [out, x, w, c], built.scalars([columns, rows], strides), built.groups([columns, rows]),
            offsets=[0, first, 0, 0],
        )[0]  # fmt: skip
        want = x[first:].reshape(rows, stride)[:, :columns] * w + c[::2, None] + np.arange(columns, dtype=np.float32)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [0, 1, 300, 1023, 4096, 4501])
def test_rows_on_gpus(gpu, d):
    """Rows that fit into registers and rows that don't, in the place of their input."""

    def softmax(r, x, w):
        e = ir.exp(x - r.reduce(nest.MAX(), x))
        return e / r.sum(e) * w

    ins = [nest.Operand("x", "f32", ("1", "s")), nest.Operand("w", "f32", ("1", "0"))]
    built = nest.rows(gpu, "weighted_softmax", [nest.Operand("o", "f32", ("1", "s"))], ins, softmax)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, d)).astype(np.float32), rng.standard_normal(d).astype(np.float32)
    scalars = built.scalars([d, 3], [(1, d), (1, d), (1, 0)])
    got = run(built.kernel, [np.full((3, d), 9, np.float32), x, w], scalars, built.groups([d, 3]))[0]
    if d:
        e = np.exp(x - x.max(1, keepdims=True))
        np.testing.assert_allclose(got, e / e.sum(1, keepdims=True) * w, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("d", [1, 7, 333, 5001])
def test_rows_that_begin_anywhere(gpu, d):
    """Groups of four after a row's first elements, in registers and not; infinities and NaN."""

    def log_softmax(r, x):
        largest, total = r.reduce(nest.LOGSUMEXP(), x, ir.const(1.0, "f32"))
        return x - largest - ir.log(total)

    layout = ("1", "s")
    built = nest.rows(
        gpu, "log_softmax", [nest.Operand("o", "f32", layout)], [nest.Operand("x", "f32", layout)], log_softmax
    )
    rows, rng = 5, np.random.default_rng(0)
    x = rng.standard_normal(rows * d + 8).astype(np.float32)
    for first in (1, 2):  # the result's rows begin as the operand's do, and not
        view = x[first : first + rows * d].reshape(rows, d)
        view[3, d // 2], view[4, d - 1] = -np.inf, np.nan
        out = np.full(rows * d + 8, 7, np.float32)
        scalars = built.scalars([d, rows], [(1, d), (1, d)])
        got = run(built.kernel, [out, x], scalars, built.groups([d, rows]), offsets=[2, first])[0]
        wide = view.astype(np.float64)
        with np.errstate(all="ignore"):
            wide -= wide.max(1, keepdims=True)
            want = wide - np.log(np.exp(wide).sum(1, keepdims=True))
        if d > 1:
            np.testing.assert_allclose(got[2 : 2 + rows * d].reshape(rows, d), want, rtol=2e-5, atol=1e-5)
        assert (np.delete(got, np.s_[2 : 2 + rows * d]) == 7).all()


@pytest.mark.full  # PoCL compiles it for ten seconds
@pytest.mark.parametrize("d", [2, 1030])
def test_narrow_rows_on_gpus(gpu, d):
    """float16 rows, and the place of the largest element."""
    layout = ("1", "s")
    outs = [nest.Operand("o", "f16", layout), nest.Operand("at", "i32", ("0", "1"))]
    built = nest.rows(
        gpu, "shifted", outs, [nest.Operand("x", "f16", layout)],
        lambda r, x: (x * 2.0 - r.sum(x), r.reduce(nest.ARGMAX(), x, r.index)[1]),
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((3, d)).astype(np.float16)
    arrays = [np.zeros((3, d), np.float16), np.zeros(3, np.int32), x]
    got, at, _ = run(built.kernel, arrays, built.scalars([d, 3], [(1, d), (0, 1), (1, d)]), built.groups([d, 3]))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(got, wide * 2 - wide.sum(1, keepdims=True), rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(at, x.argmax(1))


@pytest.mark.parametrize("m", [1, 3, 131, 700])
def test_columns_on_gpus(gpu, m):
    built = nest.rows(
        gpu,
        "sum",
        [nest.Operand("o", "f32", ("0", "1"))],
        [nest.Operand("x", "f32", ("s", "1"))],
        lambda r, x: r.sum(x),
    )
    assert built.schedule == "invocation"
    x = np.random.default_rng(0).standard_normal((m, 77)).astype(np.float32)
    got = run(
        built.kernel, [np.zeros(77, np.float32), x], built.scalars([m, 77], [(0, 1), (77, 1)]), built.groups([m, 77])
    )[0]
    np.testing.assert_allclose(got, x.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("wgsl" not in TARGETS, reason="no Vulkan here")
@pytest.mark.parametrize("template", ["skinny", "conv", "attention"])
def test_without_subgroups(template):
    """What lanes of a subgroup exchange goes through shared memory where the device has none, in kernels of another name. (Attention:
    test_attention's tiles need more lanes than a subgroup has here; those of tests/test_attention.py do not.)"""
    bare, names = dataclasses.replace(TARGETS["wgsl"], subgroup=0), []
    for target in (bare, TARGETS["wgsl"]):
        if template == "skinny":
            names.append(G.skinny(target, "f32", "f32", 4, "t", True).name)
        elif template == "conv":
            names.append(C.direct_weight(target, "f32", "f32", 2).name)
        else:
            names.append(A.forward(target, A.Schedule(32, 16, 4, 16, 1), "f32", 32, 32, "bool", False, True).name)
    assert "_subgroups" not in names[0]
    assert ("_subgroups" in names[1]) == (TARGETS["wgsl"].subgroup >= 4)
    if template == "skinny":
        test_skinny(bare, "t", True, 0)
    elif template == "conv":
        test_conv(bare, "weight", CONVOLUTIONS[0], False)
