"""From a Triton kernel's source to a binary that the CUDA and HIP engine loads, cached on disk."""

from __future__ import annotations

import hashlib
import json
import linecache
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .kernel import Kernel, Unsupported
from .triton import signature

FORMAT = 3  # of what is cached


@dataclass(frozen=True)
class Binary:
    """image: the cubin or hsaco. shared: bytes of shared memory. threads: of a workgroup. scratch: bytes of global memory for
    each workgroup (its tensor descriptors). waits: for the kernels ahead of it, by itself (triton.opening)."""

    image: bytes
    entry: str
    shared: int
    threads: int
    scratch: int = 0
    waits: bool = False


def function(source: str, name: str) -> Any:
    """The JITFunction `main_` of a kernel's source. Triton reads a function's text again: it is found under `name`."""
    file = f"<spiral kernel {name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": "torch_spiral_kernel", "__file__": file}
    exec(compile(source, file, "exec"), namespace)
    return namespace["main_"]


def options(source: str) -> dict[str, int]:
    """num_warps, num_stages and, where they are limited, the registers (maxnreg), from the first line."""
    words = source[: source.index("\n")].replace(",", "").split()
    found = {"num_warps": int(words[2]), "num_stages": int(words[4])}
    return found | {"maxnreg": int(words[6])} if len(words) > 6 else found


def gpu_target(properties: Any) -> Any:
    """Triton's target for a device, from its properties (as in _C.device_properties)."""
    from triton.backends.compiler import GPUTarget

    engine, arch = properties["engine"], properties["api_version"]
    if engine == "cuda":
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    if arch:
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    import triton

    return triton.runtime.driver.active.get_current_target()


def compile_kernel(
    kernel: Kernel, target: Any, divisible: tuple[tuple[int, int], ...] = (), memory: int | None = None
) -> Binary:
    """The kernel's binary for a GPUTarget. divisible: (number of a parameter, what always divides it): addresses in bytes, and
    sizes and strides. memory: bytes of shared memory that a workgroup may have; loops take fewer stages where they need more."""
    import triton

    parts = [FORMAT, triton.__version__, str(target), kernel.source, signature(kernel), divisible, memory]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    found = _load(key)
    if found is None:
        given = options(kernel.source)
        found = _compile(kernel, target, divisible, given)
        while memory is not None and found.shared > memory:
            if given["num_stages"] == 1:
                raise RuntimeError(
                    f"{kernel.name} needs {found.shared} bytes of shared memory; the device has {memory}"
                )
            given["num_stages"] -= 1
            found = _compile(kernel, target, divisible, given)
        _store(key, found)
    return found


def _compile(kernel: Kernel, target: Any, divisible: tuple[tuple[int, int], ...], options: dict[str, int]) -> Binary:
    import triton
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", by]] for i, by in divisible}
    try:
        main = function(kernel.source, kernel.name)
        types = dict(zip(main.arg_names, signature(kernel), strict=True))
        compiled = triton.compile(ASTSource(main, types, {}, attributes), target=target, options=options)
    except Exception as error:
        path = _keep_failed(kernel)
        raise RuntimeError(f"kernel {kernel.name} does not compile: {error}\nSource: {path}") from error
    metadata = compiled.metadata
    if getattr(metadata, "profile_scratch_size", 0) or metadata.num_ctas != 1:
        raise Unsupported(f"{kernel.name} needs memory for a profile, or clusters")
    image = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    scratch = getattr(metadata, "global_scratch_size", 0)  # AMD's has none
    waits = "griddepcontrol.wait" in compiled.asm.get("ptx", "")
    return Binary(image, metadata.name, metadata.shared, metadata.num_warps * target.warp_size, scratch, waits)


def _keep_failed(kernel: Kernel) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="spiral_", suffix=".py", delete=False) as file:
        file.write(kernel.source)
    return file.name


# ---- on disk: a line of JSON with the SHA-256 of the rest, then the image -----------------------------------------------


@cache
def _folder() -> Path | None:
    if os.environ.get("SPIRAL_CACHE") == "0":
        return None
    base = os.environ.get("SPIRAL_CACHE_DIR")
    if base is None:
        home = os.environ.get("LOCALAPPDATA") if os.name == "nt" else str(Path.home() / ".cache")
        base = str(Path(home or tempfile.gettempdir()) / "torch_spiral")
    folder = Path(base) / "triton"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    status = folder.stat()
    if os.name != "nt" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return None
    return folder


def _load(key: str) -> Binary | None:
    folder = _folder()
    try:
        data = (folder / key).read_bytes() if folder else b""
        head, _, image = data.partition(b"\n")
        entry = json.loads(head) if head else {}
    except (OSError, ValueError):
        return None
    if entry.get("key") != key or entry.get("sha256") != hashlib.sha256(image).hexdigest():
        return None
    return Binary(image, entry["entry"], entry["shared"], entry["threads"], entry["scratch"], entry["waits"])


def _store(key: str, binary: Binary) -> None:
    folder = _folder()
    if folder is None:
        return
    head = {
        "key": key, "sha256": hashlib.sha256(binary.image).hexdigest(), "entry": binary.entry, "shared": binary.shared,
        "threads": binary.threads, "scratch": binary.scratch, "waits": binary.waits,
    }  # fmt: skip
    try:
        descriptor, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + binary.image)
        os.replace(name, folder / key)
    except OSError:
        pass
