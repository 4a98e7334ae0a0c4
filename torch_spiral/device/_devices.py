"""Which devices there are, and which is current."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from torch_spiral import _C

Device = torch.device | str | int | None


@dataclass(frozen=True)
class DeviceProperties:
    """What a device is and what it can hold. Bytes and counts."""

    index: int
    name: str
    vendor: str
    engine: str  # "opencl", "wgpu", "cuda", "hip"
    type: str  # "discrete_gpu", "integrated_gpu", "cpu", "software"
    driver: str
    api_version: str
    language: str  # of its kernels: "opencl", "wgsl", "triton"
    schedule_class: str  # "vector", "simt", "block"
    total_memory: int
    max_allocation: int  # the largest tensor
    max_binding: int  # what one kernel argument can see
    max_params: int
    compute_units: int
    max_workgroup_size: int
    max_workgroup_memory: int
    max_workgroups: int
    max_bindings: int
    subgroup_min: int
    subgroup_max: int
    float16: bool  # arithmetic; every dtype can be stored and copied
    float64: bool
    int64: bool
    int64_atomics: bool
    float32_atomics: bool
    timestamps: bool

    @property
    def multi_processor_count(self) -> int:
        """compute_units, by the name that torch.cuda uses."""
        return self.compute_units


_NAMES = frozenset(f.name for f in fields(DeviceProperties)) - {"index"}


def _get_device_index(device: Device = None, optional: bool = True, allow_cpu: bool = False) -> int:
    """The index that `device` means; -1 for a CPU where that is allowed. With optional=False a device without an
    index is a ValueError."""
    if isinstance(device, int):
        return device
    if isinstance(device, str):
        device = torch.device(device)
    if device is not None:
        if allow_cpu and device.type == "cpu":
            return -1
        if device.type != "spiral":
            raise ValueError(f"Expected a spiral device, but got: {device}")
        if device.index is not None:
            return device.index
    if not optional:
        raise ValueError(f"Expected a device with an index, but got: {device}")
    return _C.current_device()


def is_available() -> bool:
    """Whether there is any device. Looks for devices, opens none."""
    return device_count() > 0


def device_count() -> int:
    """How many devices there are, over all engines; best first. SPIRAL_ENGINE and SPIRAL_VISIBLE_DEVICES filter."""
    return _C.device_count()


def current_device() -> int:
    """The index of the current device of this thread."""
    return _C.current_device()


def set_device(device: Device) -> None:
    """Makes `device` the current one of this thread."""
    _C.set_device(_get_device_index(device))


class device:
    """Context manager: inside, `device` is the current one. A negative index or None changes nothing."""

    def __init__(self, device: Device):
        self.index = -1 if device is None else _get_device_index(device)
        self.previous = -1

    def __enter__(self) -> None:
        self.previous = _C.current_device()
        if self.index >= 0:
            _C.set_device(self.index)

    def __exit__(self, *exception: object) -> None:
        _C.exchange_device(self.previous)


class device_of(device):
    """Context manager: inside, the device of a tensor or storage is the current one; nothing changes if that isn't
    spiral."""

    def __init__(self, tensor: Any):
        super().__init__(tensor.device if tensor.device.type == "spiral" else None)


def synchronize(device: Device = None) -> None:
    """Waits for all work of a device. Raises what went wrong in it: IndexError for an index out of range that a
    kernel found, RuntimeError for a failure of the device. The device stays usable."""
    _C.synchronize(_get_device_index(device))


def get_device_properties(device: Device = None) -> DeviceProperties:
    """What a device is and what it can hold."""
    index = _get_device_index(device)
    found = _C.device_properties(index)
    return DeviceProperties(index=index, **{name: value for name, value in found.items() if name in _NAMES})


def get_device_name(device: Device = None) -> str:
    """The device's name, as its driver gives it."""
    return get_device_properties(device).name


def get_device_capability(device: Device = None) -> dict[str, Any]:
    """{"supported_dtypes": set of torch.dtype}: those that the device computes with."""
    return torch.accelerator.get_device_capability(_get_device_index(device))


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """True: bfloat16 is stored as such and computed in float32 (so False if emulation doesn't count)."""
    return including_emulation and is_available()


def engines() -> list[dict[str, Any]]:
    """What was looked at: {"engine", "library", "devices" (how many), "why" (not more; "" if nothing is missing)}."""
    return _C.engine_reports()


def is_initialized() -> bool:
    """Whether any device has been opened."""
    return any(_C.device_is_open(i) for i in range(_C.device_count())) if _C.devices_known() else False


def init() -> None:
    """Looks for devices. Nobody needs to call this."""
    _C.device_count()


def _lazy_init() -> None:
    init()


def _is_in_bad_fork() -> bool:
    """True in a process forked from one that had looked for devices: they can't be used here."""
    return _C.in_bad_fork()
