"""`python -m torch_spiral.autotune`: searches schedules ahead of time, and looks after the tuning database.

tune     (the default) compares schedules for the shapes of a list, or for what a model asks, and stores what won
show     the decisions of the database
merge    takes over newer decisions from other databases or exported files
export   decisions as text, one JSON object a line
report   an HTML page with plots of what was found

python -m torch_spiral.autotune --engine wgpu --shapes 1024x1024x1024:f32,8x2048x512x64:f16:nt
python -m torch_spiral.autotune --model mymodels:make_bert
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import torch_spiral  # noqa: F401
from torch_spiral import _C
from torch_spiral import device as spiral

from . import Request, database, device_row, templates, tuner
from .model import Roofline, measure

GEMMS = "512x512x512:f32,1024x1024x1024:f32,2048x2048x2048:f32,128x768x768:f32:nt,512x3072x768:f32:nt,64x64x4096:f32"


def terminal() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200)


def first_device(engine: str | None) -> int:
    for i in range(spiral.device_count()):
        if engine in (None, _C.device_properties(i)["engine"]):
            return i
    raise SystemExit(f"there is no device of the engine {engine or 'any'}: `python -m torch_spiral` says why")


def gemm_call(text: str, device: torch.device) -> Callable[[], Any]:
    """MxNxK or BxMxNxK, then :dtype, then :layouts of a and b ("n" contiguous, "t" transposed; a Linear's are nt)."""
    shape, dtype, layouts, *_ = (*text.split(":"), "f32", "nn") if ":" not in text else (*text.split(":"), "nn")
    sizes = [int(n) for n in shape.split("x")]
    batch, m, n, k = sizes if len(sizes) == 4 else (1, *sizes)
    kind = templates.TORCH[dtype]
    if len(layouts) != 2 or set(layouts) - set("nt"):
        raise ValueError(f"{layouts!r} are no layouts of a and b")

    def operand(rows: int, columns: int, layout: str) -> torch.Tensor:
        if layout == "n":
            return torch.zeros(batch, rows, columns, dtype=kind, device=device)
        return torch.zeros(batch, columns, rows, dtype=kind, device=device).transpose(1, 2)

    def call() -> Any:
        a, b = operand(m, k, layouts[0]), operand(k, n, layouts[1])
        return a[0] @ b[0] if batch == 1 else a @ b

    return call


def attention_call(text: str, device: torch.device) -> Callable[[], Any]:
    """attention/BxHxTxD, then :dtype, then :causal or :full."""
    shape, dtype, causal = (*text.removeprefix("attention/").split(":"), "full")[:3]
    sizes, kind = [int(n) for n in shape.split("x")], templates.TORCH[dtype]
    if len(sizes) != 4 or causal not in ("causal", "full"):
        raise ValueError("four sizes are wanted, then causal or full")

    def call() -> Any:
        q, k, v = (torch.zeros(sizes, dtype=kind, device=device) for _ in range(3))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal == "causal")

    return call


