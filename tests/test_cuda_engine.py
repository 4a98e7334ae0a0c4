"""The CUDA and HIP engine: memory, copies, events, kernels, and what it shares with torch.cuda. Skipped where no such device is."""

import random

import pytest

from torch_spiral import _C

ADAPTERS, WHY = _C.engines.adapters("cuda")


def test_absence_is_explained():
    assert ADAPTERS or "driver" in WHY


needs_device = pytest.mark.skipif(not ADAPTERS, reason=WHY or "no device")


@pytest.fixture
def engine():
    engine = _C.engines.adapters("cuda")[0][0].open()
    yield engine
    engine.synchronize()


@needs_device
def test_properties(engine):
    p = engine.properties
    assert p["engine"] in ("cuda", "hip") and p["language"] == "triton" and p["schedule_class"] == "block"
    assert p["total_memory"] > 1 << 28 and p["compute_units"] >= 1 and p["max_workgroup_size"] >= 256


@needs_device
@pytest.mark.parametrize("size", [1, 1000, 4 << 20, (4 << 20) + 1, 9 << 20])
def test_write_copy_read(engine, size):
    data = random.randbytes(size)
    a, b = engine.allocate(size), engine.allocate(size + 10)
    engine.write(a, 0, data)
    engine.copy(a, 0, b, 10, size)
    assert engine.read(b, 10, size) == data


@needs_device
def test_fill(engine):
    memory = engine.allocate(4096)
    engine.fill(memory, 0, 4096, 1)
    engine.fill(memory, 3, 1001, 7)
    assert engine.read(memory, 0, 4096) == b"\1" * 3 + b"\7" * 1001 + b"\1" * (4096 - 1004)


@needs_device
def test_many_small_writes_keep_their_order(engine):
    """More than the staging ring holds, with nothing waited for in between."""
    memory, size = engine.allocate(1 << 20), 1 << 20
    parts = [bytes([i % 251]) * size for i in range(40)]
    for part in parts:
        engine.write(memory, 0, part)
    assert engine.read(memory, 0, size) == parts[-1]


@needs_device
def test_ranges_are_checked(engine):
    memory = engine.allocate(1000)
    for call in (
        lambda: engine.write(memory, 999, b"ab"),
        lambda: engine.copy(memory, 0, memory, 500, 501),
        lambda: engine.copy(memory, 0, memory, 10, 100),
        lambda: engine.fill(memory, 2000, 1, 0),
    ):
        with pytest.raises(RuntimeError):
            call()
    engine.fill(memory, 0, 1000, 5)
    assert engine.read(memory, 999, 1) == b"\5"


@needs_device
def test_events(engine):
    memory = engine.allocate(1 << 24)
    start = engine.record(True)
    for _ in range(10):
        engine.fill(memory, 0, 1 << 24, 3)
    end = engine.record(True)
    engine.wait(end)
    assert engine.query(start) and engine.query(end) and 0 < engine.elapsed_ms(start, end) < 1000
    with pytest.raises(RuntimeError, match="timing"):
        engine.elapsed_ms(start, engine.record(False))


@needs_device
def test_steady_state_creates_nothing(engine):
    memory = engine.allocate(1 << 20)

    def turn():
        engine.write(memory, 0, b"abc")
        engine.wait(engine.record(False))
        engine.read(memory, 0, 3)

    turn()
    before = engine.objects_created
    for _ in range(100):
        turn()
    assert engine.objects_created == before


@needs_device
def test_out_of_memory(engine):
    import torch

    with pytest.raises((torch.OutOfMemoryError, RuntimeError), match="bytes"):
        engine.allocate(1 << 50)


SOURCE = """# warps: 4, stages: 3
import triton
import triton.language as tl


@triton.jit
def main_(x, y, wide, n, a):
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    v = tl.load(x + i, mask=i < n)
    tl.store(y + i, v * a + wide.to(tl.float32), mask=i < n)
"""


