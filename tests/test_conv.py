"""Gradients of strided convolutions, and strided transposed convolutions, against float64 on the CPU."""

import pytest
import torch

# input, weight, arguments: of each dimension the stride's phases have several, one or no taps
CASES = {
    "3x3": ((2, 4, 9, 12), (6, 4, 3, 3), {"stride": 2, "padding": 1}),
    "1x1": ((1, 5, 8, 7), (3, 5, 1, 1), {"stride": 2}),
    "dilated, grouped": ((1, 4, 20, 19), (6, 2, 3, 4), {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 2), "groups": 2}),
    "longer steps than taps": ((2, 3, 11), (4, 3, 2), {"stride": 4, "padding": 1}),
    "three dimensions": ((1, 2, 5, 4, 6), (3, 2, 2, 3, 1), {"stride": (2, 2, 1), "padding": (1, 1, 0)}),
    "many phases": ((1, 2, 13, 12), (2, 2, 5, 6), {"stride": 5, "padding": 2}),
    "depthwise": ((2, 4, 9, 10), (4, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 4}),
    "larger padding than taps": ((1, 2, 4, 5), (2, 2, 2, 2), {"stride": 2, "padding": 3}),
}  # fmt: skip


def gradients(function, leaves, **kwargs):
    """The result, and the gradients of its elements' weighted sum for the leaves."""
    leaves = [x.requires_grad_() for x in leaves]
    y = function(*leaves, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def check(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert (x.cpu().double() - y).norm() <= tolerance * y.norm().clamp(min=1e-30)


def check_convolution(device, x_shape, w_shape, kwargs, channels_last):
    """A convolution with a bias and its gradients, against float64 on the CPU."""
    x, w, b = torch.randn(x_shape), torch.randn(w_shape), torch.randn(w_shape[0])
    function = getattr(torch.nn.functional, f"conv{len(x_shape) - 2}d")
    want = gradients(function, [x.double(), w.double(), b.double()], **kwargs)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    check(gradients(function, [t.to(device) for t in (x, w, b)], **kwargs), want, 2e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_strided_gradients(device, case, channels_last):
    x_shape, w_shape, kwargs = CASES[case]
    if channels_last and (len(x_shape) != 4 or kwargs.get("groups")):
        pytest.skip("two dimensions, one group")
    torch.manual_seed(len(case))
    check_convolution(device, x_shape, w_shape, kwargs, channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["3x3", "1x1", "longer steps than taps", "dilated, grouped"])
def test_transposed(device, case, dtype):
    """Where a phase has no tap the result is the bias."""
    x_shape, w_shape, kwargs = CASES[case]
    groups = kwargs.get("groups", 1)
    torch.manual_seed(len(case))
    x, w, b = torch.randn(x_shape[0], w_shape[0], *x_shape[2:]), torch.randn(w_shape), torch.randn(w_shape[1] * groups)
    x, w, b = (t.to(dtype) for t in (x, w, b))
    function = getattr(torch.nn.functional, f"conv_transpose{len(x_shape) - 2}d")
    want = gradients(function, [t.double() for t in (x, w, b)], output_padding=1, **kwargs)
    got = gradients(function, [t.to(device) for t in (x, w, b)], output_padding=1, **kwargs)
    check(got, want, 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    "x_shape, co", [((3, 257, 7, 7), 300), ((1, 256, 5, 9), 33), ((2, 300, 1, 1), 24), ((2, 256, 37), 40)]
)
def test_products_of_few_pixels(device, x_shape, co, layout):
    """1x1 with many channels, in both directions."""
    if layout == "channels_last" and len(x_shape) != 4:
        pytest.skip("two dimensions")
    torch.manual_seed(co)
    x, w, b = (
        torch.randn(2 * x_shape[0], *x_shape[1:])[::2],
        torch.randn(co, x_shape[1], *x_shape[2:])[..., :1],
        torch.randn(co),
    )
    w = w[..., :1, :] if len(x_shape) == 4 else w
    function = getattr(torch.nn.functional, f"conv{len(x_shape) - 2}d")
    want = gradients(function, [t.double() for t in (x, w, b)])
    on_device = x.contiguous().to(device)
    if layout == "channels_last":
        on_device = on_device.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        on_device = x.repeat_interleave(2, 0).to(device)[::2]
    check(gradients(function, [on_device, w.contiguous().to(device), b.to(device)]), want, 2e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "x_shape, w_shape, kwargs",
    [
        ((3, 20, 7, 7), (13, 20, 3, 3), {"padding": 1}),
        ((5, 6, 5, 9), (8, 3, 3, 2), {"stride": (2, 1), "padding": 2, "dilation": 2, "groups": 2}),
        ((2, 9, 21), (7, 9, 4), {"stride": 3}),
    ],
)
def test_images_of_few_pixels(device, x_shape, w_shape, kwargs, channels_last):
    """On CPUs they share blocks of pixels."""
    if channels_last and len(x_shape) != 4:
        pytest.skip("two dimensions")
    torch.manual_seed(0)
    check_convolution(device, x_shape, w_shape, kwargs, channels_last)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1)])
