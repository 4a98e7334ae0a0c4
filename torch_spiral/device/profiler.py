"""torch.spiral.profiler: torch.profiler with a timeline of the spiral devices.

Where torch takes profilers of PrivateUse1 devices (2.13), torch.profiler alone shows our kernels, linked to the operators that launched
them, and this module adds nothing to it. Elsewhere torch.profiler gives each operator its device time, and `profile` here adds the timeline.

    with torch.spiral.profiler.profile() as p:
        model(x)
    p.key_averages().table(sort_by="self_device_time_total")
    p.export_chrome_trace("trace.json")
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from .telemetry import Telemetry, write_trace


def native() -> bool:
    """Whether torch.profiler itself takes our timeline."""
    from .. import _C

    return _C.native_profiler


class profile(torch.profiler.profile):
    """torch.profiler.profile of the host and the spiral devices. Arguments are torch's; activities default to both."""

    def __init__(self, *, activities: Any = None, **kwargs: Any) -> None:
        both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.PrivateUse1]
        super().__init__(activities=both if activities is None else activities, **kwargs)
        self.telemetry = None if native() else Telemetry()

    def start(self) -> None:
        super().start()
        if self.telemetry is not None:
            self.telemetry.__enter__()

    def stop(self) -> None:
        if self.telemetry is not None:
            self.telemetry.__exit__()
        super().stop()

    def export_chrome_trace(self, path: str, *args: Any, **kwargs: Any) -> Any:
        if self.telemetry is None:
            return super().export_chrome_trace(path, *args, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            theirs = Path(folder) / "trace.json"
            super().export_chrome_trace(str(theirs), *args, **kwargs)
            return write_trace(self.telemetry.launches, path, theirs)


def export_chrome_trace(telemetry: Telemetry, path: str, other: str | None = None) -> None:
    """Writes what a telemetry heard as a Chrome trace; `other`: a trace that torch.profiler exported, to merge with."""
    write_trace(telemetry.launches, path, other)
