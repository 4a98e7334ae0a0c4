"""Builds torch_spiral/_C: every .cpp under csrc, and what csrc/aten/generate.py writes for the installed torch."""

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # an older build of what is being built may not load

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler, include_paths, library_paths

ROOT = Path(__file__).resolve().parent
GENERATOR = ROOT / "csrc" / "aten" / "generate.py"
GENERATED = ROOT / "build" / "generated"

if sys.platform == "win32":
    FLAGS = ["/std:c++17", "/O2", "/EHsc"]
else:
    FLAGS = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall"]
if platform.machine().lower() in ("x86_64", "amd64"):
    # Part of the layout of ATen's DispatchStub, which we call and not only register with.
    FLAGS += ["-DHAVE_AVX2_CPU_DEFINITION", "-DHAVE_AVX512_CPU_DEFINITION"]


def generate() -> None:
    """Runs the generator where its inputs changed. It rewrites only files whose text changed, so that an incremental
    build compiles those alone."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(p for p in GENERATOR.parent.iterdir() if p.suffix in (".py", ".yaml", ".json")):
        digest.update(path.name.encode() + path.read_bytes())
    stamp = GENERATED / "stamp"
    if not stamp.exists() or stamp.read_text() != digest.hexdigest():
        GENERATED.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(GENERATOR), str(GENERATED)], check=True)
        stamp.write_text(digest.hexdigest())


def sources() -> list[str]:
    found = [*(ROOT / "csrc").rglob("*.cpp"), *GENERATED.glob("*.cpp")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def include_dirs() -> list[str]:
    dirs = [str(ROOT / "csrc"), str(GENERATED), *include_paths()]
    wgpu = importlib.util.find_spec("wgpu")
    if wgpu is not None and wgpu.origin is not None:
        dirs.append(str(Path(wgpu.origin).parent / "resources"))  # webgpu.h, wgpu.h
    return dirs


def standard_library() -> list[str]:
    """The shared libstdc++, where the compiler would link its static one. That copy's locale facets are not those of the copy
    that torch brings into the process, and formatting a number would crash."""
    if not sys.platform.startswith("linux"):
        return []

    def found(name: str) -> str:
        run = subprocess.run(
            [get_cxx_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    if os.path.isfile(found("libstdc++.so")) or not os.path.isfile(found("libstdc++.so.6")):
        return []
    return [found("libstdc++.so.6")]


class Build(BuildExtension):
    def run(self) -> None:
        if self.editable_mode:  # `pip install -e .` and `build_ext --inplace` share their object files
            self.build_temp = str(Path("build") / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
        generate()
        for extension in self.extensions:
            extension.sources = sources()
        super().run()


setup(
    ext_modules=[
        # torch_python is for compiled graphs alone, which take Python's tensors without the dispatcher.
        Extension(
            "torch_spiral._C",
            sources(),
            language="c++",
            include_dirs=include_dirs(),
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10", "torch_python"],
            extra_compile_args=FLAGS,
            extra_link_args=standard_library(),
        )
    ],
    cmdclass={"build_ext": Build},
)
