"""Sparse COO tensors: construction, conversion, sums, products, and the sparse gradients of embeddings."""

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def pair(device, indices=((0, 1, 1, 0), (2, 0, 0, 2)), values=(1.0, 2.0, 3.0, 4.0), shape=(2, 3)):
    """The same uncoalesced tensor on the CPU and on the device."""
    i, v = torch.tensor(indices), torch.tensor(values)
    return torch.sparse_coo_tensor(i, v, shape), torch.sparse_coo_tensor(i.to(device), v.to(device), shape)


def test_conversion(device):
    x = torch.randn(4, 5) * (torch.rand(4, 5) > 0.5)
    s = x.to(device).to_sparse()
    assert s.layout == torch.sparse_coo and s.device.type == "spiral" and s.is_coalesced()
    assert torch.equal(s.to_dense().cpu(), x)
    assert torch.equal(s.cpu().to_dense(), x)
    assert torch.equal(x.to_sparse().to(device).to_dense().cpu(), x)
    hybrid = x.to(device).to_sparse(1)
    assert hybrid.sparse_dim() == 1 and torch.equal(hybrid.to_dense().cpu(), x)


def test_coalesce(device):
    c, s = pair(device)
    expected, got = c.coalesce(), s.coalesce()
    assert torch.equal(got.indices().cpu(), expected.indices()) and torch.equal(got.values().cpu(), expected.values())
    c, s = pair(device, ((1, 0, 1),), ((True, False), (False, False), (True, True)), (3, 2))
    assert torch.equal(s.coalesce().to_dense().cpu(), c.coalesce().to_dense())


def test_arithmetic(device):
    c, s = pair(device)
    dense, other = torch.randn(2, 3), torch.randn(3, 4)
    assert torch.equal((s + s).to_dense().cpu(), (c + c).to_dense())
    assert torch.equal((s * 2).to_dense().cpu(), c.to_dense() * 2)
    assert torch.equal((-s).to_dense().cpu(), -c.to_dense())
    assert torch.allclose((dense.to(device) + s).cpu(), dense + c.to_dense())
    assert torch.allclose(dense.to(device).add_(s, alpha=2).cpu(), dense + 2 * c.to_dense())
    assert torch.allclose((s * dense.to(device)).to_dense().cpu(), c.to_dense() * dense)
    assert torch.allclose((s @ other.to(device)).cpu(), c.to_dense() @ other)
    assert torch.equal(torch.sparse.sum(s, 0).to_dense().cpu(), c.to_dense().sum(0))
    assert torch.equal(dense.to(device).sparse_mask(s.coalesce()).values().cpu(), dense[[0, 1], [2, 0]])
    index = torch.tensor([2, 0, 2])
    assert torch.equal(s.index_select(1, index.to(device)).to_dense().cpu(), c.to_dense()[:, index])
    with pytest.raises(RuntimeError, match="expected sizes"):
        dense.to(device)[:1] + s


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.Adagrad, torch.optim.SGD])
def test_sparse_gradients_of_embeddings(device, optimizer):
    torch.manual_seed(0)
    reference = torch.nn.Embedding(10, 3, sparse=True)
    moved = torch.nn.Embedding(10, 3, sparse=True)
    moved.load_state_dict(reference.state_dict())
    moved = moved.to(device)
    for layer in (reference, moved):
        steps = optimizer(layer.parameters(), lr=0.1)
        for _ in range(2):
            steps.zero_grad()
            (layer(torch.tensor([1, 4, 1, 7], device=layer.weight.device)) ** 2).sum().backward()
            assert layer.weight.grad.is_sparse
            steps.step()
    assert torch.allclose(moved.weight.cpu(), reference.weight, atol=1e-5)


def test_gradients_that_are_known_to_be_zero(device):
    x = torch.tensor([1.0, -2.0, 0.0], device=device, requires_grad=True)
    x.sgn().sum().backward()
    assert torch.equal(x.grad.cpu(), torch.zeros(3))
    (g,) = torch.autograd.grad((x.sgn() * x).sum(), x)
    assert torch.equal(g.cpu(), torch.tensor([1.0, -1.0, 0.0]))
