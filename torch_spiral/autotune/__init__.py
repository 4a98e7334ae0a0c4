"""The tuner: which schedule a template runs with, where the built-in choice can be beaten (docs/tuning.md).

A lowering asks `choose` for the schedule of a key. What comes back is the built-in default, unless a measured decision says otherwise:
from the user's database, or from the defaults that ship with the package. SPIRAL_TUNE says what may happen:

    off      built-in defaults only
    replay   decisions that are known; nothing is measured (the default)
    frozen   as replay, from the database alone, read-only; a stale decision is an error
    online   as replay, and a bounded share of the time goes into comparing schedules of what runs often (not while training)

`python -m torch_spiral.autotune` measures ahead of time. A schedule is data: names in a database select among a template's candidates.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .. import _C
from . import database as db

S = TypeVar("S")
MODES = ("off", "replay", "frozen", "online")


@dataclass(frozen=True)
class Request:
    """What a lowering asked: a template's key, the exact sizes of that call, the built-in choice and all eligible ones."""

    device: int
    template: str
    key: str
    sizes: tuple[int, ...]
    default: Any
    candidates: tuple[Any, ...] = field(compare=False)

    def named(self) -> dict[str, Any]:
        """Candidates by name, the default first."""
        return {str(c): c for c in (self.default, *self.candidates)}


@dataclass(frozen=True)
class Source:
    """A decision and where it is from."""

    decision: db.Decision
    origin: str  # "database" | "shipped"


_local = threading.local()  # forced: (template, schedule); seen: list[Request]; searching: a search's own thread
_lock = threading.RLock()
_mode: str | None = None
_database: db.Database | None = None
_decisions: dict[
    tuple[int, str, str], tuple[Any, str, int] | None
] = {}  # checked: (schedule, why, plan's life), or None


def mode() -> str:
    """ "off", "replay", "frozen" or "online": SPIRAL_TUNE, or what set_mode said."""
    global _mode
    if _mode is None:
        chosen = os.environ.get("SPIRAL_TUNE", "replay")
        if chosen not in MODES:
            raise ValueError(f"SPIRAL_TUNE is {chosen!r}; it may be {', '.join(MODES)}")
        _mode = chosen
    return _mode


def set_mode(name: str) -> None:
    """Changes the mode; calls are planned anew."""
    global _mode
    if name not in MODES:
        raise ValueError(f"no such mode: {name!r}; there are {', '.join(MODES)}")
    _mode = name
    forget()


def forget() -> None:
    """Drops what was read from databases, and all plans: the next call of each kind chooses anew."""
    global _database
    with _lock:
        if _database is not None:
            _database.close()
        _database = None
        _decisions.clear()
        _known.cache_clear()
    _C.clear_plans()


def store() -> db.Database:
    """The user's database (db.default_path), opened on first use; read-only where the mode is frozen."""
    global _database
    with _lock:
        if _database is None:
            _database = db.Database(db.default_path(), readonly=mode() == "frozen")
        return _database


@functools.cache
def device_row(device: int) -> db.DeviceRow:
    """What is stored about a device; its identity includes the driver."""
    p = _C.device_properties(device)
    name = f"{p['engine']} {p['name']} {p['driver']}".strip()
    return db.DeviceRow(name, p["engine"], p["vendor"], p["driver"], p["schedule_class"], int(p["compute_units"]))


@functools.cache
def _known(device: int) -> dict[tuple[str, str], Source]:
    """The decisions for a device: of the very device from the database, else the shipped ones of its vendor and class whose number
    of compute units is nearest (within a factor of two)."""
    mine, found = device_row(device), {}
    if mode() != "frozen":
        devices, decisions = db.shipped()

        def distance(d: db.DeviceRow) -> float:
            return max(d.compute_units, mine.compute_units) / max(min(d.compute_units, mine.compute_units), 1)

        alike = [
            d
            for d in devices
            if (d.engine, d.vendor, d.schedule_class) == (mine.engine, mine.vendor, mine.schedule_class)
            and distance(d) <= 2
        ]
        if alike:
            nearest = min(alike, key=distance).device
            found.update({(d.template, d.key): Source(d, "shipped") for d in decisions if d.device == nearest})
    if mode() != "frozen" and not db.default_path().exists():
        return found
    try:
        found.update({(d.template, d.key): Source(d, "database") for d in store().decisions(device=mine.device)})
    except OSError as error:
        if mode() == "frozen":
            raise
        warnings.warn(f"the tuning database is not used: {error}", stacklevel=2)
    return found


