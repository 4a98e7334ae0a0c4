"""The model zoo under torch.compile(backend="spiral"): forward and backward as near to float64 as the CPU's own float32 is."""

from __future__ import annotations

import models as zoo
import pytest
import torch

QUICK = ("mlp", "dcgan")  # of the everyday tier
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in zoo.MODELS]
pytestmark = pytest.mark.filterwarnings("error:spiral runs a graph")  # a graph that is run eagerly is a failure here


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    run = torch.compile(lambda m, i: zoo.outputs(spec, m, i), backend="spiral")
    zoo.check_inference(spec, device, run, calls=2)


@pytest.mark.parametrize("name", NAMES)
def test_backward(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    zoo.check_backward(spec, device, torch.compile(spec.loss, backend="spiral"))
