"""What Dynamo and Inductor ask about the device, and its registration with both."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import torch

from .. import _C
from .. import device as spiral
from . import compat, dynamo

Properties = namedtuple("Properties", ["multi_processor_count", "name", "max_threads_per_multi_processor", "warp_size"])


class Interface(compat.DeviceInterface):
    """torch.spiral as Dynamo sees devices."""

    device = spiral.device
    Event = spiral.Event
    Stream = spiral.Stream
    current_device = staticmethod(spiral.current_device)
    set_device = staticmethod(spiral.set_device)
    device_count = staticmethod(spiral.device_count)
    is_available = staticmethod(spiral.is_available)
    synchronize = staticmethod(spiral.synchronize)
    current_stream = staticmethod(spiral.current_stream)
    set_stream = staticmethod(spiral.set_stream)
    stream = staticmethod(spiral.stream)
    memory_allocated = staticmethod(spiral.memory_allocated)

    class Worker:
        @staticmethod
        def set_device(device: int) -> None:
            spiral.set_device(device)

        @staticmethod
        def current_device() -> int:
            return spiral.current_device()

        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            from ..kernels.kernel import Target

            t = Target.of(spiral._get_device_index(device, optional=True) if device is not None else None)
            # Inductor asks into how many pieces to cut a reduction only where there are fewer than 64 results a unit; a core wants more.
            units = t.compute_units * (64 if t.schedule_class == "vector" else 1)
            return Properties(units, t.engine, 1024, max(t.subgroup, 1))

    get_device_properties = staticmethod(Worker.get_device_properties)

    @staticmethod
    def exchange_device(device: int) -> int:
        before = spiral.current_device()
        spiral.set_device(device)
        return before

    @staticmethod
    def maybe_exchange_device(device: int) -> int:
        return Interface.exchange_device(device) if device >= 0 else -1

    @staticmethod
    def get_raw_stream(device_idx: int) -> int:
        return 0

    @staticmethod
    def get_compute_capability(device: Any = None) -> str:
        from ..kernels.kernel import Target

        return repr(Target.of(None))

    @staticmethod
    def is_bf16_supported(including_emulation: bool = False) -> bool:
        return True

    @classmethod
    def is_dtype_supported(cls, dtype: torch.dtype, including_emulation: bool = False) -> bool:
        return True

    @staticmethod
    def is_triton_capable(device: Any = None) -> bool:
        return False


class Overrides(compat.DeviceOpOverrides):
    """Text that the wrapper needs for a device."""

    def import_get_raw_stream_as(self, name: str) -> str:
        return f"{name} = lambda index: 0"

    def set_device(self, device_idx: int) -> str:
        return f"torch.spiral.set_device({device_idx})"

    def synchronize(self) -> str:
        return "torch.spiral.synchronize()"

    def device_guard(self, device_idx: int) -> str:
        return f"torch.spiral.device({device_idx})"


# What modes of torch.compile ask of CUDA devices. A plan is replayed without CUDA graphs; templates are Triton's, and the decomposition
# of small products that coordinate descent brings is meant for its kernels.
SETTINGS = {
    "triton.cudagraphs": False,
    "max_autotune": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
}


@functools.cache
def register() -> None:
    """Makes Dynamo and Inductor know the device; once."""
    from . import CONFIG, passes
    from .codegen import Scheduling, pieces
    from .ops import OPERATORS
    from .wrapper import Wrapper

    for name in ["spiral", *(f"spiral:{i}" for i in range(spiral.device_count()))]:
        compat.register_interface_for_device(name, Interface)
    compat.register_overrides("spiral", Overrides())
    compat.register_backend_for_device("spiral", Scheduling, Wrapper, device_custom_pass=passes.Passes())
    compat.compile_with(CONFIG, SETTINGS)
    compat.compile_as_for_gpus()
    compat.split_reductions(pieces, passes.reads_again)
    compat.align_loops()
    compat.mend_modules()
    compat.store_marked()
    dynamo.call_directly(_C.GraphCall)
    compat.save_random_results()
    compat.keep_operators([*OPERATORS, "_assert_async"])
    compat.lay_out_fake_convolutions()
    compat.read_convolutions_by_channels(lambda gm: passes.reads_by_channels(gm))


__all__ = ["Interface", "Overrides", "register"]
