"""Ops on drawn shapes, strides, offsets, empty sizes and aliases, functional, in-place and with out=, against float64 on the CPU.

Errors are measured in units in the last place (elementwise), as backward errors (reductions, products), or must be none
(shapes, indices, integers). Hypothesis shrinks what fails and prints the case: a `Case` repeats it, its seed included.
The everyday tier draws the same examples each time; `full` draws others, ten times as many. Layouts come from a small set of
classes with sizes drawn at random, because each class compiles a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

Tensor = torch.Tensor
LAYOUTS = ("contiguous", "transposed", "gaps", "offset", "expanded")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SENTINEL = 77.0


@dataclass(frozen=True)
class Spec:
    """A tensor: its shape, how it lies in memory, and its values."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    seed: int = 0
    domain: tuple[float, float] = (-8.0, 8.0)
    special: bool = False  # zeros of both signs, infinities, NaN and the bounds of the domain among the values

    def strides(self) -> tuple[tuple[int, ...], int, int]:
        """Strides, offset and the elements of the memory below."""
        shape = list(self.shape)
        order = list(range(len(shape)))
        if self.layout == "transposed":
            order = order[::-1]
        step, offset = (2, 1) if self.layout == "gaps" else (1, 3 if self.layout == "offset" else 0)
        strides = [0] * len(shape)
        for d in reversed(order):
            strides[d] = step
            step *= max(shape[d], 1)
        if self.layout == "expanded" and shape:
            strides[0] = 0
        size = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else offset
        return tuple(strides), offset, size + 2

    def make(self, device: torch.device, dtype: torch.dtype, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The tensor and the memory below it; wide: rounded to dtype, then in this one."""
        strides, offset, size = self.strides()
        generator = torch.Generator().manual_seed(self.seed)
        low, high = self.domain
        values = torch.rand(size, generator=generator, dtype=torch.float64) * (high - low) + low
        if not (dtype.is_floating_point or dtype.is_complex):
            values = values.round()
            if dtype in (torch.bool, torch.uint8):
                values = values.abs()
        elif self.special:
            odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, low, high], dtype=torch.float64)
            where = torch.rand(size, generator=generator) < 0.3
            values = torch.where(where, odd[torch.randint(len(odd), (size,), generator=generator)], values)
        base = values.to(dtype).to(wide or dtype).to(device)
        return base.as_strided(self.shape, strides, offset), base


@dataclass(frozen=True)
class Case:
    op: str
    dtype: torch.dtype
    inputs: tuple[Spec, ...]
    alias: str = ""  # "same": the second input is the first one; "transposed": its transpose
    how: str = "functional"  # or "in-place", "out", "out gaps", "out transposed", "out empty", "out is input"
    extra: dict[str, Any] = field(default_factory=dict)

    def arguments(self, device: torch.device, wide: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        made = [
            s.make(device, self.dtype, torch.float64 if wide and self.dtype.is_floating_point else None)
            for s in self.inputs
        ]
        tensors, bases = [m[0] for m in made], [m[1] for m in made]
        if self.alias and len(tensors) > 1:
            tensors[1] = tensors[0] if self.alias == "same" else tensors[0].mT if tensors[0].ndim > 1 else tensors[0]
        return tensors, bases


def shapes(most: int = 4, empty: bool = True) -> st.SearchStrategy[tuple[int, ...]]:
    small = st.integers(0 if empty else 1, 6) if empty else st.integers(1, 6)
    sizes = st.one_of(small, st.sampled_from((1, 17, 33, 64)))
    return st.lists(sizes, max_size=most).filter(lambda s: math.prod(s) <= 4096).map(tuple)


def specs(shape: tuple[int, ...], **given_: Any) -> st.SearchStrategy[Spec]:
    return st.builds(
        Spec, st.just(shape), st.sampled_from(LAYOUTS), st.integers(0, 99), **{k: st.just(v) for k, v in given_.items()}
    )


# Elementwise ops: function of tensors, number of tensors, domain, error allowed in units in the last place of the result, and
# of the largest term where terms cancel. 0 means exact.


@dataclass(frozen=True)
class Elementwise:
    function: Callable[..., Tensor]
    arity: int = 1
    domain: tuple[float, float] = (-8.0, 8.0)
    ulps: float = 4.0
    terms: Callable[..., Tensor] | None = None
    special: bool = True
    dtypes: tuple[torch.dtype, ...] = FLOATS


F = torch.nn.functional
INTEGERS = (*FLOATS, torch.int64, torch.int32, torch.uint8)
one = torch.ones_like
ELEMENTWISE: dict[str, Elementwise] = {
    "add": Elementwise(torch.add, 2, ulps=1, dtypes=INTEGERS),
    "sub": Elementwise(torch.sub, 2, ulps=1, dtypes=INTEGERS),
    "mul": Elementwise(torch.mul, 2, ulps=1, dtypes=INTEGERS),
    "div": Elementwise(torch.div, 2, ulps=3),
    "maximum": Elementwise(torch.maximum, 2, ulps=0, dtypes=INTEGERS),
    "minimum": Elementwise(torch.minimum, 2, ulps=0, dtypes=INTEGERS),
    "fmax": Elementwise(torch.fmax, 2, ulps=0),
    "copysign": Elementwise(torch.copysign, 2, ulps=0),
    "atan2": Elementwise(torch.atan2, 2, ulps=8, special=False),
    "hypot": Elementwise(torch.hypot, 2),
    "pow": Elementwise(torch.pow, 2, (0.25, 4.0), 32, special=False),
    "eq": Elementwise(torch.eq, 2, ulps=0, dtypes=INTEGERS),
    "lt": Elementwise(torch.lt, 2, ulps=0, dtypes=INTEGERS),
    "logaddexp": Elementwise(torch.logaddexp, 2, ulps=8, terms=lambda a, b: 1 + a.abs() + b.abs(), special=False),
    "where": Elementwise(lambda a, b: torch.where(a > 0, a, b), 2, ulps=0),
    "lerp": Elementwise(torch.lerp, 3, terms=lambda a, b, w: a.abs() + (w * (b - a)).abs(), special=False),
    "addcmul": Elementwise(torch.addcmul, 3, terms=lambda a, b, c: a.abs() + (b * c).abs(), special=False),
    "addcdiv": Elementwise(torch.addcdiv, 3, (0.5, 8.0), terms=lambda a, b, c: a.abs() + (b / c).abs(), special=False),
    "neg": Elementwise(torch.neg, ulps=0, dtypes=INTEGERS),
    "abs": Elementwise(torch.abs, ulps=0, dtypes=(*FLOATS, torch.int64, torch.int32)),
    "sign": Elementwise(torch.sign, ulps=0),
    "floor": Elementwise(torch.floor, ulps=0),
    "ceil": Elementwise(torch.ceil, ulps=0),
    "round": Elementwise(torch.round, ulps=0),
    "trunc": Elementwise(torch.trunc, ulps=0),
    "reciprocal": Elementwise(torch.reciprocal, ulps=3),
    "square": Elementwise(torch.square, ulps=1),
    "sqrt": Elementwise(torch.sqrt, ulps=3),
    "rsqrt": Elementwise(torch.rsqrt, domain=(0.01, 50.0), ulps=4),
    "exp": Elementwise(torch.exp, ulps=6),
    "exp2": Elementwise(torch.exp2, ulps=6),
    "expm1": Elementwise(torch.expm1, ulps=8),
    "log": Elementwise(torch.log, domain=(0.0, 50.0), ulps=4, terms=one),
    "log2": Elementwise(torch.log2, domain=(0.0, 50.0), ulps=4, terms=one),
    "log1p": Elementwise(torch.log1p, domain=(-0.9, 50.0), ulps=8),
    "sin": Elementwise(torch.sin, domain=(-50.0, 50.0), terms=one),
    "cos": Elementwise(torch.cos, domain=(-50.0, 50.0), terms=one),
    "tanh": Elementwise(torch.tanh, ulps=8),
    "sigmoid": Elementwise(torch.sigmoid, ulps=8),
    "atan": Elementwise(torch.atan, ulps=8),
    "asin": Elementwise(torch.asin, domain=(-1.0, 1.0), ulps=8),
    "asinh": Elementwise(torch.asinh, ulps=8, special=False),
    "sinh": Elementwise(torch.sinh, ulps=8),
    "erf": Elementwise(torch.erf, ulps=8),
    "lgamma": Elementwise(torch.lgamma, domain=(0.1, 30.0), ulps=16, terms=lambda x: 1 + x, special=False),
    "relu": Elementwise(torch.relu, ulps=0),
    "clamp": Elementwise(lambda x, **k: torch.clamp(x, -2.5, 3.0, **k), ulps=0),
    "gelu": Elementwise(F.gelu, ulps=16, terms=lambda x: x.abs() * 0.5, special=False),
    "silu": Elementwise(F.silu, ulps=8, special=False),
    "softplus": Elementwise(F.softplus, ulps=8, special=False),
    "elu": Elementwise(F.elu, ulps=8, special=False),
    "isnan": Elementwise(torch.isnan, ulps=0),
}  # fmt: skip
IN_PLACE = {n for n in ELEMENTWISE if n not in ("where", "eq", "lt", "maximum", "minimum", "fmax", "logaddexp", "gelu", "silu", "softplus", "elu", "clamp")}  # fmt: skip
IN_PLACE = {n for n in IN_PLACE if hasattr(Tensor, n + "_")}
OUT = {n for n, e in ELEMENTWISE.items() if n not in ("where", "gelu", "silu", "softplus", "elu", "relu", "isnan")}


def broadcast_part(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to `shape`."""
    kept = draw(st.integers(0, len(shape)))
    return tuple(1 if draw(st.integers(0, 3)) == 0 else n for n in shape[kept:])


@st.composite
def elementwise_cases(draw: Any) -> Case:
    op = draw(st.sampled_from(sorted(ELEMENTWISE)))
    e = ELEMENTWISE[op]
    dtype = draw(st.sampled_from(e.dtypes))
    how = draw(
        st.sampled_from(
            ("functional", "functional", "in-place", "out", "out gaps", "out transposed", "out empty", "out is input")
        )
    )
    if (how == "in-place" and op not in IN_PLACE) or (how.startswith("out") and op not in OUT):
        how = "functional"
    shape = draw(shapes())
    special = e.special and draw(st.booleans())
    alias = draw(st.sampled_from(("", "", "same", "transposed"))) if e.arity > 1 else ""
    if alias == "transposed" and (len(shape) < 2 or shape[-1] != shape[-2]):
        alias = "same"
    drawn = [shape, *(broadcast_part(draw, shape) for _ in range(e.arity - 1))]
    inputs = [draw(specs(s, domain=e.domain, special=special)) for s in drawn]
    return Case(op, dtype, tuple(inputs), alias, how)


def call(
    case: Case, function: Callable[..., Any], device: torch.device, wide: bool = False
) -> tuple[Any, list[Tensor]]:
    """The result of a case on a device, and all memory that the call could have touched."""
    tensors, bases = case.arguments(device, wide)
    if case.how == "in-place":
        result = getattr(tensors[0], case.op + "_")(*tensors[1:])
        assert result is tensors[0]
        return result, bases
    if not case.how.startswith("out"):
        return function(*tensors, **case.extra), bases
    if case.how == "out is input":
        out = tensors[0]
    else:
        like = function(*(t.to("meta") for t in tensors), **case.extra)
        layout = case.how.removeprefix("out").strip() or "contiguous"
        spec = Spec((0,) if layout == "empty" else tuple(like.shape), "contiguous" if layout == "empty" else layout)
        out, base = spec.make(device, like.dtype)
        bases.append(base)
    result = function(*tensors, out=out, **case.extra)
    assert result is out
    return result, bases


def both(case: Case, function: Callable[..., Any], device: torch.device) -> tuple[Any, Any] | None:
    """Results of the device and of the CPU in float64; None where both refuse the case. Memory beside results is untouched."""
    try:
        expected = call(case, function, torch.device("cpu"), wide=True)[0]
    except (RuntimeError, IndexError) as e:
        if "not implemented for" in str(e):
            return None
        with pytest.raises((RuntimeError, IndexError)):
            call(case, function, device)
            torch.spiral.synchronize(device)
        return None
    found, memory = call(case, function, device)
    for k, spec in enumerate(case.inputs):
        now, start = bits(memory[k].cpu()), bits(spec.make(torch.device("cpu"), case.dtype)[1])
        beside = torch.ones(len(start), dtype=torch.bool)
        if k == 0 and case.how in ("in-place", "out is input"):
            strides, offset, _ = spec.strides()
            beside.as_strided(spec.shape, strides, offset).fill_(False)
        assert torch.equal(now[beside], start[beside]), f"memory of input {k} was written"
    return found, expected


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_near(found: Tensor, expected: Tensor, allowed: Tensor, what: Any = "") -> None:
    """|found - expected| <= allowed; NaN and infinities where expected has them. Values beyond the dtype's range are
    infinite, those below its smallest normal number may be flushed."""
    dtype = found.dtype
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    f, e = found.cpu().double(), expected.double()
    info = torch.finfo(dtype)
    edge = (e.abs() > info.max * 0.99) & e.isfinite()
    assert torch.equal(f.isnan() | edge, e.isnan() | edge), (
        f"NaN where there is none, or the reverse: {f} instead of {e}"
    )
    infinite = e.isinf()
    assert torch.equal(f[infinite], e[infinite]), f"infinities differ: {f} instead of {e}"
    usual = ~(edge | infinite | e.isnan())
    error = (f - e).abs()[usual]
    limit = (allowed.double().expand_as(e) + info.tiny)[usual]
    if bool((error > limit).any()):
        worst = int((error / limit).argmax())
        pytest.fail(
            f"{f[usual][worst]!r} instead of {e[usual][worst]!r}: {float(error[worst] / limit[worst]):.3g} times what is allowed {what}"
        )


def assert_exact(found: Any, expected: Any) -> None:
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert_exact(f, e)
        return
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    f = found.cpu()
    e = expected.to(f.dtype)
    assert torch.equal(torch.nan_to_num(f), torch.nan_to_num(e)) and torch.equal(f != f, e != e), f"{f} instead of {e}"


def check_elementwise(case: Case, device: torch.device) -> None:
    e = ELEMENTWISE[case.op]
    results = both(case, e.function, device)
    if results is None:
        return
    found, expected = results
    if not found.dtype.is_floating_point or e.ulps == 0:
        assert_exact(found, expected)
        return
    tensors, _ = case.arguments(torch.device("cpu"), wide=True)
    size = expected.abs() if e.terms is None else expected.abs() + e.terms(*tensors)
    # Half types compute in float32, so their own rounding is all that is added.
    unit = torch.finfo(case.dtype).eps
    ulps = e.ulps if case.dtype == torch.float32 else 1.0
    assert_near(found, expected, torch.nan_to_num(size, posinf=1.0) * unit * ulps, case)


# Reductions


def largest(x: Tensor, dims: Any, keepdim: bool) -> Tensor:
    dims = tuple(range(x.ndim)) if dims is None else dims
    return x.abs().sum(dims, keepdim=keepdim)


@dataclass(frozen=True)
class Reduction:
    function: Callable[..., Any]
    terms: Callable[..., Tensor] | None = None  # None: exact; else the size of what rounding errors are relative to
    tuples: bool = True  # takes several dimensions
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    composed: bool = False  # of ops that each round to the dtype
    whole: bool = True  # takes dim=None
    keeps: bool = True  # takes keepdim


def along(x: Tensor, dim: Any) -> int:
    return 1 if not x.ndim else x.shape[dim]


def median(x: Tensor, dim: int) -> Tensor:
    """torch.median; on the CPU of a contiguous copy, because it reads beyond a dimension of stride 0 (torch 2.13)."""
    return torch.median(x.contiguous() if x.device.type == "cpu" else x, dim).values


REDUCTIONS: dict[str, Reduction] = {
    "sum": Reduction(torch.sum, largest, dtypes=INTEGERS),
    "mean": Reduction(torch.mean, lambda x, d, k: x.abs().mean(d, keepdim=k)),
    "amax": Reduction(torch.amax, dtypes=INTEGERS, whole=False),
    "amin": Reduction(torch.amin, dtypes=INTEGERS, whole=False),
    "prod": Reduction(torch.prod, lambda x, d, k: 8 * x.prod(d, keepdim=k).abs(), tuples=False, whole=False),
    "any": Reduction(torch.any, dtypes=INTEGERS),
    "all": Reduction(torch.all, dtypes=INTEGERS),
    "var": Reduction(torch.var, lambda x, d, k: 4 * x.square().sum(d, keepdim=k) / max(1, x.numel() // max(1, x.sum(d).numel()) - 1)),
    "logsumexp": Reduction(torch.logsumexp, lambda x, d, k: 1 + x.abs().amax(d, keepdim=k), composed=True, whole=False),
    "norm": Reduction(torch.linalg.vector_norm, lambda x, d, k: 4 * torch.linalg.vector_norm(x, dim=d, keepdim=k)),
    "argmax": Reduction(torch.argmax, tuples=False),
    "nansum": Reduction(torch.nansum, largest),
    "softmax": Reduction(lambda x, dim: torch.softmax(x, dim), lambda x, d, k: 16 * torch.softmax(x, d) * (1 + x.abs().amax()), tuples=False, whole=False, keeps=False),
    "log_softmax": Reduction(lambda x, dim: torch.log_softmax(x, dim), lambda x, d, k: 8 * (1 + x.abs().amax()).expand_as(x), tuples=False, whole=False, keeps=False),
    "cumsum": Reduction(lambda x, dim: torch.cumsum(x, dim), lambda x, d, k: 4 * x.abs().cumsum(d), tuples=False, dtypes=INTEGERS, whole=False, keeps=False),
    "sort": Reduction(lambda x, dim: tuple(torch.sort(x, dim=dim, stable=True)), None, tuples=False, dtypes=INTEGERS, whole=False, keeps=False),
    "cummax": Reduction(lambda x, dim: torch.cummax(x, dim).values, None, tuples=False, dtypes=INTEGERS, whole=False, keeps=False),
    "median": Reduction(median, None, tuples=False, dtypes=INTEGERS, whole=False, keeps=False),
}  # fmt: skip


@st.composite
def reduction_cases(draw: Any) -> Case:
    op = draw(st.sampled_from(sorted(REDUCTIONS)))
    r = REDUCTIONS[op]
    shape = draw(shapes())
    forms = ["int"] + ["tuple"] * (r.tuples and len(shape) > 1) + ["none"] * r.whole
    form = draw(st.sampled_from(forms))
    rank = max(len(shape), 1)
    dim: Any = draw(st.integers(-rank, rank - 1))
    if form == "tuple":
        dim = tuple(draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=rank)))
    extra: dict[str, Any] = {"dim": None if form == "none" else dim}
    if r.keeps:
        extra["keepdim"] = draw(st.booleans())
    return Case(op, draw(st.sampled_from(r.dtypes)), (draw(specs(shape)),), extra=extra)


def check_reduction(case: Case, device: torch.device) -> None:
    r = REDUCTIONS[case.op]
    results = both(case, r.function, device)
    if results is None:
        return
    found, expected = results
    if r.terms is None or not found.dtype.is_floating_point:
        assert_exact(found, expected)
        return
    (x,), _ = case.arguments(torch.device("cpu"), wide=True)
    if not expected.numel():
        assert found.shape == expected.shape
        return
    n = max(2, x.numel())
    size = r.terms(x, case.extra["dim"], case.extra.get("keepdim", False)) if x.numel() else torch.zeros(())
    compute, rounding = torch.finfo(case.dtype if r.composed else torch.float32).eps, torch.finfo(case.dtype).eps
    allowed = compute * (4 + math.log2(n)) * torch.nan_to_num(size) + rounding * expected.abs().nan_to_num()
    assert_near(found, expected, allowed, case)


# Shapes, copies and indices: exact.


def index(x: Tensor, dim: int, n: int) -> Tensor:
    """n indices along a dimension, the same on every device."""
    size = x.shape[dim]
    return (torch.arange(n) * 7 % max(size, 1)).to(x.device)


def scattered(x: Tensor, dim: int) -> Tensor:
    i = torch.arange(x.numel(), device="cpu").reshape(x.shape) % max(x.shape[dim] if x.ndim else 1, 1)
    return i.to(x.device)


SHAPES: dict[str, Callable[[Tensor, int], Any]] = {
    "contiguous": lambda x, d: x.contiguous(),
    "clone": lambda x, d: x.clone(),
    "copy": lambda x, d: torch.zeros_like(x, memory_format=torch.contiguous_format).copy_(x),
    "to int": lambda x, d: x.to(torch.int32),
    "to float": lambda x, d: x.to(torch.float32),
    "flip": lambda x, d: x.flip(d),
    "roll": lambda x, d: x.roll(2, d),
    "cat": lambda x, d: torch.cat([x, x, x], d),
    "stack": lambda x, d: torch.stack([x, x], d),
    "transposed copy": lambda x, d: x.transpose(d, -1).contiguous(),
    "narrow": lambda x, d: x.narrow(d, x.shape[d] // 2, x.shape[d] - x.shape[d] // 2).contiguous(),
    "repeat": lambda x, d: x.repeat(*([2] * x.ndim)),
    "index_select": lambda x, d: x.index_select(d, index(x, d, 5)),
    "index": lambda x, d: x.transpose(0, d)[index(x.transpose(0, d), 0, 4)],
    "gather": lambda x, d: x.gather(d, scattered(x, d)),
    "scatter": lambda x, d: torch.zeros_like(x).scatter(d, scattered(x, d) * 0 + torch.arange(x.shape[d], device=x.device).reshape([-1 if i == d % x.ndim else 1 for i in range(x.ndim)]), x),
    "masked_fill": lambda x, d: x.masked_fill(x > 1, 3),
    "masked_select": lambda x, d: x.masked_select(x > 1),
    "nonzero": lambda x, d: x.nonzero(),
    "tril": lambda x, d: x.tril(1) if x.ndim > 1 else x.clone(),
    "topk": lambda x, d: x.topk(min(2, x.shape[d]), d).values,
    "fill": lambda x, d: x.clone().fill_(2),
    "diagonal": lambda x, d: x.diagonal(0, 0, -1).contiguous() if x.ndim > 1 else x.clone(),
    "unfold": lambda x, d: x.unfold(d, 1, 2).contiguous(),
    "assign": lambda x, d: torch.zeros_like(x, memory_format=torch.contiguous_format).index_copy_(d, torch.arange(x.shape[d]).flip(0).to(x.device), x),
    "where": lambda x, d: torch.where(x > 0, x, x.flip(d)),
    "equal": lambda x, d: torch.tensor(torch.equal(x, x.clone())),
    "bytes": lambda x, d: x.contiguous().view(torch.uint8),
}  # fmt: skip
ALL = (*INTEGERS, torch.bool, torch.int16, torch.int8)


@st.composite
def shape_cases(draw: Any) -> Case:
    shape = draw(shapes().filter(bool))
    op = draw(st.sampled_from(sorted(SHAPES)))
    return Case(
        op,
        draw(st.sampled_from(ALL)),
        (draw(specs(shape)),),
        extra={"dim": draw(st.integers(-len(shape), len(shape) - 1))},
    )


def check_shape(case: Case, device: torch.device) -> None:
    def function(x: Tensor, dim: int) -> Any:
        return SHAPES[case.op](x, dim)

    (x,), _ = case.arguments(torch.device("cpu"))
    try:
        expected = function(x, case.extra["dim"])
    except (RuntimeError, IndexError) as e:
        if "not implemented for" in str(e):
            return
        with pytest.raises((RuntimeError, IndexError)):
            function(case.arguments(device)[0][0], case.extra["dim"])
            torch.spiral.synchronize(device)
        return
    found = function(case.arguments(device)[0][0], case.extra["dim"])
    assert found.dtype == expected.dtype
    assert_exact(found, expected)


# Products

PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "mm": torch.mm,
    "bmm": torch.bmm,
    "mv": torch.mv,
    "dot": torch.dot,
    "linear": F.linear,
    "addmm": torch.addmm,
    "baddbmm": torch.baddbmm,
}
OUT_PRODUCTS = {"mm", "bmm", "mv", "addmm", "baddbmm"}


@st.composite
def product_cases(draw: Any) -> Case:
    op = draw(st.sampled_from(sorted(PRODUCTS)))
    sizes = st.one_of(st.integers(0, 5), st.sampled_from((8, 16, 17, 31, 64)))
    b, m, k, n = draw(st.integers(0, 3)), draw(sizes), draw(sizes), draw(sizes)
    wanted = {
        "mm": [(m, k), (k, n)],
        "bmm": [(b, m, k), (b, k, n)],
        "mv": [(m, k), (k,)],
        "dot": [(k,), (k,)],
        "linear": [(b, m, k), (n, k), (n,)],
        "addmm": [draw(st.sampled_from([(m, n), (n,), (1, n), (m, 1), ()])), (m, k), (k, n)],
        "baddbmm": [draw(st.sampled_from([(b, m, n), (n,), (1, m, n)])), (b, m, k), (b, k, n)],
    }[op]
    how = (
        draw(st.sampled_from(("functional", "out", "out transposed", "out gaps", "out empty")))
        if op in OUT_PRODUCTS
        else "functional"
    )
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.int64)))
    layouts = ("contiguous", "transposed", "gaps", "offset", "expanded")
    inputs = tuple(Spec(s, draw(st.sampled_from(layouts)), draw(st.integers(0, 99)), (-2.0, 2.0)) for s in wanted)
    extra = {}
    if op in ("addmm", "baddbmm"):
        extra = {"beta": draw(st.sampled_from((0, 1, 2))), "alpha": draw(st.sampled_from((1, 3)))}
    return Case(op, dtype, inputs, "", how, extra)


