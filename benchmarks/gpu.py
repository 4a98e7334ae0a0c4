"""A GPU through every engine it has against torch's own CUDA backend, in one process.

python -m benchmarks.gpu                 OpenCL, wgpu and CUDA, one after another
python -m benchmarks.gpu --engine wgpu
python -m benchmarks.gpu --only gemm --strict
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import language, overhead
from benchmarks.harness import Contender, Reading, Step, Timing, Work, arguments, model_zoo, run_suite, time_work
from torch_spiral.testing import devices

CUDA = torch.device("cuda")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Make = Callable[[torch.device], Step]


def randn(device: torch.device, *shape: int, dtype: torch.dtype = F32, grad: bool = False) -> Tensor:
    """A million random numbers, over and over: to draw more takes longer than to measure."""
    count = math.prod(shape)
    few = torch.randn(min(count, (1 << 20) + 7), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x = few.repeat(-(-count // few.numel()))[:count].view(shape).clone()
    return x.requires_grad_() if grad else x


def versus_cuda(make: Make) -> Callable[[torch.device], dict[str, Contender]]:
    return lambda device: {"torch": Contender(make(CUDA), CUDA), "spiral": Contender(make(device), device)}


def gemm(n: int, dtype: torch.dtype) -> Make:
    def make(device: torch.device) -> Step:
        a, b = randn(device, n, n, dtype=dtype), randn(device, n, n, dtype=dtype)
        return lambda: a @ b

    return make


def float8(size: int, recipe: str) -> Make:
    """A product of float8_e4m3fn with scales: of rows and columns, or of the first operand's rows and of the second's tiles, 128 numbers each
    (DeepSeek-V3)."""

    def make(device: torch.device) -> Step:
        a, b = (randn(device, size, size, dtype=BF16).to(torch.float8_e4m3fn) for _ in range(2))
        if recipe == "rows":
            scales, kinds = ((size, 1), (1, size)), (F.ScalingType.RowWise,) * 2
            p, q = (randn(device, *shape).abs() + 0.1 for shape in scales)
        else:
            blocks, kinds = size // 128, (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
            p, q = (randn(device, blocks, n).t().abs() + 0.1 for n in (size, blocks))
        return lambda: F.scaled_mm(a, b.t(), p, kinds[0], q, kinds[1])

    return make


def epilogue(m: int, n: int, k: int, fn: Callable[..., Tensor]) -> Callable[[torch.device], dict[str, Contender]]:
    """fn(x [m, k], weight [n, k], bias [n], residual [m, n]) in bfloat16, compiled by torch for CUDA and by us."""

    def make(device: torch.device, backend: str) -> Step:
        given = [randn(device, *shape, dtype=BF16) for shape in ((m, k), (n, k), (n,), (m, n))]
        run = torch.compile(fn, backend=backend)
        return lambda: run(*given)

    def contenders(device: torch.device) -> dict[str, Contender]:
        torch._dynamo.reset()
        return {
            "torch.compile": Contender(make(CUDA, "inductor"), CUDA),
            "spiral compiled": Contender(make(device, "spiral"), device),
        }

    return contenders


def attention(dtype: torch.dtype, backward: bool) -> Make:
    def make(device: torch.device) -> Step:
        q, k, v = (randn(device, 8, 16, 2048, 64, dtype=dtype, grad=backward) for _ in range(3))
        if backward and device.type == "cuda":
            return cuda_attention_backward(*(x.detach() for x in (q, k, v)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        g = torch.ones_like(out)
        if backward:
            return lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return make


def cuda_attention_backward(q: Tensor, k: Tensor, v: Tensor) -> Step:
    """By the operator: autograd gives CUDA nodes no stream where another accelerator is registered too (torch 2.11)."""
    aten = torch.ops.aten
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    g = torch.ones_like(out)
    rest = (out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset)
    return lambda: aten._scaled_dot_product_flash_attention_backward(g, q, k, v, *rest)


def rows(fn: Callable[[Tensor], Tensor], *shape: int) -> Make:
    def make(device: torch.device) -> Step:
        x = randn(device, *shape)
        return lambda: fn(x)

    return make


def cross_entropy(device: torch.device) -> Step:
    x = randn(device, 4096, 50257)
    y = torch.randint(50257, (4096,), generator=torch.Generator().manual_seed(0)).to(device)
    return lambda: F.cross_entropy(x, y)


def bandwidth(fn: Callable[[Tensor, Tensor], Any], moved: int) -> Callable[[torch.device], float]:
    """Share of the copy rate of torch's CUDA backend that fn reaches over 1 GB; moved is fn's traffic in tensors."""

    return lambda device: of_a_copy(Contender(on_a_gigabyte(fn, device), device)) * moved / 2


def on_a_gigabyte(fn: Callable[[Tensor, Tensor], Any], device: torch.device) -> Step:
    x, y = randn(device, 1 << 28), randn(device, 1 << 28)
    return lambda: fn(x, y)


def of_a_copy(ours: Contender) -> float:
    """The time in which torch's CUDA backend copies 1 GB, of ours."""
    copy = Contender(on_a_gigabyte(lambda x, y: y.copy_(x), CUDA), CUDA)
    return time_work(Work("", lambda _: {"copy": copy, "ours": ours}), ours.device, seconds=0.2).ratio["copy"]


