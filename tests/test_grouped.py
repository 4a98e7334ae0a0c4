"""torch._grouped_mm and _scaled_grouped_mm, against products of the groups in float64; offsets stay on the device."""

import pytest
import torch
from torch.nn.functional import ScalingType, SwizzleType, scaled_grouped_mm

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


# ---- float8 with scales ---------------------------------------------------------------------------------------------------

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def narrow(*sizes, dtype=E4M3, turned=False):
    return matrix(*sizes, dtype=dtype, turned=turned)


def scales(*sizes):
    return torch.rand(*sizes) + 0.5


def scaled(device, a, b, sa, sb, ends=None, **options):
    """The result here, and in float64 of the same numbers."""
    offs = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)
    got = torch._scaled_grouped_mm(*(x.to(device) for x in (a, b, sa, sb)), offs, **options)
    a, b, sa, sb = (x.double() for x in (a, b, sa, sb))
    if ends is None:
        want = (a * sa[..., None]) @ (b * sb[:, None])
    elif a.ndim == b.ndim:
        sa, sb = sa.view(len(ends), -1), sb.view(len(ends), -1)
        want = [(a[:, s:e] * sa[i][:, None]) @ (b[s:e] * sb[i]) for i, (s, e) in enumerate(spans(ends))]
        want = torch.stack(want)
    elif a.ndim == 2:
        a = a * sa[:, None]
        want = torch.cat([a[s:e] @ (b[i] * sb[i]) for i, (s, e) in enumerate(spans(ends))])
    else:
        b = b * sb
        want = torch.cat([(a[i] * sa[i][:, None]) @ b[:, s:e] for i, (s, e) in enumerate(spans(ends))], 1)
    return got, want


@pytest.mark.parametrize("fast", [False, True])
def test_scaled_groups(device, fast):
    groups, k, n, option = len(ENDS), 48, 80, {"use_fast_accum": fast}
    b = narrow(groups, k, n, turned=True)
    got, want = scaled(device, narrow(96, k), b, scales(96), scales(groups, n), ENDS, **option)
    assert got.dtype == torch.bfloat16 and got.shape == (96, n)
    close(got, want)
    got, want = scaled(
        device, narrow(24, 96), narrow(96, n, turned=True), scales(24 * groups), scales(n * groups), ENDS, **option
    )
    assert got.shape == (groups, 24, n) and (got[1] == 0).all()  # the empty group
    close(got, want)
    a = narrow(groups, 24, k)
    got, want = scaled(device, a, narrow(k, 96, turned=True), scales(groups, 24), scales(96), ENDS, **option)
    assert got.shape == (24, 96)
    close(got, want)
    close(*scaled(device, a, b, scales(groups, 24), scales(groups, n), **option))


def test_scaled_groups_of_views_and_other_float8(device):
    """Rows and matrices at a distance, ends that lie outside, one row, what lies behind the last end, no products at all."""
    a, b = narrow(40, 96, dtype=E5M2), narrow(5, 64, 48, turned=True)
    x, y = a.to(device), b.to(device)
    columns = scales(5, 48)
    for rows, groups, ends in ((slice(3, 20), slice(1, 5, 2), [-3, 17]), (slice(7, 8), slice(0, 3), [0, 1, 1])):
        sa, sb, offs = scales(40)[rows], columns[groups], torch.tensor(ends, dtype=torch.int32, device=device)
        got = torch._scaled_grouped_mm(
            x[rows, 16:80], y[groups], sa.to(device), columns.to(device)[groups], offs, out_dtype=torch.bfloat16
        )
        at = 1  # the group that has all rows
        close(got, (a[rows, 16:80].double() * sa[:, None]) @ (b[groups][at].double() * sb[at]))
    shared = y[2].expand(3, 64, 48)
    got = torch._scaled_grouped_mm(
        x[:32, :64], shared, scales(32).fill_(2).to(device), torch.ones(3, 48, device=device),
        torch.tensor([9, 20, 30], dtype=torch.int32, device=device),
    )  # fmt: skip
    close(got[:30], 2 * a[:30, :64].double() @ b[2].double())
    got = torch._scaled_grouped_mm(
        x[:, :0], y[:, :0], scales(40).to(device), columns.to(device),
        torch.tensor([40] * 5, dtype=torch.int32, device=device),
    )  # fmt: skip
    assert got.shape == (40, 48) and (got == 0).all()
    got = torch._scaled_grouped_mm(
        x[:0, :64], y, scales(0).to(device), columns.to(device), torch.zeros(5, dtype=torch.int32, device=device)
    )
    assert got.shape == (0, 48)


