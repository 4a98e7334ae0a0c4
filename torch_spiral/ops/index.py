"""Indexing: cat, gather and scatter, index and index_put, index_select, embedding, masks, nonzero.

Indices out of range are reported by the kernels, so the IndexError comes with the next synchronisation and names the op.
Scattered sums go along the indexed dimension one after the other on CPU devices, as in ATen's CPU kernels, and are atomic on GPUs,
but for torch.use_deterministic_algorithms(True): then one invocation adds up, or writes, in order everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch_spiral import _C

from ..kernels import ir
from ..kernels.kernel import DTYPES, bits_dtype, compute_dtype
from ..lowering import (
    Iter,
    IterOperand,
    Sym,
    Tensor,
    cdiv,
    check,
    composite,
    empty,
    eq,
    is_one,
    is_zero,
    le,
    lowering,
    maximum,
    operator,
    product,
    structured,
    stub,
    target,
    to_int,
    where,
)
from .common import broadcast, contiguous, copy_to, fill, map_tensors, resize_out
from .elementwise import SCALAR_TYPES, as_dtype
from .items import Item, each

MAX, MEAN, MIN, SUM, PROD = range(5)  # at::native::ReductionType


# ---- helpers -------------------------------------------------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    """x as unsigned integers of the same size, for kernels that only move elements."""
    return x.with_dtype(bits_dtype(x.dtype))


def at_least_1d(x: Tensor) -> Tensor:
    """A 0-dimensional tensor as one of shape (1,)."""
    return x if x.ndim else x.view((1,), (0,))


def around(x: Tensor, dim: int) -> Tensor | None:
    """A contiguous tensor as [product of the sizes before dim, size, product of those after]; None for others."""
    if not x.is_contiguous:
        return None
    return x.view((product(x.sizes[:dim]), x.sizes[dim], product(x.sizes[dim + 1 :])))


def narrow(x: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    """x's slices start .. start + length along dim."""

    def plain(s: Any) -> Any:  # outer strides are no longer the product of the inner sizes
        return s if not isinstance(s, Sym) or is_zero(s) or is_one(s) else Sym(s._ref, s.kind, s._recorder, s._hint)

    strides = (*map(plain, x.strides[:dim]), *x.strides[dim:])
    return x.view((*x.sizes[:dim], length, *x.sizes[dim + 1 :]), strides, start * x.strides[dim])


def number(value: Any, dtype: str) -> dict[str, tuple[str, Any]]:
    """A Scalar argument as scalars of a kernel that computes in `dtype`: "value", and "imag" for complex dtypes."""
    part = compute_dtype(dtype)
    re, im = value if isinstance(value, tuple) else (value, 0.0)
    if DTYPES[dtype].kind == "complex":
        return {"value": (part, re), "imag": (part, im)}
    if dtype == "bool":
        re = where(eq(re, 0), 0, 1)
    return {"value": (SCALAR_TYPES[part], re if part in ("f32", "f64") else to_int(re))}


def value_of(it: Item, dtype: str) -> Any:
    """What number() passed, as a value of `dtype`."""
    if DTYPES[dtype].kind == "complex":
        return ir.Complex(it["value"], it["imag"])
    return as_dtype(it["value"], dtype)


def truth(x: Any) -> Any:
    """x != 0; NaN is true."""
    if isinstance(x, ir.Complex):
        return ir.or_(truth(x.re), truth(x.im))
    return x if x.dtype == "bool" else ir.ne(x, 0)


def combine(reduce: int, a: Any, b: Any) -> Any:
    """a and b under a ReductionType; the mean is divided by the caller."""
    if reduce == MAX:
        return ir.maximum(a, b)
    if reduce == MIN:
        return ir.minimum(a, b)
    if not isinstance(a, ir.Complex) and a.dtype == "bool":
        return ir.and_(a, b) if reduce == PROD else ir.or_(a, b)
    return a * b if reduce == PROD else a + b


def deterministic() -> bool:
    """torch.use_deterministic_algorithms: it is in the key of every plan."""
    return torch._C._get_deterministic_algorithms()


def atomic(reduce: int, dtype: str) -> bool:
    """Whether scattered elements are combined by atomics here, in parallel along the indexed dimension too."""
    t = target()
    if t.schedule_class == "vector" or reduce == PROD or deterministic():
        return False
    d = DTYPES[dtype]
    part = d.size // 2 if d.is_pair and dtype != "c32" else d.size
    if part < 8 or t.int64_atomics:
        return True
    return t.language == "wgsl" and dtype in ("i64", "u64") and reduce in (SUM, MEAN)


def apply_atomic(buffer: Any, index: Any, reduce: int, value: Any) -> None:
    {MAX: buffer.atomic_max, MIN: buffer.atomic_min}.get(reduce, buffer.atomic_add)(index, value)


def replace(at: Sequence[Any], dim: int, index: Any) -> tuple[Any, ...]:
    return (*at[:dim], index, *at[dim + 1 :])


# ---- cat -----------------------------------------------------------------------------------------------------------


@structured("cat")
def cat(tensors: Sequence[Tensor], dim: int, valid: int, out: Tensor) -> None:
    """Concatenation along dim; inputs are converted to out's dtype. 1-D empty tensors are skipped whatever out's rank."""
    place: Any = 0
    flat_out = around(out, dim)
    for x in tensors:
        if x.is_empty:
            continue
        flat = around(x, dim)
        if flat is not None and flat_out is not None:
            outer, n, inner = flat.sizes
            whole = flat_out.sizes[1] * inner
            if dim == 0 or all(is_one(s) for s in x.sizes[:dim]):
                to, source = flat_out.view((n * inner,), (1,), place * inner), flat.view((n * inner,), (1,))
            else:
                to = flat_out.view((outer, n * inner), (whole, 1), place * inner)
                source = flat.view((outer, n * inner), (n * inner, 1))
        else:
            to, source = narrow(out, dim, place, x.sizes[dim]), x
        copy_to(to, source)
        place = place + x.sizes[dim]


