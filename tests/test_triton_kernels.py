"""Triton kernels, run on the CPU by Triton's interpreter. In a process of its own: the interpreter has to be chosen before
Triton is imported. What only a GPU's compiler does (types, layouts) is checked by compiling for one, which needs no GPU."""

import math
import os
import subprocess

import pytest
from kernel_runner import run_by_the_interpreter

pytest.importorskip("triton")

# A batch norm, a residual and ReLU.
NORM = (
    ("sub", "f32", "n"),
    ("rsqrt_3727c5ac", "f32", "n"),
    ("mul", "f32", "n"),
    ("add", "f32", "n"),
    ("add", "bf16", "mn"),
    "relu",
)

if os.environ.get("TRITON_INTERPRET") != "1":

    def resources(binary, folder):
        """What the disassembler says that a kernel takes: REG, STACK and others."""
        import re
        from pathlib import Path

        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not tool.exists():
            pytest.skip("Triton without its disassembler")
        (folder / "k.cubin").write_bytes(binary.image)
        text = subprocess.run(
            [tool, "--dump-resource-usage", folder / "k.cubin"], capture_output=True, text=True, check=True
        ).stdout
        return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", text)}

    def test_by_the_interpreter():
        run_by_the_interpreter(__file__)

    def test_compiles_for_a_gpu(monkeypatch):
        """A row kernel and a product, to machine code of sm_90."""
        import dataclasses

        from triton.backends.compiler import GPUTarget

        from torch_spiral.kernels import ir, nest
        from torch_spiral.kernels.block import gemm
        from torch_spiral.kernels.kernel import Target
        from torch_spiral.kernels.triton_binary import compile_kernel
        from torch_spiral.kernels.vector.gemm import Epilogue

        monkeypatch.setenv("SPIRAL_CACHE", "0")
        target = Target(language="triton", schedule_class="block", engine="cuda", float64=True, compute_units=132)
        gpu = GPUTarget("cuda", 90, 32)

        def softmax(r, x):
            e = ir.exp(x - r.reduce(nest.MAX(), x))
            return e / r.sum(e)

        ops = [nest.Operand("out", "f16", ("1", "s"))], [nest.Operand("x", "f16", ("1", "s"))]
        rows = compile_kernel(nest.rows(target, "softmax", *ops, softmax).kernel, gpu, ((0, 16), (1, 16)))
        assert rows.threads == 256 and rows.image[:4] == b"\x7fELF"
        schedule = dataclasses.replace(gemm.HALF[-1], stages=3)
        divisible = ((0, 16), (1, 16), *((i, 16) for i in range(3, 12)))
        for s in (schedule, dataclasses.replace(schedule, streamed=True)):
            product = gemm.gemm(target, s, "bf16", "bf16", "bf16", "n", "n", "n", "", False, Epilogue(("relu",)))
            binary = compile_kernel(product, gpu, divisible)
            assert binary.shared >= 2 * 3 * 2 * 64 * 64 / 2  # the loads are pipelined
        finish = gemm.stream_reduce(target, s, "f32", "bf16", "n", Epilogue(("relu",)))
        assert compile_kernel(finish, gpu, ()).image[:4] == b"\x7fELF"

    def test_kernels_wait_for_those_ahead_of_them(monkeypatch, tmp_path):
        """Where they may start early, before any access to memory, and a product of one row with the rows of a matrix only after it has sent for them; not
        on GPUs without such starts."""
        import re
        from pathlib import Path

        import triton
        from triton.backends.compiler import GPUTarget

        from torch_spiral.kernels import ir, nest
        from torch_spiral.kernels.block import gemm
        from torch_spiral.kernels.builder import KernelBuilder
        from torch_spiral.kernels.kernel import Target
        from torch_spiral.kernels.triton_binary import compile_kernel
        from torch_spiral.kernels.vector.gemm import Epilogue

        monkeypatch.setenv("SPIRAL_CACHE", "0")
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not tool.exists():
            pytest.skip("Triton without its disassembler")

        def scattered(target):
            k = KernelBuilder(target, "scattered")
            index, out = k.buffer("index", "i64"), k.buffer("out", "f32", "a")
            at = k.check_index(index[k.global_id()], 0, k.scalar("n", "u32"), 7)
            k.atomics.apply(out, "add", at, [ir.const(1.0, "f32")])
            return k.finish((128, 1, 1))

        def kernels(engine, capability):
            target = Target(
                language="triton", schedule_class="block", engine=engine, float64=True, compute_units=132, capability=capability,
                max_workgroup_memory=227 << 10,
            )  # fmt: skip
            half = gemm.HALF_TILES[0]
            return [
                nest.rows(
                    target, "sums", [nest.Operand("out", "f32", ("0", "1"))], [nest.Operand("x", "f16", ("1", "s"))],
                    lambda r, x: r.sum(ir.exp(x)),
                ).kernel,
                scattered(target),
                *(
                    gemm.row_product(
                        target, gemm.row_schedule(target, "bf16", b, 512, 768, 1), "bf16", "bf16", "bf16", "n", b, "n",
                        Epilogue((("beta", "bf16", "n"),)),
                    )
                    for b in "tn"
                ),
                gemm.gemm(target, half, "bf16", "bf16", "bf16", "n", "t", "n", "", False, Epilogue(), capability >= 90),
            ]  # fmt: skip

        touches = re.compile(r"\b(LDG|STG|LD|ST|ATOMG?|RED|UTMA\w+|LDGSTS)\b")
        # But for tensor descriptors, in scratch memory of the launch's own.
        touches_tensors = re.compile(r"\b(LDG|STG|LD|ST|RED|UTMALDG|UTMASTG|LDGSTS)\b")
        for kernel in kernels("cuda", 90):
            binary = compile_kernel(kernel, GPUTarget("cuda", 90, 32), ((0, 16), (1, 16), (2, 16)))
            assert binary.waits, kernel.name
            (tmp_path / "k.cubin").write_bytes(binary.image)
            text = subprocess.run(
                [tool, "-sass", tmp_path / "k.cubin"], capture_output=True, text=True, check=True
            ).stdout
            before, wait, after = text.partition("ACQBULK")
            early = (touches_tensors if binary.scratch else touches).search(before)
            assert wait and "ACQBULK" not in after and touches.search(after) and not early, kernel.name
            assert ("UTMACCTL" in before) == (binary.scratch > 0)
            assert "PREEXIT" in after
            assert ("CCTL.E.PF2" in before) == ("gemm_row" in kernel.name and "_ntn_" in kernel.name)
        for kernel in (*kernels("cuda", 80), *kernels("hip", 0)):
            assert "gdc_" not in kernel.source and "prefetch" not in kernel.source

    @pytest.mark.parametrize("gpu, memory", [(("cuda", 86, 32), 99 << 10), (("hip", "gfx942", 64), 64 << 10), (("hip", "gfx1100", 32), 64 << 10)])  # fmt: skip
    def test_compiles_for_smaller_gpus(monkeypatch, gpu, memory):
        """Consumer NVIDIA, AMD Instinct and Radeon: with as many stages as their shared memory holds."""
        from triton.backends.compiler import GPUTarget

        from torch_spiral.kernels import ir, nest
        from torch_spiral.kernels.block import attention, conv, gemm
        from torch_spiral.kernels.kernel import Target
        from torch_spiral.kernels.triton_binary import compile_kernel
        from torch_spiral.kernels.vector.gemm import Epilogue

        monkeypatch.setenv("SPIRAL_CACHE", "0")
        backend, arch, _ = gpu
        target = Target(
            language="triton", schedule_class="block", engine=backend, float64=True, compute_units=60, max_workgroup_memory=memory,
            capability=arch if backend == "cuda" else 0,
        )  # fmt: skip
        fast = gemm.precision_of(target, "f32", True)
        wide, single = (gemm.schedule(target, *t, 4096, 4096, 1) for t in (("bf16", ""), ("f32", fast)))
        kernels = [
            nest.rows(
                target, "sums", [nest.Operand("out", "f32", ("0", "1"))], [nest.Operand("x", "f16", ("1", "s"))],
                lambda r, x: r.sum(ir.exp(x)),
            ).kernel,
            gemm.gemm(target, wide, "bf16", "bf16", "bf16", "n", "t", "n", "", False, Epilogue(("gelu",))),
            gemm.gemm(target, single, "f32", "f32", "f32", "n", "n", "n", fast, False, Epilogue()),
            gemm.gemm(
                target, gemm.blocks_schedule(target, 128, 4096, 4096), "f16", "f16", "bf16", "n", "t", "n", "", False, Epilogue(), blocks=128
            ),
            gemm.gemm(
                target, gemm.schedule(target, "f64", "", 512, 512, 1), "f64", "f64", "f64", "n", "n", "n", "", False, Epilogue()
            ),
            conv.conv(
                target, conv.schedule("f32", 256, 8192), "forward", "f32", "f32", 2, False, True, "bf16x6", Epilogue(), False
            ),
            *(
                conv.last(target, c.schedule, d, d, 2, False, p, "n", Epilogue(("relu",)), c.splits > 1)
                for d, p in (("bf16", ""), ("f32", fast))
                for c in (conv.choices(target, d, p, 4096, 256, 9, 256, 1)[0],)
            ),
            attention.forward(target, attention.forward_schedule("bf16", 64, 10), "bf16", 64, 64, False, "", True, ""),
            attention.backward_query(
                target, attention.backward_schedule("bf16", 64, False), "bf16", 64, 64, True, "", True, "", False, dropout=True
            ),
            *(
                attention.forward(
                    target, attention.forward_schedule("bf16", 64, 0), "bf16", 64, 64, True, "", True, "", "full", True, paged, False, True
                )
                for paged in ("tiles", "rows")
            ),
        ]  # fmt: skip
        for kernel in kernels:
            binary = compile_kernel(kernel, GPUTarget(*gpu), (), memory)
            assert binary.image[:4] == b"\x7fELF" and binary.shared <= memory, kernel.name
        with pytest.raises(RuntimeError, match="bytes of shared memory; the device has 1024"):
            compile_kernel(kernels[1], GPUTarget(*gpu), (), 1024)

    @pytest.mark.parametrize("steps,result,precision", [
        ((), "bf16", ""), ((("beta", "bf16", "n"), "gelu_tanh"), "bf16", ""), ((("beta", "bf16", "n"), "gelu"), "bf16", ""),
        ((("beta", "f32", "n"), ("add", "f32", "mn")), "f32", ""), (NORM, "bf16", ""), (NORM, "f32", "tf32"),
    ])  # fmt: skip
    def test_products_and_their_epilogues_spill_nothing(monkeypatch, tmp_path, steps, result, precision):
        """With the schedules that large products get (40 to 2300 bytes a thread were, and products took up to twelve times as long)."""
        from triton.backends.compiler import GPUTarget

        from torch_spiral.kernels.block import gemm
        from torch_spiral.kernels.kernel import Target
        from torch_spiral.kernels.triton import signature
        from torch_spiral.kernels.triton_binary import compile_kernel
        from torch_spiral.kernels.vector.gemm import Epilogue

        monkeypatch.setenv("SPIRAL_CACHE", "0")
        memory = 227 << 10
        target = Target(
            language="triton",
            schedule_class="block",
            engine="cuda",
            compute_units=132,
            capability=90,
            max_workgroup_memory=memory,
        )
        epilogue, dtype = Epilogue(steps), "f32" if precision else "bf16"
        s = gemm.schedule(target, dtype, precision, 4096, 4096, 1, True, True, gemm.is_busy(epilogue))
        stored = gemm.stores_tiles(target, s, dtype, result)
        kernel = gemm.gemm(target, s, dtype, dtype, result, "n", "t", "n", precision, False, epilogue, True, stored)
        types = signature(kernel)
        divisible = tuple((i, 16) for i, t in enumerate(types) if t.startswith("*") or t in ("i64", "i32"))
        binary = compile_kernel(kernel, GPUTarget("cuda", 90, 32), divisible, memory)
        assert s.persistent and stored and binary.scratch > 0 and binary.shared <= memory
        assert resources(binary, tmp_path)["STACK"] == 0

    @pytest.mark.parametrize("dtype,causal", [("bf16", True), ("f16", False)])
    def test_four_programs_of_attention_fit_on_a_unit(monkeypatch, tmp_path, dtype, causal):
        from triton.backends.compiler import GPUTarget

        from torch_spiral.kernels.block import attention
        from torch_spiral.kernels.kernel import Target
        from torch_spiral.kernels.triton import signature
        from torch_spiral.kernels.triton_binary import compile_kernel

        monkeypatch.setenv("SPIRAL_CACHE", "0")
        target = Target(
            language="triton",
            schedule_class="block",
            engine="cuda",
            compute_units=132,
            capability=90,
            max_workgroup_memory=227 << 10,
        )
        s = attention.forward_schedule(dtype, 64, 6, plain=True)
        kernel = attention.forward(target, s, dtype, 64, 64, True, "", causal, "")
        types = signature(kernel)
        divisible = tuple((i, 16) for i, t in enumerate(types) if t.startswith("*") or t == "i64")
        binary = compile_kernel(kernel, GPUTarget("cuda", 90, 32), divisible, target.max_workgroup_memory)
        assert 4 * (binary.shared + 1024) <= 228 << 10
        usage = resources(binary, tmp_path)
        assert usage["STACK"] == 0 and usage["REG"] * binary.threads * 4 <= 1 << 16

