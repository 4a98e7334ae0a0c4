"""Which devices a test or benchmark runs on, by engine."""

from __future__ import annotations

import torch


def engines() -> dict[str, torch.device]:
    """The first spiral device of each engine found: {"opencl": device("spiral:0"), ...}; empty without spiral."""
    if not spiral_available():
        return {}
    found: dict[str, torch.device] = {}
    for index in range(torch.spiral.device_count()):  # type: ignore[attr-defined]
        engine = torch.spiral.get_device_properties(index).engine  # type: ignore[attr-defined]
        found.setdefault(engine, torch.device("spiral", index))
    return found


def spiral_available() -> bool:
    """True when torch_spiral is built and found a device."""
    try:
        import torch_spiral  # noqa: F401
    except ImportError:
        return False
    module = getattr(torch, "spiral", None)
    return module is not None and module.is_available()


def resolve(device: str, engine: str | None = None) -> torch.device:
    """The device of a command line: "cpu", "cuda", "spiral", "spiral:1"; with engine, that engine's first device.

    Raises RuntimeError where it does not exist.
    """
    kind = torch.device(device) if device.split(":")[0] != "spiral" else None
    if kind is not None:
        if engine:
            raise RuntimeError(f"--engine {engine} is for spiral devices, not {device}")
        return kind
    if not spiral_available():
        raise RuntimeError("no spiral device here: `python -m torch_spiral` says what is missing")
    if engine:
        found = engines()
        if engine not in found:
            raise RuntimeError(f"no {engine} device here, only {sorted(found)}: `python -m torch_spiral` says why")
        return found[engine]
    return torch.device(device)


def synchronize(device: torch.device | str) -> None:
    """Waits for a device; returns at once for the CPU and meta."""
    device = torch.device(device)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)


def describe(device: torch.device | str) -> str:
    """One line that names a device and its engine."""
    device = torch.device(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    if device.type == "meta":
        return "meta"
    properties = torch.get_device_module(device).get_device_properties(device)
    engine = getattr(properties, "engine", device.type)
    return f"{device} ({engine}: {properties.name})"


def fallbacks() -> int:
    """Calls that ran on the CPU for want of a kernel, so far."""
    module = getattr(torch, "spiral", None)
    return sum(module.fallbacks().values()) if module is not None else 0


def compare_with_cpu() -> None:
    """Turns off tf32 in convolutions, which is on by default and which Triton's follow: the CPU's have all digits.

    Before upstream's test helpers are imported, as they freeze such flags.
    """
    if torch.backends.cudnn.allow_tf32:
        torch.backends.cudnn.allow_tf32 = False
