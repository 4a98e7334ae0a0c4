"""The online mode: a bounded share of the time goes into comparing schedules of what runs often.

A plan of an undecided key lives for a number of replays; when it is made anew, the lowering asks, and that is when a trial may run:
the candidate that Thompson sampling picks for the key meets the incumbent on scratch tensors, in a thread of its own, while the
caller waits. Live calls run the incumbent until a challenger has won the sign test of tuner.py; in between, nothing of this costs
anything. Keys whose calls are cheap, and training, are left alone."""

from __future__ import annotations

import math
import os
import random
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _C
from .. import device as spiral
from . import Request, decided, device_row, store
from . import database as db
from .model import Roofline
from .templates import Problem, kernel_hash, template
from .tuner import (
    ALPHA,
    LEAST_GAIN,
    Arm,
    Comparison,
    Reference,
    Tuner,
    repetitions,
    replace_problem,
    run_apart,
    sign_test,
)

LIFE = 64  # replays between two looks at a key
SHARE = 0.02  # of the time since the start, at most, unless SPIRAL_TUNE_SHARE says otherwise
MAX_ARMS = 8
LOOKS = (8, 16, 32)  # rounds after which an arm is judged; the last look retires it
HOPELESS = 0.8  # an arm that is so much slower after its first look leaves


@dataclass
class Bet:
    """What is known of an arm: the logarithms of incumbent's time / its time, round by round."""

    arm: Arm
    gains: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    incumbent_seconds: list[float] = field(default_factory=list)

    def sample(self, rng: random.Random, prior: float) -> float:
        """A draw from the posterior of its mean gain. prior: what the cost model expects, worth two rounds."""
        n = len(self.gains) + 2
        mean = (sum(self.gains) + 2 * prior) / n
        spread = statistics.pstdev([*self.gains, prior]) if self.gains else 0.3
        return rng.gauss(mean, max(spread, 0.02) / math.sqrt(n))

    def comparison(self) -> Comparison:
        wins = sum(g > 0 for g in self.gains)
        return Comparison(
            statistics.median(self.seconds), statistics.median(self.incumbent_seconds), wins, len(self.gains)
        )


class Bandit:
    """The search of one key, a few rounds at a time."""

    def __init__(self, request: Request, incumbent: Any, seed: int = 0):
        self.request, self.incumbent_schedule = request, incumbent
        self.rng = random.Random(seed)
        self.bets: list[Bet] | None = None
        self.done = False
        self.trials: list[db.Trial] = []

    def _begin(self) -> None:
        r = self.request
        kind = template(r.template)
        problem: Problem = kind.problem(r.device, r.key, r.sizes)
        if not problem.asks(r):
            raise NotImplementedError(f"no scratch call asks for {r.key}")
        self.incumbent = Arm(problem, self.incumbent_schedule)
        self.incumbent.run()
        once = self.incumbent.seconds(1)
        self.times = repetitions(r.device, once)
        chooser = Tuner(r.device, None, _roofline(r.device), MAX_ARMS)
        if once < chooser.cheap_seconds:
            self.done = True
            return
        chosen, predicted = chooser.select(r, problem)
        own = predicted.get(self.incumbent.name, once)
        self.prior = {str(s): math.log(max(own, 1e-9) / max(predicted[str(s)], 1e-9)) for s in chosen}
        self.references = [Reference(p, r.default) for p in (problem, kind.ragged(problem))]
        self.unchecked = [Arm(problem, s) for s in chosen if str(s) != self.incumbent.name]
        self.bets = []

    def _check_one(self) -> None:
        """Compiles the next candidate and lets it in if it agrees."""
        assert self.bets is not None
        arm = self.unchecked.pop(0)
        try:
            wrong = next(
                (t for ref in self.references if (t := ref.disagreement(replace_problem(arm, ref.problem)))), ""
            )
        except Exception as error:  # a schedule that this device refuses is no candidate
            self._note(arm.name, "failed", " ".join(str(error).split())[:300])
            return
        if wrong:
            self._note(arm.name, "wrong", wrong)
        else:
            self.bets.append(Bet(arm))

    def _note(self, name: str, verdict: str, detail: str = "", seconds: float | None = None) -> None:
        r = self.request
        self.trials.append(
            db.Trial(
                device_row(r.device).device,
                r.template,
                r.key,
                name,
                verdict,
                None if seconds is None else seconds * 1e3,
                None,
                detail,
            )
        )

    def step(self) -> None:
        """One step: a candidate is checked, or one round is run. Ends with `done` and, where something won, with a decision."""
        with torch.no_grad(), spiral.device(self.request.device):
            if self.bets is None:
                self._begin()
                return
            if self.unchecked:
                self._check_one()
                return
            if not self.bets:
                self.done = True
                return
            bet = max(self.bets, key=lambda b: b.sample(self.rng, self.prior.get(b.arm.name, 0.0)))
            pair = (bet.arm, self.incumbent) if self.rng.random() < 0.5 else (self.incumbent, bet.arm)
            taken = {arm.name: arm.seconds(self.times) for arm in pair}
            ours, theirs = taken[bet.arm.name], taken[self.incumbent.name]
            bet.seconds.append(ours)
            bet.incumbent_seconds.append(theirs)
            bet.gains.append(math.log(theirs / ours))
            if len(bet.gains) in LOOKS:
                self._judge(bet)

    def _judge(self, bet: Bet) -> None:
        assert self.bets is not None
        c = bet.comparison()
        detail = f"{c.gain:.3f}x, {c.wins} of {c.rounds} rounds, p={c.p:.2g}, online"
        # Every look at every arm may err.
        if sign_test(c.wins, c.rounds) <= ALPHA / (len(LOOKS) * MAX_ARMS) and c.gain >= LEAST_GAIN:
            self._note(bet.arm.name, "won", detail, c.seconds)
            self._promote(bet, c)
            self.done = True
        elif len(bet.gains) == LOOKS[-1] or c.gain < HOPELESS:
            self._note(bet.arm.name, "no better", detail, c.seconds)
            self.bets.remove(bet)
            self.done = not self.bets

    def _promote(self, bet: Bet, c: Comparison) -> None:
        from .. import __version__

        r, row = self.request, device_row(self.request.device)
        decision = db.Decision(
            device=row.device, template=r.template, key=r.key, sizes="x".join(map(str, r.sizes)), schedule=bet.arm.name, fallback=str(r.default),
            milliseconds=c.seconds * 1e3, fallback_milliseconds=c.incumbent_seconds * 1e3, wins=c.wins, rounds=c.rounds, p=c.p,
            kernel_hash=kernel_hash(r.device, r.template, r.key, bet.arm.schedule),
            versions=f"torch_spiral {__version__}, torch {torch.__version__}, driver {row.driver}", time=time.time(),
        )  # fmt: skip
        known = any(d.device == row.device for d in store().devices())
        store().put(*([] if known else [row]), decision, *self.trials)
        decided(
            r.device, r.template, r.key, bet.arm.schedule, f"online: {c.gain:.2f}x as fast as {r.default}, p={c.p:.1g}"
        )


