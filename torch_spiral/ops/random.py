"""Random numbers, by Philox4x32-10: the same words on every engine.

The key is the generator's seed; a call reserves a range of the 128-bit counter, whose first value is the generator's offset.
Samples are drawn in one of two ways (tests/philox.py has the reference):

  by blocks   Each element takes W = 1 or 2 of a counter's four words, so a counter serves E = 4 / W elements. Element i is in
              block b = i // (16 * E); with j = i % (16 * E), it takes the words that start at W * (j // 16) of counter
              offset + 16 * b + j % 16. The number of an element doesn't depend on how many there are.
  by element  Where an element takes as many words as it happens to need (gamma, Poisson, binomial), its counter is
              offset + i, and the counter's third word counts its draws.

Elements are counted in C order, or in the order of memory where a tensor is not contiguous.

A uniform number of a dtype with d digits is the d high bits of its word(s) / 2**d. Normal numbers come in pairs from two
uniform numbers u, v (Box and Muller): (sqrt(-2 log u) cos(2 pi v), sqrt(-2 log u) sin(2 pi v)), with u = (word + 1/2) / 2**32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..kernels import ir
from ..kernels.builder import KernelBuilder
from ..kernels.ir import where
from ..kernels.kernel import DTYPES, Kernel, Target, compute_dtype
from ..kernels.nest import SIMT_WORKGROUP, fold_groups
from ..lowering import (
    Iter,
    Tensor,
    build,
    cdiv,
    check,
    composite,
    empty,
    eq,
    float_function,
    launch,
    le,
    lowering,
    philox,
    stub,
    target,
    to_int,
)  # fmt: skip
from ..lowering import where as select
from .common import broadcast, contiguous, copy_to, fill, map_tensors, write_out
from .elementwise import as_dtype
from .items import Item, is_probability, require

LANES = 16  # counters of a block; a part of the numbering, not a tuning parameter
TASK_BLOCKS = 128  # blocks that one workgroup of a CPU device draws
TASK_ELEMENTS = 512
DIGITS = {"f32": 24, "f16": 11, "bf16": 8, "f64": 53}


# ---- Philox ----------------------------------------------------------------------------------------------------------


def _multiply(target: Target, a: Any, m: int) -> tuple[Any, Any]:
    """High and low word of a * m."""
    low = a * ir.const(m, "u32")
    if target.language != "wgsl" or target.int64:
        return ir.cast(ir.shr(ir.cast(a, "u64") * ir.const(m, "u64"), 32), "u32"), low
    a0, a1, m0, m1 = ir.and_(a, 0xFFFF), ir.shr(a, 16), m & 0xFFFF, m >> 16
    middle = a1 * m0 + ir.shr(a0 * m0, 16)
    other = a0 * m1 + ir.and_(middle, 0xFFFF)
    return a1 * m1 + ir.shr(middle, 16) + ir.shr(other, 16), low


def philox4x32(k: KernelBuilder, counter: Sequence[Any], key: Sequence[Any]) -> list[Any]:
    """Four u32 nodes for a counter of four u32 nodes and a key of two; with lanes where the counter has them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for r in range(10):
        (high0, low0), (high1, low1) = _multiply(k.target, c0, 0xD2511F53), _multiply(k.target, c2, 0xCD9E8D57)
        key0, key1 = k0 + ((r * 0x9E3779B9) & 0xFFFFFFFF), k1 + ((r * 0xBB67AE85) & 0xFFFFFFFF)
        c0, c1, c2, c3 = (
            k.let(c) for c in (ir.xor(ir.xor(high1, c1), key0), low1, ir.xor(ir.xor(high0, c3), key1), low0)
        )
    return [c0, c1, c2, c3]