# ---- gather and scatter --------------------------------------------------------------------------------------------


def _gather(it: Item) -> None:
    (dim,) = it.static
    index = it.check(it.load("index"), 0, it["n"])
    it.store("out", it.load("x", replace(it.at, dim, index)))


@stub("gather_stub")
def gather(self: Tensor, dim: int, index: Tensor, out: Tensor) -> None:
    """out[i][j] = self[index[i][j]][j], along dim."""
    self, index, out = at_least_1d(self), at_least_1d(index), at_least_1d(out)
    dim = dim % self.ndim
    each(
        "gather",
        _gather,
        index.sizes,
        {"out": bits(out), "x": bits(self), "index": index},
        {"n": self.sizes[dim]},
        static=(dim,),
        site=f"gather(): index {{}} is out of bounds for dimension {dim}",
    )


def _scatter(it: Item) -> None:
    """static: dim, the dtype of a number or None, the reduction or None."""
    dim, dtype, reduce = it.static
    index = it.check(it.load("index"), 0, it["n"])
    value = value_of(it, dtype) if dtype else it.load("src")
    place = it.offset("self", replace(it.at, dim, index))
    if reduce is None:
        it.buffers["self"].store(place, value)
    else:
        apply_atomic(it.buffers["self"], place, reduce, value)


def _scatter_in_order(it: Item) -> None:
    """All elements along dim, one after the other; of dim, the item has coordinate 0. static as in _scatter."""
    dim, dtype, reduce = it.static
    with it.k.For(ir.const(0, "i32"), it["length"]) as j:
        at = replace(it.at, dim, j)
        index = it.check(it.load("index", at), 0, it["n"])
        value = value_of(it, dtype) if dtype else it.load("src", at)
        place = it.k.let(it.offset("self", replace(it.at, dim, index)))
        if reduce is not None:
            value = combine(reduce, it.buffers["self"].load(place), value)
        it.buffers["self"].store(place, value)


def scatter_into(
    name: str, self: Tensor, dim: int, index: Tensor, src: Any, reduce: int | None, dtype: str | None = None
) -> None:
    """self[index[i][j]][j] = src[i][j] (or op=), along dim. src: a tensor, or a Scalar of `dtype`."""
    self, index = at_least_1d(self), at_least_1d(index)
    dim = dim % self.ndim
    operands = {"self": self, "index": index}
    scalars: dict[str, Any] = {"n": self.sizes[dim]}
    if dtype is None:
        operands["src"] = at_least_1d(src)
    else:
        scalars |= number(src, dtype)
    site = f"{name}(): index {{}} is out of bounds for dimension {dim}"
    if reduce is None and dtype is None:
        operands["self"], operands["src"] = bits(self), bits(operands["src"])
    if reduce is None and (dtype is not None or not deterministic()):  # equal numbers may be written in any order
        each(name, _scatter, index.sizes, operands, scalars, static=(dim, dtype, None), modes={"self": "w"}, site=site)
    elif reduce is not None and atomic(reduce, self.dtype):
        each(
            name, _scatter, index.sizes, operands, scalars, static=(dim, dtype, reduce), modes={"self": "a"}, site=site
        )
    else:
        scalars["length"] = index.sizes[dim]
        sizes = replace(index.sizes, dim, 1)
        each(
            name + "_in_order",
            _scatter_in_order,
            sizes,
            operands,
            scalars,
            static=(dim, dtype, reduce),
            modes={"self": "rw"},
            site=site,
            cost=index.sizes[dim],
        )


@stub("scatter_stub")
def scatter(dim: int, index: Tensor, src: Tensor, self: Tensor) -> None:
    scatter_into("scatter", self, dim, index, src, None)


@stub("scatter_fill_stub")
def scatter_fill(dim: int, index: Tensor, value: Any, self: Tensor) -> None:
    scatter_into("scatter", self, dim, index, value, None, self.dtype)


@stub("scatter_add_stub")
def scatter_add(dim: int, index: Tensor, src: Tensor, self: Tensor) -> None:
    scatter_into("scatter_add", self, dim, index, src, SUM)


@stub("scatter_reduce_stub", "scatter_reduce_two_stub")
def scatter_reduce(dim: int, index: Tensor, src: Tensor, reduce: int, self: Tensor) -> None:
    """reduce: a ReductionType; ATen initialises self and divides means."""
    scatter_into("scatter_reduce", self, dim, index, src, reduce)


@stub("scatter_scalar_reduce_stub")
def scatter_scalar_reduce(dim: int, index: Tensor, value: Any, reduce: int, self: Tensor) -> None:
    scatter_into("scatter", self, dim, index, value, reduce, self.dtype)


# ---- rows by a vector of indices: index_select, index_add, index_reduce, embedding ---------------------------------


def _select(it: Item) -> None:
    (dim,) = it.static
    index = it.check(it.load("index", (it.at[dim],)), 0, it["n"])
    it.store("out", it.load("x", replace(it.at, dim, index)))


