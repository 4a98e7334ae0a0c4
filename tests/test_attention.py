"""Scaled dot product attention against a float64 reference on the CPU: forward, gradients, layouts, which back end is chosen."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from philox import drawn_key, kept
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from torch_spiral import _C
from torch_spiral.kernels.simt import attention as simt

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OVERRIDEABLE = SDPBackend.OVERRIDEABLE.value

# batch, heads, kv heads, queries, keys, head, head of v, causal, mask, dtype
CASES = {
    "gpt2": (1, 3, 3, 70, 70, 64, 64, True, None, torch.float32),
    "bool": (2, 4, 2, 33, 70, 24, 40, False, "bool", torch.float32),
    "bias": (2, 4, 2, 33, 70, 24, 40, False, "bias", torch.float32),
    "wide": (1, 2, 1, 20, 65, 256, 72, True, None, torch.float32),
    "decode": (2, 4, 2, 1, 600, 64, 64, False, "bool", torch.float32),
    "decode of a head": (1, 1, 1, 1, 600, 64, 40, False, "bool", torch.float32),
    "half": (1, 2, 2, 3, 5, 17, 17, False, None, torch.float16),
    "bfloat16": (1, 4, 1, 50, 50, 80, 80, True, None, torch.bfloat16),
}
ON_WGPU = ("bias", "decode", "bfloat16")  # each kernel costs a software rasteriser seconds


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.cpu().double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


def attention(leaves, mask, gradient, device, dtype, transform=lambda leaves: leaves, **kwargs):
    """The output and all gradients, in float64 on the CPU."""
    to = lambda x: x.to(dtype if x.is_floating_point() else x.dtype).to(device)  # noqa: E731
    leaves = [to(x).requires_grad_() for x in leaves]
    if mask is not None:
        mask = to(mask)
        if mask.is_floating_point():
            leaves.append(mask.requires_grad_())
    out = F.scaled_dot_product_attention(*transform(leaves[:3]), mask, **kwargs)
    out.backward(to(gradient))
    return [x.detach() for x in (out, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(device, case):
    b, h, hk, tq, tk, d, dv, causal, mask, dtype = CASES[case]
    if torch.spiral.get_device_properties(device).engine != "opencl" and case not in ON_WGPU:
        pytest.skip("covered by the other cases")
    torch.manual_seed(tk)
    leaves = [torch.randn(s).to(dtype) for s in ((b, h, tq, d), (b, hk, tk, d), (b, hk, tk, dv))]
    # (batch, tokens, heads, head) in memory, as a model's next projection leaves it
    gradient = torch.randn(b, tq, h, dv).to(dtype).transpose(1, 2)
    masks = {
        None: None,
        "bool": (torch.rand(b, 1, tq, tk) > 0.4).index_fill(2, torch.tensor(0), tq == 1),
        "bias": torch.randn(h, 1, tk).to(dtype),
    }
    kwargs = {"is_causal": causal, "scale": 0.2, "enable_gqa": h != hk}
    want = attention(leaves, masks[mask], gradient, "cpu", torch.float64, **kwargs)
    got = attention(leaves, masks[mask], gradient, device, dtype, **kwargs)
    for x, y in zip(got, want, strict=True):
        close(x, y, TOLERANCE[dtype])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_negative_scale(device, causal, compiled):
    if compiled and torch.spiral.get_device_properties(device).engine != "opencl":
        pytest.skip("the same graph")
    torch.manual_seed(0)
    leaves = [torch.randn(1, h, t, 8, dtype=torch.float64, requires_grad=True) for h, t in ((4, 9), (2, 11), (2, 11))]
    gradient = torch.randn(1, 4, 9, 8)
    q, k, v = (x if x is leaves[0] else x.repeat_interleave(2, 1) for x in leaves)
    hidden = ~torch.ones(9, 11, dtype=torch.bool).tril() if causal else torch.zeros(9, 11, dtype=torch.bool)
    out = (q @ k.mT * -0.7).masked_fill(hidden, -torch.inf).softmax(-1) @ v  # torch's math path takes the scale's root
    want = [out, *torch.autograd.grad(out, leaves, gradient.double())]
    leaves = [x.detach().float().to(device).requires_grad_() for x in leaves]
    attend = F.scaled_dot_product_attention
    out = (torch.compile(attend, backend="spiral") if compiled else attend)(
        *leaves, is_causal=causal, scale=-0.7, enable_gqa=True
    )
    got = [out, *torch.autograd.grad(out, leaves, gradient.to(device))]
    for x, y in zip(got, want, strict=True):
        close(x.detach(), y.detach(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)], ids=["query", "key and value", "value"])
def test_some_gradients(device, wanted):
    torch.manual_seed(2)
    leaves, gradient = [torch.randn(1, 2, n, 24) for n in (130, 70, 70)], torch.randn(1, 2, 130, 24)
    want = attention(leaves, None, gradient, "cpu", torch.float64, is_causal=True)[1:]
    leaves = [x.to(device).requires_grad_(i in wanted) for i, x in enumerate(leaves)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    got = torch.autograd.grad(out, [leaves[i] for i in wanted], gradient.to(device))
    for x, i in zip(got, wanted, strict=True):
        close(x, want[i], 2e-6)


def test_views_of_a_fused_projection(device):
    """q, k and v are slices of one tensor, transposed: not contiguous, at offsets."""
    torch.manual_seed(1)
    b, h, t, d = 2, 3, 37, 32
    x, gradient = torch.randn(b, t, 3 * h * d), torch.randn(b, t, h, d).transpose(1, 2)
    heads = lambda leaves: [y.view(b, t, h, d).transpose(1, 2) for y in leaves[0].split(h * d, 2)]  # noqa: E731
    want = attention([x], None, gradient, "cpu", torch.float64, heads, is_causal=True)
    got = attention([x], None, gradient, device, torch.float32, heads, is_causal=True)
    assert got[0].transpose(1, 2).is_contiguous()  # the layout that torch's meta function promises
    for a, b in zip(got, want, strict=True):
        close(a, b, 2e-6)


@pytest.mark.parametrize("queries", [3, 9])
def test_probabilities_of_the_backward_pass_add_up_to_one(device, queries):
    """With a gradient of ones, dv adds up to the number of queries; at scores of 100, whatever kernel took the forward pass."""
    torch.manual_seed(8)
    q, k, v = (torch.randn(2, 8, n, 64) for n in (queries, 6, 6))
    q, k = (x / x.norm(dim=-1, keepdim=True) * 28 for x in (q, q[:, :, :1] + 0.3 * k))
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves)
    dv = torch.autograd.grad(out, leaves[2], torch.ones_like(out))[0]
    # The logsumexp is kept as one float32, whose last half digit is 4e-6 here.
    sums = dv.cpu().double().sum(2)
    torch.testing.assert_close(sums, torch.full_like(sums, queries), rtol=4e-6, atol=0)


def test_any_strides(device):
    """No unit stride along the head, an expanded key, an expanded gradient."""
    torch.manual_seed(2)
    leaves = [torch.randn(1, 2, 24, 19), torch.randn(1, 1, 40, 24), torch.randn(1, 2, 40, 24)]
    views = lambda x: (x[0].mT, x[1].expand(1, 2, 40, 24), x[2])  # noqa: E731
    gradient = torch.tensor(0.5).expand(1, 2, 19, 24)
    want = attention(leaves, None, gradient, "cpu", torch.float64, views)
    got = attention(leaves, None, gradient, device, torch.float32, views)
    for a, b in zip(got, want, strict=True):
        close(a, b, 2e-6)


def test_one_query_with_a_growing_cache(device):
    torch.manual_seed(3)
    for keys in (1, 2, 15, 64, 513):
        q, k, v = (
            torch.randn(1, 4, 1, 32),
            torch.randn(1, 2, 520, 32)[:, :, :keys],
            torch.randn(1, 2, 520, 32)[:, :, :keys],
        )
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
        got = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), enable_gqa=True)
        close(got, want, 2e-6)


def test_keys_dealt_to_workgroups(device, monkeypatch):
    """What GPUs do with one query and many keys; software adapters have too few compute units for it."""
    from torch_spiral.kernels.kernel import Target
    from torch_spiral.ops import attention as ops

    if Target.of(device.index).schedule_class != "simt":
        pytest.skip("of the simt class")
    monkeypatch.setattr(ops, "target", lambda: replace(Target.of(device.index), compute_units=64))
    torch.manual_seed(5)
    q, k, v = (torch.randn(3, 2, n, 24) for n in (2, 700, 700))
    mask = torch.rand(3, 1, 2, 700) > 0.5
    mask[1, 0, 1] = False
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    got = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), mask.to(device))
    close(got, want, 2e-6)


def test_rows_that_see_nothing_are_zero(device):
    q, k, v = (torch.randn(1, 1, 4, 8, device=device, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool, device=device)
    mask[2] = False
    out = F.scaled_dot_product_attention(q, k, v, mask)
    out.sum().backward()
    assert (out[0, 0, 2] == 0).all() and out[0, 0, 1].abs().sum() > 0
    for x in (q, k, v):
        assert torch.isfinite(x.grad.cpu()).all()
    assert (q.grad[0, 0, 2] == 0).all()


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("low", [-1e30, torch.finfo(torch.float32).min])
def test_rows_of_the_lowest_scores(device, queries, low):
    """A row that a finite mask hides altogether is the mean of the values, whatever the mask's size. Gradients of such rows cannot be
    right in float32, since the logsumexp has no digits left for the number of keys, but they are those of probabilities."""
    leaves = [torch.randn(1, 2, n, 24) for n in (queries, 41, 41)]
    mask = torch.full((queries, 41), low)
    mask[1::2, :7] = 0.0
    gradient = torch.randn(1, 2, queries, 24)
    out, dq, _, dv = attention(leaves, mask, gradient, device, torch.float32, lambda ls: ls)[:4]
    want = attention(leaves, mask, gradient, "cpu", torch.float64)
    close(out, want[0], 1e-6)
    close(dq[:, :, 1::2], want[1][:, :, 1::2], 1e-5) if queries > 1 else None
    assert dv.abs().max() <= gradient.abs().sum(-2).max() * 1.001 and dq.isfinite().all()


def test_nan_reaches_the_result(device):
    q, k, v = (torch.randn(1, 1, 9, 8) for _ in range(3))
    q[0, 0, 4, 3] = torch.nan
    out = F.scaled_dot_product_attention(*(x.to(device) for x in (q, k, v))).cpu()
    assert out[0, 0, 4].isnan().all() and not out[0, 0, [0, 3, 5]].isnan().any()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 2, 0, 4), (1, 2, 3, 0)], ids=str)
def test_empty(device, sizes):
    b, h, queries, keys = sizes
    q, k, v = (torch.randn(b, h, n, 8, device=device, requires_grad=True) for n in (queries, keys, keys))
    out = F.scaled_dot_product_attention(q, k, v)
    out.sum().backward()
    assert out.shape == (b, h, queries, 8) and (out == 0).all()
    assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in (q, k, v))


def test_choice(device):
    def choice(q, k=None, v=None, mask=None, p=0.0, **kwargs):
        k, v = q if k is None else k, q if v is None else v
        return torch._fused_sdp_choice(q, k, v, mask, p, **kwargs)

    make = lambda *s, **kw: torch.empty(*s, device=device, **kw)  # noqa: E731
    q, math = make(2, 4, 8, 16), SDPBackend.MATH.value
    assert choice(q) == OVERRIDEABLE
    assert choice(q, mask=make(8, 8)) == choice(q, mask=make(2, 1, 1, 8, dtype=torch.bool)) == OVERRIDEABLE
    assert choice(q, make(2, 2, 5, 16), make(2, 2, 5, 16), enable_gqa=True) == OVERRIDEABLE
    assert choice(q, p=0.1) == choice(q, p=1.0) == OVERRIDEABLE
    assert choice(make(2, 4, 8, 257)) == math
    assert choice(make(4, 8, 16)) == math
    with sdpa_kernel(SDPBackend.MATH):
        assert choice(q) == math


def test_choice_of_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 2, 8, 16, device=device)
        out = torch.ops.aten._scaled_dot_product_fused_attention_overrideable(q, q, q)[0]
        assert F.scaled_dot_product_attention(q, q, q).shape == out.shape
        assert out.stride() == q.stride() and out.device == q.device


def equal_scores(device, *shape):
    """q, k and v for which attention is the mask of its dropout over (1 - p) * keys."""
    b, h, queries, keys = shape
    v = torch.eye(keys, device=device).expand(b, h, keys, keys)
    return torch.zeros(b, h, queries, 24, device=device), torch.zeros(b, h, keys, 24, device=device), v


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_mask(device, p):
    """Of the seed, the head and the position alone: whatever the engine, the tiles and the lengths."""
    for shape in ((2, 2, 37, 32), (1, 1, 64, 29)):
        torch.manual_seed(77)
        q, k, v = equal_scores(device, *shape)
        for offset in (0, 16):  # the second call's numbers are others
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p).cpu() * shape[3] * (1 - p)
            mask = kept(drawn_key(77, offset), p, shape)
            torch.testing.assert_close(out, mask.float(), rtol=1e-6, atol=1e-6)
            assert abs(mask.float().mean() - (1 - p)) < 4 * (p * (1 - p) / mask.numel()) ** 0.5


# batch, heads, kv heads, queries, keys, head, head of v, causal, mask, dtype
DROPOUT_CASES = {
    "": (1, 4, 2, 37, 40, 24, 24, False, None, torch.float32),
    "causal": (2, 2, 2, 130, 130, 64, 64, True, None, torch.float32),
    "bool": (2, 4, 2, 33, 70, 24, 40, False, "bool", torch.float32),
    "bias": (2, 4, 2, 33, 70, 24, 40, False, "bias", torch.float32),
    "one query": (2, 4, 2, 1, 600, 16, 16, False, "bool", torch.float32),
    "half": (1, 2, 2, 3, 5, 17, 17, False, None, torch.float16),
    "bfloat16": (1, 4, 1, 50, 50, 80, 80, True, None, torch.bfloat16),
}


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=pytest.mark.full if n in ("causal", "half") else ()) for n in DROPOUT_CASES]
)
def test_dropout_and_gradients(device, case):
    """Views of one projection, of (batch, tokens, heads, head) in memory, against a reference with the same mask."""
    b, h, hk, tq, tk, d, dv, causal, mask, dtype = DROPOUT_CASES[case]
    if torch.spiral.get_device_properties(device).engine != "opencl" and case != "":
        pytest.skip("covered by the other cases")
    torch.manual_seed(tk)
    q = torch.randn(b, tq, h, d).to(dtype).transpose(1, 2)
    kv = torch.randn(b, tk, hk * (d + dv)).to(dtype)
    gradient = torch.randn(dv).to(dtype).expand(b, h, tq, dv)
    added = {
        None: None,
        "bool": torch.rand(b, 1, tq, tk) > 0.4,
        "bias": torch.randn(h, 1, tk).to(dtype),
    }[mask]
    p, scale, results = 0.3, 0.2, []
    for to in (lambda x: x.double() if x.is_floating_point() else x, lambda x: x.to(device)):
        leaves = [to(q).requires_grad_(), to(kv).requires_grad_()]
        bias = added if added is None else to(added)
        if mask == "bias":
            leaves.append(bias.requires_grad_())
        k, v = (x.unflatten(-1, (hk, -1)).transpose(1, 2) for x in leaves[1].split((hk * d, hk * dv), -1))
        if to(q).device.type == "cpu":
            k, v = (x.repeat_interleave(h // hk, 1) for x in (k, v))
            scores = leaves[0] @ k.mT * scale
            if mask is not None:
                scores = scores.masked_fill(~bias, -torch.inf) if mask == "bool" else scores + bias
            if causal:
                scores = scores.masked_fill(~torch.ones(tq, tk, dtype=torch.bool).tril(), -torch.inf)
            out = scores.softmax(-1) * kept(drawn_key(5, 0), p, (b, h, tq, tk)) / (1 - p) @ v
        else:
            torch.manual_seed(5)
            out = F.scaled_dot_product_attention(
                leaves[0], k, v, bias, p, is_causal=causal, scale=scale, enable_gqa=h != hk
            )
        grads = torch.autograd.grad(out, leaves, to(gradient.contiguous()).expand_as(out))
        results.append([x.detach() for x in (out, *grads)])
    for want, got in zip(*results, strict=True):
        close(got, want, 1.5 * TOLERANCE[dtype])


def test_dropout_follows_the_generator(device):
    """The same seed or state gives the same numbers; recomputation under checkpoint, too."""
    torch.manual_seed(3)
    leaves = [torch.randn(1, 2, n, 24, device=device, requires_grad=True) for n in (37, 40, 40)]

    def attend(*leaves):
        return F.scaled_dot_product_attention(*leaves, dropout_p=0.4)

    def run(through):
        torch.manual_seed(9)
        out = through(*leaves)
        return [x.cpu() for x in (out, *torch.autograd.grad(out, leaves, out.detach()))]

    first = run(attend)
    for reentrant in (False, True):
        if reentrant:  # differentiates by backward() alone
            torch.manual_seed(9)
            out = checkpoint(attend, *leaves, use_reentrant=True)
            out.backward(out.detach())
            got = [x.cpu() for x in (out.detach(), *(x.grad for x in leaves))]
        else:
            got = run(lambda *x: checkpoint(attend, *x, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
    state = torch.spiral.get_rng_state(device)
    second = attend(*leaves)
    assert not torch.equal(second, attend(*leaves))
    torch.spiral.set_rng_state(state, device)
    assert torch.equal(second, attend(*leaves)) and not torch.equal(second.cpu(), first[0])


def test_dropout_needs_no_matrix_of_scores(device):
    """Forward and backward take the memory that they take without dropout, but for the seed."""
    leaves = [torch.randn(1, 2, n, 24, device=device, requires_grad=True) for n in (37, 2000, 2000)]
    peaks = []
    for p in (0.0, 0.5):
        torch.spiral.synchronize()
        torch.spiral.reset_peak_memory_stats()
        before = torch.spiral.memory_allocated()
        out = F.scaled_dot_product_attention(*leaves, dropout_p=p)
        grads = torch.autograd.grad(out, leaves, out.detach())
        peaks.append(torch.spiral.max_memory_allocated() - before)
        del out, grads
    assert peaks[1] <= peaks[0] + 4096


def test_dropout_under_vmap(device):
    """Refused unless randomness is said to be the same or different; gradients see the forward's numbers, and so do Jacobians."""

    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).square().sum()

    torch.manual_seed(2)
    q, *shared = (torch.randn(*s, 24, device=device) for s in ((3, 1, 2, 37), (1, 2, 40), (1, 2, 40)))
    q[1] = q[0]
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.func.vmap(f, (0, None, None))(q, *shared)
    for randomness in ("same", "different"):
        torch.manual_seed(4)
        per_sample = torch.func.vmap(torch.func.grad_and_value(f, (0, 1, 2)), (0, None, None), randomness=randomness)
        grads, losses = per_sample(q, *shared)
        assert (losses[0] == losses[1]) == (randomness == "same")
        torch.manual_seed(4)
        if randomness == "same":
            batches = [(q[2], *shared)]
            got = [losses[2], *(g[2] for g in grads)]
        else:  # as one batch
            batches = [(q.flatten(0, 1), *(x.expand(3, *x.shape[1:]) for x in shared))]
            got = [losses.sum(), *(g.flatten(0, 1) for g in grads)]
        leaves = [x.clone().requires_grad_() for x in batches[0]]
        loss = f(*leaves)
        for a, b in zip(got, (loss, *torch.autograd.grad(loss, leaves)), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)

    def rows(q):
        return F.scaled_dot_product_attention(q, *shared, dropout_p=0.5)[0, 0, :3].sum(-1)

    torch.manual_seed(4)
    jacobian = torch.func.jacrev(rows)(q[0])
    torch.manual_seed(4)
    leaf = q[0].clone().requires_grad_()
    torch.testing.assert_close(jacobian[2], torch.autograd.grad(rows(leaf)[2], leaf)[0], rtol=1e-5, atol=1e-5)


