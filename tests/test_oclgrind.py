"""OpenCL kernels in oclgrind, a simulator that reports data races, accesses beyond a buffer and uses of values never written.

A small case per kernel template, in the schedules for CPUs (vector) and for GPUs (simt). Every tensor is a buffer of its own
(SPIRAL_MEMORY_EXACT), so that the simulator sees overruns. It follows uninitialised values in simt kernels only: those of
vectors it reports by the vector, wrongly. `scripts/install_engines.sh --dev` installs it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DRIVERS = [p for p in Path("/usr/lib").glob("**/liboclgrind-rt-icd.so") if p.is_file()]
simulated = pytest.mark.skipif(not DRIVERS, reason="no oclgrind: scripts/install_engines.sh --dev installs it")

# Expressions over torch, F and these tensors: x [5, 7], y [7, 4], v [7], i [6] of int64 below 5, im [2, 3, 6, 5],
# w [4, 3, 3, 3], q [1, 2, 5, 8], s [6, 6] positive definite. The last ones of a tuple are differentiated, each with respect to
# what has grad (x, im, w, q).
CASES = {
    "pointwise dense": "x * 2 + x.sin()",
    "pointwise strided": "x.t()[1:, ::2] + v[1:, None]",
    "pointwise half": "(x.half() + 1, x.bfloat16() * x.bfloat16())",
    "pointwise bytes": "(x > 0) | (x < -1)",
    "pointwise int64": "i * 3 - i.flip(0)",
    "cast": "(x.to(torch.int32), i.to(torch.uint8), x.half())",
    "copy transposed": "x.t().contiguous()",
    "copy bytes": "(x > 0).t().contiguous()",
    "fill": "torch.full_like(x, 3)",
    "cat": "torch.cat([x, x.flip(0)], 1)",
    "where": "torch.where(x > 0, x, -x)",
    "sum rows": "x.sum(1)",
    "sum columns": "x.sum(0)",
    "sum all": "im.sum()",
    "sum long": "im.repeat(20, 1, 1, 2).sum((0, 2))",
    "max with index": "tuple(x.max(1))",
    "argmin": "x.argmin(0)",
    "any": "(x > 1).any(1)",
    "var": "x.var(1)",
    "prod": "v.prod()",
    "cumsum": "x.cumsum(1)",
    "cumsum columns": "x.cumsum(0)",
    "cummax": "tuple(x.cummax(1))",
    "logcumsumexp": "x.logcumsumexp(0)",
    "softmax": "x.softmax(1)",
    "log_softmax columns": "x.log_softmax(0)",
    "layer_norm": "F.layer_norm(x, (7,), v, v)",
    "group_norm": "F.group_norm(im.repeat(1, 2, 1, 1), 2)",
    "batch_norm": "F.batch_norm(im, None, None, v[:3], v[:3], True)",
    "mm": "x @ y",
    "mm transposed": "y.t() @ x.t()",
    "mm int64": "i[None] @ i[:, None]",
    "mm half": "x.half() @ y.half()",
    "bmm": "torch.bmm(x.expand(2, 5, 7), y.expand(2, 7, 4))",
    "mv": "x @ v",
    "dot": "v @ v",
    "addmm": "torch.addmm(v[:4], x, y, beta=2)",
    "linear": "F.gelu(F.linear(x, y.t(), v[:4]))",
    "conv": "F.conv2d(im, w, padding=1)",
    "conv tiles": "F.conv2d(im[:1].repeat(1, 11, 2, 3)[:, :32], w.detach().repeat(8, 11, 1, 1)[:, :32], padding=1)",
    "conv strided": "F.conv2d(im, w, v[:4], stride=2, padding=1)",
    "conv depthwise": "F.conv2d(im, w[:3, :1], groups=3)",
    "conv transposed": "F.conv_transpose2d(im, w[:3], stride=2)",
    "conv1d": "F.conv1d(im[:, :, 0], w[:, :, 0])",
    "attention": "F.scaled_dot_product_attention(q, q, q)",
    "attention causal": "F.scaled_dot_product_attention(q, q, q, is_causal=True)",
    "max_pool": "F.max_pool2d(im, 2)",
    "avg_pool": "F.avg_pool2d(im, 3, 2, 1)",
    "adaptive_pool": "F.adaptive_avg_pool2d(im, (3, 2))",
    "bilinear": "F.interpolate(im, scale_factor=1.7, mode='bilinear')",
    "nearest": "F.interpolate(im, scale_factor=2)",
    "bytes": "F.interpolate((im.detach().abs() * 20).byte(), size=(3, 8), mode='bicubic', antialias=True)",
    "grid_sample": "F.grid_sample(im, im[:, :2].permute(0, 2, 3, 1).tanh().detach())",
    "pad reflect": "F.pad(im, (1, 2, 2, 1), 'reflect')",
    "pad": "F.pad(im, (1, 2, 0, 1))",
    "index": "x[i[:3]]",
    "index two": "x[i[:3], i[3:]]",
    "index_put": "torch.index_put(x, (i,), x[:1].expand(6, 7).detach(), True)",
    "index_select": "x.index_select(0, i)",
    "gather": "x.gather(0, i[:, None].expand(6, 7))",
    "scatter_add": "torch.zeros_like(x).scatter_add(0, i[:5, None].expand(5, 7), x)",
    "index_add": "torch.zeros_like(x).index_add(0, i[:5], x)",
    "embedding": "F.embedding(i, x)",
    "embedding_bag": "F.embedding_bag(i.view(2, 3), x)",
    "masked_fill": "x.masked_fill(x > 0, 1)",
    "masked_select": "x.masked_select(x > 0)",
    "nonzero": "(x > 0).nonzero()",
    "sort": "tuple(x.sort(dim=1, stable=True))",
    "sort long": "tuple(im.flatten().sort())",
    "topk": "x.topk(3, 1).values",
    "unique": "torch.unique(i, return_counts=True)",
    "median": "x.median(1).values",
    "searchsorted": "torch.searchsorted(v.sort().values, v)",
    "bincount": "torch.bincount(i)",
    "histc": "torch.histc(x.detach(), 5, -2, 2)",
    "tril": "(x.tril(), x.triu(1))",
    "roll": "x.roll(2, 1)",
    "flip": "x.flip(0)",
    "arange": "(torch.arange(9, device=x.device), torch.linspace(0, 1, 5, device=x.device))",
    "cross_entropy": "F.cross_entropy(x, i[:5])",
    "nll": "F.nll_loss(im.log_softmax(1), i.repeat(10).view(2, 6, 5) % 3)",
    "mse": "F.mse_loss(x, x.flip(0).detach())",
    # Constant weights: after clEnqueueCopyBuffer, with which a slice's gradient is written, the simulator takes the rest of the
    # buffer for uninitialised.
    "lstm": "torch.lstm_cell(x, (x[:, :4], x[:, :4]), x.detach().repeat(4, 1)[:16], x.detach()[:, :4].repeat(4, 1)[:16])",
    "fft": "torch.view_as_real(torch.fft.fft(v))",
    "cholesky": "torch.linalg.cholesky(s)",
    "lu": "torch.linalg.lu_factor(s)[0]",
    "qr": "torch.linalg.qr(s)[1].abs()",
    "solve": "torch.linalg.solve_triangular(s, s[:, :2], upper=True)",
    "foreach": "torch._foreach_add([x.detach(), v], 2.0)",
    "cdist": "torch.cdist(x, x.detach() + 1)",
    "erfinv": "(v.tanh() * 0.9).erfinv()",
    "random": "",
    "dropout": "",
    "attention dropout": "",
}  # fmt: skip
VECTOR = {"conv tiles"}  # for kernels that other schedules do not have
RANDOM = {
    "random": "(torch.randn(9, device=x.device), torch.randint(9, (7,), device=x.device))",
    "dropout": "F.dropout(x)",
    "attention dropout": "F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)",
}


def findings(log: str) -> str:
    """The reports of a log, but for one: a loop of compare-and-exchange begins with a plain load of its place. What that
    reads may be old, which costs another turn of the loop."""
    reports = re.split(
        r"\n(?=Oclgrind|Uninitialized|Controlflow|Invalid|Unaligned|[\w-]+ data race|Work-group)", "\n" + log
    )
    kept = [
        r for r in reports if r.strip() and not ("data race" in r and "load volatile" in r and "atomic_cmpxchg" in r)
    ]
    return "\n".join(kept).strip()


WORKER = """
import dataclasses, json, sys
import torch
import torch.nn.functional as F
import torch_spiral.kernels.kernel as kernel
cases, schedule = json.loads(sys.argv[1]), sys.argv[2]
properties = kernel.target_from_properties
kernel.target_from_properties = lambda p, **k: dataclasses.replace(properties(p, **k), schedule_class=schedule)
assert torch.spiral.get_device_properties(0).name == "Oclgrind Simulator"
r = lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(0))
base = dict(x=r(5, 7), y=r(7, 4), v=r(7), i=torch.tensor([3, 1, 4, 1, 0, 2]), im=r(2, 3, 6, 5), w=r(4, 3, 3, 3), q=r(1, 2, 5, 8))
base["s"] = torch.eye(6) * 9 + r(6, 6) @ r(6, 6).T
def run(code, device):
    given = {n: t.to(device).detach() for n, t in base.items()}
    for n in ("x", "im", "w", "q"):
        given[n].requires_grad_()
    out = eval(code, dict(torch=torch, F=F, **given))
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    for n in ("x", "im", "w", "q"):
        ends = [o for o in out if o.requires_grad]
        if ends:
            grads = torch.autograd.grad(ends, given[n], [torch.ones_like(o) for o in ends], allow_unused=True, retain_graph=True)
            out += [g for g in grads if g is not None]
    return [o.detach().cpu() for o in out]
