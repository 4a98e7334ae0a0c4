"""The README's Python runs as printed, one block after the other, given a model and its input."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("error:spiral runs a graph")
def test_snippets(device, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
    names = {"model": model, "x": torch.randn(4, 16)}
    for block in blocks:
        exec(compile(block, README.name, "exec"), names)
    assert len(blocks) == 3
    assert model[0].weight.grad.device == device
    printed = capsys.readouterr().out
    assert names["t"].kernels() and "on the device" in printed  # of telemetry
    assert "graph 0:" in printed and "aten.relu" in printed  # of explain
