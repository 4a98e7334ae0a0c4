# ruff: noqa: E402  (torch before what extends it)
"""torch_spiral: a PyTorch device, `spiral`, for any GPU or CPU that has WebGPU, OpenCL, CUDA or HIP.

Importing it (PyTorch does, through torch_spiral_autoload) registers the device, `torch.spiral`, and the
methods and properties `tensor.spiral()`, `tensor.is_spiral`, `module.spiral()`. No device is looked for before the
first use.
"""

import atexit
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack

# Early: autograd's engine counts the devices of all backends when it first runs, and refuses one that comes later.
from . import _C

__version__ = "0.1.0"


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _opencl_library() -> str:
    """The system's OpenCL loader ("": C++ finds it), else the one that pyopencl carries."""
    if chosen := os.environ.get("SPIRAL_OPENCL_LIBRARY"):
        return chosen
    try:
        ctypes.CDLL({"win32": "OpenCL.dll", "darwin": "OpenCL.framework/OpenCL"}.get(sys.platform, "libOpenCL.so.1"))
        return ""
    except OSError:
        pass
    package = _package_folder("pyopencl")
    for folder in (package / ".libs", package.parent / "pyopencl.libs") if package else ():
        for path in sorted(folder.glob("libOpenCL*")):
            os.environ.setdefault("PYOPENCL_HOME", str(package))  # its patched loader reads it, and crashes without
            return str(path)
    return ""


def _wgpu_library() -> str:
    """wgpu-native, as the package wgpu carries it; "" where there is none."""
    if chosen := os.environ.get("SPIRAL_WGPU_LIBRARY") or os.environ.get("WGPU_LIB_PATH"):
        return chosen
    folder = _package_folder("wgpu")
    for path in sorted((folder / "resources").glob("*wgpu_native-release*")) if folder else ():
        if path.suffix in (".so", ".dylib", ".dll"):
            return str(path)
    return ""


