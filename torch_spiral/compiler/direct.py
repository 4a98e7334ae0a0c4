"""Compiled functions on disk, by the graph that Dynamo traced: a second process makes its `GraphCall` without AOTAutograd and without
Inductor, whose imports and keys are a second of its start.

Kept are inference graphs of fixed sizes that write nothing and for which AOTAutograd has nothing to do at run time; what the key names decides all that
becomes of such a graph. Files are beside Inductor's and obey the same switches (torch.compiler.config.force_disable_caches,
torch._inductor.config.fx_graph_cache, torch._functorch.config.enable_autograd_cache)."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor

from .. import _C
from .. import device as spiral
from . import dynamo
from .key import built_for

# Upstream's sources that decide what becomes of a graph.
SOURCES = ("_decomp", "_dynamo", "_functorch", "_higher_order_ops", "_inductor", "_prims", "_prims_common", "_refs", "_subclasses", "fx", "utils/_sympy")  # fmt: skip

# Where functions are that a graph's text names: those in C, and those in Python.
BUILTIN = ("torch", "_operator", "builtins", "math")
PUBLIC = ("torch.functional", "torch.nn.functional")


def key(gm: torch.fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any]) -> str | None:
    """What the compiled function of a graph is kept under: a digest of the graph's text, of what its inputs are, of the settings and the
    global state it is compiled under, of the devices and of torch's and our sources. None for graphs that are not kept.

    config: Inductor's configuration for this graph."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    if (
        torch.compiler.config.force_disable_caches
        or not inductor.fx_graph_cache
        or not functorch.enable_autograd_cache
        or inductor.trace.enabled
        or torch._logging._internal.log_state.is_artifact_enabled("output_code")
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not all(map(_plain_node, gm.graph.nodes))
    ):
        return None
    described = [_describe(x) for x in inputs]
    settings = [m.get_config_copy() for m in (inductor, functorch)]
    if None in described or not _plain([*settings, config]):
        return None
    state = torch._C._dynamo.guards.GlobalStateGuard().__getstate__()  # type: ignore[attr-defined]
    if not isinstance(state, str):
        return None
    parts = (
        gm.code,
        described,
        [sorted(s.items()) for s in (*settings, config)],
        state,
        torch.get_float32_matmul_precision(),
        spiral.current_device(),
        str(torch.get_default_device()),
        _upstream(),
        built_for(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def find(key: str) -> Callable[..., Any] | None:
    """The compiled function that was kept under a key."""
    try:
        digest, _, text = _path(key).read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return None  # damaged
    return make(text.decode(), key)


def keep(key: str, source: str) -> None:
    """Keeps a compiled function. source: of the module that Inductor generated, which has a `direct`."""
    text, path = part(source).encode(), _path(key)
    # A disk that is full or not writable costs the next process its time, not this one its result.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        os.replace(temporary, path)


def part(source: str) -> str:
    """The statements of a generated module that its `direct` is made by; nothing of them is Inductor's."""
    needed, kept = {"direct"}, []
    for statement in reversed(ast.parse(source).body):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            made = {(a.asname or a.name).split(".")[0] for a in statement.names}
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            made = {statement.name}
        else:
            made = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if made & needed:
            kept.append(statement)
            needed |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
    return ast.unparse(ast.Module(kept[::-1], []))


def make(text: str, name: str) -> Callable[..., Any]:
    """The compiled function of such statements."""
    dynamo.call_directly(_C.GraphCall)
    names: dict[str, Any] = {}
    exec(compile(text, f"<{name}>", "exec"), names)
    return names["direct"]


def _path(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "spiral" / key[:2] / key


def _plain_node(node: torch.fx.Node) -> bool:
    """Whether a node is an input, a result, or a call of a function of torch itself or of a method of tensors, without symbolic sizes: the
    graph's text then says what it does."""
    for value in torch.utils._pytree.tree_leaves(node.meta.get("example_value")):
        symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        if symbolic or (isinstance(value, FakeTensor) and value._has_symbolic_sizes_strides):
            return False
    if node.op == "call_function":
        target: Any = node.target
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return str(target).partition(".")[0] in ("aten", "prims")
        module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
        known = isinstance(target, types.BuiltinFunctionType) and module.partition(".")[0] in BUILTIN
        known = known or (module in PUBLIC and name[:1] != "_")
        return known and getattr(sys.modules.get(module), name, None) is target
    if node.op == "call_method":
        return isinstance(node.target, str) and isinstance(node.args[0], torch.fx.Node)
    return node.op in ("placeholder", "output")


def _describe(x: Any) -> Any:
    """What the compiled function of a graph may depend on in one of its inputs; None for what is no plain tensor."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter, FakeTensor) or x.layout is not torch.strided:
        return None
    if isinstance(x, FakeTensor) and x._has_symbolic_sizes_strides:
        return None
    return (
        str(x.dtype), tuple(x.shape), x.stride(), x.storage_offset(), x.untyped_storage().nbytes(), str(x.device), x.requires_grad, x.is_conj(),
        x.is_neg(), x.is_inference(), isinstance(x, torch.nn.Parameter),
    )  # fmt: skip


def _plain(value: Any) -> bool:
    """Whether repr says all about a setting."""
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@functools.cache
def _upstream() -> str:
    """A digest of torch's version and of when its sources last changed."""
    root = Path(torch.__file__).parent

    def files() -> Iterator[tuple[str, int, int]]:
        for folder in SOURCES:
            for at, _, names in os.walk(root / folder):
                for name in names:
                    if name.endswith(".py"):
                        found = os.stat(os.path.join(at, name))
                        yield os.path.join(at, name), found.st_size, found.st_mtime_ns

    return hashlib.sha256(repr((torch.__version__, torch.version.git_version, sorted(files()))).encode()).hexdigest()


__all__ = ["find", "keep", "key", "make", "part"]
