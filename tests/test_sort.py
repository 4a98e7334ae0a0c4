"""Sorting, searching and counting against the CPU."""

import math

import pytest
import torch
from test_index import check, data

from torch_spiral.ops import sort


@pytest.mark.parametrize("n", [1, 2, 31, 33, 64, 65, 1000, 5000])
def test_lengths(device, n):
    torch.manual_seed(n)
    x = torch.randn(3, n).round(decimals=1)
    check(device, lambda x: torch.sort(x, stable=True)[1], x)
    check(device, lambda x: torch.sort(x, stable=True, descending=True)[1], x)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]
)
def test_dtypes(device, dtype):
    x = (torch.randn(4, 70) * 100).to(dtype)
    check(device, lambda x: torch.sort(x, dim=0, stable=True)[0], x)
    check(device, lambda x: torch.sort(x, dim=1, stable=True, descending=True)[1], x)


def test_special_values(device):
    x = torch.tensor([math.nan, 1.0, -0.0, 0.0, -math.inf, math.inf, -math.nan, -1.0, 1e-40])
    for descending in (False, True):
        check(device, lambda x, d=descending: torch.sort(x, stable=True, descending=d)[1], x)
    check(device, lambda x: torch.topk(x, 4)[0], x)
    check(device, lambda x: x.median(), x)
    check(device, lambda x: x.nanmedian(), x)


def test_selection(device):
    x = data()
    for dim in (0, 1, 2):
        check(device, lambda x, d=dim: torch.topk(x, 3, d)[1], x)
        check(device, lambda x, d=dim: torch.topk(x, 2, d, largest=False)[0], x.transpose(0, 1))
        check(device, lambda x, d=dim: x.kthvalue(2, d, keepdim=True)[1], x)
        check(device, lambda x, d=dim: x.median(d)[1], x)
        check(device, lambda x, d=dim: x.mode(d)[0], x.round())
    check(device, lambda x: x.median(), x)
    check(device, lambda x: torch.sort(x)[0], torch.tensor(3.0))
    check(device, lambda x: torch.sort(x)[0], torch.empty(0, 3))


def check_topk(device, x, k, dim=-1, **kwargs):
    """Values as the CPU's (NaN as the largest), indices where those values are, each once."""
    values, indices = torch.topk(x.to(device), k, dim, **kwargs)
    values, indices = values.cpu(), indices.cpu()
    want = torch.topk(x, k, dim, **kwargs | {"sorted": True})[0]  # ours are in order whether asked or not
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.gather(dim, indices), want, rtol=0, atol=0, equal_nan=True)
    assert (indices.sort(dim)[0].diff(dim=dim) > 0).all()


