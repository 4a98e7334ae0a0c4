"""Tensors of torch.cuda and of the CUDA engine, seen as one another without a copy."""

from __future__ import annotations

import torch

from ._devices import Device, _get_device_index


def from_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A CUDA tensor's memory as a spiral tensor of the same GPU: same dtype, sizes and strides, no copy, no gradient.

    Work that torch.cuda's current stream has been given comes first. From then on the two tensors share their memory, but not
    their order: call wait_for_cuda() where one side uses what the other has written since.

    RuntimeError where the CUDA engine does not have that GPU."""
    return torch.ops.spiral.from_cuda(tensor.detach())


def to_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A spiral tensor's memory as a CUDA tensor: the other way round, with the same rules."""
    return torch.ops.spiral.to_cuda(tensor.detach())


def wait_for_cuda(device: Device = None) -> None:
    """Orders a spiral device and torch.cuda's current stream of the same GPU: later work of each waits for the earlier work of
    the other. The host does not wait. RuntimeError where the device's engine is not CUDA."""
    torch.ops.spiral.order_with_cuda(_get_device_index(device))
