"""Fourier transforms against the CPU's in float64."""

import pytest
import torch

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 21, 30, 32, 37, 48, 61, 64, 67, 97, 1000, 1009, 4096]


def agree(got, expected, tolerance=2e-6):
    got = got.cpu()
    assert got.shape == expected.shape
    wide = torch.complex128 if expected.is_complex() else torch.float64
    error = torch.linalg.vector_norm(got.to(wide) - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-30)
    assert error < tolerance, float(error)


def signal(*shape, dtype=torch.complex64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n", SIZES)
def test_sizes(device, n):
    """Every way through the algorithm: factors with butterflies, loops over a factor, Bluestein's algorithm."""
    x = signal(2, n)
    agree(torch.fft.fft(x.to(device)), torch.fft.fft(x.to(torch.complex128)))
    agree(torch.fft.ifft(x.to(device), norm="ortho"), torch.fft.ifft(x.to(torch.complex128), norm="ortho"))


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 30, 67, 1000])
def test_real(device, n):
    x = signal(3, n, dtype=torch.float32)
    half = torch.fft.rfft(x.to(device))
    agree(half, torch.fft.rfft(x.double()))
    agree(torch.fft.irfft(half, n=n), x.double())
    agree(torch.fft.fft(x.to(device)), torch.fft.fft(x.double()))
    agree(torch.fft.hfft(x.to(device), n=n), torch.fft.hfft(x.double(), n=n))


def test_imaginary_parts_that_a_real_result_cannot_have_are_ignored(device):
    x = signal(5)
    agree(torch.fft.irfft(x.to(device), n=8), torch.fft.irfft(x.to(torch.complex128), n=8))


@pytest.mark.parametrize("function", ["fftn", "ifftn", "fft2", "rfftn", "irfftn", "hfftn", "ihfftn"])
@pytest.mark.parametrize("norm", ["backward", "forward", "ortho"])
def test_many_dimensions(device, function, norm):
    real = function in ("rfftn", "ihfftn")
    x = signal(4, 6, 10, dtype=torch.float32 if real else torch.complex64)
    f = getattr(torch.fft, function)
    agree(f(x.to(device), norm=norm), f(x.to(torch.float64 if real else torch.complex128), norm=norm))


def test_layouts(device):
    x = signal(6, 5, 8)
    y = x.to(device)
    wide = x.to(torch.complex128)
    for view in (
        lambda t: t.transpose(0, 2), lambda t: t[1:, :, ::2], lambda t: t[:, :1].expand(6, 5, 8), lambda t: t.conj(),
        lambda t: t[2, 3],
    ):  # fmt: skip
        agree(torch.fft.fft(view(y), dim=0), torch.fft.fft(view(wide), dim=0))
    out = torch.empty(0, dtype=torch.complex64, device=device)
    torch.fft.fft(y, dim=1, out=out)
    agree(out, torch.fft.fft(wide, dim=1))
    assert torch.fft.fft(y[:0]).shape == (0, 5, 8)


def test_float64(device):
    if not torch.spiral.get_device_properties(device).float64:
        pytest.skip("no float64 arithmetic")
    for n in (60, 67):
        x = signal(n, dtype=torch.complex128)
        agree(torch.fft.fft(x.to(device)), torch.fft.fft(x), 1e-13)
    x = signal(6, 5, dtype=torch.complex128)
    agree(torch.fft.irfft2(x.to(device).t()), torch.fft.irfft2(x.t()), 1e-13)  # which copies it first


def test_gradient(device):
    x = signal(3, 12, dtype=torch.float32)
    y = x.to(device).requires_grad_()
    torch.fft.rfft(y).abs().pow(2).sum().backward()
    x = x.double().requires_grad_()
    torch.fft.rfft(x).abs().pow(2).sum().backward()
    agree(y.grad, x.grad)


def test_unsupported_dtype(device):
    with pytest.raises(RuntimeError, match="Unsupported dtype"):
        torch.fft.fft(torch.zeros(4, dtype=torch.float16, device=device))


def test_strides_are_those_of_the_cpu(device):
    """Fake tensors, and so compiled graphs, foretell them."""
    for x in (torch.randn(4, 5, 6), torch.randn(4, 5, 6).permute(2, 0, 1)):
        for name in ("fft", "rfft", "irfft"):
            f = getattr(torch.fft, name)
            for dim in range(3):
                assert f(x.to(device), dim=dim).stride() == f(x, dim=dim).stride()
            f = getattr(torch.fft, name + "n")
            for dims in ((0, 1), (1, 0), (2, 1), None):
                assert f(x.to(device), dim=dims).stride() == f(x, dim=dims).stride()
