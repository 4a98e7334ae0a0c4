"""Flash attention of the `simt` class: forward with logsumexp, and a deterministic backward.

Layout: q (batch, heads, queries, head), k (batch, kv_heads, keys, head), v (batch, kv_heads, keys, head_v), any
strides with stride 1
along the head dimension where `unit` says so; heads is a multiple of kv_heads (query head h reads kv head h / (heads
/ kv_heads)).
Storage f32, f16 or bf16; everything is computed in f32.

score = scale * q.k + mask. Masked: an element whose score is -inf counts nothing; a row with no element gives 0 and
logsumexp -inf.
causal: query i sees keys up to i + causal_shift (0 for torch's is_causal; keys - queries for lower right alignment).

varlen ("full", "window"): the batch are sequences that lie one after the other in tensors with one batch (batch strides are 0). The
buffer spans [sequences, 4] (int32) says where each begins and ends, in q and in k. Query i sees keys from i + diagonal - left (with
"window") to i + diagonal + right, where the last query of a sequence has its diagonal at its last key. queries and keys are those
of all sequences together, longest those of the longest; left, right (i32) and longest (u32) take the place of causal_shift.

paged (forward with varlen): k and v are pages [pages, kv_heads, page, head], whose strides are k_batch and v_batch. The buffer table
[sequences, ..] (int32) says which pages hold the keys of a sequence, one after the other; they count from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..kernel import Kernel, Target
from . import COMPONENTS, MAX_GROUPS, Text, cdiv
from .gemm import Accumulators, TileLoader, thread_layout

NEVER = "-3.0e38"  # below every score of a visible element, finite: exp(x - x) never sees inf - inf
LEAST = "-2.9e38"  # the least score of a visible element
LOWEST = "-3.4028234e38"  # the lowest finite number: a mask of less hides


@dataclass(frozen=True)
class Schedule:
    """A workgroup owns block_q queries and walks over the keys block_k at a time (backward for keys: the reverse).

    thread_q x 4 scores an invocation; chunk: how much of a contraction is in shared memory at a time; resident: so are a tile's
    queries as long as it walks (forward). paired: as in gemm.Schedule (forward).
    """

    block_q: int
    block_k: int
    thread_q: int = 4
    chunk: int = 16
    unroll: int = 0
    resident: bool = False
    paired: bool = False

    @property
    def threads(self) -> int:
        return self.block_q // self.thread_q * (self.block_k // 4)

    @property
    def key(self) -> str:
        return (
            f"{self.block_q}x{self.block_k}_{self.thread_q}_c{self.chunk}"
            + (f"_u{self.unroll}" if self.unroll else "")
            + ("_r" if self.resident else "")
            + ("_q" if self.paired else "")
        )

    def workgroup_memory(self, head: int = 64, head_v: int = 64) -> int:
        """Bytes of the forward kernel, by head_class() of the heads."""
        lanes = self.block_k // 4
        staging = self.chunk * max(self.block_k + 4 + (0 if self.resident else self.block_q + 4), padded(head_v, lanes))
        queries = head * (self.block_q + 4) if self.resident else 0
        return 4 * (self.block_k * (self.block_q + 4) + staging + queries + self.block_q * (lanes + 1))

    def fits(self, target: Target, head: int = 64, head_v: int = 64) -> bool:
        memory = self.workgroup_memory(head, head_v)
        return self.threads <= target.max_workgroup_size and memory <= target.max_workgroup_memory


SCHEDULES: tuple[Schedule, ...] = (
    Schedule(32, 32, 4, 16, 1),
    Schedule(32, 32, 4, 8, 1),
    Schedule(32, 32, 4, 16),
    Schedule(32, 32, 4, 8),
    Schedule(64, 32, 4, 16),
    Schedule(64, 32, 4, 8),
    Schedule(64, 64, 4, 16),
    Schedule(64, 64, 8, 16),
    Schedule(128, 64, 8, 16),
    Schedule(128, 32, 8, 16),
    Schedule(64, 64, 8, 8),
    Schedule(64, 32, 4, 32),
    Schedule(64, 32, 4, 16, resident=True, paired=True),
    Schedule(64, 64, 8, 16, resident=True, paired=True),
    Schedule(64, 32, 4, 16, paired=True),
    Schedule(64, 32, 4, 32, paired=True),
    Schedule(64, 64, 8, 8, paired=True),
)


def default_schedule(target: Target, head: int, head_v: int, queries_bucket: int) -> Schedule:
    """Of forward(), by head_class() of the heads and floor(log2(queries)), within the target's limits."""
    wide = queries_bucket >= 6 and not target.software and head_v <= 128
    if target.language == "wgsl":  # Vulkan's compilers on NVIDIA do worse with more in shared memory
        wanted = [Schedule(64, 32, 4, 32, paired=True), Schedule(64, 32, 4, 16, paired=True)]
    else:
        wanted = [
            Schedule(64, 64, 8, 16, resident=True, paired=True),
            Schedule(64, 32, 4, 16, resident=True, paired=True),
            Schedule(64, 32, 4, 16, paired=True),
        ]
    for s in [*wanted, Schedule(64, 32, 4, 8, paired=True)] if wide else []:
        if s.fits(target, head, head_v):
            return s
    return SCHEDULES[0] if SCHEDULES[0].fits(target, head, head_v) else SCHEDULES[1]


def backward_schedule(target: Target, head: int, rows_bucket: int) -> Schedule:
    """Of the backward kernels; head: the larger of both."""
    wide = rows_bucket >= 6 and not target.software and head <= 128
    for s in (Schedule(64, 32, 4, 16), Schedule(64, 32, 4, 8)) if wide else ():
        if s.fits(target, head, head):
            return s
    return SCHEDULES[0] if SCHEDULES[0].fits(target, head, head) else SCHEDULES[1]


def padded(head: int, lanes: int) -> int:
    """Columns of an accumulator: head rounded up to whole vec4 of the lanes. One kernel serves all heads up to it."""
    return cdiv(head, 4 * lanes) * 4 * lanes


def head_class(head: int) -> int:
    """The head size that kernels are built for: 32, 64, 96, 128, 160, 192, 224 or 256."""
    if head > 256:
        raise ValueError(f"head dimension {head} is above 256")
    return cdiv(head, 32) * 32


