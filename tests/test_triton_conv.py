"""Convolutions of the schedule class `block`: the lowerings run on tensors of the CPU, their kernels by Triton's interpreter."""

import os

import pytest
from kernel_runner import run_by_the_interpreter

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_by_the_interpreter():
        run_by_the_interpreter(__file__)

    def test_choices_fill_the_device_and_no_more():
        from torch_spiral.kernels.block import conv, gemm
        from torch_spiral.kernels.kernel import Target

        target = Target(language="triton", schedule_class="block", engine="cuda", compute_units=132, capability=90)
        few = conv.choices(target, "bf16", "", 49, 512, 9, 512, 1)[0]
        s = few.schedule
        assert 66 <= -(-49 // s.m) * -(-512 // s.n) * few.splits <= 264
        many = conv.choices(target, "bf16", "", 32 * 784, 128, 9, 128, 1)[0]
        assert many.splits == 1 and many.schedule.m * many.schedule.n >= 128 * 64
        assert conv.choices(target, "bf16", "", 180, 12, 3, 24, 1, 32)[0].splits == 1  # a second kernel would cost more
        assert gemm.schedule(target, "bf16", "", 100352, 64, 1, True, True).n == 64  # no columns beyond the matrix

else:
    import contextlib
    from types import SimpleNamespace

    from torch_spiral.testing.triton_interpreter import TARGET, run  # isort: skip

    import torch
    import torch.nn.functional as F

    from torch_spiral import autotune, lowering
    from torch_spiral.kernels.block import conv as block
    from torch_spiral.kernels.block import gemm
    from torch_spiral.kernels.vector.gemm import Epilogue
    from torch_spiral.ops import common, contraction, conv

    DTYPES = {"f32": torch.float32, "f16": torch.float16, "f64": torch.float64}
    NAMES = {v: k for k, v in DTYPES.items()}
    INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    class Machine:
        """Runs what lowerings launch, at once."""

        def __init__(self):
            self.memory: list[torch.Tensor] = []
            self.kernels: list[str] = []

        def handle(self, t):
            self.memory.append(t)
            last = t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
            flags = lowering.FRESH | (lowering.CHANNELS_LAST if last else 0)
            return lowering.Tensor(
                len(self.memory) - 1, NAMES[t.dtype], tuple(t.shape), tuple(t.stride()), None, False, flags
            )

        def empty(self, sizes, dtype, strides=None):
            sizes, strides = list(map(int, sizes)), strides and list(map(int, strides))
            t = torch.empty_strided(sizes, strides or lowering.contiguous_strides(sizes), dtype=DTYPES[dtype])
            return self.handle(t.fill_(float("nan")))

        @contextlib.contextmanager
        def packed(self, x, sizes, dtype, kind):
            yield self.empty(sizes, dtype)

        def launch(self, kernel, buffers, scalars, groups, flops=None):
            self.kernels.append(kernel.name)
            reals = []
            for b, dtype in zip(buffers, kernel.dtypes, strict=True):
                t = self.memory[b.number]
                whole = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
                real = whole[t.storage_offset() + (b.offset or 0) :]
                reals.append(
                    real if dtype in DTYPES and DTYPES[dtype] == t.dtype else real.view(INTS[t.element_size()])
                )
            if all(g > 0 for g in groups):
                run(kernel, reals, scalars, groups)

    @pytest.fixture
    def machine(monkeypatch):
        m = Machine()
        for module in (conv, common, contraction):
            for name in ("empty", "launch", "packed"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(m, name))
        monkeypatch.setattr(lowering._state, "recorder", SimpleNamespace(target=TARGET, device=0), raising=False)
        monkeypatch.setattr(autotune, "choose", lambda template, key, default, *_: default)
        for module in (conv, contraction):  # the interpreter has no parts of bfloat16
            for name in ("dot_precision", "convolution_precision"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, lambda dtype: "ieee" if dtype == "f32" else "")
        torch.manual_seed(0)
        return m

    def values(dtype, *shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    def last(x):
        return x.contiguous(memory_format=torch.channels_last)

    TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.float64: 1e-12}

    def close(got, expected):
        t = TOLERANCE[got.dtype]
        torch.testing.assert_close(got.double(), expected, rtol=t, atol=t * float(expected.abs().max()))

    def forward(m, x, w, bias=None, stride=1, padding=0, dilation=1, groups=1, terms=(), out=None):
        """The result and the names of the kernels."""
        nd = x.ndim - 2
        m.kernels.clear()
        handles = [(kind, None if y is None else m.handle(y)) for kind, y in terms]
        result = conv._convolution(
            m.handle(x), m.handle(w), list(w.shape[2:]), None if bias is None else m.handle(bias), [stride] * nd, [padding] * nd,
            [dilation] * nd, False, [0] * nd, groups, handles, out,
        )  # fmt: skip
        return m.memory[result.number], list(m.kernels)

    CASES = {
        "3x3": ((2, 19, 7, 6), (21, 19, 3, 3), {"padding": 1}),
        "strided": ((2, 16, 9, 8), (33, 16, 3, 2), {"stride": 2, "padding": 1}),
        "dilated": ((1, 20, 9, 9), (5, 20, 3, 3), {"dilation": 2, "padding": 2}),
        "grouped": ((2, 48, 5, 6), (36, 16, 3, 3), {"groups": 3, "padding": 1}),
        "downsample": ((3, 40, 6, 5), (17, 40, 1, 1), {"stride": 2}),
        "stem": ((1, 3, 18, 15), (9, 3, 7, 7), {"stride": 2, "padding": 3}),
        "row of taps": ((2, 5, 6, 7), (7, 5, 2, 3), {"padding": 1}),
        "3d": ((1, 17, 4, 5, 3), (18, 17, 2, 3, 1), {"padding": 1}),
        "1d": ((2, 17, 20), (18, 17, 5), {"padding": 2}),
    }

    @pytest.mark.parametrize(
        "case, dtype", [*((c, "f32") for c in CASES), ("3x3", "f16"), ("3x3", "f64"), ("stem", "f16")]
    )
    def test_forward(machine, case, dtype):
        (shape, weights, kw), dtype = CASES[case], DTYPES[dtype]
        x, w, bias = values(dtype, *shape), values(dtype, *weights), values(dtype, weights[0])
        function = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3]
        expected = function(x.double(), w.double(), bias.double(), **kw)
        got, names = forward(machine, x, w, bias, **kw)
        close(got, expected)
        assert got.is_contiguous()
        if shape[1] >= block.WIDE:  # of few channels a copy would not pay
            assert any("_last" in n for n in names), names
        if x.ndim == 4:
            got, names = forward(machine, last(x), last(w), bias, **kw)
            close(got, expected)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert len(names) == 1 and "_last" in names[0], names

    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 3), (1, 2, 1)])
    def test_weights_through_a_descriptor(splits, stride, dilation, groups):
        """The kernel itself, two blocks of channels a tap."""
        channels, n, (height, width) = 32, 20, (9, 8)
        x, w = last(torch.randn(2, channels * groups, height, width)), torch.randn(groups * n, channels, 3, 3)
        expected = F.conv2d(x.double(), w.double(), None, stride, dilation, dilation, groups)
        out, m = expected.shape[2:], expected.shape[0] * expected.shape[2] * expected.shape[3]
        c = torch.full((splits, m, groups * n), float("nan"))
        s, span = gemm.Schedule(32, 16, 16, 4, 1), -(-18 // splits)
        kernel = block.last(TARGET, s, "f32", "f32", 2, False, "ieee", "n", Epilogue(), splits > 1, True)
        sizes = [
            m,
            n,
            channels,
            x.stride(2),
            x.stride(3),
            *out,
            3,
            3,
            height,
            width,
            stride,
            stride,
            -dilation,
            -dilation,
        ]
        scalars = [0, groups * n, *([m * groups * n] if splits > 1 else []), x.stride(0), *sizes, dilation, dilation]
        weights = w.permute(0, 2, 3, 1).contiguous()
        grid = block.last_groups(s, m, n, 1, groups, splits)
        run(kernel, [x, weights, c], scalars + ([span] if splits > 1 else []), grid)
        close(c.sum(0), expected.permute(0, 2, 3, 1).reshape(m, groups * n))

    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("k, groups", [(3, 1), (1, 1), (3, 2), (3, 18)])
    def test_epilogue(machine, monkeypatch, splits, channels_last, k, groups):
        """Batch norm, a residual and an activation; whole and of partial sums."""
        schedule = gemm.Schedule(64, 64, 32, 4, 1)
        monkeypatch.setattr(block, "choices", lambda *_: [gemm.Choice(schedule, splits)])
        x, w = values(torch.float32, 2, 36, 5, 6), values(torch.float32, 36, 36 // groups, k, k)
        mean, scale, r = values(torch.float32, 36), values(torch.float32, 36), values(torch.float32, 2, 36, 5, 6)
        if channels_last:
            x, r = last(x), last(r)
        flat = r.as_strided((2, 36, 30), (36 * 30, 1, 36) if channels_last else (36 * 30, 30, 1))
        each = [y.as_strided((2, 36, 30), (0, 1, 0)) for y in (mean, scale)]
        out = machine.handle(torch.empty_like(r).fill_(float("nan")))
        terms = [("sub", each[0]), ("mul", each[1]), ("add", flat), ("relu", None)]
        got, names = forward(machine, x, w, None, 1, k // 2, 1, groups, terms, out)
        expected = F.conv2d(x.double(), w.double(), None, 1, k // 2, 1, groups)
        expected = ((expected - mean[:, None, None]) * scale[:, None, None] + r).relu()
        close(got, expected)
        by_channels = k == 3 and groups < 18
        names = [n for n in names if not n.startswith("copy")]
        assert len(names) == (2 if splits > 1 and by_channels else 1), names

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("groups, dilation, stride", [(1, 1, 1), (2, 2, 1), (1, 1, 2)])
    def test_gradient_of_the_input(machine, channels_last, groups, dilation, stride):
        x = values(torch.float64, 2, 34, 7, 6).requires_grad_()
        w = values(torch.float64, 32, 34 // groups, 3, 3)
        y = F.conv2d(x, w, None, stride, 1, dilation, groups)
        g = torch.randn_like(y)
        expected = torch.autograd.grad(y, x, g)[0]
        x = x.detach()
        if channels_last:
            x, g = last(x), last(g)
        dx, _, _ = conv.convolution_backward(
            machine.handle(g), machine.handle(x), machine.handle(w), [3, 3], [stride] * 2, [1, 1], [dilation] * 2, False, [0, 0],
            groups, [1, 0, 0],
        )  # fmt: skip
        close(machine.memory[dx.number], expected)
        assert any("_last" in n for n in machine.kernels) == (stride == 1)

    def test_weights_of_another_dtype(machine):
        """As a compiled graph under autocast has them."""
        x, w = last(values(torch.float16, 2, 16, 5, 5)), values(torch.float32, 8, 16, 3, 3)
        got, _ = forward(machine, x, w, padding=1)
        close(got, F.conv2d(x.double(), w.half().double(), padding=1))
        got, _ = forward(machine, x, w[:, :, :1, :1])
        close(got, F.conv2d(x.double(), w[:, :, :1, :1].half().double()))

    def test_no_pixels(machine):
        got, names = forward(machine, values(torch.float32, 0, 16, 5, 5), values(torch.float32, 8, 16, 3, 3))
        assert got.shape == (0, 8, 3, 3) and not names
