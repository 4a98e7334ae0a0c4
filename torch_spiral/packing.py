"""torch_spiral.pack: puts a model's weights into the layouts that its kernels read fastest, ahead of the first call."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _C
from . import device as spiral
from .autotune import tuner

_holders = itertools.count(1)


@contextmanager
def _holding(holder: int) -> Iterator[None]:
    _C.set_packing(holder)
    try:
        yield
    finally:
        _C.set_packing(0)


@dataclass
class Packed:
    """What pack() did. bytes: of packed copies that are kept beside the weights; transposed: names of Linear weights that were laid out
    anew, in place; seconds_before, seconds_after: medians of a call of the model, before: packing weights in every call."""

    device: torch.device
    holder: int
    transposed: list[str] = field(default_factory=list)
    seconds_before: float = 0.0
    seconds_after: float = 0.0

    @property
    def count(self) -> int:
        """Packed copies that are kept."""
        return _C.packed_statistics(self.device.index, self.holder)[0]

    @property
    def bytes(self) -> int:
        return _C.packed_statistics(self.device.index, self.holder)[1]

    @property
    def gain(self) -> float:
        return self.seconds_before / self.seconds_after if self.seconds_after else 1.0

    def release(self) -> None:
        """Frees the packed copies. Weights that were laid out anew stay so."""
        _C.release_packed(self.holder)

    def __str__(self) -> str:
        return (
            f"{self.count} packed weights ({_C.format_bytes(self.bytes)}), {len(self.transposed)} laid out anew: "
            f"{self.seconds_after * 1e3:.4g} ms a call, {self.seconds_before * 1e3:.4g} ms before ({self.gain:.2f}x)"
        )


def pack(model: torch.nn.Module, *inputs: Any, rounds: int = 5, **kwargs: Any) -> Packed:
    """Packs a model's weights for calls like model(*inputs, **kwargs), which it makes (without gradients) to learn what its kernels want.

    On CPU devices, where products read panels, packed copies of the weights are kept from now on; without this they are kept from their second
    use. They are made anew, in place, after a weight is written, and given up under memory pressure. On GPUs a Linear's weight is
    transposed in memory (its shape stays) where a paired comparison says that this is faster. Results stay those of the same sums."""
    parameters = [p for p in model.parameters() if p.device.type == "spiral"]
    if not parameters:
        raise ValueError("the model has no weights on a spiral device")
    device = parameters[0].device
    result = Packed(device, next(_holders))

    def call() -> None:
        with torch.no_grad():
            model(*inputs, **kwargs)

    def unpacked() -> None:
        _C.drop_packed(device.index, True)
        call()

    with spiral.device(device):
        unpacked()
        result.seconds_before = _median(device, unpacked, rounds)
        if _C.device_properties(device.index)["schedule_class"] == "vector":
            with _holding(result.holder):
                call()
        else:
            result.transposed = _lay_out(model, call)
        call()
        result.seconds_after = _median(device, call, rounds)
    return result


def _median(device: torch.device, call: Callable[[], None], rounds: int) -> float:
    samples = []
    for _ in range(rounds):
        spiral.synchronize(device)
        start = time.perf_counter()
        call()
        spiral.synchronize(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


@dataclass
class _Product:
    """x @ w.t() with w in one of two layouts."""

    x: torch.Tensor
    w: torch.Tensor

    def seconds(self, times: int) -> float:
        start, end = (torch.Event(device=self.x.device, enable_timing=True) for _ in range(2))
        with torch.no_grad():
            for i in range(2 * times):  # the first half warms up
                if i == times:
                    start.record()
                torch.nn.functional.linear(self.x, self.w)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times


def _transposed(w: torch.Tensor) -> torch.Tensor:
    return w.detach().t().contiguous().t()


def _lay_out(model: torch.nn.Module, call: Callable[[], None]) -> list[str]:
    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.device.type == "spiral"
    }

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: shapes.__setitem__(name, (args[0].shape, args[0].dtype))

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        call()
    finally:
        for h in handles:
            h.remove()
    faster: dict[Any, bool] = {}
    done: list[str] = []
    for name, (shape, dtype) in shapes.items():
        w = linears[name].weight
        key = (tuple(shape), dtype, tuple(w.shape), w.dtype)
        if dtype != w.dtype or not w.is_contiguous():
            continue
        if key not in faster:
            x, scratch = torch.randn(shape, device=w.device, dtype=dtype), torch.randn_like(w.detach())
            ours, theirs = _Product(x, _transposed(scratch)), _Product(x, scratch)
            ours.seconds(1), theirs.seconds(1)  # compiles
            once = max(min(ours.seconds(1), theirs.seconds(1)), 1e-7)
            times = tuner.repetitions(w.device.index, once)
            faster[key] = tuner.compare(ours, theirs, times).better(tuner.ALPHA)
        if faster[key]:
            w.data = _transposed(w)
            done.append(name)
    return done
