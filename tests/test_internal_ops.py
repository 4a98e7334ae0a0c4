"""Operators that ATen's other kernels call, by their own names."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close


def test_compute_linear_combination(device):
    for dtype in (torch.float32, torch.complex64):
        x, c = torch.randn(3, 4, 5, dtype=dtype), torch.randn(2, 3, dtype=dtype)
        expected = torch.einsum("sn,nij->sij", c, x)
        assert_close(torch._compute_linear_combination(x.to(device), c.to(device)).cpu(), expected)
        x = x.transpose(1, 2)
        ours = torch._compute_linear_combination(x.to(device), c.to(device)).cpu()
        assert_close(ours, expected.transpose(1, 2))


def test_slow_conv_transpose2d(device):
    x, w, bias = torch.randn(2, 3, 5, 4), torch.randn(3, 4, 3, 2), torch.randn(4)
    how = {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "dilation": (1, 2)}
    expected = F.conv_transpose2d(x, w, bias, **how)
    ours = torch._C._nn.slow_conv_transpose2d(x.to(device), w.to(device), (3, 2), bias.to(device), *how.values())
    assert_close(ours.cpu(), expected)


def test_biases_that_are_conjugate_views(device):
    bias, a, b = (torch.randn(3, 3, dtype=torch.complex64) for _ in range(3))
    assert_close(torch.addmm(bias.to(device).conj(), a.to(device), b.to(device)).cpu(), torch.addmm(bias.conj(), a, b))
    ours = torch.baddbmm(bias[None].to(device).conj(), a[None].to(device).conj(), b[None].to(device))
    assert_close(ours.cpu(), torch.baddbmm(bias[None].conj(), a[None].conj(), b[None]))
