"""The kernels of torch.compile for Triton: what Inductor fuses for an OpenCL or wgpu device, built for Triton from the same
Programs and run on the CPU by Triton's interpreter; and compiled for a GPU, which needs none. In a process of its own, as
test_triton_kernels.py."""

import os
import subprocess

import pytest
from kernel_runner import run_by_the_interpreter

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_by_the_interpreter():
        run_by_the_interpreter(__file__)

    def test_loads_are_wide(monkeypatch, tmp_path):
        """A sum of a matrix and a row, and a normalised row, compiled to machine code of sm_90."""
        import re
        from pathlib import Path

        import triton
        from triton.backends.compiler import GPUTarget

        from torch_spiral.compiler.loops import Program, Store, build
        from torch_spiral.kernels import ir, nest
        from torch_spiral.kernels.ir import Node
        from torch_spiral.kernels.kernel import Target
        from torch_spiral.kernels.triton_binary import compile_kernel

        monkeypatch.setenv("SPIRAL_CACHE", "0")
        target = Target(language="triton", schedule_class="block", engine="cuda", float64=True, compute_units=132)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not tool.exists():
            pytest.skip("Triton without its disassembler")

        def instructions(program):
            divisible = tuple((i, 16) for i in range(len(program.buffers)))
            binary = compile_kernel(build(program, target).kernel, GPUTarget("cuda", 90, 32), divisible)
            (tmp_path / "k.cubin").write_bytes(binary.image)
            text = subprocess.run([tool, "-sass", tmp_path / "k.cubin"], capture_output=True, text=True).stdout
            return set(re.findall(r"(?:LDG|STG)[.\w]*", text))

        x0, x1, r0 = (Node("leaf", "i32", attr=a) for a in ("x0", "x1", "r0"))
        size, rows = ir.const(768, "u32"), ir.const(1024, "u32")
        index = x1 * ir.const(768, "i32") + x0
        value = Node("load", "f32", index, attr="b1") + Node("load", "f32", x0, attr="b2")
        buffers = [("b0", "bf16", "rw"), ("b1", "bf16", "r"), ("b2", "bf16", "r")]
        bias = Program("fused", buffers, [], [size, rows], [], [Store("b0", index, value, None, False)])
        assert instructions(bias) == {"LDG.E.128", "STG.E.128"}
        index = x0 * ir.const(768, "i32") + r0
        value = Node("load", "f32", index, attr="b1")
        norm = value / Node("red", "f32", value * value, attr=(nest.SUM("f32"), 0))
        buffers = [("b0", "f32", "rw"), ("b1", "f32", "r")]
        row = Program("fused", buffers, [], [rows], [size], [Store("b0", index, norm, None, True)])
        assert instructions(row) == {"LDG.E.128", "STG.E.128"}

