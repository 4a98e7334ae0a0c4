"""torch.compile(backend="spiral"): results against eager on the CPU, and how many kernels a graph becomes."""

import copy
import itertools
import logging
import math
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import associative_scan, scan, while_loop
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_spiral import _C
from torch_spiral.compiler import explain
from torch_spiral.compiler.device import register


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


PACKING = re.compile(r"(^|_)pack(_|$)")  # kernels that reorder an operand of a product


def on(device, tree):
    return tree_map_only(torch.Tensor, lambda t: t.to(device), tree)


def check(device, f, *args, tolerance=1e-5, **options):
    """f compiled against f eager on the CPU: dtypes, sizes, strides and values."""
    expected = f(*tree_map_only(torch.Tensor, torch.clone, args))
    got = torch.compile(f, backend="spiral", fullgraph=True, **options)(*on(device, args))
    for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.numel() > 1:
            assert a.stride() == b.stride()
        torch.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance)


def kernels(f, *args):
    """Names of the kernels of one call; those that pack an operand, which is kept or belongs to the product, left out."""
    with torch.no_grad():
        graphs = explain(f, *args).graphs
    return [k for graph in graphs for k in graph if not PACKING.search(k)]


# ---- values -------------------------------------------------------------------------------------------------------------


def test_pointwise_of_mixed_dtypes(device):
    def f(x):
        i = (x * 10).to(torch.int64)
        small = i.to(torch.int8) * 3
        return (
            i // 3,
            i % 7,
            i >> 1,
            small,
            small // 2,
            (i & 5) | 2,
            i.to(torch.uint8) + 200,
            torch.where(x > 0, i, -1),
            x.half() * 2,
        )

    check(device, f, torch.randn(8, 100).clamp(-3, 3))


def test_reductions(device):
    def f(x):
        return (
            x.sum(),
            x.sum(0),
            x.mean(1),
            x.amax(0),
            x.argmax(-1),
            x.max(-1),
            (x > 2).any(),
            (x > -9).all(0),
            x.prod(1),
            x.var(0),
            x.logsumexp(1),
        )

    check(device, f, torch.randn(37, 53) + 0.1, tolerance=1e-4)


def test_softmax_and_norms(device):
    def f(x, w, b):
        return (
            x.softmax(-1),
            x.softmax(0),
            F.layer_norm(x, (64,), w, b),
            F.group_norm(x.view(2, 8, 1, 64), 4),
            x.log_softmax(1),
        )

    check(device, f, torch.randn(16, 64), torch.randn(64), torch.randn(64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_floats(device, dtype):
    check(device, lambda x: (x.softmax(-1), x * 2 + 1, x.float().sum(1)), torch.randn(8, 100).to(dtype), tolerance=2e-2)


def test_views_and_concatenation(device):
    def f(x, y):
        return (
            torch.cat([x, y], 1) * 2,
            F.pad(x, (3, 5), value=2.0),
            x.t() + 1,
            x.flip(1),
            x.roll(2, -1),
            x[:, 3:9].reshape(-1),
            x.tril(),
        )

    check(device, f, torch.randn(8, 100), torch.randn(8, 50))


def test_indexing_and_scatter(device):
    def f(w, i):
        out = torch.zeros(10, 16, device=w.device).index_add_(0, i % 10, w[i])
        return w[i] * 2, w[-1 - i], out, w.gather(1, i[:, None] % 16), F.embedding(i, w)

    check(device, f, torch.randn(50, 16), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3]))


def test_an_index_out_of_bounds_raises_later(device):
    f = torch.compile(lambda w, i: w[i] * 2, backend="spiral", fullgraph=True)
    with pytest.raises(IndexError, match="index 12 is out of bounds for dimension with size 10"):
        f(torch.randn(10, 4).to(device), torch.tensor([1, 12, 3]).to(device)).cpu()
    assert f(torch.ones(10, 4).to(device), torch.tensor([1, 2, 3]).to(device)).sum().item() == 24
    with pytest.raises(IndexError, match="index -11 is out of bounds for dimension with size 10"):
        f(torch.randn(10, 4).to(device), torch.tensor([1, -11, 3]).to(device)).cpu()


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="one_hot checks nothing in graphs of torch 2.11")
def test_assertions_are_raised_later(device):
    f = torch.compile(lambda i: F.one_hot(i, 5) * 2, backend="spiral", fullgraph=True)
    i = torch.tensor([1, 4, 0])
    assert f(i.to(device)).cpu().equal(F.one_hot(i, 5) * 2)
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        f(i.to(device) + 1).cpu()


def test_mutation(device):
    def f(x):
        x.add_(1)
        x[2:4] *= 3
        return x.sum(0)

    x = torch.randn(8, 5)
    xs = x.to(device)
    got = torch.compile(f, backend="spiral", fullgraph=True)(xs)
    torch.testing.assert_close(got.cpu(), f(x))
    torch.testing.assert_close(xs.cpu(), x)


def test_inputs_that_share_memory(device, monkeypatch, tmp_path):
    """Graphs for inputs that overlap are not those for inputs that lie apart, although nothing else about them differs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def f(x, y):
        x.add_(1)
        return x * y

    for overlap in (True, False):
        torch._dynamo.reset()  # what is compiled comes from the cache where its key is the same
        whole = torch.randn(6, 5)
        ours = whole.to(device)
        second = slice(2, 5) if overlap else slice(3, 6)
        got = torch.compile(f, backend="spiral")(ours[:3], ours[second])
        torch.testing.assert_close(got.cpu(), f(whole[:3], whole[second]))
        assert ours.cpu().equal(whole)


def test_a_weight_written_in_the_graph_is_packed_again(device):
    def f(x, w):
        w.mul_(2)
        return x @ w

    x, w = torch.randn(8, 16), torch.randn(16, 24)
    xs, ws = x.to(device), w.to(device)
    g = torch.compile(f, backend="spiral", fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(g(xs, ws).cpu(), f(x, w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dims", [(8, 16, 24), (1, 16, 24), (5, 7, 3)])
def test_products_with_epilogues(device, dims):
    m, k, n = dims

    def f(x, w, b, r):
        return F.gelu(x @ w + b) + r, F.silu(F.linear(x, w.t(), b)) * r, (x @ w).relu(), torch.tanh(x @ w + b + r)

    check(device, f, torch.randn(m, k), torch.randn(k, n), torch.randn(n), torch.randn(m, n))


def test_an_epilogue_keeps_what_others_read(device):
    def f(x, w):
        y = x @ w
        return y.relu(), y.t() @ y

    check(device, f, torch.randn(6, 5), torch.randn(5, 4))


def test_convolution(device):
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = m(x)
    got = torch.compile(m.to(device), backend="spiral", fullgraph=True)(x.to(device))
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=1e-4, atol=1e-4)


class ConvBlock(nn.Module):
    """Convolution, batch norm, and what follows them in residual networks."""

    def __init__(self, k, groups, residual, activate):
        super().__init__()
        c = 8 if residual or groups > 1 else 12
        self.conv, self.bn = nn.Conv2d(8, c, k, padding=k // 2, groups=groups, bias=not activate), nn.BatchNorm2d(c)
        self.residual, self.activate = residual, activate
        for t in (self.bn.running_mean, self.bn.weight.data, self.bn.bias.data):
            t.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y = y + x if self.residual else y
        return y.relu() if self.activate else y


@pytest.mark.parametrize(
    ("k", "groups", "residual", "activate"),
    [(3, 1, False, True), (1, 1, False, True), (3, 1, True, True), (3, 8, False, True), (1, 1, True, False)],
)
def test_convolution_batch_norm_and_relu_are_one_kernel(device, k, groups, residual, activate):
    """What pads or packs the input for a CPU device belongs to the convolution."""
    m, x = ConvBlock(k, groups, residual, activate).eval(), torch.randn(2, 8, 10, 9)
    with torch.no_grad():
        expected = m(x)
        m.to(device)
        names = [n for n in kernels(m, x.to(device)) if not n.startswith("vector_conv_pad")]
        assert len(names) == 1, names
        torch.testing.assert_close(m(x.to(device)).cpu(), expected, rtol=1e-4, atol=1e-5)
        got = torch.compile(m, backend="spiral", fullgraph=True)(x.to(device))
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_convolutions_channels_last(device, monkeypatch, tmp_path, train):
    """As the compiler lays them out for Triton; the layout is right on any engine."""
    from torch_spiral.compiler import passes

    monkeypatch.setattr(passes, "reads_by_channels", lambda gm: True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # whose keys know nothing of this choice

    def block(i, o, k, stride=1):
        return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = block(3, 16, 3, 2), block(16, 16, 3)
            self.c, self.d = block(16, 24, 3, 2), block(16, 24, 1, 2)

        def forward(self, x):
            x = F.max_pool2d(self.a(x).relu(), 2)
            x = (self.b(x) + x).relu()
            return (self.c(x) + self.d(x)).relu().mean((2, 3))

    torch.manual_seed(0)
    m, x = Net().train(train), torch.randn(2, 3, 20, 18)
    ours = copy.deepcopy(m).to(device)
    compiled = torch.compile(ours, backend="spiral", fullgraph=True)
    if not train:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x.to(device)).cpu(), m(x), rtol=1e-4, atol=1e-5)
            if torch.spiral.get_device_properties(device).engine == "cuda":
                names = [
                    n for n in kernels(ours, x.to(device)) if not n.startswith("copy")
                ]  # those of weights are kept
                assert sum("_last" in n for n in names) == 4 and len(names) <= 9, names
        return
    got, expected = compiled(x.to(device)), m(x)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(ours.parameters(), m.parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-3, atol=1e-4)


def test_epilogues_with_constants_and_casts(device):
    def f(x, w, v):
        return ((x @ w) * 0.125 - 1.5).half(), torch.sigmoid((x @ w) / 3) - v, (x @ w - v) * torch.rsqrt(v * v + 1e-3)

    x, w, v = torch.randn(6, 16), torch.randn(16, 24), torch.rand(24) + 0.5
    check(device, f, x, w, v, tolerance=1e-3)
    names = kernels(
        lambda x, w, v: ((x @ w) * 0.125 - 1.5).half() if v is None else torch.sigmoid((x @ w) / 3) - v,
        *on(device, (x, w, v)),
    )
    assert len(names) == 1, names


D = 8  # of a head below


def _eager_attention(q, k, v, mask):
    """transformers' eager_attention_forward."""
    weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5 + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.1, training=False), v).transpose(1, 2).contiguous()


