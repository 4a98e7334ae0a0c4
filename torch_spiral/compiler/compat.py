# mypy: disable-error-code="arg-type,assignment,attr-defined,method-assign,misc"
"""Every private name of Inductor and Dynamo that the compiler uses, for each supported version of torch (2.11 to 2.13).

Importing this module imports Inductor (a second or two), so only what compiles does."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.device_interface import DeviceInterface, get_interface_for_device, register_interface_for_device
from torch._functorch._aot_autograd.runtime_wrappers import RuntimeWrapper
from torch._functorch._aot_autograd.schemas import OutputType
from torch._guards import TracingContext
from torch._inductor import codecache, compile_fx, config, lowering, metrics, scheduler, utils
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.common import (
    CSE,
    BackendFeature,
    CSEVariable,
    DeviceOpOverrides,
    OpOverrides,
    get_device_op_overrides,
    get_scheduling_for_device,
    register_backend_for_device,
    register_device_op_overrides,
)
from torch._inductor.codegen.simd import SIMDKernel, SIMDScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen, SubgraphPythonWrapperCodegen
from torch._inductor.custom_graph_pass import CustomGraphModulePass
from torch._inductor.ir import ComputedBuffer, ExternKernel, FixedLayout, Reduction, TensorBox, WelfordReduction
from torch._inductor.lowering import fallback_handler, lowerings, make_fallback, register_lowering
from torch._inductor.ops_handler import OpsHandler
from torch._inductor.output_code import CompiledFxGraph
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
from torch.utils.checkpoint import CheckpointPolicy

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def register_overrides(device: str, overrides: DeviceOpOverrides) -> None:
    """Registers text for a device beside upstream's: Inductor registers its own devices only if it finds none (2.11), so first."""
    get_device_op_overrides("cpu")
    register_device_op_overrides(device, overrides)


def compile_as_for_gpus() -> None:
    """Has the scheduler choose loop orders for spiral, and the lowerings prefer it to the CPU for what has no dimensions, as for GPUs.
    (Listed in GPU_TYPES the device would be asked for Triton in a dozen other places.)"""
    create = scheduler.Scheduler.create_backend

    def create_backend(self: object, device: torch.device) -> object:
        if device.type != "spiral":
            return create(self, device)
        V.graph.add_device_info(device)
        return get_scheduling_for_device("spiral")(self)

    scheduler.is_gpu = lowering.is_gpu = lambda device: device == "spiral" or utils.is_gpu(device)
    scheduler.Scheduler.create_backend = create_backend


def compile_with(defaults: dict[str, Any], settings: dict[str, Any]) -> None:
    """Has Inductor compile graphs on spiral under these settings, whatever the program asks for, and torch.compile under these defaults."""
    upstream = compile_fx.compile_fx

    @functools.wraps(upstream)
    def compile_graph(gm: Any, inputs: Any, *args: Any, config_patches: Any = None, **kwargs: Any) -> Any:
        values = [*inputs, *gm.parameters(), *gm.buffers()]
        if isinstance(gm, torch.fx.GraphModule):
            values += [n.meta.get("val", n.meta.get("example_value")) for n in gm.graph.nodes]
        if any(isinstance(v, torch.Tensor) and v.device.type == "spiral" for v in values):
            getattr(gm, "meta", {}).pop("cudagraph_annotation", None)  # torch._dynamo.override_cudagraphs
            if config_patches is not None or any(getattr(config, k) != v for k, v in settings.items()):
                config_patches = {**defaults, **(config_patches or {}), **settings}
            # Else all is applied: upstream calls itself without patches.
            tag = torch.compiler.config.cache_key_tag + _shared_storage(inputs)
            with torch.compiler.config.patch(cache_key_tag=tag):
                return upstream(gm, inputs, *args, config_patches=config_patches, **kwargs)
        return upstream(gm, inputs, *args, config_patches=config_patches, **kwargs)

    compile_fx.compile_fx = compile_graph


