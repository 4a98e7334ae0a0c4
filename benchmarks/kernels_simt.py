"""Times the contractions of the simt class, schedule by schedule, without the runtime.

    python benchmarks/kernels_simt.py gemm 1024,4096 opencl,wgsl [--dtype f16]
    python benchmarks/kernels_simt.py attention 2048 wgsl

Prints TFLOP/s and the largest error of a few rows against float64. Device time of the best of five launches: OpenCL
by events,
WGSL by the wall clock of a batch of launches. WGSL modules are compiled without bounds checks, as the runtime
compiles trusted kernels.
"""

from __future__ import annotations

import argparse
import struct
import time

import numpy as np

from torch_spiral.kernels import Kernel, Target
from torch_spiral.kernels.simt import attention, gemm


def block(kernel: Kernel, scalars: list) -> bytes:
    """The parameter block with offsets 0."""
    data = struct.pack("<I" if kernel.language == "wgsl" else "<Q", 0) * len(kernel.dtypes)
    data += b"".join(
        struct.pack({"i32": "<i", "u32": "<I", "f32": "<f"}[t], v) for v, t in zip(scalars, kernel.scalars, strict=True)
    )
    return data + b"\0" * (kernel.params_size - len(data))


class OpenCL:
    def __init__(self) -> None:
        import pyopencl as cl

        self.cl = cl
        platforms = cl.get_platforms()
        device = next(
            (d for p in platforms for d in p.get_devices() if d.type & cl.device_type.GPU),
            platforms[0].get_devices()[0],
        )
        self.name = device.name
        self.context = cl.Context([device])
        self.queue = cl.CommandQueue(self.context, properties=cl.command_queue_properties.PROFILING_ENABLE)
        self.target = Target(
            language="opencl", schedule_class="simt", max_workgroup_size=device.max_work_group_size, float64=True,
            max_workgroup_memory=device.local_mem_size, compute_units=device.max_compute_units, max_params=1024,
        )  # fmt: skip

    def time(
        self, kernel: Kernel, arrays: list[np.ndarray], scalars: list, groups: tuple
    ) -> tuple[float, list[np.ndarray]]:
        cl = self.cl
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        buffers = [cl.Buffer(self.context, flags, hostbuf=a) for a in arrays]
        function = cl.Kernel(cl.Program(self.context, kernel.source).build(), kernel.entry)
        function.set_args(*buffers, np.frombuffer(block(kernel, scalars), np.uint8))
        size = [g * w for g, w in zip(groups, kernel.workgroup, strict=True)]
        times = []
        for _ in range(6):
            event = cl.enqueue_nd_range_kernel(self.queue, function, size, kernel.workgroup)
            event.wait()
            times.append((event.profile.end - event.profile.start) * 1e-9)
        out = np.empty_like(arrays[-1])
        cl.enqueue_copy(self.queue, out, buffers[len(arrays) - 1])
        return min(times[1:]), [out]


