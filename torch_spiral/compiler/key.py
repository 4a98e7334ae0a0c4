"""What generated modules depend on beside the graph: part of the keys of caches on disk."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from .. import device as spiral
from ..kernels.kernel import Target


@functools.cache
def builder() -> str:
    """A digest of the sources that decide what generated modules contain and call."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    parts = (f for part in ("compiler", "kernels", "ops") for f in (package / part).rglob("*.py"))
    for path in sorted([*package.glob("*.py"), *parts]):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def built_for() -> str:
    """What kernels are built for, device by device, and what builds them."""
    return f"{[Target.of(i) for i in range(spiral.device_count())]!r} {builder()}"


__all__ = ["builder", "built_for"]
