"""Pointwise and row (reduction) kernels from expressions, for the schedule classes `vector` and `simt`.

Dimension 0 is the fastest. A kernel is built for stride classes, never for sizes: sizes and strides that are not 0 or 1
are scalars of the launch. What is built is a Nest: the Kernel and how to launch it for given sizes. Sizes may be ints or
the Syms of a lowering.

    nest = pointwise(target, "gelu", [Operand("out", "f16", "dense")], [Operand("x", "f16", "dense")],
                     lambda x: x * 0.5 * (1.0 + ir.erf(x * 0.7071067811865476)), ndim=1)
    launch(nest.kernel, [out, x], nest.scalars(sizes=[n]), nest.groups(sizes=[n]))
"""

from .elementwise import Context, Nest, pointwise
from .monoids import ALL, ANY, ARGMAX, ARGMIN, LOGSUMEXP, MAX, MIN, PROD, SUM, WELFORD, Monoid
from .operands import (
    SIMT_ELEMENTS,
    SIMT_WORKGROUP,
    TASK_ELEMENTS,
    Operand,
    cdiv,
    fold_groups,
    lanes_for,
    stride_classes,
)
from .reduction import RowContext, RowNest, Rows, RowSchedule, SplitRows, row_candidates, rows, split_monoid, split_rows

__all__ = [
    "ALL", "ANY", "ARGMAX", "ARGMIN", "LOGSUMEXP", "MAX", "MIN", "PROD", "SIMT_ELEMENTS", "SIMT_WORKGROUP", "SUM", "TASK_ELEMENTS",
    "WELFORD", "Context", "Monoid", "Nest", "Operand", "RowContext", "RowNest", "RowSchedule", "Rows", "SplitRows", "cdiv",
    "fold_groups", "lanes_for", "pointwise", "row_candidates", "rows", "split_monoid", "split_rows", "stride_classes",
]  # fmt: skip
