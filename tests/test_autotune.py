"""The tuner's safety rules: what is wrong is refused, what is slower is never chosen, nothing that is not scratch is touched, a damaged
database is set aside, and a decision is used, replayed and refused as SPIRAL_TUNE says."""

import dataclasses
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from torch_spiral import _C, autotune
from torch_spiral import lowering as low
from torch_spiral.autotune import __main__ as command
from torch_spiral.autotune import database as db
from torch_spiral.autotune import model, online, templates, tuner
from torch_spiral.kernels.nest import Operand, pointwise

ROOF = model.Roofline(1e10, {"f32": 1e11})


@pytest.fixture(autouse=True)
def own_database(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRAL_TUNE_DB", str(tmp_path / "tuning.sqlite"))
    monkeypatch.delenv("SPIRAL_TUNE", raising=False)
    autotune._mode = None
    autotune.forget()
    online.reset()
    yield
    autotune._mode = None
    autotune.forget()
    online.reset()


# ---- a template of our own: out = 2 x, by schedules that are right, wrong, or slow --------------------------------------


@dataclasses.dataclass(frozen=True)
class Doubling:
    """times: how often the work is done; wrong: how."""

    times: int
    wrong: str = ""

    def __str__(self):
        return f"x{self.times}{self.wrong}"


SLOW, FAST, SLOWER = Doubling(32), Doubling(1), Doubling(80)
WRONG, PARTIAL, OUTSIDE, GREEDY, REFUSED = (
    Doubling(1, w) for w in ("wrong", "partial", "outside", "greedy", "refused")
)


def _kernel(target, schedule):
    def fn(x):
        for i in range(schedule.times * 8):
            x = x * (2.0 if i % 2 else 0.5)
        return x * (2.01 if schedule.wrong == "wrong" else 2.0)

    return pointwise(
        target, f"doubling_{schedule}", [Operand("out", "f32", "dense")], [Operand("x", "f32", "dense")], fn, ndim=1
    )


CANDIDATES = [FAST, SLOWER, WRONG, PARTIAL, OUTSIDE, GREEDY, REFUSED]


@low.operator("tuned_doubling_(Tensor(a!) out, Tensor x) -> ()")
def _tuned_doubling(out, x):
    s = autotune.choose("doubling", f"f32 n{low.bucket(x.numel)}", SLOW, lambda: CANDIDATES, [low.hint(x.numel)])
    if s.wrong == "refused":
        raise RuntimeError("this device has no such thing")
    built = low.build(_kernel, s)
    whole, source = out, x
    if s.wrong == "greedy":  # writes its input
        whole, source = x, x
    n = low.product(whole.sizes)
    count = n // 2 if s.wrong == "partial" else n + 8 if s.wrong == "outside" else n
    low.launch(built.kernel, [whole, source], built.scalars([count]), built.groups([count]))


class DoublingTemplate(templates.Template):
    name = "doubling"

    def problem(self, device, key, sizes, exact=False):
        where = torch.device("spiral", device)
        x = templates.scratch(sizes, torch.float32, where, 1)
        memory, out = templates.arena(sizes, torch.float32, where)
        return templates.Problem(
            self.name, key, tuple(sizes), where, "f32", [x], [memory], [out], lambda: torch.ops.spiral.tuned_doubling_(out, x),
            (lambda: [x.cpu().double() * 2]) if exact else None, 2e-5, float(sizes[0]), 8.0 * sizes[0],
        )  # fmt: skip

    def ragged(self, problem):
        return self.problem(problem.device.index, problem.key, (1003,), exact=True)

    def seconds(self, problem, schedule, roofline):
        return 1e-5 * schedule.times**0.1

    def kernel_text(self, target, key, schedule):
        return f"{schedule}"


@pytest.fixture
def doubling(device, monkeypatch):
    if torch.spiral.get_device_properties(device).engine != "opencl":
        pytest.skip("one engine is enough for the rules")
    monkeypatch.setitem(templates.TEMPLATES, "doubling", DoublingTemplate())
    n = 1 << 18
    x, out = torch.randn(n).to(device), torch.zeros(n).to(device)

    def call():
        torch.ops.spiral.tuned_doubling_(out, x)

    return x, out, call


def search(device, call, **options):
    (request,) = tuner.requests_of(call)
    store = autotune.store()
    return tuner.Tuner(device.index, store, ROOF, cheap_seconds=0.0, **options).search(request), store


def test_the_faster_schedule_wins_and_the_wrong_ones_are_refused(device, doubling):
    _, _, call = doubling
    result, store = search(device, call)
    verdicts = {t.schedule: (t.verdict, t.detail) for t in result.trials}
    assert result.decision.schedule == str(FAST) and result.decision.speedup > 1.5 and result.decision.p <= tuner.ALPHA
    assert verdicts[str(WRONG)][0] == "wrong" and "largest result" in verdicts[str(WRONG)][1]
    assert verdicts[str(PARTIAL)] == ("wrong", "results are missing or not numbers")
    assert verdicts[str(OUTSIDE)] == ("wrong", "it wrote outside of its result")
    assert verdicts[str(GREEDY)] == ("wrong", "it wrote to its inputs")
    assert verdicts[str(REFUSED)][0] == "failed" and "no such thing" in verdicts[str(REFUSED)][1]
    assert verdicts[str(SLOWER)][0] in ("lost", "no better")
    assert store.decisions() == [result.decision]


def test_a_slower_schedule_is_never_chosen(device, doubling, monkeypatch):
    _, _, call = doubling
    monkeypatch.setitem(globals(), "CANDIDATES", [SLOWER])
    result, _ = search(device, call)
    assert result.decision.schedule == result.decision.fallback == str(SLOW)
    assert result.decision.speedup == 1.0


def test_noise_is_no_win():
    coin = tuner.Comparison(0.99, 1.0, 12, 21)  # a little faster in the median, by luck
    assert not coin.better(tuner.ALPHA)
    assert not tuner.Comparison(0.995, 1.0, 21, 21).better(tuner.ALPHA)  # sure, and not worth it
    assert tuner.Comparison(0.9, 1.0, 20, 21).better(tuner.ALPHA)
    assert tuner.sign_test(21, 21) == 2.0**-21 and tuner.sign_test(0, 21) == 1.0
    assert abs(tuner.sign_test(11, 21) - 0.5) < 1e-12


def test_a_search_leaves_live_tensors_alone(device, doubling):
    x, out, call = doubling
    call()
    before = x.cpu().clone(), out.cpu().clone()
    epochs = [_C.write_epoch(t.untyped_storage().data_ptr()) for t in (x, out)]
    (request,) = tuner.requests_of(call)
    epochs[1] = _C.write_epoch(out.untyped_storage().data_ptr())  # the call itself writes it
    tuner.Tuner(device.index, None, ROOF, cheap_seconds=0.0).search(request)
    assert [_C.write_epoch(t.untyped_storage().data_ptr()) for t in (x, out)] == epochs
    assert torch.equal(x.cpu(), before[0]) and torch.equal(out.cpu(), before[1])


def test_cheap_calls_are_not_searched(device, doubling):
    _, _, call = doubling
    (request,) = tuner.requests_of(call)
    with pytest.raises(tuner.Cheap):
        tuner.Tuner(device.index, None, ROOF, cheap_seconds=10.0).search(request)


def used(call):
    """The schedule that a call's kernel says it has, and why; what a trial launches comes before."""
    with torch.spiral.telemetry() as t:
        call()
    return [x.schedule for x in t.launches if x.op == "spiral::tuned_doubling_"][-1:]


def test_a_decision_is_used_and_steady_state_runs_no_python(device, doubling, monkeypatch):
    _, _, call = doubling
    assert used(call) == [f"{SLOW} (built in)"]
    search(device, call)
    autotune.forget()
    (note,) = used(call)
    assert note.startswith(f"{FAST} (database: ") and "p=" in note
    misses = _C.plan_statistics()["misses"]
    monkeypatch.setattr(autotune, "choose", None)  # would fail if it were asked
    for _ in range(100):
        call()
    assert _C.plan_statistics()["misses"] == misses


def test_modes(device, doubling, monkeypatch):
    _, _, call = doubling
    search(device, call)
    autotune.set_mode("off")
    assert used(call) == [f"{SLOW} (built in)"]
    autotune.set_mode("frozen")
    assert used(call)[0].startswith(str(FAST))
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        autotune.store().put(autotune.device_row(device.index))
    autotune.set_mode("replay")
    stale = replace(autotune.store().decisions()[0], kernel_hash="0" * 16)
    autotune.store().put(stale)
    autotune.forget()
    assert used(call) == [f"{SLOW} (built in)"], "a decision about another kernel is no decision"
    autotune.set_mode("frozen")
    with pytest.raises(RuntimeError, match="stale"):
        call()
    monkeypatch.setenv("SPIRAL_TUNE_DB", "/nonexistent/tuning.sqlite")
    autotune.forget()
    with pytest.raises(RuntimeError, match="there is no tuning database"):
        call()
    with pytest.raises(ValueError, match="no such mode"):
        autotune.set_mode("sometimes")


def test_online_finds_the_winner_within_its_share(device, doubling, monkeypatch):
    x, out, call = doubling
    monkeypatch.setattr(online, "LIFE", 4)
    monkeypatch.setattr(tuner, "CHEAP_SECONDS", 0.0)
    monkeypatch.setattr(tuner.Tuner.__init__, "__defaults__", (16, 30.0, 0.0))
    monkeypatch.setenv("SPIRAL_TUNE_SHARE", "0.5")
    autotune.set_mode("online")
    want = x.cpu() * 2
    start, notes = time.perf_counter(), set()
    with torch.no_grad():
        while time.perf_counter() - start < 60:
            (note,) = used(call)
            notes.add(note.split(" ")[0])
            assert torch.equal(out.cpu(), want) or torch.allclose(out.cpu(), want)
            if note.startswith(str(FAST)):
                break
    assert notes == {str(SLOW), str(FAST)}, "live calls run the incumbent until something has won"
    explorer = online.explorer()
    (bandit,) = explorer.bandits.values()
    assert bandit.done and autotune.store().decisions()[0].schedule == str(FAST)
    step = explorer.spent / max(len(bandit.trials) + sum(len(b.gains) for b in bandit.bets), 1)
    assert explorer.spent <= 0.5 * (time.perf_counter() - explorer.started) + 8 * step, "a step may overshoot, not more"


def test_online_leaves_training_alone(device, doubling, monkeypatch):
    _, _, call = doubling
    monkeypatch.setattr(online, "LIFE", 2)
    autotune.set_mode("online")
    with torch.enable_grad():
        for _ in range(12):
            call()
    assert online.explorer().spent == 0.0


# ---- the database -------------------------------------------------------------------------------------------------------


def decision(**changes):
    return replace(
        db.Decision("d", "gemm", "k", "1x1x1x1", "fast", "slow", 1.0, 2.0, 20, 21, 1e-5, "abc", "v", 100.0), **changes
    )


DEVICE = db.DeviceRow("d", "opencl", "v", "1", "vector", 2, 1e10, {"f32": 1e11})


def test_a_database_keeps_what_it_is_given(tmp_path):
    path = tmp_path / "t.sqlite"
    store = db.Database(path)
    trial = db.Trial("d", "gemm", "k", "fast", "won", 1.0, 1.1, "why")
    store.put(DEVICE, decision(), trial)
    store.put(decision(schedule="other"))
    store.close()
    store = db.Database(path, readonly=True)
    assert (
        store.devices() == [DEVICE] and store.decisions() == [decision(schedule="other")] and store.trials() == [trial]
    )
    rows = sqlite3.connect(path).execute("select schedule, milliseconds from decisions").fetchall()
    assert rows == [("other", 1.0)], "readable without us"


@pytest.mark.parametrize("damage", ["text", "truncated", "other tables", "other version"])
def test_a_damaged_database_is_set_aside_and_begun_anew(tmp_path, damage):
    path = tmp_path / "t.sqlite"
    if damage == "text":
        path.write_text("this is no database, " * 100)
    else:
        store = db.Database(path)
        store.put(DEVICE, *(decision(key=f"k{i}") for i in range(400)))
        store.close()
        if damage == "truncated":
            data = bytearray(path.read_bytes())
            data[4096 : len(data) - 4096] = b"\xa5" * (len(data) - 8192)
            path.write_bytes(data)
        else:
            c = sqlite3.connect(path)
            c.execute("drop table trials" if damage == "other tables" else "pragma user_version = 99")
            c.commit()
            c.close()
    with pytest.warns(UserWarning, match="moved to"):
        store = db.Database(path)
    assert store.decisions() == []
    store.put(decision())
    assert store.decisions() == [decision()]
    assert len(list(tmp_path.glob("*damaged*"))) == 1, "what was there is kept"
    with pytest.raises(FileNotFoundError):
        db.Database(tmp_path / "missing.sqlite", readonly=True)


def test_a_database_in_use_is_no_damaged_one(tmp_path, monkeypatch):
    path = tmp_path / "t.sqlite"
    db.Database(path).put(DEVICE, decision())
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("begin exclusive")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.05}))
    with pytest.raises(OSError, match="locked"):
        db.Database(path)
    holder.execute("rollback")
    assert db.Database(path).decisions() == [decision()] and not list(tmp_path.glob("*damaged*"))


