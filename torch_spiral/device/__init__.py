"""torch.spiral: devices, streams, events, memory, random numbers and mixed precision, named as in torch.cuda.

Arguments called `device` are a torch.device, a string ("spiral", "spiral:1"), an index, or None for the current
device; RuntimeError for a device that does not exist, ValueError for one of another type.
"""

from . import amp, memory, profiler, random
from ._devices import (
    DeviceProperties,
    _get_device_index,
    _is_in_bad_fork,
    _lazy_init,
    current_device,
    device,
    device_count,
    device_of,
    engines,
    get_device_capability,
    get_device_name,
    get_device_properties,
    init,
    is_available,
    is_bf16_supported,
    is_initialized,
    set_device,
    synchronize,
)
from ._fallback import fallback_mode, fallbacks, host_ops, reset_fallbacks, set_fallback_mode
from .amp import get_amp_supported_dtype
from .exchange import from_cuda, to_cuda, wait_for_cuda
from .memory import (
    empty_cache,
    get_memory_budget,
    get_per_process_memory_fraction,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    memory_summary,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
    set_memory_budget,
    set_per_process_memory_fraction,
)
from .random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from .streams import Event, Stream, current_stream, default_stream, set_stream, stream
from .telemetry import Telemetry, telemetry


def __getattr__(name: str) -> object:
    if name == "default_generators":  # one torch.Generator per device; asking for them looks for devices
        return random.default_generators()
    if name == "_initialized":  # torch.utils.checkpoint keeps the random state of devices that have been used
        return is_initialized()
    if name in ("Scheduling", "PythonWrapperCodegen"):  # Inductor asks for them when it first meets the device
        from ..compiler import device as compiler
        from ..compiler import inductor_classes

        compiler.register()
        return inductor_classes()[name]
    raise AttributeError(f"module 'torch.spiral' has no attribute {name!r}")


__all__ = [
    "DeviceProperties",
    "Event",
    "Stream",
    "Telemetry",
    "_get_device_index",
    "_is_in_bad_fork",
    "_lazy_init",
    "amp",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "device_of",
    "empty_cache",
    "engines",
    "fallback_mode",
    "fallbacks",
    "from_cuda",
    "get_amp_supported_dtype",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_memory_budget",
    "get_per_process_memory_fraction",
    "get_rng_state",
    "get_rng_state_all",
    "host_ops",
    "init",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "profiler",
    "random",
    "reset_accumulated_memory_stats",
    "reset_fallbacks",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "set_device",
    "set_fallback_mode",
    "set_memory_budget",
    "set_per_process_memory_fraction",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
    "telemetry",
    "to_cuda",
    "wait_for_cuda",
]
