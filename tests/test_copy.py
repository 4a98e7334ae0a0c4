"""Copies: every dtype and layout, to and from the CPU, on a device, and between devices."""

import itertools

import pytest
import torch

# What kernels convert between; float64 as the device allows.
COMPUTED = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
COMPUTED += [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]
DTYPES = [*COMPUTED, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64]


def sample(dtype, *shape):
    g = torch.Generator().manual_seed(len(shape))
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) < 0.5
    if dtype.is_complex:
        return torch.randn(shape, generator=g, dtype=dtype)
    if dtype.is_floating_point:
        x = torch.randn(shape, generator=g, dtype=torch.float64) * 50
        if x.numel() > 3:
            x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        return x.to(dtype)
    low = 0 if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64) else -100
    return torch.randint(low, 100, shape, generator=g).to(dtype)


def same(a, b):
    """Equal bit for bit; any NaN is as good as another."""
    assert a.dtype == b.dtype and a.shape == b.shape
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        a, b = (t.masked_fill(t.isnan(), 0) for t in (a, b))
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    assert torch.equal(a, b)


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "offset": lambda x: x[1:],
    "inner slice": lambda x: x[:, :, 1:4],
    "steps": lambda x: x[:, ::2, ::3],
    "one element": lambda x: x[1, 2, 3],
    "expanded": lambda x: x[:, :1, :].expand(-1, 4, -1),
    "column": lambda x: x[:, :, 2],
    "none": lambda x: x[:, 2:2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(device, dtype):
    for shape in ((), (1,), (7,), (3, 5), (2, 3, 4, 5), (0,), (3, 0), (1001,)):
        x = sample(dtype, *shape)
        y = x.to(device)
        assert y.device == device and y.dtype == dtype and y.shape == x.shape and y.stride() == x.stride()
        same(y.cpu(), x)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int64, torch.bfloat16, torch.complex64], ids=str)
def test_views_to_the_host(device, dtype, view):
    x = sample(dtype, 4, 6, 9)
    same(VIEWS[view](x.to(device)).cpu(), VIEWS[view](x))
    out = torch.zeros_like(VIEWS[view](x), memory_format=torch.contiguous_format)
    same(out.copy_(VIEWS[view](x.to(device))), VIEWS[view](x))