def test_a_search_that_fails_leaves_the_call_alone(device, doubling, monkeypatch):
    x, out, call = doubling
    monkeypatch.setattr(online, "LIFE", 2)
    monkeypatch.setattr(DoublingTemplate, "ragged", lambda *_: 1 / 0)
    autotune.set_mode("online")
    with torch.no_grad(), pytest.warns(UserWarning, match="given up: division by zero"):
        for _ in range(6):
            call()
    assert torch.equal(out.cpu(), x.cpu() * 2) and used(call) == [f"{SLOW} (built in)"]


def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "theirs.sqlite"
    c = sqlite3.connect(path)
    c.execute("create table bookmarks (url)")
    c.commit()
    c.close()
    with pytest.raises(OSError, match="a database of something else"):
        db.Database(path)
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.sqlite"]
    with pytest.raises(SystemExit, match="a database of something else"):
        command.main(["merge", "--database", str(path)])


def test_processes_share_a_database(tmp_path):
    path, text = (
        tmp_path / "t.sqlite",
        textwrap.dedent(
            """
        import importlib.util, sys  # the module alone: it needs no torch
        spec = importlib.util.spec_from_file_location("database", sys.argv[3])
        sys.modules["database"] = db = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(db)
        store = db.Database(sys.argv[1])
        for i in range(40):
            store.put(db.Decision("d", "gemm", f"{sys.argv[2]} {i}", "1", "fast", "slow", 1.0, 2.0, 20, 21, 1e-5, "abc", "v", 1.0))
        """
        ),
    )
    running = [subprocess.Popen([sys.executable, "-c", text, str(path), str(i), db.__file__]) for i in range(3)]
    assert [p.wait(120) for p in running] == [0, 0, 0]
    assert len(db.Database(path, readonly=True).decisions()) == 120
    assert [p.name for p in tmp_path.iterdir()] == ["t.sqlite"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--shapes", "12xx3:f32"], "'12xx3:f32' is not understood"),
        (["--shapes", "64x64x64:f32:zz"], "'zz' are no layouts"),
        (["--shapes", "softmax/3x4:f99"], "softmax/RxD"),
        (["--model", "no.such:thing"], "No module named 'no'"),
        (["merge", "/no/such/file"], "No such file"),
        (["merge", __file__], "line 1 is no row"),
    ],
)
def test_what_the_command_does_not_understand(arguments, text, tmp_path):
    with pytest.raises(SystemExit, match=text):
        command.main([*arguments, "--database", str(tmp_path / "t.sqlite")])


