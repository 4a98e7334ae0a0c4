"""Writes the generated pages of docs/: python -m docs.generate [coverage] [performance]

coverage.md comes from the results of `python -m torch_spiral.testing coverage`; performance.md and its charts from
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def coverage() -> None:
    from torch_spiral.testing import report

    report.write(DOCS / "coverage.md")
    print("wrote docs/coverage.md")


def _chart(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Bars of how many times faster than the first contender each row is, on a log scale, with the bar that was set for it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "torch_spiral"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.24 * len(rows)), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        (against, ratio), *_ = row["ratio"].items()
        bar = row["bars"].get(against)
        axes.barh(y, ratio - 1, left=1, color="#2a9d8f" if ratio >= (bar or 1) else "#e9a23b", height=0.7)
        if bar:
            axes.plot([bar, bar], [y - 0.4, y + 0.4], color="black", linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote docs/{path.relative_to(DOCS)}")


def _number(x: float) -> str:
    return f"{x:.3g}"


def _page(path: Path) -> list[str]:
    """The section of one results file, and its chart."""
    data = json.loads(path.read_text())
    about, timings, readings = data["about"], data["timings"], data.get("readings", [])
    lines = [f"## {path.stem}", ""]
    where = [about["device"], f"{about['processor']}, {about['cores']} cores", f"torch {about['torch']}"]
    if about.get("cuda"):
        where.append(f"torch CUDA on {about['cuda']}")
    measured = [about, *(r for r in (*timings, *readings) if "commit" in r)]
    commits = dict.fromkeys(r["commit"] + (" (modified)" if r.get("modified") else "") for r in measured)
    lines += [
        " · ".join(where) + f" · commit {', '.join(commits)}",
        f"· load average at the start {about['load_average_at_start']:.1f}",
        "",
        f"`{about['command']}`",
        "",
    ]
    if timings:
        chart = DOCS / "pictures" / f"{path.stem}.svg"
        chart.parent.mkdir(exist_ok=True)
        _chart(chart, f"{about['device']}: times faster than torch", timings)
        against = list(dict.fromkeys(name for t in timings for name in t["ratio"]))
        lines += [f"![times faster than torch](pictures/{chart.name})", ""]
        lines += ["| work | spiral, ms | " + " | ".join(f"× {name} (bar)" for name in against) + " |"]
        lines += ["|---" * (2 + len(against)) + "|"]
        for t in timings:
            cells = []
            for name in against:
                bar = t["bars"].get(name)
                ratio = t["ratio"].get(name)
                cells.append("" if ratio is None else _number(ratio) + (f" ({bar:g})" if bar else ""))
            lines.append(f"| {t['name']} | {_number(t['milliseconds'][t['ours']])} | " + " | ".join(cells) + " |")
        lines.append("")
    if readings:
        lines += ["| reading | value | bound |", "|---|---|---|"]
        for r in readings:
            bound = f"≤ {r['at_most']:g}" if r.get("at_most") else f"≥ {r['at_least']:g}" if r.get("at_least") else ""
            lines.append(f"| {r['name']} | {_number(r['value'])} {r['unit']} | {bound} |")
        lines.append("")
    return lines


def performance() -> None:
    lines = [
        "# Performance",
        "",
        "Written by `python -m docs.generate performance` from benchmarks/results: medians, contenders interleaved in one process.",
        "A ratio is the other's time over ours; the number in brackets is the bar that the project set, the black mark in a chart.",
        "",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        lines += _page(path)
    (DOCS / "performance.md").write_text("\n".join(lines), encoding="utf-8")
    print("wrote docs/performance.md")


PAGES = {"coverage": coverage, "performance": performance}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pages", nargs="*", choices=[*PAGES, []], help="default: all")
    for page in parser.parse_args().pages or PAGES:
        PAGES[page]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
