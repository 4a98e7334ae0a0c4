"""Runs a Kernel on NumPy arrays through pyopencl or wgpu-py, so that kernels are tested without the runtime."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np

from torch_spiral.kernels import Kernel, Target

VULKAN_FEATURES = (
    "shader-int64", "shader-f64", "subgroup", "immediates",
    "shader-int64-atomic-all-ops", "shader-int64-atomic-min-max", "shader-float32-atomic",
)  # fmt: skip


@cache
def _opencl() -> tuple[Any, Any]:
    import pyopencl as cl

    device = cl.get_platforms()[0].get_devices()[0]
    context = cl.Context([device])
    return context, cl.CommandQueue(context)


@cache
def _opencl_program(source: str) -> Any:
    import pyopencl as cl

    try:
        return cl.Program(_opencl()[0], source).build()
    except cl.RuntimeError as e:
        raise RuntimeError(f"{e}\n{_numbered(source)}") from None


@cache
def _wgpu() -> Any:
    import wgpu

    for adapter in wgpu.gpu.enumerate_adapters_sync():
        if adapter.info["backend_type"] == "Vulkan":
            features = [f for f in VULKAN_FEATURES if f in adapter.features]
            limits = {
                k: adapter.limits[k]
                for k in ("max-storage-buffers-per-shader-stage", "max-storage-buffer-binding-size", "max-buffer-size")
            }
            limits["max-immediate-size"] = 128
            return adapter.request_device_sync(required_features=features, required_limits=limits)
    return None


def targets() -> dict[str, Target]:
    """Targets that this machine can run, by a name for test ids."""
    found: dict[str, Target] = {}
    try:
        import pyopencl as cl

        device = cl.get_platforms()[0].get_devices()[0]
        common: dict[str, Any] = {
            "language": "opencl", "engine": "opencl", "float64": True, "int64": True, "int64_atomics": True,
            "max_workgroup_size": device.max_work_group_size, "max_workgroup_memory": device.local_mem_size,
            "max_workgroups": 1 << 62, "max_params": 1024, "max_binding": 1 << 62,
            "compute_units": device.max_compute_units,
        }  # fmt: skip
        found["opencl-vector"] = Target(schedule_class="vector", **common)
        found["opencl-simt"] = Target(schedule_class="simt", **common)
    except Exception:
        pass
    try:
        device = _wgpu()
    except Exception:
        device = None
    if device is not None:
        common = {
            "language": "wgsl",
            "schedule_class": "simt",
            "engine": "wgpu",
            "max_workgroup_size": 256,
            "max_workgroup_memory": 16384,
        }
        found["wgsl"] = Target(
            **common,
            int64="shader-int64" in device.features,
            float64="shader-f64" in device.features,
            int64_atomics="shader-int64-atomic-all-ops" in device.features,
            subgroup=8 if "subgroup" in device.features else 0,
        )
        found["wgsl-bare"] = Target(**common, int64=False, float64=False)  # nothing optional
    return found


def _numbered(source: str) -> str:
    return "\n".join(f"{i + 1:4} {line}" for i, line in enumerate(source.split("\n")))


def params(kernel: Kernel, offsets: list[int], scalars: list[Any]) -> bytes:
    """The parameter block of a launch (docs/interfaces.md section 2)."""
    wgsl = kernel.language == "wgsl"
    block = b"".join(struct.pack("<I" if wgsl else "<Q", o) for o in offsets)
    code = {"i64": "<q", "f64": "<d", "i32": "<i", "u32": "<I", "f32": "<f"}
    assert len(scalars) == len(kernel.scalars), (scalars, kernel.scalars)
    for value, kind in zip(scalars, kernel.scalars, strict=False):
        block += struct.pack(code[kind], value)
    block += b"\0" * (kernel.params_size - len(block))
    assert len(block) == kernel.params_size
    return block


def run(
    kernel: Kernel,
    arrays: list[np.ndarray],
    scalars: list[Any] = (),
    groups: tuple[int, int, int] | int = 1,
    offsets: list[int] | None = None,
) -> list[np.ndarray]:
    """Launches once and returns the buffers' contents after, with the dtypes and shapes of `arrays`. With errors, the
    last result is the error buffer (two uint32). An array is bytes of its buffer: bf16 goes as uint16."""
    if isinstance(groups, int):
        groups = (groups, 1, 1)
    while groups[0] > 65535:
        groups = (-(-groups[0] // 2), groups[1] * 2, groups[2])
    offsets = list(offsets or [0] * len(arrays))
    arrays = [np.ascontiguousarray(a) for a in arrays]
    block = params(kernel, offsets, list(scalars))
    if kernel.errors:
        arrays.append(np.zeros(2, np.uint32))
    raw = [a.tobytes() for a in arrays]
    raw = [r + b"\0" * ((-len(r)) % 16 or 16 * (not r)) for r in raw]
    out = (_run_wgsl if kernel.language == "wgsl" else _run_opencl)(kernel, raw, block, groups)
    return [np.frombuffer(r[: a.nbytes], a.dtype).reshape(a.shape).copy() for r, a in zip(out, arrays, strict=False)]


def _run_opencl(kernel: Kernel, raw: list[bytes], block: bytes, groups: tuple[int, ...]) -> list[bytes]:
    import pyopencl as cl

    context, queue = _opencl()
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
    buffers = [cl.Buffer(context, flags, hostbuf=np.frombuffer(r, np.uint8)) for r in raw]
    function = cl.Kernel(_opencl_program(kernel.source), kernel.entry)
    function.set_args(*buffers, np.frombuffer(block, np.uint8))
    cl.enqueue_nd_range_kernel(
        queue, function, [g * w for g, w in zip(groups, kernel.workgroup, strict=False)], kernel.workgroup
    )
    out = []
    for b, r in zip(buffers, raw, strict=False):
        a = np.empty(len(r), np.uint8)
        cl.enqueue_copy(queue, a, b)
        out.append(a.tobytes())
    return out


_pipelines: dict[tuple[str, int, bool], Any] = {}


def _run_wgsl(kernel: Kernel, raw: list[bytes], block: bytes, groups: tuple[int, ...]) -> list[bytes]:
    import wgpu

    device = _wgpu()
    usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
    buffers = [device.create_buffer_with_data(data=r, usage=usage) for r in raw]
    windows = list(kernel.windows) + [1] * kernel.errors
    bindings: list[tuple[Any, int, int]] = []
    for b, r, n in zip(buffers, raw, windows, strict=False):
        size = -(-len(r) // n // 256) * 256 if n > 1 else len(r)
        bindings += [(b, i * size, min(size, len(r) - i * size)) for i in range(n)]
    n_storage = len(bindings)
    if not kernel.immediate:
        bindings.append((device.create_buffer_with_data(data=block, usage=usage), 0, len(block)))
    key = (kernel.source, n_storage, kernel.immediate)
    if key not in _pipelines:
        layout = device.create_bind_group_layout(
            entries=[
                {
                    "binding": i,
                    "visibility": wgpu.ShaderStage.COMPUTE,
                    "buffer": {"type": "storage" if i < n_storage else "read-only-storage"},
                }
                for i in range(len(bindings))
            ]
        )
        try:
            shader = device.create_shader_module(code=kernel.source)
            pipeline = device.create_compute_pipeline(
                layout=device.create_pipeline_layout(
                    bind_group_layouts=[layout], immediate_size=len(block) if kernel.immediate else 0
                ),
                compute={"module": shader, "entry_point": kernel.entry},
            )
        except wgpu.GPUError as e:
            raise RuntimeError(f"{e.message}\n{_numbered(kernel.source)}") from None
        _pipelines[key] = layout, pipeline
    layout, pipeline = _pipelines[key]
    group = device.create_bind_group(
        layout=layout,
        entries=[
            {"binding": i, "resource": {"buffer": b, "offset": o, "size": s}} for i, (b, o, s) in enumerate(bindings)
        ],
    )
    encoder = device.create_command_encoder()
    compute = encoder.begin_compute_pass()
    compute.set_pipeline(pipeline)
    compute.set_bind_group(0, group)
    if kernel.immediate:
        compute.set_immediates(0, block, 0, len(block))
    compute.dispatch_workgroups(*groups)
    compute.end()
    device.queue.submit([encoder.finish()])
    return [bytes(device.queue.read_buffer(b)) for b in buffers]


def run_by_the_interpreter(file: str) -> None:
    """A file of tests once more, in a process where Triton interprets: that is chosen before Triton is imported. The process has no CUDA or HIP
    device, whose kernels would be interpreted as well."""
    engines = {*os.environ.get("SPIRAL_ENGINE", "opencl,wgpu").split(",")} - {"cuda", "hip"} or {"opencl", "wgpu"}
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SPIRAL_ENGINE": ",".join(engines)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
