"""The model zoo under torch.compile(backend="spiral"): forward and backward as near to float64 as the CPU's own float32 is."""

from __future__ import annotations

import copy

import models as zoo
import pytest
import torch
from test_models import assert_as_good, outputs

QUICK = ("mlp", "dcgan")  # of the everyday tier
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in zoo.MODELS]
pytestmark = pytest.mark.filterwarnings("error:spiral runs a graph")  # a graph that is run eagerly is a failure here


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    module, inputs = spec.build().eval(), spec.inputs(batch=3)
    with torch.no_grad():
        cpu = outputs(spec, module, inputs)
        exact = outputs(spec, copy.deepcopy(module).double(), zoo.to(inputs, "cpu", torch.float64))
        compiled = torch.compile(lambda m, i: outputs(spec, m, i), backend="spiral")
        module.to(device)
        for _ in range(2):
            ours = compiled(module, zoo.to(inputs, device))
    for k, (o, c, e) in enumerate(zip(ours, cpu, exact, strict=True)):
        assert o.device.type == device.type
        assert_as_good(o, c, e, f"output {k}")


@pytest.mark.parametrize("name", NAMES)
def test_backward(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    module, inputs = spec.build(), spec.inputs(batch=4)
    runs = {
        "cpu": (copy.deepcopy(module), inputs),
        "exact": (copy.deepcopy(module).double(), zoo.to(inputs, "cpu", torch.float64)),
        "ours": (copy.deepcopy(module).to(device), zoo.to(inputs, device)),
    }
    losses = {}
    for run, (m, i) in runs.items():
        losses[run] = (torch.compile(spec.loss, backend="spiral") if run == "ours" else spec.loss)(m, i)
        losses[run].backward()
    assert_as_good(losses["ours"], losses["cpu"], losses["exact"], "loss")
    exact, cpu = (dict(runs[r][0].named_parameters()) for r in ("exact", "cpu"))
    scale = 1e-3 * max(float(p.grad.norm()) for p in exact.values() if p.grad is not None)
    for key, p in runs["ours"][0].named_parameters():
        if exact[key].grad is None:
            assert p.grad is None
            continue
        assert p.grad is not None and p.grad.device.type == device.type
        assert_as_good(p.grad, cpu[key].grad, exact[key].grad, f"gradient of {key}", scale)
    for key, b in runs["ours"][0].named_buffers():
        if b.is_floating_point():
            assert_as_good(b, runs["cpu"][0].get_buffer(key), runs["exact"][0].get_buffer(key), f"buffer {key}")
