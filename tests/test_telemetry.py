"""Telemetry, torch.profiler's timeline, and packing ahead."""

import gc
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_spiral
from torch_spiral import _C
from torch_spiral.autotune import model


def test_telemetry_counts_times_bytes_and_operations(device):
    a, b = torch.randn(96, 64, device=device), torch.randn(64, 80, device=device)
    a @ b
    with torch.spiral.telemetry() as t:
        for _ in range(3):
            c = a @ b
        c.relu()
    products = [k for k in t.kernels() if k.flops]
    assert [(k.calls, k.flops) for k in products] == [(3, 3 * 2 * 96 * 64 * 80)]
    assert products[0].ops == {"mm"} and "(built in)" in products[0].schedule
    relu = next(k for k in t.kernels() if "mm" not in k.ops)
    assert relu.calls == 1 and relu.bytes == 2 * 4 * 96 * 80
    assert all(x.duration_ns >= 0 and x.start_ns > 1e18 for x in t.launches)
    starts = [x.start_ns for x in t.launches]
    assert starts == sorted(starts), "one queue"
    assert abs(sum(k.seconds for k in t.kernels()) - t.seconds) < 1e-9


def test_telemetry_is_off_unless_asked(device):
    x = torch.randn(1000, device=device)
    x.sin()
    assert not _C.tracing()
    with torch.spiral.telemetry():
        assert _C.tracing()
    assert not _C.tracing()
    torch.spiral.synchronize()
    before = _C.objects_created(device.index)
    for _ in range(50):
        x.sin_()
    torch.spiral.synchronize()
    assert _C.objects_created(device.index) == before, "no events are made"


def test_two_listeners_hear_their_own_time(device):
    x = torch.randn(1000, device=device)
    with torch.spiral.telemetry() as outer:
        x.sin()
        with torch.spiral.telemetry() as inner:
            x.cos()
        x.exp()
    assert [k.calls for k in inner.kernels()] == [1] and "cos" in inner.launches[0].kernel
    assert len(outer.launches) == 3


def test_more_launches_than_a_batch_of_events(device):
    if torch.spiral.get_device_properties(device).engine != "opencl":
        pytest.skip("one engine is enough")
    x = torch.randn(8, device=device)
    with torch.spiral.telemetry() as t:
        for _ in range(5000):
            x.neg_()
    assert len(t.launches) == 5000 and all(a.start_ns <= b.start_ns for a, b in zip(t.launches, t.launches[1:]))


def test_the_table_tells_share_and_schedule(device, monkeypatch):
    module = importlib.import_module("torch_spiral.device.telemetry")
    monkeypatch.setattr(module, "roofline", lambda index: model.Roofline(1e9, {"f32": 1e9}))
    a = torch.randn(64, 64, device=device)
    with torch.spiral.telemetry() as t:
        a @ a
    k = next(k for k in t.kernels() if k.flops)
    least = max(k.flops / 1e9, k.bytes / 1e9)
    assert (t.share(k) or least / k.seconds) == pytest.approx(least / k.seconds)
    text = str(t)
    assert "mm" in text and "roofline" in text and "built in" in text


def test_a_roofline_is_plausible():
    r = model.Roofline(100.0, {"f32": 1000.0})
    assert r.share(1.0, 1000.0, 10.0, "f32") == 1.0 and r.share(2.0, 10.0, 100.0, "f32") == 0.5


def test_profiler_shows_kernels_with_their_operators(device, tmp_path):
    x = torch.randn(64, 64, device=device)
    x @ x
    with torch.spiral.profiler.profile() as p:
        (x @ x).relu()
        torch.spiral.synchronize()
    path = str(tmp_path / "trace.json")
    p.export_chrome_trace(path)
    events = json.loads(Path(path).read_text())["traceEvents"]
    # Where torch has CUDA, its profiler shows kernels as the driver sees them as well: all are called main_.
    kernels = [e for e in events if e.get("cat") == "kernel" and e["name"] != "main_"]
    ops = {e["name"]: e for e in events if e.get("cat") == "cpu_op"}
    assert len(kernels) >= 2 and all("shapes" in e["args"] and e["dur"] >= 0 for e in kernels)
    product = next(e for e in kernels if "gemm" in e["name"])
    assert [64, 64] in product["args"]["shapes"] and product["args"]["flops"] == 2 * 64**3
    assert product["ts"] >= ops["aten::mm"]["ts"], "on the host's clock, after its operator began"
    assert product["ts"] < ops["aten::mm"]["ts"] + 60e6
    if torch.spiral.profiler.native():
        rows = {e.key: e for e in p.key_averages()}
        assert rows["aten::mm"].device_time_total > 0 and product["name"] in rows


def test_a_trace_of_telemetry_alone(device, tmp_path):
    x = torch.randn(64, 64, device=device)
    with torch.spiral.telemetry() as t:
        x.sin()
    torch.spiral.profiler.export_chrome_trace(t, str(tmp_path / "t.json"))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    (kernel,) = [e for e in events if e["ph"] == "X"]
    assert (
        "sin" in kernel["name"]
        and kernel["args"]["shapes"][0] == [64 * 64]
        and kernel["args"]["dtypes"] == ["f32", "f32"]
    )


# ---- packing ------------------------------------------------------------------------------------------------------------


def make(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).to(device).eval()


