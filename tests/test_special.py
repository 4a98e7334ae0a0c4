"""Special functions against the CPU in float64."""

import pytest
import torch

S = torch.special
GRID = torch.cat([torch.linspace(-12, 12, 193), torch.tensor([0.0, 1e-3, -1e-3, 30.0, -30.0])])
POSITIVE = torch.cat([torch.linspace(0.01, 12, 97), torch.tensor([40.0, 1e-4])])
UNIT = torch.linspace(0.001, 0.999, 99)
UNARY = {
    "i0": (torch.i0, GRID), "i0e": (S.i0e, GRID), "i1": (S.i1, GRID), "i1e": (S.i1e, GRID), "bessel_j0": (S.bessel_j0, GRID),
    "bessel_j1": (S.bessel_j1, GRID), "bessel_y0": (S.bessel_y0, POSITIVE), "bessel_y1": (S.bessel_y1, POSITIVE),
    "k0": (S.modified_bessel_k0, POSITIVE), "k1": (S.modified_bessel_k1, POSITIVE), "scaled_k0": (S.scaled_modified_bessel_k0, POSITIVE),
    "scaled_k1": (S.scaled_modified_bessel_k1, POSITIVE), "spherical_j0": (S.spherical_bessel_j0, GRID), "airy": (S.airy_ai, GRID),
    "erfcx": (S.erfcx, GRID[GRID > -8]), "log_ndtr": (S.log_ndtr, GRID), "ndtri": (S.ndtri, UNIT),
    "trigamma": (lambda x: torch.polygamma(1, x), POSITIVE), "polygamma": (lambda x: torch.polygamma(3, x), POSITIVE),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary(device, name):
    function, x = UNARY[name]
    want = function(x.double())
    torch.testing.assert_close(function(x.to(device)).cpu().double(), want, rtol=2e-5, atol=2e-5)


def test_edges(device):
    x = torch.tensor([float("nan"), 0.0, -1.0, float("inf")])
    for f in (S.bessel_y0, S.modified_bessel_k0, S.ndtri, S.i0e, S.spherical_bessel_j0):
        torch.testing.assert_close(f(x.to(device)).cpu(), f(x), equal_nan=True)


@pytest.mark.parametrize("name", ["gammainc", "gammaincc"])
def test_incomplete_gamma(device, name):
    a, x = torch.meshgrid(
        torch.tensor([0.0, 0.1, 0.9, 3.0, 20.0, 150.0]), torch.tensor([0.0, 0.05, 1.0, 4.0, 19.0, 160.0]), indexing="ij"
    )
    f = getattr(S, name)
    torch.testing.assert_close(f(a.to(device), x.to(device)).cpu(), f(a, x), rtol=3e-5, atol=1e-5, equal_nan=True)


def test_zeta(device):
    x, q = torch.meshgrid(
        torch.tensor([0.5, 1.0, 1.5, 3.0, 8.0]), torch.tensor([0.5, 1.0, 7.5, -1.5, -2.0, 30.0]), indexing="ij"
    )
    torch.testing.assert_close(
        S.zeta(x.to(device), q.to(device)).cpu(), S.zeta(x, q), rtol=1e-5, atol=1e-5, equal_nan=True
    )


POLYNOMIALS = [f"{s}chebyshev_polynomial_{k}" for s in ("", "shifted_") for k in "tuvw"]
POLYNOMIALS += ["hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"]


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials(device, name):
    x, n = torch.meshgrid(
        torch.tensor([-1.0, -0.7, 0.0, 0.3, 1.0, 1.5]), torch.tensor([-1.0, 0.0, 1.0, 2.0, 5.0, 12.0]), indexing="ij"
    )
    f = getattr(S, name)
    torch.testing.assert_close(f(x.to(device), n.to(device)).cpu(), f(x, n), rtol=3e-5, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int16])
def test_gcd_lcm(device, dtype):
    a, b = torch.tensor([0, 12, 7, 100, 0, 81]).to(dtype), torch.tensor([0, 18, 21, 75, 5, 1]).to(dtype)
    if dtype != torch.uint8:
        a = -a
    for f in (torch.gcd, torch.lcm):
        assert torch.equal(f(a.to(device), b.to(device)).cpu(), f(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_frexp(device, dtype):
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, 1e-3, 6e4, float("inf"), 6e-8]).to(dtype)
    for got, want in zip(torch.frexp(x.to(device)), torch.frexp(x)):
        assert torch.equal(got.cpu(), want)


def test_kaiser_and_renorm(device):
    torch.testing.assert_close(
        torch.kaiser_window(20, False, 8.0, device=device).cpu(),
        torch.kaiser_window(20, False, 8.0),
        rtol=1e-5,
        atol=1e-6,
    )
    x = torch.randn(5, 7)
    torch.testing.assert_close(torch.renorm(x.to(device), 2, 0, 1.5).cpu(), torch.renorm(x, 2, 0, 1.5))


def test_fake_quantization(device):
    x = torch.randn(6, 10) * 3
    for f in (
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -20, 30),
        lambda x: torch.fake_quantize_per_tensor_affine(x, torch.tensor(0.1, device=x.device), torch.tensor(3, dtype=torch.int32, device=x.device), -20, 30),
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.full((6,), 0.1, device=x.device), torch.arange(6, dtype=torch.int32, device=x.device), 0, -20, 30
        ),
    ):  # fmt: skip
        torch.testing.assert_close(f(x.to(device)).cpu(), f(x))
