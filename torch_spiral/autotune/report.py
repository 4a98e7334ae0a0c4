"""The tuner's report: an HTML page with a roofline and a comparison of chosen and built-in schedules for every device of a database."""

from __future__ import annotations

import html
from collections import Counter
from pathlib import Path

from . import database as db
from .templates import template


def work(d: db.Decision) -> tuple[float, float, str]:
    """(operations, least bytes, dtype) of a decision's call."""
    sizes = tuple(map(int, d.sizes.split("x")))
    dtype = d.key.split()[0]
    flops, moved = template(d.template).work(d.key, sizes)
    return flops, moved, dtype


def _roofline(row: db.DeviceRow, decisions: list[db.Decision], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    points = [(d, f, b, t) for d in decisions for f, b, t in [work(d)] if f]  # those of reductions are not counted
    intensities = [f / b for _, f, b, _ in points]
    ridges = [peak / (row.bandwidth or 1) for peak in row.flops.values()]
    low, high = min([*intensities, *ridges], default=1) / 4, max([*intensities, *ridges], default=100) * 4
    for i, (dtype, peak) in enumerate(sorted(row.flops.items())):
        ridge = peak / (row.bandwidth or 1)
        axes.plot(
            [low, ridge, high],
            [low * (row.bandwidth or 1), peak, peak],
            color=f"C{i}",
            label=f"{dtype}: {peak / 1e12:.3g} TFLOP/s",
        )
        ours = [
            (f / b, f / (d.milliseconds * 1e-3), f / (d.fallback_milliseconds * 1e-3))
            for d, f, b, t in points
            if t == dtype
        ]
        if ours:
            x, y, before = zip(*ours, strict=True)
            axes.vlines(x, before, y, color=f"C{i}", alpha=0.5)
            axes.scatter(x, y, color=f"C{i}", marker="o", s=28, label=f"{dtype}, chosen")
            axes.scatter(x, before, facecolors="none", edgecolors=f"C{i}", marker="o", s=28, label=f"{dtype}, built in")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second", title=row.device)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _gains(decisions: list[db.Decision], path: Path) -> None:
    from matplotlib.figure import Figure

    decisions = sorted(decisions, key=lambda d: d.speedup)
    figure = Figure(figsize=(7.5, 1.2 + 0.28 * len(decisions)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(decisions))
    axes.barh(
        places, [d.speedup for d in decisions], color=["C0" if d.schedule != d.fallback else "0.8" for d in decisions]
    )
    axes.axvline(1.0, color="black", linewidth=0.8)
    labels = [f"{d.template} {d.sizes} {d.key.split()[0]}" for d in decisions]
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set(xlabel="time of the built-in schedule / time of the chosen one")
    figure.savefig(path)


def write(database: db.Database, folder: Path) -> Path:
    """Writes index.html and its plots (SVG); the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["<!doctype html><meta charset='utf-8'><title>torch_spiral: tuning report</title>",
             "<style>body{font:14px sans-serif;max-width:70em;margin:2em auto}td,th{padding:2px 8px;text-align:left}"
             "td.n{text-align:right}tr:nth-child(even){background:#f4f4f4}</style><h1>Tuning report</h1>"]  # fmt: skip
    for i, row in enumerate(database.devices()):
        decisions = database.decisions(device=row.device)
        if not decisions:
            continue
        _roofline(row, decisions, folder / f"roofline-{i}.svg")
        _gains(decisions, folder / f"gains-{i}.svg")
        verdicts = Counter(t.verdict for t in database.trials(device=row.device))
        better = sum(d.speedup >= 1.1 for d in decisions)
        parts.append(
            f"<h2>{html.escape(row.device)}</h2><p>{len(decisions)} keys, {better} at least 1.10× faster than built in. Candidates: "
            + ", ".join(f"{n} {'built in' if v == 'reference' else v}" for v, n in verdicts.most_common())
            + ". The roofline has what multiplies; the last column of the table is the share of it, or of the copy rate, that was reached."
            + f"</p><img src='roofline-{i}.svg'><img src='gains-{i}.svg'><table><tr><th>key<th>sizes<th>chosen<th>built in<th>ms<th>ms, built in"
            "<th>gain<th>rounds won<th>p<th>of the roofline</tr>"
        )
        for d in decisions:
            flops, moved, dtype = work(d)
            seconds = d.milliseconds * 1e-3
            least = max(flops / row.flops.get(dtype, float("inf")), moved / (row.bandwidth or float("inf")))
            cells = [f"{d.template} {d.key}", d.sizes, d.schedule, d.fallback]
            numbers = [
                f"{d.milliseconds:.4g}",
                f"{d.fallback_milliseconds:.4g}",
                f"{d.speedup:.3f}",
                f"{d.wins}/{d.rounds}",
                f"{d.p:.1g}",
                f"{least / seconds:.0%}",
            ]
            parts.append(
                "<tr>"
                + "".join(f"<td>{html.escape(c)}" for c in cells)
                + "".join(f"<td class=n>{n}" for n in numbers)
                + "</tr>"
            )
        parts.append("</table>")
    page = folder / "index.html"
    page.write_text("\n".join(parts))
    return page