def model(name: str, batch: int, autocast: bool) -> Callable[[torch.device], dict[str, Contender]]:
    """Contenders: torch CUDA eager, torch.compile's default, torch.compile(backend="spiral")."""

    def make(device: torch.device, backend: str | None) -> Step:
        zoo = model_zoo()
        spec = zoo.MODELS[name]
        module = spec.build("real").eval().to(device)
        inputs = zoo.to(spec.inputs("real", batch), device)
        run = torch.compile(module, backend=backend) if backend else module

        def step() -> None:
            with torch.no_grad(), torch.autocast(device.type, BF16, enabled=autocast):
                spec.forward(run, inputs)

        return step

    def contenders(device: torch.device) -> dict[str, Contender]:
        torch._dynamo.reset()
        return {
            "torch": Contender(make(CUDA, None), CUDA),
            "torch.compile": Contender(make(CUDA, "inductor"), CUDA),
            "spiral compiled": Contender(make(device, "spiral"), device),
        }

    return contenders


def token(name: str, device: torch.device, compiled: bool) -> Contender:
    """A step of one token in bfloat16 with a static KV cache, 128 tokens seen."""
    module = (
        language.llama(device) if name == "llama" else model_zoo().MODELS[name].build("real").eval().to(device, BF16)
    )
    run = torch.compile(module, backend="spiral") if compiled else module
    return Contender(language.decoding(module, run, device), device)


def decode(name: str) -> Callable[[torch.device], dict[str, Contender]]:
    """Contenders: torch CUDA eager and torch.compile(backend="spiral")."""

    def contenders(device: torch.device) -> dict[str, Contender]:
        torch._dynamo.reset()
        return {"torch": token(name, CUDA, False), "spiral compiled": token(name, device, True)}

    return contenders


def streaming(name: str) -> Callable[[torch.device], float]:
    """At which share of the copy rate the weights are read for a token: they are 2 bytes each, and a copy moves 8 << 28."""
    return lambda device: of_a_copy(token(name, device, True)) * 2 * parameters(name) / (8 << 28)


def parameters(name: str) -> int:
    with torch.device("meta"):
        module = language.llama(torch.device("meta")) if name == "llama" else model_zoo().MODELS[name].build("real")
    return sum(p.numel() for p in module.parameters())