def select_into(name: str, out: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    """out = x's slices along dim by the vector `index`."""
    if x.ndim > 1 and is_zero(x.sizes[dim]):  # out may be empty too: no kernel would look at the index
        check(le(index.numel, 0), "RuntimeError", "index_select(): self indexing axis dim should be positive")
    out, x, index = bits(at_least_1d(out)), bits(at_least_1d(x)), at_least_1d(index)
    flat_out, flat = around(out, dim), around(x, dim)
    n, rank = x.sizes[dim], dim
    last = dim == x.ndim - 1
    if flat_out is not None and flat is not None:
        out, x, dim = flat_out, flat, 1
        if rank == 0:
            out, x, dim = out.view(out.sizes[1:]), x.view(x.sizes[1:]), 0
    each(
        "index_select",
        _select,
        out.sizes,
        {"out": out, "x": x, "index": index},
        {"n": n},
        static=(dim,),
        lanes=not last,
        site=f"{name}(): index {{}} is out of bounds for dimension {rank}",
    )


def _check_index_select(self: Tensor, index: Tensor) -> None:
    check(index.ndim <= 1, "IndexError", "index_select(): Index is supposed to be a vector")
    check(index.dtype in ("i64", "i32"), "RuntimeError", "index_select(): Expected dtype int32 or int64 for index")
    if self.ndim == 0:
        check(
            le(index.numel, 1),
            "RuntimeError",
            "index_select(): Index to scalar can have only 1 value, got {} value(s)",
            index.numel,
        )


@lowering("index_select")
def index_select(self: Tensor, dim: int, index: Tensor) -> Tensor:
    """The slices of self along dim that index (int32 or int64, at most 1-D) names."""
    _check_index_select(self, index)
    sizes = list(self.sizes)
    dim = _wrap(dim, self.ndim)
    if self.ndim:
        sizes[dim] = index.numel
    out = empty(sizes, self.dtype)
    select_into("index_select", out, self, dim, index)
    return out


@operator("index_select_(Tensor(a!) out, Tensor self, int dim, Tensor index) -> ()")
def index_select_(out: Tensor, self: Tensor, dim: int, index: Tensor) -> None:
    """index_select into a tensor of the right shape."""
    select_into("index_select", out, self, dim, index)


@composite("index_select.out")
def index_select_out(self: Any, dim: int, index: Any, *, out: Any) -> Any:
    if self.dtype != out.dtype:
        raise RuntimeError("index_select(): self and result must have the same scalar type")
    if index.dim() > 1:
        raise IndexError("index_select(): Index is supposed to be a vector")
    _no_overlap("index_select", out, self, index)
    dim = _wrap(dim, self.dim())
    sizes = list(self.shape)
    if self.dim():
        sizes[dim] = index.numel()
    resize_out(out, sizes)
    torch.ops.spiral.index_select_(out, self, dim, index)
    return out


def _wrap(dim: int, ndim: int) -> int:
    n = max(ndim, 1)
    if not -n <= dim < n:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})")
    return dim % n


def _no_overlap(name: str, out: Any, *inputs: Any) -> None:
    if not out._is_view() and out.is_contiguous() and all(out.data_ptr() != x.data_ptr() for x in inputs):
        return
    if torch._C._VariableFunctions._debug_has_internal_overlap(out) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    for x in inputs:
        if _overlaps(out, x):
            raise RuntimeError(
                "unsupported operation: some elements of the input tensor and the written-to tensor refer to a single memory location. "
                "Please clone() the tensor before performing the operation."
            )


def _overlaps(a: Any, b: Any) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    ends = []
    for x in (a, b):
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        ends.append((x.storage_offset() * x.element_size(), (x.storage_offset() + last + 1) * x.element_size()))
    return ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]


def _index_add(it: Item) -> None:
    """static: dim, reduction, which number multiplies."""
    dim, reduce, dtype, in_order = it.static
    k = it.k

    def one(j: Any) -> None:
        index = it.check(it.load("index", (j,)), 0, it["n"])
        value = as_dtype(it.load("src", replace(it.at, dim, j)), dtype)
        if "value" in it.scalars:
            alpha = value_of(it, dtype)
            value = ir.and_(value, alpha) if dtype == "bool" else value * alpha
        place = k.let(it.offset("self", replace(it.at, dim, index)))
        if in_order:
            it.buffers["self"].store(place, combine(reduce, it.buffers["self"].load(place), value))
        else:
            apply_atomic(it.buffers["self"], place, reduce, value)

    if in_order:
        with k.For(ir.const(0, "i32"), it["length"]) as j:
            one(j)
    else:
        one(it.at[dim])


def add_rows(name: str, self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: int, alpha: Any = None) -> None:
    """self[index[j]] op= alpha * src[j] for the slices j along dim."""
    self, src, index = at_least_1d(self), at_least_1d(src), at_least_1d(index)
    flat, flat_src, rank = around(self, dim), around(src, dim), dim
    last = dim == self.ndim - 1
    if flat is not None and flat_src is not None:
        self, src, dim = flat, flat_src, 1
    in_order = not atomic(reduce, self.dtype)
    scalars: dict[str, Any] = {"n": self.sizes[dim], "length": index.numel}
    if alpha is not None:
        scalars |= number(alpha, self.dtype)
    each(
        name,
        _index_add,
        replace(src.sizes, dim, 1) if in_order else src.sizes,
        {"self": self, "index": index, "src": src},
        scalars,
        static=(dim, reduce, self.dtype, in_order),
        modes={"self": "rw" if in_order else "a"},
        lanes=in_order and not last,
        site=f"{name}(): index {{}} is out of bounds for dimension {rank}",
        cost=index.numel if in_order else 1,
    )


@structured("index_add")
def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Any, out: Tensor) -> None:
    """out = self with alpha * source added to the slices along dim that index names."""
    if not out.same_storage(self):
        copy_to(out, self)
    add_rows("index_add", out, dim, index, source, SUM, alpha)