def conv_call(text: str, device: torch.device) -> Callable[[], Any]:
    """conv/NxCxHxW/OxKxS, then :dtype: O channels of K x K taps at stride S, padded to keep the size."""
    shape, dtype = text.split(":")
    sizes, (o, taps, stride) = ([int(n) for n in part.split("x")] for part in shape.split("/")[1:])
    kind = templates.TORCH[dtype]

    def call() -> Any:
        x = torch.zeros(sizes, dtype=kind, device=device)
        w = torch.zeros(o, sizes[1], taps, taps, dtype=kind, device=device)
        return torch.nn.functional.conv2d(x, w, None, stride, taps // 2)

    return call


def rows_call(text: str, device: torch.device) -> Callable[[], Any]:
    """softmax/RxD, log_softmax/RxD or sum/RxD, then :dtype: of R rows of D."""
    what, _, rest = text.partition("/")
    shape, dtype = rest.split(":")
    sizes, kind = [int(n) for n in shape.split("x")], templates.TORCH[dtype]
    return lambda: templates.Rows.CALLS[what](torch.zeros(sizes, dtype=kind, device=device))


def model_call(text: str, device: torch.device) -> Callable[[], Any]:
    """ "module:function" with function() -> (model, inputs): one call of the model."""
    module, _, name = text.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--model {text}: {error}") from error
    model, inputs = make()
    model = model.to(device).eval()
    inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
    return lambda: model(*inputs)


def gather(args: argparse.Namespace, device: int) -> list[Request]:
    """What the shapes and models ask, each key once."""
    where = torch.device("spiral", device)
    texts = (args.shapes or ("" if args.model else GEMMS)).split(",")
    kinds = {
        "attention": attention_call,
        "conv": conv_call,
        "softmax": rows_call,
        "log_softmax": rows_call,
        "sum": rows_call,
    }
    calls = []
    for t in filter(None, texts):
        kind = kinds.get(t.split("/")[0], gemm_call)
        try:
            calls.append(kind(t, where))
        except (ValueError, KeyError) as error:
            wanted = " ".join((kind.__doc__ or "").split())
            raise SystemExit(f"--shapes: {t!r} is not understood ({error}). It is {wanted}") from error
    calls += [model_call(text, where) for text in args.model]
    found: dict[tuple[str, str], Request] = {}
    with torch.no_grad(), spiral.device(where):
        for call in calls:
            for r in tuner.requests_of(call):
                found.setdefault((r.template, r.key), r)
    return list(found.values())


def compile_ahead(args: argparse.Namespace, device: int, requests: list[Request], part: int, parts: int) -> None:
    """Runs every parts-th candidate once, so that its kernels are in the disk caches."""
    search = tuner.Tuner(device, None, Roofline(1e11, {"f32": 1e12}), args.limit)
    work = []
    for r in requests:
        problem = templates.template(r.template).problem(device, r.key, r.sizes)
        for p in (problem, templates.template(r.template).ragged(problem)):
            work += [(p, s) for s in [r.default, *search.select(r, problem)[0]]]
    with torch.no_grad(), spiral.device(device):
        for problem, schedule in work[part::parts]:
            try:
                tuner.Arm(problem, schedule).run()
                spiral.synchronize()
            except Exception as error:  # noqa: PERF203  (one that fails must not stop the others)
                print(f"{schedule}: {error}", file=sys.stderr)


def tune(args: argparse.Namespace) -> int:
    console = terminal()
    device = args.device if args.device is not None else first_device(args.engine)
    requests = gather(args, device)
    if args.part is not None:
        compile_ahead(args, device, requests, *map(int, args.part.split("/")))
        return 0
    store = database.Database(args.database or database.default_path())
    row = device_row(device)
    console.print(f"[bold]{row.device}[/] · {len(requests)} keys · {store.path}")
    if not requests:
        console.print(
            "these calls ask for no schedule that can be chosen on this device (docs/tuning.md says what can)"
        )
        return 0
    if args.jobs > 1:
        start = time.perf_counter()
        command = [sys.executable, "-m", "torch_spiral.autotune", *args.command_line, "--device", str(device)]
        running = [
            subprocess.Popen([*command, "--part", f"{i}/{args.jobs}"], stderr=subprocess.DEVNULL)
            for i in range(args.jobs)
        ]
        for process in running:
            process.wait()
        console.print(f"compiled ahead by {args.jobs} processes in {time.perf_counter() - start:.0f} s")
    dtypes = tuple(sorted({r.key.split()[0] for r in requests if r.key.split()[0] in templates.TORCH}))
    roofline = measure(device, dtypes)
    rates = ", ".join(f"{v / 1e12:.3g} TFLOP/s {k}" for k, v in sorted(roofline.flops.items()))
    console.print(f"roofline: {roofline.bandwidth / 1e9:.4g} GB/s, {rates}")
    search = tuner.Tuner(device, store, roofline, args.limit, args.seconds)
    deadline = time.perf_counter() + args.budget
    table = Table("key", "sizes", "chosen", "built in", "ms", "gain", "p")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    better = searched = 0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("keys", total=len(requests))
        for r in requests:
            if time.perf_counter() > deadline:
                console.print("[yellow]the budget is spent; the remaining keys keep what they had")
                break
            try:
                result = search.search(r, lambda text, key=r.key: bar.update(task, description=f"{key}: {text}"[:100]))  # type: ignore[misc]
            except (tuner.Cheap, NotImplementedError) as error:
                console.print(f"{r.template} {r.key}: not searched ({error})", markup=False)
            else:
                d = result.decision
                searched += 1
                better += d.speedup >= 1.1
                gain = f"{d.speedup:.2f}x" if d.schedule != d.fallback else "–"
                table.add_row(
                    f"{d.template} {d.key}",
                    d.sizes,
                    d.schedule,
                    d.fallback,
                    f"{d.milliseconds:.4g}",
                    gain,
                    f"{d.p:.1g}",
                )
            bar.advance(task)
    console.print(table)
    console.print(f"{searched} keys searched, {better} of them at least 1.10x faster than the built-in choice")
    if args.report:
        from .report import write

        console.print(f"wrote {write(store, Path(args.report))}")
    return 0


def show(args: argparse.Namespace) -> int:
    store = database.Database(args.database or database.default_path(), readonly=True)
    decisions = store.decisions() if not args.shipped else database.shipped()[1]
    for device in dict.fromkeys(d.device for d in decisions):
        table = Table("key", "sizes", "schedule", "built in", "ms", "gain", "wins", "p", title=device)
        for d in decisions:
            if d.device == device:
                gain = f"{d.speedup:.2f}x" if d.schedule != d.fallback else "–"
                table.add_row(
                    f"{d.template} {d.key}", d.sizes, d.schedule, d.fallback, f"{d.milliseconds:.4g}", gain, f"{d.wins}/{d.rounds}", f"{d.p:.1g}"
                )  # fmt: skip
        terminal().print(table)
    return 0


def merge(args: argparse.Namespace) -> int:
    store = database.Database(args.database or database.default_path())
    for path in args.files:
        print(f"{path}: {store.merge(*database.read(path))} decisions taken over")
    return 0


def export(args: argparse.Namespace) -> int:
    text = database.export(database.Database(args.database or database.default_path(), readonly=True))
    if args.files:
        Path(args.files[0]).write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def report(args: argparse.Namespace) -> int:
    from .report import write

    store = database.Database(args.database or database.default_path(), readonly=True)
    print(write(store, Path(args.files[0] if args.files else "tuning-report")))
    return 0


COMMANDS = {"tune": tune, "show": show, "merge": merge, "export": export, "report": report}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torch_spiral.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", default="tune", choices=sorted(COMMANDS))
    parser.add_argument("files", nargs="*", help="of merge, export and report")
    parser.add_argument("--engine", help="opencl, wgpu or cuda: its first device")
    parser.add_argument("--device", type=int, help="a device's index instead")
    parser.add_argument("--shapes", help=f"matrix products, {gemm_call.__doc__} Default: {GEMMS}")
    parser.add_argument("--model", action="append", default=[], help=model_call.__doc__)
    parser.add_argument("--database", help="default: $SPIRAL_TUNE_DB, or tuning.sqlite in the cache folder")
    parser.add_argument("--limit", type=int, default=16, help="candidates measured for a key")
    parser.add_argument("--seconds", type=float, default=30.0, help="for one key")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile candidates ahead")
    parser.add_argument("--report", help="folder for a report when done")
    parser.add_argument("--shipped", action="store_true", help="show: the defaults of the package")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.command_line = [a for a in arguments if a != args.command]
    if (args.report or args.command == "report") and importlib.util.find_spec("matplotlib") is None:
        parser.error("a report's plots need matplotlib: pip install 'torch_spiral[report]'")
    try:
        return COMMANDS[args.command](args)
    except (OSError, database.DamagedDatabase, database.NotExported) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
