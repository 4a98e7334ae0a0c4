"""What every engine promises (csrc/runtime/engine.h), on every adapter that is found."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_spiral import _C


def library(engine: str) -> str:
    """The path of the engine's library where it isn't one that the dynamic loader finds by name."""
    spec = importlib.util.find_spec("wgpu") if engine == "wgpu" else None
    if spec is None or spec.origin is None:
        return ""
    return str(next(p for p in (Path(spec.origin).parent / "resources").glob("*wgpu_native*") if p.suffix != ".h"))


ENGINES = ("opencl", "wgpu", "cuda")
FOUND = {name: _C.engines.adapters(name, library(name) if name == "wgpu" else "") for name in ENGINES}
ADAPTERS = [(name, adapter) for name in ENGINES for adapter in FOUND[name][0]]


def adapter_id(pair) -> str:
    return f"{pair[0]}-{pair[1].properties['name'].split()[0]}"


@pytest.fixture(scope="module", params=ADAPTERS, ids=adapter_id)
def engine(request):
    return request.param[1].open()


# One kernel in each language: out[i] = a * x[i] + y[i] by one workgroup of one invocation. Block: offsets in elements
# of x, y and out, then n (u32) and a (f32).
AXPY = {
    "opencl": """
        typedef struct { ulong x, y, out; uint n; float a; } Params;
        __kernel __attribute__((reqd_work_group_size(1, 1, 1)))
        void axpy(__global const float* x, __global const float* y, __global float* out, const Params p) {
          for (uint i = 0; i < p.n; i++) out[p.out + i] = p.a * x[p.x + i] + y[p.y + i];
        }""",
    "wgsl": """
        struct Params { x: u32, y: u32, out: u32, n: u32, a: f32 }
        var<immediate> p: Params;
        @group(0) @binding(0) var<storage, read_write> x: array<f32>;
        @group(0) @binding(1) var<storage, read_write> y: array<f32>;
        @group(0) @binding(2) var<storage, read_write> out: array<f32>;
        @compute @workgroup_size(1) fn axpy() {
          for (var i = 0u; i < p.n; i++) { out[p.out + i] = p.a * x[p.x + i] + y[p.y + i]; }
        }""",
}
AXPY_BLOCK = {"opencl": "<QQQIf", "wgsl": "<IIIIf"}


def language(engine) -> str:
    language = engine.properties["language"]
    if language not in AXPY:
        pytest.skip(f"no test kernels in {language}")
    return language


def compile_axpy(engine):
    return engine.compile(
        {
            "name": "test_axpy",
            "source": AXPY[language(engine)],
            "entry": "axpy",
            "bindings": 3,
            "params_size": struct.calcsize(AXPY_BLOCK[language(engine)]),
        }
    )


def axpy_block(engine, x=0, y=0, out=0, n=0, a=0.0) -> bytes:
    return struct.pack(AXPY_BLOCK[language(engine)], x, y, out, n, a)


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes()


def test_an_engine_is_found_or_says_why():
    for name, (adapters, why) in FOUND.items():
        assert adapters or why, name
    assert ADAPTERS, {name: why for name, (_, why) in FOUND.items()}


def test_missing_library_is_a_reason_not_an_error():
    adapters, why = _C.engines.adapters("opencl", "/nowhere/libOpenCL.so")
    assert adapters == [] and "/nowhere/libOpenCL.so" in why and "nstall" in why


def test_unknown_engine():
    with pytest.raises(ValueError, match="no such engine"):
        _C.engines.adapters("abacus")


def test_properties_are_plausible(engine):
    p = engine.properties
    assert p["engine"] in ENGINES and p["name"] and p["driver"]
    assert 0 < p["max_binding"] <= p["max_allocation"]
    assert p["max_workgroup_size"] >= 64 and p["max_workgroup_memory"] >= 16384 and p["max_workgroups"] >= 65535
    assert p["max_params"] >= 64 and p["max_bindings"] >= 4 and p["compute_units"] >= 1
    assert p["subgroup_min"] <= p["subgroup_max"]
    if p["type"] == "cpu" and p["engine"] == "opencl":
        assert p["schedule_class"] == "vector"


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 63, 255, 257])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 7, 64, 1001])
def test_write_read_round_trip(engine, offset, size):
    memory = engine.allocate(2048)
    around = bytearray(random_bytes(2048))
    engine.write(memory, 0, around)
    data = random_bytes(size)
    engine.write(memory, offset, data)
    around[offset : offset + size] = data
    assert engine.read(memory, offset, size) == data
    assert engine.read(memory, 0, 2048) == around


def test_written_data_is_consumed_on_return(engine):
    """Whether it is small enough to be staged or not."""
    for size in (4096, 8 << 20):
        memory = engine.allocate(size)
        data = np.full(size, 1, np.uint8)
        engine.write(memory, 0, data)
        data[:] = 2
        assert engine.read(memory, 0, size) == b"\1" * size


def test_more_writes_than_staging_memory(engine):
    """Staging memory is reused only when the device has read it."""
    size, count = 3 << 20, 12
    memory = engine.allocate(size * count)
    for i in range(count):
        engine.write(memory, i * size, np.full(size, i, np.uint8))
    result = np.frombuffer(engine.read(memory, 0, size * count), np.uint8).reshape(count, size)
    assert (result == np.arange(count, dtype=np.uint8)[:, None]).all()


@pytest.mark.parametrize(
    "source,target,size", [(0, 0, 1024), (1, 0, 7), (0, 1, 7), (3, 6, 501), (5, 257, 4), (4, 8, 64), (9, 9, 0)]
)
def test_copy(engine, source, target, size):
    a, b = engine.allocate(1024), engine.allocate(1024)
    data, expected = random_bytes(1024), bytearray(random_bytes(1023) + b"x")
    engine.write(a, 0, data)
    engine.write(b, 0, expected)
    engine.copy(a, source, b, target, size)
    expected[target : target + size] = data[source : source + size]
    assert engine.read(b, 0, 1024) == expected
    assert engine.read(a, 0, 1024) == data


def test_copy_within_one_memory(engine):
    memory = engine.allocate(1024)
    data = bytearray(random_bytes(1024))
    engine.write(memory, 0, data)
    engine.copy(memory, 3, memory, 600, 333)
    data[600:933] = data[3:336]
    assert engine.read(memory, 0, 1024) == data


@pytest.mark.parametrize(
    "offset,size", [(0, 1024), (0, 1), (1, 1), (3, 2), (5, 511), (4, 8), (16, 32), (1023, 1), (7, 0)]
)
@pytest.mark.parametrize("value", [0, 0xA5])
def test_fill(engine, offset, size, value):
    memory = engine.allocate(1024)
    data = bytearray(random_bytes(1024))
    engine.write(memory, 0, data)
    engine.fill(memory, offset, size, value)
    data[offset : offset + size] = bytes([value]) * size
    assert engine.read(memory, 0, 1024) == data


def test_beyond_4_gib(engine):
    """Sizes and offsets are 64 bits wide all the way down."""
    size = (5 << 30) + 3
    if engine.properties["type"] != "discrete_gpu" or engine.properties["max_allocation"] < size:
        pytest.skip("for GPUs with room")
    a, b = engine.allocate(size), engine.allocate(size)
    engine.fill(a, 0, size, 1)
    engine.fill(b, 0, size, 2)
    engine.fill(a, size - 9, 5, 3)
    engine.write(a, size - 2, b"xy")
    assert engine.read(a, size - 12, 12) == b"\1" * 3 + b"\3" * 5 + b"\1\1xy"
    for middle in (0, 1 << 31, (1 << 32) - 8, 1 << 32):
        assert engine.read(a, middle, 16) == b"\1" * 16
    engine.copy(a, 0, b, 0, size)
    for middle in (0, (1 << 31) - 8, (1 << 32) - 8, size - 12):
        assert engine.read(b, middle, 12) == engine.read(a, middle, 12)
    engine.copy(a, (1 << 32) + 5, b, 7, 100)
    assert engine.read(b, 0, 120) == b"\1" * 120


def test_read_async(engine):
    memory = engine.allocate(1 << 16)
    data = random_bytes(1 << 16)
    engine.write(memory, 0, data)
    out = bytearray(1000)
    engine.read_async(memory, 33, out)
    engine.fill(memory, 0, 1 << 16, 0)  # comes after it
    engine.synchronize()
    assert out == data[33:1033]


def test_ranges_are_checked(engine):
    memory, other = engine.allocate(64), engine.allocate(64)
    for call in (
        lambda: engine.write(memory, 60, b"12345"),
        lambda: engine.write(memory, 2**64 - 4, b"12345678"),
        lambda: engine.fill(memory, 65, 1, 0),
        lambda: engine.copy(memory, 0, other, 1, 64),
        lambda: engine.read_async(memory, 1, bytearray(64)),
    ):
        with pytest.raises(RuntimeError, match="64"):
            call()


def test_freed_memory_is_refused(engine):
    memory = engine.allocate(64)
    engine.free(memory)
    with pytest.raises(ValueError, match="freed"):
        engine.read(memory, 0, 4)


def test_memory_may_be_freed_while_it_is_in_use(engine):
    """free() takes effect after the work queued so far."""
    kernel = compile_axpy(engine)
    n = 10000
    out = engine.allocate(4 * n)
    for i in range(20):
        x, y = engine.allocate(4 * n), engine.allocate(4 * n)
        engine.write(x, 0, np.full(n, i, np.float32))
        engine.write(y, 0, np.arange(n, dtype=np.float32))
        engine.enqueue(kernel, [x, y, out], axpy_block(engine, n=n, a=3.0), (1, 1, 1))
        engine.free(x)
        engine.free(y)
        result = np.frombuffer(engine.read(out, 0, 4 * n), np.float32)
        np.testing.assert_array_equal(result, 3 * i + np.arange(n, dtype=np.float32))


def test_out_of_memory_and_on(engine):
    with pytest.raises(torch.OutOfMemoryError):
        engine.allocate(1 << 60)
    memory = engine.allocate(16)
    engine.write(memory, 0, b"still works here")
    assert engine.read(memory, 0, 16) == b"still works here"


def test_a_kernel_with_offsets_and_changing_arguments(engine):
    kernel = compile_axpy(engine)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 500)).astype(np.float32)
    memories = [engine.allocate(2048) for _ in range(4)]
    engine.write(memories[0], 4 * 3, x)
    engine.write(memories[1], 4 * 5, y)
    for out in (2, 3, 2):  # arguments are rebound
        for n, a in ((500, 2.0), (1, -1.0), (499, 0.5)):
            engine.fill(memories[out], 0, 2048, 0xFF)
            block = axpy_block(engine, 3, 5, 7, n, a)
            engine.enqueue(kernel, [memories[0], memories[1], memories[out]], block, (1, 1, 1))
            got = np.frombuffer(engine.read(memories[out], 0, 2048), np.float32)
            np.testing.assert_allclose(got[7 : 7 + n], np.float32(a) * x[:n] + y[:n], rtol=1e-6, atol=1e-6)
            assert np.isnan(got[:7]).all() and np.isnan(got[7 + n :]).all()


def test_no_groups_nothing_to_do(engine):
    kernel = compile_axpy(engine)
    memories = [engine.allocate(64) for _ in range(3)]
    engine.fill(memories[2], 0, 64, 7)
    for groups in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        engine.enqueue(kernel, memories, axpy_block(engine, n=16, a=1.0), groups)
    assert engine.read(memories[2], 0, 64) == b"\7" * 64


def test_groups_in_three_dimensions(engine):
    """Each workgroup adds one to a cell of its own: every one runs, once."""
    source = {
        "opencl": """
            __kernel __attribute__((reqd_work_group_size(2, 1, 1))) void count(__global uint* out) {
              uint cell = (get_group_id(2) * get_num_groups(1) + get_group_id(1)) * get_num_groups(0) + get_group_id(0);
              if (get_local_id(0) == 1) out[cell] += 1 + get_local_size(0) * get_local_size(1);
            }""",
        "wgsl": """
            @group(0) @binding(0) var<storage, read_write> out: array<u32>;
            @compute @workgroup_size(2, 1, 1)
            fn count(@builtin(workgroup_id) g: vec3u, @builtin(num_workgroups) n: vec3u,
                     @builtin(local_invocation_index) l: u32) {
              if (l == 1u) { out[(g.z * n.y + g.y) * n.x + g.x] += 3u; }
            }""",
    }[language(engine)]
    kernel = engine.compile(
        {"name": "test_count", "source": source, "entry": "count", "bindings": 1, "workgroup": [2, 1, 1]}
    )
    memory = engine.allocate(4 * 3 * 5 * 7)
    for groups in ((3, 1, 1), (3, 5, 1), (3, 5, 7), (1, 1, 7)):
        cells = int(np.prod(groups))
        engine.fill(memory, 0, memory.size, 0)
        engine.enqueue(kernel, [memory], b"", groups)
        got = np.frombuffer(engine.read(memory, 0, memory.size), np.uint32)
        assert (got[:cells] == 3).all() and (got[cells:] == 0).all()


@pytest.mark.parametrize("immediate", [True, False])
def test_parameters_of_every_kind(engine, immediate):
    """The block's layout (docs/interfaces.md): offsets, 64-bit scalars, 32-bit scalars; stored as words."""
    if language(engine) == "opencl":
        if not immediate:
            pytest.skip("an OpenCL block is always an argument")
        source = """
            typedef struct { ulong offset; long i; ulong d; int j; uint u; float f; } Params;
            __kernel void dump(__global uint* out, const Params p) {
              __global uint* o = out + p.offset;
              o[0] = (uint)p.i; o[1] = (uint)(p.i >> 32); o[2] = (uint)p.d; o[3] = (uint)(p.d >> 32);
              o[4] = as_uint(p.j); o[5] = p.u; o[6] = as_uint(p.f);
            }"""
        head = "<Q"
    else:
        variable = "var<immediate> p: Params;" if immediate else "@group(0) @binding(1) var<storage, read> p: Params;"
        source = f"""
            struct Params {{ offset: u32, i0: u32, i1: u32, d0: u32, d1: u32, j: i32, u: u32, f: f32 }}
            {variable}
            @group(0) @binding(0) var<storage, read_write> out: array<u32>;
            @compute @workgroup_size(1) fn dump() {{
              let o = p.offset;
              out[o] = p.i0; out[o + 1] = p.i1; out[o + 2] = p.d0; out[o + 3] = p.d1;
              out[o + 4] = bitcast<u32>(p.j); out[o + 5] = p.u; out[o + 6] = bitcast<u32>(p.f);
            }}"""
        head = "<I"
    size = struct.calcsize(head) + 28 + (4 if head == "<Q" else 0)  # padded to the block's granularity
    kernel = engine.compile(
        {
            "name": f"test_dump_{immediate}",
            "source": source,
            "entry": "dump",
            "bindings": 1,
            "params_size": size,
            "params_immediate": immediate,
        }
    )
    memory = engine.allocate(256)
    blocks = [
        struct.pack("<qdiIf", -(2**40) - 5, 1e300, -7, 2**32 - 1, -0.0),
        struct.pack("<qdiIf", 2**63 - 1, float("nan"), 2**31 - 1, 3, float("inf")),
    ]
    for offset, scalars in ((0, blocks[0]), (11, blocks[1]), (0, blocks[1])):
        engine.fill(memory, 0, 256, 0)
        engine.enqueue(kernel, [memory], (struct.pack(head, offset) + scalars).ljust(size, b"\0"), (1, 1, 1))
        assert engine.read(memory, 4 * offset, 28) == scalars
        assert engine.read(memory, 4 * offset + 28, 8) == bytes(8)


