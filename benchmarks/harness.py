"""One harness for all benchmarks: contenders interleaved in one process, medians, ratios with their spread.

A suite is a list of Work (contenders against each other, with bars on the ratio) and Reading (one number with a
bound). Results are printed as a table and written, row by row, to benchmarks/results/<suite>-<engine>.json with the machine, the
versions, the commit and the command. A run of some rows (--only) leaves the others in the file, if they were measured on the same
machine with the same versions; each row says at which commit it was measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("SPIRAL_FALLBACK", "error")

import torch

from torch_spiral.testing import devices

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Step = Callable[[], Any]

# Seconds before each measurement: a pool of threads (OpenMP's, PoCL's) spins on for some milliseconds after its last work, and
# would take a core from the next contender.
PAUSE = 0.02
ROUND = 0.02  # seconds of work between a start and a wait, or one step where that takes longer


@dataclass(frozen=True)
class Contender:
    step: Step  # what is timed, once set up
    device: torch.device  # what is synchronized after it


@dataclass(frozen=True)
class Work:
    name: str
    contenders: Callable[[torch.device], dict[str, Contender]]  # for a spiral device; ours is the last
    bars: dict[str, float] = field(default_factory=dict)  # contender -> at least this ratio of its time to ours
    aim: float | None = None
    intel_bar: float | None = None  # the bar against "torch" on an Intel host, where MKL runs at the chip's full rate
    elsewhere: Callable[[], Timing] | None = None  # who times it, where another process has it ready


@dataclass(frozen=True)
class Reading:
    name: str
    measure: Callable[[torch.device], float]
    unit: str
    at_most: float | None = None
    at_least: float | None = None


@dataclass
class Timing:
    name: str
    ours: str
    milliseconds: dict[str, float]  # medians
    ratio: dict[str, float]  # median of theirs / median of ours
    spread: dict[str, tuple[float, float]]  # quartiles of the ratio, round by round
    bars: dict[str, float]
    rounds: int
    calls_per_round: int

    @property
    def missed(self) -> list[str]:
        return [name for name, bar in self.bars.items() if name in self.ratio and self.ratio[name] < bar]


def versus_cpu(make: Callable[[torch.device], Step]) -> Callable[[torch.device], dict[str, Contender]]:
    """torch eager on the CPU against spiral eager, from one set-up."""
    cpu = torch.device("cpu")
    return lambda device: {"torch": Contender(make(cpu), cpu), "spiral": Contender(make(device), device)}


def time_work(work: Work, device: torch.device, *, seconds: float = 4.0, least: int = 5, most: int = 51) -> Timing:
    """Times the contenders turn by turn, for about so many seconds each. Raises where an op of ours fell back."""
    gc.collect()
    contenders = work.contenders(device)
    fallen = devices.fallbacks()
    for c in contenders.values():
        for _ in range(3):  # compiles kernels, fills caches
            c.step()
    # A first guess holds the time of waking up and waiting; what it leads to, hardly.
    calls = 1
    for _ in range(2):
        each = {name: _clock(c, calls) for name, c in contenders.items()}
        calls = max(1, min(2000, int(ROUND / max(next(iter(each.values())), 1e-6))))
    slowest = max(each.values()) * calls
    rounds = int(max(least, min(most, seconds / max(slowest, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for round in range(rounds):
        for name in order if round % 2 == 0 else reversed(order):
            samples[name].append(_clock(contenders[name], calls))
    if devices.fallbacks() != fallen:
        raise RuntimeError(f"{work.name}: an op fell back to the CPU, so its time means nothing")
    ours = order[-1]
    medians = {name: statistics.median(s) for name, s in samples.items()}
    ratio, spread = {}, {}
    for name in order[:-1]:
        ratio[name] = medians[name] / medians[ours]
        each = sorted(t / o for t, o in zip(samples[name], samples[ours], strict=True))
        spread[name] = (each[len(each) // 4], each[(3 * len(each)) // 4])
    bars = dict(work.bars)
    if work.intel_bar is not None and "Intel" in processor() and "torch" in bars:
        bars["torch"] = work.intel_bar
    return Timing(work.name, ours, {n: 1e3 * m for n, m in medians.items()}, ratio, spread, bars, rounds, calls)


def _clock(c: Contender, calls: int) -> float:
    """Seconds a call, from an idle device that has just worked to an idle device."""
    devices.synchronize(c.device)
    time.sleep(PAUSE)
    if calls > 1:  # beside one long step, waking up is little
        c.step()
        devices.synchronize(c.device)
    start = time.perf_counter()
    for _ in range(calls):
        c.step()
    devices.synchronize(c.device)
    return (time.perf_counter() - start) / calls


def processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def provenance(device: torch.device) -> dict[str, Any]:
    """What a number is worth without: machine, versions, commit, command."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    about: dict[str, Any] = {
        "device": devices.describe(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        about["cuda"] = torch.cuda.get_device_name()
    return about


def model_zoo() -> ModuleType:
    """tests/models.py, which isn't part of an installed package."""
    name = "spiral_model_zoo"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "models.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="spiral", help="the device under test (default: spiral)")
    parser.add_argument("--engine", help="opencl, wgpu or cuda: that engine's first device")
    parser.add_argument("--only", help="comma-separated parts of row names")
    parser.add_argument("--seconds", type=float, default=4.0, help="about so long a contender and row")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads on the CPU")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--strict", action="store_true", help="exit status 1 where a bar is missed")
    return parser