def test_scaled_grouped_mm_v2(device):
    a, b, sa, sb = narrow(32, 64), narrow(2, 64, 48, turned=True), scales(32), scales(2, 48)
    x, y, p, q = (t.to(device) for t in (a, b, sa, sb))
    row, offs = ScalingType.RowWise, torch.tensor([12, 32], dtype=torch.int32, device=device)
    got = scaled_grouped_mm(x, y, p, row, q, row, offs=offs, contraction_dim=(-1, -2))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch._scaled_grouped_mm(x, y, p, q, offs))
    for text, arguments, options in (
        ("No gemm implementation was found", (p, ScalingType.TensorWise, q, ScalingType.TensorWise), {}),
        ("No gemm implementation was found", (p.double(), row, q, row), {}),
        ("contraction dims must be", (p, row, q, row), {"contraction_dim": (1, 2)}),
        ("does not support swizzle", (p, row, q, row), {"swizzle_a": SwizzleType.SWIZZLE_32_4_4}),
        ("Bias not supported yet", (p, row, q, row), {"bias": q[0]}),
    ):
        with pytest.raises(ValueError, match=text):
            scaled_grouped_mm(x, y, *arguments, offs=offs, **options)


# aten/src/ATen/native/cuda/GroupedBlas.cpp; the CPU has no such op to compare with.
SCALED_CASES = {
    "vector": (ValueError, "mat_a has to be 2 or 3d", {"input": lambda t: t[0]}),
    "strides": (RuntimeError, r"Invalid strides/sizes, got \[64, 2\] for strides and \[32, 32\] for sizes", {"input": lambda t: t[:, ::2]}),
    "rows apart": (RuntimeError, "strides should be multiple of 16 bytes", {"input": lambda t: t.repeat(1, 2)[:, :72].contiguous()[:, :64]}),
    "layout of the first": (ValueError, "Expected mat1 to not be transposed", {"input": lambda t: t.t().contiguous().t()}),
    "layout of the second": (ValueError, "Expected mat2 to be transposed", {"mat2": lambda t: t.contiguous()}),
    "reduction": (ValueError, "contraction dimension of mat_a and mat_b must match", {"input": lambda t: t[:, :32]}),
    "sixteen": (ValueError, r"Expected mat_b shape to be divisible by 16 but got mat_b shape: \(\[3, 64, 40\]\)\.", {"mat2": lambda t: t[:, :, :40]}),
    "bias": (ValueError, "Bias not supported yet", {"bias": lambda t: torch.zeros(48, device=t)}),
    "scale of the result": (ValueError, "Scale result not supported yet", {"scale_result": lambda t: torch.ones(1, device=t)}),
    "no offsets": (ValueError, "Have to provide offsets if there is a 2d matrix", {"offs": lambda t: None}),
    "dimensions of offsets": (ValueError, "offs has to be 1D", {"offs": lambda t: t[None]}),
    "dtype of offsets": (ValueError, "Offsets have to be int32", {"offs": lambda t: t.long()}),
    "dtype of scales": (ValueError, "both scales must both be float32 tensors", {"scale_a": lambda t: t.half()}),
    "dimensions of scales": (RuntimeError, "scale must be a 1D tensor, but got 2D, arg 0", {"scale_a": lambda t: t[:, None]}),
    "step of scales": (RuntimeError, "scale must be contiguous for arg 0", {"scale_a": lambda t: t.repeat(2)[::2]}),
    "number of scales": (RuntimeError, "scale must have the same length as mat for arg 0", {"scale_a": lambda t: t[1:]}),
    "scales of groups": (RuntimeError, "scale must be a 2D tensor, but got 1D for arg 1", {"scale_b": lambda t: t[0]}),
    "groups of scales": (RuntimeError, "scale must have the same batch dimension as mat for arg 1", {"scale_b": lambda t: t[:2]}),
    "columns of scales": (RuntimeError, "scale must have the same first dimension as mat for arg 1", {"scale_b": lambda t: t[:, 1:]}),
    "steps of scales": (RuntimeError, "contiguous in the last dimension for arg 1", {"scale_b": lambda t: t.t().contiguous().t()}),
    "dtype of the result": (ValueError, "Only bf16 high precision output types", {"out_dtype": lambda t: torch.float16}),
    "groups": (RuntimeError, "matrix batch sizes have to match", {"offs": lambda t: t[1:]}),
    "dtype": (ValueError, "Expected mat_a to be Float8_e4m3 matrix got Half", {"input": lambda t: t.half()}),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SCALED_CASES))
def test_scaled_refused(device, case):
    arguments = {
        "input": narrow(32, 64).to(device), "mat2": narrow(3, 64, 48, turned=True).to(device), "scale_a": scales(32).to(device),
        "scale_b": scales(3, 48).to(device), "offs": torch.tensor([2, 4, 8], dtype=torch.int32, device=device), "bias": None,
        "scale_result": None, "out_dtype": None,
    }  # fmt: skip
    torch._scaled_grouped_mm(**arguments)
    exception, text, changes = SCALED_CASES[case]
    for name, change in changes.items():
        arguments[name] = change(device if arguments[name] is None else arguments[name])
    with pytest.raises(exception, match=text):
        torch._scaled_grouped_mm(**arguments)
