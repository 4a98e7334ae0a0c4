"""The caching allocator: statistics, peaks, budget. Bytes throughout.

"allocated" is what tensors hold, "reserved" what the allocator holds of the device: reserved - allocated is kept for
reuse and goes back with empty_cache().
"""

from __future__ import annotations

from typing import Any

import torch

from torch_spiral import _C

from ._devices import Device, _get_device_index, get_device_name


def memory_stats(device: Device = None) -> dict[str, Any]:
    """The allocator's statistics by the names of torch.cuda.memory_stats ("allocated_bytes.all.peak")."""
    return dict(torch.accelerator.memory_stats(_get_device_index(device)))


def memory_allocated(device: Device = None) -> int:
    """Held by tensors now. Sizes are rounded up to 512."""
    return _C.memory_allocated(_get_device_index(device))


def max_memory_allocated(device: Device = None) -> int:
    """The peak of memory_allocated() since the start or reset_peak_memory_stats()."""
    return memory_stats(device)["allocated_bytes.all.peak"]


def memory_reserved(device: Device = None) -> int:
    """Held by the allocator now."""
    return _C.memory_reserved(_get_device_index(device))


def max_memory_reserved(device: Device = None) -> int:
    """The peak of memory_reserved() since the start or reset_peak_memory_stats()."""
    return memory_stats(device)["reserved_bytes.all.peak"]


def reset_peak_memory_stats(device: Device = None) -> None:
    """Starts peaks from the present."""
    torch.accelerator.reset_peak_memory_stats(_get_device_index(device))


def reset_accumulated_memory_stats(device: Device = None) -> None:
    """Starts the counts of what was ever allocated and freed from zero."""
    torch.accelerator.reset_accumulated_memory_stats(_get_device_index(device))


def empty_cache(device: Device = None) -> None:
    """Gives what no tensor uses back to the device; of all devices for None."""
    for index in range(_C.device_count()) if device is None else [_get_device_index(device)]:
        _C.empty_cache(index)


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """(free, total): what this process may still reserve, and what the device has."""
    return torch.accelerator.get_memory_info(_get_device_index(device))


def get_memory_budget(device: Device = None) -> int:
    """What the allocator may reserve. At the start: SPIRAL_MEMORY_BUDGET ("12G", "90%"), else a discrete GPU's memory
    or four fifths of what a device that shares the host's memory reports."""
    return _C.memory_budget(_get_device_index(device))


def set_memory_budget(size: int, device: Device = None) -> None:
    """Sets get_memory_budget(). Beyond it torch.OutOfMemoryError is raised; what is reserved already stays.
    ValueError if negative."""
    if size < 0:
        raise ValueError(f"The budget must not be negative, got {size}")
    _C.set_memory_budget(_get_device_index(device), int(size))


def set_per_process_memory_fraction(fraction: float, device: Device = None) -> None:
    """Sets the budget to a share of the device's memory. ValueError outside of 0 to 1."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    set_memory_budget(int(mem_get_info(device)[1] * fraction), device)


def get_per_process_memory_fraction(device: Device = None) -> float:
    """The budget as a share of the device's memory."""
    return get_memory_budget(device) / mem_get_info(device)[1]


def memory_summary(device: Device = None, abbreviated: bool = False) -> str:
    """The statistics as a table for people; with `abbreviated` without the two pools."""
    index = _get_device_index(device)
    stats = memory_stats(index)
    size, count = _C.format_bytes, str
    rows = [
        ("Allocated memory", "allocated_bytes", size),
        ("Requested memory", "requested_bytes", size),
        ("Reserved memory", "reserved_bytes", size),
        ("Unusable free memory", "inactive_split_bytes", size),
        ("Allocations", "allocation", count),
        ("Segments", "segment", count),
    ]
    pools = [("all", "")] if abbreviated else [("all", ""), ("large_pool", "  large"), ("small_pool", "  small")]
    lines = [
        f"spiral:{index} {get_device_name(index)}: budget {size(get_memory_budget(index))}, "
        f"out of memory {stats['num_ooms']}, retries {stats['num_alloc_retries']}",
        f"{'':24}{'now':>14}{'peak':>14}{'ever':>14}{'freed':>14}",
    ]
    for title, name, text in rows:
        for pool, label in pools:
            values = [text(stats[f"{name}.{pool}.{column}"]) for column in ("current", "peak", "allocated", "freed")]
            lines.append(f"{label or title:24}" + "".join(f"{value:>14}" for value in values))
    return "\n".join(lines)
