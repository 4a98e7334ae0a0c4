"""Convolutions of integers are exact, and agree with the CPU in every geometry."""

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 2, "groups": 2},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_conv2d(device, transposed, geometry):
    groups = geometry.get("groups", 1)
    x = torch.randint(-9, 9, (2, 4, 7, 6))
    w = torch.randint(-9, 9, (4, 6 // groups, 3, 2) if transposed else (6, 4 // groups, 3, 2))
    bias = torch.randint(-9, 9, (6,))
    f = F.conv_transpose2d if transposed else F.conv2d
    for b in (None, bias):
        ours = f(x.to(device), w.to(device), None if b is None else b.to(device), **geometry)
        assert ours.dtype == torch.int64
        expected = f(x.double(), w.double(), None if b is None else b.double(), **geometry)
        assert torch.equal(ours.cpu(), expected.long())


def test_strided_operands(device):
    x, w = torch.randint(-9, 9, (2, 8, 3)).transpose(1, 2), torch.randint(-9, 9, (3, 3, 4))[:, :, ::2]
    assert torch.equal(F.conv1d(x.to(device), w.to(device)).cpu(), F.conv1d(x.double(), w.double()).long())
