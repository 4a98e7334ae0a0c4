"""Generates the registrations of ATen's operators for PrivateUse1 from the torchgen data of the installed torch.

    generate.py DIR          write the C++ files into DIR (setup.py does this before compiling)
    generate.py --docs DIR   write registrations.md and remaining_ops.txt into DIR

Every dense operator that a backend must supply falls into one of three kinds:

native      CPU and CUDA share one function of at::native. It is device-generic, so it is registered for PrivateUse1 as it
            is. Most of them end in a DispatchStub, whose PrivateUse1 pointer is set too.
structured  CPU and CUDA share the meta function only. A class derived from it is generated whose body runs a lowering.
remaining   nothing is shared. A lowering in Python registers the overload.

A file is rewritten only where its content changes, so that an incremental build stays incremental.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torchgen
from torchgen.gen import get_grouped_native_functions, parse_native_yaml
from torchgen.model import BackendIndex, DispatchKey, NativeFunction, NativeFunctionsGroup

# Natives that CPU and CUDA share and that are nevertheless not registered: overload -> reason.
RUNTIME = "defined by the runtime"
HOST = "reads or writes data_ptr on the host"
SKIP = {
    "as_strided": RUNTIME,
    "view": RUNTIME,
    "_reshape_alias": RUNTIME,
    "unfold": RUNTIME,
    "set_.source_Storage": RUNTIME,
    "set_.source_Tensor": RUNTIME,
}

# Overloads that belong to other libraries or other kinds of tensors: no lowering is wanted.
FOREIGN = re.compile(
    r"_?(cudnn|miopen|mkldnn|cslt|triton|test|philox|nested|use_cudnn|use_miopen|sparse_semi|to_sparse|convert_weight)_|"
    r"quantize_per|_empty_(per|affine)|_make_per|_dyn_quant|_weight_int4pack|_mixed_dtypes|_foobar|from_file|to_mkldnn|"
    r"_scaled_(grouped_)?mm_v2|_validate_compressed|_flash_attention|_efficient_attention|_cudnn|_spdiags|_make_dep_token|"
    r"_fill_mem_eff|_scaled_dot_product_(flash|efficient|cudnn)|_use_|_convert_indices|record_stream|_nested|fbgemm|_cslt"
)

# Composite operators that raise unless a backend defines them.
OVERRIDEABLE = re.compile(r".*_overrideable$")

# Families of the remaining operators, for people who pick one: first match wins.
FAMILIES = [
    ("runtime (defined by csrc)", r"empty\.|empty_strided|resize_|set_|as_strided|_reshape_alias|view|unfold$|_local_scalar_dense|_assert_async|_functional_assert|equal$|"
     r"_efficientzerotensor|_fused_sdp_choice"),
    ("foreach", r"_foreach_"),
    ("optimizer", r"_fused_(adam|sgd|adagrad)"),
    ("amp and fake quantization", r"_amp_|_fused_moving"),
    ("attention", r"_scaled_dot|_native_multi_head|_transformer|_triton_multi|_transform_bias|_masked_softmax|_jagged|_padded"),
    ("rnn", r"_thnn_"),
    ("convolution", r".*conv|col2im|im2col"),
    ("batch, layer, group, rms norm", r".*(batch_norm|layer_norm|group_norm|rms_norm|weight_norm)|_?native_batch|.*_norm_interface"),
    ("embedding", r"_?embedding"),
    ("loss", r".*(_loss|cross_entropy|margin)"),
    ("activation", r".*(glu|log_sigmoid|rrelu|add_relu|prelu)"),
    ("pooling", r".*(pool)"),
    ("padding", r".*_pad\dd"),
    ("sampling grids and upsampling", r".*(grid_|upsample)"),
    ("random", r".*(dropout|_standard_gamma|dirichlet|poisson|binomial|randperm|multinomial|_masked_scale|_sample)"),
    ("factories", r"arange|eye|linspace|logspace|range|tri[lu]_indices|complex|randperm|vander"),
    ("fft", r"_fft_"),
    ("matmul", r".*(mm$|mm\.|_mm|dot|addr|matmul|vdot)"),
    ("linear algebra", r".*(cholesky|linalg|lu_|triangular|geqrf|ormqr|_lstsq)"),
    ("indexing and masking", r".*(index|mask|nonzero|take|put_|gather|scatter|narrow_copy|split_with|repeat|roll|flip|_chunk_cat|_stack|pixel_|.*shuffle|unique|where|tril|triu)"),
    ("sorting, searching, histograms", r".*(sort|topk|kthvalue|median|mode|bucketize|searchsorted|hist|bincount|unique|isin)"),
    ("scans", r".*(cum)"),
    ("reductions and distances", r".*(trace|count_nonzero|var|std|norm|dist|sum|min|max|all|any)"),
]


@dataclass(frozen=True)
class Yaml:
    """native_functions.yaml of the installed torch."""

    functions: list[NativeFunction]
    indices: dict[DispatchKey, BackendIndex]

    @staticmethod
    def load() -> Yaml:
        folder = os.path.join(os.path.dirname(torchgen.__file__), "packaged/ATen/native")
        parsed = parse_native_yaml(f"{folder}/native_functions.yaml", f"{folder}/tags.yaml")
        return Yaml(parsed.native_functions, parsed.backend_indices)

    def kernel(self, key: DispatchKey, f: NativeFunction) -> str | None:
        found = self.indices[key].get_kernel(f)
        return found.kernel if found else None

    def is_native(self, f: NativeFunction) -> bool:
        """Whether CPU and CUDA use one function for f. ufuncs have generated bodies that end in a stub."""
        cpu, cuda = self.kernel(DispatchKey.CPU, f), self.kernel(DispatchKey.CUDA, f)
        return bool(f.ufunc_inner_loop) or (cpu is not None and cpu == cuda)

    def has_composite(self, f: NativeFunction) -> bool:
        return any(self.indices[k].has_kernel(f) for k in self.indices if k.name.startswith("CompositeExplicit"))

    def remaining(self) -> list[NativeFunction]:
        """Overloads with a CPU or CUDA kernel that neither a shared native nor a structured class supplies."""
        out = []
        for f in self.functions:
            if f.structured or f.structured_delegate:
                continue
            name = str(f.func.name)
            if OVERRIDEABLE.match(name):
                out.append(f)
                continue
            if not (self.kernel(DispatchKey.CPU, f) or self.kernel(DispatchKey.CUDA, f)):
                continue
            if FOREIGN.match(name) or (self.is_native(f) and name not in SKIP):
                continue
            out.append(f)
        return out


def remaining_text(yaml: Yaml) -> str:
    groups: dict[str, list[str]] = {}
    for f in yaml.remaining():
        name = str(f.func.name)
        family = next((n for n, pattern in FAMILIES if re.match(pattern, name)), "other")
        cpu, cuda = yaml.kernel(DispatchKey.CPU, f), yaml.kernel(DispatchKey.CUDA, f)
        notes = []
        if OVERRIDEABLE.match(name):
            notes.append("for backends: raises unless defined")
        elif yaml.has_composite(f):
            notes.append("composite exists, own kernel is faster")
        elif not cpu:
            notes.append("CUDA only")
        elif not cuda:
            notes.append("CPU only")
        if name in SKIP:
            notes.append(SKIP[name])
        groups.setdefault(family, []).append(f"  {f.func}" + (f"    [{', '.join(notes)}]" if notes else ""))
    lines = [
        "Overloads that neither a shared native nor a structured class supplies: each needs a lowering in Python.",
        "Written by csrc/aten/generate.py --docs docs. Operators of cuDNN, MIOpen, oneDNN, quantized, nested and sparse",
        "tensors are left out. Overloads without an out= variant here get it from CompositeExplicitAutograd.",
    ]
    order = [n for n, _ in FAMILIES] + ["other"]
    for family in sorted(groups, key=order.index):
        lines += ["", f"{family} ({len(groups[family])})", *groups[family]]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> bool:
    """Writes text to path unless it is there already; says whether it wrote."""
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--docs", action="store_true", help="write the lists for people instead of the C++ files")
    args = parser.parse_args()
    yaml = Yaml.load()
    if args.docs:
        write(args.directory / "remaining_ops.txt", remaining_text(yaml))


if __name__ == "__main__":
    main()
