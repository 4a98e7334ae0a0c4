"""What is particular to the wgpu engine; tests/test_engine.py holds what every engine promises."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_spiral import _C


def library() -> str:
    spec = importlib.util.find_spec("wgpu")
    if spec is None or spec.origin is None:
        return ""
    found = [p for p in (Path(spec.origin).parent / "resources").glob("*wgpu_native*") if p.suffix != ".h"]
    return str(found[0]) if found else ""


ADAPTERS, WHY = _C.engines.adapters("wgpu", library())


@pytest.fixture(scope="module", params=range(len(ADAPTERS)), ids=lambda i: ADAPTERS[i].properties["name"].split()[0])
def engine(request):
    return ADAPTERS[request.param].open()


def test_there_is_an_adapter():
    assert ADAPTERS, WHY


def test_reasons_say_what_to_install():
    assert "pip install" in _C.engines.adapters("wgpu", "")[1]
    adapters, why = _C.engines.adapters("wgpu", "/nowhere/libwgpu.so")
    assert not adapters and "/nowhere/libwgpu.so" in why and "pip install" in why


def kernel(engine, body, declarations="", params="struct Params { n: u32, value: f32 }", **options):
    """A kernel over `x: array<f32>` of 64 invocations a workgroup; `i` is the invocation."""
    immediate = options.get("params_immediate", True)
    block = "var<immediate> p: Params;" if immediate else "@group(0) @binding(1) var<storage, read> p: Params;"
    source = f"""{params}
{block}
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
{declarations}
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {{ let i = id.x; {body} }}"""
    description = {"name": "test", "source": source, "entry": "main", "workgroup": [64, 1, 1], "bindings": 1}
    return engine.compile({"params_size": 8, **description, **options})


def floats(engine, memory):
    return np.frombuffer(engine.read(memory, 0, memory.size), np.float32)


ADD = "if (i < p.n) { x[i] += p.value; }"


@pytest.mark.parametrize("trusted", [False, True])
def test_batches_are_in_order(engine, trusted):
    # x = 2x + 1, 300 times mod a prime, is sensitive to order and to lost dispatches; 300 spans several submissions.
    k = kernel(engine, "if (i < p.n) { x[i] = (2.0 * x[i] + p.value) % 9973.0; }", trusted=trusted)
    memory = engine.allocate(400)
    engine.fill(memory, 0, 400, 0)
    want = 0.0
    for step in range(300):
        engine.enqueue(k, [memory], struct.pack("If", 100, step), [2, 1, 1])
        want = (2.0 * want + step) % 9973.0
    assert (floats(engine, memory) == want).all()


def test_writes_are_ordered_between_dispatches(engine):
    k = kernel(engine, ADD)
    memory = engine.allocate(4)
    kept = engine.allocate(4 * 200)
    for step in range(200):
        engine.write(memory, 0, struct.pack("f", step))
        engine.enqueue(k, [memory], struct.pack("If", 1, 0.5), [1, 1, 1])
        engine.copy(memory, 0, kept, 4 * step, 4)
    assert (floats(engine, kept) == np.arange(200) + 0.5).all()


def test_parameter_blocks_outlive_their_slots(engine):
    # More contents than the cache has slots, all queued without a wait: none may be overwritten before it is read.
    k = kernel(engine, "if (i == 0u) { x[p.n] = p.value; }", params_immediate=False)
    count = 3000
    memory = engine.allocate(4 * count)
    engine.fill(memory, 0, memory.size, 0)
    for i in range(count):
        engine.enqueue(k, [memory], struct.pack("If", i, i + 0.25), [1, 1, 1])
    assert (floats(engine, memory) == np.arange(count) + 0.25).all()


def test_changing_parameter_blocks_create_no_objects(engine):
    k = kernel(engine, ADD, params_immediate=False)
    memory = engine.allocate(4)
    engine.fill(memory, 0, 4, 0)

    def run(start):
        for i in range(start, start + 100):
            engine.enqueue(k, [memory], struct.pack("If", 1, i), [1, 1, 1])
        engine.synchronize()

    run(0)
    created = engine.objects_created
    run(100)  # new contents
    run(0)  # known ones
    assert engine.objects_created == created
    assert floats(engine, memory)[0] == sum(range(200)) + sum(range(100))


def test_small_writes_and_reads_create_no_objects(engine):
    memory = engine.allocate(1000)

    def run():
        for i in range(50):
            engine.write(memory, i, b"abcdefg"[: i % 8])
            engine.read(memory, i + 1, 13)
        engine.write(memory, 0, bytes(1000))
        engine.synchronize()

    run()
    created = engine.objects_created
    run()
    assert engine.objects_created == created


def test_freeing_memory_that_recorded_commands_use(engine):
    k = kernel(engine, ADD)
    result = engine.allocate(256)
    for i in range(20):
        memory = engine.allocate(256)
        engine.fill(memory, 0, 256, 0)
        engine.enqueue(k, [memory], struct.pack("If", 64, i), [1, 1, 1])
        engine.copy(memory, 0, result, 0, 256)
        engine.free(memory)
    assert (floats(engine, result) == 19).all()


def test_one_memory_in_two_bindings(engine):
    k = kernel(engine, "if (i < p.n) { y[i + 64u] = x[i] + p.value; }",
               "@group(0) @binding(1) var<storage, read_write> y: array<f32>;", bindings=2)  # fmt: skip
    memory = engine.allocate(512)
    engine.write(memory, 0, np.arange(128, dtype=np.float32))
    engine.enqueue(k, [memory, memory], struct.pack("If", 64, 1000), [1, 1, 1])
    assert (floats(engine, memory) == np.r_[np.arange(64), np.arange(64) + 1000]).all()


def test_every_alignment_of_copy_write_fill_and_read(engine):
    a = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8)
    source, memory = engine.allocate(64), engine.allocate(64)
    engine.write(source, 0, a)
    for to in range(5):
        for size in (0, 1, 2, 3, 4, 5, 7, 8, 11, 21):
            want = np.full(64, 0xEE, np.uint8)
            engine.fill(memory, 0, 64, 0xEE)
            engine.write(memory, to, a[:size].copy())
            want[to : to + size] = a[:size]
            engine.fill(memory, 32 + to, size, 0x5A)
            want[32 + to : 32 + to + size] = 0x5A
            assert (np.frombuffer(engine.read(memory, 0, 64), np.uint8) == want).all(), (to, size)
            assert engine.read(memory, to, size) == want[to : to + size].tobytes()
            for at in range(5):
                engine.copy(source, at, memory, to, size)
                engine.copy(memory, to, memory, 40 - to, size)
                want[to : to + size] = a[at : at + size]
                want[40 - to : 40 - to + size] = a[at : at + size]
                assert (np.frombuffer(engine.read(memory, 0, 64), np.uint8) == want).all(), (at, to, size)


def test_ranges_larger_than_a_binding(engine):
    limit = engine.properties["max_binding"]
    if limit > 1 << 28:
        pytest.skip("bindings of this device are too large for a quick test")
    size = 2 * limit + 2000
    memory = engine.allocate(size)
    engine.fill(memory, 3, size - 3, 9)
    engine.fill(memory, 0, 3, 1)
    piece = np.arange(1001, dtype=np.uint32).view(np.uint8)[1:]
    at = limit - 501  # crosses the edge of the first window
    engine.write(memory, at, piece)
    engine.copy(memory, at, memory, 2 * limit - 3003, len(piece))
    assert engine.read(memory, 2 * limit - 3003, len(piece)) == piece.tobytes()
    got = np.frombuffer(engine.read(memory, 0, size), np.uint8)
    assert (got[:3] == 1).all() and (got[3:at] == 9).all() and got[-1] == 9
    assert (got[at : at + len(piece)] == piece).all()


def test_overlapping_copies_are_refused(engine):
    memory = engine.allocate(64)
    with pytest.raises(RuntimeError, match="overlap"):
        engine.copy(memory, 0, memory, 8, 16)


def test_a_bad_kernel_leaves_the_device_usable(engine, tmp_path):
    for body, what in (("x[i] = undefined_name;", "undefined_name"), ("x[i] = 1u;", "test")):
        with pytest.raises(RuntimeError, match=what) as error:
            kernel(engine, body)
        saved = str(error.value).split("Source and log: ")[1].strip()
        assert body in Path(saved).read_text()
    with pytest.raises(RuntimeError, match="parameter block"):
        kernel(engine, ADD, params_size=engine.properties["max_params"] + 8)
    memory = engine.allocate(4)
    engine.fill(memory, 0, 4, 0)
    engine.enqueue(kernel(engine, ADD), [memory], struct.pack("If", 1, 3), [1, 1, 1])
    assert floats(engine, memory)[0] == 3


def test_grids_beyond_the_limit_are_refused(engine):
    k = kernel(engine, ADD)
    memory = engine.allocate(4)
    with pytest.raises(RuntimeError, match="per dimension"):
        engine.enqueue(k, [memory], struct.pack("If", 1, 3), [engine.properties["max_workgroups"] + 1, 1, 1])
    engine.fill(memory, 0, 4, 0)
    engine.enqueue(k, [memory], struct.pack("If", 1, 3), [0, 1, 1])  # nothing to do
    assert floats(engine, memory)[0] == 0


def test_loops_are_not_cut_short(engine):
    # Mesa before 24 stops after 65,535 iterations; such a device must not be offered.
    k = kernel(engine, "if (i == 0u) { var s = 0.0; for (var j = 0u; j < p.n; j++) { s += p.value; } x[0] = s; }")
    memory = engine.allocate(4)
    engine.enqueue(k, [memory], struct.pack("If", 200_000, 1), [1, 1, 1])
    assert floats(engine, memory)[0] == 200_000


def test_subgroup_size_is_true(engine):
    low, high = engine.properties["subgroup_min"], engine.properties["subgroup_max"]
    if low == 0:
        pytest.skip("no subgroup operations")
    source = """@group(0) @binding(0) var<storage, read_write> x: array<u32>;
