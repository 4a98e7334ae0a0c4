"""Rotary embeddings, as models write them: compiled, each of queries and keys is one kernel, without a copy of the rotated halves."""

import pytest
import torch


def rotate_half(x):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotary(q, k, cos, sin):
    """q [B, T, H * D] and k [B, T, Hk * D] of projections, cos and sin [B, T, D]: as transformers' apply_rotary_pos_emb."""
    heads = lambda x: x.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)  # noqa: E731
    q, k, cos, sin = heads(q), heads(k), cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.full)])
def test_one_kernel_for_both(device, backward):
    batch, tokens, d = 2, 7, 64
    arguments = [torch.randn(batch, tokens, n * d) for n in (4, 2)] + [torch.randn(batch, tokens, d) for _ in range(2)]
    compiled = torch.compile(rotary, backend="spiral")

    def step(function, where):
        q, k, cos, sin = (x.to(where) for x in arguments)
        q, k = q.requires_grad_(backward), k.requires_grad_(backward)
        with torch.spiral.telemetry() as forward:
            results = function(q, k, cos, sin)
            torch.spiral.synchronize(device)
        if not backward:
            return results, forward, None
        g = [torch.full_like(x, 0.5) for x in results]
        with torch.spiral.telemetry() as back:
            gradients = torch.autograd.grad(results, (q, k), g)
            torch.spiral.synchronize(device)
        return (*results, *gradients), forward, back

    step(compiled, device)
    got, forward, back = step(compiled, device)
    for x, want in zip(got, step(rotary, "cpu")[0]):
        torch.testing.assert_close(x.cpu(), want, rtol=1e-5, atol=1e-5)
    assert len(forward.launches) == 1
    copies = 0 if torch.__version__ >= "2.12" else 2  # 2.11 hands over gradients as contiguous
    assert back is None or len(back.launches) == 1 + copies
