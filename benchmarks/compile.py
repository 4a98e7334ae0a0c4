"""torch.compile(backend="spiral") against torch eager and torch.compile on the CPU, and against spiral eager.

python -m benchmarks.compile [--engine opencl] [--only bert]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import language
from benchmarks.device import randn
from benchmarks.harness import ROOT, Contender, Reading, Step, Work, arguments, model_zoo, run_suite

CPU = torch.device("cpu")
# A set-up for a device, given how to compile what is called (the identity for eager).
Make = Callable[[torch.device, Callable[[Any], Any]], Step]


def contenders(make: Make) -> Callable[[torch.device], dict[str, Contender]]:
    def run(device: torch.device) -> dict[str, Contender]:
        torch._dynamo.reset()
        return {
            "torch": Contender(make(CPU, lambda f: f), CPU),
            "torch.compile": Contender(make(CPU, torch.compile), CPU),
            "spiral eager": Contender(make(device, lambda f: f), device),
            "spiral compiled": Contender(make(device, lambda f: torch.compile(f, backend="spiral")), device),
        }

    return run


def function(fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Make:
    def make(device: torch.device, compile: Callable[[Any], Any]) -> Step:
        inputs = [randn(device, *s) for s in shapes]
        compiled = compile(fn)
        return lambda: compiled(*inputs)

    return make


def gradients(fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Make:
    """Forward and backward of a weighted sum of fn's result, which has the first input's shape. The loss is part of what is compiled."""

    def make(device: torch.device, compile: Callable[[Any], Any]) -> Step:
        inputs = [randn(device, *s, grad=True) for s in shapes]
        weights = randn(device, *shapes[0])

        def loss(*inputs: Tensor) -> Tensor:
            return (fn(*inputs) * weights).sum()

        compiled = compile(loss)
        return lambda: torch.autograd.grad(compiled(*inputs), inputs)

    return make


def chain(x: Tensor, y: Tensor) -> Tensor:
    """Ten pointwise ops."""
    z = (x * 1.5 + y).sigmoid() * x
    z = (z - y).tanh() * 0.5
    return (z * z + 1.0).sqrt()


def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b)


def inference(name: str, batch: int = 1) -> Make:
    def make(device: torch.device, compile: Callable[[Any], Any]) -> Step:
        zoo = model_zoo()
        spec = zoo.MODELS[name]
        module = compile(spec.build("real").eval().to(device))
        inputs = zoo.to(spec.inputs("real", batch), device)

        def step() -> None:
            with torch.no_grad():
                spec.forward(module, inputs)

        return step

    return make


def training(name: str, batch: int) -> Make:
    def make(device: torch.device, compile: Callable[[Any], Any]) -> Step:
        zoo = model_zoo()
        spec = zoo.MODELS[name]
        module = spec.build("real").to(device)
        inputs = zoo.to(spec.inputs("real", batch), device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        loss = compile(lambda: spec.loss(module, inputs))

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    return make


def decode(name: str = "gpt2") -> Make:
    """One token with a static KV cache, 128 tokens seen."""

    def make(device: torch.device, compile: Callable[[Any], Any]) -> Step:
        module = model_zoo().MODELS[name].build("real").eval().to(device)
        return language.decoding(module, compile(module), device)

    return make


def _three_kernels(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).relu() @ w).softmax(-1)


def _call_time(device: torch.device, *functions: Callable[..., Any], calls: int = 50) -> float:
    """Microseconds until a call of each function, in turn, with two matrices of a few elements has returned: the median of bursts of calls,
    without the wait for the device between them. Kernels of one workgroup run inside the call on PoCL: their time is part of it."""
    x, w = randn(device, 8, 8), randn(device, 8, 8)
    times = []
    with torch.no_grad():
        for _ in range(150):
            for f in functions:
                f(x, w)
            if device != CPU:
                torch.accelerator.synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                for f in functions:
                    f(x, w)
            times.append((time.perf_counter() - start) / calls)
    return 1e6 * sorted(times)[len(times) // 2]


def _compile(backend: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(_three_kernels, backend=backend)


def _through_dynamo(device: torch.device) -> Callable[..., Any]:
    """The function compiled by a backend whose graph launches nothing, and is called as the backend's graphs are."""
    from torch_spiral import _C
    from torch_spiral.compiler import dynamo, runtime

    dynamo.call_directly(_C.GraphCall)
    nothing = runtime.Graph("benchmark_nothing", lambda inputs, written, sizes: (), (2, 0, 0), device.index or 0)

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        dynamo.forget_stream(gm)
        dynamo.forget_saved_tensors_hooks()
        return nothing.direct(2, [0, 1], [], [], [("argument", 0, (), (), 0)])

    return _compile(backend)


def _graph(device: torch.device) -> Callable[..., Any]:
    """The compiled graph alone, as Dynamo calls it."""
    from torch_spiral.compiler import backend

    compiled: list[Callable[..., Any]] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(backend(gm, inputs))
        return compiled[-1]

    _call_time(device, _compile(keep))
    return compiled[0]


def call_overhead(device: torch.device) -> float:
    """Inference: Dynamo's guards and wrapper included."""
    return _call_time(device, _compile("spiral"))


def dynamo_overhead(device: torch.device) -> float:
    """The same call of a graph that does nothing: what is Dynamo's, while its code is all that the processor's caches hold."""
    return _call_time(device, _through_dynamo(device))


def graph_overhead(device: torch.device) -> float:
    """The call of the compiled graph alone, as Dynamo makes it."""
    return _call_time(device, _graph(device))