def test_merge_takes_what_is_newer(tmp_path):
    ours, theirs = db.Database(tmp_path / "a.sqlite"), db.Database(tmp_path / "b.sqlite")
    ours.put(DEVICE, decision(key="both"), decision(key="newer", time=300.0))
    theirs.put(
        DEVICE,
        decision(key="both", schedule="faster", time=200.0),
        decision(key="newer", schedule="old"),
        decision(key="new"),
    )
    theirs.put(db.Trial("d", "gemm", "new", "fast", "won"), db.Trial("d", "gemm", "newer", "old", "won"))
    theirs.close()
    assert command.main(["merge", str(tmp_path / "b.sqlite"), "--database", str(tmp_path / "a.sqlite")]) == 0
    assert {d.key: d.schedule for d in ours.decisions()} == {"both": "faster", "newer": "fast", "new": "fast"}
    assert [t.key for t in ours.trials()] == ["new"]


def test_export_is_text_that_merges(tmp_path, capsys):
    store = db.Database(tmp_path / "a.sqlite")
    store.put(DEVICE, decision())
    assert command.main(["export", str(tmp_path / "a.jsonl"), "--database", str(tmp_path / "a.sqlite")]) == 0
    assert command.main(["merge", str(tmp_path / "a.jsonl"), "--database", str(tmp_path / "b.sqlite")]) == 0
    assert db.Database(tmp_path / "b.sqlite").decisions() == [decision()]
    for text in ('{"kind": "decision"}', "[]", "garbage", '{"kind": "code", "text": "import os"}'):
        with pytest.raises(ValueError, match="line 1"):
            db.parse(text)


