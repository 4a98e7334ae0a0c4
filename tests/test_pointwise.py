"""Elementwise ops whose lowering does more than a line: powers by numbers, nan_to_num's defaults, logit's edges."""

import math

import pytest
import torch
from torch.testing import assert_close


@pytest.mark.parametrize("exponent", [2, 3, -1, -2, 0, 1, 0.5, 1.7, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.complex64], ids=str)
def test_powers(device, dtype, exponent):
    x = torch.tensor([1.5, -2.0, 7.0, 0.3, -0.9999]) if dtype != torch.int32 else torch.tensor([3, -2, 7, 0])
    x = x.to(dtype)
    if dtype == torch.int32 and exponent < 0:
        with pytest.raises(RuntimeError, match="negative integer powers"):
            x.to(device).pow(exponent)
        return
    assert_close(x.to(device).pow(exponent).cpu(), x.pow(exponent), equal_nan=True)
    if dtype == torch.float32 and exponent in (2, 3):  # 1 - x ** 2 near 1 keeps its digits
        assert torch.equal(x.to(device).pow(exponent).cpu(), x * x if exponent == 2 else x * x * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "given", [{}, {"nan": 1.5}, {"posinf": 3.0, "neginf": -2.0}, {"nan": -1.0, "posinf": 2.0}], ids=str
)
def test_nan_to_num(device, dtype, given):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0]).to(dtype)
    if dtype == torch.complex64:
        x = torch.complex(x.real, x.real.flip(0))
    assert_close(x.to(device).nan_to_num(**given).cpu(), x.nan_to_num(**given), rtol=0, atol=0)


@pytest.mark.parametrize("eps", [None, 0.1])
def test_logit_backward(device, eps):
    grads = []
    for d in ("cpu", device):
        x = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0, 1.5], device=d, requires_grad=True)
        torch.logit(x, eps).sum().backward()
        grads.append(x.grad.cpu())
    assert_close(grads[1], grads[0], equal_nan=True)


def test_scattered_narrow_stores_collide_whole(device):
    """Of several values stored to one element at a time, one wins; neighbours in the word keep theirs."""
    for dtype in (torch.uint8, torch.float16, torch.bool):
        index = torch.arange(4096) % 8
        out = torch.zeros(9, dtype=dtype, device=device)
        out[index.to(device)] = torch.ones(4096, dtype=dtype, device=device)
        assert torch.equal(out.cpu(), torch.tensor([1] * 8 + [0]).to(dtype))
        assert bool(torch.ones(2, dtype=dtype, device=device).all()) and bool(
            torch.ones((), dtype=torch.bool, device=device).amin()
        )


def test_assert_async(device):
    torch._assert_async(torch.ones((), device=device))
    torch.spiral.synchronize(device)
    torch._assert_async(torch.zeros(1, dtype=torch.bool, device=device), "numbers were wrong")
    with pytest.raises(RuntimeError, match="numbers were wrong"):
        torch.spiral.synchronize(device)
    torch.spiral.synchronize(device)


def test_round_to_decimals(device):
    x = torch.randn(4096) * 1000
    for decimals in (-2, -1, 1, 3, 10):
        assert_close(x.to(device).round(decimals=decimals).cpu(), x.round(decimals=decimals), rtol=1e-6, atol=0)


def test_exp_over_its_whole_range(device):
    """Vectors and the elements after the last whole one: 3 units in the last place; below 2**-125 it may be 0."""
    edges = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, 89.5, 1e30, -1e30, -86.6, -87.4, -87.6, -104.0]
    x = torch.cat([torch.linspace(-90, 88.5, 20001), torch.tensor(edges)])
    got, exact = x.to(device).exp().cpu(), x.double().exp()
    assert torch.equal(got.isnan(), x.isnan()) and torch.equal(got.isinf(), exact.float().isinf())
    assert (got[x == 0] == 1).all()
    usual = exact.float().isfinite() & (exact > 2.0**-125)
    assert ((got - exact).abs() <= 3 * 2.0**-23 * exact)[usual].all()
    assert ((got - exact)[exact <= 2.0**-125].abs() <= 2.0**-125).all()


@pytest.mark.parametrize("f", [torch.sin, torch.cos, torch.tan], ids=lambda f: f.__name__)
@pytest.mark.parametrize("large", [1e6, 1e30, math.inf])
def test_small_angles_beside_large_ones(device, f, large):
    """In one vector: a large angle must not send the others where they lose their digits."""
    small = torch.randn(256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 1, 256)
    x = torch.stack([torch.full_like(small, large), small], 1)
    torch.testing.assert_close(f(x.to(device)).cpu()[:, 1], f(small.double()).float())
