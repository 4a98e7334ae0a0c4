"""float8: conversions bit for bit as on the CPU, what upstream computes of them, and products with scales."""

import pytest
import torch
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
WIDE = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def all_bits(dtype):
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)


def hard_numbers():
    """Every float16, every bfloat16, what lies just beside each middle of two float8 numbers, and random bits."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    middles = []
    for dtype in DTYPES:
        values = all_bits(dtype).float()
        values = values[values.isfinite()].sort().values
        middle = (values[1:] + values[:-1]) / 2
        middles += [middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))]
    bits = torch.randint(-(2**31), 2**31, (20000,)).to(torch.int32)
    return torch.cat(
        [halves.view(torch.float16).float(), halves.view(torch.bfloat16).float(), *middles, bits.view(torch.float32)]
    )


def assert_same_bits(got, want):
    """Equal bits, but for those of NaN."""
    got = got.cpu()
    assert got.dtype == want.dtype
    nan = want.float().isnan()
    torch.testing.assert_close(got.float().isnan(), nan, rtol=0, atol=0)
    torch.testing.assert_close(got.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_widens(device, dtype):
    x = all_bits(dtype)
    for wide in WIDE if dtype in DTYPES[:2] else WIDE[:1]:
        torch.testing.assert_close(x.to(device).to(wide).cpu(), x.to(wide), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_as_the_cpu_does(device, dtype):
    x = hard_numbers()
    assert_same_bits(x.to(device).to(dtype), x.to(dtype))
    for wide in WIDE[1:]:
        assert_same_bits(x[:70000].to(wide).to(device).to(dtype), x[:70000].to(wide).to(dtype))


def test_layouts(device):
    x = torch.randn(6, 8).to(DTYPES[0])
    y = x.to(device)
    for view in (
        lambda t: t.t(),
        lambda t: t[1:, ::2],
        lambda t: t[0].expand(3, 8),
        lambda t: t[2, 3],
        lambda t: t[:0],
    ):
        for got in (view(y).float(), view(y).contiguous().float(), view(y).clone().to(torch.float8_e5m2).float()):
            assert got.shape == view(x).shape
        torch.testing.assert_close(view(y).float().cpu(), view(x).float(), rtol=0, atol=0)
        torch.testing.assert_close(view(y).contiguous().cpu().float(), view(x).float(), rtol=0, atol=0)
    out = torch.zeros(6, 16, dtype=DTYPES[0], device=device)
    out[:, ::2] = torch.randn(6, 8, device=device)  # bytes beside each other, by different invocations
    assert (out[:, 1::2].float() == 0).all() and (out[:, ::2].float() != 0).any()
    shown = repr(y[:2, :2])
    assert shown.startswith(repr(x[:2, :2]).split(", dtype")[0].rstrip()) and "dtype=torch.float8_e4m3fn" in shown


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_what_upstream_computes(device, dtype):
    x = torch.tensor([[1.5, -2.0, 0.0], [float("nan"), 3.0, -0.25]]).to(dtype)
    i, mask = torch.tensor([1, 0]), torch.tensor([[True, False, True], [False, True, True]])

    def put(t, index):
        t = t.clone()
        t[index] = t.flip(0)
        t[0, 0] = 1.0
        return t

    for f in (
        lambda t, i, m: t.clone(), lambda t, i, m: t == t, lambda t, i, m: t != t.flip(0), lambda t, i, m: torch.cat([t, t.clone()], 1),
        lambda t, i, m: t[i], lambda t, i, m: t.index_select(0, i), lambda t, i, m: torch.where(m, t, t.flip(0)), lambda t, i, m: t.abs(),
        lambda t, i, m: t[m], lambda t, i, m: t.roll(1, 1), lambda t, i, m: t.isnan(), lambda t, i, m: t.new_full((2, 3), 2.0),
        lambda t, i, m: torch.zeros_like(t), lambda t, i, m: torch.ones_like(t), lambda t, i, m: put(t, i),
        lambda t, i, m: torch.nn.functional.pad(t, (1, 0)), lambda t, i, m: t.view(torch.uint8), lambda t, i, m: torch.stack([t, t]),
        lambda t, i, m: t[0].int(), lambda t, i, m: t.bool(), lambda t, i, m: i.to(t.dtype), lambda t, i, m: m.to(t.dtype),
    ):  # fmt: skip
        want, got = f(x, i, mask), f(x.to(device), i.to(device), mask.to(device))
        assert got.dtype == want.dtype and got.shape == want.shape
        torch.testing.assert_close(got.cpu().float(), want.float(), rtol=0, atol=0, equal_nan=True)
    assert x.to(device)[0, 1].item() == -2.0


def test_arithmetic_is_refused(device):
    x = torch.ones(3, 4).to(DTYPES[0])
    y = x.to(device)
    for f in (
        lambda t: t + t, lambda t: t * 2, lambda t: -t, lambda t: t.sum(), lambda t: t.exp(), lambda t: t.sort(),
        lambda t: t.masked_fill(t == t, 0.0), lambda t: t.gather(0, torch.zeros(1, 1, dtype=torch.int64, device=t.device)), lambda t: t < t,
    ):  # fmt: skip
        for t in (x, y):
            with pytest.raises(NotImplementedError, match="not implemented for 'Float8_e4m3fn'"):
                f(t)
    with pytest.raises(RuntimeError, match="Promotion for Float8 Types is not supported"):
        y + torch.ones(3, 4, device=device)


# ---- float8_e8m0fnu: powers of two ------------------------------------------------------------------------------------

SCALES = torch.float8_e8m0fnu


def test_scales_widen_and_round_as_on_the_cpu(device):
    x = all_bits(SCALES)
    y = x.to(device)
    for wide in WIDE:
        torch.testing.assert_close(y.to(wide).cpu(), x.to(wide), rtol=0, atol=0, equal_nan=True)
    edges = torch.tensor(
        [2.0**-127, 1.5 * 2.0**-127, 2.0**-128, 1e-45, 0.0, 1.5 * 2.0**127, 3.4e38, torch.inf, -torch.inf]
    )
    ties = 1.5 * 2.0 ** torch.arange(-126.0, 127.0)
    numbers = torch.cat([hard_numbers(), edges, -edges, ties, ties.nextafter(ties * 0), ties.nextafter(ties * 2)])
    torch.testing.assert_close(
        numbers.to(device).to(SCALES).view(torch.uint8).cpu(), numbers.to(SCALES).view(torch.uint8)
    )
    for wide in WIDE[1:]:
        narrow = numbers[:70000].to(wide)
        torch.testing.assert_close(
            narrow.to(device).to(SCALES).cpu().view(torch.uint8), narrow.to(SCALES).view(torch.uint8)
        )


def test_scales_are_storage(device):
    x = torch.tensor([[0.5, 1.0, 3.0], [float("nan"), 2.0**127, 2.0**-127]]).to(SCALES)
    i, mask = torch.tensor([1, 0]), torch.tensor([[True, False, True], [False, True, True]])
    for f in (
        lambda t, i, m: t.t().contiguous(), lambda t, i, m: t[:, ::2].clone(), lambda t, i, m: t[0].expand(3, 3).contiguous(),
        lambda t, i, m: t[1, 1], lambda t, i, m: t[:0], lambda t, i, m: t == t, lambda t, i, m: torch.cat([t, t[:1]]),
        lambda t, i, m: t[i], lambda t, i, m: t[m], lambda t, i, m: t.index_select(0, i), lambda t, i, m: torch.where(m, t, t.roll(1)),
        lambda t, i, m: t.isnan(), lambda t, i, m: t.view(torch.uint8), lambda t, i, m: t.to(torch.float8_e5m2),
        lambda t, i, m: (i + 1).to(t.dtype), lambda t, i, m: t.new_full((2,), 2.0), lambda t, i, m: torch.zeros_like(t),
        lambda t, i, m: torch.empty_like(t).copy_(t), lambda t, i, m: t.view(torch.uint8).view(SCALES), lambda t, i, m: t.flip(0),
    ):  # fmt: skip
        want, got = f(x, i, mask), f(x.to(device), i.to(device), mask.to(device))
        assert got.dtype == want.dtype and got.shape == want.shape
        torch.testing.assert_close(got.cpu().float(), want.float(), rtol=0, atol=0, equal_nan=True)
    y = x.to(device)
    assert y[0, 2].item() == 4.0 and y.tolist()[0] == [0.5, 1.0, 4.0]
    assert repr(y).startswith(repr(x).split("dtype")[0].rstrip()) and "dtype=torch.float8_e8m0fnu" in repr(y)
    for f in (
        lambda t: t + t, lambda t: -t, lambda t: t.abs(), lambda t: t.sum(), lambda t: t * 2, lambda t: t < t,
        lambda t: t.sort(), lambda t: t.masked_fill(t == t, 1.0),
    ):  # fmt: skip
        for t in (x, y):
            with pytest.raises(NotImplementedError, match="not implemented for 'Float8_e8m0fnu'"):
                f(t)
    for value in (-1.0, torch.inf):
        for t in (x.clone(), y.clone()):
            with pytest.raises(RuntimeError, match="cannot be converted to type c10::Float8_e8m0fnu without overflow"):
                t.fill_(value)


# ---- products ---------------------------------------------------------------------------------------------------------


def operands(m, k, n, a=torch.float8_e4m3fn, b=torch.float8_e4m3fn):
    return torch.randn(m, k).to(a), torch.randn(n, k).to(b).t()


def reference(a, b, scale_a=1.0, scale_b=1.0, bias=None):
    result = (a.double() @ b.double()) * scale_a * scale_b
    return result if bias is None else result + bias.double()


def close(got, want):
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(got.dtype, 0.13)
    if torch.spiral.get_device_properties(got.device).engine == "cuda":
        tolerance = max(
            tolerance, 2**-9
        )  # Hopper's tensor cores keep 14 bits of a sum of float8 products; of the largest: atol
    torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item() / 8)


@pytest.mark.parametrize("m,k,n", [(1, 64, 48), (16, 32, 48), (70, 130, 33), (130, 256, 96)])
def test_scaled_mm(device, m, k, n):
    a, b = operands(m, k, n)
    sa, sb = torch.tensor(0.5), torch.tensor([3.0])
    close(
        torch._scaled_mm(a.to(device), b.to(device), sa.to(device), sb.to(device), out_dtype=torch.float32),
        reference(a, b, 0.5, 3.0),
    )
    rows, columns, bias = torch.rand(m, 1) + 0.1, torch.rand(1, n) + 0.1, torch.randn(n).bfloat16()
    args = [x.to(device) for x in (a, b, rows, columns, bias)]
    got = torch._scaled_mm(*args, out_dtype=torch.bfloat16, use_fast_accum=True)
    assert got.dtype == torch.bfloat16
    close(got, reference(a, b, rows.double(), columns.double(), bias))


@pytest.mark.parametrize(
    "a,b", [(DTYPES[1], DTYPES[0]), (DTYPES[0], DTYPES[1]), (DTYPES[2], DTYPES[2]), (DTYPES[3], DTYPES[3])]
)
def test_scaled_mm_of_other_float8(device, a, b):
    x, y = operands(20, 48, 24, a, b)
    one = torch.ones((), device=device)
    close(torch._scaled_mm(x.to(device), y.to(device), one, one, out_dtype=torch.float16), reference(x, y))
    close(torch._scaled_mm(x.to(device), y.to(device), one, one, out_dtype=torch.float64).float(), reference(x, y))
    got = torch._scaled_mm(x.to(device), y.contiguous().to(device), one, one * 0.01)
    assert got.dtype == a
    want = reference(x, y) * 0.01
    close(got.float().half().to(a), want)


def test_scaled_mm_layouts_and_out(device):
    a, b = torch.randn(40, 64).to(DTYPES[0]), torch.randn(64, 80).to(DTYPES[0])
    one = torch.ones(1, device=device)
    x, y = a.to(device), b.to(device)
    for view in (lambda t: t, lambda t: t[4:36, 16:48], lambda t: t[::2, :32]):
        p, q = view(x), view(y)[:32] if view(y).shape[0] != view(x).shape[1] else view(y)
        close(torch._scaled_mm(p, q, one, one, out_dtype=torch.float32), reference(p.cpu(), q.cpu()))
    out = torch.empty(40, 80, device=device)
    assert torch._scaled_mm(x, y, one, one, out_dtype=torch.float32, out=out) is out
    close(out, reference(a, b))
    assert torch._scaled_mm(x[:0], y, one, one).shape == (0, 80)
    bias = torch.randn(80)
    nothing = torch._scaled_mm(x[:, :0], y[:0], one, one, bias.to(device), out_dtype=torch.float32)
    torch.testing.assert_close(nothing.cpu(), bias.expand(40, 80))
    halved = torch._scaled_mm(x, y, one, one * 0.01, scale_result=one * 2)
    close(halved, reference(a, b) * 0.005)


def blocks(rows, k, size, tall=1, dtype=torch.float32):
    """Scales [rows / tall, k / size] of blocks, and what each of the rows x k numbers is multiplied by, in float64."""
    scale = torch.rand(-(-rows // tall), -(-k // size)) + 0.1
    scale = (scale * 100).to(dtype) if dtype == SCALES else scale
    return scale, scale.double().repeat_interleave(tall, 0)[:rows].repeat_interleave(size, 1)[:, :k]


def swizzle(scale):
    """Scales of blocks of 32 in tiles of 128 x 4, as cuBLAS reads them."""
    rows, columns = scale.shape
    whole = torch.nn.functional.pad(scale.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = whole.view(whole.shape[0] // 128, 4, 32, whole.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).contiguous().view(SCALES)


def by_columns(x):
    return x.t().contiguous().t()


ROWS, TILES, MX = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128, ScalingType.BlockWise1x32


@pytest.mark.parametrize("m,k,n", [(16, 256, 48), (150, 400, 140), pytest.param(1, 512, 272, marks=pytest.mark.full)])
@pytest.mark.parametrize("kinds", [(ROWS, ROWS), (ROWS, TILES), (TILES, ROWS)])
def test_scales_of_blocks(device, kinds, m, k, n):
    """One scale for 128 numbers of a row, or of 128 rows; by the names of the kinds and by the shapes of _scaled_mm."""
    a, b = operands(m, k, n)
    (sa, whole_a), (sb, whole_b) = (
        blocks(rows, k, 128, 128 if kind == TILES else 1) for rows, kind in zip((m, n), kinds)
    )
    want = (a.double() * whole_a) @ (b.double() * whole_b.t())

    def named(scale, kind):
        if kind == ROWS:
            return by_columns(scale)
        return by_columns(torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4)).t())

    x, y = a.to(device), b.to(device)
    scales = [named(s, kind).to(device) for s, kind in zip((sa, sb), kinds)]
    bias = torch.randn(n).bfloat16()
    got = scaled_mm(x, y, scales[0], kinds[0], scales[1], kinds[1], output_dtype=torch.float32)
    close(got, want)
    got = scaled_mm(x, y, scales[0], kinds[0], scales[1], kinds[1], bias=bias.to(device))
    assert got.dtype == torch.bfloat16
    close(got, want + bias.double())
    first, second = ((by_columns(s) if kind == ROWS else s).to(device) for s, kind in zip((sa, sb), kinds))
    close(torch._scaled_mm(x, y, first, second.t(), out_dtype=torch.float32), want)


@pytest.mark.parametrize("m,k,n", [(16, 64, 48), (150, 400, 140)])
@pytest.mark.parametrize("dtypes", [(DTYPES[0], DTYPES[0]), (DTYPES[0], DTYPES[1])])
def test_microscaling(device, m, k, n, dtypes):
    """MXFP8: a power of two for 32 numbers of a row, swizzled as for CUDA, or plain."""
    a, b = operands(m, k, n, *dtypes)
    (sa, whole_a), (sb, whole_b) = (blocks(rows, k, 32, dtype=SCALES) for rows in (m, n))
    want = (a.double() * whole_a) @ (b.double() * whole_b.t())
    x, y, plain_a, plain_b, swizzled_a, swizzled_b = (t.to(device) for t in (a, b, sa, sb, swizzle(sa), swizzle(sb)))
    plain = scaled_mm(x, y, plain_a, MX, plain_b, MX, output_dtype=torch.float32)
    close(plain, want)
    kind = SwizzleType.SWIZZLE_32_4_4
    got = scaled_mm(x, y, swizzled_a, MX, swizzled_b, MX, kind, kind, output_dtype=torch.float32)
    torch.testing.assert_close(got, plain, rtol=0, atol=0)
    torch.testing.assert_close(
        torch._scaled_mm(x, y, swizzled_a, swizzled_b, out_dtype=torch.float32), plain, rtol=0, atol=0
    )


def test_scales_of_blocks_refused(device):
    """With the texts of CUDA."""
    a, b = (t.to(device) for t in operands(160, 512, 96))
    rows_a, rows_b = torch.ones(4, 160, device=device).t(), torch.ones(4, 96, device=device).t()
    tiles = torch.ones(1, 4, device=device).t()
    mx_a, mx_b = torch.ones(256 * 16, device=device).to(SCALES), torch.ones(128 * 16, device=device).to(SCALES)
    kind = SwizzleType.SWIZZLE_32_4_4
    for text, f in (
        ("scale_a must have shape 160 x 4 Float elements, got [160, 3]", lambda: scaled_mm(a, b, rows_a[:, :3], ROWS, rows_b, ROWS)),
        ("scale_a strides must be (1, 160); got: [4, 1]", lambda: scaled_mm(a, b, rows_a.contiguous(), ROWS, rows_b, ROWS)),
        ("scale_b must have shape 96 x 4 Float elements, got [4, 1]", lambda: scaled_mm(a, b, rows_a, ROWS, tiles, ROWS)),
        ("scale_b must have shape 4 x 1 Float elements, got [96, 4]", lambda: scaled_mm(a, b, rows_a, ROWS, rows_b, TILES)),
        ("scale_a must have strides (1, 160); got [4, 1]", lambda: scaled_mm(a, b, rows_a.contiguous(), ROWS, tiles, TILES)),
        ("Invalid scaling configuration", lambda: scaled_mm(a, b, tiles, TILES, tiles, TILES)),
        ("Invalid scaling configuration", lambda: scaled_mm(a, b, rows_a.double(), ROWS, rows_b.double(), ROWS)),
        ("Invalid scaling configuration", lambda: scaled_mm(a, b, mx_a, ROWS, mx_b, ROWS)),
        ("Invalid scaling configuration", lambda: torch._scaled_mm(a, b, rows_a.contiguous(), rows_b.t())),
        ("Invalid scaling configuration", lambda: torch._scaled_mm(a, b, mx_a[1:], mx_b)),
        ("swizzle_a must have 1 value, got 0", lambda: scaled_mm(a, b, mx_a, MX, mx_b, MX)),
        ("scale_b must be swizzled to SWIZZLE_32_4_4 format", lambda: scaled_mm(a, b, mx_a, MX, mx_b, MX, kind, SwizzleType.NO_SWIZZLE)),
        ("scale_a should have 4096 elements, got: 4095", lambda: scaled_mm(a, b, mx_a[1:], MX, mx_b, MX, kind, kind)),
    ):  # fmt: skip
        with pytest.raises(ValueError) as refused:
            f()
        assert text in str(refused.value)


CASES = {
    "size of the bias": lambda t, a, b, one: torch._scaled_mm(a, b, one, one, bias=t(torch.zeros(47))),
    "a vector": lambda t, a, b, one: torch._scaled_mm(a[0], b, one, one),
    "shapes": lambda t, a, b, one: torch._scaled_mm(a, b.t(), one, one),
    "dtype": lambda t, a, b, one: torch._scaled_mm(a.float(), b, one, one),
    "dtype of scales": lambda t, a, b, one: torch._scaled_mm(a, b, one.double(), one),
    "size of scales": lambda t, a, b, one: torch._scaled_mm(a, b, t(torch.ones(3)), one),
    "kinds of scales": lambda t, a, b, one: torch._scaled_mm(a, b, t(torch.ones(16, 1)), one),
    "v2 kinds": lambda t, a, b, one: scaled_mm(a, b, t(torch.ones(16, 1)), ScalingType.RowWise, one, ScalingType.TensorWise),
    "v2 rows": lambda t, a, b, one: scaled_mm(a, b, one.view(1, 1), ScalingType.RowWise, t(torch.ones(1, 48)), ScalingType.RowWise),
    "v2 columns": lambda t, a, b, one: scaled_mm(a, b, t(torch.ones(16, 1)), ScalingType.RowWise, t(torch.ones(1, 47)), ScalingType.RowWise),
    "v2 numbers": lambda t, a, b, one: scaled_mm(a, b, t(torch.ones(16, 1)), ScalingType.TensorWise, one, ScalingType.TensorWise),
    "v2 shapes": lambda t, a, b, one: scaled_mm(a, b.t(), one, ScalingType.TensorWise, one, ScalingType.TensorWise),
    "v2 vector": lambda t, a, b, one: scaled_mm(a[0], b, one, ScalingType.TensorWise, one, ScalingType.TensorWise),
    "v2 blocks": lambda t, a, b, one: scaled_mm(a, b, one, ScalingType.BlockWise1x16, one, ScalingType.BlockWise1x16),
}  # fmt: skip


@pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13), reason="the CPU's texts are those of torch 2.13"
)
@pytest.mark.parametrize("case", list(CASES))
def test_scaled_mm_refuses(device, case):
    a, b = operands(16, 32, 48)
    one = torch.ones(())
    with pytest.raises((RuntimeError, ValueError)) as on_cpu:
        CASES[case](lambda t: t, a, b, one)
    with pytest.raises(type(on_cpu.value)) as here:
        CASES[case](lambda t: t.to(device), a.to(device), b.to(device), one.to(device))
    known = [line for line in str(here.value).splitlines() if not line.startswith("- For Block")]  # which the CPU lacks
    assert known == str(on_cpu.value).splitlines()


def test_scaled_mm_v2(device):
    a, b = operands(16, 32, 48)
    rows, columns = torch.rand(16, 1), torch.rand(1, 48)
    x, y, sa, sb = (t.to(device) for t in (a, b, rows, columns))
    got = scaled_mm(x, y, sa, ScalingType.RowWise, sb, ScalingType.RowWise, output_dtype=torch.float32)
    close(got, reference(a, b, rows.double(), columns.double()))
    one = torch.ones((), device=device)
    got = scaled_mm(
        x, y, one, ScalingType.TensorWise, one, ScalingType.TensorWise, SwizzleType.NO_SWIZZLE, SwizzleType.NO_SWIZZLE
    )
    assert got.dtype == torch.bfloat16
    close(got, reference(a, b))
    with pytest.raises(ValueError, match="does not support swizzle"):
        scaled_mm(
            x,
            y,
            one,
            ScalingType.TensorWise,
            one,
            ScalingType.TensorWise,
            SwizzleType.SWIZZLE_32_4_4,
            SwizzleType.NO_SWIZZLE,
        )


def test_compiled(device):
    """A compiled graph rounds to float8 where eager code does, in one kernel, and reads it back."""

    def quantize(x, scale):
        y = (x * scale).to(torch.float8_e4m3fn)
        return y, y.float() / scale, y.view(torch.uint8).view(torch.float8_e5m2).half()

    x, scale = torch.randn(5, 70), torch.tensor(3.0)
    compiled = torch.compile(quantize, backend="spiral")
    arguments = x.to(device), scale.to(device)
    compiled(*arguments)
    with torch.spiral.telemetry() as t:
        results = compiled(*arguments)
        torch.spiral.synchronize(device)
    assert len(t.launches) == 1
    for got, want in zip(results, quantize(x, scale)):
        torch.testing.assert_close(got.cpu().float(), want.float(), rtol=0, atol=0, equal_nan=True)
