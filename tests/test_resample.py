"""Upsampling and grid_sample against the CPU in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_pooling import check

MODES = [
    ("nearest", 1), ("nearest", 2), ("nearest", 3), ("nearest-exact", 1), ("nearest-exact", 2), ("nearest-exact", 3),
    ("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3),
]  # fmt: skip
SHAPE = (2, 3, 5, 6, 7)


def _aligned(mode):
    return (None,) if "nearest" in mode else (False, True)


@pytest.mark.parametrize("mode,n", MODES)
def test_sizes(device, mode, n):
    x = torch.randn(SHAPE[: 2 + n])
    for align in _aligned(mode):
        for size in ((11, 4, 9), (1, 6, 20)):
            check(device, partial(F.interpolate, size=size[:n], mode=mode, align_corners=align), x)


@pytest.mark.parametrize("mode,n", MODES)
@pytest.mark.parametrize("factor", [2.0, 0.6, 1.3])
def test_scale_factors(device, mode, n, factor):
    check(device, lambda x: F.interpolate(x, scale_factor=factor, mode=mode), torch.randn(SHAPE[: 2 + n]))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_layouts(device, mode):
    x = torch.randn(2, 3, 6, 8)
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, 1:, ::2, 1:],
        lambda x: x[:1].expand(4, -1, -1, -1),
    ):
        check(device, lambda x, layout=layout: F.interpolate(layout(x), size=(5, 13), mode=mode), x)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align", [False, True])
def test_antialias(device, mode, align):
    x = torch.randn(2, 3, 13, 9)
    for size in ((5, 31), (13, 3)):
        check(device, partial(F.interpolate, size=size, mode=mode, antialias=True, align_corners=align), x)


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"), reason="torch 2.12 and later")
def test_lanczos(device):
    check(device, lambda x: torch.ops.aten._upsample_lanczos2d_aa(x, (5, 31), False), torch.randn(2, 3, 13, 9))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_bytes_are_upstreams(device, mode, antialias):
    """Both round weights to 16 bits: equal where they are computed in float64."""
    x = torch.randint(0, 256, (2, 3, 13, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for y in (x, x[:, 1:, ::2]):
        for size in ((7, 17), (3, 3)):
            resample = partial(F.interpolate, size=size, mode=mode, antialias=antialias)
            got, expected = resample(y.to(device)).cpu(), resample(y.contiguous())
            if torch.spiral.get_device_properties(device).float64:
                assert torch.equal(got, expected)
            else:
                assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_floats(device, dtype):
    x = torch.randn(2, 3, 6, 8).to(dtype).float()
    tolerance = 1e-3 if dtype == torch.float16 else 1e-2
    check(device, lambda x: F.interpolate(x, size=(5, 13), mode="bilinear"), x, dtype=dtype, tolerance=tolerance)


def test_empty_batch(device):
    assert F.interpolate(torch.empty(0, 3, 4, 4, device=device), size=(8, 8), mode="bilinear").shape == (0, 3, 8, 8)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [False, True])
def test_grid_sample(device, mode, padding, align):
    x, grid = torch.randn(2, 3, 6, 8), torch.rand(2, 5, 4, 2) * 2.6 - 1.3
    check(device, lambda x, g: F.grid_sample(x, g, mode, padding, align), x, grid, tolerance=1e-4)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_grid_sample_3d(device, mode):
    x, grid = torch.randn(1, 2, 4, 6, 8), torch.rand(1, 3, 2, 4, 3) * 2.6 - 1.3
    check(device, lambda x, g: F.grid_sample(x, g, mode, "reflection", False), x, grid, tolerance=1e-4)


def test_grid_sample_gradient_of_the_grid_only(device):
    x = torch.randn(1, 2, 6, 8)
    check(
        device, lambda g: F.grid_sample(x.to(g.device, g.dtype), g, align_corners=False), torch.rand(1, 3, 4, 2) * 2 - 1
    )


def test_grid_errors(device):
    x = torch.randn(1, 2, 4, 4, device=device)
    with pytest.raises(RuntimeError, match="last dimension"):
        F.grid_sample(x, torch.zeros(1, 2, 2, 3, device=device), align_corners=False)