def check_product(case: Case, device: torch.device) -> None:
    function = PRODUCTS[case.op]
    results = both(case, function, device)
    if results is None:
        return
    found, expected = results
    if not found.dtype.is_floating_point:
        assert_exact(found, expected)
        return
    tensors, _ = case.arguments(torch.device("cpu"), wide=True)
    size = function(*(t.abs() for t in tensors), **case.extra)
    k = tensors[-1].shape[-1] if case.op != "linear" else tensors[0].shape[-1]
    k = tensors[-2].shape[-1] if case.op in ("mm", "bmm", "addmm", "baddbmm", "mv") else k
    allowed = torch.finfo(torch.float32).eps * (2 + math.sqrt(k)) * size + torch.finfo(case.dtype).eps * expected.abs()
    if case.op == "linear":  # upstream adds the bias of what is not a matrix to the rounded product
        allowed = allowed + torch.finfo(case.dtype).eps * size
    assert_near(found, expected, allowed, case)


FAMILIES: dict[str, tuple[Callable[[], st.SearchStrategy[Case]], Callable[[Case, torch.device], None]]] = {
    "elementwise": (elementwise_cases, check_elementwise),
    "reductions": (reduction_cases, check_reduction),
    "shapes": (shape_cases, check_shape),
    "products": (product_cases, check_product),
}
EXAMPLES = {"opencl": 60, "cuda": 200, "wgpu": 12}  # the kernels of a software adapter take a second each to compile


