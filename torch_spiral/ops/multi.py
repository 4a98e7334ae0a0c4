"""One kernel over many tensors: what optimizers and the _foreach_ ops are made of.

A row is what belongs together: one tensor of each list, all of one size. A launch takes as many rows as the device has bindings
and parameters for; its workgroups are dealt to the rows by their sizes, which are scalars of the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels import ir
from ..kernels.builder import Buffer, KernelBuilder
from ..kernels.emit import BufferDecl
from ..kernels.kernel import DTYPES, Kernel, Target, compute_dtype
from ..kernels.nest import SIMT_WORKGROUP, fold_groups
from ..kernels.opencl import POINTEE
from ..lowering import Tensor, build, cdiv, empty, launch, target
from .common import contiguous, copy_to
from .elementwise import SCALAR_TYPES, as_dtype

LANES = 16
TASK = 16384  # elements that one workgroup of a CPU device handles
PER_INVOCATION = 4  # elements, elsewhere
MOST_BINDINGS = {"wgsl": 48, "triton": 255}  # where each row has its own copy of the body


@dataclass(frozen=True)
class Operand:
    """A tensor of a row. mode: "r", "w", "rw" for each element, or "0": a tensor of one element that belongs to the row."""

    tensor: Tensor
    mode: str = "r"


def groups(rows: Sequence[Sequence[Operand]]) -> list[list[Sequence[Operand]]]:
    """Rows of equal dtypes together."""
    found: dict[tuple, list[Sequence[Operand]]] = {}
    for row in rows:
        found.setdefault(tuple((o.tensor.dtype, o.tensor.windows, o.mode) for o in row), []).append(row)
    return list(found.values())


def map_rows(
    name: str, function: Callable[..., Any], rows: Sequence[Sequence[Operand]], dtype: str, values: Sequence[Any] = (), *,
    row_values: Sequence[Sequence[Any]] = (), shared: Sequence[Tensor] = (), prepare: Callable[..., Any] | None = None, guard: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:  # fmt: skip
    """Every element of every row: written operands = function(*read elements, *numbers).

    rows: operands of equal modes and dtypes; each row's tensors are of one shape (but mode "0"). Read elements arrive in the dtype
    `dtype` (a storage dtype's arithmetic). numbers: what prepare makes of (one-element operands, shared, values, row_values), or
    these themselves. values: numbers of all rows; row_values: for each row its own; pairs for complex ones. shared: tensors of one
    element for all rows. guard: nothing is written where this tensor of one element is not 0. flag: a tensor of one element that becomes
    1 where the last of function's results, a condition, holds for any element. name must say what function and
    prepare compute, and both must live as long as the module."""
    kept = [i for i, row in enumerate(rows) if not any(o.tensor.is_empty for o in row)]
    rows, row_values = [rows[i] for i in kept], [row_values[i] for i in kept] if row_values else ()
    if not rows:
        return
    after: list[tuple[Tensor, Tensor]] = []
    dense: list[list[Tensor]] = []
    for row in rows:
        tensors = []
        for o in row:
            t = o.tensor
            if o.mode == "w" and not t.is_contiguous:
                t = empty(o.tensor.sizes, o.tensor.dtype)
            elif o.mode != "0":
                t = contiguous(t)
            if "w" in o.mode and t is not o.tensor:
                after.append((o.tensor, t))
            tensors.append(t)
        dense.append(tensors)
    modes = tuple(o.mode for o in rows[0])
    dtypes = tuple(o.tensor.dtype for o in rows[0])
    part = SCALAR_TYPES[compute_dtype(dtype)]
    value_types = tuple((part,) * (2 if isinstance(v, tuple) else 1) for v in values)
    row_types = tuple((part,) * (2 if isinstance(v, tuple) else 1) for v in (row_values[0] if row_values else ()))
    shared_tensors = [*shared, *(t for t in (guard, flag) if t is not None)]
    most = _most_rows(
        target(), len(modes), len(shared_tensors), sum(map(len, value_types)), sum(map(len, row_types)), part
    )
    for start in range(0, len(rows), most):
        chunk = dense[start : start + most]
        chunk_values = list(row_values[start : start + most])
        # Few kernels for all list lengths: the count is rounded up to a power of two or the most, with empty rows.
        count = min(most, 1 << (len(chunk) - 1).bit_length())
        kernel = build(
            _kernel, name, function, prepare, count, dtype, modes, dtypes, tuple(s.dtype for s in shared_tensors), guard is not None,
            flag is not None, value_types, row_types,
        )  # fmt: skip
        sizes = [next(t for t, m in zip(row, modes) if m != "0").numel for row in chunk]
        sizes += [0] * (count - len(chunk))
        padded = [*chunk, *[chunk[0]] * (count - len(chunk))]
        numbers = _flat(values)
        for i in range(count):
            numbers += _flat(chunk_values[min(i, len(chunk) - 1)]) if chunk_values else []
        per = TASK if target().schedule_class == "vector" else PER_INVOCATION * kernel.workgroup[0]
        groups: Any = 0
        for n in sizes[: len(chunk)]:
            groups = groups + cdiv(n, per)
        launch(
            kernel, [t for row in padded for t in row] + shared_tensors, [*numbers, *sizes], fold_groups(target(), groups)
        )  # fmt: skip
    for out, t in after:
        copy_to(out, t)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [x for v in values for x in (v if isinstance(v, tuple) else (v,))]


def _most_rows(t: Target, operands: int, shared: int, values: int, row_values: int, part: str) -> int:
    size = DTYPES[part].size
    from .. import _C
    from ..lowering import recorder

    bindings = int(_C.device_properties(recorder().device)["max_bindings"])
    bindings = min(bindings, MOST_BINDINGS.get(t.language, bindings))
    if t.language == "wgsl":
        return max((bindings - shared - 1) // operands, 1)
    most = (bindings - shared - 1) // operands
    room = t.max_params - 8 * shared - size * values - 8
    return max(min(most, room // (8 * operands + 4 + size * row_values)), 1)


def _kernel(
    t: Target, name: str, function: Callable[..., Any], prepare: Callable[..., Any] | None, count: int, dtype: str, modes: tuple, dtypes: tuple,
    shared: tuple, guarded: bool, flagged: bool, value_types: tuple, row_types: tuple,
) -> Kernel:  # fmt: skip
    vector = t.schedule_class == "vector"
    label = [
        name,
        dtype,
        str(count),
        *(m + d for m, d in zip(modes, dtypes)),
        *shared,
        "guard" * guarded,
        "flag" * flagged,
    ]
    label += [f"v{len(x)}" for x in value_types] + [f"r{len(x)}" for x in row_types]
    k = KernelBuilder(t, "multi_" + "_".join(x for x in label if x) + ("_vector" if vector else "_simt"))
    places = [
        [k.buffer(f"x{r}_{i}", d, {"0": "r", "w": "w"}.get(m, m)) for i, (m, d) in enumerate(zip(modes, dtypes))]
        for r in range(count)
    ]
    common = [k.buffer(f"shared{i}", d, "w" if flagged and i == len(shared) - 1 else "r") for i, d in enumerate(shared)]
    flag = common.pop() if flagged else None
    guard = common.pop() if guarded else None
    values = [_number(k, f"value{i}", x) for i, x in enumerate(value_types)]
    of_rows = [[_number(k, f"row{r}_{i}", x) for i, x in enumerate(row_types)] for r in range(count)]
    sizes = [k.scalar(f"n{r}", "u32") for r in range(count)]
    size = 1 if vector else min(SIMT_WORKGROUP, t.max_workgroup_size)
    per = TASK if vector else size * PER_INVOCATION
    group = k.group_index()

    def row(buffers: Sequence[Buffer], n: Any, first: Any, own: Sequence[Any]) -> None:
        ones = [k.let(as_dtype(b[0], _wider(dtype, b.dtype))) for b, m in zip(buffers, modes) if m == "0"]
        alls = [k.let(as_dtype(b[0], _wider(dtype, b.dtype))) for b in common]
        numbers = [*ones, *alls, *values, *own]
        if prepare is not None:
            numbers = [k.let(x) for x in prepare(*numbers)]

        def elements(index: Any) -> None:
            loaded = [as_dtype(b[index], dtype) for b, m in zip(buffers, modes) if m in ("r", "rw")]
            results = function(*loaded, *numbers)
            results = results if isinstance(results, tuple) else (results,)
            outs = [b for b, m in zip(buffers, modes) if "w" in m]
            values_of = [ir.as_node(v, compute_dtype(dtype)) if isinstance(v, (int, float)) else v for v in results]
            stored = [k.let(as_dtype(v, b.dtype)) for b, v in zip(outs, values_of)]
            for b, v in zip(outs, stored):
                b[index] = v
            if flag is not None:
                any_ = k.let(results[-1])
                while any_.lanes > 1:
                    any_ = k.let(ir.or_(*k.halves(any_)))
                with k.If(any_):
                    flag[0] = 1.0

        if vector:
            last = k.let(ir.cast(ir.minimum(first + per, n), "i32"))
            j = k.var("i32", ir.cast(first, "i32"))
            for width in (LANES, 1):
                with k.While(lambda: j + width <= last):  # noqa: B023 (called at once)
                    elements(j.as_node() + k.lanes(width))
                    j.set(j + width)
            return
        at = k.let(first + k.local_id())
        for u in range(PER_INVOCATION):
            with k.If(at + u * size < n):
                elements(at + u * size)

    def find(found: Callable[[int, Any], None]) -> None:
        start: Any = ir.const(0, "u32")
        for r in range(count):
            end = k.let(start + ir.idiv(sizes[r] + (per - 1), per))
            with k.If(ir.and_(ir.ge(group, start), group < end)):
                found(r, k.let((group - start) * per))
            start = end

    def run() -> None:
        if t.language != "opencl":
            find(lambda r, first: row(places[r], sizes[r], first, of_rows[r]))
            return
        # One body: the row's pointers are chosen first.
        chosen = []
        for i, (d, m) in enumerate(zip(dtypes, modes)):
            k.text(f"__global {POINTEE[d]}* chosen{i} = x0_{i};")
            chosen.append(Buffer(k, BufferDecl(f"chosen{i}", d, {"0": "r"}.get(m, m), 1)))
        n, first = k.var("u32", 0), k.var("u32", 0)
        own = [tuple(k.var(x, 0) for x in types) for types in row_types]

        def choose(r: int, start: Any) -> None:
            for i in range(len(dtypes)):
                k.text(f"chosen{i} = x{r}_{i};")
            n.set(sizes[r])
            first.set(start)
            for variables, value in zip(own, of_rows[r]):
                for v, x in zip(variables, (value.re, value.im) if isinstance(value, ir.Complex) else (value,)):
                    v.set(x)

        find(choose)
        mine = [v[0].as_node() if len(v) == 1 else ir.Complex(v[0].as_node(), v[1].as_node()) for v in own]
        with k.If(n > 0):
            row(chosen, n.as_node(), first.as_node(), mine)

    if guard is not None:
        with k.If(ir.eq(guard[0], 0)):
            run()
    else:
        run()
    return k.finish((size, 1, 1))


def _wider(dtype: str, other: str) -> str:
    """The dtype to read a number in: counts and rates of a half-precision row are computed as f32."""
    return dtype if DTYPES[other].kind == "complex" or DTYPES[dtype].compute != "f32" else "f32"


def _number(k: KernelBuilder, name: str, types: tuple) -> Any:
    if len(types) == 2:
        return ir.Complex(k.scalar(name + "re", types[0]), k.scalar(name + "im", types[1]))
    return k.scalar(name, types[0])
