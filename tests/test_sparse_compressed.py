"""Compressed sparse tensors: conversions, invariants, sums, products and their gradients, against the CPU."""

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
LAYOUTS = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def sparse(*shape, seed=0, layout=torch.sparse_csr):
    """A matrix of which half is zero, one row and one column wholly."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.5)
    x[1], x[:, 2] = 0, 0
    block = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return x.to_sparse(layout=layout, blocksize=block)


def same(got, expected, exact=True):
    """Equal members, of one layout."""
    assert got.layout == expected.layout and got.device.type == "spiral"
    got = got.cpu()
    row = expected.layout in (torch.sparse_csr, torch.sparse_bsr)
    for member in ("crow_indices", "col_indices") if row else ("ccol_indices", "row_indices"):
        assert torch.equal(getattr(got, member)(), getattr(expected, member)())
    torch.testing.assert_close(
        got.values(), expected.values(), **({"rtol": 0, "atol": 0} if exact else {}), equal_nan=True
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversions(device, layout):
    x = sparse(6, 4, layout=layout)
    dense = x.to_dense()
    same(x.to(device), x)
    block = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    same(dense.to(device).to_sparse(layout=layout, blocksize=block), x)
    assert torch.equal(x.to(device).to_dense().cpu(), dense)
    assert torch.equal(x.to(device).to_sparse().to_dense().cpu(), dense)
    if block is None:
        for other in LAYOUTS[:2]:
            same(x.to(device).to_sparse(layout=other), x.to_sparse(layout=other))
        same(x.to_sparse().to(device).to_sparse(layout=layout), x)
    empty = torch.zeros(4, 6).to_sparse(layout=layout, blocksize=block)
    same(torch.zeros(4, 6, device=device).to_sparse(layout=layout, blocksize=block), empty)


def test_batches(device):
    x = torch.stack([torch.eye(3), torch.eye(3).flip(0) * 2])
    same(x.to(device).to_sparse_csr(), x.to_sparse_csr())
    assert torch.equal(x.to_sparse_csr().to(device).to_dense().cpu(), x)


BAD = {
    "first": ([1, 1, 2], [0, 1]),
    "last": ([0, 1, 3], [0, 1]),
    "descends": ([0, 3, 2], [0, 1]),
    "outside": ([0, 1, 2], [0, 5]),
    "unsorted": ([0, 2, 2], [1, 0]),
    "twice": ([0, 2, 2], [1, 1]),
}


@pytest.mark.parametrize("make", [torch.sparse_csr_tensor, torch.sparse_csc_tensor])
@pytest.mark.parametrize("case", BAD)
def test_invariants(device, make, case):
    def error(where):
        indices = (torch.tensor(i, device=where) for i in BAD[case])
        with pytest.raises(RuntimeError) as found:
            make(*indices, torch.ones(2, device=where), (2, 2), check_invariants=True)
        return str(found.value)

    assert error(device) == error("cpu")
    good = make(*(torch.tensor(i, device=device) for i in ([0, 1, 2], [1, 0])), torch.ones(2, device=device), (2, 2),
                check_invariants=True)  # fmt: skip
    assert good.to_dense().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_arithmetic(device, layout):
    x, dense = sparse(5, 4, layout=layout), torch.randn(5, 4)
    y = x.to(device)
    products = [lambda v: v * v] if layout == torch.sparse_csr else []  # upstream has no other ones
    for f in (torch.sin, torch.neg, lambda v: v * 2, lambda v: torch.add(v, v, alpha=-0.5), *products):
        same(f(y), f(x), exact=f is not torch.sin)
    assert torch.equal((dense.to(device) + y).cpu(), dense + x)
    torch.testing.assert_close(y.sum().cpu(), x.sum())
    with pytest.raises(RuntimeError, match="same shape"):
        y + sparse(4, 4, layout=layout).to(device)
    with pytest.raises(RuntimeError, match="same size"):
        dense.to(device)[:2] + y


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_products(device, layout):
    x = sparse(5, 4, layout=layout)
    y, exact = x.to(device), x.to_dense().double()
    b, c, v = torch.randn(4, 3), torch.randn(3, 5), torch.randn(4)

    def near(got, expected):
        torch.testing.assert_close(got.cpu(), expected.float())

    near(y @ b.to(device), exact @ b.double())
    near(y @ b.t().contiguous().to(device).t(), exact @ b.double())
    near(c.to(device) @ y, c.double() @ exact)
    near(y @ v.to(device), exact @ v.double())
    start = torch.randn(3)
    near(torch.addmm(start.to(device), y, b.to(device), beta=0.5, alpha=2), 0.5 * start + 2 * (exact @ b.double()))
    other = sparse(4, 6, seed=1, layout=layout)
    product = y @ other.to(device)
    assert product.layout == torch.sparse_csr
    near(product.to_dense(), exact @ other.to_dense().double())
    product = torch.sparse.mm(x.to_sparse().to(device), other.to_sparse().to(device))
    near(product.to_dense(), exact @ other.to_dense().double())
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(5x4 and 3x5\)"):
        y @ c.to(device)


def test_sampled_products(device):
    x, a, b = sparse(5, 4), torch.randn(5, 3), torch.randn(3, 4)
    leaves = [t.detach().clone().requires_grad_() for t in (a, b)]
    expected = torch.sparse.sampled_addmm(x, *leaves, beta=0.5, alpha=2)
    expected.to_dense().sin().sum().backward()
    ours = [t.to(device).requires_grad_() for t in (a, b)]
    got = torch.sparse.sampled_addmm(x.to(device), *ours, beta=0.5, alpha=2)
    same(got.detach(), expected.detach(), exact=False)
    got.to_dense().sin().sum().backward()
    for o, t in zip(ours, leaves, strict=True):
        torch.testing.assert_close(o.grad.cpu(), t.grad)
    out = torch.zeros(5, 4, device=device).to_sparse_csr()
    torch.sparse.sampled_addmm(x.to(device), a.to(device), b.to(device), out=out)
    same(out, torch.sparse.sampled_addmm(x, a, b), exact=False)
    with pytest.raises(RuntimeError, match=r"self.shape\[-1\] must match mat2.shape\[-1\]"):
        torch.sparse.sampled_addmm(x.to(device), a.to(device), b[:, :2].to(device))


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin"])
def test_products_that_reduce(device, reduce):
    torch.manual_seed(0)
    x, b = sparse(5, 4), torch.randn(4, 3)
    results = []
    for where in ("cpu", device):
        sparse_leaf, dense_leaf = (t.to(where).detach().requires_grad_() for t in (x, b))
        out = torch.sparse.mm(sparse_leaf, dense_leaf, reduce)
        out.sin().sum().backward()
        results.append([t.detach().to_dense().cpu() for t in (out, sparse_leaf.grad, dense_leaf.grad)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
    empty = torch.zeros(5, 4, device=device).to_sparse_csr()
    assert torch.equal(torch.sparse.mm(empty, b.to(device), reduce).cpu(), torch.zeros(5, 3))
    with pytest.raises(RuntimeError, match="expect self to be SparseCsr, got SparseCsc"):
        torch.sparse.mm(x.to_sparse_csc().to(device), b.to(device), reduce)
