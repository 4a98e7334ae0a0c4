"""Generates the registrations of ATen's operators for PrivateUse1 from the torchgen data of the installed torch.

    generate.py DIR          write the C++ files into DIR (setup.py does this before compiling)
    generate.py --docs DIR   write registrations.md into DIR

Every dense operator that a backend must supply falls into one of three kinds:

native      CPU and CUDA share one function of at::native. It is device-generic, so it is registered for PrivateUse1
            as it is. Most of them end in a DispatchStub, whose PrivateUse1 pointer is set too.
structured  CPU and CUDA share the meta function only. A class derived from it is generated whose body runs a lowering.
remaining   nothing is shared. A lowering in Python registers the overload.

Torchgen is asked for the key XPU, the one backend outside of the tree that it generates structured kernels for, and its
text is renamed. A file is rewritten only where its content changes, so that an incremental build stays incremental.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torchgen
import torchgen.api.meta
import torchgen.api.structured
from torchgen import dest, local
from torchgen.dest import RegisterDispatchKey
from torchgen.gen import get_grouped_native_functions, parse_native_yaml
from torchgen.model import (
    BackendIndex,
    BackendMetadata,
    DispatchKey,
    NativeFunction,
    NativeFunctionsGroup,
    OperatorName,
)
from torchgen.selective_build.selector import SelectiveBuilder
from torchgen.utils import Target

# Natives that CPU and CUDA share and that are nevertheless not registered: overload -> reason.
RUNTIME = "defined by the runtime"
COMPRESSED = "a composite (torch_spiral/ops/sparse_compressed.py)"
SPARSE_COO = "registered by sparse.cpp, with what else makes sparse tensors"
QUANTIZED = "makes quantized tensors, which spiral does not have"
NESTED = "makes nested tensors, which spiral does not have"
HOST = "a declared host operator (torch_spiral/ops/host.py)"
SKIP = {
    "as_strided": RUNTIME,
    "view": RUNTIME,
    "_reshape_alias": RUNTIME,
    "unfold": RUNTIME,
    "set_.source_Storage": RUNTIME,
    "set_.source_Tensor": RUNTIME,
    "_to_sparse": SPARSE_COO,
    "_to_sparse.sparse_dim": SPARSE_COO,
    "quantize_per_tensor": QUANTIZED,
    "quantize_per_tensor.tensor_qparams": QUANTIZED,
    "quantize_per_tensor_dynamic": QUANTIZED,
    "quantize_per_channel": QUANTIZED,
    "_nested_tensor_from_mask": NESTED,
    "_nested_tensor_from_mask_left_aligned": NESTED,
    "_nested_view_from_buffer": NESTED,
    "_nested_compute_contiguous_strides_offsets": NESTED,
    "mode": "refuses other devices than CPU, CUDA and XPU",
    "mode.values": "refuses other devices than CPU, CUDA and XPU",
    "glu.out": "its iterator refers to tensors that are gone when the body runs",
    "linalg_matrix_exp": "leaves its coefficients on the host unless the device is CUDA",
    "isin.Scalar_Tensor_out": "makes the number a wrapped one on the device, which no kernel in Python may be given",
    "linalg_eig": HOST,
    "linalg_eig.out": HOST,
    "_linalg_eigvals": HOST,
    "linalg_eigvals.out": HOST,
    "_linalg_eigh.eigenvalues": HOST,
    "_linalg_svd.U": HOST,
    "linalg_lstsq.out": HOST,
    "linalg_ldl_factor_ex.out": HOST,
    "linalg_ldl_solve.out": HOST,
}
# Before 2.13 these natives refused devices other than CPU, CUDA and XPU: torch_spiral/ops/before_2_13.py.
if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
    SKIP |= dict.fromkeys(
        (
            *("std.correction", "std.correction_out", "var.correction", "var.correction_out"),
            *("std_mean.correction", "var_mean.correction"),
            *("_cdist_forward", "_cdist_backward", "_pdist_forward", "_pdist_backward"),
        ),
        "refuses other devices than CPU, CUDA and XPU",
    )

# Structured operators that are left out: functional name -> reason.
SKIP_STRUCTURED = {
    "_convert_indices_from_coo_to_csr": COMPRESSED,
    "_convert_indices_from_csr_to_coo": COMPRESSED,
}

# Integers of structured operators that must not enter the key, since they follow sizes.
SLOTS = {
    "adaptive_max_pool2d": {"output_size"},
    "adaptive_max_pool3d": {"output_size"},
    "fractional_max_pool2d": {"output_size"},
    "fractional_max_pool2d_backward": {"output_size"},
    "fractional_max_pool3d": {"outputT", "outputH", "outputW"},
    "nll_loss_forward": {"ignore_index"},
    "nll_loss_backward": {"ignore_index"},
    "topk": {"k"},
    "tril": {"diagonal"},
    "triu": {"diagonal"},
}
SLOT_NAMES = {  # the same in every operator of a family
    r".*_pad\dd(_backward)?$": {"padding"},
    r".*upsample_": {"output_size", "input_size"},
}

# What a meta function precomputed for kernels that are not ours, or what the tensors say anyway.
DROP = {
    "cat": {"all_contiguous", "all_same_dtype", "all_same_sizes_and_stride", "memory_format"},
    "fractional_max_pool3d": {"numBatch", "numPlanes", "inputT", "inputH", "inputW"},
}

# Structured operators with checks that upstream keeps in its own bodies: functions of prechecks.h.
PRECHECKS = {"_log_softmax", "_softmax", "addmv", "baddbmm", "bmm", "mm"}

# Iterator stubs that stay empty.
UNREACHED = "only CPU kernels call it"
SKIP_STUBS = {
    "copy_stub": RUNTIME,
    "GeluKernel": "gelu is a structured operator of ours",
    "GeluBackwardKernel": "gelu_backward is a structured operator of ours",
    "mode_stub": UNREACHED,
    "glu_stub": UNREACHED,
    "index_put_with_sort_stub": "index_put.cpp, which expands masks first",
    "masked_select_serial_stub": UNREACHED,
    "masked_select_stub": UNREACHED,
    "masked_scatter_stub": UNREACHED,
    "masked_fill_stub": UNREACHED,
    "arange_stub": UNREACHED,
    "linspace_stub": UNREACHED,
    "log_sigmoid_backward_stub": UNREACHED,
    "masked_fill_kernel_quantized_stub": QUANTIZED,
    "index_put_kernel_quantized_stub": QUANTIZED,
}
ITERATOR_OUTS = {"put_stub": [1]}  # outputs among the further arguments


@dataclass(frozen=True)
class TensorStub:
    """A stub over tensors that a registered native reaches. The lists are positions of arguments; an argument of type
    Tensor& is an output anyway."""

    outs: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    drop: tuple[int, ...] = ()


TENSOR_STUBS = {
    # reductions and scans
    "aminmax_allreduce_stub": TensorStub(),
    "aminmax_stub": TensorStub(),
    "cumprod_stub": TensorStub(outs=(0,)),
    "cumsum_stub": TensorStub(outs=(0,)),
    "max_all_stub": TensorStub(),
    "max_stub": TensorStub(outs=(0, 1)),
    "min_all_stub": TensorStub(),
    "min_stub": TensorStub(outs=(0, 1)),
    "sort_stub": TensorStub(outs=(1, 2)),
    "isin_default_stub": TensorStub(outs=(3,)),
    # indexing
    "gather_stub": TensorStub(outs=(0,)),
    "scatter_add_stub": TensorStub(outs=(0,)),
    "scatter_fill_stub": TensorStub(outs=(0,)),
    "scatter_reduce_stub": TensorStub(outs=(0,)),
    "scatter_reduce_two_stub": TensorStub(outs=(0,)),
    "scatter_scalar_reduce_stub": TensorStub(outs=(0,)),
    "scatter_stub": TensorStub(outs=(0,)),
    "unfold_backward_stub": TensorStub(slots=(3, 4)),
    # random
    "bernoulli_scalar_stub": TensorStub(outs=(0,)),
    "bernoulli_tensor_stub": TensorStub(outs=(0,)),
    "multinomial_with_replacement_stub": TensorStub(slots=(2,)),
    "normal_stub": TensorStub(outs=(0,)),
    # normalization, distances, segments, quantization
    "GroupNormBackwardKernel": TensorStub(slots=(5, 6, 7, 8)),
    "GroupNormKernel": TensorStub(slots=(3, 4, 5, 6)),
    "_segment_reduce_lengths_backward_stub": TensorStub(),
    "_segment_reduce_lengths_stub": TensorStub(),
    "_segment_reduce_offsets_backward_stub": TensorStub(),
    "_segment_reduce_offsets_stub": TensorStub(),
    "cdist_backward_stub": TensorStub(),
    "cdist_stub": TensorStub(),
    "fake_quant_tensor_cachemask_stub": TensorStub(slots=(4, 5, 6)),
    "fake_quant_tensor_cachemask_tensor_qparams_stub": TensorStub(slots=(6, 7)),
    "pdist_backward_stub": TensorStub(),
    "pdist_forward_stub": TensorStub(),
    # linear algebra; the factorizations are in place
    "cholesky_inverse_stub": TensorStub(drop=(1,)),  # infos: on the host, already zero
    "cholesky_stub": TensorStub(outs=(0, 1)),
    "cross_stub": TensorStub(outs=(0,)),
    "geqrf_stub": TensorStub(outs=(0, 1)),
    "lu_factor_stub": TensorStub(outs=(0, 1, 2)),
    "lu_solve_stub": TensorStub(outs=(2,)),
    "orgqr_stub": TensorStub(),
    "ormqr_stub": TensorStub(outs=(2,)),
    "triangular_solve_stub": TensorStub(outs=(1,)),
}

SHARDS = 6  # of the natives: each compiles in about ten seconds

# Overloads that belong to other libraries or other kinds of tensors: no lowering is wanted.
FOREIGN = re.compile(
    r"_?(cudnn|miopen|mkldnn|cslt|triton|test|philox|nested|use_cudnn|use_miopen|sparse_semi|to_sparse|convert_weight)_|"
    r"quantize_per|_empty_(per|affine)|_make_per|_dyn_quant|_weight_int4pack|_mixed_dtypes|_foobar|from_file|to_mkldnn|"
    r"_scaled_(grouped_)?mm_v2|_validate_compressed|_flash_attention|_efficient_attention|_cudnn|_spdiags|_make_dep_token|"
    r"_fill_mem_eff|_scaled_dot_product_(flash|efficient|cudnn)|_use_|_convert_indices|record_stream|_nested|fbgemm|_cslt"
)

# Composite operators that raise unless a backend defines them.
OVERRIDEABLE = re.compile(r".*_overrideable$")


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
            if FOREIGN.match(name) or SKIP.get(name) in (QUANTIZED, NESTED):
                continue
            if self.is_native(f) and name not in SKIP:
                continue
            out.append(f)
        return out

    @cached_property
    def groups(self) -> list[NativeFunction | NativeFunctionsGroup]:
        return list(get_grouped_native_functions(self.functions))

    @cached_property
    def structured(self) -> list[NativeFunctionsGroup]:
        """The groups of which CPU and CUDA share the meta function only."""
        found = [
            g for g in self.groups if isinstance(g, NativeFunctionsGroup) and g.structured and not self.is_native(g.out)
        ]
        found = [g for g in found if lowering_name(g) not in SKIP_STRUCTURED]
        names = [lowering_name(g) for g in found]
        assert len(set(names)) == len(names), "two structured operators of one name"
        return found

    @cached_property
    def natives(self) -> dict[OperatorName, BackendMetadata]:
        """The functions that CPU and CUDA share."""
        found = {}
        for f in self.functions:
            if str(f.func.name) in SKIP or f.structured_delegate or not self.is_native(f):
                continue
            if f.ufunc_inner_loop:
                kernel, structured = f"ufunc_{f.func.name.name.base}_CPU", True
            else:
                kernel, structured = self.kernel(DispatchKey.CPU, f), f.structured
            found[f.func.name] = BackendMetadata(kernel=kernel, structured=structured, cpp_namespace="at::native")
        return found


def lowering_name(g: NativeFunctionsGroup) -> str:
    """The name of a structured operator's lowering: that of the operator."""
    return str(g.functional.func.name.name)


