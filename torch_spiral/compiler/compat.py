# mypy: disable-error-code="arg-type,assignment,attr-defined,method-assign,misc"
"""Every private name of Inductor and Dynamo that the compiler uses, for each supported version of torch (2.11 to 2.13).

Importing this module imports Inductor (a second or two), so only what compiles does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.device_interface import DeviceInterface, get_interface_for_device, register_interface_for_device
from torch._inductor import config, metrics, scheduler, utils
from torch._inductor.codegen.common import (
    CSE,
    BackendFeature,
    CSEVariable,
    DeviceOpOverrides,
    OpOverrides,
    get_scheduling_for_device,
    register_backend_for_device,
    register_device_op_overrides,
)
from torch._inductor.codegen.simd import SIMDKernel, SIMDScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.ir import ComputedBuffer, ExternKernel, TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, make_fallback, register_lowering
from torch._inductor.ops_handler import OpsHandler
from torch._inductor.utils import get_kernel_metadata, sympy_index_symbol, sympy_subs
from torch._inductor.virtualized import OpsValue, V, ops
from torch.utils._ordered_set import OrderedSet
from torch.utils._sympy.functions import (
    CeilDiv,
    CleanDiv,
    FloorDiv,
    Identity,
    Max,
    Min,
    ModularIndexing,
    PythonMod,
    Where,
)
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils._sympy.value_ranges import ValueRanges

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def reorder_loops() -> None:
    """Has the scheduler choose loop orders for spiral as it does for GPUs. (Listed in GPU_TYPES the device would be asked for
    Triton in a dozen other places.)"""
    create = scheduler.Scheduler.create_backend

    def create_backend(self: object, device: torch.device) -> object:
        if device.type != "spiral":
            return create(self, device)
        V.graph.add_device_info(device)
        return get_scheduling_for_device("spiral")(self)

    scheduler.is_gpu = lambda device: device == "spiral" or utils.is_gpu(device)
    scheduler.Scheduler.create_backend = create_backend


def keep_operators(names: list[str]) -> None:
    """Has Inductor call these operators on spiral tensors instead of fusing them. names: without "special_"."""
    for op, lower in list(lowerings.items()):
        if isinstance(op, torch._ops.OpOverload) and op._schema.name.removeprefix("aten::").removeprefix("special_") in names:
            call = fallback_handler(op, add_to_fallback_set=False)

            def choose(*args: Any, lower: Any = lower, call: Any = call, **kwargs: Any) -> Any:
                ours = any(isinstance(a, TensorBox) and getattr(a.get_device(), "type", None) == "spiral" for a in args)
                return (call if ours else lower)(*args, **kwargs)

            lowerings[op] = choose


@contextlib.contextmanager
def fusion_reasons() -> Iterator[list[str]]:
    """Collects why the scheduler did not fuse, while the context lasts."""
    found: list[str] = []
    original = scheduler.WhyNoFuse.__call__

    def note(self: Any, reason: str, *args: Any) -> None:
        found.append(f"{self.name1} and {self.name2}: {reason % args if args else reason}")
        original(self, reason, *args)

    scheduler.WhyNoFuse.__call__ = note
    try:
        yield found
    finally:
        scheduler.WhyNoFuse.__call__ = original


def multiple_of(a: object, b: object) -> bool:
    """Whether b is known to divide a."""
    return V.graph.sizevars.statically_known_multiple_of(a, b)


def equal(a: object, b: object) -> bool:
    """Whether two sizes are known to be equal."""
    return V.graph.sizevars.statically_known_equals(a, b)


def hint(expr: object) -> int:
    """An example of a size's value."""
    sizes = V.graph.sizevars
    return (sizes.optimization_hint if hasattr(sizes, "optimization_hint") else sizes.size_hint)(expr, fallback=64)


def new_variable(kind: type, name: str, bounds: object, dtype: object, shape: object) -> object:
    """A CSEVariable."""
    return kind(name, bounds, dtype, shape)


__all__ = [
    "CSE",
    "VERSION",
    "BackendFeature",
    "CSEVariable",
    "CeilDiv",
    "CleanDiv",
    "ComputedBuffer",
    "DeviceInterface",
    "DeviceOpOverrides",
    "ExternKernel",
    "FloorDiv",
    "Identity",
    "Max",
    "Min",
    "ModularIndexing",
    "OpOverrides",
    "OpsHandler",
    "OpsValue",
    "OrderedSet",
    "PythonMod",
    "PythonWrapperCodegen",
    "SIMDKernel",
    "SIMDScheduling",
    "SymT",
    "TensorBox",
    "V",
    "ValueRanges",
    "Where",
    "config",
    "equal",
    "fusion_reasons",
    "get_interface_for_device",
    "get_kernel_metadata",
    "get_scheduling_for_device",
    "hint",
    "lookup_backend",
    "lowerings",
    "make_fallback",
    "metrics",
    "multiple_of",
    "new_variable",
    "ops",
    "register_backend_for_device",
    "register_device_op_overrides",
    "register_interface_for_device",
    "register_lowering",
    "reorder_loops",
    "symbol_is_type",
    "sympy_index_symbol",
    "sympy_subs",
]  # fmt: skip