def _dlpack() -> None:
    """Exports of the CUDA engine's tensors are those of the CUDA tensors that share their memory. Another engine's memory is
    opaque: exporting a data_ptr that nobody can read would hand out a fault."""
    originals = torch.Tensor.__dlpack__, torch.Tensor.__dlpack_device__, torch.utils.dlpack.to_dlpack

    def readable(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "spiral":
            return tensor
        if _C.device_properties(tensor.device.index)["language"] != "triton" or not torch.cuda.is_available():
            raise BufferError(
                "spiral tensors cannot be exported through DLPack: their memory is opaque. Use tensor.cpu()"
            )
        if tensor.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return torch.spiral.to_cuda(tensor)  # type: ignore[attr-defined]

    def exporting(original: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(original)
        def export(tensor, *args, **kwargs):
            return original(readable(tensor), *args, **kwargs)

        return export

    dlpack, device, to_dlpack = (exporting(f) for f in originals)
    torch.Tensor.__dlpack__, torch.Tensor.__dlpack_device__ = dlpack, device  # type: ignore[method-assign,assignment]
    torch.utils.dlpack.to_dlpack = torch.to_dlpack = to_dlpack


def _print_on_the_cpu() -> None:
    """Formatting a tensor takes a dozen operators on it; on a copy they cost no kernels, and every dtype has them.
    What is too large to copy for a look is summarised where it is."""
    original = torch._tensor_str._tensor_str

    @functools.wraps(original)
    def _tensor_str(self, indent):
        if self.device.type == "spiral" and self.numel() * self.element_size() <= 64 << 20:
            self = self.cpu()
        return original(self, indent)

    torch._tensor_str._tensor_str = _tensor_str


def _keep_parameters() -> None:
    """Lets a module that moves to or from spiral keep its Parameter objects, as on CUDA: tied weights stay tied and optimizers keep
    what they hold. Between devices that are not known to be alike, Module._apply makes new Parameters unless it may swap."""
    apply = torch.nn.Module._apply

    def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        if torch.__future__.get_swap_module_params_on_conversion():
            return apply(self, fn, recurse)
        here = {p.device.type for p in self.parameters(recurse)}
        try:
            there = fn(torch.empty(0)).device.type
        except Exception:  # whatever fn is, it is not a move
            there = ""
        if ("spiral" in here | {there}) and here | {there} != {"spiral"}:
            lazy = _take_uninitialized(self, recurse)
            ties: dict[int, list[tuple[torch.nn.Module, str]]] = {}
            for module in self.modules():
                for name, p in module._parameters.items():
                    ties.setdefault(id(p), []).append((module, name))
            torch.__future__.set_swap_module_params_on_conversion(True)
            try:
                return apply(self, fn, recurse)
            except RuntimeError as error:
                if "Couldn't swap" not in str(error):
                    raise
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
                for module, name, p in lazy:
                    like = fn(torch.empty(0, dtype=p.dtype))
                    torch.utils.swap_tensors(p, type(p)(p.requires_grad, like.device, like.dtype))
                    module._parameters[name] = p
            warnings.warn(
                "parameters of the module are in use by a live autograd graph, so the moved module gets new ones: "
                "make optimizers after the move",
                stacklevel=3,
            )
            apply(self, fn, recurse)
            for places in ties.values():
                for module, name in places[1:]:
                    module._parameters[name] = places[0][0]._parameters[places[0][1]]
            return self
        return apply(self, fn, recurse)

    torch.nn.Module._apply = _apply  # type: ignore[method-assign]


def _take_uninitialized(root: torch.nn.Module, recurse: bool) -> list[tuple[torch.nn.Module, str, Any]]:
    """Takes the parameters that wait for their shapes out of their modules: a tensor on another device loses that."""
    lazy = [
        (module, name, p)
        for module in (root.modules() if recurse else [root])
        for name, p in module._parameters.items()
        if p is not None and torch.nn.parameter.is_lazy(p)
    ]
    for module, name, _ in lazy:
        module._parameters[name] = None
    return lazy


def _data_parallel() -> None:
    """nn.DataParallel scatters by functions that a PyTorch without CUDA lacks. As on the CPU and MPS, it passes calls on to its module,
    which runs where it is."""
    module = sys.modules["torch.nn.parallel.data_parallel"]  # torch.nn.parallel has a function of that name
    original = module._get_available_device_type

    @functools.wraps(original)
    def _get_available_device_type() -> str | None:
        found = original()
        return None if found == "spiral" else found

    module._get_available_device_type = _get_available_device_type  # type: ignore[attr-defined]


def _compile() -> None:
    """The default backend of torch.compile asks for devices when a compilation is under way: it is told before the first one."""
    original = torch._TorchCompileInductorWrapper.__call__

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .compiler import device

        device.register()
        return original(self, *args, **kwargs)

    torch._TorchCompileInductorWrapper.__call__ = __call__  # type: ignore[method-assign]


def _register() -> None:
    _C.set_engine_library("opencl", _opencl_library())
    _C.set_engine_library("wgpu", _wgpu_library())
    if importlib.util.find_spec("triton") is None:
        _C.refuse_engine("cuda", "its kernels are compiled by Triton, which is not installed (pip install triton)")
    torch.utils.rename_privateuse1_backend("spiral")
    from . import device

    torch._register_device_module("spiral", device)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _keep_parameters()
    _data_parallel()
    _compile()
    _dlpack()
    _print_on_the_cpu()


@atexit.register
def _leave() -> None:
    """Lets queued work and autograd's threads come to rest, and holds daemon threads at their next operation: a thread that
    takes the GIL while the interpreter is finalised aborts the process."""
    if _C.in_bad_fork():
        return
    here = threading.current_thread()
    threads = [t for t in threading.enumerate() if t is not here and not isinstance(t, threading._DummyThread)]
    _C.hold_threads([t.ident for t in threads])
    try:
        _C.synchronize_all()
    except Exception as error:
        print(f"torch_spiral: an error was pending when the process ended: {error}", file=sys.stderr)
    time.sleep(0.001)


_register()

from . import lowering, ops  # they register operators
from .packing import pack

__all__ = ["_C", "__version__", "lowering", "ops", "pack"]


def __getattr__(name: str) -> Any:
    """torch_spiral.compiler, which imports Inductor, and torch_spiral.autotune come in with their first use."""
    if name in ("autotune", "compiler"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