HEAD = "// Written by csrc/aten/generate.py for torch {version}.\n"
# What torchgen's text needs.
INCLUDES = """#include <ATen/Dispatch.h>
#include <ATen/TensorMeta.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
"""


class Registrations:
    """Torchgen's registrations of some groups for PrivateUse1, as the text of one C++ file."""

    def __init__(self, index: dict[OperatorName, BackendMetadata], key: DispatchKey = DispatchKey.XPU):
        self.index = BackendIndex(key, use_out_as_primary=True, external=False, device_guard=True, index=index)

    def wants(self, g: NativeFunction | NativeFunctionsGroup) -> bool:
        if isinstance(g, NativeFunction):
            return self.index.has_kernel(g)
        if g.structured:
            return self.index.has_kernel(g.out)
        return any(self.index.has_kernel(f) for f in g.functions())

    @staticmethod
    def rename(text: str) -> str:
        for old, new in (
            ("at::detail::empty_xpu", "at::empty"),
            ("at::detail::empty_strided_xpu", "at::empty_strided"),
            ("_xpu", "_privateuse1"),
            ("XPU", "PrivateUse1"),
        ):
            text = text.replace(old, new)
        return text

    def text(self, groups: list[NativeFunction | NativeFunctionsGroup], before: str = "") -> tuple[str, int]:
        """The file and how many overloads it registers."""
        with local.parametrize(use_const_ref_for_mutable_tensors=False, use_ilistref_for_tensor_lists=True):
            parts = {}
            for target in (Target.ANONYMOUS_DEFINITION, Target.REGISTRATION):
                register = RegisterDispatchKey(
                    self.index, target, SelectiveBuilder.get_nop_selector(), rocm=False, symint=True,
                    class_method_name=None, skip_dispatcher_op_registration=False,
                )  # fmt: skip
                parts[target] = self.rename("\n".join(text for g in groups for text in register(g)))
        headers = sorted({g.root_name for g in groups})
        includes = "".join(f"#include <ATen/ops/{h}_native.h>\n" for h in headers)
        helpers = self.rename("\n".join(dest.gen_registration_helpers(self.index)))
        registrations = parts[Target.REGISTRATION]
        text = (
            f"{HEAD.format(version=torch.__version__)}{INCLUDES}{includes}\n{before}"
            f"namespace at {{\nnamespace {{\n{helpers}\n{parts[Target.ANONYMOUS_DEFINITION]}\n"
            f"TORCH_LIBRARY_IMPL(aten, {self.rename(self.index.dispatch_key.name)}, m) {{\n{registrations}\n}}\n"
            "}  // namespace\n}  // namespace at\n"
        )
        return text, registrations.count("m.impl(")


