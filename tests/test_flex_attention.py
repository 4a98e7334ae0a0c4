"""torch.nn.attention.flex_attention against scores in float64: with the fused kernels, upstream's math, and in compiled graphs."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOCUMENTS = torch.arange(150) // 40


@pytest.fixture(autouse=True)
def quiet():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        warnings.filterwarnings("error", message="spiral runs a graph")
        yield


def mods(device):
    """Score and mask modifications by name; what they capture is on the device."""
    slopes, documents = SLOPES.to(device), DOCUMENTS.to(device)
    scores = {
        "none": None,
        "alibi": lambda s, b, h, i, j: s + slopes[h] * (j - i),
        "relative": lambda s, b, h, i, j: s - 0.1 * (i - j).abs(),
        "capped": lambda s, b, h, i, j: 3 * torch.tanh(s / 3),
    }
    masks = {
        "none": None,
        "causal": lambda b, h, i, j: i >= j,
        "documents": lambda b, h, i, j: (documents[i] == documents[j]) & ((i - j).abs() < 25) & (j != 45),
        "even heads": lambda b, h, i, j: (h % 2 == 0) | (i > 20),  # some rows see nothing
    }
    return scores, masks


def reference(q, k, v, score, mask):
    """(out, logsumexp) in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    places = [torch.arange(n).view([-1 if d == i else 1 for d in range(4)]) for i, n in enumerate(s.shape)]
    s = score(s, *places) if score else s
    s = s.masked_fill(~mask(*places).expand(s.shape), -torch.inf) if mask else s
    return s.softmax(-1).nan_to_num(0) @ v, s.logsumexp(-1)


def attend(q, k, v, score, mask, device, compiled=False, lse=False):
    scores, masks = mods(device)
    blocks = None
    if masks[mask]:
        blocks = create_block_mask(
            masks[mask], None, None if mask != "even heads" else 4, q.shape[2], k.shape[2], device=device
        )
    function = torch.compile(flex_attention, backend="spiral") if compiled else flex_attention
    return function(q, k, v, score_mod=scores[score], block_mask=blocks, enable_gqa=True, return_lse=lse)


@pytest.mark.parametrize(
    "score,mask,kv,dtype,fused",
    [
        pytest.param("none", "causal", 4, torch.float32, True, marks=pytest.mark.full),
        ("alibi", "documents", 2, torch.float32, True),
        pytest.param("capped", "even heads", 4, torch.float32, False, marks=pytest.mark.full),
        pytest.param("none", "none", 1, torch.float32, True, marks=pytest.mark.full),
        pytest.param("relative", "none", 4, torch.bfloat16, True, marks=pytest.mark.full),
        pytest.param("none", "even heads", 2, torch.float16, True, marks=pytest.mark.full),
        pytest.param("capped", "documents", 2, torch.float32, False, marks=pytest.mark.full),
    ],
)
def test_forward(device, score, mask, kv, dtype, fused):
    q, k, v = torch.randn(2, 4, 150, 16).to(dtype), *(torch.randn(2, kv, 150, 16).to(dtype) for _ in range(2))
    scores, masks = mods("cpu")
    want, want_lse = reference(q.double(), k.double(), v.double(), scores[score], masks[mask])
    x = [t.to(device) for t in (q, k, v)]
    with torch.spiral.telemetry() as t:
        out, lse = attend(*x, score, mask, device, lse=True)
        torch.spiral.synchronize(device)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=tolerance, atol=tolerance)
    assert any("attention" in x.kernel for x in t.launches) == fused


@pytest.mark.parametrize("capped", [pytest.param(True, marks=pytest.mark.full), False])
def test_compiled(device, capped):
    """In a graph with other work, of which the mask is a kernel; queries and keys stored heads last."""
    slopes, documents = SLOPES.to(device), DOCUMENTS.to(device)
    q, k, v = (torch.randn(2, 150, heads, 16).transpose(1, 2) for heads in (4, 2, 2))

    def score(s, b, h, i, j):
        s = s + slopes.to(s.device)[h] * (j - i)
        return 2 * torch.tanh(s) if capped else s

    def mask(b, h, i, j):
        return documents.to(i.device)[i] == documents.to(i.device)[j]

    def attention(q, k, v, blocks):
        return flex_attention(2 * q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True) + 1

    want, _ = reference(2 * q.double(), k.double(), v.double(), score, mask)
    blocks = create_block_mask(mask, None, None, 150, 150, device=device)
    x = [t.to(device) for t in (q, k, v)]
    compiled = torch.compile(attention, backend="spiral")
    compiled(*x, blocks)
    with torch.spiral.telemetry() as t:
        got = compiled(*x, blocks)
        torch.spiral.synchronize(device)
    torch.testing.assert_close(got.cpu().double(), want + 1, rtol=2e-5, atol=2e-5)
    names = [launch.kernel for launch in t.launches]
    assert len(names) <= 12 and any("attention" in name for name in names) != capped, names


@pytest.mark.full
def test_compiled_with_gradients(device):
    """Gradients, also of what a score modification captures."""
    slopes = torch.tensor([0.3, -0.1], dtype=torch.float64)
    q, k, v = (torch.randn(1, 2, 140, 16, dtype=torch.float64) for _ in range(3))

    def attention(q, k, v, slopes, mask):
        return flex_attention(2 * q, k, v, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask=mask) + 1

    def causal(b, h, i, j):
        return i >= j

    leaves = [x.clone().requires_grad_() for x in (q, k, v, slopes)]
    out, _ = reference(2 * leaves[0], *leaves[1:3], lambda s, b, h, i, j: s + leaves[3][h] * (j - i), causal)
    g = torch.randn_like(out)
    gradients = torch.autograd.grad(out + 1, leaves, g)
    here = [x.float().to(device).requires_grad_() for x in (q, k, v, slopes)]
    mask = create_block_mask(causal, None, None, 140, 140, device=device)
    got = torch.compile(attention, backend="spiral")(*here, mask)
    torch.testing.assert_close(got.detach().cpu().double(), out.detach() + 1, rtol=2e-5, atol=2e-5)
    for x, want in zip(torch.autograd.grad(got, here, g.float().to(device)), gradients):
        torch.testing.assert_close(x.cpu().double(), want, rtol=1e-4, atol=1e-3)


def test_autocast_and_refusals(device):
    q = torch.randn(1, 2, 40, 16)
    x = q.to(device)
    with torch.autocast("spiral", dtype=torch.bfloat16):
        got = attend(x, x, x, "none", "none", device)
    assert got.dtype == torch.bfloat16
    want, _ = reference(*[q.double()] * 3, None, None)
    torch.testing.assert_close(got.cpu().double(), want, rtol=3e-2, atol=3e-2)
    with pytest.raises(ValueError, match="same embedding dimension"):
        flex_attention(x, x[..., :8], x)
    with pytest.raises(RuntimeError, match="same device"):
        flex_attention(
            x, x, x, block_mask=create_block_mask(lambda b, h, i, j: i >= j, None, None, 40, 40, device="cpu")
        )
