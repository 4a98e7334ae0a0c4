"""The numbers that the device promises: spiral eager against torch eager on the CPU, in one process.

python -m benchmarks.device [--engine opencl] [--only matmul,linear] [--strict]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import overhead
from benchmarks.harness import Reading, Step, Work, arguments, model_zoo, run_suite, versus_cpu

Device = torch.device


def randn(device: Device, *shape: int, grad: bool = False) -> Tensor:
    """The same numbers on every device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    return x.requires_grad_() if grad else x


def matmul(n: int) -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        a, b = randn(device, n, n), randn(device, n, n)
        return lambda: a @ b

    return make


def linear(rows: int, features: int) -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        x, w = randn(device, rows, features), randn(device, features, features)
        return lambda: x @ w.t()

    return make


def attention(backward: bool) -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        q, k, v = (randn(device, 1, 12, 1024, 64, grad=backward) for _ in range(3))
        g = randn(device, 1, 12, 1024, 64)

        def step() -> None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if backward:
                torch.autograd.grad(out, (q, k, v), g)

        return step

    return make


def rows(op: Callable[[Tensor], Tensor]) -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        x = randn(device, 4096, 1024)
        return lambda: op(x)

    return make


def add(with_out: bool) -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        x, y = randn(device, 1 << 24), randn(device, 1 << 24)
        out = torch.empty_like(x)
        return (lambda: torch.add(x, y, out=out)) if with_out else (lambda: x + y)

    return make


def conv(backward: bool) -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        x = randn(device, 8, 64, 56, 56, grad=backward)
        w = randn(device, 64, 64, 3, 3, grad=backward)
        g = randn(device, 8, 64, 56, 56)

        def step() -> None:
            out = F.conv2d(x, w, padding=1)
            if backward:
                torch.autograd.grad(out, (x, w), g)

        return step

    return make


def inference(name: str, batch: int) -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        zoo = model_zoo()
        spec = zoo.MODELS[name]
        module = spec.build("real").eval().to(device)
        inputs = zoo.to(spec.inputs("real", batch), device)

        def step() -> None:
            with torch.no_grad():
                spec.forward(module, inputs)

        return step

    return make


def training(name: str, batch: int, optimizer: str = "adamw") -> Callable[[Device], Step]:
    def make(device: Device) -> Step:
        zoo = model_zoo()
        spec = zoo.MODELS[name]
        module: nn.Module = spec.build("real").to(device)
        inputs = zoo.to(spec.inputs("real", batch), device)
        update = (
            torch.optim.AdamW(module.parameters(), lr=1e-4)
            if optimizer == "adamw"
            else torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        )

        def step() -> None:
            update.zero_grad()
            spec.loss(module, inputs).backward()
            update.step()

        return step

    return make


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],))


def work(
    name: str, make: Callable[[Device], Step], bar: float, aim: float | None = None, intel: float | None = None
) -> Work:
    return Work(name, versus_cpu(make), {"torch": bar}, aim, intel)


ROWS: list[Work | Reading] = [
    *(work(f"matmul {n}", matmul(n), 1.6, intel=0.75) for n in (512, 1024, 1400, 2048, 3072)),
    work("linear 128x768x768", linear(128, 768), 1.5, intel=0.75),
    work("linear 16x1024x1024", linear(16, 1024), 1.5, intel=0.75),
    work("causal attention B1 H12 T1024 D64, forward", attention(False), 2.0),
    work("causal attention B1 H12 T1024 D64, forward + backward", attention(True), 2.2),
    work("softmax 4096x1024", rows(lambda x: x.softmax(-1)), 1.15),
    work("layer norm 4096x1024", rows(layer_norm), 1.3),
    work("add 16M, fresh output", add(False), 3.3),
    work("add 16M, out=", add(True), 1.0),
    work("conv 3x3 64 to 64, 56x56, batch 8, forward", conv(False), 0.95),
    work("conv 3x3 64 to 64, 56x56, batch 8, forward + backward", conv(True), 0.87, aim=1.0),
    work("inference bert, 128 tokens", inference("bert", 1), 1.25),
    work("inference gpt2, 128 tokens", inference("gpt2", 1), 1.25),
    work("inference vit_b_16 b1", inference("vit_b_16", 1), 1.25),
    *(
        work(f"inference {name} b{batch}", inference(name, batch), bar, aim)
        for name in ("resnet18", "resnet50", "mobilenet_v2")
        for batch, bar, aim in ((1, 0.8, 1.0), (8, 1.0, None))
    ),
    work("training step resnet18 b16", training("resnet18", 16, "sgd"), 1.0),
    work("training step GPT 4x256 b8 s128, AdamW", training("gpt_4x256", 8), 1.3),
    work("training step MLP b64, AdamW", training("mlp", 64), 0.67),
    *overhead.ROWS,
]


if __name__ == "__main__":
    sys.exit(run_suite("device", ROWS, arguments(__doc__).parse_args()))
