"""Losses, forward and backward, against the CPU."""

import pytest
import torch
import torch.nn.functional as F

REDUCTIONS = ("mean", "none")


def compare(device, f, x, *rest):
    want_x, got_x = x.clone().requires_grad_(), x.to(device).requires_grad_()
    want, got = f(want_x, *rest), f(got_x, *(t.to(device) for t in rest))
    torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=1e-4, atol=1e-5)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    want.backward(grad)
    got.backward(grad.to(device))
    torch.testing.assert_close(got_x.grad.cpu(), want_x.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(device, reduction):
    target, weight = torch.randint(0, 10, (33,)), torch.rand(10) + 0.1
    target[3] = -100
    x = torch.randn(33, 10)
    compare(device, lambda x, t: F.cross_entropy(x, t, reduction=reduction), x, target)
    compare(device, lambda x, t, w: F.nll_loss(x, t, w, reduction=reduction), x, target, weight)
    compare(device, lambda x, t: F.nll_loss(x, t, reduction=reduction), torch.randn(10), torch.tensor(4))
    images = torch.randint(0, 10, (5, 4, 3))
    compare(
        device,
        lambda x, t: F.cross_entropy(x, t, reduction=reduction, ignore_index=2),
        torch.randn(5, 10, 4, 3),
        images,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_losses(device, reduction):
    compare(
        device,
        lambda x, t, w: F.binary_cross_entropy(x, t, w, reduction=reduction),
        torch.rand(6, 7),
        torch.rand(6, 7),
        torch.rand(7),
    )
    target = torch.randint(0, 10, (33,))
    for p in (1, 2):
        compare(
            device,
            lambda x, t, p=p: F.multi_margin_loss(x, t, p, 0.5, reduction=reduction),
            torch.randn(33, 10),
            target,
        )
    labels = torch.randint(0, 10, (9, 10))
    labels[:, 5], labels[0, 0] = -1, -1
    compare(device, lambda x, t: F.multilabel_margin_loss(x, t, reduction=reduction), torch.randn(9, 10), labels)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_cross_entropy_takes_probabilities(device, reduction):
    """Others are reported asynchronously, by the operator's name and with the text of the CPU."""

    text = r"binary_cross_entropy\(\): all elements of input should be between 0 and 1"

    def loss(x, **options):
        return F.binary_cross_entropy(x, torch.ones_like(x), reduction=reduction, **options)

    fine = torch.rand(40, 6, device=device)
    fine[0, :2] = torch.tensor([0.0, 1.0], device=device)
    for bad in (1.5, -1e-6, float("nan")):
        for x in (fine.clone(), fine.t().clone().t(), fine.half(), fine[3:, 1:].clone()):
            x[11, 2] = bad
            loss(x, weight=torch.zeros(x.shape[1], device=device))
            with pytest.raises(RuntimeError, match=text):
                torch.spiral.synchronize()
    beside = torch.cat([fine, fine + 2], 1)
    for x in (fine, fine[1], beside[:, :6], fine.t(), fine[:1].expand(5, 6), fine[0, 1], fine[:0], fine.half()):
        torch.testing.assert_close(
            loss(x).cpu(), loss(x.cpu().float()).to(x.dtype), rtol=1e-3, atol=1e-5, equal_nan=True
        )
    torch.spiral.synchronize()


def test_ctc(device):
    x, target = torch.randn(12, 4, 6), torch.randint(1, 6, (4, 5))
    target[0, :4], target[3, :3] = torch.tensor([2, 2, 3, 1]), torch.tensor([1, 2, 3])

    def f(x, t):
        return F.ctc_loss(x.log_softmax(-1), t, [12, 11, 10, 3], [5, 4, 0, 3], reduction="none")

    compare(device, f, x, target)


def test_target_out_of_bounds(device):
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        F.nll_loss(torch.randn(4, 3, device=device), torch.tensor([0, 1, 7, 2], device=device)).item()


# ---- cross entropy without log-probabilities ------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[1:, 3:48],
    "expanded": lambda x: x[:1].expand(6, -1),
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_from_logits(device, layout, reduction):
    torch.manual_seed(0)
    base, arrange = torch.randn(7, 45), LAYOUTS[layout]
    x, y = arrange(base), torch.randint(45, (7,))
    y = y[: x.shape[0]]
    y[2] = -100
    want_x = x.double().requires_grad_()
    want = F.cross_entropy(want_x, y, reduction=reduction)
    ours_x = arrange(base.to(device)).requires_grad_()
    assert ours_x.stride() == x.stride()
    got = F.cross_entropy(ours_x, y.to(device), reduction=reduction)
    assert "CrossEntropy" in got.grad_fn.name() and got.shape == want.shape
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6)
    weights = torch.linspace(1, 2, want.numel(), dtype=torch.float64).reshape(want.shape)
    (grad,) = torch.autograd.grad(want, want_x, weights)
    (ours,) = torch.autograd.grad(got, ours_x, weights.float().to(device))
    torch.testing.assert_close(ours.cpu().double(), grad, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(F.cross_entropy(ours_x, y.to(device), reduction=reduction), got.detach())


def test_cross_entropy_of_special_rows(device):
    """Long rows, infinite and missing logits, all samples ignored, an ignored class."""
    x = torch.randn(4, 5001)
    x[1, 7], x[2, :] = -torch.inf, 1e5
    y = torch.tensor([5000, 3, 0, 9])
    cpu, ours = x.double().requires_grad_(), x.to(device).requires_grad_()
    want = F.cross_entropy(cpu, y, reduction="sum", ignore_index=9)
    got = F.cross_entropy(ours, y.to(device), reduction="sum", ignore_index=9)
    torch.testing.assert_close(got.item(), want.item(), rtol=1e-6, atol=0)
    want.backward(), got.backward()
    torch.testing.assert_close(ours.grad.cpu().double(), cpu.grad, rtol=1e-5, atol=1e-7)
    assert F.cross_entropy(ours, torch.full((4,), -100, device=device)).isnan()
    assert F.cross_entropy(
        torch.full((2, 3), torch.inf, device=device), torch.zeros(2, dtype=torch.long, device=device)
    ).isnan()
    with pytest.raises(IndexError, match="Target 5001 is out of bounds"):
        F.cross_entropy(ours, torch.full((4,), 5001, device=device)).item()


def test_cross_entropy_under_autocast(device):
    """Half-precision logits, a float32 loss, as with ATen's log_softmax."""
    x, y = torch.randn(5, 40).half(), torch.randint(40, (5,))
    want_x = x.double().requires_grad_()
    want = F.cross_entropy(want_x, y)
    want.backward()
    ours = x.to(device).requires_grad_()
    with torch.autocast("spiral", torch.float16):
        got = F.cross_entropy(ours, y.to(device))
    got.backward()
    assert got.dtype == torch.float32 and ours.grad.dtype == torch.float16
    torch.testing.assert_close(got.item(), want.item(), rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.grad.cpu().double(), want_x.grad, rtol=2e-3, atol=1e-4)


def test_cross_entropy_that_others_look_into(device):
    """Gradients of gradients, function transforms, forward mode and dispatch modes get ATen's operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 5, 2])

    def both(function):
        torch.testing.assert_close(
            function(x.float().to(device), y.to(device)).cpu().double(), function(x, y), rtol=1e-5, atol=1e-6
        )

    def second(x, y):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(x, y), x, create_graph=True)
        return torch.autograd.grad((g * g).sum(), x)[0]

    both(second)
    both(lambda x, y: F.cross_entropy(torch._neg_view(x), y))
    both(lambda x, y: torch.func.grad(lambda x: F.cross_entropy(x, y))(x))
    both(lambda x, y: torch.func.vmap(lambda x: F.cross_entropy(x[None], y[:1]))(x))
    both(lambda x, y: torch.func.jvp(lambda x: F.cross_entropy(x, y), (x,), (torch.ones_like(x).tril(),))[1])

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        F.cross_entropy(x.float().to(device), y.to(device))
    assert torch.ops.aten._log_softmax.default in seen
