"""Runs Triton kernels on the CPU, by Triton's interpreter, to test what they compute. Import before anything imports triton."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
from triton.runtime import interpreter

from torch_spiral.kernels.kernel import DTYPES, FLOAT8, Kernel, Target
from torch_spiral.kernels.triton_binary import function

# What a GPU would have, but for its function library, which the interpreter lacks: functions.py takes its place.
TARGET = Target(
    language="triton", schedule_class="block", engine="interpreter", float16=True, float64=True, int64=True, int64_atomics=True,
    float32_atomics=True, max_workgroup_size=1024, max_workgroup_memory=227 << 10, max_workgroups=2**31 - 1, max_params=4080,
    max_binding=1 << 40, compute_units=132, vendor="NVIDIA",
)  # fmt: skip

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patched(tensor: Any, *args: Any) -> Any:
    """NumPy 2.5 no longer makes an int of an array of one element, which is what the interpreter's scalars are."""
    result = _patch_lang_tensor(tensor, *args)
    tensor.__index__ = lambda self: int(numpy.asarray(self.handle.data).reshape(-1)[0])
    return result


interpreter._patch_lang_tensor = _patched


def run(kernel: Kernel, buffers: Sequence[torch.Tensor], scalars: Sequence[Any], groups: Sequence[int],
        errors: torch.Tensor | None = None) -> None:  # fmt: skip
    """Launches a kernel on CPU tensors: buffers as torch tensors (views count from their first element), scalars in the
    order of kernel.scalars. errors: the two words of the error buffer, int32."""
    assert len(buffers) == len(kernel.dtypes) and len(scalars) == len(kernel.scalars)
    reals = []
    for x, dtype in zip(buffers, kernel.dtypes, strict=True):
        if DTYPES[dtype].kind == "complex":
            x = torch.view_as_real(x)
        reals.append(x.view(torch.uint8) if x.dtype == torch.bool or dtype in FLOAT8 else x)
    if kernel.errors:
        assert errors is not None
        reals.append(errors.view(torch.uint32))
    wide = [v for t, v in zip(kernel.scalars, scalars, strict=True) if t in ("i64", "f64")]
    narrow = [v for t, v in zip(kernel.scalars, scalars, strict=True) if t not in ("i64", "f64")]
    grid = (*groups, 1, 1)[:3]
    function(kernel.source, kernel.name)[grid](*reals, *wide, *narrow)
