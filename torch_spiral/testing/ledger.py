"""The ledger of expected failures, tests/upstream/expectations.yaml.

    limit: 3                     # cells below; a test holds it equal, CI refuses a larger one
    rows:
      - op: linalg.svd           # name as `coverage` prints it, with the variant
        checks: [forward]
        dtypes: [float32]
        engines: [opencl, wgpu]
        class: unimplemented     # or: hardware limit, upstream bug, tolerance
        reason: no kernel yet

A cell is (op, check, dtype, engine). Each is a strict expected failure: where it passes, the run is red until it goes.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

CLASSES = ("unimplemented", "hardware limit", "upstream bug", "tolerance")
PATH = Path(__file__).resolve().parents[2] / "tests" / "upstream" / "expectations.yaml"

Cell = tuple[str, str, str, str]  # op, check, dtype ("float32"), engine


@dataclass(frozen=True)
class Expectation:
    category: str
    reason: str


def load(path: Path = PATH) -> dict[Cell, Expectation]:
    """The expected failures by cell. Raises ValueError for a malformed or contradictory ledger."""
    return parse(path.read_text(encoding="utf-8"))[1]


def parse(text: str) -> tuple[int, dict[Cell, Expectation]]:
    """The limit and the cells of a ledger's text."""
    import yaml

    data = yaml.safe_load(text)
    cells: dict[Cell, Expectation] = {}
    for row in data["rows"]:
        missing = {"op", "checks", "dtypes", "engines", "class", "reason"} ^ set(row)
        if missing:
            raise ValueError(f"ledger row {row}: missing or unknown {sorted(missing)}")
        if row["class"] not in CLASSES:
            raise ValueError(f"ledger row {row}: class is one of {CLASSES}")
        for cell in product([row["op"]], row["checks"], row["dtypes"], row["engines"]):
            if cell in cells:
                raise ValueError(f"ledger has {cell} twice")
            cells[cell] = Expectation(row["class"], row["reason"])
    return int(data["limit"]), cells


def dump(cells: dict[Cell, Expectation]) -> str:
    """A ledger's text; cells that share op, class and reason share a row."""
    import yaml

    # Merge in two passes: dtypes and engines of equal sets, then checks.
    merged: dict[tuple[str, str, str, str], set[tuple[str, str]]] = {}
    for (op, check, dtype, engine), e in cells.items():
        merged.setdefault((op, check, e.category, e.reason), set()).add((dtype, engine))
    rows: dict[tuple, list[str]] = {}
    for (op, check, category, reason), pairs in merged.items():
        by_dtypes: dict[tuple[str, ...], list[str]] = {}
        for engine in sorted({e for _, e in pairs}):
            by_dtypes.setdefault(tuple(sorted(d for d, e in pairs if e == engine)), []).append(engine)
        for dtypes, engines in by_dtypes.items():
            rows.setdefault((op, dtypes, tuple(engines), category, reason), []).append(check)
    listed = [
        {
            "op": op,
            "checks": sorted(checks),
            "dtypes": list(dtypes),
            "engines": list(engines),
            "class": category,
            "reason": reason,
        }
        for (op, dtypes, engines, category, reason), checks in sorted(rows.items())
    ]
    head = "# Expected failures of the upstream op tests; torch_spiral/testing/ledger.py says how it is read.\n"
    return head + yaml.safe_dump(
        {"limit": len(cells), "rows": listed}, sort_keys=False, width=118, default_flow_style=None, allow_unicode=True
    )


def check(against: str | None, path: Path = PATH) -> list[str]:
    """What is wrong with the ledger: its count differs from its limit, or it grew since a git revision."""
    limit, cells = parse(path.read_text(encoding="utf-8"))
    wrong = []
    if len(cells) != limit:
        wrong.append(f"the ledger has {len(cells)} cells and says limit: {limit}")
    if against:
        relative = path.relative_to(path.parents[2]).as_posix()
        shown = subprocess.run(
            ["git", "show", f"{against}:{relative}"], cwd=path.parent, capture_output=True, text=True, check=False
        )
        if shown.returncode == 0 and parse(shown.stdout)[0] < limit:
            wrong.append(f"the ledger grew from {parse(shown.stdout)[0]} to {limit} cells since {against}")
    return wrong