class Wgpu:
    def __init__(self) -> None:
        import wgpu

        self.wgpu = wgpu
        adapters = [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] == "Vulkan"]
        adapter = min(adapters, key=lambda a: a.info["adapter_type"] == "CPU")
        self.name = adapter.info["device"]
        wanted = (
            "max-buffer-size", "max-storage-buffer-binding-size", "max-compute-workgroup-storage-size",
            "max-compute-invocations-per-workgroup", "max-compute-workgroup-size-x",
        )  # fmt: skip
        limits = {k: adapter.limits[k] for k in wanted} | {"max-immediate-size": 128}
        features = [f for f in ("immediates", "shader-f64", "shader-int64") if f in adapter.features]
        self.device = adapter.request_device_sync(required_features=features, required_limits=limits)
        threads = limits["max-compute-invocations-per-workgroup"]
        self.target = Target(
            language="wgsl", schedule_class="simt", engine="wgpu", max_workgroup_size=threads,
            max_workgroup_memory=limits["max-compute-workgroup-storage-size"], compute_units=132,
        )  # fmt: skip

    def module(self, code: str):
        from wgpu.backends.wgpu_native import _api
        from wgpu.backends.wgpu_native._ffi import ffi, lib

        text = code.encode()
        chars = ffi.new("char[]", text)
        source = ffi.new("WGPUShaderSourceWGSL *")
        source.chain.sType, source.code.data, source.code.length = 2, chars, len(text)
        descriptor = ffi.new("WGPUShaderModuleDescriptor *")
        descriptor.nextInChain = ffi.cast("WGPUChainedStruct *", source)
        return _api.GPUShaderModule(
            "", lib.wgpuDeviceCreateShaderModuleTrusted(self.device._internal, descriptor, 0), self.device
        )

    def time(
        self, kernel: Kernel, arrays: list[np.ndarray], scalars: list, groups: tuple
    ) -> tuple[float, list[np.ndarray]]:
        w, d = self.wgpu, self.device
        usage = w.BufferUsage.STORAGE | w.BufferUsage.COPY_SRC
        buffers = [d.create_buffer_with_data(data=a, usage=usage) for a in arrays]
        kinds = ["storage"] * len(buffers)
        data = block(kernel, scalars)
        if not kernel.immediate:
            buffers.append(d.create_buffer_with_data(data=data, usage=usage))
            kinds.append("read-only-storage")
        layout = d.create_bind_group_layout(
            entries=[
                {"binding": i, "visibility": w.ShaderStage.COMPUTE, "buffer": {"type": k}} for i, k in enumerate(kinds)
            ]
        )
        pipeline = d.create_compute_pipeline(
            layout=d.create_pipeline_layout(
                bind_group_layouts=[layout], immediate_size=len(data) if kernel.immediate else 0
            ),
            compute={"module": self.module(kernel.source), "entry_point": kernel.entry},
        )
        group = d.create_bind_group(
            layout=layout,
            entries=[
                {"binding": i, "resource": {"buffer": b, "offset": 0, "size": b.size}} for i, b in enumerate(buffers)
            ],
        )

        def launch(count: int) -> float:
            start = time.perf_counter()
            encoder = d.create_command_encoder()
            compute = encoder.begin_compute_pass()
            compute.set_pipeline(pipeline)
            compute.set_bind_group(0, group)
            if kernel.immediate:
                compute.set_immediates(0, data, 0, len(data))
            for _ in range(count):
                compute.dispatch_workgroups(*groups)
            compute.end()
            d.queue.submit([encoder.finish()])
            d.queue.read_buffer(buffers[len(arrays) - 1], 0, 4)
            return time.perf_counter() - start

        launch(1)
        times = []
        for _ in range(5):
            one = launch(1)
            times.append((launch(11) - one) / 10)
        last = arrays[-1]
        return min(times), [
            np.frombuffer(d.queue.read_buffer(buffers[len(arrays) - 1]), last.dtype).reshape(last.shape)
        ]


def bench_gemm(engine, n: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, n)).astype({"f32": "f4", "f16": "f2"}[dtype]) for _ in range(2))
    want = a[:32].astype(float) @ b.astype(float)
    for s in gemm.SCHEDULES:
        if not s.fits(engine.target):
            print(f"  {s.key}: more than the device has")
            continue
        kernel = gemm.gemm(engine.target, s, dtype, dtype, vec_a=True, vec_b=True, vec_c=True, full_k=True)
        scalars = [1, n, n, n, 0, n, 1, 0, n, 1, 0, n, 1]
        seconds, (c,) = engine.time(kernel, [a, b, np.zeros_like(a)], scalars, gemm.groups(s, n, n, 1))
        error = np.linalg.norm(c[:32] - want) / np.linalg.norm(want)
        print(
            f"  gemm {dtype} {n} {s.key}: {2 * n**3 / seconds / 1e12:.2f} TFLOP/s, normwise error {error:.1e}",
            flush=True,
        )


def bench_attention(engine, n: int, dtype: str) -> None:
    batch, heads, head = 8, 16, 64
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((batch, heads, n, head)).astype({"f32": "f4", "f16": "f2"}[dtype]) for _ in range(3))
    strides = [heads * n * head, n * head, head]
    for s in attention.SCHEDULES:
        if not s.fits(engine.target, head):
            print(f"  {s.key}: more than the device has")
            continue
        kernel = attention.forward(engine.target, s, dtype, head, head, causal=True, vec=True)
        scalars = [batch, heads, 1, n, n, head, head, 0, head**-0.5, *strides * 4]
        lse = np.zeros((batch, heads, n), np.float32)
        seconds, _ = engine.time(
            kernel, [q, k, v, np.zeros_like(q), lse], scalars, attention.forward_groups(s, batch, heads, n)
        )
        print(
            f"  attention causal {dtype} {n} {s.key}: {2 * batch * heads * n * n * head / seconds / 1e12:.2f} TFLOP/s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("gemm", "attention"))
    parser.add_argument("sizes")
    parser.add_argument("engines")
    parser.add_argument("--dtype", default="f32", choices=("f32", "f16"))
    args = parser.parse_args()
    for name in args.engines.split(","):
        engine = {"opencl": OpenCL, "wgsl": Wgpu}[name]()
        print(f"{name}: {engine.name}, {engine.target.max_workgroup_memory} bytes of workgroup memory")
        for n in args.sizes.split(","):
            (bench_gemm if args.work == "gemm" else bench_attention)(engine, int(n), args.dtype)


if __name__ == "__main__":
    main()
