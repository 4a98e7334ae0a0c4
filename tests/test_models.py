"""Real models train and infer on every engine as on the CPU, without a fallback."""

from __future__ import annotations

import copy

import models as zoo
import pytest
import torch
from torch import nn

from torch_spiral.testing.devices import fallbacks

# Make test keeps one model of each kind; the rest are marked full.
QUICK = ("mlp", "resnet18", "unet", "gpt2", "lstm", "dcgan")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in zoo.MODELS]


@pytest.fixture(autouse=True)
def no_fallback():
    before = fallbacks()
    yield
    assert fallbacks() == before, "an op fell back to the CPU"


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    zoo.check_inference(spec, device, lambda m, i: zoo.outputs(spec, m, i))


@pytest.mark.parametrize("name", NAMES)
def test_backward(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    zoo.check_backward(spec, device, spec.loss)


@pytest.mark.parametrize("name", [n for n, s in zoo.MODELS.items() if s.generate])
def test_generate(name: str, device: torch.device) -> None:
    """Greedy decoding with a KV cache gives the CPU's tokens."""
    spec = zoo.MODELS[name]
    module, inputs = spec.build().eval(), spec.inputs(batch=2)
    # A wider spread of logits, so that rounding cannot change which is largest.
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3) if p.ndim > 1 else None
        cpu = spec.generate(module, inputs, 8)
        ours = spec.generate(module.to(device), zoo.to(inputs, device), 8)
    assert ours.device.type == device.type
    assert ours.tolist() == cpu.tolist()


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
}


@pytest.mark.parametrize("form", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "mlp" else pytest.mark.full) for n in zoo.MODELS])
def test_optimizer_steps(name: str, optimizer: str, form: str, device: torch.device) -> None:
    """Two steps from the same gradients move the parameters as on the CPU."""
    spec = zoo.MODELS[name]
    cls, options = OPTIMIZERS[optimizer]
    cpu = spec.build()
    spec.loss(cpu, spec.inputs(batch=4)).backward()
    ours, exact = copy.deepcopy(cpu).to(device), copy.deepcopy(cpu).double()
    for p, q, r in zip(cpu.parameters(), ours.parameters(), exact.parameters(), strict=True):
        if p.grad is not None:
            q.grad, r.grad = p.grad.to(device), p.grad.double()
    flags = {"foreach": form == "foreach", "fused": form == "fused"}
    for m in (cpu, ours, exact):
        step = cls(m.parameters(), **options, **(flags if m is ours else {"foreach": False}))
        step.step()
        step.step()
    for (key, p), c, e in zip(ours.named_parameters(), cpu.parameters(), exact.parameters(), strict=True):
        assert p.device.type == device.type
        zoo.assert_as_good(p, c, e, key)


def train(spec: zoo.Model, module: nn.Module, device: torch.device, steps: int, lr: float) -> list[float]:
    module.to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    batches = [zoo.to(spec.inputs(batch=8, seed=s), device) for s in range(4)]
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = spec.loss(module, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu().tolist()


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("resnet18", marks=pytest.mark.full), pytest.param("gpt_4x256", marks=pytest.mark.full)]
)
def test_training_curve(name: str, device: torch.device) -> None:
    """Fifty steps of AdamW: the loss falls and tracks the CPU's.

    Rounding differences grow during training, so early losses are held tightly and the whole curve by its mean drift.
    """
    spec = zoo.MODELS[name]
    module, steps, lr = spec.build(), 50, 1e-3
    cpu = train(spec, copy.deepcopy(module), torch.device("cpu"), steps, lr)
    ours = train(spec, copy.deepcopy(module), device, steps, lr)
    assert ours[0] == pytest.approx(cpu[0], rel=1e-5)
    assert ours[9] == pytest.approx(cpu[9], rel=1e-2)
    assert sum(ours[-4:]) < 0.8 * sum(ours[:4]), "the loss does not fall"
    drift = sum(abs(a - b) for a, b in zip(ours, cpu, strict=True)) / sum(cpu)
    assert drift < 0.05, f"mean drift of the curve {drift:.3f}"


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_training_with_dropout(name: str, device: torch.device) -> None:
    """The gradient is the slope of the loss for the same random numbers. Attention's dropout is part of its kernels."""
    spec = zoo.MODELS[name]
    module, inputs = spec.build().train().to(device), zoo.to(spec.inputs(batch=2), device)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.2

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return spec.loss(module, inputs)

    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.spiral.telemetry() as events:
        gradients = torch.autograd.grad(loss(), parameters)
    assert sum("attention" in e.kernel and "dropout" in e.kernel for e in events.kernels()) >= 2
    length = torch.stack([g.double().cpu().square().sum() for g in gradients]).sum().sqrt().item()
    losses = []
    with torch.no_grad():
        for step in (0.01 / length, -0.02 / length):
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g, alpha=step)
            losses.append(loss().item())
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(length, rel=0.02)


def test_lazy_modules_move_before_they_know_their_shapes(device):
    layer = torch.nn.LazyConv2d(4, 3).double()
    weight = layer.weight
    layer = layer.to(device)
    assert layer.weight is weight and weight.device.type == "spiral" and weight.dtype == torch.float64
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LazyLinear(4), torch.nn.LazyBatchNorm1d()).to(device)
    assert model(torch.ones(2, 2, device=device)).shape == (2, 4)
    assert model[1].weight.device.type == "spiral"