class _Scores:
    """Scores of a block of queries against a block of keys, by chunks of the head dimension through shared memory."""

    def __init__(self, t: Text, s: Schedule, vec: bool):
        self.t, self.s, self.vec = t, s, vec
        self.lanes_k, self.lanes_q = s.block_k // 4, s.block_q // s.thread_q

    def product(self, name: str, a: str, b: str, a_base: str, b_base: str, row0: str, col0: str, size: str,
                rows_end: str = "queries", cols_end: str = "keys", paged: bool = False) -> None:  # fmt: skip
        """name[row][column] = sum over d < size of a[row0 + row, d] b[col0 + column, d]; a, b: buffers with
        <buffer>_row strides; paged: those of b are in pages. Of a resident schedule the rows of a are those that hold() has put
        into shared memory.
        Rows and columns beyond their ends repeat the last ones."""
        t, s = self.t, self.s
        pitch = self.loader(a, s.block_q).pitch
        lb = self.loader(b, s.block_k)
        offset = 0 if s.resident else s.chunk * pitch
        kind = _Turned if self.vec else _Prefixed
        pa = kind(self.loader(a, s.block_q), f"{name}a", "0u")
        pb = (_Paged if paged else kind)(lb, f"{name}b", f"{offset}u")
        loaders = [pb] if s.resident else [pa, pb]
        acc = Accumulators(t, name, s.thread_q, 4, "f32")
        acc.declare()
        t.open()
        if not s.resident:
            pa.begin(a_base, row0, rows_end, f"{a}_row", "1u", "0u")
        pb.begin(b_base, col0, cols_end, f"{b}_row", "1u", "0u")

        def multiply() -> None:
            held = t.shared_base("held_at", "held", f"d0 * {pitch}u + ty") if s.resident else ("stage", "ty")
            t.let("b_stage", f"{offset}u + tx")
            acc.multiply(
                held[0],
                pitch,
                self.lanes_q,
                "stage",
                lb.pitch,
                self.lanes_k,
                s.chunk,
                ty=held[1],
                tx="b_stage",
                unroll=s.unroll,
            )

        _in_chunks(t, "d0", size, s.chunk, loaders, lambda d: (d, size), multiply)
        t.end()

    def loader(self, buffer: str, rows: int) -> TileLoader:
        return TileLoader(self.t, buffer, "stage", rows, self.s.chunk, "k", self.vec, True, False)

    def hold(self, a: str, a_base: str, row0: str, size: str, rows_end: str) -> None:
        """Puts the rows of a, all of them, into `held`, which the caller declares."""
        t, s = self.t, self.s
        kind = _Turned if self.vec else _Prefixed
        loader = kind(self.loader(a, s.block_q), "held_", "d0 * {pitch}u", "held")
        t.open()
        loader.begin(a_base, row0, rows_end, f"{a}_row", "1u", "0u")
        t.loop("d0", "0u", size, f"{s.chunk}u")
        loader.load("d0", size)
        loader.store()
        t.end()
        t.end()


def _in_chunks(
    t: Text, counter: str, size: str, chunk: int, loaders: list[_Prefixed], place: Callable[[str], tuple[str, str]],
    multiply: Callable[[], None],
) -> None:  # fmt: skip
    """A contraction of `size`, `chunk` at a time through shared memory; what comes next is loaded while this is multiplied. place:
    load()'s arguments for a value of the counter."""
    for loader in loaders:
        loader.load(*place("0u"))
    t.loop(counter, "0u", size, f"{chunk}u")
    t.barrier()  # the last chunk has been read by all
    for loader in loaders:
        loader.store()
    if not t.wgsl:
        _next(t, counter, size, chunk, loaders, place)
    t.barrier()
    if t.wgsl:
        _next(t, counter, size, chunk, loaders, place)
    multiply()
    t.end()


def _next(
    t: Text, counter: str, size: str, chunk: int, loaders: list[_Prefixed], place: Callable[[str], tuple[str, str]]
) -> None:
    """On which side of the barrier: see gemm()."""
    t.let("next", f"{counter} + {chunk}u")
    t.open(f"next < {size}")
    for loader in loaders:
        loader.load(*place("next"))
    t.end()


class _Prefixed(TileLoader):
    """A TileLoader whose registers have their own names and whose tile starts at `offset`, in vec4, of the shared array `stage`."""

    def __init__(self, loader: TileLoader, prefix: str, offset: str, stage: str = "stage"):
        self.__dict__.update(loader.__dict__)
        self.prefix, self.offset, self.stage = prefix, offset.format(pitch=self.pitch), stage

    def begin(self, base: str, row0: str, rows_end: str, stride_r: str, stride_k: str, k_begin: str) -> None:
        self.shared = self.prefix
        super().begin(base, row0, rows_end, stride_r, stride_k, k_begin)

    def load(self, k0: str, k_end: str) -> None:
        self.shared = self.prefix
        super().load(k0, k_end)

    def store(self) -> None:
        t = self.t
        for step in range(self.loads):
            row, k = self.place(step)
            guarded = self.partial and step == self.loads - 1
            if guarded:
                t.open(f"lid < {self.count - step * t.threads}u")
            v = f"{self.prefix}_v{step}"
            if self.vec and self.unit == "r":
                t.add(f"{self.stage}[{self.offset} + {k} * {self.pitch}u + {row} / 4u] = {v};")
            elif self.vec:
                for j, c in enumerate(COMPONENTS):
                    t.put_component(
                        self.stage,
                        f"{self.offset} + ({k} + {j}u) * {self.pitch}u + {row} / 4u",
                        f"({row} % 4u)",
                        f"{v}.{c}",
                        "f32",
                    )
            else:
                t.put_component(
                    self.stage, f"{self.offset} + {k} * {self.pitch}u + {row} / 4u", f"({row} % 4u)", v, "f32"
                )
            if guarded:
                t.end()


class _Turned(_Prefixed):
    """A loader along k by vec4, of four rows at a time: what it stores are vec4 of rows, where others store single elements."""

    def __init__(self, loader: TileLoader, prefix: str, offset: str, stage: str = "stage"):
        super().__init__(loader, prefix, offset, stage)
        self.blocks = self.rows * self.tile_k // 16
        self.steps = range(cdiv(self.blocks, self.t.threads))

    def _place(self, step: int) -> tuple[str, str]:
        """(row, k) of this invocation's block of 4 x 4."""
        e, per = (f"(lid + {step * self.t.threads}u)" if step else "lid"), self.tile_k // 4
        return f"({e} / {per}u) * 4u", f"({e} % {per}u) * 4u"

    def _conditions(self, step: int) -> list[str]:
        """Where not every invocation has a block."""
        rest = self.blocks - step * self.t.threads
        return [f"lid < {rest}u"] if rest < self.t.threads else []

    def begin(self, base: str, row0: str, rows_end: str, stride_r: str, stride_k: str, k_begin: str) -> None:
        t, p = self.t, self.prefix
        self.base = base
        for step in self.steps:
            row, k = self._place(step)
            for j in range(4):
                t.var(f"{p}_i{step}_{j}", f"min({row0} + {row} + {j}u, {rows_end} - 1u) * {stride_r} + {k_begin} + {k}")
                t.var(f"{p}_v{step}_{j}", t.zero("f32", 4), "f32", 4)

    def load(self, k0: str, k_end: str) -> None:
        t, p = self.t, self.prefix
        for step in self.steps:
            values = [f"{p}_v{step}_{j}" for j in range(4)]
            t.add(*(f"{v} = {t.zero('f32', 4)};" for v in values))
            t.open(" && ".join([*self._conditions(step), f"{k0} + {self._place(step)[1]} < {k_end}"]))
            t.add(*(f"{v} = {t.load(self.buffer, self.base, f'{p}_i{step}_{j}', 4)};" for j, v in enumerate(values)))
            t.end()
            t.add(*(f"{p}_i{step}_{j} += {self.tile_k}u;" for j in range(4)))

    def store(self) -> None:
        t = self.t
        for step in self.steps:
            row, k = self._place(step)
            conditions = self._conditions(step)
            if conditions:
                t.open(*conditions)
            for j, c in enumerate(COMPONENTS):
                turned = t.vector([f"{self.prefix}_v{step}_{i}.{c}" for i in range(4)])
                t.add(f"{self.stage}[{self.offset} + ({k} + {j}u) * {self.pitch}u + {row} / 4u] = {turned};")
            if conditions:
                t.end()