def _shared_storage(inputs: Any) -> str:
    """Which inputs share memory, and where each begins in it: AOTAutograd's code depends on it, but its cache's key says nothing of it."""
    views: dict[int, list[tuple[int, Any]]] = {}
    for i, x in enumerate(inputs):
        if isinstance(x, torch.Tensor) and x.device.type == "spiral":
            views.setdefault(x.untyped_storage()._cdata, []).append((i, x.storage_offset()))
    shared = [v for v in views.values() if len(v) > 1]
    return f"shared {shared}" if shared else ""


def split_reductions(
    pieces: Callable[[torch.device, int, int, bool, bool], int], reads_again: Callable[[torch.fx.Node], bool]
) -> None:
    """Has Inductor cut reductions on spiral into pieces(device, reduced elements, results, along the fast dimension, reads_again of
    the graph's node) partial ones, once: upstream asks again for the partial ones."""
    upstream = InductorChoices.reduction_split_factor

    def once(owner: type) -> None:
        several = owner.create_multilayer.__func__

        def create_multilayer(cls: type, device: torch.device, *args: Any, **kwargs: Any) -> Any:
            with config.patch(split_reductions=False) if device.type == "spiral" else contextlib.nullcontext():
                return several(cls, device, *args, **kwargs)

        owner.create_multilayer = classmethod(create_multilayer)

    once(Reduction)
    once(WelfordReduction)

    def factor(device: torch.device, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool) -> int:
        if device.type != "spiral":
            return upstream(device, reduction_numel_hint, numel_hint, inner_reduction)
        node = V.graph.current_node
        return pieces(device, reduction_numel_hint, numel_hint, inner_reduction, node is not None and reads_again(node))

    InductorChoices.reduction_split_factor = staticmethod(factor)


def align_loops() -> None:
    """Has the scheduler put the loops of a pointwise node on spiral in the order of a reduction that reads the same tensor, between whose
    rows there are others ([4, 300, 70] over 300), so that they become one kernel. Upstream does so where the reduction is of the first dimensions alone."""
    upstream = scheduler.Scheduler.shared_data_after_reordering_loop

    @functools.wraps(upstream)
    def shared_data_after_reordering_loop(self: Any, node1: Any, node2: Any) -> int:
        score = upstream(self, node1, node2)
        reductions = [n for n in (node1, node2) if n.is_reduction()]
        if score >= 0 or len(reductions) != 1 or node1.is_template() or node2.is_template():
            return score
        (pointwise,) = (n for n in (node1, node2) if not n.is_reduction())
        if pointwise.get_device() is None or pointwise.get_device().type != "spiral":
            return score
        reads, others = ({d.name: d for d in n.read_writes.reads} for n in (pointwise, reductions[0]))
        shared = [
            (mine, others[name])
            for name, mine in reads.items()
            if name in others and all(isinstance(d, scheduler.MemoryDep) for d in (mine, others[name]))
        ]
        shared = [
            (mine, theirs)
            for mine, theirs in shared
            if mine.num_vars == theirs.num_vars
            and mine.normalize_with_stride_order() == theirs.normalize_with_stride_order()
        ]
        if not shared:
            return score
        mine, theirs = max(shared, key=lambda pair: hint(pair[0].get_numel()))
        reordered = pointwise.reorder_loops_by_dep_pair(mine, theirs)
        return self.score_fusion_memory(node1, node2) if reordered else score

    scheduler.Scheduler.shared_data_after_reordering_loop = shared_data_after_reordering_loop


