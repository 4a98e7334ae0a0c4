"""Softmax and normalisations, forward and backward, against float64 on the CPU."""

import pytest
import torch
import torch.nn.functional as F


def compare(device, f, *inputs, dtype=torch.float32, tolerance=1e-4):
    """f and its gradients, on the device in `dtype` and on the CPU in float64."""
    wide = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    narrow = [x.detach().to(dtype).to(device).requires_grad_() for x in inputs]
    want, got = f(*wide), f(*narrow)
    assert got.shape == want.shape
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=tolerance, atol=tolerance)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want.backward(grad.double())
    got.backward(grad.to(device))
    for a, b in zip(narrow, wide):
        torch.testing.assert_close(a.grad.cpu().double(), b.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("f", [F.softmax, F.log_softmax])
def test_softmax(device, f):
    x = torch.randn(7, 33, 20)
    for dim in range(3):
        compare(device, lambda t, dim=dim: f(t, dim), x)
    compare(device, lambda t: f(t.transpose(0, 2), 1), x)
    compare(device, lambda t: f(t, 0), torch.tensor(2.0))
    compare(device, lambda t: f(t, -1), torch.randn(6, 301), dtype=torch.float16, tolerance=1e-2)
    assert f(torch.empty(0, 4, device=device), 1).shape == (0, 4)


@pytest.mark.parametrize("f", [F.softmax, F.log_softmax])
def test_softmax_of_short_rows_beside_dimensions_of_one(device, f):
    """Short rows of a transposed tensor: lanes go along its rows, not along a dimension of one (found by a drawn case)."""
    for shape in ((17, 2, 1), (17, 2, 1, 1), (1, 17, 3, 1)):
        for dim in range(len(shape)):
            compare(device, lambda t, dim=dim: f(t.transpose(-2, -3), dim), torch.randn(shape))


def test_softmax_of_infinities(device):
    x = torch.randn(4, 50)
    x[0, 3], x[1, :30], x[2, 0] = float("nan"), float("-inf"), float("inf")
    x[3] = float("-inf")
    torch.testing.assert_close(F.softmax(x.to(device), -1).cpu(), F.softmax(x, -1), equal_nan=True)


def test_layer_norm(device):
    w, b = torch.randn(64), torch.randn(64)
    compare(device, lambda x, w, b: F.layer_norm(x, (64,), w, b), torch.randn(40, 3, 64), w, b)
    compare(device, lambda x: F.layer_norm(x, (3, 64)), torch.randn(5, 3, 64))
    compare(device, lambda x, w: F.layer_norm(x.transpose(0, 1), (64,), w), torch.randn(5, 3, 64), w)
    compare(device, lambda x, w: F.rms_norm(x, (64,), w, 1e-5), torch.randn(5, 3, 64), w)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        F.layer_norm(torch.randn(3, 5, device=device), (4,))


@pytest.mark.parametrize("shape", [(5, 8, 6, 6), (5, 8), (3, 8, 10)])
def test_group_and_batch_norm(device, shape):
    x, w, b = torch.randn(shape), torch.randn(8), torch.randn(8)
    compare(device, lambda x, w, b: F.group_norm(x, 4, w, b), x, w, b)
    for training in (True, False):
        running = {}

        def f(x, w, b, training=training, running=running):
            mean, var = torch.linspace(-1, 1, 8).to(x), torch.linspace(0.5, 2, 8).to(x)
            y = F.batch_norm(x, mean, var, w, b, training)
            running[x.device.type] = torch.stack([mean, var]).cpu().double()
            return y

        compare(device, f, x, w, b)
        torch.testing.assert_close(running["spiral"], running["cpu"], rtol=1e-4, atol=1e-4)


def test_channels_last(device):
    x = torch.randn(5, 8, 6, 7).to(memory_format=torch.channels_last)
    compare(device, lambda x, w: F.batch_norm(x, None, None, w, None, True), x, torch.randn(8))
    y = F.batch_norm(x.to(device), None, None, None, None, True)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_weight_norm(device):
    compare(device, lambda v, g: torch._weight_norm(v, g, 0), torch.randn(5, 6, 7), torch.randn(5, 1, 1))
    compare(device, lambda v, g: torch._weight_norm(v, g, 2), torch.randn(5, 6, 7), torch.randn(1, 1, 7))
