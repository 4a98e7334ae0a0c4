"""Schedules of products and attention on a GPU against torch's CUDA backend: what the defaults were chosen from.

python -m benchmarks.gpu_schedules --engine cuda        also opencl, wgpu
python -m benchmarks.gpu_schedules --engine cuda --compile 3/8     compiles an eighth of the kernels only, to fill the caches

A line for each schedule: median milliseconds of 5 rounds, TFLOP/s, torch's time over ours, and the normwise difference.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--engine", default="cuda", choices=["cuda", "opencl", "wgpu"])
parser.add_argument("--compile", metavar="I/N", help="run every N-th case once, from the I-th on, and time nothing")

F16, F32 = "bfloat16", "float32"


def cases(engine: str) -> Iterator[tuple[tuple[Any, ...], str, dict[str, Any]]]:
    """(work, label, what is replaced in the module of the schedules). work: ("mm", m, n, k, dtype, B transposed) or
    ("attention", dtype, head)."""
    from torch_spiral.kernels.block import attention as block_attention
    from torch_spiral.kernels.block import gemm as block
    from torch_spiral.kernels.simt import attention as simt_attention
    from torch_spiral.kernels.simt import gemm as simt

    if engine == "cuda":
        shapes = [
            (m, n, k, w, st, p)
            for m, n, k, w, st in (
                (128, 256, 64, 8, 3),
                (128, 128, 64, 4, 3),
                (128, 128, 64, 8, 4),
                (64, 128, 64, 4, 4),
            )
            for p in (False, True)
        ]
        for size in (1024, 1536, 2048, 3072, 4096, 8192):
            for turned in (False, True):
                work = ("mm", size, size, size, F16, turned)
                yield work, "default", {}
                for m, n, k, warps, stages, persistent in shapes:
                    s = block.Schedule(m, n, k, warps, stages, persistent=persistent)
                    yield work, str(s), {"schedule": _always(s), "splits": _always(1)}
        for product in ((1, 4096, 4096), (16, 4096, 4096), (128, 768, 3072), (4096, 1000, 1000)):
            yield ("mm", *product, F16, True), "default", {}
        yield ("mm", 4096, 4096, 4096, F32, True), "default", {}
        for head in (64, 128):
            for queries, keys, warps, stages, registers in (
                (64, 64, 4, 3, 128),
                (64, 64, 4, 3, 0),
                (64, 32, 4, 3, 96),
                (128, 64, 4, 3, 0),
                (128, 64, 8, 3, 128 if head == 64 else 0),
            ):
                a = block_attention.Schedule(queries, keys, warps, stages, registers)
                yield ("attention", F16, head), str(a), {"forward_schedule": _always(a)}
        yield ("attention", F32, 64), "default", {}
        return
    for size in (1024, 2048, 4096, 8192):
        work = ("mm", size, size, size, F32, False)
        yield work, "default", {}
        for m, n, k, rows, columns, lanes in (
            (128, 128, 16, 8, 8, 8),
            (128, 128, 8, 8, 8, 8),
            (128, 256, 8, 8, 16, 8),
            (64, 128, 16, 4, 8, 8),
            (64, 128, 16, 8, 8, 8),
        ):
            hows: tuple[dict[str, Any], ...] = (
                {},
                {"paired": True},
                {"paired": True, "raster": 4},
                {"paired": True, "slices": 2},
                {"chunk": 32},
            )
            for how in hows:
                t = simt.Schedule(m, n, k, rows, columns, lanes, **{"chunk": 0, **how})
                yield work, t.key, {"default_schedule": _always(t), "default_splits": _always(1)}
    yield ("attention", F32, 64), "default", {}
    for queries, keys, rows, depth in (
        (64, 64, 8, 16),
        (64, 64, 8, 8),
        (64, 32, 4, 32),
        (64, 32, 4, 16),
        (32, 64, 4, 16),
    ):
        for paired in (False, True):
            for resident in (False, True):
                u = simt_attention.Schedule(queries, keys, rows, depth, resident=resident, paired=paired)
                yield ("attention", F32, 64), u.key, {"default_schedule": _always(u)}


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@contextmanager
def replaced(engine: str, kind: str, what: dict[str, Any]) -> Iterator[None]:
    from torch_spiral import _C, lowering
    from torch_spiral.kernels import block, simt

    folder = block if engine == "cuda" else simt
    _C.clear_plans()
    lowering._build.cache_clear()
    with patch.multiple(getattr(folder, "gemm" if kind == "mm" else "attention"), **what):
        yield


def main() -> int:
    args = parser.parse_args()
    os.environ["SPIRAL_ENGINE"], os.environ["SPIRAL_FALLBACK"] = args.engine, "error"
    import torch
    from torch.nn import functional as F

    import torch_spiral  # noqa: F401

    if not torch.cuda.is_available():
        print("this compares with torch's CUDA backend, and there is none here", file=sys.stderr)
        return 2

    def make(work: tuple[Any, ...], device: str) -> tuple[Callable[[], Any], float]:
        torch.manual_seed(0)
        if work[0] == "mm":
            _, m, n, k, dtype, turned = work
            a = torch.randn(m, k, device="cuda", dtype=getattr(torch, dtype)).to(device)
            b = torch.randn(*((n, k) if turned else (k, n)), device="cuda", dtype=getattr(torch, dtype)).to(device)
            b = b.t() if turned else b
            return lambda: a @ b, 2.0 * m * n * k
        _, dtype, head = work
        q, k, v = (
            torch.randn(8, 16, 2048, head, device="cuda", dtype=getattr(torch, dtype)).to(device) for _ in range(3)
        )
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 2.0 * 8 * 16 * 2048 * 2048 * head

    def timed(step: Callable[[], Any], synchronize: Callable[[], Any]) -> float:
        for _ in range(3):
            step()
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        calls = max(3, min(300, int(0.03 / (time.perf_counter() - start))))
        rounds = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(calls):
                step()
            synchronize()
            rounds.append((time.perf_counter() - start) / calls)
        return sorted(rounds)[2]

    every = list(cases(args.engine))
    if args.compile:
        first, step = map(int, args.compile.split("/"))
        every = every[first::step]
    theirs: dict[tuple[Any, ...], tuple[float, Any]] = {}
    for work, label, what in every:
        if work not in theirs and not args.compile:
            run, flops = make(work, "cuda")
            theirs[work] = timed(run, torch.cuda.synchronize), run()
            print(
                *work, f"torch {theirs[work][0] * 1e3:.4f} ms {flops / theirs[work][0] / 1e12:.1f} TFLOP/s", flush=True
            )
        try:
            with replaced(args.engine, work[0], what):
                run, flops = make(work, "spiral")
                if args.compile:
                    run().cpu()
                    continue
                ours = timed(run, torch.accelerator.synchronize)
                reference = theirs[work][1].float()
                off = ((run().to("cuda").float() - reference).norm() / reference.norm()).item()
            print(
                f"    {label:32} {ours * 1e3:.4f} ms {flops / ours / 1e12:6.1f} TFLOP/s {theirs[work][0] / ours:.3f}x {off:.0e}",
                flush=True,
            )
        except Exception as error:
            print(f"    {label:32} {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
