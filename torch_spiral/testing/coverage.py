"""Runs the checks of checks.py over upstream's op tables, in crash-isolated workers, and writes the report."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import queue
import re
import selectors
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch_spiral.testing import ledger

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "coverage"
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool", "float64", "complex64")
# What `--all` asks; the order is that of the report.
CHECKS = (
    "forward",
    "backward",
    "noncontiguous",
    "reference",
    "variants",
    "out",
    "errors",
    "views",
    "fake",
    "gradcheck",
)
KIND_CHECKS = {"op": CHECKS, "ref": ("forward",), "module": ("forward", "backward"), "optim": ("steps",)}
# Checks that say the same for every dtype of a kind run for these dtypes only.
CHECK_DTYPES = {
    "noncontiguous": ("float32", "int64", "bool", "float16"),
    "reference": ("float32", "int64", "float16"),
    "variants": ("float32", "int64", "bool"),
    "out": ("float32", "int64", "bool"),
    "views": ("float32", "complex64"),
    "fake": ("float32",),
    "gradcheck": ("float64",),
    "backward": ("float32", "float64", "float16", "bfloat16", "complex64"),
}
BACKWARD_AND_FORWARD = ("forward", "backward")


@dataclass(frozen=True, order=True)
class Task:
    op: str
    kind: str
    dtype: str
    check: str

    @property
    def key(self) -> str:
        return f"{self.op} {self.dtype} {self.check}"

    @property
    def hash(self) -> int:
        """Stable across processes and machines: shards and tiers are chosen by it."""
        return zlib.crc32(self.key.encode())


@dataclass
class Result:
    op: str
    kind: str
    dtype: str
    check: str
    status: str  # pass, fail, crash, timeout, n/a
    samples: int = 0
    message: str = ""
    seconds: float = 0.0
    limit: int | None = None  # at most this many samples were asked for
    host: dict[str, list[int]] = field(default_factory=dict)  # declared host ops that ran: calls and bytes copied
    code: str = ""  # the commit of the checkout that ran it

    @property
    def good(self) -> bool:
        return self.status == "pass"

    def covers(self, limit: int | None) -> bool:
        """Whether it took as many samples as such a limit asks for."""
        return self.limit is None or (limit is not None and self.limit >= limit)


def applies(kind: str, dtype: str, check: str) -> bool:
    """Whether a check is asked of a dtype."""
    return check in KIND_CHECKS[kind] and (kind != "op" or dtype in CHECK_DTYPES.get(check, (dtype,)))


def stratum(task: Task, engine: str = "opencl") -> bool:
    """The part of the table that `make test` runs, by a fixed rule: a quarter of the float32 forward column, a tenth of
    the backward one, and of the rest every 250th cell; a quarter of modules and optimizers in float32 once. Of all that an eighth
    on engines whose kernels take long to compile (a software adapter of wgpu)."""
    if task.kind == "ref" or task.dtype not in DTYPES:
        return False
    if engine == "wgpu" and task.hash // 1000 % 8:
        return False
    if task.kind in ("module", "optim"):
        return task.dtype == "float32" and task.hash % 4 == 0
    if task.dtype == "float32" and task.check in BACKWARD_AND_FORWARD:
        return task.hash % (4 if task.check == "forward" else 10) == 0
    return task.hash % 250 == 0


def tier_samples(engine: str) -> int:
    """Samples a check in the tier: every further one may compile kernels, which takes a software adapter a second each."""
    return 2 if engine == "wgpu" else 4


def tasks(
    listed: Iterable[Iterable[str]],
    *,
    dtypes: Iterable[str] = DTYPES,
    checks: Iterable[str] = CHECKS,
    kinds: Iterable[str] = ("op", "module", "optim"),
    ops: Iterable[str] = (),
) -> list[Task]:
    """The tasks asked for, of those that a worker lists as (op, kind, dtype)."""
    dtypes, kinds, patterns = set(dtypes), set(kinds), list(ops)
    wanted = [*checks, "steps"] if "forward" in checks else list(checks)
    return [
        Task(op, kind, dtype, check)
        for op, kind, dtype in listed
        if dtype in dtypes and kind in kinds and (not patterns or matches(op, patterns))
        for check in wanted
        if applies(kind, dtype, check)
    ]


def matches(op: str, patterns: Iterable[str]) -> bool:
    """op is one of the patterns: a full name, a name without its variant, or a glob."""
    return any(fnmatch.fnmatchcase(op, p) or (op.startswith(p + ".") and "*" not in p) for p in patterns)


def commit() -> str:
    """The commit of this checkout; "" where there is none."""
    return _git("rev-parse", "--short=12", "HEAD")


def made_since(since: str, codes: Iterable[str]) -> set[str]:
    """Those of the commits that are `since` or later ones."""
    if not _git("rev-parse", "--verify", "--quiet", since + "^{commit}"):
        raise SystemExit(f"--since: no commit {since} in {ROOT}")
    after = set(_git("rev-list", "--abbrev-commit", "--abbrev=12", "HEAD", "--not", since + "^@").split())
    return after & set(codes)


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


class Worker:
    """A worker process. ask() answers a request, or says how the process ended."""

    def __init__(self, device: str, engine: str | None, log: Path) -> None:
        environment = dict(os.environ, SPIRAL_FALLBACK="error", PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
        if engine:
            environment["SPIRAL_ENGINE"] = engine
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch_spiral.testing.worker", device, *([engine] if engine else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment,
            )
        self.log = log
        assert self.process.stdout is not None
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def ask(self, request: dict, timeout: float) -> dict:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        if not self.selector.select(timeout):
            self.stop()
            return {"status": "timeout", "samples": 0, "message": f"no answer in {timeout:g} s", "seconds": timeout}
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._ended()

    def _ended(self) -> dict:
        code = self.process.wait()
        tail = self.log.read_bytes()[-1500:].decode(errors="replace").strip().splitlines()
        said = tail[-1] if tail else ""
        return {"status": "crash", "samples": 0, "message": f"the process ended with {code}: {said}", "seconds": 0.0}

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()


class Runner:
    """Workers that share a queue of tasks."""

    def __init__(self, device: str, engine: str | None, workers: int, timeout: float, limit: int | None) -> None:
        self.device, self.engine, self.count, self.timeout, self.limit = device, engine, workers, timeout, limit
        self.code = commit()
        self.log = CACHE / f"worker-{os.getpid()}"
        self.first = self._worker(0)
        answer = self.first.ask({"list": True}, timeout=300)
        if "tasks" not in answer:
            raise SystemExit(f"no worker: {answer['message']} (log: {self.first.log})")
        self.listed = answer["tasks"]
        self.described, self.torch = answer["device"], answer["torch"]

    def _worker(self, index: int) -> Worker:
        return Worker(self.device, self.engine, self.log.with_suffix(f".{index}.log"))

    def run(self, wanted: list[Task], each) -> None:
        """Calls each(result) from worker threads, one call at a time."""
        todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in wanted:
            todo.put(task)
        lock = threading.Lock()

        def work(index: int) -> None:
            worker = self.first if index == 0 else None
            while True:
                try:
                    task = todo.get_nowait()
                except queue.Empty:
                    break
                if worker is None or not worker.alive:
                    worker = self._worker(index)
                    worker.ask({"list": True}, timeout=300)
                request = {"op": task.op, "dtype": task.dtype, "check": task.check, "limit": self.limit}
                answer = worker.ask(request, self.timeout)
                with lock:
                    each(Result(task.op, task.kind, task.dtype, task.check, limit=self.limit, code=self.code, **answer))
            if worker is not None:
                worker.stop()

        count = max(1, min(self.count, len(wanted)))
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def close(self) -> None:
        self.first.stop()
        for log in self.log.parent.glob(f"{self.log.name}.*.log"):
            if not log.stat().st_size:
                log.unlink()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="spiral", help="the device under test (default: spiral)")
    parser.add_argument("--engine", help="opencl, wgpu or cuda: that engine's first device")
    parser.add_argument("--ops", help="comma-separated names or globs: add, div.floor_rounding, 'linalg.*', nn.Linear")
    parser.add_argument("--dtype", action="append", help="may repeat or be comma-separated (default: nine dtypes)")
    parser.add_argument("--forward", action="store_true", help="only the forward check")
    parser.add_argument("--backward", action="store_true", help="only the backward check")
    parser.add_argument("--checks", help=f"comma-separated, of {', '.join(CHECKS)}")
    parser.add_argument("--all", action="store_true", help="every check (default: forward and backward)")
    parser.add_argument("--kinds", default="op,module,optim", help="op, ref (python references), module, optim")
    parser.add_argument("--samples", type=int, help="at most this many samples a check")
    parser.add_argument("--tier", choices=("full", "test"), default="full", help="test: the part that make test runs")
    parser.add_argument("--shard", default="0/1", help="i/n: the i-th of n parts")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one check")
    parser.add_argument(
        "--resume", action="store_true", help="keep the results there are of as many samples, run the rest"
    )
    parser.add_argument("--since", help="with --resume: only results of this commit and later ones are kept")
    parser.add_argument("--failed", action="store_true", help="run again what failed last time")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write docs/coverage.md from all results, and keep those under benchmarks/results; alone it runs nothing",
    )
    parser.add_argument("--expect", action="store_true", help="write the failures of this run into the ledger")
    parser.add_argument("-v", "--verbose", action="store_true", help="whole messages, and a line for each pass")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 where nothing failed that the ledger does not expect, and nothing passed that it does."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(highlight=False, soft_wrap=True)
    start = time.perf_counter()
    asked = (args.ops, args.dtype, args.forward, args.backward, args.checks, args.all, args.failed, args.resume)
    if args.report and not any(asked) and args.tier == "full":
        return _report(console)
    if args.tier == "test" and args.samples is None:
        args.samples = tier_samples(args.engine or "opencl")
    runner = Runner(args.device, args.engine, args.workers, args.timeout, args.samples)
    engine = args.engine or _engine(runner.described, args.device)
    wanted = _wanted(args, runner.listed)
    store = Store(CACHE / f"{args.device.replace(':', '-')}-{engine}.jsonl")
    if args.failed:
        wanted = [t for t in wanted if store.results.get(t.key) and store.results[t.key].status not in ("pass", "n/a")]
    if args.resume:
        kept = {key: r for key, r in store.results.items() if r.covers(args.samples)}
        if args.since:
            codes = made_since(args.since, {r.code for r in kept.values()})
            kept = {key: r for key, r in kept.items() if r.code in codes}
        wanted = [t for t in wanted if t.key not in kept]
    if not wanted:
        console.print("nothing to run")
    expected = ledger.load()
    results: list[Result] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with bar, store:
        progress = bar.add_task(runner.described, total=len(wanted))

        def each(result: Result) -> None:
            results.append(result)
            store.add(result)
            cell = (result.op, result.check, result.dtype, engine)
            line = None
            if result.status in ("fail", "crash", "timeout"):
                word = "expected" if cell in expected else result.status.upper()
                if word != "expected" or args.verbose:
                    line = f"{word} {result.op} {result.dtype} {result.check}: {result.message}"
            elif result.good and cell in expected:
                line = f"FIXED {result.op} {result.dtype} {result.check}: remove it from the ledger"
            elif args.verbose:
                line = f"{result.status} {result.op} {result.dtype} {result.check} ({result.samples} samples)"
            if line:
                console.print(line if args.verbose else line[:240], markup=False)
            bar.advance(progress)

        runner.run(wanted, each)
    runner.close()
    red = [r for r in results if _red(r, engine, expected)]
    _totals(console, results, engine, expected, time.perf_counter() - start)
    if args.expect:
        _expect(red, engine, expected)
    if args.report:
        _report(console)
    return 1 if red else 0


def _report(console) -> int:
    from torch_spiral.testing import report

    console.print(f"wrote {report.write()}")
    return 0


def _red(r: Result, engine: str, expected: dict) -> bool:
    known = (r.op, r.check, r.dtype, engine) in expected
    return (r.status in ("fail", "crash", "timeout") and not known) or (r.good and known)


def _engine(described: str, device: str) -> str:
    return described.split("(")[1].split(":")[0] if device.startswith("spiral") else device


def _wanted(args: argparse.Namespace, listed: list) -> list[Task]:
    dtypes = [d for given in args.dtype or DTYPES for d in given.split(",")]
    checks: list[str] = []
    if args.forward:
        checks.append("forward")
    if args.backward:
        checks.append("backward")
    if args.checks:
        checks += args.checks.split(",")
    if args.all or args.tier == "test":
        checks = list(CHECKS)
    unknown = set(checks) - set(CHECKS)
    if unknown:
        raise SystemExit(f"unknown checks {sorted(unknown)}, there are {', '.join(CHECKS)}")
    ops = args.ops.split(",") if args.ops else []
    wanted = tasks(listed, dtypes=dtypes, checks=checks or BACKWARD_AND_FORWARD, kinds=args.kinds.split(","), ops=ops)
    names = {t[0] for t in listed}
    for pattern in ops:
        if not any(matches(n, [pattern]) for n in names):
            near = [n for n in names if pattern.lower() in n.lower()]
            raise SystemExit(f"no op {pattern}" + (f"; similar: {', '.join(sorted(near)[:20])}" if near else ""))
    if args.tier == "test":
        wanted = [t for t in wanted if stratum(t, args.engine or "opencl")]
    index, count = (int(x) for x in args.shard.split("/"))
    return [t for t in wanted if t.hash % count == index]


class Store:
    """Results on disk, one JSON object a line, the last of a key counts; so a run can be killed and resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that was being written when the run was killed
                    result = Result(**json.loads(line))
                    self.results[Task(result.op, result.kind, result.dtype, result.check).key] = result

    def __enter__(self) -> Store:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, result: Result) -> None:
        self.results[Task(result.op, result.kind, result.dtype, result.check).key] = result
        self.file.write(json.dumps(asdict(result)) + "\n")