def _where(q, k, v, mask):
    """GPT-2's, before SDPA."""
    w = torch.matmul(q, k.transpose(-1, -2))
    w = w / torch.full([], D**0.5, dtype=w.dtype, device=w.device)
    w = torch.where(mask > -1, w, torch.full([], torch.finfo(w.dtype).min, dtype=w.dtype, device=w.device))
    return torch.matmul(F.softmax(w, -1).type(v.dtype), v)


def _bmm(q, k, v, mask):
    """BART's and Whisper's, in three dimensions."""
    b, h, t, _ = q.shape
    q, k, v = ((x * s).reshape(b * h, t, D) for x, s in ((q, D**-0.5), (k, 1.0), (v, 1.0)))
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)


ATTENTION = {
    "eager": _eager_attention,
    "where": _where,
    "bmm": _bmm,
    "divided": lambda q, k, v, mask: torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1) @ v,
    "masked_fill": lambda q, k, v, mask: (q @ k.mT).masked_fill(mask < -1, float("-inf")).softmax(-1) @ v,
    "T5": lambda q, k, v, mask: torch.matmul(F.softmax(torch.matmul(q, k.transpose(3, 2)) + mask, dim=-1), v),
    "SDPA with a mask": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
}  # fmt: skip


@pytest.mark.parametrize("form", ATTENTION)
def test_attention_from_its_decomposed_forms(device, form):
    f = ATTENTION[form]
    q, k, v = torch.randn(3, 2, 4, 16, D)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 12:] = -100.0
    with torch.no_grad():
        check(device, f, q, k, v, mask)
        names = kernels(f, *on(device, (q, k, v, mask)))
    assert sum("attention" in n for n in names) == 1 and not any("gemm" in n for n in names), names


def test_attention_from_its_decomposed_form_backward(device):
    q, k, v = torch.randn(3, 2, 4, 16, D)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 12:] = -100.0
    ours, theirs = ([x.detach().to(p).requires_grad_() for x in (q, k, v)] for p in (device, "cpu"))
    torch.compile(_eager_attention, backend="spiral", fullgraph=True)(*ours, mask.to(device)).square().sum().backward()
    _eager_attention(*theirs, mask).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.full)])
def test_masks_of_attention_mean_what_they_say(device, train):
    """Scores replaced by a number that hides nothing, a mask that is scaled with the scores, and rows that are hidden altogether: the mean of
    the values, whose queries have no gradient."""

    def f(q, k, v, added, hidden):
        s = (q @ k.mT) * 0.3
        scores = s.masked_fill(hidden, 0.0), s.masked_fill(mask=hidden, value=-3e4) / 3, (s + added) * 0.5
        return tuple(x.softmax(-1) @ v for x in scores)

    added, hidden = torch.randn(2, 1, 12, 12), torch.rand(2, 1, 12, 12) > 0.7
    hidden[0, 0, 3], hidden[1, 0, 5] = True, False
    grads = []
    q, k, v = torch.randn(3, 2, 4, 12, D)
    for g, where in ((f, "cpu"), (torch.compile(f, backend="spiral", fullgraph=True), device)):
        there = [x.to(where).requires_grad_(train) for x in (q, k, v)]
        out = g(*there, added.to(where), hidden.to(where))
        grads.append(torch.autograd.grad(sum(o.square().sum() for o in out), there) if train else out)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-3)


def _repeat_kv(x, n):
    """transformers' repeat_kv."""
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, t, d).reshape(b, h * n, t, d)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_share_keys_are_not_copied(device, queries, masked):
    def f(q, k, v, *mask):
        return F.scaled_dot_product_attention(q, _repeat_kv(k, 3), _repeat_kv(v, 3), *mask) * 2

    args = [torch.randn(2, 6, queries, D), torch.randn(2, 2, 7, D), torch.randn(2, 2, 7, D)]
    args += [torch.randn(2, 1, queries, 7)] if masked else []
    check(device, f, *args)
    names = kernels(f, *on(device, args))
    assert len(names) == 2, names  # attention, and what follows


def _shared_cache(q, k, v, keys, values, at):
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return F.scaled_dot_product_attention(q, _repeat_kv(keys, 3), _repeat_kv(values, 3))


def _spelled_out_cache(q, k, v, keys, values, at):
    keys.index_copy_(2, at, k)
    values[:, :, at] = v
    at.add_(1)
    return torch.softmax(q[:, :2] @ keys.transpose(-2, -1), -1) @ values


def _written_after_a_copy(q, k, v, keys, values, at):
    repeated = _repeat_kv(keys, 3), _repeat_kv(values, 3)
    keys.index_copy_(2, at, k)
    values.zero_()
    return F.scaled_dot_product_attention(q, *repeated)


def _first_of_a_cache(q, k, v, keys, values, at):
    none = torch.tensor([], device=q.device)
    keys.index_copy_(2, at, k)
    return F.scaled_dot_product_attention(q[:, :2], torch.cat([none, k], -2), torch.cat([none, v], -2))


@pytest.mark.parametrize("f", [_shared_cache, _spelled_out_cache, _written_after_a_copy, _first_of_a_cache])
def test_caches_around_attention_are_written(device, f):
    make = [torch.randn(2, heads, t, D) for heads, t in ((6, 1), (2, 1), (2, 1), (2, 7), (2, 7))] + [torch.tensor([4])]
    theirs, ours = [x.clone() for x in make], on(device, make)
    want, got = f(*theirs), torch.compile(f, backend="spiral", fullgraph=True)(*ours)
    for a, b in zip([want, *theirs], [got, *ours], strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-5)


def test_a_mask_that_layers_share_is_made_once(device):
    """Each call makes what is added to its scores out of a mask of booleans, as SDPA does, and transformers for it."""

    def f(q, k, v, length):
        seen = torch.arange(k.shape[2], device=k.device) <= length
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None, None].expand(2, 1, 1, -1))
        return q

    args = [torch.randn(2, 4, 1, D), torch.randn(2, 4, 12, D), torch.randn(2, 4, 12, D), torch.tensor([7])]
    with torch.no_grad():
        check(device, f, *args)
        names = kernels(f, *on(device, args))
    assert sum(n.startswith("fused_") for n in names) == 1, names


def test_equal_results_are_tensors_of_their_own(device):
    def f(x, n):
        return x + 1, x + 1, (x * 2)[1:], (x * 2)[:1], n + 1, n + 1.0, (x * 3).sum(), (x * 3).sum(0)

    x, n = torch.randn(4, 6), torch.tensor([1, 2])
    check(device, f, x, n)
    results = torch.compile(f, backend="spiral", fullgraph=True)(x.to(device), n.to(device))
    results[0].zero_()
    results[2].zero_()
    torch.testing.assert_close(results[1].cpu(), x + 1)
    torch.testing.assert_close(results[3].cpu(), x[:1] * 2)


def test_attention_whose_weights_are_read_is_left_alone(device):
    def f(q, k, v):
        weights = torch.softmax(q @ k.transpose(-2, -1), -1)
        return weights @ v, weights

    check(device, f, *torch.randn(3, 2, 4, 16, D))


# ---- graphs -------------------------------------------------------------------------------------------------------------


def test_one_kernel_for_all_batch_sizes(device):
    def f(x, w):
        return (x.softmax(-1) * 2 + w).relu().sum(0), x.cos()

    torch._dynamo.utils.counters.clear()
    g = torch.compile(f, backend="spiral", dynamic=True, fullgraph=True)
    w = torch.randn(40)
    for n in (5, 9, 33, 64):
        x = torch.randn(n, 40)
        for a, b in zip(f(x, w), g(*on(device, (x, w))), strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(24, 32), nn.Linear(32, 24), nn.LayerNorm(24)

    def forward(self, x):
        return self.norm(x + self.second(F.gelu(self.first(x))))


class Channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Batches(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6, 10))

    def forward(self, x):
        return F.relu(x @ x.mT * 0.5 + self.bias[:, :6])


