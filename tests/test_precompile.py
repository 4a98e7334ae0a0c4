"""TORCH_CACHING_PRECOMPILE=1: what Dynamo traced, and the graphs that we made of it, start a second process without tracing."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 13), reason="kept traces as torch 2.13 has them")

# As transformers writes its models: forward is a decorated function of another module and returns an OrderedDict's subclass.
WRAPPING = """
    import functools
    from collections import OrderedDict

    class Output(OrderedDict):
        pass

    def reports(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, scale=2.0, **kwargs):
            return forward(self, *args, scale=scale, **kwargs)
        return wrapper
"""
MODEL = """
    import torch
    from torch import nn
    from wrapping import Output, reports

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

        @reports
        def forward(self, x, scale):
            hidden = self.first(x).relu()
            return Output(hidden=hidden, logits=self.last(hidden).softmax(-1) * scale)

    def loss(x, w):
        return (torch.tanh(x @ w) * x[:, :8]).sum()
"""
RUN = """
    import json, sys
    import torch
    from torch._dynamo.utils import counters
    from model import Model, loss

    device = torch.device(sys.argv[1])
    torch.manual_seed(0)
    module = Model()
    x, w = torch.randn(4, 16), torch.randn(16, 8)
    found = {}

    def step(device, compile):
        if sys.argv[3] == "training":
            a, b = x.to(device).requires_grad_(), w.to(device).requires_grad_()
            return [g.cpu() for g in torch.autograd.grad(compile(loss)(a, b), (a, b))]
        with torch.no_grad():
            return [compile(module.to(device))(x.to(device))["logits"].cpu()]

    expected = step("cpu", lambda f: f)
    results = step(device, lambda f: torch.compile(f, backend="spiral"))
    found["error"] = max((a - b).abs().max().item() for a, b in zip(results, expected, strict=True))
    found["traced"] = counters["stats"]["unique_graphs"]
    found["hits"] = counters["dynamo_cache"]["dynamo_cache_hit"]
    if sys.argv[2] == "save":
        torch.compiler.save_cache_artifacts()
    elif sys.argv[3] == "inference":  # guards hold: another number is another graph
        with torch.no_grad():
            compiled = torch.compile(module, backend="spiral")
            y, z = (compiled(x.to(device), scale=s)["logits"].cpu() for s in (2.0, 3.0))
        found["other"] = (z - 1.5 * y).abs().max().item()
        found["traced later"] = counters["stats"]["unique_graphs"] - found["traced"]
    print(json.dumps(found))
"""


def start(device, folder, *what):
    environment = dict(
        os.environ, TORCH_CACHING_PRECOMPILE="1", TORCH_LOGS="-all", SPIRAL_CACHE_DIR=str(folder / "kernels"),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
        PYTHONPATH=os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), str(device), *what],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("graph", ["inference", pytest.param("training", marks=pytest.mark.full)])
def test_a_second_process_starts_without_tracing(device, tmp_path, graph):
    for name, text in (("wrapping", WRAPPING), ("model", MODEL), ("run", RUN)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    first = start(device, tmp_path, "save", graph)
    assert first["traced"] == 1 and first["hits"] == 0 and first["error"] < 1e-5
    second = start(device, tmp_path, "load", graph)
    assert second["traced"] == 0 and second["hits"] == 1 and second["error"] < 1e-5
    if graph == "inference":
        assert second["traced later"] == 1 and second["other"] < 1e-5


def test_graphs_of_other_devices_and_sources_are_not_loaded(monkeypatch):
    from torch_spiral.compiler import precompile

    kept = pickle.dumps(precompile.Artifact("key", "direct = 1"))
    assert pickle.loads(kept).after_deserialization() == 1
    monkeypatch.setattr(precompile, "built_for", lambda: "another device")
    with pytest.raises(RuntimeError, match="compiled for other spiral devices, or by another version"):
        pickle.loads(kept)


def test_the_direct_part_of_a_module_needs_nothing_of_inductor():
    from torch_spiral.compiler import direct

    source = textwrap.dedent("""
        from torch._inductor.async_compile import AsyncCompile
        from math import inf as top
        compile = AsyncCompile()
        constant, other = 2, 3
        def graph(x):
            return x * constant + top
        graph = (graph, 1)
        direct = graph[0]
        compile.wait(globals())
        def call(args):
            return graph[0](args)
    """)
    kept = direct.part(source)
    assert "AsyncCompile" not in kept and "call(" not in kept
    names = {}
    exec(kept, names)
    assert names["direct"](0.0) == float("inf")