def native_files(yaml: Yaml) -> tuple[dict[str, str], int]:
    registrations = Registrations(yaml.natives)
    groups = [g for g in yaml.groups if registrations.wants(g)]
    files, count = {}, 0
    for i in range(SHARDS):
        files[f"register_native_{i}.cpp"], n = registrations.text(groups[i::SHARDS])
        count += n
    return files, count


def sparse_files(yaml: Yaml) -> tuple[dict[str, str], int]:
    """What CPU and CUDA share of sparse tensors, coordinate and compressed ones, which are made of dense ones."""
    files, count = {}, 0
    for kind in ("Sparse", "SparseCsr"):
        index = {}
        for f in yaml.functions:
            cpu, cuda = (yaml.kernel(DispatchKey[kind + backend], f) for backend in ("CPU", "CUDA"))
            if cpu and cpu == cuda:
                index[f.func.name] = BackendMetadata(kernel=cpu, structured=False, cpp_namespace="at::native")
        wanted = [
            g
            for g in yaml.groups
            if any(f.func.name in index for f in ([g] if isinstance(g, NativeFunction) else g.functions()))
        ]
        name = f"register_{'sparse' if kind == 'Sparse' else 'sparse_csr'}.cpp"
        files[name], n = Registrations(index, DispatchKey[f"{kind}XPU"]).text(wanted)
        count += n
    return files, count


