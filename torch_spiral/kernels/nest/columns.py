"""Reductions over the slow dimension on CPU devices: rows are read in order into running totals of every column."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..builder import KernelBuilder
from ..ir import Node

ROWS_TOGETHER = 4  # of which a total is loaded and stored once


def for_columns(k: KernelBuilder, left: Node, right: Node, lanes: int, body: Callable[[Node], object]) -> None:
    """body(column) for the columns left .. right (i32), `lanes` beside each other, then one by one."""
    column = k.var("i32", left)
    for width in (lanes, 1):
        with k.While(lambda: column + width <= right):  # noqa: B023 (called at once)
            body(column.as_node() + k.lanes(width))
            column.set(column + width)


def for_rows(
    k: KernelBuilder,
    start: Node,
    stop: Node,
    left: Node,
    right: Node,
    lanes: int,
    body: Callable[[Sequence[Node], Node], object],
) -> None:
    """body(rows, column) for a few of the rows start .. stop (i32) at a time, and all columns."""
    row = k.var("i32", start)
    for together in (ROWS_TOGETHER, 1):
        with k.While(lambda: row + together <= stop):  # noqa: B023
            first = row.as_node()
            rows = [k.let(first + u) if u else first for u in range(together)]
            for_columns(k, left, right, lanes, lambda column: body(rows, column))  # noqa: B023
            row.set(first + together)


__all__ = ["ROWS_TOGETHER", "for_columns", "for_rows"]