DYNAMIC = {  # kernels, a module, an input of n batches, what is dynamic
    "linear, relu": (1, lambda: nn.Sequential(nn.Linear(24, 40), nn.ReLU()), lambda n: torch.randn(n, 24), (0,)),
    "linear of rows, gelu": (1, lambda: nn.Sequential(nn.Linear(24, 40), nn.GELU()), lambda n: torch.randn(n, 5, 24), (0,)),
    "linear of rows of any number": (1, lambda: nn.Sequential(nn.Linear(24, 40), nn.SiLU()), lambda n: torch.randn(n, n + 2, 24), (0, 1)),
    "residual, norm": (3, Residual, lambda n: torch.randn(n, 5, 24), (0,)),
    "convolution, batch norm, relu": (1, Channels, lambda n: torch.randn(n, 3, 9, 7), (0,)),
    "batches of products": (1, Batches, lambda n: torch.randn(n, 6, 8), (0,)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if i % 3 else []) for i, name in enumerate(DYNAMIC)]
)
def test_products_of_all_batch_sizes_have_their_epilogues(device, name):
    count, make, sample, dims = DYNAMIC[name]
    model = make().eval()
    exact = copy.deepcopy(model).double()
    f = torch.compile(model.to(device), backend="spiral", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for n in (7, 33, 64, 1):
            x = sample(n)
            y = x.to(device)
            for d in dims if n > 1 else ():
                torch._dynamo.mark_dynamic(y, d)
            f(y)
            torch.spiral.synchronize()
            with torch.spiral.telemetry() as t:
                got = f(y)
                torch.spiral.synchronize()
            names = [x.kernel for x in t.launches if not PACKING.search(x.kernel) and "conv_pad" not in x.kernel]
            assert len(names) == count, names
            torch.testing.assert_close(got.cpu().double(), exact(x.double()), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # Dynamo has a graph of its own for 1


def test_graph_breaks(device):
    def f(x):
        y = x * 2 + 1
        torch._dynamo.graph_break()
        return y.relu() - 1

    x = torch.randn(10)
    got = torch.compile(f, backend="spiral")(x.to(device))
    torch.testing.assert_close(got.cpu(), f(x))


def test_a_graph_replays_without_recording(device):
    g = torch.compile(lambda x: x.softmax(-1) + 1, backend="spiral")
    x = torch.randn(8, 40).to(device)
    g(x)
    before = _C.plan_statistics()
    g(x)
    after = _C.plan_statistics()
    assert after["misses"] == before["misses"] and after["launches"] == before["launches"] + 1


def test_training(device):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))

    ours, theirs = make().to(device), make()
    compiled = torch.compile(lambda x, y: F.cross_entropy(ours(x), y), backend="spiral", fullgraph=True)
    x, y = torch.randn(20, 16), torch.randint(0, 8, (20,))
    for module, loss, place in ((theirs, lambda x, y: F.cross_entropy(theirs(x), y), "cpu"), (ours, compiled, device)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            loss(x.to(place), y.to(place)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=1e-4, atol=1e-5)


def test_dropout_agrees_in_backward(device):
    f = torch.compile(lambda x: F.dropout(x, 0.5) * 2, backend="spiral", fullgraph=True)
    x = torch.ones(1000, device=device, requires_grad=True)
    y = f(x)
    y.sum().backward()
    kept = (y > 0).cpu()
    assert torch.equal(kept, (x.grad > 0).cpu()) and 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept, (f(x) > 0).cpu())


def test_checkpointing_recomputes_with_the_same_dropout(device):
    from torch.utils.checkpoint import checkpoint

    def f(x):
        return checkpoint(lambda x: F.dropout(x, 0.5).exp(), x, use_reentrant=False).sum()

    x = torch.ones(1000, device=device, requires_grad=True)
    y = torch.compile(f, backend="spiral", fullgraph=True)(x)
    y.backward()
    # Where a value was kept, exp'(2) · 2; elsewhere 0: as many as the sum says.
    kept = (x.grad > 0).sum().item()
    assert 400 < kept < 600 and y.item() == pytest.approx(kept * math.exp(2) + (1000 - kept), rel=1e-4)
    assert x.grad.sum().item() == pytest.approx(kept * 2 * math.exp(2), rel=1e-4)


def test_autocast(device):
    f = torch.compile(nn.Linear(16, 16).to(device), backend="spiral", fullgraph=True)
    with torch.autocast("spiral", dtype=torch.bfloat16), torch.no_grad():
        assert f(torch.randn(4, 16, device=device)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("k", "groups", "dtype"), [(3, 1, torch.bfloat16), (1, 1, torch.float16), (3, 8, torch.bfloat16)]
)
def test_autocast_converts_no_weights_and_biases_of_convolutions(device, k, groups, dtype):
    """Only the input; products add biases in float32, and their packed forms are made of the weights themselves."""
    m = nn.Sequential(
        nn.Conv2d(8, 8, k, groups=groups), nn.ReLU(), nn.Conv2d(8, 16, k, stride=2, groups=groups), nn.SiLU()
    ).eval()  # fmt: skip
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        want = copy.deepcopy(m).double()(x.double())
    m = m.to(device)
    with torch.autocast("spiral", dtype=dtype), torch.no_grad():
        f = torch.compile(m, backend="spiral")
        for _ in range(2):  # what is made of weights is kept
            f(x.to(device))
        torch.spiral.synchronize()
        with torch.spiral.telemetry() as t:
            got = f(x.to(device))
            torch.spiral.synchronize()
        m[0].bias.add_(1.0)
        again = f(x.to(device))
    names = [x.kernel for x in t.launches if "conv_pad" not in x.kernel and not PACKING.search(x.kernel)]
    assert len(names) == 3, names
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), want, rtol=3e-2, atol=3e-2)
    assert (again - got).abs().max() > 0.05


def test_a_bias_that_the_graph_writes_is_added_as_it_was_read(device):
    conv, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 9, 9)

    def f(x, w, b):
        y = F.conv2d(x, w, b)
        b.mul_(3.0)
        return y, F.conv2d(x, w, b)

    w, b = conv.weight.detach(), conv.bias.detach()
    first, third = F.conv2d(x, w, b), F.conv2d(x, w, 3 * b)
    with torch.autocast("spiral", dtype=torch.bfloat16), torch.no_grad():
        got = torch.compile(f, backend="spiral", fullgraph=True)(*on(device, (x, w, b.clone())))
    for a, e in zip(got, (first, third), strict=True):
        torch.testing.assert_close(a.float().cpu(), e, rtol=3e-2, atol=3e-2)


@pytest.mark.skipif(torch.spiral.device_count() < 2, reason="one device")
def test_graphs_without_inputs_run_on_their_device_and_several_devices_are_refused():
    make = torch.compile(lambda d: torch.full((3,), 2.0, device=d) * 3, backend="spiral")
    for i in (0, 1, 0):
        assert make(torch.device("spiral", i)).device.index == i

    def across(x, y):
        return (x + 1).to("spiral:1") * y

    x, y = torch.ones(3, device="spiral:0"), torch.ones(3, device="spiral:1")
    with pytest.warns(UserWarning, match="several devices"):
        assert torch.compile(across, backend="spiral")(x, y).tolist() == [2, 2, 2]


def test_graph_breaks_that_restart_dynamo(device):
    """A number that was read back is a constant at first, then an input of the graphs after it, for which the backend has Dynamo start again."""

    def f(x):
        n = x.argmax().item()
        return x * 2 + n

    g = torch.compile(f, backend="spiral")
    for place in range(3):
        x = torch.zeros(5).index_fill(0, torch.tensor(place), 1.0)
        torch.testing.assert_close(g(x.to(device)).cpu(), f(x))


def test_numbers_on_the_cpu_beside_sums(device):
    """What has no dimensions is on the device, though the first operand is on the CPU."""

    def f(s, x):
        return s * x.sum(), torch.maximum(s, x[0, 0])

    s, x = torch.tensor(2.5), torch.randn(4, 4)
    got = torch.compile(f, backend="spiral", fullgraph=True)(s, x.to(device))
    for a, b in zip(f(s, x), got, strict=True):
        assert b.device == device
        torch.testing.assert_close(b.cpu(), a)


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(Exception, match=r'move them with \.to\("spiral"\)'):
        torch.compile(lambda x: x + 1, backend="spiral")(torch.randn(3))
    for module, x in (
        (nn.Linear(3, 2), torch.randn(4, 3).to("spiral")),
        (nn.Linear(3, 2).to("spiral"), torch.randn(4, 3)),
    ):
        said = r'Move what is on the CPU with \.to\("spiral"\)'
        said = (
            said if torch.__version__ >= (2, 12) else "found two different devices"
        )  # which raises by no class of its own
        with pytest.raises(Exception, match=said):
            torch.compile(module, backend="spiral")(x)


def test_what_cannot_be_compiled_runs_eagerly_and_says_so(device, monkeypatch):
    import torch_spiral.compiler.codegen as codegen

    def refuse(*args):
        raise NotImplementedError("no such kernel today")

    monkeypatch.setattr(codegen, "build", refuse)
    x = torch.randn(5).to(device)
    with torch._inductor.config.patch(fx_graph_cache=False):
        with pytest.warns(UserWarning, match="no such kernel today"):
            got = torch.compile(lambda x: x * 3, backend="spiral")(x)
        torch.testing.assert_close(got.cpu(), x.cpu() * 3)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="no such kernel today"):
            torch.compile(lambda x: x * 3, backend="spiral", fullgraph=True)(x)


def test_a_kernel_that_cannot_be_generated_names_its_nodes(device, monkeypatch):
    import torch_spiral.compiler.codegen as codegen

    def refuse(*args):
        raise NotImplementedError("no such kernel today")

    monkeypatch.setattr(codegen, "build", refuse)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        pytest.raises(Exception, match=r"no such kernel today, in .*aten\.cos"),
    ):
        torch.compile(lambda x: x.cos() * 3, backend="spiral", fullgraph=True)(torch.randn(5).to(device))


def test_a_kernel_that_does_not_compile_names_its_nodes_and_leaves_its_source(device, monkeypatch):
    import dataclasses
    from pathlib import Path

    import torch_spiral.compiler.codegen as codegen

    build = codegen.build

    def broken(program, target):
        built = build(program, target)
        return dataclasses.replace(
            built,
            kernel=dataclasses.replace(built.kernel, source=built.kernel.source + "this is no program"),
        )

    monkeypatch.setattr(codegen, "build", broken)
    with torch._inductor.config.patch(fx_graph_cache=False), pytest.raises(RuntimeError) as error:
        torch.compile(lambda x: x.cos() * 3, backend="spiral", fullgraph=True)(torch.randn(5).to(device))
    text = str(error.value)
    assert "aten.cos" in text and "does not compile" in text
    assert "this is no program" in Path(re.search(r"Source(?: and (?:build )?log)?: (\S+)", text)[1]).read_text()