def structured_class(g: NativeFunctionsGroup) -> str:
    """The class whose body runs the lowering: the arguments that the meta function leaves, then the outputs."""
    name = lowering_name(g)
    with local.parametrize(use_const_ref_for_mutable_tensors=False, use_ilistref_for_tensor_lists=True):
        arguments = torchgen.api.structured.impl_arguments(g)
    outs = [a.name for a in g.out.func.arguments.out]
    slots, drop = set(SLOTS.get(name, ())), DROP.get(name, set())
    for pattern, names in SLOT_NAMES.items():
        if re.match(pattern, name):
            slots |= names
    inputs = [a.name for a in arguments if a.name not in outs]
    missing = (slots - set(inputs) if name in SLOTS else set()) | (drop - set(inputs))
    assert not missing, f"{name} has no arguments {missing}"
    body = []
    if name in PRECHECKS:
        body.append(f"prechecks::{name.lstrip('_')}({', '.join(inputs + outs)});")
    body.append(f'static const OpId op = op_id("{name}");')
    # Not every meta function wraps a negative dimension.
    wrapped = {"dim": f"at::maybe_wrap_dim(dim, {inputs[0]}.dim())"} if inputs[0] != "tensors" else {}
    passed = [f"pass(call, {wrapped.get(a, a)}, {'true' if a in slots else 'false'});" for a in inputs if a not in drop]
    if g.out.structured_inherits:
        # The operands are those of the iterator that the meta function has set up.
        tensors = {a.name for a in arguments if "Tensor" in str(a.type)}
        passed = [p for p, a in zip(passed, inputs, strict=True) if a not in tensors]
        body.append(f"run_iterator(op, *this, [&](Call& call) {{ {' '.join(passed)} }});")
    else:
        empty = " && ".join(f"{o}.numel() == 0" for o in outs)
        body += [f"if ({empty}) {{", "  return;", "}", f"Call call(op, {outs[0]}.device().index());", *passed]
        body += [*(f"call.out({o});" for o in outs), "call.run();"]
    signature = ", ".join(a.defn() for a in arguments)
    lines = "\n".join(f"    {line}" for line in body)
    head = f"struct structured_{name} : at::meta::structured_{torchgen.api.meta.name(g)} {{"
    return f"{head}\n  void impl({signature}) {{\n{lines}\n  }}\n}};\n"


