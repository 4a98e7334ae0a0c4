"""Linear algebra against the CPU in float64."""

import pytest
import torch

# Below a panel, more than one (64 columns each), batches, and sizes that are no multiples of anything.
SHAPES = [((), 1), ((), 5), ((2, 3), 7), ((2,), 70), ((), 200)]
DTYPES = [torch.float32, torch.complex64]


def matrix(batch, m, n, dtype):
    return torch.randn(*batch, m, n, dtype=dtype, generator=torch.Generator().manual_seed(m * 31 + n))


def wide(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def well_conditioned(batch, n, dtype):
    """Needs pivoting, yet is far from singular."""
    a = matrix(batch, n, n, dtype) / n**0.5 + 3 * torch.eye(n, dtype=dtype)
    return a[..., torch.randperm(n, generator=torch.Generator().manual_seed(3)), :]


def positive(batch, n, dtype):
    a = matrix(batch, n, n, dtype)
    return a @ a.mH / n + torch.eye(n, dtype=dtype)


def agree(got, expected, tolerance=1e-4):
    got = got.cpu()
    assert got.shape == expected.shape
    if expected.numel():
        error = (wide(got) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error < tolerance, float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n"), SHAPES)
@pytest.mark.parametrize("upper", [False, True])
def test_cholesky(device, batch, n, dtype, upper):
    a = positive(batch, n, dtype)
    factor, info = torch.linalg.cholesky_ex(a.to(device), upper=upper)
    agree(factor, torch.linalg.cholesky(wide(a), upper=upper))
    assert factor.stride() == torch.linalg.cholesky(a, upper=upper).stride()
    assert not info.any()
    b = matrix(batch, n, 3, dtype)
    agree(torch.cholesky_solve(b.to(device), factor, upper=upper), torch.linalg.solve(wide(a), wide(b)))
    agree(torch.cholesky_inverse(factor, upper=upper), torch.linalg.inv(wide(a)))


@pytest.mark.parametrize("n", [5, 150])
def test_cholesky_of_a_matrix_that_is_not_positive_definite(device, n):
    a = torch.eye(n)
    a[n - 2, n - 2] = -1
    assert torch.linalg.cholesky_ex(a.to(device)).info.item() == n - 1
    with pytest.raises(torch.linalg.LinAlgError, match=f"leading minor of order {n - 1} is not positive-definite"):
        torch.linalg.cholesky(a.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n"), SHAPES)
def test_lu_and_what_it_serves(device, batch, n, dtype):
    a = well_conditioned(batch, n, dtype)
    x = a.to(device)
    factors, pivots, info = torch.linalg.lu_factor_ex(x)
    expected = torch.linalg.lu_factor_ex(wide(a))
    agree(factors, expected.LU)
    assert torch.equal(pivots.cpu(), expected.pivots)
    assert not info.any()
    b = matrix(batch, n, 3, dtype)
    for adjoint in (False, True):
        agree(torch.linalg.lu_solve(factors, pivots, b.to(device), adjoint=adjoint),
              torch.linalg.solve(wide(a).mH if adjoint else wide(a), wide(b)))  # fmt: skip
    agree(torch.linalg.solve(x, b.mT.to(device), left=False), torch.linalg.solve(wide(a), wide(b).mT, left=False))
    agree(torch.linalg.inv(x), torch.linalg.inv(wide(a)))
    sign, logarithm = torch.linalg.slogdet(x)
    agree(sign, torch.linalg.slogdet(wide(a)).sign)
    agree(logarithm, torch.linalg.slogdet(wide(a)).logabsdet)


@pytest.mark.parametrize(("m", "n"), [(3, 8), (8, 3), (70, 130), (130, 70), (0, 3), (3, 0)])
def test_lu_of_rectangles(device, m, n):
    a = matrix((2,), m, n, torch.float32)
    p, lower, upper = torch.linalg.lu(a.to(device))
    assert lower.shape == (2, m, min(m, n))
    assert upper.shape == (2, min(m, n), n)
    agree(p @ lower @ upper, wide(a))


def test_singular(device):
    a = torch.ones(3, 3, device=device)
    assert torch.linalg.lu_factor_ex(a).info.item() == 2
    assert torch.linalg.det(a).item() == 0
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        torch.linalg.inv(a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [6, 100])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("upper", [True, False])
def test_triangular(device, n, dtype, left, upper):
    a = well_conditioned((), n, dtype)
    a = a + 5 * torch.eye(n)  # not symmetric, and both triangles far from singular
    b = matrix((2,), n, 5, dtype) if left else matrix((2,), 5, n, dtype)
    for unit in (False, True):
        for view in (lambda t: t, lambda t: t.mT, lambda t: t.mH):
            x = view(a)
            expected = torch.linalg.solve_triangular(wide(x), wide(b), upper=upper, left=left, unitriangular=unit)
            got = torch.linalg.solve_triangular(
                view(a.to(device)), b.to(device), upper=upper, left=left, unitriangular=unit
            )
            agree(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "m", "n"), [((), 5, 3), ((2,), 3, 5), ((2, 2), 20, 20), ((), 90, 40)])
def test_qr(device, batch, m, n, dtype):
    a = matrix(batch, m, n, dtype)
    for mode in ("reduced", "complete", "r"):
        got, expected = torch.linalg.qr(a.to(device), mode=mode), torch.linalg.qr(wide(a), mode=mode)
        agree(got.Q, expected.Q)
        agree(got.R, expected.R)
    k = min(m, n)
    vectors, tau = torch.geqrf(a[..., :k].to(device))
    v, t = torch.geqrf(wide(a[..., :k]))
    agree(tau, t)
    c = matrix(batch, m, 4, dtype)
    for transpose in (False, True):
        agree(
            torch.ormqr(vectors, tau, c.to(device), transpose=transpose),
            torch.ormqr(v, t, wide(c), transpose=transpose),
        )
        agree(torch.ormqr(vectors, tau, c.mT.to(device), left=False, transpose=transpose),
              torch.ormqr(v, t, wide(c).mT, left=False, transpose=transpose))  # fmt: skip


def test_layouts(device):
    """Rows, steps, expanded batches, out= of another layout."""
    a = well_conditioned((4, 3), 6, torch.float32)
    x = a.to(device)
    for view in (
        lambda t: t.mT,
        lambda t: t[1:, ::2],
        lambda t: t.transpose(0, 1),
        lambda t: t[:1].expand(4, 3, 6, 6),
        lambda t: t[..., 1:, 1:],
    ):
        agree(torch.linalg.inv(view(x)), torch.linalg.inv(wide(view(a))))
    b = matrix((), 6, 2, torch.float32)
    agree(torch.linalg.solve(x, b.to(device)), torch.linalg.solve(wide(a), wide(b)))
    out = torch.empty(4, 3, 12, 12, device=device)[..., ::2, ::2]
    torch.linalg.inv(x, out=out)
    agree(out, torch.linalg.inv(wide(a)))


def test_large_norms_in_qr(device):
    """The norm of a column is taken without overflow."""
    a = matrix((), 4, 3, torch.float32)
    agree(torch.linalg.qr(a.to(device) * 1e30).R / 1e30, torch.linalg.qr(wide(a)).R)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_exp(device, dtype):
    a = matrix((3,), 5, 5, dtype) * torch.tensor([0.01, 1, 3])[:, None, None]
    agree(torch.linalg.matrix_exp(a.to(device)), torch.linalg.matrix_exp(wide(a)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross(device, dtype):
    a, b = matrix((4,), 3, 2, dtype), matrix((1,), 3, 2, dtype)
    expected = torch.linalg.cross(wide(a), wide(b), dim=1)
    agree(torch.linalg.cross(a.to(device), b.to(device), dim=1), expected)
    c = matrix((5, 3), 4, 5, dtype)
    agree(
        torch.linalg.cross(c.to(device), c.flip(0).to(device), dim=1),
        torch.linalg.cross(wide(c), wide(c).flip(0), dim=1),
    )
    agree(
        torch.linalg.cross(a.to(device).conj(), b.to(device), dim=1), torch.linalg.cross(wide(a).conj(), wide(b), dim=1)
    )


def test_host_operators_are_counted(device):
    """Eigenvalues run on the CPU by declaration, also where the fallback is refused."""
    a = positive((), 4, torch.float32)
    before = torch.spiral.host_ops()["_linalg_eigh.eigenvalues"]
    values, vectors = torch.linalg.eigh(a.to(device))
    calls, copied = torch.spiral.host_ops()["_linalg_eigh.eigenvalues"]
    assert calls == before[0] + 1
    assert copied >= before[1] + 2 * 64  # the matrix there, the vectors back
    assert values.device == device
    agree(values, torch.linalg.eigvalsh(wide(a)))
    agree((vectors * values) @ vectors.mT, wide(a))
    assert not torch.spiral.fallbacks()
    assert len({name.partition(".")[0] for name in torch.spiral.host_ops()}) <= 25


def test_singular_values_and_least_squares(device):
    a, b = matrix((2,), 6, 3, torch.float32), matrix((2,), 6, 2, torch.float32)
    agree(torch.linalg.svdvals(a.to(device)), torch.linalg.svdvals(wide(a)))
    agree(torch.linalg.pinv(a.to(device)), torch.linalg.pinv(wide(a)))
    agree(torch.linalg.lstsq(a.to(device), b.to(device)).solution, torch.linalg.lstsq(wide(a), wide(b)).solution)
    square = matrix((), 4, 4, torch.float32)
    values, vectors = torch.linalg.eig(square.to(device))
    agree(square.to(device).to(torch.complex64) @ vectors, wide(vectors.cpu()) * wide(values.cpu()))


def test_gradients(device):
    a, b = well_conditioned((2,), 5, torch.float32), matrix((2,), 5, 2, torch.float32)

    def loss(a, b):
        square = torch.linalg.solve(a, b).square().sum() + torch.linalg.slogdet(a).logabsdet.sum()
        return square + torch.linalg.qr(a).R.square().sum() + torch.linalg.cholesky(a @ a.mT).sum()

    got = torch.autograd.grad(loss(x := a.to(device).requires_grad_(), y := b.to(device).requires_grad_()), (x, y))
    expected = torch.autograd.grad(loss(x := wide(a).requires_grad_(), y := wide(b).requires_grad_()), (x, y))
    for g, e in zip(got, expected):
        agree(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_matrix_for_many_small_batches(device, dtype):
    """[197, 3, 24] @ [24, 40] for each of the 197, from and to tensors whose batch is the other dimension too."""
    x, w, c = (torch.randn(*s, dtype=dtype) for s in ((3, 197, 24), (40, 24), (40,)))
    wide = w.t().expand(197, 24, 40)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    for a in (x.transpose(0, 1), x.transpose(0, 1).contiguous()):
        for bias in (c, torch.randn(3, 40).to(dtype), torch.randn(197, 3, 40).to(dtype)):
            want = torch.baddbmm(bias.double(), a.double(), wide.double(), alpha=0.5, beta=2)
            args = [t.to(device) for t in (bias, a, w)]
            args[2] = args[2].t().expand(197, 24, 40)
            torch.testing.assert_close(torch.baddbmm(*args, alpha=0.5, beta=2).cpu().double(), want, **tolerance)
            out = torch.empty(3, 197, 40, dtype=dtype, device=device).transpose(0, 1)
            torch.baddbmm(*args, alpha=0.5, beta=2, out=out)
            torch.testing.assert_close(out.cpu().double(), want, **tolerance)
