"""torch.spiral.telemetry: what ran on the devices, for how long, and how near to what the device can do.

    with torch.spiral.telemetry() as t:
        model(x)
    print(t)                       # a table: kernels by time
    t.kernels()[0].seconds         # the same as data

Times are the device's own, from events around every launch, so each launch is slower on the host while someone listens; nothing is
recorded, and nothing costs, otherwise. The roofline is measured once per device (or read from the tuning database).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _C
from ._devices import get_device_name


@dataclass(frozen=True)
class Launch:
    """One launch. bytes: of the tensors that are bound, an upper bound where a kernel reads parts of them; flops: None where the lowering does not
    say; start_ns: on the host's clock; duration_ns: -1 where a device error lost it; schedule: of a template, and why."""

    device: int
    op: str
    kernel: str
    schedule: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    bytes: int
    flops: int | None
    grid: tuple[int, int, int]
    start_ns: int
    duration_ns: int


@dataclass
class KernelTimes:
    """All launches of a kernel with one schedule choice. seconds, bytes and flops are sums."""

    device: int
    kernel: str
    schedule: str
    ops: set[str] = field(default_factory=set)
    dtype: str = "f32"
    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int | None = 0

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else 0.0


@functools.cache
def roofline(device: int) -> Any:
    """autotune.model.Roofline of a device: from the tuning database, else measured now (some seconds)."""
    from .. import autotune
    from ..autotune import database, model

    if database.default_path().exists():
        with contextlib.suppress(OSError):  # in use, or another program's
            for row in autotune.store().devices(device=autotune.device_row(device).device):
                if row.bandwidth:
                    return model.Roofline(row.bandwidth, dict(row.flops))
    return model.measure(device)


class Telemetry:
    """Listens between enter and exit; what it heard is in `launches`."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._token: int | None = None

    def __enter__(self) -> Telemetry:
        if self._token is not None:
            raise RuntimeError("this telemetry listens already")
        self._token = _C.trace_begin()
        return self

    def __exit__(self, *_: object) -> None:
        from ..lowering import DTYPE_NAMES

        token, self._token = self._token, None
        for device, op, kernel, note, shapes, dtypes, bytes_, flops, grid, start, duration in _C.trace_end(token):
            self.launches.append(
                Launch(
                    device, op, kernel, note, tuple(map(tuple, shapes)), tuple(DTYPE_NAMES.get(d, "?") for d in dtypes), bytes_,
                    None if flops < 0 else flops, grid, start, duration,
                )
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Device time of all launches."""
        return sum(max(x.duration_ns, 0) for x in self.launches) * 1e-9

    def kernels(self) -> list[KernelTimes]:
        """Per kernel and schedule choice, the longest first."""
        found: dict[tuple[int, str, str], KernelTimes] = {}
        for x in self.launches:
            k = found.setdefault((x.device, x.kernel, x.schedule), KernelTimes(x.device, x.kernel, x.schedule))
            k.ops.add(x.op)
            k.dtype = x.dtypes[0] if x.dtypes else "f32"
            k.calls += 1
            k.seconds += max(x.duration_ns, 0) * 1e-9
            k.bytes += x.bytes
            k.flops = None if k.flops is None or x.flops is None else k.flops + x.flops
        return sorted(found.values(), key=lambda k: -k.seconds)

    def share(self, k: KernelTimes) -> float | None:
        """Of what the roofline allows. None where that is not known: the bytes are an upper bound, and say more than the memory can move."""
        value = roofline(k.device).share(k.seconds, k.flops or 0, k.bytes, k.dtype)
        return value if value <= 1.25 else None

    def table(self, rows: int = 30) -> Any:
        """A rich.table.Table of the kernels that took longest."""
        from rich.table import Table

        kernels = self.kernels()
        total = self.seconds or 1e-30
        title = f"{len(self.launches)} launches, {self.seconds * 1e3:.4g} ms on the device"
        table = Table(
            "op",
            "kernel",
            "calls",
            "ms",
            "%",
            "µs a call",
            "GB/s",
            "GFLOP/s",
            "roofline",
            "schedule and why",
            title=title,
        )
        for name in ("calls", "ms", "%", "µs a call", "GB/s", "GFLOP/s", "roofline"):
            next(c for c in table.columns if c.header == name).justify = "right"
        for k in kernels[:rows]:
            share = self.share(k)
            seconds = max(k.seconds, 1e-30)
            table.add_row(
                ", ".join(sorted(k.ops)), k.kernel, str(k.calls), f"{k.seconds * 1e3:.4g}", f"{100 * k.seconds / total:.0f}",
                f"{k.seconds / k.calls * 1e6:.1f}", f"{k.bytes / seconds / 1e9:.4g}", f"{k.flops / seconds / 1e9:.4g}" if k.flops else "",
                "" if share is None else f"{share:.0%}", k.schedule,
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=180, highlight=False)
        with console.capture() as text:
            console.print(self.table())
        return text.get()


def telemetry() -> Telemetry:
    """Listens to the launches on all devices: a context manager."""
    return Telemetry()


def trace_events(launches: Iterable[Launch], base_ns: int = 0) -> list[dict[str, Any]]:
    """The launches as events of Chrome's trace format, times relative to base_ns."""
    launches = list(launches)
    events: list[dict[str, Any]] = []
    for device in sorted({x.device for x in launches}):
        pid = f"spiral:{device}"
        name = f"{pid} {get_device_name(device)}"
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": 0, "args": {"name": "queue"}})
    for x in launches:
        if x.duration_ns < 0:
            continue
        args: dict[str, Any] = {
            "op": x.op,
            "shapes": [list(s) for s in x.shapes],
            "dtypes": list(x.dtypes),
            "bytes": x.bytes,
            "grid": list(x.grid),
        }
        if x.flops is not None:
            args["flops"] = x.flops
        if x.schedule:
            args["schedule"] = x.schedule
        events.append(
            {"ph": "X", "cat": "kernel", "name": x.kernel, "pid": f"spiral:{x.device}", "tid": 0, "ts": (x.start_ns - base_ns) / 1e3,
             "dur": x.duration_ns / 1e3, "args": args}
        )  # fmt: skip
    return events


def write_trace(launches: Iterable[Launch], path: str | Path, other: str | Path | None = None) -> None:
    """Writes Chrome's trace format; `other` is a trace that torch.profiler exported, whose events are taken in on the same clock."""
    trace: dict[str, Any] = json.loads(Path(other).read_text()) if other is not None else {"traceEvents": []}
    trace["traceEvents"] += trace_events(launches, int(trace.get("baseTimeNanoseconds", 0)))
    Path(path).write_text(json.dumps(trace))