def structured_files(yaml: Yaml) -> tuple[dict[str, str], int]:
    files, count = {}, 0
    index = {
        g.out.func.name: BackendMetadata(kernel=lowering_name(g), structured=True, cpp_namespace="spiral")
        for g in yaml.structured
    }
    for i in range(2):
        groups = yaml.structured[i::2]
        classes = "\n".join(structured_class(g) for g in groups)
        before = '#include "aten/prechecks.h"\n#include "aten/stubs.h"\n\n'
        before += f"namespace spiral {{\n{classes}}}  // namespace spiral\n\n"
        files[f"register_structured_{i}.cpp"], n = Registrations(index).text(groups, before)
        count += n
    return files, count


@dataclass(frozen=True)
class Stub:
    """A DispatchStub that ATen's headers declare."""

    name: str
    header: str
    signature: str
    exported: bool

    @property
    def over_iterator(self) -> bool:
        return re.search(r"\(\s*\*\s*\)\s*\(\s*(at::)?TensorIterator(Base)?\s*&", self.signature) is not None


def scan_stubs() -> list[Stub]:
    """All DispatchStubs in the installed headers. Those of quantized and CPU-only kernels (folders) are left out."""
    root = Path(torch.__file__).parent
    library = next(p for p in (root / "lib").iterdir() if re.fullmatch(r"(lib)?torch_cpu\.(so|dylib|lib)", p.name))
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    exported = set(re.findall(r" [BDVS] _ZN2at6native\d+([A-Za-z_]\w*?)E$", symbols, re.M))
    stubs = []
    folder = root / "include" / "ATen" / "native"
    for path in sorted([*folder.glob("*.h"), folder / "quantized" / "FakeQuantAffine.h"]):
        text = path.read_text()
        if path.name in ("DispatchStub.h", "CPUBlas.h") or "DECLARE_DISPATCH" not in text:
            continue
        text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
        aliases = {name: " ".join(t.split()) for name, t in re.findall(r"using\s+(\w+)\s*=\s*([^;]*);", text)}
        for kind, name in re.findall(r"DECLARE_DISPATCH\(\s*((?:[^()]|\([^()]*\))*?),\s*(\w+)\s*\)", text):
            kind = " ".join(kind.split())
            header = path.relative_to(root / "include").as_posix()
            # Where the symbols cannot be listed (no nm), the linker says.
            stubs.append(Stub(name, header, aliases.get(kind, kind), name in exported or not exported))
    return stubs


