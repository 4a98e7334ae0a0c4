"""Compiled functions that torch.compile(...).aot_compile saves and loads: what Dynamo asks of a backend's result."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from torch._dynamo.aot_compile import BundledAOTAutogradSerializableCallable, SerializableCallable

from . import direct
from .key import built_for


class Compiled(SerializableCallable):
    """A compiled graph. content: the statements that make its `GraphCall` (direct.part), or AOTAutograd's artifact, pickled."""

    def __init__(self, call: Callable[..., Any], content: str | bytes) -> None:
        self.call, self.content = call, content

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    @classmethod
    def of(cls, call: Callable[..., Any], source: str | None) -> Compiled:
        """source: of the generated module, if its `direct` is the compiled function; else AOTAutograd knows what to save."""
        if source is not None:
            return cls(call, direct.part(source))
        bundle = BundledAOTAutogradSerializableCallable(call)
        return cls(call, BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(bundle))

    @classmethod
    def serialize_compile_artifacts(cls, fn: Compiled) -> bytes:
        return pickle.dumps((built_for(), fn.content))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Compiled:
        """RuntimeError for what was compiled for other devices, or by other sources."""
        built, content = pickle.loads(data)
        if built != built_for():
            raise RuntimeError("the graph was compiled for other spiral devices, or by another version of torch_spiral")
        if isinstance(content, str):
            return cls(direct.make(content, "aot_compile"), content)
        from . import device

        device.register()
        return cls(BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(content), content)


__all__ = ["Compiled"]
