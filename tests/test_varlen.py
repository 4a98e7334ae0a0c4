"""torch.nn.attention.varlen and flash attention, against softmax in float64 sequence by sequence."""

import pytest
import torch

varlen = pytest.importorskip("torch.nn.attention.varlen")
pytestmark = pytest.mark.skipif(
    not hasattr(varlen, "varlen_attn_out"), reason="windows, caches and pages came with torch 2.13"
)
aten = torch.ops.aten
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ALL = (-1, -1)


def attend(q, k, v, scale=None, window=ALL):
    """One sequence [T, H, D] in float64: (out, logsumexp [H, T])."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    offset = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
    left, right = window
    seen = (offset >= -left if left >= 0 else offset == offset) & (offset <= right if right >= 0 else offset == offset)
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0), v), scores.logsumexp(-1)


def reference(q, k, v, ends_q, ends_k, **options):
    spans = [(a, b, c, d) for a, b, c, d in zip([0, *ends_q[:-1]], ends_q, [0, *ends_k[:-1]], ends_k)]
    parts = [attend(q[a:b].double(), k[c:d].double(), v[c:d].double(), **options) for a, b, c, d in spans]
    return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts], 1)


def cumulative(ends, device):
    return torch.tensor([0, *ends], dtype=torch.int32, device=device)


def longest(ends):
    return max(b - a for a, b in zip([0, *ends], ends))


def close(got, want):
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.detach().cpu().double(), want, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize(
    "dtype,window,heads,kv,head",
    [
        (torch.float32, (9, 3), 4, 2, 24),
        pytest.param(torch.float32, (-1, 0), 2, 2, 32, marks=pytest.mark.full),
        pytest.param(torch.float32, ALL, 2, 1, 64, marks=pytest.mark.full),
        pytest.param(torch.bfloat16, (-1, 0), 2, 2, 32, marks=pytest.mark.full),
        pytest.param(torch.float16, (70, 0), 2, 2, 16, marks=pytest.mark.full),
    ],
)
def test_varlen_attn(device, dtype, window, heads, kv, head):
    """Sequences of 0 and 1 tokens, of less and more than a tile, fewer keys than queries."""
    ends_q, ends_k = [5, 5, 6, 136, 150], [70, 75, 75, 275, 280]
    q = torch.randn(ends_q[-1], heads, head).to(dtype)
    k, v = (torch.randn(ends_k[-1], kv, head).to(dtype) for _ in range(2))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference(*leaves, ends_q, ends_k, window=window)
    g = torch.randn_like(want).to(dtype)
    gradients = [x.nan_to_num(0) for x in torch.autograd.grad(want, leaves, g.double())]
    x, y, z = (t.to(device).requires_grad_() for t in (q, k, v))
    out, lse = varlen.varlen_attn(
        x, y, z, cumulative(ends_q, device), cumulative(ends_k, device), longest(ends_q), longest(ends_k), window_size=window,
        enable_gqa=heads != kv, return_aux=varlen.AuxRequest(lse=True),
    )  # fmt: skip
    close(out, want.detach())
    torch.testing.assert_close(lse.detach().cpu().double(), want_lse.detach(), rtol=1e-3, atol=1e-3)
    for got, expected in zip(torch.autograd.grad(out, (x, y, z), g.to(device)), gradients):
        close(got, expected)


def test_views_and_scale(device):
    """Queries, keys and values cut out of one tensor, as a projection gives them."""
    ends = [7, 40]
    qkv = torch.randn(40, 3, 2, 20)
    x = qkv.to(device)
    q, k, v = x.unbind(1)
    cum = cumulative(ends, device)
    want, _ = reference(*qkv.unbind(1), ends, ends, scale=0.3, window=(-1, 0))
    close(varlen.varlen_attn(q, k, v, cum, cum, 33, 33, scale=0.3, window_size=(-1, 0)), want)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))  # no unit stride along the heads
    close(varlen.varlen_attn(q, k, v, cum, cum, 33, 33, scale=0.3, window_size=(-1, 0)), want)


def test_cache_and_pages(device):
    """One query a sequence against slots of which a part is used, then the same keys in pages. Unused slots hold NaN."""
    used, slot, page, heads, head = [3, 37, 16], 48, 16, 2, 32
    keys, values = (torch.full((len(used), slot, heads, head), torch.nan) for _ in range(2))
    for i, n in enumerate(used):
        keys[i, :n], values[i, :n] = torch.randn(n, heads, head), torch.randn(n, heads, head)
    q = torch.randn(len(used), heads, head)
    want = torch.cat(
        [attend(q[i : i + 1].double(), keys[i, :n].double(), values[i, :n].double())[0] for i, n in enumerate(used)]
    )
    cum_q = cumulative([1, 2, 3], device)
    lengths = torch.tensor(used, dtype=torch.int32, device=device)
    flat = [x.flatten(0, 1).to(device) for x in (keys, values)]
    got = varlen.varlen_attn(
        q.to(device), *flat, cum_q, cumulative([48, 96, 144], device), 1, slot, seqused_k=lengths, window_size=(-1, 0)
    )
    close(got, want)
    order = torch.randperm(9)
    pool = [torch.empty(9, page, heads, head) for _ in range(2)]
    for there, here in zip(pool, (keys, values)):
        there[order] = here.reshape(9, page, heads, head)
    table = order.view(3, 3).to(torch.int32).to(device)
    args = q.to(device), *(x.to(device) for x in pool), cum_q, None, 1, slot
    close(varlen.varlen_attn(*args, seqused_k=lengths, block_table=table), want)
    out = torch.empty_like(args[0])
    varlen.varlen_attn_out(out, *args, seqused_k=lengths, block_table=table)
    close(out, want)


def test_dense(device):
    """Flash attention of [B, T, H, D]; its causal mask ends at the last key."""
    q, k, v = torch.randn(2, 9, 2, 16), torch.randn(2, 13, 2, 16), torch.randn(2, 13, 2, 16)
    x, y, z = (t.to(device).requires_grad_() for t in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(x, y, z, None, None, 9, 13, 0.0, True, False)
    parts = [attend(*(t[i].double() for t in (q, k, v)), window=(-1, 0)) for i in range(2)]
    close(out, torch.stack([part for part, _ in parts]))
    torch.testing.assert_close(lse.cpu().double(), torch.stack([part for _, part in parts]), rtol=1e-4, atol=1e-4)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    want = torch.stack([attend(*(t[i] for t in leaves), window=(-1, 0))[0] for i in range(2)])
    for got, expected in zip(torch.autograd.grad(out.sum(), (x, y, z)), torch.autograd.grad(want.sum(), leaves)):
        close(got, expected)


def test_refused(device):
    q = torch.zeros(4, 2, 8, device=device)
    cum = torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="int32"):
        varlen.varlen_attn(q, q, q, cum.long(), cum, 4, 4)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        varlen.varlen_attn(q.double(), q.double(), q.double(), cum, cum, 4, 4)
    with pytest.raises(ValueError, match="same number of heads"):
        varlen.varlen_attn(q, q[:, :1], q[:, :1], cum, cum, 4, 4)
    with pytest.raises(NotImplementedError, match="dropout"):
        aten._flash_attention_forward(q, q, q, cum, cum, 4, 4, 0.5, False, False)