else:
    from torch_spiral.testing.triton_interpreter import TARGET, run  # isort: skip

    import torch
    from torch.nn import functional as F

    from torch_spiral.compiler import codegen, loops, runtime

    @pytest.fixture
    def fused(monkeypatch):
        """fused(fn, *inputs): what the one kernel that fn becomes computes of CPU tensors, in Triton, as fn returns it."""
        seen = []
        build = codegen.FusedKernel._build

        def spy(self):
            _, launch = result = build(self)
            graph = codegen.V.graph
            seen.append((self.program, launch, list(graph.graph_input_names), list(graph.get_output_names())))
            return result

        monkeypatch.setattr(codegen.FusedKernel, "_build", spy)
        monkeypatch.setattr(runtime.low, "target", lambda: TARGET)

        def call(fn, *inputs, errors=None):
            seen.clear()
            torch._dynamo.reset()
            with torch._inductor.config.patch(fx_graph_cache=False):
                expected = torch.compile(fn, backend="spiral", fullgraph=True)(*(x.to("spiral") for x in inputs))
            assert len(seen) == 1, "one kernel was expected"
            program, launch, names, outputs = seen[0]
            expected = expected if isinstance(expected, tuple) else (expected,)
            values = dict(zip(names, (x.clone() for x in inputs)))
            values.update({n: torch.zeros_like(e, device="cpu") for n, e in zip(outputs, expected) if n not in values})
            built = loops.build(program, TARGET)
            grid = runtime.Fused(built.kernel, built.schedule, built.lanes)._groups(
                [int(s) for s in launch["rows"]], [int(s) for s in launch["reduced"]]
            )
            scalars = [7 + i for i in range(program.sites)]  # the numbers of the checks
            run(built.kernel, [values[b] for b in launch["buffers"]], scalars, grid, errors)
            results = tuple(values[n] for n in outputs)
            return results if len(results) > 1 else results[0]

        return call

    def same(got, want, **tolerance):
        torch.testing.assert_close(got, want, **tolerance)

    @pytest.fixture(autouse=True)
    def seed():
        torch.manual_seed(0)

    @pytest.mark.parametrize("shape", [(3,), (1024,), (7, 333), (2, 5, 300)])
    def test_chain(fused, shape):
        def fn(x, y):
            return torch.tanh(x * y + 1.5).sigmoid() * torch.where(x > 0, y, -y)

        x, y = torch.randn(shape), torch.randn(shape[-1:])
        same(fused(fn, x, y), fn(x, y))

    def test_mixed_dtypes(fused):
        def fn(x, n, b):
            return (x.to(torch.float32) * n, n % 5 - 2, b & (n > 3))

        x, n, b = torch.randn(5, 70).half(), torch.randint(-9, 9, (5, 70)), torch.rand(5, 70) > 0.5
        for got, want in zip(fused(fn, x, n, b), fn(x, n, b)):
            same(got, want)

    def test_layouts(fused):
        """A transposed and an expanded operand, and an offset."""

        def fn(x, y, z):
            return x.t() + y[:, 1:] * z[2:]

        x, y, z = torch.randn(40, 30), torch.randn(30, 41), torch.randn(42)
        same(fused(fn, x, y, z), fn(x, y, z))

    def test_concatenation_and_padding(fused):
        """Loads under a mask."""

        def fn(x, y):
            return torch.cat([F.pad(x, (1, 2), value=3.0), y], 1).exp()

        x, y = torch.randn(6, 20), torch.randn(6, 9)
        same(fused(fn, x, y), fn(x, y))

    def test_rotary_embedding(fused):
        def fn(x, cos, sin):
            half = x.shape[-1] // 2
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        x, cos, sin = torch.randn(2, 3, 5, 16), torch.randn(5, 16), torch.randn(5, 16)
        same(fused(fn, x, cos, sin), fn(x, cos, sin))

    @pytest.mark.parametrize("index", [[1, 0, 5, -1], [2, 6, 0, 9]])
    def test_index_checks(fused, index):
        def fn(x, i):
            return x[i] * 2

        x, i = torch.randn(6, 37), torch.tensor(index)
        errors = torch.zeros(2, dtype=torch.int32)
        good = max(index) < 6
        if good:
            same(fused(fn, x, i, errors=errors), fn(x, i))
            assert not errors.any()
        else:
            with pytest.raises(IndexError):  # of the device that the kernel was fused for
                fused(fn, x, i, errors=errors)
                torch.spiral.synchronize()
            assert errors.tolist() == [7, 9]

    def test_scatter(fused):
        def fn(out, i, x):
            return out.index_add_(0, i, x)

        out, i, x = torch.zeros(5, 40), torch.tensor([0, 3, 3, 1, 0, 3]), torch.randn(6, 40)
        same(fused(fn, out, i, x, errors=torch.zeros(2, dtype=torch.int32)), fn(out.clone(), i, x))

    @pytest.mark.parametrize("d", [1, 50, 1100])
    def test_softmax(fused, d):
        x = torch.randn(3, d)
        same(fused(lambda x: torch.softmax(x * 3, -1), x), torch.softmax(x * 3, -1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layer_norm(fused, dtype):
        def fn(x, w, b):
            return F.gelu(F.layer_norm(x, (x.shape[-1],), w, b))

        x, w, b = torch.randn(2, 1100).to(dtype), torch.randn(1100).to(dtype), torch.randn(1100).to(dtype)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        same(fused(fn, x, w, b), fn(x.float(), w.float(), b.float()).to(dtype), **tolerance)

    @pytest.mark.parametrize("shape", [(300, 40), (1, 40), (129, 3)])
    def test_columns(fused, shape):
        """The reduced dimension is the slow one: rows lie beside each other."""
        x = torch.randn(shape)
        same(fused(lambda x: (x * x).sum(0), x), (x * x).sum(0))

    @pytest.mark.parametrize(
        ("shape", "dim"), [((300, 40), 0), ((70, 3), 0), ((100, 33), 0), ((20, 50), 0), ((2, 90, 21), 1)]
    )
    def test_columns_that_are_read_again(fused, shape, dim):
        """A workgroup takes several columns, of which the last one's may be fewer; the kernel stores elements and a number a column."""

        def fn(x):
            y = x.log_softmax(dim)
            return y, (x - x.mean(dim, keepdim=True)) * y, x.amax(dim)

        x = torch.randn(shape)
        for got, want in zip(fused(fn, x), fn(x)):
            same(got, want, rtol=1e-5, atol=1e-5)

    def test_several_reductions(fused):
        def fn(x):
            return x.amax(-1), x.argmax(-1), x.isnan().any(-1), x.sum(-1)

        x = torch.randn(3, 1100)
        x[2, 700] = torch.nan
        for got, want in zip(fused(fn, x), fn(x)):
            same(got, want, equal_nan=True, rtol=1e-5, atol=1e-4)

    def test_reduction_of_several_dimensions(fused):
        def fn(x, w):
            return (x * w).sum((0, 2, 3)), (x * w).amax((0, 2, 3))

        x, w = torch.randn(3, 5, 7, 20), torch.randn(5, 1, 1)
        for got, want in zip(fused(fn, x, w), fn(x, w)):
            same(got, want, rtol=1e-5, atol=1e-4)
