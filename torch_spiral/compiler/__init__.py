"""torch.compile for spiral: Dynamo, AOTAutograd and Inductor's scheduler in front, kernels of torch_spiral.kernels behind.

    compiled = torch.compile(model.to("spiral"), backend="spiral")

The default backend of torch.compile does the same for spiral tensors. docs/compiler.md says how."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses import fake_tensor

from .package import Package, PackageError, load, package
from .report import Explanation


def _devices(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> set[str]:
    found = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor) and x.ndim}
    for _, t in [*gm.named_parameters(), *gm.named_buffers()]:
        found.add(t.device.type)
    return found


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend "spiral" of torch.compile. mode: one of torch.compile's. options: Inductor's configuration, as torch.compile's. What
    either asks of CUDA devices alone (CUDA graphs, autotuning of templates) is left out.

    RuntimeError for graphs over CPU tensors. A graph that cannot be compiled runs eagerly, with a warning that says why; under
    fullgraph=True the error is raised."""
    devices = _devices(gm, example_inputs)
    if devices and "spiral" not in devices:
        kinds = " and ".join(sorted(devices))
        raise RuntimeError(
            f'torch.compile(backend="spiral") compiles for spiral, but the inputs and parameters are on {kinds}: '
            'move them with .to("spiral")'
        )
    from torch._dynamo.exc import RestartAnalysis, SkipFrame
    from torch._inductor import list_mode_options

    from . import direct, dynamo

    config = {**list_mode_options(mode or "default"), **(options or {})}
    dynamo.forget_stream(gm)
    try:
        saved = dynamo.keeps_traces() or dynamo.compiles_ahead()
        key = None if saved else direct.key(gm, example_inputs, config)
        if key is not None and (found := direct.find(key)) is not None:
            dynamo.forget_saved_tensors_hooks()
            return found
        from torch._inductor import compile_fx

        from . import compat, device
        from .passes import fuse_attention, share_keys, skip_empty_caches

        device.register()
        fuse_attention(gm)
        share_keys(gm)
        skip_empty_caches(gm)
        with compat.parts_of_compilation() as parts:
            compiled: Any = compile_fx.compile_fx(gm, list(example_inputs), config_patches=config)
        module = compat.plain_inference(parts)
        whole = _direct(module, len(example_inputs))
        source = parts.graphs[0].source_code if whole is not None and "direct" in module else None
        if whole is not None:
            dynamo.forget_saved_tensors_hooks()
        if key is not None and source is not None and compat.only_reads(parts):
            direct.keep(key, source)
        if dynamo.keeps_traces():
            from . import precompile

            precompile.record(gm, source)
        elif saved:
            from . import ahead

            call: Any = compiled if source is None else whole
            return ahead.Compiled.of(call, source)
        return whole or compiled
    except (RestartAnalysis, SkipFrame):  # Dynamo's own, to trace once more or not at all
        raise
    except Exception as error:
        if _fullgraph():
            raise
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"spiral runs a graph of {len(gm.graph.nodes)} nodes eagerly: {type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return gm.forward


def _direct(module: dict[str, Any] | None, arguments: int) -> Callable[..., Any] | None:
    """The generated function itself, for graphs that need nothing of AOTAutograd around them. arguments: how many Dynamo passes;
    AOTAutograd adds the parameters that a graph holds."""
    if module is None or module.get("arguments") != arguments:
        return None
    if "direct" in module:
        return module["direct"]
    call = module["call"]
    return lambda *args: call(list(args))


def inductor_classes() -> dict[str, Any]:
    """Inductor's names for what a device brings."""
    from .codegen import Scheduling
    from .wrapper import Wrapper

    return {"Scheduling": Scheduling, "PythonWrapperCodegen": Wrapper}


def _fullgraph() -> bool:
    """Whether the graph being compiled must not break."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return bool(InstructionTranslator.current_tx().one_graph)
    except AttributeError:
        return False


# Asserts on sizes cost a microsecond an input and check Inductor, not the program; combined kernels and templates of
# Inductor's own are Triton's. Layouts of convolutions: passes.reads_by_channels decides, graph by graph.
CONFIG: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False, "layout_optimization": True}


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """The kernels that fn compiles to for these arguments, their source, bytes and FLOPs, and what kept nodes from fusing:
    `print(explain(fn, x))`. See report.Explanation."""
    from .report import explain as report

    return report(fn, *args, **kwargs)


def _say_where_to_move() -> None:
    """Has the error about tensors on the CPU beside others on spiral, as of a model left on the CPU, say what to do: Dynamo raises it
    before it asks a backend."""
    error = getattr(fake_tensor, "FakeTensorDeviceMismatchError", None)
    if error is None:  # 2.11
        return
    upstream = error.__init__

    def __init__(self: Any, func: Any, common_device: torch.device, device: torch.device) -> None:
        upstream(self, func, common_device, device)
        if {common_device.type, device.type} == {"cpu", "spiral"}:
            self.args = (f'{self.args[0]} Move what is on the CPU with .to("spiral").',)

    error.__init__ = __init__


_say_where_to_move()
if os.environ.get("TORCH_CACHING_PRECOMPILE") == "1" or getattr(
    sys.modules.get("torch._dynamo.config"), "caching_precompile", False
):
    from . import dynamo

    # Before Dynamo looks at the function that is compiled, which it does after it looked up the backend.
    if dynamo.keeps_traces():
        dynamo.complete_traces()

__all__ = ["Explanation", "Package", "PackageError", "backend", "explain", "load", "package"]