@structured("index_reduce")
def index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, include_self: bool, out: Tensor
) -> None:
    """reduce: "prod", "mean", "amax" or "amin"."""
    kind = {"prod": PROD, "mean": MEAN, "amax": MAX, "amin": MIN}[reduce]
    if not out.same_storage(self):
        copy_to(out, self)
    whole = at_least_1d(out)
    if not include_self:
        each(
            "index_reduce_init",
            _init_rows,
            replace(at_least_1d(source).sizes, dim, index.numel),
            {"self": whole, "index": at_least_1d(index)},
            {"n": whole.sizes[dim]},
            static=(dim, kind, out.dtype),
            modes={"self": "w"},
            site=f"index_reduce(): index {{}} is out of bounds for dimension {dim}",
        )
    add_rows("index_reduce", out, dim, index, source, kind)
    if kind == MEAN:
        counts = empty((whole.sizes[dim],), "i32")
        fill(counts, 1 if include_self else 0)
        count_indices("index_reduce", index, counts)
        each(
            "index_reduce_mean",
            _divide_rows,
            whole.sizes,
            {"self": whole, "counts": counts},
            static=(dim, out.dtype),
            modes={"self": "rw"},
        )


def _init_rows(it: Item) -> None:
    dim, kind, dtype = it.static
    index = it.check(it.load("index", (it.at[dim],)), 0, it["n"])
    it.store("self", initial(kind, dtype), replace(it.at, dim, index))


def _divide_rows(it: Item) -> None:
    dim, dtype = it.static
    count = ir.maximum(it.load("counts", (it.at[dim],)), 1)
    x = it.load("self")
    if DTYPES[dtype].kind in ("int", "uint"):
        value = ir.floor_divide(x, ir.cast(count, x.dtype))
    else:
        value = x / ir.cast(count, compute_dtype(dtype))
    it.store("self", value)


def initial(reduce: int, dtype: str) -> Any:
    """The neutral element of a reduction over elements of `dtype`."""
    d = DTYPES[dtype]
    if reduce in (SUM, MEAN, PROD):
        v: Any = 1 if reduce == PROD else 0
    elif d.kind == "bool":
        v = reduce == MIN
    elif d.kind == "float":
        v = float("-inf") if reduce == MAX else float("inf")
    else:
        width = 8 * d.size
        low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if d.kind == "int" else (0, (1 << width) - 1)
        v = low if reduce == MAX else high
    return ir.const(v, d.compute)


def _count(it: Item) -> None:
    index = it.check(it.load("index"), 0, it["n"])
    it.buffers["counts"].atomic_add(index, ir.const(1, "i32"))


def count_indices(name: str, index: Tensor, counts: Tensor) -> None:
    """counts[index[i]] += 1; counts is i32 and contiguous."""
    each(
        "count_indices",
        _count,
        index.sizes,
        {"counts": counts, "index": at_least_1d(index)},
        {"n": counts.sizes[0]},
        modes={"counts": "a"},
        site=f"{name}(): index {{}} is out of range",
    )


# ---- index, index_put and their kin over iterators -----------------------------------------------------------------


def whole(o: IterOperand, it: Iter) -> Tensor:
    """An iterator's operand as a tensor, the last dimension fastest."""
    assert o.tensor is not None
    if not it.ndim:
        return o.tensor.view((1,), (0,))
    return o.tensor.view(tuple(reversed(it.shape)), tuple(reversed(o.strides)))


def _indexed_place(it: Item, name: str, at: Sequence[Any] | None = None) -> Any:
    """The place in operand `name` at the indices of the item: its strides, plus index * stride of each indexed dimension."""
    place = it.offset(name, at)
    count = it.static[0]
    for i in range(count):
        index = it.load(f"index{i}", at)
        index = it.wrap(index, it[f"size{i}_of"])
        place = place + index * it[f"stride{i}_of"]
    return place


def _index(it: Item) -> None:
    it.store("out", it.buffers["x"].load(_indexed_place(it, "x")))


def _index_put(it: Item) -> None:
    _, accumulate, dtype = it.static
    value = value_of(it, dtype) if "value" in it.scalars else it.load("value")
    place = _indexed_place(it, "self")
    if accumulate:
        it.buffers["self"].atomic_add(place, value)
    else:
        it.buffers["self"].store(place, value)


def _index_put_in_order(it: Item) -> None:
    """All elements along the dimensions that the indices vary in, one after the other; of those the item has coordinate 0."""
    _, along, accumulate = it.static

    def walk(dims: tuple[int, ...], at: tuple[Any, ...]) -> None:
        if dims:
            with it.k.For(ir.const(0, "i32"), it[f"length{dims[0]}"]) as j:
                walk(dims[1:], replace(at, dims[0], j))
        else:
            place = it.k.let(_indexed_place(it, "self", at))
            value = it.load("value", at)
            it.buffers["self"].store(
                place, combine(SUM, it.buffers["self"].load(place), value) if accumulate else value
            )

    walk(along, it.at)


def _indexing(
    name: str,
    body: Any,
    it: Iter,
    random: tuple[str, Tensor],
    other: dict[str, Tensor],
    indices: Sequence[IterOperand],
    sizes: Sequence[Any],
    strides: Sequence[Any],
    static: tuple,
    mode: str,
    scalars: dict[str, Any] | None = None,
    text: str = "",
) -> None:
    operands = {**other, random[0]: random[1]}
    numbers: dict[str, Any] = dict(scalars or {})
    for i, (o, size, stride) in enumerate(zip(indices, sizes, strides, strict=True)):
        operands[f"index{i}"] = whole(o, it)
        numbers[f"size{i}_of"], numbers[f"stride{i}_of"] = size, stride
    lanes = mode != "a" and it.ndim > 0 and all(is_zero(o.strides[0]) for o in indices)
    each(
        name,
        body,
        tuple(reversed(it.shape)),
        operands,
        numbers,
        static=(len(indices), *static),
        modes={random[0]: mode},
        lanes=lanes,
        site=text or f"{name}(): index {{}} is out of bounds",
    )