def test_tiles(device, layout, padding):
    """3x3 with many channels of both sides and pixels enough for Winograd's algorithm on CPUs."""
    torch.manual_seed(len(layout))
    x, w, b = torch.randn(2, 70, 12, 17), torch.randn(33, 70, 3, 3) / 10, torch.randn(33)
    if layout == "expanded":
        x = x[:1, :, :1].expand(2, 70, 12, 17)
    want = gradients(torch.nn.functional.conv2d, [t.double() for t in (x, w, b)], padding=padding)
    on_device = x.to(device)
    if layout == "channels_last":
        on_device = on_device.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        on_device = torch.nn.functional.pad(x, (3, 2)).to(device)[..., 3:-2]
    elif layout == "transposed":
        on_device = x.transpose(2, 3).contiguous().to(device).transpose(2, 3)
    with torch.spiral.telemetry() as t:
        got = gradients(torch.nn.functional.conv2d, [on_device, w.to(device), b.to(device)], padding=padding)
    check(got, want, 2e-6)
    if torch.spiral.get_device_properties(device).schedule_class == "vector" and layout != "channels_last":
        names = [x.kernel for x in t.launches]
        count = 2 if padding == 1 else 1  # forward, gradient for the input; not with a border of two pixels
        assert sum(n.startswith("vector_winograd_f32") for n in names) == count, names
        assert sum(n.startswith("vector_winograd_weight") for n in names) == 1, names


@pytest.mark.parametrize("x_shape", [(1, 65, 7, 7), (3, 33, 4, 5), (1, 32, 1, 40)])
def test_few_tiles(device, x_shape):
    torch.manual_seed(0)
    check_convolution(device, x_shape, (40, x_shape[1], 3, 3), {"padding": 1}, False)


def test_tiles_follow_a_written_weight(device):
    """The transformed filters are kept until their weight is written."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 32, 16, 9).to(device), (torch.randn(32, 32, 3, 3) / 10).to(device)
    for _ in range(3):
        want = torch.nn.functional.conv2d(x.cpu().double(), w.cpu().double(), padding=1)
        for _ in range(2):
            check([torch.nn.functional.conv2d(x, w, padding=1)], [want], 2e-6)
        w.mul_(-1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_of_narrow_dtypes(device, dtype):
    torch.manual_seed(0)
    x, w, b = (t.to(dtype) for t in (torch.randn(1, 32, 14, 14), torch.randn(40, 32, 3, 3) / 10, torch.randn(40)))
    want = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), padding=1)
    got = torch.nn.functional.conv2d(x.to(device), w.to(device), b.to(device), padding=1)
    assert got.dtype == dtype
    check([got], [want], torch.finfo(dtype).eps)
