"""Contractions of the vector class (OpenCL on CPU devices) against float64 PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_runner import run, targets

from torch_spiral.kernels.vector import attention as A
from torch_spiral.kernels.vector import conv as C
from torch_spiral.kernels.vector import gemm as G
from torch_spiral.kernels.vector import winograd as W

TARGET = targets().get("opencl-vector")
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64,
         "i8": torch.int8, "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64, "bool": torch.bool}  # fmt: skip
EPS = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3, "f64": 1e-15, "i8": 0, "u8": 0, "i32": 0, "i64": 0}
GUARD = 64  # elements behind every result, which must stay untouched

pytestmark = pytest.mark.skipif(TARGET is None, reason="no OpenCL here")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def flat(t: torch.Tensor) -> torch.Tensor:
    """The storage of t from its first element to its last."""
    n = 1 + sum((s - 1) * st for s, st in zip(t.shape, t.stride(), strict=False)) if t.numel() else 0
    return t.as_strided((n,), (1,), t.storage_offset())


def launch(kernel, tensors, scalars, groups):
    """Runs a kernel on tensors; those of type Out receive their new contents."""
    bytes_ = [flat(t).clone().view(torch.uint8).numpy() for t in tensors]
    results = run(kernel, bytes_, scalars, groups)
    for t, r in zip(tensors, results, strict=False):
        if hasattr(t, "is_result"):
            flat(t).view(torch.uint8).copy_(torch.from_numpy(r))


def result(n: int, dtype: str = "f32") -> torch.Tensor:
    t = torch.full((n + GUARD,), 77, dtype=TORCH[dtype])
    t.is_result = True
    return t


def values(t: torch.Tensor, shape, stride=None) -> torch.Tensor:
    assert (t[-GUARD:] == 77).all(), "written beyond the end"
    return t[: math.prod(shape)].reshape(shape) if stride is None else t.as_strided(shape, stride)


def make(shape, dtype: str) -> torch.Tensor:
    torch.manual_seed(hash(tuple(shape)) % 1000)
    if dtype[0] in "fb" and dtype != "bool":
        return torch.randn(shape).to(TORCH[dtype])
    return torch.randint(0 if dtype[0] == "u" else -5, 6, shape).to(TORCH[dtype])


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """[b, r, c] with unit stride along c ("n"), r ("t") or neither ("g")."""
    if layout == "n":
        return t.contiguous()
    if layout == "t":
        return t.mT.contiguous().mT
    wide = torch.zeros(*t.shape[:2], 2 * t.shape[2], dtype=t.dtype)
    wide[:, :, ::2] = t
    return wide[:, :, ::2]


def close(got: torch.Tensor, want: torch.Tensor, eps: float) -> None:
    if eps == 0:
        assert torch.equal(got, want.to(got.dtype))
    else:
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
        assert error <= eps, f"relative error {error:.1e}"


# -- products ---------------------------------------------------------------------------------------------------------

STEPS = {"alpha": 0.5, "beta": 2.0}
BIAS_GELU_RESIDUAL = ("alpha", ("add", "f32", "n"), "gelu", ("add", "f32", "mn"))
EPSILON = 1e-3


def batch_norm(along: str) -> tuple:
    """(x - mean) / sqrt(variance + EPSILON) * 0.5 * weight + bias of every row ("m") or column ("n")."""
    rsqrt, half = G.rsqrt_step(EPSILON), G.constant_step("mul", 0.5)
    return (("sub", "f32", along), (rsqrt, "f32", along), half, ("mul", "f32", along), ("add", "f32", along))


CASES = [
    # dtype, layouts of A, B and C, (batch, M, N, K), epilogue
    ("f32", "n", "n", "n", (1, 100, 70, 300), ()),
    ("f32", "t", "t", "n", (2, 13, 70, 33), BIAS_GELU_RESIDUAL),
    ("f32", "n", "t", "n", (1, 17, 129, 600), ("tanh", ("mul", "f32", "m"))),
    ("f16", "n", "t", "n", (1, 50, 40, 77), (("add", "f16", "n"), "silu")),
    ("bf16", "n", "n", "g", (3, 20, 40, 31), (("beta", "bf16", "s"),)),
    ("f64", "n", "t", "n", (1, 37, 45, 200), (("beta", "f64", "m"), "alpha")),
    ("i32", "g", "g", "n", (1, 20, 19, 18), ()),
    ("i64", "n", "n", "n", (2, 9, 10, 11), ()),
    ("i8", "t", "n", "n", (1, 9, 33, 11), ()),
    ("u8", "n", "t", "n", (1, 3, 5, 70), ()),
    ("f32", "n", "n", "n", (1, 5, 6, 0), (("add", "f32", "n"), "relu")),
    ("f32", "n", "n", "n", (2, 270, 70, 33), (*batch_norm("m"), ("add", "f32", "mn"), "relu")),
    ("f32", "n", "t", "g", (1, 13, 600, 40), (*batch_norm("n"), ("add", "f32", "s"), "silu")),
]


class Product:
    """One case: operands, epilogue buffers and scalars, and the float64 (or int64) result."""

    def __init__(self, dtype, al, bl, cl, shape, steps):
        self.dtype, self.al, self.bl, self.cl = dtype, al, bl, cl
        bt, m, n, k = self.shape = shape
        self.a, self.b = laid_out(make((bt, m, k), dtype), al), laid_out(make((bt, k, n), dtype), bl)
        exact = torch.float64 if dtype[0] in "fb" else torch.int64
        ref = self.a.to(exact) @ self.b.to(exact)
        self.ep, self.operands, self.extra = G.Epilogue(steps), [], []
        factors = []
        for step in steps:
            if step == "alpha":
                ref, factors = ref * STEPS["alpha"], [*factors, STEPS["alpha"]]
            elif isinstance(step, str) and G.is_constant(step):
                ref = ref * G.number(step)
            elif isinstance(step, str):
                ref = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}[step](ref)
            else:
                kind, dt, broadcast = step
                t = make({"n": (1, 1, n), "m": (1, m, 1), "mn": (bt, m, n), "s": (bt, m, n)}[broadcast], dt)
                if kind.startswith("rsqrt"):
                    t = t.abs()
                e = t.expand(bt, m, n)
                self.operands.append(t)
                self.extra += [
                    e.stride(0),
                    *([e.stride(1)] if broadcast != "n" else []),
                    *([e.stride(2)] if broadcast == "s" else []),
                ]
                if kind == "beta":
                    factors.append(STEPS["beta"])
                v = t.double()
                if kind.startswith("rsqrt"):
                    ref = ref / (v + EPSILON).sqrt()
                else:
                    ref = {"mul": ref * v, "sub": ref - v, "add": ref + v, "beta": ref + STEPS["beta"] * v}[kind]
        self.extra += factors
        self.ref = ref
        self.cn = 1 if cl == "n" else 2
        self.c_strides = [m * n * self.cn, n * self.cn, self.cn]
        self.c = result(bt * m * n * self.cn, dtype)

    def check(self, rows: int | None = None):
        bt, m, n, _ = self.shape
        got = values(self.c, (bt, m, n), self.c_strides)
        close(got[:, :rows], self.ref[:, :rows], EPS[self.dtype])
        if self.cn == 2:
            assert (self.c[1::2] == 77).all(), "written between the elements"

    def pack(self, s):
        bt, _m, n, k = self.shape
        p = result(bt * cdiv(n, s.nr) * s.nr * k, G.compute_dtype(self.dtype))
        b = self.b
        launch(
            G.pack_b(TARGET, self.dtype, self.bl, s),
            [b, p],
            [b.stride(0), 0, b.stride(1), b.stride(2), 1, k, n],
            (2, 2, bt),
        )
        assert (p[-GUARD:] == 77).all()
        return p, cdiv(n, s.nr) * s.nr * k


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("width", [8, 16])
def test_gemm_packed(case, width):
    p = Product(*case)
    bt, m, n, k = p.shape
    compute = G.compute_dtype(p.dtype)
    s = G.schedule(compute, width)
    packed, items = p.pack(s)
    kernel = G.gemm(TARGET, p.dtype, compute, p.dtype, p.al, "packed", p.cl, p.ep, s=s)
    launch(
        kernel, [p.a, packed, p.c, *p.operands], [*p.a.stride(), items, 0, *p.c_strides, *p.extra, m, n, k], (2, 2, bt)
    )
    p.check()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gemm_split(case):
    p = Product(*case)
    bt, m, n, k = p.shape
    compute = G.compute_dtype(p.dtype)
    s = G.schedule(compute)
    packed, items = p.pack(s)
    parts = result(3 * bt * m * n, compute)
    launch(G.gemm(TARGET, p.dtype, compute, p.dtype, p.al, split=True), [p.a, packed, parts],
           [*p.a.stride(), items, 0, m * n, n, 1, m, n, k], (3, 2, bt))  # fmt: skip
    values(parts, (3, bt, m, n))
    launch(
        G.reduce_splits(TARGET, p.dtype, p.cl, p.ep),
        [parts, p.c, *p.operands],
        [*p.c_strides, *p.extra, m, n, 3],
        (2, 2, bt),
    )
    p.check()


@pytest.mark.parametrize("case", [c for c in CASES if c[2] == "n"], ids=str)
def test_gemm_direct(case):
    p = Product(*case)
    bt, m, n, k = p.shape
    launch(G.gemm(TARGET, p.dtype, p.dtype, p.dtype, p.al, "n", p.cl, p.ep), [p.a, p.b, p.c, *p.operands],
           [*p.a.stride(), p.b.stride(0), p.b.stride(1), *p.c_strides, *p.extra, m, n, k], (1, 2, bt))  # fmt: skip
    p.check()


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("case", [c for c in CASES if (c[1], c[2]) == ("n", "t")], ids=str)
def test_gemm_dot(case, rows):
    p = Product(*case)
    bt, m, n, k = p.shape
    launch(G.gemm_dot(TARGET, p.dtype, p.dtype, p.dtype, rows, p.cl, p.ep), [p.a, p.b, p.c, *p.operands],
           [*p.a.stride()[:2], p.b.stride(0), p.b.stride(2), *p.c_strides, *p.extra, m, n, k], (2, 3, bt))  # fmt: skip
    p.check()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype, n, k", [("f32", 70, 300), ("f16", 2500, 9), ("i64", 10, 11), ("f32", 3, 0)])
def test_gemv(dtype, n, k, split):
    p = Product(dtype, "n", "n", "n", (2, 1, n, k), ())
    a, b = p.a, p.b
    scalars = [a.stride(0), a.stride(2), b.stride(0), b.stride(1)]
    if split:
        parts = result(2 * 3 * n, G.compute_dtype(dtype))
        launch(G.gemv(TARGET, dtype, dtype, dtype, split=True), [a, b, parts], [*scalars, n, 1, n, k], (3, 2, 2))
        launch(G.reduce_splits(TARGET, dtype), [parts, p.c], [*p.c_strides, 1, n, 3], (1, 2, 2))
    else:
        launch(G.gemv(TARGET, dtype, dtype, dtype), [a, b, p.c], [*scalars, n, 1, n, k], (1, 3, 2))
    p.check()


@pytest.mark.parametrize("k", [1024, 3072])
def test_gemm_accuracy(k):
    """Normwise error of the product of normal random matrices."""
    bound = max(2.3e-7, 3e-7 * math.sqrt(k / 3072))
    p = Product("f32", "n", "n", "n", (1, 60, 64, k), ())
    packed, items = p.pack(G.schedule())
    launch(
        G.gemm(TARGET, "f32", "f32", "f32"),
        [p.a, packed, p.c],
        [*p.a.stride(), items, 0, *p.c_strides, 60, 64, k],
        (1, 1, 1),
    )
    close(values(p.c, (1, 60, 64)), p.ref, bound)
    row = p.a[:, :1].contiguous()
    launch(G.gemv(TARGET, "f32", "f32", "f32"), [row, p.b, p.c], [k, 1, *p.b.stride()[:2], 64, 1, 64, k], (1, 1, 1))
    close(values(p.c, (1, 1, 64)), p.ref[:, :1], 1.5 * bound)  # few elements: the norm scatters
    t = Product("f32", "n", "t", "n", (1, 60, 64, k), ())
    for rows in (0, 1):
        launch(G.gemm_dot(TARGET, "f32", "f32", "f32", rows), [t.a, t.b, t.c],
               [*t.a.stride()[:2], t.b.stride(0), t.b.stride(2), *t.c_strides, 60, 64, k], (1, 1, 1))  # fmt: skip
        close(values(t.c, (1, 60, 64)), t.ref, bound)


def test_beta_of_zero_ignores_nan():
    p = Product("f32", "n", "n", "n", (1, 7, 20, 9), (("beta", "f32", "mn"),))
    p.operands[0][:] = math.nan
    p.extra[-1] = 0.0
    launch(G.gemm(TARGET, "f32", "f32", "f32", "n", "n", "n", p.ep), [p.a, p.b, p.c, *p.operands],
           [*p.a.stride(), *p.b.stride()[:2], *p.c_strides, *p.extra, 7, 20, 9], (1, 1, 1))  # fmt: skip
    close(values(p.c, (1, 7, 20)), p.a.double() @ p.b.double(), EPS["f32"])


@pytest.mark.parametrize(
    "name", ["relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid"]
)
def test_activations(name):
    """Over the whole range and at NaN and infinity: C = f(a * 1), K = 1."""
    x = torch.cat(
        [torch.linspace(-30, 30, 4000), torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-8, -1e-8, 200.0, -200.0])]
    )
    n = x.numel()
    c = result(n)
    launch(G.gemm(TARGET, "f32", "f32", "f32", "n", "n", "n", G.Epilogue((name,))), [torch.ones(1), x, c],
           [0, 1, 1, 0, n, 0, n, 1, 1, n, 1], (1, 2, 1))  # fmt: skip
    function = {"gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    want = function.get(name, getattr(F, name, None))(x.double()).float()
    torch.testing.assert_close(values(c, (n,)), want, rtol=3e-6, atol=3e-7, equal_nan=True)


# -- attention --------------------------------------------------------------------------------------------------------

ATTENTION = [
    # B, H, Hk, Tq, Tk, D, Dv, causal, mask, dtype
    (1, 2, 2, 100, 100, 64, 64, True, None, "f32"),
    (2, 4, 2, 70, 131, 24, 40, False, None, "f32"),
    (1, 2, 1, 50, 65, 8, 8, False, "f32", "f32"),
    (2, 2, 2, 33, 70, 256, 72, False, "bool", "f32"),
    (1, 1, 1, 1, 5, 16, 16, False, None, "f16"),
    (1, 3, 3, 65, 64, 80, 80, True, None, "bf16"),
    (1, 2, 2, 7, 300, 60, 33, True, None, "f32"),
]


class Attention:
    def __init__(self, b, h, hk, tq, tk, d, dv, causal, mask, dtype):
        torch.manual_seed(tq)
        self.dims = b, h, hk, tq, tk, d, dv
        self.causal, self.mask_dtype, self.dtype = causal, mask, dtype
        self.q, self.k, self.v, self.g = (
            torch.randn(s).to(TORCH[dtype]) for s in ((b, h, tq, d), (b, hk, tk, d), (b, hk, tk, dv), (b, h, tq, dv))
        )
        self.mask = None
        if mask == "f32":
            self.mask = torch.randn(b, 1, 1, tk).expand(b, h, tq, tk)
        elif mask == "bool":
            self.mask = (torch.rand(1, 1, tq, tk) > 0.5).index_fill(2, torch.tensor(3), False).expand(b, h, tq, tk)
        self.nr = G.block_schedule().nr
        self.tail = [h, h // hk, tq, tk, d, dv, *([0] if causal else []), d**-0.5]
        self.masks = [self.mask] if mask else []
        self.mask_strides = list(self.mask.stride()) if mask else []

    def forward(self):
        b, h, _hk, tq, _tk, _d, dv = self.dims
        o, lse = result(b * h * tq * dv, self.dtype), result(b * h * tq)
        kernel = A.attention_forward(TARGET, self.dtype, self.causal, self.mask_dtype)
        launch(kernel, [self.q, self.columns(self.k), self.rows(self.v), o, lse, *self.masks],
               [*self.q.stride()[:3], h * tq * dv, tq * dv, dv, *self.mask_strides, *self.tail], (cdiv(tq, 48), b * h, 1))  # fmt: skip
        return values(o, (b, h, tq, dv)), values(lse, (b, h, tq))

    def columns(self, x):
        b, h, t, d = x.shape
        p = result(b * h * cdiv(t, self.nr) * self.nr * d)
        launch(
            A.pack_columns(TARGET, self.dtype),
            [x, p],
            [x.stride(0), x.stride(1), 1, x.stride(2), h, d, t],
            (2, 1, b * h),
        )
        values(p, (0,))
        return p

    def rows(self, x):
        b, h, t, d = x.shape
        p = result(b * h * t * cdiv(d, self.nr) * self.nr)
        launch(
            A.pack_rows(TARGET, self.dtype), [x, p], [x.stride(0), x.stride(1), x.stride(2), 1, h, t, d], (1, 2, b * h)
        )
        values(p, (0,))
        return p

    def reference(self, q, k, v):
        h, hk, d = self.dims[1], self.dims[2], self.dims[5]
        k, v = k.repeat_interleave(h // hk, 1), v.repeat_interleave(h // hk, 1)
        s = q @ k.mT * d**-0.5
        keep = torch.ones(s.shape, dtype=torch.bool)
        if self.mask_dtype == "bool":
            keep = self.mask
        elif self.mask is not None:
            s = s + self.mask
        if self.causal:
            keep = keep.tril()
        p = torch.softmax(s.masked_fill(~keep, -1e300), -1) * keep
        return p @ v, torch.logsumexp(s.masked_fill(~keep, -math.inf), -1)

    def check(self, o, lse):
        want, want_lse = self.reference(self.q.double(), self.k.double(), self.v.double())
        close(o, want, EPS[self.dtype])
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=2e-6)  # minus infinity where fully masked


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_forward(case):
    a = Attention(*case)
    a.check(*a.forward())


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_decode(case):
    a = Attention(*case)
    b, h, _hk, tq, _tk, _d, dv = a.dims
    o, lse = result(b * h * tq * dv, a.dtype), result(b * h * tq)
    launch(A.attention_decode(TARGET, a.dtype, a.causal, a.mask_dtype), [a.q, a.k, a.v, o, lse, *a.masks],
           [*a.q.stride()[:3], *a.k.stride()[:3], *a.v.stride()[:3], h * tq * dv, tq * dv, dv, *a.mask_strides, *a.tail], (tq, b * h, 1))  # fmt: skip
    a.check(values(o, (b, h, tq, dv)), values(lse, (b, h, tq)))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_backward(case, splits):
    a = Attention(*case)
    b, h, hk, tq, tk, d, dv = a.dims
    o, lse = a.forward()
    delta = result(b * h * 3 * cdiv(tq, 64) * 64)
    launch(
        A.attention_delta(TARGET, a.dtype, mask=a.mask_dtype),
        [o, a.g, lse, delta],
        [*o.stride()[:3], *a.g.stride()[:3], h, tq, dv],
        (cdiv(tq, 64), b * h, 1),
    )
    dq, dk, dv_ = result(a.q.numel(), a.dtype), result(a.k.numel(), a.dtype), result(a.v.numel(), a.dtype)
    sums = [result(splits * b * hk * A.sums(tk, x)) for x in (d, dv)]
    launch(A.attention_backward(TARGET, a.dtype, a.causal, a.mask_dtype),
           [a.q, a.g, a.columns(a.k), a.columns(a.v), delta, a.rows(a.k), dq, *sums, *a.masks],
           [*a.q.stride()[:3], *a.g.stride()[:3], *a.q.stride()[:3], *a.mask_strides, *a.tail], (splits, b * hk, 1))  # fmt: skip
    launch(A.attention_backward_sum(TARGET, a.dtype), [*sums, dk, dv_],
           [*a.k.stride()[:3], *a.v.stride()[:3], splits, hk, tk, d, dv, d**-0.5], (cdiv(tk, 64), b * hk, 1))  # fmt: skip
    leaves = [t.double().requires_grad_() for t in (a.q, a.k, a.v)]
    a.reference(*leaves)[0].backward(a.g.double())
    for got, leaf in zip((dq, dk, dv_), leaves, strict=False):
        close(values(got, leaf.shape), leaf.grad, 2 * EPS[a.dtype])


# -- convolution ------------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    # input, weight, arguments, bias
    ((2, 3, 9, 11), (7, 3, 3, 3), {"padding": 1}, True),
    ((1, 8, 20, 33), (14, 4, 3, 5), {"padding": (1, 2), "stride": 2, "groups": 2, "dilation": (1, 2)}, True),
    ((2, 5, 40), (6, 5, 7), {"padding": 3, "stride": 3}, False),
    ((1, 4, 5, 6, 17), (8, 2, 2, 3, 3), {"padding": 1, "groups": 2}, True),
    ((3, 33, 7, 7), (19, 33, 3, 3), {"padding": 1}, True),
    ((1, 3, 33, 40), (16, 3, 7, 7), {"padding": 3, "stride": 2}, False),
    ((1, 120, 6, 5), (100, 120, 1, 1), {"stride": 2}, False),
]


def three(v, fill: int, n: int) -> list[int]:
    return [fill] * (3 - n) + list((v,) * n if isinstance(v, int) else v)


class Convolution:
    """Sizes of one case as the kernels want them: always three spatial dimensions."""

    def __init__(self, x_shape, w_shape, args, bias, dtype="f32"):
        self.x, self.w = make(x_shape, dtype), make(w_shape, dtype)
        self.bias = make((w_shape[0],), "f32") if bias else None
        self.args, self.dtype = args, dtype
        self.nd = n = len(x_shape) - 2
        self.groups = args.get("groups", 1)
        self.stride, self.padding, self.dilation = (
            three(args.get(k, f), f, n) for k, f in (("stride", 1), ("padding", 0), ("dilation", 1))
        )
        self.size, self.taps = three(x_shape[2:], 1, n), three(w_shape[2:], 1, n)
        self.padded = [i + 2 * p for i, p in zip(self.size, self.padding, strict=False)]
        self.out = [
            (i - d * (k - 1) - 1) // s + 1
            for i, d, k, s in zip(self.padded, self.dilation, self.taps, self.stride, strict=False)
        ]
        self.n, self.c, self.co = x_shape[0], x_shape[1], w_shape[0]
        self.m, self.cg, self.kv = self.co // self.groups, self.c // self.groups, math.prod(self.taps)
        self.k, self.pixels = self.cg * self.kv, math.prod(self.out)
        self.geometry = [*self.out, *self.taps, *self.padded, *self.stride, *self.dilation, self.k, self.cg]
        self.s = C.conv_schedule()

    def function(self, x, w, b=None):
        return (F.conv1d, F.conv2d, F.conv3d)[self.nd - 1](x, w, b, **self.args)

    def strides(self, t):
        return [*t.stride()[:2], *[0] * (3 - self.nd), *t.stride()[2:]]

    def pad(self, x):
        X = result(self.n * self.c * math.prod(self.padded) + C.SLACK)
        launch(
            C.pad(TARGET, self.dtype),
            [x, X],
            [*self.strides(x), self.c, *self.size, *self.padded, 1, 1, 1, *self.padding],
            (2, self.n, 1),
        )
        values(X, (0,))
        return X


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv(case, dtype, channels_last):
    c = Convolution(*case, dtype)
    x = c.x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else c.x
    packed = result(c.groups * c.k * cdiv(c.m, c.s.mr) * c.s.mr)
    launch(
        C.pack_weights(TARGET, dtype),
        [c.w, packed],
        [0, c.m * c.k, c.k, c.kv, c.taps[1] * c.taps[2], c.taps[2], 1, c.m, c.k, *c.taps],
        (2, 2, c.groups),
    )
    values(packed, (0,))
    out = result(c.n * c.co * c.pixels, dtype)
    o, px = c.out, c.pixels
    strides = (
        [c.co * px, 1, o[1] * o[2] * c.co, o[2] * c.co, c.co]
        if channels_last
        else [c.co * px, px, o[1] * o[2], o[2], 1]
    )
    ep = G.Epilogue((("add", "f32", "m"), "relu") if c.bias is not None else ())
    launch(C.conv(TARGET, dtype, not channels_last, ep), [c.pad(x), packed, out, *([c.bias] if c.bias is not None else [])],
           [c.c * math.prod(c.padded), *strides, *([0, 1] if c.bias is not None else []), c.m, c.groups, *c.geometry], (2, 2, c.n * c.groups))  # fmt: skip
    want = c.function(c.x.double(), c.w.double(), None if c.bias is None else c.bias.double())
    got = (
        values(out, (c.n, *o[3 - c.nd :], c.co)).movedim(-1, 1)
        if channels_last
        else values(out, (c.n, c.co, *o[3 - c.nd :]))
    )
    close(got, want.relu() if c.bias is not None else want, EPS[dtype])


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv_backward(case):
    """Gradients of weight and input; the latter is a convolution with flipped weights over zero-inserted gradients."""
    c = Convolution(*case)
    x, w = c.x.double().requires_grad_(), c.w.double().requires_grad_()
    y = c.function(x, w)
    g = make(y.shape, "f32")
    y.backward(g.double())
    dw = result(c.w.numel())
    launch(C.conv_backward_weight(TARGET, "f32"), [c.pad(c.x), g, dw],
           [c.c * math.prod(c.padded), c.co * c.pixels, c.pixels, c.m, c.groups, c.n, *c.geometry], (2, 2, c.groups))  # fmt: skip
    close(values(dw, w.shape), w.grad, EPS["f32"])

    padded = [i + d * (k - 1) for i, d, k in zip(c.size, c.dilation, c.taps, strict=False)]
    offset = [d * (k - 1) - p for d, k, p in zip(c.dilation, c.taps, c.padding, strict=False)]
    X, packed, dx = (
        result(c.n * c.co * math.prod(padded) + C.SLACK),
        result(c.groups * cdiv(c.cg, c.s.mr) * c.s.mr * c.m * c.kv),
        result(c.x.numel()),
    )
    launch(C.pad(TARGET, "f32"), [g, X], [*c.strides(g), c.co, *c.out, *padded, *c.stride, *offset], (2, c.n, 1))
    k = c.taps
    launch(C.pack_weights(TARGET, "f32"), [c.w, packed],
           [c.kv - 1, c.m * c.k, c.kv, c.k, -k[1] * k[2], -k[2], -1, c.cg, c.m * c.kv, *k], (2, 2, c.groups))  # fmt: skip
    i = c.size
    launch(C.conv(TARGET, "f32"), [X, packed, dx],
           [c.co * math.prod(padded), c.c * math.prod(i), math.prod(i), i[1] * i[2], i[2], 1, c.cg, c.groups,
            *i, *k, *padded, 1, 1, 1, *c.dilation, c.m * c.kv, c.m], (2, 2, c.n * c.groups))  # fmt: skip
    close(values(dx, x.shape), x.grad, EPS["f32"])


WINOGRAD = [
    # images, channels, output channels, height, width, batch norm
    (3, 33, 37, 7, 7, True),
    (1, 300, 140, 5, 9, False),  # more channels than a task keeps, of both
    (2, 16, 20, 12, 57, True),
    (1, 2, 3, 1, 256, False),
]


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("case", WINOGRAD, ids=str)
def test_winograd(case, flip, width):
    """Any grid; flipped filters with exchanged channels are the gradient for the input."""
    n, c, m, h, w, normalised = case
    s = W.schedule(width)
    x, weight = make((n, c, h, w), "f32"), make((c, m, 3, 3) if flip else (m, c, 3, 3), "f32")
    th, tw = cdiv(h, 2), cdiv(w, 2)
    X = F.pad(x, (1, 2 * tw + 1 - w, 1, 2 * th + 1 - h))
    X = torch.cat([X.flatten(), torch.full((C.SLACK,), math.nan)])
    U = result(W.packed_size(m, c, s))
    strides = [9, 9 * m] if flip else [9 * c, 9]
    launch(W.pack(TARGET, "f32", flip, s), [weight, U], [*strides, m, c], (2, 1, 1))
    values(U, (0,))
    steps = (*batch_norm("m"), ("add", "f32", "mn"), "relu") if normalised else ()
    operands, scalars = [], []
    want = (
        F.conv_transpose2d(x.double(), weight.double(), padding=1)
        if flip
        else F.conv2d(x.double(), weight.double(), padding=1)
    )
    if normalised:
        mean, variance, gain, bias, other = *(make((m + i,), "f32")[:m] for i in range(4)), make((n, m, h, w), "f32")
        variance = variance.abs()
        operands, scalars = [mean, variance, gain, bias, other], [0, 1] * 4 + [m * h * w, h * w]
        d = [t.double()[:, None, None] for t in (mean, variance, gain, bias)]
        want = ((want - d[0]) / (d[1] + EPSILON).sqrt() * 0.5 * d[2] + d[3] + other.double()).relu()
    for groups in ((1, 2, 1), (3, 1, 1)):
        out = result(n * m * h * w)
        launch(W.winograd(TARGET, "f32", G.Epilogue(steps), s), [X, U, out, *operands],
               [m * h * w, h * w, *scalars, n, m, c, h, w], groups)  # fmt: skip
        close(values(out, (n, m, h, w)), want, EPS["f32"])


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("case", [(2, 9, 70, 10, 13), (1, 130, 5, 4, 3), (3, 8, 8, 1, 9)], ids=str)
def test_winograd_weight(case, layout, width):
    n, c, m, h, w = case
    s = W.schedule(width)
    x, g = make((n, c, h, w), "f32"), make((n, m, h, w), "f32")
    weight = torch.zeros(m, c, 3, 3, dtype=torch.float64, requires_grad=True)
    F.conv2d(x.double(), weight, padding=1).backward(g.double())
    th, tw = cdiv(h, 2), cdiv(w, 2)

    def turned(t, pad, height, width):
        t = t.mT.contiguous().mT if layout == "transposed" else t
        t = t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t
        out = result(n * height * width * t.shape[1] + C.SLACK)
        launch(
            W.pad_last(TARGET, "f32", s),
            [t, out],
            [*t.stride(), n, t.shape[1], h, w, height, width, pad, pad],
            (3, 1, 1),
        )
        got = values(out, (n, height, width, t.shape[1])).movedim(-1, 1)
        assert torch.equal(got, F.pad(t, (pad, width - w - pad, pad, height - h - pad)))
        return out

    X, Gr = turned(x, 1, 2 * th + 2, 2 * tw + 2), turned(g, 0, 2 * th, 2 * tw)
    dw = result(weight.numel())
    launch(W.weight_gradient(TARGET, "f32", s), [X, Gr, dw], [n, m, c, th, tw], (2, 1, 1))
    close(values(dw, weight.shape), weight.grad, EPS["f32"])


@pytest.mark.parametrize("n, c, mult, size, k, stride, pad, dilation",
                         [(2, 6, 1, 19, 3, 1, 1, 1), (1, 8, 2, 20, 5, 2, 2, 1), (2, 3, 1, 15, 3, 1, 2, 2), (1, 4, 1, 7, 3, 3, 1, 1)])  # fmt: skip
def test_depthwise(n, c, mult, size, k, stride, pad, dilation):
    x, w, b = make((n, c, size, size), "f32"), make((c * mult, 1, k, k), "f32"), make((c * mult,), "f32")
    wd = w.double().requires_grad_()
    y = F.conv2d(x.double(), wd, b.double(), stride=stride, padding=pad, dilation=dilation, groups=c)
    oh, ow = y.shape[2:]
    g = make(y.shape, "f32")
    y.backward(g.double())
    p = size + 2 * pad
    X, out, dw = result(n * c * p * p + C.SLACK), result(y.numel()), result(w.numel())
    launch(
        C.pad(TARGET, "f32"),
        [x, X],
        [c * size * size, size * size, 0, size, 1, c, 1, size, size, 1, p, p, 1, 1, 1, 0, pad, pad],
        (2, n, 1),
    )
    X[-C.SLACK - GUARD :] = math.nan  # what lies beyond the image must not matter
    launch(C.depthwise(TARGET, "f32", (k, k), G.Epilogue((("add", "f32", "m"), "relu6"))), [X, w, out, b],
           [0, k * k, k, 1, c * mult * oh * ow, oh * ow, ow, 0, 1, c * mult, mult, oh, ow, p, p, stride, stride, dilation, dilation], (2, n, 1))  # fmt: skip
    close(values(out, y.shape), F.relu6(y), EPS["f32"])
    launch(C.depthwise_backward_weight(TARGET, "f32", (k, k)), [X, g, dw],
           [c * mult * oh * ow, oh * ow, ow, n, c * mult, mult, oh, ow, p, p, stride, stride, dilation, dilation], (2, 1, 1))  # fmt: skip
    close(values(dw, w.shape), wd.grad, EPS["f32"])


def test_grid_does_not_matter():
    """Any number of tasks gives the same bits."""
    p = Product("f32", "n", "n", "n", (1, 130, 90, 200), ())
    packed, items = p.pack(G.schedule())
    kernel = G.gemm(TARGET, "f32", "f32", "f32")
    seen = []
    for groups in ((1, 1, 1), (7, 1, 1), (40, 9, 1)):
        launch(kernel, [p.a, packed, p.c], [*p.a.stride(), items, 0, *p.c_strides, 130, 90, 200], groups)
        seen.append(values(p.c, (1, 130, 90)).numpy().copy())
    assert all(np.array_equal(seen[0], other) for other in seen[1:])