class _Paged(_Prefixed):
    """A loader of rows that a table of pages has."""

    def begin(self, base: str, row0: str, rows_end: str, stride_r: str, stride_k: str, k_begin: str) -> None:
        if self.unit == "k":  # a row each; its place in the page is where the loads start
            super().begin(base, row0, rows_end, "0u", stride_k, k_begin)
            for step in range(self.loads):
                self.t.add(f"{self.prefix}_i{step} += {self._place(f'{self.prefix}_r{step}')};")
        else:  # k_begin is of the first load, whose row load() finds
            super().begin(base, row0, rows_end, stride_r, "0u", "0u")

    def load(self, k0: str, k_end: str) -> None:
        if self.unit == "r":
            for step in range(self.loads):
                p = self.prefix
                row = f"min({k0} + {self.place(step)[1]}, {k_end} - 1u)"
                self.t.add(f"{p}_i{step} = {p}_r{step} + {self._place(row)};")
        super().load(k0, k_end)

    def _place(self, key: str) -> str:
        """The place of a key, from its head's base. A page that does not exist is not read."""
        t = self.t
        found = t.load("table", "table_base", f"({key}) / page")
        return f"min({t.cast(f'max({found}, 0)', 'u32')}, pages - 1u) * {self.buffer}_batch + ({key}) % page * {self.buffer}_row"


