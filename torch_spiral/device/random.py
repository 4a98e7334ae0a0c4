"""Random numbers: Philox4x32-10. A generator's state is its seed and how many counter values were used: 16 bytes.
torch_spiral/ops/random.py says which words of the counter an element takes, so the numbers can be had elsewhere too."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from torch_spiral import _C

from ..untraced import untraced
from ._devices import Device, _get_device_index


def default_generators() -> tuple[torch.Generator, ...]:
    """The generators that operators use without `generator=`, one per device."""
    return tuple(torch.ops.spiral._default_generator(i) for i in range(_C.device_count()))


def _generator(device: Device) -> torch.Generator:
    return torch.ops.spiral._default_generator(_get_device_index(device))


@untraced
def get_rng_state(device: Device = "spiral") -> torch.Tensor:
    """The state of a device's generator: uint8 [16] on the CPU."""
    return _generator(device).get_state()


@untraced
def set_rng_state(new_state: torch.Tensor, device: Device = "spiral") -> None:
    """Restores what get_rng_state() gave. RuntimeError for a state of another kind."""
    _generator(device).set_state(new_state.cpu())


def get_rng_state_all() -> list[torch.Tensor]:
    """get_rng_state() of every device."""
    return [get_rng_state(i) for i in range(_C.device_count())]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """set_rng_state() of every device, in order."""
    for i, state in enumerate(new_states):
        set_rng_state(state, i)


def manual_seed(seed: int) -> None:
    """Seeds the generator of the current device."""
    _generator(None).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seeds the generators of all devices, also of those not looked for yet. torch.manual_seed calls it."""
    _C.manual_seed_all(int(seed) & 0xFFFFFFFFFFFFFFFF)


def seed() -> None:
    """Seeds the current device from a source of true randomness."""
    _generator(None).seed()


def seed_all() -> None:
    """Seeds all devices with one truly random number."""
    manual_seed_all(torch.Generator().seed())


def initial_seed() -> int:
    """The seed of the current device."""
    return _generator(None).initial_seed()
