"""`python -m torch_spiral`: which engines and devices there are, why one is missing, and a self-test of each device with timings.
--list leaves the self-test out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import torch_spiral
from torch_spiral import _C
from torch_spiral import device as spiral

KINDS = {"discrete_gpu": "GPU", "integrated_gpu": "integrated GPU", "cpu": "CPU", "software": "software"}


def devices_table() -> Table:
    table = Table(title="Devices")
    for column in ("device", "engine", "name", "kind", "memory", "kernels", "float16", "float64", "driver"):
        table.add_column(column, no_wrap=column in ("device", "engine"), overflow="fold")
    for i in range(spiral.device_count()):
        p = spiral.get_device_properties(i)
        table.add_row(
            f"spiral:{i}",
            p.engine,
            p.name,
            KINDS.get(p.type, p.type),
            _C.format_bytes(p.total_memory),
            f"{p.language}, {p.schedule_class}",
            "yes" if p.float16 else "stored",
            "yes" if p.float64 else "stored",
            p.driver or p.api_version,
        )
    return table


def engines_table() -> Table:
    table = Table(title="Engines")
    table.add_column("engine")
    table.add_column("devices", justify="right")
    table.add_column("library", overflow="fold")
    table.add_column("why not more", overflow="fold")
    for report in spiral.engines():
        table.add_row(
            report["engine"],
            str(report["devices"]),
            report["library"] or ("system" if report["devices"] else ""),
            report["why"],
        )
    return table


def _copies(device: str) -> None:
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.int64):
        x = torch.arange(100003).to(dtype)
        if not torch.equal(x.to(device).clone().cpu(), x):
            raise AssertionError(f"a {dtype} tensor came back changed")


def _pointwise(device: str) -> None:
    x = torch.linspace(-4, 4, 100003)
    y = x.to(device)
    torch.testing.assert_close(((y * 2 + 1).tanh() * (y > 0)).cpu(), (x * 2 + 1).tanh() * (x > 0))


def _reduction(device: str) -> None:
    x = torch.randn(257, 1031, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.to(device).softmax(1).sum(0).cpu(), x.softmax(1).sum(0))


def _matmul(device: str) -> None:
    a, b = torch.randn(2, 200, 200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((a.to(device) @ b.to(device)).cpu(), a @ b, rtol=1e-4, atol=1e-4)


def _backward(device: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    x, target = torch.randn(16, 20), torch.randint(5, (16,))
    gradients = []
    for place in ("cpu", device):
        model = model.to(place)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x.to(place)), target.to(place)).backward()
        gradients.append(
            [p.grad.cpu().clone() for p in model.parameters() if p.grad is not None]
        )  # a move takes gradients along
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


CHECKS: dict[str, Callable[[str], None]] = {
    "copies": _copies,
    "pointwise": _pointwise,
    "reduction": _reduction,
    "matmul": _matmul,
    "backward": _backward,
}


def _seconds(work: Callable[[], object], index: int, repeat: int = 5) -> float:
    """The best of a few runs, after one that compiles."""
    best = float("inf")
    for _ in range(repeat + 1):
        spiral.synchronize(index)
        start = time.perf_counter()
        work()
        spiral.synchronize(index)
        best = min(best, time.perf_counter() - start)
    return best


def _timings(index: int) -> dict[str, str]:
    device = f"spiral:{index}"
    host = torch.empty(1 << 24)
    x = host.to(device)
    a = torch.ones(1024, 1024, device=device)
    small = torch.ones(10, device=device)
    gigabytes = host.nbytes / 1e9
    return {
        "to device": f"{gigabytes / _seconds(lambda: x.copy_(host), index):.1f} GB/s",
        "from device": f"{gigabytes / _seconds(lambda: host.copy_(x), index):.1f} GB/s",
        "add": f"{2 * gigabytes / _seconds(lambda: x.add_(1), index):.1f} GB/s",
        "matmul 1024": f"{2 * 1024**3 / 1e9 / _seconds(lambda: a @ a, index):.0f} GFLOP/s",
        "launch": f"{_seconds(lambda: [small.add_(1) for _ in range(1000)], index) * 1e3:.1f} µs",
    }


def self_test(console: Console) -> bool:
    """Runs every check on every device and prints the outcome; whether all passed."""
    table = Table(title="Self-test")
    table.add_column("device")
    for name in CHECKS:
        table.add_column(name)
    failures: list[str] = []
    timings: dict[str, dict[str, str]] = {}
    for i in range(spiral.device_count()):
        row = [f"spiral:{i}"]
        for name, check in CHECKS.items():
            with console.status(f"spiral:{i}: {name}"):
                start = time.perf_counter()
                try:
                    check(f"spiral:{i}")
                    row.append(f"[green]ok[/] {time.perf_counter() - start:.2f} s")
                except Exception as error:
                    row.append("[red]failed[/]")
                    failures.append(f"spiral:{i} {name}: {error}")
        table.add_row(*row)
        with console.status(f"spiral:{i}: timings"):
            try:
                timings[f"spiral:{i}"] = _timings(i)
            except Exception as error:
                failures.append(f"spiral:{i} timings: {error}")
    console.print(table)
    if timings:
        speeds = Table(title="Timings (best of 5)")
        speeds.add_column("device")
        for name in next(iter(timings.values())):
            speeds.add_column(name, justify="right")
        for name, values in timings.items():
            speeds.add_row(name, *values.values())
        console.print(speeds)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_spiral", description=__doc__)
    parser.add_argument("--list", action="store_true", help="check and time nothing")
    arguments = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=160)  # in a file or a pipe no line is cut
    console.print(f"torch_spiral {torch_spiral.__version__}, torch {torch.__version__}")
    console.print(engines_table())
    if not spiral.is_available():
        console.print("No device is available.", style="red")
        return 1
    console.print(devices_table())
    return 0 if arguments.list or self_test(console) else 1


if __name__ == "__main__":
    sys.exit(main())