def test_shipped_defaults_name_schedules_that_exist():
    """Each is a decision about a kernel of today, by its hash, for the device that it was measured on: else it has no effect."""
    devices, decisions = db.shipped()
    assert {d.device for d in decisions} <= {d.device for d in devices}
    for d in decisions:
        assert d.rounds == 0 or d.p <= tuner.ALPHA or d.schedule == d.fallback
        assert d.schedule == d.fallback or d.speedup >= tuner.LEAST_GAIN


def test_the_model_prefers_shared_steps_where_a_wave_of_tiles_is_hardly_begun():
    """Stream-K: offered for few waves of tiles; expected to win with a long reduction, not with a short one."""
    from torch_spiral.kernels.block import gemm
    from torch_spiral.kernels.kernel import Target

    target = Target(
        language="triton", schedule_class="block", engine="cuda", compute_units=132, capability=90,
        max_workgroup_memory=227 << 10,
    )  # fmt: skip
    roofline = model.Roofline(4.2e12, {"bf16": 7e14})

    def best(*sizes):
        found = gemm.candidates(target, "bf16", "", *(1 << (n.bit_length() - 1) for n in sizes))

        def seconds(choice):
            tiling = templates.Gemm()._tiling(target, {"a": "bf16"}, choice, sizes)
            return model.product_seconds(target, tiling, *sizes, "bf16", 2, 2, roofline)

        assert any(choice.schedule.streamed for choice in found) == (max(sizes) < 8192)
        assert not any(choice.schedule.streamed and choice.splits > 1 for choice in found)
        return min(found, key=seconds).schedule

    assert best(1536, 1536, 4096, 1).streamed  # 144 tiles of 128 x 128 for 132 programs
    assert not best(1536, 1536, 512, 1).streamed
    assert not best(8192, 8192, 512, 1).streamed