def mend_modules() -> None:
    """Has Inductor write a generated module again where the file of its name is damaged: upstream writes none that exists, and runs the
    graph eagerly ever after."""
    write = codecache.PyCodeCache.write.__func__

    def mend(path: str, text: str) -> None:
        with open(path, "rb") as file:
            whole = file.read().strip() == text.strip().encode()
        if not whole:
            codecache.write_atomic(path, text)

    def write_module(cls: type, source_code: str, *args: Any, **kwargs: Any) -> tuple[str, str]:
        key, path = write(cls, source_code, *args, **kwargs)
        mend(path, source_code)
        return key, path

    codecache.PyCodeCache.write = classmethod(write_module)
    upstream = getattr(CompiledFxGraph, "write_to_disk", None)
    if upstream is None:
        return

    @functools.wraps(upstream)
    def write_to_disk(self: Any) -> str:
        path = upstream(self)
        mend(path, self.source_code)
        return path

    CompiledFxGraph.write_to_disk = write_to_disk


def save_random_results() -> None:
    """Has activation checkpointing inside a graph save the results of operators on spiral that draw numbers of their own, attention with
    dropout among them, rather than compute them again: upstream can give back the states of some devices' generators alone."""
    upstream = compile_fx.joint_graph_passes

    @functools.wraps(upstream)
    def joint_graph_passes(*args: Any, **kwargs: Any) -> torch.fx.GraphModule:
        gm = upstream(*args, **kwargs)
        for n in gm.graph.nodes:
            if (
                torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
                and n.meta.get("recompute") is not None
            ):
                values = n.meta["val"] if isinstance(n.meta["val"], (tuple, list)) else (n.meta["val"],)
                if any(isinstance(x, torch.Tensor) and x.device.type == "spiral" for x in values):
                    for x in (n, *(user for user in n.users if user.target is operator.getitem)):
                        x.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return gm

    compile_fx.joint_graph_passes = joint_graph_passes


def store(n: torch.fx.Node) -> None:
    """Has Inductor store the node's result, whatever it costs to compute again. (Of custom passes: after store_marked.)"""
    n.meta["spiral_stored"] = True


def store_marked() -> None:
    """Has Inductor do what `store` asks for."""
    from torch._inductor.graph import GraphLowering

    upstream = GraphLowering.run_node

    def run_node(self: Any, n: torch.fx.Node) -> Any:
        result = upstream(self, n)
        if n.meta.get("spiral_stored") and isinstance(result, TensorBox):
            result.realize()
        return result

    GraphLowering.run_node = run_node


