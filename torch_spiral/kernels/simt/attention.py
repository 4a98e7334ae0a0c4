"""Flash attention of the `simt` class: forward with logsumexp, and a deterministic backward.

Layout: q (batch, heads, queries, head), k (batch, kv_heads, keys, head), v (batch, kv_heads, keys, head_v), any strides with stride 1
along the head dimension where `unit` says so; heads is a multiple of kv_heads (query head h reads kv head h / (heads / kv_heads)).
Storage f32, f16 or bf16; everything is computed in f32.

score = scale * q.k + mask. Masked: an element whose score is -inf counts nothing; a row with no element gives 0 and logsumexp -inf.
causal: query i sees keys up to i + causal_shift (0 for torch's is_causal; keys - queries for lower right alignment).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernel import Kernel, Target
from . import COMPONENTS, MAX_GROUPS, Text, cdiv
from .gemm import Accumulators, TileLoader

NEVER = "-3.0e38"  # below every score of a visible element, finite: exp(x - x) never sees inf - inf


@dataclass(frozen=True)
class Schedule:
    """A workgroup owns block_q queries and walks over the keys block_k at a time (backward for keys: the reverse).

    thread_q x 4 scores an invocation; chunk: how much of a contraction is in shared memory at a time.
    """

    block_q: int
    block_k: int
    thread_q: int = 4
    chunk: int = 16
    unroll: int = 0

    @property
    def threads(self) -> int:
        return self.block_q // self.thread_q * (self.block_k // 4)

    @property
    def key(self) -> str:
        return f"{self.block_q}x{self.block_k}_{self.thread_q}_c{self.chunk}" + (f"_u{self.unroll}" if self.unroll else "")

    def workgroup_memory(self, head_v: int = 64) -> int:
        """Bytes of the forward kernel."""
        lanes = self.block_k // 4
        staging = self.chunk * max(self.block_q + self.block_k + 8, padded(head_v, lanes))
        return 4 * (self.block_k * (self.block_q + 4) + staging + self.block_q * (lanes + 4))

    def fits(self, target: Target, head_v: int = 64) -> bool:
        return self.threads <= target.max_workgroup_size and self.workgroup_memory(head_v) <= target.max_workgroup_memory


SCHEDULES: tuple[Schedule, ...] = (
    Schedule(32, 32, 4, 16, 2),
    Schedule(32, 32, 4, 8, 2),
    Schedule(32, 32, 4, 16),
    Schedule(32, 32, 4, 8),
    Schedule(64, 32, 4, 16),
    Schedule(64, 32, 4, 8),
    Schedule(64, 64, 4, 16),
    Schedule(64, 64, 8, 16),
    Schedule(128, 64, 8, 16),
    Schedule(128, 32, 8, 16),
    Schedule(64, 64, 8, 8),
)


def default_schedule(target: Target, head_v: int, queries_bucket: int) -> Schedule:
    """A schedule by head size and floor(log2(queries)), within the target's limits."""
    wide = queries_bucket >= 6 and target.compute_units > 4
    for s in (Schedule(64, 32, 4, 16), Schedule(64, 32, 4, 8)) if wide and head_v <= 128 else ():
        if s.fits(target, head_v):
            return s
    return SCHEDULES[0] if SCHEDULES[0].fits(target, head_v) else SCHEDULES[1]


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

    def product(self, name: str, a: str, b: str, a_base: str, b_base: str, q0: str, k0: str, size: str, declare: bool) -> None:
        """name[query][key] = sum over d < size of a[q0 + query, d] b[k0 + key, d]; a, b: buffers with <buffer>_row strides."""
        t, s = self.t, self.s
        la = TileLoader(t, a, "stage", s.block_q, s.chunk, "k", self.vec, True, False)
        lb = TileLoader(t, b, "stage", s.block_k, s.chunk, "k", self.vec, True, False)
        la.shared, lb.shared = "stage", "stage"
        offset = s.chunk * la.pitch
        pa, pb = _Prefixed(la, f"{name}a", 0), _Prefixed(lb, f"{name}b", offset)
        acc = Accumulators(t, name, s.thread_q, 4, "f32")
        acc.declare()
        t.open()
        pa.begin(a_base, q0, "queries", f"{a}_row", "1u", "0u")
        pb.begin(b_base, k0, "keys", f"{b}_row", "1u", "0u")
        t.loop("d0", "0u", size, f"{s.chunk}u")
        pa.load("d0", size)
        pb.load("d0", size)
        t.barrier()  # the last chunk has been read by all
        pa.store()
        pb.store()
        t.barrier()
        t.let("b_stage", f"{offset}u + tx")
        acc.multiply("stage", la.pitch, self.lanes_q, "stage", lb.pitch, self.lanes_k, s.chunk, tx="b_stage", unroll=s.unroll)
        t.end()
        t.end()