# ---- real keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nn", "nt", "tn"])
def test_a_product_is_searched_by_its_key(device, layout):
    where = device
    call = command.gemm_call(f"96x80x64:f32:{layout}", where)
    (request,) = tuner.requests_of(call)
    assert request.sizes == (96, 80, 64, 1) and request.template == "gemm"
    limit = 2 if torch.spiral.get_device_properties(device).engine == "wgpu" else 4
    result = tuner.Tuner(device.index, autotune.store(), ROOF, limit=limit, cheap_seconds=0.0).search(request)
    assert not [t for t in result.trials if t.verdict in ("wrong", "failed")]
    assert result.decision.schedule in request.named()
    assert (
        templates.kernel_hash(device.index, "gemm", request.key, request.named()[result.decision.schedule])
        == result.decision.kernel_hash
    )


def test_every_candidate_has_a_name_of_its_own(device):
    for text in ("256x256x256:f32", "64x4096x4096:f32:nt"):
        (request,) = tuner.requests_of(command.gemm_call(text, device))
        assert len(request.named()) == len({request.default, *request.candidates}) > 8


def test_sizes_of_one_bucket_share_a_key(device):
    keys = {tuner.requests_of(command.gemm_call(f"{m}x256x256:f32", device))[0].key for m in (272, 400, 496)}
    assert len(keys) == 1
    assert tuner.requests_of(command.gemm_call("528x256x256:f32", device))[0].key not in keys