def training_memory(device: torch.device) -> float:
    """Peak memory of training GPT with 1.1 billion parameters, of torch CUDA's. CUDA runs in a process of its own: autograd of torch
    2.11 takes no CUDA tensors where another accelerator is registered."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-m", "benchmarks.language", "--device", "cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    theirs, ours = json.loads(done.stdout.splitlines()[-1]), language.train(device)
    print(f"    {ours['parameters']:,} parameters, loss {ours['losses'][0]:.3f} to {ours['losses'][-1]:.3f} in {len(ours['losses'])} steps"
          f" (CUDA {theirs['losses'][-1]:.3f}), {ours['seconds']:.3f} s a step (CUDA {theirs['seconds']:.3f}),"
          f" peak {ours['peak'] / 2**30:.1f} GiB (CUDA {theirs['peak'] / 2**30:.1f})")  # fmt: skip
    if not ours["losses"][-1] < ours["losses"][0] - 0.5:
        raise RuntimeError(f"the loss does not fall: {ours['losses']}")
    return ours["peak"] / theirs["peak"]


def list_rows(engine: str) -> list[Work | Reading]:
    """The rows with a bar for this engine carry it; the others are recorded."""
    triton = engine in ("cuda", "hip")
    f32_bar = {"opencl": 0.97, "wgpu": 0.90}.get(engine)
    found: list[Work | Reading] = []

    def add(name: str, make: Make, bar: float | None = None, aim: float | None = None) -> None:
        found.append(Work(name, versus_cuda(make), {"torch": bar} if bar else {}, aim))

    for n in (1024, 2048, 4096, 8192):
        add(f"gemm f32 {n}", gemm(n, F32), f32_bar, 1.0 if engine == "opencl" else 0.97)
    for dtype in (BF16, F16):
        for n in (2048, 4096, 8192):
            name = str(dtype).removeprefix("torch.")
            add(f"gemm {name} {n}", gemm(n, dtype), (0.90 if n == 2048 else 0.95) if triton else None)
    if triton:
        for recipe in ("rows", "blocks"):
            add(f"gemm float8, scales of {recipe}, 4096", float8(4096, recipe))
        for name, sizes, fn in (
            ("gelu(linear)", (4096, 3072, 768), lambda x, w, b, r: F.gelu(F.linear(x, w, b))),
            ("gelu(linear), tanh", (4096, 3072, 768), lambda x, w, b, r: F.gelu(F.linear(x, w, b), approximate="tanh")),
            ("linear + residual", (4096, 768, 3072), lambda x, w, b, r: F.linear(x, w, b) + r),
        ):
            found.append(Work(f"epilogue bf16 {name} {'x'.join(map(str, sizes))}", epilogue(*sizes, fn)))
    add("attention bf16 B8 H16 T2048 D64 causal, forward", attention(BF16, False), 0.9 if triton else None, 1.0)
    add("attention bf16 B8 H16 T2048 D64 causal, backward", attention(BF16, True), 0.75 if triton else None, 1.0)
    add("attention f32 B8 H16 T2048 D64 causal, forward", attention(F32, False), 0.8 if engine == "wgpu" else None, 1.0)
    wgpu = engine == "wgpu"
    add("softmax f32 8192x4096", rows(lambda x: x.softmax(-1), 8192, 4096), 1.3 if wgpu else None)
    add("layer norm f32 8192x4096", rows(lambda x: F.layer_norm(x, (4096,)), 8192, 4096), 1.2 if wgpu else None)
    add("cross entropy f32 4096x50257", cross_entropy, 1.2 if wgpu else None)
    for name, fn, moved in (
        ("copy", lambda x, y: y.copy_(x), 2),
        ("add, out=", lambda x, y: torch.add(x, y, out=y), 3),
        ("gelu, out=", lambda x, y: torch.ops.aten.gelu.out(x, out=y), 2),
        ("sum", lambda x, y: x.sum(), 1),
    ):
        found.append(Reading(f"{name} of 1 GB, share of the copy rate", bandwidth(fn, moved), "", at_least=0.9))
    host_bar = None if engine == "opencl" else 4
    found.append(Reading("host time of an eager op", overhead.chained_adds, "µs", at_most=host_bar))
    for name in ("bert", "gpt2", "resnet50", "vit_b_16"):
        for batch in (1, 8, 32):
            for autocast in (False, True):
                bars = {"torch": 1.35 if batch == 1 or autocast else 1.0, "torch.compile": 1.3 if batch == 1 else 0.97}
                kind = "bf16 autocast" if autocast else "f32"
                found.append(Work(f"model {name} b{batch} {kind}", model(name, batch, autocast), bars))
    for name in ("gpt2", "llama"):
        found.append(Work(f"decode {name}, bf16", decode(name), {"torch": 2.5}))
        share = f"decode {name}, share of the rate at which weights stream"
        found.append(Reading(share, streaming(name), "", at_least=0.5))
    found.append(Reading("training gpt of 1.1 billion, peak memory of CUDA's", training_memory, "", at_most=1.3))
    return found


class Apart:
    """A row that a process of its own prepares, which takes most of the time, beside others; it is timed when all are ready."""

    def __init__(self, work: Work, engine: str, seconds: float) -> None:
        self.work = work
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--engine",
            engine,
            "--row",
            work.name,
            "--seconds",
            str(seconds),
        ]
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def _line(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("::"):
                return line[2:]
        self.errors.seek(0)
        raise RuntimeError("\n".join(self.errors.read().splitlines()[-3:]))

    def ready(self) -> Work:
        try:
            self._line()
        except RuntimeError as error:
            return replace(self.work, elsewhere=functools.partial(self._fail, error))
        return replace(self.work, elsewhere=self._time)

    def _fail(self, error: RuntimeError) -> Timing:
        raise error

    def _time(self) -> Timing:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return Timing(**json.loads(self._line()))


def run_row(name: str, engine: str, seconds: float) -> None:
    """The other end of Apart."""
    device = devices.resolve("spiral", engine)
    work = next(r for r in list_rows(engine) if r.name == name)
    assert isinstance(work, Work)
    contenders = work.contenders(device)
    for c in contenders.values():
        for _ in range(3):
            c.step()
        devices.synchronize(c.device)
    print("::ready", flush=True)
    sys.stdin.readline()
    timing = time_work(replace(work, contenders=lambda _: contenders), device, seconds=seconds)
    print("::" + json.dumps(asdict(timing)), flush=True)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--row", help="prepare this row, wait for a line, then time it")
    args = parser.parse_args()
    if args.row:
        run_row(args.row, args.engine, args.seconds)
        return 0
    if not torch.cuda.is_available():
        print("this compares with torch's CUDA backend, and there is none here", file=sys.stderr)
        return 2
    engines = [args.engine] if args.engine else list(devices.engines())
    status = 0
    for engine in engines:
        args.engine = engine
        rows = list_rows(engine)
        wanted = [r for r in rows if not args.only or any(w in r.name for w in args.only.split(","))]
        apart = {
            r.name: Apart(r, engine, args.seconds)
            for r in wanted
            if isinstance(r, Work) and r.name.startswith("model ")
        }
        prepared = {name: a.ready() for name, a in apart.items()}
        status |= run_suite("gpu", [prepared.get(r.name, r) for r in rows], args)
    return status


if __name__ == "__main__":
    sys.exit(main())