Choice = tuple[Any, str, int]  # schedule, why, replays until the next look
_roofs: dict[int, Roofline] = {}


def _roofline(device: int) -> Roofline:
    """From the database; else a guess by which candidates can at least be ordered: measuring is for the offline command."""
    if device not in _roofs:
        rows = store().devices(device=device_row(device).device)
        units = int(_C.device_properties(device)["compute_units"])
        guess = Roofline(2e10 * units, {"f32": 3e11 * units})
        _roofs[device] = Roofline(rows[0].bandwidth, dict(rows[0].flops)) if rows and rows[0].bandwidth else guess
    return _roofs[device]


class Explorer:
    """The bandits of this process and their common budget."""

    def __init__(self) -> None:
        self.bandits: dict[tuple[int, str, str], Bandit] = {}
        self.started, self.spent = time.perf_counter(), 0.0
        self.lock = threading.Lock()
        self.busy = False

    @property
    def share(self) -> float:
        return float(os.environ.get("SPIRAL_TUNE_SHARE", SHARE))

    def affordable(self) -> bool:
        return self.spent <= self.share * (time.perf_counter() - self.started)

    def consider(self, key: tuple[int, str, str], found: Choice | None, make: Callable[[], Request]) -> Choice | None:
        bandit = self.bandits.get(key)
        if bandit is None:
            if found is not None:
                return found  # decided before
            request = make()
            bandit = self.bandits[key] = Bandit(request, request.default)
            bandit.done = not request.candidates
            fresh = True
        else:
            fresh = False
        if bandit.done:
            return found
        incumbent = bandit.incumbent_schedule
        live = (incumbent, f"{incumbent} (built in, under comparison)", LIFE)
        if fresh:  # the first call only begins to count
            return live
        if torch.is_grad_enabled():
            return live
        with self.lock:
            if self.busy:
                return live
            self.busy = True
        try:
            while not bandit.done and self.affordable():
                start = time.perf_counter()
                try:
                    run_apart(bandit.step)
                except Exception as error:  # a search that fails must not fail the call that it was to help
                    bandit.done = True
                    if not isinstance(error, NotImplementedError):
                        warnings.warn(f"tuning {key[1]} {key[2]} was given up: {error}", stacklevel=2)
                finally:
                    self.spent += time.perf_counter() - start
        finally:
            self.busy = False
        if bandit.done:
            from . import _decisions

            return _decisions.get(key) or found
        return live


_explorer: Explorer | None = None


def explorer() -> Explorer:
    global _explorer
    if _explorer is None:
        _explorer = Explorer()
    return _explorer


def reset() -> None:
    """Forgets all searches that are under way, and the time they took."""
    global _explorer
    _explorer = None


def consider(key: tuple[int, str, str], found: Choice | None, make: Callable[[], Request]) -> Choice | None:
    """What choose() goes by in the online mode: what is decided, or the incumbent, after a trial if one is due."""
    return explorer().consider(key, found, make)