def _words(n: Any) -> list[Any]:
    """A 64-bit Sym as its low and high 32 bits."""
    return [n % (1 << 32), n // (1 << 32)]


class Source:
    """The generator's range inside a kernel: four scalars."""

    def __init__(self, k: KernelBuilder) -> None:
        self.k = k
        self.key = [k.scalar("seed_low", "u32"), k.scalar("seed_high", "u32")]
        self.offset = [k.scalar("offset_low", "u32"), k.scalar("offset_high", "u32")]

    def words(self, counter: Any, draw: Any = 0) -> list[Any]:
        """The four words of counter offset + counter (u32), of draw number `draw`."""
        low = self.k.let(self.offset[0] + counter)
        high = self.offset[1] + where(low < self.offset[0], ir.const(1, "u32"), ir.const(0, "u32"))
        return philox4x32(self.k, [low, high, ir.as_node(draw, "u32"), ir.const(0, "u32")], self.key)


# ---- drawing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _contiguous_out(out: Tensor) -> Iterator[Tensor]:
    """out, or a contiguous tensor that is copied to it in the end."""
    if out.is_contiguous:
        yield out
        return
    flat = empty(out.sizes, out.dtype)
    yield flat
    copy_to(out, flat)


def draw(
    name: str, sample: Callable[..., Any], words: int, finish: Callable[..., Any], outs: Sequence[Tensor], ins: Sequence[Tensor] = (),
    values: Sequence[Any] = (), types: Sequence[str] = (),
) -> None:  # fmt: skip
    """outs = finish(sample, *ins, *values) for every element, by blocks.

    sample: gives 4 / words samples from the four words of a counter and the compute dtype of outs[0]. Tensors are contiguous and of
    one size. name says what sample and finish compute; both must be functions of a module."""
    n = outs[0].numel
    check(le(n, (1 << 31) - 1), "RuntimeError", "random numbers for a tensor of more than 2^31 elements")
    block = LANES * 4 // words
    blocks = cdiv(n, block)
    seed, offset = philox(blocks * LANES)
    kernel = build(
        _draw_kernel,
        name,
        sample,
        words,
        finish,
        tuple(o.dtype for o in outs),
        tuple(i.dtype for i in ins),
        tuple(types),
    )
    wide = [v for v, t in zip(values, types) if t in ("i64", "f64")]
    narrow = [v for v, t in zip(values, types) if t not in ("i64", "f64")]
    if target().schedule_class == "vector":
        groups: Sequence[Any] = (cdiv(blocks, TASK_BLOCKS), 1, 1)
    else:
        groups = fold_groups(target(), cdiv(blocks * LANES, kernel.workgroup[0]))
    launch(kernel, [*outs, *ins], [*wide, *_words(seed), *_words(offset), n, *narrow], groups)


def _draw_kernel(
    target: Target, name: str, sample: Callable[..., Any], words: int, finish: Callable[..., Any], outs: tuple, ins: tuple, types: tuple,
) -> Kernel:  # fmt: skip
    vector = target.schedule_class == "vector"
    k = KernelBuilder(target, "_".join(["random", name, *outs, *ins, *types, "vector" if vector else "simt"]))
    out_buffers = [k.buffer(f"out{i}", d, "w") for i, d in enumerate(outs)]
    in_buffers = [k.buffer(f"in{i}", d) for i, d in enumerate(ins)]
    source = Source(k)
    n = k.scalar("n", "u32")
    values = [k.scalar(f"value{i}", t) for i, t in enumerate(types)]
    part = compute_dtype(outs[0])
    per = 4 // words

    def emit(counter: Any, first: Any, guarded: bool) -> None:
        """Elements first + 16 * r of one counter (or of 16, with lanes)."""
        samples = [
            k.let(s) if not isinstance(s, tuple) else tuple(k.let(x) for x in s)
            for s in sample(source.words(counter), part)
        ]
        for r in range(per):
            index = k.let(first + r * LANES) if guarded else first + r * LANES

            def store(index: Any = index, r: int = r) -> None:
                results = finish(samples[r], *[b[index] for b in in_buffers], *values)
                results = results if isinstance(results, tuple) else (results,)
                loaded = [as_dtype(v, d) for v, d in zip(results, outs)]
                for b, v in zip(out_buffers, loaded):
                    b[index] = v

            if guarded:
                with k.If(index < n):
                    store()
            else:
                store()

    if not vector:
        size = min(SIMT_WORKGROUP, target.max_workgroup_size)
        i = k.global_id(size)
        lane = k.let(ir.and_(i, LANES - 1))
        first = k.let((i - lane) * per + lane)
        with k.If(first < n):
            emit(i, first, True)
        return k.finish((size, 1, 1))
    blocks = k.let(ir.idiv(n + (LANES * per - 1), LANES * per))
    start = k.let(k.group_index() * TASK_BLOCKS)
    with k.For(start, k.let(ir.minimum(start + TASK_BLOCKS, blocks))) as b:
        first = k.let(b * (LANES * per))
        with k.If(first + LANES * per <= n):
            emit(k.let(b * LANES + k.lanes(LANES, "u32")), first + k.lanes(LANES, "u32"), False)
        with k.Else(), k.For(ir.const(0, "u32"), LANES) as lane:
            emit(b * LANES + lane, first + lane, True)
    return k.finish()


class Stream:
    """The numbers of one element, drawn by element."""

    def __init__(self, k: KernelBuilder, source: Source, element: Any) -> None:
        self.k, self.source, self.element = k, source, element
        self.draws = k.var("u32", 0)

    def words(self) -> list[Any]:
        """The next four words."""
        words = self.source.words(self.element, self.draws.as_node())
        self.draws.set(self.draws + 1)
        return words


def draw_each(
    name: str,
    body: Callable[..., Any],
    out: Tensor,
    ins: Sequence[Tensor],
    values: Sequence[Any] = (),
    types: Sequence[str] = (),
) -> None:
    """out = body(stream, *ins, *values) element by element: body emits statements. Contiguous tensors of one size."""
    n = out.numel
    check(le(n, (1 << 31) - 1), "RuntimeError", "random numbers for a tensor of more than 2^31 elements")
    seed, offset = philox(n)
    kernel = build(_each_kernel, name, body, out.dtype, tuple(i.dtype for i in ins), tuple(types))
    if target().schedule_class == "vector":
        groups: Sequence[Any] = (cdiv(n, TASK_ELEMENTS), 1, 1)
    else:
        groups = fold_groups(target(), cdiv(n, kernel.workgroup[0]))
    launch(kernel, [out, *ins], [*_words(seed), *_words(offset), n, *values], groups)


def _for_each(k: KernelBuilder, n: Any, emit: Callable[[Any], None]) -> Kernel:
    """Finishes a kernel that emits one element after the other: an invocation each on GPUs, tasks of many on CPU devices."""
    if k.target.schedule_class != "vector":
        size = min(SIMT_WORKGROUP, k.target.max_workgroup_size)
        i = k.global_id(size)
        with k.If(i < n):
            emit(i)
        return k.finish((size, 1, 1))
    start = k.let(k.group_index() * TASK_ELEMENTS)
    with k.For(start, k.let(ir.minimum(start + TASK_ELEMENTS, n))) as i:
        emit(i)
    return k.finish()


def _each_kernel(target: Target, name: str, body: Callable[..., Any], out: str, ins: tuple, types: tuple) -> Kernel:
    vector = target.schedule_class == "vector"
    k = KernelBuilder(target, "_".join(["random_each", name, out, *ins, *types, "vector" if vector else "simt"]))
    o = k.buffer("out", out, "w")
    buffers = [k.buffer(f"in{i}", d) for i, d in enumerate(ins)]
    source = Source(k)
    n = k.scalar("n", "u32")
    values = [k.scalar(f"value{i}", t) for i, t in enumerate(types)]

    def emit(i: Any) -> None:
        o[i] = as_dtype(body(Stream(k, source, i), *[b[i] for b in buffers], *values), out)

    return _for_each(k, n, emit)


# ---- samples from words ----------------------------------------------------------------------------------------------


def _uniform_of(digits: int) -> Callable[..., Any]:
    def sample(words: Sequence[Any], part: str) -> list[Any]:
        if digits == 53:
            return [_uniform53(words[0], words[1]), _uniform53(words[2], words[3])]
        return [ir.cast(ir.shr(w, 32 - digits), "f32") * 2.0**-digits for w in words]

    return sample


def _uniform53(high: Any, low: Any) -> Any:
    """The 53 high bits of two words as a f64 in [0, 1)."""
    return ir.cast(ir.shr(high, 5), "f64") * 2.0**-27 + ir.cast(ir.shr(low, 6), "f64") * 2.0**-53


def _open_uniform(word: Any) -> Any:
    """A f32 in (0, 1]."""
    return ir.cast(word, "f32") * 2.0**-32 + 2.0**-33


def _opens(words: Sequence[Any], part: str) -> list[Any]:
    if part == "f64":
        return [1.0 - u for u in _uniform_of(53)(words, part)]
    return [_open_uniform(w) for w in words]


def _normals(words: Sequence[Any], part: str) -> list[Any]:
    u = _opens(words, part)
    out = []
    for a, b in zip(u[::2], u[1::2]):
        r, angle = ir.sqrt(-2.0 * ir.log(a)), b * (2 * math.pi)
        out += [r * ir.cos(angle), r * ir.sin(angle)]
    return out


def _bits24(words: Sequence[Any], part: str) -> list[Any]:
    return [ir.shr(w, 8) for w in words]


def _bits32(words: Sequence[Any], part: str) -> list[Any]:
    return list(words)


def _bits64(words: Sequence[Any], part: str) -> list[Any]:
    return [
        ir.or_(ir.cast(a, "u64"), ir.shl(ir.cast(b, "u64"), 32))
        for a, b in ((words[0], words[1]), (words[2], words[3]))
    ]


_UNIFORMS = {d: _uniform_of(d) for d in set(DIGITS.values())}


def _real(dtype: str) -> tuple[int, str]:
    """Words of a sample of a floating dtype, and the type of its parameters. Other dtypes are drawn as f32."""
    return (2, "f64") if dtype in ("f64", "c128") else (1, "f32")


def _fill(it: Iter, name: str, sample: Callable[..., Any], words: int, finish: Callable[..., Any], values: Sequence[Any] = (),
          types: Sequence[str] = ()) -> None:  # fmt: skip
    out = it.outputs[0].tensor
    assert out is not None
    out = out.permute(range(out.ndim - 1, -1, -1))
    if out.ndim == 0:
        out = out.view((1,), (1,))
    with _contiguous_out(out) as flat:
        draw(name, sample, words, finish, [flat], (), values, types)


# ---- distributions ---------------------------------------------------------------------------------------------------


def _between(u: Any, low: Any, high: Any) -> Any:
    v = u * (high - low) + low
    return where(ir.ge(v, high), low, v)


def _between_f16(u: Any, low: Any, high: Any) -> Any:
    v = ir.round_to(u * (high - low) + low, "f16")
    return where(ir.ge(v, high), low, v)


def _between_bf16(u: Any, low: Any, high: Any) -> Any:
    v = ir.round_to(u * (high - low) + low, "bf16")
    return where(ir.ge(v, high), low, v)


@stub("uniform_stub")
def uniform(it: Iter, low: Any, high: Any) -> None:
    """Uniform in [low, high)."""
    dtype = it.outputs[0].dtype
    words, part = _real(dtype)
    finish = {"f16": _between_f16, "bf16": _between_bf16}.get(dtype, _between)
    digits = DIGITS.get(dtype, 24)
    _fill(it, f"uniform{digits}", _UNIFORMS[digits], words, finish, (low, high), (part, part))


def _affine(z: Any, mean: Any, std: Any) -> Any:
    return z * std + mean


@stub("normal_stub")
def normal(mean: Any, std: Any, out: Tensor) -> None:
    """Normal with the given mean and standard deviation."""
    words, part = _real(out.dtype)
    with _contiguous_out(out) as flat:
        draw("normal", _normals, words, _affine, [flat], (), (mean, std), (part, part))


def _log_normal(z: Any, mean: Any, std: Any) -> Any:
    return ir.exp(z * std + mean)


@stub("log_normal_stub")
def log_normal(it: Iter, mean: Any, std: Any) -> None:
    """exp of normal numbers."""
    words, part = _real(it.outputs[0].dtype)
    _fill(it, "log_normal", _normals, words, _log_normal, (mean, std), (part, part))


def _exponential(u: Any, rate: Any) -> Any:
    half = 2.0**-53 if u.dtype == "f64" else 2.0**-24
    return where(ir.ge(u, 1.0 - half), half, -ir.log(u)) / rate  # never 0


@stub("exponential_stub")
def exponential(it: Iter, rate: Any) -> None:
    """-log(u) / rate, more than 0."""
    words, part = _real(it.outputs[0].dtype)
    _fill(it, "exponential", _opens, words, _exponential, (rate,), (part,))


def _geometric(u: Any, log1m: Any) -> Any:
    return ir.maximum(ir.ceil(ir.log(u) / log1m), 1.0)


@stub("geometric_stub")
def geometric(it: Iter, p: Any) -> None:
    """Trials until the first success, at least 1."""
    words, part = _real(it.outputs[0].dtype)
    _fill(it, "geometric", _opens, words, _geometric, (float_function("FLog", 1.0 - p),), (part,))


def _cauchy(u: Any, median: Any, sigma: Any) -> Any:
    eps = 2.0**-52 if u.dtype == "f64" else 2.0**-23
    return median + sigma * ir.tan(math.pi * (ir.clamp(u, eps, 1.0 - eps) - 0.5))


@stub("cauchy_stub")
def cauchy(it: Iter, median: Any, sigma: Any) -> None:
    """median + sigma * tan(pi * (u - 1/2))."""
    words, part = _real(it.outputs[0].dtype)
    _fill(it, "cauchy", _opens, words, _cauchy, (median, sigma), (part, part))


def _below(bits: Any, threshold: Any) -> Any:
    return ir.lt(bits, threshold)


def threshold24(p: Any) -> Any:
    """t such that a uniform 24-bit integer is below t with probability p, in [0, 2**24]."""
    return to_int(-float_function("FFloor", p * -16777216.0))


@stub("bernoulli_scalar_stub")
def bernoulli_scalar(p: Any, out: Tensor) -> None:
    """1 with probability p, else 0."""
    with _contiguous_out(out) as flat:
        draw("bernoulli", _bits24, 1, _below, [flat], (), (threshold24(p),), ("u32",))


def _below_probability(bits: Any, p: Any) -> Any:
    if p.dtype not in ("f32", "f64"):
        p = ir.cast(p, "f32")
    return ir.lt(ir.cast(bits, p.dtype) * 2.0**-24, p)


def _is_rate(it: Item) -> None:
    it.check(ir.cast(ir.ge(it.load("x"), 0), "i32"), 1, 2)


@stub("bernoulli_tensor_stub")
def bernoulli_tensor(p: Tensor, out: Tensor) -> None:
    """1 with the probabilities of p, else 0. Probabilities outside of [0, 1] are reported by the kernel."""
    text = "Expected p_in >= 0 && p_in <= 1 to be true, but got false."
    require("bernoulli_check", is_probability, p, text)
    p = contiguous(broadcast(p, out.sizes))
    with _contiguous_out(out) as flat:
        draw("bernoulli_tensor", _bits24, 1, _below_probability, [flat], [p])


def _modulo32(bits: Any, limit: Any, base: Any) -> Any:
    """bits % limit + base; a limit of 2**32 arrives as 0."""
    return (
        ir.cast(where(ir.eq(limit, 0), bits, ir.irem(bits, where(ir.eq(limit, 0), ir.const(1, "u32"), limit))), "i32")
        + base
    )


def _modulo64(bits: Any, limit: Any, base: Any) -> Any:
    limit = ir.cast(limit, "u64")
    return ir.cast(ir.irem(bits, limit), "i64") + base


@stub("random_from_to_stub")
def random_from_to(it: Iter, limit: Any, base: Any) -> None:
    """Integers base ... base + limit - 1."""
    dtype = it.outputs[0].dtype
    if DTYPES[dtype].size < 4 or dtype in ("i32", "bool"):
        _fill(it, "modulo32", _bits32, 1, _modulo32, (limit % (1 << 32), base), ("u32", "i32"))
    else:
        _fill(it, "modulo64", _bits64, 2, _modulo64, (limit, base), ("i64", "i64"))


def _as_i64(bits: Any) -> Any:
    return ir.cast(bits, "i64")


@stub("random_full_64_bits_range_stub")
def random_full_range(it: Iter) -> None:
    """All 64-bit integers."""
    _fill(it, "bits64", _bits64, 2, _as_i64)


def _remainder_of(modulus: int) -> Callable[..., Any]:
    def finish(bits: Any) -> Any:
        if modulus & (modulus - 1) == 0:
            rest = ir.and_(bits, modulus - 1)
        else:
            rest = ir.irem(bits, ir.const(modulus, bits.dtype))
        return ir.cast(rest, "i32" if bits.dtype == "u32" else "i64")

    return finish


_MODULI = {"f16": (1 << 11) + 1, "bf16": (1 << 8) + 1, "f32": (1 << 24) + 1, "f64": (1 << 53) + 1, "bool": 2, "u8": 1 << 8, "i8": 1 << 7,
           "i16": 1 << 15, "i32": 1 << 31, "i64": 1 << 63, "u16": 1 << 16, "u32": 1 << 32, "u64": 1 << 64}  # fmt: skip
_REMAINDERS = {m: _remainder_of(m) for m in _MODULI.values()}


@stub("random_stub")
def random(it: Iter) -> None:
    """Integers from 0 to the largest that the dtype holds; of floating dtypes, the largest below which all are exact."""
    modulus = _MODULI[it.outputs[0].dtype]
    wide = modulus > 1 << 32
    _fill(it, f"remainder{modulus}", _bits64 if wide else _bits32, 2 if wide else 1, _REMAINDERS[modulus])


def _as_they_are(bits: Any) -> Any:
    return bits


def draw_bits(out: Tensor) -> None:
    """Random words into a contiguous tensor of u32."""
    draw("bits32", _bits32, 1, _as_they_are, [out])


# ---- dropout ---------------------------------------------------------------------------------------------------------


def _dropout(bits: Any, x: Any, threshold: Any, scale: Any) -> tuple[Any, Any]:
    keep = ir.lt(bits, threshold)
    if isinstance(x, ir.Complex):
        factor = where(keep, ir.cast(scale, x.dtype), ir.const(0.0, x.dtype))
        return ir.Complex(x.re * factor, x.im * factor), keep
    return x * where(keep, ir.cast(scale, x.dtype), ir.const(0.0, x.dtype)), keep


def _drop(x: Tensor, keep: Any, mask_dtype: str) -> tuple[Tensor, Tensor]:
    x = contiguous(x)
    out, mask = empty(x.sizes, x.dtype), empty(x.sizes, mask_dtype)
    scale = select(eq(keep, 0.0), 0.0, 1.0 / keep)
    part = "f64" if x.dtype in ("f64", "c128") else "f32"
    draw("dropout", _bits24, 1, _dropout, [out, mask], [x], (threshold24(keep), scale), ("u32", part))
    return out, mask


@lowering("native_dropout", coarse=True)
def native_dropout(x: Tensor, p: Any, train: bool | None) -> tuple[Tensor, Tensor]:
    """(x * mask / (1 - p), mask): an element is kept with probability 1 - p."""
    if train is False:
        out, mask = empty(x.sizes, x.dtype), empty(x.sizes, "bool")
        copy_to(out, x)
        fill(mask, 1)
        return out, mask
    return _drop(x, 1.0 - p, "bool")


@lowering("_fused_dropout", coarse=True)
def fused_dropout(x: Tensor, keep: Any, generator: None = None) -> tuple[Tensor, Tensor]:
    """(x * mask / keep, mask), mask in uint8: an element is kept with probability keep."""
    return _drop(x, keep, "u8")


def _masked_scale(grad: Any, mask: Any, scale: Any) -> Any:
    part = grad.dtype if grad.dtype in ir.FLOATS else "f32"
    factor = ir.cast(mask, part) * ir.cast(scale, part)
    return (
        ir.Complex(grad.re * factor, grad.im * factor) if isinstance(grad, ir.Complex) else ir.cast(grad, part) * factor
    )


@lowering("native_dropout_backward", "_masked_scale", coarse=True)
def native_dropout_backward(grad: Tensor, mask: Tensor, scale: Any) -> Tensor:
    """grad * mask * scale; of integers in float32."""
    out = empty(grad.sizes, grad.dtype if DTYPES[grad.dtype].kind in ("float", "complex") else "f32")
    map_tensors(
        "masked_scale",
        _masked_scale,
        [out],
        [grad, broadcast(mask, grad.sizes)],
        (scale,),
        ("f64" if grad.dtype in ("f64", "c128") else "f32",),
    )
    return out


# ---- randomised leaky ReLU -------------------------------------------------------------------------------------------


def _rrelu(u: Any, x: Any, low: Any, high: Any) -> tuple[Any, Any]:
    slope = _between(u, low, high)
    negative = ir.le(x, 0.0)
    return where(negative, x * slope, x), where(negative, slope, 1.0)


def _leaky(x: Any, slope: Any) -> Any:
    return where(ir.gt(x, 0.0), x, x * slope)


def _rrelu_into(out: Tensor, x: Tensor, noise: Tensor, low: Any, high: Any, training: bool) -> None:
    words, part = _real(x.dtype)
    if not training:
        map_tensors("rrelu_eval", _leaky, [out], [x], ((low + high) * 0.5,), (part,))
        return
    with _contiguous_out(out) as flat, _contiguous_out(noise) as flat_noise:
        draw(f"rrelu{53 if words == 2 else 24}", _UNIFORMS[53 if words == 2 else 24], words, _rrelu, [flat, flat_noise], [contiguous(x)],
             (low, high), (part, part))  # fmt: skip


@lowering("rrelu_with_noise", coarse=True)
def rrelu_with_noise(x: Tensor, noise: Tensor, low: Any, high: Any, training: bool, generator: None = None) -> Tensor:
    """x where x > 0, else x * slope with slopes uniform in [low, high), which noise keeps (1 where x > 0)."""
    out = empty(x.sizes, x.dtype)
    _rrelu_into(out, x, noise, low, high, training)
    return out


@lowering("rrelu_with_noise_", coarse=True)
def rrelu_with_noise_(x: Tensor, noise: Tensor, low: Any, high: Any, training: bool, generator: None = None) -> None:
    """rrelu_with_noise in place."""
    _rrelu_into(x, x, noise, low, high, training)


@composite("rrelu_with_noise.out")
def rrelu_with_noise_out(
    x: torch.Tensor, noise: torch.Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: Any = None, *,
    out: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """rrelu_with_noise into a given tensor."""
    return write_out(out, torch.ops.aten.rrelu_with_noise(x, noise, lower, upper, training, generator))


# ---- permutations ----------------------------------------------------------------------------------------------------


@lowering("randperm.generator_out", slots=("n",), coarse=True)
def randperm(n: Any, generator: None, out: Tensor) -> None:
    """0 ... n - 1 in random order.

    Element i is i enciphered until it is below n by a Feistel network on the least even number b of bits (at least 6) with
    2**b >= n; round r's function is word 0 of counter (offset, half, r), cut to b / 2 bits."""
    check(le(n, (1 << 31) - 1), "RuntimeError", "randperm of more than 2^31 elements")
    seed, offset = philox(1)
    kernel = build(_randperm_kernel, out.dtype)
    with _contiguous_out(out) as flat:
        if target().schedule_class == "vector":
            groups: Sequence[Any] = (cdiv(n, TASK_ELEMENTS), 1, 1)
        else:
            groups = fold_groups(target(), cdiv(n, kernel.workgroup[0]))
        launch(kernel, [flat], [*_words(seed), *_words(offset), n], groups)


FEISTEL_ROUNDS = 12


def _randperm_kernel(target: Target, dtype: str) -> Kernel:
    vector = target.schedule_class == "vector"
    k = KernelBuilder(target, f"randperm_{dtype}_{'vector' if vector else 'simt'}")
    out = k.buffer("out", dtype, "w")
    source = Source(k)
    n = k.scalar("n", "u32")

    def emit(i: Any) -> None:
        half = k.var("u32", 3)
        with k.While(lambda: ir.and_(half < 16, ir.lt(ir.shl(ir.const(1, "u32"), half * 2), n))):
            half.set(half + 1)
        bits = k.let(half.as_node())
        mask = k.let(ir.shl(ir.const(1, "u32"), bits) - 1)
        x = k.var("u32", i)
        with k.While():
            left, right = k.var("u32", ir.shr(x.as_node(), bits)), k.var("u32", ir.and_(x.as_node(), mask))
            with k.For(ir.const(0, "u32"), FEISTEL_ROUNDS) as r:
                old = k.let(right.as_node())
                word = philox4x32(k, [source.offset[0], source.offset[1], old, r], source.key)[0]
                new = k.let(ir.xor(left.as_node(), ir.and_(word, mask)))
                left.set(old)
                right.set(new)
            x.set(ir.or_(ir.shl(left.as_node(), bits), right.as_node()))
            with k.If(x < n):
                k.Break()
        out[i] = as_dtype(x.as_node(), dtype)

    return _for_each(k, n, emit)


# ---- gamma, Poisson, binomial ----------------------------------------------------------------------------------------


def _unit(words: Sequence[Any], i: int, dtype: str) -> Any:
    """A uniform number in (0, 1]: of word i, or of words i and i + 1 for f64."""
    return 1.0 - _uniform53(words[i], words[i + 1]) if dtype == "f64" else _open_uniform(words[i])


def _normal_of(stream: Stream, dtype: str) -> Any:
    return stream.k.let(_normals(stream.words(), dtype)[0])


def _gamma(stream: Stream, alpha: Any) -> Any:
    """Marsaglia and Tsang, 2000; alpha < 1 by alpha + 1 and a power of a uniform number."""
    k, dtype = stream.k, alpha.dtype
    boost = k.let(ir.lt(alpha, 1.0))
    scale = k.let(where(boost, ir.pow(_unit(stream.words(), 0, dtype), 1.0 / alpha), 1.0))
    d = k.let(where(boost, alpha + 1.0, alpha) - 1.0 / 3.0)
    c = k.let(1.0 / ir.sqrt(9.0 * d))
    result = k.var(dtype, 0.0)
    with k.While():
        x = _normal_of(stream, dtype)
        y = k.let(1.0 + c * x)
        with k.If(ir.gt(y, 0.0)):
            v = k.let(y * y * y)
            u = k.let(_unit(stream.words(), 0, dtype))
            accepted = ir.or_(
                ir.lt(u, 1.0 - 0.0331 * x * x * x * x), ir.lt(ir.log(u), 0.5 * x * x + d * (1.0 - v + ir.log(v)))
            )
            result.set(where(accepted, d * v, 0.0))
        with k.If(ir.logical_not(ir.le(result.as_node(), 0.0))):  # NaN leaves too
            k.Break()
        with k.If(ir.or_(ir.isnan(d), stream.draws > 10000)):
            result.set(math.nan)
            k.Break()
    least = 2.2250738585072014e-308 if dtype == "f64" else 1.1754943508222875e-38
    y = result * scale
    return where(ir.isnan(y), y, ir.maximum(y, least))


def _poisson(stream: Stream, rate: Any) -> Any:
    """Transformed rejection (Hörmann, 1993) for rates from 10, else by multiplying uniform numbers."""
    k, dtype = stream.k, rate.dtype
    result = k.var(dtype, 0.0)
    with k.If(ir.ge(rate, 10.0)):
        root, log_rate = k.let(ir.sqrt(rate)), k.let(ir.log(rate))
        b = k.let(0.931 + 2.53 * root)
        a = k.let(-0.059 + 0.02483 * b)
        inverse_alpha = k.let(1.1239 + 1.1328 / (b - 3.4))
        vr = k.let(0.9277 - 3.6224 / (b - 2.0))
        with k.While(lambda: stream.draws < 10000):
            words = stream.words()
            u, v = k.let(_unit(words, 0, dtype) - 0.5), k.let(_unit(words, 2, dtype))
            us = k.let(0.5 - ir.abs(u))
            n = k.let(ir.floor((2.0 * a / us + b) * u + rate + 0.43))
            quick = ir.and_(ir.ge(us, 0.07), ir.le(v, vr))
            with k.If(quick):
                result.set(n)
                k.Break()
            refused = ir.or_(ir.lt(n, 0.0), ir.and_(ir.lt(us, 0.013), ir.gt(v, us)))
            with k.If(ir.logical_not(refused)):
                left = ir.log(v) + ir.log(inverse_alpha) - ir.log(a / (us * us) + b)
                with k.If(ir.le(left, -rate + n * log_rate - ir.lgamma(n + 1.0))):
                    result.set(n)
                    k.Break()
    with k.Else(), k.If(ir.gt(rate, 0.0)):
        limit = k.let(ir.exp(-rate))
        product, n = k.var(dtype, 1.0), k.var(dtype, 0.0)
        with k.While(lambda: n < 1000.0):
            product.set(product * _unit(stream.words(), 0, dtype))
            with k.If(ir.le(product.as_node(), limit)):
                k.Break()
            n.set(n + 1.0)
        result.set(n)
    return where(ir.isnan(rate), rate, result.as_node())


def _stirling(n: Any) -> Any:
    """log(n!) less Stirling's formula, n >= 0."""
    table = (0.0810614667953272, 0.0413406959554092, 0.0276779256849983, 0.0207906721037650, 0.0166446911898211, 0.0138761288230707,
             0.0118967099458917, 0.0104112652619720, 0.00925546218271273, 0.00833056343336287)  # fmt: skip
    m = n + 1.0
    square = m * m
    y = (1.0 / 12 - (1.0 / 360 - 1.0 / 1260 / square) / square) / m
    for i, v in enumerate(table):
        y = where(ir.eq(n, float(i)), v, y)
    return y


def _binomial(stream: Stream, count: Any, p: Any) -> Any:
    """Transformed rejection (Hörmann, 1993) where count * p is at least 10, else by geometric steps."""
    k, dtype = stream.k, count.dtype
    flip = k.let(ir.gt(p, 0.5))
    q = k.let(where(flip, 1.0 - p, p))
    result = k.var(dtype, 0.0)
    usual = ir.and_(ir.gt(count, 0.0), ir.gt(q, 0.0))
    with k.If(ir.and_(usual, ir.ge(count * q, 10.0))):
        spread = k.let(ir.sqrt(count * q * (1.0 - q)))
        b = k.let(1.15 + 2.53 * spread)
        a = k.let(-0.0873 + 0.0248 * b + 0.01 * q)
        c = k.let(count * q + 0.5)
        vr = k.let(0.92 - 4.2 / b)
        odds = k.let(q / (1.0 - q))
        alpha = k.let((2.83 + 5.1 / b) * spread)
        m = k.let(ir.floor((count + 1.0) * q))
        with k.While(lambda: stream.draws < 10000):
            words = stream.words()
            u, v = k.let(_unit(words, 0, dtype) - 0.5), k.let(_unit(words, 2, dtype))
            us = k.let(0.5 - ir.abs(u))
            n = k.let(ir.floor((2.0 * a / us + b) * u + c))
            with k.If(ir.and_(ir.ge(us, 0.07), ir.le(v, vr))):
                result.set(n)
                k.Break()
            with k.If(ir.and_(ir.ge(n, 0.0), ir.le(n, count))):
                left = ir.log(v * alpha / (a / (us * us) + b))
                right = (m + 0.5) * ir.log((m + 1.0) / (odds * (count - m + 1.0))) + (count + 1.0) * ir.log(
                    (count - m + 1.0) / (count - n + 1.0)
                )
                right = right + (n + 0.5) * ir.log(odds * (count - n + 1.0) / (n + 1.0))
                right = right + _stirling(m) + _stirling(count - m) - _stirling(n) - _stirling(count - n)
                with k.If(ir.le(left, right)):
                    result.set(n)
                    k.Break()
    with k.Else(), k.If(usual):
        log1m = k.let(ir.log1p(-q))
        total, n = k.var(dtype, 0.0), k.var(dtype, 0.0)
        with k.While(lambda: stream.draws < 10000):
            total.set(total + ir.ceil(ir.log(_unit(stream.words(), 0, dtype)) / log1m))
            with k.If(ir.gt(total.as_node(), count)):
                k.Break()
            n.set(n + 1.0)
        result.set(ir.minimum(n.as_node(), count))
    y = where(flip, count - result.as_node(), result.as_node())
    return where(ir.or_(ir.isnan(count), ir.isnan(p)), math.nan, y)


@lowering("_standard_gamma", coarse=True)
def standard_gamma(alpha: Tensor, generator: None = None) -> Tensor:
    """Gamma-distributed with shape alpha and rate 1; at least the smallest normal number."""
    out = empty(alpha.sizes, alpha.dtype)
    draw_each("gamma", _gamma, out, [contiguous(alpha)])
    return out


@lowering("poisson", coarse=True)
def poisson(rate: Tensor, generator: None = None) -> Tensor:
    """Poisson-distributed with these rates."""
    out = empty(rate.sizes, rate.dtype)
    require("poisson_check", _is_rate, rate, "invalid Poisson rate, expected rate to be non-negative")
    draw_each("poisson", _poisson, out, [contiguous(rate)])
    return out


@lowering("binomial", coarse=True)
def binomial(count: Tensor, p: Tensor, generator: None = None) -> Tensor:
    """Successes of count trials with probability p."""
    out = empty(count.sizes, count.dtype)
    draw_each("binomial", _binomial, out, [contiguous(count), contiguous(broadcast(p, count.sizes))])
    return out


@composite("_sample_dirichlet")
def sample_dirichlet(alpha: torch.Tensor, generator: Any = None) -> torch.Tensor:
    """Gamma numbers along the last dimension over their sum."""
    gamma = torch.ops.aten._standard_gamma(alpha, generator)
    return gamma / gamma.sum(-1, keepdim=True)


# ---- multinomial -----------------------------------------------------------------------------------------------------


@stub("multinomial_with_replacement_stub")
def multinomial(p: Tensor, n: Any, out: Tensor) -> None:
    """Indices drawn with the probabilities p, (categories) or (rows, categories), summing to anything; out: (..., n), int64."""
    rows = p.sizes[0] if p.ndim == 2 else 1
    categories = p.sizes[-1]
    sums = empty((rows, categories), "f64" if p.dtype == "f64" else "f32")
    p = contiguous(p)
    vector = target().schedule_class == "vector"
    scan = build(_row_sums_kernel, p.dtype, sums.dtype)
    launch(
        scan, [p, sums], [rows, categories], fold_groups(target(), rows if vector else cdiv(rows, scan.workgroup[0]))
    )
    total = rows * n
    seed, offset = philox(cdiv(total, LANES * 4) * LANES)
    kernel = build(_multinomial_kernel, sums.dtype)
    with _contiguous_out(out) as flat:
        groups = cdiv(total, TASK_ELEMENTS if vector else kernel.workgroup[0])
        launch(
            kernel, [sums, flat], [*_words(seed), *_words(offset), total, n, categories], fold_groups(target(), groups)
        )


def _row_sums_kernel(target: Target, dtype: str, sum_dtype: str) -> Kernel:
    """Running sums of each row."""
    k = KernelBuilder(target, f"multinomial_sums_{dtype}")
    p, sums = k.buffer("p", dtype), k.buffer("sums", sum_dtype, "w")
    rows, n = k.scalar("rows", "u32"), k.scalar("n", "u32")
    size = 1 if target.schedule_class == "vector" else min(64, target.max_workgroup_size)
    row = k.global_id(size)
    with k.If(row < rows):
        total, lost = k.var(sum_dtype, 0.0), k.var(sum_dtype, 0.0)
        with k.For(ir.const(0, "u32"), n) as j:
            y = k.let(p[row * n + j] - lost.as_node())  # Kahan's summation
            new = k.let(total + y)
            lost.set((new - total) - y)
            total.set(new)
            sums[row * n + j] = new
    return k.finish((size, 1, 1))


def _multinomial_kernel(target: Target, dtype: str) -> Kernel:
    """Sample i takes the uniform number that element i of a uniform tensor of float32 would get."""
    k = KernelBuilder(target, f"multinomial_{dtype}")
    sums, out = k.buffer("sums", dtype), k.buffer("out", "i64", "w")
    source = Source(k)
    total, n, categories = k.scalar("total", "u32"), k.scalar("n", "u32"), k.scalar("categories", "u32")

    def emit(i: Any) -> None:
        block = k.let(ir.idiv(i, LANES * 4))
        j = k.let(i - block * (LANES * 4))
        words = source.words(block * LANES + ir.and_(j, LANES - 1))
        which = k.let(ir.shr(j, 4))
        word = where(
            ir.eq(which, 0), words[0], where(ir.eq(which, 1), words[1], where(ir.eq(which, 2), words[2], words[3]))
        )
        first = k.let(ir.idiv(i, n) * categories)
        x = k.let(ir.cast(ir.cast(ir.shr(word, 8), "f32") * 2.0**-24, dtype) * sums[first + categories - 1])
        low, high = k.var("u32", 0), k.var("u32", categories - 1)
        with k.While(lambda: low < high):  # the first category whose sum is above x
            middle = k.let(ir.shr(low + high, 1))
            above = k.let(ir.gt(sums[first + middle], x))
            high.set(where(above, middle, high.as_node()))
            low.set(where(above, low.as_node(), middle + 1))
        out[i] = ir.cast(low.as_node(), "i64")

    return _for_each(k, total, emit)
