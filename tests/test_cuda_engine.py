"""The CUDA and HIP engine by itself: memory, copies, events, kernels. Skipped where no such device is."""

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
    kernel = Kernel("axpy_test", SOURCE, "main_", "triton", (1, 1), ("i64", "i32", "f32"), (128, 1, 1), dtypes=("f32", "f32"))
    binary = compile_kernel(kernel, gpu_target(engine.properties))
    assert binary.threads == 128 and len(binary.image) > 1000
    compiled = engine.compile(
        {"name": "axpy_test", "source": binary.image, "entry": binary.entry, "workgroup": [128, 1, 1], "bindings": 0,
         "params_size": kernel.params_size, "shared_memory": binary.shared}
    )  # fmt: skip
    assert compiled.name == "axpy_test"
    assert torch.cuda.is_available() or torch.version.cuda is None
