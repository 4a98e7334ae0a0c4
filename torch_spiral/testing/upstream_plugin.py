"""The pytest plugin with which upstream's test files run on spiral. Loaded first: it names the backend."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from torch_spiral.testing.devices import compare_with_cpu, spiral_available

RESULTS = Path(os.environ["SPIRAL_UPSTREAM_RESULTS"])
ENGINE, DEVICE = os.environ["SPIRAL_UPSTREAM_ENGINE"], os.environ["SPIRAL_UPSTREAM_DEVICE"]

if DEVICE == "spiral" and not spiral_available():
    raise pytest.UsageError("no spiral device here: `python -m torch_spiral` says what is missing")
compare_with_cpu()

from torch.testing._internal.common_device_type import PrivateUse1TestBase  # noqa: E402

from torch_spiral.testing.upstream import expected_names  # noqa: E402

if os.environ["SPIRAL_UPSTREAM_BYPASS"]:
    PrivateUse1TestBase.bypass_device_restrictions = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(RESULTS.with_suffix(".done").read_text().splitlines())
    expected = expected_names(ENGINE, DEVICE)
    kept = []
    for item in items:
        if item.nodeid in done:
            continue
        owner = (item.parent.name if item.parent else "").removesuffix(DEVICE.upper()).removesuffix("PRIVATEUSE1")
        reason = expected.get(item.name) or expected.get(f"{owner}::{item.name}")
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        kept.append(item)
    items[:] = kept


def pytest_runtest_teardown() -> None:
    """What a kernel reports late is this test's error, not the next one's."""
    torch.get_device_module(DEVICE).synchronize()


def pytest_xdist_node_collection_finished(node: object, ids: list[str]) -> None:
    RESULTS.with_suffix(".total").write_text(str(len(ids)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the controller writes, so a crash of a worker is recorded too
        return
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed") and not report.failed:
        return
    expected = hasattr(report, "wasxfail")
    outcome = ("xfailed" if report.skipped else "xpassed") if expected else str(report.outcome)
    text = str(report.longrepr or "").strip()
    line = {"nodeid": report.nodeid, "outcome": outcome, "seconds": report.duration, "message": text[-1500:]}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
