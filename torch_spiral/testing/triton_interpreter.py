"""Runs Triton kernels on the CPU, by Triton's interpreter, to test what they compute. Import before anything imports triton."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
import triton.language as tl
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

_generic_reduce = interpreter.ReduceOps.generic_reduce


def _halves(self: Any, values: Any) -> Any:
    """Reductions by functions of ours: halves are combined as a GPU does, where the interpreter goes element by element."""
    if self.axis is None:
        return _generic_reduce(self, values)
    arrays = [numpy.moveaxis(v.handle.data, self.axis, 0) for v in values]
    while len(arrays[0]) > 1:
        half = len(arrays[0]) // 2
        parts = [
            self.to_tensor(a, v.dtype)
            for side in (slice(0, half), slice(half, None))
            for a, v in zip((a[side] for a in arrays), values, strict=True)
        ]
        combined = self.combine_fn.fn(*parts)
        arrays = [c.handle.data for c in (combined if isinstance(combined, tuple) else (combined,))]
    return [
        self.to_tensor(numpy.expand_dims(a[0], self.axis) if self.keep_dims else a[0], v.dtype)
        for a, v in zip(arrays, values, strict=True)
    ]


interpreter.ReduceOps.generic_reduce = _halves

_splat = interpreter.InterpreterBuilder.create_splat


def _splat_of_bool(self: Any, kind: Any, x: Any) -> Any:
    """The interpreter gives the result of a comparison the dtype of what was compared, and makes a scalar one a number where it is spread."""
    if x.data.dtype == bool:
        return interpreter.TensorHandle(numpy.full(kind.shape, x.data), x.dtype.scalar)
    return _splat(self, kind, x)


interpreter.InterpreterBuilder.create_splat = _splat_of_bool

_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_of_bfloat16(self: Any, x: Any, dtype: Any) -> Any:
    """The interpreter keeps bfloat16 as integers, which it takes for the numbers in casts from and to integers."""
    kinds = {x.dtype.scalar, dtype.scalar}
    if tl.bfloat16 in kinds and not all(kind.is_floating() for kind in kinds):
        between = dtype.with_element_ty(tl.float32) if dtype.is_block() else tl.float32
        x = _cast(self, x, between)
    return _cast(self, x, dtype)


interpreter.InterpreterBuilder.cast_impl = _cast_of_bfloat16

_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bfloat16(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as integers and multiplies those."""

    def real(x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    return _dot(self, real(a), real(b), d, *rest)


interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16


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