@compute @workgroup_size(128)
fn main(@builtin(local_invocation_index) i: u32, @builtin(subgroup_size) size: u32) {
  let sum = subgroupAdd(1u);
  if (i == 0u) { x[0] = size; x[1] = sum; }
}"""
    k = engine.compile({"name": "subgroup", "source": source, "entry": "main", "workgroup": [128, 1, 1], "bindings": 1})
    memory = engine.allocate(8)
    engine.enqueue(k, [memory], b"", [1, 1, 1])
    _size, total = struct.unpack("II", engine.read(memory, 0, 8))
    assert low <= total <= high
    if low == high:
        assert total == low


def test_allocations_beyond_the_limit_are_out_of_memory(engine):
    with pytest.raises(torch.OutOfMemoryError, match="allows"):
        engine.allocate(engine.properties["max_allocation"] + 1)


def test_reads_are_handed_over_by_synchronize(engine):
    k = kernel(engine, ADD)
    memory = engine.allocate(4)
    engine.fill(memory, 0, 4, 0)
    results = [np.full(1, np.nan, np.float32) for _ in range(30)]
    for result in results:
        engine.enqueue(k, [memory], struct.pack("If", 1, 1), [1, 1, 1])
        engine.read_async(memory, 0, result)
    engine.synchronize()
    assert [r[0] for r in results] == list(range(1, 31))


def test_timed_events(engine):
    k = kernel(engine, "if (i == 0u) { for (var j = 0u; j < p.n; j++) { x[0] += p.value; } }")
    memory = engine.allocate(4)
    engine.fill(memory, 0, 4, 0)

    def milliseconds(iterations):
        start = engine.record(timed=True)
        engine.enqueue(k, [memory], struct.pack("If", iterations, 1), [1, 1, 1])
        end = engine.record(timed=True)
        engine.wait(end)
        assert engine.query(end)
        return engine.elapsed_ms(start, end)

    milliseconds(10)
    assert milliseconds(2_000_000) > 2 * min(milliseconds(1000) for _ in range(5)) > 0