def test_queued_launches_keep_their_own_parameters(engine):
    """A block is copied when it is enqueued."""
    kernel = compile_axpy(engine)
    x, y, out = (engine.allocate(4096) for _ in range(3))
    engine.write(x, 0, np.ones(1000, np.float32))
    engine.fill(y, 0, 4096, 0)
    for i in range(1000):
        engine.enqueue(kernel, [x, y, out], axpy_block(engine, out=i, n=1, a=float(i)), (1, 1, 1))
    np.testing.assert_array_equal(
        np.frombuffer(engine.read(out, 0, 4000), np.float32), np.arange(1000, dtype=np.float32)
    )


def test_wrong_launches_are_refused(engine):
    kernel = compile_axpy(engine)
    memory = engine.allocate(64)
    with pytest.raises(ValueError, match="3 buffers"):
        engine.enqueue(kernel, [memory], axpy_block(engine), (1, 1, 1))
    with pytest.raises(ValueError, match="parameter block"):
        engine.enqueue(kernel, [memory] * 3, b"", (1, 1, 1))


def test_compile_error_names_kernel_and_saves_source(engine):
    broken = AXPY[language(engine)].replace("p.a * x", "no_such_thing * x")
    with pytest.raises(RuntimeError, match="test_broken") as error:
        engine.compile({"name": "test_broken", "source": broken, "entry": "axpy", "bindings": 3, "params_size": 32})
    assert "no_such_thing" in str(error.value)
    path = Path(str(error.value).rsplit(" ", 1)[1].strip())
    saved = path.read_text()
    assert broken in saved and "test_broken" in saved
    # The engine goes on.
    compile_axpy(engine)


