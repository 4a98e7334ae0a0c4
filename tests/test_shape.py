"""Ops that move elements, against the CPU."""

import pytest
import torch
from test_index import LAYOUTS, check, data


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.complex64])
def test_flip_and_roll(device, layout, dtype):
    make, x = LAYOUTS[layout], data(dtype)
    check(device, lambda x: make(x).flip(0, 2), x)
    check(device, lambda x: make(x).flip(1), x)
    check(device, lambda x: make(x).roll((2, -9), (0, 1)), x)
    check(device, lambda x: make(x).roll(5), x)


def test_repeat_interleave(device):
    repeats = torch.tensor([1, 0, 2, 3, 1])
    check(device, lambda x, r: x.repeat_interleave(r, 0), data(), repeats)
    check(device, lambda r: torch.repeat_interleave(r, output_size=7), repeats)
    with pytest.raises(RuntimeError, match="can not be negative"):
        torch.repeat_interleave(torch.tensor([1, -1], device=device))


def test_unfold_backward(device):
    def f(x):
        x = x.requires_grad_()
        y = x.unfold(1, 3, 2)
        (y * y).sum().backward()
        return x.grad

    check(device, f, data(), atol=1e-5)


def test_shuffles(device):
    x = torch.randn(2, 8, 3, 4)
    check(device, lambda x: torch.nn.functional.pixel_shuffle(x, 2), x)
    check(device, lambda x: torch.nn.functional.channel_shuffle(x, 4), x)