def test_other_devices_keep_their_own_text():
    from torch._inductor.codegen.common import get_device_op_overrides

    from torch_spiral.compiler import device

    device.register()
    assert "cuda" in get_device_op_overrides("cuda").device_guard(0)


@pytest.mark.parametrize("options", [{}, {"foreach": True, "capturable": True}, {"fused": True}], ids=str)
def test_an_optimizers_step(device, options):
    """Its parameters belong to the graph; what counts steps is on the CPU unless it says otherwise."""

    def train(device, compiled):
        parameters = [(torch.arange(n) / 10).to(device).requires_grad_() for n in (3, 8, 50)]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, **(options if compiled else {}))
        step = torch.compile(optimizer.step, backend="spiral") if compiled else optimizer.step
        for i in range(3):
            optimizer.zero_grad()
            sum((p * (p - i)).sin().sum() for p in parameters).backward()
            step()
        return [p.detach().cpu() for p in parameters]

    torch.testing.assert_close(train(device, True), train(torch.device("cpu"), False), rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("options", [{"foreach": True, "capturable": True}, {"fused": True}], ids=str)
def test_kernels_of_an_optimizers_step(device, options, equal):
    """A hundred parameters: as many at a time as a kernel may have buffers, whatever their sizes."""
    sizes = [(8, 16)] if equal else [(8, 16), (33,), (1,), (100, 257), (64, 65), (3, 5, 7), (130, 130)]

    def step(device, options):
        torch.manual_seed(0)
        parameters = [torch.randn(sizes[i % len(sizes)]).to(device).requires_grad_() for i in range(100)]
        for p in parameters:
            p.grad = torch.randn(p.shape).to(device)
        optimizer = torch.optim.AdamW(parameters, lr=0.01, **options)
        run = torch.compile(optimizer.step, backend="spiral") if options else optimizer.step
        for _ in range(3):
            run()
        with torch.spiral.telemetry() as t:
            run()
            torch.spiral.synchronize()
        return [p.detach().cpu() for p in parameters], len(t.launches)

    got, launches = step(device, options)
    torch.testing.assert_close(got, step(torch.device("cpu"), {})[0], rtol=1e-5, atol=1e-6)
    # 500 addresses fit the arguments of one kernel; the operator that `fused` calls takes 50 rows a launch, as each has a body of its own.
    addresses = torch.spiral.get_device_properties(device).max_bindings > 500
    assert launches <= (15 if not addresses else 2 if "foreach" in options else 3)


@pytest.mark.parametrize("dense", [True, False])
def test_pointwise_kernels_of_any_sizes_are_one(device, dense):
    """Those that write inputs of the graph, whatever their sizes; of transposed and sliced operands, Inductor makes two each."""
    sizes = [(5, 7), (), (300, 70), (0, 3), (1,), (2, 3, 4), (16385,), (64, 64), (33, 1)]

    def f(xs, ys, w):
        for x, y in zip(xs, ys, strict=True):
            x.mul_(0.5).add_(y.tanh() * w)
        return xs[0] + 1

    xs, ys = ([torch.randn(s) for s in sizes] for _ in range(2))
    ys[7] = torch.randn(65, 64)[1:]
    if not dense:
        ys[0], ys[2], ys[5] = (
            torch.randn(5, 20)[:, 3:17:2],
            torch.randn(70, 300).t(),
            torch.randn(4, 3, 2).permute(2, 1, 0),
        )
    w = torch.tensor(0.3)
    want = [x.double() * 0.5 + y.double().tanh() * 0.3 for x, y in zip(xs, ys, strict=True)]
    mine, theirs = on(device, (xs, ys))
    g = torch.compile(f, backend="spiral", fullgraph=True)
    last = g(mine, theirs, w.to(device))
    for a, b in zip([*mine, last], [*want, want[0] + 1], strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)
    torch.spiral.synchronize()
    with torch.spiral.telemetry() as t:
        g(mine, theirs, w.to(device))
        torch.spiral.synchronize()
    assert len(t.launches) == 1 or not dense


def test_several_streams(device):
    """In a graph, around one, and where they break it."""
    first, second = torch.spiral.Stream(device), torch.Stream(device)

    def inside(x, w):
        here = torch.accelerator.current_stream()
        y = x @ w
        first.wait_stream(here)
        with first:
            z = y.relu() @ w
        event = first.record_event()
        with second:
            second.wait_event(event)
            u = z.softmax(-1)
        here.wait_stream(second)
        return u + y, z

    def expected(x, w):
        y = x @ w
        z = y.relu() @ w
        return z.softmax(-1) + y, z

    def breaking(x, w):
        with torch.spiral.stream(first):
            return expected(x, w)

    x, w = torch.randn(2, 20, 20)
    there = on(device, (x, w))
    for f, full in ((inside, True), (breaking, False)):
        torch.testing.assert_close(
            on("cpu", torch.compile(f, backend="spiral", fullgraph=full)(*there)), expected(x, w), rtol=1e-5, atol=1e-5
        )
    f = torch.compile(expected, backend="spiral", fullgraph=True)
    for i in range(4):  # each call reads what the one before wrote, on another stream
        with (first, second)[i % 2]:
            there = (f(*there)[0], there[1])
            assert torch.spiral.current_stream(device) == (first, second)[i % 2]
        x = expected(x, w)[0]
    torch.testing.assert_close(there[0].cpu(), x, rtol=1e-4, atol=1e-4)


def test_the_default_backend_in_a_new_process():
    """What runs before a first graph makes Dynamo know the device is not traced: this asks for the state of the random numbers."""
    code = """
        import torch
        from torch.testing._internal.common_methods_invocations import wrapper_set_seed
        ones = torch.ones(1, device="spiral")
        assert torch.compile(lambda x: wrapper_set_seed(torch.Tensor.item, x))(ones) == 1
        f = torch.compile(lambda x: x.softmax(-1) * 2, fullgraph=True)
        x = torch.randn(4, 10)
        assert torch.allclose(f(x.to("spiral")).cpu(), x.softmax(-1) * 2, atol=1e-6)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_first_graph_of_a_process_is_called_without_python():
    code = """
        import sys, torch
        f = torch.compile(lambda x: x.softmax(-1) * 2, backend="spiral", fullgraph=True)
        x = torch.randn(4, 10, device="spiral")
        called = []
        with torch.no_grad():
            f(x), f(x)
            sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
            f(x)
            sys.setprofile(None)
        assert "<lambda>" in called, called
        assert "_fn" not in called, called  # what Dynamo wraps compiled functions in
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


MODES = [
    {"mode": "max-autotune"},
    {"mode": "reduce-overhead"},
    {"mode": "max-autotune", "backend": "spiral"},
    {"options": {"triton.cudagraphs": True, "max_autotune": True}, "backend": "spiral"},
]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("how", [MODES[0], *(pytest.param(m, marks=pytest.mark.full) for m in MODES[1:])], ids=str)
def test_modes_for_cuda_devices_change_nothing(device, how, caplog):
    """No CUDA graphs, no templates, no word about either: the kernels of the default mode, forward and backward."""
    from torch_spiral.compiler import runtime

    def f(x, w, v):
        return torch.relu(x @ w).sum(1) * (x[:1] @ v), (x @ v).softmax(0)

    def run(**how):
        torch._dynamo.reset()
        _C.clear_plans()
        runtime.recorded.clear()
        there = [t.to(device).requires_grad_() for t in (x, w, v)]
        found = torch.compile(f, fullgraph=True, **how)(*there)
        found += torch.autograd.grad(sum(t.sum() for t in found), there)
        return found, [g.kernels for g in runtime.recorded]

    x, w, v = torch.randn(8, 16), torch.randn(16, 16), torch.randn(16, 1)
    here = [t.double().requires_grad_() for t in (x, w, v)]
    expected = f(*here)
    expected += torch.autograd.grad(sum(t.sum() for t in expected), here)
    plain = run()[1]
    found, names = run(**how)
    assert names == plain and len(names) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_mode_in_a_new_process():
    """Inductor asks for devices when a graph is half compiled; then it is too late to refuse CUDA graphs."""
    code = """
        import torch
        f = torch.compile(lambda: torch.ones(3, device="spiral").exp(), fullgraph=True, mode="reduce-overhead")
        assert torch.allclose(f().cpu(), torch.ones(3).exp())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


# ---- branches and loops ---------------------------------------------------------------------------------------------------


def branches(x, w):
    """The product before the branch is used by both and after; a kernel of the branch is one that stands outside too."""
    y = x @ w + 1
    z, s = torch.cond(
        y.sum() > 0,
        lambda y, w: (torch.relu(y @ w) + y.sin(), y.sum()),
        lambda y, w: ((y - w[: y.shape[0]]).softmax(-1), y.sum() * 2),
        (y, w),
    )
    return z * 2 + y.cos(), torch.relu(x @ w) + x.sin(), s


def nested(x, w):
    def positive(x, w):
        return torch.cond(x[0, 0] > 1, lambda x, w: x @ w, lambda x, w: x @ w.t(), (x, w)) + 1

    return torch.cond(x.sum() > 0, positive, lambda x, w: x * 2, (x, w)) @ w


def loop(x, w):
    i = torch.zeros((), dtype=torch.int64, device=x.device)
    i, y = while_loop(lambda i, y: i < 5, lambda i, y: (i + 1, torch.tanh(y @ w) + 1), (i, x * 2))
    return y + i, x + 1


def never(x, w):
    return while_loop(lambda x: x.sum() > 1e9, lambda x: (x.sin(),), (x * 2,))[0] @ w


def scanned(x, w):
    last, partial = scan(lambda c, a: ((c @ w + a).sin(), c * a), x[0], x, dim=0)
    return last, partial @ w


def scanned_in_a_tree(x, w):
    return associative_scan(lambda a, b: a * b, (x @ w).sin(), dim=0, combine_mode="generic") + 1


@pytest.mark.filterwarnings("error:spiral runs a graph")
@pytest.mark.parametrize(
    ("f", "layout"),
    [
        (branches, "contiguous"),
        (branches, "negative"),
        pytest.param(branches, "transposed", marks=pytest.mark.full),
        pytest.param(nested, "sliced", marks=pytest.mark.full),
        (loop, "sliced"),
        pytest.param(never, "contiguous", marks=pytest.mark.full),
        pytest.param(scanned, "contiguous", marks=pytest.mark.full),
        pytest.param(scanned_in_a_tree, "contiguous", marks=pytest.mark.full),
    ],
)
def test_branches_and_loops(device, f, layout):
    """The functions of branches and bodies are graphs of kernels of ours; which runs is decided on the host."""
    x, w = torch.randn(8, 16), torch.randn(16, 16) / 4
    x = {
        "contiguous": x, "transposed": torch.randn(16, 8).t(), "sliced": torch.randn(9, 40)[1:, 3:19], "negative": -x.abs() - 1
    }[layout]  # fmt: skip
    check(device, f, x, w)


@pytest.mark.full
def test_branches_of_dynamic_sizes(device):
    f = torch.compile(branches, backend="spiral", fullgraph=True, dynamic=True)
    for n in (3, 5, 8):
        for sign in (1, -1):
            x, w = torch.randn(n, 16).abs() * sign, torch.randn(16, 16).abs()
            for a, b in zip(f(x.to(device), w.to(device)), branches(x, w), strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("f", [branches, loop, scanned])
def test_gradients_of_branches_and_loops(device, f):
    x, w = torch.randn(8, 16) / 4, torch.randn(16, 16) / 4
    found = []
    for g, where in ((f, "cpu"), (torch.compile(f, backend="spiral", fullgraph=True), device)):
        there = [t.to(where).requires_grad_() for t in (x, w)]
        out = sum(t.sin().sum() for t in g(*there))
        found.append([t.cpu() for t in torch.autograd.grad(out, there)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(517, 1040), (8, 300, 33)], ids=str)
def test_reductions_over_slow_dimensions(device, shape):
    """Whole vectors and the rest, long and short; transposed and expanded operands; one loop and several."""

    def f(x, m):
        columns = tuple(range(x.ndim - 1))
        return (
            (x * (x - m)).sum(columns),
            x.amax(columns),
            (x > 1).any(0),
            x.var(0),
            x.softmax(0),
            x.mT.sum(-1),
            (x + m).sum(),
        )

    x = torch.randn(*shape)
    for a, m in ((x[..., 1:], x[..., :1].expand_as(x[..., 1:])), (x.mT.contiguous().mT, x[..., :1])):
        check(device, f, a, m, tolerance=3e-4)


@pytest.mark.parametrize("width", [64, 24])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_concatenation_of_heads_and_its_sum(device, width, heads):
    """(x + c) // d and (x + c) % d under masks: whole vectors and shorter runs; offset and expanded operands."""

    def f(q, k, v):
        parts = [t.transpose(1, 2).reshape(2, 20, -1) for t in (q, k, v)]
        whole = torch.cat(parts, 2)
        return whole, whole.sum((0, 1)), F.pad(whole, (3, width)), whole.amax(-1), torch.roll(whole, 5, -1)

    q, k = torch.randn(2, 2, heads, 20, width)
    v = torch.randn(2, 20, heads, width + 1)[..., 1:].transpose(1, 2)
    check(device, f, q, k, v, tolerance=1e-4)
    check(device, f, q[:1].expand_as(q), k.flip(0), v, tolerance=1e-4)


def test_indices_are_compared_with_numbers_of_64_bits(device):
    def f(t, small):
        at = torch.arange(20, device=t.device)
        kinds = (torch.where(at < 9, 4, 7), torch.where(at == 2**33, 1, 0), torch.where(small > 2, -1, small))
        return at == t, at != t[:, :1], at < t, at >= t.flip(0), at == small, kinds[0].to(torch.int8), *kinds

    t = torch.tensor([3, 2**32 + 4, -1, -(2**31), 2**63 - 1, 19, 20, -(2**63), 0, 2**31]).repeat(3, 2)
    check(device, f, t, torch.arange(-10, 10, dtype=torch.int32))


def test_quotients_and_conditions_of_indices():
    """What is known to be simpler, against floor arithmetic for every coordinate."""
    from torch_spiral.compiler.indices import floor_division, lower
    from torch_spiral.kernels import ir

    x, y = (ir.Node("leaf", "i32", attr=name) for name in "xy")
    sizes = {x: 4, y: 5}
    python = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "quotient": lambda a, b: a // b,
        "remainder": lambda a, b: a % b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "and": lambda a, b: a & b,
        "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "where": lambda c, a, b: a if c else b,
        "idiv": lambda a, b: int(a / b), "irem": lambda a, b: a - b * int(a / b),
    }  # fmt: skip

    def value(n, at):
        return at[n] if n.op == "leaf" else n.attr if n.op == "const" else python[n.op](*(value(a, at) for a in n.args))

    sums = [y * a + x * b + c for a in (1, 4, 8, -4) for b in (1, 2) for c in (-16, -5, 0, 3, 8)]
    shorter = 0
    for n in sums:
        for d in (1, 2, 4, 8, 16):
            exprs = [
                floor_division("quotient", n, ir.const(d, "i32")),
                floor_division("remainder", n, ir.const(d, "i32")),
            ]
            exprs += [getattr(ir, op)(n, d) for op in ("lt", "le", "gt", "ge", "idiv", "irem")]
            exprs.append(ir.where(ir.and_(exprs[2], exprs[5]), x, y))
            for e in exprs:
                low = lower(e, {k: (0, size - 1) for k, size in sizes.items()}, {})
                assert not any(m.op in ("quotient", "remainder") for m in ir.walk(low))
                shorter += len(ir.walk(low)) < len(ir.walk(e))
                for at in ({x: i, y: j} for i in range(sizes[x]) for j in range(sizes[y])):
                    assert value(low, at) == value(e, at), (e, low, at)
    assert shorter > len(sums)  # it is not that nothing is simplified