def mask(positions: list[int] | tuple[int, ...]) -> str:
    return hex(sum(1 << p for p in positions))


def stub_files(stubs: list[Stub]) -> tuple[dict[str, str], int, int]:
    """The files, how many iterator stubs and how many tensor stubs they register."""
    found = {s.name for s in stubs}
    missing = [name for name in [*ITERATOR_OUTS, *TENSOR_STUBS] if name not in found]
    assert not missing, f"ATen has no stubs {missing}"
    iterators = [s for s in stubs if s.over_iterator and s.exported and s.name not in SKIP_STUBS]
    tensors = [s for s in stubs if s.name in TENSOR_STUBS and s.exported]
    files = {}
    lines = {s: f"SPIRAL_ITERATOR_STUB({s.name}, {mask(ITERATOR_OUTS.get(s.name, []))})" for s in iterators}
    for s in tensors:
        roles = TENSOR_STUBS[s.name]
        lines[s] = f"SPIRAL_TENSOR_STUB({s.name}, {mask(roles.outs)}, {mask(roles.slots)}, {mask(roles.drop)})"
    for name, part in (("iterator", iterators), ("tensor", tensors)):
        headers = "".join(f"#include <{h}>\n" for h in sorted({s.header for s in part}))
        body = "\n".join(lines[s] for s in part)
        files[f"register_{name}_stubs.cpp"] = (
            f"{HEAD.format(version=torch.__version__)}#include <ATen/core/Tensor.h>\n{headers}\n"
            f'#include "aten/stubs.h"\n\nnamespace at::native {{\n{body}\n}}  // namespace at::native\n'
        )
    return files, len(iterators), len(tensors)