def test_events(engine):
    if not engine.properties["timestamps"]:
        pytest.skip("no timestamps")
    kernel = compile_axpy(engine)
    memories = [engine.allocate(4 << 16) for _ in range(3)]
    block = axpy_block(engine, n=1 << 16, a=1.0)
    engine.enqueue(kernel, memories, block, (1, 1, 1))
    engine.synchronize()
    began = time.perf_counter()
    start = engine.record(timed=True)
    engine.enqueue(kernel, memories, block, (1, 1, 1), 20)
    end = engine.record(timed=True)
    engine.wait(end)
    wall = (time.perf_counter() - began) * 1e3
    assert engine.query(start) and engine.query(end)
    assert 0 < engine.elapsed_ms(start, end) <= wall
    assert engine.elapsed_ms(end, start) == -engine.elapsed_ms(start, end)
    with pytest.raises(RuntimeError, match="recorded with timing"):
        engine.elapsed_ms(engine.record(), end)


def test_enqueueing_is_asynchronous(engine):
    """Launches are queued long before they are done, as many as the engine lets be in flight."""
    kernel = compile_axpy(engine)
    # lavapipe blocks a submission until the one before is done: no more than two of them. NVIDIA's OpenCL queues
    # about a thousand launches.
    groups = (2, 1, 1)  # both write all: a single one may run on the calling thread
    launches = 10000 if engine.properties["schedule_class"] == "vector" else 250
    n = 1 << 10
    memories = [engine.allocate(4 << 20) for _ in range(3)]
    while True:  # until all launches take a second or so; the shortest of three, as a busy machine delays some
        block = axpy_block(engine, n=n, a=1.0)
        engine.enqueue(kernel, memories, block, groups)
        times = []
        for _ in range(3):
            engine.synchronize()
            began = time.perf_counter()
            engine.enqueue(kernel, memories, block, groups, 100)
            engine.synchronize()
            times.append(time.perf_counter() - began)
        if min(times) > 100 / launches or n == 1 << 20:
            break
        n *= 2
    began = time.perf_counter()
    engine.enqueue(kernel, memories, block, groups, launches)
    event = engine.record()
    queued = time.perf_counter() - began
    assert not engine.query(event)
    engine.wait(event)
    total = time.perf_counter() - began
    assert engine.query(event)
    assert queued < 0.5 * total, f"{queued:.3f} of {total:.3f} s"


