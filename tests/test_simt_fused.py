"""The kernels of torch.compile as GPUs get them: Programs, run without the runtime, against NumPy."""

import dataclasses

import numpy as np
import pytest
from kernel_runner import run, targets

from torch_spiral.compiler.loops import Program, Store, build, progression
from torch_spiral.compiler.runtime import Fused
from torch_spiral.kernels import ir, nest
from torch_spiral.kernels.ir import Node

TARGETS = {k: dataclasses.replace(t, compute_units=132) for k, t in targets().items() if k in ("opencl-simt", "wgsl")}


@pytest.fixture(scope="module", params=list(TARGETS))
def gpu(request):
    return TARGETS[request.param]


def leaf(name):
    return Node("leaf", "i32", attr=name)


def load(buffer, index, *mask):
    return Node("load", "f32", index, *mask, attr=buffer)


def const(n):
    return ir.const(n, "i32")


X0, X1, R0 = leaf("x0"), leaf("x1"), leaf("r0")


def sizes(*numbers):
    return [ir.const(n, "u32") for n in numbers]


def launch(gpu, program, arrays, offsets=None):
    """The buffers after a launch, and the kernel."""
    built = build(program, gpu)
    rows, reduced = ([n.attr for n in part] for part in (program.rows, program.reduced))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_spiral.lowering.target", lambda: gpu)
        grid = Fused(built.kernel, built.schedule, built.lanes)._groups(rows, reduced)
    return run(built.kernel, arrays, [9] * program.sites, tuple(grid), offsets), built


def wide(built):
    return any(w in built.kernel.source for w in ("vec4<f32>(", "(float4)("))


def test_progressions():
    """Steps and divisors of indices."""
    row = X1 * const(768)
    assert progression(row + X0, "x0") == (1, 768) and progression(row + X0, "x1") == (768, 1)
    assert progression(const(2) * X0 + const(6), "x0") == (2, 6)
    assert progression(ir.idiv(X0, const(3)), "x0")[0] is None
    found = Node("load", "i32", X1, attr="b")
    assert progression(found * const(64) + X0, "x0") == (1, 64) and progression(found * const(64), "x1")[0] is None
    assert progression(row - X0, "x0") == (-1, 768)