@pytest.mark.parametrize("shape", [(7, 100), (3, 1024)], ids=str)
def test_rows_keep_what_later_loops_need(device, shape):
    def f(x, w):
        y = x.softmax(-1)
        z = y * (w - (y * w).sum(-1, keepdim=True))
        return y, z.tanh() / z.tanh().abs().sum(-1, keepdim=True), z.sum(-1)

    x, w = torch.randn(2, *shape)
    check(device, f, x, w)
    check(device, f, x[:, 1:], w[:1].expand(shape[0], -1)[:, 1:])
    if torch.spiral.get_device_properties(device).schedule_class == "vector" and shape[1] == 1024:
        (group,) = explain(f, x.to(device), w.to(device)).groups
        body = group.source[group.source.index("__kernel") :]
        assert "shared0" in body
        for name in ("exp", "tanh"):  # one loop of the row computes it
            assert 1 <= body.count(f"= {name}_f32x16(") <= 5


def test_sums_of_everything_are_cut_for_all_cores(device):
    def f(x, w):
        return (x.softmax(-1) * w).sum()

    x, w = torch.randn(2, 256, 600)
    check(device, f, x, w, tolerance=1e-4)
    groups = explain(f, x.to(device), w.to(device)).groups
    assert len(groups) <= 3
    if (
        torch.spiral.get_device_properties(device).schedule_class == "vector"
    ):  # rows of the softmax, then the sum of their sums
        assert len(groups) == 2 and "256u" in groups[0].source


@pytest.mark.parametrize("name", ["softmax", "layer norm"])
def test_rows_to_come_are_fetched_by_the_loop_that_leaves_memory_idle(device, name):
    """The one that computes exponentials, else the last one, which reads what is in the cache."""

    def f(x, w):
        y = x.softmax(-1) * w if name == "softmax" else F.layer_norm(x, x.shape[-1:]) * w
        return y - y.mean(-1, keepdim=True)

    x, w = torch.randn(2, 9, 1024)
    check(device, f, x, w)
    check(device, f, x[::2], w[::2])
    if torch.spiral.get_device_properties(device).schedule_class == "vector":
        (group,) = explain(f, x.to(device), w.to(device)).groups
        loops = group.source[group.source.index("__kernel") :].split("for (;;)")
        fetching = [loop for loop in loops if "PREFETCH(" in loop]
        assert fetching and all(("exp_f32x16(" in loop) == (name == "softmax") for loop in fetching)
        assert name == "softmax" or all("0, b0 +" in loop for loop in fetching)  # it stores the result


# ---- what only prepares an operand of a product -------------------------------------------------------------------------


def ints(*shape):
    return torch.randint(-127, 127, shape, dtype=torch.int8)


