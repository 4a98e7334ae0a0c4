"""The CUDA and HIP engine without a GPU: its C++ code on a stand-in for the driver, kernels run by Triton's interpreter
(stand_in_gpu.py). In processes of their own, one for each vendor."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = "SPIRAL_STAND_IN_GPU"

if STAND_IN not in os.environ:
    needs_compiler = pytest.mark.skipif(shutil.which("c++") is None or sys.platform != "linux", reason="no C compiler")

    @needs_compiler
    @pytest.mark.parametrize("engine,settings,only", [
        ("cuda", {}, ""), ("cuda", {"SPIRAL_STAND_IN_FLAGS": "-DNO_EDGE_DATA"}, "early"),
        pytest.param("cuda", {"SPIRAL_PDL": "0"}, "early", marks=pytest.mark.full),
        pytest.param("hip", {}, "", marks=pytest.mark.full),
    ])  # fmt: skip
    def test_engine(engine, settings, only):
        pytest.importorskip("triton")
        environment = {
            **os.environ, **settings, STAND_IN: engine, "SPIRAL_ENGINE": engine, "SPIRAL_CUDA_GRAPH_NODES": "150",
            "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "stand_in_gpu", __file__, "-k", only],
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    @needs_compiler
    def test_constants_are_the_vendors(tmp_path):
        """What csrc/runtime/cuda_api.h says of attributes, structures and results is what the headers say that come with Triton."""
        headers = Path(pytest.importorskip("triton").__file__).parent / "backends"
        for vendor, define, text in (("nvidia", "-DCUDA", CUDA), ("amd", "-D__HIP_PLATFORM_AMD__", AMD)):
            (tmp_path / "check.cpp").write_text(CHECK % text)
            command = [
                "c++",
                "-std=c++17",
                "-w",
                define,
                f"-I{headers / vendor / 'include'}",
                f"-I{Path(__file__).parents[1] / 'csrc'}",
            ]
            done = subprocess.run([*command, "check.cpp", "-o", "check"], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            assert subprocess.run(["./check"], cwd=tmp_path, capture_output=True, text=True).stdout == ""

    CHECK = """
    #include "runtime/cuda_api.h"
    #include <cstddef>
    #include <cstdio>
    #ifdef CUDA
    #include <cuda.h>
    #else
    #include <hip/hip_runtime_api.h>
    #endif
    using namespace spiral::cuda;
    #define SAME(a, b) if (long(a) != long(b)) printf(#a " is %%ld, not %%ld\\n", long(b), long(a));
    int main() { %s }
    """
    CUDA = """
    SAME(kCuda.max_threads, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK) SAME(kCuda.multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    SAME(kCuda.shared_memory, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) SAME(kCuda.integrated, CU_DEVICE_ATTRIBUTE_INTEGRATED)
    SAME(kCuda.capability_major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    SAME(kCuda.capability_minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    SAME(kCuda.param_end, CU_LAUNCH_PARAM_END) SAME(kParamBufferPointer, CU_LAUNCH_PARAM_BUFFER_POINTER)
    SAME(kParamBufferSize, CU_LAUNCH_PARAM_BUFFER_SIZE) SAME(kFunctionMaxDynamicSharedMemory, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    SAME(kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY) SAME(kNoDevice, CUDA_ERROR_NO_DEVICE) SAME(kNotReady, CUDA_ERROR_NOT_READY)
    SAME(kStreamNonBlocking, CU_STREAM_NON_BLOCKING) SAME(kEventDisableTiming, CU_EVENT_DISABLE_TIMING)
    SAME(sizeof(KernelNode), sizeof(CUDA_KERNEL_NODE_PARAMS_v2))
    SAME(offsetof(KernelNode, shared), offsetof(CUDA_KERNEL_NODE_PARAMS_v2, sharedMemBytes))
    SAME(offsetof(KernelNode, extra), offsetof(CUDA_KERNEL_NODE_PARAMS_v2, extra))
    SAME(offsetof(KernelNode, context), offsetof(CUDA_KERNEL_NODE_PARAMS_v2, ctx))
    SAME(sizeof(GraphEdge), sizeof(CUgraphEdgeData)) SAME(offsetof(GraphEdge, type), offsetof(CUgraphEdgeData, type))
    SAME(offsetof(GraphEdge, to_port), offsetof(CUgraphEdgeData, to_port))
    SAME(kProgrammaticEdge.from_port, CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC)
    SAME(kProgrammaticEdge.type, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
    """
    AMD = """
    SAME(kHip.max_threads, hipDeviceAttributeMaxThreadsPerBlock) SAME(kHip.multiprocessors, hipDeviceAttributeMultiprocessorCount)
    SAME(kHip.shared_memory, hipDeviceAttributeMaxSharedMemoryPerBlock) SAME(kHip.integrated, hipDeviceAttributeIntegrated)
    SAME(kHip.capability_major, hipDeviceAttributeComputeCapabilityMajor)
    SAME(kHip.capability_minor, hipDeviceAttributeComputeCapabilityMinor)
    SAME(kHip.param_end, HIP_LAUNCH_PARAM_END) SAME(kParamBufferPointer, HIP_LAUNCH_PARAM_BUFFER_POINTER)
    SAME(kParamBufferSize, HIP_LAUNCH_PARAM_BUFFER_SIZE)
    SAME(kOutOfMemory, hipErrorOutOfMemory) SAME(kNoDevice, hipErrorNoDevice) SAME(kNotReady, hipErrorNotReady)
    SAME(kStreamNonBlocking, hipStreamNonBlocking) SAME(kEventDisableTiming, hipEventDisableTiming)
    SAME(kHipPropertiesSize, sizeof(hipDeviceProp_tR0600)) SAME(kHipArchitecture, offsetof(hipDeviceProp_tR0600, gcnArchName))
    """

else:
    import threading

    import stand_in_gpu as gpu
    import torch
    import torch.nn.functional as F

    from torch_spiral.kernels.builder import KernelBuilder
    from torch_spiral.lowering import build, cdiv, empty, fill_bytes, launch, operator
    from torch_spiral.ops.contraction import product

    HIP = os.environ[STAND_IN] == "hip"
    DEVICE = torch.device("spiral")

    @pytest.fixture(autouse=True)
    def driver():
        """The driver as it is; used as drivers want it."""
        gpu.driver.stand_in_memory(2 << 30)
        yield gpu
        torch.spiral.synchronize()
        assert gpu.count("mistakes") == 0 and not gpu.failures

    def test_device():
        p = torch.spiral.get_device_properties(DEVICE)
        assert p.engine == os.environ[STAND_IN] and p.api_version == ("gfx942" if HIP else "sm_90")
        assert (p.compute_units, p.max_workgroup_size, p.max_workgroup_memory) == (8, 1024, 232448)

    def attention(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, m)

    CASES = {
        "product": (torch.mm, [(17, 33), (33, 20)]),
        "product of transposed": (lambda a, b: a.t() @ b.t(), [(33, 17), (20, 33)]),
        "convolution": (lambda x, w: F.conv2d(x, w, None, 2, 1), [(2, 3, 9, 8), (5, 3, 3, 3)]),
        "attention": (attention, [(1, 2, 5, 16), (1, 2, 19, 16), (1, 2, 19, 16), (5, 19)]),
        "layer norm": (lambda x, w, b: F.layer_norm(x, (37,), w, b), [(6, 37), (37,), (37,)]),
        "cross entropy": (lambda x: F.cross_entropy(x, torch.arange(6, device=x.device)), [(6, 301)]),
        "sliced": (lambda x: (x[1:, ::3] * 2 + x[:-1, ::3].exp()).cumsum(0), [(7, 40)]),
    }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(case, dtype):
        if dtype != torch.float32 and (HIP or case not in ("product", "attention")):
            pytest.skip("covered by the other cases")
        torch.manual_seed(0)
        function, shapes = CASES[case]
        given = [torch.randn(s).to(dtype) for s in shapes]
        results = []
        for device, kind in ((DEVICE, dtype), ("cpu", torch.float64)):
            leaves = [x.to(device, kind).requires_grad_() for x in given]
            out = function(*leaves)
            out.backward(torch.ones_like(out))
            results.append([x.detach().cpu().double() for x in (out, *(leaf.grad for leaf in leaves))])
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        for got, want in zip(*results, strict=True):
            assert (got - want).abs().max() <= tolerance * want.abs().max()

    def test_out_of_memory():
        torch.spiral.empty_cache()
        gpu.driver.stand_in_memory(gpu.count("memory") + (8 << 20))
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.empty(16 << 20, device=DEVICE)
        assert (torch.ones(1000, device=DEVICE) + 1).cpu().eq(2).all()

    def test_a_launch_that_fails():
        x = torch.ones(100, device=DEVICE)
        (x + 1).cpu()
        gpu.fail("hipModuleLaunchKernel" if HIP else "cuLaunchKernel", 719)
        y = x + 1  # queued: nobody knows yet
        with pytest.raises(RuntimeError, match=r"failed: STAND_IN_ERROR \(719\): as a test asked for"):
            y.cpu()
        assert (x + 1).cpu().eq(2).all()

    def test_a_kernel_that_does_not_load():
        gpu.fail("hipModuleLoadData" if HIP else "cuModuleLoadData", 209)
        x = torch.ones(7, device=DEVICE)
        with pytest.raises(RuntimeError, match=r"does not load kernel .*\(209\)"):
            torch.special.bessel_j1(x)
        assert torch.allclose(torch.special.bessel_j1(x).cpu(), torch.special.bessel_j1(torch.ones(7)))

    def test_threads():
        x = torch.randn(50, 60)
        wrong = []

        def work(i):
            for _ in range(5):
                y = (x.to(DEVICE) * i).sum(0).cpu()
                wrong.extend([i] if (y - (x * i).sum(0)).abs().max() > 1e-3 else [])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong

    @operator("stand_in_triangle(Tensor x) -> Tensor")
    def triangle(x):
        """x * 55, in as many launches as make a graph."""

        def add(target):
            k = KernelBuilder(target, "stand_in_add")
            a, out = k.buffer("a", "f32"), k.buffer("out", "f32", "rw")
            n, times = k.scalar("n", "u32"), k.scalar("times", "f32")
            i = k.global_id()
            with k.If(i < n):
                out[i] = out[i] + a[i] * times
            return k.finish((64, 1, 1))

        out = empty(x.sizes, "f32")
        fill_bytes(out, 0)
        for i in range(1, 11):
            launch(build(add), [x, out], [x.numel, float(i)], (cdiv(x.numel, 64), 1, 1))
        return out

    @pytest.mark.skipif(HIP, reason="HIP has no graphs here")
    def test_graphs():
        """Made of the second replay in turn, updated by later ones, as many as may be kept, and dropped where memory is wanted."""

        def run(n):
            x = torch.randn(n)
            assert torch.allclose(torch.ops.spiral.stand_in_triangle(x.to(DEVICE)).cpu(), x * 55, rtol=1e-5)

        def counts():
            return [gpu.count(what) for what in ("graphs made", "graphs alive", "graph launches")]

        run(100)
        assert counts() == [0, 0, 0]
        run(100), run(116), run(76)  # of one signature
        assert counts() == [1, 1, 3]
        for n in (5, 10, 20):
            run(n), run(n)
        made, alive, _ = counts()
        assert (made, alive) == (4, 2) and gpu.count("nodes alive") == 20
        for _ in range(4):  # what is dropped in every turn is not made again
            run(5), run(10), run(20), run(100)
        made, _, launched = counts()
        run(5), run(10), run(20), run(100)
        assert counts()[0] == made and counts()[2] > launched
        keep = torch.empty(3 << 20, device=DEVICE)
        del keep
        torch.spiral.empty_cache()
        assert counts()[1] == 0 == gpu.count("nodes alive")
        run(100)
        torch.spiral.synchronize()
        gpu.fail("cuGraphLaunch", 719)
        with pytest.raises(RuntimeError, match="a sequence of kernels failed"):
            for n in (5, 10, 20, 100):
                run(n), run(n)
        run(100)

    @operator("stand_in_heads(Tensor row, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)")
    def heads(row, q, k, v):
        """A row times three matrices, as a graph of known sizes has them, and times one made of the first result."""
        a = row.view([1, 1, 40], [40, 40, 1])
        made = [empty((1, 1, n), "f32") for n in (80, 8, 16, 2)]
        for w, out, n in zip((q, k, v), made, (80, 8, 16), strict=False):
            product(a, w.view([1, 40, n], [40 * n, 1, 40]), out)
        product(a, made[0].view([1, 40, 2], [80, 1, 40]), made[3])
        return made

    def test_products_of_one_row_are_one_kernel():
        first = len(gpu.compiled)
        row, *w = (torch.randn(n, 40) for n in (1, 80, 8, 16))
        for _ in range(2):
            got = torch.ops.spiral.stand_in_heads(*(x.to(DEVICE) for x in (row, *w)))
            want = [row @ x.T for x in w]
            want.append(row @ want[0].view(2, 40).T)
            for x, y in zip(got, want, strict=True):
                assert torch.allclose(x.cpu().flatten(), y.flatten(), rtol=1e-4, atol=1e-4)
        names = [k.name for k in gpu.compiled[first:] if k.name.startswith("gemm_row")]
        assert names[-2].endswith("beside3") and names[-1].endswith("beside1")

    @operator("stand_in_either(Tensor x, int heedless) -> Tensor", slots=("heedless",))
    def either(x, heedless):
        """x * 10, by ten launches of a kernel that waits for the one ahead, or of one that does not (heedless: 1)."""

        def add(name):
            def make(target):
                k = KernelBuilder(target, name)
                a, out, n = k.buffer("a", "f32"), k.buffer("out", "f32", "rw"), k.scalar("n", "u32")
                i = k.global_id()
                with k.If(i < n):
                    out[i] = out[i] + a[i]
                return k.finish((64, 1, 1))

            return build(make)

        out = empty(x.sizes, "f32")
        fill_bytes(out, 0)
        groups = cdiv(x.numel, 64)
        for _ in range(10):
            launch(add("stand_in_waits"), [x, out], [x.numel], (groups * (1 - heedless), 1, 1))
            launch(add("stand_in_heedless"), [x, out], [x.numel], (groups * heedless, 1, 1))
        return out

    def test_an_optimizers_step_is_two_kernels():
        """The counters, and all parameters, whatever their sizes: pointers are chosen in the kernel."""

        def step(device, **options):
            torch.manual_seed(0)
            parameters = [torch.randn(s).to(device).requires_grad_() for s in ((8, 16), (33,), (), (40, 31)) * 2]
            for p in parameters:
                p.grad = torch.randn(p.shape).to(device)
            optimizer = torch.optim.AdamW(parameters, lr=0.01, **options)
            run = torch.compile(optimizer.step, backend="spiral") if options else optimizer.step
            run()
            with torch.spiral.telemetry() as t:
                run()
                torch.spiral.synchronize()
            return [p.detach().cpu() for p in parameters], len(t.launches)

        got, launches = step(DEVICE, foreach=True, capturable=True)
        torch.testing.assert_close(got, step("cpu")[0], rtol=1e-5, atol=1e-6)
        assert launches == 2

    @pytest.mark.skipif(HIP, reason="HIP has no graphs here")
    def test_early_starts():
        """Kernels start before those ahead of them have ended where they wait by themselves, and the driver can: another kernel in the
        same place starts when it may (the driver here counts as a mistake what does not)."""
        possible = not os.environ.get("SPIRAL_STAND_IN_FLAGS") and os.environ.get("SPIRAL_PDL") != "0"
        x = torch.randn(100)
        found = []
        for heedless in (0, 0, 0, 1, 1, 1, 0, 0):
            before = [gpu.count(what) for what in ("graphs made", "early edges")]
            assert torch.allclose(torch.ops.spiral.stand_in_either(x.to(DEVICE), heedless).cpu(), x * 10, rtol=1e-5)
            found.append((gpu.count("graphs made") - before[0], gpu.count("early edges") - before[1]))
        if possible:  # the first that may not start early drops the graph, and the ones that may do without afterwards
            assert found == [(0, 0), (1, 9), (0, 0), (0, 0), (1, 0), (0, 0), (0, 0), (0, 0)]
        else:
            assert found == [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)]

    @operator("stand_in_scratch(Tensor x) -> Tensor")
    def scratch(x):
        """x * 10, by ten launches of a kernel with scratch memory."""

        def add(target):
            k = KernelBuilder(target, "stand_in_scratch")
            a, out, n = k.buffer("a", "f32"), k.buffer("out", "f32", "rw"), k.scalar("n", "u32")
            i = k.global_id()
            with k.If(i < n):
                out[i] = out[i] + a[i]
            return k.finish((64, 1, 1))

        out = empty(x.sizes, "f32")
        fill_bytes(out, 0)
        for _ in range(10):
            launch(build(add), [x, out], [x.numel], (cdiv(x.numel, 64), 1, 1))
        return out

    @pytest.mark.skipif(HIP, reason="HIP's kernels have no scratch memory")
    def test_launches_of_a_graph_share_no_scratch_memory():
        """They may write to it before those ahead of them have ended. As it grows, and beyond its limit, launches are handed over first."""
        for workgroups, shared in ((1, 0), (7, 0), (1, 0), (150, 4)):  # 150: 96 MB in all, of 64
            size, x = gpu.SCRATCH * workgroups, torch.randn(64 * workgroups)
            for _ in range(3):
                gpu.scratches.clear()
                assert torch.allclose(torch.ops.spiral.stand_in_scratch(x.to(DEVICE)).cpu(), x * 10, rtol=1e-5)
            places = sorted(gpu.scratches)
            apart = [b - a for a, b in itertools.pairwise(places)]
            assert len(places) == 10 and apart.count(0) == shared and sum(d >= size for d in apart) == 9 - shared

    @pytest.mark.skipif(HIP, reason="HIP has no graphs here")
    def test_an_edge_that_fails_early():
        gpu.fail("cuGraphAddDependencies_v2", 801)
        x = torch.randn(3, 50)
        for _ in range(4):
            assert torch.allclose(torch.ops.spiral.stand_in_triangle(x.to(DEVICE)).cpu(), x * 55, rtol=1e-5)
        gpu.fail("", 0)

    @pytest.mark.skipif(HIP, reason="HIP has no graphs here")
    def test_launches_are_held_back_in_batches():
        """Those of a loop become graphs as they come again; whatever reads, copies, fills or replays a plan between sees them done."""
        start = torch.randn(6, 10)

        def loop(x, steps):
            y = x
            for i in range(steps):
                y = ((y * 1.5 - x).relu() + y.roll(1, 0)).clamp(-3, 3) / 2
                if i == 7:
                    y[2] = x[3]  # a copy
                if i == 11:
                    y = torch.cat([y[:3], torch.zeros_like(y[3:])])  # a fill
                if i == 13 and x.device.type == "spiral":
                    y = y + torch.ops.spiral.stand_in_triangle(x) / 55 - x  # a sequence
            return y

        want, short = loop(start.double(), 20), loop(start.double(), 5)
        x = start.to(DEVICE)
        counts = []
        for steps in (20, 20, 20, 5, 5, 5):
            before = [gpu.count(what) for what in ("launches", "graph launches", "graphs made")]
            assert (loop(x, steps).cpu() - (want if steps == 20 else short)).abs().max() < 1e-4
            counts.append(
                [
                    gpu.count(what) - then
                    for what, then in zip(("launches", "graph launches", "graphs made"), before, strict=True)
                ]
            )
        (long, none, _), (again, some, _) = counts[:2]
        assert long == again > 100 and none == 0 < some
        assert counts[-1][1] >= 1 and counts[-1][2] == 0  # a steady state makes none
