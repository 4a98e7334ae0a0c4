"""Mixed precision: torch.autocast("spiral") and torch.amp.GradScaler("spiral")."""

from __future__ import annotations

import torch


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What autocast may cast to."""
    return [torch.float16, torch.bfloat16]


class autocast(torch.amp.autocast_mode.autocast):
    """torch.autocast with device_type="spiral". dtype: None is torch.get_autocast_dtype("spiral"), at the start float16."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype | None = None, cache_enabled: bool = True):
        super().__init__("spiral", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)
