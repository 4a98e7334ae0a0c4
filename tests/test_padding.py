"""Reflection and replication padding, fold and unfold, against the CPU."""

import pytest
import torch
import torch.nn.functional as F
from test_pooling import check

MODES = ("reflect", "replicate")


@pytest.mark.parametrize("mode", MODES)
def test_dimensions(device, mode):
    x = torch.randn(2, 3, 6, 7)
    check(device, lambda x: F.pad(x[0], (3, 2), mode=mode), x)
    check(device, lambda x: F.pad(x, (3, 0, 2, 5), mode=mode), x)
    check(device, lambda x: F.pad(x[None], (3, 0, 2, 4, 1, 2), mode=mode), x)


@pytest.mark.parametrize("mode", MODES)
def test_layouts(device, mode):
    x = torch.randn(2, 3, 6, 7)
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 3),
        lambda x: x[:, 1:, ::2, 1:],
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
    ):
        check(device, lambda x, layout=layout: F.pad(layout(x), (1, 2, 2, 1), mode=mode), x)


@pytest.mark.parametrize("mode", MODES)
def test_negative_padding_crops(device, mode):
    check(device, lambda x: F.pad(x, (-1, -2, 2, -1), mode=mode), torch.randn(2, 3, 6, 7))
    check(device, lambda x: F.pad(x, (-2, 3), mode=mode), torch.randn(2, 3, 6))


def test_one_element_is_replicated(device):
    check(device, lambda x: F.pad(x, (2, 3, 1, 4), mode="replicate"), torch.randn(2, 3, 1, 1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float16, torch.complex64])
def test_dtypes_are_moved_bit_for_bit(device, dtype):
    x = torch.randn(1, 2, 5, 5).mul(20).to(dtype)
    for mode in MODES:
        got = F.pad(x.to(device), (1, 2, 3, 1), mode=mode).cpu()
        torch.testing.assert_close(got, F.pad(x, (1, 2, 3, 1), mode=mode), rtol=0, atol=0)


def test_complex_gradients(device):
    def pad(x):
        return torch.view_as_real(F.pad(torch.complex(x, 2 * x).conj(), (1, 2, 3, 1), mode="reflect"))

    check(device, pad, torch.randn(1, 2, 5, 5))


def test_empty_batch(device):
    x = torch.empty(0, 3, 5, 5, device=device, requires_grad=True)
    out = F.pad(x, (1, 1, 1, 1), mode="reflect")
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_out_is_resized(device):
    x, out = torch.randn(2, 3, 5, 5), torch.empty(0, device=device)
    torch.ops.aten.reflection_pad2d.out(x.to(device), [1, 2, 3, 1], out=out)
    torch.testing.assert_close(out.cpu(), F.pad(x, (1, 2, 3, 1), mode="reflect"))


def test_errors(device):
    x = torch.randn(1, 2, 4, 4, device=device)
    with pytest.raises(RuntimeError, match="Padding size should be less than the corresponding input dimension"):
        F.pad(x, (4, 0, 0, 0), mode="reflect")
    with pytest.raises(RuntimeError, match="Expected 3D or 4D"):
        torch.ops.aten.reflection_pad2d(torch.empty(1, 2, 0, 4, device=device), [0, 0, 0, 0])


def test_unfold_and_fold(device):
    x = torch.randn(2, 3, 9, 10)
    check(device, lambda x: F.unfold(x, (3, 2), 2, 1, (2, 3)), x)
    check(device, lambda x: F.unfold(x[0].transpose(1, 2), 2), x)
    check(device, lambda x: F.fold(x, (7, 8), (3, 2)), torch.randn(2, 18, 35))
    check(device, lambda x: F.fold(x[0], (9, 10), 3, dilation=2, padding=2, stride=2), torch.randn(1, 9, 25))
