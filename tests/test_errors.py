"""Bad input gets upstream's exception and text, or one that names the op, what was given and what to do; the process
and the device live on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F


def agrees(call, x, y):
    """The same exception, with the same first line but for the device, as on the CPU."""
    with pytest.raises(Exception) as theirs:
        call(*(t.cpu() for t in (x, y)))
    with pytest.raises(theirs.type) as ours:
        call(x, y)
    names = (str(x.device), "cpu"), ("spiral", "cpu"), ("torch.cpu.", "torch."), ("cpuFloatType", "torch.FloatTensor")
    first = str(ours.value).splitlines()[0]
    for name, upstream in names:
        first = first.replace(name, upstream)
    expected = str(theirs.value).splitlines()[0]
    if '" not implemented for' in expected:  # before it, upstream names a function of its CPU code
        first, expected = (text[text.index('" not implemented for') :] for text in (first, expected))
    assert first == expected
    assert (torch.ones(3, device=x.device) + 1).tolist() == [2, 2, 2]


def test_shapes(device):
    x, y = torch.ones(2, 3, device=device), torch.ones(4, 5, device=device)
    for call in (
        torch.add,
        torch.mm,
        torch.matmul,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: F.linear(a, b),
        lambda a, b: a.view(7),
        lambda a, b: a.sum(3),
        lambda a, b: torch.stack([a, b]),
        lambda a, b: F.layer_norm(a, (5,)),
        lambda a, b: a.expand(4, 4),
        lambda a, b: torch.bmm(a, b),
        lambda a, b: F.conv2d(a[None, None], b[None, None, None]),
        lambda a, b: a.index_select(0, torch.ones(2, 2, dtype=torch.long, device=a.device)),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: a.add_(torch.ones(2, 2, 3, device=a.device)),
    ):
        agrees(call, x, y)


def test_shapes_of_targets_and_windows(device):
    x, y = torch.ones(2, 3, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    for call in (
        lambda a, b: F.multi_margin_loss(a, b),
        lambda a, b: F.multi_margin_loss(a, b[0]),
        lambda a, b: F.multi_margin_loss(a[0], b[:, 0]),
        lambda a, b: F.multi_margin_loss(a, b[:, 0], weight=a[0, :2]),
        lambda a, b: F.multi_margin_loss(a[None], b),
        lambda a, b: F.multilabel_margin_loss(a, b[0]),
        lambda a, b: F.multilabel_margin_loss(a[0], b[:1]),
        lambda a, b: F.multilabel_margin_loss(a, b[:1]),
        lambda a, b: F.multilabel_margin_loss(a, b.float()),
        lambda a, b: F.multi_margin_loss(a, b[:, 0].int()),
    ):
        agrees(call, x, y)
    # Not against the CPU, where torch 2.11 divides by zero, which ends the process.
    with pytest.raises(IndexError, match="Dimension specified as 0 but tensor has no dimensions"):
        torch.roll(x.sum(), 1, 0)
    with pytest.raises(ValueError, match="step must be nonzero"):
        torch.arange(0, 64, 0.5, out=y)
    with pytest.raises(IndexError, match=r"Dimension out of range \(expected to be in range of \[-2, 1\], but got 2\)"):
        torch.roll(x, 1, 2)
    with pytest.raises(RuntimeError, match=r"positive length, but input has a shape of \[1, 0, 2, 3\] and non-batch"):
        F.max_pool3d(x.new_empty(1, 0, 2, 3), 1)
    assert F.max_pool3d(x.new_empty(0, 1, 2, 3, 4), 1).shape == (0, 1, 2, 3, 4)
    assert torch.roll(x[:0], 1, 5).shape == (0, 3)  # upstream looks at no dimension of what is empty


def test_dtypes(device):
    x, y = torch.ones(2, 2, device=device), torch.ones(2, 2, dtype=torch.int64, device=device)
    for call in (
        torch.mm,
        lambda a, b: b.add_(0.5),
        lambda a, b: torch.add(a, a, out=b),
        lambda a, b: F.embedding(a, a),
        lambda a, b: b.requires_grad_(),
        lambda a, b: a & b,
        lambda a, b: ~a,
        lambda a, b: F.softmax(b, 0),
        lambda a, b: b.mean(),
        lambda a, b: F.nll_loss(a, a),
    ):
        agrees(call, x, y)


def test_mixed_devices(device):
    x, y = torch.ones(2, 2, device=device), torch.ones(2, 2)
    for call in (torch.add, torch.mm, F.linear, lambda a, b: torch.cat([a, b]), lambda a, b: torch.add(a, a, out=b)):
        with pytest.raises(RuntimeError, match=r"same device|on the same|spiral.*cpu|cpu.*spiral"):
            call(x, y)
        with pytest.raises(RuntimeError):
            call(y, x)
    with pytest.raises(RuntimeError, match="same device"):
        x.masked_select(y > 0)
    assert (x + torch.tensor(2)).tolist() == [[3, 3], [3, 3]], "a 0-dim CPU tensor counts as a number"


def test_two_spiral_devices_do_not_mix():
    if torch.spiral.device_count() < 2:
        pytest.skip("one device")
    x, y = torch.ones(2, device="spiral:0"), torch.ones(2, device="spiral:1")
    with pytest.raises(RuntimeError, match=r"spiral:0.*spiral:1|spiral:1.*spiral:0|same device"):
        x + y
    with pytest.raises(RuntimeError, match=r"spiral:0.*spiral:1|spiral:1.*spiral:0|same device"):
        torch.mm(x[None], y[:, None])


def test_out_of_range_indices_surface_at_the_next_synchronization(device):
    table = torch.ones(4, 2, device=device)
    row = torch.tensor([1, 9], device=device)
    for name, call in {
        "index_select": lambda: table.index_select(0, row),
        "gather": lambda: table.gather(0, row[:, None].expand(2, 2)),
        "index": lambda: table[row],
    }.items():
        call()
        with pytest.raises(IndexError, match=rf"{name}.*9|index 9.*{name}"):
            torch.spiral.synchronize(device)
        torch.spiral.synchronize(device)  # raised once
    F.embedding(row, table)  # upstream's is an index_select
    with pytest.raises(IndexError, match="index_select"):
        table.cpu()  # a read waits too
    assert table.sum().item() == 8, "nothing was written out of range and the device goes on"


def test_float64_where_the_device_has_none(device):
    """In a process of its own, which takes the feature away from a device that has it."""
    if torch.spiral.get_device_properties(device).engine in ("cuda", "hip"):
        pytest.skip("all of these have it, and Triton is not asked")
    code = f"""
