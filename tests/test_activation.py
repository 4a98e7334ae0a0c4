"""Activations that are operators of their own: values and gradients against the CPU in float64."""

import pytest
import torch
import torch.nn.functional as F

OPS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "logsigmoid": F.logsigmoid,
    "glu": lambda x: F.glu(x, 0) if x.dim() else F.logsigmoid(x),
    "glu_last": lambda x: F.glu(x, -1) if x.dim() else F.logsigmoid(x),
}
LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6),
    "transposed": lambda: torch.randn(6, 4).t(),
    "sliced": lambda: torch.randn(9, 12)[1:5, ::2],
    "expanded": lambda: torch.randn(4, 1).expand(4, 6),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_against_float64(device, op, layout):
    torch.manual_seed(0)
    x = 3 * LAYOUTS[layout]()
    reference = x.double().requires_grad_()
    y = OPS[op](reference)
    grad = torch.randn(y.shape)
    y.backward(grad.double())
    ours = x.to(device).requires_grad_()
    z = OPS[op](ours)
    z.backward(grad.to(device))
    torch.testing.assert_close(z.cpu().double(), y, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.grad.cpu().double(), reference.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(device, dtype):
    x = torch.linspace(-6, 6, 101).to(dtype)
    for op in (F.gelu, F.logsigmoid):
        torch.testing.assert_close(op(x.to(device)).cpu(), op(x.float()).to(dtype))


def test_extremes(device):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 100.0, -100.0])
    # Written down: some CPU builds of PyTorch have NaN for gelu(inf).
    gelu, logsigmoid = (
        (float("nan"), float("inf"), float("nan"), 100.0, 0.0),
        (float("nan"), 0.0, -float("inf"), 0.0, -100.0),
    )
    for op, expected in ((F.gelu, gelu), (F.logsigmoid, logsigmoid)):
        torch.testing.assert_close(op(x.to(device)).cpu(), torch.tensor(expected), equal_nan=True)


def test_out_and_odd_sizes(device):
    x = torch.randn(5)
    out = torch.empty(0, device=device)
    torch._C._nn.log_sigmoid(x.to(device), out=out)
    torch.testing.assert_close(out.cpu(), F.logsigmoid(x))
    with pytest.raises(RuntimeError, match="must be even"):
        F.glu(x.to(device), 0)