else:
    from torch_spiral.testing.triton_interpreter import TARGET, run  # isort: skip

    import torch

    from torch_spiral.kernels import ir, linalg, nest
    from torch_spiral.kernels.block import attention, conv, gemm, quantized
    from torch_spiral.kernels.builder import KernelBuilder
    from torch_spiral.kernels.kernel import Unsupported
    from torch_spiral.kernels.nest import Operand
    from torch_spiral.kernels.vector.gemm import Epilogue

    DTYPES = {
        "f32": torch.float32,
        "f16": torch.float16,
        "f64": torch.float64,
        "i32": torch.int32,
        "i64": torch.int64,
    }

    @pytest.fixture(autouse=True)
    def seed():
        torch.manual_seed(0)

    @pytest.mark.parametrize("n", [1, 1000, 1024, 2500])
    def test_pointwise(n):
        built = nest.pointwise(
            TARGET, "f", [Operand("o", "f16", "dense")], [Operand("x", "f16", "dense"), Operand("y", "f32", ("s",))],
            lambda x, y, a: ir.exp(x) * a + y, 1, scalars=["f32"],
        )  # fmt: skip
        x, y, out = torch.randn(n).half(), torch.randn(2 * n)[::2], torch.full((n + 5,), 7.0).half()
        run(built.kernel, [out, x, y], built.scalars([n], [None, None, (2,)], [1.5]), built.groups([n]))
        torch.testing.assert_close(out[:n], (x.float().exp() * 1.5 + y).half(), rtol=2e-3, atol=1e-3)
        assert (out[n:] == 7).all()

    def test_pointwise_strided_and_small_types():
        built = nest.pointwise(
            TARGET, "g", [Operand("o", "bool", ("1", "s"))], [Operand("x", "i64", ("s", "1")), Operand("y", "u8", ("1", "0"))],
            lambda x, y: ir.gt(x, ir.cast(y, "i64")), 2,
        )  # fmt: skip
        x, y, out = (
            torch.randint(-9, 9, (5, 7)),
            torch.randint(0, 5, (5,), dtype=torch.uint8),
            torch.zeros(7, 5, dtype=torch.bool),
        )
        run(built.kernel, [out, x, y], built.scalars([5, 7], [(1, 5), (7, 1), (1, 0)]), built.groups([5, 7]))
        assert (out == (x > y[:, None]).t()).all()

    @pytest.mark.parametrize("d", [1, 700, 1024, 2100])
    def test_rows(d):
        def softmax(r, x):
            e = ir.exp(x - r.reduce(nest.MAX(), x))
            return e / r.sum(e)

        built = nest.rows(
            TARGET, "softmax", [Operand("o", "f32", ("1", "s"))], [Operand("x", "f32", ("1", "s"))], softmax
        )
        x, out = torch.randn(3, d), torch.zeros(3, d)
        run(built.kernel, [out, x], built.scalars([d, 3], [(1, d), (1, d)]), built.groups([d, 3]))
        torch.testing.assert_close(out, x.softmax(-1))

    def test_cross_entropy_of_long_rows():
        """The largest element and the sum in one pass, four blocks at a time; and a gradient, which has no reduction."""
        from torch_spiral.ops import losses

        d, row, one, whole = 5200, ("1", "s"), ("0", "1"), ("0", "0")
        totals = nest.rows(
            TARGET, "totals", [Operand("m", "f32", one), Operand("l", "f32", one)], [Operand("x", "f32", row)],
            lambda r, x: losses._row_totals(True, r, x),
        )  # fmt: skip
        x, y = torch.randn(4, d), torch.tensor([0, d - 1, -100, 2])
        x[1, d // 2] = -torch.inf
        # The interpreter takes seconds for a row.
        first = [torch.zeros(1), torch.zeros(1), x[1:2]]
        run(totals.kernel, first, totals.scalars([d, 1], [(0, 1), (0, 1), (1, d)]), totals.groups([d, 1]))
        m, log_total = x.amax(1), x.logsumexp(1) - x.amax(1)
        torch.testing.assert_close(torch.cat(first[:2]), torch.stack([m[1], log_total[1]]))
        gradient = nest.rows(
            TARGET, "gradient", [Operand("o", "f32", row)],
            [Operand("x", "f32", row), Operand("y", "i64", one), *(Operand(n, "f32", one) for n in "ml"), *(Operand(n, "f32", whole) for n in "gn")],
            lambda *args: losses._cross_entropy_gradient(True, *args), scalars=["i32"],
        )  # fmt: skip
        out, g, count = torch.zeros(4, d), torch.tensor(2.0), torch.tensor(3.0)
        strides = [(1, d), (1, d), *[(0, 1)] * 3, *[(0, 0)] * 2]
        scalars = gradient.scalars([d, 4], strides, [-100])
        run(gradient.kernel, [out, x, y, m, log_total, g, count], scalars, gradient.groups([d, 4]))
        x.requires_grad_()
        (want,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x, y), x, g)
        torch.testing.assert_close(out, want)

    def test_argmax_propagates_nan():
        built = nest.rows(
            TARGET, "argmax", [Operand("v", "f32", ("0", "1")), Operand("i", "i64", ("0", "1"))], [Operand("x", "f32", ("1", "s"))],
            lambda r, x: r.reduce(nest.ARGMAX(), x, r.index),
        )  # fmt: skip
        x = torch.randn(4, 1500)
        x[1, 1200] = x[1, 1300] = 50
        x[2, 77] = torch.nan
        v, i = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
        run(built.kernel, [v, i, x], built.scalars([1500, 4], [(0, 1), (0, 1), (1, 1500)]), built.groups([1500, 4]))
        expected = x.max(1)
        assert torch.equal(i, expected.indices) and torch.equal(v.nan_to_num(-1), expected.values.nan_to_num(-1))

    def test_columns_in_splits():
        """Rows side by side, each cut into pieces: the pieces of one row meet again in the second launch."""
        s = nest.split_rows(
            TARGET, "sum", [Operand("o", "f32", ("0", "1"))], [Operand("x", "f32", ("s", "1"))], lambda r, x: r.sum(x)
        )
        x, out, n = torch.randn(301, 150), torch.zeros(150), 4
        partial = torch.zeros(150 * n)
        run(
            s.first.kernel,
            [partial, x],
            s.first.scalars([301, 150], [(150, 1)], splits=n),
            s.first.groups([301, 150], n),
        )
        sizes, strides = s.second_shape([301, 150], n, [(1,)])
        run(s.second.kernel, [out, partial], s.second.scalars(sizes, strides, [301]), s.second.groups(sizes))
        torch.testing.assert_close(out, x.sum(0), rtol=1e-5, atol=1e-4)

    def test_control_flow():
        """Collatz lengths: a While whose lanes end at different times, Break, Else, and a For of varying length."""
        k = KernelBuilder(TARGET, "collatz")
        x, steps, total = k.buffer("x", "i32"), k.buffer("steps", "i32", "w"), k.buffer("total", "i32", "w")
        n = k.scalar("n", "u32")
        i = k.global_id(64)
        with k.If(i < n):
            v, count, both = k.var("i32", x[i]), k.var("i32", 0), k.var("i32", 0)
            with k.While():
                with k.If(ir.eq(v, 1)):
                    k.Break()
                with k.If(ir.eq(ir.and_(v.as_node(), 1), 0)):
                    v.set(ir.idiv(v.as_node(), 2))
                with k.Else():
                    v.set(v * 3 + 1)
                count.set(count + 1)
            with k.For(ir.const(0, "i32"), x[i]) as j:
                with k.If(ir.eq(ir.irem(j, 2), 1)):
                    k.Continue()
                both.set(both + j)
            steps[i] = count
            total[i] = both
        kernel = k.finish(workgroup=(64, 1, 1))
        values = torch.arange(1, 101, dtype=torch.int32)
        got, sums = torch.full((110,), -1, dtype=torch.int32), torch.zeros(110, dtype=torch.int32)
        run(kernel, [values, got, sums], [100], (2,))

        def length(v):
            return 0 if v == 1 else 1 + length(v // 2 if v % 2 == 0 else 3 * v + 1)

        assert got[:100].tolist() == [length(v) for v in values.tolist()] and (got[100:] == -1).all()
        assert sums[:100].tolist() == [sum(j for j in range(v) if j % 2 == 0) for v in values.tolist()]

    def test_return_leaves_other_lanes():
        k = KernelBuilder(TARGET, "leave")
        out = k.buffer("out", "i32", "w")
        i = k.global_id(48)  # not a power of two
        with k.If(ir.eq(ir.irem(i, 3), 0)):
            k.Return()
        out[i] = ir.cast(i, "i32")
        got = torch.full((96,), -1, dtype=torch.int32)
        run(k.finish(workgroup=(48, 1, 1)), [got], [], (2,))
        assert got.tolist() == [-1 if i % 3 == 0 else i for i in range(96)]

    @pytest.mark.parametrize("dtype", ["f32", "i32", "f64"])
    def test_atomic_add(dtype):
        k = KernelBuilder(TARGET, f"scatter_{dtype}")
        x, at, out = k.buffer("x", dtype), k.buffer("at", "i64"), k.buffer("out", dtype, "a")
        n = k.scalar("n", "u32")
        i = k.global_id(64)
        with k.If(i < n):
            out.atomic_add(at[i], x[i])
        x, at = (torch.randn(200) * 8).to(DTYPES[dtype]), torch.randint(0, 9, (200,))
        out = torch.zeros(9, dtype=DTYPES[dtype])
        run(k.finish(workgroup=(64, 1, 1)), [x, at, out], [200], (4,))
        torch.testing.assert_close(out, torch.zeros_like(out).index_add(0, at, x), rtol=1e-4, atol=1e-4)

    def test_index_errors_are_reported():
        k = KernelBuilder(TARGET, "gather")
        x, at, out = k.buffer("x", "f32"), k.buffer("at", "i64"), k.buffer("out", "f32", "w")
        site = k.scalar("site", "u32")
        i = k.global_id(32)
        out[i] = x[k.check_index(at[i], 0, 10, site)]
        kernel = k.finish(workgroup=(32, 1, 1))
        x, at, out, words = (
            torch.randn(10),
            torch.randint(0, 10, (32,)),
            torch.zeros(32),
            torch.zeros(2, dtype=torch.int32),
        )
        run(kernel, [x, at, out], [3], (1,), words)
        assert torch.equal(out, x[at]) and words.tolist() == [0, 0]
        at[5] = 12
        run(kernel, [x, at, out], [3], (1,), words)
        assert words.tolist() == [3, 12]

    def test_what_has_no_form_is_refused():
        k = KernelBuilder(TARGET, "shared")
        with pytest.raises(Unsupported, match="shared memory"):
            k.shared("f32", 4)
        with pytest.raises(Unsupported, match="barrier"):
            k.barrier()

    @pytest.mark.parametrize("n", [4])
    def test_factorizations(n):
        """One matrix of a batch for each program; what a lane stores, others read after a barrier."""
        a = torch.randn(2, n, n, dtype=torch.float64)
        spd, info = a @ a.mT + n * torch.eye(n), torch.full((2,), 7, dtype=torch.int32)
        x = spd.clone()
        run(linalg.cholesky(TARGET, "f64"), [x, info], [*x.stride(), 2, 0, n], (2,))
        torch.testing.assert_close(x.tril(), torch.linalg.cholesky(spd))
        x[1] = -spd[1]
        run(linalg.cholesky(TARGET, "f64"), [x, info], [*x.stride(), 2, 0, n], (2,))
        assert info.tolist()[1] == 1
        x, pivots = a.clone(), torch.zeros(2, n, dtype=torch.int32)
        run(linalg.lu(TARGET, "f64", True), [x, pivots, info], [*x.stride(), 2, n, 0, n, n], (2,))
        expected, places = torch.linalg.lu_factor(a)
        torch.testing.assert_close(x, expected)
        assert torch.equal(pivots, places) and info.tolist() == [0, 0]
        x, tau = a.clone(), torch.zeros(2, n, dtype=torch.float64)
        run(linalg.geqrf(TARGET, "f64"), [x, tau], [*x.stride(), 2, n, n, n], (2,))
        expected, factors = torch.geqrf(a)
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(tau, factors)
        run(linalg.orgqr(TARGET, "f64"), [x, tau], [*x.stride(), 2, n, n, n, n], (2,))
        torch.testing.assert_close(x, torch.linalg.householder_product(expected, factors))

    @pytest.mark.parametrize("dtype", ["f32", "f16", "f64", "i32"])
    @pytest.mark.parametrize("layouts", ["nn", "nt", "tn", "tt"])
    def test_gemm(dtype, layouts):
        (m, n, k), t = (37, 70, 75), DTYPES[dtype]
        a, b, c = (torch.randn(2, m, k) * 4).to(t), (torch.randn(2, k, n) * 4).to(t), torch.zeros(2, m, n, dtype=t)
        a = a.mT.contiguous().mT if layouts[0] == "t" else a
        b = b.mT.contiguous().mT if layouts[1] == "t" else b
        s = gemm.WHOLE[0] if dtype == "i32" else gemm.Schedule(32, 32, 16, 4, 3)
        kernel = gemm.gemm(
            TARGET, s, dtype, dtype, dtype, *layouts, "n", "ieee" if dtype == "f32" else "", False, Epilogue()
        )
        values = dict(
            zip(
                ["ab", "am", "ak", "bb", "bk", "bn", "cb", "cm", "cn", "m", "n", "k"],
                (*a.stride(), *b.stride(), *c.stride(), m, n, k),
            )
        )
        scalars = [values[name] for name, _ in gemm.gemm_scalars(*layouts, "n", False)]
        run(kernel, [a, b, c], scalars, gemm.groups(s, m, n, 2))
        tolerance = {"f16": 2e-3, "f64": 1e-12}.get(dtype, 1e-5)
        torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=tolerance, atol=50 * tolerance)

    @pytest.mark.parametrize("layout", ["t", "n"])
    @pytest.mark.parametrize("dtype,n,k", [("f16", 37, 600), ("f16", 5, 2500), ("f32", 70, 1300)])
    def test_row_product(dtype, n, k, layout):
        """[3, 1, k] @ [3, k, n]; with a bias, and a residual that is added after an activation."""
        t = DTYPES[dtype]
        a, b, out = torch.randn(3, 1, k, dtype=t), torch.randn(3, n, k, dtype=t), torch.zeros(3, 1, n, dtype=t)
        bias, residual = torch.randn(n, dtype=t), torch.randn(3, 1, n, dtype=t)
        b = b.mT if layout == "t" else b.mT.contiguous()
        epilogue = Epilogue((("add", dtype, "n"), "relu", ("add", dtype, "mn")))
        s = gemm.row_schedule(TARGET, dtype, layout, n, k, 3)
        kernel = gemm.row_product(TARGET, s, dtype, dtype, dtype, "n", layout, "n", epilogue)
        scalars = [k, n * k, n, k, k if layout == "t" else n, n, 0, n, n, 1, n, k]
        run(kernel, [a, b, bias, residual, out], scalars, gemm.row_groups(s, n, 3))
        expected = (a.double() @ b.double() + bias.double()).relu() + residual.double()
        tolerance = {"f32": 1e-5, "f16": 2e-3}[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=10 * tolerance)

    @pytest.mark.parametrize("layout", ["t", "n"])
    def test_row_products_beside_each_other(layout):
        """Of one row with three matrices, whose rows lie apart."""
        k, columns = 300, (37, 5, 16)
        a = torch.randn(1, k, dtype=torch.float16)
        wide = [torch.randn(n, k + 8) if layout == "t" else torch.randn(k, n + 8) for n in columns]
        b = [w.half()[:, :k].mT if layout == "t" else w.half()[:, :-8] for w in wide]
        c = [torch.zeros(n, dtype=torch.float16) for n in columns]
        s = gemm.row_schedule(TARGET, "f16", layout, sum(columns), k, 1)
        kernel = gemm.row_product(TARGET, s, "f16", "f16", "f16", "n", layout, "n", Epilogue(), 3)
        groups = sum(gemm.row_groups(s, n, 1)[0] for n in columns)
        scalars = [*(x.stride(1 if layout == "t" else 0) for x in b), *columns, k]
        run(kernel, [a, *(x for pair in zip(b, c) for x in pair)], scalars, (groups, 1, 1))
        for x, y in zip(b, c):
            torch.testing.assert_close(y.double(), (a.double() @ x.double())[0], rtol=2e-3, atol=2e-2)

    @pytest.mark.parametrize("layouts,split,stored,persistent,streamed", [
        ("nn", False, True, False, False), ("nt", False, False, True, False), ("tn", True, False, False, False),
        ("tt", False, True, True, False), ("nt", False, True, False, True),
    ])  # fmt: skip
    def test_gemm_through_descriptors(layouts, split, stored, persistent, streamed):
        """Odd sizes in rows of a multiple of 16 bytes; what lies between the rows is neither read nor written."""
        m, n, k, batch = 37, 70, 75, 1 if persistent or streamed else 2

        def padded(rows, columns, turned=False):
            rows, columns = (columns, rows) if turned else (rows, columns)
            x = torch.full((batch, rows, (columns + 7) // 8 * 8), torch.nan, dtype=torch.float16)[:, :, :columns]
            x.copy_(torch.randn(batch, rows, columns))
            return x.mT if turned else x

        a, b, c = padded(m, k, layouts[0] == "t"), padded(k, n, layouts[1] == "t"), padded(m, n)
        expected = a.double() @ b.double()
        s = gemm.Schedule(32, 32, 16, 4, 3, persistent=persistent, streamed=streamed)
        count, span = (3, 32) if split else (1, k)
        out = torch.zeros(batch * count, m, n) if split else c
        dtype = "f32" if split else "f16"
        kernel = gemm.gemm(TARGET, s, "f16", "f16", dtype, *layouts, "n", "", split, Epilogue(), True, stored)
        cb, cm, cn = out.stride()
        values = dict(zip(["ab", "am", "ak", "bb", "bk", "bn"], (*a.stride(), *b.stride())))
        values.update(cb=cb, cm=cm, cn=cn, cs=batch * m * n, m=m, n=n, k=k, span=span)
        groups = (4, 1, 1) if persistent or streamed else gemm.groups(s, m, n, batch, count)
        partial = [torch.full((4, 2, 32, 32), torch.nan)] if streamed else []
        scalars = [values[name] for name, _ in gemm.gemm_scalars(*layouts, "n", split)]
        run(kernel, [a, b, out, *partial], scalars + [batch] * streamed, groups)
        if streamed:
            finish = gemm.stream_reduce(TARGET, s, "f32", "f16", "n", Epilogue())
            run(finish, [*partial, c], [cb, cm, m, n, k, 4, 1], gemm.stream_reduce_groups(s, 4, m, n, 1))
        if split:
            out = out.view(count, batch, m, n).sum(0)
        torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=0.1)
        if not split:
            assert c._base.isnan().sum() == batch * m * (c._base.shape[2] - n)

    @pytest.mark.parametrize("result", ["f32", "f16"])
    @pytest.mark.parametrize("activation", ["relu", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "hardswish"])
    def test_activations(activation, result):
        """Of products that are the numbers themselves: small, large, infinite and NaN."""
        x = torch.cat([torch.linspace(-12, 12, 497), torch.tensor([0.0, 1e-6, -80, 80, 1e4, -1e4, math.inf, math.nan])])
        x = x.to(torch.float16)[None, :]
        one, out = torch.ones(1, 1, dtype=torch.float16), torch.zeros(x.shape, dtype=DTYPES[result])
        s, n = gemm.Schedule(16, 128, 16, 4, 1), x.shape[1]
        kernel = gemm.gemm(TARGET, s, "f16", "f16", result, "n", "n", "n", "", False, Epilogue((activation,)))
        run(kernel, [one, x, out], [1, n, n, 1, n, n, 1, n, 1], gemm.groups(s, 1, n, 1))
        function = getattr(torch.nn.functional, activation.removesuffix("_tanh") if activation != "tanh" else "tanh")
        expected = function(x.double(), **({"approximate": "tanh"} if activation == "gelu_tanh" else {}))
        rtol, atol = (2e-6, 1e-6) if result == "f32" else (1e-3, 1e-5)  # upstream's, but for float32's rtol of 1.3e-6
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol, equal_nan=True)

    @pytest.mark.parametrize("described", [False, True])
    def test_batch_norm_of_a_product(described):
        """Folded into a multiply-add; statistics and their neighbours beyond the matrix are not read. A bias times zero is not, either."""
        m, n, k = 40, 72, 48
        a, b, residual = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        mean, variance, weight, bias = torch.randn(n), torch.rand(n), torch.randn(n), torch.randn(n)
        nothing, out = torch.full((n,), torch.nan), torch.zeros(m, n)
        steps = (*NORM[:4], ("add", "f32", "mn"), "relu", ("beta", "f32", "n"))
        s = gemm.Schedule(32, 64, 16, 4, 1, persistent=described)
        kernel = gemm.gemm(
            TARGET, s, "f32", "f32", "f32", "n", "t", "n", "ieee", False, Epilogue(steps), described, described
        )
        scalars = [0, 0, 0, k, k, n, 0, 0, 0, 0, 0, n, 0, m, n, k, 0.0]
        operands = [a, b, mean, variance, weight, bias, residual, nothing, out]
        run(kernel, operands, scalars, (3, 1, 1) if described else gemm.groups(s, m, n, 1))
        x, *statistics = (t.double() for t in (a @ b.t(), mean, variance, weight, bias))
        expected = torch.nn.functional.batch_norm(x, *statistics, eps=1e-5) + residual
        torch.testing.assert_close(out.double(), expected.relu(), rtol=1e-5, atol=1e-4)

    STREAMED = [  # m, n, k and batch; dtype, layouts, programs
        ((50, 70, 200, 1), "f16", "nn", 5),  # six tiles of 13 steps: every program ends within a tile
        ((20, 30, 500, 1), "f32", "nt", 7),  # one tile, seven programs
        ((33, 31, 17, 3), "f32", "tn", 4),  # batches: six tiles of two steps
        ((100, 90, 40, 1), "f32", "nn", 5),  # twelve tiles: five whole, seven shared
        ((64, 64, 32, 1), "f32", "nn", 2),  # four tiles: nothing to share
        ((10, 20, 5, 2), "i32", "nn", 2),
    ]

    @pytest.mark.parametrize("sizes,dtype,layouts,programs", STREAMED)
    def test_streamed_gemm(sizes, dtype, layouts, programs):
        """Stream-K: steps shared evenly among programs; alpha, a bias, a residual of any strides and an activation, applied once."""
        (m, n, k, batch), t, whole = sizes, DTYPES[dtype], dtype == "i32"

        def matrix(*sizes, turned=False):
            x = torch.randn(*sizes[:-2], *(sizes[:-3:-1] if turned else sizes[-2:]))
            x = (x * 4 if whole else x).to(t)
            return x.mT if turned else x

        s = gemm.Schedule(32, 32, 1 if whole else 16, 4, 3, streamed=True)
        a, b = matrix(batch, m, k, turned=layouts[0] == "t"), matrix(batch, k, n, turned=layouts[1] == "t")
        bias, residual = matrix(1, n)[0], matrix(batch, n, m).mT
        c = torch.full((batch, m + 1, n + 3), 7).to(t)[:, :m, :n]
        epilogue = Epilogue(("alpha", ("add", dtype, "n"), *(() if whole else ("relu",)), ("add", dtype, "s")))
        precision = "ieee" if dtype == "f32" else ""
        kernel = gemm.gemm(TARGET, s, dtype, dtype, dtype, *layouts, "n", precision, False, epilogue)
        compute = torch.int32 if whole else torch.float32
        partial = torch.full((programs, 2, 32, 32), 1 << 20 if whole else torch.nan, dtype=compute)
        assert gemm.stream_programs(programs, s, m, n, k, batch) == programs
        values = dict(zip(["ab", "am", "ak", "bb", "bk", "bn", "cb", "cm"], (*a.stride(), *b.stride(), *c.stride())))
        values.update(m=m, n=n, k=k)
        strides = [0, *residual.stride()]  # of the bias, then of the residual
        alpha = 3 if whole else 0.5
        named = [(v, values[v]) for v, _ in gemm.gemm_scalars(*layouts, "n", False)]
        wide, small = [v for x, v in named if x not in "mnk"], [v for x, v in named if x in "mnk"]
        run(kernel, [a, b, bias, residual, c, partial], [*wide, *strides, *small, alpha, batch], (programs, 1, 1))
        finish = gemm.stream_reduce(TARGET, s, dtype if whole else "f32", dtype, "n", epilogue)
        scalars = [*c.stride()[:2], *strides, m, n, k, programs, batch, alpha]
        groups = gemm.stream_reduce_groups(s, programs, m, n, batch)
        run(finish, [partial, bias, residual, c], scalars, groups)
        expected = alpha * (a.double() @ b.double()) + bias.double()
        expected = (expected if whole else expected.relu()) + residual.double()
        tolerance = {"f32": 1e-5, "f16": 4e-3, "i32": 0}[dtype]
        torch.testing.assert_close(c.double(), expected, rtol=tolerance, atol=10 * tolerance)
        assert (c._base[:, m:] == 7).all() and (c._base[:, :, n:] == 7).all()

    @pytest.mark.parametrize("fast", [False, True])
    def test_gemm_of_float8(fast):
        """With scales of rows and columns; the two formats may differ."""
        m, n, k = 20, 33, 70
        a, b = torch.randn(m, k).to(torch.float8_e4m3fn), torch.randn(n, k).to(torch.float8_e5m2)
        rows, columns, c = torch.rand(m), torch.rand(n), torch.zeros(m, n)
        s = gemm.Schedule(32, 32, 32, 4, 1)
        epilogue = Epilogue((("mul", "f32", "m"), ("mul", "f32", "n")))
        kernel = gemm.gemm(
            TARGET, s, "f8e4m3fn", "f8e5m2", "f32", "n", "t", "n", "fast" if fast else "", False, epilogue
        )
        scalars = [0, 0, 0, k, k, n, 0, 1, 0, m, n, k]
        run(kernel, [a, b, rows, columns, c], scalars, gemm.groups(s, m, n, 1))
        expected = (a.double() @ b.double().t()) * rows[:, None] * columns
        torch.testing.assert_close(c.double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("size,rows_b,dtype,split,described", [
        (128, 128, "f8e4m3fn", False, False), (32, 1, "f8e5m2", False, False), (64, 1, "f16", True, False),
        (128, 128, "f8e4m3fn", False, True), (32, 1, "f8e4m3fn", True, True),
    ])  # fmt: skip
    def test_gemm_of_blocks(size, rows_b, dtype, split, described):
        """Operands whose blocks have factors; the last blocks are not whole."""
        m, n, k, kind = (
            20,
            140,
            208,
            {"f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "f16": torch.float16}[dtype],
        )
        a, b = torch.randn(m, k).to(kind), torch.randn(n, k).to(kind)
        steps = -(-k // size)
        fa, fb = torch.rand(steps, m).t(), torch.rand(-(-n // rows_b), steps)
        whole_a = a.float() * fa.repeat_interleave(size, 1)[:, :k]
        whole_b = b.float() * fb.repeat_interleave(rows_b, 0)[:n].repeat_interleave(size, 1)[:, :k]
        s, span, c = gemm.Schedule(16, 32, 32, 4, 1), 128, torch.zeros(2 if split else 1, m, n)
        kernel = gemm.gemm(
            TARGET,
            s,
            dtype,
            dtype,
            "f32",
            "n",
            "t",
            "n",
            "",
            split,
            Epilogue(),
            described,
            blocks=size,
            even=rows_b == 128,
        )
        scalars = [
            0,
            0,
            0,
            k,
            k,
            n,
            *([m * n] if split else []),
            *fa.stride(),
            *fb.stride(),
            m,
            n,
            k,
            *([span] if split else []),
        ]
        run(kernel, [a, b, c, fa, fb], [*scalars, 1, rows_b], gemm.groups(s, m, n, 1, len(c)))
        torch.testing.assert_close(c.sum(0), whole_a @ whole_b.t(), rtol=1e-3, atol=1e-3)

    def test_float8_numbers():
        """Every number widens and narrows as on the CPU."""
        for name, dtype in (("f8e4m3fn", torch.float8_e4m3fn), ("f8e5m2fnuz", torch.float8_e5m2fnuz)):
            x = torch.arange(256).to(torch.uint8).view(dtype)
            layouts = [Operand("o", "f32", "dense")], [Operand("x", name, "dense")]
            built = nest.pointwise(TARGET, f"widen_{name}", *layouts, lambda v: v * 1.1, 1)
            out = torch.zeros(256)
            run(built.kernel, [out, x], built.scalars([256], [None, None], []), built.groups([256]))
            torch.testing.assert_close(out, x.float() * 1.1, equal_nan=True)
            layouts = [Operand("o", name, "dense")], [Operand("x", "f32", "dense")]
            built = nest.pointwise(TARGET, f"narrow_{name}", *layouts, lambda v: v, 1)
            got = torch.zeros(256, dtype=torch.uint8).view(dtype)
            run(built.kernel, [got, out], built.scalars([256], [None, None], []), built.groups([256]))
            torch.testing.assert_close(got.float(), out.to(dtype).float(), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("layouts", ["nn", "nt", "tn"])
    def test_grouped_gemm(layouts):
        """Rows, then the reduction, cut by offsets; one group is empty, what lies behind the last is left alone."""
        ends, k, n, s = [5, 5, 40, 60], 37, 21, gemm.Schedule(16, 16, 16, 4, 1)
        offs, spans = torch.tensor(ends, dtype=torch.int32), list(zip([0, *ends[:-1]], ends))

        def scalars(a, b, c, *sizes):
            names = ["ab", "am", "ak", "bb", "bk", "bn", "cb", "cm", "cn", "m", "n", "k"]
            values = dict(zip(names, (*a, *b, *c, *sizes)))
            return [*(values[name] for name, _ in gemm.gemm_scalars(*layouts, "n", False)), len(ends)]

        def kernel(cut):
            return gemm.gemm(TARGET, s, "f32", "f32", "f32", *layouts, "n", "ieee", False, Epilogue(), grouped=cut)

        def matrix(*sizes, turned):
            return torch.randn(*sizes[:-2], sizes[-1], sizes[-2]).mT if turned else torch.randn(*sizes)

        turned = [layout == "t" for layout in layouts]
        a, b, c = matrix(63, k, turned=turned[0]), matrix(4, k, n, turned=turned[1]), torch.full((63, n), 7.0)
        run(
            kernel("rows"), [a, b, c, offs], scalars((0, *a.stride()), b.stride(), (0, n, 1), 63, n, k),
            gemm.grouped_groups(s, 63, n, 4),
        )  # fmt: skip
        expected = torch.cat([a[i:j] @ b[g] for g, (i, j) in enumerate(spans)])
        torch.testing.assert_close(c[:60], expected, rtol=1e-4, atol=1e-4)
        assert (c[60:] == 7).all()
        a, b, c = matrix(19, 63, turned=turned[0]), matrix(63, n, turned=turned[1]), torch.full((4, 19, n), 7.0)
        run(
            kernel("k"), [a, b, c, offs], scalars((0, *a.stride()), (0, *b.stride()), c.stride(), 19, n, 63),
            gemm.groups(s, 19, n, 4),
        )  # fmt: skip
        expected = torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
        torch.testing.assert_close(c, expected, rtol=1e-4, atol=1e-4)

    def test_grouped_gemm_of_float8():
        """Scales of the rows of the whole matrix and of the columns of each group; then of rows and columns of each group."""
        ends, k, n, s = [5, 5, 40, 60], 48, 33, gemm.Schedule(16, 16, 32, 4, 1)
        offs, spans = torch.tensor(ends, dtype=torch.int32), list(zip([0, *ends[:-1]], ends))

        def kernel(cut):
            epilogue = Epilogue((("mul", "f32", "m"), ("mul", "f32", "n")))
            return gemm.gemm(TARGET, s, "f8e4m3fn", "f8e4m3fn", "f32", "n", "t", "n", "", False, epilogue, grouped=cut)

        a, b = torch.randn(63, k).to(torch.float8_e4m3fn), torch.randn(4, n, k).to(torch.float8_e4m3fn)
        rows, columns, c = torch.rand(63), torch.rand(4, n), torch.full((63, n), 7.0)
        values = [0, b.stride(0), 0, k, k, n, 0, 1, n, 63, n, k, 4]
        run(kernel("rows"), [a, b, rows, columns, c, offs], values, gemm.grouped_groups(s, 63, n, 4))
        expected = [
            (a[i:j].float() * rows[i:j, None]) @ (b[g].float().mT * columns[g]) for g, (i, j) in enumerate(spans)
        ]
        torch.testing.assert_close(c[:60], torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert (c[60:] == 7).all()
        a, b = torch.randn(19, 63).to(torch.float8_e4m3fn), torch.randn(n, 63).to(torch.float8_e4m3fn)
        rows, c = torch.rand(4, 19), torch.full((4, 19, n), 7.0)
        values = [0, 0, 19 * n, 63, 63, n, 19, 1, n, 19, n, 63, 4]
        run(kernel("k"), [a, b, rows, columns, c, offs], values, gemm.groups(s, 19, n, 4))
        a, b = a.float(), b.float().mT
        expected = [(a[:, i:j] * rows[g][:, None]) @ (b[i:j] * columns[g]) for g, (i, j) in enumerate(spans)]
        torch.testing.assert_close(c, torch.stack(expected), rtol=1e-4, atol=1e-4)

    def test_gemm_of_int8():
        a, b = (
            torch.randint(-128, 128, (20, 70), dtype=torch.int8),
            torch.randint(-128, 128, (33, 70), dtype=torch.int8),
        )
        c = torch.zeros(20, 33, dtype=torch.int32)
        s = gemm.Schedule(32, 32, 32, 4, 1)
        kernel = gemm.gemm(TARGET, s, "i8", "i8", "i32", "n", "t", "n", "", False, Epilogue())
        run(kernel, [a, b, c], [0, 0, 0, 70, 70, 33, 20, 33, 70], gemm.groups(s, 20, 33, 1))
        assert torch.equal(c.long(), a.long() @ b.long().t())

    @pytest.mark.parametrize("bits", [8, 4])
    def test_quantized_weights(bits):
        m, k, n, group = 19, 96, 40, 32
        x, out = torch.randn(m, k + 3).half()[:, :k], torch.zeros(m, n).half()
        if bits == 8:
            w, scales = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n).half()
            expected, packed = x.double() @ w.double().t() * scales.double(), w
        else:
            q, scales = torch.randint(0, 16, (n, k)), torch.randn(k // group, n, 2).half()
            packed = (q[:, ::2] * 16 + q[:, 1::2]).to(torch.uint8).view(torch.int32)
            factor, zero = (scales[..., i].double().repeat_interleave(group, 0).t() for i in (0, 1))
            expected = x.double() @ ((q - 8) * factor + zero).t()
        s = gemm.Schedule(16, 32, 32, 4, 1)
        kernel = quantized.product(TARGET, s, "f16", bits, "f16", group, "")
        run(kernel, [x, packed, scales, out], [k + 3, m, n, k], quantized.groups(s, m, n))
        assert (out.double() - expected).norm() / expected.norm() < 2e-3

    def test_gemm_in_splits_with_epilogue():
        m, n, k, count = 20, 33, 200, 3
        a, b, bias, c = torch.randn(m, k), torch.randn(k, n), torch.randn(n), torch.zeros(m, n)
        s = gemm.Schedule(32, 32, 16, 4, 3)
        span = (-((-k // count) // s.k)) * s.k
        partial = torch.zeros(count, m, n)
        kernel = gemm.gemm(TARGET, s, "f32", "f32", "f32", "n", "n", "n", "ieee", True, Epilogue())
        run(kernel, [a, b, partial], [0, 0, m * n, k, n, n, m * n, m, n, k, span], gemm.groups(s, m, n, 1, count))
        epilogue = Epilogue(("alpha", ("beta", "f32", "n"), "relu"))
        finish = gemm.reduce_splits(TARGET, "f32", "f32", "n", epilogue)
        run(finish, [partial, bias, c], [m * n, n, m * n, 0, m, n, count, 2.0, 0.5], gemm.reduce_groups(m, n, 1))
        torch.testing.assert_close(c, torch.relu(2 * (a @ b) + 0.5 * bias), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mask,causal,head,head_v,scale", [
        ("", True, 32, 32, 0.3), ("", False, 20, 12, 0.0), ("bool", False, 20, 12, 0.3), ("f32", False, 32, 16, 0.3),
        ("bool_0n", False, 20, 12, 0.3), ("f32_n", False, 32, 16, 0.3),
    ])  # fmt: skip
    def test_attention(mask, causal, head, head_v, scale):
        batch, heads, kv, queries, keys = 1, 4, 2, 37, 53
        q, k, v = (
            torch.randn(batch, h, t, d, requires_grad=True)
            for h, t, d in ((heads, queries, head), (kv, keys, head), (kv, keys, head_v))
        )
        scores = q @ k.repeat_interleave(2, 1).mT * scale
        m, (kind, _, layout) = None, mask.partition("_")
        if causal:
            scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -torch.inf)
        if kind:
            m = torch.randn(batch, heads, 1 if layout == "0n" else queries, keys).expand(batch, heads, queries, keys)
            m = m if layout else m.mT.contiguous().mT
        if kind == "bool":
            m = torch.where(m > -0.5, True, False)
            m = m[:, :, :1].expand(m.shape) if layout == "0n" else m
            m[0, 0, 3] = False  # sees nothing
            scores = scores.masked_fill(~m, -torch.inf)
        if kind == "f32":
            scores = scores + m
        expected = scores.softmax(-1).nan_to_num(0) @ v.repeat_interleave(2, 1)
        g = torch.randn_like(expected)
        wanted = [x.nan_to_num(0) for x in torch.autograd.grad(expected, (q, k, v), g)]
        q, k, v = (x.detach() for x in (q, k, v))

        def bht(*tensors):
            return [s for x in tensors for s in x.stride()[:3]]

        s, classes = attention.Schedule(16, 16, 4, 1), ((head + 31) // 32 * 32, (head_v + 31) // 32 * 32)
        masks, mask_strides = ([m], list(m.stride())) if m is not None else ([], [])
        tail = [*mask_strides, heads, heads // kv, queries, keys, head, head_v, scale]
        key = (s, "f32", *classes, False, mask, causal, "ieee")
        out, lse = torch.full((batch, heads, queries, head_v), 9.0), torch.zeros(batch, heads, queries)
        over_queries = attention.groups(16, queries, batch * heads)
        run(attention.forward(TARGET, *key), [q, k, v, *masks, out, lse], bht(q, k, v, out) + tail, over_queries)
        torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
        delta = torch.zeros(batch, heads, queries)
        run(
            attention.delta(TARGET, "f32", classes[1]), [g, out, delta], [*bht(g, out), heads, queries, head_v],
            attention.groups(32, queries, batch * heads),
        )  # fmt: skip
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        buffers = [q, k, v, g, *masks, lse, delta]
        run(attention.backward_query(TARGET, *key, False), [*buffers, dq], bht(q, k, v, g, dq) + tail, over_queries)
        over_keys = attention.groups(16, keys, batch * kv)
        run(attention.backward_key(TARGET, *key), [*buffers, dk, dv], bht(q, k, v, g, dk, dv) + tail, over_keys)
        for got, want in zip((dq, dk, dv), wanted):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype,causal", [("f32", True), ("bf16", True), ("f16", False)])
    def test_attention_by_groups_of_heads(monkeypatch, dtype, causal):
        monkeypatch.setattr(attention, "TOGETHER", 2)  # pairs of heads of keys: four of queries, then two
        heads, kv, queries, keys, head = 6, 3, 85, 101, 16
        kind = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
        q, k, v = (torch.randn(1, h, t, head).to(kind) for h, t in ((heads, queries), (kv, keys), (kv, keys)))
        scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * 0.3
        if causal:
            scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -torch.inf)
        s = attention.Schedule(32, 32, 4, 1) if dtype == "f32" else attention.forward_schedule(dtype, 32, 6, plain=True)
        out, lse = torch.full_like(q, 9.0), torch.zeros(1, heads, queries)
        strides = [n for x in (q, k, v, out) for n in x.stride()[:3]]
        kernel = attention.forward(TARGET, s, dtype, 32, 32, False, "", causal, "ieee" if dtype == "f32" else "")
        scalars = [*strides, heads, 2, queries, keys, head, head, 0.3]
        run(kernel, [q, k, v, out, lse], scalars, attention.groups(s.queries, queries, heads))
        torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)
        want = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
        tolerance = {"f32": 1e-6, "bf16": 1e-2, "f16": 1e-3}[dtype]
        assert (out.double() - want).norm() <= tolerance * want.norm()

    @pytest.mark.parametrize("causal,keys_of_a_tile", [(True, 16), (False, 32)])
    def test_attention_with_dropout(causal, keys_of_a_tile):
        from philox import kept

        batch, heads, kv, queries, keys, head, p, key = 2, 2, 1, 21, 37, 20, 0.3, (0x89ABCDEF, 0xFEDCBA98)
        q, k, v = (
            torch.randn(batch, h, t, head, requires_grad=True) for h, t in ((heads, queries), (kv, keys), (kv, keys))
        )
        scores = q @ k.repeat_interleave(2, 1).mT * 0.3
        if causal:
            scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -torch.inf)
        mask = kept(key, p, (batch, heads, queries, keys)) / (1 - p)
        expected = (scores.softmax(-1) * mask).float() @ v.repeat_interleave(2, 1)
        g = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (q, k, v), g)
        q, k, v = (x.detach() for x in (q, k, v))

        def bht(*tensors):
            return [s for x in tensors for s in x.stride()[:3]]

        tail = [heads, heads // kv, queries, keys, head, head, 0.3, math.ceil((1 - p) * 2**24), 1 / (1 - p)]
        seed = torch.tensor(key, dtype=torch.uint32)
        classes = (attention.Schedule(16, keys_of_a_tile, 4, 1), "f32", 32, 32, False, "", causal, "ieee")
        out, lse = torch.zeros_like(expected), torch.zeros(batch, heads, queries)
        over_queries = attention.groups(16, queries, batch * heads)
        kernel = attention.forward(TARGET, *classes, dropout=True)
        run(kernel, [q, k, v, out, lse, seed], bht(q, k, v, out) + tail, over_queries)
        torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
        delta = (g * out).sum(-1)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        kernel = attention.backward_query(TARGET, *classes, False, dropout=True)
        run(kernel, [q, k, v, g, lse, delta, dq, seed], bht(q, k, v, g, dq) + tail, over_queries)
        kernel = attention.backward_key(TARGET, *classes, dropout=True)
        over_keys = attention.groups(keys_of_a_tile, keys, batch * kv)
        run(kernel, [q, k, v, g, lse, delta, dk, dv, seed], bht(q, k, v, g, dk, dv) + tail, over_keys)
        for got, want in zip((dq, dk, dv), wanted):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mask", ["", "bool"])
    def test_attention_in_runs(monkeypatch, mask):
        """Few queries: the keys are dealt to several programs, and their results merged. A run without a visible key counts nothing."""
        batch, heads, queries, keys, head, span = 2, 3, 2, 117, 24, 32
        q, k, v = (torch.randn(batch, heads, t, head) for t in (queries, keys, keys))
        m = torch.rand(batch, heads, queries, keys) > 0.3
        m[0, 0, :, 32:64] = False
        m[1, 1, 1] = False
        scores = q @ k.mT * 0.3
        scores = scores.masked_fill(~m, -torch.inf) if mask else scores
        s, rows, runs = attention.Schedule(16, 16, 4, 1), batch * heads * queries, 4
        masks, mask_strides = ([m], list(m.stride())) if mask else ([], [])
        parts, part_lse = torch.zeros(runs, rows, head), torch.zeros(runs, rows)
        kernel = attention.forward(TARGET, s, "f32", 32, 32, False, mask, False, "ieee", split=True)
        strides = [n for x in (q, k, v) for n in x.stride()[:3]]
        scalars = [*strides, 0, 0, 0, *mask_strides, heads, 1, queries, keys, head, head, 0.3, span, rows]
        run(kernel, [q, k, v, *masks, parts, part_lse], scalars, (batch * heads, runs, 1))
        scalars = [*q.stride()[:3], runs, rows, heads, queries, head]
        for merged in (attention.MERGED, 2):
            monkeypatch.setattr(attention, "MERGED", merged)
            out, lse = torch.zeros(batch, heads, queries, head), torch.zeros(batch, heads, queries)
            run(attention.merge(TARGET, "f32", 32), [parts, part_lse, out, lse], scalars, (rows, 1, 1))
            torch.testing.assert_close(out, scores.softmax(-1).nan_to_num(0) @ v, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "left,right,page,split,grouped",
        [(1 << 29, 0, 16, False, False), (7, 3, 5, False, True), (1 << 29, 0, 24, True, True), (40, 3, 32, True, False)],
    )  # fmt: skip
    def test_attention_of_pages(left, right, page, split, grouped):
        """Keys in pages, of whole tiles and others; a sequence without keys, queries of no sequence, runs without keys."""
        heads, kv, head, scale, width = 4, 2, 24, 0.2, 20
        used, counts, queries = [90, 0, 3], [20, 1, 3], 25
        pages = sum(-(-n // page) for n in used)
        k, v = (torch.full((pages, page, kv, head), torch.nan) for _ in range(2))
        table, order = torch.full((3, width), 99, dtype=torch.int32), iter(torch.randperm(pages).tolist())
        q, expected, logs = torch.randn(queries, heads, head), torch.zeros(queries, heads, head), []
        spans, first = [], 0
        for z, (n, m) in enumerate(zip(used, counts)):
            rows, (kx, vx) = q[first : first + m], torch.randn(2, n, kv, head)
            for j in range(-(-n // page)):
                table[z, j] = number = next(order)
                part = slice(j * page, min((j + 1) * page, n))
                k[number, : part.stop - part.start], v[number, : part.stop - part.start] = kx[part], vx[part]
            place = torch.arange(n) - (torch.arange(m)[:, None] + n - m)
            scores = torch.einsum("qhd,khd->hqk", rows, kx.repeat_interleave(2, 1)) * scale
            scores = scores.masked_fill((place > right) | (place < -left), -torch.inf)
            weights = scores.softmax(-1).nan_to_num(0)
            expected[first : first + m] = torch.einsum("hqk,khd->qhd", weights, vx.repeat_interleave(2, 1))
            logs.append(scores.logsumexp(-1))
            spans.append((first, first + m, 0, n))
            first += m
        s, kind = attention.Schedule(16, 16, 4, 1), "window" if left < 100 else "full"
        paged = "rows" if page % s.keys else "tiles"
        key = (s, "f32", 32, 32, False, "", True, "ieee", kind, split, paged, False, grouped)
        out, lse = torch.zeros(queries, heads, head), torch.full((heads, queries), -torch.inf)
        of_pages = [x.stride(i) for x in (k, v) for i in (0, 2, 1)]
        strides = [0, q.stride(1), q.stride(0), *of_pages, 0, out.stride(1), out.stride(0), table.stride(0)]
        scalars = [*strides, heads, heads // kv, queries, page, head, head, scale, 20, left, right, page, pages]
        grid, runs = attention.groups(16, 20 * 2, 3 * kv) if grouped else attention.groups(16, 20, 3 * heads), 3
        inputs = [q, k, v, torch.tensor(spans, dtype=torch.int32), table]
        if split:
            parts, part_lse = (
                torch.full((runs, heads, queries, head), torch.nan),
                torch.full((runs, heads, queries), -torch.inf),
            )
            run(
                attention.forward(TARGET, *key),
                [*inputs, parts, part_lse],
                [*scalars, heads * queries],
                (grid[0], runs, 1),
            )
            scalars = [0, out.stride(1), out.stride(0), runs, heads * queries, heads, queries, head]
            run(attention.merge(TARGET, "f32", 32), [parts, part_lse, out, lse], scalars, (heads * queries, 1, 1))
        else:
            run(attention.forward(TARGET, *key), [*inputs, out, lse], scalars, grid)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[:, :first], torch.cat(logs, 1), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("left,right", [(1 << 29, 0), (7, 3)])
    def test_attention_of_sequences(left, right):
        """Sequences one after the other, one without keys and one without queries; the diagonal ends at the last key."""
        heads, kv, head, scale = 4, 2, 24, 0.2
        spans = torch.tensor([(0, 20, 0, 30), (20, 23, 30, 30), (23, 23, 30, 35), (23, 61, 35, 70)], dtype=torch.int32)
        queries, keys = 61, 72  # two keys of no sequence
        q, k, v = (torch.randn(t, h, head) for t, h in ((queries, heads), (keys, kv), (keys, kv)))
        i, j = torch.arange(queries)[:, None], torch.arange(keys)
        seen = torch.zeros(queries, keys, dtype=torch.bool)
        for q0, q1, k0, k1 in spans.tolist():
            inside = (i >= q0) & (i < q1) & (j >= k0) & (j < k1)
            seen |= inside & (j <= i + k1 - q1 + right) & (j >= i + k1 - q1 - left)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        a, b, c = (x.transpose(0, 1) for x in leaves)
        scores = (a @ b.repeat_interleave(2, 0).mT * scale).masked_fill(~seen, -torch.inf)
        expected = (scores.softmax(-1).nan_to_num(0) @ c.repeat_interleave(2, 0)).transpose(0, 1)
        g = torch.randn_like(expected)
        wanted = [x.nan_to_num(0) for x in torch.autograd.grad(expected, leaves, g)]

        def strides(*tensors):
            return [n for x in tensors for n in (0, x.stride(1), x.stride(0))]

        s, kind = attention.Schedule(16, 16, 4, 1), "window" if left < 100 else "full"
        key = (s, "f32", 32, 32, False, "", True, "ieee")
        tail = [heads, heads // kv, queries, keys, head, head, scale, 38, left, right]
        out, lse = torch.zeros(queries, heads, head), torch.zeros(heads, queries)
        over_queries = attention.groups(16, 38, 4 * heads)
        run(
            attention.forward(TARGET, *key, varlen=kind), [q, k, v, spans, out, lse], strides(q, k, v, out) + tail, over_queries
        )  # fmt: skip
        torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, scores.logsumexp(-1).detach(), rtol=1e-4, atol=1e-5)
        delta = (g * out).sum(-1).t().contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        buffers = [q, k, v, g, spans, lse, delta]
        kernel = attention.backward_query(TARGET, *key, False, varlen=kind)
        run(kernel, [*buffers, dq], strides(q, k, v, g, dq) + tail, over_queries)
        kernel = attention.backward_key(TARGET, *key, varlen=kind)
        run(kernel, [*buffers, dk, dv], strides(q, k, v, g, dk, dv) + tail, attention.groups(16, 38, 4 * kv))
        for got, want in zip((dq, dk, dv), wanted):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_conv():
        """Forward, with stride, padding, dilation and groups."""
        x, w, bias = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 2), torch.randn(6)
        expected = torch.nn.functional.conv2d(x, w, bias, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
        out = torch.zeros_like(expected)
        height, width = expected.shape[2:]
        s = gemm.Schedule(16, 32, 16, 4, 1)
        m, n, k = 3, 2 * height * width, 2 * 6
        strides = [*x.stride(), 2 * x.stride(1), w.stride(0), w.stride(1), *w.stride()[2:], 3 * w.stride(0)]
        strides += [out.stride(1), out.stride(0), *out.stride()[2:], 3 * out.stride(1)]
        scalars = [0, 1, 2, m, n, k, height, width, 3, 2, 2, 2, 1, -1, -2, 1, 2, 1, 1, 9, 8, *strides]
        epilogue = Epilogue((("add", "f32", "m"),))
        kernel = conv.conv(TARGET, s, "forward", "f32", "f32", 2, False, True, "ieee", epilogue, False)
        run(kernel, [x, w, bias, out], scalars, conv.groups(s, m, n, 2))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