import dataclasses, torch
from torch_spiral.kernels.kernel import Target

of = Target.of
Target.of = staticmethod(lambda index=None: dataclasses.replace(of(index), float64=False))
device = torch.device({str(device)!r})
x = torch.tensor([1.0, 2.5, 3.0], dtype=torch.float64).to(device)
assert x.cpu().tolist() == [1, 2.5, 3] and x[::2].clone().tolist() == [1, 3], "it stores and copies"
assert repr(x).startswith("tensor([1.0000, 2.5000, 3.0000]"), x
for call, name in ((lambda: x.exp(), "exp"), (lambda: x.sum(), "sum"), (lambda: x.float(), "copy")):
    try:
        call().cpu()
        raise AssertionError(name)
    except RuntimeError as error:
        assert name in str(error) and "spiral:" in str(error) and "no float64 arithmetic" in str(error), error
y = torch.ones(2, device=device) * torch.tensor(2.5, dtype=torch.float64)
assert y.dtype == torch.float32 and y.sum().item() == 5, "a number is no float64 tensor"
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_out_of_memory(device, clean_memory):
    before = torch.spiral.memory_allocated(device)
    with pytest.raises(torch.OutOfMemoryError, match=r"cannot hold a tensor of 65536\.00 GiB"):
        torch.empty(1 << 46, dtype=torch.uint8, device=device)
    assert torch.spiral.memory_allocated(device) == before
    assert torch.ones(3, device=device).sum().item() == 3


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_a_kernel_that_does_not_compile_leaves_its_source_behind(device, tmp_path):
    """As a bug in an emitter would show: the op fails with the path of the source and the compiler's log."""
    index = device.index
    code = f"""
import dataclasses, torch
from torch_spiral.kernels.builder import KernelBuilder
from torch_spiral.kernels.triton import TritonBuilder
x = torch.ones(8, device="spiral:{index}")
builder = TritonBuilder if torch.spiral.get_device_properties(x.device).engine in ("cuda", "hip") else KernelBuilder
finish = builder.finish
def broken(self, *args, **kwargs):
    kernel = finish(self, *args, **kwargs)
    return dataclasses.replace(kernel, source=kernel.source + "\\nthis is no program\\n")
builder.finish = broken
try:
    torch.digamma(x)
except RuntimeError as error:
    print("RAISED", error)
builder.finish = finish
print("ALIVE", (x + 1).sum().item())
"""
    result = run(code, SPIRAL_CACHE_DIR=str(tmp_path))
    assert "RAISED" in result.stdout and "ALIVE 16.0" in result.stdout, result.stdout + result.stderr
    said = result.stdout
    assert "digamma" in said
    words = (Path(word.strip(".,;:()'\"")) for word in said.split() if "/" in word)
    saved = [path for path in words if path.is_file()]
    assert any("this is no program" in path.read_text(errors="replace") for path in saved), said


def test_a_damaged_kernel_cache_is_rebuilt(device, tmp_path):
    code = f"""
import torch
x = torch.arange(5.0, device="spiral:{device.index}")
print((x * 3 - 1).tolist())
"""
    first = run(code, SPIRAL_CACHE_DIR=str(tmp_path))
    assert first.stdout.strip() == "[-1.0, 2.0, 5.0, 8.0, 11.0]", first.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = b"\\0garbage"
            path.write_bytes(data)
    second = run(code, SPIRAL_CACHE_DIR=str(tmp_path))
    assert second.stdout.strip() == first.stdout.strip(), second.stderr
