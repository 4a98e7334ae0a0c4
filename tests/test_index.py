"""Indexing against the CPU: every op with contiguous, transposed, sliced, expanded, offset and empty operands."""

import pytest
import torch

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


def check(device, f, *args, atol=0.0):
    """f gives the same on the device as on the CPU, of copies of args."""
    expected = f(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args])
    got = f(*[a.to(device) if isinstance(a, torch.Tensor) else a for a in args])
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.cpu(), expected, atol=atol, rtol=1e-5 if atol else 0, equal_nan=True)


def data(dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(5, 6, 7) * 3
    return x.to(dtype) if not dtype.is_complex else torch.complex(x, x.flip(0)).to(dtype)


INDEX = torch.tensor([3, 0, 3, 4])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moves(device, layout):
    make = LAYOUTS[layout]
    x = data()
    idx = torch.randint(0, 5, (4, 6, 7))
    check(device, lambda x, i: make(x).gather(0, i), x, idx)
    check(device, lambda x, i: make(x).index_select(0, i), x, INDEX)
    check(device, lambda x, i: make(x).index_select(2, i), x, INDEX)
    check(device, lambda x, i: make(x)[i, :, i], x, INDEX)
    check(device, lambda x, i: make(x)[:, i.view(2, 2) - 5], x, INDEX)
    check(device, lambda x: torch.cat([make(x), make(x)[:, 1:3], x[:, :0]], 1), x)
    check(device, lambda x: make(x)[make(x) > 1], x)
    check(device, lambda x: make(x).gt(2).nonzero(), x)
    check(device, lambda x, i: make(x).take(i), x, INDEX * 17)
    check(device, lambda x: make(x).masked_fill(x[0] > 0, 2.5), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes(device, layout):
    make = LAYOUTS[layout]
    x, rows = data(), torch.randn(4, 6, 7)
    unique = torch.tensor([3, 0, 1, 4])

    def into(f):
        def g(x, *args):
            x = make(x)
            f(x, *args)
            return x

        return g

    check(device, into(lambda x, i, r: x.index_copy_(0, i, r)), x, unique, rows)
    check(device, into(lambda x, i: x.index_fill_(1, i, 1.5)), x, unique)
    check(device, into(lambda x, i, r: x.index_add_(0, i, r, alpha=2)), x, INDEX, rows, atol=1e-5)
    check(device, into(lambda x, i, r: x.index_reduce_(0, i, r, "mean", include_self=False)), x, INDEX, rows, atol=1e-5)
    check(device, into(lambda x, i, r: x.index_reduce_(0, i, r, "amax")), x, INDEX, rows)
    check(device, into(lambda x, i, r: x.index_put_((i,), r)), x, unique, rows)
    check(device, into(lambda x, i, r: x.index_put_((i, i), r[:, 0], accumulate=True)), x, INDEX, rows, atol=1e-5)
    check(device, into(lambda x, r: x.index_put_((x > 0,), r[0, 0, 0], accumulate=True)), x, rows, atol=1e-5)
    check(device, into(lambda x, r: x.masked_scatter_(x > 1, r)), x, rows)
    check(device, into(lambda x, i, r: x.put_(i, r[:, 0, 0], accumulate=True)), x, INDEX * 9, rows, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scatter(device, dim):
    x, src = data(), torch.randn(5, 6, 7)
    idx = torch.randint(0, 5, (5, 6, 7))
    check(device, lambda x, i, s: x.scatter_add(dim, i, s), x, idx, src, atol=1e-4)
    for reduce in ("sum", "prod", "mean", "amax", "amin"):
        for include in (True, False):
            f = lambda x, i, s, r=reduce, include=include: x.scatter_reduce(dim, i, s, r, include_self=include)  # noqa: E731
            check(device, f, x, idx, src, atol=1e-3)
    check(device, lambda x, i: x.scatter(dim, i, 2.0), x, idx)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_dtypes(device, dtype):
    x = data(dtype)
    idx = torch.randint(0, 5, (4, 6, 7))
    check(device, lambda x, i: x.gather(0, i), x, idx)
    check(device, lambda x, i: x[i], x, INDEX)
    check(device, lambda x: torch.cat([x, x.float() if not dtype.is_complex else x]), x)
    check(device, lambda x, i: x.scatter_add(0, i, x[:4]), x, idx, atol=0.1 if dtype == torch.bfloat16 else 1e-2)
    check(device, lambda x, m: x.masked_select(m), x, torch.rand(6, 7) > 0.5)


def test_scalars_and_empty(device):
    zero = torch.tensor(2.5)
    check(device, lambda x, i: x.gather(0, i), zero, torch.tensor(0))
    check(device, lambda x, i: x.index_select(0, i), zero, torch.tensor([0]))
    check(device, lambda x: x.nonzero(), zero)
    empty = torch.empty(0, 3)
    check(device, lambda x: torch.cat([x, x, torch.ones(2, 3, device=x.device)]), empty)
    check(device, lambda x: x[x > 0], empty)
    check(device, lambda x, i: x[i], torch.randn(4, 3), torch.empty(0, dtype=torch.int64))
    check(device, lambda x: torch.nonzero_static(x > 0, size=40, fill_value=-7), data()[0])


def test_nothing_to_select_from(device):
    """index_select along an empty dimension: refused, unless nothing is selected, whether or not the result is empty."""
    for shape, dim in (((0, 0), 0), ((0, 3), 0), ((2, 0), 1)):
        x = torch.empty(shape, device=device)
        assert x.index_select(dim, torch.empty(0, dtype=torch.long, device=device)).shape == shape
        index = torch.zeros(2, dtype=torch.long, device=device)
        with pytest.raises(RuntimeError, match="self indexing axis dim should be positive"):
            x.index_select(dim, index)
        with pytest.raises(RuntimeError, match="self indexing axis dim should be positive"):
            torch.index_select(x, dim, index, out=torch.empty(0, device=device))
    assert torch.empty(0, 3, device=device).index_select(1, index).shape == (0, 2)


def test_out_of_range_names_the_op(device):
    x = torch.randn(4, 3, device=device)
    for f, name in (
        (lambda i: x.index_select(0, i), "index_select"),
        (lambda i: x[i], "index"),
        (lambda i: x.gather(0, i.view(1, 1)), "gather"),
        (lambda i: x.scatter(0, i.view(1, 1), 1.0), "scatter"),
        (lambda i: torch.nn.functional.embedding(i, x), "index_select"),
    ):
        with pytest.raises(IndexError, match=f"{name}.*index 4 is out of bounds"):
            f(torch.tensor([4], device=device))
            torch.spiral.synchronize()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_and_bags(device, mode):
    def bags(w, idx, offsets):
        w = w.requires_grad_()
        out = torch.nn.functional.embedding_bag(idx, w, offsets, mode=mode, padding_idx=2)
        (out * out).sum().backward()
        return torch.cat([out.flatten(), w.grad.flatten()])

    def embedding(w, idx, offsets):
        w = w.requires_grad_()
        out = torch.nn.functional.embedding(idx, w, padding_idx=2, scale_grad_by_freq=mode == "mean")
        (out * out).sum().backward()
        return w.grad

    args = torch.randn(9, 20), torch.tensor([1, 3, 4, 4, 8, 0, 2, 2, 4]), torch.tensor([0, 3, 3, 5])
    check(device, bags, *args, atol=1e-5)
    check(device, embedding, *args, atol=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
def test_segment_reduce(device, reduce):
    def f(x, lengths):
        x = x.requires_grad_()
        out = torch.segment_reduce(x, reduce, lengths=lengths, axis=0, initial=1.5, unsafe=True)
        out.sum().backward()
        return torch.cat([out.flatten(), x.grad.flatten()])

    check(device, f, torch.randn(6, 4), torch.tensor([2, 0, 3, 1]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
def test_cat_of_small_types_at_any_offset(device, dtype):
    for n in (1, 2, 3, 9):
        for offset in range(5):
            a, b = (torch.randn(offset) > 0).to(dtype), (torch.randn(n) > 0).to(dtype)
            check(device, lambda a, b: torch.cat([a, b]), a, b)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_add_up_in_order(device, deterministic):
    """Many addends of one place: atomics would round in another order each time."""
    torch.manual_seed(0)
    x, i = torch.randn(3000, 3), torch.randint(3, (3000,))
    zeros = torch.zeros(3, 3)

    def embedding(x, i):
        weight = zeros.clone().to(x.device).requires_grad_()
        torch.nn.functional.embedding(i, weight).backward(x)
        return weight.grad

    def bag(x, i):
        weight = zeros.clone().to(x.device).requires_grad_()
        torch.nn.functional.embedding_bag(i.view(-1, 3), weight, mode="sum").backward(x[:1000])
        return weight.grad

    check(device, lambda x, i: zeros.clone().to(x.device).index_add_(0, i, x), x, i)
    check(device, lambda x, i: zeros.clone().to(x.device).scatter_add_(0, i[:, None].expand(-1, 3), x), x, i)
    check(device, lambda x, i: zeros.clone().to(x.device).index_put_((i,), x, accumulate=True), x, i)
    check(device, embedding, x, i)
    first = bag(x.to(device), i.to(device))
    torch.testing.assert_close(first.cpu(), bag(x, i), rtol=1e-4, atol=1e-4)  # the CPU adds up in another order
    assert all(torch.equal(bag(x.to(device), i.to(device)), first) for _ in range(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_algorithms_let_the_last_one_win(device, deterministic, layout):
    """Places that are written many times: upstream leaves open who wins, but not that it changes."""
    x, i = (
        LAYOUTS[layout](torch.randn(3000, 4, 2)),
        torch.randint(3, (3000,), generator=torch.Generator().manual_seed(0)),
    )
    to = torch.zeros(3, 4, 2)
    last = x[[int((i == n).nonzero()[-1]) for n in range(3)]]
    assert torch.equal(to.to(device).index_copy_(0, i.to(device), x.to(device)).cpu(), last)
    assert torch.equal(to.to(device).index_put_((i.to(device),), x.to(device)).cpu(), last)
    where = i[:, None, None].expand(3000, 4, 2).to(device)
    assert torch.equal(to.to(device).scatter_(0, where, x.to(device)).cpu(), last)
    back = to.permute(1, 2, 0).contiguous().to(device).index_copy_(2, i.to(device), x.permute(1, 2, 0).to(device))
    assert torch.equal(back.cpu(), last.permute(1, 2, 0))


def test_what_has_no_deterministic_kernel_says_so(device, deterministic):
    x = torch.randn(1, 1, 4, 4, device=device, requires_grad=True)
    sampled = torch.nn.functional.grid_sample(x, torch.zeros(1, 2, 2, 2, device=device), align_corners=False)
    pooled = torch.nn.functional.fractional_max_pool2d(x, 2, output_size=2)
    for y in (sampled, pooled):
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3, device=device).put_(torch.tensor([0, 0], device=device), torch.ones(2, device=device), True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
        sampled.sum().backward()
