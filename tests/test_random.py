"""Generators: seeds and states. What operators draw is in the tests of random operators."""

import pytest
import torch


@pytest.fixture(autouse=True)
def keep_states():
    states = torch.spiral.get_rng_state_all()
    cpu = torch.get_rng_state()
    yield
    torch.spiral.set_rng_state_all(states)
    torch.set_rng_state(cpu)


def test_seeds(device):
    torch.manual_seed(123)
    assert torch.spiral.initial_seed() == 123
    torch.spiral.manual_seed(5)
    assert torch.spiral.initial_seed() == 5
    torch.spiral.manual_seed_all(6)
    assert all(g.initial_seed() == 6 for g in torch.spiral.default_generators)
    torch.spiral.seed()
    assert torch.spiral.initial_seed() != 6
    torch.spiral.seed_all()
    assert len({g.initial_seed() for g in torch.spiral.default_generators}) == 1
    torch.manual_seed(-1)
    assert torch.spiral.initial_seed() == 2**64 - 1


def test_default_generators(device):
    generators = torch.spiral.default_generators
    assert len(generators) == torch.spiral.device_count()
    assert all(isinstance(g, torch.Generator) for g in generators)
    assert generators[device.index].device == device


def test_state_is_seed_and_offset(device):
    g = torch.Generator(device).manual_seed(0x1122334455667788)
    state = g.get_state()
    assert state.dtype == torch.uint8 and state.device.type == "cpu" and state.numel() == 16
    seed, offset = state.view(torch.int64).tolist()
    assert (seed, offset) == (0x1122334455667788, 0)
    changed = state.clone()
    changed.view(torch.int64)[1] = 40
    g.set_state(changed)
    assert torch.equal(g.get_state(), changed) and g.initial_seed() == 0x1122334455667788
    with pytest.raises(RuntimeError, match="16 bytes"):
        g.set_state(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises((RuntimeError, TypeError)):
        g.set_state(torch.zeros(16))


def test_state_functions(device):
    torch.spiral.manual_seed(1)
    state = torch.spiral.get_rng_state()
    assert torch.equal(state, torch.spiral.get_rng_state(device))
    torch.spiral.manual_seed(2)
    assert not torch.equal(state, torch.spiral.get_rng_state())
    torch.spiral.set_rng_state(state)
    assert torch.equal(state, torch.spiral.get_rng_state())
    everything = torch.spiral.get_rng_state_all()
    torch.spiral.manual_seed_all(3)
    torch.spiral.set_rng_state_all(everything)
    assert all(map(torch.equal, everything, torch.spiral.get_rng_state_all()))


def test_clone_and_copies(device):
    g = torch.Generator(device).manual_seed(9)
    other = g.clone_state()
    other.manual_seed(10)
    assert g.initial_seed() == 9 and other.initial_seed() == 10


def test_fork_rng(device):
    torch.manual_seed(1)
    with torch.random.fork_rng(devices=[device.index], device_type="spiral"):
        torch.manual_seed(2)
        assert torch.spiral.initial_seed() == 2
    assert torch.spiral.initial_seed() == 1 == torch.initial_seed()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_numbers_again(device, use_reentrant):
    """A dropout mask of the recomputed forward is that of the first one."""

    def gradient(through):
        torch.manual_seed(3)
        x = torch.ones(1000, device=device, requires_grad=True)
        y = through(torch.nn.functional.dropout, x)
        torch.rand(5, device=device)
        y.sum().backward()
        return y.detach().cpu(), x.grad.cpu()

    checkpoint = torch.utils.checkpoint.checkpoint
    expected, got = gradient(lambda f, x: f(x)), gradient(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    assert 0 < expected[1].count_nonzero() < 1000
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_seed_before_the_first_use():
    import subprocess
    import sys

    code = "import torch; torch.manual_seed(77); print(torch.spiral.initial_seed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "77", done.stderr


def test_same_numbers_for_the_same_seed(device):
    def draw():
        return torch.rand(1000, device=device).cpu()

    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert torch.equal(first, draw()) and torch.equal(second, draw())
    assert not torch.equal(first, second)
    state = torch.spiral.get_rng_state()
    third = draw()
    torch.spiral.set_rng_state(state)
    assert torch.equal(third, draw())
    assert first.min() >= 0 and first.max() < 1 and abs(first.mean() - 0.5) < 0.05


def test_philox_reference(device):
    # Random123's known answers of Philox4x32-10 are what the documented reference gives.
    from philox import philox4x32

    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox4x32((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_a_generator_of_another_device_is_refused(device):
    with pytest.raises(RuntimeError, match=r"generator|spiral"):
        torch.rand(3, device=device, generator=torch.Generator())
