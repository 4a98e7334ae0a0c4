"""Streams and events.

A device has one in-order queue. Streams are distinct objects that all feed it: work of two streams never overlaps,
and is in the order in which it was queued, so code that synchronises streams is correct and code that doesn't is
correct too. An event of another device that a stream waits for is waited for on the host.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ._devices import Device, _get_device_index


class Stream(torch.Stream):
    """torch.Stream of a spiral device. `priority` is accepted and has no effect."""

    def __new__(cls, device: Device = None, priority: int = 0, **kwargs: Any) -> Stream:
        if "stream_id" in kwargs:
            return super().__new__(cls, priority=priority, **kwargs)
        return super().__new__(cls, device=torch.device("spiral", _get_device_index(device)), priority=priority)


class Event(torch.Event):
    """Makes a torch.Event of the current device. `blocking` is accepted and has no effect; interprocess events are a
    NotImplementedError."""

    # A plain torch.Event, since torch.Event.elapsed_time takes no instance of a subclass.
    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.Event:  # type: ignore[misc]
        if interprocess:
            raise NotImplementedError("spiral events cannot be shared between processes")
        return torch.Event(device="spiral", enable_timing=enable_timing, blocking=blocking)


def current_stream(device: Device = None) -> torch.Stream:
    """The current stream of a device, in this thread."""
    return torch.accelerator.current_stream(_get_device_index(device))


def default_stream(device: Device = None) -> torch.Stream:
    """The stream that is current until another one is set."""
    index = _get_device_index(device)
    return torch.Stream(stream_id=0, device_index=index, device_type=torch._C._autograd.DeviceType.PrivateUse1.value)


def set_stream(stream: torch.Stream | None) -> None:
    """Makes `stream` the current one of its device, and its device the current one. None changes nothing."""
    if stream is not None:
        torch.accelerator.set_stream(stream)


def stream(stream: torch.Stream | None) -> contextlib.AbstractContextManager[Any]:
    """Context manager: inside, `stream` is the current one."""
    return contextlib.nullcontext() if stream is None else stream