def test_report(device, tmp_path):
    pytest.importorskip("matplotlib")
    from torch_spiral.autotune.report import write

    store = db.Database(tmp_path / "t.sqlite")
    key = "f32 f32 f32 nnn m9 n9 k9 b0"
    store.put(
        DEVICE,
        decision(key=key, sizes="512x512x512x1"),
        decision(key=key + "x", sizes="640x512x512x1", schedule="slow", milliseconds=2.0),
    )
    page = write(store, tmp_path / "report")
    text = page.read_text()
    assert "2.000" in text and key in text and "1 at least 1.10" in text
    assert (
        "<svg" in (tmp_path / "report" / "roofline-0.svg").read_text()
        and "<svg" in (tmp_path / "report" / "gains-0.svg").read_text()
    )


@pytest.mark.parametrize("text", ["softmax/384x512:f32", "sum/3x65536:f32"])
def test_rows_are_searched_by_their_key(device, text):
    (request,) = tuner.requests_of(command.rows_call(text, device))
    assert request.template == "rows" and request.candidates
    result = tuner.Tuner(device.index, None, ROOF, limit=3, cheap_seconds=0.0).search(request)
    assert not [t for t in result.trials if t.verdict == "wrong"]
    assert any(t.verdict in ("lost", "no better", "won") and t.schedule != str(request.default) for t in result.trials)


def test_attention_is_searched_by_its_key(device):
    if torch.spiral.get_device_properties(device).engine != "wgpu":
        pytest.skip("one schedule only")
    (request,) = tuner.requests_of(command.attention_call("attention/1x2x80x32:f32:causal", device))
    result = tuner.Tuner(device.index, None, ROOF, limit=2, cheap_seconds=0.0).search(request)
    assert request.template == "attention" and not [t for t in result.trials if t.verdict in ("wrong", "failed")]


def test_convolution_is_searched_by_its_key(device):
    if torch.spiral.get_device_properties(device).engine != "wgpu":
        pytest.skip("one schedule only")
    (request,) = [
        r for r in tuner.requests_of(command.conv_call("conv/2x8x14x14/12x3x1:f32", device)) if r.template == "conv"
    ]
    result = tuner.Tuner(device.index, None, ROOF, limit=2, cheap_seconds=0.0).search(request)
    assert request.candidates and not [t for t in result.trials if t.verdict in ("wrong", "failed")]


def test_the_command_searches_shapes_and_models(device, tmp_path, monkeypatch, capsys):
    if torch.spiral.get_device_properties(device).engine != "opencl":
        pytest.skip("one engine is enough")
    (tmp_path / "own_model.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(512, 512), [torch.zeros(300, 512)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model, "measure", lambda *_: ROOF)
    monkeypatch.setattr(command, "measure", lambda *_: ROOF)
    arguments = [
        "--device",
        str(device.index),
        "--limit",
        "1",
        "--shapes",
        "256x256x256:f32",
        "--model",
        "own_model:make",
    ]
    assert command.main([*arguments, "--report", str(tmp_path / "report")]) == 0
    assert "2 keys searched" in capsys.readouterr().out
    decisions = autotune.store().decisions()
    assert {d.sizes for d in decisions} == {"256x256x256x1", "300x512x512x1"}
    assert command.main(["show"]) == 0 and "300x512x512x1" in capsys.readouterr().out


def test_a_report_without_matplotlib_is_refused_before_the_search(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["tune", "--report", "somewhere"])
    assert "torch_spiral[report]" in capsys.readouterr().err
