"""What an op costs beside its arithmetic: host time, objects created, waiting, memory over a long run.

python -m benchmarks.overhead [--engine opencl]
"""

from __future__ import annotations

import gc
import statistics
import sys
import time

import torch

from benchmarks.harness import Reading, arguments, run_suite
from torch_spiral.testing.devices import synchronize


def chained_adds(device: torch.device, n: int = 1000) -> float:
    """Microseconds per add of 10 elements in a chain, with the final wait."""
    x, y = torch.ones(10, device=device), torch.ones(10, device=device)
    times = []
    for _ in range(25):
        synchronize(device)
        start = time.perf_counter()
        z = x
        for _ in range(n):
            z = z + y
        synchronize(device)
        times.append((time.perf_counter() - start) / n)
    return 1e6 * statistics.median(times[5:])


def item(device: torch.device) -> float:
    """Microseconds per op of (x + y).sum().item(): three ops, the last a wait."""
    x, y = torch.ones(10, device=device), torch.ones(10, device=device)
    times = []
    for _ in range(300):
        start = time.perf_counter()
        (x + y).sum().item()
        times.append((time.perf_counter() - start) / 3)
    return 1e6 * statistics.median(times[50:])


def objects_per_op(device: torch.device, n: int = 1000) -> float:
    """Objects created at the compute API per op in a steady state."""
    if device.type != "spiral":
        return 0.0
    from torch_spiral import _C

    index = torch.spiral._get_device_index(device)
    x, w = (torch.randn(32, 32).to(device) for _ in range(2))

    def ops() -> None:
        z = x
        for _ in range(n // 4):
            z = torch.relu(z @ w + x).softmax(1)
        synchronize(device)

    for _ in range(3):
        ops()
    before = _C.objects_created(index)
    ops()
    return (_C.objects_created(index) - before) / n


def memory_left(device: torch.device) -> float:
    """Bytes reserved after a model's training step, deleting everything and empty_cache, above the start."""
    if device.type != "spiral":
        return 0.0
    gc.collect()
    torch.spiral.empty_cache()
    start = torch.spiral.memory_reserved(device)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(64, 256, device=device)).square().mean().backward()
    optimizer.step()
    synchronize(device)
    del model, optimizer
    gc.collect()
    torch.spiral.empty_cache()
    return float(torch.spiral.memory_reserved(device) - start)


def soak(device: torch.device, n: int = 100_000) -> float:
    """Megabytes by which the process grows over the last three quarters of 100,000 ops."""

    def resident() -> float:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096 / 1e6

    x, y = torch.ones(64, 64, device=device), torch.ones(64, 64, device=device)
    baseline = 0.0
    for k in range(n // 2):
        z = (x + y) * 0.5
        if k % 1000 == 0:
            z.sum().item()
        if k == n // 8:
            gc.collect()
            baseline = resident()
    synchronize(device)
    gc.collect()
    return max(0.0, resident() - baseline)


ROWS = [
    Reading("1,000 chained adds of 10 elements, per op", chained_adds, "µs", at_most=4),
    Reading("objects created per op in steady state", objects_per_op, "objects", at_most=0),
    Reading(".item() after an add and a sum, per op", item, "µs", at_most=40),
    Reading("memory after deleting everything and empty_cache", memory_left, "bytes", at_most=0),
    Reading("growth over a soak of 100,000 ops", soak, "MB", at_most=4),
]


if __name__ == "__main__":
    sys.exit(run_suite("overhead", list(ROWS), arguments(__doc__).parse_args()))
