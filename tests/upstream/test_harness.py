"""The harness finds what it is there to find: wrong results, crashes, a ledger that grew. Needs no spiral device."""

from __future__ import annotations

import functools
import json
import operator
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_spiral.testing import checks, coverage, ledger, randomness, upstream

CPU = torch.device("cpu")
ITEMS = checks.items()


class Wrong:
    """An op that misbehaves in its second call: the device's, as the first sample runs on the CPU first."""

    def __init__(self, info, spoil) -> None:
        self.info, self.spoil, self.calls = info, spoil, 0

    def __getattr__(self, name):
        return getattr(self.info, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        result = self.info(*args, **kwargs)
        return self.spoil(result) if self.calls == 2 else result


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r + 1e-2,
        lambda r: torch.where(torch.arange(r.numel()).reshape(r.shape) == 0, torch.nan, r),
        lambda r: r.double(),
        lambda r: r.unsqueeze(0),
        lambda r: (r, r),
    ],
    ids=["value", "nan", "dtype", "shape", "structure"],
)
@pytest.mark.parametrize("name", ["add", "mm", "softmax", "sum"])
def test_a_wrong_result_is_found(name: str, spoil) -> None:
    item = replace(ITEMS[name], info=Wrong(ITEMS[name].info, spoil))
    with pytest.raises(checks.Mismatch):
        checks.forward(item, torch.float32, CPU)


def test_a_right_result_passes_every_check() -> None:
    for name in (
        "add",
        "mm",
        "softmax",
        "sort",
        "nn.functional.conv2d",
        "dropout" if "dropout" in ITEMS else "bernoulli",
    ):
        for check in checks.CHECKS["op"].values():
            check(ITEMS[name], torch.float32, CPU, 2)


X = torch.linspace(1.0, 2.0, 40).reshape(8, 5)


def dropped(rate: float = 0.5, scale: float = 2.0, features: bool = False) -> torch.Tensor:
    mask = torch.rand(8, 1 if features else 5) >= rate
    return X * mask * scale


def test_equal_distributions_pass() -> None:
    for draw in (dropped, lambda: dropped(features=True), lambda: torch.randn(30), lambda: torch.randint(3, (2, 2))):
        randomness.check_distribution(draw, draw, 1e-4)
    randomness.check_distribution(lambda: dropped() * (1 + 1e-6), dropped, 1e-4)  # rounding


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: dropped(0.4), dropped),
        (lambda: dropped(scale=2.01), dropped),
        (lambda: dropped(features=True), dropped),
        (lambda: torch.randn(30) * 1.5, lambda: torch.randn(30)),
        (lambda: torch.randn(30) + 0.3, lambda: torch.randn(30)),
        (lambda: torch.randn(1).expand(30), lambda: torch.randn(30)),
        (lambda: torch.randint(9, (4, 4)), lambda: torch.randint(10, (4, 4))),
        (lambda: torch.randn(30, generator=torch.Generator().manual_seed(1)), lambda: torch.randn(30)),
        (lambda: torch.randn(30, generator=GENERATOR), lambda: torch.randn(30)),
        (lambda: torch.zeros(3), lambda: torch.randn(3)),
    ],
    ids=["rate", "scale", "mask", "spread", "shift", "broadcast", "bound", "standing still", "unseeded", "constant"],
)
def test_another_distribution_is_found(ours, theirs) -> None:
    with pytest.raises(AssertionError):
        randomness.check_distribution(ours, theirs, 1e-4)


GENERATOR = torch.Generator()


class TwoMasks(torch.autograd.Function):
    """A dropout whose backward draws a mask of its own."""

    @staticmethod
    def forward(ctx, x):
        return x * (torch.rand_like(x) > 0.5) * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * (torch.rand_like(grad) > 0.5) * 2


def test_a_gradient_of_another_mask_is_found() -> None:
    def given() -> torch.Tensor:
        return X.clone().requires_grad_()

    randomness.check_gradient(lambda x: ([torch.dropout(x, 0.5, True)], [x]), checks.gradients, given)
    with pytest.raises(AssertionError, match="same seed"):
        randomness.check_gradient(lambda x: ([TwoMasks.apply(x)], [x]), checks.gradients, given)


def test_upstream_no_longer_fixes_the_seed_of_random_ops() -> None:
    draws = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        draws.add(float(ITEMS["nn.functional.dropout"].info(torch.ones(100)).sum()))
        draws.add(float(ITEMS["nn.functional.dropout"].info(torch.ones(100)).sum()))
    assert len(draws) > 2


def test_moved_samples_keep_strides_offsets_and_bits() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    for x in (base.t()[1:, ::2], base[:1].expand(3, 6), torch.zeros(0, 3), torch.tensor(1.0)):
        y = checks.move(x, CPU)
        assert torch.equal(x, y) and x.stride() == y.stride() and x.storage_offset() == y.storage_offset()
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or not x.numel()
    z = torch.randn(3, dtype=torch.complex64).conj()
    assert checks.move(z, CPU).is_conj() and torch.equal(checks.move(z, CPU), z)


