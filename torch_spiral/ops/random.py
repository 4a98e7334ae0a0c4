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
    Iter, Tensor, build, cdiv, check, composite, empty, empty_like, eq, float_function, is_zero, launch, le, lowering, philox, structured,
    stub, target, to_int,
)  # fmt: skip
from ..lowering import where as select
from .common import broadcast, contiguous, copy_to, fill, map_tensors
from .elementwise import as_dtype

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
        c0, c1, c2, c3 = (k.let(c) for c in (ir.xor(ir.xor(high1, c1), key0), low1, ir.xor(ir.xor(high0, c3), key1), low0))
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
    kernel = build(_draw_kernel, name, sample, words, finish, tuple(o.dtype for o in outs), tuple(i.dtype for i in ins), tuple(types))
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
        samples = [k.let(s) if not isinstance(s, tuple) else tuple(k.let(x) for x in s) for s in sample(source.words(counter), part)]
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


def draw_each(name: str, body: Callable[..., Any], out: Tensor, ins: Sequence[Tensor], values: Sequence[Any] = (), types: Sequence[str] = ()) -> None:
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

    if not vector:
        size = min(SIMT_WORKGROUP, target.max_workgroup_size)
        i = k.global_id(size)
        with k.If(i < n):
            emit(i)
        return k.finish((size, 1, 1))
    start = k.let(k.group_index() * TASK_ELEMENTS)
    with k.For(start, k.let(ir.minimum(start + TASK_ELEMENTS, n))) as i:
        emit(i)
    return k.finish()


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
    return [ir.or_(ir.cast(a, "u64"), ir.shl(ir.cast(b, "u64"), 32)) for a, b in ((words[0], words[1]), (words[2], words[3]))]


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


@stub("bernoulli_tensor_stub")
def bernoulli_tensor(p: Tensor, out: Tensor) -> None:
    """1 with the probabilities of p, else 0."""
    p = contiguous(broadcast(p, out.sizes))
    with _contiguous_out(out) as flat:
        draw("bernoulli_tensor", _bits24, 1, _below_probability, [flat], [p])


def _modulo32(bits: Any, limit: Any, base: Any) -> Any:
    """bits % limit + base; a limit of 2**32 arrives as 0."""
    return ir.cast(where(ir.eq(limit, 0), bits, ir.irem(bits, where(ir.eq(limit, 0), ir.const(1, "u32"), limit))), "i32") + base


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
    part = grad.re.dtype if isinstance(grad, ir.Complex) else grad.dtype
    factor = ir.cast(mask, part) * ir.cast(scale, part)
    return ir.Complex(grad.re * factor, grad.im * factor) if isinstance(grad, ir.Complex) else grad * factor


@lowering("native_dropout_backward", "_masked_scale", coarse=True)
def native_dropout_backward(grad: Tensor, mask: Tensor, scale: Any) -> Tensor:
    """grad * mask * scale."""
    out = empty(grad.sizes, grad.dtype)
    map_tensors("masked_scale", _masked_scale, [out], [grad, broadcast(mask, grad.sizes)], (scale,), ("f64" if grad.dtype in ("f64", "c128") else "f32",))
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
    from .activation import write_out

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

    if not vector:
        size = min(SIMT_WORKGROUP, target.max_workgroup_size)
        i = k.global_id(size)
        with k.If(i < n):
            emit(i)
        return k.finish((size, 1, 1))
    start = k.let(k.group_index() * TASK_ELEMENTS)
    with k.For(start, k.let(ir.minimum(start + TASK_ELEMENTS, n))) as i:
        emit(i)
    return k.finish()
