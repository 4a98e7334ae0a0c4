"""A spiral device of the CUDA or HIP engine without a GPU: the engine's own C++ code, plans and block kernels, on a driver that runs
kernels by Triton's interpreter (stand_in_driver.c). Import first in a process of its own; `driver` has what tests ask of it."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import struct
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ENGINE = os.environ.get("SPIRAL_ENGINE", "cuda")
FLAGS = "SPIRAL_STAND_IN_FLAGS"  # for the driver's compiler: -DNO_EDGE_DATA is a driver older than CUDA 12.3
os.environ |= {"TRITON_INTERPRET": "1", "SPIRAL_ENGINE": ENGINE, "SPIRAL_CACHE": "0", "SPIRAL_FALLBACK": "error"}


def _load() -> ctypes.CDLL:
    """Built under the driver's own name: whoever asks for that library afterwards gets this one."""
    name, flags = (
        ("libamdhip64.so.7", ["-DHIP"]) if ENGINE == "hip" else ("libcuda.so.1", os.environ.get(FLAGS, "").split())
    )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / name
        source = Path(__file__).with_name("stand_in_driver.c")
        command = ["cc", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}", *flags, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


driver = _load()
driver.stand_in_count.restype = ctypes.c_long
driver.stand_in_memory.argtypes = [ctypes.c_size_t]

import torch  # noqa: E402
from torch._C._dynamo.eval_frame import set_eval_frame  # noqa: E402

from torch_spiral.kernels import kernel as kernels  # noqa: E402
from torch_spiral.kernels import triton_binary  # noqa: E402
from torch_spiral.kernels.kernel import Kernel  # noqa: E402
from torch_spiral.kernels.triton import signature  # noqa: E402
from torch_spiral.testing.triton_interpreter import TARGET, interpreter  # noqa: E402

DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64, "i8": torch.int8, "i16": torch.int16,
    "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
}  # fmt: skip
CODES = {"i32": "i", "u32": "I", "fp32": "f", "i64": "q", "fp64": "d"}


class Address:
    """A pointer, as the interpreter takes tensors."""

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


# Products of float32 are exact, whatever they are made of on a GPU.
precisions = interpreter.interpreter_builder.options.allowed_dot_input_precisions
object.__setattr__(
    interpreter.interpreter_builder.options, "allowed_dot_input_precisions", (*precisions, "bf16x3", "bf16x6")
)
# Addresses are the host's already.
interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
interpreter.GridExecutor._restore_args_dev = lambda self, *args: None

compiled: list[Kernel] = []
failures: list[str] = []  # what kernels raised
SCRATCH = 1 << 16  # bytes a workgroup of kernels named for it
scratches: list[int] = []  # addresses of what their launches had


@cache
def _function(index: int) -> tuple[Any, struct.Struct, list[torch.dtype | None]]:
    k = compiled[index]
    types = signature(k)
    layout = struct.Struct("<" + "".join("Q" if t.startswith("*") else CODES[t] for t in types))
    pointees = [DTYPES[t[1:]] if t.startswith("*") else None for t in types]
    return triton_binary.function(k.source, k.name), layout, pointees


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p)
def _run(index: int, grid: Any, params: int) -> int:
    compiling = set_eval_frame(None)  # Dynamo is not to follow us
    try:
        function, layout, pointees = _function(index)
        values = layout.unpack(ctypes.string_at(params, layout.size))
        if "scratch" in compiled[index].name:
            scratches.append(struct.unpack("Q", ctypes.string_at(params + (layout.size + 7) // 8 * 8, 8))[0])
        args = [v if dtype is None else Address(v, dtype) for v, dtype in zip(values, pointees, strict=True)]
        function[tuple(grid[:3])](*args)
        return 0
    except BaseException:
        failures.append(f"{compiled[index].name}: {traceback.format_exc()}")
        print(failures[-1], file=sys.stderr)
        return 700  # an illegal address
    finally:
        set_eval_frame(compiling)


driver.stand_in_run(_run)


def _compile(kernel: Kernel, *_: Any) -> triton_binary.Binary:
    number = len(compiled)
    compiled.append(kernel)
    waits = "heedless" not in kernel.name
    if waits:
        driver.stand_in_waits(number)
    warps = triton_binary.options(kernel.source)["num_warps"]
    scratch = SCRATCH if "scratch" in kernel.name else 0
    return triton_binary.Binary(b"%d\0" % number, kernel.entry, 0, 32 * warps, scratch, waits)


triton_binary.compile_kernel = _compile
triton_binary.gpu_target = lambda properties: None
_of = kernels.target_from_properties


def _target(p: Any) -> Any:
    t = _of(p)
    return dataclasses.replace(t, engine=TARGET.engine) if t.language == "triton" else t


kernels.target_from_properties = _target


def count(what: str) -> int:
    """ "launches", "memory" (bytes), "graphs made", "graphs alive", "nodes alive", "graph launches", "early edges", "mistakes"."""
    return driver.stand_in_count(what.encode())


def fail(function: str, code: int, after: int = 0) -> None:
    """Lets a function of the driver return an error, once."""
    driver.stand_in_fail(function.encode(), code, after)
