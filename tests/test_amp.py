"""torch.autocast("spiral") and the gradient scaler."""

import pytest
import torch
import torch.nn.functional as F

from torch_spiral import _C


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


WEIGHTS = {
    "linear": (lambda x, w, b: F.linear(x, w.t(), b), {}),
    "linear without bias": (lambda x, w, b: F.linear(x, w.t()), {}),
    "linear, three dimensions": (lambda x, w, b: F.linear(x.view(3, 4, -1), w.t(), b), {}),
    "linear, transposed input": (lambda x, w, b: F.linear(x, w.t(), b), {"x": lambda x: x.t().contiguous().t()}),
    "linear, one row of a slice": (lambda x, w, b: F.linear(x[5:6, ::2], w[::2].t(), b), {}),
    "linear, offset weight": (lambda x, w, b: F.linear(x[:, 3:], w[3:].t(), b), {}),
    "linear, nothing": (lambda x, w, b: F.linear(x[:0], w.t(), b), {}),
    "matmul": (lambda x, w, b: x @ w, {}),
    "matmul, expanded weight": (lambda x, w, b: x @ w[:, :1].expand(-1, 5), {}),
    "mm": (lambda x, w, b: torch.mm(x, w), {}),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), {}),
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x, w, alpha=0.5), {}),
    "vector": (lambda x, w, b: x[0] @ w, {}),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.full), torch.bfloat16])
def test_products_of_weights_that_autocast_leaves(device, dtype, name):
    """Without gradients, as often as packed forms take to be kept, and after the weight is written."""
    function, change = WEIGHTS[name]
    torch.manual_seed(0)
    x, w, b = torch.randn(12, 64), torch.randn(64, 48) / 8, torch.randn(48)
    x = change.get("x", lambda x: x)(x)
    if name == "matmul, expanded weight":
        b = None
    there = [None if t is None else t.to(device) for t in (x, w, b)]
    assert there[0].stride() == x.stride()
    rounded = [None if t is None else t.to(dtype).double() for t in (x, w, b)]
    for factor in (1, 1, 1, 2, 2):
        if factor == 2 and there[1] is not None:
            there[1].copy_(w * 2)
            rounded[1] = (w * 2).to(dtype).double()
        with torch.no_grad(), torch.autocast("spiral", dtype=dtype):
            y = function(*there)
        assert y.dtype == dtype
        torch.testing.assert_close(y.cpu().double(), function(*rounded), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_not_cast_in_every_call(device, compiled):
    """A layer's steady state launches a cast of its input and a product; results are those of a layer whose weights are cast, to rounding;
    memory pressure costs a conversion only."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 192).to(device)
    x = torch.randn(64, 256).to(device)
    call = torch.compile(layer, backend="spiral") if compiled else layer
    with torch.autocast("spiral", dtype=torch.bfloat16):
        expected = layer(x)
        assert expected.requires_grad  # whose forward casts
        with torch.no_grad():
            for _ in range(4):
                y = call(x)
            before = _C.plan_statistics()
            y = call(x)
            after = _C.plan_statistics()
            _C.drop_packed(x.device.index, True)
            again = call(x)
    assert after["misses"] == before["misses"]
    assert after["launches"] - before["launches"] == 2
    torch.testing.assert_close(y.float().cpu(), expected.detach().float().cpu(), rtol=2e-2, atol=2e-2)
    assert torch.equal(y, again)


def test_gradients_of_weights_under_autocast(device):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(32, 8).to(device), torch.randn(4, 32).to(device)
    with torch.autocast("spiral", dtype=torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().sum() > 0


def test_views_of_one_operand_have_packed_forms_of_their_own(device):
    """Two views of a weight in a compiled graph that start together and are equally large."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 96), torch.randn(128, 96)
    f = torch.compile(lambda x, w: (x @ w[:64].t(), x @ w[::2].t()), backend="spiral")
    expected = [x @ w[:64].t(), x @ w[::2].t()]
    with torch.no_grad():
        x, there = x.to(device), w.to(device)
        for _ in range(4):
            for a, b in zip(f(x, there), expected, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