@stub("index_stub")
def index(it: Iter, sizes: Sequence[Any], strides: Sequence[Any]) -> None:
    """out = self[indices]; strides are bytes."""
    size = DTYPES[it.outputs[0].dtype].size
    _indexing(
        "index",
        _index,
        it,
        ("x", bits(whole(it.inputs[0], it))),
        {"out": bits(whole(it.outputs[0], it))},
        it.inputs[1:],
        sizes,
        [s // size for s in strides],
        (),
        "r",
    )


@stub("index_put_stub")
def index_put(it: Iter, sizes: Sequence[Any], strides: Sequence[Any], accumulate: bool) -> None:
    """self[indices] = value, or += value; strides are bytes."""
    _put(
        it,
        it.inputs[0],
        it.inputs[1:],
        sizes,
        [s // DTYPES[it.outputs[0].dtype].size for s in strides],
        accumulate,
        "index_put_",
    )


def _put(
    it: Iter, source: Any, indices: Sequence[IterOperand], sizes: Any, strides: Any, accumulate: bool, name: str
) -> None:
    self = whole(it.outputs[0], it)
    scalars: dict[str, Any] = {}
    other: dict[str, Tensor] = {}
    if isinstance(source, IterOperand) and not source.is_scalar:
        other["value"] = whole(source, it)
    else:
        scalars = number(source.value if isinstance(source, IterOperand) else source, self.dtype)
    dtype = self.dtype
    if other and other["value"].dtype == dtype:
        if not accumulate:
            self, other["value"] = bits(self), bits(other["value"])
        if deterministic():
            along = tuple(d for d in range(it.ndim) if not all(is_zero(o.strides[it.ndim - 1 - d]) for o in indices))
            _put_in_order(it, self, other["value"], indices, sizes, strides, along, bool(accumulate), name)
            return
    _indexing(
        name,
        _index_put,
        it,
        ("self", self),
        other,
        indices,
        sizes,
        strides,
        (bool(accumulate), dtype),
        "a" if accumulate else "w",
        scalars,
    )


def _put_in_order(
    it: Iter,
    self: Tensor,
    value: Tensor,
    indices: Sequence[IterOperand],
    sizes: Any,
    strides: Any,
    along: tuple[int, ...],
    accumulate: bool,
    name: str,
) -> None:
    space = tuple(reversed(it.shape))
    operands, numbers = {"self": self, "value": value}, {f"length{d}": space[d] for d in along}
    for i, (o, size, stride) in enumerate(zip(indices, sizes, strides, strict=True)):
        operands[f"index{i}"] = whole(o, it)
        numbers[f"size{i}_of"], numbers[f"stride{i}_of"] = size, stride
    each(
        f"{name}in_order",
        _index_put_in_order,
        tuple(1 if d in along else n for d, n in enumerate(space)),
        operands,
        numbers,
        static=(len(indices), along, accumulate),
        modes={"self": "rw" if accumulate else "w"},
        site=f"{name}(): index {{}} is out of bounds",
        cost=product([space[d] for d in along]),
    )


@stub("index_copy_stub")
def index_copy(it: Iter, dim: Any, size: Any, stride: Any) -> None:
    """self's slices along dim = source's; the iterator's inputs are index and source."""
    _put(it, it.inputs[1], it.inputs[:1], [size], [stride], False, "index_copy_")


@stub("index_fill_stub")
def index_fill(it: Iter, dim: Any, size: Any, stride: Any, value: Any) -> None:
    """self's slices along dim = value."""
    _put(it, value, it.inputs[:1], [size], [stride], False, "index_fill_")


def _index_put_sorted(it: Item) -> None:
    """static: dimensions before the indexed ones, which are indexed, accumulate, in order. The indices are vectors; of their
    dimension, an item in order has coordinate 0."""
    before, count, accumulate, in_order = it.static
    k = it.k

    def one(j: Any) -> None:
        at = replace(it.at, before, j)
        picked = [it.wrap(it.load(f"index{i}", (j,)), it[f"size{i}_of"]) for i in range(count)]
        value = it.load("value", at)
        place = k.let(it.offset("self", (*at[:before], *picked, *at[before + 1 :])))
        if accumulate and in_order:
            old = it.buffers["self"].load(place)
            boolean = not isinstance(old, ir.Complex) and old.dtype == "bool"
            it.buffers["self"].store(place, ir.or_(old, value) if boolean else old + value)
        elif accumulate:
            it.buffers["self"].atomic_add(place, value)
        else:
            it.buffers["self"].store(place, value)

    if in_order:
        with k.For(ir.const(0, "i32"), it["length"]) as j:
            one(j)
    else:
        one(it.at[before])


@stub("index_put_with_sort_stub")
def index_put_with_sort(indices: Sequence[Tensor | None], value: Tensor, accumulate: bool, self: Tensor) -> None:
    """self[indices] += value (or = value: then the last of equal indices wins). The indices, int64 and of one shape, belong to
    adjacent dimensions; value has the result's shape."""
    given = [x for x in indices if x is not None]
    before = next(d for d, x in enumerate(indices) if x is not None)
    rank = given[0].ndim
    length = given[0].numel
    rows = (*value.sizes[:before], length, *value.sizes[before + rank :])
    if rank == 1:
        flat = value
    else:
        flat = contiguous(value).view(rows)
    in_order = not accumulate or not atomic(SUM, self.dtype)
    operands = {"self": self, "value": flat}
    scalars: dict[str, Any] = {"length": length}
    for i, x in enumerate(given):
        operands[f"index{i}"] = contiguous(x).view((length,))
        scalars[f"size{i}_of"] = self.sizes[before + i]
    if not accumulate:
        operands["self"], operands["value"] = bits(self), bits(flat)
    each(
        "index_put_sorted",
        _index_put_sorted,
        replace(rows, before, 1) if in_order else rows,
        operands,
        scalars,
        static=(before, len(given), accumulate, in_order),
        modes={"self": "rw" if in_order else "a"},
        lanes=in_order and before + rank < value.ndim,
        cost=length if in_order else 1,
        site="index_put_(): index {} is out of bounds",
    )


def _flat_place(it: Item, name: str, index: Any) -> Any:
    """The place of the element that `index` counts to in C order."""
    place: Any = ir.const(0, "i32")
    rank = it.static[0]
    for d in reversed(range(rank)):
        stride = it.layouts[name][d]
        if d:
            q = it.k.let(ir.idiv(index, it[f"n{d}"]))
            c, index = index - q * it[f"n{d}"], q
        else:
            c = index
        if stride is not None:
            place = place + c * stride
    return place


def _take(it: Item) -> None:
    at = it.wrap(it.load("index"), it["numel"])
    it.store("out", it.buffers["x"].load(_flat_place(it, "x", at)))


def _put_flat(it: Item) -> None:
    _, accumulate = it.static
    value = it.load("src")
    place = _flat_place(it, "self", it.wrap(it.load("index"), it["numel"]))
    if accumulate:
        it.buffers["self"].atomic_add(place, value)
    else:
        it.buffers["self"].store(place, value)


def _flat(x: Tensor) -> Tensor:
    return x.view((x.numel,)) if x.is_contiguous else x


@stub("take_stub")
def take(it: Iter, input: Tensor) -> None:
    """out = input's elements in C order, by index."""
    x = bits(_flat(input))
    each(
        "take",
        _take,
        tuple(reversed(it.shape)),
        {"out": bits(whole(it.outputs[0], it)), "x": x, "index": whole(it.inputs[0], it)},
        {"numel": x.numel, **{f"n{d}": n for d, n in enumerate(x.sizes)}},
        static=(x.ndim,),
        site="take(): out of range: tried to access index {}",
    )


@stub("put_stub")
def put(it: Iter, accumulate: bool, self: Tensor) -> None:
    """self's elements in C order, by index, = source or += source."""
    x = _flat(self)
    source = whole(it.inputs[0], it)
    if accumulate and DTYPES[x.dtype].kind in ("float", "complex"):
        _C.alert_not_deterministic("put_ with accumulate=True")
    if not accumulate:
        x, source = bits(x), bits(source)
    each(
        "put",
        _put_flat,
        tuple(reversed(it.shape)),
        {"self": x, "src": source, "index": whole(it.inputs[1], it)},
        {"numel": x.numel, **{f"n{d}": n for d, n in enumerate(x.sizes)}},
        static=(x.ndim, bool(accumulate)),
        modes={"self": "a" if accumulate else "w"},
        site="put_(): out of range: tried to access index {}",
    )


# ---- masks ---------------------------------------------------------------------------------------------------------


def _masked_fill(self: Any, mask: Any, value: Any, *imag: Any) -> Any:
    if imag:
        return ir.where(truth(mask), ir.Complex(value, imag[0]), self)
    return ir.where(truth(mask), ir.cast(value, self.dtype), self)


@lowering("masked_fill_.Scalar")
def masked_fill_(self: Tensor, mask: Tensor, value: Any) -> None:
    """self = value where mask (bool) is true."""
    check(
        mask.dtype == "bool",
        "RuntimeError",
        f"masked_fill_ only supports boolean masks, but got mask with dtype {_name(mask.dtype)}",
    )
    floating = DTYPES[self.dtype].kind in ("float", "complex")
    check(
        DTYPES[self.dtype].kind == "complex" or not isinstance(value, tuple),
        "RuntimeError",
        f"value cannot be converted to type {_name(self.dtype)} without overflow",
    )
    if (
        not floating
        and self.dtype != "bool"
        and not isinstance(value, tuple)
        and self.dtype not in ("i64", "u64", "u32")
    ):
        d = DTYPES[self.dtype]
        low, high = (
            (-(1 << (8 * d.size - 1)), 1 << (8 * d.size - 1))
            if d.kind == "int"
            else (-(1 << 8 * d.size), 1 << 8 * d.size)
        )
        inside = where(le(value, high - 1), le(low, value), 0)
        check(inside, "RuntimeError", f"value cannot be converted to type {_name(self.dtype)} without overflow")
    _check_broadcast(self, mask)
    scalars = number(value, self.dtype)
    map_tensors(
        "masked_fill",
        _masked_fill,
        [self],
        [self, broadcast(mask, self.sizes)],
        [v for _, v in scalars.values()],
        [t for t, _ in scalars.values()],
    )


def _check_broadcast(self: Tensor, mask: Tensor) -> None:
    bad = "expand({}, size={}): the number of sizes provided must be greater or equal to the number of dimensions in the tensor"
    check(mask.ndim <= self.ndim, "RuntimeError", bad, mask.ndim, self.ndim)
    for m, n in zip(reversed(mask.sizes), reversed(self.sizes)):
        if not is_one(m):
            text = "The size of tensor a ({}) must match the size of tensor b ({}) for masks"
            check(eq(m, n), "RuntimeError", text, n, m)


def _name(dtype: str) -> str:
    return {
        "f32": "Float",
        "f64": "Double",
        "f16": "Half",
        "bf16": "BFloat16",
        "i64": "Long",
        "i32": "Int",
        "i16": "Short",
        "i8": "Char",
        "u8": "Byte",
        "bool": "Bool",
        "c64": "ComplexFloat",
        "c128": "ComplexDouble",
        "c32": "ComplexHalf",
    }.get(dtype, dtype)


@composite("masked_fill_.Tensor")
def masked_fill_tensor_(self: Any, mask: Any, value: Any) -> Any:
    if value.dim() != 0:
        raise RuntimeError(
            f"masked_fill_ only supports a 0-dimensional value tensor, but got tensor with {value.dim()} dimension(s)."
        )
    if value.device.type == "cpu":
        return self.masked_fill_(mask, value.item())
    if value.is_complex() and not self.is_complex():
        raise RuntimeError(f"value cannot be converted to type {self.dtype} without overflow")
    if mask.dtype != torch.bool:
        raise RuntimeError(f"masked_fill_ only supports boolean masks, but got mask with dtype {mask.dtype}")
    if torch._C._VariableFunctions._debug_has_internal_overlap(self) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    return self.copy_(torch.where(mask.expand(self.shape), value.to(self.dtype), self))


# Flags are compacted in three steps: each block of `block` flags is counted, the counts are summed up, and each block is walked
# again from where its first flag goes.


def _flag(x: Any) -> Any:
    return truth(x)


def _count_block(it: Item) -> None:
    count = it.k.var("i32", 0)
    first = it.k.let(it.at[0] * it["block"])
    with it.k.For(first, it.k.let(ir.minimum(first + it["block"], it["n"]))) as i:
        count.set(count + ir.cast(it.load("flags", (i,)), "i32"))
    it.store("out", count)


def _sum_blocks(it: Item) -> None:
    total = it.k.var("i32", 0)
    with it.k.For(ir.const(0, "i32"), it["blocks"]) as b:
        count = it.k.let(it.load("starts", (b,)))
        it.store("starts", total, (b,))
        total.set(total + count)
    it.store("starts", total, (it["blocks"],))


def flags_of(x: Tensor) -> Tensor:
    """x != 0 as a contiguous vector of bools."""
    flags = empty((x.numel,), "bool")
    shaped = flags.view(x.sizes)
    map_tensors("flags", _flag, [shaped], [x])
    return flags


def block_of(n: Any) -> tuple[Any, Any]:
    """(flags per block, blocks) for n flags."""
    block = maximum(256, cdiv(n, 2048))
    return block, cdiv(n, block)


def flag_starts(flags: Tensor) -> Tensor:
    """i32 vector: how many flags are set before each block, and last how many in all."""
    n = flags.sizes[0]
    block, blocks = block_of(n)
    starts = empty((blocks + 1,), "i32")
    each("count_flags", _count_block, (blocks,), {"out": starts, "flags": flags}, {"block": block, "n": n}, cost=block)
    each("sum_flags", _sum_blocks, (1,), {"starts": starts}, {"blocks": blocks}, modes={"starts": "rw"})
    return starts


def walk_flags(
    name: str,
    body: Any,
    flags: Tensor,
    starts: Tensor,
    operands: dict[str, Tensor],
    scalars: dict[str, Any] | None = None,
    static: tuple = (),
    modes: dict[str, str] | None = None,
) -> None:
    """body(it, i, rank) for each set flag i, the rank-th; static[0] is the body."""
    n = flags.sizes[0]
    block, blocks = block_of(n)
    each(
        name,
        body,
        (blocks,),
        {"flags": flags, "starts": starts, **operands},
        {"block": block, "n": n, **(scalars or {})},
        static=static,
        modes=modes,
        cost=block,
    )


def _walk(it: Item, act: Any) -> None:
    rank = it.k.var("i32", it.load("starts", (it.at[0],)))
    first = it.k.let(it.at[0] * it["block"])
    with it.k.For(first, it.k.let(ir.minimum(first + it["block"], it["n"]))) as i, it.k.If(it.load("flags", (i,))):
        act(i, it.k.let(rank))
        rank.set(rank + 1)


def _write_coordinates(it: Item) -> None:
    (ndim,) = it.static

    def act(i: Any, rank: Any) -> None:
        with it.k.If(rank < it["count"]):
            rest = i
            for d in reversed(range(ndim)):
                if d:
                    q = it.k.let(ir.idiv(rest, it[f"size{d}"]))
                    c, rest = rest - q * it[f"size{d}"], q
                else:
                    c = rest
                it.store("out", c, (rank, ir.const(d, "i32")))

    _walk(it, act)


def _fill_rest(it: Item) -> None:
    with it.k.If(it.at[0] >= it.load("starts", (it["blocks"],))):
        it.store("out", it["value"])


def _coordinates(flags: Tensor, starts: Tensor, sizes: Sequence[Any], out: Tensor) -> None:
    named = {f"size{d}": n for d, n in enumerate(sizes)}
    walk_flags(
        "nonzero",
        _write_coordinates,
        flags,
        starts,
        {"out": out},
        {"count": out.sizes[0], **named},
        static=(len(sizes),),
    )


@operator("flags(Tensor self) -> (Tensor, Tensor)")
def flags_operator(self: Tensor) -> tuple[Tensor, Tensor]:
    """(self != 0 as a vector, starts of its blocks with their total last)."""
    flags = flags_of(self)
    return flags, flag_starts(flags)


@operator("nonzero_(Tensor(a!) out, Tensor self, Tensor flags, Tensor starts) -> ()")
def nonzero_write(out: Tensor, self: Tensor, flags: Tensor, starts: Tensor) -> None:
    """Coordinates of the set flags into out [count, self's rank]; of self only the shape matters."""
    _coordinates(flags, starts, self.sizes, out)


def _nonzero(self: Any, make: Any) -> Any:
    if self.dim() == 0:
        out = make((int(bool(self.item() != 0)), 0))
        return out
    if self.numel() == 0:
        return make((0, self.dim()))
    flags, starts = torch.ops.spiral.flags(self)
    out = make((int(starts[-1].item()), self.dim()))
    if out.numel():
        torch.ops.spiral.nonzero_(out, self, flags, starts)
    return out


@composite("nonzero")
def nonzero(self: Any) -> Any:
    """int64 [count, ndim]: coordinates of the elements that are not 0. Waits for the count."""
    return _nonzero(self, lambda shape: torch.empty(shape, dtype=torch.int64, device=self.device))


@composite("nonzero.out")
def nonzero_out(self: Any, *, out: Any) -> Any:
    if out.dtype != torch.int64:
        raise RuntimeError(
            f"nonzero: Expected out tensor to have scalar type Long but got scalar type {_scalar_name(out.dtype)}"
        )
    if out.device != self.device:
        raise RuntimeError(f"Expected object of device type {self.device} but got {out.device} for argument 'out'")
    return _nonzero(self, lambda shape: resize_out(out, shape))


def _scalar_name(dtype: Any) -> str:
    return {torch.float32: "Float", torch.float64: "Double", torch.int32: "Int", torch.bool: "Bool"}.get(
        dtype, str(dtype)
    )


@lowering("nonzero_static", slots=("size", "fill_value"))
def nonzero_static(self: Tensor, size: Any, fill_value: Any) -> Tensor:
    """The first `size` rows of nonzero; rows beyond its end are fill_value."""
    check(le(0, size), "RuntimeError", "nonzero_static: 'size' must be an non-negative integer")
    out = empty((size, self.ndim), "i64")
    if self.ndim == 0:
        return out
    if self.is_empty:
        each("fill_i64", _fill_value, out.sizes, {"out": out}, {"value": ("i64", fill_value)})
        return out
    flags = flags_of(self)
    starts = flag_starts(flags)
    _coordinates(flags, starts, self.sizes, out)
    _, blocks = block_of(flags.sizes[0])
    each(
        "nonzero_rest",
        _fill_rest,
        out.sizes,
        {"out": out, "starts": starts},
        {"blocks": blocks, "value": ("i64", fill_value)},
    )
    return out


def _fill_value(it: Item) -> None:
    it.store("out", it["value"])


@composite("nonzero_static.out")
def nonzero_static_out(self: Any, *, size: int, fill_value: int = -1, out: Any) -> Any:
    result = torch.nonzero_static(self, size=size, fill_value=fill_value)
    return out.resize_(result.shape).copy_(result)


def _pick(it: Item) -> None:
    _walk(it, lambda i, rank: it.store("out", it.load("x", (i,)), (rank,)))


@operator("masked_pick_(Tensor(a!) out, Tensor self, Tensor flags, Tensor starts) -> ()")
def masked_pick(out: Tensor, self: Tensor, flags: Tensor, starts: Tensor) -> None:
    """out = self's elements whose flag is set."""
    x = contiguous(self)
    walk_flags("masked_pick", _pick, flags, starts, {"out": bits(out), "x": bits(x.view((x.numel,)))})


def _masked_select(self: Any, mask: Any, make: Any) -> Any:
    if mask.dtype != torch.bool:
        raise RuntimeError(f"masked_select: expected BoolTensor for mask, but got mask with dtype {mask.dtype}")
    if mask.device != self.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {self.device} and {mask.device}! "
            "(when checking argument for masked_select)"
        )
    self, mask = torch.broadcast_tensors(self, mask)
    if self.numel() == 0:
        return make((0,))
    flags, starts = torch.ops.spiral.flags(mask)
    out = make((int(starts[-1].item()),))
    if out.numel():
        torch.ops.spiral.masked_pick_(out, self, flags, starts)
    return out


@composite("masked_select")
def masked_select(self: Any, mask: Any) -> Any:
    """Vector of the elements whose mask is true. Waits for their number."""
    return _masked_select(self, mask, lambda shape: torch.empty(shape, dtype=self.dtype, device=self.device))


@composite("masked_select.out")
def masked_select_out(self: Any, mask: Any, *, out: Any) -> Any:
    if self.dtype != out.dtype:
        raise RuntimeError("masked_select(): self and result must have the same scalar type")
    _no_overlap("masked_select", out, self, mask)
    return _masked_select(self, mask, lambda shape: resize_out(out, shape))


def _masked_scatter(it: Item) -> None:
    """A flag beyond the source's end is an error: its number is checked against the source's size."""

    def act(i: Any, rank: Any) -> None:
        place = it.check(rank, 0, it["available"])
        it.store("self", it.load("src", (place,)), (i,))

    _walk(it, act)


@lowering("masked_scatter_")
def masked_scatter_(self: Tensor, mask: Tensor, source: Tensor) -> None:
    """self's elements whose mask is true = source's elements in order."""
    check(
        self.dtype == source.dtype,
        "RuntimeError",
        f"masked_scatter_: expected self and source to have same dtypes but got {_name(self.dtype)} and {_name(source.dtype)}",
    )
    check(
        mask.dtype == "bool",
        "RuntimeError",
        f"masked_scatter_ only supports boolean masks, but got mask with dtype {_name(mask.dtype)}",
    )
    _check_broadcast(self, mask)
    if self.is_empty:
        return
    flags = flags_of(broadcast(mask, self.sizes))
    starts = flag_starts(flags)
    src = contiguous(source)
    x = contiguous(self)
    n = flags.sizes[0]
    block, blocks = block_of(n)
    each(
        "masked_scatter",
        _masked_scatter,
        (blocks,),
        {"flags": flags, "starts": starts, "self": bits(x.view((n,))), "src": bits(src.view((src.numel,)))},
        {"block": block, "n": n, "available": src.numel},
        modes={"self": "w"},
        cost=block,
        site="masked_scatter_: expected the number of elements in source to be at least the number of ones in mask; the mask has a one at place {}",
    )
    if x is not self:
        copy_to(self, x)


# ---- counting ------------------------------------------------------------------------------------------------------


@composite("count_nonzero.dim_IntList")
def count_nonzero(self: Any, dim: Sequence[int]) -> Any:
    """int64 count of elements that are not 0, along dims."""
    return (self != 0).sum(list(dim)) if dim else (self != 0).sum()
