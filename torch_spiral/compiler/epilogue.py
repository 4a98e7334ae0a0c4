"""Which pointwise kernels after a matrix product are epilogues that the product's own kernel can apply.

Decided on the fused kernel's expression: from the product's result, a chain of additions and multiplications by operands that are
affine in row and column, and of activations. An activation is recognised by its values, not by how it was written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..kernels import ir
from ..kernels.ir import Node
from ..kernels.vector.gemm import constant_step, rsqrt_step
from .loops import Program, Store

LIMIT = 1 << 23  # elements of a product whose operands' indices are checked one by one


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "tanh": np.tanh,
}
_POINTS = np.concatenate([np.linspace(-9.0, 9.0, 145), [-0.01, 0.01, 30.0, -30.0]])

_NUMERIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "abs": np.abs, "exp": np.exp, "tanh": np.tanh, "erf": _erf, "sqrt": np.sqrt, "log": np.log,
    "fma": lambda a, b, c: a * b + c, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "where": np.where, "isnan": np.isnan,
    "or": np.logical_or, "and": np.logical_and, "not": np.logical_not, "max": np.maximum, "min": np.minimum,
    "pow": lambda a, b: a**b, "rsqrt": lambda a: 1.0 / np.sqrt(a),
}  # fmt: skip
_INTEGER: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "idiv": lambda a, b: a // b,
    "irem": lambda a, b: a % b,
}  # fmt: skip


def _evaluate(n: Node, known: dict[Node, Any], table: dict[str, Callable[..., Any]]) -> Any:
    """A node's value by NumPy; KeyError for what the table lacks. Only non-negative integers are divided."""
    memo = dict(known)

    def value(n: Node) -> Any:
        if n not in memo:
            memo[n] = ir.const_value(n) if n.op == "const" else table[n.op](*(value(a) for a in n.args))
        return memo[n]

    with np.errstate(all="ignore"):
        return value(n)


@dataclass(frozen=True)
class Operand:
    """A tensor read by an epilogue: a buffer of the fused kernel, with strides along (batch, row, column) and an offset."""

    kind: str  # "add" | "mul" | "sub", or rsqrt_step's
    buffer: int
    strides: tuple[int, ...]
    offset: int

    def turned(self) -> Operand:
        """With rows and columns exchanged."""
        batch, row, column = self.strides
        return replace(self, strides=(batch, column, row))


class Extent(NamedTuple):
    """A size: a number times symbols."""

    number: int
    symbols: tuple[str, ...] = ()

    @classmethod
    def of(cls, n: Node) -> Extent | None:
        """A size of a program; None for one that is more than a product."""
        factors = terms("mul", n)
        if any(f.op not in ("const", "leaf") for f in factors):
            return None
        numbers, symbols = [f.attr for f in factors if f.op == "const"], [f.attr for f in factors if f.op == "leaf"]
        return cls(math.prod(numbers), tuple(sorted(symbols)))


