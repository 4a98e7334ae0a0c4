"""Index arithmetic of fused kernels: quotients, remainders and comparisons of sums whose terms' ranges are known.

A concatenation or a split of heads reads at (x + c) // d and (x + c) % d under masks x < e. Where x is d * b + a with a < d,
those are a, b + c / d and a condition on b alone, so that neighbours in a are neighbours in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kernels import ir
from ..kernels.ir import Node

Range = tuple[int, int]
COMPARISONS = ("lt", "le", "gt", "ge")


def floor_division(op: str, a: Node, b: Node) -> Node:
    """a // b ("quotient") or a % b ("remainder") of an index that may be negative, for `simplify` to look through."""
    if b.op == "const" and b.attr > 0 and a.op != "const":
        return Node(op, a.dtype, a, b)
    return (ir.floor_divide if op == "quotient" else ir.remainder)(a, b)


def linear(n: Node) -> tuple[dict[Node, int], int]:
    """A sum as its terms with their factors, and a constant."""
    if n.op == "const":
        return {}, n.attr
    if n.op in ("add", "sub"):
        (a, c), (b, d) = (linear(x) for x in n.args)
        sign = 1 if n.op == "add" else -1
        for term, factor in b.items():
            a[term] = a.get(term, 0) + sign * factor
        return {t: f for t, f in a.items() if f}, c + sign * d
    if n.op == "mul":
        for x, y in (n.args, n.args[::-1]):
            if y.op == "const":
                terms, c = linear(x)
                return {t: f * y.attr for t, f in terms.items() if y.attr}, c * y.attr
    return {n: 1}, 0


def total(terms: Mapping[Node, int], constant: int, dtype: str) -> Node:
    """What linear() took apart."""
    out = ir.const(constant, dtype)
    for term, factor in terms.items():
        out = ir.add(out, ir.mul(term, ir.const(factor, dtype)))
    return out


def bounds(terms: Mapping[Node, int], constant: int, ranges: Mapping[Node, Range]) -> Range | None:
    """The least and the largest value of a sum; None if a term's range is not known."""
    low = high = constant
    for term, factor in terms.items():
        if term not in ranges:
            return None
        ends = sorted(factor * end for end in ranges[term])
        low, high = low + ends[0], high + ends[1]
    return low, high


def _divided(n: Node, divisor: int, ranges: Mapping[Node, Range]) -> tuple[Node, Node] | None:
    """(floor quotient, remainder) of a sum by a constant, where its terms are multiples of it and a rest that is less."""
    terms, constant = linear(n)
    rest = {t: f for t, f in terms.items() if f % divisor}
    known = bounds(rest, constant % divisor, ranges)
    if known is None or known[0] < 0 or known[1] >= divisor:
        return None
    whole = {t: f // divisor for t, f in terms.items() if f % divisor == 0}
    return total(whole, constant // divisor, n.dtype), total(rest, constant % divisor, n.dtype)


def _compared(op: str, n: Node, limit: int, ranges: Mapping[Node, Range]) -> Node | None:
    terms, constant = linear(n)
    known = bounds(terms, constant, ranges)
    if known is None:
        return None
    low, high = known
    if op in ("le", "gt"):
        limit += 1
    if high < limit or low >= limit:
        return ir.const((high < limit) == (op in ("lt", "le")), "bool")
    for divisor in sorted({abs(f) for f in terms.values()}, reverse=True):
        if divisor > 1 and limit % divisor == 0 and (parts := _divided(n, divisor, ranges)):
            return (ir.lt if op in ("lt", "le") else ir.ge)(parts[0], ir.const(limit // divisor, n.dtype))
    return None


def simplify(n: Node, ranges: Mapping[Node, Range]) -> Node:
    """A node, its arguments simplified already, of which floor divisions and conditions on indices are looked at.
    ranges: of coordinates, the least and the largest value."""
    op, args = n.op, n.args
    if op in ("quotient", "remainder", "idiv", "irem") and args[0].dtype == "i32" and args[1].op == "const":
        floor = op in ("quotient", "remainder")
        known = (0, 0) if floor else bounds(*linear(args[0]), ranges)  # idiv and irem round towards zero
        parts = _divided(args[0], args[1].attr, ranges) if known and known[0] >= 0 and args[1].attr > 0 else None
        if parts:
            return parts[op in ("remainder", "irem")]
        if floor:
            return (ir.floor_divide if op == "quotient" else ir.remainder)(*args)
    elif op in COMPARISONS and args[0].dtype == "i32" and args[1].op == "const":
        shorter = _compared(op, args[0], args[1].attr, ranges)
        return n if shorter is None else shorter
    elif op in ("and", "or") and n.dtype == "bool":
        for a, b in (args, args[::-1]):
            if a.op == "const":
                return b if bool(a.attr) == (op == "and") else a
    elif op == "where" and args[0].op == "const":
        return args[1] if args[0].attr else args[2]
    return n


def lower(n: Node, ranges: Mapping[Node, Range], memo: dict[Node, Any]) -> Node:
    """An expression with every node simplified; none of floor_division()'s are left. memo: shared by calls with these ranges."""

    def replace(n: Node) -> Node:
        args = tuple(ir.substitute(a, replace, memo) for a in n.args)
        return simplify(n if args == n.args else Node(n.op, n.dtype, *args, attr=n.attr), ranges)

    return ir.substitute(n, replace, memo)


__all__ = ["Range", "floor_division", "lower"]
