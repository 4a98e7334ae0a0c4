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


def test_ctc(device):
    x, target = torch.randn(12, 4, 6), torch.randint(1, 6, (4, 5))
    target[0, :4], target[3, :3] = torch.tensor([2, 2, 3, 1]), torch.tensor([1, 2, 3])

    def f(x, t):
        return F.ctc_loss(x.log_softmax(-1), t, [12, 11, 10, 3], [5, 4, 0, 3], reduction="none")

    compare(device, f, x, target)


def test_target_out_of_bounds(device):
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        F.nll_loss(torch.randn(4, 3, device=device), torch.tensor([0, 1, 7, 2], device=device)).item()