def match(program: Program, product: int, shape: Sequence[Extent]) -> tuple[int, list[str | Operand]] | None:
    """(the buffer that the program writes, steps), or None. product: the buffer that holds the product [batch, rows, columns],
    contiguous. One size may be symbolic: how many batches there are, or how many rows the only one has."""
    names = [name for name, _, _ in program.buffers]
    if program.reduced or len(program.stores) != 1 or program.sites:
        return None
    (store,) = program.stores
    extents = [Extent.of(s) for s in program.rows]
    if store.mode or None in extents:
        return None
    nodes = ir.walk(store.value)
    loads = [n for n in nodes if n.op == "load"]
    accumulators = [n for n in loads if n.attr == names[product]]
    if len(accumulators) != 1 or len(accumulators[0].args) != 1 or any(len(n.args) != 1 for n in loads):
        return None
    acc = accumulators[0]
    if store.index is not acc.args[0] or acc.dtype != "f32":
        return None
    ranges = [e for e in extents if e is not None]
    sizes, dims, outer = [e.number for e in ranges], [e.number for e in shape], int(shape[0] == Extent(1))
    count, many = math.prod(sizes), dims[outer]
    if count != math.prod(dims):
        return None
    # The other items of the batch, or rows of the only one, follow as the second does.
    follow = bool(sizes) and _affine(nodes, f"x{len(sizes) - 1}")
    symbolic = [e.symbols for e in (*ranges[:-1], *shape[:outer], *shape[outer + 1 :])]
    known = ranges[-1].symbols if ranges else ()
    if any(symbolic) or known != shape[outer].symbols or (known and not follow):
        return None
    if known:  # the least number of rows that has a second one in both
        sizes[-1], dims[outer] = 2 * sizes[-1], 2 * many
    elif many > 2 and follow and sizes[-1] % many == 0:
        sizes[-1], dims[outer] = 2 * (sizes[-1] // many), 2
    count = math.prod(sizes)
    if count > LIMIT:
        return None
    grid = (
        np.indices(list(reversed(sizes)), dtype=np.int64).reshape(len(sizes), -1)[::-1]
        if sizes
        else np.zeros((0, 1), np.int64)
    )
    leaves = {Node("leaf", "i32", attr=f"x{d}"): grid[d] for d in range(len(sizes))}
    steps: list[str | Operand] = []
    try:
        place = np.broadcast_to(_evaluate(acc.args[0], leaves, _INTEGER), (count,))
        if not np.array_equal(place, np.arange(count)) and not np.array_equal(np.sort(place), np.arange(count)):
            return None
        slabs = place.reshape(sizes[-1], -1) if known else place[:1, None]
        if np.any(slabs - slabs[0] != slabs.shape[1] * np.arange(len(slabs))[:, None]):
            return None  # in memory, too
        current = acc
        while current is not store.value:
            found = _next(store.value, current, names)
            if found is None:
                return None
            current, step = found
            if isinstance(step, str):
                steps.append(step)
                continue
            for kind, load in step:
                index = np.empty(count, np.int64)
                index[place] = np.broadcast_to(_evaluate(load.args[0], leaves, _INTEGER), (count,))
                strides = _strides(index.reshape(dims))
                if strides is None or load.dtype != "f32":
                    return None
                steps.append(Operand(kind, names.index(load.attr), strides, int(index[0])))
    except KeyError:
        return None
    return names.index(store.buffer), steps


def split(program: Program, product: int) -> tuple[Program, Program] | None:
    """A reduction that stores, element by element, something made of a product's result, and reads the result for nothing else: that part of it
    as a pointwise program, and the reduction that reads what the part stores. Both have the buffers of the whole."""
    name = program.buffers[product][0]
    nodes = ir.walk(*(n for s in program.stores for n in (s.index, s.value)))
    read = {n.attr for n in nodes if n.op == "load"}
    names = [f"r{i}" for i in range(len(program.reduced))] + [f"x{i}" for i in range(len(program.rows))]
    for store in program.stores:
        made = ir.walk(store.index, store.value)
        if (
            not store.per_element or store.mode or store.buffer in read or any(n.op == "red" for n in made)
            or not any(n.op == "load" and n.attr == name for n in made)
        ):  # fmt: skip
            continue
        stored = Node("load", store.value.dtype, store.index, attr=store.buffer)
        rest = [replace(s, value=_replace(s.value, store.value, stored)) for s in program.stores if s is not store]
        if any(n.op == "load" and n.attr == name for s in rest for n in ir.walk(s.index, s.value)):
            continue

        def renamed(n: Node) -> Node | None:
            return Node("leaf", n.dtype, attr=f"x{names.index(n.attr)}") if n.op == "leaf" and n.attr in names else None

        index, value = (ir.substitute(n, renamed) for n in (store.index, store.value))
        part = Store(store.buffer, index, value, None, False)
        modes = [(b, dtype, "r" if b == store.buffer else mode) for b, dtype, mode in program.buffers]
        return (
            replace(program, rows=[*program.reduced, *program.rows], reduced=[], stores=[part]),
            replace(program, buffers=modes, stores=rest),
        )
    return None


def _affine(nodes: Sequence[Node], leaf: str) -> bool:
    """Whether all that is computed of a leaf of integers are sums and multiples of it."""
    of: set[Node] = set()
    for n in nodes:
        if (n.op == "leaf" and n.attr == leaf) or any(a in of for a in n.args):
            if n.op == "load":  # its value is another matter
                continue
            if n.op not in ("leaf", "add", "sub", "mul") or (n.op == "mul" and all(a in of for a in n.args)):
                return False
            of.add(n)
    return True


def _strides(index: np.ndarray) -> tuple[int, ...] | None:
    """Strides of an affine index of three dimensions."""
    first = index[0, 0, 0]
    strides = tuple(
        int(index[tuple(int(d == e) for e in range(3))] - first) if index.shape[d] > 1 else 0 for d in range(3)
    )
    b, m, n = (np.arange(s) * t for s, t in zip(index.shape, strides, strict=True))
    return strides if np.array_equal(index, first + b[:, None, None] + m[:, None] + n) else None


def _replace(value: Node, old: Node, new: Node) -> Node:
    return ir.substitute(value, lambda n: new if n is old else None)


def terms(op: str, n: Node) -> list[Node]:
    """What is added up, or multiplied, in n."""
    return [t for a in n.args for t in terms(op, a)] if n.op == op else [n]


def _operand(op: str, n: Node) -> tuple[str, Node] | None:
    """(kind of a step, load) for what op does with n: a load, or 1 / sqrt(load + a constant) as a factor or below the line."""
    if n.op == "load":
        return (op, n) if op != "div" else None
    loads = [x for x in ir.walk(n) if x.op == "load"]
    if len(loads) != 1 or op not in ("mul", "div"):
        return None
    points = np.array([0.0, 0.25, 1.0, 3.0, 40.0])
    try:
        got = np.broadcast_to(_evaluate(n, {loads[0]: points}, _NUMERIC), points.shape)
    except (KeyError, TypeError):
        return None
    got = got if op == "mul" else 1.0 / got
    if not np.all(np.isfinite(got[1:])) or np.any(got[1:] <= 0):
        return None
    epsilon = max(float(1.0 / got[1] ** 2 - points[1]), 0.0)
    epsilon = 0.0 if epsilon < 1e-12 else float(f"{epsilon:.7g}")
    return (
        (rsqrt_step(epsilon), loads[0])
        if np.allclose(got[1:], 1.0 / np.sqrt(points[1:] + epsilon), rtol=1e-9)
        else None
    )


def _next(value: Node, current: Node, names: list[str]) -> tuple[Node, Any] | None:
    """The furthest node that one step makes of `current`, such that nothing else needs `current`."""
    nodes = ir.walk(value)
    depends = {current}
    for n in nodes:
        if any(a in depends for a in n.args):
            depends.add(n)
    for n in reversed(nodes):
        if n not in depends or n is current:
            continue
        rest = _replace(value, n, ir.leaf("done", n.dtype))
        if any(x is current for x in ir.walk(rest)):
            continue
        if (
            n.op in ("add", "mul", "sub", "div")
            and current in n.args
            and (n.op in ("add", "mul") or n.args[0] is current)
        ):
            other = n.args[1] if n.args[0] is current else n.args[0]
            if other.op == "const":
                c = float(ir.const_value(other))
                if n.op in ("sub", "div"):
                    c = -c if n.op == "sub" else 1.0 / c if c else math.nan
                if math.isfinite(c):
                    return n, constant_step("add" if n.op in ("add", "sub") else "mul", c)
            whole = _operand(n.op, other)
            parts = terms(n.op, other) if n.op in ("add", "mul") else [other]
            steps = [whole] if whole else [_operand(n.op, t) for t in parts]
            if current not in parts and all(steps):
                return n, steps
        below = ir.walk(_replace(n, current, ir.leaf("acc", current.dtype)))
        if any(x.op == "load" or (x.op == "leaf" and x.attr != "acc") for x in below):
            continue
        try:
            got = np.broadcast_to(_evaluate(n, {current: _POINTS}, _NUMERIC), _POINTS.shape)
        except (KeyError, TypeError):
            continue
        for name, f in ACTIVATIONS.items():
            if np.allclose(got, f(_POINTS), rtol=1e-6, atol=1e-7):
                return n, name
    return None
