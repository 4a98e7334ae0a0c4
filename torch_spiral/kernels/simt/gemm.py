"""Matrix products of the `simt` class: tiled GEMM, skinny products (decode), the reduction of split-K partials.

C[z, m, n] = epilogue(sum over k of A[z, m, k] * B[z, k, n]), z < batch. Sizes and strides are run-time scalars (u32,
elements);
a batch stride of 0 broadcasts. f16 and bf16 accumulate in f32.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernel import Kernel, Target, Unsupported
from . import (
    ACCUMULATOR,
    COMPONENTS,
    MAX_GROUPS,
    NO_EPILOGUE,
    Epilogue,
    Text,
    cdiv,
    epilogue_name,
    operand_layouts,
    write_epilogue,
)


@dataclass(frozen=True)
class Schedule:
    """A workgroup computes tile_m x tile_n elements of C, tile_k at a time; an invocation thread_m x thread_n of them.

    lanes: width of a 32-invocation block of the workgroup, in invocations along n (0: rows of the workgroup).
    prefetch: the next tile is loaded into registers while the current one is multiplied.
    chunk: products are summed in runs of `chunk` along k, and the runs added in a second accumulator (0: one
    accumulator, as cuBLAS has it). It cuts the error of a long sum to a third, that of torch.mm on CPUs, and costs the
    registers of a second workgroup.
    unroll: steps of k written out (0: tile_k); fewer compile faster, which counts where compiling takes seconds
    (lavapipe).
    paired: neighbours of a workgroup's invocations alternate along m, then along n, so that both operands' fragments are shared by
    neighbours: NVIDIA's shared memory then serves 16 invocations at a time where it served 8.
    slices: invocations are dealt to as many slices of each tile along k, whose sums are added at the end.
    raster: tiles are taken in bands of as many rows of tiles (0: row by row), whose operands stay in the cache.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    thread_m: int
    thread_n: int
    lanes: int = 0
    prefetch: bool = True
    chunk: int = 32
    unroll: int = 0
    paired: bool = False
    slices: int = 1
    raster: int = 0

    @property
    def lanes_of_slice(self) -> int:
        """Invocations that compute the tile together, of a slice of k."""
        return (self.tile_m // self.thread_m) * (self.tile_n // self.thread_n)

    @property
    def threads(self) -> int:
        return self.lanes_of_slice * self.slices

    @property
    def key(self) -> str:
        text = f"{self.tile_m}x{self.tile_n}x{self.tile_k}_{self.thread_m}x{self.thread_n}"
        return (
            text
            + (f"_w{self.lanes}" if self.lanes else "")
            + ("_p" if self.prefetch else "")
            + f"_c{self.chunk}"
            + (f"_u{self.unroll}" if self.unroll else "")
            + ("_q" if self.paired else "")
            + (f"_x{self.slices}" if self.slices > 1 else "")
            + (f"_r{self.raster}" if self.raster else "")
        )

    def workgroup_memory(self, itemsize: int = 4) -> int:
        """Bytes, at most (one vector of padding a row of A and of B)."""
        return itemsize * self.tile_k * (self.tile_m + 4 + self.tile_n + 4)

    def fits(self, target: Target, itemsize: int = 4) -> bool:
        return (
            self.threads <= target.max_workgroup_size and self.workgroup_memory(itemsize) <= target.max_workgroup_memory
        )


# What a tuner may choose from, for float32, float16 and bfloat16 storage. The first is the reference.
SCHEDULES: tuple[Schedule, ...] = (
    Schedule(32, 32, 16, 4, 4, prefetch=False, unroll=1),
    Schedule(32, 32, 16, 4, 4),
    Schedule(64, 64, 16, 4, 4),
    Schedule(64, 64, 16, 8, 8, prefetch=False),
    Schedule(64, 64, 16, 8, 4),
    Schedule(64, 128, 16, 4, 8),
    Schedule(128, 64, 16, 8, 4),
    Schedule(64, 128, 16, 8, 8),
    Schedule(128, 128, 16, 8, 8, lanes=16),
    Schedule(128, 128, 8, 8, 8, lanes=16),
    Schedule(128, 128, 16, 8, 8, lanes=8),
    Schedule(128, 256, 8, 8, 16, lanes=8),
    Schedule(256, 128, 8, 16, 8, lanes=8),
    Schedule(128, 128, 16, 8, 8, lanes=8, chunk=0, paired=True, raster=4),
    Schedule(128, 256, 8, 8, 16, lanes=8, chunk=0, paired=True),
    Schedule(64, 128, 16, 8, 8, lanes=8, chunk=0, paired=True, slices=2),
)
# Software adapters (lavapipe): larger register tiles; unrolling triples the time of compiling (0.9 to 2.9 s) and
# gains nothing.
SOFTWARE = Schedule(64, 64, 16, 8, 8, prefetch=False, unroll=1)
# float64 and integers: no second accumulator.
WIDE_SCHEDULE = Schedule(32, 32, 8, 4, 4, prefetch=False, chunk=0, unroll=1)


def default_schedule(target: Target, dtype: str, m_bucket: int, n_bucket: int, whole: bool = False) -> Schedule:
    """A schedule by size buckets (floor(log2) of m and n), within the target's limits. whole: without slices."""
    if ACCUMULATOR[dtype] != "f32":
        return WIDE_SCHEDULE
    area = m_bucket + n_bucket
    if target.software:
        return SOFTWARE if area >= 12 and SOFTWARE.fits(target) else SCHEDULES[0]
    nvidia = target.language == "opencl" and "NVIDIA" in target.vendor  # whose invocations may have 255 registers
    if min(m_bucket, n_bucket) >= 10 and area >= 22 and nvidia:
        wanted = Schedule(128, 256, 8, 8, 16, lanes=8, chunk=0, paired=True)
    elif area >= 22:
        wanted = Schedule(128, 128, 16, 8, 8, lanes=8, chunk=0, paired=True, raster=4)
    elif area >= 19 and (nvidia or n_bucket >= m_bucket) and n_bucket >= 7:
        if nvidia and whole:
            wanted = Schedule(64, 128, 16, 4, 8, lanes=8, chunk=0, paired=True)
        else:  # Vulkan's compilers do worse with slices
            wanted = Schedule(64, 128, 16, 8, 8, lanes=8, chunk=0, paired=True, slices=2 if nvidia else 1)
    elif area >= 19:
        wanted = Schedule(128, 64, 16, 8, 4, lanes=8, chunk=0, paired=True)
    elif area >= 15:
        wanted = Schedule(64, 64, 16, 4, 4, lanes=8, chunk=0, paired=True)
    else:
        wanted = Schedule(32, 32, 16, 4, 4, lanes=8, chunk=0, paired=True)
    return wanted if wanted.fits(target) else SCHEDULES[0]


def default_splits(target: Target, schedule: Schedule, m: int, n: int, batch: int, k: int) -> int:
    """Splits of k that fill the device where m * n alone does not: tiles * splits reaches a workgroup a compute unit (two
    where the engine guesses their number), each split has at least 256 of k. Plain ints: the caller passes representative
    sizes of its buckets."""
    tiles = max(1, cdiv(m, schedule.tile_m) * cdiv(n, schedule.tile_n) * batch)
    units = target.compute_units * (2 if target.language == "wgsl" else 1)
    return max(1, min(units // tiles, k // 256, 64))


@dataclass(frozen=True)
class Choice:
    """How a product is computed: the tiles, and into how many runs the reduction is cut."""

    schedule: Schedule
    splits: int = 1

    def __str__(self) -> str:
        return f"{self.schedule.key}/{self.splits}"


def candidates(target: Target, dtype: str, m: int, n: int, k: int, batch: int) -> list[Choice]:
    """What a tuner may choose from for about these sizes."""
    if ACCUMULATOR[dtype] != "f32":
        return []
    software = target.compute_units <= 4
    shapes = [
        (tm, tn, tk, rm, rn)
        for tm in (32, 64, 128, 256)
        for tn in (32, 64, 128, 256)
        for tk in (8, 16)
        for rm, rn in ((4, 4), (8, 4), (4, 8), (8, 8), (16, 8), (8, 16))
        if 64 <= tm // rm * (tn // rn) <= 256 and max(tm, tn) <= 4 * min(tm, tn)
    ]
    found = []
    for tm, tn, tk, rm, rn in shapes:
        lanes_m, lanes_n = tm // rm, tn // rn
        widths = [0, *(w for w in (8, 16) if lanes_n % w == 0 and lanes_m % (32 // w) == 0)]
        for lanes in [0] if software else widths:
            for prefetch in (False,) if software else (True, False):
                for chunk in (0, 32, 64):
                    if rm * rn * (2 if chunk else 1) > 128:  # registers
                        continue
                    s = Schedule(tm, tn, tk, rm, rn, lanes, prefetch, chunk, 1 if software else 0, paired=lanes > 0)
                    if s.fits(target):
                        found += [
                            Choice(s, splits) for splits in split_counts(target, cdiv(m, tm) * cdiv(n, tn) * batch, k)
                        ]
    return found


def split_counts(target: Target, tiles: int, k: int) -> list[int]:
    """Into how many runs a reduction may be cut: powers of two up to 4 workgroups a compute unit, each of at least 128."""
    counts = [1]
    while counts[-1] * 2 * tiles <= 4 * target.compute_units and k // (counts[-1] * 2) >= 128 and counts[-1] < 64:
        counts.append(counts[-1] * 2)
    return counts


class TileLoader:
    """Moves a tile X[row, k] of `rows` x `tile_k` elements to shared memory, k-major: shared[k * pitch + row / 4],
    vec4.

    unit: the dimension along which consecutive invocations load ("k" or "r"). vec: that dimension has stride 1 and
    size, strides and offset divisible by 4: loads are vec4. Rows beyond the end are clamped: they load data
    of rows that exist, and their products are never stored. k beyond the end loads zeros unless full_k.
    """

    def __init__(
        self,
        t: Text,
        buffer: str,
        shared: str,
        rows: int,
        tile_k: int,
        unit: str,
        vec: bool,
        unit_stride: bool,
        full_k: bool,
        pitch: int = 0,
    ):
        self.t, self.buffer, self.shared, self.rows, self.tile_k = t, buffer, shared, rows, tile_k
        self.unit, self.vec, self.unit_stride, self.full_k = unit, vec, unit_stride, full_k
        self.dtype = ACCUMULATOR[t.decl(buffer).dtype]
        width = 4 if vec else 1
        count, threads = rows * tile_k // width, t.threads
        self.loads = cdiv(count, threads)
        self.partial = count % threads != 0  # the last load is of some invocations only
        self.count = count
        self.pitch = pitch or rows // 4 + (1 if unit == "k" else 0)
        self.width = width
        self.size = tile_k * self.pitch

    def declare(self) -> None:
        self.t.shared(self.shared, self.dtype, self.size)

    def place(self, step: int) -> tuple[str, str]:
        """(row, k) of this invocation's l-th load, within the tile."""
        e = f"(lid + {step * self.t.threads}u)" if step else "lid"
        if self.unit == "k":
            per = self.tile_k // self.width
            return f"({e} / {per}u)", f"({e} % {per}u)" + (" * 4u" if self.vec else "")
        per = self.rows // self.width
        return f"({e} % {per}u)" + (" * 4u" if self.vec else ""), f"({e} / {per}u)"

    def begin(self, base: str, row0: str, rows_end: str, stride_r: str, stride_k: str, k_begin: str) -> None:
        """Once per tile of C: where each load starts. row0 + row is clamped below rows_end."""
        t, p = self.t, self.shared
        self.base, self.stride_r, self.stride_k = base, stride_r, stride_k
        unit_r, unit_k = self.unit_stride and self.unit == "r", self.unit_stride and self.unit == "k"
        for step in range(self.loads):
            row, k = self.place(step)
            last = f"{rows_end} - {4 if self.vec and self.unit == 'r' else 1}u"
            t.let(f"{p}_r{step}", f"min({row0} + {row}, {last})")
            if not self.full_k or self.partial:
                t.let(f"{p}_k{step}", k)
            r = f"{p}_r{step}" if unit_r else f"{p}_r{step} * {stride_r}"
            kk = f"({k_begin} + {k})" if unit_k else f"({k_begin} + {k}) * {stride_k}"
            t.var(f"{p}_i{step}", f"{r} + {kk}")
            t.var(f"{p}_v{step}", t.zero(self.dtype, self.width), self.dtype, self.width)

    def load(self, k0: str, k_end: str) -> None:
        """Loads this invocation's share of the tile at k0 into registers and moves on by a tile."""
        t, p = self.t, self.shared
        advance = f"{self.tile_k}u" if self.unit_stride and self.unit == "k" else f"{self.tile_k}u * {self.stride_k}"
        for step in range(self.loads):
            conditions = []
            if not self.full_k:
                conditions.append(f"{k0} + {p}_k{step} < {k_end}")
            if self.partial and step == self.loads - 1:
                conditions.append(
                    f"{p}_k{step} < {self.tile_k}u" if self.unit == "r" else f"lid < {self.count - step * t.threads}u"
                )
            value = t.load(self.buffer, self.base, f"{p}_i{step}", self.width)
            if conditions:
                t.add(f"{p}_v{step} = {t.zero(self.dtype, self.width)};")
                t.open(" && ".join(conditions))
                t.add(f"{p}_v{step} = {t.load(self.buffer, self.base, f'{p}_i{step}', self.width)};")
                t.end()
            else:
                t.add(f"{p}_v{step} = {value};")
            t.add(f"{p}_i{step} += {advance};")

    def store(self) -> None:
        """Registers to shared memory."""
        t, p = self.t, self.shared
        for step in range(self.loads):
            row, k = self.place(step)
            guarded = self.partial and step == self.loads - 1
            if guarded:
                t.open(f"lid < {self.count - step * t.threads}u")
            if self.vec and self.unit == "r":
                t.add(f"{p}[{k} * {self.pitch}u + {row} / 4u] = {p}_v{step};")
            elif self.vec:
                for j, c in enumerate(COMPONENTS):
                    t.put_component(
                        p, f"({k} + {j}u) * {self.pitch}u + {row} / 4u", f"({row} % 4u)", f"{p}_v{step}.{c}", self.dtype
                    )
            else:
                t.put_component(p, f"{k} * {self.pitch}u + {row} / 4u", f"({row} % 4u)", f"{p}_v{step}", self.dtype)
            if guarded:
                t.end()


class Accumulators:
    """thread_m x thread_n named accumulators (vec4 along n), rows in groups of 4 that are 4 * lanes_m apart."""

    def __init__(self, t: Text, name: str, thread_m: int, thread_n: int, dtype: str, chunked: bool = False):
        self.t, self.name, self.m, self.v, self.dtype, self.chunked = t, name, thread_m, thread_n // 4, dtype, chunked

    def declare(self) -> None:
        for m in range(self.m):
            for v in range(self.v):
                self.t.var(f"{self.name}{m}_{v}", self.t.zero(self.dtype, 4), self.dtype, 4)
                if self.chunked:
                    self.t.var(f"{self.name}s{m}_{v}", self.t.zero(self.dtype, 4), self.dtype, 4)

    def each(self):
        return ((m, v) for m in range(self.m) for v in range(self.v))

    def fold(self) -> None:
        """Adds the run that ended to the second accumulator."""
        for m, v in self.each():
            self.t.add(f"{self.name}s{m}_{v} += {self.name}{m}_{v};")
            self.t.add(f"{self.name}{m}_{v} = {self.t.zero(self.dtype, 4)};")

    def finish(self) -> None:
        if self.chunked:
            for m, v in self.each():
                self.t.add(f"{self.name}{m}_{v} += {self.name}s{m}_{v};")

    def multiply(
        self,
        a: str,
        pitch_a: int,
        lanes_m: int,
        b: str,
        pitch_b: int,
        lanes_n: int,
        tile_k: int,
        ty="ty",
        tx="tx",
        unroll: int = 0,
    ) -> None:
        """self += a^T b over tile_k rows of the shared tiles a[k][m / 4] and b[k][n / 4]."""
        t = self.t
        looped = 0 < unroll < tile_k
        if looped:
            t.loop("kk", "0u", f"{tile_k}u", f"{unroll}u")
            ty, tx = t.let("ka", f"kk * {pitch_a}u + {ty}"), t.let("kb", f"kk * {pitch_b}u + {tx}")
        for k in range(unroll if looped else tile_k):
            t.open()
            for i in range(self.m // 4):
                t.let(f"a{i}", f"{a}[{k * pitch_a + i * lanes_m}u + {ty}]", self.dtype, 4)
            for v in range(self.v):
                t.let(f"b{v}", f"{b}[{k * pitch_b + v * lanes_n}u + {tx}]", self.dtype, 4)
            for m, v in self.each():
                c = f"{self.name}{m}_{v}"
                t.add(f"{c} = {t.fma(t.splat(f'a{m // 4}.{COMPONENTS[m % 4]}', self.dtype), f'b{v}', c, self.dtype)};")
            t.end()
        if looped:
            t.end()


def thread_layout(t: Text, lanes_n: int, lanes_m: int, lanes: int, paired: bool = False, lid: str = "lid") -> None:
    """tx < lanes_n, ty < lanes_m of this invocation, the lid'th."""
    if paired:  # four neighbours are two along m by two along n
        width = lanes or 8
        assert lanes_n % width == 0 and lanes_m % (32 // width) == 0 and width in (4, 8, 16)
        t.let("block", f"{lid} / 32u")
        t.let("four", f"{lid} % 32u / 4u")
        t.let("tx", f"(block % {lanes_n // width}u) * {width}u + four % {width // 2}u * 2u + {lid} / 2u % 2u")
        t.let("ty", f"(block / {lanes_n // width}u) * {32 // width}u + four / {width // 2}u * 2u + {lid} % 2u")
    elif lanes:
        high = 32 // lanes
        t.let("lane", f"{lid} % 32u")
        t.let("block", f"{lid} / 32u")
        t.let("tx", f"(block % {lanes_n // lanes}u) * {lanes}u + lane % {lanes}u")
        t.let("ty", f"(block / {lanes_n // lanes}u) * {high}u + lane / {lanes}u")
    else:
        t.let("tx", f"{lid} % {lanes_n}u")
        t.let("ty", f"{lid} / {lanes_n}u")


class Output:
    """Applies an epilogue and stores: declares the result, the epilogue's operands and factors."""

    def __init__(
        self, t: Text, dtype: str, accumulator: str, vec: bool, unit: bool, epilogue: Epilogue, name: str = "c"
    ):
        self.t, self.dtype, self.acc, self.vec, self.unit, self.epilogue, self.c = (
            t,
            dtype,
            accumulator,
            vec,
            unit,
            epilogue,
            name,
        )
        self.operands = operand_layouts(epilogue)
        self.factors = epilogue.factors(accumulator)

    def declare_buffers(self) -> None:
        vector = 4 if self.vec else 1
        for i, (dtype, layout) in enumerate(self.operands):
            self.t.buffer(f"x{i}", dtype, "r", vector if layout == "v" else 1)
        self.t.buffer(self.c, self.dtype, "w", vector)

    def declare_scalars(self) -> None:
        """Strides of the result, then of each operand, then the epilogue's factors."""
        for name in (self.c, *(f"x{i}" for i in range(len(self.operands)))):
            self.t.scalar(f"{name}_batch", f"{name}_row", f"{name}_col")
        for name, dtype in self.factors:
            self.t.scalar(name, type=dtype)
        if self.epilogue.steps:
            write_epilogue(self.t, self.epilogue, self.acc)

    def begin(self, z: str) -> None:
        t = self.t
        t.base(f"{self.c}_base", self.c, (z, f"{self.c}_batch"))
        for i in range(len(self.operands)):
            t.base(f"x{i}_base", f"x{i}", (z, f"x{i}_batch"))

    def apply(self, acc: str, loads: list[str]) -> str:
        if not self.epilogue.steps:
            return acc
        return f"epilogue({', '.join([acc, *loads, *(n for n, _ in self.factors)])})"

    def store4(self, row: str, col: str, value: str, rows: str, cols: str) -> None:
        """Stores the vec4 `value` at (row, col ..< col + 4), masked by rows and cols."""
        t = self.t
        index = (
            (lambda c: f"{row} * {self.c}_row + {c}")
            if self.unit
            else (lambda c: f"{row} * {self.c}_row + ({c}) * {self.c}_col")
        )
        if self.vec:
            t.open(f"{row} < {rows} && {col} < {cols}")
            loads: list[list[str]] = [[] for _ in range(4)]
            for i, (dtype, layout) in enumerate(self.operands):
                n = t.fresh("x")
                if layout == "v":
                    t.let(n, t.load(f"x{i}", f"x{i}_base", f"{row} * x{i}_row + {col}", 4), ACCUMULATOR[dtype], 4)
                    for j in range(4):
                        loads[j].append(f"{n}.{COMPONENTS[j]}")
                elif layout == "r":
                    t.let(n, t.load(f"x{i}", f"x{i}_base", f"{row} * x{i}_row"), ACCUMULATOR[dtype])
                    for j in range(4):
                        loads[j].append(n)
                else:
                    for j in range(4):
                        loads[j].append(t.load(f"x{i}", f"x{i}_base", f"{row} * x{i}_row + ({col} + {j}u) * x{i}_col"))
            if self.epilogue.steps:
                value = t.vector(
                    [self.apply(f"{value}.{c}", x) for c, x in zip(COMPONENTS, loads, strict=True)], self.acc
                )
            t.store(self.c, f"{self.c}_base", index(col), value, 4)
            t.end()
            return
        for j, c in enumerate(COMPONENTS):
            self.store1(row, f"({col} + {j}u)", f"{value}.{c}", rows, cols)

    def store1(self, row: str, col: str, value: str, rows: str, cols: str) -> None:
        t = self.t
        t.open(f"{row} < {rows} && {col} < {cols}")
        x = []
        for i, (_, layout) in enumerate(self.operands):
            at = f"{row} * x{i}_row" + ("" if layout == "r" else f" + {col} * x{i}_col")
            x.append(t.load(f"x{i}", f"x{i}_base", at))
        at = f"{row} * {self.c}_row + {col}" + ("" if self.unit else f" * {self.c}_col")
        t.store(self.c, f"{self.c}_base", at, self.apply(value, x))
        t.end()


def groups(schedule: Schedule, m, n, batch, splits=1, minimum=min):
    """Grid of gemm(): one workgroup a tile of C (and split), at most 65535, which then take several. Ints or Syms
    (with the Sym `minimum`)."""
    return (minimum(cdiv(m, schedule.tile_m) * cdiv(n, schedule.tile_n) * batch * splits, MAX_GROUPS), 1, 1)


def k_span(schedule: Schedule, k, splits):
    """k of one split, a multiple of the schedule's tile_k and chunk."""
    step = max(schedule.tile_k, schedule.chunk)
    return cdiv(cdiv(k, splits), step) * step


def gemm(
    target: Target,
    schedule: Schedule,
    dtype: str,
    out_dtype: str,
    a: str = "n",
    b: str = "n",
    c: str = "n",
    vec_a: bool = False,
    vec_b: bool = False,
    vec_c: bool = False,
    full_k: bool = False,
    split: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
    b_dtype: str = "",
    windows: tuple[int, int] = (1, 1),
    grouped: str = "",
) -> Kernel:
    """C = epilogue(A B), batched.

    Layouts: a "n" has stride 1 along k, "t" along m, "s" neither; b "n" has stride 1 along n, "t" along k, "s" neither;
    c "n" has stride 1 along n, "s" any. vec_*: the unit-stride dimension's size, the other strides and the element
    offset are
    divisible by 4 (a: k or m, b: n or k, c: n). full_k: k is divisible by tile_k (8 or 16).
    split: C is partial sums, f32 (or the accumulator), of `splits` runs of k_span(...) along k, partial p of batch z
    at p * c_split;
    no epilogue: split_reduce() applies it.
    dtype, b_dtype: storage of A and of B (default: the same); accumulation in f32 for f32, f16, bf16, else dtype.
    windows: bindings of A and B (WGSL buffers larger than max_binding).

    grouped: the items of the batch are groups, that the ends in the buffer offs (int32) cut out of one matrix: of the rows of A
    and of C ("rows"), or of the reduction ("k"). Ends that lie beyond the matrix, or before their predecessor, are moved there.

    Buffers: a, b, epilogue operands, c, with grouped offs.
    Scalars (u32): batch, m, n, k, a_batch, a_row, a_col, b_batch, b_row, b_col, c_batch, c_row, c_col, per epilogue
    operand its
    batch, row, col (all three, 0 where it does not vary), then the epilogue's factors (Epilogue.factors; 64-bit ones
    travel first);
    with split instead: c_batch, c_row, c_col, splits, k_span, c_split. vec_c asks the same alignment of operands "n"
    and "mn". All sizes are at least 1; for k = 0 fill instead.
    Grid: groups(schedule, m, n, batch[, splits]), grouped_groups for groups of rows.
    """
    s, b_dtype = schedule, b_dtype or dtype
    acc = ACCUMULATOR[dtype]
    if ACCUMULATOR[b_dtype] != acc:
        raise Unsupported(f"gemm of {dtype} and {b_dtype}")
    if split:
        out_dtype, epilogue = acc, NO_EPILOGUE
    flags = "".join("v" if v else "s" for v in (vec_a, vec_b, vec_c)) + ("f" if full_k else "")
    flags += "_split" if split else ""
    name = f"gemm_{dtype}_{b_dtype}_{out_dtype}_{a}{b}{c}_{flags}_{s.key}{epilogue_name(epilogue)}"
    if windows != (1, 1):
        name += f"_w{windows[0]}{windows[1]}"
    if grouped:
        assert not split and not (full_k and grouped == "k")
        name += f"_by_{grouped}"
    if (vec_a and a == "s") or (vec_b and b == "s") or (vec_c and c == "s"):
        raise ValueError(f"{name}: vec4 access needs a unit stride")
    t = Text(target, name, s.threads)
    wide = acc in ("f64", "i64") and t.wgsl
    vec_a, vec_b, vec_c = vec_a and not wide, vec_b and not wide, vec_c and not wide
    t.buffer("a", dtype, "r", 4 if vec_a else 1, windows[0])
    t.buffer("b", b_dtype, "r", 4 if vec_b else 1, windows[1])
    out = Output(t, out_dtype, acc, vec_c, c == "n", epilogue)
    out.declare_buffers()
    if grouped:
        t.buffer("offs", "i32")
    t.scalar("batch", "m", "n", "k", "a_batch", "a_row", "a_col", "b_batch", "b_row", "b_col")
    if split:
        t.scalar("c_batch", "c_row", "c_col", "splits", "k_span", "c_split")
    else:
        out.declare_scalars()

    lanes_n, lanes_m = s.tile_n // s.thread_n, s.tile_m // s.thread_m
    la = TileLoader(t, "a", "ta", s.tile_m, s.tile_k, "r" if a == "t" else "k", vec_a, a != "s", full_k)
    lb = TileLoader(t, "b", "tb", s.tile_n, s.tile_k, "k" if b == "t" else "r", vec_b, b != "s", full_k)
    la.declare()
    lb.declare()
    chunked = s.chunk > 0 and acc == "f32"
    c_acc = Accumulators(t, "c", s.thread_m, s.thread_n, acc, chunked)

    lid = "lid"
    if s.slices > 1:
        t.let("slice_k", f"lid / {s.lanes_of_slice}u")
        lid = t.let("slice_lid", f"lid % {s.lanes_of_slice}u")
    thread_layout(t, lanes_n, lanes_m, s.lanes, s.paired, lid)
    t.let("tiles_n", f"(n + {s.tile_n - 1}u) / {s.tile_n}u")
    t.let("tiles_m", f"(m + {s.tile_m - 1}u) / {s.tile_m}u")
    if grouped == "rows":  # each group may have a tile that is not full
        t.let("tiles", "(tiles_m + batch) * tiles_n")
    else:
        t.let("tiles", "tiles_m * tiles_n * batch" + (" * splits" if split else ""))
    # A loop also where each workgroup has one tile: without it NVIDIA's OpenCL compiler makes code that is 7 % slower.
    t.loop("tile", t.group, "tiles", t.groups)
    rows_end = "m"
    if s.raster and not grouped:
        t.let("in_matrix", "tile % (tiles_n * tiles_m)")
        t.let("band", f"in_matrix / ({s.raster}u * tiles_n) * {s.raster}u")
        t.let("band_rows", f"min(tiles_m - band, {s.raster}u)")
        t.let("in_band", f"in_matrix % ({s.raster}u * tiles_n)")
        t.let("row0", f"(band + in_band % band_rows) * {s.tile_m}u")
        t.let("col0", f"in_band / band_rows * {s.tile_n}u")
    else:
        t.let("col0", f"(tile % tiles_n) * {s.tile_n}u")
        if not grouped:
            t.let("row0", f"((tile / tiles_n) % tiles_m) * {s.tile_m}u")
    if grouped:
        rows_end = _find_group(t, grouped, s.tile_m)
        t.open("z < batch")
    if split:
        t.let("zs", "tile / (tiles_n * tiles_m)")
        t.let("part", "zs % splits")
        t.let("z", "zs / splits")
        t.let("k_begin", "min(part * k_span, k)")
        t.let("k_end", "min(k_begin + k_span, k)")
    elif not grouped:
        t.let("z", "tile / (tiles_n * tiles_m)")
        t.let("k_begin", "0u")
        t.let("k_end", "k")
    t.base("a_base", "a", ("z", "a_batch"))
    t.base("b_base", "b", ("z", "b_batch"))
    la.begin("a_base", "row0", rows_end, "a_row", "a_col", "k_begin")
    lb.begin("b_base", "col0", "n", "b_col", "b_row", "k_begin")
    c_acc.declare()
    if s.prefetch:
        t.open("k_begin < k_end")
        la.load("k_begin", "k_end")
        lb.load("k_begin", "k_end")
        t.end()
    if chunked:
        t.var("run", "0u")
    t.loop("k0", "k_begin", "k_end", f"{s.tile_k}u")
    if not s.prefetch:
        la.load("k0", "k_end")
        lb.load("k0", "k_end")
    la.store()
    lb.store()
    # OpenCL compilers move loads down to where they are used, behind the products, but across no barrier: NVIDIA's takes 0.79 of the
    # time for 128 x 256 tiles. Vulkan's leave loads where they are, and do better with them after the barrier.
    early = not t.wgsl
    if not early:
        t.barrier()
    if s.prefetch:
        t.let("k1", f"k0 + {s.tile_k}u")
        t.open("k1 < k_end")
        la.load("k1", "k_end")
        lb.load("k1", "k_end")
        t.end()
    if early:
        t.barrier()
    ta, tb = ("ta", "ty"), ("tb", "tx")
    steps = s.tile_k // s.slices
    if s.slices > 1:
        ta = t.shared_base("ta_at", "ta", f"slice_k * {steps * la.pitch}u + ty", acc)
        tb = t.shared_base("tb_at", "tb", f"slice_k * {steps * lb.pitch}u + tx", acc)
    c_acc.multiply(ta[0], la.pitch, lanes_m, tb[0], lb.pitch, lanes_n, steps, ta[1], tb[1], s.unroll)
    if chunked:
        runs = s.chunk // s.tile_k
        if runs > 1:
            t.add("run += 1u;")
            t.open(f"run % {runs}u == 0u")
        c_acc.fold()
        if runs > 1:
            t.end()
    t.barrier()
    t.end()
    c_acc.finish()
    if s.slices > 1:
        _add_slices(t, s, c_acc, lb)
        t.open("slice_k == 0u")
    if split:
        t.base("c_base", "c", ("z", "c_batch"), ("part", "c_split"))
    else:
        out.begin("z")
    for mm, v in c_acc.each():
        t.open()
        t.let("row", f"row0 + {(mm // 4) * lanes_m * 4 + mm % 4}u + ty * 4u")
        t.let("col", f"col0 + ({v * lanes_n}u + tx) * 4u")
        out.store4("row", "col", f"c{mm}_{v}", rows_end, "n")
        t.end()
    t.end((2 if grouped else 1) + (s.slices > 1))
    return t.finish()


def _add_slices(t: Text, s: Schedule, acc: Accumulators, lb: TileLoader) -> None:
    """Adds the sums of all slices to the first one's, through the shared memory of B's tiles."""
    at_once = lb.size // s.lanes_of_slice
    if not at_once:
        raise Unsupported(f"{t.name}: slices of {s.lanes_of_slice} invocations do not fit in a tile")
    sums = [f"{acc.name}{m}_{v}" for m, v in acc.each()]
    for other in range(1, s.slices):
        for first in range(0, len(sums), at_once):
            some = [
                (f"tb[slice_lid + {i * s.lanes_of_slice}u]", c) for i, c in enumerate(sums[first : first + at_once])
            ]
            t.open(f"slice_k == {other}u")
            t.add(*(f"{place} = {c};" for place, c in some))
            t.end()
            t.barrier()
            t.open("slice_k == 0u")
            t.add(*(f"{c} += {place};" for place, c in some))
            t.end()
            t.barrier()


def _find_group(t: Text, grouped: str, tile_m: int) -> str:
    """Declares, for a tile of a grouped product, its group z (batch where there is none), row0, k_begin and k_end; gives the end of
    its rows. One invocation looks; the others read its result from shared memory, which tells a compiler that they agree."""
    t.shared("place", "i32", 1)

    def end(index: str, last: str) -> str:
        return f"clamp({t.load('offs', 'offs_base', index)}, begin, {t.cast(last, 'i32')})"

    t.base("offs_base", "offs")
    t.barrier()
    t.open("lid == 0u")
    t.var("begin", t.cast("0", "i32"), "i32")
    found = t.vector([t.cast(x, "i32") for x in ("batch", "0", "0", "0")], "i32")
    t.add(f"place[0] = {found};")
    if grouped == "rows":
        t.let("wanted", t.cast("tile / tiles_n", "i32"), "i32")
        t.var("first", t.cast("0", "i32"), "i32")
        t.loop("g", "0u", "batch", "1u")
        t.let("last", end("g", "m"), "i32")
        t.let("count", f"(last - begin + {tile_m - 1}) / {tile_m}", "i32")
        t.open("wanted >= first && wanted < first + count")
        found = t.vector(
            [t.cast("g", "i32"), f"begin + (wanted - first) * {tile_m}", "last", t.cast("k", "i32")], "i32"
        )
        t.add(f"place[0] = {found};", "break;")
        t.end()
        t.add("first += count;", "begin = last;")
        t.end()
    else:
        t.let("g", "tile / (tiles_n * tiles_m)")
        t.loop("i", "0u", "g", "1u")
        t.add(f"begin = {end('i', 'k')};")
        t.end()
        found = t.vector([t.cast("g", "i32"), t.cast("0", "i32"), "begin", end("g", "k")], "i32")
        t.add(f"place[0] = {found};")
    t.end()
    t.barrier()
    t.let("z", t.cast("place[0].x", "u32"))
    if grouped == "rows":
        t.let("row0", t.cast("place[0].y", "u32"))
        t.let("row_end", t.cast("place[0].z", "u32"))
        t.let("k_begin", "0u")
        t.let("k_end", "k")
        return "row_end"
    t.let("row0", f"((tile / tiles_n) % tiles_m) * {tile_m}u")
    t.let("k_begin", t.cast("place[0].z", "u32"))
    t.let("k_end", t.cast("place[0].w", "u32"))
    return "m"


def grouped_groups(schedule: Schedule, m, n, count, minimum=min):
    """Grid of gemm() for `count` groups of rows."""
    return (minimum((cdiv(m, schedule.tile_m) + count) * cdiv(n, schedule.tile_n), MAX_GROUPS), 1, 1)


def split_reduce(
    target: Target, acc: str, out_dtype: str, c: str = "n", vec_c: bool = False, epilogue: Epilogue = NO_EPILOGUE
) -> Kernel:
    """C[z, m, n] = epilogue(sum over i < splits of P[z * p_batch + i * p_split + m * p_row + n]), P in the
    accumulator dtype acc.

    c, vec_c, epilogue: as in gemm(); vec_c needs n and P's strides divisible by 4.
    Buffers: p, epilogue operands, c. Scalars (u32): batch, m, n, splits, p_batch, p_split, p_row, c_batch, c_row,
    c_col, per operand batch, row, col;
    factors.
    Grid: reduce_groups(m, n, batch). Partials: batch * splits * m * n elements.
    """
    name = f"gemm_reduce_{acc}_{out_dtype}_{c}{'v' if vec_c else 's'}{epilogue_name(epilogue)}"
    t = Text(target, name, 64)
    vec_c = vec_c and not (t.wgsl and acc in ("f64", "i64"))
    t.buffer("p", acc, "r", 4 if vec_c else 1)
    out = Output(t, out_dtype, acc, vec_c, c == "n", epilogue)
    out.declare_buffers()
    t.scalar("batch", "m", "n", "splits", "p_batch", "p_split", "p_row")
    out.declare_scalars()
    width = 4 if vec_c else 1
    t.let("columns", f"n / {width}u")
    t.let("count", "batch * m * columns")
    t.loop("e", f"{t.group} * 64u + lid", "count", f"{t.groups} * 64u")
    t.let("row", "(e / columns) % m")
    t.let("col", f"(e % columns) * {width}u")
    t.let("z", "e / (columns * m)")
    out.begin("z")
    t.base("p_base", "p", ("z", "p_batch"))
    t.var("sum", t.zero(acc, width), acc, width)
    t.loop("i", "0u", "splits", "1u")
    t.add(f"sum += {t.load('p', 'p_base', 'i * p_split + row * p_row + col', width)};")
    t.end()
    (out.store4 if vec_c else out.store1)("row", "col", "sum", "m", "n")
    t.end()
    return t.finish()


def reduce_groups(m, n, batch, minimum=min):
    """Grid of split_reduce()."""
    return (minimum(cdiv(m * n * batch, 64), MAX_GROUPS), 1, 1)


# Columns of C that a workgroup of skinny() computes, by layout of B.
SKINNY_COLUMNS = {"t": 8, "n": 64}
SKINNY_THREADS = 64


def skinny(
    target: Target,
    dtype: str,
    out_dtype: str,
    rows: int,
    b: str = "t",
    vec: bool = False,
    split: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
    b_dtype: str = "",
    windows: int = 1,
    threads: int = SKINNY_THREADS,
    group: int = 0,
    scale: str = "f32",
) -> Kernel:
    """C = epilogue(A B) for m <= rows (1, 2, 4 or 8): reads B once at memory bandwidth. A has stride 1 along k, C
    along n.

    b "t": B has stride 1 along k (a Linear's weight): 8 columns a workgroup, invocations along k.
    b "n": B has stride 1 along n: 64 columns a workgroup, 4 an invocation, the rest of the workgroup along k.
    vec: strides and offsets of A and B divisible by 4, and k (t) or n (n) divisible by 4; A need not be aligned for
    "n".
    split: as in gemm(): partials of k_span along k, for split_reduce(); k_span is a multiple of 4.
    group: B ("t", vec) is of 4 bits, dequantized as it is read: b_dtype "i32", eight weights a word, of each byte the even one in the
    high half; strides count weights. A buffer after b, of dtype `scale`, holds [k / group, n, 2]: s and z of (q - 8) * s + z.
    Buffers and scalars: those of gemm(). Grid: skinny_groups(b, n, batch[, splits]).
    """
    b_dtype = b_dtype or dtype
    acc = ACCUMULATOR[dtype]
    if split:
        out_dtype, epilogue = acc, NO_EPILOGUE
    name = f"skinny_{dtype}_{b_dtype}_{out_dtype}_{rows}{b}{'v' if vec else 's'}{'_split' if split else ''}_t{threads}"
    t = Text(target, name + epilogue_name(epilogue) + (f"_w{windows}" if windows > 1 else ""), threads)
    if group:
        assert b == "t" and vec and b_dtype == "i32" and group % 4 == 0
        t.name += f"_q4_{group}_{scale}"
    near = t.subgroup_lanes(acc) if b == "t" else 0
    near = near if near >= SKINNY_COLUMNS["t"] else 0
    if near:
        t.name += f"_subgroups{near}"
    vec = vec and not (t.wgsl and acc in ("f64", "i64"))
    width = 4 if vec else 1
    t.buffer("a", dtype, "r", width if b == "t" else 1)
    t.buffer("b", b_dtype, "r", 1 if group else width, windows)
    if group:
        t.buffer("scales", scale)
    out = Output(t, out_dtype, acc, False, True, epilogue)
    out.declare_buffers()
    t.scalar("batch", "m", "n", "k", "a_batch", "a_row", "a_col", "b_batch", "b_row", "b_col")
    if split:
        t.scalar("c_batch", "c_row", "c_col", "splits", "k_span", "c_split")
    else:
        out.declare_scalars()
    columns = SKINNY_COLUMNS[b]
    t.let("tiles_n", f"(n + {columns - 1}u) / {columns}u")
    t.loop("tile", t.group, "tiles_n * batch" + (" * splits" if split else ""), t.groups)
    t.let("col0", f"(tile % tiles_n) * {columns}u")
    if split:
        t.let("part", "(tile / tiles_n) % splits")
        t.let("z", "tile / (tiles_n * splits)")
        t.let("k_begin", "min(part * k_span, k)")
        t.let("k_end", "min(k_begin + k_span, k)")
    else:
        t.let("z", "tile / tiles_n")
        t.let("k_begin", "0u")
        t.let("k_end", "k")
    t.base("a_base", "a", ("z", "a_batch"))
    t.base("b_base", "b", ("z", "b_batch"))
    for r in range(rows):
        t.let(f"ar{r}", f"min({r}u, m - 1u) * a_row")
    if b == "t":
        lanes = threads  # along k
        for c in range(columns):
            t.let(f"bc{c}", f"min(col0 + {c}u, n - 1u) * b_col")
        for r in range(rows):
            for c in range(columns):
                t.var(f"s{r}_{c}", t.zero(acc, width), acc, width)
        if group:
            t.base("scales_base", "scales")
        t.loop("i", f"k_begin + lid * {width}u", "k_end", f"{lanes * width}u")
        for r in range(rows):
            t.let(f"a{r}", t.load("a", "a_base", f"ar{r} + i", width), acc, width)
        for c in range(columns):
            if group:
                _four_bits(t, f"b{c}", f"bc{c} + i", f"((i / {group}u) * n + min(col0 + {c}u, n - 1u)) * 2u")
            else:
                t.let(f"b{c}", t.load("b", "b_base", f"bc{c} + i", width), acc, width)
            for r in range(rows):
                t.add(f"s{r}_{c} = {t.fma(f'a{r}', f'b{c}', f's{r}_{c}', acc)};")
        t.end()
        if near:
            _skinny_sums(t, rows, columns, near, acc, vec)
        else:
            _skinny_shared_sums(t, rows, columns, acc, vec)
        t.barrier()
        t.loop("e", "lid", f"{rows * columns}u", f"{threads}u")
        total = " + ".join(f"parts[e + {j * rows * columns}u]" for j in range(threads // near)) if near else "totals[e]"
        _skinny_store(t, out, split, f"(e / {columns}u)", f"(col0 + e % {columns}u)", total)
        t.end()
        if near:
            t.barrier()
    else:
        per, lanes = 16, threads // 16  # 16 invocations along n, 4 columns each; `lanes` along k
        t.let("tx", f"lid % {per}u")
        t.let("ty", f"lid / {per}u")
        t.let("col", "col0 + tx * 4u")
        if vec:
            t.let("bc", "min(col, n - 4u)")
        else:
            for j in range(4):
                t.let(f"bc{j}", f"min(col + {j}u, n - 1u)")
        for r in range(rows):
            t.var(f"s{r}", t.zero(acc, 4), acc, 4)
        t.loop("i", "k_begin + ty", "k_end", f"{lanes}u")
        if vec:
            t.let("bv", t.load("b", "b_base", "i * b_row + bc", 4), acc, 4)
        else:
            t.let("bv", t.vector([t.load("b", "b_base", f"i * b_row + bc{j}") for j in range(4)], acc), acc, 4)
        for r in range(rows):
            t.add(f"s{r} = {t.fma(t.splat(t.load('a', 'a_base', f'ar{r} + i'), acc), 'bv', f's{r}', acc)};")
        t.end()
        t.shared("sums", acc, threads)
        for r in range(rows):
            t.add(f"sums[lid] = s{r};")
            t.barrier()
            t.open("ty == 0u")
            total = " + ".join(f"sums[{j * per}u + tx]" for j in range(lanes))
            t.let("total", f"({total})", acc, 4)
            for j, component in enumerate(COMPONENTS):
                _skinny_store(t, out, split, str(r) + "u", f"(col + {j}u)", f"total.{component}")
            t.end()
            t.barrier()
    t.end()
    return t.finish()


def _four_bits(t: Text, name: str, at: str, scales: str) -> None:
    """Declares `name`: the four weights of 4 bits from `at` on, a multiple of four; `scales`: where their s and z are."""
    word = t.cast(t.load("b", "b_base", f"({at}) / 8u"), "u32")
    bits = t.let(t.fresh(), f"{word} >> ((({at}) & 4u) * 4u)")
    place = t.let(t.fresh(), scales)
    s = t.splat(t.load("scales", "scales_base", place))
    z = t.splat(t.load("scales", "scales_base", f"{place} + 1u"))
    parts = [t.cast(f"(({bits} >> {shift}u) & 15u)", "f32") + " - 8.0f" for shift in (4, 0, 12, 8)]
    t.let(name, t.fma(t.vector(parts), s, z, "f32"), "f32", 4)


def _skinny_shared_sums(t: Text, rows: int, columns: int, acc: str, vec: bool) -> None:
    """totals[row * columns + column]: one row of C at a time, so that shared memory stays small; 64 invocations add `threads` sums by
    eighths, 8 add those."""
    threads = t.threads
    t.shared("sums", acc, columns * (threads + 1), 1)
    t.shared("eighths", acc, columns * 8, 1)
    t.shared("totals", acc, rows * columns, 1)
    for r in range(rows):
        for c in range(columns):
            value = f"s{r}_{c}"
            if vec:
                value = f"(({value}.x + {value}.y) + ({value}.z + {value}.w))"
            t.add(f"sums[{c * (threads + 1)}u + lid] = {value};")
        t.barrier()
        t.open(f"lid < {columns * 8}u")
        t.let("from_", f"(lid / 8u) * {threads + 1}u + (lid % 8u)")
        t.add(f"eighths[lid] = {' + '.join(f'sums[from_ + {8 * j}u]' for j in range(threads // 8))};")
        t.end()
        t.barrier()
        t.open(f"lid < {columns}u")
        total = " + ".join(f"eighths[lid * 8u + {j}u]" for j in range(8))
        t.add(f"totals[{r * columns}u + lid] = {total};")
        t.end()


def _skinny_sums(t: Text, rows: int, columns: int, near: int, acc: str, vec: bool) -> None:
    """parts[block][row * columns + column]: of each block of `near` lanes. Lanes first exchange halves of their columns until each has
    one (8 sums in 7 exchanges), then add up what lanes of the same column have."""
    t.declare_lane()
    t.shared("parts", acc, rows * columns * (t.threads // near), 1)
    for r in range(rows):
        sums = [f"s{r}_{c}" for c in range(columns)]
        if vec:
            sums = [f"(({v}.x + {v}.y) + ({v}.z + {v}.w))" for v in sums]
        sums = [t.let(t.fresh(), v, acc) for v in sums]
        step = columns // 2
        while step:
            upper = f"(lane & {step}u) != 0u"
            kept = [t.select(a, b, upper) for a, b in zip(sums[:step], sums[step:])]
            sent = [t.select(b, a, upper) for a, b in zip(sums[:step], sums[step:])]
            sums = [t.let(t.fresh(), f"{a} + {t.shuffle_xor(b, step)}", acc) for a, b in zip(kept, sent)]
            step //= 2
        step = columns
        while step < near:
            sums = [t.let(t.fresh(), f"{sums[0]} + {t.shuffle_xor(sums[0], step)}", acc)]
            step *= 2
        t.open(f"(lane & {near - 1}u) < {columns}u")
        t.add(f"parts[lane / {near}u * {rows * columns}u + {r * columns}u + (lane & {columns - 1}u)] = {sums[0]};")
        t.end()


def _skinny_store(t: Text, out: Output, split: bool, row: str, col: str, value: str) -> None:
    t.open()
    if split:
        t.base("c_base", "c", ("z", "c_batch"), ("part", "c_split"))
    else:
        out.begin("z")
    out.store1(row, col, value, "m", "n")
    t.end()


def skinny_groups(b: str, n, batch, splits=1, minimum=min):
    """Grid of skinny()."""
    return (minimum(cdiv(n, SKINNY_COLUMNS[b]) * batch * splits, MAX_GROUPS), 1, 1)
