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


@pytest.mark.parametrize("length", [2, 3, 5])
def test_jagged_and_padded(device, length):
    """Sequences of 0, 2, 3 and 1 rows: cut, as long as the longest, and padded."""
    jag, pad = torch.ops.aten._padded_dense_to_jagged_forward, torch.ops.aten._jagged_to_padded_dense_forward
    offsets, x = torch.tensor([0, 0, 2, 5, 6]), torch.randn(6, 4)
    for dtype in (torch.float32, torch.float16):
        check(device, lambda x, o: pad(x, [o], [length], -1.5), x.to(dtype), offsets)
    expected = x.clone()
    if length == 2:
        expected[4] = 0
    for o in (offsets, offsets.int()):
        padded = pad(x.to(device), [o.to(device)], [length], 7.0)
        assert torch.equal(jag(padded, [o.to(device)], 6).cpu(), expected)
        assert torch.equal(jag(padded.transpose(1, 2).contiguous().transpose(1, 2), [o.to(device)]).cpu(), expected)
    assert pad(x[:0].to(device), [offsets.to(device) * 0], [length], 2.0).cpu().eq(2).all()
    with pytest.raises(RuntimeError, match="only a single jagged dim"):
        pad(x.to(device), [offsets.to(device)] * 2, [length, 2], 0.0)


def test_nested_tensors_of_jagged_layout(device):
    parts = [torch.randn(n, 4, device=device) for n in (2, 1, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    padded = torch.nested.to_padded_tensor(nested * 2, 0.5)
    assert padded.shape == (3, 3, 4) and torch.equal(padded[1, 0], parts[1][0] * 2) and padded[1, 1:].eq(0.5).all()
    padded.sum().backward()
    assert nested.grad.values().eq(2).all()