class _Prefixed(TileLoader):
    """A TileLoader whose registers have their own names and whose tile starts at `offset` of the shared staging area."""

    def __init__(self, loader: TileLoader, prefix: str, offset: int):
        self.__dict__.update(loader.__dict__)
        self.prefix, self.offset = prefix, offset

    def begin(self, *args: str) -> None:
        self.shared = self.prefix
        super().begin(*args)

    def load(self, *args: str) -> None:
        self.shared = self.prefix
        super().load(*args)

    def store(self) -> None:
        t = self.t
        for l in range(self.loads):
            row, k = self.place(l)
            guarded = self.partial and l == self.loads - 1
            if guarded:
                t.open(f"lid < {self.count - l * t.threads}u")
            v = f"{self.prefix}_v{l}"
            if self.vec and self.unit == "r":
                t.add(f"stage[{self.offset}u + {k} * {self.pitch}u + {row} / 4u] = {v};")
            elif self.vec:
                for j, c in enumerate(COMPONENTS):
                    t.put_component("stage", f"{self.offset}u + ({k} + {j}u) * {self.pitch}u + {row} / 4u", f"({row} % 4u)", f"{v}.{c}", "f32")
            else:
                t.put_component("stage", f"{self.offset}u + {k} * {self.pitch}u + {row} / 4u", f"({row} % 4u)", v, "f32")
            if guarded:
                t.end()


