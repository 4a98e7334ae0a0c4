"""OpenCL against wgpu on the same inputs: a part of op_db; `python -m torch_spiral.testing differential` runs all of it."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch

from torch_spiral.testing import checks, devices, differential

ENGINES = devices.engines()
ITEMS = {name: item for name, item in checks.items().items() if item.kind == "op" and torch.float32 in item.dtypes}
PART = [name for name in ITEMS if zlib.crc32(name.encode()) % 60 == 0]

pytestmark = pytest.mark.skipif(len(ENGINES) < 2, reason="needs two engines")


@pytest.mark.parametrize("name", PART)
def test_engines_agree(name: str) -> None:
    first = next(iter(ENGINES.values()))
    if not differential.check(ITEMS[name], torch.float32, first, 2):
        pytest.skip("no sample that an engine runs")


def test_a_difference_is_found() -> None:
    item = ITEMS["add"]

    class Wrong:
        def __getattr__(self, name):
            return getattr(item.info, name)

        def __call__(self, x, *args, **kwargs):
            result = item.info(x, *args, **kwargs)
            return result + 1e-3 if x.device == list(ENGINES.values())[1] else result

    with pytest.raises(checks.Mismatch):
        differential.check(replace(item, info=Wrong()), torch.float32, next(iter(ENGINES.values())), 2)