@needs_device
def test_kernel():
    """A kernel through torch's device: its parameter block has 64-bit and 32-bit scalars, and an odd number of the latter."""
    import torch

    from torch_spiral.kernels.kernel import Kernel
    from torch_spiral.kernels.triton_binary import compile_kernel, gpu_target

    engine = _C.engines.adapters("cuda")[0][0].open()
    kernel = Kernel(
        "axpy_test", SOURCE, "main_", "triton", (1, 1), ("i64", "i32", "f32"), (128, 1, 1), dtypes=("f32", "f32")
    )
    binary = compile_kernel(kernel, gpu_target(engine.properties))
    assert binary.threads == 128 and len(binary.image) > 1000
    compiled = engine.compile(
        {"name": "axpy_test", "source": binary.image, "entry": binary.entry, "workgroup": [128, 1, 1], "bindings": 0,
         "params_size": kernel.params_size, "shared_memory": binary.shared}
    )  # fmt: skip
    assert compiled.name == "axpy_test"
    assert torch.cuda.is_available() or torch.version.cuda is None


# ---- beside torch.cuda -----------------------------------------------------------------------------------------------


def gpu_of_both() -> str | None:
    """The spiral device that is cuda:0, where torch has CUDA too."""
    import torch

    if not torch.cuda.is_available():
        return None
    for i in range(torch.spiral.device_count()):
        p = torch.spiral.get_device_properties(i)
        if p.engine in ("cuda", "hip") and _C.device_properties(i)["ordinal"] == 0:
            return f"spiral:{i}"
    return None


@pytest.fixture
def both():
    found = gpu_of_both() if ADAPTERS else None
    if found is None:
        pytest.skip("no GPU that torch.cuda and the CUDA engine share")
    return found


def test_no_gpu_is_no_view():
    import torch

    if ADAPTERS:
        pytest.skip("the first device is a GPU")
    with pytest.raises(RuntimeError, match=r"no device of torch\.cuda"):
        torch.spiral.to_cuda(torch.ones(3, device="spiral"))
    with pytest.raises(RuntimeError, match="takes a strided CUDA tensor"):
        torch.spiral.from_cuda(torch.ones(3))
    with pytest.raises(RuntimeError, match="nothing to wait for"):
        torch.spiral.wait_for_cuda()


def test_copies_between_the_two(both):
    """Any strides and dtypes, on the GPU; each side's queued work comes first."""
    import torch

    x = torch.randn(1000, 300, device="cuda")
    for _ in range(20):
        x = x * 1.5 - x * 0.5  # queued, not waited for
    y = x.to(both)
    assert torch.equal(y.cpu(), x.cpu()) and torch.equal((y * 2).to("cuda"), x * 2)
    assert torch.equal(x.t().to(both).cpu(), x.t().cpu())
    assert torch.equal(x[::3, 5:].to(both, torch.float64).cpu(), x[::3, 5:].double().cpu())
    z = torch.zeros(300, 1000, device="cuda").t()
    z.copy_(y)
    assert torch.equal(z, x)


def test_views_share_memory(both):
    import torch

    x = torch.randn(128, 64, device="cuda")
    expected = (x * 3).cpu()
    view = torch.spiral.from_cuda(x[:, ::2])
    assert view.device == torch.device(both) and view.stride() == (64, 2)
    torch.spiral.from_cuda(x).mul_(3)
    torch.spiral.wait_for_cuda(both)
    assert torch.equal(x.cpu(), expected) and torch.equal(view.cpu(), expected[:, ::2])
    y = torch.ones(1000, device=both)
    other = torch.spiral.to_cuda(y)
    other.add_(torch.arange(1000, device="cuda"))
    torch.spiral.wait_for_cuda(both)
    assert torch.equal(y.cpu(), torch.arange(1000) + 1.0)
    del other
    assert torch.equal((y + 1).cpu(), torch.arange(1000) + 2.0)


def test_views_outlive_their_tensors(both):
    """torch's allocator gives the memory out again only after the spiral queue is done with it."""
    import torch

    for _ in range(20):
        x = torch.full((1 << 22,), 2.0, device="cuda")
        view = torch.spiral.from_cuda(x)
        del x
        total = (view * 3).sum()
        del view
        torch.empty(1 << 22, device="cuda").fill_(7.0)
        assert total.item() == 6.0 * (1 << 22)


def test_dlpack(both):
    import torch

    y = torch.arange(12.0, device=both).view(3, 4)
    z = torch.from_dlpack(y)
    assert z.is_cuda and torch.equal(z.cpu(), y.cpu())
    z.zero_()
    torch.spiral.wait_for_cuda(both)
    assert y.sum().item() == 0
