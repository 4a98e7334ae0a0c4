"""Compiled graphs in what Dynamo keeps of its traces on disk (TORCH_CACHING_PRECOMPILE=1), from which a second process starts without
tracing, AOTAutograd or Inductor."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.precompile_context import BackendCacheArtifact, PrecompileContext

from . import direct
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
            return direct.make(self.content, self.key)
        from . import device

        device.register()
        return self.content.after_deserialization()


def record(gm: torch.fx.GraphModule, source: str | None) -> None:
    """Has Dynamo keep a graph that was just compiled. source: of its module, if the module's `direct` is the compiled function."""
    key = getattr(gm, "_backend_id", None)
    if key is None:
        return  # which Dynamo will not keep
    if source is not None:
        PrecompileContext.record_artifact(Artifact(key, direct.part(source)))
        return
    made = PrecompileContext.serialize_artifact_by_key(key)
    if made is not None:  # AOTAutograd can keep it
        PrecompileContext.record_artifact(Artifact(key, made))


__all__ = ["Artifact", "record"]