def test_shards_partition_the_tasks_and_the_tier_is_a_stable_part() -> None:
    listed = [(i.name, i.kind, str(d).removeprefix("torch.")) for i in ITEMS.values() for d in i.dtypes]
    tasks = coverage.tasks(listed)
    assert len(set(tasks)) == len(tasks) > 6000
    shards = [[t for t in tasks if t.hash % 4 == s] for s in range(4)]
    assert sorted(functools.reduce(operator.iadd, shards, [])) == sorted(tasks)
    tier = [t for t in tasks if coverage.stratum(t)]
    assert {t.check for t in tier} >= set(coverage.CHECKS) - {"gradcheck"}
    assert 200 < len(tier) < len(tasks) / 8


def test_resuming_keeps_results_of_as_many_samples_and_of_later_commits(tmp_path: Path, monkeypatch) -> None:
    store = coverage.Store(tmp_path / "results.jsonl")
    with store:
        for limit in (1, 3, None):
            store.add(coverage.Result(f"op{limit}", "op", "float32", "forward", "pass", limit=limit, code="a"))
    found = coverage.Store(store.path).results
    assert found == store.results
    for asked, kept in ((1, 3), (2, 2), (3, 2), (4, 1), (None, 1)):
        assert sum(r.covers(asked) for r in found.values()) == kept, asked

    def git(*arguments: str) -> str:
        name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(coverage, "ROOT", tmp_path)
    assert coverage.commit() == ""
    git("init", "-q")
    commits = []
    for k in range(3):
        git("commit", "-q", "--allow-empty", "-m", str(k))
        commits.append(coverage.commit())
    assert len(set(commits)) == 3
    assert coverage.made_since(commits[1], [*commits, ""]) == set(commits[1:])
    assert coverage.made_since(commits[0][:8], commits) == set(commits)
    with pytest.raises(SystemExit, match="no commit"):
        coverage.made_since("0123456", commits)


def test_a_worker_that_dies_costs_one_check(tmp_path: Path) -> None:
    worker = coverage.Worker("cpu", None, tmp_path / "log")
    worker.process.kill()
    answer = worker.ask({"list": True}, timeout=60)
    assert answer["status"] == "crash"


def test_ledger_round_trip_and_growth(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "upstream"
    folder.mkdir(parents=True)
    path = folder / "expectations.yaml"
    why = ledger.Expectation("unimplemented", "none yet")
    cells = {("svd", "forward", d, e): why for d in ("float32", "int64") for e in ("opencl", "wgpu")}
    cells["svd", "backward", "float32", "wgpu"] = why
    path.write_text(ledger.dump(cells))
    assert ledger.load(path) == cells and ledger.check(None, path) == []

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], cwd=tmp_path, check=True
        )

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "ledger")
    assert ledger.check("HEAD", path) == []
    cells["qr", "forward", "float32", "wgpu"] = why
    path.write_text(ledger.dump(cells))
    assert "grew from 5 to 6" in ledger.check("HEAD", path)[0]
    path.write_text(path.read_text().replace("limit: 6", "limit: 7"))
    assert "says limit: 7" in ledger.check(None, path)[0]


def test_ledger_refuses_unknown_classes(tmp_path: Path) -> None:
    path = tmp_path / "expectations.yaml"
    path.write_text(ledger.dump({("svd", "forward", "float32", "wgpu"): ledger.Expectation("later", "")}))
    with pytest.raises(ValueError, match="class is one of"):
        ledger.load(path)


@pytest.mark.full
def test_upstream_files_run_with_crashes_isolated(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_small.py").write_text(
        "import os\n"
        "from torch.testing._internal.common_utils import TestCase\n"
        "from torch.testing._internal.common_device_type import instantiate_device_type_tests\n"
        "class TestSmall(TestCase):\n"
        "    def test_good(self, device): pass\n"
        "    def test_bad(self, device): self.fail('on purpose')\n"
        "    def test_crash(self, device): os._exit(9)\n"
        "instantiate_device_type_tests(TestSmall, globals())\n"
    )
    command = [sys.executable, "-m", "torch_spiral.testing", "upstream", "--torch-source", str(tmp_path)]
    command += ["--device", "cpu", "--workers", "1", "--out", str(tmp_path / "out"), "test_small.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = (upstream.CACHE / "cpu-test_small.py.jsonl").read_text().splitlines()
    outcomes = {o["nodeid"].split("::")[-1]: o["outcome"] for o in map(json.loads, lines)}
    assert outcomes == {"test_good_cpu": "passed", "test_bad_cpu": "failed", "test_crash_cpu": "failed"}
    assert "| test_small.py | 1 | 2 | 0 | 0 | 0 |" in (tmp_path / "out" / "summary.md").read_text()