@pytest.mark.parametrize("rows, columns, offsets", [(3, 64, (0, 0, 0)), (40, 68, (4, 8, 0)), (5, 64, (1, 0, 0)), (4, 31, (0, 0, 0))])  # fmt: skip
def test_matrix_and_row(gpu, rows, columns, offsets):
    """A chain over a matrix and a row that is added to all; columns that four divides, and not; offsets that it does not."""
    value = load("b1", X1 * const(columns) + X0) + load("b2", X0)
    program = Program(
        "fused", [("b0", "f32", "rw"), ("b1", "f32", "r"), ("b2", "f32", "r")], [], sizes(columns, rows), [],
        [Store("b0", X1 * const(columns) + X0, ir.maximum(value, 0.0) * 2.0, None, False)],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    out, x, w = (np.full(rows * columns + 9, 7, np.float32), *rng.standard_normal((2, rows * columns + 9)))
    x, w = x.astype(np.float32), w.astype(np.float32)
    (got, *_), built = launch(gpu, program, [out, x, w], list(offsets))
    assert wide(built) == (columns % 4 == 0)
    a, b, c = offsets
    n = rows * columns
    want = np.maximum(x[b : b + n].reshape(rows, columns) + w[c : c + columns], 0) * 2
    np.testing.assert_allclose(got[a : a + n].reshape(rows, columns), want, rtol=1e-6)
    assert (np.delete(got, np.s_[a : a + n]) == 7).all()


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@pytest.mark.parametrize("n", [1, 1029, 4096])
def test_narrow_results_in_place(gpu, n, dtype):
    """Words of several elements, the last of them cut; the buffer is read as well."""
    name = {np.float16: "f16", np.int8: "i8"}[dtype]
    x = Node("load", "f32" if dtype == np.float16 else "i32", X0, attr="b0")
    program = Program("fused", [("b0", name, "rw")], [], sizes(n), [], [Store("b0", X0, x + x, None, False)])
    values = np.random.default_rng(0).integers(-50, 50, n + 7).astype(dtype)
    (got,), _ = launch(gpu, program, [values], [4])
    np.testing.assert_array_equal(got[4 : 4 + n], values[4 : 4 + n] * 2)
    np.testing.assert_array_equal(np.delete(got, np.s_[4 : 4 + n]), np.delete(values, np.s_[4 : 4 + n]))


def test_transposed_and_masked(gpu):
    """x.t() beside [y, 3, 3, 3 …]: loads of other steps, and under a mask, beside stores by four."""
    rows, columns = 12, 40
    padded = load("b2", X1 * const(30) + X0, ir.lt(X0, const(30)), ir.const(0.0, "f32"))
    value = load("b1", X0 * const(rows) + X1) + ir.where(ir.lt(X0, const(30)), padded, 3.0)
    program = Program(
        "fused", [("b0", "f32", "rw"), ("b1", "f32", "r"), ("b2", "f32", "r")], [], sizes(columns, rows), [],
        [Store("b0", X1 * const(columns) + X0, value, None, False)],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((columns, rows)).astype(np.float32), rng.standard_normal((rows, 30)).astype(np.float32)
    (got, *_), built = launch(gpu, program, [np.zeros((rows, columns), np.float32), x, y])
    assert wide(built)
    np.testing.assert_allclose(got, x.T + np.pad(y, ((0, 0), (0, 10)), constant_values=3), rtol=1e-6)


@pytest.mark.parametrize("bad", [False, True])
def test_checked_rows(gpu, bad):
    """Rows of a table by checked indices."""
    index = Node("check", "i32", Node("load", "i32", X1, attr="b2"), const(6), attr=(0, False))
    value = load("b1", index * const(36) + X0) * 2.0
    program = Program(
        "fused", [("b0", "f32", "rw"), ("b1", "f32", "r"), ("b2", "i32", "r")], [], sizes(36, 3), [],
        [Store("b0", X1 * const(36) + X0, value, None, False)], sites=1,
    )  # fmt: skip
    table = np.random.default_rng(0).standard_normal((6, 36)).astype(np.float32)
    at = np.array([4, 6 if bad else 5, 1], np.int32)
    (got, _, _, errors), built = launch(gpu, program, [np.zeros((3, 36), np.float32), table, at])
    assert wide(built)
    assert errors.tolist() == ([9, 6] if bad else [0, 0])
    np.testing.assert_allclose(got[[0, 2]], table[[4, 1]] * 2)


def test_scatter_adds_stay_single(gpu):
    """Atomic additions are made one by one."""
    program = Program(
        "fused", [("b0", "f32", "a"), ("b1", "f32", "r"), ("b2", "i32", "r")], [], sizes(100), [],
        [Store("b0", Node("load", "i32", X0, attr="b2"), load("b1", X0), "add", False)],
    )  # fmt: skip
    x, at = np.ones(100, np.float32), (np.arange(100) % 7).astype(np.int32)
    (got, *_), built = launch(gpu, program, [np.zeros(7, np.float32), x, at])
    assert not wide(built)
    np.testing.assert_array_equal(got, np.bincount(at))


def red(monoid, *values, part=0):
    return Node("red", monoid.dtypes[part], *values, attr=(monoid, part))


@pytest.mark.parametrize("rows, d, first", [(4, 64, 0), (5, 333, 3), (3, 5000, 1), (2, 3, 0)])
def test_rows(gpu, rows, d, first):
    """A row normalised with a weight for every element; its largest element beside it. Rows that begin anywhere."""
    index = X0 * const(d) + R0
    x, w = load("b2", index), load("b3", R0)
    total = red(nest.SUM("f32"), x * x)
    program = Program(
        "fused", [("b0", "f32", "rw"), ("b1", "f32", "rw"), ("b2", "f32", "r"), ("b3", "f32", "r")], [], sizes(rows), sizes(d),
        [Store("b0", index, x * ir.rsqrt(total) * w, None, True), Store("b1", X0, red(nest.MAX("f32"), x), None, False)],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(rows * d + 4).astype(np.float32), rng.standard_normal(d).astype(np.float32)
    arrays = [np.full(rows * d + 4, 7, np.float32), np.zeros(rows, np.float32), x, w]
    (got, largest, *_), built = launch(gpu, program, arrays, [first, 0, first, 0])
    assert built.schedule == "workgroup" and wide(built)
    view = x[first : first + rows * d].reshape(rows, d)
    want = view / np.sqrt((view.astype(np.float64) ** 2).sum(1, keepdims=True)) * w
    np.testing.assert_allclose(got[first : first + rows * d].reshape(rows, d), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(largest, view.max(1))
    assert (np.delete(got, np.s_[first : first + rows * d]) == 7).all()
