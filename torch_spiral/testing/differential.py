"""Compares the engines of this machine with each other: the same inputs, the same op, OpenCL against wgpu.

What two independent code generators agree on is likely right where the CPU has no answer or another convention; where
they part, one of them has a bug that the CPU's tolerances may hide. Results must agree as closely as with the CPU, or
both lie as near to float64 as the CPU does. Random ops draw the same numbers on every engine.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch.utils._pytree import tree_leaves, tree_map

from torch_spiral.testing import checks, devices
from torch_spiral.testing.coverage import Result, Runner, Task, matches


def check(item: checks.Item, dtype: torch.dtype, device: torch.device, limit: int | None = None) -> int:
    """Samples on which the engines agree; raises Mismatch where they differ. `device` is the first engine's; an op that an
    engine lacks, or whose errors are the CPU's too, is not compared."""
    others = [d for d in devices.engines().values() if d != device]

    def one(sample: checks.SampleInput) -> bool:
        tree = checks._call(sample)
        run = checks._processed(item, sample)
        torch.manual_seed(0)
        try:
            expected = run(checks.move(tree, device))
        except Exception:
            return False
        theirs = tree_map(lambda v: v.detach().cpu() if isinstance(v, torch.Tensor) else v, expected)
        for other in others:
            torch.manual_seed(0)
            with torch.spiral.device(other):  # type: ignore[attr-defined]
                found = run(checks.move(tree, other))
            checks._like(found, expected)
            if item.name in checks.UNINITIALISED:
                continue
            try:
                checks._close(found, theirs, item.info)
            except AssertionError:
                cpu = run(checks.move(tree, checks.CPU))
                exact = run(checks.move(tree, checks.CPU, torch.float64))
                if not (_good(found, cpu, exact, item) and _good(theirs, cpu, exact, item)):
                    raise
        return True

    return checks._each(item, checks._samples(item, dtype, limit), one)


def _good(result: object, cpu: object, exact: object, item: checks.Item) -> bool:
    return len(tree_leaves(exact)) == len(tree_leaves(result)) and checks._as_good(result, cpu, exact, item.info)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", help="comma-separated names or globs (default: all of op_db)")
    parser.add_argument("--dtype", default="float32", help="comma-separated")
    parser.add_argument("--samples", type=int, help="at most this many samples an op")
    parser.add_argument("--shard", default="0/1", help="i/n: the i-th of n parts")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one op")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 where the engines agree on everything."""
    found = devices.engines()
    if len(found) < 2:
        print(f"two engines are needed, here is {', '.join(found) or 'none'}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    runner = Runner("spiral", None, args.workers, args.timeout, args.samples)
    index, count = (int(x) for x in args.shard.split("/"))
    patterns = args.ops.split(",") if args.ops else ["*"]
    wanted = [
        Task(op, kind, dtype, "differential")
        for op, kind, dtype in runner.listed
        if kind == "op" and dtype in args.dtype.split(",") and matches(op, patterns)
    ]
    wanted = [t for t in wanted if t.hash % count == index]
    counts = {"pass": 0, "n/a": 0}

    def each(result: Result) -> None:
        counts[result.status] = counts.get(result.status, 0) + 1
        if result.status not in ("pass", "n/a"):
            print(f"{result.status.upper()} {result.op} {result.dtype}: {result.message[:300]}", flush=True)

    runner.run(wanted, each)
    runner.close()
    total = sum(counts.values()) - counts["n/a"]
    took = time.perf_counter() - start
    print(f"{' and '.join(found)} agree on {counts['pass']} of {total} ops in {took:.0f} s")
    return 0 if counts["pass"] == total else 1