def _weighted(t: Text, acc: Accumulators, weights: str, pitch: int, lanes_m: int, buffer: str, base: str, row0: str, rows_end: str, size: str,
              columns: int, lanes_n: int, block: int, chunk: int, vec: bool, prefix: str, unroll: int) -> None:  # fmt: skip
    """acc[m][column] += sum over r < block of weights[r][m] X[row0 + r, column]: X is the second operand of P V, dS K, dS^T Q, P^T dO.

    weights: shared, r-major with `pitch` vec4 a row. Rows of X beyond rows_end load zeros; columns beyond size are clamped.
    """
    loader = TileLoader(t, buffer, "stage", columns, chunk, "r", vec, True, False, columns // 4)
    p = _Prefixed(loader, prefix, 0)
    t.open()
    p.begin(base, "0u", size, "1u", f"{buffer}_row", row0)
    t.loop("r0", "0u", f"{block}u", f"{chunk}u")
    p.load(f"{row0} + r0", rows_end)
    t.barrier()
    p.store()
    t.barrier()
    t.let("w0", f"r0 * {pitch}u + ty")
    acc.multiply(weights, pitch, lanes_m, "stage", columns // 4, lanes_n, chunk, ty="w0", unroll=unroll)
    t.end()
    t.end()


MASKS = ("", "f32", "f16", "bf16", "bool")


def _score(t: Text, mask: str, causal: bool, value: str, query: str, key: str, out: str) -> None:
    """Declares f32 `out`: the score of (query, key), NEVER where it does not count."""
    t.var(out, f"{value} * scale", "f32")
    conditions = [f"{key} >= key_end", f"{query} >= queries"]
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
            t.add(f"{out} = max({out} + {t.load('mask', 'mask_base', at)}, {t_float(t, NEVER)});")
    t.end()


def t_float(t: Text, literal: str) -> str:
    return literal if t.wgsl else literal + "f"


def mask_load(t: Text, at: str) -> str:
    if t.wgsl:
        return f"(((mask[(mask_base + {at}) >> 2u] >> (((mask_base + {at}) & 3u) * 8u)) & 0xffu) != 0u)"
    return f"(mask_base[{at}] != 0)"


def _declare(t: Text, names: list[str]) -> None:
    for n in names:
        t.scalar(f"{n}_batch", f"{n}_head", f"{n}_row")


def _common_scalars(t: Text, mask: str, causal: bool) -> None:
    t.scalar("batch", "heads", "group", "queries", "keys", "head", "head_v")
    if mask:
        t.scalar("mask_batch", "mask_head", "mask_row", "mask_col")
    if causal:
        t.scalar("causal_shift", type="i32")
    t.scalar("scale", type="f32")


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
) -> Kernel:
    """out = softmax(scale q k^T + mask) v and lse = logsumexp of the scores (f32, natural logarithm).

    head, head_v: head_class() of the sizes; the sizes themselves are scalars. mask: "" or the mask's storage dtype ("bool": true counts).
    vec: head sizes, strides and offsets of q, k, v divisible by 4. All have stride 1 along the head dimension.
    Buffers: q, k, v, [mask], out, lse.
    Scalars (u32): batch, heads, group (= heads / kv_heads), queries, keys, head, head_v, [mask_batch, mask_head, mask_row, mask_col],
    [causal_shift (i32)], scale (f32), then batch, head, row strides of q, k, v, out each; with split: splits, key_span.
    lse is contiguous (batch, heads, queries).
    split (decode, few queries): the keys are dealt to `splits` workgroups, key_span each; out is then f32 and contiguous
    (splits, batch, heads, queries, head_v), lse (splits, batch, heads, queries); merge() finishes. out's strides are unused.
    Grid: forward_groups().
    """
    s = schedule
    t = Text(target, f"attention_{dtype}_{head}_{head_v}_{mask or 'none'}{'_causal' if causal else ''}{'_vec' if vec else ''}"
             f"{'_split' if split else ''}_{s.key}", s.threads)  # fmt: skip
    width = 4 if vec else 1
    for n in "qkv":
        t.buffer(n, dtype, "r", width)
    if mask:
        t.buffer("mask", mask)
    t.buffer("out", "f32" if split else dtype, "w")
    t.buffer("lse", "f32", "w")
    _common_scalars(t, mask, causal)
    _declare(t, ["q", "k", "v", "out"])
    if split:
        t.scalar("splits", "key_span")
    lanes_k, lanes_q = s.block_k // 4, s.block_q // s.thread_q
    columns = padded(head_v, lanes_k)
    pitch_p = s.block_q // 4 + 1
    scores = _Scores(t, s, vec)
    stage = s.chunk * max(s.block_q // 4 + s.block_k // 4 + 2, columns // 4)
    t.shared("stage", "f32", stage)
    t.shared("weights", "f32", s.block_k * pitch_p)  # [key][query]
    t.shared("partial", "f32", s.block_q * lanes_k, 1)  # [lane][query]: row maxima, then row sums
    t.shared("row_max", "f32", s.block_q // 4)
    t.shared("row_sum", "f32", s.block_q // 4)
    t.shared("row_scale", "f32", s.block_q // 4)

    t.let("tx", f"lid % {lanes_k}u")
    t.let("ty", f"lid / {lanes_k}u")
    t.let("blocks", f"(queries + {s.block_q - 1}u) / {s.block_q}u")
    t.loop("tile", t.group, "blocks * heads * batch" + (" * splits" if split else ""), t.groups)
    if split:
        t.let("part", "(tile / blocks) % splits")
        t.let("bh", "tile / (blocks * splits)")
        t.let("q0", f"(tile % blocks) * {s.block_q}u")
        t.let("key_begin", "min(part * key_span, keys)")
        t.let("key_last", "min(key_begin + key_span, keys)")
    else:
        t.let("bh", "tile / blocks")
        # The longest blocks of a causal product first.
        t.let("q0", f"(blocks - 1u - tile % blocks) * {s.block_q}u")
        t.let("key_begin", "0u")
        t.let("key_last", "keys")
    t.let("z", "bh / heads")
    t.let("h", "bh % heads")
    if causal:
        visible = f"{t.cast(f'min(q0 + {s.block_q}u, queries)', 'i32')} + causal_shift"
        t.let("key_end", f"min(key_last, {t.cast(f'max({visible}, 0)', 'u32')})")
    else:
        t.let("key_end", "key_last")
    t.base("q_base", "q", ("z", "q_batch"), ("h", "q_head"))
    t.base("k_base", "k", ("z", "k_batch"), ("(h / group)", "k_head"))
    t.base("v_base", "v", ("z", "v_batch"), ("(h / group)", "v_head"))
    if mask:
        t.base("mask_base", "mask", ("z", "mask_batch"), ("h", "mask_head"))
    o = Accumulators(t, "o", s.thread_q, columns // lanes_k, "f32")
    o.declare()
    quads = s.thread_q // 4
    t.open(f"lid < {s.block_q // 4}u")
    t.add(f"row_max[lid] = {t.splat(t_float(t, NEVER))};", f"row_sum[lid] = {t.zero('f32', 4)};")
    t.end()
    t.barrier()
    t.loop("k0", "key_begin", "key_end", f"{s.block_k}u")
    scores.product("s", "q", "k", "q_base", "k_base", "q0", "k0", "head", True)
    # Scores with mask; the maximum of a row over this invocation's four keys.
    for i in range(s.thread_q):
        row = f"(ty * 4u + {(i // 4) * lanes_q * 4 + i % 4}u)"
        t.open()
        t.let("query", f"q0 + {row}")
        t.let("key", "k0 + tx * 4u")
        for j, c in enumerate(COMPONENTS):
            _score(t, mask, causal, f"s{i}_0.{c}", "query", f"(key + {j}u)", f"e{j}")
        t.add(f"s{i}_0 = {t.vector([f'e{j}' for j in range(4)])};")
        t.add(f"partial[tx * {s.block_q}u + {row}] = max(max(e0, e1), max(e2, e3));")
        t.end()
    t.barrier()
    t.open(f"lid < {s.block_q}u") if s.threads >= s.block_q else t.loop("r", "lid", f"{s.block_q}u", f"{s.threads}u")
    r = "lid" if s.threads >= s.block_q else "r"
    t.let("old", t.get_component("row_max", r, "f32"), "f32")
    t.var("new_max", "old", "f32")
    for j in range(lanes_k):
        t.add(f"new_max = max(new_max, partial[{j * s.block_q}u + {r}]);")
    t.put_component("row_max", f"{r} / 4u", f"({r} % 4u)", "new_max", "f32")
    t.put_component("row_scale", f"{r} / 4u", f"({r} % 4u)", "exp(old - new_max)", "f32")
    t.end()
    t.barrier()
    for i in range(quads):
        t.let(f"m{i}", f"row_max[ty + {i * lanes_q}u]", "f32", 4)
        t.let(f"f{i}", f"row_scale[ty + {i * lanes_q}u]", "f32", 4)
    for i in range(s.thread_q):
        t.open()
        m = f"m{i // 4}.{COMPONENTS[i % 4]}"
        parts = []
        for j, c in enumerate(COMPONENTS):
            v = f"s{i}_0.{c}"
            t.let(f"e{j}", t.select(f"exp({v} - {m})", t_float(t, "0.0"), f"{v} <= {t_float(t, NEVER)}"), "f32")
            parts.append(f"e{j}")
        t.add(f"s{i}_0 = {t.vector(parts)};")
        t.add(f"partial[tx * {s.block_q}u + ty * 4u + {(i // 4) * lanes_q * 4 + i % 4}u] = (e0 + e1) + (e2 + e3);")
        t.end()
    for i in range(quads):
        for j, c in enumerate(COMPONENTS):
            t.add(f"weights[(tx * 4u + {j}u) * {pitch_p}u + {i * lanes_q}u + ty] = {t.vector([f's{i * 4 + l}_0.{c}' for l in range(4)])};")
    for m, v in o.each():
        t.add(f"o{m}_{v} = o{m}_{v} * {t.splat(f'f{m // 4}.{COMPONENTS[m % 4]}')};")
    t.barrier()
    t.open(f"lid < {s.block_q}u") if s.threads >= s.block_q else t.loop("r", "lid", f"{s.block_q}u", f"{s.threads}u")
    t.var("sum", f"{t.get_component('row_sum', r, 'f32')} * {t.get_component('row_scale', r, 'f32')}", "f32")
    for j in range(lanes_k):
        t.add(f"sum = sum + partial[{j * s.block_q}u + {r}];")
    t.put_component("row_sum", f"{r} / 4u", f"({r} % 4u)", "sum", "f32")
    t.end()
    _weighted(t, o, "weights", pitch_p, lanes_q, "v", "v_base", "k0", "key_end", "head_v", columns, lanes_k, s.block_k, s.chunk, vec, "vv", s.unroll)
    t.barrier()
    t.end()
    if split:
        t.let("out_at", "((part * batch + z) * heads + h) * queries")
        t.base("out_base", "out", ("out_at", "head_v"))
    else:
        t.base("out_base", "out", ("z", "out_batch"), ("h", "out_head"))
    t.barrier()
    for i in range(quads):
        t.let(f"l{i}", f"row_sum[ty + {i * lanes_q}u]", "f32", 4)
        t.let(f"mm{i}", f"row_max[ty + {i * lanes_q}u]", "f32", 4)
    for i in range(s.thread_q):
        t.open()
        t.let("query", f"q0 + ty * 4u + {(i // 4) * lanes_q * 4 + i % 4}u")
        t.let("total", f"l{i // 4}.{COMPONENTS[i % 4]}", "f32")
        zero, one = t_float(t, "0.0"), t_float(t, "1.0")
        t.let("inverse", t.select(f"{one} / total", zero, f"total == {zero}"), "f32")
        t.open("query < queries")
        for v in range(o.v):
            for j, c in enumerate(COMPONENTS):
                t.let(f"col{v}_{j}", f"({v * lanes_k}u + tx) * 4u + {j}u")
                t.open(f"col{v}_{j} < head_v")
                t.store("out", "out_base", f"query * {'head_v' if split else 'out_row'} + col{v}_{j}", f"o{i}_{v}.{c} * inverse")
                t.end()
        t.open("tx == 0u")
        inf = "-1.0 / zero" if t.wgsl else "-INFINITY"
        if t.wgsl:  # naga folds constants and refuses infinities
            t.let("inf_bits", "0xff800000u | min(queries, 0u)")
            inf = "bitcast<f32>(inf_bits)"
        at = "((part * batch + z) * heads + h) * queries + query" if split else "bh * queries + query"
        t.base("lse_base", "lse")
        t.store("lse", "lse_base", at, t.select(f"mm{i // 4}.{COMPONENTS[i % 4]} + log(total)", inf, f"total == {zero}"))
        t.end()
        t.end()
        t.end()
    t.barrier()
    t.end()
    return t.finish()


def forward_groups(schedule: Schedule, batch, heads, queries, splits=1, minimum=min):
    """Grid of forward()."""
    return (minimum(cdiv(queries, schedule.block_q) * heads * batch * splits, MAX_GROUPS), 1, 1)