for line in sys.stdin:
    name = json.loads(line)
    try:
        ours = run(cases[name], "spiral")
        if name not in ("random", "dropout", "attention dropout"):
            for a, b in zip(ours, run(cases[name], "cpu"), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4, atol=1e-4)
        said = ""
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    torch.spiral.synchronize()
    print(json.dumps(said), flush=True)
"""


class Simulator:
    """A process whose device is the simulator; started again where it died."""

    def __init__(self, schedule: str, folder: Path) -> None:
        vendors = folder / "vendors"
        vendors.mkdir()
        (vendors / "oclgrind.icd").write_text(f"{DRIVERS[0]}\n")
        self.schedule, self.log, self.errors = schedule, folder / "log", folder / "errors"
        # The simulator knows no prefetches, and takes the optimiser's `zext <n x i1>` for a sign extension.
        options = "-O0 -D__builtin_prefetch(x)=(void)0"
        self.environment = dict(
            os.environ,
            SPIRAL_ENGINE="opencl",
            SPIRAL_FALLBACK="error",
            SPIRAL_MEMORY_EXACT="1",
            SPIRAL_CACHE="0",
            OCL_ICD_VENDORS=str(vendors),
            OCLGRIND_DATA_RACES="1",
            OCLGRIND_LOG=str(self.log),
            OCLGRIND_BUILD_OPTIONS=options,
            **({"OCLGRIND_UNINITIALIZED": "1"} if schedule == "simt" else {}),
        )
        self.process: subprocess.Popen[str] | None = None

    def run(self, case: str) -> tuple[str | None, str]:
        """What went wrong in a case ("" for nothing, None where the process died), and what the simulator reports."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-c", WORKER, json.dumps(CASES | RANDOM), self.schedule]
            with self.errors.open("w") as errors:
                self.process = subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        assert self.process.stdin is not None and self.process.stdout is not None
        before = self.log.stat().st_size if self.log.exists() else 0
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        reports = self.log.read_bytes()[before:].decode(errors="replace").strip() if self.log.exists() else ""
        return (json.loads(line) if line else None), reports

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", params=["simt", "vector"])
def simulator(request: Any, tmp_path_factory: Any) -> Iterator[Simulator]:
    made = Simulator(request.param, tmp_path_factory.mktemp("oclgrind"))
    yield made
    made.stop()


@pytest.mark.full
@simulated
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_reported(simulator: Simulator, case: str) -> None:
    if case in VECTOR and simulator.schedule != "vector":
        pytest.skip("kernels for CPUs")
    said, reports = simulator.run(case)
    found = findings(reports)
    assert not found, found[:3000]
    assert said is not None, f"the process ended: {simulator.errors.read_text()[-1000:]}"
    assert not said, said


def test_reports_are_told_apart() -> None:
    race = (
        "Read-write data race at global memory address 0x10\n First entity: {}\n Second entity: atomic_cmpxchg(p, a, b)"
    )
    assert findings(race.format("load volatile i32")) == ""
    assert findings(race.format("store i32")) and findings("Invalid read of size 4 at global memory address 0x20")
    both = (
        race.format("load volatile i32") + "\n\nInvalid write of size 4 at global memory address 0x20\n Kernel: main_"
    )
    assert findings(both).startswith("Invalid write")
