"""Compiled graphs in what Dynamo keeps of its traces on disk (TORCH_CACHING_PRECOMPILE=1), from which a second process starts without
tracing, AOTAutograd or Inductor."""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch._dynamo.precompile_context import BackendCacheArtifact, PrecompileContext

from .. import _C
from . import dynamo
from .key import built_for


class Artifact(BackendCacheArtifact[Any]):
    """A compiled graph. content: the text of a module whose `direct` is the compiled function, or AOTAutograd's own artifact.

    Unpickling one that was built for other devices or by other sources raises RuntimeError, which Dynamo takes for a trace that it does not
    have."""

    def __getstate__(self) -> dict[str, Any]:
        return {"key": self.key, "content": self.content, "built_for": built_for()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("built_for") != built_for():
            raise RuntimeError("the graph was compiled for other spiral devices, or by another version of torch_spiral")
        self.__dict__.update(state)

    def after_deserialization(self) -> Any:
        if isinstance(self.content, str):
            dynamo.call_directly(_C.GraphCall)
            names: dict[str, Any] = {}
            exec(compile(self.content, f"<{self.key}>", "exec"), names)
            return names["direct"]
        from . import device

        device.register()
        return self.content.after_deserialization()


def record(gm: torch.fx.GraphModule, source: str | None) -> None:
    """Has Dynamo keep a graph that was just compiled. source: of its module, if the module's `direct` is the compiled function."""
    key = getattr(gm, "_backend_id", None)
    if key is None:
        return  # which Dynamo will not keep
    if source is not None:
        PrecompileContext.record_artifact(Artifact(key, direct_part(source)))
        return
    made = PrecompileContext.serialize_artifact_by_key(key)
    if made is not None:  # AOTAutograd can keep it
        PrecompileContext.record_artifact(Artifact(key, made))


def direct_part(source: str) -> str:
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


__all__ = ["Artifact", "direct_part", "record"]
