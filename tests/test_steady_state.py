"""What a program repeats costs nothing new: no plan, no kernel, no GPU object, no memory."""

import gc

import pytest
import torch
from torch.nn import functional as F

from torch_spiral import _C, lowering


@pytest.fixture
def compiled(monkeypatch):
    """The names of kernels as they are compiled."""
    names = []
    compile_kernel = _C.compile_kernel
    monkeypatch.setattr(_C, "compile_kernel", lambda device, d: (names.append(d["name"]), compile_kernel(device, d))[1])
    assert lowering._C is _C
    return names


def counted(device):
    s = _C.plan_statistics()
    return {
        "plans": s["misses"],
        "objects": _C.objects_created(device.index),
        "memory": torch.spiral.memory_allocated(device),
        "reserved": torch.spiral.memory_reserved(device),
    }


def soak(device, rounds):
    """About 20 ops of every front end a round: stubs, structured and Python-defined ops, views, copies, optimizer steps."""
    layer = torch.nn.Linear(32, 16).to(device)
    norm = torch.nn.LayerNorm(16).to(device)
    optimizer = torch.optim.SGD([*layer.parameters(), *norm.parameters()], lr=1e-3, momentum=0.9)
    x = torch.ones(8, 32, device=device)

    def once():
        optimizer.zero_grad()
        y = norm(F.gelu(layer(x + 1)))
        loss = F.cross_entropy(y, y.argmax(1)) + y[:, ::2].square().mean()
        loss.backward()
        optimizer.step()
        return loss

    before = None
    for i in range(rounds):
        loss = once()
        if i in (3, 6):  # what follows a wait is batched otherwise
            assert torch.isfinite(loss).item()
        elif i == 9:  # packed weights, caches of bind groups, blocks and batches, and the allocator have settled
            assert torch.isfinite(loss).item()
            gc.collect()
            before = counted(device)
        elif i % 100 == 99:
            assert torch.isfinite(loss).item()
    del loss
    gc.collect()
    torch.spiral.synchronize(device)
    return before, counted(device)


def test_repetition_creates_nothing(device):
    before, after = soak(device, 60)
    assert after["memory"] <= before["memory"]
    assert {k: v for k, v in after.items() if k != "memory"} == {k: v for k, v in before.items() if k != "memory"}


def test_many_launches_of_one_plan(device):
    """Which an engine may keep and hand over together: with the same tensors, others, what it wrote itself, and another size between."""

    def step(x, w, y):
        for _ in range(6):
            x = (x @ w).softmax(-1) - 0.1
        return y.add_(x), x

    run = torch.compile(step, backend="spiral", fullgraph=True, dynamic=True)
    w = torch.randn(64, 64)
    x, wide = [torch.randn(8, 64) for _ in range(3)], torch.randn(24, 64)
    ours, theirs = torch.zeros(8, 64, device=device), torch.zeros(8, 64)
    on_device = [t.to(device) for t in (*x, wide, w)]
    objects = []
    with torch.no_grad():
        for number in (0, 0, 0, 1, 2, 3, 3, 3, 1, 0, 2, 1, 3, 0):
            given = (wide if number == 3 else x[number]).clone()
            to, want = (ours, theirs) if number != 3 else (torch.ones(24, 64, device=device), torch.ones(24, 64))
            _, last = run(on_device[number], on_device[-1], to)
            torch.testing.assert_close(last.cpu(), step(given, w, want)[1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(to.cpu(), want, rtol=1e-4, atol=1e-4)
            objects.append(_C.objects_created(device.index))
    assert objects[-1] == objects[-5]


@pytest.mark.full
def test_a_hundred_thousand_ops_stay_flat(device):
    before, after = soak(device, 2000)
    assert after["memory"] <= before["memory"] and after["reserved"] == before["reserved"]
    assert after["objects"] == before["objects"] and after["plans"] == before["plans"]


def test_memory_goes_back_to_the_start(device, clean_memory):
    start = torch.spiral.memory_allocated(device), torch.spiral.memory_reserved(device)
    soak(device, 12)
    gc.collect()
    torch.spiral.synchronize(device)
    torch.spiral.empty_cache()
    assert (torch.spiral.memory_allocated(device), torch.spiral.memory_reserved(device)) <= start


@pytest.mark.parametrize("tokens", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_decoding_with_a_growing_cache(device, tokens, compiled):
    """Sizes are slots, not keys: a cache that grows by a token each step makes a plan per size class, and no kernel once
    every class of sizes was seen."""
    heads, width = 4, 16
    q = torch.randn(1, heads, 1, width, device=device)
    keys = torch.randn(1, heads, 1, width, device=device)
    values = torch.randn(1, heads, 1, width, device=device)
    plans = _C.plan_statistics()["misses"]
    for step in range(tokens):
        keys = torch.cat([keys, q], 2)
        values = torch.cat([values, q], 2)
        scores = (q @ keys.transpose(-1, -2) * 0.25).softmax(-1)
        out = scores @ values
        out = out + F.scaled_dot_product_attention(q, keys, values)
        if step == 31:
            compiled.clear()
    late = list(compiled)
    assert torch.isfinite(out).all().item()
    signatures = 8  # cat, transpose, two products, scaling, softmax, attention, add
    assert _C.plan_statistics()["misses"] - plans <= 40 * signatures
    assert not late, f"compiled after 32 tokens: {late}"
