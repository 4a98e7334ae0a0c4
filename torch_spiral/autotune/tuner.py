"""Measures schedules against each other, on scratch tensors, and lets one replace another only after it has agreed and won.

For one key: the candidates that the cost model does not rule out are run once and compared with the reference; the survivors are
timed a few times (half of them leave after each round); the best then meet the built-in choice in a paired comparison, whose sign test
decides. Nothing here touches a tensor that it did not make."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from .. import _C, __version__
from .. import device as spiral
from . import Request, _local, device_row, forced
from . import database as db
from .model import Roofline
from .templates import Problem, kernel_hash, template

ALPHA = 0.01  # chance of taking a schedule that is no better, per key
LEAST_GAIN = 1.02  # what a replacement must gain in the median
CHEAP_SECONDS = 20e-6  # calls shorter than this are not worth a search
ROUNDS = 21  # of the last comparison
SAMPLE_SECONDS = 1e-3  # a sample repeats the call until it takes about as long
SAMPLE_SECONDS_WITHOUT_TIMESTAMPS = 2e-2  # where the host's clock measures, with its waits
SCREENING_ROUNDS = 3
FINALISTS = 3

_variants = itertools.count(1)


def next_variant() -> int:
    """A number under which plans of its own are kept."""
    return next(_variants) % (1 << 31)


class Cheap(Exception):
    """The calls of this key are too short to be searched."""


@dataclass
class Arm:
    """One schedule of a problem, run on its scratch tensors."""

    problem: Problem
    schedule: Any
    variant: int = field(default_factory=next_variant)

    @property
    def name(self) -> str:
        return str(self.schedule)

    def run(self, times: int = 1) -> None:
        with forced(self.problem.template, self.schedule, self.variant):
            for _ in range(times):
                self.problem.call()

    def seconds(self, times: int) -> float:
        """Device seconds of one of `times` calls. As many go before, untimed: the wait for the last sample let caches cool, and clocks."""
        self.run(times)
        start, end = (torch.Event(device=self.problem.device, enable_timing=True) for _ in range(2))
        start.record()
        self.run(times)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times


def sign_test(wins: int, rounds: int) -> float:
    """The chance of at least so many wins of fair coins: one-sided."""
    return sum(math.comb(rounds, i) for i in range(wins, rounds + 1)) / 2**rounds


@dataclass(frozen=True)
class Comparison:
    """A paired comparison: rounds of both, turn by turn. Seconds are medians; p of "the challenger is no faster"."""

    seconds: float
    incumbent_seconds: float
    wins: int
    rounds: int

    @property
    def p(self) -> float:
        return sign_test(self.wins, self.rounds)

    @property
    def gain(self) -> float:
        return self.incumbent_seconds / self.seconds if self.seconds > 0 else 0.0

    def better(self, alpha: float) -> bool:
        return self.p <= alpha and self.gain >= LEAST_GAIN


def repetitions(device: int, seconds: float) -> int:
    """How many calls of so many seconds make a sample."""
    wanted = SAMPLE_SECONDS if _C.device_properties(device)["timestamps"] else SAMPLE_SECONDS_WITHOUT_TIMESTAMPS
    return max(1, min(100, round(wanted / max(seconds, 1e-7))))


class Timed(Protocol):
    def seconds(self, times: int) -> float: ...


def compare(challenger: Timed, incumbent: Timed, times: int, rounds: int = ROUNDS) -> Comparison:
    """Times both, in alternating order."""
    ours: list[float] = []
    theirs: list[float] = []
    for i in range(rounds):
        for arm, samples in ((challenger, ours), (incumbent, theirs))[:: 1 if i % 2 else -1]:
            samples.append(arm.seconds(times))
    wins = sum(a < b for a, b in zip(ours, theirs, strict=True))
    return Comparison(statistics.median(ours), statistics.median(theirs), wins, rounds)


@dataclass
class Result:
    """What a search found. schedule is the built-in choice where nothing beat it."""

    request: Request
    decision: db.Decision
    trials: list[db.Trial]
    flops: float  # operations of a call
    bytes: float  # that a call has to move at least


Progress = Callable[[str], None]


def _quiet(_: str) -> None:
    pass


class Tuner:
    """Searches keys of one device. Stores results in `database` (None: nowhere). limit: candidates measured a key; seconds: the budget of
    a key, after which the candidates that are left are not tried; clock: for tests."""

    def __init__(self, device: int, database: db.Database | None, roofline: Roofline, limit: int = 16, seconds: float = 30.0,
                 cheap_seconds: float = CHEAP_SECONDS):  # fmt: skip
        self.device, self.database, self.roofline, self.limit, self.seconds = device, database, roofline, limit, seconds
        self.cheap_seconds = cheap_seconds

    def select(self, request: Request, problem: Problem) -> tuple[list[Any], dict[str, float]]:
        """The candidates that the cost model expects most of, the best first, and its predictions in seconds. What differs in details that
        the model cannot tell apart (one `family`) is taken in turns."""
        target = template(request.template)
        predicted = {name: target.seconds(problem, s, self.roofline) for name, s in request.named().items()}
        default = str(request.default)
        order = sorted((n for n in predicted if n != default), key=predicted.__getitem__)
        named = request.named()
        families: dict[Any, int] = {}
        turns = []
        for n in order:
            if predicted[n] <= 3 * predicted[order[0]]:
                family = target.family(named[n])
                families[family] = turn = families.get(family, -1) + 1
                turns.append((turn // 2, predicted[n], n))
        return [named[n] for _, _, n in sorted(turns)[: self.limit]], predicted

    def search(self, request: Request, progress: Progress = _quiet) -> Result:
        """Raises Cheap, or NotImplementedError where no scratch call has this key."""
        with torch.no_grad(), spiral.device(request.device):
            return self._search(request, progress)

    def _search(self, request: Request, progress: Progress) -> Result:
        started = time.perf_counter()
        kind = template(request.template)
        problem = kind.problem(request.device, request.key, request.sizes)
        if not problem.asks(request):
            raise NotImplementedError(f"no scratch call asks for {request.template} {request.key}")
        ragged = kind.ragged(problem)
        default = Arm(problem, request.default)
        chosen, predicted = self.select(request, problem)
        trials: dict[str, db.Trial] = {}
        row = device_row(request.device).device

        def note(name: str, verdict: str, seconds: float | None = None, detail: str = "") -> None:
            trials[name] = db.Trial(
                row, request.template, request.key, name, verdict, None if seconds is None else seconds * 1e3,
                predicted[name] * 1e3 if name in predicted else None, detail,
            )  # fmt: skip

        for name in predicted:
            note(name, "pruned")
        default.run()
        spiral.synchronize()
        once = default.seconds(1)
        if once < self.cheap_seconds:
            raise Cheap(f"{once * 1e6:.1f} µs")
        times = repetitions(request.device, once)
        reference = [Reference(p, request.default) for p in (problem, ragged)]
        alive: list[Arm] = []
        for i, schedule in enumerate(chosen):
            if time.perf_counter() - started > self.seconds * 0.7:
                note(str(schedule), "pruned", detail="out of time")
                continue
            progress(f"{i + 1}/{len(chosen)} {schedule}")
            arm = Arm(problem, schedule)
            try:
                wrong = next((text for r in reference if (text := r.disagreement(replace_problem(arm, r.problem)))), "")
            except Exception as error:  # a schedule that this device refuses is no candidate
                note(arm.name, "failed", detail=" ".join(str(error).split())[:300])
                continue
            if wrong:
                note(arm.name, "wrong", detail=wrong)
            else:
                alive.append(arm)
        progress("screening")
        seconds = {arm.name: [arm.seconds(times)] for arm in alive}
        for _ in range(SCREENING_ROUNDS - 1):
            alive.sort(key=lambda arm: min(seconds[arm.name]))
            for arm in alive[max(FINALISTS, len(alive) // 2) :]:
                note(arm.name, "lost", min(seconds[arm.name]))
            alive = alive[: max(FINALISTS, len(alive) // 2)]
            for arm in alive:
                seconds[arm.name].append(arm.seconds(times))
        alive.sort(key=lambda arm: statistics.median(seconds[arm.name]))
        incumbent_seconds = min(default.seconds(times) for _ in range(SCREENING_ROUNDS))
        for arm in alive[FINALISTS:]:
            note(arm.name, "lost", statistics.median(seconds[arm.name]))
        best: tuple[Arm, Comparison] | None = None
        last = Comparison(incumbent_seconds, incumbent_seconds, 0, 0)
        finalists = [a for a in alive[:FINALISTS] if statistics.median(seconds[a.name]) < incumbent_seconds * 1.05]
        for arm in alive[:FINALISTS]:
            note(arm.name, "no better", statistics.median(seconds[arm.name]))
        for arm in finalists:
            progress(f"final {arm.name}")
            c = compare(arm, default, times)
            won = c.better(ALPHA / len(finalists))
            note(arm.name, "no better", c.seconds, f"{c.gain:.3f}x, {c.wins} of {c.rounds} rounds, p={c.p:.2g}")
            if best is None and not won:
                last = c
            if won and (best is None or c.gain > best[1].gain):
                best = (arm, c)
        winner, c = best if best is not None else (default, replace(last, seconds=last.incumbent_seconds))
        if best is not None:
            note(winner.name, "won", c.seconds, f"{c.gain:.3f}x, {c.wins} of {c.rounds} rounds, p={c.p:.2g}")
        note(default.name, "reference", c.incumbent_seconds, "built in")
        properties = device_row(request.device)
        decision = db.Decision(
            device=row, template=request.template, key=request.key, sizes="x".join(map(str, request.sizes)), schedule=winner.name,
            fallback=default.name, milliseconds=c.seconds * 1e3, fallback_milliseconds=c.incumbent_seconds * 1e3, wins=c.wins,
            rounds=c.rounds, p=c.p, kernel_hash=kernel_hash(request.device, request.template, request.key, winner.schedule),
            versions=f"torch_spiral {__version__}, torch {torch.__version__}, driver {properties.driver}", time=time.time(),
        )  # fmt: skip
        if self.database is not None:
            known = {d.device: d for d in self.database.devices()}.get(row, properties)
            flops = dict(known.flops)
            for dtype, most in self.roofline.flops.items():
                flops[dtype] = max(flops.get(dtype, 0.0), most)
            rate = problem.flops / c.seconds
            flops[problem.dtype] = max(flops.get(problem.dtype, 0.0), rate)
            self.database.put(
                replace(properties, bandwidth=self.roofline.bandwidth, flops=flops), decision, *trials.values()
            )
        return Result(request, decision, list(trials.values()), problem.flops, problem.bytes)


def replace_problem(arm: Arm, problem: Problem) -> Arm:
    """The same schedule on another problem."""
    return arm if arm.problem is problem else Arm(problem, arm.schedule)


class Reference:
    """The results of the reference schedule on a problem, for others to agree with."""

    def __init__(self, problem: Problem, schedule: Any):
        self.problem = problem
        self.inputs = [x.clone() for x in problem.inputs]
        self.expected = self._results(Arm(problem, schedule))
        self.truth = problem.truth()
        self.errors = (
            [_error(e, t) for e, t in zip(self.expected, self.truth, strict=True)] if self.truth is not None else []
        )

    def _results(self, arm: Arm) -> list[torch.Tensor]:
        problem = arm.problem
        problem.poison()
        arm.run()
        return problem.results()

    def disagreement(self, arm: Arm) -> str:
        """Why its results are not to be trusted; empty: they agree."""
        results = self._results(arm)
        touched = [(x, y) for x, y in zip(self.problem.inputs, self.inputs, strict=True) if not torch.equal(x, y)]
        for x, y in touched:
            x.copy_(y)  # the next candidate finds what this one found
        if touched:
            return "it wrote to its inputs"
        if damage := self.problem.damage():
            return damage
        for got, expected in zip(results, self.expected, strict=True):
            if (got.isnan() != expected.isnan()).any():
                return "results are missing or not numbers"
            distance = _error(got, expected)
            if distance > self.problem.tolerance:
                return f"off by {distance:.2g} of the largest result, where {self.problem.tolerance:.2g} is allowed"
        if self.truth is not None:
            for got, true, error in zip(results, self.truth, self.errors, strict=True):
                distance = _error(got, true)
                if distance > max(2 * error, self.problem.tolerance / 20):
                    return f"its error is {distance:.2g} of the largest result, the reference's {error:.2g}"
        return ""


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    if expected.device.type == "cpu":
        got, expected = got.cpu().double(), expected.double()
    else:
        got, expected = got.float(), expected.float()
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


_exclusive = threading.Lock()


def run_apart(function: Callable[[], Any]) -> Any:
    """Runs a search in a thread of its own, where no mode, autocast or gradient of the caller's holds, and waits for it."""
    box: dict[str, Any] = {}

    def body() -> None:
        _local.searching = True
        try:
            box["result"] = function()
        except BaseException as error:
            box["error"] = error

    with _exclusive:
        thread = threading.Thread(target=body, name="spiral-tuner")
        thread.start()
        thread.join()
    if "error" in box:
        raise box["error"]
    return box["result"]


def requests_of(function: Callable[[], Any]) -> list[Request]:
    """What a function's calls ask of the tuner, each key once, in the order of first use."""
    from . import watch

    with watch() as seen:
        function()
    spiral.synchronize()
    found: dict[tuple[int, str, str], Request] = {}
    for r in seen:
        found.setdefault((r.device, r.template, r.key), r)
    return [r for r in found.values() if r.candidates]


def clear(requests: Sequence[Request] = ()) -> None:
    """Forgets the plans of trials."""
    _C.clear_plans()
