"""An operator without a kernel runs on the CPU, says so once, is counted, and can be refused."""

import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def mode():
    """Sets the mode for a test and counts from zero."""
    before = torch.spiral.fallback_mode()
    torch.spiral.reset_fallbacks()
    yield torch.spiral.set_fallback_mode
    torch.spiral.set_fallback_mode(before)
    torch.spiral.reset_fallbacks()


@pytest.fixture(scope="module")
def missing():
    """A custom operator with a CPU kernel alone, as a user's extension would have it."""
    library = torch.library.Library("spiral_test_fallback", "DEF")
    library.define("twice(Tensor x, *, Tensor(a!)? out=None) -> Tensor")
    library.define("into_(Tensor(a!) x, Tensor y) -> Tensor(a!)")
    library.impl("twice", lambda x, out=None: x * 2, "CPU")
    library.impl("into_", lambda x, y: x.add_(y), "CPU")
    yield torch.ops.spiral_test_fallback
    library._destroy()


def test_warns_once_and_counts(device, mode, missing, capfd):
    mode("warn")
    x = torch.arange(6.0, device=device).view(2, 3)
    first, second = missing.twice(x), missing.twice(x.t())  # torch.ops hands C++ warnings to stderr, not to Python
    assert first.device == x.device and first.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert second.tolist() == [[0, 6], [2, 8], [4, 10]]
    said = [line for line in capfd.readouterr().err.splitlines() if "spiral_test_fallback::twice has no kernel" in line]
    assert len(said) == 1 and "Float[2, 3]" in said[0] and "test_fallback.py" in said[0]
    assert torch.spiral.fallbacks() == {"spiral_test_fallback::twice": 2}


def test_silent_counts_too(device, mode, missing, capfd):
    mode("silent")
    missing.twice(torch.ones(2, device=device))
    assert "has no kernel" not in capfd.readouterr().err
    assert torch.spiral.fallbacks() == {"spiral_test_fallback::twice": 1}


def test_error_refuses_and_the_device_lives_on(device, mode, missing):
    mode("error")
    x = torch.ones(2, 2, device=device)
    with pytest.raises(NotImplementedError, match=r"spiral_test_fallback::twice.*Float\[2, 2\].*SPIRAL_FALLBACK"):
        missing.twice(x)
    assert (x + 1).tolist() == [[2, 2], [2, 2]]


def test_writes_come_back(device, mode, missing):
    """Arguments that the schema marks as written are written on the device, through views too."""
    mode("silent")
    x = torch.zeros(4, 4, device=device)
    column = x[:, 1]
    assert missing.into_(column, torch.arange(4.0, device=device)) is column
    assert x[:, 1].tolist() == [0, 1, 2, 3] and x[:, 0].tolist() == [0, 0, 0, 0]


def test_gradients_flow_through(device, mode, missing):
    """Autograd is upstream's: an operator with a backward of its own keeps it."""
    mode("silent")

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return missing.twice(x)

        @staticmethod
        def backward(ctx, grad):
            return missing.twice(grad)

    x = torch.ones(3, device=device, requires_grad=True)
    Twice.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2] and x.grad.device == x.device


@pytest.mark.parametrize("code", ["torch.spiral.fallback_mode()", "torch.empty(0, device='spiral')"])
def test_the_variable_is_checked(code):
    code = f"import torch; {code}"
    wrong = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SPIRAL_FALLBACK": "maybe"}, capture_output=True, text=True
    )
    assert wrong.returncode != 0
    assert "SPIRAL_FALLBACK" in wrong.stderr and "warn" in wrong.stderr and "maybe" in wrong.stderr


@pytest.mark.parametrize("how", ["warn", "silent", "error"])
def test_no_mode_mixes_devices(device, mode, how):
    """A forgotten .to(): ATen picks the CPU's operator by the input, and the weight brings it to us."""
    mode(how)
    for n, f in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1):
        x, w = torch.ones(1, 2, *[4] * n), torch.ones(3, 2, *[3] * n)
        for a, b in ((x, w.to(device)), (x.to(device), w)):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device") as caught:
                f(a, b)
            assert not isinstance(caught.value, NotImplementedError)
    assert not torch.spiral.fallbacks()