def _totals(console, results: list[Result], engine: str, expected: dict, seconds: float) -> None:
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for r in results:
        counts[r.check, r.dtype][r.status] += 1
    for (check, dtype), c in sorted(counts.items()):
        asked = sum(c.values()) - c["n/a"]
        detail = ", ".join(f"{c[s]} {s}" for s in ("fail", "crash", "timeout") if c[s])
        share = f"{100 * c['pass'] / asked:.1f} %" if asked else "-"
        console.print(f"{check} {dtype}: {c['pass']} of {asked} ({share}){' · ' + detail if detail else ''}")
    said = re.compile(r"(aten::[\w.]+) has no kernel|no kernel for ([\w.:]+)")
    missing = Counter(m[1] or m[2] for r in results if (m := said.search(r.message)))
    if missing:
        console.print("missing kernels: " + ", ".join(f"{name} ({n})" for name, n in missing.most_common(60)))
    known = sum((r.op, r.check, r.dtype, engine) in expected for r in results)
    console.print(f"{len(results)} checks in {seconds:.0f} s, {known} of them expected to fail")


def _expect(red: list[Result], engine: str, expected: dict) -> None:
    cells = dict(expected)
    for r in red:
        cell = (r.op, r.check, r.dtype, engine)
        if r.good:
            del cells[cell]
        else:
            refused = "SPIRAL_FALLBACK" in r.message or "NotImplementedError" in r.message
            category = "unimplemented" if refused or r.status != "fail" else "tolerance"
            cells[cell] = ledger.Expectation(category, r.message[:160])
    ledger.PATH.write_text(ledger.dump(cells), encoding="utf-8")