# Pieces of a row, heaps of one element and of many, few elements that differ, rows that are not consecutive.
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 3000, 50), (3, 1025, 1), (2, 130, 8), (70, 257, 7), (1, 16, 1)])
def test_topk_of_long_rows(device, monkeypatch, rows, n, k):
    monkeypatch.setattr(sort, "SELECTING", 5)  # else a GPU sorts
    torch.manual_seed(n)
    x = torch.randn(rows, n).round(decimals=1)
    x[0, 5:7] = math.nan
    for largest in (False, True):
        check_topk(device, x, k, largest=largest)
    check_topk(device, x.t().contiguous(), k, 0)
    check_topk(device, torch.arange(float(n)).expand(rows, n), k)
    check_topk(device, x[:, None, 3:], min(k, n // 16), largest=False, sorted=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.int64])
def test_topk_dtypes(device, dtype):
    x = (torch.randn(2, 300) * 100).to(dtype)
    check_topk(device, x, 3)
    check_topk(device, x, 4, largest=False)


@pytest.mark.parametrize("right", [False, True])
def test_search(device, right):
    bounds = torch.tensor([-2.0, -1, 0, 0, 1.5, 2])
    x = data().round()
    check(device, lambda b, x: torch.searchsorted(b, x, right=right), bounds, x)
    check(device, lambda b, x: torch.bucketize(x, b, right=right, out_int32=True), bounds, x)
    check(device, lambda b: torch.searchsorted(b, 0.5, right=right), bounds)
    rows = torch.randn(4, 9)
    check(device, lambda r, x: torch.searchsorted(r, x, sorter=r.argsort(), right=right), rows, torch.randn(4, 5))
    check(device, lambda x, t: torch.isin(x, t), x, torch.tensor([1.0, -3, 2]))
    check(device, lambda x, t: torch.isin(x[0, 0], t), x, torch.tensor([1.0, -3, 2]))
    check(device, lambda x: torch.isin(x, 1.0), x)
    check(device, lambda x: torch.isin(1.0, x.flatten()[:3], invert=True), x)


def test_isin_of_a_number(device):
    """Of few elements and of many, where upstream would sort them."""
    for x in (torch.arange(5), torch.arange(1000), torch.arange(0), torch.arange(1000.0)[::2], torch.tensor(3)):
        for number in (4, 7.0, -1):
            for invert in (False, True):
                check(device, lambda x, n=number, i=invert: torch.isin(n, x, invert=i), x)
    out = torch.empty(3, dtype=torch.bool, device=device)
    with pytest.warns(UserWarning, match="was resized"):
        torch.isin(999, torch.arange(1000, device=device), out=out)
    assert out.shape == () and out.item()
    for number, x in ((True, torch.arange(3)), (1j, torch.arange(3)), (1, torch.ones(3, dtype=torch.bool))):
        with pytest.raises(RuntimeError, match=r"Unsupported input type encountered for isin\(\)"):
            torch.isin(number, x.to(device))


@pytest.mark.parametrize(
    "op", ["kthvalue", "median", "mode", "nonzero", "masked_select", "index_select", "histc", "bucketize"]
)
def test_out_of_another_shape_is_resized_with_a_warning(device, op):
    x = torch.arange(16.0).view(4, 4) % 5
    calls = {
        "kthvalue": lambda x, out: torch.kthvalue(x, 2, out=out),
        "median": lambda x, out: torch.median(x, 1, out=out),
        "mode": lambda x, out: torch.mode(x, 1, out=out),
        "nonzero": lambda x, out: torch.nonzero(x, out=out[1]),
        "masked_select": lambda x, out: torch.masked_select(x, x > 1, out=out[0]),
        "index_select": lambda x, out: torch.index_select(x, 0, torch.tensor([2, 0], device=x.device), out=out[0]),
        "histc": lambda x, out: torch.histc(x, 3, out=out[0]),
        "bucketize": lambda x, out: torch.bucketize(x, torch.arange(4.0, device=x.device), out=out[1]),
    }
    outs = [[torch.ones(7, dtype=d, device=where) for d in (torch.float32, torch.int64)] for where in ("cpu", device)]
    for out in outs:
        with pytest.warns(UserWarning, match="was resized"):
            calls[op](x.to(out[0].device), out)
    assert torch.equal(outs[1][0].cpu(), outs[0][0])
    assert outs[1][1].shape == outs[0][1].shape


def test_unique(device):
    x = data().round().to(torch.int64)
    for i in range(3):
        check(device, lambda x, i=i: torch.unique(x, return_inverse=True, return_counts=True)[i], x)
        check(device, lambda x, i=i: torch.unique_consecutive(x, return_inverse=True, return_counts=True)[i], x)
        check(
            device,
            lambda x, i=i: torch.unique(x, dim=0, return_inverse=True, return_counts=True)[i],
            x[[0, 1, 0], :2, :2],
        )


def test_counting(device):
    x = data()
    check(device, lambda x: x.abs().long().flatten().bincount(minlength=20), x)
    check(device, lambda x: x.abs().long().flatten().bincount(weights=x.flatten()), x, atol=1e-4)
    check(device, lambda x: torch.histc(x, 10, -2, 3), x)
    check(device, lambda x: torch.histogram(x, 10, range=(-2.0, 3.0))[0], x)


def test_unique_rows_of_the_last_dimension(device):
    x = torch.randint(0, 2, (3, 2, 6))
    for dim in range(3):
        ours, theirs = (torch.unique(v, dim=dim, return_inverse=True, return_counts=True) for v in (x.to(device), x))
        for o, t in zip(ours, theirs, strict=True):
            assert torch.equal(o.cpu(), t)


def test_search_in_nothing(device):
    empty, sorter = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert torch.searchsorted(empty, torch.ones(2, device=device), sorter=sorter).tolist() == [0, 0]
    assert torch.searchsorted(empty, empty, sorter=sorter).shape == (0,)