def test_dropout_of_compiled_graphs(device):
    """The numbers of the eager call; under checkpoint, too, whose region saves them."""

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k + 1, v, dropout_p=0.3).exp()

    def region(*leaves):
        return checkpoint(attend, *leaves, use_reentrant=False) * 2

    leaves = [torch.randn(1, 2, n, 24, device=device, requires_grad=True) for n in (37, 40, 40)]
    for f in (attend, region):
        results = []
        for g in (f, torch.compile(f, backend="spiral", fullgraph=True)):
            torch.manual_seed(6)
            calls = [g(*leaves), g(*leaves)]
            assert not torch.equal(*calls)
            results.append((*calls, *torch.autograd.grad(calls[1], leaves, calls[1].detach())))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_of_everything_and_of_probabilities_that_are_none(device):
    leaves = [torch.randn(1, 2, n, 24, device=device, requires_grad=True) for n in (37, 40, 40)]
    out = F.scaled_dot_product_attention(*leaves, dropout_p=1.0)
    out.backward(torch.ones_like(out))
    assert all((x == 0).all() for x in (out, *(x.grad for x in leaves)))
    for p in (-0.1, 1.5):
        with pytest.raises(RuntimeError, match=f"dropout probability has to be between 0 and 1, but got {p}"):
            F.scaled_dot_product_attention(*leaves, dropout_p=p)
    empty = torch.randn(1, 2, 0, 24, device=device, requires_grad=True)
    F.scaled_dot_product_attention(empty, *leaves[1:], dropout_p=0.5).sum().backward()
    assert empty.grad.shape == empty.shape