def lay_out_fake_convolutions() -> None:
    """Has fake convolutions of spiral tensors lay their results out as ops/conv.py does. Upstream's take each for contiguous, and a
    graph would read a gradient that is channels-last by wrong strides."""
    from torch._subclasses import fake_impls

    known, aten = fake_impls.op_implementations_dict, torch.ops.aten
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def last(x: Any) -> bool:
        return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]) and not x.is_contiguous()

    def wrap(op: Any, upstream: Callable[..., Any]) -> Callable[..., Any]:
        def conv(fake_mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
            out = upstream(fake_mode, func, *args, **kwargs)
            backward = op is aten.convolution_backward.default
            given = dict(zip([a.name for a in op._schema.arguments], args, strict=False)) | kwargs
            x, w = given["input"], given["weight"]
            if x.device.type != "spiral":
                return out
            y = out[0] if backward else out
            by_weight = not backward and x.ndim == 4 and last(w) and x.shape[1] != 1
            if y is None or not (last(x) or by_weight):
                return out
            with fake_mode:
                y = torch.empty_like(y, memory_format=formats[y.ndim])
            return (y, *out[1:]) if backward else y

        return conv

    for op in (aten.convolution.default, aten.convolution_backward.default):
        known[op] = wrap(op, known[op])


def keep_operators(names: list[str]) -> None:
    """Has Inductor call these operators on spiral tensors instead of fusing them. names: without "special_"."""
    for op, lower in list(lowerings.items()):
        if (
            isinstance(op, torch._ops.OpOverload)
            and op._schema.name.removeprefix("aten::").removeprefix("special_") in names
        ):
            call = fallback_handler(op, add_to_fallback_set=False)

            def choose(*args: Any, lower: Any = lower, call: Any = call, **kwargs: Any) -> Any:
                ours = any(isinstance(a, TensorBox) and getattr(a.get_device(), "type", None) == "spiral" for a in args)
                return (call if ours else lower)(*args, **kwargs)

            lowerings[op] = choose


def read_convolutions_by_channels(wanted: Callable[[torch.fx.GraphModule], bool]) -> None:
    """Has Inductor lay tensors out channels-last around the convolutions of graphs on spiral that `wanted` says yes to, and leave weights
    as they are, with the conversions that autocast puts before them in inference: the kernels' packed forms, which are kept, are
    made of the parameters themselves."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.kernel.conv import aten_convolution

    aten, decide = torch.ops.aten, GraphLowering.decide_layout_opt

    def decide_layout_opt(gm: torch.fx.GraphModule, *, is_inference: bool) -> bool:
        nodes = gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
        if any(n.meta["val"].device.type == "spiral" for n in nodes):
            return bool(config.layout_optimization) and wanted(gm)
        return decide(gm, is_inference=is_inference)

    GraphLowering.decide_layout_opt = staticmethod(decide_layout_opt)
    upstream = lowerings[aten.convolution.default]

    def parameter(weight: Any) -> Any:
        """The input of the graph that the weight is, or is converted from for this convolution alone; or None."""
        node: Any = V.graph.current_node.args[1]
        if node.target is torch.ops.prims.convert_element_type.default and len(node.users) == 1:
            node = node.args[0]
        if node.op == "placeholder" and node.meta["val"].is_floating_point():
            return V.graph.graph_inputs[node.target]
        return None

    def convolution(
        x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any,
        groups: int,
    ) -> Any:  # fmt: skip
        given = (x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        if x.get_device().type != "spiral" or not V.graph.layout_opt or transposed or len(x.get_size()) != 4:
            return upstream(*given)
        x.realize()
        x = ExternKernel.require_channels_last(x)
        found = parameter(weight)
        if found is None:
            weight.realize()
            weight = ExternKernel.require_channels_last(weight)
        else:
            weight = found
        sizes = [int(n) for n in V.graph.current_node.meta["val"].shape]
        _, c, h, w = sizes
        layout = FixedLayout(x.get_device(), x.get_dtype(), sizes, [c * h * w, 1, w * c, c])
        kwargs = {
            "stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "transposed": False,
            "output_padding": tuple(output_padding), "groups": groups,
        }  # fmt: skip
        args = [x, weight]
        if bias is None:
            kwargs = {"bias": None, **kwargs}
        else:
            bias = ExternKernel.realize_input(bias)
            bias.freeze_layout()
            args.append(bias)
        return aten_convolution.bind(args, layout, list(kwargs), **kwargs).output_node()

    for op in (aten.convolution, aten.convolution.default):
        if op in lowerings:
            lowerings[op] = convolution


@dataclass
class Parts:
    """What compile_fx made of a graph: Inductor's graphs, and AOTAutograd's description of what it does around them."""

    graphs: list[Any] = field(default_factory=list)
    inference: list[Any] = field(default_factory=list)


_parts = threading.local()


@functools.cache
def _collect() -> None:
    def hook(owner: type, note: Callable[..., None]) -> None:
        original = owner.post_compile

        @functools.wraps(original)
        def post_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if getattr(_parts, "now", None) is not None:
                note(_parts.now, self, kwargs)
            return result

        owner.post_compile = post_compile

    def wrapped(parts: Parts, wrapper: Any, kwargs: Any) -> None:
        parts.inference.append(None if wrapper.trace_joint else kwargs["runtime_metadata"])

    hook(CompiledFxGraph, lambda parts, graph, kwargs: parts.graphs.append(graph))
    hook(RuntimeWrapper, wrapped)


@contextlib.contextmanager
def parts_of_compilation() -> Iterator[Parts]:
    """Collects what compilations in this context are made of."""
    _collect()
    before, _parts.now = getattr(_parts, "now", None), Parts()
    try:
        yield _parts.now
    finally:
        _parts.now = before


def plain_inference(parts: Parts) -> Any:
    """The generated module's globals, where AOTAutograd does nothing but call it: no views, mutations outside, subclasses, random
    states or effects to take care of. Else None."""
    if len(parts.graphs) != 1 or len(parts.inference) != 1 or parts.inference[0] is None:
        return None
    meta: Any = parts.inference[0]
    plain_outputs = (OutputType.non_alias, OutputType.unsafe_view_alias)
    subclasses = [*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta]
    if (
        meta.num_mutated_inp_runtime_indices
        or meta.num_intermediate_bases
        or meta.is_rng_op_functionalized
        or meta.tokens
        or getattr(meta, "num_graphsafe_rng_states", 0)
        or any(o.output_type not in plain_outputs for o in meta.output_info)
        or any(i.mutates_data and i.mutations_hidden_from_autograd for i in meta.input_info)
        or any(not isinstance(m, int) and type(m).__name__ != "PlainTensorMeta" for m in subclasses)
    ):
        return None
    call = parts.graphs[0].current_callable
    return getattr(getattr(call, "__func__", call), "__globals__", None)


def only_reads(parts: Parts) -> bool:
    """Whether a plain inference writes none of its inputs, and no guards beside Dynamo's were found for it. While it is being compiled."""
    context = TracingContext.try_get()
    writes = any(i.mutates_data or i.mutates_metadata for i in parts.inference[0].input_info)
    return context is not None and not context.guards_context.aotautograd_guards and not writes


def compile_exported(exported: Any) -> tuple[str, dict[str, Any], int, Any]:
    """(the generated module's text, constants that it names, the device's index, the program as it was decomposed)."""
    from torch._dynamo.utils import detect_fake_mode
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    from . import CONFIG, device

    device.register()
    decomposed = exported.run_decompositions(select_decomp_table())
    gm = decomposed.graph_module
    fakes = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    devices = {x.device for x in fakes if isinstance(x, torch.Tensor) and x.ndim}
    if {d.type for d in devices} != {"spiral"} or len(devices) != 1:
        raise RuntimeError(
            f'a package is compiled for one spiral device, but the program is on {sorted(map(str, devices))}: export model.to("spiral")'
        )
    mode = detect_fake_mode(fakes)
    with (
        config.patch(fx_graph_cache=False, **CONFIG),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        torch.no_grad(),
    ):
        joint_graph_passes(gm)
        compiled = compile_fx_inner(gm, fakes, is_inference=True)
    return compiled.source_code, dict(compiled.constants or {}), next(iter(devices)).index or 0, decomposed


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
    "CustomGraphModulePass",
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
    "SubgraphPythonWrapperCodegen",
    "SymT",
    "TensorBox",
    "V",
    "ValueRanges",
    "Where",
    "align_loops",
    "compile_as_for_gpus",
    "compile_exported",
    "compile_with",
    "config",
    "equal",
    "fusion_reasons",
    "get_interface_for_device",
    "get_kernel_metadata",
    "get_scheduling_for_device",
    "hint",
    "lay_out_fake_convolutions",
    "lookup_backend",
    "lowerings",
    "make_fallback",
    "mend_modules",
    "metrics",
    "multiple_of",
    "new_variable",
    "only_reads",
    "ops",
    "parts_of_compilation",
    "plain_inference",
    "read_convolutions_by_channels",
    "register_backend_for_device",
    "register_interface_for_device",
    "register_lowering",
    "register_overrides",
    "split_reductions",
    "store",
    "store_marked",
    "symbol_is_type",
    "sympy_index_symbol",
    "sympy_subs",
]  # fmt: skip
