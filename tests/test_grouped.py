"""torch._grouped_mm, against products of the groups in float64; offsets stay on the device."""

import pytest
import torch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ENDS = [5, 5, 70, 96]


def close(got, want):
    error = (got.cpu().double() - want).norm() / want.norm()
    assert error <= TOLERANCE[got.dtype], error


def spans(ends):
    return list(zip([0, *ends[:-1]], ends))


def matrix(*sizes, dtype=torch.float32, turned=False):
    if turned:
        return torch.randn(*sizes[:-2], sizes[-1], sizes[-2]).to(dtype).mT
    return torch.randn(*sizes).to(dtype)


@pytest.mark.parametrize(
    "dtype,turned",
    [
        (torch.bfloat16, False),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in ((torch.float32, False), (torch.float32, True), (torch.float16, True))
        ),
    ],
)
def test_groups(device, dtype, turned):
    offs, groups, k, n = torch.tensor(ENDS, dtype=torch.int32, device=device), len(ENDS), 48, 40
    a, b = matrix(96, k, dtype=dtype, turned=turned), matrix(groups, k, n, dtype=dtype, turned=turned)
    want = torch.cat([a[s:e].double() @ b[i].double() for i, (s, e) in enumerate(spans(ENDS))])
    close(torch.nn.functional.grouped_mm(a.to(device), b.to(device), offs=offs), want)
    a, b = matrix(24, 96, dtype=dtype, turned=not turned), matrix(96, n, dtype=dtype, turned=turned)
    got = torch._grouped_mm(a.to(device), b.to(device), offs)
    assert (got[1] == 0).all()  # the empty group
    close(got, torch.stack([a[:, s:e].double() @ b[s:e].double() for s, e in spans(ENDS)]))
    a, b = matrix(groups, 24, k, dtype=dtype), matrix(k, 96, dtype=dtype, turned=turned)
    want = torch.cat([a[i].double() @ b[:, s:e].double() for i, (s, e) in enumerate(spans(ENDS))], 1)
    close(torch._grouped_mm(a.to(device), b.to(device), offs), want)
    b = matrix(groups, k, n, dtype=dtype, turned=turned)
    close(torch._grouped_mm(a.to(device), b.to(device)), a.double() @ b.double())


def test_odd_sizes_views_and_what_lies_behind(device):
    ends = [3, 7, 8]
    a, b = torch.randn(12, 20)[1:, 3:], torch.randn(3, 30, 17)[:, ::2][:, :, :7].expand(3, 15, 7)
    x, y = torch.zeros(12, 20, device=device)[1:, 3:], torch.zeros(3, 30, 17, device=device)[:, ::2][:, :, :7]
    x.copy_(a)
    y.copy_(b)
    offs = torch.tensor([9, *ends], dtype=torch.int32, device=device)[1:]
    got = torch._grouped_mm(x[:, :15], y, offs)
    want = torch.cat([a[s:e, :15].double() @ b[i].double() for i, (s, e) in enumerate(spans(ends))])
    assert got.shape == (11, 7) and got.stride() == (8, 1)
    close(got[:8], want)
    close(
        torch._grouped_mm(x[:, :15].t(), x, offs),
        torch.stack([a[s:e, :15].double().t() @ a[s:e].double() for s, e in spans(ends)]),
    )


def test_offsets_beyond_the_matrix_touch_nothing_else(device):
    a, b = torch.randn(8, 16), torch.randn(3, 16, 4)
    offs = torch.tensor([-5, 20, 3], dtype=torch.int32, device=device)
    close(torch._grouped_mm(a.to(device), b.to(device), offs), a.double() @ b[1].double())
    got = torch._grouped_mm(a.t().to(device), a.to(device), offs)
    close(got[1], a.t().double() @ a.double())
    assert (got[::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_backward(device, dtype):
    a, b, g = matrix(96, 48, dtype=dtype), matrix(4, 48, 40, dtype=dtype), matrix(96, 40, dtype=dtype)
    x, y = (t.to(device).requires_grad_() for t in (a, b))
    out = torch._grouped_mm(x, y, torch.tensor(ENDS, dtype=torch.int32, device=device))
    da, db = torch.autograd.grad(out, (x, y), g.to(device))
    close(da, torch.cat([g[s:e].double() @ b[i].double().t() for i, (s, e) in enumerate(spans(ENDS))]))
    close(db, torch.stack([a[s:e].double().t() @ g[s:e].double() for s, e in spans(ENDS)]))


def test_empty(device):
    offs = torch.zeros(3, dtype=torch.int32, device=device)
    assert torch._grouped_mm(torch.zeros(0, 16, device=device), torch.zeros(3, 16, 8, device=device), offs).shape == (
        0,
        8,
    )
    none = torch._grouped_mm(torch.zeros(4, 0, device=device), torch.zeros(0, 8, device=device), offs)
    assert none.shape == (3, 4, 8) and (none == 0).all()


CASES = {
    "dtype": lambda a, b, offs: (a.double(), b.double(), offs),
    "dimensions": lambda a, b, offs: (a[0], b, offs),
    "dtypes": lambda a, b, offs: (a, b.bfloat16(), offs),
    "reduction": lambda a, b, offs: (a[:, :12], b, offs),
    "groups": lambda a, b, offs: (a, b[:2], offs),
    "no offsets": lambda a, b, offs: (a, b),
    "offsets in vain": lambda a, b, offs: (b.mT, b, offs),
    "dtype of offsets": lambda a, b, offs: (a, b, offs.long()),
    "dimension of offsets": lambda a, b, offs: (a, b, offs[None]),
    "bias": lambda a, b, offs: (a, b, offs, b[0, 0]),
    "batches": lambda a, b, offs: (b.mT[:2], b),
    "dtype of the result": lambda a, b, offs: (a, b, offs, None, torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_refused(device, case):
    a, b, offs = torch.zeros(8, 16), torch.zeros(3, 16, 8), torch.tensor([2, 4, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError) as on_cpu:
        torch._grouped_mm(*CASES[case](a, b, offs))
    with pytest.raises(RuntimeError) as here:
        torch._grouped_mm(*CASES[case](a.to(device), b.to(device), offs.to(device)))
    assert str(here.value).splitlines()[0] == str(on_cpu.value).splitlines()[0]
