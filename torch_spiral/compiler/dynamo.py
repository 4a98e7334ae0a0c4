# mypy: disable-error-code="assignment,attr-defined,method-assign"
"""Every private name of Dynamo that the compiler uses without Inductor, which takes a second or two to import."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch._dynamo import eval_frame, trace_rules


@functools.cache
def call_directly(kind: type) -> None:
    """Has Dynamo call compiled functions of this type (without frames of Python, which it might trace) without a wrapper in Python,
    and without marks for the profiler around a call: together a third of what Dynamo costs a call."""
    trace_rules.add("torch_spiral")  # our own Python is called, not traced
    # Not `disable`, which a compilation that is under way when we get here has imported already.
    wrap = eval_frame.DisableContext.__call__

    @functools.wraps(wrap)
    def unless_direct(self: Any, fn: Any) -> Any:
        return fn if isinstance(fn, kind) else wrap(self, fn)

    eval_frame.DisableContext.__call__ = unless_direct
    if hasattr(torch._dynamo.config, "record_runtime_overhead"):
        torch._dynamo.config.record_runtime_overhead = False


def forget_stream(gm: torch.fx.GraphModule) -> None:
    """Has Dynamo not hand the current stream to this graph on every call, if the graph has no use for streams. While the graph is
    being compiled."""
    try:
        from torch._dynamo import graph_bytecode_inputs as inputs
    except ImportError:  # 2.11 hands over what a graph asks for
        return
    uses = (
        getattr(n.target, "__module__", None) == inputs.__name__ or "streams" in str(n.target)
        for n in gm.graph.nodes
        if n.op == "call_function"
    )
    if len(inputs.index_to_bytecode_constructor) == 1 and not any(uses):
        inputs.index_to_bytecode_constructor.clear()


def forget_saved_tensors_hooks() -> None:
    """Has Dynamo not ask in every call which hooks for saved tensors are set, which takes half as long as all other guards of a small graph:
    a graph that saves nothing for a backward calls none. While the graph is being compiled."""
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in list(guards):
        if guard.create_fn_name() == "AUTOGRAD_SAVED_TENSORS_HOOKS":
            guards.inner.discard(guard)


def keeps_traces() -> bool:
    """Whether the program has Dynamo keep what it traces (TORCH_CACHING_PRECOMPILE=1, which this knows as torch 2.13 does it)."""
    known = torch.__version__ >= torch.torch_version.TorchVersion("2.13")
    return known and bool(torch._dynamo.config.caching_precompile)


def compiles_ahead() -> bool:
    """Whether the graph that is being compiled is one of torch.compile(...).aot_compile."""
    return bool(getattr(torch._functorch.config, "bundled_autograd_cache", False)) and not keeps_traces()


@functools.cache
def complete_traces() -> None:
    """Mends what upstream (2.13) leaves out of the traces that it keeps, without which GPT-2 of transformers is not found again:

    - a function behind functools.wraps, as all forward methods of transformers are: upstream takes its __module__ and __qualname__, which
      are the inner function's, for its own, looks its guards up in another module's globals, and drops the inner function, which goes by
      the same name, from what they are checked on;
    - modules that a graph's results are built with (collections, for OrderedDict);
    - names of globals that no other process gives: upstream counts them from 0, so the first trace after one was loaded stops at an
      assertion, and the functions that two traces resume in after a graph break could be taken for each other."""
    from torch._dynamo import comprehension_graph_break, output_graph, symbolic_convert
    from torch._dynamo.bytecode_transformation import unique_id
    from torch._dynamo.guards import GuardsStatePickler
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.package import CompilePackage

    add, reduce, install = (
        CompilePackage._add_function,
        GuardsStatePickler.reducer_override,
        OutputGraph.install_global_unsafe,
    )

    def _add_function(self: Any, python_code: Any, python_module: str, *args: Any, **kwargs: Any) -> None:
        fn = self._innermost_fn
        if fn is not None and python_code is fn.__code__:
            python_module = fn.__globals__["__name__"]
        add(self, python_code, python_module, *args, **kwargs)

    def reducer_override(self: Any, obj: Any) -> Any:
        found = reduce(self, obj)
        if inspect.isfunction(obj) and found is not NotImplemented and found[1] == ("fqn mismatch",):
            return type(self)._unpickle_nested_function, (
                obj.__code__, obj.__globals__["__name__"], obj.__qualname__, obj.__defaults__, obj.__closure__,
            )  # fmt: skip
        return found

    def install_global_unsafe(self: Any, name: str, value: Any) -> None:
        install(self, name, value)
        if inspect.ismodule(value) and self.package is not None:
            self.package.add_import_source(name, value.__name__)

    CompilePackage._add_function = _add_function
    GuardsStatePickler.reducer_override = reducer_override
    OutputGraph.install_global_unsafe = install_global_unsafe
    for module in (comprehension_graph_break, output_graph, symbolic_convert):
        module.unique_id = functools.partial(unique_id, with_uuid=True)


__all__ = [
    "call_directly",
    "compiles_ahead",
    "complete_traces",
    "forget_saved_tensors_hooks",
    "forget_stream",
    "keeps_traces",
]
