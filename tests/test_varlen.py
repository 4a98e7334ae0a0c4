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


def test_few_queries_with_gradients(device):
    """Each sequence has at most three, which see keys in other kernels than tiles of queries do."""
    ends_q, ends_k, window = [3, 4, 6], [70, 75, 205], (-1, 0)
    q, k, v = torch.randn(6, 4, 20), torch.randn(205, 2, 20), torch.randn(205, 2, 20)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, _ = reference(*leaves, ends_q, ends_k, window=window)
    g = torch.randn_like(want).float()
    x = [t.to(device).requires_grad_() for t in (q, k, v)]
    for splits in (None, 3):
        cums = cumulative(ends_q, device), cumulative(ends_k, device)
        out = varlen.varlen_attn(*x, *cums, 3, 130, window_size=window, enable_gqa=True, num_splits=splits)
        close(out, want.detach())
        gradients = torch.autograd.grad(want, leaves, g.double(), retain_graph=True)
        for got, expected in zip(torch.autograd.grad(out, x, g.to(device)), gradients):
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


def paged(used, page, kv, head, dtype=torch.float32, spare=2):
    """Keys and values of each sequence, the pools of pages that hold them in some order, and the table. What is not used is NaN."""
    width = max(-(-n // page) for n in used) + 1
    keys, values = ([torch.randn(n, kv, head).to(dtype) for n in used] for _ in range(2))
    total = sum(-(-n // page) for n in used)
    order = iter(torch.randperm(total + spare).tolist())
    table = torch.full((len(used), width), -7, dtype=torch.int32)  # no page, where no key counts
    pools = [torch.full((total + spare, page, kv, head), torch.nan, dtype=dtype) for _ in range(2)]
    for i, n in enumerate(used):
        for j in range(-(-n // page)):
            table[i, j] = number = next(order)
            for pool, parts in zip(pools, (keys, values)):
                part = parts[i][j * page : (j + 1) * page]
                pool[number, : len(part)] = part
    return keys, values, pools, table


@pytest.mark.parametrize(
    "counts,used,page,window,splits,dtype",
    [
        ([1, 1, 1, 1], [70, 3, 0, 37], 16, (-1, 0), None, torch.float32),
        ([1, 1, 1], [301, 1, 130], 24, ALL, 3, torch.float32),
        ([5, 0, 20, 9, 1], [70, 12, 20, 0, 3], 24, (-1, 0), None, torch.float32),
        ([2, 7, 3], [150, 7, 90], 20, (30, 2), 4, torch.float32),
        pytest.param([2, 60, 9], [150, 70, 9], 64, (30, 2), None, torch.float32, marks=pytest.mark.full),
        pytest.param([1, 1, 1], [700, 1, 130], 256, (-1, 0), None, torch.bfloat16, marks=pytest.mark.full),
        pytest.param([40, 3, 1], [41, 3, 130], 7, ALL, 2, torch.float16, marks=pytest.mark.full),
    ],
)
def test_pages(device, counts, used, page, window, splits, dtype):
    """Ragged lengths, pages that are no multiple of a tile, query heads that share keys, keys in several runs."""
    heads, kv, head = 4, 2, 24
    keys, values, pools, table = paged(used, page, kv, head, dtype)
    ends = torch.tensor(counts).cumsum(0).tolist()
    q = torch.randn(ends[-1], heads, head).to(dtype)
    parts = [
        attend(q[end - n : end].double(), k.double(), v.double(), window=window)
        for n, end, k, v in zip(counts, ends, keys, values)
    ]
    k, v = (x.to(device) for x in pools)
    with torch.spiral.telemetry() as t:
        out, lse = varlen.varlen_attn(
            q.to(device), k, v, cumulative(ends, device), None, max(counts), max(used), seqused_k=torch.tensor(used, dtype=torch.int32).to(device),
            block_table=table.to(device), window_size=window, enable_gqa=True, num_splits=splits,
            return_aux=varlen.AuxRequest(lse=True),
        )  # fmt: skip
        torch.spiral.synchronize(device)
    close(out, torch.cat([x for x, _ in parts]))
    torch.testing.assert_close(lse.cpu().double(), torch.cat([x for _, x in parts], 1), rtol=1e-3, atol=1e-3)
    known = "attention", "spans", "pack_b", "fill", "copy"
    assert all(any(name in x.kernel for name in known) for x in t.launches), {x.kernel for x in t.launches}


def test_pages_of_views(device):
    """Pages of one tensor that holds keys and values; a table that is a part of a wider one; queries of no sequence give zeros."""
    used, page, heads, head = [20, 33], 8, 2, 32
    keys, values, pools, table = paged(used, page, heads, head)
    pool = torch.stack(pools, 1).to(device)  # [pages, 2, page, heads, head]
    wide = torch.nn.functional.pad(table, (0, 3), value=1 << 30).to(device)
    q = torch.randn(4, heads, head)
    lengths = torch.tensor(used, dtype=torch.int32, device=device)
    want = [attend(q[i : i + 1].double(), keys[i].double(), values[i].double())[0] for i in range(2)]
    want = torch.cat([*want, torch.zeros(2, heads, head, dtype=torch.float64)])
    for splits in (1, 2):
        got = varlen.varlen_attn(
            q.to(device), pool[:, 0], pool[:, 1], cumulative([1, 2], device), None, 1, 33, seqused_k=lengths,
            block_table=wide[:, : table.shape[1]], num_splits=splits,
        )  # fmt: skip
        close(got, want)


def test_pages_refused(device):
    used, q = torch.tensor([9], dtype=torch.int32, device=device), torch.zeros(1, 2, 8, device=device)
    pool, table, cum = torch.zeros(3, 4, 2, 8, device=device), used.new_zeros(1, 3), cumulative([1], device)

    def attn(table, value=pool, used=used):
        return varlen.varlen_attn(q, pool, value, cum, None, 1, 9, seqused_k=used, block_table=table)

    with pytest.raises(RuntimeError, match="block_table must have dtype"):
        attn(table.long())
    with pytest.raises(RuntimeError, match="block_table must have 1 rows"):
        attn(table.expand(2, 3))
    with pytest.raises(RuntimeError, match="contiguous last dimension"):
        attn(used.new_zeros(3, 2).t()[:1])
    with pytest.raises(RuntimeError, match="block_table requires seqused_k"):
        attn(table, used=None)
    with pytest.raises(RuntimeError, match="page size, heads, head dimension"):
        attn(table, pool[:2])
    with pytest.raises(Exception, match="lists page 3, which key and value don't have"):
        attn(torch.tensor([[0, 2, 3]], dtype=torch.int32, device=device))
        torch.spiral.synchronize(device)


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