def test_multi_head_attention(device):
    """Training and the inference fast path of torch.nn, against the CPU."""
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    for training in (True, False):
        reference, moved = (
            copy.deepcopy(layer).double().train(training),
            copy.deepcopy(layer).to(device).train(training),
        )
        with torch.set_grad_enabled(training):
            want = reference(x.double(), src_key_padding_mask=padding)
            got = moved(x.to(device), src_key_padding_mask=padding.to(device)).cpu()
        keep = ~padding
        close(got[keep], want[keep].detach(), 1e-5)
        module = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
        with torch.set_grad_enabled(training):
            y = x.double()
            want, weights = copy.deepcopy(module).double()(y, y, y)
            y = x.to(device)
            got, got_weights = module.to(device)(y, y, y)
        close(got, want.detach(), 1e-5)
        close(got_weights, weights.detach(), 1e-5)


def test_vmap(device):
    """Per-sample gradients, with a mask that is shared and one that is not."""

    def f(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask).square().sum()

    torch.manual_seed(0)
    q, (k, v) = torch.randn(3, 1, 2, 5, 8), torch.randn(2, 3, 1, 2, 6, 8)
    for mask, dim in ((torch.randn(5, 6), None), (torch.randn(3, 1, 1, 5, 6), 0)):
        args = (q, k, v, mask)
        g = torch.func.vmap(torch.func.grad_and_value(f, (0, 1, 2, 3)), (0, 0, 0, dim))
        (expected, loss), (got, ours) = g(*args), g(*(a.to(device) for a in args))
        for a, b in zip((*expected, loss), (*got, ours)):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", [simt.Schedule(32, 16, 4, 16, 1), simt.Schedule(32, 32, 4, 16, 1, resident=True)])
def test_tiles_of_gpus(device, schedule, monkeypatch):
    """Rows that the lanes of a subgroup share where it has four of them; queries that stay in shared memory."""
    if torch.spiral.get_device_properties(device).schedule_class != "simt":
        pytest.skip("of the simt class")
    monkeypatch.setattr(simt, "default_schedule", lambda *_: schedule)
    _C.clear_plans()
    for (queries, keys, head, head_v), options in (
        ((37, 51, 40, 24), {"attn_mask": torch.randn(37, 51) > -1}),
        ((70, 70, 32, 33), {"is_causal": True}),
    ):
        q, k, v = torch.randn(2, 2, queries, head), torch.randn(2, 1, keys, head), torch.randn(2, 1, keys, head_v)
        want = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), enable_gqa=True, **options)
        given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
        got = F.scaled_dot_product_attention(*(x.to(device) for x in (q, k, v)), enable_gqa=True, **given)
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
    _C.clear_plans()  # others want the usual schedule