def choose(template: str, key: str, default: S, candidates: Callable[[], Sequence[S]], sizes: Sequence[int] = ()) -> S:
    """The schedule for a key: `default`, or one of `candidates` (which are made only when needed) that was measured to be better.

    key: dtypes, layouts and size buckets, separated by spaces; it must follow from the plan's key. sizes: of this very call, for
    the tuner to measure with. str(schedule) names it. To be called while a lowering is recorded."""
    from ..lowering import recorder

    r = recorder()
    seen, forced = getattr(_local, "seen", None), getattr(_local, "forced", None)
    if seen is not None:
        seen.append(Request(r.device, template, key, tuple(sizes), default, tuple(candidates())))
    if forced is not None:
        if forced[0] == template:
            r.note = f"{forced[1]} (on trial)"
            return forced[1]
        return default
    if mode() == "off":
        r.note = f"{default} (built in)"
        return default
    place = (r.device, template, key)
    if place not in _decisions:
        _decisions[place] = _decide(Request(r.device, template, key, tuple(sizes), default, ()), candidates)
    found = _decisions[place]
    if mode() == "online" and not getattr(_local, "searching", False):
        from . import online

        found = online.consider(
            place, found, lambda: Request(r.device, template, key, tuple(sizes), default, tuple(candidates()))
        )
    if found is None:
        r.note = f"{default} (built in)"
        return default
    schedule, r.note, life = found
    if life:
        r.expires = min(r.expires or life, life)
    return schedule


def _decide(request: Request, candidates: Callable[[], Sequence[Any]]) -> tuple[Any, str, int] | None:
    source = _known(request.device).get((request.template, request.key))
    if source is None:
        return None
    d = source.decision
    by_name = {str(c): c for c in (request.default, *candidates())}
    schedule = by_name.get(d.schedule)
    why = "there is no such schedule any more"
    if d.fallback != str(request.default):
        why = "the built-in choice that it was compared with has changed since"
    elif schedule is not None:
        from .templates import kernel_hash

        if kernel_hash(request.device, request.template, request.key, schedule) == d.kernel_hash:
            share = f"{d.speedup:.2f}x as fast as {d.fallback}" if d.schedule != d.fallback else "nothing was better"
            return schedule, f"{schedule} ({source.origin}: {share}, p={d.p:.1g})", 0
        why = "its kernel has changed since"
    if mode() == "frozen":
        raise RuntimeError(
            f"SPIRAL_TUNE=frozen, but the decision for {d.template} {d.key} is stale: {d.schedule}, {why}"
        )
    return None


def decided(device: int, template: str, key: str, schedule: Any, why: str, life: int = 0) -> None:
    """Makes later plans of a key use a schedule, in this process."""
    with _lock:
        _decisions[device, template, key] = (schedule, f"{schedule} ({why})", life)


@contextlib.contextmanager
def forced(template: str, schedule: Any, variant: int) -> Iterator[None]:
    """Inside, this thread's calls of a template run with that schedule, from plans of their own (`variant`)."""
    before = getattr(_local, "forced", None)
    _local.forced = (template, schedule)
    _C.set_plan_variant(variant)
    try:
        yield
    finally:
        _local.forced = before
        _C.set_plan_variant(0)


@contextlib.contextmanager
def watch() -> Iterator[list[Request]]:
    """Inside, this thread's calls are planned anew, and the list collects what they ask."""
    from .tuner import next_variant

    before = getattr(_local, "seen", None)
    seen: list[Request] = []
    _local.seen = seen
    _C.set_plan_variant(next_variant())
    try:
        yield seen
    finally:
        _local.seen = before
        _C.set_plan_variant(0)


__all__ = [
    "MODES",
    "Request",
    "choose",
    "decided",
    "device_row",
    "forced",
    "forget",
    "mode",
    "set_mode",
    "store",
    "watch",
]