def _weighted(
    t: Text,
    acc: Accumulators,
    weights: str,
    pitch: int,
    lanes_m: int,
    buffer: str,
    base: str,
    row0: str,
    rows_end: str,
    size: str,
    columns: int,
    lanes_n: int,
    block: int,
    chunk: int,
    vec: bool,
    prefix: str,
    unroll: int,
    paged: bool = False,
) -> None:
    """acc[m][column] += sum over r < block of weights[r][m] X[row0 + r, column]: X is the second operand of P V, dS
    K, dS^T Q, P^T dO. paged: its rows are in pages.

    weights: shared, r-major with `pitch` vec4 a row. Rows of X beyond rows_end load zeros; columns beyond size are
    clamped.
    """
    loader = TileLoader(t, buffer, "stage", columns, chunk, "r", vec, True, False, columns // 4)
    p = (_Paged if paged else _Prefixed)(loader, prefix, "0u")
    t.open()
    p.begin(base, "0u", size, "1u", f"{buffer}_row", row0)

    def multiply() -> None:
        array, at = t.shared_base("weights_at", weights, f"r0 * {pitch}u + ty")
        acc.multiply(array, pitch, lanes_m, "stage", columns // 4, lanes_n, chunk, ty=at, unroll=unroll)

    _in_chunks(t, "r0", f"{block}u", chunk, [p], lambda r: (f"{row0} + {r}", rows_end), multiply)
    t.end()


def _score(
    t: Text, mask: str, causal: bool, value: str, query: str, key: str, out: str, varlen: str = "", end: str = "queries",
    keys_end: str = "key_end",
) -> None:  # fmt: skip
    """Declares f32 `out`: the score of (query, key), NEVER where it does not count. end: of the queries."""
    t.var(out, f"{value} * scale", "f32")
    conditions = [f"{key} >= {keys_end}", f"{query} >= {end}"]
    if varlen == "window":
        conditions.append(f"{t.cast(key, 'i32')} < {t.cast(query, 'i32')} + diagonal - left")
    if causal:
        conditions.append(f"{t.cast(key, 'i32')} > {t.cast(query, 'i32')} + causal_shift")
    t.open(" || ".join(conditions))
    t.add(f"{out} = {t_float(t, NEVER)};")
    if mask:
        t.add("} else {")
        at = f"{query} * mask_row + {key} * mask_col"
        if mask == "bool":
            t.open(f"!{mask_load(t, at)}")
            t.add(f"{out} = {t_float(t, NEVER)};")
            t.end()
        else:
            t.let(f"{out}_mask", t.load("mask", "mask_base", at), "f32")
            t.add(f"{out} = {out} + {out}_mask;")
            # Not max(): it would drop NaN.
            t.add(f"{out} = {t.select(out, t_float(t, LEAST), f'{out} < {t_float(t, LEAST)}')};")
            t.add(f"{out} = {t.select(out, t_float(t, NEVER), f'{out}_mask < {t_float(t, LOWEST)}')};")
    t.end()


def t_float(t: Text, literal: str) -> str:
    return literal if t.wgsl else literal + "f"


def mask_load(t: Text, at: str) -> str:
    if t.wgsl:
        return f"(((mask[(mask_base + {at}) >> 2u] >> (((mask_base + {at}) & 3u) * 8u)) & 0xffu) != 0u)"
    return f"(mask_base[{at}] != 0)"


# Whether the probabilities of four queries (bits) for four keys (groups of four bits) are kept: ops/attention.py's forward().
KEPT_CL = """
uint kept(uint2 seed, uint query, uint key, uint bh, uint keep) {
  uint bits = 0;
  for (uint j = 0; j < 4; j++) {
    uint4 c = (uint4)(key + j, query / 4u, bh, 0); uint2 k = seed;
    for (uint r = 0; r < 10; r++) {
      c = (uint4)(mul_hi(0xCD9E8D57u, c.z) ^ c.y ^ k.x, 0xCD9E8D57u * c.z, mul_hi(0xD2511F53u, c.x) ^ c.w ^ k.y, 0xD2511F53u * c.x);
      k += (uint2)(0x9E3779B9u, 0xBB67AE85u);
    }
    c >>= 8;
    bits |= ((uint)(c.x < keep) | (uint)(c.y < keep) << 1 | (uint)(c.z < keep) << 2 | (uint)(c.w < keep) << 3) << (4 * j);
  }
  return bits;
}"""
KEPT_WGSL = """
fn kept_high(a: u32, b: u32) -> u32 {
  let x = (a >> 16u) * (b & 0xffffu) + (((a & 0xffffu) * (b & 0xffffu)) >> 16u); let y = (a & 0xffffu) * (b >> 16u) + (x & 0xffffu);
  return (a >> 16u) * (b >> 16u) + (x >> 16u) + (y >> 16u);
}
fn kept(seed: vec2<u32>, query: u32, key: u32, bh: u32, keep: u32) -> u32 {
  var bits = 0u;
  for (var j = 0u; j < 4u; j++) {
    var c = vec4<u32>(key + j, query / 4u, bh, 0u); var k = seed;
    for (var r = 0u; r < 10u; r++) {
      c = vec4<u32>(kept_high(0xCD9E8D57u, c.z) ^ c.y ^ k.x, 0xCD9E8D57u * c.z, kept_high(0xD2511F53u, c.x) ^ c.w ^ k.y, 0xD2511F53u * c.x);
      k += vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
    }
    let b = select(vec4<u32>(), vec4<u32>(1u, 2u, 4u, 8u), (c >> vec4<u32>(8u)) < vec4<u32>(keep));
    bits |= (b.x | b.y | b.z | b.w) << (4u * j);
  }
  return bits;
}"""


def _declare_dropout(t: Text) -> None:
    """The call's key of Philox, of 2^24 the probability to keep, and what kept probabilities are multiplied by."""
    t.buffer("seed", "u32")
    t.scalar("keep")
    t.scalar("drop_scale", type="f32")
    t.module["kept"] = KEPT_WGSL if t.wgsl else KEPT_CL
    t.base("seed_base", "seed")
    t.let("key0", t.load("seed", "seed_base", "0u"))
    t.let("key1", t.load("seed", "seed_base", "1u"))


def _kept(t: Text, quad: int, query: str, key: str) -> None:
    """Declares kept{quad} for the queries and keys from these on; query is divisible by 4."""
    t.let(f"kept{quad}", f"kept({t.vector(['key0', 'key1'], 'u32')}, {query}, {key}, bh, keep)")


def _dropped(t: Text, value: str, quad: int, query: int, key: int) -> str:
    """value where kept{quad} has this query and key, else 0."""
    return t.select(t_float(t, "0.0"), value, f"((kept{quad} >> {4 * key + query}u) & 1u) != 0u")


def _name(
    kind: str, s: Schedule, dtype: str, head: int, head_v: int, mask: str, causal: bool, vec: bool, last: str = "",
    varlen: str = "",
) -> str:  # fmt: skip
    flags = ("_causal" if causal else "") + (f"_varlen{varlen}" if varlen else "") + ("_vec" if vec else "") + last
    return f"{kind}_{dtype}_{head}_{head_v}_{mask or 'none'}{flags}_{s.key}"


def _declare(t: Text, names: list[str]) -> None:
    for n in names:
        t.scalar(f"{n}_batch", f"{n}_head", f"{n}_row")


def _common_scalars(t: Text, mask: str, causal: bool, varlen: str) -> None:
    t.scalar("batch", "heads", "group", "queries", "keys", "head", "head_v")
    if mask:
        t.scalar("mask_batch", "mask_head", "mask_row", "mask_col")
    if varlen:
        t.scalar("left", "right", type="i32")
        t.scalar("longest")
    elif causal:
        t.scalar("causal_shift", type="i32")
    t.scalar("scale", type="f32")


def _find_sequence(t: Text) -> None:
    """Declares first_query, query_end, first_key, last_key, diagonal (i32) and causal_shift of sequence z. One invocation reads them;
    the others take them from shared memory, which tells a compiler that they agree."""
    t.shared("place", "i32", 1)
    t.barrier()
    t.open("lid == 0u")
    t.base("spans_base", "spans")
    found = t.vector([t.load("spans", "spans_base", f"z * 4u + {i}u") for i in range(4)], "i32")
    t.add(f"place[0] = {found};")
    t.end()
    t.barrier()
    for name, c in zip(("first_query", "query_end", "first_key", "last_key"), COMPONENTS, strict=True):
        t.let(name, t.cast(f"place[0].{c}", "u32"))
    t.let("diagonal", "place[0].w - place[0].y", "i32")
    t.let("causal_shift", "diagonal + right", "i32")


def _key_range(t: Text, s: Schedule, causal: bool, varlen: str, begin: str, last: str) -> None:
    """Declares key_begin and key_end: the keys that the queries q0 .. q0 + block_q see, of `begin` to `last`."""
    if not causal:
        t.let("key_begin", begin)
        t.let("key_end", last)
        return
    end = "query_end" if varlen else "queries"
    visible = f"{t.cast(f'min(q0 + {s.block_q}u, {end})', 'i32')} + causal_shift"
    if not varlen:
        t.let("key_begin", begin)
        t.let("key_end", f"min({last}, {t.cast(f'max({visible}, 0)', 'u32')})")
        return
    if varlen == "window":
        lowest = f"max({t.cast('q0', 'i32')} + diagonal - left, 0)"
        begin = f"max({begin}, {t.cast(lowest, 'u32')})"
    t.let("key_begin", begin)
    t.let("key_end", t.select("key_begin", f"min({last}, {t.cast(f'max({visible}, 0)', 'u32')})", "q0 < query_end"))


def forward(
    target: Target,
    schedule: Schedule,
    dtype: str,
    head: int,
    head_v: int,
    mask: str = "",
    causal: bool = False,
    vec: bool = False,
    split: bool = False,
    varlen: str = "",
    paged: bool = False,
    dropout: bool = False,
) -> Kernel:
    """out = softmax(scale q k^T + mask) v and lse = logsumexp of the scores (f32, natural logarithm).

    head, head_v: head_class() of the sizes; the sizes themselves are scalars. mask: "" or the mask's storage dtype
    ("bool": true counts).
    vec: head sizes, strides and offsets of q, k, v divisible by 4. All have stride 1 along the head dimension.
    Buffers: q, k, v, [mask], [spans], [table], out, lse. varlen goes with causal, without mask.
    Scalars (u32): batch, heads, group (= heads / kv_heads), queries, keys, head, head_v, [mask_batch, mask_head,
    mask_row, mask_col], [causal_shift (i32)], scale (f32), then batch, head, row strides of q, k, v, out each; with
    split: splits, key_span (not with varlen: the keys that a tile sees are dealt evenly); with paged: the row stride of table, page
    (keys of one), pages.
    lse is contiguous (batch, heads, queries).
    dropout: the last buffer is seed (two u32), the last scalars are keep (u32) and drop_scale (f32): see _declare_dropout().
    split (decode, few queries): the keys are dealt to `splits` workgroups, key_span each; out is then f32 and
    contiguous (splits, batch, heads, queries, head_v), lse (splits, batch, heads, queries); merge() finishes. out's
    strides are unused.
    Grid: forward_groups().
    """
    s = schedule
    assert not varlen or (causal and not mask)
    assert varlen or not paged
    last = ("_paged" if paged else "") + ("_split" if split else "")
    name = _name("attention", s, dtype, head, head_v, mask, causal, vec, last, varlen)
    t = Text(target, name + "_dropout" * dropout, s.threads)
    width = 4 if vec else 1
    for n in "qkv":
        t.buffer(n, dtype, "r", width)
    if mask:
        t.buffer("mask", mask)
    if varlen:
        t.buffer("spans", "i32")
    if paged:
        t.buffer("table", "i32")
    t.buffer("out", "f32" if split else dtype, "w")
    t.buffer("lse", "f32", "w")
    _common_scalars(t, mask, causal, varlen)
    _declare(t, ["q", "k", "v", "out"])
    if split:
        t.scalar("splits", *([] if varlen else ["key_span"]))
    if paged:
        t.scalar("table_row", "page", "pages")
    if dropout:
        _declare_dropout(t)
    lanes_k, lanes_q = s.block_k // 4, s.block_q // s.thread_q
    columns = padded(head_v, lanes_k)
    pitch_p = s.block_q // 4 + 1
    scores = _Scores(t, s, vec)
    near = t.subgroup_lanes("f32") >= lanes_k << s.paired  # those of a row exchange maxima and sums
    stage = s.chunk * max(s.block_k // 4 + 1 + (0 if s.resident else s.block_q // 4 + 1), columns // 4)
    t.shared("stage", "f32", stage)
    t.shared("weights", "f32", s.block_k * pitch_p)  # [key][query]
    if s.resident:
        t.shared("held", "f32", head * pitch_p)  # [d][query]
    if near:
        t.name += "_subgroups"
        t.declare_lane()
    else:
        t.shared("partial", "f32", s.block_q * lanes_k, 1)  # [lane][query]: row maxima, then row sums
        t.shared("row_max", "f32", s.block_q // 4)

    if s.paired:
        thread_layout(t, lanes_k, lanes_q, lanes_k, True, "lane" if near else "lid")
    else:
        t.let("tx", f"{'lane' if near else 'lid'} % {lanes_k}u")
        t.let("ty", f"{'lane' if near else 'lid'} / {lanes_k}u")
    exchanges = [step << s.paired for step in _halvings(lanes_k)]
    t.let("blocks", f"({'longest' if varlen else 'queries'} + {s.block_q - 1}u) / {s.block_q}u")
    t.loop("tile", t.group, "blocks * heads * batch" + (" * splits" if split else ""), t.groups)
    if split:
        t.let("part", "(tile / blocks) % splits")
        t.let("bh", "tile / (blocks * splits)")
    else:
        t.let("bh", "tile / blocks")
    t.let("z", "bh / heads")
    t.let("h", "bh % heads")
    # The longest blocks of a causal product first.
    block = "(tile % blocks)" if split else "(blocks - 1u - tile % blocks)"
    if varlen:
        _find_sequence(t)
    t.let("q0", f"{'first_query + ' if varlen else ''}{block} * {s.block_q}u")
    begin, end = "key_begin", "key_end"
    if split and not varlen:
        t.let("part_begin", "min(part * key_span, keys)")
        _key_range(t, s, causal, varlen, "part_begin", "min(part_begin + key_span, keys)")
    else:
        _key_range(t, s, causal, varlen, *(("first_key", "last_key") if varlen else ("0u", "keys")))
    if split and varlen:
        t.let("seen", "max(key_end, key_begin) - key_begin")
        t.let("key_span", f"((seen + splits - 1u) / splits + {s.block_k - 1}u) / {s.block_k}u * {s.block_k}u")
        t.let("part_begin", "min(key_begin + part * key_span, max(key_end, key_begin))")
        t.let("part_end", "min(part_begin + key_span, max(key_end, key_begin))")
        begin, end = "part_begin", "part_end"
    t.base("q_base", "q", ("z", "q_batch"), ("h", "q_head"))
    batch = [] if paged else ["z"]
    t.base("k_base", "k", *((z, "k_batch") for z in batch), ("(h / group)", "k_head"))
    t.base("v_base", "v", *((z, "v_batch") for z in batch), ("(h / group)", "v_head"))
    if paged:
        t.base("table_base", "table", ("z", "table_row"))
    if mask:
        t.base("mask_base", "mask", ("z", "mask_batch"), ("h", "mask_head"))
    o = Accumulators(t, "o", s.thread_q, columns // lanes_k, "f32")
    o.declare()
    quads, rows = s.thread_q // 4, range(s.thread_q)
    row = [f"(ty * 4u + {(i // 4) * lanes_q * 4 + i % 4}u)" for i in rows]
    never, zero = t_float(t, NEVER), t_float(t, "0.0")
    for i in rows:
        t.var(f"max{i}", never, "f32")
        t.var(f"sum{i}", zero, "f32")  # of this invocation's keys
    if not near:
        t.open(f"lid < {s.block_q // 4}u")
        t.add(f"row_max[lid] = {t.splat(never)};")
        t.end()
    if s.resident:
        scores.hold("q", "q_base", "q0", "head", "queries")
    t.barrier()
    t.loop("k0", begin, end, f"{s.block_k}u")
    scores.product(
        "s", "q", "k", "q_base", "k_base", "q0", "k0", "head", cols_end=end if paged else "keys", paged=paged
    )
    if not mask:  # most blocks have no score that does not count
        t.open(_all_count(t, s, causal, varlen, end))
        for i in rows:
            t.add(f"s{i}_0 = s{i}_0 * {t.splat('scale')};")
        t.add("} else {")
    for i in rows:
        t.open()
        t.let("query", f"q0 + {row[i]}")
        t.let("key", "k0 + tx * 4u")
        for j, c in enumerate(COMPONENTS):
            _score(t, mask, causal, f"s{i}_0.{c}", "query", f"(key + {j}u)", f"e{j}", varlen, keys_end=end)
        t.add(f"s{i}_0 = {t.vector([f'e{j}' for j in range(4)])};")
        t.end()
    if not mask:
        t.end()
    highest = [f"max(max(s{i}_0.x, s{i}_0.y), max(s{i}_0.z, s{i}_0.w))" for i in rows]
    if near:
        for i in rows:
            t.var(f"new{i}", f"max(max{i}, {highest[i]})", "f32")
            for step in exchanges:
                t.add(f"new{i} = max(new{i}, {t.shuffle_xor(f'new{i}', step)});")
    else:
        for i in rows:
            t.add(f"partial[tx * {s.block_q}u + {row[i]}] = {highest[i]};")
        t.barrier()
        t.open(f"lid < {s.block_q}u") if s.threads >= s.block_q else t.loop(
            "r", "lid", f"{s.block_q}u", f"{s.threads}u"
        )
        r = "lid" if s.threads >= s.block_q else "r"
        t.var("highest", t.get_component("row_max", r, "f32"), "f32")
        for j in range(lanes_k):
            t.add(f"highest = max(highest, partial[{j * s.block_q}u + {r}]);")
        t.put_component("row_max", f"{r} / 4u", f"({r} % 4u)", "highest", "f32")
        t.end()
        t.barrier()
        for i in range(quads):
            t.let(f"m{i}", f"row_max[ty + {i * lanes_q}u]", "f32", 4)
        for i in rows:
            t.let(f"new{i}", f"m{i // 4}.{COMPONENTS[i % 4]}", "f32")
    for i in range(quads):
        if dropout:
            _kept(t, i, f"q0 + (ty + {i * lanes_q}u) * 4u", "k0 + tx * 4u")
    for i in rows:
        t.open()
        t.let("factor", f"exp(max{i} - new{i})", "f32")
        t.add(f"max{i} = new{i};")
        for j, c in enumerate(COMPONENTS):
            v = f"s{i}_0.{c}"
            t.let(f"e{j}", t.select(f"exp({v} - new{i})", zero, f"{v} <= {never}"), "f32")
        t.add(f"sum{i} = sum{i} * factor + ((e0 + e1) + (e2 + e3));")
        parts = [_dropped(t, f"e{j}", i // 4, i % 4, j) if dropout else f"e{j}" for j in range(4)]
        t.add(f"s{i}_0 = {t.vector(parts)};")
        for column in range(o.v):
            t.add(f"o{i}_{column} = o{i}_{column} * {t.splat('factor')};")
        t.end()
    _share(t, s, "s", lanes_q, pitch_p)  # seen by all behind the next barrier
    _weighted(
        t,
        o,
        "weights",
        pitch_p,
        lanes_q,
        "v",
        "v_base",
        "k0",
        end,
        "head_v",
        columns,
        lanes_k,
        s.block_k,
        s.chunk,
        vec,
        "vv",
        s.unroll,
        paged,
    )
    t.end()
    if split:
        # The sequences of varlen share one batch.
        t.let("out_at", f"({'part' if varlen else '(part * batch + z)'} * heads + h) * queries")
        t.base("out_base", "out", ("out_at", "head_v"))
    else:
        t.base("out_base", "out", ("z", "out_batch"), ("h", "out_head"))
    if not near:
        t.barrier()
        for i in rows:
            t.add(f"partial[tx * {s.block_q}u + {row[i]}] = sum{i};")
        t.barrier()
    for i in rows:
        if near:
            for step in exchanges:
                t.add(f"sum{i} = sum{i} + {t.shuffle_xor(f'sum{i}', step)};")
        else:
            t.add(f"sum{i} = {' + '.join(f'partial[{j * s.block_q}u + {row[i]}]' for j in range(lanes_k))};")
    for i in rows:
        t.open()
        t.let("query", f"q0 + {row[i]}")
        one = t_float(t, "1.0")
        t.let("inverse", t.select(f"{'drop_scale' if dropout else one} / sum{i}", zero, f"sum{i} == {zero}"), "f32")
        t.open(f"query < {'query_end' if varlen else 'queries'}")
        for column in range(o.v):
            for j, c in enumerate(COMPONENTS):
                t.let(f"col{column}_{j}", f"({column * lanes_k}u + tx) * 4u + {j}u")
                t.open(f"col{column}_{j} < head_v")
                t.store(
                    "out",
                    "out_base",
                    f"query * {'head_v' if split else 'out_row'} + col{column}_{j}",
                    f"o{i}_{column}.{c} * inverse",
                )
                t.end()
        t.open("tx == 0u")
        inf = negative_infinity(t)
        at = "out_at + query" if split else "h * queries + query" if varlen else "bh * queries + query"
        t.base("lse_base", "lse")
        t.store("lse", "lse_base", at, t.select(f"max{i} + log(sum{i})", inf, f"sum{i} == {zero}"))
        t.end()
        t.end()
        t.end()
    t.barrier()
    t.end()
    return t.finish()


def _halvings(lanes: int) -> list[int]:
    return [1 << i for i in range(lanes.bit_length() - 1)]


def _all_count(t: Text, s: Schedule, causal: bool, varlen: str, keys_end: str) -> str:
    """Whether all scores of this block count, as _score() has it."""
    last_query, last_key = t.cast(f"(q0 + {s.block_q}u)", "i32"), t.cast(f"(k0 + {s.block_k}u)", "i32")
    conditions = [f"k0 + {s.block_k}u <= {keys_end}", f"q0 + {s.block_q}u <= {'query_end' if varlen else 'queries'}"]
    if causal:
        conditions.append(f"{last_key} - 1 <= {t.cast('q0', 'i32')} + causal_shift")
    if varlen == "window":
        conditions.append(f"{t.cast('k0', 'i32')} >= {last_query} - 1 + diagonal - left")
    return " && ".join(conditions)


def forward_groups(schedule: Schedule, batch, heads, queries, splits=1, minimum=min):
    """Grid of forward()."""
    return (minimum(cdiv(queries, schedule.block_q) * heads * batch * splits, MAX_GROUPS), 1, 1)


def merge(target: Target, dtype: str) -> Kernel:
    """Combines the partial results of forward(split=True).

    Buffers: parts, part_lse, out, lse. Scalars (u32): splits, batch, heads, queries, head_v, out_batch, out_head,
    out_row.
    Grid: merge_groups(batch, heads, queries, head_v)."""
    t = Text(target, f"attention_merge_{dtype}", 64)
    for n in ("parts", "part_lse"):
        t.buffer(n, "f32")
    t.buffer("out", dtype, "w")
    t.buffer("lse", "f32", "w")
    t.scalar("splits", "batch", "heads", "queries", "head_v", "out_batch", "out_head", "out_row")
    t.let("rows", "batch * heads * queries")
    t.loop("e", f"{t.group} * 64u + lid", "rows * head_v", f"{t.groups} * 64u")
    t.let("row", "e / head_v")
    t.let("col", "e % head_v")
    for n in ("parts", "part_lse", "lse"):
        t.base(f"{n}_base", n)
    t.var("high", t_float(t, NEVER), "f32")
    t.loop("i", "0u", "splits", "1u")
    t.add(f"high = max(high, {t.load('part_lse', 'part_lse_base', 'i * rows + row')});")
    t.end()
    t.var("total", t_float(t, "0.0"), "f32")
    t.var("sum", t_float(t, "0.0"), "f32")
    t.loop("i", "0u", "splits", "1u")
    t.let("l", t.load("part_lse", "part_lse_base", "i * rows + row"), "f32")
    # An empty part has -inf, which max() keeps out of the exponent.
    t.let("weight", t.select(t_float(t, "0.0"), "exp(l - high)", f"l > {t_float(t, NEVER)}"), "f32")
    t.open(f"weight > {t_float(t, '0.0')}")
    t.add("total = total + weight;")
    t.add(f"sum = sum + weight * {t.load('parts', 'parts_base', '(i * rows + row) * head_v + col')};")
    t.end(2)
    zero = t_float(t, "0.0")
    t.let("inverse", t.select(f"{t_float(t, '1.0')} / total", zero, f"total == {zero}"), "f32")
    t.base("out_base", "out", ("(row / (queries * heads))", "out_batch"), ("((row / queries) % heads)", "out_head"))
    t.store("out", "out_base", "(row % queries) * out_row + col", "sum * inverse")
    t.open("col == 0u")
    t.store("lse", "lse_base", "row", t.select("high + log(total)", negative_infinity(t), f"total == {zero}"))
    t.end()
    t.end()
    return t.finish()


def merge_groups(batch, heads, queries, head_v, minimum=min):
    """Grid of merge()."""
    return (minimum(cdiv(batch * heads * queries * head_v, 64), MAX_GROUPS), 1, 1)


def negative_infinity(t: Text) -> str:
    """-inf as text. naga refuses constant infinities: the bits go through a run-time value."""
    return "bitcast<f32>(0xff800000u | min(queries, 0u))" if t.wgsl else "-INFINITY"


def delta(target: Target, dtype: str) -> Kernel:
    """delta[b, h, q] = sum over d of do[b, h, q, d] * out[b, h, q, d], f32, contiguous: the first step of backward.

    Buffers: g (the gradient do), out, delta. Scalars (u32): batch, heads, queries, head_v, batch, head, row strides
    of do, of out.
    Grid: (min(cdiv(batch * heads * queries, 64), 65535), 1, 1)."""
    t = Text(target, f"attention_delta_{dtype}", 64)
    t.buffer("g", dtype)
    t.buffer("out", dtype)
    t.buffer("delta", "f32", "w")
    t.scalar("batch", "heads", "queries", "head_v")
    _declare(t, ["g", "out"])
    t.loop("e", f"{t.group} * 64u + lid", "batch * heads * queries", f"{t.groups} * 64u")
    for n in ("g", "out"):
        t.base(
            f"{n}_base",
            n,
            ("(e / (queries * heads))", f"{n}_batch"),
            ("((e / queries) % heads)", f"{n}_head"),
            ("(e % queries)", f"{n}_row"),
        )
    t.base("delta_base", "delta")
    t.var("sum", t_float(t, "0.0"), "f32")
    t.loop("d", "0u", "head_v", "1u")
    t.add(f"sum = fma({t.load('g', 'g_base', 'd')}, {t.load('out', 'out_base', 'd')}, sum);")
    t.end()
    t.store("delta", "delta_base", "e", "sum")
    t.end()
    return t.finish()


def _backward(
    t: Text, s: Schedule, dtype: str, mask: str, causal: bool, vec: bool, results: list[tuple[str, str]], varlen: str
) -> None:
    """Buffers, scalars and shared memory of the backward kernels."""
    for n in ("q", "k", "v", "g"):
        t.buffer(n, dtype, "r", 4 if vec else 1)
    if mask:
        t.buffer("mask", mask)
    if varlen:
        t.buffer("spans", "i32")
    t.buffer("lse", "f32")
    t.buffer("delta", "f32")
    for n, d in results:
        t.buffer(n, d, "w")
    _common_scalars(t, mask, causal, varlen)
    _declare(t, ["q", "k", "v", "g", *(n for n, _ in results if n != "ds")])


def _tile_sizes(t: Text, s: Schedule, columns: int) -> tuple[int, int, int]:
    """Shared memory and thread layout; returns lanes along columns, along rows, and the pitch of weights."""
    lanes, lanes_m = s.block_k // 4, s.block_q // s.thread_q
    t.shared("stage", "f32", s.chunk * max(s.block_q // 4 + s.block_k // 4 + 2, columns // 4))
    pitch = s.block_q // 4 + 1
    t.shared("weights", "f32", s.block_k * pitch)
    thread_layout(t, lanes, lanes_m, lanes if s.paired else 0, s.paired)
    return lanes, lanes_m, pitch


def _share(t: Text, s: Schedule, name: str, lanes_m: int, pitch: int) -> None:
    """The registers name[row][column] to weights[column][row]."""
    for i in range(s.thread_q // 4):
        for j, c in enumerate(COMPONENTS):
            parts = t.vector([f"{name}{i * 4 + step}_0.{c}" for step in range(4)])
            t.add(f"weights[(tx * 4u + {j}u) * {pitch}u + {i * lanes_m}u + ty] = {parts};")


def _probability(t: Text, score: str, lse: str, mask: str) -> str:
    """Of a score. A mask that is added may leave scores no digits, and their difference may be off by any amount: 1 at most."""
    p = f"exp({score} - {lse})"
    if mask not in ("", "bool"):
        p = t.select(p, t_float(t, "1.0"), f"{score} > {lse}")
    return t.select(p, t_float(t, "0.0"), f"{score} <= {t_float(t, NEVER)}")


def _store_rows(
    t: Text,
    s: Schedule,
    acc: Accumulators,
    name: str,
    row0: str,
    rows: str,
    size: str,
    lanes: int,
    lanes_m: int,
    factor: str,
) -> None:
    for i in range(s.thread_q):
        t.open()
        t.let("row", f"{row0} + ty * 4u + {(i // 4) * lanes_m * 4 + i % 4}u")
        t.open(f"row < {rows}")
        for v in range(acc.v):
            for j, c in enumerate(COMPONENTS):
                t.open()
                t.let("column", f"({v * lanes}u + tx) * 4u + {j}u")
                t.open(f"column < {size}")
                t.store(name, f"{name}_base", f"row * {name}_row + column", f"{acc.name}{i}_{v}.{c}{factor}")
                t.end(2)
        t.end(2)


def backward_query(
    target: Target,
    schedule: Schedule,
    dtype: str,
    head: int,
    head_v: int,
    mask: str = "",
    causal: bool = False,
    vec: bool = False,
    mask_grad: bool = False,
    varlen: str = "",
    dropout: bool = False,
) -> Kernel:
    """dq, and with mask_grad also the gradient of the score matrix ds (f32, contiguous (batch, heads, queries,
    keys)), for the mask;
    the caller fills ds with zeros first where causal, and sums it over the dimensions that the mask broadcasts.

    g is the gradient of out; lse from forward(), delta from delta(). Deterministic. Arguments as in forward(); vec
    includes g.
    Buffers: q, k, v, g, [mask], [spans], lse, delta, dq, [ds].
    Scalars: as forward() up to scale, then batch, head, row strides of q, k, v, g, dq. Grid: forward_groups()."""
    s = schedule
    name = _name("attention_dq", s, dtype, head, head_v, mask, causal, vec, "_ds" if mask_grad else "", varlen)
    t = Text(target, name + "_dropout" * dropout, s.threads)
    _backward(t, s, dtype, mask, causal, vec, [("dq", dtype)] + ([("ds", "f32")] if mask_grad else []), varlen)
    if dropout:
        _declare_dropout(t)
    columns = padded(head, s.block_k // 4)
    lanes, lanes_m, pitch = _tile_sizes(t, s, columns)
    t.let("blocks", f"({'longest' if varlen else 'queries'} + {s.block_q - 1}u) / {s.block_q}u")
    t.loop("tile", t.group, "blocks * heads * batch", t.groups)
    t.let("bh", "tile / blocks")
    t.let("z", "bh / heads")
    t.let("h", "bh % heads")
    if varlen:
        _find_sequence(t)
    t.let("q0", f"{'first_query + ' if varlen else ''}(blocks - 1u - tile % blocks) * {s.block_q}u")
    _key_range(t, s, causal, varlen, *(("first_key", "last_key") if varlen else ("0u", "keys")))
    _bases(t, mask, varlen)
    t.base("dq_base", "dq", ("z", "dq_batch"), ("h", "dq_head"))
    if mask_grad:
        t.base("ds_base", "ds", ("bh", "queries * keys"))
    acc = Accumulators(t, "o", s.thread_q, columns // lanes, "f32")
    acc.declare()
    for i in range(s.thread_q):
        t.let(f"at{i}", f"min(q0 + ty * 4u + {(i // 4) * lanes_m * 4 + i % 4}u, queries - 1u)")
        t.let(f"lse{i}", t.load("lse", "lse_base", f"at{i}"), "f32")
        t.let(f"delta{i}", t.load("delta", "delta_base", f"at{i}"), "f32")
    scores = _Scores(t, s, vec)
    t.loop("k0", "key_begin", "key_end", f"{s.block_k}u")
    scores.product("s", "q", "k", "q_base", "k_base", "q0", "k0", "head")
    scores.product("p", "g", "v", "g_base", "v_base", "q0", "k0", "head_v")
    for i in range(s.thread_q // 4) if dropout else ():
        _kept(t, i, f"q0 + (ty + {i * lanes_m}u) * 4u", "k0 + tx * 4u")
    for i in range(s.thread_q):
        t.open()
        t.let("query", f"q0 + ty * 4u + {(i // 4) * lanes_m * 4 + i % 4}u")
        t.let("key", "k0 + tx * 4u")
        for j, c in enumerate(COMPONENTS):
            _score(t, mask, causal, f"s{i}_0.{c}", "query", f"(key + {j}u)", f"e{j}", varlen)
            t.let(f"w{j}", _probability(t, f"e{j}", f"lse{i}", mask), "f32")
            p = _dropped(t, f"p{i}_0.{c} * drop_scale", i // 4, i % 4, j) if dropout else f"p{i}_0.{c}"
            t.let(
                f"d{j}",
                t.select(f"w{j} * ({p} - delta{i})", t_float(t, "0.0"), f"w{j} == {t_float(t, '0.0')}"),
                "f32",
            )
            if mask_grad:
                t.open(f"query < queries && key + {j}u < keys")
                t.store("ds", "ds_base", f"query * keys + key + {j}u", f"d{j}")
                t.end()
        t.add(f"s{i}_0 = {t.vector([f'd{j}' for j in range(4)])};")
        t.end()
    _share(t, s, "s", lanes_m, pitch)
    _weighted(
        t,
        acc,
        "weights",
        pitch,
        lanes_m,
        "k",
        "k_base",
        "k0",
        "key_end",
        "head",
        columns,
        lanes,
        s.block_k,
        s.chunk,
        vec,
        "kk_",
        s.unroll,
    )
    t.barrier()
    t.end()
    _store_rows(t, s, acc, "dq", "q0", "query_end" if varlen else "queries", "head", lanes, lanes_m, " * scale")
    t.barrier()
    t.end()
    return t.finish()


def _bases(t: Text, mask: str, varlen: str) -> None:
    t.base("q_base", "q", ("z", "q_batch"), ("h", "q_head"))
    t.base("k_base", "k", ("z", "k_batch"), ("(h / group)", "k_head"))
    t.base("v_base", "v", ("z", "v_batch"), ("(h / group)", "v_head"))
    t.base("g_base", "g", ("z", "g_batch"), ("h", "g_head"))
    row = "h" if varlen else "bh"
    t.base("lse_base", "lse", (row, "queries"))
    t.base("delta_base", "delta", (row, "queries"))
    if mask:
        t.base("mask_base", "mask", ("z", "mask_batch"), ("h", "mask_head"))


def backward_key(
    target: Target,
    schedule: Schedule,
    dtype: str,
    head: int,
    head_v: int,
    mask: str = "",
    causal: bool = False,
    vec: bool = False,
    varlen: str = "",
    dropout: bool = False,
) -> Kernel:
    """dk and dv: a workgroup owns block_q keys of a kv head and walks over the queries of its query heads, block_k
    at a time, in order:
    deterministic, grouped heads summed.

    Buffers: q, k, v, g, [mask], [spans], lse, delta, dk, dv.
    Scalars: as forward() up to scale, then batch, head, row strides of q, k, v, g, dk, dv. Grid:
    backward_key_groups()."""
    s = schedule
    name = _name("attention_dkv", s, dtype, head, head_v, mask, causal, vec, varlen=varlen)
    t = Text(target, name + "_dropout" * dropout, s.threads)
    _backward(t, s, dtype, mask, causal, vec, [("dk", dtype), ("dv", dtype)], varlen)
    if dropout:
        _declare_dropout(t)
    columns_k, columns_v = padded(head, s.block_k // 4), padded(head_v, s.block_k // 4)
    lanes, lanes_m, pitch = _tile_sizes(t, s, max(columns_k, columns_v))
    t.let("blocks", f"({'longest' if varlen else 'keys'} + {s.block_q - 1}u) / {s.block_q}u")
    t.let("kv_heads", "heads / group")
    t.loop("tile", t.group, "blocks * kv_heads * batch", t.groups)
    t.let("kv", "(tile / blocks) % kv_heads")
    t.let("z", "tile / (blocks * kv_heads)")
    if varlen:
        _find_sequence(t)
    t.let("k0", f"{'first_key + ' if varlen else ''}(tile % blocks) * {s.block_q}u")
    t.let("key_end", "last_key" if varlen else "keys")
    dk = Accumulators(t, "o", s.thread_q, columns_k // lanes, "f32")
    dv = Accumulators(t, "u", s.thread_q, columns_v // lanes, "f32")
    dk.declare()
    dv.declare()
    query_end = "queries"
    if varlen:
        first = f"max({t.cast('k0', 'i32')} - causal_shift, {t.cast('first_query', 'i32')})"
        t.let("q_begin", t.cast(first, "u32"))
        last = "query_end"
        if varlen == "window":
            highest = f"max({t.cast('k0', 'i32')} + {s.block_q} - diagonal + left, 0)"
            last = f"min(query_end, {t.cast(highest, 'u32')})"
        t.let("q_end", t.select("q_begin", last, "k0 < last_key"))
        query_end = "q_end"
    elif causal:  # the first query that sees a key of this block
        first = f"{t.cast('k0', 'i32')} - causal_shift"
        t.let("q_begin", f"({t.cast(f'max({first}, 0)', 'u32')} / {s.block_k}u) * {s.block_k}u")
    else:
        t.let("q_begin", "0u")
    scores = _Scores(t, s, vec)
    t.loop("h", "kv * group", "kv * group + group", "1u")
    t.let("bh", "z * heads + h")
    _bases(t, mask, varlen)
    t.loop("q0", "q_begin", query_end, f"{s.block_k}u")
    scores.product("s", "k", "q", "k_base", "q_base", "k0", "q0", "head", "keys", "queries")
    scores.product("p", "v", "g", "v_base", "g_base", "k0", "q0", "head_v", "keys", "queries")
    t.let("query", "q0 + tx * 4u")
    for j in range(4):
        t.let(f"at{j}", f"min(query + {j}u, queries - 1u)")
        t.let(f"lse{j}", t.load("lse", "lse_base", f"at{j}"), "f32")
        t.let(f"delta{j}", t.load("delta", "delta_base", f"at{j}"), "f32")
    for i in range(s.thread_q // 4) if dropout else ():
        _kept(t, i, "query", f"k0 + (ty + {i * lanes_m}u) * 4u")
    for i in range(s.thread_q):
        t.open()
        t.let("key", f"k0 + ty * 4u + {(i // 4) * lanes_m * 4 + i % 4}u")
        for j, c in enumerate(COMPONENTS):
            _score(t, mask, causal, f"s{i}_0.{c}", f"(query + {j}u)", "key", f"e{j}", varlen, query_end)
            t.let(f"w{j}", _probability(t, f"e{j}", f"lse{j}", mask), "f32")
            p = _dropped(t, f"p{i}_0.{c} * drop_scale", i // 4, j, i % 4) if dropout else f"p{i}_0.{c}"
            t.let(
                f"d{j}",
                t.select(f"w{j} * ({p} - delta{j})", t_float(t, "0.0"), f"w{j} == {t_float(t, '0.0')}"),
                "f32",
            )
        weights = [_dropped(t, f"w{j}", i // 4, j, i % 4) if dropout else f"w{j}" for j in range(4)]
        t.add(f"s{i}_0 = {t.vector(weights)};", f"p{i}_0 = {t.vector([f'd{j}' for j in range(4)])};")
        t.end()
    args = (lanes, s.block_k, s.chunk, vec)
    _share(t, s, "s", lanes_m, pitch)
    _weighted(
        t, dv, "weights", pitch, lanes_m, "g", "g_base", "q0", query_end, "head_v", columns_v, *args, "gg", s.unroll
    )
    t.barrier()
    _share(t, s, "p", lanes_m, pitch)
    _weighted(
        t, dk, "weights", pitch, lanes_m, "q", "q_base", "q0", query_end, "head", columns_k, *args, "qq", s.unroll
    )
    t.barrier()
    t.end(2)
    t.base("dk_base", "dk", ("z", "dk_batch"), ("kv", "dk_head"))
    t.base("dv_base", "dv", ("z", "dv_batch"), ("kv", "dv_head"))
    _store_rows(t, s, dk, "dk", "k0", "key_end", "head", lanes, lanes_m, " * scale")
    _store_rows(t, s, dv, "dv", "k0", "key_end", "head_v", lanes, lanes_m, " * drop_scale" if dropout else "")
    t.end()
    return t.finish()


def backward_key_groups(schedule: Schedule, batch, kv_heads, keys, minimum=min):
    """Grid of backward_key()."""
    return (minimum(cdiv(keys, schedule.block_q) * kv_heads * batch, MAX_GROUPS), 1, 1)