def test_launches_of_one_workgroup_keep_the_order(engine):
    """On PoCL the calling thread runs them where nothing is queued, and other threads where something is."""
    kernel = compile_axpy(engine)
    n = 1 << 18
    x, y, z = (engine.allocate(4 * n) for _ in range(3))
    engine.write(y, 0, np.ones(n, np.float32))

    few, all_ = (lambda a: axpy_block(engine, n=2, a=a)), (lambda a: axpy_block(engine, n=n, a=a))
    for start in range(3):
        engine.fill(x, 0, 4 * n, 0)
        engine.enqueue(kernel, [x, y, z], few(0.0), (1, 1, 1))  # z[:2] = 1
        assert (np.frombuffer(engine.read(z, 0, 8), np.float32) == 1).all()
        engine.enqueue(kernel, [x, y, z], all_(0.0), (2, 1, 1))  # z = 1
        engine.enqueue(kernel, [z, y, x], few(2.0), (1, 1, 1))  # x[:2] = 3, must wait for it
        engine.copy(x, 0, x, 4 * (n - 1), 4)  # x[-1] = 3
        engine.write(y, 0, np.full(1, start, np.float32))  # y[0] = start
        engine.enqueue(kernel, [x, y, z], all_(1.0), (2, 1, 1))
        result = np.frombuffer(engine.read(z, 0, 4 * n), np.float32)
        assert (result[[0, 1, 2, -1]] == [3 + start, 4, 1, 4]).all()
        engine.write(y, 0, np.ones(1, np.float32))
    if engine.properties["timestamps"]:
        start = engine.record(timed=True)
        for _ in range(10):
            engine.enqueue(kernel, [x, y, z], all_(0.0), (1, 1, 1))
        end = engine.record(timed=True)
        engine.synchronize()
        # One processor cannot read and write 30 MB in less: the events enclose what was enqueued between them.
        assert engine.elapsed_ms(start, end) > 0.05


