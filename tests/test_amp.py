"""torch.autocast("spiral") and the gradient scaler."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state(device, dtype):
    assert not torch.is_autocast_enabled("spiral")
    with torch.autocast("spiral", dtype=dtype):
        assert torch.is_autocast_enabled("spiral") and torch.get_autocast_dtype("spiral") == dtype
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("spiral", enabled=False):
            assert not torch.is_autocast_enabled("spiral")
    assert not torch.is_autocast_enabled("spiral")
    with torch.spiral.amp.autocast(dtype=dtype):
        assert torch.get_autocast_dtype("spiral") == dtype
    with torch.spiral.amp.autocast(), torch.autocast("spiral"):
        assert torch.get_autocast_dtype("spiral") == torch.float16


def test_supported_dtypes():
    assert set(torch.spiral.get_amp_supported_dtype()) == {torch.float16, torch.bfloat16}
    with pytest.warns(UserWarning, match="float64|not support"), torch.autocast("spiral", dtype=torch.float64):
        assert not torch.is_autocast_enabled("spiral")


def meta(device):
    """A spiral tensor for the dispatcher alone: what autocast decides is seen on fake tensors, without kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(), lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lists(device, dtype):
    mode, make = meta(device)
    with mode, torch.autocast("spiral", dtype=dtype):
        a, b = make(3, 4), make(4, 5)
        half = make(3, 4, dtype=dtype)
        assert (a @ b).dtype == dtype  # lower precision
        assert torch.nn.functional.linear(a, make(5, 4), make(5)).dtype == dtype
        assert half.softmax(1).dtype == torch.float32  # float32
        assert half.exp().dtype == torch.float32
        assert half.sum().dtype == torch.float32  # float32 unless told
        assert half.sum(dtype=dtype).dtype == dtype
        assert torch.cat([a, half]).dtype == torch.float32  # the widest
        assert torch.addcmul(half, half, a).dtype == torch.float32
        assert (a + half).dtype == torch.float32 and half.relu().dtype == dtype  # as they are
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            torch.nn.functional.binary_cross_entropy(make(3), make(3))
        with torch.autocast("spiral", enabled=False):
            assert (a @ b).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_step(device, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("spiral", enabled=dtype == torch.float16)
    x, y = torch.randn(32, 8).to(device), torch.randint(4, (32,)).to(device)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("spiral", dtype=dtype):
            out = model(x)
            loss = torch.nn.functional.cross_entropy(out, y)
        assert out.dtype == dtype and loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < losses[0] - 0.05


def test_scaler_skips_a_step_that_overflowed(device):
    weight = torch.nn.Parameter(torch.ones(3).to(device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("spiral", init_scale=1024.0)
    scaler.scale(torch.zeros(()).to(device))
    weight.grad = torch.tensor([1.0, float("inf"), 2.0]).to(device)
    scaler.step(optimizer)
    scaler.update()
    assert weight.detach().cpu().tolist() == [1, 1, 1] and scaler.get_scale() == 512.0
