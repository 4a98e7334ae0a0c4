"""Scans and distances against the CPU."""

import pytest
import torch
import torch.nn.functional as F


def tensors():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, 9, generator=g)
    return (
        x,
        x.transpose(0, 2),
        torch.randn(2, 20000, generator=g),
        torch.randn(20000, generator=g)[3:],
        torch.tensor(2.0),
    )


@pytest.mark.parametrize("dim", [0, -1])
def test_scans(device, dim):
    for x in tensors():
        y = x.to(device)
        torch.testing.assert_close(y.cumsum(dim).cpu().double(), x.double().cumsum(dim), rtol=1e-4, atol=1e-2)
        z = x * 0.01 + 1
        torch.testing.assert_close(z.to(device).cumprod(dim).cpu(), z.cumprod(dim), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(y.logcumsumexp(dim).cpu(), x.logcumsumexp(dim), rtol=1e-4, atol=1e-4)
        for f in (torch.cummax, torch.cummin):
            for got, want in zip(f(y, dim), f(x, dim)):
                torch.testing.assert_close(got.cpu(), want)


def test_dtypes_and_nan(device):
    for x in (torch.randint(0, 9, (40, 3)), torch.rand(40, 3) > 0.5, torch.randn(40, 3, dtype=torch.complex64)):
        got = x.to(device).cumsum(0)
        torch.testing.assert_close(got.cpu(), x.cumsum(0))
    x = torch.tensor([1.0, float("nan"), 3.0, 0.0])
    torch.testing.assert_close(x.to(device).cummax(0)[1].cpu(), x.cummax(0)[1])
    assert torch.empty(0, 3, device=device).cumsum(0).shape == (0, 3)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.0, float("inf")])
def test_distances(device, p):
    a, b = torch.randn(2, 5, 4), torch.randn(2, 6, 4)

    def f(a, b):
        return torch.cdist(a, b, p, compute_mode="donot_use_mm_for_euclid_dist")

    for g, xs in ((f, (a, b)), (lambda x: F.pdist(x, p), (a[0],))):
        wants, gots = ([x.detach().clone().to(d).requires_grad_() for x in xs] for d in ("cpu", device))
        want, got = g(*wants), g(*gots)
        torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=1e-4, atol=1e-5)
        want.sum().backward()
        got.sum().backward()
        for x, y in zip(gots, wants):
            torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=1e-3, atol=1e-5)
