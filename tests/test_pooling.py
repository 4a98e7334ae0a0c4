"""Pooling against the CPU in float64: layouts, padding, ceil mode, ties, NaN, errors, gradients."""

import pytest
import torch
import torch.nn.functional as F


def check(device, function, *inputs, dtype=torch.float32, grad=True, tolerance=1e-5):
    """function on the device equals function in float64 on the CPU; so do the gradients of the floating inputs."""
    reference = [x.to(torch.float64) if x.is_floating_point() else x for x in inputs]
    ours = [x.to(dtype).to(device) if x.is_floating_point() else x.to(device) for x in inputs]
    if grad:
        for x in (*reference, *ours):
            if x.is_floating_point():
                x.requires_grad_()
    expected, got = function(*reference), function(*ours)
    for e, g in zip(_tuple(expected), _tuple(got), strict=True):
        assert g.shape == e.shape
        torch.testing.assert_close(g.cpu().to(e.dtype), e, rtol=tolerance, atol=tolerance, equal_nan=True)
    if grad:
        e, g = _tuple(expected)[0], _tuple(got)[0]
        cotangent = torch.randn(e.shape, dtype=torch.float64).to(dtype)
        e.backward(cotangent.to(torch.float64))
        g.backward(cotangent.to(device))
        for r, o in zip(reference, ours):
            if r.requires_grad:
                torch.testing.assert_close(
                    o.grad.cpu().to(torch.float64), r.grad, rtol=10 * tolerance, atol=10 * tolerance
                )


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "sliced": lambda x: x[:, :, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "unbatched": lambda x: x[1],
    "one channel": lambda x: x[:1, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool2d_layouts(device, layout):
    # Layouts are made on each side: a transfer gives a dense tensor.
    check(device, lambda x: F.max_pool2d(LAYOUTS[layout](x), 3, 2, 1, return_indices=True), torch.randn(2, 3, 18, 21))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_avg_pool2d_layouts(device, layout):
    check(device, lambda x: F.avg_pool2d(LAYOUTS[layout](x), 3, 2, 1), torch.randn(2, 3, 18, 21))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": True},
        {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 2},
        {"kernel_size": (5, 1), "stride": 4, "ceil_mode": True},
    ],
)
def test_max_pool2d_windows(device, arguments):
    check(device, lambda x: F.max_pool2d(x, **arguments, return_indices=True), torch.randn(2, 2, 11, 13))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": True},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": True, "count_include_pad": False},
        {"kernel_size": 3, "stride": 1, "divisor_override": 7},
    ],
)
def test_avg_pool2d_windows(device, arguments):
    check(device, lambda x: F.avg_pool2d(x, **arguments), torch.randn(2, 2, 11, 13))


def test_pool3d(device):
    x = torch.randn(2, 2, 6, 7, 9)
    check(device, lambda x: F.max_pool3d(x, 3, 2, 1, return_indices=True), x)
    check(device, lambda x: F.avg_pool3d(x, (2, 3, 2), 2, 1, count_include_pad=False), x)


def test_max_pool3d_channels_last_keeps_its_layout(device):
    x = torch.randn(2, 3, 4, 5, 6).to(device).to(memory_format=torch.channels_last_3d)
    out = F.max_pool3d(x, 2)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(out.cpu(), F.max_pool3d(x.cpu(), 2))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (11, 13), (20, 17)])
def test_adaptive2d(device, size):
    x = torch.randn(2, 3, 11, 13)
    check(device, lambda x: torch.ops.aten._adaptive_avg_pool2d(x, size), x)
    check(device, lambda x: F.adaptive_max_pool2d(x, size, return_indices=True), x)


def test_adaptive3d(device):
    x = torch.randn(2, 4, 5, 6, 7)
    check(device, lambda x: F.adaptive_avg_pool3d(x, (2, 4, 3)), x)
    check(device, lambda x: F.adaptive_max_pool3d(x, (2, 4, 3), return_indices=True), x)


def test_fractional(device):
    samples = torch.rand(2, 3, 2)
    x = torch.randn(2, 3, 12, 14)

    def pool(x):
        s = samples.to(x.device, x.dtype)
        return F.fractional_max_pool2d(x, 3, output_size=(5, 6), return_indices=True, _random_samples=s)

    check(device, pool, x)

    def pool3(x):
        s = torch.full((1, 2, 3), 0.37).to(x.device, x.dtype)
        return F.fractional_max_pool3d(x, (2, 3, 2), output_size=(3, 4, 2), return_indices=True, _random_samples=s)

    check(device, pool3, torch.randn(1, 2, 7, 9, 6))


def test_unpool(device):
    x = torch.randn(2, 3, 8, 10)

    def both(x):
        out, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(out, indices, 2)

    check(device, both, x)

    def both3(x):
        out, indices = F.max_pool3d(x, 2, return_indices=True)
        return F.max_unpool3d(out, indices, 2)

    check(device, both3, x[None].contiguous())


def test_unpool_reports_bad_indices(device):
    x, indices = torch.ones(1, 1, 2, 2, device=device), torch.full((1, 1, 2, 2), 99, device=device)
    with pytest.raises(IndexError, match="invalid max index"):
        F.max_unpool2d(x, indices, 2)
        torch.spiral.synchronize(device)


def test_nan_wins_and_infinities_have_places(device):
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 1, 1] = float("nan")
    x[0, 0, 4:, 4:] = -float("inf")
    check(device, lambda x: F.max_pool2d(x, 2, return_indices=True), x, grad=False)


def test_ties_take_the_first(device):
    check(device, lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True), torch.zeros(1, 2, 7, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_floats(device, dtype):
    x = torch.randn(2, 3, 9, 11).to(dtype).float()
    tolerance = 1e-3 if dtype == torch.float16 else 1e-2
    check(device, lambda x: F.max_pool2d(x, 3, 2, 1), x, dtype=dtype, tolerance=tolerance)
    check(device, lambda x: F.avg_pool2d(x, 3, 2, 1), x, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_max_pool_of_integers(device, dtype):
    x = torch.randint(0, 100, (2, 3, 9, 11)).to(dtype)
    check(device, lambda x: F.max_pool2d(x, 3, 2, 1), x, grad=False)


def test_avg_pool_of_integers_divides_towards_zero(device):
    check(device, lambda x: F.avg_pool2d(x, 2), torch.randint(-100, 100, (1, 2, 8, 8)), grad=False)


def test_empty_batch(device):
    x = torch.empty(0, 3, 8, 8, device=device, requires_grad=True)
    out = F.max_pool2d(x, 2)
    assert out.shape == (0, 3, 4, 4)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert F.max_pool3d(torch.empty(0, 2, 4, 4, 4, device=device), 2).shape == (0, 2, 2, 2, 2)


def test_out(device):
    x = torch.randn(1, 2, 6, 6, 6)
    out, indices = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    torch.ops.aten.max_pool3d_with_indices.out(x.to(device), [2], [], [0], [1], False, out=out, indices=indices)
    expected = F.max_pool3d(x, 2, return_indices=True)
    torch.testing.assert_close((out.cpu(), indices.cpu()), expected)


def test_errors(device):
    x = torch.randn(1, 2, 4, 4, 4, device=device)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        F.max_pool3d(x, 2, padding=2)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        F.max_pool3d(x, 5)
    with pytest.raises(RuntimeError, match="should be type int64"):
        F.max_unpool2d(x[0], x[0].int(), 2)
