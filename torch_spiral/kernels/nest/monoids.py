"""Associative combinations for reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import ir
from ..ir import Node


@dataclass(frozen=True)
class Monoid:
    """An associative combination with a neutral element, on tuples of values. blocked: rounding errors grow with the
    number of combinations, so long reductions go in blocks. together: combines a total with several elements at less cost
    than one after the other."""

    name: str
    dtypes: tuple[str, ...]
    init: tuple[Any, ...]
    combine: Callable[[tuple, tuple], tuple] = field(compare=False)
    blocked: bool = False
    together: Callable[[tuple, Sequence[tuple]], tuple] | None = field(default=None, compare=False)

    def several(self, total: tuple, elements: Sequence[tuple]) -> tuple:
        """total and the elements, combined."""
        if self.together:
            return self.together(total, elements)
        while len(elements) > 1:
            elements = [self.combine(*elements[i : i + 2]) for i in range(0, len(elements), 2)]
        return self.combine(total, elements[0])


def SUM(dtype: str = "f32") -> Monoid:
    return Monoid("sum", (dtype,), (0,), lambda a, b: (a[0] + b[0],), blocked=dtype in ir.FLOATS)


def PROD(dtype: str = "f32") -> Monoid:
    return Monoid("prod", (dtype,), (1,), lambda a, b: (a[0] * b[0],), blocked=dtype in ir.FLOATS)


_LOWEST: dict[str, Any] = {
    "f32": -math.inf, "f64": -math.inf, "i32": -(2**31), "i64": -(2**63), "u32": 0, "u64": 0, "bool": 0
}  # fmt: skip
_HIGHEST: dict[str, Any] = {
    "f32": math.inf, "f64": math.inf, "i32": 2**31 - 1, "i64": 2**63 - 1, "u32": 2**32 - 1, "u64": 2**64 - 1, "bool": 1
}  # fmt: skip


def MAX(dtype: str = "f32") -> Monoid:
    """NaN propagates."""
    return Monoid("max", (dtype,), (_LOWEST[dtype],), lambda a, b: (ir.maximum(a[0], b[0]),))


def MIN(dtype: str = "f32") -> Monoid:
    return Monoid("min", (dtype,), (_HIGHEST[dtype],), lambda a, b: (ir.minimum(a[0], b[0]),))


def _arg(better: Callable[[Any, Any], Node]) -> Callable[[tuple, tuple], tuple]:
    def combine(a: tuple, b: tuple) -> tuple:
        tie = ir.or_(ir.eq(a[0], b[0]), ir.and_(ir.isnan(a[0]), ir.isnan(b[0])))
        wins = ir.or_(better(b[0], a[0]), ir.isnan(b[0]))
        wins = ir.and_(wins, ir.not_(ir.isnan(a[0])))
        take = ir.or_(wins, ir.and_(tie, ir.lt(b[1], a[1])))
        return ir.where(take, b[0], a[0]), ir.where(take, b[1], a[1])

    return combine


def ARGMAX(dtype: str = "f32") -> Monoid:
    """(value, index): the first of the largest, or the first NaN. Elements are (x, rows.index)."""
    return Monoid("argmax", (dtype, "i32"), (_LOWEST[dtype], 2**31 - 1), _arg(ir.gt))


def ARGMIN(dtype: str = "f32") -> Monoid:
    return Monoid("argmin", (dtype, "i32"), (_HIGHEST[dtype], 2**31 - 1), _arg(ir.lt))


ANY = Monoid("any", ("bool",), (False,), lambda a, b: (ir.or_(a[0], b[0]),))
ALL = Monoid("all", ("bool",), (True,), lambda a, b: (ir.and_(a[0], b[0]),))


def WELFORD(dtype: str = "f32") -> Monoid:
    """(mean, sum of squared deviations, count). Elements are (x, 0, 1)."""

    def combine(a: tuple, b: tuple) -> tuple:
        n = a[2] + b[2]
        d = b[0] - a[0]
        r = b[2] / ir.where(ir.gt(n, 1.0), n, 1.0)
        return a[0] + d * r, a[1] + b[1] + d * d * a[2] * r, n

    return Monoid("welford", (dtype,) * 3, (0, 0, 0), combine)


def LOGSUMEXP(dtype: str = "f32") -> Monoid:
    """(m, s) for m + log(s). Elements are (x, 1). Where one is NaN, s is."""

    def together(a: tuple, elements: Sequence[tuple]) -> tuple:
        m = a[0]
        for e in elements:
            m = ir.where(ir.gt(m, e[0]), m, e[0])
        at = ir.where(ir.isfinite(m), m, 0.0)  # infinities: exp(-inf - -inf) would be NaN
        s = a[1] * ir.exp(a[0] - at)
        for e in elements:
            s = s + e[1] * ir.exp(e[0] - at)
        return m, ir.where(ir.eq(m, math.inf), 1.0, s)

    return Monoid("logsumexp", (dtype, dtype), (-math.inf, 0), lambda a, b: together(a, [b]), together=together)
