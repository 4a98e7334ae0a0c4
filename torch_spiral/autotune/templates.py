"""What the tuner knows of each template: scratch calls that have a key, what a schedule should take, and the kernel that its decision is
about. The candidates themselves are declared beside the kernels (kernels/*/gemm.py, attention.py …)."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from ..kernels.kernel import DTYPES, Target
from . import Request
from .model import CACHE_SPEED, LAUNCH_SECONDS, Roofline, Tiling, product_seconds

TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Of the largest result, between schedules that only add in another order.
TOLERANCE = {"f32": 2e-5, "f16": 3e-3, "bf16": 2e-2}
MARGIN = 64  # elements around a result that must stay as they are


@dataclass
class Problem:
    """A call on scratch tensors. call() stores its results in `outputs`, which lie between margins of `arena`s."""

    template: str
    key: str
    sizes: tuple[int, ...]
    device: torch.device
    dtype: str
    inputs: list[torch.Tensor]
    arenas: list[torch.Tensor]
    outputs: list[torch.Tensor]
    call: Callable[[], Any]
    exact: Callable[[], list[torch.Tensor]] | None  # in float64 on the host; None: too large for that
    tolerance: float
    flops: float
    bytes: float
    fields: dict[str, Any] = field(default_factory=dict)  # of the key

    def asks(self, request: Request) -> bool:
        """Whether the call asks for just this key."""
        from .tuner import requests_of

        return any((r.template, r.key) == (request.template, request.key) for r in requests_of(self.call))

    def poison(self) -> None:
        """So that a result that is not written is seen: in the arenas, else in the memory that the next result will probably take."""
        for memory in (*self.arenas, *(self.outputs if not self.arenas else ())):
            memory.fill_(float("nan"))
        if not self.arenas:
            self.outputs.clear()

    def damage(self) -> str:
        """What was written outside of the results; empty: nothing."""
        for arena, out in zip(self.arenas, self.outputs, strict=False):
            if not (arena[:MARGIN].isnan().all() and arena[MARGIN + out.numel() :].isnan().all()):
                return "it wrote outside of its result"
        return ""

    def results(self) -> list[torch.Tensor]:
        return [out.clone() for out in self.outputs]

    def truth(self) -> list[torch.Tensor] | None:
        return self.exact() if self.exact is not None else None


def arena(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory, a contiguous tensor in it between two margins)."""
    count = 1
    for n in shape:
        count *= n
    memory = torch.empty(count + 2 * MARGIN, dtype=dtype, device=device)
    return memory, memory[MARGIN : MARGIN + count].view(*shape)


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Normal numbers; large ones repeat a block, since they are made on the host."""
    count = 1
    for n in shape:
        count *= n
    block = torch.randn(min(count, (1 << 22) + 1), generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
    return block.repeat(-(-count // block.numel()))[:count].view(*shape)


class Template:
    """A family of kernels. device and key say which call; sizes are exact."""

    name: str

    def problem(self, device: int, key: str, sizes: Sequence[int]) -> Problem:
        """A call on scratch tensors that asks for the key."""
        raise NotImplementedError(f"{self.name} {key}")

    def work(self, key: str, sizes: Sequence[int]) -> tuple[float, float]:
        """(operations, bytes that must move at least) of a call."""
        raise NotImplementedError

    def ragged(self, problem: Problem) -> Problem:
        """A small one of the same kernels with sizes that fill no tile, and exact results to compare with."""
        raise NotImplementedError

    def seconds(self, problem: Problem, schedule: Any, roofline: Roofline) -> float:
        """What the roofline lets expect of a schedule."""
        raise NotImplementedError

    def family(self, schedule: Any) -> Any:
        """What schedules have in common that the model can hardly tell apart."""
        return schedule

    def kernel_text(self, target: Target, key: str, schedule: Any) -> str:
        """The source of the kernel that a decision for the key is about."""
        raise NotImplementedError


class Gemm(Template):
    """Key: dtypes of a, b, c; layouts; [flags of the schedule class]; m, n, k, batch as floor(log2)."""

    name = "gemm"

    def _fields(self, key: str) -> dict[str, Any]:
        a, b, c, layouts, *flags = key.split()[:-4]
        return {"a": a, "b": b, "c": c, "layouts": layouts, "flags": flags}

    def problem(self, device: int, key: str, sizes: Sequence[int], exact: bool = False) -> Problem:
        f = self._fields(key)
        where = torch.device("spiral", device)
        m, n, k, batch = sizes
        if not f["a"] == f["b"] == f["c"] or f["layouts"][2] != "n" or f["a"] not in TORCH:
            raise NotImplementedError(f"gemm {key}")
        dtype = TORCH[f["a"]]

        def operand(rows: int, columns: int, layout: str, seed: int) -> torch.Tensor:
            if layout == "n":
                return scratch((batch, rows, columns), dtype, where, seed)
            return scratch((batch, columns, rows), dtype, where, seed).transpose(1, 2)

        a, b = operand(m, k, f["layouts"][0], 1), operand(k, n, f["layouts"][1], 2)
        memory, out = arena((batch, m, n), dtype, where)
        if batch == 1:
            a2, b2, out2 = a[0], b[0], out[0]

            def call() -> Any:
                return torch.mm(a2, b2, out=out2)
        else:

            def call() -> Any:
                return torch.bmm(a, b, out=out)

        def truth() -> list[torch.Tensor]:
            return [a.cpu().double() @ b.cpu().double()]

        tolerance = TOLERANCE[f["a"]] if f["flags"][-1:] != ["tf32"] else 5e-4
        return Problem(
            self.name, key, tuple(sizes), where, f["a"], [a, b], [memory], [out], call, truth if exact else None, tolerance,
            *self.work(key, sizes), f,
        )  # fmt: skip

    def work(self, key: str, sizes: Sequence[int]) -> tuple[float, float]:
        m, n, k, batch = sizes
        return 2.0 * m * n * k * batch, float(batch * DTYPES[key.split()[0]].size * (m * k + k * n + m * n))

    def ragged(self, problem: Problem) -> Problem:
        """Divisible as the key says, and no more: what a kernel is built for stays."""
        m, n, k, batch = problem.sizes

        def like(size: int, small: int) -> int:
            return small if size % 16 == 0 else small + 4 if size % 4 == 0 else small + 3

        m = min(m, 13) if m < 32 else like(m, 336)
        return self.problem(
            problem.device.index, problem.key, (m, like(n, 304), like(k, 272), min(batch, 3)), exact=True
        )

    def _tiling(self, target: Target, f: dict[str, Any], schedule: Any, sizes: Sequence[int]) -> Tiling:
        size = DTYPES[f["a"]].size
        if target.schedule_class == "vector":
            s, m = schedule, sizes[0]
            tasks = -(-m // (s.mc * target.compute_units)) * target.compute_units * sizes[3]
            return Tiling(s.mr, s.nr, 1, 1, s.mr * s.nr, 0, 1, tasks=tasks)
        s = schedule.schedule
        if target.schedule_class == "block":
            from ..kernels.block.gemm import programs, stream_programs

            threads, (m, n, k, batch) = 32 * s.warps, sizes
            return Tiling(
                s.m, s.n, s.k, threads, s.m * s.n // threads, s.stages * (s.m + s.n) * s.k * size, schedule.splits,
                matrix_units=True, stages=s.stages,
                programs=stream_programs(programs(target, s, size), s, m, n, k, batch) if s.streamed else 0,
            )  # fmt: skip
        return Tiling(
            s.tile_m, s.tile_n, s.tile_k, s.threads, s.thread_m * s.thread_n, s.workgroup_memory(),
            schedule.splits, stages=1 + s.prefetch,
        )  # fmt: skip

    def seconds(self, problem: Problem, schedule: Any, roofline: Roofline) -> float:
        target = Target.of(problem.device.index)
        size = DTYPES[problem.dtype].size
        tiling = self._tiling(target, problem.fields, schedule, problem.sizes)
        m, n, k, batch = problem.sizes
        return product_seconds(target, tiling, m, n, k, batch, problem.dtype, size, size, roofline)

    def family(self, schedule: Any) -> Any:
        s = getattr(schedule, "schedule", schedule)
        if hasattr(s, "tile_m"):
            return s.tile_m, s.tile_n, s.thread_m, s.thread_n, schedule.splits
        return (s.mr, s.nv) if hasattr(s, "mr") else (s.m, s.n, schedule.splits, s.streamed)

    def kernel_text(self, target: Target, key: str, schedule: Any) -> str:
        from ..kernels.block import gemm as block
        from ..kernels.simt import gemm as simt
        from ..kernels.vector import gemm as vector

        f = self._fields(key)
        la, lb, lc = f["layouts"]
        if target.schedule_class == "vector":
            return vector.gemm(target, f["a"], "f32", f["c"], la, "packed", lc, s=schedule).source
        split = schedule.splits > 1
        if target.schedule_class == "simt":
            va, vb, full = (c in "vf" for c in f["flags"][0])
            s = schedule.schedule
            full = full and s.tile_k <= 16
            return simt.gemm(target, s, f["a"], f["c"], la, lb, lc, va, vb, False, full, split, b_dtype=f["b"]).source
        precision = "" if f["flags"][1] == "-" else f["flags"][1]
        tiles = f["flags"][0] == "tiles"
        return block.gemm(
            target, schedule.schedule, f["a"], f["b"], f["c"], la, lb, lc, precision, split, block.Epilogue(), tiles
        ).source


class Attention(Template):
    """Forward. Key: dtype, flag of the kernels, causal or full, mask's dtype, classes of head sizes, floor(log2) of the queries. Sizes:
    batch, heads, queries, heads of the keys, keys, head size, head size of the values."""

    name = "attention"

    def problem(self, device: int, key: str, sizes: Sequence[int], exact: bool = False) -> Problem:
        dtype, _, causal, mask, *_ = key.split()
        if mask != "-":
            raise NotImplementedError(f"attention {key}")
        where = torch.device("spiral", device)
        batch, heads, queries, kv_heads, keys, head, head_v = sizes
        q = scratch((batch, heads, queries, head), TORCH[dtype], where, 1)
        k = scratch((batch, kv_heads, keys, head), TORCH[dtype], where, 2)
        v = scratch((batch, kv_heads, keys, head_v), TORCH[dtype], where, 3)
        problem: Problem

        def attend(q: Any, k: Any, v: Any) -> torch.Tensor:
            gqa = heads != kv_heads
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal == "causal", enable_gqa=gqa
            )

        def call() -> None:
            problem.outputs[:] = [attend(q, k, v)]

        def truth() -> list[torch.Tensor]:
            return [attend(*(x.cpu().double() for x in (q, k, v)))]

        problem = Problem(
            self.name, key, tuple(sizes), where, dtype, [q, k, v], [], [], call, truth if exact else None, 2 * TOLERANCE[dtype],
            *self.work(key, sizes),
        )  # fmt: skip
        return problem

    def work(self, key: str, sizes: Sequence[int]) -> tuple[float, float]:
        batch, heads, queries, kv_heads, keys, head, head_v = sizes
        share = 0.5 if key.split()[2] == "causal" else 1.0
        moved = DTYPES[key.split()[0]].size * batch * (heads * queries + kv_heads * keys) * (head + head_v)
        return 2.0 * share * batch * heads * queries * keys * (head + head_v), float(moved)

    def ragged(self, problem: Problem) -> Problem:
        _, heads, queries, kv_heads, keys, head, head_v = problem.sizes
        small = (1, heads // kv_heads * 2, min(queries, 197), 2, min(keys, 203), head, head_v)
        return self.problem(problem.device.index, problem.key, small, exact=True)

    def seconds(self, problem: Problem, schedule: Any, roofline: Roofline) -> float:
        """The keys are read again for every tile of queries; a workgroup's tile must keep the compute units busy."""
        target = Target.of(problem.device.index)
        batch, heads, queries, _, keys, head, head_v = problem.sizes
        rows = getattr(schedule, "queries", 0) or schedule.block_q
        columns = getattr(schedule, "keys", 0) or schedule.block_k
        workgroups = -(-queries // rows) * batch * heads
        waves = -(-workgroups // target.compute_units) * target.compute_units / workgroups
        tile = rows * columns / (rows + columns)
        again = workgroups * keys * (head + head_v) * DTYPES[problem.dtype].size / (CACHE_SPEED * roofline.bandwidth)
        return max(
            problem.flops * waves * (1 + 8 / tile) / roofline.rate(problem.dtype),
            problem.bytes / roofline.bandwidth + again,
        )

    def family(self, schedule: Any) -> Any:
        return (schedule.queries, schedule.keys) if hasattr(schedule, "queries") else schedule

    def kernel_text(self, target: Target, key: str, schedule: Any) -> str:
        from ..kernels.block import attention as block
        from ..kernels.simt import attention as simt

        dtype, flag, causal, mask, *numbers = key.split()
        head, head_v = (int(n[1:]) for n in numbers[:2])
        mask = "" if mask == "-" else mask
        if target.schedule_class == "simt":
            return simt.forward(target, schedule, dtype, head, head_v, mask, causal == "causal", flag == "vec").source
        precision = "bf16x6" if dtype == "f32" else ""
        return block.forward(
            target, schedule, dtype, head, head_v, "exact" in flag, mask, causal == "causal", precision
        ).source


class Conv(Template):
    """Forward, one group. Key: dtype, spatial dimensions, taps, strides, layouts, then channels, output channels and result pixels as
    floor(log2). Sizes: images, channels, extents, output channels, taps, strides, paddings, dilations."""

    name = "conv"

    def _parts(self, key: str, sizes: Sequence[int]) -> tuple[int, Any, int, list[list[int]]]:
        nd = int(key.split()[1][0])
        lists = [list(sizes[3 + nd + i * nd : 3 + nd + (i + 1) * nd]) for i in range(4)]
        return nd, sizes[: 2 + nd], sizes[2 + nd], lists

    def problem(self, device: int, key: str, sizes: Sequence[int], exact: bool = False) -> Problem:
        dtype, _, _, _, layouts, *_ = key.split()
        where = torch.device("spiral", device)
        nd, shape, channels, (taps, stride, padding, dilation) = self._parts(key, sizes)
        x = scratch(shape, TORCH[dtype], where, 1)
        w = scratch((channels, shape[1], *taps), TORCH[dtype], where, 2)
        if layouts.startswith(("last", "run")):
            x = x.contiguous(memory_format=torch.channels_last if nd == 2 else torch.channels_last_3d)
        function: Any = torch.nn.functional.conv2d if nd == 2 else torch.nn.functional.conv3d
        problem: Problem

        def call() -> None:
            problem.outputs[:] = [function(x, w, None, stride, padding, dilation)]

        def truth() -> list[torch.Tensor]:
            return [function(x.cpu().double(), w.cpu().double(), None, stride, padding, dilation)]

        tolerance = 5e-4 if layouts.endswith("tf32") else TOLERANCE[dtype]
        problem = Problem(
            self.name,
            key,
            tuple(sizes),
            where,
            dtype,
            [x, w],
            [],
            [],
            call,
            truth if exact else None,
            tolerance,
            *self.work(key, sizes),
        )
        return problem

    def _product(self, key: str, sizes: Sequence[int]) -> tuple[int, int, int]:
        """m, n and k of the matrix product that it is."""
        _, shape, channels, (taps, stride, padding, dilation) = self._parts(key, sizes)
        pixels = shape[0]
        for size, t, s, p, d in zip(shape[2:], taps, stride, padding, dilation, strict=True):
            pixels *= (size + 2 * p - d * (t - 1) - 1) // s + 1
        return channels, pixels, shape[1] * math.prod(taps)

    def work(self, key: str, sizes: Sequence[int]) -> tuple[float, float]:
        m, n, k = self._product(key, sizes)
        _, shape, _, _ = self._parts(key, sizes)
        return 2.0 * m * n * k, float(DTYPES[key.split()[0]].size * (math.prod(shape) + m * k + m * n))

    def ragged(self, problem: Problem) -> Problem:
        _, shape, channels, lists = self._parts(problem.key, problem.sizes)
        small = [
            2,
            min(shape[1], 19),
            *(min(n, 4 * lists[3][i] * lists[0][i] + 5) for i, n in enumerate(shape[2:])),
            min(channels, 83),
        ]
        return self.problem(
            problem.device.index, problem.key, (*small, *(n for part in lists for n in part)), exact=True
        )

    def seconds(self, problem: Problem, schedule: Any, roofline: Roofline) -> float:
        target, size = Target.of(problem.device.index), DTYPES[problem.dtype].size
        m, n, k = self._product(problem.key, problem.sizes)
        if not hasattr(schedule, "schedule"):
            schedule = SimpleNamespace(schedule=schedule, splits=1)
        tiling = Gemm()._tiling(target, {"a": problem.dtype}, schedule, (m, n, k, 1))
        # Indices are computed for every element of the gathered tile: wide tiles of rows share them.
        return product_seconds(target, tiling, m, n, k, 1, problem.dtype, size, size, roofline)

    def family(self, schedule: Any) -> Any:
        return (schedule.tile_m, schedule.tile_n) if hasattr(schedule, "tile_m") else schedule.schedule

    def kernel_text(self, target: Target, key: str, schedule: Any) -> str:
        from ..kernels.block import conv as block
        from ..kernels.simt import conv as simt

        dtype, nd, _, _, layouts, *_ = key.split()
        first, second = layouts.split("-")
        if target.schedule_class == "simt":
            last = first == "last"
            return simt.conv(
                target,
                schedule,
                "forward",
                dtype,
                dtype,
                int(nd[0]),
                False,
                not last,
                "k" if last else "r",
                second == "last",
            ).source
        precision = "" if second == "half" else second
        split = schedule.splits > 1
        return block.last(
            target, schedule.schedule, dtype, dtype, int(nd[0]), first == "run", precision, "n", block.Epilogue(), split
        ).source


class Rows(Template):
    """Reductions of rows. Key: what is computed, dtypes and stride classes of results and operands, reduced dimensions, floor(log2) of a
    row's length and of the number of rows. Sizes: a row's length, rows. There are scratch calls for contiguous rows of a matrix."""

    name = "rows"
    CALLS: ClassVar[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "sum": lambda x: x.sum(-1),
    }

    def problem(self, device: int, key: str, sizes: Sequence[int], exact: bool = False) -> Problem:
        what, operands, reduced, *_ = key.split()
        dtype = next((d for d in TORCH if operands.startswith(d)), "")
        if what not in self.CALLS or reduced != "r1" or len(sizes) > 2 or not dtype:
            raise NotImplementedError(f"rows {key}")
        where, function = torch.device("spiral", device), self.CALLS[what]
        x = scratch((*reversed(sizes),), TORCH[dtype], where, 1)
        problem: Problem

        def call() -> None:
            problem.outputs[:] = [function(x)]

        def truth() -> list[torch.Tensor]:
            return [function(x.cpu().double())]

        problem = Problem(
            self.name,
            key,
            tuple(sizes),
            where,
            dtype,
            [x],
            [],
            [],
            call,
            truth if exact else None,
            TOLERANCE[dtype],
            *self.work(key, sizes),
        )
        return problem

    def work(self, key: str, sizes: Sequence[int]) -> tuple[float, float]:
        count = math.prod(sizes)
        moved = 2 * count if "softmax" in key.split()[0] else count
        return 0.0, float(moved * (4 if key.split()[1].startswith("f32") else 2))

    def ragged(self, problem: Problem) -> Problem:
        length, *rows = problem.sizes
        return self.problem(
            problem.device.index, problem.key, (min(length, 5003), *(min(n, 77) for n in rows)), exact=True
        )

    def seconds(self, problem: Problem, schedule: Any, roofline: Roofline) -> float:
        """A memory's time, longer where there are too few workgroups or lanes."""
        target = Target.of(problem.device.index)
        length, rows = problem.sizes[0], math.prod(problem.sizes[1:])
        workgroups = rows * schedule.pieces / (64 if schedule.kind == "invocation" else 1)
        idle = max(1.0, target.compute_units * (1 if target.schedule_class == "vector" else 4) / max(workgroups, 1))
        scattered = 4.0 if schedule.kind == "invocation" and length > 64 else 1.0
        return problem.bytes / roofline.bandwidth * idle * scattered + LAUNCH_SECONDS * (1 + (schedule.pieces > 1))

    def kernel_text(self, target: Target, key: str, schedule: Any) -> str:
        """Of a sum of such rows: the loops are those of all row kernels."""
        from ..kernels.nest import Operand, rows, split_rows

        kind = None if schedule.kind == "auto" else schedule.kind
        make: Any = split_rows if schedule.pieces > 1 else rows
        outs, ins = [Operand("out", "f32", ("0", "s"))], [Operand("x", "f32", ("1", "s"))]
        nest = make(target, "probe", outs, ins, lambda r, x: r.sum(x), schedule=kind)
        return nest.first.kernel.source + nest.second.kernel.source if schedule.pieces > 1 else nest.kernel.source


TEMPLATES: dict[str, Template] = {t.name: t for t in (Gemm(), Attention(), Conv(), Rows())}


def template(name: str) -> Template:
    if name not in TEMPLATES:
        raise NotImplementedError(f"the tuner has no scratch calls for {name}")
    return TEMPLATES[name]


@functools.cache
def kernel_hash(device: int, name: str, key: str, schedule: Any) -> str:
    """Of the schedule's kernel and what it is compiled by."""
    text = template(name).kernel_text(Target.of(device), key, schedule)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
