"""What the compiler does to a graph between AOTAutograd and Inductor's lowerings, and what its result depends on."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from .. import device as spiral
from ..kernels.kernel import Target
from . import compat


@functools.cache
def builder() -> str:
    """A digest of the sources that decide what generated modules contain and call."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    parts = (f for part in ("compiler", "kernels", "ops") for f in (package / part).rglob("*.py"))
    for path in sorted([*package.glob("*.py"), *parts]):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Passes(compat.CustomGraphModulePass):
    """Called by Inductor on every graph with tensors on the device."""

    def __call__(self, gm: torch.fx.GraphModule) -> None:
        pass

    def uuid(self) -> str:
        """Part of the key of Inductor's caches on disk: what kernels are built for, device by device, and what builds them."""
        return f"{[Target.of(i) for i in range(spiral.device_count())]!r} {builder()}"


__all__ = ["Passes", "builder"]
