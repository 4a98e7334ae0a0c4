"""Operators that ran on the CPU because the device has no kernel for them."""

from __future__ import annotations

from torch_spiral import _C


def fallbacks() -> dict[str, int]:
    """How often each operator ("aten::name.overload") ran on the CPU since the start or reset_fallbacks(), first used
    first."""
    return dict(_C.fallbacks())


def reset_fallbacks() -> None:
    """Forgets the counts; each operator is warned about once again."""
    _C.reset_fallbacks()


def host_ops() -> dict[str, tuple[int, int]]:
    """Declared host operators, which are no fallback ("_linalg_svd.U"): how often each ran, and the bytes that were copied
    for it in both directions."""
    return {name: (calls, bytes_) for name, calls, bytes_ in _C.host_ops()}


def fallback_mode() -> str:
    """ "warn" (once per operator), "error" (NotImplementedError) or "silent". SPIRAL_FALLBACK sets it at the start."""
    return _C.fallback_mode()


def set_fallback_mode(mode: str) -> None:
    """Sets fallback_mode() for the process. ValueError for another word."""
    _C.set_fallback_mode(mode)