def parts_in_turn(device: torch.device) -> float:
    """The two parts one after the other: they take as long as the whole call, more than their sum, as each evicts the other's code and data
    from the second-level cache (neither fits the first)."""
    graph = _graph(device)
    return _call_time(device, _through_dynamo(device), graph)


def cpu_overhead(device: torch.device) -> float:
    """The same function compiled by Inductor for the CPU, which also computes in that time."""
    return _call_time(CPU, _compile("inductor"))


# A process that times GPT-2's first call: of a model compiled with backend argv[2], or, where that is a path, of the package there. What
# Dynamo traced is kept where the environment says TORCH_CACHING_PRECOMPILE=1.
WARM_START = """
import sys, time
import torch
from pathlib import Path
from benchmarks.harness import model_zoo
device, how = torch.device(sys.argv[1]), sys.argv[2]
zoo = model_zoo()
spec = zoo.MODELS["gpt2"]
inputs = zoo.to(spec.inputs("real", 1), device)
packaged = Path(how).is_absolute()
module = None if packaged else spec.build("real").eval().to(device)
torch.accelerator.synchronize(device)
start = time.perf_counter()
with torch.no_grad():
    if packaged:
        from torch_spiral.compiler import load
        load(how, device)(inputs["input_ids"]).cpu()
    else:
        spec.forward(torch.compile(module, backend=how), inputs).cpu()
print(time.perf_counter() - start)
if not packaged and torch._dynamo.config.caching_precompile:
    torch.compiler.save_cache_artifacts()
"""


def _second_start(device: torch.device, how: str, folder: str, **variables: str) -> float:
    """Seconds of WARM_START in a second process, with what the first left on disk in folder."""
    environment = dict(os.environ, SPIRAL_CACHE_DIR=folder, TORCHINDUCTOR_CACHE_DIR=folder, **variables)
    seconds = 0.0
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", WARM_START, str(device), how],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        seconds = float(done.stdout.split()[-1])
    return seconds


def warm_start(device: torch.device) -> float:
    """Seconds of GPT-2's first compiled call in a second process."""
    with tempfile.TemporaryDirectory() as folder:
        return _second_start(device, "spiral", folder)


def traced_start(device: torch.device) -> float:
    """The same where Dynamo keeps what it traces, and both processes say so."""
    with tempfile.TemporaryDirectory() as folder:
        return _second_start(device, "spiral", folder, TORCH_CACHING_PRECOMPILE="1")


def dynamo_start(device: torch.device) -> float:
    """The same with Dynamo's backend "eager": tracing, guards, and a first eager call."""
    with tempfile.TemporaryDirectory() as folder:
        return _second_start(device, "eager", folder)


def package_start(device: torch.device) -> float:
    """Seconds from a package of GPT-2 on disk, weights included, to its first result in a second process."""
    from torch_spiral.compiler import package

    zoo = model_zoo()
    spec = zoo.MODELS["gpt2"]
    ids = zoo.to(spec.inputs("real", 1), device)["input_ids"]

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = spec.build("real").eval()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "gpt2")
        with torch.no_grad():
            package(torch.export.export(Logits().to(device), (ids,)), path)
        return _second_start(device, path, folder)


def work(name: str, make: Make, **bars: float) -> Work:
    names = {"torch": "torch", "torch_compile": "torch.compile", "spiral": "spiral eager"}
    return Work(name, contenders(make), {names[k]: v for k, v in bars.items()})


MODEL = {"torch": 1.6, "torch_compile": 1.5}
ROWS: list[Work | Reading] = [
    work("pointwise chain 16M", function(chain, (1 << 24,), (1 << 24,)), torch=8.0),
    work(
        "softmax 4096x1024, forward + backward",
        gradients(lambda x: x.softmax(-1), (4096, 1024)),
        spiral=1.5,
        torch_compile=1.0,
    ),
    work(
        "layer norm 4096x1024, forward + backward",
        gradients(norm, (4096, 1024), (1024,), (1024,)),
        spiral=1.5,
        torch_compile=1.0,
    ),
    work("inference bert, 128 tokens", inference("bert"), **MODEL),
    work("inference gpt2, 128 tokens", inference("gpt2"), **MODEL),
    work("inference vit_b_16 b1", inference("vit_b_16"), **MODEL),
    work("inference resnet50 b1", inference("resnet50"), torch=1.25),
    work("training step GPT 4x256 b8 s128, AdamW", training("gpt_4x256", 8), torch=1.4),
    work("training step resnet18 b16, AdamW", training("resnet18", 16), torch=1.15),
    work("decode step gpt2, 128 tokens seen", decode(), torch=1.5),
    Reading("compiled call of a 3-kernel graph", call_overhead, "µs", at_most=10),
    Reading("of that, Dynamo's guards and wrapper", dynamo_overhead, "µs"),
    Reading("call of that graph without Dynamo", graph_overhead, "µs", at_most=10),
    Reading("these two parts in turn", parts_in_turn, "µs"),
    Reading("the same call, torch.compile on the CPU", cpu_overhead, "µs"),
    Reading("warm start of gpt2 from the disk cache", warm_start, "s", at_most=3),
    Reading("the same with kept traces (TORCH_CACHING_PRECOMPILE=1)", traced_start, "s", at_most=3),
    Reading("the same with Dynamo's backend eager", dynamo_start, "s"),
    Reading("start of gpt2 from a package", package_start, "s"),
]


if __name__ == "__main__":
    sys.exit(run_suite("compile", ROWS, arguments(__doc__).parse_args()))
