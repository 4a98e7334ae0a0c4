"""Factories against the CPU."""

import pytest
import torch


def check(device, f, atol=0.0):
    expected, got = f("cpu"), f(device)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.cpu(), expected, atol=atol, rtol=1e-5 if atol else 0)


@pytest.mark.parametrize("args", [(7,), (2, 9), (2, 9, 3), (5, -4, -2), (0, 1, 0.125), (3, 3), (1.5, 4, 0.5)])
def test_arange(device, args):
    check(device, lambda d: torch.arange(*args, device=d))
    check(device, lambda d: torch.arange(*args, device=d, dtype=torch.float16))


def test_arange_errors(device):
    with pytest.raises(RuntimeError, match="step must be nonzero"):
        torch.arange(0, 3, 0, device=device)
    with pytest.raises(RuntimeError, match="inconsistent with step sign"):
        torch.arange(3, 0, device=device)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 50])
def test_linspace(device, steps):
    check(device, lambda d: torch.linspace(-3, 10, steps, device=d), 1e-6)
    check(device, lambda d: torch.linspace(-30, 100, steps, device=d, dtype=torch.int64))
    check(device, lambda d: torch.logspace(-1, 2, steps, device=d), 1e-4)
    check(device, lambda d: torch.linspace(1 + 2j, 3 - 1j, steps, device=d), 1e-6)


def test_out_is_resized(device):
    out = torch.empty(0, device=device)
    assert torch.arange(5, out=out) is out and out.tolist() == [0, 1, 2, 3, 4]
    out = torch.empty(0, device=device)
    assert torch.eye(2, 3, out=out).shape == (2, 3)


@pytest.mark.parametrize("diagonal", [-3, -1, 0, 2, 9])
def test_triangles(device, diagonal):
    x = torch.arange(2 * 4 * 6).view(2, 4, 6) + 1
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        y = x.to(dtype)
        check(device, lambda d, y=y: y.to(d).tril(diagonal))
        check(device, lambda d, y=y: y.to(d).transpose(1, 2).triu(diagonal))
    check(device, lambda d: torch.tril_indices(4, 6, diagonal, device=d))
    check(device, lambda d: torch.triu_indices(4, 6, diagonal, device=d))
    check(device, lambda d: x.to(d).clone().tril_(diagonal))


def test_eye(device):
    for dtype in (torch.float32, torch.bool, torch.int64, torch.float16):
        check(device, lambda d, dtype=dtype: torch.eye(4, 6, dtype=dtype, device=d))