def test_an_event_needs_no_explicit_flush(engine):
    event = engine.record()
    deadline = time.monotonic() + 30
    while not engine.query(event):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_steady_state_creates_no_objects(engine):
    kernel = compile_axpy(engine)
    memories = [engine.allocate(4096) for _ in range(4)]

    def step(i):
        engine.write(memories[0], 0, struct.pack("<f", i))
        engine.enqueue(kernel, memories[:3], axpy_block(engine, n=100, a=2.0), (1, 1, 1))
        engine.copy(memories[2], 0, memories[3], 0, 400)
        engine.fill(memories[1], 4, 16, 0)
        return engine.read(memories[3], 0, 4)

    for i in range(10):
        step(i)
    created = engine.objects_created
    for i in range(200):
        assert step(i)[:0] == b""
    assert engine.objects_created == created


def run_python(code: str, **environment: str) -> str:
    prelude = (
        f"import sys; sys.path[:0] = {[str(Path(_C.__file__).parents[1]), str(Path(__file__).parent)]!r}\n"
        "import test_engine as t\nfrom test_engine import _C\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


needs_opencl = pytest.mark.skipif(not FOUND["opencl"][0], reason="no OpenCL device")

USE_CACHE = """
    import os
    from pathlib import Path
    directory = Path(os.environ["SPIRAL_CACHE_DIR"])
    engine = t.FOUND["opencl"][0][0].open()
    memories = [engine.allocate(64) for _ in range(3)]
    for m in memories: engine.write(m, 0, t.np.arange(16, dtype=t.np.float32))

    def run():
        engine.enqueue(t.compile_axpy(engine), memories, t.axpy_block(engine, n=16, a=2.0), (1, 1, 1))
        assert t.np.frombuffer(engine.read(memories[2], 0, 64), t.np.float32).sum() == 360
        return sorted(directory.rglob("*.kernel"))
"""


@needs_opencl
def test_kernel_cache(tmp_path):
    """Written once, privately; read back; a damaged entry is rebuilt; SPIRAL_CACHE=0 leaves the directory alone."""
    code = (
        USE_CACHE
        + """
    os.environ["SPIRAL_CACHE"] = "0"
    assert run() == []
    del os.environ["SPIRAL_CACHE"]
    [entry] = run()
    assert directory.stat().st_mode & 0o777 == 0o700
    written = entry.stat().st_mtime_ns
    assert run() == [entry] and entry.stat().st_mtime_ns == written, "not read back"
    good = entry.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    wrong_key = good[:8] + bytes(32) + good[40:]
    for damaged in (bytes(flipped), good[:-1], good[:40], b"", good + b"x", bytes(len(good)), wrong_key):
        entry.write_bytes(damaged)
        assert run() == [entry]
        assert entry.read_bytes() != damaged, "believed"
    assert not list(directory.rglob("*.tmp"))
    """
    )
    run_python(code, SPIRAL_CACHE_DIR=str(tmp_path / "cache"))


@needs_opencl
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_a_cache_that_others_may_write_to_is_not_used(tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(0o777)
    run_python(USE_CACHE + "    assert run() == []\n", SPIRAL_CACHE_DIR=str(directory))
    assert not list(directory.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_error_and_does_not_hang(engine):
    memory = engine.allocate(64)
    engine.write(memory, 0, b"parent")
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        messages = []
        for call in (
            lambda: engine.allocate(64),
            lambda: engine.read(memory, 0, 4),
            lambda: engine.write(memory, 0, b"child!"),
            lambda: engine.synchronize(),
            lambda: engine.compile(
                {"name": "test_empty", "source": "", "entry": "none", "bindings": 0, "params_size": 0}
            ),
        ):
            try:
                call()
                messages.append("no error")
            except RuntimeError as error:  # noqa: PERF203
                messages.append("ok" if "fork" in str(error) and "spawn" in str(error) else str(error))
        os.write(writable, "; ".join(messages).encode())
        os._exit(0)
    os.close(writable)
    try:
        ready, _, _ = select.select([readable], [], [], 30)
        assert ready, "the child hangs"
        assert os.read(readable, 10000).decode() == "; ".join(["ok"] * 5)
    finally:
        os.close(readable)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert engine.read(memory, 0, 6) == b"parent"
