"""A stratified part of upstream's op, module and optimizer tables, on every engine, with the ledger held strictly.

`python -m torch_spiral.testing coverage --all` runs the whole table; coverage.stratum says which part is here.
"""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("SPIRAL_FALLBACK", "error")

from torch_spiral.testing import checks, coverage, ledger
from torch_spiral.testing.devices import engines, fallbacks

ITEMS = checks.items()
EXPECTED = ledger.load()
ENGINES = engines()
LISTED = [(i.name, i.kind, str(d).removeprefix("torch.")) for i in ITEMS.values() for d in i.dtypes]
TASKS = list(coverage.tasks(LISTED))


def cells() -> list:
    if not ENGINES:
        return [pytest.param("", None, marks=pytest.mark.skip(reason="no spiral device"))]
    out = []
    for engine in ENGINES:
        for t in (t for t in TASKS if coverage.stratum(t, engine)):
            row = EXPECTED.get((t.op, t.check, t.dtype, engine))
            marks = [pytest.mark.xfail(reason=f"{row.category}: {row.reason}", strict=True)] if row else []
            out.append(pytest.param(engine, t, marks=marks, id=f"{engine}-{t.op}-{t.dtype}-{t.check}"))
    return out


@pytest.mark.parametrize(("engine", "task"), cells())
def test_op(engine: str, task: coverage.Task) -> None:
    item, before = ITEMS[task.op], fallbacks()
    check = checks.CHECKS[item.kind][task.check]
    if not check(item, getattr(torch, task.dtype), ENGINES[engine], coverage.tier_samples(engine)):
        pytest.skip("does not apply: upstream has no such samples, or the CPU cannot run them")
    torch.spiral.synchronize(ENGINES[engine])
    assert fallbacks() == before, "an op fell back to the CPU"


def test_ledger_has_the_size_that_it_says() -> None:
    assert ledger.check(None) == []


def test_ledger_names_what_exists() -> None:
    known = {(t.op, t.check, t.dtype) for t in coverage.tasks(LISTED)}
    unknown = [c for c in EXPECTED if c[:3] not in known and not c[1].startswith("test_")]
    assert not unknown