@pytest.mark.parametrize("view", [v for v in VIEWS if v != "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int64, torch.bfloat16, torch.bool], ids=str)
def test_from_the_host_into_views(device, dtype, view):
    x = sample(dtype, 4, 6, 9)
    want, got = x.clone(), x.to(device)
    new = sample(dtype, *VIEWS[view](x).shape, 1)[..., 0]
    VIEWS[view](want).copy_(new)
    VIEWS[view](got).copy_(new)
    same(got.cpu(), want)


@pytest.mark.parametrize("source", [v for v in VIEWS if v not in ("none", "one element", "column")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16, torch.int64, torch.float16], ids=str)
def test_on_the_device(device, dtype, source):
    x = sample(dtype, 4, 6, 9)
    y = VIEWS[source](x.to(device))
    same(y.clone().cpu(), VIEWS[source](x))
    same(y.contiguous().cpu(), VIEWS[source](x).contiguous())
    for target in ("contiguous", "transposed", "steps"):
        # A destination of the right shape that is itself a view.
        shape = VIEWS[source](x).shape
        if target == "contiguous":
            make = lambda where: torch.zeros(shape, dtype=dtype).to(where)  # noqa: E731, B023
        elif target == "transposed":
            make = lambda where: torch.zeros(shape[::-1], dtype=dtype).to(where).permute(2, 1, 0)  # noqa: E731, B023
        else:
            make = lambda where: torch.zeros([2 * n for n in shape], dtype=dtype).to(where)[::2, ::2, ::2]  # noqa: E731, B023
        same(make(device).copy_(y).cpu(), make("cpu").copy_(VIEWS[source](x)))


def test_broadcast(device):
    x = torch.arange(3.0)
    want = torch.zeros(2, 3).copy_(x)
    same(torch.zeros(2, 3).to(device).copy_(x.to(device)).cpu(), want)
    same(torch.zeros(2, 3).to(device).copy_(x).cpu(), want)
    same(torch.zeros(2, 3).copy_(x.to(device)), want)
    with pytest.raises(RuntimeError, match="expand"):
        torch.zeros(2, 3).to(device).copy_(torch.zeros(4))


def values_for(source, target):
    """Values that both dtypes hold, so that the result is defined."""
    x = torch.randint(0, 100, (137,), generator=torch.Generator().manual_seed(1))
    if target == torch.bool or source == torch.bool:
        x = x % 2
    return x.to(source)


@pytest.mark.parametrize("source,target", list(itertools.product(COMPUTED, COMPUTED)), ids=str)
def test_conversion(device, source, target):
    x = values_for(source, target)
    want = x.to(target)
    same(x.to(device).to("cpu", target), want)  # on the way out
    same(torch.empty(137, dtype=target, device=device).copy_(x).cpu(), want)  # on the way in
    if torch.float64 in (source, target) and not torch.spiral.get_device_properties(device).float64:
        return
    if not {source, target} & {torch.float32, torch.int64}:
        return  # a kernel each, and these differ in nothing that the others don't show
    same(x.to(device).to(target).cpu(), want)  # on the device


def test_rounding_on_the_device(device):
    x = torch.cat(
        [torch.linspace(-70000, 70000, 5001), torch.tensor([1 + 2**-9, 1 + 2**-8 + 2**-9, 65519, 65520, 1e-8, 6e-8])]
    )
    for dtype in (torch.float16, torch.bfloat16):
        same(x.to(device).to(dtype).cpu(), x.to(dtype))
    y = torch.linspace(-99.7, 99.7, 1001)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.bool):
        same(y.to(device).to(dtype).cpu(), y.to(dtype))
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    for dtype in (torch.float16, torch.bfloat16, torch.bool):
        same(special.to(device).to(dtype).cpu(), special.to(dtype))


def test_integers_wrap(device):
    x = torch.tensor([300, -300, 2**31 + 5, -(2**40) - 3, 255, 256])
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        same(x.to(device).to(dtype).cpu(), x.to(dtype))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 1001])
def test_bytes_at_any_offset(device, offset, size):
    # Devices copy words; the bytes around must stay.
    x = torch.arange(2048).to(torch.uint8)
    got, want = torch.zeros(2048, dtype=torch.uint8).to(device), torch.zeros(2048, dtype=torch.uint8)
    for to_device in (False, True):
        source = x[7 : 7 + size]
        got[offset : offset + size].copy_(source.to(device) if to_device else source)
        got[1024 + offset : 1024 + offset + size].copy_(x.to(device)[7 : 7 + size])
    want[offset : offset + size] = x[7 : 7 + size]
    want[1024 + offset : 1024 + offset + size] = x[7 : 7 + size]
    same(got.cpu(), want)
    same(got[offset : offset + size].cpu(), want[offset : offset + size])


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_non_blocking(device, non_blocking, pinned):
    x = sample(torch.float32, 513, 77)
    host = x.pin_memory() if pinned else x.clone()
    y = host.to(device, non_blocking=non_blocking)
    host.zero_()  # the copy has its data already
    back = torch.empty(513, 77, pin_memory=pinned)
    back.copy_(y, non_blocking=non_blocking)
    torch.spiral.synchronize()
    same(back, x)
    strided = torch.empty(77, 513, pin_memory=pinned).t()
    strided.copy_(y, non_blocking=non_blocking)
    torch.spiral.synchronize()
    same(strided.contiguous(), x)


def test_to_an_unpinned_tensor_is_ready_at_once(device):
    for step in range(20):
        x = torch.full((1 << 18,), step, dtype=torch.int32).to(device)
        out = torch.empty(1 << 18, dtype=torch.int32)
        out.copy_(x, non_blocking=True)
        assert (out == step).all()