def run_suite(suite: str, rows: list[Work | Reading], args: argparse.Namespace, about: dict | None = None) -> int:
    """Runs, prints and writes a suite. A row that fails is reported and does not stop the others."""
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = devices.resolve(args.device, args.engine)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    about = provenance(device) | (about or {})
    console.print(f"[bold]{suite}[/] on {about['device']} · {about['processor']} · torch {about['torch']}")
    wanted = args.only.split(",") if args.only else [""]
    engine = about["device"].split("(")[-1].split(":")[0] if device.type == "spiral" else device.type
    results = Results(RESULTS / f"{suite}-{engine}.json", about, [row.name for row in rows], keep=bool(args.only))
    run = missed = 0
    table = Table("work", "theirs", "ms", "ours, ms", "ratio", "quartiles", "bar", "")
    for row in rows:
        if not any(w in row.name for w in wanted):
            continue
        run += 1
        try:
            with console.status(row.name):
                if isinstance(row, Work):
                    timing = row.elsewhere() if row.elsewhere else time_work(row, device, seconds=args.seconds)
                    results.add("timings", asdict(timing))
                    missed += bool(timing.missed)
                    _add_timing(table, timing, row.aim)
                    console.print(f"  {row.name}: " + _short(timing))
                else:
                    value = row.measure(device)
                    good = (row.at_most is None or value <= row.at_most) and (
                        row.at_least is None or value >= row.at_least
                    )
                    bound = f"≤ {row.at_most:g}" if row.at_most is not None else ""
                    bound = f"≥ {row.at_least:g}" if row.at_least is not None else bound
                    results.add("readings", asdict_reading(row) | {"value": value, "good": good})
                    missed += not good
                    table.add_row(row.name, "", "", f"{value:.3g} {row.unit}", "", "", bound, _verdict(good))
                    console.print(f"  {row.name}: {value:.3g} {row.unit}")
        except Exception as e:
            text = " ".join(str(e).split())[:300]
            results.fail(row.name, f"{type(e).__name__}: {text}")
            missed += 1
            table.add_row(row.name, "", "", "", "", "", "", "[red]failed")
            console.print(f"  [red]{row.name}: {type(e).__name__}[/]", end=" ")
            console.print(text, markup=False)
        if not args.no_write:
            results.write()
        gc.collect()
    console.print(table)
    console.print(f"{run} rows, {missed} missed or failed")
    if not args.no_write:
        console.print(f"wrote {results.path.relative_to(ROOT)}")
    return 1 if args.strict and missed else 0


class Results:
    """The file of a suite's results. keep: rows that it holds already stay, where machine and versions are the same."""

    SAME = ("device", "processor", "cores", "torch_threads", "system", "python", "torch", "cuda")

    def __init__(self, path: Path, about: dict[str, Any], names: list[str], keep: bool) -> None:
        self.path, self.about, self.names = path, about, names
        self.rows: dict[str, dict[str, dict[str, Any]]] = {"timings": {}, "readings": {}}
        self.failed: dict[str, str] = {}
        if keep and path.exists():
            old = json.loads(path.read_text())
            if all(old["about"].get(key) == about.get(key) for key in self.SAME):
                for kind, rows in self.rows.items():
                    rows |= {r["name"]: self._of(old["about"]) | r for r in old[kind] if r["name"] in names}
                self.failed = {name: why for name, why in old["failed"].items() if name in names}

    @staticmethod
    def _of(about: dict[str, Any]) -> dict[str, Any]:
        return {key: about[key] for key in ("commit", "modified", "command")}

    def _forget(self, name: str) -> None:
        for rows in (*self.rows.values(), self.failed):
            rows.pop(name, None)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """kind: "timings" or "readings"."""
        self._forget(row["name"])
        self.rows[kind][row["name"]] = row | self._of(self.about)

    def fail(self, name: str, why: str) -> None:
        self._forget(name)
        self.failed[name] = why

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ordered = {kind: [rows[name] for name in self.names if name in rows] for kind, rows in self.rows.items()}
        result = {"about": self.about, **ordered, "failed": self.failed}
        self.path.write_text(json.dumps(result, indent=1) + "\n")


def asdict_reading(row: Reading) -> dict[str, Any]:
    return {"name": row.name, "unit": row.unit, "at_most": row.at_most, "at_least": row.at_least}


def _short(t: Timing) -> str:
    return ", ".join(f"{r:.2f}x {n}" for n, r in t.ratio.items()) + f" ({t.milliseconds[t.ours]:.3g} ms)"


def _verdict(good: bool) -> str:
    return "[green]pass" if good else "[red]miss"


def _add_timing(table: Any, t: Timing, aim: float | None) -> None:
    for name, ratio in t.ratio.items():
        bar = t.bars.get(name)
        low, high = t.spread[name]
        verdict = "" if bar is None else _verdict(ratio >= bar)
        table.add_row(
            t.name,
            name,
            f"{t.milliseconds[name]:.3g}",
            f"{t.milliseconds[t.ours]:.3g}",
            f"{ratio:.2f}",
            f"{low:.2f}–{high:.2f}",
            "" if bar is None else f"{bar:g}" + (f" (aim {aim:g})" if aim else ""),
            verdict,
        )