def test_packed_weights_give_the_same_results_and_follow_updates(device):
    model, x = make(device), torch.randn(48, 256, device=device)
    with torch.no_grad():
        want = model(x).cpu()
    packed = torch_spiral.pack(model, x, rounds=2)
    assert packed.seconds_before > 0 and packed.seconds_after > 0
    vector = torch.spiral.get_device_properties(device).engine == "opencl"
    if vector:
        assert packed.count == 2 and packed.bytes >= 4 * (256 * 512 + 512 * 128)
    with torch.no_grad():
        torch.testing.assert_close(model(x).cpu(), want, rtol=1e-5, atol=1e-5)
        for scale in (2.0, 0.5, -1.0):
            model[0].weight.mul_(scale)
            model[2].weight.add_(0.125)
            want = nn.functional.linear(
                nn.functional.linear(x.cpu(), model[0].weight.cpu(), model[0].bias.cpu()).relu(),
                model[2].weight.cpu(),
                model[2].bias.cpu(),
            )
            torch.testing.assert_close(model(x).cpu(), want, rtol=1e-4, atol=1e-4)
    assert "packed weights" in str(packed)
    packed.release()
    assert packed.count == 0


def test_packing_is_ahead_of_the_first_call_and_accounted(device):
    if torch.spiral.get_device_properties(device).engine != "opencl":
        pytest.skip("products of this schedule class read weights as they are")
    gc.collect()  # else what earlier tests left in cycles may be freed between the two readings
    model, x = make(device), torch.randn(48, 256, device=device)
    torch.spiral.empty_cache()
    torch.spiral.synchronize()
    before = torch.spiral.memory_allocated()
    packed = torch_spiral.pack(model, x, rounds=1)
    torch.spiral.synchronize()
    gc.collect()
    assert torch.spiral.memory_allocated() - before >= packed.bytes > 0
    with torch.no_grad(), torch.spiral.telemetry() as t:
        model(x)
    assert not [k for k in t.kernels() if "pack_b" in k.kernel], "nothing is left to pack"
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        with torch.spiral.telemetry() as t:
            model(x)
            model(x)
    assert sum(k.calls for k in t.kernels() if "pack_b" in k.kernel) == 1, "once, for the weight that was written"
    packed.release()
    torch.spiral.synchronize()
    assert torch.spiral.memory_allocated() - before < 4 * 256 * 512


def test_packing_gives_way_to_memory_pressure(device):
    if torch.spiral.get_device_properties(device).engine != "opencl":
        pytest.skip("products of this schedule class read weights as they are")
    model, x = make(device), torch.randn(48, 256, device=device)
    packed = torch_spiral.pack(model, x, rounds=1)
    with torch.no_grad():
        want = model(x).cpu()
        torch.spiral.empty_cache()  # gives up what is packed, as pressure does
        assert packed.count == 0
        for _ in range(2):
            torch.testing.assert_close(model(x).cpu(), want)
    assert packed.count == 2, "made again by the calls that want it"
    packed.release()


def test_pack_asks_for_a_model_on_the_device():
    with pytest.raises(ValueError, match="no weights on a spiral device"):
        torch_spiral.pack(nn.Linear(2, 2), torch.zeros(1, 2))


def test_operations_of_attention_and_convolution(device):
    q = torch.randn(1, 2, 40, 32, device=device)
    x, w = torch.randn(2, 8, 12, 12, device=device), torch.randn(6, 8, 3, 3, device=device)
    with torch.no_grad(), torch.spiral.telemetry() as t:
        nn.functional.scaled_dot_product_attention(q, q, q)
        nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        nn.functional.conv2d(x, w)
    found = [k.flops for k in t.kernels() if k.flops]
    whole = 2 * 2 * 40 * 40 * 64
    assert whole in found and whole // 2 in found
    assert 2 * 6 * (2 * 10 * 10) * (8 * 9) in found


@pytest.mark.parametrize(
    "case,expected",
    [("convolution", 4 * 6 * 120 * 72), ("depthwise", 4 * 8 * 120 * 9), ("attention", 4 * 20 * 20 * (16 + 12))],
)
def test_operations_of_backward(device, case, expected):
    """Convolutions do as many for each gradient as forward; attention five products for two."""
    x = torch.randn(2, 8, 10, 12, device=device).requires_grad_()
    weight = torch.randn(*((8, 1) if case == "depthwise" else (6, 8)), 3, 3, device=device).requires_grad_()
    q, k, v = (torch.randn(1, 2, 20, d, device=device).requires_grad_() for d in (16, 16, 12))
    if case == "attention":
        function, leaves = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), (q, k, v)
        # The scores are computed for dq and again for dk and dv, but by the kernel that does both.
        of_all = {4 * 20 * 20 * (3 * 16 + 2 * 12), 4 * 20 * 20 * (4 * 16 + 3 * 12)}
    else:
        groups = 8 if case == "depthwise" else 1
        function, leaves = lambda: torch.nn.functional.conv2d(x, weight, padding=1, groups=groups), (x, weight)
        of_all = {2 * expected}
    with torch.spiral.telemetry() as forward:
        out = function()
        torch.spiral.synchronize(device)
    g = torch.ones_like(out)
    with torch.spiral.telemetry() as backward:
        torch.autograd.grad(out, leaves, g)
        torch.spiral.synchronize(device)
    assert sum(launch.flops or 0 for launch in forward.launches) == expected
    assert sum(launch.flops or 0 for launch in backward.launches) in of_all