PROLOGUES = {  # kernels, f, inputs
    "cast int8 weight": (1, lambda x, w: F.linear(x, w.to(x.dtype)), lambda: (torch.randn(5, 64), ints(24, 64))),
    "int8 weight, scale of a row, bias, relu": (
        1,
        lambda x, w, s, b: F.linear(x, w.to(x.dtype) * s[:, None], b).relu(),
        lambda: (torch.randn(5, 64), ints(24, 64), torch.rand(24), torch.randn(24)),
    ),
    "bfloat16 operands": (
        1,
        lambda x, w: F.linear(x.float(), w.float()).tanh(),
        lambda: (torch.randn(5, 64).bfloat16(), torch.randn(24, 64).bfloat16()),
    ),
    "rows scaled by their norm": (  # the sums of squares are the other kernel
        2,
        lambda x, w: (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)) @ w,
        lambda: (torch.randn(20, 64), torch.randn(64, 24)),
    ),
    "batch, constant": (
        1,
        lambda q, k: (q * 0.125) @ k.transpose(1, 2),
        lambda: (torch.randn(3, 10, 16), torch.randn(3, 12, 16)),
    ),
    "one cast, two products": (
        2,
        lambda x, y, w: ((x @ w.float()).relu(), y @ w.float()),
        lambda: (torch.randn(5, 64), torch.randn(7, 64), torch.randn(64, 24).half()),
    ),
    "factors along the reduction": (
        2,
        lambda x, s, w: (x * s) @ w,
        lambda: (torch.randn(20, 64), torch.rand(64), torch.randn(64, 24)),
    ),
    "read by something else": (  # and the sums, which are not part of a graph
        2,
        lambda x, w: (x @ w.float(), w.float().cumsum(0)),
        lambda: (torch.randn(5, 64), torch.randn(64, 24).half()),
    ),
}


@pytest.mark.parametrize("name", PROLOGUES)
def test_prologues(device, name):
    count, f, make = PROLOGUES[name]
    args = make()
    check(device, f, *args, tolerance=2e-5)
    if torch.spiral.get_device_properties(device).schedule_class != "block":  # whose operands must be of one dtype
        assert len(kernels(f, *on(device, args))) == count


@pytest.mark.parametrize("nd", [2, 3])
def test_fake_convolutions_have_the_layout_of_real_ones(device, nd):
    """What a graph takes for the strides of a result, and of a gradient."""
    register()
    last, spatial = (torch.channels_last, torch.channels_last_3d)[nd - 2], [6, 5, 4][:nd]
    layouts = itertools.product((last, torch.contiguous_format), repeat=3)
    rest = ([1] * nd, [1] * nd, [1] * nd, False, [0] * nd, 1)
    for x_last, w_last, g_last in layouts:
        x = torch.randn(2, 8, *spatial, device=device).contiguous(memory_format=x_last)
        w = torch.randn(8, 8, *[3] * nd, device=device).contiguous(memory_format=w_last)
        g = torch.randn(2, 8, *spatial, device=device).contiguous(memory_format=g_last)

        def results(x, w, g):
            y = torch.ops.aten.convolution(x, w, None, *rest)
            return y, *torch.ops.aten.convolution_backward(g, x, w, None, *rest, [True, True, False])[:2]

        with FakeTensorMode() as mode:
            fake = results(*map(mode.from_tensor, (x, w, g)))
        for real, imagined in zip(results(x, w, g), fake, strict=True):
            assert real.stride() == imagined.stride()


def test_an_infinite_constant_is_no_prologue(device):
    """It makes NaN of a sum of infinities, which it would not of the sum."""
    x, w = torch.randn(5, 64), torch.randn(64, 24)
    f = torch.compile(lambda x, w: (x * float("inf")) @ w, backend="spiral", fullgraph=True)
    assert f(x.to(device), w.to(device)).isnan().all()


def test_a_prologue_reads_before_what_it_reads_is_written(device):
    def f(x, w):
        scaled = w * 2.0
        w.add_(1.0)
        return x @ scaled

    x, w = torch.randn(5, 64), torch.randn(64, 24)
    ours = w.to(device)
    got = torch.compile(f, backend="spiral", fullgraph=True)(x.to(device), ours)
    torch.testing.assert_close(got.cpu(), x @ (w * 2.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.cpu(), w + 1.0)


def test_prepared_parts_of_a_concatenation_are_written(device):
    """They are read by another name: nothing but a product may read what a prologue prepares."""

    def f(x, y, w):
        return torch.cat([x.float() * 2, y.float(), (y.float() @ w[:8]).sigmoid()], 1) @ w

    check(device, f, torch.randn(8, 8).half(), torch.randn(8, 8).half(), torch.randn(24, 8))


class Attention(nn.Module):
    """Queries, keys and values are copied apart, heads before tokens or as in nn.MultiheadAttention; or a cache is empty yet."""

    def __init__(self, width, heads, form):
        super().__init__()
        self.attention, self.form = nn.MultiheadAttention(width, heads, batch_first=True), form

    def forward(self, x):
        if self.form == "module":
            return self.attention(x, x, x, need_weights=False)[0]
        a = self.attention
        b, t, d = x.shape
        if self.form == "heads first":
            qkv = F.linear(x, a.in_proj_weight, a.in_proj_bias).view(b, t, 3, a.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()
            return a.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        q, k, v = (
            z.view(b, t, a.num_heads, -1).transpose(1, 2)
            for z in F.linear(x, a.in_proj_weight, a.in_proj_bias).split(d, 2)
        )
        k, v = (torch.cat([torch.tensor([], dtype=x.dtype, device=x.device), z], -2) for z in (k, v))
        return a.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


@pytest.mark.parametrize(
    ("batch", "width", "heads", "form"),
    [
        pytest.param(1, 24, 4, "module", marks=pytest.mark.full),
        pytest.param(2, 32, 2, "module", marks=pytest.mark.full),
        (2, 32, 2, "cache"),
        (2, 32, 2, "heads first"),
    ],
)
def test_attention_reads_where_copies_would_have_read(device, batch, width, heads, form):
    theirs = Attention(width, heads, form).double().eval()
    x = torch.randn(batch, 37, width, dtype=torch.double)
    ours = copy.deepcopy(theirs).float().to(device)
    xs = x.float().to(device)
    aligned = width // heads % 4 == 0  # else what the copies hold could be read faster
    if aligned:
        # Two put tokens before the batch, and one puts them before the heads.
        assert len(kernels(ours, xs)) == {"module": 5, "cache": 3, "heads first": 4}[form]
    torch._dynamo.reset()
    got, expected = torch.compile(ours, backend="spiral", fullgraph=True)(xs), theirs(x)
    torch.testing.assert_close(got.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=1e-5)
    got.sin().sum().backward()
    expected.sin().sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu().double(), a.grad, rtol=1e-3, atol=1e-4)


def _moved_rows(x, w, b):
    return F.linear(x.transpose(0, 1), w, b).relu()


def _moved_rows_of_a_part(x, w, b):
    return F.linear(x[1:, :, 2:].transpose(0, 1), w[:, 2:], b).relu()


def _moved_rows_of_a_gap(x, w, b):
    return F.linear(x[:, ::2].transpose(0, 1), w, b).relu()


# How many kernels, where rows lie in memory in another order.
MOVED = {
    "linear": (2, _moved_rows),  # the result's order is eager mode's
    "linear, then a sum that needs no order": (2, lambda x, w, b: F.linear(x.transpose(0, 1), w, b).sum()),
    "linear without a bias": (2, lambda x, w, b: F.linear(x.transpose(0, 1), w).tanh()),
    "linear of something computed": (3, lambda x, w, b: F.linear(x.exp().transpose(0, 1), w, b).relu()),
    "linear of a part": (2, _moved_rows_of_a_part),
    "linear of rows with gaps": (1, _moved_rows_of_a_gap),  # a batch
    "as before": (2, lambda x, w, b: F.linear(x.transpose(0, 1), w, b).transpose(0, 1) * 2),
    "nothing": (0, lambda x, w, b: F.linear(x[:0].transpose(0, 1), w, b).relu()),
    "one row": (1, lambda x, w, b: F.linear(x[:1, :1].transpose(0, 1), w, b).relu()),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_rows_of_a_linear_layer_are_computed_in_the_order_of_memory(device, name):
    count, f = MOVED[name]
    args = torch.randn(5, 7, 16), torch.randn(24, 16), torch.randn(24)
    with torch.no_grad():
        check(device, f, *args)
        names = kernels(f, *on(device, args))
    assert len(names) == count, names


def test_keys_that_are_written_or_returned_are_copied(device):
    def f(q, k):
        joined = torch.cat([q.new_empty(0), k.transpose(1, 2)], -2)
        k.mul_(2.0)
        return F.scaled_dot_product_attention(q, joined, joined), joined

    q, k = torch.randn(2, 2, 5, D), torch.randn(2, 6, 2, D)
    got = torch.compile(f, backend="spiral", fullgraph=True)(*on(device, (q, k)))
    for a, b in zip(got, f(q, k), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


# ---- kernel counts ------------------------------------------------------------------------------------------------------


class VisionBlock(nn.Module):
    """A layer of torchvision's vision transformer."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_kernel_count_of_a_transformers_layer(device, autocast):
    """A norm, queries, keys and values at once, attention, its projection, the sum and a norm, two products with what follows. No kernel
    casts a bias or copies queries, keys or values."""
    theirs = VisionBlock(32, 4).double().eval()
    x = torch.randn(3, 37, 32, dtype=torch.double)
    ours, xs = copy.deepcopy(theirs).float().to(device), x.float().to(device)
    with torch.no_grad(), torch.autocast("spiral", torch.bfloat16, enabled=autocast):
        names = [k for k in kernels(ours, xs) if not k.startswith("convert_")]  # of weights, which are kept
        torch._dynamo.reset()
        got = torch.compile(ours, backend="spiral", fullgraph=True)(xs)
    assert len(names) == 7, names
    torch.testing.assert_close(got.cpu().double(), theirs(x).detach(), rtol=1e-4, atol=5e-2 if autocast else 1e-5)


def _decoding(q, caches, counters):
    """Layers of a decoder with a static cache: what each writes to it, and each one's counter."""
    for (keys, values), counter in zip(caches, counters, strict=True):
        at = torch.arange(1, device=q.device) + counter
        counter.add_(1)
        keys.index_copy_(2, at, q.sin())
        values.index_copy_(2, at, q.cos())
        q = F.scaled_dot_product_attention(q, keys, values)
    return q


def _readers_and_writers(x, y, w):
    """Small kernels of one size, each of which must stay where it is."""
    a = x.sin()
    b = a @ w  # reads a
    y.add_(1.0)
    c = b @ y  # reads y as it is now
    y.mul_(2.0)
    d = (c @ y).cos()
    x.copy_(d)
    return a, (b @ x).sin(), d @ w


def _written_views(x, y, w):
    z = x.view(-1)[::2]
    a = z @ y.view(-1)[::2]
    z.add_(a)
    b = x @ w
    y.add_(1.0)
    return (b @ y).sin(), z * 2, y.t() - 1


def test_small_kernels_side_by_side_are_one(device):
    caches = [[torch.randn(2, 4, 12, D) for _ in range(2)] for _ in range(3)]
    make = torch.randn(2, 4, 1, D), caches, [torch.tensor(i) for i in (2, 4, 7)]
    theirs, ours, again = (on(place, make) for place in ("cpu", device, device))
    theirs = tree_map_only(torch.Tensor, torch.clone, theirs)
    with torch.no_grad():
        want, got = _decoding(*theirs), torch.compile(_decoding, backend="spiral", fullgraph=True)(*ours)
        names = kernels(_decoding, *again)
    for a, b in zip(tree_leaves([want, theirs]), tree_leaves([got, ours]), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-5)
    # A layer's keys and values; all counters.
    assert len([n for n in names if n.startswith("fused_")]) == 4, names


@pytest.mark.parametrize("f", [_readers_and_writers, _written_views])
def test_small_kernels_that_depend_on_each_other_stay_apart(device, f):
    make = [torch.randn(8, 8) / 3 for _ in range(3)]
    theirs, ours = [x.clone() for x in make], on(device, make)
    want, got = f(*theirs), torch.compile(f, backend="spiral", fullgraph=True)(*ours)
    for a, b in zip([*want, *theirs], [*got, *ours], strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-5)


def chain(x):
    for _ in range(5):
        x = (x * 1.5 + 0.1).tanh()
    return x


COUNTS = {
    "product, bias, relu": (1, lambda x, w, b: F.relu(x @ w + b), [(8, 16), (16, 24), (24,)]),
    "product, bias, residual, layer norm": (
        2, lambda x, w, b, r: F.layer_norm(x @ w + b + r, (24,), b, b), [(8, 16), (16, 24), (24,), (8, 24)],
    ),
    "two products, a gate": (2, lambda x, v, w: F.silu(x @ v) * (x @ w), [(8, 16), (16, 24), (16, 24)]),
    "a product of another, a gate": (3, lambda x, v: (lambda y: F.silu(y) * (y @ v))(x @ v), [(8, 16), (16, 16)]),
    "softmax": (1, lambda x: x.softmax(-1), [(8, 100)]),
    "gelu(layer norm)": (1, lambda x, w, b: F.gelu(F.layer_norm(x, (100,), w, b)), [(8, 100), (100,), (100,)]),
    "RMS norm": (1, lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w, [(8, 100), (100,)]),
    "ten pointwise ops": (1, chain, [(8, 100)]),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_kernel_count(device, name):
    count, f, shapes = COUNTS[name]
    args = [torch.randn(*s) for s in shapes]
    names = kernels(f, *on(device, args))
    assert len(names) == count, names
    got, want = torch.compile(f, backend="spiral")(*on(device, args)), f(*(x.double() for x in args))
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)


def norm_over(dim):
    return lambda x: (x - x.mean(dim, keepdim=True)) * torch.rsqrt(x.var(dim, unbiased=False, keepdim=True) + 1e-5)


SLOW = {
    "softmax": (lambda x: x.softmax(0), (700, 70)),
    "softmax of few columns": (lambda x: x.softmax(0), (700, 3)),
    "softmax of one column": (lambda x: x.softmax(0), (700, 1)),
    "softmax of long columns": (lambda x: x.softmax(0), (9000, 5)),
    "softmax in the middle": (lambda x: x.softmax(1), (3, 130, 41)),
    "softmax in the middle of four": (lambda x: x.softmax(1), (2, 66, 3, 11)),
    "softmax of a transposed row": (lambda x: x.t().softmax(0), (37, 300)),
    "softmax of a slice": (lambda x: x[3:, 5:].softmax(0), (300, 45)),
    "log softmax": (lambda x: x.log_softmax(0), (300, 64)),
    "normalised columns": (norm_over(0), (300, 33)),
    "normalised channels": (norm_over(1), (2, 70, 30)),
    "with a value a column": (lambda x: (x.softmax(0), x.amax(0), x.logsumexp(0)), (300, 70)),
    "bfloat16": (lambda x: x.softmax(0), (300, 70), torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] if i % 4 else []) for i, n in enumerate(SLOW)]
)
def test_kernel_count_along_slow_dimensions(device, name):
    f, shape, *dtype = SLOW[name]
    x = (3 * torch.randn(shape)).to(*(dtype or [torch.float32]))
    names = kernels(f, x.to(device))
    assert len(names) == 1, names
    tolerance = 1e-2 if dtype else 1e-5
    for got, want in zip(
        tree_leaves(torch.compile(f, backend="spiral")(x.to(device))), tree_leaves(f(x.double())), strict=True
    ):
        torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance)


