"""What a kernel is to the rest of torch_spiral: a Target it was built for, a Kernel that can be launched, and
dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


class Unsupported(RuntimeError):
    """The target cannot compute this (for example float64 arithmetic without the feature). The text says why."""


@dataclass(frozen=True)
class DType:
    """A storage dtype.

    size: bytes of one element. compute: dtype of arithmetic on it; for complex dtypes the dtype of each part.
    kind: "float", "int", "uint", "bool", "complex" or "bits".
    """

    name: str
    size: int
    compute: str
    kind: str

    @property
    def is_pair(self) -> bool:
        """Loads give ir.Complex, two nodes."""
        return self.kind == "complex" or self.name == "b128"


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("f32", 4, "f32", "float"),
        DType("f16", 2, "f32", "float"),
        DType("bf16", 2, "f32", "float"),
        DType("f64", 8, "f64", "float"),
        DType("f8e4m3fn", 1, "f32", "float"),
        DType("f8e5m2", 1, "f32", "float"),
        DType("f8e4m3fnuz", 1, "f32", "float"),
        DType("f8e5m2fnuz", 1, "f32", "float"),
        DType("f8e8m0fnu", 1, "f32", "float"),  # powers of two: scales
        DType("i8", 1, "i32", "int"),
        DType("i16", 2, "i32", "int"),
        DType("i32", 4, "i32", "int"),
        DType("i64", 8, "i64", "int"),
        DType("u8", 1, "i32", "uint"),
        DType("u16", 2, "i32", "uint"),
        DType("u32", 4, "u32", "uint"),
        DType("u64", 8, "u64", "uint"),
        DType("bool", 1, "bool", "bool"),
        DType("c32", 4, "f32", "complex"),
        DType("c64", 8, "f32", "complex"),
        DType("c128", 16, "f64", "complex"),
        DType("b128", 16, "u64", "bits"),  # c128 as bits, for copies
    )
}
COMPUTE = ("f32", "f64", "i32", "i64", "u32", "u64", "bool")
SCALARS = ("i32", "u32", "f32", "i64", "f64")
FLOAT8 = ("f8e4m3fn", "f8e5m2", "f8e4m3fnuz", "f8e5m2fnuz", "f8e8m0fnu")
NARROW_FLOATS = ("f16", "bf16", *FLOAT8)  # converted by the operations <dtype>_decode and <dtype>_encode

_BITS = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "b128"}


def compute_dtype(dtype: str) -> str:
    """The dtype of arithmetic on `dtype`: compute_dtype("bf16") == "f32"."""
    return DTYPES[dtype].compute


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return DTYPES[dtype].size


def bits_dtype(dtype: str) -> str:
    """The unsigned dtype of the same size. A kernel that only moves elements declares its buffers with it, so that
    NaN payloads survive and no arithmetic feature is needed: bits_dtype("f64") == "u64"."""
    return _BITS[DTYPES[dtype].size]


@dataclass(frozen=True)
class Kernel:
    """A kernel's source and what a launch must know. Equal names mean equal source.

    The parameter block is laid out as docs/interfaces.md section 2 says. The error buffer, where `errors`, is bound
    after the buffers; it has no offset in the block and no entry in `windows` and `dtypes`.
    """

    name: str  # its key: op, dtypes, layout class, schedule
    source: str
    entry: str
    language: str  # "opencl" | "wgsl" | "triton"
    windows: tuple[int, ...]  # per buffer: bindings it takes (1 but for huge WGSL buffers)
    scalars: tuple[str, ...]  # in launch order
    workgroup: tuple[int, int, int]
    errors: bool = False
    trusted: bool = False  # WGSL: indices are proven in range
    immediate: bool = True  # WGSL: the block fits var<immediate>
    dtypes: tuple[str, ...] = ()  # per buffer: storage dtype

    @property
    def params_size(self) -> int:
        """Bytes of the parameter block."""
        wide = sum(s in ("i64", "f64") for s in self.scalars)
        narrow = len(self.scalars) - wide
        if self.language == "wgsl":
            return 4 * len(self.dtypes) + 8 * wide + 4 * narrow
        if self.language == "triton":  # the error buffer is a pointer like the others
            return (8 * (len(self.dtypes) + self.errors) + 8 * wide + 4 * narrow + 7) // 8 * 8
        return (8 * len(self.dtypes) + 8 * wide + 4 * narrow + 7) // 8 * 8


@dataclass(frozen=True)
class Target:
    """What kernels are built for. Sizes in bytes, workgroup sizes in invocations."""

    language: str = "opencl"  # "opencl" | "wgsl" | "triton"
    schedule_class: str = "vector"  # "vector" | "simt" | "block"
    engine: str = "opencl"
    float16: bool = False  # arithmetic; storage always works
    float64: bool = False
    int64: bool = True  # native arithmetic; emulated where missing
    int64_atomics: bool = False
    float32_atomics: bool = False
    subgroup: int = 0  # 0, or the smallest subgroup size that the device uses
    max_workgroup_size: int = 256
    max_workgroup_memory: int = 16384
    max_workgroups: int = 65535  # per dimension
    max_params: int = 128  # bytes of an immediate parameter block
    max_binding: int = 128 << 20
    compute_units: int = 1
    vendor: str = ""
    capability: int = 0  # CUDA: of sm_90, 90

    @property
    def software(self) -> bool:
        """Whether a `simt` device is a CPU (lavapipe): wide kernels compile slowly there, and memory keeps up with one load at a
        time."""
        return self.compute_units <= 4 or self.vendor.lower() in ("mesa", "llvmpipe")

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before those ahead of it have ended, and waits for them by itself (CUDA's programmatic dependent
        launch, compute capability 9.0 and later)."""
        return self.engine == "cuda" and self.capability >= 90

    @staticmethod
    def of(device_index: int | None = None) -> Target:
        """The Target of a spiral device (the current one for None)."""
        from torch_spiral import _C

        if device_index is None:
            device_index = _C.current_device()
        return _target(device_index)


@cache
def _target(device_index: int) -> Target:
    from torch_spiral import _C

    p: Any = _C.device_properties(device_index)
    return target_from_properties(p)


def target_from_properties(p: Any) -> Target:
    """A Target from spiral::DeviceProperties, given as a mapping or an object with the same field names."""

    def get(name: str) -> Any:
        return p[name] if isinstance(p, dict) else getattr(p, name)

    def capped(name: str) -> int:
        return min(int(get(name)), 1 << 62)

    low, high = int(get("subgroup_min")), int(get("subgroup_max"))
    return Target(
        language=str(get("language")).lower().rsplit(".", 1)[-1],
        schedule_class=str(get("schedule_class")).lower().rsplit(".", 1)[-1],
        engine=get("engine"),
        float16=bool(get("float16")),
        float64=bool(get("float64")),
        int64=bool(get("int64")),
        int64_atomics=bool(get("int64_atomics")),
        float32_atomics=bool(get("float32_atomics")),
        subgroup=low if high else 0,
        max_workgroup_size=capped("max_workgroup_size"),
        max_workgroup_memory=capped("max_workgroup_memory"),
        max_workgroups=capped("max_workgroups"),
        max_params=capped("max_params"),
        max_binding=capped("max_binding"),
        compute_units=capped("compute_units"),
        vendor=get("vendor"),
        capability=int(get("api_version").removeprefix("sm_")) if get("engine") == "cuda" else 0,
    )
