"""Reductions against float64 on the CPU: layouts, dtypes, NaN, empty tensors, out=."""

import pytest
import torch


def layouts():
    """Name and float32 tensors of one to three dimensions in all kinds of strides."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 40, generator=g)
    yield "contiguous", x
    yield "transposed", x.transpose(0, 2)
    yield "sliced", torch.randn(70, 90, generator=g)[3:, ::2]
    yield "expanded", torch.randn(1, 33, generator=g).expand(9, 33)
    yield "columns", torch.randn(130, 40, generator=g)
    yield "offset", torch.randn(5000, generator=g)[7:]
    yield "0-dim", torch.tensor(-1.5)


FUNCTIONS = {
    "sum": torch.sum,
    "mean": torch.mean,
    "nansum": torch.nansum,
    "amax": torch.amax,
    "amin": torch.amin,
    "argmax": torch.argmax,
    "argmin": torch.argmin,
    "any": torch.any,
    "all": torch.all,
    "std": torch.std,
    "var": torch.var,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layouts(device, name):
    f = FUNCTIONS[name]
    for layout, x in layouts():
        for dim in (None, 0, -1):
            if x.ndim == 0 and name in ("std", "var"):
                continue
            arguments = {} if dim is None else {"dim": dim}
            want = f(x.double(), **arguments)
            got = f(x.to(device), **arguments).cpu()
            assert got.shape == want.shape, (layout, dim)
            torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-5, atol=1e-4, msg=f"{layout} {dim}")


@pytest.mark.parametrize("p", [0, 1, 2, 3.5, float("inf"), float("-inf")])
def test_norms(device, p):
    for _, x in layouts():
        for dim in (None, 0):
            want = torch.linalg.vector_norm(x.double(), p, dim)
            torch.testing.assert_close(
                torch.linalg.vector_norm(x.to(device), p, dim).cpu().double(), want, rtol=1e-4, atol=1e-5
            )


def test_with_indices(device):
    for _, x in layouts():
        for f in (torch.max, torch.min):
            for got, want in zip(f(x.to(device), 0), f(x, 0)):
                torch.testing.assert_close(got.cpu(), want)
        torch.testing.assert_close(torch.aminmax(x.to(device))[1].cpu(), x.max())
        torch.testing.assert_close(x.to(device).min().cpu(), x.min())


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.complex64]
)
def test_dtypes(device, dtype):
    x = (torch.rand(20, 33) * 9 - 4 * dtype.is_signed).to(dtype)
    for dim in (0, 1):
        for f in (torch.sum, torch.any, torch.all, *(() if dtype.is_complex else (torch.amax,))):
            want = f(x, dim=dim)
            got = f(x.to(device), dim=dim)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.cpu(), want, rtol=1e-2, atol=1e-2)


def test_nan(device):
    x = torch.tensor([[1.0, float("nan"), 3.0], [2.0, 0.0, float("inf")]])
    for f in (torch.sum, torch.nansum, torch.amax, torch.amin, torch.argmax, torch.argmin):
        torch.testing.assert_close(f(x.to(device), dim=1).cpu(), f(x, dim=1), equal_nan=True)


def test_empty(device):
    x = torch.empty(3, 0, device=device)
    assert torch.equal(x.sum(1).cpu(), torch.zeros(3))
    assert torch.equal(x.prod(1).cpu(), torch.ones(3))
    assert x.mean(1).isnan().all().item()
    assert x.sum(0).shape == (0,)
    with pytest.raises(IndexError):
        x.amax(1)


def test_out_and_long_rows(device):
    x = torch.randn(70000)
    out = torch.empty(0, device=device)
    torch.sum(x.to(device), 0, out=out)
    torch.testing.assert_close(out.cpu().double(), x.double().sum(), rtol=1e-5, atol=1e-3)
    out = torch.zeros(4, 3, device=device)
    torch.sum(torch.ones(3, 5, 4, device=device), 1, out=out.t())
    assert torch.equal(out.cpu(), torch.full((4, 3), 5.0))


def test_single_ops(device):
    x = torch.randn(5, 7)
    torch.testing.assert_close(torch.trace(x.t().to(device)).cpu(), torch.trace(x))
    y = x.to(device)
    assert torch.equal(y, y.clone()) and not torch.equal(y, y + 1) and not torch.equal(y, y[0])