def test_order(device):
    x = torch.zeros(1000, dtype=torch.int32).to(device)
    for step in range(50):
        x.copy_(torch.full((1000,), step, dtype=torch.int32), non_blocking=True)
        assert x[999].item() == step
        y = x.clone()
        x.copy_(torch.full((1000,), -1, dtype=torch.int32))
        assert (y.cpu() == step).all()


def test_overlap_is_refused(device):
    x = torch.arange(10.0).to(device)
    with pytest.raises(RuntimeError, match="single memory location"):
        x[1:].copy_(x[:-1])
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.zeros(1).to(device).expand(4).copy_(torch.ones(4))
    same(x.copy_(x).cpu(), torch.arange(10.0))


@pytest.mark.parametrize("conj", [False, True])
@pytest.mark.parametrize("neg", [False, True])
def test_lazy_bits(device, conj, neg):
    x = sample(torch.complex64, 5, 4)

    def lazy(t):
        t = t.conj() if conj else t
        return torch._neg_view(t) if neg else t

    same(lazy(x.to(device)).cpu().resolve_conj().resolve_neg(), lazy(x).resolve_conj().resolve_neg())
    same(lazy(x).to(device).cpu().resolve_conj().resolve_neg(), lazy(x).resolve_conj().resolve_neg())
    out = lazy(torch.zeros(5, 4, dtype=torch.complex64))
    out.copy_(x.to(device))
    same(out.resolve_conj().resolve_neg(), x)


def test_imaginary_part_of_a_conjugate(device):
    x = sample(torch.complex64, 6)
    same(x.to(device).conj().imag.cpu(), x.conj().imag.resolve_neg())


def test_complex_views(device):
    x = sample(torch.complex64, 3, 4)
    y = x.to(device)
    same(torch.view_as_real(y).cpu(), torch.view_as_real(x))
    same(y.real.cpu(), x.real.contiguous())
    same(torch.view_as_complex(torch.view_as_real(y)).cpu(), x)


def test_between_devices():
    count = torch.spiral.device_count()
    if count < 2:
        pytest.skip("one device")
    x = sample(torch.float32, 5, 7)
    for a, b in itertools.permutations(range(count), 2):
        same(x.to(f"spiral:{a}").to(f"spiral:{b}").cpu(), x)
        same(x.to(f"spiral:{a}").t().to(f"spiral:{b}").cpu(), x.t().contiguous())
        y = torch.empty(5, 7, dtype=torch.float16, device=f"spiral:{b}").copy_(x.to(f"spiral:{a}"))
        same(y.cpu(), x.half())
        assert torch.spiral.current_device() == 0


def test_item(device):
    for dtype in DTYPES:
        x = sample(dtype, 1)
        assert x.to(device).item() == x.item()
    with pytest.raises(RuntimeError, match="cannot be converted to Scalar"):
        torch.ones(2).to(device).item()
    assert torch.arange(6).view(2, 3).to(device).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_printing(device):
    for dtype in DTYPES:
        x = sample(dtype, 3, 4)
        assert str(x.to(device)).replace("\n", "").replace(" ", "").startswith("tensor(")
    text = str(torch.arange(3).to(device))
    assert "[0, 1, 2]" in text and f"device='{device}'" in text
    assert "..." in str(torch.zeros(100, 100).to(device))


def test_copy_on_write(device):
    x = torch.arange(8.0).to(device)
    y = torch._lazy_clone(x)
    y.copy_(torch.ones(8))
    same(x.cpu(), torch.arange(8.0))
    same(y.cpu(), torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_outputs_larger_than_a_cache(device, dtype, offset):
    """CPU devices write those around the cache where their address is aligned."""
    x = torch.randint(0, 100, ((1 << 22) + 37,)).to(dtype)
    ours = x.to(device)
    out = torch.zeros_like(ours)
    torch.add(ours[offset:], ours[offset:], out=out[offset:])
    assert torch.equal(out[offset:].cpu(), x[offset:] + x[offset:])
    assert not out[:offset].any()