def test_kernel_count_of_a_softmaxs_backward_along_a_slow_dimension(device):
    x = torch.randn(300, 70)
    y, g = x.softmax(0), torch.randn(300, 70)
    f = torch.ops.aten._softmax_backward_data
    names = kernels(lambda g, y: f(g, y, 0, torch.float32), *on(device, (g, y)))
    assert len(names) == 1, names
    got = torch.compile(lambda g, y: f(g, y, 0, torch.float32), backend="spiral")(*on(device, (g, y)))
    torch.testing.assert_close(got.cpu().double(), f(g.double(), y.double(), 0, torch.float64), rtol=1e-5, atol=1e-6)


def test_kernel_count_of_a_chains_backward(device):
    f = torch.compile(chain, backend="spiral", fullgraph=True)
    x = torch.randn(8, 100, device=device, requires_grad=True)
    for _ in range(2):
        y = f(x)
        gradient = torch.ones_like(y)
        before = _C.plan_statistics()["launches"]
        torch.autograd.grad(y, x, gradient)
        launched = _C.plan_statistics()["launches"] - before
    assert launched == 1


def test_kernel_count_of_cross_entropy(device):
    assert len(kernels(F.cross_entropy, torch.randn(8, 100).to(device), torch.arange(8).to(device))) <= 2


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, d=64, heads=4):
        super().__init__()
        self.heads, self.ln1, self.ln2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj, self.fc, self.out = (
            nn.Linear(d, 3 * d),
            nn.Linear(d, d),
            nn.Linear(d, 4 * d),
            nn.Linear(4 * d, d),
        )

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.ln1(x)).split(d, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.proj(y)
        return x + self.out(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


def test_kernel_counts_of_a_gpt2_block(device):
    from torch_spiral.compiler import runtime

    theirs, ours = Block(), Block()
    ours.load_state_dict(theirs.state_dict())
    ours.to(device)
    x = torch.randn(2, 16, 64)
    assert len(kernels(ours, x.to(device))) <= 8
    xs, xc = x.to(device).requires_grad_(), x.clone().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(ours, backend="spiral", fullgraph=True)(xs)
    torch.testing.assert_close(y.detach().cpu(), theirs(xc).detach(), rtol=1e-4, atol=1e-4)
    runtime.recorded.clear()
    _C.clear_plans()
    y.sum().backward()
    theirs(xc).sum().backward()
    names = [k for g in runtime.recorded for k in g.kernels if not PACKING.search(k)]
    assert len(names) <= 20, names
    for a, b in zip([xc, *theirs.parameters()], [xs, *ours.parameters()], strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-3)


class Residual(nn.Module):
    """Blocks that normalise what they add to, as in GPT-2 and ViT."""

    def __init__(self, width, depth=2):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        x = x * 2
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return F.rms_norm(x, x.shape[-1:])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 9), "float32"), pytest.param((3, 16, 64), "bfloat16", marks=pytest.mark.full)]
)
def test_products_add_what_a_norm_after_them_reads(device, shape, dtype):
    """Each norm reads one tensor, which the product before it stores; the last sum is read by its norm alone, which adds."""
    dtype = getattr(torch, dtype)
    theirs, x = Residual(shape[-1]).double(), torch.randn(shape)
    ours, xs = copy.deepcopy(theirs).to(device, dtype), x.to(device, dtype)
    with torch.no_grad():
        found = explain(ours, xs)
    assert [s.title for s in found.hosts[0]] == ["fused", "addmm + add", "fused", "addmm", "fused"]
    assert [len(s.reads) for s in found.hosts[0] if s.title == "fused"] == [3, 3, 2]
    torch._dynamo.reset()
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    weights = torch.randn(shape)
    got, expected = torch.compile(ours, backend="spiral", fullgraph=True)(xs), theirs(x.double())
    torch.testing.assert_close(got.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    (got * weights.to(device, dtype)).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        scale = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad.cpu().double(), a.grad, rtol=10 * tolerance, atol=tolerance * scale)


