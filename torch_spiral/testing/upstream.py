"""Runs test files of a PyTorch checkout on spiral: in parallel, crash-isolated, resumable, with our expectations.

The checkout must be of the installed torch's version. Expected failures are the rows of the ledger (ledger.py) whose
check is an upstream test's name: {op: linalg.svd, checks: [test_out], dtypes: [float32], …}; for a test without
ops, op is its class and dtypes is [none].
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TypedDict
from xml.etree import ElementTree

from torch_spiral.testing import ledger
from torch_spiral.testing.coverage import ROOT

CACHE = ROOT / ".cache" / "upstream"
FILES = (
    "test_ops.py",
    "test_torch.py",
    "test_binary_ufuncs.py",
    "test_unary_ufuncs.py",
    "test_reductions.py",
    "test_nn.py",
)


class Outcome(TypedDict):
    nodeid: str
    outcome: str  # passed, failed, skipped, xfailed, xpassed
    seconds: float
    message: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--torch-source", type=Path, required=True, metavar="DIR", help="a PyTorch checkout")
    parser.add_argument("files", nargs="*", default=FILES, help=f"below DIR/test (default: {' '.join(FILES)})")
    parser.add_argument("--device", default="spiral", help="a device type (default: spiral)")
    parser.add_argument("--engine", help="opencl, wgpu or cuda")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one test")
    parser.add_argument("--resume", action="store_true", help="run what an earlier run has no result for")
    parser.add_argument(
        "--bypass", action="store_true", help="also run what upstream restricts to CUDA, MPS or XPU (2.13)"
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="tests by name, as in pytest")
    parser.add_argument("--out", type=Path, help="folder for results.xml and summary.md (default: .cache/upstream)")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 where every test passed, was skipped, or failed as expected."""
    import torch

    tests = args.torch_source / "test"
    if not tests.is_dir():
        raise SystemExit(f"{args.torch_source} is not a PyTorch checkout: it has no test folder")
    wanted = (
        (args.torch_source / "version.txt").read_text().strip() if (args.torch_source / "version.txt").exists() else ""
    )
    if wanted and wanted.split(".")[:2] != torch.__version__.split(".")[:2]:
        print(f"warning: a checkout of {wanted} with torch {torch.__version__}", file=sys.stderr)
    engine = args.engine or (os.environ.get("SPIRAL_ENGINE", "default") if args.device == "spiral" else args.device)
    out = args.out or CACHE
    out.mkdir(parents=True, exist_ok=True)
    everything: dict[str, list[Outcome]] = {}
    for file in args.files:
        everything[file] = _run_file(tests, file, engine, args)
    _junit(everything, out / "results.xml")
    _summary(everything, engine, out / "summary.md")
    print(f"wrote {out / 'results.xml'} and {out / 'summary.md'}")
    return 1 if any(o["outcome"] in ("failed", "xpassed") for f in everything.values() for o in f) else 0


