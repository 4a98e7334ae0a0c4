"""Random operators: their words are those of the Philox reference, in the order that ops/random.py documents."""

import math

import pytest
import torch
import torch.nn.functional as F
from philox import philox4x32

SEED = 0x123456789ABCDEF


def words(n, offset, per_element=1):
    """The words of elements 0 ... n - 1 for counters from `offset`, a list of tuples."""
    elements = 4 // per_element
    out = []
    for i in range(n):
        block, j = divmod(i, 16 * elements)
        counter = offset + 16 * block + j % 16
        w = philox4x32((counter & 0xFFFFFFFF, counter >> 32, 0, 0), (SEED & 0xFFFFFFFF, SEED >> 32))
        first = per_element * (j // 16)
        out.append(w[first : first + per_element])
    return out


def pairs(n, offset):
    """Both words of the pair that element i of normal numbers comes from, and whether it is the second of it."""
    out = []
    for i in range(n):
        block, j = divmod(i, 64)
        counter = offset + 16 * block + j % 16
        w = philox4x32((counter & 0xFFFFFFFF, counter >> 32, 0, 0), (SEED & 0xFFFFFFFF, SEED >> 32))
        r = j // 16
        out.append((w[r // 2 * 2], w[r // 2 * 2 + 1], r % 2))
    return out


@pytest.fixture
def generator(device):
    g = torch.Generator(device).manual_seed(SEED)
    state = g.get_state()
    state.view(torch.int64)[1] = (1 << 32) - 8  # the counter's first word wraps
    g.set_state(state)
    return g


OFFSET = (1 << 32) - 8


@pytest.mark.parametrize("n", [1, 63, 64, 200])
def test_uniform(device, generator, n):
    x = torch.rand(n, device=device, generator=generator).cpu()
    assert torch.equal(x, torch.tensor([(w >> 8) * 2.0**-24 for (w,) in words(n, OFFSET)]))
    # The next call goes on where this one stopped.
    y = torch.rand(3, device=device, generator=generator).cpu()
    assert torch.equal(y, torch.tensor([(w >> 8) * 2.0**-24 for (w,) in words(3, OFFSET + -(-n // 64) * 16)]))


@pytest.mark.parametrize("dtype, digits", [(torch.float16, 11), (torch.bfloat16, 8)])
def test_uniform_of_half_types(device, generator, dtype, digits):
    x = torch.rand(300, device=device, dtype=dtype, generator=generator).cpu()
    assert torch.equal(x, torch.tensor([(w >> (32 - digits)) * 2.0**-digits for (w,) in words(300, OFFSET)]).to(dtype))
    assert x.max() < 1


def test_uniform_range_and_strides(device, generator):
    x = torch.empty(7, 5, device=device).t().uniform_(-3, 4, generator=generator)
    y = torch.tensor([(w >> 8) * 2.0**-24 for (w,) in words(35, OFFSET)]) * 7 - 3
    torch.testing.assert_close(x.t().cpu().flatten(), y)
    big = torch.zeros(10, 10, device=device)
    big[2:5, ::3].uniform_(1, 2, generator=generator)
    assert (big.cpu() != 0).sum() == 12


def test_normal(device, generator):
    x = torch.randn(200, device=device, generator=generator).cpu()
    expected = []
    for a, b, second in pairs(200, OFFSET):
        r = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
        angle = 2 * math.pi * (b + 0.5) / 2**32
        expected.append(r * (math.sin(angle) if second else math.cos(angle)))
    torch.testing.assert_close(x, torch.tensor(expected), rtol=1e-5, atol=2e-6)


def test_integers(device, generator):
    x = torch.randint(-7, 1000, (100,), device=device, generator=generator, dtype=torch.int32).cpu()
    assert x.tolist() == [w % 1007 - 7 for (w,) in words(100, OFFSET)]
    start = OFFSET + 32
    y = torch.randint(5, 1 << 40, (100,), device=device, generator=generator).cpu()
    assert y.tolist() == [(a | b << 32) % ((1 << 40) - 5) + 5 for a, b in words(100, start, 2)]
    z = torch.empty(50, dtype=torch.uint8, device=device).random_(generator=generator).cpu()
    assert z.tolist() == [w % 256 for (w,) in words(50, start + 64)]


def test_bernoulli_and_dropout(device, generator):
    p = 0.3
    x = torch.empty(150, device=device).bernoulli_(p, generator=generator).cpu()
    assert x.tolist() == [float((w >> 8) < p * 2**24) for (w,) in words(150, OFFSET)]
    probabilities = torch.linspace(0, 1, 150).to(device)
    y = torch.bernoulli(probabilities, generator=generator).cpu()
    bits = [(w >> 8) * 2.0**-24 for (w,) in words(150, OFFSET + 48)]
    assert torch.equal(y, (torch.tensor(bits) < probabilities.cpu()).float())


def test_dropout(device):
    torch.manual_seed(1)
    x = torch.randn(40, 50, device=device, requires_grad=True)
    y = F.dropout(x, 0.25)
    y.sum().backward()
    kept = y.detach().cpu() != 0
    torch.testing.assert_close(y.detach().cpu()[kept], x.detach().cpu()[kept] / 0.75)
    torch.testing.assert_close(x.grad.cpu(), kept / 0.75)
    assert abs(kept.float().mean() - 0.75) < 0.05
    assert torch.equal(F.dropout(x, 0.25, training=False), x)
    assert F.dropout(x, 1.0).count_nonzero() == 0
    assert torch.equal(F.dropout(x, 0.0), x)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64, 1000])
def test_randperm(device, n):
    x = torch.randperm(n, device=device).cpu()
    assert torch.equal(x.sort().values, torch.arange(n))


def test_randperm_is_fair(device):
    counts = torch.zeros(3, 3)
    for _ in range(300):
        counts[torch.arange(3), torch.randperm(3, device=device).cpu()] += 1
    assert (counts - 100).abs().max() < 50  # 6 standard deviations


MOMENTS = {  # sample of n numbers, mean, variance
    "exponential": (lambda x: x.exponential_(2.0), 0.5, 0.25),
    "geometric": (lambda x: x.geometric_(0.4), 2.5, 0.6 / 0.16),
    "log_normal": (lambda x: x.log_normal_(0.0, 0.25), math.exp(0.03125), (math.exp(0.0625) - 1) * math.exp(0.0625)),
    "gamma": (lambda x: torch._standard_gamma(torch.full_like(x, 0.7)), 0.7, 0.7),
    "gamma_large": (lambda x: torch._standard_gamma(torch.full_like(x, 20.0)), 20.0, 20.0),
    "poisson": (lambda x: torch.poisson(torch.full_like(x, 4.0)), 4.0, 4.0),
    "poisson_large": (lambda x: torch.poisson(torch.full_like(x, 40.0)), 40.0, 40.0),
    "binomial": (lambda x: torch.binomial(torch.full_like(x, 12.0), torch.full_like(x, 0.3)), 3.6, 2.52),
    "binomial_large": (lambda x: torch.binomial(torch.full_like(x, 100.0), torch.full_like(x, 0.8)), 80.0, 16.0),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments(device, name):
    torch.manual_seed(2)
    sample, mean, variance = MOMENTS[name]
    n = 20000
    x = sample(torch.empty(n, device=device)).cpu().double()
    assert abs(x.mean() - mean) < 6 * math.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 0.15


def test_cauchy(device):
    torch.manual_seed(3)
    x = torch.empty(20000, device=device).cauchy_(1.0, 2.0).cpu()
    assert abs(x.median() - 1) < 0.15 and x.isfinite().all()


def test_multinomial_and_dirichlet(device):
    torch.manual_seed(4)
    p = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 1.0]], device=device)
    x = torch.multinomial(p, 2000, replacement=True).cpu()
    counts = torch.stack([row.bincount(minlength=3) for row in x])
    assert counts[0, 1] == 0 and counts[1, 0] == 0
    assert abs(counts[0, 0] - 500) < 120 and abs(counts[1, 1] - 1000) < 140
    d = torch._sample_dirichlet(torch.full((500, 4), 0.8, device=device)).cpu()
    torch.testing.assert_close(d.sum(-1), torch.ones(500))
    assert (d.mean(0) - 0.25).abs().max() < 0.06


def test_rrelu(device):
    torch.manual_seed(5)
    x = torch.randn(500, device=device, requires_grad=True)
    y = F.rrelu(x, 0.1, 0.3, training=True)
    slopes = (y / x).detach().cpu()
    negative = x.detach().cpu() < 0
    assert (slopes[~negative] == 1).all() and (slopes[negative] >= 0.0999).all() and (slopes[negative] < 0.3001).all()
    assert len(slopes[negative].unique()) > 100
    y.sum().backward()
    torch.testing.assert_close(x.grad.cpu(), slopes, rtol=1e-5, atol=1e-6)


def test_empty_and_wrong_arguments(device):
    assert torch.rand(0, device=device).numel() == 0
    assert F.dropout(torch.empty(0, 3, device=device), 0.5).shape == (0, 3)
    with pytest.raises(RuntimeError, match="from"):
        torch.empty(3, device=device).uniform_(2, 1)
    with pytest.raises(RuntimeError):
        torch.empty(3, device=device).bernoulli_(1.5)


def test_reparameterized_gradients(device):
    """Through samples of gamma, beta, Dirichlet and Student numbers, from the same samples as the CPU."""
    torch.manual_seed(0)
    alpha, beta = torch.rand(50) * 5 + 0.1, torch.rand(50) * 5 + 0.1
    x = torch.distributions.Gamma(alpha, 1.0).sample()
    expected = torch._standard_gamma_grad(alpha, x)
    torch.testing.assert_close(torch._standard_gamma_grad(alpha.to(device), x.to(device)).cpu(), expected)
    share = torch.distributions.Beta(alpha, beta).sample()
    args = share, alpha, alpha + beta
    torch.testing.assert_close(torch._dirichlet_grad(*(a.to(device) for a in args)).cpu(), torch._dirichlet_grad(*args))
    p = alpha.to(device).requires_grad_()
    for make in (lambda: torch.distributions.Beta(p, 2.0), lambda: torch.distributions.StudentT(p + 2)):
        p.grad = None
        make().rsample((100,)).sum().backward()
        assert p.grad.isfinite().all() and p.grad.ne(0).all()


def test_probabilities_and_rates_are_checked(device):
    """Asynchronously, with the texts of the CPU."""
    for bad in ([0.5, 1.5], [-0.1, 0.5], [0.5, float("nan")]):
        torch.bernoulli(torch.tensor(bad, device=device))
        with pytest.raises(RuntimeError, match="Expected p_in >= 0 && p_in <= 1"):
            torch.spiral.synchronize()
    torch.poisson(torch.tensor([[1.0, -1.0]], device=device))
    with pytest.raises(RuntimeError, match="expected rate to be non-negative"):
        torch.spiral.synchronize()
    edges = torch.bernoulli(torch.tensor([0.0, 1.0], device=device).expand(3, 2))
    assert edges.tolist() == [[0, 1]] * 3 and torch.poisson(torch.zeros(2, device=device).half()).tolist() == [0, 0]
    assert torch.empty(2, device=device).bernoulli_(torch.ones((), device=device)).tolist() == [1, 1]
    assert torch.bernoulli(torch.empty(0, device=device)).shape == (0,)
