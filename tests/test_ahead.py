"""torch.compile(...).aot_compile: functions saved in one process, loaded and called in another."""

import contextlib
import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from torch_spiral.compiler.dynamo import compiles_ahead

if not hasattr(torch.compile(lambda x: x), "aot_compile"):
    pytest.skip("torch without aot_compile", allow_module_level=True)

from torch_spiral.compiler import ahead

FUNCTIONS = """
def product(x, w):
    return (x @ w).relu()

def written(x, w):
    return x.add_(1) @ w

def dynamic(x, w):
    return (x @ w).relu().softmax(0)

def aliased(x, w):  # AOTAutograd makes the view at run time
    return (x @ w).relu(), x.t()

def trained(x, w):
    return (x @ w).sigmoid()
"""

PROGRAM = """
import sys
import torch
import torch_spiral
import saved_functions

folder, device = sys.argv[1:]
torch.manual_seed(0)
for name in ("product", "written", "dynamic", "aliased", "trained"):
    f = getattr(saved_functions, name)
    with open(f"{folder}/{name}", "rb") as file:
        call = torch.compiler.load_compiled_function(file)
    direct = type(call._artifacts.compiled_fn.call).__name__ == "GraphCall"
    assert direct == (name not in ("aliased", "trained")), name
    assert not direct or "torch._inductor.compile_fx" not in sys.modules
    for rows in (4, 9) if name == "dynamic" else (4,):
        x, w = torch.randn(rows, 8), torch.randn(8, 6)
        a, b = x.to(device), w.to(device).requires_grad_(name == "trained")
        x, w = x.double(), w.double().requires_grad_(name == "trained")
        got, want = call(a, b), f(x, w)
        for g, e in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, want)), strict=True):
            torch.testing.assert_close(g.detach().cpu().double(), e.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.cpu().double(), x, rtol=1e-6, atol=1e-6)
        if name == "trained":
            got.sum().backward()
            want.sum().backward()
            torch.testing.assert_close(b.grad.cpu().double(), w.grad, rtol=1e-5, atol=1e-5)
    try:
        call(a.half(), b)
    except RuntimeError as error:
        assert "GuardManager check failed" in str(error)
    else:
        raise AssertionError("called with another dtype")
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(nn.functional.gelu(self.linear(x)))


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def compiled(f, device, *, train=False, **options):
    x, w = torch.randn(4, 8, device=device), torch.randn(8, 6, device=device, requires_grad=train)
    return torch.compile(f, backend="spiral", fullgraph=True, **options).aot_compile(((x, w), {}))


def test_saved_functions_run_in_another_process(device, tmp_path, monkeypatch):
    (tmp_path / "saved_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    functions = importlib.import_module("saved_functions")
    try:
        for name in ("product", "written", "dynamic", "aliased", "trained"):
            options = {"train": name == "trained", "dynamic": True if name == "dynamic" else None}
            compiled(getattr(functions, name), device, **options).save_compiled_function(str(tmp_path / name))
    finally:
        del sys.modules["saved_functions"]
    paths = os.pathsep.join(
        [str(tmp_path), os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]
    )
    env = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(device)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_saved_module_is_loaded(device):
    from torch._dynamo.aot_compile import ModelInput

    model = Net().to(device)
    x = torch.randn(4, 8, device=device)
    first = torch.compile(model, backend="spiral", fullgraph=True)
    first._aot_compile([ModelInput((x,), {}, [contextlib.nullcontext()])])
    data = first._save_aot_compiled_module()
    torch._dynamo.reset()
    second = torch.compile(model, backend="spiral", fullgraph=True)
    second._load_aot_compiled_module(data)
    torch.testing.assert_close(second(x), model(x), rtol=1e-5, atol=1e-5)


def test_functions_for_other_devices_are_refused(device, monkeypatch):
    f = compiled(lambda x, w: x @ w, device)._artifacts.compiled_fn
    data = ahead.Compiled.serialize_compile_artifacts(f)
    monkeypatch.setattr(ahead, "built_for", lambda: "another")
    with pytest.raises(RuntimeError, match="compiled for other spiral devices"):
        ahead.Compiled.deserialize_compile_artifacts(data)
    assert not compiles_ahead()