def _run_file(tests: Path, file: str, engine: str, args: argparse.Namespace) -> list[Outcome]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    results = (CACHE / f"{engine}-{file.replace('/', '-')}.jsonl").resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        results.unlink(missing_ok=True)
    done = results.with_suffix(".done")  # frozen: workers that replace a crashed one must collect the same tests
    done.write_text("\n".join(o["nodeid"] for o in _read(results)))
    environment = dict(
        os.environ,
        SPIRAL_FALLBACK="error",
        PYTORCH_TESTING_DEVICE_ONLY_FOR="privateuse1" if args.device == "spiral" else args.device,
        PYTORCH_TEST_WITH_SLOW="1",
        SPIRAL_UPSTREAM_RESULTS=str(results),
        SPIRAL_UPSTREAM_ENGINE=engine,
        SPIRAL_UPSTREAM_BYPASS="1" if args.bypass else "",
        SPIRAL_UPSTREAM_DEVICE=args.device,
        PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    if args.engine:
        environment["SPIRAL_ENGINE"] = args.engine
    command = [
        sys.executable, "-m", "pytest", file, "-q", "-p", "torch_spiral.testing.upstream_plugin",
        "-n", str(args.workers), "--max-worker-restart", "10000",
        "--timeout", str(args.timeout), "--timeout-method", "thread",
        "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tests), *(["-k", args.k] if args.k else []),
    ]  # fmt: skip
    log = results.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tests, env=environment, stdout=output, stderr=subprocess.STDOUT)
        bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with bar:
            task = bar.add_task(file, total=None)
            while process.poll() is None:
                time.sleep(0.5)
                total = results.with_suffix(".total")
                bar.update(
                    task,
                    completed=len(_read(results)),
                    total=int(total.read_text()) + len(done.read_text().split()) if total.exists() else None,
                )
    if process.returncode not in (0, 1, 5):  # 5: nothing collected
        print(f"{file}: pytest ended with {process.returncode}, see {log}", file=sys.stderr)
        return [*_read(results), Outcome(nodeid=file, outcome="failed", seconds=0, message=f"see {log}")]
    return _read(results)


def _read(path: Path) -> list[Outcome]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def expected_names(engine: str, device: str) -> dict[str, str]:
    """Upstream test names ("test_out_linalg_svd_spiral_float32", "TestTorch::test_x_spiral") with their reasons."""
    names = {}
    for (op, check, dtype, e), expectation in ledger.load().items():
        if e == engine and check.startswith("test_"):
            if dtype == "none":
                names[f"{op}::{check}_{device}"] = expectation.reason
            else:
                names[f"{check}_{op.replace('.', '_')}_{device}_{dtype}"] = expectation.reason
    return names


def _junit(everything: dict[str, list[Outcome]], path: Path) -> None:
    root = ElementTree.Element("testsuites")
    for file, outcomes in everything.items():
        counts = Counter(o["outcome"] for o in outcomes)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=file,
            tests=str(len(outcomes)),
            failures=str(counts["failed"] + counts["xpassed"]),
            skipped=str(counts["skipped"] + counts["xfailed"]),
        )
        for o in outcomes:
            owner, _, name = o["nodeid"].rpartition("::")
            case = ElementTree.SubElement(suite, "testcase", classname=owner, name=name, time=f"{o['seconds']:.3f}")
            if o["outcome"] in ("failed", "xpassed"):
                ElementTree.SubElement(case, "failure", message=_xml(o["message"]))
            elif o["outcome"] != "passed":
                ElementTree.SubElement(case, "skipped", message=_xml(o["message"]))
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _xml(text: str) -> str:
    return "".join(c for c in text if c >= " " or c in "\n\t")[:2000]


def _cause(outcome: Outcome) -> str:
    """The line of a failure's text that says what was wrong: pytest's first that starts with E."""
    lines = outcome["message"].splitlines() or [outcome["outcome"]]
    said = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return (said or lines[-1:])[0][:160]


def _summary(everything: dict[str, list[Outcome]], engine: str, path: Path) -> None:
    kinds = ("passed", "failed", "skipped", "xfailed", "xpassed")
    lines = [f"# Upstream test files on {engine}", "", "| file | " + " | ".join(kinds) + " |", "|---" * 6 + "|"]
    causes: dict[str, list[str]] = defaultdict(list)
    for file, outcomes in everything.items():
        counts = Counter(o["outcome"] for o in outcomes)
        lines.append(f"| {file} | " + " | ".join(str(counts[k]) for k in kinds) + " |")
        for o in outcomes:
            if o["outcome"] in ("failed", "xpassed"):
                causes[_cause(o)].append(o["nodeid"])
    lines += ["", "## Failures by message", ""]
    for message, nodes in sorted(causes.items(), key=lambda c: -len(c[1])):
        lines.append(f"- {len(nodes)} times `{message.replace('`', ' ')}`, such as {nodes[0]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