def registrations_text(yaml: Yaml, stubs: list[Stub], counts: str) -> str:
    native = sorted(str(name) for name in yaml.natives)
    lines = [
        "# How ATen's operators reach spiral",
        "",
        f"Written by `csrc/aten/generate.py --docs docs` for torch {torch.__version__.split('+')[0]}: {counts}.",
        "",
        "## Structured operators",
        "",
        "ATen's meta function, our body. The lowering (`@structured`) takes these arguments. `*` marks a slot;",
        "dimensions are not negative; nothing is called where all outputs are empty. Those over an",
        "iterator get it first.",
        "",
    ]
    lines += [f"- `{structured_signature(g)}`" for g in yaml.structured]
    lines += [
        "",
        "## Iterator stubs",
        "",
        "The lowering (`@stub`) takes the iterator, then these arguments: integers, floats and Scalars are slots;",
        "a generator is not handed over (`philox` draws from it). Strides are in bytes (`index_stub`), as in ATen.",
        "",
    ]
    for s in stubs:
        if s.over_iterator and s.exported and s.name not in SKIP_STUBS:
            extras = re.sub(r".*?TensorIterator(Base)?\s*&\s*\w*\s*,?", "", s.signature, count=1).rstrip(") ").strip()
            lines.append(f"- `{s.name}`" + (f": `{extras}`" if extras else ""))
    lines += [
        "",
        "## Stubs over tensors",
        "",
        "The lowering takes the inputs and other arguments in ATen's order, then the outputs (`out`) in order. An",
        "operand that is read and written, such as the matrix of a factorization, is an output. Without one, the",
        "lowering returns the result. `*` marks integers that are slots.",
        "",
    ]
    for s in stubs:
        if s.name in TENSOR_STUBS and s.exported:
            lines.append(f"- `{s.name}({stub_signature(s)})`")
    one_by_one = ", ".join(f"`{f.func.name}`" for f in yaml.remaining())
    lines += [
        "",
        "## Overloads registered one by one",
        "",
        "Nothing above supplies these: a lowering in torch_spiral/ops or a function in csrc/aten does, or upstream's composite",
        f"definition. docs/coverage.md says which work. {one_by_one}.",
    ]
    lines += ["", "## Left out", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in {**SKIP, **SKIP_STRUCTURED, **SKIP_STUBS}.items()]
    reached = {s.name for s in stubs if s.over_iterator} | set(TENSOR_STUBS)
    lines += [
        "",
        "Stubs that no registered native reaches: "
        + ", ".join(f"`{s.name}`" for s in stubs if s.name not in reached)
        + ".",
    ]
    lines += ["", "## Natives that CPU and CUDA share", "", ", ".join(f"`{n}`" for n in native) + "."]
    return "\n".join(lines) + "\n"


def structured_signature(g: NativeFunctionsGroup) -> str:
    """As the lowering sees it: name(inputs; outputs)."""
    inputs, outs = [], [a.name for a in g.out.func.arguments.out]
    for line in structured_class(g).splitlines():
        for name, slot in re.findall(r"pass\(call, (?:at::maybe_wrap_dim\()?(\w+)[^;]*?, (true|false)\);", line):
            inputs.append(name + "*" * (slot == "true"))
    if g.out.structured_inherits:
        return f"{lowering_name(g)}({', '.join(['iterator', *inputs])})"
    return f"{lowering_name(g)}({', '.join(inputs)}; {', '.join(outs)})"


def stub_signature(s: Stub) -> str:
    roles = TENSOR_STUBS[s.name]
    arguments = re.split(r",(?![^<]*>)", re.search(r"\(\s*\*\s*\)\s*\((.*)\)$", s.signature)[1])
    inputs, outs = [], []
    for i, a in enumerate(a.strip() for a in arguments):
        if i in roles.drop or "Generator" in a:
            continue
        if i in roles.outs or re.match(r"(at::)?Tensor(Base)?\s*&", a):
            outs.append(re.sub(r"(const )?(at::)?Tensor(Base)?\s*&", "out", a).strip())
        else:
            inputs.append(a + "*" * (i in roles.slots))
    return ", ".join(inputs) + "; " + ", ".join(outs)


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
    stubs = scan_stubs()
    native, natives = native_files(yaml)
    structured, registrations = structured_files(yaml)
    sparse, sparse_natives = sparse_files(yaml)
    registered, iterators, tensors = stub_files(stubs)
    counts = (
        f"{natives} registrations of {len(yaml.natives)} shared natives, {sparse_natives} of sparse tensors; {registrations} of {len(yaml.structured)} "
        f"structured operators; {iterators} iterator stubs; {tensors} tensor stubs; "
        f"{len(yaml.remaining())} overloads one by one"
    )
    if args.docs:
        write(args.directory / "registrations.md", registrations_text(yaml, stubs, counts))
    else:
        for name, text in {**native, **sparse, **structured, **registered}.items():
            write(args.directory / name, text)
    print(counts)


if __name__ == "__main__":
    main()