def run(family: str, device: torch.device, examples: int, **how: Any) -> None:
    cases, check = FAMILIES[family]
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)

    @settings(
        max_examples=examples,
        deadline=None,
        phases=phases,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **how,
    )
    @given(cases())
    def holds(case: Case) -> None:
        check(case, device)

    holds()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_drawn_cases(device: torch.device, family: str) -> None:
    run(family, device, EXAMPLES[torch.spiral.get_device_properties(device).engine], derandomize=True, database=None)


@pytest.mark.full
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_many_drawn_cases(device: torch.device, family: str) -> None:
    engine = torch.spiral.get_device_properties(device).engine
    run(family, device, 10 * EXAMPLES[engine], database=DirectoryBasedExampleDatabase(".hypothesis"))


def test_errors_are_found() -> None:
    """The measures themselves: an ulp too many, a NaN, a wrong infinity, a wrong shape."""
    expected = torch.tensor([1.0, 2.0, math.inf, math.nan], dtype=torch.float64)
    good = expected.float()
    assert_near(good, expected, torch.zeros(4))
    for wrong in (good + 1e-6, good.nan_to_num(posinf=math.inf), torch.tensor([1.0, 2.0, 3.0, math.nan]), good[:3]):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            assert_near(wrong, expected, torch.full((1,), 1e-7))
        with pytest.raises(AssertionError):
            assert_exact(wrong, expected)