def test_epilogues_of_large_products(device, monkeypatch, tmp_path):
    """Operands' indices are affine in the rows: two rows tell them."""
    from torch_spiral.compiler import epilogue

    monkeypatch.setattr(epilogue, "LIMIT", 64)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # whose keys know nothing of this limit

    def f(x, w, b, r):
        return F.gelu(x @ w + b) * r[:, :1] + r

    args = [torch.randn(100, 16), torch.randn(16, 24), torch.randn(24), torch.randn(100, 24)]
    assert len(kernels(f, *on(device, args))) == 1
    check(device, f, *args)


def test_partial_sums_are_summed_once(device):
    """Sums of columns are cut for all cores, and their parts are summed by one more kernel."""
    x = torch.randn(2048, 96)
    assert len(kernels(lambda x: x.sum(0), x.to(device))) <= 2
    assert len(kernels(lambda x: x.var(0), x.to(device))) <= 2
    check(device, lambda x: (x.sum(0), x.var(0), x.amax(0)), x, tolerance=1e-4)


def test_explain(device):
    x = torch.randn(4, 100).to(device)
    e = explain(lambda x: x.softmax(-1), x)
    (group,) = e.groups
    assert e.launches == 1 and group.bytes == 2 * 4 * 400 and group.flops > 400
    assert "softmax" in group.origins and group.source in str(e).replace("\n    ", "\n")


def test_several_outputs_are_stored_as_vectors(device):
    if torch.spiral.get_device_properties(device).schedule_class != "vector":
        pytest.skip("vectors are for OpenCL on CPUs")
    x = torch.randn(64, 100, device=device)
    (group,) = explain(lambda x: (x.relu(), x <= 0, x.exp()), x).groups
    assert group.source.count("vstore16(") == 3 and ".sf]" not in group.source


def test_columns_are_read_as_vectors(device):
    if torch.spiral.get_device_properties(device).schedule_class != "vector":
        pytest.skip("vectors are for OpenCL on CPUs")
    x = torch.randn(300, 64, device=device)
    (group,) = explain(lambda x: ((x * x).sum(0), x.sum(0)), x).groups
    assert "vload16(" in group.source and ".sf]" not in group.source


def test_a_concatenation_of_heads_is_read_as_vectors(device):
    if torch.spiral.get_device_properties(device).schedule_class != "vector":
        pytest.skip("vectors are for OpenCL on CPUs")
    q, k = torch.randn(2, 2, 4, 20, 64, device=device)

    def f(q, k):
        return torch.cat([t.transpose(1, 2).reshape(2, 20, 256) for t in (q, k)], 2).sum((0, 1))

    source = explain(f, q, k).groups[0].source
    assert "vload16(" in source and ".sf]" not in source


def test_explain_as_a_picture(device, tmp_path):
    import xml.etree.ElementTree as xml

    with torch.no_grad():
        e = explain(lambda x, w: (F.gelu(x @ w) @ w).softmax(-1).cumsum(0), *torch.randn(2, 8, 8, device=device))
    titles = [s.title for s in e.hosts[0]]
    assert titles[:3] == ["mm + gelu", "mm", "fused"] and "cumsum" in titles[-1]
    assert set(e.hosts[0][1].reads) & set(e.hosts[0][0].writes)
    tree = xml.fromstring(e.svg(tmp_path / "graph.svg"))
    texts = "\n".join(t.text or "" for t in tree.iter("{http://www.w3.org/2000/svg}text"))
    sources = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert "mm + gelu" in texts and e.groups[0].name in texts and e.groups[0].source in sources
    assert (tmp_path / "graph.svg").read_text().startswith("<svg")


def test_generated_source():
    """The host side of a graph, whole."""
    from conftest import ENGINES
    from torch._inductor.utils import run_and_get_code

    if "opencl" not in ENGINES:
        pytest.skip("the expected text is for OpenCL")
    device = torch.device("spiral", ENGINES["opencl"])
    x, w, b = torch.randn(8, 16, device=device), torch.randn(16, 24, device=device), torch.randn(24, device=device)
    with torch._inductor.config.patch(fx_graph_cache=False), torch.no_grad():
        _, (code,) = run_and_get_code(
            torch.compile(lambda x, w, b: F.relu(x @ w + b).sum(1), backend="spiral"), x, w, b
        )
    text = code[code.index("def graph_0") : code.index("graph_0 = ")]
    assert text.strip() == textwrap.dedent(
        """\
        def graph_0(inputs, written, sizes):
            (arg2_1, arg0_1, arg1_1,) = inputs
            buf0 = spiral.GLOBALS["empty"]((8, 24), (24, 1), 'f32')
            spiral.GLOBALS["extern_kernels"].addmm(arg2_1, arg0_1, arg1_1, alpha=1, beta=1, out=buf0)
            buf1 = spiral.GLOBALS["empty"]((8,), (1,), 'f32')
            fused_0((buf1, buf0), (), (8,), (24,))
            return (buf1, )"""
    )


# ---- calls --------------------------------------------------------------------------------------------------------------


def test_inference_is_called_without_python(device):
    """A graph that needs nothing of AOTAutograd is the compiled function itself."""
    called = []

    def backend(gm, inputs):
        from torch_spiral.compiler import backend

        called.append(backend(gm, inputs))
        return called[-1]

    def f(x, w):
        return ((x @ w).relu() @ w).softmax(-1), (x + 1).t()

    x, w = torch.randn(8, 8), torch.randn(8, 8)
    with torch.no_grad():
        g = torch.compile(f, backend=backend)
        for _ in range(3):
            for a, b in zip(f(x, w), g(x.to(device), w.to(device)), strict=True):
                assert a.stride() == b.stride()
                torch.testing.assert_close(b.cpu(), a)
    assert [type(c) for c in called] == [_C.GraphCall]
    with pytest.raises(TypeError, match="2 arguments"):
        called[0](x.to(device))
    with pytest.raises(TypeError, match="no tensor"):
        called[0](x.to(device), 3)


def test_hooks_for_saved_tensors_are_asked_for_where_tensors_are_saved(device):
    """A call without gradients has no guard on the hooks; one with gradients has, and is right under hooks that Dynamo inlines."""
    guards = []

    def f(x, w):
        return (x @ w).sigmoid().sum()

    def note(entries):
        guards.append({entry.guard_type for entry in entries})
        return [True] * len(entries)

    x, w = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    expected = f(x, w.requires_grad_())
    (gradient,) = torch.autograd.grad(expected, w)
    a, b = x.float().to(device), w.detach().float().to(device)
    g = torch.compile(f, backend="spiral", fullgraph=True, options={"guard_filter_fn": note})
    hooks = [torch.fx.symbolic_trace(h) for h in (lambda t: t * 2, lambda t: t / 2)]
    with torch.no_grad():
        torch.testing.assert_close(g(a, b).cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            torch.testing.assert_close(g(a, b).cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert len(guards) == 1 and "AUTOGRAD_SAVED_TENSORS_HOOKS" not in guards[0] and "GRAD_MODE" in guards[0]
    b.requires_grad_()
    (got,) = torch.autograd.grad(g(a, b), b)
    torch.testing.assert_close(got.cpu().double(), gradient, rtol=1e-5, atol=1e-5)
    assert len(guards) == 2 and "AUTOGRAD_SAVED_TENSORS_HOOKS" in guards[1]
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        (got,) = torch.autograd.grad(g(a, b), b)
    torch.testing.assert_close(got.cpu().double(), gradient, rtol=1e-5, atol=1e-5)
    assert len(guards) == 3


def test_written_arguments_count_the_write(device):
    f = torch.compile(lambda x, y: x.add_(y), backend="spiral", fullgraph=True)
    x, y = torch.zeros(5, device=device), torch.ones(5, device=device)
    for n in range(1, 4):
        before = x._version
        with torch.no_grad():
            assert f(x, y) is x
        assert x._version > before and x.sum().item() == 5 * n


def test_temporaries_share_memory(device):
    """A chain of products holds two intermediate results at a time, not all of them."""

    def f(x, w):
        for _ in range(8):
            x = (x @ w).softmax(-1)
        return x

    g = torch.compile(f, backend="spiral", fullgraph=True)
    x, w = torch.randn(512, 512, device=device), torch.randn(512, 512, device=device)
    with torch.no_grad():
        for _ in range(3):
            y = g(x, w)
        torch.spiral.reset_peak_memory_stats(device)
        before = torch.spiral.memory_allocated(device)
        y = g(x, w)  # noqa: F841
    one = 4 * 512 * 512
    assert torch.spiral.max_memory_allocated(device) - before <= 8 * one


# ---- caches -------------------------------------------------------------------------------------------------------------


def test_a_second_process_starts_without_compiling(device, tmp_path):
    """Nothing is compiled again: an inference graph is found without Inductor, graphs of training by Inductor, kernels by the engine, and they add
    nothing to what the first process left on disk."""
    code = f"""
        import sys
        import torch
        from torch import nn
        from torch._dynamo.utils import counters
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8)).to({str(device)!r})
        with torch.no_grad():
            y = torch.compile(m, backend="spiral", fullgraph=True)(torch.ones(4, 16, device={str(device)!r}))
        print(y.sum().item(), "torch._inductor.compile_fx" in sys.modules)
        torch.compile(m, backend="spiral", fullgraph=True)(torch.ones(4, 16, device={str(device)!r})).sum().backward()
        print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
    """
    environment = dict(
        os.environ, SPIRAL_CACHE_DIR=str(tmp_path / "kernels"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor")
    )
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr
        files = {p: p.stat().st_mtime_ns for p in (tmp_path / "kernels").rglob("*") if p.is_file()}
        found.append((done.stdout.split(), files))
    (first, files), (second, files_after) = found
    assert first[1:] == ["True", "0", "3"] and second[1:] == ["False", "2", "0"] and first[0] == second[0]
    assert files.keys() == files_after.keys()
    if torch.spiral.get_device_properties(device).engine == "opencl":
        assert files
