"""What a schedule should take, from the device's measured roofline: enough to leave out what cannot win."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _C
from .. import device as spiral
from ..kernels.kernel import Target

LAUNCH_SECONDS = 4e-6
CACHE_SPEED = 4.0  # of the cache that workgroups share, in copies of the memory's bandwidth


@dataclass
class Roofline:
    """bandwidth: bytes a second of a copy, read and written. flops: operations a second by dtype."""

    bandwidth: float
    flops: dict[str, float] = field(default_factory=dict)

    def rate(self, dtype: str) -> float:
        return self.flops.get(dtype) or max(self.flops.values(), default=1e12)

    def share(self, seconds: float, flops: float, bytes_: float, dtype: str) -> float:
        """Which share of what the roofline allows a kernel reached."""
        least = max(flops / self.rate(dtype) if flops > 0 else 0.0, bytes_ / self.bandwidth)
        return least / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Tiling:
    """What the model needs to know of a schedule of a product: tile sizes of a workgroup, what an invocation keeps in registers, bytes of
    workgroup memory (of all stages), runs of the reduction."""

    m: int
    n: int
    k: int
    threads: int
    accumulators: int
    memory: int
    splits: int = 1
    matrix_units: bool = False  # tl.dot: operands are not read again by every invocation
    stages: int = 1  # tiles in flight: loads of the next ones overlap with products
    tasks: int = 0  # of a CPU: how many tasks the grid has
    programs: int = 0  # stream-K: how many programs share all steps evenly; each leaves up to two parts of tiles


def resident(target: Target, threads: int, accumulators: int, memory: int) -> int:
    """Workgroups that a compute unit of a GPU holds at a time, by its invocations, registers and memory. Where the API does not tell
    the limits of a unit they are taken as usual: 2048 invocations, 64 K registers, 4 workgroups' memory."""
    registers = threads * min(accumulators + 40, 255)
    return max(
        1, min(2048 // max(threads, 1), 65536 // registers, 4 * target.max_workgroup_memory // max(memory, 1), 16)
    )


def product_seconds(
    target: Target,
    t: Tiling,
    m: int,
    n: int,
    k: int,
    batch: int,
    dtype: str,
    itemsize: int,
    out_size: int,
    roofline: Roofline,
) -> float:
    """Of [batch, m, k] @ [batch, k, n]."""
    rows, columns = math.ceil(m / t.m), math.ceil(n / t.n)
    padded = 2.0 * rows * t.m * columns * t.n * math.ceil(k / t.k) * t.k * batch
    workgroups = t.programs or rows * columns * batch * t.splits
    if t.tasks:  # CPU: whole rounds of the compute units
        slots, efficiency = target.compute_units, 1.0
        waves = math.ceil(t.tasks / slots) * slots / t.tasks
        reuse = t.m * t.n / (t.m + t.n)
        efficiency = reuse / (reuse + 1.0)
    else:
        slots = target.compute_units * resident(target, t.threads, t.accumulators, t.memory)
        per_unit = min(math.ceil(workgroups / target.compute_units), slots // target.compute_units)
        # The last wave is as long as the others; few invocations hide no latency.
        waves = (
            math.ceil(workgroups / target.compute_units) * target.compute_units / workgroups
            if workgroups <= slots
            else math.ceil(workgroups / slots) * slots / workgroups
        )
        if t.programs:
            waves = 1.0
        hidden = min(1.0, (per_unit * t.threads / 256) ** 0.5)
        side = math.sqrt(t.accumulators)
        # Each step of k ends at barriers, and has to wait for its loads where no later tile is in flight.
        work = t.accumulators * t.k
        step = t.k / (t.k + 16.0) if t.matrix_units else work / (work + 96.0)
        flight = {1: 0.7, 2: 0.85, 3: 0.97}.get(t.stages, 1.0) if t.matrix_units else (0.85 if t.stages == 1 else 1.0)
        efficiency = hidden * step * flight * (1.0 if t.matrix_units else side / (side + 2.0))
    compute = padded * waves / (roofline.rate(dtype) * efficiency)
    least = batch * ((m * k + k * n) * itemsize + m * n * out_size)
    read = batch * (m * k * columns + k * n * rows) * itemsize
    partial = 2 * t.splits * batch * m * n * 4 if t.splits > 1 else 4 * t.programs * t.m * t.n * 4
    memory = (least + partial) / roofline.bandwidth + read / (CACHE_SPEED * roofline.bandwidth)
    return max(compute, memory) + LAUNCH_SECONDS * (2 if t.splits > 1 or t.programs else 1)


# ---- measuring the roofline -----------------------------------------------------------------------------------------


def device_seconds(device: torch.device, call: Callable[[], Any], rounds: int = 5) -> float:
    """Median device seconds of a call."""
    least = 2e-3 if _C.device_properties(device.index)["timestamps"] else 4e-2

    def sample(times: int) -> float:
        start, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
        for i in range(2 * times):  # the first half warms up
            if i == times:
                start.record()
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times

    call()
    sample(1)
    times = max(1, min(50, round(least / max(sample(1), 1e-7))))
    return statistics.median(sample(times) for _ in range(rounds))


def _chain(x: Any, links: int) -> Any:
    from ..kernels import ir

    for i in range(links):
        x = ir.fma(x, 0.999 - i * 1e-6, 1e-4)
    return x


CHAIN = 256


def _define() -> Any:
    """An operator that does nothing but fused multiply-adds: out = 256 links of a chain from x."""
    if not hasattr(torch.ops.spiral, "fma_chain"):
        from .. import lowering as low
        from ..ops.common import map_tensors

        @low.operator("fma_chain(Tensor(a!) out, Tensor x) -> ()", coarse=True)
        def fma_chain(out: Any, x: Any) -> None:
            map_tensors(f"fma_chain{CHAIN}", _links, [out], [x])

    return torch.ops.spiral.fma_chain


def _links(x: Any) -> Any:
    return _chain(x, CHAIN)


def measure(device: int, dtypes: tuple[str, ...] = ("f32",)) -> Roofline:
    """The roofline of a device: a copy of up to 1 GB, chains of fused multiply-adds, and large matrix products."""
    where = torch.device("spiral", device)
    p = _C.device_properties(device)
    software = p["type"] in ("cpu", "software")
    with torch.no_grad(), spiral.device(where):
        n = (1 << 24) if software else min(1 << 27, p["total_memory"] // 64)
        x, y = torch.empty(n, device=where), torch.empty(n, device=where)
        x.fill_(1.0)
        seconds = device_seconds(where, lambda: y.copy_(x))
        roofline = Roofline(2 * 4 * n / seconds)
        m = 1 << (20 if software else 25)
        x, y = x[:m], y[:m]
        chain = _define()
        seconds = device_seconds(where, lambda: chain(y, x))
        roofline.flops["f32"] = 2 * CHAIN * m / seconds
        size = 512 if software else 4096
        for dtype in dtypes:
            kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
            a = torch.ones(size, size, device=where, dtype=kind)
            out = torch.empty_like(a)
            seconds = device_seconds(where, functools.partial(torch.mm, a, a, out=out))
            roofline.flops[dtype] = max(roofline.flops.get(dtype, 0.0), 2 * size**3 / seconds)
    return roofline
